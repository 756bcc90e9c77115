"""Fields that take no effect under the others, so that nobody waits for what a setting will not do."""

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from mirai_jax.config import fields
from mirai_jax.config.encoders import is_vit
from mirai_jax.config.schema import RunConfig

_LARGE = ("data.name 'folder' or 'images'", lambda c: c.data.name in ("folder", "images"))
_LISTED = (
    "data.name 'folder', or 'images' with data.codes 'online'",
    lambda c: c.data.name == "folder" or (c.data.name, c.data.codes) == ("images", "online"),
)
# A field: what must hold of the config (`c`), or of the term (`t`), for it to take effect.
RUN = {
    "data.held_out": ("data.name 'mnist'", lambda c: c.data.name == "mnist"),
    **dict.fromkeys(("data.images", "data.crops", "data.flip", "data.held_out_share"), _LARGE),
    **dict.fromkeys(("data.min_images", "data.exif"), _LISTED),
    "data.crop_range": (
        "data.crops 'stored' of a folder or with data.codes 'online'",
        lambda c: _LISTED[1](c) and c.data.crops == "stored",
    ),
    "optimizer.decayed": ("optimizer.weight_decay above 0", lambda c: c.optimizer.weight_decay > 0),
    "init_rows": ("init_from", lambda c: c.init_from),
    "lora.alpha": ("lora.rank above 0", lambda c: c.lora.rank > 0),
    "validate_every": (
        "validation_path, or images that are held out",
        lambda c: c.validation_path or c.data.name != "images" or c.data.held_out_share,
    ),
    "validation_path": ("validate_every above 0", lambda c: c.validate_every),
    "evaluate_every": (
        "evaluate_reference, or images that are held out",
        lambda c: (
            c.evaluate_reference
            or c.data.name != "images"
            or (c.data.held_out_share and c.data.codes == "online")
        ),
    ),
    **dict.fromkeys(
        (f"evaluate_{name}" for name in ("samples", "guidance", "reference", "inception")),
        ("evaluate_every above 0", lambda c: c.evaluate_every),
    ),
    "judged_samples": ("a data set in memory", lambda c: c.data.name != "images"),
    **dict.fromkeys(
        ("sample.interval", "sample.schedule"),
        ("sample.guidance above 1", lambda c: c.sample.guidance > 1),
    ),
    "sample.power": (
        "sample.guidance above 1 and sample.schedule 'power_cosine'",
        lambda c: c.sample.guidance > 1 and c.sample.schedule == "power_cosine",
    ),
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
    "tokenizer.path": ("tokenizer.name vq16, vq8 or vq", lambda c: c.tokenizer.name != "patch"),
}
_MLP = (
    "level 'internal' and projector 'mlp'",
    lambda t: (t.level, t.projector) == ("internal", "mlp"),
)
_TERM = {
    "anchor": ("level 'internal'", lambda t: t.level == "internal"),
    "borders": ("layout '2d'", lambda t: t.layout == "2d"),
    "checkpoint": ("source 'checkpoint'", lambda t: t.source == "checkpoint"),
    "projector": ("level 'internal'", lambda t: t.level == "internal"),
    "projector_init": _MLP,
    "projector_width": _MLP,
    "schedule_unit": ("a schedule", lambda t: t.schedule),
    "source": ("level 'internal'", lambda t: t.level == "internal"),
    "teacher_layer": ("a generator as source", lambda t: t.source != "bidirectional"),
    "window_along": ("window above 1", lambda t: t.window > 1),
}
_HIDES = ("objective 'masked' or 'both'", lambda c: c.objective != "labels")
ENCODER = {  # of mirai_jax.teach
    "data.held_out": RUN["data.held_out"],
    "data.path": ("data.name 'fashion_mnist'", lambda c: c.data.name == "fashion_mnist"),
    "label_smoothing": ("objective 'labels' or 'both'", lambda c: c.objective != "masked"),
    "masked_share": _HIDES,
    "optimizer.decayed": RUN["optimizer.decayed"],
    "tokenizer.vocab_size": _HIDES,
}
_ALL = ("train 'all'", lambda c: c.train == "all")
_ADVERSARY = ("discriminator.weight above 0", lambda c: c.discriminator.weight > 0)
_IMAGES = ("data.name 'images'", lambda c: c.data.name == "images")
TOKENIZER = {  # of mirai_jax.tokenize
    **dict.fromkeys(("data.crop_range", "data.flip", "data.exif"), _IMAGES),
    "data.images": _IMAGES,
    "data.path": ("data.name 'fashion_mnist'", lambda c: c.data.name == "fashion_mnist"),
    "tokenizer.restart_after": _ALL,
    "tokenizer.start": ("init_from unset", lambda c: not c.init_from),
    "loss.commit_weight": _ALL,
    "loss.entropy_weight": _ALL,
    "loss.perceptual_stages": (
        "loss.perceptual_weight above 0 and no loss.lpips",
        lambda c: c.loss.perceptual_weight > 0 and not c.loss.lpips,
    ),
    "loss.lpips": ("loss.perceptual_weight above 0", lambda c: c.loss.perceptual_weight > 0),
    **{
        f"discriminator.{name}": _ADVERSARY
        for name in ("start", "loss", "adaptive", "width", "num_layers")
    },
}


def report(config: Any, arguments: Iterable[str], *rules: Any) -> None:
    """Prints the `notes` of a command line on stderr."""
    for note in notes(config, arguments, *rules):
        print(note, file=sys.stderr, flush=True)


def notes(
    config: Any, arguments: Iterable[str], group: type = RunConfig, needs: Mapping[str, Any] = RUN
) -> list[str]:
    """A line for each --config.FIELD=VALUE of `arguments` that takes no effect in the whole `config`."""
    given, found = fields.read(group, config), []
    for argument in arguments:
        name = argument.removeprefix("--config.").partition("=")[0]
        term = re.fullmatch(r"foresight\[(\d+)]\.(\w+)", name)
        rules = [needs.get(part) for part in (name.partition(".")[0], name)]
        subject = given
        if term and int(term[1]) < len(given.foresight):
            rules, subject = [_TERM.get(term[2])], given.foresight[int(term[1])]
        for wanted, holds in filter(None, rules):
            if not holds(subject):
                found.append(f"--config.{name} takes no effect: it needs {wanted}")
                break
    return found
