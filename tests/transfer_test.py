"""Fine-tuning: other classes and grids, frozen parameters, low-rank adapters."""

import dataclasses
import functools
import types

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from mirai_jax import foresight, optimizer, sharding, step
from mirai_jax.models import adapters
from mirai_jax.models.adapters import LoraConfig
from mirai_jax.models.generator import Generator, GeneratorConfig
from mirai_jax.training import components, transfer

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = GeneratorConfig(2, 2, 32, vocab_size=16, num_classes=3, grid=(3, 4))
E = foresight.Term(
    name="ema", start_epoch=0.0, schedule=(), student_layer=1, teacher_layer=1, projector_width=8
)
RECIPE = step.Recipe(
    CONFIG, (E,), optimizer.OptimizerConfig(learning_rate=1e-2, weight_decay=0.5), ema_decay=0.5,
    lora=LoraConfig(rank=2, alpha=6.0), freeze=("foresight/*/linear_1/*",),
)  # fmt: skip
BATCH = {
    "codes": np.random.RandomState(0).randint(0, 16, (8, 12)).astype(np.int32),
    "label": np.arange(8, dtype=np.int32) % 3,
}


def flat(tree):
    return traverse_util.flatten_dict(jax.tree.map(np.asarray, tree), sep="/")


@functools.cache
def initial(recipe, seed=0):
    return jax.device_get(jax.jit(step.init_params, static_argnums=0)(recipe, jax.random.key(seed)))


def state_of(recipe):
    """A state whose output head is not zero, which would hide the gradients of all else."""
    params = initial(recipe)
    kernel = np.random.RandomState(1).normal(0, 0.1, (32, 16)).astype(np.float32)
    params = {**params, "generator": {**params["generator"], "output": {"kernel": kernel}}}
    return jax.jit(functools.partial(step.init_state, recipe))(
        jax.random.key(0), jax.tree.map(jnp.asarray, params)
    )


@pytest.fixture(scope="module")
def trained():
    """The parameters before, and the state after three steps of Mirai-E with adapters."""
    state = state_of(RECIPE)
    before, train_step = flat(state.params), step.make_train_step(RECIPE)
    for i in range(3):
        state, _ = train_step(state, {}, BATCH, i)
    return before, state


