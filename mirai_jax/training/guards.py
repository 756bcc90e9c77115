"""What watches over a run: notices to stop, and steps that never end."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

from mirai_jax.utils import distributed
from mirai_jax.utils.errors import Lost

_ECHO = 10.0  # seconds in which another SIGTERM is the same notice: SLURM's, and its shell's copy


class Preemption:
    """Whether the run was asked to stop: SIGTERM, SIGHUP, or the platform's notice through JAX.

    With several processes JAX takes SIGTERM (SIGHUP is passed on as one) and agrees with the others on
    the time; all must call `reached` equally often. Alone, it is caught here; a SIGTERM more than _ECHO s
    after the first notice ends the process as usual.
    """

    def __init__(self):
        self._notified: float | None = None  # the time of the first notice
        self._asked = 0
        self._jax = jax.distributed.is_initialized()
        self._old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGHUP,) if self._jax else (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                    self._old[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        now, first = time.monotonic(), self._notified is None
        self._notified = now if first else self._notified
        # A closing terminal sends SIGHUP more than once.
        if first and self._jax:
            os.kill(os.getpid(), signal.SIGTERM)
        elif number == signal.SIGTERM and now > self._notified + _ECHO:
            self.close()
            os.kill(os.getpid(), number)

    def reached(self) -> bool:
        """Whether now is the time to save and end, for all processes alike."""
        if not self._jax:
            return self._notified is not None
        # By the number of the question, not of the step: JAX agrees on the next after the largest
        # asked so far, which before the first is 0, and a resumed run does not begin there.
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)

    def close(self) -> None:
        """Gives the signals back."""
        for number, old in self._old.items():
            signal.signal(number, old)
        self._old = {}


class HangGuard:
    """Ends the process, with a report, when it has not got further for `limit` seconds.

    A host that died or hangs leaves the others waiting in a collective for ever; the report says
    what each of them was waiting for, so that the culprit is the one that waits for something else.

    Attributes:
        doing: what the run is at.
    """

    def __init__(self, limit: float, end: Callable[[int], None] = distributed.leave):
        """`limit` 0 watches nothing; `end` takes the exit status."""
        self._limit, self._end = limit, end
        self._silent, self.doing = 0.0, "starting"
        self._closed = threading.Event()
        if limit:
            threading.Thread(target=self._watch, daemon=True, name="hang guard").start()

    def heartbeat(self, what: str) -> None:
        """The run got further, and now begins `what` ("step 12", "the checkpoint of step 10")."""
        self._silent, self.doing = 0.0, what

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        interval = min(1.0, self._limit / 10)
        while not self._closed.wait(interval):
            # Counted, not read off a clock: a process that is suspended does not hang.
            self._silent += interval
            if self._silent > self._limit:
                self._report(self._silent)
                return

    def _report(self, silent: float) -> None:
        process, count = jax.process_index(), jax.process_count()
        message = f"error: no progress for {silent:.0f} s (hang_limit is {self._limit:g}): "
        message += f"process {process} of {count} is at: {self.doing}"
        more = "; if it waits for the devices, another process is gone or hangs: see its log"
        print(message + (more if count > 1 else ""), file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        self._end(Lost.status)
