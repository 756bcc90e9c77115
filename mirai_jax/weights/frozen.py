"""The parts of a run that are never trained: its tokenizer and its bidirectional teacher."""

import dataclasses
import importlib
import pathlib
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from mirai_jax.config.fields import fill
from mirai_jax.config.schema import SMALL_SETS, Settings
from mirai_jax.models import teacher, tokenizer, vit, vq
from mirai_jax.models.vit_sizes import PUBLISHED
from mirai_jax.utils import paths
from mirai_jax.utils.errors import ConfigError, first_line
from mirai_jax.weights import efficientnet, patch_codebook, pretrained

# Not the run's: runs of several seeds share their tokens, so that their losses can be compared.
_CODEBOOK_SEED = 0


def make_codebook(
    vocab_size: int, patch: int, images_NxHxWxC: np.ndarray, path: pathlib.Path
) -> tuple[tokenizer.PatchCodebook, dict[str, np.ndarray]]:
    """A run's patch codebook: read from `path`, or fitted to the images. Nothing is written.

    Raises:
        ConfigError: the file is damaged or of another codebook, or the images do not suffice.
    """
    _, *size, channels = images_NxHxWxC.shape
    module = tokenizer.PatchCodebook(vocab_size, tuple(size), patch, channels)
    if not path.exists():
        return module, patch_codebook.fit_patch_codebook(
            images_NxHxWxC, patch=patch, vocab_size=vocab_size, seed=_CODEBOOK_SEED
        )
    params = patch_codebook.load_params(path)
    shape = (vocab_size, patch**2 * module.channels)
    rows = params.get("codebook", np.zeros(0))
    if rows.shape != shape or not np.isfinite(rows).all():
        raise ConfigError(
            f"{path} does not hold this run's codebook: {rows.shape}, should be {shape} "
            "finite numbers; remove it to fit the tokenizer again"
        )
    return module, params


def load_codebook(settings: Settings, workdir: str) -> tuple[tokenizer.PatchCodebook, Any]:
    """The patch codebook that a run fitted.

    Raises:
        ConfigError: it is not there, or damaged.
    """
    path = paths.at(workdir) / "tokenizer.npz"
    params = patch_codebook.load_params(path)
    if np.ndim(params.get("codebook")) != 2:
        raise ConfigError(f"{path} holds no codebook")
    vocab_size, numbers = params["codebook"].shape
    sides, patch = settings.tokenizer.sides, settings.tokenizer.patch
    return tokenizer.PatchCodebook(vocab_size, sides, patch, numbers // patch**2), params


def load_vq_file(
    field: str, path: str, grid: tuple[int, int] | None = None
) -> tuple[vq.VQModel, Any]:
    """A convolutional tokenizer, float32; `grid` in tokens if its images are not square.

    Raises:
        ConfigError: no such file, or another network.
    """
    loaded = pretrained.load(field, path, "tokenizer")
    decoded = grid if grid and grid[0] != grid[1] else None
    return vq.VQModel(loaded.config, decoded=decoded), pretrained.float32(loaded.params)


def load_vq(settings: Settings) -> tuple[vq.VQModel, Any]:
    """The convolutional tokenizer of `tokenizer.path`.

    Raises:
        ConfigError: no such file, another network, or another vocabulary.
    """
    name, path, grid = settings.tokenizer.name, settings.tokenizer.path, settings.generator.grid
    module, params = load_vq_file("tokenizer.path", path, grid)
    config, channels = module.config, 1 if settings.data.name in SMALL_SETS else 3
    if vq.MULTIPLIERS.get(name, config.multipliers) != config.multipliers:
        raise ConfigError(f"tokenizer.path is {path!r}, no {name} but {config}")
    if config.channels != channels:
        raise ConfigError(
            f"tokenizer.path is {path!r}, of {config.channels} channels; the images have {channels}"
        )
    if tuple(config.downsample * tokens for tokens in grid) != settings.tokenizer.sides:
        raise ConfigError(
            f"model.grid is {grid}; it must be of tokens of {config.downsample} pixels (those of "
            f"{path}) on tokenizer.image_size={settings.tokenizer.image_size}"
        )
    if config.vocab_size != settings.generator.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {settings.generator.vocab_size}; it must be "
            f"{config.vocab_size}, the codes of {path}"
        )
    return module, params


