"""The program that samples: its files byte for byte, whatever the batch, the devices and the stops."""

import dataclasses
import functools
import hashlib
import json
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ROOT,
    TINY_VQ,
    environment,
    exit_message,
    output,
    tiny,
    uncompiled_params,
    vq_file,
)
from PIL import Image

from configs import llamagen
from mirai_jax import sample
from mirai_jax.data import crops, small_sets
from mirai_jax.models import batched, generator, vq
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.models.preprocessing import resize_bicubic
from mirai_jax.models.tokenizer import PatchCodebook
from mirai_jax.sampling import job as job_lib
from mirai_jax.sampling import painter as painter_lib
from mirai_jax.sampling.job import SamplingJob, make_labels
from mirai_jax.sampling.painter import Painter, Source
from mirai_jax.sampling.sampler import SampleOptions
from mirai_jax.training import given_tokens, restore, sources_of_samples, train
from mirai_jax.utils.errors import ConfigError
from mirai_jax.utils.progress import Progress
from mirai_jax.weights import pretrained, torch_reader, torch_writer

pytestmark = pytest.mark.usefixtures("quick_compilation")
GENERATOR = GeneratorConfig(
    num_layers=2, num_heads=2, width=32, vocab_size=24, num_classes=5, grid=(4, 4)
)
GUIDED = SampleOptions(guidance=2.0, top_p=0.95)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of the demo, two steps of it: real digits of 16 tokens, a 2-layer generator."""
    config = tiny(llamagen, 2, sample_every=0, checkpoint_every=1, keep_checkpoints=5)
    config.model.grid, config.tokenizer.patch = (4, 4), 8
    # Large steps, so that two of them and the average over them are different generators.
    config.ema_decay = 0.5
    config.optimizer.update(warmup_steps=0, learning_rate=0.1)
    folder = tmp_path_factory.mktemp("run")
    train.train(config, folder, devices=jax.devices()[:1], log=lambda line: None)
    return folder


def random_params(config):
    """Parameters with which classes and tokens matter."""
    fresh = jax.jit(generator.init_params, static_argnums=0)(config, jax.random.key(0))
    rng = np.random.RandomState(1)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), fresh)


@pytest.fixture(scope="module")
def source():
    """A generator with a patch codebook, both random: an image is 16 patches of 2x2 pixels."""
    codebook = np.random.RandomState(2).uniform(-1, 1, (24, 12)).astype(np.float32)
    module = PatchCodebook(vocab_size=24, image_size=(8, 8), patch=2, channels=3)
    return Source(GENERATOR, random_params(GENERATOR), module, {"codebook": codebook}, {})


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder with a converted generator ('generator') and a VQ's PyTorch file ('vq.pt')."""
    folder = tmp_path_factory.mktemp("converted")
    params = jax.device_get(random_params(GENERATOR))
    made = pretrained.Weights("generator", GENERATOR, params, None, {"entry": "ema"})
    pretrained.save(folder / "generator", made)
    vq_file(folder)
    return folder


def draw(*arguments, **flags):
    """The program, in this process."""
    arguments = ["--batch_size=3", *arguments, *(f"--{k}={v}" for k, v in flags.items())]
    sample._FLAGS.unparse_flags()
    sample.main(sample._FLAGS(["sample", *arguments]))


error = functools.partial(exit_message, draw)


def read(folder):
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"], file["labels"]


def protocol(folder):
    return json.loads((folder / "protocol.json").read_text())


def digest(folder):
    return hashlib.sha256((folder / "samples.npz").read_bytes()).hexdigest()


# What it writes -----------------------------------------------------------------------------------


