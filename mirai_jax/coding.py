"""Frozen networks over many images on the host: a few at a time, one program for all."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from mirai_jax.models import tokenizer

# Pixels decoded or encoded at once: two images of 512x512. The finest level of VQ-16 holds 128
# channels for each, several times over.
_PIXELS_AT_ONCE = 2 * 512 * 512


def images_at_once(height: int, width: int) -> int:
    """How many images of so many pixels memory allows a convolutional tokenizer, at least 1."""
    return max(1, _PIXELS_AT_ONCE // (height * width))


@functools.partial(jax.jit, static_argnums=0)
def _encode(module: tokenizer.Tokenizer, params: Any, images: jax.Array) -> jax.Array:
    return module.apply({"params": params}, tokenizer.to_unit(images), method="encode")


@functools.partial(jax.jit, static_argnums=0)
def _decode(module: tokenizer.Tokenizer, params: Any, codes: jax.Array) -> jax.Array:
    return tokenizer.to_uint8(module.apply({"params": params}, codes, method="decode"))


@functools.partial(jax.jit, static_argnums=0)
def _features(module: nn.Module, params: Any, images: jax.Array) -> jax.Array:
    return module.apply({"params": params}, images)


def _in_chunks(one: Callable, module: Any, params: Any, items: np.ndarray, chunk: int) -> Any:
    """The last chunk is filled up, so that `one` compiles once."""
    params, chunk, parts = jax.device_put(params), min(chunk, len(items)), []
    for start in range(0, len(items), chunk):
        some = np.asarray(items[start : start + chunk])
        filled = np.resize(some, (chunk, *some.shape[1:]))
        parts.append(np.asarray(one(module, params, filled))[: len(some)])
    return np.concatenate(parts)


def encode_images(
    module: tokenizer.Tokenizer, params: Any, images_NxHxWxC: np.ndarray, chunk: int = 0
) -> np.ndarray:
    """uint8 images -> int32 codes (N, L), `chunk` images at a time (0: as memory allows)."""
    chunk = chunk or images_at_once(*images_NxHxWxC.shape[1:3])
    return _in_chunks(_encode, module, params, images_NxHxWxC, chunk)


def decode_codes(
    module: tokenizer.Tokenizer, params: Any, codes_NxL: np.ndarray, chunk: int = 0
) -> np.ndarray:
    """Codes -> uint8 images (N, H, W, C), `chunk` images at a time (0: as memory allows)."""
    codes = np.asarray(codes_NxL)
    chunk = chunk or images_at_once(codes.shape[1], module.downsample**2)
    return _in_chunks(_decode, module, params, codes, chunk)


def teacher_features(module: nn.Module, params: Any, images_NxHxWxC: np.ndarray) -> np.ndarray:
    """float32 (N, L, Z): what the teacher says of each image, computed once."""
    chunk = max(1, images_at_once(*images_NxHxWxC.shape[1:3]) // 8)
    return _in_chunks(_features, module, params, images_NxHxWxC, chunk)
