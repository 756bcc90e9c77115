"""Reads and writes .safetensors files through the `safetensors` package, bfloat16 included."""

import os
from collections.abc import Mapping

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from mirai_jax.utils.errors import DataError
from mirai_jax.utils.files import atomic_path


class SafetensorsError(DataError):
    """Not a readable or writable safetensors file; the message is one line and names the file."""


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads {name: array}, where BF16 is `ml_dtypes.bfloat16`, and the metadata ({} for none).

    Raises:
        SafetensorsError: the file is damaged, something else, or holds numbers not of NumPy (float8).
        OSError: the file cannot be opened.
    """
    try:
        with safetensors.safe_open(path, "np") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (safetensors.SafetensorError, AttributeError) as error:  # Attribute: numpy.float8_...
        raise _named(path, error) from error


def write(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays of any memory layout and byte order, and texts beside them, atomically.

    Raises:
        SafetensorsError: a dtype that the format does not have, or the file cannot be written.
        OSError: the folder does not exist or cannot be written.
    """
    # The package writes the memory of an array as it lies: a transposed array would come back wrong.
    arrays = {name: np.require(array, requirements="C") for name, array in arrays.items()}
    try:
        with atomic_path(path) as unfinished:
            with open(unfinished, "wb") as file:
                mode = os.fstat(file.fileno()).st_mode
            safetensors_numpy.save_file(arrays, unfinished, metadata)
            os.chmod(unfinished, mode & 0o777)  # the package lets nobody else read its files
    except safetensors.SafetensorError as error:
        raise _named(path, error) from error


def _named(path: str | os.PathLike[str], error: Exception) -> SafetensorsError:
    return SafetensorsError(f"{path}: {' '.join(str(error).split())[:300]}")
