"""Runs as jobs of a cluster, through submitit: each runs the very command that a user would type.

When SLURM is about to stop a job (its time is up, or it is preempted) it sends SIGUSR2. submitit then
calls `checkpoint`: the program is told to save and the job goes back into the queue, where the same
command goes on. A plain SIGTERM is passed on too.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from launch import jobs
from launch.board import Board
from launch.plan import Run
from mirai_jax.utils import files
from mirai_jax.utils.errors import ConfigError, Preempted, first_line

CLUSTERS = ("slurm", "local", "debug")
_WARNING = 300  # seconds between SIGUSR2 and the end of a job's time
_TIMEOUTS = 1000  # times that a job may go back into the queue
_PATIENCE = 120.0  # seconds that a stopped job waits for what the cluster will do with it


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise ConfigError(
            "--slurm needs submitit, which is not installed: pip install 'mirai-jax[slurm]'"
        ) from None
    return submitit


class TrainJob:
    """What a job does; submitit stores it in a file and calls it on the cluster."""

    def __init__(self, run: Run):
        self.run = run
        self._process: jobs.Process | None = None
        self._told = False

    def __call__(self) -> int:
        """Runs the program to its end; returns its exit status."""
        old = signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            status = self._wait()
            if self._told and status in jobs.AGAIN:
                # Preempted jobs are put back by the cluster, cancelled ones are killed: either way
                # it decides about a job that is still there.
                time.sleep(_PATIENCE)
            return status
        finally:
            signal.signal(signal.SIGTERM, old)

    def checkpoint(self) -> Any:
        """What is to run instead, once more: submitit calls this in its handler of SIGUSR2."""
        self._told = True
        if self._process is not None:
            self._process.stop()
            _wait_for(self._process.pid, _WARNING - 20)
            self._process.poll()  # its log tells how it ended
        return _submitit().helpers.DelayedSubmission(TrainJob(self.run))

    def _wait(self) -> int:
        while self._process is None:
            if self._told:
                return Preempted.status
            try:
                self._process = jobs.Process(self.run)
            except jobs.Busy:
                time.sleep(5)
        while (status := self._process.poll()) is None:
            time.sleep(0.5)
        return status

    def _on_sigterm(self, number: int, frame: object) -> None:
        del number, frame
        self._told = True
        if self._process is not None:
            self._process.stop()


def _wait_for(pid: int, limit: float) -> None:
    """Until the child has ended; it stays for its Popen, in whose middle we may be, to collect."""
    end = time.monotonic() + limit
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < end and os.waitid(os.P_PID, pid, flags) is None:
            time.sleep(0.1)


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What a job asks the cluster for.

    Attributes:
        cluster: 'slurm', or submitit's 'local' (processes of this machine) and 'debug' (this one).
        partition: '' is the cluster's default.
        minutes: of one stay; a job that needs more goes back into the queue.
        gpus: of one run.
        cpus: of one run; 0 is the cluster's default.
        sbatch: {option: value} beyond these.
        at_once: how many jobs may run together; 0 is all.
    """

    cluster: str
    partition: str
    minutes: int
    gpus: int
    cpus: int
    sbatch: Mapping[str, str]
    at_once: int

    def parameters(self, name: str) -> dict[str, Any]:
        parameters = dict(
            name=name,
            timeout_min=self.minutes,
            slurm_signal_delay_s=_WARNING,
            slurm_additional_parameters={"requeue": True, **self.sbatch},
        )
        if self.partition:
            parameters["slurm_partition"] = self.partition
        if self.gpus:
            parameters["gpus_per_node"] = self.gpus
        if self.cpus:
            parameters["cpus_per_task"] = self.cpus
        if self.at_once:
            parameters["slurm_array_parallelism"] = self.at_once
        return parameters


class Cluster:
    """The jobs of one sweep; jobs.json keeps their ids.

    Raises:
        ConfigError: there is no such cluster here, or it refuses the wishes.
    """

    def __init__(self, out: pathlib.Path, wishes: Wishes):
        self._submitit = _submitit()
        self._path, self._folder, self._cluster = out / "jobs.json", out / "jobs", wishes.cluster
        try:
            self._executor = self._submitit.AutoExecutor(
                folder=self._folder,
                cluster=wishes.cluster,
                slurm_max_num_timeout=_TIMEOUTS,
                local_max_num_timeout=_TIMEOUTS,
            )
            self._executor.update_parameters(**wishes.parameters(out.name))
        except (RuntimeError, ValueError, NameError) as error:
            raise ConfigError(f"--cluster={wishes.cluster}: {first_line(error)}") from error
        self._jobs: dict[str, Any] = {}  # by name of the run

    def submit(self, runs: Sequence[Run], log: jobs.Log) -> None:
        """Submits what is neither finished nor queued nor running."""
        known = json.loads(self._path.read_text()) if self._path.exists() else {}
        missing = []
        for run in runs:
            if run.finished():
                continue
            job = self._known(known.get(run.name))
            if job is None:
                missing.append(run)
            else:
                self._jobs[run.name] = job
                log(f"{run.name}: job {job.job_id} of {self._cluster} is still there")
        if not missing:
            return
        try:
            made = self._executor.submit_array([TrainJob(run) for run in missing])
        except (RuntimeError, OSError) as error:  # the last line is sbatch's own
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(f"{self._cluster} refuses the jobs: {lines[-1]}") from error
        for run, job in zip(missing, made, strict=True):
            self._jobs[run.name] = job
            known[run.name] = {"cluster": self._cluster, "job": job.job_id}
            log(f"{run.name}: job {job.job_id} of {self._cluster}, log {run.log}")
        files.write_text(self._path, json.dumps(known, indent=2) + "\n")

    def _known(self, entry: Mapping[str, str] | None) -> Any:
        """The job of an earlier launcher, if it is queued or running."""
        if entry is None or entry["cluster"] != "slurm":
            return None  # a process of this machine: its log is locked, a second one waits for it
        job = self._submitit.SlurmJob(folder=self._folder, job_id=entry["job"])
        return None if job.done(force_check=True) else job

    def wait(self, runs: Sequence[Run], board: Board) -> dict[str, str]:
        """Until all have ended; {name: why it failed}."""
        open_runs = {run.name: run for run in runs if run.name in self._jobs}
        failed: dict[str, str] = {}
        while open_runs:
            running = []
            for name, run in list(open_runs.items()):
                job = self._jobs[name]
                if not job.done():
                    running += [run] if job.state == "RUNNING" else []
                    continue
                del open_runs[name]
                why = self._why(run, job)
                if why is not None:
                    failed[name] = why
                board.log(f"{name}: finished" if why is None else f"{name}: failed: {why}")
            waiting = [run for run in open_runs.values() if run not in running]
            board.show(running, waiting, failed)
            time.sleep(1)
        return failed

    def _why(self, run: Run, job: Any) -> str | None:
        if run.finished():
            return None
        try:
            return jobs.failure(run, job.result())
        except Exception as error:  # submitit tells of lost and cancelled jobs in many ways
            return f"job {job.job_id} ({job.state}): {first_line(error)}"
