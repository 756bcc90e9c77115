"""Any shard, manifest or path is read as it was written, or refused in one line that names it.

Never a traceback, never a run on other data. `-m slow` runs the same properties many more times.
"""

import jax
import msgpack
import numpy as np
import pytest
from fuzzing import amounts, fuzz, one_line
from helpers import error_line
from hypothesis import assume, given
from hypothesis import strategies as st

from configs import llamagen
from mirai_jax.config import compare
from mirai_jax.data import images as image_sources
from mirai_jax.data import manifest, pipeline, records, small_sets
from mirai_jax.data.crops import CropSpec
from mirai_jax.training import metrics_writer, train
from mirai_jax.utils.errors import DataError

GRID, VOCAB, CLASSES = (2, 3), 16, 5
BLOCK = 2**16  # bytes between the places at which an ArrayRecord file may be entered


def flipped(raw, position, bit):
    return raw[:position] + bytes([raw[position] ^ 1 << bit]) + raw[position + 1 :]


# Shards of codes ----------------------------------------------------------------------------------


def some_records(count, seed=0, crops=2):
    codes = np.random.default_rng(seed).integers(0, VOCAB, (count, crops, 6)).astype(np.uint16)
    return [(codes[k], k % CLASSES, f"image {seed} {k}") for k in range(count)]


def write(folder, written, number=0):
    """Writes a shard; returns its file."""
    file = folder / f"codes-{number}.array_record"
    records.write_shard(file, [records.pack_record(*record) for record in written])
    return file


def open_records(folder, grid=GRID):
    return records.CodeRecords(str(folder), grid=grid, vocab_size=VOCAB, num_classes=CLASSES)


def as_read(record):
    """A record in a form that can be compared."""
    return record["codes"].tolist(), int(record["label"]), record["key"]


def as_written(written):
    return [(codes.tolist(), label, key) for codes, label, key in written]


def read_all(folder, *named):
    """All records, or None where one was refused with a line that names one of `named`."""
    try:
        source = open_records(folder)
        return [as_read(source[k]) for k in range(len(source))]
    except DataError as error:
        message = one_line(error)
        assert any(name in message for name in named), message
        return None


def check_shard(file, raw, written):
    """A shard of these bytes is refused, or gives exactly the records."""
    file.write_bytes(raw)
    got = read_all(file.parent, file.name)
    assert got is None or got == as_written(written)
    return got is not None


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_byte_of_a_shard_changes_no_record(tmp_path, step):
    written = some_records(5)
    file = write(tmp_path, written)
    raw = file.read_bytes()
    # Mostly empty: the records, and from the second half on their index.
    used = sorted({k for k, byte in enumerate(raw) if byte} | set(range(0, len(raw), 257)))[::step]
    survived = {k for k in used if check_shard(file, flipped(raw, k, k % 8), written)}
    # ArrayRecord's checksums catch every flip of a record. The first 64 bytes are a signature that
    # is not read; the index and filling come after the records.
    end = raw.index(b"image 0 4") + len(b"image 0 4")
    assert not any(64 <= k < end for k in survived)


@pytest.mark.parametrize("stride", [1999, pytest.param(31, marks=pytest.mark.slow)])
def test_a_truncated_shard_is_refused(tmp_path, stride):
    written = some_records(5)
    file = write(tmp_path, written)
    raw = file.read_bytes()
    near = [place + k for place in (64, 900, BLOCK, 2 * BLOCK) for k in range(-9, 9)]
    for end in sorted({*range(0, len(raw), stride), *near}):
        assert check_shard(file, raw[:end], written) == (end >= len(raw)), end


# Records whose bytes are whole and whose content is not -------------------------------------------


def meaning(raw):
    """What a record holds, by an independent reading; None if it must be refused."""
    try:
        tree = msgpack.unpackb(raw)
        shape, codes, label, key = (tree[name] for name in ("shape", "codes", "label", "key"))
        crops, length = shape
        sides = np.frombuffer(codes, "<u2").reshape(crops, length)
    except Exception:
        return None
    good = len(tree) == 4 and type(shape) is list and crops > 0 and length == 6
    good = good and type(label) is int and type(codes) is bytes and type(key) is str
    if not good or sides.max() >= VOCAB or not 0 <= label < CLASSES:
        return None
    return sides.tolist(), label, key


