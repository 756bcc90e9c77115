"""The convolutional tokenizer and the names of its parameters; also DINOv2's and the generator's.

Numbers of the official code are in golden_test.py. Here: full-size names and shapes, layouts, the
nearest code, other shapes of images, what is refused.
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

from mirai_jax import foresight
from mirai_jax.models import batched, tokenizer, vit, vit_sizes, vq
from mirai_jax.models import generator as generator_lib
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.models.vit_sizes import PUBLISHED
from mirai_jax.weights import pretrained, state_dict, torch_names, torch_writer

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
    state = torch_names.to_torch(config, jax.tree.map(lambda x: free(x.shape), params))
    return {name: array for name, array in state.items() if name != CODEBOOK_USED}


def random_params(config, seed=0):
    """Parameters of ordinary size, whose kernels keep the size of their inputs."""
    rng, side = np.random.RandomState(seed), config.downsample

    def draw(path, leaf):
        name, shape = path[-1].key, leaf.shape
        deviation = {"scale": 0.3, "bias": 0.2, "embedding": 1}.get(name)
        deviation = deviation or math.prod(shape[:-1]) ** -0.5
        return rng.normal(name == "scale", deviation, shape).astype(np.float32)

    tree = abstract_params(vq.VQModel(config), 1, side, side, config.channels)
    return jax.tree_util.tree_map_with_path(draw, tree)


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
    # Files for PyTorch have the buffer too: the official model loads strictly.
    params = torch_names.from_torch(vq.VQConfig(), state)
    assert shapes(torch_names.to_torch(vq.VQConfig(), params)) == expected


def test_vq8_is_a_level_shallower():
    config = vq.VQConfig(multipliers=vq.MULTIPLIERS["vq8"])
    state = vq_state(config)
    assert vq.config_of(state) == config and config != vq.VQConfig()
    module = vq.VQModel(config)
    assert module.downsample == 8 and module.grid((256, 384)) == (32, 48)
    assert vq.VQModel(vq.VQConfig()).grid((256, 384)) == (16, 24)
    levels = [state[f"encoder.conv_blocks.{i}.res.1.conv2.weight"].shape for i in range(4)]
    assert levels == [(c, c, 3, 3) for c in (128, 256, 256, 512)]
    # The decoder begins at the deepest level; attention is there.
    assert state["decoder.conv_blocks.0.attn.2.q.weight"].shape == (512, 512, 1, 1)
    assert state["decoder.conv_blocks.3.res.0.conv1.weight"].shape == (128, 256, 3, 3)


@pytest.mark.parametrize(
    "name",
    [
        "dinov2_vitb14", "dinov2_vitb14_reg4", "dinov2_vitg14",
        "dinov3_vits16", "dinov3_vitb16", "dinov3_vitl16", "mae_vitb16",
    ],
)  # fmt: skip
def test_encoders_have_the_published_names_and_shapes(name):
    config = PUBLISHED[name]
    expected = every_layer(published(name), "blocks.", config.num_layers)
    state = {name: free(shape) for name, shape in expected.items()}
    assert vit_sizes.config_of(state) == config
    params = abstract_params(vit.VisionTransformer(config), 1, config.patch, config.patch, 3)
    state = torch_names.to_torch(config, jax.tree.map(lambda x: free(x.shape), params))
    assert shapes(state) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov3_vits16", "dinov3_vitb16", "dinov3_vitl16", "mae_vitb16"])
def test_encoders_of_full_size_load_from_a_file_and_go_back_bit_for_bit(name, tmp_path):
    rng = np.random.default_rng(0)
    state = {n: rng.random(shape, np.float32) for n, shape in published(name).items()}
    torch_writer.write(tmp_path / "a.pth", {"model": state} if "mae" in name else state)
    loaded = pretrained.load("teacher.path", str(tmp_path / "a.pth"), "teacher")
    assert loaded.config == PUBLISHED[name]
    back = state_dict.to_state(loaded)
    assert back.keys() == state.keys()
    assert all(back[n].tobytes() == state[n].tobytes() for n in state)


def every_layer(one, prefix, layers):
    """The names and shapes of a file of which some list only the first layer."""
    first = [(name, shape) for name, shape in one.items() if name.startswith(f"{prefix}0.")]
    for i in range(layers):
        one |= {name.replace(f"{prefix}0.", f"{prefix}{i}.", 1): shape for name, shape in first}
    return one


def test_gpt_b_has_the_published_names_and_shapes():
    layers, heads, width = generator_lib.SIZES["B"]
    config = GeneratorConfig(num_layers=layers, num_heads=heads, width=width)
    term = foresight.Term(offsets=((0, 0), (0, 1), (1, 0)), projector_width=2048)

    def both(key):
        generator = generator_lib.init_params(config, key)
        return generator, foresight.init_heads(term, width, width, key)

    abstract = jax.eval_shape(both, jax.random.key(0))
    params, projectors = jax.tree.map(lambda x: free(x.shape), abstract)
    state = torch_names.to_torch(config, params)
    state |= torch_names.projectors_to_torch(projectors)
    assert count(state) == 132_923_136
    assert shapes(state) == every_layer(published("gpt_b"), "layers.", 12)


# The mapping of names -----------------------------------------------------------------------------


def assert_equal(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_round_trip_through_torch_names_bit_for_bit(params):
    state = torch_names.to_torch(SMALL, params)
    assert vq.config_of(state) == SMALL
    # The first axes of a PyTorch kernel are out and in.
    kernel = params["encoder"]["conv_blocks_0"]["res_1"]["conv2"]["kernel"]
    there = state["encoder.conv_blocks.0.res.1.conv2.weight"]
    assert there[3, 7, 0, 2] == kernel[0, 2, 7, 3]
    assert_equal(torch_names.from_torch(SMALL, state), params)
    # The buffer is optional, and its contents do not matter.
    own = {n: a for n, a in state.items() if n != CODEBOOK_USED}
    for buffer in ({}, {CODEBOOK_USED: np.ones(3)}):
        assert_equal(torch_names.from_torch(SMALL, own | buffer), params)


SMALL_VIT = {"width": 16, "num_layers": 3, "num_heads": 2}


@pytest.mark.parametrize(
    "config",
    [
        vit.VitConfig(**SMALL_VIT, registers=2, pos_grid=(2, 3)),
        vit.VitConfig(**SMALL_VIT, registers=2, pos_grid=None, masked_k_bias=True, patch=16,
                      local_cls_norm=True),
        vit.VitConfig(**SMALL_VIT, layer_scale=False, mask_token=False, patch=16),
    ],
    ids=lambda config: config.family,
)  # fmt: skip
def test_round_trip_of_encoders_bit_for_bit(config):
    abstract = abstract_params(vit.VisionTransformer(config), 1, config.patch, config.patch, 3)
    rng = np.random.RandomState(0)
    tree = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract)
    state = torch_names.to_torch(config, tree)
    rows = tree["blocks"]["attn"]["qkv"]["kernel"]
    assert state["blocks.2.attn.qkv.weight"][5, 1] == rows[2, 1, 5]
    assert_equal(torch_names.from_torch(config, state), tree)
    del state["blocks.1.norm2.bias"]
    with pytest.raises(torch_names.NamesError, match="blocks.1.norm2.bias"):
        torch_names.from_torch(config, state)


def test_parameters_of_another_config_are_refused(params):
    other = dataclasses.replace(SMALL, vocab_size=51)
    with pytest.raises(torch_names.NamesError, match="quantize/embedding"):
        torch_names.to_torch(other, params)
    with pytest.raises(torch_names.NamesError, match="quantize.embedding.weight"):
        torch_names.from_torch(other, vq_state(SMALL))


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
def test_the_nearest_row_on_the_sphere_against_float64(vocab_size):
    rng = np.random.RandomState(vocab_size)
    embedding = rng.normal(size=(vocab_size, 8)).astype(np.float32)
    lengths = 10 ** rng.uniform(-3, 3, (vocab_size, 1))  # they have no effect
    embedding *= lengths.astype(np.float32)
    latents = rng.normal(size=(3, 5, 20, 8)).astype(np.float32)
    codes = nearest(embedding, latents)
    assert codes.shape == (3, 5, 20)
    distances = np.sum((unit(latents).reshape(-1, 1, 8) - unit(embedding)) ** 2, axis=2)
    smallest = distances.min(axis=1, keepdims=True)
    found = np.take_along_axis(distances, codes.reshape(-1, 1), axis=1)
    assert (found <= smallest + 1e-6).all()
    clear = np.sum(distances <= smallest + 1e-5, axis=1) == 1
    assert clear.sum() > 290
    np.testing.assert_array_equal(codes.reshape(-1)[clear], distances.argmin(axis=1)[clear])
    assert vocab_size < 4500 or {0, 1, 2} == set(codes.reshape(-1) // 2048)  # all parts are used


def test_of_equally_near_rows_the_first_wins():
    """Rows along the axes, of lengths that are powers of two: nothing rounds."""
    rng = np.random.RandomState(0)
    axes = np.eye(8, dtype=np.float32)
    embedding = -np.ones((4500, 8), np.float32)  # none near an axis
    places = {0: (7, 9, 2050, 4400), 1: (2047, 2048), 2: (2049, 4096), 3: (4097, 4499)}
    for axis, rows in places.items():
        for row in rows:
            embedding[row] = axes[axis] * 2.0 ** rng.randint(-3, 4)
    latents = axes[[0, 1, 2, 3]] * np.float32([[1], [4], [0.25], [2]])
    assert nearest(embedding, latents).tolist() == [7, 2047, 2049, 4097]
    # Halfway between two axes: the first of either.
    between = np.float32([[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 3, 3, 0, 0, 0, 0]])
    assert nearest(embedding, between).tolist() == [7, 2049]
    # A latent of length zero is equally far from every row.
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
    """The same with kernels that see only one pixel, or a 2x2 block where they halve the image."""
    pixel, block = (slice(1, 2), slice(1, 2)), (slice(0, 2), slice(0, 2))

    def see(path, array):
        if path[-1] != "kernel" or array.shape[0] == 1:
            return array
        seen, window = np.zeros_like(array), block if "downsample" in path else pixel
        seen[window] = array[window] * 3
        return seen

    return traverse_util.path_aware_map(see, params)


def test_a_code_stays_with_its_pixels_and_pixels_with_their_code():
    """Norms, attention and these kernels treat all positions alike: moved patches move their codes.

    Another order of the grid, or another border of a halving, would break that.
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
    assert len(np.unique(codes[0])) > 5  # otherwise moving patches changes nothing
    np.testing.assert_array_equal(codes[1], codes[0][order])
    shown = np.asarray(tokenizer.unfold(decode(config, params, codes, (height, width)), side))
    assert np.ptp(shown[0], axis=0).max() > 0.1
    np.testing.assert_allclose(shown[1], shown[0][order], atol=1e-4)


