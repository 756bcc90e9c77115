"""Which attention kernel trains a long run on accelerators where `model.attention` is 'auto'.

The fused kernel saves memory, but at a few hundred positions XLA's may be the faster one: that depends
on the chip and on the shapes. So a run times both when it starts. events.jsonl has the answer, which
holds for as long as the run does, since another kernel rounds differently. Whatever else reads the
config (validation, the teachers that take images) keeps to the rule of models/attention.py.
"""

import contextlib
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mirai_jax.config.schema import Settings
from mirai_jax.models import attention
from mirai_jax.models.attention import KERNELS
from mirai_jax.training.workdir import note_event
from mirai_jax.utils import distributed

LONG = 10_000  # steps from which on a run is worth a minute, most of it for compiling
_ROUNDS, _RUNS = 4, 50  # runs of each kernel in a round; the first round compiles
_SHARE = 0.1  # of a device's memory that XLA's kernel may take in addition


def choose(
    settings: Settings, mesh: Mesh, folder: pathlib.Path, begin: int, log: Callable[[str], None]
) -> str:
    """Returns one of KERNELS, in every process that of the first; all must call it.

    Args:
        folder: the workdir, which belongs to this run.
        begin: how many steps the run has done.
    """
    if settings.generator.attention != "auto":
        return settings.generator.attention
    # A run that was stopped before its first checkpoint has an answer, too.
    recorded = _recorded(folder) if distributed.is_first() else None
    if known := _from_first(recorded):
        return known
    if begin or settings.num_steps < LONG:
        return "auto"
    taken = measure(settings, mesh)
    if distributed.worst(int(taken.get("xla") == math.inf)):  # in any process
        taken["xla"] = math.inf
    # Where nothing was measured, "auto" is the first of them and stands.
    found = _from_first(min(KERNELS, key=lambda name: taken.get(name, 0)))
    if taken and distributed.is_first():
        times = {f"{name}_ms": round(1000 * seconds, 4) for name, seconds in taken.items()}
        times = {name: ms if math.isfinite(ms) else None for name, ms in times.items()}
        note_event(folder, "attention", kernel=found, **times)
        log(f"attention: {found}; timed {times}, auto being the fused kernel")
    return found


def _from_first(kernel: str | None) -> str | None:
    """The first process's one of KERNELS or None, in every process; all must call it."""
    choices = (None, *KERNELS)
    return choices[int(distributed.from_first(np.asarray(choices.index(kernel))))]


def measure(settings: Settings, mesh: Mesh) -> dict[str, float]:
    """{kernel: seconds of a block's attention, forward and backward}; {} where there is no choice.

    XLA's kernel takes infinite seconds where it fails: for lack of memory, as a rule.

    Raises:
        jax.errors.JaxRuntimeError: the fused kernel fails, or another process is gone.
    """
    config, device = settings.generator, mesh.local_devices[0]
    batch = settings.batch_size // settings.accumulate
    shape = (batch, config.length, config.num_heads, config.head_dim)
    blocks = config.num_layers if config.remat == "none" else 1  # whose weights are kept at once
    kept = blocks * attention.stored_bytes(shape, config.dtype) / mesh.size
    memory = (device.memory_stats() or {}).get("bytes_limit", math.inf)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))

    @functools.partial(jax.jit, out_shardings=rows)
    def inputs():
        keys = jax.random.split(jax.random.key(0), 3)
        return tuple(jax.random.normal(key, shape, config.dtype) for key in keys)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2, 3), out_shardings=rows)
    def step(kernel, *qkv):
        out, backward = jax.vjp(
            functools.partial(attention.attend, causal=True, kernel=kernel), *qkv
        )
        return backward(out)

    def run(kernel):
        qkv = jax.block_until_ready(inputs())
        begun = time.perf_counter()
        try:
            for _ in range(_RUNS):
                qkv = step(kernel, *qkv)
            jax.block_until_ready(qkv)
        except jax.errors.JaxRuntimeError as error:
            if kernel != "xla" or distributed.means_lost(error):
                raise
            return math.inf
        return (time.perf_counter() - begun) / _RUNS

    with jax.set_mesh(mesh):
        has_choice = attention.has_fused(shape, config.dtype, device.platform)
        if not has_choice or kept > _SHARE * memory:
            return {}
        taken = {kernel: [] for kernel in KERNELS}
        for _ in range(_ROUNDS):
            for kernel, seconds in taken.items():
                if math.inf not in seconds:
                    seconds.append(run(kernel))
    # A kernel that has failed once is out: in training there is less memory than here.
    return {k: math.inf if math.inf in times else min(times[1:]) for k, times in taken.items()}


def _recorded(folder: pathlib.Path) -> str | None:
    """What a run's start has chosen; None where it has not."""
    found, path = None, folder / "events.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that a stop cut off
            event = json.loads(line)
            if event["event"] == "attention" and event["kernel"] in KERNELS:
                found = event["kernel"]
    return found
