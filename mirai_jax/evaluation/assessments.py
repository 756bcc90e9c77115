"""The kept checkpoints of runs, assessed one by one, and the files of the results in the workdirs.

assessment.jsonl has a line for each checkpoint and protocol: {"step", "protocol", measures...}. The measures
are those of evaluation/runs.py. future.jsonl has such lines with the measures of evaluation/future_runs.py.
"""

import contextlib
import dataclasses
import functools
import json
import time
from typing import Any

from mirai_jax.config.schema import Settings
from mirai_jax.evaluation.future_runs import FutureAssessor, FutureProtocol
from mirai_jax.evaluation.runs import Assessor, Protocol
from mirai_jax.training import restore
from mirai_jax.training.checkpoint import steps_in
from mirai_jax.utils import files, paths
from mirai_jax.utils.errors import ConfigError, DataError
from mirai_jax.utils.locks import FolderLock
from mirai_jax.utils.progress import duration

FILE = Protocol.FILE
_POLL_EVERY = 20.0  # seconds
AnyProtocol = Protocol | FutureProtocol
_Missing = list[tuple[str, Settings, list[int]]]  # the steps to assess, of each workdir


def read(workdir: str, file: str = FILE) -> list[dict[str, Any]]:
    """The lines of assessment.jsonl, or of future.jsonl; [] where there is none.

    Raises:
        DataError: a line is damaged, except a last one that a stop cut off.
    """
    path = paths.at(workdir) / file
    text = path.read_text(errors="replace") if path.exists() else ""
    entries = []
    for number, line in enumerate(text.split("\n")[:-1], 1):  # after the last \n: what was cut off
        try:
            entry = json.loads(line)
            if not (type(entry["step"]) is int and isinstance(entry["protocol"], dict)):
                raise TypeError
        except Exception as error:  # of a damaged line, one of half a dozen kinds
            raise DataError(f"{path}, line {number}: not an assessment") from error
        entries.append(entry)
    return entries


def missing(workdir: str, steps: list[int], protocol: AnyProtocol) -> list[int]:
    """Those of `steps` that the protocol's file does not hold under this protocol."""
    wanted = dataclasses.asdict(protocol)
    done = {entry["step"] for entry in read(workdir, protocol.FILE) if entry["protocol"] == wanted}
    return [step for step in steps if step not in done]


def latest(workdirs: list[str], protocol: AnyProtocol) -> dict[str, dict[str, Any]]:
    """{workdir: its assessment of the last step under this protocol}, of runs that have one."""
    wanted, found = dataclasses.asdict(protocol), {}
    for workdir in workdirs:
        entries = [e for e in read(workdir, protocol.FILE) if e["protocol"] == wanted]
        if entries:
            found[workdir] = max(entries, key=lambda entry: entry["step"])
    return found


def assess(workdirs: list[str], which: str, protocol: AnyProtocol, follow: bool = False) -> None:
    """Assesses the missing checkpoints of all runs; if `follow`, until every run is finished.

    Args:
        which: 'kept' checkpoints (those of `keep_every`), or the 'last' one.
        follow: wait for runs that have not begun and for checkpoints that are still to come.
    """
    if not workdirs:
        raise ConfigError("--workdir is missing; it must be the folder of a run, or several: A,B")
    assessors, before = {}, -1
    while True:
        todo, finished = _todo(workdirs, which, protocol, follow)
        count = sum(len(steps) for _, _, steps in todo)
        if count != before:
            more = "" if finished or not follow else "; waiting for more"
            print(f"{count} checkpoints of {len(workdirs)} runs to assess{more}", flush=True)
        before = count
        _assess(todo, count, protocol, assessors)
        if finished or not follow:
            return
        time.sleep(_POLL_EVERY)


def _todo(
    workdirs: list[str], which: str, protocol: AnyProtocol, follow: bool
) -> tuple[_Missing, bool]:
    """The missing steps of each run, and whether all runs are finished."""
    todo, finished = [], True
    for workdir in workdirs:
        folder = paths.at(workdir)
        if follow and not (folder / "config.json").exists():
            finished = False
            continue
        settings = restore.read_settings("--workdir", workdir)
        protocol.check(settings, workdir)
        there = steps_in(folder / "checkpoints")
        if not follow and not there:
            raise ConfigError(f"--workdir: {workdir} holds no checkpoint yet")
        finished = finished and settings.num_steps in there
        steps = missing(workdir, _steps(settings, there, which, follow), protocol)
        if steps:
            todo.append((workdir, settings, steps))
    return todo, finished


def _steps(settings: Settings, there: list[int], which: str, follow: bool) -> list[int]:
    """Those of the checkpoints that shall be assessed."""
    every = settings.keep_every
    kept = [s for s in there if s == settings.num_steps or (every and s % every == 0)]
    if follow and which == "last":
        return [s for s in kept if s == settings.num_steps]
    # While a run trains, its newest checkpoint may be deleted before it is read.
    return kept if follow or (which == "kept" and kept) else there[-1:]


def _assess(todo: _Missing, count: int, protocol: AnyProtocol, assessors: dict[tuple, Any]) -> None:
    def images_of(settings: Settings) -> tuple:
        data, tokenizer = settings.data, settings.tokenizer
        return dataclasses.replace(data, num_workers=0), tokenizer.sides, tokenizer.name == "patch"

    make = FutureAssessor if isinstance(protocol, FutureProtocol) else Assessor
    for _, settings, _ in todo:
        if images_of(settings) not in assessors:
            log = functools.partial(print, flush=True)
            assessors[images_of(settings)] = make(settings, protocol, log)
    done, begun = 0, time.monotonic()  # after the assessors: the time left is for checkpoints only
    for workdir, settings, steps in todo:
        for step in steps:
            _, saved, _ = restore.read_run("--workdir", workdir, step)
            assessor = assessors[images_of(settings)]
            measures = assessor.measure(settings, workdir, saved, step == settings.num_steps)
            entry = {"step": step, "protocol": dataclasses.asdict(protocol), **measures}
            with contextlib.closing(FolderLock(paths.at(workdir), "assess")) as lock:
                while lock.acquire():  # another assessment adds a line
                    time.sleep(0.1)
                lines = *read(workdir, protocol.FILE), entry
                text = "".join(json.dumps(line) + "\n" for line in lines)
                files.write_text(paths.at(workdir) / protocol.FILE, text)
            done += 1
            left = (time.monotonic() - begun) / done * (count - done)
            print(
                f"{done}/{count}  {paths.at(workdir).name}  step {step}  "
                f"{assessor.summary(measures)}  {duration(left)} left",
                flush=True,
            )
