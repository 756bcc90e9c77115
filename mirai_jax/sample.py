"""Samples at scale: `python -m mirai_jax.sample --workdir=runs/mirai_e-imagenet_b`.

    python -m mirai_jax.sample --workdir=RUN --num_images=50000 --guidance=2.0
    python -m mirai_jax.sample --workdir=RUN --guidance=1.0,1.5,2.0,2.5       # a folder for each
    python -m mirai_jax.sample --checkpoint=c2i_B_256.pt --tokenizer=vq_ds16_c2i.pt --out=samples
    python -m mirai_jax.sample --workdir=RUN --inpaint=IMAGE --mask=MASK      # redraw what is white in MASK
    python -m mirai_jax.sample --workdir=RUN --continue_from=IMAGE --rows=4   # redraw below 4 rows of tokens

A folder holds samples.npz (`arr_0`, uint8 N x H x W x 3, and `labels`: what the ADM evaluator reads),
grid.png, and protocol.json: which weights, labels, seed and options. Image i depends on these and on
i alone. `--batch_size` is among them, since another batch size rounds differently in bfloat16.
Images are kept in parts of 500: after any stop the same command resumes, and ends with the same bytes
on the same kind of device. Several hosts share the work with `--process_index` of `--process_count`.
"""

from mirai_jax.models.kv_cache import DTYPES
from mirai_jax.sampling import job
from mirai_jax.sampling.painter import Given, Source
from mirai_jax.sampling.sampler import GUIDANCE_SCHEDULES, SampleOptions
from mirai_jax.training import given_tokens
from mirai_jax.training import sources_of_samples as sources
from mirai_jax.utils import cli, paths
from mirai_jax.utils.errors import ConfigError, first_line

_FLAGS, _define = cli.flags_of(__name__)
_WORKDIR = _define.string("workdir", None, "Folder of the run to sample from.")
_STEP = _define.integer("step", None, "Checkpoint of the workdir; default: the newest.")
_STATE = _define.enum("state", "ema", ("ema", "model"), "Which weights of the workdir.")
_CHECKPOINT = _define.string(
    "checkpoint", None, "Instead of a workdir: a generator's PyTorch file or converted folder."
)
_TOKENIZER = _define.string(
    "tokenizer", None, "Weights of the VQ tokenizer; default: the workdir's."
)
_SIDE = _define.integer(
    "grid", 0, "Tokens a side of --checkpoint; 0: its file's, else 16.", lower_bound=0
)
_OUT = _define.string("out", None, "Folder of the samples; default: one inside the workdir.")
_NUM = _define.integer(
    "num_images",
    None,
    "Images to draw; default: 50,000, or 6 of an image that is redrawn.",
    lower_bound=1,
)
_INPAINT = _define.string("inpaint", None, "Image of which a part is redrawn.")
_MASK = _define.string("mask", None, "Image of its size; a token with a white pixel is redrawn.")
_CONTINUE = _define.string(
    "continue_from", None, "Image of which all but the first rows is redrawn."
)
_ROWS = _define.integer("rows", None, "How many rows of its tokens are kept.")
_LABELS = _define.string("labels", "random", "random, balanced, or class ids: 0,207,360.")
_GUIDANCE = _define.list("guidance", ["2.0"], "One scale, or several: a folder for each.")
_SCHEDULE = _define.enum(
    "schedule", "constant", GUIDANCE_SCHEDULES, "Of the guidance over the tokens."
)
_POWER = _define.float("power", 2.75, "Of --schedule=power_cosine; see SampleOptions.")
_INTERVAL = _define.integer("interval", -1, "Guide tokens up to this one only; -1: all.")
_TEMPERATURE = _define.float("temperature", 1.0, "Divides the logits.")
_TOP_K = _define.integer("top_k", 0, "Keep the k likeliest tokens; 0: all.")
_TOP_P = _define.float("top_p", 1.0, "Keep the likeliest tokens that make up p; 1: all.")
_CACHE = _define.enum(
    "cache_dtype", "model", DTYPES, "Of the keys and values kept; see SampleOptions."
)
_SEED = _define.integer("seed", 0, "Of labels and tokens.", lower_bound=0, upper_bound=2**32 - 1)
_SIZE = _define.integer(
    "resize", 0, "Pixels a side of the images kept; 0: as decoded.", lower_bound=0
)
_BATCH = _define.integer("batch_size", 64, "Images drawn at once on each device.", lower_bound=1)
_INDEX = _define.integer("process_index", None, "Which host this is; default: JAX's.")
_COUNT = _define.integer("process_count", None, "How many hosts share the work.")


