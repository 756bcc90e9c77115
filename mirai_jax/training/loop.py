"""The training loop: data ahead, step, metrics one step late, log, checkpoints, samples, stop.

What is trained is a `Task`: the generator (training/train.py) or an encoder (teaching/train.py). The
loop owns what all runs share: the state, the files of the workdir, the data, notices to stop. The
task owns how its state begins, what a step is, and what is measured and drawn.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np

from mirai_jax.data.pipeline import Batches, WorkerDied
from mirai_jax.training.checkpoint import Checkpoints, last_whole
from mirai_jax.training.guards import HangGuard, Preemption
from mirai_jax.training.metrics_writer import MetricsWriter
from mirai_jax.training.prefetch import Prefetcher
from mirai_jax.training.profile import Profile
from mirai_jax.training.stopwatch import Stopwatch
from mirai_jax.training.workdir import note_event
from mirai_jax.utils import distributed, files
from mirai_jax.utils.errors import LESS_MEMORY, Lost, Preempted, TrainingError, first_line
from mirai_jax.utils.files import closing

Log = Callable[[str], None]

SKIPPED_IN_A_ROW = 20  # updates left out before the run stops all the same
WHOLE_WEIGHTS = (
    "measuring needs whole weights on each device (validate_every=0, evaluate_every=0: none)"
)


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """What the loop needs of a run's config; configs/base.py explains the fields."""

    num_steps: int
    batch_size: int
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    keep_every: int = 0
    skip_nonfinite: bool = False
    profile_steps: tuple[int, ...] = ()


class Task:
    """What a run trains.

    Attributes:
        settings: the cadence of the run.
        batches: the data; a state that has done n steps continues with batch n.
    """

    settings: LoopSettings
    batches: Batches

    def begin(self, checkpoints: Checkpoints, log: Log, warn: Log) -> tuple[Any, int]:
        """The state, restored or fresh, and how many steps it has done."""
        raise NotImplementedError

    def writer(self, run: "Run", step: int) -> MetricsWriter:
        """What takes the metrics of the steps after `step`, on process 0."""
        return MetricsWriter(run.workdir, step)

    def put(self, batch: Any) -> Any:
        """Begins to bring a batch of this process to its devices; returns it there."""
        raise NotImplementedError

    def variant(self, step: int) -> Hashable:
        """Which program `step` (from 0) needs: a run compiles again where it changes."""
        return None

    def describe(self, variant: Hashable) -> str:
        """A variant in a few words, for the log."""
        return ""

    def step(self, state: Any, batch: Any, variant: Hashable) -> tuple[Any, dict[str, jax.Array]]:
        """One update; metrics are scalars, `loss` and `grad_norm` among them."""
        raise NotImplementedError

    def line(self, step: int, values: Mapping[str, float], left: float | None) -> str:
        """A logged step as the screen shows it; `left` seconds, None where the speed is unknown."""
        raise NotImplementedError

    def measures(self, step: int) -> bool:
        """Whether `measure` is called after this many steps, which are logged then."""
        return False

    def measure(self, state: Any) -> dict[str, float]:
        """Values that go into the step's line of metrics.jsonl."""
        return {}

    def samples(self, step: int) -> bool:
        """Whether `sample` is called after this many steps."""
        return False

    def sample(self, run: "Run", step: int) -> None:
        """Writes pictures of the state."""

    def resumed(self, run: "Run", step: int) -> None:
        """Does what a stop cut off after the checkpoint of this step."""

    def last(self, run: "Run") -> None:
        """Uses the finished state while its checkpoint is written; all processes call."""

    def finish(self, run: "Run") -> str:
        """Writes what marks the run as finished, on process 0; returns a line about it."""
        raise NotImplementedError


