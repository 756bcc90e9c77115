"""Where on the token grid held-out cross-entropy falls: `python -m mirai_jax.evaluate --positions`.

A line of positions.jsonl has, for the EMA (`ema`) and the trained weights (`trained`), the mean over held-out
images in nats at each grid position, row by row: teacher-forced, labels given, no dropout. The mean over
positions is the run's validation cross-entropy, to float32.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from mirai_jax import foresight
from mirai_jax.config.schema import Settings
from mirai_jax.models import batched
from mirai_jax.models.generator import Generator, GeneratorConfig
from mirai_jax.training import components
from mirai_jax.utils.errors import DataError
from mirai_jax.weights import frozen

_CHUNK = 100  # images at once; fixed, since another number rounds differently


@dataclasses.dataclass(frozen=True)
class PositionsProtocol:
    """`held_out`: how many held-out images, from the first on; 0: all."""

    FILE: ClassVar[str] = "positions.jsonl"
    held_out: int = 0

    def protocols(self, settings: Settings, workdir: str) -> list["PositionsProtocol"]:
        return [self]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def assessor(self, settings: Settings, log: Callable[[str], None]) -> "PositionsAssessor":
        return PositionsAssessor(settings, self.held_out)


class PositionsAssessor:
    """Measures runs on one data set, as `runs.Assessor` does."""

    def __init__(self, settings: Settings, count: int):
        held_out = components.held_out_images(settings)
        if held_out is None:
            raise DataError(
                "--positions needs a run that holds images out in memory or online (data.held_out, "
                "data.held_out_share); this one has none, or stored codes"
            )
        self._images = held_out.images[: count or None]
        self._labels = held_out.labels[: count or None]

    def measure(
        self, settings: Settings, workdir: str, saved: Mapping[str, Any], *_: Any
    ) -> dict[str, Any]:
        """{weights: nats (rows, columns), as lists} of a run's checkpoint."""
        codes_NxL = batched.encode_images(*frozen.load_tokenizer(settings, workdir), self._images)
        generators = {"ema": saved["ema"], "trained": saved["params"]["generator"]}
        config = dataclasses.replace(settings.generator, attention="xla")
        return {
            weights: by_position(config, params, codes_NxL, self._labels).tolist()
            for weights, params in generators.items()
        }

    @staticmethod
    def summary(measures: Mapping[str, Any]) -> str:
        """Of `measure`, for the screen."""
        ema, trained = (np.mean(measures[weights]) for weights in ("ema", "trained"))
        return f"cross-entropy {ema:.4f} (trained weights {trained:.4f})"


def by_position(
    config: GeneratorConfig, params: Any, codes_NxL: np.ndarray, labels_N: np.ndarray
) -> np.ndarray:
    """Mean cross-entropy in nats at each grid position, float64 (rows, columns)."""
    total_L, count = np.zeros(config.length), len(codes_NxL)
    for start in range(0, count, _CHUNK):
        some = codes_NxL[start : start + _CHUNK], labels_N[start : start + _CHUNK]
        filled = (np.resize(x, (_CHUNK, *x.shape[1:])) for x in some)  # one program for all
        nats_BxL = np.asarray(_nats(config, params, *filled))[: len(some[0])]
        total_L += nats_BxL.sum(axis=0, dtype=np.float64)
    return (total_L / count).reshape(config.grid)


@functools.partial(jax.jit, static_argnums=0)
def _nats(
    config: GeneratorConfig, params: Any, codes_BxL: jax.Array, labels_B: jax.Array
) -> jax.Array:
    codes_BxL = codes_BxL.astype(np.int32)
    logits, _ = Generator(config).apply({"params": params}, codes_BxL[:, :-1], labels_B)
    return foresight.token_nll(logits, codes_BxL)
