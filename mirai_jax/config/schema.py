"""The fields of a run's config, one a line, and what they ask of each other.

`read` gives the frozen dataclasses that the modules take; nothing else reads the ConfigDict. Every
mistake is a ConfigError of one line that names the field, its value and what is allowed, raised before
anything is compiled. What each field means stands in configs/base.py.

A new field is a line here and a line there. Its default here is for configs of runs from before the
field existed: the value that they computed with.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

from mirai_jax import foresight, sharding
from mirai_jax.config import fields
from mirai_jax.config.fields import Check, field, fill
from mirai_jax.models import attention
from mirai_jax.models import generator as generator_lib
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.models.teacher import TEACHERS
from mirai_jax.models.vq import MULTIPLIERS, VQConfig
from mirai_jax.optimizer import SCHEDULES, OptimizerConfig
from mirai_jax.sampling.sampler import SampleOptions
from mirai_jax.utils.errors import ConfigError

SMALL_SETS = ("mnist", "fashion_mnist")
DTYPES = ("float32", "bfloat16")
PATCH = 14  # pixels a side of a patch of every published DINOv2
LARGEST = 2**14  # of a model's dimensions: beyond it an allocation fails
_LAST_EPOCH = 1e6  # more than any run has; in steps it must stay a finite number


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
    num_classes: int = field(1000, at_least=1, at_most=10**6)
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
    borders: str = field("wrap", choices=foresight.BORDERS)
    anchor: str = field("consumed", choices=foresight.ANCHORS)
    weights: tuple[float, ...] = field((2.0,))
    reduction: str = field("sum", choices=foresight.REDUCTIONS)
    student_layer: int = field(0, at_least=0)
    teacher_layer: int = field(0, at_least=0)
    start_epoch: float = field(15.0, at_least=0, at_most=_LAST_EPOCH)
    schedule: tuple[tuple[float, float], ...] = field(((80.0, 0.5),))
    projector_width: int = field(2048, at_least=1, at_most=LARGEST)
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
    clip_norm: float = field(1.0, at_least=0)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """`data.*`."""

    name: str = field("images", choices=(*SMALL_SETS, "images"))
    path: str = field("", resumable=True)  # files may move: parts.json has the checksums of data
    images: str = field("", resumable=True)
    codes: str = field("stored", choices=("stored", "online"))
    crop_range: float = field(1.1, at_least=1, at_most=4)
    held_out: int = field(0, at_least=0)
    num_workers: int = field(8, at_least=0, at_most=1024, resumable=True)

    @property
    def in_memory(self) -> bool:
        return self.name in SMALL_SETS

    @property
    def online(self) -> bool:
        return self.codes == "online"


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """`tokenizer.*`."""

    name: str = field("vq16", choices=("patch", *MULTIPLIERS, "vq"))
    path: str = field("", resumable=True)
    image_size: int = field(256, at_least=1, at_most=4096)
    patch: int = field(4, at_least=1)


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
    """`teacher.*`."""

    name: str = field("dinov2_vitb14", choices=TEACHERS)
    path: str = field("", resumable=True)
    image_size: int = field(0, at_least=0, at_most=4096)
    layer: int = field(0, at_least=0)
    stage: int = field(5, at_least=1, at_most=7)
    dtype: str = field("float32", choices=DTYPES)
    cached: bool = field(False)


@dataclasses.dataclass(frozen=True)
class MeshFields:
    """`mesh.*`; see sharding.mesh_shape."""

    data: int = field(-1, resumable=True)
    fsdp: int = field(1, resumable=True)
    tensor: int = field(1, resumable=True)


@dataclasses.dataclass(frozen=True)
class SampleFields:
    """`sample.*`; SampleOptions knows its bounds."""

    guidance: float = field(2.0, resumable=True)
    interval: int = field(-1, resumable=True)
    temperature: float = field(1.0, resumable=True)
    top_k: int = field(0, resumable=True)
    top_p: float = field(1.0, resumable=True)
    greedy: bool = field(False, resumable=True)
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
    accumulate: int = field(1, at_least=1, resumable=True)  # changes the draws of dropout
    nonfinite: str = field("stop", choices=("stop", "skip"), resumable=True)
    hang_limit: int = field(1800, at_least=0, at_most=10**7, resumable=True)
    judged_samples: int = field(0, at_least=0, at_most=10**6, resumable=True)
    data: DataSettings
    tokenizer: TokenizerSettings
    teacher: TeacherSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(_TopFields):
    """A run's config as configs/base.py writes it."""

    foresight: tuple[TermFields, ...] = field(())
    model: ModelFields
    optimizer: OptimizerFields
    mesh: MeshFields
    sample: SampleFields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_TopFields):
    """A run's config as the modules take it."""

    terms: tuple[foresight.Term, ...]
    term_checkpoints: tuple[tuple[str, str], ...]  # (term name, workdir) of `checkpoint` terms
    generator: GeneratorConfig
    optimizer: OptimizerConfig
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


