"""The optimizer's own parts: the global clip, beside optax's, and what weight decay acts on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mirai_jax.optimizer import DECAYED, OptimizerConfig, make_optimizer


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.2, 1.0, 1e3, np.inf, np.nan])
def test_clipping_is_optaxs(scale):
    rng = np.random.RandomState(0)
    gradients = {"kernel": jnp.asarray(scale * rng.normal(size=(3, 4)), jnp.float32)}
    ours, theirs = make_optimizer(OptimizerConfig()), optax.clip_by_global_norm(1.0)
    clipped, _ = theirs.update(gradients, theirs.init(gradients))
    plain = make_optimizer(OptimizerConfig(clip_norm=0.0))
    params = {"kernel": jnp.ones((3, 4))}
    got, _ = ours.update(gradients, ours.init(params), params)
    want, _ = plain.update(clipped, plain.init(params), params)
    np.testing.assert_allclose(got["kernel"], want["kernel"], rtol=1e-5)


@pytest.mark.parametrize("decayed", DECAYED)
def test_weight_decay_acts_on_matrices_or_on_all(decayed):
    """Without gradients, Adam itself leaves every parameter where it is."""
    ones = jnp.ones((2, 3))
    params = {"norm": {"scale": ones[0]}, "linear_0": {"kernel": ones, "bias": ones[0]}}
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, decayed=decayed)
    optimizer = make_optimizer(config)
    gradients = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    of_others = -0.05 if decayed == "all" else 0.0
    np.testing.assert_allclose(updates["linear_0"]["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates["linear_0"]["bias"], of_others, rtol=1e-6)
    np.testing.assert_allclose(updates["norm"]["scale"], of_others, rtol=1e-6)
