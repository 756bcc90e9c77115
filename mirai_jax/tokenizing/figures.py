"""The figure of a tokenizer's run, drawn at its end."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mirai_jax.utils import pictures

_PANELS = {"psnr": "PSNR (dB)", "codebook_use": "Share of codes in use"}


def tokenizer_figure(
    path: pathlib.Path, title: str, metrics: Sequence[dict[str, Any]], picture: np.ndarray
) -> None:
    """A run of `mirai_jax.tokenize` at a glance: reconstruction, PSNR and use by step, and a picture."""
    figure, axes = pictures.subplots(1, 4, figsize=(18, 4.5), width_ratios=(1, 1, 1, 1.6))
    figure.suptitle(title)

    def curve(axis: Any, name: str, line: str, label: str) -> None:
        points = [(entry["step"], entry[name]) for entry in metrics if name in entry]
        if points:
            axis.plot(*zip(*points, strict=True), line, label=label)

    curve(axes[0], "reconstruction_loss", "-", "reconstruction")
    axes[0].set(title="Reconstruction loss", yscale="log")
    for axis, (name, text) in zip(axes[1:], _PANELS.items(), strict=False):
        curve(axis, name, "-", "a batch" if name == "psnr" else "since the last log")
        curve(axis, f"held_out_{name}", "o-", "held-out images")
        axis.set(title=text)
        axis.legend()
    axes[2].set_ylim(0, 1.05)
    for axis in axes[:3]:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[3].imshow(picture)
    axes[3].set_axis_off()
    pictures.save_figure(path, figure)
