"""Measurements of a run while it trains: what `training.train` is given to call.

They are those of evaluation/validation.py and evaluation/drawn.py, of whole weights in every process, so
that the same programs measure a checkpoint afterwards and give the same digits.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mirai_jax.evaluation import drawn, samples, validation
from mirai_jax.evaluation.image_streams import of_array
from mirai_jax.evaluation.network import Features, Network
from mirai_jax.training import components, restore
from mirai_jax.training.components import Components
from mirai_jax.utils import distributed

Log = Callable[[str], None]


class Measurer:
    """Measures the weights of a run; all processes must make it and call it alike.

    Attributes:
        every: {'validation' or 'evaluation': steps between two}, of what this run measures.

    Raises:
        DataError, ConfigError: what the config names is not there, or does not fit the run.
    """

    def __init__(self, made: Components, mesh: Mesh, log: Log):
        settings = self._settings = made.settings
        self._made, self.every = made, {}
        mine = jax.process_index()
        self._devices = [d for d in mesh.devices.flat if d.process_index == mine]
        wanted = (settings.validate_every and not settings.validation_path) or (
            settings.evaluate_every and not settings.evaluate_reference
        )
        held_out = components.held_out_images(settings) if wanted else None
        if settings.validate_every:
            self._validation = self._validate_on(held_out, log)
        if settings.evaluate_every:
            self._compare_with(held_out, log)

    def _validate_on(self, held_out: Any, log: Log) -> validation.Validation | None:
        settings, made = self._settings, self._made
        parts = made.tokenizer, made.tokenizer_params, made.class_names
        path = settings.validation_path
        images = validation.of_run(settings, path, held_out, *parts, made.held_out)
        if images is None:
            log("no validation: validation_path is unset, and no images are held out")
            return None
        self.every["validation"] = settings.validate_every
        log(f"validation: {len(images.labels):,} images every {settings.validate_every:,} steps")
        return validation.Validation(settings, images, made.tokenizer_params, log, self._devices)

    def _compare_with(self, held_out: Any, log: Log) -> None:
        settings, made = self._settings, self._made
        spec, stream = settings.evaluate_reference, None
        if made.tokenizer is None or not (spec or held_out):
            what = "tokenizer.path" if made.tokenizer is None else "evaluate_reference"
            log(f"no evaluation: {what} is unset")
            return
        if not spec:
            spec, stream = "held-out images", of_array("held-out images", held_out.images)
        protocol = drawn.protocol_of(settings)
        self._reference = samples.Reference(spec, bool(protocol.inception), stream)
        self._reference.check("this run", settings.tokenizer.sides)
        self._network = Network(protocol.inception, drawn.ROWS, devices=self._devices)
        self._real: Features | None = None
        parts = made.tokenizer, made.tokenizer_params, self._network, self._devices
        self._drawn = drawn.Drawn(settings, protocol, *parts)
        self.every["evaluation"] = settings.evaluate_every
        log(f"evaluation: {protocol.samples:,} samples every {settings.evaluate_every:,} steps")

    def measure(self, kind: str, state: Any, heartbeat: Log) -> dict[str, float]:
        """Measures on the first process; the others get no samples' metrics.

        Args:
            kind: of `every`.
            state: a TrainState, however sharded.
            heartbeat: takes a line before each part of the work, in all processes alike.
        """
        heartbeat(f"the weights for the {kind}")
        host = jax.tree.map(distributed.whole, (state.params, state.ema))
        saved = restore.whole_generators(self._settings, *host)
        if kind == "validation":
            return self._validation.measure(saved, heartbeat)
        fake = self._drawn.features(saved["ema"], heartbeat)

        def beat(what: str, more: bool = True) -> bool:
            """The others follow process 0 here, as often as it calls: `heartbeat` is for all alike."""
            if more := bool(distributed.from_first(np.asarray(more))):
                heartbeat(what)
            return more

        if fake is None:
            while beat("what process 0 measures of the samples"):
                pass
            return {}
        if self._real is None:
            self._real = self._reference.features(self._network, beat)
        found = samples.compare(self._network.is_inception, fake, self._real, beat)
        beat("", more=False)
        return found
