"""Folders of samples: drawn in parts that survive a stop, then joined into one file."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from mirai_jax.sampling import keys
from mirai_jax.sampling.painter import Given, Painter, Source
from mirai_jax.sampling.sampler import SampleOptions
from mirai_jax.utils import files, pictures, trees
from mirai_jax.utils.errors import ConfigError
from mirai_jax.utils.locks import FolderLock
from mirai_jax.utils.progress import Progress

_PART = 500  # images a file until all are there; fixed, so that stops leave no trace
_GRID = 8  # rows and columns of grid.png at most


def make_labels(how: str, count: int, num_classes: int, seed: int) -> np.ndarray:
    """int32 (count,); label i depends on `how`, `num_classes`, `seed` and i alone.

    Args:
        how: 'random', 'balanced' (0, 1, ..., again from 0), or class ids to repeat: '0,207,360'.

    Raises:
        ConfigError: `how` is none of these.
    """
    indices = np.arange(count)
    if how == "balanced":
        return (indices % num_classes).astype(np.int32)
    if how == "random":
        keys_N = keys.image_keys(seed, keys.LABELS, indices)
        return np.asarray(jax.vmap(lambda k: jax.random.randint(k, (), 0, num_classes))(keys_N))
    try:
        ids = np.array([int(text) for text in how.split(",")], np.int64)
    except (ValueError, OverflowError):
        ids = np.array([-1])
    if ids.min() < 0 or ids.max() >= num_classes:
        raise ConfigError(f"--labels is {how!r}, not random, balanced or ids below {num_classes}")
    return ids[indices % len(ids)].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class SamplingJob:
    """One folder of samples; `begin` makes it."""

    out: pathlib.Path
    labels: np.ndarray  # int32 (N,)
    beside: Sequence[np.ndarray] = ()  # uint8 (H, W, 3), shown first in each row of grid.png

    @classmethod
    def begin(
        cls,
        out: pathlib.Path,
        labels: np.ndarray,
        protocol: dict[str, Any],
        beside: Sequence[np.ndarray] = (),
    ) -> "SamplingJob":
        """Begins a folder, or continues one that was begun with the same protocol.

        Raises:
            ConfigError: the folder holds samples of another protocol, or of none.
        """
        file = out / "protocol.json"
        if file.exists():
            try:
                # Folders of earlier versions lack some fields; options that they lack had no other value.
                defaults = dataclasses.asdict(SampleOptions()).items()
                old = {k: value for k, value in defaults if k in protocol}
                old |= json.loads(file.read_text())
                changed = trees.differences(old, {k: protocol.get(k) for k in old})
            except (ValueError, TypeError, AttributeError) as error:
                raise ConfigError(f"{file} is damaged; use another --out") from error
            if changed:
                listed = trees.was_is(changed)
                raise ConfigError(f"{out} holds samples of another protocol: {listed}")
        elif found := [*out.glob("samples.npz"), *out.glob("parts/*.npy")]:
            raise ConfigError(f"{out} holds a {found[0].name} without its protocol.json")
        else:
            (out / "parts").mkdir(parents=True, exist_ok=True)
            files.write_text(file, json.dumps(protocol, indent=2) + "\n")
        return cls(out, labels, beside)

    @property
    def num_parts(self) -> int:
        return -(-len(self.labels) // _PART)

    @property
    def samples(self) -> pathlib.Path:
        return self.out / "samples.npz"

    def indices(self, k: int) -> np.ndarray:
        return np.arange(k * _PART, min((k + 1) * _PART, len(self.labels)))

    def part(self, k: int) -> pathlib.Path:
        return self.out / "parts" / f"{k:05d}.npy"

    def draw(self, painter: Painter, parts: Iterable[int], progress: Progress) -> None:
        """Draws those of the parts that are missing.

        The painter takes all of them at once, so that the devices draw while a part is written.
        """
        missing = [k for k in parts if not self.part(k).exists()]
        requests = [(self.labels[self.indices(k)], self.indices(k)) for k in missing]
        (self.out / "parts").mkdir(exist_ok=True)
        for k, images in zip(missing, painter.stream(requests), strict=True):
            with files.atomic_write(self.part(k)) as file:
                np.save(file, images)
            progress.advance(len(images))

    def join(self) -> bool:
        """Joins the parts into samples.npz if those of every host are there; returns whether.

        Holds at most two parts in memory.
        """
        try:
            whole = all(self.part(k).exists() for k in range(self.num_parts))
            if whole and not self.samples.exists():
                self._write()
        except FileNotFoundError:
            if not self.samples.exists():  # else another host joined them first, and removed them
                raise
        if not self.samples.exists():
            return False
        files.remove_tree(self.out / "parts")
        return True

    def _load(self, k: int) -> np.ndarray:
        path = self.part(k)
        return np.load(io.BytesIO(path.read_bytes()) if files.is_remote(path) else path)

    def _rows(
        self, count: int, columns: int, names: list[str] | None
    ) -> list[tuple[str, np.ndarray]]:
        """Names of the grid's rows, and the numbers, of the first `count`, of the images in each.

        A row is a class where all, or as many as there are rows, have images enough for one.
        """
        labels = self.labels[:count]
        found = {y: np.flatnonzero(labels == y)[:columns] for y in np.unique(labels)}
        full = {y: chosen for y, chosen in found.items() if len(chosen) == columns}
        if len(full) >= min(_GRID, len(found)) > 1:
            some = list(full)[:: -(-len(full) // _GRID)]
            return [(names[y][:48] if names else f"class {y}", full[y]) for y in some]
        starts = range(0, min(count, _GRID * columns) // columns * columns, columns)
        return [(self._row(i, columns, names), np.arange(i, i + columns)) for i in starts]

    def _row(self, start: int, count: int, names: list[str] | None) -> str:
        """The name of some images from `start` on: their classes, where their names are known."""
        shown = [names[y] for y in self.labels[start : start + count]] if names else []
        shown = shown[:1] if len(set(shown)) == 1 else shown
        return f"image {start}: {', '.join(shown)}"[:48].removesuffix(": ")

    def _write(self) -> None:
        first = self._load(0)
        names = json.loads((self.out / "protocol.json").read_text()).get("class_names")
        columns = min(_GRID - len(self.beside), len(first))
        size = first.shape[2], first.shape[1]
        beside = [np.asarray(Image.fromarray(each).resize(size)) for each in self.beside]
        rows = self._rows(len(first), columns, names)
        shown = [image for _, chosen in rows for image in (*beside, *first[chosen])]
        grid = pictures.sample_grid(np.stack(shown), [name for name, _ in rows])
        pictures.save_picture(self.out / "grid.png", grid)
        # A stop's leftover is removed with the parts. A bucket gets the file at once, whole.
        remote = files.is_remote(self.out)
        whole = self.samples if remote else self.out / "parts" / "samples.npz"
        # ZipInfo without a date: the same bytes whenever they are written.
        with files.atomic_write(whole) as raw, zipfile.ZipFile(raw, "w") as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                shape = (len(self.labels), *first.shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for k in range(self.num_parts):
                    file.write(self._load(k).tobytes())
            with archive.open(zipfile.ZipInfo("labels.npy"), "w") as file:
                np.lib.format.write_array(file, self.labels)
        if not remote:
            os.replace(whole, self.samples)


def sample_folder(
    out: pathlib.Path,
    source: Source,
    options: SampleOptions,
    share: tuple[int, int],
    *,
    num_images: int,
    labels: str,
    seed: int,
    resize: int,
    batch_size: int,
    given: Given | None = None,
) -> None:
    """Draws one process's share of a folder, as far as it is missing; the last process joins the parts.

    Args:
        share: (index, count) of the processes that divide the work.
        labels: `how` of `make_labels`.
        resize: pixels a side of the images kept; 0 keeps them as decoded.
        batch_size: images drawn at once on each device; another size rounds differently in bfloat16.
        given: what every image keeps of another.

    Raises:
        ConfigError: wrong labels, or a folder of another protocol.
    """
    labels_N = make_labels(labels, num_images, source.config.num_classes, seed)
    protocol = source.about | {"num_images": num_images, "labels": labels, "seed": seed}
    protocol |= dataclasses.asdict(options) | {"resize": resize, "batch_size": batch_size}
    protocol |= {"jax": jax.__version__, "platform": jax.default_backend()}
    precision = jax.config.jax_default_matmul_precision
    protocol |= {"x64": jax.config.jax_enable_x64, "matmul_precision": precision}
    protocol["given_sha256"] = given and hashlib.sha256(given.codes_L).hexdigest()
    job = SamplingJob.begin(out, labels_N, protocol, given.pictures if given else ())
    if job.samples.exists():
        job.join()  # a stop may have left the parts
        print(f"{job.samples} is there already", flush=True)
        return
    index, count = share
    mine = range(index, job.num_parts, count)
    before = sum(len(job.indices(k)) for k in mine if job.part(k).exists())
    total = sum(len(job.indices(k)) for k in mine)
    if before:
        print(f"{before:,} of {total:,} images were drawn before", flush=True)
    print(f"guidance {options.guidance:g}: {total:,} images to {out}", flush=True)
    progress = Progress(total, "images", before)
    with FolderLock(out, f"lock-{index}").held(), contextlib.closing(progress):
        painter = Painter(source, options, seed, batch_size, resize, given=given)
        job.draw(painter, mine, progress)
    if job.join():
        print(f"written: {job.samples}; look at {out / 'grid.png'}", flush=True)
    else:
        print("this share is done, others are not; the last to end writes samples.npz")
