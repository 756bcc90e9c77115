"""The fields of a run's config, one a line, and what they ask of each other.

`read` gives the frozen dataclasses that the modules take; nothing else reads the ConfigDict. Every
mistake is a ConfigError of one line that names the field, its value and what is allowed, raised before
anything is compiled. What each field means stands in configs/base.py.

A new field is a line here and a line there. Its default here is for configs of runs from before the
field existed: the value that they computed with.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from mirai_jax import foresight, sharding
from mirai_jax.config import fields
from mirai_jax.config.encoders import TeacherSettings, check_teacher
from mirai_jax.config.fields import DTYPES, Check, field, fill
from mirai_jax.config.terms import LAST_EPOCH, read_terms
from mirai_jax.models import adapters, attention, kv_cache
from mirai_jax.models import generator as generator_lib
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.models.vq import MULTIPLIERS, VQConfig
from mirai_jax.optimizer import DECAYED, SCHEDULES, OptimizerConfig
from mirai_jax.sampling.sampler import GUIDANCE_SCHEDULES, SampleOptions
from mirai_jax.utils.errors import ConfigError

SMALL_SETS = ("mnist", "fashion_mnist")
EXIF = ("ignore", "apply")
LARGEST = 2**14  # of a model's dimensions: beyond it an allocation fails


def probability(default: float) -> Any:
    return field(default, at_least=0, below=1)


@dataclasses.dataclass(frozen=True)
class ModelFields:
    """`model.*`; see GeneratorConfig."""

    size: str = field("B", choices=("", *generator_lib.SIZES))
    num_layers: int = field(0, at_least=0, at_most=LARGEST)
    num_heads: int = field(0, at_least=0, at_most=LARGEST)
    width: int = field(0, at_least=0, at_most=LARGEST)
    vocab_size: int = field(16384, at_least=2, at_most=2**16)  # shards hold 16 bits a code
    num_classes: int = field(1000, at_least=0, at_most=10**6)
    grid: tuple[int, int] = field((16, 16))
    token_dropout: float = probability(0.1)
    residual_dropout: float = probability(0.1)
    ffn_dropout: float = probability(0.1)
    class_dropout: float = probability(0.1)
    dtype: str = field("bfloat16", choices=DTYPES)
    unroll: int = field(1, at_least=1, resumable=True)
    remat: str = field("none", choices=tuple(generator_lib.REMAT), resumable=True)
    attention: str = field("auto", choices=attention.KERNELS, resumable=True)  # changes rounding


@dataclasses.dataclass(frozen=True)
class TermFields:
    """`foresight[i].*`; see foresight.Term."""

    name: str = field("")
    source: str = field("ema", choices=foresight.SOURCES)
    level: str = field("internal", choices=foresight.LEVELS)
    layout: str = field("2d", choices=foresight.LAYOUTS)
    offsets: tuple = field(((0, 0), (0, 1), (1, 0)))
    targets: str = field("own", choices=foresight.TARGETS)
    window: int = field(1, at_least=1, at_most=LARGEST)
    window_along: str = field("positions", choices=foresight.WINDOWS)
    borders: str = field("wrap", choices=foresight.BORDERS)
    anchor: str = field("consumed", choices=foresight.ANCHORS)
    weights: tuple[float, ...] = field((2.0,))
    reduction: str = field("sum", choices=foresight.REDUCTIONS)
    student_layer: int = field(0, at_least=0)
    teacher_layer: int = field(0, at_least=0)
    start_epoch: float = field(15.0, at_least=0, at_most=LAST_EPOCH)
    schedule: tuple[tuple[float, float], ...] = field(((80.0, 0.5),))
    schedule_unit: str = field("epochs", choices=foresight.UNITS)
    projector: str = field("mlp", choices=foresight.PROJECTORS)
    projector_width: int = field(2048, at_least=1, at_most=LARGEST)
    projector_init: str = field("normal", choices=foresight.INITS)
    checkpoint: str = field("", resumable=True)


@dataclasses.dataclass(frozen=True)
class OptimizerFields:
    """`optimizer.*`; see OptimizerConfig."""

    learning_rate: float = field(1e-4, at_least=0)
    schedule: str = field("constant", choices=SCHEDULES)
    warmup_steps: int = field(0, at_least=0)
    b1: float = probability(0.9)
    b2: float = probability(0.95)
    eps: float = field(1e-8, at_least=1e-16)
    weight_decay: float = field(0.05, at_least=0)
    decayed: str = field("matrices", choices=DECAYED)
    clip_norm: float = field(1.0, at_least=0)


@dataclasses.dataclass(frozen=True)
class LoraFields:
    """`lora.*`; see LoraConfig."""

    rank: int = field(0, at_least=0, at_most=LARGEST)
    alpha: float = field(16.0, at_least=0)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """`data.*`."""

    name: str = field("images", choices=(*SMALL_SETS, "folder", "images"))
    path: str = field("", resumable=True)  # files may move: parts.json has the checksums of data
    images: str = field("", resumable=True)
    codes: str = field("stored", choices=("stored", "online"))
    crops: str = field("stored", choices=("stored", "centre", "random"))
    crop_range: float = field(1.1, at_least=1, at_most=4)
    flip: bool = field(True)
    exif: str = field("ignore", choices=EXIF)
    held_out: int = field(0, at_least=0)
    held_out_share: float = probability(0.0)
    min_images: int = field(1, at_least=1)
    balanced: bool = field(False)
    num_workers: int = field(8, at_least=0, at_most=1024, resumable=True)

    @property
    def in_memory(self) -> bool:
        return self.name != "images"

    @property
    def online(self) -> bool:
        return self.codes == "online"


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """`tokenizer.*`."""

    name: str = field("vq16", choices=("patch", *MULTIPLIERS, "vq"))
    path: str = field("", resumable=True)
    image_size: int | tuple[int, ...] = field(256)
    patch: int = field(4, at_least=1)

    @property
    def sides(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        size = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        return (size[0], size[-1]) if len(size) in (1, 2) else (0, 0)

    @property
    def downsample(self) -> int:
        """Pixels a side of a token; 0 where the file of `path` alone knows them."""
        if self.name == "patch":
            return self.patch
        return VQConfig(MULTIPLIERS[self.name]).downsample if self.name in MULTIPLIERS else 0


@dataclasses.dataclass(frozen=True)
class MeshFields:
    """`mesh.*`; see sharding.mesh_shape."""

    data: int = field(-1, resumable=True)
    fsdp: int = field(1, resumable=True)
    tensor: int = field(1, resumable=True)


@dataclasses.dataclass(frozen=True)
class WandbFields:
    """`wandb.*`."""

    project: str = field("", resumable=True)


@dataclasses.dataclass(frozen=True)
class SampleFields:
    """`sample.*`; SampleOptions knows its bounds."""

    guidance: float = field(2.0, resumable=True)
    interval: int = field(-1, resumable=True)
    temperature: float = field(1.0, resumable=True)
    top_k: int = field(0, resumable=True)
    top_p: float = field(1.0, resumable=True)
    greedy: bool = field(False, resumable=True)
    schedule: str = field("constant", choices=GUIDANCE_SCHEDULES, resumable=True)
    power: float = field(2.75, resumable=True)
    cache_dtype: str = field("model", choices=kv_cache.DTYPES, resumable=True)
    classes: int = field(10, at_least=1, at_most=100, resumable=True)
    per_class: int = field(8, at_least=1, at_most=100, resumable=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TopFields:
    """What RunConfig and Settings share."""

    name: str = field()
    scale: str = field()
    seed: int = field(0, at_least=0)
    num_steps: int = field(400_320, at_least=1, resumable=True)  # see compare.check_same_run
    batch_size: int = field(256, at_least=1, at_most=2**20)
    ema_decay: float = probability(0.9999)
    log_every: int = field(100, at_least=1, resumable=True)
    sample_every: int = field(10_000, at_least=0, resumable=True)
    checkpoint_every: int = field(10_000, at_least=1, resumable=True)
    keep_checkpoints: int = field(2, at_least=1, resumable=True)
    keep_every: int = field(0, at_least=0, resumable=True)
    init_from: str = field("")
    init_rows: tuple = field(())
    freeze: tuple[str, ...] = field(())
    accumulate: int = field(1, at_least=1, resumable=True)  # changes the draws of dropout
    nonfinite: str = field("stop", choices=("stop", "skip"), resumable=True)
    hang_limit: int = field(1800, at_least=0, at_most=10**7, resumable=True)
    judged_samples: int = field(0, at_least=0, at_most=10**6, resumable=True)
    validation_path: str = field("", resumable=True)
    validate_every: int = field(0, at_least=0, resumable=True)
    evaluate_every: int = field(0, at_least=0, resumable=True)
    evaluate_samples: int = field(2000, at_least=2, at_most=10**6, resumable=True)
    evaluate_guidance: float = field(0.0, at_least=0, resumable=True)
    evaluate_reference: str = field("", resumable=True)
    evaluate_inception: str = field("", resumable=True)
    profile_steps: tuple[int, ...] = field((), resumable=True)
    wandb: WandbFields
    data: DataSettings
    tokenizer: TokenizerSettings
    teacher: TeacherSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(_TopFields):
    """A run's config as configs/base.py writes it."""

    foresight: tuple[TermFields, ...] = field(())
    model: ModelFields
    optimizer: OptimizerFields
    lora: LoraFields
    mesh: MeshFields
    sample: SampleFields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_TopFields):
    """A run's config as the modules take it."""

    terms: tuple[foresight.Term, ...]
    term_checkpoints: tuple[tuple[str, str], ...]  # (term name, workdir) of `checkpoint` terms
    generator: GeneratorConfig
    optimizer: OptimizerConfig
    lora: adapters.LoraConfig
    mesh: tuple[int, int, int]
    sample: SampleOptions
    sample_classes: int
    sample_per_class: int

    @property
    def needs_images(self) -> bool:
        """Whether the teacher of some term takes images."""
        return any(t.source == "bidirectional" and t.level == "internal" for t in self.terms)

    @property
    def step_sees_images(self) -> bool:
        """Whether batches hold images."""
        return (self.needs_images and not self.teacher.cached) or self.data.online


