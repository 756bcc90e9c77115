"""Encoders that teach: what a block-causal one sees, options of the targets, files, one that is yours."""

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import mirai_i
from mirai_jax.config import schema, unused
from mirai_jax.models import preprocessing, teacher, vit, vit_sizes
from mirai_jax.training import train
from mirai_jax.weights import (
    conversion,
    frozen,
    state_dict,
    torch_names,
    torch_writer,
    usual_names,
)
from tests.helpers import refusal, tiny

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = {"width": 16, "num_layers": 2, "num_heads": 2, "patch": 4}
KINDS = {
    "dinov2": vit.VitConfig(**SMALL, registers=2, swiglu=True, pos_grid=(3, 3)),
    "dinov3": vit.VitConfig(**SMALL, registers=4, pos_grid=None, epsilon=1e-5, masked_k_bias=True),
    "mae": vit.VitConfig(**SMALL, pos_grid=(3, 3), layer_scale=False, mask_token=False),
}
GRID, LENGTH = (3, 4), 12
each_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def random_params(config):
    """Large, so that attention and every part matter; rotations and masks are as published."""
    init = vit.VisionTransformer(config).init
    images = jnp.zeros((1, config.patch, config.patch, 3))
    rng = np.random.RandomState(0)

    def draw(path, x):
        if path[-1].key == "periods":
            return (100 ** (np.arange(*x.shape) / x.shape[0])).astype(np.float32)
        if path[-1].key == "bias_mask":
            return np.repeat(np.float32([[1, 0, 1]] * x.shape[0]), x.shape[1] // 3, axis=1)
        return rng.normal(0, 0.3, x.shape).astype(np.float32)

    shapes = jax.eval_shape(init, jax.random.key(0), images)["params"]
    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_images(height=GRID[0] * 4, width=GRID[1] * 4):
    return np.random.RandomState(1).uniform(size=(1, height, width, 3)).astype(np.float32)


def teach(kind, images, grid=GRID, **how):
    """Features (L, Z) of one image, each token's patch as large as it."""
    module = teacher.VitTeacher(grid, KINDS[kind], **how)
    params = {"network": random_params(KINDS[kind])}
    return jax.jit(lambda x: module.apply({"params": params}, x)[0])(images)


# Block-causal -------------------------------------------------------------------------------------


def numbers(features, key):
    """A random mixture of each position's features, to take gradients of."""
    mix = jax.random.normal(jax.random.key(key), features.shape)
    return (features * mix).sum(axis=-1)


@each_kind
@pytest.mark.parametrize("block", [1, 5])  # of rows of 4
def test_no_feature_knows_a_pixel_of_a_later_block(kind, block):
    module = teacher.VitTeacher(GRID, KINDS[kind], block=block)
    params = {"network": random_params(KINDS[kind])}

    def run(images):
        return numbers(module.apply({"params": params}, images)[0], 0)

    slopes = np.abs(jax.jit(jax.jacrev(run))(random_images()))  # (L, 1, H, W, 3)
    slopes = slopes.reshape(LENGTH, GRID[0], 4, GRID[1], 4, 3).max(axis=(2, 4, 5))
    blocks = np.arange(LENGTH) // block
    np.testing.assert_array_equal(
        slopes.reshape(LENGTH, LENGTH) > 0, blocks[None, :] <= blocks[:, None]
    )


@each_kind
def test_class_token_and_registers_know_no_pixel(kind):
    config = KINDS[kind]
    params, order = random_params(config), tuple(range(LENGTH))

    def run(images, order):
        prefix = vit.VisionTransformer(config).apply({"params": params}, images, order=order)[1]
        return numbers(prefix, 1).sum()

    slope = jax.jit(jax.grad(run), static_argnums=1)
    assert not np.any(slope(random_images(), order))
    assert np.any(slope(random_images(), ()))


@each_kind
def test_one_block_is_no_mask_bit_for_bit(kind):
    images = random_images()
    np.testing.assert_array_equal(teach(kind, images, block=LENGTH), teach(kind, images))


def plain(config, params, images, order):
    """Patch features (h * w, D) of one image, token by token, in NumPy and float64.

    `order` numbers the patches; a patch attends to the prefix and to patches of its number or less.
    """
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    width, heads, side = config.width, config.num_heads, config.patch
    grid = images.shape[0] // side, images.shape[1] // side

    def dense(x, p):
        return x @ p["kernel"] + p["bias"] * p.get("bias_mask", 1)

    def norm(x, p):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + config.epsilon) * p["scale"] + p["bias"]

    def turn(x, place):  # x (heads, d)
        periods = params["rope_embed"]["periods"]
        angles = np.tile(np.concatenate([2 * np.pi * c / periods for c in place]), 2)
        left, right = np.split(x, 2, axis=-1)
        return x * np.cos(angles) + np.concatenate([-right, left], axis=-1) * np.sin(angles)

    pixels = images.reshape(grid[0], side, grid[1], side, 3).transpose(0, 2, 1, 3, 4)
    proj = params["patch_embed"]["proj"]
    x = pixels.reshape(-1, side * side * 3) @ proj["kernel"].reshape(-1, width) + proj["bias"]
    first = params["cls_token"][0]
    if config.pos_grid:
        table = jnp.asarray(params["pos_embed"], jnp.float32)
        table = np.asarray(preprocessing.resample_positions(table, config.pos_grid, grid))[0]
        first, x = first + table[:1], x + table[1:]
    if config.registers:
        name = "register_tokens" if config.pos_grid else "storage_tokens"
        first = np.concatenate([first, params[name][0]])
    lead, x = len(first), np.concatenate([first, x])
    order = [-1] * lead + list(order)
    places = [None] * lead + [
        ((2 * r + 1) / grid[0] - 1, (2 * c + 1) / grid[1] - 1)
        for r in range(grid[0])
        for c in range(grid[1])
    ]
    for n in range(config.num_layers):
        block = jax.tree.map(lambda p, n=n: p[n], params["blocks"])
        scale = [block[f"ls{i}"]["gamma"] if config.layer_scale else 1 for i in (1, 2)]
        qkv = dense(norm(x, block["norm1"]), block["attn"]["qkv"]).reshape(len(x), 3, heads, -1)
        added = np.zeros_like(x)
        for t in range(len(x)):
            seen = [s for s in range(len(x)) if order[s] <= order[t]]
            q, k = qkv[t, 0], qkv[seen, 1]
            if not config.pos_grid:
                q = turn(q, places[t]) if places[t] else q
                k = np.stack([
                    turn(row, places[s]) if places[s] else row
                    for row, s in zip(k, seen, strict=True)
                ])  # fmt: skip
            scores = np.einsum("hd,shd->hs", q, k) / math.sqrt(width / heads)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            added[t] = np.einsum("hs,shd->hd", weights, qkv[seen, 2]).reshape(-1)
        x = x + scale[0] * dense(added, block["attn"]["proj"])
        mlp, inner = block["mlp"], norm(x, block["norm2"])
        if config.swiglu:
            gate, value = np.split(dense(inner, mlp["w12"]), 2, axis=-1)
            inner = dense(gate / (1 + np.exp(-gate)) * value, mlp["w3"])
        else:
            inner = dense(inner, mlp["fc1"])
            erf = np.vectorize(math.erf)(inner / math.sqrt(2))
            inner = dense(inner * (1 + erf) / 2, mlp["fc2"])
        x = x + scale[1] * inner
    return norm(x, params["norm"])[lead:]


