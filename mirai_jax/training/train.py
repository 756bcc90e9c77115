"""The training loop: batch -> step -> metrics, samples, checkpoints; one run in one workdir."""

import contextlib
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mirai_jax import sharding
from mirai_jax.config import fields, schema
from mirai_jax.data.pipeline import WorkerDied
from mirai_jax.step import make_train_step
from mirai_jax.training import figures, previews, start
from mirai_jax.training.checkpoint import Checkpoints, last_whole
from mirai_jax.training.components import Components, build, check_same
from mirai_jax.training.guards import HangGuard, Preemption, SpikeDetector
from mirai_jax.training.metrics_writer import MetricsWriter, read_metrics
from mirai_jax.training.prefetch import Prefetcher
from mirai_jax.training.stopwatch import Stopwatch, progress_line
from mirai_jax.training.workdir import note_event, open_workdir
from mirai_jax.utils import distributed, files, pictures
from mirai_jax.utils.errors import LESS_MEMORY, Lost, Preempted, TrainingError, first_line
from mirai_jax.utils.files import closing
from mirai_jax.weights import patch_codebook

Log = Callable[[str], None]

SKIPPED_IN_A_ROW = 20  # updates left out before the run stops all the same (nonfinite 'skip')


def train(
    config: Mapping[str, Any],
    workdir: str | pathlib.Path,
    *,
    devices: list[jax.Device] | None = None,
    log: Log | None = None,
) -> None:
    """Trains, or continues, the run of `workdir` until it is finished.

    With several processes all call it alike; the first one writes.

    Args:
        config: a ConfigDict from configs/, or the like.
        workdir: created if need be; a run of another config in it is refused.
        devices: what to run on (default: all).
        log: takes the lines for the screen (default: print, on the first process).

    Raises:
        ConfigError, DataError, TrainingError, Preempted, Lost: one line each.
    """
    first = distributed.is_first()
    if log is None or not first:
        log = (lambda line: print(line, flush=True)) if first else lambda _: None
    devices = jax.devices() if devices is None else devices
    settings = schema.read(config, len(devices))
    workdir = pathlib.Path(workdir).expanduser()
    config = fields.plain(config)
    title = f"{settings.name}-{settings.scale}"
    begin = start.steps_done(title, settings.num_steps, workdir, config, log)
    summary = workdir / "summary.png"
    finished = begin == settings.num_steps and summary.exists()
    # As process 0 sees it: where another sees less, or nothing, none may end or wait alone.
    begin, finished = map(int, distributed.from_first((np.asarray(begin), np.asarray(finished))))
    if finished:
        log(f"this run is finished ({begin:,} steps); its figure: {summary}")
        return
    tokenizer_path = workdir / "tokenizer.npz"
    with contextlib.closing(HangGuard(settings.hang_limit)) as guard:
        guard.heartbeat("reading data and frozen networks")
        mesh = sharding.make_mesh(settings.mesh, devices)
        components, initial = build(settings, mesh, tokenizer_path, log), None
        if begin:
            check_same(components.identity, workdir, write=False)
        elif settings.init_from:
            initial = start.read_initial(components)
        # Only now, when all that the config names was found: a mistake leaves nothing behind. And
        # only when every process has looked at what was there.
        distributed.barrier("begin")
        if first:
            open_workdir(workdir, config)
            if settings.data.in_memory and not tokenizer_path.exists():
                patch_codebook.save_params(tokenizer_path, components.tokenizer_params)
            if not begin:
                (workdir / "parts.json").unlink(missing_ok=True)  # of a start that saved nothing
            check_same(components.identity, workdir, write=True)
        distributed.barrier("workdir")
        distributed.check_shared(workdir)
        _Run(components, workdir, mesh, guard, log).run(initial)


