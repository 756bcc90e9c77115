"""The loop: resume bit for bit, what a run leaves behind, and what it refuses."""

import collections
import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import types

import helpers
import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from configs import base, llamagen, mirai_e, mirai_i
from mirai_jax import sharding, step
from mirai_jax.benchmark import memory_plan
from mirai_jax.config import schema
from mirai_jax.data import pipeline, records, small_sets
from mirai_jax.models import attention
from mirai_jax.training import attention_choice, loop, metrics_writer, train, workdir
from mirai_jax.training.checkpoint import restore_weights
from mirai_jax.utils import progress
from mirai_jax.utils.errors import ConfigError, DataError, Preempted, TrainingError

pytestmark = pytest.mark.usefixtures("quick_compilation")


def tiny(module=mirai_e, **fields):
    """The demo, small enough for a test: real digits, a 2-layer generator, 8 steps."""
    config = helpers.tiny(module, sample_every=4, checkpoint_every=4)
    config.sample.update(classes=3, per_class=2)
    for i, _ in enumerate(config.foresight):
        # The data set is 281 batches long: start within the run, at its third step.
        config.foresight[i].start_epoch = 2 / 281
    config.update(fields)
    return config


def run(config, folder, log=None, devices=1):
    lines = []
    train.train(config, folder, devices=jax.devices()[:devices], log=log or lines.append)
    return lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_compilation):
    """Gives the whole run of a module, trained once: its folder, to read only, and lines."""

    @functools.cache
    def of(module):
        folder = tmp_path_factory.mktemp("finished") / "run"
        return folder, run(tiny(module, judged_samples=30 * (module is mirai_e)), folder)

    return of


@pytest.fixture
def copied(tmp_path, finished):
    """A copy of the whole run of LlamaGen, to resume."""
    return shutil.copytree(finished(llamagen)[0], tmp_path / "copied")


def without_speed(folder):
    return [
        {k: v for k, v in entry.items() if k not in ("images_per_second", "wait_share")}
        for entry in metrics_writer.read_metrics(folder)
    ]


def assert_same_run(folder, other):
    assert without_speed(folder) == without_speed(other)
    one, two = (restore_weights(run / "checkpoints")[0]["ema"] for run in (folder, other))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def stop_at(start):
    """A `log` that kills the run at a line that begins so, as Ctrl-C would."""

    def log(line):
        if line.startswith(start):
            raise KeyboardInterrupt

    return log


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(mirai_e, id="mirai_e"),
        pytest.param(mirai_i, id="mirai_i", marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, finished, module):
    with pytest.raises(KeyboardInterrupt):
        # Past the checkpoint of step 4: 5 and 6 come again.
        run(tiny(module), tmp_path, log=stop_at("step 6/"))
    assert not (tmp_path / "summary.png").exists()
    lines = run(tiny(module), tmp_path)
    assert any("resumed at step 4 of 8" in line for line in lines)
    assert_same_run(tmp_path, finished(module)[0])
    assert [entry["step"] for entry in without_speed(tmp_path)] == list(range(1, 9))


