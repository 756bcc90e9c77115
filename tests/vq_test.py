"""The convolutional tokenizer and the names of its parameters; also DINOv2's and the generator's.

Numbers of the official code are in golden_test.py. Here: full-size names and shapes, layouts and
borders against NumPy, the nearest code, other shapes of images, what is refused.
"""

import ast
import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from mirai_jax import foresight
from mirai_jax.models import batched, tokenizer, vit, vq
from mirai_jax.models import generator as generator_lib
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.weights import torch_names

pytestmark = pytest.mark.usefixtures("quick_compilation")
DATA = pathlib.Path(__file__).parent / "data"
SMALL = vq.VQConfig(multipliers=(1, 2), width=32, z_channels=16, vocab_size=50)
SHAPE, GRID = (3, 8, 12, 3), (4, 6)  # of the images and the codes of most tests: compiled once
CODEBOOK_USED = "quantize.codebook_used"


def free(shape):
    """An array of that shape with no memory behind it."""
    return np.broadcast_to(np.float32(0), shape)


def abstract_params(module, *shape):
    images = jax.ShapeDtypeStruct(shape, np.float32)
    return jax.eval_shape(module.init, jax.random.key(0), images)["params"]


@functools.cache
def vq_state(config):
    """{PyTorch name: array of the right shape} without memory, and without the buffer."""
    side = config.downsample
    params = abstract_params(vq.VQModel(config), 1, side, side, config.channels)
    state = torch_names.vq_to_torch(config, jax.tree.map(lambda x: free(x.shape), params))
    return {name: array for name, array in state.items() if name != CODEBOOK_USED}


def random_params(config, seed=0):
    """Parameters of ordinary size, biases too, whose kernels keep the size of what they act on."""
    rng = np.random.RandomState(seed)

    def draw(path, shape):
        if path[-1] == "kernel":
            return rng.normal(0, math.prod(shape[:-1]) ** -0.5, shape)
        return {
            "scale": lambda: rng.uniform(0.5, 1.5, shape),
            "bias": lambda: rng.normal(0, 0.2, shape),
            "embedding": lambda: rng.normal(0, 1, shape),
        }[path[-1]]()

    side = config.downsample
    tree = abstract_params(vq.VQModel(config), 1, side, side, config.channels)
    flat = traverse_util.flatten_dict(tree)
    return traverse_util.unflatten_dict(
        {path: draw(path, leaf.shape).astype(np.float32) for path, leaf in flat.items()}
    )


@pytest.fixture(scope="module")
def params():
    return random_params(SMALL)


@functools.partial(jax.jit, static_argnums=(0, 1))
def call(config, method, params, x):
    return vq.VQModel(config).apply({"params": params}, x, method=method)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def decode(config, params, codes, grid=GRID, dtype="float32"):
    return vq.VQModel(config, dtype).apply({"params": params}, codes, grid, method="decode")


def random_images(*shape, seed=0):
    return np.random.RandomState(seed).uniform(-1, 1, shape).astype(np.float32)


def random_codes(count, length, seed=0):
    return np.random.RandomState(seed).randint(0, SMALL.vocab_size, (count, length))


# Names and shapes of the published files ----------------------------------------------------------


def published(name):
    """{name: shape} of a file of tests/data."""
    lines = (DATA / f"names_{name}.txt").read_text().splitlines()
    pairs = [line.split(" ", 1) for line in lines if not line.startswith("#")]
    assert len(dict(pairs)) == len(pairs) > 20
    return {name: ast.literal_eval(shape) for name, shape in pairs}


def shapes(state):
    return {name: array.shape for name, array in state.items()}


def count(state):
    return sum(array.size for array in state.values())


def test_vq16_has_the_published_names_and_shapes():
    expected = published("vq16")
    state = vq_state(vq.VQConfig())
    assert shapes(state) | {CODEBOOK_USED: expected[CODEBOOK_USED]} == expected
    assert count(state) == 71_883_403
    assert vq.config_of(state | {CODEBOOK_USED: np.zeros(65536)}) == vq.VQConfig()
    # What is written for PyTorch has the buffer too: the official model loads strictly.
    params = torch_names.vq_from_torch(vq.VQConfig(), state)
    assert shapes(torch_names.vq_to_torch(vq.VQConfig(), params)) == expected


