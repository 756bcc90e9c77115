"""Trains an encoder as teacher of Mirai-I, on the data set itself.

    python -m mirai_jax.teach --config=configs/teacher.py[:scale] [--config.field=value ...]
    python -m mirai_jax.main --config=configs/mirai_i.py[:scale] --config.teacher.name=dinov2 \\
        --config.teacher.path=WORKDIR --config.teacher.image_size=0

On all devices of this machine. Exit status: 0 finished; 1 an error to mend; 75 stopped by SIGTERM, with
all saved: the same command resumes.
"""

import functools
import pathlib

from mirai_jax.config import unused
from mirai_jax.config.flags import parse_config
from mirai_jax.teaching import train
from mirai_jax.teaching.settings import TeacherRunConfig
from mirai_jax.utils import cli
from mirai_jax.utils.errors import TrainingError

_FLAGS, _define = cli.flags_of(__name__)
_CONFIG = _define.string(
    "config",
    "",
    "FILE[:scale], such as configs/teacher.py:fashion_mnist; --config.field=value overrides.",
)
_WORKDIR = _define.string(
    "workdir", None, "Folder of the run, resumed if it exists; default: runs/<config>-<scale>."
)

parse_flags = functools.partial(cli.parse_known, _FLAGS)


def main(argv: list[str]) -> None:
    with cli.program(TrainingError, interrupted="interrupted; the same command resumes"):
        config = parse_config([f"--config={_CONFIG.value}", *argv[1:]])
        unused.report(config, argv[1:], TeacherRunConfig, unused.ENCODER)
        name = f"{config.get('name')}-{config.get('scale')}"  # `teach` checks both
        train.teach(config, _WORKDIR.value or pathlib.Path("runs") / name)


if __name__ == "__main__":
    cli.run(main, flags_parser=parse_flags)
