"""How good a run's weights are: held-out likelihood, samples beside real images, linear probes.

assessment.jsonl in a workdir has a line for each checkpoint and protocol: {"step", "protocol",
measures...}. The measures (means over images):

cross_entropy   nats a token of held-out images, no dropout, labels known
frechet         distance of the samples to the held-out images as the tokenizer gives them back, over
                EfficientNet-Lite0's pooled features, shown `pixels` a side: another number than FID
frechet_images  the same to the held-out images as they are; the tokenizer's own error is part of it
agreement       share of the samples in which a classifier of real images sees the class asked for
real_...        the last three of as many real images that passed through the tokenizer (of training;
                held-out ones for agreement): what a perfect generator of its tokens would reach
probe           accuracies of linear probes, see evaluation/probe.py (the last step only)
teacher_probe   of a run with a bidirectional teacher that can be loaded: accuracy of a linear probe of
                its features, averaged over the grid, of real images
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
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
from mirai_jax.sampling import on_mesh
from mirai_jax.sampling.classifier import class_accuracy, fit_classifier
from mirai_jax.sampling.sampler import SampleOptions
from mirai_jax.training.components import labelled_images
from mirai_jax.utils import files
from mirai_jax.utils.errors import ConfigError, DataError, first_line
from mirai_jax.weights import frozen, pretrained

FILE = "assessment.jsonl"
_CHUNK = 250  # images at once
_PROBED_ON = 5_000  # training images


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a checkpoint is assessed; numbers of different protocols are not to be compared.

    Attributes:
        samples: how many are drawn, of all classes in turn.
        guidance: their scale; 1 is none.
        seed: of the samples, whatever the run's own is.
        pixels: a side of what EfficientNet-Lite0 is shown.
        held_out: the first so many of the held-out images, for cross-entropy and probes (those of
            mnist are sorted by class: all, or numbers of a few classes).
        weights: which of the run's.
    """

    samples: int = 2000
    guidance: float = 1.0
    seed: int = 0
    pixels: int = 112
    held_out: int = 5000
    weights: str = "ema"


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
    """Indices of `wanted` of `count` items (or of all), evenly: data may be sorted by class."""
    return np.linspace(0, count - 1, min(wanted, count)).round().astype(int)


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """What one tokenizer makes of the real images.

    Attributes:
        encode, decode: uint8 images to codes, and back.
        held_out_codes: int32 (N, L), of the held-out images that likelihood and probes are of.
        passed: moments of all held-out images that passed through it.
        real: the measures real_...
    """

    encode: Callable[[np.ndarray], np.ndarray]
    decode: Callable[[np.ndarray], np.ndarray]
    held_out_codes: np.ndarray
    passed: Any
    real: dict[str, float]


