"""Metrics against closed forms, scipy and direct loops, also for degenerate features."""

import tempfile
import tracemalloc
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from mirai_jax.evaluation import metrics
from mirai_jax.evaluation.metrics import (
    Moments,
    frechet_distance,
    inception_score,
    precision_recall,
)
from mirai_jax.evaluation.rows import Rows
from mirai_jax.utils.errors import DataError


def moments(*batches):
    made = Moments()
    for batch in batches:
        made.add(batch)
    return made


@pytest.fixture(params=[7, 2048])
def rows(request, monkeypatch):
    """Many blocks of images, and one."""
    monkeypatch.setattr(metrics, "_ROWS", request.param)


def distance(features1, features2):
    one, two = moments(features1), moments(features2)
    return frechet_distance(one.mean, one.covariance, two.mean, two.covariance)


def random_features(count, width, seed=0, spread=1.0):
    """Like a network's: none negative, correlated, of different scales."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) / np.sqrt(width)
    scales = np.exp(spread * np.random.default_rng(98).normal(size=width))
    return np.abs(random.normal(size=(count, width)) @ mixing + 0.1 * seed) * scales


# Moments


def assert_moments(made, features, tolerance=1e-10):
    """Equal to NumPy's two passes over everything, relative to each dimension's spread."""
    features = np.asarray(features, np.float64)
    spread = features.std(axis=0, ddof=1)
    assert made.count == len(features)
    assert made.mean.dtype == made.covariance.dtype == np.float64
    assert np.all(np.abs(made.mean - features.mean(axis=0)) <= tolerance * spread)
    error = made.covariance - np.cov(features, rowvar=False).reshape(made.covariance.shape)
    assert np.all(np.abs(error) <= tolerance * np.outer(spread, spread))
    np.testing.assert_array_equal(made.covariance, made.covariance.T)


@pytest.mark.parametrize("batch", [1, 64, 500])
@pytest.mark.parametrize("width", [1, 20])
def test_moments_do_not_depend_on_batches(rows, batch, width):
    features = random_features(500, width)
    made = moments(*(features[i : i + batch] for i in range(0, 500, batch)))
    assert_moments(made, features)
    backwards = moments(*(features[::-1][i : i + batch] for i in range(0, 500, batch)))
    assert_moments(backwards, features)


def test_moments_keep_their_digits_far_from_zero():
    # E[x^2] - E[x]^2 would lose ten of them.
    features = random_features(3000, 4, spread=0) + 1e5
    assert_moments(moments(*np.array_split(features, 11)), features, tolerance=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "uint8", "bfloat16"])
def test_moments_of_any_real_numbers(dtype):
    features = jnp.asarray(np.arange(24).reshape(8, 3) % 7, dtype)
    assert_moments(moments(features), np.arange(24).reshape(8, 3) % 7)


def test_a_refused_batch_changes_nothing():
    features = random_features(20, 3)
    made = moments(features)
    place = np.arange(60).reshape(20, 3) == 7
    bad = [np.where(place, number, features) for number in (np.nan, np.inf, 1e200)]
    bad += [np.zeros((2, 4)), np.zeros(3), np.zeros((2, 3), complex), np.full((2, 3), "x")]
    for wrong in bad:
        with pytest.raises(DataError, match="features"):
            made.add(wrong)
    assert_moments(made, features)


def test_too_few_images_for_moments():
    made = moments(np.ones((1, 3)))
    with pytest.raises(DataError, match="2 images or more"):
        _ = made.covariance
    made.add(np.eye(3)[:2])
    assert made.warning()
    assert np.linalg.matrix_rank(made.covariance) == 2
    made.add(np.eye(3)[2:])
    assert made.warning() is None


# Fréchet distance


def test_distance_of_independent_dimensions():
    deviations1, deviations2 = np.array([1e-7, 1e-3, 1.0, 0.0]), np.array([1e-6, 2.0, 1.0, 3.0])
    mean1, mean2 = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 0.0, 2.5, 3.0])
    value = frechet_distance(mean1, np.diag(deviations1**2), mean2, np.diag(deviations2**2))
    expected = 1 + 0.25 + np.sum((deviations1 - deviations2) ** 2)
    assert isinstance(value, float) and value == pytest.approx(expected, rel=1e-14)


def test_distance_by_hand():
    zero, one = np.zeros((2, 2)), np.eye(2)
    assert frechet_distance(np.zeros(2), zero, np.array([3.0, 4.0]), zero) == 25
    assert frechet_distance(np.zeros(2), zero, np.ones(2), one) == 4
    # The eigenvalues of the second are 3 and 1: (2 + 4) - 2 (sqrt(3) + 1).
    value = frechet_distance(np.zeros(2), one, np.zeros(2), np.array([[2.0, 1.0], [1.0, 2.0]]))
    assert value == pytest.approx(4 - 2 * np.sqrt(3), rel=1e-13)


def scipy_distance(features1, features2):
    mean1, mean2 = features1.mean(axis=0), features2.mean(axis=0)
    cov1, cov2 = np.cov(features1, rowvar=False), np.cov(features2, rowvar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of singular matrices
        root = scipy.linalg.sqrtm(cov1 @ cov2)
    assert np.isfinite(root).all()
    return np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2 - 2 * root.real)


@pytest.mark.parametrize(
    "counts, width, spread",
    [((400, 300), 40, 0.0), ((400, 300), 40, 1.5), ((2000, 70), 64, 2.0), ((66, 66), 65, 1.0)],
)
def test_distance_is_that_of_scipys_root(counts, width, spread):
    features = [random_features(n, width, seed, spread) for seed, n in enumerate(counts)]
    assert distance(*features) == pytest.approx(scipy_distance(*features), rel=1e-6)


def feature_distance(features1, features2):
    """From the centred features: no covariance, so nothing is squared and rooted again."""
    mean1, mean2 = features1.mean(axis=0), features2.mean(axis=0)
    one = (features1 - mean1) / np.sqrt(len(features1) - 1)
    two = (features2 - mean2) / np.sqrt(len(features2) - 1)
    roots = np.linalg.svd(one @ two.T, compute_uv=False)
    return np.sum((mean1 - mean2) ** 2) + np.sum(one**2) + np.sum(two**2) - 2 * np.sum(roots)


@pytest.mark.parametrize("counts", [(2, 3), (10, 300), (300, 10), (50, 60), (90, 91)])
def test_distance_with_fewer_images_than_dimensions(counts):
    one, two = (random_features(n, 90, seed) for seed, n in enumerate(counts))
    assert distance(one, two) == pytest.approx(feature_distance(one, two), rel=1e-10)


def test_distance_of_nearly_singular_covariances():
    # Some dimensions repeat others up to a part in a million, one is constant, one is dead.
    one, two = random_features(500, 30), random_features(400, 30, seed=1)
    for features in (one, two):
        features[:, 10:20] = features[:, :10] * (1 + 1e-6 * np.sin(features[:, 20:]))
        features[:, 28], features[:, 29] = 5.0, 0.0
    value = distance(one, two)
    assert value == pytest.approx(feature_distance(one, two), rel=1e-9)
    assert value == pytest.approx(scipy_distance(one, two), rel=1e-4)  # scipy's own error


@pytest.mark.parametrize("count", [2, 30, 61, 500])
def test_distance_of_identical_sets_is_zero(count):
    features = random_features(count, 60)
    shuffled = np.random.default_rng(1).permutation(features)
    for other in (features, shuffled, shuffled.astype(np.float64)):
        value = distance(features, other)
        assert 0 <= value <= 1e-11 * np.trace(moments(features).covariance)


def test_distance_of_statistics_kept_in_float32():
    one, two = moments(random_features(200, 25)), moments(random_features(20, 25, seed=1))
    exact = frechet_distance(one.mean, one.covariance, two.mean, two.covariance)
    kept = [x.astype(np.float32) for x in (one.mean, one.covariance, two.mean, two.covariance)]
    assert frechet_distance(*kept) == pytest.approx(exact, rel=1e-3)


def test_distance_refuses_what_is_not_a_covariance():
    asymmetric, indefinite = np.array([[[1.0, 0.5], [0.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]]])
    for wrong in (np.ones(2), np.full((2, 2), np.inf), asymmetric, indefinite, -np.eye(2)):
        with pytest.raises(DataError, match="covariance"):
            frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), wrong)


# Inception Score


def random_probabilities(count, classes, seed=0):
    logits = 2 * np.random.default_rng(seed).normal(size=(count, classes))
    weights = np.exp(logits)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def direct_score(probabilities):
    p = probabilities.astype(np.float64)
    return np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(axis=0))), axis=1)))


@pytest.mark.parametrize(
    "predictions, expected",
    [(np.eye(7, dtype=np.float32), 7), ([[0.2, 0.3, 0.5]], 1), ([[0.0, 0.0, 1.0]], 1)],
    ids=["certain of each", "unsure", "always the same"],
)
def test_score_is_the_number_of_classes_that_are_seen(predictions, expected):
    score, deviation = inception_score(np.tile(predictions, (30, 1)))
    assert score == pytest.approx(expected, rel=1e-12)
    assert deviation == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("count", [2, 13, 5000, 5001, 12_345])
def test_score_is_that_of_consecutive_parts(count):
    probabilities = random_probabilities(count, 4)
    score, deviation = inception_score(probabilities, splits=2)
    parts = [probabilities[i : i + 5000] for i in range(0, count, 5000)]
    assert score == pytest.approx(np.mean([direct_score(p) for p in parts]), rel=1e-12)
    halves = probabilities[: count // 2], probabilities[count // 2 :]
    expected = abs(direct_score(halves[0]) - direct_score(halves[1])) / 2
    assert deviation == pytest.approx(expected, rel=1e-9, abs=1e-13)


# Precision and recall


def direct_precision_recall(real, fake, k=3):
    """The definitions word for word, one distance at a time."""

    def squared(a, b):
        return np.sum((a.astype(np.float64) - b.astype(np.float64)) ** 2)

    def fraction_inside(points, centres):
        radii = [
            sorted(squared(c, other) for j, other in enumerate(centres) if j != i)[k - 1]
            for i, c in enumerate(centres)
        ]
        balls = list(zip(centres, radii, strict=True))
        return np.mean([any(squared(p, c) <= r for c, r in balls) for p in points])

    return fraction_inside(fake, real), fraction_inside(real, fake)


def assert_direct(real, fake, k=3):
    result = precision_recall(real, fake, k)
    assert result == pytest.approx(direct_precision_recall(real, fake, k), abs=1e-12)
    assert precision_recall(fake, real, k) == result[::-1]
    return result


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("width", [1, 2, 40])
def test_precision_and_recall_are_those_of_a_direct_loop(rows, k, width):
    real, fake = random_features(40, width), 1.5 * random_features(31, width, seed=1)
    result = assert_direct(real.astype(np.float32), fake.astype(np.float32), k)
    if width < 40:
        assert 0 < sum(result) < 2  # some inside, some outside


def test_precision_and_recall_of_copies(rows):
    real = np.repeat(random_features(6, 5), 4, axis=0)  # all radii are 0
    assert precision_recall(real, real) == (1, 1)
    assert_direct(np.repeat(random_features(9, 5), 3, axis=0), real)
    collapsed = np.tile(real[:1], (20, 1))
    assert precision_recall(real, collapsed) == (1, 4 / 24)
    assert precision_recall(collapsed, collapsed) == (1, 1)
    fake = random_features(31, 5, seed=1)
    assert_direct(random_features(40, 5), np.concatenate([fake, fake[:9], real[:10]]))


def test_the_smallest_sets():
    real, fake = random_features(4, 3), random_features(5, 3, seed=1)
    assert_direct(real, fake)
    assert_direct(real[:2], fake[:2], k=1)
    for few in ((real[:3], fake), (real, fake[:0]), (real, np.full_like(fake, np.nan))):
        with pytest.raises(DataError, match="real|fake"):
            precision_recall(*few)


@pytest.mark.parametrize("counts", [(3, 5), (9, 4), (30, 40)])
def test_the_distance_of_few_images_is_that_of_their_moments(counts):
    a, b = (random_features(n, 8, seed=n) for n in counts)
    b = 2 * b + 1
    expected = metrics.distance(moments(a), moments(b))
    assert metrics.distance_of_few(a, b) == pytest.approx(expected, rel=1e-9)


# Memory


def peak(function, *args):
    """Bytes at most held at a time, beyond what the arguments take."""
    tracemalloc.start()
    try:
        function(*args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_images(monkeypatch):
    monkeypatch.setattr(metrics, "_ROWS", 32)
    features = random_features(800, 64).astype(np.float32)
    assert peak(moments, features) < features.nbytes
    probabilities = random_probabilities(4000, 32)
    assert peak(inception_score, probabilities) < probabilities.nbytes / 4
    # Every distance at once is 5 MB.
    assert peak(precision_recall, features, features[:400].copy()) < 4 * features.nbytes


def test_many_features_are_not_in_memory():
    part = np.ones((1000, 2048), np.float32)

    def collect():
        rows = Rows()
        for _ in range(24):
            rows.add(part)
        return rows[23_000:]

    assert peak(collect) < 24 * part.nbytes / 1.5


@pytest.mark.parametrize("batch", [1, 33, 500])
def test_features_on_the_disk_give_the_same_digits(monkeypatch, batch):
    monkeypatch.setattr(metrics, "_ROWS", 32)
    arrays = random_features(300, 8), random_features(500, 8, seed=1), random_probabilities(400, 5)
    arrays = [array.astype(np.float32) for array in arrays]
    # In memory, and on the disk from 10 and from 1,000 bytes on.
    stored = [Rows(_file=file) for file in map(tempfile.SpooledTemporaryFile, (0, 10, 1000))]
    for array, rows in zip(arrays, stored, strict=True):
        for start in range(0, len(array), batch):
            rows.add(array[start : start + batch])
        np.testing.assert_array_equal(rows, array)
    values = [
        (precision_recall(real, fake), inception_score(p), moments(real).covariance.tolist())
        for real, fake, p in (arrays, stored)
    ]
    assert values[0] == values[1]
