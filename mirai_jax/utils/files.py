"""Files that are either complete or absent, even if the process is killed or the disk is full."""

import contextlib
import os
import pathlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, BinaryIO, TypeVar

import tensorstore

T = TypeVar("T")
AnyPath = Any  # str, os.PathLike or remote.Remote

_WAITS = (1, 2, 4, 8)  # seconds before the next try
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def patiently(read: Callable[[], T], seconds: float | None = None) -> T:
    """`read()`, tried again where storage fails in a way that may pass (a network disk, for one).

    No try begins later than after `seconds`; the default is as many tries as there are waits.
    """
    end, tries = None if seconds is None else time.monotonic() + seconds, 0
    while True:
        try:
            return read()
        except OSError as error:
            if isinstance(error, LASTING) or error.errno is None:  # None: Pillow's, of bad bytes
                raise
            if tries >= len(_WAITS) if end is None else time.monotonic() > end:
                raise
        time.sleep(_WAITS[min(tries, len(_WAITS) - 1)])
        tries += 1


def is_remote(path: Any) -> bool:
    """Whether this is a `remote.Remote`, which is no os.PathLike."""
    return not isinstance(path, (str, os.PathLike))


@contextlib.contextmanager
def atomic_path(path: AnyPath) -> Iterator[str]:
    """Yields a temporary name beside `path`, renamed to `path` at the end or removed after an error.

    Each writer has another name: processes of several hosts may write the same file. An object is
    written here, and put into its place at once, whole.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="mirai-") as folder:
            unfinished = os.path.join(folder, path.name)
            yield unfinished
            path.put(unfinished)
        return
    unfinished = f"{os.fspath(path)}.{secrets.token_hex(4)}.tmp"
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())  # some file systems report a full disk only here
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)


@contextlib.contextmanager
def atomic_write(path: AnyPath) -> Iterator[BinaryIO]:
    """Yields a binary file to write; it becomes `path` as in `atomic_path`."""
    with atomic_path(path) as unfinished, open(unfinished, "wb") as file:
        yield file
        file.flush()


def write_text(path: AnyPath, text: str) -> None:
    """Writes a text file (UTF-8) atomically."""
    if is_remote(path):
        path.write_bytes(text.encode())
        return
    with atomic_write(path) as file:
        file.write(text.encode())


def append(path: AnyPath, line: str) -> None:
    """Adds a line to a file; an object is read and written anew."""
    if is_remote(path):
        write_text(path, (path.read_text() if path.exists() else "") + line)
    else:
        with open(path, "a") as file:
            file.write(line)


def upload(folder: pathlib.Path, target: AnyPath, *, last: str) -> None:
    """Brings a folder to a bucket; the file `last`, which shows that it is whole, comes last."""
    inside = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    put = lambda name: (target / name).put(str(folder / name))
    for below in {path.parent for path in inside}:
        (target / below.as_posix()).mkdir()
    with futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(put, (path.as_posix() for path in inside if path.as_posix() != last)))
    put(last)


def remove_tree(path: AnyPath) -> None:
    """Removes a folder with all that is in it, as far as that is possible."""
    if is_remote(path):
        with contextlib.suppress(OSError):
            path.rmtree()
    else:
        shutil.rmtree(path, ignore_errors=True)


class Appended:
    """A file to append to; `write` raises at once where the disk is full.

    Nothing is kept in a buffer: closing would write it again, and its error replace the first. An
    object cannot be appended to: its content is kept in a file here, and `upload` writes it anew.
    """

    def __init__(self, path: AnyPath):
        self._remote = path if is_remote(path) else None
        self._uploaded, self._spool = True, None
        if self._remote:
            self._spool = tempfile.TemporaryDirectory(prefix="mirai-")
            path = pathlib.Path(self._spool.name, self._remote.name)
            if self._remote.exists():
                self._remote.get(str(path), self._remote.stat().st_size)
        self._path = pathlib.Path(path)
        self._file = self._path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        """All of it is with the file system when this returns."""
        while data:
            data = data[self._file.write(data) :]  # a disk that gets full takes a part
        self._uploaded = self._remote is None

    def cut(self, count: int) -> None:
        """Takes the last `count` bytes away."""
        self._file.truncate(self._path.stat().st_size - count)
        self._uploaded = self._remote is None

    def upload(self) -> None:
        if not self._uploaded:
            self._remote.put(str(self._path))
            self._uploaded = True

    def close(self) -> None:
        if self._file.closed:
            return
        with self._file:
            os.fsync(self._file.fileno())  # some file systems report a full disk only now
        with self._spool or contextlib.nullcontext():
            self.upload()


def stored_arrays(folder: AnyPath) -> set[str]:
    """The names 'a.b' of the arrays that the index of an Orbax folder leads to, here or in gs://."""
    url = str(folder) if "://" in str(folder) else f"file://{folder}"
    store = {"driver": "ocdbt", "base": f"{url}/"}
    keys = tensorstore.KvStore.open(store).result().list().result()
    return {key.decode().rpartition("/")[0] for key in keys}


@contextlib.contextmanager
def closing(thing: Any) -> Iterator[Any]:
    """As contextlib.closing, but an error in the block is never replaced by an error of closing.

    On a full disk closing often fails again with what could not be written.
    """
    try:
        yield thing
    except BaseException:
        with contextlib.suppress(Exception):
            thing.close()
        raise
    thing.close()
