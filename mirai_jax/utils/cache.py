"""Local copies of what lies in buckets: weights, shards, checkpoints, samples.

MIRAI_CACHE       their folder; default ~/.cache/mirai_jax
MIRAI_CACHE_GIB   how large it may become; default 64. What was used longest ago goes first, and never
                  what a process of this host has in use.

A copy belongs to one version of its objects (their sizes and etags); it appears when it is whole.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import IO

from mirai_jax.utils.errors import ConfigError
from mirai_jax.utils.remote import Remote, Unreachable

_IN_USE = "in_use"  # locked (shared) by each process that reads from its folder
_UNFINISHED = "unfinished-"  # what copies are named until they are whole, before their version

_held: dict[pathlib.Path, IO] = {}
_holding = threading.Lock()


def local_copy(path: Remote) -> pathlib.Path:
    """A local copy of an object, or of a folder with all that is below it. Threads may call.

    Raises:
        FileNotFoundError: there is no such object.
        ConfigError: it is larger than the cache may be.
        OSError: it cannot be read, or written here.
    """
    found = path.find()
    if not found:
        raise FileNotFoundError(errno.ENOENT, "no such object", str(path))
    unit = _in_use(str(path.parent if "" in found else path))
    version = _digest(json.dumps([str(path), sorted(found.items())]))
    copy = unit / version / path.name
    with _locked(unit / f"{version}.lock"):
        if not _whole(copy, found):
            for left in unit.glob(f"{_UNFINISHED}{version}-*"):  # by processes that were killed
                shutil.rmtree(left)
            _make_room(path, sum(size for size, _ in found.values()))
            _download(path, found, copy)
    return copy


def root() -> pathlib.Path:
    return pathlib.Path(os.environ.get("MIRAI_CACHE") or "~/.cache/mirai_jax").expanduser()


def limit() -> float:
    """How many bytes the cache may have. Raises ConfigError for a wrong MIRAI_CACHE_GIB."""
    given = os.environ.get("MIRAI_CACHE_GIB") or "64"
    try:
        return float(given) * 2**30
    except ValueError:
        raise ConfigError(f"MIRAI_CACHE_GIB is {given!r}; it must be a number") from None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _in_use(url: str) -> pathlib.Path:
    """The cache's folder of a URL, in use until this process ends."""
    unit = root() / _digest(url)
    with _holding:
        if unit not in _held:
            _held[unit] = _lock(unit / _IN_USE, fcntl.LOCK_SH)
            os.utime(unit / _IN_USE)
    return unit


def _lock(path: pathlib.Path, how: int) -> IO:
    """A locked file, which is still there."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
        fcntl.flock(file, how)
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()  # its folder was removed on the way


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    with _lock(path, fcntl.LOCK_EX):
        yield


def _whole(copy: pathlib.Path, found: dict[str, tuple[int, str]]) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return all((copy / name).stat().st_size == size for name, (size, _) in found.items())
    return False


def _size(folder: pathlib.Path) -> int:
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(at, name)).st_size
    return total


def _make_room(path: Remote, size: int) -> None:
    most = limit()
    with _locked(root() / "lock"):
        free = most - _size(root())
        for used in sorted(root().glob(f"*/{_IN_USE}"), key=lambda file: file.stat().st_mtime):
            if size <= free:
                return
            with contextlib.suppress(OSError), _lock(used, fcntl.LOCK_EX | fcntl.LOCK_NB):
                free += _size(used.parent)
                shutil.rmtree(used.parent)
    if size > free:
        raise ConfigError(
            f"MIRAI_CACHE_GIB is {most / 2**30:g}; a copy of {path} in {root()} needs "
            f"{(most - free + size) / 2**30:.1f} or more"
        )


def _download(path: Remote, found: dict[str, tuple[int, str]], copy: pathlib.Path) -> None:
    unit, prefix = copy.parent.parent, f"{_UNFINISHED}{copy.parent.name}-"
    with tempfile.TemporaryDirectory(dir=unit, prefix=prefix) as folder:
        made = pathlib.Path(folder, path.name)

        def get(name: str) -> None:
            target = made / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (path / name if name else path).get(str(target), found[name][0])

        with futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(get, found))
        if not _whole(made, found):
            raise Unreachable(errno.EIO, "it changed while it was read", str(path))
        shutil.rmtree(copy.parent, ignore_errors=True)
        copy.parent.mkdir()
        made.rename(copy)
