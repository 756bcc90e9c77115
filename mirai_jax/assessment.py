"""How good a run's weights are: held-out likelihood, samples beside real images, linear probes.

assessment.jsonl in a workdir has a line for each checkpoint and protocol: {"step", "protocol",
measures...}. The measures (means over images):

cross_entropy   nats a token of held-out images, no dropout, labels known
frechet         distance of the samples to the held-out images over EfficientNet-Lite0's pooled
                features, shown `pixels` a side: another number than FID
agreement       share of the samples in which a classifier of real images sees the class asked for
real_agreement  the same of held-out images that passed through the tokenizer: what to compare with
probe           accuracies of linear probes, see probe.py (the last step only)
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mirai_jax import coding, drawing, files, foresight, frozen, image_streams, probe, sharding
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


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a checkpoint is assessed; numbers of different protocols are not to be compared.

    Attributes:
        samples: how many are drawn, of all classes in turn.
        guidance: their scale; 1 is none.
        seed: of the samples, whatever the run's own is.
        pixels: a side of what EfficientNet-Lite0 is shown.
        held_out: the first so many of the held-out images, for cross-entropy and probes.
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
        self.real = self._moments(held_out.images)
        devices = jax.local_devices()
        self._mesh = sharding.make_mesh((len(devices), 1, 1), devices)

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

    def frechet(self, images: np.ndarray) -> float:
        """Distance of uint8 images to the held-out ones."""
        moments, real = self._moments(images), self.real
        return frechet_distance(moments.mean, moments.covariance, real.mean, real.covariance)


class RunAssessor:
    """Assesses the checkpoints of one run."""

    def __init__(self, assessor: Assessor, settings: Settings, tokenizer: Any, params: Any):
        self._of, self._config = assessor, settings.generator
        self._decode = functools.partial(coding.decode_codes, tokenizer, params)
        encode = functools.partial(coding.encode_images, tokenizer, params)
        held_out = assessor.held_out
        self._codes = encode(held_out.images)
        self._real_agreement = agreement(
            assessor.judge, self._decode(self._codes[:2000]), held_out.labels[:2000]
        )
        # Spread evenly over the training images, as many as are held out.
        every = slice(None, None, max(1, len(assessor.train.labels) // len(held_out.labels)))
        self._probe_train = lambda: (
            encode(assessor.train.images[every]),
            assessor.train.labels[every],
        )

    def __call__(self, params: Any, probed: bool) -> dict[str, Any]:
        """The measures of the generator `params`, with probes or without."""
        labels_N, codes_NxL = self._of.held_out.labels, self._codes
        protocol, config = self._of.protocol, self._config
        params = jax.device_put(params)
        measures = {"cross_entropy": cross_entropy(config, params, codes_NxL, labels_N)}
        asked = np.arange(protocol.samples, dtype=np.int32) % config.num_classes
        images = self._decode(self._of.samples(config, params, asked))
        measures["frechet"] = self._of.frechet(images)
        measures["agreement"] = agreement(self._of.judge, images, asked)
        measures["real_agreement"] = self._real_agreement
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
            raise DataError(f"{path}, line {number}: not an assessment ({first_line(error)})") from error
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
