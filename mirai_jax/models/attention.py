"""Softmax attention over whole sequences, by a fused kernel where the platform has one, else by XLA.

Fused kernels never write the (T, T) scores to memory, forward or backward. The platform that a
program is lowered for chooses the kernel: cuDNN's on NVIDIA GPUs (from compute capability 8.0),
JAX's splash attention on TPUs (from v4), for bfloat16 and at least 128 positions. XLA computes the
rest: float32, which should agree with the official code, masks other than a causal one, short
sequences, CPUs, lengths that a TPU would pad by more than a quarter (the 257 of DINOv2), and several
devices without a training mesh that divides the batch and the heads.

Shape letters: B batch, T positions, H heads, d channels of a head.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mirai_jax.models import activation_sharding

KERNELS = ("auto", "xla")

_QUERY_BLOCK = 128  # XLA: the approximate number of queries of a block
_TILE = 128  # the unit of length of the fused kernels
_LARGEST_BLOCK = 640  # queries or keys of a block on a TPU, whose memory holds their float32 scores


def attend(
    q_BxTxHxd: jax.Array,
    k_BxTxHxd: jax.Array,
    v_BxTxHxd: jax.Array,
    *,
    causal: bool,
    mask: np.ndarray | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """Attention of all positions at once, differentiable; scores are scaled by d ** -0.5.

    Args:
        q_BxTxHxd, k_BxTxHxd, v_BxTxHxd: of one shape and floating dtype.
        causal: whether a position sees only itself and the positions before it.
        mask: bool (T, T) in place of that: whether position t sees position s. Each sees one or more.
            No fused kernel takes it.
        kernel: "auto", or "xla" for no fused kernel.

    Returns:
        (B, T, H, d) in the inputs' dtype; the softmax is float32.

    Raises:
        ValueError: the kernel is unknown.
    """
    if kernel not in KERNELS:
        raise ValueError(f"attention kernel is {kernel!r}, must be one of {', '.join(KERNELS)}")
    fused = _fused(q_BxTxHxd, causal) if kernel == "auto" and mask is None else {}
    xla = functools.partial(_xla, mask=np.tri(q_BxTxHxd.shape[1], dtype=bool) if causal else mask)
    if not fused:
        return xla(q_BxTxHxd, k_BxTxHxd, v_BxTxHxd)
    # All branches return what any of them stores for the backward pass: XLA's stores nothing.
    xla = jax.checkpoint(xla, prevent_cse=False)
    return jax.lax.platform_dependent(q_BxTxHxd, k_BxTxHxd, v_BxTxHxd, default=xla, **fused)


def has_fused(shape: tuple[int, int, int, int], dtype: str, platform: str) -> bool:
    """Whether "auto" is a fused kernel for causal attention of (B, T, H, d) on `jax.Device.platform`."""
    name = {"gpu": "cuda"}.get(platform, platform)
    return name in _fused(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), causal=True)


def _fused(q_BxTxHxd: jax.Array, causal: bool) -> dict[str, Any]:
    """{platform: its fused kernel} of this installation of JAX; empty where no kernel fits.

    One platform at most, for the reason given in `attend`.
    """
    _, length, _, head_dim = q_BxTxHxd.shape
    if q_BxTxHxd.dtype != jnp.bfloat16 or length < _TILE or head_dim > 128:
        return {}
    if _has_cudnn(q_BxTxHxd):
        platform, kernel = "cuda", _cudnn
    elif _has_splash() and -length % _TILE <= length / 4:  # more padding costs more than scores
        platform, kernel = "tpu", _splash
    else:
        return {}
    kernel = functools.partial(kernel, causal=causal)
    kernel = activation_sharding.per_device(kernel, q_BxTxHxd.shape, "batch", None, "heads", None)
    return {} if kernel is None else {platform: kernel}


# XLA ----------------------------------------------------------------------------------------------


def stored_bytes(shape: tuple[int, int, int, int], dtype: str) -> int:
    """Bytes of weights that "xla" stores for the backward pass of causal attention of (B, T, H, d).

    The exponentials are stored in float32, and in `dtype` for the product with the values.
    """
    batch, length, heads, _ = shape
    pairs = sum((end - start) * end for start, end in _query_blocks(length))
    width = sum(each.itemsize for each in {jnp.dtype(dtype), jnp.dtype(jnp.float32)})
    return width * batch * heads * pairs


def _query_blocks(length: int) -> list[tuple[int, int]]:
    """Equal blocks [start, end) of queries; the last may be shorter."""
    size = math.ceil(length / max(1, round(length / _QUERY_BLOCK)))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _xla(q_BxTxHxd, k_BxTxHxd, v_BxTxHxd, *, mask):
    # Heads lead the matrix products: about twice as fast on CPU as with T leading.
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BxTxHxd, k_BxTxHxd, v_BxTxHxd))
    length, scale = q.shape[2], q.shape[-1] ** -0.5
    # Masked blocks read only the keys up to the last that they see; without a mask blocks are three times
    # as fast as the whole at 257 positions (DINOv2), which XLA on CPU fuses badly.
    blocks = []
    for start, end in _query_blocks(length):
        seen = length if mask is None else 1 + np.flatnonzero(mask[start:end].any(axis=0))[-1]
        scores = scale * jnp.einsum(
            "bhtd,bhsd->bhts", q[:, :, start:end], k[:, :, :seen],
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        if mask is not None:
            scores = jnp.where(mask[start:end, :seen], scores, -jnp.inf)
        # The division by the softmax's sum follows the product with the values, as in flash
        # attention: there are fewer elements to divide.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        out = jnp.einsum(
            "bhts,bhsd->bhtd", weights.astype(v.dtype), v[:, :, :seen],
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        out = out / weights.sum(axis=-1, keepdims=True)
        blocks.append(out.astype(v.dtype))
    return jnp.concatenate(blocks, axis=2).transpose(0, 2, 1, 3)


# NVIDIA GPUs --------------------------------------------------------------------------------------


def _cudnn(q_BxTxHxd, k_BxTxHxd, v_BxTxHxd, *, causal):
    batch, length, _, head_dim = q_BxTxHxd.shape
    q, k, v = (_pad(x, 3, 8) for x in (q_BxTxHxd, k_BxTxHxd, v_BxTxHxd))
    # Without explicit lengths the backward pass of some versions reads past the end of a partial tile
    # (NaN).
    lengths = jnp.full((batch,), length, jnp.int32) if length % _TILE else None
    out = jax.nn.dot_product_attention(
        q, k, v, scale=head_dim**-0.5, is_causal=causal, implementation="cudnn",
        query_seq_lengths=lengths, key_value_seq_lengths=lengths,
    )  # fmt: skip
    return out[..., :head_dim]


def _has_cudnn(q_BxTxHxd: jax.Array) -> bool:
    """Whether JAX can lower cuDNN's attention, and all local GPUs (if any) can run it."""
    x = jax.ShapeDtypeStruct(q_BxTxHxd.shape, q_BxTxHxd.dtype)
    try:
        jax.eval_shape(functools.partial(_cudnn, causal=True), x, x, x)
    except (RuntimeError, NotImplementedError):  # there is no cuDNN, or it is too old
        return False
    gpus = [device for device in jax.local_devices() if device.platform == "gpu"]
    return all(float(gpu.compute_capability) >= 8 for gpu in gpus)


