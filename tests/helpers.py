"""What several test files need: errors of one line, programs in a subprocess, small configs and networks."""

import contextlib
import os
import pathlib
import subprocess
import sys

import flax.struct
import jax
import numpy as np
import pytest

from mirai_jax import foresight
from mirai_jax.evaluation import network
from mirai_jax.models import vq
from mirai_jax.step import jit_train_step
from mirai_jax.utils.errors import ConfigError, DataError
from mirai_jax.weights import torch_names, torch_writer

ROOT = pathlib.Path(__file__).parents[1]
# Of programs, whose compiling is most of their time; see conftest.
QUICK = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
}

# The smallest generator on real digits; `tiny` is the same for a config in this process.
TINY_MODEL = {"num_layers": 2, "num_heads": 2, "width": 32, "vocab_size": 16, "unroll": 1}
TINY = [f"--config.model.{name}={value}" for name, value in TINY_MODEL.items()]
TINY_VQ = vq.VQConfig(multipliers=(1, 2), width=32, z_channels=16, vocab_size=24)


# Errors -------------------------------------------------------------------------------------------


def refusal(function, *arguments, error=(ConfigError, DataError), **options):
    """Calls a function that must raise `error` and returns the message, which must be one line."""
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def exit_message(main, *arguments):
    """As `refusal`, for a program's main in this process: it exits with "error: MESSAGE"."""
    message = refusal(main, *arguments, error=SystemExit)
    assert message.startswith("error: ")
    return message


# Programs -----------------------------------------------------------------------------------------


def environment(**more):
    """The environment of a program on one CPU device."""
    return {**os.environ, **QUICK, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **more}


def program(module, *arguments, cwd=ROOT, timeout=600, **environ):
    """Runs `python -m module` to its end and returns it: status, stdout and stderr as text."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd, env=environment(**environ), capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def output(module, *arguments, **options):
    """As `program`, which must succeed; returns what it prints."""
    done = program(module, *arguments, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def error_line(module, *arguments, **options):
    """As `program`, which must fail with status 1; returns its last line, "error: MESSAGE"."""
    done = program(module, *arguments, **options)
    last = (done.stderr.strip().splitlines() or [""])[-1]
    assert done.returncode == 1 and last.startswith("error: "), done.stderr[-2000:]
    return last


@flax.struct.dataclass
class SavedState:
    """What a checkpoint holds of a run, as small as can be."""

    params: dict
    ema: dict
    key: jax.Array


def saved_state(value):
    tree = {"w.x": np.full((2, 3), value, np.float32)}
    return SavedState({"generator": tree, "foresight": {}}, tree, jax.random.key(0))


# Small configs and networks -----------------------------------------------------------------------


def tiny(module, steps=8, **fields):
    """The demo of a module of configs/ with the smallest generator; `fields` are updates of its top."""
    config = module.get_config("demo")
    config.update(num_steps=steps, batch_size=16, log_every=1, judged_samples=0)
    config.model.update(TINY_MODEL)
    config.optimizer.update(warmup_steps=2)
    for i, _ in enumerate(config.foresight):
        config.foresight[i].update(projector_width=16)
    config.update(fields)
    return config


def make_train_step(recipe, *shardings):
    """`step.jit_train_step` as a run calls it: `(state, teacher_params, batch, step) -> (state, metrics)`."""
    jitted = jit_train_step(recipe, *shardings)

    def run(state, teacher_params, batch, step):
        active = foresight.active_terms(recipe.terms, step, recipe.steps_per_epoch)
        with jax.set_mesh(shardings[-1].mesh) if shardings else contextlib.nullcontext():
            return jitted(state, teacher_params, batch, active)

    return run


def uncompiled_params(module, *inputs, seed=0):
    """What `module.init` gives, with other numbers: its program takes long to compile."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.RandomState(seed)

    def random(path, leaf):
        kind = path[-1].key
        if kind in ("kernel", "embedding"):
            spread = 1 if kind == "embedding" else np.prod(leaf.shape[:-1]) ** -0.5
            return np.float32(rng.normal(0, spread, leaf.shape))
        return np.full(leaf.shape, kind == "scale", np.float32)

    return jax.tree_util.tree_map_with_path(random, shapes)


class QuickNetwork(network.Network):
    """Eight random projections of the pixels in place of a network."""

    def __init__(self, inception, batch_size, pixels=224, devices=None):
        self.batch = batch_size * len(devices or jax.local_devices())
        self.is_inception = False

    def __call__(self, images):
        pixels = images.reshape(len(images), -1).astype(np.float32) / 255
        weights = np.random.RandomState(0).normal(size=(pixels.shape[1], 8)).astype(np.float32)
        return (np.stack([row @ weights for row in pixels]),)


def vq_file(folder, config=TINY_VQ):
    """A PyTorch file with a VQ of random weights, such as LlamaGen publishes."""
    side = config.downsample
    params = uncompiled_params(
        vq.VQModel(config), np.zeros((1, side, side, config.channels), np.float32)
    )
    path = folder / "vq.pt"
    torch_writer.write(path, {"model": torch_names.to_torch(config, params)})
    return path
