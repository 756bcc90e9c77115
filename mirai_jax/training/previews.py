"""The samples of a run while it trains: its grid, and the class accuracy of samples at its end.

Drawing is done by all devices of all hosts, whose EMA it is; pictures are made on the first host.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mirai_jax.models import batched
from mirai_jax.sampling.classifier import agreement, fit_judge
from mirai_jax.sampling.on_mesh import GRID, JUDGED, draw
from mirai_jax.training.components import Parts, labelled_images
from mirai_jax.utils import pictures

Doing = Callable[[str], None]  # takes what the run is at


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
    return pictures.sample_grid(decode(parts, codes_NxL), names)


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
