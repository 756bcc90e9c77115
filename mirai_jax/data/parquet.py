"""Parquet files in the layout of the Hugging Face Hub.

A parquet file is read by whole groups of rows, some hundred images: right for reading in order, far
too much for one image. So before images are drawn in shuffled order, `prepare` finds once where each
lies. A chunk that is not compressed has the bytes of its images as they are, and its index holds their
places in the file itself; the images of compressed chunks are copied beside the index.
"""

import contextlib
import functools
import json
import mmap
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from mirai_jax.data import packed
from mirai_jax.utils import cache, files
from mirai_jax.utils.errors import Damaged, DataError, Unreadable, first_line

_IN_FILE, _COPIED = 0, 1  # where an image is found; -1: by its group of rows alone
_BATCH = 64  # images decoded together while an index is made

# Types of columns, as pyarrow writes them.
_IMAGE = r"(large_)?binary|struct<(.*, )?bytes: (large_)?binary\b.*>"
_LABEL = r"u?int\d+|(large_)?string"

_reading = threading.Lock()


class ParquetImages(packed.PackedImages):
    """Rows with an `image`, {bytes, path} or bytes, and a `label`, a number or a class name.

    Class names are those of the Hub's features in the files' metadata.
    """

    kind = "parquet"

    def __init__(self, spec: str, paths: Sequence[str]):
        with futures.ThreadPoolExecutor(16) as pool:
            groups, names = zip(*pool.map(_open, paths), strict=True)
        named = {listed: path for listed, path in zip(names, paths, strict=True) if listed}
        if len(named) > 1:
            one, other, *_ = named.values()
            raise DataError(f"images {spec!r}: the class names of {one} and {other} differ")
        super().__init__(spec, paths, [int(starts[-1]) for starts in groups], names[0])
        self._groups: tuple[np.ndarray, ...] = groups  # where each group of rows starts
        # See `prepare`: the copies of each file, and int64 (rows, 3): place, start and size.
        self._index: list[tuple[str, np.ndarray]] = []

    def prepare(self) -> "ParquetImages":
        found = packed.indices(self._paths, _index, functools.partial(_check_room, self._spec))
        self._index = [
            (str(packed.index_file(path, ".bin")), index["ranges"])
            for path, index in zip(self._paths, found, strict=True)
        ]
        return self

    def _stored_labels(self) -> np.ndarray:
        with futures.ThreadPoolExecutor(8) as pool:
            return np.concatenate(list(pool.map(_labels, self._paths)))

    def _read(self, number: int, row: int) -> bytes:
        path, place = self._paths[number], -1
        if self._index:
            copies, ranges = self._index[number]
            place, start, size = map(int, ranges[row])
        if place >= 0:
            return self._bytes(path if place == _IN_FILE else copies, start, size, number, row)
        group = int(np.searchsorted(self._groups[number], row, side="right")) - 1
        try:
            with _reading:  # threads that read in order want the same group
                values = files.patiently(lambda: _group(path, group))
        except Exception as error:  # of pyarrow, on damaged bytes, or of the storage
            kind = Damaged if os.path.isfile(path) else Unreadable
            why = f"row group {group}: {first_line(error)}"
            raise self._unreadable(number, row, why, kind) from error
        value = values[row - int(self._groups[number][group])].as_py()
        if value is None:
            raise self._unreadable(number, row, "it has no bytes", Damaged)
        return value


