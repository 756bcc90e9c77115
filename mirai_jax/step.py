"""The train step: student, teachers, losses, update and EMA, in one jit over a mesh.

The baseline and every variant share one step: LlamaGen has no foresight terms, and terms differ by
their source and fields (`foresight.Term`).

    x         = codes[:, :-1]                            the last token is only predicted
    student   = generator(params, x, dropout)            logits, and states at the tapped layers
    teacher   = EMA before this step | frozen encoder of the image | frozen generator
    loss      = cross-entropy + sum over terms, heads of  weight * multiplier(step) * head loss
    params    = AdamW(clip(gradient)),   ema = decay * ema + (1 - decay) * params

Gradients never reach a teacher. Random draws come from `fold_in(key, step)`: a step is a pure
function of the state and the batch.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from mirai_jax import foresight
from mirai_jax.models import adapters
from mirai_jax.models import generator as generator_lib
from mirai_jax.models import tokenizer as tokenizer_lib
from mirai_jax.models.activation_sharding import shard_activation
from mirai_jax.models.generator import Generator, GeneratorConfig
from mirai_jax.models.teacher import with_precision
from mirai_jax.optimizer import OptimizerConfig, learning_rate, make_optimizer, overlay, trained
from mirai_jax.sharding import whole_products

# label (B,) int; codes (B, L) int, unless the step makes them; for a bidirectional teacher image
# (B, H, W, C) uint8, or features (B, L, Z) computed before training.
Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is fixed while a run trains (hashable: static to jit).

    Attributes:
        generator: shapes of the student and of its EMA.
        terms: the foresight terms; () is the LlamaGen baseline.
        optimizer: AdamW and its schedule.
        ema_decay: of the generator's parameters, from step 0. Projectors have no EMA, since
            nothing would read it.
        steps_per_epoch: whole batches in an epoch, the unit of the terms' schedules.
        teacher: the bidirectional encoder, image -> (B, L, Z), with a field `feature_width` (Z).
        teacher_dtype: of the matrix products of generators that teach (see `precision`); float32
            officially, where teachers run outside autocast.
        pretrained_configs: (term name, GeneratorConfig) of the pretrained generators of `checkpoint` terms.
        tokenizer: makes the codes of a batch from its images; None: batches hold codes.
        accumulate: parts of a batch that are computed one after the other, to save memory; the
            update is that of the whole batch, with other draws of dropout.
        skip_nonfinite: skip an update whose loss or gradient is not finite, and count it.
        freeze: patterns of the names of parameters that are not trained; see `optimizer.trained`.
        lora: low-rank adapters, which are trained in place of the weights that they adapt.
    """

    generator: GeneratorConfig
    terms: tuple[foresight.Term, ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float = 0.9999
    steps_per_epoch: int = 1
    teacher: nn.Module | None = None
    teacher_dtype: str = "float32"
    pretrained_configs: tuple[tuple[str, GeneratorConfig], ...] = ()
    tokenizer: nn.Module | None = None
    accumulate: int = 1
    skip_nonfinite: bool = False
    freeze: tuple[str, ...] = ()
    lora: adapters.LoraConfig = adapters.LoraConfig()

    @property
    def frozen(self) -> tuple[str, ...]:
        """Patterns of all parameters that are not trained."""
        return (*self.freeze, *(adapters.BASE if self.lora.rank else ()))


def taps(terms: tuple[foresight.Term, ...], active: tuple[bool, ...]) -> tuple[int, ...]:
    """The student layers that active terms read, ascending."""
    pairs = zip(terms, active, strict=True)
    return tuple(sorted({term.student_layer for term, is_active in pairs if is_active}))


class TrainState(flax.struct.PyTreeNode):
    """What a checkpoint holds. `params` is {'generator': ..., 'foresight': {term name: ...}}."""

    step: jax.Array  # int32 scalar: batches so far
    skipped: jax.Array  # int32 scalar: batches whose update was skipped (`Recipe.skip_nonfinite`)
    params: Any
    ema: Any  # of what is trained of params['generator']; see `ema_params`
    opt_state: Any  # of what is trained of params
    key: jax.Array  # typed PRNG key, constant through a run


def target_width(recipe: Recipe, term: foresight.Term) -> int:
    """Width of the outputs of the term's heads."""
    if term.level == "output":
        return recipe.generator.vocab_size
    if term.source == "bidirectional":
        return recipe.teacher.feature_width
    if term.source == "checkpoint":
        return dict(recipe.pretrained_configs)[term.name].width
    return recipe.generator.width


def init_params(recipe: Recipe, key: jax.Array) -> Any:
    """Fresh parameters. Those of the generator do not depend on the terms: variants start alike."""
    width = recipe.generator.width
    projectors = {
        term.name: foresight.init_heads(
            term, target_width(recipe, term), width, jax.random.fold_in(key, i), recipe.generator
        )
        for i, term in enumerate(recipe.terms, start=1)
    }
    generator_key = jax.random.fold_in(key, 0)
    generator = generator_lib.init_params(recipe.generator, generator_key)
    if recipe.lora.rank:
        generator = adapters.add(generator, recipe.lora, jax.random.fold_in(generator_key, 1))
    return {"generator": generator, "foresight": projectors}


def init_state(recipe: Recipe, key: jax.Array, params: Any | None = None) -> TrainState:
    """The state before step 0; the EMA starts as a copy of the generator."""
    init_key, run_key = jax.random.split(key)
    params = init_params(recipe, init_key) if params is None else params
    learned = trained(params, recipe.frozen)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, learned["generator"]),  # a copy: both are donated
        opt_state=make_optimizer(recipe.optimizer).init(learned),
        key=run_key,
    )


