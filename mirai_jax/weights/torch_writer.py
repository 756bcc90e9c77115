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

    The file appears under its name only when it is whole. At most one array is copied at a time,
    and only if it is not contiguous. Arrays that share memory are written apart.

    Args:
        path: replaced if it exists.
        tree: nested dicts (OrderedDicts too), lists and tuples of arrays,
            str, int, float, bool and None. Arrays become tensors of the same shape, dtype and row-major order; allowed are
            float64, float32, float16, `ml_dtypes.bfloat16`, int64, int32, int16, int8, uint8, bool,
            complex64 and complex128.

    Raises:
        TorchFileError: the tree holds anything else.
        OSError: the file cannot be written.
    """
    arrays: list[np.ndarray] = []
    try:
        program = b"\x80\x02" + b"".join(_instructions(tree, arrays)) + b"."
    except TorchFileError as error:
        raise TorchFileError(f"{os.fspath(path)}: {error}") from error
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
    raise TorchFileError(f"it would hold a {type(node).__name__}, which is no plain data")


def _value(value: str | int | float | bool | None) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def _tensor(array: np.ndarray, arrays: list[np.ndarray]) -> bytes:
    """A call of torch._utils._rebuild_tensor_v2 on a storage that nothing else refers to."""
    dtype = _little_endian(array)
    if dtype not in _STORAGES:
        names = ", ".join(map(str, _STORAGES))
        raise TorchFileError(f"it would hold an array of {array.dtype}; allowed are {names}")
    strides = tuple(math.prod(array.shape[i + 1 :]) for i in range(array.ndim))
    arrays.append(array)
    return b"".join(
        [
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            _value("storage"),
            b"ctorch\n" + _STORAGES[dtype].encode() + b"\n",
            _value(str(len(arrays) - 1)),
            _value("cpu"),
            _value(array.size),
            b"tQ",  # ends the reference to the storage
            _value(0),
            _value(array.shape),
            _value(strides),
            _value(False),
            _ORDERED_DICT,  # of hooks
            b"tR",
        ]
    )


def _little_endian(array: np.ndarray) -> np.dtype:
    dtype = array.dtype
    return dtype if dtype.byteorder == "|" else dtype.newbyteorder("<")


def _raw_bytes(array: np.ndarray) -> np.ndarray:
    """The numbers in row-major order, little-endian, as uint8 (nbytes,); no copy if they lie so."""
    return array.astype(_little_endian(array), order="C", copy=False).reshape(-1).view(np.uint8)


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
