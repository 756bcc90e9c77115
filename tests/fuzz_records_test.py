"""Any shard, manifest or path is read as what was written or refused in one line that names it.

Never a traceback, never a run on other data. Every test counts its cases and the file says at the
end how many there were; `-m slow` runs the same properties many more times.
"""

import hashlib
import os
import pathlib
import subprocess
import sys

import jax
import msgpack
import numpy as np
import pytest
from fuzzing import (
    CASES,
    amounts,
    damaged_json,
    flipped,
    fuzz,
    one_line,
    told_count,  # noqa: F401 (a fixture)
)
from hypothesis import assume, given
from hypothesis import strategies as st

from configs import llamagen
from mirai_jax.config import compare
from mirai_jax.data import manifest, pipeline, records, small_sets, sources
from mirai_jax.data.crops import CropSpec
from mirai_jax.training import metrics_writer, restore, train
from mirai_jax.utils.errors import ConfigError, DataError
from mirai_jax.weights import frozen, pretrained

ROOT = pathlib.Path(__file__).parents[1]


# Shards of codes ----------------------------------------------------------------------------------

GRID, VOCAB, CLASSES = (2, 3), 16, 5
BLOCK = 2**16  # bytes between the places at which an ArrayRecord file may be entered


def open_records(folder):
    return records.CodeRecords(str(folder), grid=GRID, vocab_size=VOCAB, num_classes=CLASSES)


def some_records(count, seed=0, crops=2):
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, VOCAB, (crops, 6)).astype(np.uint16), k % CLASSES, f"image {seed} {k}")
        for k in range(count)
    ]


def write(folder, written, number=0):
    """Writes a shard; returns its file."""
    file = folder / f"codes-{number}.array_record"
    records.write_shard(file, [records.pack_record(*record) for record in written])
    return file


def as_read(record):
    """A record in a form that can be compared."""
    return record["codes"].tolist(), int(record["label"]), record["key"]


def as_written(record):
    codes, label, key = record
    return codes.tolist(), label, key


def read_all(folder, *named):
    """All records, or None where one was refused with a line that names one of `named`."""
    try:
        source = open_records(folder)
        return [as_read(source[k]) for k in range(len(source))]
    except DataError as error:
        message = one_line(error)
        assert any(name in message for name in named), message
        return None


def check_shard(file, raw, *allowed):
    """A shard of these bytes is refused, or gives exactly the records of one of `allowed`."""
    CASES["shards"] += 1
    file.write_bytes(raw)
    got = read_all(file.parent, file.name)
    assert got is None or got in [[as_written(record) for record in some] for some in allowed]
    return got is not None


