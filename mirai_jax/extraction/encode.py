"""Images -> codes over the devices of this process: threads decode, the devices encode.

Codes made elsewhere are read by the same threads.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent import futures

import jax
import numpy as np

from mirai_jax.data.crops import load_all_crops, sides
from mirai_jax.extraction.codes import read_codes
from mirai_jax.extraction.job import ExtractionJob
from mirai_jax.models import batched
from mirai_jax.utils.errors import Damaged, DataError, Unreadable, first_line

_LOST = 20  # images in a row that cannot be read: the disk is lost, perhaps


@dataclasses.dataclass
class LoadedImage:
    """One image: its crops (of `job.codes`: their codes) with the notes of `crops.decode`, or the problem
    that left none."""

    key: str
    label: int
    crops: np.ndarray | None
    notes: tuple[str, ...]
    problem: str
    unread: bool = False


def encoded_batches(
    job: ExtractionJob, shards: list[int]
) -> Iterator[tuple[int, list[LoadedImage], Sequence[np.ndarray]]]:
    """(shard, images, codes (B, C, L) uint16), in order; the next batch is always queued.

    Batches never cross a shard, so a shard's bytes depend on nothing outside it. An image that cannot
    be read or decoded has a `problem`; _LOST in a row that cannot be read raise DataError.
    """
    if job.codes is not None:
        for k, batch in _batches(job, shards):
            yield k, batch, [image.crops for image in batch]
        return
    devices, spec, size = batched.LocalDevices(), job.manifest.crops, job.manifest.batch_size
    params, rows = devices.copy(job.params), size * spec.count
    filled = -(-rows // devices.count) * devices.count
    waiting: deque[tuple[int, list[LoadedImage], np.ndarray | jax.Array]] = deque()

    def fetched(k: int, batch: list[LoadedImage], codes: np.ndarray | jax.Array):
        return k, batch, np.asarray(codes)[:rows].astype(np.uint16).reshape(size, spec.count, -1)

    for k, batch in _batches(job, shards):
        # All batches have one shape: missing images are black, and their codes are dropped.
        pixels = np.zeros((filled, *sides(spec.image_size), 3), np.uint8)
        codes = np.zeros((filled, 1), np.uint16)  # of a batch without an image
        for i, image in enumerate(batch):
            if image.crops is not None:
                pixels[i * spec.count : (i + 1) * spec.count] = image.crops
        if any(image.crops is not None for image in batch):
            codes = batched.encode(job.module, params, devices.split(pixels))
        waiting.append((k, batch, codes))
        if len(waiting) > 1:
            yield fetched(*waiting.popleft())
    for last in waiting:
        yield fetched(*last)


def _batches(job: ExtractionJob, shards: list[int]) -> Iterator[tuple[int, list[LoadedImage]]]:
    size, lost = job.manifest.batch_size, 0
    stream = _loaded(job, (i for k in shards for i in job.indices(k)))
    for k in shards:
        left = len(job.indices(k))
        while left:
            batch = [next(stream) for _ in range(min(size, left))]
            left -= len(batch)
            for image in batch:
                lost = lost + 1 if image.unread else 0
                if lost == _LOST:
                    raise DataError(image.problem)
            yield k, batch


def _loaded(job: ExtractionJob, indices: Iterator[int]) -> Iterator[LoadedImage]:
    """The images in order, decoded by threads that run two batches ahead."""
    ahead = 2 * job.manifest.batch_size + job.num_workers
    with futures.ThreadPoolExecutor(job.num_workers) as pool:
        waiting: deque[futures.Future] = deque()
        try:
            for index in indices:
                waiting.append(pool.submit(_load, job, index))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _load(job: ExtractionJob, index: int) -> LoadedImage:
    if job.codes is not None:
        return _given(job, index)
    try:
        raw, label, key = job.images.example(index)
    except Unreadable as error:
        return LoadedImage(f"image {index}", 0, None, (), first_line(error), unread=_lost(error))
    try:
        crops, notes = load_all_crops(raw, job.manifest.crops)
        return LoadedImage(key, label, crops, notes, "")
    except DataError as error:
        return LoadedImage(key, label, None, (), first_line(error))


def _given(job: ExtractionJob, index: int) -> LoadedImage:
    made = job.manifest
    try:
        codes, label, key = read_codes(job.codes, index, made.grid, made.vocab_size)
        return LoadedImage(key, label, codes, (), "")
    except DataError as error:
        return LoadedImage(f"record {index}", 0, None, (), first_line(error), unread=_lost(error))


def _lost(error: DataError) -> bool:
    """Whether the storage is, perhaps."""
    return isinstance(error, Unreadable) and not isinstance(error, Damaged)
