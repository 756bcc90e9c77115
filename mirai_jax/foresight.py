"""Foresight: training signals from later tokens (arXiv 2601.14671, section 3).

A *term* aligns the student's hidden states with features that know later tokens. Every variant of
the paper is a `Term`, and a run takes a tuple of them:

* Mirai-E: source `ema`, targets are the EMA generator's own states at future grid positions;
* Mirai-I: source `bidirectional`, targets are a frozen encoder's features at the same position;
* LlamaGen-REPA (arXiv 2601.17124; as GEAR trains it): Mirai-I with the anchor `predicted`;
* the diagnostics: a static pretrained generator (`checkpoint`), raster offsets (`1d`), and tokens
  themselves as targets (level `output`, multi-token prediction).

Sequence positions are j, grid positions n (row by row). The input is `[class, x_0 .. x_{L-2}]`, so
position j = n + 1 has just consumed x_n and position j = n predicts x_n. The official code names a
position by the token it has consumed, the paper by the token it predicts (`anchor`).

Shapes: B batch, L positions, D student width, Z target width, K offsets, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.models.heads import Projector, TokenHead, TransformerProjector

GENERATORS = ("ema", "checkpoint")  # sources whose targets are states of a generator
SOURCES = (*GENERATORS, "bidirectional")
LEVELS = ("internal", "output")
LAYOUTS = ("2d", "1d")
BORDERS = ("wrap", "mask")
ANCHORS = ("consumed", "predicted")
REDUCTIONS = ("sum", "mean")
TARGETS = ("own", "shuffled")
WINDOWS = ("positions", "rows")
UNITS = ("epochs", "shares")
PROJECTORS = ("mlp", "transformer")
INITS = ("normal", "torch")


@dataclasses.dataclass(frozen=True)
class Term:
    """One foresight loss. The defaults are those of the official Mirai-E code.

    Attributes:
        name: the key of its parameters and metrics, unique in a run.
        source: where targets come from, one of SOURCES. Level `output` needs none: its targets
            are the tokens.
        level: `internal` aligns hidden states. `output` predicts, with K further heads, the tokens
            at the offsets, which count from the token that the position predicts.
        layout: `2d` offsets are (rows, columns) on the grid, `1d` ones are raster steps.
        offsets: K offsets. (0, 0) is the same position.
        targets: `own`, or as a control `shuffled`: those of the previous image of the batch, which
            carry no information about this one.
        window: of source `bidirectional`: a target is the mean of the features of this many places,
            the offset's own and those after it, as far as the grid reaches.
        window_along: `positions` of the raster, or `rows`, straight down.
        borders: of the 2-D layout: `wrap` shifts the flattened sequence, so that a pair may run
            from a row's end into the next row (the official code); `mask` drops such pairs.
        anchor: `consumed` or `predicted`, see above. Under `consumed`, generator sources also align
            the class position with itself, in every head.
        weights: one weight a head, or one for all.
        reduction: whether the weighted heads are summed (code) or averaged (paper).
        student_layer, teacher_layer: blocks (from 1) whose output is aligned.
        start_epoch: the term takes no part before it (weight decay still acts on its parameters).
        schedule: (time, multiplier) pairs in order: from that time on the weights are multiplied by
            it.
        schedule_unit: of these times: `epochs`, or `shares` of the run's steps.
        projector: `mlp` (official), or `transformer`, a small causal one over the sequence.
        projector_width: hidden width of an mlp (2048 officially, whatever the model).
        projector_init: of an mlp: `normal` (N(0, 0.02), biases 0), or `torch`, PyTorch's default of
            its Linear (uniform within 1 / sqrt(inputs), biases too), as in GEAR.
    """

    name: str = "ema"
    source: str = "ema"
    level: str = "internal"
    layout: str = "2d"
    offsets: tuple = ((0, 0), (0, 1), (1, 0))
    targets: str = "own"
    window: int = 1
    window_along: str = "positions"
    borders: str = "wrap"
    anchor: str = "consumed"
    weights: tuple[float, ...] = (2.0,)
    reduction: str = "sum"
    student_layer: int = 8
    teacher_layer: int = 8
    start_epoch: float = 15.0
    schedule: tuple[tuple[float, float], ...] = ((80.0, 0.5),)
    schedule_unit: str = "epochs"
    projector: str = "mlp"
    projector_width: int = 2048
    projector_init: str = "normal"

    @property
    def head_weights(self) -> tuple[float, ...]:
        """K weights, the reduction included: the term is their dot product with the losses."""
        count = len(self.offsets)
        weights = self.weights * count if len(self.weights) == 1 else self.weights
        return tuple(w / count for w in weights) if self.reduction == "mean" else weights

    @property
    def metric_names(self) -> tuple[str, ...]:
        """One name a head, e.g. `foresight_ema_r0c1` or, in 1-D, `foresight_ema_n2`."""
        if self.layout == "2d":
            return tuple(f"foresight_{self.name}_r{r}c{c}" for r, c in self.offsets)
        return tuple(f"foresight_{self.name}_n{n}" for n in self.offsets)


# ---------------------------------------------------------------------------------------------
# Layout: which position looks at which.


def alignment(term: Term, offset: Any, grid: tuple[int, int]) -> tuple[int, np.ndarray]:
    """Pairs student position j with target position j + shift.

    Args:
        term: gives source, level, layout, borders and anchor.
        offset: (rows, columns) or raster steps, depending on `term.layout`.
        grid: (height, width) of the token grid.

    Returns:
        The shift, and a float32 (L,) mask of the student positions that have a target. Targets are
        indexed by sequence position for generator sources, by grid position otherwise (patches,
        tokens). The mask leaves out the pair of the class position with itself: `has_class_pair`.
    """
    height, width = grid
    length = height * width
    rows, columns = offset if term.layout == "2d" else (0, offset)
    step = rows * width + columns
    consumed = term.level == "internal" and term.anchor == "consumed"
    generator_targets = term.level == "internal" and term.source in GENERATORS

    positions = np.arange(length)
    here = positions - 1 if consumed else positions  # the grid position that j stands for
    there = here + step
    # A generator's sequence ends with x_{L-2}: no state has consumed the last token.
    last = length - 2 if consumed and generator_targets else length - 1
    valid = (here >= 0) & (there >= 0) & (there <= last)
    if term.layout == "2d" and term.borders == "mask":
        row, column = here // width + rows, here % width + columns
        valid &= (row >= 0) & (row < height) & (column >= 0) & (column < width)
    shift = step - 1 if consumed and not generator_targets else step
    return shift, valid.astype(np.float32)


def has_class_pair(term: Term) -> bool:
    """Whether the class position is aligned with itself: only states of a generator have one."""
    return term.level == "internal" and term.anchor == "consumed" and term.source in GENERATORS


# ---------------------------------------------------------------------------------------------
# Heads: K projectors (or token heads); their parameters are stacked on a leading axis K.


def _head(term: Term, target_width: int, dtype: str, student: GeneratorConfig | None) -> nn.Module:
    if term.level == "output":
        return TokenHead(target_width, dtype)
    if term.projector == "transformer":
        return TransformerProjector(target_width, dataclasses.replace(student, dtype=dtype))
    return Projector(term.projector_width, target_width, dtype, term.projector_init)


def init_heads(
    term: Term,
    target_width: int,
    width: int,
    key: jax.Array,
    student: GeneratorConfig | None = None,
) -> Any:
    """Fresh float32 parameters of the K heads of a term.

    Args:
        term: level `internal` gives projectors, `output` token heads.
        target_width: the width Z of the target, or the vocabulary size V.
        width: D, of the states that the heads read.
        key: of all heads.
        student: of a transformer projector, whose blocks are like the student's.
    """
    state = jnp.zeros((student.length if term.projector == "transformer" else 1, width))
    head = _head(term, target_width, "float32", student)
    return jax.vmap(lambda key: head.init(key, state)["params"])(
        jax.random.split(key, len(term.offsets))
    )


def apply_heads(
    term: Term,
    target_width: int,
    dtype: str,
    params: Any,
    state_BxLxD: jax.Array,
    student: GeneratorConfig | None = None,
) -> list[jax.Array]:
    """The outputs of the K heads, each (B, L, target_width); `dtype` is that of the products.

    `student` is as in `init_heads`.

    Heads run one after the other on one flat axis of tokens: of K batched products XLA would
    transpose activations and weights (a sixth of Mirai-E's extra time on CPU).
    """
    head = _head(term, target_width, dtype, student)
    x_MxD = state_BxLxD.reshape(-1, state_BxLxD.shape[-1])
    outputs = [
        head.apply({"params": jax.tree.map(lambda p: p[k], params)}, x_MxD)  # noqa: B023 (at once)
        for k in range(len(term.offsets))
    ]
    return [out.reshape(*state_BxLxD.shape[:-1], target_width) for out in outputs]


# ---------------------------------------------------------------------------------------------
# Losses.


def _normalise(x: jax.Array) -> jax.Array:
    """L2-normalises the last axis in float32; like torch, a norm under 1e-12 counts as 1e-12."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def _roll(x: jax.Array, shift: int) -> jax.Array:
    """x[:, j + shift] at position j; the mask drops values from beyond the sequence."""
    return jnp.roll(x, -shift, axis=1)


def _targets_of(term: Term, x_Bx: jax.Array) -> jax.Array:
    """The targets of each image: its own, or where `term.targets` is shuffled the previous one's."""
    return jnp.roll(x_Bx, 1, axis=0) if term.targets == "shuffled" else x_Bx


def _pooled(term: Term, target_BxLxZ: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The mean over the term's window after each grid position, float32."""
    if term.window == 1:
        return target_BxLxZ
    length, step = grid[0] * grid[1], grid[1] if term.window_along == "rows" else 1
    ahead = np.arange(length) - np.arange(length)[:, None]
    inside = (ahead >= 0) & (ahead % step == 0) & (ahead < term.window * step)
    weights_LxL = (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)
    return jnp.einsum(
        "nm,bmz->bnz", weights_LxL, target_BxLxZ.astype(jnp.float32), precision="highest"
    )


def alignment_losses(
    term: Term,
    projections_BxLxZ: Sequence[jax.Array],
    target_BxLxZ: jax.Array,
    grid: tuple[int, int],
) -> jax.Array:
    """Minus the mean cosine over batch and aligned pairs, for each head.

    Args:
        term: an internal term.
        projections_BxLxZ: the student's projected states, one array a head.
        target_BxLxZ: teacher states by sequence position, or patch features by grid position; no
            gradient reaches them.
        grid: (height, width), L = height * width.

    Returns:
        (K,) float32, each in [-1, 1].
    """
    target_BxLxZ = _pooled(term, jax.lax.stop_gradient(target_BxLxZ), grid)
    target = _targets_of(term, _normalise(target_BxLxZ))
    losses = []
    for k, offset in enumerate(term.offsets):
        shift, mask_L = alignment(term, offset, grid)
        student = _normalise(projections_BxLxZ[k])
        cosine_BxL = jnp.sum(student * _roll(target, shift), axis=-1)
        # Sums, not a matrix product, which accelerators would round.
        total, count = jnp.mean(jnp.sum(cosine_BxL * mask_L, axis=-1)), mask_L.sum()
        if has_class_pair(term):
            own = jnp.sum(student[:, 0] * target[:, 0], axis=-1)
            total, count = total + jnp.mean(own), count + 1
        losses.append(-total / count)
    return jnp.stack(losses)


@jax.custom_vjp
def token_nll(logits_BxLxV: jax.Array, tokens_BxL: jax.Array) -> jax.Array:
    """Cross-entropy (nats, float32) of each token.

    The backward pass reads the logits, stored in their dtype, and one number a token: float32 copies
    of the logits exist only within fused loops.
    """
    return _nll_forward(logits_BxLxV, tokens_BxL)[0]


def _nll_forward(logits, tokens):
    highest = jnp.max(logits, axis=-1, keepdims=True).astype(jnp.float32)
    total = jnp.sum(jnp.exp(logits.astype(jnp.float32) - highest), axis=-1, keepdims=True)
    log_total = highest + jnp.log(total)
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1).astype(jnp.float32)
    return (log_total - own)[..., 0], (logits, tokens, log_total)


def _nll_backward(saved, g):
    logits, tokens, log_total = saved
    probability = jnp.exp(logits.astype(jnp.float32) - log_total)
    here = jnp.arange(logits.shape[-1]) == tokens[..., None]  # no scatter
    return ((probability - here) * g[..., None]).astype(logits.dtype), None


token_nll.defvjp(_nll_forward, _nll_backward)


def prediction_losses(
    term: Term, logits_BxLxV: Sequence[jax.Array], codes_BxL: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """Mean cross-entropy (nats) of the tokens at the offsets, for each head: (K,) float32."""
    codes_BxL, losses = _targets_of(term, codes_BxL), []
    for k, offset in enumerate(term.offsets):
        shift, mask_L = alignment(term, offset, grid)
        nll_BxL = token_nll(logits_BxLxV[k], _roll(codes_BxL, shift))
        losses.append(jnp.mean(jnp.sum(nll_BxL * mask_L, axis=-1)) / mask_L.sum())
    return jnp.stack(losses)


# ---------------------------------------------------------------------------------------------
# The weight over time. An epoch is `steps_per_epoch` whole batches.


def start_step(term: Term, steps_per_epoch: int) -> int:
    """The first step (from 0) in which the term takes part."""
    return round(term.start_epoch * steps_per_epoch)


def active_terms(terms: tuple[Term, ...], step: int, steps_per_epoch: int) -> tuple[bool, ...]:
    """Which terms take part in `step`."""
    return tuple(step >= start_step(term, steps_per_epoch) for term in terms)


def weight_multiplier(
    term: Term, step: jax.Array, steps_per_epoch: int, num_steps: int = 0
) -> jax.Array:
    """The schedule's multiplier at `step`: that of the last entry whose time has come, else 1.

    `num_steps` are those of the whole run, the unit of shares.
    """
    multiplier = jnp.ones((), jnp.float32)
    unit = num_steps if term.schedule_unit == "shares" else steps_per_epoch
    for time, value in term.schedule:
        begin = min(round(time * unit), 2**31 - 1)  # `step` is an int32
        multiplier = jnp.where(step >= begin, value, multiplier)
    return multiplier
