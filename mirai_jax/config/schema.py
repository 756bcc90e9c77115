"""Reads a config, once: every field checked and handed on in the frozen dataclasses that modules take.

Nothing else reads the ConfigDict. Every mistake is a ConfigError of one line that names the field,
its value and what is allowed, raised before anything is compiled.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from mirai_jax import foresight, sharding
from mirai_jax.config import fields
from mirai_jax.models import attention
from mirai_jax.models import generator as generator_lib
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.models.teacher import TEACHERS
from mirai_jax.models.vq import MULTIPLIERS, VQConfig
from mirai_jax.optimizer import SCHEDULES, OptimizerConfig
from mirai_jax.sampling.sampler import SampleOptions
from mirai_jax.utils.errors import ConfigError

SMALL_SETS = ("mnist", "fashion_mnist")
PATCH = 14  # pixels a side of a patch of every published DINOv2
_LARGEST = 2**14  # of a model's dimensions: beyond it a slip would be told by a failed allocation


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """`data.*`."""

    name: str
    path: str
    images: str
    codes: str
    crop_range: float
    held_out: int
    num_workers: int

    @property
    def in_memory(self) -> bool:
        return self.name in SMALL_SETS

    @property
    def online(self) -> bool:
        return self.codes == "online"


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """`tokenizer.*`."""

    name: str
    path: str
    image_size: int
    patch: int


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
    """`teacher.*`."""

    name: str
    path: str
    image_size: int
    layer: int
    stage: int
    dtype: str
    cached: bool


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole run, typed and checked. The fields are explained in configs/base.py."""

    name: str
    scale: str
    seed: int
    num_steps: int
    batch_size: int
    ema_decay: float
    log_every: int
    sample_every: int
    checkpoint_every: int
    keep_checkpoints: int
    keep_every: int
    init_from: str
    accumulate: int
    nonfinite: str
    hang_limit: int
    judged_samples: int
    terms: tuple[foresight.Term, ...]
    term_checkpoints: tuple[tuple[str, str], ...]  # (term name, workdir) of `checkpoint` terms
    generator: GeneratorConfig
    optimizer: OptimizerConfig
    data: DataSettings
    tokenizer: TokenizerSettings
    teacher: TeacherSettings
    mesh: tuple[int, int, int]
    sample: SampleOptions
    sample_classes: int
    sample_per_class: int

    @property
    def needs_images(self) -> bool:
        """Whether some term's teacher looks at the images."""
        return any(t.source == "bidirectional" and t.level == "internal" for t in self.terms)

    @property
    def step_sees_images(self) -> bool:
        """Whether batches hold images."""
        return (self.needs_images and not self.teacher.cached) or self.data.online


def _generator(model: fields.Section) -> GeneratorConfig:
    size = model.get("size", str)
    if size:
        fields.choice(model.name("size"), size, generator_lib.SIZES, "or ''")
    of_size = generator_lib.SIZES.get(size, (0, 0, 0))
    numbers = {}
    for field, default in zip(("num_layers", "num_heads", "width"), of_size, strict=True):
        value = model.number(field, int, 0, _LARGEST)
        fields.require(
            not (size and value),
            model.name(field),
            value,
            f"0 beside model.size {size!r}, which fixes it (with model.size '' it counts)",
        )
        value = value or default
        fields.require(value > 0, model.name(field), value, "1 or more where model.size is ''")
        numbers[field] = value
    grid = fields.pair(model.name("grid"), model.get("grid", tuple))
    fields.require(
        min(grid) > 0 and 1 < grid[0] * grid[1] <= _LARGEST,
        model.name("grid"),
        grid,
        f"2 to {_LARGEST} tokens",
    )
    config = GeneratorConfig(
        **numbers,
        vocab_size=model.number("vocab_size", int, 2, 2**16),  # shards hold 16 bits a code
        num_classes=model.number("num_classes", int, 1, 10**6),
        grid=grid,
        token_dropout=fields.probability(model, "token_dropout"),
        residual_dropout=fields.probability(model, "residual_dropout"),
        ffn_dropout=fields.probability(model, "ffn_dropout"),
        class_dropout=fields.probability(model, "class_dropout"),
        dtype=model.choice("dtype", ("float32", "bfloat16")),
        unroll=model.number("unroll", int, 1),
        remat=model.choice("remat", generator_lib.REMAT),
        attention=model.choice("attention", attention.KERNELS),
    )
    heads = config.num_heads
    fields.require(
        config.width % (4 * heads) == 0,
        model.name("width"),
        config.width,
        f"a multiple of 4 * model.num_heads = {4 * heads} (rotary pairs for rows and columns)",
    )
    return config


_LAST_EPOCH = 1e6  # more than any run has; in steps it must stay a finite number


