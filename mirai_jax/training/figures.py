"""The figure of a run, drawn at its end."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mirai_jax.utils import pictures


def summary_figure(
    path: pathlib.Path, title: str, metrics: Sequence[dict[str, Any]], grid_HxWx3: np.ndarray | None
) -> None:
    """The run at a glance: cross-entropy and foresight losses by step, and the last samples."""
    steps = [entry["step"] for entry in metrics]
    heads = [k for k in (metrics[-1] if metrics else {}) if k.startswith("foresight_")]
    curves = 1 + bool(heads)
    count = curves + (grid_HxWx3 is not None)
    figure, axes = pictures.subplots(1, count, figsize=(5 * count, 5))
    axes = np.atleast_1d(axes)
    figure.suptitle(title)
    axes[0].plot(steps, [entry["cross_entropy"] for entry in metrics])
    axes[0].set(title="Next-token cross-entropy (nats)", xlabel="step")
    axes[0].set_ylim(bottom=0)
    if heads:
        for head in heads:
            # 0 stands for a term that has not started.
            values = [entry.get(head) or float("nan") for entry in metrics]
            axes[1].plot(steps, values, label=head.removeprefix("foresight_"))
        axes[1].set(title="Foresight losses, unweighted", xlabel="step")
        axes[1].legend()
    for axis in axes[:curves]:
        axis.grid(alpha=0.3)
    if grid_HxWx3 is not None:
        axes[-1].imshow(grid_HxWx3)
        axes[-1].set_title("Samples of the EMA, one class a row")
        axes[-1].axis("off")
    pictures.save_figure(path, figure)
