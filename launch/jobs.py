"""Runs on this machine: each a process with a log, several at once, started again where that helps."""

import contextlib
import fcntl
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from launch.board import Board
from launch.plan import Run
from mirai_jax.utils.errors import Lost, Preempted

# Exit statuses after which the same command goes on from the last checkpoint: told to stop, another
# process lost, and ends that a crowded machine brings (SIGABRT of JAX's runtime, SIGKILL of a full
# memory, SIGTERM before the program could catch it).
AGAIN = (
    Preempted.status,
    Lost.status,
    *(128 + s for s in (signal.SIGABRT, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)),
)
RESTARTS = 10  # without a new step, after which a run has failed
GRACE = 120.0  # seconds that a run told to stop has for saving
_TICK = 0.2  # seconds between looks at the processes
_OURS = b"launch: "  # begins our own lines in a log

Log = Callable[[str], None]


class Busy(Exception):
    """Another process works on the run, such as one that a killed launcher left and that saves."""


def _lock(file) -> bool:
    """Whether the file is ours now: until it is closed here and in every process that inherits it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


@contextlib.contextmanager
def only_launcher(out: pathlib.Path) -> Iterator[str | None]:
    """Holds the folder's lock; gives the process ("1234 on host") that does, or None.

    The lock is the kernel's and goes with the process: a file that is left behind locks nothing.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("a+") as file:
        if not _lock(file):
            file.seek(0)
            yield file.read().strip() or "?"
            return
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield None


