"""Bidirectional teachers: frozen encoders of the whole image, for Mirai-I.

The interface is a linen module with

    feature_width: int                    the width Z of what it returns
    __call__(images_BxHxWxC uint8) -> (B, L, Z) float32

where L is the token grid, row by row: position n describes the pixels of token n. The features of an
encoder with another grid are resampled to the token grid. An encoder of yours: `OwnTeacher`.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mirai_jax.models import vit
from mirai_jax.models.efficientnet import STAGE_CHANNELS, EfficientNetLite0
from mirai_jax.models.preprocessing import preprocess
from mirai_jax.models.vit_sizes import PUBLISHED

# Networks of any size, which their weights determine.
FAMILIES = ("dinov2", "dinov3", "mae")
TEACHERS = ("efficientnet_lite0", *FAMILIES, *PUBLISHED)


def resample(features_BxhxwxZ: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """A feature map on the token grid, flattened: (B, L, Z). Linear; averages when it shrinks."""
    batch, _, _, width = features_BxhxwxZ.shape
    out = jax.image.resize(features_BxhxwxZ, (batch, *grid, width), "linear", antialias=True)
    return out.reshape(batch, grid[0] * grid[1], width)


def spatial_zscore(features_BxhxwxZ: jax.Array, alpha: float) -> jax.Array:
    """Each channel of each image, normalised over the map (iREPA and GEAR); alpha 0: as it is.

    (x - alpha mean) / (deviation + 1e-6), where the deviation has N - 1 in its denominator: alpha below 1
    leaves a part of what all places share.
    """
    if not alpha:
        return features_BxhxwxZ
    mean = features_BxhxwxZ.mean(axis=(1, 2), keepdims=True)
    deviation = features_BxhxwxZ.std(axis=(1, 2), keepdims=True, ddof=1)
    return (features_BxhxwxZ - alpha * mean) / (deviation + 1e-6)


def precision(dtype: str, platform: str) -> str:
    """The dtype that a teacher computes in: 'auto' is bfloat16 on TPUs, where float32 takes three passes
    of the matrix unit, and float32 elsewhere."""
    return dtype if dtype != "auto" else "bfloat16" if platform == "tpu" else "float32"


def with_precision(dtype: str, run: Callable[..., jax.Array], *arguments: Any) -> jax.Array:
    """`run(dtype, *arguments)`, where 'auto' is what `precision` makes of it."""
    if dtype != "auto":
        return run(dtype, *arguments)
    on = lambda platform: functools.partial(run, precision(dtype, platform))
    return jax.lax.platform_dependent(*arguments, tpu=on("tpu"), default=on(""))


def _apply(
    teacher: nn.Module,
    network: nn.Module,
    run: Callable[[nn.Module, jax.Array], jax.Array],
    images: jax.Array,
) -> jax.Array:
    """`run(network, images)` in the teacher's dtype."""
    if teacher.dtype != "auto" or teacher.is_initializing():
        return run(network, images)
    params = {"params": teacher.variables["params"][network.name]}

    def apply(dtype: str, images: jax.Array) -> jax.Array:
        module = network.clone(parent=None, name=None, dtype=dtype)
        return module.apply(params, images, method=run)

    return with_precision(teacher.dtype, apply, images)


