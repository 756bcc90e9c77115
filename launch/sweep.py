"""Starts the runs of a sweep, and only those that are missing: `python -m launch.sweep`.

    python -m launch.sweep --sweep=launch/sweeps/variants.py --parallel=2
    python -m launch.sweep --sweep=launch/sweeps/layer.py --scale=imagenet_b --slurm --gpus=8 \\
        --partition=long --time=1440 --set=data.path=codes/imagenet

Every run is checked before any starts. The same command again goes on: finished runs stay, others
go on from their last checkpoint. In the sweep's folder lie, for each run, its workdir and its log,
and at the end (with --report: at any time) table.md, table.csv, timing.csv and curves.png.

Exit status: 0 all runs are finished, 1 some failed or are wrong, 75 stopped: the same command goes on.
"""

import pathlib
import shlex
import sys
from collections.abc import Sequence

from absl import app, flags

from launch import curves, jobs, plan, slurm, tables
from launch.board import Board
from mirai_jax.config.flags import FIELD
from mirai_jax.utils import cli
from mirai_jax.utils.errors import ConfigError, Preempted

_FLAGS = cli.flag_values(__name__)
_SWEEP = flags.DEFINE_string(
    "sweep", None, "FILE with get_sweep(scale), see launch/sweeps/.", flag_values=_FLAGS
)
_SCALE = flags.DEFINE_string(
    "scale", "demo", "The part after the colon of every --config.", flag_values=_FLAGS
)
_OUT = flags.DEFINE_string(
    "out", None, "Folder of the sweep; default: runs/sweeps/<sweep>-<scale>.", flag_values=_FLAGS
)
_SET = flags.DEFINE_multi_string(
    "set", [], "FIELD=VALUE for all runs; may be repeated.", flag_values=_FLAGS
)
_PARALLEL = flags.DEFINE_integer(
    "parallel",
    0,
    "How many runs at once; GPUs are shared out among them. Default: one, with --slurm all.",
    lower_bound=0,
    flag_values=_FLAGS,
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Print the commands and do nothing.", flag_values=_FLAGS
)
_REPORT = flags.DEFINE_bool(
    "report", False, "Write the tables and the figure of what is there.", flag_values=_FLAGS
)
_SLURM = flags.DEFINE_bool("slurm", False, "Submit the runs as jobs.", flag_values=_FLAGS)
_CLUSTER = flags.DEFINE_enum(
    "cluster",
    "slurm",
    slurm.CLUSTERS,
    "Where --slurm submits: slurm, or to try it local (processes) or debug (this process).",
    flag_values=_FLAGS,
)
_PARTITION = flags.DEFINE_string("partition", "", "SLURM's partition.", flag_values=_FLAGS)
_TIME = flags.DEFINE_integer(
    "time",
    1440,
    "Minutes of one stay of a job; it goes back into the queue until its run is finished.",
    lower_bound=1,
    flag_values=_FLAGS,
)
_GPUS = flags.DEFINE_integer("gpus", 1, "GPUs of a job.", lower_bound=0, flag_values=_FLAGS)
_CPUS = flags.DEFINE_integer(
    "cpus", 0, "CPU cores of a job; 0: the cluster's default.", lower_bound=0, flag_values=_FLAGS
)
_SBATCH = flags.DEFINE_multi_string(
    "sbatch", [], "OPTION=VALUE of sbatch beyond these (account=me).", flag_values=_FLAGS
)
_WAIT = flags.DEFINE_bool(
    "wait", True, "With --slurm: wait for the jobs; --nowait returns at once.", flag_values=_FLAGS
)


def _pairs(flag: str, given: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ConfigError(f"--{flag} is {text!r}; it must be NAME=VALUE")
        if name in pairs:
            raise ConfigError(f"--{flag} gives {name} twice: {pairs[name]!r} and {value!r}")
        pairs[name] = value
    return pairs


def _common() -> dict[str, str]:
    common = _pairs("set", _SET.value)
    for field in common:
        if not FIELD.fullmatch(field):
            raise ConfigError(
                f"--set names {field!r}; it must be a field such as num_steps or model.width"
            )
    return common


def _check_cluster_flags() -> None:
    """A flag that would be ignored is a mistake."""
    for name in ("cluster", "partition", "time", "gpus", "cpus", "sbatch", "wait"):
        if _FLAGS[name].present and not _SLURM.value:
            raise ConfigError(f"--{name} is for jobs; it needs --slurm")
    if _SLURM.value and _CLUSTER.value == "debug" and not _WAIT.value:
        raise ConfigError("--nowait is for jobs of other processes; --cluster=debug has none")


def _launch(runs: list[plan.Run], out: pathlib.Path) -> dict[str, str]:
    """Runs what is missing; returns why runs failed."""
    board = Board(runs)
    finished = sum(run.finished() for run in runs)
    board.log(f"{out}: {finished} of {len(runs)} runs are finished")
    if not _SLURM.value:
        failed, stopped = jobs.run_all(runs, _PARALLEL.value or 1, board)
        if stopped:
            print("stopped: the same command goes on from the checkpoints")
            sys.exit(Preempted.status)
        return failed
    wishes = slurm.Wishes(
        cluster=_CLUSTER.value,
        partition=_PARTITION.value,
        minutes=_TIME.value,
        gpus=_GPUS.value,
        cpus=_CPUS.value,
        sbatch=_pairs("sbatch", _SBATCH.value),
        at_once=_PARALLEL.value,
    )
    cluster = slurm.Cluster(out, wishes)
    cluster.submit(runs, board.log)
    if not _WAIT.value:
        print("the same command with --wait shows how far the jobs are, --report what there is")
        sys.exit(0)
    try:
        return cluster.wait(runs, board)
    except KeyboardInterrupt:
        print("the jobs go on; the same command waits for them again, scancel ends them")
        sys.exit(Preempted.status)


def main(argv: list[str]) -> None:
    with cli.program(OSError):
        if len(argv) > 1:
            raise ConfigError(f"argument {argv[1]!r} is not understood; all are --flags")
        if _SWEEP.value is None:
            raise ConfigError(
                "--sweep is missing; it must be a file such as those of launch/sweeps/"
            )
        _check_cluster_flags()
        title = f"{pathlib.Path(_SWEEP.value).stem}-{_SCALE.value}"
        out = pathlib.Path(_OUT.value or pathlib.Path("runs") / "sweeps" / title)
        entries = plan.read_sweep(_SWEEP.value, _SCALE.value)
        try:
            runs = plan.make_runs(entries, _SCALE.value, _common(), out)
        except plan.WrongRuns as error:
            count = f"{len(error.lines)} of {len(entries)} runs are wrong; nothing was started"
            sys.exit("\n".join(f"error: {line}" for line in [*error.lines, count]))
        if _DRY_RUN.value:
            for run in runs:
                print(f"# {run.name} is finished" if run.finished() else shlex.join(run.command))
            return
        failed = {}
        if not _REPORT.value:
            with jobs.only_launcher(out) as other:
                if other is not None:
                    raise ConfigError(f"{out} is in use by another launcher (process {other})")
                failed = _launch(runs, out)
        found = [tables.read(run) for run in runs]
        written = tables.write_tables(out, title, found)
        curves.draw(out / "curves.png", title, found)
        for path in (*written, out / "curves.png"):
            print(f"written: {path}")
        if failed:
            lines = [f"error: {name}: {why}" for name, why in failed.items()]
            sys.exit("\n".join([*lines, f"error: {len(failed)} of {len(runs)} runs failed"]))


if __name__ == "__main__":
    app.run(main)