class Process:
    """A run's program, started again when it ends with one of AGAIN.

    Its log is locked as long as a process of the run lives, so that no two work on one folder.

    Args:
        run: what to run.
        log: takes the line that tells of another start.
        environment: beside what this process has.

    Raises:
        Busy: another process works on the run.
    """

    def __init__(self, run: Run, log: Log = print, environment: Mapping[str, str] | None = None):
        self._run, self._log_line = run, log
        self._environment = {**os.environ, **(environment or {})}
        self._stopped, self._restarts, self._best = False, 0, run.step()
        run.log.parent.mkdir(parents=True, exist_ok=True)
        self._log = run.log.open("ab", buffering=0)
        if not _lock(self._log):
            self._log.close()
            raise Busy
        self._start()

    def _start(self) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._note(f"{now} {shlex.join(self._run.command)}")
        self._begun = time.monotonic()
        guard = pathlib.Path(__file__).with_name("child.py")
        self._process = subprocess.Popen(
            [sys.executable, "-IS", str(guard), str(os.getpid()), *self._run.command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,  # Ctrl-C is for the launcher, which tells it to save
        )
        self.pid = self._process.pid

    def _note(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk: the run itself will tell
            self._log.write(_OURS + line.encode() + b"\n")

    def poll(self) -> int | None:
        """The exit status when the run has ended for good (128 + n after signal n), else None."""
        status = self._process.poll()
        if status is None:
            return None
        self._kill_group()  # readers of data may have been left behind
        status = 128 - status if status < 0 else status
        self._note(f"exit status {status} after {time.monotonic() - self._begun:.1f} s")
        step = self._run.step()
        if step > self._best:
            self._best, self._restarts = step, 0
        if status in AGAIN and not self._stopped and self._restarts < RESTARTS:
            self._restarts += 1
            self._log_line(
                f"{self._run.name}: exit status {status} at step {step:,}; started again"
            )
            self._start()
            return None
        self._log.close()
        return status

    def stop(self) -> None:
        """Tells it, once, to save and end; it is not started again."""
        if not self._stopped and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._stopped = True

    def kill(self) -> None:
        """Ends it and all its processes."""
        self._stopped = True
        self._kill_group()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


def failure(run: Run, status: int) -> str | None:
    """Why a run that has ended is not finished, in one line; None if it is."""
    if status == 0 and run.finished():
        return None
    what = "ended before its last step" if status == 0 else f"exit status {status}"
    return f"{what}: {last_line(run.log) or 'its log is empty'}"


def last_line(log: pathlib.Path) -> str:
    """The last thing the program itself said."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 20_000))
        lines = [line.strip() for line in file.read().splitlines()]
    said = [line for line in lines if line and not line.startswith(_OURS)]
    return said[-1].decode(errors="replace") if said else ""


def seconds(log: pathlib.Path) -> float | None:
    """How long all of a run's processes have run; None where one was not seen to end, or none began."""
    pattern = rb"^launch: (?:exit status \d+ after ([\d.]+) s$|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d )"
    marks = re.findall(pattern, log.read_bytes(), re.MULTILINE) if log.exists() else []
    begun, spans = marks[::2], marks[1::2]  # a start has no span
    if not marks or any(begun) or not all(spans) or len(begun) != len(spans):
        return None
    return sum(map(float, spans))


class StopSignals:
    """Notes requests to stop (Ctrl-C, SIGTERM, a closed terminal) instead of dying of them.

    Attributes:
        asked: to stop.
        insisted: by another Ctrl-C, a second or more after the first request.
    """

    def __init__(self):
        self.asked, self.insisted, self._first = False, False, 0.0

    def __enter__(self) -> "StopSignals":
        wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # What is ignored stays ignored: nohup.
        wanted = [s for s in wanted if signal.getsignal(s) != signal.SIG_IGN]
        self._old = {s: signal.signal(s, self._on_signal) for s in wanted}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        del frame
        if not self.asked:
            self.asked, self._first = True, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() > self._first + 1:
            self.insisted = True


def gpus() -> list[str]:
    """The NVIDIA GPUs that the runs may use."""
    platforms = (os.environ.get("JAX_PLATFORMS") or "cuda").split(",")
    if not {"cuda", "gpu"} & set(platforms):
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return [str(i) for i, _ in enumerate(re.findall(r"^GPU \d+:", listed, re.MULTILINE))]


def gpu_share(all_gpus: list[str], slot: int, parallel: int) -> dict[str, str]:
    """The environment that gives one of `parallel` runs its own GPUs, or its part of one."""
    if not all_gpus or parallel == 1:
        return {}
    if parallel <= len(all_gpus):
        return {"CUDA_VISIBLE_DEVICES": ",".join(all_gpus[slot::parallel])}
    share = {"CUDA_VISIBLE_DEVICES": all_gpus[slot % len(all_gpus)]}
    if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
        together = -(-parallel // len(all_gpus))
        share["XLA_CLIENT_MEM_FRACTION"] = f"{0.9 / together:.3f}"
    return share


def run_all(runs: Iterable[Run], parallel: int, board: Board) -> tuple[dict[str, str], bool]:
    """Runs what is not finished, up to `parallel` at once.

    All share the cores: with cores of its own a run would take as long (measured: 54 and 64 s
    against 64 and 57 s for two runs on two cores), and its numbers would depend on how many.

    Returns:
        {name: why it failed} and whether it was stopped before the end.
    """
    waiting = [run for run in runs if not run.finished()]
    running: dict[int, tuple[Run, Process]] = {}
    failed: dict[str, str] = {}
    busy: set[str] = set()  # of which it was said that another process works on them
    all_gpus, deadline = gpus(), None
    with StopSignals() as stop:
        while running or (waiting and not stop.asked):
            free = [] if stop.asked else [s for s in range(parallel) if s not in running]
            for run in list(waiting):
                if not free:
                    break
                try:
                    process = Process(run, board.log, gpu_share(all_gpus, free[0], parallel))
                except Busy:
                    if run.name not in busy:
                        board.log(f"{run.name}: waiting for another process that works on it")
                    busy.add(run.name)
                    continue
                waiting.remove(run)
                running[free.pop(0)] = (run, process)
                board.log(f"{run.name}: started, log {run.log}")
            for slot, (run, process) in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[slot]
                why = failure(run, status)
                if why is None:
                    board.log(f"{run.name}: finished")
                elif stop.asked and status in AGAIN:
                    board.log(f"{run.name}: stopped at step {run.step():,}")
                    waiting.append(run)
                else:
                    board.log(f"{run.name}: failed: {why}")
                    failed[run.name] = why
            if stop.asked and deadline is None:
                deadline = time.monotonic() + GRACE
                board.log("stopping: the runs save what they have (Ctrl-C kills them)")
                for _, process in running.values():
                    process.stop()
            if deadline is not None and (stop.insisted or time.monotonic() > deadline):
                for _, process in running.values():
                    process.kill()
            board.show([run for run, _ in running.values()], waiting, failed)
            time.sleep(_TICK)
    return failed, bool(waiting)
