"""A teacher trained on the data set: what it learns from, resuming, and Mirai-I with it."""

import dataclasses
import functools
import importlib
import os
import shutil
import signal

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import mirai_i, teacher
from mirai_jax import teach
from mirai_jax.config import fields, schema
from mirai_jax.data import pipeline, small_sets
from mirai_jax.models import vit
from mirai_jax.models.teacher import prepare_images
from mirai_jax.models.tokenizer import PatchCodebook
from mirai_jax.optimizer import OptimizerConfig
from mirai_jax.teaching import settings as settings_lib
from mirai_jax.teaching import step as step_lib
from mirai_jax.teaching import train as teach_train
from mirai_jax.training import metrics_writer, train
from mirai_jax.utils.errors import ConfigError, Preempted
from mirai_jax.weights import frozen, pretrained

pytestmark = pytest.mark.usefixtures("quick_compilation")
refusal = functools.partial(helpers.refusal, error=ConfigError)


def tiny(**changed):
    """The demo, small enough for a test: real digits in 4x4 patches, one block, 8 steps."""
    made = teacher.get_config("demo")
    made.update(num_steps=8, batch_size=16, log_every=1, evaluate_every=4, checkpoint_every=4)
    made.network.update(width=64, num_layers=1)
    made.optimizer.update(warmup_steps=2)
    made.tokenizer.update(patch=8, vocab_size=16)
    made.update_from_flattened_dict(changed)
    return made


def run(made, folder, log=None, devices=1):
    lines = []
    teach_train.teach(made, folder, devices=jax.devices()[:devices], log=log or lines.append)
    return lines


def entries(folder):
    return [
        {k: v for k, v in entry.items() if k not in ("images_per_second", "wait_share")}
        for entry in metrics_writer.read_metrics(folder)
    ]


