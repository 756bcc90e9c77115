"""The training loop: batch -> step -> metrics, samples, checkpoints; one run in one workdir."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview

from mirai_jax import codebook, coding, fields, files, foresight, report, sampler, sharding
from mirai_jax import config as config_lib
from mirai_jax.checkpoint import Checkpoints
from mirai_jax.errors import ConfigError
from mirai_jax.judge import agreement, fit_judge
from mirai_jax.parts import Parts, build, check_same, labelled_images
from mirai_jax.progress import duration
from mirai_jax.step import TrainState, init_state, make_train_step
from mirai_jax.workdir import (
    MetricsWriter,
    Stopwatch,
    check_workdir,
    open_workdir,
    read_metrics,
)

Say = Callable[[str], None]


class TrainingError(RuntimeError):
    """The run cannot go on: one line with the step and what to do."""


def draw(
    parts: Parts, ema: Any, labels: np.ndarray, key: jax.Array, chunk: int = 250
) -> np.ndarray:
    """uint8 images (N, H, W, C) of the labels; image i depends on `key` and i alone."""
    images = []
    for start in range(0, len(labels), chunk):
        indices = np.arange(start, start + chunk)
        some = np.resize(labels[start : start + chunk], chunk)  # one shape, one compilation
        codes = sampler.generate(
            parts.recipe.generator,
            ema,
            jnp.asarray(some),
            sampler.image_keys(key, indices),
            parts.settings.sample,
        )
        images.append(coding.decode_codes(parts.tokenizer, parts.tokenizer_params, codes))
    return np.concatenate(images)[: len(labels)]


def draw_grid(parts: Parts, ema: Any) -> np.ndarray:
    """The run's sample grid: always the same classes and keys, so that grids can be compared."""
    classes, count = parts.settings.sample_classes, parts.settings.sample_per_class
    key = jax.random.fold_in(jax.random.key(parts.settings.seed), 1)
    labels = np.repeat(np.arange(classes, dtype=np.int32), count)
    images = draw(parts, ema, labels, key, chunk=min(len(labels), 250))
    return report.sample_grid(images, parts.class_names[:classes])


def judge_samples(parts: Parts, ema: Any) -> dict[str, float]:
    """Agreement of a classifier of the real images with the class asked for, and its own limits."""
    settings = parts.settings
    judge = fit_judge(parts.images.images, parts.images.labels)
    labels = np.arange(settings.judged_samples, dtype=np.int32) % settings.generator.num_classes
    key = jax.random.fold_in(jax.random.key(settings.seed), 2)
    result = {"samples": agreement(judge, draw(parts, ema, labels, key), labels)}
    held_out = labelled_images(settings, "held_out")
    if len(held_out.labels):
        codes = coding.encode_images(parts.tokenizer, parts.tokenizer_params, held_out.images)
        decoded = coding.decode_codes(parts.tokenizer, parts.tokenizer_params, codes)
        result["real"] = agreement(judge, held_out.images, held_out.labels)
        result["real_through_tokenizer"] = agreement(judge, decoded, held_out.labels)
    return result


def progress_line(
    step: int, num_steps: int, metrics: Mapping[str, float], left: float | None
) -> str:
    """What the screen shows of a logged step; the seconds left are not known at the first."""
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
        f"{metrics['images_per_second']:.0f} img/s",
        *([] if left is None else [f"{duration(left)} left"]),
    ]
    return "  ".join(parts)


