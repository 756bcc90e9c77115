"""The loop: resume bit for bit, what a run leaves behind, and what it refuses."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from configs import llamagen, mirai_e, mirai_i
from mirai_jax.benchmark import memory_plan
from mirai_jax.config import schema
from mirai_jax.data import pipeline, records, small_sets
from mirai_jax.training import loop, metrics_writer, train
from mirai_jax.training.checkpoint import restore_weights
from mirai_jax.utils import progress
from mirai_jax.utils.errors import ConfigError, DataError, Preempted, TrainingError

pytestmark = pytest.mark.usefixtures("quick_compilation")


def tiny(module=mirai_e, **fields):
    """The demo, small enough for a test: real digits, a 2-layer generator, 8 steps."""
    config = module.get_config("demo")
    config.update(
        num_steps=8, batch_size=16, log_every=1, sample_every=4, checkpoint_every=4,
        judged_samples=0,
    )  # fmt: skip
    config.model.update(num_layers=2, num_heads=2, width=32, vocab_size=16, unroll=1)
    config.optimizer.update(warmup_steps=2)
    config.sample.update(classes=3, per_class=2)
    for i, _ in enumerate(config.foresight):
        # The data set is 281 batches long: start within the run, at its third step.
        config.foresight[i].update(projector_width=16, start_epoch=2 / 281)
    config.update(fields)
    return config


def run(config, folder, log=None, devices=1):
    lines = []
    train.train(
        config,
        folder,
        devices=jax.devices()[:devices],
        log=log or (lambda line: lines.append(line)),
    )
    return lines


def without_speed(folder):
    return [
        {k: v for k, v in entry.items() if k not in ("images_per_second", "wait_share")}
        for entry in metrics_writer.read_metrics(folder)
    ]


def final_ema(folder):
    return restore_weights(folder / "checkpoints")[0]["ema"]


def stop_at(step):
    """A `log` that kills the run when it shows a step, as Ctrl-C would."""

    def log(line):
        if line.startswith(f"step {step}/"):
            raise KeyboardInterrupt

    return log


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(mirai_e, id="mirai_e"),
        pytest.param(mirai_i, id="mirai_i", marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, module):
    config = tiny(module)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run(config, whole)
    with pytest.raises(KeyboardInterrupt):
        run(config, halves, log=stop_at(6))  # past the checkpoint of step 4: 5 and 6 come again
    assert not (halves / "summary.png").exists()
    lines = run(config, halves)
    assert any("resumed at step 4 of 8" in line for line in lines)
    assert without_speed(halves) == without_speed(whole)
    assert [entry["step"] for entry in without_speed(whole)] == list(range(1, 9))
    jax.tree.map(np.testing.assert_array_equal, final_ema(halves), final_ema(whole))


def test_a_run_leaves_its_files_and_says_when_it_is_finished(tmp_path):
    config = tiny(judged_samples=30)
    lines = run(config, tmp_path)
    text = "\n".join(lines)
    assert "compiling the step without foresight" in text
    assert "compiling the step with foresight ema (step 3)" in text
    assert "left" in text and "img/s" in text and str(tmp_path / "summary.png") in text
    entries = metrics_writer.read_metrics(tmp_path)
    heads = ["foresight_ema_r0c0", "foresight_ema_r0c1", "foresight_ema_r1c0"]
    expected = ["step", "loss", "cross_entropy", *heads, "grad_norm"]
    assert all(set(expected) <= set(entry) for entry in entries)
    # Of a step that was compiled, the first or the first with foresight, no speed is logged.
    timed = [entry for entry in entries if entry["step"] not in (1, 3)]
    assert timed == [entry for entry in entries if "images_per_second" in entry]
    steps = [line for line in lines if line.startswith("step ")]
    shown = [line.split("  wait ")[1].split("%")[0] for line in steps if "wait" in line]
    assert shown == [f"{100 * entry['wait_share']:.0f}" for entry in timed]
    assert all(0 <= entry["wait_share"] <= 1 for entry in timed)
    for entry in entries:
        started = entry["step"] > 2
        assert all((entry[head] != 0) == started for head in heads)
        foresight = 2.0 * sum(entry[head] for head in heads)
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + foresight, abs=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["num_steps"] == 8
    (board,) = tmp_path.glob("events.out.tfevents.*")
    assert b"wait_share" in board.read_bytes()
    grids = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert grids == ["step_0000004.png", "step_0000008.png"]
    with Image.open(tmp_path / "samples" / grids[-1]) as picture:
        # Three rows of two 64-pixel images with 4 pixels between, names at the left.
        assert picture.height == 3 * 68 + 4 and picture.width > 2 * 68
        pixels = np.asarray(picture)
    assert len(np.unique(pixels)) > 10
    class_accuracy = json.loads((tmp_path / "agreement.json").read_text())
    assert class_accuracy["real"] > 0.9 and 0 <= class_accuracy["samples"] <= 1
    again = run(config, tmp_path)
    assert any("this run is finished (8 steps)" in line for line in again)
    assert metrics_writer.read_metrics(tmp_path) == entries


def test_batches_are_read_one_step_ahead_and_a_bad_one_harms_no_step_before(tmp_path, monkeypatch):
    events, read = [], pipeline.BatchIterator.__next__

    def noted(batches):
        index = batches.get_state()["next_index"]
        if index == 5:
            raise DataError("batch 5 is bad")
        events.append(f"batch {index}")
        return read(batches)

    def log(line):
        if line.startswith("step "):
            events.append(f"step {int(line[5:].split('/')[0]) - 1}")

    monkeypatch.setattr(pipeline.BatchIterator, "__next__", noted)
    run(tiny(llamagen, num_steps=4, checkpoint_every=9), tmp_path / "whole", log)
    assert [event for event in events if "batch" in event] == [f"batch {i}" for i in range(4)]
    # Two steps are on the devices when the next batch is read; only then is the first looked at.
    assert events.index("batch 2") < events.index("step 0")
    assert events.index("batch 3") < events.index("step 1")
    with pytest.raises(DataError, match="batch 5 is bad"):
        run(tiny(llamagen, checkpoint_every=5), tmp_path / "bad", log)
    assert (tmp_path / "bad" / "checkpoints" / "step_5").is_dir()
    assert [entry["step"] for entry in without_speed(tmp_path / "bad")] == [1, 2, 3, 4, 5]


def test_a_finished_run_without_its_figure_makes_it(tmp_path):
    config = tiny(llamagen)
    run(config, tmp_path)
    (tmp_path / "summary.png").unlink()
    lines = run(config, tmp_path)
    assert (tmp_path / "summary.png").exists()
    assert not any(line.startswith("step ") for line in lines)


def test_stopped_while_drawing_loses_no_line(tmp_path):
    config = tiny(llamagen)

    def log(line):
        if line.startswith("samples:"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, log=log)  # at step 4, whose checkpoint is being written
    assert [entry["step"] for entry in without_speed(tmp_path)] == [1, 2, 3, 4]
    lines = run(config, tmp_path)
    assert any("resumed at step 4" in line for line in lines)
    assert [entry["step"] for entry in without_speed(tmp_path)] == list(range(1, 9))


def test_mistakes_leave_nothing_in_the_way(tmp_path):
    with pytest.raises(DataError, match="batch_size 8192"):
        run(tiny(llamagen, batch_size=8192), tmp_path / "a")
    with pytest.raises(ConfigError, match="vocab_size"):
        config = tiny(llamagen)
        config.model.vocab_size = 1_000_000
        run(config, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="it must be a folder"):
        run(tiny(llamagen), tmp_path / "file")
    for text in ("[]", "{", "\xff"):
        folder = tmp_path / "b"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match=r"config\.json is damaged"):
            run(tiny(llamagen), folder)


def test_another_config_is_refused_and_the_fields_named(tmp_path):
    run(tiny(llamagen), tmp_path)
    other = tiny(llamagen, batch_size=32, seed=1)
    with pytest.raises(ConfigError) as error:
        run(other, tmp_path)
    assert "batch_size was 16, is 32" in str(error.value)
    assert "seed was 0, is 1" in str(error.value)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path):
    config = tiny(llamagen)
    run(config, tmp_path)
    config.num_steps = 10
    lines = run(config, tmp_path)
    assert any("num_steps 10 (was 8)" in line for line in lines)
    assert [entry["step"] for entry in metrics_writer.read_metrics(tmp_path)] == list(range(1, 11))
    before = (tmp_path / "config.json").read_text()
    config.num_steps = 5
    with pytest.raises(ConfigError, match="num_steps is 5; .* already at step 10"):
        run(config, tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_a_run_killed_before_its_new_figure_is_not_taken_for_finished(tmp_path):
    config = tiny(llamagen)
    run(config, tmp_path)
    config.num_steps = 10

    def log(line):
        if line.startswith("samples:"):  # the last checkpoint is written, the figure is not
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, log=log)
    lines = run(config, tmp_path)
    assert any(line.startswith("finished: 10 steps") for line in lines)
    assert (tmp_path / "samples" / "step_0000010.png").exists()


@pytest.mark.slow  # two processes do in distributed_test.py, and every mesh in step_test.py
def test_eight_devices_train_as_one(tmp_path):
    one, eight = tmp_path / "one", tmp_path / "eight"
    config = tiny(mirai_e)
    run(config, one)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    run(config, eight, devices=8)
    for a, b in zip(without_speed(one), without_speed(eight), strict=True):
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (a["step"], name)


@pytest.mark.slow  # step_test.py has its step, convert_test.py its weights
def test_a_pretrained_generator_teaches(tmp_path):
    teacher = tiny(llamagen, sample_every=0)
    teacher.mesh.update(data=2, fsdp=4)  # its checkpoint is read on one device
    run(teacher, tmp_path / "teacher", devices=8)
    config = tiny(mirai_e, num_steps=4, sample_every=0)
    config.foresight[0].update(
        source="checkpoint", checkpoint=str(tmp_path / "teacher"), start_epoch=0.0
    )
    lines = run(config, tmp_path / "student")
    assert any("teacher: generator of" in line for line in lines)
    losses = [e["foresight_checkpoint_r0c1"] for e in without_speed(tmp_path / "student")]
    assert losses[-1] < losses[0] < 1
    config.foresight[0].checkpoint = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"foresight\[0\]\.checkpoint is .*nowhere"):
        run(config, tmp_path / "other")
    config.foresight[0].update(checkpoint=str(tmp_path / "teacher"), teacher_layer=7)
    with pytest.raises(ConfigError, match=r"foresight\[0\]\.teacher_layer is 7"):
        run(config, tmp_path / "other")
    config.foresight[0].teacher_layer = 1
    config.data.held_out = 4000  # fits another codebook: the same tokens mean something else
    with pytest.raises(ConfigError, match="whose tokenizer is another one"):
        run(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()  # a mistake leaves nothing that would stand in the way


@pytest.mark.slow  # its step is in step_test.py
def test_cached_features_train_as_those_of_every_step(tmp_path):
    """The teacher asked once, before training. (Codes made in the step: tests/pipeline_test.py.)"""
    metrics = []
    for name, fields in (
        ("plain", {}),
        ("cached", {"teacher": {"cached": True}}),
    ):
        config = tiny(mirai_i, num_steps=3, sample_every=0)
        config.data.held_out = 4900  # 100 images are enough
        config.foresight[0].start_epoch = 0.0
        config.update(fields)
        run(config, tmp_path / name)
        metrics.append([list(entry.values()) for entry in without_speed(tmp_path / name)])
    np.testing.assert_allclose(metrics[1], metrics[0], rtol=1e-5)
    plain, cached = (
        json.loads((tmp_path / n / "parts.json").read_text()) for n in ("plain", "cached")
    )
    assert plain == cached and "bidirectional" in plain


def test_a_run_does_not_go_on_with_other_images_of_the_same_names(tmp_path, monkeypatch):
    config, load = tiny(llamagen, num_steps=1, sample_every=0), small_sets.load_images
    run(config, tmp_path)

    def other(*arguments):
        images = load(*arguments)
        return dataclasses.replace(images, labels=images.labels[::-1].copy())

    monkeypatch.setattr(small_sets, "load_images", other)
    config.num_steps = 2
    with pytest.raises(ConfigError, match="began with another image_set: the checksum was"):
        run(config, tmp_path)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run(tiny(llamagen, num_steps=1, sample_every=0), "~/first")
    lines = run(tiny(llamagen, num_steps=1, sample_every=0, init_from="~/first"), "~/second")
    assert any("began with the weights of ~/first" in line for line in lines)
    assert {"first", "second"} <= {path.name for path in tmp_path.iterdir()}


def test_codes_without_a_path_say_how_to_make_them(tmp_path):
    config = llamagen.get_config("imagenet_b")
    with pytest.raises(DataError, match="python -m mirai_jax.extract"):
        run(config, tmp_path)
    config.data.path = str(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data\.path.*holds no"):
        run(config, tmp_path)


def write_codes(folder, crops):
    """40 records of 4x4 tokens, 16 in the vocabulary, of 4 classes."""
    rng = np.random.default_rng(0)
    records.write_shard(
        folder / "codes-0.array_record",
        (
            records.pack_record(rng.integers(0, 16, (crops, 16)).astype(np.uint16), k % 4, f"{k}")
            for k in range(40)
        ),
    )


def test_trains_on_shards_of_codes(tmp_path):
    write_codes(tmp_path, crops=10)
    config = mirai_e.get_config("imagenet_b")
    config.update(num_steps=3, batch_size=8, log_every=1)
    config.model.update(
        size="", num_layers=2, num_heads=2, width=32, vocab_size=16, num_classes=4, grid=(4, 4)
    )
    config.tokenizer.image_size = 64
    config.sample.classes = 4
    config.data.update(path=str(tmp_path), num_workers=0)
    config.foresight[0].update(projector_width=16, start_epoch=0.2)
    lines = run(config, tmp_path / "run")
    assert any("40 images, 16 tokens each" in line for line in lines)
    assert any("no samples at step 3: tokenizer.path is unset" in line for line in lines)
    losses = [entry["foresight_ema_r0c0"] for entry in without_speed(tmp_path / "run")]
    assert losses[0] == 0 and losses[1] != 0  # bfloat16, from step 2 of 5 an epoch
    assert (tmp_path / "run" / "summary.png").exists()


@pytest.fixture
def parsed_flags():
    """Grain's worker processes want them."""
    flags.FLAGS.mark_as_parsed()
    yield
    flags.FLAGS.unparse_flags()


