"""How the tokenizer of `mirai_jax.tokenize` learns: one update, a pure function of state and batch.

It is LlamaGen's training of its VQ tokenizer (vq_train.py): a step of the autoencoder, then one of the
discriminator, which sees the reconstructions of before the update. Until `discriminator_start` the
discriminator has weight 0 in both; its running statistics and the step counter of its Adam move all
the same.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax.sharding import Sharding

from mirai_jax.models.discriminator import PatchDiscriminator
from mirai_jax.models.tokenizer import to_uint8, to_unit
from mirai_jax.models.vq import Autoencoded, VQConfig, VQModel, unit
from mirai_jax.optimizer import OptimizerConfig, make_optimizer
from mirai_jax.tokenizing import losses

TRAINED = ("all", "decoder")
INITS = ("official", "identity")
_DECODER = ("decoder", "post_quant_conv")
_NEVER = -(2**30)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything about training that is fixed while it runs (hashable: static to jit).

    Attributes:
        network: the tokenizer's shapes.
        optimizer: of the tokenizer and, with a state each, of the discriminator.
        image_size: (height, width) in pixels.
        dtype: of the convolutions.
        ema_decay: of the average of the tokenizer's weights.
        trained: 'all', or 'decoder': codes stay those of the tokenizer that training began with.
        reconstruction, ..., lookup: see configs/tokenizer.py.
        usage_window: steps over which the metric `codebook_use` looks back.
    """

    network: VQConfig
    optimizer: OptimizerConfig
    image_size: tuple[int, int] = (256, 256)
    dtype: str = "float32"
    ema_decay: float = 0.9999
    trained: str = "all"
    reconstruction: str = "l2"
    reconstruction_weight: float = 1.0
    perceptual_weight: float = 0.0
    perceptual_stages: tuple[int, ...] = (1, 2, 3)
    lpips: bool = False
    commit_weight: float = 0.25
    entropy_weight: float = 0.0
    adversarial: str = "hinge"
    discriminator_weight: float = 0.5
    discriminator_start: int = 20_000
    discriminator_width: int = 64
    discriminator_layers: int = 3
    adaptive: bool = False
    restart_after: int = 0
    free_steps: int = 0
    init: str = "official"
    lookup: str = "straight"
    usage_window: int = 1

    @property
    def has_discriminator(self) -> bool:
        return self.discriminator_weight > 0

    @property
    def module(self) -> VQModel:
        return VQModel(self.network, self.dtype, lookup=self.lookup)

    @property
    def discriminator(self) -> nn.Module:
        return PatchDiscriminator(self.discriminator_width, self.discriminator_layers, self.dtype)


class TokenizerState(flax.struct.PyTreeNode):
    """What a checkpoint holds."""

    step: jax.Array  # int32 scalar: updates done
    params: Any  # of the VQModel
    ema: Any
    opt_state: Any
    discriminator: Any  # {'params', 'batch_stats'}, or {} where the recipe has none
    discriminator_opt_state: Any
    last_used_V: jax.Array  # int32: the step (from 1) at which each code was used last
    key: jax.Array  # typed PRNG key, constant through a run


def init_state(recipe: Recipe, key: jax.Array, params: Any = None) -> TokenizerState:
    """The state before step 0, of fresh parameters or of `params`."""
    init_key, disc_key, run_key = jax.random.split(key, 3)
    images = jnp.zeros((1, *recipe.image_size, recipe.network.channels))
    if params is None:
        params = _fresh(recipe, recipe.module.init(init_key, images)["params"], init_key)
    optimizer, disc, disc_opt_state = make_optimizer(recipe.optimizer), {}, {}
    if recipe.has_discriminator:
        disc = recipe.discriminator.init(disc_key, images)
        disc_opt_state = optimizer.init(disc["params"])
    return TokenizerState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        discriminator=disc,
        discriminator_opt_state=disc_opt_state,
        last_used_V=jnp.full(recipe.network.vocab_size, _NEVER, jnp.int32),
        key=run_key,
    )


