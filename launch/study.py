"""The study "does foresight help?": which run plays which role, and what the paper says.

A setting is named SWEEP/SETTING: the folder in results/runs/ and the name of a run without its seed.
"""

import dataclasses

SCALE = "fashion_mnist"
MAIN = "variants"  # the sweep of the main comparison
BASELINE = "variants/llamagen"
VARIANTS = {
    "variants/llamagen": "LlamaGen",
    "variants/mirai_e": "Mirai-E",
    "variants/mirai_i": "Mirai-I",
    "variants/mirai_e_i": "Mirai-E+I",
}

# What a line of an assessment.jsonl must have been made with to count; where several kinds of lines
# do, the report asks for a closer description here.
PROTOCOL = {"weights": "ema", "guidance": 1.0}

# A difference is "beyond the noise" from so many standard deviations of a run over seeds on (that of a
# difference of two runs is larger by the root of 2).
YARDSTICK = 2.0


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number that an assessment gives.

    Attributes:
        key: in assessment.jsonl.
        name: in tables.
        axis: in figures.
        scale: what it is multiplied with to be shown.
        digits: after the point, when shown.
        log: whether a figure's axis is logarithmic.
    """

    key: str
    name: str
    axis: str
    lower_is_better: bool
    scale: float
    digits: int
    log: bool = False

    @property
    def title(self) -> str:
        """Of a column: name, unit and which direction is better."""
        unit = ", %" if self.scale == 100 else ""
        return f"{self.name}{unit} {'↓' if self.lower_is_better else '↑'}"

    def shown(self, value: float) -> str:
        return f"{self.scale * value:.{self.digits}f}"

    def signed(self, value: float) -> str:
        """A difference, with its sign unless it is shown as zero."""
        text = f"{self.scale * value:+.{self.digits}f}"
        return text if any(digit in text for digit in "123456789") else text[1:]

    def better(self, difference: float) -> bool:
        return (difference < 0) == self.lower_is_better


MEASURES = (
    Measure("frechet", "Fréchet", "Fréchet distance (EfficientNet-Lite0)", True, 1, 2, True),
    Measure("agreement", "agreement", "Agreement with the class asked for, %", False, 100, 1),
    Measure("cross_entropy", "cross-entropy", "Held-out cross-entropy, nats a token", True, 1, 4),
)
MORE_MEASURES = (
    Measure("frechet_images", "Fréchet to untouched images", "", True, 1, 2),
    Measure("precision", "precision", "", False, 1, 3),
    Measure("recall", "recall", "", False, 1, 3),
)
# What the EMA's states know of tokens to come: of a line of future.jsonl, in the best block.
FUTURE = (
    Measure("r0c1", "next token, R²", "", False, 1, 3),
    Measure("r1c0", "one row below, R²", "", False, 1, 3),
    Measure("r2c0", "two rows below, R²", "", False, 1, 3),
)
TEACHER = Measure("teacher_probe", "linear probe of the encoder", "", False, 100, 1)


@dataclasses.dataclass(frozen=True)
class Question:
    """Runs that differ in one thing from a reference.

    Attributes:
        text: what differs.
        settings: {setting: what it is}.
        reference: a variant of the main comparison.
    """

    title: str
    text: str
    settings: dict[str, str]
    reference: str = "variants/mirai_e"


def _settings(sweep: str, **texts: str) -> dict[str, str]:
    return {f"{sweep}/{name.replace('_', '-')}": text for name, text in texts.items()}


QUESTIONS = (
    Question(
        "Layout",
        "Mirai-E looks at the next positions of the 2-D grid. Here they are the next ones of the raster.",
        _settings("controls", internal_1d="internal, 1-D"),
    ),
    Question(
        "Level",
        "Mirai-E aligns internal states. Here the heads predict the tokens themselves, at the next "
        "positions of the grid (2-D) or of the raster (1-D).",
        _settings("diagnostics", output_2d="output, 2-D", output_1d="output, 1-D"),
    ),
    Question(
        "Borders of the grid",
        "Mirai-E shifts the flattened sequence, as the official code does, so that with the offset to the "
        "next column some pairs (7 of 62) run from a row's end to the next row's beginning. Here these are "
        "left out.",
        _settings("diagnostics", borders_mask="no pairs over a row's end"),
    ),
    Question(
        "Source of the targets",
        "Mirai-E's three positions, weights and start, with the frozen bidirectional encoder of Mirai-I in "
        "place of the causal EMA.",
        _settings("diagnostics", source_bidirectional="bidirectional encoder"),
    ),
    Question(
        "Aligned block",
        "Mirai-E aligns the block at two thirds of the depth. Here student and teacher use another "
        "one.",
        _settings("diagnostics", layer_1="block 1", layer_2="block 2", layer_4="block 4"),
    ),
    Question(
        "Number of positions",
        "Mirai-E looks at three positions. Every head has the weight 2 and heads are summed, so that "
        "more of them weigh more: K = 9 three times as much.",
        _settings("diagnostics", k_1="K = 1, the same position", k_9="K = 9, a 3x3 block"),
    ),
    Question(
        "Weight",
        "Mirai-E's heads weigh 2 each.",
        {f"diagnostics/weight-{weight}": f"weight {weight}" for weight in ("0.5", "1", "4")},
    ),
    Question(
        "Start of Mirai-E",
        "Mirai-E aligns from epoch 0.3 on, as the published run does from epoch 15 of 80 on.",
        _settings("controls", early_e="Mirai-E from the first step on"),
    ),
    Question(
        "Later start of Mirai-E",
        "Mirai-E aligns from epoch 0.3 on. Here it begins later.",
        {"diagnostics/start-0.75": "Mirai-E from epoch 0.75 on"},
    ),
    Question(
        "Controls for Mirai-E",
        "The same auxiliary loss without foresight: where one of these gains as much as Mirai-E, a gain of "
        "that size does not need targets from the future.",
        _settings(
            "controls",
            past_only="past positions: offsets mirrored",
            same_position="same position alone, weight of three heads",
            shuffled_e="targets of another image",
        ),
    ),
    Question(
        "Controls for Mirai-I",
        "The same with the encoder's features; and the image's own from as late on as Mirai-E's, for "
        "Mirai-I aligns from the first step on.",
        _settings(
            "controls", shuffled_i="features of another image", late_i="Mirai-I from epoch 0.3 on"
        ),
        reference="variants/mirai_i",
    ),
)


@dataclasses.dataclass(frozen=True)
class Exploration:
    """A sweep; the report names its runs by what differs in their configs.

    Attributes:
        reference: the variant that runs change.
        measures: that are shown of these runs beside MEASURES.
    """

    sweep: str
    title: str
    text: str
    reference: str
    measures: tuple[Measure, ...] = ()


EXPLORATIONS = (
    Exploration(
        "teachers",
        "Teachers of Mirai-I",
        "The same Mirai-I with another frozen encoder. What an encoder knows of the class is what a "
        "linear classifier of its features, averaged over the grid, says of held-out images.",
        "variants/mirai_i",
        (TEACHER,),
    ),
    Exploration(
        "neighbours",
        "Mirai-I and its neighbours",
        "Block-causal encoders, LlamaGen-REPA, a finished generator as teacher, look-ahead windows and a "
        "transformer as projector, one seed each. R² is what a linear probe of the states predicts of the "
        "vectors of tokens to come on held-out images, in the best block (`python -m mirai_jax.evaluate "
        "--future`).",
        "variants/mirai_i",
        FUTURE,
    ),
)


@dataclasses.dataclass(frozen=True)
class Claim:
    """An order that the paper found.

    Attributes:
        text: what it says.
        published: the paper's numbers (FID, ImageNet 256, B, 80 epochs).
        pairs: (better, worse) settings of ours that must all be so; SWEEP/* is every setting of it.
        note: how ours differs from the paper's, where that matters.
    """

    text: str
    published: str
    pairs: tuple[tuple[str, str], ...]
    note: str = ""


_E, _I, _INTERNAL_1D = "variants/mirai_e", "variants/mirai_i", "controls/internal-1d"
_OUTPUT_2D, _OUTPUT_1D = "diagnostics/output-2d", "diagnostics/output-1d"

CLAIMS = (
    Claim("Mirai-E is better than LlamaGen", "5.22 < 6.36", ((_E, BASELINE),)),
    Claim("Mirai-I is better than LlamaGen", "4.77 < 6.36", ((_I, BASELINE),)),
    Claim("Mirai-I is better than Mirai-E", "4.77 < 5.22", ((_I, _E),)),
    Claim(
        "the same",
        "4.77 < 5.22",
        ((_I, "controls/early-e"),),
        "ours: both from the first step on",
    ),
    Claim("the same", "4.77 < 5.22", (("controls/late-i", _E),), "ours: both from epoch 0.3 on"),
    Claim("internal level: 2-D is better than 1-D", "5.22 < 6.20", ((_E, _INTERNAL_1D),)),
    Claim("internal 1-D is better than LlamaGen", "6.20 < 6.36", ((_INTERNAL_1D, BASELINE),)),
    Claim("output level: 2-D is worse than no foresight", "6.36 < 6.48", ((BASELINE, _OUTPUT_2D),)),
    Claim("output level: 1-D is worse than no foresight", "6.36 < 7.28", ((BASELINE, _OUTPUT_1D),)),
    Claim("output level: 2-D is better than 1-D", "6.48 < 7.28", ((_OUTPUT_2D, _OUTPUT_1D),)),
    Claim(
        "two thirds of the depth is the best block",
        "block 8 of 12",
        tuple((_E, f"diagnostics/layer-{layer}") for layer in (1, 2, 4)),
    ),
    Claim(
        "a bidirectional source is better than the causal EMA",
        "4.77 (Mirai-I) < 5.22 (Mirai-E)",
        (("diagnostics/source-bidirectional", _E),),
        "ours: the same three positions",
    ),
    Claim(
        "every encoder makes Mirai-I better than LlamaGen",
        "DINOv2-B 4.77, DINOv3-B 5.02, MAE-B 6.34, all < 6.36",
        (("teachers/*", BASELINE),),
        "ours: other encoders",
    ),
)
