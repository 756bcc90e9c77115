"""Metrics against closed forms, scipy and direct loops: on degenerate features above all."""

import tracemalloc
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mirai_jax.evaluation import metrics
from mirai_jax.evaluation.metrics import (
    Moments,
    frechet_distance,
    inception_score,
    precision_recall,
)
from mirai_jax.utils.errors import DataError


def moments(*batches):
    made = Moments()
    for batch in batches:
        made.add(batch)
    return made


def distance(features1, features2):
    one, two = moments(features1), moments(features2)
    return frechet_distance(one.mean, one.covariance, two.mean, two.covariance)


def random_features(count, width, seed=0, shard_activation=1.0):
    """Like a network's: none negative, correlated, of different scales."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) / np.sqrt(width)
    scales = np.exp(shard_activation * np.random.default_rng(98).normal(size=width))
    return np.abs(random.normal(size=(count, width)) @ mixing + 0.1 * seed) * scales


# Moments


def assert_moments(made, features, tolerance=1e-10):
    """Equal to NumPy's two passes over everything, relative to each dimension's spread."""
    features = np.asarray(features, np.float64)
    shard_activation = features.std(axis=0, ddof=1)
    assert made.count == len(features)
    assert made.mean.dtype == made.covariance.dtype == np.float64
    assert np.all(np.abs(made.mean - features.mean(axis=0)) <= tolerance * shard_activation)
    expected = np.cov(features, rowvar=False).reshape(made.covariance.shape)
    assert np.all(
        np.abs(made.covariance - expected)
        <= tolerance * np.outer(shard_activation, shard_activation)
    )
    np.testing.assert_array_equal(made.covariance, made.covariance.T)


def test_moments_by_hand():
    made = moments(np.array([[1.0, 0.0], [3.0, 4.0]]), np.array([[2.0, 2.0]]))
    np.testing.assert_allclose(made.mean, [2, 2], rtol=1e-15)
    np.testing.assert_allclose(made.covariance, [[1, 2], [2, 4]], rtol=1e-15)


@pytest.mark.parametrize("batch", [1, 7, 64, 500])
@pytest.mark.parametrize("width", [1, 20])
def test_moments_do_not_depend_on_batches(batch, width):
    features = random_features(500, width)
    made = moments(*(features[i : i + batch] for i in range(0, 500, batch)))
    assert_moments(made, features)
    backwards = moments(*(features[::-1][i : i + batch] for i in range(0, 500, batch)))
    assert_moments(backwards, features)


def test_moments_of_many_blocks(monkeypatch):
    monkeypatch.setattr(metrics, "_ROWS", 16)
    features = random_features(133, 5)
    assert_moments(moments(features), features)


def test_moments_keep_their_digits_far_from_zero():
    # E[x^2] - E[x]^2 would lose ten of them.
    features = random_features(3000, 4, shard_activation=0) + 1e5
    assert_moments(moments(*np.array_split(features, 11)), features, tolerance=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    features=hnp.arrays(
        np.float32,
        st.tuples(st.integers(2, 24), st.integers(1, 5)),
        elements=st.floats(-1000, 1000, width=32),
    ),
    cuts=st.lists(st.integers(0, 24), max_size=5),
    parts=st.integers(1, 3),
)
def test_moments_merge_as_they_add(features, cuts, parts):
    batches = np.split(features, sorted(min(cut, len(features)) for cut in cuts))
    merged = Moments()
    for part in range(parts):  # some of them without an image
        merged.merge(moments(*batches[part::parts]))
    assert merged.count == len(features)
    scale = 1 + np.abs(features).max()
    wide = features.astype(np.float64)
    np.testing.assert_allclose(merged.mean, wide.mean(axis=0), rtol=0, atol=1e-12 * scale)
    expected = np.cov(wide, rowvar=False).reshape(merged.covariance.shape)
    np.testing.assert_allclose(merged.covariance, expected, rtol=0, atol=1e-12 * scale**2)


def test_merging_leaves_the_other_as_it_was():
    one, two = moments(random_features(9, 3)), moments(random_features(8, 3, seed=1))
    before = two.covariance
    one.merge(two)
    one.add(random_features(5, 3, seed=2))
    np.testing.assert_array_equal(two.covariance, before)
    into = Moments()
    into.merge(two)
    into.add(random_features(5, 3, seed=2))
    np.testing.assert_array_equal(two.covariance, before)
    mean, covariance = one.mean, one.covariance
    mean += 1
    covariance += 1
    assert not np.any(one.mean == mean) and not np.any(one.covariance == covariance)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int32", "uint8", "bfloat16"])
def test_moments_of_any_real_numbers(dtype):
    features = jnp.asarray(np.arange(24).reshape(8, 3) % 7, dtype)
    assert_moments(moments(features), np.arange(24).reshape(8, 3) % 7)


def test_a_refused_batch_changes_nothing():
    features = random_features(20, 3)
    made = moments(features)
    bad = random_features(20, 3)
    bad[3, 1], bad[4, 0], bad[19, 2] = np.nan, np.inf, -np.inf
    with pytest.raises(DataError, match="features: 3 of 60 numbers are NaN, infinite"):
        made.add(bad)
    with pytest.raises(DataError, match="features are 4 wide, those before are 3 wide"):
        made.add(np.zeros((2, 4)))
    with pytest.raises(DataError, match="features are 4 wide, those before are 3 wide"):
        made.merge(moments(np.zeros((2, 4))))
    assert_moments(made, features)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64, np.complex64, np.int8, object, "U2", "M8[s]"]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
    )
)
def test_moments_take_a_matrix_or_say_what_is_wrong(array):
    made = Moments()
    try:
        made.add(array)
    except DataError as error:
        assert "\n" not in str(error) and made.count == 0
    else:
        assert array.ndim == 2 and made.count == len(array)
        assert np.isfinite(array.astype(np.float64)).all()


def test_too_few_images_for_moments():
    made = Moments()
    assert made.count == 0 and made.warning() is None
    with pytest.raises(DataError, match="a mean needs 1 image or more, there are 0"):
        _ = made.mean
    made.add(np.ones((1, 3)))
    with pytest.raises(DataError, match="a covariance needs 2 images or more, there are 1"):
        _ = made.covariance
    made.add(np.eye(3)[:2])
    assert "3 images are too few for 3 dimensions" in made.warning()
    assert "take 4 or more" in made.warning() and "\n" not in made.warning()
    assert np.linalg.matrix_rank(made.covariance) == 2
    made.add(np.eye(3)[2:])
    assert made.warning() is None


# Fréchet distance


def test_distance_of_numbers():
    # N(1, 4) and N(4, 25): 3^2 + (2 - 5)^2.
    value = frechet_distance(
        np.array([1.0]), np.array([[4.0]]), np.array([4.0]), np.array([[25.0]])
    )
    assert isinstance(value, float) and value == pytest.approx(18, rel=1e-14)


def test_distance_of_independent_dimensions():
    deviations1, deviations2 = np.array([1e-7, 1e-3, 1.0, 0.0]), np.array([1e-6, 2.0, 1.0, 3.0])
    mean1, mean2 = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 0.0, 2.5, 3.0])
    value = frechet_distance(mean1, np.diag(deviations1**2), mean2, np.diag(deviations2**2))
    expected = 1 + 0.25 + np.sum((deviations1 - deviations2) ** 2)
    assert value == pytest.approx(expected, rel=1e-14)


def test_distance_by_hand():
    # The eigenvalues of the second are 3 and 1: (2 + 4) - 2 (sqrt(3) + 1).
    value = frechet_distance(
        np.zeros(2), np.eye(2), np.zeros(2), np.array([[2.0, 1.0], [1.0, 2.0]])
    )
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
def test_distance_is_that_of_scipys_root(counts, width, shard_activation):
    features = [random_features(n, width, seed, shard_activation) for seed, n in enumerate(counts)]
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
    assert "images are too few for 90 dimensions" in (
        moments(one).warning() or moments(two).warning()
    )
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


def test_distance_of_points():
    zero, one = np.zeros((2, 2)), np.eye(2)
    assert frechet_distance(np.zeros(2), zero, np.array([3.0, 4.0]), zero) == 25
    assert frechet_distance(np.zeros(2), zero, np.ones(2), one) == 4


def test_distance_does_not_depend_on_order():
    one, two = random_features(200, 25), random_features(150, 25, seed=1)
    value = distance(one, two)
    assert distance(two, one) == pytest.approx(value, rel=1e-12)
    random = np.random.default_rng(0)
    dimensions = random.permutation(25)
    moved = distance(random.permutation(one)[:, dimensions], two[:, dimensions])
    assert moved == pytest.approx(value, rel=1e-12)
    assert distance(1e20 * one, 1e20 * two) == pytest.approx(1e40 * value, rel=1e-12)


def test_distance_of_statistics_kept_in_float32():
    one, two = moments(random_features(200, 25)), moments(random_features(20, 25, seed=1))
    exact = frechet_distance(one.mean, one.covariance, two.mean, two.covariance)
    kept = [x.astype(np.float32) for x in (one.mean, one.covariance, two.mean, two.covariance)]
    assert frechet_distance(*kept) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(
    "mean, covariance, message",
    [
        (np.zeros(3), np.eye(3), "statistics are 2 and 3 wide"),
        (np.zeros(3), np.eye(2), r"second mean is \(3,\) and its covariance \(2, 2\)"),
        (np.zeros((1, 2)), np.eye(2), r"second mean is \(1, 2\)"),
        (np.zeros(2), np.ones(2), r"second covariance of float64 \(2,\)"),
        (np.zeros(2), np.eye(2)[:1], r"its covariance \(1, 2\)"),
        (np.array([0, np.nan]), np.eye(2), "second mean: 1 of 2 numbers are NaN"),
        (np.zeros(2), np.full((2, 2), np.inf), "second covariance: 4 of 4 numbers are NaN, inf"),
        (np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), "second covariance is not symmetric"),
        (np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]]), "and positive semidefinite"),
        (np.zeros(2), -np.eye(2), "and positive semidefinite"),
    ],
)
def test_distance_refuses_what_are_no_statistics(mean, covariance, message):
    with pytest.raises(DataError, match=message) as caught:
        frechet_distance(np.zeros(2), np.eye(2), mean, covariance)
    assert "\n" not in str(caught.value)


# Inception Score


def random_probabilities(count, classes, seed=0):
    logits = 2 * np.random.default_rng(seed).normal(size=(count, classes))
    weights = np.exp(logits)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def direct_score(probabilities):
    p = probabilities.astype(np.float64)
    return np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(axis=0))), axis=1)))


def test_score_of_certainty_is_the_number_of_classes():
    score, deviation = inception_score(np.tile(np.eye(7, dtype=np.float32), (30, 1)))
    assert score == pytest.approx(7, rel=1e-12) and deviation == pytest.approx(0, abs=1e-12)


def test_score_of_one_prediction_is_one():
    for prediction in ([0.2, 0.3, 0.5], [0.0, 0.0, 1.0]):
        score, deviation = inception_score(np.tile(prediction, (40, 1)))
        assert score == pytest.approx(1, rel=1e-12) and deviation == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("count", [2, 13, 5000, 5001, 12_345])
def test_score_is_that_of_consecutive_parts(count):
    probabilities = random_probabilities(count, 4)
    score, deviation = inception_score(probabilities, splits=2)
    parts = [probabilities[i : i + 5000] for i in range(0, count, 5000)]
    assert score == pytest.approx(np.mean([direct_score(p) for p in parts]), rel=1e-12)
    halves = probabilities[: count // 2], probabilities[count // 2 :]
    expected = abs(direct_score(halves[0]) - direct_score(halves[1])) / 2
    assert deviation == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_of_50000_images_score_and_deviation_are_of_the_same_parts():
    probabilities = np.sort(random_probabilities(50_000, 3), axis=0)  # the order matters
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    scores = [direct_score(part) for part in np.split(probabilities, 10)]
    score, deviation = inception_score(probabilities)
    assert score == pytest.approx(np.mean(scores), rel=1e-12)
    assert deviation == pytest.approx(np.std(scores), rel=1e-9)


def test_a_probability_of_zero_is_the_limit_of_small_ones():
    # Half of the images are certain: mean (3/4, 1/4).
    probabilities = np.array([[1.0, 0.0], [0.5, 0.5]])
    certain = np.log(4 / 3)
    unsure = 0.5 * np.log(2 / 3) + 0.5 * np.log(2)
    assert inception_score(probabilities)[0] == pytest.approx(np.exp((certain + unsure) / 2))


@pytest.mark.parametrize(
    "probabilities, message",
    [
        (np.ones((1, 1)), "needs 2 images or more, there are 1"),
        (np.ones(5), r"probabilities of float64 \(5,\)"),
        (np.array([[1.0, 0.0], [np.nan, 1.0]]), "probabilities: 1 of 4 numbers are NaN"),
        (
            np.array([[1.5, -0.5], [0.0, 1.0], [0.2, 0.2]]),
            "of 2 of 3 images are negative or do not",
        ),
    ],
)
def test_score_refuses_what_are_no_probabilities(probabilities, message):
    with pytest.raises(DataError, match=message) as caught:
        inception_score(probabilities)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="splits 0 is out of range"):
        inception_score(np.eye(2), splits=0)


# Precision and recall


def direct_precision_recall(real, fake, k=3):
    """Every distance by itself, the definitions word for word."""

    def squared(a, b):
        return np.sum((a.astype(np.float64) - b.astype(np.float64)) ** 2)

    def fraction_inside(points, centres):
        radii = [
            sorted(squared(c, other) for j, other in enumerate(centres) if j != i)[k - 1]
            for i, c in enumerate(centres)
        ]
        inside = [
            any(squared(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points
        ]
        return np.mean(inside)

    return fraction_inside(fake, real), fraction_inside(real, fake)


def assert_direct(real, fake, k=3):
    result = precision_recall(real, fake, k)
    assert result == pytest.approx(direct_precision_recall(real, fake, k), abs=1e-12)
    assert precision_recall(fake, real, k) == result[::-1]
    return result


@pytest.fixture(params=[7, 2048])
def rows(request, monkeypatch):
    """Many blocks of images, and one."""
    monkeypatch.setattr(metrics, "_ROWS", request.param)


def test_precision_and_recall_by_hand():
    # Radii of the real ones, k=1: 1, 1, 4. Of the fake ones: 0.5, 0.5, 93.5.
    real = np.array([[0.0], [1.0], [5.0]])
    fake = np.array([[6.0], [6.5], [100.0]])
    # 6 and 6.5 are within 4 of 5; 1 and 5 are within 99 and 95 of 100: no, they are not.
    assert precision_recall(real, fake, k=1) == (2 / 3, 0)
    # All of the real ones are within 100 of 100 now, and 100 within none; 9 lies on a surface.
    assert precision_recall(real, np.array([[9.0], [0.0], [100.0]]), k=2)[1] == 1
    assert precision_recall(real, np.array([[9.0], [30.0], [100.0]]), k=1)[0] == 1 / 3


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("width", [1, 2, 40])
def test_precision_and_recall_are_those_of_a_direct_loop(rows, k, width):
    real, fake = random_features(40, width), 1.5 * random_features(31, width, seed=1)
    result = assert_direct(real.astype(np.float32), fake.astype(np.float32), k)
    if width < 40:
        assert 0 < sum(result) < 2  # some inside, some outside


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_precision_and_recall_with_ties(rows, levels):
    # Points of a lattice, moved off it by what binary fractions do not hold.
    random = np.random.default_rng(levels)
    real = random.integers(0, levels, (40, 3)) + np.array([0.1, 1e3 / 3, -7e5 / 9])
    fake = random.integers(0, levels, (25, 3)) + np.array([0.1, 1e3 / 3, -7e5 / 9])
    assert_direct(real, fake)
    assert_direct(real, np.concatenate([fake, real[:10], fake[:5] + 0.5]))


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    width=st.integers(1, 4),
    k=st.integers(1, 3),
    offset=st.sampled_from([0.0, 0.1, 1e6 / 3]),
    unit=st.sampled_from([1.0, 1e-3, 1e-161, 1e70]),
)
def test_precision_and_recall_of_anything(data, width, k, offset, unit):
    sizes = st.integers(k + 1, 12)
    real, fake = (
        data.draw(hnp.arrays(np.float64, (data.draw(sizes), width), elements=st.integers(-2, 2)))
        for _ in range(2)
    )
    assert_direct(unit * (real + offset), unit * (fake + offset), k)


def test_precision_and_recall_where_matrix_products_cancel(rows):
    # Two clusters so far apart that |a|^2 + |b|^2 - 2ab holds no digit of the distances within one.
    random = np.random.default_rng(0)
    ends = np.where(np.arange(30) % 2, 1e9, -1e9)[:, None]
    real = ends + random.normal(size=(30, 4))
    fake = ends + random.normal(size=(30, 4))
    result = assert_direct(real, fake)
    assert min(result) > 0 and max(result) < 1
    # One image far out spoils no other.
    real[0] = 1e60
    assert_direct(real, fake)


def test_precision_and_recall_of_duplicates(rows):
    real = np.repeat(random_features(6, 5), 4, axis=0)  # all radii are 0
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real[:8] + 1e-9) == (0, 0)
    assert_direct(np.repeat(random_features(9, 5), 3, axis=0), real)
    collapsed = np.tile(real[:1], (20, 1))
    assert precision_recall(real, collapsed) == (1, 4 / 24)
    assert precision_recall(collapsed, collapsed) == (1, 1)


@pytest.mark.parametrize("copies", [1, 3, 300])
def test_few_pairs_are_looked_at_directly(monkeypatch, copies):
    direct, pairs = metrics._distances, []
    monkeypatch.setattr(metrics, "_distances", lambda a, b: (pairs.append(len(b)), direct(a, b))[1])
    real, fake = (np.repeat(random_features(300 // copies, 9, i), copies, axis=0) for i in (0, 1))
    precision_recall(real, fake)
    assert sum(pairs) < 300 * 30  # of 300 * 900


def test_precision_and_recall_do_not_depend_on_order():
    real, fake = random_features(60, 2), random_features(50, 2, seed=1)
    random = np.random.default_rng(0)
    result = precision_recall(real, fake)
    assert precision_recall(random.permutation(real), random.permutation(fake)) == result
    assert precision_recall(np.asfortranarray(real), np.repeat(fake, 2, axis=1)[:, ::2]) == result


def test_the_smallest_sets():
    real, fake = random_features(4, 3), random_features(5, 3, seed=1)
    assert_direct(real, fake)
    with pytest.raises(DataError, match="real features are of 3 images: k 3 needs 4 or more"):
        precision_recall(real[:3], fake)
    with pytest.raises(DataError, match="fake features are of 0 images: k 3 needs 4 or more"):
        precision_recall(real, fake[:0])
    assert_direct(real[:2], fake[:2], k=1)


@pytest.mark.parametrize(
    "real, fake, k, message",
    [
        (np.zeros((9, 2)), np.zeros((9, 3)), 3, "real features are 2 wide, fake ones 3"),
        (np.zeros((9, 2, 2)), np.zeros((9, 4)), 3, r"real features of float64 \(9, 2, 2\)"),
        (np.zeros((9, 2)), np.full((9, 2), np.nan), 3, "fake features: 18 of 18 numbers are NaN"),
        (np.zeros((9, 2)), np.full((9, 2), 1e200), 3, "fake features: 18 of 18 .* above 1e100"),
        (np.zeros((9, 2)), np.zeros((9, 2)), 0, "k 0 is out of range"),
    ],
)
def test_precision_and_recall_refuse_wrong_features(real, fake, k, message):
    with pytest.raises(DataError, match=message) as caught:
        precision_recall(real, fake, k)
    assert "\n" not in str(caught.value)


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
