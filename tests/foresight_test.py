"""Foresight against brute force: who looks at whom, the losses, the weights over time."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mirai_jax import foresight
from mirai_jax.foresight import Term
from mirai_jax.models.generator import GeneratorConfig

B, Z, V = 2, 5, 7
# The same on every machine, slow or fast. New shapes compile, so losses get fewer than pairs.
pair_examples = settings(deadline=None, derandomize=True, max_examples=500)
loss_examples = settings(deadline=None, derandomize=True, max_examples=40)


def make_term(**fields):
    return Term(**{"start_epoch": 0.0, "schedule": (), **fields})


pytestmark = pytest.mark.usefixtures("quick_compilation")


# The definition, written out: every position of the sequence and every cell of the grid is looked at
# one by one. A *name* is the raster number of the token that a position stands for.


def student_name(term, position):
    """The token that sequence position `position` has consumed, or predicts; None for the class."""
    if term.level == "internal" and term.anchor == "consumed":
        return position - 1 if position >= 1 else None
    return position


def target_index(term, name, length):
    """Where the target for token `name` is kept; None if there is none."""
    if term.level == "output" or term.source == "bidirectional":
        return name  # tokens and patches are kept in raster order
    index = name + 1 if term.anchor == "consumed" else name
    return index if index < length else None  # the sequence ends before the last token is consumed


def brute_force_pairs(term, offset, grid):
    """[(student position, target index)] without the class position's pair with itself."""
    height, width = grid
    names = {(row, column): row * width + column for row, column in np.ndindex(grid)}
    cells = {name: cell for cell, name in names.items()}
    pairs = []
    for position in range(height * width):
        name = student_name(term, position)
        if name is None:
            continue
        if term.layout == "1d":
            seen = name + offset
        elif term.borders == "wrap":
            seen = name + offset[0] * width + offset[1]
        else:
            row, column = cells[name]
            seen = names.get((row + offset[0], column + offset[1]), -1)
        if seen in cells:
            index = target_index(term, seen, height * width)
            if index is not None:
                pairs.append((position, index))
    return pairs


def has_class_pair(term):
    generator = term.source in ("ema", "checkpoint")
    return term.level == "internal" and term.anchor == "consumed" and generator


def unit(vector):
    return vector / np.sqrt(np.sum(vector**2))


def brute_force_alignment_loss(term, offset, projection, target, grid):
    pairs = brute_force_pairs(term, offset, grid) + [(0, 0)] * has_class_pair(term)
    cosines = [
        np.dot(unit(projection[image, position]), unit(target[image, index]))
        for image in range(len(projection))
        for position, index in pairs
    ]
    return -sum(cosines) / len(cosines)


def brute_force_prediction_loss(term, offset, logits, codes, grid):
    losses = []
    for image in range(len(logits)):
        for position, index in brute_force_pairs(term, offset, grid):
            row = logits[image, position]
            losses.append(np.log(np.sum(np.exp(row))) - row[codes[image, index]])
    return sum(losses) / len(losses)


def check_pairs(term, grid):
    length = grid[0] * grid[1]
    for offset in term.offsets:
        shift, mask = foresight.alignment(term, offset, grid)
        assert mask.shape == (length,) and set(mask) <= {0.0, 1.0}
        pairs = [(j, j + shift) for j in range(length) if mask[j]]
        assert pairs == brute_force_pairs(term, offset, grid)


def check_losses(term, grid, seed=0):
    rng, length, count = np.random.RandomState(seed), grid[0] * grid[1], len(term.offsets)
    if term.level == "internal":
        projections, target = (
            rng.normal(size=(count, B, length, Z)),
            rng.normal(size=(B, length, Z)),
        )
        got = foresight.alignment_losses(
            term, jnp.asarray(projections, jnp.float32), jnp.asarray(target, jnp.float32), grid
        )
        expected = [
            brute_force_alignment_loss(term, offset, projections[k], target, grid)
            for k, offset in enumerate(term.offsets)
        ]
    else:
        logits, codes = rng.normal(size=(count, B, length, V)), rng.randint(0, V, (B, length))
        got = foresight.prediction_losses(
            term, jnp.asarray(logits, jnp.float32), jnp.asarray(codes), grid
        )
        expected = [
            brute_force_prediction_loss(term, offset, logits[k], codes, grid)
            for k, offset in enumerate(term.offsets)
        ]
    assert got.shape == (count,) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


