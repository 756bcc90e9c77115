"""The patch codebook of small data sets: fitting it by k-means, keeping it in a file."""

import os
from typing import Any

import numpy as np
from flax import traverse_util

from mirai_jax.models import tokenizer
from mirai_jax.utils import files, paths
from mirai_jax.utils.errors import ConfigError, first_line

# K-means over more patches than this changes the codebook's error by under a percent.
_PATCHES_FITTED = 200_000


def fit_patch_codebook(
    images_NxHxWxC: np.ndarray, *, patch: int, vocab_size: int, seed: int
) -> dict[str, np.ndarray]:
    """Fits the parameters of `tokenizer.PatchCodebook` by k-means.

    The same images and seed give the same codebook, bit for bit, on the same machine. Codes are
    numbered from the darkest prototype to the brightest.

    Args:
        images_NxHxWxC: uint8; height and width are multiples of `patch`, in pixels.
        seed: chooses the patches fitted and where k-means starts.

    Returns:
        {'codebook': float32 (vocab_size, patch * patch * C)}, in the units of images in [-1, 1].

    Raises:
        ConfigError: fewer distinct patches than `vocab_size`.
    """
    patches = tokenizer.unfold(images_NxHxWxC, patch)
    patches = patches.reshape(-1, patches.shape[-1])
    rng = np.random.RandomState(seed)  # its stream never changes between numpy versions
    some = patches
    if len(patches) > _PATCHES_FITTED:
        some = patches[rng.choice(len(patches), _PATCHES_FITTED, replace=False)]
    distinct, counts = _count_distinct(some)
    if len(distinct) < vocab_size and some is not patches:
        distinct, counts = _count_distinct(patches)
    if len(distinct) < vocab_size:
        raise ConfigError(
            f"model.vocab_size {vocab_size} is too large: the images have only "
            f"{len(distinct)} distinct {patch}x{patch} patches"
        )
    codebook = kmeans(tokenizer.to_unit(distinct), counts, vocab_size, rng.randint(2**31 - 1))
    order = np.argsort(codebook.mean(axis=1), kind="stable")
    return {"codebook": codebook[order]}


def _count_distinct(patches_NxP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows of uint8 patches and how often each occurs: most are blank, fit those once."""
    rows = np.ascontiguousarray(patches_NxP)
    whole = rows.view(f"V{rows.shape[1]}").ravel()
    distinct, counts = np.unique(whole, return_counts=True)
    return distinct.view(np.uint8).reshape(-1, rows.shape[1]), counts


def kmeans(points_NxP: np.ndarray, counts_N: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """The centres (clusters, P), float32, of points that occur `counts` times each; N >= clusters."""
    from sklearn.cluster import KMeans  # here: slow to import, and only a first run fits
    from threadpoolctl import threadpool_limits

    # One thread: several add up their partial sums in an order that varies from run to run.
    with threadpool_limits(1):
        fitted = KMeans(clusters, n_init=1, max_iter=40, random_state=seed).fit(
            points_NxP, sample_weight=counts_N
        )
    return fitted.cluster_centers_.astype(np.float32)


def save_params(path: str | os.PathLike[str], params: dict[str, Any]) -> None:
    """Saves a nested dict of arrays as .npz under names like 'a/b/kernel', whole or not at all."""
    with files.atomic_write(path) as file:
        np.savez(file, **traverse_util.flatten_dict(params, sep="/"))


def load_params(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads what `save_params` saved.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    try:
        with paths.local(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return traverse_util.unflatten_dict(dict(arrays), sep="/")
    except Exception as error:  # damaged bytes raise almost anything
        raise ConfigError(f"{path}: missing or damaged ({first_line(error)})") from error
