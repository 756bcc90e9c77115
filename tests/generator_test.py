"""The generator: causality by gradients, sizes, rotary table, taps, dropout, conversion."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refusal

from mirai_jax import foresight
from mirai_jax.models import generator as generator_lib
from mirai_jax.models import kv_cache
from mirai_jax.models.generator import Generator, GeneratorConfig
from mirai_jax.weights import torch_names

CONFIG = GeneratorConfig(
    num_layers=3, num_heads=2, width=32, vocab_size=24, num_classes=5, grid=(3, 4)
)
LAST = CONFIG.length - 1  # tokens that are consumed

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def fresh():
    return jax.jit(generator_lib.init_params, static_argnums=0)(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def params(fresh):
    """Random parameters, the output head too, large enough that every path matters."""
    rng = np.random.RandomState(1)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), fresh)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.RandomState(2)
    codes = rng.randint(0, CONFIG.vocab_size, (4, LAST)).astype(np.int32)
    return codes, rng.randint(0, CONFIG.num_classes, 4).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, codes, labels, key=None):
    rngs = None if key is None else {"dropout": key}
    return Generator(config).apply({"params": params}, codes, labels, rngs=rngs)[0]


hidden_states = jax.jit(generator_lib.hidden_states, static_argnums=(0, 4))


# Causality ---------------------------------------------------------------------------------------


def test_no_logit_depends_on_a_token_at_its_position_or_later(params):
    # All tokens of both images have different ids, so that the gradient of a row of the embedding
    # table is that of one token: the whole dependence, not a perturbation of it.
    codes = np.random.RandomState(0).permutation(CONFIG.vocab_size)[: 2 * LAST].reshape(2, LAST)
    probe = np.random.RandomState(3).normal(size=(CONFIG.vocab_size,)).astype(np.float32)

    def scores(table):  # (2, L): a random mix of the logits at each position
        given = {**params, "tok_embeddings": {"embedding": table}}
        return logits_of(CONFIG, given, codes, np.array([0, 1])) @ probe

    jacobian = jax.jit(jax.jacrev(scores))(params["tok_embeddings"]["embedding"])
    size = np.abs(jacobian).max(axis=-1)  # (2, L, V)
    for image in range(2):
        own, other = size[image][:, codes[image]], size[image][:, codes[1 - image]]
        for j in range(CONFIG.length):
            assert (own[j, j:] == 0).all(), f"the logits at {j} see a token at {j} or later"
            assert (own[j, :j] > 1e-5).all(), f"the logits at {j} do not see some earlier token"
        assert (other == 0).all(), "an image sees another"


def test_every_position_depends_on_the_class(params):
    codes = np.zeros((1, LAST), np.int32)

    def scores(table):
        given = {**params, "cls_embedding": {"embedding": table}}
        return logits_of(CONFIG, given, codes, np.array([2])).sum(axis=-1)[0]

    size = np.abs(jax.jit(jax.jacrev(scores))(params["cls_embedding"]["embedding"])).max(axis=-1)
    assert (size[:, 2] > 0).all()
    assert (np.delete(size, 2, axis=1) == 0).all()


# Sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, published, digits, ffn",
    [("B", 110_888_448, 0, 2048), ("L", 342.9e6, -5, 2816), ("XL", 774.7e6, -5, 3584),
     ("XXL", 1.41e9, -7, 4096), ("3B", 3.10e9, -7, 8704)],
)  # fmt: skip
def test_named_sizes_have_llamagens_parameter_counts(size, published, digits, ffn):
    layers, heads, width = generator_lib.SIZES[size]
    config = GeneratorConfig(layers, heads, width)
    shapes = jax.eval_shape(lambda: generator_lib.init_params(config, jax.random.key(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert round(count, digits) == round(published)
    block = 4 * width**2 + 3 * width * ffn + 2 * width
    assert count == layers * block + (16384 * 2 + 1001 + 1) * width


def test_initialisation_is_the_official_one(fresh):
    assert not np.any(fresh["output"]["kernel"])
    for name in ("cls_embedding", "tok_embeddings"):
        assert np.std(fresh[name]["embedding"]) == pytest.approx(0.02, rel=0.25)
    layers = fresh["layers"]
    kernels = [layers["attention"][n]["kernel"] for n in ("wqkv", "wo")]
    kernels += [layers["feed_forward"][n]["kernel"] for n in ("w1", "w2", "w3")]
    for kernel in kernels:
        assert np.std(kernel) == pytest.approx(0.02, rel=0.1)
        assert np.mean(kernel) == pytest.approx(0, abs=0.002)
        assert not np.allclose(kernel[0], kernel[1])  # every layer draws its own
    for norm in (fresh["norm"], layers["attention_norm"], layers["ffn_norm"]):
        np.testing.assert_array_equal(norm["scale"], 1)
    assert len(fresh["cls_embedding"]["embedding"]) == CONFIG.num_classes + 1
    without = dataclasses.replace(CONFIG, class_dropout=0.0)
    shapes = jax.eval_shape(lambda: generator_lib.init_params(without, jax.random.key(0)))
    assert shapes["cls_embedding"]["embedding"].shape[0] == CONFIG.num_classes


# Rotary positions --------------------------------------------------------------------------------


@pytest.mark.parametrize("grid, head_dim", [((3, 5), 16), ((4, 2), 8), ((1, 3), 4)])
def test_rope_table_against_a_double_loop_over_the_grid(grid, head_dim):
    table = generator_lib.rope_table(grid, head_dim)
    height, width = grid
    quarter = head_dim // 4  # pairs that turn with the row; as many with the column
    assert table.shape == (height * width + 1, 2 * quarter, 2) and table.dtype == np.float32
    assert not table[0].any()  # the class position
    for row in range(height):
        for column in range(width):
            entry = table[1 + row * width + column]
            for i in range(quarter):
                frequency = 10000.0 ** (-i / quarter)
                for pair, place in ((i, row), (quarter + i, column)):
                    angle = place * frequency
                    expected = [math.cos(angle), math.sin(angle)]
                    np.testing.assert_allclose(entry[pair], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rope_by_a_product_as_on_tpus_is_the_same(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 7, 3, 8)).astype(dtype)
    table = jnp.asarray(generator_lib.rope_table((2, 3), 8))
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    ours, to_x = jax.vjp(lambda x: generator_lib.apply_rope(x, table), x)
    other, other_to_x = jax.vjp(lambda x: generator_lib._rope_by_product(x, cos, sin), x)
    assert ours.dtype == other.dtype == x.dtype
    # Each is rounded to bfloat16 once, after the same two products and their sum.
    np.testing.assert_allclose(*np.float32((ours, other)), rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(*np.float32((*to_x(ours), *other_to_x(ours))), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("heads, in_row, places", [(6, 2, 32), (4, 4, 8), (3, 1, 7)])
def test_a_cache_with_several_heads_a_row_as_on_tpus_is_the_same(heads, in_row, places, dtype):
    x_3xTxBxHxd = np.random.RandomState(0).normal(size=(3, places, 2, heads, 8)).astype(np.float32)
    x_3xTxBxHxd[1, 0] = 0  # the key of the class position
    kept = x_3xTxBxHxd[1:]
    if dtype == "int8":
        scales = abs(kept).max(axis=-1, keepdims=True) / 127
        kept = np.round(kept / np.maximum(scales, 1e-30)) * scales
    for n, rows, tile in ((in_row, kv_cache._ROWS, kv_cache._TILES[1]), (1, 1, 1)):
        attend = jax.jit(functools.partial(kv_cache._attend, rows=rows, tile=tile))
        cache = kv_cache.empty((2, heads, places // 2, 8), n, dtype)
        for t in range(places):
            if t == places // 2:
                cache = kv_cache.grow(cache, places)
            got, cache = attend(*x_3xTxBxHxd[:, t], cache, t)
            q, (k, v) = x_3xTxBxHxd[0, t], kept[:, : t + 1]
            scores = np.einsum("bhd,tbhd->bht", q, k) / math.sqrt(8)
            weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            want = np.einsum("bht,tbhd->bhd", weights, v)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_heads_share_a_row_of_128_lanes():
    shapes = {(12, 64): 2, (32, 100): 1, (6, 16): 6, (5, 256): 1, (32, 4): 8}
    assert {shape: kv_cache.heads_in_row(*shape, "tpu") for shape in shapes} == shapes
    assert kv_cache.heads_in_row(12, 64, "cpu") == kv_cache.heads_in_row(12, 64, "gpu") == 1


@pytest.mark.parametrize("platform, rows", [("tpu", 8), ("cuda", 1), ("cpu", 1)])
def test_only_tpus_rotate_by_a_product_and_read_the_cache_by_eight_rows(platform, rows):
    def text(function, *args):
        return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()

    table = generator_lib.rope_table((2, 3), 8)
    rotate = lambda x: generator_lib.apply_rope(x, table)
    by_product = "dot_general" in text(rotate, jnp.zeros((2, 7, 3, 8), jnp.bfloat16))
    assert by_product == (platform == "tpu")
    attention, x = generator_lib.Attention(CONFIG), jnp.zeros((2, 1, CONFIG.width))
    cache = (jnp.zeros((2, CONFIG.num_heads, 5, CONFIG.head_dim)),) * 2
    shapes = jax.eval_shape(attention.init, jax.random.key(0), x, cache, 0)
    scores = f"tensor<2x{CONFIG.num_heads}x{rows}x5xf32>"
    assert scores in text(attention.apply, shapes, x, cache, 0)


@pytest.mark.parametrize("length, kept", [(1, True), (7, False)])
def test_decoding_keeps_the_ffns_first_two_products_apart(length, kept):
    # Else XLA for GPUs joins them, and copies both weights side by side at every token.
    block = generator_lib.FeedForward(CONFIG)
    x = jnp.zeros((2, length, CONFIG.width))
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)
    text = jax.jit(block.apply).lower(shapes, x).as_text()
    assert ("optimization_barrier" in text) == kept


# Layers ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tapped(params, batch):
    model = Generator(CONFIG, taps=(1, 2, 3))
    return jax.jit(model.apply)({"params": params}, *batch)


def test_taps_are_the_hidden_states_of_every_layer(params, batch, tapped):
    _, taps = tapped
    assert sorted(taps) == [1, 2, 3]
    for layer, state in taps.items():
        assert state.shape == (4, CONFIG.length, CONFIG.width) and state.dtype == jnp.float32
        want = hidden_states(CONFIG, params, *batch, layer)
        np.testing.assert_allclose(want, state, rtol=1e-5, atol=1e-5)
    assert not np.allclose(taps[1], taps[2], atol=1e-2)


@pytest.mark.parametrize("unroll", [2, 3])
def test_the_unrolled_layer_loop_computes_the_same(params, batch, tapped, unroll):
    model = Generator(dataclasses.replace(CONFIG, unroll=unroll), taps=(1, 2, 3))
    logits, taps = jax.jit(model.apply)({"params": params}, *batch)
    np.testing.assert_allclose(logits, tapped[0], rtol=1e-5, atol=1e-5)
    for layer in taps:
        np.testing.assert_allclose(taps[layer], tapped[1][layer], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [1, 2])
def test_hidden_states_read_no_parameter_above_their_layer(params, batch, layer):
    poisoned = {
        **params,
        "layers": jax.tree.map(lambda x: x.at[layer:].set(jnp.nan), params["layers"]),
        "norm": {"scale": jnp.full(CONFIG.width, jnp.nan)},
        "output": {"kernel": jnp.full((CONFIG.width, CONFIG.vocab_size), jnp.nan)},
    }
    states = hidden_states(CONFIG, poisoned, *batch, layer)
    assert np.isfinite(states).all()
    np.testing.assert_array_equal(states, hidden_states(CONFIG, params, *batch, layer))


def test_a_prefix_gives_the_same_logits(params, batch, tapped):
    codes, labels = batch
    for length in (0, 5):
        logits = logits_of(CONFIG, params, codes[:, :length], labels)
        np.testing.assert_allclose(logits, tapped[0][:, : length + 1], rtol=1e-5, atol=1e-5)


def test_bfloat16_is_close_to_float32_and_keeps_float32_parameters(params, batch, tapped):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    logits, taps = jax.jit(Generator(config, taps=(2,)).apply)({"params": params}, *batch)
    assert logits.dtype == jnp.bfloat16 and taps[2].dtype == jnp.float32
    for got, exact in ((logits, tapped[0]), (taps[2], tapped[1][2])):
        exact = np.asarray(exact)
        error = np.asarray(got, np.float32) - exact
        assert 0 < np.sqrt(np.mean(error**2)) < 0.02 * np.sqrt(np.mean(exact**2))
    shapes = jax.eval_shape(lambda: generator_lib.init_params(config, jax.random.key(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


# Dropout -----------------------------------------------------------------------------------------

RATES = ("token_dropout", "residual_dropout", "ffn_dropout", "class_dropout")


def with_rates(**rates):
    """A config with these rates alone; a null class as in CONFIG (a rate that never strikes)."""
    none = dict.fromkeys(RATES, 0.0) | {"class_dropout": 1e-9}
    return dataclasses.replace(CONFIG, **(none | rates))


def test_without_an_rng_or_with_rates_of_zero_nothing_is_dropped(params, batch, tapped):
    high = with_rates(**dict.fromkeys(RATES, 0.9))
    for config, key in ((high, None), (with_rates(), jax.random.key(0))):
        logits = logits_of(config, params, *batch, key=key)
        np.testing.assert_allclose(logits, tapped[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", RATES[:3])
def test_each_dropout_acts_under_an_rng_alone_and_by_its_key(params, batch, tapped, rate):
    config = with_rates(**{rate: 0.3})
    run = lambda seed: logits_of(config, params, *batch, key=jax.random.key(seed))
    once, again, other = map(run, (0, 0, 1))
    np.testing.assert_array_equal(once, again)
    assert not np.allclose(once, other, atol=1e-2)
    assert not np.allclose(once, tapped[0], atol=1e-2)


def test_class_dropout_turns_whole_images_into_the_null_class(params, tapped):
    count = 64
    codes, labels = np.zeros((count, LAST), np.int32), np.arange(count) % CONFIG.num_classes
    config = with_rates(class_dropout=0.25)
    logits = logits_of(config, params, codes, labels, key=jax.random.key(0))
    kept = logits_of(config, params, codes, labels)
    null = logits_of(config, params, codes, np.full(count, CONFIG.null_class))
    as_kept = np.abs(logits - kept).max(axis=(1, 2)) < 1e-4
    as_null = np.abs(logits - null).max(axis=(1, 2)) < 1e-4
    assert (as_kept ^ as_null).all()
    assert 0.1 < as_null.mean() < 0.4


def test_every_layer_drops_other_channels(params, batch):
    # Without FFN a block adds dropout(attention): where a state stays as it was, it was dropped.
    config = with_rates(residual_dropout=0.5)
    feed_forward = params["layers"]["feed_forward"]
    silent = {**feed_forward, "w2": jax.tree.map(jnp.zeros_like, feed_forward["w2"])}
    given = {**params, "layers": {**params["layers"], "feed_forward": silent}}
    run = jax.jit(Generator(config, taps=(1, 2, 3)).apply)
    _, taps = run({"params": given}, *batch, rngs={"dropout": jax.random.key(0)})
    second, third = (np.asarray(taps[n] == taps[n - 1]) for n in (2, 3))
    for share in (second.mean(), third.mean(), (second == third).mean()):
        assert share == pytest.approx(0.5, abs=0.05)


# Conversion --------------------------------------------------------------------------------------


def test_round_trip_of_the_generator_through_torch_names(params):
    state = torch_names.to_torch(CONFIG, params)
    assert state["layers.2.attention.wqkv.weight"].shape == (96, 32)
    back = torch_names.from_torch(CONFIG, state)
    jax.tree.map(np.testing.assert_array_equal, back, jax.device_get(params))
    # Rows of wqkv are q, k, v; the rows of each are its heads, one after the other.
    kernel = np.asarray(params["layers"]["attention"]["wqkv"]["kernel"])  # N D 3 H d
    key_row = state["layers.1.attention.wqkv.weight"][32 + 16 + 5]
    np.testing.assert_array_equal(key_row, kernel[1, :, 1, 1, 5])


def test_a_generator_that_does_not_fit_is_refused_with_every_name(params):
    state = torch_names.to_torch(CONFIG, params)
    del state["norm.weight"], state["layers.1.ffn_norm.weight"]
    state["layers.3.ffn_norm.weight"] = np.zeros(32)
    state["freqs_cis"] = np.zeros(3)
    state["output.weight"] = state["output.weight"].T
    state["layers.0.attention.wo.weight"] = np.zeros((32, 31))
    message = refusal(torch_names.from_torch, CONFIG, state, error=torch_names.NamesError)
    names = ["norm.weight", "freqs_cis", "output.weight", "layers.0.attention.wo.weight"]
    names += ["layers.1.ffn_norm.weight", "layers.3.ffn_norm.weight"]
    assert all(name in message for name in names)
    without = dataclasses.replace(CONFIG, class_dropout=0.0)  # no null class
    with pytest.raises(ValueError, match="embedding_table.weight"):
        torch_names.from_torch(without, torch_names.to_torch(CONFIG, params))


def test_projectors_through_torch_names_and_back():
    term = foresight.Term(offsets=((0, 0), (0, 1), (1, 0)), projector_width=6)
    projectors = jax.device_get(foresight.init_heads(term, 7, 5, jax.random.key(0)))
    state = torch_names.projectors_to_torch(projectors)
    assert len(state) == 18
    assert state["projectors.2.0.weight"].shape == (6, 5)
    others = {"norm.weight": np.ones(5)}
    back = torch_names.projectors_from_torch(state | others)
    jax.tree.map(np.testing.assert_array_equal, back, projectors)
    misshapen = state | {"projectors.1.2.weight": np.zeros((6, 5))}
    lost = {"projectors.0.2.bias", "projectors.1.4.weight"}
    lacking = {name: array for name, array in state.items() if name not in lost}
    wrong = (misshapen, {"projectors.1.2.weight"}), (lacking, lost), (others, {"projectors"})
    for state, names in wrong:
        message = refusal(torch_names.projectors_from_torch, state, error=torch_names.NamesError)
        assert all(name in message for name in names)