def train(
    config: Mapping[str, Any],
    workdir: str | pathlib.Path,
    *,
    devices: list[jax.Device] | None = None,
    say: Say | None = None,
) -> None:
    """Trains, or continues, the run of `workdir` until it is finished.

    Args:
        config: a ConfigDict from configs/, or the like.
        workdir: created if need be; a run of another config in it is refused.
        devices: what to run on (default: all).
        say: takes the lines for the screen (default: print, on the first process).

    Raises:
        ConfigError, DataError, TrainingError: one line each.
    """
    if say is None:
        say = (lambda line: print(line, flush=True)) if jax.process_index() == 0 else lambda _: None
    devices = jax.devices() if devices is None else devices
    settings = config_lib.read(config, len(devices), jax.process_count())
    workdir = pathlib.Path(workdir)
    config = fields.plain(config)
    changed = check_workdir(workdir, config)
    say(f"{settings.name}-{settings.scale} in {workdir}")
    for field, (old, new) in changed.items():
        say(f"continuing with {field} {new!r} (was {old!r})")
    begin = _latest_step(workdir / "checkpoints")
    if begin > settings.num_steps:
        raise ConfigError(
            f"num_steps is {settings.num_steps}; workdir {workdir} is already at step {begin}: it "
            f"must be {begin} or more"
        )
    summary = workdir / "summary.png"
    if begin == settings.num_steps and summary.exists():
        say(f"this run is finished ({begin:,} steps); its figure: {summary}")
        return
    tokenizer_path = workdir / "tokenizer.npz"
    parts = build(settings, tokenizer_path, say)
    if begin:
        check_same(parts, workdir)
    # Only now, when all that the config names was found: a mistake leaves nothing behind.
    open_workdir(workdir, config)
    if settings.data.in_memory and not tokenizer_path.exists():
        codebook.save_params(tokenizer_path, parts.tokenizer_params)
    if not begin:
        (workdir / "parts.json").unlink(missing_ok=True)  # of a start that saved nothing
        check_same(parts, workdir)
    _Run(parts, workdir, devices, say).run(begin)


def _latest_step(folder: pathlib.Path) -> int:
    """The newest checkpoint's step; 0 where there is none. Creates nothing."""
    if not folder.is_dir():
        return 0
    checkpoints = Checkpoints(folder)
    step = checkpoints.latest_step() or 0
    checkpoints.close()
    return step


