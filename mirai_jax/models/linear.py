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


def _contract_forward(x, w, count):
    return _contract(x, w, count), (x, w)


def _contract_backward(count, saved, g):
    # As JAX derives it, but each in its own order of dimensions: JAX would transpose results, and
    # XLA on CPU then copies operands and results as large as the weights.
    x, w = saved
    of_x = _dot(g, w.astype(g.dtype), range(1, g.ndim), range(count, w.ndim))
    of_w = lambda x, g: _dot(x, g, (0,), (0,), w.dtype)  # noqa: E731
    # XLA on CPU has no such product of bfloat16.
    on_cpu = lambda x, g: of_w(x.astype(w.dtype), g.astype(w.dtype))  # noqa: E731
    return of_x, jax.lax.platform_dependent(x, g, cpu=on_cpu, default=of_w)


_contract.defvjp(_contract_forward, _contract_backward)


class Linear(nn.Module):
    """A product with a weight, and a bias if asked for: (M, *inputs) -> (M, *features) in `dtype`.

    `inputs` counts the trailing dimensions of x that are summed over. Products see one flat axis of
    tokens, M: XLA lays them out far better on CPU. Parameters are made in float32: `kernel` (*inputs,
    *features), and `bias` (*features), zero at first.

    `apart` makes each slice of the first of `features` a product of its own, and returns a tuple of
    (M, *features[1:]): no slice of the whole is then copied, nor put together in the backward pass,
    which on a TPU costs more than the products.
    """

    features: tuple[int, ...]
    dtype: str
    inputs: int = 1
    use_bias: bool = False
    apart: bool = False
    kernel_init: Any = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x):
        shape = (*x.shape[-self.inputs :], *self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, self.features) if self.use_bias else None
        x = x.astype(self.dtype)
        if not self.apart:
            return self._product(x, kernel, bias)
        kernels = jnp.unstack(kernel, axis=self.inputs)
        biases = [None] * len(kernels) if bias is None else jnp.unstack(bias)
        return tuple(self._product(x, *part) for part in zip(kernels, biases, strict=True))

    @nn.nowrap
    def _product(self, x, kernel, bias):
        out = checkpoint_name(_contract(x, kernel, self.inputs), "linear")
        return out if bias is None else (out.astype(jnp.float32) + bias).astype(self.dtype)
