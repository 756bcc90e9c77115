"""What the benchmark runs: train steps, their parts and sampling, each on random numbers of the right
shapes, so that it needs neither data nor weights.

The parts are programs of their own, cut where the step is cut:

    student     the gradient of the baseline: the generator and cross-entropy, forward and backward
    teacher     the targets of all terms
    projectors  the terms' heads and losses, forward and backward, down to the student's states
    optimizer   clipping, AdamW and the EMA

Their sum is not the step, where the compiler joins what they share and orders it otherwise.
"""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mirai_jax import sharding, step
from mirai_jax.benchmark import flops, measure, memory_plan
from mirai_jax.config.schema import Settings
from mirai_jax.data import pipeline, records
from mirai_jax.models import generator as generator_lib
from mirai_jax.sampling import sampler

_WARM_UP = 2  # steps before any is timed


def _random(shapes: Any, highest: Mapping[str, int], seed: int = 0) -> Any:
    """Arrays of these shapes where they shall lie: small normal numbers, or integers below
    `highest` of their name."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            values = rng.integers(0, highest[path[-1].key], x.shape, x.dtype)
        else:
            values = 0.02 * rng.standard_normal(x.shape, np.float32)
        return sharding.place(values, x.sharding)

    return jax.tree_util.tree_map_with_path(draw, shapes)


class Work:
    """A variant's step, compiled, and its parts."""

    def __init__(self, settings: Settings, devices: list[jax.Device]):
        self._settings, self._device = settings, devices[0]
        self._compiled = memory_plan.compile_step(settings, devices)
        self.recipe, self.plan = self._compiled.recipe, self._compiled.plan

    def facts(self) -> dict[str, Any]:
        """What is known before anything has run."""
        counted = flops.step_flops(
            self.recipe, self._settings.batch_size, cached_features=self._settings.teacher.cached
        )
        return {
            "compile_seconds": self._compiled.seconds,
            "plan": {**dataclasses.asdict(self.plan), "total": self.plan.total},
            "flops": dataclasses.asdict(counted),
            "xla_share": self._xla_share(),
        }

    def _xla_share(self) -> float | None:
        """XLA's own count of the step's operations over the formula's; None where it has none.

        XLA counts a loop's body once: the generators' are unrolled for it, and an encoder, whose
        blocks are a loop as well, is left out on both sides. It counts elementwise work too, and of
        causal attention the pairs that are computed, not all.
        """
        recipe, settings = self.recipe, self._settings
        if recipe.tokenizer is not None:
            return None  # the formula leaves it out
        unrolled = dataclasses.replace(
            recipe.generator, unroll=recipe.generator.num_layers, remat="none", attention="xla"
        )
        recipe = dataclasses.replace(recipe, generator=unrolled, accumulate=1)
        plain = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
        state, frozen, batch = jax.tree.map(
            plain, (self._compiled.state, self._compiled.frozen, self._compiled.batch)
        )
        if "image" in batch:
            shape = (settings.batch_size, recipe.generator.length, recipe.teacher.feature_width)
            features = jax.ShapeDtypeStruct(shape, np.float32)
            batch = {"codes": batch["codes"], "label": batch["label"], "features": features}
        active = tuple(True for _ in recipe.terms)
        run = jax.jit(lambda *args: step.train_step(recipe, *args, active))
        try:
            counted = (run.lower(state, frozen, batch).cost_analysis() or {}).get("flops")
        except (NotImplementedError, jax.errors.JaxRuntimeError):  # not on every platform
            return None
        formula = flops.step_flops(recipe, settings.batch_size, cached_features=True)
        return counted / formula.total if counted else None

    def begin(self) -> int | None:
        """Makes state and batch and runs the first steps; returns the most bytes that were in use."""
        peak = measure.PeakMemory(self._device)
        compiled, generator = self._compiled, self._settings.generator
        where = jax.tree.map(lambda x: x.sharding, compiled.state)
        make = jax.jit(functools.partial(step.init_state, self.recipe), out_shardings=where)
        self._state = make(jax.random.key(0))
        highest = {
            "codes": generator.vocab_size, "label": generator.num_classes, "image": 256,
        }  # fmt: skip
        self._frozen, self._batch = _random((compiled.frozen, compiled.batch), highest)
        jax.block_until_ready((self._state, self._frozen, self._batch))
        peak.ready()
        for _ in range(_WARM_UP):
            self.step()
        return peak()

    def step(self) -> float:
        """Seconds of one update."""
        taken, (self._state, _) = measure.seconds(
            self._compiled.run, self._state, self._frozen, self._batch
        )
        return taken

    def parts(self) -> dict[str, Callable[[], float]]:
        """The parts, compiled and run once, by name: each call says the seconds of a run."""
        recipe, mesh = self.recipe, self._compiled.mesh
        active, key = tuple(True for _ in recipe.terms), jax.random.key(1)
        baseline = dataclasses.replace(recipe, terms=())

        def student(params, batch):
            loss = functools.partial(step.loss_fn, dropout_key=key)
            given = {"generator": params, "foresight": {}}
            grad = jax.grad(lambda p: loss(p, baseline, {}, batch, jnp.int32(0), ()), has_aux=True)
            return grad(given)

        def teacher(ema, frozen, batch):
            return step.teacher_targets(recipe, ema, frozen, batch, recipe.terms)

        def projectors(params, states, targets, batch):
            loss = lambda p, s: step.foresight_loss(  # noqa: E731
                p, recipe, s, targets, batch["codes"], jnp.int32(0), active
            )
            return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, states)

        # What they are given is looked up at each call: the step donates the state.
        def task(function: Callable, given: Callable[[], tuple]) -> Callable[[], float]:
            jitted = jax.jit(function)

            def run() -> float:
                with jax.set_mesh(mesh):
                    return measure.seconds(jitted, *given())[0]

            run()
            return run

        def part(name: str) -> Any:
            return self._state.params[name]

        tasks = {"student": task(student, lambda: (part("generator"), self._batch))}
        if recipe.terms:
            given = lambda: (self._state.ema, self._frozen, self._batch)  # noqa: E731
            tasks["teacher"] = task(teacher, given)
            with jax.set_mesh(mesh):
                targets = jax.jit(teacher)(*given())
            states = self._states()
            tasks["projectors"] = task(
                projectors, lambda: (part("foresight"), states, targets, self._batch)
            )
        return tasks | {"optimizer": self._optimizer()}

    def _states(self) -> dict[int, jax.Array]:
        """In place of the student's, at the tapped layers."""
        generator, place = self.recipe.generator, sharding.batch_sharding(self._compiled.mesh)
        shape = (self._settings.batch_size, generator.length, generator.width)
        taps = step.taps(self.recipe.terms, tuple(True for _ in self.recipe.terms))
        one = jax.ShapeDtypeStruct(shape, np.float32, sharding=place)
        return _random({tap: one for tap in taps}, {})

    def _optimizer(self) -> Callable[[], float]:
        gradients = jax.tree.map(lambda x: 1e-6 * x, self._state.params)

        def optimizer(state, gradients):
            params, opt_state, ema = step.update(self.recipe, state, gradients)
            return state.replace(params=params, opt_state=opt_state, ema=ema)

        where = jax.tree.map(lambda x: x.sharding, self._compiled.state)
        jitted = jax.jit(optimizer, donate_argnums=0, out_shardings=where)

        def run() -> float:
            with jax.set_mesh(self._compiled.mesh):
                taken, self._state = measure.seconds(jitted, self._state, gradients)
            return taken

        run()
        return run


