"""The encoders that `mirai_jax.teach` made for the study: what is kept of their workdirs.

results/encoders/NAME/ holds the config.json and metrics.jsonl of the workdir runs/NAME, and run.json:
{"command", "seconds", "machine"}.
"""

import dataclasses
import datetime
import functools
import json
import pathlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from configs import teacher
from launch import collected
from launch.collect import Machine, json_lines, unfinished, write
from launch.overrides import flag_text
from mirai_jax.config import compare
from mirai_jax.utils.errors import DataError, first_line

SHOWN = {"held_out_accuracy": "accuracy", "held_out_masked_accuracy": "hidden codes right"}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A finished run of mirai_jax.teach.

    Attributes:
        name: of its workdir.
        objective: what it learned from.
        held_out: {title: share at the last step} of those in SHOWN that there are.
        seconds: of its processes; None where they are not known.
        machine: in words.
    """

    name: str
    objective: str
    steps: int
    held_out: Mapping[str, float]
    command: str
    seconds: float | None
    machine: str


def _command(name: str, config: Mapping[str, Any]) -> str:
    """The command line that makes this config out of configs/teacher.py; DataError without one."""
    scale = str(config.get("scale"))
    try:
        base = teacher.get_config(scale)
        changed = compare.differences(base, config)
        fields = [f"--config.{f}={flag_text(new)}" for f, (_, new) in changed.items()]
    except ValueError as error:  # also ConfigError: a field that is missing
        raise DataError(f"no command makes its config: {first_line(error)}") from error
    words = ["-m", "mirai_jax.teach", f"--config=configs/teacher.py:{scale}"]
    return shlex.join(["python", *words, f"--workdir=runs/{name}", *fields])


def _seconds(path: pathlib.Path) -> float | None:
    """From each start to the stop after it; None where a process was not seen to stop."""
    total, begun = 0.0, None
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        time = datetime.datetime.strptime(entry["time"], "%Y-%m-%dT%H:%M:%S%z")
        if entry["event"] in ("started", "resumed"):
            if begun is not None:
                return None
            begun = time
        elif entry["event"] in ("preempted", "finished") and begun is not None:
            total, begun = total + (time - begun).total_seconds(), None
    return total if total and begun is None else None


def _texts(folder: pathlib.Path, machine: str) -> dict[str, str]:
    """{name of a file: its text} of a finished workdir."""
    config = collected.read_object(folder / "config.json")
    entries = [entry for _, entry in collected.read_lines(folder / "metrics.jsonl")]
    if not entries or unfinished(folder, config):
        raise DataError(f"{folder} is no finished run of mirai_jax.teach")
    try:
        run = {
            "command": _command(folder.name, config),
            "seconds": _seconds(folder / "events.jsonl"),
            "machine": machine,
        }
        config = Machine(folder.parent, folder.parent.name).portable(config)
    except (DataError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: {first_line(error)}") from error
    return {
        "config.json": json.dumps(config, indent=2) + "\n",
        "metrics.jsonl": json_lines(entries),
        "run.json": json.dumps(run, indent=2) + "\n",
    }


def collect(folders: Sequence[pathlib.Path], out: pathlib.Path, machine: str) -> Iterator[str]:
    """Copies what the report needs of finished workdirs; yields a line for each.

    Nothing is written before every one was read.

    Args:
        folders: workdirs of mirai_jax.teach.
        out: results/encoders.
        machine: in words.

    Raises:
        DataError: one line; a folder is none, is unfinished, or cannot be shown to others.
    """
    planned = {folder: _texts(folder, machine) for folder in folders}
    for folder, texts in planned.items():
        write(out / folder.name, texts)
        yield f"collected: {out / folder.name}"


def read(folder: pathlib.Path) -> list[Encoder]:
    """Those in results/encoders, in the order of their names.

    Raises:
        DataError: one line that names what is wrong in which file.
    """
    return [_read(path) for path in sorted(folder.glob("*/"))]


def _read(folder: pathlib.Path) -> Encoder:
    config = collected.read_object(folder / "config.json")
    run = collected.read_object(folder / "run.json")
    lines = collected.read_lines(folder / "metrics.jsonl")
    if not lines:
        raise DataError(f"{folder / 'metrics.jsonl'} is empty")
    where, last = lines[-1]
    of_run = functools.partial(collected.field, folder / "run.json", run)
    return Encoder(
        name=folder.name,
        objective=collected.field(folder / "config.json", config, "objective", str),
        steps=last["step"],
        held_out={
            title: collected.typed(f"{where}: {key}", last[key], float)
            for key, title in SHOWN.items()
            if key in last
        },
        command=of_run("command", str),
        seconds=collected.seconds(folder / "run.json", run),
        machine=of_run("machine", str),
    )
