"""Images packed in files, data of the Hub, and codes that others have made.

Each packed source must give what the folder that it was made of gives, in the same order.
"""

import functools
import hashlib
import io
import json
import pickle
import shutil
import tarfile
import time

import helpers
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags
from helpers import refusal
from PIL import Image

from configs import llamagen
from mirai_jax.config import schema
from mirai_jax.data import folder_sets, images, parquet, records
from mirai_jax.data.crops import CropSpec
from mirai_jax.data.images import open_images
from mirai_jax.extraction import job as jobs
from mirai_jax.extraction import shards
from mirai_jax.tokenizing import images as tokenizing_images
from mirai_jax.training import components, follow, metrics_writer, train
from mirai_jax.utils import hub

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = ("cats", "dogs", "owls")
KINDS = ("snappy", "none", "wds", "wds_names")
SPEC = CropSpec(8, 1.25)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRAI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sources"


def write_folder(root, count):
    """Every kind of image that is decoded with a note, and plain ones."""
    rng = np.random.RandomState(0)
    for i in range(count):
        pixels = rng.randint(0, 256, (12, 14 + i % 5, 3)).astype(np.uint8)
        path = root / NAMES[i % 3] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels)
        if i == 9:
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)  # 16-bit
        elif i == 16:
            path, image = path.with_suffix(".jpg"), image.convert("CMYK")
        image.save(path)
    return root


def rows_of(root):
    """(file's name, bytes, label) in the order of the folder."""
    source = open_images(str(root))
    for i in range(len(source)):
        raw, label, key = source.example(i)
        yield key.replace("/", "_"), raw, label


def features(names=NAMES):
    about = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    return {b"huggingface": json.dumps({"info": {"features": about}}).encode()}


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema([("image", IMAGE), ("label", pa.int64())], metadata=features())


def write_parquet(path, rows, compression="snappy", schema=SCHEMA):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "image": [{"bytes": raw, "path": name} for name, raw, _ in rows],
        "label": [label for *_, label in rows],
    }
    table = pa.table(columns, schema=schema)
    pq.write_table(table, path, compression=compression, row_group_size=4)
    return path


def write_tar(path, rows, names=None):
    """Samples as WebDataset's writer has them, with labels in .cls or, of `names`, in .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, raw, label in rows:
            stem, _, kind = name.partition(".")
            about = ("cls", str(label)) if names is None else ("json", {"label": names[label]})
            text = about[1] if names is None else json.dumps(about[1])
            for suffix, data in ((kind, raw), (about[0], text.encode())):
                info = tarfile.TarInfo(f"train/{stem}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def pack(kind, root, folder):
    """Two files of a kind with the images of a folder; returns the source's name."""
    rows = list(rows_of(root))
    half = len(rows) // 2 + 1
    for k, some in enumerate((rows[:half], rows[half:])):
        if kind.startswith("wds"):
            write_tar(
                folder / kind / f"train-{k}.tar", some, NAMES if kind == "wds_names" else None
            )
        else:
            write_parquet(folder / kind / f"train-0000{k}-of-00002.parquet", some, kind)
    return f"{'wds' if kind.startswith('wds') else 'parquet'}:{folder / kind}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"), 23)


# Images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_packed_images_are_those_of_the_folder_in_its_order(kind, folder, tmp_path, cache):
    wanted = open_images(str(folder))
    spec = pack(kind, folder, tmp_path)
    source = open_images(spec)
    assert len(source) == 23 and source.class_names == (("0", "1", "2") if kind == "wds" else NAMES)
    np.testing.assert_array_equal(source.labels(), wanted.labels())
    keys = [source.about(i)[1] for i in range(23)]
    ending = "-of-00002.parquet:" if not kind.startswith("wds") else ".tar:"
    assert [key.partition(ending)[2] for key in keys] == list(map(str, [*range(12), *range(11)]))
    files = [wanted.example(i)[0] for i in range(23)]
    assert [source.example(i)[0] for i in range(23)] == files
    order = np.random.RandomState(0).permutation(23)

    def shuffled(of):
        return [of.find(keys[i]) for i in order] == [files[i] for i in order]

    assert shuffled(source) and shuffled(source.prepare())
    assert shuffled(pickle.loads(pickle.dumps(source)))  # as a worker process has it
    assert shuffled(open_images(spec.replace(str(tmp_path), f"{tmp_path}/.")).prepare())
    assert len(list(cache.glob("*.bin"))) == (2 if kind == "snappy" else 0)
    again = open_images(f"{spec}/train-*0[-.]*")
    assert len(again) == 12 and again.hashes().tolist() == source.hashes()[:12].tolist()
    for wrong in ("", "x:1", keys[0] + "9999", keys[0][:-2]):
        assert "has the key" in refusal(source.find, wrong)


