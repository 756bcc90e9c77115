"""What the screen shows of a run's speed."""

import time
from collections.abc import Callable, Mapping, Sequence

from mirai_jax.utils.progress import duration


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
        """Adds seconds that were spent waiting for data."""
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
    step: int,
    num_steps: int,
    measures: Sequence[str],
    metrics: Mapping[str, float],
    left: float | None,
) -> str:
    """A logged step with `measures` ("loss 2.3") and, unless `left` is None, its speed in `metrics`."""
    parts = [f"step {step:>{len(str(num_steps))}}/{num_steps}", *measures]
    if left is not None:
        parts += [
            f"{metrics['images_per_second']:.0f} img/s",
            f"wait {metrics['wait_share']:.0%}",
            f"{duration(left)} left",
        ]
    return "  ".join(parts)
