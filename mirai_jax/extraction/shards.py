"""Writes the shards of an extraction, and at the end its report and its manifest."""

import contextlib
import dataclasses
import json
from typing import Any

from mirai_jax.data import folders, manifest, records
from mirai_jax.data.manifest import Manifest, Shard
from mirai_jax.extraction import pictures
from mirai_jax.extraction.encode import encoded_batches
from mirai_jax.extraction.job import PARTS, ExtractionJob
from mirai_jax.utils import files
from mirai_jax.utils.errors import DataError
from mirai_jax.utils.locks import FolderLock
from mirai_jax.utils.progress import Progress
from mirai_jax.weights import pretrained

_REPORT = "report.json"


def run(
    job: ExtractionJob, process_index: int, process_count: int, reconstructions: int
) -> Manifest | None:
    """Writes this host's shards; the last host to end also writes the report and the manifest.

    Args:
        process_index, process_count: this host takes every process_count-th shard.
        reconstructions: how many images reconstructions.png shows; 0: it is not drawn. It needs the
            images and the tokenizer's weights.

    Returns:
        The final manifest, or None while other hosts have shards to write.

    Raises:
        DataError: an image cannot be read, or a finished folder has lost a file.
        OSError: the folder cannot be written.
    """
    if job.manifest.complete:
        _check_whole(job)
        return job.manifest
    reconstructions *= job.images is not None and job.module is not None
    mine = list(range(process_index, job.num_shards, process_count))
    total = sum(len(job.indices(k)) for k in mine)
    before = sum(len(job.indices(k)) for k in mine if job.part(k) is not None)
    if before:
        print(f"{before:,} of {total:,} images were done before", flush=True)
    lock, progress = FolderLock(job.out, f"lock-{process_index}"), Progress(total, "images", before)
    with lock.held(), contextlib.closing(progress):
        write_shards(job, mine, progress, reconstructions)
    final = finish(job)
    if final is not None and reconstructions:
        pictures.draw_reconstructions(job, list(range(job.num_shards)), reconstructions)
    return final


def write_shards(
    job: ExtractionJob, shards: list[int], progress: Progress, reconstructions: int = 0
) -> None:
    """Writes those of the shards that are not finished; after the first, draws reconstructions."""
    todo = [k for k in shards if job.part(k) is None]
    packed, part, done = [], {"failed": [], "notes": {}}, 0
    for k, batch, codes in encoded_batches(job, todo):
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
            path = None
            if k == todo[0] and reconstructions:
                path = pictures.draw_reconstructions(job, [k], reconstructions)
            if path is not None:
                print(f"look at {path}: each image above what its codes decode to", flush=True)
            packed, part, done = [], {"failed": [], "notes": {}}, 0


def _finish_shard(job: ExtractionJob, k: int, packed: list[bytes], part: dict[str, Any]) -> None:
    """Writes shard k and then its part file; without that file the shard does not count."""
    path = job.out / job.shard_name(k)
    job.part_file(k).unlink(missing_ok=True)
    records.write_shard(path, packed)
    part |= {"name": path.name, "records": len(packed), "sha256": pretrained.sha256_of_file(path)}
    files.write_text(job.part_file(k), _json(part))


def finish(job: ExtractionJob) -> Manifest | None:
    """Writes report.json and the final manifest if the shards of all hosts are finished."""
    parts = [job.part(k) for k in range(job.num_shards)]
    if not all(parts):
        return None
    failed = [entry for part in parts for entry in part["failed"]]
    notes: dict[str, list[str]] = {}
    for part in parts:
        for note, keys in part["notes"].items():
            notes.setdefault(note, []).extend(keys)
    report = {
        "failed": failed,
        "skipped": list((job.images if job.codes is None else job.codes).skipped),
        "notes": notes,
    }
    files.write_text(job.out / _REPORT, _json(report))
    final = dataclasses.replace(
        job.manifest,
        complete=True,
        num_records=sum(part["records"] for part in parts),
        num_failed=len(failed),
        shards=tuple(Shard(p["name"], p["records"], p["sha256"]) for p in parts),
    )
    manifest.write(job.out, final)
    files.remove_tree(job.out / PARTS)  # another host may be removing it, too
    for left in job.out.glob("*.tmp"):  # of writers that were killed
        left.unlink(missing_ok=True)
    return final


def _check_whole(job: ExtractionJob) -> None:
    """Raises DataError unless a finished folder still holds its shards and its report."""
    wanted = [*(shard.name for shard in job.manifest.shards), _REPORT]
    if missing := [name for name in wanted if not (job.out / name).is_file()]:
        raise DataError(
            f"{job.out} was finished, but {missing[0]} is missing now; remove its manifest.json and "
            "shards to extract again"
        )


def summary(job: ExtractionJob, final: Manifest) -> str:
    """What a finished folder holds, in one line."""
    size = sum((job.out / shard.name).stat().st_size for shard in final.shards)
    text = (
        f"{final.num_records:,} images in {len(final.shards)} shards, {size:,} bytes"
        f" ({size / max(1, final.num_records):,.0f} an image)"
    )
    report = json.loads((job.out / _REPORT).read_text())
    text += f"; {final.num_failed} images failed"
    for entry in report["failed"][:1]:
        text += f" (such as {entry['key']}: {entry['reason']})"
    for name, keys in (("other files skipped", report["skipped"]), *report["notes"].items()):
        text += f"; {name}: {len(keys)}" if keys else ""
    if line := folders.surprise(final.class_names):
        text += f"; {line}"
    return f"{text}; every name: {job.out / _REPORT}"


def _json(tree: Any) -> str:
    return json.dumps(tree, indent=1) + "\n"
