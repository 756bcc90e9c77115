"""The fields of configs/tokenizer.py, read as config/schema.py reads those of a run."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from mirai_jax.config import fields, schema
from mirai_jax.config.fields import field, fill
from mirai_jax.config.schema import DTYPES, EXIF, LARGEST, SMALL_SETS, OptimizerFields, probability
from mirai_jax.models import lpips
from mirai_jax.models.discriminator import smallest_side
from mirai_jax.models.vq import GROUPS, LOOKUPS, VQConfig
from mirai_jax.tokenizing import losses
from mirai_jax.tokenizing.step import INITS, TRAINED, Recipe

STARTS = ("kmeans", "random")


@dataclasses.dataclass(frozen=True)
class NetworkFields:
    """`tokenizer.*`; see VQConfig."""

    image_size: tuple[int, int] = field((256, 256))
    multipliers: tuple[int, ...] = field((1, 1, 2, 2, 4))
    width: int = field(128, at_least=GROUPS, at_most=LARGEST)
    z_channels: int = field(256, at_least=1, at_most=LARGEST)
    vocab_size: int = field(16384, at_least=2, at_most=2**16)
    code_width: int = field(8, at_least=1, at_most=LARGEST)
    dtype: str = field("float32", choices=DTYPES)
    start: str = field("random", choices=STARTS)
    restart_after: int = field(0, at_least=0)
    free_steps: int = field(0, at_least=0)
    init: str = field("official", choices=INITS)
    lookup: str = field("straight", choices=LOOKUPS)


@dataclasses.dataclass(frozen=True)
class LossFields:
    """`loss.*`; see Recipe."""

    reconstruction: str = field("l2", choices=losses.RECONSTRUCTION)
    reconstruction_weight: float = field(1.0, at_least=0)
    perceptual_weight: float = field(0.0, at_least=0)
    perceptual_stages: tuple[int, ...] = field((1, 2, 3))
    lpips: tuple[str, ...] = field((), resumable=True)
    commit_weight: float = field(0.25, at_least=0)
    entropy_weight: float = field(0.0, at_least=0)


@dataclasses.dataclass(frozen=True)
class DiscriminatorFields:
    """`discriminator.*`; see Recipe."""

    weight: float = field(0.5, at_least=0)
    start: int = field(20_000, at_least=0)
    loss: str = field("hinge", choices=losses.ADVERSARIAL)
    adaptive: bool = field(False)
    width: int = field(64, at_least=1, at_most=LARGEST)
    num_layers: int = field(3, at_least=1, at_most=10)


@dataclasses.dataclass(frozen=True)
class ImageFields:
    """`data.*`."""

    name: str = field("images", choices=(*SMALL_SETS, "images"))
    path: str = field("", resumable=True)
    images: str = field("", resumable=True)
    held_out: int = field(500, at_least=2, at_most=50_000)
    crop_range: float = field(1.25, at_least=1, at_most=4)
    flip: bool = field(True)
    exif: str = field("ignore", choices=EXIF)
    num_workers: int = field(0, at_least=0, at_most=1024, resumable=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TopFields:
    """What TokenizerRunConfig and TokenizerRunSettings share."""

    name: str = field()
    scale: str = field()
    seed: int = field(0, at_least=0)
    num_steps: int = field(400_000, at_least=1, resumable=True)
    batch_size: int = field(128, at_least=1, at_most=2**20)
    ema_decay: float = probability(0.9999)
    log_every: int = field(100, at_least=1)  # the log shows which codes were used since the last
    measure_every: int = field(5_000, at_least=1, resumable=True)
    checkpoint_every: int = field(5_000, at_least=1, resumable=True)
    keep_checkpoints: int = field(2, at_least=1, resumable=True)
    inception: str = field("", resumable=True)
    init_from: str = field("")
    train: str = field("all", choices=TRAINED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerRunConfig(_TopFields):
    """A config of mirai_jax.tokenize as configs/tokenizer.py writes it."""

    tokenizer: NetworkFields
    loss: LossFields
    discriminator: DiscriminatorFields
    optimizer: OptimizerFields
    data: ImageFields


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerRunSettings(_TopFields):
    """A config of mirai_jax.tokenize as the modules take it."""

    recipe: Recipe
    start: str
    lpips: tuple[str, ...]
    data: ImageFields


def read(config: Mapping[str, Any], num_devices: int) -> TokenizerRunSettings:
    """Checks every field of a config and returns it typed.

    Raises:
        ConfigError: the first wrong field, in one line.
    """
    given = fields.read(TokenizerRunConfig, config)
    check = functools.partial(fields.check, given)
    allowed = f"a multiple of {num_devices}, the devices that share it"
    check("batch_size", given.batch_size % num_devices == 0, allowed)
    small, tokenizer, disc = given.data.name != "images", given.tokenizer, given.discriminator
    network = fill(VQConfig, tokenizer, channels=1 if small else 3)
    good = 2 <= len(network.multipliers) <= 8 and min(network.multipliers, default=0) > 0
    check("tokenizer.multipliers", good, "2 to 8 numbers of 1 or more, one a level")
    check("tokenizer.width", network.width % GROUPS == 0, f"a multiple of {GROUPS}")
    size, pixels = tokenizer.image_size, network.downsample
    good = min(size) > 0 and max(size) <= 4096 and not any(side % pixels for side in size)
    allowed = f"(height, width), multiples of {pixels}, the pixels that a token covers, to 4096"
    check("tokenizer.image_size", good, allowed)
    good = size[0] == size[1] or not small
    check("tokenizer.image_size", good, f"a square with data.name {given.data.name!r}")
    good = tokenizer.free_steps < given.num_steps and (
        not tokenizer.free_steps or tokenizer.restart_after
    )
    allowed = f"below num_steps={given.num_steps}, or 0 without tokenizer.restart_after"
    check("tokenizer.free_steps", good, allowed)
    stages = given.loss.perceptual_stages
    good = stages and all(1 <= stage <= 7 for stage in stages)
    check("loss.perceptual_stages", good, "stages of EfficientNet-Lite0, 1 to 7")
    good = min(size) >= lpips.SMALLEST_SIDE or not given.loss.lpips
    check("loss.lpips", good, f"() for images below {lpips.SMALLEST_SIDE} pixels")
    if disc.weight:
        allowed = f"at most num_steps={given.num_steps} (discriminator.weight=0 trains without one)"
        check("discriminator.start", disc.start <= given.num_steps, allowed)
        good = min(size) >= smallest_side(disc.num_layers)
        allowed = f"fewer for images of {min(size)} pixels: n layers need 3 * 2**n"
        check("discriminator.num_layers", good, allowed)
    good = given.train == "all" or given.init_from
    check("train", good, "all without init_from: codes and decoder are both fresh")
    check(
        "data.images",
        given.data.images or small,
        "a source of images (docs/image_sources.md lists them)",
    )
    whole = given.train == "all"
    recipe = fill(
        Recipe,
        given.loss,
        network=network,
        optimizer=schema.read_optimizer(given.optimizer, given.num_steps, check),
        image_size=size,
        dtype=tokenizer.dtype,
        ema_decay=given.ema_decay,
        trained=given.train,
        lpips=bool(given.loss.lpips),
        adversarial=disc.loss,
        discriminator_weight=disc.weight,
        discriminator_start=disc.start,
        discriminator_width=disc.width,
        discriminator_layers=disc.num_layers,
        adaptive=disc.adaptive,
        restart_after=tokenizer.restart_after if whole else 0,
        free_steps=tokenizer.free_steps if whole else 0,
        init=tokenizer.init,
        lookup=tokenizer.lookup,
        usage_window=given.log_every,
    )
    return fill(
        TokenizerRunSettings,
        given,
        recipe=recipe,
        start=tokenizer.start,
        lpips=given.loss.lpips,
    )
