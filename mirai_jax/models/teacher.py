"""Bidirectional teachers: frozen encoders of the whole image, for Mirai-I.

The interface is a linen module with

    feature_width: int                    the width Z of what it returns
    __call__(images_BxHxWxC uint8) -> (B, L, Z) float32

where L is the token grid, row by row: position n describes the pixels of token n. The features of an
encoder with another grid are resampled to the token grid.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mirai_jax.models import vit
from mirai_jax.models.efficientnet import STAGE_CHANNELS, EfficientNetLite0

# "dinov2" may have any size, which its weights determine; the others are the published encoders.
TEACHERS = ("efficientnet_lite0", "dinov2", *vit.NAMES)


def resample(features_BxhxwxZ: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """A feature map on the token grid, flattened: (B, L, Z). Linear; averages when it shrinks."""
    batch, _, _, width = features_BxhxwxZ.shape
    out = jax.image.resize(features_BxhxwxZ, (batch, *grid, width), "linear", antialias=True)
    return out.reshape(batch, grid[0] * grid[1], width)


class EfficientNetTeacher(nn.Module):
    """A stage of EfficientNet-Lite0 (a supervised ImageNet classifier).

    Attributes:
        grid: (height, width) of the token grid.
        image_size: pixels a side of the input of the network; images are resized linearly.
        stage: 1 to 7, the stage that gives the features.
        dtype: of the convolutions.
    """

    grid: tuple[int, int]
    image_size: int = 64
    stage: int = 5
    dtype: str = "float32"

    @property
    def feature_width(self) -> int:
        return STAGE_CHANNELS[self.stage - 1]

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
        batch, _, _, channels = images_BxHxWxC.shape
        shape = (batch, self.image_size, self.image_size, channels)
        images = jax.image.resize(images_BxHxWxC.astype(jnp.float32) / 255, shape, "linear")
        if channels == 1:
            images = jnp.repeat(images, 3, axis=-1)
        network = EfficientNetLite0(dtype=self.dtype, name="network")
        return resample(network(images, stage=self.stage).astype(jnp.float32), self.grid)


def prepare_images(images_BxHxWxC: jax.Array, size: tuple[int, int]) -> jax.Array:
    """uint8 images -> the input of DINOv2, (B, *size, 3) float32; grey images become RGB."""
    if images_BxHxWxC.shape[-1] == 1:
        images_BxHxWxC = jnp.repeat(images_BxHxWxC, 3, axis=-1)
    return vit.preprocess(images_BxHxWxC, size)


class DinoTeacher(nn.Module):
    """Normalised patch features of DINOv2 (trained without labels), the teacher of Mirai-I.

    Attributes:
        grid: (height, width) of the token grid.
        config: of the network.
        image_size: pixels of the longer side of the input of the network, a multiple of the patch;
            the other side follows the token grid. 0 gives every token one patch.
        layer: the block, from 1, that gives the features; 0 for the last.
        dtype: of the matrix products.
        attention: the kernel, of attention.KERNELS.
    """

    grid: tuple[int, int]
    config: vit.DinoConfig
    image_size: int = 0
    layer: int = 0
    dtype: str = "float32"
    attention: str = "auto"

    @property
    def feature_width(self) -> int:
        return self.config.width

    @property
    def patches(self) -> tuple[int, int]:
        """(height, width) of the grid of patches; ValueError if they do not tile `image_size`."""
        if not self.image_size:
            return self.grid
        longer, rest = divmod(self.image_size, self.config.patch)
        if rest or longer < 1:
            raise ValueError(f"image_size is {self.image_size}, no multiple of {self.config.patch}")
        height, width = (max(1, round(longer * side / max(self.grid))) for side in self.grid)
        return height, width

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
        """uint8 images -> (B, L, Z) float32; see `prepare_images`."""
        height, width = (side * self.config.patch for side in self.patches)
        images = prepare_images(images_BxHxWxC, (height, width))
        network = vit.DinoV2(self.config, self.dtype, self.attention, name="network")
        # As the official run, which allows TF32: a TPU's default for float32 is one bfloat16 pass.
        with jax.default_matmul_precision("tensorfloat32"):
            features = network(images, self.layer)[0]
        return resample(features, self.grid)