def two_thirds(num_layers: int) -> int:
    """The default tap: block 8 of 12, 16 of 24, 24 of 36."""
    return max(1, round(2 * num_layers / 3))


def _offsets(term: fields.Section, layout: str, grid: tuple[int, int]) -> tuple:
    """The offsets, each of which must leave some pair on the grid."""
    name, offsets = term.name("offsets"), term.get("offsets", tuple)
    fields.require(len(offsets) > 0, name, offsets, "one offset or more")
    height, width = grid
    if layout == "1d":
        for n in offsets:
            good = isinstance(n, int) and not isinstance(n, bool) and abs(n) < 2**31
            fields.require(good, name, offsets, "whole numbers for layout '1d', such as (0, 1, 2)")
            limit = height * width - 1
            fields.require(
                abs(n) < limit,
                name,
                offsets,
                f"less than {limit} steps each on the {height}x{width} grid, but {n} leaves it",
            )
        fields.require(len(set(offsets)) == len(offsets), name, offsets, "each offset once")
        return tuple(offsets)
    pairs = []
    for offset in offsets:
        if not isinstance(offset, (tuple, list)):
            fields.require(False, name, offsets, "(rows, columns) pairs for layout '2d'")
        rows, columns = fields.pair(name, offset)
        fields.require(
            abs(rows) < height and abs(columns) < width,
            name,
            offsets,
            f"less than {height} rows and {width} columns each, but ({rows}, {columns}) leaves the "
            f"{height}x{width} grid entirely",
        )
        pairs.append((rows, columns))
    fields.require(len(set(pairs)) == len(pairs), name, offsets, "each offset once")
    return tuple(pairs)


def _term(term: fields.Section, student: GeneratorConfig, ema_decay: float, taken: set) -> tuple:
    """One term, and the workdir of its pretrained generator or ''."""
    source = term.choice("source", foresight.SOURCES)
    level = term.choice("level", foresight.LEVELS)
    layout = term.choice("layout", foresight.LAYOUTS)
    internal = level == "internal"
    name = term.get("name", str)
    if not name:
        base = source if internal else level
        candidates = itertools.chain([base], (f"{base}{i}" for i in itertools.count(2)))
        name = next(candidate for candidate in candidates if candidate not in taken)
    fields.require(
        name.isidentifier() and name.isascii(),
        term.name("name"),
        name,
        "letters, digits and underscores",
    )
    fields.require(name not in taken, term.name("name"), name, "used by one term only")
    fields.require(
        name not in ("tokenizer", "data", "image_set"),
        term.name("name"),
        name,
        "another name: parts.json has this one for something else",
    )
    fields.require(
        name != "bidirectional" or source == "bidirectional",
        term.name("name"),
        name,
        "another name: this one is the frozen encoder's",
    )
    taken.add(name)
    fields.require(
        not (source == "ema" and internal and ema_decay == 0),
        "ema_decay",
        ema_decay,
        f"above 0 for {term.name('source')} 'ema' (without an average there is no teacher)",
    )
    checkpoint = term.get("checkpoint", str)
    pretrained = internal and source == "checkpoint"
    fields.require(
        bool(checkpoint) or not pretrained,
        term.name("checkpoint"),
        checkpoint,
        "the workdir of a pretrained generator for source 'checkpoint'",
    )
    layers = student.num_layers
    default = two_thirds(layers) if internal else layers
    # A pretrained generator may be deeper than the student: checked when its config is read.
    teacher_layers = 10_000 if pretrained else layers
    weights = fields.numbers(term.name("weights"), term.get("weights", tuple))
    offsets = _offsets(term, layout, student.grid)
    fields.require(
        len(weights) in (1, len(offsets)),
        term.name("weights"),
        weights,
        f"one number for all, or one for each of the {len(offsets)} offsets",
    )
    fields.require(all(w >= 0 for w in weights), term.name("weights"), weights, "0 or more each")
    schedule = tuple(
        fields.numbers(term.name("schedule"), entry, 2) for entry in term.get("schedule", tuple)
    )
    epochs = [epoch for epoch, _ in schedule]
    fields.require(
        epochs == sorted(epochs) and all(0 <= epoch <= _LAST_EPOCH for epoch in epochs),
        term.name("schedule"),
        schedule,
        "(epoch, multiplier) pairs in order",
    )
    made = foresight.Term(
        name=name,
        source=source,
        level=level,
        layout=layout,
        offsets=offsets,
        targets=term.choice("targets", foresight.TARGETS),
        borders=term.choice("borders", foresight.BORDERS),
        anchor=term.choice("anchor", foresight.ANCHORS),
        weights=weights,
        reduction=term.choice("reduction", foresight.REDUCTIONS),
        student_layer=_layer(term, "student_layer", layers, default),
        teacher_layer=_layer(
            term, "teacher_layer", teacher_layers, 0 if pretrained else two_thirds(layers)
        ),
        start_epoch=term.number("start_epoch", float, 0, _LAST_EPOCH),
        schedule=schedule,
        projector_width=term.number("projector_width", int, 1, _LARGEST),
    )
    for offset in offsets:
        fields.require(
            foresight.alignment(made, offset, student.grid)[1].any(),
            term.name("offsets"),
            offsets,
            f"offsets that leave some pair on the grid, but {offset} leaves none",
        )
    return made, checkpoint


