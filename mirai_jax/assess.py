"""Assesses the checkpoints that runs kept: `python -m mirai_jax.assess --workdir=RUN,RUN`.

    python -m mirai_jax.assess --workdir=runs/mirai_e-fashion_mnist
    python -m mirai_jax.assess --workdir=\\
        $(ls -d runs/sweeps/variants-fashion_mnist/*/checkpoints | xargs -n1 dirname | paste -sd,)

For runs on images in memory (mnist, fashion_mnist). Each kept checkpoint (`keep_every`) and the last
one give a line of assessment.jsonl in the run's folder: held-out cross-entropy, Fréchet distances
of samples over EfficientNet-Lite0 (not FID), agreement of a classifier with the class asked for, and
for the last step linear probes (mirai_jax/evaluation/runs.py says each exactly). What is there already is
not done again: the same command goes on after a stop, and takes in what a run has added; with
--follow it waits for that until all runs are finished.
"""

import dataclasses
import pathlib
import time

from absl import flags

from mirai_jax.config.schema import Settings
from mirai_jax.evaluation import runs
from mirai_jax.evaluation.runs import Assessor, Protocol
from mirai_jax.training import restore
from mirai_jax.training.checkpoint import steps_in
from mirai_jax.utils import cli
from mirai_jax.utils.errors import ConfigError
from mirai_jax.utils.progress import duration

_FLAGS = cli.flag_values(__name__)
_DEFAULT = Protocol()
_WORKDIR = flags.DEFINE_list("workdir", [], "Folders of runs.", flag_values=_FLAGS)
_STEPS = flags.DEFINE_enum(
    "steps", "kept", ("kept", "last"), "Every kept checkpoint, or the last.", flag_values=_FLAGS
)
_SAMPLES = flags.DEFINE_integer(
    "samples", _DEFAULT.samples, "Images to draw at each.", flag_values=_FLAGS
)
_GUIDANCE = flags.DEFINE_float(
    "guidance", _DEFAULT.guidance, "Scale of the samples; 1: none.", flag_values=_FLAGS
)
_SEED = flags.DEFINE_integer("seed", _DEFAULT.seed, "Of the samples.", flag_values=_FLAGS)
_PIXELS = flags.DEFINE_integer(
    "pixels", _DEFAULT.pixels, "Side of what EfficientNet-Lite0 is shown.", flag_values=_FLAGS
)
_HELD_OUT = flags.DEFINE_integer(
    "held_out",
    _DEFAULT.held_out,
    "Held-out images for cross-entropy and probes.",
    flag_values=_FLAGS,
)
_FOLLOW = flags.DEFINE_bool(
    "follow", False, "Wait for what the runs add, until all are finished.", flag_values=_FLAGS
)

_LOOK_EVERY = 20.0  # seconds


def _protocol() -> Protocol:
    for flag, least in ((_SAMPLES, 2), (_GUIDANCE, 1), (_SEED, 0), (_PIXELS, 32), (_HELD_OUT, 2)):
        if not least <= flag.value < 2**31:
            raise ConfigError(f"--{flag.name} is {flag.value}; it must be {least} or more")
    return Protocol(
        samples=_SAMPLES.value,
        guidance=_GUIDANCE.value,
        seed=_SEED.value,
        pixels=_PIXELS.value,
        held_out=_HELD_OUT.value,
    )


def _steps(settings: Settings, there: list[int], which: str, follow: bool) -> list[int]:
    """Of the checkpoints that are there, those to look at."""
    every = settings.keep_every
    kept = [s for s in there if s == settings.num_steps or (every and s % every == 0)]
    if follow and which == "last":
        return [s for s in kept if s == settings.num_steps]
    # The newest of a run that goes on may be gone when its turn comes.
    return kept if follow or (which == "kept" and kept) else there[-1:]


