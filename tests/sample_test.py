"""The program that samples: its files byte for byte, whatever the batch, the devices and the stops."""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import llamagen
from mirai_jax import sample
from mirai_jax.models import generator, vq
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.models.tokenizer import PatchCodebook
from mirai_jax.models.vit import resize_bicubic
from mirai_jax.sampling import job as job_lib
from mirai_jax.sampling import painter as painter_lib
from mirai_jax.sampling.job import SamplingJob, make_labels
from mirai_jax.sampling.painter import Painter, Source
from mirai_jax.sampling.sampler import SampleOptions
from mirai_jax.training import restore, sources_of_samples, train
from mirai_jax.utils.errors import ConfigError
from mirai_jax.utils.progress import Progress
from mirai_jax.weights import pretrained, torch_names, torch_writer

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = pathlib.Path(__file__).parents[1]
GENERATOR = GeneratorConfig(
    num_layers=2, num_heads=2, width=32, vocab_size=24, num_classes=5, grid=(4, 4)
)
VQ = vq.VQConfig(multipliers=(1, 2), width=32, z_channels=16, vocab_size=24)
GUIDED = SampleOptions(guidance=2.0, top_p=0.95)


def settings():
    """The demo, two steps of it: real digits of 16 tokens, a 2-layer generator."""
    config = llamagen.get_config("demo")
    config.update(
        num_steps=2, batch_size=16, log_every=1, sample_every=0, checkpoint_every=1,
        keep_checkpoints=5, judged_samples=0, ema_decay=0.5,
    )  # fmt: skip
    config.model.update(num_layers=2, num_heads=2, width=32, vocab_size=16, unroll=1, grid=(4, 4))
    config.tokenizer.patch = 8
    # Large steps, so that two of them and the average over them are different generators.
    config.optimizer.update(warmup_steps=0, learning_rate=0.1)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train.train(settings(), folder, devices=jax.devices()[:1], log=lambda line: None)
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
    init = jax.jit(vq.VQModel(VQ).init)
    params = init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    torch_writer.write(folder / "vq.pt", {"model": torch_names.to_torch(VQ, params)})
    return folder


def draw(*arguments):
    """The program, in this process."""
    sample._FLAGS.unparse_flags()
    sample.main(sample._FLAGS(["sample", "--batch_size=3", *map(str, arguments)]))


def error(*arguments):
    with pytest.raises(SystemExit) as caught:
        draw(*arguments)
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def read(folder):
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"], file["labels"]


def protocol(folder):
    return json.loads((folder / "protocol.json").read_text())


def digest(folder):
    return hashlib.sha256((folder / "samples.npz").read_bytes()).hexdigest()


# What it writes -----------------------------------------------------------------------------------


def test_a_folder_of_samples(workdir, tmp_path, capsys):
    out = tmp_path / "out"
    draw(
        f"--workdir={workdir}", f"--out={out}", "--num_images=19", "--labels=balanced",
        "--guidance=1.5", "--top_k=9",
    )  # fmt: skip
    assert "written:" in capsys.readouterr().out
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
        header = np.lib.format.read_array_header_1_0(file)
        assert header == ((19, 32, 32, 3), False, np.uint8)
    with Image.open(out / "grid.png") as grid:
        assert grid.height == 2 * 68 + 4  # whole rows of eight, twice as large
        assert (np.asarray(grid)[4:68:2, -68:-4:2] == images[7]).all()
    found = protocol(out)
    ema = restore.read_run("", str(workdir))[1]["ema"]
    assert found["weights_sha256"] == pretrained.checksum(ema)
    assert found["workdir"] == workdir.name and (found["step"], found["state"]) == (2, "ema")
    expected = {"num_images": 19, "labels": "balanced", "seed": 0, "guidance": 1.5, "top_k": 9,
                "top_p": 1.0, "temperature": 1.0, "interval": -1, "resize": 0, "batch_size": 3}  # fmt: skip
    assert expected.items() <= found.items()


