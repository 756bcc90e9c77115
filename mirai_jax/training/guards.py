"""What watches over a run: notices to stop, and steps that never end."""

import faulthandler
import signal
import sys
import threading
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

from mirai_jax.utils import distributed
from mirai_jax.utils.errors import Lost


class Preemption:
    """Whether the run was asked to stop: SIGTERM, or the platform's notice through JAX.

    With several processes JAX takes the signal and agrees with the others on the time; all must call
    `reached` equally often. Alone, the signal is caught here. A second SIGTERM ends the process as it would any
    other.
    """

    def __init__(self):
        self._notified, self._asked = False, 0
        self._jax = jax.distributed.is_initialized()
        self._old = None
        if not self._jax and threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        del number, frame
        self._notified = True
        self.close()

    def reached(self) -> bool:
        """Whether now is the time to save and end, for all processes alike."""
        if not self._jax:
            return self._notified
        # By the number of the question, not of the step: JAX agrees on the next after the largest
        # asked so far, which before the first is 0, and a resumed run does not begin there.
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)

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

    def __init__(self, limit: float, end: Callable[[int], None] = distributed.leave):
        """`limit` 0 watches nothing; `end` takes the exit status."""
        self._limit, self._end = limit, end
        self._silent, self._doing = 0.0, "starting"
        self._closed = threading.Event()
        if limit:
            threading.Thread(target=self._watch, daemon=True, name="hang guard").start()

    def heartbeat(self, what: str) -> None:
        """The run got further, and now begins `what` ("step 12", "the checkpoint of step 10")."""
        self._silent, self._doing = 0.0, what

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
        message += f"process {process} of {count} is at: {self._doing}"
        if count > 1:
            message += (
                "; if it waits for the devices, another process is gone or hangs: see its log"
            )
        print(message, file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        self._end(Lost.status)
