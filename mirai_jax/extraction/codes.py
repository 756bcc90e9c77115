"""Codes that other projects have made, by number: LlamaGen's folders of .npy and RAR's lines of JSON."""

import abc
import contextlib
import io
import json
import os
import pathlib
import re
from typing import Any, ClassVar

import numpy as np

from mirai_jax.data.image_source import ImageSource
from mirai_jax.utils import files
from mirai_jax.utils.errors import Damaged, DataError, Unreadable, first_line

# Tokenizers by name, for codes without their tokenizer's weights: codes, and pixels a side of a token.
NAMED = {"vq16": (16384, 16), "vq8": (16384, 8), "maskgit": (1024, 16)}


class GivenCodes(abc.ABC):
    """Records of codes made elsewhere."""

    kind: ClassVar[str]
    skipped: tuple[str, ...] = ()  # names of other files
    crops: int  # C, of a record

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many records there are."""

    @abc.abstractmethod
    def read(self, index: int) -> tuple[np.ndarray, int, str]:
        """Codes, integers (C, L), label and key. Raises Unreadable (Damaged if its files are there)."""

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": "", "split": "", "number": len(self)}


def open_codes(path: str, images: ImageSource | None, ten: bool) -> GivenCodes:
    """Opens LlamaGen's folder, NAME_codes and NAME_labels in it, or RAR's file of lines.

    Args:
        images: those that LlamaGen's codes were made of, whose keys the records get.
        ten: whether a record has ten crops.

    Raises:
        DataError: nothing of the kind, or `images` are others.
    """
    if os.path.isdir(path):
        return LlamaGenCodes(path, images, ten)
    if os.path.isfile(path) and images is None:
        return RarCodes(path, ten)
    raise DataError(
        f"--codes is {path!r}; it must be a folder of NAME_codes and NAME_labels (LlamaGen's), or a file "
        "of JSON lines (RAR's; without --images, for the order of its images is not known)"
    )


class LlamaGenCodes(GivenCodes):
    """NAME_codes/N.npy of shape (1, C, L) and NAME_labels/N.npy of image N in the order of its folder.

    With its `images`, what goes beyond them is left out: several processes repeat the first images.
    """

    kind = "llamagen codes"

    def __init__(self, path: str, images: ImageSource | None, ten: bool):
        found = sorted(pathlib.Path(path).glob("*_codes"))
        if len(found) != 1:
            raise DataError(f"--codes is {path!r}; it must hold one NAME_codes, not {len(found)}")
        self._codes, self._images, self.crops = found[0], images, 10 if ten else 2
        self._labels = found[0].with_name(found[0].name.removesuffix("_codes") + "_labels")
        numbers, others = [], []
        with os.scandir(self._codes) as entries:  # once: there may be a million
            for entry in entries:
                name = re.fullmatch(r"(\d{1,18})\.npy", entry.name)
                (numbers.append(int(name[1])) if name else others.append(entry.name))
        self._numbers, self.skipped = np.sort(np.array(numbers, np.int64)), tuple(sorted(others))
        if images is not None:
            self._numbers = self._numbers[self._numbers < len(images)]
        if not len(self):
            raise DataError(f"--codes is {path!r}; {self._codes} must hold files such as 0.npy")
        for index in map(int, np.unique(np.linspace(0, len(self) - 1, 16).astype(int))):
            with contextlib.suppress(Unreadable):
                self._about(index, self._label(index))

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, index: int) -> tuple[np.ndarray, int, str]:
        codes, label = self._load(self._codes, index), self._label(index)
        codes = codes[0] if codes.ndim == 3 and len(codes) == 1 else codes
        return codes, label, self._about(index, label)

    def _label(self, index: int) -> int:
        label = self._load(self._labels, index)
        if label.size != 1:
            raise Damaged(f"{self._numbers[index]}.npy of {self._labels} is no label")
        return int(label.item())

    def _about(self, index: int, label: int) -> str:
        """The key of a record. Raises DataError if its image has another label."""
        number = int(self._numbers[index])
        if self._images is None:
            return str(number)
        wanted, key = self._images.about(number)
        if wanted != label:
            raise DataError(
                f"{number}.npy has label {label}; image {key!r} of --images has {wanted}"
            )
        return key

    def _load(self, folder: pathlib.Path, index: int) -> np.ndarray:
        path = folder / f"{self._numbers[index]}.npy"
        try:
            raw = files.patiently(path.read_bytes)
        except OSError as error:
            raise Unreadable(f"{path} cannot be read ({first_line(error)})") from error
        try:
            array = np.load(io.BytesIO(raw), allow_pickle=False)
        except Exception as error:  # NumPy raises half a dozen kinds on damaged bytes
            raise Damaged(f"{path} is no whole .npy file ({first_line(error)})") from error
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
            raise Damaged(f"{path} has {array.dtype} in it; it must be integers")
        return array


class RarCodes(GivenCodes):
    """Lines {'class_id', 'tokens'}, one a crop; ten crops of an image stand one after the other."""

    kind = "rar codes"

    def __init__(self, path: str, ten: bool):
        self._path, self.crops = path, 10 if ten else 1
        ends, at = [np.zeros(1, np.int64)], 0
        with open(path, "rb") as file:
            while block := file.read(2**24):
                ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at + 1)
                at += len(block)
        starts = np.concatenate(ends)
        if starts[-1] != at:  # the last line has no end
            starts = np.append(starts, at)
        if (len(starts) - 1) % self.crops or not at:
            raise DataError(
                f"--codes is {path!r}, of {len(starts) - 1} lines; it must be {self.crops} an image"
            )
        self._starts = starts[:: self.crops]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def read(self, index: int) -> tuple[np.ndarray, int, str]:
        start, end = map(int, self._starts[index : index + 2])

        def read() -> bytes:
            with open(self._path, "rb", buffering=0) as file:
                return os.pread(file.fileno(), end - start, start)

        try:
            raw = files.patiently(read)
        except OSError as error:
            raise Unreadable(f"{self._path} cannot be read ({first_line(error)})") from error
        lines = f"line {index * self.crops + 1} of {self._path}"
        try:
            found = [json.loads(line) for line in raw.splitlines()]
            labels = {line["class_id"] for line in found}
            codes = np.array([line["tokens"] for line in found])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Damaged(f"{lines} has no class_id and tokens ({first_line(error)})") from error
        if len(labels) != 1 or type(label := labels.pop()) is not int or codes.dtype.kind != "i":
            raise Damaged(f"{lines}: {self.crops} lines must be tokens of one class_id")
        return codes, label, str(index)
