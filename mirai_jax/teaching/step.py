"""How the encoder of `mirai_jax.teach` learns: objectives, augmentation, and one jitted step.

    labels   a linear classifier of the patch features, averaged over the patches: each of them must
             say something of the whole image
    masked   no labels: some patches are hidden behind the mask token, and a linear head predicts the
             code of each from its feature (BEiT, arXiv 2106.08254, with this project's codebook)
    both     the sum of the two losses; the labels are asked of the whole image

Randomness is `fold_in(key, step)`: a step is a pure function of the state and the batch.
"""

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
from jax.sharding import Sharding

from mirai_jax.models import tokenizer as tokenizer_lib
from mirai_jax.models.teacher import prepare_images
from mirai_jax.models.vit import DEVIATION, VisionTransformer, VitConfig
from mirai_jax.optimizer import OptimizerConfig, make_optimizer

OBJECTIVES = ("labels", "masked", "both")
_INIT = nn.initializers.normal(DEVIATION)
_POSITIONS = 0.5  # deviation of the fresh position embedding: a patch's own embedding has about 2


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything about training that is fixed while it runs (hashable: static to jit).

    Attributes:
        network: the encoder's shapes; its `pos_grid` is the token grid.
        objective: one of OBJECTIVES.
        num_classes: of the labels.
        tokenizer: gives the codes of patches; None where nothing is masked.
        optimizer: AdamW and its schedule.
        dtype: of the encoder's matrix products.
        label_smoothing, masked_share, shift, flip: see configs/teacher.py.
    """

    network: VitConfig
    objective: str
    num_classes: int
    tokenizer: tokenizer_lib.PatchCodebook | None
    optimizer: OptimizerConfig
    dtype: str = "float32"
    label_smoothing: float = 0.0
    masked_share: float = 0.4
    shift: int = 0
    flip: bool = False

    @property
    def learns_labels(self) -> bool:
        return self.objective != "masked"

    @property
    def learns_masked(self) -> bool:
        return self.objective != "labels"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of what the encoder is shown."""
        height, width = self.network.pos_grid
        return height * self.network.patch, width * self.network.patch


class Learner(nn.Module):
    """The encoder ('network' among the parameters) and its linear heads, which only training needs."""

    recipe: Recipe

    def setup(self) -> None:
        recipe = self.recipe
        self.network = VisionTransformer(recipe.network, recipe.dtype)
        if recipe.learns_labels:
            self.classifier = nn.Dense(recipe.num_classes, kernel_init=_INIT)
        if recipe.learns_masked:
            self.predictor = nn.Dense(recipe.tokenizer.vocab_size, kernel_init=_INIT)

    def classify(self, images_BxHxWx3: jax.Array) -> jax.Array:
        """Logits of the classes (B, classes)."""
        features_BxhxwxD, _ = self.network(images_BxHxWx3)
        return self.classifier(features_BxhxwxD.mean(axis=(1, 2)))

    def predict(self, images_BxHxWx3: jax.Array, masked_Bxhxw: jax.Array) -> jax.Array:
        """Logits of every patch's code (B, h, w, V), the masked ones hidden."""
        features_BxhxwxD, _ = self.network(images_BxHxWx3, masked_Bxhxw=masked_Bxhxw)
        return self.predictor(features_BxhxwxD)

    def __call__(self, images_BxHxWx3: jax.Array) -> None:
        """Makes all parameters."""
        if self.recipe.learns_labels:
            self.classify(images_BxHxWx3)
        if self.recipe.learns_masked:
            self.predict(images_BxHxWx3, jnp.zeros((1, *self.recipe.network.pos_grid), bool))


class TeachState(flax.struct.PyTreeNode):
    """What a checkpoint holds. `params` is {'network': ..., and its heads}."""

    step: jax.Array  # int32 scalar: updates done
    params: Any
    opt_state: Any
    key: jax.Array  # typed PRNG key, constant through a run


def _rescaled(network: Any) -> Any:
    """Fresh parameters of a VisionTransformer for a narrow network and a short run.

    DINOv2's deviation, the same everywhere, makes small steps of both. Here each product keeps the
    size of what goes into it, and attention can distinguish places from the start.
    """

    def one(path: tuple, x: jax.Array) -> jax.Array:
        if path[-1].key == "pos_embed":
            return x * (_POSITIONS / DEVIATION)
        if path[-1].key != "kernel":
            return x
        stacked = x.shape[0] if path[0].key == "blocks" else 1
        return x / (DEVIATION * math.sqrt(math.prod(x.shape[:-1]) / stacked))

    return jax.tree_util.tree_map_with_path(one, network)


def init_state(recipe: Recipe, key: jax.Array) -> TeachState:
    """The state before step 0."""
    init_key, run_key = jax.random.split(key)
    params = Learner(recipe).init(init_key, jnp.zeros((1, *recipe.size, 3)))["params"]
    params["network"] = _rescaled(params["network"])
    return TeachState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=make_optimizer(recipe.optimizer).init(params),
        key=run_key,
    )