def test_guidance_scales_have_a_folder_each(workdir):
    draw(f"--workdir={workdir}", "--num_images=9", "--guidance=1,3.5")
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
        draw(
            f"--workdir={workdir}", f"--out={out}", "--num_images=6", "--guidance=1",
            f"--step={step}", f"--state={state}",
        )  # fmt: skip
        tree = saved[step]["ema"] if state == "ema" else saved[step]["params"]["generator"]
        assert protocol(out)["weights_sha256"] == pretrained.checksum(tree)
        assert (protocol(out)["step"], protocol(out)["state"]) == (step, state)
        images.append(read(out)[0])
    assert (images[0] != images[1]).any() and (images[1] != images[2]).any()


def test_from_a_converted_checkpoint_also_resized(converted, tmp_path):
    arguments = [
        f"--checkpoint={converted / 'generator'}", f"--tokenizer={converted / 'vq.pt'}",
        "--num_images=6", "--labels=3,0",
    ]  # fmt: skip
    draw(*arguments, f"--out={tmp_path / 'whole'}")
    draw(*arguments, f"--out={tmp_path / 'small'}", "--resize=5")
    (whole, labels), (small, _) = read(tmp_path / "whole"), read(tmp_path / "small")
    assert whole.shape == (6, 8, 8, 3) and small.shape == (6, 5, 5, 3)
    assert labels.tolist() == [3, 0, 3, 0, 3, 0]
    means = [x.astype(float).mean(axis=(1, 2)) for x in (whole, small)]
    assert np.abs(means[0] - means[1]).max() < 16  # the same pictures
    found = protocol(tmp_path / "small")
    assert found["checkpoint"] == "generator" and found["resize"] == 5


def test_images_are_resized_before_they_are_clipped():
    """As the official sampling script does; where the decoder leaves [-1, 1] it makes a difference."""
    module, codes = vq.VQModel(VQ), np.random.RandomState(3).randint(0, 24, (2, 16))
    params = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    decode = jax.jit(
        lambda params: module.apply({"params": params}, codes, method="decode_unclipped")
    )
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
        assert labels[:7].tolist() == [*ids, *ids, *ids, *ids, *ids, *ids, *ids][:7]


@pytest.mark.parametrize("how", ["", "5", "-1", "1,,2", "cats", "9" * 30])
def test_wrong_labels(how):
    with pytest.raises(ConfigError, match="--labels"):
        make_labels(how, 3, 5, seed=0)


# The same images ----------------------------------------------------------------------------------


def paint(source, count, batch_size, devices, seed=0, start=0):
    indices = np.arange(start, count)
    labels = make_labels("random", count, source.config.num_classes, seed=0)[start:]
    painter = Painter(source, GUIDED, seed, batch_size, devices=jax.devices()[:devices])
    return next(painter.stream([(labels, indices)]))


def test_images_depend_on_neither_batch_nor_devices_nor_how_many(source):
    images = paint(source, 200, 64, 1)
    assert images.shape == (200, 8, 8, 3) and len(np.unique(images, axis=0)) > 190
    np.testing.assert_array_equal(paint(source, 200, 7, 1), images)
    np.testing.assert_array_equal(paint(source, 200, 6, 8), images)
    np.testing.assert_array_equal(paint(source, 131, 64, 1, start=90), images[90:131])
    other = paint(source, 64, 64, 1, seed=1)
    assert (other != images[:64]).any(axis=(1, 2, 3)).all()


def test_a_batch_is_begun_before_the_one_before_is_fetched_also_across_parts(source):
    events = []

    class Noting(Painter):
        def begin(self, labels, indices):
            events.append("begin")
            return super().begin(labels, indices)

        def fetch(self, begun):
            events.append("fetch")
            return super().fetch(begun)

    painter = Noting(source, GUIDED, 0, 7, devices=jax.devices()[:2])
    asked = [(np.zeros(count, np.int32), np.arange(count)) for count in (20, 20, 10)]
    for _ in painter.stream(asked):
        events.append("written")
    # Batches of 14, parts of 20, 20 and 10: nothing is filled up but the last batch.
    assert "".join(event[0] for event in events) == "bbf" + "bfw" + "bfw" + "fw"


# Stops, and several hosts -------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(job_lib, "_PART", 20)


@pytest.fixture(scope="module")
def painter(source):
    return Painter(source, GUIDED, 0, 10, devices=jax.devices()[:2])


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


