"""The config of a command line, for every program that takes --config=FILE[:scale]."""

import contextlib
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
    except Exception as error:  # a config file and its flags may raise anything
        text = str(error).strip() or repr(error)
        with contextlib.suppress(Exception):  # the first error is the one to report
            text = _unknown_field(arguments) or text
        # ml_collections wraps the error of a config file in its traceback: the last line.
        line = text.splitlines()[-1].strip().removeprefix("ValueError: ")
        raise ConfigError(line.removeprefix("flag --config.")) from error


def _parse(arguments: list[str]) -> ConfigDict:
    values, argv = flags.FlagValues(), ["", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    rest = values(argv)[1:]
    config = values["config"].value
    config.to_dict()  # raises for a file that cannot be read
    if rest:
        raise ConfigError(f"argument {rest[0]!r} is not understood; use --config.field=value")
    return config


def _unknown_field(arguments: list[str]) -> str | None:
    """For a misspelt --config.field: which fields there are instead."""
    config = _parse(arguments[:1])
    for i, argument in enumerate(arguments):
        flag, given, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or not flag.startswith("config."):
            continue
        value = value if given else "".join(arguments[i + 1 : i + 2])
        node, walked = config, "config"
        # foresight[0].weights -> foresight, [0], weights
        for key in flag.removeprefix("config.").replace("[", ".[").split("."):
            if isinstance(node, tuple):
                allowed = [f"[{i}]" for i in range(len(node))]
            else:
                allowed = list(node.keys()) if hasattr(node, "keys") else []
            if key not in allowed:
                listed = ", ".join(allowed) or "none"
                return f"{flag} does not exist (given {value!r}); the fields of {walked}: {listed}"
            walked += key if key.startswith("[") else f".{key}"
            node = node[int(key[1:-1])] if isinstance(node, tuple) else node[key]
    return None
