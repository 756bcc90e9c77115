"""How good a run's weights are: held-out likelihood, samples beside real images, linear probes.

The measures are means over images:

cross_entropy   nats a token of held-out images, without dropout, labels given
frechet         distance of the samples to the tokenizer's reconstructions of the held-out images, over
                EfficientNet-Lite0's pooled features of `pixels` a side: another number than FID
frechet_images  the same to the held-out images as they are; includes the tokenizer's error
agreement       class accuracy: share of the samples that a classifier of real images assigns to the
                class asked for
real_...        the last three for the tokenizer's reconstructions of as many real images (training
                images; held-out ones for agreement): the limit of any generator of its tokens
probe           accuracies of linear probes, see evaluation/probe.py (the last step only)
teacher_probe   accuracy of a linear probe of the bidirectional teacher's features of real images,
                averaged over the grid, where the run has such a teacher and it can be loaded
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from mirai_jax import foresight, sharding
from mirai_jax.config.schema import Settings, TeacherSettings
from mirai_jax.data.small_sets import LabelledImages
from mirai_jax.evaluation import image_streams, probe
from mirai_jax.evaluation.metrics import frechet_distance
from mirai_jax.evaluation.network import Network
from mirai_jax.models import batched
from mirai_jax.models.generator import Generator, GeneratorConfig
from mirai_jax.sampling import keys, on_mesh
from mirai_jax.sampling.classifier import class_accuracy, fit_classifier
from mirai_jax.sampling.sampler import SampleOptions
from mirai_jax.training.components import labelled_images
from mirai_jax.utils.errors import ConfigError, DataError
from mirai_jax.weights import frozen, pretrained

_CHUNK = 250  # images at once
_PROBED_ON = 5_000  # training images


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a checkpoint is assessed. Compare only numbers of one protocol.

    Attributes:
        samples: how many are drawn, with labels 0, 1, ..., and again from 0.
        guidance: their scale; 1 is none.
        seed: of the samples; independent of the run's seed.
        pixels: side of EfficientNet-Lite0's input.
        held_out: number of held-out images, from the first on, for cross-entropy and probes. Those of
            mnist are sorted by class: take all, or know which classes the first ones show.
        weights: which weights of the run.
    """

    FILE: ClassVar[str] = "assessment.jsonl"
    samples: int = 2000
    guidance: float = 1.0
    seed: int = 0
    pixels: int = 112
    held_out: int = 5000
    weights: str = "ema"

    def check(self, settings: Settings, workdir: str) -> None:
        """Raises ConfigError for a run that cannot be assessed in this way."""
        if self.guidance > 1 and not settings.generator.has_null_class:
            raise ConfigError(
                f"--guidance is {self.guidance}; it must be 1 for {workdir}, which has no null class"
            )


@functools.partial(jax.jit, static_argnums=0)
def _nll(
    config: GeneratorConfig, params: Any, codes_and_labels: tuple[jax.Array, jax.Array]
) -> jax.Array:
    codes, labels = codes_and_labels
    logits, _ = Generator(config).apply({"params": params}, codes[:, :-1], labels)
    return foresight.token_nll(logits, codes).mean(axis=-1)


def cross_entropy(
    config: GeneratorConfig, params: Any, codes_NxL: np.ndarray, labels_N: np.ndarray
) -> float:
    """Mean nats a token."""
    nll_N = batched.in_chunks(_nll, config, params, (codes_NxL, labels_N), _CHUNK)
    return float(nll_N.mean(dtype=np.float64))


def spread_evenly(count: int, wanted: int) -> np.ndarray:
    """Indices of `wanted` of `count` items, evenly spaced: data may be sorted by class."""
    return np.linspace(0, count - 1, min(wanted, count)).round().astype(int)


def real_images(settings: Settings) -> tuple[LabelledImages, LabelledImages]:
    """A run's training images, and its held-out ones.

    Raises:
        ConfigError, DataError: they are on disk, or none are held out.
    """
    if not settings.data.in_memory:
        raise ConfigError(
            f"data.name is {settings.data.name!r}; runs on images on disk need mirai_jax.sample and "
            "mirai_jax.evaluate"
        )
    held_out = labelled_images(settings, "held_out")
    if len(held_out.labels) < 2:
        raise DataError(f"{settings.data.name}: the run holds no images out (data.held_out)")
    return labelled_images(settings, "train"), held_out


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """The real images through one tokenizer."""

    encode: Callable[[np.ndarray], np.ndarray]  # uint8 images to codes
    decode: Callable[[np.ndarray], np.ndarray]
    held_out_codes: np.ndarray  # int32 (N, L), for cross-entropy and probes
    reconstructed: Any  # moments of the reconstructions of all held-out images
    real: dict[str, float]  # the measures real_...