def test_a_folder_of_samples(workdir, tmp_path):
    out, flags = tmp_path / "out", {"num_images": 19, "labels": "balanced", "top_k": 9}
    draw(workdir=workdir, out=out, guidance=1.5, **flags)
    assert {p.name for p in out.iterdir()} == {"samples.npz", "grid.png", "protocol.json"}
    images, labels = read(out)
    assert images.shape == (19, 32, 32, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.arange(19) % 10)
    assert (images == images[..., :1]).all()  # grey digits, as ADM reads them
    assert len(np.unique(images.reshape(19, -1), axis=0)) > 10
    # ADM's evaluator streams arr_0 by its header.
    with zipfile.ZipFile(out / "samples.npz") as archive, archive.open("arr_0.npy") as file:
        # No date, or no two files of the same samples would be the same.
        assert {part.date_time for part in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((19, 32, 32, 3), False, np.uint8)
    with Image.open(out / "grid.png") as grid:
        assert grid.height == 2 * 68 + 4  # whole rows of eight, twice as large
        assert (np.asarray(grid)[4:68:2, -68:-4:2] == images[7]).all()
    found = protocol(out)
    ema = restore.read_run("", str(workdir))[1]["ema"]
    assert found["weights_sha256"] == pretrained.checksum(ema)
    assert found["workdir"] == workdir.name and (found["step"], found["state"]) == (2, "ema")
    flags |= {"guidance": 1.5, "top_p": 1.0, "seed": 0, "resize": 0, "batch_size": 3}
    assert flags.items() <= found.items()


def test_guidance_scales_have_a_folder_each(workdir):
    draw(workdir=workdir, num_images=9, guidance="1,3.5")
    folders = [workdir / "sampled" / f"step_0000002-guidance_{g}" for g in ("1", "3.5")]
    (one, labels), (other, same) = map(read, folders)
    np.testing.assert_array_equal(labels, same)
    assert (one != other).any()
    assert [protocol(folder)["guidance"] for folder in folders] == [1.0, 3.5]


def test_step_and_state_choose_the_weights(workdir, tmp_path):
    saved = {step: restore.read_run("", str(workdir), step)[1] for step in (1, 2)}
    images = []
    for step, state in ((1, "ema"), (1, "model"), (2, "model")):
        out = tmp_path / f"{step}{state}"
        draw(workdir=workdir, out=out, num_images=6, guidance=1, step=step, state=state)
        tree = saved[step]["ema"] if state == "ema" else saved[step]["params"]["generator"]
        assert protocol(out)["weights_sha256"] == pretrained.checksum(tree)
        assert (protocol(out)["step"], protocol(out)["state"]) == (step, state)
        images.append(read(out)[0])
    assert (images[0] != images[1]).any() and (images[1] != images[2]).any()


@pytest.mark.slow
def test_from_a_converted_checkpoint_also_resized(converted, tmp_path):
    flags = {"checkpoint": converted / "generator", "tokenizer": converted / "vq.pt"}
    flags |= {"num_images": 6, "labels": "3,0"}
    draw(out=tmp_path / "whole", **flags)
    draw(out=tmp_path / "small", resize=5, **flags)
    (whole, labels), (small, _) = read(tmp_path / "whole"), read(tmp_path / "small")
    assert whole.shape == (6, 8, 8, 3) and small.shape == (6, 5, 5, 3)
    assert labels.tolist() == [3, 0, 3, 0, 3, 0]
    means = [x.astype(float).mean(axis=(1, 2)) for x in (whole, small)]
    assert np.abs(means[0] - means[1]).max() < 16  # the same pictures
    assert protocol(tmp_path / "small")["checkpoint"] == "generator"


def test_images_are_resized_before_they_are_clipped():
    """As the official sampling script does; where the decoder leaves [-1, 1] it makes a difference."""
    module, codes = vq.VQModel(TINY_VQ), np.random.RandomState(3).randint(0, 24, (2, 16))
    params = uncompiled_params(module, np.zeros((1, 8, 8, 3), np.float32))
    decode = jax.jit(lambda p: module.apply({"params": p}, codes, method="decode_unclipped"))
    last = params["decoder"]["conv_out"]
    last["kernel"] = last["kernel"] * (2 / np.abs(decode(params)).max())
    raw = decode(params)
    assert 0.01 < np.mean(np.abs(raw) > 1) < 0.6
    expected, clipped_first = (
        np.clip(127.5 * np.asarray(resize_bicubic(x, (5, 5))) + 128, 0, 255).astype(np.uint8)
        for x in (raw, jnp.clip(raw, -1, 1))
    )
    got = np.asarray(jax.jit(painter_lib._pixels, static_argnums=(0, 1))(module, 5, params, codes))
    assert np.abs(got.astype(int) - expected).max() <= 1  # of halves one rounds up, one to even
    assert np.abs(got.astype(int) - clipped_first).max() > 1


# An image redrawn ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures_of_a_digit(tmp_path_factory):
    """A digit, twice as large as the run's and with margins at its sides, and a mask of it: its lower
    left quarter, less a pixel."""
    folder = tmp_path_factory.mktemp("pictures")
    digit = small_sets.load_images("mnist").images[7, ..., 0].repeat(2, 0).repeat(2, 1)
    image, mask = (np.pad(x, ((0, 0), (10, 10))) for x in (digit, np.zeros_like(digit)))
    mask[33:, 11:41] = 255
    for name, pixels in (("image", image), ("mask", mask), ("small", mask[1:])):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"none")
    return folder


