"""What the benchmark runs: train steps, their parts, sampling and the input pipeline.

All arrays are random numbers of the right shapes, so that neither data nor weights are needed. The
parts are separate programs, cut where the step is cut:

    student     the gradient of the baseline: the generator and cross-entropy, forward and backward
    teacher     the targets of all terms
    projectors  the terms' heads and losses, forward and backward, down to the student's states
    optimizer   clipping, AdamW and the EMA

Their times do not add up to the step's: in the step the compiler shares and reorders work.
"""

import contextlib
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
from mirai_jax.benchmark import flops, measure, memory_plan, predict, rates
from mirai_jax.config.schema import Settings
from mirai_jax.data import pipeline, records
from mirai_jax.models import decoding
from mirai_jax.models import generator as generator_lib
from mirai_jax.sampling import sampler

_WARM_UP = 2  # steps before any is timed


def _random(shapes: Any, limits: Mapping[str, int], seed: int = 0) -> Any:
    """Arrays of these shapes and shardings: small normal numbers, or integers from 0 to below the
    limit of their name."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            values = rng.integers(0, limits[path[-1].key], x.shape, x.dtype)
        else:
            values = 0.02 * rng.standard_normal(x.shape, np.float32)
        return sharding.place(values, x.sharding)

    return jax.tree_util.tree_map_with_path(draw, shapes)


class StepWork:
    """A variant's train step, compiled, and its parts."""

    def __init__(self, settings: Settings, devices: list[jax.Device]):
        self._settings, self._devices, self._device = settings, devices, devices[0]
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
        }

    def predicted(self, products: float, memory: float) -> list[float] | None:
        """Seconds of a step by `benchmark/predict.py`, the lower and the upper end; None: no prediction.

        Args:
            products, memory: measured operations and bytes a second, for a CPU.
        """
        if self._device.platform == "cpu":
            chip = predict.of_rates(products, memory)
        else:
            chip = rates.of_kind(self._device.device_kind)
        if predict.obstacle(chip, self._devices):
            return None
        found = predict.predict(self._compiled.run.as_text(), chip, len(self._devices))
        return [ms / 1e3 for ms in found.total]

    def first_steps(self) -> int | None:
        """Makes state and batch and runs the first steps; returns the peak memory in bytes."""
        peak = measure.PeakMemory(self._device)
        compiled, generator = self._compiled, self._settings.generator
        where = jax.tree.map(lambda x: x.sharding, compiled.state)
        make = jax.jit(functools.partial(step.init_state, self.recipe), out_shardings=where)
        self._state = make(jax.random.key(0))
        limits = {"codes": generator.vocab_size, "label": generator.num_classes, "image": 256}
        self._frozen, self._batch = _random((compiled.frozen, compiled.batch), limits)
        jax.block_until_ready((self._state, self._frozen, self._batch))
        peak.ready()
        for _ in range(_WARM_UP):
            self.step()
        return peak()

    def step(self) -> float:
        """Runs one update and returns its seconds."""
        taken, (self._state, _) = measure.seconds(
            self._compiled.run, self._state, self._frozen, self._batch
        )
        return taken

    def parts(self) -> dict[str, Callable[[], float]]:
        """The parts by name, compiled and run once; each call runs one and returns its seconds."""
        recipe, active = self.recipe, tuple(True for _ in self.recipe.terms)
        baseline = dataclasses.replace(recipe, terms=())

        def student(params, batch):
            def loss(params):
                given, key = {"generator": params, "foresight": {}}, jax.random.key(1)
                return step.loss_fn(given, baseline, {}, batch, jnp.int32(0), (), dropout_key=key)

            return jax.grad(loss, has_aux=True)(params)

        def teacher(ema, frozen, batch):
            return step.teacher_targets(recipe, ema, frozen, batch, recipe.terms)

        def projectors(params, states, targets, codes):
            def loss(params, states):
                args = params, recipe, states, targets, codes, jnp.int32(0), active
                return step.foresight_loss(*args)

            return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, states)

        # The step donates its state: arguments are looked up at each call.
        tasks = {
            "student": self._task(student, lambda: (self._state.params["generator"], self._batch))
        }
        if recipe.terms:
            given = lambda: (step.ema_params(self._state), self._frozen, self._batch)
            tasks["teacher"] = self._task(teacher, given)
            with jax.set_mesh(self._compiled.mesh):
                targets = jax.jit(teacher)(*given())
            place = sharding.batch_sharding(self._compiled.mesh)
            shape = (self._settings.batch_size, recipe.generator.length, recipe.generator.width)
            one = jax.ShapeDtypeStruct(shape, np.float32, sharding=place)
            states = _random({tap: one for tap in step.taps(recipe.terms, active)}, {})
            heads = lambda: self._state.params["foresight"]
            tasks["projectors"] = self._task(
                projectors, lambda: (heads(), states, targets, self._batch["codes"])
            )
        return tasks | {"optimizer": self._optimizer()}

    def _task(self, function: Callable, arguments: Callable[[], tuple]) -> Callable[[], float]:
        jitted = jax.jit(function)

        def run() -> float:
            with jax.set_mesh(self._compiled.mesh):
                return measure.seconds(jitted, *arguments())[0]

        run()
        return run

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


