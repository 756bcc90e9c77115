"""What a vision transformer is shown: images normalised and resized, and positions for their grid.

Shape letters: B batch, H and W pixels, C channels, h and w patches, T tokens, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np

_MEAN, _STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])  # ImageNet's


def check_images(images_BxHxWx3: jax.Array) -> None:
    """Raises ValueError unless these are float RGB images."""
    if images_BxHxWx3.ndim != 4 or images_BxHxWx3.shape[-1] != 3:
        raise ValueError(f"images must be (B, H, W, 3), not {images_BxHxWx3.shape}")
    if not jnp.issubdtype(images_BxHxWx3.dtype, jnp.floating):
        raise ValueError(f"images must be floats, not {images_BxHxWx3.dtype}")


def resample_positions(
    positions_1xTxD: jax.Array, old: tuple[int, int], new: tuple[int, int]
) -> jax.Array:
    """A position embedding (1, 1 + h * w, D), resampled to another grid of patches.

    Bicubic with antialiasing (a = -0.5), as timm's `resample_abs_pos_embed`, which the official
    Mirai-I calls (and REPA for MAE), and unlike the official DINOv2 and MAE. The entry of the class
    token stays.
    """
    if old == new:
        return positions_1xTxD
    width = positions_1xTxD.shape[-1]
    grid = positions_1xTxD[:, 1:].reshape(1, *old, width)
    grid = jax.image.resize(grid, (1, *new, width), "cubic", antialias=True)
    return jnp.concatenate([positions_1xTxD[:, :1], grid.reshape(1, -1, width)], axis=1)


def _bicubic_weights(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) of one axis of `resize_bicubic`, float32."""
    a = -0.75
    # Positions are rounded to float32, as in torch: at 256 pixels that moves values by 1e-4.
    where = np.float64(np.float32(old / new)) * (np.arange(new) + 0.5) - 0.5
    where = where.astype(np.float32).astype(np.float64)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        source = np.floor(where) + tap
        x = np.abs(where - source)
        near = ((a + 2) * x - (a + 3)) * x**2 + 1
        far = a * (((x - 5) * x + 8) * x - 4)
        weight = np.where(x <= 1, near, far)
        np.add.at(weights, (np.arange(new), np.clip(source, 0, old - 1).astype(int)), weight)
    return weights.astype(np.float32)


def resize_bicubic(images_BxHxWxC: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Float images at another (height, width): torch's bicubic interpolation (a = -0.75).

    Pixel centres lie at half a pixel, edges repeat, and there is no antialiasing
    (`align_corners=False, antialias=False`); `jax.image.resize` has another kernel. Images of that
    size already are returned as they are.
    """
    if images_BxHxWxC.shape[1:3] == tuple(size):
        return images_BxHxWxC
    rows, columns = map(_bicubic_weights, images_BxHxWxC.shape[1:3], size)
    highest = jax.lax.Precision.HIGHEST
    # Columns and channels are one axis: with two, untuned Triton products of XLA on GPUs find no tiles
    # of 224 by 256 pixels and fail to compile.
    batch, height, width, channels = images_BxHxWxC.shape
    images = images_BxHxWxC.reshape(batch, height, width * channels)
    images = jnp.einsum("hH,bHx->bhx", rows, images, precision=highest)
    images = images.reshape(batch, size[0], width, channels)
    return jnp.einsum("wW,bhWc->bhwc", columns, images, precision=highest)


def preprocess(images_BxHxWx3: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The input of an encoder in Mirai-I: images normalised, then resized.

    Mirai-I resizes DINOv2's images from 256 to 224 pixels. REPA's code for MAE and GEAR's for DINOv3
    resize nothing: their patches of 16 pixels are one a token at the images' own size.

    Args:
        images_BxHxWx3: uint8, or floats in [0, 1]; RGB.
        size: (height, width) of the result in pixels.

    Returns:
        (B, *size, 3) float32, of mean 0 and deviation 1 over ImageNet.

    Raises:
        ValueError: images of another shape or type.
    """
    if images_BxHxWx3.dtype == jnp.uint8:
        images_BxHxWx3 = images_BxHxWx3.astype(jnp.float32) / 255
    check_images(images_BxHxWx3)
    return resize_bicubic((images_BxHxWx3.astype(jnp.float32) - _MEAN) / _STD, size)
