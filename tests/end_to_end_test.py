"""Read this first: from a folder of images to numbers, with the programs that a user runs."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import skimage.data
from PIL import Image

from mirai_jax.models import vq
from mirai_jax.weights import torch_names, torch_writer

ROOT = pathlib.Path(__file__).parents[1]
SMALL = """--config.num_steps=4 --config.batch_size=4 --config.log_every=1 --config.model.size=
    --config.model.num_layers=2 --config.model.num_heads=2 --config.model.width=32 --config.model.unroll=1
    --config.model.vocab_size=64 --config.model.num_classes=2 --config.model.grid=(4,4)
    --config.model.dtype=float32 --config.foresight[0].projector_width=32
    --config.foresight[0].start_epoch=0 --config.tokenizer.name=vq8 --config.tokenizer.image_size=32
    --config.data.num_workers=0 --config.sample.classes=2"""


def program(name: str, arguments: str, folder: pathlib.Path) -> None:
    quick = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    words = [sys.executable, "-m", f"mirai_jax.{name}", *arguments.split()]
    subprocess.run(words, cwd=folder, env={**os.environ, **quick}, check=True)


def test_from_images_to_numbers(tmp_path):
    # Four pieces of a photograph a class, 32 pixels a side.
    for label, photograph in (("cat", skimage.data.chelsea()), ("coffee", skimage.data.coffee())):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(4):
            cut = photograph[20 * i : 20 * i + 160, 30 * i : 30 * i + 160]
            Image.fromarray(cut).resize((32, 32)).save(tmp_path / "images" / label / f"{i}.png")
    # A narrow tokenizer of random weights, as a PyTorch file: LlamaGen's is not part of this project.
    config = vq.VQConfig(vq.MULTIPLIERS["vq8"], width=32, z_channels=32, vocab_size=64)
    shapes = jax.eval_shape(vq.VQModel(config).init, jax.random.key(0), np.zeros((1, 8, 8, 3)))
    rng = np.random.RandomState(0)
    params = jax.tree.map(lambda s: np.float32(rng.normal(0, 0.1, s.shape)), shapes["params"])
    torch_writer.write(tmp_path / "vq.pt", {"model": torch_names.to_torch(config, params)})

    program("extract", "--images=images --tokenizer=vq.pt --out=codes --image_size=32", tmp_path)
    config = f"--config={ROOT}/configs/mirai_e.py:imagenet_b --config.data.path=codes"
    program("main", f"{config} --workdir=run {SMALL}", tmp_path)
    program("sample", "--workdir=run --tokenizer=vq.pt --num_images=4 --out=samples", tmp_path)
    program("evaluate", "--samples=samples --reference=images --batch_size=4", tmp_path)

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    assert all(np.isfinite(s["loss"]) and "foresight_ema_r0c1" in s for s in steps)
    with np.load(tmp_path / "samples" / "samples.npz") as samples:
        assert samples["arr_0"].shape == (4, 32, 32, 3)
    assert "frechet" in (tmp_path / "samples" / "results.json").read_text()
