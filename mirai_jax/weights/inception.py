"""Weights of `models.inception`: reads the published PyTorch file and maps its names."""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from mirai_jax.models.inception import BATCH_NORM_EPSILON, NUM_CLASSES, InceptionV3
from mirai_jax.utils.errors import ConfigError
from mirai_jax.weights import pretrained, state_dict, torch_names

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
# torch-fidelity publishes the same bytes as weights-inception-2015-12-05-6726825d.pth.
SHA256_START = "6726825d"


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The published weights, as the tree to pass as `{'params': tree}` to `InceptionV3`.

    Raises:
        ConfigError: no such file, or not the one at URL: numbers of other weights are no FID.
    """
    try:
        found = pretrained.sha256_of_file(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"there is no file '{path}' of Inception-v3's weights: {URL}") from error
    if not found.startswith(SHA256_START):
        raise ConfigError(
            f"{path} has SHA-256 {found[:8]}...; the published file's begins {SHA256_START}: {URL}"
        )
    return inception_from_torch(state_dict.read_state(path)[0])


def inception_from_torch(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The state dict of pytorch-fid or torch-fidelity -> parameters of `InceptionV3`.

    Float32 kernels (h, w, in, out), batch normalisation folded in. Counters `num_batches_tracked`
    and the classifier `AuxLogits.` are ignored; the scores' bias takes no part in any metric.

    Raises:
        torch_names.NamesError: names or shapes are not the network's; all of them are listed.
    """
    ignored = re.compile(r"AuxLogits\..*|.*\.num_batches_tracked")
    own = {name: array for name, array in state.items() if not ignored.fullmatch(name)}
    kernels = _kernel_shapes()
    expected = {"fc.weight": kernels.pop(("fc",))[::-1], "fc.bias": (NUM_CLASSES,)}
    for path, kernel in kernels.items():
        expected |= torch_names.folded_shapes(*_names(path), kernel)
    torch_names.check_shapes(own, expected)
    params = {path: torch_names.folded(own, *_names(path), BATCH_NORM_EPSILON) for path in kernels}
    params["fc",] = {"kernel": np.ascontiguousarray(own["fc.weight"].T, np.float32)}
    return traverse_util.unflatten_dict(params)


def _names(path: tuple[str, ...]) -> tuple[str, str]:
    """PyTorch's names of a layer's convolution and batch normalisation."""
    return ".".join((*path, "conv")), ".".join((*path, "bn"))


def _kernel_shapes() -> dict[tuple[str, ...], tuple[int, ...]]:
    """{path of a layer: shape of its kernel} of 94 convolutions and 'fc', without allocating."""
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), np.uint8)
    tree = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]
    flat = traverse_util.flatten_dict(tree)
    return {path[:-1]: leaf.shape for path, leaf in flat.items() if path[-1] == "kernel"}
