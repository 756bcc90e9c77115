"""How good the weights of a run's checkpoints are, as `mirai_jax.evaluate --workdir` measures it.

validation_...   of held-out images: evaluation/validation.py
fid, frechet_efficientnet_lite0, sfid, precision and the like
                 of samples against real images: evaluation/drawn.py, by the names of results.json
class_accuracy   share of the samples that a classifier of real images assigns to the class asked for
frechet          distance of the samples over EfficientNet-Lite0 to the tokenizer's reconstructions of the
                 held-out images, which leaves out the tokenizer's error
frechet_classifier
                 the same over the decision values of that classifier, which teaches nobody
real_...         frechet, frechet_classifier, frechet_images (to the held-out images as they are) and
                 class_accuracy of real images through the tokenizer: the limit of any generator of its tokens
probe, teacher_probe
                 accuracies of linear probes, where asked for, of the last step: SmallSet.probes

The last five need images in memory. A run measures the first two while it trains, to the same digits.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from mirai_jax.config.schema import Settings
from mirai_jax.evaluation import drawn, samples, validation
from mirai_jax.evaluation.drawn import SWEPT, Drawn, Protocol
from mirai_jax.evaluation.image_streams import of_array
from mirai_jax.evaluation.metrics import distance
from mirai_jax.evaluation.network import Features, Network
from mirai_jax.evaluation.small import SmallSet
from mirai_jax.training import components, restore
from mirai_jax.utils.errors import ConfigError, DataError
from mirai_jax.weights import frozen, pretrained


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of each run; '', 0 and () stand for what its config says."""

    FILE: ClassVar[str] = "assessment.jsonl"
    samples: int = 0
    guidance: tuple[float, ...] = ()
    temperature: tuple[float, ...] = ()
    top_k: tuple[int, ...] = ()
    seed: int = 0
    pixels: int = 224
    held_out: int = 0
    validation: str = ""
    reference: str = ""
    inception: str = ""
    probes: bool = False

    def protocols(self, settings: Settings, workdir: str) -> list[Protocol]:
        """One for each guidance scale, temperature and top-k.

        Raises:
            ConfigError: a scale that the run cannot have.
        """
        own = drawn.protocol_of(settings)
        names = "samples", "reference", "inception", "validation"
        given = {name: getattr(self, name) or getattr(own, name) for name in names}
        given |= {name: getattr(self, name) for name in ("seed", "pixels", "held_out")}
        found = []
        swept = [getattr(self, n) or (getattr(own.options, n),) for n in SWEPT]
        for values in itertools.product(*swept):
            options = dataclasses.replace(own.options, **dict(zip(SWEPT, values, strict=True)))
            if (guidance := options.guidance) > 1 and not settings.generator.has_null_class:
                raise ConfigError(
                    f"--guidance is {guidance}; it must be 1 for {workdir}, which has no null class"
                )
            found.append(dataclasses.replace(own, options=options, **given))
        return found

    def assessor(self, settings: Settings, log: Callable[[str], None]) -> "Assessor":
        return Assessor(settings, log)


def tokenizer_of(settings: Settings, workdir: str, log: Callable[[str], None]) -> tuple[Any, Any]:
    """A run's tokenizer and its parameters; None, None where it has none that is there."""
    if settings.tokenizer.name != "patch" and not settings.tokenizer.path:
        return None, None
    try:
        return frozen.load_tokenizer(settings, workdir)
    except ConfigError as error:
        log(f"{workdir}: {error}")
        return None, None


