"""The config of a command line, for every program that takes --config=FILE[:scale]."""

import pathlib
import re

from absl import flags
from ml_collections import ConfigDict, config_flags

from mirai_jax.utils.errors import ConfigError

# A field by its path: seed, foresight[0].offsets.
FIELD = re.compile(r"[A-Za-z_]\w*(\[\d+\])*(\.[A-Za-z_]\w*(\[\d+\])*)*")


def parse_config(arguments: list[str]) -> ConfigDict:
    """Reads the config of command-line arguments.

    Args:
        arguments: --config=FILE[:scale] first, then --config.field=value.

    Raises:
        ConfigError: one line.
    """
    path = arguments[0].removeprefix("--config=").partition(":")[0]
    if not path:
        raise ConfigError("--config is missing; it must be a file such as configs/mirai_e.py")
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"config is {path!r}, which is no file")
    try:
        return _parse(arguments)
    except (AttributeError, LookupError) as error:
        why = error.args[0]
        why = " ".join(str(why.args[0] if isinstance(why, KeyError) else why).split())
        given = " ".join(arguments[1:])
        raise ConfigError(f"{given}: no such field ({why}); configs/base.py lists all") from error
    except Exception as error:  # a config file may raise anything
        # ml_collections wraps the error of a config file in its traceback: the last line.
        line = (str(error).strip() or repr(error)).splitlines()[-1].strip()
        line = line.removeprefix("ValueError: ").removeprefix("flag --config.")
        raise ConfigError(line) from error


def _parse(arguments: list[str]) -> ConfigDict:
    values, argv = flags.FlagValues(), ["", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    rest = values(argv)[1:]
    config = values["config"].value
    config.to_dict()  # raises for a file that cannot be read
    if rest:
        raise ConfigError(f"argument {rest[0]!r} is not understood; use --config.field=value")
    return config
