"""The PatchGAN discriminator of LlamaGen's tokenizer training: real or reconstructed, patch by patch.

Official file: tokenizer/tokenizer_image/discriminator_patchgan.py. Modules are named as there, the
`main_3` here being its `main.3`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

_DEVIATION = 0.02  # of fresh kernels, and of the scales of fresh norms around 1
_MOST = 8  # channels of the deepest layers, in units of `width`


class _BatchNorm(nn.Module):
    """PyTorch's batch normalisation while it trains: the running variance is the unbiased one.

    Flax keeps the biased one.
    """

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        x, (*rest, channels) = x_BxHxWxC.astype(jnp.float32), x_BxHxWxC.shape
        scale = self.param(
            "scale", lambda *args: 1 + nn.initializers.normal(_DEVIATION)(*args), (channels,)
        )
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        count = rest[0] * rest[1] * rest[2]
        found = {"mean": mean, "var": variance * (count / max(1, count - 1))}
        for name, start in (("mean", jnp.zeros), ("var", jnp.ones)):
            running = self.variable("batch_stats", name, start, (channels,))
            if not self.is_initializing():
                running.value = 0.9 * running.value + 0.1 * jax.lax.stop_gradient(found[name])
        x = (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias
        return x.astype(x_BxHxWxC.dtype)


class PatchDiscriminator(nn.Module):
    """Always in training mode: apply it with mutable 'batch_stats'.

    Attributes:
        width: channels of the first layer.
        num_layers: layers that halve the resolution.
        dtype: of the convolutions.
    """

    width: int = 64
    num_layers: int = 3
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
        """Images in [-1, 1] -> logits (B, h, w), float32: above 0 where a patch looks real."""

        def conv(x: jax.Array, index: int, channels: int, stride: int, bias: bool) -> jax.Array:
            layer = nn.Conv(
                channels, (4, 4), stride, [(1, 1), (1, 1)], use_bias=bias, dtype=self.dtype,
                kernel_init=nn.initializers.normal(_DEVIATION), name=f"main_{index}",
            )  # fmt: skip
            return layer(x)

        x = conv(images_BxHxWxC.astype(self.dtype), 0, self.width, 2, True)
        x = nn.leaky_relu(x, 0.2)
        for n in range(1, self.num_layers + 1):
            index, channels = 3 * n - 1, self.width * min(2**n, _MOST)
            x = conv(x, index, channels, 2 if n < self.num_layers else 1, False)
            x = nn.leaky_relu(_BatchNorm(name=f"main_{index + 1}")(x), 0.2)
        logits = conv(x, 3 * self.num_layers + 2, 1, 1, True)
        return logits[..., 0].astype(jnp.float32)


def smallest_side(num_layers: int) -> int:
    """Pixels a side that an image needs for one logit: the last two layers lose a position each."""
    return 3 * 2**num_layers
