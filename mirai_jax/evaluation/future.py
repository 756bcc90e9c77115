"""What the generator's states know of tokens that they have not seen: ridge regressions, by block.

The state of a block at sequence position j has consumed x_0 .. x_{j-1}; the last consumed token lies at
grid position j - 1. From each such state a ridge regression predicts what lies at another grid position.
`targets` lists these: offsets from the last consumed token (pairs that leave the grid are dropped), and two
corners of the last row, read in the upper half of the grid. Two offsets are seen already, for comparison.

One regression a block and target pools all positions. The training images' means at each position are
taken off states and targets first, so that the position alone explains nothing. The generator runs without
a label (the null class) and without dropout. Block 0 is the input of the first block, the embedding of the
last consumed token alone: the baseline that the states above it have to beat.

The sums behind a regression (X'X, X'Y, means) are float64. Its penalty is one of PENALTIES times the mean
eigenvalue of X'X: the one with the least error on every fifth training image; then all of them are fitted.

Shapes: N images, L positions, D width of the states, Z width of the values.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mirai_jax import foresight
from mirai_jax.models.generator import Generator, GeneratorConfig, read_states

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
SEEN = {"r-1c0": "one row above (seen)", "r0c0": "last token (seen)"}
AHEAD = {"r0c1": "next token", "r0c2": "the one after"}
AHEAD |= {"r1c0": "one row below", "r2c0": "two rows below"}
CORNERS = {"last_row_first": "first of last row", "last_row_last": "last of last row"}
TITLES = SEEN | AHEAD | CORNERS
_CHUNK = 100  # images at once
_CHOOSING = 5  # every fifth training image chooses the penalty

Values = Mapping[str, np.ndarray]  # {kind: (N, L, Z)}, what lies at each grid position


@dataclasses.dataclass(frozen=True)
class Target:
    """Which grid position the states at which sequence positions shall predict.

    Attributes:
        name: a key of TITLES; `r1c0` is an offset of one row.
        mask_L: bool, the sequence positions that have such a target.
        there_L: int, the grid position that each of them looks at.
    """

    name: str
    mask_L: np.ndarray
    there_L: np.ndarray

    @property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Sequence positions, and the grid positions that they look at."""
        return np.flatnonzero(self.mask_L), self.there_L[self.mask_L]


