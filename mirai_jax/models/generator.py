"""The causal generator: LlamaGen's class-conditional transformer over a grid of image tokens.

The sequence is `[class, x_0 .. x_{L-2}]`; the output at position j predicts x_j. Pre-norm RMSNorm,
fused QKV, 2-D rotary embedding, SwiGLU, no biases (official file: autoregressive/models/gpt.py).

One `nn.scan` runs the blocks, whose parameters are stacked on a leading axis of length N: the time
to compile hardly grows with depth (unless unrolled), and a teacher that needs only the first blocks
runs only those (`hidden_states`). Dropout is active exactly where the caller passes a "dropout" rng.

Shape letters: B batch, L positions (grid height x width), D width, H heads, V vocabulary, N layers.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mirai_jax.models import kv_cache
from mirai_jax.models.activation_sharding import look_up, shard_activation
from mirai_jax.models.attention import attend
from mirai_jax.models.linear import Linear

# name -> (layers, heads, width), the published sizes of LlamaGen.
SIZES: Mapping[str, tuple[int, int, int]] = {
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "3B": (24, 32, 3200),
}

# What the backward pass of a block finds stored; it computes the rest again.
_PRODUCTS = jax.checkpoint_policies.save_only_these_names("linear", "attention")
REMAT: Mapping[str, Any] = {
    "none": None,  # everything
    # Products with weights and the output of attention (a fused kernel runs again nevertheless).
    "dots": _PRODUCTS,
    "full": jax.checkpoint_policies.nothing_saveable,  # the input of the block
}

_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """The shapes and the arithmetic of the generator.

    The rates are probabilities in [0, 1). `class_dropout` > 0 adds the null class (row `num_classes`
    of the label table), which guidance needs. `dtype` is that of matrix products; parameters and
    their gradients, the residual stream, norms and softmax are float32, as under the autocast of the
    official code. `unroll` is the number of blocks in an iteration of the layer loop (all or more: no
    loop), `remat` (of REMAT) what the backward pass stores, `attention` the kernel (attention.KERNELS).
    """

    num_layers: int
    num_heads: int
    width: int
    vocab_size: int = 16384
    num_classes: int = 1000
    grid: tuple[int, int] = (16, 16)
    token_dropout: float = 0.1
    residual_dropout: float = 0.1
    ffn_dropout: float = 0.1
    class_dropout: float = 0.1
    dtype: str = "float32"
    unroll: int = 1
    remat: str = "none"
    attention: str = "auto"

    @property
    def length(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def ffn_width(self) -> int:
        """Two thirds of 4D, rounded up to a multiple of 256."""
        return -(-int(8 * self.width / 3) // 256) * 256

    @property
    def is_loop(self) -> bool:
        """Whether blocks are iterations of a loop in the compiled program."""
        return self.unroll < self.num_layers

    @property
    def has_null_class(self) -> bool:
        return self.class_dropout > 0

    @property
    def null_class(self) -> int:
        return self.num_classes


@functools.cache
def rope_table(grid: tuple[int, int], head_dim: int, base: float = 10000.0) -> np.ndarray:
    """2-D rotary factors by sequence position.

    Args:
        grid: (height, width) of the token grid.
        head_dim: a multiple of 4: half of the pairs rotate with the row, half with the column.
        base: the rotary base.

    Returns:
        float32 (L + 1, head_dim / 2, 2): cosines and sines. Row 0 belongs to the class position
        and is all zeros, which makes its q and k zero (as in the official
        `precompute_freqs_cis_2d`); row 1 + n belongs to grid position n.
    """
    half = head_dim // 2
    frequencies = 1.0 / base ** (np.arange(0, half, 2, dtype=np.float32) / half)
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    angles = [np.outer(rows, frequencies), np.outer(columns, frequencies)]
    angles = np.concatenate(angles, axis=1).astype(np.float32)
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return np.concatenate([np.zeros_like(table[:1]), table]).astype(np.float32)


def apply_rope(x_BxTxHxd: jax.Array, table_Txdx2: jax.Array) -> jax.Array:
    """Rotates interleaved pairs of the last axis, in float32; returns the input's dtype."""
    cos, sin = table_Txdx2[:, None, :, 0], table_Txdx2[:, None, :, 1]
    return jax.lax.platform_dependent(
        x_BxTxHxd, cos, sin, tpu=_rope_by_product, default=_rope_by_pairs
    )


