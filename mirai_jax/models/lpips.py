"""LPIPS (arXiv 1801.03924): how different two images look to VGG16, as LlamaGen's tokenizers learn it.

Official file: tokenizer/tokenizer_image/lpips.py. Only the features are here, without dropout.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Channels of VGG16's convolutions, stage by stage; a maximum of 2x2 pixels lies between stages.
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SMALLEST_SIDE = 2 ** (len(VGG16) - 1)  # pixels
# Of images in [-1, 1].
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


class Lpips(nn.Module):
    """The distance; `weights.lpips` loads its parameters (float32)."""

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, others_BxHxWxC: jax.Array) -> jax.Array:
        """Float32 (B,), of images in [-1, 1] of SMALLEST_SIDE pixels or more; C is 1 or 3."""
        both = jnp.concatenate([images_BxHxWxC, others_BxHxWxC])
        x = (jnp.broadcast_to(both, (*both.shape[:-1], 3)) - _SHIFT) / _SCALE
        distance = 0.0
        for stage, widths in enumerate(VGG16):
            if stage:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for i, width in enumerate(widths):
                x = nn.relu(nn.Conv(width, (3, 3), name=f"stage{stage}_{i}")(x))
            unit = x / (jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)) + 1e-10)
            one, other = jnp.split(unit, 2)
            weights = self.param(f"weights{stage}", nn.initializers.ones, widths[-1:])
            distance += jnp.mean(jnp.square(one - other) @ weights, axis=(1, 2))
        return distance
