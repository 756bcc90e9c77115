"""Trains a teacher of one's own for Mirai-I, on the data set itself: `python -m mirai_jax.teach`.

    python -m mirai_jax.teach --config=configs/teacher.py[:scale] [--config.field=value ...]
    python -m mirai_jax.main --config=configs/mirai_i.py[:scale] --config.teacher.name=dinov2 \\
        --config.teacher.path=WORKDIR --config.teacher.image_size=0

On all devices of this machine. Exit status: 0 finished; 1 an error that is yours to mend; 75 told to
stop (SIGTERM), all is saved and the same command goes on.
"""

import functools
import pathlib

from absl import flags

from mirai_jax.config.flags import parse_config
from mirai_jax.teaching import train
from mirai_jax.utils import cli
from mirai_jax.utils.errors import ConfigError, TrainingError

_FLAGS = cli.flag_values(__name__)
_CONFIG = flags.DEFINE_string(
    "config",
    "",
    "FILE[:scale], such as configs/teacher.py:fashion_mnist; --config.field=value follow.",
    flag_values=_FLAGS,
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run; default: runs/<config>-<scale>. An unfinished run goes on.",
    flag_values=_FLAGS,
)


parse_flags = functools.partial(cli.parse_known, _FLAGS)


def main(argv: list[str]) -> None:
    with cli.program(TrainingError, interrupted="interrupted; the same command goes on"):
        if not _CONFIG.value:
            raise ConfigError("--config is missing; it must be a file such as configs/teacher.py")
        for argument in argv[1:]:
            if not argument.startswith("--config.") or "=" not in argument:
                raise ConfigError(
                    f"argument {argument!r} is not understood; use --config.field=value"
                )
        config = parse_config([f"--config={_CONFIG.value}", *argv[1:]])
        name, scale = config.get("name"), config.get("scale")  # one that is missing: told by teach
        train.teach(config, _WORKDIR.value or pathlib.Path("runs") / f"{name}-{scale}")


if __name__ == "__main__":
    cli.run(main, flags_parser=parse_flags)
