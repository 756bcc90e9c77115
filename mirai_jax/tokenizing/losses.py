"""The losses of tokenizer training, as scalars (official files: vq_loss.py and vq_model.py)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mirai_jax.models.efficientnet import EfficientNetLite0
from mirai_jax.models.lpips import Lpips
from mirai_jax.models.vq import Autoencoded

RECONSTRUCTION = ("l2", "l1")
ADVERSARIAL = ("hinge", "non_saturating")
_TEMPERATURE = 0.01  # of the entropy loss
_EPSILON = 1e-5  # inside its logarithm


def reconstruction(kind: str, images: jax.Array, reconstructed: jax.Array) -> jax.Array:
    """Mean squared ('l2') or absolute ('l1') difference of images in [-1, 1]."""
    difference = images - reconstructed
    return jnp.mean(jnp.square(difference) if kind == "l2" else jnp.abs(difference))


def codebook(found: Autoencoded) -> tuple[jax.Array, jax.Array]:
    """What draws rows to their latents, and (unweighted) what commits latents to their rows."""
    stop = jax.lax.stop_gradient
    to_latents = jnp.mean(jnp.square(found.rows - stop(found.latents)))
    return to_latents, jnp.mean(jnp.square(stop(found.rows) - found.latents))


def entropy(latents: jax.Array, rows_VxC: jax.Array) -> jax.Array:
    """Mean entropy of each latent's code less the entropy of the mean: low where latents are sure and
    all codes are used.

    The probabilities are a softmax of minus the squared distances over _TEMPERATURE. Takes
    B * L * V floats several times over.

    Args:
        latents: (..., C), and rows_VxC, both of unit norm.
    """
    latents = latents.reshape(-1, latents.shape[-1])
    square = jnp.sum(jnp.square(latents), axis=1, keepdims=True)
    product = jnp.matmul(latents, rows_VxC.T, precision=jax.lax.Precision.HIGHEST)
    distance = square + jnp.sum(jnp.square(rows_VxC), axis=1) - 2 * product
    log_p = jax.nn.log_softmax(-distance / _TEMPERATURE)
    p = jnp.exp(log_p)
    mean = p.mean(axis=0)
    of_each = -jnp.mean(jnp.sum(p * log_p, axis=1))
    return of_each + jnp.sum(mean * jnp.log(mean + _EPSILON))


def of_discriminator(kind: str, real: jax.Array, fake: jax.Array) -> jax.Array:
    """What the discriminator minimises, of its logits.

    The official 'non-saturating' loss swaps the arguments of the cross-entropy, so that fake images give
    no gradient; here it is the loss of the name. 'hinge' is the official one and the default there.
    """
    if kind == "hinge":
        real, fake = jax.nn.relu(1 - real), jax.nn.relu(1 + fake)
    else:
        real, fake = jax.nn.softplus(-real), jax.nn.softplus(fake)
    return 0.5 * (jnp.mean(real) + jnp.mean(fake))


def of_generator(kind: str, fake: jax.Array) -> jax.Array:
    """What the tokenizer minimises to pass for real, of the discriminator's logits."""
    return jnp.mean(-fake if kind == "hinge" else jax.nn.softplus(-fake))


def perceptual(
    params: Any, stages: Sequence[int], images: jax.Array, reconstructed: jax.Array
) -> jax.Array:
    """Mean squared distance of EfficientNet-Lite0's features, each of unit norm, summed over stages.

    LPIPS (arXiv 1801.03924) with this network and without its learned weights; images in [-1, 1], at
    their own size.

    Args:
        params: of EfficientNetLite0.
        stages: 1 to 7 each.
    """

    def features(x: jax.Array) -> list[jax.Array]:
        x = jnp.broadcast_to((x + 1) / 2, (*x.shape[:-1], 3))  # grey becomes RGB
        maps = (EfficientNetLite0().apply({"params": params}, x, stage=stage) for stage in stages)
        return [m * jax.lax.rsqrt(jnp.sum(m * m, axis=-1, keepdims=True) + 1e-6) for m in maps]

    pairs = zip(features(images), features(reconstructed), strict=True)
    return sum(jnp.mean(jnp.sum(jnp.square(one - other), axis=-1)) for one, other in pairs)


def lpips(params: Any, images: jax.Array, reconstructed: jax.Array) -> jax.Array:
    """Mean LPIPS distance of images in [-1, 1]; `params` of Lpips. (vq_train.py leaves its dropout on.)"""
    return jnp.mean(Lpips().apply({"params": params}, images, reconstructed))