def test_an_index_is_of_one_version_of_its_file(folder, tmp_path, cache):
    rows = list(rows_of(folder))
    path = write_parquet(tmp_path / "a.parquet", rows)
    open_images(f"parquet:{path}").prepare()
    write_parquet(path, rows[::-1])
    source = open_images(f"parquet:{path}").prepare()
    assert [source.find(f"a.parquet:{i}") for i in range(23)] == [raw for _, raw, _ in rows[::-1]]
    assert len(list(cache.glob("*.npz"))) == len(list(cache.glob("*.bin"))) == 1
    index = next(cache.glob("*.npz"))
    before = index.stat().st_mtime_ns
    open_images(f"parquet:{path}").prepare()
    assert index.stat().st_mtime_ns == before


def test_room_for_copies_is_bounded(folder, tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", list(rows_of(folder)))
    monkeypatch.setenv("MIRAI_CACHE_GIB", "0.000001")
    assert "MIRAI_CACHE_GIB" in refusal(open_images(f"parquet:{path}").prepare)
    write_parquet(path, list(rows_of(folder)), "none")
    open_images(f"parquet:{path}").prepare()  # nothing is copied


def test_another_schema_is_refused_in_a_line(folder, tmp_path):
    rows, path = list(rows_of(folder)), tmp_path / "a.parquet"

    def told(table):
        pq.write_table(table, path)
        return refusal(open_images, f"parquet:{path}").replace(str(path), "FILE")

    table = pq.read_table(write_parquet(tmp_path / "good.parquet", rows))
    assert told(table.drop_columns("image")) == "FILE has no column image; it has label"
    assert told(table.drop_columns("label")) == "FILE has no column label; it has image"
    lists = pa.array([[row["bytes"]] for row in table["image"].to_pylist()])
    assert "has a column image of" in told(table.set_column(0, "image", lists))
    assert "has a column image of" in told(table.set_column(0, "image", pa.array(["x.png"] * 23)))
    assert "has a column label of" in told(table.set_column(1, "label", pa.array([0.5] * 23)))
    assert "has a column label of" in told(table.set_column(1, "label", pa.array([[1]] * 23)))
    whole = (tmp_path / "good.parquet").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "no whole parquet file" in refusal(open_images, f"parquet:{path}")
    assert "is no file" in refusal(open_images, f"parquet:{tmp_path}/none-*")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(path, "x.jpg")
    assert "no plain tar" in refusal(open_images, f"wds:{tmp_path}/a.tar.gz")
    # Plain bytes and class names as text are read.
    plain = table.set_column(0, "image", pc_bytes(table))
    pq.write_table(plain.set_column(1, "label", pa.array([NAMES[r[2]] for r in rows])), path)
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    source = open_images(f"parquet:{path}").prepare()
    assert source.class_names == NAMES and source.labels().tolist() == [r[2] for r in rows]
    assert [source.find(f"a.parquet:{i}") for i in range(23)] == [raw for _, raw, _ in rows]


def pc_bytes(table):
    return pa.array([row["bytes"] for row in table["image"].to_pylist()], pa.binary())


def test_files_with_other_class_names_are_no_more_of_the_data_set(folder, tmp_path):
    rows = list(rows_of(folder))
    for name, names in (("a", NAMES), ("b", NAMES), ("c", ("cars", "ships", "trams"))):
        schema = SCHEMA.with_metadata(features(names))
        write_parquet(tmp_path / "of" / f"{name}.parquet", rows, schema=schema)
    assert len(open_images(f"parquet:{tmp_path}/of/[ab].parquet")) == 46
    refused = refusal(open_images, f"parquet:{tmp_path}/of")
    assert "a.parquet" in refused or "b.parquet" in refused
    assert "c.parquet" in refused


@pytest.mark.parametrize(
    "files, split, wanted",
    [
        (("data/train-0-of-2.parquet", "data/train-1-of-2.parquet", "data/test-0.parquet"), "", 2),
        (("plain_text/train-0-of-1.parquet", "plain_text/test-0-of-1.parquet"), "", 1),
        (
            ("big/train-0.parquet", "small/train-0.parquet", "small/test-0.parquet"),
            "",
            "big, small",
        ),
        (("big/train/0.parquet", "small/train/0.parquet"), ":train", "big, small"),
        (
            ("big/train/0.parquet", "small/train/0.parquet", "small/train/1.parquet"),
            ":small/train",
            2,
        ),
        (("train/000/0.tar", "train/001/0.tar"), "", 2),
        (("data/a-train-0.parquet", "data/b-train-0.parquet"), "", 2),
        (("big/0.parquet", "small/0.parquet"), "", "big, small"),
        (("big/0.parquet", "small/0.parquet"), ":small", 1),
        (("0.tar", "1.tar"), "", 2),
    ],
)
def test_of_several_subsets_of_the_hub_one_must_be_named(
    files, split, wanted, tmp_path, monkeypatch
):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(hub, "_fetch", lambda *_, **__: str(tmp_path))
    find = lambda: hub.data_files(f"hf:me/photos{split}", images._packed_files)
    if isinstance(wanted, str):
        assert wanted in refusal(find)
    else:
        assert len(find()) == wanted


def test_a_codebook_is_fitted_without_reading_groups_of_rows(folder, tmp_path, monkeypatch):
    config = config_of(pack("snappy", folder, tmp_path), 1, 0)
    settings = schema.read(follow.resolve(config, lambda line: None), 1)
    with monkeypatch.context() as patch:
        patch.setenv("MIRAI_CACHE_GIB", "0")  # no room for copies
        assert len(components._some_images(settings).images) == 23
    monkeypatch.setattr(parquet, "_group", None)
    assert len(components._some_images(settings).images) == 23


# Faults ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    return helpers.vq_file(tmp_path_factory.mktemp("vq"))


def extract(images, tokenizer_file, out, **fields):
    fields = {"images_per_shard": 9, "batch_size": 4, "num_workers": 2} | fields
    spec = fields.pop("spec", SPEC)
    job = jobs.prepare(str(images), str(tokenizer_file), str(out), spec, **fields)
    return shards.run(job, 0, 1, fields.pop("reconstructions", 0))


def stored(out):
    source = records.CodeRecords(str(out), grid=(4, 4), vocab_size=24, num_classes=3)
    return [source[k] for k in range(len(source))]


def report(out):
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def codes(folder, tokenizer_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("extracted") / "codes"
    extract(folder, tokenizer_file, out)
    return out


def damage_group(path, group):
    """Zeros over the chunk of image bytes of a group of rows, of a file whose footer is whole."""
    about = pq.read_metadata(path).row_group(group)
    chunk = about.column(0)
    assert chunk.path_in_schema == "image.bytes"
    with path.open("r+b") as file:
        file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        file.write(b"\0" * chunk.total_compressed_size)


def test_bad_rows_are_listed_and_the_others_are_those_of_the_folder(
    folder, codes, tokenizer_file, tmp_path
):
    rows = list(rows_of(folder))
    rows[1] = (*rows[1][:2], None)
    rows[2] = (*rows[2][:2], 3)
    rows[9] = (rows[9][0], rows[9][1][:80], rows[9][2])
    rows[10] = (rows[10][0], None, rows[10][2])
    path = write_parquet(tmp_path / "a.parquet", rows)
    damage_group(path, 1)  # rows 4 to 7
    bad = [1, 2, 4, 5, 6, 7, 9, 10]
    made = extract(f"parquet:{path}", tokenizer_file, tmp_path / "codes")
    assert made.images == open_images(f"parquet:{path}").describe()
    assert (made.num_failed, made.num_records) == (8, 15)
    failed = report(tmp_path / "codes")["failed"]
    reasons = " ".join(f["key"] + f["reason"] for f in failed)
    assert all(f"a.parquet:{i}" in reasons for i in bad) and "row group 1" in reasons
    wanted = stored(codes)
    for got, i in zip(stored(tmp_path / "codes"), sorted({*range(23)} - {*bad}), strict=True):
        np.testing.assert_array_equal(got["codes"], wanted[i]["codes"])
        assert got["key"] == f"a.parquet:{i}" and got["label"] == wanted[i]["label"]
    notes = report(tmp_path / "codes")["notes"]
    assert {k: len(v) for k, v in notes.items()} == {"16-bit": 1, "cmyk": 1}
    source = open_images(f"parquet:{path}").prepare()  # in training others stand in for them
    for i in (4, 7, 10):
        refusal(source.find, f"a.parquet:{i}")
    assert source.find("a.parquet:8") == rows[8][1] and source.labels() is None
    loaded = folder_sets.load(f"parquet:{path}", SPEC, "train", 0.0, 1, False, False)
    assert len(loaded.images) == 15 and len(loaded.unread) == 8


def test_bad_samples_of_tars_are_listed(folder, codes, tokenizer_file, tmp_path):
    rows = list(rows_of(folder))
    path = write_tar(tmp_path / "a.tar", rows)
    with tarfile.open(path, "a") as tar:  # no image, and no label
        for name in ("train/x.txt", "train/y.png"):
            tar.addfile(tarfile.TarInfo(name))
    whole = path.read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: whole.rindex(rows[20][1][:64]) + 100])
    made = extract(f"wds:{tmp_path}/?.tar", tokenizer_file, tmp_path / "codes")
    assert (made.num_failed, made.num_records) == (2, 43)
    found = report(tmp_path / "codes")
    assert "a.tar:23" in found["failed"][0]["reason"] and "b.tar:20" in found["failed"][1]["reason"]
    assert "a.tar:train/x" in found["skipped"] and len(found["skipped"]) <= 2
    for got, wanted in zip(stored(tmp_path / "codes"), stored(codes) * 2, strict=False):
        np.testing.assert_array_equal(got["codes"], wanted["codes"])


