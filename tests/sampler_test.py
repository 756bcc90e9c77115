"""Sampling against a naive loop that runs the whole generator for every token."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mirai_jax.models import decoding
from mirai_jax.models import generator as generator_lib
from mirai_jax.models.generator import Generator, GeneratorConfig
from mirai_jax.sampling import sampler
from mirai_jax.sampling.sampler import SampleOptions

CONFIG = GeneratorConfig(
    num_layers=2, num_heads=2, width=32, vocab_size=24, num_classes=5, grid=(3, 4)
)


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def params():
    """Random parameters with which the classes and the tokens so far matter."""
    fresh = jax.jit(generator_lib.init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    rng = np.random.RandomState(1)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), fresh)


@functools.cache
def keys(count, seed=0):
    return sampler.image_keys(jax.random.key(seed), np.arange(count))


def labels(count):
    return jnp.arange(count, dtype=jnp.int32) % CONFIG.num_classes


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


# The whole sequence ------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def full_logits(config, params, codes_BxL, labels_B):
    """(B, L, V) of whole sequences; the last token is never an input."""
    return Generator(config).apply({"params": params}, codes_BxL[:, :-1], labels_B)[0]


def naive(config, params, labels_B, keys_B, options, given_BxL=None):
    """Token by token, every time over the whole sequence: no cache, a loop in Python."""
    count = len(labels_B)
    codes = np.zeros((count, config.length), np.int32)
    null = jnp.full(count, config.num_classes)
    for position in range(config.length):
        logits = full_logits(config, params, codes, labels_B)[:, position]
        guided = position == 0 or options.interval == -1 or position - 1 <= options.interval
        if options.guidance > 1 and guided:
            free = full_logits(config, params, codes, null)[:, position]
            share = {
                "constant": 1.0,
                "linear": position / (config.length - 1),
                "power_cosine": 0.5
                - 0.5 * math.cos(math.pi * (position / config.length) ** options.power),
            }[options.schedule]
            logits = free + (1 + (options.guidance - 1) * share) * (logits - free)
        logits = sampler.filter_logits(logits, options)
        for image in range(count):
            key = jax.random.fold_in(keys_B[image], position)
            drawn = jax.random.categorical(key, logits[image])
            codes[image, position] = logits[image].argmax() if options.greedy else drawn
            if given_BxL is not None and given_BxL[image, position] >= 0:
                codes[image, position] = given_BxL[image, position]
    return codes


@pytest.mark.parametrize(
    "options",
    [
        SampleOptions(),
        SampleOptions(greedy=True),
        SampleOptions(guidance=3.0),
        SampleOptions(guidance=3.0, greedy=True, interval=4),
        SampleOptions(guidance=2.0, interval=0, temperature=1.3),
        SampleOptions(guidance=6.0, schedule="linear"),
        SampleOptions(guidance=16.0, schedule="power_cosine", power=1.5),
        SampleOptions(guidance=1.5, top_k=5, top_p=0.8, temperature=0.7),
    ],
    ids=str,
)
def test_cached_sampling_is_naive_sampling_token_for_token(params, options):
    codes = sampler.generate(CONFIG, params, labels(4), keys(4), options)
    assert codes.shape == (4, CONFIG.length) and codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, naive(CONFIG, params, labels(4), keys(4), options))
    if options.interval == 4:  # as on TPUs
        in_rows = sampler.generate(
            CONFIG, params, labels(4), keys(4), options, heads_in_row=CONFIG.num_heads
        )
        np.testing.assert_array_equal(in_rows, codes)
    assert len(np.unique(codes)) > 3


@pytest.mark.parametrize("shortest", [1, 2, 5, 11])
def test_a_cache_that_grows_holds_what_a_whole_one_does(params, shortest, monkeypatch):
    options = SampleOptions(guidance=3.0)
    whole = sampler.generate(CONFIG, params, labels(4), keys(4), options)
    monkeypatch.setattr(decoding, "_SHORTEST", shortest)
    runs = decoding.segments(CONFIG.length)
    assert len(runs) > 1 and runs[0][0] == 0 and runs[-1][1] == CONFIG.length
    assert all(stop == start for (_, stop), (start, _) in zip(runs, runs[1:], strict=False))
    # Not through jit, which knows the program with one segment.
    grown = sampler.generate.__wrapped__(CONFIG, params, labels(4), keys(4), options)
    np.testing.assert_array_equal(grown, whole)


def test_given_tokens_stand_in_place_of_drawn_ones(params):
    options = SampleOptions(guidance=2.0)
    generate = functools.partial(sampler.generate, CONFIG, params, labels(4), keys(4), options)
    whole, rng = np.asarray(generate()), np.random.RandomState(5)
    kept = rng.uniform(size=whole.shape) < 0.4
    none, some = np.full_like(whole, -1), np.where(kept, rng.randint(0, 24, whole.shape), -1)
    np.testing.assert_array_equal(generate(none), whole)
    np.testing.assert_array_equal(generate(np.where(kept, whole, -1)), whole)
    redrawn = generate(some)
    np.testing.assert_array_equal(redrawn[kept], some[kept])
    np.testing.assert_array_equal(redrawn, naive(CONFIG, params, labels(4), keys(4), options, some))


def test_guidance_grows_as_its_schedule_says():
    scales = {
        name: SampleOptions(guidance=16.0, schedule=name, power=2.75).scales(256)
        for name in sampler.GUIDANCE_SCHEDULES
    }
    assert (scales["constant"] == 16).all()
    for name in ("linear", "power_cosine"):
        assert scales[name][0] == 1 and (np.diff(scales[name]) >= 0).all()
    assert scales["linear"][-1] == 16 and scales["linear"][85] == 6
    # By hand: 1 + 15 (1 - cos(pi (t / 256)^2.75)) / 2.
    expected = [1.0180645, 1.8030798, 7.4043973, 15.9957586]
    np.testing.assert_allclose(scales["power_cosine"][[64, 128, 192, 255]], expected, rtol=1e-6)


def test_one_program_draws_at_any_scale_and_at_none_of_its_own(params):
    draw = jax.jit(sampler.draw, static_argnames=("config", "form"))
    weak, strong = SampleOptions(guidance=2.0), SampleOptions(guidance=4.0, schedule="linear")
    form, images = weak.form, (CONFIG, params, labels(4), keys(4))
    assert form == strong.form != SampleOptions().form
    for options in (weak, strong):
        np.testing.assert_array_equal(
            draw(*images, form, options.scales(CONFIG.length)), sampler.generate(*images, options)
        )
    with pytest.raises(TypeError, match="scales_L"):
        draw(*images, form)
    with pytest.raises(AttributeError, match="scales"):
        sampler.generate(*images, form)


def test_interval_guides_the_first_token_and_those_within_it(params):
    def draw(interval, guidance=4.0):
        options = SampleOptions(guidance=guidance, interval=interval, greedy=True)
        return np.asarray(sampler.generate(CONFIG, params, labels(8), keys(8), options))

    always, first = draw(-1), draw(0)
    np.testing.assert_array_equal(always[:, :2], first[:, :2])  # t = 0 (always) and t - 1 <= 0
    assert (always != first).any()
    np.testing.assert_array_equal(always, draw(CONFIG.length - 2))
    assert (always != draw(-1, guidance=1.0)).any()


@pytest.mark.parametrize("cache_dtype", ["model", "int8"])
def test_an_image_does_not_depend_on_the_batch_it_is_in(params, cache_dtype):
    options = SampleOptions(guidance=2.0, top_p=0.9, cache_dtype=cache_dtype)
    eight = sampler.generate(CONFIG, params, labels(8), keys(8), options)
    two = sampler.generate(CONFIG, params, labels(2), keys(2), options)
    np.testing.assert_array_equal(two, eight[:2])
    late = sampler.image_keys(jax.random.key(0), np.array([7, 3]))
    some = sampler.generate(CONFIG, params, labels(8)[np.array([7, 3])], late, options)
    np.testing.assert_array_equal(some, eight[np.array([7, 3])])
    other = sampler.generate(CONFIG, params, labels(8), keys(8, seed=1), options)
    assert (other != eight).any(axis=1).all()


def test_bfloat16_samples(params):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    options = SampleOptions(guidance=2.0)
    codes = np.asarray(sampler.generate(config, params, labels(2), keys(2), options))
    assert codes.shape == (2, CONFIG.length) and codes.dtype == np.int32
    assert codes.min() >= 0 and codes.max() < CONFIG.vocab_size


def test_drawn_tokens_have_the_models_probabilities(params):
    count = 2000
    options = SampleOptions(temperature=0.8, top_k=4)
    one = jnp.full(count, 2)
    first = np.asarray(sampler.generate(CONFIG, params, one, keys(count), options))[:, 0]
    logits = full_logits(CONFIG, params, np.zeros((1, CONFIG.length), np.int32), one[:1])[:, 0]
    expected = jax.nn.softmax(sampler.filter_logits(logits, options))[0]
    seen = np.bincount(first, minlength=CONFIG.vocab_size) / count
    np.testing.assert_allclose(seen, expected, atol=0.05)
    assert (np.asarray(expected)[first] > 0).all()


# Filters -----------------------------------------------------------------------------------------


def brute_force_filter(logits, options):
    """The kept tokens of one row of logits, one by one; distinct ones where there is a top-k."""
    logits = logits / options.temperature
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if options.top_k:
        order = order[: options.top_k]
    kept, total = [], 0.0
    for token, p in zip(order, softmax(logits[order]), strict=True):
        if options.top_p < 1 and total > options.top_p:
            break  # those before it exceed p already
        kept.append(token)
        total += p
    return np.array([logits[t] if t in kept else -np.inf for t in range(len(logits))])


@pytest.mark.parametrize("top_k", [0, 1, 3, 11, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-6])
def test_filters_equal_brute_force(top_k, top_p):
    rng = np.random.RandomState(0)
    logits = rng.normal(0, 3, size=(16, 11)).astype(np.float32)
    for temperature in (0.5, 1.0, 2.0):
        options = SampleOptions(top_k=top_k, top_p=top_p, temperature=temperature)
        expected = [brute_force_filter(row.astype(np.float64), options) for row in logits]
        got = sampler.filter_logits(jnp.asarray(logits), options)
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        assert np.isfinite(got).any(axis=1).all()  # something can always be drawn


def test_without_filters_logits_stay_as_they_are():
    logits = jnp.asarray(np.random.RandomState(0).normal(size=(2, 9)), jnp.float32)
    np.testing.assert_array_equal(sampler.filter_logits(logits, SampleOptions()), logits)


def test_ties_at_the_edge_stay_as_in_the_official_filter():
    """By value with top-k: all of them; by rank with top-p: as many as the probability needs."""
    logits = jnp.asarray([[1.0, 3.0, 1.0, 0.0, 1.0]])
    kept = np.isfinite(sampler.filter_logits(logits, SampleOptions(top_k=2)))
    np.testing.assert_array_equal(kept, [[True, True, True, False, True]])
    flat = sampler.filter_logits(jnp.zeros((1, 8)), SampleOptions(top_p=0.3))
    np.testing.assert_array_equal(np.isfinite(flat), [[True] * 3 + [False] * 5])
    rounded = np.random.RandomState(0).normal(0, 2, size=(16, 40)).round().astype(np.float32)
    for top_p in (0.95, 0.5, 1e-6):
        options = SampleOptions(top_p=top_p)
        expected = [brute_force_filter(row.astype(np.float64), options) for row in rounded]
        got = sampler.filter_logits(jnp.asarray(rounded), options)
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))


# Refusals ----------------------------------------------------------------------------------------


def test_guidance_without_a_null_class_is_refused(params):
    config = dataclasses.replace(CONFIG, class_dropout=0.0)
    given = {**params, "cls_embedding": {"embedding": params["cls_embedding"]["embedding"][:-1]}}
    with pytest.raises(ValueError, match="sample.guidance .* no null class"):
        sampler.generate(config, given, labels(2), keys(2), SampleOptions(guidance=2.0))
    codes = sampler.generate(config, given, labels(2), keys(2), SampleOptions())
    np.testing.assert_array_equal(
        codes, sampler.generate(CONFIG, params, labels(2), keys(2), SampleOptions())
    )


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("guidance", 0.5, "1 (none) or more"),
        ("guidance", float("nan"), "1 (none) or more"),
        ("interval", -2, "-1 (always) or more"),
        ("temperature", 0.0, "more than 0"),
        ("temperature", -1.0, "more than 0"),
        ("top_k", -1, "0 (all) or more"),
        ("top_p", 0.0, "more than 0, at most 1 (all)"),
        ("top_p", 1.1, "more than 0, at most 1 (all)"),
        ("schedule", "rising", "one of constant, linear, power_cosine"),
        ("power", 0.0, "more than 0"),
        ("cache_dtype", "int4", "one of model, int8"),
    ],
)
def test_bad_options_are_refused_in_one_line(field, value, allowed):
    with pytest.raises(ValueError) as error:
        SampleOptions(**{field: value})
    assert str(error.value) == f"sample.{field} is {value}; it must be {allowed}"