@pytest.mark.slow
def test_a_data_worker_that_dies_is_named_and_started_again(tmp_path, capfd, parsed_flags):
    codes = tmp_path / "codes"
    codes.mkdir()
    write_codes(codes, crops=2)
    config = llamagen.get_config("imagenet_b")
    config.update(num_steps=40, batch_size=8, log_every=1, sample_every=0)
    config.model.update(
        size="", num_layers=1, num_heads=2, width=16, vocab_size=16, num_classes=4, grid=(4, 4)
    )
    config.tokenizer.image_size = 64
    config.sample.classes = 4
    config.data.update(path=str(codes), num_workers=0)
    run(config, tmp_path / "whole")

    def kill_at(steps):
        def log(line):
            for step in steps:
                if line.startswith(f"step {step:>2}/"):
                    for child in multiprocessing.active_children():
                        os.kill(child.pid, signal.SIGKILL)

        return log

    config.data.num_workers = 1
    run(config, tmp_path / "killed", log=kill_at([2]))
    assert without_speed(tmp_path / "killed") == without_speed(tmp_path / "whole")
    message = capfd.readouterr().err
    assert (
        "data worker 0 of 1" in message and "exit code -9" in message and "started again" in message
    )
    events = (tmp_path / "killed" / "events.jsonl").read_text()
    assert '"worker_died"' in events
    with pytest.raises(DataError, match="data worker 0 of 1, which prepared batch .* died"):
        run(config, tmp_path / "dying", log=kill_at(range(40)))


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path):
    config = tiny(llamagen, log_every=8, checkpoint_every=2)
    config.optimizer.update(learning_rate=1e30, warmup_steps=0, clip_norm=0.0)
    with pytest.raises(TrainingError, match="at step 2, with the records ") as error:
        run(config, tmp_path)
    assert "no step yet" in str(error.value)
    message = json.loads((tmp_path / "nonfinite_step_0000002.json").read_text())
    assert len(message["records"]) == 16 and str(message["records"][0]) in str(error.value)
    assert not list((tmp_path / "checkpoints").glob("step_*"))


