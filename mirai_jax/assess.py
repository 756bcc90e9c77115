"""Assesses the checkpoints that runs kept: `python -m mirai_jax.assess --workdir=RUN,RUN`.

    python -m mirai_jax.assess --workdir=runs/mirai_e-fashion_mnist
    python -m mirai_jax.assess --workdir=\\
        $(ls -d runs/sweeps/variants-fashion_mnist/*/checkpoints | xargs -n1 dirname | paste -sd,)

For runs on images in memory (mnist, fashion_mnist). Each kept checkpoint (`keep_every`) and the last
one give a line of assessment.jsonl in the run's folder: held-out cross-entropy, Fréchet distances
of samples over EfficientNet-Lite0 (not FID), agreement of a classifier with the class asked for, and
for the last step linear probes (mirai_jax/evaluation/runs.py defines each exactly). Lines that exist
are not computed again: the same command resumes after a stop, and assesses the checkpoints that a run
has added. With --follow it waits for those until all runs are finished.

    python -m mirai_jax.assess --workdir=RUN,RUN --steps=last --future=2000

measures instead what the states know of tokens to come (mirai_jax/evaluation/future.py), with regressions on
2000 training images: a line of future.jsonl for each checkpoint, tables, and future.png beside the runs (or in
the only run's folder).
"""

import os

from mirai_jax.evaluation import assessments, figures, future_runs
from mirai_jax.evaluation.future_runs import FutureProtocol
from mirai_jax.evaluation.runs import Protocol
from mirai_jax.utils import cli, paths

_FLAGS, _define = cli.flags_of(__name__)
_DEFAULT = Protocol()
_WORKDIR = _define.string("workdir", "", "Folders of runs: A,B or a pattern.")
_STEPS = _define.enum("steps", "kept", ("kept", "last"), "Every kept checkpoint, or the last.")
_SAMPLES = _define.integer("samples", _DEFAULT.samples, "Images to draw at each.", lower_bound=2)
_GUIDANCE = _define.float(
    "guidance", _DEFAULT.guidance, "Of the samples; 1: none.", lower_bound=1.0
)
_SEED = _define.integer(
    "seed", _DEFAULT.seed, "Of the samples.", lower_bound=0, upper_bound=2**31 - 1
)
_PIXELS = _define.integer(
    "pixels", _DEFAULT.pixels, "Side of EfficientNet-Lite0's input.", lower_bound=32
)
_HELD_OUT = _define.integer(
    "held_out", _DEFAULT.held_out, "Held-out images for cross-entropy and probes.", lower_bound=2
)
_FUTURE = _define.integer(
    "future", 0, "Training images of the probes for the future (and nothing else).", lower_bound=0
)
_TEACHER = _define.string("teacher", "", "With --future: a run whose encoder is taken for all.")
_FOLLOW = _define.bool("follow", False, "Wait for what the runs add, until all are finished.")


def main(argv: list[str]) -> None:
    with cli.program(OSError, argv=argv, interrupted="interrupted; the same command resumes"):
        workdirs = paths.several(_WORKDIR.value)
        if _FUTURE.value:
            protocol = FutureProtocol(_FUTURE.value, _HELD_OUT.value, _TEACHER.value)
        else:
            fields = (_SAMPLES, _GUIDANCE, _SEED, _PIXELS, _HELD_OUT)
            protocol = Protocol(**{field.name: field.value for field in fields})
        assessments.assess(workdirs, _STEPS.value, protocol, _FOLLOW.value)
        if _FUTURE.value:
            _show(workdirs, protocol)


def _show(workdirs: list[str], protocol: FutureProtocol) -> None:
    """Prints the tables, and writes the figure, of the last steps."""
    folder = paths.common(workdirs)
    name = lambda w: folder.name if len(workdirs) == 1 else os.path.relpath(w, str(folder))
    found = {name(w): line for w, line in assessments.latest(workdirs, protocol).items()}
    for name, measures in found.items():
        print(future_runs.table(name, measures))
    path = folder / "future.png"
    figures.future_figure(path, found)
    print(f"wrote {path}")


if __name__ == "__main__":
    cli.run(main)
