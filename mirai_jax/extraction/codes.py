"""Codes that other projects have made, by number: LlamaGen's folders of .npy and RAR's lines of JSON."""

import dataclasses
import functools
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from mirai_jax.data import packed
from mirai_jax.data.image_source import ImageSource
from mirai_jax.utils import files, paths
from mirai_jax.utils.errors import Damaged, DataError, Unreadable, first_line

# Tokenizers by name, for codes without their tokenizer's weights: codes, and pixels a side of a token.
NAMED = {"vq16": (16384, 16), "vq8": (16384, 8), "maskgit": (1024, 16)}


@dataclasses.dataclass(frozen=True)
class GivenCodes:
    """Records of codes made elsewhere.

    `read` takes a number and gives the record's codes, integers (crops, L), its label and its key. It
    raises Unreadable, Damaged where the storage works, and DataError where image and label differ.
    """

    kind: str
    count: int
    crops: int  # C, of a record
    read: Callable[[int], tuple[np.ndarray, int, str]]
    skipped: tuple[str, ...] = ()  # names of other files

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": "", "split": "", "number": self.count}


def open_codes(path: str, images: ImageSource | None, ten: bool) -> GivenCodes:
    """Opens LlamaGen's folder, NAME_codes and NAME_labels in it, or RAR's file of lines (also hf:).

    Args:
        images: those that LlamaGen's codes were made of, whose keys the records get.
        ten: whether a record has ten crops.

    Raises:
        DataError: nothing of the kind.
    """
    path = str(paths.local(path))
    if os.path.isdir(path):
        return _open_llamagen(path, images, ten)
    if os.path.isfile(path) and images is None:
        return _open_rar(path, ten)
    raise DataError(
        f"--codes is {path!r}; it must be a folder of NAME_codes and NAME_labels (LlamaGen's), or a file "
        "of JSON lines (RAR's; without --images, for the order of its images is not known)"
    )


def read_codes(
    given: GivenCodes, index: int, grid: tuple[int, int], vocab_size: int
) -> tuple[np.ndarray, int, str]:
    """Codes, uint16 (C, L), label and key of a record. Raises DataError for another grid or vocabulary."""
    codes, label, key = given.read(index)
    wanted = given.crops, math.prod(grid)
    if codes.shape != wanted or not 0 <= codes.min() <= codes.max() < vocab_size:
        raise DataError(
            f"record {key!r} has codes {codes.shape} up to {codes.max(initial=0)}; they must be {wanted} "
            f"and less than {vocab_size}, by --ten_crop, --image_size and --tokenizer"
        )
    if not 0 <= label < 2**31:
        raise DataError(f"record {key!r} has label {label}; it must be 0 or more")
    return codes.astype(np.uint16), label, key


def _open_llamagen(path: str, images: ImageSource | None, ten: bool) -> GivenCodes:
    """NAME_codes/N.npy, of shape (1, C, L), and NAME_labels/N.npy belong to the N-th image of a folder.

    What goes beyond `images` is left out: several processes repeat the first images at the end.
    """
    found = sorted(pathlib.Path(path).glob("*_codes"))
    if len(found) != 1:
        raise DataError(f"--codes is {path!r}; it must hold one NAME_codes, not {len(found)}")
    numbers, others = [], []
    with os.scandir(found[0]) as entries:  # once: there may be a million
        for entry in entries:
            name = re.fullmatch(r"(\d{1,18})\.npy", entry.name)
            (numbers.append(int(name[1])) if name else others.append(entry.name))
    numbers = np.sort(np.array(numbers, np.int64))
    if images is not None:
        numbers = numbers[numbers < len(images)]
    labels = found[0].with_name(found[0].name.removesuffix("_codes") + "_labels")

    def read(index: int) -> tuple[np.ndarray, int, str]:
        number = int(numbers[index])
        codes, label = (_load(folder / f"{number}.npy") for folder in (found[0], labels))
        codes = codes[0] if codes.ndim == 3 and len(codes) == 1 else codes
        wanted, key = (label, str(number)) if images is None else images.about(number)
        if label.size != 1 or label != wanted:
            raise DataError(f"{labels}/{number}.npy is {label}; {key!r} has label {wanted}")
        return codes, int(label.item()), key

    return GivenCodes("llamagen codes", len(numbers), 10 if ten else 2, read, tuple(sorted(others)))


def _load(path: pathlib.Path) -> np.ndarray:
    """An array of integers."""
    try:
        raw = files.patiently(path.read_bytes)
    except OSError as error:
        raise Unreadable(f"{path} cannot be read ({first_line(error)})") from error
    try:
        array = np.load(io.BytesIO(raw), allow_pickle=False)
    except Exception as error:  # NumPy raises half a dozen kinds on damaged bytes
        raise Damaged(f"{path} is no whole .npy file ({first_line(error)})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise Damaged(f"{path} is no array of integers")
    return array


def _open_rar(path: str, ten: bool) -> GivenCodes:
    """Lines {'class_id', 'tokens'}, one a crop; ten crops of an image stand one after the other."""
    crops, ends, at = 10 if ten else 1, [np.zeros(1, np.int64)], 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at + 1)
            at += len(block)
    starts = np.unique(np.concatenate([*ends, [at]]))  # the last line may have no end
    if (len(starts) - 1) % crops:
        raise DataError(
            f"--codes is {path!r}, of {len(starts) - 1} lines; it must be {crops} an image"
        )
    starts = starts[::crops]

    def read(index: int) -> tuple[np.ndarray, int, str]:
        start, end = map(int, starts[index : index + 2])
        where = f"{path}, line {index * crops + 1}"
        try:
            raw = files.patiently(functools.partial(packed.read_range, path, start, end - start))
        except OSError as error:
            raise Unreadable(f"{where}: cannot be read ({first_line(error)})") from error
        try:
            found = [json.loads(line) for line in raw.splitlines()]
            (label,) = {line["class_id"] for line in found}
            codes = np.array([line["tokens"] for line in found])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            why = f"no {crops} lines of tokens and one class_id ({first_line(error)})"
            raise Damaged(f"{where}: {why}") from error
        if type(label) is not int or codes.dtype.kind != "i":
            raise Damaged(f"{where}: class_id and tokens must be integers")
        return codes, label, str(index)

    return GivenCodes("rar codes", len(starts) - 1, crops, read)
