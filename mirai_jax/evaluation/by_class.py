"""Samples class by class: the distance to real images of the class, and how many a classifier puts there.

A Fréchet distance of few images is too large, and the fewer, the larger: even real images are far from real
ones. So it is left out of a class of fewer than FEWEST, and numbers may be compared only between classes,
and runs, with equally many images.
"""

import pathlib
from typing import Any

import numpy as np

from mirai_jax.evaluation import metrics
from mirai_jax.evaluation.image_streams import ImageStream
from mirai_jax.evaluation.network import Features
from mirai_jax.sampling.classifier import fit_classifier, recognised
from mirai_jax.training import components, restore
from mirai_jax.utils import pictures
from mirai_jax.utils.errors import DataError

FEWEST = 50  # images of a class, on both sides, for a distance
_SHOWN = 40  # classes of the picture


def common_labels(samples: ImageStream, real: ImageStream) -> tuple[np.ndarray, list[str]]:
    """The samples' labels as those of the real images, and the names of all classes.

    Raises:
        DataError: images without labels, or of classes that the real ones do not have.
    """
    for stream in (samples, real):
        if stream.labels is None:
            raise DataError(f"{stream.name} has no labels, which its metrics by class need")
    labels, theirs = samples.labels, real.classes or samples.classes
    if real.classes and samples.classes and samples.classes != real.classes:
        if unknown := set(samples.classes) - set(real.classes):
            raise DataError(f"{real.name} has no class {min(unknown)!r}, which {samples.name} has")
        labels = np.array([real.classes.index(name) for name in samples.classes])[labels]
    names = list(theirs) or [str(i) for i in range(max(*labels, *real.labels) + 1)]
    if max(*labels, *real.labels) >= len(names):
        raise DataError(
            f"{samples.name} or {real.name} has class {max(*labels, *real.labels)}; there are names "
            f"of {len(names)} classes"
        )
    return labels, names


def by_class(
    labels_N: np.ndarray, fake: Any, real_labels_M: np.ndarray, real: Any, names: list[str]
) -> list[dict[str, Any]]:
    """For each class that has samples: its name, how many images of both kinds, and their distance.

    Args:
        fake, real: pooled features, (N, D) and (M, D).

    Raises:
        DataError: images were left out, so that features have no label.
    """
    if (len(labels_N), len(real_labels_M)) != (len(fake), len(real)):
        raise DataError("some images were left out: metrics by class need all of them")
    found = []
    for label in np.unique(labels_N):
        sets = [
            (features, np.flatnonzero(labels == label))
            for features, labels in ((fake, labels_N), (real, real_labels_M))
        ]
        counts = [len(where) for _, where in sets]
        row = {"class": names[label], "samples": counts[0], "reference": counts[1]}
        if min(counts) >= FEWEST:
            mine, theirs = (np.concatenate([x[i : i + 1] for i in where]) for x, where in sets)
            row["distance"] = metrics.distance_of_few(mine, theirs)
        found.append(row)
    return found


def recognised_of(spec: str, samples: ImageStream, labels_N: np.ndarray) -> np.ndarray | None:
    """Which samples a classifier assigns to their label: one of the images that data:RUN:... trained on.

    None for any other `spec`.
    """
    if not spec.startswith("data:"):
        return None
    workdir = spec.removeprefix("data:").rpartition(":")[0]
    train = components.labelled_images(restore.read_settings(spec, workdir), "train")
    classifier, parts, start = fit_classifier(train.images, train.labels), [], 0
    for images in samples.chunks(500):
        images = images[..., : train.images.shape[-1]]  # of grey images, samples have three
        parts.append(recognised(classifier, images, labels_N[start : start + len(images)]))
        start += len(images)
    return np.concatenate(parts)


def measure(
    samples: ImageStream, fake: Features, real_spec: str, real_images: ImageStream, real: Features
) -> list[dict[str, Any]]:
    """The rows of `by_class`, with 'class_accuracy' where there is a classifier."""
    labels, names = common_labels(samples, real_images)
    rows = by_class(labels, fake.pooled, real_images.labels, real.pooled, names)
    hits = recognised_of(real_spec, samples, labels)
    for row, label in zip(rows, np.unique(labels), strict=True):
        if hits is not None:
            row["class_accuracy"] = float(hits[labels == label].mean())
    return rows


def table(rows: list[dict[str, Any]], title: str) -> str:
    """As Markdown, the largest distance first; '-' for a distance of too few images."""
    lines = [f"| class | samples | reference | {title} | class accuracy |", "|---|---|---|---|---|"]
    for row in _sorted(rows):
        values = [f"{row[n]:.4g}" if n in row else "-" for n in ("distance", "class_accuracy")]
        lines.append(
            f"| {row['class']} | {row['samples']:,} | {row['reference']:,} | {' | '.join(values)} |"
        )
    return "\n".join(lines)


def figure(path: pathlib.Path, rows: list[dict[str, Any]], title: str) -> bool:
    """Bars for each class, the largest distance first; of many classes the first ones.

    Returns whether there was anything to draw.
    """
    shown = _sorted(rows)[:_SHOWN]
    titles = {"distance": title, "class_accuracy": "class accuracy"}
    titles = {n: t for n, t in titles.items() if any(n in row for row in rows)}
    if not titles:
        return False
    size = 2.5 + 4 * len(titles), 1.2 + 0.25 * len(shown)
    drawn, axes = pictures.subplots(1, len(titles), figsize=size, sharey=True, squeeze=False)
    for axis, (name, label) in zip(axes[0], titles.items(), strict=True):
        bars = axis.barh(range(len(shown)), [row.get(name, 0) for row in shown])
        texts = [f"{row[name]:.3g}" if name in row else "too few images" for row in shown]
        axis.bar_label(bars, texts, padding=3)
        axis.set(xlabel=label, xmargin=0.15, ymargin=0.01)
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(range(len(shown)), [str(row["class"])[:30] for row in shown])
    axes[0, 0].invert_yaxis()
    if len(shown) < len(rows):
        drawn.suptitle(f"{len(shown)} of {len(rows)} classes: the largest distances")
    pictures.save_figure(path, drawn)
    return True


def _sorted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    key = lambda row: (-row.get("distance", -np.inf), row.get("class_accuracy", 0))
    return sorted(rows, key=key)
