"""Paths as users write them, read the same way by all programs, and names that every library takes."""

import glob
import hashlib
import os
import re
import tempfile

from mirai_jax.utils.errors import ConfigError

_PLAIN = re.compile(r"[A-Za-z0-9._/+=-]*")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def check_local(name: str, path: str | os.PathLike[str]) -> None:
    """Raises ConfigError for a URL, which would be taken for a folder named 'gs:'."""
    if _URL.match(os.fspath(path)):
        raise ConfigError(
            f"{name} is {os.fspath(path)!r}; it must be on a mounted file system, no URL"
        )


def several(text: str) -> list[str]:
    """The paths of a list such as 'A,B' or 'runs/*'. What exists under the whole name is one path."""
    found = []
    for part in [text] if os.path.exists(text) else filter(None, text.split(",")):
        found += (not os.path.exists(part) and sorted(glob.glob(part))) or [part]
    return found


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
