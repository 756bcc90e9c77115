"""Extraction: what the shards hold, and that no stop, no bad image and no full disk spoils them."""

import hashlib
import io
import json
import resource

import jax
import numpy as np
import pytest
from helpers import refusal
from PIL import Image

from mirai_jax.data import manifest, records
from mirai_jax.data.crops import CropSpec, load_all_crops
from mirai_jax.data.images import open_images
from mirai_jax.data.pipeline import CropLoader, OnlineImages, make_dataset
from mirai_jax.extraction import encode as encode_lib
from mirai_jax.extraction import job as jobs
from mirai_jax.extraction import pictures, shards
from mirai_jax.models import tokenizer, vq
from mirai_jax.utils.errors import ConfigError, DataError
from mirai_jax.weights import torch_names, torch_writer

CONFIG = vq.VQConfig(multipliers=(1, 1, 2), width=32, z_channels=32, vocab_size=64)
SPEC = CropSpec(image_size=24, crop_range=1.25)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A small VQ of random weights, in a PyTorch file as LlamaGen's."""
    image, rng = np.zeros((1, 8, 8, 3), np.float32), np.random.RandomState(0)
    shapes = jax.eval_shape(vq.VQModel(CONFIG).init, jax.random.key(0), image)["params"]

    def draw(path, leaf):  # much as init would, without compiling it
        deviation = np.prod(leaf.shape[:-1]) ** -0.5
        return rng.normal(path[-1].key == "scale", deviation, leaf.shape).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    path = tmp_path_factory.mktemp("vq") / "vq.pt"
    torch_writer.write(path, {"model": torch_names.to_torch(CONFIG, params)})
    return path