# Batches, chunks, types ---------------------------------------------------------------------------


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
        # Chunks of another size round otherwise, and move a few pixels by one.
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
    longer = params | {"quantize": {"embedding": params["quantize"]["embedding"] * np.float32(3)}}
    ours, other = (decode(SMALL, given, codes) for given in (longer, params))
    np.testing.assert_allclose(ours, other, atol=1e-4)


def test_decoded_images_are_clipped(params):
    codes = random_codes(3, 24)
    last = jax.tree.map(lambda x: 5 * x, params["decoder"]["conv_out"])
    loud = params | {"decoder": params["decoder"] | {"conv_out": last}}
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
    assert decode(SMALL, params, codes, GRID[::-1]).shape == (3, 12, 8, 3)


def test_codes_that_fill_no_grid_are_refused(params):
    for grid, name in ((None, "4x4"), ((5, 4), "5x4"), ((0, 24), "0x24")):
        with pytest.raises(ValueError, match=name):
            decode(SMALL, params, random_codes(1, 24), grid)


def test_images_that_do_not_fit_are_refused(params):
    for shape, name in (((1, 6, 7, 3), "6x7"), ((1, 0, 8, 3), "0x8"), ((1, 8, 8, 4), "4")):
        for method in ("encode", "latents", "__call__"):
            with pytest.raises(ValueError, match=name):
                call(SMALL, method, params, np.zeros(shape, np.float32))
