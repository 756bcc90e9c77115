"""DINOv2: the frozen vision transformer that teaches in Mirai-I, and the preprocessing of its images.

Pre-norm blocks with LayerScale over `[class, registers, patches]`, where every token attends to every
other (official file: dinov2/models/vision_transformer.py). As in the generator, one `nn.scan` runs
the blocks, whose parameters are stacked on a leading axis of length N.

Shape letters: B batch, H and W pixels, h and w patches, T tokens, D width, N layers.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mirai_jax.models.attention import attend

_HEAD_DIM = 64  # in every published size
DEVIATION = 0.02  # of fresh parameters
# The official trunc_normal_ of that deviation cuts at -2 and 2: in effect a normal distribution.
_INIT = nn.initializers.normal(DEVIATION)
_MEAN, _STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])  # ImageNet's


@dataclasses.dataclass(frozen=True)
class DinoConfig:
    """The shapes of the network.

    `swiglu` selects the feed-forward network of the giant. `pos_grid` is the (height, width) in
    patches of the stored position embedding, `patch` the side of a patch in pixels.
    """

    width: int
    num_layers: int
    num_heads: int
    registers: int = 0
    swiglu: bool = False
    pos_grid: tuple[int, int] = (37, 37)
    patch: int = 14

    @property
    def ffn_width(self) -> int:
        """4D; with SwiGLU two thirds of that, rounded up to a multiple of 8."""
        return (int(8 * self.width / 3) + 7) // 8 * 8 if self.swiglu else 4 * self.width


SIZES: Mapping[str, DinoConfig] = {
    "vits14": DinoConfig(width=384, num_layers=12, num_heads=6),
    "vitb14": DinoConfig(width=768, num_layers=12, num_heads=12),
    "vitl14": DinoConfig(width=1024, num_layers=24, num_heads=16),
    "vitg14": DinoConfig(width=1536, num_layers=40, num_heads=24, swiglu=True),
}
# The names of the published checkpoints.
NAMES = tuple(f"dinov2_{size}{suffix}" for suffix in ("", "_reg4") for size in SIZES)


def named(name: str) -> DinoConfig:
    """The published network of that name; raises ValueError if there is none."""
    if name not in NAMES:
        raise ValueError(f"{name!r} is not a published DINOv2; those are {', '.join(NAMES)}")
    size, registers = name.removeprefix("dinov2_"), 4 * name.endswith("_reg4")
    return dataclasses.replace(SIZES[size.removesuffix("_reg4")], registers=registers)


def config_of(state: Mapping[str, Any], num_heads: int | None = None) -> DinoConfig:
    """The config that a PyTorch state dict was made for.

    Args:
        state: arrays (anything with a `shape`) under their official names. Only what the config
            needs is read: the mapping of names checks the rest.
        num_heads: of attention, which no shape determines; None for the published width of 64.

    Raises:
        ValueError: not a DINOv2 state dict.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"not a DINOv2 state dict: it has no {name}")
        found = tuple(state[name].shape)
        if len(found) != rank or 0 in found:
            raise ValueError(f"not a DINOv2 state dict: {name} is {found}, not of {rank} axes")
        return found

    width = shape("cls_token", 3)[-1]
    patches = shape("pos_embed", 3)[1] - 1
    side = math.isqrt(patches)
    if side == 0 or side**2 != patches:
        raise ValueError(f"not a DINOv2 state dict: pos_embed has {patches} patches, not a square")
    layers = sum(n.startswith("blocks.") and n.endswith(".norm1.weight") for n in state)
    if layers == 0:
        raise ValueError("not a DINOv2 state dict: it has no blocks.0.norm1.weight")
    if num_heads is None:
        if width % _HEAD_DIM:
            raise ValueError(
                f"cls_token is {width} wide, no multiple of {_HEAD_DIM}: give num_heads"
            )
        num_heads = width // _HEAD_DIM
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads is {num_heads}, must divide the width of {width}")
    return DinoConfig(
        width=width,
        num_layers=layers,
        num_heads=num_heads,
        registers=shape("register_tokens", 3)[1] if "register_tokens" in state else 0,
        swiglu="blocks.0.mlp.w12.weight" in state,
        pos_grid=(side, side),
        patch=shape("patch_embed.proj.weight", 4)[-1],
    )


