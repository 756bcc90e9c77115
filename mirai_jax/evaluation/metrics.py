"""Fréchet distance, Inception Score, precision and recall, of features: NumPy, in float64.

The definitions are those of ADM's evaluator (openai/guided-diffusion, evaluations/evaluator.py);
each docstring tells where that program's rounding, or its way with degenerate input, differs.
Memory beyond the arguments does not grow with the number of images times their width.
"""

from collections.abc import Iterator

import numpy as np

from mirai_jax.utils.errors import DataError

_ROWS = 2048  # images at a time; a square of distances between as many is 32 MiB
_LARGEST = 1e100  # in magnitude; squares of features, and their sums, must not overflow
_SCORE_ROWS = 5000  # ADM's `split_size`
_EPS = np.finfo(np.float64).eps
_TINY = np.finfo(np.float64).tiny


class Moments:
    """Mean and covariance of a stream of features, in O(width^2) memory.

    Batches of any sizes, and several `Moments` merged, give the same up to rounding: each batch is
    centred on its own mean before it is squared (Chan, Golub and LeVeque), so a large common offset
    costs no digits.
    """

    def __init__(self):
        self._count = 0
        self._mean = self._scatter = None  # the scatter is the sum of (x - mean) (x - mean)^T

    def add(self, features_BxD: np.ndarray) -> None:
        """Takes in B images (0 or more). Each call costs a pass over width x width.

        Raises:
            DataError: another rank or width than before, NaN or infinite features; nothing was
                taken in.
        """
        features = _matrix("features", features_BxD)
        self._expect(features.shape[1])
        for rows in _blocks(len(features)):
            block = features[rows].astype(np.float64)
            mean = block.mean(axis=0)
            block -= mean
            block = np.concatenate([block, self._join(len(block), mean)[None]])
            self._scatter += block.T @ block

    def merge(self, other: "Moments") -> None:
        """Takes in all images of `other`, which stays as it is.

        Raises:
            DataError: `other` is of another width.
        """
        if other._count:
            self._expect(len(other._mean))
            between = self._join(other._count, other._mean)
            self._scatter += other._scatter + np.outer(between, between)

    @property
    def count(self) -> int:
        """How many images were taken in."""
        return self._count

    @property
    def mean(self) -> np.ndarray:
        """float64 (D,). Raises DataError without an image."""
        if not self._count:
            raise DataError("a mean needs 1 image or more, there are 0")
        return self._mean.copy()

    @property
    def covariance(self) -> np.ndarray:
        """float64 (D, D), normalised by count - 1 as `np.cov`. Raises DataError below 2 images."""
        if self._count < 2:
            raise DataError(f"a covariance needs 2 images or more, there are {self._count}")
        return self._scatter / (self._count - 1)

    def warning(self) -> str | None:
        """One line if there are too few images for a covariance of full rank, else None."""
        if not self._count or self._count > len(self._mean):
            return None
        return (
            f"{self._count} images are too few for {len(self._mean)} dimensions: the covariance "
            f"is singular and a Fréchet distance from it biased; take {len(self._mean) + 1} or "
            "more, and compare only distances between equally many images"
        )

    def _expect(self, width: int) -> None:
        if self._mean is None:
            self._mean, self._scatter = np.zeros(width), np.zeros((width, width))
        elif len(self._mean) != width:
            raise DataError(f"features are {width} wide, those before are {len(self._mean)} wide")

    def _join(self, count: int, mean_D: np.ndarray) -> np.ndarray:
        """Moves count and mean on; the outer square of what it returns goes into the scatter."""
        total = self._count + count
        split_outputs = mean_D - self._mean
        between = split_outputs * np.sqrt(self._count * count / total)
        self._mean += split_outputs * (count / total)
        self._count = total
        return between


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

    Returns:
        A distance of 0 or more.

    Raises:
        DataError: shapes that do not fit, NaN, or matrices that are no covariances.
    """
    means, factors, trace = [], [], 0.0
    for which, mean, covariance in (("first", mean1_D, cov1_DxD), ("second", mean2_D, cov2_DxD)):
        covariance = _matrix(f"the {which} covariance", covariance).astype(np.float64)
        mean = np.asarray(mean)
        if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
            raise DataError(
                f"the {which} mean is {mean.shape} and its covariance {covariance.shape}: "
                "allowed are (width,) and (width, width)"
            )
        means.append(_matrix(f"the {which} mean", mean[None])[0].astype(np.float64))
        factors.append(_factor(which, covariance))
        trace += np.trace(covariance)
    if len(means[0]) != len(means[1]):
        raise DataError(
            f"statistics are {len(means[0])} and {len(means[1])} wide: must be the same"
        )
    root_trace = np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()
    split_outputs = means[0] - means[1]
    return max(0.0, float(split_outputs @ split_outputs + trace - 2 * root_trace))


def _factor(which: str, covariance_DxD: np.ndarray) -> np.ndarray:
    """A (D, rank) with A A^T = the covariance."""
    allowed = 1e-4 * np.abs(covariance_DxD).max()  # of rounding: statistics may be float32
    values, vectors = np.linalg.eigh(covariance_DxD)
    if np.abs(covariance_DxD - covariance_DxD.T).max() > allowed or values[0] < -allowed:
        raise DataError(f"the {which} covariance is not symmetric and positive semidefinite")
    # Below this, float64 cannot tell an eigenvalue from zero.
    some = values > len(values) * _EPS * values[-1]
    return vectors[:, some] * np.sqrt(values[some])


def inception_score(probabilities_NxC: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp(mean KL(p(class | image) || p(class))), as ADM, and how it varies.

    Args:
        probabilities_NxC: each image's class probabilities, in the order of the images.
        splits: parts for the deviation.

    Returns:
        score: the mean over consecutive parts of 5,000 images, the last one with the rest, each
            weighing the same. (So ADM: an odd rest lowers the score; evaluate multiples of 5,000.)
        deviation: the standard deviation over `splits` consecutive parts, as equal as can be (at
            most as many as images). Of 50,000 images, 10 are the very parts of the score.
        ADM computes in float32, and NaN where a probability is 0; here that term is 0, its limit.

    Raises:
        DataError: fewer than 2 images, NaN, rows that are no probabilities.
    """
    probabilities = _matrix("probabilities", probabilities_NxC)
    count = len(probabilities)
    if count < 2:
        raise DataError(f"an Inception Score needs 2 images or more, there are {count}")
    if splits < 1:
        raise DataError(f"splits {splits} is out of range: allowed is 1 or more")
    wrong = 0
    for rows in _blocks(count):
        block = probabilities[rows].astype(np.float64)
        wrong += np.count_nonzero((block.min(axis=1) < 0) | (np.abs(block.sum(axis=1) - 1) > 1e-3))
    if wrong:
        raise DataError(
            f"probabilities of {wrong} of {count} images are negative or do not add up to 1"
        )
    scores = [_score(probabilities[i : i + _SCORE_ROWS]) for i in range(0, count, _SCORE_ROWS)]
    splits = min(splits, count)
    edges = [count * i // splits for i in range(splits + 1)]
    components = [_score(probabilities[i:j]) for i, j in zip(edges, edges[1:], strict=False)]
    return float(np.mean(scores)), float(np.std(components))


def _score(probabilities_NxC: np.ndarray) -> float:
    """Of one part. The mean divergence is the mean's entropy less the mean entropy."""
    sums, negative_entropy = np.zeros(probabilities_NxC.shape[1]), 0.0
    for rows in _blocks(len(probabilities_NxC)):
        block = probabilities_NxC[rows].astype(np.float64)
        sums += block.sum(axis=0)
        negative_entropy += _p_log_p(block)
    return float(
        np.exp(negative_entropy / len(probabilities_NxC) - _p_log_p(sums / len(probabilities_NxC)))
    )


def _p_log_p(p: np.ndarray) -> float:
    return float(np.sum(p * np.log(np.maximum(p, _TINY))))


def precision_recall(
    features_real: np.ndarray, features_fake: np.ndarray, k: int = 3
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019), by comparing every pair.

    An image lies on the manifold of a set if its distance to some image of that set is at most
    (equality included) that image's distance to its k-th nearest neighbour in the set, itself
    excluded. Precision is the fraction of the fake images on the real manifold, recall that of the
    real images on the fake one. All images count; the usual amounts are 10,000 real ones and ADM's
    50,000 fake ones.

    ADM rounds squared distances to float16 unless one overflows; here every decision is that of the
    float64 sum of squared differences, so an ADM figure can differ in the third decimal.

    Args:
        features_real: (N, D).
        features_fake: (M, D).
        k: 1 or more.

    Returns:
        (precision, recall), each in [0, 1].

    Raises:
        DataError: wrong ranks, different widths, NaN, k images or fewer in a set.
    """
    real = _matrix("real features", features_real)
    fake = _matrix("fake features", features_fake)
    if real.shape[1] != fake.shape[1]:
        raise DataError(
            f"real features are {real.shape[1]} wide, fake ones {fake.shape[1]}: must be the same"
        )
    if k < 1:
        raise DataError(f"k {k} is out of range: allowed is 1 or more")
    for name, features in (("real", real), ("fake", fake)):
        if len(features) <= k:
            raise DataError(
                f"{name} features are of {len(features)} images: k {k} needs {k + 1} or more"
            )
    centre = real.mean(axis=0, dtype=np.float64)
    real_radii, fake_radii = _radii(real, centre, k), _radii(fake, centre, k)
    real_inside, fake_inside = np.zeros(len(real), bool), np.zeros(len(fake), bool)
    for i in _blocks(len(real)):
        real_block = real[i].astype(np.float64) - centre
        for j in _blocks(len(fake)):
            bounds = _lower_bounds(real_block, fake[j].astype(np.float64) - centre)
            _mark_inside(real_inside[i], bounds, real[i], fake[j], fake_radii[j])
            _mark_inside(fake_inside[j], bounds.T, fake[j], real[i], real_radii[i])
    return float(fake_inside.mean()), float(real_inside.mean())


# Distances are squared. A matrix product gives all of a block at once, but cancels: images that are
# the same may come out apart, and ties break at random. So it only gives bounds, which say where to
# compute the distance directly; what is decided is then what a direct loop over pairs decides.


def _lower_bounds(a_PxD: np.ndarray, b_QxD: np.ndarray) -> np.ndarray:
    """(P, Q), each at most what `_distances` gives, and less by its rounding error only.

    Rounding moves the sum of |a|^2, |b|^2 and -2ab, and the direct sum, each by less than
    (D + 8) eps (|a|^2 + |b|^2), and by D tiny below the normal range.
    """
    width = a_PxD.shape[1]
    shrink = 1 - 4 * (width + 8) * _EPS
    bounds = a_PxD @ b_QxD.T
    bounds *= -2
    bounds += shrink * np.einsum("pd,pd->p", a_PxD, a_PxD)[:, None]
    bounds += shrink * np.einsum("qd,qd->q", b_QxD, b_QxD) - 8 * width * _TINY
    return bounds


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances of rows, computed directly."""
    return np.square(a.astype(np.float64) - b.astype(np.float64)).sum(axis=-1)


def _radii(features_NxD: np.ndarray, centre_D: np.ndarray, k: int) -> np.ndarray:
    """Each image's squared distance to the k-th nearest other one, float64 (N,)."""
    count = len(features_NxD)
    kept = 2 * k + 2  # images of the lowest bounds: with some to spare, ties need no second look
    lowest, images = np.full((count, kept), np.inf), np.zeros((count, kept), int)

    def keep(rows: slice, columns: slice, bounds: np.ndarray) -> None:
        values = np.concatenate([lowest[rows], bounds], axis=1)
        among = np.argpartition(values, kept - 1, axis=1)[:, :kept]
        old = np.take_along_axis(images[rows], np.minimum(among, kept - 1), axis=1)
        images[rows] = np.where(among < kept, old, among - kept + columns.start)
        lowest[rows] = np.take_along_axis(values, among, axis=1)

    for i in _blocks(count):
        block = features_NxD[i].astype(np.float64) - centre_D
        for j in _blocks(count):
            if j.start < i.start:
                continue  # its mirror image was done
            bounds = _lower_bounds(block, features_NxD[j].astype(np.float64) - centre_D)
            if i == j:
                np.fill_diagonal(bounds, np.inf)
            else:
                keep(j, i, bounds.T)
            keep(i, j, bounds)

    near = np.stack([_by_blocks(features_NxD, images[:, n]) for n in range(kept)], axis=1)
    near[np.isinf(lowest)] = np.inf  # fewer others than that
    radii = np.partition(near, k - 1, axis=1)[:, k - 1]
    # All others are at least lowest.max() away. If that is less, they are needed as well.
    for row in np.flatnonzero((radii > 0) & (lowest.max(axis=1) < radii)):
        distances = _by_blocks(features_NxD, np.full(count, row))
        distances[row] = np.inf
        radii[row] = np.partition(distances, k - 1)[k - 1]
    return radii


def _by_blocks(features_NxD: np.ndarray, others_N: np.ndarray) -> np.ndarray:
    """Squared distance of each image n to image others_N[n]."""
    return np.concatenate(
        [
            _distances(features_NxD[rows], features_NxD[others_N[rows]])
            for rows in _blocks(len(features_NxD))
        ]
    )


def _mark_inside(
    inside_P: np.ndarray,
    bounds_PxQ: np.ndarray,
    points_PxD: np.ndarray,
    centres_QxD: np.ndarray,
    radii_Q: np.ndarray,
) -> None:
    """Sets inside_P where a point lies in one of the balls."""
    excess = bounds_PxQ - radii_Q
    best = excess.argmin(axis=1)
    rows = np.flatnonzero(~inside_P & (excess[np.arange(len(best)), best] <= 0))
    best = best[rows]
    inside_P[rows] = _distances(points_PxD[rows], centres_QxD[best]) <= radii_Q[best]
    for row in rows[~inside_P[rows]]:  # within rounding of a ball's surface
        some = np.flatnonzero(excess[row] <= 0)
        inside_P[row] = np.any(_distances(points_PxD[row], centres_QxD[some]) <= radii_Q[some])


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, _ROWS):
        yield slice(start, min(start + _ROWS, count))


def _matrix(name: str, array: np.ndarray) -> np.ndarray:
    """The array, checked: two axes, finite numbers."""
    array = np.ascontiguousarray(array)  # so that every sum along a row adds in one order
    if array.ndim != 2 or not array.shape[1] or not np.can_cast(array.dtype, np.float64):
        raise DataError(
            f"{name} of {array.dtype} {array.shape}: allowed are two axes of real numbers"
        )
    wrong = sum(
        np.count_nonzero(~(np.abs(array[rows].astype(np.float64)) <= _LARGEST))
        for rows in _blocks(len(array))
    )
    if wrong:
        raise DataError(f"{name}: {wrong} of {array.size} numbers are NaN, infinite or above 1e100")
    return array
