"""What every source of images gives: labelled images, by number and by key."""

import abc
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np


class ImageSource(abc.ABC):
    """Labelled images, by number and by key.

    An image is its encoded bytes, or pixels: uint8 (H, W), (H, W, 1) or (H, W, 3).
    """

    class_names: tuple[str, ...]  # () if the source does not name them
    skipped: tuple[str, ...] = ()  # keys of files that are left out, since they are no images

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abc.abstractmethod
    def about(self, index: int) -> tuple[int, str]:
        """Label (0 or more) and key of image `index`; the key stays the same."""

    def key(self, index: int) -> str:
        """The key of image `index`, also of one without a label."""
        return self.about(index)[1]

    @abc.abstractmethod
    def example(self, index: int) -> tuple[bytes | np.ndarray, int, str]:
        """Image, label and key of image `index`, fetched once."""

    @abc.abstractmethod
    def find(self, key: str) -> bytes | np.ndarray:
        """The image with this key; the others are not listed. Raises DataError without one."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Kind, name, split and number, ready for JSON, without any path."""

    def prepare(self) -> "ImageSource":
        """The same source, with a `find` that is fast in any order, also in other processes."""
        return self

    def listing(self) -> str:
        """A checksum of the keys and labels in their order; '' where their number says enough."""
        return ""

    def labels(self) -> np.ndarray | None:
        """int32 (N,), where no image need be read for them."""
        return None

    def hashes(self) -> np.ndarray:
        """uint64 (N,): a hash of each image's key, or of its number where it has no other name.

        Other images do not move an image's hash: those below a bound make a split that stays.
        """
        return hashes_of(map(str, range(len(self))))

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")


def hashes_of(names: Iterable[str]) -> np.ndarray:
    """uint64 (N,): the first 8 bytes of the SHA-256 of each name."""
    heads = [hashlib.sha256(name.encode()).digest()[:8] for name in names]
    return np.frombuffer(b"".join(heads), ">u8").astype(np.uint64)
