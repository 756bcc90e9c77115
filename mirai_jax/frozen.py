"""The parts of a run that are made once and never trained: fitting them, keeping them in files."""

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mirai_jax import config as config_lib
from mirai_jax import pretrained, torch_file
from mirai_jax.checkpoint import Checkpoints
from mirai_jax.config import Settings
from mirai_jax.errors import ConfigError, first_line
from mirai_jax.models import teacher, tokenizer
from mirai_jax.models.generator import GeneratorConfig

# K-means over more patches than this changes the codebook's error by under a percent.
_PATCHES_FITTED = 200_000


def fit_patch_codebook(
    images_NxHxWxC: np.ndarray, *, patch: int, vocab_size: int, seed: int
) -> dict[str, np.ndarray]:
    """Fits the parameters of `tokenizer.PatchCodebook` by k-means.

    The same images and seed give the same codebook, bit for bit, on the same machine. Codes are
    numbered from the darkest prototype to the brightest.

    Args:
        images_NxHxWxC: uint8; height and width are multiples of `patch`.
        patch: side of a patch in pixels.
        vocab_size: number of prototypes V.
        seed: chooses the patches fitted and where k-means starts.

    Returns:
        {'codebook': float32 (V, patch * patch * C)}, in the units of images in [-1, 1].

    Raises:
        ValueError: fewer distinct patches than `vocab_size`, or patches that do not tile.
    """
    height, width = images_NxHxWxC.shape[1:3]
    if height % patch or width % patch:
        raise ValueError(
            f"image size {height}x{width} does not divide into patches of {patch}x{patch} pixels"
        )
    patches = tokenizer.unfold(images_NxHxWxC, patch)
    patches = patches.reshape(-1, patches.shape[-1])
    rng = np.random.RandomState(seed)  # its stream never changes between numpy versions
    some = patches
    if len(patches) > _PATCHES_FITTED:
        some = patches[rng.choice(len(patches), _PATCHES_FITTED, replace=False)]
    distinct, counts = _count_distinct(some)
    if len(distinct) < vocab_size and some is not patches:
        distinct, counts = _count_distinct(patches)
    if len(distinct) < vocab_size:
        raise ValueError(
            f"model.vocab_size {vocab_size} is too large: the images have only "
            f"{len(distinct)} distinct {patch}x{patch} patches"
        )
    codebook = _kmeans(tokenizer.to_unit(distinct), counts, vocab_size, rng.randint(2**31 - 1))
    order = np.argsort(codebook.mean(axis=1), kind="stable")
    return {"codebook": codebook[order]}


