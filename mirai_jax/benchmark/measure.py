"""Measuring speed and memory: what a machine can do at most, work timed in turn, a peer beside it."""

import concurrent.futures
import contextlib
import gc
import json
import os
import pathlib
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mirai_jax.utils import host_memory

# Dense bfloat16 operations a second, as the makers' datasheets say, by what a device's kind contains:
# the first that fits.
DATASHEET = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v6": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
}


def seconds(function: Callable, *args: Any) -> tuple[float, Any]:
    """How long a call takes until all that it returns is there, and what it returns."""
    begun = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - begun, result


def in_turn(
    tasks: Mapping[str, Callable[[], float]],
    repeats: int,
    tell: Callable[[int], None] = lambda done: None,
) -> dict[str, list[float]]:
    """Every task once, then every task again: what slows the machine for a while slows them all.

    A task's first run in a round is not timed: it finds caches and memory as another task left them,
    while in its own loop a step follows a step.

    Args:
        tasks: each does its work and returns the seconds that it took.
        repeats: rounds.
        tell: called after each round with their number.
    """
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for done in range(repeats):
        for name, task in tasks.items():
            task()
            taken[name].append(task())
        tell(done + 1)
    return taken


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median over rounds of two tasks' ratio within the round."""
    return float(np.median(np.divide(values, others)))


# What the machine can do ---------------------------------------------------------------------------


def matmul_rate(dtype: str, device: jax.Device) -> float:
    """Operations a second of large matrix products, measured: the best of several sizes."""
    sizes = (1024, 2048) if device.platform == "cpu" else (4096, 8192)
    product = jax.jit(lambda a, b: a @ b)
    best = 0.0
    for size in sizes:
        keys = jax.random.split(jax.random.key(size))
        a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
        a, b = jax.device_put((a, b), device)
        seconds(product, a, b)
        for _ in range(5):
            best = max(best, 2 * size**3 / seconds(product, a, b)[0])
    return best


def datasheet_rate(device: jax.Device, dtype: str) -> float | None:
    """Operations a second by the maker's word; None for other chips and dtypes."""
    if dtype != "bfloat16":
        return None
    return next((rate for name, rate in DATASHEET.items() if name in device.device_kind), None)


def memory_rate(device: jax.Device) -> float:
    """Bytes a second that can be read from memory, measured: the best of several ways."""
    if device.platform == "cpu":
        return _host_memory_rate()
    big = jax.device_put(jnp.ones((2**30,), jnp.float32), device)
    ways = {
        jax.jit(lambda x: jnp.sum(x.reshape(1024, -1), axis=1)): big.nbytes,
        jax.jit(lambda x: x + 1): 2 * big.nbytes,  # read and written
    }
    best = 0.0
    for way, moved in ways.items():
        seconds(way, big)
        best = max(best, *(moved / seconds(way, big)[0] for _ in range(5)))
    return best


def _host_memory_rate() -> float:
    # NumPy's maximum reads faster than XLA's reductions; one array a thread, larger than caches.
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    arrays = [np.full(2**26, i, np.float32) for i in range(threads)]
    best = 0.0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(6):  # the first touches the memory
            begun = time.perf_counter()
            list(pool.map(np.max, arrays))
            best = max(best, sum(x.nbytes for x in arrays) / (time.perf_counter() - begun))
    return best


# Memory --------------------------------------------------------------------------------------------


class PeakMemory:
    """How much memory work needs at most, beyond what is in use when this is made: of one accelerator,
    or of this process."""

    def __init__(self, device: jax.Device):
        gc.collect()
        self._device = device
        stats = device.memory_stats() or {}
        self._counted = "peak_bytes_in_use" in stats
        if self._counted:
            self._before, self._peak_before = stats["bytes_in_use"], stats["peak_bytes_in_use"]
        else:
            host_memory.give_back_freed()
            self._before, self._peak_before = _resident("VmRSS"), 0

    def ready(self) -> None:
        """What the work needs is there; on a CPU what making it needed is forgotten."""
        gc.collect()
        if not self._counted:
            host_memory.give_back_freed()
            _forget_peak()

    def __call__(self) -> int | None:
        """Bytes beyond those at the start; None where earlier work needed more than this did."""
        if self._counted:
            peak = self._device.memory_stats()["peak_bytes_in_use"]
        else:
            peak = _resident("VmHWM")
        if self._before is None or peak is None or peak == self._peak_before:
            return None
        return peak - self._before


def _forget_peak() -> None:
    with contextlib.suppress(OSError):  # not Linux: the peak of the whole process stays
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> int | None:
    try:
        text = pathlib.Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(
        int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field + ":")
    )


# A peer --------------------------------------------------------------------------------------------


class PeerError(RuntimeError):
    """The peer cannot do a task: one line."""

    status = 1


class Peer:
    """Another program that does the same work when it is asked (see tests/official_peer.py).

    It reads a task a line and answers each with a line of JSON: {"seconds": s} or {"error": text}.
    """

    def __init__(self, command: str, *more: str):
        self._command = [*shlex.split(command), *more]
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise PeerError(f"--peer cannot be started: {error}") from error

    def __call__(self, task: str) -> float:
        """Seconds of a task.

        Raises:
            PeerError: the peer failed at it, or ended.
        """
        try:
            self._process.stdin.write(f"{task}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise PeerError(f"the peer ended (status {self._process.wait()}) at {task!r}")
        try:
            answer = json.loads(line)
            taken = answer.get("seconds")
        except (ValueError, AttributeError):
            answer, taken = {"error": f"answered {line.strip()!r}"}, None
        if not isinstance(taken, float):
            raise PeerError(f"the peer at {task!r}: {answer.get('error')}")
        return taken

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it ended before it read all that it was asked
            self._process.stdin.close()
        self._process.wait()
