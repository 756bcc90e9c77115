"""Dropout that draws four elements from each call of the random generator.

JAX's masks take one call of Threefry, two words of 32 bits, for every element. By arithmetic that is 6% of
a train step of GPT-B on an H100; here each half of each word decides an element.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.random import threefry2x32_p


class Dropout(nn.Module):
    """As nn.Dropout, on exactly where there is a "dropout" rng; its mask may be kept (REMAT)."""

    rate: float

    @nn.compact
    def __call__(self, x):
        if not self.rate or not self.has_rng("dropout"):
            return x
        mask = keep_mask(self.make_rng("dropout"), self.rate, x.shape)
        return jnp.where(checkpoint_name(mask, "mask"), x / (1 - self.rate), 0)


def keep_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """Which elements stay: each with probability 1 - rate, to within 2 ** -17, by itself.

    Args:
        key: a typed PRNG key; any other generator than JAX's default is asked once an element.
        rate: in [0, 1).
        shape: of two dimensions or more. No mesh changes what is drawn.

    Returns:
        bool, of that shape.
    """
    if str(jax.random.key_impl(key)) != "threefry2x32":
        return jax.random.bernoulli(key, 1 - rate, shape)
    *batch, length, width = shape
    calls = (*batch, -(-length // 4), width)  # a call's four elements are rows apart
    row = jnp.zeros(calls, jnp.uint32)
    for axis, size in enumerate(calls[:-1]):
        row = row * size + jax.lax.broadcasted_iota(jnp.uint32, calls, axis)
    column = jax.lax.broadcasted_iota(jnp.uint32, calls, len(calls) - 1)
    words = threefry2x32_p.bind(*jax.random.key_data(key), row, column)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    # The barriers are for GPUs. Without the first XLA calls the generator for each of the four ...
    masks = jax.lax.optimization_barrier([half < round((1 - rate) * 2**16) for half in halves])
    mask = jnp.concatenate(masks, axis=-2)[..., :length, :]
    # ... and without the second it joins them where they are applied, no longer in one pass with the
    # sums of the norm that follows.
    return jax.lax.optimization_barrier(mask)
