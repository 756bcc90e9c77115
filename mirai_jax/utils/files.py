"""Files that are either complete or absent, even if the process is killed or the disk is full."""

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import tensorstore

T = TypeVar("T")

_WAITS = (1, 2, 4, 8)  # seconds before the next try
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def patiently(read: Callable[[], T]) -> T:
    """`read()`, tried again where storage fails in a way that may pass (a network disk, for one)."""
    for seconds in _WAITS:
        try:
            return read()
        except OSError as error:
            if isinstance(error, _LASTING) or error.errno is None:  # None: Pillow's, of bad bytes
                raise
        time.sleep(seconds)
    return read()


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yields a temporary name beside `path`, renamed to `path` at the end or removed after an error.

    Each writer has another name: processes of several hosts may write the same file.
    """
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
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yields a binary file to write; it becomes `path` as in `atomic_path`."""
    with atomic_path(path) as unfinished, open(unfinished, "wb") as file:
        yield file
        file.flush()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file (UTF-8) atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def stored_arrays(folder: str | os.PathLike[str]) -> set[str]:
    """The names 'a.b' of the arrays that the index of an Orbax folder leads to."""
    store = {"driver": "ocdbt", "base": f"file://{os.fspath(folder)}/"}
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
