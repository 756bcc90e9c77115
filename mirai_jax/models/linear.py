"""The linear layer of the generator and its heads: products in the compute dtype, gradients of
parameters in the dtype of the parameters.

JAX gives a weight that was rounded to bfloat16 for a product a bfloat16 gradient, and the devices of a
mesh then sum their shares in bfloat16: the more devices, the more of a small share is lost. Here the
sums over tokens and over devices are float32 (the official code rounds the gradient of each device,
and sums in float32). That doubles the bytes between devices.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mirai_jax.models import adapters


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _contract(x, w, count):
    """x (M, *C) times w (*C, *N), rounded to x's dtype, over the `count` dimensions C: (M, *N)."""
    return _dot(x, w.astype(x.dtype), range(1, 1 + count), range(count))


def _dot(x, y, of_x, of_y, dtype=None):
    dimensions = ((tuple(of_x), tuple(of_y)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=dtype)


def _dot_to(dtype, x, y, of_x, of_y):
    """The product, with sums and result in `dtype`."""

    def accelerated(x, y):
        return _dot(x, y, of_x, of_y, dtype)

    def on_cpu(x, y):  # XLA on CPU has no such product of bfloat16
        return _dot(x.astype(dtype), y.astype(dtype), of_x, of_y)

    return jax.lax.platform_dependent(x, y, cpu=on_cpu, default=accelerated)


def _contract_forward(x, w, count):
    return _contract(x, w, count), (x, w)


def _contract_backward(count, saved, g):
    # As JAX derives it, but each result in its final order of dimensions: JAX would transpose them,
    # and XLA on CPU then copies operands and results as large as the weights.
    x, w = saved
    of_x = _dot(g, w.astype(g.dtype), range(1, g.ndim), range(count, w.ndim))
    return of_x, _dot_to(w.dtype, x, g, (0,), (0,))


_contract.defvjp(_contract_forward, _contract_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _contract_split(x, w, count):
    """`_contract` of each slice of w along its first dimension of N: a tuple of (M, *N[1:])."""

    def split(x, w):
        return tuple(_contract(x, part, count) for part in jnp.unstack(w, axis=count))

    def whole(x, w):
        return tuple(jnp.unstack(_contract(x, w, count), axis=1))

    return jax.lax.platform_dependent(x, w, cuda=whole, default=split)


def _split_forward(x, w, count):
    return _contract_split(x, w, count), (x, w)


def _split_backward(count, saved, parts):
    x, w = saved

    def split(x, w, *parts):
        # The gradient of x is rounded once, after the sum over the slices.
        of_x, of_w = 0, []
        for part, g in zip(jnp.unstack(w, axis=count), parts, strict=True):
            dimensions = range(1, g.ndim), range(count, part.ndim)
            of_x += _dot_to(jnp.float32, g, part.astype(g.dtype), *dimensions)
            of_w.append(_dot_to(w.dtype, x, g, (0,), (0,)))
        return of_x.astype(x.dtype), jnp.stack(of_w, axis=count)

    def whole(x, w, *parts):
        return _contract_backward(count, (x, w), jnp.stack(parts, axis=1))

    return jax.lax.platform_dependent(x, w, *parts, cuda=whole, default=split)


_contract_split.defvjp(_split_forward, _split_backward)


class Linear(nn.Module):
    """A product with a weight, and optionally a bias: (M, *inputs) -> (M, *features) in `dtype`.

    `inputs` counts the trailing dimensions of x to sum over. Products take one flat axis M of tokens:
    XLA lays them out far better on CPU. Parameters are float32: `kernel` (*inputs, *features), and
    `bias` (*features).

    `split_outputs` returns a tuple of (M, *features[1:]), the slices along the first of `features`,
    without a bias. Each slice is a separate product, except on NVIDIA GPUs, which prefer one: a TPU
    spends more on splitting the whole, and on joining its gradients, than on the product.

    Low-rank adapters among the parameters are added to the kernel (see adapters.py).
    """

    features: tuple[int, ...]
    dtype: str
    inputs: int = 1
    use_bias: bool = False
    split_outputs: bool = False
    kernel_init: Any = nn.initializers.normal(0.02)
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x):
        shape = (*x.shape[-self.inputs :], *self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        if self.has_variable("params", "lora_a"):
            pair = (self.get_variable("params", f"lora_{side}") for side in "ab")
            kernel += adapters.product(*pair)
        x = x.astype(self.dtype)
        if self.split_outputs:
            parts = _contract_split(x, kernel, self.inputs)
            return tuple(checkpoint_name(part, "linear") for part in parts)
        out = checkpoint_name(_contract(x, kernel, self.inputs), "linear")
        if self.use_bias:
            bias = self.param("bias", self.bias_init, self.features, jnp.float32)
            out = (out.astype(jnp.float32) + bias).astype(self.dtype)
        return out
