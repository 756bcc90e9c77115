"""Images -> ArrayRecord shards of codes: `python -m mirai_jax.extract`.

    python -m mirai_jax.extract --images=imagenet/train --tokenizer=vq_ds16_c2i.pt --out=codes/imagenet

Every record holds the codes of all crops of one image, its label, and the key of the image, by which
training finds it again. The folder also gets manifest.json (what was extracted from what),
report.json (each image that is not in the shards, and each that was neither RGB nor grey) and
reconstructions.png (images above what their stored codes decode to: look at it).

Shard k holds the k-th `images_per_shard` images of the source, in its order. A shard appears under
its name when it is whole and has been read back; the same command goes on after any stop, and ends
with the same bytes. With several hosts, give each `--process_index` of `--process_count`.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import jax
import numpy as np
from absl import flags
from array_record.python import array_record_module

from mirai_jax.data import manifest, records
from mirai_jax.data.crops import CropSpec, load_all_crops, load_crop
from mirai_jax.data.manifest import Manifest, Shard
from mirai_jax.data.sources import open_images
from mirai_jax.models import batched, tokenizer, vq
from mirai_jax.utils import cli, files, pictures
from mirai_jax.utils.errors import ConfigError, DataError, first_line
from mirai_jax.utils.progress import Progress
from mirai_jax.weights import pretrained

_IMAGES = flags.DEFINE_string(
    "images", None, "Folder with a folder a class, tfds:NAME[:SPLIT], grain:MODULE:SOURCE, ..."
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Weights of the VQ tokenizer: LlamaGen's .pt or a converted folder."
)
_OUT = flags.DEFINE_string("out", None, "Folder of the shards.")
_SIZE = flags.DEFINE_integer("image_size", 256, "Pixels a side of a crop.")
_RANGE = flags.DEFINE_float("crop_range", 1.1, "Crops come from the centre image_size * this.")
_TEN = flags.DEFINE_bool("ten_crop", True, "Ten crops; else the centre and its mirror image.")
_EXIF = flags.DEFINE_enum(
    "exif", "ignore", ("ignore", "apply"), "EXIF orientation; the official code ignores it."
)
_PER_SHARD = flags.DEFINE_integer("images_per_shard", 4096, "Images of the source a shard.")
_BATCH = flags.DEFINE_integer("batch_size", 4, "Images encoded together, with all their crops.")
_PRECISION = flags.DEFINE_enum(
    "precision", "float32", ("float32", "tensorfloat32", "bfloat16"),
    "Of the encoder's products; less is faster on GPU and TPU, and moves some codes.",
)  # fmt: skip
_WORKERS = flags.DEFINE_integer("num_workers", 2 * (os.cpu_count() or 1), "Decoding threads.")
_SHOWN = flags.DEFINE_integer("reconstructions", 8, "Images in reconstructions.png.")
_INDEX = flags.DEFINE_integer("process_index", None, "Which host this is; default: JAX's.")
_COUNT = flags.DEFINE_integer("process_count", None, "How many hosts share the work.")

_PARTS = "parts"  # folder of one JSON a finished shard, until all of them are there


@dataclasses.dataclass(frozen=True)
class Job:
    """An extraction, whoever takes part in it."""

    images: Any
    module: vq.VQModel
    params: Any
    manifest: Manifest
    out: pathlib.Path
    num_workers: int

    @property
    def num_shards(self) -> int:
        return -(-len(self.images) // self.manifest.images_per_shard)

    def shard_name(self, k: int) -> str:
        return f"codes-{k:05d}-of-{self.num_shards:05d}.array_record"

    def indices(self, k: int) -> range:
        """Of the images of shard k."""
        size = self.manifest.images_per_shard
        return range(k * size, min((k + 1) * size, len(self.images)))

    def part_file(self, k: int) -> pathlib.Path:
        return self.out / _PARTS / f"{k:05d}.json"

    def part(self, k: int) -> dict[str, Any] | None:
        """What was noted of shard k when it was finished; None if it is not."""
        if not (self.out / self.shard_name(k)).is_file():
            return None
        try:
            return json.loads(self.part_file(k).read_text())
        except (FileNotFoundError, ValueError):
            return None


def prepare(
    images: str,
    tokenizer_path: str,
    out: str,
    crops: CropSpec,
    *,
    images_per_shard: int = 4096,
    batch_size: int = 4,
    precision: str = "float32",
    num_workers: int = 4,
) -> Job:
    """Opens what an extraction needs and begins, or finds, its manifest.

    Raises:
        ConfigError, DataError: one line; nothing was written.
    """
    for name, value in (("images_per_shard", images_per_shard), ("batch_size", batch_size),
                        ("num_workers", num_workers)):  # fmt: skip
        if value < 1:
            raise ConfigError(f"--{name} is {value}; it must be 1 or more")
    loaded = pretrained.load("--tokenizer", tokenizer_path, "tokenizer")
    module = vq.VQModel(loaded.config, precision=precision)
    params = pretrained.float32(loaded.params)
    try:
        grid = module.grid((crops.image_size, crops.image_size))
    except ValueError as error:
        raise ConfigError(f"--image_size is {crops.image_size}: {error}") from error
    if module.vocab_size > 2**16 or loaded.config.channels != 3:
        raise ConfigError(
            f"--tokenizer has {module.vocab_size} codes of {loaded.config.channels} channels; it "
            "must have at most 65536, of 3"
        )
    source = open_images(images)
    if not len(source):
        raise DataError(f"--images is {images!r}, which holds no image")
    shapes = {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in dataclasses.asdict(loaded.config).items()
    }  # as JSON gives them back
    made = Manifest(
        images=source.describe(),
        crops=crops,
        tokenizer={
            "checksum": pretrained.checksum(params),
            "file": loaded.source["file"],
            **shapes,
        },
        grid=grid,
        vocab_size=module.vocab_size,
        class_names=tuple(source.class_names),
        images_per_shard=images_per_shard,
        batch_size=batch_size,
        precision=precision,
    )
    folder = pathlib.Path(out).expanduser()
    before = manifest.read(folder)
    if before is None and folder.is_dir() and any(folder.glob("*.array_record")):
        raise ConfigError(f"--out is {out!r}, which holds shards without a manifest.json")
    if before is not None and (changed := before.differences(made)):
        if any(folder.glob("*.array_record")) or any((folder / _PARTS).glob("*.json")):
            raise ConfigError(
                f"--out is {out!r}, an extraction of something else: {'; '.join(changed)[:1000]}"
            )
        before = None  # it came to nothing: out of memory, perhaps
    if before is None:
        folder.mkdir(parents=True, exist_ok=True)
        manifest.write(folder, made)
    if before is None or not before.complete:
        (folder / _PARTS).mkdir(exist_ok=True)
    return Job(source, module, params, before or made, folder, num_workers)


class Encoder:
    """uint8 crops -> codes, over all devices of this process."""

    def __init__(self, job: Job):
        self._job = job
        self._devices = batched.LocalDevices()
        self._params = self._devices.copy(job.params)
        self._encode = jax.jit(self._codes)

    def _codes(self, params: Any, crops_BxSxSx3: jax.Array) -> jax.Array:
        images = tokenizer.to_unit(crops_BxSxSx3)
        return self._job.module.apply({"params": params}, images, method="encode")

    def __call__(self, crops_BxCxSxSx3: np.ndarray) -> jax.Array:
        """Starts encoding; (B * C or a little more, L) int32, to be fetched later."""
        rows = crops_BxCxSxSx3.reshape(-1, *crops_BxCxSxSx3.shape[2:])
        missing = -len(rows) % self._devices.count
        rows = np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])
        return self._encode(self._params, self._devices.split(rows))


@dataclasses.dataclass
class _Image:
    """One image on its way: its crops, or why there are none."""

    key: str
    label: int
    crops: np.ndarray | None
    notes: tuple[str, ...]
    problem: str


def _load(job: Job, index: int) -> _Image:
    # What cannot be read ends the work, since a lost disk is no property of an image; what cannot
    # be decoded is listed.
    raw, label, key = job.images.example(index)
    try:
        crops, notes = load_all_crops(raw, job.manifest.crops)
        return _Image(key, label, crops, notes, "")
    except DataError as error:
        return _Image(key, label, None, (), first_line(error))


def _loaded(job: Job, indices: Iterator[int]) -> Iterator[_Image]:
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


def _batches(job: Job, shards: list[int]) -> Iterator[tuple[int, list[_Image]]]:
    """(shard, images): batches never cross a shard, so that its bytes depend on nothing else."""
    size = job.manifest.batch_size
    stream = _loaded(job, (i for k in shards for i in job.indices(k)))
    for k in shards:
        left = len(job.indices(k))
        while left:
            batch = [next(stream) for _ in range(min(size, left))]
            left -= len(batch)
            yield k, batch


def _pixels(job: Job, batch: list[_Image]) -> np.ndarray:
    """All batches have one shape: images that are missing are black, and their codes not kept."""
    spec = job.manifest.crops
    shape = (job.manifest.batch_size, spec.count, spec.image_size, spec.image_size, 3)
    pixels = np.zeros(shape, np.uint8)
    for row, image in enumerate(batch):
        if image.crops is not None:
            pixels[row] = image.crops
    return pixels


def _encoded(job: Job, shards: list[int]) -> Iterator[tuple[int, list[_Image], np.ndarray]]:
    """(shard, images, codes (B, C, L)); the device always has the next batch queued."""
    encode, waiting = Encoder(job), None
    count = job.manifest.crops.count

    def fetched(k: int, batch: list[_Image], codes: jax.Array):
        rows = np.asarray(codes)[: job.manifest.batch_size * count]
        return k, batch, rows.astype(np.uint16).reshape(-1, count, rows.shape[-1])

    for k, batch in _batches(job, shards):
        started = (k, batch, encode(_pixels(job, batch)))
        if waiting is not None:
            yield fetched(*waiting)
        waiting = started
    if waiting is not None:
        yield fetched(*waiting)


def _finish_shard(job: Job, k: int, packed: list[bytes], part: dict[str, Any]) -> None:
    """Writes shard k and notes it: without the note it counts for nothing."""
    path = job.out / job.shard_name(k)
    job.part_file(k).unlink(missing_ok=True)
    records.write_shard(path, packed)
    part |= {"name": path.name, "records": len(packed), "sha256": pretrained.sha256_of_file(path)}
    files.write_text(job.part_file(k), _json(part))


def _json(tree: Any) -> str:
    return json.dumps(tree, indent=1) + "\n"


def extract(job: Job, shards: list[int], progress: Progress, shown: int = 0) -> None:
    """Makes those of the shards that are not there yet; after the first, draws reconstructions."""
    todo = [k for k in shards if job.part(k) is None]
    packed, part = [], {"failed": [], "notes": {}}
    done = 0
    for k, batch, codes in _encoded(job, todo):
        for image, codes_CxL in zip(batch, codes, strict=False):
            if image.crops is None:
                part["failed"].append({"key": image.key, "reason": image.problem})
                continue
            packed.append(records.pack_record(codes_CxL, image.label, image.key))
            for note in image.notes:
                part["notes"].setdefault(note, []).append(image.key)
        done += len(batch)
        progress.advance(len(batch))
        if done == len(job.indices(k)):
            _finish_shard(job, k, packed, part)
            if k == todo[0] and shown and (path := draw_reconstructions(job, [k], shown)):
                print(f"look at {path}: each image above what its codes decode to", flush=True)
            packed, part, done = [], {"failed": [], "notes": {}}, 0


def finish(job: Job) -> Manifest | None:
    """Writes report.json and the final manifest if every shard of every host is there."""
    parts = [job.part(k) for k in range(job.num_shards)]
    if not all(parts):
        return None
    failed = [entry for part in parts for entry in part["failed"]]
    notes: dict[str, list[str]] = {}
    for part in parts:
        for note, keys in part["notes"].items():
            notes.setdefault(note, []).extend(keys)
    skipped = list(getattr(job.images, "skipped", ()))
    message = {"failed": failed, "skipped": skipped, "notes": notes}
    files.write_text(job.out / "report.json", _json(message))
    made = dataclasses.replace(
        job.manifest,
        complete=True,
        num_records=sum(part["records"] for part in parts),
        num_failed=len(failed),
        shards=tuple(Shard(p["name"], p["records"], p["sha256"]) for p in parts),
    )
    manifest.write(job.out, made)
    shutil.rmtree(job.out / _PARTS, ignore_errors=True)  # another host may be at it too
    for left in job.out.glob("*.tmp"):  # of writers that were killed
        left.unlink(missing_ok=True)
    return made


def draw_reconstructions(job: Job, shards: list[int], count: int) -> pathlib.Path | None:
    """Images evenly spread over the shards, above what the codes stored of them decode to."""
    readers = [
        array_record_module.ArrayRecordReader(str(job.out / job.shard_name(k))) for k in shards
    ]
    try:
        places = [(r, i) for r in readers for i in range(r.num_records())]
        chosen = np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).astype(int))
        found = [places[n][0].read([places[n][1]])[0] for n in chosen] if places else []
    finally:
        for reader in readers:
            reader.close()
    if not found:
        return None
    found = [records.unpack_record(raw) for raw in found]
    spec = job.manifest.crops
    centre = spec.count // 2 - 1  # the last of the upright half
    originals = np.stack([load_crop(job.images.find(r["key"]), centre, spec) for r in found])
    codes = np.stack([r["codes"][centre] for r in found])
    decoded = batched.decode_codes(job.module, job.params, codes.astype(np.int32))
    path = job.out / "reconstructions.png"
    both = np.concatenate([originals, decoded])
    pictures.save_picture(path, pictures.sample_grid(both, ("image", "from its codes"), side=128))
    return path


def run(job: Job, process_index: int, process_count: int, shown: int) -> Manifest | None:
    """This host's share, and the end if it is the last. Returns the final manifest, or None.

    Raises:
        DataError: an image that cannot be read (one that cannot be decoded is listed), or a
            finished folder that is no longer whole.
    """
    if job.manifest.complete:
        _check_whole(job)
        return job.manifest
    mine = [k for k in range(job.num_shards) if k % process_count == process_index]
    sizes = {k: len(job.indices(k)) for k in mine}
    before = sum(sizes[k] for k in mine if job.part(k) is not None)
    total = sum(sizes.values())
    if before:
        print(f"{before:,} of {total:,} images were done before", flush=True)
    progress = Progress(total, "images", before)
    try:
        extract(job, mine, progress, shown)
    finally:
        progress.close()
    made = finish(job)
    if made is not None and shown:
        draw_reconstructions(job, list(range(job.num_shards)), shown)
    return made


def _check_whole(job: Job) -> None:
    """Raises DataError unless a finished folder still holds what its manifest says."""
    wanted = [*(shard.name for shard in job.manifest.shards), "report.json"]
    if missing := [name for name in wanted if not (job.out / name).is_file()]:
        raise DataError(
            f"{job.out} was finished, but {missing[0]} is missing now; remove its manifest.json and "
            "shards to extract again"
        )


def _summary(job: Job, made: Manifest) -> str:
    size = sum((job.out / shard.name).stat().st_size for shard in made.shards)
    text = (
        f"{made.num_records:,} images in {len(made.shards)} shards, {size:,} bytes"
        f" ({size / max(1, made.num_records):,.0f} an image)"
    )
    found = json.loads((job.out / "report.json").read_text())
    text += f"; {made.num_failed} images failed"
    if made.num_failed:
        named = [entry["key"] for entry in found["failed"]]
        text += f" ({', '.join(named[:5])}{', ...' if len(named) > 5 else ''})"
    for name, keys in (("other files skipped", found["skipped"]), *found["notes"].items()):
        text += f"; {name}: {len(keys)}" if keys else ""
    return f"{text}; every name: {job.out / 'report.json'}"


def main(argv: list[str]) -> None:
    with cli.program(interrupted="interrupted; the same command goes on where it stopped"):
        if len(argv) > 1:
            raise ConfigError(f"argument {argv[1]!r} is not understood; all are --flags")
        for flag in (_IMAGES, _TOKENIZER, _OUT):
            if not flag.value:
                raise ConfigError(f"--{flag.name} is missing; --help says what it is")
        if _SHOWN.value < 0:
            raise ConfigError(f"--reconstructions is {_SHOWN.value}; it must be 0 or more")
        index, count = cli.share(_INDEX.value, _COUNT.value)
        try:
            job = prepare(
                _IMAGES.value,
                _TOKENIZER.value,
                _OUT.value,
                CropSpec(_SIZE.value, _RANGE.value, _TEN.value, _EXIF.value),
                images_per_shard=_PER_SHARD.value,
                batch_size=_BATCH.value,
                precision=_PRECISION.value,
                num_workers=_WORKERS.value,
            )
            made = run(job, index, count, _SHOWN.value)
        except OSError as error:
            raise DataError(
                f"{_OUT.value} cannot be written ({first_line(error)}); the same command goes on "
                "from the last whole shard"
            ) from error
        if made is None:
            print("this share is done, others are not; the last to end writes the manifest")
        else:
            print(_summary(job, made))


if __name__ == "__main__":
    cli.run(main)
