"""The train step: what gradients reach, the EMA, every variant, and the same step over a mesh."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import helpers
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mirai_jax import foresight, sharding, step
from mirai_jax.models import generator as generator_lib
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.optimizer import OptimizerConfig
from mirai_jax.sampling import sampler
from mirai_jax.weights import torch_names

GRID = (3, 4)
SHAPES = dict(vocab_size=24, num_classes=5, grid=GRID)
CONFIG = GeneratorConfig(num_layers=2, num_heads=8, width=64, **SHAPES)
PRETRAINED = GeneratorConfig(num_layers=3, num_heads=2, width=24, **SHAPES)
RATES = ("token_dropout", "residual_dropout", "ffn_dropout", "class_dropout")
pytestmark = pytest.mark.usefixtures("quick_compilation")


class Encoder(nn.Module):
    """A bidirectional teacher: every feature depends on the whole image."""

    feature_width: int = 6

    @nn.compact
    def __call__(self, images_BxHxWxC):
        x = images_BxHxWxC.reshape(len(images_BxHxWxC), -1).astype(jnp.float32) / 255
        x = nn.tanh(nn.Dense(GRID[0] * GRID[1] * self.feature_width)(x))
        return x.reshape(len(x), -1, self.feature_width)


def make_term(**fields):
    common = dict(student_layer=1, teacher_layer=1, projector_width=32)
    return foresight.Term(**{**common, "start_epoch": 0.0, "schedule": (), **fields})


E = make_term(name="ema")
I = make_term(name="bidirectional", source="bidirectional", offsets=((0, 0),))  # noqa: E741
AHEAD = make_term(
    name="ahead", source="bidirectional", window=3, window_along="rows", projector="transformer"
)
STATIC = make_term(name="static", source="checkpoint", teacher_layer=2, offsets=((0, 1),))
VARIANTS = {
    "baseline": (),
    "e": (E,),
    "i": (I,),
    "e_and_i": (E, I),
    "ahead": (AHEAD,),
    "checkpoint": (STATIC,),
    "output": (
        make_term(name="next", level="output", layout="1d", offsets=(1, 2)),
        make_term(name="below", level="output", offsets=((1, 0), (1, 1)), borders="mask"),
    ),
}


# Adam divides by the root of the squared gradient: with the usual eps of 1e-8 a parameter whose
# gradient is rounding noise moves by the whole learning rate, in a direction that depends on the
# order of a sum. This eps lies far above that noise and below most real gradients.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, eps=1e-5, weight_decay=0.5, clip_norm=0.5)


def make_recipe(terms, **fields):
    """The recipe of a variant's name or of terms; tests share recipes, which compile once."""
    terms = VARIANTS[terms] if isinstance(terms, str) else terms
    common = dict(generator=CONFIG, optimizer=OPTIMIZER, ema_decay=0.7, teacher=Encoder())
    common["pretrained_configs"] = (("static", PRETRAINED),)
    return step.Recipe(terms=terms, **{**common, **fields})


@functools.cache
def make_batch(seed=0, size=8):
    rng = np.random.RandomState(seed)
    return {
        "codes": rng.randint(0, CONFIG.vocab_size, (size, CONFIG.length)).astype(np.int32),
        "label": rng.randint(0, CONFIG.num_classes, size).astype(np.int32),
        "image": rng.randint(0, 256, (size, 6, 8, 1)).astype(np.uint8),
    }


@functools.cache
def initialiser(terms):
    """Compiled once; each call gives new buffers, which a step may donate."""
    recipe = make_recipe(terms)

    def make():
        state = step.init_state(recipe, jax.random.key(0))
        # The head starts at zero, which would hide most gradients of the first step.
        kernel = state.params["generator"]["output"]["kernel"]
        drawn = {"kernel": 0.1 * jax.random.normal(jax.random.key(1), kernel.shape)}
        generator = {**state.params["generator"], "output": drawn}
        return step.init_state(recipe, jax.random.key(0), {**state.params, "generator": generator})

    return jax.jit(make)


@functools.cache
def teachers():
    """Parameters of the frozen teachers."""
    encoder = jax.jit(Encoder().init)(jax.random.key(2), make_batch()["image"])["params"]
    make = jax.jit(generator_lib.init_params, static_argnums=0)
    return {"bidirectional": encoder, "static": make(PRETRAINED, jax.random.key(3))}


def host(tree):
    """Copies, which outlive a donation."""
    return jax.tree.map(np.array, tree)


def assert_close(one, other, atol):
    one, other = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (one, other))
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        np.testing.assert_allclose(leaf, other[path], rtol=0, atol=atol, err_msg=str(path))


