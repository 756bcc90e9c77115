"""Frozen networks over many images: a few at a time, by one program."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mirai_jax.models import tokenizer

# Pixels decoded or encoded at once: two images of 512x512. The finest level of VQ-16 holds several
# arrays of 128 channels for each pixel.
_PIXELS_AT_ONCE = 2 * 512 * 512


class LocalDevices:
    """The devices of this process, for a frozen network that each of them holds whole.

    Attributes:
        mesh: the devices along its one axis, `batch`.
        count: their number; the rows given to `split` are a multiple of it.
    """

    def __init__(self, devices: list[jax.Device] | None = None):
        devices = jax.local_devices() if devices is None else devices
        self.mesh, self.count = Mesh(np.array(devices), ("batch",)), len(devices)

    def copy(self, params: Any) -> Any:
        """The parameters on every device."""
        return jax.device_put(params, NamedSharding(self.mesh, P()))

    def split(self, rows: Any) -> Any:
        """The arrays, their first axis divided among the devices."""
        return jax.device_put(rows, NamedSharding(self.mesh, P("batch")))


def images_at_once(height: int, width: int) -> int:
    """How many images of a size a convolutional tokenizer takes at once, at least 1."""
    return max(1, _PIXELS_AT_ONCE // (height * width))


@functools.partial(jax.jit, static_argnums=0)
def encode(module: tokenizer.Tokenizer, params: Any, images: jax.Array) -> jax.Array:
    return module.apply({"params": params}, tokenizer.to_unit(images), method="encode")


@functools.partial(jax.jit, static_argnums=0)
def _decode(module: tokenizer.Tokenizer, params: Any, codes: jax.Array) -> jax.Array:
    return tokenizer.to_uint8(module.apply({"params": params}, codes, method="decode"))


@functools.partial(jax.jit, static_argnums=0)
def _features(module: nn.Module, params: Any, images: jax.Array) -> jax.Array:
    return module.apply({"params": params}, images)


def in_chunks(
    function: Callable,
    module: Any,
    params: Any,
    items: Any,
    chunk: int,
    advance: Callable[[int], None] = lambda count: None,
) -> Any:
    """`function(module, params, some)` of all items, `chunk` at a time, as NumPy arrays.

    `items` is an array or a tree of arrays of one length, and so is the result. The last chunk is
    filled up, so that `function` compiles once. `advance` takes the number of items of each chunk done.
    """
    count, params = len(jax.tree.leaves(items)[0]), jax.device_put(params)
    chunk = min(chunk, count)

    def run(start: int) -> Any:
        some = jax.tree.map(lambda x: np.asarray(x[start : start + chunk]), items)
        filled = jax.tree.map(lambda x: np.resize(x, (chunk, *x.shape[1:])), some)
        out = function(module, params, filled)
        out = jax.tree.map(lambda x: np.asarray(x)[: count - start], out)
        advance(min(chunk, count - start))
        return out

    parts = [run(start) for start in range(0, count, chunk)]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def encode_images(
    module: tokenizer.Tokenizer,
    params: Any,
    images_NxHxWxC: np.ndarray,
    chunk: int = 0,
    **options: Any,
) -> np.ndarray:
    """uint8 images -> int32 codes (N, L), `chunk` images at a time (0: as memory allows).

    `options` are those of `in_chunks`.
    """
    chunk = chunk or images_at_once(*images_NxHxWxC.shape[1:3])
    return in_chunks(encode, module, params, images_NxHxWxC, chunk, **options)


def decode_codes(
    module: tokenizer.Tokenizer, params: Any, codes_NxL: np.ndarray, chunk: int = 0
) -> np.ndarray:
    """Codes -> uint8 images (N, H, W, C), `chunk` images at a time (0: as memory allows)."""
    codes = np.asarray(codes_NxL)
    chunk = chunk or images_at_once(codes.shape[1], module.downsample**2)
    return in_chunks(_decode, module, params, codes, chunk)


def teacher_features(
    module: nn.Module, params: Any, images_NxHxWxC: np.ndarray, **options: Any
) -> np.ndarray:
    """uint8 images -> the features of the teacher, float32 (N, L, Z); `options` as of `in_chunks`."""
    chunk = max(1, images_at_once(*images_NxHxWxC.shape[1:3]) // 8)
    return in_chunks(_features, module, params, images_NxHxWxC, chunk, **options)
