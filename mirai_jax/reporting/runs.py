"""What a run's folder says about it. Its JSON files are read, without JAX."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mirai_jax.reporting import measures
from mirai_jax.utils import files, locks, paths
from mirai_jax.utils.errors import ConfigError

_GONE = FileNotFoundError, NotADirectoryError, IsADirectoryError
_NO_PROTOCOL = "step", "workdir", "weights_sha256", "tokenizer_sha256", "batch_size"
_NAMES = {  # on the page, of names in assessment.jsonl: real_X is the limit of X; or of earlier versions
    "real_frechet_images": "real_frechet_efficientnet_lite0",
    "frechet_images": "frechet_efficientnet_lite0",
    "agreement": "class_accuracy",
    "real_agreement": "real_class_accuracy",
    "cross_entropy": "held_out_cross_entropy",
}
_Measured = Iterator[tuple[int, dict[str, Any], Mapping[str, Any]]]  # step, protocol, {name: value}


@dataclasses.dataclass
class Run:
    """A workdir.

    Attributes:
        config: as config.json has it.
        steps: all logged ones.
        hours: of training up to each of them: of the steps alone, from the logged speed; empty where
            no speed is logged.
        curves: {measure: {protocol as JSON: {step: value}}}. The protocol says how it was measured,
            with `by`, which program did; '{}' is what is logged all the time.
        events: the lines of events*.jsonl by time.
        samples: {step: the PNG with its grid}.
        state: 'finished', 'at work' or 'stopped'; of a bucket, 'at work' is what the lock says.
        damaged: a text for each file with lines that are left out.
    """

    path: files.AnyPath
    config: dict[str, Any]
    steps: list[int]
    hours: list[float]
    curves: dict[str, dict[str, dict[int, float]]]
    events: list[dict[str, Any]]
    samples: dict[int, files.AnyPath]
    state: str
    damaged: list[str]


def read(workdir: str) -> Run:
    """Reads a run.

    Raises:
        ConfigError: the folder holds no config.json, or a damaged one.
        OSError: it cannot be read.
    """
    folder, damaged = paths.at(workdir), []
    config = _object(folder / "config.json")
    if not all(type(config.get(field)) is int for field in ("num_steps", "batch_size")):
        raise ConfigError(f"RUN is {workdir!r}; it must be the workdir of a run")
    lines = [n for n in _lines(folder / "metrics.jsonl", damaged) if type(n.get("step")) is int]
    entries = dict(sorted((line["step"], line) for line in lines))
    names = {path.name for path in folder.iterdir()}
    logs = sorted(name for name in names if re.fullmatch(r"events(-\d+)?\.jsonl", name))
    events = [event for name in logs for event in _lines(folder / name, damaged)]
    events.sort(key=lambda event: str(event.get("time")))
    ended = events[-1].get("event") == "finished" if events else config["num_steps"] in entries
    state = "finished" if ended else "stopped"
    if "lock.json" in names and locks.is_held(folder):
        state = "at work"
    curves: dict[str, dict[str, dict[int, float]]] = {}
    judged = _judged(folder, config) if state == "finished" else ()
    assessed, evaluated = _assessed(folder, damaged), _evaluated(folder / "sampled")
    for source in (_logged(entries), assessed, evaluated, judged):
        for step, protocol, values in source:
            plain = json.dumps(protocol, sort_keys=True)
            for name, value in values.items():
                name, guidance = measures.split_guidance(name)
                key = json.dumps(protocol | guidance, sort_keys=True) if guidance else plain
                if (number := _number(value)) is not None:
                    curves.setdefault(name, {}).setdefault(key, {})[step] = number
    steps, hours = _clock(entries, config["batch_size"])
    found = ((re.fullmatch(r"step_(\d+)\.png", p.name), p) for p in _inside(folder / "samples"))
    samples = dict(sorted((int(match[1]), path) for match, path in found if match))
    return Run(folder, config, steps, hours, curves, events, samples, state, damaged)


def _text(path: files.AnyPath) -> str:
    """The text of a file; '' where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except _GONE:
        return ""


def _inside(folder: files.AnyPath) -> list[files.AnyPath]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _object(path: files.AnyPath) -> dict[str, Any]:
    """A JSON file; {} where there is none, or a damaged one."""
    return _parsed(_text(path)) or {}


def _lines(path: files.AnyPath, damaged: list[str]) -> list[dict[str, Any]]:
    """A file of JSON lines, without what a stop or a running write cut off at its end."""
    found = [_parsed(line) for line in _text(path).split("\n")[:-1]]
    wrong = [str(number) for number, entry in enumerate(found, 1) if entry is None]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        damaged.append(
            f"{path.name}: left out, for it is damaged: line {', '.join(wrong[:3])}{more}"
        )
    return [entry for entry in found if entry is not None]


def _number(value: Any) -> float | None:
    """A finite number; None of anything else."""
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _clock(
    entries: Mapping[int, Mapping[str, Any]], batch_size: int
) -> tuple[list[int], list[float]]:
    """Logged steps and the hours up to each; a step whose speed is unknown has the next one's."""
    speeds = [_number(entry.get("images_per_second")) or 0.0 for entry in entries.values()]
    speed = next(filter(None, speeds), 0.0)
    hours, total, before = [], 0.0, 0
    for step, logged in zip(entries if speed else (), speeds, strict=False):
        speed = logged or speed
        total += (step - before) * batch_size / speed / 3600
        before = step
        hours.append(total)
    return list(entries), hours


def _logged(entries: Mapping[int, Mapping[str, Any]]) -> _Measured:
    """Of metrics.jsonl. A foresight loss of 0 stands for a term that has not started."""
    for step, entry in entries.items():
        often, measured = {}, {}
        for name, value in entry.items():
            section = measures.describe(measures.split_guidance(name)[0]).section
            if name != "step" and (value != 0 or not name.startswith("foresight_")):
                (measured if section == measures.QUALITY else often)[name] = value
        yield step, {}, often
        yield step, {"by": "the run"}, measured


def _assessed(folder: files.AnyPath, damaged: list[str]) -> _Measured:
    """Of assessment.jsonl."""
    for line in _lines(folder / "assessment.jsonl", damaged):
        step, protocol = line.pop("step", None), line.pop("protocol", None)
        if type(step) is int and isinstance(protocol, dict):
            # With another reference, the distance to held-out images is no limit of the samples'.
            names = {} if protocol.get("reference") else _NAMES
            yield step, {"by": "assess", **protocol}, {names.get(k, k): v for k, v in line.items()}


def _evaluated(folder: files.AnyPath) -> _Measured:
    """Of each results.json of `evaluate`, for samples in the run's folder."""
    for place in (folder, *_inside(folder)):
        results = _object(place / "results.json")
        try:
            for row in results.get("rows", ()):
                protocol = {k: v for k, v in row["protocol"].items() if k not in _NO_PROTOCOL}
                about = results | row  # in files of earlier versions it stands beside the rows
                by = {"by": "evaluate", "reference": about.get("reference")}
                yield int(row["protocol"]["step"]), protocol | by, dict(row["metrics"])
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # of images that are no samples of a run


def _judged(folder: files.AnyPath, config: Mapping[str, Any]) -> _Measured:
    """Of agreement.json: the class accuracy of the finished run's samples."""
    found = _object(folder / "agreement.json")
    values = {
        "class_accuracy": found.get("samples"),
        "real_class_accuracy": found.get("real_through_tokenizer"),
    }
    protocol = {"by": "the run", "samples": config.get("judged_samples")}
    yield config["num_steps"], protocol, values
