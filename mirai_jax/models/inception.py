"""Inception-v3 as FID knows it: the TensorFlow graph of 2015-12-05, which scores 1008 classes.

It is what the ADM evaluator runs (classify_image_graph_def.pb) and what pytorch-fid and
torch-fidelity carry over to PyTorch. It differs from later versions of Inception-v3: average pools
count no padding, the last block pools by maximum, and images are resized with no half-pixel
centres. It only runs inference: each batch normalisation is folded into the convolution before it.
Modules have their names of PyTorch.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

IMAGE_SIZE = 299
SPATIAL_CHANNELS = 7  # of 192: 17 * 17 * 7 = 2023 values, about as many as are pooled
NUM_CLASSES = 1008
BATCH_NORM_EPSILON = 1e-3
# TPUs and GPUs would round products enough to move FID.
_PRECISION = jax.lax.Precision.HIGHEST


class InceptionFeatures(NamedTuple):
    """What the metrics read, float32.

    Attributes:
        pool: (B, 2048), 'pool_3' of the graph: FID, precision and recall.
        spatial: (B, 2023), the first 7 channels of 'mixed_6/conv', in the order (row, column,
            channel): sFID. It is the 1x1 branch of PyTorch's Mixed_6d after its ReLU.
        probabilities: (B, 1008), the softmax of the scores *without* their bias: Inception Score,
            whose reference code computes it so.
    """

    pool: jax.Array
    spatial: jax.Array
    probabilities: jax.Array


class InceptionV3(nn.Module):
    """The network; `weights.inception` loads its parameters (float32)."""

    @nn.compact
    def __call__(self, images_BxHxWx3: jax.Array) -> InceptionFeatures:
        """Features of uint8 RGB images (B, H, W, 3) of any size.

        Raises:
            ValueError: images of another shape or type.
        """
        if images_BxHxWx3.ndim != 4 or images_BxHxWx3.shape[-1] != 3 or 0 in images_BxHxWx3.shape:
            raise ValueError(f"images must be (B, H, W, 3), not {images_BxHxWx3.shape}")
        if images_BxHxWx3.dtype != jnp.uint8:
            raise ValueError(f"images must be uint8, not {images_BxHxWx3.dtype}")
        x = (resize(images_BxHxWx3) - 128) / 128
        x = _conv(x, "Conv2d_1a_3x3", 32, 3, 3, stride=2)
        x = _conv(x, "Conv2d_2a_3x3", 32, 3, 3, crop=1)
        x = _max_pool(_conv(x, "Conv2d_2b_3x3", 64, 3, 3), stride=2)
        x = _conv(x, "Conv2d_3b_1x1", 80)
        x = _max_pool(_conv(x, "Conv2d_4a_3x3", 192, 3, 3, crop=1), stride=2)
        for name, channels in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = _Block(functools.partial(_block_a, channels), name=name)(x)
        x = _Block(_block_b, name="Mixed_6a")(x)
        for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160)):
            x = _Block(functools.partial(_block_c, inner), name=name)(x)
        spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        x = _Block(functools.partial(_block_c, 192), name="Mixed_6e")(x)
        x = _Block(_block_d, name="Mixed_7a")(x)
        x = _Block(functools.partial(_block_e, _average_pool), name="Mixed_7b")(x)
        x = _Block(functools.partial(_block_e, _max_pool), name="Mixed_7c")(x)
        pool = x.mean(axis=(1, 2))
        scores = nn.Dense(NUM_CLASSES, use_bias=False, precision=_PRECISION, name="fc")(pool)
        return InceptionFeatures(pool, spatial, nn.softmax(scores))


def resize(images_BxHxWxC: jax.Array) -> jax.Array:
    """Images of any size and type -> float32 (B, 299, 299, C), by the bilinear resizing of TensorFlow 1.

    Pixel i of the output lies at i * size / 299 of the input; there is no antialiasing.
    """
    _, height, width, _ = images_BxHxWxC.shape
    x = images_BxHxWxC.astype(jnp.float32)
    x = jnp.einsum("xw,bhwc->bhxc", _interpolation(width), x, precision=_PRECISION)
    return jnp.einsum("yh,bhxc->byxc", _interpolation(height), x, precision=_PRECISION)


def _interpolation(size: int) -> np.ndarray:
    """(299, size): row i holds the weights of the input's pixels for pixel i of the output."""
    rows = np.arange(IMAGE_SIZE)
    # In float32, as TensorFlow computes it: the rounding of `source` moves the weights a little.
    source = rows.astype(np.float32) * (np.float32(size) / np.float32(IMAGE_SIZE))
    low = source.astype(np.int64)
    weights = np.zeros((IMAGE_SIZE, size), np.float32)
    weights[rows, low] = 1 - (source - low)
    weights[rows, np.minimum(low + 1, size - 1)] += source - low  # past the last pixel: the last
    return weights


