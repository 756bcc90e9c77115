"""Images to evaluate, in bounded memory: .npz files as ADM's evaluator reads them, folders of image
files, and the real images of a run.
"""

import dataclasses
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from mirai_jax.data import crops, folders
from mirai_jax.training import restore
from mirai_jax.training.components import labelled_images
from mirai_jax.utils import paths
from mirai_jax.utils.errors import DataError, first_line

# Of Inception's features: mean and covariance, pooled and spatial (for sFID).
_SHAPES = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}


@dataclasses.dataclass(frozen=True)
class ImageStream:
    """A set of images of one size.

    `chunks` maps n to an iterator of uint8 (at most n, H, W, 3), in order; it starts anew at each call.
    """

    name: str
    count: int
    size: tuple[int, int]  # height and width in pixels
    chunks: Callable[[int], Iterator[np.ndarray]]
    failed: dict[str, str] = dataclasses.field(default_factory=dict)  # images left out, and why
    labels: np.ndarray | None = None  # int (N,), where they are known
    classes: tuple[str, ...] = ()  # their names, by label, where they have names


def of_array(name: str, pixels_NxHxWxC: np.ndarray) -> ImageStream:
    """Images in memory: uint8, 1 or 3 channels. Raises DataError for another shape or type."""
    _check(name, pixels_NxHxWxC.shape, pixels_NxHxWxC.dtype)

    def chunks(count: int) -> Iterator[np.ndarray]:
        for start in range(0, len(pixels_NxHxWxC), count):
            yield _in_colour(pixels_NxHxWxC[start : start + count])

    return ImageStream(name, len(pixels_NxHxWxC), pixels_NxHxWxC.shape[1:3], chunks)


def open_stream(spec: str) -> ImageStream:
    """Opens a set of images.

    Args:
        spec: a .npz with `arr_0`; a folder of image files (those of `data.folders.SUFFIXES`, at any
            depth); a folder with a samples.npz, as `mirai_jax.sample` writes it; or
            data:WORKDIR:train, data:WORKDIR:held_out, the real images of a run on a small set.

    Raises:
        DataError: one line: nothing of the kind, floats, another shape, mixed sizes, damage.
        ConfigError: WORKDIR is not the workdir of a run.
    """
    if spec.startswith("data:"):
        return _of_run(spec)
    path = paths.at(spec)
    if paths.is_dir(path):
        if (path / "samples.npz").is_file():
            return _of_npz(os.path.join(spec, "samples.npz"))
        if (path / "protocol.json").is_file():
            raise DataError(f"{spec} holds samples that are not finished: draw the rest first")
        return _of_folder(spec)
    if not path.is_file():
        raise DataError(f"{spec} is neither a file nor a folder")
    return _of_npz(spec)


def statistics(path: str) -> dict[str, np.ndarray]:
    """Inception's statistics of a .npz, float64: 'mu', 'sigma', perhaps 'mu_s' and 'sigma_s'; or {}.

    Raises:
        DataError: damage, half of a pair, other shapes, numbers that are not finite.
    """
    if not paths.at(path).is_file():
        return {}
    local = paths.local(path)
    try:
        with np.load(local, allow_pickle=False) as file:
            stored = {n: np.asarray(file[n], np.float64) for n in _SHAPES if n in file.files}
    except Exception as error:  # zipfile and NumPy raise half a dozen kinds on damaged files
        raise DataError(f"{path} is not a whole .npz file ({first_line(error)})") from error
    spatial = stored.keys() & {"mu_s", "sigma_s"}
    for name, shape in _SHAPES.items() if stored else ():
        if name.endswith("_s") and not spatial:
            continue
        if name not in stored or stored[name].shape != shape or not np.isfinite(stored[name]).all():
            raise DataError(f"{path} must hold a {name} of finite numbers, of shape {shape}")
    return stored


def has_images(path: str) -> bool:
    """False for a .npz without images, such as one of statistics; True for anything else."""
    if not paths.at(path).is_file():
        return True
    try:
        with zipfile.ZipFile(paths.local(path)) as archive:
            return "arr_0.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return True  # opening it will raise


def _check(name: str, shape: tuple[int, ...], dtype: Any) -> None:
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape:
        raise DataError(f"{name} holds {dtype} {shape}; images must be uint8 (N, height, width, 3)")


def _in_colour(pixels: np.ndarray) -> np.ndarray:
    return pixels.repeat(3, axis=-1) if pixels.shape[-1] == 1 else pixels


