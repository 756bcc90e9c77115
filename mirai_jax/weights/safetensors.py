"""Reads and writes .safetensors files, bfloat16 included, by the format's specification.

Eight bytes tell the length of a JSON header {name: {dtype, shape, data_offsets}}; the numbers
follow, little-endian, without gaps. What every file of weights needs is here too: `not_weights`
names what was downloaded instead of one.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from mirai_jax.utils.files import atomic_write

_MAX_HEADER = 100_000_000
# In the order in which the reference writer puts the tensors of a file.
_DTYPES = {
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_RANKS = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class SafetensorsError(ValueError):
    """Not a readable or writable safetensors file. The message is one line and names the file."""


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a .safetensors file.

    Returns:
        {name: array}, in the order of the file; BF16 is `ml_dtypes.bfloat16`, the F8 types are
        `ml_dtypes.float8_e4m3fn` and `float8_e5m2`. The metadata is checked: see `read_metadata`.

    Raises:
        SafetensorsError: the file is damaged, is something else, or breaks a rule of the format.
        OSError: the file cannot be opened.
    """
    with _opened(path) as file:
        return _read(file)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What is kept beside the arrays. Raises as `read` does, but looks at the header alone."""
    with _opened(path) as file:
        return _read_header(file)[1]


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    with open(path, "rb") as file:
        try:
            yield file
        except SafetensorsError as error:
            raise SafetensorsError(f"{os.fspath(path)}: {error}") from error
        except (ValueError, RecursionError) as error:  # from JSON, UTF-8, and NumPy on a shape
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise SafetensorsError(
                f"{os.fspath(path)}: damaged safetensors file ({why})"
            ) from error


def write(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a .safetensors file, byte for byte as the reference package would.

    The file appears under its name only when it is whole. At most one array is copied at a time,
    and only if it is not contiguous.

    Args:
        path: replaced if it exists.
        arrays: {name: array} of any shape; float64, float32, float16, bfloat16, float8_e4m3fn,
            float8_e5m2, (unsigned) integers of 8 to 64 bits or bool.
        metadata: text to keep beside the arrays; written in the order of its keys.

    Raises:
        SafetensorsError: a name, an array or an entry of the metadata that the format cannot hold.
        OSError: the file cannot be written.
    """
    try:
        for name, array in arrays.items():
            _check_writable(name, array)
        names = sorted(arrays, key=lambda name: (_RANKS[little_endian(arrays[name])], name))
        header = _header({name: arrays[name] for name in names}, metadata)
    except SafetensorsError as error:
        raise SafetensorsError(f"{os.fspath(path)}: {error}") from error
    with atomic_write(path) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            file.write(raw_bytes(arrays[name]))


def not_weights(start: bytes) -> str:
    """What a file that starts so is, where that is plain and not weights; else ''.

    Args:
        start: its first bytes, 64 or so.
    """
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself: fetch that with 'git lfs pull'"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page: the download went wrong"
    return ""


def little_endian(array: np.ndarray) -> np.dtype:
    """The dtype of the array's numbers in a file."""
    dtype = array.dtype
    return dtype if dtype.byteorder == "|" else dtype.newbyteorder("<")