@pytest.mark.parametrize("how", ["inpaint", "continue_from"])
def test_an_image_is_redrawn_in_part(workdir, pictures_of_a_digit, tmp_path, capsys, how):
    image, mask = (pictures_of_a_digit / f"{name}.png" for name in ("image", "mask"))
    drawn = np.zeros((4, 4), bool)
    if how == "inpaint":
        flags, drawn[2:, :2] = {"inpaint": image, "mask": mask}, True
    else:
        flags, drawn[1:] = {"continue_from": image, "rows": 1}, True
    draw(workdir=workdir, out=tmp_path, guidance=2, **flags)
    assert f"{16 - drawn.sum()} of 16 tokens are kept" in capsys.readouterr().out
    images, _ = read(tmp_path)
    assert images.shape == (6, 32, 32, 3)
    run = sources_of_samples.of_workdir(str(workdir))
    with Image.open(image) as file:
        middle = crops.center_crop(file.crop((10, 0, 74, 64)).convert("RGB"), 32)[..., 0]
    tokenizer = run.tokenizer, run.tokenizer_params
    codes = batched.encode_images(*tokenizer, middle[None, ..., None])
    same = (images == batched.decode_codes(*tokenizer, codes)).all(axis=-1)
    same = same.reshape(6, 4, 8, 4, 8).all(axis=(2, 4))  # patches of 8x8
    assert same[:, ~drawn].all() and not same[:, drawn].all()
    with Image.open(tmp_path / "grid.png") as grid:  # the image, what is kept of it, six results
        tiles = (
            np.asarray(grid)[4:68:2, -8 * 68 :].reshape(32, 8, 68, 3)[:, :, :64:2].swapaxes(0, 1)
        )
    np.testing.assert_array_equal(tiles[0, ..., 0], middle)
    grey = (tiles[1] == 128).all(axis=-1).reshape(4, 8, 4, 8).all(axis=(1, 3))
    np.testing.assert_array_equal(grey, drawn)
    np.testing.assert_array_equal(tiles[2:], images)


def test_what_is_kept_of_a_wide_image(source, pictures_of_a_digit):
    """84x64 pixels shown at 6x4: a mask's pixels mark the tokens they lie in, to the border."""
    wide = dataclasses.replace(
        source,
        config=dataclasses.replace(GENERATOR, grid=(2, 3)),
        tokenizer=PatchCodebook(vocab_size=24, image_size=(4, 6), patch=2, channels=3),
    )
    image, mask = (str(pictures_of_a_digit / f"{name}.png") for name in ("image", "mask"))
    given = given_tokens.inpaint(wide, image, mask)
    np.testing.assert_array_equal(given.codes_L.reshape(2, 3) < 0, [[0, 0, 0], [1, 1, 0]])
    codes = batched.encode_images(wide.tokenizer, wide.tokenizer_params, given.pictures[:1])[0]
    np.testing.assert_array_equal(given.codes_L, np.where(given.codes_L < 0, -1, codes))
    rows = given_tokens.continue_from(wide, image, 1).codes_L
    np.testing.assert_array_equal(rows, [*codes[:3], -1, -1, -1])


# Labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["random", "balanced", "4,0,2", "3"])
def test_label_i_depends_on_i_alone(how):
    labels = make_labels(how, 1000, 5, seed=3)
    assert labels.dtype == np.int32 and labels.shape == (1000,)
    for count in (1, 7, 999):
        np.testing.assert_array_equal(make_labels(how, count, 5, seed=3), labels[:count])
    other = make_labels(how, 1000, 5, seed=4)
    assert (other != labels).any() == (how == "random")
    if how == "random":
        assert np.bincount(labels, minlength=5).min() > 150  # of 200 expected
    else:
        ids = range(5) if how == "balanced" else [int(text) for text in how.split(",")]
        assert labels[:7].tolist() == (7 * list(ids))[:7]


