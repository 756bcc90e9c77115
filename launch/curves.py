"""The figure of a sweep: cross-entropy over the steps, and the final numbers of each setting."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch import tables
from launch.tables import Result
from mirai_jax.utils import files

# Twelve distinguishable colours, then other line styles.
_COLOURS = (
    "#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#b8860b",
    "#17becf", "#8b0000", "#66a61e", "#555555", "#4b0082", "#bc8f8f",
)  # fmt: skip
_LINES = ("-", "--", ":", "-.")
_TITLES = {"cross_entropy": "Final cross-entropy (nats)", "agreement": "Agreement (%)"}


def _look(i: int) -> dict[str, str]:
    """Colour and line style of the i-th setting."""
    count = len(_COLOURS)
    return {"color": _COLOURS[i % count], "linestyle": _LINES[i // count % len(_LINES)]}


def _label(setting: str) -> str:
    return textwrap.fill(setting, 36) or "all runs"


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
        steps = min((r.steps for r in group), key=len)  # how far all seeds are
        curves = np.stack([smooth(r.cross_entropies, width)[: len(steps)] for r in group])
        mean, colour = curves.mean(0), _look(i)["color"]
        axis.plot(steps, mean, label=_label(setting), linewidth=1.6, **_look(i))
        axis.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.15, lw=0)
        lowest.append(curves.min())
        early.append(mean[len(steps) // 5])
    averaged = f", mean over {width // 2 * 2 + 1} logged steps" if width > 1 else ""
    axis.set(xlabel="step", title=f"Next-token cross-entropy (nats){averaged}")
    if lowest:  # the fall of the first steps would hide the later differences
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
    axis.set(title=_TITLES[measure], yticks=range(len(settings)), yticklabels=[])
    axis.set_ylim(len(settings) - 0.5, -0.5)  # the first setting on top


def draw(path: pathlib.Path, title: str, results: Sequence[Result]) -> None:
    """Draws the results, in the sweep's order, into the PNG at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings = tables.settings(results)
    measures = [m for m in _TITLES if any(m in r.values for r in results)]
    count, height = len(measures), max(5, 1.5 + 0.4 * len(settings))
    layout = {"width_ratios": [1.6] + [1] * count, "layout": "constrained", "squeeze": False}
    figure, ((left, *ends),) = plt.subplots(1, 1 + count, figsize=(8 + 4 * count, height), **layout)
    seeds = max(map(len, settings.values()))
    figure.suptitle(title + (f": mean and range of {seeds} seeds" if seeds > 1 else ""))
    _draw_curves(left, settings)
    for axis, measure in zip(ends, measures, strict=True):
        _draw_ends(axis, measure, settings)
    if ends:
        ends[0].set_yticklabels([_label(setting) for setting in settings], fontsize="small")
    for axis in (left, *ends):
        axis.grid(alpha=0.3)
    with files.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