def _rope_by_pairs(x_BxTxHxd, cos, sin):
    real, imaginary = (x_BxTxHxd[..., i::2].astype(jnp.float32) for i in (0, 1))
    turned = jnp.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], axis=-1)
    return turned.reshape(x_BxTxHxd.shape).astype(x_BxTxHxd.dtype)


@jax.custom_vjp
def _rope_by_product(x_BxTxHxd, cos, sin):
    # A product with a signed permutation, which is exact, gives the other element of each pair: it
    # costs a TPU's matrix unit little, while moving neighbours between lanes is slow.
    dtype, pairs = x_BxTxHxd.dtype, cos.shape[-1]
    swap = jnp.asarray(np.kron(np.eye(pairs), [[0, 1], [-1, 0]]), dtype)
    other = jnp.einsum(
        "bthd,de->bthe", x_BxTxHxd, swap, precision="highest", preferred_element_type=jnp.float32
    )
    cos, sin = jnp.repeat(cos, 2, axis=-1), jnp.repeat(sin, 2, axis=-1)
    return (x_BxTxHxd.astype(jnp.float32) * cos + other * sin).astype(dtype)


def _rope_by_product_backward(table, g_BxTxHxd):
    # The inverse rotation: as JAX derives it, its two terms would be rounded before their sum.
    cos, sin = table
    return _rope_by_product(g_BxTxHxd, cos, -sin), jnp.zeros_like(cos), jnp.zeros_like(sin)


_rope_by_product.defvjp(
    lambda x, cos, sin: (_rope_by_product(x, cos, sin), (cos, sin)), _rope_by_product_backward
)


class Attention(nn.Module):
    """Causal self-attention with 2-D rotary positions."""

    config: GeneratorConfig

    @nn.compact
    def __call__(self, x_BxTxD, cache=None, position=None):
        """Returns the output (B, T, D) and the cache.

        Without a cache all T positions attend causally. With one (kv_cache.py) T is 1, and the key and
        the value are written to it at `position`.
        """
        config = self.config
        heads, head_dim = config.num_heads, config.head_dim
        batch, length, width = x_BxTxD.shape
        # Decoding takes one product: three would read as much, and start three times.
        project = Linear(
            (3, heads, head_dim), config.dtype, split_outputs=cache is None, name="wqkv"
        )
        qkv = project(x_BxTxD.reshape(-1, width))
        parts = qkv if cache is None else jnp.unstack(qkv, axis=1)
        shape, split = (batch, length, heads, head_dim), ("batch", None, "heads", None)
        q, k, v = (shard_activation(part.reshape(shape), *split) for part in parts)
        table = jnp.asarray(rope_table(config.grid, head_dim))
        if cache is None:
            table = table[:length]
        else:
            table = jax.lax.dynamic_slice_in_dim(table, position, 1)
        q, k = apply_rope(q, table), apply_rope(k, table)
        if cache is None:
            out = attend(q, k, v, causal=True, kernel=config.attention)
            out = checkpoint_name(out, "attention")
        else:
            out, cache = kv_cache.attend(q[:, 0], k[:, 0], v[:, 0], cache, position)
            out = out[:, None]
        out = shard_activation(out, *split).reshape(-1, heads, head_dim)
        out = Linear((width,), config.dtype, inputs=2, name="wo")(out)
        return _dropout(self, config.residual_dropout, out.reshape(x_BxTxD.shape)), cache


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    config: GeneratorConfig

    @nn.compact
    def __call__(self, x_BxTxD):
        config = self.config
        x_MxD, hidden = x_BxTxD.reshape(-1, config.width), (config.ffn_width,)
        gate = shard_activation(Linear(hidden, config.dtype, name="w1")(x_MxD), "batch", "features")
        if x_BxTxD.shape[1] == 1:
            # Decoding: XLA for GPUs joins two products that share an operand, and for that writes both
            # weights side by side at each token.
            x_MxD = jax.lax.optimization_barrier(x_MxD)
        value = Linear(hidden, config.dtype, name="w3")(x_MxD)
        value = shard_activation(value, "batch", "features")
        out = Linear((config.width,), config.dtype, name="w2")(nn.silu(gate) * value)
        return _dropout(self, config.ffn_dropout, out.reshape(x_BxTxD.shape))


