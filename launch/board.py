"""What the screen shows while a sweep goes on."""

import shutil
import sys
import time
from collections.abc import Collection, Sequence
from typing import TextIO

from launch.plan import Run
from mirai_jax.utils.progress import duration


class Board:
    """How many runs are done, how far those are that run, and how long the rest will take.

    On a terminal it renews itself below the lines that stay; elsewhere it is a line now and then.
    """

    def __init__(self, runs: Sequence[Run], stream: TextIO = sys.stdout):
        self._runs, self._stream = runs, stream
        self._live = stream.isatty()
        self._every = 1.0 if self._live else 30.0
        self._steps = {run.name: min(run.step(), run.num_steps) for run in runs}
        self._first, self._begun = sum(self._steps.values()), time.monotonic()
        self._shown = self._begun
        self._lines = 0  # that are on the screen and will be renewed

    def log(self, line: str) -> None:
        """A line that stays."""
        self._clear()
        self._stream.write(line + "\n")
        self._stream.flush()

    def show(
        self, running: Sequence[Run], waiting: Collection[Run], failed: Collection[str]
    ) -> None:
        """The present state, if it is time to show it again."""
        if time.monotonic() - self._shown < self._every:
            return
        self._shown = time.monotonic()
        lines = self.lines(running, waiting, failed)
        if not self._live:
            self.log("; ".join(map(str.strip, lines)))
            return
        self._clear()
        width = shutil.get_terminal_size().columns - 1
        self._stream.write("".join(line[:width] + "\n" for line in lines))
        self._stream.flush()
        self._lines = len(lines)

    def lines(
        self, running: Sequence[Run], waiting: Collection[Run], failed: Collection[str]
    ) -> list[str]:
        """A summary, and a line for each that runs."""
        left = 0
        unfinished = {run.name for run in (*running, *waiting)}
        for run in self._runs:
            if run in running:
                self._steps[run.name] = min(run.step(), run.num_steps)
            elif run.name not in unfinished and run.name not in failed:
                self._steps[run.name] = run.num_steps
            if run.name in unfinished:
                left += run.num_steps - self._steps[run.name]
        done = len(self._runs) - len(unfinished) - len(failed)
        text = f"{done}/{len(self._runs)} done, {len(running)} running, {len(failed)} failed, "
        text += f"{len(waiting)} waiting"
        made = sum(self._steps.values()) - self._first
        if made > 0 and left:
            text += f", {duration(left * (time.monotonic() - self._begun) / made)} left"
        return [text, *(f"  {r.name}  {self._steps[r.name]:,}/{r.num_steps:,}" for r in running)]

    def _clear(self) -> None:
        if self._lines:
            self._stream.write(f"\033[{self._lines}A\033[J")
            self._lines = 0
