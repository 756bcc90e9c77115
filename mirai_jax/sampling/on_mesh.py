"""The samples of a run while it trains: its grid, and a classifier's judgement at the end.

Drawing is done by all devices of all hosts, whose EMA it is; pictures are made on the first host.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mirai_jax import report, sharding
from mirai_jax.models import batched
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.sampling import sampler
from mirai_jax.sampling.classifier import agreement, fit_judge
from mirai_jax.sampling.sampler import SampleOptions
from mirai_jax.training.components import Parts, labelled_images
from mirai_jax.utils import distributed

Doing = Callable[[str], None]  # takes what the run is at

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
    doing: Doing = lambda what: None,
    chunk: int = 250,
) -> np.ndarray:
    """int32 codes (N, L) of the labels, on every host; image i depends on seed, `purpose`, i alone.

    All processes must ask. `params` are on the mesh; `doing` is told of each chunk.
    """
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    chunk = -(-min(chunk, len(labels)) // ways) * ways
    rows = sharding.batch_sharding(mesh)
    codes = []
    for start in range(0, len(labels), chunk):
        doing(f"samples {start} to {min(start + chunk, len(labels))} of {len(labels)}")
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


def _draw(
    parts: Parts, mesh: Mesh, ema: Any, labels: np.ndarray, purpose: int, doing: Doing
) -> np.ndarray:
    """As the run's config says."""
    settings = parts.settings
    return draw(
        settings.generator, settings.sample, settings.seed, mesh, ema, labels, purpose, doing
    )


def decode(parts: Parts, codes_NxL: np.ndarray) -> np.ndarray:
    """uint8 images (N, H, W, C)."""
    return batched.decode_codes(parts.tokenizer, parts.tokenizer_params, codes_NxL)


def grid_codes(parts: Parts, mesh: Mesh, ema: Any, doing: Doing) -> np.ndarray:
    """Codes of the run's grid: always the same classes and keys, so that grids can be compared."""
    settings = parts.settings
    labels = np.repeat(
        np.arange(settings.sample_classes, dtype=np.int32), settings.sample_per_class
    )
    return _draw(parts, mesh, ema, labels, GRID, doing)


def grid_picture(parts: Parts, codes_NxL: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3): a row a class."""
    names = parts.class_names[: parts.settings.sample_classes]
    return report.sample_grid(decode(parts, codes_NxL), names)


def judged_codes(parts: Parts, mesh: Mesh, ema: Any, doing: Doing) -> np.ndarray:
    """Codes of `judged_samples` images, of all classes in turn."""
    return _draw(parts, mesh, ema, _judged_labels(parts), JUDGED, doing)


def judge_samples(parts: Parts, codes_NxL: np.ndarray) -> dict[str, float]:
    """Agreement of a classifier of the real images with the class asked for, and its own limits."""
    settings = parts.settings
    judge = fit_judge(parts.images.images, parts.images.labels)
    result = {"samples": agreement(judge, decode(parts, codes_NxL), _judged_labels(parts))}
    held_out = labelled_images(settings, "held_out")
    if len(held_out.labels):
        codes = batched.encode_images(parts.tokenizer, parts.tokenizer_params, held_out.images)
        result["real"] = agreement(judge, held_out.images, held_out.labels)
        result["real_through_tokenizer"] = agreement(judge, decode(parts, codes), held_out.labels)
    return result


def _judged_labels(parts: Parts) -> np.ndarray:
    settings = parts.settings
    return np.arange(settings.judged_samples, dtype=np.int32) % settings.generator.num_classes
