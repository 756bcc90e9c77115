"""PyTorch files -> converted folders, and converted folders or runs -> PyTorch files."""

import collections
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from flax import traverse_util

from mirai_jax.utils.errors import ConfigError
from mirai_jax.weights import pretrained, safetensors, state_dict, torch_writer
from mirai_jax.weights.state_dict import Weights


def from_torch(
    source: str, target: str, *, entry: str = "", grid: int = 0, num_heads: int = 0
) -> Weights:
    """A PyTorch file -> a converted folder.

    Args:
        source: .pt, .pth or .safetensors.
        target: a folder that does not exist.
        entry: key of a training checkpoint to take; '': the first of state_dict.WRAPPERS.
        grid: tokens a side of a generator; 0: as the file's arguments say, else 16.
        num_heads: where the size is not a published one.

    Raises:
        ConfigError: one line, which lists every name that does not fit; nothing is written.
    """
    if os.path.exists(target):
        raise ConfigError(f"{target} exists; it must be a new folder")
    state, found, arguments = state_dict.read_state(source, entry)
    about = {
        "file": os.path.basename(source),
        "entry": found,
        "sha256": pretrained.sha256_of_file(source),
    }
    kind = state_dict.kind_of(state)
    for flag, given, kinds in (("grid", grid, ("generator",)),
                               ("num_heads", num_heads, ("generator", "teacher"))):  # fmt: skip
        if given and kind and kind not in kinds:
            raise ConfigError(f"--{flag} has no meaning here: {source} is a {kind}")
    sides = pretrained.token_grid(grid, arguments)
    made = state_dict.from_state(state, about, grid=sides, num_heads=num_heads, arguments=arguments)
    del state  # what is stacked has been copied
    pretrained.save(target, made)
    return made


def to_torch(
    source: str,
    target: str,
    read_run: Callable[[str, str], tuple[Any, Any, int]],
    *,
    state: str = "ema",
    projectors: str = "",
) -> Weights:
    """A converted folder or a workdir -> a PyTorch file.

    Args:
        source: the folder.
        target: a new .pt, .pth or .safetensors.
        read_run: `training.restore.read_run`.
        state: of a workdir: 'ema' or 'model', the weights that were trained.
        projectors: of a workdir, with 'model': the foresight term whose projectors to add.

    Raises:
        ConfigError, DataError: one line; nothing is written.
    """
    suffix = pathlib.Path(target).suffix
    if suffix not in (".pt", ".pth", ".safetensors"):
        raise ConfigError(f"{target}: it must end in .pt, .pth or .safetensors")
    if os.path.exists(target):
        raise ConfigError(f"{target} exists; it must be a new file")
    if pretrained.is_converted(source):
        made = pretrained.load_converted(source)
    else:
        made = _of_run(source, read_run("SOURCE", source), state, projectors)
    named = state_dict.to_state(made)
    extra = {}
    if made.kind == "generator":  # what its weights do not show
        extra["args"] = {
            "grid": list(made.config.grid),
            "num_classes": made.config.num_classes,
            "num_heads": made.config.num_heads,
            "class_dropout_prob": made.config.class_dropout,
        }
    pathlib.Path(target).parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".safetensors":
        texts = {name: json.dumps(value) for name, value in extra.items()}
        safetensors.write(target, named, {"format": "pt", **texts})
    else:
        named = collections.OrderedDict(named)
        # The official scripts read a teacher bare and everything else under 'model'.
        torch_writer.write(target, named if made.kind == "teacher" else {"model": named, **extra})
    return made


def _of_run(source: str, run: tuple[Any, Any, int], state: str, projectors: str) -> Weights:
    settings, saved, step = run
    if state == "ema" and projectors:
        raise ConfigError(
            f"--projectors is {projectors!r}; projectors have no average: set --state=model"
        )
    heads = saved["params"]["foresight"]
    able = [name for name, tree in heads.items() if "linear_2" in tree]
    if projectors and projectors not in able:
        raise ConfigError(
            f"--projectors is {projectors!r}; it must be a foresight term with projectors: "
            f"{', '.join(able) or 'this run has none'}"
        )
    params = saved["ema"] if state == "ema" else saved["params"]["generator"]
    about = {"file": source, "entry": f"{state} at step {step}"}
    return Weights("generator", settings.generator, params, heads.get(projectors), about)


def describe(made: Weights) -> str:
    """What was converted, for the screen."""
    entry = made.source.get("entry")
    text = f"{made.kind}{f' ({entry})' if entry else ''}: {_count(made.params):,} parameters"
    if made.projectors is not None:
        heads = len(made.projectors["linear_0"]["bias"])
        text += f", {_count(made.projectors):,} more in {heads} projectors"
    if made.source.get("grid") == "assumed":
        text += "\nthe file does not give the grid: 16 x 16 is assumed (--grid=N sets another)"
    return f"{text}\n{made.config}"


def _count(params: Any) -> int:
    return sum(array.size for array in traverse_util.flatten_dict(params).values())
