"""reconstructions.png: images above the pictures that their stored codes decode to."""

import pathlib

import grain
import numpy as np

from mirai_jax.data import records
from mirai_jax.data.crops import load_crop
from mirai_jax.extraction.job import ExtractionJob
from mirai_jax.models import batched
from mirai_jax.utils import paths, pictures


def draw_reconstructions(job: ExtractionJob, shards: list[int], count: int) -> pathlib.Path | None:
    """Draws up to `count` images, evenly spread over the shards; None if the shards hold none."""
    some = np.linspace(0, len(shards) - 1, min(count, len(shards))).astype(int)
    # No others: those of a bucket are copied.
    written = [str(paths.local(job.out / job.shard_name(shards[n]))) for n in some]
    with grain.sources.ArrayRecordDataSource(written) as source:
        if not len(source):
            return None
        chosen = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int))
        found = [records.unpack_record(source[n]) for n in chosen]
    spec = job.manifest.crops
    originals = np.stack([load_crop(job.images.find(r["key"]), spec.centre, spec) for r in found])
    codes = np.stack([r["codes"][spec.centre] for r in found])
    decoded = batched.decode_codes(job.module, job.params, codes.astype(np.int32))
    path = job.out / "reconstructions.png"
    both = np.concatenate([originals, decoded])
    pictures.save_picture(path, pictures.sample_grid(both, ("image", "from its codes"), side=128))
    return path
