"""Weights of `models.lpips`: torchvision's VGG16 and LPIPS' own, from their PyTorch files."""

import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from mirai_jax.models.lpips import VGG16
from mirai_jax.weights import state_dict, torch_names

# Of torchvision's network and of those that LPIPS makes of it, whose slices keep its numbers.
_CONVOLUTION = re.compile(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)")
_WEIGHTS = re.compile(r"lin(\d)\.model\.1\.weight")


def load(files: Iterable[str | os.PathLike[str]]) -> dict[str, Any]:
    """The tree to pass as `{'params': tree}` to `Lpips`, float32 NumPy arrays.

    Args:
        files: together they hold all names: torchvision's vgg16-397923af.pth and the vgg.pth of
            LlamaGen or of the package lpips, or the state dict of a whole LPIPS.

    Raises:
        ConfigError: a file is missing, damaged, or not one of those.
    """
    state = {}
    for file in files:
        state |= state_dict.read_state(file)[0]
    found = {}
    for name, array in state.items():
        if match := _CONVOLUTION.fullmatch(name):
            found[f"features.{match[1]}.{match[2]}"] = array
        elif match := _WEIGHTS.fullmatch(name):
            found[match[0]] = array
    expected, params, number, before = {}, {}, 0, 3
    for stage, widths in enumerate(VGG16):
        for i, width in enumerate(widths):
            name = f"features.{number}"
            expected |= {f"{name}.weight": (width, before, 3, 3), f"{name}.bias": (width,)}
            params[f"stage{stage}_{i}"] = name
            number, before = number + 2, width  # a ReLU follows
        expected[f"lin{stage}.model.1.weight"] = (1, before, 1, 1)
        number += 1  # the maximum
    torch_names.check_shapes(found, expected)
    made: dict[str, Any] = {
        path: {
            "kernel": np.ascontiguousarray(
                np.asarray(found[f"{name}.weight"], np.float32).transpose(2, 3, 1, 0)
            ),
            "bias": np.asarray(found[f"{name}.bias"], np.float32),
        }
        for path, name in params.items()
    }
    for stage in range(len(VGG16)):
        made[f"weights{stage}"] = np.asarray(
            found[f"lin{stage}.model.1.weight"], np.float32
        ).ravel()
    return made