class Sampling:
    """The sampler on a fresh generator, on one device: whole images of tokens."""

    def __init__(self, settings: Settings, batch_size: int):
        self._config, self._options, self._batch = settings.generator, settings.sample, batch_size
        params = jax.jit(generator_lib.init_params, static_argnums=0)(
            self._config, jax.random.key(0)
        )
        head = params["output"]["kernel"]  # zero at first: all tokens would be alike
        params["output"]["kernel"] = 0.02 * jax.random.normal(jax.random.key(1), head.shape)
        labels = jnp.arange(batch_size, dtype=jnp.int32) % self._config.num_classes
        keys = sampler.image_keys(jax.random.key(2), np.arange(batch_size))
        self._arguments = params, labels, keys
        begun = time.perf_counter()
        self._run = sampler.generate.lower(
            self._config, *self._arguments, options=self._options
        ).compile()
        self._compile_seconds = time.perf_counter() - begun
        self.draw()

    def facts(self) -> dict[str, Any]:
        sequences = self._batch * (2 if self._options.guidance > 1 else 1)
        itemsize = jnp.dtype(self._config.dtype).itemsize
        return {
            "images": self._batch,
            "tokens": self._config.length,
            "compile_seconds": self._compile_seconds,
            "bytes_a_token": flops.decode_bytes(self._config, sequences, itemsize),
            "flops_a_token": flops.decode_flops(self._config, sequences),
        }

    def draw(self) -> float:
        """Seconds of one batch of whole images."""
        return measure.seconds(self._run, *self._arguments)[0]


def input_rate(settings: Settings, batches: int = 40) -> float:
    """Images a second of the input pipeline alone, on stored codes of random numbers.

    Images that a teacher looks at are not read: their time is that of their files.
    """
    generator, count = settings.generator, max(4096, 4 * settings.batch_size)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, generator.num_classes, count)
    with tempfile.TemporaryDirectory() as folder:
        if settings.data.in_memory:
            codes = rng.integers(0, generator.vocab_size, (count, generator.length), np.uint16)
            source = records.CodedImages(codes, labels)
        else:
            shape = (10, generator.length)  # ten crops an image, as extraction stores them
            codes = lambda: rng.integers(0, generator.vocab_size, shape, np.uint16)  # noqa: E731
            packed = [records.pack_record(codes(), int(y), str(i)) for i, y in enumerate(labels)]
            records.write_shard(f"{folder}/codes.array_record", packed)
            source = records.CodeRecords(
                folder,
                grid=generator.grid,
                vocab_size=generator.vocab_size,
                num_classes=generator.num_classes,
            )
        found = pipeline.make_dataset(
            source,
            batch_size=settings.batch_size,
            seed=0,
            num_workers=settings.data.num_workers,
        )
        iterator = iter(found)
        try:
            for _ in range(8):  # workers start
                next(iterator)
            begun = time.perf_counter()
            for _ in range(batches):
                next(iterator)
            return batches * settings.batch_size / (time.perf_counter() - begun)
        finally:
            iterator.close()