class EfficientNetTeacher(nn.Module):
    """A stage of EfficientNet-Lite0 (a supervised ImageNet classifier).

    Attributes:
        grid: (height, width) of the token grid.
        image_size: pixels of the longer side of the input of the network; images are resized
            linearly. Where the grid is not square, the other side follows it, and both are multiples of
            32, which every stage divides.
        stage: 1 to 7, the stage that gives the features.
        dtype: of the convolutions, see `precision`.
        zscore: see `spatial_zscore`.
    """

    grid: tuple[int, int]
    image_size: int = 64
    stage: int = 5
    dtype: str = "float32"
    zscore: float = 0.0

    @property
    def feature_width(self) -> int:
        return STAGE_CHANNELS[self.stage - 1]

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width) of the input of the network."""
        if self.grid[0] == self.grid[1]:
            return self.image_size, self.image_size
        unit = self.image_size / max(self.grid) / 32
        height, width = (32 * max(1, round(tokens * unit)) for tokens in self.grid)
        return height, width

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
        batch, _, _, channels = images_BxHxWxC.shape
        shape = (batch, *self.sides, channels)
        images = jax.image.resize(images_BxHxWxC.astype(jnp.float32) / 255, shape, "linear")
        images = _rgb(images)
        network = EfficientNetLite0(dtype=precision(self.dtype, ""), name="network")
        run = lambda network, images: network(images, stage=self.stage).astype(jnp.float32)
        features = _apply(self, network, run, images)
        return resample(spatial_zscore(features, self.zscore), self.grid)


def _rgb(images_BxHxWxC: jax.Array) -> jax.Array:
    return jnp.broadcast_to(images_BxHxWxC, (*images_BxHxWxC.shape[:3], 3))


def prepare_images(images_BxHxWxC: jax.Array, size: tuple[int, int]) -> jax.Array:
    """uint8 images -> the input of a vision transformer, (B, *size, 3) float32; grey images become RGB."""
    return preprocess(_rgb(images_BxHxWxC), size)


def blocks_of_patches(
    tokens: tuple[int, int], patches: tuple[int, int], block: int
) -> tuple[int, ...]:
    """Of each patch, row by row, the number of the block of `block` tokens that its centre lies in.

    A centre on the border of two tokens belongs to the later one. () where one block holds all tokens:
    nothing is hidden.
    """
    (height, width), (rows, columns) = tokens, patches
    if not 0 < block < height * width:
        return ()
    return tuple(
        ((2 * row + 1) * height // (2 * rows) * width + (2 * column + 1) * width // (2 * columns))
        // block
        for row in range(rows)
        for column in range(columns)
    )


class VitTeacher(nn.Module):
    """Patch features of a vision transformer: DINOv2 is the teacher of Mirai-I.

    With `block` it is the paper's block-causal encoder: the tokens of the raster are cut into blocks of
    that size, and a patch attends to patches of the same and of earlier blocks only (`vit.attended`).
    Where images are resized or features resampled, a token also has a share of its neighbours.

    Attributes:
        grid: (height, width) of the token grid.
        config: of the network.
        image_size: pixels of the longer side of the input of the network, a multiple of the patch;
            the other side follows the token grid. 0 gives every token one patch.
        layer: the block, from 1, that gives the features; 0 for the last.
        norm: whether they go through the network's final norm.
        last: the features are the mean over this number of blocks up to `layer`.
        block: tokens of a block; 0: every patch attends to every other.
        zscore: see `spatial_zscore`.
        dtype: of the matrix products, see `precision`.
        attention: the kernel, of attention.KERNELS.
    """

    grid: tuple[int, int]
    config: vit.VitConfig
    image_size: int = 0
    layer: int = 0
    norm: bool = True
    last: int = 1
    block: int = 0
    zscore: float = 0.0
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
        network = vit.VisionTransformer(
            self.config, precision(self.dtype, ""), self.attention, name="network"
        )
        order = blocks_of_patches(self.grid, self.patches, self.block)
        # As the official run, which allows TF32: a TPU's default for float32 is one bfloat16 pass.
        with jax.default_matmul_precision("tensorfloat32"):
            run = lambda network, images: network(
                images, self.layer, norm=self.norm, last=self.last, order=order
            )[0]
            features = _apply(self, network, run, images)
        return resample(spatial_zscore(features, self.zscore), self.grid)


class OwnTeacher(nn.Module):
    """An encoder of yours: `teacher.name='MODULE:CLASS'`, where `import MODULE` finds CLASS.

    CLASS has one function, `load(path: str) -> (module, params)`, which may be static. `path` is
    `teacher.path`, which may be ''. `params` is a nested dictionary of arrays: their checksum is part of
    the run's identity, so that it resumes with the same ones only. `module` is a linen module that hashes
    (its fields do), with

        feature_width: int                                       the width Z of its features
        __call__(images_BxHxWx3 float32 in [0, 1]) -> (B, h, w, Z)

    Images are RGB and have the size of the tokenizer's. The features lie on any grid that divides the image
    evenly; they are resampled to the token grid. docs/own_encoder.py is an example.

    Attributes:
        grid: (height, width) of the token grid.
        network: that module; the parameters have its under the name `network`.
        zscore: see `spatial_zscore`.
    """

    grid: tuple[int, int]
    network: nn.Module
    zscore: float = 0.0

    @property
    def feature_width(self) -> int:
        return self.network.feature_width

    def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
        """uint8 images -> (B, L, Z) float32."""
        images = _rgb(images_BxHxWxC).astype(jnp.float32) / 255
        with jax.default_matmul_precision("tensorfloat32"):  # as in VitTeacher
            features = self.network(images).astype(jnp.float32)
        return resample(spatial_zscore(features, self.zscore), self.grid)