@each_kind
@pytest.mark.parametrize("block", [1, 8])
def test_it_is_what_a_plain_causal_encoder_computes(kind, block):
    images, order = random_images(), [i // block for i in range(LENGTH)]
    shown = np.asarray(preprocessing.preprocess(images, images.shape[1:3]))[0]
    want = plain(KINDS[kind], random_params(KINDS[kind]), shown, order)
    got = teach(kind, images, block=block)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_a_patch_belongs_to_the_block_of_the_token_at_its_centre():
    blocks = lambda *how: np.array(teacher.blocks_of_patches(*how))
    rows = np.repeat(np.arange(4) // 2, 4)
    np.testing.assert_array_equal(blocks((2, 2), (4, 4), 2), rows)  # finer
    tokens = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    np.testing.assert_array_equal(blocks((2, 2), (4, 4), 1), np.ravel(tokens))
    # Coarser: the centre of a patch of 2x2 tokens is the corner of the last of them.
    np.testing.assert_array_equal(blocks((4, 4), (2, 2), 1), [5, 7, 13, 15])
    np.testing.assert_array_equal(blocks((3, 4), (3, 4), 5), np.arange(12) // 5)
    np.testing.assert_array_equal(blocks((2, 3), (4, 5), 1)[:5], [0, 0, 1, 2, 2])
    assert teacher.blocks_of_patches((3, 4), (6, 8), 12) == ()
    assert teacher.blocks_of_patches((3, 4), (6, 8), 0) == ()


# Options of the targets ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind, norm", [("dinov3", True), ("mae", False)])
def test_the_mean_of_the_last_blocks(kind, norm):
    images = random_images()
    single = [teach(kind, images, layer=n, norm=norm) for n in (1, 2)]
    got = teach(kind, images, norm=norm, last=2)
    np.testing.assert_allclose(got, (single[0] + single[1]) / 2, atol=1e-5)
    with pytest.raises(ValueError, match="last is 2"):
        teach(kind, images, layer=1, last=2)


def test_features_are_normalised_over_the_places_of_an_image():
    images, config, alpha = random_images(), KINDS["dinov3"], 0.6
    module = teacher.VitTeacher(GRID, config, image_size=32, zscore=alpha)
    params = random_params(config)
    got = jax.jit(module.apply)({"params": {"network": params}}, images)
    network = vit.VisionTransformer(config)
    shown = preprocessing.preprocess(images, (24, 32))
    x = np.asarray(jax.jit(network.apply)({"params": params}, shown)[0], np.float64)
    x = (x - alpha * x.mean((1, 2))) / (x.std((1, 2), ddof=1) + 1e-6)  # then resampled to tokens
    np.testing.assert_allclose(got, teacher.resample(x, GRID), atol=1e-4)


def test_images_of_the_right_size_are_shown_as_they_are():
    images = jnp.asarray(random_images())
    np.testing.assert_array_equal(preprocessing.resize_bicubic(images, images.shape[1:3]), images)


def test_what_exceeds_a_multiple_of_the_patch_is_cut_off():
    config = KINDS["dinov3"]
    params, images = random_params(config), random_images(14, 19)
    run = jax.jit(lambda x: vit.VisionTransformer(config).apply({"params": params}, x)[0])
    np.testing.assert_array_equal(run(images), run(images[:, :12, :16]))


# Weights and configs ------------------------------------------------------------------------------


def student(**fields):
    """Mirai-I with one patch of 4 pixels a token."""
    config = tiny(mirai_i, steps=3, checkpoint_every=3, sample_every=0)
    config.teacher.update(image_size=0)
    config.teacher.update(fields)
    return config


def write(folder, config):
    params = random_params(config)
    torch_writer.write(folder / "encoder.pth", torch_names.to_torch(config, params))
    return str(folder / "encoder.pth"), params


def wide(kind):
    """With heads of 64, as files are taken to have where they do not say."""
    return dataclasses.replace(KINDS[kind], width=64, num_heads=1, swiglu=False)


@each_kind
def test_a_family_takes_any_size_of_its_own(kind, tmp_path):
    config = wide(kind)
    path, params = write(tmp_path, config)
    settings = lambda **fields: schema.read(student(name=kind, path=path, **fields), 1)
    module, loaded = frozen.make_teacher(settings())
    assert module.config == config
    assert (module.norm, module.last, module.block, module.zscore) == (kind != "mae", 1, 0, 0.0)
    jax.tree.map(np.testing.assert_array_equal, loaded["network"], params)
    assert not frozen.make_teacher(settings(norm="none"))[0].norm
    module, _ = frozen.make_teacher(settings(norm="final", last=2, block=8))
    assert (module.norm, module.last, module.block) == (True, 2, 8)
    for other in {"dinov2", "dinov3", "mae", "dinov3_vits16"} - {kind}:
        made = schema.read(student(name=other, path=path), 1)
        assert "teacher.path is" in refusal(frozen.make_teacher, made)
    assert "teacher.last is 3" in refusal(frozen.make_teacher, settings(last=3))
    assert "teacher.layer is 3" in refusal(frozen.make_teacher, settings(layer=3))


@pytest.mark.parametrize("name", ["dinov2_vits14_reg4", "dinov3_vits16", "mae_vits16"])
def test_a_name_gives_the_shapes_for_planning(name):
    config = mirai_i.get_config("imagenet_b")
    config.data.update(path="codes", images="images")
    config.teacher.update(name=name, path="not read", block=16)
    module, shapes = frozen.teacher_shapes(schema.read(config, 1))
    assert module.config == vit_sizes.PUBLISHED[name] and module.patches == (16, 16)
    assert module.norm == (not name.startswith("mae")) and module.block == 16
    assert shapes["network"]["norm"]["scale"].shape == (module.feature_width,)


@each_kind
def test_converted_there_and_back(kind, tmp_path):
    config, folder = wide(kind), tmp_path / "converted"
    path, params = write(tmp_path, config)
    conversion.from_torch(path, str(folder))
    made = schema.read(student(name=kind, path=str(folder)), 1)
    if kind == "dinov2":  # as folders from before there were others
        about = json.loads((folder / "model.json").read_text())
        old = ("width", "num_layers", "num_heads", "registers", "swiglu", "pos_grid", "patch")
        about["config"] = {name: about["config"][name] for name in old}
        (folder / "model.json").write_text(json.dumps(about))
    module, loaded = frozen.make_teacher(made)
    assert module.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded["network"], params)
    conversion.to_torch(str(folder), str(tmp_path / "back.pth"), read_run=None)
    before, after = (state_dict.read_state(p) for p in (path, tmp_path / "back.pth"))
    assert after[1] == ("model" if kind == "mae" else "")
    assert all(np.array_equal(before[0][name], after[0][name]) for name in before[0] | after[0])


# The library transformers -> the official code; the parts of the three projections differ too.
THEIRS = {
    "dinov3": [
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."), (r"^blocks\.", "layer."),
        (r"^storage_tokens", "embeddings.register_tokens"), (r"attn\.proj", "attention.o_proj"),
        (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"), ("fc1", "up_proj"), ("fc2", "down_proj"),
        (r"^(cls_token|mask_token)", r"embeddings.\1"),
    ],
    "mae": [
        (r"^pos_embed", "vit.embeddings.position_embeddings"), (r"^blocks", "vit.encoder.layer"),
        (r"^patch_embed\.proj", "vit.embeddings.patch_embeddings.projection"),
        (r"attn\.proj", "attention.output.dense"), (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"), ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"), ("^norm", "vit.layernorm"), ("^cls", "vit.embeddings.cls"),
    ],
}  # fmt: skip
PARTS = {"dinov3": ("q_proj", "k_proj", "v_proj"),
         "mae": ("attention.query", "attention.key", "attention.value")}  # fmt: skip


@pytest.mark.parametrize("kind", THEIRS)
def test_the_names_of_transformers(kind):
    config = wide(kind)
    state, theirs = torch_names.to_torch(config, random_params(config)), {}
    for name, array in state.items():
        for ours, other in THEIRS[kind]:
            name = re.sub(ours, other, name)
        if ".attn.qkv." in name:
            names = [name.replace("attn.qkv", f"attention.{part}") for part in PARTS[kind]]
            theirs |= zip(names, np.split(array, 3), strict=True)
        else:
            theirs[name] = array[None] if "mask_token" in name else array
    if kind == "mae":
        theirs |= {"decoder.mask_token": np.zeros((1, 1, 8)), "decoder.norm.bias": np.zeros(8)}
    absent = r".*(bias_mask|periods|k_proj\.bias)"  # transformers computes the first two
    theirs = {name: array for name, array in theirs.items() if not re.fullmatch(absent, name)}
    found = usual_names.usual(theirs)
    assert found.keys() == state.keys()
    for name, array in state.items():
        if kind == "dinov3" and name.endswith("qkv.bias"):
            array = array * state[f"{name}_mask"]
        np.testing.assert_allclose(found[name], array, rtol=1e-6, err_msg=name)
    assert vit_sizes.config_of(found) == config


def test_mae_with_its_decoder_and_dinov3_of_satellites(tmp_path):
    config = wide("mae")
    state = torch_names.to_torch(config, random_params(config))
    more = {"mask_token": np.zeros((1, 1, 8)), "decoder_embed.weight": np.zeros((8, 64))}
    assert usual_names.usual(state | more).keys() == state.keys()
    config = dataclasses.replace(wide("dinov3"), local_cls_norm=True)
    path, _ = write(tmp_path, config)
    module, _ = frozen.make_teacher(schema.read(student(name="dinov3", path=path), 1))
    assert module.config == config


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"name": "efficientnet_lite0", "image_size": 64, "block": 8}, "teacher.block"),
        ({"name": "docs.own_encoder:Encoder", "block": 8}, "teacher.block"),
        ({"name": "dinov2", "path": "a.pth", "block": 8, "zscore": 0.6}, "teacher.zscore"),
        ({"name": "dinov3_vitb16", "path": "a.pth", "image_size": 224 + 8}, "multiple of 16"),
        ({"name": "mae_vitb16"}, "teacher.path"),
        ({"name": "mae_vitb14"}, "teacher.name"),
        ({"name": "some module:Encoder"}, "teacher.name"),
        ({"norm": "first"}, "teacher.norm"),
        ({"zscore": 1.5}, "teacher.zscore"),
    ],
)
def test_what_the_encoder_cannot_do_is_refused(fields, name):
    assert name in refusal(schema.read, student(**fields), 1)


