"""The page of one run or several: a single HTML file that loads nothing.

page.html has the look and draws; here is made what it draws, one JSON object. All text from files goes
there as JSON, and into the page as text, never as HTML.
"""

import itertools
import json
import pathlib
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mirai_jax.reporting import grids, measures, runs
from mirai_jax.reporting.runs import Run
from mirai_jax.utils import paths
from mirai_jax.utils.errors import ConfigError
from mirai_jax.utils.trees import flat

_BYTES = 15_000_000  # of a page, unless its curves alone take more
_POINTS, _ALL_POINTS = 2_000, 200_000  # of a curve, of all curves: at most
_MAIN = (  # fields that a page of one run shows
    r"(name|scale|seed|num_steps|batch_size|ema_decay|init_from|(model|foresight|optimizer)\W.*|"
    r"data\.(name|path|codes)|(tokenizer|teacher)\.name|sample\.guidance)"
)
_DONE = "started", "resumed", "preempted", "finished"  # events whose step is done
_COUNTED = {"resumed": "restarts", "image_replaced": "images replaced"}  # events
_Curves = Mapping[str, Mapping[int, float]]  # {protocol: {step: value}}


def make(workdirs: Sequence[str]) -> tuple[str, int]:
    """The page as HTML, and how many runs it shows; the same folder twice is one run.

    Raises:
        ConfigError: a folder is no run, or the extra `report` is not installed.
        OSError: a file cannot be read.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError("the page needs the extra: pip install -e '.[report]'") from error
    folders = {str(paths.at(workdir).absolute()): workdir for workdir in workdirs}
    shown = dict(zip(_names([*folders]), map(runs.read, folders.values()), strict=True))
    plotly, data = get_plotlyjs(), _data(shown)
    room = _BYTES - len(plotly) - len(json.dumps(data))
    for entry, run in zip(data["runs"], shown.values(), strict=True):
        entry["samples"], left_out = grids.embed(run.samples, room // len(shown))
        if left_out:
            count = f"{left_out} of {len(run.samples)}"
            data["notes"].append(f"{entry['name']}: {count} sample grids are left out")
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    template = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    parts = {"@@PLOTLY@@": plotly, "@@DATA@@": text}
    return "".join(parts.get(p, p) for p in re.split("(@@[A-Z]+@@)", template)), len(shown)


def _names(folders: Sequence[str]) -> list[str]:
    """As much of the end of each path as it takes to know it from the others."""
    parts, lengths = [folder.split("/") for folder in folders], [1] * len(folders)
    while True:
        names = ["/".join(p[-n:]) for p, n in zip(parts, lengths, strict=True)]
        if len(set(names)) == len(names):
            return names
        lengths = [n + (names.count(name) > 1) for n, name in zip(lengths, names, strict=True)]


def _data(shown: Mapping[str, Run]) -> dict[str, Any]:
    """What page.html draws, without the grids."""
    notes = [f"{name}: {text}" for name, run in shown.items() for text in run.damaged]
    longest = max(len(run.steps) for run in shown.values())
    most = min(_POINTS, _ALL_POINTS // max(1, sum(len(run.curves) for run in shown.values())))
    if longest > most:
        notes.append(
            f"curves have up to {longest:,} logged steps: about {most:,} of them are drawn; smoothed "
            "lines are averages of all"
        )
    names = {name for run in shown.values() for name in run.curves}
    names = [n for n in names if not (n.startswith("real_") and n[5:] in names)]
    names.sort(key=lambda name: (measures.describe(name).place, name))
    measured = [name for name in names if measures.describe(name).section == measures.QUALITY]
    keys = {n: {key for run in shown.values() for key in run.curves.get(n, ())} for n in names}
    labels = {name: _labels(keys[name]) for name in names}
    facts = {name: _facts(run) for name, run in shown.items()}
    head = [*next(iter(facts.values())), *(measures.describe(name).title for name in measured)]
    rows = [
        [name, *facts[name].values(), *(_best(n, run, labels[n]) for n in measured)]
        for name, run in shown.items()
    ]
    return {
        "made": time.strftime("%Y-%m-%d %H:%M %Z"),
        "notes": notes,
        "runs": [
            {
                "name": name,
                "path": str(run.path),
                "planned": run.config["num_steps"],
                "clock": [_thinned(values, most) for values in (run.steps, _rounded(run.hours))],
                "events": _events(run.events),
                "counts": _counts(run.events),
            }
            for name, run in shown.items()
        ],
        "summary": {"head": ["run", *head], "rows": rows},
        "sections": [measures.TRAINING, measures.QUALITY, measures.SPEED, measures.OTHER],
        "panels": [p for n in names for p in _panels(n, [*shown.values()], labels[n], most)],
        "config": _differences(shown),
    }


def _panels(
    name: str, shown: Sequence[Run], labels: Mapping[str, str], most: int
) -> list[dict[str, Any]]:
    """A measure by step, and by guidance where a run has it at several."""
    known, curves, sweeps = measures.describe(name), [], []
    for i, run in enumerate(shown):
        for wanted in (name, f"real_{name}"):
            for key, found in run.curves.get(wanted, {}).items():
                steps, values = zip(*sorted(found.items()), strict=True)
                curve = {"run": i, "label": labels.get(key, ""), "reference": wanted != name}
                curve |= {"x": _thinned(steps, most), "y": _thinned(_rounded(values), most)}
                curve["logged"] = key == "{}"
                if curve["logged"] and len(values) >= 20:
                    curve["smooth"] = _thinned(_rounded(_smoothed(values)), most)
                curves.append(curve)
        sweeps += [{"run": i, **sweep} for sweep in _sweeps(run.curves.get(name, {}))]
    panel = known._asdict() | {"x": "step", "curves": curves}
    if name == "fid":
        scales = {str(run.config.get("scale")): run.config.get("batch_size") for run in shown}
        panel["published"] = [
            {"title": title, "x": steps, "y": values}
            for scale, size in scales.items()
            for title, (steps, values) in measures.published_fid(scale, size).items()
        ]
    title = f"{known.title} against guidance"
    against = known._asdict() | {"x": "guidance", "curves": sweeps, "title": title}
    return [panel, against] if sweeps else [panel]


def _labels(keys: Iterable[str]) -> dict[str, str]:
    """{protocol: the fields in which it differs from the others}."""
    protocols = {key: json.loads(key) for key in keys}
    parts = {key: [(k, f"{k} {_plain(v)}") for k, v in p.items()] for key, p in protocols.items()}
    several = Counter(field for field, _ in {pair for pairs in parts.values() for pair in pairs})
    return {k: ", ".join(text for f, text in v if several[f] > 1) for k, v in parts.items()}


def _sweeps(curves: _Curves) -> list[dict[str, Any]]:
    """A measure against guidance, of each protocol: at the last step with several that differ."""
    found: dict[tuple[int, str], dict[float, float]] = {}
    for key, values in curves.items():
        protocol = json.loads(key)
        guidance = protocol.pop("guidance", None)
        for step, value in values.items() if isinstance(guidance, (int, float)) else ():
            found.setdefault((step, json.dumps(protocol)), {})[guidance] = value
    several = (at for at in sorted(found) if len(set(found[at].values())) > 1)
    last = {protocol: (step, sorted(found[step, protocol].items())) for step, protocol in several}
    return [
        {"label": f"step {step:,}", "x": [g for g, _ in sweep], "y": _rounded(v for _, v in sweep)}
        for step, sweep in last.values()
    ]


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def _thinned(values: Sequence[Any], most: int) -> list[Any]:
    """Every n-th value and the last."""
    return [*values[: -1 : -(-len(values) // most) or 1], *values[-1:]]


def _smoothed(values: Sequence[float]) -> list[float]:
    """An exponential average over a hundredth of the curve, two values at least."""
    decay, total, weight = 1 - 1 / max(2.0, len(values) / 100), 0.0, 0.0
    pairs = ((total := decay * total + v, weight := decay * weight + 1) for v in values)
    return [total / weight for total, weight in pairs]


def _facts(run: Run) -> dict[str, str]:
    """The first columns of the table."""
    config, events = run.config, run.events
    model = config["model"] if isinstance(config.get("model"), dict) else {}
    size = model.get("size") or f"{model.get('num_layers')} blocks x {model.get('width')}"
    planned = config["num_steps"]
    speeds, waits, losses = (
        [*run.curves.get(name, {}).get("{}", {}).values()]
        for name in ("images_per_second", "wait_share", "cross_entropy")
    )
    noted = [e["step"] for e in events if e.get("event") in _DONE and type(e.get("step")) is int]
    why = f" ({events[-1].get('event')})" if events and run.state == "stopped" else ""
    return {
        "variant": f"{config.get('name')}, {config.get('scale')}",
        "size": str(size) if model else "–",
        "state": run.state + why,
        "steps": f"{max([*run.steps[-1:], *noted[-1:]], default=0):,} of {planned:,}",
        "hours of training": f"{run.hours[-1]:.3g}" if run.hours else "–",
        "images/s, median": f"{statistics.median(speeds):,.4g}" if speeds else "–",
        "wait for data": f"{statistics.fmean(waits):.1%}" if waits else "–",
        "cross-entropy, last, smoothed": f"{_smoothed(losses)[-1]:.4g}" if losses else "–",
    }


def _best(name: str, run: Run, labels: Mapping[str, str]) -> str:
    """The best value with its step and protocol, and the last one under that."""
    better, curves = measures.describe(name).better, run.curves.get(name)
    if not curves:
        return "–"
    rank = {"less": lambda v, s: (v, s), "more": lambda v, s: (-v, s)}.get(better, lambda v, s: -s)
    _, step, key = min((rank(v, s), s, key) for key, c in curves.items() for s, v in c.items())
    how = f", {labels[key]}" if labels[key] else ""
    last = max(curves[key])
    after = f"; last {curves[key][last]:.4g}" if last != step else ""
    return f"{curves[key][step]:.4g} (step {step:,}{how}){after}"


def _counts(events: Sequence[Mapping[str, Any]]) -> str:
    """What happened to a run, in a line."""
    kinds = [str(event.get("event")) for event in events]
    found = {words: kinds.count(kind) for kind, words in _COUNTED.items()}
    found["updates skipped"] = sum("update is left out" in str(e.get("text")) for e in events)
    return ", ".join(f"{words}: {count}" for words, count in found.items() if count)


def _events(events: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """[time, event, the rest]; of more than five alike in a row, the first three."""
    rows = []
    for kind, group in itertools.groupby(events, key=lambda event: str(event.get("event"))):
        alike = list(group)
        for event in alike[: 3 if len(alike) > 5 else 5]:
            rest = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "event"))
            rows.append([str(event.get("time", "")).replace("T", " "), kind, rest])
        if len(alike) > 5:
            rows.append(["", kind, f"and {len(alike) - 3} more"])
    return rows


def _differences(shown: Mapping[str, Run]) -> dict[str, Any]:
    """The config fields in which runs differ, '–' where one has no such field; of one run its main ones."""
    configs = [{k: json.dumps(v) for k, v in flat(run.config).items()} for run in shown.values()]
    fields = sorted(set().union(*configs))
    if len(configs) > 1:
        fields = [f for f in fields if len({config.get(f) for config in configs}) > 1]
    else:
        fields = [f for f in fields if re.fullmatch(_MAIN, f)]
    rows = [[f, *(config.get(f, "–") for config in configs)] for f in fields]
    return {"head": ["field", *shown], "rows": rows}
