"""LlamaGen's convolutional tokenizer: VQ-16 and VQ-8, images <-> codes of a learned codebook.

A residual convolutional encoder, a lookup of the nearest codebook row on the unit sphere, and a
mirrored decoder (official file: tokenizer/tokenizer_image/vq_model.py). What training needs beside
the network is in room tokenizing.
Parameters are named as in PyTorch, `conv_blocks.0` being `conv_blocks_0`; the decoder's
`conv_blocks_0` is its deepest level. Images are (B, H, W, channels), float32 in [-1, 1].
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mirai_jax.models.tokenizer import Gridded

# name -> channel multipliers, finest level first; each level but the last halves the resolution.
MULTIPLIERS: Mapping[str, tuple[int, ...]] = {"vq16": (1, 1, 2, 2, 4), "vq8": (1, 2, 2, 4)}

GROUPS = 32  # of group normalisation
LOOKUPS = ("straight", "distance")
# Codebook rows compared at a time: distances to all 16,384 would outgrow the activations.
_ROWS_AT_ONCE = 2048


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """The shapes of the tokenizer; the defaults are those of the published VQ-16.

    Attributes:
        multipliers: channels of each level, finest first, in units of `width`.
        width: channels of the finest level, a multiple of 32 (group normalisation).
        z_channels: width of the encoder's output and of the decoder's input.
        vocab_size: rows of the codebook V.
        code_width: length of a row.
    """

    multipliers: tuple[int, ...] = MULTIPLIERS["vq16"]
    width: int = 128
    z_channels: int = 256
    vocab_size: int = 16384
    code_width: int = 8
    channels: int = 3

    @property
    def downsample(self) -> int:
        """Pixels a token covers along each side."""
        return 2 ** (len(self.multipliers) - 1)


class Autoencoded(NamedTuple):
    """Images through the whole tokenizer, with gradients; all float32 except the codes."""

    images: jax.Array  # (B, H, W, C), not clipped
    latents: jax.Array  # (B, h, w, code_width), of unit norm
    rows: jax.Array  # (B, h, w, code_width), the nearest codebook rows, of unit norm
    codes: jax.Array  # int32 (B, h, w)


def config_of(state: Mapping[str, Any]) -> VQConfig:
    """The config of a PyTorch state dict, from its shapes.

    Raises:
        ValueError: not the state dict of such a tokenizer.
    """

    def shape(name: str, rank: int, unit: int = 1) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"not a VQ tokenizer: it has no {name}")
        found = tuple(state[name].shape)
        if len(found) != rank or 0 in found or found[0] % unit:
            raise ValueError(f"not a VQ tokenizer: {name} is {found}, not of {rank} axes")
        return found

    width, channels = shape("encoder.conv_in.weight", 4, GROUPS)[:2]
    vocab_size, code_width = shape("quantize.embedding.weight", 2)
    z_channels = shape("encoder.conv_out.weight", 4)[0]
    level = "encoder.conv_blocks.{}.res.0.conv1.weight"
    multipliers = [shape(level.format(0), 4, width)[0] // width]
    while (name := level.format(len(multipliers))) in state:
        multipliers.append(shape(name, 4, width)[0] // width)
    return VQConfig(tuple(multipliers), width, z_channels, vocab_size, code_width, channels)


class VQModel(Gridded, nn.Module):
    """The tokenizer; see `tokenizer.Tokenizer` for the interface.

    Images may have any size that is a multiple of `downsample`.

    Attributes:
        config: shapes.
        dtype: of the convolutions; the lookup is always float32.
        precision: of the encoder's float32 products ('float32', 'tensorfloat32' or 'bfloat16');
            less than 'float32', as TPUs and GPUs have by default, changes some codes.
        decoded: (height, width) in tokens of what `decode` makes; None: square.
        lookup: how gradients of `autoencode` pass the lookup: 'straight', from the row to the latent
            as officially, or 'distance' (see `_looked_up`).
    """

    config: VQConfig
    dtype: str = "float32"
    precision: str = "float32"
    decoded: tuple[int, int] | None = None
    lookup: str = "straight"

    def setup(self) -> None:
        config = self.config
        self.encoder = _Encoder(config, self.dtype)
        self.decoder = _Decoder(config, self.dtype)
        self.quantize = _Codebook(config)
        self.quant_conv = _conv(config.code_width, 1, self.dtype)
        self.post_quant_conv = _conv(config.z_channels, 1, self.dtype)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def downsample(self) -> int:
        return self.config.downsample

    def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
        """Reconstructs images: encodes and decodes them."""
        grid = self.grid(images_BxHxWxC.shape[1:3])
        return self.decode(self.encode(images_BxHxWxC), grid)

    def latents(self, images_BxHxWxC: jax.Array) -> jax.Array:
        """Images -> latents to look up in the codebook, float32 (B, h, w, code_width)."""
        self.grid(images_BxHxWxC.shape[1:3])
        if images_BxHxWxC.shape[-1] != self.config.channels:
            raise ValueError(
                f"images have {images_BxHxWxC.shape[-1]} channels, this tokenizer takes "
                f"{self.config.channels}"
            )
        with jax.default_matmul_precision(self.precision):
            latents = self.quant_conv(self.encoder(images_BxHxWxC.astype(self.dtype)))
        return latents.astype(jnp.float32)

    def autoencode(self, images_BxHxWxC: jax.Array, free: jax.Array | bool = False) -> Autoencoded:
        """What training looks at. Gradients of the images pass the lookup as `lookup` says.

        `free` (a scalar) puts the latents themselves in place of the rows.
        """
        latents = self.latents(images_BxHxWxC)
        codes = self.quantize.nearest(jax.lax.stop_gradient(latents))
        latents, rows = unit(latents), self.quantize.rows(codes)
        if free is not False:
            rows = jnp.where(free, jax.lax.stop_gradient(latents), rows)
        passed = _looked_up(latents, rows, self.lookup)
        return Autoencoded(self._decode_rows(passed), latents, rows, codes)

    def encode(self, images_BxHxWxC: jax.Array) -> jax.Array:
        """Float32 images in [-1, 1] -> int32 codes (B, L), the grid row by row."""
        latents = self.latents(images_BxHxWxC)
        return self.quantize.nearest(latents).reshape(len(latents), -1)

    def decode(self, codes_BxL: jax.Array, grid: tuple[int, int] | None = None) -> jax.Array:
        """Int codes (B, L) -> float32 images (B, H, W, C), clipped to [-1, 1].

        Args:
            codes_BxL: the grid row by row.
            grid: (height, width) in tokens; by default `decoded`.
        """
        return jnp.clip(self.decode_unclipped(codes_BxL, grid), -1, 1)

    def decode_unclipped(
        self, codes_BxL: jax.Array, grid: tuple[int, int] | None = None
    ) -> jax.Array:
        """`decode` without clipping: values a little outside [-1, 1] are usual."""
        batch, length = codes_BxL.shape
        side = math.isqrt(length)
        height, width = grid or self.decoded or (side, side)
        if height * width != length:
            raise ValueError(f"{length} codes an image do not fill a {height}x{width} grid")
        rows = self.quantize.rows(codes_BxL).reshape(batch, height, width, -1)
        return self._decode_rows(rows)

    def _decode_rows(self, rows_BxhxwxC: jax.Array) -> jax.Array:
        images = self.decoder(self.post_quant_conv(rows_BxhxwxC.astype(self.dtype)))
        return images.astype(jnp.float32)


class _Codebook(nn.Module):
    """Rows on the unit sphere; the nearest row is the code."""

    config: VQConfig

    def setup(self) -> None:
        shape = (self.config.vocab_size, self.config.code_width)
        self.embedding = self.param("embedding", nn.initializers.normal(1.0), shape)

    def nearest(self, latents: jax.Array) -> jax.Array:
        """(..., code_width) -> int32 (...); the first of equally near rows, as in PyTorch."""
        latents, rows = unit(latents), unit(self.embedding)
        square = jnp.sum(jnp.square(latents), axis=-1, keepdims=True)
        best = jnp.full(latents.shape[:-1], jnp.inf)
        code = jnp.zeros(latents.shape[:-1], jnp.int32)
        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            # The last chunk is as long as the others: another shape would round equal rows otherwise.
            start = max(0, min(begin, len(rows) - _ROWS_AT_ONCE))
            some = rows[start : start + _ROWS_AT_ONCE]
            # Highest precision: TPUs and GPUs would round the product enough to change codes.
            product = jnp.matmul(latents, some.T, precision=jax.lax.Precision.HIGHEST)
            distance = square + jnp.sum(jnp.square(some), axis=-1) - 2 * product
            nearer = distance.min(axis=-1) < best
            best = jnp.where(nearer, distance.min(axis=-1), best)
            code = jnp.where(nearer, start + distance.argmin(axis=-1).astype(jnp.int32), code)
        return code

    def rows(self, codes: jax.Array) -> jax.Array:
        return jnp.take(unit(self.embedding), codes, axis=0)


def unit(vectors: jax.Array) -> jax.Array:
    """Projects vectors to the unit sphere, as torch's F.normalize."""
    norm = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / jnp.maximum(norm, 1e-12)