def test_without_labels_nothing_is_extracted_and_a_tokenizer_is_trained(
    folder, tokenizer_file, tmp_path
):
    rows, path = list(rows_of(folder)), tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, raw, _ in rows:
            for member, data in ((name, raw), (f"{name[:-4]}.txt", b"a caption")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    refused = refusal(extract, f"wds:{path}", tokenizer_file, tmp_path / "codes")
    assert "a.tar:0" in refused and "no label" in refused and not (tmp_path / "codes").exists()
    load = functools.partial(
        tokenizing_images.load, "images", "", held_out=4, size=(8, 8), crop_range=1.1, flip=True,
        exif="ignore", batch_size=4, seed=0,
    )  # fmt: skip
    made = load(spec=f"wds:{path}")
    assert made.count == 19 and next(iter(made.batches))["image"].shape == (4, 8, 8, 3)
    broken = write_tar(tmp_path / "b.tar", [(name, b"?", label) for name, _, label in rows])
    assert "b.tar:" in refusal(load, spec=f"wds:{broken}")


# Codes that others have made ---------------------------------------------------------------------


def write_llamagen(root, found, repeated=0):
    """As extract_codes_c2i.py of `repeated` + 1 processes: the first images come again at the end."""
    for name in ("codes", "labels"):
        (root / f"imagenet8_{name}").mkdir(parents=True)
    for n, record in enumerate([*found, *found[:repeated]]):
        np.save(root / "imagenet8_codes" / f"{n}.npy", record["codes"][None].astype(np.int64))
        np.save(root / "imagenet8_labels" / f"{n}.npy", np.array([record["label"]]))
    return root


def digests(out):
    """Of the shards and the manifest; the report of codes knows nothing of the images."""
    files = [*out.glob("*.array_record"), out / "manifest.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Stop:
    def __init__(self, left):
        self.left = left

    def advance(self, count):
        self.left -= count
        if self.left <= 0:
            raise KeyboardInterrupt


def test_llamagens_codes_become_the_shards_of_an_extraction(
    folder, codes, tokenizer_file, tmp_path
):
    given = write_llamagen(tmp_path / "given", stored(codes), repeated=2)
    job = jobs.prepare(
        str(folder), str(tokenizer_file), str(tmp_path / "codes"), SPEC,
        codes=str(given), images_per_shard=9, batch_size=4,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        shards.write_shards(job, [0, 1, 2], Stop(11))
    extract(folder, tokenizer_file, tmp_path / "codes", codes=str(given))
    assert digests(tmp_path / "codes") == digests(codes)
    # Without images the number is the key; a name will do for the tokenizer.
    for number, left in ((5, b"?"), (7, b"")):
        (given / "imagenet8_codes" / f"{number}.npy").write_bytes(left)
    np.save(given / "imagenet8_codes" / "8.npy", np.full((1, 10, 16), 24))
    (given / "imagenet8_labels" / "9.npy").unlink()
    made = extract("", tokenizer_file, tmp_path / "some", codes=str(given))
    assert (made.num_records, made.num_failed, made.images["kind"]) == (21, 4, "llamagen codes")
    assert [r["key"] for r in stored(tmp_path / "some")][4:8] == ["4", "6", "10", "11"]
    refused = refusal(extract, "", tokenizer_file, tmp_path / "x", codes=given, spec=CropSpec(16))
    assert "(10, 16)" in refused and "(10, 64)" in refused
    for number in range(23):  # of other images
        np.save(given / "imagenet8_labels" / f"{number}.npy", np.array([(number + 1) % 3]))
    assert "has label" in refusal(extract, folder, tokenizer_file, tmp_path / "x", codes=given)


def test_rars_lines_become_records_of_ten_crops(codes, tmp_path):
    found, path = stored(codes), tmp_path / "maskgitvq.jsonl"
    lines = [
        json.dumps({"class_id": int(r["label"]), "tokens": crop.tolist()}) + "\n"
        for r in found
        for crop in r["codes"]
    ]
    lines[57] = lines[57][:20] + "\n"
    path.write_text("".join(lines))
    spec = CropSpec(64)
    made = extract("", "maskgit", tmp_path / "codes", codes=str(path), spec=spec)
    assert made.tokenizer == {"file": "maskgit"} and made.vocab_size == 1024
    assert (made.num_records, made.num_failed, made.crops.ten) == (22, 1, True)
    assert "line 51:" in report(tmp_path / "codes")["failed"][0]["reason"]
    for got, wanted in zip(stored(tmp_path / "codes"), found[:5] + found[6:], strict=True):
        np.testing.assert_array_equal(got["codes"], wanted["codes"])
        assert got["label"] == wanted["label"]
    path.write_text("".join(lines[:-1]))
    assert "229 lines" in refusal(extract, "", "maskgit", tmp_path / "x", codes=path, spec=spec)


# Whole programs ----------------------------------------------------------------------------------


def hub_repository(home, kind, name, files):
    """A repository as huggingface_hub keeps it in its cache."""
    root, revision = home / "hub" / f"{kind}s--me--{name}", "0123456789abcdef" * 2 + "01234567"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(revision)
    for inside, path in files.items():
        link, blob = root / "snapshots" / revision / inside, root / "blobs" / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(blob)


@pytest.mark.slow
def test_data_and_weights_of_the_hub_come_from_its_cache_without_a_network(
    folder, codes, tokenizer_file, tmp_path
):
    pytest.importorskip("huggingface_hub")
    pack("snappy", folder, tmp_path)
    pack("wds", folder, tmp_path)
    files = {f"data/{p.name}": p for p in (tmp_path / "snappy").iterdir()}
    (tmp_path / "test-0.parquet").write_bytes(b"never read")
    files["data/test-00000-of-00001.parquet"] = tmp_path / "test-0.parquet"
    hub_repository(tmp_path, "dataset", "photos", files)
    hub_repository(tmp_path, "dataset", "tars", {p.name: p for p in (tmp_path / "wds").iterdir()})
    hub_repository(tmp_path, "model", "vq", {"deep/vq.pt": tokenizer_file})
    offline = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", **helpers.QUICK}
    wanted = stored(codes)
    for name in ("photos@main", "tars", "photos:train"):
        out = tmp_path / name
        printed = helpers.output(
            "mirai_jax.extract", f"--images=hf:me/{name}", "--tokenizer=hf:me/vq@main/deep/vq.pt",
            f"--out={out}", "--image_size=8", "--crop_range=1.25", **offline,
        )  # fmt: skip
        assert "23 images in 1 shards" in printed
        for got, record in zip(stored(out), wanted, strict=True):
            np.testing.assert_array_equal(got["codes"], record["codes"])
    line = helpers.error_line(
        "mirai_jax.extract", "--images=hf:me/nothing", f"--tokenizer={tokenizer_file}",
        f"--out={tmp_path}/x", "--image_size=8", **offline,
    )  # fmt: skip
    assert "hf:me/nothing cannot be fetched" in line


def config_of(images, steps, workers):
    config = llamagen.get_config("folder")
    config.update(num_steps=steps, batch_size=8, log_every=1, checkpoint_every=2, sample_every=0)
    config.update(judged_samples=0)
    config.model.update(num_layers=1, num_heads=2, width=32, vocab_size=16, unroll=1)
    config.tokenizer.image_size = (8, 8)
    config.data.update(images=str(images), crops="random", held_out_share=0.0, num_workers=workers)
    config.optimizer.warmup_steps = 2
    config.sample.per_class = 1
    return config


def losses(images, workdir, steps=4, workers=0):
    config = config_of(images, steps, workers)
    train.train(config, workdir, devices=jax.devices()[:1], log=lambda line: None)
    return [(e["loss"], e["grad_norm"]) for e in metrics_writer.read_metrics(workdir)]


@pytest.mark.slow
def test_runs_on_packed_images_are_those_on_the_folder_and_resume_bit_for_bit(folder, tmp_path):
    flags.FLAGS.mark_as_parsed()  # Grain's workers ask for it
    wanted = losses(folder, tmp_path / "folder")
    for kind in KINDS:
        spec = pack(kind, folder, tmp_path)
        losses(spec, tmp_path / f"run_{kind}", steps=2)
        assert losses(spec, tmp_path / f"run_{kind}", workers=2) == wanted
        shutil.move(tmp_path / kind, tmp_path / "elsewhere" / kind)  # data may move
        moved = spec.replace(str(tmp_path), str(tmp_path / "elsewhere"))
        assert len(losses(moved, tmp_path / f"run_{kind}", steps=5)) == 5


@pytest.mark.slow
def test_many_images_open_at_once_and_are_read_in_any_order_as_fast_as_files(tmp_path):
    raw = np.random.RandomState(0).bytes(4000)
    rows = [(f"{i:06d}.jpg", i.to_bytes(4, "big") + raw, i * 3 // 100_000) for i in range(100_000)]
    order = np.random.RandomState(1).permutation(100_000)[:5_000]
    for name in NAMES:
        (tmp_path / "folder" / name).mkdir(parents=True)
    for name, raw, label in (rows[i] for i in order):
        (tmp_path / "folder" / NAMES[label] / name).write_bytes(raw)
    for k in range(10):
        some = rows[k * 10_000 : (k + 1) * 10_000]
        write_parquet(tmp_path / "snappy" / f"{k}.parquet", some)
        write_parquet(tmp_path / "none" / f"{k}.parquet", some, "none")
        write_tar(tmp_path / "wds" / f"{k}.tar", some)

    def speed(source, order):
        keys = [source.about(int(i))[1] for i in order]
        seconds = []
        for _ in range(3):
            begin = time.perf_counter()
            for key in keys:
                source.find(key)
            seconds.append(time.perf_counter() - begin)
        return len(keys) / min(seconds)

    folder = open_images(str(tmp_path / "folder"))
    wanted = 0.5 * speed(folder, np.random.RandomState(2).permutation(len(folder)))
    for kind in ("snappy", "none", "wds"):
        spec = f"{'wds' if kind == 'wds' else 'parquet'}:{tmp_path / kind}"
        open_images(spec).prepare()  # the index of tars is made once
        begin = time.perf_counter()
        source = open_images(spec)
        assert len(source) == 100_000 and time.perf_counter() - begin < 2
        assert speed(source.prepare(), order) > wanted
