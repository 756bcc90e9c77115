"""Reading other runs: their configs, checkpoints and generators."""

import json
import pathlib
from typing import Any

import numpy as np

from mirai_jax.config import schema
from mirai_jax.config.schema import Settings
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.training.checkpoint import restore_weights
from mirai_jax.utils.errors import ConfigError, first_line
from mirai_jax.weights import patch_codebook, pretrained


def read_settings(field: str, workdir: str) -> Settings:
    """The config of a workdir.

    Raises:
        ConfigError: it is not the workdir of a run.
    """
    try:
        raw = json.loads((pathlib.Path(workdir).expanduser() / "config.json").read_text())
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
        Its settings; {'params': {'generator', 'foresight'}, 'ema'} as host arrays; its step.

    Raises:
        ConfigError: no such run, or no checkpoint.
    """
    settings = read_settings(field, workdir)
    folder = pathlib.Path(workdir).expanduser() / "checkpoints"
    return settings, *restore_weights(folder, step)


def load_initial(settings: Settings, tokenizer_params: Any) -> dict[str, Any]:
    """The weights of `init_from`, for a run to begin with.

    Returns:
        {'params': {'generator', 'foresight'}, 'ema'} as host arrays; a file without more gives its
        generator as both, and {} as foresight.

    Raises:
        ConfigError: nothing of the kind, other tokens, or a generator of another shape.
    """
    path = settings.init_from
    config, saved = load_generator("init_from", path, settings, tokenizer_params)
    names = "num_layers", "num_heads", "width", "has_null_class"
    _check_same("init_from", path, settings.generator, config, names)
    return saved


def load_generator(
    field: str, path: str, settings: Settings, tokenizer_params: Any
) -> tuple[GeneratorConfig, dict[str, Any]]:
    """A generator's shapes and {'params', 'ema'}, of a workdir, a converted folder or a file.

    Args:
        field: the config field that names it, for messages.
        settings: of the run that will use it; tokens and classes must be the same.
        tokenizer_params: of that run's patch codebook, or None.

    Raises:
        ConfigError: nothing of the kind, or other tokens.
    """
    folder = pathlib.Path(path).expanduser()
    if not (folder / "config.json").exists():
        if tokenizer_params is not None:
            raise ConfigError(
                f"{field} is {path!r}; with data.name {settings.data.name!r} it must be a workdir, "
                "which knows its own patch codebook"
            )
        loaded = pretrained.load(field, path, "generator", grid=settings.generator.grid)
        config, params = loaded.config, pretrained.float32(loaded.params)
        saved = {"params": {"generator": params, "foresight": {}}, "ema": params}
    else:
        other, saved, _ = read_run(field, path)
        config = other.generator
        if tokenizer_params is not None:
            _check_same_codebook(field, folder, tokenizer_params)
    names = "model.grid", "model.vocab_size", "model.num_classes"
    _check_same(field, path, settings.generator, config, names)
    return config, saved


def _check_same(
    field: str, path: str, config: GeneratorConfig, other: GeneratorConfig, names: tuple[str, ...]
) -> None:
    for name in names:
        mine, theirs = (getattr(made, name.removeprefix("model.")) for made in (config, other))
        if mine != theirs:
            raise ConfigError(
                f"{field} is {path!r}, whose {name} is {theirs}; it must be {mine}, as in this run"
            )


def _check_same_codebook(field: str, workdir: pathlib.Path, params: Any) -> None:
    path = workdir / "tokenizer.npz"
    theirs = patch_codebook.load_params(path) if path.exists() else {}
    if not np.array_equal(theirs.get("codebook"), params["codebook"]):
        raise ConfigError(
            f"{field} is {str(workdir)!r}, whose tokenizer is another one: its tokens mean something "
            f"else; copy {path} into this run's workdir before its start, or train both with "
            "the same data"
        )
