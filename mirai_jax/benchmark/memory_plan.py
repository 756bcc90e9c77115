"""Memory that a run needs on each device, from its train step compiled ahead of time.

By default XLA compiles for CPUs and simulated devices. It splits arrays over them as over accelerators;
it stores some bfloat16 numbers in 4 bytes and orders work without regard to memory, so that an
accelerator should need no more. For a named chip its own compiler does it (mirai_jax.plan --chip, benchmark/chips.py).
"""

import dataclasses
import time
from collections.abc import Container, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from mirai_jax import sharding, step
from mirai_jax.config.schema import SMALL_SETS, Settings
from mirai_jax.models import vq
from mirai_jax.models.tokenizer import PatchCodebook
from mirai_jax.models.vit_sizes import PUBLISHED
from mirai_jax.training import components
from mirai_jax.weights import frozen

_NOT_READ = "not read"  # the path of a published file whose shapes are known


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on each device.

    Attributes:
        parameters, ema, optimizer: of the train state.
        frozen: teachers, and the tokenizer of online codes.
        batch: the step's input.
        temporary: gradients, activations and the like, at their peak.
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


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The step of a config, all of its terms active, compiled ahead of time."""

    mesh: Mesh
    recipe: step.Recipe
    state: step.TrainState  # like frozen and batch: shapes, dtypes and shardings of the arguments
    frozen: dict[str, Any]
    batch: dict[str, jax.ShapeDtypeStruct]
    run: jax.stages.Compiled  # (state, frozen, batch) -> (state, metrics); the state is donated
    seconds: float  # of tracing and compiling

    @property
    def plan(self) -> Plan:
        analysis = self.run.memory_analysis()
        # Donated arguments share their memory with outputs.
        beyond = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return Plan(
            parameters=_share(self.state.params),
            ema=_share(self.state.ema),
            optimizer=_share(self.state.opt_state),
            frozen=_share(self.frozen),
            batch=_share(self.batch),
            temporary=analysis.temp_size_in_bytes + max(0, beyond),
        )


def without_files(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as a dictionary, with placeholders for files that compiling a step does not open."""
    config = dict(config.items())

    def fill(section: str, field: str, names: Container[str]) -> None:
        found = config.get(section)
        if hasattr(found, "items") and found.get("name") in names and found.get(field) == "":
            config[section] = {**dict(found.items()), field: _NOT_READ}

    if config.get("init_from") == "":  # which adapters need
        config["init_from"] = _NOT_READ
    fill("data", "images", ("images",))
    fill("teacher", "path", PUBLISHED)  # other teachers' shapes are those of their weights
    fill("tokenizer", "path", vq.MULTIPLIERS)
    return config


def compile_step(settings: Settings, devices: list[jax.Device]) -> CompiledStep:
    """Compiles the step of a config for a mesh of `devices`.

    No data is read, nor the weights of published teachers.

    Raises:
        ConfigError: a file that shapes depend on (another run as teacher) cannot be read.
    """
    mesh = sharding.make_mesh(settings.mesh, devices)
    recipe, frozen_shapes = recipe_and_frozen(settings)
    shapes = jax.eval_shape(lambda: step.init_state(recipe, jax.random.key(0)))
    state_sharding = sharding.shardings(shapes, mesh)
    state = _placed(shapes, state_sharding)
    fixed = _placed(frozen_shapes, sharding.replicated(mesh))
    batch = _placed(_batch(settings, recipe), sharding.batch_sharding(mesh))
    jitted = step.jit_train_step(recipe, state_sharding, sharding.batch_sharding(mesh))
    begun = time.perf_counter()
    with jax.set_mesh(mesh):
        run = jitted.lower(state, fixed, batch, tuple(True for _ in recipe.terms)).compile()
    return CompiledStep(mesh, recipe, state, fixed, batch, run, time.perf_counter() - begun)


def recipe_and_frozen(settings: Settings) -> tuple[step.Recipe, dict]:
    """The recipe of a config and the shapes of its frozen networks (or their weights, where read)."""
    shapes, teacher, tokenizer = {}, None, None
    if settings.needs_images and not settings.teacher.cached:
        teacher, shapes["bidirectional"] = frozen.teacher_shapes(settings)
    elif settings.needs_images:
        teacher, _ = frozen.teacher_shapes(settings)
    if settings.data.online:
        tokenizer, shapes["tokenizer"] = _online_tokenizer(settings)
    terms, static = components.load_generators(settings, None, shapes, lambda line: None)
    recipe = components.make_recipe(
        settings, terms, static, teacher, tokenizer, steps_per_epoch=1_000_000
    )
    return recipe, shapes


def _online_tokenizer(settings: Settings) -> tuple[nn.Module, Any]:
    """That of `tokenizer.path`; without one the published network and its shapes."""
    wanted, sides = settings.tokenizer, (256, 256)
    if wanted.name == "patch":
        sides = wanted.sides
        module = PatchCodebook(settings.generator.vocab_size, sides, wanted.patch, 3)
    elif wanted.path != _NOT_READ:
        return frozen.load_vq(settings)
    else:
        module = vq.VQModel(vq.VQConfig(vq.MULTIPLIERS[wanted.name]))
    image = jax.ShapeDtypeStruct((1, *sides, 3), np.float32)
    return module, jax.eval_shape(module.init, jax.random.key(0), image)["params"]


def _batch(settings: Settings, recipe: step.Recipe) -> dict[str, jax.ShapeDtypeStruct]:
    size, length = settings.batch_size, settings.generator.length
    sides, channels = settings.tokenizer.sides, 1 if settings.data.name in SMALL_SETS else 3
    batch = {"label": jax.ShapeDtypeStruct((size,), np.int32)}
    if not settings.data.online:
        batch["codes"] = jax.ShapeDtypeStruct((size, length), np.int32)
    if settings.step_sees_images:
        batch["image"] = jax.ShapeDtypeStruct((size, *sides, channels), np.uint8)
    elif settings.needs_images:
        features = (size, length, recipe.teacher.feature_width)
        batch["features"] = jax.ShapeDtypeStruct(features, np.float32)
    return batch


def _placed(tree, shardings):
    def place(where, part):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), part)

    return jax.tree.map(place, shardings, tree)


def _share(tree) -> int:
    """Bytes of a tree on one device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
