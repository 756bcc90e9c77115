"""Weights from elsewhere: state dicts inside PyTorch files, and converted folders.

A converted folder holds one network as this project keeps it:

    model.json   what it is: kind, shapes, and the file it came from
    params/      its parameters (Orbax), bit for bit those of that file

Whatever takes weights takes either: `load`.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import secrets
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from mirai_jax.models import generator, vit, vq
from mirai_jax.utils.errors import ConfigError, first_line
from mirai_jax.weights import safetensors, torch_names, torch_reader

Arrays = Mapping[str, np.ndarray]

# Where training scripts put the state dict, the better one first.
WRAPPERS = ("ema", "model", "module", "state_dict")
_PREFIXES = ("_orig_mod.", "module.")  # of torch.compile and of DistributedDataParallel
ENCODER = "encoder"  # where a finished run of `mirai_jax.teach` has its converted folder
_CONFIGS = {
    "generator": generator.GeneratorConfig,
    "tokenizer": vq.VQConfig,
    "teacher": vit.DinoConfig,
}
KINDS = tuple(_CONFIGS)


@dataclasses.dataclass(frozen=True)
class Weights:
    """One network.

    Attributes:
        kind: one of KINDS.
        config: its shapes: GeneratorConfig, VQConfig or DinoConfig.
        params: the tree that its module takes; NumPy arrays of the file's own dtypes.
        projectors: of a generator: the stacked projectors trained with it, or None.
        source: where it came from: {'file', 'entry', 'sha256'}; and 'grid': 'assumed' where nothing
            told a generator's.
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


# PyTorch files ------------------------------------------------------------------------------------


def _is_state(tree: Any) -> bool:
    return (
        isinstance(tree, dict)
        and len(tree) > 0
        and all(isinstance(n, str) and isinstance(a, np.ndarray) for n, a in tree.items())
    )


def _find_state(tree: Any, entry: str, path: Any) -> tuple[dict[str, np.ndarray], str]:
    if not entry and _is_state(tree):
        return dict(tree), ""
    keys = [str(key) for key in tree] if isinstance(tree, dict) else []
    for name in [entry] if entry else WRAPPERS:
        if isinstance(tree, dict) and _is_state(tree.get(name)):
            return dict(tree[name]), name
    wanted = f"no state dict under {entry!r}" if entry else "no state dict"
    raise ConfigError(
        f"{path} holds {wanted}: it must be one, or a dictionary with one under one of "
        f"{', '.join(WRAPPERS)}; its entries are {', '.join(keys[:20]) or 'none'}"
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
            tree = safetensors.read(path)
            arguments = _json_object(safetensors.read_metadata(path).get("args", ""))
        else:
            tree = torch_reader.read(path)
            arguments = tree.get("args") if isinstance(tree, dict) else None
    except (torch_reader.TorchFileError, safetensors.SafetensorsError) as error:
        raise ConfigError(first_line(error)) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error})") from error
    state, found = _find_state(tree, entry, path)
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): array for name, array in state.items()}
                stripped = True
    return state, found, arguments if isinstance(arguments, dict) else {}