def _count_distinct(patches_NxP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows of uint8 patches and how often each occurs: most are blank, fit those once."""
    rows = np.ascontiguousarray(patches_NxP)
    whole = rows.view(f"V{rows.shape[1]}").ravel()
    distinct, counts = np.unique(whole, return_counts=True)
    return distinct.view(np.uint8).reshape(-1, rows.shape[1]), counts


def _kmeans(points_NxP: np.ndarray, counts_N: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans  # here: slow to import, and only a first run fits
    from threadpoolctl import threadpool_limits

    # One thread: several add up their partial sums in an order that varies from run to run.
    with threadpool_limits(1):
        fitted = KMeans(clusters, n_init=1, max_iter=40, random_state=seed).fit(
            points_NxP, sample_weight=counts_N
        )
    return fitted.cluster_centers_.astype(np.float32)


def save_params(path: str | os.PathLike[str], params: dict[str, Any]) -> None:
    """Saves a nested dict of arrays as .npz under names like 'a/b/kernel', whole or not at all."""
    arrays = {
        name: np.asarray(array)
        for name, array in traverse_util.flatten_dict(params, sep="/").items()
    }
    for name, array in arrays.items():
        if array.dtype.kind == "V":  # bfloat16: .npz would give it back as raw bytes
            raise ValueError(f"parameter {name} is {array.dtype}, which .npz cannot keep")
    path = pathlib.Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            np.savez(file, **arrays)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_params(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads what `save_params` saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged.
    """
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return traverse_util.unflatten_dict(dict(arrays), sep="/")
        except Exception as error:
            raise ValueError(f"{path}: damaged parameter file") from error


# Building a run's frozen parts --------------------------------------------------------------------


def make_tokenizer(
    settings: Settings, images_NxHxWxC: np.ndarray, path: pathlib.Path
) -> tuple[tokenizer.PatchCodebook, dict[str, np.ndarray]]:
    """The run's patch codebook: read from `path`, or fitted to the images. Nothing is written.

    Raises:
        ConfigError: the file is damaged or of another codebook.
    """
    module = tokenizer.PatchCodebook(
        vocab_size=settings.generator.vocab_size,
        image_size=images_NxHxWxC.shape[1:3],
        patch=settings.tokenizer.patch,
        channels=images_NxHxWxC.shape[-1],
    )
    if path.exists():
        try:
            params = load_params(path)
        except ValueError as error:
            raise ConfigError(f"{error}; remove it to fit the tokenizer again") from error
        shape = (settings.generator.vocab_size, settings.tokenizer.patch**2 * module.channels)
        codebook = params.get("codebook", np.zeros(0))
        if codebook.shape != shape or not np.isfinite(codebook).all():
            raise ConfigError(
                f"{path} does not hold this run's codebook: {codebook.shape}, should be {shape} "
                "finite numbers; remove it to fit the tokenizer again"
            )
        return module, params
    try:
        return module, fit_patch_codebook(
            images_NxHxWxC,
            patch=settings.tokenizer.patch,
            vocab_size=settings.generator.vocab_size,
            seed=settings.seed,
        )
    except ValueError as error:
        raise ConfigError(first_line(error)) from error


def encode_images(
    module: tokenizer.Tokenizer, params: Any, images_NxHxWxC: np.ndarray, chunk: int = 500
) -> np.ndarray:
    """uint8 images -> int32 codes (N, L), `chunk` images at a time."""
    encode = jax.jit(lambda x: module.apply({"params": params}, x, method="encode"))
    starts = range(0, len(images_NxHxWxC), chunk)
    return np.concatenate(
        [np.asarray(encode(tokenizer.to_unit(images_NxHxWxC[i : i + chunk]))) for i in starts]
    )


def decode_codes(module: tokenizer.Tokenizer, params: Any, codes_BxL: jax.Array) -> np.ndarray:
    """Codes -> uint8 images (B, H, W, C)."""
    images = module.apply({"params": params}, jnp.asarray(codes_BxL), method="decode")
    return np.asarray(tokenizer.to_uint8(images))


def make_teacher(settings: Settings) -> tuple[teacher.EfficientNetTeacher, Any]:
    """The bidirectional teacher of the config and its parameters.

    Raises:
        ConfigError: its weights are not there or not readable.
    """
    module = teacher.EfficientNetTeacher(
        grid=settings.generator.grid,
        image_size=settings.teacher.image_size,
        stage=settings.teacher.stage,
        dtype=settings.teacher.dtype,
    )
    try:
        return module, {"network": pretrained.load_efficientnet_lite0()}
    except (ModuleNotFoundError, torch_file.TorchFileError) as error:
        raise ConfigError(f"teacher.name {settings.teacher.name!r}: {error}") from error


def load_generator(
    field: str, workdir: str, settings: Settings, tokenizer_params: Any
) -> tuple[GeneratorConfig, Any]:
    """The EMA generator of a finished or running workdir, as a static teacher.

    Args:
        field: the config field that names the workdir, for messages.
        workdir: holds config.json and checkpoints/.
        settings: of the run that will use it; tokens and classes must be the same.
        tokenizer_params: of that run, or None.

    Raises:
        ConfigError: no such run, no checkpoint, or other tokens.
    """
    folder = pathlib.Path(workdir)
    try:
        raw = json.loads((folder / "config.json").read_text())
        # Its mesh is of no interest here: one device satisfies any other check.
        raw["mesh"] = dict(data=1, fsdp=1, tensor=1)
        other = config_lib.read(raw, num_devices=1)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{field} is {workdir!r}, not the workdir of a run ({error})") from error
    mine, theirs = settings.generator, other.generator
    for name in ("grid", "vocab_size", "num_classes"):
        if getattr(mine, name) != getattr(theirs, name):
            raise ConfigError(
                f"{field} is {workdir!r}, whose model.{name} is {getattr(theirs, name)}; it must "
                f"be {getattr(mine, name)}, as in this run"
            )
    if tokenizer_params is not None:
        path = folder / "tokenizer.npz"
        try:
            theirs_too = load_params(path) if path.exists() else {}
        except ValueError as error:
            raise ConfigError(f"{field} is {workdir!r}: {error}") from error
        if not np.array_equal(theirs_too.get("codebook"), tokenizer_params["codebook"]):
            raise ConfigError(
                f"{field} is {workdir!r}, whose tokenizer is another one: its tokens mean something "
                f"else; copy {path} into this run's workdir before its start, or train both with "
                "the same data and seed"
            )
    if not (folder / "checkpoints").is_dir():
        raise ConfigError(f"{field} is {workdir!r}, a run without a checkpoint yet")
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        return theirs, checkpoints.restore_ema()
    finally:
        checkpoints.close()
