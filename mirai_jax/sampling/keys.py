"""Random keys of images: a table of purposes, whose numbers never change.

The key of image i is `fold_in(fold_in(key(seed), purpose), i)`, whatever batch the image is in.
"""

import jax
import numpy as np

from mirai_jax.sampling import sampler

# Labels may share a number with tokens: those draw from the image's key, these from
# `fold_in(key, position)`.
SAMPLES = 0  # tokens of `mirai_jax.sample`
LABELS = 1  # its random labels
GRID = 1  # tokens of the grids that a run draws while it trains
CLASSIFIED = 2  # tokens of the samples that a classifier judges at a run's end


def image_keys(seed: int, purpose: int, indices: np.ndarray | jax.Array) -> jax.Array:
    """Typed PRNG keys of the images `indices`, one an image."""
    return sampler.image_keys(jax.random.fold_in(jax.random.key(seed), purpose), indices)
