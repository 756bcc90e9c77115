"""How far a long work is, and how long it will take."""

import sys
import time
from typing import TextIO


def duration(seconds: float) -> str:
    """E.g. 45s, 3m05s, 2h07m, 3d04h."""
    seconds = round(seconds)
    for unit, size, sub, sub_size in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "m", 60),
        ("m", 60, "s", 1),
    ):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // sub_size:02d}{sub}"
    return f"{seconds}s"


class Progress:
    """Shows items done, speed and time left: a line that renews itself on a terminal, else one now
    and then.

    Args:
        total: how many items there are.
        unit: what they are called.
        done: how many were done before (speed is told without them).
        stream: where it is shown; None shows nothing.
    """

    def __init__(self, total: int, unit: str, done: int = 0, stream: TextIO | None = sys.stderr):
        self._total, self._unit, self._stream = total, unit, stream
        self._first, self._done = done, done
        self._begun = self._shown = time.monotonic()
        self._live = stream is not None and stream.isatty()
        self._every = 0.5 if self._live else 30.0

    def advance(self, count: int) -> None:
        """`count` more items are done."""
        self._done += count
        if time.monotonic() - self._shown >= self._every:
            self._show("")

    def close(self) -> None:
        """Shows where it ended."""
        self._show("\n" if self._live else "")

    def line(self) -> str:
        seconds = time.monotonic() - self._begun
        speed = (self._done - self._first) / max(seconds, 1e-9)
        message = f"{speed:.1f}" if speed >= 1 or not speed else f"{speed:.2g}"
        text = f"{self._done:,}/{self._total:,} {self._unit}  {message} {self._unit}/s"
        if speed and self._done < self._total:
            text += f"  {duration((self._total - self._done) / speed)} left"
        return text

    def _show(self, end: str) -> None:
        if self._stream is None:
            return
        self._shown = time.monotonic()
        text = f"\r\033[K{self.line()}{end}" if self._live else f"{self.line()}\n"
        self._stream.write(text)
        self._stream.flush()
