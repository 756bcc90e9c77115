"""State dicts inside PyTorch files, and the networks that they hold.

A file is recognised by its names; every name and shape is checked (`torch_names`).
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mirai_jax.models import generator, vit, vq
from mirai_jax.utils.errors import ConfigError, DataError, first_line
from mirai_jax.weights import safetensors, torch_names, torch_reader

Arrays = Mapping[str, np.ndarray]

# Where training scripts keep the state dict, the better one first.
WRAPPERS = ("ema", "model", "module", "state_dict")
_PREFIXES = ("_orig_mod.", "module.")  # of torch.compile and of DistributedDataParallel
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
        config: its shapes: GeneratorConfig, VQConfig or DinoConfig.
        params: the tree that its module takes; NumPy arrays of the file's own dtypes.
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
        return {"params": self.params} | (
            {} if self.projectors is None else {"projectors": self.projectors}
        )


def read_state(
    path: str | os.PathLike[str], entry: str = ""
) -> tuple[dict[str, np.ndarray], str, dict[str, Any]]:
    """Reads the state dict of a .pt, .pth or .safetensors file; nothing in it is executed.

    Args:
        path: the file.
        entry: the key of a training checkpoint to take; '' takes the file itself if it is a state
            dict, else the first of WRAPPERS that is there.

    Returns:
        {name: array} without the prefixes that wrappers add, the key it was under ('' for none),
        and the training script's arguments where the file keeps them.

    Raises:
        ConfigError: no such file, damaged, or something else.
    """
    try:
        if pathlib.Path(path).suffix == ".safetensors":
            tree, metadata = safetensors.read(path)
            arguments = _json(metadata.get("args", ""))
        else:
            tree = torch_reader.read(path)
            arguments = tree.get("args") if isinstance(tree, dict) else None
    except DataError as error:
        raise ConfigError(_not_weights(path) or first_line(error)) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error})") from error
    state, found = _find_state(tree, entry, path)
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in state)), ""):
        state = {name.removeprefix(prefix): array for name, array in state.items()}
    return state, found, arguments if isinstance(arguments, dict) else {}


def _not_weights(path: str | os.PathLike[str]) -> str:
    """A message if the file is what a download often gives instead of weights; else ''."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return f"{path}: it is a Git LFS pointer, not the file itself: run 'git lfs pull'"
    if start.startswith((b"<!doctype html", b"<html")):
        return f"{path}: it is an HTML page: the download went wrong"
    return "" if start else f"{path}: it is empty"


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_state(tree: Any) -> bool:
    return (
        isinstance(tree, dict)
        and len(tree) > 0
        and all(isinstance(n, str) and isinstance(a, np.ndarray) for n, a in tree.items())
    )


def _find_state(tree: Any, entry: str, path: Any) -> tuple[dict[str, np.ndarray], str]:
    if not entry and _is_state(tree):
        return dict(tree), ""
    entries = tree if isinstance(tree, dict) else {}
    for name in [entry] if entry else WRAPPERS:
        if _is_state(entries.get(name)):
            return dict(entries[name]), name
    keys = [str(key) for key in entries]
    wanted = f"no state dict under {entry!r}" if entry else "no state dict"
    raise ConfigError(
        f"{path} holds {wanted}: it must be one, or a dictionary with one under one of "
        f"{', '.join(WRAPPERS)}; its entries are {', '.join(keys[:20]) or 'none'}"
    )


def kind_of(state: Arrays) -> str:
    """The network that a state dict holds, or '' if it holds none of them."""
    return next((kind for kind, name in _MARKS.items() if name in state), "")


def from_state(
    state: Arrays,
    source: Mapping[str, str],
    *,
    grid: tuple[int, int] | None = None,
    num_heads: int = 0,
    arguments: Mapping[str, Any] | None = None,
) -> Weights:
    """A PyTorch state dict -> the network that it holds, every name and shape checked.

    Args:
        state: as `read_state` gives it.
        source: for the record and for messages.
        grid: tokens (height, width) of a generator, which its weights do not show; None: 16 x 16
            is assumed, and noted in `source`.
        num_heads: of a generator or teacher of no published size; 0: by its size, or `arguments`.
        arguments: as `read_state` gives them.

    Raises:
        ConfigError: it is none of the networks, or names and shapes do not fit; all are listed.
    """
    kind, file, projectors = kind_of(state), source.get("file", ""), None
    try:
        if kind == "generator":
            if grid is None:
                grid, source = (16, 16), {**source, "grid": "assumed"}
            config = _generator_config(state, grid, num_heads, arguments or {})
            heads = {n: a for n, a in state.items() if n.startswith("projectors.")}
            # The rotary table that some versions keep as a buffer is computed here.
            own = {n: a for n, a in state.items() if n not in heads and n != "freqs_cis"}
            params = torch_names.generator_from_torch(config, own)
            projectors = torch_names.projectors_from_torch(heads) if heads else None
        elif kind == "tokenizer":
            config = vq.config_of(state)
            params = torch_names.vq_from_torch(config, state)
        elif kind == "teacher":
            config = vit.config_of(state, num_heads or None)
            params = torch_names.dinov2_from_torch(config, state)
        else:
            raise ConfigError(
                "none of a LlamaGen generator, a LlamaGen tokenizer and a DINOv2 encoder; its "
                f"names begin {', '.join(sorted(state)[:5])}"
            )
    except ValueError as error:
        raise ConfigError(f"{file}: {first_line(error)}") from error
    return Weights(kind, config, params, projectors, source)


def to_state(weights: Weights) -> dict[str, np.ndarray]:
    """The inverse of `from_state`: names and layouts of PyTorch."""
    if weights.kind == "generator":
        state = torch_names.generator_to_torch(weights.config, weights.params)
        if weights.projectors is not None:
            state |= torch_names.projectors_to_torch(weights.projectors)
        return state
    if weights.kind == "tokenizer":
        return torch_names.vq_to_torch(weights.config, weights.params)
    return torch_names.dinov2_to_torch(weights.config, weights.params)


def _number(arguments: Mapping[str, Any], name: str) -> int:
    """A number of the arguments; 0 if it is missing."""
    try:
        return int(arguments.get(name, 0))
    except (TypeError, ValueError, OverflowError):
        return 0


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
            f"num_heads is {num_heads}; a generator of {len(layers)} layers and width {width} is "
            "none of the published sizes: set num_heads, of which 4 times divides the width"
        )
    made = generator.GeneratorConfig(
        num_layers=len(layers),
        num_heads=num_heads,
        width=width,
        vocab_size=vocab_size,
        num_classes=rows - 1,
        grid=grid,
    )
    if _number(arguments, "num_classes") == rows:  # all rows are classes, none is the null class
        return dataclasses.replace(made, num_classes=rows, class_dropout=0.0)
    return made
