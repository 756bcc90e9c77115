"""Measures samples against real images, and the checkpoints of runs: `python -m mirai_jax.evaluate`.

    python -m mirai_jax.evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz \\
        --inception=pt_inception-2015-12-05-6726825d.pth
    python -m mirai_jax.evaluate --samples=RUN/sampled/a,RUN/sampled/b --reference=data:RUN:held_out
    python -m mirai_jax.evaluate --workdir=RUN,RUN --guidance=1,1.5,2 --follow
    python -m mirai_jax.evaluate --workdir=RUN --steps=last --guidance=1,1.5,2 --temperature=0.9,1 --top_k=0,100
    python -m mirai_jax.evaluate --workdir=RUN,RUN --steps=last --future=2000
    python -m mirai_jax.evaluate --workdir=RUN,RUN --positions

Samples and reference are .npz files (`arr_0`, uint8 N x H x W x 3), folders of `mirai_jax.sample` or
of image files, or data:WORKDIR:train and data:WORKDIR:held_out, the real images of a run on a small
set. A reference .npz may also hold statistics (mu, sigma, mu_s, sigma_s); they come before those of
its images, as in ADM's evaluator, whose definitions these are (evaluations/evaluator.py).

Without Inception's weights the distance, precision and recall are over EfficientNet-Lite0's pooled
features: good for comparing runs here, another number than FID, and never called that.

--samples: FID, sFID, Inception Score, precision and recall. Adds a row to results.json for each of several
samples, with how they were drawn; for samples at several guidance scales (or temperatures, or top-k)
also sweep.png. Rows of earlier commands stay; one of the same samples, reference and numbers is completed.
--training=data:RUN:train, or a folder or .npz, also looks for the training images nearest to the samples:
the share of samples that are nearer to one than 99% of the reference images are, and nearest.png.
--by_class also gives the distance of each class and, where the reference is data:RUN:..., its class accuracy:
in results.json, as a table and in by_class.png.

--workdir: of each kept checkpoint (`keep_every`) and the last one (of a run at work, or with --follow, only
that of its last step), the loss on held-out images, and the same metrics of samples at each guidance scale,
temperature and top-k; of images in memory also class accuracy and, with --probes, linear probes of the last
step (mirai_jax/evaluation/runs.py defines each exactly). Samples, guidance, reference, Inception and held-out images are by default those of the run's
config: then the numbers are those that the run measures while it trains. What cannot be had is left out,
with a line. A line of assessment.jsonl in the run's folder for each checkpoint and combination of these;
what lines hold is not computed again: the same command resumes after a stop, tries again what failed, and
measures the checkpoints that a run has added. With --follow it waits for those until all runs are finished, or have
died. Several combinations also give a line on the best one and sweep.png in the run's folder, of its last
measured step.

--workdir with --future measures instead what the states know of tokens to come
(mirai_jax/evaluation/future.py): a line of future.jsonl for each checkpoint, tables, and future.png beside
the runs (or in the only run's folder). With --positions it measures where on the grid the held-out
cross-entropy falls (mirai_jax/evaluation/positions.py): a line of positions.jsonl for each checkpoint.
"""

from typing import Any

from mirai_jax.evaluation import assessments, figures, future_runs, sweep
from mirai_jax.evaluation.future_runs import FutureProtocol
from mirai_jax.evaluation.positions import PositionsProtocol
from mirai_jax.evaluation.runs import Request
from mirai_jax.evaluation.samples import evaluate
from mirai_jax.sampling.sampler import SampleOptions
from mirai_jax.utils import cli, files, paths
from mirai_jax.utils.errors import ConfigError
from mirai_jax.weights import inception as inception_weights

_FLAGS, _define = cli.flags_of(__name__)
_SAMPLES = _define.string("samples", "", "Images to evaluate: A,B or a pattern give a row each.")
_WORKDIR = _define.string("workdir", "", "Instead of samples, runs: A,B or a pattern.")
_REFERENCE = _define.string("reference", "", "Real images, or a .npz with statistics.")
_INCEPTION = _define.string(
    "inception", "", f"{inception_weights.FILE}; without it, EfficientNet-Lite0 is used."
)
_OUT = _define.string("out", "", "Folder of results.json; default: that of the samples.")
_BATCH = _define.integer("batch_size", 64, "Images at once on each device.", lower_bound=1)
_TRAINING = _define.string("training", "", "Training images: how many samples are copies of them?")
_CLASSES = _define.bool("by_class", False, "Also the metrics of each class, where all have labels.")
_SAVE = _define.string("save_statistics", "", "Also write the reference's moments, a .npz.")
# Of runs.
_STEPS = _define.enum("steps", "kept", ("kept", "last"), "Every kept checkpoint, or the last.")
_NUM = _define.integer(
    "num_samples", 0, "Images to draw at each; 0: the run's evaluate_samples.", lower_bound=0
)
_GUIDANCE = _define.list("guidance", [], "Scales of the samples, 1: none; default: the run's.")
_TEMPERATURE = _define.list("temperature", [], "Of the samples; default: the run's.")
_TOP_K = _define.list("top_k", [], "Of the samples, 0: all; default: the run's.")
_SEED = _define.integer("seed", 0, "Of the samples.", lower_bound=0, upper_bound=2**31 - 1)
_PIXELS = _define.integer("pixels", 224, "Side of EfficientNet-Lite0's input.", lower_bound=32)
_VALIDATION = _define.string(
    "validation", "", "Shards of held-out codes; default: the run's validation_path."
)
_HELD_OUT = _define.integer(
    "held_out", 0, "Held-out images, spread evenly; 0: all, for --future 5,000.", lower_bound=0
)
_PROBES = _define.bool("probes", False, "Also linear probes of the last step.")
_FUTURE = _define.integer(
    "future", 0, "Training images of the probes for the future (and nothing else).", lower_bound=0
)
_TEACHER = _define.string("teacher", "", "With --future: a run whose encoder is taken for all.")
_POSITIONS = _define.bool(
    "positions", False, "The cross-entropy by grid position (and nothing else)."
)
_FOLLOW = _define.bool(
    "follow", False, "Wait for what the runs add, until all are finished or dead."
)

