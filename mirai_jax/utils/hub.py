"""What lies on the Hugging Face Hub: hf:OWNER/NAME[@REVISION]; a file of it has /FILE after that.

The package huggingface_hub fetches it to its own cache, and finds it there when HF_HUB_OFFLINE=1.
"""

import os
import re
from collections.abc import Callable
from typing import Any

from mirai_jax.utils.errors import ConfigError, first_line

_FILE = re.compile(r"hf:(?P<repo>[^/@:]+/[^/@:]+)(@(?P<revision>[^/:]+))?/(?P<file>.+)")
_DATA = re.compile(r"hf:(?P<repo>[^/@:]+/[^/@:]+)(@(?P<revision>[^:]+))?(:(?P<split>[^:]+))?")


def local_file(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The local copy of hf:OWNER/NAME[@REVISION]/FILE; another path as it is.

    Raises:
        ConfigError: there is no such file, or no network, or the extra is not installed.
    """
    if not str(path).startswith("hf:"):
        return path
    if not (found := _FILE.fullmatch(str(path))):
        raise ConfigError(f"{path} is no file; it must be hf:OWNER/NAME[@REVISION]/FILE")
    return _fetch(path, "hf_hub_download", found["repo"], found["file"], revision=found["revision"])


def data_files(spec: str, find: Callable[[str], list[str]]) -> list[str]:
    """Fetches a split of a data set and returns what `find` finds of it in its folder.

    Args:
        spec: hf:OWNER/NAME[@REVISION][:SPLIT]; split 'train' if there are files named so, else all. Of
            several subsets one is chosen by SUBSET/SPLIT.

    Raises:
        ConfigError: as `local_file`; or files of several subsets, which may have the same images.
    """
    if not (found := _DATA.fullmatch(spec)):
        raise ConfigError(f"images {spec!r}; it must be hf:OWNER/NAME[@REVISION][:SPLIT]")
    for split in [found["split"]] if found["split"] else ["train", ""]:
        patterns = [f"*{split}*.parquet", f"*{split}*.tar"]
        folder = _fetch(
            spec, "snapshot_download", found["repo"], repo_type="dataset",
            revision=found["revision"], allow_patterns=patterns,
        )  # fmt: skip
        subsets = {f: _subset(os.path.relpath(f, folder), split) for f in find(folder)}
        several = sorted(set(subsets.values()) - {""})
        if len(several) > 1:  # of the same images, perhaps
            one = f"{several[-1]}/{split}".rstrip("/")
            raise ConfigError(
                f"images {spec!r} has subsets {', '.join(several)}; it must name one, such as :{one}"
            )
        if several:
            return [f for f, subset in subsets.items() if subset]
    raise ConfigError(f"images {spec!r} has no parquet file and no tar; it must have some")


def _subset(name: str, split: str) -> str:
    """The folder of the subset of a file of the split, '.' for none; '' for a file of another split."""
    if not split:
        return name.rpartition("/")[0].partition("/")[0] or "."
    match = re.search(rf"(^|[/_.-]){re.escape(split)}([/_.-]|$)", name)
    return (os.path.dirname(name[: match.start() + 1]) or ".") if match else ""


def _fetch(path: Any, function: str, *arguments: str, **options: Any) -> str:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(f"{path} needs the extra: pip install -e '.[hub]'") from error
    try:
        return getattr(huggingface_hub, function)(*arguments, **options)
    except Exception as error:  # of the network, the Hub and its cache: a dozen kinds
        kind, message = type(error).__name__, first_line(error)
        raise ConfigError(f"{path} cannot be fetched ({kind}: {message})") from error
