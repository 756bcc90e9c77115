"""Paths of buckets and of other storage behind a URL, with the methods of pathlib that are used here.

fsspec reads and writes them. An object appears when it is whole, so nothing is renamed into its place.
Every request is tried again for PATIENCE seconds, and then raises an OSError, as of a lost disk; for as
long again, all others of that bucket raise it at once. No try waits without end: the packages limit how
long an answer takes, but not how long a silent server takes nothing of what it is sent.
Listings are never kept, for other processes write too.
"""

import contextlib
import errno
import fnmatch
import functools
import json
import logging
import os
import time
import types
from collections.abc import Iterator
from typing import Any

from mirai_jax.utils import files
from mirai_jax.utils.errors import ConfigError, first_line

PATIENCE = 60.0  # seconds for which a request is tried again; in which a try of few bytes must end
_SLOWEST = 1e6  # bytes per second: a try of many bytes may take so much longer
_FOLDER = 1800.0  # seconds for all that is in a folder
_SILENCE = 30.0  # seconds in which the next bytes of an answer must come
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
_WITHOUT_FOLDERS = (*_EXTRAS, "az", "abfs")
_VERSIONS = ("generation", "etag", "ETag", "mtime", "LastModified", "created")

_away: dict[str, tuple[float, OSError]] = {}  # buckets whose last request was given up: when, why


@functools.cache
def _system(scheme: str) -> Any:
    """The file system of a scheme. Raises ConfigError where its package is not installed."""
    import fsspec

    for name in ("gcsfs", "s3fs", "aiobotocore"):  # they log what they raise
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        # Orbax's own file systems take them too.
        fsspec.config.conf[scheme] = _options(scheme) | fsspec.config.conf.get(scheme, {})
        return fsspec.filesystem(scheme)
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(scheme)
        if extra:
            raise ConfigError(
                f"{scheme}:// needs the extra: pip install -e '.[{extra}]'"
            ) from error
        raise ConfigError(f"{scheme}:// cannot be read ({first_line(error)})") from error


def _options(scheme: str) -> dict[str, Any]:
    if scheme in ("gs", "gcs"):
        import aiohttp  # gcsfs needs it

        # Else five minutes for a whole answer: too long for a lost bucket, too short for a large file.
        limits = aiohttp.ClientTimeout(sock_connect=_SILENCE, sock_read=_SILENCE)
        return {"use_listings_cache": False, "requests_timeout": limits}
    if scheme in ("s3", "s3a"):  # s3fs tries again too, five times
        return {"use_listings_cache": False, "config_kwargs": {"retries": {"max_attempts": 0}}}
    return {}


