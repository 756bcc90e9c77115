"""Records of codes, on disk (ArrayRecord shards) and in memory: what `pipeline.make_dataset` reads.

A record is a msgpack map {shape, codes, label, key}. Extraction writes shards of records, and
`CodeRecords` gives random access to a folder of shards; it checks each record when it reads it.
"""

import bisect
import copy
import errno
import functools
import glob
import itertools
import os
from collections.abc import Iterable
from concurrent import futures
from typing import Any

import grain
import msgpack
import numpy as np
from array_record.python import array_record_module

from mirai_jax.data import manifest
from mirai_jax.data.image_source import hashes_of
from mirai_jax.utils import files, paths, progress
from mirai_jax.utils.errors import DataError, Unreadable, first_line

SHARD_SUFFIXES = (".array_record", ".arrayrecord")


def pack_record(codes_CxL: np.ndarray, label: int, key: str) -> bytes:
    """Packs the codes of one image; `unpack_record` reads the bytes.

    Args:
        codes_CxL: uint16; the codes, in row-major order, of each of C crops of the image.
        label: class id, 0 or more.
        key: names the image, such as its file.
    """
    codes = np.asarray(codes_CxL)
    if codes.dtype != np.uint16 or codes.ndim != 2 or not codes.size or not 0 <= label < 2**31:
        raise DataError(
            f"record {key!r} has codes {codes.dtype} {codes.shape} and label {label}: allowed are "
            "uint16 (crops, length) and 0 to 2147483647"
        )
    fields = {"shape": list(codes.shape), "codes": codes.astype("<u2").tobytes()}
    return msgpack.packb({**fields, "label": int(label), "key": key})


def unpack_record(raw: bytes) -> dict[str, Any]:
    """Unpacks what `pack_record` packed.

    Returns:
        {'codes': uint16 (C, L), 'label': int, 'key': str}.

    Raises:
        DataError: the bytes are anything else.
    """
    try:
        record = msgpack.unpackb(raw)
        shape, codes, label, key = (record.pop(name) for name in ("shape", "codes", "label", "key"))
        array = np.frombuffer(codes, "<u2").reshape(shape).astype(np.uint16)
    except Exception as error:  # msgpack and NumPy raise half a dozen kinds on damaged bytes
        raise DataError(f"not a record of codes ({first_line(error)})") from error
    whole = not record and array.ndim == 2 and array.size and shape == list(array.shape)
    if not whole or type(label) is not int or not 0 <= label < 2**31 or type(key) is not str:
        raise DataError("damaged record of codes (its fields must be shape, codes, label and key)")
    return {"codes": array, "label": label, "key": key}


def write_shard(path: str | os.PathLike[str], records: Iterable[bytes]) -> int:
    """Writes packed records to one ArrayRecord file; returns how many.

    The file appears under its name only after it was read back whole.

    Raises:
        OSError: the file could not be written; nothing is left behind.
    """
    records = list(records)
    try:
        with files.atomic_path(path) as unfinished:
            # group_size:1, since training reads single records in random order.
            writer = array_record_module.ArrayRecordWriter(unfinished, "group_size:1")
            with files.closing(writer):
                for record in records:
                    writer.write(record)
            with files.closing(array_record_module.ArrayRecordReader(unfinished)) as reader:
                if records and reader.read_all() != records:
                    raise OSError(f"{path} does not hold what was written to it")
    except RuntimeError as error:  # the C++ writer's, of a full disk for example
        raise OSError(f"{path} cannot be written ({first_line(error)})") from error
    return len(records)