def sigterm_at(step, lines=None):
    """A `log` under which the run is asked to stop, as a cluster does it, when it shows a step."""

    def log(line):
        if lines is not None:
            lines.append(line)
        if line.startswith(f"step {step}/"):
            os.kill(os.getpid(), signal.SIGTERM)

    return log


def test_asked_to_stop_it_saves_and_resumes_without_repeating_a_step(tmp_path):
    config = tiny(mirai_e)
    run(config, tmp_path / "whole")
    steps = []
    for at in (1, 3, 6):  # between checkpoints, and before one
        with pytest.raises(Preempted, match="is saved, the same command resumes") as error:
            run(config, tmp_path / "stopped", log=sigterm_at(at, steps))
        assert error.value.status == 75
    run(config, tmp_path / "stopped", log=steps.append)
    shown = [int(line.split("/")[0].split()[1]) for line in steps if line.startswith("step ")]
    assert shown == list(range(1, 9))
    assert without_speed(tmp_path / "stopped") == without_speed(tmp_path / "whole")
    jax.tree.map(
        np.testing.assert_array_equal,
        final_ema(tmp_path / "stopped"),
        final_ema(tmp_path / "whole"),
    )
    events = (tmp_path / "stopped" / "events.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["event"] for line in events]
    assert kinds == ["started", *["preempted", "resumed"] * 3, "finished"]


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(tmp_path):
    config = tiny(llamagen)
    run(config, tmp_path / "whole")
    config.num_steps = 10
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    for file in (tmp_path / "damaged" / "checkpoints" / "step_8" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:7])
    lines = run(config, tmp_path / "damaged")
    assert any("checkpoint of step 8 is damaged" in line for line in lines)
    assert any("resumed at step 4 of 10" in line for line in lines)
    run(config, tmp_path / "whole")
    assert without_speed(tmp_path / "damaged") == without_speed(tmp_path / "whole")
    jax.tree.map(
        np.testing.assert_array_equal,
        final_ema(tmp_path / "damaged"),
        final_ema(tmp_path / "whole"),
    )