def _todo(
    workdirs: list[str], which: str, protocol: Protocol, follow: bool
) -> tuple[list[tuple[str, Settings, list[int]]], bool]:
    """What is missing of each run, and whether all runs are at their end."""
    todo, ended = [], True
    for workdir in workdirs:
        settings = restore.read_settings("--workdir", workdir)
        if protocol.guidance > 1 and not settings.generator.has_null_class:
            raise ConfigError(
                f"--guidance is {protocol.guidance}; it must be 1 for {workdir}, which has no null "
                "class"
            )
        there = steps_in(pathlib.Path(workdir) / "checkpoints")
        ended = ended and settings.num_steps in there
        steps = runs.missing(workdir, _steps(settings, there, which, follow), protocol)
        if steps:
            todo.append((workdir, settings, steps))
    return todo, ended


def run(workdirs: list[str], which: str, protocol: Protocol, follow: bool = False) -> None:
    """Assesses what is missing of all runs; if `follow`, until they are at their end.

    Raises:
        ConfigError, DataError: one line.
    """
    if not workdirs:
        raise ConfigError("--workdir is missing; it must be the folder of a run, or several: A,B")
    waiting = [w for w in workdirs if not (pathlib.Path(w) / "config.json").exists()]
    if follow and waiting:
        print(f"waiting for runs that have not begun: {', '.join(waiting)}", flush=True)
    if not follow:
        for workdir in workdirs:
            if not steps_in(pathlib.Path(workdir) / "checkpoints"):
                restore.read_settings("--workdir", workdir)  # is it a run at all?
                raise ConfigError(f"--workdir: {workdir} holds no checkpoint yet")
    assessors: dict[tuple, Assessor] = {}
    while True:
        begun = [w for w in workdirs if (pathlib.Path(w) / "config.json").exists() or not follow]
        todo, ended = _todo(begun, which, protocol, follow)
        count = sum(len(steps) for _, _, steps in todo)
        if count or not follow:
            print(f"{count} checkpoints of {len(workdirs)} runs to assess", flush=True)
        _assess(todo, count, protocol, assessors)
        if not follow or (ended and len(begun) == len(workdirs)):
            return
        time.sleep(_LOOK_EVERY)


def _images(settings: Settings) -> tuple:
    """What tells one set of images from another."""
    data = settings.data
    return data.name, data.path, data.held_out, settings.tokenizer.image_size


def _assess(
    todo: list[tuple[str, Settings, list[int]]],
    count: int,
    protocol: Protocol,
    assessors: dict[tuple, Assessor],
) -> None:
    for _, settings, _ in todo:
        if _images(settings) not in assessors:
            made = Assessor(settings, protocol, lambda line: print(line, flush=True))
            assessors[_images(settings)] = made
    done, begun = 0, time.monotonic()  # from here on: the time left is of the checkpoints
    for workdir, settings, steps in todo:
        of_run = assessors[_images(settings)].of_run(settings, workdir)
        for step in steps:
            _, saved, _ = restore.read_run("--workdir", workdir, step)
            measures = of_run(saved[protocol.weights], probed=step == settings.num_steps)
            entry = {"step": step, "protocol": dataclasses.asdict(protocol), **measures}
            runs.write(workdir, [*runs.read(workdir), entry])
            done += 1
            left = (time.monotonic() - begun) / done * (count - done)
            print(
                f"{done}/{count}  {pathlib.Path(workdir).name}  step {step}  "
                f"ce {measures['cross_entropy']:.4f}  frechet {measures['frechet']:.2f}  "
                f"agreement {measures['agreement']:.1%}  {duration(left)} left",
                flush=True,
            )


def main(argv: list[str]) -> None:
    with cli.program(OSError, interrupted="interrupted; the same command goes on"):
        if len(argv) > 1:
            raise ConfigError(f"argument {argv[1]!r} is not understood; all are --flags")
        run(_WORKDIR.value, _STEPS.value, _protocol(), _FOLLOW.value)


if __name__ == "__main__":
    cli.run(main)
