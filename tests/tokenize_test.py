"""A tokenizer trained on images: its losses, resuming, a codebook that stays in use, and who takes it."""

import dataclasses
import functools
import itertools
import os
import random
import signal
import subprocess
import sys
import time

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import mirai_e, tokenizer
from mirai_jax.config import fields
from mirai_jax.data import small_sets
from mirai_jax.data.crops import CropSpec
from mirai_jax.evaluation import network
from mirai_jax.extraction import job
from mirai_jax.models import vq
from mirai_jax.models.efficientnet import EfficientNetLite0
from mirai_jax.optimizer import OptimizerConfig
from mirai_jax.tokenizing import images as images_lib
from mirai_jax.tokenizing import losses
from mirai_jax.tokenizing import settings as settings_lib
from mirai_jax.tokenizing import step as step_lib
from mirai_jax.tokenizing import train as tokenize_train
from mirai_jax.training import metrics_writer, sources_of_samples, train
from mirai_jax.training.checkpoint import steps_in
from mirai_jax.utils.errors import Preempted
from mirai_jax.weights import conversion, frozen, pretrained, state_dict

pytestmark = pytest.mark.usefixtures("quick_compilation")
NETWORK = vq.VQConfig((1, 1), width=32, z_channels=8, vocab_size=16, channels=1)


class QuickJudge(network.Network):
    """Stands in for EfficientNet-Lite0, which takes half a minute to compile."""

    batch, is_inception = 64, False

    def __init__(self, *arguments):
        pass

    def __call__(self, images):
        return (images.reshape(len(images), -1, 3)[:, ::7].reshape(len(images), -1)[:, :9],)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_train, "Network", QuickJudge)
        load = small_sets.load_images
        patch.setattr(small_sets, "load_images", lambda *given: some_of(load(*given)))
        yield


def some_of(images):
    """Sixty of the images, of all classes."""
    step = max(1, len(images.labels) // 60)
    return dataclasses.replace(images, images=images.images[::step], labels=images.labels[::step])


def tiny(scale="demo", **changed):
    """Real digits in 14x14 tokens, one block a level, 6 steps, the discriminator from step 3 on."""
    made = tokenizer.get_config(scale)
    made.update(num_steps=6, batch_size=8, log_every=1, measure_every=3, checkpoint_every=3)
    made.tokenizer.update(
        image_size=(28, 28), multipliers=(1, 1), width=32, z_channels=8, vocab_size=16,
        start="kmeans", restart_after=2, free_steps=0,
    )  # fmt: skip
    made.discriminator.update(weight=0.5, start=3, width=4, num_layers=2)
    made.optimizer.update(warmup_steps=2)
    made.data.update(held_out=10)
    made.update_from_flattened_dict(changed)
    return made


def run(made, folder, log=None, devices=1):
    lines = []
    tokenize_train.tokenize(made, folder, devices=jax.devices()[:devices], log=log or lines.append)
    return lines


def entries(folder):
    return [
        {k: v for k, v in entry.items() if k not in ("images_per_second", "wait_share")}
        for entry in metrics_writer.read_metrics(folder)
    ]


def trained(folder):
    return pretrained.load("tokenizer.path", str(folder), "tokenizer")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, _quick):
    """A finished run and its lines."""
    folder = tmp_path_factory.mktemp("tokenizer") / "run"
    return folder, run(tiny(), folder)


def recipe(**fields):
    made = step_lib.Recipe(
        NETWORK, OptimizerConfig(learning_rate=1e-3, weight_decay=0.0), (16, 16),
        discriminator_weight=0.0, usage_window=5,
    )  # fmt: skip
    return dataclasses.replace(made, **fields)


def begin(made):
    return jax.jit(functools.partial(step_lib.init_state, made))(jax.random.key(0))


def random_images(count=4, seed=0):
    """Smooth ones: every pixel of a few frequencies."""
    rng = np.random.RandomState(seed)
    waves = np.stack([np.outer(np.cos(a * np.arange(16)), np.cos(b * np.arange(16)))
                      for a in (0.1, 0.3) for b in (0.2, 0.5)])  # fmt: skip
    return jnp.asarray(np.tensordot(rng.uniform(-0.5, 0.5, (count, 4)), waves, 1)[..., None], "f4")


# Configs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["", *tokenizer.SCALES])
def test_every_scale_reads(scale):
    made = tokenizer.get_config(scale)
    made.data.images = "folder"
    settings = settings_lib.read(made, num_devices=1)
    assert settings.scale == (scale or "demo")
    if scale == "vq16":  # the published one
        assert settings.recipe.network == vq.VQConfig()