def test_vq8_is_a_level_shallower():
    config = vq.VQConfig(multipliers=vq.MULTIPLIERS["vq8"])
    state = vq_state(config)
    assert vq.config_of(state) == config and config != vq.VQConfig()
    module = vq.VQModel(config)
    assert module.downsample == 8 and module.grid((256, 384)) == (32, 48)
    assert vq.VQModel(vq.VQConfig()).grid((256, 384)) == (16, 24)
    levels = [state[f"encoder.conv_blocks.{i}.res.1.conv2.weight"].shape for i in range(4)]
    assert levels == [(c, c, 3, 3) for c in (128, 256, 256, 512)]
    # The decoder begins at the deepest level; attention is there, and resizing is not at the end.
    assert state["decoder.conv_blocks.0.attn.2.q.weight"].shape == (512, 512, 1, 1)
    assert state["decoder.conv_blocks.3.res.0.conv1.weight"].shape == (128, 256, 3, 3)
    assert "decoder.conv_blocks.2.upsample.conv.weight" in state
    assert not any(name.startswith("decoder.conv_blocks.3.upsample") for name in state)
    assert not any(name.startswith("encoder.conv_blocks.3.downsample") for name in state)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("dinov2_vitb14", 86_580_480),
        ("dinov2_vitb14_reg4", 86_583_552),
        ("dinov2_vitg14", 1_136_480_768),
    ],
)
def test_dinov2_has_the_published_names_and_shapes(name, parameters):
    config = vit.named(name)
    params = abstract_params(vit.DinoV2(config), 1, 14, 14, 3)
    state = torch_names.dinov2_to_torch(config, jax.tree.map(lambda x: free(x.shape), params))
    assert shapes(state) == every_layer(published(name), "blocks.", config.num_layers)
    assert count(state) == parameters


def every_layer(one, prefix, layers):
    """Some files list the first layer alone."""
    first = {name: shape for name, shape in one.items() if name.startswith(f"{prefix}0.")}
    more = {
        name.replace(f"{prefix}0.", f"{prefix}{i}.", 1): shape
        for i in range(layers)
        for name, shape in first.items()
    }
    return one | more


def test_gpt_b_has_the_published_names_and_shapes():
    layers, heads, width = generator_lib.SIZES["B"]
    config = GeneratorConfig(num_layers=layers, num_heads=heads, width=width)
    params = jax.eval_shape(functools.partial(generator_lib.init_params, config), jax.random.key(0))
    params = jax.tree.map(lambda x: free(x.shape), params)
    state = torch_names.generator_to_torch(config, params)
    assert count(state) == 110_888_448
    term = foresight.Term(offsets=((0, 0), (0, 1), (1, 0)), projector_width=2048)
    init = functools.partial(foresight.init_heads, term, width, width)
    projectors = jax.eval_shape(init, jax.random.key(0))
    projectors = jax.tree.map(lambda x: free(x.shape), projectors)
    state |= torch_names.projectors_to_torch(projectors)
    assert count(state) == 132_923_136
    assert shapes(state) == every_layer(published("gpt_b"), "layers.", 12)


# The mapping of names -----------------------------------------------------------------------------


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_round_trip_through_torch_names_bit_for_bit(params):
    state = torch_names.vq_to_torch(SMALL, params)
    assert vq.config_of(state) == SMALL
    # The first axes of a PyTorch kernel are out and in.
    kernel = params["encoder"]["conv_blocks_0"]["res_1"]["conv2"]["kernel"]
    there = state["encoder.conv_blocks.0.res.1.conv2.weight"]
    assert there[3, 7, 0, 2] == kernel[0, 2, 7, 3]
    assert_equal(torch_names.vq_from_torch(SMALL, state), params)
    again = torch_names.vq_to_torch(SMALL, torch_names.vq_from_torch(SMALL, state))
    assert_equal(again, state)
    # The buffer need not be there, and what it holds does not matter.
    for buffer in ({}, {CODEBOOK_USED: np.ones(3)}):
        own = {n: a for n, a in state.items() if n != CODEBOOK_USED}
        assert_equal(torch_names.vq_from_torch(SMALL, own | buffer), params)


