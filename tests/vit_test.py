"""DINOv2: network, resampling, teacher.

dinov2_b.npz was computed in float32 on a CPU with the official code (facebookresearch/dinov2, built
with `interpolate_antialias=True, interpolate_offset=0`, without xformers) and PyTorch 2.13, on random
parameters that float16 can hold: two blocks 16 wide, two heads, three registers, SwiGLU, positions
for 5x5 patches. `layer1/` is block 1 and `gelu/` the network with other feed-forward parameters, both
on the left 28 columns of `preprocessed_bchw`;
`positions/HxW` is `pos_embed` after torch's bicubic with antialiasing and `shown/HxW` are `pixels`
after /255, mean, deviation and torch's bicubic without.
"""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mirai_jax.models import preprocessing, teacher, vit, vit_sizes
from mirai_jax.models.vit_sizes import PUBLISHED
from mirai_jax.weights import torch_names

with np.load(pathlib.Path(__file__).parent / "data" / "dinov2_b.npz") as file:
    DATA = dict(file)
STATE = {n.removeprefix("params/"): a for n, a in DATA.items() if n.startswith("params/")}
GELU_MLP = {
    n.removeprefix("gelu/params/"): a for n, a in DATA.items() if n.startswith("gelu/params/")
}
GELU_STATE = {n: a for n, a in STATE.items() if ".mlp." not in n} | GELU_MLP
SHOWN = DATA["preprocessed_bchw"].transpose(0, 2, 3, 1)
SMALL = vit.VitConfig(width=16, num_layers=2, num_heads=2, pos_grid=(4, 4))

pytestmark = pytest.mark.usefixtures("quick_compilation")


def network(state, dtype="float32", layer=0):
    """The network of a state dict as a jitted function of images."""
    config = vit_sizes.config_of(state, num_heads=2)
    params = torch_names.from_torch(config, state)
    return jax.jit(
        lambda images: vit.VisionTransformer(config, dtype).apply({"params": params}, images, layer)
    )