other_values = st.none() | st.booleans() | st.floats() | st.integers(-(2**63), 2**64 - 1)
other_values |= (
    st.text(max_size=5) | st.binary(max_size=30) | st.lists(st.integers(0, 9), max_size=3)
)
near_values = {
    "label": st.sampled_from([-1, CLASSES, 2**31, 2**64 - 1, True, 1.0, "1"]),
    "shape": st.sampled_from([[2, 5], [3, 6], [12], [2, 6, 1], [2.0, 6], [-1, 6], b"\2\6", [6, 2]]),
    "codes": st.sampled_from([b"", bytes(23), "0" * 24, bytes(22) + b"\x10\0", b"\xff" * 24]),
    "key": st.sampled_from([1, b"key", ["key"]]),
    "more": st.just(0),
}


@st.composite
def any_record(draw):
    """Packed bytes: a good record, one with another crop count, or one that is wrong somewhere."""
    crops, length = draw(st.sampled_from([(2, 6), (2, 6), (2, 6), (1, 6), (0, 6), (2, 5)]))
    codes = draw(st.binary(min_size=2 * crops * length, max_size=2 * crops * length))
    codes = (np.frombuffer(codes, "<u2") % VOCAB).astype("<u2").tobytes()
    tree = {"shape": [crops, length], "codes": codes, "label": draw(st.integers(0, CLASSES - 1)),
            "key": draw(st.text(max_size=5))}  # fmt: skip
    kind = draw(
        st.sampled_from(["good", "good", "near", "other", "missing", "cut", "flip", "bytes"])
    )
    if kind in ("near", "other"):
        name = draw(st.sampled_from(sorted(near_values)))
        tree[name] = draw(near_values[name] if kind == "near" else other_values)
    elif kind == "missing":
        del tree[draw(st.sampled_from(sorted(tree)))]
    raw = msgpack.packb(tree)
    place = draw(st.integers(0, len(raw) - 1))
    if kind == "cut":
        return raw[:place]
    if kind == "flip":
        return flipped(raw, place, draw(st.integers(0, 7)))
    return draw(st.binary(max_size=60)) if kind == "bytes" else raw


@amounts
def test_records_of_any_content_are_read_as_they_are_or_refused(tmp_path, amount):
    file = tmp_path / "codes-0.array_record"

    @fuzz(200 * amount)
    @given(st.lists(any_record(), min_size=1, max_size=6))
    def run(packed):
        records.write_shard(file, packed)
        wanted = [meaning(raw) for raw in packed]
        if wanted[0] is None:
            with pytest.raises(DataError) as error:
                open_records(tmp_path)
            one_line(error.value, f"record 0 of {file.name}")
            return
        source = open_records(tmp_path)
        for k, record in enumerate(wanted):
            # All must have as many crops as the first, for their draw.
            if record and len(record[0]) == len(wanted[0][0]):
                assert as_read(source[k]) == record
            else:
                with pytest.raises(DataError) as error:
                    source[k]
                one_line(error.value, f"record {k} of {file.name}")

    run()


# A folder with a manifest -------------------------------------------------------------------------


def test_shards_that_are_not_those_of_the_manifest_are_refused(tmp_path):
    written, shards = [some_records(5), some_records(3, 1)], []
    for number, some in enumerate(written):
        file = write(tmp_path, some, number)
        shards.append(manifest.Shard(file.name, len(some), ""))
    made = manifest.Manifest(
        images={}, crops=CropSpec(24), tokenizer={}, grid=GRID, vocab_size=VOCAB, class_names=(),
        images_per_shard=5, batch_size=4, precision="", complete=True, num_records=8,
        shards=tuple(shards),
    )  # fmt: skip
    manifest.write(tmp_path, made)
    files = [tmp_path / f"codes-{k}.array_record" for k in range(3)]
    first, second = (file.read_bytes() for file in files[:2])
    assert read_all(tmp_path) == as_written(written[0] + written[1])
    # Swapped (each holds another number of records), empty, one too many, one too few.
    for contents in ((second, first), (first, b""), (first, second, first), (first,)):
        for file in files:
            file.unlink(missing_ok=True)
        for file, content in zip(files, contents, strict=False):
            file.write_bytes(content)
        assert read_all(tmp_path, "codes-0", "codes-1", "codes-2") is None