# The network --------------------------------------------------------------------------------------


def _dense(width: int, dtype: str, name: str) -> nn.Dense:
    return nn.Dense(width, kernel_init=_INIT, dtype=dtype, name=name)


def _norm(name: str) -> nn.LayerNorm:
    """In float32, with the variance in two passes: very large channels cause no cancellation."""
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, dtype=jnp.float32, name=name)


class PatchEmbed(nn.Module):
    """Projects each patch of pixels: (B, H, W, 3) -> (B, h, w, D) float32."""

    config: DinoConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images_BxHxWx3):
        width, side = self.config.width, (self.config.patch, self.config.patch)
        project = nn.Conv(
            width, side, side, "VALID", kernel_init=_INIT, dtype=self.dtype, name="proj"
        )
        return project(images_BxHxWx3).astype(jnp.float32)


class Attention(nn.Module):
    """Self-attention of every token to every token, softmax in float32."""

    config: DinoConfig
    dtype: str = "float32"
    attention: str = "auto"

    @nn.compact
    def __call__(self, x_BxTxD):
        heads = self.config.num_heads
        batch, length, width = x_BxTxD.shape
        # As in the generator, products take one flat axis of tokens, for speed on CPU.
        qkv = _dense(3 * width, self.dtype, "qkv")(x_BxTxD.reshape(-1, width))
        shape = (batch, length, heads, width // heads)
        q, k, v = (part.reshape(shape) for part in jnp.split(qkv, 3, axis=-1))
        out = attend(q, k, v, causal=False, kernel=self.attention)
        return _dense(width, self.dtype, "proj")(out.reshape(-1, width)).reshape(x_BxTxD.shape)


class FeedForward(nn.Module):
    """fc2(gelu(fc1 x)), or with SwiGLU w3(silu(a) * b) where [a, b] = w12 x."""

    config: DinoConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BxTxD):
        inner, width = self.config.ffn_width, self.config.width
        x = x_BxTxD.reshape(-1, width)  # one flat axis of tokens, as in Attention
        if self.config.swiglu:
            gate, value = jnp.split(_dense(2 * inner, self.dtype, "w12")(x), 2, axis=-1)
            out = _dense(width, self.dtype, "w3")(nn.silu(gate) * value)
        else:
            hidden = nn.gelu(_dense(inner, self.dtype, "fc1")(x), approximate=False)
            out = _dense(width, self.dtype, "fc2")(hidden)
        return out.reshape(x_BxTxD.shape)


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    @nn.compact
    def __call__(self, x):
        return x * self.param("gamma", nn.initializers.ones, x.shape[-1:])


class Block(nn.Module):
    """One pre-norm block, with the signature that `nn.scan` requires. The residual stream is float32."""

    config: DinoConfig
    dtype: str = "float32"
    attention: str = "auto"

    @nn.compact
    def __call__(self, x, _):
        attention = Attention(self.config, self.dtype, self.attention, name="attn")
        x = x + LayerScale(name="ls1")(attention(_norm("norm1")(x)))
        feed_forward = FeedForward(self.config, self.dtype, name="mlp")
        x = x + LayerScale(name="ls2")(feed_forward(_norm("norm2")(x)))
        return x, None


