"""Writes PyTorch checkpoints (.pt, .pth) from NumPy arrays, without torch: the zip of torch >= 1.6.

`torch.load` reads them, also with weights_only=True or mmap=True: the pickle keeps to the few
instructions that torch's restricted unpickler knows, and numbers start at multiples of 64 bytes.
"""

import collections
import math
import os
import pickle
import zipfile
from typing import Any, BinaryIO

import numpy as np

from mirai_jax.utils.files import atomic_write
from mirai_jax.weights.torch_reader import STORAGE_DTYPES, TorchFileError

_STORAGES = {dtype: storage for storage, dtype in STORAGE_DTYPES.items()}
_ALIGNMENT = 64
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def write(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes what `torch_reader.read` reads, as `torch.save` would.

    The file appears, or replaces another, only when it is whole. At most one array is copied at a
    time, and only if it is not contiguous. Arrays that share memory are written apart.

    Args:
        tree: nested dicts (OrderedDicts too), lists and tuples of str, int, float, bool, None and
            arrays of STORAGE_DTYPES, which become row-major tensors.

    Raises:
        TorchFileError: the tree holds anything else.
        OSError: the file cannot be written.
    """
    arrays: list[np.ndarray] = []
    program = b"\x80\x02" + b"".join(_instructions(tree, arrays)) + b"."
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, file, "data.pkl", program)
        _add(archive, file, "byteorder", b"little")
        for key, array in enumerate(arrays):
            _add(archive, file, f"data/{key}", _raw_bytes(array))
        _add(archive, file, "version", b"3\n")


def _instructions(node: Any, arrays: list[np.ndarray]) -> list[bytes]:
    """The pickle instructions that leave `node` on the stack; its arrays are added to `arrays`."""
    if isinstance(node, np.ndarray):
        return [_tensor(node, arrays)]
    if type(node) in (str, int, float, bool, type(None)):
        return [_value(node)]
    if type(node) in (dict, collections.OrderedDict):
        parts = [pickle.EMPTY_DICT if type(node) is dict else _ORDERED_DICT, pickle.MARK]
        for key, value in node.items():
            parts += [*_instructions(key, arrays), *_instructions(value, arrays)]
        return [*parts, pickle.SETITEMS]
    if type(node) in (list, tuple):
        parts = [pickle.EMPTY_LIST, pickle.MARK] if type(node) is list else [pickle.MARK]
        for value in node:
            parts += _instructions(value, arrays)
        return [*parts, pickle.APPENDS if type(node) is list else pickle.TUPLE]
    raise TorchFileError(f"PyTorch files hold no {type(node).__name__} here, only plain data")


def _value(value: str | int | float | bool | None) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def _tensor(array: np.ndarray, arrays: list[np.ndarray]) -> bytes:
    """A call of torch._utils._rebuild_tensor_v2 on a storage that nothing else refers to."""
    dtype = array.dtype.newbyteorder("<")
    if dtype not in _STORAGES:
        raise TorchFileError(f"PyTorch files hold no array of {array.dtype}")
    strides = tuple(math.prod(array.shape[i + 1 :]) for i in range(array.ndim))
    arrays.append(array)
    place = [str(len(arrays) - 1), "cpu", array.size]
    layout = [0, array.shape, strides, False]
    return b"".join(
        [b"ctorch._utils\n_rebuild_tensor_v2\n((", _value("storage"), b"ctorch\n"]
        + [_STORAGES[dtype].encode(), b"\n", *map(_value, place), b"tQ", *map(_value, layout)]
        + [_ORDERED_DICT, b"tR"]  # of hooks
    )


def _raw_bytes(array: np.ndarray) -> np.ndarray:
    """The numbers in row-major order, little-endian, as uint8 (nbytes,); no copy if they lie so."""
    little = array.dtype.newbyteorder("<")
    return array.astype(little, order="C", copy=False).reshape(-1).view(np.uint8)


def _add(archive: zipfile.ZipFile, file: BinaryIO, name: str, raw: bytes | np.ndarray) -> None:
    """Adds an uncompressed entry whose bytes start at a multiple of 64, by padding its header."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    big = len(raw) > zipfile.ZIP64_LIMIT
    # A header is 30 bytes, the name, a field of sizes if they are big, and 4 bytes of this field.
    padding = -(file.tell() + 30 + len(entry.filename) + 20 * big + 4) % _ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding  # as torch pads
    with archive.open(entry, "w", force_zip64=big) as stream:
        stream.write(raw)
    entry.extra = b""  # not needed in the list of contents, which ends the archive
