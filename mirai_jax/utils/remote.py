"""Paths of buckets and of other storage behind a URL, with the methods of pathlib that are used here.

fsspec reads and writes them. An object appears when it is whole, so nothing is renamed into its place.
Every request is tried again for PATIENCE seconds, and then raises an OSError, as of a lost disk; for as
long again, all others of that bucket raise it at once.
Listings are never kept, for other processes write too.
"""

import contextlib
import errno
import fnmatch
import functools
import json
import logging
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from mirai_jax.utils import files
from mirai_jax.utils.errors import ConfigError, first_line

T = TypeVar("T")

PATIENCE = 60.0  # seconds for which a request is tried again
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
    ours = {
        # A request is answered within `requests_timeout` seconds, which is five minutes otherwise.
        "gs": {"use_listings_cache": False, "requests_timeout": 30},
        "s3": {"use_listings_cache": False, "config_kwargs": {"retries": {"max_attempts": 2}}},
    }
    for name, options in ours.items():  # Orbax's own file systems take them too
        fsspec.config.conf[name] = options | fsspec.config.conf.get(name, {})
    try:
        return fsspec.filesystem(scheme)
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(scheme)
        if extra:
            raise ConfigError(
                f"{scheme}:// needs the extra: pip install 'mirai-jax[{extra}]'"
            ) from error
        raise ConfigError(f"{scheme}:// cannot be read ({first_line(error)})") from error


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
    def _bucket(self) -> str:
        return f"{self._scheme}://{self._rest.partition('/')[0]}"

    def _ask(self, request: Callable[[Any, str], T]) -> T:
        def attempt() -> T:
            try:
                return request(_system(self._scheme), str(self))
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
            return self._ask(lambda system, url: system.info(url))
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
        info = self._ask(lambda system, url: system.info(url))
        return types.SimpleNamespace(st_size=info["size"])

    def iterdir(self) -> Iterator["Remote"]:
        """What is in the folder; nothing where there is none."""
        listed = self._ask(_listed)
        names = {entry["name"].rstrip("/").rpartition("/")[2] for entry in listed}
        return iter([self / name for name in sorted(names)])

    def glob(self, pattern: str) -> Iterator["Remote"]:
        """As pathlib's, with wildcards in the last part alone."""
        folder, _, last = pattern.rpartition("/")
        where = self / folder if folder else self
        return (path for path in where.iterdir() if fnmatch.fnmatchcase(path.name, last))

    def find(self) -> dict[str, tuple[int, str]]:
        """{relative name: (bytes, version)} of all objects below it; of an object, under ''.

        An object that is written anew has another version.
        """

        def request(system: Any, url: str) -> dict[str, tuple[int, str]]:
            start = len(system._strip_protocol(url))
            found = system.find(url, detail=True)
            return {
                name[start:].strip("/"): (entry["size"], _version(entry))
                for name, entry in found.items()
                if not name.endswith("/")  # a folder's placeholder
            }

        return self._ask(request)

    def read_bytes(self) -> bytes:
        return self._ask(lambda system, url: system.cat_file(url))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, data: bytes) -> None:
        self._ask(lambda system, url: system.pipe_file(url, data))

    def touch(self) -> None:
        self.write_bytes(b"")

    def put(self, local: str) -> None:
        """Writes the object from a local file."""
        self._ask(lambda system, url: system.put_file(local, url))

    def get(self, local: str) -> None:
        """Reads the object into a local file."""
        self._ask(lambda system, url: system.get_file(url, local))

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Makes the folder where storage has folders; a bucket has none to make."""
        if self._scheme not in _WITHOUT_FOLDERS:
            self._ask(lambda system, url: system.makedirs(url, exist_ok=True))

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._ask(lambda system, url: system.rm_file(url))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmtree(self) -> None:
        """Removes all that is below it; nothing where there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._ask(lambda system, url: system.rm(url, recursive=True))

    def rename(self, target: "Remote") -> None:
        """Copies within the storage, then removes: a kill on the way leaves both."""
        self._ask(lambda system, url: system.copy(url, str(target), recursive=self.is_dir()))
        self.rmtree()


def _listed(system: Any, url: str) -> list[dict[str, Any]]:
    try:
        listed = system.ls(url, detail=True)
    except FileNotFoundError:
        return []
    own = system._strip_protocol(url)
    return [entry for entry in listed if entry["name"].rstrip("/") != own]


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
