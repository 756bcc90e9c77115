"""What follows from a folder of images and its tokenizer, where a config leaves it open."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from mirai_jax.config import fields
from mirai_jax.config.fields import require
from mirai_jax.config.schema import RunConfig
from mirai_jax.data import folder_sets, manifest
from mirai_jax.data.images import open_images
from mirai_jax.utils.trees import plain
from mirai_jax.weights import frozen

IN_MEMORY = 2 * 2**30  # bytes of crops that a run holds


def resolve(config: Mapping[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """The config with numbers in place of what it leaves to its images.

    `model.num_classes` 0 becomes the number of classes of `data.images` (or of the stored codes), and
    `model.grid` (0, 0) the grid of `tokenizer.image_size`. A folder that does not fit in memory, or of
    which random crops are asked for, is read from disk: `data.name` becomes 'images' and `data.codes`
    'online'. `log` takes a line for what is not as the config says.

    Raises:
        ConfigError, DataError: a wrong field, or no such images.
    """
    given = fields.read(RunConfig, config)
    config, data = plain(config), given.data
    sides, pixels = given.tokenizer.sides, given.tokenizer.downsample
    if (data.name, data.codes) == ("images", "stored"):
        found = manifest.read(data.path) if data.path and not given.model.num_classes else None
        if found is not None:
            config["model"]["num_classes"] = len(found.class_names)
    elif data.name == "folder" or (data.images and not given.model.num_classes):
        require(data.images, "data.images", data.images, "a folder with a folder of images a class")
        source = open_images(data.images)
        share = folder_sets.whole(source, data.min_images, data.balanced)
        if missing := sorted(set(source.class_names) - set(share.class_names)):
            log(f"left out, with fewer than {data.min_images} images: {', '.join(missing)}")
        if not given.model.num_classes:
            config["model"]["num_classes"] = len(share.class_names)
        size = len(share) * _crops(data) * 3 * math.prod(sides)
        if data.name == "folder" and (data.crops == "random" or size > IN_MEMORY):
            config["data"].update(name="images", codes="online")
            log(f"{len(share):,} images are read from disk, and their codes made as they are drawn")
    if given.model.grid == (0, 0):
        if not pixels:
            module, _ = frozen.load_vq_file("tokenizer.path", given.tokenizer.path)
            pixels = module.downsample
        good = not any(side % pixels for side in sides) and min(sides) > 0
        allowed = f"multiples of {pixels}, the pixels that a token covers"
        require(good, "tokenizer.image_size", given.tokenizer.image_size, allowed)
        config["model"]["grid"] = tuple(side // pixels for side in sides)
    return config


def _crops(data: Any) -> int:
    """How many crops of an image there are in memory."""
    return (5 if data.crops == "stored" else 1) * (2 if data.flip else 1)