def random_params(config, seed=0):
    """Larger than a fresh network's, so that attention and every path matter."""
    init = vit.VisionTransformer(config).init
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 14, 14, 3)))["params"]
    rng = np.random.RandomState(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def random_pixels(*shape, seed=0):
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


# Against PyTorch ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix, state, columns, layer",
    [("", STATE, 42, 0), ("layer1/", STATE, 28, 1), ("gelu/", GELU_STATE, 28, 2)],
    ids=["swiglu", "first block, 3x2 patches", "gelu, 3x2 patches"],
)
def test_matches_the_official_network(prefix, state, columns, layer):
    patches, leading = network(state, layer=layer)(SHOWN[:, :, :columns])
    cls = leading[:, 0]
    want, want_cls = DATA[f"{prefix}patch_features"], DATA[f"{prefix}cls_feature"]
    assert patches.shape == (2, 3, columns // 14, 16)
    assert patches.dtype == cls.dtype == jnp.float32
    np.testing.assert_allclose(patches.reshape(want.shape), want, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(cls, want_cls, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("grid", ["3x2", "8x2", "7x6"])
def test_positions_match_torch(grid):
    positions, want = STATE["pos_embed"], DATA[f"positions/{grid}"]
    got = preprocessing.resample_positions(positions, (5, 5), tuple(map(int, grid.split("x"))))
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_array_equal(got[:, 0], positions[:, 0])
    np.testing.assert_array_equal(
        preprocessing.resample_positions(positions, (5, 5), (5, 5)), positions
    )


@pytest.mark.parametrize("size", ["84x14", "13x57"])
def test_preprocessing_matches_torch(size):
    """96x45 pixels made smaller, and smaller in one direction and larger in the other."""
    want, size = DATA[f"shown/{size}"], tuple(map(int, size.split("x")))
    pixels = jnp.asarray(DATA["pixels"])
    for images in (pixels, pixels.astype(jnp.float32) / 255):
        got = preprocessing.preprocess(images, size)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-5)


# Sizes and state dicts ----------------------------------------------------------------------------


def shapes_of(config):
    """{official name: an array of that shape}, no memory behind them."""
    images = jax.ShapeDtypeStruct((1, 14, 14, 3), np.float32)
    shapes = jax.eval_shape(vit.VisionTransformer(config).init, jax.random.key(0), images)["params"]
    empty = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    return torch_names.to_torch(config, empty)


PARAMETERS = {
    "dinov2_vits14": 22_056_576,
    "dinov2_vitb14": 86_580_480,
    "dinov2_vitl14": 304_368_640,
    "dinov2_vitg14": 1_136_480_768,
    "dinov2_vits14_reg4": 22_058_112,
    "dinov2_vitb14_reg4": 86_583_552,
    "dinov2_vitl14_reg4": 304_372_736,
    "dinov2_vitg14_reg4": 1_136_486_912,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_determine_the_published_sizes(name):
    config = PUBLISHED[name]
    state = shapes_of(config)
    assert sum(array.size for array in state.values()) == PARAMETERS[name]
    assert vit_sizes.config_of(state) == config
    assert name in teacher.TEACHERS


def test_config_of_a_state_dict():
    want = vit.VitConfig(
        width=16, num_layers=2, num_heads=2, registers=3, swiglu=True, pos_grid=(5, 5)
    )
    assert vit_sizes.config_of(STATE, num_heads=2) == want
    want = dataclasses.replace(want, swiglu=False)
    assert vit_sizes.config_of(GELU_STATE, num_heads=2) == want


@pytest.mark.parametrize(
    "change, name",
    [
        ({"cls_token": None}, "cls_token"),
        ({"pos_embed": np.zeros((1, 24, 16))}, "pos_embed has 23 patches"),
        ({"pos_embed": np.zeros((26, 16))}, "pos_embed"),
        ({f"blocks.{i}.norm1.weight": None for i in range(2)}, "blocks.0.norm1.weight"),
        ({"cls_token": np.zeros((1, 1, 15))}, "num_heads"),
    ],
)
def test_another_state_dict_is_refused(change, name):
    state = {n: a for n, a in (STATE | change).items() if a is not None}
    with pytest.raises(ValueError, match=name):
        vit_sizes.config_of(state, num_heads=2)
    with pytest.raises(ValueError, match="num_heads"):
        vit_sizes.config_of(STATE)  # whose width is not that of a published network


# The network's behaviour --------------------------------------------------------------------------


def test_a_fresh_network_keeps_blocks_that_a_tap_leaves_out():
    def init(layer):
        images = jnp.zeros((1, 28, 14, 3))
        return jax.eval_shape(
            lambda key: vit.VisionTransformer(SMALL).init(key, images, layer), jax.random.key(0)
        )

    assert init(1) == init(0)
    assert {x.shape[0] for x in jax.tree.leaves(init(1)["params"]["blocks"])} == {2}


@pytest.mark.parametrize("layer, depth", [(0, 3), (1, 1), (2, 2)])
def test_only_blocks_up_to_the_tap_are_run(layer, depth):
    config = dataclasses.replace(SMALL, num_layers=3)
    params = random_params(config)
    images = jnp.asarray(np.random.RandomState(1).normal(size=(1, 28, 28, 3)), jnp.float32)
    run = lambda params: vit.VisionTransformer(config).apply({"params": params}, images, layer)[0]
    assert re.findall(r" length=(\d+)", str(jax.make_jaxpr(run)(params))) == [str(depth)]
    got = run(params)
    cut = lambda x, fill: jnp.asarray(x).at[depth:].set(fill)
    broken = params | {"blocks": jax.tree.map(lambda x: cut(x, jnp.nan), params["blocks"])}
    np.testing.assert_array_equal(run(broken), got)
    # Blocks that add nothing equal no blocks.
    silent = params["blocks"] | {
        n: {"gamma": cut(params["blocks"][n]["gamma"], 0)} for n in ("ls1", "ls2")
    }
    whole = vit.VisionTransformer(config).apply({"params": params | {"blocks": silent}}, images)[0]
    np.testing.assert_allclose(got, whole, atol=1e-5)


def test_every_patch_sees_every_other():
    params = random_params(SMALL)
    images = np.random.RandomState(1).normal(size=(1, 28, 42, 3)).astype(np.float32)
    first_patch = jax.jit(
        jax.grad(
            lambda x: vit.VisionTransformer(SMALL).apply({"params": params}, x)[0][0, 0, 0].sum()
        )
    )(images)
    by_patch = np.abs(first_patch).reshape(2, 14, 3, 14, 3).max(axis=(1, 3, 4))
    assert (by_patch > 0).all()


def test_bfloat16_is_close_to_float32():
    exact, _ = network(STATE)(SHOWN)
    rough, prefix = network(STATE, "bfloat16")(SHOWN)
    assert rough.dtype == prefix.dtype == jnp.float32
    error = np.abs(rough - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.03


@pytest.mark.parametrize(
    "images, layer, name",
    [
        (jnp.zeros((1, 3, 28, 28)), 0, "images"),
        (jnp.zeros((28, 28, 3)), 0, "images"),
        (jnp.zeros((1, 28, 28, 3), jnp.uint8), 0, "images .* uint8"),
        (jnp.zeros((1, 28, 28, 3)), 3, "layer is 3"),
        (jnp.zeros((1, 28, 28, 3)), -1, "layer is -1"),
    ],
)
def test_other_images_and_layers_are_refused(images, layer, name):
    with pytest.raises(ValueError, match=name):
        vit.VisionTransformer(SMALL).init(jax.random.key(0), images, layer)


def test_preprocessing_refuses_other_integers():
    with pytest.raises(ValueError, match="images .* int32"):
        preprocessing.preprocess(jnp.zeros((1, 28, 28, 3), jnp.int32), (14, 14))


# The teacher --------------------------------------------------------------------------------------


def teach(images, grid, config=SMALL, **how):
    module = teacher.VitTeacher(grid, config, **how)
    params = {"network": random_params(config)}
    return jax.jit(lambda x: module.apply({"params": params}, x))(images)


def test_teacher_gives_each_token_its_patch():
    images = random_pixels(2, 20, 30, 3)
    module = teacher.VitTeacher((2, 3), SMALL, layer=1)
    assert module.feature_width == 16
    params = random_params(SMALL)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    assert jax.tree.map(np.shape, shapes) == {"network": jax.tree.map(np.shape, params)}
    shown = preprocessing.preprocess(images, (28, 42))
    want = vit.VisionTransformer(SMALL).apply({"params": params}, shown, layer=1)[0]
    got = teach(images, (2, 3), layer=1)
    assert got.shape == (2, 6, 16) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want.reshape(2, 6, 16), atol=1e-5)


@pytest.mark.parametrize(
    "image_size, patches",
    [(0, (3, 4)), (56, (3, 4)), (14 * 8, (6, 8)), (14 * 11, (8, 11)), (14, (1, 1))],
)
def test_the_longer_side_has_image_size(image_size, patches):
    assert teacher.VitTeacher((3, 4), SMALL, image_size).patches == patches
    assert teacher.VitTeacher((4, 3), SMALL, image_size).patches == patches[::-1]


@pytest.mark.parametrize("image_size", [60, 7, -14])
def test_teacher_refuses_a_size_that_patches_do_not_tile(image_size):
    with pytest.raises(ValueError, match=f"image_size is {image_size}"):
        teach(random_pixels(1, 8, 8, 3), (2, 2), image_size=image_size)


@pytest.mark.parametrize("image_size", [0, 14 * 8, 14 * 11], ids=["same", "finer", "uneven"])
def test_features_lie_where_the_pixels_are(image_size):
    """Of all tokens, the one whose pixels change changes most: on the token grid and off it."""
    config, tokens = dataclasses.replace(SMALL, num_layers=1), (0, 3, 6, 11)
    images = np.full((5, 3 * 16, 4 * 16, 3), 128, np.uint8)
    for image, token in zip(images[1:], tokens, strict=True):
        row, column = divmod(token, 4)
        image[16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)] = random_pixels(16, 16, 3)
    features = teach(images, (3, 4), config, image_size=image_size)
    for changed, token in zip(features[1:], tokens, strict=True):
        change = np.linalg.norm(changed - features[0], axis=-1)
        assert np.argmax(change) == token
        assert change[token] > 1.5 * np.partition(change, -2)[-2]


def test_tokens_share_the_features_of_coarser_patches():
    config = dataclasses.replace(SMALL, num_layers=1)
    images = np.full((2, 64, 96, 3), 128, np.uint8)
    images[1, 32:, 64:] = random_pixels(32, 32, 3)
    features = teach(images, (4, 6), config, image_size=14 * 3)
    change = np.linalg.norm(features[1] - features[0], axis=-1).reshape(4, 6)
    assert np.argmax(change) == 23 and change[3, 5] > 2 * change[:2, :4].max()


def test_grey_images_become_rgb():
    grey = random_pixels(2, 16, 16, 1)
    np.testing.assert_array_equal(teach(grey, (2, 2)), teach(np.repeat(grey, 3, axis=-1), (2, 2)))


def test_auto_is_bfloat16_on_tpus_alone():
    module = teacher.VitTeacher((2, 2), SMALL, dtype="auto")
    images = jnp.zeros((1, 16, 16, 3), jnp.uint8)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)

    def text(platform):
        traced = jax.jit(module.apply).trace(shapes, images)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert ["bf16" in text(platform) for platform in ("cpu", "cuda", "tpu")] == [False, False, True]


def test_gelu_in_bfloat16_on_tpus_is_as_near_as_bfloat16_allows():
    x = jnp.concatenate([jnp.linspace(-7, 7, 5001), jnp.array([-1e30, -100, 100, 1e30])])
    exact = jax.vmap(jax.value_and_grad(lambda x: jax.nn.gelu(x, approximate=False)))(x)
    other = jax.vmap(jax.value_and_grad(vit._gelu_by_tanh))(x)
    np.testing.assert_allclose(other[0], exact[0], rtol=1e-6, atol=2.6e-5)
    np.testing.assert_allclose(other[1], exact[1], atol=2e-4)
    x = x.astype(jnp.bfloat16)
    errors = [
        jnp.abs(gelu(x).astype(jnp.float32) - jax.nn.gelu(x.astype(jnp.float32), approximate=False))
        for gelu in (vit._gelu_by_tanh, vit._gelu)
    ]
    assert errors[0][:-4].mean() < errors[1][:-4].mean()

    def text(dtype, platform):
        traced = jax.jit(vit._gelu).trace(x.astype(dtype))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "tanh" in text("bfloat16", "tpu") and "tanh" not in text("bfloat16", "cuda")
    assert "tanh" not in text("float32", "tpu")