def _options(guidance: str) -> SampleOptions:
    fields = (_INTERVAL, _TEMPERATURE, _TOP_K, _TOP_P, _SCHEDULE, _POWER, _CACHE)
    try:
        return SampleOptions(float(guidance), **{flag.name: flag.value for flag in fields})
    except ValueError as error:
        raise ConfigError(f"--guidance={guidance}: {first_line(error)}") from error


def _given(source: Source) -> Given | None:
    """What is kept of an image, where one is to be redrawn; says what to expect of it."""
    if _INPAINT.value:
        given = given_tokens.inpaint(source, _INPAINT.value, _MASK.value)
    elif _CONTINUE.value:
        given = given_tokens.continue_from(source, _CONTINUE.value, _ROWS.value)
    else:
        return None
    kept, length = (given.codes_L >= 0).sum(), source.config.length
    print(
        f"{kept} of {length} tokens are kept; a drawn one knows those before it, row by row, and none "
        "after: expect a seam at its right and below it",
        flush=True,
    )
    return given


def run() -> None:
    """Draws what the flags ask for."""
    if (_WORKDIR.value is None) == (_CHECKPOINT.value is None):
        raise ConfigError("give either --workdir or --checkpoint")
    mine, others = ("workdir", (_SIDE,)) if _WORKDIR.value else ("checkpoint", (_STEP, _STATE))
    for flag in others:
        if flag.present:
            raise ConfigError(f"--{flag.name} has no meaning with --{mine}")
    for one, other in ((_INPAINT, _MASK), (_CONTINUE, _ROWS)):
        if (one.value is None) != (other.value is None):
            raise ConfigError(f"--{one.name} and --{other.name} go together; one is missing")
    if _INPAINT.value and _CONTINUE.value:
        raise ConfigError("give either --inpaint or --continue_from")
    if not (_OUT.value or _WORKDIR.value):
        raise ConfigError("--out is missing; with --checkpoint it must be a folder")
    share = cli.share(_INDEX.value, _COUNT.value)
    options = [_options(text) for text in _GUIDANCE.value or [""]]
    if mine == "workdir":
        source = sources.of_workdir(_WORKDIR.value, _STEP.value, _STATE.value, _TOKENIZER.value)
    else:
        source = sources.of_checkpoint(_CHECKPOINT.value, _TOKENIZER.value, _SIDE.value)
    if not source.config.has_null_class and any(o.guidance > 1 for o in options):
        raise ConfigError("--guidance is above 1; a generator without a null class takes 1 alone")
    given = _given(source)
    for option in options:
        name = f"guidance_{option.guidance:g}"
        if option.schedule != "constant":
            name += f"-{option.schedule}" + f"_{option.power:g}" * (option.schedule != "linear")
        name += "-inpainted" * bool(_INPAINT.value) + "-continued" * bool(_CONTINUE.value)
        if not _OUT.value:
            out = f"{_WORKDIR.value}/sampled/step_{source.about['step']:07d}-{name}"
        else:
            out = f"{_OUT.value}/{name}" if len(options) > 1 else _OUT.value
        job.sample_folder(
            paths.at(out),
            source,
            option,
            share,
            num_images=_NUM.value or (6 if given else 50_000),
            labels=_LABELS.value,
            seed=_SEED.value,
            resize=_SIZE.value,
            batch_size=_BATCH.value,
            given=given,
        )


def main(argv: list[str]) -> None:
    interrupted = "interrupted; the same command resumes where it stopped"
    with cli.program(OSError, argv=argv, interrupted=interrupted):
        run()


if __name__ == "__main__":
    cli.run(main)
