"""The images that a tokenizer is trained and measured on: small sets in memory, folders of any size."""

import collections
import dataclasses
import hashlib
import json

import numpy as np
from PIL import Image

from mirai_jax.data import crops, pipeline, records, small_sets
from mirai_jax.data.images import ImageSource, open_images
from mirai_jax.utils.errors import DataError, Unreadable, first_line

_SEEDS = 2**31 - 1  # of a random crop


@dataclasses.dataclass(frozen=True)
class Images:
    """What a run needs of its data.

    `held_out` is uint8 (N, H, W, C), `count` the number of training images, `identity` for
    `workdir.check_same`, `skipped` names files that are no images.
    """

    batches: pipeline.Batches
    held_out: np.ndarray
    count: int
    identity: dict[str, str]
    skipped: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class AnyCrops:
    """Loads a random crop of an image by its key, RGB whatever the file is.

    Attributes:
        source: has the images.
        size: (height, width) in pixels. An image is first made to cover it.
        crop_range: and then larger by up to this factor, at random.
        flip: whether half of the crops are mirrored.
        exif: as in `crops.CropSpec`.
    """

    source: ImageSource
    size: tuple[int, int]
    crop_range: float
    flip: bool
    exif: str = "ignore"

    def __call__(self, key: str, seed: int) -> np.ndarray:
        """uint8 (*size, 3). Raises Unreadable without such an image, or if it cannot be decoded."""
        larger, top, left, mirrored = np.random.RandomState(seed).uniform(size=4)
        image = self._cut(key, 1 + larger * (self.crop_range - 1), top, left)
        return image[:, ::-1] if self.flip and mirrored < 0.5 else image

    def centre(self, key: str) -> np.ndarray:
        """The middle of the image, as large as can be."""
        return self._cut(key, 1.0, 0.5, 0.5)

    def _cut(self, key: str, larger: float, top: float, left: float) -> np.ndarray:
        try:
            image, _ = crops.decode(self.source.find(key), self.exif)
        except DataError as error:
            raise Unreadable(f"image {key!r}: {first_line(error)}") from error
        height, width = self.size
        scale = larger * max(height / image.height, width / image.width)
        across, down = width / scale, height / scale  # of the crop, in the image's pixels
        left, top = left * max(0, image.width - across), top * max(0, image.height - down)
        # Rounding must not lead out of the image.
        box = (left, top, min(left + across, image.width), min(top + down, image.height))
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


class _Some:
    """Some images of a source, each with the seed of a random crop to draw."""

    def __init__(self, source: ImageSource, indices: np.ndarray):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, int | str]:
        return {"crops": _SEEDS, "key": self._source.key(int(self._indices[index]))}


def load(
    name: str,
    path: str,
    spec: str,
    size: tuple[int, int],
    held_out: int,
    crop_range: float,
    flip: bool,
    exif: str,
    **of_batches: int,
) -> Images:
    """Opens the data of a run.

    Args:
        name: 'mnist' or 'fashion_mnist', which are grey and padded to a square `size`; or 'images'.
        path: of fashion_mnist; see `small_sets.load_images`.
        spec: of 'images'; see `data.images.open_images`.
        size: (height, width) in pixels.
        held_out: how many images are kept out of training and measured on. Of 'images' they are those
            whose names have the smallest hashes; of fashion_mnist some of its test images.
        crop_range, flip, exif: of 'images'; see AnyCrops.
        of_batches: see `pipeline.make_dataset`.

    Raises:
        DataError: one line.
    """
    if name != "images":
        sets = [
            small_sets.load_images(name, path, s, size[0], held_out) for s in ("train", "held_out")
        ]
        train, rest = sets
        source = records.CodedImages(None, train.labels, train.images)
        batches = pipeline.make_dataset(source, **of_batches)
        identity = {"image_set": small_sets.checksum(train)}
        # Of all classes: MNIST's digits are in their order.
        chosen = np.linspace(
            0, len(rest.images), min(held_out, len(rest.images)), endpoint=False
        ).astype(int)
        return Images(batches, rest.images[chosen], len(train.images), identity)
    source = open_images(spec).prepare()
    about = source.describe()
    if held_out >= len(source):
        raise DataError(
            f"data.held_out is {held_out}; it must be less than {len(source)}, the images of {spec!r}"
        )
    order = np.argsort(source.hashes(), kind="stable")
    loader = AnyCrops(source, size, crop_range, flip, exif)
    middles, left = [], collections.deque(order)
    while left and len(middles) < held_out:
        try:
            middles.append(loader.centre(source.key(int(left.popleft()))))
        except Unreadable as error:
            problem = first_line(error)
    if not left:
        raise DataError(f"data.images is {spec!r}; its images cannot be read ({problem})")
    train = np.sort(np.array(left, int))
    batches = pipeline.make_dataset(_Some(source, train), load_crop=loader, **of_batches)
    about = {**about, "name": ""} if about["kind"] == "folder" else about  # a folder may move
    listing = f"{json.dumps(about, sort_keys=True)} {source.listing()}"
    identity = {"image_keys": hashlib.sha256(listing.encode()).hexdigest()}
    return Images(batches, np.stack(middles), len(train), identity, source.skipped)
