"""The progress of a sweep on the screen."""

import shutil
import sys
import time
from collections.abc import Collection, Sequence
from typing import TextIO

from launch.plan import SweepRun
from mirai_jax.utils.progress import duration


class Dashboard:
    """Shows how many runs are done, the step of each active run, and an estimate of the time left.

    On a terminal it redraws itself below the logged lines; elsewhere it logs one line every 30 s.
    """

    def __init__(self, runs: Sequence[SweepRun], stream: TextIO = sys.stdout):
        stream = sys.stdout if stream is sys.__stdout__ else stream  # as it is now
        self._runs, self._stream, self._live = runs, stream, stream.isatty()
        self._start = self._last_shown = time.monotonic()
        self._start_steps = sum(self._steps().values())
        self._height = 0  # lines on the screen that the next redraw replaces

    def _steps(self) -> dict[str, int]:
        return {run.name: min(run.step(), run.num_steps) for run in self._runs}

    def log(self, line: str) -> None:
        """Writes a line that stays."""
        self._write([line])

    def show(
        self, running: Sequence[SweepRun], waiting: Sequence[SweepRun], failed: Collection[str]
    ) -> None:
        """Shows the present state, at most every second on a terminal."""
        if time.monotonic() - self._last_shown < (1 if self._live else 30):
            return
        self._last_shown = time.monotonic()
        lines = self.lines(running, waiting, failed)
        if not self._live:
            self.log("; ".join(map(str.strip, lines)))
            return
        width = shutil.get_terminal_size().columns - 1
        self._write([line[:width] for line in lines])
        self._height = len(lines)

    def lines(
        self, running: Sequence[SweepRun], waiting: Sequence[SweepRun], failed: Collection[str]
    ) -> list[str]:
        """Returns a summary, then a line for each active run."""
        steps, unfinished = self._steps(), [*running, *waiting]
        done = len(self._runs) - len(unfinished) - len(failed)
        text = f"{done}/{len(self._runs)} done, {len(running)} running, {len(failed)} failed, "
        text += f"{len(waiting)} waiting"
        made = sum(steps.values()) - self._start_steps
        left = sum(run.num_steps - steps[run.name] for run in unfinished)
        if made > 0 and left:
            text += f", {duration(left * (time.monotonic() - self._start) / made)} left"
        return [text, *(f"  {r.name}  {steps[r.name]:,}/{r.num_steps:,}" for r in running)]

    def _write(self, lines: Sequence[str]) -> None:
        clear = f"\033[{self._height}A\033[J" if self._height else ""
        self._stream.write(clear + "".join(f"{line}\n" for line in lines))
        self._stream.flush()
        self._height = 0
