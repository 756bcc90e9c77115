"""Writes results/README.md and its figures out of the small files in results/runs: `python -m launch.report`.

    python -m launch.report --collect=runs/sweeps/variants-fashion_mnist,... --machine="2 cores of a Xeon" \\
        --encoders=runs/teacher-fashion_mnist,...
    python -m launch.report
    python -m launch.report --check

The first copies what the report needs of finished runs into results/runs, and of the encoders that are
their teachers into results/encoders; the second writes the report, the same to the byte out of the same
files (pictures: with the same Matplotlib). The third writes nothing. `launch/study.py` says which run
plays which role.

Exit status: 0; with --check 1 where a file is not what the runs give, with a line for each.
"""

import pathlib
import sys
from collections.abc import Collection

from launch import collect, collected, encoders, report_figures, report_text
from launch.collected import Results
from mirai_jax.utils import cli, files
from mirai_jax.utils.errors import ConfigError

_FLAGS, _define = cli.flags_of(__name__)
_RESULTS = _define.string("results", "results", "Folder of the report.")
_COLLECT = _define.list("collect", [], "FOLDER,... of sweeps whose finished runs are copied.")
_ENCODERS = _define.list(
    "encoders", [], "FOLDER,... of finished runs of mirai_jax.teach that are copied."
)
_MACHINE = _define.string("machine", "", "What the collected runs ran on, in words.")
_CHECK = _define.bool("check", False, "Write nothing; say which files would change.")

FIGURES = (report_figures.COMPARISON, report_figures.DIAGNOSTICS, report_figures.PROBE)


def findings(folder: pathlib.Path) -> str:
    """What was written by hand; empty where there is nothing."""
    path = folder / "findings.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def text(folder: pathlib.Path, results: Results, drawn: Collection[str]) -> str:
    """The README, where the figures `drawn` are there."""
    own = encoders.read(folder / "encoders")
    return report_text.readme(results, findings(folder), drawn, own)


def make(folder: pathlib.Path) -> dict[str, bytes | None]:
    """{name of a file in the folder: what it must hold}; None: it must not be there.

    Raises:
        DataError: a file of a run is wrong.
    """
    results = collected.read(folder)
    drawn = report_figures.draw(results)
    readme = text(folder, results, drawn)
    return {"README.md": readme.encode(), **{name: drawn.get(name) for name in FIGURES}}


def wrong(folder: pathlib.Path, made: dict[str, bytes | None]) -> list[str]:
    """A line for each file that is not as it must be."""
    lines = []
    for name, data in made.items():
        path = folder / name
        there = path.read_bytes() if path.exists() else None
        if there == data:
            continue
        why = "is missing" if there is None else "is not what the runs give"
        lines.append(f"{path} {'has nothing to show and must go' if data is None else why}")
    return lines


def write(folder: pathlib.Path, made: dict[str, bytes | None]) -> None:
    """Writes the files."""
    for name, data in made.items():
        if data is None:
            (folder / name).unlink(missing_ok=True)
            continue
        with files.atomic_write(folder / name) as file:
            file.write(data)


def main(argv: list[str]) -> None:
    with cli.program(OSError):
        if len(argv) > 1:
            raise ConfigError(f"argument {argv[1]!r} is not understood; all are --flags")
        sweeps, own = ([pathlib.Path(p) for p in flag.value] for flag in (_COLLECT, _ENCODERS))
        if bool(sweeps or own) != bool(_MACHINE.value):
            raise ConfigError("--collect or --encoders and --machine go together; one is missing")
        if (sweeps or own) and _CHECK.value:
            raise ConfigError("--check writes nothing; it cannot go with --collect or --encoders")
        folder = pathlib.Path(_RESULTS.value)
        if sweeps or own:
            for line in (
                *collect.collect(sweeps, folder / "runs", _MACHINE.value),
                *encoders.collect(own, folder / "encoders", _MACHINE.value),
            ):
                print(line)
            return
        if not (folder / "runs").is_dir():
            raise ConfigError(
                f"{folder / 'runs'} is no folder; --collect=SWEEP,... --machine=... makes it"
            )
        made = make(folder)
        if _CHECK.value:
            lines = wrong(folder, made)
            if lines:
                sys.exit("\n".join(lines))
            print(f"{folder}: all files are what the runs give")
            return
        write(folder, made)
        for name, data in made.items():
            if data is not None:
                print(f"written: {folder / name}")


if __name__ == "__main__":
    cli.run(main)
