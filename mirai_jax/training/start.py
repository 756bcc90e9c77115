"""Where a run begins: its newest checkpoint, weights of another run, or fresh ones."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh

from mirai_jax import sharding
from mirai_jax.config.schema import RunConfig
from mirai_jax.step import TrainState, init_state
from mirai_jax.training import restore
from mirai_jax.training.checkpoint import Checkpoints, steps_in
from mirai_jax.training.components import Components
from mirai_jax.training.workdir import check_workdir
from mirai_jax.utils.errors import ConfigError

Log = Callable[[str], None]


def steps_done(
    title: str,
    num_steps: int,
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    log: Log,
    group: type = RunConfig,
) -> int:
    """How far the run of this config in the workdir is; tells what it is. Nothing is written.

    Raises:
        ConfigError: the folder cannot be used, holds another run, or is beyond `num_steps`.
    """
    changed = check_workdir(workdir, config, group)
    log(f"{title} in {workdir}")
    for field, (old, new) in changed.items():
        log(f"continuing with {field} {new!r} (was {old!r})")
    done = max(steps_in(workdir / "checkpoints"), default=0)
    if done > num_steps:
        raise ConfigError(
            f"num_steps is {num_steps}; workdir {workdir} is already at step {done}: it must be "
            f"{done} or more"
        )
    return done


def begin(
    components: Components,
    mesh: Mesh,
    checkpoints: Checkpoints,
    log: Log,
    warn: Log,
    initial: Any = None,
) -> tuple[TrainState, TrainState, int]:
    """The state of a run on its devices; all processes must ask.

    Args:
        log: takes lines for the screen.
        warn: takes a line for each damaged checkpoint.
        initial: what `read_initial` gave, if it was asked already.

    Returns:
        The state, the sharding of each of its arrays, and how many steps it has done.

    Raises:
        ConfigError: a checkpoint or `init_from` that is of another program or model.
    """
    # The first of these that there is:
    #   1. the newest checkpoint of the workdir;
    #   2. the one before it, and so on, where that one is damaged (which is set aside);
    #   3. the weights of `init_from`, with a fresh optimizer, at step 0;
    #   4. fresh weights.
    settings = components.settings
    make = lambda: init_state(components.recipe, jax.random.key(settings.seed))  # noqa: E731
    shapes = jax.eval_shape(make)
    placement = sharding.shardings(shapes, mesh)
    count = parameter_overview.count_parameters
    log(
        f"parameters: {count(shapes.params['generator']):,} in the generator, "
        f"{count(shapes.params['foresight']):,} in foresight heads"
    )
    found = checkpoints.restore_newest(shapes, placement, warn)
    if found is not None:
        state, step = found
        log(f"resumed at step {step:,} of {settings.num_steps:,}")
        return state, placement, step
    state: TrainState = jax.jit(make, out_shardings=placement)()
    if settings.init_from:
        initial = read_initial(components) if initial is None else initial
        state = _with_weights(state, placement, initial, settings.init_from, log)
    return state, placement, 0


def read_initial(components: Components) -> dict[str, Any]:
    """What `init_from` holds; see `restore.load_initial`."""
    codebook = components.tokenizer_params if components.settings.data.in_memory else None
    return restore.load_initial(components.settings, codebook)


def _with_weights(
    state: TrainState, placement: TrainState, saved: dict[str, Any], path: str, log: Log
) -> TrainState:
    """The state with other parameters and EMA; heads that `saved` has no equal of stay fresh."""

    def same_shapes(one: Any, other: Any) -> bool:
        return jax.tree.map(np.shape, one) == jax.tree.map(np.shape, other)

    heads, kept = state.params["foresight"], saved["params"]["foresight"]
    taken = {
        name: sharding.place(kept[name], placement.params["foresight"][name])
        for name, fresh in heads.items()
        if name in kept and same_shapes(kept[name], fresh)
    }
    generator = sharding.place(saved["params"]["generator"], placement.params["generator"])
    fresh = [name for name in heads if name not in taken]
    message = f", with fresh foresight heads {', '.join(fresh)}" if fresh else ""
    log(f"began with the weights of {path}{message}")
    return state.replace(
        params={"generator": generator, "foresight": {**heads, **taken}},
        ema=sharding.place(saved["ema"], placement.ema),
    )
