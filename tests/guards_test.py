"""What watches over a run: silence, jumps of the loss, notices to stop."""

import os
import signal
import threading
import time

from mirai_jax.training import guards


def test_silence_beyond_the_limit_is_reported_and_ends_the_process(capfd):
    ended = threading.Event()
    statuses = []

    def end(status):
        statuses.append(status)
        ended.set()

    guard = guards.HangGuard(0.4, end=end)
    for i in range(10):  # longer than the limit in all, but never silent for so long
        guard.heartbeat(f"step {i}")
        time.sleep(0.1)
    assert not statuses
    guard.heartbeat("step 8, waiting for its batch")
    assert ended.wait(10)
    assert statuses == [76]
    message = capfd.readouterr().err
    assert "no progress for" in message.splitlines()[0]
    assert "process 0 of 1 is at: step 8, waiting for its batch" in message.splitlines()[0]
    assert "guards_test.py" in message  # where the main thread stands
    guard.close()


def test_closed_or_without_a_limit_it_never_ends_anything():
    statuses = []
    guard = guards.HangGuard(0.05, end=statuses.append)
    guard.close()
    unlimited = guards.HangGuard(0, end=statuses.append)
    time.sleep(0.3)
    unlimited.close()
    assert statuses == []


def test_sigterm_is_a_notice_once_and_then_what_it_was(monkeypatch):
    caught = []
    old = signal.signal(signal.SIGTERM, lambda *_: caught.append(1))
    try:
        preemption = guards.Preemption()
        assert not preemption.reached()
        for _ in range(2):  # SLURM's own, and the one that its shell passes on
            os.kill(os.getpid(), signal.SIGTERM)
            assert preemption.reached() and preemption.reached() and not caught
        monkeypatch.setattr(guards, "_ECHO", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)  # who is in a hurry is heard
        assert caught
        preemption.close()
    finally:
        signal.signal(signal.SIGTERM, old)
