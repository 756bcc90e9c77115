"""From photographs to samples with the programs that a user runs, and the ways to feed Mirai-I.

The tokenizer and the encoder have random weights: the published ones are not part of the project.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import skimage
from helpers import uncompiled_params
from PIL import Image

from configs import mirai_i
from mirai_jax.data import images as image_sources
from mirai_jax.data.crops import CropSpec
from mirai_jax.extraction import job as jobs
from mirai_jax.extraction import shards
from mirai_jax.models import vit, vq
from mirai_jax.training import metrics_writer, train
from mirai_jax.utils.errors import ConfigError, DataError
from mirai_jax.weights import torch_names, torch_writer

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = pathlib.Path(__file__).parents[1]
VQ = vq.VQConfig(multipliers=vq.MULTIPLIERS["vq8"], width=32, z_channels=32, vocab_size=64)
DINO = vit.VitConfig(width=128, num_layers=2, num_heads=2, pos_grid=(5, 5))
PHOTOGRAPHS = {
    "animals": ("chelsea.png", "astronaut.png", "camera.png"),
    "things": ("coffee.png", "rocket.jpg", "motorcycle_left.png", "motorcycle_right.png", "coins.png"),
    "textures": ("brick.png", "grass.png", "gravel.png", "logo.png"),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with photographs by class, and two PyTorch files of random weights."""
    folder = tmp_path_factory.mktemp("world")
    for name, files in PHOTOGRAPHS.items():
        (folder / "images" / name).mkdir(parents=True)
        for file in files:
            raw = (pathlib.Path(skimage.__file__).parent / "data" / file).read_bytes()
            (folder / "images" / name / file).write_bytes(raw)
    params = uncompiled_params(vq.VQModel(VQ), np.zeros((1, 8, 8, 3), np.float32))
    state = torch_names.to_torch(VQ, params)
    torch_writer.write(folder / "vq.pt", {"model": state, "steps": 7})
    params = uncompiled_params(
        vit.VisionTransformer(DINO), np.zeros((1, 14, 14, 3), np.float32), seed=1
    )
    state = torch_names.to_torch(DINO, params)
    torch_writer.write(folder / "dino.pth", state)
    return folder


def program(*arguments, cwd):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


FIELDS = """
num_steps=3 batch_size=8 log_every=1 data.path=codes data.images=images data.num_workers=2
tokenizer.name=vq8 tokenizer.path=vq.pt tokenizer.image_size=64 teacher.name=dinov2
teacher.path=dino.pth model.size= model.num_layers=2 model.num_heads=2 model.width=64
model.vocab_size=64 model.num_classes=3 model.grid=(8,8) foresight[0].projector_width=32
sample.classes=3 sample.per_class=2
"""


@pytest.mark.slow
def test_photographs_to_codes_to_mirai_i_to_samples(world):
    printed = program(
        "mirai_jax.extract", "--images=images", "--tokenizer=vq.pt", "--out=codes",
        "--image_size=64", "--images_per_shard=5", "--batch_size=4", cwd=world,
    )  # fmt: skip
    assert "12 images in 3 shards" in printed and "0 images failed; alpha: 1" in printed
    report = json.loads((world / "codes" / "report.json").read_text())
    assert report["notes"] == {"alpha": ["textures/logo.png"]}
    assert (world / "codes" / "reconstructions.png").stat().st_size > 10_000

    config = f"--config={ROOT}/configs/mirai_i.py:imagenet_b"
    fields = [f"--config.{field}" for field in FIELDS.split()]
    printed = program("mirai_jax.main", config, "--workdir=run", *fields, cwd=world)
    assert "4 crops rebuilt, 100.0% of their codes are the stored ones" in printed
    assert "teacher: dinov2, 128 features a position" in printed
    entries = metrics_writer.read_metrics(world / "run")
    cosines = [entry["foresight_bidirectional_r0c0"] for entry in entries]
    assert len(entries) == 3 and all(-1 < c < 0.2 for c in cosines) and cosines[2] != cosines[0]
    with Image.open(world / "run" / "samples" / "step_0000003.png") as grid:
        # Three rows with their names; images of 64x64 out of the decoder.
        assert grid.height == 3 * 68 + 4 and grid.width > 2 * 68 + 40
        pixels = np.asarray(grid)
        assert len(np.unique(pixels[4:68, -68:-4].reshape(-1, 3), axis=0)) > 50
    # The frozen networks are in no checkpoint.
    names = {p.name for p in (world / "run" / "checkpoints").rglob("*")}
    assert not any("bidirectional" in name or "tokenizer" in name for name in names)
    assert not (world / "run" / "tokenizer.npz").exists()

    printed = program("mirai_jax.convert", "run", "run.pt", cwd=world)
    assert "generator (ema at step 3)" in printed


