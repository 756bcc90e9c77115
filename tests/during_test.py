"""What a run measures while it trains is what its checkpoints give afterwards, whatever stops it."""

import contextlib
import dataclasses
import itertools
import json
import re
import types

import helpers
import jax
import numpy as np
import optax
import pytest

from configs import llamagen, mirai_e, mirai_i
from mirai_jax import evaluate, sample
from mirai_jax import step as step_lib
from mirai_jax.config import schema
from mirai_jax.evaluation import assessments, drawn, during, runs, samples, small, validation
from mirai_jax.evaluation.image_streams import of_array
from mirai_jax.evaluation.runs import Request
from mirai_jax.models.generator import Generator, init_params
from mirai_jax.training import components, guards, restore, train
from mirai_jax.training.metrics_writer import read_metrics
from mirai_jax.utils import distributed
from mirai_jax.utils.errors import DataError, Preempted
from mirai_jax.weights import inception, pretrained, torch_writer

pytestmark = pytest.mark.usefixtures("quick_compilation")

MEASURED = "validation_", "frechet_efficientnet_lite0", "efficientnet_lite0_"
# The average is a short one, so that a few steps change the samples.
EVERY = {
    "ema_decay": 0.5,
    "validate_every": 2,
    "evaluate_every": 4,
    "evaluate_samples": 70,
    "checkpoint_every": 4,
}


@pytest.fixture
def quick_network(monkeypatch):
    for module in (during, runs, samples):
        monkeypatch.setattr(module, "Network", helpers.QuickNetwork)


def measured(entry):
    """The measurements of a line, without their seconds."""
    return {k: v for k, v in entry.items() if k.startswith(MEASURED) and not k.endswith("seconds")}


def run(config, folder, log=lambda line: None):
    train.train(config, folder, devices=jax.devices()[:1], log=log, measurer=during.Measurer)
    return {entry["step"]: measured(entry) for entry in read_metrics(folder)}


def config_of(**fields):
    return helpers.tiny(mirai_e, keep_every=4, log_every=3, sample_every=0, **{**EVERY, **fields})