OFFSETS = {
    "2d": ((0, 0), (0, 1), (1, 0), (1, 1), (2, 1), (0, -1), (-1, 0), (-1, 1), (1, -1)),
    "1d": (0, 1, 2, 5, -1, -3),
}


GRIDS = [(3, 5), (4, 2), pytest.param((6, 10), marks=pytest.mark.slow)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("source", foresight.SOURCES)
def test_internal_losses_equal_brute_force(source, grid):
    for anchor, borders in itertools.product(foresight.ANCHORS, foresight.BORDERS):
        for layout, offsets in OFFSETS.items():
            term = make_term(
                source=source, anchor=anchor, borders=borders, layout=layout, offsets=offsets
            )
            check_pairs(term, grid)
            check_losses(term, grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_output_losses_equal_brute_force(grid):
    for anchor, borders in itertools.product(foresight.ANCHORS, foresight.BORDERS):
        for layout, offsets in OFFSETS.items():
            term = make_term(
                level="output", anchor=anchor, borders=borders, layout=layout, offsets=offsets
            )
            check_pairs(term, grid)
            check_losses(term, grid)


@st.composite
def cases(draw):
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    layout = draw(st.sampled_from(foresight.LAYOUTS))
    if layout == "2d":
        offset = st.tuples(st.integers(1 - height, height - 1), st.integers(1 - width, width - 1))
    else:
        offset = st.integers(1 - height * width, height * width - 1)
    term = make_term(
        layout=layout,
        offsets=tuple(draw(st.lists(offset, min_size=1, max_size=3))),
        source=draw(st.sampled_from(foresight.SOURCES)),
        level=draw(st.sampled_from(foresight.LEVELS)),
        borders=draw(st.sampled_from(foresight.BORDERS)),
        anchor=draw(st.sampled_from(foresight.ANCHORS)),
    )
    return term, (height, width)


@pair_examples
@given(cases())
def test_any_layout_pairs_as_brute_force_does(case):
    check_pairs(*case)


@loss_examples
@given(cases(), st.integers(0, 1000))
def test_any_layouts_losses_equal_brute_force(case, seed):
    term, grid = case
    assume(all(brute_force_pairs(term, o, grid) or has_class_pair(term) for o in term.offsets))
    check_losses(term, grid, seed)


def test_masked_pairs_of_a_small_grid_spelt_out():
    # 2 x 3:  0 1 2     Consumed anchor: position 1 stands for token 0, ..., position 5 for token 4;
    #         3 4 5     the state that has consumed token 5 does not exist.
    def pairs(offset, **fields):
        shift, mask = foresight.alignment(make_term(**fields), offset, (2, 3))
        return [(int(j), int(j) + shift) for j in np.flatnonzero(mask)]

    assert pairs((0, 0)) == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]
    assert pairs((0, 1)) == [(1, 2), (2, 3), (3, 4), (4, 5)]
    assert pairs((0, 1), borders="mask") == [(1, 2), (2, 3), (4, 5)]
    assert pairs((1, 0), borders="mask") == [(1, 4), (2, 5)]
    assert pairs((1, -1)) == [(1, 3), (2, 4), (3, 5)]
    assert pairs((1, -1), borders="mask") == [(2, 4), (3, 5)]
    patches = dict(source="bidirectional", borders="mask")
    assert pairs((0, 0), **patches) == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4)]
    assert pairs((0, 1), **patches) == [(1, 1), (2, 2), (4, 4), (5, 5)]
    assert pairs((0, 1), anchor="predicted", borders="mask") == [(0, 1), (1, 2), (3, 4), (4, 5)]
    assert pairs((0, 0), **patches, anchor="predicted") == [(j, j) for j in range(6)]
    tokens = dict(level="output", layout="1d")
    assert pairs(2, **tokens) == [(0, 2), (1, 3), (2, 4), (3, 5)]


