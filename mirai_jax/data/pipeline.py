"""The Grain pipeline that feeds training, from one of three kinds of sources:

* `records.CodedImages`: a small image set in memory with its codes;
* `records.CodeRecords`: ArrayRecord shards of codes made beforehand (`mirai_jax.extract`); where a
  teacher looks at images, `CropLoader` rebuilds the very crop that the drawn codes came from;
* `OnlineImages`: no codes; the train step makes them from the crop.

A row of a batch depends on (seed, batch, row) and on nothing else: not on worker processes or the
number of hosts. Nothing here touches an accelerator or knows a model.
"""

import dataclasses
import errno
import functools
import os
from collections.abc import Sequence

import grain
import numpy as np

from mirai_jax.data import crops
from mirai_jax.data.folder_sets import Share
from mirai_jax.data.images import ImageSource
from mirai_jax.data.records import CodedImages, CodeRecords
from mirai_jax.utils.errors import DataError, Unreadable, first_line

_THREADS = 16  # that decode images, at most: each holds a batch
_STAND_INS = 20  # records in a row without an image before the run stops: a disk is gone, perhaps


class WorkerDied(DataError):
    """A data worker process ended early."""


class CropLoader:
    """The crop of an image by its key: the pixels that extraction encoded (or would), bit for bit.

    Pickles, so that Grain's worker processes decode.
    """

    def __init__(self, images: ImageSource, spec: crops.CropSpec | crops.RandomCrops):
        self._images, self._spec = images, spec

    def describe(self) -> dict:
        """What it loads, ready for JSON, without the name of a folder, which may move."""
        described = {**self._images.describe(), "class_names": list(self._images.class_names)}
        if described["kind"] == "folder":
            described["name"] = ""
        spec = dataclasses.asdict(self._spec)
        if spec == {**spec, "exif": "ignore"} and isinstance(self._spec, crops.RandomCrops):
            del spec["exif"]  # runs from before it had a choice resume
        return {**described, "crops": spec}

    def listing(self) -> str:
        return self._images.listing()

    def __call__(self, key: str, crop: int) -> np.ndarray:
        """uint8 (S, S, 3). Raises Unreadable without such an image, or if it cannot be decoded."""
        try:
            return crops.load_crop(self._images.find(key), crop, self._spec)
        except DataError as error:
            raise Unreadable(f"image {key!r}: {first_line(error)}") from error


class OnlineImages:
    """Labels and keys of an image source, without codes: {'crops': C, 'label', 'key'}.

    `share` has those of its images that are read, all by default.
    """

    def __init__(
        self,
        images: ImageSource,
        spec: crops.CropSpec | crops.RandomCrops,
        num_classes: int,
        share: Share | None = None,
    ):
        self._images, self._spec, self._num_classes = images, spec, num_classes
        self._share = share
        self.labels = None if share is None else share.labels

    def __len__(self) -> int:
        return len(self._images if self._share is None else self._share)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int | str]:
        number = index if self._share is None else int(self._share.indices[index])
        label, key = self._images.about(number)
        if self.labels is not None:
            label = int(self.labels[index])
        if not 0 <= label < self._num_classes:
            raise DataError(
                f"image {key!r} has label {label}: model.num_classes allows 0 to "
                f"{self._num_classes - 1}"
            )
        return {"crops": self._spec.count, "label": np.int32(label), "key": key}


def make_dataset(
    source: CodeRecords | CodedImages | OnlineImages,
    *,
    load_crop: CropLoader | None = None,
    batch_size: int,
    seed: int,
    rows: Sequence[int] | None = None,
    num_workers: int = 0,
    flip: bool = True,
    balanced: bool = False,
) -> "Batches":
    """The endless, shuffled stream of training batches.

    Every epoch has another order and another draw of crops; batches run across epoch borders, so no
    record is ever dropped. Balanced, every class has the same share of each epoch, and its images are
    drawn with replacement. An iterator's get_state() and set_state() resume exactly, also with
    another number of processes and workers.

    Args:
        source: random access to {'label': int32, 'codes': (C, L) or 'crops': C, optionally 'key',
            'image' and 'features'}.
        load_crop: gives the image of a record's key and drawn crop.
        batch_size: records a batch, over all processes.
        seed: 0 to 2**32 - 1.
        rows: those of every batch that this process reads, in this order (default: all).
        num_workers: worker processes; 0 reads in this process, and decodes images in several threads.
            With more than 0, absl flags must be parsed and the program needs an `if __name__ ==
            '__main__'` guard.
        flip: whether mirrored crops are drawn.
        balanced: whether all classes are drawn equally often; the source must have `labels`.

    Returns:
        Batches {'label': int32 (B,)} and, where the source or `load_crop` has them, 'codes': int32
        (B, L), 'image': uint8 (B, H, W, C), 'features': float32 (B, L, Z); with B = len(rows).
    """
    if not 0 < batch_size <= len(source):
        raise DataError(f"batch_size {batch_size} does not fit a data set of {len(source)} records")
    records = (
        grain.MapDataset.source(range(len(source)) if balanced else source)
        .seed(seed)
        .shuffle()  # before repeat: each epoch is another permutation
        .repeat()
    )
    if balanced:
        records = records.random_map(_Balanced(source))
    # Before the split: a crop does not depend on who reads it.
    records = records.random_map(functools.partial(_draw_crop, flip))
    rows = range(batch_size) if rows is None else rows
    batches = (
        _Rows(records, batch_size, tuple(int(row) for row in rows), load_crop)
        .batch(len(rows), drop_remainder=True)
        .map(_widen)
    )
    # A thread makes a whole batch, and Grain keeps their order. Codes are read faster than threads change.
    several = load_crop is not None and not num_workers
    threads = min(_THREADS, os.cpu_count() or 1) if several else 1
    return Batches(records, batches, batch_size, rows, num_workers, threads)