def test_what_is_frozen_stays_bit_for_bit_and_has_neither_state_nor_average(trained):
    before, state = trained
    after = flat(state.params)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    heads = {f"foresight/ema/linear_{i}/{kind}" for i in (0, 2) for kind in ("kernel", "bias")}
    kernels = "attention/wqkv", "attention/wo", *(f"feed_forward/w{i}" for i in (1, 2, 3))
    pairs = {f"generator/layers/{name}/lora_{side}" for name in kernels for side in "ab"}
    learned = {"generator/cls_embedding/embedding", *pairs}
    assert moved == heads | learned
    assert {f"generator/{name}" for name in flat(state.ema)} == learned
    (adam,) = (part for part in jax.tree.leaves(
        state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu"))  # fmt: skip
    assert set(flat(adam.mu)) == set(flat(adam.nu)) == moved


def test_adapters_merged_are_the_adapters(trained):
    """For logits, gradients of the factors, and the states that teach."""
    _, state = trained
    params, labels = state.params["generator"], BATCH["label"]
    merged = adapters.merge(params, RECIPE.lora)
    assert jax.tree.map(np.shape, merged) == jax.tree.map(
        np.shape, initial(dataclasses.replace(RECIPE, lora=LoraConfig()))["generator"]
    )

    @jax.jit
    def logits(params):
        return Generator(CONFIG).apply({"params": params}, BATCH["codes"][:, :-1], labels)[0]

    apart = lambda params: logits(adapters.scaled(params, RECIPE.lora))
    assert np.abs(logits(merged) - logits(params)).max() > 1e-3
    np.testing.assert_allclose(apart(params), logits(merged), atol=1e-5)
    np.testing.assert_allclose(
        step.teacher_targets(RECIPE, params, {}, BATCH, (E,))["ema"],
        step.teacher_targets(
            dataclasses.replace(RECIPE, lora=LoraConfig()), merged, {}, BATCH, (E,)
        )["ema"],
        atol=1e-5,
    )
    weight = jnp.asarray(np.random.RandomState(2).normal(size=(8, 12, 16)), jnp.float32)
    loss = lambda of, params: (of(params) * weight).sum()
    factors = jax.grad(functools.partial(loss, apart))(params)["layers"]["attention"]["wo"]
    whole = jax.grad(functools.partial(loss, logits))(merged)["layers"]["attention"]["wo"]["kernel"]
    pair = params["layers"]["attention"]["wo"]
    for side, by in (("a", "nhdk,nrk->nhdr"), ("b", "nhdk,nhdr->nrk")):
        other = pair["lora_b" if side == "a" else "lora_a"]
        want = 3.0 * np.einsum(by, whole, other)
        np.testing.assert_allclose(factors[f"lora_{side}"], want, atol=1e-4 * np.abs(want).max())


# Weights of other classes and grids --------------------------------------------------------------


def components_of(recipe, names, init_rows=()):
    settings = types.SimpleNamespace(
        generator=recipe.generator, lora=recipe.lora, init_rows=init_rows, init_from="old"
    )
    return types.SimpleNamespace(settings=settings, recipe=recipe, class_names=names)


ROWS = {  # the new names, the old ones, their number, init_rows: {new: old}, the null class apart
    "equal names": (("b", "x", "a"), ("a", "b"), 2, (), {0: 1, 2: 0}),
    "names and numbers": (("b", "x"), ("a", "b"), 2, (("x", 1), (0, "a")), {1: 1, 0: 0}),
    "no names there": (("b", "x"), (), 2, (), {0: 0, 1: 1}),
    "no names there, and others": (("b", "x"), (), 3, ((1, 2),), {1: 2}),
    "numbers": (("0", "1"), ("0", "1", "2"), 3, (), {0: 0, 1: 1}),
    "other names": (("b", "x"), ("y", "z"), 2, (), {}),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_of_classes(case):
    mine, theirs, count, init_rows, want = ROWS[case]
    recipe = step.Recipe(dataclasses.replace(CONFIG, num_classes=len(mine)))
    made = components_of(recipe, mine, init_rows)
    other = dataclasses.replace(CONFIG, num_classes=count)
    assert transfer._rows(made, other, theirs) == {**want, len(mine): count}
    bare = dataclasses.replace(other, class_dropout=0.0)
    assert transfer._rows(made, bare, theirs) == want


@pytest.mark.parametrize("pair", [("c", "a"), ("b", "c"), (2, 0), (0, 2), (-1, 0)])
def test_rows_of_classes_that_are_not_there(pair):
    made = components_of(
        step.Recipe(dataclasses.replace(CONFIG, num_classes=2)), ("a", "b"), (pair,)
    )
    other = dataclasses.replace(CONFIG, num_classes=2)
    assert "init_rows" in helpers.refusal(transfer._rows, made, other, ("a", "b"))


@pytest.mark.parametrize("frozen", [False, True])
def test_all_but_fresh_rows_is_taken_bit_for_bit(frozen):
    """Five classes on a larger grid, of which two are old ones."""
    source = initial(dataclasses.replace(RECIPE, lora=LoraConfig(), freeze=()), seed=3)
    ema = jax.tree.map(lambda x: x + 1, source["generator"])
    new = dataclasses.replace(CONFIG, num_classes=5, grid=(6, 4))
    changes = {} if frozen else dict(lora=LoraConfig(), freeze=())
    recipe = dataclasses.replace(RECIPE, generator=new, **changes)
    made = components_of(recipe, tuple("abcde"))
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    fresh = jax.jit(functools.partial(step.init_state, recipe))(jax.random.key(0))
    where = sharding.shardings(fresh, mesh)
    given = transfer.Initial(CONFIG, {"params": source, "ema": ema}, {1: 0, 4: 2, 5: 3})
    state, line = transfer.with_weights(made, fresh, where, given)
    assert "fresh rows of 3 of 5 classes (a, c, d)" in line and "6x4 tokens in place of 3x4" in line
    assert ("adapters of rank 2" in line) == frozen
    trees = ((state.params["generator"], ema if frozen else source["generator"], fresh.params),)
    trees += ((step.ema_params(state), ema, {"generator": step.ema_params(fresh)}),)
    for tree, old, begun in trees:
        tree, old, begun = flat(tree), flat(old), flat(begun["generator"])
        rows, old_rows = (of.pop("cls_embedding/embedding") for of in (tree, old))
        fresh_rows = begun["cls_embedding/embedding"]
        np.testing.assert_array_equal(rows[[1, 4, 5]], old_rows[[0, 2, 3]])
        np.testing.assert_array_equal(rows[[0, 2, 3]], fresh_rows[[0, 2, 3]])
        for name, leaf in tree.items():
            np.testing.assert_array_equal(leaf, old[name] if name in old else begun[name])
    jax.tree.map(np.testing.assert_array_equal, state.params["foresight"], source["foresight"])


def test_patterns_that_freeze_nothing_or_everything_are_refused():
    frozen = lambda *patterns: dataclasses.replace(RECIPE, freeze=patterns)
    components._check_freeze(frozen("generator/cls*", "foresight/*"))
    message = helpers.refusal(components._check_freeze, frozen("foresight/*", "layers/*"))
    assert message.startswith("freeze names 'layers/*'")
    assert "of the generator" in helpers.refusal(components._check_freeze, frozen("*"))
