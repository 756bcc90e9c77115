"""Features of sets of images, by a network over all local devices."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mirai_jax.evaluation import metrics
from mirai_jax.evaluation.image_streams import ImageStream
from mirai_jax.evaluation.rows import Rows
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
    pooled: Rows | None = None  # (N, D)
    probabilities: Rows | None = None  # (N, 1008), Inception's


class Network:
    """A feature network over all local devices: uint8 images -> pooled, spatial, probabilities.

    Args:
        inception: the file of Inception-v3's weights; '' for EfficientNet-Lite0.
        batch_size: images at once on each device.
        pixels: side of EfficientNet-Lite0's input. It was trained at 224; fewer are faster, and
            give another distance.
        devices: of this process (default: all).
    """

    def __init__(
        self,
        inception: str,
        batch_size: int,
        pixels: int = 224,
        devices: list[jax.Device] | None = None,
    ):
        self._devices = LocalDevices(devices)
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

    def features(
        self, stream: ImageStream, heartbeat: Callable[[str], object] | None = None
    ) -> Features:
        """Features of a whole stream, in bounded memory; `heartbeat` takes lines in place of the screen."""
        collected, done = Collected(), 0
        progress = Progress(stream.count, "images", stream=None if heartbeat else sys.stderr)
        with contextlib.closing(progress):
            for images in stream.chunks(self.batch):
                if heartbeat:
                    heartbeat(f"{stream.name} from {done} of {stream.count} on")
                collected.add(self(images))
                done += len(images)
                progress.advance(len(images))
        return collected.features()


class Collected:
    """Outputs of a network, added a few images at a time; how many at a time changes no digit."""

    def __init__(self):
        self._pooled, self._probabilities = Rows(), Rows()
        self._spatial, self._waiting = metrics.Moments(), np.zeros((0, 0), np.float32)

    def add(self, outputs: Sequence[np.ndarray]) -> None:
        """What `Network` gives of some images."""
        self._pooled.add(outputs[0])
        for spatial in outputs[1:2]:
            self._waiting = np.concatenate([self._waiting.reshape(-1, spatial.shape[1]), spatial])
            self._probabilities.add(outputs[2])
        # A thousand at a time: each addition costs a pass over the whole covariance.
        while len(self._waiting) >= 1000:
            self._spatial.add(self._waiting[:1000])
            self._waiting = self._waiting[1000:]

    def features(self) -> Features:
        """Of all images."""
        features = Features(metrics.Moments(), pooled=self._pooled)
        features.moments.add(features.pooled)
        if len(self._probabilities):
            if len(self._waiting):
                self._spatial.add(self._waiting)
            features.spatial = self._spatial
            features.probabilities = self._probabilities
        return features


def _inception(params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
    out = InceptionV3().apply({"params": params}, images)
    return out.pool, out.spatial, out.probabilities


def _efficientnet(pixels: int, params: Any, images: jax.Array) -> tuple[jax.Array]:
    """Pooled features of images resized to `pixels` a side."""
    images = images.astype(jnp.float32) / 255
    images = jax.image.resize(images, (len(images), pixels, pixels, 3), "linear", antialias=True)
    return (EfficientNetLite0().apply({"params": params}, images),)