class _Rows(grain.MapDataset):
    """Some rows of every `batch_size` elements of its parent, with their images.

    For an image or record that cannot be read or decoded, the next record of the stream stands in, the
    same one however the work is divided; 'replaced' is then 1.
    """

    def __init__(
        self,
        parent: grain.MapDataset,
        batch_size: int,
        rows: tuple[int, ...],
        load_crop: CropLoader | None,
    ):
        super().__init__(parent)
        self._batch_size, self._rows, self._load_crop = batch_size, rows, load_crop

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self._rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, place = divmod(index, len(self._rows))
        first = batch * self._batch_size + self._rows[place]
        for k in range(first, first + _STAND_INS):
            try:
                record = self._parent[k]
                kept = {k: v for k, v in record.items() if k not in ("crops", "crop", "key")}
                if self._load_crop is not None:
                    kept["image"] = self._load_crop(record["key"], int(record["crop"]))
                return {**kept, "replaced": np.int32(k > first)}
            except Unreadable as error:
                failed = error
        raise failed


class Batches(grain.IterDataset):
    """Reads batches in order, in a thread or in worker processes, and counts them.

    An iterator's state is that count. Grain's state depends on the number of workers: saved with 2
    workers and resumed with 3, it silently gives the wrong batch.
    """

    def __init__(
        self,
        records: grain.MapDataset,
        batches: grain.MapDataset,
        batch_size: int,
        rows: Sequence[int],
        num_workers: int,
        num_threads: int = 1,
    ):
        super().__init__(batches)
        self._records, self._batch_size, self.num_workers = records, batch_size, num_workers
        self.rows, self._num_threads = rows, num_threads

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)

    def start(self, index: int) -> grain.DatasetIterator:
        """Grain's iterator over the batches from number `index` on."""
        # The buffer counts batches; Grain's default of 500 could fill the memory.
        threads = self._num_threads
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=1 + threads)
        dataset = self.parents[0][index:].to_iter_dataset(reading)
        if self.num_workers:
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self.num_workers, per_worker_buffer_size=2)
            )
        return iter(dataset)

    def record_keys(self, index: int, rows: Sequence[int] | None = None) -> list[str]:
        """The key and crop of records of batch number `index` (default: all rows), read again."""
        rows = range(self._batch_size) if rows is None else rows
        return [self._record_key(index * self._batch_size + int(row)) for row in rows]

    def _record_key(self, index: int) -> str:
        try:
            record = self._records[index]
        except Unreadable as error:
            return first_line(error)
        return f"{record['key']} crop {int(record['crop'])}"


class BatchIterator(grain.DatasetIterator):
    """The batches from number `index` on."""

    def __init__(self, batches: Batches):
        super().__init__()
        self._batches, self._index, self._running = batches, 0, None
        self.replaced: list[str] = []  # images of the last batch for which others stand in

    def __next__(self) -> dict[str, np.ndarray]:
        self._assert_not_closed()
        self.start_prefetch()
        try:
            batch = next(self._running)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            # Grain gives batches to its workers in rotation.
            workers = self._batches.num_workers
            worker = (self._index - self._started) % workers
            raise WorkerDied(
                f"data worker {worker} of {workers}, which prepared batch {self._index}, died "
                f"({first_line(error).split('. ')[0]}): out of memory? data.num_workers sets their "
                "number; with 0 the program reads the data itself"
            ) from error
        except OSError as error:
            if error.errno != errno.ENOSPC or not self._batches.num_workers:
                raise
            raise DataError(
                "no room in /dev/shm, through which data workers send batches (docker run --shm-size "
                "sets it); data.num_workers=0 needs none"
            ) from error
        self.replaced = []
        if np.any(replaced := batch.pop("replaced", 0)):
            rows = np.asarray(self._batches.rows)[np.flatnonzero(replaced)]
            self.replaced = self._batches.record_keys(self._index, rows)
        self._index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._index}

    def set_state(self, state: dict[str, int]) -> None:
        self._stop()
        self._index = state["next_index"]

    def start_prefetch(self) -> None:
        if self._running is None:
            self._started = self._index
            self._running = self._batches.start(self._index)
            self._running.start_prefetch()

    def close(self) -> None:
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


class _Balanced:
    """A record of the class that a number stands for: all classes have equally many numbers."""

    def __init__(self, source: CodedImages | OnlineImages):
        self._source = source
        classes = np.unique(source.labels)
        self._members = [np.flatnonzero(source.labels == label) for label in classes]

    def __call__(self, number: int, rng: np.random.Generator) -> dict:
        members = self._members[number % len(self._members)]
        return self._source[int(members[rng.integers(len(members))])]


def _draw_crop(flip: bool, record: dict, rng: np.random.Generator) -> dict:
    """One draw for every kind of source: stored and online codes train on the same crops."""
    count = len(record["codes"]) if "codes" in record else record["crops"]
    crop = rng.integers(count)
    if not flip:
        crop = crops.upright(crop, count)
    of_crops = {k: record[k][crop] for k in ("codes", "image", "features") if k in record}
    return {**record, **of_crops, "crop": crop}


def _widen(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Casts codes to int32, JAX's index type: once a batch, not once a record."""
    if "codes" in batch:
        batch["codes"] = batch["codes"].astype(np.int32)
    return batch


def steps_per_epoch(num_records: int, batch_size: int) -> int:
    """Whole batches in one pass over the data; at least 1."""
    return max(1, num_records // batch_size)