class Assessor:
    """Measures runs on one data set; computes once whatever does not depend on the run."""

    def __init__(self, settings: Settings, log: Callable[[str], None]):
        self._log = log
        self._held_out = components.held_out_images(settings)
        self._small: SmallSet | None = None
        if settings.data.in_memory and self._held_out:
            train = components.labelled_images(settings, "train")
            self._small = SmallSet(train, self._held_out, log)
        self._networks: dict[tuple, Network] = {}
        self._real: dict[tuple, Features] = {}
        self._limits: dict[tuple, Any] = {}
        # The last: weights, settings of the validation, values; and workdir, tokenizer, programs.
        self._validated: tuple[Any, ...] = (None, None, {})
        self._run: tuple[str, Any, Any, dict] = ("", None, None, {})

    def measure(
        self,
        settings: Settings,
        workdir: str,
        saved: Mapping[str, Any],
        protocol: Protocol,
        parts: tuple[str, ...] = ("validation", "samples"),
    ) -> dict[str, Any]:
        """The measures of a checkpoint: of 'validation', 'samples' and 'probes', those in `parts`.

        What cannot be had is left out, with a line to the log.
        """
        if self._run[0] != workdir:
            self._run = (workdir, *tokenizer_of(settings, workdir, self._log), {})
        made: dict[str, Callable] = {
            "validation": self._validate,
            "samples": self._compare,
            "probes": self._probe,
        }
        measures: dict[str, Any] = {}
        for part in parts:
            try:
                measures |= made[part](settings, saved, protocol)
            except (ConfigError, DataError) as error:
                self._log(f"{workdir}: no {part}: {error}")
        return measures

    @staticmethod
    def summary(measures: Mapping[str, Any]) -> str:
        """Of `measure`, for the screen."""
        shown = {
            "validation_cross_entropy": "validation {:.4f}",
            "fid": "FID {:.2f}",
            "frechet_efficientnet_lite0": "Fréchet {:.2f}",
            "class_accuracy": "class accuracy {:.1%}",
        }
        return "  ".join(text.format(measures[k]) for k, text in shown.items() if k in measures)

    def _validate(self, settings: Settings, saved: Any, protocol: Protocol) -> dict[str, float]:
        workdir, tokenizer, params, kept = self._run
        key = protocol.validation, protocol.held_out
        if self._validated[0] is saved and self._validated[1] == key:
            return self._validated[2]
        if key not in kept:
            parts = tokenizer, params, restore.class_names(workdir)
            images = validation.of_run(settings, protocol.validation, self._held_out, *parts)
            if images is None:
                raise ConfigError(
                    "--validation is ''; it must be a folder of shards for a run that holds no images "
                    "out (data.held_out, data.held_out_share)"
                )
            images = images.some(protocol.held_out)
            kept[key] = validation.Validation(settings, images, params, self._log)
        self._validated = saved, key, kept[key].measure(saved)
        return self._validated[2]

    def _compare(self, settings: Settings, saved: Any, protocol: Protocol) -> dict[str, float]:
        _, tokenizer, params, kept = self._run
        small, asked = self._small, protocol
        if tokenizer is None:
            raise ConfigError(
                "tokenizer.path must be the weights of its tokenizer, which decode samples"
            )
        if not asked.reference and not self._held_out:
            raise ConfigError(
                "--reference is ''; it must be real images or statistics for this run"
            )
        network_key = asked.inception, asked.pixels
        if network_key not in self._networks:
            self._networks[network_key] = Network(asked.inception, drawn.ROWS, asked.pixels)
        network = self._networks[network_key]
        key = asked.reference, *network_key
        if key not in self._real:
            stream = None
            if not asked.reference:
                stream = of_array("held-out images", self._held_out.images)
            reference = samples.Reference(asked.reference, network.is_inception, stream)
            reference.check("this run", settings.tokenizer.sides)
            self._real[key] = reference.features(network)
            if warning := self._real[key].moments.warning():
                self._log(f"warning: reference: {warning}")
        if asked not in kept:
            kept[asked] = Drawn(settings, asked, tokenizer, params, network)
        judged = small.judge() if small else lambda *_: None
        fake = kept[asked].features(saved["ema"], see=judged)
        measures = samples.compare(network.is_inception, fake, self._real[key])
        if small:
            measures["class_accuracy"] = judged.hits / asked.samples
        if small and not network.is_inception:
            key = pretrained.checksum(params), asked.samples, asked.pixels
            if key not in self._limits:
                moments = lambda images: network.features(of_array("images", images)).moments
                self._limits[key] = small.limits(tokenizer, params, asked.samples, moments)
            reconstructed, by_classifier, limits = self._limits[key]
            measures["frechet"] = distance(fake.moments, reconstructed)
            measures["frechet_classifier"] = distance(judged.moments, by_classifier)
            measures |= limits
        return measures

    def _probe(self, settings: Settings, saved: Any, protocol: Protocol) -> dict[str, Any]:
        _, tokenizer, params, _ = self._run
        if self._small is None:
            raise ConfigError("probes need a data set in memory that holds images out")
        return self._small.probes(settings, tokenizer, params, saved["ema"], protocol.held_out)
