"""PyTorch files -> converted folders, and converted folders or runs -> PyTorch files."""

import collections
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from mirai_jax.utils import paths
from mirai_jax.utils.errors import ConfigError
from mirai_jax.weights import pretrained, safetensors, state_dict, torch_writer
from mirai_jax.weights.state_dict import Weights


def from_torch(
    source: str, target: str, *, entry: str = "", grid: int = 0, num_heads: int = 0
) -> Weights:
    """A PyTorch file (.pt, .pth or .safetensors) -> a new converted folder.

    Args:
        entry: key of a training checkpoint to take; '': the first of state_dict.WRAPPERS.
        grid: tokens a side of a generator; 0: as the file's arguments say, else 16.
        num_heads: where the size is not a published one.

    Raises:
        ConfigError: one line, which lists every name that does not fit; nothing is written.
    """
    state, found, arguments = state_dict.read_state(source, entry)
    about = {
        "file": os.path.basename(source),
        "entry": found,
        "sha256": pretrained.sha256_of_file(source),
    }
    sides = pretrained.token_grid(grid, arguments)
    made = state_dict.from_state(state, about, sides, num_heads, arguments)
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
    """A converted folder or a workdir -> a new PyTorch file (.pt, .pth or .safetensors).

    Args:
        read_run: `training.restore.read_run`.
        state: of a workdir: 'ema' or 'model', the weights that were trained.
        projectors: of a workdir, with 'model': the foresight term whose projectors to add.

    Raises:
        ConfigError, DataError: one line; nothing is written.
    """
    suffix = pathlib.Path(target).suffix
    if suffix not in (".pt", ".pth", ".safetensors"):
        raise ConfigError(f"{target}: it must end in .pt, .pth or .safetensors")
    where = paths.at(target)
    if where.exists():
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
    where.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".safetensors":
        texts = {name: json.dumps(value) for name, value in extra.items()}
        safetensors.write(where, named, {"format": "pt", **texts})
    else:
        named = collections.OrderedDict(named)
        # The official scripts read DINOv2 and DINOv3 bare and everything else under 'model'.
        bare = made.kind == "teacher" and made.config.family != "mae"
        torch_writer.write(where, named if bare else {"model": named, **extra})
    return made


def _of_run(source: str, run: tuple[Any, Any, int], state: str, projectors: str) -> Weights:
    settings, saved, step = run
    heads = saved["params"]["foresight"]
    able = [name for name, tree in heads.items() if "linear_2" in tree]
    if projectors and (state == "ema" or projectors not in able):  # projectors have no average
        raise ConfigError(
            f"--projectors is {projectors!r}; it needs --state=model and a foresight term with "
            f"projectors: {', '.join(able) or 'this run has none'}"
        )
    params = saved["ema"] if state == "ema" else saved["params"]["generator"]
    about = {"file": source, "entry": f"{state} at step {step}"}
    return Weights("generator", settings.generator, params, heads.get(projectors), about)


def describe(made: Weights) -> str:
    """What was converted, for the screen."""
    entry = made.source.get("entry")
    count = sum(array.size for array in jax.tree.leaves(made.tree))
    text = f"{made.kind}{f' ({entry})' if entry else ''}: {count:,} parameters"
    if made.projectors is not None:
        text += f", with those of {len(made.projectors['linear_0']['bias'])} projectors"
    if made.source.get("grid") == "assumed":
        text += "\nthe file does not give the grid: 16 x 16 is assumed (--grid=N sets another)"
    return f"{text}\n{made.config}"