PATHS = ["", " ", "-", "~", "~nobody/x", "a*", "[", "a[!", "**", "file", "file/x", "folder", "é"]
PATHS += ["x" * 300, "x/" * 1500, "\udcff", "grain:", "grain:x", "grain:no_such.module:x"]


@amounts
def test_paths_of_any_text_are_refused_in_one_line(tmp_path, monkeypatch, amount):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    text = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=9)

    @fuzz(100 * amount)
    @given(st.one_of(st.sampled_from(PATHS), text))
    def run(path):
        assume("/" not in path[:1] and ".." not in path)
        assume(not path.startswith(("tfds", "mnist", "fashion_mnist")))
        for field, reader in (
            ("data.path", open_records),
            ("fashion_mnist", lambda p: small_sets.load_images("fashion_mnist", p or "no")),
            ("images", lambda p: len(image_sources.open_images(p))),
        ):
            with pytest.raises(DataError) as error:
                reader(path)
            assert field in one_line(error.value) or path in str(error.value)

    run()


# Training -----------------------------------------------------------------------------------------


def tiny(folder):
    """ImageNet's recipe for codes of 16 tokens, small enough for a test."""
    config = llamagen.get_config("imagenet_b")
    config.update(num_steps=9, batch_size=8, log_every=1)
    config.model.update(
        size="", num_layers=1, num_heads=2, width=32, vocab_size=VOCAB, num_classes=CLASSES,
        grid=(4, 4), dtype="float32",
    )  # fmt: skip
    config.tokenizer.image_size = 64
    config.sample.classes = CLASSES
    config.data.update(path=str(folder), num_workers=0)
    return config


def write_bad_codes(tmp_path, batch):
    """Codes with an unknown code in batch `batch` of `tiny`; returns what names its record."""
    folder = tmp_path / "bad"
    folder.mkdir()
    codes = np.random.default_rng(0).integers(0, VOCAB, (64, 2, 16)).astype(np.uint16)

    def write_both():
        packed = [(codes[k], k % CLASSES, f"{k}") for k in range(64)]
        write(folder, packed[:40], 0)
        write(folder, packed[40:], 1)

    write_both()
    config = tiny(folder)
    batches = pipeline.make_dataset(
        open_records(folder, (4, 4)), batch_size=config.batch_size, seed=config.seed
    )
    # Not record 0, which is read when the shards are opened.
    number = max(int(key.split()[0]) for key in batches.record_keys(batch))
    codes[number] = VOCAB
    write_both()
    return f"record {number % 40} of codes-{number // 40}.array_record"


@pytest.mark.usefixtures("quick_compilation")
def test_a_bad_record_stops_the_run_before_it_is_trained_on(tmp_path):
    batch = 7  # the last of the epoch
    name = write_bad_codes(tmp_path, batch)
    config = tiny(tmp_path / "bad")
    with pytest.raises(DataError) as error:
        train.train(config, tmp_path / "run", devices=jax.devices()[:1], log=lambda line: None)
    one_line(error.value, name, "model.vocab_size")
    steps = [entry["step"] for entry in metrics_writer.read_metrics(tmp_path / "run")]
    assert steps and max(steps) <= batch
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


@pytest.mark.slow
def test_a_bad_record_in_a_worker_process_ends_the_program_with_one_line(tmp_path):
    name = write_bad_codes(tmp_path, 0)
    file = tmp_path / "own.py"
    file.write_text(
        "import json, ml_collections\n"
        "def get_config(scale=''):\n"
        f"    return ml_collections.ConfigDict(json.load(open({str(tmp_path / 'own.json')!r})))\n"
    )
    (tmp_path / "own.json").write_text(compare.to_json(tiny(tmp_path / "bad")))
    arguments = (f"--config={file}", f"--workdir={tmp_path / 'run'}", "--config.data.num_workers=1")
    assert f"{name}: has code 16" in error_line("mirai_jax.main", *arguments)
    assert metrics_writer.read_metrics(tmp_path / "run") == []