# TPUs ---------------------------------------------------------------------------------------------


def _splash(q_BxTxHxd, k_BxTxHxd, v_BxTxHxd, *, causal):
    # Imported here: other platforms need not wait for it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, length, heads, head_dim = q_BxTxHxd.shape
    q = q_BxTxHxd * jnp.asarray(head_dim**-0.5, q_BxTxHxd.dtype)
    q, k, v = (
        _pad(_pad(x, 1, _TILE), 3, 64).transpose(0, 2, 1, 3) for x in (q, k_BxTxHxd, v_BxTxHxd)
    )
    padded = q.shape[2]
    if causal:  # the padding comes after every real position
        mask = splash.CausalMask((padded, padded))
    elif padded == length:
        mask = splash.FullMask((padded, padded))
    else:
        mask = splash.NumpyMask(np.broadcast_to(np.arange(padded) < length, (padded, padded)))
    block = max(n for n in range(_TILE, _LARGEST_BLOCK + 1, _TILE) if padded % n == 0)
    sizes = {f"block_{name}": block for name in ("q", "kv", "q_dkv", "kv_dkv")}
    sizes = splash.BlockSizes(**sizes, use_fused_bwd_kernel=True)
    mask = splash.splash_attention_mask.MultiHeadMask([mask] * heads)
    run = splash.make_splash_mha_single_device(mask, block_sizes=sizes)
    with jax.default_matmul_precision("bfloat16"):  # kernels refuse the precisions between
        out = jax.vmap(run)(q, k, v)
    return out.transpose(0, 2, 1, 3)[:, :length, :, :head_dim]


def _has_splash() -> bool:
    """Whether all local TPUs (if any) multiply bfloat16 within a kernel: from v4 on."""
    return not {device.device_kind for device in jax.local_devices()} & {"TPU v2", "TPU v3"}


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Zeros appended to an axis up to the next multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)
