"""metrics.jsonl and TensorBoard's event files."""

import contextlib
import json
import pathlib
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from mirai_jax.utils import files
from mirai_jax.utils.files import Appended

_EVERY = 10.0  # seconds between two uploads to a bucket, at least


def read_metrics(workdir: pathlib.Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The logged steps in order, up to a line that is none: the last, if a kill cut it off."""
    path, entries = workdir / file, []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            break
        entries.append(entry)
    return entries


def _record(event: Event) -> bytes:
    """An event as TensorBoard's files hold it (a TFRecord)."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return b"".join((length, next(checks), data, next(checks)))


class MetricsWriter:
    """metrics.jsonl and TensorBoard event files, continued at a step.

    Entries after `step` (of a run that continued past its last checkpoint) are dropped: they will be
    written again. All that was written is with the file system when a method returns, or it raises
    OSError. A bucket gets it every _EVERY seconds, and when `upload` is called.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        kept = [entry for entry in read_metrics(workdir) if entry["step"] <= step]
        path = workdir / "metrics.jsonl"
        files.write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._lines, self._entry = Appended(path), kept[-1] if kept else {}
        # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and then it blocks.
        now = time.time()
        self._events = Appended(workdir / f"events.out.tfevents.{int(now)}.{socket.gethostname()}")
        begun = [Event(wall_time=now, file_version="brain.Event:2")]
        if step:  # TensorBoard is to forget what older event files hold from there on
            start = SessionLog(status=SessionLog.START)
            begun.append(Event(wall_time=now, step=step + 1, session_log=start))
        self._events.write(b"".join(map(_record, begun)))
        self.upload()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """One logged step, to both. Values of the newest step go into its line."""
        before = self._entry if self._entry.get("step") == step else {}
        self._entry = {**before, "step": step, **values}
        if before:
            self._lines.cut(len(json.dumps(before)) + 1)
        self._lines.write((json.dumps(self._entry) + "\n").encode())
        self.board(step, values)
        if time.monotonic() > self._next_upload:
            self.upload()

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

    def upload(self) -> None:
        """What was written is in the bucket when this returns, where the workdir is in one."""
        begun = time.monotonic()
        self._lines.upload()
        self._events.upload()
        # Files grow: uploads take at most a fiftieth of a run.
        self._next_upload = begun + max(_EVERY, 50 * (time.monotonic() - begun))

    def close(self) -> None:
        """Raises OSError where the file system reports only now what it could not write."""
        with contextlib.closing(self._lines), contextlib.closing(self._events):
            pass