def read(config: Mapping[str, Any], num_devices: int) -> Settings:
    """Checks every field of a config and returns it typed.

    Args:
        config: a ConfigDict, or the dictionary of a workdir's config.json.
        num_devices: over all processes.

    Raises:
        ConfigError: the first wrong field, in one line.
    """
    given = fields.read(RunConfig, config)
    check = functools.partial(fields.check, given)
    generator = _generator(given.model, check)
    terms = _terms(given, generator, check)
    try:
        mesh = sharding.mesh_shape(**vars(given.mesh), num_devices=num_devices)
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
        mesh=mesh,
        sample=sample,
        sample_classes=given.sample.classes,
        sample_per_class=given.sample.per_class,
    )
    ways, parts = mesh[0] * mesh[1], given.accumulate
    allowed = f"a multiple of {ways * parts}: mesh.data * mesh.fsdp={ways} times accumulate={parts}"
    allowed = f"{allowed} (there are {num_devices} devices)"
    check("batch_size", given.batch_size % (ways * parts) == 0, allowed)
    for i, term in enumerate(terms):
        good = term.targets == "own" or given.batch_size > parts
        check(f"foresight[{i}].targets", good, "own where a part of the batch is a single image")
    every = given.checkpoint_every
    check("keep_every", given.keep_every % every == 0, f"a multiple of checkpoint_every={every}")
    good = sample.guidance == 1 or generator.has_null_class
    check("sample.guidance", good, "1 where model.class_dropout is 0 (there is no null class)")
    classes = generator.num_classes
    check("sample.classes", given.sample.classes <= classes, f"at most model.num_classes={classes}")
    _check_data(settings, check)
    _check_teacher(settings, check)
    return settings


def _generator(model: ModelFields, check: Check) -> GeneratorConfig:
    shape = generator_lib.SIZES.get(model.size)
    allowed = f"0 beside model.size {model.size!r}" if shape else "1 or more where model.size is ''"
    for name in ("num_layers", "num_heads", "width"):
        check(f"model.{name}", bool(getattr(model, name)) != bool(shape), allowed)
    num_layers, num_heads, width = shape or (model.num_layers, model.num_heads, model.width)
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


def two_thirds(num_layers: int) -> int:
    """The default tap: block 8 of 12, 16 of 24, 24 of 36."""
    return max(1, round(2 * num_layers / 3))


def _terms(given: RunConfig, student: GeneratorConfig, check: Check) -> tuple[foresight.Term, ...]:
    terms: list[foresight.Term] = []
    for i, term in enumerate(given.foresight):
        name = term.name or _default_name(term, {t.name for t in terms})
        term = dataclasses.replace(term, name=name)
        # The keys of parts.json, in which each term's teacher has its name.
        taken = {"data", "image_keys", "image_set", "tokenizer", *(t.name for t in terms)}
        taken |= {"bidirectional"} - {term.source}
        good = name.isidentifier() and name.isascii() and name not in taken
        allowed = f"letters, digits and underscores, and none of {', '.join(sorted(taken))}"
        check(f"foresight[{i}].name", good, allowed)
        good = given.ema_decay > 0 or term.source != "ema" or term.level != "internal"
        check("ema_decay", good, f"above 0 for foresight[{i}].source 'ema': it is the teacher")
        terms.append(_term(term, f"foresight[{i}]", student, check))
    return tuple(terms)


