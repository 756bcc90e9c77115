"""Assessment: what its numbers mean, and that a stopped one resumes."""

import json

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import mirai_e, mirai_i
from mirai_jax.config import schema
from mirai_jax.evaluation import assessments, probe, runs
from mirai_jax.evaluation.runs import Protocol
from mirai_jax.models.generator import Generator, GeneratorConfig, init_params
from mirai_jax.training import restore, train
from mirai_jax.utils.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = GeneratorConfig(
    num_layers=2, num_heads=2, width=32, vocab_size=16, num_classes=10, grid=(4, 4), dtype="float32"
)
QUICK = Protocol(samples=60, pixels=32, held_out=50)


@pytest.fixture(scope="module")
def params():
    made = init_params(CONFIG, jax.random.key(0))
    made["output"]["kernel"] = jax.random.normal(jax.random.key(1), made["output"]["kernel"].shape)
    return made


def codes_and_labels(count):
    rng = np.random.RandomState(count)
    return rng.randint(16, size=(count, 16)), rng.randint(10, size=count)


@pytest.mark.parametrize("count", [7, 250, 251])
def test_cross_entropy_is_the_mean_over_all_images_and_tokens(params, count):
    codes, labels = codes_and_labels(count)
    logits, _ = Generator(CONFIG).apply({"params": params}, codes[:, :-1], labels)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, codes).mean()
    got = runs.cross_entropy(CONFIG, params, codes, labels)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


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


@pytest.fixture(scope="module")
def lines():
    """What the assessor has logged."""
    return []


@pytest.fixture(scope="module")
def assessor(workdir, lines):
    """One for all tests: its classifier takes long."""
    return runs.Assessor(restore.read_settings("", str(workdir)), QUICK, lines.append)


@pytest.mark.slow
def test_what_the_teacher_knows_of_the_class(workdir, assessor, lines):
    config = mirai_i.get_config("demo")
    config.teacher.image_size = 32
    of_teacher = lambda: assessor.of_teacher(schema.read(config, num_devices=1))
    assert 0.5 < of_teacher()["teacher_probe"] <= 1
    # Without its encoder the other measures are still assessed.
    config.teacher.update(name="dinov2", path="gone", image_size=0)
    assert of_teacher() == {}
    assert "no probe of the teacher: teacher.path" in lines[-1]
    assert assessor.of_teacher(restore.read_settings("", str(workdir))) == {}  # Mirai-E has none


@pytest.mark.slow
def test_a_stopped_assessment_resumes(workdir, assessor, capsys, monkeypatch):
    monkeypatch.setattr(assessments, "Assessor", lambda *args: assessor)
    assessments.assess([str(workdir)], "kept", QUICK)
    whole = (workdir / assessments.FILE).read_text()
    entries = assessments.read(workdir)
    assert [e["step"] for e in entries] == [2, 4]
    assert all(e["protocol"]["samples"] == 60 for e in entries)
    for entry in entries:
        assert 0 < entry["cross_entropy"] < np.log(16) + 0.1
        assert entry["frechet"] > 0
        assert 0 <= entry["agreement"] <= 1
        assert entry["real_agreement"] > 0.5  # ten classes: it does see digits
        assert 0 < entry["real_frechet"] < entry["frechet"]
        assert entry["real_frechet"] < entry["real_frechet_images"]  # the tokenizer's error
        assert entry["frechet_images"] > 0
    assert "probe" not in entries[0] and "teacher_probe" not in entries[1]
    assert set(entries[1]["probe"]) == {"1", "2"}
    assert all(0 <= a <= 1 for row in entries[1]["probe"].values() for a in row)

    (workdir / assessments.FILE).write_text(whole.splitlines(keepends=True)[0] + '{"step": 4, "pro')
    assessments.assess([str(workdir)], "kept", QUICK)
    assert (workdir / assessments.FILE).read_text() == whole

    monkeypatch.setattr(assessments, "Assessor", None)  # nothing is left to do
    assessments.assess([str(workdir)], "kept", QUICK)
    assert (workdir / assessments.FILE).read_text() == whole
    assert "0 checkpoints of 1 runs to assess" in capsys.readouterr().out


def test_another_protocol_is_another_line(workdir):
    line = json.dumps({"step": 4, "protocol": vars(QUICK)}) + "\n"
    (workdir / assessments.FILE).write_text(line)
    assert assessments.missing(workdir, [2, 4], QUICK) == [2]
    assert assessments.missing(workdir, [2, 4], Protocol(samples=61)) == [2, 4]


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


def test_a_run_without_held_out_images_is_refused(workdir):
    settings = restore.read_settings("--workdir", str(workdir))
    data = settings.data.__class__(**{**vars(settings.data), "held_out": 0})
    with pytest.raises(DataError, match="data.held_out"):
        runs.Assessor(settings.__class__(**{**vars(settings), "data": data}), QUICK, print)