@pytest.mark.parametrize("how", ["", "5", "-1", "1,,2", "cats", "9" * 30])
def test_wrong_labels(how):
    with pytest.raises(ConfigError, match="--labels"):
        make_labels(how, 3, 5, seed=0)


# The same images ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def painter(source):
    return Painter(source, GUIDED, 0, 10, devices=jax.devices()[:2])


def paint(painter, start, stop):
    labels = make_labels("random", stop, GENERATOR.num_classes, seed=0)
    return next(painter.stream([(labels[start:], np.arange(start, stop))]))


def test_images_of_a_cache_of_int8_depend_on_neither_batch_nor_devices(source):
    options = dataclasses.replace(GUIDED, cache_dtype="int8")
    one, devices = jax.devices()[:1], jax.devices()
    whole = paint(Painter(source, options, 0, 64, devices=one), 0, 64)
    assert (whole != paint(Painter(source, GUIDED, 0, 64, devices=one), 0, 64)).any()
    np.testing.assert_array_equal(
        whole, paint(Painter(source, options, 0, 6, devices=devices), 0, 64)
    )


def test_images_depend_on_neither_batch_nor_devices_nor_how_many(source, painter):
    one, devices = jax.devices()[:1], jax.devices()
    large = Painter(source, GUIDED, 0, 64, devices=one)
    images = paint(large, 0, 200)
    assert images.shape == (200, 8, 8, 3) and len(np.unique(images, axis=0)) > 190
    for other in (painter, Painter(source, GUIDED, 0, 6, devices=devices)):
        np.testing.assert_array_equal(paint(other, 0, 200), images)
    np.testing.assert_array_equal(paint(large, 90, 131), images[90:131])
    other = paint(Painter(source, GUIDED, 1, 64, devices=one), 0, 64)
    assert (other != images[:64]).any(axis=(1, 2, 3)).all()


def test_one_program_draws_at_every_scale(source):
    sizes, scales = (0, 10, 0, jax.devices()[:1]), (1.5, 4.0)
    several = [dataclasses.replace(GUIDED, guidance=scale) for scale in scales]
    one, other = (Painter(source, options, *sizes) for options in several)
    images, compiled = paint(one, 0, 10), one._draw._cache_size()
    assert (images != paint(other, 0, 10)).any()
    assert other._draw._cache_size() == compiled and other._draw is one._draw
    unguided = Painter(source, dataclasses.replace(GUIDED, guidance=1.0), *sizes)
    assert unguided._draw is not one._draw and unguided._decode is one._decode


def test_a_batch_is_begun_before_the_one_before_is_fetched(painter, monkeypatch):
    events = []
    for name in ("begin", "fetch"):
        method = getattr(painter, name)
        noting = lambda *given, name=name, method=method: events.append(name[0]) or method(*given)
        monkeypatch.setattr(painter, name, noting)
    for _ in painter.stream([(np.zeros(n, np.int32), np.arange(n)) for n in (30, 30, 15)]):
        events.append("w")  # written
    # Batches of 20, parts of 30, 30 and 15: nothing is filled up but the last batch.
    assert "".join(events) == "bbf" + "bfw" + "bfw" + "fw"


# Stops, and several hosts -------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(job_lib, "_PART", 20)


def job_in(out, count=50):
    labels = make_labels("random", count, GENERATOR.num_classes, 0)
    return SamplingJob.begin(out, labels, {"num_images": count})


def all_parts(job, painter, stop_before=None):
    class Stopping:
        def stream(self, requests):
            for labels, indices in requests:
                if stop_before is not None and indices[0] >= 20 * stop_before:
                    raise KeyboardInterrupt
                yield from painter.stream([(labels, indices)])

    job.draw(Stopping(), range(job.num_parts), Progress(len(job.labels), "images", stream=None))
    return job.join()


