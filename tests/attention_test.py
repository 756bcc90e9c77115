"""Attention against NumPy in float64, by XLA and by the interpreted TPU kernel; the choice of kernels.

Programs lowered for a platform show which kernel it would run, without a device of the platform. The
numbers of cuDNN need a GPU: the last test, skipped elsewhere
(`MIRAI_TEST_PLATFORM=cuda python -m pytest tests/attention_test.py -k cudnn_is_close`).
"""

import collections
import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mirai_jax import sharding
from mirai_jax.models import activation_sharding, attention, generator, vit

BFLOAT16 = jnp.bfloat16
CUDNN = {"__cudnn$fmhaSoftmax": 1, "__cudnn$fmhaSoftmaxBackward": 1}
SPLASH = {"tpu_custom_call": 2}


def arrays(batch, length, heads, head_dim, dtype=np.float32):
    """q, k, v and the gradient of the output; q and k of the class position are 0."""
    rng = np.random.RandomState(length)
    x = rng.normal(size=(4, batch, length, heads, head_dim)).astype(np.float32)
    x[:2, :, 0] = 0
    return [jnp.asarray(a, dtype) for a in x]


def reference(q, k, v, g, causal):
    """The output and the gradients of q, k and v, by the definition; `causal` may be a mask."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    scale = q.shape[-1] ** -0.5
    scores = scale * np.einsum("bthd,bshd->bhts", q, k)
    if causal is not False:
        mask = np.tri(q.shape[1], dtype=bool) if causal is True else causal
        scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    of_weights = np.einsum("bthd,bshd->bhts", g, v)
    of_scores = of_weights - (weights * of_weights).sum(axis=-1, keepdims=True)
    of_scores *= weights * scale
    return (
        np.einsum("bhts,bshd->bthd", weights, v),
        np.einsum("bhts,bshd->bthd", of_scores, k),
        np.einsum("bhts,bthd->bshd", of_scores, q),
        np.einsum("bhts,bthd->bshd", weights, g),
    )


def run(attend, q, k, v, g):
    """As `reference`."""

    @jax.jit
    def both(q, k, v, g):
        out, backward = jax.vjp(attend, q, k, v)
        return out, *backward(g)

    return both(q, k, v, g)


def check(got, q, k, v, g, causal, tolerance):
    """`tolerance` is relative to the largest number of each array."""
    for name, x, want in zip("oqkv", got, reference(q, k, v, g, causal), strict=True):
        assert x.dtype == q.dtype and x.shape == want.shape
        error = np.abs(np.asarray(x, np.float64) - want).max()
        assert error <= tolerance * np.abs(want).max(), name  # so, too, that none is NaN


# XLA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 7, 128, 257])
def test_float32_is_exact(length, causal):
    inputs = arrays(2, length, 3, 20)
    attend = functools.partial(attention.attend, causal=causal)
    check(run(attend, *inputs), *inputs, causal, 2e-6)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-6), (BFLOAT16, 0.01)])
def test_any_mask(dtype, tolerance):
    inputs = arrays(2, 260, 2, 16, dtype)
    mask = np.random.RandomState(0).rand(260, 260) < 0.3
    mask[:, 200:] = False  # the blocks of queries see no key from here on
    np.fill_diagonal(mask, True)
    attend = functools.partial(attention.attend, causal=False, mask=mask)
    with on_mesh():
        check(run(attend, *inputs), *inputs, mask, tolerance)


@pytest.mark.parametrize("kernel", attention.KERNELS)
@pytest.mark.parametrize(("length", "causal"), [(7, True), (130, True), (130, False)])
def test_bfloat16_is_close_on_a_cpu(length, causal, kernel):
    inputs = arrays(2, length, 2, 16, BFLOAT16)
    attend = functools.partial(attention.attend, causal=causal, kernel=kernel)
    with on_mesh():
        check(run(attend, *inputs), *inputs, causal, 0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("grid", [(16, 16), (19, 20)])
def test_the_weights_that_the_backward_pass_needs(grid, dtype):
    config = generator.GeneratorConfig(
        num_layers=3, num_heads=4, width=64, vocab_size=8, num_classes=2, grid=grid, dtype=dtype,
        attention="xla",
    )  # fmt: skip

    def loss(params, codes, labels):
        logits = generator.Generator(config).apply({"params": params}, codes, labels)[0]
        return logits.astype(np.float32).sum()

    params = jax.eval_shape(lambda: generator.init_params(config, jax.random.key(0)))
    shapes = (jax.ShapeDtypeStruct(x, np.int32) for x in ((2, config.length - 1), (2,)))
    program = jax.make_jaxpr(jax.grad(loss))(params, *shapes)
    stacks = [out.aval for x in program.eqns if x.primitive.name == "scan" for out in x.outvars]
    # (blocks of the generator, B, H, queries, keys); heads have 16 numbers, and are left out.
    weights = [x for x in stacks if x.ndim == 5 and x.shape[2] == 4 and x.shape[-1] > 16]
    shape = 2, config.length, 4, 16
    assert sum(x.size * x.dtype.itemsize for x in weights) == 3 * attention.stored_bytes(
        shape, dtype
    )


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="flash"):
        attention.attend(*arrays(1, 2, 1, 4)[:3], causal=True, kernel="flash")


def test_where_there_is_a_fused_kernel():
    with on_mesh():
        has = lambda length, *more: attention.has_fused((2, length, 12, 64), *more)
        assert has(256, "bfloat16", "tpu") != has(256, "bfloat16", "gpu")  # that of the plugin
        assert not has(64, "bfloat16", "tpu") and not has(256, "float32", "tpu")
        assert not has(256, "bfloat16", "cpu")


# The TPU's kernel, interpreted --------------------------------------------------------------------


@pytest.fixture
def interpreted(monkeypatch):
    make = functools.partial(splash_attention.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha_single_device", make)


@pytest.mark.parametrize(
    ("length", "head_dim", "causal", "block"),
    [
        (256, 64, True, 640),
        (256, 64, True, 128),  # several blocks, some of them all masked
        (261, 64, False, 640),  # DINOv2's, padded
        (130, 100, True, 640),  # the 3B's heads, padded
    ],
)
def test_splash_attention_is_close(interpreted, monkeypatch, length, head_dim, causal, block):
    monkeypatch.setattr(attention, "_LARGEST_BLOCK", block)
    inputs = arrays(1, length, 1, head_dim, BFLOAT16)
    check(run(functools.partial(attention._splash, causal=causal), *inputs), *inputs, causal, 0.01)


def test_every_device_attends_for_its_own_images_and_heads(interpreted):
    inputs = arrays(4, 128, 2, 16, BFLOAT16)
    with on_mesh((2, 2, 2)):
        kernel = functools.partial(attention._splash, causal=True)
        axes = ("batch", None, "heads", None)
        got = run(activation_sharding.per_device(kernel, inputs[0].shape, *axes), *inputs)
    assert got[0].sharding.spec == P(("data", "fsdp"), None, "tensor")
    check(got, *inputs, True, 0.01)


# Who gets which -----------------------------------------------------------------------------------


@pytest.fixture
def cudnn(monkeypatch):
    """As where JAX has its CUDA plugin."""
    name = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(name, lambda: 91000)


def on_mesh(shape=(1, 1, 1)):
    return jax.set_mesh(sharding.make_mesh(shape, jax.devices()[: np.prod(shape)]))


def lowered(platform, function, *args):
    """The program's text for another platform; args are shapes."""
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:  # as many devices as it has
        place = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()))
        args = jax.tree.map(lambda x: place(x.shape, x.dtype), args)
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def calls(text):
    found = re.findall(r"custom_call @(__cudnn\S+?|tpu_custom_call)\(", text)
    return dict(collections.Counter(found))