def raw_bytes(array: np.ndarray) -> np.ndarray:
    """The numbers of an array in row-major order, little-endian, as uint8 (nbytes,).

    Shares the array's memory if that is laid out so.
    """
    return array.astype(little_endian(array), order="C", copy=False).reshape(-1).view(np.uint8)


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, str], int]:
    """The entries by name, the metadata, and how many bytes are left for tensors."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(64)
    if message := not_weights(start):
        raise SafetensorsError(message)
    length = int.from_bytes(start[:8], "little")
    _require(
        8 + length <= size and length <= _MAX_HEADER,
        f"not a safetensors file, or a truncated one: a header of {length} bytes in a file "
        f"of {size} (allowed are {_MAX_HEADER})",
    )
    file.seek(8)
    text = file.read(length)
    _require(text.startswith(b"{"), f"not a safetensors file (its header starts with {text[:8]!r})")
    header = json.loads(text.decode(), object_pairs_hook=_unique)
    "".join(header).encode()  # raises if a name holds half a character, which JSON can spell
    metadata = header.pop("__metadata__", {})
    _check_metadata(metadata)
    return header, metadata, size - 8 - length


def _read(file: BinaryIO) -> dict[str, np.ndarray]:
    header, _, size = _read_header(file)
    end, entries = 0, sorted(_entry(name, entry) for name, entry in header.items())
    for begin, stop, name, *_ in entries:
        _require(
            begin == end,
            f"tensor {name!r:.100} starts at byte {begin}, not at {end} (hole or overlap)",
        )
        end = stop
    _require(
        end == size,
        f"truncated or too long: {end} bytes of tensors declared, {size} found",
    )
    return {name: _array(file, name, _DTYPES[dtype], shape) for _, _, name, dtype, shape in entries}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = {}
    for name, value in pairs:
        if name in unique:
            raise SafetensorsError(f"key {name!r:.100} comes twice in the header")
        unique[name] = value
    return unique


def _check_metadata(metadata: Any) -> None:
    _require(
        isinstance(metadata, Mapping)
        and all(type(text) is str for pair in metadata.items() for text in pair),
        "__metadata__ must map text to text",
    )


def _entry(name: str, entry: Any) -> tuple[int, int, str, str, list[int]]:
    """One tensor of the header, checked for itself: (begin, end, name, dtype, shape)."""
    _require(
        isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"},
        f"tensor {name!r:.100} must have dtype, shape and data_offsets, and nothing else",
    )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    _require(
        isinstance(dtype, str) and dtype in _DTYPES,
        f"tensor {name!r:.100} has dtype {dtype!r:.100}: allowed are {', '.join(_DTYPES)}",
    )
    for part, allowed in ((shape, range(65)), (offsets, (2,))):
        _require(
            isinstance(part, list)
            and len(part) in allowed
            and all(type(n) is int and 0 <= n < 2**63 for n in part),
            f"tensor {name!r:.100}: shape must be up to 64 sizes, data_offsets two positions",
        )
    begin, end = offsets
    _require(
        end - begin == math.prod(shape) * _DTYPES[dtype].itemsize,
        f"tensor {name!r:.100}: {dtype} {shape} does not fill bytes {begin} to {end}",
    )
    return begin, end, name, dtype, shape


def _array(file: BinaryIO, name: str, dtype: np.dtype, shape: list[int]) -> np.ndarray:
    array = np.empty(shape, dtype)
    raw = array.reshape(-1).view(np.uint8)
    _require(
        file.readinto(raw) == raw.size, f"truncated: bytes of tensor {name!r:.100} are missing"
    )
    # NumPy computes nonsense with truth values other than 0 and 1.
    _require(
        dtype.kind != "b" or raw.max(initial=0) <= 1, f"tensor {name!r:.100} is not all 0 and 1"
    )
    return array


def _check_writable(name: Any, array: Any) -> None:
    _require(
        type(name) is str and name != "__metadata__",
        f"a tensor is named {name!r:.100}: allowed is any text but '__metadata__'",
    )
    _require(
        isinstance(array, np.ndarray),
        f"tensor {name!r:.100} is a {type(array).__name__}, no NumPy array",
    )
    _require(
        little_endian(array) in _NAMES,
        f"tensor {name!r:.100} is {array.dtype}: allowed are {', '.join(_DTYPES)}",
    )


def _header(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None) -> bytes:
    header, end = {}, 0
    if metadata is not None:
        _check_metadata(metadata)
        header["__metadata__"] = dict(sorted(metadata.items()))
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": _NAMES[little_endian(array)],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise SafetensorsError(f"a name or the metadata is not Unicode text ({error})") from error
    text += b" " * (-len(text) % 8)
    _require(
        len(text) <= _MAX_HEADER,
        f"its header would have {len(text)} bytes: allowed are {_MAX_HEADER}",
    )
    return text


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise SafetensorsError(otherwise)
