"""Progress of long tasks and the time left."""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO


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
        heartbeat: takes the line after every item: work that gets further is no hang.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        done: int = 0,
        stream: TextIO | None = sys.stderr,
        heartbeat: Callable[[str], None] = lambda line: None,
    ):
        stream = sys.stderr if stream is sys.__stderr__ else stream  # as it is now
        self._total, self._unit, self._stream = total, unit, stream
        self._first, self._done, self._heartbeat = done, done, heartbeat
        self._begun = self._shown = time.monotonic()
        self._live = stream is not None and stream.isatty()
        self._every = 0.5 if self._live else 30.0

    def advance(self, count: int) -> None:
        """Counts `count` more items as done."""
        self._done += count
        self._heartbeat(self.line())
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


Maker = Callable[[int, str], Progress]  # of a total and a unit

silent = functools.partial(Progress, stream=None)


def counted(items: Iterable[Any], progress: Progress) -> Iterator[Any]:
    """The items, each of which is done when it comes."""
    with contextlib.closing(progress):
        for item in items:
            progress.advance(1)
            yield item