def read(config: Mapping[str, Any], num_devices: int, slices: int = 1) -> Settings:
    """Checks every field of a config and returns it typed.

    Args:
        config: a ConfigDict, or the dictionary of a workdir's config.json.
        num_devices: over all processes.
        slices: `sharding.num_slices` of them.

    Raises:
        ConfigError: the first wrong field, in one line.
    """
    given = fields.read(RunConfig, config)
    check = functools.partial(fields.check, given)
    generator = _generator(given.model, check)
    terms = read_terms(given, generator, check)
    try:
        mesh = sharding.mesh_shape(**vars(given.mesh), num_devices=num_devices, slices=slices)
        sample = fill(SampleOptions, given.sample)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    settings = fill(
        Settings,
        given,
        terms=terms,
        term_checkpoints=tuple(
            (term.name, entry.checkpoint)
            for term, entry in zip(terms, given.foresight, strict=True)
            if term.source == "checkpoint" and term.level == "internal"
        ),
        generator=generator,
        optimizer=read_optimizer(given.optimizer, given.num_steps, check),
        lora=fill(adapters.LoraConfig, given.lora),
        mesh=mesh,
        sample=sample,
        sample_classes=min(given.sample.classes, generator.num_classes),
        sample_per_class=given.sample.per_class,
    )
    ways, parts = mesh[0] * mesh[1], given.accumulate
    allowed = f"a multiple of {ways * parts}: mesh.data * mesh.fsdp={ways} times accumulate={parts}"
    allowed = f"{allowed} (there are {num_devices} devices)"
    check("batch_size", given.batch_size % (ways * parts) == 0, allowed)
    for i, term in enumerate(terms):
        good = term.targets == "own" or given.batch_size > parts
        check(f"foresight[{i}].targets", good, "own where a part of the batch is a single image")
    check(
        "lora.rank",
        not given.lora.rank or given.init_from,
        "0 without init_from, whose weights they adapt",
    )
    good = all(
        isinstance(pair, tuple) and len(pair) == 2 and {type(c) for c in pair} <= {int, str}
        for pair in given.init_rows
    )
    check("init_rows", good, "((new, old), ...), each the name or the number of a class")
    every = given.checkpoint_every
    check("keep_every", given.keep_every % every == 0, f"a multiple of checkpoint_every={every}")
    profiled = given.profile_steps
    good = not profiled or (len(profiled) == 2 and 0 < profiled[0] <= profiled[1])
    check("profile_steps", good, "the first and the last step, as in (10, 15), or ()")
    good = sample.guidance == 1 or generator.has_null_class
    check("sample.guidance", good, "1 where model.class_dropout is 0 (there is no null class)")
    guidance = given.evaluate_guidance
    good = guidance == 0 or (guidance == 1 or (guidance > 1 and generator.has_null_class))
    check("evaluate_guidance", good, "0, 1, or more than 1 with a null class (model.class_dropout)")
    check_teacher(settings.teacher, settings.needs_images, check)
    _check_data(settings, check)
    return settings