def _fresh(recipe: Recipe, params: Any, key: jax.Array) -> Any:
    """Rows of the codebook of unit norm, and kernels and biases as `recipe.init` says.

    'official': as PyTorch makes them, uniform within 1 / sqrt(inputs of a kernel). 'identity': as Flax
    makes `params`, with zeros in the last convolution of each block.
    """
    flat, alike = traverse_util.flatten_dict(params), collections.defaultdict(list)
    for i, (path, old) in enumerate(sorted(flat.items())):
        kernel = flat.get((*path[:-1], "kernel"))
        if path[-1] == "embedding":
            alike[old.shape].append((path, i, 1.0))
        elif kernel is not None and recipe.init == "official":
            most = 1 / math.sqrt(math.prod(kernel.shape[:-1]))
            alike[old.shape].append((path, i, most))
        elif path[-2] in ("conv2", "proj_out"):
            flat[path] = jnp.zeros_like(old)
    # Arrays of one shape at once: a program with a generator for each takes minutes to compile.
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(flat)))
    for shape, several in alike.items():
        paths, numbers, most = zip(*several, strict=True)
        draw = lambda key, most: jax.random.uniform(key, shape, minval=-most, maxval=most)  # noqa: B023 (at once)
        drawn = jax.vmap(draw)(keys[jnp.array(numbers)], jnp.array(most))
        flat |= {
            p: unit(x) if p[-1] == "embedding" else x for p, x in zip(paths, drawn, strict=True)
        }
    return traverse_util.unflatten_dict(flat)


Parts = dict[str, jax.Array]  # scalars by the name of their metric


def _image_loss(
    recipe: Recipe, perceptual: Any, images: jax.Array, made: jax.Array
) -> tuple[jax.Array, Parts]:
    """The weighted sum of what compares images, and its parts without weights."""
    parts = {"reconstruction_loss": losses.reconstruction(recipe.reconstruction, images, made)}
    total = recipe.reconstruction_weight * parts["reconstruction_loss"]
    if recipe.perceptual_weight:
        if recipe.lpips:
            found = losses.lpips(perceptual, images, made)
        else:
            found = losses.perceptual(perceptual, recipe.perceptual_stages, images, made)
        parts["perceptual_loss"] = found
        total += recipe.perceptual_weight * parts["perceptual_loss"]
    return total, parts


def _discriminate(recipe: Recipe, variables: Any, images: jax.Array) -> tuple[jax.Array, Any]:
    """Logits, and the variables with the running statistics after these images."""
    logits, changed = recipe.discriminator.apply(variables, images, mutable=["batch_stats"])
    return logits, {**variables, **changed}


