"""What the report reads: results/bench.json and the small files of finished runs, results/runs/SWEEP/RUN/.

config.json       the run's whole config
metrics.jsonl     as the run logged it
assessment.jsonl  as `python -m mirai_jax.evaluate --workdir` wrote it: a JSON object a line with "step", "protocol"
                  (how it was measured), measures, and at times a "probe"; later lines add to earlier
                  ones of the same step and protocol
future.jsonl      as `python -m mirai_jax.evaluate --future` wrote it; only the EMA's best blocks are read
run.json          command, setting (the run's name without its seed), steps, seconds, machine

bench.json is what `python -m mirai_jax.bench --compare --json=...` wrote, of the study's scale.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

from launch import speedup, study
from launch.study import Measure
from mirai_jax.config import fields
from mirai_jax.config.schema import RunConfig
from mirai_jax.utils.errors import ConfigError, DataError, first_line

_OF_SAMPLES = ("frechet", "frechet_images", "agreement")
_OF_REAL_IMAGES = tuple(f"real_{name}" for name in _OF_SAMPLES)
MEASURED = ("cross_entropy", *_OF_SAMPLES, *_OF_REAL_IMAGES, "precision", "recall")
MEASURED += (study.TEACHER.key,)
# Newer lines have other names for these.
_RENAMED = {
    "cross_entropy": "validation_cross_entropy",
    "agreement": "class_accuracy",
    "real_agreement": "real_class_accuracy",
    "frechet_images": "frechet_efficientnet_lite0",
}


@dataclasses.dataclass(frozen=True)
class Assessment:
    """Of one step under one protocol.

    Attributes:
        protocol: how it was measured.
        measures: {name: number}, of those in MEASURED that there are.
        probe: {layer: accuracies after equal shares of the tokens}; empty where there was none.
        where: file and line.
    """

    step: int
    protocol: Mapping[str, Any]
    measures: Mapping[str, float]
    probe: Mapping[int, tuple[float, ...]]
    where: str


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        setting: its name without the seed.
        batch_size: images a step.
        seconds: of its processes; None where they are not known.
        machine: in words.
        metrics: the logged steps.
        assessments: in the order made.
        future: {step: {measure of study.FUTURE: value}}.
    """

    sweep: str
    name: str
    setting: str
    seed: int
    steps: int
    batch_size: int
    config: Mapping[str, Any]
    command: str
    seconds: float | None
    machine: str
    metrics: Sequence[Mapping[str, Any]]
    assessments: Sequence[Assessment]
    future: Mapping[int, Mapping[str, float]]

    def probe(self, protocol: Mapping[str, Any] | None) -> Mapping[int, tuple[float, ...]]:
        """Of the last step, under the protocol or one that differs in how samples are drawn alone."""
        wanted, found = protocol or {}, {}
        for a in self.assessments:
            alike = all(a.protocol.get(k) == wanted.get(k) for k in ("weights", "held_out"))
            if a.step == self.steps and alike:
                found |= a.probe
        return found


@dataclasses.dataclass(frozen=True)
class Bench:
    """Steps alone on the machine, in rounds in which each variant had its turn."""

    command: str
    step_seconds: Mapping[str, Sequence[float]]  # {variant: one a round}


def typed(where: str, value: Any, kind: type) -> Any:
    """The value of a file as this kind; raises DataError where it is another."""
    try:
        return fields.typed(where, value, kind)
    except ConfigError as error:
        raise DataError(str(error)) from error


def field(path: pathlib.Path, content: Mapping[str, Any], key: str, kind: type) -> Any:
    """A field of a JSON file's object, as this kind; raises DataError."""
    return typed(f"{path}: {key}", content.get(key), kind)


def seconds(path: pathlib.Path, content: Mapping[str, Any]) -> float | None:
    """Of a run.json: of its processes; None where they are not known."""
    return None if content.get("seconds") is None else field(path, content, "seconds", float)


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} is {fields.shown(value)}; it must be an object")
    return value


