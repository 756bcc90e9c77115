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
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from mirai_jax.weights import torch_reader, torch_writer
from mirai_jax.weights.torch_reader import TorchFileError

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


def expected_args():
    """In the file: Namespaces, defaultdicts, torch.Size, torch.device, NumPy scalars, PosixPath."""
    nested = {"image_size": 256}
    args = {
        "gpt_model": "GPT-B",
        "lr": 1e-4,
        "betas": [0.9, 0.95],
        "resume": None,
        "ema": True,
        "results_dir": "/results/run 1",
        "nested": nested,
    }
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
    tree = torch_reader.read(FIXTURES[layout])
    assert_same(tree, expected())
    assert not vars(tree["model"])  # torch's _metadata is dropped


def test_what_training_checkpoints_hold_besides_tensors():
    tree = torch_reader.read(DATA / "torch_args.pth")
    assert_same(tree, expected_args())
    assert tree["pair"][0] is tree["args"]  # what was one object still is


@pytest.mark.parametrize("layout", FIXTURES)
def test_shared_storage_stays_shared_and_writable(layout):
    tree = torch_reader.read(str(FIXTURES[layout]))
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
    return torch_reader.read(path)


def refusal(data: bytes, folder: pathlib.Path) -> str:
    with pytest.raises(torch_reader.TorchFileError) as caught:
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
        (storage(), "holds a storage"),
        (tensor(storage()) + name("torch._utils._rebuild_tensor_v2") + b"\x86", "holds a maker"),
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
        (b"", "it is empty"),
        (b"<!DOCTYPE html>\n<html></html>", "it is an HTML page: the download went wrong"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
        (b"weights", "not a PyTorch file (it starts with b'weights')"),
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


# What stands for the other things in training checkpoints: it must be as inert as the rest.


def namespace(state: bytes) -> bytes:
    return name("argparse.Namespace") + b")\x81" + state + b"b"


def call(dotted: str, *args: bytes) -> bytes:
    return name(dotted) + b"(" + b"".join(args) + b"tR"


def dtype(code="f4", state=(3, "<", None, None, None, -1, -1, 0)) -> bytes:
    return call("numpy.dtype", *map(push, (code, False, True))) + push(state) + b"b"


def raw(text: str, encoding="latin1") -> bytes:
    return call("_codecs.encode", push(text), push(encoding))


SCALAR = "numpy.core.multiarray.scalar"
LIKE_ATTRIBUTES = {"values": 1, "__class__": "x", "__setstate__": {"a": 2}}


@pytest.mark.parametrize("make", [stream_file, zip_file])
@pytest.mark.parametrize(
    "body, want",
    [
        (namespace(push(LIKE_ATTRIBUTES)), LIKE_ATTRIBUTES),
        (name("argparse.Namespace") + b")\x81", {}),
        (namespace(push({"a": 1})) + push({"b": 2}) + b"b", {"b": 2}),
        (b"]" + namespace(push({"a": 1})) + b"\x85\x85a", [(({"a": 1},),)]),
        (b"(" + push("a") + namespace(push({})) + b"t" + b"\x85", (("a", {}),)),
        (
            call("collections.OrderedDict") + push("a") + namespace(push({})) + b"s",
            collections.OrderedDict(a={}),
        ),
        (call("collections.defaultdict") + push("a") + push(1) + b"s", {"a": 1}),
        (call("collections.defaultdict", push(None)), {}),
        (call("collections.defaultdict", name("__builtin__.list")), {}),
        (call("collections.defaultdict", name("builtins.set")), {}),
        (call(SCALAR, dtype(), raw("\0\0\xc0?")), 1.5),
        (call(SCALAR, dtype(state=(3, ">", *(None,) * 3, -1, -1, 0)), raw("?\xc0\0\0")), 1.5),
        (call(SCALAR, dtype("b1", (3, "|", *(None,) * 3, -1, -1, 0)), raw("\2")), True),
        (call(SCALAR, call("numpy.dtype", push("i8")), raw("\xff" * 8)), -1),
        (call("torch.device", push("mps")), "mps"),
        (call("pathlib.PosixPath"), "."),
        (call("pathlib._local.PosixPath", push("/"), push("a")), "/a"),
    ],
    ids=lambda value: repr(value) if not isinstance(value, bytes) else "",
)
def test_stand_ins(make, body, want, tmp_path):
    got = read_bytes(make(body, ()) if make is stream_file else make(body), tmp_path)
    assert_same(got, want)


def test_a_namespace_in_itself_ends(tmp_path):
    memo = b"q\x07"
    body = name("argparse.Namespace") + b")\x81" + memo + b"}" + push("me") + b"h\x07sb"
    got = read_bytes(zip_file(body), tmp_path)
    assert type(got) is dict and got["me"] is got


def test_many_namespaces_of_one_dict_take_no_memory(tmp_path):
    state = b"}q\1(" + b"".join(push(k) + b"N" for k in range(2000)) + b"u"
    body = b"(" + state + namespace(b"h\1") * 1000 + b"l"
    tracemalloc.start()
    try:
        got = read_bytes(zip_file(body), tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got[1] is got[1000] and peak < 5e6  # 1,000 copies would be 80 MB


HUGE = "x" * 2000


@pytest.mark.parametrize("make", [stream_file, zip_file])
@pytest.mark.parametrize(
    "body, message",
    [
        (namespace(push((None, {"values": 1}))), "state of a Namespace"),
        (namespace(push([("a", 1)])), "state of a Namespace"),
        (namespace(call("collections.OrderedDict")), "state of a Namespace"),
        (namespace(name("argparse.Namespace") + b")\x81"), "state of a Namespace"),
        (namespace(push({"a": {1: b"bytes"}})), "refused"),
        (namespace(b"}" + push("a") + raw("abc") + b"s"), "holds a bytes"),
        (namespace(b"}" + push("a") + storage() + b"s"), "holds a storage"),
        (namespace(b"}" + push("a") + name("os.system") + b"s"), "it names 'os.system'"),
        (namespace(b"}" + push("a") + push(({1, 2},)) + b"s"), "it names 'builtins.set'"),
        (b"}" + namespace(push({})) + b"Ns", "holds a namespace"),
        (b"}" + namespace(push({})) + b"\x85Ns", "holds a namespace"),
        (name("argparse.Namespace") + push((1,)) + b"\x81", "TypeError"),
        (name("argparse.Namespace"), "holds a type"),
        (name("argparse.Namespace") + push({"a": 1}) + b"b", "TypeError"),
        (name("argparse.Namespace") + push((None, {"a": 1})) + b"b", "TypeError"),
        (namespace(push({})) + push("a") + push(1) + b"s", "TypeError"),
        (name("argparse._sys"), "it names 'argparse._sys'"),
        (name("argparse.Action"), "it names 'argparse.Action'"),
        (call("collections.defaultdict", name("os.system")), "it names 'os.system'"),
        (call("collections.defaultdict", name("builtins.eval")), "it names 'builtins.eval'"),
        (call("collections.defaultdict", name("torch.device")), "factory"),
        (call("collections.defaultdict", name("argparse.Namespace")), "factory"),
        (call("collections.defaultdict", push({})), "factory"),
        (call("collections.defaultdict", name("builtins.dict"), push({})), "TypeError"),
        (name("collections.defaultdict") + b")\x81", "damaged"),
        (call("collections.defaultdict") + push({"a": 1}) + b"b", "damaged"),
        (call("collections.defaultdict") + push((None, {"get": 1})) + b"b", "damaged"),
        (name("builtins.dict"), "holds a factory"),
        (call("builtins.list"), "it names 'builtins.list'"),
        (name("builtins.int") + push({"name": "x"}) + b"b", "alters a factory"),
        (name("builtins.getattr"), "it names 'builtins.getattr'"),
        (call("torch.Size", push([2, 3])), "torch.Size"),
        (call("torch.Size", push((2, 3.0))), "torch.Size"),
        (call("torch.Size", push((1,) * 65)), "torch.Size"),
        (call("torch.Size", push(2), push(3)), "TypeError"),
        (call("torch.device", push(7)), "torch.device"),
        (call("torch.device", push("a\nb")), "torch.device"),
        (call("torch.device", push("x" * 33)), "torch.device"),
        (call("torch.device", push("cuda"), push(-1)), "torch.device"),
        (call("torch.device", push("cuda"), push(10**5000)), "torch.device"),
        (call("numpy.dtype", push("O8")), "no real number"),
        (call("numpy.dtype", push("V8")), "no real number"),
        (call("numpy.dtype", push("c8")), "no real number"),
        (call("numpy.dtype", push(["f4"])), "no real number"),
        (dtype(state=(3, "<", None, None, None, -1, -1, 63)), "state of a NumPy dtype"),
        (dtype(state=(3, "=", None, None, None, -1, -1, 0)), "state of a NumPy dtype"),
        (dtype(state=(3, "<", ("f4", (2,)), None, None, -1, -1, 0)), "state of a NumPy dtype"),
        (dtype(state={1: "<"}), "state of a NumPy dtype"),
        (dtype(state=None), "damaged"),
        (dtype(), "holds a dtype"),
        (call(SCALAR, dtype("f8"), raw("abcd")), "NumPy scalar"),
        (call(SCALAR, dtype(), push("abcd")), "NumPy scalar"),
        (call(SCALAR, push("f4"), raw("abcd")), "NumPy scalar"),
        (call(SCALAR, name("numpy.dtype"), raw("abcd")), "NumPy scalar"),
        (raw("abc"), "holds a bytes"),
        (raw("abc", "hex"), "bytes that are no NumPy scalar"),
        (raw("abc", "utf-8"), "bytes that are no NumPy scalar"),
        (raw("x" * 9), "bytes that are no NumPy scalar"),
        (raw("\u20ac"), "damaged"),
        (call("pathlib.PosixPath", push(1)), "path"),
        (call("pathlib.PosixPath", push("/"), push(["a"])), "path"),
        # The same long text again and again: more text than the file has bytes.
        (
            b"(" + push(HUGE) + (call("pathlib.PosixPath", b"h\0h\0") + b"0") * 5 + b"l",
            "paths are longer than the file",
        ),
        (call("pathlib.Path", push("a")), "it names 'pathlib.Path'"),
        (call("numpy.core.multiarray._reconstruct"), "_reconstruct"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stand_ins_refuse(make, body, message, tmp_path):
    data = make(body, ()) if make is stream_file and b"Storage" not in body else make(body)
    assert message in refusal(data, tmp_path)


NAMES = [
    *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.Size"),
    *("torch.device", "collections.defaultdict", "numpy.dtype", SCALAR, "_codecs.encode"),
    *("pathlib.PosixPath", "argparse.Namespace", "collections.OrderedDict", "builtins.dict"),
]


@pytest.mark.parametrize("dotted", NAMES)
@pytest.mark.parametrize("state", [{"a": 1}, (None, {"a": 1}), (None, {"__call__": 1})])
def test_nothing_of_a_name_can_be_altered(dotted, state, tmp_path):
    def attributes():
        functions = [v for v in vars(torch_reader).values() if hasattr(v, "__dict__")]
        functions += [v for v in vars(torch_reader._Reader).values() if hasattr(v, "__dict__")]
        return [dict(vars(f)) for f in functions] + [dict(vars(collections.OrderedDict))]

    before = attributes()
    refusal(zip_file(name(dotted) + push(state) + b"b0N"), tmp_path)
    assert attributes() == before


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        torch_reader.read(tmp_path / "none.pth")


def attempt(data: bytes, folder: pathlib.Path):
    try:
        assert_plain(read_bytes(data, folder))
    except TorchFileError as error:
        assert "\n" not in str(error)


def assert_plain(tree):
    todo, seen = [tree], {}
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


@pytest.mark.parametrize("layout", FIXTURES)
def test_damage_never_raises_anything_else(layout, tmp_path):
    original = FIXTURES[layout].read_bytes()
    place = st.integers(0, len(original) - 1)

    @settings(max_examples=150, deadline=2000)
    @given(place)
    def truncate(length):
        attempt(original[:length], tmp_path)

    @settings(max_examples=400, deadline=2000)
    @given(st.lists(st.tuples(place, st.integers(1, 255)), min_size=1, max_size=4))
    def flip(changes):
        data = bytearray(original)
        for where, bits in changes:
            data[where] ^= bits
        attempt(bytes(data), tmp_path)

    truncate()
    flip()


def test_no_bytes_raise_anything_else(tmp_path):
    starts = st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", zip_file(b"N")[:60]])

    @settings(max_examples=200, deadline=2000)
    @given(starts, st.binary(max_size=200))
    def check(start, rest):
        attempt(start + rest, tmp_path)
        attempt(zip_file(rest), tmp_path)

    check()


def test_no_program_raises_anything_else(tmp_path):
    with zipfile.ZipFile(DATA / "torch_args.pth") as archive:
        program = archive.read("torch_args/data.pkl")[2:-1]
    pieces = [name(dotted) for dotted in NAMES]
    pieces += [push(value) for value in (1, "f4", "cpu", {"a": 1}, (1, 2), [], None, ("a", 2.5))]
    pieces += [storage(), tensor(storage()), namespace(push({})), dtype(), raw("abcd")]
    # Mark, tuples, lists, dicts, reduce, build, newobj, newobj_ex, set item(s), append(s), memo.
    pieces += [op.encode("latin1") for op in "(t)]}Rb\x81\x92susae0120Q\x85\x86\x87\x8f\x90"]
    pieces += [b"q\0", b"h\0", b"q\1", b"h\1"]

    @settings(max_examples=600, deadline=2000)
    @given(st.lists(st.sampled_from(pieces), max_size=25))
    def soup(parts):
        attempt(zip_file(b"".join(parts)), tmp_path)

    @settings(max_examples=400, deadline=2000)
    @given(
        st.lists(
            st.tuples(st.integers(0, len(program) - 1), st.integers(1, 255)),
            min_size=1,
            max_size=4,
        )
    )
    def flip(changes):
        data = bytearray(program)
        for where, bits in changes:
            data[where] ^= bits
        attempt(zip_file(bytes(data)), tmp_path)

    soup()
    flip()


# The writer.

WRITABLE = [
    *(np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16),
    *(np.int8, np.uint8, np.bool_, np.complex64, np.complex128),
]


@pytest.mark.parametrize("dtype", WRITABLE)
def test_arrays_of_every_kind_come_back(dtype, tmp_path):
    base = np.arange(-6, 6).astype(dtype).reshape(3, 4)
    arrays = {
        "whole": base,
        "transposed": base.T,
        "strided": base[::-1, 1::2],
        "expanded": np.broadcast_to(base[0], (2, 4)),
        "scalar": base[1:2, 2].reshape(()),
        "empty": np.zeros((0, 3, 0), dtype),
        "ones": base[:1, :1],
    }
    if np.dtype(dtype).kind != "V":
        arrays["big-endian"] = base.astype(np.dtype(dtype).newbyteorder(">"))
    path = tmp_path / "file.pt"
    torch_writer.write(str(path), collections.OrderedDict(arrays))
    want = {key: np.array(array, dtype) for key, array in arrays.items()}
    assert_same(torch_reader.read(path), collections.OrderedDict(want))
    assert os.listdir(tmp_path) == [path.name]


def test_what_read_returns_can_be_written(tmp_path):
    path = tmp_path / "file.pt"
    for tree, want in [
        (torch_reader.read(FIXTURES["zip"]), expected()),
        (torch_reader.read(DATA / "torch_args.pth"), expected_args()),
    ]:
        torch_writer.write(path, tree)
        assert_same(torch_reader.read(path), want)


def test_any_tree_comes_back(tmp_path):
    path = tmp_path / "file.pt"
    keys = st.text(max_size=5) | st.integers() | st.none() | st.booleans()
    leaves = (
        keys
        | st.floats(allow_nan=False)
        | st_numpy.arrays(np.float32, st_numpy.array_shapes(min_dims=0, min_side=0, max_side=3))
        | st_numpy.arrays(np.int64, st.integers(0, 3), elements=st.integers(-9, 9))
    )

    def nested(children):
        return (
            st.lists(children, max_size=4)
            | st.lists(children, max_size=4).map(tuple)
            | st.dictionaries(keys | st.tuples(keys), children, max_size=4)
            | st.dictionaries(keys, children, max_size=4).map(collections.OrderedDict)
        )

    @settings(max_examples=150, deadline=2000)
    @given(st.recursive(leaves, nested, max_leaves=12))
    def check(tree):
        torch_writer.write(path, tree)
        assert_same(torch_reader.read(path), tree)

    check()


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
    tree = expected() | {"numbers": [0, -1, 255, 2**16, -(2**31), 2**31, 2**2000, 0.5], "": "ü"}
    torch_writer.write(path, tree)
    assert_same(torch_reader.read(path), tree)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        program = archive.read("archive/data.pkl")
        assert archive.read("archive/byteorder") == b"little"
        assert archive.read("archive/version") == b"3\n"
    count = len(entries) - 3
    assert [entry.filename for entry in entries] == [
        f"archive/{record}"
        for record in ("data.pkl", "byteorder", *(f"data/{k}" for k in range(count)), "version")
    ]
    data = path.read_bytes()
    for entry in entries:
        sizes = struct.unpack_from("<HH", data, entry.header_offset + 26)
        assert (entry.header_offset + 30 + sum(sizes)) % 64 == 0
        assert entry.compress_type == zipfile.ZIP_STORED
    assert {op.name for op, _, _ in pickletools.genops(program)} <= set(TORCH_READS.split())


def inside_itself():
    tree = {}
    tree["me"] = [tree]
    return tree


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"a": [1, {"b": {1}}]}, "tree['a'][1]['b'] is a set: allowed are dict"),
        ({"a": np.float32(1)}, "tree['a'] is a float32"),
        ({"a": (1, b"")}, "tree['a'][1] is a bytes"),
        ({b"a": 1}, "a key of tree is a bytes"),
        ({("a", b""): 1}, "a key of tree[1] is a bytes"),
        ({"a\n": 1j}, "tree['a\\n'] is a complex"),
        (collections.defaultdict(dict), "tree is a defaultdict"),
        ([np.zeros(2, np.uint16)], "tree[0] is an array of uint16: allowed are float64"),
        ([np.array(["x"])], "tree[0] is an array of <U1"),
        ([np.array([None])], "tree[0] is an array of object"),
        ([2**3000], "tree[0] is an integer of over 255 bytes"),
        (inside_itself(), "holds itself"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_written_is_named(tree, message, tmp_path):
    path = tmp_path / "file.pt"
    with pytest.raises(TorchFileError) as caught:
        torch_writer.write(path, tree)
    told = str(caught.value)
    assert told.startswith(f"{path}: ") and message in told and "\n" not in told
    assert os.listdir(tmp_path) == []


def test_a_failure_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "file.pt"
    torch_writer.write(path, {"a": np.zeros(2)})
    former = path.read_bytes()
    written = []

    def full(array):
        written.append(array)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return array.view(np.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(torch_writer, "raw_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            torch_writer.write(path, {"a": np.ones(2), "b": np.ones(2)})
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == former


def test_writing_copies_one_array_at_a_time(tmp_path):
    arrays = {str(k): np.zeros((512, 512), np.float32) for k in range(6)}
    transposed = {key: array.T for key, array in arrays.items()}
    # One array is 1 MiB; the next may be copied before it is let go.
    for tree, limit in [(arrays, 0.5), (transposed, 2.5)]:
        tracemalloc.start()
        try:
            torch_writer.write(tmp_path / "file.pt", tree)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < limit * 2**20


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_what_is_written(mmap, tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "file.pt"
    written = expected()
    torch_writer.write(path, written)
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    layer = torch.nn.Linear(3, 2)
    layer.load_state_dict(loaded["model"], strict=True)
    np.testing.assert_array_equal(layer.weight.detach().numpy(), written["model"]["weight"])

    def to_numpy(node):
        if isinstance(node, torch.Tensor):
            if node.dtype == torch.bfloat16:
                return node.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            return node.numpy()
        if isinstance(node, dict):
            return type(node)((key, to_numpy(value)) for key, value in node.items())
        return type(node)(map(to_numpy, node)) if isinstance(node, (list, tuple)) else node

    assert_same(to_numpy(loaded), written)
