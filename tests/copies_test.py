"""Does it copy? Planted training images are found among samples, by the program and against every pair."""

import json

import numpy as np
import pytest
from evaluate_test import pictures, program, save_npz
from PIL import Image

from mirai_jax.evaluation import copies, image_streams

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Pixels:
    """A network whose features are the mean colours of quarters of an image."""

    batch = 7

    def __call__(self, images):
        images = images.astype(np.float32)
        halves = [images[:, i : i + 16, j : j + 16] for i in (0, 16) for j in (0, 16)]
        return (np.concatenate([half.mean((1, 2)) for half in halves], axis=1),)


def test_nearest_are_those_of_all_pairs():
    network, training = Pixels(), pictures(40, seed=1)
    sets = [network(pictures(n, seed=s))[0] for n, s in ((9, 2), (5, 3))]
    found = copies.nearest(network, image_streams.of_array("training", training), sets, k=4)
    theirs = network(training)[0]
    for one, mine in zip(found, sets, strict=True):
        distances = np.square(mine[:, None].astype(np.float64) - theirs[None]).sum(-1)
        order = distances.argsort(axis=1)[:, :4]
        np.testing.assert_array_equal(one.indices, order)
        np.testing.assert_allclose(
            one.squared, np.take_along_axis(distances, order, axis=1), rtol=1e-9
        )


def test_a_copy_is_nearer_than_real_images_are():
    network, training = Pixels(), pictures(60, seed=1)
    samples, real = pictures(20, seed=2), pictures(200, seed=3)
    samples[[4, 11]] = training[[30, 5]]
    samples[4, 0, 0] ^= 255
    sets = network(samples)[0], network(real)[0]
    mine, usual = copies.nearest(network, image_streams.of_array("training", training), sets)
    assert mine.indices[4, 0] == 30 and mine.indices[11, 0] == 5
    found = copies.judge(mine, usual)
    assert found["samples"][:2] == [11, 4] and found["share"] <= 0.15
    assert found["identical"] == 0.05 and copies.judge(usual, usual)["share"] == copies.COMMON


@pytest.mark.slow
def test_planted_training_images_are_found_by_the_program(tmp_path):
    training, real, fresh = pictures(30, seed=1), pictures(12, seed=2), pictures(10, seed=3)
    planted = fresh.copy()
    planted[3], planted[8] = training[17], training[2, :, ::-1]
    planted[3, :4, :4] = 0  # not to the last pixel
    folders = []
    for name, images in (("fresh", fresh), ("planted", planted)):
        (tmp_path / name).mkdir()
        save_npz(tmp_path / name / "samples.npz", images)
        folders.append(str(tmp_path / name))
    files = [save_npz(tmp_path / f"{n}.npz", i) for n, i in (("real", real), ("train", training))]
    program(
        f"--samples={','.join(folders)}", f"--reference={files[0]}", f"--training={files[1]}",
        f"--out={tmp_path}", "--batch_size=5",
    )  # fmt: skip
    none, some = (r["copies"] for r in json.loads((tmp_path / "results.json").read_text())["rows"])
    assert none["share"] <= 0.1 and none["identical"] == some["identical"] == 0
    assert sorted(some["samples"]) == [3, 8] and some["share"] == 0.2
    nearest = {3: 17, 8: 2}[some["samples"][0]]
    assert nearest in first_row(tmp_path / "nearest1.png", training)
    with Image.open(tmp_path / "nearest.png") as picture:
        assert picture.width > 4 * 64 and picture.height > 10 * 64


def first_row(path, training):
    """The training images that the first row of the picture shows, at twice their size."""
    with Image.open(path) as picture:
        row = np.asarray(picture)[4 : 4 + 64 : 2, ::2]
    return [
        i
        for i, image in enumerate(training)
        if any((row[:, x : x + 32] == image).all() for x in range(row.shape[1] - 31))
    ]
