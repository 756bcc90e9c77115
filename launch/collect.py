"""Copies what the report needs of finished runs, without the paths of the machine they ran on."""

import json
import pathlib
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from launch import collected, jobs, study
from launch.plan import last_step
from mirai_jax.utils import files
from mirai_jax.utils.errors import DataError, first_line

PUBLIC = ("/usr/share/datasets/",)  # of packages: the same on other machines
_FILES = ("config.json", "metrics.jsonl", "assessment.jsonl", "future.jsonl", "run.json")
_RUNS = "runs/sweeps"  # where a reader's runs will be
_PATH = re.compile(r"""(?:^|(?<=[\s:=,;'"(\[]))/[^\s/:,;'")\]][^\s:,;'")\]]*""")
_STARTED = re.compile(
    r"^launch: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.+ -m mirai_jax\.main .*)$", re.MULTILINE
)


class Machine:
    """The paths of this machine, those of the sweep `name` too, and what they are for others."""

    def __init__(self, sweep: pathlib.Path, name: str):
        names = {str(pathlib.Path.cwd()): "."}
        for path in (sweep.absolute(), sweep.resolve()):
            names |= {str(path.parent): _RUNS, str(path): f"{_RUNS}/{name}"}
        names.pop("/", None)
        self._names = sorted(names.items(), key=lambda item: -len(item[0]))  # the innermost first

    def portable(self, value: Any) -> Any:
        """The value with paths that mean something elsewhere.

        Raises:
            DataError: names a path that would mean nothing.
        """
        if isinstance(value, Mapping):
            return {self.portable(key): self.portable(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self.portable(part) for part in value]
        return _PATH.sub(self._portable_path, value) if isinstance(value, str) else value

    def _portable_path(self, match: re.Match[str]) -> str:
        path = match[0]
        if path.startswith(PUBLIC):
            return path
        for folder, name in self._names:
            if path == folder or path.startswith(f"{folder}/"):
                return name + path.removeprefix(folder) if name != "." else path[len(folder) + 1 :]
        raise DataError(f"it holds {path!r}, which is a path of this machine alone")


def _assessed(texts: Mapping[str, str], steps: int) -> str:
    """What is to be said of a run whose last step was not assessed."""
    lines = texts.get("assessment.jsonl", "").splitlines()
    last = max((json.loads(line)["step"] for line in lines), default=0)
    if last == steps:
        return ""
    return f" (assessed up to step {last} of {steps})" if last else " (not assessed)"


def _command(log: pathlib.Path, workdir: str, machine: Machine) -> str:
    """How a user would start the run."""
    text = log.read_text(errors="replace") if log.exists() else ""
    started = _STARTED.findall(text)
    if not started:
        raise DataError("it does not tell the command of the run")
    words = shlex.split(started[-1])
    words = [
        f"--workdir={workdir}" if word.startswith("--workdir=") else machine.portable(word)
        for word in words[words.index("-m") :]
    ]
    return shlex.join(["python", *words])


def unfinished(folder: pathlib.Path, config: Mapping[str, Any]) -> str:
    """'' of a workdir that is at its end; else where it is, in words."""
    step, steps = last_step(folder / "metrics.jsonl"), config.get("num_steps")
    done = (folder / "summary.png").exists() and step == steps
    return "" if done else f"unfinished, at step {step} of {steps}"


def write(folder: pathlib.Path, texts: Mapping[str, str]) -> None:
    """The files of one run, and none of an earlier one of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if name not in texts:
            (folder / name).unlink(missing_ok=True)
    for name, text in texts.items():
        files.write_text(folder / name, text)


def json_lines(entries: Iterable[Any]) -> str:
    """The text of a JSON-lines file."""
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def _texts(folder: pathlib.Path, sweep: str, machine: Machine, description: str) -> dict[str, str]:
    """{name of a file: its text} of a finished run."""
    config = collected.read_object(folder / "config.json")
    log = folder.with_name(f"{folder.name}.log")
    path = folder / "config.json"  # of which an error tells
    try:
        texts = {path.name: json.dumps(machine.portable(config), indent=2) + "\n"}
        for name in ("metrics.jsonl", "assessment.jsonl", "future.jsonl"):
            path = folder / name
            lines = collected.read_lines(path)
            for line in lines if name == "assessment.jsonl" else ():
                collected.assessment(*line)  # what the report could not read raises now
            if lines:
                texts[name] = json_lines(machine.portable(entry) for _, entry in lines)
        path = log
        run = {
            "setting": folder.name.removesuffix(f"-seed={config.get('seed')}"),
            "command": _command(log, f"{_RUNS}/{sweep}/{folder.name}", machine),
            "steps": config["num_steps"],
            "seconds": jobs.seconds(log),
            "machine": description,
        }
    except DataError as error:
        message = first_line(error)
        raise DataError(message if str(path) in message else f"{path}: {message}") from error
    return {**texts, "run.json": json.dumps(run, indent=2) + "\n"}


def collect(folders: Sequence[pathlib.Path], out: pathlib.Path, description: str) -> Iterator[str]:
    """Copies the finished runs of sweep folders; yields a line for each run, also for those that `out`
    holds of these sweeps from before: they may have another name now.

    Nothing is written before every run was read.

    Args:
        folders: of sweeps.
        out: results/runs.
        description: of the machine, in words.

    Raises:
        DataError: one line; a folder holds no runs, or a file cannot be shown to others.
    """
    planned: dict[pathlib.Path, dict[str, str]] = {}
    lines = []
    for sweep in folders:
        paths = sorted(path.parent for path in sweep.glob("*/config.json"))
        if not paths:
            raise DataError(f"{sweep} holds no runs; it must be the folder of a sweep")
        name = sweep.resolve().name.removesuffix(f"-{study.SCALE}")
        machine = Machine(sweep, name)
        for folder in paths:
            config = collected.read_object(folder / "config.json")
            if left := unfinished(folder, config):
                lines.append(f"left out: {folder}: {left}")
                continue
            target, texts = out / name / folder.name, _texts(folder, name, machine, description)
            if target in planned:
                raise DataError(f"{folder}: another sweep folder has a run {name}/{folder.name}")
            planned[target] = texts
            lines.append(f"collected: {target}{_assessed(texts, config['num_steps'])}")
    for folder, texts in planned.items():
        write(folder, texts)
    for sweep in sorted({folder.parent for folder in planned}):
        others = sorted(folder for folder in sweep.iterdir() if folder not in planned)
        lines += [f"stays from before: {folder}" for folder in others if folder.is_dir()]
    yield from lines
