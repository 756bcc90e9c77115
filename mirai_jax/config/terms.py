"""Foresight terms: their names and defaults, and what their fields ask of each other and of the student."""

import dataclasses
import itertools
from typing import Any

from mirai_jax import foresight
from mirai_jax.config import fields
from mirai_jax.config.fields import Check, fill
from mirai_jax.models.generator import GeneratorConfig

LAST_EPOCH = 1e6  # more than any run has; in steps it must stay a finite number


def two_thirds(num_layers: int) -> int:
    """The default tap: block 8 of 12, 16 of 24, 24 of 36."""
    return max(1, round(2 * num_layers / 3))


def read_terms(given: Any, student: GeneratorConfig, check: Check) -> tuple[foresight.Term, ...]:
    """The terms of a `schema.RunConfig`; raises ConfigError for the first wrong field."""
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


def _default_name(term: Any, taken: set[str]) -> str:
    """The term's source (or 'output'), with a number from the second of its kind on."""
    base = term.source if term.level == "internal" else term.level
    names = itertools.chain([base], (f"{base}{i}" for i in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _term(term: Any, where: str, student: GeneratorConfig, check: Check) -> foresight.Term:
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
    last = 1 if term.schedule_unit == "shares" else LAST_EPOCH
    times = [time for time, _ in term.schedule]
    good = times == sorted(times) and all(0 <= time <= last for time in times)
    check(f"{where}.schedule", good, f"(time, multiplier) pairs in order, times from 0 to {last:g}")
    good = term.window == 1 or (internal and term.source == "bidirectional")
    check(f"{where}.window", good, f"1 for level {term.level!r} and source {term.source!r}")
    return made
