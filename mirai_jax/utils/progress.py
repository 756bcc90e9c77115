"""How far a long work is, and how long it will take."""

import sys
import time
from collections.abc import Callable, Mapping
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
        told = f"{speed:.1f}" if speed >= 1 or not speed else f"{speed:.2g}"
        text = f"{self._done:,}/{self._total:,} {self._unit}  {told} {self._unit}/s"
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


class Stopwatch:
    """Seconds of training alone: `pause` leaves out what happens until `resume`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._sum, self._waited = clock, 0.0, 0.0
        self._begun: float | None = clock()  # None while it is paused

    def pause(self) -> None:
        if self._begun is not None:
            self._sum += self._clock() - self._begun
            self._begun = None

    def resume(self) -> None:
        if self._begun is None:
            self._begun = self._clock()

    def waited(self, seconds: float) -> None:
        """So many of the seconds that pass here were waited for data."""
        self._waited += seconds

    def lap(self) -> tuple[float, float]:
        """Seconds since the last lap, and the share of them, 0 to 1, that was waited.

        A watch that is paused stays so.
        """
        running = self._begun is not None
        self.pause()
        if running:
            self.resume()
        seconds, share = self._sum, min(1.0, self._waited / max(self._sum, 1e-9))
        self._sum = self._waited = 0.0
        return seconds, share


def progress_line(
    step: int, num_steps: int, metrics: Mapping[str, float], left: float | None
) -> str:
    """What the screen shows of a logged step; speed and the seconds left are not known at the first."""
    heads = [
        f"{name.removeprefix('foresight_')} {value:.3f}"
        for name, value in metrics.items()
        if name.startswith("foresight_")
    ]
    parts = [
        f"step {step:>{len(str(num_steps))}}/{num_steps}",
        f"loss {metrics['loss']:.4f}",
        f"ce {metrics['cross_entropy']:.4f}",
        *heads,
        f"grad {metrics['grad_norm']:.2f}",
    ]
    if left is not None:
        parts += [
            f"{metrics['images_per_second']:.0f} img/s",
            f"wait {metrics['wait_share']:.0%}",
            f"{duration(left)} left",
        ]
    return "  ".join(parts)
