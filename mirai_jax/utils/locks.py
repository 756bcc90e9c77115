"""One writer a folder: a lock with its owner's name, and a heartbeat where locks do not reach.

Some shared file systems have no locks, or locks that other hosts do not see. So the owner touches its
file every few seconds, and a start on another host looks whether somebody does.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO

from mirai_jax.utils.errors import ConfigError

BEAT = 5.0  # seconds between two touches
_LIVE = 4 * BEAT  # an owner that is silent for so long is gone


def try_lock(file: IO) -> bool:
    """Locks a file until it is closed here and in every child; False if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # storage without locks
    return True


class FolderLock:
    """Held from `acquire` to `close`, or to the end of the process.

    Writers that divide the work have a `name` each; `log` takes a line before a wait.
    """

    def __init__(
        self, folder: pathlib.Path, name: str = "lock", log: Callable[[str], None] = print
    ):
        self._path, self._log, self._file = folder / f"{name}.json", log, None
        self._closed = threading.Event()

    def acquire(self) -> str:
        """Takes the lock and returns ''; or returns who has it."""
        if self._file is not None:
            return ""
        file = self._path.open("a+")
        if not try_lock(file):
            file.close()
            return self._owner() or "another process"
        if not self._path.exists() or self._path.stat().st_ino != os.fstat(file.fileno()).st_ino:
            file.close()
            return self.acquire()  # its owner has just ended and removed it
        owner = self._owner()
        if owner and f" on {socket.gethostname()}," not in owner and self._beats():
            file.close()
            return owner
        words = shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])[:300]
        about = {"pid": os.getpid(), "host": socket.gethostname(), "command": words}
        file.truncate(0)
        file.write(json.dumps(about | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")
        file.flush()
        self._file = file
        threading.Thread(target=self._beat, daemon=True, name="lock").start()
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
        if self._file is not None:
            with contextlib.suppress(OSError), self._file:
                self._path.unlink()
            self._file = None

    def _owner(self) -> str:
        try:
            found = json.loads(self._path.read_text())
            return f"process {found['pid']} on {found['host']}, since {found['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _beats(self) -> bool:
        """Whether an owner on another host still touches the file."""
        self._log(
            f"{self._owner()}, had {self._path.parent}: looking for {_LIVE:.0f} s if it lives"
        )
        before, end = self._path.stat().st_mtime_ns, time.monotonic() + _LIVE
        while time.monotonic() < end:
            time.sleep(0.5)
            if self._path.stat().st_mtime_ns != before:
                return True
        return False

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._path)
