"""Held-out codes under a run's weights: the same numbers while it trains and from its checkpoints.

validation_cross_entropy  nats a token under the EMA, teacher-forced, labels given, no dropout
validation_foresight_...  the loss of each foresight head, unweighted: heads and states are those of the
                          trained weights, without dropout; targets are those of training

A number is computed for each image, by a program that does not depend on how many devices or processes
share the work; the mean over images is float64.
"""

import dataclasses
import functools
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mirai_jax import foresight
from mirai_jax.config.schema import Settings
from mirai_jax.data import manifest
from mirai_jax.data.records import CodeRecords
from mirai_jax.data.small_sets import LabelledImages
from mirai_jax.evaluation.small import spread_evenly
from mirai_jax.models import batched
from mirai_jax.models.adapters import LoraConfig
from mirai_jax.models.generator import hidden_states, read_states
from mirai_jax.models.teacher import precision
from mirai_jax.step import Recipe, foresight_loss, taps, teacher_targets
from mirai_jax.training import components
from mirai_jax.utils import distributed
from mirai_jax.utils.errors import ConfigError, DataError
from mirai_jax.weights import frozen, pretrained

_ROWS = 32  # images at once on each device; fixed, since another number rounds differently

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Images that a run does not train on."""

    codes: np.ndarray  # (N, L)
    labels: np.ndarray  # (N,)
    images: np.ndarray | None = None  # uint8 (N, H, W, C), for teachers that take them

    def some(self, count: int) -> "HeldOut":
        """`count` of them, spread evenly; 0: all."""
        some = spread_evenly(len(self.labels), count or len(self.labels))
        images = None if self.images is None else self.images[some]
        return HeldOut(self.codes[some], self.labels[some], images)


def of_run(
    settings: Settings,
    path: str,
    images: LabelledImages | None,
    tokenizer: Any,
    params: Any,
    class_names: tuple[str, ...],
    records: CodeRecords | None = None,
) -> HeldOut | None:
    """What the loss of a run is measured on; None where there is nothing.

    Args:
        path: shards of held-out codes, or ''.
        images: those that the run holds out.
        tokenizer, params: of the run, or None.
        class_names: as in `of_shards`.
        records: those that the run holds out, where they were read before.
    """
    data = settings.data
    if path or not (data.in_memory or data.online or not data.held_out_share):
        share, records = (0.0, None) if path else (data.held_out_share, records)
        return of_shards(path or data.path, settings, params, class_names, share, records)
    if images is None or tokenizer is None:
        return None
    return HeldOut(
        batched.encode_images(tokenizer, params, images.images), images.labels, images.images
    )


def of_shards(
    path: str,
    settings: Settings,
    params: Any,
    class_names: tuple[str, ...],
    held_out_share: float = 0.0,
    records: CodeRecords | None = None,
) -> HeldOut:
    """The middle crop of each image of a folder of shards, or of a share of them (`CodeRecords.split`).

    Args:
        params: the run's tokenizer; None where it has none, but shards to train on.
        class_names: of the run; numbers where they have no names.
        records: the share, where it was read before.

    Raises:
        DataError: no such shards, other tokens, or other classes.
    """
    generator, name = settings.generator, "data.path" if held_out_share else "validation_path"
    sizes = {name: getattr(generator, name) for name in ("grid", "vocab_size", "num_classes")}
    if records is None:
        try:
            records = CodeRecords(path, **sizes)
        except DataError as error:
            raise DataError(str(error).replace("data.path", name, 1)) from error
        records = records.split(held_out_share)[1] if held_out_share else records
    if records.manifest is not None:
        theirs = records.manifest.tokenizer.get("checksum")
        mine = pretrained.checksum(params) if params is not None else None
        if mine is None and (trained_on := manifest.read(settings.data.path)):
            mine = trained_on.tokenizer.get("checksum")
        # Codes that were made elsewhere may have their tokenizer's name alone.
        if None not in (mine, theirs) and mine != theirs:
            raise DataError(
                f"{name} is {path!r}, codes of another tokenizer (checksum {theirs[:12]}); "
                f"it must be that of the run ({mine[:12]})"
            )
        unnamed = tuple(map(str, range(len(class_names))))
        if class_names not in (unnamed, records.manifest.class_names):
            raise DataError(
                f"{name} is {path!r}; its {len(records.manifest.class_names)} classes must "
                f"be the {len(class_names)} of the run, in their order"
            )
    crop = max(0, records.crops // 2 - 1)

    def one(index: int) -> tuple[np.ndarray, int]:
        record = records[index]
        return record["codes"][crop].copy(), record["label"]

    with futures.ThreadPoolExecutor(16) as pool:
        codes, labels = zip(*pool.map(one, range(len(records))), strict=True)
    return HeldOut(np.stack(codes), np.array(labels, np.int32))


class Validation:
    """What measures the weights of one run on held-out images.

    Args:
        tokenizer_params: of the run, for pretrained generators as teachers; or None.
        log: takes a line for each foresight term that cannot be measured.
        devices: of this process (default: all).
    """

    def __init__(
        self,
        settings: Settings,
        held_out: HeldOut,
        tokenizer_params: Any,
        log: Log,
        devices: list[jax.Device] | None = None,
    ):
        recipe, self._frozen = _recipe(settings, tokenizer_params, held_out.images, log)
        self._rows = {"codes": held_out.codes, "label": held_out.labels}
        if "bidirectional" in self._frozen:
            self._rows["image"] = held_out.images
        self._devices = batched.LocalDevices(devices)
        split = jax.shard_map(
            functools.partial(_values, recipe),
            mesh=self._devices.mesh,
            in_specs=(P(), P("batch")),
            out_specs=P("batch"),
            check_vma=False,
        )
        self._program = jax.jit(split)

    def measure(self, saved: Any, heartbeat: Log = lambda what: None) -> dict[str, float]:
        """The measures above; all processes must call it.

        Args:
            saved: whole generators, as `restore.read_run` gives them.
            heartbeat: takes a line before each part of the work, in all processes alike.
        """
        weights = self._devices.copy((saved["ema"], saved["params"], self._frozen))
        count, size = len(self._rows["label"]), _ROWS * self._devices.count
        found: dict[str, list[np.ndarray]] = {}
        for start, mine in distributed.shares(count, size):
            heartbeat(f"the held-out images from {start} of {count} on")
            some = self._devices.split({name: x[mine] for name, x in self._rows.items()})
            for name, values in self._program(weights, some).items():
                rows = distributed.of_all(np.asarray(values))
                found.setdefault(name, []).append(rows[: count - start])
        means = {k: float(np.concatenate(v).mean(dtype=np.float64)) for k, v in found.items()}
        return {f"validation_{name}": means[name] for name in sorted(means)}


def _recipe(
    settings: Settings, tokenizer_params: Any, images: Any, log: Log
) -> tuple[Recipe, dict[str, Any]]:
    """A step with the terms that can be measured, for whole generators, and its frozen parameters."""
    # Fused kernels of attention depend on the number of devices.
    plain = lambda config: dataclasses.replace(config, attention="xla")
    settings = dataclasses.replace(
        settings, generator=plain(settings.generator), lora=LoraConfig(), freeze=(), accumulate=1
    )
    kept, static, frozen_params, teacher = [], [], {}, None
    for term in settings.terms:
        paths = tuple(pair for pair in settings.term_checkpoints if pair[0] == term.name)
        alone = dataclasses.replace(settings, terms=(term,), term_checkpoints=paths)
        try:
            if term.targets != "own":
                raise ConfigError(f"its targets are {term.targets}")
            if alone.needs_images and images is None:
                raise ConfigError("its teacher takes images, and there are codes alone")
            if alone.needs_images and teacher is None:
                teacher, frozen_params["bidirectional"] = frozen.make_teacher(alone)
            quiet = lambda line: None
            terms, more = components.load_generators(alone, tokenizer_params, frozen_params, quiet)
        except ConfigError as error:
            log(f"no validation of the foresight term {term.name}: {error}")
            continue
        kept += terms
        static += [(name, plain(config)) for name, config in more]
    settings = dataclasses.replace(settings, terms=tuple(kept))
    recipe = components.make_recipe(settings, tuple(kept), tuple(static), teacher, None, 1)
    return recipe, frozen_params


def _values(recipe: Recipe, weights: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """{measure: float32 (B,)} of one device's images."""
    (ema, params, teachers), codes_BxL = weights, batch["codes"].astype(jnp.int32)
    batch, config, labels_B = {**batch, "codes": codes_BxL}, recipe.generator, batch["label"]
    # One pass of the EMA gives the logits and its states as targets, under the teacher's precision.
    shared = [t for t in recipe.terms if t.level == "internal" and t.source == "ema"]
    if precision(recipe.teacher_dtype, jax.default_backend()) != config.dtype:
        shared = []
    layers = sorted({term.teacher_layer for term in shared})
    logits, states = read_states(config, ema, codes_BxL, labels_B, layers)
    found = {"cross_entropy": foresight.token_nll(logits, codes_BxL).mean(axis=-1)}
    if not recipe.terms:
        return found
    active = (True,) * len(recipe.terms)
    targets = {term.name: states[term.teacher_layer] for term in shared}
    others = tuple(term for term in recipe.terms if term not in shared)
    targets |= teacher_targets(recipe, ema, teachers, batch, others)
    states = {  # no block above a tap runs
        tap: hidden_states(config, params["generator"], codes_BxL[:, :-1], labels_B, tap)
        for tap in taps(recipe.terms, active)
    }

    def of_image(states: Any, targets: Any, codes_L: jax.Array) -> dict[str, jax.Array]:
        states, targets, codes_1xL = jax.tree.map(lambda x: x[None], (states, targets, codes_L))
        step = jnp.zeros((), jnp.int32)
        heads = params["foresight"]
        return foresight_loss(heads, recipe, states, targets, codes_1xL, step, active)[1]

    return found | jax.vmap(of_image)(states, targets, codes_BxL)
