"""Drawing tokens with all devices of all hosts, over which the parameters may be sharded."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mirai_jax import sharding
from mirai_jax.models import decoding
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.sampling import keys, sampler
from mirai_jax.sampling.sampler import SampleOptions
from mirai_jax.utils import distributed

Heartbeat = Callable[[str], None]  # takes what the run is at

_keys = jax.jit(keys.image_keys, static_argnums=(0, 1))


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
    """Draws one image of tokens for each label; all processes must call it.

    Image i depends on `params`, `options`, `seed`, `purpose` and i alone.

    Args:
        params: the generator's parameters, on the mesh of all devices of all hosts.
        labels: int32 (N,).
        purpose: one of `sampling.keys`.
        heartbeat: takes a line before each chunk.

    Returns:
        int32 codes (N, L), on every host.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    chunk = -(-min(chunk, len(labels)) // ways) * ways
    rows = sharding.batch_sharding(mesh)
    codes = []
    for start in range(0, len(labels), chunk):
        heartbeat(f"samples {start} to {min(start + chunk, len(labels))} of {len(labels)}")
        indices = np.arange(start, start + chunk, dtype=np.int32)
        some = np.resize(labels[start : start + chunk], chunk)  # one shape, one compilation
        with jax.set_mesh(mesh):  # so that each device caches only its own images
            drawn = sampler.generate(
                config,
                params,
                sharding.place(some, rows),
                _keys(seed, purpose, sharding.place(indices, rows)),
                options,
                heads_in_row=decoding.heads_in_row(config, mesh.devices.flat[0].platform),
            )
        codes.append(distributed.whole(drawn))
    return np.concatenate(codes)[: len(labels)]
