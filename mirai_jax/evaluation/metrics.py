"""Fréchet distance, Inception Score, precision and recall, of features: NumPy, in float64.

The definitions are those of ADM's evaluator (openai/guided-diffusion, evaluations/evaluator.py);
each docstring names where that program's rounding, or its way with degenerate input, differs.
Memory beyond the arguments does not grow with the number of images times their width.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mirai_jax.evaluation.rows import Rows
from mirai_jax.utils.errors import DataError

_ROWS = 2048  # images at a time; a square of distances between as many is 32 MiB
_LARGEST = 1e100  # in magnitude; squares of features, and their sums, must not overflow
_SCORE_ROWS = 5000  # ADM's `split_size`
_EPS = np.finfo(np.float64).eps


class Moments:
    """Mean and covariance of a stream of features, in O(width^2) memory.

    Batches of any sizes give the same up to rounding: each batch is centred on its mean before it is
    squared (Chan, Golub and LeVeque), so a large common offset costs no digits.
    """

    def __init__(self):
        self.count = 0  # images added
        self._mean = self._scatter = None  # the scatter is the sum of (x - mean) (x - mean)^T

    def add(self, features_BxD: np.ndarray) -> None:
        """Adds B images (0 or more). Each call costs a pass over width x width.

        Raises:
            DataError: another width than before, NaN or infinite features; nothing was added.
        """
        features = _matrix("features", features_BxD)
        width = features.shape[1]
        if self._mean is None:
            self._mean, self._scatter = np.zeros(width), np.zeros((width, width))
        elif len(self._mean) != width:
            raise DataError(f"features are {width} wide, those before are {len(self._mean)} wide")
        for rows in _blocks(len(features)):
            block = features[rows].astype(np.float64)
            mean = block.mean(axis=0)
            block -= mean
            total = self.count + len(block)
            difference = mean - self._mean
            between = difference * np.sqrt(self.count * len(block) / total)
            self._mean += difference * (len(block) / total)
            self.count = total
            block = np.concatenate([block, between[None]])
            self._scatter += block.T @ block

    @property
    def mean(self) -> np.ndarray:
        """float64 (D,)."""
        return self._mean.copy()

    @property
    def covariance(self) -> np.ndarray:
        """float64 (D, D), normalised by count - 1 as `np.cov`. Raises DataError below 2 images."""
        if self.count < 2:
            raise DataError(f"a covariance needs 2 images or more, there are {self.count}")
        return self._scatter / (self.count - 1)

    def warning(self) -> str | None:
        """One line if there are too few images for a covariance of full rank, else None."""
        if not self.count or self.count > len(self._mean):
            return None
        return (
            f"{self.count} images are too few for {len(self._mean)} dimensions: the covariance "
            f"is singular and a Fréchet distance from it biased; take {len(self._mean) + 1} or "
            "more, and compare only distances between equally many images"
        )


def frechet_distance(
    mean1_D: np.ndarray, cov1_DxD: np.ndarray, mean2_D: np.ndarray, cov2_DxD: np.ndarray
) -> float:
    """|mean1 - mean2|^2 + trace(cov1 + cov2 - 2 sqrt(cov1 cov2)), of two Gaussians.

    ADM takes scipy's `sqrtm` of the product, which is not symmetric. With cov = A A^T, the trace of
    that root is the sum of the singular values of A1^T A2; this never forms a square that has to be
    rooted again, so it is exact to rounding for singular covariances too. Where `sqrtm` is not
    finite ADM adds 1e-6 to both diagonals, under the root alone: for every direction in which one
    covariance vanishes and the other is v, that lowers its distance by about 0.002 sqrt(v). Here
    nothing is added.

    Raises:
        DataError: NaN, or a matrix that is not a covariance.
    """
    covariances = [_matrix("covariance", c).astype(np.float64) for c in (cov1_DxD, cov2_DxD)]
    one, other = map(_factor, covariances)
    root_trace = np.linalg.svd(one.T @ other, compute_uv=False).sum()
    difference = np.subtract(mean1_D, mean2_D, dtype=np.float64)
    trace = sum(map(np.trace, covariances))
    return max(0.0, float(difference @ difference + trace - 2 * root_trace))


def distance(one: Any, other: Any) -> float:
    """`frechet_distance` of two things with a `mean` and a `covariance`, such as Moments."""
    return frechet_distance(one.mean, one.covariance, other.mean, other.covariance)


def distance_of_few(a_NxD: np.ndarray, b_MxD: np.ndarray) -> float:
    """`distance` of the moments of two sets of features, which never forms a D x D covariance.

    With x the features less their mean and R^T R = x^T x (QR), R^T / sqrt(N - 1) is such a factor A.
    """
    means, factors = [], []
    for features in (a_NxD, b_MxD):
        features = _matrix("features", features).astype(np.float64)
        means.append(features.mean(axis=0))
        scale = np.sqrt(len(features) - 1)
        factors.append(np.linalg.qr(features - means[-1], mode="r") / scale)
    between = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    apart = np.square(means[0] - means[1]).sum()
    return float(apart + sum(np.square(factor).sum() for factor in factors) - 2 * between)


def _factor(covariance_DxD: np.ndarray) -> np.ndarray:
    """A (D, rank) with A A^T = the covariance."""
    allowed = 1e-4 * np.abs(covariance_DxD).max()  # of rounding: statistics may be float32
    values, vectors = np.linalg.eigh(covariance_DxD)
    if np.abs(covariance_DxD - covariance_DxD.T).max() > allowed or values[0] < -allowed:
        raise DataError("a covariance is not symmetric and positive semidefinite")
    # Below this, an eigenvalue is rounding of zero.
    some = values > len(values) * _EPS * values[-1]
    return vectors[:, some] * np.sqrt(values[some])


def inception_score(probabilities_NxC: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp(mean KL(p(class | image) || p(class))), as in ADM's evaluator, and its deviation.

    Returns:
        score: the mean over consecutive parts of 5,000 images, the last one with the rest, all with
            the same weight. (ADM does the same: an odd rest lowers the score; evaluate multiples of
            5,000.)
        deviation: the standard deviation over `splits` consecutive parts of nearly equal size (at
            most one an image). For 50,000 images and 10 splits these are the parts of the score.
        ADM computes in float32, and gives NaN where a probability is 0; here that term is 0, its
        limit.

    Raises:
        DataError: wrong rank, or NaN.
    """
    probabilities = _matrix("probabilities", probabilities_NxC)
    count = len(probabilities)
    scores = [_score(probabilities[i : i + _SCORE_ROWS]) for i in range(0, count, _SCORE_ROWS)]
    splits = min(splits, count)
    edges = [count * i // splits for i in range(splits + 1)]
    parts = [_score(probabilities[i:j]) for i, j in zip(edges, edges[1:], strict=False)]
    return float(np.mean(scores)), float(np.std(parts))


def _score(probabilities_NxC: np.ndarray) -> float:
    """The score of one part. The mean divergence is the mean's entropy less the mean entropy."""
    sums, negative_entropy = np.zeros(probabilities_NxC.shape[1]), 0.0
    for rows in _blocks(len(probabilities_NxC)):
        block = probabilities_NxC[rows].astype(np.float64)
        sums += block.sum(axis=0)
        negative_entropy += _p_log_p(block)
    return float(
        np.exp(negative_entropy / len(probabilities_NxC) - _p_log_p(sums / len(probabilities_NxC)))
    )


def _p_log_p(p: np.ndarray) -> float:
    return float(np.sum(p * np.log(np.maximum(p, np.finfo(np.float64).tiny))))


def precision_recall(
    features_real: np.ndarray,
    features_fake: np.ndarray,
    k: int = 3,
    heartbeat: Callable[[str], object] = lambda what: None,
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019), by comparing every pair.

    An image lies on the manifold of a set if its distance to some image of that set is at most
    (equality included) that image's distance to its k-th nearest neighbour in the set, itself
    excluded. Precision is the fraction of the fake images on the real manifold, recall that of the
    real images on the fake one. All images count; the usual amounts are 10,000 real ones and ADM's
    50,000 fake ones.

    ADM rounds squared distances to float16 unless one overflows. They are float64 here, so an ADM
    figure can differ in the third decimal. At an exact tie of distances above 0, rounding decides.

    Args:
        features_real, features_fake: (N, D) and (M, D).
        k: 1 or more.
        heartbeat: takes a line now and then: of many images this takes an hour.

    Raises:
        DataError: wrong ranks, NaN, k images or fewer in a set.
    """
    real, fake = _matrix("real features", features_real), _matrix("fake features", features_fake)
    for name, features in (("real", real), ("fake", fake)):
        if not 0 < k < len(features):
            raise DataError(f"k is {k}, of {len(features)} {name} images; it must be less, from 1")
    sums = (real[rows].sum(axis=0, dtype=np.float64) for rows in _blocks(len(real)))
    centre = sum(sums) / len(real)
    real_radii, fake_radii = (_squared_radii(x, centre, k, heartbeat) for x in (real, fake))
    real_inside, fake_inside = np.zeros(len(real), bool), np.zeros(len(fake), bool)
    for i in _blocks(len(real)):
        heartbeat(f"precision and recall from {i.start} of {len(real)} on")
        for j in _blocks(len(fake)):
            squared = _squared_distances(real[i] - centre, fake[j] - centre)
            real_inside[i] |= (squared <= fake_radii[j]).any(axis=1)
            fake_inside[j] |= (squared <= real_radii[i][:, None]).any(axis=0)
    return float(fake_inside.mean()), float(real_inside.mean())


def _squared_radii(
    features_NxD: np.ndarray, centre_D: np.ndarray, k: int, heartbeat: Callable[[str], object]
) -> np.ndarray:
    """Each image's squared distance to the k-th nearest other one, float64 (N,)."""
    nearest = np.full((len(features_NxD), k), np.inf)
    for i in _blocks(len(features_NxD)):
        heartbeat(f"nearest neighbours from {i.start} of {len(features_NxD)} on")
        for j in _blocks(len(features_NxD)):
            squared = _squared_distances(features_NxD[i] - centre_D, features_NxD[j] - centre_D)
            if i == j:
                np.fill_diagonal(squared, np.inf)
            candidates = np.concatenate([nearest[i], squared], axis=1)
            nearest[i] = np.partition(candidates, k - 1, axis=1)[:, :k]
    return nearest.max(axis=1)


def _squared_distances(a_PxD: np.ndarray, b_QxD: np.ndarray) -> np.ndarray:
    """float64 (P, Q). What rounding may have made of 0 is 0: copies of an image are at no distance."""
    norms = np.square(a_PxD).sum(axis=1)[:, None] + np.square(b_QxD).sum(axis=1)
    squared = norms - 2 * (a_PxD @ b_QxD.T)
    squared[squared <= 4 * (a_PxD.shape[1] + 8) * _EPS * norms] = 0
    return squared


def squared_distances(a_NxD: np.ndarray, b_MxD: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields some rows and their squared distances, float64 (rows, M), to all of `b_MxD`."""
    a, b = _matrix("features", a_NxD), _matrix("features", b_MxD).astype(np.float64)
    centre = b.mean(axis=0)
    for rows in _blocks(len(a)):
        yield rows, _squared_distances(a[rows] - centre, b - centre)


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _ROWS):
        yield slice(start, min(start + _ROWS, count))


def _matrix(name: str, array: np.ndarray | Rows) -> np.ndarray | Rows:
    """The array, checked: two axes, finite numbers."""
    if not isinstance(array, Rows):
        array = np.ascontiguousarray(array)  # every sum along a row adds in the same order
    if array.ndim != 2 or not array.shape[1] or not np.can_cast(array.dtype, np.float64):
        raise DataError(f"{name} of {array.dtype} {array.shape}: allowed are two axes of reals")
    for rows in _blocks(len(array)):
        if not (np.abs(array[rows].astype(np.float64)) <= _LARGEST).all():
            raise DataError(f"{name}: some are NaN, infinite or above 1e100")
    return array