def _of_npz(path: str) -> ImageStream:
    local = paths.local(path)

    def opened() -> tuple[Any, Any, tuple[int, ...], bool, np.dtype]:
        archive = zipfile.ZipFile(local)
        file = archive.open("arr_0.npy")
        form = np.lib.format
        first = form.read_magic(file) == (1, 0)
        read = form.read_array_header_1_0 if first else form.read_array_header_2_0
        return archive, file, *read(file)

    try:
        archive, file, shape, fortran, dtype = opened()
        file.close()
        archive.close()
    except Exception as error:  # zipfile and NumPy raise half a dozen kinds on damaged files
        raise DataError(f"{path} is not a whole .npz file ({first_line(error)})") from error
    _check(path, shape, dtype)
    if fortran:
        raise DataError(f"{path} holds images in Fortran order; they must be in C order")

    def chunks(count: int) -> Iterator[np.ndarray]:
        archive, file, *_ = opened()
        size = int(np.prod(shape[1:]))
        with archive, file:
            for start in range(0, shape[0], count):
                some = min(count, shape[0] - start)
                try:
                    raw = np.frombuffer(file.read(some * size), np.uint8)
                    pixels = raw.reshape(some, *shape[1:])
                except Exception as error:
                    raise DataError(f"{path} is damaged ({first_line(error)})") from error
                yield _in_colour(pixels)

    labels, classes = _labels_beside(path, local, shape[0])
    return ImageStream(path, shape[0], shape[1:3], chunks, labels=labels, classes=classes)


def _labels_beside(
    path: str, local: pathlib.Path, count: int
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """`labels` of our samples, `arr_1` of ADM's, and the class names of our protocol.json."""
    with np.load(local, allow_pickle=False) as file:
        names = [name for name in ("labels", "arr_1") if name in file.files]
        try:
            labels = file[names[0]] if names else None
        except (ValueError, OSError, zipfile.BadZipFile):  # objects, or damaged
            labels = None
    if labels is None or labels.shape != (count,) or labels.dtype.kind not in "iu":
        return None, ()
    try:
        about = json.loads((paths.at(path).parent / "protocol.json").read_text())
        return labels, tuple(about.get("class_names") or ())
    except (OSError, ValueError, AttributeError):
        return labels, ()


def _of_run(spec: str) -> ImageStream:
    workdir, _, split = spec.removeprefix("data:").rpartition(":")
    if split not in ("train", "held_out") or not workdir:
        raise DataError(f"{spec} must be data:WORKDIR:train or data:WORKDIR:held_out")
    settings = restore.read_settings(spec, workdir)
    if not settings.data.in_memory:
        raise DataError(f"{spec}: that run's images are not in memory; give their folder or .npz")
    found = labelled_images(settings, split)
    if not len(found.images):
        raise DataError(f"{spec}: that run holds no images out (data.held_out is 0)")
    stream, classes = of_array(spec, found.images), restore.class_names(workdir)
    return dataclasses.replace(stream, labels=found.labels, classes=classes)


def _of_folder(spec: str) -> ImageStream:
    path = str(paths.local(spec))
    files = [
        pathlib.Path(path, folder, name)
        for folder, names in folders.walk(path, path)
        for name in names
        if folders.is_image(name)
    ]
    sizes: dict[tuple[int, int], pathlib.Path] = {}
    failed: dict[str, str] = {}
    for file in list(files):
        try:
            with Image.open(file) as image:  # the header alone
                sizes.setdefault(image.size, file)
        except Exception as error:  # Pillow raises a dozen kinds on damaged files
            files.remove(file)
            failed[str(file.relative_to(path))] = first_line(error)
    if not sizes:
        why = next(iter(failed.values()), " ".join(folders.SUFFIXES))
        raise DataError(f"{spec} holds no image that can be read ({why})")
    if len(sizes) > 1:
        listed = ", ".join(f"{file.name} is {w}x{h}" for (w, h), file in sizes.items())
        raise DataError(f"{spec} holds images of several sizes: {listed:.200}; they must be of one")
    ((width, height),) = sizes

    def decoded(some: list[pathlib.Path]) -> Iterator[np.ndarray]:
        for file in some:
            try:
                yield np.asarray(crops.decode(file.read_bytes())[0])
            except DataError as error:
                failed[str(file.relative_to(path))] = first_line(error)

    def chunks(count: int) -> Iterator[np.ndarray]:
        for start in range(0, len(files), count):
            if images := list(decoded(files[start : start + count])):
                yield np.stack(images)

    inside = [file.relative_to(path).parts for file in files]
    classes = tuple(sorted({parts[0] for parts in inside}))
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[parts[0]] for parts in inside])
    if min(map(len, inside)) < 2:  # not a folder for each class
        labels, classes = None, ()
    count = len(files) + len(failed)
    return ImageStream(spec, count, (height, width), chunks, failed, labels, classes)
