"""Weights from elsewhere: `load` reads a PyTorch file or a converted folder.

A converted folder holds one network as this project keeps it:

    model.json   what it is: kind, shapes, and the file it came from
    params/      its parameters (Orbax), bit for bit those of that file
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from mirai_jax.models import generator, vit, vq
from mirai_jax.utils import distributed, files, paths
from mirai_jax.utils.errors import ConfigError, first_line
from mirai_jax.weights import state_dict
from mirai_jax.weights.state_dict import Weights

ENCODER = "encoder"  # where a finished run of `mirai_jax.teach` has its converted folder
TOKENIZER = "tokenizer"  # the same of `mirai_jax.tokenize`
_OF_RUN = {"teacher": ("teach", ENCODER), "tokenizer": ("tokenize", TOKENIZER)}
_CONFIGS = {
    "generator": generator.GeneratorConfig,
    "tokenizer": vq.VQConfig,
    "teacher": vit.VitConfig,
}

# Converted folders --------------------------------------------------------------------------------


def is_converted(path: str | os.PathLike[str]) -> bool:
    return (paths.at(path) / "model.json").is_file()


def save(folder: str | os.PathLike[str], weights: Weights) -> None:
    """Writes a converted folder, whole or not at all.

    Raises:
        ConfigError: the folder exists.
    """
    folder = paths.at(folder)
    if folder.exists():
        raise ConfigError(f"{folder} exists; it must be a new folder")
    if files.is_remote(folder):
        with tempfile.TemporaryDirectory(prefix="mirai-") as here:
            save(pathlib.Path(here, "made"), weights)
            files.upload(pathlib.Path(here, "made"), folder, last="model.json")
        return
    unfinished = folder.with_name(f"{secrets.token_hex(8)}.tmp")
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
            try:
                checkpointer.save(f"{paths.plain(unfinished)}/params", _on_host(weights.tree))
            except Exception as error:  # TensorStore's, if the disk is full for one
                raise ConfigError(f"{folder} cannot be written ({first_line(error)})") from error
        wanted = set(traverse_util.flatten_dict(weights.tree, sep="."))
        if files.stored_arrays(f"{paths.plain(unfinished)}/params") != wanted:
            raise ConfigError(f"{folder} does not hold what was written to it")
        (unfinished / "model.json").write_text(json.dumps(about, indent=2) + "\n")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _on_host(tree: Any) -> Any:
    cpu = distributed.host_device()
    # JAX would make 64 bits narrower.
    return jax.tree.map(lambda a: a if a.dtype.itemsize > 4 else jax.device_put(a, cpu), tree)


def load_converted(folder: str | os.PathLike[str]) -> Weights:
    """Reads what `save` wrote.

    Raises:
        ConfigError: it is damaged or something else.
    """
    try:
        folder = paths.local(folder)
        about = json.loads((folder / "model.json").read_text())
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in about["config"].items()}
        config = _CONFIGS[about["kind"]](**fields)
        source = dict(about["source"])
        path = f"{paths.plain(folder)}/params"
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            saved = checkpointer.metadata(path).item_metadata.tree
            numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            tree = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=numpy))
        return Weights(about["kind"], config, tree["params"], tree.get("projectors"), source)
    except Exception as error:  # whatever JSON, Orbax and TensorStore make of a damaged folder
        why = first_line(error)
        raise ConfigError(f"{folder} is not a whole converted folder ({why})") from error


# Weights of any kind ------------------------------------------------------------------------------


def token_grid(side: int, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """A generator's grid (height, width), which its weights do not show; None if it is not known.

    Args:
        side: tokens a side; 0: as the file's training arguments say.
        arguments: as `state_dict.read_state` gives them: the official script's, or those that
            `conversion.to_torch` writes.
    """
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


def load(
    field: str, path: str, kind: str, *, grid: tuple[int, int] | None = None, num_heads: int = 0
) -> Weights:
    """The weights of a PyTorch file, a converted folder, or, of a teacher or a tokenizer, the workdir
    of a finished run of `mirai_jax.teach` or `mirai_jax.tokenize`.

    Args:
        field: the config field or flag that names them, for messages.
        grid: of a generator's PyTorch file; None: see `token_grid`. A converted folder knows it.
        num_heads: see `state_dict.from_state`.

    Raises:
        ConfigError: no such thing, not of this `kind`, or numbers that are not finite.
    """
    path = os.path.expanduser(path)
    where = paths.at(path)
    try:
        if path and where.is_dir():
            program, inside = _OF_RUN.get(kind, ("", ""))
            of_run = program and (where / "config.json").is_file()
            folder = where / inside if of_run else where
            if of_run and not is_converted(folder):
                raise ConfigError(f"no finished run of mirai_jax.{program}: it has no {inside}/")
            weights = load_converted(folder)
        else:
            state, entry, arguments = state_dict.read_state(path)
            source = {"file": os.path.basename(path), "entry": entry}
            sides = grid or token_grid(0, arguments)
            weights = state_dict.from_state(state, source, sides, num_heads, arguments)
    except ConfigError as error:
        raise ConfigError(f"{field} is {path!r}: {first_line(error)}") from error
    if weights.kind != kind:
        raise ConfigError(f"{field} is {path!r}, a {weights.kind}; it must be a {kind}")
    for name, array in traverse_util.flatten_dict(weights.params, sep="/").items():
        # Through float32: NumPy's isfinite does not know bfloat16's kin everywhere.
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise ConfigError(f"{field} is {path!r}, whose {name} has numbers that are not finite")
    return weights


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    with paths.local(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