def test_stopped_at_any_part_ends_with_the_same_bytes(painter, tmp_path, small_parts):
    whole = job_in(tmp_path / "whole")
    assert whole.num_parts == 3 and all_parts(whole, painter)
    images = next(painter.stream([(whole.labels, np.arange(50))]))
    np.testing.assert_array_equal(read(whole.out)[0], images)
    for stop in range(3):
        out = tmp_path / f"stopped{stop}"
        with pytest.raises(KeyboardInterrupt):
            all_parts(job_in(out), painter, stop_before=stop)
        assert len(list((out / "parts").iterdir())) == stop and not (out / "samples.npz").exists()
        times = [job_in(out).part(k).stat().st_mtime_ns for k in range(stop)]
        with pytest.raises(KeyboardInterrupt):  # what is there is not drawn again
            all_parts(job_in(out), painter, stop_before=stop)
        assert times == [job_in(out).part(k).stat().st_mtime_ns for k in range(stop)]
        assert all_parts(job_in(out), painter)
        assert digest(out) == digest(whole.out)


@pytest.mark.parametrize("where", ["files.remove_tree", "zipfile.ZipFile", "os.replace"])
def test_stopped_while_joining_leaves_nothing_behind(
    painter, tmp_path, small_parts, monkeypatch, where
):
    job = job_in(tmp_path / "out", 25)
    job.draw(painter, [0, 1], Progress(25, "images", stream=None))
    name, attribute = where.split(".")

    with monkeypatch.context() as patch:
        patch.setattr(getattr(job_lib, name), attribute, mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            job.join()
    # What SIGKILL leaves of a file that was being written.
    (job.out / "parts" / "samples.npz.0123.tmp").write_bytes(b"half")
    assert job_in(job.out, 25).join()
    assert {p.name for p in job.out.iterdir()} == {"samples.npz", "grid.png", "protocol.json"}
    assert len(read(job.out)[0]) == 25


def test_two_hosts_make_the_file_of_one(workdir, tmp_path, small_parts, capsys):
    arguments = [f"--workdir={workdir}", "--num_images=50"]
    draw(*arguments, f"--out={tmp_path / 'one'}")
    shared = [*arguments, f"--out={tmp_path / 'two'}", "--process_count=2"]
    draw(*shared, "--process_index=1")
    draw(*shared, "--process_index=1")
    assert "20 of 20 images were drawn before" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "two" / "parts").iterdir()] == ["00001.npy"]
    draw(*shared, "--process_index=0")
    assert digest(tmp_path / "two") == digest(tmp_path / "one")
    assert not (tmp_path / "two" / "parts").exists()
    before = (tmp_path / "two" / "samples.npz").stat().st_mtime_ns
    draw(*shared, "--process_index=1")
    assert (tmp_path / "two" / "samples.npz").stat().st_mtime_ns == before


def test_two_hosts_may_end_at_once(painter, tmp_path, small_parts, monkeypatch):
    job = job_in(tmp_path / "out")
    job.draw(painter, [0, 1, 2], Progress(50, "images", stream=None))
    write = SamplingJob._write

    def late(job):
        monkeypatch.setattr(SamplingJob, "_write", write)
        assert job.join()  # the other host, while this one begins
        write(job)

    monkeypatch.setattr(SamplingJob, "_write", late)
    assert job.join()
    assert len(read(job.out)[0]) == 50 and not (job.out / "parts").exists()


# Wrong input --------------------------------------------------------------------------------------


def test_a_folder_of_another_protocol_is_refused(workdir, tmp_path):
    arguments = [f"--workdir={workdir}", f"--out={tmp_path}", "--num_images=5"]
    draw(*arguments)
    before = digest(tmp_path)
    for flag in ("seed=1", "step=1", "batch_size=4", "state=model"):
        assert f"{flag.partition('=')[0]} was" in error(*arguments, f"--{flag}")
    assert digest(tmp_path) == before
    found = protocol(tmp_path)
    del found["cache_dtype"]  # as before the option existed
    (tmp_path / "protocol.json").write_text(json.dumps(found))
    draw(*arguments)
    assert "cache_dtype was" in error(*arguments, "--cache_dtype=int8")
    (tmp_path / "protocol.json").unlink()
    assert "samples.npz" in error(*arguments)


