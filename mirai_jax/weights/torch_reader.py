"""Reads PyTorch checkpoints (.pt, .pth) into NumPy arrays, without torch and without running code.

A checkpoint is a pickle that refers to blocks of numbers ("storages") kept beside it. Two layouts
exist: a zip archive (torch >= 1.6), and the older stream of pickles followed by the raw blocks.

Python's unpickler calls the functions that a file names. The interpreter here builds plain data
only: a name stays a `_Global`, which nothing can call, and a call is one of `_File.calls`. Every
allocation is bounded by the size of the file.
"""

import collections
import io
import math
import mmap
import os
import pathlib
import pickletools
import re
import zipfile
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from mirai_jax.utils.errors import DataError

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_KINDS = {"Double": "f8", "Float": "f4", "Half": "f2", "BFloat16": ml_dtypes.bfloat16, "Long": "i8",
          "Int": "i4", "Short": "i2", "Char": "i1", "Byte": "u1", "Bool": "?", "ComplexFloat": "c8",
          "ComplexDouble": "c16"}  # fmt: skip
STORAGE_DTYPES = {f"{kind}Storage": np.dtype(code) for kind, code in _KINDS.items()}
_STORAGES = {f"torch.{name}": dtype for name, dtype in STORAGE_DTYPES.items()}
_DTYPES = {f"torch.{dtype}": str(dtype) for dtype in STORAGE_DTYPES.values()}
_FACTORY = re.compile(r"(builtins|__builtin__)\.(dict|float|int|list|long|set)")  # of a defaultdict
_NUMBER = re.compile("b1|f[248]|[iu][1248]")  # the dtype of a NumPy scalar

# Pickle instructions that push a value.
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ARGUMENT = re.compile(
    "BININT[12]?|LONG[14]|BINFLOAT|(SHORT_)?(BINUNICODE|BINSTRING)|SHORT_BINBYTES"
)
# How many values an instruction takes from the stack; _FROM_MARK: all since the last MARK.
_TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "SETITEM": 2, "APPEND": 1, "STACK_GLOBAL": 2,
          "REDUCE": 2, "NEWOBJ": 2, "BUILD": 1, "BINPERSID": 1}  # fmt: skip
_FROM_MARK = ("TUPLE", "SETITEMS", "APPENDS")

_Global = collections.namedtuple("_Global", "name")  # a name inside a pickle
_Storage = collections.namedtuple("_Storage", "array")  # what tensors are views of
_KEYS = (str, int, float, bool, type(None))
_PLAIN = (*_KEYS, dict, collections.OrderedDict, list, tuple, np.ndarray)


class _Arguments(tuple):
    """A tuple that holds more than plain data: the arguments of a call."""


class TorchFileError(DataError):
    """Not a readable or writable PyTorch checkpoint; the message is one line."""


