"""Batches on their way to the devices: one is read and sent while the devices are at the step before.

It also measures how long the devices stood still for want of one: `wait_share`, 0 to 1.
"""

import contextlib
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax

from mirai_jax.data.pipeline import Batches, WorkerDied
from mirai_jax.training.stopwatch import Stopwatch

WORKER_DEATHS = 3  # data workers started again within 1,000 steps before the run stops


class Prefetcher:
    """The batches of a run in order, never more than one ahead.

    Args:
        put: begins to bring a batch to the devices, and returns it there.
        heartbeat: takes what the run is at.
        died: takes the error of a data worker that died, and the number of the batch.
        replaced: takes the names of images for which others stand in.
    """

    def __init__(
        self,
        batches: Batches,
        put: Callable[[Any], Any],
        watch: Stopwatch,
        heartbeat: Callable[[str], None],
        died: Callable[[WorkerDied, int], None],
        clock: Callable[[], float] = time.perf_counter,
        replaced: Callable[[list[str]], None] = lambda names: None,
    ):
        self._batches, self._put, self._watch = iter(batches), put, watch
        self._doing, self._died, self._replaced, self._clock = heartbeat, died, replaced, clock
        self._ahead: tuple[Any, Exception | None] | None = None
        self._deaths: list[int] = []  # batches
        # Only a thread that waits for the end of a step knows when it was.
        self._ends = futures.ThreadPoolExecutor(1, "end of a step")

    def seek(self, index: int) -> None:
        """The next batch to take is number `index`."""
        self._batches.set_state({"next_index": index})
        self._ahead = None

    def next(self, index: int) -> Any:
        """Batch number `index`, on the devices; it is the one that follows the last taken.

        Raises:
            Exception: what reading it raised, also if it was read ahead: the steps before it are not
                to suffer from it.
        """
        if self._ahead is None:
            self.prefetch(index)
        (batch, error), self._ahead = self._ahead, None
        if error is not None:
            raise error
        return batch

    def prefetch(self, index: int, running: Any = None) -> None:
        """Reads batch number `index`, the next to take, and begins to bring it to the devices.

        Of the time that takes, what comes after the end of `running` (arrays that the step
        dispatched last will give, or None) is a wait: the devices have nothing to do.
        """
        begun, ended = self._clock(), self._ends.submit(self._end, running)
        try:
            self._ahead = self._put(self._read(index)), None
        except Exception as error:
            self._ahead = None, error
        if ended.done():
            self._watch.waited(self._clock() - max(begun, ended.result()))

    def close(self) -> None:
        self._ends.shutdown(wait=False)
        self._batches.close()

    def _end(self, running: Any) -> float:
        with contextlib.suppress(Exception):  # the loop will meet it, too
            jax.block_until_ready(running)
        return self._clock()

    def _read(self, index: int) -> Any:
        """This process's rows; readers that died are started again, a few times."""
        self._doing(f"step {index + 1}, waiting for its batch")
        while True:
            try:
                batch = next(self._batches)
                if names := getattr(self._batches, "replaced", ()):
                    self._replaced(names)
                return batch
            except WorkerDied as error:
                recent = [died for died in self._deaths if died > index - 1000]
                self._deaths = [*recent, index]
                if len(self._deaths) > WORKER_DEATHS:
                    raise
                self._died(error, index)
                self._batches.set_state({"next_index": index})
