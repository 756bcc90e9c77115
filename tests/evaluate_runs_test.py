"""Measuring the checkpoints of runs: probes, and that what is there is not measured again."""

import dataclasses
import itertools
import json
import os
import shutil

import helpers
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import mirai_e, mirai_i
from mirai_jax.config import compare, schema
from mirai_jax.data.small_sets import LabelledImages
from mirai_jax.evaluation import assessments, future, positions, probe, runs, small, sweep
from mirai_jax.evaluation.metrics import Moments
from mirai_jax.evaluation.runs import Request
from mirai_jax.evaluation.small import SmallSet
from mirai_jax.models.generator import Generator, GeneratorConfig, init_params
from mirai_jax.training import components, restore, train
from mirai_jax.utils.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = GeneratorConfig(
    num_layers=2, num_heads=2, width=32, vocab_size=16, num_classes=10, grid=(4, 4), dtype="float32"
)
QUICK = Request(samples=60, guidance=(1.0, 2.0), pixels=32, held_out=50)


@pytest.fixture(scope="module")
def params():
    made = init_params(CONFIG, jax.random.key(0))
    made["output"]["kernel"] = jax.random.normal(jax.random.key(1), made["output"]["kernel"].shape)
    return made


def codes_and_labels(count):
    rng = np.random.RandomState(count)
    return rng.randint(16, size=(count, 16)), rng.randint(10, size=count)


def test_probed_states_know_the_tokens_so_far_and_no_label(params):
    codes, _ = codes_and_labels(3)
    found = probe.states(CONFIG, params, codes)
    assert {layer: x.shape for layer, x in found.items()} == {1: (3, 4, 32), 2: (3, 4, 32)}
    assert probe.positions(CONFIG) == [4, 8, 12, 15]  # nothing consumes the last token
    later = codes.copy()
    later[:, 8:] = (later[:, 8:] + 1) % 16
    changed = probe.states(CONFIG, params, later)
    for layer in found:
        np.testing.assert_array_equal(changed[layer][:, :2], found[layer][:, :2])
        assert (changed[layer][:, 2:] != found[layer][:, 2:]).any(axis=-1).all()


def test_a_probe_reads_what_is_there_and_nothing_else():
    rng = np.random.RandomState(0)
    labels = rng.randint(4, size=600)
    noise = rng.normal(size=(600, 8))
    signal = noise + 4 * np.eye(4, 8)[labels]
    share = lambda x: probe.accuracy(x[:400], labels[:400], x[400:], labels[400:])
    assert share(signal) > 0.95
    assert share(noise) < 0.4


def test_cross_entropy_by_position(params):
    codes, labels = codes_and_labels(103)  # not a multiple of the images at once
    logits, _ = Generator(CONFIG).apply({"params": params}, codes[:, :-1], labels)
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), codes[..., None], axis=-1)
    found = positions.by_position(CONFIG, params, codes.astype(np.uint16), labels)
    np.testing.assert_allclose(found, -chosen.mean(axis=0).reshape(4, 4), rtol=1e-5)


