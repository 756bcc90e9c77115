"""The config of command-line arguments, where they are not the flags of the running program.

The sweep launcher reads those of the runs that it starts, the benchmark those of each variant.
"""

import pathlib
import re

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from mirai_jax.utils.errors import ConfigError

# A field by its path: seed, foresight[0].offsets.
FIELD = re.compile(r"[A-Za-z_]\w*(\[\d+\])*(\.[A-Za-z_]\w*(\[\d+\])*)*")


def parse_config(arguments: list[str]) -> ConfigDict:
    """The config as the training program reads it from these arguments.

    Args:
        arguments: --config=FILE[:scale] first, then --config.field=value.

    Raises:
        ConfigError: one line.
    """
    given = dict(argument.split("=", 1) for argument in arguments)
    path = given["--config"].partition(":")[0]
    if not pathlib.Path(path).is_file():
        raise ConfigError(f"config is {path!r}, which is no file")
    config = _parsed(arguments[:1])
    for flag in given:
        if flag.startswith("--config."):
            _require_field(config, flag.removeprefix("--config."))
    return _parsed(arguments)


def _parsed(arguments: list[str]) -> ConfigDict:
    own, argv = flags.FlagValues(), ["", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=own, sys_argv=argv)
    try:
        own(argv)
        own["config"].value.to_dict()  # a file that cannot be read shows itself here
    except Exception as error:  # whatever a config file or its flags raise
        # ml_collections wraps a config file's own error in its traceback: its last line.
        text = (str(error).strip() or repr(error)).splitlines()[-1]
        raise ConfigError(
            text.removeprefix("ValueError: ").removeprefix("flag --config.")
        ) from error
    return own["config"].value


def _require_field(config: ConfigDict, field: str) -> None:
    if not FIELD.fullmatch(field):
        raise ConfigError(f"{field!r} is no field; they look like seed or foresight[0].offsets")
    node, walked = config, "the config"
    for key in config_path.split(field):
        if isinstance(key, int):
            here = len(node) if isinstance(node, tuple) else 0
            good, allowed = key < here, f"{walked} has {here} entries"
        else:
            here = list(node.keys()) if hasattr(node, "keys") else []
            good, allowed = key in here, f"the fields of {walked}: {', '.join(here) or 'none'}"
        if not good:
            raise ConfigError(f"{field} does not exist; {allowed}")
        node = node[key]
        step = f"[{key}]" if isinstance(key, int) else f".{key}"
        walked = step.lstrip(".") if walked == "the config" else walked + step