def test_a_run_leaves_its_files_and_says_when_it_is_finished(finished):
    folder, lines = finished(mirai_e)
    assert any("compiling the step with foresight ema (step 3)" in line for line in lines)
    assert any(str(folder / "summary.png") in line for line in lines)
    entries = metrics_writer.read_metrics(folder)
    # Of a step that was compiled, the first or the first with foresight, no speed is logged.
    timed = [entry for entry in entries if entry["step"] not in (1, 3)]
    assert timed == [entry for entry in entries if "images_per_second" in entry]
    assert all(0 <= entry["wait_share"] <= 1 for entry in timed)
    for entry in entries:
        heads = [entry[f"foresight_ema_{head}"] for head in ("r0c0", "r0c1", "r1c0")]
        assert [loss != 0 for loss in heads] == [entry["step"] > 2] * 3 and entry["grad_norm"] > 0
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + 2 * sum(heads), abs=1e-5)
    assert json.loads((folder / "config.json").read_text())["num_steps"] == 8
    (board,) = folder.glob("events.out.tfevents.*")
    assert b"wait_share" in board.read_bytes()
    grids = sorted(path.name for path in (folder / "samples").iterdir())
    assert grids == ["step_0000004.png", "step_0000008.png"]
    with Image.open(folder / "samples" / grids[-1]) as picture:
        # Three rows of two 64-pixel images with 4 pixels between, names at the left.
        assert picture.height == 3 * 68 + 4 and picture.width > 2 * 68
        assert len(np.unique(np.asarray(picture))) > 10
    class_accuracy = json.loads((folder / "agreement.json").read_text())
    assert class_accuracy["real"] > 0.9 and 0 <= class_accuracy["samples"] <= 1
    again = run(tiny(judged_samples=30, log_every=2), folder)
    assert any("this run is finished (8 steps)" in line for line in again)
    assert not any("log_every" in line for line in again)  # its config stays
    assert metrics_writer.read_metrics(folder) == entries


def broken(*arguments, **options):
    raise RuntimeError("no such luck")