class Run:
    """One task in one workdir: its state, its files and the loop over its steps.

    Attributes:
        first: whether this process writes.
        state: the newest state.
        writer: metrics.jsonl and TensorBoard, on process 0.
    """

    def __init__(self, task: Task, workdir: pathlib.Path, guard: HangGuard, log: Log):
        self.task, self.workdir, self.guard, self.log = task, workdir, guard, log
        self.settings, self.first = task.settings, distributed.is_first()
        self.state: Any = None
        self.writer: MetricsWriter | None = None
        self._watch = Stopwatch()
        self._profile = Profile(self.settings.profile_steps, workdir, log)
        self._prefetcher = Prefetcher(
            task.batches, task.put, self._watch, guard.heartbeat, self._worker_died,
            replaced=self._images_replaced,
        )  # fmt: skip
        self._replaced: set[str] = set()
        self._checkpoints = Checkpoints(
            workdir / "checkpoints",
            every=self.settings.checkpoint_every,
            keep=self.settings.keep_checkpoints,
            keep_every=self.settings.keep_every,
        )
        self._waiting: tuple[int, Any] | None = None  # a step dispatched whose metrics are unread
        self._lap_steps = self._skipped_in_a_row = 0

    def run(self) -> None:
        """Begins or resumes, trains what is left, finishes.

        Raises:
            TrainingError, Preempted, Lost: one line each.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self._prefetcher.close)
            stack.enter_context(closing(self._checkpoints))
            self._preemption = Preemption()
            stack.callback(self._preemption.close)
            try:
                begin = self._begin()
                if self.first:
                    self.writer = stack.enter_context(closing(self.task.writer(self, begin)))
                if begin:
                    self.task.resumed(self, begin)
                with closing(self._profile):
                    self._train(begin)
                self._finish()
            except (jax.errors.JaxRuntimeError, Lost) as error:
                explained = self._explain(error)
                if isinstance(explained, Lost):
                    stack.pop_all()  # nobody is left to close things together with
                raise explained from error
            except OSError as error:
                raise TrainingError(
                    f"the run cannot continue ({error}); the last checkpoint in {self.workdir}: "
                    f"{self._last_checkpoint()}"
                ) from error

    def _begin(self) -> int:
        """Sets the state and moves the data to it; returns the step."""
        self.guard.heartbeat("the newest checkpoint")
        before = self._checkpoints.latest_step()
        self.state, begin = self.task.begin(self._checkpoints, self.log, self.warn)
        self._prefetcher.seek(begin)
        metrics = self.workdir / "metrics.jsonl"
        if before and not begin and self.first and metrics.exists():
            # No checkpoint was whole: what the run had logged is all that is left of it.
            metrics.rename(self.workdir / f"metrics_until_step_{before}.jsonl")
        self._note("resumed" if begin else "started", step=begin)
        return begin

    def _train(self, begin: int) -> None:
        variant: Any = object()  # of no step: the first one compiles
        sampled = False
        for i in range(begin, self.settings.num_steps):
            before, variant = variant, self.task.variant(i)
            compiles = variant != before
            if compiles:
                self._log_waiting()
                if i > begin:
                    self._save(i)  # the next program may need more memory than there is
                self.log(f"compiling the step{self.task.describe(variant)} (step {i + 1})")
                self._watch.lap()

            batch = self._prefetcher.next(i)
            self.guard.heartbeat(f"step {i + 1}, waiting for the devices")
            self._profile.before(i + 1, self.state)
            self.state, metrics = self.task.step(self.state, batch, variant)
            self._profile.after(i + 1, metrics)
            if i + 1 < self.settings.num_steps:
                self._prefetcher.prefetch(i + 1, metrics)

            self._log_waiting()  # a step late, so that the devices always have one queued
            self._waiting = (i + 1, metrics)
            if compiles:  # the reported speed leaves out the seconds of compiling
                jax.block_until_ready(metrics)
                self._watch.lap()
                self._lap_steps = -1

            stop, due = self._preemption.reached(), self._checkpoints.due(i + 1)
            measures, samples = self.task.measures(i + 1), self.task.samples(i + 1)
            if stop or due or measures or samples:
                jax.block_until_ready(metrics)
                self._watch.pause()
                # First the step's line, and a check of its loss: no broken state is ever saved.
                self._log_waiting(self.task.measure(self.state) if measures else None)
                if stop or due or (samples and not sampled):  # which may need more memory, too
                    self._save(i + 1)
                if stop:
                    self._stop(i + 1)
                if samples:
                    self.task.sample(self, i + 1)
                    sampled = True
                self._watch.resume()
        self._log_waiting()

    def _log_waiting(self, measured: Mapping[str, float] | None = None) -> None:
        """Waits for the step in `_waiting`, checks it, and writes it where it is to be logged."""
        if self._waiting is None:
            return
        (step, metrics), self._waiting = self._waiting, None
        self.guard.heartbeat(f"step {step}, waiting for the devices")
        settings = self.settings
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._lap_steps += 1
        if np.isfinite(values["loss"] + values["grad_norm"]):
            self._skipped_in_a_row = 0
        else:
            self._not_finite(step, values)
        at_ends = step in (1, settings.num_steps)
        if step % settings.log_every and not at_ends and measured is None:
            return
        first = {name: values.pop(name) for name in ("loss", "cross_entropy") if name in values}
        values = first | values | dict(measured or {})
        left = None
        if self._lap_steps > 0:  # else the step was compiled, and nothing is known of its speed
            seconds, waited = self._watch.lap()
            seconds, self._lap_steps = seconds / self._lap_steps, 0
            values |= {"images_per_second": settings.batch_size / seconds, "wait_share": waited}
            left = seconds * (settings.num_steps - step)
        if self.writer:
            self.writer.step(step, values)
        self.log(self.task.line(step, values, left))

    def _finish(self) -> None:
        last = self.settings.num_steps
        self._save(last)
        self.stop_if_asked(last)
        self.task.last(self)
        self.guard.heartbeat("the last checkpoint")
        self._checkpoints.wait()
        line = ""
        if self.first:
            self.writer.close()  # a full disk may show only now: before the run counts as finished
            line = self.task.finish(self)
            self._note("finished", step=last)
        distributed.barrier("finished")
        self.log(f"finished: {last:,} steps; {line}")

    def warn(self, line: str) -> None:
        """Something out of the ordinary: to the screen and to events.jsonl."""
        self.log(line)
        self._note("message", text=line)

    def stop_if_asked(self, step: int) -> None:
        """Saves this step and ends the run if it was asked to stop; all processes must call."""
        if self._preemption.reached():
            self._save(step)
            self._stop(step)

    def _stop(self, step: int) -> None:
        """Ends the run when its checkpoint is on the disk."""
        self._checkpoints.wait()
        self._note("preempted", step=step)
        raise Preempted(f"{_who()}asked to stop: step {step:,} is saved; the same command resumes")

    def _save(self, step: int) -> None:
        self.guard.heartbeat(f"the checkpoint of step {step}")
        if self.writer:
            self.writer.upload()  # no checkpoint is newer than what is logged
        self._checkpoints.save(self.state, step)

    def _not_finite(self, step: int, values: Mapping[str, float]) -> None:
        """Records the batch of such a step; ends the run unless updates may be skipped."""
        self._skipped_in_a_row += 1
        path = self.workdir / f"nonfinite_step_{step:07d}.json"
        try:
            keys = self.task.batches.record_keys(step - 1)
        except Exception as error:  # the data may be what is wrong
            keys = [f"not readable: {first_line(error)}"]
        if self.first:
            found = {"step": step, **values, "records": keys}
            files.write_text(path, json.dumps(found, indent=2) + "\n")
        message = (
            f"loss is {values['loss']} and grad_norm {values['grad_norm']} at step {step}, with the "
            f"records {', '.join(keys[:3])} ... (all of them: {path})"
        )
        if self.settings.skip_nonfinite and self._skipped_in_a_row <= SKIPPED_IN_A_ROW:
            self.warn(f"{message}: its update is left out, {values['skipped']:.0f} so far")
            return
        self._note("not_finite", step=step)
        raise TrainingError(
            f"{message}; the last checkpoint: {self._last_checkpoint()} ({self.workdir}); a lower "
            "optimizer.learning_rate may help, or nonfinite=skip where it is a single batch"
        )

    def _worker_died(self, error: WorkerDied, index: int) -> None:
        print(f"{_who()}{error}; started again", file=sys.stderr, flush=True)
        self._note("worker_died", step=index + 1)

    def _images_replaced(self, names: list[str]) -> None:
        """Reports each of the images once."""
        for name in {re.sub(r" crop \d+$", "", name) for name in names} - self._replaced:
            self._replaced.add(name)
            line = f"replaced by the next image, for it cannot be read: {name}"
            print(f"{_who()}{line} ({len(self._replaced)} so far)", file=sys.stderr, flush=True)
            note_event(self.workdir, "image_replaced", image=name)

    def _note(self, event: str, **fields: Any) -> None:
        if self.first:
            note_event(self.workdir, event, **fields)

    def _last_checkpoint(self) -> str:
        return last_whole(self.workdir / "checkpoints")

    def _explain(self, error: Exception) -> Exception:
        """What an error of the devices means."""
        if isinstance(error, Lost):
            return error
        found = distributed.explain(error)
        if "RESOURCE_EXHAUSTED" in str(error):
            return TrainingError(f"{found}, at {self.guard.doing}: {LESS_MEMORY}; {WHOLE_WEIGHTS}")
        again = "; start all processes again" if isinstance(found, Lost) else ""
        return type(found)(f"{found}; the last checkpoint: {self._last_checkpoint()}{again}")


def _who() -> str:
    return f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
