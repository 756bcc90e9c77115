"""What a run is made of, except for its state: data, frozen networks, and the recipe of the step."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from mirai_jax import sharding
from mirai_jax.config.fields import fill
from mirai_jax.config.schema import SMALL_SETS, Settings
from mirai_jax.config.terms import two_thirds
from mirai_jax.data import folder_sets, folders, pipeline, records, small_sets
from mirai_jax.data.crops import CropSpec, RandomCrops, load_crop
from mirai_jax.data.images import ImageSource, open_images
from mirai_jax.data.small_sets import LabelledImages
from mirai_jax.models import batched
from mirai_jax.optimizer import trained
from mirai_jax.step import Recipe, init_params
from mirai_jax.training import restore, stored_codes
from mirai_jax.utils import distributed, progress
from mirai_jax.utils.errors import ConfigError, DataError
from mirai_jax.weights import frozen, pretrained

Log = Callable[[str], None]

_SOME = (
    4_000  # images on disk that a codebook of patches is fitted to, or held-out ones measured on
)


@dataclasses.dataclass(frozen=True)
class Components:
    """A run without its state.

    `images` is None where the data set is not held in memory, `tokenizer` where nothing decodes.
    """

    settings: Settings
    recipe: Recipe
    images: LabelledImages | None
    class_names: tuple[str, ...]
    tokenizer: nn.Module | None
    tokenizer_params: Any
    frozen: Any  # parameters of teachers, and of an online tokenizer, as `train_step` takes them
    batches: pipeline.Batches
    identity: dict[str, str]  # of what files hold; see `workdir.check_same`
    held_out: records.CodeRecords | None  # stored codes that the run does not train on


def open_source(settings: Settings) -> ImageSource | None:
    """The images on disk that a run looks at, copied from a bucket and indexed where need be; or None.

    Raises:
        ConfigError, DataError: one line.
    """
    if settings.data.in_memory or not settings.step_sees_images:
        return None
    return open_images(settings.data.images).prepare()


def build(
    settings: Settings,
    mesh: Mesh,
    tokenizer_path: pathlib.Path,
    log: Log,
    on_disk: ImageSource | None,
    make_progress: progress.Maker,
) -> Components:
    """Reads the data, fits or loads the frozen parts and fixes the recipe. Nothing is written.

    All processes must call it; each will read the rows of a batch that `mesh` gives its devices.

    Args:
        on_disk: what `open_source` gave.
        make_progress: shows what is read and encoded.

    Raises:
        ConfigError, DataError: one line.
    """
    images = tokenizer = tokenizer_params = held_out = None
    if settings.data.in_memory:
        images = labelled_images(settings, "train", make_progress)
        for problem in images.unread[:3]:
            log(f"left out, for it cannot be read ({len(images.unread)} in all): {problem}")
    listed = images or (on_disk if settings.data.online else None)  # extract reports those of codes
    if line := folders.ignored(listed.skipped if listed else ()):
        log(line)
    if settings.tokenizer.name == "patch":
        some = images or _some_images(settings, "train", on_disk, make_progress)
        vocab_size, patch = settings.generator.vocab_size, settings.tokenizer.patch
        tokenizer, tokenizer_params = frozen.make_codebook(
            vocab_size, patch, some.images, tokenizer_path
        )
        # Fitted on each host: another processor may round another way.
        tokenizer_params = distributed.from_first(tokenizer_params)
        if settings.data.name not in SMALL_SETS and not settings.init_from:
            log(_better_tokenizer(settings))
    elif settings.tokenizer.path:
        tokenizer, tokenizer_params = frozen.load_vq(settings)
        log(f"tokenizer: {settings.tokenizer.name} of {settings.tokenizer.path}")
    teacher, frozen_params, identity = None, {}, {}
    if images is not None:
        identity["image_set"] = small_sets.checksum(images)
    if settings.needs_images:
        teacher, frozen_params["bidirectional"] = frozen.make_teacher(settings)
        # Here, for where its features are cached it is not kept.
        identity["bidirectional"] = pretrained.checksum(frozen_params["bidirectional"])
        log(f"teacher: {settings.teacher.name}, {teacher.feature_width} features a position")
    if settings.data.in_memory:
        load_crop, class_names = None, images.class_names
        parts = tokenizer, tokenizer_params, teacher, frozen_params
        source = _in_memory(settings, images, *parts, make_progress)
    else:
        parts = on_disk, tokenizer, tokenizer_params
        source, load_crop, class_names, held_out = _on_disk(settings, *parts, log, make_progress)
    if class_names and len(class_names) != settings.generator.num_classes:
        raise ConfigError(
            f"model.num_classes is {settings.generator.num_classes}; it must be "
            f"{len(class_names)}, the classes of {settings.data.name}"
        )
    if line := folders.surprise(class_names):
        log(line)
    if settings.data.online:
        frozen_params["tokenizer"] = tokenizer_params
    batches = pipeline.make_dataset(
        source,
        load_crop=load_crop,
        batch_size=settings.batch_size,
        seed=settings.seed,
        rows=sharding.local_rows(mesh, settings.batch_size),
        num_workers=settings.data.num_workers,
        flip=settings.data.flip or settings.data.in_memory,  # in memory are those to draw from
        balanced=settings.data.balanced,
    )
    log(
        f"data: {settings.data.name}, {len(source):,} images, {settings.generator.length} tokens "
        f"each, {settings.data.codes} codes"
    )
    terms, static = load_generators(settings, tokenizer_params, frozen_params, log)
    steps = pipeline.steps_per_epoch(len(source), settings.batch_size)
    online = tokenizer if settings.data.online else None
    recipe = make_recipe(settings, terms, static, teacher, online, steps)
    identity |= {
        name: pretrained.checksum(params)
        for name, params in {"tokenizer": tokenizer_params, **frozen_params}.items()
        if params is not None and name not in identity
    }
    identity["data"] = _data_identity(source, load_crop)
    if settings.data.online and (keys := load_crop.listing()):
        identity["image_keys"] = keys
    names = class_names or tuple(str(i) for i in range(settings.generator.num_classes))
    parts = recipe, images, names, tokenizer, tokenizer_params, frozen_params, batches, identity
    return Components(settings, *parts, held_out)


def make_recipe(
    settings: Settings,
    terms: tuple,
    static: tuple,
    teacher: nn.Module | None,
    tokenizer: nn.Module | None,
    steps_per_epoch: int,
) -> Recipe:
    """The step of a config; `terms` and `static` are those of `load_generators`."""
    recipe = fill(
        Recipe,
        settings,
        terms=terms,
        steps_per_epoch=steps_per_epoch,
        teacher=teacher,
        teacher_dtype=settings.teacher.dtype,
        pretrained_configs=static,
        tokenizer=tokenizer,
        skip_nonfinite=settings.nonfinite == "skip",
    )
    if settings.freeze:
        _check_freeze(recipe)
    return recipe


def _check_freeze(recipe: Recipe) -> None:
    """Raises ConfigError for a pattern that matches nothing, or where nothing is left to train."""
    params = jax.eval_shape(functools.partial(init_params, recipe), jax.random.key(0))
    count = lambda tree: len(jax.tree.leaves(tree))
    for pattern in recipe.freeze:
        if count(trained(params, (pattern,))) == count(params):
            raise ConfigError(
                f"freeze names {pattern!r}; it must match parameters, such as 'generator/layers/*', "
                "'generator/tok_embeddings/*' or 'generator/output/kernel'"
            )
    if not trained(params, recipe.frozen).get("generator"):
        raise ConfigError(
            f"freeze is {recipe.freeze}; it must leave some of the generator to train"
        )


def _data_identity(source: Any, load_crop: pipeline.CropLoader | None) -> str:
    """Of the records and their order: what is drawn at a step depends on both."""
    manifest = getattr(source, "manifest", None)
    if manifest is not None:
        message = manifest.to_dict()
    elif load_crop is not None:
        message = {"images": load_crop.describe()}
    else:
        message = {"records": len(source)}
    if share := getattr(source, "held_out_share", 0.0):
        message = {**message, "held_out_share": share}
    return hashlib.sha256(json.dumps(message, sort_keys=True).encode()).hexdigest()


def labelled_images(
    settings: Settings, split: str, make_progress: progress.Maker = progress.silent
) -> LabelledImages:
    """The image set of the config that is in memory; `split` is 'train' or 'held_out'."""
    data, sides = settings.data, settings.tokenizer.sides
    if data.name in SMALL_SETS:
        return small_sets.load_images(data.name, data.path, split, sides[0], data.held_out)
    grey = (
        settings.tokenizer.name == "patch"
    )  # others take colours, like those of mirai_jax.tokenize
    return folder_sets.load(
        data.images,
        crop_spec(settings),
        split,
        data.held_out_share,
        data.min_images,
        data.flip,
        grey,
        make_progress,
    )


def crop_spec(settings: Settings) -> CropSpec | RandomCrops:
    """The crops that a run cuts from images without stored codes."""
    data, sides = settings.data, settings.tokenizer.sides
    if data.crops == "random":
        return RandomCrops(sides, data.exif)
    return CropSpec(sides, data.crop_range, data.crops == "stored", data.exif)


def held_out_images(settings: Settings) -> LabelledImages | None:
    """Images that a run holds out, at most _SOME of those on disk; None where it holds out none."""
    if settings.data.in_memory:
        found = labelled_images(settings, "held_out")
        return found if len(found.labels) else None
    online = settings.data.online and settings.data.held_out_share
    return _some_images(settings, "held_out") if online else None


def _share(settings: Settings, images: ImageSource, which: str = "train") -> folder_sets.Share:
    """The images on disk that a run without stored codes trains on, or holds out."""
    data = settings.data
    share = folder_sets.whole(images, data.min_images, data.balanced)
    return folder_sets.split(images, share, data.held_out_share, which)


def _some_images(
    settings: Settings,
    which: str = "train",
    images: ImageSource | None = None,
    make_progress: progress.Maker = progress.silent,
) -> LabelledImages:
    """Centre crops of some images on disk, evenly spread: enough to fit a codebook."""
    if images is None:
        images = open_images(settings.data.images)
        with contextlib.suppress(DataError):  # no room for copies: then by groups of rows, slowly
            images.prepare()
    share = _share(settings, images, which)
    spec = CropSpec(settings.tokenizer.sides, ten=False, exif=settings.data.exif)
    found, labels = [], []
    some = np.linspace(0, len(share) - 1, min(len(share), _SOME)).astype(int)
    for i in progress.counted(some, make_progress(len(some), "images read")):
        with contextlib.suppress(DataError):
            raw, label, _ = images.example(int(share.indices[i]))
            found.append(load_crop(raw, spec.centre, spec))
            labels.append(label if share.labels is None else share.labels[i])
    if not found:
        raise DataError(f"data.images is {settings.data.images!r}; it must hold images")
    return LabelledImages(np.stack(found), np.array(labels, np.int32), share.class_names)


def _better_tokenizer(settings: Settings) -> str:
    of = f"--config.data.images={settings.data.images}"
    if settings.tokenizer.sides != (32, 32):
        of += f' "--config.tokenizer.image_size={settings.tokenizer.sides}"'
    return (
        "tokenizer: a codebook of patches, fitted to the images; a trained one is better: python -m "
        f"mirai_jax.tokenize --config=configs/tokenizer.py:folder {of}; then add "
        "--config.tokenizer.name=vq --config.tokenizer.path=runs/tokenizer-folder"
    )


def _in_memory(
    settings: Settings,
    images: LabelledImages,
    tokenizer: nn.Module,
    tokenizer_params: Any,
    teacher: nn.Module | None,
    frozen_params: Any,
    make_progress: progress.Maker,
) -> records.CodedImages:
    codes = features = None
    pixels = images.images if images.crops is None else images.crops
    if not settings.data.online:
        with contextlib.closing(make_progress(len(pixels), "images encoded")) as shown:
            encode = functools.partial(batched.encode_images, advance=shown.advance)
            codes = encode(tokenizer, tokenizer_params, pixels)
    if settings.needs_images and settings.teacher.cached:
        # No longer needed in the step, so not on the devices either.
        params = frozen_params.pop("bidirectional")
        with contextlib.closing(make_progress(len(pixels), "images through the teacher")) as shown:
            features = batched.teacher_features(teacher, params, pixels, advance=shown.advance)
    pixels = pixels if settings.step_sees_images else None
    return records.CodedImages(codes, images.labels, pixels, features)


def _on_disk(
    settings: Settings,
    images: ImageSource | None,
    tokenizer: nn.Module | None,
    tokenizer_params: Any,
    log: Log,
    make_progress: progress.Maker,
) -> tuple[Any, pipeline.CropLoader | None, tuple[str, ...], records.CodeRecords | None]:
    """Of a large image set: the source, what loads crops if the step sees them, classes, held-out codes."""
    images = images if settings.step_sees_images else None
    if settings.data.online:
        spec, share = crop_spec(settings), _share(settings, images)
        source = pipeline.OnlineImages(images, spec, settings.generator.num_classes, share)
        return source, pipeline.CropLoader(images, spec), share.class_names, None
    source = records.CodeRecords(
        settings.data.path,
        grid=settings.generator.grid,
        vocab_size=settings.generator.vocab_size,
        num_classes=settings.generator.num_classes,
        make_progress=make_progress,
    )
    manifest, held_out = source.manifest, None
    if share := settings.data.held_out_share:
        log(f"reading the keys of {len(source):,} records, to hold out {share:g} of them")
        source, held_out = source.split(share, make_progress)
    if manifest is not None:
        stored_codes.check_manifest(settings, manifest, tokenizer_params)
    names = () if manifest is None else manifest.class_names
    if images is None:
        return source, None, names, held_out
    if manifest is None:
        raise ConfigError(
            f"data.path is {settings.data.path!r}; it must be a folder with the manifest.json of "
            "its extraction, which says which crops the codes are of: a teacher looks at them"
        )
    if manifest.images.get("kind") != "folder" and images.describe() != manifest.images:
        # Their keys are numbers: what they number must be the same. A folder's keys are its files.
        raise ConfigError(
            f"data.images is {settings.data.images!r}, {images.describe()}; the codes of "
            f"{settings.data.path} were made of {dict(manifest.images)}"
        )
    loader = pipeline.CropLoader(images, manifest.crops)
    parts = tokenizer, tokenizer_params, settings.data.images, log
    stored_codes.check_crops(source, loader, *parts)
    return source, loader, names, held_out


def load_generators(
    settings: Settings, tokenizer_params: Any, frozen_params: Any, log: Log
) -> tuple[tuple, tuple]:
    """The terms with their teacher layers fixed, and the shapes of the pretrained generators."""
    terms, static = list(settings.terms), []
    for name, path in settings.term_checkpoints:
        i = next(i for i, term in enumerate(terms) if term.name == name)
        field = f"foresight[{i}].checkpoint"
        config, saved = restore.load_generator(field, path, settings, tokenizer_params)
        frozen_params[name] = saved["ema"]
        layer = terms[i].teacher_layer or two_thirds(config.num_layers)
        if layer > config.num_layers:
            raise ConfigError(
                f"foresight[{i}].teacher_layer is {layer}; it must be a block of the pretrained "
                f"generator, 1 to {config.num_layers} (0: the default)"
            )
        terms[i] = dataclasses.replace(terms[i], teacher_layer=layer)
        static.append((name, config))
        log(f"teacher: generator of {path}, {config.num_layers} layers of {config.width}")
    return tuple(terms), tuple(static)
