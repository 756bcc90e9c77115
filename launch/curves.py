"""The figure of a sweep: cross-entropy over the steps, and what each setting ends with."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch import tables
from launch.tables import Result
from mirai_jax.utils import files

# Twelve colours that stay apart; after them the lines change.
_COLOURS = (
    "#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#b8860b",
    "#17becf", "#8b0000", "#66a61e", "#555555", "#4b0082", "#bc8f8f",
)  # fmt: skip
_LINES = ("-", "--", ":", "-.")
_TITLES = {"cross_entropy": "Final cross-entropy (nats)", "agreement": "Agreement (%)"}
_WIDEST = 36  # letters in a line of a label


def _look(i: int) -> dict[str, str]:
    """Colour and line of the i-th setting."""
    count = len(_COLOURS)
    return {"color": _COLOURS[i % count], "linestyle": _LINES[i // count % len(_LINES)]}


def _label(setting: str) -> str:
    return "\n".join(textwrap.wrap(setting, _WIDEST)) or "all runs"


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over about `width` values around each, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index, half = np.arange(len(values)), width // 2
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _draw_curves(axis: Any, settings: Mapping[str, list[Result]]) -> None:
    width = max(len(r.steps) for group in settings.values() for r in group) // 20
    lowest, early = [], []
    for i, (setting, group) in enumerate(settings.items()):
        group = [r for r in group if len(r.steps)]
        if not group:
            continue
        count = min(len(r.steps) for r in group)  # as far as all seeds are
        steps = min((r.steps for r in group), key=len)
        curves = np.stack([smooth(r.cross_entropies, width)[:count] for r in group])
        mean = curves.mean(0)
        axis.plot(steps, mean, label=_label(setting), linewidth=1.6, **_look(i))
        if len(group) > 1:
            band = {"color": _look(i)["color"], "alpha": 0.15, "linewidth": 0}
            axis.fill_between(steps, curves.min(0), curves.max(0), **band)
        lowest.append(curves.min())
        early.append(mean[count // 5])
    averaged = f", mean over {width // 2 * 2 + 1} logged steps" if width > 1 else ""
    axis.set(xlabel="step", title=f"Next-token cross-entropy (nats){averaged}")
    if lowest:  # the fall of the first steps would hide how the rest differs
        margin = 0.05 * (max(early) - min(lowest)) or 0.05
        axis.set_ylim(min(lowest) - margin, max(early) + margin)
        if len(settings) <= len(_COLOURS):
            axis.legend(loc="upper right", fontsize="small")


def _draw_ends(axis: Any, measure: str, settings: Mapping[str, list[Result]]) -> None:
    scale = 100 if measure == "agreement" else 1
    for i, group in enumerate(settings.values()):
        values = [scale * r.values[measure] for r in group if measure in r.values]
        colour = _look(i)["color"]
        axis.plot(values, [i] * len(values), "o", color=colour, alpha=0.6)
        if len(values) > 1:
            axis.plot([np.mean(values)], [i], "|", color=colour, markersize=20, markeredgewidth=2.5)
    axis.set(title=_TITLES[measure], yticks=range(len(settings)))
    axis.set_ylim(len(settings) - 0.5, -0.5)  # the first on top


def draw(path: pathlib.Path, title: str, results: Sequence[Result]) -> None:
    """Writes the figure.

    Args:
        path: the PNG.
        title: of the sweep.
        results: one a run, in the sweep's order.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings = tables.settings(results)
    measures = [m for m in _TITLES if any(m in r.values for r in results)]
    figure, axes = plt.subplots(
        1,
        1 + len(measures),
        figsize=(8 + 4 * len(measures), max(5, 1.5 + 0.4 * len(settings))),
        width_ratios=[1.6] + [1] * len(measures),
        layout="constrained",
    )
    axes = np.atleast_1d(axes)
    seeds = max(map(len, settings.values()))
    figure.suptitle(title + (f": mean and range of {seeds} seeds" if seeds > 1 else ""))
    _draw_curves(axes[0], settings)
    for i, (axis, measure) in enumerate(zip(axes[1:], measures, strict=True)):
        _draw_ends(axis, measure, settings)
        labels = [_label(setting) for setting in settings] if i == 0 else []
        axis.set_yticklabels(labels, fontsize="small")
        for j, label in enumerate(axis.get_yticklabels()):
            label.set_color(_look(j)["color"])
    for axis in axes:
        axis.grid(alpha=0.3)
    with files.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