def picture(seed, size=(40, 33)):
    """A smooth picture with an edge, unlike its mirror image."""
    rng = np.random.RandomState(seed)
    coarse = Image.fromarray(rng.randint(0, 256, (4, 3, 3)).astype(np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).copy()
    pixels[:, : size[0] // 3] = rng.randint(0, 256, 3)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    for i in range(17):
        path = tmp_path / "images" / ("cats", "dogs", "owls")[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, (40 + i, 33)).save(path)
    return tmp_path / "images"


def prepare(folder, tokenizer_file, out, spec=SPEC, **fields):
    fields = {"images_per_shard": 6, "batch_size": 4, "num_workers": 2} | fields
    return jobs.prepare(str(folder), str(tokenizer_file), str(out), spec, **fields)


def make(folder, tokenizer_file, out, index=0, count=1, **fields):
    job = prepare(folder, tokenizer_file, out, **fields)
    return shards.run(job, index, count, reconstructions=0)


def digests(folder):
    """Of all files that must be the same after any stop."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".png")
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def read_all(out):
    source = records.CodeRecords(str(out), grid=(6, 6), vocab_size=64, num_classes=3)
    return [source[k] for k in range(len(source))]


@pytest.fixture(scope="module")
def codes_of(tokenizer_file):
    """uint8 crops, up to ten of them -> their codes, encoded together."""
    job = prepare("mnist", tokenizer_file, tokenizer_file.parent / "unused")
    apply = jax.jit(lambda x: job.module.apply({"params": job.params}, x, method="encode"))

    def codes_of(pixels_BxSxSx3):
        ten = np.resize(pixels_BxSxSx3, (10, *pixels_BxSxSx3.shape[1:]))
        return np.asarray(apply(tokenizer.to_unit(ten)))[: len(pixels_BxSxSx3)]

    return codes_of


def test_records_hold_the_codes_of_every_crop(folder, tokenizer_file, codes_of, tmp_path):
    made = make(folder, tokenizer_file, tmp_path / "codes")
    assert made.complete and made.num_records == 17 and made.num_failed == 0
    assert [shard.records for shard in made.shards] == [6, 6, 5]
    assert made.class_names == ("cats", "dogs", "owls") and made.grid == (6, 6)
    assert made == manifest.read(tmp_path / "codes")
    found = read_all(tmp_path / "codes")
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.png"))
    assert [record["key"] for record in found] == names
    for record in found:
        assert record["label"] == ("cats", "dogs", "owls").index(record["key"].split("/")[0])
        crops, _ = load_all_crops((folder / record["key"]).read_bytes(), SPEC)
        np.testing.assert_array_equal(record["codes"], codes_of(crops))
    # Codes differ between images and crops, or the comparisons above would mean little.
    assert len({record["codes"][k].tobytes() for record in found for k in range(10)}) > 160
    assert not list((tmp_path / "codes").rglob("*.tmp")) and not (tmp_path / "codes/parts").exists()


class Stop:
    """Stops the work after a number of images, as Ctrl-C would."""

    def __init__(self, after):
        self.left = after

    def advance(self, count):
        self.left -= count
        if self.left <= 0:
            raise KeyboardInterrupt


def test_stopped_anywhere_it_ends_with_the_same_bytes(folder, tokenizer_file, tmp_path):
    make(folder, tokenizer_file, tmp_path / "whole")
    for after in (1, 4, 5, 9):
        job = prepare(folder, tokenizer_file, tmp_path / "codes")
        with pytest.raises(KeyboardInterrupt):
            shards.write_shards(job, list(range(job.num_shards)), Stop(after))
        with pytest.raises(DataError, match="has not ended"):
            read_all(tmp_path / "codes")
    # Killed while it wrote: unfinished files do not count.
    (tmp_path / "codes" / "codes-00002-of-00003.array_record").write_bytes(b"half a shard")
    (tmp_path / "codes" / "codes-00002-of-00003.array_record.tmp").write_bytes(b"half")
    (tmp_path / "codes" / "parts" / "00002.json").write_text('{"rec')
    make(folder, tokenizer_file, tmp_path / "codes")
    assert digests(tmp_path / "codes") == digests(tmp_path / "whole")
    again = make(folder, tokenizer_file, tmp_path / "codes")
    assert again.complete and digests(tmp_path / "codes") == digests(tmp_path / "whole")


def test_many_hosts_make_the_bytes_of_one(folder, tokenizer_file, tmp_path):
    make(folder, tokenizer_file, tmp_path / "whole")
    assert make(folder, tokenizer_file, tmp_path / "codes", 1, 2) is None
    assert make(folder, tokenizer_file, tmp_path / "codes", 0, 2).complete  # the last to end
    assert digests(tmp_path / "codes") == digests(tmp_path / "whole")


def test_bad_and_odd_images_are_listed_by_name(folder, tokenizer_file, tmp_path):
    make(folder, tokenizer_file, tmp_path / "good")
    whole = {record["key"]: record["codes"] for record in read_all(tmp_path / "good")}
    good = (folder / "dogs" / "04.png").read_bytes()
    (folder / "dogs" / "04.png").write_bytes(good[: len(good) // 2])
    (folder / "cats" / "00.png").write_bytes(b"")
    picture(8).convert("CMYK").save(folder / "owls" / "08.jpg")
    (folder / "owls" / "08.png").unlink()
    turned = Image.Exif()
    turned[0x0112] = 6
    buffer = io.BytesIO()
    picture(11).save(buffer, "JPEG", exif=turned)
    (folder / "owls" / "11.png").write_bytes(buffer.getvalue())
    (folder / "cats" / "notes.txt").write_text("not an image")
    made = make(folder, tokenizer_file, tmp_path / "codes")
    assert made.num_failed == 2 and made.num_records == 15
    report = json.loads((tmp_path / "codes" / "report.json").read_text())
    assert [f["key"] for f in report["failed"]] == ["cats/00.png", "dogs/04.png"]
    assert all(f["reason"] and "\n" not in f["reason"] for f in report["failed"])
    notes = {"cmyk": ["owls/08.jpg"], "exif orientation ignored": ["owls/11.png"]}
    assert report["notes"] == notes
    assert report["skipped"] == ["cats/notes.txt"]
    # Bad images do not change the codes of the others.
    found = {record["key"]: record["codes"] for record in read_all(tmp_path / "codes")}
    same = found.keys() & whole.keys() - {"owls/11.png"}
    assert len(same) == 13
    for key in same:
        np.testing.assert_array_equal(found[key], whole[key])


def test_a_batch_without_an_image_is_not_encoded(folder, tokenizer_file, tmp_path, monkeypatch):
    calls, encode = [], encode_lib.batched.encode
    monkeypatch.setattr(encode_lib.batched, "encode", lambda *a: calls.append(1) or encode(*a))
    for file in (folder / "cats").iterdir():  # the first 6 of 17
        file.write_bytes(b"?")
    made = make(folder, tokenizer_file, tmp_path / "codes", images_per_shard=17, batch_size=2)
    assert (made.num_failed, len(calls)) == (6, 6)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"?")
    refused = refusal(prepare, folder, tokenizer_file, tmp_path / "other", error=DataError)
    assert "not an image" in refused and not (tmp_path / "other").exists()


def test_a_lost_file_is_listed_and_a_source_that_vanishes_stops_the_work(
    folder, tokenizer_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(encode_lib, "_LOST", 4)
    job = prepare(folder, tokenizer_file, tmp_path / "one", batch_size=1)
    (folder / "dogs" / "04.png").rename(tmp_path / "04.png")
    final = shards.run(job, 0, 1, reconstructions=0)
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert final.num_failed == 1 and "dogs/04.png" in report["failed"][0]["reason"]
    (tmp_path / "04.png").rename(folder / "dogs" / "04.png")
    job = prepare(folder, tokenizer_file, tmp_path / "codes")
    for file in (folder / "dogs").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"dogs/.*cannot be read"):
        shards.run(job, 0, 1, reconstructions=0)
    assert shards.finish(job) is None


def test_a_full_disk_leaves_no_shard_that_seems_whole(folder, tokenizer_file, tmp_path):
    make(folder, tokenizer_file, tmp_path / "whole")
    job = prepare(folder, tokenizer_file, tmp_path / "codes")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # a shard is larger
        with pytest.raises(OSError):
            shards.run(job, 0, 1, reconstructions=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "codes").glob("*.array_record*"))
    make(folder, tokenizer_file, tmp_path / "codes")
    assert digests(tmp_path / "codes") == digests(tmp_path / "whole")


def test_another_extraction_does_not_continue_in_the_same_folder(folder, tokenizer_file, tmp_path):
    arguments = folder, tokenizer_file, tmp_path / "codes"
    make(*arguments)
    assert "crops.crop_range was 1.25" in refusal(prepare, *arguments, CropSpec(24, 1.1))
    (folder / "cats" / "zz.png").write_bytes((folder / "cats" / "00.png").read_bytes())
    assert "images.number was 17" in refusal(prepare, *arguments, error=ConfigError)
    (tmp_path / "codes" / "manifest.json").unlink()
    assert "manifest.json" in refusal(prepare, *arguments, error=ConfigError)


def test_what_finished_no_shard_may_begin_with_other_settings(folder, tokenizer_file, tmp_path):
    prepare(folder, tokenizer_file, tmp_path / "codes", batch_size=64)  # too large for the device
    made = make(folder, tokenizer_file, tmp_path / "codes", batch_size=2)
    assert made.complete and made.batch_size == 2


def test_a_finished_folder_that_lost_a_shard_is_refused(folder, tokenizer_file, tmp_path):
    arguments = folder, tokenizer_file, tmp_path / "codes"
    make(*arguments)
    (tmp_path / "codes" / "codes-00001-of-00003.array_record").unlink()
    assert "codes-00001-of-00003.array_record" in refusal(make, *arguments, error=DataError)
    assert "codes-00001" in refusal(read_all, tmp_path / "codes", error=DataError)


def test_wrong_input_is_refused_before_anything_is_written(folder, tokenizer_file, tmp_path):
    out, missing = tmp_path / "codes", tmp_path / "nothing.pt"
    assert "--image_size is 25" in refusal(prepare, folder, tokenizer_file, out, CropSpec(25))
    assert "nothing.pt" in refusal(prepare, folder, missing, out, error=ConfigError)
    assert "nothing.pt" in refusal(prepare, missing, tokenizer_file, out, error=DataError)
    assert not out.exists()


def test_reconstructions_show_the_images_above_their_codes(
    folder, tokenizer_file, tmp_path, monkeypatch
):
    job = prepare(folder, tokenizer_file, tmp_path / "codes")
    shards.run(job, 0, 1, reconstructions=4)
    shown = np.asarray(Image.open(tmp_path / "codes" / "reconstructions.png"))
    # They show what is stored: with other codes in the shards the lower row is another.
    found = read_all(tmp_path / "codes")[:6]
    packed = [records.pack_record((x["codes"] + 1) % 64, 0, x["key"]) for x in found]
    records.write_shard(tmp_path / "codes" / job.shard_name(0), packed)
    copied, local = [], pictures.paths.local
    monkeypatch.setattr(pictures.paths, "local", lambda path: copied.append(path) or local(path))
    pictures.draw_reconstructions(job, list(range(3)), 2)
    assert len(copied) == 2  # of three shards no more than are shown
    pictures.draw_reconstructions(job, list(range(3)), 4)
    other = np.asarray(Image.open(tmp_path / "codes" / "reconstructions.png"))
    upper = len(shown) // 2
    assert (other[:upper] == shown[:upper]).all() and (other[upper:] != shown[upper:]).any()


# What training reads -----------------------------------------------------------------------------


def batches(source, loader):
    stream = iter(make_dataset(source, load_crop=loader, batch_size=5, seed=3, num_workers=0))
    return [next(stream) for _ in range(6)]


def test_batches_hold_the_very_crops_of_their_codes(folder, tokenizer_file, codes_of, tmp_path):
    make(folder, tokenizer_file, tmp_path / "codes")
    source = records.CodeRecords(str(tmp_path / "codes"), grid=(6, 6), vocab_size=64, num_classes=3)
    online = OnlineImages(open_images(str(folder)), SPEC, num_classes=3)
    loader = CropLoader(open_images(str(folder)), source.manifest.crops)
    every = batches(source, loader), batches(source, None), batches(online, loader)
    for batch, without_images, without_codes in zip(*every, strict=True):
        assert batch["image"].dtype == np.uint8 and batch["image"].shape == (5, 24, 24, 3)
        np.testing.assert_array_equal(batch["codes"], codes_of(batch["image"]))
        assert batch.keys() == {"codes", "label", "image"}
        for other in (without_images, without_codes):  # all three train on the same crops
            for name in other:
                np.testing.assert_array_equal(other[name], batch[name])
        assert without_images.keys() == {"codes", "label"}
        assert without_codes.keys() == {"label", "image"}


def test_an_image_that_has_gone_is_named(folder, tokenizer_file):
    loader = CropLoader(open_images(str(folder)), SPEC)
    (folder / "cats" / "00.png").write_bytes(b"nothing")
    for key in ("cats/00.png", "cats/77.png", "../secret.png"):
        with pytest.raises(DataError, match=f"image '{key}'"):
            loader(key, 0)
