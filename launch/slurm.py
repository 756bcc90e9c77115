"""A sweep's runs as SLURM jobs, through submitit: each job runs the command that a user would type.

Before a job's time limit SLURM sends SIGUSR2. submitit then calls `checkpoint`: the program saves, and
the job returns to the queue, where the same command resumes. Before a preemption SLURM sends SIGTERM,
which the job passes on: the program saves, and SLURM ends the job and requeues it.
"""

import json
import pathlib
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from launch import jobs
from launch.dashboard import Dashboard
from launch.plan import SweepRun
from mirai_jax.utils import files
from mirai_jax.utils.errors import ConfigError, first_line

_CLUSTER = "slurm"  # submitit's name of the executor
_WARNING = 300  # seconds between SIGUSR2 and the end of a job's time
_TIMEOUTS = 1000  # how often a job may return to the queue


class TrainJob:
    """The work of one job; submitit pickles it and calls it on the cluster."""

    def __init__(self, run: SweepRun):
        self.run = run
        self._process: jobs.Process | None = None
        self._ending = False  # after SIGTERM

    def _on_sigterm(self, number: int, frame: object) -> None:
        self._ending = True
        if self._process is not None:
            self._process.stop()

    def __call__(self) -> int:
        """Runs the program to its end and returns its exit status.

        After SIGTERM it waits for SLURM to end the job: with a result the job would have failed.
        """
        signal.signal(signal.SIGTERM, self._on_sigterm)  # submitit's own does nothing
        while self._process is None:
            try:
                self._process = jobs.Process(self.run)
            except jobs.AlreadyRunning:
                time.sleep(5)
        while (status := self._process.poll()) is None or self._ending:
            time.sleep(0.5)
        return status

    def checkpoint(self) -> Any:
        """Saves, and returns the job to requeue. submitit calls this in its handler of SIGUSR2."""
        from submitit import helpers

        if self._process is not None:
            self._process.stop()
            deadline = time.monotonic() + _WARNING - 20
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
        return helpers.DelayedSubmission(TrainJob(self.run))


def submit(
    runs: Sequence[SweepRun], out: pathlib.Path, parameters: Mapping[str, Any], log: jobs.Log
) -> dict[str, Any]:
    """Submits the runs that are neither finished nor queued nor running.

    Args:
        out: the sweep's folder; its jobs.json keeps the ids of jobs.
        parameters: of submitit's executor for each job.

    Returns:
        {name of a run: its submitit job}, without finished runs.

    Raises:
        ConfigError: there is no submitit or SLURM here, or it refuses the parameters.
    """
    try:
        import submitit
    except ImportError:
        raise ConfigError("--slurm needs submitit: pip install -e '.[slurm]'") from None
    path = out / "jobs.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    found, missing = {}, []
    for run in [run for run in runs if not run.finished()]:
        if known.get(run.name, {}).get("cluster") == "slurm":
            job = submitit.SlurmJob(folder=out / "jobs", job_id=known[run.name]["job"])
            if not job.done(force_check=True):
                found[run.name] = job
                log(f"{run.name}: job {job.job_id} is still there")
                continue
        missing.append(run)
    if not missing:
        return found
    try:
        options = {"cluster": _CLUSTER, "slurm_max_num_timeout": _TIMEOUTS}
        executor = submitit.AutoExecutor(folder=out / "jobs", **options)
        executor.update_parameters(name=out.name, slurm_signal_delay_s=_WARNING, **parameters)
        made = executor.submit_array([TrainJob(run) for run in missing])
    except (RuntimeError, ValueError, OSError) as error:  # the last line is sbatch's own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"--slurm: {lines[-1]}") from error
    for run, job in zip(missing, made, strict=True):
        found[run.name] = job
        known[run.name] = {"cluster": _CLUSTER, "job": job.job_id}
        log(f"{run.name}: job {job.job_id}, log {run.log}")
    files.write_text(path, json.dumps(known, indent=2) + "\n")
    return found


def wait(
    runs: Sequence[SweepRun], submitted: Mapping[str, Any], dashboard: Dashboard
) -> dict[str, str]:
    """Waits until all submitted jobs have ended; returns {name: why it failed}."""
    waiting, failed = [run for run in runs if run.name in submitted], {}
    while waiting:
        for run in [run for run in waiting if submitted[run.name].done()]:
            waiting.remove(run)
            why = _failure(run, submitted[run.name])
            if why is not None:
                failed[run.name] = why
            dashboard.log(f"{run.name}: finished" if why is None else f"{run.name}: failed: {why}")
        running = [run for run in waiting if submitted[run.name].state == "RUNNING"]
        dashboard.show(running, [run for run in waiting if run not in running], failed)
        time.sleep(1)
    return failed


def _failure(run: SweepRun, job: Any) -> str | None:
    if run.finished():
        return None
    try:
        return jobs.failure(run, job.result())
    except Exception as error:  # submitit has many kinds for lost and cancelled jobs
        return f"job {job.job_id} ({job.state}): {first_line(error)}"