def run(recipe, steps, teacher_params, batch):
    """Trains on one batch: [((params, ema), metrics)] by step, the initial state first."""
    state = initialiser(recipe.terms)()
    train_step = helpers.make_train_step(recipe)
    log = [(host((state.params, state.ema)), None)]
    for i in range(steps):
        state, metrics = train_step(state, teacher_params, batch, i)
        log.append((host((state.params, state.ema)), jax.device_get(metrics)))
    return log


@functools.cache
def on_one_device(variant):
    """The log of twenty steps."""
    return run(make_recipe(variant), 20, teachers(), make_batch())


# Teachers ----------------------------------------------------------------------------------------


def test_no_gradient_reaches_any_teacher():
    recipe = make_recipe((E, I, STATIC))
    state, batch = initialiser(recipe.terms)(), make_batch()

    def total(params, ema, teacher_params):
        targets = step.teacher_targets(recipe, ema, teacher_params, batch, recipe.terms)
        return step.loss_fn(params, recipe, targets, batch, state.step, (True,) * 3, None)[0]

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(state.params, state.ema, teachers())
    to_student, *to_teachers = jax.tree.map(np.any, gradients)
    assert not any(jax.tree.leaves(to_teachers))
    assert all(jax.tree.leaves(to_student)), to_student


def test_a_source_without_targets_in_the_step_is_refused():
    term = dataclasses.replace(E, source="another")
    recipe = make_recipe((term,))
    with pytest.raises(ValueError, match="another"):
        step.teacher_targets(recipe, {}, {}, make_batch(), recipe.terms)


def test_teachers_products_are_not_left_to_the_devices_default():
    """The default of a TPU for float32 is one pass of bfloat16."""
    recipe, state = make_recipe((E, STATIC)), initialiser((E, STATIC))()

    def targets(ema, teacher_params):
        return step.teacher_targets(recipe, ema, teacher_params, make_batch(), recipe.terms)

    def precisions(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield equation.params["precision"]
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from precisions(inner)

    found = list(precisions(jax.make_jaxpr(targets)(state.ema, teachers()).jaxpr))
    assert len(found) > 10 and None not in found


def test_the_teacher_is_the_ema_before_the_step():
    recipe, batch = make_recipe("e"), make_batch()
    ((params, before), _), ((_, after), metrics) = on_one_device("e")[2:4]
    key = jax.random.fold_in(initialiser(recipe.terms)().key, 2)

    @jax.jit
    def losses(ema):
        targets = step.teacher_targets(recipe, ema, {}, batch, recipe.terms)
        return step.loss_fn(params, recipe, targets, batch, jnp.int32(2), (True,), key)[1]

    for name, value in losses(before).items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5), name
    for name, value in losses(after).items():
        assert (abs(metrics[name] - value) > 1e-3) == (name != "cross_entropy"), name


def test_teachers_run_without_dropout_and_without_dropping_labels():
    ema, targets = initialiser((E,))().ema, []
    for rate in (1e-9, 0.9):
        wild = dataclasses.replace(CONFIG, **dict.fromkeys(RATES, rate))
        recipe = make_recipe("e", generator=wild)
        targets.append(step.teacher_targets(recipe, ema, {}, make_batch(), recipe.terms)["ema"])
    np.testing.assert_array_equal(*targets)


def test_ema_follows_its_formula():
    log, decay = on_one_device("baseline"), make_recipe("baseline").ema_decay
    blend = lambda e, p: decay * e.astype(np.float64) + (1 - decay) * p
    expected = log[0][0][0]["generator"]
    assert_close(log[0][0][1], expected, atol=0)
    for (params, ema), _ in log[1:4]:
        expected = jax.tree.map(blend, expected, params["generator"])
        assert_close(ema, expected, atol=1e-6)
        of_ema, of_student = (p["output"]["kernel"] for p in (ema, params["generator"]))
        assert np.abs(of_ema - of_student).max() > 1e-3


# Variants ----------------------------------------------------------------------------------------


