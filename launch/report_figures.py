"""The figures of the report, the same to the byte wherever Matplotlib is the same."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from launch import report_cells as cells
from launch import speedup, study
from launch.collected import Results
from launch.study import Measure

COMPARISON, DIAGNOSTICS, PROBE = "comparison.png", "diagnostics.png", "probe.png"

# Okabe and Ito's colours, which colour-blind people tell apart; markers tell the same again.
_LOOKS = {
    "variants/llamagen": {"color": "#000000", "marker": "s", "linestyle": "-"},
    "variants/mirai_e": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "variants/mirai_i": {"color": "#D55E00", "marker": "^", "linestyle": "-"},
    "variants/mirai_e_i": {"color": "#009E73", "marker": "D", "linestyle": "--"},
}
_STYLE = {
    "font.family": "DejaVu Sans",  # comes with Matplotlib
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.markersize": 5,
    "lines.linewidth": 1.8,
}


@contextlib.contextmanager
def _style() -> Iterator[Any]:
    """Matplotlib's pyplot with its own defaults and ours, whatever the user's are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.style.context("default"), matplotlib.rc_context(_STYLE):
        yield plt


def _png(plt: Any, figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return file.getvalue()


def draw(results: Results) -> dict[str, bytes]:
    """{name: PNG} of the figures for which there is something to draw."""
    makers: dict[str, Callable[[Any, Results], Any]] = {
        COMPARISON: _comparison,
        DIAGNOSTICS: _diagnostics,
        PROBE: _probe,
    }
    with _style() as plt:
        figures = {name: make(plt, results) for name, make in makers.items()}
        return {name: _png(plt, f) for name, f in figures.items() if f is not None}


def _band(
    axis: Any, look: Mapping[str, str], name: str, values: Mapping[float, list[float]]
) -> None:
    """A curve of means, with the range of the seeds behind it."""
    spreads = {x: speedup.spread(values[x]) for x in sorted(values)}
    axis.plot(list(spreads), [s.mean for s in spreads.values()], label=name, **look)
    if any(s.count > 1 for s in spreads.values()):
        low, high = ([getattr(s, e) for s in spreads.values()] for e in ("low", "high"))
        axis.fill_between(list(spreads), low, high, color=look["color"], alpha=0.15, linewidth=0)


def _legend(figure: Any, axes: Any) -> None:
    """One for all panels, above them."""
    shown = {}
    for axis in axes:
        handles, names = axis.get_legend_handles_labels()
        shown |= dict(zip(names, handles, strict=True))
    ordered = [name for name in study.VARIANTS.values() if name in shown]
    figure.legend(
        [shown[name] for name in ordered],
        ordered,
        loc="outside upper center",
        ncols=len(ordered),
        frameon=False,
        fontsize=11,
    )


def _comparison(plt: Any, results: Results) -> Any:
    """A panel a measure: mean over seeds against the step, and the range."""
    found = {m: {v: results.curves(v, m.key) for v in study.VARIANTS} for m in study.MEASURES}
    if not any(curves for of_measure in found.values() for curves in of_measure.values()):
        return None
    figure, axes = plt.subplots(1, len(found), figsize=(13, 4.3), layout="constrained")
    for axis, (measure, of_measure) in zip(axes, found.items(), strict=True):
        for variant, curves in of_measure.items():
            values: dict[float, list[float]] = {}
            for curve in curves.values():
                for step, value in curve.items():
                    values.setdefault(step, []).append(measure.scale * value)
            if values:
                _band(axis, _LOOKS[variant], study.VARIANTS[variant], values)
        axis.set(xlabel="step", title=_title(measure))
        axis.title.set_size(10)
    _legend(figure, axes)
    return figure


def _title(measure: Measure) -> str:
    better = "lower" if measure.lower_is_better else "higher"
    return f"{measure.axis}\n({better} is better)"


def _groups(results: Results) -> dict[str, dict[str, str]]:
    """{title: {setting: name}} of what is there beside the main comparison."""
    groups = {asked.title: asked.settings for asked in study.QUESTIONS}
    for explored in study.EXPLORATIONS:
        groups[explored.title] = {s: cells.label(s) for s in results.settings(explored.sweep)}
    known = {
        title: {s: name for s, name in settings.items() if results.seeds(s)}
        for title, settings in groups.items()
    }
    return {title: settings for title, settings in known.items() if settings}


def _diagnostics(plt: Any, results: Results) -> Any:
    """A panel a measure: the final value of each run, beside lines of the main comparison."""
    groups = _groups(results)
    if not groups:
        return None
    seeds = {seed for settings in groups.values() for s in settings for seed in results.seeds(s)}
    rows = sum(1 + len(settings) for settings in groups.values())
    figure, axes = plt.subplots(
        1, len(study.MEASURES), figsize=(13, 1.6 + 0.24 * rows), layout="constrained", sharey=True
    )
    for axis, measure in zip(axes, study.MEASURES, strict=True):
        _lines(axis, results, measure, seeds)
        row = 0
        for settings in groups.values():
            for setting in settings:
                row += 1
                values = results.finals(setting, measure.key).values()
                shown = [measure.scale * value for value in values]
                axis.plot(shown, [row] * len(shown), "o", color="#CC79A7", markeredgecolor="black")
            row += 1
        axis.set_title(_title(measure), fontsize=10)
        axis.grid(axis="y", visible=False)
    ticks, row = {}, 0
    for title, settings in groups.items():
        ticks[row] = title
        for name in settings.values():
            row += 1
            ticks[row] = name
        row += 1
    axes[0].set_yticks(list(ticks), list(ticks.values()))
    starts = {title for title in groups}
    for tick in axes[0].get_yticklabels():
        if tick.get_text() in starts:
            tick.set_fontweight("bold")
    axes[0].set_ylim(row - 0.3, -0.7)  # the first on top
    _legend(figure, axes)
    return figure


def _lines(axis: Any, results: Results, measure: Measure, seeds: set[int]) -> None:
    """The variants at these seeds; around the baseline what is within the noise."""
    noise = results.noise(measure)
    for variant, name in study.VARIANTS.items():
        finals = results.finals(variant, measure.key)
        spread = speedup.spread([value for seed, value in finals.items() if seed in seeds])
        if spread is None:
            continue
        look = _LOOKS[variant]
        x = measure.scale * spread.mean
        axis.axvline(x, color=look["color"], linestyle=look["linestyle"], label=name)
        if variant == study.BASELINE and noise is not None:
            width = measure.scale * study.YARDSTICK * noise / np.sqrt(spread.count)
            axis.axvspan(x - width, x + width, color=look["color"], alpha=0.1, linewidth=0)


def _probe(plt: Any, results: Results) -> Any:
    """A panel a share of the tokens: accuracy against the block."""
    probes = {variant: results.probes(variant) for variant in study.VARIANTS}
    shares = sorted({share for probe in probes.values() for _, share in probe})
    if not shares:
        return None
    figure, axes = plt.subplots(
        1, len(shares), figsize=(3.25 * len(shares), 3.8), layout="constrained", sharey=True,
        squeeze=False,
    )  # fmt: skip
    layers = sorted({layer for probe in probes.values() for layer, _ in probe})
    for axis, share in zip(axes[0], shares, strict=True):
        for variant, probe in probes.items():
            values = {
                layer: [100 * accuracy for accuracy in probe[layer, share].values()]
                for layer in layers
                if (layer, share) in probe
            }
            if values:
                _band(axis, _LOOKS[variant], study.VARIANTS[variant], values)
        axis.set(xlabel="block", xticks=layers)
        axis.set_title(f"after {share} of the tokens", fontsize=10)
    axes[0][0].set_ylabel("accuracy of a linear probe, %")
    _legend(figure, axes[0])
    return figure
