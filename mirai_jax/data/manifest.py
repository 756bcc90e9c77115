"""manifest.json of a folder of shards: what was extracted from what, and whether it is all there."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, get_origin

from mirai_jax.data.crops import CropSpec
from mirai_jax.utils import files, paths, trees
from mirai_jax.utils.errors import DataError, first_line
from mirai_jax.utils.files import AnyPath

FILE = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One whole ArrayRecord file."""

    name: str
    records: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What fixes the bytes of an extraction, and its result."""

    images: Mapping[str, Any]  # the source, as it describes itself, with its number of images
    crops: CropSpec
    tokenizer: Mapping[str, Any]  # {'checksum', 'file', 'multipliers', ...}
    grid: tuple[int, int]  # height and width of a crop in tokens
    vocab_size: int
    class_names: tuple[str, ...]  # one a label
    images_per_shard: int  # images of the source, in its order, that a shard covers
    batch_size: int  # images encoded together
    precision: str  # of the encoder's products
    complete: bool = False  # all shards are written; until then the fields below are empty
    num_records: int = 0
    num_failed: int = 0  # images that are not in the shards; report.json lists them
    shards: tuple[Shard, ...] = ()

    def differences(self, other: "Manifest") -> list[str]:
        """The fields that fix the bytes and differ: 'crops.crop_range was ..., is ...'."""
        mine, theirs = _bytes_fixed_by(self), _bytes_fixed_by(other)
        if "images.keys" not in mine:  # of a version that did not keep it
            theirs.pop("images.keys", None)
        names = [name for name in mine | theirs if mine.get(name) != theirs.get(name)]
        return [f"{name} was {mine.get(name)!r}, is {theirs.get(name)!r}" for name in names]

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def check_complete(self, path: str) -> None:
        """Raises DataError unless the extraction has ended."""
        if not self.complete:
            raise DataError(
                f"data.path {path!r} is an extraction that has not ended: start the same "
                '"python -m mirai_jax.extract" again, and it resumes'
            )

    def check_files(self, path: str, records: Mapping[str, int]) -> None:
        """Raises DataError unless `records`, {file: its number of records}, are the shards."""
        wanted = {shard.name: shard.records for shard in self.shards}
        missing, others = sorted(wanted.keys() - records), sorted(records.keys() - wanted)
        if missing or others:
            wrong = [f"{len(missing)} missing, such as {missing[0]}"] if missing else []
            wrong += [f"{len(others)} of another, such as {others[0]}"] if others else []
            raise DataError(f"{path} must hold {len(wanted)} shards: {'; '.join(wrong)}")
        if differ := [name for name, count in wanted.items() if records[name] != count]:
            raise DataError(f"{path}: {differ[0]} must hold {wanted[differ[0]]} records")


def _bytes_fixed_by(manifest: Manifest) -> dict[str, Any]:
    """{'a.b': value} without the result, and without names of what checksums and keys identify."""
    tree = manifest.to_dict()
    for name in ("complete", "num_records", "num_failed", "shards"):
        del tree[name]
    tree["tokenizer"].pop("file", None)
    if tree["images"].get("kind") == "folder":
        tree["images"].pop("name", None)
    return trees.flat(tree)


def from_dict(tree: Any) -> Manifest:
    """Raises DataError for anything that `to_dict` does not give."""
    try:
        parts = {
            "crops": CropSpec.from_dict(tree["crops"]),
            "grid": tuple(tree["grid"]),
            "class_names": tuple(tree["class_names"]),
            "shards": tuple(Shard(**shard) for shard in tree["shards"]),
        }
        made = Manifest(**(tree | parts))
    except (DataError, TypeError, KeyError) as error:
        raise DataError(f"not a manifest ({first_line(error):.300})") from error
    for part in (made, *made.shards):
        for field in dataclasses.fields(part):
            value, kind = getattr(part, field.name), get_origin(field.type) or field.type
            if not isinstance(value, kind) or (kind is int and type(value) is not int):
                raise DataError(f"not a manifest ({field.name} is {value!r:.100})")
    kinds = [type(value) for value in made.grid + made.class_names]
    if kinds != [int, int] + [str] * len(made.class_names) or made.to_dict() != tree:
        raise DataError(f"not a manifest (fields {', '.join(made.to_dict())} are wanted)")
    return made


def read(folder: AnyPath) -> Manifest | None:
    """The manifest of a folder; None if it has none. Raises DataError if it is damaged."""
    try:
        file = paths.at(folder) / FILE
        return from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:  # DataError is a ValueError
        raise DataError(f"{file} cannot be read ({first_line(error)})") from error


def write(folder: AnyPath, manifest: Manifest) -> None:
    """Writes the manifest, whole or not at all."""
    text = json.dumps(manifest.to_dict(), indent=1) + "\n"
    files.write_text(paths.at(folder) / FILE, text)