class Assessor:
    """Assesses runs on one data set; computes once whatever does not depend on the run."""

    def __init__(self, settings: Settings, protocol: Protocol, log: Callable[[str], None]):
        self.protocol = protocol
        self._train, held_out = real_images(settings)
        some = slice(protocol.held_out)
        self.held_out = dataclasses.replace(
            held_out, images=held_out.images[some], labels=held_out.labels[some]
        )
        some = spread_evenly(len(self._train.labels), _PROBED_ON)
        self._probe_images = self._train.images[some], self._train.labels[some]
        log("fitting a classifier of the real images")
        self._classifier = fit_classifier(self._train.images, self._train.labels)
        self._network = Network("", _CHUNK, protocol.pixels)
        log(f"features of {len(held_out.labels):,} held-out images")
        self._reference = held_out.images, self._moments(held_out.images)
        if warning := self._reference[1].warning():
            log(f"warning: held-out images: {warning}")
        devices = jax.local_devices()
        self._mesh = sharding.make_mesh((len(devices), 1, 1), devices)
        self._log = log
        self._tokenized: dict[str, Tokenized] = {}
        self._teachers: dict[TeacherSettings, dict[str, float]] = {}

    def measure(
        self, settings: Settings, workdir: str, saved: Mapping[str, Any], probed: bool
    ) -> dict[str, Any]:
        """The measures of a run's checkpoint on these images, with probes or without."""
        config, labels_N = settings.generator, self.held_out.labels
        tokens, of_teacher = self._tokens_of(settings, workdir), self.of_teacher(settings)
        params = jax.device_put(saved[self.protocol.weights])
        codes_NxL = tokens.held_out_codes
        measures = {"cross_entropy": cross_entropy(config, params, codes_NxL, labels_N)}
        asked = np.arange(self.protocol.samples, dtype=np.int32) % config.num_classes
        images = tokens.decode(self._draw(config, params, asked))
        measures |= self._distances(images, tokens.reconstructed)
        measures["agreement"] = class_accuracy(self._classifier, images, asked)
        measures |= tokens.real | of_teacher
        if probed and config.has_null_class:
            images, labels = self._probe_images
            train, test = (tokens.encode(images), labels), (codes_NxL, labels_N)
            measures["probe"] = probe.by_layer(config, params, train, test)
        return measures

    @staticmethod
    def summary(measures: Mapping[str, Any]) -> str:
        """Of `measure`, for the screen."""
        return (
            f"ce {measures['cross_entropy']:.4f}  frechet {measures['frechet']:.2f}  "
            f"agreement {measures['agreement']:.1%}"
        )

    def _moments(self, images: np.ndarray) -> Any:
        return self._network.features(image_streams.of_array("images", images)).moments

    def _draw(self, config: GeneratorConfig, params: Any, labels: np.ndarray) -> np.ndarray:
        """int32 codes (N, L), drawn on all local devices."""
        params = sharding.place(params, sharding.replicated(self._mesh))
        options, seed = SampleOptions(guidance=self.protocol.guidance), self.protocol.seed
        return on_mesh.draw(
            config, options, seed, self._mesh, params, labels, keys.ASSESSED, chunk=_CHUNK
        )

    def _tokens_of(self, settings: Settings, workdir: str) -> Tokenized:
        """Codes and reconstructions of the real images, by the run's tokenizer."""
        tokenizer, params = frozen.load_tokenizer(settings, workdir)
        checksum = pretrained.checksum(params)
        if checksum not in self._tokenized:
            encode = functools.partial(batched.encode_images, tokenizer, params)
            decode = functools.partial(batched.decode_codes, tokenizer, params)
            codes, count = encode(self._reference[0]), self.protocol.samples
            reconstructed = self._moments(decode(codes))
            codes = codes[: len(self.held_out.labels)]
            train = self._train.images[spread_evenly(len(self._train.labels), count)]
            real = self._distances(decode(encode(train)), reconstructed)
            real["agreement"] = class_accuracy(
                self._classifier, decode(codes[:count]), self.held_out.labels[:count]
            )
            real = {f"real_{name}": value for name, value in real.items()}
            self._tokenized[checksum] = Tokenized(encode, decode, codes, reconstructed, real)
        return self._tokenized[checksum]

    def of_teacher(self, settings: Settings) -> dict[str, float]:
        """{'teacher_probe': accuracy}; {} without a bidirectional teacher that can be loaded."""
        if settings.needs_images and settings.teacher not in self._teachers:
            self._teachers[settings.teacher] = self._probe_teacher(settings)
        return self._teachers[settings.teacher] if settings.needs_images else {}

    def _probe_teacher(self, settings: Settings) -> dict[str, float]:
        try:
            teacher, params = frozen.make_teacher(settings)
        except ConfigError as error:  # the other measures do not need it
            self._log(f"no probe of the teacher: {error}")
            return {}
        images, labels = self._probe_images
        fitted, measured = (
            batched.teacher_features(teacher, params, some).mean(axis=1)
            for some in (images, self.held_out.images)
        )
        found = probe.accuracy(fitted, labels, measured, self.held_out.labels)
        return {"teacher_probe": found}

    def _distances(self, images: np.ndarray, reconstructed: Any) -> dict[str, float]:
        """Of uint8 images, to the held-out ones as `reconstructed` and as they are."""
        mine, (_, untouched) = self._moments(images), self._reference
        return {
            name: frechet_distance(mine.mean, mine.covariance, real.mean, real.covariance)
            for name, real in (("frechet", reconstructed), ("frechet_images", untouched))
        }
