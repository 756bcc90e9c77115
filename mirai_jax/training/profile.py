"""A profile of some steps of a run, laid out as TensorBoard's profile plugin (xprof) reads it."""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from mirai_jax.utils import files


class Profile:
    """Traces the steps from the first to the last of `steps` into workdir/profile; () traces none.

    Every process traces its own devices. A run that resumes after the first step traces none; one that
    ends before the last keeps what it has.
    """

    def __init__(self, steps: tuple[int, ...], workdir: pathlib.Path, log: Callable[[str], None]):
        self._steps, self._log = steps, log
        self._folder = workdir / "profile"
        self._traced: tempfile.TemporaryDirectory | None = None

    def before(self, step: int, state: Any) -> None:
        if self._steps[:1] == (step,):
            jax.block_until_ready(state)
            self._traced = tempfile.TemporaryDirectory()  # the profiler cannot write to a bucket
            jax.profiler.start_trace(self._traced.name)

    def after(self, step: int, metrics: Any) -> None:
        if self._traced and step == self._steps[-1]:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self._traced is None:
            return
        jax.profiler.stop_trace()
        first, last = self._steps
        # One folder for all processes: the profiler would name it after the clock of each.
        folder = self._folder / "plugins" / "profile" / f"steps_{first}_{last}"
        folder.mkdir(parents=True, exist_ok=True)
        with self._traced as traced:
            self._traced = None
            (found,) = pathlib.Path(traced).rglob("*.xplane.pb")
            with files.atomic_write(folder / f"process_{jax.process_index()}.xplane.pb") as file:
                file.write(found.read_bytes())
        self._log(f"profile of steps {first} to {last}: tensorboard --logdir={self._folder}")