def _generator(model: ModelFields, check: Check) -> GeneratorConfig:
    shape = generator_lib.SIZES.get(model.size)
    allowed = f"0 beside model.size {model.size!r}" if shape else "1 or more where model.size is ''"
    for name in ("num_layers", "num_heads", "width"):
        check(f"model.{name}", bool(getattr(model, name)) != bool(shape), allowed)
    num_layers, num_heads, width = shape or (model.num_layers, model.num_heads, model.width)
    check("model.num_classes", model.num_classes > 0, "1 or more (0: as many as a folder has)")
    rows, columns = model.grid
    good = min(rows, columns) > 0 and 1 < rows * columns <= LARGEST
    check("model.grid", good, f"2 to {LARGEST} tokens")
    allowed = (
        f"a multiple of 4 * model.num_heads={4 * num_heads}, rotary pairs for rows and columns"
    )
    check("model.width", width % (4 * num_heads) == 0, allowed)
    return fill(GeneratorConfig, model, num_layers=num_layers, num_heads=num_heads, width=width)


def read_optimizer(given: OptimizerFields, num_steps: int, check: Check) -> OptimizerConfig:
    """The optimizer of a run of `num_steps`; raises ConfigError for a cosine all of whose steps warm up."""
    good = given.schedule == "constant" or given.warmup_steps < num_steps
    allowed = f"less than num_steps={num_steps} with optimizer.schedule {given.schedule!r}"
    check("optimizer.warmup_steps", good, allowed)
    return fill(OptimizerConfig, given, num_steps=num_steps)


