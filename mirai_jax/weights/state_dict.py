"""State dicts inside PyTorch files, and the networks that they hold.

A file is recognised by its names; every name and shape is checked (`torch_names`).
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mirai_jax.models import generator, vit_sizes, vq
from mirai_jax.utils import paths
from mirai_jax.utils.errors import ConfigError, DataError, first_line
from mirai_jax.weights import safetensors, torch_names, torch_reader, usual_names

Arrays = Mapping[str, np.ndarray]

# Where training scripts keep the state dict, the better one first.
WRAPPERS = ("ema", "model", "module", "state_dict", "teacher")
_MARKS = {
    "generator": "tok_embeddings.weight",
    "tokenizer": "quantize.embedding.weight",
    "teacher": "patch_embed.proj.weight",
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """One network.

    Attributes:
        kind: 'generator', 'tokenizer' or 'teacher'.
        config: its shapes: GeneratorConfig, VQConfig or VitConfig.
        params: the tree that its module takes; NumPy arrays of the file's dtypes.
        projectors: of a generator: the stacked projectors trained with it, or None.
        source: where it came from: {'file', 'entry', 'sha256'}; and 'grid': 'assumed' for a
            generator whose grid is not known.
    """

    kind: str
    config: Any
    params: Any
    projectors: Any = None
    source: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def tree(self) -> Any:
        more = {} if self.projectors is None else {"projectors": self.projectors}
        return {"params": self.params} | more


def read_state(
    path: str | os.PathLike[str], entry: str = ""
) -> tuple[dict[str, np.ndarray], str, dict[str, Any]]:
    """Reads the state dict of a .pt, .pth or .safetensors file; nothing in it is executed.

    Args:
        path: or hf:OWNER/NAME[@REVISION]/FILE.
        entry: the key of a training checkpoint to take; '' takes the file itself if it is a state
            dict, else the first of WRAPPERS that is there.

    Returns:
        {name: array} under the official code's names, the key it was under ('' for none), and the
        training script's arguments where the file keeps them.

    Raises:
        ConfigError: no such file, damaged, or something else.
    """
    arguments = None
    try:
        path = paths.local(path)
        if path.suffix == ".safetensors":
            tree, metadata = safetensors.read(path)
            with contextlib.suppress(ValueError, RecursionError):
                arguments = json.loads(metadata.get("args", ""))
        else:
            tree = torch_reader.read(path)
            arguments = tree.get("args") if isinstance(tree, dict) else None
    except DataError as error:
        raise ConfigError(_not_weights(path) or first_line(error)) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error})") from error
    state, found = _find_state(tree, entry, path)
    return usual_names.usual(state), found, arguments if isinstance(arguments, dict) else {}


def _not_weights(path: str | os.PathLike[str]) -> str:
    """A message if the file is what a download often gives instead of weights; else ''."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return f"{path}: it is a Git LFS pointer, not the file itself: run 'git lfs pull'"
    if start.startswith((b"<!doctype html", b"<html")):
        return f"{path}: it is an HTML page: the download went wrong"
    return "" if start else f"{path}: it is empty"


def _is_state(tree: Any) -> bool:
    items = tree.items() if isinstance(tree, dict) else ()
    return len(items) > 0 and all(type(n) is str and type(a) is np.ndarray for n, a in items)


def _find_state(tree: Any, entry: str, path: Any) -> tuple[dict[str, np.ndarray], str]:
    if not entry and _is_state(tree):
        return dict(tree), ""
    entries = tree if isinstance(tree, dict) else {}
    for name in [entry] if entry else WRAPPERS:
        if _is_state(entries.get(name)):
            return dict(entries[name]), name
    wanted = entry or f"one of {', '.join(WRAPPERS)}"
    keys = ", ".join(map(str, list(entries)[:20])) or "none"
    raise ConfigError(f"{path} has no state dict under {wanted!r}; its entries are {keys}")


def from_state(
    state: Arrays,
    source: Mapping[str, str],
    grid: tuple[int, int] | None = None,
    num_heads: int = 0,
    arguments: Mapping[str, Any] | None = None,
) -> Weights:
    """What `read_state` gives -> the network that it holds, every name and shape checked.

    Args:
        grid: tokens (height, width) of a generator, which its weights do not show; None: 16 x 16
            is assumed, and noted in `source`.
        num_heads: of a generator or teacher of no published size; 0: by its size, or `arguments`.

    Raises:
        ConfigError: it is none of the networks, or names and shapes do not fit; all are listed.
    """
    kind = next((kind for kind, name in _MARKS.items() if name in state), "")
    heads = {}
    try:
        if kind == "generator":
            if grid is None:
                grid, source = (16, 16), {**source, "grid": "assumed"}
            config = _generator_config(state, grid, num_heads, arguments or {})
            heads = {n: a for n, a in state.items() if n.startswith("projectors.")}
            state = {n: a for n, a in state.items() if n not in heads}
        elif kind == "tokenizer":
            config = vq.config_of(state)
        elif kind == "teacher":
            config = vit_sizes.config_of(state, num_heads or None)
        else:
            raise ConfigError(
                "none of a LlamaGen generator, a LlamaGen tokenizer and a vision transformer; its "
                f"names begin {', '.join(sorted(state)[:5])}"
            )
        params = torch_names.from_torch(config, state)
        projectors = torch_names.projectors_from_torch(heads) if heads else None
    except ValueError as error:
        raise ConfigError(f"{source.get('file', '')}: {first_line(error)}") from error
    return Weights(kind, config, params, projectors, source)


def to_state(weights: Weights) -> dict[str, np.ndarray]:
    """The inverse of `from_state`: names and layouts of PyTorch."""
    state = torch_names.to_torch(weights.config, weights.params)
    if weights.projectors is not None:
        state |= torch_names.projectors_to_torch(weights.projectors)
    return state


def _number(arguments: Mapping[str, Any], name: str) -> int:
    value = arguments.get(name)
    return value if type(value) is int else 0


def _generator_config(
    state: Arrays, grid: tuple[int, int], num_heads: int, arguments: Mapping[str, Any]
):
    layers = {name.split(".")[1] for name in state if name.startswith("layers.")}
    try:
        vocab_size, width = state["tok_embeddings.weight"].shape
        rows, _ = state["cls_embedding.embedding_table.weight"].shape
    except (KeyError, ValueError) as error:
        raise ConfigError(f"not a class-conditional LlamaGen generator ({error})") from error
    if not num_heads:
        sizes = {(n, d): heads for n, heads, d in generator.SIZES.values()}
        num_heads = sizes.get((len(layers), width), _number(arguments, "num_heads"))
    if num_heads < 1 or width % (4 * num_heads):
        raise ConfigError(
            f"num_heads is {num_heads}; for {len(layers)} layers and width {width}, which no published "
            "size has, set num_heads, of which 4 times divides the width"
        )
    made = generator.GeneratorConfig(len(layers), num_heads, width, vocab_size, rows - 1, grid)
    if _number(arguments, "num_classes") == rows:  # all rows are classes, none is the null class
        return dataclasses.replace(made, num_classes=rows, class_dropout=0.0)
    return made