def _default_name(term: TermFields, taken: set[str]) -> str:
    """The term's source (or 'output'), with a number from the second of its kind on."""
    base = term.source if term.level == "internal" else term.level
    names = itertools.chain([base], (f"{base}{i}" for i in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _term(term: TermFields, where: str, student: GeneratorConfig, check: Check) -> foresight.Term:
    layers, internal = student.num_layers, term.level == "internal"
    pretrained = internal and term.source == "checkpoint"
    good = term.checkpoint or not pretrained
    check(f"{where}.checkpoint", good, "the workdir of a generator for source 'checkpoint'")
    # A pretrained generator may be deeper than the student: checked when its config is read.
    deepest = {"student_layer": layers, "teacher_layer": 10_000 if pretrained else layers}
    for name, last in deepest.items():
        allowed = f"a block of the model, 1 to {last} (0: the default)"
        check(f"{where}.{name}", getattr(term, name) <= last, allowed)
    kind = tuple[int, ...] if term.layout == "1d" else tuple[tuple[int, int], ...]
    offsets = fields.typed(f"{where}.offsets", term.offsets, kind)
    good = offsets and len(set(offsets)) == len(offsets)
    check(f"{where}.offsets", good, "one offset or more, each once")
    made = fill(
        foresight.Term,
        term,
        offsets=offsets,
        student_layer=term.student_layer or (two_thirds(layers) if internal else layers),
        teacher_layer=term.teacher_layer or (0 if pretrained else two_thirds(layers)),
    )
    height, width = student.grid
    for offset in offsets:
        if term.layout == "1d":
            inside = abs(offset) < height * width - 1
        else:
            inside = abs(offset[0]) < height and abs(offset[1]) < width
        good = inside and foresight.alignment(made, offset, student.grid)[1].any()
        allowed = f"offsets with pairs on the {height}x{width} grid, but {offset} leaves it"
        check(f"{where}.offsets", good, allowed)
    good = len(term.weights) in (1, len(offsets)) and min(term.weights) >= 0
    allowed = f"one number for all, or one for each of the {len(offsets)} offsets, 0 or more"
    check(f"{where}.weights", good, allowed)
    epochs = [epoch for epoch, _ in term.schedule]
    good = epochs == sorted(epochs) and all(0 <= epoch <= _LAST_EPOCH for epoch in epochs)
    check(f"{where}.schedule", good, "(epoch, multiplier) pairs in order")
    return made


def _check_data(settings: Settings, check: Check) -> None:
    """Checks what data, tokenizer and grid ask of each other."""
    data, tokenizer = settings.data, settings.tokenizer
    name, size = tokenizer.name, tokenizer.image_size
    if name != "vq":  # whose file alone knows the pixels of a token
        side = tokenizer.patch if name == "patch" else VQConfig(MULTIPLIERS[name]).downsample
        good = settings.generator.grid == (size / side, size / side)
        tokens = f"({size}/{side}, {size}/{side})"
        check("model.grid", good, f"{tokens}, the tokens of tokenizer.image_size={size}")
    names = ("patch", "vq") if data.in_memory else (*MULTIPLIERS, "vq")
    allowed = f"{' or '.join(names)} with data.name {data.name!r}"
    check("tokenizer.name", name in names, allowed)
    needed = name != "patch" and (data.in_memory or data.online)
    check("tokenizer.path", tokenizer.path or not needed, f"the weights of {name}, which encode")


def _check_teacher(settings: Settings, check: Check) -> None:
    """Checks what the frozen encoder asks of its fields and of the data."""
    teacher, data = settings.teacher, settings.data
    if settings.needs_images and teacher.name == "efficientnet_lite0":
        check("teacher.image_size", teacher.image_size >= 32, f"32 or more for {teacher.name}")
    elif settings.needs_images:
        good = teacher.name == "dinov2" or teacher.image_size % PATCH == 0
        check("teacher.image_size", good, f"a multiple of {PATCH} (0: one patch a token)")
        of = "the published .pth, a converted folder, or a workdir of mirai_jax.teach"
        check("teacher.path", teacher.path, f"the weights of {teacher.name}: {of}")
    if not data.in_memory:
        allowed = f"False with data.name {data.name!r}: features of all crops do not fit in memory"
        check("teacher.cached", not teacher.cached, allowed)
        why = "data.codes 'online'" if data.online else "a term of source 'bidirectional'"
        allowed = f"a folder with a folder a class, or tfds:NAME[:SPLIT]: {why} needs images"
        check("data.images", data.images or not settings.step_sees_images, allowed)