def _json_object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def token_grid(side: int, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """A generator's grid, which its weights do not tell.

    Args:
        side: tokens a side, as the user says; 0: as the file's training arguments say.
        arguments: as `read_state` gives them: the official script's, or `arguments_of`.

    Returns:
        (height, width), or None if nothing tells.

    Raises:
        ConfigError: it is negative.
    """
    if side < 0:
        raise ConfigError(f"--grid is {side}; it must be 1 or more")
    if side:
        return side, side
    try:
        if "grid" in arguments:
            height, width = map(int, arguments["grid"])
        else:
            height = width = int(arguments["image_size"]) // int(arguments["downsample_size"])
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return None
    return (height, width) if min(height, width) > 0 else None


def arguments_of(config: generator.GeneratorConfig) -> dict[str, Any]:
    """What a generator's weights do not tell, to be kept in a file beside them."""
    return {
        "grid": list(config.grid),
        "num_classes": config.num_classes,
        "num_heads": config.num_heads,
        "class_dropout_prob": config.class_dropout,
    }


def _told(arguments: Mapping[str, Any], name: str) -> int:
    """A number of the arguments; 0 if they have none."""
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
        num_heads = sizes.get((len(layers), width), _told(arguments, "num_heads"))
    if num_heads < 1 or width % (4 * num_heads):
        raise ConfigError(
            f"num_heads is {num_heads}; a generator of {len(layers)} layers and width {width} is "
            "none of the published sizes: it must be told, and 4 * num_heads divide the width"
        )
    made = generator.GeneratorConfig(
        num_layers=len(layers),
        num_heads=num_heads,
        width=width,
        vocab_size=vocab_size,
        num_classes=rows - 1,
        grid=grid,
    )
    if _told(arguments, "num_classes") == rows:  # all rows are classes, none is the null class
        return dataclasses.replace(made, num_classes=rows, class_dropout=0.0)
    return made


def kind_of(state: Arrays) -> str:
    """Which network a state dict is of, or ''."""
    marks = {
        "generator": "tok_embeddings.weight",
        "tokenizer": "quantize.embedding.weight",
        "teacher": "patch_embed.proj.weight",
    }
    return next((kind for kind, name in marks.items() if name in state), "")


def from_state(
    state: Arrays,
    source: Mapping[str, str],
    *,
    grid: tuple[int, int] | None = None,
    num_heads: int = 0,
    arguments: Mapping[str, Any] | None = None,
) -> Weights:
    """A PyTorch state dict -> the network that it is of, every name and shape checked.

    Args:
        state: as `read_state` gives it.
        source: for the record and for messages.
        grid: tokens (height, width) of a generator, which its weights do not tell; None: 16 x 16 is
            assumed, and noted in `source`.
        num_heads: of a generator or teacher of no published size; 0: by its size, or `arguments`.
        arguments: as `read_state` gives them.

    Raises:
        ConfigError: it is none of the networks, or names and shapes do not fit; all are listed.
    """
    kind, file = kind_of(state), source.get("file", "")
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
            return Weights(kind, config, params, projectors, source)
        if kind == "tokenizer":
            config = vq.config_of(state)
            return Weights(kind, config, torch_names.vq_from_torch(config, state), None, source)
        if kind == "teacher":
            config = vit.config_of(state, num_heads or None)
            params = torch_names.dinov2_from_torch(config, state)
            return Weights(kind, config, params, None, source)
    except ValueError as error:
        raise ConfigError(f"{file}: {first_line(error)}") from error
    raise ConfigError(
        f"{file} is none of a LlamaGen generator, a LlamaGen tokenizer and a DINOv2 encoder; its "
        f"names begin {', '.join(sorted(state)[:5])}"
    )


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


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Converted folders --------------------------------------------------------------------------------


def is_converted(path: str | os.PathLike[str]) -> bool:
    return (pathlib.Path(path) / "model.json").is_file()


def save(folder: str | os.PathLike[str], weights: Weights) -> None:
    """Writes a converted folder, whole or not at all.

    Raises:
        ConfigError: the folder exists.
    """
    folder = pathlib.Path(folder)
    if folder.exists():
        raise ConfigError(f"{folder} exists; it must be a new folder")
    unfinished = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
    about = {
        "kind": weights.kind,
        "config": dataclasses.asdict(weights.config),
        "source": dict(weights.source),
    }
    try:
        unfinished.mkdir(parents=True)
        # Weights hardly compress, and Orbax copies NumPy arrays (not JAX's) before it writes them:
        # either would hold all of them in memory once more.
        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        with ocp.Checkpointer(handler) as checkpointer:
            tree = jax.tree.map(_on_host, weights.tree)
            try:
                checkpointer.save(unfinished.absolute() / "params", tree)
            except Exception as error:  # TensorStore's, of a full disk for one
                raise ConfigError(f"{folder} cannot be written ({first_line(error)})") from error
        (unfinished / "model.json").write_text(json.dumps(about, indent=2) + "\n")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _on_host(array: np.ndarray) -> jax.Array | np.ndarray:
    if array.dtype.itemsize > 4:
        return array  # JAX would make it narrower
    return jax.device_put(array, jax.local_devices(backend="cpu")[0])


def load_converted(folder: str | os.PathLike[str]) -> Weights:
    """Reads what `save` wrote.

    Raises:
        ConfigError: it is damaged or something else.
    """
    folder = pathlib.Path(folder)
    try:
        about = json.loads((folder / "model.json").read_text())
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in about["config"].items()}
        config = _CONFIGS[about["kind"]](**fields)
        source = dict(about["source"])
        path = (folder / "params").absolute()
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            saved = checkpointer.metadata(path).item_metadata.tree
            numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            tree = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=numpy))
        return Weights(about["kind"], config, tree["params"], tree.get("projectors"), source)
    except Exception as error:  # whatever JSON, Orbax and TensorStore make of a damaged folder
        raise ConfigError(
            f"{folder} is not a whole converted folder ({first_line(error)}); make it with "
            '"python -m mirai_jax.convert"'
        ) from error


