"""Measuring speed and memory: interleaved timing, what a machine can do at most, peak memory."""

import concurrent.futures
import contextlib
import gc
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mirai_jax.utils import host_memory

# Bytes that all cores of a CPU read together: four times the last-level caches of an EPYC of 64 cores
# (256 MiB). On 2 cores with 32 MiB the rate is the same from 256 MiB on, and twice that at 128 MiB.
_READ = 2**30


def seconds(
    function: Callable, *args: Any, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, Any]:
    """Runs a function to the end of its device work; returns the seconds and its result."""
    begun = clock()
    result = jax.block_until_ready(function(*args))
    return clock() - begun, result


def interleaved(
    tasks: Mapping[Any, Callable[[], float]],
    repeats: int,
    on_round: Callable[[], None] = lambda: None,
) -> dict[Any, list[float]]:
    """Times all tasks once a round, so that a slow minute of the machine slows all of them.

    In each round a task runs twice and the second run counts: the first finds caches and memory as
    another task left them, while in training a step follows a step.

    Args:
        tasks: each does its work and returns the seconds that it took.
    """
    taken: dict[Any, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            task()
            taken[name].append(task())
        on_round()
    return taken


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def paired_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median over rounds of the ratio of two tasks within a round."""
    return float(np.median(np.divide(values, others)))


# What the machine can do ---------------------------------------------------------------------------


def _best_rate(work: float, function: Callable, *args: Any, clock: Callable[[], float]) -> float:
    """Work a second, the best of five runs after a warm-up."""
    function(*args)
    return max(work / seconds(function, *args, clock=clock)[0] for _ in range(5))


def matmul_rate(
    dtype: str, device: jax.Device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Measured operations a second of large matrix products, the best of two sizes.

    Args:
        clock: whose seconds count: of the wall, or `time.process_time` of all this process's cores.
    """
    product, best = jax.jit(lambda a, b: a @ b), 0.0
    for size in (1024, 2048) if device.platform == "cpu" else (4096, 8192):
        keys = jax.random.split(jax.random.key(size))
        pair = jax.device_put([jax.random.normal(key, (size, size), dtype) for key in keys], device)
        best = max(best, _best_rate(2 * size**3, product, *pair, clock=clock))
    return best


def memory_rate(device: jax.Device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Measured bytes a second that the device's memory delivers, the best of several ways."""
    if device.platform == "cpu":
        # NumPy's maximum reads faster than XLA's reductions; one array a thread.
        threads = cpu_count()
        arrays = [np.full(_READ // 4 // threads, i, np.float32) for i in range(threads)]
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            read = lambda: list(pool.map(np.max, arrays))
            return _best_rate(threads * arrays[0].nbytes, read, clock=clock)
    big = jax.device_put(jnp.ones((2**30,), jnp.float32), device)
    read = jax.jit(lambda x: jnp.sum(x.reshape(1024, -1), axis=1))
    read_and_write = jax.jit(lambda x: x + 1)
    return max(
        _best_rate(big.nbytes, read, big, clock=clock),
        _best_rate(2 * big.nbytes, read_and_write, big, clock=clock),
    )


def cpu_count() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# Memory --------------------------------------------------------------------------------------------


class PeakMemory:
    """The most memory that work needs beyond what is in use at the start.

    It is that of one accelerator where the device counts it, else that of this process.
    """

    def __init__(self, device: jax.Device):
        self._device = device
        self._counted = "peak_bytes_in_use" in (device.memory_stats() or {})
        gc.collect()
        if self._counted:
            stats = device.memory_stats()
            self._before, self._peak_before = stats["bytes_in_use"], stats["peak_bytes_in_use"]
        else:
            host_memory.give_back_freed()
            self._before, self._peak_before = _resident("VmRSS"), 0

    def ready(self) -> None:
        """Marks the end of the preparation; on a CPU its own peak is forgotten."""
        gc.collect()
        if not self._counted:
            host_memory.give_back_freed()
            with contextlib.suppress(OSError):  # not Linux: the peak of the whole process stays
                pathlib.Path("/proc/self/clear_refs").write_text("5")

    def __call__(self) -> int | None:
        """Bytes beyond those at the start; None where earlier work, or what was freed since, hides them."""
        if self._counted:
            peak = self._device.memory_stats()["peak_bytes_in_use"]
        else:
            peak = _resident("VmHWM")
        if self._before is None or peak is None or peak == self._peak_before:
            return None
        return peak - self._before if peak > self._before else None


def _resident(field: str) -> int | None:
    """Bytes of this process by a field of /proc/self/status; None on other systems than Linux."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field + ":"))