def program(platform, shape=(2, 256, 2, 64), dtype=BFLOAT16, layers=2, **options):
    """A loop over layers of attention, and its gradient."""
    options = {"causal": True} | options

    def loss(x):
        def layer(x, _):
            return x + attention.attend(x, x, x, **options), None

        return jax.lax.scan(layer, x, length=layers)[0].astype(jnp.float32).sum()

    return lowered(platform, jax.grad(loss), jax.ShapeDtypeStruct(shape, dtype))


@pytest.mark.parametrize(("platform", "fused"), [("cuda", CUDNN), ("tpu", SPLASH), ("cpu", {})])
def test_bfloat16_takes_the_kernel_of_the_platform(platform, fused, request):
    if platform == "cuda":
        request.getfixturevalue("cudnn")
    with on_mesh():
        assert calls(text := program(platform)) == fused
        # No scores are stored between forward and backward, nor what other platforms would store.
        assert "2x2x2x256x256x" not in text and "2x2x2x128x256x" not in text
        assert calls(program(platform, causal=False)) == fused
        assert calls(program(platform, dtype=np.float32)) == {}
        assert calls(program(platform, kernel="xla")) == {}
        assert calls(program(platform, shape=(2, 64, 2, 64))) == {}
        assert calls(program(platform, shape=(2, 256, 1, 136))) == {}


@pytest.mark.parametrize("length, fused", [(576, True), (577, True), (205, True), (257, False)])
def test_a_tpu_takes_its_kernel_where_little_is_padded(length, fused):
    with on_mesh():
        assert bool(calls(program("tpu", (2, length, 2, 64)))) == fused


