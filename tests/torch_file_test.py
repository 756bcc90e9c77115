"""Tests of the reader of PyTorch files. torch_legacy.pth and torch_zip.pth were written by torch
2.13 (`torch.save`, both layouts) and hold what `expected` builds; the hostile files are made here.
"""

import collections
import io
import os
import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirai_jax import torch_file

DATA = pathlib.Path(__file__).parent / "data"
FIXTURES = {name: DATA / f"torch_{name}.pth" for name in ("legacy", "zip")}


def expected():
    base = np.arange(10, dtype=np.float64)
    return {
        "model": collections.OrderedDict(
            weight=np.arange(6, dtype=np.float32).reshape(2, 3), bias=np.full(2, 0.5, np.float32)
        ),
        "parameter": np.full(2, 3, np.float32),
        "transposed": np.arange(6).reshape(2, 3).T,
        "strided": np.arange(24, dtype=np.int32).reshape(4, 6)[1::2, 1::3],
        "expanded": np.repeat(np.array([[1], [2]], np.float32), 4, axis=1),
        "bf16": np.array([1, -2.5, 3.140625, np.inf], ml_dtypes.bfloat16),
        "half": np.array([0.1], np.float16),
        "bool": np.array([True, False]),
        "uint8": np.array([0, 255], np.uint8),
        "complex": np.array([1 + 2j], np.complex64),
        "scalar": np.array(7),
        "empty": np.zeros((0, 3), np.float32),
        "base": base,
        "part": base[2:5],
        "dtype": "float32",
        "nested": {
            "list": [1, 2.5, None, True, "é"],
            "tuple": (np.array([4, 5], np.int16), {"deep": np.array(-1, np.int8)}),
            3: 2**70,
        },
    }


def assert_same(got, want):
    assert type(got) is type(want)
    if isinstance(want, np.ndarray):
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_array_equal(got, want)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    else:
        assert got == want


@pytest.mark.parametrize("layout", FIXTURES)
def test_reads_what_torch_wrote(layout):
    tree = torch_file.read(FIXTURES[layout])
    assert_same(tree, expected())
    assert not vars(tree["model"])  # torch's _metadata is dropped


@pytest.mark.parametrize("layout", FIXTURES)
def test_shared_storage_stays_shared_and_writable(layout):
    tree = torch_file.read(str(FIXTURES[layout]))
    assert np.shares_memory(tree["base"], tree["part"])
    tree["base"][2] = -1
    assert tree["part"][0] == -1


# Hand-made files. A pickle is a program for a small stack machine; these are its instructions.


