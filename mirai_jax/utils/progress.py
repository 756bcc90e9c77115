"""Progress of long tasks and the time left."""

import sys
import time
from typing import TextIO


def duration(seconds: float) -> str:
    """Formats a duration, e.g. 45s, 3m05s, 2h07m, 3d04h."""
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
    """Shows items done, speed and time left.

    A terminal gets one line, updated twice a second; other streams get a line every 30 seconds.

    Args:
        unit: the name of the items, in the plural.
        done: items done earlier, which do not count for the speed.
    """

    def __init__(self, total: int, unit: str, done: int = 0, stream: TextIO | None = sys.stderr):
        stream = sys.stderr if stream is sys.__stderr__ else stream  # as it is now
        self._total, self._unit, self._stream = total, unit, stream
        self._first, self._done = done, done
        self._begun = self._shown = time.monotonic()
        self._live = stream is not None and stream.isatty()
        self._every = 0.5 if self._live else 30.0

    def advance(self, count: int) -> None:
        """Counts `count` more items as done."""
        self._done += count
        if time.monotonic() - self._shown >= self._every:
            self._show("")

    def close(self) -> None:
        """Shows the last state."""
        self._show("\n" if self._live else "")

    def line(self) -> str:
        seconds = time.monotonic() - self._begun
        speed = (self._done - self._first) / max(seconds, 1e-9)
        rate = f"{speed:.1f}" if speed >= 1 or not speed else f"{speed:.2g}"
        text = f"{self._done:,}/{self._total:,} {self._unit}  {rate} {self._unit}/s"
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
