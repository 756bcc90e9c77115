"""The linear layer of all that is trained with the generator: the products in the compute dtype, the
gradients of parameters in the parameters' own.

JAX gives a weight that was rounded to bfloat16 for a product a bfloat16 gradient, and the devices of a
mesh then sum their shares of it in bfloat16: the more devices, the less of a small share arrives. Here
the sum over tokens and that over devices are float32 (the official code rounds each device's own
gradient, and sums in float32). That costs twice the bytes between devices.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _contract(x, w, count):
    """x (M, *C) with w (*C, *N), rounded to x's dtype, over the `count` dimensions C: (M, *N)."""
    return _dot(x, w.astype(x.dtype), range(1, 1 + count), range(count))


def _dot(x, y, of_x, of_y, dtype=None):
    dimensions = ((tuple(of_x), tuple(of_y)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=dtype)


def _dot_to(dtype, x, y, of_x, of_y):
    """The product with sums, and a result, in `dtype`."""

    def accelerated(x, y):
        return _dot(x, y, of_x, of_y, dtype)

    def on_cpu(x, y):  # XLA on CPU has no such product of bfloat16
        return _dot(x.astype(dtype), y.astype(dtype), of_x, of_y)

    return jax.lax.platform_dependent(x, y, cpu=on_cpu, default=accelerated)


def _contract_forward(x, w, count):
    return _contract(x, w, count), (x, w)


def _contract_backward(count, saved, g):
    # As JAX derives it, but each in its own order of dimensions: JAX would transpose results, and
    # XLA on CPU then copies operands and results as large as the weights.
    x, w = saved
    of_x = _dot(g, w.astype(g.dtype), range(1, g.ndim), range(count, w.ndim))
    return of_x, _dot_to(w.dtype, x, g, (0,), (0,))


_contract.defvjp(_contract_forward, _contract_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _contract_apart(x, w, count):
    """`_contract` of each slice of w along its first dimension of N: a tuple of (M, *N[1:])."""

    def split_outputs(x, w):
        return tuple(_contract(x, part, count) for part in jnp.unstack(w, axis=count))

    def whole(x, w):
        return tuple(jnp.unstack(_contract(x, w, count), axis=1))

    return jax.lax.platform_dependent(x, w, cuda=whole, default=split_outputs)


def _apart_forward(x, w, count):
    return _contract_apart(x, w, count), (x, w)


def _apart_backward(count, saved, parts):
    x, w = saved

    def split_outputs(x, w, *parts):
        # The gradient of x is rounded once, after the sum over the slices.
        of_x, of_w = 0, []
        for part, g in zip(jnp.unstack(w, axis=count), parts, strict=True):
            dimensions = range(1, g.ndim), range(count, part.ndim)
            of_x += _dot_to(jnp.float32, g, part.astype(g.dtype), *dimensions)
            of_w.append(_dot_to(w.dtype, x, g, (0,), (0,)))
        return of_x.astype(x.dtype), jnp.stack(of_w, axis=count)

    def whole(x, w, *parts):
        return _contract_backward(count, (x, w), jnp.stack(parts, axis=1))

    return jax.lax.platform_dependent(x, w, *parts, cuda=whole, default=split_outputs)


_contract_apart.defvjp(_apart_forward, _apart_backward)


class Linear(nn.Module):
    """A product with a weight, and a bias if asked for: (M, *inputs) -> (M, *features) in `dtype`.

    `inputs` counts the trailing dimensions of x that are summed over. Products see one flat axis of
    tokens, M: XLA lays them out far better on CPU. Parameters are made in float32: `kernel` (*inputs,
    *features), and `bias` (*features), zero at first.

    `split_outputs` returns a tuple of (M, *features[1:]), the slices of the first of `features`, and has no
    bias. They are products of their own but on NVIDIA GPUs, which prefer one: a TPU spends more on
    cutting the whole up, and on putting it together in the backward pass, than on the product.
    """

    features: tuple[int, ...]
    dtype: str
    inputs: int = 1
    use_bias: bool = False
    split_outputs: bool = False
    kernel_init: Any = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x):
        shape = (*x.shape[-self.inputs :], *self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        x = x.astype(self.dtype)
        if self.split_outputs:
            parts = _contract_apart(x, kernel, self.inputs)
            return tuple(checkpoint_name(part, "linear") for part in parts)
        out = checkpoint_name(_contract(x, kernel, self.inputs), "linear")
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, jnp.float32)
            out = (out.astype(jnp.float32) + bias).astype(self.dtype)
        return out