class CodeRecords:
    """Random access to ArrayRecord shards: {'codes': uint16 (C, L), 'label': int32, 'key': str}.

    Every record is checked when it is read. Pickles: worker processes reopen the files.

    Attributes:
        crops: C, how many crops every record stores.
        manifest: the folder's manifest, or None if there is no manifest.json.

    Args:
        path: a folder holding *.array_record files, or a glob pattern of files.
        grid: (height, width) of the token grid; a record's L must be height * width.
        vocab_size, num_classes: codes and labels must be below them.
        make_progress: shows how many shards are open; those of a bucket are copied first.

    Raises:
        DataError: there are no shards, a shard is damaged, or the first record does not fit.
    """

    def __init__(
        self,
        path: str,
        *,
        grid: tuple[int, int],
        vocab_size: int,
        num_classes: int,
        make_progress: progress.Maker = progress.silent,
    ):
        self.manifest = manifest.read(path) if path else None
        if self.manifest is not None:
            self.manifest.check_complete(path)
        found = _find_shards(path)
        self._path, self._grid = path, tuple(grid)
        self._vocab_size, self._num_classes = vocab_size, num_classes
        self._part: np.ndarray | None = None  # the records of a split
        self.held_out_share = 0.0  # of the split, which changes what is drawn
        with futures.ThreadPoolExecutor(16) as pool:  # many shards on network storage
            opened = pool.map(_open_shard, found)
            self._shards = list(progress.counted(opened, make_progress(len(found), "shards")))
        self._names = [os.path.basename(file) for file in found]
        # Record k is in the first shard whose running total exceeds k.
        self._totals = list(itertools.accumulate(len(shard) for shard in self._shards))
        if not len(self):
            raise DataError(f"data.path {path!r}: its {len(found)} shard(s) hold no record")
        if self.manifest is not None:
            lengths = map(len, self._shards)
            self.manifest.check_files(path, dict(zip(self._names, lengths, strict=True)))
        self.crops = None
        self.crops = len(self[0]["codes"])

    def split(
        self, held_out_share: float, make_progress: progress.Maker = progress.silent
    ) -> tuple["CodeRecords", "CodeRecords"]:
        """The records to train on, and those kept out of training.

        By the hash of their keys, as images of a folder (`folder_sets.split`): the codes of an image are
        held out where the image would be. (Not of tfds: and grain: with names: there the hash of an image
        is that of its number, and its key has the name as well.) Reads every record.

        Raises:
            DataError: a record is damaged, or one of the two has no record.
        """
        with futures.ThreadPoolExecutor(16) as pool:
            keys = pool.map(lambda index: self[index]["key"], range(len(self)))
            keys = progress.counted(keys, make_progress(len(self), "keys read"))
            below = hashes_of(keys) < np.uint64(int(held_out_share * 2**64))
        if below.all() or not below.any():
            raise DataError(
                f"data.held_out_share is {held_out_share}; it must leave and hold out some of the "
                f"{len(self):,} records of {self._path}"
            )

        def part(chosen: np.ndarray) -> "CodeRecords":
            made = copy.copy(self)
            made.held_out_share, made._part = held_out_share, np.flatnonzero(chosen)
            return made

        return part(~below), part(below)

    def __len__(self) -> int:
        return self._totals[-1] if self._part is None else len(self._part)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index = index if self._part is None else int(self._part[index])
        shard = bisect.bisect_right(self._totals, index)
        position = index - (self._totals[shard - 1] if shard else 0)
        where = f"data.path {self._path!r}: record {position} of {self._names[shard]}"
        try:
            read = functools.partial(_read, self._shards[shard], position)
            record = unpack_record(files.patiently(read))
        except (OSError, DataError) as error:
            raise Unreadable(f"{where}: {first_line(error)}") from error
        try:
            self._check(record)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        return {**record, "label": np.int32(record["label"])}

    def _check(self, record: dict[str, Any]) -> None:
        codes, label = record["codes"], record["label"]
        height, width = self._grid
        if codes.shape[1] != height * width:
            raise DataError(f"has {codes.shape[1]} codes a crop; model.grid is {height}x{width}")
        if self.crops is not None and len(codes) != self.crops:
            raise DataError(f"has {len(codes)} crops, the first record has {self.crops}")
        if codes.max() >= self._vocab_size:
            raise DataError(f"has code {codes.max()}; model.vocab_size is {self._vocab_size}")
        if label >= self._num_classes:
            raise DataError(f"has label {label}; model.num_classes is {self._num_classes}")


def _read(shard: Any, position: int) -> bytes:
    try:
        return shard[position]
    except RuntimeError as error:  # its C++ reader's
        line = first_line(error)
        # Damage stays; what storage refuses may be there at the next try.
        raise OSError(*[line] if "Corrupted" in line else [errno.EIO, line]) from error


def _find_shards(path: str) -> list[str]:
    """The shards of a folder or glob pattern, sorted by name."""
    expanded, where = os.path.expanduser(path), paths.at(path)
    if files.is_remote(where):
        folder, pattern = (where.parent, where.name) if "*" in where.name else (where, "*")
        found = [str(file) for file in folder.glob(pattern) if file.name.endswith(SHARD_SUFFIXES)]
    elif os.path.isdir(expanded):
        names = [name for name in os.listdir(expanded) if name.endswith(SHARD_SUFFIXES)]
        found = [os.path.join(expanded, name) for name in names]
    else:
        found = [file for file in glob.glob(expanded) if os.path.isfile(file)]
    if not found:
        raise DataError(
            f"data.path {path!r} holds no *.array_record file of codes: make them with "
            '"python -m mirai_jax.extract", then pass --config.data.path=FOLDER'
        )
    return sorted(found)


def _open_shard(file: str) -> grain.sources.ArrayRecordDataSource:
    # A copy also of gs://, which ArrayRecord reads: there a missing object is an empty shard, and every
    # record drawn is a request.
    local = os.fspath(paths.local(file))
    try:
        return grain.sources.ArrayRecordDataSource(local)
    except Exception as error:
        raise DataError(
            f"data.path {file!r} is not a whole ArrayRecord file ({first_line(error)})"
        ) from error


class CodedImages:
    """Labels in memory, with whichever of codes, images and teacher features a run needs.

    The other arrays hold K crops of each image, one image after the other, or are None. An item has
    'label': int32, 'key': its number as text, 'crops': K, and of what is given 'codes': (K, L), 'image':
    uint8 (K, H, W, C) and 'features': float32 (K, L, Z).
    """

    def __init__(
        self,
        codes_NKxL: np.ndarray | None,
        labels_N: np.ndarray,
        images_NKxHxWxC: np.ndarray | None = None,
        features_NKxLxZ: np.ndarray | None = None,
    ):
        self.labels = np.asarray(labels_N, np.int32)
        parts = {"codes": codes_NKxL, "image": images_NKxHxWxC, "features": features_NKxLxZ}
        self._parts = {k: np.asarray(part) for k, part in parts.items() if part is not None}
        self._crops = len(next(iter(self._parts.values()), labels_N)) // max(1, len(labels_N))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        item = {"crops": self._crops, "label": self.labels[index], "key": str(index)}
        rows = slice(index * self._crops, (index + 1) * self._crops)
        return item | {k: part[rows] for k, part in self._parts.items()}