def _open(path: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Where the groups of rows of a file start, and its end; and its class names, from its footer alone.

    Raises:
        DataError: no whole parquet file, or no such columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        about = files.patiently(lambda: pq.read_metadata(path))
        schema = about.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no whole parquet file ({first_line(error)})") from error
    for name, good, wanted in (
        ("image", _IMAGE, "{bytes, path} or bytes"),
        ("label", _LABEL, "integers or text"),
    ):
        if name not in schema.names:
            raise DataError(f"{path} has no column {name}; it has {', '.join(schema.names)}")
        if not re.fullmatch(good, kind := str(schema.field(name).type)):
            raise DataError(f"{path} has a column {name} of {kind}; it must be of {wanted}")
    rows = [about.row_group(k).num_rows for k in range(about.num_row_groups)]
    names: Any = ()
    with contextlib.suppress(KeyError, TypeError, ValueError):
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    return np.cumsum([0, *rows]), tuple(map(str, names))


@functools.lru_cache(maxsize=2)
def _group(path: str, group: int) -> Any:
    """The image bytes of a group of rows."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return _image_bytes(file.read_row_group(group, columns=["image"]))


def _image_bytes(table: Any) -> Any:
    import pyarrow.compute as pc

    column = table["image"]
    return pc.struct_field(column, "bytes") if hasattr(column.type, "get_field_index") else column


def _labels(path: str) -> np.ndarray:
    """int64 or text; -1 or '' in groups of rows that cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = []
    with pq.ParquetFile(path) as file:
        integers = pa.types.is_integer(file.schema_arrow.field("label").type)
        for group in range(file.num_row_groups):
            try:
                column = file.read_row_group(group, columns=["label"], use_threads=False)["label"]
                if integers:
                    found.append(column.cast(pa.int64()).fill_null(-1).to_numpy())
                else:
                    found.append(np.array(column.fill_null("").to_pylist(), str))
            except (pa.ArrowException, OSError):
                rows = file.metadata.row_group(group).num_rows
                found.append(np.full(rows, -1) if integers else np.zeros(rows, str))
    return np.concatenate(found) if found else np.zeros(0, np.int64)


# Where each image lies ---------------------------------------------------------------------------


def _chunks(about: Any) -> Iterator[tuple[int, int, bool, int]]:
    """Of every group of rows its chunk of image bytes: start and end, whether it is compressed, size."""
    for group in range(about.num_row_groups):
        columns = map(about.row_group(group).column, range(about.num_columns))
        chunk = next(c for c in columns if c.path_in_schema in ("image.bytes", "image"))
        start = chunk.data_page_offset
        if chunk.has_dictionary_page:
            start = min(start, chunk.dictionary_page_offset)
        compressed = chunk.compression != "UNCOMPRESSED"
        yield start, start + chunk.total_compressed_size, compressed, chunk.total_uncompressed_size


def _check_room(spec: str, paths: Sequence[str]) -> None:
    """Raises DataError if the copies of compressed images would exceed MIRAI_CACHE_GIB."""
    import pyarrow.parquet as pq

    limit, folder = cache.limit(), packed.cache_folder()
    chunks = (chunk for path in paths for chunk in _chunks(pq.read_metadata(path)))
    needed = sum(size for *_, compressed, size in chunks if compressed)
    needed += sum(path.stat().st_size for path in folder.glob("*.bin"))
    if needed > limit:
        raise DataError(
            f"MIRAI_CACHE_GIB is {limit / 2**30:g}; it must be {needed / 2**30:.1f} or more: the images of "
            f"{spec!r} are compressed and are copied to {folder}"
        )


def _index(path: str) -> packed.Index:
    """{'ranges': int64 (rows, 3), place, start and size of every image}; writes the copies it needs."""
    import pyarrow.parquet as pq

    ranges, copies = [], packed.index_file(path, ".bin")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(pq.ParquetFile(path, pre_buffer=False))
        raw = stack.enter_context(open(path, "rb"))
        seen = stack.enter_context(mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ))
        side = stack.enter_context(files.atomic_write(copies))
        for group, (start, end, compressed, _) in enumerate(_chunks(file.metadata)):
            at = start
            for value in _values(file, group):
                if value is None:
                    ranges.append((-1, 0, 0))
                    continue
                found = -1  # bytes that are found are the right ones, whatever the chunk's encoding
                if not compressed and (found := seen.find(value, at, end)) < 0:
                    found = seen.find(value, start, end)  # again, from its dictionary
                if found < 0:
                    ranges.append((_COPIED, side.tell(), len(value)))
                    side.write(value)
                else:
                    ranges.append((_IN_FILE, found, len(value)))
                    at = found + len(value)
    if not copies.stat().st_size:
        copies.unlink()
    return {"ranges": np.array(ranges, np.int64).reshape(-1, 3)}


def _values(file: Any, group: int) -> Iterator[bytes | None]:
    """The images of a group of rows; None for those that are none or cannot be read."""
    import pyarrow as pa

    left = file.metadata.row_group(group).num_rows
    with contextlib.suppress(pa.ArrowException, OSError):
        batches = file.iter_batches(_BATCH, row_groups=[group], columns=["image"])
        for batch in batches:
            left -= len(batch)
            yield from _image_bytes(batch).to_pylist()
    yield from [None] * left
