"""Fields that take no effect under the others, so that nobody waits for what a setting will not do."""

import re
from collections.abc import Iterable
from typing import Any

from mirai_jax.config import fields
from mirai_jax.config.encoders import is_vit
from mirai_jax.config.schema import RunConfig

# A field: what must hold of the config (`c`), or of the term (`t`), for it to take effect.
_NEEDS = {
    "data.held_out": ("data.name 'mnist'", lambda c: c.data.name == "mnist"),
    "data.images": ("data.name 'images'", lambda c: c.data.name == "images"),
    "data.crop_range": ("data.codes 'online'", lambda c: c.data.codes == "online"),
    "judged_samples": ("a data set in memory", lambda c: c.data.name != "images"),
    "sample.interval": ("sample.guidance above 1", lambda c: c.sample.guidance > 1),
    "teacher": (
        "a foresight term of source 'bidirectional'",
        lambda c: any((t.source, t.level) == ("bidirectional", "internal") for t in c.foresight),
    ),
    **dict.fromkeys(
        ("teacher.layer", "teacher.norm", "teacher.last"),
        ("a vision transformer as teacher.name", lambda c: is_vit(c.teacher.name)),
    ),
    "teacher.image_size": (
        "an encoder that is not yours: yours sees images as they are",
        lambda c: ":" not in c.teacher.name,
    ),
    "teacher.path": (
        "another teacher.name than 'efficientnet_lite0'",
        lambda c: c.teacher.name != "efficientnet_lite0",
    ),
    "teacher.stage": (
        "teacher.name 'efficientnet_lite0'",
        lambda c: c.teacher.name == "efficientnet_lite0",
    ),
    "tokenizer.patch": ("tokenizer.name 'patch'", lambda c: c.tokenizer.name == "patch"),
    "tokenizer.path": ("tokenizer.name vq16 or vq8", lambda c: c.tokenizer.name != "patch"),
}
_TERM_NEEDS = {
    "anchor": ("level 'internal'", lambda t: t.level == "internal"),
    "borders": ("layout '2d'", lambda t: t.layout == "2d"),
    "checkpoint": ("source 'checkpoint'", lambda t: t.source == "checkpoint"),
    "projector_width": ("level 'internal'", lambda t: t.level == "internal"),
    "source": ("level 'internal'", lambda t: t.level == "internal"),
    "teacher_layer": ("a generator as source", lambda t: t.source != "bidirectional"),
}


def notes(config: Any, arguments: Iterable[str]) -> list[str]:
    """A line for each --config.FIELD=VALUE of `arguments` that takes no effect in the whole `config`."""
    given, found = fields.read(RunConfig, config), []
    for argument in arguments:
        name = argument.removeprefix("--config.").partition("=")[0]
        term = re.fullmatch(r"foresight\[(\d+)]\.(\w+)", name)
        rules = [_NEEDS.get(part) for part in (name.partition(".")[0], name)]
        subject = given
        if term and int(term[1]) < len(given.foresight):
            rules, subject = [_TERM_NEEDS.get(term[2])], given.foresight[int(term[1])]
        for wanted, holds in filter(None, rules):
            if not holds(subject):
                found.append(f"--config.{name} takes no effect: it needs {wanted}")
                break
    return found