class Assessor:
    """Assesses runs on one data set; what does not depend on the run is made once.

    Raises:
        ConfigError, DataError: the run's images are not in memory, or none are held out.
    """

    def __init__(self, settings: Settings, protocol: Protocol, log: Callable[[str], None]):
        self.protocol = protocol
        if not settings.data.in_memory:
            raise ConfigError(
                f"data.name is {settings.data.name!r}; assessed are runs on images in memory: for "
                "others there are mirai_jax.sample and mirai_jax.evaluate"
            )
        self.train = labelled_images(settings, "train")
        held_out = labelled_images(settings, "held_out")
        if len(held_out.labels) < 2:
            raise DataError(f"{settings.data.name}: the run holds no images out (data.held_out)")
        self.held_out = LabelledImages(
            held_out.images[: protocol.held_out],
            held_out.labels[: protocol.held_out],
            held_out.class_names,
        )
        log("fitting a classifier of the real images")
        self.judge = fit_classifier(self.train.images, self.train.labels)
        self.network = Network("", _CHUNK, protocol.pixels)
        log(f"features of {len(held_out.labels):,} held-out images")
        self._reference = held_out.images, self._moments(held_out.images)
        if warning := self._reference[1].warning():
            log(f"warning: held-out images: {warning}")
        devices = jax.local_devices()
        self._mesh = sharding.make_mesh((len(devices), 1, 1), devices)
        self._say = log
        self._tokenized: dict[str, Tokenized] = {}
        self._teachers: dict[TeacherSettings, dict[str, float]] = {}

    def of_run(self, settings: Settings, workdir: str) -> "RunAssessor":
        """For one run on these images: its tokens."""
        tokenizer, params = frozen.load_codebook(settings, workdir)
        checksum = pretrained.checksum(params)
        if checksum not in self._tokenized:
            self._tokenized[checksum] = self._tokenize(tokenizer, params)
        tokens, of_teacher = self._tokenized[checksum], self.of_teacher(settings)
        return RunAssessor(self, settings.generator, tokens, of_teacher)

    def _moments(self, images: np.ndarray) -> Any:
        return self.network.features(image_streams.of_array("images", images)).moments

    def samples(self, config: GeneratorConfig, params: Any, labels: np.ndarray) -> np.ndarray:
        """int32 codes (N, L), over all local devices."""
        params = sharding.place(params, sharding.replicated(self._mesh))
        options, seed = SampleOptions(guidance=self.protocol.guidance), self.protocol.seed
        return on_mesh.draw(
            config, options, seed, self._mesh, params, labels, on_mesh.ASSESSED, chunk=_CHUNK
        )

    def _tokenize(self, tokenizer: nn.Module, params: Any) -> "Tokenized":
        """Real images through a tokenizer: their codes, and what comes back of them."""
        encode = functools.partial(batched.encode_images, tokenizer, params)
        decode = functools.partial(batched.decode_codes, tokenizer, params)
        codes = encode(self._reference[0])
        passed = self._moments(decode(codes))
        codes = codes[: len(self.held_out.labels)]
        count = self.protocol.samples
        train = self.train.images[spread_evenly(len(self.train.labels), count)]
        agreed = class_accuracy(self.judge, decode(codes[:count]), self.held_out.labels[:count])
        real = {**self.distances(decode(encode(train)), passed), "agreement": agreed}
        return Tokenized(encode, decode, codes, passed, {f"real_{k}": v for k, v in real.items()})

    def some_of_training(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels that probes are fitted to."""
        some = spread_evenly(len(self.train.labels), _PROBED_ON)
        return self.train.images[some], self.train.labels[some]

    def of_teacher(self, settings: Settings) -> dict[str, float]:
        """The measure of a run's bidirectional teacher; {} where it has none that can be loaded."""
        if settings.needs_images and settings.teacher not in self._teachers:
            self._teachers[settings.teacher] = self._probe_teacher(settings)
        return self._teachers[settings.teacher] if settings.needs_images else {}

    def _probe_teacher(self, settings: Settings) -> dict[str, float]:
        try:
            teacher, params = frozen.make_teacher(settings)
        except ConfigError as error:  # the run is whole without it
            self._say(f"no probe of the teacher: {error}")
            return {}
        images, labels = self.some_of_training()
        fitted, measured = (
            batched.teacher_features(teacher, params, some).mean(axis=1)
            for some in (images, self.held_out.images)
        )
        found = probe.accuracy(fitted, labels, measured, self.held_out.labels)
        return {"teacher_probe": found}

    def distances(self, images: np.ndarray, passed: Any) -> dict[str, float]:
        """Of uint8 images, to held-out ones that `passed` through the tokenizer and as they are."""
        mine, (_, untouched) = self._moments(images), self._reference
        return {
            name: frechet_distance(mine.mean, mine.covariance, real.mean, real.covariance)
            for name, real in (("frechet", passed), ("frechet_images", untouched))
        }


class RunAssessor:
    """Assesses the checkpoints of one run."""

    def __init__(
        self,
        assessor: Assessor,
        config: GeneratorConfig,
        tokens: Tokenized,
        of_teacher: dict[str, float],
    ):
        self._of, self._config, self._tokens = assessor, config, tokens
        self._of_teacher = of_teacher

    def __call__(self, params: Any, probed: bool) -> dict[str, Any]:
        """The measures of the generator `params`, with probes or without."""
        labels_N, codes_NxL = self._of.held_out.labels, self._tokens.held_out_codes
        protocol, config = self._of.protocol, self._config
        params = jax.device_put(params)
        measures = {"cross_entropy": cross_entropy(config, params, codes_NxL, labels_N)}
        asked = np.arange(protocol.samples, dtype=np.int32) % config.num_classes
        images = self._tokens.decode(self._of.samples(config, params, asked))
        measures |= self._of.distances(images, self._tokens.passed)
        measures["agreement"] = class_accuracy(self._of.judge, images, asked)
        measures |= self._tokens.real | self._of_teacher
        if probed and config.has_null_class:
            images, labels = self._of.some_of_training()
            train, test = (self._tokens.encode(images), labels), (codes_NxL, labels_N)
            measures["probe"] = probe.by_layer(config, params, train, test)
        return measures


# The file ----------------------------------------------------------------------------------------


def read(workdir: str) -> list[dict[str, Any]]:
    """The lines of assessment.jsonl; [] where there is none.

    Raises:
        DataError: a line is damaged, but for a last one that a stop cut off.
    """
    path = pathlib.Path(workdir) / FILE
    text = path.read_text(errors="replace") if path.exists() else ""
    *lines, unfinished = text.split("\n")  # '' unless a stop cut the last line off
    del unfinished
    found = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if not (type(entry["step"]) is int and isinstance(entry["protocol"], dict)):
                raise ValueError("no step or protocol")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: not an assessment ({first_line(error)})"
            ) from error
        found.append(entry)
    return found


def write(workdir: str, entries: list[dict[str, Any]]) -> None:
    """The whole file, whole or not at all."""
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    files.write_text(pathlib.Path(workdir) / FILE, text)


def missing(workdir: str, steps: list[int], protocol: Protocol) -> list[int]:
    """Of `steps`, those that the file does not hold under this protocol."""
    message = dataclasses.asdict(protocol)
    done = {entry["step"] for entry in read(workdir) if entry["protocol"] == message}
    return [step for step in steps if step not in done]
