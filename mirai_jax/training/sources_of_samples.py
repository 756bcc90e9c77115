"""What can be sampled from: a run's checkpoint, or a generator and a tokenizer from files."""

import contextlib
import dataclasses
import json
import os
from typing import Any

from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.sampling.painter import Source
from mirai_jax.training import restore
from mirai_jax.utils import paths
from mirai_jax.utils.errors import ConfigError
from mirai_jax.weights import frozen, pretrained


def of_workdir(
    workdir: str, step: int | None = None, state: str = "ema", tokenizer_path: str | None = None
) -> Source:
    """A run's generator and tokenizer.

    Args:
        step: of the checkpoint; None: the newest.
        state: 'ema' or 'model', which of its weights.
        tokenizer_path: weights of a VQ tokenizer in place of those that the run's config names.

    Raises:
        ConfigError: no such run, checkpoint or tokenizer.
    """
    settings, saved, step = restore.read_run("--workdir", workdir, step)
    params = saved["ema"] if state == "ema" else saved["params"]["generator"]
    if settings.tokenizer.name == "patch":
        if tokenizer_path:
            raise ConfigError(f"--tokenizer is {tokenizer_path!r}; {workdir} has its own")
        tokenizer = frozen.load_codebook(settings, workdir)
    else:
        path = tokenizer_path or settings.tokenizer.path
        if not path:
            raise ConfigError(
                f"--tokenizer is missing and the run {workdir} names none: it must be the weights "
                f"of {settings.tokenizer.name}"
            )
        wanted = dataclasses.replace(settings.tokenizer, path=path)
        tokenizer = frozen.load_vq(dataclasses.replace(settings, tokenizer=wanted))
    about = {"workdir": os.path.basename(os.path.abspath(workdir)), "step": step, "state": state}
    with contextlib.suppress(FileNotFoundError, ValueError):  # runs of earlier versions have none
        file = paths.at(workdir) / "classes.json"
        about["class_names"] = json.loads(file.read_text())
    return _source(settings.generator, params, *tokenizer, about)


def of_checkpoint(path: str, tokenizer_path: str | None, grid: int = 0) -> Source:
    """A converted or PyTorch generator with a VQ tokenizer.

    Args:
        grid: tokens a side of a PyTorch file's generator; 0: see `weights.token_grid`.

    Raises:
        ConfigError: no such files, or they do not belong together.
    """
    if not tokenizer_path:
        raise ConfigError("--tokenizer is missing; with --checkpoint it must be the VQ's weights")
    sides = pretrained.token_grid(grid, {}) if grid else None
    loaded = pretrained.load("--checkpoint", path, "generator", grid=sides)
    if sides not in (None, loaded.config.grid):
        raise ConfigError(f"--grid is {grid}; {path} knows its own, {loaded.config.grid}")
    shape = loaded.config.grid
    tokenizer, tokenizer_params = frozen.load_vq_file("--tokenizer", tokenizer_path, shape)
    if tokenizer.vocab_size != loaded.config.vocab_size:
        raise ConfigError(
            f"--tokenizer is {tokenizer_path!r}, which has {tokenizer.vocab_size} codes; the "
            f"generator has {loaded.config.vocab_size}"
        )
    if loaded.source.get("grid") == "assumed":
        pixels = tokenizer.config.downsample * loaded.config.grid[0]
        print(
            f"{path} does not name its grid: 16 x 16 tokens are assumed, which are images of "
            f"{pixels} x {pixels} (--grid=N sets another)",
            flush=True,
        )
    about = {"checkpoint": os.path.basename(path), "entry": loaded.source.get("entry", "")}
    about["grid"] = list(loaded.config.grid)
    params = pretrained.float32(loaded.params)
    return _source(loaded.config, params, tokenizer, tokenizer_params, about)


def _source(
    config: GeneratorConfig, params: Any, tokenizer: Any, tokenizer_params: Any, about: dict
) -> Source:
    checksums = {
        "weights_sha256": pretrained.checksum(params),
        "tokenizer_sha256": pretrained.checksum(tokenizer_params),
    }
    return Source(config, params, tokenizer, tokenizer_params, about | checksums)
