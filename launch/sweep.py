"""Starts the missing runs of a sweep: `python -m launch.sweep`.

    python -m launch.sweep --sweep=launch/sweeps/variants.py --parallel=2
    python -m launch.sweep --sweep=launch/sweeps/layer.py --scale=imagenet_b --slurm --gpus=8 \\
        --partition=long --time=1440 --set=data.path=codes/imagenet

The launcher checks every run before it starts any. The same command again skips finished runs and
resumes the others from their last checkpoint. The sweep's folder holds the workdir and the log of each
run, and at the end (with --report: at any time) table.md, table.csv, timing.csv and curves.png.

Exit status: 0 all runs are finished, 1 some failed or are wrong, 75 stopped: the same command resumes.
"""

import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from launch import curves, jobs, plan, slurm, tables
from launch.dashboard import Dashboard
from mirai_jax.config.flags import FIELD
from mirai_jax.utils import cli
from mirai_jax.utils.errors import ConfigError, Preempted
from mirai_jax.utils.locks import FolderLock

_FLAGS, _define = cli.flags_of(__name__)

_SWEEP = _define.string("sweep", None, "FILE with get_sweep(scale), see launch/sweeps/.")
_SCALE = _define.string("scale", "demo", "The part after the colon of every --config.")
_OUT = _define.string("out", None, "The sweep's folder; default: runs/sweeps/<sweep>-<scale>.")
_SET = _define.multi_string("set", [], "FIELD=VALUE for all runs; may be repeated.")
_PARALLEL = _define.integer(
    "parallel", 0, "How many runs at once, which share the GPUs. Default: one, with --slurm all.", 0
)
_DRY_RUN = _define.bool("dry_run", False, "Print the commands and do nothing.")
_REPORT = _define.bool("report", False, "Write the tables and the figure of the runs so far.")
_SLURM = _define.bool("slurm", False, "Submit the runs as SLURM jobs.")
_PARTITION = _define.string("partition", "", "SLURM's partition.")
_TIME = _define.integer(
    "time", 1440, "Minutes of a job, which returns to the queue until it is done.", 1
)
_GPUS = _define.integer("gpus", 1, "GPUs of a job.", 0)
_CPUS = _define.integer("cpus", 0, "CPU cores of a job; 0: 8 for each GPU.", 0)
_SBATCH = _define.multi_string("sbatch", [], "OPTION=VALUE of sbatch beyond these (account=me).")
_WAIT = _define.bool("wait", True, "With --slurm: wait for the jobs; --nowait returns at once.")


def _pairs(flag: str, given: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals) or (flag == "set" and not FIELD.fullmatch(name)):
            raise ConfigError(f"--{flag} is {text!r}; it must be NAME=VALUE")
        if name in pairs:
            raise ConfigError(f"--{flag} gives {name} twice: {pairs[name]!r} and {value!r}")
        pairs[name] = value
    return pairs


def _check_slurm_flags() -> None:
    """Without --slurm its flags would be ignored."""
    for name in ("partition", "time", "gpus", "cpus", "sbatch", "wait"):
        if _FLAGS[name].present and not _SLURM.value:
            raise ConfigError(f"--{name} is for jobs; it needs --slurm")


def _job_parameters() -> dict[str, Any]:
    """The parameters of submitit's executor; None leaves one out."""
    return {
        "timeout_min": _TIME.value,
        "gpus_per_node": _GPUS.value or None,
        "cpus_per_task": _CPUS.value or 8 * _GPUS.value or None,
        "slurm_partition": _PARTITION.value or None,
        "slurm_array_parallelism": _PARALLEL.value or None,
        "slurm_additional_parameters": {"requeue": True, **_pairs("sbatch", _SBATCH.value)},
    }


def _launch(runs: list[plan.SweepRun], out: pathlib.Path) -> dict[str, str]:
    """Runs what is missing; returns {name: why it failed}."""
    dashboard = Dashboard(runs)
    finished = sum(run.finished() for run in runs)
    dashboard.log(f"{out}: {finished} of {len(runs)} runs are finished")
    if not _SLURM.value:
        failed, stopped = jobs.run_all(runs, _PARALLEL.value or 1, dashboard)
        if stopped:
            print("stopped: the same command resumes from the checkpoints")
            sys.exit(Preempted.status)
        return failed
    submitted = slurm.submit(runs, out, _job_parameters(), dashboard.log)
    if not _WAIT.value:
        print("the same command with --wait follows the jobs, --report writes the tables so far")
        sys.exit(0)
    try:
        return slurm.wait(runs, submitted, dashboard)
    except KeyboardInterrupt:
        print("the jobs continue; the same command waits for them again, scancel ends them")
        sys.exit(Preempted.status)


def main(argv: list[str]) -> None:
    with cli.program(OSError):
        if len(argv) > 1:
            raise ConfigError(f"argument {argv[1]!r} is not understood; all are --flags")
        if _SWEEP.value is None:
            raise ConfigError("--sweep is missing; it must be a file as in launch/sweeps/")
        _check_slurm_flags()
        title = f"{pathlib.Path(_SWEEP.value).stem}-{_SCALE.value}"
        out = pathlib.Path(_OUT.value or pathlib.Path("runs") / "sweeps" / title)
        entries = plan.read_sweep(_SWEEP.value, _SCALE.value)
        try:
            runs = plan.make_runs(entries, _SCALE.value, _pairs("set", _SET.value), out)
        except plan.WrongRuns as error:
            count = f"{len(error.lines)} of {len(entries)} runs are wrong; nothing was started"
            sys.exit("\n".join(f"error: {line}" for line in [*error.lines, count]))
        if _DRY_RUN.value:
            for run in runs:
                print(f"# {run.name} is finished" if run.finished() else shlex.join(run.command))
            return
        failed = {}
        os.environ.setdefault("WANDB_RUN_GROUP", title)  # of runs that are at W&B too
        if not _REPORT.value:
            with FolderLock(out).held():
                failed = _launch(runs, out)
        found = [tables.read(run) for run in runs]
        written = [*tables.write_tables(out, title, found), out / "curves.png"]
        curves.draw(out / "curves.png", title, found)
        for path in written:
            print(f"written: {path}")
        if failed:
            lines = [f"error: {name}: {why}" for name, why in failed.items()]
            sys.exit("\n".join([*lines, f"error: {len(failed)} of {len(runs)} runs failed"]))


if __name__ == "__main__":
    cli.run(main)