def test_round_trip_of_dinov2_bit_for_bit():
    config = vit.DinoConfig(width=16, num_layers=3, num_heads=2, registers=2, pos_grid=(2, 3))
    abstract = abstract_params(vit.DinoV2(config), 1, 14, 14, 3)
    rng = np.random.RandomState(0)
    tree = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract)
    state = torch_names.dinov2_to_torch(config, tree)
    rows = tree["blocks"]["attn"]["qkv"]["kernel"]
    assert state["blocks.2.attn.qkv.weight"][5, 1] == rows[2, 1, 5]
    assert_equal(torch_names.dinov2_from_torch(config, state), tree)
    del state["blocks.1.ls2.gamma"]
    state["blocks.3.ls2.gamma"] = np.zeros(16)
    with pytest.raises(torch_names.NamesError) as error:
        torch_names.dinov2_from_torch(config, state)
    assert str(error.value) == (
        "parameters do not fit: missing blocks.1.ls2.gamma (16,); unexpected blocks.3.ls2.gamma"
    )


NAMES = sorted(vq_state(SMALL))
SHAPES = st.lists(st.integers(0, 70), max_size=5).map(tuple)


@st.composite
def damages(draw):
    """A state dict with names lost, added and misshapen, and what must be said of it."""
    state = dict(vq_state(SMALL))
    lost = draw(st.sets(st.sampled_from(NAMES), max_size=5))
    bent = draw(st.dictionaries(st.sampled_from(NAMES), SHAPES, max_size=5))
    other = st.text("abc.01", max_size=12).filter(lambda name: name not in state)
    added = draw(st.dictionaries(other, SHAPES, max_size=3))
    told = [f"missing {name} {state[name].shape}" for name in lost]
    told += [f"unexpected {name}" for name in added]
    told += [
        f"{name} is {shape}, should be {state[name].shape}"
        for name, shape in bent.items()
        if name not in lost and shape != state[name].shape
    ]
    for name, shape in {**bent, **added}.items():
        state[name] = free(shape)
    return {name: array for name, array in state.items() if name not in lost}, told


@settings(deadline=None)
@given(damages())
def test_all_that_does_not_fit_is_listed_in_one_line(damage):
    state, told = damage
    expected = shapes(vq_state(SMALL))
    if not told:
        torch_names.check_shapes(state, expected)
        return
    with pytest.raises(torch_names.NamesError) as error:
        torch_names.check_shapes(state, expected)
    start, _, listed = str(error.value).partition(": ")
    assert start == "parameters do not fit" and "\n" not in listed
    assert sorted(listed.split("; ")) == sorted(told)


def test_a_tokenizer_that_does_not_fit_is_refused_with_every_name():
    state = dict(vq_state(SMALL))
    del state["quant_conv.bias"], state["encoder.mid.1.q.weight"]
    state["encoder.conv_blocks.2.res.0.conv2.bias"] = state["loss.weight"] = free((1,))
    state["decoder.conv_in.weight"] = free((64, 15, 3, 3))
    with pytest.raises(torch_names.NamesError) as error:
        torch_names.vq_from_torch(SMALL, state)
    assert str(error.value) == (
        "parameters do not fit: missing encoder.mid.1.q.weight (64, 64, 1, 1); missing "
        "quant_conv.bias (8,); unexpected encoder.conv_blocks.2.res.0.conv2.bias; unexpected "
        "loss.weight; decoder.conv_in.weight is (64, 15, 3, 3), should be (64, 16, 3, 3)"
    )


def test_parameters_of_another_config_are_refused(params):
    other = dataclasses.replace(SMALL, vocab_size=51)
    with pytest.raises(torch_names.NamesError, match=r"quantize/embedding is \(50, 8\), should be"):
        torch_names.vq_to_torch(other, params)


MARKS = [
    "encoder.conv_in.weight",
    "encoder.conv_out.weight",
    "quantize.embedding.weight",
    "encoder.conv_blocks.0.res.0.conv1.weight",
    "encoder.conv_blocks.1.res.0.conv1.weight",
]


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(MARKS) | st.text(), st.none() | SHAPES))
def test_any_state_dict_gives_a_config_or_one_line(changes):
    state = dict(vq_state(SMALL))
    for name, shape in changes.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = free(shape)
    try:
        config = vq.config_of(state)
    except ValueError as error:
        assert str(error).startswith("not a VQ tokenizer") and "\n" not in str(error)
    else:
        assert config.downsample >= 1 and min(config.multipliers) > 0


# The nearest code ---------------------------------------------------------------------------------


