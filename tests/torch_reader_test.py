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
from hypothesis import given, settings
from hypothesis import strategies as st

from mirai_jax.weights import torch_reader, torch_writer
from mirai_jax.weights.torch_reader import TorchFileError

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


def assert_same(got, want):
    assert type(got) is type(want)
    if isinstance(want, np.ndarray):
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_array_equal(got, want)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        assert_same(list(got.values()), list(want.values()))
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    else:
        assert got == want


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

MAGIC = 0x1950A86A20F9469CFC6C
SCALAR = "numpy.core.multiarray.scalar"


def push(value) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def name(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(dotted: str, *args: bytes) -> bytes:
    return name(dotted) + b"(" + b"".join(args) + b"tR"


def storage(count=4, kind="torch.FloatStorage", key="0", view=None) -> bytes:
    rest = b"".join(map(push, (key, "cpu", count, view)))
    return b"(" + push("storage") + name(kind) + rest + b"tQ"


def tensor(block: bytes, offset=0, shape=(4,), strides=(1,)) -> bytes:
    rest = map(push, (offset, shape, strides, False, None))
    return call("torch._utils._rebuild_tensor_v2", block, *rest)


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
    (folder / "file.pth").write_bytes(data)
    return torch_reader.read(folder / "file.pth")


def refusal(data: bytes, folder: pathlib.Path) -> str:
    with pytest.raises(TorchFileError) as caught:
        read_bytes(data, folder)
    message = str(caught.value)
    assert message.startswith(str(folder / "file.pth")) and "\n" not in message
    return message


MAKERS = pytest.mark.parametrize("make", [stream_file, zip_file])


@MAKERS
def test_handmade_files_are_read(make, tmp_path):
    got = read_bytes(make(tensor(storage(), 1, (2,), (2,))), tmp_path)
    np.testing.assert_array_equal(got, [1, 3])
    view = storage(view=("9", 1, 3))  # of early torch
    np.testing.assert_array_equal(read_bytes(make(tensor(view, 1, (2,))), tmp_path), [2, 3])
    tree = {"a": (1, [2.5, "é"]), "b": collections.OrderedDict(c=None)}
    for protocol in (2, 3, 4, 5):
        program = pickle.dumps(tree, protocol)[2:-1]
        assert_same(read_bytes(zip_file(program), tmp_path), tree)


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@MAKERS
def test_nothing_is_run(make, tmp_path):
    ran = tmp_path / "ran"
    body = push({"weights": Attack(os.system, f"touch {ran}")})
    assert f"{os.system.__module__}.system" in refusal(make(body), tmp_path)
    body = push(Attack(getattr, Attack(__import__, "os"), "system"))
    assert "getattr" in refusal(make(body), tmp_path)
    # Dotted and instance-creating spellings.
    body = push("torch") + push("os.system") + b"\x93" + push(("true",)) + b"R"
    assert "torch.os.system" in refusal(make(body), tmp_path)
    assert "INST" in refusal(make(b"(" + push("true") + b"iposix\nsystem\n"), tmp_path)
    for known in ("builtins.list", "torch.FloatStorage"):  # names that nothing may call
        refusal(make(call(known, push([1]))), tmp_path)
    assert not ran.exists()


DICT = b"}(" + b"".join(push(k) + b"N" for k in range(99)) + b"uq\1"
AMPLIFIED = [  # small files of large results: a long path and a large dictionary many times over
    push("x" * 2000) + call("pathlib.PosixPath", b"h\0" * 90),
    DICT + (name("argparse.Namespace") + b")\x81h\1b") * 500,
]
REFUSED = [
    tensor(storage(), 1),  # outside its storage
    tensor(storage(), 0, (2, 2), (3, 1)),
    tensor(storage(), 5, (0,)),
    tensor(storage(), -1, (1,)),
    tensor(storage(), 0, (2,), (-1,)),
    tensor(storage(), 0, (2, 2)),
    tensor(storage(), 0, (2.0,)),
    tensor(storage(view=("9", 2, 3))),
    tensor(storage(), 0, (10**12,), (0,)),  # expanded
    tensor(storage(10**15)),  # larger than the file
    tensor(storage(-1)),
    tensor(storage(4, "torch.Linear")),
    tensor(push("0")),
    tensor(storage()) + tensor(storage(4, "torch.IntStorage")) + b"\x86",
    storage() + push({"a": 1}) + b"b",
    b"]" + storage() + b"a",
    b"}" + push("a") + name("collections.OrderedDict") + b"s",
    name("torch._utils._rebuild_tensor_v2") + push({"__code__": 1}) + b"b",
    b"}" + tensor(storage()) + b"Ns",  # an array as a key
    push({1: b"bytes"}),
    call(SCALAR, call("numpy.dtype", push("O8")), push("abcdefgh")),
    call(SCALAR, push("f8"), call("_codecs.encode", push("abcdefg"), push("latin1"))),
    call("torch.device", push([1]), push(2)),
    push(None) + b"r\xff\xff\xff\x7f" + b"R",
    b"\x8d" + b"\xff" * 7 + b"\x0f",  # a text that claims exabytes
    *(b"(" + body + b"t" for body in AMPLIFIED),
]


@MAKERS
@pytest.mark.parametrize("body", REFUSED)
def test_what_is_not_plain_data_is_refused(make, body, tmp_path):
    refusal(make(body), tmp_path)


FILES = [
    (b"weights", "b'weights'"),
    (pickle.dumps({"a": 1}, 2), "PyTorch file"),
    (stream_file(b"N", (), header=(1, 1001)), "another kind of pickle"),
    (stream_file(b"N", (), little=False), "big-endian"),
    (stream_file(b"N"), "damaged"),
    (stream_file(tensor(storage()), count=3), "damaged"),
    (zip_file(b"N", byteorder=b"big"), "big-endian"),
    (zip_file(b"N", zipfile.ZIP_DEFLATED), "compressed"),
    (zip_file(tensor(storage()), count=3), "truncated"),
    (zip_file(tensor(storage(key="../1"))), "archive/data/../1"),
    (zip_file(tensor(storage())).replace(struct.pack("<f", 3), struct.pack("<f", 5)), "CRC"),
    (zip_file(b"N").replace(b"data.pkl", b"data.txt"), "0 data.pkl"),
]


@pytest.mark.parametrize("data, message", FILES, ids=[message for _, message in FILES])
def test_garbage_is_named(data, message, tmp_path):
    assert message in refusal(data, tmp_path)


def test_a_size_that_lies_is_refused(tmp_path):
    data = bytearray(zip_file(b"N"))
    sizes = data.index(b"PK\x01\x02") + 20  # of the first entry in the list of contents
    data[sizes : sizes + 8] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
    assert "longer than the file" in refusal(bytes(data), tmp_path)


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        torch_reader.read(tmp_path / "none.pth")


def attempt(data: bytes, folder: pathlib.Path):
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
            assert not getattr(node, "__dict__", None)
            todo += [*node.keys(), *node.values()]
        elif type(node) in (list, tuple):
            todo += node
        else:
            assert type(node) in (str, int, float, bool, type(None), np.ndarray)


@pytest.mark.parametrize("file", [*FIXTURES.values(), DATA / "torch_args.pth"])
def test_damage_never_raises_anything_else(file, tmp_path):
    original = file.read_bytes()
    place = st.integers(0, len(original) - 1)

    @settings(max_examples=100, deadline=None)
    @given(place, st.lists(st.tuples(place, st.integers(1, 255)), min_size=1, max_size=4))
    def check(length, changes):
        refusal(original[:length], tmp_path)
        data = bytearray(original)
        for where, bits in changes:
            data[where] ^= bits
        attempt(bytes(data), tmp_path)

    check()


def test_no_program_raises_anything_else(tmp_path):
    names = ["torch._utils._rebuild_tensor_v2", "torch.Size", "torch.device", "numpy.dtype", SCALAR]
    names += ["_codecs.encode", "collections.OrderedDict", "argparse.Namespace", "builtins.dict"]
    values = (1, "f4", "cpu", {"a": 1}, (1, 2), [], None, ("a", 2.5))
    pieces = [*map(name, names), *map(push, values), storage(), tensor(storage()), b"q\0", b"h\0"]
    # Mark, tuples, lists, dicts, reduce, build, newobj, newobj_ex, set item(s), append(s), memo.
    pieces += [op.encode("latin1") for op in "(t)]}Rb\x81\x92susae0120Q\x85\x86\x87\x8f\x90"]

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.sampled_from(pieces) | st.binary(max_size=3), max_size=25))
    def check(parts):
        attempt(zip_file(b"".join(parts)), tmp_path)

    check()