def _parsed(where: str, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON ({first_line(error)})") from error
    return _object(where, value)


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        DataError: there is none.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing")
    return _parsed(str(path), path.read_bytes())


def read_lines(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    """("FILE, line N", object) of each line of a JSON-lines file; none where there is no file.

    Raises:
        DataError: names file and line of what is no object with a step.
    """
    found = []
    lines = path.read_bytes().splitlines() if path.exists() else ()
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        entry = _parsed(where, line)
        typed(f"{where}: step", entry.get("step"), int)
        found.append((where, entry))
    return found


def assessment(where: str, entry: Mapping[str, Any]) -> Assessment:
    """One line of an assessment.jsonl.

    Raises:
        DataError: names the line and the field.
    """
    names = {name: name if name in entry else _RENAMED.get(name, name) for name in MEASURED}
    measures = {
        name: typed(f"{where}: {written}", entry[written], float)
        for name, written in names.items()
        if entry.get(written) is not None
    }
    probe = {}
    for layer, accuracies in _object(f"{where}: probe", entry.get("probe") or {}).items():
        name = f"{where}: probe[{fields.shown(layer)}]"
        if not (layer.isascii() and layer.isdigit() and len(layer) < 5):
            raise DataError(f"{name} is no layer; its name must be a whole number")
        values = typed(name, accuracies, tuple)
        if not values:
            raise DataError(f"{name} is empty; it must be accuracies")
        probe[int(layer)] = tuple(typed(name, value, float) for value in values)
    protocol = _object(f"{where}: protocol", entry.get("protocol"))
    return Assessment(entry["step"], protocol, measures, probe, where)


def _future(where: str, entry: Mapping[str, Any]) -> dict[str, float]:
    """Of a line of a future.jsonl: each measure of study.FUTURE in the best block of the EMA."""
    found = {}
    for measure in study.FUTURE:
        try:
            blocks = entry["ema"].values()
            found[measure.key] = max(b["tokens"]["r2"][measure.key] for b in blocks)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{where}: {first_line(error)} of the EMA's tokens") from error
    return found


def _read_run(folder: pathlib.Path) -> Run:
    config, content = read_object(folder / "config.json"), read_object(folder / "run.json")
    of_run = functools.partial(field, folder / "run.json", content)
    of_config = functools.partial(field, folder / "config.json", config)
    return Run(
        sweep=folder.parent.name,
        name=folder.name,
        setting=of_run("setting", str),
        seed=of_config("seed", int),
        steps=of_run("steps", int),
        batch_size=of_config("batch_size", int),
        config=fields.complete(RunConfig, config),
        command=of_run("command", str),
        seconds=seconds(folder / "run.json", content),
        machine=of_run("machine", str),
        metrics=[entry for _, entry in read_lines(folder / "metrics.jsonl")],
        assessments=[assessment(*line) for line in read_lines(folder / "assessment.jsonl")],
        future={
            entry["step"]: _future(where, entry)
            for where, entry in read_lines(folder / "future.jsonl")
        },
    )


def _key(protocol: Mapping[str, Any] | None) -> str:
    return json.dumps(protocol, sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Results:
    """All runs, looked at under one protocol.

    Attributes:
        runs: by sweep and name.
        protocol: the one; None where nothing was assessed with it.
        bench: steps alone; None where they were not measured.
    """

    runs: Sequence[Run]
    protocol: Mapping[str, Any] | None
    bench: Bench | None = None

    def seeds(self, setting: str) -> dict[int, Run]:
        """{seed: run} of SWEEP/SETTING."""
        sweep, _, name = setting.partition("/")
        return {r.seed: r for r in self.runs if (r.sweep, r.setting) == (sweep, name)}

    def settings(self, sweep: str) -> list[str]:
        """SWEEP/SETTING of all runs of the sweep."""
        return list(dict.fromkeys(f"{sweep}/{r.setting}" for r in self.runs if r.sweep == sweep))

    def until(self, step: int | None) -> "Results":
        """As if every run had ended at that step; None: as they are."""
        if step is None:
            return self
        runs = [
            dataclasses.replace(
                run,
                steps=min(run.steps, step),
                metrics=[entry for entry in run.metrics if entry["step"] <= step],
                assessments=[a for a in run.assessments if a.step <= step],
            )
            for run in self.runs
        ]
        return dataclasses.replace(self, runs=runs)

    def shortest(self, settings: Collection[str]) -> int | None:
        """The steps of the shortest run of the settings; None where there is no run."""
        steps = [run.steps for setting in settings for run in self.seeds(setting).values()]
        return min(steps, default=None)

    def curve(self, run: Run, measure: str) -> dict[int, float]:
        """{step: value} at the assessed steps."""
        key = _key(self.protocol)
        found = {
            a.step: a.measures[measure]
            for a in run.assessments
            if measure in a.measures and _key(a.protocol) == key
        }
        return dict(sorted(found.items()))

    def curves(self, setting: str, measure: str) -> dict[int, dict[int, float]]:
        """{seed: its curve} of the seeds whose curve is whole, up to the run's last step."""
        return {
            seed: curve
            for seed, run in sorted(self.seeds(setting).items())
            if run.steps in (curve := self.curve(run, measure))
        }

    def finals(self, setting: str, measure: str) -> dict[int, float]:
        """{seed: value at the run's last step} of the seeds that have one."""
        runs = self.seeds(setting)
        if measure in {m.key for m in study.FUTURE}:
            found = {seed: run.future.get(run.steps, {}) for seed, run in sorted(runs.items())}
            return {seed: values[measure] for seed, values in found.items() if measure in values}
        return {s: curve[runs[s].steps] for s, curve in self.curves(setting, measure).items()}

    def noise(self, measure: Measure) -> float | None:
        """The standard deviation over seeds of the main comparison, pooled over the variants."""
        groups = [list(self.finals(v, measure.key).values()) for v in study.VARIANTS]
        return speedup.pooled_deviation(groups)

    def probes(self, setting: str) -> dict[tuple[int, Fraction], dict[int, float]]:
        """{(layer, share of the tokens): {seed: accuracy}}."""
        found: dict[tuple[int, Fraction], dict[int, float]] = {}
        for seed, run in sorted(self.seeds(setting).items()):
            for layer, accuracies in run.probe(self.protocol).items():
                for i, accuracy in enumerate(accuracies, 1):
                    share = Fraction(i, len(accuracies))
                    found.setdefault((layer, share), {})[seed] = accuracy
        return found

    def others(self) -> list["Results"]:
        """The same runs under each other protocol with which a variant's last step was measured."""
        runs = [run for variant in study.VARIANTS for run in self.seeds(variant).values()]
        found = {
            _key(a.protocol): a.protocol
            for run in runs
            for a in run.assessments
            if a.step == run.steps and a.measures
        }
        found.pop(_key(self.protocol), None)
        return [dataclasses.replace(self, protocol=p) for _, p in sorted(found.items())]


def _read_bench(path: pathlib.Path) -> Bench | None:
    if not path.exists():
        return None
    content = read_object(path)
    about = _object(f"{path}: about", content.get("about"))
    if about.get("scale") != study.SCALE:
        raise DataError(f"{path} is of scale {about.get('scale')!r}; it must be {study.SCALE!r}")
    found: dict[str, list[float]] = {}
    for name, variant in _object(f"{path}: variants", content.get("variants")).items():
        where = f"{path}: variants.{name}"
        values = typed(where, _object(where, variant).get("step_seconds"), tuple)
        found[f"{study.MAIN}/{name}"] = [typed(where, value, float) for value in values]
    return Bench(typed(f"{path}: about.command", about.get("command"), str), found)


def read(folder: pathlib.Path) -> Results:
    """What is in the folder results/.

    Raises:
        DataError: one line that names what is wrong in which file.
    """
    bench, folder = _read_bench(folder / "bench.json"), folder / "runs"
    folders = sorted(folder.glob("*/*/"), key=lambda path: path.relative_to(folder).parts)
    runs = [_read_run(path) for path in folders]
    twins: dict[tuple[str, str, int], Run] = {}
    main: Assessment | None = None
    for run in runs:
        twin = twins.setdefault((run.sweep, run.setting, run.seed), run)
        if twin is not run:
            raise DataError(
                f"{folder / run.sweep / run.name} has the setting and seed of {twin.name}"
            )
        for a in run.assessments:
            if any(a.protocol.get(name) != value for name, value in study.PROTOCOL.items()):
                continue
            main = main or a
            if _key(a.protocol) != _key(main.protocol):
                raise DataError(
                    f"{a.where}: protocol {_key(a.protocol)} is not that of {main.where}, "
                    f"{_key(main.protocol)}; PROTOCOL in launch/study.py must say which one counts"
                )
    return Results(runs, main.protocol if main else None, bench)
