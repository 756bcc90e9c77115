"""Fine-tuning: other classes and grids, frozen parameters, low-rank adapters."""

import contextlib
import dataclasses
import functools
import json
import types

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import llamagen, mirai_e
from mirai_jax import foresight, optimizer, sharding, step
from mirai_jax.benchmark import memory_plan
from mirai_jax.config import schema
from mirai_jax.data import records, small_sets
from mirai_jax.evaluation import runs
from mirai_jax.models import adapters, batched
from mirai_jax.models.adapters import LoraConfig
from mirai_jax.models.generator import Generator, GeneratorConfig
from mirai_jax.training import checkpoint, components, restore, train, transfer
from mirai_jax.weights import conversion, frozen, pretrained

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = GeneratorConfig(2, 2, 32, vocab_size=16, num_classes=3, grid=(3, 4))
E = foresight.Term(
    name="ema", start_epoch=0.0, schedule=(), student_layer=1, teacher_layer=1, projector_width=8
)
RECIPE = step.Recipe(
    CONFIG, (E,), optimizer.OptimizerConfig(learning_rate=1e-2, weight_decay=0.5, eps=1e-5), ema_decay=0.5,
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
    return step.init_state(recipe, jax.random.key(0), jax.tree.map(jnp.asarray, params))


@pytest.fixture(scope="module")
def trained():
    """The parameters before, and the state after three steps of Mirai-E with adapters."""
    state = state_of(RECIPE)
    before, train_step = flat(state.params), helpers.make_train_step(RECIPE)
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
    """For logits, and for the states that teach."""
    params, bare = trained[1].params["generator"], dataclasses.replace(RECIPE, lora=LoraConfig())

    def outputs(recipe, params):
        given = {"params": adapters.scaled(params, recipe.lora)}
        logits, _ = Generator(CONFIG).apply(given, BATCH["codes"][:, :-1], BATCH["label"])
        return logits, step.teacher_targets(recipe, params, {}, BATCH, (E,))["ema"]

    @jax.jit
    def compared(params):
        merged = adapters.merge(params, RECIPE.lora)
        return outputs(RECIPE, params), outputs(bare, merged), merged

    apart, whole, merged = compared(params)
    for one, other in zip(apart, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert _shapes(merged) == _shapes(initial(bare)["generator"])
    pair, other = (tree["layers"]["attention"]["wo"] for tree in (params, merged))
    by_hand = 3.0 * np.einsum("nhdr,nrk->nhdk", pair["lora_a"], pair["lora_b"])
    assert np.abs(by_hand).max() > 1e-3
    np.testing.assert_allclose(other["kernel"], pair["kernel"] + by_hand, atol=1e-6)


def _shapes(tree):
    return jax.tree.map(np.shape, tree)


@pytest.mark.slow
def test_adapters_over_a_mesh(trained):
    mesh = sharding.make_mesh((1, 4, 2))
    state = state_of(RECIPE)
    where, rows = sharding.shardings(state, mesh), sharding.batch_sharding(mesh)
    pair = where.params["generator"]["layers"]["attention"]["wqkv"]
    assert [pair[f"lora_{side}"].spec[i] for side, i in (("a", 1), ("b", 3))] == ["fsdp", "tensor"]
    state, train_step = jax.device_put(state, where), helpers.make_train_step(RECIPE, where, rows)
    for i in range(3):
        state, _ = train_step(state, {}, sharding.put_batch(BATCH, mesh), i)
    for one, other in ((state.params, trained[1].params), (state.ema, trained[1].ema)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-4), one, other)


@pytest.mark.slow
def test_memory_of_adapters_is_planned():
    def planned(rank):
        config = llamagen.get_config("imagenet_b")
        config.batch_size, config.lora.rank = 1, rank
        config.model.update(size="", num_layers=8, num_heads=8, width=512, remat="full", unroll=1)
        settings = schema.read(memory_plan.without_files(config), 1)
        return memory_plan.compile_step(settings, jax.devices()[:1]).plan

    whole, low = planned(0), planned(4)
    width, hidden = 512, 1536
    pairs = 8 * 4 * (width + 3 * width + 2 * width + 3 * (width + hidden))
    assert low.parameters == whole.parameters + 4 * pairs
    assert low.ema == 4 * (pairs + 1001 * width)
    assert low.optimizer == pytest.approx(2 * low.ema, rel=0.01)
    # Of the gradient, that of a block is left.
    blocks = 4 * 8 * (4 * width**2 + 3 * width * hidden)
    assert low.temporary < whole.temporary - 0.5 * blocks


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


@pytest.mark.parametrize("frozen", [pytest.param(False, marks=pytest.mark.slow), True])
def test_all_but_fresh_rows_is_taken_bit_for_bit(frozen):
    """Five classes on a larger grid, of which two are old ones."""
    source = initial(dataclasses.replace(RECIPE, lora=LoraConfig(), freeze=()), seed=3)
    ema = jax.tree.map(lambda x: x + 1, source["generator"])
    new = dataclasses.replace(CONFIG, num_classes=5, grid=(6, 4))
    changes = {} if frozen else dict(lora=LoraConfig(), freeze=())
    recipe = dataclasses.replace(RECIPE, generator=new, **changes)
    made = components_of(recipe, tuple("abcde"))
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    fresh = state_of(recipe)
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


def test_another_tokenizer_is_refused(tmp_path):
    """Of runs whose tokenizer is a file; patch codebooks are compared themselves."""
    settings = types.SimpleNamespace(tokenizer=types.SimpleNamespace(name="vq"))
    params = {"codebook": np.ones((2, 3), np.float32)}
    check = functools.partial(restore._check_same_tokenizer, "init_from", tmp_path, settings)
    check(params)  # a run that has noted none
    for noted in (pretrained.checksum(params), "another"):
        (tmp_path / "parts.json").write_text(json.dumps({"tokenizer": noted}))
        if noted == "another":
            assert "whose tokenizer is another one" in helpers.refusal(check, params)
        else:
            check(params)


# Whole runs --------------------------------------------------------------------------------------


def begin(folder, module, grid, classes, **fields):
    """A run on random codes: its config, whose data is written beside its workdir."""
    folder.mkdir()
    codes = np.random.RandomState(0).randint(0, 16, (40, 10, grid[0] * grid[1]))
    packed = (
        records.pack_record(one.astype(np.uint16), k % classes, f"{k}")
        for k, one in enumerate(codes)
    )
    records.write_shard(folder / "codes-0.array_record", packed)
    config = module.get_config("imagenet_b")
    config.update(batch_size=8, log_every=1, checkpoint_every=2, num_steps=4, **fields)
    config.model.update(
        size="", num_layers=2, num_heads=2, width=32, vocab_size=16, num_classes=classes, grid=grid
    )
    config.tokenizer.name = "vq"  # whose grids are free
    config.sample.classes = 1
    config.data.update(path=str(folder), num_workers=0)
    for term in config.foresight:
        term.update(projector_width=16, start_epoch=0.0)
    return config


@pytest.mark.slow
def test_a_run_with_adapters_from_another_grid_resumes_samples_and_converts(tmp_path):
    one = dict(devices=jax.devices()[:1], log=lambda line: None)
    first = tmp_path / "first"
    train.train(begin(first, llamagen, (8, 8), 3), first / "run", **one)
    config = begin(tmp_path / "second", mirai_e, (12, 8), 4, init_from=str(first / "run"))
    config.lora.rank, config.freeze = 2, ("foresight/*/linear_0/*",)
    lines = []

    def interrupted(line):
        lines.append(line)
        if line.startswith("step 3/"):
            raise KeyboardInterrupt

    for name, log in (("whole", lines.append), ("parts", interrupted), ("parts", lines.append)):
        with contextlib.suppress(KeyboardInterrupt):
            train.train(config, tmp_path / name, devices=jax.devices()[:1], log=log)
    assert any("a grid of 12x8 tokens in place of 8x8, fresh foresight" in line for line in lines)
    assert any("resumed at step 2 of 4" in line for line in lines)
    whole, parts = (
        checkpoint.restore_weights(tmp_path / name / "checkpoints")[0]
        for name in ("whole", "parts")
    )
    jax.tree.map(np.testing.assert_array_equal, whole, parts)

    settings, saved, _ = restore.read_run("", str(tmp_path / "whole"))
    base = restore.read_run("", str(first / "run"))[1]["ema"]
    assert _shapes(saved["ema"]["layers"]) == _shapes(base["layers"])
    np.testing.assert_array_equal(saved["ema"]["norm"]["scale"], base["norm"]["scale"])
    conversion.to_torch(str(tmp_path / "whole"), str(tmp_path / "run.pt"), restore.read_run)
    weights = pretrained.load("", str(tmp_path / "run.pt"), "generator")
    assert weights.config.grid == (12, 8)
    jax.tree.map(np.testing.assert_array_equal, weights.params, saved["ema"])
    # Another run begins where this one ended, without adapters.
    again = begin(tmp_path / "third", llamagen, (8, 8), 4, init_from=str(tmp_path / "whole"))
    again.num_steps, again.optimizer.learning_rate = 1, 0.0
    train.train(again, tmp_path / "again", **one)
    kept = checkpoint.restore_weights(tmp_path / "again" / "checkpoints")[0]["params"]["generator"]
    jax.tree.map(np.testing.assert_array_equal, kept, saved["params"]["generator"])


@pytest.mark.slow
def test_five_of_ten_digits_need_fewer_steps(tmp_path, monkeypatch):
    """After 50 steps on new digits their loss is below that after 200 steps from scratch."""
    load = small_sets.load_images

    def some(digits, *arguments, **options):
        made = load(*arguments, **options)
        kept = np.isin(made.labels, digits)
        labels = np.searchsorted(digits, made.labels[kept]).astype(np.int32)
        names = tuple(map(str, digits))
        return small_sets.LabelledImages(made.images[kept], labels, names)

    def loss(name, digits, steps, **fields):
        monkeypatch.setattr(small_sets, "load_images", functools.partial(some, digits))
        config = helpers.tiny(llamagen, steps, sample_every=0, checkpoint_every=steps, **fields)
        config.log_every, config.model.num_classes = 50, len(digits)
        config.sample.classes = 1
        folder = tmp_path / name
        train.train(config, folder, devices=jax.devices()[:1], log=lambda line: None)
        settings, saved, _ = restore.read_run("", str(folder))
        held_out = components.labelled_images(settings, "held_out")
        tokenizer = frozen.load_codebook(settings, str(folder))
        codes = batched.encode_images(*tokenizer, held_out.images)
        params = saved["params"]["generator"]
        return runs.cross_entropy(settings.generator, params, codes, held_out.labels)

    loss("ten", range(10), 300)
    transferred = loss("five", range(5, 10), 50, init_from=str(tmp_path / "ten"))
    codebook = (tmp_path / "ten" / "tokenizer.npz").read_bytes()
    assert (tmp_path / "five" / "tokenizer.npz").read_bytes() == codebook
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "tokenizer.npz").write_bytes(
        codebook
    )  # or losses could not be compared
    assert transferred < loss("scratch", range(5, 10), 200)
