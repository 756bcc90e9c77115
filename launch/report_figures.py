"""The figures of the report, the same to the byte wherever Matplotlib is the same."""

import contextlib
import io
from collections.abc import Callable, Collection, Iterator, Mapping
from fractions import Fraction
from typing import Any

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
    if not values:
        return
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


def _by_step(curves: Collection[Mapping[int, float]], scale: float) -> dict[float, list[float]]:
    """{step: the scaled values of the curves that have it}."""
    values: dict[float, list[float]] = {}
    for curve in curves:
        for step, value in curve.items():
            values.setdefault(step, []).append(scale * value)
    return values


def _comparison(plt: Any, results: Results) -> Any:
    """A column a measure: mean and range against the step, and what is left less the baseline."""
    if not any(results.curves(v, m.key) for v in study.VARIANTS for m in study.MEASURES):
        return None
    figure, axes = plt.subplots(
        2, len(study.MEASURES), figsize=(13, 7), layout="constrained", sharex=True,
        height_ratios=(1.3, 1),
    )  # fmt: skip
    base_name = study.VARIANTS[study.BASELINE]
    for measure, (axis, less) in zip(study.MEASURES, axes.T, strict=True):
        base = results.curves(study.BASELINE, measure.key)
        finals = speedup.spread(results.finals(study.BASELINE, measure.key).values())
        if finals is not None:  # where a curve crosses it, it is as good as the baseline in the end
            axis.axhline(measure.scale * finals.mean, color="#777777", linewidth=1, linestyle=":")
        less.axhline(0, color=_LOOKS[study.BASELINE]["color"], linewidth=1.8)
        for variant, name in study.VARIANTS.items():
            curves = results.curves(variant, measure.key)
            differences = [
                speedup.paired(curve, base[seed]) for seed, curve in curves.items() if seed in base
            ]
            _band(axis, _LOOKS[variant], name, _by_step(curves.values(), measure.scale))
            if variant != study.BASELINE:
                _band(less, _LOOKS[variant], name, _by_step(differences, measure.scale))
        if measure.log:  # in the end the curves are close, compared with where they begin
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(plt.ScalarFormatter())
            axis.yaxis.set_minor_formatter(plt.ScalarFormatter())
            axis.tick_params(axis="y", which="minor", labelsize=7)
        axis.set_title(_title(measure), fontsize=10)
        less.set_title(f"minus {base_name} of the same seed", fontsize=10)
        less.set_xlabel("step")
    _legend(figure, axes[0])
    return figure


def _title(measure: Measure) -> str:
    better = "lower" if measure.lower_is_better else "higher"
    return f"{measure.axis}\n({better} is better)"


def _rows(results: Results) -> list[tuple[str, str | None]]:
    """(text, setting) of what is there beside the main comparison; headings have no setting."""
    groups = {asked.title: list(asked.settings) for asked in study.QUESTIONS}
    groups |= {explored.title: results.settings(explored.sweep) for explored in study.EXPLORATIONS}
    rows: list[tuple[str, str | None]] = []
    for title, settings in groups.items():
        known = [(cells.label(s), s) for s in settings if results.seeds(s)]
        rows += [(title, None), *known] if known else []
    return rows


def _diagnostics(plt: Any, results: Results) -> Any:
    """A panel a measure: the last value of each run less the baseline's of the same seed.

    All after as many steps as the shortest has. In each row, strokes are the main comparison's variants:
    their means over the seeds of that row's runs.
    """
    rows = _rows(results)
    if not rows:
        return None
    steps = results.shortest([setting for _, setting in rows if setting])
    results = results.until(steps)
    figure, axes = plt.subplots(
        1, len(study.MEASURES), figsize=(13, 1.6 + 0.24 * len(rows)), layout="constrained",
        sharey=True,
    )  # fmt: skip
    for axis, measure in zip(axes, study.MEASURES, strict=True):
        _noise(axis, results, measure)
        for row, (_, setting) in enumerate(rows):
            if setting is None:
                continue
            differences = cells.against(results, setting, study.BASELINE, measure)
            shown = [measure.scale * value for value in differences.values()]
            axis.axhline(row, color="#999999", linewidth=0.6, linestyle=":", zorder=0)
            _strokes(axis, row, results, measure, differences.keys())
            axis.plot(
                shown, [row] * len(shown), "o", color="#CC79A7", markeredgecolor="black", alpha=0.8
            )
        axis.set_title(_title(measure), fontsize=10)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel(f"minus {study.VARIANTS[study.BASELINE]}, same seed, step {steps:,}")
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(rows)), [text for text, _ in rows])
    for label, (_, setting) in zip(axes[0].get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if setting is None else "normal")
    axes[0].set_ylim(len(rows) - 0.3, -0.7)  # the first on top
    _legend(figure, axes)
    return figure


def _noise(axis: Any, results: Results, measure: Measure) -> None:
    """Around no difference, what is within the noise of a single run."""
    noise = results.noise(measure)
    if noise is not None:
        width = measure.scale * study.YARDSTICK * noise
        axis.axvspan(-width, width, color="#000000", alpha=0.08, linewidth=0)


def _strokes(
    axis: Any, row: int, results: Results, measure: Measure, seeds: Collection[int]
) -> None:
    """The variants, each less the baseline, over these seeds."""
    for variant, name in study.VARIANTS.items():
        differences = cells.against(results, variant, study.BASELINE, measure)
        spread = speedup.spread([d for seed, d in differences.items() if seed in seeds])
        if spread is not None:
            x, color = measure.scale * spread.mean, _LOOKS[variant]["color"]
            axis.plot([x, x], [row - 0.5, row + 0.5], "-", color=color, linewidth=2, label=name)


def share_text(share: Fraction) -> str:
    """When a probe looks at the states."""
    return "after all tokens but one" if share == 1 else f"after {share} of the tokens"


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
            _band(axis, _LOOKS[variant], study.VARIANTS[variant], values)
        axis.set(xlabel="block", xticks=layers)
        axis.set_title(share_text(share), fontsize=10)
    axes[0][0].set_ylabel("accuracy of a linear probe, %")
    _legend(figure, axes[0])
    return figure
