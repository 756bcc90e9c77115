"""Tokenizers: images <-> codes on a grid.

Every tokenizer is a linen module with the methods and attributes of `Tokenizer`; call them with
`module.apply({'params': params}, images, method='encode')`. Images are float32 in [-1, 1].
"""

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    vocab_size: int
    downsample: int  # pixels a token covers along each side

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in tokens of an image of (height, width) in pixels."""

    def encode(self, images_BxHxWxC: jax.Array) -> jax.Array:
        """Float32 images in [-1, 1] -> int32 codes (B, L), the grid row by row."""

    def decode(self, codes_BxL: jax.Array) -> jax.Array:
        """Int codes (B, L) -> float32 images (B, H, W, C) in [-1, 1]."""


class Gridded:
    """Tokens of `downsample` pixels a side."""

    @nn.nowrap
    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in tokens; raises ValueError if tokens do not tile the image."""
        height, width = image_size
        if height % self.downsample or width % self.downsample or not height * width:
            raise ValueError(
                f"image size {height}x{width} does not divide into tokens of "
                f"{self.downsample}x{self.downsample} pixels"
            )
        return height // self.downsample, width // self.downsample


class PatchCodebook(Gridded, nn.Module):
    """Each patch of pixels becomes the nearest of `vocab_size` prototype patches.

    The tokenizer of the small data sets has one parameter, which k-means fits in seconds
    (`mirai_jax.weights.patch_codebook.fit_patch_codebook`).

    Attributes:
        image_size: (height, width) in pixels, both multiples of `patch`.
        patch: side of a patch in pixels.
    """

    vocab_size: int
    image_size: tuple[int, int]
    patch: int = 4
    channels: int = 1

    def setup(self) -> None:
        shape = (self.vocab_size, self.patch**2 * self.channels)
        self.codebook = self.param("codebook", nn.initializers.normal(1.0), shape)

    @property
    def downsample(self) -> int:
        return self.patch

    def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
        """Reconstructs images: encodes and decodes them."""
        return self.decode(self.encode(images_BxHxWxC))

    def encode(self, images_BxHxWxC: jax.Array) -> jax.Array:
        """Float32 images in [-1, 1] -> int32 codes (B, L) of the nearest prototypes.

        Takes B * L * V floats of memory at once. Raises ValueError if the images are not of
        `image_size` and `channels`.
        """
        expected = (*self.image_size, self.channels)
        if images_BxHxWxC.shape[1:] != expected:
            raise ValueError(
                f"images are {images_BxHxWxC.shape[1:]}, this codebook takes "
                f"{expected} (height, width, channels)"
            )
        patches_BxLxP = unfold(images_BxHxWxC.astype(jnp.float32), self.patch)
        # Squared distance less the norm of the patch, which is the same for every prototype.
        # Highest precision: TPUs and GPUs would round the product enough to change codes.
        product_BxLxV = jnp.matmul(patches_BxLxP, self.codebook.T, precision="highest")
        distance_BxLxV = jnp.sum(jnp.square(self.codebook), axis=1) - 2 * product_BxLxV
        return jnp.argmin(distance_BxLxV, axis=-1).astype(jnp.int32)

    def decode(self, codes_BxL: jax.Array) -> jax.Array:
        """Int codes (B, L) -> float32 images (B, H, W, C) in [-1, 1]."""
        height, width = self.grid(self.image_size)
        patches_BxLxP = jnp.take(self.codebook, codes_BxL, axis=0)
        images = patches_BxLxP.reshape(-1, height, width, self.patch, self.patch, self.channels)
        images = images.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *self.image_size, self.channels)
        return jnp.clip(images, -1, 1)


def unfold(images_BxHxWxC: np.ndarray | jax.Array, patch: int) -> np.ndarray | jax.Array:
    """Cuts images into patches: (B, H, W, C) -> (B, L, patch * patch * C), the grid row by row.

    Numpy in, numpy out; JAX in, JAX out.
    """
    batch, height, width, channels = images_BxHxWxC.shape
    patches = images_BxHxWxC.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(
        batch, (height // patch) * (width // patch), patch * patch * channels
    )


def to_unit(images: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Uint8 pixels 0 .. 255 -> float32 in [-1, 1]. Numpy in, numpy out; JAX in, JAX out.

    Only the last product rounds, so numpy and every compiler agree to the bit: `x / 127.5 - 1`
    differs under jit, where XLA multiplies by the reciprocal, and then leaves [-1, 1].
    """
    return (2 * images.astype(np.float32) - 255) * np.float32(1 / 255)


def to_uint8(images: jax.Array) -> jax.Array:
    """Float pixels in [-1, 1] -> uint8, rounded; others are clipped."""
    return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)
