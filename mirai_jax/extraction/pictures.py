"""reconstructions.png: images above the pictures that their stored codes decode to."""

import pathlib

import numpy as np
from array_record.python import array_record_module

from mirai_jax.data import records
from mirai_jax.data.crops import load_crop
from mirai_jax.extraction.job import ExtractionJob
from mirai_jax.models import batched
from mirai_jax.utils import pictures


def draw_reconstructions(job: ExtractionJob, shards: list[int], count: int) -> pathlib.Path | None:
    """Draws up to `count` images, evenly spread over the shards; None if the shards hold none."""
    readers = [
        array_record_module.ArrayRecordReader(str(job.out / job.shard_name(k))) for k in shards
    ]
    try:
        places = [(r, i) for r in readers for i in range(r.num_records())]
        chosen = np.unique(np.linspace(0, len(places) - 1, min(count, len(places))).astype(int))
        packed = [places[n][0].read([places[n][1]])[0] for n in chosen] if places else []
    finally:
        for reader in readers:
            reader.close()
    if not packed:
        return None
    found = [records.unpack_record(raw) for raw in packed]
    spec = job.manifest.crops
    centre = spec.count // 2 - 1  # the last of the upright half
    originals = np.stack([load_crop(job.images.find(r["key"]), centre, spec) for r in found])
    codes = np.stack([r["codes"][centre] for r in found])
    decoded = batched.decode_codes(job.module, job.params, codes.astype(np.int32))
    path = job.out / "reconstructions.png"
    both = np.concatenate([originals, decoded])
    pictures.save_picture(path, pictures.sample_grid(both, ("image", "from its codes"), side=128))
    return path