def _adaptive_weight(
    recipe: Recipe, params: Any, images: jax.Array, free: Any, of_images: Any, adversarial: Any
) -> jax.Array:
    """The ratio of the two losses' gradients at the decoder's last kernel (VQGAN, arXiv 2012.09841).

    XLA merges the forward pass here with that of the step.
    """
    flat = traverse_util.flatten_dict(params)
    last = ("decoder", "conv_out", "kernel")

    def both(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        changed = traverse_util.unflatten_dict({**flat, last: kernel})
        made = recipe.module.apply({"params": changed}, images, free, method="autoencode").images
        return of_images(made), adversarial(made)

    _, pull = jax.vjp(both, flat[last])
    one, zero = jnp.ones(()), jnp.zeros(())
    of_image, of_adversary = (jnp.linalg.norm(pull(w)[0]) for w in ((one, zero), (zero, one)))
    return jnp.clip(of_image / (of_adversary + 1e-4), 0, 1e4)


def _tokenizer_loss(
    params: Any,
    recipe: Recipe,
    discriminator: Any,
    perceptual: Any,
    images: jax.Array,
    weight: jax.Array,
    free: jax.Array | bool = False,
) -> tuple[jax.Array, tuple[Autoencoded, Parts, Any]]:
    """The loss of a batch, what it was computed from, and the discriminator's variables after it.

    `free`: latents are decoded as they are.
    """
    found = recipe.module.apply({"params": params}, images, free, method="autoencode")
    total, parts = _image_loss(recipe, perceptual, images, found.images)
    parts["codebook_loss"], commit = losses.codebook(found)
    parts["commit_loss"] = recipe.commit_weight * commit
    total += parts["codebook_loss"] + parts["commit_loss"]
    if recipe.entropy_weight:
        rows = unit(params["quantize"]["embedding"])
        parts["entropy_loss"] = recipe.entropy_weight * losses.entropy(found.latents, rows)
        total += parts["entropy_loss"]
    if recipe.has_discriminator:

        def adversarial(made: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            logits, after = _discriminate(recipe, discriminator, made)
            return losses.of_generator(recipe.adversarial, logits), (logits.mean(), after)

        parts["adversarial_loss"], (logits, after) = adversarial(found.images)
        parts["logits_fake_tokenizer"] = logits
        if recipe.adaptive:
            weight *= jax.lax.stop_gradient(
                _adaptive_weight(
                    recipe, params, images, free,
                    lambda made: _image_loss(recipe, perceptual, images, made)[0],
                    lambda made: adversarial(made)[0],
                )
            )  # fmt: skip
        total += weight * parts["adversarial_loss"]
        discriminator = after
    return total, (found, parts, discriminator)


def _discriminator_loss(
    params: Any, recipe: Recipe, variables: Any, images: jax.Array, made: jax.Array, weight: Any
) -> tuple[jax.Array, tuple[Any, Parts]]:
    real, variables = _discriminate(recipe, {**variables, "params": params}, images)
    fake, variables = _discriminate(recipe, variables, made)
    loss = losses.of_discriminator(recipe.adversarial, real, fake)
    parts = {
        "discriminator_loss": loss,
        "logits_real": real.mean(),
        "logits_fake": fake.mean(),
    }
    return weight * loss, (variables, parts)


def _in_decoder(tree: Any) -> Any:
    """The tree with zeros for everything that shapes the codes."""
    return {k: v if k in _DECODER else jax.tree.map(jnp.zeros_like, v) for k, v in tree.items()}


def _restarted(
    recipe: Recipe, trees: tuple, last_used_V: jax.Array, latents: jax.Array, step, key
) -> tuple:
    """The trees, every `restart_after` steps with latents of this batch as rows in place of those that
    were not used since the last time."""
    latents = latents.reshape(-1, latents.shape[-1])
    chosen = jax.random.randint(jax.random.fold_in(key, step), last_used_V.shape, 0, len(latents))
    due = step % recipe.restart_after == 0
    dead_Vx1 = (due & (step - last_used_V >= recipe.restart_after))[:, None]

    def one(tree: Any) -> Any:
        rows = jnp.where(dead_Vx1, latents[chosen], tree["quantize"]["embedding"])
        return {**tree, "quantize": {"embedding": rows}}

    return tuple(map(one, trees))


def perplexity(codes: jax.Array, vocab_size: int) -> jax.Array:
    """exp of the entropy of the codes' frequencies: V where all of them are equally frequent."""
    p = jnp.zeros(vocab_size).at[codes.reshape(-1)].add(1 / codes.size)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(p, p)))


def psnr(images: jax.Array, made: jax.Array) -> jax.Array:
    """Of each image in [-1, 1] (B,), in dB; `made` is clipped."""
    error = jnp.mean(jnp.square(images - jnp.clip(made, -1, 1)), axis=(1, 2, 3))
    return 10 * jnp.log10(4 / jnp.maximum(error, 1e-10))