def _layer(term: fields.Section, field: str, num_layers: int, default: int) -> int:
    value = term.get(field, int)
    fields.require(
        0 <= value <= num_layers,
        term.name(field),
        value,
        f"a block of the model, 1 to {num_layers} (0: the default)",
    )
    return value or default


def read(config: Mapping[str, Any], num_devices: int) -> Settings:
    """Checks every field of a config and returns it typed.

    Args:
        config: a ConfigDict, or the dictionary of a workdir's config.json.
        num_devices: over all processes.

    Raises:
        ConfigError: the first wrong field, in one line.
    """
    try:
        config = fields.plain(config)
    except RecursionError:
        raise ConfigError("the config holds itself, or groups of fields nested too deep") from None
    top = fields.Section("", config)
    ema_decay = fields.probability(top, "ema_decay")
    generator = _generator(top.section("model"))
    taken: set[str] = set()
    read_terms = [
        _term(section, generator, ema_decay, taken) for section in top.sections("foresight")
    ]
    terms = tuple(term for term, _ in read_terms)
    num_steps = top.number("num_steps", int, 1)
    settings = Settings(
        name=top.get("name", str),
        scale=top.get("scale", str),
        seed=top.number("seed", int, 0, 2**31 - 1),
        num_steps=num_steps,
        batch_size=top.number("batch_size", int, 1, 2**20),
        ema_decay=ema_decay,
        log_every=top.number("log_every", int, 1),
        sample_every=top.number("sample_every", int, 0),
        checkpoint_every=top.number("checkpoint_every", int, 1),
        keep_checkpoints=top.number("keep_checkpoints", int, 1),
        keep_every=top.number("keep_every", int, 0),
        init_from=top.get("init_from", str),
        accumulate=top.number("accumulate", int, 1),
        nonfinite=top.choice("nonfinite", ("stop", "skip")),
        hang_limit=top.number("hang_limit", int, 0, 10**7),
        judged_samples=top.number("judged_samples", int, 0, 10**6),
        terms=terms,
        term_checkpoints=tuple(
            (term.name, workdir)
            for term, workdir in read_terms
            if term.source == "checkpoint" and term.level == "internal"
        ),
        generator=generator,
        optimizer=read_optimizer(top.section("optimizer"), num_steps),
        data=_data(top.section("data")),
        tokenizer=_tokenizer(top.section("tokenizer"), generator),
        teacher=_teacher(top.section("teacher"), terms),
        mesh=_mesh(top.section("mesh"), num_devices),
        **_sample(top.section("sample"), generator),
    )
    top.refuse_unknown()
    ways = settings.mesh[0] * settings.mesh[1]
    parts = f" times accumulate={settings.accumulate}" if settings.accumulate > 1 else ""
    fields.require(
        settings.batch_size % (ways * settings.accumulate) == 0,
        "batch_size",
        settings.batch_size,
        f"a multiple of {ways * settings.accumulate}, the {ways} ways mesh.data * mesh.fsdp split "
        f"it{parts} (there are {num_devices} devices)",
    )
    for i, term in enumerate(terms):
        fields.require(
            term.targets == "own" or settings.batch_size > settings.accumulate,
            f"foresight[{i}].targets",
            term.targets,
            "own where a part of the batch is a single image",
        )
    fields.require(
        settings.keep_every % settings.checkpoint_every == 0,
        "keep_every",
        settings.keep_every,
        f"a multiple of checkpoint_every={settings.checkpoint_every}, or 0",
    )
    _check_data(settings)
    return settings


def read_optimizer(section: fields.Section, num_steps: int) -> OptimizerConfig:
    """`optimizer.*`; raises ConfigError."""
    schedule = section.choice("schedule", SCHEDULES)
    warmup_steps = section.number("warmup_steps", int, 0)
    fields.require(
        schedule == "constant" or warmup_steps < num_steps,
        section.name("warmup_steps"),
        warmup_steps,
        f"less than num_steps={num_steps} with optimizer.schedule {schedule!r}",
    )
    return OptimizerConfig(
        learning_rate=section.number("learning_rate", float, 0),
        schedule=schedule,
        warmup_steps=warmup_steps,
        num_steps=num_steps,
        b1=fields.probability(section, "b1"),
        b2=fields.probability(section, "b2"),
        eps=section.number("eps", float, 1e-16),
        weight_decay=section.number("weight_decay", float, 0),
        clip_norm=section.number("clip_norm", float, 0),
    )