def push(value) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def name(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def storage(count=4, kind="torch.FloatStorage", key="0", view=None) -> bytes:
    return (
        b"("
        + push("storage")
        + name(kind)
        + push(key)
        + push("cpu")
        + push(count)
        + push(view)
        + b"tQ"
    )


def tensor(block: bytes, offset=0, shape=(4,), strides=(1,)) -> bytes:
    return (
        name("torch._utils._rebuild_tensor_v2")
        + b"("
        + block
        + push(offset)
        + push(shape)
        + push(strides)
        + push(False)
        + push(None)
        + b"tR"
    )


MAGIC = 0x1950A86A20F9469CFC6C


def stream_file(body: bytes, keys=("0",), count=4, little=True, header=(MAGIC, 1001)):
    """A legacy file; every block holds the floats 0, 1, 2, ..."""
    pickles = [pickle.dumps(p, 2) for p in (*header, {"little_endian": little})]
    pickles += [b"\x80\x02" + body + b".", pickle.dumps(list(keys), 2)]
    block = struct.pack("<q", count) + np.arange(count, dtype="<f4").tobytes()
    return b"".join(pickles) + block * len(keys)


def zip_file(body: bytes, compression=zipfile.ZIP_STORED, count=4, byteorder=b"little"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        archive.writestr("archive/byteorder", byteorder)
        archive.writestr("archive/data/0", np.arange(count, dtype="<f4").tobytes())
    return buffer.getvalue()


def read_bytes(data: bytes, folder: pathlib.Path):
    path = folder / "file.pth"
    path.write_bytes(data)
    return torch_file.read(path)


def refusal(data: bytes, folder: pathlib.Path) -> str:
    with pytest.raises(torch_file.TorchFileError) as caught:
        read_bytes(data, folder)
    message = str(caught.value)
    assert message.startswith(str(folder / "file.pth")) and "\n" not in message
    return message


@pytest.mark.parametrize("make", [stream_file, zip_file])
def test_handmade_files_are_read(make, tmp_path):
    got = read_bytes(make(tensor(storage(), 1, (2,), (2,))), tmp_path)
    np.testing.assert_array_equal(got, [1, 3])


def test_views_of_early_torch(tmp_path):
    body = tensor(storage(view=("9", 1, 3)), 1, (2,), (1,))
    np.testing.assert_array_equal(read_bytes(stream_file(body), tmp_path), [2, 3])
    assert "outside" in refusal(stream_file(tensor(storage(view=("9", 2, 3)))), tmp_path)


@pytest.mark.parametrize("make", [stream_file, zip_file])
@pytest.mark.parametrize(
    "body, message",
    [
        (tensor(storage(), 1), "outside its storage"),
        (tensor(storage(), 0, (2, 2), (3, 1)), "outside its storage"),
        (tensor(storage(), 5, (0,), (1,)), "outside its storage"),
        (tensor(storage(), -1, (1,), (1,)), "shape"),
        (tensor(storage(), 0, (2,), (-1,)), "shape"),
        (tensor(storage(), 0, (2, 2), (1,)), "shape"),
        (tensor(storage(), 0, (2.0,), (1,)), "shape"),
        (tensor(storage(), 0, (10**12,), (0,)), "larger than the file"),
        (tensor(storage(10**15)), "do not fit"),
        (tensor(storage(-1)), "reference"),
        (tensor(storage(4, "torch.Linear")), "'torch.Linear'"),
        (tensor(push("0")), "damaged"),
        (b"(" + storage() + storage(4, "torch.IntStorage") + b"l", "two ways"),
        (storage() + push({"a": 1}) + b"b", "alters a storage"),
        (storage(), "holds a _Storage"),
        (tensor(storage()) + name("torch._utils._rebuild_tensor_v2") + b"\x86", "holds a method"),
        (tensor(storage()) + name("collections.OrderedDict") + b"\x86", "holds a type"),
        (push({1: b"bytes"}), "refused"),
        (push(None) + b"r\xff\xff\xff\x7f", "memo"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(make, body, message, tmp_path):
    assert message in refusal(make(body), tmp_path)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("make", [stream_file, zip_file])
def test_runs_nothing(make, tmp_path):
    ran = tmp_path / "ran"
    message = refusal(make(push({"weights": Evil(ran)})), tmp_path)
    assert f"{os.system.__module__}.system" in message
    assert "builtins.eval" in refusal(make(name("builtins.eval") + push(("1",)) + b"R"), tmp_path)
    # Dotted and instance-creating spellings of the same.
    assert "torch.os.system" in refusal(
        make(b"\x80\x04" + push("torch") + push("os.system") + b"\x93" + push(("true",)) + b"R"),
        tmp_path,
    )
    assert "posix.system" in refusal(make(b"(" + push("true") + b"iposix\nsystem\n"), tmp_path)
    assert not ran.exists()


def test_hidden_methods_do_not_survive(tmp_path):
    body = name("collections.OrderedDict") + b")R" + push({"items": "gone"}) + b"b"
    assert list(read_bytes(zip_file(body), tmp_path).items()) == []


def test_cycles_and_deep_nesting_end(tmp_path):
    loop = []
    loop.append(loop)
    got = read_bytes(zip_file(push(loop)), tmp_path)
    assert got[0] is got
    read_bytes(zip_file(b"]" * 100_000 + b"a" * 99_999), tmp_path)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not a PyTorch file"),
        (b"<!DOCTYPE html>\n<html></html>", "<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a PyTorch file"),
        (pickle.dumps({"a": 1}, 2), "PyTorch file"),
        (stream_file(b"N", (), header=(1, 1001)), "another kind of pickle"),
        (stream_file(b"N", (), header=(MAGIC, 7)), "another kind of pickle"),
        (stream_file(b"N", (), little=False), "big-endian"),
        (stream_file(b"N"), "list of storages"),
        (stream_file(tensor(storage()), ()), "list of storages"),
        (stream_file(tensor(storage()), count=3), "storage '0'"),
        (stream_file(tensor(storage()))[:-1], "missing"),
        (zip_file(b"N", byteorder=b"big"), "big-endian"),
        (zip_file(b"N", zipfile.ZIP_DEFLATED), "compressed"),
        (zip_file(tensor(storage()), count=3), "missing"),
        (zip_file(tensor(storage(key="1"))), "archive/data/1"),
        (zip_file(b"N")[:-30], "damaged"),
        (zip_file(tensor(storage())).replace(struct.pack("<f", 3), struct.pack("<f", 5)), "CRC"),
        (zip_file(b"N").replace(b"data.pkl", b"data.txt"), "0 data.pkl"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_garbage_is_named(data, message, tmp_path):
    assert message in refusal(data, tmp_path)


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        torch_file.read(tmp_path / "none.pth")


@pytest.mark.parametrize("layout", FIXTURES)
def test_damage_never_raises_anything_else(layout, tmp_path):
    original = FIXTURES[layout].read_bytes()
    place = st.integers(0, len(original) - 1)

    def attempt(data: bytes):
        try:
            read_bytes(data, tmp_path)
        except torch_file.TorchFileError as error:
            assert "\n" not in str(error)

    @settings(max_examples=150, deadline=2000)
    @given(place)
    def truncate(length):
        attempt(original[:length])

    @settings(max_examples=400, deadline=2000)
    @given(st.lists(st.tuples(place, st.integers(1, 255)), min_size=1, max_size=4))
    def flip(changes):
        data = bytearray(original)
        for where, bits in changes:
            data[where] ^= bits
        attempt(bytes(data))

    truncate()
    flip()