_OF_SAMPLES = (_OUT, _BATCH, _SAVE, _TRAINING, _CLASSES)
_OF_RUNS = (
    _STEPS, _NUM, _GUIDANCE, _TEMPERATURE, _TOP_K, _SEED, _PIXELS, _VALIDATION, _HELD_OUT, _PROBES,
    _FUTURE, _TEACHER, _POSITIONS, _FOLLOW,
)  # fmt: skip


def _evaluate_samples() -> None:
    if not _SAMPLES.value or not _REFERENCE.value:
        raise ConfigError("--samples and --reference are needed, or --workdir: see --help")
    if _SAVE.value and not _INCEPTION.value:
        raise ConfigError("--save_statistics needs --inception: no other statistics are read")
    folder = paths.at(_SAVE.value).parent
    if not files.is_remote(folder) and not folder.is_dir():
        raise ConfigError(f"--save_statistics is {_SAVE.value!r}, in a folder that is missing")
    given = (_REFERENCE, _INCEPTION, _BATCH, _OUT, _SAVE, _TRAINING, _CLASSES)
    evaluate(paths.several(_SAMPLES.value), *(flag.value for flag in given))


def _evaluate_runs() -> None:
    workdirs = paths.several(_WORKDIR.value)
    if _POSITIONS.value:
        protocol = PositionsProtocol(_HELD_OUT.value, _VALIDATION.value)
        assessments.assess(workdirs, _STEPS.value, protocol, _FOLLOW.value)
        return
    if _FUTURE.value:
        protocol = FutureProtocol(_FUTURE.value, _HELD_OUT.value or 5000, _TEACHER.value)
        assessments.assess(workdirs, _STEPS.value, protocol, _FOLLOW.value)
        _show(workdirs, protocol)
        return
    options = {
        "guidance": _several(_GUIDANCE, float, "1 or more: 1,1.5"),
        "temperature": _several(_TEMPERATURE, float, "more than 0: 0.9,1"),
        "top_k": _several(_TOP_K, int, "0 (all) or more: 0,100"),
    }
    fields = (_SEED, _PIXELS, _HELD_OUT, _VALIDATION, _REFERENCE, _INCEPTION, _PROBES)
    given = {field.name: field.value for field in fields}
    request = Request(samples=_NUM.value, **options, **given)
    assessments.assess(workdirs, _STEPS.value, request, _FOLLOW.value)
    for workdir in workdirs:
        sweep.show(workdir, request)


def _several(flag: Any, kind: type, allowed: str) -> tuple[Any, ...]:
    """The numbers of a flag, each once."""
    try:
        found = tuple(dict.fromkeys(map(kind, flag.value)))
        for value in found:
            SampleOptions(**{flag.name: value})
    except ValueError as error:
        raise ConfigError(
            f"--{flag.name} is {','.join(flag.value)!r}; it must be {allowed}"
        ) from error
    return found


def _show(workdirs: list[str], protocol: FutureProtocol) -> None:
    """Prints the tables, and writes the figure, of the last steps."""
    folder = paths.common(workdirs)
    start = len(f"{folder}/")
    name = lambda workdir: str(paths.at(workdir).absolute())[start:] or folder.name
    found = {name(w): line for w, line in assessments.latest(workdirs, protocol).items()}
    for name, measures in found.items():
        print(future_runs.table(name, measures))
    path = folder / "future.png"
    figures.future_figure(path, found)
    print(f"wrote {path}")


def main(argv: list[str]) -> None:
    with cli.program(OSError, argv=argv, interrupted="interrupted; the same command resumes"):
        mine = "workdir" if _WORKDIR.value else "samples"
        for flag in (_SAMPLES, *_OF_SAMPLES) if _WORKDIR.value else _OF_RUNS:
            if flag.present:
                raise ConfigError(f"--{flag.name} has no meaning with --{mine}")
        if _WORKDIR.value:
            _evaluate_runs()
        else:
            _evaluate_samples()


if __name__ == "__main__":
    cli.run(main)
