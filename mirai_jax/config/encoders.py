"""The fields of the frozen encoder, and what they ask of each other."""

import dataclasses
import re

from mirai_jax.config.fields import DTYPES, Check, field
from mirai_jax.models.teacher import FAMILIES, TEACHERS
from mirai_jax.models.vit_sizes import PUBLISHED


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
    """`teacher.*`."""

    name: str = field("dinov2_vitb14")
    path: str = field("", resumable=True)
    image_size: int = field(0, at_least=0, at_most=4096)
    layer: int = field(0, at_least=0)
    norm: str = field("auto", choices=("auto", "final", "none"))
    last: int = field(1, at_least=1)
    block: int = field(0, at_least=0)
    zscore: float = field(0.0, at_least=0, at_most=1)
    stage: int = field(5, at_least=1, at_most=7)
    dtype: str = field("auto", choices=("auto", *DTYPES), resumable=True)  # changes rounding
    cached: bool = field(False)


def is_vit(name: str) -> bool:
    """Whether the encoder of that `teacher.name` is a vision transformer of this project."""
    return name.partition("_")[0] in FAMILIES


def check_teacher(teacher: TeacherSettings, needed: bool, check: Check) -> None:
    """`needed`: whether some term looks at the encoder.

    Raises:
        ConfigError: the first wrong field.
    """
    good = teacher.name in TEACHERS or re.fullmatch(r"[\w.]+:\w+", teacher.name)
    check("teacher.name", good, f"one of {', '.join(TEACHERS)}, or MODULE:CLASS")
    if needed and not is_vit(teacher.name):
        allowed = f"0 for {teacher.name}: only the attention of a vision transformer is masked"
        check("teacher.block", teacher.block == 0, allowed)
    if needed and teacher.name == "efficientnet_lite0":
        check("teacher.image_size", teacher.image_size >= 32, f"32 or more for {teacher.name}")
    elif needed and is_vit(teacher.name):
        patch = PUBLISHED[teacher.name].patch if teacher.name in PUBLISHED else 1
        good = teacher.image_size % patch == 0
        check("teacher.image_size", good, f"a multiple of {patch} (0: one patch a token)")
        of = "the published .pth, a converted folder, or a workdir of mirai_jax.teach"
        check("teacher.path", teacher.path, f"the weights of {teacher.name}: {of}")
    good = not (needed and teacher.block and teacher.zscore)
    check("teacher.zscore", good, "0 with teacher.block: its mean is over all patches of the image")
