"""Figures of an evaluation."""

import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mirai_jax.utils import pictures


def sweep_figure(
    path: pathlib.Path, rows: Sequence[dict[str, Any]], titles: Mapping[str, str]
) -> None:
    """Distance against guidance, and precision against recall, of samples at several scales.

    Samples whose protocols differ only in the scale form a curve; its label holds the fields in which
    the curves differ.
    """
    curves = _curves(sorted(rows, key=lambda row: row["protocol"]["guidance"]))
    names = list(rows[0]["metrics"])
    precision = next((n for n in names if n.endswith("precision")), None)
    recall = next((n for n in names if n.endswith("recall")), None)
    figure, axes = pictures.subplots(1, 2 if precision else 1, figsize=(11, 4.5))
    axes = np.atleast_1d(axes)
    for label, curve in curves.items():
        scales = [row["protocol"]["guidance"] for row in curve]
        axes[0].plot(scales, [row["metrics"][names[0]] for row in curve], "o-", label=label)
        if precision:
            across = [row["metrics"][recall] for row in curve]
            up = [row["metrics"][precision] for row in curve]
            axes[1].plot(across, up, "o-", label=label)
            for x, y, scale in zip(across, up, scales, strict=True):
                axes[1].annotate(f"{scale:g}", (x, y), xytext=(5, 5), textcoords="offset points")
    axes[0].set(xlabel="guidance scale", ylabel=titles[names[0]], title="Distance: less is better")
    if len(curves) > 1:
        axes[0].legend(fontsize="small")
    if precision:
        axes[1].set(
            xlabel=titles[recall], ylabel=titles[precision], title="Each point: a guidance scale"
        )
    for axis in axes:
        axis.grid(alpha=0.3)
    pictures.save_figure(path, figure)


def _curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """{label: rows whose protocols differ only in the guidance}."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        rest = {k: v for k, v in row["protocol"].items() if k != "guidance"}
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