def ema_params(state: TrainState) -> Any:
    """The average of the generator's parameters: what is not trained is its own average."""
    return overlay(state.params["generator"], state.ema)


def teacher_targets(
    recipe: Recipe, ema: Any, teacher_params: Any, batch: Batch, terms: tuple[foresight.Term, ...]
) -> dict[str, jax.Array]:
    """Targets (B, L, Z) of the internal terms by name; terms that share targets compute them once."""

    def target(term: foresight.Term) -> jax.Array:
        if term.source == "bidirectional" and "features" in batch:
            return batch["features"]  # computed before training
        if term.source == "bidirectional":
            return recipe.teacher.apply({"params": teacher_params["bidirectional"]}, batch["image"])
        if term.source == "checkpoint":
            config, params = dict(recipe.pretrained_configs)[term.name], teacher_params[term.name]
        elif term.source == "ema":
            config, params = recipe.generator, adapters.scaled(ema, recipe.lora)
        else:
            raise ValueError(f"the step has no targets for the source {term.source!r}")

        def states(dtype, params, codes, labels):
            in_dtype = dataclasses.replace(config, dtype=dtype)
            return generator_lib.hidden_states(in_dtype, params, codes, labels, term.teacher_layer)

        arguments = params, batch["codes"][:, :-1], batch["label"]
        # As the official run, which allows TF32: a TPU's default for float32 is one bfloat16 pass.
        with jax.default_matmul_precision("tensorfloat32"):
            return with_precision(recipe.teacher_dtype, states, *arguments)

    targets, made = {}, {}
    for term in terms:
        if term.level == "output":
            continue  # its targets are the tokens
        same = (
            term.source,
            term.teacher_layer if term.source in foresight.GENERATORS else 0,
            term.name if term.source == "checkpoint" else "",
        )
        if same not in made:
            made[same] = jax.lax.stop_gradient(target(term))
        targets[term.name] = made[same]
    return targets