def test_fields_without_effect_are_named():
    def notes(name, *changes):
        return len(unused.notes(student(name=name), [f"--config.teacher.{c}" for c in changes]))

    options = ("layer=1", "norm=none", "last=2", "path=a")
    assert notes("efficientnet_lite0", *options) == 4
    assert notes("docs.own_encoder:Encoder", *options, "image_size=1", "stage=2") == 5
    assert notes("mae", *options, "image_size=32") == 0


# An encoder of yours ------------------------------------------------------------------------------


class Colours:
    """The mean colour of each quarter; the class that a config names need be no module."""

    class Network(nn.Module):
        feature_width: int = 3

        def __call__(self, images_BxHxWx3):
            assert images_BxHxWx3.dtype == jnp.float32
            return nn.avg_pool(images_BxHxWx3, (16, 16), (16, 16))

    @staticmethod
    def load(path):
        return Colours.Network(), {}


def test_an_encoder_without_parameters_and_on_another_grid():
    name = f"{__name__}:Colours"
    module, params = frozen.make_teacher(schema.read(student(name=name), 1))
    images = np.zeros((2, 32, 32, 1), np.uint8)
    images[1, 16:, :16] = 255
    features = module.apply({"params": params}, images).reshape(2, 8, 8, 3)
    assert not features[0].any() and features[1, 7, 0].min() == 1 and not features[1, 0].any()
    assert "no_such_module" in refusal(
        frozen.make_teacher, schema.read(student(name="no_such_module:A"), 1)
    )


@pytest.mark.slow
def test_mirai_i_learns_from_the_example_of_the_docs_and_resumes(tmp_path):
    config = student(name="docs.own_encoder:Encoder", zscore=0.6)
    config.num_steps = 3
    run = lambda: train.train(
        config, tmp_path / "run", devices=jax.devices()[:1], log=lambda line: None
    )
    run()
    parts = json.loads((tmp_path / "run" / "parts.json").read_text())
    assert len(parts["bidirectional"]) == 64
    module, params = frozen.make_teacher(schema.read(config, 1))
    config.num_steps = 4
    run()
    # Weights of a file; others than those that the run began with are refused.
    other = jax.tree.map(lambda x: np.asarray(x) + 1, params["network"])
    flat = {f"{n}/{m}": x for n, part in other.items() for m, x in part.items()}
    np.savez(tmp_path / "weights.npz", **flat)
    config.teacher.path, config.num_steps = str(tmp_path / "weights.npz"), 5
    loaded = frozen.make_teacher(schema.read(config, 1))[1]["network"]
    jax.tree.map(np.testing.assert_array_equal, loaded, other)
    assert "bidirectional" in refusal(run)