@pytest.mark.parametrize(
    "field, value",
    [
        ("tokenizer.image_size", (33, 33)),
        ("tokenizer.image_size", (28, 56)),  # MNIST
        ("tokenizer.multipliers", (1, 0)),
        ("tokenizer.width", 48),
        ("tokenizer.free_steps", 6),
        ("discriminator.start", 7),
        ("discriminator.num_layers", 4),
        ("loss.perceptual_stages", (0,)),
        ("loss.reconstruction", "l3"),
        ("train", "decoder"),  # of nothing
        ("batch_size", 9),  # two devices
        ("optimizer.warmup_steps", 6),
    ],
)
def test_a_wrong_field_is_one_line_and_leaves_nothing(tmp_path, field, value):
    made = fields.plain(tiny())
    group, _, name = field.rpartition(".")
    (made[group] if group else made)[name] = value
    line = helpers.refusal(run, made, tmp_path / "run", None, 2)
    assert f"{field} is {value!r}; it must be " in line
    assert not (tmp_path / "run").exists()


# Losses and the step ------------------------------------------------------------------------------


def test_losses_are_those_of_a_plain_computation():
    rng = np.random.RandomState(0)
    to_unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    latents, rows = to_unit(rng.normal(size=(2, 3, 4, 5))), to_unit(rng.normal(size=(7, 5)))
    p = np.exp(-((latents.reshape(-1, 1, 5) - rows) ** 2).sum(-1) / 0.01)
    p /= p.sum(1, keepdims=True)
    expected = (
        -(p * np.log(p + 1e-300)).sum(1).mean() + (p.mean(0) * np.log(p.mean(0) + 1e-5)).sum()
    )
    got = losses.entropy(jnp.asarray(latents, "f4"), jnp.asarray(rows, "f4"))
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    real, fake = rng.normal(size=(2, 3, 3)), rng.normal(size=(2, 3, 3))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    bce = -(np.log(sigmoid(real)).mean() + np.log(1 - sigmoid(fake)).mean()) / 2
    np.testing.assert_allclose(
        losses.of_discriminator("non_saturating", real, fake), bce, rtol=1e-5
    )
    np.testing.assert_allclose(
        losses.of_generator("non_saturating", fake), -np.log(sigmoid(fake)).mean(), rtol=1e-5
    )
    assert step_lib.perplexity(np.array([3, 3, 5, 5]), 8) == pytest.approx(2)


@pytest.mark.parametrize("lookup", vq.LOOKUPS)
def test_gradients_pass_the_lookup(lookup):
    latents, rows, weights = np.random.RandomState(0).normal(size=(3, 2, 5)).astype("f4")

    def loss(latents, rows):
        return jnp.sum(weights * vq._looked_up(latents, rows, lookup))

    np.testing.assert_allclose(vq._looked_up(latents, rows, lookup), rows, atol=1e-6)
    to_latents, to_rows = jax.grad(loss, argnums=(0, 1))(latents, rows)
    for i, weight in enumerate(weights):
        along = (rows - latents)[i] / np.linalg.norm((rows - latents)[i])
        part = np.zeros(5) if lookup == "straight" else along * np.dot(along, weight)
        np.testing.assert_allclose(to_rows[i], part, atol=1e-6)
        np.testing.assert_allclose(to_latents[i], weight - part, atol=1e-6)
    # Where a latent stands for its row, as in free steps, it gets all of the gradient.
    to_latents = jax.grad(lambda x: loss(x, jax.lax.stop_gradient(x)))(latents)
    np.testing.assert_array_equal(to_latents, weights)


