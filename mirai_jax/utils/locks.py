"""One writer a folder: a lock with its owner's name, and a heartbeat where locks do not reach.

Some shared file systems have no locks, or locks that other hosts do not see; a bucket has none. So the
owner touches its file every few seconds (an object is written anew), and a start on another host looks
whether somebody does.
"""

import contextlib
import fcntl
import io
import itertools
import json
import os
import pathlib
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from mirai_jax.utils import files
from mirai_jax.utils.ending import leave
from mirai_jax.utils.errors import ConfigError

BEAT = 5.0  # seconds between two touches
_LIVE = 4 * BEAT  # an owner that is silent for so long is gone


def try_lock(file: IO) -> bool | None:
    """Locks a file until it is closed here and in every child.

    False if another process has it; None on storage without locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


class FolderLock:
    """Held from `acquire` to `close`, or to the end of the process.

    Writers that divide the work have a `name` each; `log` takes a line before a wait. A process that
    stood still so long that another one took its folder ends when it finds out.
    """

    def __init__(
        self, folder: pathlib.Path, name: str = "lock", log: Callable[[str], None] = print
    ):
        self._path, self._log, self._file = folder / f"{name}.json", log, None
        self._me, self._closed = "", threading.Event()
        self._about: dict[str, Any] = {}
        self._beating = threading.Thread(target=self._beat, daemon=True, name="lock")

    def acquire(self) -> str:
        """Takes the lock and returns ''; or returns who has it."""
        if self._file is not None:
            return ""
        file = io.StringIO() if files.is_remote(self._path) else self._path.open("a+")
        locked, owner = try_lock(file), self._owner()
        here = f" on {socket.gethostname()}," in owner
        # The locks of this host are sure. Those of another may not be seen, or outlive it.
        sure = locked is not None and (here or not owner)
        if (sure and not locked) or (owner and not sure and self._beats()):
            file.close()
            return owner or "another process"
        # Whether its owner has just ended.
        gone = locked and (
            not self._path.exists() or self._path.stat().st_ino != os.fstat(file.fileno()).st_ino
        )
        if gone or locked is False:
            file.close()
            if locked is False and self._owner() == owner:
                self._path.unlink(missing_ok=True)
            return self.acquire()
        words = shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])[:300]
        about = {"pid": os.getpid(), "host": socket.gethostname(), "command": words}
        about["since"], self._file = time.strftime("%Y-%m-%d %H:%M:%S"), file
        self._about, self._me, text = about, _named(about), json.dumps(about) + "\n"
        if locked:
            file.truncate(0)
            file.write(text)
            file.flush()
        else:  # of two starts at once, the last to write has it
            files.write_text(self._path, text)
            time.sleep(BEAT / 5)
            if (owner := self._owner()) != self._me:
                self.close()
                return owner or "another process"
        self._beating.start()
        return ""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The lock in a block; ConfigError if another process has it or the folder cannot be written."""
        folder = self._path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            owner = self.acquire()
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written: {error.strerror}") from error
        if owner:
            raise ConfigError(f"{folder} is at work: {owner}")
        with contextlib.closing(self):
            yield

    def close(self) -> None:
        self._closed.set()
        if self._beating.is_alive():
            self._beating.join(BEAT)  # it must not write an object again that is removed here
        if self._file is not None:
            with contextlib.suppress(OSError), self._file:
                if self._owner() == self._me:
                    self._path.unlink()
            self._file = None

    def _owner(self) -> str:
        try:
            return _named(json.loads(self._path.read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _beats(self) -> bool:
        """Whether an owner on another host still touches the file."""
        self._log(
            f"{self._owner()}, had {self._path.parent}: looking for {_LIVE:.0f} s if it lives"
        )
        with contextlib.suppress(FileNotFoundError):  # an object whose owner has just ended
            before, end = _touched(self._path), time.monotonic() + _LIVE
            while time.monotonic() < end:
                time.sleep(0.5)
                if _touched(self._path) != before:
                    return True
        return False

    def _beat(self) -> None:
        for beat in itertools.count():
            if self._closed.wait(BEAT):
                return
            with contextlib.suppress(OSError):
                if self._owner() not in (self._me, ""):
                    print(
                        f"error: {self._path.parent} was taken by {self._owner()}", file=sys.stderr
                    )
                    leave(1)
                if files.is_remote(self._path):
                    files.write_text(self._path, json.dumps({**self._about, "beat": beat}) + "\n")
                else:
                    os.utime(self._path)


def touched(folder: files.AnyPath) -> int | str | None:
    """Changes every BEAT seconds while the folder has an owner; None where it has none."""
    try:
        return _touched(folder / "lock.json")
    except FileNotFoundError:
        return None


def is_held(folder: files.AnyPath) -> bool:
    """Whether the folder's owner has touched its file lately; in a bucket, whether it has one."""
    found = touched(folder)
    return isinstance(found, str) or (found is not None and time.time() - found / 1e9 < _LIVE)


def _touched(path: files.AnyPath) -> int | str:
    """When the file was last touched; opening it asks the server, where a look at it may not."""
    if files.is_remote(path):
        return path.read_text()
    with path.open() as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _named(about: Mapping[str, Any]) -> str:
    return f"process {about['pid']} on {about['host']}, since {about['since']}"
