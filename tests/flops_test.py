"""Counts by formula against XLA's own of the unoptimised program, and against known numbers.

XLA counts elementwise work as well, so that a formula for products alone must come out a little
lower, never higher. Lowering costs the same at any width: the widths here leave 1 % or so to
elementwise work, and leaving out a product would show (EfficientNet has an exact test instead).
XLA counts a loop's body once: loops are unrolled, or of one layer. Up to 128 positions the program
computes all pairs, as the formula does (`attention._QUERY_BLOCK`).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mirai_jax import foresight, step
from mirai_jax.benchmark import flops
from mirai_jax.models import decoding, efficientnet, vit
from mirai_jax.models import generator as generator_lib
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.models.teacher import EfficientNetTeacher, OwnTeacher, VitTeacher
from mirai_jax.models.vit_sizes import PUBLISHED

BATCH = 4
CONFIG = GeneratorConfig(
    num_layers=3, num_heads=2, width=512, vocab_size=1024, num_classes=10, grid=(8, 16), unroll=3,
    token_dropout=0.0, residual_dropout=0.0, ffn_dropout=0.0,  # whose masks are much arithmetic
)  # fmt: skip
PRETRAINED = dataclasses.replace(CONFIG, num_layers=2, width=768, unroll=2)
DINO = VitTeacher(
    CONFIG.grid, vit.VitConfig(768, 1, 2, registers=2, swiglu=True, pos_grid=CONFIG.grid)
)
GPT_B = GeneratorConfig(*generator_lib.SIZES["B"])


def make_term(name, **fields):
    return foresight.Term(**{"name": name, "student_layer": 2, "teacher_layer": 2, **fields})


EMA = make_term("ema")
SAME_EMA = make_term("same", student_layer=3, offsets=((0, 0),))
LOWER_EMA = make_term("lower", teacher_layer=1)
ENCODER = make_term("encoder", source="bidirectional", offsets=((0, 0),))
SAME_ENCODER = make_term("again", source="bidirectional", teacher_layer=1)
CHECKPOINT = make_term("old", source="checkpoint", teacher_layer=1, projector_width=1024)
DEEP = make_term("deep", source="bidirectional", projector="transformer", window=2)
TOKENS = make_term("tokens", level="output", layout="1d", offsets=(1, 2))
ALL = (EMA, SAME_EMA, LOWER_EMA, ENCODER, SAME_ENCODER, CHECKPOINT, TOKENS)


def make_recipe(*terms, teacher=DINO, **fields):
    return step.Recipe(
        CONFIG, terms, teacher=teacher, pretrained_configs=(("old", PRETRAINED),), **fields
    )


def teacher_flops(teacher):
    return flops.step_flops(make_recipe(ENCODER, teacher=teacher), 1).teacher


def array(*shape, dtype=np.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


TOKEN_BATCH = {"codes": array(BATCH, CONFIG.length), "label": array(BATCH)}


def encoder_params(teacher):
    image = jnp.zeros((1, 8, 8, 1), jnp.uint8)
    return jax.eval_shape(lambda: teacher.init(jax.random.key(0), image))["params"]


def generator_params(config):
    return jax.eval_shape(lambda: generator_lib.init_params(config, jax.random.key(0)))


def size(tree):
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def xla(function, *shapes):
    return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


def gradient_xla(recipe):
    """The gradient of student and heads; what the teachers say is given."""
    params = jax.eval_shape(lambda: step.init_params(recipe, jax.random.key(0)))
    widths = {"ema": 512, "bidirectional": DINO.feature_width, "checkpoint": 768}
    targets = {
        t.name: array(BATCH, CONFIG.length, widths[t.source], dtype=np.float32)
        for t in recipe.terms
    }

    def gradient(params, targets, batch):
        active = (True,) * len(recipe.terms)
        return jax.grad(step.loss_fn, has_aux=True)(
            params, recipe, targets, batch, jnp.int32(0), active, None
        )

    return xla(gradient, params, targets, TOKEN_BATCH)


def test_student():
    got = flops.step_flops(make_recipe(), BATCH)
    assert 0.99 < got.student / gradient_xla(make_recipe()) < 1
    assert got.teacher == got.projectors == 0


@pytest.mark.parametrize(
    "term", [EMA, ENCODER, CHECKPOINT, TOKENS, DEEP], ids=lambda term: term.name
)
def test_heads(term):
    got = flops.step_flops(make_recipe(term), BATCH).projectors
    want = gradient_xla(make_recipe(term)) - gradient_xla(make_recipe())
    assert 0.98 < got / want < 1  # token heads end in a softmax


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_teaching_generator(layer):
    def states(params, batch):
        return generator_lib.hidden_states(
            CONFIG, params, batch["codes"][:, :-1], batch["label"], layer
        )

    recipe = make_recipe(make_term("ema", teacher_layer=layer))
    want = xla(states, generator_params(CONFIG), TOKEN_BATCH)
    assert 0.99 < flops.step_flops(recipe, BATCH).teacher / want < 1


@pytest.mark.parametrize("config", [vit.VitConfig(1024, 1, 2, pos_grid=CONFIG.grid), DINO.config])
def test_dinov2(config):
    teacher = VitTeacher(CONFIG.grid, config)
    shapes = encoder_params(teacher), array(1, 8, 8, 1, dtype=np.uint8)
    want = xla(lambda params, image: teacher.apply({"params": params}, image), *shapes)
    assert 0.98 < teacher_flops(teacher) / want < 1  # an exact GELU is a long polynomial


def test_dinov2_runs_no_block_above_the_layer():
    def count(layers, layer=0):
        config = dataclasses.replace(PUBLISHED["dinov2_vits14"], num_layers=layers)
        return teacher_flops(VitTeacher((16, 16), config, layer=layer))

    assert count(12, 7) == count(7) == count(7, 7)
    assert count(12) - count(7) == 5 * (count(2) - count(1)) > 0


@pytest.mark.parametrize("stage", range(1, 8))
def test_efficientnet(stage):
    """Every convolution has as many multiply-adds as its kernel has numbers, at each position."""
    teacher = EfficientNetTeacher((4, 4), image_size=72, stage=stage)  # odd sides: 9, 5, 3
    network = efficientnet.EfficientNetLite0()
    images = array(1, 72, 72, 3, dtype=np.float32)
    run = {"stage": stage, "capture_intermediates": True, "mutable": ["intermediates"]}
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros(images.shape)))
    _, seen = jax.eval_shape(lambda p, x: network.apply(p, x, **run), params, images)
    layers = {k: v["__call__"][0] for k, v in seen["intermediates"].items() if k != "__call__"}
    want = sum(
        2 * out.shape[1] * out.shape[2] * size(params["params"][name]["kernel"])
        for name, out in layers.items()
    )
    assert teacher_flops(teacher) == want


@pytest.mark.parametrize("cached", [False, True], ids=["images", "cached features"])
def test_a_whole_step_that_shares_teachers(cached):
    """Seven terms, of which two ask for what others have: as much as the step itself runs."""
    recipe = make_recipe(*ALL)
    state = jax.eval_shape(lambda: step.init_state(recipe, jax.random.key(0)))
    frozen = {"old": generator_params(PRETRAINED), "bidirectional": encoder_params(DINO)}
    features = array(BATCH, CONFIG.length, DINO.feature_width, dtype=np.float32)
    images = array(BATCH, 8, 8, 1, dtype=np.uint8)
    batch = {**TOKEN_BATCH, **({"features": features} if cached else {"image": images})}
    active = (True,) * len(ALL)
    want = xla(lambda *args: step.train_step(recipe, *args, active), state, frozen, batch)
    got = flops.step_flops(recipe, BATCH, cached_features=cached)
    assert 0.98 < got.total / want < 1  # the optimizer is elementwise


def test_counts_grow_with_the_batch_and_not_with_remat():
    one, six = (flops.step_flops(make_recipe(*ALL), batch) for batch in (1, 6))
    assert dataclasses.astuple(six) == tuple(6 * part for part in dataclasses.astuple(one))
    assert six.total == six.student + six.teacher + six.projectors
    generator = dataclasses.replace(CONFIG, remat="full")
    assert flops.step_flops(dataclasses.replace(make_recipe(*ALL), generator=generator), 6) == six


def test_cached_features_and_an_encoder_of_yours_cost_nothing():
    recipe = make_recipe(ENCODER)
    assert flops.step_flops(recipe, 1, cached_features=True).teacher == 0
    assert (
        flops.step_flops(make_recipe(ENCODER, teacher=OwnTeacher(CONFIG.grid, DINO)), 1).teacher
        == 0
    )


def test_training_gpt_b_takes_six_operations_a_weight_and_those_of_attention():
    params = generator_params(GPT_B)
    weights = size([params["layers"], params["output"]])
    attention = 12 * GPT_B.num_layers * GPT_B.length * GPT_B.width
    token = flops.step_flops(step.Recipe(GPT_B), 1).student / GPT_B.length
    assert token == pytest.approx(6 * weights + attention, rel=1e-3)  # norms are weights too
    assert token == pytest.approx(0.613e9, rel=1e-3)


# Sampling -----------------------------------------------------------------------------------------


def test_decode_moves_the_weights_and_half_the_cache():
    params = generator_params(GPT_B)
    weights = size([params["layers"], params["output"]])
    cache = size(jax.eval_shape(lambda: decoding.empty_cache(GPT_B, 2, GPT_B.length)))
    got = flops.decode_bytes(GPT_B, 2, 4)
    assert weights == pytest.approx(97.5e6, rel=1e-3)
    assert got == pytest.approx(4 * (weights + cache / 2), rel=1e-3)
    assert flops.decode_bytes(GPT_B, 2, 2) == got // 2
    of_int8 = flops.decode_bytes(GPT_B, 2, 4, "int8")
    assert of_int8 == pytest.approx(4 * weights + (1 + 4 / 64) * cache / 2, rel=1e-3)
    more = flops.decode_bytes(GPT_B, 64, 4) - got
    assert more == pytest.approx(4 * 31 * cache / 2, rel=1e-2)  # the weights are read once
