"""Linear probes: the class that a linear classifier reads in the generator's states, by block and
position.

The generator runs unconditionally (the null class), so it knows an image's class only from the tokens
so far. Foresight should make the class readable in earlier blocks, after fewer tokens.
"""

import functools
from typing import Any

import jax
import numpy as np

from mirai_jax.models import batched
from mirai_jax.models.generator import GeneratorConfig, read_states

QUARTERS = (1, 2, 3, 4)  # of the tokens, after which the states are probed


def positions(config: GeneratorConfig) -> list[int]:
    """The sequence position that has consumed each of QUARTERS; the last token is only predicted."""
    return [min(config.length * quarter // 4, config.length - 1) for quarter in QUARTERS]


@functools.partial(jax.jit, static_argnums=0)
def _states(config: GeneratorConfig, params: Any, codes_BxL: jax.Array) -> dict[int, jax.Array]:
    labels = np.full(len(codes_BxL), config.null_class)
    _, states = read_states(config, params, codes_BxL, labels, range(1, config.num_layers + 1))
    return {layer: state[:, np.array(positions(config))] for layer, state in states.items()}


def states(
    config: GeneratorConfig, params: Any, codes_NxL: np.ndarray, chunk: int = 250
) -> dict[int, np.ndarray]:
    """{block: float32 (N, 4, D)}: the residual stream after each block at `positions`, eval mode."""
    return batched.in_chunks(_states, config, params, codes_NxL, chunk)


def accuracy(
    train_NxD: np.ndarray, train_labels: np.ndarray, test_MxD: np.ndarray, test_labels: np.ndarray
) -> float:
    """Share of the test rows that a logistic regression on the train rows classifies correctly.

    With a single class in the train rows, this is the share of the test rows of that class.
    """
    from sklearn.linear_model import LogisticRegression  # here: slow to import
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    if (train_labels == train_labels[0]).all():
        return float(np.mean(test_labels == train_labels[0]))
    # Converged enough for a score: the last digits of the weights would take as long again.
    regression = LogisticRegression(C=0.01, tol=1e-3, max_iter=1000)
    with threadpool_limits(1):  # faster for small matrices, and the same on any machine
        probe = make_pipeline(StandardScaler(), regression).fit(train_NxD, train_labels)
        return float(probe.score(test_MxD, test_labels))


def by_layer(
    config: GeneratorConfig,
    params: Any,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
) -> dict[str, list[float]]:
    """Accuracy of a probe of each block's states after each of QUARTERS.

    Args:
        config, params: of the generator, which must have a null class.
        train, test: codes (N, L) and labels (N,).

    Returns:
        {block, from "1": one accuracy a quarter}.
    """
    (train_codes, train_labels), (test_codes, test_labels) = train, test
    fitted, measured = (states(config, params, codes) for codes in (train_codes, test_codes))
    return {
        str(layer): [
            accuracy(fitted[layer][:, i], train_labels, measured[layer][:, i], test_labels)
            for i in range(len(QUARTERS))
        ]
        for layer in sorted(fitted)
    }
