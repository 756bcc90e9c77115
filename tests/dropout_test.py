"""Masks of dropout: how often, independently of what, and the same wherever they are drawn."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mirai_jax.models.dropout import Dropout, keep_mask

SHAPE = (4, 64, 384)


def mask_of(seed, rate=0.1, shape=SHAPE, **kind):
    return np.asarray(keep_mask(jax.random.key(seed, **kind), rate, shape))


def within(share, probability, count):
    """Whether a share of `count` independent draws is one in 10 million likely, or likelier."""
    return abs(share - probability) < 5.4 * np.sqrt(probability * (1 - probability) / count)


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.9])
@pytest.mark.parametrize("kind", [{}, {"impl": "rbg"}])
def test_each_element_is_kept_with_the_probability_asked_for(rate, kind):
    mask = mask_of(0, rate, **kind)
    assert mask.shape == SHAPE
    assert mask.dtype == bool
    assert within(mask.mean(), 1 - rate, mask.size)
    for axis in range(3):  # and so in every row, column and image
        others = tuple({0, 1, 2} - {axis})
        shares = mask.mean(axis=others)
        assert all(within(share, 1 - rate, mask.size // mask.shape[axis]) for share in shares)


def test_elements_of_one_draw_and_of_neighbours_are_independent():
    rows = SHAPE[1] // 4
    mask = mask_of(1, 0.5)
    quarters = [
        mask[:, i * rows : (i + 1) * rows] for i in range(4)
    ]  # each call decides one of each
    pairs = list(itertools.combinations(quarters, 2))
    pairs += [(mask[:, 1:], mask[:, :-1]), (mask[..., 1:], mask[..., :-1]), (mask[1:], mask[:-1])]
    for one, other in pairs:
        assert within((one == other).mean(), 0.5, one.size)


def test_another_key_draws_another_mask():
    assert within((mask_of(0, 0.5) == mask_of(1, 0.5)).mean(), 0.5, np.prod(SHAPE))
    np.testing.assert_array_equal(mask_of(0), mask_of(0))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 7), (2, 2, 6, 3)])
def test_lengths_that_four_does_not_divide(shape):
    masks = np.stack([mask_of(seed, 0.5, shape) for seed in range(200)])
    assert masks.shape == (200, *shape)
    assert all(within(share, 0.5, 200) for share in masks.mean(0).ravel())


def test_devices_draw_their_part_of_the_same_mask():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    draw = jax.jit(lambda key: keep_mask(key, 0.1, SHAPE), out_shardings=split)
    np.testing.assert_array_equal(draw(jax.random.key(0)), mask_of(0))
    text = draw.lower(jax.random.key(0)).compile().as_text()
    assert "all-gather" not in text
    assert "[4,64,384]" not in text  # none draws the whole
    assert "u32[1,16,384]" in text  # and each calls the generator once for four elements


def test_what_is_kept_is_scaled_and_its_mean_stays():
    x = np.full(SHAPE, 2.0, np.float32)
    out = np.asarray(Dropout(0.25).apply({}, x, rngs={"dropout": jax.random.key(0)}))
    assert set(np.unique(out)) == {0.0, np.float32(2 / 0.75)}
    assert out.mean() == pytest.approx(2.0, rel=0.01)
    np.testing.assert_array_equal(Dropout(0.25).apply({}, x), x)