@pytest.mark.parametrize("grid", [(3, 5), (16, 16)], ids=str)
@pytest.mark.parametrize("source", foresight.SOURCES)
@pytest.mark.parametrize("offset", [(0, 0), (0, 1), (1, 0), (2, -1), (-1, 3)], ids=str)
def test_wrap_is_the_flattened_shift(offset, source, grid):
    steps = offset[0] * grid[1] + offset[1]
    wrapped = foresight.alignment(make_term(source=source, borders="wrap"), offset, grid)
    raster = foresight.alignment(make_term(source=source, layout="1d"), steps, grid)
    assert wrapped[0] == raster[0] == steps - (source == "bidirectional")
    np.testing.assert_array_equal(wrapped[1], raster[1])


def test_the_published_offset_right_wraps_15_of_its_254_pairs():
    wrap = foresight.alignment(make_term(), (0, 1), (16, 16))
    mask = foresight.alignment(make_term(borders="mask"), (0, 1), (16, 16))
    assert wrap[0] == mask[0] == 1
    assert wrap[1].sum() == 254 and (wrap[1] - mask[1]).sum() == 15


# The losses' edges -------------------------------------------------------------------------------


@pytest.mark.parametrize("source", foresight.SOURCES)
@pytest.mark.parametrize("anchor", foresight.ANCHORS)
def test_no_gradient_reaches_the_target(source, anchor):
    term = make_term(source=source, anchor=anchor)
    rng = np.random.RandomState(0)
    projections = jnp.asarray(rng.normal(size=(3, B, 12, Z)), jnp.float32)
    target = jnp.asarray(rng.normal(size=(B, 12, Z)), jnp.float32)
    to_student, to_target = jax.grad(
        lambda p, t: foresight.alignment_losses(term, p, t, (3, 4)).sum(), argnums=(0, 1)
    )(projections, target)
    assert not np.any(to_target)
    paired = np.abs(to_student).max(axis=(1, 3)) > 0  # (K, L)
    for k, offset in enumerate(term.offsets):
        expected = {j for j, _ in brute_force_pairs(term, offset, (3, 4))}
        expected |= {0} if has_class_pair(term) else set()
        assert set(np.flatnonzero(paired[k])) == expected


@pytest.mark.parametrize("level", ["internal", "output"])
def test_shuffled_targets_are_those_of_another_image(level):
    term = make_term(level=level, targets="shuffled", offsets=((0, 0), (1, 0)))
    own = dataclasses.replace(term, targets="own")
    rng, grid, images = np.random.RandomState(0), (2, 3), 3
    outputs = rng.normal(size=(2, images, 6, Z if level == "internal" else V)).astype(np.float32)
    if level == "internal":
        targets = rng.normal(size=(images, 6, Z)).astype(np.float32)
        losses = foresight.alignment_losses
    else:
        targets = rng.randint(V, size=(images, 6))
        losses = foresight.prediction_losses
    # Each image by itself, beside the targets of the one before it.
    expected = np.mean(
        [losses(own, outputs[:, [i]], targets[[i - 1]], grid) for i in range(images)], axis=0
    )
    np.testing.assert_allclose(losses(term, outputs, targets, grid), expected, rtol=1e-5)


@pytest.mark.parametrize("window", [2, 3, 40])
@pytest.mark.parametrize("along", foresight.WINDOWS)
def test_a_windows_target_is_the_mean_over_what_the_grid_has_of_it(along, window):
    """With every anchor and offset: it is the target of the offset's own place that is replaced."""
    height, width = grid = (3, 4)
    rng, length = np.random.RandomState(0), 12
    offsets = ((0, 0), (1, 0), (0, -1))
    projections = rng.normal(size=(3, B, length, Z)).astype(np.float32)
    target = rng.normal(size=(B, length, Z)).astype(np.float32)
    pooled = np.zeros((B, length, Z))
    for n in range(length):
        if along == "positions":
            seen = [n + k for k in range(window) if n + k < length]
        else:
            row, column = divmod(n, width)
            seen = [(row + k) * width + column for k in range(window) if row + k < height]
        pooled[:, n] = np.mean([target[:, m] for m in seen], axis=0)
    for anchor in foresight.ANCHORS:
        term = make_term(
            source="bidirectional",
            anchor=anchor,
            offsets=offsets,
            window=window,
            window_along=along,
        )
        got = foresight.alignment_losses(term, projections, target, grid)
        want = [
            brute_force_alignment_loss(term, offset, projections[k], pooled, grid)
            for k, offset in enumerate(offsets)
        ]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_alignment_of_equal_opposite_and_zero_vectors():
    term = make_term(offsets=((0, 0),))
    x = jnp.asarray(np.random.RandomState(0).normal(size=(1, B, 6, Z)), jnp.float32)
    for scale, expected in ((1e-3, -1.0), (1e3, -1.0), (-2.0, 1.0)):
        losses = foresight.alignment_losses(term, scale * x, x[0], (2, 3))
        np.testing.assert_allclose(losses, expected, rtol=1e-6)
    loss = lambda p: foresight.alignment_losses(term, p, x[0], (2, 3)).sum()
    value, gradient = jax.value_and_grad(loss)(jnp.zeros_like(x))
    assert value == 0 and np.isfinite(gradient).all()
    half = foresight.alignment_losses(
        term, x.astype(jnp.bfloat16), x[0].astype(jnp.bfloat16), (2, 3)
    )
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, -1, rtol=1e-6)  # the cosine is taken in float32


