"""The fields of configs/teacher.py, read as config/schema.py reads those of a run."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from mirai_jax.config import fields, schema
from mirai_jax.config.fields import field, fill
from mirai_jax.config.schema import DTYPES, LARGEST, SMALL_SETS, OptimizerFields, probability
from mirai_jax.data import small_sets
from mirai_jax.data.small_sets import LabelledImages
from mirai_jax.models.vit import VitConfig
from mirai_jax.optimizer import OptimizerConfig
from mirai_jax.teaching.step import OBJECTIVES

_HEAD_WIDTH = 64  # as in every published DINOv2: a file of the encoder has no number of heads


@dataclasses.dataclass(frozen=True)
class NetworkFields:
    """`network.*`; see VitConfig."""

    width: int = field(128, at_least=1, at_most=LARGEST)
    num_layers: int = field(4, at_least=1, at_most=1000)
    dtype: str = field("float32", choices=DTYPES)


@dataclasses.dataclass(frozen=True)
class ImageFields:
    """`data.*`."""

    name: str = field("mnist", choices=SMALL_SETS)
    path: str = field("", resumable=True)
    held_out: int = field(500, at_least=0)
    num_workers: int = field(0, at_least=0, at_most=1024, resumable=True)


@dataclasses.dataclass(frozen=True)
class TokenizerFields:
    """`tokenizer.*`; the encoder has the same patches."""

    image_size: int = field(32, at_least=1, at_most=4096)
    patch: int = field(4, at_least=1)
    vocab_size: int = field(128, at_least=2, at_most=2**16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TopFields:
    """What TeacherRunConfig and TeacherRunSettings share."""

    name: str = field()
    scale: str = field()
    seed: int = field(0, at_least=0)
    num_steps: int = field(1_400, at_least=1, resumable=True)
    batch_size: int = field(64, at_least=1, at_most=2**20)
    log_every: int = field(25, at_least=1, resumable=True)
    evaluate_every: int = field(350, at_least=1, resumable=True)
    checkpoint_every: int = field(350, at_least=1, resumable=True)
    keep_checkpoints: int = field(2, at_least=1, resumable=True)
    objective: str = field("labels", choices=OBJECTIVES)
    label_smoothing: float = probability(0.1)
    masked_share: float = probability(0.4)
    shift: int = field(2, at_least=0)
    flip: bool = field(False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherRunConfig(_TopFields):
    """A config of mirai_jax.teach as configs/teacher.py writes it."""

    network: NetworkFields
    optimizer: OptimizerFields
    data: ImageFields
    tokenizer: TokenizerFields


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSet(ImageFields):
    """`data.*`, and the side in pixels of its images."""

    image_size: int

    def load(self, split: str) -> LabelledImages:
        """The images of 'train' or 'held_out'; raises DataError."""
        return small_sets.load_images(self.name, self.path, split, self.image_size, self.held_out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherRunSettings(_TopFields):
    """A config of mirai_jax.teach as the modules take it."""

    network: VitConfig
    dtype: str
    vocab_size: int
    optimizer: OptimizerConfig
    data: ImageSet


def read(config: Mapping[str, Any], num_devices: int) -> TeacherRunSettings:
    """Checks every field of a config and returns it typed.

    Raises:
        ConfigError: the first wrong field, in one line.
    """
    given = fields.read(TeacherRunConfig, config)
    check = functools.partial(fields.check, given)
    size, patch, width = given.tokenizer.image_size, given.tokenizer.patch, given.network.width
    allowed = f"a multiple of {num_devices}, the devices that share it"
    check("batch_size", given.batch_size % num_devices == 0, allowed)
    good = given.masked_share > 0 or given.objective == "labels"
    check("masked_share", good, f"above 0 with objective {given.objective!r}")
    check("shift", given.shift <= size, f"at most tokenizer.image_size={size}")
    check("network.width", width % _HEAD_WIDTH == 0, f"a multiple of {_HEAD_WIDTH}")
    good = size % patch == 0 and size > patch
    check("tokenizer.patch", good, f"a part of tokenizer.image_size={size}")
    good = given.data.held_out > 0 or given.data.name != "mnist"
    check("data.held_out", good, "10 or more with data.name 'mnist', to evaluate the encoder on")
    network = fill(
        VitConfig,
        given.network,
        num_heads=width // _HEAD_WIDTH,
        pos_grid=(size // patch,) * 2,
        patch=patch,
    )
    return fill(
        TeacherRunSettings,
        given,
        network=network,
        dtype=given.network.dtype,
        vocab_size=given.tokenizer.vocab_size,
        optimizer=schema.read_optimizer(given.optimizer, given.num_steps, check),
        data=fill(ImageSet, given.data, image_size=size),
    )
