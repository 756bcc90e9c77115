"""An extraction: what it is made from, which shards it has, and which of them are done."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mirai_jax.data import folders, manifest
from mirai_jax.data.crops import CropSpec, load_all_crops, sides
from mirai_jax.data.images import ImageSource, open_images
from mirai_jax.data.manifest import Manifest
from mirai_jax.extraction import codes as given_codes
from mirai_jax.extraction.codes import GivenCodes, read_codes
from mirai_jax.models import vq
from mirai_jax.utils import paths
from mirai_jax.utils.errors import ConfigError, DataError, first_line
from mirai_jax.weights import pretrained

PARTS = "parts"  # folder with a JSON file for each finished shard, until all shards are finished


@dataclasses.dataclass(frozen=True)
class ExtractionJob:
    """An extraction, the same for all hosts that share it."""

    images: ImageSource | None  # None: of `codes`, they are not known
    codes: GivenCodes | None  # made elsewhere; None: they are made here
    module: vq.VQModel | None  # the tokenizer; None: of `codes`, it has a name alone
    params: Any  # its parameters, float32
    manifest: Manifest  # complete once all shards are finished
    out: pathlib.Path  # folder of the shards
    num_workers: int  # decoding threads

    @property
    def count(self) -> int:
        return len(self.images) if self.codes is None else self.codes.count

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.manifest.images_per_shard)

    def shard_name(self, k: int) -> str:
        return f"codes-{k:05d}-of-{self.num_shards:05d}.array_record"

    def indices(self, k: int) -> range:
        """The numbers of the images of shard k."""
        size = self.manifest.images_per_shard
        return range(k * size, min((k + 1) * size, self.count))

    def part_file(self, k: int) -> pathlib.Path:
        return self.out / PARTS / f"{k:05d}.json"

    def part(self, k: int) -> dict[str, Any] | None:
        """What was noted about shard k when it was finished; None if it is not finished."""
        if not (self.out / self.shard_name(k)).is_file():
            return None
        try:
            return json.loads(self.part_file(k).read_text())
        except (FileNotFoundError, ValueError):
            return None


def prepare(
    images: str,
    tokenizer_path: str,
    out: str,
    crops: CropSpec,
    *,
    codes: str = "",
    images_per_shard: int = 4096,
    batch_size: int = 4,
    precision: str = "float32",
    num_workers: int = 4,
) -> ExtractionJob:
    """Opens the source and the tokenizer; writes the manifest of `out`, or checks the one there.

    Args:
        codes: where codes made elsewhere are; then `tokenizer_path` may be one of `codes.NAMED`, and
            `images` may be ''. See `codes.open_codes`.

    Raises:
        ConfigError, DataError: a wrong field or input; nothing was written.
    """
    module = params = None
    if codes and tokenizer_path in given_codes.NAMED:
        about, (vocab_size, pixels) = {"file": tokenizer_path}, given_codes.NAMED[tokenizer_path]
        grid = tuple(side // pixels for side in sides(crops.image_size))
    else:
        module, params, about = _load_tokenizer(tokenizer_path, crops, precision)
        grid, vocab_size = module.decoded, module.vocab_size
    source = open_images(images) if images else None
    given = given_codes.open_codes(codes, source, crops.ten) if codes else None
    if given is not None:
        read = lambda index: read_codes(given, index, grid, vocab_size)
        _check(f"--codes is {codes!r}", given.count, read, most=0.5)
    else:
        read = lambda index: load_all_crops(source.example(index)[0], crops)
        _check(f"--images is {images!r}", len(source), read, most=0.99)
    keys, class_names = ("", ()) if source is None else (source.listing(), source.class_names)
    planned = Manifest(
        images=(given if source is None else source).describe() | ({"keys": keys} if keys else {}),
        crops=crops,
        tokenizer=about,
        grid=grid,
        vocab_size=vocab_size,
        class_names=tuple(class_names),
        images_per_shard=images_per_shard,
        batch_size=batch_size,
        precision=precision,
    )
    if line := folders.surprise(class_names):
        print(line, flush=True)
    folder = paths.at(out)
    if keys and paths.is_inside(folder, paths.at(images)):
        raise ConfigError(
            f"--out is {out!r}, inside --images: it would be read as one of its classes"
        )
    found = _found_or_written(folder, planned)
    if not found.complete:
        (folder / PARTS).mkdir(exist_ok=True)
    return ExtractionJob(source, given, module, params, found, folder, num_workers)


def _load_tokenizer(
    path: str, crops: CropSpec, precision: str
) -> tuple[vq.VQModel, Any, dict[str, Any]]:
    """The tokenizer for crops of a size, its parameters, and what the manifest says of it."""
    loaded = pretrained.load("--tokenizer", path, "tokenizer")
    module = vq.VQModel(loaded.config, precision=precision)
    params = pretrained.float32(loaded.params)
    try:
        module = module.clone(decoded=module.grid(sides(crops.image_size)))
    except ValueError as error:
        raise ConfigError(f"--image_size is {crops.image_size}: {error}") from error
    if module.vocab_size > 2**16 or loaded.config.channels != 3:
        raise ConfigError(
            f"--tokenizer has {module.vocab_size} codes of {loaded.config.channels} channels; it "
            "must have at most 65536, of 3"
        )
    about = {"checksum": pretrained.checksum(params), "file": loaded.source["file"]}
    return module, params, about | dataclasses.asdict(loaded.config)


def _check(what: str, count: int, read: Callable[[int], Any], most: float) -> None:
    """Raises DataError if `read` does for more than this share of some records or images."""
    if not count:
        raise DataError(f"{what}, which holds none")
    some, wrong = np.unique(np.linspace(0, count - 1, 16).astype(int)), []
    for index in map(int, some):
        try:
            read(index)
        except DataError as error:
            wrong.append(error)
    if len(wrong) > most * len(some):
        raise DataError(f"{what}: {first_line(wrong[0])}") from wrong[0]


def _found_or_written(folder: pathlib.Path, planned: Manifest) -> Manifest:
    """The manifest of an extraction that this one continues, or `planned`, written."""
    found = manifest.read(folder)
    has_shards = folder.is_dir() and any(folder.glob("*.array_record"))
    if found is None and has_shards:
        raise ConfigError(f"--out is {str(folder)!r}, which holds shards without a manifest.json")
    if found is not None:
        changed = found.differences(planned)
        if not changed:
            return found
        if has_shards or any((folder / PARTS).glob("*.json")):
            raise ConfigError(
                f"--out is {str(folder)!r}, an extraction of something else: "
                f"{'; '.join(changed)[:1000]}"
            )
    folder.mkdir(parents=True, exist_ok=True)  # nothing was finished: out of memory, perhaps
    manifest.write(folder, planned)
    return manifest.from_dict(planned.to_dict())  # with lists, as another start reads it