def nearest(embedding, latents):
    module = vq.VQModel(dataclasses.replace(SMALL, vocab_size=len(embedding)))
    lookup = lambda module, x: module.quantize.nearest(x)
    variables = {"params": {"quantize": {"embedding": embedding}}}
    codes = jax.jit(lambda x: module.apply(variables, x, method=lookup))(latents)
    assert codes.dtype == jnp.int32
    return np.asarray(codes)


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("vocab_size", [1, 2047, 2048, 2049, 4500])
def test_the_nearest_row_on_the_sphere_against_a_loop_in_float64(vocab_size):
    rng = np.random.RandomState(vocab_size)
    embedding = rng.normal(size=(vocab_size, 8)).astype(np.float32)
    embedding *= 10 ** rng.uniform(-3, 3, (vocab_size, 1)).astype(np.float32)  # length is nothing
    latents = rng.normal(size=(3, 5, 20, 8)).astype(np.float32)
    codes = nearest(embedding, latents)
    assert codes.shape == (3, 5, 20)
    clear = 0
    for latent, code in zip(unit(latents).reshape(-1, 8), codes.reshape(-1), strict=True):
        distance = np.sum((unit(embedding) - latent) ** 2, axis=1)
        assert distance[code] <= distance.min() + 1e-6
        if vocab_size > 1 and np.diff(np.sort(distance)[:2]) > 1e-5:
            assert code == np.argmin(distance)
            clear += 1
    assert vocab_size == 1 or clear > 290
    assert vocab_size < 4500 or {0, 1, 2} == set(codes.reshape(-1) // 2048)  # all parts are used


def test_of_equally_near_rows_the_first_wins():
    """Rows along the axes, of lengths that are powers of two: nothing rounds."""
    rng = np.random.RandomState(0)
    axes = np.eye(8, dtype=np.float32)
    embedding = -np.ones((4500, 8), np.float32)  # none of them near an axis
    places = {0: (7, 9, 2050, 4400), 1: (2047, 2048), 2: (2049, 4096), 3: (4097, 4499)}
    for axis, rows in places.items():
        for row in rows:
            embedding[row] = axes[axis] * 2.0 ** rng.randint(-3, 4)
    latents = axes[[0, 1, 2, 3]] * np.float32([[1], [4], [0.25], [2]])
    assert nearest(embedding, latents).tolist() == [7, 2047, 2049, 4097]
    # Halfway between two axes: the first of either.
    between = np.float32([[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 3, 3, 0, 0, 0, 0]])
    assert nearest(embedding, between).tolist() == [7, 2049]
    # A latent of no length is as far from every row.
    assert nearest(embedding, np.zeros((1, 8), np.float32)).tolist() == [0]


def test_of_equal_rows_the_first_wins_however_they_are_rounded():
    rng = np.random.RandomState(0)
    rows = rng.normal(size=(2250, 8)).astype(np.float32)
    codes = nearest(np.concatenate([rows, rows]), rng.normal(size=(1000, 8)).astype(np.float32))
    assert codes.max() < 2250 and len(np.unique(codes)) > 500


def test_encode_looks_latents_up_row_by_row(params):
    images = random_images(*SHAPE)
    latents = np.asarray(call(SMALL, "latents", params, images))
    assert latents.shape == (3, 4, 6, 8) and latents.dtype == np.float32
    codes = np.asarray(call(SMALL, "encode", params, images))
    assert codes.shape == (3, 24) and codes.dtype == np.int32
    rows = unit(params["quantize"]["embedding"])
    similar = unit(latents).reshape(3, 24, 8) @ rows.T
    np.testing.assert_array_equal(codes, similar.argmax(axis=-1))
    assert len(np.unique(codes)) > 3


# Where things are ---------------------------------------------------------------------------------


def blind_to_neighbours(params):
    """The same with kernels that see one pixel alone, or where they halve the image a 2x2 block."""
    pixel, block = (slice(1, 2), slice(1, 2)), (slice(0, 2), slice(0, 2))

    def see(path, array):
        if path[-1] != "kernel" or array.shape[0] == 1:
            return array
        seen = np.zeros_like(array)
        window = block if "downsample" in path else pixel
        seen[window] = array[window] * 3
        return seen

    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: see(path, array) for path, array in flat.items()})


def patches(images, side):
    """(B, H, W, C) -> (B, L, side * side * C), row by row."""
    return np.asarray(tokenizer.unfold(images, side))


