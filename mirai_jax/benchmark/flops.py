"""Operations of a train step's matrix products by formula: the numerator of MFU.

* A multiply-add is two operations. Only matrix products and convolutions count: no norm, softmax,
  optimizer or resizing of images. A convolution counts its taps on padding too.
* A backward pass costs twice its forward pass. Recomputation (`remat`) never counts.
* Attention counts all pairs of positions although a causal mask drops half of them, as PaLM's MFU
  does. An implementation that skips masked blocks, such as ours, executes fewer.
* The tokenizer's work for online codes (`Recipe.tokenizer`) is not counted, nor an encoder of yours, nor
  the mean over a window of targets.

Sampling reads one token at a time and is bound by memory: `decode_bytes` is its roofline.

Shape letters: B batch, L positions, D width, N layers, as in the modules counted.
"""

import dataclasses

from mirai_jax import foresight, step
from mirai_jax.models.efficientnet import EFFICIENTNET_LITE0_STAGES, STEM_CHANNELS
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.models.heads import BLOCKS
from mirai_jax.models.teacher import EfficientNetTeacher, VitTeacher


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Operations of one train step.

    Attributes:
        student: the generator, forward and backward.
        teacher: all teachers, forward.
        projectors: the terms' heads, forward and backward, down to the student's states.
    """

    student: int
    teacher: int
    projectors: int

    @property
    def total(self) -> int:
        return self.student + self.teacher + self.projectors


def step_flops(recipe: step.Recipe, batch_size: int, *, cached_features: bool = False) -> StepFlops:
    """Counts a step in which all terms are active.

    Args:
        batch_size: images of the global batch.
        cached_features: batches hold the bidirectional teacher's features, which then cost nothing.
    """
    tokens = recipe.generator.length
    heads = sum(_heads(recipe, term) for term in recipe.terms)
    return StepFlops(
        student=3 * batch_size * generator_forward(recipe.generator),
        teacher=batch_size * _teachers(recipe, cached_features),
        projectors=3 * batch_size * tokens * heads,
    )


def generator_forward(
    config: GeneratorConfig,
    tokens: int | None = None,
    *,
    layers: int | None = None,
    head: bool = True,
) -> int:
    """Counts one forward pass of one sequence.

    Args:
        tokens: positions, the class among them; None for a whole image.
        layers: number of blocks; None for all.
        head: whether logits are computed.
    """
    tokens = config.length if tokens is None else tokens
    layers = config.num_layers if layers is None else layers
    pairs = tokens**2
    blocks = layers * (2 * tokens * _block_weights(config) + 4 * pairs * config.width)
    return blocks + head * 2 * tokens * config.width * config.vocab_size


def decode_bytes(
    config: GeneratorConfig, batch: int, itemsize: int, cache_dtype: str = "model"
) -> int:
    """The fewest bytes that a step of cached generation moves through memory, mean over positions.

    A step reads each weight of the blocks and of the output head once, and `batch` rows of the token
    embedding. It reads the keys and values of the valid positions and writes those of this position,
    (L + 1) / 2 positions on average. Activations and norms are small and left out.

    Args:
        batch: sequences, the unconditional half of guidance too.
        itemsize: bytes of a weight and, unless `cache_dtype` is int8, of a number in the cache.
    """
    kept = 1 + 4 / config.head_dim if cache_dtype == "int8" else itemsize  # with the scales
    cache = config.num_layers * batch * (config.length + 1) * config.width
    weights = config.num_layers * _block_weights(config) + config.width * config.vocab_size
    return int(itemsize * (weights + batch * config.width) + kept * cache)


def _block_weights(config: GeneratorConfig) -> int:
    """Weights of one block of the generator: queries, keys and values, their output, and SwiGLU."""
    return config.width * (4 * config.width + 3 * config.ffn_width)


# Teachers and heads -------------------------------------------------------------------------------


def _teachers(recipe: step.Recipe, cached_features: bool) -> int:
    """All targets of one image; a target that terms share counts once, as in `step.teacher_targets`."""
    targets = {}
    for term in recipe.terms:
        if term.level == "output":
            continue  # its targets are the tokens
        if term.source == "bidirectional":
            targets["bidirectional"] = 0 if cached_features else _encoder(recipe.teacher)
            continue
        static = term.source == "checkpoint"
        config = dict(recipe.pretrained_configs)[term.name] if static else recipe.generator
        targets[term.name if static else "", term.teacher_layer] = generator_forward(
            config, recipe.generator.length, layers=term.teacher_layer, head=False
        )
    return sum(targets.values())


def _encoder(teacher) -> int:
    """One image through the bidirectional teacher; 0 if there is no formula for it."""
    if isinstance(teacher, VitTeacher):
        return _vit(teacher)
    return _efficientnet(teacher) if isinstance(teacher, EfficientNetTeacher) else 0


def _vit(teacher: VitTeacher) -> int:
    config, (height, width) = teacher.config, teacher.patches
    patches = height * width
    tokens = 1 + config.registers + patches
    feed_forward = (3 if config.swiglu else 2) * config.width * config.ffn_width
    block = 2 * tokens * (4 * config.width**2 + feed_forward) + 4 * tokens**2 * config.width
    embedding = 2 * patches * 3 * config.patch**2 * config.width
    return embedding + (teacher.layer or config.num_layers) * block


def _efficientnet(teacher: EfficientNetTeacher) -> int:
    height, width = (-(-side // 2) for side in teacher.sides)
    channels = STEM_CHANNELS
    total = 2 * height * width * 3**2 * 3 * channels
    for expansion, out, repeats, stride, kernel in EFFICIENTNET_LITE0_STAGES[: teacher.stage]:
        for i in range(repeats):
            inner = expansion * channels
            if expansion > 1:
                total += 2 * height * width * channels * inner
            if i == 0:
                height, width = -(-height // stride), -(-width // stride)
            total += 2 * height * width * inner * (kernel**2 + out)  # depthwise, then pointwise
            channels = out
    return total


def _heads(recipe: step.Recipe, term: foresight.Term) -> int:
    """One position through all heads of a term."""
    width = recipe.generator.width
    features = step.target_width(recipe, term)
    if term.level == "output":
        head = width * features
    elif term.projector == "transformer":
        config = recipe.generator
        blocks = generator_forward(config, layers=BLOCKS, head=False)
        head = blocks // (2 * config.length) + width * features
    else:
        head = term.projector_width * (width + term.projector_width + features)
    return 2 * len(term.offsets) * head
