"""What the page knows of measures: their titles, units and directions; and the paper's FID."""

import fnmatch
import functools
import re
from typing import NamedTuple

TRAINING, QUALITY, SPEED, OTHER = "Training", "Validation and samples", "Speed", "Other"


class Measure(NamedTuple):
    """How a measure is shown. `{}` of the title is what `*` of its name stands for.

    `better` is 'less', 'more', or '' where neither is; `place` its place on the page.
    """

    title: str
    unit: str
    better: str
    section: str
    place: int = 0


_SHARE, _NATS, _BOTH = "share, 0 to 1", "nats a token", "minus cosine; tokens: nats"
_LITE = "(EfficientNet-Lite0, not FID)"
KNOWN = {  # in the order of the page; of several patterns the first that fits
    "loss": ("Loss", "weighted sum of all terms", "less", TRAINING),
    "cross_entropy": ("Next-token cross-entropy", _NATS, "less", TRAINING),
    "foresight_*": ("Foresight {}, unweighted", _BOTH, "less", TRAINING),
    "psnr": ("PSNR of batches", "dB", "more", TRAINING),
    "codebook_use": ("Share of codes in use", _SHARE, "more", TRAINING),
    "accuracy": ("Accuracy on batches", _SHARE, "more", TRAINING),
    "*_psnr": ("PSNR, {}", "dB", "more", QUALITY),
    "*_codebook_use": ("Share of codes in use, {}", _SHARE, "more", QUALITY),
    "class_accuracy": ("Class accuracy of samples", _SHARE, "more", QUALITY),
    "*_accuracy": ("Accuracy, {}", _SHARE, "more", QUALITY),
    "validation_cross_entropy": ("Validation cross-entropy", _NATS, "less", QUALITY),
    "validation_foresight_*": ("Validation, foresight {}", _BOTH, "less", QUALITY),
    "validation_seconds": ("Time of a validation", "seconds", "less", SPEED),
    "evaluation_seconds": ("Time of an evaluation", "seconds", "less", SPEED),
    "validation_*": ("Validation, {}", "loss", "less", QUALITY),
    "held_out_cross_entropy": ("Held-out cross-entropy of the EMA", _NATS, "less", QUALITY),
    "held_out_frechet_*": ("Fréchet distance, held out, {} (not FID)", "distance", "less", QUALITY),
    "held_out_*_loss": ("Held-out {} loss", "loss", "less", QUALITY),
    "held_out_*": ("Held-out {}", "value", "", QUALITY),
    "fid": ("FID", "distance", "less", QUALITY),
    "frechet": (f"Fréchet distance to reconstructions {_LITE}", "distance", "less", QUALITY),
    "frechet_efficientnet_lite0": (
        f"Fréchet distance to images {_LITE}",
        "distance",
        "less",
        QUALITY,
    ),
    "real_frechet_images": (f"Fréchet distance of real images {_LITE}", "distance", "", QUALITY),
    "frechet_*": ("Fréchet distance, {} (not FID)", "distance", "less", QUALITY),
    "sfid": ("sFID", "distance", "less", QUALITY),
    "inception_score": ("Inception Score", "score", "more", QUALITY),
    "precision": ("Precision", _SHARE, "more", QUALITY),
    "recall": ("Recall", _SHARE, "more", QUALITY),
    "*_precision": ("Precision, {}", _SHARE, "more", QUALITY),
    "*_recall": ("Recall, {}", _SHARE, "more", QUALITY),
    "teacher_probe": ("Linear probe of the teacher", _SHARE, "more", QUALITY),
    "images_per_second": ("Speed of training", "images/s", "more", SPEED),
    "wait_share": ("Wait for data", "share of the time, 0 to 1", "less", SPEED),
    "grad_norm": ("Gradient norm before clipping", "norm", "", OTHER),
    "learning_rate": ("Learning rate", "an update", "", OTHER),
    "skipped": ("Updates left out so far", "count", "less", OTHER),
}


@functools.cache
def describe(name: str) -> Measure:
    """A measure by its name in the files; what is not known stands under 'Other'."""
    for place, (pattern, (title, *rest)) in enumerate(KNOWN.items()):
        if fnmatch.fnmatchcase(name, pattern):
            before, _, after = pattern.partition("*")
            words = name[len(before) : len(name) - len(after)].replace("_", " ")
            return Measure(title.format(words), *rest, place)
    return Measure(name.replace("_", " "), "value", "", OTHER, len(KNOWN))


@functools.cache
def split_guidance(name: str) -> tuple[str, dict[str, float]]:
    """('fid', {'guidance': 2.0}) of fid_guidance_2; a name without guidance as it is, with {}."""
    found = re.fullmatch(r"(.+)_guidance_(\d+(?:\.\d+)?)", name)
    return (found[1], {"guidance": float(found[2])}) if found else (name, {})


# The paper's FID-50K on ImageNet 256, read off its figure (+-0.03); at epoch 300, its system table.
_EPOCHS, _IMAGES = (20, 40, 60, 80, 300), 1_281_167
_PUBLISHED = {
    ("B", "LlamaGen"): (9.95, 7.33, 6.64, 6.36, 5.34),
    ("B", "Mirai-I"): (6.90, 5.24, 4.93, 4.77, 4.34),
    ("B", "Mirai-E"): (9.39, 6.49, 5.72, 5.22, 4.49),
    ("L", "LlamaGen"): (5.88, 4.49, 4.09, 3.98, 3.73),
    ("L", "Mirai-I"): (4.03, 3.46, 3.30, 3.28, 3.07),
    ("L", "Mirai-E"): (5.59, 4.07, 3.69, 3.60, 3.29),
    ("XL", "LlamaGen"): (4.40, 3.73, 3.62, 3.60, 3.16),
    ("XL", "Mirai-I"): (3.31, 3.26, 3.22, 3.12, 2.59),
    ("XL", "Mirai-E"): (4.24, 3.48, 3.44, 3.32, 2.76),
}


def published_fid(scale: str, batch_size: int) -> dict[str, tuple[list[int], tuple[float, ...]]]:
    """{title: (steps, FID)} of the paper's runs of an ImageNet scale of 256 pixels; {} of any other."""
    steps = [epoch * (_IMAGES // batch_size) for epoch in _EPOCHS]
    of_scale = {k: v for k, v in _PUBLISHED.items() if f"imagenet_{k[0].lower()}" == scale}
    return {f"{name}, {size}": (steps, values) for (size, name), values in of_scale.items()}
