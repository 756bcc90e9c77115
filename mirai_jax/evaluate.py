"""FID, sFID, Inception Score, precision and recall: `python -m mirai_jax.evaluate`.

    python -m mirai_jax.evaluate --samples=samples.npz --reference=VIRTUAL_imagenet256_labeled.npz \\
        --inception=pt_inception-2015-12-05-6726825d.pth
    python -m mirai_jax.evaluate --samples=RUN/sampled/a,RUN/sampled/b --reference=data:RUN:held_out

Samples and reference are .npz files (`arr_0`, uint8 N x H x W x 3), folders of `mirai_jax.sample` or
of image files, or data:WORKDIR:train and data:WORKDIR:held_out, the real images of a run on a small
set. A reference .npz may also hold statistics (mu, sigma, mu_s, sigma_s); they come before those of
its images, as in ADM's evaluator, whose definitions these are (evaluations/evaluator.py).

Without Inception's weights the distance, precision and recall are over EfficientNet-Lite0's pooled
features: good for comparing runs here, another number than FID, and never called that.

--training=data:RUN:train, or a folder or .npz, also looks for the training images nearest to the samples:
the share of samples that are nearer to one than 99% of the reference images are, and nearest.png.

Writes results.json, with how the samples were drawn beside each number, anew after each of several
samples; for samples at several guidance scales also sweep.png.
"""

from mirai_jax.evaluation.samples import evaluate
from mirai_jax.utils import cli, files, paths
from mirai_jax.utils.errors import ConfigError
from mirai_jax.weights import inception as inception_weights

_FLAGS, _define = cli.flags_of(__name__)
_SAMPLES = _define.string("samples", "", "Images to evaluate: A,B or a pattern give a row each.")
_REFERENCE = _define.string("reference", None, "Real images, or a .npz with statistics.")
_INCEPTION = _define.string(
    "inception", "", f"{inception_weights.FILE}; without it, EfficientNet-Lite0 is used."
)
_OUT = _define.string("out", "", "Folder of results.json; default: that of the samples.")
_BATCH = _define.integer("batch_size", 64, "Images at once on each device.", lower_bound=1)
_TRAINING = _define.string("training", "", "Training images: how many samples are copies of them?")
_SAVE = _define.string("save_statistics", "", "Also write the reference's moments, a .npz.")


def main(argv: list[str]) -> None:
    with cli.program(OSError, argv=argv, interrupted="interrupted"):
        if not _SAMPLES.value or not _REFERENCE.value:
            raise ConfigError("--samples and --reference are needed: see --help")
        if _SAVE.value and not _INCEPTION.value:
            raise ConfigError("--save_statistics needs --inception: no other statistics are read")
        folder = paths.at(_SAVE.value).parent
        if not files.is_remote(folder) and not folder.is_dir():
            raise ConfigError(f"--save_statistics is {_SAVE.value!r}, in a folder that is missing")
        given = (_REFERENCE, _INCEPTION, _BATCH, _OUT, _SAVE, _TRAINING)
        evaluate(paths.several(_SAMPLES.value), *(flag.value for flag in given))


if __name__ == "__main__":
    cli.run(main)
