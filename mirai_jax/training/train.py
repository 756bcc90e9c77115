"""Trains a generator: `python -m mirai_jax.main` calls `train`; loop.py has the loop."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mirai_jax import foresight, sharding
from mirai_jax.config import schema
from mirai_jax.config.fields import fill
from mirai_jax.models import adapters
from mirai_jax.step import Recipe, ema_params, jit_train_step
from mirai_jax.training import (
    attention_choice,
    components,
    figures,
    loop,
    previews,
    start,
    transfer,
    workdir,
)
from mirai_jax.training.checkpoint import Checkpoints
from mirai_jax.training.components import Components
from mirai_jax.training.follow import resolve
from mirai_jax.training.guards import HangGuard
from mirai_jax.training.metrics_writer import MetricsWriter, read_metrics
from mirai_jax.training.stopwatch import progress_line
from mirai_jax.training.tracking import TrackedWriter
from mirai_jax.utils import distributed, files, paths, pictures
from mirai_jax.utils.progress import Progress

Log = Callable[[str], None]

_MEASURED = {  # while it trains; on the screen
    "validation_cross_entropy": "validation",
    "fid": "FID",
    "frechet_efficientnet_lite0": "Fréchet",
}


def train(
    config: Mapping[str, Any],
    folder: str | pathlib.Path,
    *,
    devices: list[jax.Device] | None = None,
    log: Log | None = None,
    measurer: Callable[[Components, jax.sharding.Mesh, Log], Any] | None = None,
) -> None:
    """Trains the run of a workdir until it is finished, or resumes it.

    With several processes all call it alike; the first one writes.

    Args:
        config: a ConfigDict from configs/, or the like.
        folder: the workdir, created if need be; a run of another config in it is refused.
        log: takes the lines for the screen (default: print, on the first process).
        measurer: makes what measures the run while it trains: evaluation.during.Measurer. None: nothing.

    Raises:
        ConfigError, DataError, TrainingError, Preempted, Lost: one line each.
    """
    if not distributed.is_first():
        log = lambda line: None
    elif log is None:
        log = functools.partial(print, flush=True)
    devices = jax.devices() if devices is None else devices
    config = resolve(config, log)
    settings = schema.read(config, len(devices), sharding.num_slices(devices))
    folder = paths.at(folder)
    title = f"{settings.name}-{settings.scale}"
    begin = start.steps_done(title, settings.num_steps, folder, config, log)
    summary = folder / "summary.png"
    finished = begin == settings.num_steps and summary.exists()
    # As process 0 sees it: where another sees less, or nothing, no process may end or wait without the others.
    begin, finished = map(int, distributed.from_first((np.asarray(begin), np.asarray(finished))))
    if finished:
        log(f"this run is finished ({begin:,} steps); its figure: {summary}")
        return
    # Before the guard: a process may wait long for another one on its host, which makes copies and indices
    # for both. Requests to a bucket have other limits.
    on_disk = components.open_source(settings)
    distributed.barrier("images")
    with contextlib.closing(HangGuard(settings.hang_limit)) as guard:
        guard.heartbeat("reading data and frozen networks")
        mesh = sharding.make_mesh(settings.mesh, devices)
        stream = sys.stderr if distributed.is_first() else None
        shown = functools.partial(Progress, stream=stream, heartbeat=guard.heartbeat)
        path = transfer.codebook_path(settings, folder)
        made = components.build(settings, mesh, path, log, on_disk, shown)
        guard.heartbeat("what the run begins with and what measures it")
        initial = transfer.read(made) if settings.init_from and not begin else None
        codebook = made.tokenizer_params if settings.tokenizer.name == "patch" else None
        measuring = measurer(made, mesh, log) if measurer else None
        with workdir.claim(folder, config, made.identity, codebook, fresh=not begin):
            if distributed.is_first():
                files.write_text(folder / "classes.json", json.dumps(made.class_names) + "\n")
            kind = mesh.devices.flat[0].device_kind
            processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
            log(f"devices: {mesh.size} x {kind}{processes}, mesh {dict(mesh.shape)}")
            guard.heartbeat("timing attention kernels")
            kernel = attention_choice.choose(settings, mesh, folder, begin, log)
            generator = dataclasses.replace(made.recipe.generator, attention=kernel)
            recipe = dataclasses.replace(made.recipe, generator=generator)
            made = dataclasses.replace(made, recipe=recipe)
            task = GeneratorTask(made, mesh, summary, initial, measuring)
            loop.Run(task, folder, guard, log).run()


def doubts(recipe: Recipe, num_steps: int, tensor: int = 1) -> list[str]:
    """Lines about what is allowed and seldom meant: a foresight term that would start after the run's end,
    too slow an average, heads that `tensor` devices do not share."""
    starts = [foresight.start_step(term, recipe.steps_per_epoch) for term in recipe.terms]
    lines = [
        f"foresight[{i}] ({recipe.terms[i].name}) would start at step {start:,}, and the run has "
        f"{num_steps:,}: raise num_steps, or lower foresight[{i}].start_epoch"
        for i, start in enumerate(starts)
        if start >= num_steps
    ]
    if (rest := recipe.ema_decay**num_steps) > 0.1:
        lines.append(
            f"ema_decay={recipe.ema_decay:g}: after {num_steps:,} steps the average, which is sampled, is "
            f"{rest:.0%} initial weights: raise num_steps, or lower ema_decay"
        )
    if recipe.generator.num_heads % tensor:
        lines.append(
            f"mesh.tensor={tensor} does not divide the {recipe.generator.num_heads} heads of the model: "
            "each of these devices keeps and computes the whole attention"
        )
    return lines


class GeneratorTask(loop.Task):
    """The generator with its foresight terms; `summary` is the figure that marks a finished run."""

    def __init__(
        self,
        made: Components,
        mesh: jax.sharding.Mesh,
        summary: pathlib.Path,
        initial: Any,
        measurer: Any = None,
    ):
        self._measurer, self._every = measurer, measurer.every if measurer else {}
        self._measured, self._newest = 0, {}  # the last step that was measured; values by name
        self._made, self._mesh, self._summary, self._initial = made, mesh, summary, initial
        self.batches, config = made.batches, made.settings
        skip = config.nonfinite == "skip"
        self.settings = fill(loop.LoopSettings, config, skip_nonfinite=skip)
        self._frozen = sharding.place(made.frozen, sharding.replicated(mesh))
        self._grid: np.ndarray | None = None  # of the last step

    def begin(self, checkpoints: Checkpoints, log: Log, warn: Log) -> tuple[Any, int]:
        if distributed.is_first():
            self._summary.unlink(missing_ok=True)  # of a shorter run: it marks what is finished
        initial, self._initial = self._initial, None  # not kept beside the state
        state, placement, step = start.begin(
            self._made, self._mesh, checkpoints, log, warn, initial
        )
        recipe = self._made.recipe
        for line in doubts(recipe, self.settings.num_steps, self._mesh.shape["tensor"]):
            warn(line)
        rows = sharding.batch_sharding(self._mesh)
        self._train_step = jit_train_step(recipe, placement, rows)
        return state, step

    def writer(self, run: loop.Run, step: int) -> MetricsWriter:
        if project := self._made.settings.wandb.project:
            run.guard.heartbeat("Weights & Biases")
            return TrackedWriter(run.workdir, step, project, run.warn)
        return super().writer(run, step)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return sharding.put_batch(batch, self._mesh, self.settings.batch_size)

    def variant(self, step: int) -> tuple[bool, ...]:
        """Which foresight terms take part."""
        recipe = self._made.recipe
        return foresight.active_terms(recipe.terms, step, recipe.steps_per_epoch)

    def describe(self, variant: tuple[bool, ...]) -> str:
        terms = zip(self._made.recipe.terms, variant, strict=True)
        names = [term.name for term, is_active in terms if is_active]
        return f" with foresight {', '.join(names)}" if names else " without foresight"

    def step(self, state: Any, batch: Any, variant: tuple[bool, ...]) -> tuple[Any, dict]:
        with jax.set_mesh(self._mesh):
            return self._train_step(state, self._frozen, batch, variant)

    def line(self, step: int, values: Mapping[str, float], left: float | None) -> str:
        heads = [
            f"{name.removeprefix('foresight_')} {value:.3f}"
            for name, value in values.items()
            if name.startswith("foresight_")
        ]
        losses = [f"loss {values['loss']:.4f}", f"ce {values['cross_entropy']:.4f}"]
        measures = [*losses, *heads, f"grad {values['grad_norm']:.2f}", *self._shown()]
        return progress_line(step, self.settings.num_steps, measures, values, left)

    def _generator(self, state: Any) -> Any:
        """The generator that draws samples: the average, with its adapters merged."""
        return adapters.merge(ema_params(state), self._made.recipe.lora)

    def _due(self, step: int) -> list[str]:
        """What is measured after this many steps."""
        last = step == self.settings.num_steps
        return [kind for kind, every in self._every.items() if last or step % every == 0]

    def measures(self, step: int) -> bool:
        return bool(self._due(step))  # so that the step is logged; `sample` measures it

    def _shows(self, step: int) -> bool:
        every = self._made.settings.sample_every
        return bool(every) and step % every == 0 and step < self.settings.num_steps

    def samples(self, step: int) -> bool:
        return self._shows(step) or (self.measures(step) and step < self.settings.num_steps)

    def sample(self, run: loop.Run, step: int) -> None:
        """Writes the grid of this step, where there is a decoder, and measures it."""
        if self._shows(step):
            self._show(run, step)
        self._measure(run, step, self._due(step))

    def resumed(self, run: loop.Run, step: int) -> None:
        """Measures the step where it was to be, and a stop came before that or in between."""
        entry, due = {}, self._due(step)
        for entry in read_metrics(run.workdir) if self._every and run.first else ():
            self._newest |= entry
        is_logged = entry.get("step") == step
        missing = np.array([is_logged and f"{kind}_seconds" not in entry for kind in due], bool)
        missing = distributed.from_first(missing) if due else missing
        self._measure(run, step, [due[i] for i in np.flatnonzero(missing)])

    def _measure(self, run: loop.Run, step: int, kinds: list[str]) -> None:
        """Adds to the step's line what is measured of it."""
        self._measured = step

        def heartbeat(what: str) -> None:
            run.guard.heartbeat(what)
            run.stop_if_asked(step)  # the next start measures what is missing

        for kind in kinds:
            begun = time.perf_counter()
            values = self._measurer.measure(kind, run.state, heartbeat)
            values |= {f"{kind}_seconds": time.perf_counter() - begun}
            self._newest |= values
            if run.writer:
                run.writer.step(step, values)
            listed = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            run.log(f"step {step}: {listed}")

    def _shown(self) -> list[str]:
        """The newest measurements, for the screen."""
        known = {name: self._newest[name] for name in _MEASURED if name in self._newest}
        return [f"{_MEASURED[name]} {value:.4g}" for name, value in known.items()]

    def _show(self, run: loop.Run, step: int) -> None:
        """Writes the grid of this step, where there is a decoder."""
        if self._made.tokenizer is None:
            run.log(f"no samples at step {step}: tokenizer.path is unset, nothing decodes them")
            return
        generator = self._generator(run.state)
        codes = previews.grid_codes(self._made, self._mesh, generator, run.guard.heartbeat)
        if not run.first:
            return
        self._grid = previews.grid_picture(self._made, codes)
        path = run.workdir / "samples" / f"step_{step:07d}.png"
        pictures.save_picture(path, self._grid)
        run.writer.image(step, "samples", self._grid)
        run.log(f"samples: {path}")

    def last(self, run: loop.Run) -> None:
        """The last grid and the class accuracy of samples."""
        config = self._made.settings
        self._show(run, config.num_steps)
        run.stop_if_asked(config.num_steps)
        if self._measured < config.num_steps:
            self._measure(run, config.num_steps, self._due(config.num_steps))
        if not config.judged_samples or self._made.images is None:
            return
        generator = self._generator(run.state)
        codes = previews.judged_codes(self._made, self._mesh, generator, run.guard.heartbeat)
        run.guard.heartbeat("the classifier of the samples")
        if not run.first:
            return
        result = previews.judge_samples(self._made, codes)
        files.write_text(run.workdir / "agreement.json", json.dumps(result, indent=2) + "\n")
        run.writer.board(config.num_steps, {f"agreement/{k}": v for k, v in result.items()})
        real = ""
        if "real" in result:
            real = (
                f" ({result['real']:.1%} of held-out real images, "
                f"{result['real_through_tokenizer']:.1%} of them through the tokenizer)"
            )
        run.log(
            "a classifier of the real images sees the class asked for in "
            f"{result['samples']:.1%} of {config.judged_samples:,} samples{real}"
        )

    def finish(self, run: loop.Run) -> str:
        config = self._made.settings
        title = f"{config.name}-{config.scale}"
        figures.summary_figure(self._summary, title, read_metrics(run.workdir), self._grid)
        return f"figure: {self._summary}"
