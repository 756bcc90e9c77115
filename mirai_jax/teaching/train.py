"""Trains an encoder, which then serves as `teacher.path`: `python -m mirai_jax.teach` calls `teach`.

The workdir is that of a run (see training/workdir.py), without samples, and when the run is finished
with the encoder alone in the converted folder `encoder` (see weights/pretrained.py).
"""

import collections
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from mirai_jax import sharding
from mirai_jax.config.fields import fill
from mirai_jax.data import pipeline, records, small_sets
from mirai_jax.data.small_sets import LabelledImages
from mirai_jax.teaching import figures
from mirai_jax.teaching import settings as settings_lib
from mirai_jax.teaching.settings import TeacherRunConfig, TeacherRunSettings
from mirai_jax.teaching.step import Recipe, TeachState, init_state, make_measure, make_train_step
from mirai_jax.training import local, loop
from mirai_jax.training.metrics_writer import read_metrics
from mirai_jax.training.stopwatch import progress_line
from mirai_jax.weights import frozen, pretrained

_MASKS_SEED = 0  # of the held-out images: the same masks at every step, in every run


def _build(
    settings: TeacherRunSettings, workdir: pathlib.Path, devices: list[jax.Device]
) -> local.Built:
    train, held_out = (settings.data.load(split) for split in ("train", "held_out"))
    tokenizer, tokenizer_params, tokenizer_path = None, {}, workdir / "tokenizer.npz"
    if settings.objective != "labels":
        tokenizer, tokenizer_params = frozen.make_codebook(
            settings.vocab_size, settings.network.patch, train.images, tokenizer_path
        )
    recipe = fill(Recipe, settings, num_classes=len(train.class_names), tokenizer=tokenizer)
    batches = pipeline.make_dataset(
        records.CodedImages(None, train.labels, train.images),
        batch_size=settings.batch_size,
        seed=settings.seed,
        num_workers=settings.data.num_workers,
    )
    identity = {"image_set": small_sets.checksum(train)}
    if tokenizer:
        identity["tokenizer"] = pretrained.checksum(tokenizer_params)
    images = f"{len(train.labels):,} images, {len(held_out.labels):,} more are held out"
    task = TeacherTask(settings, recipe, tokenizer_params, batches, held_out, workdir, devices)
    lines = [f"data: {settings.data.name}, {images}"]
    return local.Built(task, identity, tokenizer_params or None, lines)


def _how_to_use(workdir: pathlib.Path) -> str:
    return (
        f"its encoder: --config.teacher.name=dinov2 --config.teacher.path={workdir} "
        "--config.teacher.image_size=0"
    )


class TeacherTask(local.LocalTask):
    """An encoder, measured on the held-out images."""

    def __init__(
        self,
        config: TeacherRunSettings,
        recipe: Recipe,
        codebook: Any,
        batches: pipeline.Batches,
        held_out: LabelledImages,
        workdir: pathlib.Path,
        devices: list[jax.Device],
    ):
        super().__init__(config, batches, workdir, devices, pretrained.ENCODER)
        self._recipe, self._held_out = recipe, held_out
        self._codebook = sharding.place(codebook, self._replicated)
        self._train_step = make_train_step(recipe, self._replicated, self._split)
        self._measure = make_measure(recipe, self._replicated, self._split)

    def init(self, key: jax.Array) -> TeachState:
        return init_state(self._recipe, key)

    def size(self, shapes: TeachState) -> str:
        count = parameter_overview.count_parameters(shapes.params["network"])
        return f"{count:,} in the encoder"

    def step(self, state: TeachState, batch: Any, variant: Any) -> tuple[TeachState, dict]:
        with jax.set_mesh(self._mesh):
            return self._train_step(state, self._codebook, batch)

    def measures(self, step: int) -> bool:
        return step % self._config.evaluate_every == 0 or step == self._config.num_steps

    def measure(self, state: TeachState) -> dict[str, float]:
        """{'held_out_...': mean of `scores` over all held-out images}."""
        images, labels = self._held_out.images, self._held_out.labels
        size, total = self._config.batch_size, collections.Counter()
        for k, start in enumerate(range(0, len(labels), size)):
            rows = np.arange(start, start + size)  # the last batch is filled up, at weight 0
            batch = {
                "image": images[rows % len(labels)],
                "label": labels[rows % len(labels)],
                "weight": (rows < len(labels)).astype(np.float32),
            }
            key = jax.random.fold_in(jax.random.key(_MASKS_SEED), k)
            with jax.set_mesh(self._mesh):
                sums = self._measure(state.params, self._codebook, self.put(batch), key)
            total.update({name: float(value) for name, value in jax.device_get(sums).items()})
        return {f"held_out_{name}": value / len(labels) for name, value in total.items()}

    def line(self, step: int, values: Mapping[str, float], left: float | None) -> str:
        accuracies = _percentages(values, "")
        loss, grad = f"loss {values['loss']:.4f}", f"grad {values['grad_norm']:.2f}"
        return progress_line(step, self._config.num_steps, [loss, *accuracies, grad], values, left)

    def finish(self, run: loop.Run) -> str:
        """Writes the encoder and the figure."""
        config = self._config
        source = {
            "file": str(run.workdir),
            "entry": f"mirai_jax.teach at step {config.num_steps}",
            "image_size": str(config.data.image_size),
            "data": config.data.name,
            "held_out": str(config.data.held_out),
        }
        network = jax.device_get(run.state.params["network"])
        encoder = pretrained.Weights("teacher", config.network, network, None, source)
        pretrained.save(self._made, encoder)
        metrics = read_metrics(run.workdir)
        figures.teacher_figure(self._summary, f"{config.name}-{config.scale}", metrics)
        known = _percentages(metrics[-1] if metrics else {}, "held_out_")
        return f"{'; '.join(known)}; figure: {self._summary}\n{_how_to_use(run.workdir)}"


def _percentages(values: Mapping[str, float], prefix: str) -> list[str]:
    return [
        f"{name.replace('_', ' ')} {value:.1%}"
        for name, value in values.items()
        if name.startswith(prefix) and name.endswith("accuracy")
    ]


teach = functools.partial(
    local.run, settings_lib.read, TeacherRunConfig, pretrained.ENCODER, _how_to_use, _build
)