def loss_fn(
    params: Any,
    recipe: Recipe,
    targets: Mapping[str, jax.Array],
    batch: Batch,
    step: jax.Array,
    active: tuple[bool, ...],
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The total loss and its parts.

    Args:
        params: {'generator', 'foresight'}.
        recipe: static.
        targets: those of the active internal terms, by name.
        batch: codes and labels.
        step: int32, from which the schedule gives the weights.
        active: which terms take part; the others report 0.
        dropout_key: None evaluates without dropout and without dropping labels.

    Returns:
        The total in nats, and float32 scalars: loss, cross_entropy and the unweighted loss of each
        foresight head.
    """
    codes = batch["codes"]
    logits, states = Generator(recipe.generator, taps=taps(recipe.terms, active)).apply(
        {"params": adapters.scaled(params["generator"], recipe.lora)},
        codes[:, :-1],
        batch["label"],
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    cross_entropy = foresight.token_nll(logits, codes).mean()
    cross_entropy, states = jax.lax.optimization_barrier((cross_entropy, states))
    added, parts = foresight_loss(params["foresight"], recipe, states, targets, codes, step, active)
    total = cross_entropy + added
    return total, {"loss": total, "cross_entropy": cross_entropy, **parts}


def foresight_loss(
    params: Any,
    recipe: Recipe,
    states: Mapping[int, jax.Array],
    targets: Mapping[str, jax.Array],
    codes_BxL: jax.Array,
    step: jax.Array,
    active: tuple[bool, ...],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What the terms add to the loss, and the unweighted loss of each head.

    Args:
        params: of the terms' heads, by name.
        recipe: static.
        states: of the student, (B, L, D) float32 by tapped layer.
        targets, step, active: see `loss_fn`.
        codes_BxL: the tokens.
    """
    grid = recipe.generator.grid
    total, parts = jnp.zeros(()), {}
    for term, is_active in zip(recipe.terms, active, strict=True):
        if not is_active:
            parts.update({name: jnp.zeros(()) for name in term.metric_names})
            continue
        outputs = foresight.apply_heads(
            term,
            target_width(recipe, term),
            recipe.generator.dtype,
            params[term.name],
            states[term.student_layer],
            recipe.generator,
        )
        outputs = [shard_activation(out, "batch", None, None) for out in outputs]
        if term.level == "output":
            losses = foresight.prediction_losses(term, outputs, codes_BxL, grid)
        else:
            losses = foresight.alignment_losses(term, outputs, targets[term.name], grid)
        multiplier = foresight.weight_multiplier(
            term, step, recipe.steps_per_epoch, recipe.optimizer.num_steps
        )
        total += multiplier * jnp.sum(jnp.asarray(term.head_weights) * losses)
        parts.update(zip(term.metric_names, losses, strict=True))
    return total, parts


def train_step(
    recipe: Recipe,
    state: TrainState,
    teacher_params: Any,
    batch: Batch,
    active: tuple[bool, ...],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update; pure, and unaware of devices.

    Args:
        recipe: static.
        state: the state before the update.
        teacher_params: the frozen parameters: {'bidirectional': ..., term name: ...}, and 'tokenizer'
            where the step makes the codes.
        batch: see `Batch`.
        active: static; `foresight.active_terms` of `state.step`. A term that has not started costs
            nothing: neither its teacher nor its heads run.

    Returns:
        The state after the update, and float32 scalars: those of `loss_fn`, grad_norm (before
        clipping), learning_rate, and with `recipe.skip_nonfinite` the updates skipped so far.
    """
    gradients, metrics = _gradients(recipe, state, teacher_params, batch, active)
    params, opt_state, ema = update(recipe, state, gradients)
    metrics["grad_norm"] = optax.tree.norm(gradients)
    # As the optimizer counts: a skipped update does not move the schedule.
    rate = learning_rate(recipe.optimizer)(state.step - state.skipped)
    metrics["learning_rate"] = jnp.asarray(rate)
    new = state.replace(params=params, ema=ema, opt_state=opt_state)
    if recipe.skip_nonfinite:
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        keep = lambda new, old: jnp.where(finite, new, old)
        new = new.replace(
            skipped=state.skipped + ~finite,
            params=jax.tree.map(keep, params, state.params),
            ema=jax.tree.map(keep, ema, state.ema),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        )
        metrics["skipped"] = new.skipped.astype(jnp.float32)
    return new.replace(step=state.step + 1), metrics


def update(recipe: Recipe, state: TrainState, gradients: Any) -> tuple[Any, Any, Any]:
    """The optimizer and the EMA: (params, opt_state, ema) after the step."""
    learned = trained(state.params, recipe.frozen)
    optimizer = make_optimizer(recipe.optimizer)
    updates, opt_state = optimizer.update(gradients, state.opt_state, learned)
    learned = optax.apply_updates(learned, updates)
    ema = optax.incremental_update(learned["generator"], state.ema, 1 - recipe.ema_decay)
    return overlay(state.params, learned), opt_state, ema


def _gradients(
    recipe: Recipe, state: TrainState, teacher_params: Any, batch: Batch, active: tuple[bool, ...]
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradients of what is trained, and metrics: means over `recipe.accumulate` parts of the batch."""
    terms = tuple(t for t, is_active in zip(recipe.terms, active, strict=True) if is_active)

    def of_part(batch: Batch, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        if recipe.tokenizer is not None:
            images = tokenizer_lib.to_unit(batch["image"])
            tokenizer_params = {"params": teacher_params["tokenizer"]}
            codes = recipe.tokenizer.apply(tokenizer_params, images, method="encode")
            batch = {**batch, "codes": codes}
        targets = teacher_targets(recipe, ema_params(state), teacher_params, batch, terms)
        # The student runs after its teachers: side by side they would take more memory, and on CPU
        # compete for its caches.
        batch, targets = jax.lax.optimization_barrier((batch, targets))

        def loss(learned: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            params = overlay(state.params, learned)
            return loss_fn(params, recipe, targets, batch, state.step, active, key)

        return jax.grad(loss, has_aux=True)(trained(state.params, recipe.frozen))

    key, count = jax.random.fold_in(state.key, state.step), recipe.accumulate
    if count == 1:
        return of_part(batch, key)
    # Part m is every count-th row from m on, so that each device already holds its rows.
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total: Any, inputs: tuple) -> tuple[Any, None]:
        part, number = inputs
        return jax.tree.map(jnp.add, total, of_part(part, jax.random.fold_in(key, number))), None

    first = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    total, _ = jax.lax.scan(add, zeros, (parts, jnp.arange(count)))
    return jax.tree.map(lambda x: x / count, total)


def jit_train_step(recipe: Recipe, state_sharding: Any = None, batch_sharding: Any = None):
    """`train_step` as one program: `(state, teacher_params, batch, active) -> (state, metrics)`.

    The state is donated, `active` is static. Shardings are pytrees (or prefixes) of NamedSharding;
    metrics are replicated. Trace it under `jax.set_mesh` of their mesh.
    """

    @functools.partial(
        jax.jit,
        static_argnums=3,
        donate_argnums=0,
        in_shardings=(state_sharding, None, batch_sharding),
        out_shardings=(state_sharding, None),
        compiler_options=None if recipe.generator.is_loop else whole_products(batch_sharding),
    )
    def jitted(state, teacher_params, batch, active):
        return train_step(recipe, state, teacher_params, batch, active)

    return jitted
