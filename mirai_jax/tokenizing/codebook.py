"""Where the codebook starts: k-means over latents of the first images."""

from typing import Any

import jax
import numpy as np

from mirai_jax.data.pipeline import Batches
from mirai_jax.models.tokenizer import to_unit
from mirai_jax.models.vq import unit
from mirai_jax.tokenizing.step import Recipe
from mirai_jax.weights.patch_codebook import kmeans

_LATENTS_A_CODE = 16


def kmeans_start(recipe: Recipe, params: Any, batches: Batches, seed: int) -> np.ndarray:
    """Rows of unit norm, float32 (V, C): the centres of the latents that the encoder of `params` gives.

    The same on the same machine: k-means runs on one thread.
    """

    @jax.jit
    def latents(params: Any, images: jax.Array) -> jax.Array:
        found = recipe.module.apply({"params": params}, to_unit(images), method="latents")
        return unit(found).reshape(-1, recipe.network.code_width)

    vocab_size, found, count = recipe.network.vocab_size, [], 0
    iterator = iter(batches)
    try:
        while count < _LATENTS_A_CODE * vocab_size:
            found.append(np.asarray(latents(params, next(iterator)["image"])))
            count += len(found[-1])
    finally:
        iterator.close()
    rows = kmeans(np.concatenate(found), np.ones(count), vocab_size, seed)
    return np.asarray(unit(rows))