class _Run:
    """One run: state, files and the loop over them."""

    def __init__(
        self,
        components: Components,
        workdir: pathlib.Path,
        mesh: jax.sharding.Mesh,
        guard: HangGuard,
        log: Log,
    ):
        self.components, self.workdir, self.mesh, self.guard, self.log = (
            components,
            workdir,
            mesh,
            guard,
            log,
        )
        self.settings = settings = components.settings
        self.first = distributed.is_first()
        kind = mesh.devices.flat[0].device_kind
        processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        log(f"devices: {mesh.size} x {kind}{processes}, mesh {dict(mesh.shape)}")
        self.frozen = sharding.place(components.frozen, sharding.replicated(mesh))
        self.watch = Stopwatch()
        self.prefetcher = Prefetcher(
            components.batches, self._put, self.watch, guard.heartbeat, self._worker_died
        )
        self.checkpoints = Checkpoints(
            workdir / "checkpoints",
            every=settings.checkpoint_every,
            keep=settings.keep_checkpoints,
            keep_every=settings.keep_every,
        )
        self.writer: MetricsWriter | None = None  # the first process's
        self.spikes, self.skipped_in_a_row = SpikeDetector(), 0

    def run(self, initial: Any) -> None:
        """Begins (with the weights `initial`, or None) or goes on, trains what is left, finishes."""
        last, summary = self.settings.num_steps, self.workdir / "summary.png"
        with contextlib.ExitStack() as stack:
            stack.callback(self.prefetcher.close)
            stack.enter_context(closing(self.checkpoints))
            self.preemption = Preemption()
            stack.callback(self.preemption.close)
            try:
                if self.first:
                    summary.unlink(missing_ok=True)  # of a shorter run: it marks what is finished
                begin = self._begin(initial)
                del initial
                if self.first:
                    self.writer = stack.enter_context(closing(MetricsWriter(self.workdir, begin)))
                if begin < last:
                    self._loop(begin)
                self._finish(summary)
            except (jax.errors.JaxRuntimeError, Lost) as error:
                message = self._explain(error)
                if isinstance(message, Lost):
                    stack.pop_all()  # nobody is left to close things together with
                raise message from error
            except OSError as error:
                raise TrainingError(
                    f"the run cannot go on ({error}); the last checkpoint in {self.workdir} is of "
                    f"{self._last_checkpoint()}"
                ) from error

    def _begin(self, initial: Any) -> int:
        """Sets the state and moves the data to it; returns the step."""
        self.guard.heartbeat("the newest checkpoint")
        before = self.checkpoints.latest_step()
        self.state, self.state_sharding, begun = start.begin(
            self.components, self.mesh, self.checkpoints, self.log, self._warn, initial
        )
        self.prefetcher.seek(begun)
        if begun:
            self._note("resumed", step=begun)
            return begun
        metrics = self.workdir / "metrics.jsonl"
        if before and self.first and metrics.exists():
            # No checkpoint was whole: what the run had logged is all that is left of it.
            metrics.rename(self.workdir / f"metrics_until_step_{before}.jsonl")
        self._note("started", init_from=self.settings.init_from)
        return begun

    def _loop(self, begin: int) -> None:
        settings, recipe = self.settings, self.components.recipe
        train_step = make_train_step(
            recipe, self.state_sharding, sharding.batch_sharding(self.mesh)
        )
        self.lap_steps, active = 0, None
        self.waiting: tuple[int, Any] | None = None  # a step dispatched and not yet looked at
        for i in range(begin, settings.num_steps):
            now_active = train_step.active(i)
            compiles, active = now_active != active, now_active
            if compiles:
                self._log()
                self._tell_compile(i, now_active)
                self.watch.lap()
            batch = self.prefetcher.next(i)
            self.guard.heartbeat(f"step {i + 1}, waiting for the devices")
            self.state, metrics = train_step(self.state, self.frozen, batch, i)
            if i + 1 < settings.num_steps:
                self.prefetcher.prefetch(i + 1, metrics)
            self._log()  # a step late, so that the device always has one queued
            self.waiting = (i + 1, metrics)
            if compiles:  # its seconds are its own: speed is told without them
                jax.block_until_ready(metrics)
                self.watch.lap()
                self.lap_steps = -1
            stop = self.preemption.reached()
            samples = settings.sample_every and (i + 1) % settings.sample_every == 0
            due = self.checkpoints.due(i + 1)
            if stop or due or samples:
                # First its line, and a look at its loss: no broken state is ever saved.
                self._log()
                self.watch.pause()
                if stop or due:
                    self._save(i + 1)
                if stop:
                    self._stop(i + 1)
                if samples and i + 1 < settings.num_steps:
                    self._sample(i + 1)
                self.watch.resume()
        self._log()

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return sharding.put_batch(batch, self.mesh, self.settings.batch_size)

    def _worker_died(self, error: WorkerDied, index: int) -> None:
        print(f"{self._who()}{error}; started again", file=sys.stderr, flush=True)
        self._note("worker_died", step=index + 1)

    def _save(self, step: int) -> None:
        self.guard.heartbeat(f"the checkpoint of step {step}")
        self.checkpoints.save(self.state, step)

    def _look(self, step: int) -> None:
        """Ends the run, whose step is saved, if it was told to stop."""
        if self.preemption.reached():
            self._stop(step)

    def _stop(self, step: int) -> None:
        """Ends the run, which was told to stop, when its checkpoint is on the disk."""
        self.checkpoints.wait()
        self._note("preempted", step=step)
        raise Preempted(
            f"{self._who()}told to stop: step {step:,} is saved, the same command goes on from there"
        )

    def _who(self) -> str:
        return f"process {jax.process_index()}: " if jax.process_count() > 1 else ""

    def _note(self, event: str, **fields: Any) -> None:
        if self.first:
            note_event(self.workdir, event, **fields)

    def _warn(self, line: str) -> None:
        """Something out of the ordinary: to the screen and to events.jsonl."""
        self.log(line)
        self._note("message", text=line)

    def _last_checkpoint(self) -> str:
        return last_whole(self.workdir / "checkpoints")

    def _explain(self, error: Exception) -> Exception:
        """What an error of the devices means."""
        if isinstance(error, Lost):
            return error
        if "RESOURCE_EXHAUSTED" in str(error):
            return TrainingError(f"out of memory ({first_line(error)[:200]}): {LESS_MEMORY}")
        if distributed.means_lost(error):
            return Lost(
                f"another process is gone or cannot be reached ({first_line(error)[:200]}); the "
                f"last checkpoint is of {self._last_checkpoint()}: start all processes again"
            )
        return TrainingError(
            f"the devices failed ({first_line(error)[:200]}); the last checkpoint is of "
            f"{self._last_checkpoint()}"
        )

    def _tell_compile(self, step: int, active: tuple[bool, ...]) -> None:
        names = [
            term.name
            for term, is_active in zip(self.components.recipe.terms, active, strict=True)
            if is_active
        ]
        what = f"with foresight {', '.join(names)}" if names else "without foresight"
        self.log(f"compiling the step {what} (step {step + 1})")

    def _log(self) -> None:
        """Waits for the step in `waiting`, checks it, and writes it if it is one to be logged."""
        if self.waiting is None:
            return
        (step, metrics), self.waiting = self.waiting, None
        self.guard.heartbeat(f"step {step}, waiting for the devices")
        settings = self.settings
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.lap_steps += 1
        if not np.isfinite(values["loss"] + values["grad_norm"]):
            self._not_finite(step, values)
        else:
            self.skipped_in_a_row = 0
            spike = self.spikes(values["cross_entropy"])
            if spike is not None:
                self._warn(f"the cross-entropy jumps at step {step}: {spike}")
        if step % settings.log_every and step != settings.num_steps and step != 1:
            return
        first = {name: values.pop(name) for name in ("loss", "cross_entropy")}
        values = first | values
        left = None
        if self.lap_steps > 0:  # else the step was compiled, and nothing is known of its speed
            seconds, waited = self.watch.lap()
            seconds, self.lap_steps = seconds / self.lap_steps, 0
            values |= {"images_per_second": settings.batch_size / seconds, "wait_share": waited}
            left = seconds * (settings.num_steps - step)
        if self.writer:
            self.writer.step(step, values)
        self.log(progress_line(step, settings.num_steps, values, left))

    def _not_finite(self, step: int, values: Mapping[str, float]) -> None:
        """Writes down the batch of such a step; ends the run unless updates may be skipped."""
        self.skipped_in_a_row += 1
        path = self.workdir / f"nonfinite_step_{step:07d}.json"
        try:
            keys = self.components.batches.record_keys(step - 1)
        except Exception as error:  # the data may be what is wrong
            keys = [f"not readable: {first_line(error)}"]
        if self.first:
            found = {"step": step, **values, "records": keys}
            files.write_text(path, json.dumps(found, indent=2) + "\n")
        message = (
            f"loss is {values['loss']} and grad_norm {values['grad_norm']} at step {step}, whose batch "
            f"is of records {', '.join(keys[:3])} ... (all of them: {path})"
        )
        if self.settings.nonfinite == "skip" and self.skipped_in_a_row <= SKIPPED_IN_A_ROW:
            self._warn(f"{message}: its update is left out, {values['skipped']:.0f} so far")
            return
        self._note("not_finite", step=step)
        raise TrainingError(
            f"{message}; the last checkpoint is of {self._last_checkpoint()} ({self.workdir}): a lower "
            "optimizer.learning_rate may help, or --config.nonfinite=skip where it is a single batch"
        )

    def _sample(self, step: int) -> np.ndarray | None:
        """Writes the grid of this step; None where there is no decoder, or on other hosts."""
        if self.components.tokenizer is None:
            self.log(f"no samples at step {step}: tokenizer.path is unset, nothing decodes them")
            return None
        codes = previews.grid_codes(
            self.components, self.mesh, self.state.ema, self.guard.heartbeat
        )
        if not self.first:
            return None
        grid = previews.grid_picture(self.components, codes)
        path = self.workdir / "samples" / f"step_{step:07d}.png"
        pictures.save_picture(path, grid)
        self.writer.image(step, "samples", grid)
        self.log(f"samples: {path}")
        return grid

    def _finish(self, summary: pathlib.Path) -> None:
        """The last checkpoint, the last grid, the judge and the figure."""
        settings = self.settings
        self._save(settings.num_steps)
        self._look(settings.num_steps)
        grid = self._sample(settings.num_steps)
        self._look(settings.num_steps)
        if settings.judged_samples and self.components.images is not None:
            codes = previews.judged_codes(
                self.components, self.mesh, self.state.ema, self.guard.heartbeat
            )
            self.guard.heartbeat("the classifier of the samples")
            if self.first:
                self._tell_agreement(previews.judge_samples(self.components, codes))
        self.guard.heartbeat("the last checkpoint")
        self.checkpoints.wait()
        if self.first:
            self.writer.close()  # what the disk tells only now, it tells before this is finished
            title = f"{settings.name}-{settings.scale}"
            figures.summary_figure(summary, title, read_metrics(self.workdir), grid)
            self._note("finished", step=settings.num_steps)
        distributed.barrier("finished")
        self.log(f"finished: {settings.num_steps:,} steps; figure: {summary}")

    def _tell_agreement(self, result: Mapping[str, float]) -> None:
        settings = self.settings
        files.write_text(self.workdir / "agreement.json", json.dumps(result, indent=2) + "\n")
        self.writer.board(settings.num_steps, {f"agreement/{k}": v for k, v in result.items()})
        line = (
            f"a classifier of the real images sees the class asked for in {result['samples']:.1%}"
        )
        line += f" of {settings.judged_samples:,} samples"
        if "real" in result:
            line += (
                f" ({result['real']:.1%} of held-out real images, "
                f"{result['real_through_tokenizer']:.1%} of them through the tokenizer)"
            )
        self.log(line)