def targets(grid: tuple[int, int]) -> list[Target]:
    """Those that a grid of (height, width) has room for."""
    height, width = grid
    positions, found = np.arange(height * width), []
    term = foresight.Term(source="bidirectional", borders="mask")
    for name in (*SEEN, *AHEAD):
        rows, columns = map(int, name[1:].split("c"))
        shift, mask_L = foresight.alignment(term, (rows, columns), grid)
        found.append(Target(name, mask_L > 0, positions + shift))
    upper_L = (positions > 0) & (positions <= height // 2 * width)
    for name, there in zip(CORNERS, ((height - 1) * width, height * width - 1), strict=True):
        found.append(Target(name, upper_L, np.full_like(positions, there)))
    return [target for target in found if target.mask_L.any()]


# ---------------------------------------------------------------------------------------------
# States.


@functools.partial(jax.jit, static_argnums=0)
def _states(config: GeneratorConfig, params: Any, codes_BxL: jax.Array) -> list[jax.Array]:
    labels = np.full(len(codes_BxL), config.null_class)
    codes_BxT = codes_BxL[:, :-1]
    embedded = Generator(config).apply({"params": params}, codes_BxT, labels, method="embed")
    _, states = read_states(config, params, codes_BxL, labels, range(1, config.num_layers + 1))
    return [embedded, *(states[layer] for layer in sorted(states))]


def _chunks(
    config: GeneratorConfig, params: Any, codes_NxL: np.ndarray, values: Values
) -> Iterator[tuple[list[np.ndarray], Values]]:
    """The states (B, L, D) of each block from 0, and the values, of some images after others."""
    chunk = min(_CHUNK, len(codes_NxL))
    for start in range(0, len(codes_NxL), chunk):
        some = codes_NxL[start : start + chunk]
        filled = np.resize(some, (chunk, some.shape[1]))  # so that one program suffices
        states = [np.asarray(x)[: len(some)] for x in _states(config, params, filled)]
        yield states, {kind: v[start : start + chunk] for kind, v in values.items()}


# ---------------------------------------------------------------------------------------------
# Regressions, from sums over images. A tree of sums is added with `_add`.


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(np.add, a, b)


def _float64(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def _groups(wanted: Sequence[Target]) -> tuple[np.ndarray, np.ndarray]:
    """Positions that take part in the same targets share a sum of X'X.

    Returns:
        (targets, G) bool, whether a group takes part, and the group of each position (L,).
    """
    masks = np.stack([target.mask_L for target in wanted])
    parts, group_L = np.unique(masks, axis=1, return_inverse=True)
    return parts, group_L.reshape(-1)


def _rows(x_BxLxD: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return x_BxLxD[:, positions].reshape(-1, x_BxLxD.shape[-1])


def sums(x_BxLxD: np.ndarray, values: Values, wanted: Sequence[Target]) -> dict[str, Any]:
    """What the regressions need of these images: sums of states, of values and of their products."""
    x_BxLxD, values = _float64((x_BxLxD, values))
    parts, group_L = _groups(wanted)
    by_group = [_rows(x_BxLxD, np.flatnonzero(group_L == g)) for g in range(parts.shape[1])]
    pairs = [target.pairs for target in wanted]
    return {
        "count": np.float64(len(x_BxLxD)),
        "x": x_BxLxD.sum(axis=0),
        "xx": np.stack([rows.T @ rows for rows in by_group]),
        "y": {kind: v.sum(axis=0) for kind, v in values.items()},
        "yy": {kind: np.square(v).sum(axis=(0, 2)) for kind, v in values.items()},
        "xy": {
            kind: [_rows(x_BxLxD, here).T @ _rows(v, there) for here, there in pairs]
            for kind, v in values.items()
        },
    }


def _centred(
    of: Mapping[str, Any], means: Mapping[str, Any], wanted: Sequence[Target], kind: str, i: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """X'X, X'Y and the sum of squares of Y, of target i, after `means` were taken off."""
    here, there = wanted[i].pairs
    x, y = of["x"][here], of["y"][kind][there]
    mean_x, mean_y = means["x"][here], means[kind][there]
    count, parts = of["count"], _groups(wanted)[0][i]
    cross = x.T @ mean_x
    xx = of["xx"][parts].sum(axis=0) - cross - cross.T + count * mean_x.T @ mean_x
    xy = of["xy"][kind][i] - x.T @ mean_y - mean_x.T @ y + count * mean_x.T @ mean_y
    yy = of["yy"][kind][there].sum() - 2 * np.sum(y * mean_y) + count * np.sum(mean_y**2)
    return xx, xy, yy


def _means(of: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: v / of["count"] for name, v in {"x": of["x"], **of["y"]}.items()}


def _solve(xx: np.ndarray, xy: np.ndarray, penalty: float) -> np.ndarray:
    scale = np.trace(xx) / len(xx)
    return np.linalg.solve(xx + penalty * scale * np.eye(len(xx)), xy)


def fit(
    fitted: Mapping[str, Any],
    choosing: Mapping[str, Any],
    wanted: Sequence[Target],
    penalties: Sequence[float] = PENALTIES,
) -> tuple[dict[str, np.ndarray], dict[str, list[np.ndarray]]]:
    """The regressions of one block.

    Args:
        fitted, choosing: `sums` of two shares of the training images; the second chooses the penalty.
        wanted: the targets of both.
        penalties: to choose from, in units of the mean eigenvalue of X'X.

    Returns:
        The means at each position, {'x': (L, D), kind: (L, Z)}, and {kind: a matrix (D, Z) a target}.
    """
    whole = _add(fitted, choosing)
    means, means_of_fitted = _means(whole), _means(fitted)

    def matrix(kind: str, i: int) -> np.ndarray:
        xx, xy, _ = _centred(fitted, means_of_fitted, wanted, kind, i)
        other_xx, other_xy, other_yy = _centred(choosing, means_of_fitted, wanted, kind, i)

        def error(penalty: float) -> float:
            w = _solve(xx, xy, penalty)
            return other_yy - 2 * np.sum(w * other_xy) + np.sum(w * (other_xx @ w))

        xx, xy, _, best = *_centred(whole, means, wanted, kind, i), min(penalties, key=error)
        return _solve(xx, xy, best)

    return means, {kind: [matrix(kind, i) for i in range(len(wanted))] for kind in fitted["y"]}


def errors(
    x_BxLxD: np.ndarray,
    values: Values,
    wanted: Sequence[Target],
    means: Mapping[str, np.ndarray],
    matrices: Mapping[str, Sequence[np.ndarray]],
) -> dict[str, np.ndarray]:
    """Sums over images of what `scores` needs: {kind: (targets, 4)}."""

    x_BxLxD, values = _float64((x_BxLxD, values))

    def of_target(target: Target, kind: str, matrix_DxZ: np.ndarray) -> list[float]:
        here, there = target.pairs
        x, y = x_BxLxD[:, here] - means["x"][here], values[kind][:, there] - means[kind][there]
        predicted = x @ matrix_DxZ
        norms = np.linalg.norm(predicted, axis=-1) * np.linalg.norm(y, axis=-1)
        cosine = np.sum(predicted * y, axis=-1) / np.maximum(norms, 1e-12)
        return [np.sum((y - predicted) ** 2), np.sum(y**2), cosine.sum(), cosine.size]

    return {
        kind: np.array(
            [of_target(t, kind, matrix) for t, matrix in zip(wanted, of_kind, strict=True)]
        )
        for kind, of_kind in matrices.items()
    }


def scores(found: Mapping[str, np.ndarray], wanted: Sequence[Target]) -> dict[str, dict[str, Any]]:
    """{kind: {'r2' and 'cosine': {target: value}}} of the sums of `errors`."""
    result = {}
    for kind, rows in found.items():
        squares, total, cosine, count = rows.T
        names = [target.name for target in wanted]
        explained = 1 - squares / np.where(total > 0, total, np.inf)
        measured = {"r2": np.where(total > 0, explained, 0), "cosine": cosine / count}
        result[kind] = {
            measure: dict(zip(names, map(float, value), strict=True))
            for measure, value in measured.items()
        }
    return result


def by_block(
    config: GeneratorConfig,
    params: Any,
    train: tuple[np.ndarray, Values],
    test: tuple[np.ndarray, Values],
) -> dict[str, dict[str, Any]]:
    """Measures of the regressions on the states of each block.

    Args:
        config, params: of the generator, which must have a null class.
        train, test: codes (N, L), and {kind: float values (N, L, Z) at each grid position}.

    Returns:
        {block, from "0": {kind: {'r2': {target: share of the test images' variance that is explained,
        over all numbers of the value}, 'cosine': {target: mean cosine of prediction and value, both
        without the training images' means}}}}.
    """
    wanted = targets(config.grid)
    codes_NxL, values = train
    chosen = np.arange(len(codes_NxL)) % _CHOOSING == _CHOOSING - 1

    def total(share: np.ndarray) -> list[dict[str, Any]]:
        some = {kind: v[share] for kind, v in values.items()}
        chunks = _chunks(config, params, codes_NxL[share], some)
        added = ([sums(x, v, wanted) for x in states] for states, v in chunks)
        return functools.reduce(_add, added)

    fits = [fit(*both, wanted) for both in zip(total(~chosen), total(chosen), strict=True)]
    found = functools.reduce(
        _add,
        (
            [errors(x, v, wanted, *of_block) for x, of_block in zip(states, fits, strict=True)]
            for states, v in _chunks(config, params, *test)
        ),
    )
    return {str(block): scores(sums_, wanted) for block, sums_ in enumerate(found)}