@pytest.mark.parametrize(
    "stride, step",
    [(257, 3), pytest.param(1, 1, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_every_byte_of_a_shard_flipped_in_turn(tmp_path, stride, step):
    written = some_records(5)
    file = write(tmp_path, written)
    raw = file.read_bytes()
    assert len(raw) == 2 * BLOCK  # mostly empty: the records, and from the second half on the index
    used = sorted({k for k, byte in enumerate(raw) if byte} | set(range(0, len(raw), stride)))[
        ::step
    ]
    survived = {k for k in used if check_shard(file, flipped(raw, k, k % 8), written)}
    assert len(used) > 1_000 / step
    # No flip of a record was survived: ArrayRecord's own checksums are what is relied on. The first
    # 64 bytes are its signature, which is not read; after the records come their index and filling.
    end = raw.index(b"image 0 4") + len(b"image 0 4")
    assert not any(64 <= k < end for k in survived)


@pytest.mark.parametrize(
    "stride", [997, pytest.param(31, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_a_shard_cut_anywhere_is_refused(tmp_path, stride):
    written = some_records(5)
    file = write(tmp_path, written)
    raw = file.read_bytes()
    near = [place + k for place in (40, 64, 900, BLOCK, 2 * BLOCK) for k in range(-20, 20)]
    for end in sorted({*range(0, len(raw), stride), *near}):
        assert check_shard(file, raw[:end], written) == (end >= len(raw)), end


@st.composite
def spliced(draw, shards):
    """Bytes of one shard with parts cut out, put in, overwritten, or taken from another."""
    raw = bytearray(draw(st.sampled_from(shards)))
    for _ in range(draw(st.integers(1, 4))):
        low = draw(st.sampled_from([0, 0, BLOCK, max(0, len(raw) - 300)]))
        place = low + draw(st.integers(0, 1200))
        size = draw(st.sampled_from([1, 8, 40, 100, BLOCK]))
        other = draw(st.sampled_from(shards))
        block = BLOCK * draw(st.integers(0, 2))
        kind = draw(st.integers(0, 6))
        if kind == 0:
            del raw[place : place + size]
        elif kind == 1:
            raw[place:place] = draw(st.binary(min_size=1, max_size=9)) * size
        elif kind == 2:
            raw[place : place + size] = bytes([draw(st.integers(0, 255))]) * size
        elif kind == 3:
            raw[block : block + BLOCK] = other[block : block + BLOCK]
        elif kind == 4:
            raw += other
        elif kind == 5:
            raw = raw[block:] + raw[:block]
        else:
            raw[place : place + 8] = draw(st.binary(min_size=8, max_size=8))
    return bytes(raw)


@amounts
def test_parts_of_shards_put_together_are_refused_or_a_whole_shard(tmp_path, amount):
    written = [some_records(5), some_records(5, 1), some_records(900, 2), some_records(3, 3)]
    shards = [write(tmp_path, some).read_bytes() for some in written]
    file = tmp_path / "codes-0.array_record"

    @fuzz(125 * amount)
    @given(spliced(shards))
    def run(raw):
        check_shard(file, raw, *written)

    run()


def test_other_files_with_the_suffix_are_refused(tmp_path):
    file = tmp_path / "codes-0.array_record"
    rng = np.random.default_rng(0)
    for raw in (
        b"",
        b"no shard\n" * 30_000,
        bytes(2 * BLOCK),
        b"\xff" * 2 * BLOCK,
        *(rng.bytes(size) for size in (1, BLOCK - 1, BLOCK, BLOCK + 100, 3 * BLOCK)),
    ):
        assert not check_shard(file, raw)
    file.unlink()
    file.mkdir()
    assert read_all(tmp_path, file.name) is None
    file.rmdir()
    file.symlink_to(tmp_path / "nowhere")
    assert read_all(tmp_path, file.name) is None


def test_a_shard_that_changes_while_it_is_read_is_refused(tmp_path):
    written, other = some_records(5), some_records(5, 1, crops=3)
    whole = write(tmp_path, written).read_bytes()
    another = write(tmp_path, other).read_bytes()
    file = tmp_path / "codes-0.array_record"
    for raw in (b"", whole[:300], another):
        file.write_bytes(whole)
        source = open_records(tmp_path)
        file.write_bytes(raw)
        for k in range(5):
            CASES["shards"] += 1
            try:
                assert as_read(source[k]) == as_written(written[k])
            except DataError as error:
                one_line(error, f"record {k} of {file.name}")


# Records whose bytes are whole, and whose content is not


def meaning(raw):
    """What a record says, by a reading of its own; None where it says nothing that may be used."""
    try:
        tree = msgpack.unpackb(raw)
        shape, codes, label, key = (tree[name] for name in ("shape", "codes", "label", "key"))
        crops, length = shape
        sides = np.frombuffer(codes, "<u2").reshape(crops, length)
    except Exception:
        return None
    numbers = type(label) is type(crops) is type(length) is int
    good = numbers and len(tree) == 4 and crops > 0 and length == 6 and type(shape) is list
    good = good and type(codes) is bytes and type(key) is str
    if not good or sides.max() >= VOCAB or not 0 <= label < CLASSES:
        return None
    return sides.tolist(), label, key


good_record = st.builds(
    lambda seed, label, key: records.pack_record(some_records(1, seed)[0][0], label, key),
    st.integers(0, 9),
    st.integers(0, CLASSES - 1),
    st.text(max_size=5),
)


@st.composite
def any_record(draw):
    """Packed bytes: mostly wrong in one way or another."""
    raw = draw(good_record)
    tree = msgpack.unpackb(raw)
    kind = draw(st.integers(0, 8))
    if kind == 0:
        return draw(st.binary(max_size=60))
    if kind == 1:
        return raw[: draw(st.integers(0, len(raw)))]
    if kind == 2:
        return flipped(raw, draw(st.integers(0, len(raw) - 1)), draw(st.integers(0, 7)))
    if kind == 3:
        tree["label"] = draw(st.sampled_from([-1, CLASSES, 2**31, 2**64 - 1, -(2**63), True, 1.0]))
    elif kind == 4:
        highest = draw(st.sampled_from([VOCAB - 1, VOCAB, 2**15, 2**16 - 1]))
        tree["codes"] = tree["codes"][:-2] + int(highest).to_bytes(2, "little")
    elif kind == 5:
        crops, length = draw(st.integers(0, 3)), draw(st.sampled_from([6, 6, 6, 0, 5, 7]))
        tree |= {"shape": [crops, length], "codes": bytes(2 * crops * length)}
    elif kind == 6:
        other = st.none() | st.booleans() | st.floats() | st.integers(-(2**63), 2**64 - 1)
        other |= (
            st.text(max_size=5) | st.binary(max_size=30) | st.lists(st.integers(0, 9), max_size=3)
        )
        tree[draw(st.sampled_from(sorted(tree)))] = draw(other)
    elif kind == 7:
        del tree[draw(st.sampled_from(sorted(tree)))]
    else:
        tree[draw(st.sampled_from(["more", "", "Label"]))] = 0
    return msgpack.packb(tree)


@pytest.mark.parametrize(
    "change",
    [
        *({"label": label} for label in (-1, CLASSES, 2**31, 2**64 - 1, True, 1.0, None, "1", [1])),
        *(
            {"shape": shape}
            for shape in ([2, 5], [3, 6], [12], [2, 6, 1], [2.0, 6], None, "26", [6, 2])
        ),
        *({"shape": [crops, 6], "codes": bytes(12 * crops)} for crops in (0, 1, 3)),
        *({"shape": [2, length], "codes": bytes(4 * length)} for length in (1, 5, 7, 12)),
        *({"codes": codes} for codes in (b"", bytes(23), "0" * 24, [0] * 12, None)),
        *({"codes": bytes(22) + code.to_bytes(2, "little")} for code in (VOCAB, 2**8, 2**16 - 1)),
        *({"key": key} for key in (None, 1, b"key", ["key"])),
        {"more": 0},
    ],
    ids=lambda change: "-".join(f"{key} {value!r:.20}" for key, value in change.items()),
)
def test_each_way_a_record_can_be_wrong_is_refused(tmp_path, change):
    good = records.pack_record(*some_records(1)[0])
    wrong = msgpack.packb({**msgpack.unpackb(good), **change})
    CASES["records"] += 1
    records.write_shard(tmp_path / "codes-0.array_record", [good, wrong])
    assert meaning(wrong) is None or change.get("shape", [2])[0] != 2
    with pytest.raises(DataError) as error:
        open_records(tmp_path)[1]
    one_line(error.value, "record 1 of codes-0.array_record")


@amounts
def test_records_of_any_content_are_read_as_they_are_or_refused(tmp_path, amount):
    file = tmp_path / "codes-0.array_record"

    @fuzz(100 * amount)
    @given(st.lists(st.one_of(good_record, any_record()), min_size=1, max_size=6))
    def run(packed):
        CASES["records"] += len(packed)
        records.write_shard(file, packed)
        told = [meaning(raw) for raw in packed]
        try:
            source = open_records(tmp_path)
        except DataError as error:
            one_line(error, f"record 0 of {file.name}")
            assert told[0] is None
            return
        assert told[0] is not None
        # All must have as many crops as the first, for their draw.
        told = [t if t and len(t[0]) == len(told[0][0]) else None for t in told]
        for k, wanted in enumerate(told):
            try:
                assert as_read(source[k]) == wanted
            except DataError as error:
                assert wanted is None, (wanted, error)
                one_line(error, f"record {k} of {file.name}")
        check_stream(source, told, file.name)

    run()


def check_stream(source, told, name):
    """An epoch of batches holds what was written; a batch with a bad record is an error."""
    rows = [record[:2] for record in told if record]
    drawn = 0
    batches = iter(pipeline.make_dataset(source, batch_size=1, seed=0, num_threads=0))
    try:
        for _ in range(len(source)):
            batch = next(batches)
            codes, label = batch["codes"][0].tolist(), int(batch["label"][0])
            assert any(label == own and codes in crops for crops, own in rows)
            drawn += 1
        assert None not in told
    except DataError as error:
        assert None in told
        one_line(error, name)
    assert drawn <= len(rows)


# A folder with a manifest


def write_folder(folder):
    """Two shards and their manifest; returns all their records and the manifest."""
    written = [some_records(5), some_records(3, 1)]
    shards = []
    for number, some in enumerate(written):
        file = write(folder, some, number)
        checksum = hashlib.sha256(file.read_bytes()).hexdigest()
        shards.append(manifest.Shard(file.name, len(some), checksum))
    made = manifest.Manifest(
        images={"kind": "folder", "name": "images", "count": 8},
        crops=CropSpec(image_size=24),
        tokenizer={"checksum": "ab" * 32, "file": "vq.pt"},
        grid=GRID,
        vocab_size=VOCAB,
        class_names=tuple("abcde"),
        images_per_shard=5,
        batch_size=4,
        precision="float32",
        complete=True,
        num_records=8,
        shards=tuple(shards),
    )
    manifest.write(folder, made)
    return [as_written(record) for some in written for record in some], made


@amounts
def test_a_damaged_manifest_is_refused_or_changes_nothing(tmp_path, amount):
    whole, made = write_folder(tmp_path)
    assert read_all(tmp_path) == whole

    @fuzz(100 * amount)
    @given(damaged_json(made.to_dict()))
    def run(raw):
        CASES["manifests"] += 1
        (tmp_path / "manifest.json").write_bytes(raw)
        assert read_all(tmp_path, "manifest", "data.path") in (None, whole)

    run()


def test_shards_that_are_not_those_of_the_manifest_are_refused(tmp_path):
    whole, _ = write_folder(tmp_path)
    first, second = (tmp_path / f"codes-{k}.array_record" for k in range(2))
    raw = [file.read_bytes() for file in (first, second)]

    def with_shards(*contents):
        CASES["manifests"] += 1
        for number, content in enumerate(contents):
            (tmp_path / f"codes-{number}.array_record").write_bytes(content)
        return read_all(tmp_path, "codes-0", "codes-1", "codes-2")

    assert with_shards(*raw) == whole
    assert with_shards(raw[1], raw[0]) is None  # swapped: each holds another number of records
    assert with_shards(raw[0], raw[0]) is None
    assert with_shards(raw[0], b"") is None
    assert with_shards(*raw, raw[0]) is None
    (tmp_path / "codes-2.array_record").unlink()
    second.unlink()
    assert with_shards(raw[0]) is None


# Paths --------------------------------------------------------------------------------------------

PATHS = ["", " ", "-", "~", "~nobody/x", "a*", "[", "a[!", "**", "file", "file/x", "folder", "é"]
PATHS += ["x" * 300, "x/" * 1500, "\udcff", "grain:", "grain:x", "grain:no_such.module:x"]


@amounts
def test_paths_of_any_text_are_refused_in_one_line(tmp_path, monkeypatch, amount):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    readers = {
        "data.path": open_records,
        "fashion_mnist": lambda path: small_sets.load_images("fashion_mnist", path or "no"),
        "images": lambda path: len(sources.open_images(path)),
        "tokenizer.path": lambda path: frozen.load_vq_file("tokenizer.path", path),
        "teacher.path": lambda path: pretrained.load("teacher.path", path, "teacher"),
        "init_from": lambda path: restore.read_settings("init_from", path),
    }
    text = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=9)

    @fuzz(100 * amount)
    @given(st.one_of(st.sampled_from(PATHS), text), st.sampled_from(sorted(readers)))
    def run(path, field):
        assume("/" not in path[:1] and ".." not in path and not path.startswith("tfds"))
        CASES["paths"] += 1
        with pytest.raises((ConfigError, DataError)) as error:
            readers[field](path)
        assert field in one_line(error.value) or path in one_line(error.value)

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


def write_codes(folder, bad=None, **change):
    """64 records in two shards; record `bad` of all has other codes or another label."""
    rng = np.random.default_rng(0)
    made = [
        [rng.integers(0, VOCAB, (2, 16)).astype(np.uint16), k % CLASSES, f"{k}"] for k in range(64)
    ]
    if bad is not None:
        made[bad][0] = np.full_like(made[bad][0], change.get("code", 0))
        made[bad][1] = change.get("label", 0)
    folder.mkdir()
    for number, some in enumerate((made[:40], made[40:])):
        write(folder, some, number)


def batches_of(folder):
    """The numbers of the records in each batch of the first epoch."""
    source = records.CodeRecords(str(folder), grid=(4, 4), vocab_size=VOCAB, num_classes=CLASSES)
    config = tiny(folder)
    batches = pipeline.make_dataset(source, batch_size=config.batch_size, seed=config.seed)
    return [[int(key.split()[0]) for key in batches.record_keys(k)] for k in range(8)]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "change, told",
    [
        ({"code": VOCAB}, "has code 16: model.vocab_size allows 0 to 15"),
        pytest.param(
            {"label": CLASSES},
            "has label 5: model.num_classes allows 0 to 4",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["code", "label"],
)
def test_a_bad_record_stops_the_run_before_it_is_trained_on(tmp_path, change, told):
    CASES["runs"] += 1
    good, bad = tmp_path / "good", tmp_path / "bad"
    write_codes(good)
    batch = 7  # the last of the epoch
    number = max(batches_of(good)[batch])  # not 0: opening the shards reads that one
    write_codes(bad, number, **change)
    with pytest.raises(DataError) as error:
        train.train(tiny(bad), tmp_path / "run", devices=jax.devices()[:1], log=lambda line: None)
    shard, place = divmod(number, 40)
    one_line(error.value, f"record {place} of codes-{shard}.array_record", told)
    steps = [entry["step"] for entry in metrics_writer.read_metrics(tmp_path / "run")]
    assert steps and max(steps) <= batch
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


@pytest.mark.slow
def test_a_bad_record_in_a_worker_process_ends_the_program_with_one_line(tmp_path):
    CASES["runs"] += 1
    write_codes(tmp_path / "good")
    number = max(batches_of(tmp_path / "good")[0])
    write_codes(tmp_path / "bad", number, code=VOCAB)
    file = tmp_path / "own.py"
    file.write_text(
        "import json, ml_collections\n"
        "def get_config(scale=''):\n"
        f"    return ml_collections.ConfigDict(json.load(open({str(tmp_path / 'own.json')!r})))\n"
    )
    (tmp_path / "own.json").write_text(compare.to_json(tiny(tmp_path / "bad")))
    result = subprocess.run(
        [
            *(sys.executable, "-m", "mirai_jax.main", f"--config={file}"),
            *(f"--workdir={tmp_path / 'run'}", "--config.data.num_workers=1"),
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1, result.stderr
    lines = result.stderr.strip().splitlines()
    shard, place = divmod(number, 40)
    assert lines[-1].startswith("error: ") and "Traceback" not in result.stderr, result.stderr
    assert f"record {place} of codes-{shard}.array_record: has code 16" in lines[-1]
    assert metrics_writer.read_metrics(tmp_path / "run") == []
