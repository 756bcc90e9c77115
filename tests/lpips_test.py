"""LPIPS against a plain computation, from files with the published names."""

import itertools

import jax
import numpy as np
import pytest
from helpers import refusal

from mirai_jax.models import lpips as network_lib
from mirai_jax.weights import lpips, torch_writer

pytestmark = pytest.mark.usefixtures("quick_compilation")
NARROW = tuple(tuple(width // 16 for width in widths) for widths in network_lib.VGG16)
NUMBERS = [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]  # torchvision's `features`


def random_state():
    """VGG16's convolutions, its classifier, which nothing reads, and the weights of LPIPS."""
    rng, before = np.random.RandomState(0), 3
    network, weights = {"classifier.0.bias": np.zeros(4, np.float32)}, {}
    for stage, widths in enumerate(NARROW):
        for number, width in zip(NUMBERS[stage], widths, strict=True):
            kernel = rng.normal(size=(width, before, 3, 3)) * (2 / (9 * before)) ** 0.5
            network[f"features.{number}.weight"] = kernel.astype("f4")
            network[f"features.{number}.bias"] = rng.normal(size=width).astype("f4")
            before = width
        weights[f"lin{stage}.model.1.weight"] = rng.uniform(size=(1, before, 1, 1)).astype("f4")
    return network, weights


def plain(state, images, others):
    """As the paper has it, a sum over nine shifted products a convolution; (C, H, W), in float64."""

    def stages(x):
        x = x - np.array([-0.030, -0.088, -0.188])[:, None, None]
        x = x / np.array([0.458, 0.448, 0.450])[:, None, None]
        for stage, numbers in enumerate(NUMBERS):
            if stage:
                x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).max((2, 4))
            for number in numbers:
                kernel, bias = (state[f"features.{number}.{n}"] for n in ("weight", "bias"))
                height, width = x.shape[1:]
                padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
                x = bias[:, None, None] + sum(
                    np.tensordot(kernel[:, :, i, j], padded[:, i : i + height, j : j + width], 1)
                    for i, j in itertools.product(range(3), repeat=2)
                )
                x = np.maximum(x, 0)
            yield x / (np.sqrt((x**2).sum(0)) + 1e-10)

    weights = (state[f"lin{stage}.model.1.weight"][0] for stage in range(5))
    pairs = zip(stages(images), stages(others), weights, strict=True)
    return sum(((one - other) ** 2 * weight).sum(0).mean() for one, other, weight in pairs)


def test_the_distance_is_that_of_a_plain_computation(tmp_path, monkeypatch):
    for module in (network_lib, lpips):
        monkeypatch.setattr(module, "VGG16", NARROW)
    network, weights = random_state()
    files = tmp_path / "vgg16.pth", tmp_path / "vgg.pth"
    for file, state in zip(files, (network, weights), strict=True):
        torch_writer.write(file, state)
    params = lpips.load(map(str, files))
    images, others = np.random.RandomState(1).uniform(-1, 1, (2, 2, 16, 32, 3))
    distance = jax.jit(lambda *pair: network_lib.Lpips().apply({"params": params}, *pair))
    expected = [
        plain(network | weights, x.transpose(2, 0, 1), y.transpose(2, 0, 1))
        for x, y in zip(images, others, strict=True)
    ]
    np.testing.assert_allclose(distance(images, others), expected, rtol=1e-5)
    assert (distance(images, images) == 0).all()
    # A state dict of the whole has the network in slices.
    whole = {}
    for name, array in network.items():
        if name.startswith("features."):
            stage = next(i for i, n in enumerate(NUMBERS) if int(name.split(".")[1]) in n)
            whole[name.replace("features", f"net.slice{stage + 1}")] = array
    torch_writer.write(tmp_path / "whole.pth", {**whole, **weights})
    jax.tree.map(np.testing.assert_array_equal, lpips.load([tmp_path / "whole.pth"]), params)
    assert "missing lin0.model.1.weight (1, 4, 1, 1)" in refusal(lpips.load, files[:1])