def test_variants_start_alike():
    baseline = initialiser(())()
    for variant in ("e", "i", "e_and_i"):
        state = initialiser(VARIANTS[variant])()
        assert_close(state.params["generator"], baseline.params["generator"], atol=0)
        assert_close(state.ema, baseline.ema, atol=0)
        assert (jax.random.key_data(state.key) == jax.random.key_data(baseline.key)).all()
        assert set(state.params["foresight"]) == {term.name for term in VARIANTS[variant]}


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=[pytest.mark.slow] * (v == "ahead")) for v in VARIANTS],
)
def test_every_variant_learns_and_adds_up(variant):
    recipe = make_recipe(variant)
    metrics = [m for _, m in on_one_device(variant)[1:]]
    heads = [name for term in recipe.terms for name in term.metric_names]
    assert set(metrics[0]) == {"loss", "cross_entropy", "grad_norm", "learning_rate", *heads}
    weights = [weight for term in recipe.terms for weight in term.head_weights]
    for m in metrics:
        assert all(np.isfinite(value) and value.dtype == np.float32 for value in m.values())
        total = m["cross_entropy"] + sum(w * m[h] for w, h in zip(weights, heads, strict=True))
        assert m["loss"] == pytest.approx(total, rel=1e-5, abs=1e-5)
    for name in ("loss", "cross_entropy", *heads):
        assert metrics[-1][name] < metrics[0][name] - 0.05, name
    for term in recipe.terms:
        if term.level == "internal":
            assert all(-1 <= metrics[-1][name] <= 1 for name in term.metric_names)


def test_inference_after_training_with_foresight_is_the_plain_generators():
    (params, ema), _ = on_one_device("e_and_i")[-1]
    plain = jax.eval_shape(lambda: generator_lib.init_params(CONFIG, jax.random.key(0)))
    for trained in (params["generator"], ema):
        assert jax.tree.map(jnp.shape, trained) == jax.tree.map(jnp.shape, plain)
    names = torch_names.to_torch(CONFIG, ema)  # strict: LlamaGen's names and no others
    assert not any("projector" in name for name in names)
    keys = sampler.image_keys(jax.random.key(0), np.arange(2))
    options, labels = sampler.SampleOptions(guidance=2.0), jnp.array([0, 3])
    codes = sampler.generate(CONFIG, ema, labels, keys, options)
    back = torch_names.from_torch(CONFIG, names)
    again = sampler.generate(CONFIG, back, labels, keys, options)
    assert codes.shape == (2, CONFIG.length)
    np.testing.assert_array_equal(codes, again)


def test_before_its_start_a_term_costs_nothing_and_changes_nothing():
    later = tuple(dataclasses.replace(term, start_epoch=1.0) for term in (E, I))
    recipe = make_recipe(later, steps_per_epoch=3)
    # No teacher runs: there are neither teachers nor images.
    blind = {name: make_batch()[name] for name in ("codes", "label")}
    log = run(recipe, 3, {}, blind)
    pairs = zip(log[1:], on_one_device("baseline")[1:4], strict=True)
    for ((params, ema), metrics), ((plain_params, plain_ema), plain_metrics) in pairs:
        assert_close(params["generator"], plain_params["generator"], atol=1e-7)
        assert_close(ema, plain_ema, atol=1e-7)
        assert plain_metrics["grad_norm"] > OPTIMIZER.clip_norm  # clipping counts, with one norm
        for name, value in metrics.items():
            expected = 0 if name.startswith("foresight") else plain_metrics[name]
            assert value == pytest.approx(expected, rel=1e-6), name
    decayed = (1 - OPTIMIZER.learning_rate * OPTIMIZER.weight_decay) ** 3
    begin, end = log[0][0][0]["foresight"], log[-1][0][0]["foresight"]
    for term in recipe.terms:
        for name, dense in begin[term.name].items():
            kernel = end[term.name][name]["kernel"]
            np.testing.assert_allclose(kernel, decayed * dense["kernel"], rtol=1e-5)
            np.testing.assert_array_equal(end[term.name][name]["bias"], dense["bias"])


# Less memory, and updates that are skipped --------------------------------------------------------


@pytest.mark.parametrize("variant", [pytest.param("e_and_i", marks=pytest.mark.slow), "output"])
def test_parts_of_a_batch_make_the_update_of_the_whole(variant):
    config = dataclasses.replace(CONFIG, **dict.fromkeys(RATES, 0.0))
    results = []
    for count in (1, 4):
        recipe = make_recipe(variant, generator=config, accumulate=count)
        state = step.init_state(recipe, jax.random.key(0))
        train_step = helpers.make_train_step(recipe)
        for i in range(2):
            state, metrics = train_step(state, teachers(), make_batch(), i)
        results.append((host((state.params, state.ema)), jax.device_get(metrics)))
    (whole, expected), (parts, metrics) = results
    assert_close(parts, whole, atol=1e-5)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.slow
