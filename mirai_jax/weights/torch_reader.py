"""Reads PyTorch checkpoints (.pt, .pth) into NumPy arrays, without torch and without running code.

A checkpoint is a pickle that refers to blocks of numbers ("storages") kept beside it. Two layouts
exist: a zip archive (torch >= 1.6), and the older stream of pickles followed by the raw blocks.
An ordinary unpickler calls whatever a file names. The one here knows a dozen names, for each of
which it has a callable of its own, and all that it gives the pickle machine to work on is inert.
"""

import collections
import io
import math
import os
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from mirai_jax.weights.safetensors import not_weights

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
STORAGE_DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
    "ComplexFloatStorage": "<c8",
    "ComplexDoubleStorage": "<c16",
}
_DTYPE_NAMES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
    "complex128",
]
_FACTORIES = ["dict", "float", "int", "list", "long", "set"]  # "long": Python 2's name of int
_NUMBERS = ["b1", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]
_BIG_ENDIAN = "big-endian PyTorch files are not supported"
_LEAVES = (str, int, float, bool, type(None), np.ndarray)


class TorchFileError(ValueError):
    """Not a readable or writable PyTorch checkpoint. The message is one line and names the file."""


def read(path: str | os.PathLike) -> Any:
    """Reads a PyTorch checkpoint, either layout, into NumPy.

    Args:
      path: a file that `torch.save` wrote.
    Returns:
      What was saved, with each tensor as an ndarray: for a state dict a dict (OrderedDict) of
      name -> array; in general nested dicts, lists and tuples of arrays, str, int, float, bool and
      None. Shapes are torch's; bfloat16 is `ml_dtypes.bfloat16`. Arrays may be non-contiguous, and
      tensors that shared memory still do. Of other things that training checkpoints hold, an
      argparse.Namespace and a defaultdict become a dict, a torch.Size a tuple, a torch.dtype its
      name ('float32'), a torch.device its name ('cuda:0'), a PosixPath its text, and a NumPy
      number a Python one.
    Raises:
      TorchFileError: the file is damaged, is something else, or holds anything but the above.
      OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            return _Reader(file).read()
        except TorchFileError as error:
            raise TorchFileError(f"{os.fspath(path)}: {error}") from error
        except Exception as error:  # on damaged bytes pickle and zipfile raise almost anything
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise TorchFileError(f"{os.fspath(path)}: damaged PyTorch file ({why})") from error


class _Inert:
    """What the pickle machine may hold besides plain data: a file can alter none of it."""

    __slots__ = ()

    def __setstate__(self, state):  # pickle's default would let the file set any attribute
        raise TorchFileError(f"refused: the pickle alters a {_kind(self)}")


class _Storage(_Inert):
    """A one-dimensional array that tensors look into."""

    __slots__ = ("array",)


class _Maker(_Inert):
    """A function in a shell, since Python's functions have attributes that a file could set."""

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


class _Namespace(_Inert):
    """An argparse.Namespace; `_checked` puts `values` in its place. A class: pickle insists."""

    __slots__ = ("values",)

    def __new__(cls):
        namespace = super().__new__(cls)
        namespace.values = {}
        return namespace

    def __setstate__(self, state):
        _require(type(state) is dict, "damaged PyTorch file (state of a Namespace)")
        # Not a copy: a file could have the same large dict copied any number of times.
        self.values = state


class _Factory(_Inert):
    """The name of a builtin type, which a defaultdict may be given; nothing else may be done."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args):
        raise _refusal(f"builtins.{self.name}")


class _Dtype(_Inert):
    """A numpy.dtype of one kind of number."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *unused):
        _require(code in _NUMBERS, "refused: a NumPy scalar that is no real number")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        order = state[1]
        _require(
            order in ("<", ">", "|") and state == (3, order, None, None, None, -1, -1, 0),
            "damaged PyTorch file (state of a NumPy dtype)",
        )
        self.dtype = self.dtype.newbyteorder(order)


def _number(kind: _Dtype, data: bytes) -> bool | int | float:
    """numpy's multiarray.scalar."""
    _require(
        type(kind) is _Dtype and type(data) is bytes and len(data) == kind.dtype.itemsize,
        "damaged PyTorch file (NumPy scalar)",
    )
    return np.frombuffer(data, kind.dtype)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """_codecs.encode, in which old pickle protocols wrap the bytes of a NumPy scalar."""
    # Short, lest a file multiply what it holds.
    _require(
        type(text) is str and len(text) <= 8 and encoding == "latin1",
        "refused: bytes that are no NumPy scalar",
    )
    return text.encode("latin1")


