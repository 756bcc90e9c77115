"""Where a run begins: its newest checkpoint, weights of another run, or fresh ones."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from clu import parameter_overview
from jax.sharding import Mesh

from mirai_jax import sharding
from mirai_jax.config.schema import RunConfig
from mirai_jax.optimizer import trained
from mirai_jax.step import TrainState, init_state
from mirai_jax.training import transfer
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
    """How many steps the run of this config in the workdir has done. Nothing is written.

    Raises:
        ConfigError: the folder cannot be used, holds another run, or is beyond `num_steps`.
    """
    changed = check_workdir(workdir, config, group)
    log(f"{title} in {workdir}")
    done = max(steps_in(workdir / "checkpoints"), default=0)
    if done < num_steps or not (workdir / "summary.png").exists():  # a finished run stays as it is
        for field, (old, new) in changed.items():
            log(f"continuing with {field} {new!r} (was {old!r})")
    if done > num_steps:
        raise ConfigError(
            f"num_steps is {num_steps}; workdir {workdir} is already at step {done}: it must be "
            f"{done} or more"
        )
    return done


def restore_or_make(
    make: Callable[[], Any],
    placement: Any,
    checkpoints: Checkpoints,
    num_steps: int,
    log: Log,
    warn: Log,
) -> tuple[Any, int]:
    """The newest whole checkpoint, or what `make` (jitted) gives at step 0; all processes must call.

    `placement` has the sharding of each array; `warn` takes a line for each damaged checkpoint.

    Raises:
        ConfigError: a checkpoint of another program.
    """
    found = checkpoints.restore_newest(jax.eval_shape(make), placement, warn)
    if found is None:
        return jax.jit(make, out_shardings=placement)(), 0
    log(f"resumed at step {found[1]:,} of {num_steps:,}")
    return found


def begin(
    made: Components,
    mesh: Mesh,
    checkpoints: Checkpoints,
    log: Log,
    warn: Log,
    initial: transfer.Initial | None = None,
) -> tuple[TrainState, TrainState, int]:
    """The state of a generator's run on its devices; all processes must call.

    The first of these that there is: the newest checkpoint that is whole; the weights of `init_from`
    with a fresh optimizer, at step 0; fresh weights.

    `initial` is what `transfer.read` gave, if it was called already.

    Returns:
        The state, the sharding of each of its arrays, and how many steps it has done.

    Raises:
        ConfigError: a checkpoint or `init_from` of another program or model.
    """
    settings = made.settings

    def make() -> TrainState:
        return init_state(made.recipe, jax.random.key(settings.seed))

    shapes = jax.eval_shape(make)
    placement = sharding.shardings(shapes, mesh)
    count = parameter_overview.count_parameters
    learned = count(trained(shapes.params, made.recipe.frozen))
    log(
        f"parameters: {count(shapes.params['generator']):,} in the generator, "
        f"{count(shapes.params['foresight']):,} in foresight heads"
        + f"; {learned:,} of them are trained"
        * bool(made.recipe.frozen)
    )
    state, step = restore_or_make(make, placement, checkpoints, settings.num_steps, log, warn)
    if settings.init_from and not step:
        initial = transfer.read(made) if initial is None else initial
        state, line = transfer.with_weights(made, state, placement, initial)
        log(line)
    return state, placement, step