def _looked_up(latents: jax.Array, rows: jax.Array, lookup: str) -> jax.Array:
    """The rows, with another gradient than their own.

    'straight' is the identity of the latents. 'distance' goes from a latent to its row by their
    distance along a direction without gradient, as DiVeQ does (arXiv 2509.26469; here without noise):
    along that direction the images move the row, across it the latent.
    """
    stop, step = jax.lax.stop_gradient, rows - latents
    if lookup == "straight":
        return latents + stop(step)
    square = jnp.sum(jnp.square(step), axis=-1, keepdims=True)
    distance = jnp.sqrt(jnp.maximum(square, 1e-12))
    return latents + distance * stop(step / distance)


def _conv(channels: int, size: int, dtype: str, **options: Any) -> nn.Conv:
    return nn.Conv(channels, (size, size), dtype=dtype, **options)


def _norm(dtype: str, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


class _ResBlock(nn.Module):
    channels: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = x
        for i in (1, 2):
            h = nn.swish(_norm(self.dtype, f"norm{i}")(h))
            h = _conv(self.channels, 3, self.dtype, name=f"conv{i}")(h)
        if x.shape[-1] != self.channels:
            x = _conv(self.channels, 1, self.dtype, name="nin_shortcut")(x)
        return x + h


class _Attention(nn.Module):
    """One head over all positions."""

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        h = _norm(self.dtype, "norm")(x)
        q, k, v = (
            _conv(channels, 1, self.dtype, name=n)(h).reshape(batch, -1, channels) for n in "qkv"
        )
        scores = jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * channels**-0.5, axis=-1).astype(self.dtype)
        h = jnp.einsum("bqk,bkc->bqc", weights, v).reshape(x.shape)
        return x + _conv(channels, 1, self.dtype, name="proj_out")(h)