@pytest.mark.parametrize("begins", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_broken_wandb_changes_nothing(tmp_path, finished, monkeypatch, begins):
    """A module that raises at every call, at once or when the run has begun; and a profile beside it."""
    everything = collections.defaultdict(lambda: broken)
    run_of = types.SimpleNamespace(offline=False, starting_step=0, log=broken, finish=broken)
    if begins:
        everything.update(
            {name: lambda **options: run_of for name in ("Settings", "login", "init")}
        )
    stub = types.ModuleType("wandb")
    stub.__getattr__ = everything.__getitem__
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = tiny(profile_steps=(4, 5))
    config.wandb.project = "mirai"
    lines = run(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", finished(mirai_e)[0])
    assert [line for line in lines if line.startswith("W&B is off") and "luck" in line]
    (trace,) = (tmp_path / "run" / "profile" / "plugins" / "profile").glob("*/*.xplane.pb")
    assert trace.stat().st_size > 1000 and any("profile of steps 4 to 5" in line for line in lines)


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
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError, match=r"config\.json is damaged"):
            run(tiny(llamagen), tmp_path)


def test_another_config_is_refused_and_the_fields_named(copied):
    with pytest.raises(ConfigError) as error:
        run(tiny(llamagen, batch_size=32, seed=1), copied)
    assert "batch_size was 16, is 32" in str(error.value)
    assert "seed was 0, is 1" in str(error.value)
    assert json.loads((copied / "config.json").read_text())["seed"] == 0


def test_a_longer_run_continues_a_finished_one_also_when_it_is_killed_at_its_end(copied):
    longer = tiny(llamagen, num_steps=10)
    with pytest.raises(KeyboardInterrupt):
        run(longer, copied, log=stop_at("samples:"))  # without its new figure
    assert [entry["step"] for entry in without_speed(copied)] == list(range(1, 11))
    assert not (copied / "summary.png").exists()
    lines = run(longer, copied)
    assert not any(line.startswith("step ") for line in lines)
    assert any(line.startswith("finished: 10 steps") for line in lines)
    assert (copied / "summary.png").exists() and (copied / "samples/step_0000010.png").exists()
    before = (copied / "config.json").read_text()
    with pytest.raises(ConfigError, match="num_steps is 5"):
        run(tiny(llamagen, num_steps=5), copied)
    assert (copied / "config.json").read_text() == before


@pytest.mark.slow  # two processes do in distributed_test.py, and every mesh in step_test.py
def test_eight_devices_train_as_one(tmp_path, finished):
    config = tiny(mirai_e)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    run(config, tmp_path, devices=8)
    one = finished(mirai_e)[0]
    for a, b in zip(without_speed(one), without_speed(tmp_path), strict=True):
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
    config.foresight[0].teacher_layer = 7
    with pytest.raises(ConfigError, match=r"foresight\[0\]\.teacher_layer is 7"):
        run(config, tmp_path / "other")
    config.foresight[0].teacher_layer = 1
    config.data.held_out = 4000  # fits another codebook: the same tokens mean something else
    with pytest.raises(ConfigError, match="tokenizer"):
        run(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()  # a mistake leaves nothing that would stand in the way


@pytest.mark.slow  # its step is in step_test.py
def test_cached_features_train_as_those_of_every_step(tmp_path):
    """The teacher asked once, before training. (Codes made in the step: tests/pipeline_test.py.)"""
    metrics = []
    for name, fields in (("plain", {}), ("cached", {"teacher": {"cached": True}})):
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


def test_a_run_does_not_resume_with_other_images_of_the_same_names(copied, monkeypatch):
    load = small_sets.load_images

    def other(*arguments):
        images = load(*arguments)
        return dataclasses.replace(images, labels=images.labels[::-1].copy())

    monkeypatch.setattr(small_sets, "load_images", other)
    with pytest.raises(ConfigError, match="began with another image_set"):
        run(tiny(llamagen, num_steps=9), copied)


def test_a_term_that_would_start_after_the_end_is_named():
    settings = schema.read(tiny(), 1)
    recipe = step.Recipe(settings.generator, settings.terms, ema_decay=0, steps_per_epoch=281)
    assert not train.doubts(recipe, 3)  # its third step is the first with foresight
    (line,) = train.doubts(recipe, 2)
    assert "foresight[0].start_epoch" in line and "num_steps" in line


def test_an_average_that_stays_near_its_start_is_named(tmp_path):
    recipe = step.Recipe(schema.read(tiny(llamagen), 1).generator, ema_decay=0.9999)
    (line,) = train.doubts(recipe, 5_000)
    assert "ema_decay" in line and "61%" in line
    run(tiny(llamagen), tmp_path)
    assert "initial weights" in (tmp_path / "events.jsonl").read_text()
    for config in map(llamagen.get_config, base.SCALES):
        recipe = dataclasses.replace(recipe, ema_decay=config.ema_decay)
        assert not train.doubts(recipe, config.num_steps)


def test_heads_that_devices_cannot_share_are_named():
    recipe = step.Recipe(schema.read(tiny(llamagen), 1).generator, ema_decay=0)  # two heads
    assert not train.doubts(recipe, 8, tensor=2)
    (line,) = train.doubts(recipe, 8, tensor=4)
    assert "mesh.tensor=4" in line and "2 heads" in line


# The attention kernel ------------------------------------------------------------------------------


@pytest.mark.parametrize("faster, slower", [("auto", "xla"), ("xla", "auto")])
def test_a_long_run_times_attention_and_keeps_the_answer(tmp_path, monkeypatch, faster, slower):
    times, settings = {faster: 1e-3, slower: 2e-3}, schema.read(tiny(llamagen), 1)
    monkeypatch.setattr(attention_choice, "measure", lambda *_: times)

    def choose(begin, attention="auto"):
        generator = dataclasses.replace(settings.generator, attention=attention)
        given = dataclasses.replace(settings, generator=generator)
        return attention_choice.choose(given, None, tmp_path, begin, lambda line: None)

    assert choose(0) == "auto" and not list(tmp_path.iterdir())  # a short run
    monkeypatch.setattr(attention_choice, "LONG", settings.num_steps)
    assert choose(4) == "auto"  # the run of a version that did not choose
    assert choose(0) == faster
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert (event["event"], event["kernel"], event[f"{slower}_ms"]) == ("attention", faster, 2.0)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "started"}\n{"event": "atten')  # cut off
    times[slower] = 0.0  # not asked again, before the first checkpoint either
    assert choose(0) == choose(4) == faster and choose(4, "xla") == "xla"
    monkeypatch.setattr(attention_choice, "LONG", settings.num_steps + 1)  # the run became shorter
    assert choose(0) == faster


def test_a_kernel_that_fails_is_too_slow(tmp_path, monkeypatch):
    def attend(*qkv, kernel, **options):
        if kernel == "xla":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return real(*qkv, kernel=kernel, **options)

    real, settings = attention.attend, schema.read(tiny(llamagen), 1)
    monkeypatch.setattr(attention, "attend", attend)
    monkeypatch.setattr(attention, "has_fused", lambda *_: True)
    monkeypatch.setattr(attention_choice, "_RUNS", 2)
    monkeypatch.setattr(attention_choice, "LONG", settings.num_steps)
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:1])
    generator = dataclasses.replace(settings.generator, attention="auto")
    settings = dataclasses.replace(settings, generator=generator)
    assert attention_choice.choose(settings, mesh, tmp_path, 0, lambda line: None) == "auto"
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert event["auto_ms"] > 0 and event["xla_ms"] is None


