"""Paths as users write them, read the same way by all programs, and names that every library takes."""

import glob
import hashlib
import os
import pathlib
import re
import tempfile
from collections.abc import Sequence

from mirai_jax.utils import cache, hub
from mirai_jax.utils.errors import ConfigError
from mirai_jax.utils.remote import Remote

_PLAIN = re.compile(r"[A-Za-z0-9._/+=-]*")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def at(path: str | os.PathLike[str] | Remote) -> pathlib.Path | Remote:
    """A path as a user writes it: of this machine (~ is expanded), or gs://, s3://, any of fsspec's."""
    if isinstance(path, Remote):
        return path
    text = os.path.expanduser(path)  # pathlib's raises on an unknown ~user
    return Remote(text) if _URL.match(text) else pathlib.Path(text)


def local(path: str | os.PathLike[str] | Remote) -> pathlib.Path:
    """The same for what needs a file on this machine: a copy in a cache where it lies elsewhere.

    Also hf:OWNER/NAME[@REVISION]/FILE. Raises as `cache.local_copy` and `hub.local_file`.
    """
    path = at(hub.local_file(path))
    return cache.local_copy(path) if isinstance(path, Remote) else path


def exists(path: str | os.PathLike[str] | Remote) -> bool:
    """Also False, where pathlib raises, for a name that is too long to be one."""
    path = at(path)
    return path.exists() if isinstance(path, Remote) else os.path.exists(path)


def is_dir(path: str | os.PathLike[str] | Remote) -> bool:
    """The same of a folder."""
    path = at(path)
    return path.is_dir() if isinstance(path, Remote) else os.path.isdir(path)


def several(text: str) -> list[str]:
    """The paths of a list such as 'A,B' or 'runs/*'. What exists under the whole name is one path."""
    found = []
    for part in [text] if text and exists(text) else filter(None, text.split(",")):
        path = at(part)
        if isinstance(path, Remote):
            matching = map(str, path.parent.glob(path.name)) if "*" in path.name else ()
        else:
            matching = glob.glob(part) if not exists(part) else ()
        found += sorted(matching) or [part]
    return found


def common(several: Sequence[str]) -> pathlib.Path | Remote:
    """The folder that holds all of these paths, all here or all in one bucket; the path itself of one."""
    if isinstance(at(several[0]), Remote):
        return at(os.path.commonpath(several).replace(":/", "://"))
    return pathlib.Path(os.path.commonpath(map(os.path.abspath, several)))


def is_inside(path: pathlib.Path | Remote, folder: pathlib.Path | Remote) -> bool:
    if isinstance(path, Remote) or isinstance(folder, Remote):
        return f"{path}/".startswith(f"{folder}/")
    return path.resolve().is_relative_to(folder.resolve())


def plain(path: str | os.PathLike[str]) -> str:
    """The same place under a name of plain letters.

    Orbax takes [ ] and * anywhere in a path for a pattern and then skips the arrays of a checkpoint
    without an error. Such a path is reached through a link among the temporary files. What does not
    exist yet must have a plain last name.
    """
    path = os.path.abspath(path)
    if _PLAIN.fullmatch(path):
        return path
    if not os.path.exists(path):
        folder, name = os.path.split(path)
        return os.path.join(plain(folder), name)
    temporary = tempfile.gettempdir()
    temporary = temporary if _PLAIN.fullmatch(temporary) else "/tmp"
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    link = os.path.join(temporary, f"mirai-{os.getuid()}-{digest}")
    try:
        os.symlink(path, link)
    except FileExistsError:
        if not os.path.islink(link) or os.readlink(link) != path:
            raise ConfigError(f"{link} is in the way: remove it") from None
    return link
