"""The optimizer's own part: the global clip, beside optax's."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mirai_jax.optimizer import OptimizerConfig, make_optimizer


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
