"""Does it copy? The training images that are nearest to samples, in the features of a network.

A sample is called a copy if it is nearer to a training image than all but COMMON of the real images
that were not trained on are. So of a generator that draws as nature does about that share is called so,
and near duplicates within the data set do not count against it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mirai_jax.evaluation import metrics
from mirai_jax.evaluation.image_streams import ImageStream
from mirai_jax.evaluation.network import Network
from mirai_jax.utils import pictures

COMMON = 0.01  # of the real images are as near to a training image as a copy
_SHOWN, _NEIGHBOURS = 10, 3  # rows of the picture, and training images in each


@dataclasses.dataclass(frozen=True)
class Nearest:
    """The training images nearest to each of N images, the nearest first."""

    squared: np.ndarray  # float64 (N, k), distances
    indices: np.ndarray  # int64 (N, k), their numbers


def nearest(
    network: Network, training: ImageStream, several: Sequence[np.ndarray], k: int = _NEIGHBOURS
) -> list[Nearest]:
    """For each set of features (N, D) its nearest training images; these are read once.

    Memory does not grow with the number of training images.
    """
    found = [Nearest(np.full((len(f), k), np.inf), np.zeros((len(f), k), int)) for f in several]
    start = 0
    for images in training.chunks(network.batch):
        features = network(images)[0]
        numbers = start + np.arange(len(features))
        start += len(features)
        for one, mine in zip(found, several, strict=True):
            for rows, squared in metrics.squared_distances(mine, features):
                squared = np.concatenate([one.squared[rows], squared], axis=1)
                candidates = np.broadcast_to(numbers, (len(squared), len(numbers)))
                candidates = np.concatenate([one.indices[rows], candidates], axis=1)
                best = np.argsort(squared, axis=1, kind="stable")[:, :k]
                one.squared[rows] = np.take_along_axis(squared, best, axis=1)
                one.indices[rows] = np.take_along_axis(candidates, best, axis=1)
    return found


def judge(samples: Nearest, real: Nearest) -> dict[str, float | list[int]]:
    """What is written of the samples: the share of copies and of identical images, and which they are.

    Args:
        real: of the real images that were not trained on.
    """
    distances, usual = np.sqrt(samples.squared[:, 0]), np.sqrt(real.squared[:, 0])
    limit = float(np.quantile(usual, COMMON))
    copies = np.flatnonzero(distances < limit)
    return {
        "share": len(copies) / len(distances),
        "identical": float((distances == 0).mean()),
        "below": limit,
        "median_distance": float(np.median(distances)),
        "median_distance_of_real": float(np.median(usual)),
        "samples": copies[np.argsort(distances[copies], kind="stable")][:100].tolist(),
    }


def picture(samples: ImageStream, training: ImageStream, found: Nearest) -> np.ndarray:
    """uint8 (height, width, 3): the samples nearest to a training image, and those images beside them."""
    rows = np.argsort(found.squared[:, 0], kind="stable")[:_SHOWN]
    mine = _chosen(samples, rows.tolist())
    theirs = _chosen(training, found.indices[rows].ravel().tolist())
    beside = np.split(theirs, len(rows))
    tiles = np.concatenate(
        [np.concatenate([m[None], t]) for m, t in zip(mine, beside, strict=True)]
    )
    names = [f"{row}: {np.sqrt(found.squared[row, 0]):.3g}" for row in rows]
    return pictures.sample_grid(tiles, names)


def _chosen(stream: ImageStream, wanted: list[int]) -> np.ndarray:
    """Some images of a stream, in the order of `wanted`."""
    found, start = {}, 0
    for images in stream.chunks(256):
        for index in set(wanted) & set(range(start, start + len(images))):
            found[index] = images[index - start].copy()
        start += len(images)
        if len(found) == len(set(wanted)):
            break
    return np.stack([found[index] for index in wanted])
