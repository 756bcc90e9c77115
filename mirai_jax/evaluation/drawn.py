"""Samples of a run's weights beside real images: the same numbers while it trains and from its checkpoints.

The samples are those of `mirai_jax.sample` with the same options, and the metrics those of
`mirai_jax.evaluate`. Images are drawn a few at a time over the devices of all processes, and only their
features are kept. Neither the number of devices nor that of processes changes an image.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mirai_jax.config.schema import Settings
from mirai_jax.evaluation.network import Collected, Features, Network
from mirai_jax.sampling import job
from mirai_jax.sampling.painter import Painter, Source
from mirai_jax.sampling.sampler import SampleOptions
from mirai_jax.utils import distributed

ROWS = 64  # images at once on each device: the default of `sample` and `evaluate`
# Options that one evaluation may take several values of, and how figures name them.
SWEPT = {"guidance": "guidance scale", "temperature": "temperature", "top_k": "top-k (0: all)"}
LABELS = "random"  # as `mirai_jax.sample` draws them by default


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How the weights of a run are measured. Compare only numbers of one protocol.

    Attributes:
        samples: how many are drawn, of random classes.
        options: of the sampler.
        seed: of labels and tokens; independent of the run's seed.
        reference: real images or statistics; '': the images in memory that the run holds out.
        inception: the file of Inception's weights; '': EfficientNet-Lite0.
        pixels: side of EfficientNet-Lite0's input.
        validation: shards of held-out codes; '': the images that the run holds out.
        held_out: how many held-out images, spread evenly, for the loss and probes; 0: all.
    """

    samples: int
    options: SampleOptions
    seed: int = 0
    reference: str = ""
    inception: str = ""
    pixels: int = 224
    validation: str = ""
    held_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As a line of assessment.jsonl holds it."""
        made = dataclasses.asdict(self)
        made |= made.pop("options")
        if made["cache_dtype"] == "model":
            del made["cache_dtype"]  # lines of before it existed have none
        made |= held_out_order(self.held_out)
        return {**made, "weights": "ema", "labels": LABELS, "batch_size": ROWS}


def held_out_order(count: int) -> dict[str, str]:
    """Of a protocol with `count` held-out images: lines without it have the first ones, of a few classes."""
    return {"held_out_order": "spread"} if count else {}


def protocol_of(settings: Settings) -> Protocol:
    """How the run measures itself while it trains."""
    guidance = settings.evaluate_guidance or settings.sample.guidance
    return Protocol(
        settings.evaluate_samples,
        dataclasses.replace(settings.sample, guidance=guidance),
        reference=settings.evaluate_reference,
        inception=settings.evaluate_inception,
        validation=settings.validation_path,
    )


class Drawn:
    """What draws samples of one generator and gives their features.

    Args:
        tokenizer, params: what decodes them.
        devices: of this process (default: all).
    """

    def __init__(
        self,
        settings: Settings,
        protocol: Protocol,
        tokenizer: Any,
        params: Any,
        network: Network,
        devices: list[jax.Device] | None = None,
    ):
        source = Source(settings.generator, None, tokenizer, params, {})
        self._painter = Painter(source, protocol.options, protocol.seed, ROWS, devices=devices)
        self._network = network
        classes = settings.generator.num_classes
        self._labels = job.make_labels(LABELS, protocol.samples, classes, protocol.seed)

    def features(
        self,
        params: Any,
        heartbeat: Callable[[str], None] = lambda what: None,
        see: Callable[[np.ndarray, np.ndarray], None] = lambda images, labels: None,
    ) -> Features | None:
        """Features of the samples; all processes must call it, the first one gets them.

        Args:
            params: of the generator, whole.
            heartbeat: takes a line before each part of the work, in all processes alike.
            see: takes images and labels, part by part, where this is the only process.
        """
        count, size = len(self._labels), self._painter.batch
        rounds = list(distributed.shares(count, size))
        self._painter.load(params)
        drawn = self._painter.stream([(self._labels[mine], mine) for _, mine in rounds])
        collected = Collected()
        for start, _ in rounds:
            heartbeat(f"samples from {start} of {count} on")
            images = next(drawn)
            see(images[: count - start], self._labels[start : start + size])
            outputs = [distributed.of_all(x)[: count - start] for x in self._network(images)]
            if distributed.is_first():
                collected.add(outputs)
        self._painter.load(None)
        return collected.features() if distributed.is_first() else None