def encoder(folder):
    return pretrained.load("teacher.path", str(folder), "teacher")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of both objectives, its lines, and the parameters that it ended with."""
    folder, states = tmp_path_factory.mktemp("teacher") / "run", []
    with pytest.MonkeyPatch.context() as patch:
        finish = teach_train.TeacherTask.finish
        patch.setattr(
            teach_train.TeacherTask,
            "finish",
            lambda self, run: (states.append(run.state), finish(self, run))[1],
        )
        lines = run(tiny(objective="both"), folder)
    return folder, lines, jax.device_get(states[0].params)


# Configs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["", *teacher.SCALES])
def test_every_scale_reads_and_has_the_generators_grid_and_images(scale):
    settings = settings_lib.read(teacher.get_config(scale), num_devices=1)
    of_run = schema.read(mirai_i.get_config(scale), num_devices=1)
    assert settings.scale == of_run.scale
    assert settings.network.pos_grid == of_run.generator.grid
    assert settings.vocab_size == of_run.generator.vocab_size
    assert (settings.data.name, settings.data.path, settings.data.held_out) == (
        of_run.data.name, of_run.data.path, of_run.data.held_out
    )  # fmt: skip


@pytest.mark.parametrize(
    "field, value",
    [
        ("objective", "clusters"),
        ("network.width", 96),
        ("tokenizer.patch", 5),
        ("masked_share", 1.0),
        ("batch_size", 9),  # two devices
        ("data.held_out", 0),
        ("optimizer.warmup_steps", 8),
        ("flip", 1),
    ],
)
def test_a_wrong_field_is_one_line_and_leaves_nothing(tmp_path, field, value):
    made = tiny()
    with made.ignore_type():
        made.update_from_flattened_dict({field: value})
    line = refusal(run, fields.plain(made), tmp_path / "run", None, 2)
    assert f"{field} is {value!r}; it must be " in line
    assert not (tmp_path / "run").exists()


def test_other_refusals():
    read = lambda **changed: settings_lib.read(fields.plain(tiny()) | changed, 1)
    assert "masked_share is 0.0" in refusal(lambda: read(objective="masked", masked_share=0.0))
    assert "'model' (given 1) does not exist" in refusal(lambda: read(model=1))


def test_wrong_arguments_of_the_program_are_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    file = importlib.import_module("configs.teacher").__file__
    for arguments, message in [
        ([], "--config"),
        (["--config=no_such.py"], "no_such.py"),
        ([f"--config={file}:imagenet_b"], "imagenet_b"),  # DINOv2 is its teacher
        ([f"--config={file}", "--config.masked=1"], "--config.masked"),
        ([f"--config={file}", "--config.seed=1.5"], "seed"),
        ([f"--config={file}", "more"], "more"),
    ]:
        teach._FLAGS.unparse_flags()
        main = lambda given: teach.main(teach.parse_flags(["teach", "--config=", *given]))
        assert message in helpers.exit_message(main, arguments)
    assert not list(tmp_path.iterdir())


# The step -----------------------------------------------------------------------------------------


def test_augmentation_moves_and_mirrors_whole_images():
    images = np.random.RandomState(0).randint(1, 256, (400, 6, 5, 1)).astype(np.uint8)
    out = np.asarray(step_lib.augment(jax.random.key(1), images, 1, True))
    assert out.dtype == np.uint8 and out.shape == images.shape
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    moved = [padded[:, r : r + 6, c : c + 5] for r in range(3) for c in range(3)]
    found = [
        [i for i, m in enumerate(moved + [m[:, :, ::-1] for m in moved]) if (m[k] == out[k]).all()]
        for k in range(400)
    ]
    assert all(len(which) == 1 for which in found)
    assert len({which[0] for which in found}) == 18  # each of them occurs
    np.testing.assert_array_equal(step_lib.augment(jax.random.key(1), images, 0, False), images)


def test_masks_hide_equally_many_patches_everywhere():
    masked = np.asarray(step_lib.draw_masks(jax.random.key(0), 200, (4, 4), 0.4))
    assert (masked.sum(axis=(1, 2)) == 6).all()
    assert (np.abs(masked.mean(axis=0) - 6 / 16) < 0.15).all()
    assert (step_lib.draw_masks(jax.random.key(0), 2, (4, 4), 0.001).sum(axis=(1, 2)) == 1).all()


def recipe(objective="both"):
    network = vit.VitConfig(width=64, num_layers=2, num_heads=1, pos_grid=(3, 3), patch=4)
    codes = PatchCodebook(vocab_size=5, image_size=(12, 12), patch=4)
    return step_lib.Recipe(network, objective, 10, codes, OptimizerConfig(), masked_share=0.4)


def test_hidden_pixels_do_not_reach_the_predictions():
    made = recipe()
    learner = step_lib.Learner(made)
    params = step_lib.init_state(made, jax.random.key(0)).params
    images = jax.random.normal(jax.random.key(1), (2, 12, 12, 3))
    masked = step_lib.draw_masks(jax.random.key(2), 2, (3, 3), 0.4)

    def logits(images):
        return learner.apply({"params": params}, images, masked, method="predict")

    of_a_code = jax.random.normal(jax.random.key(3), (5,))
    one = lambda images, row, column: (logits(images)[:, row, column] @ of_a_code).sum()
    gradients = jax.jit(jax.grad(one))
    for row, column in np.ndindex(3, 3):
        gradient = jnp.abs(gradients(images, row, column))
        size = gradient.reshape(2, 3, 4, 3, 4, 3).sum(axis=(2, 4, 5))
        assert (size[masked] == 0).all()  # also not through other patches
        assert (size[~masked] > 0).all()


def test_hiding_nothing_is_the_network_as_it_is():
    network = vit.VisionTransformer(recipe().network)
    images = jax.random.normal(jax.random.key(1), (2, 12, 12, 3))
    params = jax.jit(network.init)(jax.random.key(0), images)
    shown = network.apply(params, images, masked_Bxhxw=jnp.zeros((2, 3, 3), bool))
    jax.tree.map(np.testing.assert_array_equal, shown, network.apply(params, images))


def test_scores_are_those_of_a_plain_computation():
    made = dataclasses.replace(recipe(), label_smoothing=0.2)
    params = step_lib.init_state(made, jax.random.key(0)).params
    params = jax.tree.map(lambda x: 3 * x, params)
    rng = np.random.RandomState(0)
    images, labels = rng.randint(0, 256, (4, 12, 12, 1)).astype(np.uint8), rng.randint(0, 10, 4)
    codebook = {"codebook": rng.normal(0, 0.5, (5, 16)).astype(np.float32)}
    batch, key = {"image": images, "label": labels}, jax.random.key(5)
    got = step_lib.scores(made, params, codebook, batch, key)
    learner, masked = step_lib.Learner(made), step_lib.draw_masks(key, 4, (3, 3), 0.4)
    shown = prepare_images(images, (12, 12))
    log_p = jax.nn.log_softmax(learner.apply({"params": params}, shown, method="classify"))
    right = np.asarray(log_p)[np.arange(4), labels]
    np.testing.assert_allclose(
        got["labels_loss"], -0.8 * right - 0.2 * log_p.mean(axis=1), rtol=1e-4
    )
    np.testing.assert_array_equal(got["accuracy"], log_p.argmax(axis=1) == labels)
    codes = made.tokenizer.apply(
        {"params": codebook}, (2 * images.astype(np.float32) - 255) / 255, method="encode"
    )
    logits = learner.apply({"params": params}, shown, masked, method="predict").reshape(4, 9, 5)
    log_p, codes = np.asarray(jax.nn.log_softmax(logits)), np.asarray(codes)
    hidden = np.asarray(masked).reshape(4, 9)
    for k in range(4):
        mine = log_p[k, hidden[k]], codes[k, hidden[k]]
        loss = -mine[0][np.arange(4), mine[1]].mean()
        np.testing.assert_allclose(got["masked_loss"][k], loss, rtol=1e-4)
        share = (mine[0].argmax(axis=1) == mine[1]).mean()
        np.testing.assert_allclose(got["masked_accuracy"][k], share, rtol=1e-6)


# Runs ---------------------------------------------------------------------------------------------


def test_held_out_images_are_never_trained_on(tmp_path, monkeypatch):
    sources = []

    def caught(source, **how):
        sources.append(source)
        raise ConfigError("enough")

    monkeypatch.setattr(pipeline, "make_dataset", caught)
    assert refusal(run, tiny(), tmp_path) == "enough"
    (source,) = sources
    held_out = small_sets.load_images("mnist", split="held_out", held_out=500)
    assert len(source) == 4_500 and len(held_out.labels) == 500
    trained_on = {source[k]["image"].tobytes() for k in range(len(source))}
    assert not trained_on & {image.tobytes() for image in held_out.images}


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["labels", "masked", "both"])
def test_it_learns(tmp_path, objective):
    made = tiny(
        objective=objective, num_steps=120, batch_size=32, log_every=20, evaluate_every=120,
        checkpoint_every=120,
    )  # fmt: skip
    made.optimizer.learning_rate = 3e-3
    run(made, tmp_path)
    first, *_, last = entries(tmp_path)
    losses = ["labels", "masked"] if objective == "both" else [objective]
    for name in losses:
        # Of two losses at once neither falls as fast.
        least = 0.02 if objective == "both" else 0.3
        assert last[f"held_out_{name}_loss"] < first[f"{name}_loss"] - least
    assert last["loss"] == pytest.approx(sum(last[f"{name}_loss"] for name in losses), rel=1e-5)
    assert ("held_out_accuracy" in last) == ("labels" in losses)
    if "labels" in losses:
        assert last["held_out_accuracy"] > 0.2  # chance is 0.1


def test_a_run_leaves_its_files_and_says_when_it_is_finished(finished):
    folder, lines, _ = finished
    assert any("held out accuracy" in line for line in lines)
    assert {path.name for path in folder.iterdir()} >= {
        "config.json", "metrics.jsonl", "events.jsonl", "tokenizer.npz", "checkpoints", "encoder",
        "summary.png",
    }  # fmt: skip
    assert [entry["step"] for entry in entries(folder)] == list(range(1, 9))
    measured = [entry["step"] for entry in entries(folder) if "held_out_accuracy" in entry]
    assert measured == [4, 8]
    assert "this run is finished (8 steps)" in run(tiny(objective="both"), folder)[-1]
    assert "seed was 0, is 1" in refusal(run, tiny(objective="both", seed=1), folder)


@pytest.mark.slow  # the loop is that of train_test.py and tokenize_test.py
@pytest.mark.parametrize("how", ["killed", "asked to stop"])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, finished, how):
    made = tiny(objective="both")

    def log(line):
        if line.startswith("step 6/"):
            if how == "killed":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt if how == "killed" else Preempted):
        run(made, tmp_path, log=log)
    assert "teacher.path is " in refusal(encoder, tmp_path)
    lines = run(made, tmp_path)
    step = 4 if how == "killed" else 7  # the loop is a step ahead of the screen
    assert any(f"resumed at step {step} of 8" in line for line in lines)
    assert entries(tmp_path) == entries(finished[0])
    jax.tree.map(
        np.testing.assert_array_equal, encoder(tmp_path).params, encoder(finished[0]).params
    )


def test_it_does_not_go_on_with_other_images_of_the_same_names(tmp_path, finished, monkeypatch):
    folder, load = shutil.copytree(finished[0], tmp_path / "run"), small_sets.load_images
    (folder / "summary.png").unlink()

    def other(*arguments):
        images = load(*arguments)
        return dataclasses.replace(images, images=images.images[::-1].copy())

    monkeypatch.setattr(small_sets, "load_images", other)
    assert "began with another image_set" in refusal(run, tiny(objective="both"), folder)


@pytest.mark.slow
def test_the_batch_is_split_over_devices(tmp_path, finished):
    run(tiny(objective="both"), tmp_path, devices=4)
    for one, four in zip(entries(finished[0]), entries(tmp_path), strict=True):
        assert four["loss"] == pytest.approx(one["loss"], rel=1e-3)


# As a teacher -------------------------------------------------------------------------------------


def student(folder, **fields):
    """Mirai-I on the same tokens, as small as the encoder."""
    made = mirai_i.get_config("demo")
    made.update(num_steps=1, batch_size=16, sample_every=0, judged_samples=0)
    made.model.update(num_layers=2, num_heads=2, width=32, vocab_size=16, unroll=1, grid=(4, 4))
    made.optimizer.warmup_steps = 0
    made.sample.update(classes=1, per_class=1)
    made.tokenizer.patch = 8
    made.foresight[0].projector_width = 16
    made.teacher.update(name="dinov2", path=str(folder), image_size=0)
    made.teacher.update(fields)
    return made


@pytest.mark.slow
def test_mirai_i_learns_from_the_encoder(tmp_path, finished):
    train.train(student(finished[0]), tmp_path, devices=jax.devices()[:1], log=lambda line: None)
    (entry,) = metrics_writer.read_metrics(tmp_path)
    assert 0 < abs(entry["foresight_bidirectional_r0c0"]) <= 1
    assert "bidirectional" in (tmp_path / "parts.json").read_text()


def test_mirai_i_takes_the_encoder_as_it_was_trained(finished):
    folder, _, params = finished
    settings = schema.read(student(folder), 1)
    module, loaded = frozen.make_teacher(settings)
    jax.tree.map(np.testing.assert_array_equal, loaded["network"], params["network"])
    images = small_sets.load_images("mnist").images[:3]
    got = module.apply({"params": loaded}, images)
    network = vit.VisionTransformer(settings_lib.read(tiny(), 1).network)
    want, _ = network.apply({"params": params["network"]}, prepare_images(images, (32, 32)))
    np.testing.assert_allclose(got, want.reshape(3, 16, 64), atol=1e-5)


def test_it_is_shown_images_like_those_it_learned_from(finished):
    settings = schema.read(student(finished[0], image_size=64), 1)
    assert "teacher.image_size is 64" in refusal(frozen.make_teacher, settings)
    frozen.make_teacher(schema.read(student(finished[0], image_size=32), 1))
    other = student(finished[0])
    other.data.held_out = 100
    assert "data.held_out is 100" in refusal(frozen.make_teacher, schema.read(other, 1))


@pytest.mark.slow
def test_the_demo_scale_knows_digits(tmp_path):
    run(teacher.get_config("demo"), tmp_path)
    assert entries(tmp_path)[-1]["held_out_accuracy"] > 0.9
