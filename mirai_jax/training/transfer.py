"""`init_from`: the weights of another generator, of other classes or on another grid.

All tensors are taken but the class table, of which rows are taken. Positions are rotary, so a generator
has no parameters that belong to a grid. The codes must mean the same, and depth and width must be equal.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from mirai_jax import sharding
from mirai_jax.config.schema import Settings
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.step import TrainState
from mirai_jax.training import restore
from mirai_jax.training.components import Components
from mirai_jax.utils import paths
from mirai_jax.utils.errors import ConfigError

_TABLE = "cls_embedding/embedding"


@dataclasses.dataclass(frozen=True)
class Initial:
    """What a run begins with.

    Attributes:
        config: shapes of the other generator.
        saved: {'params': {'generator', 'foresight'}, 'ema'} as host arrays.
        rows: {row of this run's class table: row of the other one}, the null class included.
    """

    config: GeneratorConfig
    saved: dict[str, Any]
    rows: dict[int, int]


def codebook_path(settings: Settings, workdir: pathlib.Path) -> pathlib.Path:
    """Where a run finds its patch codebook: in its workdir, else in that of `init_from`.

    What the codes of a generator mean depends on its tokenizer.

    Raises:
        ConfigError: that of `init_from` is for other codes.
    """
    own = workdir / "tokenizer.npz"
    other = paths.at(settings.init_from) / "tokenizer.npz"
    taken = settings.init_from and settings.tokenizer.name == "patch" and other.exists()
    if own.exists() or not taken:
        return own
    theirs = restore.read_settings("init_from", settings.init_from)
    mine, wanted = (
        {"tokenizer.patch": s.tokenizer.patch, "model.vocab_size": s.generator.vocab_size}
        for s in (settings, theirs)
    )
    for name, value in wanted.items():
        restore.require_same("init_from", settings.init_from, name, mine[name], value)
    return other


def read(made: Components) -> Initial:
    """What `init_from` holds.

    Raises:
        ConfigError: nothing of the kind, other tokens, a generator of another shape, or wrong `init_rows`.
    """
    settings = made.settings
    config, saved = restore.load_initial(settings, made.tokenizer_params)
    theirs = restore.class_names(settings.init_from)
    return Initial(config, saved, _rows(made, config, theirs))


def _rows(made: Components, other: GeneratorConfig, theirs: tuple[str, ...]) -> dict[int, int]:
    """The rows of classes with equal names, those of `init_rows`, and the null class.

    Where there are equally many classes and one side has only numbers as names, row i is row i.
    """
    settings, mine = made.settings, made.class_names
    ours, count = settings.generator, other.num_classes
    numbers = tuple(map(str, range(count)))
    if len(mine) == count and (mine == numbers or theirs in ((), numbers)):
        rows = {i: i for i in range(count)}
    else:
        rows = {mine.index(name): theirs.index(name) for name in mine if name in theirs}

    def number(entry: Any, names: tuple[str, ...], size: int, side: str) -> int:
        found = names.index(entry) if entry in names else entry
        if not isinstance(found, int) or not 0 <= found < size:
            known = f" or one of {', '.join(names[:20])}" if names else ""
            raise ConfigError(
                f"init_rows names the {side} class {entry!r}; it must be 0 to {size - 1}{known}"
            )
        return found

    for new, old in settings.init_rows:
        key = number(new, mine, ours.num_classes, "new")
        rows[key] = number(old, theirs, count, "old")
    if ours.has_null_class and other.has_null_class:
        rows[ours.null_class] = other.null_class
    return rows


def with_weights(
    made: Components, state: TrainState, placement: TrainState, initial: Initial
) -> tuple[TrainState, str]:
    """The fresh state with the weights of `initial`, and a line about what is new.

    A frozen tensor has one copy, in training and in the average: where there is any, training begins
    with the average, too. Foresight heads are taken where their shapes are equal.
    """
    recipe, saved = made.recipe, initial.saved

    def generator(fresh: Any, kept: Any, where: Any) -> Any:
        fresh, kept, where = (
            traverse_util.flatten_dict(tree, sep="/") for tree in (fresh, kept, where)
        )
        old = kept.pop(_TABLE)
        taken = {
            name: sharding.place(kept[name], where[name]) if name in kept else leaf
            for name, leaf in fresh.items()
        }
        if _TABLE in fresh:
            numbers, rows = list(initial.rows), old[list(initial.rows.values())]
            replace = jax.jit(
                lambda table, rows: table.at[np.array(numbers, int)].set(rows),
                out_shardings=where[_TABLE],
            )
            rows = sharding.place(rows, sharding.replicated(where[_TABLE].mesh))
            taken[_TABLE] = replace(fresh[_TABLE], rows)
        return traverse_util.unflatten_dict(taken, sep="/")

    heads, kept = state.params["foresight"], saved["params"]["foresight"]
    same = {n for n in heads.keys() & kept.keys() if _shapes(heads[n]) == _shapes(kept[n])}
    taken = {n: sharding.place(kept[n], placement.params["foresight"][n]) for n in same}
    params = saved["ema"] if recipe.frozen else saved["params"]["generator"]
    where = placement.params["generator"]
    state = state.replace(
        params={
            "generator": generator(state.params["generator"], params, where),
            "foresight": {**heads, **taken},
        },
        ema=generator(state.ema, saved["ema"], placement.ema),
    )
    return state, _described(made, initial, [name for name in heads if name not in same])


def _shapes(tree: Any) -> Any:
    return jax.tree.map(np.shape, tree)


def _described(made: Components, initial: Initial, heads: list[str]) -> str:
    settings, other = made.settings, initial.config
    config, lora = settings.generator, settings.lora
    fresh = [i for i in range(config.num_classes) if i not in initial.rows]
    new = []
    if fresh:
        names = ", ".join(made.class_names[i] for i in fresh[:5]) + ", ..." * (len(fresh) > 5)
        new.append(f"fresh rows of {len(fresh)} of {config.num_classes} classes ({names})")
    if config.has_null_class and not other.has_null_class:
        new.append("a fresh row of the null class")
    if other.grid != config.grid:
        shapes = ("x".join(map(str, grid)) for grid in (config.grid, other.grid))
        new.append("a grid of {} tokens in place of {}".format(*shapes))
    if heads:
        new.append(f"fresh foresight heads {', '.join(heads)}")
    if lora.rank:
        new.append(f"adapters of rank {lora.rank}")
    with_new = f", with {', '.join(new)}" if new else ""
    return f"began with the weights of {settings.init_from}{with_new}"
