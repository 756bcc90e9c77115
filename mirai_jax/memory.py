"""How much memory a device needs for a run: its step compiled ahead of time, never run.

The compiler is XLA's for CPUs with simulated devices. It splits arrays over them as an accelerator's
would; it stores some bfloat16 numbers in 4 bytes, and orders work without regard to memory, so that
an accelerator should need no more.
"""

import dataclasses

import jax
import numpy as np

from mirai_jax import frozen, parts, sharding, step
from mirai_jax.config import Settings


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on each device.

    Attributes:
        parameters, ema, optimizer: of the train state.
        frozen: teachers, and the tokenizer of online codes.
        batch: what the step is fed.
        temporary: gradients, activations and the like, at their most.
    """

    parameters: int
    ema: int
    optimizer: int
    frozen: int
    batch: int
    temporary: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def lines(self) -> list[str]:
        """A table for the screen."""
        rows = {**dataclasses.asdict(self), "in all": self.total}
        return [f"  {name:<12}{size / 2**20:10,.1f} MiB" for name, size in rows.items()]


def plan(settings: Settings, devices: list[jax.Device]) -> Plan:
    """Compiles the step of a config, with all of its terms, for a mesh of `devices`.

    No data is read, nor the weights of published teachers.

    Raises:
        ConfigError: a file that shapes depend on (another run as teacher) cannot be read.
    """
    mesh = sharding.make_mesh(settings.mesh, devices)
    recipe, frozen_shapes = _recipe(settings)
    make = lambda: step.init_state(recipe, jax.random.key(0))  # noqa: E731
    shapes = jax.eval_shape(make)
    state_sharding = sharding.shardings(shapes, mesh)
    state = _placed(shapes, state_sharding)
    fixed = _placed(frozen_shapes, sharding.replicated(mesh))
    batch = _placed(_batch(settings, recipe), sharding.batch_sharding(mesh))
    jitted = step.jit_train_step(recipe, state_sharding, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        compiled = jitted.lower(state, fixed, batch, tuple(True for _ in recipe.terms)).compile()
    analysis = compiled.memory_analysis()
    # Donated: what comes out takes the place of what went in.
    beyond = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return Plan(
        parameters=_share(state.params),
        ema=_share(state.ema),
        optimizer=_share(state.opt_state),
        frozen=_share(fixed),
        batch=_share(batch),
        temporary=analysis.temp_size_in_bytes + max(0, beyond),
    )


def _recipe(settings: Settings) -> tuple[step.Recipe, dict]:
    """The recipe, and the shapes of what is frozen in it."""
    shapes, teacher, tokenizer = {}, None, None
    if settings.needs_images and not settings.teacher.cached:
        teacher, shapes["bidirectional"] = frozen.teacher_shapes(settings)
    elif settings.needs_images:
        teacher, _ = frozen.teacher_shapes(settings)
    if settings.data.online:
        tokenizer, shapes["tokenizer"] = frozen.load_vq(settings)
    terms, static = parts.load_generators(settings, None, shapes, lambda line: None)
    recipe = parts.make_recipe(
        settings, terms, static, teacher, tokenizer, steps_per_epoch=1_000_000
    )
    return recipe, shapes


def _batch(settings: Settings, recipe: step.Recipe) -> dict[str, jax.ShapeDtypeStruct]:
    size, length = settings.batch_size, settings.generator.length
    side, channels = settings.tokenizer.image_size, 1 if settings.data.in_memory else 3
    batch = {"label": jax.ShapeDtypeStruct((size,), np.int32)}
    if not settings.data.online:
        batch["codes"] = jax.ShapeDtypeStruct((size, length), np.int32)
    if settings.step_sees_images:
        batch["image"] = jax.ShapeDtypeStruct((size, side, side, channels), np.uint8)
    elif settings.needs_images:
        features = (size, length, recipe.teacher.features)
        batch["features"] = jax.ShapeDtypeStruct(features, np.float32)
    return batch


def _placed(tree, shardings):
    def one(where, part):
        put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
        return jax.tree.map(put, part)

    return jax.tree.map(one, shardings, tree)


def _share(tree) -> int:
    """Bytes of a tree on one device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
