"""Safetensors files. reference.safetensors was written by the reference package (safetensors 0.8.0
with torch 2.13, metadata {'format': 'pt'}) and holds what `expected` builds and two float8 arrays.
"""

import os
import pathlib

import ml_dtypes
import numpy as np
import pytest

from mirai_jax.weights import safetensors
from mirai_jax.weights.safetensors import SafetensorsError

REFERENCE = pathlib.Path(__file__).parent / "data" / "reference.safetensors"


def expected():
    return {
        "bf16": np.array([1, -2.5, 3.140625, np.inf], ml_dtypes.bfloat16),
        "f64": np.array([[0.1, -1]]),
        "f32": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "f16": np.array(0.5, np.float16),
        "i64": np.array([2**40, -1]),
        "i32": np.array([-7], np.int32),
        "u8": np.array([255], np.uint8),
        "bool": np.array([True, False, True]),
        "é": np.zeros((0, 3), np.float32),
    }


def assert_same(got, want):
    for name in want:
        assert type(got[name]) is np.ndarray and got[name].dtype == want[name].dtype
        np.testing.assert_array_equal(got[name], want[name])


def test_reads_what_the_reference_wrote(tmp_path):
    with pytest.raises(SafetensorsError, match="reference.safetensors: .*float8"):
        safetensors.read(REFERENCE)
    data = REFERENCE.read_bytes()
    for name in (b'"F8_E4M3"', b'"F8_E5M2"'):
        data = data.replace(name, b'"I8"     ')
    (tmp_path / "a.safetensors").write_bytes(data)
    arrays, metadata = safetensors.read(tmp_path / "a.safetensors")
    assert_same(arrays, expected())
    assert metadata == {"format": "pt"} and len(arrays) == 16


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "args": '{"é": 1}'}])
def test_any_layout_and_byte_order_comes_back(tmp_path, metadata):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = expected() | {
        "transposed": base.T,
        "strided": base[::-1, 1::2],
        "broadcast": np.broadcast_to(base[0], (3, 6)),
        "bf16 transposed": base.astype(ml_dtypes.bfloat16).T,
    }
    path = tmp_path / "a.safetensors"
    safetensors.write(path, arrays | {"big-endian": base.astype(">f4")}, metadata)
    got, texts = safetensors.read(path)
    assert_same(got, arrays | {"big-endian": base})
    assert got.keys() == {*arrays, "big-endian"} and texts == (metadata or {})
    assert os.listdir(tmp_path) == [path.name]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # others can read it too


def test_damage_raises_one_class_with_the_file_name(tmp_path):
    original, path = REFERENCE.read_bytes(), tmp_path / "a.safetensors"
    header = 8 + int.from_bytes(original[:8], "little")
    damaged = [b"", b"<html>", b"PK\x03\x04" + bytes(60), b"\xff" * 64, original + b"\0"]
    damaged += [original[:n] for n in (1, 8, 20, header, header + 1, len(original) - 1)]
    damaged += [original.replace(b"[2,3]", b"[2,4]"), original[:8] + b"[" + original[9:]]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(SafetensorsError) as error:
            safetensors.read(path)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        safetensors.read(tmp_path / "none.safetensors")


def test_a_failure_leaves_the_former_file(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.write(path, {"a": np.ones(2)})
    with pytest.raises(SafetensorsError, match="a.safetensors: .*complex128"):
        safetensors.write(path, {"a": np.zeros(2, complex)})
    np.testing.assert_array_equal(safetensors.read(path)[0]["a"], [1, 1])
    assert os.listdir(tmp_path) == [path.name]
    with pytest.raises(OSError):
        safetensors.write(tmp_path / "none" / "a.safetensors", {"a": np.ones(2)})
