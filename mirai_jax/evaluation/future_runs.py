"""What the states of runs know of the future: the regressions of evaluation/future.py on real images.

A line of future.jsonl has, for the EMA (`ema`) and the trained weights (`trained`), {block: {kind: {measure:
{target: value}}}}. The kinds are

tokens    the vectors of tokens in the run's codebook; read `r2`, the share of variance explained
features  the features of a bidirectional teacher, of the patch at a token, where the teacher can be
          loaded; read `cosine`. `teacher` is its name
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from mirai_jax.config.schema import Settings, TeacherSettings
from mirai_jax.evaluation import future
from mirai_jax.evaluation.small import spread_evenly
from mirai_jax.models import batched, vq
from mirai_jax.training import components, restore
from mirai_jax.utils.errors import ConfigError, DataError
from mirai_jax.weights import frozen

WEIGHTS = {"ema": "EMA", "trained": "trained weights"}
SHOWN = {"tokens": ("r2", "R²"), "features": ("cosine", "cosine")}  # of each kind, and in words
_FEWEST = 10  # training images


@dataclasses.dataclass(frozen=True)
class FutureProtocol:
    """How a checkpoint is probed. Compare only numbers of one protocol.

    Attributes:
        images: how many training images, spread evenly, the regressions are fitted to.
        held_out: how many held-out images, spread evenly, they are measured on.
        teacher: workdir of a run whose bidirectional teacher gives the features; '': each run's own.
    """

    FILE: ClassVar[str] = "future.jsonl"
    images: int = 2000
    held_out: int = 5000
    teacher: str = ""

    def protocols(self, settings: Settings, workdir: str) -> list["FutureProtocol"]:
        """This one. Raises ConfigError for too few images, or a run whose states always know the class."""
        if self.images < _FEWEST:
            raise ConfigError(f"--future is {self.images}; it must be {_FEWEST} or more, or 0")
        if not settings.generator.has_null_class:
            raise ConfigError(
                f"--future is {self.images}; it must be 0 for {workdir}, which has no null class"
            )
        return [self]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def assessor(self, settings: Settings, log: Callable[[str], None]) -> "FutureAssessor":
        return FutureAssessor(settings, self, log)


class FutureAssessor:
    """Probes runs on one data set, as `runs.Assessor` measures them."""

    def __init__(self, settings: Settings, protocol: FutureProtocol, log: Callable[[str], None]):
        held_out = components.held_out_images(settings) if settings.data.in_memory else None
        if held_out is None:
            raise DataError(
                f"data.name is {settings.data.name!r}; --future needs a data set in memory that holds "
                "images out (data.held_out, data.held_out_share)"
            )
        train = components.labelled_images(settings, "train")
        self._images = [
            data.images[spread_evenly(len(data.images), count)]
            for data, count in ((train, protocol.images), (held_out, protocol.held_out))
        ]
        self._protocol, self._log = protocol, log
        self._features: tuple[Any, list[np.ndarray]] = (None, [])  # of the last teacher

    def measure(
        self, settings: Settings, workdir: str, saved: Mapping[str, Any], *_: Any
    ) -> dict[str, Any]:
        """The measures of a run's checkpoint (see above)."""
        tokenizer, params = frozen.load_tokenizer(settings, workdir)
        rows = params.get("codebook")
        if rows is None:  # of a convolutional tokenizer
            rows = np.asarray(vq.unit(params["quantize"]["embedding"]))
        codes = [batched.encode_images(tokenizer, params, images) for images in self._images]
        name, features = self._features_of(settings)
        parts = []
        for i, codes_NxL in enumerate(codes):
            values = {"tokens": rows[codes_NxL]}
            parts.append((codes_NxL, values | ({"features": features[i]} if features else {})))
        generators = {"ema": saved["ema"], "trained": saved["params"]["generator"]}
        found = {
            weights: future.by_block(settings.generator, generator, *parts)
            for weights, generator in generators.items()
        }
        return {"teacher": name, **found}

    @staticmethod
    def summary(measures: Mapping[str, Any]) -> str:
        """Of `measure`, for the screen: the best block, and the baseline."""
        r2 = [block["tokens"]["r2"] for block in measures["ema"].values()]
        shown = [(future.TITLES[t], t) for t in ("r0c1", "r1c0") if t in r2[0]]
        return "  ".join(
            f"{title} R² {max(row[target] for row in r2):.3f} (embedding {r2[0][target]:.3f})"
            for title, target in shown
        )

    def _features_of(self, settings: Settings) -> tuple[str, list[np.ndarray]]:
        """The teacher's name and its features of the images; ('', []) if it cannot be loaded."""
        if self._protocol.teacher:
            other = restore.read_settings("--teacher", self._protocol.teacher)
            settings = dataclasses.replace(settings, teacher=other.teacher)
        key: TeacherSettings = settings.teacher
        if self._features[0] != key:
            self._features = key, self._load_features(settings)
        return (key.name if self._features[1] else ""), self._features[1]

    def _load_features(self, settings: Settings) -> list[np.ndarray]:
        try:
            teacher, params = frozen.make_teacher(settings)
        except ConfigError as error:
            if self._protocol.teacher:
                raise
            self._log(f"no features of a teacher: {error}")  # the tokens do not need it
            return []
        return [batched.teacher_features(teacher, params, images) for images in self._images]


def shown(measures: Mapping[str, Any], weights: str, kind: str) -> tuple[list[str], np.ndarray]:
    """The targets' names, and the measure of SHOWN, (targets, blocks from 0)."""
    rows = [block[kind][SHOWN[kind][0]] for block in measures[weights].values()]
    return list(rows[0]), np.array([list(row.values()) for row in rows]).T


def kinds(*several: Mapping[str, Any]) -> list[str]:
    """Those that all of these measures have."""
    return [kind for kind in SHOWN if all(kind in measures["ema"]["0"] for measures in several)]


def table(name: str, measures: Mapping[str, Any], weights: str = "ema") -> str:
    """What a run's weights know: a line a target, a column a block."""
    lines = [f"{name}, step {measures['step']}, {WEIGHTS[weights]}"]
    for kind in kinds(measures):
        names, values = shown(measures, weights, kind)
        lines.append(
            f"{kind + ', ' + SHOWN[kind][1]:22}" + _cells("block 0", *range(1, len(values.T)))
        )
        for target, row in zip(names, values, strict=True):
            lines.append(f"{future.TITLES[target]:22}" + _cells(*(f"{v:.3f}" for v in row)))
    return "\n".join(lines) + "\n"


def _cells(*values: Any) -> str:
    return "".join(f"{value:>9}" for value in values)