class _Run:
    """One run: state, files and the loop over them."""

    def __init__(self, parts: Parts, workdir: pathlib.Path, devices: list, say: Say):
        self.parts, self.workdir, self.say = parts, workdir, say
        self.settings = settings = parts.settings
        self.mesh = sharding.make_mesh(settings.mesh, devices)
        say(f"devices: {len(devices)} x {devices[0].device_kind}, mesh {dict(self.mesh.shape)}")
        key = jax.random.key(settings.seed)
        make_state = lambda: init_state(parts.recipe, key)  # noqa: E731
        self.state_sharding = sharding.shardings(jax.eval_shape(make_state), self.mesh)
        self.state: TrainState = jax.jit(make_state, out_shardings=self.state_sharding)()
        count = parameter_overview.count_parameters
        say(
            f"parameters: {count(self.state.params['generator']):,} in the generator, "
            f"{count(self.state.params['foresight']):,} in foresight heads"
        )
        self.frozen = jax.device_put(parts.frozen, sharding.replicated(self.mesh))
        self.batches = iter(parts.batches)
        self.checkpoints = Checkpoints(
            workdir / "checkpoints",
            every=settings.checkpoint_every,
            keep=settings.keep_checkpoints,
        )

    def run(self, begin: int) -> None:
        """Restores step `begin`, trains what is left, and finishes."""
        last, summary = self.settings.num_steps, self.workdir / "summary.png"
        summary.unlink(missing_ok=True)  # of a shorter run: it marks what is finished
        try:
            if begin:
                self.state = self.checkpoints.restore(begin, self.state, self.batches)
                self.say(f"resumed at step {begin:,} of {last:,}")
            self.writer = MetricsWriter(self.workdir, begin)
            try:
                if begin < last:
                    self._loop(begin)
                self._finish(summary)
            finally:
                self.writer.close()
        finally:
            self.checkpoints.close()
            self.batches.close()

    def _loop(self, begin: int) -> None:
        settings, recipe = self.settings, self.parts.recipe
        train_step = make_train_step(
            recipe, self.state_sharding, sharding.batch_sharding(self.mesh)
        )
        self.watch, self.lap_steps, self.step_seconds = Stopwatch(), 0, 0.0
        active = None
        self.waiting: tuple[int, Any] | None = None  # a step dispatched and not yet looked at
        for i in range(begin, settings.num_steps):
            now_active = foresight.active_terms(recipe.terms, i, recipe.steps_per_epoch)
            compiles, active = now_active != active, now_active
            if compiles:
                self._log()
                self._tell_compile(i, now_active)
                self.watch.lap()
            batch = sharding.put_batch(next(self.batches), self.mesh)
            self.state, metrics = train_step(self.state, self.frozen, batch, i)
            self._log()  # a step late, so that the device always has one queued
            self.waiting = (i + 1, metrics)
            if compiles:  # its seconds are its own: speed is told without them
                jax.block_until_ready(metrics)
                self.step_seconds, self.lap_steps = self.watch.lap(), -1
            samples = settings.sample_every and (i + 1) % settings.sample_every == 0
            if self.checkpoints.due(i + 1) or samples:
                # First its line, and a look at its loss: no broken state is ever saved.
                self._log()
                self.watch.pause()
                self.checkpoints.save(self.state, i + 1, self.batches)
                if samples and i + 1 < settings.num_steps:
                    self._sample(i + 1)
                self.watch.resume()
        self._log()

    def _tell_compile(self, step: int, active: tuple[bool, ...]) -> None:
        names = [
            term.name
            for term, is_active in zip(self.parts.recipe.terms, active, strict=True)
            if is_active
        ]
        what = f"with foresight {', '.join(names)}" if names else "without foresight"
        self.say(f"compiling the step {what} (step {step + 1})")

    def _log(self) -> None:
        """Waits for the step in `waiting`, checks it, and writes it if it is one to be logged."""
        if self.waiting is None:
            return
        (step, metrics), self.waiting = self.waiting, None
        settings = self.settings
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.lap_steps += 1
        if not np.isfinite(values["loss"] + values["grad_norm"]):
            saved = self.checkpoints.latest_step()
            raise TrainingError(
                f"loss is {values['loss']} and grad_norm {values['grad_norm']} at step {step}; the "
                f"last checkpoint is of {'no step yet' if saved is None else f'step {saved}'} "
                f"({self.workdir}): a lower optimizer.learning_rate may help"
            )
        if step % settings.log_every and step != settings.num_steps and step != 1:
            return
        first = {name: values.pop(name) for name in ("loss", "cross_entropy")}
        values = first | values
        left = None
        if self.lap_steps > 0:
            self.step_seconds, self.lap_steps = self.watch.lap() / self.lap_steps, 0
            left = self.step_seconds * (settings.num_steps - step)
        values["images_per_second"] = settings.batch_size / self.step_seconds
        self.writer.step(step, values)
        self.say(progress_line(step, settings.num_steps, values, left))

    def _sample(self, step: int) -> np.ndarray | None:
        """Writes the grid of this step; None where there is no decoder."""
        if self.parts.tokenizer is None:
            self.say(f"no samples at step {step}: tokenizer.path is unset, nothing decodes them")
            return None
        grid = draw_grid(self.parts, self.state.ema)
        path = self.workdir / "samples" / f"step_{step:07d}.png"
        report.save_picture(path, grid)
        self.writer.image(step, "samples", grid)
        self.say(f"samples: {path}")
        return grid

    def _finish(self, summary: pathlib.Path) -> None:
        """The last checkpoint, the last grid, the judge and the figure."""
        settings = self.settings
        self.checkpoints.save(self.state, settings.num_steps, self.batches, force=True)
        grid = self._sample(settings.num_steps)
        if settings.judged_samples and self.parts.images is not None:
            result = judge_samples(self.parts, self.state.ema)
            files.write_text(self.workdir / "agreement.json", json.dumps(result, indent=2) + "\n")
            self.writer.board(settings.num_steps, {f"agreement/{k}": v for k, v in result.items()})
            line = f"a classifier of the real images sees the class asked for in {result['samples']:.1%}"
            line += f" of {settings.judged_samples:,} samples"
            if "real" in result:
                line += (
                    f" ({result['real']:.1%} of held-out real images, "
                    f"{result['real_through_tokenizer']:.1%} of them through the tokenizer)"
                )
            self.say(line)
        self.checkpoints.wait()
        title = f"{settings.name}-{settings.scale}"
        report.summary_figure(summary, title, read_metrics(self.workdir), grid)
        self.say(f"finished: {settings.num_steps:,} steps; figure: {summary}")