def test_a_code_stays_with_its_pixels_and_pixels_with_their_code():
    """Norms and attention see all positions alike; so do these kernels: patches may be moved.

    That fails if a position's patch were another than the one its pixels fill, be it by the order
    of the grid or by where the border of a halving lies.
    """
    config = dataclasses.replace(SMALL, multipliers=(1, 1, 2), vocab_size=200)
    params = blind_to_neighbours(random_params(config))
    rng = np.random.RandomState(1)
    height, width, side = 3, 5, config.downsample
    order = rng.permutation(height * width)
    rows = rng.uniform(-1, 1, (height * width, side, side, 3)).astype(np.float32)

    def image_of(rows):
        grid = rows.reshape(height, width, side, side, 3)
        return grid.transpose(0, 2, 1, 3, 4).reshape(1, height * side, width * side, 3)

    images = np.concatenate([image_of(rows), image_of(rows[order])])
    codes = np.asarray(call(config, "encode", params, images))
    assert len(np.unique(codes[0])) > 5  # or moving would show nothing
    np.testing.assert_array_equal(codes[1], codes[0][order])
    shown = patches(decode(config, params, codes, (height, width)), side)
    assert np.ptp(shown[0], axis=0).max() > 0.1
    np.testing.assert_allclose(shown[1], shown[0][order], atol=1e-4)


def test_every_latent_knows_the_far_corner(params):
    """Attention is over all positions, with a query, a key and a value of its own each."""
    images = jnp.asarray(random_images(1, 32, 32, 3))
    corner = lambda x: call(SMALL, "latents", params, x)[0, 0, 0].sum()
    gradient = np.asarray(jax.grad(corner)(images))[0]
    assert np.abs(gradient[-2:, -2:]).min() > 0


def conv(x, kernel, bias, before, after, stride=1):
    """(H, W, in) -> a convolution after padding with zeros, by its definition, in float64."""
    x = np.pad(np.float64(x), ((before, after), (before, after), (0, 0)))
    size = kernel.shape[0]
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(0, 1))
    return np.einsum("yxcij,ijco->yxo", windows[::stride, ::stride], np.float64(kernel)) + bias


def silent(params):
    """The same with residual blocks and attention that add nothing but a bias."""
    flat = traverse_util.flatten_dict(params)
    quiet = {
        p: 0 * a for p, a in flat.items() if p[-1] == "kernel" and p[-2] in ("conv2", "proj_out")
    }
    return traverse_util.unflatten_dict(flat | quiet)


def encoder_by_hand(params, image, before):
    """An encoder of `silent` blocks, its halving padded by `before` pixels at the top and left."""
    encoder = params["encoder"]

    def level(x, blocks):
        return x + sum(b.get("conv2", b.get("proj_out"))["bias"] for b in blocks.values())

    fine, deep = dict(encoder["conv_blocks_0"]), encoder["conv_blocks_1"]
    halve = fine.pop("downsample")["conv"]
    x = conv(image, **encoder["conv_in"], before=1, after=1)
    x = conv(level(x, fine), **halve, before=before, after=1 - before, stride=2)
    x = level(x, deep | {name: encoder[name] for name in ("mid_0", "mid_1", "mid_2")})
    groups = x.reshape(*x.shape[:2], 32, -1)
    shard_activation = np.sqrt(groups.var(axis=(0, 1, 3), keepdims=True) + 1e-6)
    x = ((groups - groups.mean(axis=(0, 1, 3), keepdims=True)) / shard_activation).reshape(x.shape)
    x = x * encoder["norm_out"]["scale"] + encoder["norm_out"]["bias"]
    x = conv(x / (1 + np.exp(-x)), **encoder["conv_out"], before=1, after=1)
    return conv(x, **params["quant_conv"], before=0, after=0)


def test_halving_pads_at_the_bottom_and_right():
    config = dataclasses.replace(SMALL, multipliers=(1, 1), width=64)  # two channels a group
    params = silent(random_params(config))
    image = random_images(6, 10, 3)
    latents = call(config, "latents", params, image[None])[0]
    np.testing.assert_allclose(latents, encoder_by_hand(params, image, before=0), atol=1e-4)
    other = encoder_by_hand(params, image, before=1)
    assert np.abs(latents - other).max() > 0.1  # the other border would be seen


