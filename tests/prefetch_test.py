"""Batches ahead: when they are read, what the devices wait for, and errors in their place."""

import threading

import pytest

from mirai_jax.data.pipeline import WorkerDied
from mirai_jax.training import prefetch
from mirai_jax.training.stopwatch import Stopwatch


class Source:
    """Numbers for batches; `reading(index)` happens while one is read."""

    def __init__(self, reading=lambda index: None):
        self._reading, self._index, self.read = reading, 0, []

    def __iter__(self):
        return self

    def __next__(self):
        self.read.append(self._index)
        self._reading(self._index)
        self._index += 1
        return self._index - 1

    def set_state(self, state):
        self._index = state["next_index"]

    def close(self):
        pass


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Step:
    """What a step will give."""

    def __init__(self):
        self.over = threading.Event()

    def block_until_ready(self):
        assert self.over.wait(60)
        return self


def make_feed(source, watch=None, clock=None, died=lambda error, index: None):
    put = lambda batch: f"batch {batch}"
    return prefetch.Prefetcher(
        source, put, watch or Stopwatch(), lambda what: None, died, clock or Clock()
    )


def lap_of(step_seconds, wait_seconds):
    """(seconds, share) of a lap in which the next batch comes so long after the step has ended.

    None: it comes before.
    """
    clock = Clock()
    watch, step = Stopwatch(clock), Step()

    def reading(index):
        if index == 1:
            clock.now += step_seconds
            if wait_seconds is not None:
                step.over.set()
                feed._ends.submit(int).result()  # the feed has seen it
                clock.now += wait_seconds

    feed = make_feed(Source(reading), watch, clock)
    assert feed.next(0) == "batch 0"
    feed.prefetch(1, step)
    step.over.set()
    clock.now += wait_seconds is None
    assert feed.next(1) == "batch 1"
    feed.close()
    return watch.lap()


def test_only_what_comes_after_the_end_of_the_step_is_a_wait():
    assert lap_of(1, 9) == (10, 0.9)
    assert lap_of(9, 1) == (10, 0.1)
    assert lap_of(10, 0) == (10, 0)
    assert lap_of(9, None) == (10, 0)  # nobody waited: the step ran


def test_a_lap_begins_with_no_wait_and_a_share_is_at_most_one():
    clock = Clock()
    watch = Stopwatch(clock)
    assert watch.lap() == (0, 0)
    watch.waited(1 + 1e-12)
    clock.now += 1
    assert watch.lap() == (1, 1)
    clock.now += 1
    assert watch.lap() == (1, 0)


def test_what_happens_while_the_watch_is_paused_is_in_no_lap():
    clock = Clock()
    watch = Stopwatch(clock)
    clock.now += 2
    watch.pause()
    clock.now += 100
    watch.pause()  # again
    assert watch.lap() == (2, 0)
    clock.now += 100
    assert watch.lap() == (0, 0)  # a lap does not set it going
    watch.resume()
    clock.now += 3
    watch.resume()
    clock.now += 1
    assert watch.lap() == (4, 0)


def test_an_error_is_raised_when_its_batch_is_taken():
    def reading(index):
        if index == 2:
            raise OSError("a bad record")

    feed = make_feed(Source(reading))
    feed.seek(1)
    assert feed.next(1) == "batch 1"
    feed.prefetch(2)
    with pytest.raises(OSError, match="a bad record"):
        feed.next(2)
    feed.seek(0)  # forgets what was ahead
    assert [feed.next(i) for i in (0, 1)] == ["batch 0", "batch 1"]
    feed.close()


def test_workers_that_die_while_reading_ahead_are_reported_with_their_batch():
    left = {5: 1, 7: prefetch.WORKER_DEATHS}

    def reading(index):
        if left.get(index):
            left[index] -= 1
            raise WorkerDied(f"before batch {index}")

    source, message = Source(reading), []
    feed = make_feed(source, died=lambda error, index: message.append((str(error), index)))
    feed.seek(4)
    assert feed.next(4) == "batch 4"
    feed.prefetch(5)
    assert message == [("before batch 5", 5)]
    assert [feed.next(i) for i in (5, 6)] == ["batch 5", "batch 6"]
    feed.prefetch(7)
    with pytest.raises(WorkerDied, match="before batch 7"):
        feed.next(7)
    assert source.read == [4, 5, 5, 6, 7, 7, 7] and len(message) == prefetch.WORKER_DEATHS
    feed.close()
