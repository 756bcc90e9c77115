"""The samples of a run while it trains: its grid, and the class accuracy of samples at its end.

Drawing is done by all devices of all hosts, whose EMA it is; pictures are made on the first host.
"""

from typing import Any

import numpy as np
from jax.sharding import Mesh

from mirai_jax.models import batched
from mirai_jax.sampling.classifier import class_accuracy, fit_classifier
from mirai_jax.sampling.keys import CLASSIFIED, GRID
from mirai_jax.sampling.on_mesh import Heartbeat, draw
from mirai_jax.training.components import Components, labelled_images
from mirai_jax.utils import pictures


def decode(components: Components, codes_NxL: np.ndarray) -> np.ndarray:
    """uint8 images (N, H, W, C)."""
    return batched.decode_codes(components.tokenizer, components.tokenizer_params, codes_NxL)


def grid_codes(components: Components, mesh: Mesh, ema: Any, heartbeat: Heartbeat) -> np.ndarray:
    """Codes of the run's grid: always the same classes and keys, so that grids can be compared."""
    run = components.settings
    labels = np.repeat(np.arange(run.sample_classes, dtype=np.int32), run.sample_per_class)
    return draw(run.generator, run.sample, run.seed, mesh, ema, labels, GRID, heartbeat)


def grid_picture(components: Components, codes_NxL: np.ndarray) -> np.ndarray:
    """uint8 (height, width, 3): a row a class."""
    names = components.class_names[: components.settings.sample_classes]
    return pictures.sample_grid(decode(components, codes_NxL), names)


def judged_codes(components: Components, mesh: Mesh, ema: Any, heartbeat: Heartbeat) -> np.ndarray:
    """Codes of `judged_samples` images, of class 0, 1, 2 and so on."""
    run, labels = components.settings, _judged_labels(components)
    return draw(run.generator, run.sample, run.seed, mesh, ema, labels, CLASSIFIED, heartbeat)


def judge_samples(components: Components, codes_NxL: np.ndarray) -> dict[str, float]:
    """Class accuracy of the samples by a classifier of the real images, and of real images by it."""
    classifier = fit_classifier(components.images.images, components.images.labels)
    asked, images = _judged_labels(components), decode(components, codes_NxL)
    result = {"samples": class_accuracy(classifier, images, asked)}
    real = labelled_images(components.settings, "held_out")
    if len(real.labels):
        tokenizer = components.tokenizer, components.tokenizer_params
        again = decode(components, batched.encode_images(*tokenizer, real.images))
        result["real"] = class_accuracy(classifier, real.images, real.labels)
        result["real_through_tokenizer"] = class_accuracy(classifier, again, real.labels)
    return result


def _judged_labels(components: Components) -> np.ndarray:
    settings = components.settings
    return np.arange(settings.judged_samples, dtype=np.int32) % settings.generator.num_classes