def read(path: str | os.PathLike) -> Any:
    """Reads a PyTorch checkpoint, either layout, into NumPy.

    Returns:
        What `torch.save` saved: nested dicts (OrderedDicts), lists and tuples of str, int, float,
        bool, None and, for tensors, ndarrays, which may be non-contiguous and share memory as they
        did; bfloat16 is `ml_dtypes.bfloat16`. A Namespace and a defaultdict become a dict, a
        torch.Size a tuple, a torch.dtype, torch.device or PosixPath its text ('float32', 'cuda:0'),
        and a NumPy number a Python one. NumPy arrays of numbers stay arrays.

    Raises:
        TorchFileError: the file is damaged, is something else, or holds anything but the above.
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            return _File(file).read()
        except Exception as error:  # damaged bytes raise almost anything
            known = isinstance(error, TorchFileError)
            message = "" if known else f"damaged PyTorch file, {type(error).__name__}: "
            message += " ".join(str(error).split())[:300]
            raise TorchFileError(f"{os.fspath(path)}: {message}") from error


class _File:
    """One open file. `budget` is how many bytes of storages and text it may still hold."""

    def __init__(self, file: BinaryIO):
        self.file, self.zip, self.folder = file, None, ""
        self.size = self.budget = os.fstat(file.fileno()).st_size
        self.arrays: dict[str, np.ndarray] = {}
        self.calls = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": lambda data, *unused: data,
            "torch.Size": lambda shape=(): shape,
            "torch.device": self._device,
            "collections.OrderedDict": lambda: collections.OrderedDict(),
            "collections.defaultdict": lambda factory=None: {},
            "argparse.Namespace": lambda: {},
            "numpy.dtype": lambda code, *unused: code,
            "numpy.core.multiarray.scalar": _number,
            "numpy._core.multiarray.scalar": _number,
            "numpy.core.multiarray._reconstruct": lambda *unused: np.empty(0, np.uint8),
            "numpy._core.multiarray._reconstruct": lambda *unused: np.empty(0, np.uint8),
            "numpy.ndarray": lambda: None,  # named, never called
            "_codecs.encode": self._encode,
            "pathlib.PosixPath": self._path,
            "pathlib._local.PosixPath": self._path,  # Python 3.13
        }

    def read(self) -> Any:
        start = self.file.read(16)
        self.file.seek(0)
        if start.startswith(b"PK\x03\x04"):
            return self._read_zip()
        _require(start.startswith(b"\x80"), f"not a PyTorch file (it starts with {start!r})")
        return self._read_stream()

    def _read_zip(self) -> Any:
        self.zip = zipfile.ZipFile(self.file)
        names = [name for name in self.zip.namelist() if f"/{name}".endswith("/data.pkl")]
        _require(len(names) == 1, f"not a PyTorch file (a zip with {len(names)} data.pkl)")
        self.folder = names[0].removesuffix("data.pkl")
        if self.folder + "byteorder" in self.zip.namelist():
            _require(self._entry("byteorder").read() == b"little", "a big-endian PyTorch file")
        return self._unpickle(io.BytesIO(self._entry("data.pkl").read()))

    def _entry(self, name: str) -> BinaryIO:
        info = self.zip.getinfo(self.folder + name)
        # torch never compresses, and a compressed entry could inflate to any size.
        stored = info.compress_type == zipfile.ZIP_STORED and info.file_size <= self.size
        _require(stored, f"its entry {name!r:.100} is compressed or longer than the file")
        return self.zip.open(info)

    def _read_stream(self) -> Any:
        # Of a map, read(n) allocates no more than is left, whatever length a damaged pickle claims.
        with mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ) as start:
            header = self._unpickle(start), self._unpickle(start)
            _require(header == (_MAGIC, _VERSION), "not a PyTorch file (another kind of pickle)")
            little = self._unpickle(start)["little_endian"]
            _require(little is True, "a big-endian PyTorch file")
            tree, keys = self._unpickle(start), self._unpickle(start)
            self.file.seek(start.tell())
        _require(sorted(keys) == sorted(self.arrays))
        for key in keys:  # the tensors of `tree` are views of the arrays filled here
            _require(int.from_bytes(self.file.read(8), "little") == self.arrays[key].size)
            self._fill(self.arrays[key], self.file)
        return tree

    def _unpickle(self, file: BinaryIO) -> Any:
        """Reads one pickle, which `file` then stands just behind."""
        stack, marks, memo = [], [], {}
        for op, arg, _ in pickletools.genops(file):
            name = op.name
            start = marks.pop() if name in _FROM_MARK else len(stack) - _TAKES.get(name, 0)
            items = stack[start:]
            del stack[start:]
            if name in _VALUES:
                stack.append(_VALUES[name])
            elif _ARGUMENT.fullmatch(name):
                stack.append(arg)
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else arg] = stack[-1]
            elif name == "MARK":
                marks.append(len(stack))
            elif name in ("EMPTY_DICT", "EMPTY_LIST"):
                stack.append({} if name == "EMPTY_DICT" else [])
            elif "TUPLE" in name:
                plain = all(type(item) in _PLAIN for item in items)
                stack.append(tuple(items) if plain else _Arguments(items))
            elif name in ("SETITEM", "SETITEMS"):
                _require(type(stack[-1]) in (dict, collections.OrderedDict))
                for key, value in zip(items[::2], items[1::2], strict=True):
                    _require(type(key) in _KEYS)  # hashing deep tuples could overflow the C stack
                    stack[-1][key] = _plain(value)
            elif name in ("APPEND", "APPENDS"):
                _require(type(stack[-1]) is list)
                stack[-1].extend(map(_plain, items))
            elif name == "GLOBAL":
                stack.append(self._global(*arg.split(" ", 1)))
            elif name == "STACK_GLOBAL":
                stack.append(self._global(*items))
            elif name in ("REDUCE", "NEWOBJ"):
                function, arguments = items
                _require(type(function) is _Global)
                stack.append(self.calls[function.name](*arguments))
            elif name == "BUILD":
                self._set_state(stack[-1], *items)
            elif name == "BINPERSID":
                stack.append(self._storage(*items[0]))
            else:
                allowed = name in ("PROTO", "FRAME", "STOP")
                _require(allowed, f"it holds a pickle instruction {name}, which is not read")
        (tree,) = stack
        return _plain(tree)

    def _global(self, module: str, attribute: str) -> Any:
        name = ".".join((module, attribute))
        if name in _DTYPES:
            return _DTYPES[name]
        known = name in self.calls or name in _STORAGES or _FACTORY.fullmatch(name)
        _require(known, f"it names {name!r:.200}; only tensors and plain containers are read")
        return _Global(name)

    def _set_state(self, target: Any, state: Any) -> None:
        """What `__setstate__` does to a Namespace, a NumPy array or dtype, or an OrderedDict."""
        if type(target) is dict and type(state) is dict:
            self._spend(len(state))  # a file could have one large dict copied many times
            target.update(state)
        elif type(target) is np.ndarray:  # one that `_reconstruct` began
            version, shape, code, fortran, data = state
            _require(target.size == 0 and type(code) is str and _NUMBER.fullmatch(code))
            _require(
                type(data) is bytes and len(data) == math.prod(shape) * np.dtype(code).itemsize
            )
            target.__setstate__((1, tuple(shape), np.dtype(code), fortran is True, data))
        elif type(target) is str:
            _require(state[1] in ("<", "|"), "it holds a big-endian number")
        else:
            _require(type(target) is collections.OrderedDict)  # drops a module's _metadata

    def _spend(self, count: int) -> None:
        self.budget -= count
        _require(self.budget >= 0, "truncated or damaged: it declares more than its size can hold")

    def _storage(self, kind, storage_type, key, device, count, view=None) -> _Storage:
        """What a persistent id refers to; views are of torch before 0.4, and not read."""
        dtype = _STORAGES[storage_type.name]
        _require(type(key) is str and type(count) is int and count >= 0 and view is None)
        if key not in self.arrays:
            self._spend(count * dtype.itemsize)
            self.arrays[key] = np.empty(count, dtype)
            if self.zip:
                self._fill(self.arrays[key], self._entry(f"data/{key}"))
        _require((self.arrays[key].dtype, self.arrays[key].size) == (dtype, count))
        return _Storage(self.arrays[key])

    def _fill(self, array: np.ndarray, file: BinaryIO) -> None:
        count = file.readinto(array.view(np.uint8))
        _require(count == array.nbytes, "truncated: bytes of a storage are missing")

    def _tensor(self, storage, offset, shape, strides, *unused) -> np.ndarray:
        """A view of a storage; refused if it would leave the storage."""
        whole = all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
        _require(whole and len(shape) <= 64)
        array, count, last = storage.array, math.prod(shape), offset - 1
        if count:
            last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        # An expanded tensor has stride 0: any number of elements would fit the storage.
        inside = last < array.size and count <= self.size
        _require(inside, "damaged PyTorch file (a tensor reaches outside its storage)")
        steps = [s * array.itemsize for s in strides]
        return np.lib.stride_tricks.as_strided(array[offset:], shape, steps)

    def _device(self, kind: str, index: int | None = None) -> str:
        self._spend(len(kind))
        return kind if index is None else kind + f":{index:d}"

    def _path(self, *parts: str) -> str:
        self._spend(sum(len(part) + 1 for part in parts))
        return str(pathlib.PurePosixPath(*parts))

    def _encode(self, text: str, encoding: str) -> bytes:  # of a NumPy number, in old protocols
        self._spend(len(text))
        return text.encode("latin1")


def _number(code: str, data: bytes) -> bool | int | float:
    _require(_NUMBER.fullmatch(code), f"it holds a NumPy scalar of dtype {code!r:.100}")
    return np.frombuffer(data, code)[0].item()


def _plain(value: Any) -> Any:
    """`value`, which a container or the whole file holds."""
    _require(type(value) in _PLAIN, f"it holds a {type(value).__name__}, which is no plain data")
    return value


def _require(condition: Any, otherwise: str = "damaged PyTorch file") -> None:
    if not condition:
        raise TorchFileError(otherwise)
