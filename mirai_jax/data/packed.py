"""Images packed in files: what parquet files and tars have in common, and where their indices are kept.

The key of an image is FILE:ROW, the file's name and the number of the image in it. Files are read with
plain `open`; an index belongs to one version of its file, by size and time of change.
"""

import abc
import bisect
import contextlib
import fcntl
import functools
import glob
import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from mirai_jax.data.image_source import ImageSource, hashes_of
from mirai_jax.utils import files
from mirai_jax.utils.errors import Damaged, DataError, Unreadable, first_line

_KEY = re.compile(r"(?P<name>.*):(?P<row>[0-9]{1,18})", re.DOTALL)
_MOST_CLASSES = 2**20  # of classes without names: a larger label is a damaged one


class PackedImages(ImageSource):
    """Images of several files, in the order of the files and of their rows.

    Args:
        spec: the user's name of the source, for messages.
        paths: the files.
        rows: how many images each file has.
        class_names: () where the files do not name them: then classes are the texts that are labels, in
            their order, or 0, 1, 2 and so on.
    """

    kind: ClassVar[str]

    def __init__(
        self, spec: str, paths: Sequence[str], rows: Sequence[int], class_names: Sequence[str] = ()
    ):
        top = os.path.commonpath([os.path.dirname(path) for path in paths])
        self._spec, self._paths = spec, list(paths)
        self._names = [os.path.relpath(path, top) for path in paths]
        self._ends, self._given_names = list(itertools.accumulate(rows)), tuple(class_names)

    @abc.abstractmethod
    def _stored_labels(self, number: int) -> np.ndarray:
        """Labels of the rows of file `number`: int64, or text; -1 or '' where there is none."""

    @abc.abstractmethod
    def _read(self, number: int, row: int) -> bytes:
        """An image of file `number`. Raises Unreadable."""

    def __len__(self) -> int:
        return self._ends[-1]

    def about(self, index: int) -> tuple[int, str]:
        number, row = self._place(index)
        key = self._key(number, row)
        if (label := int(self._labels_of(number)[row])) < 0:
            found = self._stored_labels(number)[row]
            last = len(self.class_names) - 1
            raise Damaged(f"{self._spec!r}: {key!r} has label {found!r}, not 0 to {last}")
        return label, key

    def example(self, index: int) -> tuple[bytes, int, str]:
        label, key = self.about(index)
        return self._read(*self._place(index)), label, key

    def find(self, key: str) -> bytes:
        found = _KEY.fullmatch(key) if isinstance(key, str) else None
        number = self._numbers.get(found["name"]) if found else None
        if number is None or int(found["row"]) >= self._rows(number):
            raise DataError(f"images {self._spec!r}: none of {len(self)} has the key {key!r}")
        return self._read(number, int(found["row"]))

    def labels(self) -> np.ndarray | None:
        found = np.concatenate([self._labels_of(number) for number in range(len(self._paths))])
        return None if (found < 0).any() else found

    def hashes(self) -> np.ndarray:
        places = map(self._place, range(len(self)))
        return hashes_of(self._key(number, row) for number, row in places)

    def describe(self) -> dict[str, Any]:
        listed = [f"{name} {self._rows(k)}\n" for k, name in enumerate(self._names)]
        digest = hashlib.sha256("".join(listed).encode()).hexdigest()
        return {"kind": self.kind, "name": "", "split": "", "number": len(self), "files": digest}

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        if self._given_names:
            return self._given_names
        found = [np.unique(self._stored_labels(k)) for k in range(len(self._paths))]
        found = np.unique(np.concatenate(found))
        if found.dtype.kind == "U":
            return tuple(map(str, found[found != ""]))
        found = found[found < _MOST_CLASSES]
        return tuple(map(str, range(found.max(initial=-1) + 1)))

    def _labels_of(self, number: int) -> np.ndarray:
        """int32 labels of the rows of a file, -1 where there is none that can be."""
        if number not in self._labels:
            found = self._stored_labels(number)
            if found.dtype.kind == "U":
                numbers = {name: k for k, name in enumerate(self.class_names)}
                found = np.array([numbers.get(name, -1) for name in found])
            inside = (found >= 0) & (found < len(self.class_names))
            self._labels[number] = np.where(inside, found, -1).astype(np.int32)
        return self._labels[number]

    @functools.cached_property
    def _labels(self) -> dict[int, np.ndarray]:
        return {}

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: k for k, name in enumerate(self._names)}

    def _rows(self, number: int) -> int:
        return self._ends[number] - (self._ends[number - 1] if number else 0)

    def _place(self, index: int) -> tuple[int, int]:
        """The file of an image, and its row."""
        self._check(index)
        number = bisect.bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def _key(self, number: int, row: int) -> str:
        return f"{self._names[number]}:{row}"

    def _bytes(self, path: str, start: int, size: int, number: int, row: int) -> bytes:
        """Some bytes of a file, those of an image. Raises Unreadable."""

        def read() -> bytes:
            with open(path, "rb", buffering=0) as file:
                return os.pread(file.fileno(), size, start)

        key = self._key(number, row)
        try:
            raw = files.patiently(read)
        except OSError as error:
            raise Unreadable(
                f"{self._spec!r}: {key!r} cannot be read ({first_line(error)})"
            ) from error
        if len(raw) != size:
            raise Damaged(f"{self._spec!r}: {key!r} has {len(raw)} of {size} bytes: its file ends")
        return raw


def find_files(spec: str, pattern: str, suffix: str) -> list[str]:
    """The files of a glob pattern, or those in a folder, at any depth, that end with `suffix`; sorted."""
    pattern = os.path.abspath(os.path.expanduser(pattern))
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "**", f"*{suffix}")
    found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not found:
        raise DataError(f"images {spec!r} is no file; it must name *{suffix} files or their folder")
    return found


# Indices -----------------------------------------------------------------------------------------


def cache_folder() -> pathlib.Path:
    """The folder of the indices, below MIRAI_CACHE."""
    root = os.environ.get("MIRAI_CACHE") or "~/.cache/mirai_jax"
    return pathlib.Path(root).expanduser() / "sources"


def index_file(path: str, suffix: str = ".npz") -> pathlib.Path:
    """Where the index of a file is kept, or would be."""
    about = os.stat(path)
    digest = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]
    return cache_folder() / f"{digest}-{about.st_size:x}-{about.st_mtime_ns:x}{suffix}"


def read_index(path: str) -> dict[str, np.ndarray] | None:
    """The index of a file, as it was when the index was made; None if there is none."""
    with contextlib.suppress(FileNotFoundError), np.load(index_file(path)) as found:
        return dict(found)
    return None


def write_index(path: str, **arrays: np.ndarray) -> None:
    """Writes the index of a file and removes those of its older versions."""
    made = index_file(path)
    with files.atomic_write(made) as file:
        np.savez(file, **arrays)
    digest = made.name.partition("-")[0]
    for other in made.parent.glob(f"{digest}-*"):
        if other.name.partition(".")[0] != made.stem:
            other.unlink(missing_ok=True)


@contextlib.contextmanager
def making_indices() -> Iterator[None]:
    """One process of a host at a time. Raises DataError where the cache cannot be written."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "a") as lock:
            with contextlib.suppress(OSError):  # storage without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise DataError(
            f"MIRAI_CACHE is {str(folder.parent)!r}; an index cannot be made ({first_line(error)})"
        ) from error
