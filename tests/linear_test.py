"""The linear layer: what it computes, and that its gradients are not rounded on the way."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mirai_jax.models.linear import Linear

TOKENS = 4096


def numbers(*shape, seed):
    return jax.random.normal(jax.random.key(seed), shape)


def setting(inputs=(24,), features=(3, 8), dtype="bfloat16"):
    """(layer, parameters, x, the cotangent of its output)."""
    layer = Linear(features, dtype, inputs=len(inputs), use_bias=True)
    x, g = numbers(TOKENS, *inputs, seed=0), numbers(TOKENS, *features, seed=1).astype(dtype)
    params = layer.init(jax.random.key(2), x)["params"]
    return layer, {**params, "bias": numbers(*features, seed=3)}, x, g


def gradients(layer, params, x, g):
    return jax.vjp(lambda p, x: layer.apply({"params": p}, x), params, x)[1](g)


def exact(x, dtype="bfloat16"):
    """As float64, after the rounding that a product's operand gets."""
    return np.asarray(jnp.asarray(x).astype(dtype), np.float64)


@pytest.mark.parametrize("inputs, features", [((24,), (3, 8)), ((6, 4), (20,)), ((24,), (20,))])
def test_in_float32_it_is_flaxs(inputs, features):
    layer, params, x, g = setting(inputs, features, "float32")
    theirs = nn.DenseGeneral(features, axis=tuple(range(-len(inputs), 0)))
    for ours, other in zip(
        jax.tree.leaves((layer.apply({"params": params}, x), gradients(layer, params, x, g))),
        jax.tree.leaves((theirs.apply({"params": params}, x), gradients(theirs, params, x, g))),
        strict=True,
    ):
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-3)


def test_gradients_of_parameters_are_float32_sums_of_bfloat16_products():
    layer, params, x, g = setting()
    of_params, of_x = gradients(layer, params, x, g)
    assert layer.apply({"params": params}, x).dtype == g.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(of_params)} == {jnp.dtype(jnp.float32)}
    kernel = np.tensordot(exact(x), exact(g), (0, 0))
    # Rounded to bfloat16 they would be off by up to 0.002 of their size.
    np.testing.assert_allclose(of_params["kernel"], kernel, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(of_params["bias"], exact(g).sum(0), rtol=1e-4, atol=1e-3)
    wanted = np.einsum("mab,cab->mc", exact(g), exact(params["kernel"]))
    np.testing.assert_allclose(of_x, wanted, rtol=0.01, atol=0.01)


def test_the_sum_over_devices_is_float32_too():
    layer, params, x, g = setting()
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data",), ()))
    run = jax.jit(lambda *args: gradients(layer, *args)[0], out_shardings=whole)
    given = jax.device_put(params, whole), *jax.device_put((x, g), split)
    kernel = np.tensordot(exact(x), exact(g), (0, 0))
    np.testing.assert_allclose(run(*given)["kernel"], kernel, rtol=1e-4, atol=1e-3)
    text = run.lower(*given).compile().as_text()
    summed = [line for line in text.splitlines() if " all-reduce(" in line]
    assert summed and not any("bf16" in line.split(" all-reduce(")[0] for line in summed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_split_outputs_are_the_slices_of_the_whole(dtype):
    layer, params, x, g = setting(features=(3, 2, 4), dtype=dtype)
    layer, params = layer.clone(use_bias=False), {"kernel": params["kernel"]}
    split_outputs = layer.clone(split_outputs=True)
    fresh = split_outputs.init(jax.random.key(2), x)["params"]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    x = x.astype(dtype)
    whole, to_whole = jax.vjp(lambda p, x: layer.apply({"params": p}, x), params, x)
    parts, to_parts = jax.vjp(lambda p, x: split_outputs.apply({"params": p}, x), params, x)
    np.testing.assert_allclose(*np.float32((jnp.stack(parts, axis=1), whole)), rtol=1e-5, atol=1e-5)
    (of_params, of_x), (params_too, x_too) = to_parts(tuple(jnp.unstack(g, axis=1))), to_whole(g)
    assert of_x.dtype == x.dtype
    np.testing.assert_allclose(of_params["kernel"], params_too["kernel"], rtol=1e-4, atol=1e-3)
    # Rounded once, after the sum over the slices.
    wanted = np.einsum("mabc,kabc->mk", exact(g, dtype), exact(params["kernel"], dtype))
    error = lambda x: np.sqrt(np.mean((np.asarray(x, np.float64) - wanted) ** 2))
    assert error(of_x) <= 1.01 * error(x_too) + 1e-6


def test_slices_are_separate_products_except_on_nvidia_gpus():
    layer, params, x, _ = setting(features=(3, 2, 4))
    split_outputs = layer.clone(split_outputs=True, use_bias=False)
    for platform, products in (("cuda", 1), ("tpu", 3), ("cpu", 3)):
        traced = jax.jit(lambda p, x: split_outputs.apply({"params": p}, x)).trace(params, x)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("dot_general") == products


@pytest.mark.parametrize("platform, operands", [("cuda", "bf16"), ("tpu", "bf16"), ("cpu", "f32")])
def test_gradients_of_weights_are_products_of_bfloat16_where_there_are_such(platform, operands):
    layer, params, x, g = setting(inputs=(24,), features=(20,))
    text = (
        jax.jit(lambda *args: gradients(layer, *args)[0]["kernel"])
        .trace(params, x, g)
        .lower(lowering_platforms=(platform,))
        .as_text()
    )
    kind = (
        rf"\(tensor<{TOKENS}x24x{operands}>, tensor<{TOKENS}x20x{operands}>\) -> tensor<24x20xf32>"
    )
    assert len(re.findall(rf"dot_general .*{kind}", text)) == 1
