"""What sampling keeps of an image: its tokens off a mask, or its first rows."""

import numpy as np
from PIL import Image

from mirai_jax.data import crops
from mirai_jax.models import batched
from mirai_jax.models.tokenizer import unfold
from mirai_jax.sampling.painter import Given, Source
from mirai_jax.utils import paths
from mirai_jax.utils.errors import ConfigError, DataError, first_line


def inpaint(source: Source, image_path: str, mask_path: str) -> Given:
    """Keeps the tokens of an image in which the mask has no white pixel; the others are drawn.

    The middle of both files is taken, as large as the shape of the generator's images allows.

    Raises:
        ConfigError: a file cannot be read, or the mask has another size than the image.
    """
    image, mask = _open("--inpaint", image_path), _open("--mask", mask_path)
    if mask.size != image.size:
        found, wanted = ("x".join(map(str, each.size)) for each in (mask, image))
        raise ConfigError(f"--mask is {mask_path!r}, {found} pixels; it must be {wanted}")
    white = crops.center_crop(mask, _pixels(source)).max(axis=-1, keepdims=True) > 127
    drawn_L = unfold(white[None], source.tokenizer.downsample)[0].any(axis=-1)
    return _given(source, image, drawn_L)


def continue_from(source: Source, image_path: str, rows: int) -> Given:
    """Keeps the tokens of the first `rows` rows of an image, which is cut as `inpaint` does.

    Raises:
        ConfigError: the file cannot be read, or the grid has no more rows.
    """
    height, width = source.config.grid
    if not 0 < rows < height:
        raise ConfigError(f"--rows is {rows}; it must be 1 to {height - 1} of the grid's {height}")
    drawn_L = np.arange(height * width) >= rows * width
    return _given(source, _open("--continue_from", image_path), drawn_L)


def _open(flag: str, path: str) -> Image.Image:
    try:
        return crops.decode(paths.at(path).read_bytes(), exif="apply")[0]
    except (OSError, DataError) as error:
        raise ConfigError(f"{flag} is {path!r}: {first_line(error)}") from error


def _pixels(source: Source) -> tuple[int, int]:
    return tuple(tokens * source.tokenizer.downsample for tokens in source.config.grid)


def _given(source: Source, image: Image.Image, drawn_L: np.ndarray) -> Given:
    module = source.tokenizer
    channels = getattr(module, "config", module).channels
    pixels = crops.center_crop(image, _pixels(source))
    shown = np.asarray(Image.fromarray(pixels).convert("L"))[..., None] if channels == 1 else pixels
    codes_L = batched.encode_images(module, source.tokenizer_params, shown[None])[0]
    drawn = drawn_L.reshape(source.config.grid).repeat(module.downsample, 0)
    hidden = np.where(drawn.repeat(module.downsample, 1)[..., None], np.uint8(128), pixels)
    return Given(np.where(drawn_L, -1, codes_L).astype(np.int32), np.stack([pixels, hidden]))
