"""Copies what results/tables.py needs of a sweep's finished runs, without the paths of this machine.

    python -m launch.collect --sweeps=runs/sweeps/study_direction-fashion_mnist --machine="2 cores" --commit=abc

Of each run: config.json, assessment.jsonl, positions.jsonl and future.jsonl as they are, and run.json with
its command, the seconds of its training steps, the machine and the commit. What stands there of a run is
replaced; nothing is written before every run was read.
"""

import json
import pathlib
import re
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.plan import last_step
from mirai_jax.training.metrics_writer import read_metrics
from mirai_jax.utils import cli, files
from mirai_jax.utils.errors import ConfigError, DataError

PUBLIC = ("/usr/share/datasets/",)  # of packages: the same on other machines
_LINES = ("assessment.jsonl", "positions.jsonl", "future.jsonl")
_RUNS = "runs/sweeps"  # where a reader's runs will be
_PATH = re.compile(r"""(?:^|(?<=[\s:=,;'"(\[]))/[^\s/:,;'")\]][^\s:,;'")\]]*""")
_STARTED = re.compile(
    r"^launch: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.+ -m mirai_jax\.main .*)$", re.MULTILINE
)

_FLAGS, _define = cli.flags_of(__name__)
_SWEEPS = _define.list("sweeps", [], "Folders of sweeps.")
_OUT = _define.string("out", "results/runs", "Where the copies go.")
_MACHINE = _define.string("machine", "", "What the runs ran on, in words.")
_COMMIT = _define.string("commit", "", "Of the code that ran them.")


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


def _command(log: pathlib.Path, workdir: str, machine: Machine) -> str:
    """How a user would start the run."""
    started = _STARTED.findall(log.read_text(errors="replace") if log.exists() else "")
    if not started:
        raise DataError("it holds no command of the run")
    words = shlex.split(started[-1])
    words = [
        f"--workdir={workdir}" if word.startswith("--workdir=") else machine.portable(word)
        for word in words[words.index("-m") :]
    ]
    return shlex.join(["python", *words])


def _seconds(folder: pathlib.Path, batch_size: int) -> float:
    """Of the training steps that count, however often the run was stopped."""
    entries = read_metrics(folder)
    speeds = [entry["images_per_second"] for entry in entries if "images_per_second" in entry]
    usual = statistics.median(speeds)  # the first line after a stop has no speed
    total, before = 0.0, 0
    for entry in entries:
        images = (entry["step"] - before) * batch_size
        total, before = total + images / entry.get("images_per_second", usual), entry["step"]
    return total


def _texts(folder: pathlib.Path, sweep: str, machine: Machine, about: dict) -> dict[str, str]:
    """{name of a file: its text} of a finished run."""
    config = json.loads((folder / "config.json").read_text())
    path = folder / "config.json"
    try:
        texts = {path.name: json.dumps(machine.portable(config), indent=2) + "\n"}
        for name in _LINES:
            path = folder / name
            if path.exists():
                entries = [json.loads(line) for line in path.read_text().splitlines()]
                texts[name] = "".join(json.dumps(machine.portable(e)) + "\n" for e in entries)
        path = folder.with_name(f"{folder.name}.log")
        run = {
            "setting": folder.name.removesuffix(f"-seed={config['seed']}"),
            "command": _command(path, f"{_RUNS}/{sweep}/{folder.name}", machine),
            "steps": config["num_steps"],
            "seconds": round(_seconds(folder, config["batch_size"]), 1),
        }
    except (DataError, ValueError, KeyError) as error:
        raise DataError(f"{path}: {error}") from error
    return {**texts, "run.json": json.dumps(run | about, indent=2) + "\n"}


def collect(
    sweeps: Sequence[pathlib.Path], out: pathlib.Path, machine: str, commit: str = ""
) -> Iterator[str]:
    """Copies the finished runs of sweep folders; yields a line for each run.

    Raises:
        DataError: one line; a folder holds no runs, or a file cannot be shown to others.
    """
    planned: dict[pathlib.Path, dict[str, str]] = {}
    lines = []
    for sweep in sweeps:
        paths = sorted(path.parent for path in sweep.glob("*/config.json"))
        if not paths:
            raise DataError(f"{sweep} holds no runs; it must be the folder of a sweep")
        name = sweep.resolve().name.removesuffix("-fashion_mnist")
        for folder in paths:
            steps = json.loads((folder / "config.json").read_text())["num_steps"]
            step = last_step(folder / "metrics.jsonl")
            if step != steps or not (folder / "summary.png").exists():
                lines.append(f"left out: {folder}: unfinished, at step {step} of {steps}")
                continue
            target = out / name / folder.name
            about = {"machine": machine} | ({"commit": commit} if commit else {})
            planned[target] = _texts(folder, name, Machine(sweep, name), about)
            missing = [file for file in _LINES[:2] if file not in planned[target]]
            lines.append(f"collected: {target}" + f" (no {', '.join(missing)})" * bool(missing))
    for folder, texts in planned.items():
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()  # of an earlier run of that name
        for name, text in texts.items():
            files.write_text(folder / name, text)
    yield from lines


def main(argv: list[str]) -> None:
    with cli.program(OSError, argv=argv):
        if not _SWEEPS.value or not _MACHINE.value:
            raise ConfigError("--sweeps and --machine are needed: see --help")
        sweeps, out = map(pathlib.Path, _SWEEPS.value), pathlib.Path(_OUT.value)
        for line in collect(list(sweeps), out, _MACHINE.value, _COMMIT.value):
            print(line)


if __name__ == "__main__":
    cli.run(main)
