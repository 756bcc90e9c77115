"""Figures of evaluations and assessments."""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mirai_jax.evaluation import future, future_runs
from mirai_jax.evaluation.drawn import SWEPT
from mirai_jax.utils import pictures


def sweep_figure(
    path: pathlib.Path, rows: Sequence[dict[str, Any]], titles: Mapping[str, str]
) -> None:
    """Distance against the swept option, and precision against recall; a star on the least distance.

    Samples whose protocols differ only in that option form a curve; its label holds the fields in which
    the curves differ.
    """
    option = swept(rows)
    curves = _curves(sorted(rows, key=lambda row: row["protocol"][option]), option)
    names = list(rows[0]["metrics"])
    precision = next((n for n in names if n.endswith("precision")), None)
    recall = next((n for n in names if n.endswith("recall")), None)
    figure, axes = pictures.subplots(1, 2 if precision else 1, figsize=(11, 4.5))
    axes = np.atleast_1d(axes)
    for label, curve in curves.items():
        scales = [row["protocol"][option] for row in curve]
        axes[0].plot(scales, [row["metrics"][names[0]] for row in curve], "o-", label=label)
        if precision:
            across = [row["metrics"][recall] for row in curve]
            up = [row["metrics"][precision] for row in curve]
            axes[1].plot(across, up, "o-", label=label)
            for x, y, scale in zip(across, up, scales, strict=True):
                axes[1].annotate(f"{scale:g}", (x, y), xytext=(5, 5), textcoords="offset points")
    best = min(rows, key=lambda row: row["metrics"][names[0]])
    stars = [(best["protocol"][option], best["metrics"][names[0]])]
    stars += [(best["metrics"][recall], best["metrics"][precision])] if precision else []
    for axis, star in zip(axes, stars, strict=True):
        axis.plot(*star, "*", color="black", markersize=16, zorder=3)
    axes[0].set(xlabel=SWEPT[option], ylabel=titles[names[0]], title="Distance: less is better")
    if len(curves) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    if precision:
        axes[1].set(
            xlabel=titles[recall],
            ylabel=titles[precision],
            title=f"Each point: a {SWEPT[option]}",
        )
    for axis in axes:
        axis.grid(alpha=0.3)
    pictures.save_figure(path, figure)


def swept(rows: Sequence[dict[str, Any]]) -> str:
    """The option of the sampler with the most values; '' where each has one, or some row none."""
    counts = {}
    for option in SWEPT:
        values = {row["protocol"].get(option) for row in rows}
        counts[option] = 0 if None in values else len(values)
    most = max(counts, key=counts.__getitem__)
    return most if counts[most] > 1 else ""


def _curves(rows: Sequence[dict[str, Any]], option: str) -> dict[str, list[dict[str, Any]]]:
    """{label: rows whose protocols differ only in the option}."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        rest = {k: v for k, v in row["protocol"].items() if k != option}
        found.setdefault(json.dumps(rest, sort_keys=True), []).append(row)
    protocols = [json.loads(key) for key in found]
    names = [n for n in dict.fromkeys(itertools.chain(*protocols)) if not n.endswith("_sha256")]
    differing = [n for n in names if len({json.dumps(p.get(n)) for p in protocols}) > 1]
    labels = [", ".join(f"{n} {p[n]}" for n in differing if n in p) for p in protocols]
    labels = [
        label if label and labels.count(label) == 1 else f"{label} ({i})".strip()
        for i, label in enumerate(labels, 1)
    ]
    return dict(zip(labels, found.values(), strict=True))


def _unseen(names: Sequence[str], values_TxN: np.ndarray) -> np.ndarray:
    """The values of the targets that a state has not seen; the others come first."""
    return values_TxN[sum(name in future.SEEN for name in names) :]


def future_figure(path: pathlib.Path, runs: Mapping[str, dict[str, Any]]) -> None:
    """What states know of the future: target x block, for each kind, weights and run.

    A kind has one colour scale, up to the best of what is not seen yet.

    Args:
        path: of the PNG.
        runs: {name: a line of future.jsonl}. Several stand side by side.
    """
    kinds = future_runs.kinds(*runs.values())
    weights = future_runs.WEIGHTS
    parts = {
        (kind, w, name): future_runs.shown(run, w, kind)
        for kind, w, (name, run) in itertools.product(kinds, weights, runs.items())
    }
    shape = (len(kinds), len(weights)) if len(runs) == 1 else (len(kinds) * len(weights), len(runs))
    rows, columns = next(iter(parts.values()))[1].shape
    size = 2.5 + shape[1] * (0.42 * columns + 0.3), shape[0] * (0.28 * rows + 0.9)
    figure, axes = pictures.subplots(*shape, figsize=size, sharey=True, squeeze=False)
    axes = axes.reshape(len(kinds), -1)
    for kind, of_kind in zip(kinds, axes, strict=True):
        found = {key[1:]: part for key, part in parts.items() if key[0] == kind}
        most = max(_unseen(*part).max() for part in found.values())
        for axis, ((w, name), (names, values)) in zip(of_kind, found.items(), strict=True):
            image = axis.imshow(values, vmin=0, vmax=most, aspect="auto", cmap="viridis")
            for (row, column), value in np.ndenumerate(values):
                colour = "black" if value > 0.6 * most else "white"
                text = f"{value:.2f}".replace("0.", ".")
                axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
            axis.axhline(len(names) - len(_unseen(names, values)) - 0.5, color="white", linewidth=3)
            axis.set_yticks(range(len(names)), [future.TITLES[name] for name in names])
            axis.set_xticks(range(values.shape[1]))
            axis.set_title(f"{name}\n{kind}, {weights[w]}", fontsize=9)
        label = f"{future_runs.SHOWN[kind][1]}, held out"
        figure.colorbar(image, ax=list(of_kind), label=label, extend="max", pad=0.01)
    for axis in axes.reshape(shape)[-1]:
        axis.set_xlabel("block (0: embedding)")
    pictures.save_figure(path, figure)