def _check_data(settings: Settings, check: Check) -> None:
    """Checks what data, tokenizer, grid and teacher ask of each other."""
    data, tokenizer = settings.data, settings.tokenizer
    name, size = tokenizer.name, tokenizer.image_size
    height, width = tokenizer.sides
    good = min(height, width) > 0 and max(height, width) <= 4096
    check("tokenizer.image_size", good, "1 to 4096 pixels, or two such numbers: (height, width)")
    small = data.name in SMALL_SETS
    check("tokenizer.image_size", height == width or not small, f"a square with {data.name}")
    if side := tokenizer.downsample:
        good = settings.generator.grid == (height / side, width / side)
        tokens = f"({height}/{side}, {width}/{side})"
        check("model.grid", good, f"{tokens}, the tokens of tokenizer.image_size={size}")
    names = (
        *(["patch"] if data.in_memory or data.online else []),
        *([] if small else MULTIPLIERS),
        "vq",
    )
    allowed = f"{' or '.join(names)} with data.name {data.name!r} and data.codes {data.codes!r}"
    check("tokenizer.name", name in names, allowed)
    good = data.crops == "stored" or data.in_memory or data.online
    check("data.crops", good, f"stored with data.codes {data.codes!r}")
    good = data.crops != "random" or data.name != "folder"
    check("data.crops", good, "stored or centre with data.name 'folder'")
    check(
        "data.balanced",
        not data.balanced or data.in_memory or data.online,
        "False with stored codes",
    )
    needed = name != "patch" and (data.in_memory or data.online)
    check("tokenizer.path", tokenizer.path or not needed, f"the weights of {name}, which encode")
    if not data.in_memory:
        allowed = f"False with data.name {data.name!r}: features of all crops do not fit in memory"
        check("teacher.cached", not settings.teacher.cached, allowed)
    if not small:
        why = "data.codes 'online'" if data.online else "a term of source 'bidirectional'"
        why = f"data.name {data.name!r}" if data.in_memory else why
        allowed = f"a source of images (docs/image_sources.md lists them): {why} needs images"
        good = data.images or not (data.in_memory or settings.step_sees_images)
        check("data.images", good, allowed)