def _conv(
    x: jax.Array,
    name: str,
    channels: int,
    height: int = 1,
    width: int = 1,
    *,
    stride: int = 1,
    crop: int = 0,
) -> jax.Array:
    """Inside a compact method: a convolution and a ReLU; with a stride there is no padding.

    `crop` drops the padding's share: on a CPU XLA's unpadded convolution takes two to four times as long.
    """
    kernel, padding = (height, width), "VALID" if stride > 1 else "SAME"
    conv = nn.Conv(channels, kernel, stride, padding, precision=_PRECISION, name=name)
    x = conv(x)
    return nn.relu(x[:, crop : x.shape[1] - crop, crop : x.shape[2] - crop])


def _chain(x: jax.Array, name: str, *layers: tuple[int, int, int], stride: int = 1) -> jax.Array:
    """Convolutions `name`_1, `name`_2, ... of (channels, height, width); the last has the stride."""
    for i, layer in enumerate(layers, start=1):
        x = _conv(x, f"{name}_{i}", *layer, stride=stride if i == len(layers) else 1)
    return x


def _average_pool(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _max_pool(x: jax.Array, stride: int = 1) -> jax.Array:
    return nn.max_pool(x, (3, 3), (stride, stride), "SAME" if stride == 1 else "VALID")


class _Block(nn.Module):
    """Branches over one input, joined along the channels."""

    branches: Callable[[jax.Array], list[jax.Array]]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate(self.branches(x), axis=-1)


def _block_a(pool_channels: int, x: jax.Array) -> list[jax.Array]:
    """(B, 35, 35, C) -> (B, 35, 35, 224 + pool_channels)."""
    return [
        _conv(x, "branch1x1", 64),
        _chain(x, "branch5x5", (48, 1, 1), (64, 5, 5)),
        _chain(x, "branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
        _conv(_average_pool(x), "branch_pool", pool_channels),
    ]


def _block_b(x: jax.Array) -> list[jax.Array]:
    """(B, 35, 35, 288) -> (B, 17, 17, 768)."""
    return [
        _conv(x, "branch3x3", 384, 3, 3, stride=2),
        _chain(x, "branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3), stride=2),
        _max_pool(x, stride=2),
    ]


def _block_c(n: int, x: jax.Array) -> list[jax.Array]:
    """(B, 17, 17, 768) -> (B, 17, 17, 768); the first 192 channels are the 1x1 branch."""
    return [
        _conv(x, "branch1x1", 192),
        _chain(x, "branch7x7", (n, 1, 1), (n, 1, 7), (192, 7, 1)),
        _chain(x, "branch7x7dbl", (n, 1, 1), (n, 7, 1), (n, 1, 7), (n, 7, 1), (192, 1, 7)),
        _conv(_average_pool(x), "branch_pool", 192),
    ]


def _block_d(x: jax.Array) -> list[jax.Array]:
    """(B, 17, 17, 768) -> (B, 8, 8, 1280)."""
    return [
        _chain(x, "branch3x3", (192, 1, 1), (320, 3, 3), stride=2),
        _chain(x, "branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), stride=2),
        _max_pool(x, stride=2),
    ]


def _block_e(pool: Callable[[jax.Array], jax.Array], x: jax.Array) -> list[jax.Array]:
    """(B, 8, 8, C) -> (B, 8, 8, 2048)."""
    y = _conv(x, "branch3x3_1", 384)
    z = _chain(x, "branch3x3dbl", (448, 1, 1), (384, 3, 3))
    return [
        _conv(x, "branch1x1", 320),
        _conv(y, "branch3x3_2a", 384, 1, 3),
        _conv(y, "branch3x3_2b", 384, 3, 1),
        _conv(z, "branch3x3dbl_3a", 384, 1, 3),
        _conv(z, "branch3x3dbl_3b", 384, 3, 1),
        _conv(pool(x), "branch_pool", 192),
    ]
