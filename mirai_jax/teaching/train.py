"""The loop of `mirai_jax.teach`: one encoder in one workdir, which then serves as `teacher.path`.

The workdir is that of a run (see training/workdir.py), without samples and parts.json, and when it is
finished with the encoder alone in the converted folder `encoder` (see weights/pretrained.py).
"""

import collections
import contextlib
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mirai_jax import sharding
from mirai_jax.config import fields
from mirai_jax.data import pipeline, records, small_sets
from mirai_jax.data.pipeline import WorkerDied
from mirai_jax.data.small_sets import LabelledImages
from mirai_jax.teaching import figures
from mirai_jax.teaching import settings as settings_lib
from mirai_jax.teaching.settings import TeacherRunConfig, TeacherRunSettings
from mirai_jax.teaching.step import Recipe, init_state, make_measure, make_train_step
from mirai_jax.training import components
from mirai_jax.training.checkpoint import Checkpoints, last_whole
from mirai_jax.training.guards import Preemption
from mirai_jax.training.metrics_writer import MetricsWriter, read_metrics
from mirai_jax.training.prefetch import Prefetcher
from mirai_jax.training.start import steps_done
from mirai_jax.training.stopwatch import Stopwatch
from mirai_jax.training.workdir import note_event, open_workdir
from mirai_jax.utils.errors import Preempted, TrainingError, first_line
from mirai_jax.utils.files import closing
from mirai_jax.utils.progress import duration
from mirai_jax.weights import frozen, patch_codebook, pretrained

Log = Callable[[str], None]

_MASKS_SEED = 0  # of the held-out images: the same masks at every step, in every run


def teach(
    config: Mapping[str, Any],
    workdir: str | pathlib.Path,
    *,
    devices: list[jax.Device] | None = None,
    log: Log | None = None,
) -> None:
    """Trains, or continues, the encoder of `workdir` until it is finished.

    Args:
        config: a ConfigDict from configs/teacher.py, or the like.
        workdir: created if need be; a run of another config in it is refused.
        devices: what to run on, each a part of the batch (default: all of this machine's).
        log: takes the lines for the screen (default: print).

    Raises:
        ConfigError, DataError, TrainingError, Preempted: one line each.
    """
    log = log or (lambda line: print(line, flush=True))
    devices = jax.local_devices() if devices is None else devices
    settings = settings_lib.read(config, len(devices))
    workdir = pathlib.Path(workdir).expanduser()
    config = fields.plain(config)
    title, last = f"{settings.name}-{settings.scale}", settings.num_steps
    begin = steps_done(title, last, workdir, config, log, TeacherRunConfig)
    if (
        begin == last
        and (workdir / "summary.png").exists()
        and pretrained.is_converted(workdir / pretrained.ENCODER)
    ):
        log(f"this run is finished ({begin:,} steps); {_how_to_use(workdir)}")
        return
    train, held_out = (settings.data.load(split) for split in ("train", "held_out"))
    tokenizer, tokenizer_params, tokenizer_path = None, {}, workdir / "tokenizer.npz"
    if settings.objective != "labels":
        tokenizer, tokenizer_params = frozen.make_codebook(
            settings.vocab_size, settings.network.patch, train.images, tokenizer_path
        )
    recipe = Recipe(
        network=settings.network,
        objective=settings.objective,
        num_classes=len(train.class_names),
        tokenizer=tokenizer,
        optimizer=settings.optimizer,
        dtype=settings.dtype,
        label_smoothing=settings.label_smoothing,
        masked_share=settings.masked_share,
        shift=settings.shift,
        flip=settings.flip,
    )
    batches = make_batches(settings, train)
    identity = {"image_set": small_sets.checksum(train)}
    if tokenizer:
        identity["tokenizer"] = pretrained.checksum(tokenizer_params)
    if begin:
        components.check_same(identity, workdir, write=False)
    open_workdir(workdir, config)
    if tokenizer and not tokenizer_path.exists():
        patch_codebook.save_params(tokenizer_path, tokenizer_params)
    if not begin:
        (workdir / "parts.json").unlink(missing_ok=True)  # of a start that saved nothing
    components.check_same(identity, workdir, write=True)
    log(
        f"data: {settings.data.name}, {len(train.labels):,} images, {len(held_out.labels):,} more are "
        "held out"
    )
    _Run(settings, recipe, tokenizer_params, batches, held_out, workdir, devices, log).run()


def make_batches(settings: TeacherRunSettings, train: LabelledImages) -> pipeline.Batches:
    """The endless stream of {'image': uint8 (B, H, W, C), 'label': int32 (B,)}; raises DataError."""
    return pipeline.make_dataset(
        records.CodedImages(None, train.labels, train.images),
        batch_size=settings.batch_size,
        seed=settings.seed,
        num_workers=settings.data.num_workers,
    )


