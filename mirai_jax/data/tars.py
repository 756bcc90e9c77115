"""WebDataset tars: an index of every tar is made once, then an image is one read in the tar."""

import contextlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from mirai_jax.data import packed
from mirai_jax.utils.errors import DataError, first_line

SUFFIXES = ("jpg", "jpeg", "png", "webp")
_LARGEST_LABEL = 2**20  # bytes of a .cls or .json file


class TarImages(packed.PackedImages):
    """Samples of tars: consecutive members with one name up to the first dot.

    A sample has its image under one of SUFFIXES and its label in .cls, or under 'label' in .json: a
    number, or a class name.
    """

    kind = "wds"

    def __init__(self, spec: str, paths: Sequence[str]):
        # Python reads the headers: more threads would wait for each other, and take twice as long.
        indices = packed.indices(paths, _index, threads=2)
        self._ranges = [index["ranges"] for index in indices]
        self._texts = np.concatenate([index["labels"] for index in indices])
        super().__init__(spec, paths, list(map(len, self._ranges)))
        found = zip(self._names, indices, strict=True)
        self.skipped = tuple(f"{name}:{left}" for name, index in found for left in index["skipped"])

    def _stored_labels(self) -> np.ndarray:
        if all(re.fullmatch(r"-?\d{1,18}|", text) for text in np.unique(self._texts)):
            return np.where(self._texts == "", "-1", self._texts).astype(np.int64)
        return self._texts

    def _read(self, number: int, row: int) -> bytes:
        start, size = map(int, self._ranges[number][row])
        return self._bytes(self._paths[number], start, size, number, row)


def _index(path: str) -> packed.Index:
    """{'ranges': int64 (N, 2) of start and size, 'labels': text (N,), 'skipped': text} of a tar."""
    ranges, labels, skipped = [], [], []
    for name, image, label in _samples(path):
        if image is None:
            skipped.append(name)
        else:
            ranges.append(image)
            labels.append(label)
    ranges = np.array(ranges, np.int64).reshape(-1, 2)
    return {"ranges": ranges, "labels": np.array(labels, str), "skipped": np.array(skipped, str)}


def _samples(path: str) -> Iterator[tuple[str, tuple[int, int] | None, str]]:
    """Name, (start, size) of the image and label of every sample; and what follows a damaged header."""
    with open(path, "rb") as raw:
        try:
            tar = tarfile.TarFile(fileobj=raw)
        except tarfile.ReadError as error:
            raise DataError(
                f"{path} is no plain tar ({first_line(error)}); it must be one: unpack .tar.gz first"
            ) from error
        name, image, label = "", None, ""
        for member in _members(tar):
            folder, base = os.path.split(member.name)
            stem, _, kind = base.partition(".")
            stem, kind = os.path.join(folder, stem), kind.lower()
            if name and stem != name:
                yield name, image, label
                image, label = None, ""
            name = stem
            if kind in SUFFIXES and image is None:
                image = member.offset_data, member.size
            elif kind == "cls" or (kind == "json" and not label):
                label = _label(raw, member, kind) or label
        if name:
            yield name, image, label
        raw.seek(tar.offset)
        if raw.read(tarfile.BLOCKSIZE).strip(b"\0"):
            yield f"what follows byte {tar.offset}, which is no tar", None, ""


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    with contextlib.suppress(tarfile.ReadError):  # it ends early: the last image is found short
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would keep all of them
            if member.isreg():
                yield member


def _label(raw: BinaryIO, member: tarfile.TarInfo, kind: str) -> str:
    """'' if it is none."""
    raw.seek(member.offset_data)
    try:
        text = raw.read(min(member.size, _LARGEST_LABEL)).decode().strip()
        label = text if kind == "cls" else json.loads(text)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return str(label) if isinstance(label, str | int) and not isinstance(label, bool) else ""
