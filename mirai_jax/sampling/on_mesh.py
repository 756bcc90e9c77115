"""Drawing tokens with all devices of all hosts, over which the parameters may be sharded."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mirai_jax import sharding
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.sampling import sampler
from mirai_jax.sampling.sampler import SampleOptions
from mirai_jax.utils import distributed

Heartbeat = Callable[[str], None]  # takes what the run is at

GRID, JUDGED, ASSESSED = 1, 2, 3  # purposes: each has keys of its own


@functools.partial(jax.jit, static_argnums=(0, 1))
def _keys(seed: int, purpose: int, indices: jax.Array) -> jax.Array:
    return sampler.image_keys(jax.random.fold_in(jax.random.key(seed), purpose), indices)


def draw(
    config: GeneratorConfig,
    options: SampleOptions,
    seed: int,
    mesh: Mesh,
    params: Any,
    labels: np.ndarray,
    purpose: int,
    heartbeat: Heartbeat = lambda what: None,
    chunk: int = 250,
) -> np.ndarray:
    """int32 codes (N, L) of the labels, on every host; image i depends on seed, `purpose`, i alone.

    All processes must ask. `params` are on the mesh; `heartbeat` is told of each chunk.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    chunk = -(-min(chunk, len(labels)) // ways) * ways
    rows = sharding.batch_sharding(mesh)
    codes = []
    for start in range(0, len(labels), chunk):
        heartbeat(f"samples {start} to {min(start + chunk, len(labels))} of {len(labels)}")
        indices = np.arange(start, start + chunk, dtype=np.int32)
        some = np.resize(labels[start : start + chunk], chunk)  # one shape, one compilation
        with jax.set_mesh(mesh):  # so that each device holds the cache of its own images alone
            drawn = sampler.generate(
                config,
                params,
                sharding.place(some, rows),
                _keys(seed, purpose, sharding.place(indices, rows)),
                options,
            )
        codes.append(distributed.whole(drawn))
    return np.concatenate(codes)[: len(labels)]