def _how_to_use(workdir: pathlib.Path) -> str:
    return (
        f"its encoder: --config.teacher.name=dinov2 --config.teacher.path={workdir} "
        "--config.teacher.image_size=0"
    )


class _Run:
    """One run: state, files and the loop over them."""

    def __init__(
        self,
        settings: TeacherRunSettings,
        recipe: Recipe,
        tokenizer_params: Any,
        batches: pipeline.Batches,
        held_out: LabelledImages,
        workdir: pathlib.Path,
        devices: list[jax.Device],
        log: Log,
    ):
        self.settings, self.recipe, self.held_out = settings, recipe, held_out
        self.workdir, self.log = workdir, log
        self.mesh = sharding.make_mesh((len(devices), 1, 1), devices)
        self.replicated = sharding.replicated(self.mesh)
        log(f"devices: {len(devices)} x {devices[0].device_kind}")
        self.codebook = sharding.place(tokenizer_params, self.replicated)
        split = sharding.batch_sharding(self.mesh)
        self.train_step = make_train_step(recipe, self.replicated, split)
        self.measure = make_measure(recipe, self.replicated, split)
        self.watch = Stopwatch()
        self.prefetcher = Prefetcher(
            batches, self._put, self.watch, lambda what: None, self._worker_died
        )
        self.checkpoints = Checkpoints(
            workdir / "checkpoints",
            every=settings.checkpoint_every,
            keep=settings.keep_checkpoints,
        )

    def run(self) -> None:
        """Begins or goes on, trains what is left, finishes."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.prefetcher.close)
            stack.enter_context(closing(self.checkpoints))
            self.preemption = Preemption()
            stack.callback(self.preemption.close)
            try:
                # Of a shorter run: they mark what is finished.
                (self.workdir / "summary.png").unlink(missing_ok=True)
                shutil.rmtree(self.workdir / pretrained.ENCODER, ignore_errors=True)
                begin = self._begin()
                self.writer = stack.enter_context(closing(MetricsWriter(self.workdir, begin)))
                self._loop(begin)
                self._finish()
            except jax.errors.JaxRuntimeError as error:
                raise TrainingError(
                    f"the devices failed ({first_line(error)[:200]}); the last checkpoint is of "
                    f"{self._last_checkpoint()}"
                ) from error
            except OSError as error:
                raise TrainingError(
                    f"the run cannot go on ({error}); the last checkpoint in {self.workdir} is of "
                    f"{self._last_checkpoint()}"
                ) from error

    def _begin(self) -> int:
        """Sets the state, of the newest whole checkpoint if there is one; returns its step."""
        make = lambda: init_state(self.recipe, jax.random.key(self.settings.seed))  # noqa: E731
        shapes = jax.eval_shape(make)
        count = sum(x.size for x in jax.tree.leaves(shapes.params["network"]))
        self.log(f"parameters: {count:,} in the encoder")
        placement = jax.tree.map(lambda _: self.replicated, shapes)
        found = self.checkpoints.restore_newest(shapes, placement, self._warn)
        if found is None:
            self.state, begin = jax.jit(make, out_shardings=placement)(), 0
            note_event(self.workdir, "started")
        else:
            self.state, begin = found
            self.log(f"resumed at step {begin:,} of {self.settings.num_steps:,}")
            note_event(self.workdir, "resumed", step=begin)
        self.prefetcher.seek(begin)
        return begin

    def _loop(self, begin: int) -> None:
        last, every = self.settings.num_steps, self.settings.evaluate_every
        self.lap_steps = 0
        self.waiting: tuple[int, Any] | None = None  # a step dispatched and not yet looked at
        for i in range(begin, last):
            batch = self.prefetcher.next(i)
            with jax.set_mesh(self.mesh):
                self.state, metrics = self.train_step(self.state, self.codebook, batch)
            if i + 1 < last:
                self.prefetcher.prefetch(i + 1, metrics)
            self._log()  # a step late, so that the device always has one queued
            self.waiting = (i + 1, metrics)
            if i == begin:  # the seconds of compiling are its own
                jax.block_until_ready(metrics)
                self.watch.lap()
                self.lap_steps = -1
            measured = (i + 1) % every == 0 or i + 1 == last
            stop, due = self.preemption.reached(), self.checkpoints.due(i + 1)
            if measured or stop or due:
                jax.block_until_ready(metrics)
                self.watch.pause()
                # First its line, and a look at its loss: no broken state is ever saved.
                self._log(self._measure_held_out() if measured else {})
                if stop or due:
                    self.checkpoints.save(self.state, i + 1)
                if stop:
                    self._stop(i + 1)
                self.watch.resume()
        self._log()

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return sharding.put_batch(batch, self.mesh)

    def _worker_died(self, error: WorkerDied, index: int) -> None:
        print(f"{error}; started again", file=sys.stderr, flush=True)
        note_event(self.workdir, "worker_died", step=index + 1)

    def _warn(self, line: str) -> None:
        """Something out of the ordinary: to the screen and to events.jsonl."""
        self.log(line)
        note_event(self.workdir, "message", text=line)

    def _last_checkpoint(self) -> str:
        return last_whole(self.workdir / "checkpoints")

    def _stop(self, step: int) -> None:
        """Ends the run, which was told to stop, when its checkpoint is on the disk."""
        self.checkpoints.wait()
        note_event(self.workdir, "preempted", step=step)
        raise Preempted(
            f"told to stop: step {step:,} is saved, the same command goes on from there"
        )

    def _measure_held_out(self) -> dict[str, float]:
        """{'held_out_...': mean of `scores` over all held-out images}."""
        images, labels = self.held_out.images, self.held_out.labels
        size, total = self.settings.batch_size, collections.Counter()
        for k, start in enumerate(range(0, len(labels), size)):
            rows = np.arange(start, start + size)  # the last batch is filled up, at weight 0
            batch = {
                "image": images[rows % len(labels)],
                "label": labels[rows % len(labels)],
                "weight": (rows < len(labels)).astype(np.float32),
            }
            key = jax.random.fold_in(jax.random.key(_MASKS_SEED), k)
            with jax.set_mesh(self.mesh):
                sums = self.measure(self.state.params, self.codebook, self._put(batch), key)
            total.update({name: float(value) for name, value in jax.device_get(sums).items()})
        return {f"held_out_{name}": value / len(labels) for name, value in total.items()}

    def _log(self, held_out: Mapping[str, float] | None = None) -> None:
        """Waits for the step in `waiting`, checks it, and writes it if it is one to be logged."""
        if self.waiting is None:
            return
        (step, metrics), self.waiting = self.waiting, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.lap_steps += 1
        if not np.isfinite(values["loss"] + values["grad_norm"]):
            raise TrainingError(
                f"loss is {values['loss']} and grad_norm {values['grad_norm']} at step {step}; the "
                f"last checkpoint is of {self._last_checkpoint()} ({self.workdir}): a lower "
                "optimizer.learning_rate may help"
            )
        if step % self.settings.log_every and step != 1 and not held_out:
            return
        values |= held_out or {}
        left = None
        if self.lap_steps > 0:
            seconds, waited = self.watch.lap()
            seconds, self.lap_steps = seconds / self.lap_steps, 0
            values |= {"images_per_second": self.settings.batch_size / seconds}
            values |= {"wait_share": waited}
            left = seconds * (self.settings.num_steps - step)
        self.writer.step(step, values)
        self.log(_line(step, self.settings.num_steps, values, left))

    def _finish(self) -> None:
        """The last checkpoint, the encoder and the figure."""
        last, summary = self.settings.num_steps, self.workdir / "summary.png"
        self.checkpoints.save(self.state, last)
        self.checkpoints.wait()
        self.writer.close()  # what the disk tells only now, it tells before this is finished
        source = {
            "file": str(self.workdir),
            "entry": f"mirai_jax.teach at step {last}",
            "image_size": str(self.settings.data.image_size),
            "data": self.settings.data.name,
            "held_out": str(self.settings.data.held_out),
        }
        network = jax.device_get(self.state.params["network"])
        encoder = pretrained.Weights("teacher", self.settings.network, network, None, source)
        pretrained.save(self.workdir / pretrained.ENCODER, encoder)
        title = f"{self.settings.name}-{self.settings.scale}"
        metrics = read_metrics(self.workdir)
        figures.teacher_figure(summary, title, metrics)
        note_event(self.workdir, "finished", step=last)
        known = _percentages(metrics[-1] if metrics else {}, "held_out_")
        self.log(f"finished: {last:,} steps; {'; '.join(known)}; figure: {summary}")
        self.log(_how_to_use(self.workdir))


def _percentages(values: Mapping[str, float], prefix: str) -> list[str]:
    return [
        f"{name.replace('_', ' ')} {value:.1%}"
        for name, value in values.items()
        if name.startswith(prefix) and name.endswith("accuracy")
    ]


def _line(step: int, num_steps: int, values: Mapping[str, float], left: float | None) -> str:
    """What the screen shows of a logged step; speed and the seconds left may not be known."""
    parts = [
        f"step {step:>{len(str(num_steps))}}/{num_steps}",
        f"loss {values['loss']:.4f}",
        *_percentages(values, ""),
        f"grad {values['grad_norm']:.2f}",
    ]
    if left is not None:
        parts += [
            f"{values['images_per_second']:.0f} img/s",
            f"wait {values['wait_share']:.0%}",
            f"{duration(left)} left",
        ]
    return "  ".join(parts)
