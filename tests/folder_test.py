"""The scale `folder`: a run on any folder of pictures, of any shape, grey or colour."""

import functools
import json
import shutil

import helpers
import jax
import numpy as np
import pytest
from helpers import refusal
from PIL import Image

from configs import mirai_e, mirai_i, tokenizer
from mirai_jax.config import compare, schema
from mirai_jax.data import crops, folder_sets, pipeline, records
from mirai_jax.data.images import open_images
from mirai_jax.models import teacher, vit, vq
from mirai_jax.tokenizing import images as tokenizing_images
from mirai_jax.tokenizing import settings as tokenizing_settings
from mirai_jax.tokenizing import train as tokenizing_train
from mirai_jax.training import components, follow, metrics_writer, train
from mirai_jax.training.checkpoint import restore_weights
from mirai_jax.weights import efficientnet, pretrained

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDE = (24, 40)  # pixels: 6 x 10 patches of 4


def draw(folder, name, number, size=WIDE, mode="RGB"):
    """Pictures of one class: stripes on noise, whose slope depends on the name."""
    height, width = size
    rng = np.random.RandomState(len(name))
    (folder / name).mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:height, :width]
    for i in range(number):
        stripes = (x * (1 + len(name)) + y * 2 + 7 * i) % 12 < 5
        pixels = rng.randint(0, 60, (height, width, 3)) + 150 * stripes[..., None] * [1, i % 2, 0]
        picture = Image.fromarray(pixels.astype(np.uint8)).convert(mode)
        picture.save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """30 pictures of 'a', 20 of 'bb', 3 of 'ccc'; 24 x 40 pixels, in colour."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, number in (("a", 30), ("bb", 20), ("ccc", 3)):
        draw(folder, name, number)
    return folder


# Which images ------------------------------------------------------------------------------------


def test_more_images_move_no_other_between_the_splits(tmp_path):
    def splits():
        source = open_images(str(tmp_path))
        share = folder_sets.whole(source)
        return [
            {source.about(i)[1] for i in folder_sets.split(source, share, 0.3, which).indices}
            for which in ("train", "held_out")
        ]

    for name in ("a", "b"):
        draw(tmp_path, name, 40, (2, 2))
    train_before, held_out_before = splits()
    assert not train_before & held_out_before and len(train_before | held_out_before) == 80
    assert 12 <= len(held_out_before) <= 36  # 24 and three deviations
    draw(tmp_path, "a", 70, (2, 2))
    draw(tmp_path, "0", 9, (2, 2))
    train_after, held_out_after = splits()
    assert train_before < train_after and held_out_before < held_out_after
    # A tokenizer's run, which holds out the smallest hashes, has seen no more of them.
    hashes = open_images(str(tmp_path)).hashes()
    order = [open_images(str(tmp_path)).about(i)[1] for i in np.argsort(hashes)]
    assert set(order[: len(held_out_after)]) == held_out_after


def test_small_classes_are_left_out_and_the_others_numbered_again(tmp_path):
    for name, number in (("a", 3), ("b", 1), ("c", 2)):
        draw(tmp_path, name, number, (2, 2))
    share = folder_sets.whole(open_images(str(tmp_path)), 2)
    assert share.class_names == ("a", "c")
    assert (share.indices.tolist(), share.labels.tolist()) == ([0, 1, 2, 4, 5], [0, 0, 0, 1, 1])
    assert "data.min_images" in refusal(folder_sets.whole, open_images(str(tmp_path)), 4)
    assert "data.held_out_share" in refusal(
        folder_sets.split, open_images(str(tmp_path)), share, 0.999, "train"
    )


SMALL = crops.CropSpec((4, 6), ten=False)


def load(folder, spec=SMALL, flip=True, grey=True):
    return folder_sets.load(str(folder), spec, "train", 0.0, 1, flip, grey)


def test_grey_colour_alpha_and_broken_files_in_memory(tmp_path):
    grey, colour = tmp_path / "grey", tmp_path / "colour"
    draw(grey, "a", 3, (4, 6), mode="L")
    assert load(grey).images.shape == (3, 4, 6, 1)
    assert load(grey, grey=False).images.shape == (3, 4, 6, 3)
    draw(colour, "a", 3, (4, 6), mode="L")
    draw(colour, "b", 1, (4, 6))
    Image.new("RGBA", (6, 4), (0, 0, 0, 0)).save(colour / "b" / "1.png")
    Image.new("RGB", (1, 1), (0, 9, 0)).save(colour / "b" / "2.png")  # a tiny one is enlarged
    (colour / "b" / "broken.png").write_bytes(b"?")
    mixed = load(colour)
    assert mixed.images.shape == (6, 4, 6, 3) and mixed.labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(mixed.images[:3, ..., :1], load(grey).images)
    assert (mixed.images[4] == 255).all() and (mixed.images[5] == (0, 9, 0)).all()
    assert len(mixed.unread) == 1 and mixed.unread[0].startswith("b/broken.png: ")


def test_crops_in_memory_are_those_of_the_files(tmp_path):
    draw(tmp_path, "a", 3, (9, 14))
    files = [open_images(str(tmp_path)).example(i)[0] for i in range(3)]
    for ten, numbers in ((True, range(10)), (False, range(2))):
        spec = crops.CropSpec((4, 6), 1.5, ten)
        for flip in (True, False):
            wanted = numbers[: len(numbers) // (1 if flip else 2)]
            cut = [crops.load_crop(raw, k, spec) for raw in files for k in wanted]
            made = load(tmp_path, spec, flip=flip)
            np.testing.assert_array_equal(made.images, [crops.load_crop(f, spec.centre, spec) for f in files])  # fmt: skip
            got = made.images if made.crops is None else made.crops
            np.testing.assert_array_equal(got, cut)


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_photos_are_upright_however_they_are_read(tmp_path, exif):
    """Each picture lies on its side, with the orientation that undoes it."""
    upright = draw(tmp_path / "upright", "a", 3, (9, 14))
    for file in upright.rglob("*.png"):
        lying, tag = Image.open(file).transpose(Image.Transpose.ROTATE_90), Image.Exif()
        tag[274] = 6  # the camera was turned: turn by 270 degrees
        (tmp_path / "lying" / "a").mkdir(parents=True, exist_ok=True)
        lying.save(tmp_path / "lying" / "a" / file.name, exif=tag)

    def everything(folder):
        found = []
        for fields in ({}, {"data__crops": "stored"}, {"data__crops": "random"}):
            config = config_of(
                folder, data__exif=exif, data__min_images=1, tokenizer__image_size=(8, 12), **fields
            )
            settings = schema.read(resolve(config), 1)
            spec = components.crop_spec(settings)
            if settings.data.in_memory:
                found.append(load(folder, spec).images)
            loader = pipeline.CropLoader(open_images(str(folder)), spec)
            found.append(loader("a/0.png", 0))
            found.append(components._some_images(settings).images)
        tokenizers = tokenizing_images.AnyCrops(open_images(str(folder)), (8, 12), 1.0, False, exif)
        return [*found, tokenizers.centre("a/0.png")]

    for one, other in zip(everything(upright), everything(tmp_path / "lying"), strict=True):
        assert (one == other).all() == (exif == "apply")


@pytest.mark.parametrize("height, width", [(24, 40), (7, 90), (80, 9), (240, 401)])
def test_crops_of_another_shape_cover_the_image_without_bending_it(height, width):
    """A ramp keeps its slope, and the crop touches two opposite edges of the image."""
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([y * 255 / (height - 1), x * 255 / (width - 1), 0 * x], -1).astype(np.uint8)
    size = 12, 20
    scale = max(size[0] / height, size[1] / width)
    random = functools.partial(crops.random_crop, size=size)
    for cut in (crops.center_crop, lambda image, _: random(image, 2**31)):
        got = cut(Image.fromarray(ramp), size).astype(float)
        assert got.shape == (*size, 3)
        for axis, side in ((0, height), (1, width)):
            slope = np.diff(got[..., axis], axis=axis)[2:-2, 2:-2].mean()
            np.testing.assert_allclose(slope * scale * (side - 1), 255, rtol=0.1)
        tall = size[0] * width < size[1] * height
        touched = got[..., 1] if tall else got[..., 0]
        assert touched.min() < 25 and touched.max() > 230


# What is drawn -----------------------------------------------------------------------------------


def take(dataset, count):
    iterator = iter(dataset)
    return [next(iterator) for _ in range(count)]


def test_balanced_draws_all_classes_equally_often_and_resumes():
    labels = np.repeat([0, 1, 2], (40, 7, 1))
    source = records.CodedImages(np.arange(48)[:, None], labels)
    make = functools.partial(pipeline.make_dataset, source, batch_size=6, seed=3, balanced=True)
    batches = take(make(), 200)
    seen = np.concatenate([b["codes"][:, 0] for b in batches])
    np.testing.assert_array_equal(labels[seen], np.concatenate([b["label"] for b in batches]))
    np.testing.assert_array_equal(np.bincount(labels[seen]), 400)
    assert len(set(seen)) == 48
    iterator = iter(make())
    iterator.set_state({"next_index": 9})
    np.testing.assert_array_equal(next(iterator)["codes"], batches[9]["codes"])
    half = take(make(rows=(4, 1)), 3)
    np.testing.assert_array_equal(half[2]["codes"], batches[2]["codes"][[4, 1]])


def test_without_flip_no_mirrored_crop_is_drawn():
    codes = np.arange(20 * 10).reshape(200, 1)
    source = records.CodedImages(codes, np.zeros(20), codes.reshape(200, 1, 1, 1).astype(np.uint8))
    either, upright = (
        take(pipeline.make_dataset(source, batch_size=5, seed=1, flip=flip), 40)
        for flip in (True, False)
    )
    for one, other in zip(either, upright, strict=True):
        image, crop = np.divmod(one["codes"], 10)
        np.testing.assert_array_equal(other["codes"], 10 * image + crop % 5)
        np.testing.assert_array_equal(other["image"].ravel(), other["codes"].ravel())
    numbers = np.random.RandomState(0).randint(0, 2**32, 100, np.uint64)
    turned = [crops.upright(int(n), crops.RandomCrops.count) for n in numbers]
    assert [n >> 1 for n in turned] == [int(n) >> 1 for n in numbers] and not any(
        n & 1 for n in turned
    )


# The config --------------------------------------------------------------------------------------


def config_of(folder, module=mirai_e, steps=4, **fields):
    config = module.get_config("folder")
    config.update(num_steps=steps, batch_size=8, log_every=1, checkpoint_every=2, sample_every=2)
    config.update(judged_samples=0)
    config.model.update(num_layers=2, num_heads=2, width=32, vocab_size=16, unroll=1)
    config.data.update(images=str(folder), held_out_share=0.2, min_images=4)
    config.tokenizer.image_size = WIDE
    config.optimizer.warmup_steps = 2
    config.sample.per_class = 2
    for term in config.foresight:
        term.update(projector_width=16, start_epoch=0.0)
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        (config[section] if section else config)[field] = value
    return config


def resolve(config):
    return follow.resolve(config, lambda line: None)


def test_classes_grid_and_place_follow_from_the_folder(pictures, monkeypatch):
    config = config_of(pictures)
    assert "model.num_classes is 0" in refusal(schema.read, config, 1)
    made = resolve(config)
    settings = schema.read(made, 1)
    assert (settings.generator.num_classes, settings.generator.grid) == (2, (6, 10))
    assert settings.sample_classes == 2 and settings.data.name == "folder"
    assert compare.differences(json.loads(compare.to_json(resolve(made))), made) == {}
    square = resolve(config_of(pictures, tokenizer__image_size=(32,), data__min_images=1))
    assert (square["model"]["num_classes"], square["model"]["grid"]) == (3, (8, 8))
    on_disk = ("images", "online")
    read_there = resolve(config_of(pictures, data__crops="random"))["data"]
    assert (read_there["name"], read_there["codes"]) == on_disk
    monkeypatch.setattr(follow, "IN_MEMORY", 1000)
    large = resolve(config)
    assert (large["data"]["name"], large["data"]["codes"]) == on_disk
    assert schema.read(large, 1).generator == settings.generator


def run(config, folder, log=lambda line: None, devices=1):
    train.train(config, folder, devices=jax.devices()[:devices], log=log)
    names = "loss", "cross_entropy", "grad_norm"
    return [[entry[name] for name in names] for entry in metrics_writer.read_metrics(folder)]


def test_files_that_are_ignored_are_named(tmp_path):
    folder, programs = draw(tmp_path / "pictures", "a", 16, (8, 8)), []
    for name in ("1.HEIC", "2.HEIC", "notes.txt"):
        (folder / "a" / name).write_bytes(b"?")
    fields = {"data__min_images": 1, "tokenizer__image_size": (8, 8)}
    for data_crops in ("centre", "random"):
        lines, config = [], config_of(folder, data__crops=data_crops, **fields)
        config.model.vocab_size = 10_000  # refused, when the images are read
        refusal(train.train, config, tmp_path / "run", log=lines.append)
        programs.append(lines)
    config = tokenizer.get_config("folder")
    config.data.update(images=str(folder), held_out=2)
    config.tokenizer.update(image_size=(8, 8), vocab_size=16)
    config.loss.perceptual_weight = 0.0
    built = tokenizing_train._build(
        tokenizing_settings.read(config, 1), tmp_path, jax.devices()[:1]
    )
    for lines in (*programs, built.lines):
        (line,) = (line for line in lines if "are ignored" in line)
        assert line.startswith("3 files") and "notes.txt" in line and line.count("HEIC") == 1
        assert "convert heic" in line


def test_wrong_input_is_one_line(pictures, tmp_path):
    refused = functools.partial(
        refusal, train.train, folder=tmp_path / "run", log=lambda line: None
    )

    def wrong(folder=pictures, **fields):
        return refused(config_of(folder, **fields), devices=jax.devices()[:1])

    assert wrong(data__images="").startswith("data.images is ''")
    assert "model.vocab_size 9000" in wrong(model__vocab_size=9000)  # more codes than patches
    assert wrong(data__min_images=31).startswith("data.min_images is 31")
    assert wrong(tokenizer__image_size=(24, 42)).startswith("tokenizer.image_size is (24, 42)")
    assert wrong(tokenizer__image_size=(8, 8, 8)).startswith("tokenizer.image_size is (8, 8, 8)")
    assert wrong(model__num_classes=4).startswith("model.num_classes is 4; it must be 2")
    (tmp_path / "one" / "empty").mkdir(parents=True)
    assert "'empty' holds no image" in wrong(tmp_path / "one")
    draw(tmp_path / "two", "a", 1)
    alone = {"data__min_images": 1, "data__held_out_share": 0.0}
    assert "batch_size 8 does not fit a data set of 1" in wrong(tmp_path / "two", **alone)
    assert not (tmp_path / "run").exists()


# Runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory, quick_compilation):
    """Mirai-E at 6 x 10 tokens, in colour, from a folder: its workdir, losses and lines."""
    folder, lines = tmp_path_factory.mktemp("wide") / "run", []
    return folder, run(config_of(pictures), folder, lines.append), lines


def test_mirai_e_on_wide_pictures_resumes_bit_for_bit(finished, pictures, tmp_path):
    folder, losses, lines = finished

    def stop(line):
        if line.startswith("step 3/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config_of(pictures), tmp_path, stop)
    assert run(config_of(pictures), tmp_path) == losses and np.isfinite(losses).all()
    one, other = (restore_weights(path / "checkpoints")[0]["ema"] for path in (folder, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert any("with fewer than 4 images: ccc" in line for line in lines)
    assert sum("mirai_jax.tokenize" in line for line in lines) == 1
    config = json.loads((folder / "config.json").read_text())
    assert (config["model"]["num_classes"], config["model"]["grid"]) == (2, [6, 10])
    assert json.loads((folder / "classes.json").read_text()) == ["a", "bb"]
    with Image.open(folder / "samples" / "step_0000004.png") as grid:
        assert grid.height == 2 * (2 * 24 + 4) + 4


@pytest.mark.slow
def test_wide_samples_evaluation_and_assessment(finished, pictures, tmp_path):
    folder, out = finished[0], tmp_path / "samples"
    helpers.output("mirai_jax.sample", f"--workdir={folder}", "--num_images=8", f"--out={out}")
    with np.load(out / "samples.npz") as samples:
        assert samples["arr_0"].shape == (8, *WIDE, 3)
    held_out = f"--reference=data:{folder}:held_out"
    helpers.output("mirai_jax.evaluate", f"--samples={out}", held_out, "--batch_size=4")
    assert "frechet" in (out / "results.json").read_text()
    helpers.output("mirai_jax.evaluate", f"--workdir={folder}", "--num_samples=8", "--pixels=32")
    entry = json.loads((folder / "assessment.jsonl").read_text())
    assert np.isfinite(entry["validation_cross_entropy"]) and entry["step"] == 4


@pytest.mark.slow
def test_a_folder_of_one_class(pictures, tmp_path):
    folder = tmp_path / "one"
    shutil.copytree(next(path for path in sorted(pictures.iterdir())), folder / "only")
    config = config_of(folder, judged_samples=4, data__min_images=1, sample__per_class=2)
    assert np.isfinite(run(config, tmp_path / "run")).all()
    assert json.loads((tmp_path / "run" / "agreement.json").read_text())["samples"] == 1
    helpers.output(
        "mirai_jax.evaluate", f"--workdir={tmp_path / 'run'}", "--num_samples=8", "--pixels=32"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name, where", [("efficientnet_lite0", "folder"), ("dinov2", "images")])
def test_mirai_i_on_wide_pictures(pictures, tmp_path, name, where, monkeypatch):
    """In memory and from disk; the same on four devices."""
    if where == "images":
        monkeypatch.setattr(follow, "IN_MEMORY", 1)
    fields = {"data__crops": "stored", "data__balanced": True, "judged_samples": 10}
    config = config_of(pictures, mirai_i, **fields)
    config.teacher.image_size = 64
    if name == "dinov2":
        config.teacher.update(name=name, image_size=0, path=str(dino(tmp_path)))
    one = run(config, tmp_path / "one")
    assert (tmp_path / "one" / "agreement.json").exists() == (where == "folder")
    four = run(config, tmp_path / "four", devices=4)
    assert np.isfinite(one).all() and one[0] != one[1]
    np.testing.assert_allclose(one, four, rtol=2e-3)


@pytest.mark.slow
def test_efficientnets_features_lie_where_the_pixels_of_a_wide_grid_are():
    module = teacher.EfficientNetTeacher((6, 10), image_size=160, stage=3)
    assert module.sides == (96, 160) and teacher.EfficientNetTeacher((8, 8)).sides == (64, 64)
    params = {"params": {"network": efficientnet.load_efficientnet_lite0()}}
    images = np.full((4, 48, 80, 3), 128, np.uint8)
    for image, (row, column) in zip(images[1:], ((0, 0), (2, 7), (5, 9)), strict=True):
        noise = np.random.RandomState(0).randint(0, 256, (8, 8, 3))
        image[8 * row : 8 * (row + 1), 8 * column : 8 * (column + 1)] = noise
    features = jax.jit(module.apply)(params, images)
    change = np.linalg.norm(features[1:] - features[0], axis=-1)
    assert change.shape == (3, 60)
    assert change.argmax(axis=1).tolist() == [0, 27, 59]


def dino(folder):
    """A DINOv2 of two narrow blocks and random weights, as a converted folder."""
    config = vit.VitConfig(width=64, num_layers=2, num_heads=1, pos_grid=(4, 4))
    init = vit.VisionTransformer(config).init
    shapes = jax.eval_shape(init, jax.random.key(0), np.zeros((1, 56, 56, 3), np.float32))
    rng = np.random.RandomState(0)
    params = jax.tree.map(lambda s: np.float32(rng.normal(0, 0.1, s.shape)), shapes["params"])
    path = folder / "dino"
    pretrained.save(path, pretrained.Weights("teacher", config, params, None, {"file": "dino"}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("where", ["folder", "images", "shards"])
def test_a_trained_tokenizer_at_a_wide_grid(pictures, tmp_path, where):
    """In memory, from disk with codes made online, and as extracted shards."""
    tokenizer = helpers.vq_file(tmp_path, vq.VQConfig((1, 1, 2), 32, 16, vocab_size=24))
    config = config_of(pictures, data__min_images=1, model__vocab_size=24)
    config.tokenizer.update(name="vq", path=str(tokenizer))
    if where == "images":
        config.data.update(name="images", codes="online", crops="random")
    if where == "shards":
        out = tmp_path / "codes"
        helpers.output(
            "mirai_jax.extract", f"--images={pictures}", f"--tokenizer={tokenizer}",
            f"--out={out}", "--image_size=24x40",
        )  # fmt: skip
        assert json.loads((out / "manifest.json").read_text())["grid"] == [6, 10]
        config.data.update(name="images", path=str(out), crops="stored")
    assert np.isfinite(run(config, tmp_path / "run")).all()
    helpers.output(
        "mirai_jax.sample", f"--workdir={tmp_path / 'run'}", "--num_images=2", f"--out={tmp_path / 's'}"
    )  # fmt: skip
    with np.load(tmp_path / "s" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (2, *WIDE, 3)
    if where == "folder":
        helpers.output(
            "mirai_jax.evaluate", f"--workdir={tmp_path / 'run'}", "--future=20", "--held_out=4"
        )  # fmt: skip
        line = json.loads((tmp_path / "run" / "future.jsonl").read_text())
        assert line["ema"]["0"]["tokens"]["r2"]["r0c0"] > 0.5  # the token itself, of the codebook