def test_wrong_arguments_are_one_line(workdir, converted, pictures_of_a_digit, tmp_path):
    image, small, broken = (pictures_of_a_digit / f"{n}.png" for n in ("image", "small", "broken"))
    run, out = f"--workdir={workdir}", f"--out={tmp_path / 'out'}"
    checkpoint = f"--checkpoint={converted / 'generator'}"
    tokenizer = f"--tokenizer={converted / 'vq.pt'}"
    for arguments, named in (
        ((out,), "--workdir"),
        ((run, checkpoint, tokenizer, out), "--checkpoint"),
        ((run, out, "--step=7"), "step 7"),
        ((run, out, "--grid=4"), "--grid"),
        ((run, out, "--guidance=2,0.5"), "--guidance=0.5"),
        ((checkpoint, tokenizer), "--out"),
        ((run, out, f"--inpaint={image}"), "--mask"),
        ((run, out, f"--mask={image}"), "--inpaint"),
        ((run, out, f"--inpaint={image}", f"--mask={small}"), "64"),
        ((run, out, f"--inpaint={broken}", f"--mask={small}"), "--inpaint"),
        ((run, out, f"--continue_from={image}", "--rows=4"), "--rows"),
        ((run, out, f"--continue_from={image}"), "--rows"),
        ((checkpoint, tokenizer, out, "--step=1"), "--step"),
        ((f"--checkpoint={converted / 'vq.pt'}", tokenizer, out), "--checkpoint"),
    ):
        assert named in error(*arguments), arguments
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_vocabulary_is_refused(converted, tmp_path):
    state, other = torch_reader.read(converted / "vq.pt")["model"], str(tmp_path / "other.pt")
    state["quantize.embedding.weight"] = np.zeros((25, 8), np.float32)
    torch_writer.write(other, state)
    with pytest.raises(ConfigError, match="--tokenizer"):
        sources_of_samples.of_checkpoint(str(converted / "generator"), other)


def test_a_run_without_a_checkpoint_or_a_null_class_or_its_tokenizer(workdir, tmp_path):
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    assert "checkpoint" in error(f"--workdir={tmp_path}")
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    assert "tokenizer.npz" in error(f"--workdir={tmp_path}")
    (tmp_path / "tokenizer.npz").symlink_to(workdir / "tokenizer.npz")
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["class_dropout"], config["sample"]["guidance"] = 0.0, 1.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "--guidance" in error(f"--workdir={tmp_path}", "--guidance=1,2")


# As people start it -------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_started_again_writes_the_same_file(workdir, tmp_path):
    flags = [f"--workdir={workdir}", "--num_images=6000", "--batch_size=16"]
    output("mirai_jax.sample", *flags, f"--out={tmp_path / 'whole'}")
    killed, flags = tmp_path / "killed", [*flags, f"--out={tmp_path / 'killed'}"]
    command = [sys.executable, "-m", "mirai_jax.sample", *flags]
    for kept in (1, 4):
        process = subprocess.Popen(command, cwd=ROOT, env=environment())
        while len(list(killed.glob("parts/*.npy"))) < kept:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
    assert (killed / "parts").is_dir() and not (killed / "samples.npz").exists()
    assert "images were drawn before" in output("mirai_jax.sample", *flags)
    assert digest(killed) == digest(tmp_path / "whole")


def test_a_row_of_the_grid_is_a_class_where_images_suffice():
    def rows(labels, names=None, columns=2):
        job = SimpleNamespace(labels=np.array(labels))
        job._row = functools.partial(job_lib.SamplingJob._row, job)
        return [
            (n, list(k)) for n, k in job_lib.SamplingJob._rows(job, len(labels), columns, names)
        ]

    both = ["crane", "owl", "crane"]  # two classes of one name
    assert rows([2, 0, 2, 0, 2], both) == [("crane", [1, 3]), ("crane", [0, 2])]
    assert rows([2, 0, 2, 0]) == [("class 0", [1, 3]), ("class 2", [0, 2])]
    assert rows([0, 1, 2, 0], both) == [("image 0: crane, owl", [0, 1]), ("image 2: crane", [2, 3])]
    assert rows([1, 1, 1, 1], both) == [("image 0: owl", [0, 1]), ("image 2: owl", [2, 3])]
    many = rows(np.repeat(np.arange(1000), 2))
    assert len(many) == 8 and many[-1] == ("class 875", [1750, 1751])
