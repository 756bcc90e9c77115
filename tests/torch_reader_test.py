"""Tests of the reader and the writer of PyTorch files. torch_legacy.pth and torch_zip.pth were
written by torch 2.13 (`torch.save`, both layouts) and hold what `expected` builds; torch_args.pth
is like a training checkpoint and holds `expected_args`. The hostile files are made here.
"""

import collections
import io
import os
import pathlib
import pickle
import pickletools
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirai_jax.weights import torch_reader, torch_writer
from mirai_jax.weights.torch_reader import STORAGE_DTYPES, TorchFileError

DATA = pathlib.Path(__file__).parent / "data"
FIXTURES = {name: DATA / f"torch_{name}.pth" for name in ("legacy", "zip")}


def expected():
    base = np.arange(10, dtype=np.float64)
    half = np.full(2, 0.5, np.float32)
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    return {
        "model": collections.OrderedDict(weight=weight, bias=half),
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


def expected_args():
    """In the file: Namespaces, defaultdicts, torch.Size, torch.device, NumPy scalars, PosixPath."""
    nested = {"image_size": 256}
    args = {"gpt_model": "GPT-B", "lr": 1e-4, "betas": [0.9, 0.95], "resume": None, "ema": True}
    args |= {"results_dir": "/results/run 1", "nested": nested}
    moments = {"step": np.array(3, np.float32), "exp_avg": np.full(2, 0.5, np.float32)}
    return {
        "model": collections.OrderedDict(weight=np.array([0, 1], np.float32)),
        "args": args,
        "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "counts": {"a": 1},
        "shape": (2, 3),
        "no shape": (),
        "devices": ("cuda:1", "cpu"),
        "numbers": [float(np.float32(0.1)), -2.0, -5, 200, True],
        "pair": (args, (nested, 1)),
        "path": "a/b",
    }


def spelled(tree):
    """The tree with the types of its nodes, and arrays as dtype, shape and bytes."""
    if isinstance(tree, np.ndarray):
        return tree.dtype, tree.shape, tree.tobytes()
    if isinstance(tree, dict):
        return type(tree), [(key, spelled(value)) for key, value in tree.items()]
    if isinstance(tree, list | tuple):
        return type(tree), list(map(spelled, tree))
    return type(tree), tree


def assert_same(got, want):
    assert spelled(got) == spelled(want)


@pytest.mark.parametrize("layout", FIXTURES)
def test_reads_what_torch_wrote(layout):
    tree = torch_reader.read(FIXTURES[layout])
    assert_same(tree, expected())
    assert not vars(tree["model"])  # torch's _metadata is dropped
    tree["base"][2] = -1
    assert tree["part"][0] == -1  # what shared memory still does


def test_what_training_checkpoints_hold_beside_tensors():
    tree = torch_reader.read(DATA / "torch_args.pth")
    assert_same(tree, expected_args())
    assert tree["pair"][0] is tree["args"]  # what was one object still is


# Hand-made files. A pickle is a program for a small stack machine; these are its instructions.

SCALAR = "numpy.core.multiarray.scalar"


def push(value) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def name(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(dotted: str, *args: bytes) -> bytes:
    return name(dotted) + b"(" + b"".join(args) + b"tR"


def storage(count=4, kind="torch.FloatStorage", key="0") -> bytes:
    rest = b"".join(map(push, (key, "cpu", count, None)))
    return b"(" + push("storage") + name(kind) + rest + b"tQ"


def tensor(block: bytes, offset=0, shape=(4,), strides=(1,)) -> bytes:
    rest = map(push, (offset, shape, strides, False, None))
    return call("torch._utils._rebuild_tensor_v2", block, *rest)


def zip_file(body: bytes, compression=zipfile.ZIP_STORED, byteorder=b"little"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        archive.writestr("archive/byteorder", byteorder)
        archive.writestr("archive/data/0", np.arange(4, dtype="<f4").tobytes())
    return buffer.getvalue()


def read_bytes(data, folder):
    (folder / "file.pth").write_bytes(data)
    return torch_reader.read(folder / "file.pth")


def assert_refused(data, folder):
    with pytest.raises(TorchFileError, match="file.pth: ") as caught:
        read_bytes(data, folder)
    assert "\n" not in str(caught.value)


def test_handmade_files_are_read(tmp_path):
    got = read_bytes(zip_file(tensor(storage(), 1, (2,), (2,))), tmp_path)
    np.testing.assert_array_equal(got, [1, 3])
    tree = {"a": (1, [2.5, "é"]), "b": collections.OrderedDict(c=None)}
    for protocol in (2, 3, 4, 5):
        program = pickle.dumps(tree, protocol)[2:-1]
        assert_same(read_bytes(zip_file(program), tmp_path), tree)


def test_nothing_is_run(tmp_path):
    touch = f"touch {tmp_path / 'ran'}"
    bodies = [
        b"}" + push("weights") + call("posix.system", push(touch)) + b"s",
        call("builtins.getattr", call("builtins.__import__", push("os")), push("system")),
        push("torch") + push("os.system") + b"\x93" + push((touch,)) + b"R",  # dotted
        b"(" + push(touch) + b"iposix\nsystem\n",  # INST
        call("builtins.list", push([1])),  # names that are known, but nothing may call
        call("torch.FloatStorage", push([1])),
    ]
    for body in bodies:
        assert_refused(zip_file(body), tmp_path)
    assert os.listdir(tmp_path) == ["file.pth"]


DICT = b"}(" + b"".join(push(k) + b"N" for k in range(99)) + b"uq\1"
LYING = bytearray(zip_file(b"N"))  # the first size in its list of contents
START = LYING.index(b"PK\x01\x02") + 20
LYING[START : START + 8] = b"\xfe\xff\xff\xff" * 2
LEGACY = FIXTURES["legacy"].read_bytes()
REFUSED = {
    "outside its storage": tensor(storage(), 1),
    "negative offset": tensor(storage(), -1, (1,)),
    "negative stride": tensor(storage(), 0, (2,), (-1,)),
    "expanded": tensor(storage(), 0, (10**12,), (0,)),
    "larger than the file": tensor(storage(10**15)),
    "no storage type": tensor(storage(4, "torch.Linear")),
    "a storage of two types": tensor(storage()) + tensor(storage(4, "torch.IntStorage")) + b"\x86",
    "a name as a value": b"}" + push("a") + name("collections.OrderedDict") + b"s",
    "the state of a function": name("torch.Size") + push({"__code__": 1}) + b"b",
    "an array as a key": b"}" + tensor(storage()) + b"Ns",
    "bytes": push({1: b"bytes"}),
    "a pointer": call(SCALAR, call("numpy.dtype", push("O8")), push("abcdefgh")),
    "a text of exabytes": b"\x8d" + b"\xff" * 7 + b"\x0f",
    # Small files of large results: a long path and a large dictionary many times over.
    "paths": b"(" + push("x" * 2000) + call("pathlib.PosixPath", b"h\0" * 90) + b"t",
    "dicts": b"(" + DICT + (name("argparse.Namespace") + b")\x81h\1b") * 500 + b"t",
    "a path as a key": tensor(storage(key="../1")),
}
FILES = {kind: zip_file(body) for kind, body in REFUSED.items()} | {
    "text": b"weights",
    "big-endian": zip_file(b"N", byteorder=b"big"),
    "big-endian stream": LEGACY.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
    "compressed": zip_file(b"N", zipfile.ZIP_DEFLATED),
    "CRC": zip_file(tensor(storage())).replace(struct.pack("<f", 3), struct.pack("<f", 5)),
    "a size that lies": bytes(LYING),
}


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_what_is_not_plain_data_is_refused(data, tmp_path):
    assert_refused(data, tmp_path)


def attempt(data, folder):
    """Plain data or TorchFileError."""
    try:
        todo, seen = [read_bytes(data, folder)], {}
    except TorchFileError as error:
        assert "\n" not in str(error)
        return
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen[id(node)] = node
        if type(node) in (dict, collections.OrderedDict):
            todo += [*node.keys(), *node.values()]
        elif type(node) in (list, tuple):
            todo += node
        else:
            assert type(node) in (str, int, float, bool, type(None), np.ndarray)


FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("file", [*FIXTURES.values(), DATA / "torch_args.pth"])
@FUZZ
@given(st.data())
def test_damage_never_raises_anything_else(file, tmp_path, data):
    damaged = bytearray(file.read_bytes())
    place = st.integers(0, len(damaged) - 1)
    assert_refused(damaged[: data.draw(place)], tmp_path)
    for where in data.draw(st.lists(place, min_size=1, max_size=4)):
        damaged[where] ^= data.draw(st.integers(1, 255))
    attempt(damaged, tmp_path)


CALLED = ["torch._utils._rebuild_tensor_v2", "torch.Size", "torch.device", "numpy.dtype", SCALAR]
CALLED += ["_codecs.encode", "collections.OrderedDict", "argparse.Namespace", "builtins.dict"]
VALUES = (1, "f4", "cpu", {"a": 1}, (1, 2), [], None, ("a", 2.5))
PIECES = [*map(name, CALLED), *map(push, VALUES), storage(), tensor(storage()), b"q\0", b"h\0"]
# Mark, tuples, lists, dicts, reduce, build, newobj, newobj_ex, set item(s), append(s), memo.
PIECES += [op.encode("latin1") for op in "(t)]}Rb\x81\x92susae0120Q\x85\x86\x87\x8f\x90"]


@settings(FUZZ, max_examples=300)
@given(st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=25))
def test_no_program_raises_anything_else(tmp_path, parts):
    attempt(zip_file(b"".join(parts)), tmp_path)


# The writer.


# The instructions that torch's unpickler of weights_only=True knows.
TORCH_READS = """
    GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3 NONE
    NEWFALSE NEWTRUE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET BININT BININT1 BININT2 BINFLOAT
    BINUNICODE SHORT_BINSTRING BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT LONG1 PROTO STOP
"""


@pytest.mark.parametrize("limit", [2**31 - 1, 20])
def test_layout_of_written_files(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)  # as if 20 bytes were over 2 GiB
    path = tmp_path / "file.pt"
    tree = expected() | {"numbers": [0, -1, 255, 2**16, -(2**31), 2**31, 0.5], "": expected_args()}
    base = np.arange(-6, 6).reshape(3, 4)
    tree["kinds"] = [base.astype(dtype)[::-1, 1::2].T for dtype in STORAGE_DTYPES.values()]
    torch_writer.write(path, tree | {"big-endian": base.astype(">f4")})
    assert_same(torch_reader.read(path), tree | {"big-endian": base.astype("<f4")})
    assert os.listdir(tmp_path) == [path.name]
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        program = archive.read("archive/data.pkl")
        assert archive.read("archive/byteorder") == b"little"
        assert archive.read("archive/version") == b"3\n"
    data = path.read_bytes()
    for entry in entries:
        sizes = struct.unpack_from("<HH", data, entry.header_offset + 26)
        assert (entry.header_offset + 30 + sum(sizes)) % 64 == 0
        assert entry.compress_type == zipfile.ZIP_STORED
    assert {op.name for op, _, _ in pickletools.genops(program)} <= set(TORCH_READS.split())


@pytest.mark.parametrize("bad", [{1}, b"", {b"a": 1}, np.zeros(2, np.uint16), np.array([None])])
def test_what_cannot_be_written_leaves_the_former_file(bad, tmp_path):
    path = tmp_path / "file.pt"
    torch_writer.write(path, {"a": 1})
    with pytest.raises(TorchFileError):
        torch_writer.write(path, {"a": [1, bad]})
    assert os.listdir(tmp_path) == [path.name] and torch_reader.read(path) == {"a": 1}
