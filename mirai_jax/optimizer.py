"""The optimizer: AdamW with a decay mask, a global clip and a learning-rate schedule.

It is given the trained parameters alone: what is frozen has neither gradient nor state, and no decay.
"""

import dataclasses
import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

SCHEDULES = ("constant", "cosine")
DECAYED = ("matrices", "all")

# Parameters of one dimension in the official model. The mask goes by name and not by the number of
# dimensions, since stacked layers and heads add an axis.
_NOT_DECAYED = ("scale", "bias", "gamma")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW of the official recipe.

    `clip_norm` is the largest global gradient norm (0: no clipping). The learning rate rises linearly
    from 0 for `warmup_steps`; `cosine` then falls to zero at `num_steps`. `decayed` says what weight
    decay applies to: matrices and embeddings (official), or all parameters (as GEAR, whose optimizer
    has one group).
    """

    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup_steps: int = 0
    num_steps: int = 0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.05
    decayed: str = "matrices"
    clip_norm: float = 1.0


def trained(params: Any, frozen: tuple[str, ...]) -> Any:
    """The part of a tree whose names ('generator/norm/scale') match none of the patterns (fnmatch)."""
    if not frozen:
        return params
    flat = traverse_util.flatten_dict(params, keep_empty_nodes=True, sep="/")
    is_frozen = lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in frozen)
    kept = {name: leaf for name, leaf in flat.items() if not is_frozen(name)}
    return traverse_util.unflatten_dict(kept, sep="/")


def overlay(params: Any, part: Any) -> Any:
    """The tree, with those leaves replaced that a part of it (see `trained`) has."""
    if not isinstance(params, dict):
        return part
    return {
        name: overlay(below, part[name]) if name in part else below
        for name, below in params.items()
    }


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay applies to: matrices and embeddings."""
    decayed = lambda path, _: path[-1].key not in _NOT_DECAYED
    return jax.tree_util.tree_map_with_path(decayed, params)


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """The learning rate by step."""
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0 if config.warmup_steps else config.learning_rate,
            config.learning_rate,
            config.warmup_steps,
            config.num_steps,
        )
    if config.warmup_steps:
        return optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.constant_schedule(config.learning_rate)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, then AdamW with decoupled weight decay."""
    adamw = optax.adamw(
        learning_rate(config), b1=config.b1, b2=config.b2, eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask if config.decayed == "matrices" else None,
    )  # fmt: skip
    if not config.clip_norm:
        return adamw
    return optax.chain(_clip(config.clip_norm), adamw)


def _clip(largest: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm, but multiplies all gradients by one factor.

    optax divides each element, and XLA on CPU then stores another copy of the gradient.
    """

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm = optax.tree.norm(gradients)
        factor = jnp.where(norm < largest, 1.0, largest / norm)
        return jax.tree.map(lambda g: g * factor, gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