def settings(world, **fields):
    config = mirai_i.get_config("imagenet_b")
    config.update(num_steps=3, batch_size=8, log_every=1, sample_every=0)
    config.model.update(
        size="", num_layers=2, num_heads=2, width=64, vocab_size=64, num_classes=3, grid=(8, 8)
    )
    config.model.dtype = "float32"
    config.tokenizer.update(name="vq8", path=str(world / "vq.pt"), image_size=64)
    config.teacher.update(name="dinov2", path=str(world / "dino.pth"))
    config.data.update(path=str(world / "codes2"), images=str(world / "images"), num_workers=0)
    config.foresight[0].projector_width = 32
    config.sample.update(classes=3, per_class=1)
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        (config[section] if section else config)[field] = value
    return config


def losses(config, folder, devices=1):
    train.train(config, folder, devices=jax.devices()[:devices], log=lambda line: None)
    names = ("loss", "cross_entropy", "foresight_bidirectional_r0c0", "grad_norm")
    return np.array([[e[name] for name in names] for e in metrics_writer.read_metrics(folder)])


@pytest.fixture(scope="module")
def stored(world):
    job = jobs.prepare(
        str(world / "images"), str(world / "vq.pt"), str(world / "codes2"),
        CropSpec(image_size=64), batch_size=4,
    )  # fmt: skip
    shards.run(job, 0, 1, reconstructions=0)
    return losses(settings(world), world / "stored")


@pytest.mark.slow
def test_online_codes_train_as_stored_ones(world, stored):
    online = losses(settings(world, data__codes="online", data__path=""), world / "online", 8)
    # Eight devices against one: sums in another order.
    np.testing.assert_allclose(online, stored, rtol=2e-4)


@pytest.mark.slow
def test_random_crops_are_the_same_on_any_devices_and_after_a_stop(world, stored):
    def run(name, steps, devices=1):
        fields = dict(data__codes="online", data__crops="random", data__path="", num_steps=steps)
        return losses(settings(world, **fields), world / name, devices)

    whole = run("random", 3)
    assert np.abs(whole - stored).max() > 1e-4  # these are other crops
    np.testing.assert_allclose(run("random8", 3, 8), whole, rtol=2e-4)
    run("stopped", 2)
    np.testing.assert_array_equal(run("stopped", 3), whole)


@pytest.mark.slow
def test_a_teacher_of_another_grid_is_resampled(world, stored):
    other = losses(settings(world, teacher__image_size=70), world / "other")
    np.testing.assert_allclose(other[0, 1], stored[0, 1], rtol=1e-6)  # only the targets differ
    assert abs(other[0, 2] - stored[0, 2]) > 1e-6


@pytest.mark.slow
def test_a_run_does_not_resume_with_other_frozen_networks(world, stored):
    """Files may move; what they hold may not change."""
    parts = json.loads((world / "stored" / "parts.json").read_text())
    assert parts.keys() == {"tokenizer", "bidirectional", "data"}
    (world / "elsewhere").mkdir()
    moved = world / "elsewhere" / "dino.pth"
    moved.write_bytes((world / "dino.pth").read_bytes())
    more = {"num_steps": 4, "teacher__path": str(moved)}
    assert len(losses(settings(world, **more), world / "stored")) == 4
    params = uncompiled_params(
        vit.VisionTransformer(DINO), np.zeros((1, 14, 14, 3), np.float32), seed=7
    )
    torch_writer.write(moved, torch_names.to_torch(DINO, params))
    more["num_steps"] = 5
    with pytest.raises(ConfigError, match="bidirectional.*checksum"):
        losses(settings(world, **more), world / "stored")


@pytest.mark.slow
def test_another_tokenizer_or_other_images_are_refused(world, stored):
    raw = (world / "vq.pt").read_bytes()
    params = uncompiled_params(vq.VQModel(VQ), np.zeros((1, 8, 8, 3), np.float32), seed=5)
    state = torch_names.to_torch(VQ, params)
    torch_writer.write(world / "vq2.pt", {"model": state})
    with pytest.raises(ConfigError, match="tokenizer.path"):
        losses(settings(world, tokenizer__path=str(world / "vq2.pt")), world / "refused")
    moved = world / "moved"
    images = image_sources.open_images(str(world / "images"))
    for i, key in enumerate(images.about(i)[1] for i in range(12)):
        (moved / key).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.RandomState(i).randint(0, 256, (90, 90, 3)).astype(np.uint8)
        Image.fromarray(noise).save(moved / key)
    with pytest.raises(DataError, match="data.images.*only"):
        losses(settings(world, data__images=str(moved)), world / "refused")
    with pytest.raises(DataError, match="data.images"):
        losses(settings(world, data__images=str(world)), world / "refused")
    with pytest.raises(ConfigError, match="model.num_classes"):
        losses(settings(world, model__num_classes=4), world / "refused")
    with pytest.raises(ConfigError, match="teacher.layer"):
        losses(settings(world, teacher__layer=3), world / "refused")
    with pytest.raises(ConfigError, match="teacher.path"):
        losses(settings(world, teacher__path=str(world / "vq.pt")), world / "refused")
    assert raw == (world / "vq.pt").read_bytes() and not (world / "refused").exists()
