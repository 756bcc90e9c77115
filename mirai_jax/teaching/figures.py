"""The figure of a teacher's run, drawn at its end."""

import pathlib
from collections.abc import Sequence
from typing import Any

from mirai_jax.utils import pictures


def teacher_figure(path: pathlib.Path, title: str, metrics: Sequence[dict[str, Any]]) -> None:
    """A run of `mirai_jax.teach` at a glance: losses by step, and what it knows of held-out images."""
    figure, axes = pictures.subplots(1, 2, figsize=(11, 4.5))
    figure.suptitle(title)
    names = list(dict.fromkeys(name for entry in metrics for name in entry))
    for axis, end in zip(axes, ("_loss", "accuracy"), strict=True):
        for name in (name for name in names if name.endswith(end)):
            points = [(entry["step"], entry[name]) for entry in metrics if name in entry]
            held_out = name.startswith("held_out_")
            label = name.removesuffix("_loss").replace("_", " ")
            axis.plot(*zip(*points, strict=True), "o-" if held_out else "-", label=label)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if names:
            axis.legend()
    axes[0].set(title="Losses (nats)")
    axes[1].set(title="Accuracy", ylim=(0, 1))
    pictures.save_figure(path, figure)