def load_tokenizer(settings: Settings, workdir: str) -> tuple[nn.Module, Any]:
    """A run's tokenizer: the codebook that it fitted, or that of `tokenizer.path`.

    Raises:
        ConfigError: as the two above.
    """
    if settings.tokenizer.name == "patch":
        return load_codebook(settings, workdir)
    return load_vq(settings)


def make_teacher(settings: Settings) -> tuple[nn.Module, Any]:
    """The bidirectional teacher of the config and its parameters.

    Raises:
        ConfigError: its weights are not there, not readable or of another network.
    """
    wanted = settings.teacher
    if wanted.name == "efficientnet_lite0":
        module = teacher.EfficientNetTeacher(
            grid=settings.generator.grid,
            image_size=wanted.image_size,
            stage=wanted.stage,
            dtype=wanted.dtype,
            zscore=wanted.zscore,
        )
        return module, {"network": efficientnet.load_efficientnet_lite0()}
    if ":" in wanted.name:
        return _own_teacher(settings)
    loaded = pretrained.load("teacher.path", wanted.path, "teacher")
    config = loaded.config
    if wanted.name in PUBLISHED:
        # DINOv3's SAT-493M has one more norm than LVD-1689M, which takes no part.
        same = dataclasses.replace(config, local_cls_norm=False) == PUBLISHED[wanted.name]
    else:
        same = config.family == wanted.name
    if not same:
        raise ConfigError(f"teacher.path is {wanted.path!r}, no {wanted.name} but a {config}")
    module = _vit_teacher(settings, config)
    shown, learned = max(module.patches) * config.patch, loaded.source.get("image_size")
    if learned not in (None, str(shown)):  # of `mirai_jax.teach`, which has seen no other size
        raise ConfigError(
            f"teacher.image_size is {wanted.image_size}, which shows {shown} pixels a side; it must "
            f"be {learned}, as of the teacher's run"
        )
    data, source = settings.data, loaded.source
    if source.get("data") == data.name and source.get("held_out") != str(data.held_out):
        raise ConfigError(  # the teacher has learned from images that this run holds out
            f"data.held_out is {data.held_out}; it must be {source.get('held_out')}, as of the teacher"
        )
    return module, {"network": pretrained.float32(loaded.params)}


def _own_teacher(settings: Settings) -> tuple[teacher.OwnTeacher, Any]:
    """Imports the module that `teacher.name` names, and no other of the user's."""
    wanted = settings.teacher
    module, _, name = wanted.name.partition(":")
    try:
        loader = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"teacher.name is {wanted.name!r}: {first_line(error)}") from error
    network, params = loader.load(wanted.path)
    return teacher.OwnTeacher(settings.generator.grid, network, wanted.zscore), {"network": params}


def teacher_shapes(settings: Settings) -> tuple[nn.Module, Any]:
    """`make_teacher` without the weights, where the name alone fixes their shapes.

    Raises:
        ConfigError: it does not, and the weights cannot be read.
    """
    if settings.teacher.name not in PUBLISHED:
        return make_teacher(settings)
    module = _vit_teacher(settings, PUBLISHED[settings.teacher.name])
    image = jax.ShapeDtypeStruct((1, *settings.tokenizer.sides, 3), np.uint8)
    return module, jax.eval_shape(module.init, jax.random.key(0), image)["params"]


def _vit_teacher(settings: Settings, config: vit.VitConfig) -> teacher.VitTeacher:
    """Raises ConfigError if the network has not what the fields ask for."""
    wanted, depth = settings.teacher, config.num_layers
    if wanted.image_size % config.patch:
        raise ConfigError(
            f"teacher.image_size is {wanted.image_size}, no multiple of {config.patch}"
        )
    if wanted.layer > depth:
        raise ConfigError(f"teacher.layer is {wanted.layer}; it must be 0 to {depth}")
    if wanted.last > (wanted.layer or depth):
        raise ConfigError(
            f"teacher.last is {wanted.last}; it must be 1 to {wanted.layer or depth}, the blocks there are"
        )
    return fill(
        teacher.VitTeacher,
        wanted,
        grid=settings.generator.grid,
        config=config,
        norm=wanted.norm == "final" or (wanted.norm == "auto" and config.family != "mae"),
        attention=settings.generator.attention,
    )