def test_parts_of_a_batch_over_a_mesh():
    recipe = make_recipe("baseline", accumulate=2)
    mesh = sharding.make_mesh((2, 2, 2))
    state, placement = placed(recipe, mesh)
    train_step = helpers.make_train_step(recipe, placement, sharding.batch_sharding(mesh))
    batch = sharding.put_batch(make_batch(), mesh)
    _, metrics = train_step(state, {}, batch, 0)
    state, _ = placed(recipe, sharding.make_mesh((1, 1, 1), jax.devices()[:1]))
    _, alone = helpers.make_train_step(recipe)(state, {}, make_batch(), 0)
    assert float(metrics["loss"]) == pytest.approx(float(alone["loss"]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["dots", "full"])
def test_computing_again_changes_nothing_but_memory(policy):
    config = dataclasses.replace(CONFIG, remat=policy)
    state = initialiser(VARIANTS["e"])()
    recipe = make_recipe("e", generator=config)
    _, metrics = helpers.make_train_step(recipe)(state, {}, make_batch(), 0)
    _, expected = on_one_device("e")[1]
    for name, value in expected.items():  # the backward pass draws the same dropout again
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name
    layers = 4 if policy == "dots" else 8
    large = dataclasses.replace(config, num_layers=layers, residual_dropout=0.0)

    def stored(remat, unroll):
        generator = dataclasses.replace(large, remat=remat, unroll=unroll)
        recipe = make_recipe("baseline", generator=generator)
        shapes = jax.eval_shape(lambda: step.init_state(recipe, jax.random.key(0)))
        lowered = step.jit_train_step(recipe).lower(shapes, {}, make_batch(), ())
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert stored(policy, unroll=1) < 0.8 * stored("none", unroll=1)
    # No loop; a loop and a rest outside of it.
    for unroll in (4,) if policy == "dots" else (8, 6):
        assert stored(policy, unroll) < 0.95 * stored("none", unroll), unroll


def test_an_update_that_is_not_finite_is_left_out_and_counted():
    recipe = make_recipe("e", skip_nonfinite=True)
    train_step = helpers.make_train_step(recipe)
    state, _ = train_step(initialiser(recipe.terms)(), {}, make_batch(), 0)
    before = host((state.params, state.ema, state.opt_state))
    bad = jax.tree.map(jnp.copy, state)
    scale = {"scale": bad.ema["layers"]["ffn_norm"]["scale"] * jnp.nan}
    bad = bad.replace(ema={**bad.ema, "layers": {**bad.ema["layers"], "ffn_norm": scale}})
    ema = host(bad.ema)
    bad, metrics = train_step(bad, {}, make_batch(), 1)  # the teacher's features are not numbers
    assert not np.isfinite(metrics["loss"]) and metrics["skipped"] == 1
    assert bad.step == 2 and bad.skipped == 1
    assert_close(host((bad.params, bad.ema, bad.opt_state)), (before[0], ema, before[2]), atol=0)
    good, metrics = train_step(state, {}, make_batch(), 1)
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 0 and good.skipped == 0
    # A good update is the same with and without the check.
    assert_close(on_one_device("e")[1][0][0], before[0], atol=0)


# Meshes ------------------------------------------------------------------------------------------

MESHES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(shape) == 8]
QUICK = (2, 2, 2)


def placed(recipe, mesh):
    """The initial state on a mesh and its sharding, as training/train.py has them."""
    make = initialiser(recipe.terms)
    placement = sharding.shardings(jax.eval_shape(make), mesh)
    return jax.device_put(make(), placement), placement


def mesh_cases():
    """Each variant on every mesh; E and I together on one of them is quick."""
    for variant, shape in itertools.product(("e_and_i", "ahead", "baseline", "e", "i"), MESHES):
        quick = shape == QUICK and variant == "e_and_i"
        marks = () if quick else (pytest.mark.slow,)
        yield pytest.param(shape, variant, marks=marks, id=f"{variant}-{shape}")