class Unreachable(OSError):
    """Storage that did not answer, or refused; one line."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be reached: {self.strerror}"


class _Refused(Unreachable, PermissionError):
    """Not to be tried again."""


class Remote:
    """A URL such as gs://BUCKET/FOLDER/NAME. No os.PathLike: what needs a local file must not take it.

    Raises:
        ConfigError: at the first request, where the scheme's package is not installed.
        FileNotFoundError, Unreachable: from any request.
    """

    def __init__(self, url: str):
        self._scheme, _, rest = url.partition("://")
        self._rest = rest.rstrip("/")

    def __str__(self) -> str:
        return f"{self._scheme}://{self._rest}"

    def __repr__(self) -> str:
        return f"Remote({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: "Remote") -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str) -> "Remote":
        return Remote(f"{self}/{name}")

    @property
    def name(self) -> str:
        return self._rest.rpartition("/")[2]

    @property
    def parent(self) -> "Remote":
        return Remote(f"{self._scheme}://{self._rest.rpartition('/')[0] or self._rest}")

    def absolute(self) -> "Remote":
        return self

    @property
    def is_away(self) -> bool:
        """Whether the last request to its bucket was given up."""
        return self._bucket in _away

    @property
    def _listed_as(self) -> str:
        """Its name in what the file system lists."""
        return _system(self._scheme)._strip_protocol(str(self))

    @property
    def _bucket(self) -> str:
        return f"{self._scheme}://{self._rest.partition('/')[0]}"

    def _ask(self, request: str, *arguments: Any, seconds: float = PATIENCE, **options: Any) -> Any:
        """What a method of the file system returns. A try that takes `seconds` is cancelled."""

        def attempt() -> Any:
            try:
                system = _system(self._scheme)
                limit = {"timeout": seconds} if system.async_impl else {}
                return getattr(system, request)(*arguments, **options, **limit)
            except ConfigError:
                raise
            except Exception as error:  # each package has its kinds
                raise _os_error(error, str(self)) from error

        since, why = _away.get(self._bucket, (0.0, None))
        if why and time.monotonic() < since + PATIENCE:
            raise why  # at once: a run that ends has much to close
        try:
            result = files.patiently(attempt, 0 if why else PATIENCE)
        except files.LASTING:
            _away.pop(self._bucket, None)
            raise
        except OSError as error:
            _away[self._bucket] = time.monotonic(), error
            raise
        _away.pop(self._bucket, None)
        return result

    def _info(self) -> dict[str, Any]:
        # Not its `exists`, which is False where storage does not answer.
        try:
            return self._ask("info", str(self))
        except FileNotFoundError:
            return {}

    def exists(self) -> bool:
        return bool(self._info())

    def is_dir(self) -> bool:
        return self._info().get("type") == "directory"

    def is_file(self) -> bool:
        return self._info().get("type") == "file"

    def stat(self) -> types.SimpleNamespace:
        """`st_size`, of an object."""
        return types.SimpleNamespace(st_size=self._ask("info", str(self))["size"])

    def iterdir(self) -> Iterator["Remote"]:
        """What is in the folder; nothing where there is none."""
        try:
            listed = self._ask("ls", str(self), detail=False, seconds=_FOLDER)
        except FileNotFoundError:
            return iter(())
        found = {name.rstrip("/") for name in listed} - {self._listed_as}
        return iter([self / name.rpartition("/")[2] for name in sorted(found)])

    def glob(self, pattern: str) -> Iterator["Remote"]:
        """As pathlib's, with wildcards in the last part alone."""
        folder, _, last = pattern.rpartition("/")
        where = self / folder if folder else self
        return (path for path in where.iterdir() if fnmatch.fnmatchcase(path.name, last))

    def find(self) -> dict[str, tuple[int, str]]:
        """{relative name: (bytes, version)} of all objects below it; of an object, under ''.

        An object that is written anew has another version.
        """
        found = self._ask("find", str(self), detail=True, seconds=_FOLDER)
        return {
            name[len(self._listed_as) :].strip("/"): (entry["size"], _version(entry))
            for name, entry in found.items()
            if not name.endswith("/")  # a folder's placeholder
        }

    def read_bytes(self) -> bytes:
        return self._ask("cat_file", str(self))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, data: bytes) -> None:
        self._ask("pipe_file", str(self), data, seconds=_transfer(len(data)))

    def touch(self) -> None:
        self.write_bytes(b"")

    def put(self, local: str) -> None:
        """Writes the object from a local file."""
        self._ask("put_file", local, str(self), seconds=_transfer(os.path.getsize(local)))

    def get(self, local: str, size: int) -> None:
        """Reads the object, which has `size` bytes, into a local file."""
        self._ask("get_file", str(self), local, seconds=_transfer(size))

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Makes the folder where storage has folders; a bucket has none to make."""
        if self._scheme not in _WITHOUT_FOLDERS:
            self._ask("makedirs", str(self), exist_ok=True)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._ask("rm_file", str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self) -> None:
        """Removes all that is below it; nothing where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._ask("rm", str(self), recursive=True, seconds=_FOLDER)

    def rename(self, target: "Remote") -> None:
        """Copies within the storage, then removes: a kill on the way leaves both."""
        whole = self.is_dir()
        self._ask("copy", str(self), str(target), recursive=whole, seconds=_FOLDER)
        self.rmtree()


def _transfer(size: int) -> float:
    return PATIENCE + size / _SLOWEST


def _version(entry: dict[str, Any]) -> str:
    return json.dumps([str(entry[name]) for name in _VERSIONS if entry.get(name)])


def _os_error(error: Exception, url: str) -> OSError:
    text = "no answer" if isinstance(error, TimeoutError) else first_line(error)[:200]
    refused = str(getattr(error, "code", "")) in ("401", "403") or "Forbidden" in text
    refused |= type(error).__name__ == "NoCredentialsError"  # botocore's
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "no such object or bucket", url)
    if refused or isinstance(error, PermissionError):
        return _Refused(errno.EACCES, text, url)
    return Unreachable(errno.EIO, text, url)
