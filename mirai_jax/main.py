"""Trains a generator: `python -m mirai_jax.main --config=configs/mirai_e.py[:scale] [--config.field=value ...]`.

Exit status: 0 finished; 1 an error to mend; 75 stopped by SIGTERM, with all saved: the same command
resumes; 76 another process died or hangs: start all of them again. With several processes JAX's runtime
may end one on its own (134).
"""

import functools
import pathlib

from absl import flags

from mirai_jax.config import unused
from mirai_jax.config.flags import parse_config
from mirai_jax.evaluation import during
from mirai_jax.training import train
from mirai_jax.utils import cli, distributed
from mirai_jax.utils.errors import Lost, TrainingError

_CONFIG = flags.DEFINE_string(
    "config", "", "FILE[:scale] of configs/; --config.field=value overrides a field."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run, resumed if it exists; default: runs/<config>-<scale>."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    distributed.MODES,
    "Whether this is one of several processes of a run. auto: where SLURM, Open MPI or the next three "
    "flags say so; on: also on a Cloud TPU slice.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of the first process.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the run has.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat", 100, "Seconds of silence after which another process counts as dead.", 1
)

parse_flags = functools.partial(cli.parse_known, flags.FLAGS)


def main(argv: list[str]) -> None:
    with cli.program():
        config = parse_config([f"--config={_CONFIG.value}", *argv[1:]])
        unused.report(config, argv[1:])
    workdir = _WORKDIR.value or pathlib.Path("runs") / f"{config.get('name')}-{config.get('scale')}"
    interrupted = f"interrupted; the same command resumes from the last checkpoint of {workdir}"
    with cli.program(TrainingError, Lost, interrupted=interrupted):
        distributed.start(
            _DISTRIBUTED.value,
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            heartbeat=_HEARTBEAT.value,
        )
        train.train(config, workdir, measurer=during.Measurer)


if __name__ == "__main__":
    cli.run(main, flags_parser=parse_flags)