def test_the_step_has_the_kernel_that_the_start_of_the_run_chose(copied, monkeypatch):
    def stop(recipe, *rest):
        raise InterruptedError(recipe.generator.attention)

    monkeypatch.setattr(train, "jit_train_step", stop)
    workdir.note_event(copied, "attention", kernel="xla")
    with pytest.raises(TrainingError, match="xla"):
        run(tiny(llamagen, num_steps=9), copied)


def test_both_kernels_are_timed_where_there_are_two(monkeypatch):
    settings = schema.read(tiny(llamagen), 2)
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:2])
    assert attention_choice.measure(settings, mesh) == {}
    monkeypatch.setattr(attention_choice, "_RUNS", 2)
    monkeypatch.setattr(attention, "has_fused", lambda *_: True)
    taken = attention_choice.measure(settings, mesh)
    assert taken.keys() == {"auto", "xla"} and min(taken.values()) > 0
    monkeypatch.setattr(attention_choice, "_SHARE", -1)  # too little memory for XLA's
    assert attention_choice.measure(settings, mesh) == {}


@pytest.mark.slow
def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run(tiny(llamagen, num_steps=1, sample_every=0), "~/first")
    lines = run(tiny(llamagen, num_steps=1, sample_every=0, init_from="~/first"), "~/second")
    assert any("began with the weights of ~/first" in line for line in lines)
    assert {"first", "second"} <= {path.name for path in tmp_path.iterdir()}