# The writer.


@pytest.mark.parametrize("dtype", torch_reader.STORAGE_DTYPES.values(), ids=str)
def test_arrays_of_every_kind_come_back(dtype, tmp_path):
    base = np.arange(-6, 6).astype(dtype).reshape(3, 4)
    arrays = {"whole": base, "transposed": base.T, "strided": base[::-1, 1::2]}
    arrays |= {"expanded": np.broadcast_to(base[0], (2, 4)), "scalar": base[1:2, 2].reshape(())}
    arrays["empty"] = np.zeros((0, 3, 0), dtype)
    if dtype.kind != "V":
        arrays["big-endian"] = base.astype(dtype.newbyteorder(">"))
    torch_writer.write(str(tmp_path / "file.pt"), collections.OrderedDict(arrays))
    want = {key: np.array(array, dtype) for key, array in arrays.items()}
    assert_same(torch_reader.read(tmp_path / "file.pt"), collections.OrderedDict(want))
    assert os.listdir(tmp_path) == ["file.pt"]


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
    torch_writer.write(path, tree)
    assert_same(torch_reader.read(path), tree)
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
    with pytest.raises(TorchFileError, match="file.pt: "):
        torch_writer.write(path, {"a": [1, bad]})
    assert os.listdir(tmp_path) == [path.name] and torch_reader.read(path) == {"a": 1}


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_is_written(mmap, tmp_path):
    torch = pytest.importorskip("torch")
    torch_writer.write(tmp_path / "file.pt", expected())
    loaded = torch.load(tmp_path / "file.pt", weights_only=True, mmap=mmap)
    torch.nn.Linear(3, 2).load_state_dict(loaded["model"], strict=True)
    torch.save(loaded, tmp_path / "again.pt")
    assert_same(torch_reader.read(tmp_path / "again.pt"), expected())
