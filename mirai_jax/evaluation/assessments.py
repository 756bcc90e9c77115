"""The kept checkpoints of runs, measured one by one, and the files of the results in the workdirs.

assessment.jsonl has a line for each checkpoint and protocol: {"step", "protocol", measures...}. The measures
are those of evaluation/runs.py; a later line may add to one. future.jsonl has such lines with the measures of
evaluation/future_runs.py.
"""

import contextlib
import dataclasses
import functools
import json
import time
from typing import Any

from mirai_jax.config.schema import Settings
from mirai_jax.evaluation.drawn import Protocol
from mirai_jax.evaluation.future_runs import FutureProtocol
from mirai_jax.evaluation.positions import PositionsProtocol
from mirai_jax.evaluation.runs import Request
from mirai_jax.evaluation.samples import DISTANCES
from mirai_jax.training import restore
from mirai_jax.training import workdir as workdir_lib
from mirai_jax.training.checkpoint import steps_in
from mirai_jax.utils import files, locks, paths
from mirai_jax.utils.errors import ConfigError, DataError
from mirai_jax.utils.progress import duration

FILE = Request.FILE
_POLL_EVERY = 4 * locks.BEAT  # seconds; a run that is silent for so long is dead
_UNASKED = "validation", "samples"  # the parts of a Request that are measured without a flag
# All of them, and the measures of which lines that have the part hold one.
_SIGNS = {"validation": {"validation_cross_entropy"}, "samples": {*DISTANCES}, "probes": {"probe"}}
Asked = Request | FutureProtocol | PositionsProtocol
# Step, how, and what is missing.
_Todo = tuple[int, Protocol | FutureProtocol | PositionsProtocol, tuple[str, ...]]


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


def missing(workdir: str, settings: Settings, steps: list[int], request: Asked) -> list[_Todo]:
    """What the request's file does not hold of these steps, step by step."""
    entries, found = read(workdir, request.FILE), []
    protocols = [(p, p.to_dict()) for p in request.protocols(settings, workdir)]
    for step in steps:
        for protocol, wanted in protocols:
            known = [e for e in entries if (e["step"], e["protocol"]) == (step, wanted)]
            parts = () if known else ("all",)
            if isinstance(request, Request):
                asked = _SIGNS if request.probes and step == settings.num_steps else _UNASKED
                parts = tuple(part for part in asked if not _SIGNS[part] & set().union(*known))
            if parts:
                found.append((step, protocol, parts))
    return found


def latest(workdirs: list[str], protocol: FutureProtocol) -> dict[str, dict[str, Any]]:
    """{workdir: its line of the last step under this protocol}, of runs that have one."""
    wanted, found = protocol.to_dict(), {}
    for workdir in workdirs:
        entries = [e for e in read(workdir, protocol.FILE) if e["protocol"] == wanted]
        if entries:
            found[workdir] = max(entries, key=lambda entry: entry["step"])
    return found


def assess(workdirs: list[str], which: str, request: Asked, follow: bool = False) -> None:
    """Measures the missing checkpoints of all runs; if `follow`, until every run is finished or dead.

    A run is dead that nobody has been at work in from one look to the next, unless it was preempted and
    waits for its turn.

    Args:
        which: 'kept' checkpoints (those of `keep_every`, and the newest of a run that nobody is at work
            in), or the 'last' one.
        follow: wait for runs that have not begun and for checkpoints that are still to come.
    """
    if not workdirs:
        raise ConfigError("--workdir is missing; it must be the folder of a run, or several: A,B")
    assessors: dict[tuple, Any] = {}
    tried: set[tuple] = set()  # what failed is left to the next start, not to the next look
    before, seen = "", {}
    while True:
        # In this order: a run is locked, then has a config, and saves its last step before it ends.
        begun = [w for w in workdirs if (paths.at(w) / "config.json").exists()]
        beats = {workdir: locks.touched(paths.at(workdir)) for workdir in begun}
        todo, awaited = _todo(workdirs, which, request, follow, tried)
        silent = [w for w in awaited if w in beats and seen.get(w, 0) == beats[w]]
        dead = [w for w in silent if not workdir_lib.is_preempted(paths.at(w))]
        seen, waiting = beats, [text for w, text in awaited.items() if w not in dead]
        count = sum(len(of_run) for _, _, of_run in todo)
        line = f"{count} measurements of {len(workdirs)} runs to make"
        if waiting and follow:
            line += f"; waiting for {waiting[0]}" + f" and {len(waiting) - 1} more" * bool(
                waiting[1:]
            )
        if line != before:
            print(line, flush=True)
        before = line
        _assess(todo, count, request, assessors)
        tried |= {(w, step, protocol) for w, _, of_run in todo for step, protocol, _ in of_run}
        if not waiting or not follow:
            if follow and dead:
                print(f"nobody is at work in {', '.join(awaited[w] for w in dead)}", flush=True)
            return
        time.sleep(_POLL_EVERY)


