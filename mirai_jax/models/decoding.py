"""KV-cached decoding: the generator one position at a time, as sampling needs it.

Each step reads every weight once and does little with it, so that memory bounds it. What is laid out
for that: weights block by block, in the compute dtype (`prepare`, once for a batch of sequences: in the
loop over tokens a slice of the stack would copy it at each); keys and values block by block, heads
leading, only as long as the positions that are valid soon (`segments`).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from mirai_jax.models.generator import Block, Generator, GeneratorConfig

# Of each block: (k, v), each (B, H, T, d) in the compute dtype.
Cache = tuple[tuple[jax.Array, jax.Array], ...]

_SEGMENTS = 4  # 5/8 of a whole cache is read on average; more segments compile longer for little
_SHORTEST = 64  # positions of a segment: fewer are not worth a compilation


def prepare(config: GeneratorConfig, params: Any) -> Any:
    """The generator's parameters for `decode`: 'layers' is a tuple with a tree a block."""
    dtype = jnp.dtype(config.dtype)

    def cast(path: tuple, x: jax.Array) -> jax.Array:
        return x.astype(dtype) if path[-1].key == "kernel" else x  # norms and tables stay float32

    params = jax.tree_util.tree_map_with_path(cast, params)
    layers = tuple(
        jax.tree.map(lambda w: w[i], params["layers"])  # noqa: B023 (used at once)
        for i in range(config.num_layers)
    )
    return {**params, "layers": layers}


def segments(length: int) -> list[tuple[int, int]]:
    """Runs [start, stop) of positions, in order; those of one share a cache of `stop` places."""
    size = max(_SHORTEST, math.ceil(length / _SEGMENTS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def empty_cache(config: GeneratorConfig, batch_size: int, places: int) -> Cache:
    """Zero keys and values for so many positions."""
    zeros = jnp.zeros((batch_size, config.num_heads, places, config.head_dim), config.dtype)
    return tuple((zeros, zeros) for _ in range(config.num_layers))


def grow(cache: Cache, places: int) -> Cache:
    """The cache with room for `places` positions."""

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, places - x.shape[2]), (0, 0)))

    return jax.tree.map(pad, cache)


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
        prepared: its parameters, as `prepare` gives them.
        codes_B: int, the token just drawn (ignored at position 0).
        labels_B: int, classes (used at position 0 alone).
        cache: keys and values of the positions before; it must have room for this one.
        position: int scalar, the sequence position to consume.

    Returns:
        logits (B, V) float32 for the token at `position`, and the cache with it added.
    """
    model = Generator(config)
    x_BxD = model.apply({"params": prepared}, codes_B, labels_B, position, method="embed_one")
    carry, caches = (x_BxD[:, None], (), position), []
    block = Block(config)
    for i, (params, cache_of_block) in enumerate(
        zip(prepared["layers"], cache, strict=True), start=1
    ):
        carry, new = block.apply({"params": params}, carry, (i, cache_of_block))
        caches.append(new)
    logits = model.apply({"params": prepared}, carry[0][:, 0], method="head")
    return logits.astype(jnp.float32), tuple(caches)
