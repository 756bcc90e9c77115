"""Samples at scale: `python -m mirai_jax.sample --workdir=runs/mirai_e-imagenet_b`.

    python -m mirai_jax.sample --workdir=RUN --num_images=50000 --guidance=2.0
    python -m mirai_jax.sample --workdir=RUN --guidance=1.0,1.5,2.0,2.5       # a folder for each
    python -m mirai_jax.sample --checkpoint=c2i_B_256.pt --tokenizer=vq_ds16_c2i.pt --out=samples

A folder holds samples.npz (`arr_0`, uint8 N x H x W x 3, and `labels`: what the ADM evaluator reads),
grid.png, and protocol.json: which weights, labels, seed and options. Image i depends on these and on
i alone; `--batch_size` is among them, since a batch of another size is rounded otherwise in bfloat16.
A part of 500 images is kept when it is whole: the same command goes on after any stop, and ends with
the same bytes on the same kind of device. Several hosts share the work with `--process_index` of
`--process_count`.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import shutil
import zipfile
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from absl import flags

from mirai_jax.sampling import sampler
from mirai_jax.sampling.painter import Painter, Source
from mirai_jax.training import restore
from mirai_jax.utils import cli, files, pictures
from mirai_jax.utils.errors import ConfigError, DataError, first_line
from mirai_jax.utils.progress import Progress
from mirai_jax.weights import frozen, pretrained

_FLAGS = cli.flag_values(__name__)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run to sample from.", flag_values=_FLAGS
)
_STEP = flags.DEFINE_integer(
    "step", None, "Checkpoint of the workdir; default: the newest.", flag_values=_FLAGS
)
_STATE = flags.DEFINE_enum(
    "state", "ema", ("ema", "model"), "Which weights of the workdir.", flag_values=_FLAGS
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Instead of a workdir: a generator's PyTorch file or converted folder.",
    flag_values=_FLAGS,
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Weights of the VQ tokenizer; default: the workdir's.", flag_values=_FLAGS
)
_SIDE = flags.DEFINE_integer(
    "grid",
    0,
    "Tokens a side of --checkpoint; default: as its file says, else 16 is assumed.",
    flag_values=_FLAGS,
)
_OUT = flags.DEFINE_string(
    "out", None, "Folder of the samples; default: one inside the workdir.", flag_values=_FLAGS
)
_NUM = flags.DEFINE_integer("num_images", 50_000, "Images to draw.", flag_values=_FLAGS)
_LABELS = flags.DEFINE_string(
    "labels", "random", "random, balanced, or class ids: 0,207,360.", flag_values=_FLAGS
)
_GUIDANCE = flags.DEFINE_list(
    "guidance", ["2.0"], "One scale, or several: a folder for each.", flag_values=_FLAGS
)
_INTERVAL = flags.DEFINE_integer(
    "interval", -1, "Guide tokens up to this one only; -1: all.", flag_values=_FLAGS
)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Divides the logits.", flag_values=_FLAGS)
_TOP_K = flags.DEFINE_integer(
    "top_k", 0, "Keep the k likeliest tokens; 0: all.", flag_values=_FLAGS
)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Keep the likeliest tokens that make up p; 1: all.", flag_values=_FLAGS
)
_SEED = flags.DEFINE_integer("seed", 0, "Of labels and tokens.", flag_values=_FLAGS)
_SIZE = flags.DEFINE_integer(
    "resize", 0, "Pixels a side of the images kept; 0: as decoded.", flag_values=_FLAGS
)
_BATCH = flags.DEFINE_integer(
    "batch_size", 64, "Images drawn at once on each device.", flag_values=_FLAGS
)
_INDEX = flags.DEFINE_integer(
    "process_index", None, "Which host this is; default: JAX's.", flag_values=_FLAGS
)
_COUNT = flags.DEFINE_integer(
    "process_count", None, "How many hosts share the work.", flag_values=_FLAGS
)

_PART = 500  # images a file until all are there; fixed, so that stops leave no trace
_GRID = 64


def of_workdir(workdir: str, step: int | None, state: str, tokenizer_path: str | None) -> Source:
    """A run's generator and tokenizer.

    Raises:
        ConfigError: no such run, checkpoint or tokenizer.
    """
    settings, saved, step = restore.read_run("--workdir", workdir, step)
    params = saved["ema"] if state == "ema" else saved["params"]["generator"]
    if settings.data.in_memory:
        if tokenizer_path:
            raise ConfigError(f"--tokenizer is {tokenizer_path!r}; {workdir} has its own")
        module, tokenizer_params = frozen.load_codebook(settings, workdir)
    else:
        path = tokenizer_path or settings.tokenizer.path
        if not path:
            raise ConfigError(
                f"--tokenizer is missing and the run {workdir} names none: it must be the weights "
                f"of {settings.tokenizer.name}"
            )
        settings = dataclasses.replace(
            settings, tokenizer=dataclasses.replace(settings.tokenizer, path=path)
        )
        module, tokenizer_params = frozen.load_vq(settings)
    about = {"workdir": os.path.basename(os.path.abspath(workdir)), "step": step, "state": state}
    return Source(settings.generator, params, module, tokenizer_params, about)


def of_checkpoint(path: str, tokenizer_path: str | None, grid: int = 0) -> Source:
    """A converted or PyTorch generator with a VQ tokenizer.

    `grid`: tokens a side of a PyTorch file's generator; 0: see `weights.token_grid`.

    Raises:
        ConfigError: no such files, or they do not belong together.
    """
    if not tokenizer_path:
        raise ConfigError("--tokenizer is missing; with --checkpoint it must be the VQ's weights")
    sides = pretrained.token_grid(grid, {}) if grid else None
    loaded = pretrained.load("--checkpoint", path, "generator", grid=sides)
    if sides not in (None, loaded.config.grid):
        raise ConfigError(f"--grid is {grid}; {path} knows its own, {loaded.config.grid}")
    vq_module, vq_params = frozen.load_vq_file("--tokenizer", tokenizer_path)
    if vq_module.vocab_size != loaded.config.vocab_size:
        raise ConfigError(
            f"--tokenizer is {tokenizer_path!r}, of {vq_module.vocab_size} codes; the generator "
            f"has {loaded.config.vocab_size}"
        )
    about = {"checkpoint": os.path.basename(path), "entry": loaded.source.get("entry", "")}
    about["grid"] = list(loaded.config.grid)
    if loaded.source.get("grid") == "assumed":
        pixels = vq_module.config.downsample * loaded.config.grid[0]
        print(
            f"{path} does not tell its grid: 16 x 16 tokens are assumed, which are images of "
            f"{pixels} x {pixels} (--grid=N tells another)",
            flush=True,
        )
    params = pretrained.float32(loaded.params)
    return Source(loaded.config, params, vq_module, vq_params, about)


def make_labels(how: str, count: int, num_classes: int, seed: int) -> np.ndarray:
    """int32 (count,); label i depends on `how`, the seed and i alone.

    Raises:
        ConfigError: neither 'random', 'balanced' nor class ids.
    """
    indices = np.arange(count)
    if how == "balanced":
        return (indices % num_classes).astype(np.int32)
    if how == "random":
        keys = sampler.image_keys(jax.random.fold_in(jax.random.key(seed), 1), indices)
        return np.asarray(jax.vmap(lambda k: jax.random.randint(k, (), 0, num_classes))(keys))
    try:
        ids = np.array([int(text) for text in how.split(",")], np.int64)
    except (ValueError, OverflowError):
        ids = np.array([-1])
    if ids.min() < 0 or ids.max() >= num_classes:
        raise ConfigError(
            f"--labels is {how!r}; it must be random, balanced, or ids from 0 to {num_classes - 1}"
        )
    return ids[indices % len(ids)].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Job:
    """One folder of samples."""

    out: pathlib.Path
    labels: np.ndarray
    protocol: dict[str, Any]

    @property
    def num_parts(self) -> int:
        return -(-len(self.labels) // _PART)

    def indices(self, k: int) -> np.ndarray:
        return np.arange(k * _PART, min((k + 1) * _PART, len(self.labels)))

    def part(self, k: int) -> pathlib.Path:
        return self.out / "parts" / f"{k:05d}.npy"

    @property
    def samples(self) -> pathlib.Path:
        return self.out / "samples.npz"


def begin(out: pathlib.Path, labels: np.ndarray, protocol: dict[str, Any]) -> Job:
    """Begins a folder of samples, or finds it begun.

    Raises:
        ConfigError: it holds samples of another protocol, or of none.
    """
    file, text = out / "protocol.json", json.dumps(protocol, indent=2) + "\n"
    if file.exists():
        try:
            before = json.loads(file.read_text())
        except ValueError:
            before = {}
        changed = [k for k in {**before, **protocol} if before.get(k) != protocol.get(k)]
        if changed:
            listed = "; ".join(
                f"{k} was {before.get(k)!r}, is {protocol.get(k)!r}" for k in changed
            )
            raise ConfigError(f"{out} holds samples of another protocol: {listed}")
    elif found := [*out.glob("samples.npz"), *out.glob("parts/*.npy")]:
        raise ConfigError(f"{out} holds a {found[0].name} without its protocol.json")
    else:
        (out / "parts").mkdir(parents=True, exist_ok=True)
        files.write_text(file, text)
    return Job(out, labels, protocol)


def draw(job: Job, paint: Callable, parts: Iterable[int], progress: Progress) -> None:
    """Draws those of the parts that are not there.

    Args:
        job: whose parts.
        paint: takes labels and indices, and gives their images. Where it has a `stream`, as a
            Painter has, that is told of all parts at once: the devices go on while one is written.
        parts: their numbers.
        progress: is told of every part.
    """
    parts = [k for k in parts if not job.part(k).exists()]
    asked = [(job.labels[job.indices(k)], job.indices(k)) for k in parts]
    stream = getattr(paint, "stream", functools.partial(itertools.starmap, paint))
    for k, images in zip(parts, stream(asked), strict=True):
        with files.atomic_write(job.part(k)) as file:
            np.save(file, images)
        progress.advance(len(images))


def finish(job: Job) -> bool:
    """Joins the parts if those of every host are there; holds one of them in memory at a time."""
    try:
        there = job.samples.exists()
        if not there and all(job.part(k).exists() for k in range(job.num_parts)):
            _join(job)
    except FileNotFoundError:
        if not job.samples.exists():  # else another host joined them first, and removed them
            raise
    if not job.samples.exists():
        return False
    shutil.rmtree(job.out / "parts", ignore_errors=True)
    return True


def _join(job: Job) -> None:
    some = np.load(job.part(0))[:_GRID]
    rows = [f"image {i}" for i in range(0, len(some) // 8 * 8, 8)]
    if rows:
        grid = pictures.sample_grid(some[: 8 * len(rows)], rows)
        pictures.save_picture(job.out / "grid.png", grid)
    shape = (len(job.labels), *np.load(job.part(0), mmap_mode="r").shape[1:])
    whole = job.out / "parts" / "samples.npz"  # what a stop leaves of it goes with the parts
    # ZipInfo without a date: the same bytes whenever they are written.
    with files.atomic_write(whole) as raw, zipfile.ZipFile(raw, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            about = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, about)
            for k in range(job.num_parts):
                file.write(np.load(job.part(k)).tobytes())
        with archive.open(zipfile.ZipInfo("labels.npy"), "w") as file:
            np.lib.format.write_array(file, job.labels)
    os.replace(whole, job.samples)


def _options(guidance: str) -> sampler.SampleOptions:
    try:
        return sampler.SampleOptions(
            guidance=float(guidance),
            interval=_INTERVAL.value,
            temperature=_TEMPERATURE.value,
            top_k=_TOP_K.value,
            top_p=_TOP_P.value,
        )
    except ValueError as error:
        raise ConfigError(f"--guidance={guidance}: {first_line(error)}") from error


def _source() -> Source:
    if (_WORKDIR.value is None) == (_CHECKPOINT.value is None):
        raise ConfigError("give either --workdir or --checkpoint")
    if _WORKDIR.value is not None:
        if _SIDE.present:
            raise ConfigError("--grid has no meaning with --workdir, which knows it")
        return of_workdir(_WORKDIR.value, _STEP.value, _STATE.value, _TOKENIZER.value)
    for flag in (_STEP, _STATE):
        if flag.present:
            raise ConfigError(f"--{flag.name} has no meaning with --checkpoint")
    return of_checkpoint(_CHECKPOINT.value, _TOKENIZER.value, _SIDE.value)


def _folders(source: Source, options: list[sampler.SampleOptions]) -> list[pathlib.Path]:
    names = [f"guidance_{o.guidance:g}" for o in options]
    if _OUT.value:
        out = pathlib.Path(_OUT.value).expanduser()
        return [out] if len(options) == 1 else [out / name for name in names]
    if _WORKDIR.value is None:
        raise ConfigError("--out is missing; with --checkpoint it must be a folder")
    base = pathlib.Path(_WORKDIR.value).expanduser() / "sampled"
    return [base / f"step_{source.about['step']:07d}-{name}" for name in names]


def run() -> None:
    """What the flags say.

    Raises:
        ConfigError, DataError: one line.
    """
    for flag in (_NUM, _BATCH):
        if flag.value < 1:
            raise ConfigError(f"--{flag.name} is {flag.value}; it must be 1 or more")
    if _SIZE.value < 0:
        raise ConfigError(f"--resize is {_SIZE.value}; it must be 0 (as decoded) or more")
    if not 0 <= _SEED.value < 2**32:
        raise ConfigError(f"--seed is {_SEED.value}; it must be 0 to {2**32 - 1}")
    if not _GUIDANCE.value:
        raise ConfigError("--guidance is empty; it must be one scale or several: 1.0,2.0")
    index, count = cli.share(_INDEX.value, _COUNT.value)
    options = [_options(text) for text in _GUIDANCE.value]
    source = _source()
    config = source.config
    if not config.has_null_class and any(o.guidance > 1 for o in options):
        raise ConfigError("--guidance is above 1; a generator without a null class takes 1 alone")
    labels = make_labels(_LABELS.value, _NUM.value, config.num_classes, _SEED.value)
    sums = {
        "weights_sha256": pretrained.checksum(source.params),
        "tokenizer_sha256": pretrained.checksum(source.tokenizer_params),
    }
    for option, out in zip(options, _folders(source, options), strict=True):
        protocol = {
            **source.about,
            **sums,
            "num_images": _NUM.value,
            "labels": _LABELS.value,
            "seed": _SEED.value,
            **dataclasses.asdict(option),
            "resize": _SIZE.value,
            "batch_size": _BATCH.value,
        }
        job = begin(out, labels, protocol)
        if job.samples.exists():
            finish(job)  # a stop may have left its parts
            print(f"{job.samples} is there already", flush=True)
            continue
        (out / "parts").mkdir(exist_ok=True)
        mine = [k for k in range(job.num_parts) if k % count == index]
        before = sum(len(job.indices(k)) for k in mine if job.part(k).exists())
        total = sum(len(job.indices(k)) for k in mine)
        if before:
            print(f"{before:,} of {total:,} images were drawn before", flush=True)
        print(f"guidance {option.guidance:g}: {total:,} images to {out}", flush=True)
        progress = Progress(total, "images", before)
        paint = Painter(source, option, _SEED.value, _BATCH.value, _SIZE.value)
        try:
            draw(job, paint, mine, progress)
        finally:
            progress.close()
        if finish(job):
            grid = out / "grid.png"  # of 8 images or more
            print(f"written: {job.samples}" + f"; look at {grid}" * grid.exists(), flush=True)
        else:
            print("this share is done, others are not; the last to end writes samples.npz")


def main(argv: list[str]) -> None:
    interrupted = "interrupted; the same command goes on where it stopped"
    with cli.program(interrupted=interrupted):
        if len(argv) > 1:
            raise ConfigError(f"argument {argv[1]!r} is not understood; all are --flags")
        try:
            run()
        except OSError as error:
            raise DataError(f"cannot be written ({first_line(error)})") from error


if __name__ == "__main__":
    cli.run(main)