def test_all_that_reads_held_out_codes_has_precise_products(params):
    """As the validation has, on a TPU too, which multiplies float32 in bfloat16 by default."""
    codes, labels = codes_and_labels(3)
    for lowered in (
        positions._nats.lower(CONFIG, params, codes, labels),
        probe._states.lower(CONFIG, params, codes),
        future._states.lower(CONFIG, params, codes),
    ):
        products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
        assert products and all("HIGH" in line for line in products)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of four steps with two kept checkpoints."""
    folder = tmp_path_factory.mktemp("assess") / "run"
    config = mirai_e.get_config("demo")
    config.update(
        num_steps=4, batch_size=16, sample_every=0, checkpoint_every=2, keep_every=2,
        keep_checkpoints=1, judged_samples=0,
    )  # fmt: skip
    config.model.update(num_layers=2, num_heads=2, width=32, vocab_size=16, unroll=1)
    config.optimizer.update(warmup_steps=2)
    config.sample.update(classes=2, per_class=1)
    config.foresight[0].update(projector_width=16)
    train.train(config, folder, devices=jax.devices()[:1], log=lambda line: None)
    return folder


def test_the_limit_of_class_accuracy_is_that_of_all_classes(monkeypatch):
    """Data may be sorted by class; here the tokenizer spoils every class but the first two."""
    labels = np.arange(100) // 10
    images = np.stack([np.full((8, 8, 1), 25 * label, np.uint8) for label in labels])
    monkeypatch.setattr(small.batched, "encode_images", lambda *given: given[2])
    monkeypatch.setattr(small.batched, "decode_codes", lambda *given: np.minimum(given[2], 25))
    made = LabelledImages(images, labels, tuple("0123456789"))

    def moments(images):
        found = Moments()
        found.add(images.reshape(len(images), -1)[:, :2])
        return found

    *_, found = SmallSet(made, made, print).limits(None, None, 20, moments)
    assert found["real_class_accuracy"] == 0.2


@pytest.mark.slow
def test_what_the_teacher_knows_of_the_class():
    config, lines = mirai_i.get_config("demo"), []
    config.teacher.image_size = 32
    settings = schema.read(config, num_devices=1)
    split = lambda which: components.labelled_images(settings, which)
    generator = dataclasses.replace(settings.generator, class_dropout=0.0)  # no probe of states
    probes = lambda settings: SmallSet(split("train"), split("held_out"), lines.append).probes(
        dataclasses.replace(settings, generator=generator), None, None, None, 50
    )
    found = probes(settings)
    assert 0.5 < found["teacher_probe"] <= 1 and found["probe"] == {}
    # Without its encoder the other measures are still there.
    config.teacher.update(name="dinov2", path="gone", image_size=0)
    assert probes(schema.read(config, num_devices=1)) == {"probe": {}}
    assert "no probe of the teacher: teacher.path" in lines[-1]


@pytest.mark.slow
def test_what_is_there_is_not_measured_again(workdir, capsys, monkeypatch):
    monkeypatch.setattr(runs, "Network", helpers.QuickNetwork)
    assessments.assess([str(workdir)], "kept", QUICK)
    whole = (workdir / assessments.FILE).read_text()
    entries = assessments.read(workdir)
    steps = [(e["step"], e["protocol"]["guidance"]) for e in entries]
    assert steps == [(2, 1.0), (2, 2.0), (4, 1.0), (4, 2.0)]
    for entry in entries:
        assert entry["protocol"]["samples"] == 60
        assert 0 < entry["validation_cross_entropy"] < np.log(16) + 0.1
        assert entry["frechet"] > 0 and entry["frechet_classifier"] > 0
        assert "real_frechet_classifier" not in entry  # it was fitted to all of the few images
        assert 0 <= entry["class_accuracy"] <= 1
        assert entry["real_class_accuracy"] > 0.5  # ten classes: it does see digits
        assert 0 < entry["real_frechet"] < entry["frechet"]
        assert entry["real_frechet"] < entry["real_frechet_images"]  # the tokenizer's error
        assert "probe" not in entry

    (workdir / assessments.FILE).write_text(whole.splitlines(keepends=True)[0] + '{"step": 4, "pro')
    assessments.assess([str(workdir)], "kept", QUICK)
    assert (workdir / assessments.FILE).read_text() == whole
    # Probes on request: further lines, of the last step alone.
    probed = dataclasses.replace(QUICK, guidance=(1.0,), probes=True)
    assessments.assess([str(workdir)], "kept", probed)
    *before, line = assessments.read(workdir)
    assert before == entries and line.keys() == {"step", "protocol", "probe"}
    assert (line["step"], line["protocol"]) == (4, entries[2]["protocol"])
    assert set(line["probe"]) == {"1", "2"}
    assert all(0 <= a <= 1 for row in line["probe"].values() for a in row)
    whole = (workdir / assessments.FILE).read_text()
    monkeypatch.setattr(runs, "Assessor", lambda *_: None)  # nothing is left to do
    assessments.assess([str(workdir)], "kept", probed)
    assert (workdir / assessments.FILE).read_text() == whole
    assert "0 measurements of 1 runs to make" in capsys.readouterr().out


def test_following_ends_when_the_run_has_died(workdir, tmp_path, monkeypatch, capsys):
    """Not while its owner touches the lock; runs that have not begun, or were preempted, are waited for."""
    config = json.loads((workdir / "config.json").read_text()) | {"num_steps": 8}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "lock.json").touch()
    (tmp_path / "events.jsonl").write_text('{"event": "preempted"}\n')
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            (tmp_path / "config.json").write_text(json.dumps(config))
        if len(waits) < 6:
            os.utime(tmp_path / "lock.json", ns=(len(waits), len(waits)))
        if len(waits) == 8:
            (tmp_path / "events.jsonl").write_text('{"event": "resumed"}\n')
        assert len(waits) < 11

    monkeypatch.setattr(assessments.time, "sleep", sleep)
    monkeypatch.setattr(assessments, "_assess", lambda *_: None)
    assessments.assess([str(tmp_path), str(workdir)], "kept", QUICK, follow=True)
    assert len(waits) == 8
    lines = capsys.readouterr().out.splitlines()
    assert "to begin" in lines[0] and "to begin" in lines[1] and "step 0 of 8" in lines[2]
    assert lines[4:] == [f"nobody is at work in {tmp_path} (step 0 of 8)"]


def test_the_newest_checkpoint_of_a_stopped_run_is_measured(tmp_path, monkeypatch):
    """Not while the run is at work and may delete it: a lock that is touched, not one left behind."""
    config = mirai_e.get_config("demo")
    config.update(num_steps=8, checkpoint_every=1, keep_every=2)
    config.optimizer.warmup_steps = 2
    (tmp_path / "config.json").write_text(compare.to_json(config))
    monkeypatch.setattr(assessments, "steps_in", lambda _: [2, 4, 5])
    request, asked = dataclasses.replace(QUICK, guidance=(1.0,)), []
    monkeypatch.setattr(assessments, "_assess", lambda todo, *_: asked.append(todo[0][2]))

    def steps(which):
        assessments.assess([str(tmp_path)], which, request)
        return [step for step, *_ in asked[-1]]

    assert steps("kept") == [2, 4, 5] and steps("last") == [5]
    (tmp_path / "lock.json").touch()
    assert steps("kept") == [2, 4]
    os.utime(tmp_path / "lock.json", (1, 1))
    assert steps("kept") == [2, 4, 5]


def test_another_protocol_is_another_line(workdir):
    (workdir / assessments.FILE).unlink(missing_ok=True)  # of the slow test
    settings = restore.read_settings("", str(workdir))
    first, second = (p.to_dict() for p in QUICK.protocols(settings, ""))
    whole = {"validation_cross_entropy": 1.0, "frechet_efficientnet_lite0": 9.0}
    for line in ({"step": 4, "protocol": first} | whole, {"step": 2, "protocol": second} | whole):
        with (workdir / assessments.FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")
    missing = lambda request: [
        (step, protocol.to_dict()["guidance"], parts)
        for step, protocol, parts in assessments.missing(str(workdir), settings, [2, 4], request)
    ]
    both = ("validation", "samples")
    assert missing(QUICK) == [(2, 1.0, both), (4, 2.0, both)]
    more = dataclasses.replace(QUICK, probes=True, guidance=(1.0,))
    assert missing(more) == [(2, 1.0, both), (4, 1.0, ("probes",))]
    assert len(missing(dataclasses.replace(QUICK, seed=1))) == 4
    assert "cache_dtype" not in first  # nor in lines of before the option existed
    sample = dataclasses.replace(settings.sample, cache_dtype="int8")
    settings = dataclasses.replace(settings, sample=sample)
    assert len(missing(QUICK)) == 4


def test_lines_of_the_first_held_out_images_are_of_another_protocol():
    """Those of before they were spread over the classes; of all images no order matters."""
    settings = schema.read(mirai_e.get_config("demo"), num_devices=1)
    for request in (Request(held_out=50), positions.PositionsProtocol(50)):
        for count, order in ((50, "spread"), (0, None)):
            (one,) = dataclasses.replace(request, held_out=count).protocols(settings, "")
            assert one.to_dict()["held_out"] == count
            assert one.to_dict().get("held_out_order") == order


def test_what_failed_is_measured_at_the_next_start(workdir, tmp_path, monkeypatch):
    """A file that is missing for a night: not tried again at every look, and not left out for ever."""
    run, tried, waits = tmp_path / "run", [], []
    shutil.copytree(workdir, run)
    (run / assessments.FILE).unlink(missing_ok=True)
    config = json.loads((run / "config.json").read_text()) | {"num_steps": 8}
    (run / "config.json").write_text(json.dumps(config))
    request = dataclasses.replace(QUICK, guidance=(1.0,))

    def sleep(_):
        waits.append(len(waits))
        if len(waits) < 4:  # the run is alive
            (run / "lock.json").touch()
            os.utime(run / "lock.json", ns=(len(waits), len(waits)))

    def fails(*_):
        tried.append(len(waits))
        raise ConfigError("no such file")

    def assess(validate, compare, **how):
        monkeypatch.setattr(runs.Assessor, "_validate", validate)
        monkeypatch.setattr(runs.Assessor, "_compare", compare)
        assessments.assess([str(run)], "kept", request, **how)
        return [(e["step"], *list(e)[2:]) for e in assessments.read(run)]

    monkeypatch.setattr(assessments.time, "sleep", sleep)
    assert assess(fails, fails) == [] and not (run / assessments.FILE).exists()
    tried.clear()
    validated = [(2, "validation_cross_entropy"), (4, "validation_cross_entropy")]
    found = assess(lambda *_: {"validation_cross_entropy": 1.0}, fails, follow=True)
    assert found == validated and tried == [0, 0] and len(waits) > 3
    assert assess(fails, lambda *_: {"fid": 2.0}) == [*validated, (2, "fid"), (4, "fid")]
    tried.clear()
    assert len(assess(fails, fails)) == 4 and not tried


def test_the_best_of_a_sweep_is_that_of_the_last_step_measured(workdir, tmp_path, capsys):
    shutil.copytree(workdir, tmp_path / "run")
    run, rng = str(tmp_path / "run"), np.random.RandomState(0)
    request = dataclasses.replace(QUICK, temperature=(0.8, 1.0), top_k=(0, 5))
    protocols = [p.to_dict() for p in request.protocols(restore.read_settings("", run), run)]
    options = [tuple(p[name] for name in ("guidance", "temperature", "top_k")) for p in protocols]
    assert set(options) == set(itertools.product((1.0, 2.0), (0.8, 1.0), (0, 5)))
    lines = [
        {"step": step, "protocol": protocol, "frechet_efficientnet_lite0": step + rng.rand()}
        | {f"efficientnet_lite0_{name}": rng.rand() for name in ("precision", "recall")}
        for step in (2, 4)
        for protocol in protocols
    ]
    lines[10]["frechet_efficientnet_lite0"] = 3.5
    another = {
        **lines[10],
        "frechet_efficientnet_lite0": 0,
        "protocol": {**protocols[0], "seed": 9},
    }
    text = "".join(json.dumps(line) + "\n" for line in (*lines, another))
    (tmp_path / "run" / assessments.FILE).write_text(text)
    sweep.show(run, request)
    printed = capsys.readouterr().out
    best = dict(zip(("guidance", "temperature", "top_k"), options[2], strict=True))
    assert "step 4" in printed and "3.5 of 8" in printed
    assert all(f"{name} {value:g}" in printed for name, value in best.items())
    with Image.open(tmp_path / "run" / "sweep.png") as figure:
        assert figure.width > 1000
    sweep.show(run, dataclasses.replace(QUICK, guidance=(2.0,)))  # of one there is no best
    assert not capsys.readouterr().out


@given(st.lists(st.binary(max_size=20), max_size=4))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_a_damaged_file_is_named_with_its_line(tmp_path_factory, damage):
    folder = tmp_path_factory.mktemp("damaged")
    good = b'{"step": 1, "protocol": {}}\n'
    (folder / assessments.FILE).write_bytes(good + b"".join(line + b"\n" for line in damage) + good)
    try:
        assert assessments.read(folder)[0] == {"step": 1, "protocol": {}}
    except DataError as error:
        assert f"{assessments.FILE}, line " in str(error)
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("workdirs", [[], ["nowhere"]])
def test_wrong_arguments_are_one_line(workdirs):
    with pytest.raises(ConfigError, match="--workdir"):
        assessments.assess(workdirs, "kept", QUICK)


def test_one_measure_that_cannot_be_had_leaves_the_others(workdir, capsys):
    settings = restore.read_settings("", str(workdir))
    data = dataclasses.replace(settings.data, held_out=0)
    settings = dataclasses.replace(settings, data=data)
    (protocol, _), lines = QUICK.protocols(settings, ""), []
    _, saved, _ = restore.read_run("", str(workdir))
    assessor = runs.Assessor(settings, lines.append)
    assert assessor.measure(settings, str(workdir), saved, protocol) == {}
    assert [line.split("no ")[1].split(":")[0] for line in lines] == ["validation", "samples"]