class _Level(nn.Module):
    """Residual blocks at one resolution, with attention at the deepest; then a resize."""

    channels: int
    blocks: int
    attention: bool
    resize: str  # 'down', 'up' or ''
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.blocks):
            x = _ResBlock(self.channels, self.dtype, name=f"res_{i}")(x)
            if self.attention:
                x = _Attention(self.dtype, name=f"attn_{i}")(x)
        if self.resize == "down":
            padding = ((0, 1), (0, 1))  # zeros only at the bottom and at the right
            x = _Resize(self.dtype, 2, padding, name="downsample")(x)
        elif self.resize == "up":
            x = x.repeat(2, axis=1).repeat(2, axis=2)
            x = _Resize(self.dtype, name="upsample")(x)
        return x


class _Resize(nn.Module):
    dtype: str
    strides: int = 1
    padding: Any = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options = {"strides": self.strides, "padding": self.padding}
        return _conv(x.shape[-1], 3, self.dtype, **options, name="conv")(x)


def _middle(x: jax.Array, dtype: str) -> jax.Array:
    """Inside a compact method: the blocks between the levels and the latents."""
    x = _ResBlock(x.shape[-1], dtype, name="mid_0")(x)
    x = _Attention(dtype, name="mid_1")(x)
    return _ResBlock(x.shape[-1], dtype, name="mid_2")(x)


class _Encoder(nn.Module):
    config: VQConfig
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, deepest = self.config, len(self.config.multipliers) - 1
        x = _conv(config.width, 3, self.dtype, name="conv_in")(x)
        for i, multiplier in enumerate(config.multipliers):
            channels, resize = config.width * multiplier, "" if i == deepest else "down"
            level = _Level(channels, 2, i == deepest, resize, self.dtype, name=f"conv_blocks_{i}")
            x = level(x)
        x = _middle(x, self.dtype)
        x = nn.swish(_norm(self.dtype, "norm_out")(x))
        return _conv(config.z_channels, 3, self.dtype, name="conv_out")(x)


class _Decoder(nn.Module):
    config: VQConfig
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, finest = self.config, len(self.config.multipliers) - 1
        x = _conv(config.width * config.multipliers[-1], 3, self.dtype, name="conv_in")(x)
        x = _middle(x, self.dtype)
        for i, multiplier in enumerate(reversed(config.multipliers)):
            channels, resize = config.width * multiplier, "" if i == finest else "up"
            level = _Level(channels, 3, i == 0, resize, self.dtype, name=f"conv_blocks_{i}")
            x = level(x)
        x = nn.swish(_norm(self.dtype, "norm_out")(x))
        return _conv(config.channels, 3, self.dtype, name="conv_out")(x)