def _todo(
    workdirs: list[str], which: str, request: Asked, follow: bool, tried: set[tuple]
) -> tuple[list[tuple[str, Settings, list[_Todo]]], dict[str, str]]:
    """What is missing of each run and not `tried`, and {workdir: what is still to come}."""
    todo, waiting = [], {}
    for workdir in workdirs:
        folder = paths.at(workdir)
        if follow and not (folder / "config.json").exists():
            waiting[workdir] = f"{workdir} to begin"
            continue
        settings = restore.read_settings("--workdir", workdir)
        there = steps_in(folder / "checkpoints")
        if not follow and not there:
            raise ConfigError(f"--workdir: {workdir} holds no checkpoint yet")
        if settings.num_steps not in there:
            at = max(there, default=0)
            waiting[workdir] = f"{workdir} (step {at:,} of {settings.num_steps:,})"
        steps = _steps(settings, there, which, follow, locks.is_held(folder))
        of_run = missing(workdir, settings, steps, request)
        of_run = [one for one in of_run if (workdir, *one[:2]) not in tried]
        if of_run:
            todo.append((workdir, settings, of_run))
    return todo, waiting


def _steps(
    settings: Settings, there: list[int], which: str, follow: bool, at_work: bool
) -> list[int]:
    """Those of the checkpoints that shall be measured."""
    every = settings.keep_every
    kept = [s for s in there if s == settings.num_steps or (every and s % every == 0)]
    if follow and which == "last":
        return [s for s in kept if s == settings.num_steps]
    # While a run trains, its newest checkpoint may be deleted before it is read.
    if follow or (which == "kept" and kept and at_work):
        return kept
    return sorted({*kept, *there[-1:]}) if which == "kept" else there[-1:]


def _assess(
    todo: list[tuple[str, Settings, list[_Todo]]],
    count: int,
    request: Asked,
    assessors: dict[tuple, Any],
) -> None:
    def images_of(settings: Settings) -> tuple:
        data, tokenizer = settings.data, settings.tokenizer
        return dataclasses.replace(data, num_workers=0), tokenizer.sides, tokenizer.name == "patch"

    for _, settings, _ in todo:
        if images_of(settings) not in assessors:
            log = functools.partial(print, flush=True)
            assessors[images_of(settings)] = request.assessor(settings, log)
    done, begun = 0, time.monotonic()  # after the assessors: the time left is for checkpoints only
    for workdir, settings, of_run in todo:
        at, saved = None, None
        for step, protocol, parts in of_run:
            if step != at:
                at, (_, saved, _) = step, restore.read_run("--workdir", workdir, step)
            assessor = assessors[images_of(settings)]
            measures = assessor.measure(settings, workdir, saved, protocol, parts)
            if measures:
                entry = {"step": step, "protocol": protocol.to_dict(), **measures}
                _add(paths.at(workdir), request.FILE, entry)
            done += 1
            left = (time.monotonic() - begun) / done * (count - done)
            print(
                f"{done}/{count}  {paths.at(workdir).name}  step {step}  "
                f"{assessor.summary(measures)}  {duration(left)} left",
                flush=True,
            )


def _add(folder: files.AnyPath, file: str, entry: dict[str, Any]) -> None:
    """Adds a line to assessment.jsonl or its like."""
    with contextlib.closing(locks.FolderLock(folder, "assess")) as lock:
        while lock.acquire():  # another process adds a line
            time.sleep(0.1)
        text = "".join(json.dumps(line) + "\n" for line in (*read(folder, file), entry))
        files.write_text(folder / file, text)
