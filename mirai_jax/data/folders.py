"""Lists folders of image files in the order of torchvision's ImageFolder."""

import os
from collections.abc import Iterator, Sequence

from mirai_jax.utils.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
_MACHINES = ("@eaDir", "__MACOSX")  # folders of thumbnails and the like that systems make


def is_image(name: str) -> bool:
    """Whether a file is an image, by its name."""
    return name.lower().endswith(SUFFIXES)


def surprise(names: Sequence[str]) -> str:
    """A line where classes that are numbers have other numbers as labels; else ''."""
    moved = [i for i, name in enumerate(names) if name.isdecimal() and int(name) != i]
    if not moved or not all(name.isdecimal() for name in names):
        return ""
    return f"classes are in the order of text: label {moved[0]} is class {names[moved[0]]!r}"


def ignored(names: Sequence[str]) -> str:
    """A line about files that are left out since they are no images that can be read; '' for none."""
    kinds = {name.rpartition(".")[2].lower(): name for name in reversed(names)}
    line = f"{len(names):,} files are ignored, such as {', '.join(list(kinds.values())[-3:])}"
    if unread := {"heic", "heif", "avif", "jfif"} & kinds.keys():
        line = f"{line}: convert {' and '.join(sorted(unread))} to jpg or png"
    return line if names else ""


def scan(spec: str, root: str, folder: str = "") -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in root/folder, each sorted; no hidden ones.

    Args:
        spec: the user's name of the root, for messages.
        root: a folder.
        folder: a folder inside it, with slashes; "": the root itself.
    """
    folders, files = [], []
    try:
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name not in _MACHINES:
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise DataError(
            f"images {spec!r}: folder {folder or '.'!r} cannot be listed ({error.strerror})"
        ) from error
    return sorted(folders), sorted(files)


def walk(
    spec: str, root: str, folder: str = "", above: frozenset[str] = frozenset()
) -> Iterator[tuple[str, list[str]]]:
    """(folder, its files) of `folder` and of all folders inside it; follows links.

    Args:
        spec, root, folder: see `scan`.
        above: the real paths of the folders that contain it.
    """
    real = os.path.realpath(os.path.join(root, folder))
    if real in above:
        raise DataError(f"images {spec!r}: {folder!r} links to a folder that contains it")
    folders, files = scan(spec, root, folder)
    yield folder, files
    for name in folders:
        yield from walk(spec, root, f"{folder}/{name}".lstrip("/"), above | {real})