def test_the_perceptual_loss_is_zero_for_equal_images_and_else_leads_to_them():
    images, others = random_images(1), random_images(1, seed=1)
    init = functools.partial(EfficientNetLite0().init, stage=1)
    params = jax.jit(init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    loss = jax.jit(jax.value_and_grad(lambda x: losses.perceptual(params, (1,), images, x)))
    assert loss(images)[0] < 1e-9
    value, gradient = loss(others)
    assert value > 1e-3 and loss(others - 0.1 * gradient / jnp.linalg.norm(gradient))[0] < value


@pytest.mark.slow
def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    made = recipe(discriminator_weight=0.7, discriminator_start=0, discriminator_width=4,
                  discriminator_layers=2, adversarial="non_saturating", adaptive=True)  # fmt: skip
    state, images = begin(made), random_images()
    loss_of = jax.jit(lambda *given: step_lib._tokenizer_loss(given[0], made, *given[1:]))
    loss, (_, found, _) = loss_of(state.params, state.discriminator, {}, images, 0.7)

    def parts(kernel):
        params = jax.tree.map(lambda x: x, state.params)
        params["decoder"]["conv_out"]["kernel"] = kernel
        found = made.module.apply({"params": params}, images, method="autoencode").images
        logits, _ = made.discriminator.apply(state.discriminator, found, mutable=["batch_stats"])
        return jnp.mean((found - images) ** 2), jnp.mean(jnp.log1p(jnp.exp(-logits)))

    kernel = state.params["decoder"]["conv_out"]["kernel"]
    norms = [jnp.linalg.norm(gradient) for gradient in jax.jit(jax.jacrev(parts))(kernel)]
    others = sum(found[f"{name}_loss"] for name in ("reconstruction", "codebook", "commit"))
    expected = others + 0.7 * norms[0] / (norms[1] + 1e-4) * found["adversarial_loss"]
    np.testing.assert_allclose(loss, expected, rtol=1e-3)


@pytest.mark.slow
def test_the_decoder_alone_learns_and_the_codes_stay():
    made = recipe(
        trained="decoder", optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.1)
    )
    state, images = begin(made), random_images()
    train_step = jax.jit(functools.partial(step_lib.train_step, made))
    after = state
    for _ in range(2):
        after, _ = train_step(after, {}, {"image": images})
    for made, (name, before) in itertools.product((after.params, after.ema), state.params.items()):
        same = jax.tree.map(lambda x, y: bool((x == y).all()), before, made[name])
        assert all(jax.tree.leaves(same)) == (name not in ("decoder", "post_quant_conv")), name


@pytest.mark.slow
@pytest.mark.parametrize("restart_after, free_steps", [(0, 0), (3, 7)])
def test_a_codebook_that_is_dead_stays_dead_unless_codes_are_restarted(restart_after, free_steps):
    made = recipe(
        restart_after=restart_after,
        free_steps=free_steps,
        optimizer=OptimizerConfig(learning_rate=2e-4),
    )
    state, images = begin(made), random_images(8)
    params = state.params  # whose latents are all near one direction, of which one row is
    params["quant_conv"]["bias"] += 5.0
    rows = jnp.full((16, 8), -1.0) + 0.01 * params["quantize"]["embedding"]
    params["quantize"]["embedding"] = rows.at[0].set(1.0)
    train_step = jax.jit(functools.partial(step_lib.train_step, made))
    for step in range(1, 13):
        state, metrics = train_step(state, {}, {"image": images})
        free = step <= free_steps
        assert (metrics["codebook_loss"] == 0) == (metrics["codebook_use"] == 0) == free
    assert np.isfinite(metrics["loss"])
    if restart_after:
        assert metrics["codebook_use"] > 0.5
    else:
        assert metrics["codebook_use"] == 1 / 16 and metrics["perplexity"] == pytest.approx(1)


def test_blocks_that_begin_as_the_identity_do_nothing_at_first():
    made, images = recipe(init="identity"), random_images()
    latents = jax.jit(lambda p: made.module.apply({"params": p}, images, method="latents"))
    params = begin(made).params
    inside = ("conv1", "norm1", "norm2", "q", "k", "v", "norm")
    change = lambda path, x: x + 1 if path[-2].key in inside else x
    changed = jax.tree_util.tree_map_with_path(change, params)
    np.testing.assert_array_equal(latents(changed), latents(params))
    assert np.std(latents(params)) > 0.1


# Runs ---------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files_and_says_when_it_is_finished(finished):
    folder, lines = finished
    assert {path.name for path in folder.iterdir()} >= {
        "config.json", "metrics.jsonl", "events.jsonl", "checkpoints", "tokenizer", "summary.png",
    }  # fmt: skip
    assert sorted(p.name for p in (folder / "samples").iterdir()) == [
        "step_0000003.png", "step_0000006.png",
    ]  # fmt: skip
    logged = entries(folder)
    assert [entry["step"] for entry in logged] == list(range(1, 7))
    assert [entry["step"] for entry in logged if "held_out_psnr" in entry] == [3, 6]
    assert logged[-1]["discriminator_grad_norm"] > 0 == logged[0]["discriminator_grad_norm"]
    assert logged[-1]["reconstruction_loss"] < logged[0]["reconstruction_loss"]
    assert "this run is finished (6 steps)" in run(tiny(), folder)[-1]
    assert "seed was 0, is 1" in helpers.refusal(run, tiny(seed=1), folder)