def _size(shape: tuple[int, ...] = ()) -> tuple[int, ...]:
    _require(
        type(shape) is tuple and len(shape) <= 64 and all(type(n) is int for n in shape),
        "damaged PyTorch file (torch.Size)",
    )
    return shape


def _device(kind: str, index: int | None = None) -> str:
    _require(
        type(kind) is str
        and len(kind) <= 32
        and kind.isidentifier()
        and (index is None or (type(index) is int and 0 <= index < 1000)),
        "damaged PyTorch file (torch.device)",
    )
    return kind if index is None else f"{kind}:{index}"


def _default_dict(factory: _Factory | None = None) -> dict:
    _require(factory is None or type(factory) is _Factory, "refused: factory of a defaultdict")
    return {}


class _Unpickler(pickle.Unpickler):
    """Resolves the few known names and refuses all others without looking them up."""

    reader: "_Reader"

    def find_class(self, module: str, name: str) -> Any:
        makers = {
            ("torch._utils", "_rebuild_tensor_v2"): self.reader.tensor,
            ("torch._utils", "_rebuild_parameter"): self.reader.parameter,
            ("torch", "Size"): _size,
            ("torch", "device"): _device,
            ("collections", "defaultdict"): _default_dict,
            ("numpy", "dtype"): _Dtype,
            ("numpy.core.multiarray", "scalar"): _number,
            ("numpy._core.multiarray", "scalar"): _number,
            ("_codecs", "encode"): _encode,
            ("pathlib", "PosixPath"): self.reader.path,
            ("pathlib._local", "PosixPath"): self.reader.path,  # Python 3.13
        }
        if maker := makers.get((module, name)):
            return _Maker(maker)
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("argparse", "Namespace"):
            return _Namespace
        if module in ("builtins", "__builtin__") and name in _FACTORIES:
            return _Factory(name)
        if module == "torch" and (name in STORAGE_DTYPES or name in _DTYPE_NAMES):
            return name
        raise _refusal(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        return self.reader.storage(*pid)


class _Reader:
    """One open file; `budget` is how many bytes of storages and paths it can still hold."""

    def __init__(self, file: BinaryIO):
        self.file, self.zip, self.folder = file, None, ""
        self.size = self.budget = os.fstat(file.fileno()).st_size
        self.arrays: dict[str, np.ndarray] = {}

    def read(self) -> Any:
        start = self.file.read(64)
        self.file.seek(0)
        if message := not_weights(start):
            raise TorchFileError(message)
        if start.startswith(b"PK\x03\x04"):
            return _checked(self._read_zip())
        if start.startswith(b"\x80"):
            return _checked(self._read_stream())
        raise TorchFileError(f"not a PyTorch file (it starts with {start[:16]!r})")

    def _read_zip(self) -> Any:
        self.zip = zipfile.ZipFile(self.file)
        names = [n for n in self.zip.namelist() if f"/{n}".endswith("/data.pkl")]
        _require(len(names) == 1, f"not a PyTorch file (a zip with {len(names)} data.pkl)")
        self.folder = names[0].removesuffix("data.pkl")
        if self.folder + "byteorder" in self.zip.namelist():
            _require(self._entry("byteorder").read() == b"little", _BIG_ENDIAN)
        return self._unpickle(io.BytesIO(self._entry("data.pkl").read()))

    def _entry(self, name: str) -> BinaryIO:
        info = self.zip.getinfo(self.folder + name)
        # torch never compresses; insisting on that leaves no room for a small file that inflates.
        _require(
            info.compress_type == zipfile.ZIP_STORED and info.file_size <= self.size,
            f"its entry {name!r} is compressed or longer than the file",
        )
        return self.zip.open(info)

    def _read_stream(self) -> Any:
        header = self._unpickle(self.file), self._unpickle(self.file)
        _require(header == (_MAGIC, _VERSION), "not a PyTorch file (another kind of pickle)")
        _require(self._unpickle(self.file)["little_endian"] is True, _BIG_ENDIAN)
        tree, keys = self._unpickle(self.file), self._unpickle(self.file)
        _require(sorted(keys) == sorted(self.arrays), "damaged PyTorch file (list of storages)")
        for key in keys:  # the tensors of `tree` already look into the arrays filled here
            _require(
                int.from_bytes(self.file.read(8), "little") == self.arrays[key].size,
                f"truncated or damaged PyTorch file (storage {key!r})",
            )
            _fill(self.arrays[key], self.file)
        return tree

    def _unpickle(self, file: BinaryIO) -> Any:
        """Reads one pickle and leaves `file` just behind it."""
        start = file.tell()
        for op, arg, position in pickletools.genops(file):
            # The C unpickler allocates its memo up to the highest index that a file claims.
            _require(
                "PUT" not in op.name or arg <= position - start,
                "damaged PyTorch file (pickle memo index)",
            )
        length = file.tell() - start
        file.seek(start)
        unpickler = _Unpickler(io.BytesIO(file.read(length)))
        unpickler.reader = self
        return unpickler.load()

    def storage(self, kind, storage_type, key, device, count, view=None) -> _Storage:
        """What a persistent id refers to. `view`: (own key, offset, count), from early torch."""
        dtype = np.dtype(STORAGE_DTYPES[storage_type])
        _require(
            kind == "storage" and type(key) is str and type(count) is int and count >= 0,
            "damaged PyTorch file (reference to a storage)",
        )
        if key not in self.arrays:
            self.budget -= count * dtype.itemsize
            _require(self.budget >= 0, f"truncated: {count} x {dtype} do not fit in the file")
            self.arrays[key] = np.empty(count, dtype)
            if self.zip:
                _fill(self.arrays[key], self._entry(f"data/{key}"))
        storage = _Storage()
        storage.array = self.arrays[key]
        _require(
            (storage.array.dtype, storage.array.size) == (dtype, count),
            f"damaged PyTorch file (storage {key!r} is declared two ways)",
        )
        if view is not None:
            storage.array = self.tensor(storage, view[1], (view[2],), (1,))
        return storage

    def tensor(self, storage, offset, shape, strides, *unused) -> np.ndarray:
        """torch._utils._rebuild_tensor_v2: a view of a storage, refused if it would leave it."""
        whole = all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
        _require(whole and len(shape) == len(strides), "damaged PyTorch file (shape of a tensor)")
        array, count = storage.array, math.prod(shape)
        last = (
            offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
            if count
            else offset - 1
        )
        _require(last < array.size, "damaged PyTorch file (a tensor reaches outside its storage)")
        # torch's expand has stride 0, so that any number of elements would fit the storage.
        _require(count <= self.size, f"a tensor of {count} elements is larger than the file")
        steps = [s * array.itemsize for s in strides]
        return np.lib.stride_tricks.as_strided(array[offset:], shape, steps)

    def parameter(self, data, *unused) -> Any:
        """torch._utils._rebuild_parameter: in NumPy nothing but the tensor."""
        return data

    def path(self, *parts) -> str:
        """pathlib.PosixPath: its text. A file could have the same parts joined many times."""
        _require(all(type(part) is str for part in parts), "damaged PyTorch file (path)")
        self.budget -= sum(len(part) + 1 for part in parts)
        _require(self.budget >= 0, "refused: its paths are longer than the file")
        return str(pathlib.PurePosixPath(*parts))


def _fill(array: np.ndarray, file: BinaryIO) -> None:
    count = file.readinto(array.view(np.uint8))
    _require(count == array.nbytes, "truncated: bytes of a storage are missing")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise TorchFileError(otherwise)


def _refusal(name: str) -> TorchFileError:
    return TorchFileError(f"refused: it names {name!r}; only tensors and plain containers are read")


def _kind(node: Any) -> str:
    return type(node).__name__.removeprefix("_").lower()


def _checked(tree: Any) -> Any:
    """Returns `tree`, with a dict for each Namespace, if it is what `read` promises.

    A loop: files may nest deeper than Python.
    """
    root, seen, tuples = [tree], set(), {}

    def plain(node):
        if type(node) is _Namespace:
            return node.values
        if type(node) is not tuple:
            return node
        if id(node) not in tuples:
            # With `node` itself: as long as it lives, nothing else has its id.
            tuples[id(node)] = node, tuple(map(plain, node))
        return tuples[id(node)][1]

    todo = [root]
    while todo:
        node = todo.pop()
        if type(node) in _LEAVES or id(node) in seen:
            continue
        seen.add(id(node))
        if type(node) is collections.OrderedDict:
            vars(node).clear()  # a module's _metadata; it could also hide the methods
        if type(node) in (dict, collections.OrderedDict):
            for key, value in list(dict.items(node)):
                node[key] = plain(value)
            todo += [*dict.keys(node), *dict.values(node)]
        elif type(node) is list:
            node[:] = map(plain, node)
            todo += node
        elif type(node) is tuple:
            todo += node
        else:
            raise TorchFileError(f"refused: it holds a {_kind(node)}, not plain data")
    return root[0]