def _data(section: fields.Section) -> DataSettings:
    return DataSettings(
        name=section.choice("name", (*SMALL_SETS, "images")),
        path=section.get("path", str),
        images=section.get("images", str),
        codes=section.choice("codes", ("stored", "online")),
        crop_range=section.number("crop_range", float, 1, 4),
        held_out=section.number("held_out", int, 0),
        num_workers=section.number("num_workers", int, 0, 1024),
    )


def _tokenizer(section: fields.Section, generator: GeneratorConfig) -> TokenizerSettings:
    settings = TokenizerSettings(
        name=section.choice("name", ("patch", *MULTIPLIERS)),
        path=section.get("path", str),
        image_size=section.number("image_size", int, 1, 4096),
        patch=section.number("patch", int, 1),
    )
    if settings.name == "patch":
        side = settings.patch
    else:
        side = VQConfig(MULTIPLIERS[settings.name]).downsample
    grid = (settings.image_size // side,) * 2
    fields.require(
        settings.image_size % side == 0 and grid == generator.grid,
        "model.grid",
        generator.grid,
        f"{grid}, the tokens of tokenizer.image_size={settings.image_size} at {side} pixels each",
    )
    return settings


def _teacher(section: fields.Section, terms: tuple[foresight.Term, ...]) -> TeacherSettings:
    settings = TeacherSettings(
        name=section.get("name", str),
        path=section.get("path", str),
        image_size=section.number("image_size", int, 0, 4096),
        layer=section.number("layer", int, 0),
        stage=section.number("stage", int, 1, 7),
        dtype=section.choice("dtype", ("float32", "bfloat16")),
        cached=section.get("cached", bool),
    )
    if not any(t.source == "bidirectional" and t.level == "internal" for t in terms):
        return settings
    fields.choice(section.name("name"), settings.name, TEACHERS)
    if settings.name == "efficientnet_lite0":
        fields.require(
            settings.image_size >= 32,
            section.name("image_size"),
            settings.image_size,
            "32 or more for efficientnet_lite0",
        )
    else:
        fields.require(
            settings.name == "dinov2" or settings.image_size % PATCH == 0,
            section.name("image_size"),
            settings.image_size,
            f"a multiple of {PATCH}, DINOv2's patches (0: one patch a token)",
        )
        fields.require(
            bool(settings.path),
            section.name("path"),
            settings.path,
            f"the weights of {settings.name}: the published .pth, a converted folder, or a workdir "
            "of mirai_jax.teach",
        )
    return settings


def _check_data(settings: Settings) -> None:
    """What data, tokenizer and teacher ask of each other."""
    data, tokenizer = settings.data, settings.tokenizer
    fields.require(
        data.in_memory == (tokenizer.name == "patch"),
        "tokenizer.name",
        tokenizer.name,
        f"{'patch' if data.in_memory else ' or '.join(MULTIPLIERS)} with data.name {data.name!r}",
    )
    fields.require(
        data.in_memory or not settings.teacher.cached,
        "teacher.cached",
        settings.teacher.cached,
        f"False with data.name {data.name!r} (features of all its crops would not fit in memory)",
    )
    if data.in_memory:
        return
    why = "data.codes 'online'" if data.online else "a term of source 'bidirectional'"
    fields.require(
        bool(data.images) or not settings.step_sees_images,
        "data.images",
        data.images,
        f"a folder with a folder of images a class, or tfds:NAME[:SPLIT]: {why} looks at images",
    )
    fields.require(
        bool(tokenizer.path) or not data.online,
        "tokenizer.path",
        tokenizer.path,
        f"the weights of {tokenizer.name} with data.codes 'online'",
    )


def _mesh(section: fields.Section, num_devices: int) -> tuple[int, int, int]:
    try:
        return sharding.mesh_shape(
            *(section.get(axis, int) for axis in sharding.AXES), num_devices=num_devices
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _sample(section: fields.Section, generator: GeneratorConfig) -> dict[str, Any]:
    values = {
        field.name: section.get(field.name, type(field.default))
        for field in dataclasses.fields(SampleOptions)
    }
    try:
        options = SampleOptions(**values)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    fields.require(
        options.guidance == 1 or generator.has_null_class,
        "sample.guidance",
        options.guidance,
        "1 where model.class_dropout is 0 (there is no null class)",
    )
    return dict(
        sample=options,
        sample_classes=section.number("classes", int, 1, min(100, generator.num_classes)),
        sample_per_class=section.number("per_class", int, 1, 100),
    )