@pytest.mark.slow
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, finished):
    def log(line):
        if line.startswith("step 4/"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        run(tiny(), tmp_path, log=log)
    assert "no finished run of mirai_jax.tokenize" in helpers.refusal(trained, tmp_path)
    lines = run(tiny(), tmp_path)
    assert any("resumed at step 5 of 6" in line for line in lines)
    assert entries(tmp_path) == entries(finished[0])
    one, other = trained(tmp_path), trained(finished[0])
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.mark.slow
def test_the_batch_is_split_over_devices(tmp_path, finished):
    run(tiny(), tmp_path, devices=4)
    one, four = entries(finished[0])[1], entries(tmp_path)[1]
    assert four["loss"] == pytest.approx(one["loss"], rel=1e-3)


@pytest.mark.slow
def test_five_kills_at_random_moments_change_nothing(tmp_path):
    arguments = [f"--config={helpers.ROOT}/configs/tokenizer.py"]
    made = {
        "num_steps": 150, "batch_size": 8, "log_every": 1, "measure_every": 150, "checkpoint_every": 5,
        "tokenizer.image_size": (28, 28), "tokenizer.multipliers": (1, 1), "tokenizer.z_channels": 8,
        "tokenizer.restart_after": 4, "discriminator.weight": 0.5, "discriminator.start": 20,
        "discriminator.width": 4, "discriminator.num_layers": 2, "data.held_out": 10,
    }  # fmt: skip
    arguments += [f"--config.{name}={value}" for name, value in made.items()]
    helpers.output("mirai_jax.tokenize", *arguments, "--workdir=whole", cwd=tmp_path)
    chance, checkpoints = random.Random(0), tmp_path / "killed/checkpoints"
    for kill in range(5):
        far = max(steps_in(checkpoints), default=0) + 5 * (kill % 3)
        process = subprocess.Popen(
            [sys.executable, "-m", "mirai_jax.tokenize", *arguments, "--workdir=killed"],
            cwd=tmp_path, env=helpers.environment(), stdout=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and max(steps_in(checkpoints), default=0) < far:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 3))
        process.kill()
        assert process.wait() == -signal.SIGKILL  # it was at work
    helpers.output("mirai_jax.tokenize", *arguments, "--workdir=killed", cwd=tmp_path)
    assert entries(tmp_path / "killed") == entries(tmp_path / "whole")
    one, other = trained(tmp_path / "killed"), trained(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


@pytest.mark.slow
def test_its_decoder_is_tuned_and_other_shapes_are_refused(tmp_path, finished):
    folder = finished[0]
    made = tiny(init_from=str(folder), train="decoder", num_steps=1)
    made.discriminator.weight = 0.0
    made.optimizer.warmup_steps = 0
    run(made, tmp_path / "tuned")
    one, other = trained(folder).params, trained(tmp_path / "tuned").params
    jax.tree.map(np.testing.assert_array_equal, one["encoder"], other["encoder"])
    assert not np.array_equal(
        one["decoder"]["conv_out"]["kernel"], other["decoder"]["conv_out"]["kernel"]
    )
    made.tokenizer.z_channels = 16
    assert "init_from is " in helpers.refusal(run, made, tmp_path / "other")


# A folder of images -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of images of all sizes, grey, in colour and with transparency."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.RandomState(0)
    for i in range(20):
        height, width = rng.randint(10, 50, 2)
        mode = ("L", "RGB", "RGBA")[i % 3]
        pixels = rng.randint(0, 256, (3, 3, len(mode))).astype(np.uint8)
        image = Image.fromarray(pixels.squeeze(), mode if mode != "L" else None)
        (root / f"class{i % 2}").mkdir(exist_ok=True)
        image.resize((width, height), Image.Resampling.BICUBIC).save(root / f"class{i % 2}/{i}.png")
    return root


def of_folder(folder, **changed):
    made = tiny(
        "folder",
        **{"data.images": str(folder), "data.held_out": 4, "data.num_workers": 0},
    )
    made.update(num_steps=2, measure_every=2)
    made.tokenizer.image_size = (16, 24)
    made.optimizer.warmup_steps = 0
    made.loss.perceptual_weight = made.discriminator.weight = 0.0
    made.update_from_flattened_dict(changed)
    return made


@pytest.mark.slow
def test_a_folder_of_any_images_trains_and_its_tokenizer_encodes(tmp_path, folder):
    run(of_folder(folder), tmp_path / "run")
    found = trained(tmp_path / "run")
    assert found.config.channels == 3 and found.config.downsample == 2
    # What extraction and sampling take.
    prepared = job.prepare(
        str(folder), str(tmp_path / "run"), str(tmp_path / "codes"), CropSpec(16, ten=False)
    )
    assert prepared.manifest.grid == (8, 8)
    module, params = frozen.load_vq_file("--tokenizer", str(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, params, found.params)


def test_wrong_folders_are_one_line(tmp_path, folder):
    refused = lambda **changed: helpers.refusal(run, of_folder(folder, **changed), tmp_path / "run")
    line = refused(**{"tokenizer.vocab_size": 2000})
    assert "tokenizer.vocab_size is 2000; it must be at most 1536" in line  # 16 images, 8x12 tokens
    assert "data.held_out is 20; it must be less than 20" in refused(**{"data.held_out": 20})
    assert "data.images is ''; it must be " in refused(**{"data.images": ""})
    assert not (tmp_path / "run").exists()


def test_held_out_images_are_never_trained_on(folder):
    made = images_lib.load(
        "images", "", str(folder), (16, 24), 4, 1.1, True, "ignore", batch_size=16, seed=0
    )
    keys = [made.batches.record_keys(i) for i in range(2)]
    trained_on = {key.partition(" crop ")[0] for key in sum(keys, [])}
    assert made.count == len(trained_on) == 16 and made.held_out.shape == (4, 16, 24, 3)
    assert len(set(sum(keys, []))) == 32  # other crops in another epoch


def test_crops_cover_their_size_and_some_are_mirrored(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (16, 24, 3)).astype(np.uint8)
    (tmp_path / "one").mkdir()
    Image.fromarray(pixels).save(tmp_path / "one/image.png")
    source = images_lib.open_images(str(tmp_path))
    whole = images_lib.AnyCrops(source, (16, 24), 1.0, True)
    seen = [whole("one/image.png", seed) for seed in range(20)]
    kinds = [[(x == y).all() for y in (pixels, pixels[:, ::-1])] for x in seen]
    assert all(map(any, kinds)) and {kind[0] for kind in kinds} == {True, False}
    near = images_lib.AnyCrops(source, (8, 8), 1.5, False)
    cut = [near("one/image.png", seed) for seed in range(9)]
    assert all(x.shape == (8, 8, 3) for x in cut) and len({x.tobytes() for x in cut}) > 5
    np.testing.assert_array_equal(near("one/image.png", 3), cut[3])


# As a tokenizer -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_generator_learns_its_codes(tmp_path, finished):
    made = helpers.tiny(mirai_e, steps=1, sample_every=1)
    made.optimizer.warmup_steps = 0
    made.model.grid = (14, 14)
    made.tokenizer.update(name="vq", path=str(finished[0]), image_size=28)
    train.train(made, tmp_path / "run", devices=jax.devices()[:1], log=lambda line: None)
    assert not (tmp_path / "run/tokenizer.npz").exists()
    source = sources_of_samples.of_workdir(str(tmp_path / "run"))
    jax.tree.map(
        np.testing.assert_array_equal, source.tokenizer_params, trained(finished[0]).params
    )
    made.model.grid = (8, 8)
    line = helpers.refusal(train.train, made, tmp_path / "other", devices=jax.devices()[:1])
    assert "model.grid is (8, 8)" in line
    made.tokenizer.path = ""
    assert "tokenizer.path is ''" in helpers.refusal(train.train, made, tmp_path / "other")


@pytest.mark.slow
def test_pytorch_gets_the_official_names_and_the_same_numbers_back(tmp_path, finished):
    conversion.to_torch(str(finished[0] / "tokenizer"), str(tmp_path / "out.pt"), None)
    back = pretrained.load("--tokenizer", str(tmp_path / "out.pt"), "tokenizer")
    assert back.config == NETWORK
    jax.tree.map(np.testing.assert_array_equal, back.params, trained(finished[0]).params)

    with np.load(helpers.ROOT / "tests/data/tokenizer_training_a.npz") as data:
        official = {n[5:]: data[n].shape for n in data.files if n.startswith("init/")}
    network = vq.VQConfig((1, 1, 1), width=32, z_channels=32, vocab_size=64)
    state = begin(dataclasses.replace(recipe(), network=network))
    weights = pretrained.Weights("tokenizer", network, jax.device_get(state.ema))
    made = {name: array.shape for name, array in state_dict.to_state(weights).items()}
    assert made == official | {"quantize.codebook_used": (65536,)}
