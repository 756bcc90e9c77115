"""Runs on this machine: each is a process with a log, and several run at once."""

import contextlib
import functools
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator

from launch.dashboard import Dashboard
from launch.plan import SweepRun, tail
from mirai_jax.utils.errors import Lost, Preempted
from mirai_jax.utils.locks import try_lock

# Exit statuses after which the same command resumes from the last checkpoint: stopped, another process
# lost, and what a crowded machine causes (SIGABRT of JAX's runtime, SIGKILL of a full memory, SIGTERM
# before the program could catch it).
_CROWDED = (signal.SIGABRT, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)
RETRYABLE = (Preempted.status, Lost.status, *(128 + number for number in _CROWDED))
RESTARTS = 10  # without a new step, after which a run has failed
GRACE = 120.0  # seconds that a stopped run has to save
_TICK = 0.2  # seconds between looks at the processes
_OURS = b"launch: "  # begins the launcher's lines in a log

Log = Callable[[str], None]


class AlreadyRunning(Exception):
    """Another process works on the run, such as one that a killed launcher left and that saves."""


class Process:
    """A run's program, started again when it ends with one of RETRYABLE.

    Its log is locked as long as a process of the run lives, so that no two work on one folder. `log` takes
    a line at each restart; `environment` adds to that of this process.

    Raises:
        AlreadyRunning: another process works on the run.
    """

    def __init__(self, run: SweepRun, log: Log = print, environment: dict[str, str] | None = None):
        self._run, self._log_line = run, log
        self._environment = os.environ | (environment or {})
        self._status: int | None = None
        self._stopped, self._restarts, self._best = False, 0, run.step()
        run.log.parent.mkdir(parents=True, exist_ok=True)
        self._log = run.log.open("ab", buffering=0)
        if try_lock(self._log) is False:
            self._log.close()
            raise AlreadyRunning
        self._start()

    def _start(self) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._note(f"{now} {shlex.join(self._run.command)}")
        self._begun = time.monotonic()
        guard = pathlib.Path(__file__).with_name("die_with_parent.py")
        self._process = subprocess.Popen(
            [sys.executable, "-IS", str(guard), str(os.getpid()), *self._run.command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=self._environment,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which stops the run
        )

    def _note(self, line: str) -> None:
        with contextlib.suppress(OSError):  # on a full disk the run itself fails
            self._log.write(_OURS + line.encode() + b"\n")

    def poll(self) -> int | None:
        """Returns the exit status once the run has ended for good (128 + n after signal n)."""
        status = self._process.poll()
        if status is None or self._status is not None:
            return self._status
        self.kill()  # the program may have left readers of data behind
        status = 128 - status if status < 0 else status
        self._note(f"exit status {status} after {time.monotonic() - self._begun:.1f} s")
        step = self._run.step()
        if step > self._best:
            self._best, self._restarts = step, 0
        if status in RETRYABLE and not self._stopped and self._restarts < RESTARTS:
            self._restarts += 1
            self._log_line(f"{self._run.name}: exit status {status} at step {step:,}; restarting")
            self._start()
            return None
        self._log.close()
        self._status = status
        return status

    def stop(self) -> None:
        """Sends SIGTERM once, at which the program saves; it does not start again."""
        if not self._stopped and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._stopped = True

    def kill(self) -> None:
        """Kills all processes of the run."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def failure(run: SweepRun, status: int) -> str | None:
    """Why an ended run is not finished, in one line; None if it is."""
    if status == 0 and run.finished():
        return None
    what = "ended before its last step" if status == 0 else f"exit status {status}"
    lines = [line.strip() for line in tail(run.log)]
    printed = [line for line in lines if line and not line.startswith(_OURS)]
    return f"{what}: {printed[-1].decode(errors='replace') if printed else 'its log is empty'}"


def seconds(log: pathlib.Path) -> float | None:
    """Seconds that a run's processes took; None if none started, or the end of one is not logged."""
    pattern = rb"^launch: (?:exit status \d+ after ([\d.]+) s$|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d )"
    marks = re.findall(pattern, log.read_bytes(), re.MULTILINE) if log.exists() else []
    begun, spans = marks[::2], marks[1::2]  # a start has no span
    if not marks or any(begun) or not all(spans) or len(begun) != len(spans):
        return None
    return sum(map(float, spans))


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[tuple[int, float]]]:
    """Records requests to stop as (signal, time): Ctrl-C, SIGTERM, a closed terminal."""
    requests: list[tuple[int, float]] = []
    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    wanted = [s for s in wanted if signal.getsignal(s) != signal.SIG_IGN]  # as under nohup

    def record(number: int, frame: object) -> None:
        requests.append((number, time.monotonic()))

    old = {number: signal.signal(number, record) for number in wanted}
    try:
        yield requests
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


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
    return [str(i) for i in range(len(re.findall(r"^GPU \d+:", listed, re.MULTILINE)))]


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


def run_all(
    runs: Iterable[SweepRun], parallel: int, dashboard: Dashboard
) -> tuple[dict[str, str], bool]:
    """Runs what is not finished, up to `parallel` at once.

    All runs share the cores: with separate cores two runs take as long (measured: 54 and 64 s against
    64 and 57 s on two cores), and their numbers would depend on how many there are.

    Returns:
        {name: why it failed}, and whether a signal stopped it before the end.
    """
    waiting = [run for run in runs if not run.finished()]
    running: dict[int, tuple[SweepRun, Process]] = {}  # by slot
    failed: dict[str, str] = {}
    all_gpus, log_once = gpus(), functools.cache(dashboard.log)
    with _stop_requests() as requests:
        while running or (waiting and not requests):
            free = [] if requests else [s for s in range(parallel) if s not in running]
            for run in list(waiting):
                if not free:
                    break
                try:
                    process = Process(run, dashboard.log, gpu_share(all_gpus, free[0], parallel))
                except AlreadyRunning:
                    log_once(f"{run.name}: waiting for another process that works on it")
                    continue
                waiting.remove(run)
                running[free.pop(0)] = (run, process)
                dashboard.log(f"{run.name}: started, log {run.log}")
            for slot, (run, process) in list(running.items()):
                status = process.poll()
                if status is None:
                    continue
                del running[slot]
                why = failure(run, status)
                if why is None:
                    dashboard.log(f"{run.name}: finished")
                elif requests and status in RETRYABLE:
                    dashboard.log(f"{run.name}: stopped at step {run.step():,}")
                    waiting.append(run)
                else:
                    dashboard.log(f"{run.name}: failed: {why}")
                    failed[run.name] = why
            if requests:
                log_once("stopping: the runs save (Ctrl-C kills them)")
                first = requests[0][1]
                late = time.monotonic() > first + GRACE
                again = any(n == signal.SIGINT and at > first + 1 for n, at in requests)
                for _, process in running.values():
                    process.stop()
                    if late or again:
                        process.kill()
            dashboard.show([run for run, _ in running.values()], waiting, failed)
            time.sleep(_TICK)
    return failed, bool(waiting)
