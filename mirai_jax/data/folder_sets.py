"""A run's share of a source of images: its classes, its split, and all of it in memory."""

import dataclasses
import os
from concurrent import futures

import numpy as np

from mirai_jax.data import crops
from mirai_jax.data.crops import CropSpec
from mirai_jax.data.images import ImageSource, open_images
from mirai_jax.data.small_sets import LabelledImages
from mirai_jax.utils import progress
from mirai_jax.utils.errors import DataError, first_line

_newest: dict[tuple, tuple] = {}  # what `_read` gave last: a run asks for both parts of a source


@dataclasses.dataclass(frozen=True)
class Share:
    """Some images of a source.

    `labels` are int32 (N,), of `class_names`; None where the source would have to read its images.
    """

    indices: np.ndarray  # int (N,), in the source's order
    labels: np.ndarray | None
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def only(self, chosen_N: np.ndarray) -> "Share":
        """Those where `chosen_N` holds."""
        labels = None if self.labels is None else self.labels[chosen_N]
        return dataclasses.replace(self, indices=self.indices[chosen_N], labels=labels)


def whole(source: ImageSource, min_images: int = 1, balanced: bool = False) -> Share:
    """The classes of a source that have at least `min_images`, numbered in its order.

    Raises:
        DataError: none are left, or labels are needed (also to be `balanced`) that only the records hold.
    """
    labels, names = source.labels(), source.class_names
    indices = np.arange(len(source))
    if labels is None and (balanced or min_images > 1):
        raise DataError(
            f"data.images is {source.describe()}; it must be a folder with data.balanced or "
            "data.min_images above 1: the labels of other sources are only in their records"
        )
    if min_images <= 1:
        return Share(indices, labels, names)
    counts = np.bincount(labels, minlength=len(names))
    kept = np.flatnonzero(counts >= min_images)
    if not len(kept):
        raise DataError(
            f"data.min_images is {min_images}; it must be at most {counts.max()}, the images of the "
            "largest class"
        )
    number = np.full(len(names), -1, np.int32)
    number[kept] = np.arange(len(kept))
    share = Share(indices, number[labels], tuple(names[k] for k in kept))
    return share.only(share.labels >= 0)


def split(source: ImageSource, share: Share, held_out_share: float, which: str) -> Share:
    """The part to train on ('train') or the part kept out of training ('held_out').

    An image is held out if the hash of its key lies in the lowest `held_out_share` of all hashes, so
    adding images moves no other. `mirai_jax.tokenize` holds out a number of the lowest hashes, and so the
    same images where both hold out equally many.

    Raises:
        DataError: a class has no image to train on.
    """
    below = source.hashes()[share.indices] < np.uint64(int(held_out_share * 2**64))
    found = share.only(below if which == "held_out" else ~below)
    if which == "train" and found.labels is not None:
        counts = np.bincount(found.labels, minlength=len(share.class_names))
        if not counts.all():
            name = share.class_names[int(np.argmin(counts))]
            raise DataError(
                f"class {name!r} has no image to train on: data.held_out_share={held_out_share} holds "
                "them out, or they cannot be read; data.min_images leaves out small classes"
            )
    return found


def load(
    spec: str, crop_spec: CropSpec, which: str, held_out_share: float, min_images: int,
    flip: bool, grey: bool, make_progress: progress.Maker = progress.silent,
) -> LabelledImages:  # fmt: skip
    """A part of a source in memory, each image as the centre crop of `crop_spec`.

    Args:
        spec: see `data.images.open_images`.
        which: 'train', with the crops to train on (mirrored ones only if `flip`), or 'held_out'.
        grey: whether images of one channel may come of it, where every image of the source is grey.
        make_progress: shows how many images are read.

    Raises:
        DataError: one line.
    """
    asked = spec, crop_spec, min_images, grey
    if asked not in _newest:
        _newest.clear()
        _newest[asked] = _read(*asked, make_progress)
    source, resized, kept, problems = _newest[asked]
    part = split(source, kept, held_out_share, which)
    resized = resized[np.searchsorted(kept.indices, part.indices)]
    numbers = range(crop_spec.count if flip else crop_spec.count // 2)
    images = made = crops.crop(resized, crop_spec.centre, crop_spec)
    if len(numbers) > 1 and which == "train":
        cut = [crops.crop(resized, number, crop_spec) for number in numbers]
        made = np.stack(cut, axis=1).reshape(-1, *images.shape[1:])
    made = None if made is images else made
    rest = problems, source.skipped
    return LabelledImages(images, part.labels, part.class_names, made, *rest)


def _read(
    spec: str, crop_spec: CropSpec, min_images: int, grey: bool, make_progress: progress.Maker
) -> tuple[ImageSource, np.ndarray, Share, tuple[str, ...]]:
    """The source, its images as uint8 (N, R, R, C), those that can be read, and the others' errors."""
    source = open_images(spec)
    share = whole(source, min_images)

    def read(index: int) -> tuple[np.ndarray | None, int, str]:
        key = f"image {index}"
        try:
            raw, label, key = source.example(index)
            image = crops.center_crop(crops.decode(raw, crop_spec.exif)[0], crop_spec.resized)
            return image, label, ""
        except DataError as error:
            return None, 0, f"{key}: {first_line(error)}"

    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(read, map(int, share.indices))
        results = progress.counted(results, make_progress(len(share), "images read"))
        found, labels, problems = zip(*results, strict=True)
    if share.labels is None:
        share = dataclasses.replace(share, labels=np.array(labels, np.int32))
    share = share.only(np.array([image is not None for image in found]))
    problems = tuple(filter(None, problems))
    if not len(share):
        raise DataError(f"data.images is {spec!r}; none of its images can be read ({problems[0]})")
    images = np.stack([image for image in found if image is not None])
    if grey and (images == images[..., :1]).all():
        images = images[..., :1]
    return source, images, share, problems
