"""Grids of images and pictures on disk."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mirai_jax.utils import files

_MARGIN = 4  # pixels of background around an image, after enlarging
_BACKGROUND = (255, 255, 255)


def sample_grid(images_BxHxWxC: np.ndarray, names: Sequence[str], side: int = 64) -> np.ndarray:
    """A row of images for each name, with the name at the left.

    Args:
        images_BxHxWxC: uint8, the images of the first name first; B is a multiple of len(names).
        side: pixels; images are enlarged by a whole factor to about this side.

    Returns:
        uint8 (height, width, 3).
    """
    rows, columns = len(names), len(images_BxHxWxC) // len(names)
    factor = max(1, side // images_BxHxWxC.shape[1])
    images = images_BxHxWxC.repeat(factor, axis=1).repeat(factor, axis=2)
    if images.shape[-1] == 1:
        images = images.repeat(3, axis=-1)
    height, width = images.shape[1] + _MARGIN, images.shape[2] + _MARGIN
    font = ImageFont.load_default(size=20)
    left = 16 + round(max(font.getlength(name) for name in names))
    picture = Image.new("RGB", (left + columns * width, _MARGIN + rows * height), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        top = _MARGIN + row * height
        middle = top + (height - _MARGIN) // 2
        draw.text((8, middle), name, fill=(0, 0, 0), font=font, anchor="lm")
        for column in range(columns):
            tile = Image.fromarray(images[row * columns + column])
            picture.paste(tile, (left + column * width, top))
    return np.asarray(picture)


def subplots(*shape: int, **options: Any) -> tuple[Any, Any]:
    """A figure of matplotlib and its axes, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(*shape, layout="constrained", **options)


def save_figure(path: pathlib.Path, figure: Any) -> None:
    """Writes a figure as a PNG, whole or not at all, and closes it."""
    from matplotlib import pyplot as plt

    with files.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def save_picture(path: pathlib.Path, picture_HxWx3: np.ndarray) -> None:
    """Writes a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as file:
        Image.fromarray(picture_HxWx3).save(file, format="PNG")
