"""The network of FID. inception_a.npz holds what torch-fidelity 0.4.0's FeatureExtractorInceptionV3
(torch 2.13, CPU, float32) computes with the weights and images that `random_array` and
`random_image` make here: for each size of image every eighth value of '2048', of Mixed_6d.branch1x1
(first 7 channels, channels last) and of log_softmax(logits_unbiased). `names` lists its state dict.
"""

import math
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mirai_jax.models import inception
from mirai_jax.utils.errors import ConfigError
from mirai_jax.weights import inception as inception_weights
from mirai_jax.weights import pretrained, torch_names, torch_writer

DATA = np.load(pathlib.Path(__file__).parent / "data" / "inception_a.npz")
SIZES = sorted(key.removesuffix("/pool") for key in DATA if key.endswith("/pool"))


def random_array(name, shape):
    """Of a size that neither fades nor grows through the network."""
    if name.endswith("num_batches_tracked"):
        return np.array(3)
    # RandomState: its numbers are the same in every version of NumPy.
    u = np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape)
    if name.endswith(("conv.weight", "fc.weight")):
        array = (2 * u - 1) * math.sqrt(4.5 / math.prod(shape[1:]))
    elif name.endswith("running_var"):
        array = 0.25 + 1.5 * u
    elif name.endswith("bn.weight"):
        array = 0.5 + u
    else:
        array = u - 0.5
    return array.astype(np.float32)


def random_image(height, width):
    """Coarse squares under noise, uint8."""
    rng = np.random.RandomState(height)
    coarse = rng.randint(0, 256, (4, 4, 3)).repeat(-(-height // 4), 0).repeat(-(-width // 4), 1)
    noise = rng.randint(0, 256, (height, width, 3))
    return ((3 * coarse[:height, :width] + noise) // 4).astype(np.uint8)


@pytest.fixture(scope="module")
def state():
    """A state dict under PyTorch's names."""
    pairs = [line.split(" ") for line in str(DATA["names"]).splitlines()]
    shapes = {name: tuple(map(int, filter(None, shape.split(",")))) for name, shape in pairs}
    assert len(shapes) == len(pairs) == 566
    return {name: random_array(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def params(state):
    return inception_weights.inception_from_torch(state)


def apply(params, images):
    return inception.InceptionV3().apply({"params": params}, images)


# The network --------------------------------------------------------------------------------------


_QUICK = "32x32", "300x300"  # a smaller and a larger image than the network's input


@pytest.mark.parametrize(
    "size", [pytest.param(s, marks=[] if s in _QUICK else pytest.mark.slow) for s in SIZES]
)
def test_matches_torch_fidelity(params, size):
    image = random_image(*map(int, size.split("x")))
    got = jax.jit(apply)(params, image[None])
    assert [x.shape for x in got] == [(1, 2048), (1, 2023), (1, 1008)]
    assert {x.dtype for x in got} == {jnp.dtype("float32")}
    for name, values in [
        ("pool", got.pool),
        ("spatial", got.spatial),
        ("log_probabilities", np.log(got.probabilities)),
    ]:
        want = DATA[f"{size}/{name}"]
        atol = 2e-5 * np.abs(want).max()
        np.testing.assert_allclose(values[0, ::8], want, rtol=0, atol=atol, err_msg=name)


def test_products_are_not_rounded(params):
    """On accelerators, where the default is less than float32."""
    program = jax.jit(apply).lower(params, jnp.zeros((1, 32, 32, 3), jnp.uint8)).as_text()
    operands = 2 * (94 + 1 + 2)  # convolutions, scores, resizing
    assert program.count("HIGHEST") == operands and "DEFAULT" not in program


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((1, 8, 8, 3), np.float32), "must be uint8, not float32"),
        (np.zeros((8, 8, 3), np.uint8), r"must be \(B, H, W, 3\), not \(8, 8, 3\)"),
        (np.zeros((1, 3, 8, 8), np.uint8), "must be"),
        (np.zeros((1, 0, 8, 3), np.uint8), "must be"),
    ],
)
def test_refuses(params, images, message):
    with pytest.raises(ValueError, match=message):
        apply(params, images)


# Resizing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (32, 64), (299, 298), (301, 1000)])
def test_resize_is_tensorflows(size):
    image = np.random.RandomState(0).randint(0, 256, (*size, 3))
    got = inception.resize(image[None].astype(np.uint8))
    assert got.shape == (1, 299, 299, 3) and got.dtype == jnp.float32
    chosen = [0, 1, 2, 57, 149, 150, 233, 296, 297, 298]
    for row in chosen:
        for column in chosen:
            y = np.float32(row) * np.float32(size[0] / 299)
            x = np.float32(column) * np.float32(size[1] / 299)
            i, j = int(y), int(x)
            below, right = min(i + 1, size[0] - 1), min(j + 1, size[1] - 1)
            top = image[i, j] + (image[i, right] - image[i, j]) * (x - j)
            bottom = image[below, j] + (image[below, right] - image[below, j]) * (x - j)
            want = top + (bottom - top) * (y - i)
            np.testing.assert_allclose(got[0, row, column], want, rtol=0, atol=2e-4)


def test_resize_leaves_299_alone():
    image = np.random.RandomState(0).randint(0, 256, (1, 299, 299, 3), np.uint8)
    np.testing.assert_array_equal(inception.resize(image), image)


# Weights ------------------------------------------------------------------------------------------


def test_init_agrees_with_the_mapping(params):
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.uint8)
    made = jax.eval_shape(inception.InceptionV3().init, jax.random.key(0), image)["params"]
    describe = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert describe(made) == describe(params)


def test_mapping_lists_every_problem(state):
    state = dict(state) | {"AuxLogits.conv0.conv.weight": np.zeros(1), "fc.scale": np.zeros(1)}
    del state["fc.bias"], state["Mixed_5b.branch1x1.bn.running_var"]
    state["Mixed_7c.branch_pool.conv.weight"] = np.zeros((192, 2048))
    with pytest.raises(torch_names.NamesError) as caught:
        inception_weights.inception_from_torch(state)
    assert str(caught.value).split(": ", 1)[1].split("; ") == [
        "missing Mixed_5b.branch1x1.bn.running_var (64,)",
        "missing fc.bias (1008,)",
        "unexpected fc.scale",
        "Mixed_7c.branch_pool.conv.weight is (192, 2048), should be (192, 2048, 1, 1)",
    ]


@pytest.mark.parametrize("path", ["", "nowhere.pth"])
def test_absent_file_is_named(path):
    with pytest.raises(ConfigError) as caught:
        inception_weights.load(path)
    message = str(caught.value)
    assert repr(path) in message and "\n" not in message
    assert "/mseitzer/pytorch-fid/releases/" in message
    assert message.endswith("/pt_inception-2015-12-05-6726825d.pth")


def test_loads_the_published_file_alone(state, params, tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    torch_writer.write(path, state)
    with pytest.raises(ConfigError, match="begins 6726825d.*https://github.com/mseitzer"):
        inception_weights.load(path)
    # As if it were that file: its first digits are all that this project knows of it.
    monkeypatch.setattr(inception_weights, "SHA256_START", pretrained.sha256_of_file(path)[:8])
    loaded = inception_weights.load(path)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))

    torch_writer.write(path, {"fc.weight": state["fc.weight"]})
    monkeypatch.setattr(inception_weights, "SHA256_START", pretrained.sha256_of_file(path)[:8])
    with pytest.raises(ConfigError, match="missing Conv2d_1a"):
        inception_weights.load(path)
    path.unlink()
