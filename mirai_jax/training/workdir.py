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

import contextlib
import json
import os
import pathlib
import re
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from mirai_jax.config.fields import completed, plain, shown
from mirai_jax.utils import files
from mirai_jax.utils.errors import ConfigError, first_line

# Fields that may differ between a workdir's config and the one it is continued with: they do not
# change what is computed, or, for num_steps, only how far (see `check_same_run`). Files may move:
# what the paths lead to is checked by parts.json.
RESUMABLE = (
    "num_steps",
    "log_every",
    "sample_every",
    "evaluate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "accumulate",  # but for the draws of dropout
    "nonfinite",
    "hang_limit",
    "judged_samples",
    "data.num_workers",
    "data.path",
    "data.images",
    "tokenizer.path",
    "teacher.path",
    "foresight[].checkpoint",
    "model.unroll",
    "model.remat",
    "model.attention",  # but for rounding
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "sample.guidance",
    "sample.interval",
    "sample.temperature",
    "sample.top_k",
    "sample.top_p",
    "sample.greedy",
    "sample.classes",
    "sample.per_class",
)


def may_change(field: str) -> bool:
    """Whether a run may go on with another value of the field; 'foresight[0].name' is one."""
    return re.sub(r"\[\d+]", "[]", field) in RESUMABLE


def to_json(config: Mapping[str, Any]) -> str:
    """The text of a workdir's config.json."""
    return json.dumps(plain(config), indent=2) + "\n"


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """{'a.b': leaf}; terms are opened, other tuples are leaves."""
    if isinstance(value, Mapping):
        parts = {f"{path}.{k}" if path else k: v for k, v in value.items()}
    elif isinstance(value, (tuple, list)) and any(isinstance(v, Mapping) for v in value):
        parts = {f"{path}[{i}]": v for i, v in enumerate(value)}
    else:
        return {path: value}
    return {k: leaf for name, part in parts.items() for k, leaf in _flat(part, name).items()}


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """{field: (old value, new value)} of two configs; None stands for a missing field."""
    old, new = (_flat(json.loads(to_json(c))) for c in (old, new))
    fields = sorted(old.keys() | new.keys())
    return {f: (old.get(f), new.get(f)) for f in fields if old.get(f) != new.get(f)}


def check_same_run(old: Any, new: Any, workdir: str) -> dict[str, tuple[Any, Any]]:
    """Refuses to continue a workdir under a config that computes something else.

    Returns:
        The differing fields that are allowed to (RESUMABLE).

    Raises:
        ConfigError: names every field that is not.
    """
    changed = differences(old, new)
    refused = [f for f in changed if not may_change(f)]
    if "num_steps" in changed and new["optimizer"]["schedule"] != "constant":
        refused.append("num_steps")  # the learning rate depends on it
    if refused:
        listed = "; ".join(
            f"{' '.join(f.splitlines())} was {shown(changed[f][0])}, is {shown(changed[f][1])}"
            for f in refused
        )
        raise ConfigError(
            f"workdir {workdir} holds a run of another config: {listed}; "
            "use the same values, or another --workdir"
        )
    return changed


def check_workdir(workdir: pathlib.Path, config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
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
        old = completed(json.loads(path.read_text()))
        if not isinstance(old, dict):
            raise ConfigError(f"{path} is damaged (it holds no config); remove it to start over")
        return check_same_run(old, config, str(workdir))
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


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The logged steps in order, up to a line that is none: the last, if a kill cut it off."""
    path, entries = workdir / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            break
        entries.append(entry)
    return entries


def note_event(workdir: pathlib.Path, event: str, **fields: Any) -> None:
    """Adds a line to events.jsonl."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **fields}
    with (workdir / "events.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


class _Appended:
    """A file to add to; whatever does not fit on the disk is told by `write`, at once.

    Nothing is kept in a buffer: closing would write it again, and its error replace the first.
    """

    def __init__(self, path: pathlib.Path):
        self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        """All of it is with the file system when this returns."""
        while data:
            data = data[self._file.write(data) :]  # a disk that gets full takes a part

    def close(self) -> None:
        if not self._file.closed:
            with self._file:
                os.fsync(self._file.fileno())  # some file systems tell of a full disk only now


def _record(event: Event) -> bytes:
    """An event as TensorBoard's files hold it (a TFRecord)."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return b"".join((length, next(checks), data, next(checks)))


class MetricsWriter:
    """metrics.jsonl and TensorBoard event files, continued at a step.

    Entries after `step` (of a run that went on past its last checkpoint) are dropped: they will be
    written again. All that was written is with the file system when a method returns, or it raises
    OSError.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        kept = [entry for entry in read_metrics(workdir) if entry["step"] <= step]
        path = workdir / "metrics.jsonl"
        files.write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._lines = _Appended(path)
        # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and then it blocks.
        now = time.time()
        self._events = _Appended(workdir / f"events.out.tfevents.{int(now)}.{socket.gethostname()}")
        begun = [Event(wall_time=now, file_version="brain.Event:2")]
        if step:  # TensorBoard is to forget what older event files hold from there on
            start = SessionLog(status=SessionLog.START)
            begun.append(Event(wall_time=now, step=step + 1, session_log=start))
        self._events.write(b"".join(map(_record, begun)))

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """One logged step, to both."""
        self._lines.write((json.dumps({"step": step, **values}) + "\n").encode())
        self.board(step, values)

    def board(self, step: int, values: Mapping[str, float]) -> None:
        """To TensorBoard alone."""
        self._add(step, *(summary.scalar(name, value) for name, value in values.items()))

    def image(self, step: int, name: str, image_HxWxC: np.ndarray) -> None:
        """A uint8 picture, to TensorBoard alone."""
        self._add(step, summary.image(name, image_HxWxC, dataformats="HWC"))

    def _add(self, step: int, *summaries: summary.Summary) -> None:
        now = time.time()
        events = (Event(wall_time=now, step=step, summary=entry) for entry in summaries)
        self._events.write(b"".join(map(_record, events)))

    def close(self) -> None:
        """Raises OSError where the file system tells only now of what it could not write."""
        with contextlib.closing(self._lines), contextlib.closing(self._events):
            pass
