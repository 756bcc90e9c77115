"""The vision transformer that teaches in Mirai-I: DINOv2, DINOv3 and MAE are its options.

Pre-norm blocks over `[class, registers, patches]`, where every token attends to every other, unless
the patches have an order of blocks (official files: dinov2/models/vision_transformer.py,
dinov3/models/vision_transformer.py and layers/, mae/models_vit.py). As in the generator, one `nn.scan`
runs the blocks, whose parameters are stacked on a leading axis of length N.

    DINOv2   a learned table of positions, LayerScale
    DINOv3   no table: queries and keys of patches are rotated; LayerScale; keys without a bias
    MAE      a table of sines and cosines, no LayerScale

Shape letters: B batch, H and W pixels, h and w patches, T tokens, R registers, D width, d channels of a
head, N layers.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mirai_jax.models.attention import attend
from mirai_jax.models.preprocessing import check_images, resample_positions

DEVIATION = 0.02  # of fresh parameters
# The official trunc_normal_ of that deviation cuts at -2 and 2: in effect a normal distribution.
_INIT = nn.initializers.normal(DEVIATION)
_ROPE_BASE = 100  # DINOv3's longest period, in half sides of the image


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """The shapes and parts of the network; the defaults are DINOv2's.

    Attributes:
        width, num_layers, num_heads: D, N, and heads of attention.
        registers: tokens beside the class token, without positions (DINOv3's storage tokens).
        swiglu: the feed-forward network of DINOv2's giant.
        pos_grid: (height, width) in patches of the stored table of positions; None: there is none,
            and rotations of queries and keys say where a patch is (RoPE).
        patch: the side of a patch in pixels.
        epsilon: of LayerNorm.
        layer_scale: whether a learned factor scales what a block adds.
        masked_k_bias: whether a stored mask, `bias_mask`, multiplies the bias of queries, keys and
            values: DINOv3 stores a bias of keys that takes no effect.
        mask_token: whether there is a token for hidden patches, which only pretraining uses.
        local_cls_norm: whether there is a second norm, which only pretraining uses (DINOv3's SAT-493M).
    """

    width: int
    num_layers: int
    num_heads: int
    registers: int = 0
    swiglu: bool = False
    pos_grid: tuple[int, int] | None = (37, 37)
    patch: int = 14
    epsilon: float = 1e-6
    layer_scale: bool = True
    masked_k_bias: bool = False
    mask_token: bool = True
    local_cls_norm: bool = False

    @property
    def family(self) -> str:
        """'dinov2', 'dinov3' or 'mae': whose network this is."""
        if self.pos_grid is None:
            return "dinov3"
        return "dinov2" if self.layer_scale else "mae"

    @property
    def ffn_width(self) -> int:
        """4D; with SwiGLU two thirds of that, rounded up to a multiple of 8."""
        return (int(8 * self.width / 3) + 7) // 8 * 8 if self.swiglu else 4 * self.width


# The network --------------------------------------------------------------------------------------


def _dense(width: int, dtype: str, name: str) -> nn.Dense:
    return nn.Dense(width, kernel_init=_INIT, dtype=dtype, name=name)


def _norm(config: VitConfig, name: str) -> nn.LayerNorm:
    """In float32, with the variance in two passes: very large channels cause no cancellation."""
    return nn.LayerNorm(config.epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)


class PatchEmbed(nn.Module):
    """Projects each patch of pixels: (B, H, W, 3) -> (B, h, w, D) float32."""

    config: VitConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images_BxHxWx3):
        width, side = self.config.width, (self.config.patch, self.config.patch)
        project = nn.Conv(
            width, side, side, "VALID", kernel_init=_INIT, dtype=self.dtype, name="proj"
        )
        return project(images_BxHxWx3).astype(jnp.float32)


class Rotations(nn.Module):
    """DINOv3's rotary positions: sines and cosines for each patch of a grid.

    Patch centres lie in [-1, 1] on either axis, whatever the grid. Pair i of a head's channels turns by
    2 pi times the coordinate over period i; the first half of the pairs is for rows, the second for
    columns, and the two channels of a pair are half a head apart.
    """

    head_dim: int

    @nn.compact
    def __call__(self, grid: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """(h * w, d) float32 each, row by row."""
        count = self.head_dim // 4
        base = lambda _, shape: _ROPE_BASE ** jnp.linspace(0, 1, *shape, endpoint=False)
        periods = self.param("periods", base, (count,))
        axes = [2 * (np.arange(side, dtype=np.float32) + 0.5) / side - 1 for side in grid]
        places_Lx2x1 = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2, 1)
        angles = (2 * math.pi * places_Lx2x1).astype(np.float32) / periods
        angles_Lxd = jnp.tile(angles.reshape(len(places_Lx2x1), -1), 2)
        return jnp.sin(angles_Lxd), jnp.cos(angles_Lxd)


def _rotate(x_BxTxHxd: jax.Array, rotations: tuple[jax.Array, jax.Array]) -> jax.Array:
    """In float32; the tokens that lead, which have no place, stay as they are."""
    sin, cos = rotations
    lead = ((x_BxTxHxd.shape[1] - len(sin), 0), (0, 0))
    sin, cos = jnp.pad(sin, lead)[:, None], jnp.pad(cos, lead, constant_values=1)[:, None]
    x = x_BxTxHxd.astype(jnp.float32)
    left, right = jnp.split(x, 2, axis=-1)
    return (x * cos + jnp.concatenate([-right, left], axis=-1) * sin).astype(x_BxTxHxd.dtype)


def attended(order_L: tuple[int, ...], lead: int) -> np.ndarray:
    """bool (T, T): whether token t attends to token s, where patches come in numbered blocks.

    A patch attends to those of the same and of lower numbers, and to the `lead` tokens before all
    patches. These attend to themselves alone: what they knew of the image, every patch would know.
    """
    order = np.concatenate([np.full(lead, -1), order_L])
    return order[None, :] <= order[:, None]


class MaskedDense(nn.Module):
    """`nn.Dense` whose bias is multiplied by a stored mask, `bias_mask`: fresh, 0 for the keys."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, x):
        keys = lambda _, shape: jnp.repeat(jnp.float32([1, 0, 1]), shape[0] // 3)
        kernel = self.param("kernel", _INIT, (x.shape[-1], self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        bias = bias * self.param("bias_mask", keys, (self.width,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        return x @ kernel + bias


class Attention(nn.Module):
    """Self-attention, softmax in float32: of every token to every token, or as `attended` says."""

    config: VitConfig
    dtype: str = "float32"
    attention: str = "auto"
    order: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x_BxTxD, rotations=None):
        config, heads = self.config, self.config.num_heads
        batch, length, width = x_BxTxD.shape
        # As in the generator, products take one flat axis of tokens, for speed on CPU.
        dense = MaskedDense if config.masked_k_bias else _dense
        qkv = dense(3 * width, self.dtype, name="qkv")(x_BxTxD.reshape(-1, width))
        shape = (batch, length, heads, width // heads)
        q, k, v = (part.reshape(shape) for part in jnp.split(qkv, 3, axis=-1))
        if rotations is not None:
            q, k = _rotate(q, rotations), _rotate(k, rotations)
        mask = attended(self.order, length - len(self.order)) if self.order else None
        out = attend(q, k, v, causal=False, mask=mask, kernel=self.attention)
        return _dense(width, self.dtype, "proj")(out.reshape(-1, width)).reshape(x_BxTxD.shape)


class FeedForward(nn.Module):
    """fc2(gelu(fc1 x)), or with SwiGLU w3(silu(a) * b) where [a, b] = w12 x."""

    config: VitConfig
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BxTxD):
        inner, width = self.config.ffn_width, self.config.width
        x = x_BxTxD.reshape(-1, width)  # one flat axis of tokens, as in Attention
        if self.config.swiglu:
            gate, value = jnp.split(_dense(2 * inner, self.dtype, "w12")(x), 2, axis=-1)
            out = _dense(width, self.dtype, "w3")(nn.silu(gate) * value)
        else:
            hidden = _gelu(_dense(inner, self.dtype, "fc1")(x))
            out = _dense(width, self.dtype, "fc2")(hidden)
        return out.reshape(x_BxTxD.shape)


def _gelu(x):
    """GELU with the error function; on TPUs in bfloat16 with a hyperbolic tangent in its place.

    There the error function takes longer than the product before it, and the tangent one instruction.
    """
    exact = functools.partial(nn.gelu, approximate=False)
    if x.dtype != jnp.bfloat16:
        return exact(x)
    return jax.lax.platform_dependent(x, tpu=_gelu_by_tanh, default=exact)


def _gelu_by_tanh(x):
    """In float32 within 2.6e-5 of the exact value; a rounding to bfloat16 moves 0.02 by more."""
    y = x.astype(jnp.float32)
    square = jnp.minimum(y * y, 36.0)  # beyond it the tangent is 1 in size
    inner = 0.79750659 + square * (0.03700683 - 0.00035170864 * square)
    return (0.5 * y * (1 + jnp.tanh(y * inner))).astype(x.dtype)


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    @nn.compact
    def __call__(self, x):
        return x * self.param("gamma", nn.initializers.ones, x.shape[-1:])


class Block(nn.Module):
    """One pre-norm block, with the signature that `nn.scan` requires. The residual stream is float32.

    With `collect` the scan also returns the stream after each block.
    """

    config: VitConfig
    dtype: str = "float32"
    attention: str = "auto"
    order: tuple[int, ...] = ()
    collect: bool = False

    @nn.compact
    def __call__(self, x, rotations):
        config = self.config

        def scaled(name, added):
            return LayerScale(name=name)(added) if config.layer_scale else added

        attention = Attention(config, self.dtype, self.attention, self.order, name="attn")
        x = x + scaled("ls1", attention(_norm(config, "norm1")(x), rotations))
        feed_forward = FeedForward(config, self.dtype, name="mlp")
        x = x + scaled("ls2", feed_forward(_norm(config, "norm2")(x)))
        return x, x if self.collect else None


class VisionTransformer(nn.Module):
    """The vision transformer.

    Attributes:
        config: its shapes and parts.
        dtype: of matrix products, "float32" or "bfloat16". Parameters, the residual stream,
            LayerNorm, rotations and softmax are float32.
        attention: the kernel, of attention.KERNELS.
    """

    config: VitConfig
    dtype: str = "float32"
    attention: str = "auto"

    @nn.compact
    def __call__(
        self,
        images_BxHxWx3: jax.Array,
        layer: int = 0,
        masked_Bxhxw: jax.Array | None = None,
        *,
        norm: bool = True,
        last: int = 1,
        order: tuple[int, ...] = (),
    ) -> tuple[jax.Array, jax.Array]:
        """Features of every patch, and of the class token and registers.

        Args:
            images_BxHxWx3: floats from `preprocess`. What its sides exceed a multiple of the patch by
                is cut off.
            layer: the block, from 1, whose output is taken; 0 for the last. Blocks above it do not
                run.
            masked_Bxhxw: bool; the mask token replaces true patches. None: no patch.
            norm: whether the output goes through the final norm (official: get_intermediate_layers).
            last: the result is the mean of the outputs of this number of blocks up to `layer`, each
                normalised. With more than 1, the outputs of all blocks are in memory together.
            order: of each patch, row by row, the number of the block of patches that it lies in: see
                `attended`. (): every token attends to every other.

        Returns:
            (B, h, w, D) and (B, 1 + R, D), float32; the class token comes first.

        Raises:
            ValueError: images of another shape or type, an unknown block, or more than there are.
        """
        config = self.config
        check_images(images_BxHxWx3)
        if layer not in range(config.num_layers + 1):
            raise ValueError(f"layer is {layer!r}; the blocks are 1 to {config.num_layers}")
        if last not in range(1, (layer or config.num_layers) + 1):
            raise ValueError(f"last is {last!r}, of {layer or config.num_layers} blocks")

        def table(name, *shape):
            return self.param(name, _INIT, (*shape, config.width))

        x = PatchEmbed(config, self.dtype, name="patch_embed")(images_BxHxWx3)
        batch, *grid, _ = x.shape
        rotations = positions = None
        if config.pos_grid is None:
            head_dim = config.width // config.num_heads
            rotations = Rotations(head_dim, name="rope_embed")(tuple(grid))
        else:
            positions = table("pos_embed", 1, 1 + math.prod(config.pos_grid))
            positions = resample_positions(positions, config.pos_grid, tuple(grid))
        if config.mask_token:
            mask_token = table("mask_token", 1)
        if masked_Bxhxw is not None:
            x = jnp.where(masked_Bxhxw[..., None], mask_token, x)
        first, x = table("cls_token", 1, 1), x.reshape(batch, -1, config.width)
        if positions is not None:
            first, x = first + positions[:, :1], x + positions[:, 1:]
        if config.registers:  # they have no position
            name = "storage_tokens" if positions is None else "register_tokens"
            first = jnp.concatenate([first, table(name, 1, config.registers)], axis=1)
        first = jnp.broadcast_to(first, (batch, *first.shape[1:]))
        scanned = self._blocks(layer, order, collect=last > 1)
        x, outputs = scanned(jnp.concatenate([first, x], axis=1), rotations)
        x = outputs[-last:] if last > 1 else x
        normalised = _norm(config, "norm")(x)
        if config.local_cls_norm and self.is_initializing():
            _norm(config, "local_cls_norm")(x)
        x = normalised if norm else x
        x = x.mean(axis=0) if last > 1 else x
        lead = 1 + config.registers
        return x[:, lead:].reshape(batch, *grid, config.width), x[:, :lead]

    def _blocks(self, layer: int, order: tuple[int, ...], collect: bool) -> nn.Module:
        """The blocks up to `layer`, with their part of the stacked parameters."""
        config = self.config
        depth = config.num_layers if self.is_initializing() or layer == 0 else layer
        scanned = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=depth,
        )
        if depth < config.num_layers:
            scanned = nn.map_variables(
                scanned, "params", lambda params: jax.tree.map(lambda x: x[:depth], params)
            )
        return scanned(config, self.dtype, self.attention, order, collect, name="blocks")
