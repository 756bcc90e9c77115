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
"""

from mirai_jax.evaluation import assessments
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
_FOLLOW = _define.bool("follow", False, "Wait for what the runs add, until all are finished.")


def main(argv: list[str]) -> None:
    with cli.program(OSError, argv=argv, interrupted="interrupted; the same command resumes"):
        fields = (_SAMPLES, _GUIDANCE, _SEED, _PIXELS, _HELD_OUT)
        protocol = Protocol(**{field.name: field.value for field in fields})
        assessments.assess(paths.several(_WORKDIR.value), _STEPS.value, protocol, _FOLLOW.value)


if __name__ == "__main__":
    cli.run(main)