def test_a_gpu_gets_lengths_for_partial_tiles_and_heads_padded_to_eights(cudnn):
    with on_mesh():
        causal, other = (program("cuda", (2, 200, 2, 100), causal=c) for c in (True, False))
        assert calls(causal) == calls(other) == CUDNN
        assert r"\22mask_type\22: \22PADDING_CAUSAL\22" in causal
        assert r"\22mask_type\22: \22PADDING\22" in other
        assert r"\22mask_type\22: \22CAUSAL\22" in program("cuda")
    assert re.search(r"fmhaSoftmax\(.*tensor<2x200x2x104xbf16>", causal)
    assert r"\22fmha_scale\22: 0.1," in causal


@pytest.mark.parametrize(
    ("platform", "device"),
    [
        ("cuda", {"platform": "gpu", "device_kind": "Tesla T4", "compute_capability": "7.5"}),
        ("tpu", {"platform": "tpu", "device_kind": "TPU v3"}),
    ],
)
def test_old_devices_take_xla(platform, device, request, monkeypatch):
    if platform == "cuda":
        request.getfixturevalue("cudnn")
    with on_mesh():
        assert calls(program(platform))
        monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(**device)])
        assert not calls(program(platform))


def test_without_cudnn_a_gpu_takes_xla():
    with on_mesh():
        assert not calls(program("cuda"))


@pytest.mark.parametrize(("platform", "fused"), [("cuda", CUDNN), ("tpu", SPLASH)])
def test_a_mesh_splits_the_kernel_where_it_divides(platform, fused, request):
    if platform == "cuda":
        request.getfixturevalue("cudnn")
    assert not calls(program(platform, (8, 256, 4, 64)))  # eight devices without a mesh
    with on_mesh((2, 2, 2)):
        text = program(platform, (8, 256, 4, 64))
        assert calls(text) == fused
        part = "2x256x2x64" if platform == "cuda" else "2x2x256x64"
        assert re.search(rf"custom_call @\S+\(.*tensor<{part}xbf16>", text)
        assert not calls(program(platform, (6, 256, 4, 64)))
        assert not calls(program(platform, (8, 256, 3, 64)))


# In the networks ----------------------------------------------------------------------------------

CONFIG = generator.GeneratorConfig(
    2, num_heads=2, width=32, vocab_size=16, num_classes=3, grid=(8, 16), dtype="bfloat16"
)


def generator_loss(config, params):
    codes = jnp.arange(config.length - 1)[None] % config.vocab_size
    rngs = {"dropout": jax.random.key(1)}
    model = generator.Generator(config)
    logits, _ = model.apply({"params": params}, codes, jnp.zeros(1, int), rngs=rngs)
    return (logits.astype(jnp.float32) ** 2).sum()


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_generator_takes_it_whatever_is_computed_again(remat, cudnn):
    config = dataclasses.replace(CONFIG, remat=remat)
    shapes = jax.eval_shape(lambda: generator.init_params(config, jax.random.key(0)))
    again = {} if remat == "none" else {"__cudnn$fmhaSoftmax": 2}
    with on_mesh():
        of = lambda config: jax.grad(functools.partial(generator_loss, config))
        assert calls(lowered("cuda", of(config), shapes)) == CUDNN | again
        xla = dataclasses.replace(config, attention="xla")
        assert not calls(lowered("cuda", of(xla), shapes))


@pytest.mark.parametrize(("kernel", "fused"), [("auto", {"tpu_custom_call": 1}), ("xla", {})])
def test_dinov2_takes_it(kernel, fused):
    config = vit.VitConfig(width=32, num_layers=2, num_heads=2, pos_grid=(15, 15))
    network = vit.VisionTransformer(config, "bfloat16", kernel)
    images = jax.ShapeDtypeStruct((1, 210, 210, 3), np.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    with on_mesh(), jax.default_matmul_precision("tensorfloat32"):  # as the teacher runs it
        assert calls(lowered("tpu", network.apply, variables, images)) == fused


# On a GPU -----------------------------------------------------------------------------------------


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN runs on NVIDIA GPUs")
@pytest.mark.parametrize("head_dim", [64, 100])
@pytest.mark.parametrize("length, causal", [(256, True), (576, True), (257, False), (261, False)])
def test_cudnn_is_close(length, causal, head_dim):
    inputs = arrays(2, length, 2, head_dim, BFLOAT16)
    attend = functools.partial(attention.attend, causal=causal)
    with on_mesh():
        check(run(attend, *inputs), *inputs, causal, 0.02)
        text = jax.jit(attend).lower(*inputs[:3]).compile().as_text()
    assert "__cudnn$fmha" in text