@pytest.mark.parametrize("shape, variant", mesh_cases())
def test_a_mesh_computes_what_one_device_does(shape, variant):
    assert jax.device_count() == 8
    recipe = make_recipe(variant)
    mesh = sharding.make_mesh(shape)
    state, placement = placed(recipe, mesh)
    train_step = helpers.make_train_step(recipe, placement, sharding.batch_sharding(mesh))
    teacher_params = jax.device_put(teachers(), sharding.replicated(mesh))
    steps = 1 if variant == "ahead" else 3  # a fresh transformer is steep: rounding grows with each
    for i, (_, expected) in enumerate(on_one_device(variant)[1 : 1 + steps]):
        batch = sharding.put_batch(make_batch(), mesh)
        old, (state, metrics) = state, train_step(state, teacher_params, batch, i)
        arrays = jax.tree.leaves((old.params, old.ema, old.opt_state))
        assert all(array.is_deleted() for array in arrays)  # donated
        for name, value in expected.items():
            assert float(metrics[name]) == pytest.approx(value, rel=1e-5, abs=1e-6), name
    (params, ema), _ = on_one_device(variant)[steps]
    assert_close(host(state.params), params, atol=1e-5)
    assert_close(host(state.ema), ema, atol=1e-5)
    # Each device holds its share and no more, after the step too.
    _, fsdp, tensor = shape
    mu, nu = (optax.tree.get(state.opt_state, name) for name in ("mu", "nu"))
    for tree in (state.params["generator"], state.ema, mu["generator"], nu["generator"]):
        attention = tree["layers"]["attention"]
        assert shard_shape(attention["wqkv"]["kernel"]) == (2, 64 // fsdp, 3, 8 // tensor, 8)
        assert shard_shape(attention["wo"]["kernel"]) == (2, 8 // tensor, 8, 64 // fsdp)
        assert shard_shape(tree["tok_embeddings"]["embedding"]) == (24 // tensor, 64 // fsdp)
        assert shard_shape(tree["output"]["kernel"]) == (64 // fsdp, 24 // tensor)
        assert shard_shape(tree["layers"]["ffn_norm"]["scale"]) == (2, 64)
    for term in recipe.terms:
        heads, count = state.params["foresight"][term.name], len(term.offsets)
        if term.projector == "transformer":
            kernel = heads["block_1"]["attention"]["wqkv"]["kernel"]
            assert shard_shape(kernel) == (count, 64 // fsdp, 3, 8 // tensor, 8)
        else:
            assert shard_shape(heads["linear_1"]["kernel"]) == (count, 32 // tensor, 32 // fsdp)


def shard_shape(array):
    shapes = {shard.data.shape for shard in array.addressable_shards}
    assert len(shapes) == 1 and len(array.addressable_shards) == 8
    return shapes.pop()


def test_initialisation_over_a_mesh_is_that_of_one_device():
    make = initialiser(VARIANTS["e_and_i"])
    mesh = sharding.make_mesh((2, 2, 2))
    placement = sharding.shardings(jax.eval_shape(make), mesh)
    state = jax.jit(make, out_shardings=placement)()
    alone = make()
    assert_close(host(state.params), host(alone.params), atol=1e-7)
    assert_close(host(state.ema), host(alone.ema), atol=1e-7)
    assert state.step == 0
    assert (jax.random.key_data(state.key) == jax.random.key_data(alone.key)).all()


@pytest.mark.parametrize("size", generator_lib.SIZES)
def test_every_matrix_of_a_named_size_is_split(size):
    terms = (foresight.Term(), foresight.Term(name="deep", projector="transformer"))
    recipe = step.Recipe(GeneratorConfig(*generator_lib.SIZES[size]), terms)
    shapes = jax.eval_shape(lambda: step.init_state(recipe, jax.random.key(0)))
    placement = sharding.shardings(shapes, sharding.make_mesh((1, 4, 2)))

    def check(path, leaf, where):
        share = np.prod(where.shard_shape(leaf.shape)) / np.prod(leaf.shape)
        whole = getattr(path[-1], "key", "scale") in ("scale", "bias")
        assert whole or share <= 1 / 4, f"{path}: every device holds {share} of {leaf.shape}"

    jax.tree_util.tree_map_with_path(check, shapes, placement)


def test_axes_that_do_not_divide_are_replicated_and_meshes_resolved():
    mesh = sharding.make_mesh((1, 1, 8))
    odd = dataclasses.replace(CONFIG, num_heads=4, vocab_size=23)
    shapes = jax.eval_shape(lambda: generator_lib.init_params(odd, jax.random.key(0)))
    placement = sharding.shardings(shapes, mesh)
    wqkv = placement["layers"]["attention"]["wqkv"]["kernel"]
    assert wqkv.shard_shape((2, 64, 3, 4, 16)) == (2, 64, 3, 4, 16)
    assert placement["tok_embeddings"]["embedding"].shard_shape((23, 64)) == (23, 64)
    assert placement["layers"]["feed_forward"]["w1"]["kernel"].shard_shape((2, 64, 256))[2] == 32
    assert sharding.mesh_shape(-1, 2, 2, 8) == (2, 2, 2)
    assert sharding.mesh_shape(2, -1, 1, 8) == (2, 4, 1)
    for wrong in ((3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (8, 1, -2), (16, 1, 1)):
        with pytest.raises(ValueError, match="mesh.data="):
            sharding.mesh_shape(*wrong, 8)
