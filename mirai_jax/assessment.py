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
probe           accuracies of linear probes, see probe.py (the last step only)
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

from mirai_jax import (
    coding,
    drawing,
    files,
    foresight,
    frozen,
    image_streams,
    probe,
    sharding,
    weights,
)
from mirai_jax.config import Settings
from mirai_jax.errors import ConfigError, DataError, first_line
from mirai_jax.feature_network import Network
from mirai_jax.image_sets import LabelledImages
from mirai_jax.judge import agreement, fit_judge
from mirai_jax.metrics import frechet_distance
from mirai_jax.models.generator import Generator, GeneratorConfig
from mirai_jax.parts import labelled_images
from mirai_jax.sampler import SampleOptions

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
def _nll(config: GeneratorConfig, params: Any, codes: jax.Array, labels: jax.Array) -> jax.Array:
    logits, _ = Generator(config).apply({"params": params}, codes[:, :-1], labels)
    return foresight.token_nll(logits, codes).mean(axis=-1)


def cross_entropy(
    config: GeneratorConfig, params: Any, codes_NxL: np.ndarray, labels_N: np.ndarray
) -> float:
    """Mean nats a token."""
    found = []
    for start in range(0, len(codes_NxL), _CHUNK):
        codes, labels = (x[start : start + _CHUNK] for x in (codes_NxL, labels_N))
        filled = np.resize(codes, (_CHUNK, codes.shape[1])), np.resize(labels, _CHUNK)
        found.append(np.asarray(_nll(config, params, *filled))[: len(codes)])
    return float(np.concatenate(found).mean(dtype=np.float64))


def spread_evenly(count: int, wanted: int) -> np.ndarray:
    """Indices of `wanted` of `count` items (or of all), evenly: data may be sorted by class."""
    return np.linspace(0, count - 1, min(wanted, count)).round().astype(int)


class Assessor:
    """Assesses runs on one data set; what does not depend on the run is made once.

    Raises:
        ConfigError, DataError: the run's images are not in memory, or none are held out.
    """

    def __init__(self, settings: Settings, protocol: Protocol, say: Callable[[str], None]):
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
        say("fitting a classifier of the real images")
        self.judge = fit_judge(self.train.images, self.train.labels)
        self.network = Network("", _CHUNK, protocol.pixels)
        say(f"features of {len(held_out.labels):,} held-out images")
        self._reference = held_out.images, self._moments(held_out.images)
        if warning := self._reference[1].warning():
            say(f"warning: held-out images: {warning}")
        devices = jax.local_devices()
        self._mesh = sharding.make_mesh((len(devices), 1, 1), devices)
        self._passed: dict[str, tuple[Any, dict[str, float]]] = {}

    def of_run(self, settings: Settings, workdir: str) -> "RunAssessor":
        """For one run on these images: its tokens."""
        return RunAssessor(self, settings, *frozen.load_codebook(settings, workdir))

    def _moments(self, images: np.ndarray) -> Any:
        return self.network.features(image_streams.of_array("images", images)).moments

    def samples(self, config: GeneratorConfig, params: Any, labels: np.ndarray) -> np.ndarray:
        """int32 codes (N, L), over all local devices."""
        params = sharding.place(params, sharding.replicated(self._mesh))
        options, seed = SampleOptions(guidance=self.protocol.guidance), self.protocol.seed
        return drawing.draw(
            config, options, seed, self._mesh, params, labels, drawing.ASSESSED, chunk=_CHUNK
        )

    def passed(self, tokenizer: nn.Module, params: Any) -> tuple[Any, dict[str, float]]:
        """Of real images that passed through a tokenizer: moments of the held-out ones; measures."""
        checksum = weights.checksum(params)
        if checksum not in self._passed:
            through = lambda images: coding.decode_codes(  # noqa: E731
                tokenizer, params, coding.encode_images(tokenizer, params, images)
            )
            images, _ = self._reference
            moments = self._moments(through(images))
            count, held_out = self.protocol.samples, self.held_out
            train = self.train.images[spread_evenly(len(self.train.labels), count)]
            judged = through(held_out.images[:count])
            found = {
                **self.distances(through(train), moments),
                "agreement": agreement(self.judge, judged, held_out.labels[:count]),
            }
            self._passed[checksum] = moments, {f"real_{k}": v for k, v in found.items()}
        return self._passed[checksum]

    def distances(self, images: np.ndarray, passed: Any) -> dict[str, float]:
        """Of uint8 images, to held-out ones that `passed` through the tokenizer and as they are."""
        mine, (_, untouched) = self._moments(images), self._reference
        return {
            name: frechet_distance(mine.mean, mine.covariance, real.mean, real.covariance)
            for name, real in (("frechet", passed), ("frechet_images", untouched))
        }


class RunAssessor:
    """Assesses the checkpoints of one run."""

    def __init__(self, assessor: Assessor, settings: Settings, tokenizer: nn.Module, params: Any):
        self._of, self._config = assessor, settings.generator
        self._decode = functools.partial(coding.decode_codes, tokenizer, params)
        self._encode = functools.partial(coding.encode_images, tokenizer, params)
        self._codes = self._encode(assessor.held_out.images)
        self._passed, self._real = assessor.passed(tokenizer, params)

    def _probe_train(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes and labels of training images."""
        train = self._of.train
        some = spread_evenly(len(train.labels), _PROBED_ON)
        return self._encode(train.images[some]), train.labels[some]

    def __call__(self, params: Any, probed: bool) -> dict[str, Any]:
        """The measures of the generator `params`, with probes or without."""
        labels_N, codes_NxL = self._of.held_out.labels, self._codes
        protocol, config = self._of.protocol, self._config
        params = jax.device_put(params)
        measures = {"cross_entropy": cross_entropy(config, params, codes_NxL, labels_N)}
        asked = np.arange(protocol.samples, dtype=np.int32) % config.num_classes
        images = self._decode(self._of.samples(config, params, asked))
        measures |= self._of.distances(images, self._passed)
        measures["agreement"] = agreement(self._of.judge, images, asked)
        measures |= self._real
        if probed and config.has_null_class:
            test = codes_NxL, labels_N
            measures["probe"] = probe.by_layer(config, params, self._probe_train(), test)
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
    told = dataclasses.asdict(protocol)
    done = {entry["step"] for entry in read(workdir) if entry["protocol"] == told}
    return [step for step in steps if step not in done]
