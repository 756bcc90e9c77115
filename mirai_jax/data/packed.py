"""Images packed in files: what parquet files and tars have in common, and where their indices are kept.

The key of an image is FILE:ROW, the file's name and the number of the image in it. An index belongs to
one version of its file, by size and time of change.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, ClassVar

import numpy as np

from mirai_jax.data.image_source import ImageSource, hashes_of
from mirai_jax.utils import cache, files, paths
from mirai_jax.utils.errors import Damaged, DataError, Unreadable, first_line
from mirai_jax.utils.progress import Progress

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
        self._names = [os.path.relpath(path, top) for path in paths]
        self._spec, self._paths, self._given_names = spec, list(paths), tuple(class_names)
        self._starts = [0, *itertools.accumulate(rows)]
        if not len(self):
            raise DataError(f"images {spec!r} has no image")

    @abc.abstractmethod
    def _stored_labels(self) -> np.ndarray:
        """Labels of all images: int64, or text; -1 or '' where there is none."""

    @abc.abstractmethod
    def _read(self, number: int, row: int) -> bytes:
        """An image of file `number`. Raises Unreadable."""

    def __len__(self) -> int:
        return self._starts[-1]

    def about(self, index: int) -> tuple[int, str]:
        number, row = self._place(index)
        if (label := int(self._classes[1][index])) < 0:
            wanted = f"it has no label, 0 to {len(self.class_names) - 1}"
            raise self._unreadable(number, row, wanted, Damaged)
        return label, self._key(number, row)

    def key(self, index: int) -> str:
        return self._key(*self._place(index))

    def example(self, index: int) -> tuple[bytes, int, str]:
        label, key = self.about(index)
        return self._read(*self._place(index)), label, key

    def find(self, key: str) -> bytes:
        found = _KEY.fullmatch(key) if isinstance(key, str) else None
        number = self._numbers.get(found["name"]) if found else None
        row = int(found["row"]) if found else 0
        if number is None or row >= self._starts[number + 1] - self._starts[number]:
            raise DataError(f"images {self._spec!r}: none of {len(self)} has the key {key!r}")
        return self._read(number, row)

    def labels(self) -> np.ndarray | None:
        labels = self._classes[1]
        return None if (labels < 0).any() else labels

    def hashes(self) -> np.ndarray:
        return hashes_of(map(self.key, range(len(self))))

    def describe(self) -> dict[str, Any]:
        listed = "".join(
            f"{name} {n}\n" for name, n in zip(self._names, self._starts, strict=False)
        )
        digest = hashlib.sha256(listed.encode()).hexdigest()
        return {"kind": self.kind, "name": "", "split": "", "number": len(self), "files": digest}

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._given_names or self._classes[0]

    @functools.cached_property
    def _classes(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Class names, and the int32 label of every image, -1 where there is none that can be."""
        names, labels = self._given_names, self._stored_labels()
        if labels.dtype.kind == "U":
            names = names or tuple(map(str, np.unique(labels[labels != ""])))
            numbers = {name: k for k, name in enumerate(names)}
            labels = np.array([numbers.get(name, -1) for name in labels])
        elif not names:
            names = tuple(map(str, range(labels[labels < _MOST_CLASSES].max(initial=-1) + 1)))
        good = (labels >= 0) & (labels < len(names))
        return names, np.where(good, labels, -1).astype(np.int32)

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: k for k, name in enumerate(self._names)}

    def _place(self, index: int) -> tuple[int, int]:
        """The file of an image, and its row."""
        self._check(index)
        number = bisect.bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def _key(self, number: int, row: int) -> str:
        return f"{self._names[number]}:{row}"

    def _unreadable(
        self, number: int, row: int, why: str, kind: type[Unreadable] = Unreadable
    ) -> Unreadable:
        return kind(f"{self._spec!r}: {self._key(number, row)!r} cannot be read ({why})")

    def _bytes(self, path: str, start: int, size: int, number: int, row: int) -> bytes:
        """Some bytes of a file, those of an image. Raises Unreadable."""
        try:
            raw = files.patiently(lambda: read_range(path, start, size))
        except OSError as error:
            raise self._unreadable(number, row, first_line(error)) from error
        if len(raw) != size:
            raise self._unreadable(number, row, f"it has {len(raw)} of {size} bytes", Damaged)
        return raw


def read_range(path: str, start: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), size, start)


def find_files(spec: str, pattern: str, suffix: str) -> list[str]:
    """The files of a glob pattern, or those in a folder, at any depth, that end with `suffix`; sorted.

    A folder in a bucket is copied whole into the cache.
    """
    if files.is_remote(given := paths.at(pattern)):
        folder = paths.local(given if given.is_dir() else given.parent)
        pattern = str(folder)
        if not given.is_dir():
            pattern = os.path.join(glob.escape(pattern), given.name)
    pattern = os.path.abspath(os.path.expanduser(pattern))
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "**", f"*{suffix}")
    found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not found:
        raise DataError(f"images {spec!r} is no file; it must name *{suffix} files or their folder")
    return found


# Indices -----------------------------------------------------------------------------------------

Index = Mapping[str, np.ndarray]


def cache_folder() -> pathlib.Path:
    """The folder of the indices, below MIRAI_CACHE."""
    return cache.root() / "sources"


def index_file(path: str, suffix: str = ".npz") -> pathlib.Path:
    """Where the index of a file is kept, or would be."""
    about = os.stat(path)
    digest = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]
    return cache_folder() / f"{digest}-{about.st_size:x}-{about.st_mtime_ns:x}{suffix}"


def indices(
    paths: Sequence[str],
    make: Callable[[str], Index],
    check: Callable[[Sequence[str]], None] = lambda missing: None,
    threads: int = 8,
) -> list[Index]:
    """The index of every file; those that are not kept are made, by one process of a host at a time.

    `check` takes the files whose indices are missing before any is made; `threads` make them.

    Raises:
        DataError: the cache cannot be written.
    """
    with futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(_kept, paths))
        if all(found):
            return found
        with _locked_cache():
            missing = [path for path in paths if not _kept(path)]
            check(missing)
            progress = Progress(len(missing), "files indexed")

            def keep(path: str) -> None:
                _keep(path, make(path))
                progress.advance(1)

            with contextlib.closing(progress), futures.ThreadPoolExecutor(threads) as makers:
                list(makers.map(keep, missing))
        return list(pool.map(_kept, paths))


def _kept(path: str) -> Index | None:
    with contextlib.suppress(FileNotFoundError), np.load(index_file(path)) as found:
        return dict(found)
    return None


def _keep(path: str, index: Index) -> None:
    """Writes the index of a file and removes those of its older versions."""
    made = index_file(path)
    with files.atomic_write(made) as file:
        np.savez(file, **index)
    for other in made.parent.glob(f"{made.name.partition('-')[0]}-*"):
        if other.name.partition(".")[0] != made.stem:
            other.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked_cache() -> Iterator[None]:
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