# Batches, chunks, types ---------------------------------------------------------------------------


def test_images_of_a_batch_do_not_see_each_other(params):
    images = random_images(*SHAPE)
    codes = call(SMALL, "encode", params, images)
    shown = decode(SMALL, params, codes)
    for k in range(3):
        np.testing.assert_array_equal(
            call(SMALL, "encode", params, images[k : k + 1]), codes[k : k + 1]
        )
        alone = decode(SMALL, params, codes[k : k + 1])
        np.testing.assert_allclose(alone, shown[k : k + 1], atol=1e-5)


def test_chunks_give_what_the_whole_gives(params):
    module = vq.VQModel(SMALL)
    pixels = np.random.RandomState(0).randint(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    whole = np.asarray(call(SMALL, "encode", params, tokenizer.to_unit(pixels)))
    shown = np.asarray(tokenizer.to_uint8(decode(SMALL, params, whole, (4, 4))))
    assert np.ptp(shown) > 50
    for chunk in (2, 7):
        codes = batched.encode_images(module, params, pixels, chunk)
        assert codes.dtype == np.int32
        np.testing.assert_array_equal(codes, whole)
        images = batched.decode_codes(module, params, whole, chunk)
        assert images.dtype == np.uint8 and images.shape == pixels.shape
        # Chunks of another size round otherwise: now and then a pixel lies on the other side.
        difference = np.abs(images.astype(int) - shown)
        assert difference.max() <= 1 and difference.mean() < 0.01


def test_bfloat16_decodes_close_to_float32(params):
    codes = random_codes(3, 24)
    exact = decode(SMALL, params, codes)
    rough = decode(SMALL, params, codes, GRID, "bfloat16")
    assert exact.dtype == rough.dtype == jnp.float32
    difference = np.abs(rough - exact)
    assert 0 < difference.mean() < 0.02 and difference.max() < 0.2


def test_rows_of_any_length_decode_alike(params):
    codes = random_codes(3, 24)
    longer = {"embedding": params["quantize"]["embedding"] * np.float32(3)}
    np.testing.assert_allclose(
        decode(SMALL, params | {"quantize": longer}, codes), decode(SMALL, params, codes), atol=1e-4
    )


def test_decoded_images_are_clipped(params):
    codes = random_codes(3, 24)
    last = params["decoder"]["conv_out"]
    loud = params | {
        "decoder": params["decoder"] | {"conv_out": jax.tree.map(lambda x: 5 * x, last)}
    }
    images = decode(SMALL, loud, codes)
    assert images.min() == -1 and images.max() == 1
    raw = call(SMALL, "decode_unclipped", loud, codes[:, :16])
    assert raw.shape == (3, 8, 8, 3) and np.abs(raw).max() > 1.5


def test_images_need_not_be_square(params):
    images = random_images(*SHAPE)
    codes = call(SMALL, "encode", params, images)
    shown = call(SMALL, "__call__", params, images)
    assert shown.shape == SHAPE
    np.testing.assert_allclose(shown, decode(SMALL, params, codes), atol=1e-4)
    turned = decode(SMALL, params, codes, GRID[::-1])
    assert turned.shape == (3, 12, 8, 3)


@pytest.mark.parametrize("grid, told", [(None, "4x4"), ((5, 4), "5x4"), ((0, 24), "0x24")])
def test_codes_that_fill_no_grid_are_refused(params, grid, told):
    for method in ("decode", "decode_unclipped"):
        with pytest.raises(ValueError) as error:
            module = vq.VQModel(SMALL)
            module.apply({"params": params}, random_codes(1, 24), grid, method=method)
        assert str(error.value) == f"24 codes an image do not fill a {told} grid"


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 6, 7, 3), "image size 6x7 does not divide into tokens of 2x2 pixels"),
        ((1, 0, 8, 3), "image size 0x8 does not divide into tokens of 2x2 pixels"),
        ((1, 8, 8, 1), "images have 1 channels, this tokenizer takes 3"),
        ((1, 8, 8, 4), "images have 4 channels, this tokenizer takes 3"),
    ],
)
def test_images_that_do_not_fit_are_refused(params, shape, message):
    for method in ("encode", "latents", "__call__"):
        with pytest.raises(ValueError) as error:
            vq.VQModel(SMALL).apply({"params": params}, np.zeros(shape, np.float32), method=method)
        assert str(error.value) == message
