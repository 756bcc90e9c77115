"""Reads configs/teacher.py: every field checked, and handed on typed, as config/schema.py does for a run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mirai_jax.config import fields, schema
from mirai_jax.data import small_sets
from mirai_jax.data.small_sets import LabelledImages
from mirai_jax.models.vit import DinoConfig
from mirai_jax.optimizer import OptimizerConfig
from mirai_jax.teaching.step import OBJECTIVES

_HEAD_WIDTH = 64  # as in every published DINOv2: a file of the encoder tells its heads by its width


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """`data.*`, and the side in pixels of its images."""

    name: str
    path: str
    held_out: int
    num_workers: int
    image_size: int

    def load(self, split: str) -> LabelledImages:
        """The images of 'train' or 'held_out'; raises DataError."""
        return small_sets.load_images(self.name, self.path, split, self.image_size, self.held_out)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run of mirai_jax.teach, typed and checked. The fields are explained in configs/teacher.py."""

    name: str
    scale: str
    seed: int
    num_steps: int
    batch_size: int
    log_every: int
    evaluate_every: int
    checkpoint_every: int
    keep_checkpoints: int
    objective: str
    label_smoothing: float
    masked_share: float
    shift: int
    flip: bool
    network: DinoConfig
    dtype: str
    vocab_size: int
    optimizer: OptimizerConfig
    data: ImageSet


def read(config: Mapping[str, Any], num_devices: int) -> Settings:
    """Checks every field of a config and returns it typed.

    Args:
        config: a ConfigDict, or the dictionary of a workdir's config.json.
        num_devices: that share a batch.

    Raises:
        ConfigError: the first wrong field, in one line.
    """
    top = fields.Section("", fields.plain(config))
    num_steps = top.number("num_steps", int, 1)
    tokenizer = top.section("tokenizer")
    image_size = tokenizer.number("image_size", int, 1, 4096)
    network = top.section("network")
    settings = Settings(
        name=top.get("name", str),
        scale=top.get("scale", str),
        seed=top.number("seed", int, 0, 2**31 - 1),
        num_steps=num_steps,
        batch_size=top.number("batch_size", int, 1, 2**20),
        log_every=top.number("log_every", int, 1),
        evaluate_every=top.number("evaluate_every", int, 1),
        checkpoint_every=top.number("checkpoint_every", int, 1),
        keep_checkpoints=top.number("keep_checkpoints", int, 1),
        objective=top.choice("objective", OBJECTIVES),
        label_smoothing=fields.probability(top, "label_smoothing"),
        masked_share=fields.probability(top, "masked_share"),
        shift=top.number("shift", int, 0, image_size),
        flip=top.get("flip", bool),
        network=_network(network, tokenizer, image_size),
        dtype=network.choice("dtype", ("float32", "bfloat16")),
        vocab_size=tokenizer.number("vocab_size", int, 2, 2**16),
        optimizer=schema.read_optimizer(top.section("optimizer"), num_steps),
        data=_data(top.section("data"), image_size),
    )
    top.refuse_unknown()
    fields.require(
        settings.batch_size % num_devices == 0,
        "batch_size",
        settings.batch_size,
        f"a multiple of {num_devices}, the devices that share it",
    )
    fields.require(
        settings.masked_share > 0 or settings.objective == "labels",
        "masked_share",
        settings.masked_share,
        f"above 0 with objective {settings.objective!r}",
    )
    return settings


def _network(section: fields.Section, tokenizer: fields.Section, image_size: int) -> DinoConfig:
    """Its patches are the tokens."""
    width = section.number("width", int, 1, 2**14)
    fields.require(
        width % _HEAD_WIDTH == 0, section.name("width"), width, f"a multiple of {_HEAD_WIDTH}"
    )
    patch = tokenizer.number("patch", int, 1)
    fields.require(
        image_size % patch == 0 and image_size > patch,
        tokenizer.name("patch"),
        patch,
        f"a part of tokenizer.image_size={image_size}",
    )
    return DinoConfig(
        width=width,
        num_layers=section.number("num_layers", int, 1, 1000),
        num_heads=width // _HEAD_WIDTH,
        pos_grid=(image_size // patch,) * 2,
        patch=patch,
    )


def _data(section: fields.Section, image_size: int) -> ImageSet:
    data = ImageSet(
        name=section.choice("name", schema.SMALL_SETS),
        path=section.get("path", str),
        held_out=section.number("held_out", int, 0),
        num_workers=section.number("num_workers", int, 0, 1024),
        image_size=image_size,
    )
    fields.require(
        data.held_out > 0 or data.name != "mnist",
        section.name("held_out"),
        data.held_out,
        "10 or more with data.name 'mnist': the encoder is measured on them",
    )
    return data
