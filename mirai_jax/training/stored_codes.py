"""Checks that stored codes are those of a run's images and tokenizer."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import numpy as np

from mirai_jax.config.schema import Settings
from mirai_jax.data import pipeline, records
from mirai_jax.data.crops import sides
from mirai_jax.models import batched
from mirai_jax.utils.errors import ConfigError, DataError
from mirai_jax.weights import pretrained

Log = Callable[[str], None]


def check_manifest(settings: Settings, manifest: Any, tokenizer_params: Any) -> None:
    """That the shards were made for this run's images and by its tokenizer."""
    wanted, stored = settings.tokenizer.image_size, manifest.crops.image_size
    if sides(stored) != settings.tokenizer.sides:
        raise ConfigError(
            f"tokenizer.image_size is {wanted}; it must be {stored}, the crops of {settings.data.path}"
        )
    theirs = manifest.tokenizer.get("checksum")
    if tokenizer_params is None or theirs is None:  # codes made elsewhere may have a name alone
        return
    if pretrained.checksum(tokenizer_params) != theirs:
        raise ConfigError(
            f"tokenizer.path is {settings.tokenizer.path!r}, not the tokenizer that made the "
            f"codes of {settings.data.path} ({manifest.tokenizer.get('file')}, checksum "
            f"{str(theirs)[:12]})"
        )


def check_crops(
    source: records.CodeRecords,
    loader: pipeline.CropLoader,
    tokenizer: nn.Module | None,
    tokenizer_params: Any,
    path: str,
    log: Log,
) -> None:
    """Rebuilds a few crops: an early error where `data.images` are not the images of the codes."""
    pixels, stored = [], []
    for i in map(int, np.unique(np.linspace(0, len(source) - 1, 4).astype(int))):
        record, crop = source[i], i % source.crops
        try:
            pixels.append(loader(record["key"], crop))
            stored.append(record["codes"][crop])
        except DataError as error:
            log(f"images: {error}")
    if not pixels:
        raise DataError(f"data.images is {path!r}; it must hold the images of the codes")
    if tokenizer is None:
        log(f"images: {len(pixels)} crops rebuilt; not compared, since tokenizer.path is unset")
        return
    codes = batched.encode_images(tokenizer, tokenizer_params, np.stack(pixels))
    share = float((codes == np.stack(stored)).mean())
    # Another chip or precision moves a few codes that were almost a tie; other images move all.
    if share < 0.5:
        raise DataError(
            f"data.images is {path!r}, but only {share:.0%} of the codes made of its crops are the "
            "stored ones: these are not the images that the codes were made of"
        )
    log(f"images: {len(pixels)} crops rebuilt, {share:.1%} of their codes are the stored ones")