def _converted_in(folder: str, kind: str) -> pathlib.Path:
    """The converted folder that `folder` is, or, as the workdir of a teacher, has."""
    path = pathlib.Path(folder)
    if kind != "teacher" or is_converted(path) or not (path / "config.json").is_file():
        return path
    if not is_converted(path / ENCODER):
        raise ConfigError(
            f"a workdir without {ENCODER}/, which a run of mirai_jax.teach has when it is finished"
        )
    return path / ENCODER


def load(
    field: str, path: str, kind: str, *, grid: tuple[int, int] | None = None, num_heads: int = 0
) -> Weights:
    """The weights that a config field or a flag names: a PyTorch file, a converted folder, or, of a
    teacher, the workdir of a finished run of `mirai_jax.teach`.

    Args:
        field: its name, for messages.
        path: what it holds.
        kind: what it must be.
        grid: of a generator's PyTorch file; None: see `token_grid`. A converted folder knows it.
        num_heads: see `from_state`.

    Raises:
        ConfigError: no such thing, another network, or numbers that are not finite.
    """
    path = os.path.expanduser(path)
    try:
        if os.path.isdir(path):
            weights = load_converted(_converted_in(path, kind))
        else:
            state, entry, arguments = read_state(path)
            source = {"file": os.path.basename(path), "entry": entry}
            grid = grid or token_grid(0, arguments)
            weights = from_state(state, source, grid=grid, num_heads=num_heads, arguments=arguments)
    except ConfigError as error:
        raise ConfigError(f"{field} is {path!r}: {first_line(error)}") from error
    if weights.kind != kind:
        raise ConfigError(f"{field} is {path!r}, a {weights.kind}; it must be a {kind}")
    for name, array in traverse_util.flatten_dict(weights.params, sep="/").items():
        # Through float32: NumPy's isfinite does not know bfloat16's kin everywhere.
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise ConfigError(f"{field} is {path!r}, whose {name} has numbers that are not finite")
    logging.debug("%s: %s of %s", field, weights.config, path)
    return weights


def float32(params: Any) -> Any:
    """A tree of arrays as float32 NumPy arrays, which the networks here take."""
    return jax.tree.map(lambda array: np.asarray(array, np.float32), params)


def checksum(params: Any) -> str:
    """SHA-256 over names and float32 values: the same for every file format they were kept in."""
    digest = hashlib.sha256()
    flat = traverse_util.flatten_dict(params, sep="/")
    for name in sorted(flat):
        array = np.ascontiguousarray(np.asarray(flat[name], "<f4"))
        digest.update(f"{name} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()
