"""Features of sets of images, by a network over all local devices."""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mirai_jax.evaluation import metrics
from mirai_jax.evaluation.image_streams import ImageStream
from mirai_jax.models.batched import LocalDevices
from mirai_jax.models.efficientnet import EfficientNetLite0
from mirai_jax.models.inception import InceptionV3
from mirai_jax.utils.progress import Progress
from mirai_jax.weights import efficientnet
from mirai_jax.weights import inception as inception_weights


@dataclasses.dataclass
class Features:
    """Features of one set of images; what the network or a file of statistics lacks is None."""

    moments: Any  # of the pooled features
    spatial: Any = None  # moments of Inception's spatial features
    pooled: np.ndarray | None = None  # float32 (N, D)
    probabilities: np.ndarray | None = None  # float32 (N, 1008), Inception's


class Network:
    """A feature network over all local devices: uint8 images -> pooled, spatial, probabilities.

    Args:
        inception: the file of Inception-v3's weights; '' for EfficientNet-Lite0.
        batch_size: images at once on each device.
        pixels: side of EfficientNet-Lite0's input. It was trained at 224; fewer are faster, and
            give another distance.
    """

    def __init__(self, inception: str, batch_size: int, pixels: int = 224):
        self._devices = LocalDevices()
        self.batch = batch_size * self._devices.count
        self.is_inception = bool(inception)
        if inception:
            params, apply = inception_weights.load(inception), _inception
        else:
            params = efficientnet.load_efficientnet_lite0()
            apply = functools.partial(_efficientnet, pixels)
        self._params = self._devices.copy(params)
        self._apply = jax.jit(apply)

    def __call__(self, images_BxHxWx3: np.ndarray) -> tuple[np.ndarray, ...]:
        """Runs on at most `batch` images; fills them up to it, so that one program serves all."""
        filled = np.resize(images_BxHxWx3, (self.batch, *images_BxHxWx3.shape[1:]))
        out = self._apply(self._params, self._devices.split(filled))
        return tuple(np.asarray(part)[: len(images_BxHxWx3)] for part in out)

    def features(self, stream: ImageStream, quiet: bool = False) -> Features:
        """Features of a whole stream; holds them in memory, but not the images.

        `quiet` shows no progress.
        """
        spatial = metrics.Moments()
        pooled, probabilities, waiting = [], [], []
        progress = Progress(stream.count, "images", stream=None if quiet else sys.stderr)
        try:
            for images in stream.chunks(self.batch):
                outputs = self(images)
                pooled.append(outputs[0])
                if self.is_inception:
                    waiting.append(outputs[1])
                    probabilities.append(outputs[2])
                # A thousand at a time: each addition costs a pass over the whole covariance.
                if sum(map(len, waiting)) >= 1000:
                    spatial.add(np.concatenate(waiting))
                    waiting = []
                progress.advance(len(images))
        finally:
            progress.close()
        features = Features(metrics.Moments(), pooled=np.concatenate(pooled))
        features.moments.add(features.pooled)
        if self.is_inception:
            if waiting:
                spatial.add(np.concatenate(waiting))
            features.spatial, features.probabilities = spatial, np.concatenate(probabilities)
        return features


def _inception(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
    out = InceptionV3().apply({"params": params}, images)
    return out.pool, out.spatial, out.probabilities


def _efficientnet(pixels: int, params: Any, images: jax.Array) -> tuple[jax.Array]:
    """Pooled features of images resized to `pixels` a side."""
    images = images.astype(jnp.float32) / 255
    images = jax.image.resize(images, (len(images), pixels, pixels, 3), "linear", antialias=True)
    return (EfficientNetLite0().apply({"params": params}, images),)
