"""What can be measured of runs on images in memory alone: class accuracy, the tokenizer's limits, probes."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from mirai_jax.config.schema import Settings
from mirai_jax.data.small_sets import LabelledImages
from mirai_jax.evaluation import probe
from mirai_jax.evaluation.metrics import Moments, distance
from mirai_jax.models import batched
from mirai_jax.sampling.classifier import (
    class_accuracy,
    decision_values,
    fit_classifier,
    fitted_on,
)
from mirai_jax.utils.errors import ConfigError
from mirai_jax.weights import frozen

_PROBED_ON = 5_000  # training images


def spread_evenly(count: int, wanted: int) -> np.ndarray:
    """Indices of `wanted` of `count` items, evenly spaced: data may be sorted by class."""
    return np.linspace(0, count - 1, min(wanted, count)).round().astype(int)


class Judged:
    """What a classifier of real images makes of images, seen part by part.

    Attributes:
        hits: how many it assigns to their label.
        moments: of its decision values.
    """

    def __init__(self, classifier: Any, channels: int):
        self._classifier, self._channels = classifier, channels
        self.hits, self.moments = 0.0, Moments()

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> "Judged":
        images = images[..., : self._channels]  # of grey images, samples have three
        self.hits += class_accuracy(self._classifier, images, labels) * len(labels)
        self.moments.add(decision_values(self._classifier, images))
        return self


class SmallSet:
    """The training and held-out images of runs, and what does not depend on the run."""

    def __init__(self, train: LabelledImages, held_out: LabelledImages, log: Callable[[str], None]):
        self.train, self.held_out, self._log = train, held_out, log
        self._teachers: dict[Any, dict[str, float]] = {}

    @functools.cached_property
    def _classifier(self) -> Any:
        self._log("fitting a classifier of the real images")
        return fit_classifier(self.train.images, self.train.labels)

    def judge(self) -> Judged:
        """Of no images yet."""
        return Judged(self._classifier, self.train.images.shape[-1])

    def limits(
        self, tokenizer: Any, params: Any, count: int, moments: Callable[[np.ndarray], Any]
    ) -> tuple[Any, Any, dict[str, float]]:
        """What any generator of these tokens can reach, of `count` real images.

        Args:
            moments: of the features of uint8 images.

        Returns:
            The moments of the held-out images through the tokenizer, the same of the classifier's
            decision values, and: real_frechet, real_frechet_classifier and real_frechet_images, distances
            of training images through the tokenizer to these and to the held-out images as they are; and
            real_class_accuracy, of held-out ones through it. The classifier knows the images that it was
            fitted to too well: they are left out of its distance, which is missing if no others are there.
        """

        def again(images: np.ndarray) -> np.ndarray:
            codes = batched.encode_images(tokenizer, params, images)
            return batched.decode_codes(tokenizer, params, codes)

        reconstructed = again(self.held_out.images)
        of_reconstructed = moments(reconstructed)
        some = spread_evenly(len(self.train.labels), count)
        train = again(self.train.images[some])
        real, judged = moments(train), self.judge()(reconstructed, self.held_out.labels).moments
        asked, held_out = self.train.labels[some], spread_evenly(len(reconstructed), count)
        seen = self.judge()(reconstructed[held_out], self.held_out.labels[held_out])
        found = {
            "real_frechet": distance(real, of_reconstructed),
            "real_frechet_images": distance(real, moments(self.held_out.images)),
            "real_class_accuracy": seen.hits / len(held_out),
        }
        everything = np.arange(len(self.train.labels))
        new = ~np.isin(some, everything[fitted_on(len(everything))])
        if new.sum() > 1:
            moments_of_new = self.judge()(train[new], asked[new]).moments
            found["real_frechet_classifier"] = distance(moments_of_new, judged)
        return of_reconstructed, judged, found

    def probes(
        self, settings: Settings, tokenizer: Any, params: Any, ema: Any, count: int
    ) -> dict[str, Any]:
        """Accuracies of linear probes, measured on `count` held-out images (0: all).

        Returns:
            'probe': of the generator's states (evaluation/probe.py); {} without a null class.
            'teacher_probe': of the bidirectional teacher's features of real images, averaged over the
            grid, where the run has such a teacher and it can be loaded.
        """
        some = spread_evenly(len(self.held_out.labels), count or len(self.held_out.labels))
        measured = self.held_out.images[some], self.held_out.labels[some]
        some = spread_evenly(len(self.train.labels), _PROBED_ON)
        fitted = self.train.images[some], self.train.labels[some]
        found: dict[str, Any] = {"probe": {}}
        if settings.generator.has_null_class:
            encode = functools.partial(batched.encode_images, tokenizer, params)
            parts = ((encode(images), labels) for images, labels in (fitted, measured))
            found["probe"] = probe.by_layer(settings.generator, ema, *parts)
        if settings.needs_images:
            if settings.teacher not in self._teachers:
                self._teachers[settings.teacher] = self._probe_teacher(settings, fitted, measured)
            found |= self._teachers[settings.teacher]
        return found

    def _probe_teacher(self, settings: Settings, fitted: Any, measured: Any) -> dict[str, float]:
        try:
            teacher, params = frozen.make_teacher(settings)
        except ConfigError as error:  # the other measures do not need it
            self._log(f"no probe of the teacher: {error}")
            return {}
        x, y = (
            batched.teacher_features(teacher, params, images).mean(axis=1)
            for images, _ in (fitted, measured)
        )
        return {"teacher_probe": probe.accuracy(x, fitted[1], y, measured[1])}