def _dropout(module: nn.Module, rate: float, x: jax.Array) -> jax.Array:
    """Dropout inside a compact method of `module`, active exactly where it has a "dropout" rng."""
    return nn.Dropout(rate)(x, deterministic=not module.has_rng("dropout"))


def _norm(config: GeneratorConfig, name: str | None = None) -> nn.RMSNorm:
    """RMSNorm computed in float32, its result in the compute dtype."""
    return nn.RMSNorm(epsilon=1e-5, dtype=config.dtype, name=name)


class Block(nn.Module):
    """One pre-norm block, with the signature that `nn.scan` requires."""

    config: GeneratorConfig
    taps: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, carry, inputs):
        """Returns the new carry and the cache.

        Args:
            carry: (x (B, T, D) float32, the tapped states so far, position or None).
            inputs: (number of this block, from 1; its cache or None).
        """
        x, tapped, position = carry
        number, cache = inputs
        x = shard_activation(x, "batch", None, None)
        out, cache = Attention(self.config, name="attention")(
            _norm(self.config, "attention_norm")(x), cache, position
        )
        x = x + out
        x = x + FeedForward(self.config, name="feed_forward")(_norm(self.config, "ffn_norm")(x))
        tapped = tuple(
            jnp.where(number == tap, x, old) for tap, old in zip(self.taps, tapped, strict=True)
        )
        return (x, tapped, position), cache


