"""EfficientNet-Lite0: features of images, for evaluation and for a small teacher.

EfficientNet-Lite0 (tensorflow/tpu, models/official/efficientnet/lite) is EfficientNet-B0 without
squeeze-excite and with relu6: 4.7 M parameters, 75.1 % top-1 on ImageNet at 224 px. It only runs
inference: each batch normalisation is folded into the convolution before it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

# (expansion, channels, repeats, stride of the first repeat, kernel), stages 1 to 7.
EFFICIENTNET_LITE0_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
STAGE_CHANNELS = tuple(channels for _, channels, *_ in EFFICIENTNET_LITE0_STAGES)
STEM_CHANNELS, HEAD_CHANNELS, NUM_CLASSES = 32, 1280, 1000
BATCH_NORM_EPSILON = 1e-3


class _Depthwise(nn.Module):
    """Depthwise k x k convolution with bias, 'SAME' padding as in TensorFlow and XLA.

    XLA fuses the sum of shifted products into one loop: on a CPU 5 to 25 times faster than the
    equal grouped convolution.
    """

    kernel: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        k, s = self.kernel, self.stride
        B, H, W, C = x_BxHxWxC.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (k, k, 1, C))
        y = self.param("bias", nn.initializers.zeros, (C,))  # float32, as the sums
        h, w = -(-H // s), -(-W // s)  # rounded up
        pad_h, pad_w = (max((out - 1) * s + k - size, 0) for out, size in ((h, H), (w, W)))
        x = jnp.pad(
            x_BxHxWxC, ((0, 0), (pad_h // 2, -(-pad_h // 2)), (pad_w // 2, -(-pad_w // 2)), (0, 0))
        )
        for i in range(k):
            for j in range(k):
                y += (
                    kernel[i, j, 0] * x[:, i : i + (h - 1) * s + 1 : s, j : j + (w - 1) * s + 1 : s]
                )
        return y.astype(self.dtype)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, NHWC, for images of any size (trained at 224 x 224).

    `dtype` is the type of the computation; float32 is computed as such on every device. Parameters
    are float32: see `weights.efficientnet`.
    """

    dtype: Any = jnp.float32

    def _conv(self, name: str, channels: int, kernel: int = 1, stride: int = 1) -> nn.Conv:
        size, options = (kernel, kernel), {"dtype": self.dtype, "precision": "highest"}
        return nn.Conv(channels, size, stride, "SAME", name=name, **options)

    def _block(self, x, name: str, expansion, channels, stride, kernel):
        skip = x
        if expansion > 1:
            x = nn.relu6(self._conv(f"{name}_expand", expansion * x.shape[-1])(x))
        x = nn.relu6(_Depthwise(kernel, stride, self.dtype, name=f"{name}_depthwise")(x))
        x = self._conv(f"{name}_project", channels)(x)
        return x + skip if stride == 1 and x.shape == skip.shape else x

    @nn.compact
    def __call__(
        self, images_BxHxWx3: jax.Array, stage: int | None = None, logits: bool = False
    ) -> jax.Array:
        """Features of images.

        Args:
          images_BxHxWx3: floating point in [0, 1], RGB; normalised here as the network expects.
          stage: 1 to 7 for the map after that stage, None for what follows the last.
          logits: with stage None, class scores instead of pooled features.
        Returns:
          In `dtype`: with `stage` (B, h, w, STAGE_CHANNELS[stage - 1]), where h is H over the
          strides so far (2, 4, 8, 16, 16, 32, 32), rounded up; else pooled features (B, 1280), or
          the logits (B, 1000) in the usual order of the ImageNet classes.
        Raises:
          ValueError: images of another shape or of an integer type, or there is no such stage.
        """
        if images_BxHxWx3.ndim != 4 or images_BxHxWx3.shape[-1] != 3:
            raise ValueError(f"images must be (B, H, W, 3), not {images_BxHxWx3.shape}")
        if not jnp.issubdtype(images_BxHxWx3.dtype, jnp.floating):
            raise ValueError(f"images must be floats in [0, 1], not {images_BxHxWx3.dtype}")
        if stage is not None and (logits or stage not in range(1, 8)):
            raise ValueError(f"stage is {stage!r}; it must be 1 to 7, or None, as for logits")

        # The training data was (pixel - 127) / 128 with pixels 0 to 255.
        x = (images_BxHxWx3.astype(jnp.float32) * 255 - 127) / 128
        x = nn.relu6(self._conv("stem", STEM_CHANNELS, 3, 2)(x.astype(self.dtype)))
        for n, (expansion, channels, repeats, stride, kernel) in enumerate(
            EFFICIENTNET_LITE0_STAGES, start=1
        ):
            for i in range(repeats):
                x = self._block(
                    x, f"stage{n}_{i}", expansion, channels, stride if i == 0 else 1, kernel
                )
            if n == stage:
                return x
        x = nn.relu6(self._conv("head", HEAD_CHANNELS)(x))
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(self.dtype)
        if not logits:
            return x
        return nn.Dense(NUM_CLASSES, dtype=self.dtype, precision="highest", name="classifier")(x)
