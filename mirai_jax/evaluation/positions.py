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
from mirai_jax.evaluation import validation
from mirai_jax.evaluation.drawn import held_out_order
from mirai_jax.evaluation.runs import tokenizer_of
from mirai_jax.models.generator import GeneratorConfig, read_states
from mirai_jax.training import components, restore
from mirai_jax.utils.errors import DataError

_CHUNK = 100  # images at once; fixed, since another number rounds differently


@dataclasses.dataclass(frozen=True)
class PositionsProtocol:
    """How a checkpoint is measured. Compare only numbers of one protocol.

    Attributes:
        held_out: how many held-out images, spread evenly; 0: all.
        validation: shards of held-out codes; '': what the run's config says.
    """

    FILE: ClassVar[str] = "positions.jsonl"
    held_out: int = 0
    validation: str = ""

    def protocols(self, settings: Settings, workdir: str) -> list["PositionsProtocol"]:
        return [dataclasses.replace(self, validation=self.validation or settings.validation_path)]

    def to_dict(self) -> dict[str, Any]:
        """As a line of positions.jsonl holds it."""
        made = dataclasses.asdict(self) | held_out_order(self.held_out)
        if not self.validation:
            del made["validation"]
        return made

    def assessor(self, settings: Settings, log: Callable[[str], None]) -> "PositionsAssessor":
        return PositionsAssessor(settings, log)


class PositionsAssessor:
    """Measures runs on one data set, as `runs.Assessor` does."""

    def __init__(self, settings: Settings, log: Callable[[str], None]):
        self._images, self._log = components.held_out_images(settings), log
        self._codes: tuple[Any, Any] = (None, None)  # of the last run and protocol

    def measure(
        self,
        settings: Settings,
        workdir: str,
        saved: Mapping[str, Any],
        protocol: PositionsProtocol,
        *_: Any,
    ) -> dict[str, Any]:
        """{weights: nats (rows, columns), as lists} of a run's checkpoint.

        Raises:
            DataError: the run holds nothing out.
        """
        if self._codes[0] != (workdir, protocol):
            parts = *tokenizer_of(settings, workdir, self._log), restore.class_names(workdir)
            found = validation.of_run(settings, protocol.validation, self._images, *parts)
            if found is None:
                raise DataError(
                    f"--positions needs what {workdir} does not hold: held-out images or codes "
                    "(data.held_out, data.held_out_share), or --validation=SHARDS"
                )
            self._codes = (workdir, protocol), found.some(protocol.held_out)
        codes_NxL, labels_N = self._codes[1].codes, self._codes[1].labels
        generators = {"ema": saved["ema"], "trained": saved["params"]["generator"]}
        config = dataclasses.replace(settings.generator, attention="xla")
        return {
            weights: by_position(config, params, codes_NxL, labels_N).tolist()
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
    logits, _ = read_states(config, params, codes_BxL, labels_B)
    return foresight.token_nll(logits, codes_BxL)