class DinoV2(nn.Module):
    """The vision transformer.

    Attributes:
        config: its shapes.
        dtype: of matrix products, "float32" or "bfloat16". Parameters, the residual stream,
            LayerNorm and softmax are float32.
        attention: the kernel, of attention.KERNELS.
    """

    config: DinoConfig
    dtype: str = "float32"
    attention: str = "auto"

    @nn.compact
    def __call__(
        self,
        images_BxHxWx3: jax.Array,
        layer: int = 0,
        masked_Bxhxw: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Normalised features of every patch and of the class token.

        Args:
            images_BxHxWx3: floats from `preprocess`, sides multiples of the patch.
            layer: the block, from 1, whose output is normalised; 0 for the last. Blocks above it do
                not run.
            masked_Bxhxw: bool; the mask token replaces true patches. None: no patch.

        Returns:
            (B, h, w, D) and (B, D), float32 (the official `get_intermediate_layers`).

        Raises:
            ValueError: images of another shape or type, or an unknown block.
        """
        config = self.config
        _check_images(images_BxHxWx3)
        height, width = images_BxHxWx3.shape[1:3]
        if height % config.patch or width % config.patch:
            raise ValueError(f"images are {height}x{width}, no multiples of {config.patch}")
        if layer not in range(config.num_layers + 1):
            raise ValueError(f"layer is {layer!r}; the blocks are 1 to {config.num_layers}")

        def table(name, *shape):
            return self.param(name, _INIT, (*shape, config.width))

        x = PatchEmbed(config, self.dtype, name="patch_embed")(images_BxHxWx3)
        batch, *grid, _ = x.shape
        positions = table("pos_embed", 1, 1 + math.prod(config.pos_grid))
        positions = resample_positions(positions, config.pos_grid, tuple(grid))
        mask_token = table("mask_token", 1)  # every checkpoint has it, only pretraining uses it
        if masked_Bxhxw is not None:
            x = jnp.where(masked_Bxhxw[..., None], mask_token, x)
        first = table("cls_token", 1, 1) + positions[:, :1]
        if config.registers:  # they have no position
            registers = table("register_tokens", 1, config.registers)
            first = jnp.concatenate([first, registers], axis=1)
        first = jnp.broadcast_to(first, (batch, *first.shape[1:]))
        x = x.reshape(batch, -1, config.width) + positions[:, 1:]
        x, _ = self._blocks(layer)(jnp.concatenate([first, x], axis=1), None)
        x = _norm("norm")(x)
        return x[:, 1 + config.registers :].reshape(batch, *grid, config.width), x[:, 0]

    def _blocks(self, layer: int) -> nn.Module:
        """The blocks up to `layer`, with their part of the stacked parameters."""
        config = self.config
        depth = config.num_layers if self.is_initializing() or layer == 0 else layer
        blocks = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth
        )
        if depth < config.num_layers:
            blocks = nn.map_variables(
                blocks, "params", lambda params: jax.tree.map(lambda x: x[:depth], params)
            )
        return blocks(config, self.dtype, self.attention, name="blocks")


# Preprocessing ------------------------------------------------------------------------------------


def _check_images(images_BxHxWx3: jax.Array) -> None:
    if images_BxHxWx3.ndim != 4 or images_BxHxWx3.shape[-1] != 3:
        raise ValueError(f"images must be (B, H, W, 3), not {images_BxHxWx3.shape}")
    if not jnp.issubdtype(images_BxHxWx3.dtype, jnp.floating):
        raise ValueError(f"images must be floats, not {images_BxHxWx3.dtype}")


def resample_positions(
    positions_1xTxD: jax.Array, old: tuple[int, int], new: tuple[int, int]
) -> jax.Array:
    """A position embedding (1, 1 + h * w, D), resampled to another grid of patches.

    Bicubic with antialiasing (a = -0.5), as timm's `resample_abs_pos_embed`, which the official
    Mirai-I calls, and unlike the official DINOv2. The entry of the class token stays.
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
    (`align_corners=False, antialias=False`); `jax.image.resize` has another kernel.
    """
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
    """The input of DINOv2 in Mirai-I: images normalised, then resized.

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
    _check_images(images_BxHxWx3)
    return resize_bicubic((images_BxHxWx3.astype(jnp.float32) - _MEAN) / _STD, size)
