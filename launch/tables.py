"""What came out of a sweep: table.md and table.csv, and timing.csv.

table.* hold only what the runs computed, so that an interrupted sweep ends with the very same files;
what depends on the machine is in timing.csv.
"""

import csv
import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from launch import jobs
from launch.plan import Run
from mirai_jax.training.metrics_writer import read_metrics
from mirai_jax.utils import files

TAIL = 0.1  # of the steps: what a final loss is the mean over


@dataclasses.dataclass(frozen=True)
class Result:
    """What one run has come to.

    Attributes:
        run: which.
        step: the last one.
        steps: the logged steps (N).
        cross_entropies: at those (N).
        values: {title: number} for the table; a title is missing where there is no number yet.
        images_per_second: the mean; None before the first logged step.
    """

    run: Run
    step: int
    steps: np.ndarray
    cross_entropies: np.ndarray
    values: Mapping[str, float]
    images_per_second: float | None


def read(run: Run) -> Result:
    """The result so far."""
    # A step whose loss was not finite, and whose update was skipped, is in no mean.
    entries = [
        e for e in read_metrics(run.workdir) if math.isfinite(e["loss"] + e["cross_entropy"])
    ]
    step = run.step()
    values: dict[str, float] = {}
    last = [entry for entry in entries if entry["step"] > (1 - TAIL) * step]
    for title in ("loss", "cross_entropy"):
        if last:
            values[title] = float(np.mean([entry[title] for entry in last]))
    class_accuracy = run.workdir / "agreement.json"
    if class_accuracy.exists():
        values["agreement"] = json.loads(class_accuracy.read_text())["samples"]
    speeds = [entry["images_per_second"] for entry in entries if "images_per_second" in entry]
    return Result(
        run=run,
        step=step,
        steps=np.array([entry["step"] for entry in entries], int),
        cross_entropies=np.array([entry["cross_entropy"] for entry in entries]),
        values=values,
        images_per_second=float(np.mean(speeds)) if speeds else None,
    )


def write_tables(out: pathlib.Path, title: str, results: Sequence[Result]) -> list[pathlib.Path]:
    """Writes the three files; returns where they are."""
    texts = {
        "table.md": markdown(title, results),
        "table.csv": _csv(_rows(results)),
        "timing.csv": _csv(_timing(results)),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        files.write_text(out / name, text)
    return [out / name for name in texts]


def settings(results: Sequence[Result]) -> dict[str, list[Result]]:
    """{name of a setting: its results, one a seed}, in the sweep's order."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.run.setting, []).append(result)
    return found


def _rows(results: Sequence[Result]) -> list[dict[str, str]]:
    measured = _measured(results)
    return [
        {
            "run": result.run.name,
            **result.run.shown,
            "steps": str(result.step),
            "of": str(result.run.num_steps),
            **{m: repr(result.values[m]) if m in result.values else "" for m in measured},
        }
        for result in results
    ]


def _measured(results: Sequence[Result]) -> list[str]:
    """The titles of numbers that some run has."""
    titles = ("loss", "cross_entropy", "agreement")
    return [title for title in titles if any(title in result.values for result in results)]


def _timing(results: Sequence[Result]) -> list[dict[str, str]]:
    return [
        {
            "run": result.run.name,
            "images_per_second": _number(result.images_per_second, "{:.1f}"),
            "seconds": _number(jobs.seconds(result.run.log), "{:.1f}"),
        }
        for result in results
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _csv(rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def shown(measure: str, value: float) -> str:
    """A number as tables and figures show it."""
    return f"{value:.1%}" if measure == "agreement" else f"{value:.4f}"


def markdown(title: str, results: Sequence[Result]) -> str:
    """A row a run, and where there are several seeds a row a setting."""
    measured = _measured(results)
    rows = []
    for row, result in zip(_rows(results), results, strict=True):
        cells = [row[column] or "-" for column in result.run.shown]
        cells.append(row["steps"] + ("" if row["steps"] == row["of"] else f" of {row['of']}"))
        cells += [shown(m, result.values[m]) if m in result.values else "-" for m in measured]
        rows.append(cells)
    titles = [*results[0].run.shown, "steps", *(m.replace("_", "-") for m in measured)]
    text = f"# {title}\n\n{table(titles, rows)}\n"
    if measured:
        text += "Losses are means over the logged steps of the last tenth of a run.\n"
    if measured and len(settings(results)) < len(results):
        rows = []
        for setting, group in settings(results).items():
            cells = [setting or "all", str(len(group))]
            for measure in measured:
                values = [r.values[measure] for r in group if measure in r.values]
                span = (min(values), max(values)) if values else ()
                text_span = " to ".join(shown(measure, value) for value in span)
                cells.append(
                    f"{shown(measure, float(np.mean(values)))} ({text_span})" if values else "-"
                )
            rows.append(cells)
        titles = ["setting", "seeds", *(m.replace("_", "-") for m in measured)]
        text += f"\nMean over seeds (lowest to highest):\n\n{table(titles, rows)}"
    return text


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
