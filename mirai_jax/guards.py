"""What watches over a run: notices to stop, steps that never end, losses that jump."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

from mirai_jax.errors import Lost


class Preemption:
    """Whether the run was told to stop: SIGTERM, or the platform's notice through JAX.

    With several processes JAX takes the signal and agrees with the others on a step; all must ask
    `reached` after each of their steps. Alone, the signal is caught here. A second SIGTERM ends the
    process as it would any other.
    """

    def __init__(self):
        self._told = False
        self._jax = jax.distributed.is_initialized()
        self._old = None
        if not self._jax and threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        del number, frame
        self._told = True
        self.close()

    def reached(self, step: int) -> bool:
        """Whether this is the step after which to save and end."""
        if self._jax:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._told

    def close(self) -> None:
        """Gives the signal back."""
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)
            self._old = None


class HangGuard:
    """Ends the process, with a report, when it has not got further for `limit` seconds.

    A host that died or hangs leaves the others waiting in a collective for ever; the report says
    what each of them was waiting for, so that the culprit is the one that waits for something else.
    """

    def __init__(
        self,
        limit: float,
        end: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`limit` 0 watches nothing; `end` takes the exit status."""
        self._limit, self._end, self._clock = limit, end, clock
        self._last, self._doing = clock(), "starting"
        self._closed = threading.Event()
        if limit:
            threading.Thread(target=self._watch, daemon=True, name="hang guard").start()

    def doing(self, what: str) -> None:
        """The run got further, and now begins `what` ("step 12", "the checkpoint of step 10")."""
        self._last, self._doing = self._clock(), what

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._limit / 10)):
            silent = self._clock() - self._last
            if silent > self._limit:
                self._report(silent)
                return

    def _report(self, silent: float) -> None:
        process, count = jax.process_index(), jax.process_count()
        print(
            f"error: no progress for {silent:.0f} s (hang_limit is {self._limit:g}): process "
            f"{process} of {count} is at: {self._doing}"
            + (
                "; if it waits for the devices, another process is gone or hangs: see its log"
                if count > 1
                else ""
            ),
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(all_threads=True)
        self._end(Lost.status)


class SpikeDetector:
    """Tells when a loss lies far above what it was: mean and deviation of about 100 steps.

    The first 50 values are only learned from.
    """

    def __init__(self, deviations: float = 6.0, decay: float = 0.99):
        self._deviations, self._decay = deviations, decay
        self._count, self._mean, self._variance = 0, 0.0, 0.0

    def __call__(self, value: float) -> str | None:
        """Takes the next value; a line about it if it is a spike."""
        self._count += 1
        gap = value - self._mean
        deviation = self._variance**0.5
        spike = self._count > 50 and gap > self._deviations * deviation + 0.01 * abs(self._mean)
        told = f"{value:.4f} against {self._mean:.4f} +- {deviation:.4f} before" if spike else None
        # The first values weigh alike; a spike counts as the largest value that is none.
        rate = max(1 / self._count, 1 - self._decay)
        if spike:
            gap = self._deviations * deviation + 0.01 * abs(self._mean)
        self._mean += rate * gap
        self._variance = (1 - rate) * (self._variance + rate * gap * gap)
        return told