def test_heads_have_their_own_parameters_and_the_official_initialisation():
    term = make_term(projector_width=200)
    x = jnp.asarray(np.random.RandomState(0).normal(size=(B, 6, 4)), jnp.float32)
    params = foresight.init_heads(term, Z, 4, jax.random.key(0))
    outputs = foresight.apply_heads(term, Z, "float32", params, x)
    assert [out.shape for out in outputs] == 3 * [(B, 6, Z)]
    assert not np.allclose(outputs[0], outputs[1])
    assert {n: p["kernel"].shape for n, p in params.items()} == {
        "linear_0": (3, 4, 200), "linear_1": (3, 200, 200), "linear_2": (3, 200, Z),
    }  # fmt: skip
    kernel = np.asarray(params["linear_1"]["kernel"])
    assert kernel.std() == pytest.approx(0.02, rel=0.05)
    assert not np.allclose(kernel[0], kernel[1])
    assert not any(np.any(p["bias"]) for p in params.values())
    term = make_term(level="output")
    params = foresight.init_heads(term, V, 4, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == {
        "norm": {"scale": (3, 4)},
        "output": {"kernel": (3, 4, V)},
    }
    outputs = foresight.apply_heads(term, V, "float32", params, x)
    assert not np.any(outputs)  # starts at the uniform distribution


def test_pytorchs_initialisation_of_projectors():
    """Its Linear: kernel and bias are uniform within one over the root of the inputs."""
    term = make_term(projector_width=200, projector_init="torch")
    params = foresight.init_heads(term, 300, 16, jax.random.key(0))
    for name, inputs in (("linear_0", 16), ("linear_1", 200), ("linear_2", 200)):
        for part in ("kernel", "bias"):
            x, bound = np.asarray(params[name][part]), inputs**-0.5
            assert np.abs(x).max() < bound and np.abs(x).max() > 0.95 * bound
            assert x.std() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not np.allclose(params[name]["bias"][0], params[name]["bias"][1])


def test_a_transformer_projects_a_position_from_itself_and_earlier_ones():
    student = GeneratorConfig(1, 2, 16, vocab_size=V, num_classes=3, grid=(2, 3))
    term = make_term(projector="transformer", offsets=((0, 0), (0, 1)))
    init = jax.jit(lambda key: foresight.init_heads(term, Z, 16, key, student))
    params = init(jax.random.key(0))
    states = jnp.asarray(np.random.RandomState(0).normal(size=(B, 6, 16)), jnp.float32)

    @jax.jit
    def project(states):
        return jnp.stack(foresight.apply_heads(term, Z, "float32", params, states, student))

    outputs = project(states)
    assert outputs.shape == (2, B, 6, Z) and not np.allclose(outputs[0], outputs[1])
    total = lambda states: project(states).sum(axis=(1, 3))  # (K, L)
    for gradient in np.abs(jax.jit(jax.jacrev(total))(states)).max(
        axis=(2, 4)
    ):  # (L, L) of each head
        seen = gradient > 0
        assert not np.triu(seen, 1).any() and seen.diagonal().all()
        # The class position has a zero query and key, as in the generator, but a value like the others.
        assert seen[np.tril_indices(6)].all()
    # Images do not see each other.
    np.testing.assert_allclose(project(states[:1]), outputs[:, :1], rtol=1e-5, atol=1e-6)


# Cross-entropy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cross_entropy_and_its_gradient_are_optaxs(dtype):
    rng = np.random.RandomState(0)
    logits = jnp.asarray(rng.normal(0, 30, (2, 5, 7)), dtype)  # some probabilities are 0 in float32
    tokens, weights = rng.randint(0, 7, (2, 5)), rng.normal(size=(2, 5)).astype(np.float32)

    def ours(x):
        return jnp.sum(weights * foresight.token_nll(x, tokens))

    def theirs(x):
        nll = optax.softmax_cross_entropy_with_integer_labels(x.astype(jnp.float32), tokens)
        return jnp.sum(weights * nll)

    got, want = jax.value_and_grad(ours)(logits), jax.value_and_grad(theirs)(logits)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    assert got[1].dtype == logits.dtype
    np.testing.assert_allclose(
        got[1].astype(np.float32), want[1].astype(np.float32), rtol=1e-5, atol=1e-6
    )


def test_cross_entropy_stores_no_float32_copy_of_the_logits():
    logits, tokens = jnp.zeros((2, 5, 7), jnp.bfloat16), jnp.zeros((2, 5), jnp.int32)
    _, backward = jax.vjp(lambda x: foresight.token_nll(x, tokens), logits)
    stored = [x for x in jax.tree.leaves(backward) if x.size >= logits.size]
    assert [x.dtype for x in stored] == [jnp.bfloat16]


# Weights -----------------------------------------------------------------------------------------


def test_weights_and_reduction():
    three = dict(offsets=((0, 0), (0, 1), (1, 0)))
    assert make_term(**three, weights=(2.0,)).head_weights == (2.0, 2.0, 2.0)
    assert make_term(**three, weights=(1.0, 2.0, 3.0)).head_weights == (1.0, 2.0, 3.0)
    mean = make_term(**three, weights=(2.0,), reduction="mean").head_weights
    assert mean == pytest.approx((2 / 3,) * 3)
    mean = make_term(**three, weights=(1.0, 2.0, 3.0), reduction="mean").head_weights
    assert mean == pytest.approx((1 / 3, 2 / 3, 1.0))


def test_metric_names_tell_term_and_offset():
    names = make_term(name="e", offsets=((0, 0), (1, -1))).metric_names
    assert names == ("foresight_e_r0c0", "foresight_e_r1c-1")
    names = make_term(name="mtp", layout="1d", offsets=(0, 2)).metric_names
    assert names == ("foresight_mtp_n0", "foresight_mtp_n2")


def test_a_term_starts_exactly_at_its_epoch():
    published = Term()
    assert foresight.start_step(published, 5004) == 75_060
    at_once, half = make_term(), make_term(start_epoch=0.5)
    terms = (at_once, half, published)
    assert foresight.active_terms(terms, 0, 10) == (True, False, False)
    assert foresight.active_terms(terms, 4, 10) == (True, False, False)
    assert foresight.active_terms(terms, 5, 10) == (True, True, False)
    assert foresight.active_terms(terms, 149, 10) == (True, True, False)
    assert foresight.active_terms(terms, 150, 10) == (True, True, True)


def test_the_schedules_multiplier_changes_exactly_at_its_epochs():
    term = make_term(schedule=((2.0, 0.5), (3.5, 0.25)))
    expected = {0: 1, 19: 1, 20: 0.5, 34: 0.5, 35: 0.25, 10_000: 0.25}
    multiplier = jax.jit(lambda step: foresight.weight_multiplier(term, step, 10))
    for step, value in expected.items():
        assert multiplier(jnp.int32(step)) == value
    assert foresight.weight_multiplier(make_term(), jnp.int32(5), 10) == 1
    # In shares of the run, whatever an epoch is.
    half = make_term(schedule=((0.5, 0.5),), schedule_unit="shares")
    for step, value in {0: 1, 49: 1, 50: 0.5, 99: 0.5}.items():
        assert foresight.weight_multiplier(half, jnp.int32(step), 7, num_steps=100) == value
    published = Term()
    assert foresight.weight_multiplier(published, jnp.int32(80 * 5004 - 1), 5004) == 1
    assert foresight.weight_multiplier(published, jnp.int32(80 * 5004), 5004) == 0.5
