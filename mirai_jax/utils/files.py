"""Files that are whole or not there, whenever the process is killed or the disk is full."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import Any, BinaryIO


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """A name beside `path` to write to; at the end it becomes `path`, or goes if there was an error.

    The name is of this writer alone: processes of several hosts may write the same file.
    """
    unfinished = f"{os.fspath(path)}.{secrets.token_hex(4)}.tmp"
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())  # some file systems tell of a full disk only now
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """`atomic_path`, opened for writing."""
    with atomic_path(path) as unfinished, open(unfinished, "wb") as file:
        yield file
        file.flush()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file (UTF-8)."""
    with atomic_write(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def closing(thing: Any) -> Iterator[Any]:
    """As contextlib.closing, but an error on its way is never replaced by one of closing.

    On a full disk what could not be written is often told again then.
    """
    try:
        yield thing
    except BaseException:
        with contextlib.suppress(Exception):
            thing.close()
        raise
    thing.close()
