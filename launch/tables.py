"""The results of a sweep: table.md, table.csv and timing.csv.

The tables hold only what the runs computed, so that an interrupted sweep ends with the same files;
timing.csv holds what depends on the machine.
"""

import csv
import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch import jobs
from launch.plan import SweepRun
from mirai_jax.training.metrics_writer import read_metrics
from mirai_jax.utils import files

TAIL = 0.1  # of the steps: what a final loss is the mean over


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one run so far.

    Attributes:
        step: the last step.
        steps: the logged steps (N).
        cross_entropies: at these steps, in nats (N).
        values: {title: number} for the table, without those that are not there yet.
        images_per_second: the mean; None before the first logged step.
    """

    run: SweepRun
    step: int
    steps: np.ndarray
    cross_entropies: np.ndarray
    values: Mapping[str, float]
    images_per_second: float | None


def read(run: SweepRun) -> Result:
    """Reads the result so far."""
    # The means leave out skipped updates, whose loss was not finite.
    finite = lambda entry: math.isfinite(entry["loss"] + entry["cross_entropy"])
    entries = list(filter(finite, read_metrics(run.workdir)))
    step = run.step()
    last = [entry for entry in entries if entry["step"] > (1 - TAIL) * step]
    means = ("loss", "cross_entropy") if last else ()
    values = {title: float(np.mean([entry[title] for entry in last])) for title in means}
    class_accuracy = run.workdir / "agreement.json"
    if class_accuracy.exists():
        values["agreement"] = json.loads(class_accuracy.read_text())["samples"]
    values |= _distances(run, step)
    speeds = [entry["images_per_second"] for entry in entries if "images_per_second" in entry]
    return Result(
        run=run,
        step=step,
        steps=np.array([entry["step"] for entry in entries], int),
        cross_entropies=np.array([entry["cross_entropy"] for entry in entries]),
        values=values,
        images_per_second=float(np.mean(speeds)) if speeds else None,
    )


def _distances(run: SweepRun, step: int) -> dict[str, float]:
    """FID and other Fréchet distances of the last step.

    Those of `evaluate --workdir` have the samples and the guidance in their names.
    """
    found = {}
    for file in ("metrics.jsonl", "assessment.jsonl"):
        for entry in read_metrics(run.workdir, file):
            how = entry.get("protocol", {})
            after = "_{samples}_samples_guidance_{guidance:g}".format(**how) if how else ""
            for name, value in entry.items() if entry["step"] == step else ():
                if name.startswith(("fid", "frechet")):
                    found[name + after] = value
    return found


def write_tables(out: pathlib.Path, title: str, results: Sequence[Result]) -> list[pathlib.Path]:
    """Writes the three files and returns their paths."""
    rows = [
        {
            "run": result.run.name,
            **result.run.shown,
            "steps": result.step,
            "of": result.run.num_steps,
            **{measure: result.values.get(measure, "") for measure in _measured(results)},
        }
        for result in results
    ]
    timing = [
        {
            "run": result.run.name,
            "images_per_second": _tenths(result.images_per_second),
            "seconds": _tenths(jobs.seconds(result.run.log)),
        }
        for result in results
    ]
    texts = {"table.md": markdown(title, results), "table.csv": _csv(rows)}
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (texts | {"timing.csv": _csv(timing)}).items():
        files.write_text(out / name, text)
    return [out / name for name in (*texts, "timing.csv")]


def settings(results: Sequence[Result]) -> dict[str, list[Result]]:
    """{name of a setting: its results, one for each seed}, in the sweep's order."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.run.setting, []).append(result)
    return found


def _measured(results: Sequence[Result]) -> list[str]:
    """The titles of numbers that some run has."""
    first = ("loss", "cross_entropy", "agreement")
    found = {title for result in results for title in result.values}
    return sorted(found, key=lambda t: (first.index(t) if t in first else len(first), t))


def _tenths(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def shown(measure: str, value: float) -> str:
    """Formats a number as tables and figures show it."""
    return f"{value:.1%}" if measure == "agreement" else f"{value:.4f}"


def markdown(title: str, results: Sequence[Result]) -> str:
    """A row for each run and, with several seeds, a row for each setting."""
    measured = _measured(results)
    names = [measure.replace("_", "-") for measure in measured]
    rows = []
    for result in results:
        of = "" if result.step == result.run.num_steps else f" of {result.run.num_steps}"
        values = [shown(m, result.values[m]) if m in result.values else "-" for m in measured]
        differing = [value or "-" for value in result.run.shown.values()]
        rows.append([*differing, f"{result.step}{of}", *values])
    text = f"# {title}\n\n{table([*results[0].run.shown, 'steps', *names], rows)}\n"
    if measured:
        text += "Losses are means over the logged steps of the last tenth of a run.\n"
    groups = settings(results)
    if measured and len(groups) < len(results):
        rows = [
            [setting or "all", str(len(group)), *(_mean_and_range(m, group) for m in measured)]
            for setting, group in groups.items()
        ]
        seeds = table(["setting", "seeds", *names], rows)
        text += f"\nMean over seeds (lowest to highest):\n\n{seeds}"
    return text


def _mean_and_range(measure: str, group: Sequence[Result]) -> str:
    values = [result.values[measure] for result in group if measure in result.values]
    if not values:
        return "-"
    low, high = shown(measure, min(values)), shown(measure, max(values))
    return f"{shown(measure, float(np.mean(values)))} ({low} to {high})"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
