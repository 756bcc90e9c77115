"""Keys and values of the positions decoded so far, and attention of one query to them.

A step writes one position and reads all, so a position should lie in few pieces. A row of a TPU's memory
has 128 lanes: where heads have 64 channels, rows of one head would be half empty, and the compiler gives
the lanes to positions instead, so that a write touches every tile of the cache. On TPUs a row therefore
holds one position of several heads.

A cache of int8 holds whole numbers of at most 127 in size and, for each position and head, a scale. Not
the numbers but the scores and the weights of the positions are multiplied by it: those are fewer.

Shape letters: B batch, T places, H heads, d channels of a head, n heads in a row, R rows of queries.
"""

import functools
import math

import jax
import jax.numpy as jnp

DTYPES = ("model", "int8")

# Of a block: keys and values, both (B, H / n, T, n d); of int8 also their scales, float32 (B, H / n, n, T).
Cache = tuple[jax.Array, ...]

_LANES = 128
_ROWS = 8  # of the smallest product that a TPU gives to its matrix unit
# Positions of a tile, by bytes of a number. A TPU rewrites whole tiles in any case: its compiler fuses that
# with what makes the numbers, where a write of one position takes twice as long.
_TILES = {1: 32, 2: 16, 4: 16}


def heads_in_row(heads: int, head_dim: int, platform: str) -> int:
    """How many heads a row of the cache holds on a platform."""
    if platform != "tpu":
        return 1
    return max(
        n for n in range(1, _ROWS + 1) if n == 1 or heads % n == 0 and n * head_dim <= _LANES
    )


def empty(shape: tuple[int, int, int, int], heads_in_row: int, dtype: str) -> Cache:
    """Zero keys and values of a block, `shape` being (B, H, T, d)."""
    batch, heads, places, head_dim = shape
    groups, width = heads // heads_in_row, head_dim * heads_in_row
    zeros = jnp.zeros((batch, groups, places, width), dtype)
    scales = jnp.zeros((batch, groups, heads_in_row, places), jnp.float32)
    return (zeros, zeros, scales, scales) if zeros.dtype == jnp.int8 else (zeros, zeros)


def grow(cache: Cache, places: int) -> Cache:
    """The cache with room for `places` positions."""
    more, none = (0, places - cache[0].shape[2]), (0, 0)
    axes = ((none, none, more, none), (none, none, none, more))  # of numbers, of scales
    return tuple(jnp.pad(x, axes[i // 2]) for i, x in enumerate(cache))


def attend(
    q_BxHxd: jax.Array, k_BxHxd: jax.Array, v_BxHxd: jax.Array, cache: Cache, position: jax.Array
) -> tuple[jax.Array, Cache]:
    """Writes a key and a value at `position`, and attends to the cache up to it with one query.

    Returns:
        (B, H, d), and the cache.
    """
    in_row = q_BxHxd.shape[1] // cache[0].shape[1]
    return jax.lax.platform_dependent(
        q_BxHxd, k_BxHxd, v_BxHxd, cache, position,
        tpu=functools.partial(_attend, rows=_ROWS, tile=_TILES[cache[0].dtype.itemsize]),
        default=functools.partial(_attend, rows=in_row, tile=1),
    )  # fmt: skip


def _attend(q_BxHxd, k_BxHxd, v_BxHxd, cache, position, *, rows, tile):
    batch, heads, head_dim = q_BxHxd.shape
    _, groups, places, width = cache[0].shape
    row, f32 = (batch, groups, 1, width), {"preferred_element_type": jnp.float32}
    new, scales = (k_BxHxd, v_BxHxd), ()
    if cache[0].dtype == jnp.int8:
        new, new_scales = zip(*map(_to_int8, new), strict=True)
        here, of_row = jnp.arange(places) == position, (batch, groups, heads // groups, 1)
        scales = tuple(
            jnp.where(here, scale.reshape(of_row), old)
            for scale, old in zip(new_scales, cache[2:], strict=True)
        )
    # The write precedes the read: else the compiler copies the whole cache for the reader.
    k, v = (_write(x, n.reshape(row), position, tile) for x, n in zip(cache[:2], new, strict=True))

    def scaled(x_BxGxRxT, i):
        more = ((0, 0), (0, 0), (0, rows - heads // groups), (0, 0))  # rows without a query
        return x_BxGxRxT * jnp.pad(scales[i], more) if scales else x_BxGxRxT

    # Row r of the queries holds the query of the r-th head in a row of the cache, in that head's lanes,
    # and zeros in the others. XLA gives a product of one row to the vector unit of a TPU, which takes
    # more than twice as long; so more rows cost nothing there.
    own = jnp.arange(rows)[:, None] == jnp.arange(width) // head_dim
    q = jnp.where(own, q_BxHxd.reshape(row), 0)
    scores = jnp.einsum("bhrd,bhtd->bhrt", q, k.astype(q.dtype), **f32) * head_dim**-0.5
    scores = jnp.where(jnp.arange(places) <= position, scaled(scores, 0), -jnp.inf)
    weights = scaled(jax.nn.softmax(scores, axis=-1), 1).astype(q.dtype)
    out = jnp.einsum("bhrt,bhtd->bhrd", weights, v.astype(q.dtype), **f32)
    # The sum fuses with the product; taking rows would be a separate pass.
    out = jnp.where(own, out, 0).sum(axis=2).astype(q.dtype)
    return out.reshape(q_BxHxd.shape), (k, v, *scales)


def _to_int8(x_BxHxd):
    """Whole numbers from -127 to 127, and the scale of each head, float32 (B, H)."""
    x_BxHxd = x_BxHxd.astype(jnp.float32)
    scale_BxH = jnp.abs(x_BxHxd).max(axis=-1) / 127
    # The key of the class position is zero.
    whole = jnp.round(x_BxHxd / jnp.maximum(scale_BxH, 1e-30)[..., None])
    return whole.astype(jnp.int8), scale_BxH


def _write(places, new_BxGx1xW, position, tile):
    """With a tile of positions: reads those around `position` and writes them back."""
    batch, groups, count, width = places.shape
    tile = math.gcd(tile, count)
    if tile == 1:
        return jax.lax.dynamic_update_slice_in_dim(places, new_BxGx1xW, position, axis=2)
    tiles = places.reshape(batch, groups, -1, tile, width)
    old = jax.lax.dynamic_index_in_dim(tiles, position // tile, axis=2)
    here = (jnp.arange(tile) == position % tile)[:, None]
    new = jnp.where(here, new_BxGx1xW[:, :, None], old)
    tiles = jax.lax.dynamic_update_index_in_dim(tiles, new, position // tile, axis=2)
    return tiles.reshape(places.shape)