def program(module, *arguments):
    module._FLAGS.unparse_flags()
    module.main(module._FLAGS([module.__name__, *map(str, arguments)]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick_compilation):
    """A run's folder, and what each line of its metrics has measured."""
    folder = tmp_path_factory.mktemp("during") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(during, "Network", helpers.QuickNetwork)
        return folder, run(config_of(), folder)


def test_the_steps_asked_for_are_measured_and_logged(finished):
    folder, lines = finished
    assert list(lines) == [1, 2, 3, 4, 6, 8]
    heads = {f"validation_foresight_ema_{offset}" for offset in ("r0c0", "r0c1", "r1c0")}
    for step, found in lines.items():
        assert ("validation_cross_entropy" in found) == (step % 2 == 0)
        assert (heads <= found.keys()) == (step % 2 == 0)
        assert ("frechet_efficientnet_lite0" in found) == (step % 4 == 0)
    assert lines[4]["frechet_efficientnet_lite0"] != lines[8]["frechet_efficientnet_lite0"]
    texts = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(texts) == len(lines)  # one line a step
    assert all(json.loads(text)["loss"] > 0 for text in texts)


def test_a_checkpoint_gives_the_same_digits_afterwards(
    finished, quick_network, monkeypatch, capsys
):
    folder, lines = finished
    monkeypatch.setattr(small, "class_accuracy", lambda *_: 1.0)
    program(evaluate, f"--workdir={folder}")
    entries = assessments.read(folder)
    assert [entry["step"] for entry in entries] == [4, 8]
    assert [measured(entry) for entry in entries] == [lines[4], lines[8]]
    for entry in entries:
        assert entry["protocol"]["samples"] == 70 and entry["protocol"]["guidance"] == 2.0
        assert entry["class_accuracy"] == 1 and entry["frechet"] > entry["real_frechet"]

    before = (folder / "assessment.jsonl").read_text()
    program(evaluate, f"--workdir={folder}")
    assert (folder / "assessment.jsonl").read_text() == before
    assert "0 measurements of 1 runs to make" in capsys.readouterr().out


def mean_by_position(folder):
    """Of the EMA, of the last line of positions.jsonl."""
    *_, entry = assessments.read(folder, "positions.jsonl")
    return np.mean(entry["ema"])


def test_positions_have_the_mean_of_the_validation(finished):
    folder, lines = finished
    program(evaluate, f"--workdir={folder}", "--positions")
    wanted = lines[8]["validation_cross_entropy"]
    np.testing.assert_allclose(mean_by_position(folder), wanted, rtol=1e-6)


@pytest.mark.slow
def test_so_do_sample_and_evaluate(finished, quick_network, tmp_path):
    """As a user would do it by hand, on as many devices as there are."""
    folder, lines = finished
    out = tmp_path / "samples"
    program(sample, f"--workdir={folder}", "--step=4", "--num_images=70", f"--out={out}")
    program(evaluate, f"--samples={out}", f"--reference=data:{folder}:held_out")
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert row["metrics"].items() <= lines[4].items()


@pytest.mark.parametrize(
    "stop_at, step",
    [
        pytest.param("samples from", 4, marks=pytest.mark.slow),
        ("the held-out images", 6),  # which has no checkpoint yet
        pytest.param("the held-out images", 4, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_measurement_is_made_once(
    finished, quick_network, tmp_path, monkeypatch, stop_at, step
):
    """A notice in the middle of a step's measurements."""
    config, heartbeat, reached = config_of(), guards.HangGuard.heartbeat, [False]

    def beat(self, what):
        heartbeat(self, what)
        reached[0] |= what.startswith(stop_at) and entries() == step

    entries = lambda: max((entry["step"] for entry in read_metrics(tmp_path)), default=0)
    with monkeypatch.context() as patch:
        patch.setattr(guards.HangGuard, "heartbeat", beat)
        patch.setattr(guards.Preemption, "reached", lambda self: reached[0])
        with pytest.raises(Preempted, match=f"step {step} is saved"):
            run(config, tmp_path)
    (*_, last) = read_metrics(tmp_path)
    assert last["step"] == step and last["loss"] > 0
    assert ("validation_cross_entropy" in last) == (stop_at == "samples from")
    assert "frechet_efficientnet_lite0" not in last
    calls, measure = [], during.Measurer.measure

    def counted(self, kind, state, heartbeat):
        calls.append((kind, int(state.step)))
        return measure(self, kind, state, heartbeat)

    monkeypatch.setattr(during.Measurer, "measure", counted)
    assert run(config, tmp_path) == finished[1]
    first = [("validation", step)] if stop_at == "the held-out images" else []
    rest = [("evaluation", 4), ("validation", 6)] if step == 4 else []
    assert calls == [*first, *rest, ("validation", 8), ("evaluation", 8)]
    texts = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(text)["step"] for text in texts] == [1, 2, 3, 4, 6, 8]


@pytest.mark.slow
def test_without_measurements_a_run_is_what_it_was(finished, tmp_path):
    off = {"validate_every": 0, "evaluate_every": 0}
    config = config_of(**off)
    train.train(config, tmp_path, devices=jax.devices()[:1], log=lambda line: None)
    one, other = (restore.restore_weights(f / "checkpoints")[0] for f in (finished[0], tmp_path))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    again = {e["step"]: e["loss"] for e in read_metrics(tmp_path)}
    assert again.items() <= {e["step"]: e["loss"] for e in read_metrics(finished[0])}.items()
    assert list(again) == [1, 3, 6, 8]


@pytest.fixture(scope="module")
def held_out():
    """Settings, weights and codes of seven images."""
    config = helpers.tiny(llamagen)
    config.model.update(num_classes=10)
    settings, rng = schema.read(config, 1), np.random.RandomState(0)
    params = init_params(settings.generator, jax.random.key(0))
    shape = params["output"]["kernel"].shape
    params["output"]["kernel"] = jax.random.normal(jax.random.key(1), shape)
    codes = rng.randint(16, size=(71, settings.generator.length))
    images = validation.HeldOut(codes, rng.randint(10, size=71))
    saved = {"params": {"generator": params, "foresight": {}}, "ema": params}
    return settings, saved, images


def test_the_loss_of_each_head_is_that_of_the_step():
    settings, rng = schema.read(helpers.tiny(mirai_e), 1), np.random.RandomState(0)
    recipe = components.make_recipe(settings, settings.terms, (), None, None, 1)
    params = step_lib.init_params(recipe, jax.random.key(0))
    ema = jax.tree.map(lambda x: x + 0.02 * rng.normal(size=x.shape), params["generator"])
    codes, labels = rng.randint(16, size=(5, 64)), rng.randint(10, size=5)
    batch = {"codes": codes, "label": labels}

    def whole_batch(params, ema):
        targets = step_lib.teacher_targets(recipe, ema, {}, batch, recipe.terms)
        active = (True,) * len(recipe.terms)
        return step_lib.loss_fn(params, recipe, targets, batch, 0, active, None)[1]

    wanted = jax.jit(whole_batch)(params, ema)
    images = validation.HeldOut(codes, labels)
    made = validation.Validation(settings, images, None, print, jax.devices()[:1])
    found = made.measure({"params": params, "ema": ema})
    heads = [name for name in wanted if name.startswith("foresight")]
    assert len(heads) == 3
    for name in heads:
        np.testing.assert_allclose(found[f"validation_{name}"], wanted[name], rtol=1e-4)


def test_shards_give_the_share_that_is_not_trained_on(tmp_path):
    from data_test import write_shards

    from mirai_jax.data import records

    write_shards(tmp_path, (20, 20), crops=4)
    sizes = {"grid": (2, 3), "vocab_size": 512, "num_classes": 5}
    settings = schema.read(helpers.tiny(llamagen), 1)
    data = dataclasses.replace(settings.data, name="images", path=str(tmp_path), held_out_share=0.3)
    generator = dataclasses.replace(settings.generator, **sizes)
    settings = dataclasses.replace(settings, data=data, generator=generator)
    of_run = lambda *given: validation.of_run(settings, *given)
    rest = None, None, None, tuple("01234")
    trained_on, held_out = records.CodeRecords(str(tmp_path), **sizes).split(0.3)
    numbers = [trained_on[k]["codes"][0, 0] // 8 for k in range(len(trained_on))]
    got = of_run("", *rest)
    assert sorted([*numbers, *(got.codes[:, 0] // 8)]) == list(range(40))
    assert (got.codes[:, 0] % 8 == 1).all() and (got.labels == got.codes[:, 0] // 8 % 5).all()
    assert (of_run("", *rest, held_out).codes == got.codes).all()  # not read again
    assert len(of_run(str(tmp_path), *rest, held_out).labels) == 40  # whole shards that are named
    # Under a tokenizer: of shards packed under its name alone nothing else is known.
    for tokenizer, known in (({"file": "vq16"}, False), ({"checksum": "of another"}, True)):
        fields = {"tokenizer": tokenizer, "class_names": rest[-1]}
        held_out.manifest = types.SimpleNamespace(**fields)
        with pytest.raises(DataError, match="another") if known else contextlib.nullcontext():
            again = of_run("", None, None, {"weights": np.ones(3)}, rest[-1], held_out)
            assert (again.codes == got.codes).all()


@pytest.mark.parametrize("devices", [1, 3])
def test_cross_entropy_is_the_mean_over_all_images_and_tokens(held_out, devices):
    settings, saved, images = held_out
    logits, _ = Generator(settings.generator).apply(
        {"params": saved["ema"]}, images.codes[:, :-1], images.labels
    )
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, images.codes)
    some = jax.devices()[:devices]
    for count in (8, 71):
        got = validation.Validation(settings, images.some(count), None, print, some).measure(saved)
        assert list(got) == ["validation_cross_entropy"]
        wanted = nll[:: 70 // (count - 1)].mean()  # of images from the first to the last
        np.testing.assert_allclose(got["validation_cross_entropy"], wanted, rtol=1e-5)


def test_processes_share_the_work_and_sums_do_not_depend_on_them(held_out, monkeypatch):
    settings, saved, images = held_out
    measure = lambda: validation.Validation(
        settings, images, None, print, jax.devices()[:1]
    ).measure(saved)
    alone = measure()
    rows = {}

    def of_process(index, count, gather):
        calls = itertools.count()
        monkeypatch.setattr(jax, "process_count", lambda: count)
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(distributed, "of_all", lambda x: gather(next(calls), x))
        return measure()

    for index in range(2):
        of_process(index, 2, lambda call, x, index=index: rows.setdefault((call, index), x))
    together = of_process(0, 2, lambda call, _: np.concatenate([rows[call, 0], rows[call, 1]]))
    assert together == alone


def test_the_run_hears_of_every_part_of_an_evaluation():
    """Inception over thousands of reference images may take longer than `hang_limit`."""
    made, lines = helpers.QuickNetwork("", 8, devices=jax.devices()[:1]), []
    images = np.random.RandomState(0).randint(256, size=(20, 4, 4, 3)).astype(np.uint8)
    found = samples.Reference("real", False, of_array("real", images)).features(made, lines.append)
    assert lines == [f"real from {start} of 20 on" for start in (0, 8, 16)]
    lines.clear()
    samples.compare(False, found, found, lines.append)
    assert len(lines) == 5  # two metrics, the neighbours in both sets, precision and recall


def test_the_others_follow_what_the_first_process_measures_alone(monkeypatch):
    """A heartbeat may stop the run, so that all must call it equally often."""
    monkeypatch.setattr(restore, "whole_generators", lambda *_: {"ema": None})
    monkeypatch.setattr(samples, "compare", lambda *given: {"fid": float(given[-1]("c"))})

    def process(fake, send):
        me, lines = types.SimpleNamespace(_settings=None, _real=None), []
        me._drawn = types.SimpleNamespace(features=lambda *_: fake)
        me._network = types.SimpleNamespace(is_inception=True)
        me._reference = types.SimpleNamespace(features=lambda _, beat: (beat("a"), beat("b")))
        monkeypatch.setattr(distributed, "from_first", send)
        state = types.SimpleNamespace(params=(), ema=())
        return during.Measurer.measure(me, "evaluation", state, lines.append), lines

    sent = []
    found, lines = process("features", lambda x: (sent.append(x), x)[1])
    assert found == {"fid": 1.0} and lines[1:] == ["a", "b", "c"]
    rest = iter(sent)
    found, others = process(None, lambda _: next(rest))
    assert found == {} and len(others) == len(lines) and not list(rest)


def test_a_term_that_cannot_be_measured_is_left_out_with_a_line(held_out):
    _, _, images = held_out
    config, lines = helpers.tiny(mirai_e), []
    config.foresight = (*config.foresight, *helpers.tiny(mirai_i).foresight)
    validation.Validation(schema.read(config, 1), images, None, lines.append, jax.devices()[:1])
    (line,) = lines
    assert "no validation of the foresight term bidirectional" in line


def test_the_runs_own_protocol_is_the_default():
    config = helpers.tiny(mirai_e, evaluate_guidance=1.5, evaluate_samples=9, validation_path="x")
    settings = schema.read(config, 1)
    (protocol,) = Request().protocols(settings, "")
    assert protocol == drawn.protocol_of(settings) and protocol.validation == "x"
    assert (protocol.options.guidance, protocol.samples) == (1.5, 9)
    several = Request(guidance=(1.0, 3.0)).protocols(settings, "")
    assert [p.to_dict()["guidance"] for p in several] == [1.0, 3.0]


@pytest.mark.slow
def test_on_a_folder_with_a_tokenizer_and_shards(tmp_path):
    """A folder of pictures through a narrow VQ: extracted, trained on, measured in each way."""
    from folder_test import draw

    for name in ("a", "bb"):
        draw(tmp_path / "images", name, 24, size=(32, 32))
        draw(tmp_path / "val", name, 9, size=(32, 32))
    tokenizer = helpers.vq_file(tmp_path)
    for name in ("images", "val"):
        helpers.output(
            "mirai_jax.extract", f"--images={tmp_path / name}", f"--tokenizer={tokenizer}",
            f"--out={tmp_path / 'codes' / name}", "--image_size=32",
        )  # fmt: skip
    # Each in a new process: XLA rounds by its flags, which differ in this one.
    fields = {
        "num_steps": 4, "batch_size": 16, "checkpoint_every": 2, "keep_every": 2, "sample_every": 0,
        "validate_every": 2, "evaluate_every": 4, "evaluate_samples": 8,
        "validation_path": tmp_path / "codes" / "val", "evaluate_reference": tmp_path / "val",
        "data.name": "images", "data.path": tmp_path / "codes" / "images", "model.num_classes": 2,
        "tokenizer.name": "vq", "tokenizer.path": tokenizer, "optimizer.warmup_steps": 2,
        "model.grid": "(16, 16)", "foresight[0].projector_width": 16,
    }  # fmt: skip
    folder, flags = tmp_path / "run", [f"--config.{name}={value}" for name, value in fields.items()]
    arguments = "--config=configs/mirai_e.py", f"--workdir={folder}", *helpers.TINY
    arguments = *arguments, "--config.model.vocab_size=24", *flags
    helpers.output("mirai_jax.main", *arguments, **helpers.QUICK)
    lines = {entry["step"]: measured(entry) for entry in read_metrics(folder)}
    assert lines[4].keys() > {"validation_cross_entropy", "validation_foresight_ema_r0c0"}
    helpers.output("mirai_jax.evaluate", f"--workdir={folder}", "--num_samples=8", **helpers.QUICK)
    before, entry = assessments.read(folder)
    assert measured(entry) == lines[4]
    assert lines[2].items() <= measured(before).items()
    out = tmp_path / "samples"
    by_hand = f"--workdir={folder}", "--num_images=8", f"--out={out}"
    helpers.output("mirai_jax.sample", *by_hand, **helpers.QUICK)
    reference = f"--reference={tmp_path / 'val'}"
    helpers.output("mirai_jax.evaluate", f"--samples={out}", reference, **helpers.QUICK)
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert "frechet_efficientnet_lite0" in row["metrics"]
    assert row["metrics"].items() <= lines[4].items()
    # Without other shards: a share of those to train on.
    share = [f"--config.{f}=" for f in ("validation_path", "evaluate_reference")]
    share += ["--config.data.held_out_share=0.3", "--config.evaluate_every=0"]
    log = helpers.output(
        "mirai_jax.main", *arguments, f"--workdir={tmp_path / 'b'}", *share, **helpers.QUICK
    )
    helpers.output("mirai_jax.evaluate", f"--workdir={tmp_path / 'b'}", **helpers.QUICK)
    *_, line = read_metrics(tmp_path / "b")
    *_, entry = assessments.read(tmp_path / "b")
    assert measured(entry) == measured(line) and measured(line).keys() <= lines[4].keys()
    flags = f"--workdir={tmp_path / 'b'}", "--positions"
    helpers.output("mirai_jax.evaluate", *flags, **helpers.QUICK)
    wanted = measured(line)["validation_cross_entropy"]
    np.testing.assert_allclose(mean_by_position(tmp_path / "b"), wanted, rtol=1e-6)
    counts = re.search(r"data: images, (\d+) images(?s:.*)validation: (\d+) images", log).groups()
    assert sum(map(int, counts)) == 48 and min(map(int, counts)) > 0
    # Codes of other classes would be another number.
    (tmp_path / "codes" / "val" / "manifest.json").write_text(
        (tmp_path / "codes" / "val" / "manifest.json").read_text().replace('"bb"', '"cc"')
    )
    message = helpers.error_line("mirai_jax.main", *arguments, f"--workdir={tmp_path / 'other'}")
    assert "validation_path is" in message and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_inception_gives_the_same_digits_in_each_way(tmp_path, monkeypatch):
    """FID of random weights: in a run, of its checkpoint, and of samples drawn by hand."""
    import inception_test

    file, devices = tmp_path / "inception.pth", jax.devices()[:1]
    names = [line.split(" ") for line in str(inception_test.DATA["names"]).splitlines()]
    shapes = {name: tuple(map(int, filter(None, shape.split(",")))) for name, shape in names}
    torch_writer.write(file, {n: inception_test.random_array(n, s) for n, s in shapes.items()})
    # As if it were the published file.
    monkeypatch.setattr(inception, "SHA256_START", pretrained.sha256_of_file(file)[:8])
    monkeypatch.setattr(drawn, "ROWS", 8)  # images at once: few, so that few are filled up
    monkeypatch.setattr(jax, "local_devices", lambda **_: devices)
    config = config_of(num_steps=4, evaluate_samples=13, evaluate_inception=str(file))
    config.data.held_out, folder = 20, tmp_path / "run"
    train.train(config, folder, devices=devices, log=lambda line: None, measurer=during.Measurer)
    (*_, line) = read_metrics(folder)
    names = "fid", "sfid", "inception_score", "inception_score_std", "precision", "recall"
    in_run = {name: line[name] for name in names}
    assert in_run["fid"] > 0 and in_run["inception_score"] > 1
    program(evaluate, f"--workdir={folder}")
    (entry,) = assessments.read(folder)
    assert in_run.items() <= entry.items()
    out = tmp_path / "samples"
    by_hand = f"--workdir={folder}", "--num_images=13", f"--out={out}", "--batch_size=8"
    program(sample, *by_hand)
    reference = f"--reference=data:{folder}:held_out", f"--inception={file}", "--batch_size=8"
    program(evaluate, f"--samples={out}", *reference)
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert row["metrics"] == in_run
