"""Reading other runs: their configs, checkpoints and generators."""

import json
import pathlib
from typing import Any

import jax
import numpy as np

from mirai_jax.config import schema
from mirai_jax.config.schema import Settings
from mirai_jax.models import adapters
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.optimizer import overlay
from mirai_jax.training.checkpoint import restore_weights
from mirai_jax.utils import distributed, paths
from mirai_jax.utils.errors import ConfigError, first_line
from mirai_jax.weights import patch_codebook, pretrained


def read_settings(field: str, workdir: str) -> Settings:
    """The config of a workdir.

    Raises:
        ConfigError: it is not the workdir of a run.
    """
    try:
        raw = json.loads((paths.at(workdir) / "config.json").read_text())
        # Its mesh does not matter here: one device satisfies any other check.
        raw["mesh"] = dict(data=1, fsdp=1, tensor=1)
        return schema.read(raw, num_devices=1)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{field} is {workdir!r}, not the workdir of a run ({first_line(error)})"
        ) from error


def read_run(field: str, workdir: str, step: int | None = None) -> tuple[Settings, Any, int]:
    """A checkpoint, the newest unless `step` is given, of a finished or running workdir.

    Returns:
        Its settings; {'params': {'generator', 'foresight'}, 'ema'} as host arrays, whole generators
        with their adapters merged; its step.

    Raises:
        ConfigError: no such run, or no checkpoint.
    """
    settings = read_settings(field, workdir)
    folder = paths.at(workdir) / "checkpoints"
    saved, step = restore_weights(folder, step)
    return settings, whole_generators(settings, saved["params"], saved["ema"]), step


def whole_generators(settings: Settings, params: Any, ema: Any) -> dict[str, Any]:
    """What `read_run` gives of a state's host arrays."""
    trained = params["generator"]
    # On the host, which holds them already.
    with jax.default_device(distributed.host_device()):
        trained, ema = (
            jax.device_get(adapters.merge(tree, settings.lora))
            for tree in (trained, overlay(trained, ema))
        )
    return {"params": {**params, "generator": trained}, "ema": ema}


def class_names(path: str) -> tuple[str, ...]:
    """The names of a workdir's classes; () where there are none, as for weights in a file."""
    try:
        file = paths.at(path) / "classes.json"
        return tuple(map(str, json.loads(file.read_text())))
    # Runs of earlier versions have none.
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return ()


def load_initial(
    settings: Settings, tokenizer_params: Any
) -> tuple[GeneratorConfig, dict[str, Any]]:
    """The weights of `init_from`, for a run to begin with; its classes and grid may be others.

    Returns:
        Its shapes, and {'params': {'generator', 'foresight'}, 'ema'} as host arrays; a file without
        more gives its generator as both, and {} as foresight.

    Raises:
        ConfigError: nothing of the kind, other tokens, or a generator of another shape.
    """
    path = settings.init_from
    config, saved = _load("init_from", path, settings, tokenizer_params)
    names = "model.vocab_size", "num_layers", "num_heads", "width"
    _check_same("init_from", path, settings.generator, config, names)
    return config, saved


def load_generator(
    field: str, path: str, settings: Settings, tokenizer_params: Any
) -> tuple[GeneratorConfig, dict[str, Any]]:
    """A generator's shapes and {'params', 'ema'}, of a workdir, a converted folder or a file.

    Args:
        field: the config field that names it, for messages.
        settings: of the run that will use it; tokens and classes must be the same.
        tokenizer_params: of that run's tokenizer; None where it has none yet.

    Raises:
        ConfigError: nothing of the kind, or other tokens.
    """
    config, saved = _load(field, path, settings, tokenizer_params)
    names = "model.grid", "model.vocab_size", "model.num_classes"
    _check_same(field, path, settings.generator, config, names)
    return config, saved


def _load(
    field: str, path: str, settings: Settings, tokenizer_params: Any
) -> tuple[GeneratorConfig, dict[str, Any]]:
    folder = paths.at(path)
    if (folder / "config.json").exists():
        other, saved, _ = read_run(field, path)
        if tokenizer_params is not None:
            _check_same_tokenizer(field, folder, settings, tokenizer_params)
        return other.generator, saved
    if tokenizer_params is not None and settings.tokenizer.name == "patch":
        raise ConfigError(
            f"{field} is {path!r}; with tokenizer.name 'patch' it must be a workdir, which knows "
            "its own patch codebook"
        )
    loaded = pretrained.load(field, path, "generator", grid=settings.generator.grid)
    params = pretrained.float32(loaded.params)
    return loaded.config, {"params": {"generator": params, "foresight": {}}, "ema": params}


def _check_same(
    field: str, path: str, config: GeneratorConfig, other: GeneratorConfig, names: tuple[str, ...]
) -> None:
    for name in names:
        mine, theirs = (getattr(made, name.removeprefix("model.")) for made in (config, other))
        require_same(field, path, name, mine, theirs)


def require_same(field: str, path: str, name: str, mine: Any, theirs: Any) -> None:
    if mine != theirs:
        raise ConfigError(
            f"{field} is {path!r}, whose {name} is {theirs}; it must be {mine}, as in this run"
        )


def _check_same_tokenizer(
    field: str, workdir: pathlib.Path, settings: Settings, params: Any
) -> None:
    """Compares codebooks, or the checksum that a run with another tokenizer has noted, if it has."""
    if settings.tokenizer.name == "patch":
        path = workdir / "tokenizer.npz"
        theirs = patch_codebook.load_params(path) if path.exists() else {}
        same = np.array_equal(theirs.get("codebook"), params["codebook"])
        advice = f"; copy {path} into this run's workdir before its start, or train both with the same data"
    else:
        path, advice = workdir / "parts.json", ""
        noted = json.loads(path.read_text()) if path.exists() else {}
        mine = pretrained.checksum(params)
        same = noted.get("tokenizer", mine) == mine
    if not same:
        raise ConfigError(
            f"{field} is {str(workdir)!r}, whose tokenizer is another one: its tokens mean something "
            f"else{advice}"
        )