class Generator(nn.Module):
    """The causal generator; it also returns the output of the blocks in `taps` (from 1)."""

    config: GeneratorConfig
    taps: tuple[int, ...] = ()

    def setup(self):
        config = self.config
        embed = lambda rows: nn.Embed(rows, config.width, embedding_init=_INIT, dtype=jnp.float32)
        self.cls_embedding = embed(config.num_classes + config.has_null_class)
        self.tok_embeddings = embed(config.vocab_size)
        self.token_dropout = nn.Dropout(config.token_dropout)
        block = Block
        if config.remat != "none":
            # Unrolled blocks may stand outside of any loop, where the compiler would undo remat.
            block = nn.remat(Block, prevent_cse=config.unroll > 1, policy=REMAT[config.remat])
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=0,
            out_axes=0,
            length=config.num_layers,
            unroll=config.unroll,
        )(config, self._inner_taps)
        self.norm = _norm(config)
        self.output = Linear((config.vocab_size,), config.dtype, kernel_init=nn.initializers.zeros)

    @property
    def _inner_taps(self) -> tuple[int, ...]:
        """The taps below the top; the scan returns the state at the top."""
        return tuple(tap for tap in self.taps if tap != self.config.num_layers)

    def embed(self, codes_BxT, labels_B):
        """[class, codes] -> (B, 1 + T, D) float32; in training with dropout, of labels too."""
        train = self.has_rng("dropout")
        if train and self.config.has_null_class:
            key, rate = self.make_rng("dropout"), self.config.class_dropout
            drop = jax.random.bernoulli(key, rate, labels_B.shape)
            labels_B = jnp.where(drop, self.config.null_class, labels_B)
        tables = self.cls_embedding.embedding, self.tok_embeddings.embedding
        parts = [look_up(tables[0], labels_B)[:, None], look_up(tables[1], codes_BxT)]
        x = jnp.concatenate(parts, axis=1)
        x = shard_activation(x, "batch", None, None)
        return self.token_dropout(x, deterministic=not train)

    def _run(self, x_BxTxD):
        """All blocks. Returns x and {tap: state}."""
        tapped = tuple(jnp.zeros_like(x_BxTxD) for _ in self._inner_taps)
        numbers = jnp.arange(1, self.config.num_layers + 1)
        (x, tapped, _), _ = self.layers((x_BxTxD, tapped, None), (numbers, None))
        taps = dict(zip(self._inner_taps, tapped, strict=True))
        if self.config.num_layers in self.taps:
            taps[self.config.num_layers] = x
        return x, taps

    def __call__(self, codes_BxT, labels_B):
        """Next-token logits of all positions at once.

        Args:
            codes_BxT: int, tokens x_0 .. x_{L-2} of the whole image, or fewer: a prefix.
            labels_B: int, classes; `config.null_class` for unconditional logits.

        Returns:
            logits (B, 1 + T, V) in the compute dtype, and {tap: (B, 1 + T, D) float32}, the raw
            residual stream after each block in `taps`.
        """
        x, taps = self._run(self.embed(codes_BxT, labels_B))
        logits = self.head(x.reshape(-1, x.shape[-1]))
        logits = logits.reshape(*x.shape[:2], self.config.vocab_size)
        return shard_activation(logits, "batch", None, "features"), taps

    def embed_one(self, codes_B, labels_B, position):
        """The input at one position, (B, D) float32: the class at 0, else the token just drawn."""
        return jnp.where(position == 0, self.cls_embedding(labels_B), self.tok_embeddings(codes_B))

    def head(self, x_MxD):
        """Final norm and logits (M, V) in the compute dtype."""
        return shard_activation(self.output(self.norm(x_MxD)), "batch", "features")


def hidden_states(
    config: GeneratorConfig, params: Any, codes_BxT: jax.Array, labels_B: jax.Array, layer: int
) -> jax.Array:
    """The raw residual stream after block `layer`, without dropout; no block above it runs.

    Returns:
        (B, 1 + T, D) float32 (the official `forward_ema`).
    """
    x = Generator(config).apply({"params": params}, codes_BxT, labels_B, method="embed")
    block = Block(config)

    def run(carry, i):
        # Indexed in place: a slice of the lower blocks would copy their parameters.
        of_block = lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False)
        own = jax.tree.map(of_block, params["layers"])
        return block.apply({"params": own}, carry, (i + 1, None))

    (x, _, _), _ = jax.lax.scan(run, (x, (), None), jnp.arange(layer), unroll=config.unroll)
    return x


def read_states(
    config: GeneratorConfig,
    params: Any,
    codes_BxL: jax.Array,
    labels_B: jax.Array,
    layers: Any = (),
) -> tuple[jax.Array, dict[int, jax.Array]]:
    """What all measures of held-out codes read: logits (B, L, V), and the states after `layers` by layer.

    Teacher-forced, without dropout. Precise products: a TPU's default for float32 is one bfloat16 pass.
    """
    with jax.default_matmul_precision("tensorfloat32"):
        generator = Generator(config, taps=tuple(layers))
        return generator.apply({"params": params}, codes_BxL[:, :-1], labels_B)


def init_params(config: GeneratorConfig, key: jax.Array) -> Any:
    """Fresh float32 parameters: N(0, 0.02), norms one, the output head zero."""
    codes = jnp.zeros((1, config.length - 1), jnp.int32)
    return Generator(config).init({"params": key}, codes, jnp.zeros((1,), jnp.int32))["params"]