def train_step(
    recipe: Recipe, state: TokenizerState, perceptual: Any, batch: Mapping[str, jax.Array]
) -> tuple[TokenizerState, Parts]:
    """One update of the tokenizer and one of the discriminator.

    Args:
        recipe: what is computed.
        state: the state after some number of updates.
        perceptual: parameters of EfficientNetLite0 or Lpips, or {} with perceptual_weight 0.
        batch: 'image', uint8 or float32 in [-1, 1] (B, H, W, C).

    Returns:
        The next state, and scalars: `loss` and `grad_norm` of the tokenizer (before clipping) and the
        parts of the loss (commit_loss and entropy_loss carry their weights, as officially, the others
        do not), `psnr` in dB, `codebook_use` (the share of codes used in the last `usage_window`
        steps) and `perplexity` of the batch; of a discriminator its loss without weight, the
        gradient norm with it, and mean logits.
    """
    images, step = batch["image"], state.step + 1
    if images.dtype == jnp.uint8:
        images = to_unit(images)
    weight = jnp.where(step >= recipe.discriminator_start, recipe.discriminator_weight, 0.0)
    free = step <= recipe.free_steps if recipe.free_steps else False
    optimizer, disc = make_optimizer(recipe.optimizer), state.discriminator
    (loss, (found, parts, after)), gradient = jax.value_and_grad(_tokenizer_loss, has_aux=True)(
        state.params, recipe, disc, perceptual, images, weight, free
    )
    if recipe.trained == "decoder":
        gradient = _in_decoder(gradient)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradient), **parts}
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    if recipe.trained == "decoder":
        updates = _in_decoder(updates)  # weight decay is one too
    params = optax.apply_updates(state.params, updates)
    # In this form what does not move stays the same to the bit: codes of a frozen encoder.
    new_share = 1 - recipe.ema_decay
    ema = jax.tree.map(lambda old, new: old + new_share * (new - old), state.ema, params)

    if recipe.has_discriminator:
        gradient, (after, parts) = jax.grad(_discriminator_loss, has_aux=True)(
            disc["params"], recipe, after, images, jax.lax.stop_gradient(found.images), weight
        )
        metrics |= parts | {"discriminator_grad_norm": optax.tree.norm(gradient)}
        updates, disc_opt_state = optimizer.update(
            gradient, state.discriminator_opt_state, disc["params"]
        )
        disc = {**after, "params": optax.apply_updates(disc["params"], updates)}
        state = state.replace(discriminator=disc, discriminator_opt_state=disc_opt_state)

    # While latents are free no code counts as used: all of them are restarted, and follow the latents.
    used = jnp.where(free, _NEVER, step)
    last_used_V = state.last_used_V.at[found.codes.reshape(-1)].set(used)
    if recipe.restart_after:
        trees = params, ema
        params, ema = _restarted(recipe, trees, last_used_V, found.latents, step, state.key)
    metrics["psnr"] = psnr(images, found.images).mean()
    metrics["codebook_use"] = jnp.mean(step - last_used_V < recipe.usage_window)
    metrics["perplexity"] = perplexity(found.codes, recipe.network.vocab_size)
    made = state.replace(
        step=step, params=params, ema=ema, opt_state=opt_state, last_used_V=last_used_V
    )
    return made, metrics


def make_train_step(recipe: Recipe, replicated: Sharding, split: Sharding):
    """`(state, perceptual, batch) -> (state, metrics)`, jitted; the state is donated.

    `replicated` and `split` say where the state and the batch lie.
    """
    return jax.jit(
        functools.partial(train_step, recipe),
        donate_argnums=0,
        in_shardings=(replicated, replicated, split),
        out_shardings=(replicated, replicated),
    )


def make_reconstruct(recipe: Recipe, replicated: Sharding, split: Sharding):
    """`(params, batch) -> (images, codes)`, jitted: uint8 as the batch's 'image', int32 (B, L)."""

    @functools.partial(jax.jit, in_shardings=(replicated, split), out_shardings=replicated)
    def reconstruct(params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        images = to_unit(batch["image"])
        found = recipe.module.apply({"params": params}, images, method="autoencode")
        return to_uint8(found.images), found.codes.reshape(len(images), -1)

    return reconstruct