class SamplerWork:
    """The sampler on a fresh generator, on one device: whole images of tokens."""

    def __init__(self, settings: Settings, batch_size: int):
        self._config, self._options, self._batch = settings.generator, settings.sample, batch_size
        init = jax.jit(generator_lib.init_params, static_argnums=0)
        params = init(self._config, jax.random.key(0))
        head = params["output"]["kernel"]  # zero at first: all tokens would be alike
        params["output"]["kernel"] = 0.02 * jax.random.normal(jax.random.key(1), head.shape)
        labels = jnp.arange(batch_size, dtype=jnp.int32) % self._config.num_classes
        keys = sampler.image_keys(jax.random.key(2), np.arange(batch_size))
        self._arguments = params, labels, keys
        begun = time.perf_counter()
        in_row = decoding.heads_in_row(self._config, jax.default_backend())
        lowered = sampler.generate.lower(
            self._config, *self._arguments, self._options, heads_in_row=in_row
        )
        self._run = lowered.compile()
        self._compile_seconds = time.perf_counter() - begun
        self.draw()

    def facts(self) -> dict[str, Any]:
        """What is known before a timed run."""
        sequences = self._batch * (2 if self._options.guidance > 1 else 1)
        widths = jnp.dtype(self._config.dtype).itemsize, self._options.cache_dtype
        return {
            "images": self._batch,
            "tokens": self._config.length,
            "compile_seconds": self._compile_seconds,
            "bytes_a_token": flops.decode_bytes(self._config, sequences, *widths),
        }

    def draw(self) -> float:
        """Draws one batch of whole images and returns its seconds."""
        return measure.seconds(self._run, *self._arguments)[0]


def input_rate(settings: Settings, batches: int = 40) -> float:
    """Images a second of the input pipeline alone, on stored codes of random numbers.

    Images for a teacher are not read: their time is that of their files.
    """
    generator, count = settings.generator, max(4096, 4 * settings.batch_size)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, generator.num_classes, count)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if settings.data.in_memory:
            codes = rng.integers(0, generator.vocab_size, (count, generator.length), np.uint16)
            source = records.CodedImages(codes, labels)
        else:
            shape = (10, generator.length)  # ten crops an image, as extraction stores them
            codes = lambda: rng.integers(0, generator.vocab_size, shape, np.uint16)
            packed = [records.pack_record(codes(), int(y), str(i)) for i, y in enumerate(labels)]
            records.write_shard(f"{folder}/codes.array_record", packed)
            source = records.CodeRecords(
                folder,
                grid=generator.grid,
                vocab_size=generator.vocab_size,
                num_classes=generator.num_classes,
            )
        size, workers = settings.batch_size, settings.data.num_workers
        dataset = pipeline.make_dataset(source, batch_size=size, seed=0, num_workers=workers)
        iterator = stack.enter_context(contextlib.closing(iter(dataset)))
        for _ in range(8):  # workers start
            next(iterator)
        begun = time.perf_counter()
        for _ in range(batches):
            next(iterator)
        return batches * size / (time.perf_counter() - begun)