@pytest.mark.parametrize("where", ["shutil.rmtree", "zipfile.ZipFile", "os.replace"])
def test_stopped_while_joining_leaves_nothing_behind(
    painter, tmp_path, small_parts, monkeypatch, where
):
    job = job_in(tmp_path / "out", 25)
    job.draw(painter, [0, 1], Progress(25, "images", stream=None))
    name, attribute = where.split(".")

    def stop(*arguments, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(getattr(job_lib, name), attribute, stop)
        with pytest.raises(KeyboardInterrupt):
            job.join()
    # What SIGKILL leaves of a file that was being written.
    (job.out / "parts" / "samples.npz.0123.tmp").write_bytes(b"half")
    assert job_in(job.out, 25).join()
    names = {p.name for p in job.out.iterdir()}
    assert names == {"samples.npz", "grid.png", "protocol.json"}
    assert len(read(job.out)[0]) == 25


def test_two_hosts_make_the_file_of_one(workdir, tmp_path, small_parts, capsys):
    arguments = [f"--workdir={workdir}", "--num_images=50"]
    draw(*arguments, f"--out={tmp_path / 'one'}")
    shared = [*arguments, f"--out={tmp_path / 'two'}", "--process_count=2"]
    draw(*shared, "--process_index=1")
    assert "others are not" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "two" / "parts").iterdir()] == ["00001.npy"]
    draw(*shared, "--process_index=0")
    assert digest(tmp_path / "two") == digest(tmp_path / "one")
    assert not (tmp_path / "two" / "parts").exists()
    before = (tmp_path / "two" / "samples.npz").stat().st_mtime_ns
    draw(*shared, "--process_index=1")
    assert "is there already" in capsys.readouterr().out
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
    for flag, changed in (
        ("--seed=1", "seed"),
        ("--step=1", "step"),
        ("--batch_size=4", "batch_size"),
        ("--state=model", "weights_sha256"),
    ):
        assert f"{changed} was" in error(*arguments, flag)
    assert digest(tmp_path) == before
    (tmp_path / "protocol.json").unlink()
    assert "samples.npz" in error(*arguments)


def test_wrong_arguments_are_one_line(workdir, converted, tmp_path):
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
        ((checkpoint, tokenizer, out, "--step=1"), "--step"),
        ((f"--checkpoint={converted / 'vq.pt'}", tokenizer, out), "--checkpoint"),
    ):
        assert named in error(*arguments), arguments
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_vocabulary_is_refused(converted, tmp_path):
    config = vq.VQConfig(multipliers=(1, 2), width=32, z_channels=16, vocab_size=25)
    image = np.zeros((1, 8, 8, 3), np.float32)
    params = jax.eval_shape(vq.VQModel(config).init, jax.random.key(0), image)["params"]
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), params)
    torch_writer.write(tmp_path / "other.pt", torch_names.to_torch(config, zeros))
    paths = str(converted / "generator"), str(tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="--tokenizer .* 25 codes"):
        sources_of_samples.of_checkpoint(*paths)


def test_a_run_without_a_checkpoint_or_a_null_class_or_its_tokenizer(workdir, tmp_path):
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    assert "without a checkpoint" in error(f"--workdir={tmp_path}")
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    assert "tokenizer.npz" in error(f"--workdir={tmp_path}")
    (tmp_path / "tokenizer.npz").symlink_to(workdir / "tokenizer.npz")
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["class_dropout"], config["sample"]["guidance"] = 0.0, 1.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "--guidance" in error(f"--workdir={tmp_path}", "--guidance=1,2")


# As people start it -------------------------------------------------------------------------------


def command(*arguments):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    program = [sys.executable, "-m", "mirai_jax.sample", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(program, cwd=ROOT, env=env, **pipes)


@pytest.mark.slow
def test_killed_and_started_again_writes_the_same_file(workdir, tmp_path):
    arguments = [f"--workdir={workdir}", "--num_images=6000", "--batch_size=16"]
    whole = command(*arguments, f"--out={tmp_path / 'whole'}")
    assert whole.wait(timeout=300) == 0
    parts = tmp_path / "killed" / "parts"
    for kept in (1, 4):
        process = command(*arguments, f"--out={tmp_path / 'killed'}")
        while len(list(parts.glob("*.npy"))) < kept:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert parts.is_dir() and not (tmp_path / "killed" / "samples.npz").exists()
    process = command(*arguments, f"--out={tmp_path / 'killed'}")
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "of 6,000 images were drawn before" in printed
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
