"""A run's folder: its config, the rule for continuing it, and its metrics.jsonl.

config.json      the whole config
metrics.jsonl    one JSON object a logged step; also as TensorBoard event files
                 (wait_share: of the time since the last one, what the devices stood still waiting for
                 a batch, as the first process sees its own; 0 to 1)
events.jsonl     starts, stops and whatever else happened to the run, with the time
tokenizer.npz    the tokenizer, where the run fitted one
parts.json       checksums of data and frozen networks, which a continued run must have too
checkpoints/     train states with the data iterator
samples/         a grid of samples every so often
summary.png      loss curves and the last grid, when the run is finished
"""

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from mirai_jax.config.compare import check_same_run, to_json
from mirai_jax.config.schema import RunConfig
from mirai_jax.utils import files
from mirai_jax.utils.errors import ConfigError, first_line


def check_workdir(
    workdir: pathlib.Path, config: Mapping[str, Any], group: type = RunConfig
) -> dict[str, tuple[Any, Any]]:
    """Checks that the folder is new or holds the same run. Nothing is written.

    Returns:
        The fields that differ from the run so far and are allowed to.

    Raises:
        ConfigError: the folder cannot be used, or holds a run of another config.
    """
    path = workdir / "config.json"
    try:
        if workdir.exists() and not workdir.is_dir():
            raise ConfigError(f"workdir is {str(workdir)!r}; it must be a folder or not exist yet")
        if not path.exists():
            return {}
        old = json.loads(path.read_text())
        if not isinstance(old, dict):
            raise ConfigError(f"{path} is damaged (it holds no config); remove it to start over")
        return check_same_run(old, config, str(workdir), group)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"workdir {workdir} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; brackets, 1,000 deep
        raise ConfigError(
            f"{path} is damaged ({first_line(error)}); remove it to start over"
        ) from error


def open_workdir(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Creates the folder and writes config.json: from here on it belongs to this run.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        files.write_text(workdir / "config.json", to_json(config))
    except OSError as error:
        raise ConfigError(f"workdir {workdir} cannot be written: {error.strerror}") from error


def note_event(workdir: pathlib.Path, event: str, **fields: Any) -> None:
    """Adds a line to events.jsonl."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **fields}
    with (workdir / "events.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