def tiny_codes(folder, module, crops, **fields):
    """ImageNet's recipe on 40 records of 4x4 tokens, 16 in the vocabulary, of 4 classes."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (40, crops, 16)).astype(np.uint16)
    folder.mkdir()
    packed = [records.pack_record(codes[k], k % 4, f"{k}") for k in range(40)]
    records.write_shard(folder / "codes-0.array_record", packed)
    config = module.get_config("imagenet_b")
    config.update(batch_size=8, log_every=1)
    config.model.update(helpers.TINY_MODEL, size="", num_classes=4, grid=(4, 4))
    config.tokenizer.image_size = 64
    config.sample.classes = 4
    config.data.update(path=str(folder), num_workers=0)
    config.update(fields)
    return config


@pytest.mark.slow
def test_trains_on_shards_of_codes(tmp_path):
    config = tiny_codes(tmp_path / "codes", mirai_e, crops=10, num_steps=3)
    config.foresight[0].update(projector_width=16, start_epoch=0.2)
    lines = run(config, tmp_path / "run")
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
    config = tiny_codes(tmp_path / "codes", llamagen, crops=2, num_steps=40, sample_every=0)
    run(config, tmp_path / "whole")

    def kill_at(steps):
        def log(line):
            if any(line.startswith(f"step {step:>2}/") for step in steps):
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)

        return log

    config.data.num_workers = 1
    run(config, tmp_path / "killed", log=kill_at([2]))
    assert without_speed(tmp_path / "killed") == without_speed(tmp_path / "whole")
    message = capfd.readouterr().err
    assert "data worker 0 of 1" in message and "exit code -9" in message
    assert '"worker_died"' in (tmp_path / "killed" / "events.jsonl").read_text()
    with pytest.raises(DataError, match="data worker 0 of 1"):
        run(config, tmp_path / "dying", log=kill_at(range(40)))


@pytest.mark.parametrize("at, saved", [("step", 2), ("_show", 3)])
def test_what_may_need_more_memory_comes_after_a_checkpoint(tmp_path, monkeypatch, at, saved):
    """The program of a foresight term that starts, and the first samples."""
    real = getattr(train.GeneratorTask, at)

    def too_much(self, *arguments):
        if at == "step" and not any(arguments[-1]):
            return real(self, *arguments)
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(train.GeneratorTask, at, too_much)
    with pytest.raises(TrainingError, match="batch_size.* need less"):
        run(tiny(sample_every=3, checkpoint_every=8), tmp_path)
    names = [path.name for path in (tmp_path / "checkpoints").glob("step_*")]
    assert max(names) == f"step_{saved}"


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path):
    config = tiny(llamagen, log_every=8, checkpoint_every=2)
    config.optimizer.update(learning_rate=1e30, warmup_steps=0, clip_norm=0.0)
    with pytest.raises(TrainingError, match="at step 2, with the records ") as error:
        run(config, tmp_path)
    assert "no step yet" in str(error.value)
    message = json.loads((tmp_path / "nonfinite_step_0000002.json").read_text())
    assert len(message["records"]) == 16 and str(message["records"][0]) in str(error.value)
    assert not list((tmp_path / "checkpoints").glob("step_*"))


@pytest.mark.slow
def test_asked_to_stop_it_saves_and_resumes_without_repeating_a_step(tmp_path, finished):
    """As a cluster asks: by SIGTERM."""
    steps = []

    def sigterm_at(step):
        def log(line):
            steps.append(line)
            if line.startswith(f"step {step}/"):
                os.kill(os.getpid(), signal.SIGTERM)

        return log

    for at in (1, 3, 6):  # between checkpoints, and before one
        with pytest.raises(Preempted) as error:
            run(tiny(), tmp_path, log=sigterm_at(at))
        assert error.value.status == 75
    run(tiny(), tmp_path, log=steps.append)
    shown = [int(line.split("/")[0].split()[1]) for line in steps if line.startswith("step ")]
    assert shown == list(range(1, 9))
    assert_same_run(tmp_path, finished(mirai_e)[0])
    events = (tmp_path / "events.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["event"] for line in events]
    kinds = [kind for kind in kinds if kind != "message"]
    assert kinds == ["started", *["preempted", "resumed"] * 3, "finished"]


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(copied, finished):
    for file in (copied / "checkpoints" / "step_8" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:7])
    (copied / "summary.png").unlink()
    lines = run(tiny(llamagen), copied)
    assert any(line.startswith("step 8 is damaged") for line in lines)
    assert any("resumed at step 4 of 8" in line for line in lines)
    assert_same_run(copied, finished(llamagen)[0])


def test_begins_with_the_weights_of_another_run(tmp_path, finished):
    folder, _ = finished(mirai_e)
    first = restore_weights(folder / "checkpoints")[0]

    def begun(name, module):
        """After a step that moves nothing but the EMA, towards the parameters."""
        config = tiny(module, num_steps=1, init_from=str(folder))
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

    _, heads = begun("same", mirai_e)
    jax.tree.map(np.testing.assert_array_equal, heads, first["params"]["foresight"])
    line, heads = begun("other", mirai_i)
    assert "fresh foresight heads" in line and set(heads) == {"bidirectional"}
    config = tiny(mirai_e, init_from=str(folder))
    config.model.num_layers = 3
    with pytest.raises(ConfigError, match=r"init_from is .* num_layers is 2"):
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
    assert (tmp_path / "nonfinite_step_0000002.json").exists()
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
        return memory_plan.compile_step(schema.read(config, 8), jax.devices()).plan

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
