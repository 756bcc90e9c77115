"""Safetensors files: the rules of the format, what is refused, and whole files or none.

reference.safetensors was written by the reference package (safetensors 0.8.0 with torch 2.13,
metadata {'format': 'pt'}) and holds what `expected` builds.
"""

import json
import os
import pathlib
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirai_jax.weights import safetensors
from mirai_jax.weights.safetensors import SafetensorsError

REFERENCE = pathlib.Path(__file__).parent / "data" / "reference.safetensors"
DTYPES = [
    *("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"),
    *(ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
]


def expected():
    return {
        "bf16": np.array([1, -2.5, 3.140625, np.inf], ml_dtypes.bfloat16),
        "f64": np.array([[0.1, -1]]),
        "f32": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "f16": np.array(0.5, np.float16),
        "f8_e4m3": np.array([1.5, -448], ml_dtypes.float8_e4m3fn),
        "f8_e5m2": np.array([1.5, -1], ml_dtypes.float8_e5m2),
        "i64": np.array([2**40, -1]),
        "i32": np.array([-7], np.int32),
        "i16": np.array([-300], np.int16),
        "i8": np.array([-128, 127], np.int8),
        "u64": np.array([2**63 + 1], np.uint64),
        "u32": np.array([2**32 - 1], np.uint32),
        "u16": np.array([65535], np.uint16),
        "u8": np.array([255], np.uint8),
        "bool": np.array([True, False, True]),
        "é": np.zeros((0, 3), np.float32),
    }


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert type(got[name]) is np.ndarray and got[name].flags.writeable
        assert (got[name].dtype, got[name].shape) == (
            want[name].dtype.newbyteorder("="),
            want[name].shape,
        )
        # As bytes, for which a NaN is like any other number.
        assert got[name].tobytes() == want[name].astype(got[name].dtype).tobytes()


def test_reads_what_the_reference_wrote():
    assert_same(safetensors.read(REFERENCE), expected())


def test_writes_as_the_reference_does_byte_for_byte(tmp_path):
    path = tmp_path / "file.safetensors"
    safetensors.write(str(path), expected(), {"format": "pt"})
    assert path.read_bytes() == REFERENCE.read_bytes()
    assert os.listdir(tmp_path) == [path.name]


def test_the_order_of_names_and_metadata_does_not_matter(tmp_path):
    texts = {key: key * 2 for key in "cab"}
    files = []
    for turn in (list, reversed):
        path = tmp_path / "file.safetensors"
        arrays = dict(turn(expected().items()))
        safetensors.write(path, arrays, dict(turn(texts.items())))
        files.append(path.read_bytes())
    assert files[0] == files[1]


@st.composite
def any_array(draw):
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    array = (raw % 2 if dtype.kind == "b" else raw).view(dtype).reshape(shape)
    if draw(st.booleans()):
        array = array.T
    if draw(st.booleans()) and array.ndim:
        array = array[:: draw(st.sampled_from([2, -1]))]
    if draw(st.booleans()) and dtype.itemsize > 1 and dtype.kind != "V":
        array = array.astype(dtype.newbyteorder(">"))
    return array


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def test_round_trip(tmp_path):
    path = tmp_path / "file.safetensors"

    @settings(max_examples=150, deadline=2000)
    @given(
        st.dictionaries(names, any_array(), max_size=5),
        st.none() | st.dictionaries(names, names, max_size=3),
    )
    def check(arrays, metadata):
        safetensors.write(path, arrays, metadata)
        assert_same(safetensors.read(path), arrays)
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        assert length % 8 == 0 and header.pop("__metadata__", None) == metadata
        starts = [entry["data_offsets"][0] for entry in header.values()]
        sizes = [np.dtype(arrays[name].dtype).itemsize for name in header]
        assert starts == sorted(starts) and sizes == sorted(sizes, reverse=True)

    check()


# Hand-made files.


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def file_of(header, data=bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def read_bytes(data: bytes, folder: pathlib.Path):
    path = folder / "file.safetensors"
    path.write_bytes(data)
    return safetensors.read(path)


def refusal(data: bytes, folder: pathlib.Path) -> str:
    with pytest.raises(SafetensorsError) as caught:
        read_bytes(data, folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'file.safetensors'}: ") and "\n" not in message
    return message


def test_handmade_files_are_read(tmp_path):
    header = json.dumps({"a": entry(), "__metadata__": {"k": "v"}}).encode() + b"    "
    got = read_bytes(file_of(header, np.array([1, 2], "<f4").tobytes()), tmp_path)
    np.testing.assert_array_equal(got["a"], [1, 2])
    assert read_bytes(file_of({}, b""), tmp_path) == {}
    # The order in the header need not be that of the data; empty tensors lie anywhere between.
    header = {
        "b": entry("U8", (4,), (4, 8)),
        "a": entry("U8", (4,), (0, 4)),
        "none": entry("I64", (3, 0), (4, 4)),
    }
    got = read_bytes(file_of(header, bytes(range(8))), tmp_path)
    assert (got["a"].tolist(), got["b"].tolist()) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert got["none"].shape == (3, 0)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "it is empty"),
        (b"\n<!doctype HTML><p>Not found", "it is an HTML page: the download went wrong"),
        (b"<html>\n", "it is an HTML page: the download went wrong"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
        (b"\x02", "truncated"),
        (b"PK\x03\x04" + bytes(60), "not a safetensors file"),
        (file_of({"a": entry()})[:20], "truncated"),
        (file_of({"a": entry()})[:-1], "8 bytes of tensors declared, 7 found"),
        (file_of({"a": entry()}, bytes(9)), "8 bytes of tensors declared, 9 found"),
        ((2**63).to_bytes(8, "little") + b"{}", "a header of 9223372036854775808 bytes"),
        (file_of(b' {"a": 1}'), "its header starts with"),
        (file_of(b"[]"), "its header starts with"),
        (file_of(b"{} {}"), "JSONDecodeError"),
        (file_of(b'{"\xff": 1}'), "UnicodeDecodeError"),
        (file_of(b'{"\\ud800": 1}'), "UnicodeEncodeError"),
        (file_of(b'{"a": ' + b"[" * 200_000), "RecursionError"),
        (file_of(b'{"a": 1' + b"0" * 5000 + b"}"), "damaged"),
        (file_of(b'{"a": {}, "a": {}}'), "key 'a' comes twice"),
        (
            file_of(b'{"a": {"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
            "key 'dtype' comes twice",
        ),
        (file_of({"a": 1}), "must have dtype, shape and data_offsets"),
        (file_of({"a": entry() | {"more": 1}}), "and nothing else"),
        (file_of({"a": entry("F31")}), "has dtype 'F31': allowed are U64"),
        (file_of({"a": entry(["F32"])}), "has dtype ['F32']"),
        (file_of({"a": entry(shape=(2.0,))}), "shape must be"),
        (file_of({"a": entry(shape=(True, 2))}), "shape must be"),
        (file_of({"a": entry(shape=(-2, -1))}), "shape must be"),
        (file_of({"a": entry(shape=(0,) * 65, offsets=(0, 0))}), "shape must be"),
        (file_of({"a": entry(shape=(0, 2**63), offsets=(0, 0))}), "shape must be"),
        (file_of({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, b""), "damaged"),
        (file_of({"a": entry() | {"shape": 2}}), "shape must be"),
        (file_of({"a": entry(offsets=(0, 8, 8))}), "two positions"),
        (file_of({"a": entry(offsets=(8, 0))}), "does not fill bytes 8 to 0"),
        (file_of({"a": entry(shape=(3,))}), "F32 [3] does not fill bytes 0 to 8"),
        (file_of({"a": entry("F64")}), "F64 [2] does not fill bytes 0 to 8"),
        (file_of({"a": entry(shape=(1,), offsets=(4, 8))}), "(hole or overlap)"),
        (
            file_of({"a": entry(), "b": entry()}),
            "tensor 'b' starts at byte 0, not at 8",
        ),
        (file_of({"a": entry("BOOL", (8,))}, b"\0\1\2\0\0\0\0\0"), "'a' is not all 0 and 1"),
        (file_of({"__metadata__": {"a": 1}}, b""), "__metadata__ must map text to text"),
        (file_of({"__metadata__": []}, b""), "__metadata__ must map text to text"),
        (file_of({"\n" * 1000: 1}), "\\n"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses(data, message, tmp_path):
    told = refusal(data, tmp_path)
    assert message in told and len(told) < 500


def test_the_longest_header(tmp_path, monkeypatch):
    header = json.dumps({"a": entry()}).encode()
    for limit in (len(header), len(header) - 1):
        monkeypatch.setattr(safetensors, "_MAX_HEADER", limit)
        if limit == len(header):
            read_bytes(file_of(header), tmp_path)
        else:
            assert f"allowed are {limit}" in refusal(file_of(header), tmp_path)
    with pytest.raises(SafetensorsError, match="its header would have"):
        safetensors.write(tmp_path / "file.safetensors", {"a" * limit: np.zeros(2)})


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        safetensors.read(tmp_path / "none.safetensors")


def test_damage_never_raises_anything_else(tmp_path):
    original = REFERENCE.read_bytes()
    place = st.integers(0, len(original) - 1)
    length = int.from_bytes(original[:8], "little")

    def attempt(data: bytes):
        try:
            read_bytes(data, tmp_path)
        except SafetensorsError as error:
            assert "\n" not in str(error)

    @settings(max_examples=150, deadline=2000)
    @given(st.binary() | place.map(lambda cut: original[:cut]))
    def garbage(data):
        attempt(data)
        attempt(file_of(data))
        attempt(file_of(b"{" + data + b"}"))

    @settings(max_examples=400, deadline=2000)
    @given(st.lists(st.tuples(place, st.integers(1, 255)), min_size=1, max_size=4))
    def flip(changes):
        data = bytearray(original)
        for where, bits in changes:
            data[where] ^= bits
        attempt(bytes(data))

    @settings(max_examples=300, deadline=2000)
    @given(st.integers(8, 7 + length), st.sampled_from([b"9", b"0", b"-", b"]", b'"', b"1e3", b""]))
    def edit(where, text):  # closer to what passes as JSON than flipped bits are
        attempt(original[:where] + text + original[where + 1 :])

    garbage()
    flip()
    edit()


# Writing.


@pytest.mark.parametrize(
    "arrays, metadata, message",
    [
        ({"a": [1.0]}, None, "tensor 'a' is a list, no NumPy array"),
        ({"a": np.float32(1)}, None, "tensor 'a' is a float32, no NumPy array"),
        ({"a": np.array(1j)}, None, "tensor 'a' is complex128: allowed are U64"),
        ({"a": np.array(["x"])}, None, "tensor 'a' is <U1"),
        ({"a": np.array(["x"], np.dtypes.StringDType())}, None, "tensor 'a' is StringDType()"),
        ({"a": np.array([None])}, None, "tensor 'a' is object"),
        ({1: np.zeros(1)}, None, "a tensor is named 1"),
        ({"__metadata__": np.zeros(1)}, None, "a tensor is named '__metadata__'"),
        ({"\ud800": np.zeros(1)}, None, "not Unicode text"),
        ({}, {"a": 1}, "__metadata__ must map text to text"),
        ({}, {1: "a"}, "__metadata__ must map text to text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_written_is_named(arrays, metadata, message, tmp_path):
    path = tmp_path / "file.safetensors"
    with pytest.raises(SafetensorsError) as caught:
        safetensors.write(path, arrays, metadata)
    told = str(caught.value)
    assert told.startswith(f"{path}: ") and message in told and "\n" not in told
    assert os.listdir(tmp_path) == []


def test_a_failure_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "file.safetensors"
    safetensors.write(path, {"a": np.zeros(2)})
    former = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            safetensors.write(path, {"a": np.ones(2)})
    assert os.listdir(tmp_path) == [path.name] and path.read_bytes() == former
    with pytest.raises(FileNotFoundError):
        safetensors.write(tmp_path / "none" / "file.safetensors", {})
    safetensors.write(path, {"a": np.ones(2)})
    np.testing.assert_array_equal(safetensors.read(path)["a"], [1, 1])


def test_writing_copies_one_array_at_a_time(tmp_path):
    arrays = {str(k): np.zeros((512, 512), np.float32) for k in range(6)}
    transposed = {key: array.T for key, array in arrays.items()}
    # One array is 1 MiB; the next may be copied before it is let go.
    for tree, limit in [(arrays, 0.5), (transposed, 2.5)]:
        tracemalloc.start()
        try:
            safetensors.write(tmp_path / "file.safetensors", tree)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < limit * 2**20