def test_begins_with_the_weights_of_another_run(tmp_path):
    run(tiny(mirai_e), tmp_path / "first")
    first = restore_weights(tmp_path / "first" / "checkpoints")[0]

    def begun(name, module):
        """After a step that moves nothing but the EMA, towards the parameters."""
        config = tiny(module, num_steps=1, init_from=str(tmp_path / "first"))
        config.optimizer.learning_rate = 0.0
        lines = run(config, tmp_path / name)
        (line,) = (line for line in lines if line.startswith("began with the weights of"))
        saved = restore_weights(tmp_path / name / "checkpoints")[0]
        trained, ema = saved["params"]["generator"], saved["ema"]
        jax.tree.map(np.testing.assert_array_equal, trained, first["params"]["generator"])
        jax.tree.map(
            lambda new, old, x: np.testing.assert_allclose(new, 0.995 * old + 0.005 * x, atol=1e-6),
            ema, first["ema"], trained,
        )  # fmt: skip
        return line, saved["params"]["foresight"]

    line, heads = begun("same", mirai_e)
    assert line.endswith("first")
    jax.tree.map(np.testing.assert_array_equal, heads, first["params"]["foresight"])
    line, heads = begun("other", mirai_i)
    assert line.endswith("with fresh foresight heads bidirectional") and set(heads) == {
        "bidirectional"
    }
    config = tiny(mirai_e, init_from=str(tmp_path / "first"))
    config.model.num_layers = 3
    with pytest.raises(ConfigError, match=r"init_from is .* whose num_layers is 2; it must be 3"):
        run(config, tmp_path / "third")
    config.init_from = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="init_from is .*nowhere"):
        run(config, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_updates_that_are_not_finite_are_left_out_until_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SKIPPED_IN_A_ROW", 3)
    config = tiny(llamagen, nonfinite="skip")
    config.optimizer.update(learning_rate=1e30, warmup_steps=0, clip_norm=0.0)
    lines = []
    with pytest.raises(TrainingError, match="at step 5"):
        run(config, tmp_path, log=lines.append)
    assert sum("its update is left out" in line for line in lines) == 3
    assert (
        sorted(path.name for path in tmp_path.glob("nonfinite*"))[0]
        == "nonfinite_step_0000002.json"
    )
    assert [entry["skipped"] for entry in metrics_writer.read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_a_vanished_workdir_is_one_line(tmp_path):
    def log(line):
        if line.startswith("step 2/"):
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(TrainingError, match="is gone|cannot be written") as error:
        run(tiny(llamagen), tmp_path / "run", log=log)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.slow
def test_memory_of_a_run_is_planned_without_its_files():
    def planned(module, **mesh):
        config = module.get_config("imagenet_b")
        config.update(batch_size=8)
        config.model.update(size="", num_layers=2, num_heads=8, width=256)
        config.teacher.update(name="dinov2_vits14", path="not there")
        config.data.images = "not there either"
        config.mesh.update(mesh)
        return memory_plan.plan(schema.read(config, 8), jax.devices())

    plan = planned(mirai_i, data=1, fsdp=8)
    # Parameters (the heads' too), EMA and Adam's two moments, an eighth each; DINOv2-S whole.
    assert plan.optimizer == pytest.approx(2 * plan.parameters, rel=0.01)
    assert plan.ema < plan.parameters and plan.frozen == pytest.approx(4 * 22.06e6, rel=0.01)
    assert plan.batch == 256 * 4 + 4 + 256 * 256 * 3
    assert plan.total > plan.temporary > 0 and "in all" in plan.lines()[-1]
    split, whole = planned(llamagen, data=1, fsdp=8), planned(llamagen, data=8, fsdp=1)
    assert whole.ema == pytest.approx(8 * split.ema, rel=0.01)
    # Every device has the activations of one image, and not of all eight.
    assert split.temporary < 1.5 * whole.temporary


def test_durations_read_well():
    cases = {5: "5s", 65: "1m05s", 3725: "1h02m", 90061: "1d01h"}
    assert {seconds: progress.duration(seconds) for seconds in cases} == cases