def augment(key: jax.Array, images_BxHxWxC: jax.Array, shift: int, flip: bool) -> jax.Array:
    """Each image moved by up to `shift` pixels, and half of them mirrored if `flip`."""
    shift_key, flip_key = jax.random.split(key)
    images, shape = images_BxHxWxC, images_BxHxWxC.shape
    if shift:
        padded = jnp.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
        corners_Bx2 = jax.random.randint(shift_key, (shape[0], 2), 0, 2 * shift + 1)
        cut = lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), shape[1:])  # noqa: E731
        images = jax.vmap(cut)(padded, corners_Bx2)
    if flip:
        flipped_B = jax.random.bernoulli(flip_key, shape=shape[:1])
        images = jnp.where(flipped_B[:, None, None, None], images[:, :, ::-1], images)
    return images


def draw_masks(key: jax.Array, batch: int, grid: tuple[int, int], share: float) -> jax.Array:
    """bool (batch, *grid): in each image equally many patches, at least one, are true."""
    length = grid[0] * grid[1]
    noise_BxL = jax.random.uniform(key, (batch, length))
    rank_BxL = noise_BxL.argsort(axis=1).argsort(axis=1)
    return (rank_BxL < max(1, round(share * length))).reshape(batch, *grid)


def scores(
    recipe: Recipe, params: Any, codebook: Any, batch: Mapping[str, jax.Array], key: jax.Array
) -> dict[str, jax.Array]:
    """What the encoder knows of each image, as it is.

    Args:
        recipe: says what is asked.
        params: of the Learner.
        codebook: of `recipe.tokenizer`, or {}.
        batch: 'image' uint8 (B, H, W, C) and 'label' int (B,).
        key: draws the masks.

    Returns:
        float32 (B,) each: 'labels_loss' and 'accuracy' (0 or 1), 'masked_loss' and
        'masked_accuracy' (the share of its hidden patches), in nats, as far as they are asked.
    """
    learner, images, found = Learner(recipe), batch["image"], {}
    shown = prepare_images(images, recipe.size)
    if recipe.learns_labels:
        logits = learner.apply({"params": params}, shown, method="classify")
        wanted = jax.nn.one_hot(batch["label"], recipe.num_classes)
        wanted = optax.smooth_labels(wanted, recipe.label_smoothing)
        found["labels_loss"] = optax.softmax_cross_entropy(logits, wanted)
        found["accuracy"] = (logits.argmax(axis=-1) == batch["label"]).astype(jnp.float32)
    if recipe.learns_masked:
        grid = recipe.network.pos_grid
        codes = recipe.tokenizer.apply(
            {"params": codebook}, tokenizer_lib.to_unit(images), method="encode"
        ).reshape(-1, *grid)
        masked = draw_masks(key, len(images), grid, recipe.masked_share)
        logits = learner.apply({"params": params}, shown, masked, method="predict")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, codes)
        found["masked_loss"] = losses.mean(axis=(1, 2), where=masked)
        right = (logits.argmax(axis=-1) == codes).astype(jnp.float32)
        found["masked_accuracy"] = right.mean(axis=(1, 2), where=masked)
    return found


def make_train_step(recipe: Recipe, replicated: Sharding, split: Sharding):
    """`(state, codebook, batch) -> (state, metrics)`, jitted; the state is donated.

    Metrics are means over the batch: those of `scores` on the augmented images, and 'loss' and
    'grad_norm'. `replicated` and `split` say where the state and the batch lie.
    """

    def loss_fn(params, codebook, batch, key):
        means = jax.tree.map(jnp.mean, scores(recipe, params, codebook, batch, key))
        loss = sum(value for name, value in means.items() if name.endswith("_loss"))
        return loss, {"loss": loss, **means}

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        in_shardings=(replicated, replicated, split),
        out_shardings=(replicated, replicated),
    )
    def step(state: TeachState, codebook: Any, batch: Mapping[str, jax.Array]):
        augment_key, mask_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        images = augment(augment_key, batch["image"], recipe.shift, recipe.flip)
        gradients, metrics = jax.grad(loss_fn, has_aux=True)(
            state.params, codebook, {**batch, "image": images}, mask_key
        )
        metrics["grad_norm"] = optax.tree.norm(gradients)
        updates, opt_state = make_optimizer(recipe.optimizer).update(
            gradients, state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


def make_measure(recipe: Recipe, replicated: Sharding, split: Sharding):
    """`(params, codebook, batch, key) -> sums`, jitted: `scores` summed with the batch's 'weight' (B,)."""

    @functools.partial(
        jax.jit,
        in_shardings=(replicated, replicated, split, replicated),
        out_shardings=replicated,
    )
    def measure(params: Any, codebook: Any, batch: Mapping[str, jax.Array], key: jax.Array):
        found = scores(recipe, params, codebook, batch, key)
        return jax.tree.map(lambda values: jnp.sum(values * batch["weight"]), found)

    return measure
