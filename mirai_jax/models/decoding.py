"""KV-cached decoding: the generator one position at a time, for sampling.

Memory bounds a step, which reads every weight once and computes little with it. Hence `prepare`
unstacks the weights by block and casts them to the compute dtype, once for a batch of sequences (a
slice of the stack in the loop over tokens would copy it at each). Keys and values (kv_cache.py) are kept
by block, and are only as long as a segment of positions needs (`segments`).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from mirai_jax.models import kv_cache
from mirai_jax.models.generator import Block, Generator, GeneratorConfig

Cache = tuple[kv_cache.Cache, ...]  # of each block

_SEGMENTS = 4  # steps read 5/8 of a whole cache on average; more segments compile longer for little
_SHORTEST = 64  # positions of a segment: shorter ones are not worth a compilation


def prepare(config: GeneratorConfig, params: Any) -> Any:
    """The parameters for `decode`: 'layers' is a tuple with one tree for each block."""
    dtype = jnp.dtype(config.dtype)

    def cast(path: tuple, x: jax.Array) -> jax.Array:
        return x.astype(dtype) if path[-1].key == "kernel" else x  # norms and tables stay float32

    params = jax.tree_util.tree_map_with_path(cast, params)
    block = lambda i: jax.tree.map(lambda w: w[i], params["layers"])
    return {**params, "layers": tuple(block(i) for i in range(config.num_layers))}


def segments(length: int) -> list[tuple[int, int]]:
    """Consecutive ranges [start, stop) of positions; each range uses a cache of `stop` places."""
    size = max(_SHORTEST, math.ceil(length / _SEGMENTS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def heads_in_row(config: GeneratorConfig, platform: str) -> int:
    """How many heads a row of the cache should hold on a platform ('cpu', 'gpu', 'tpu')."""
    return kv_cache.heads_in_row(config.num_heads, config.head_dim, platform)


def empty_cache(
    config: GeneratorConfig,
    batch_size: int,
    places: int,
    heads_in_row: int = 1,
    dtype: str = "model",
) -> Cache:
    """Zero keys and values for `places` positions, in a dtype of kv_cache.DTYPES."""
    shape = batch_size, config.num_heads, places, config.head_dim
    dtype = config.dtype if dtype == "model" else dtype
    return (kv_cache.empty(shape, heads_in_row, dtype),) * config.num_layers


def grow(cache: Cache, places: int) -> Cache:
    """The cache with room for `places` positions."""
    return tuple(kv_cache.grow(of_block, places) for of_block in cache)


def decode(
    config: GeneratorConfig,
    prepared: Any,
    codes_B: jax.Array,
    labels_B: jax.Array,
    cache: Cache,
    position: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Consumes one position.

    Args:
        config: of the generator.
        prepared: its parameters, from `prepare`.
        codes_B: int, the tokens just drawn (ignored at position 0).
        labels_B: int, classes (used only at position 0).
        cache: keys and values of earlier positions, with room for this one.
        position: int scalar, the sequence position to consume.

    Returns:
        logits (B, V) float32 for the token at `position`, and the cache with this position added.
    """
    model = Generator(config)
    x_BxD = model.apply({"params": prepared}, codes_B, labels_B, position, method="embed_one")
    carry, caches, block = (x_BxD[:, None], (), position), [], Block(config)
    layers = zip(prepared["layers"], cache, strict=True)
    for i, (params, of_block) in enumerate(layers, start=1):
        carry, new = block.apply({"params": params}, carry, (i, of_block))
        caches.append(new)
    logits = model.apply({"params": prepared}, carry[0][:, 0], method="head")
    return logits.astype(jnp.float32), tuple(caches)
