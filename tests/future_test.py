"""What states know of the future: known answers, brute force, and the whole program on a tiny run."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from configs import mirai_e
from mirai_jax import evaluate
from mirai_jax.evaluation import future, future_runs
from mirai_jax.training import restore, train

pytestmark = pytest.mark.usefixtures("quick_compilation")

GRID = (4, 5)
LENGTH = 20
WANTED = future.targets(GRID)
NAMES = [target.name for target in WANTED]


def pairs_by_hand(name):
    """[(sequence position, grid position)], from the definition."""
    height, width = GRID
    found = []
    for j in range(1, LENGTH):
        row, column = divmod(j - 1, width)
        if name == "last_row_first":
            found += [(j, (height - 1) * width)] if row < height // 2 else []
        elif name == "last_row_last":
            found += [(j, LENGTH - 1)] if row < height // 2 else []
        else:
            down, right = map(int, name[1:].split("c"))
            row, column = row + down, column + right
            inside = 0 <= row < height and 0 <= column < width
            found += [(j, row * width + column)] if inside else []
    return found


@pytest.mark.parametrize("target", WANTED, ids=NAMES)
def test_each_position_looks_where_the_name_says(target):
    assert list(zip(*target.pairs, strict=True)) == pairs_by_hand(target.name)


def test_a_small_grid_has_fewer_targets():
    assert list(future.TITLES) == NAMES
    assert [target.name for target in future.targets((1, 2))] == ["r0c0", "r0c1"]


def measured(train, test, penalties=future.PENALTIES, parts=3):
    """{kind: {measure: {target: value}}} of one block's (states, values), summed up in parts."""

    def total(x, values):
        some = [{k: v[i::parts] for k, v in values.items()} for i in range(parts)]
        added = [future.sums(x[i::parts], some[i], WANTED) for i in range(parts)]
        return functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), added)

    (x, values), chosen = train, np.arange(len(train[0])) % 5 == 4
    shares = [total(x[c], {k: v[c] for k, v in values.items()}) for c in (~chosen, chosen)]
    fits = future.fit(*shares, WANTED, penalties)
    return future.scores(future.errors(*test, WANTED, *fits), WANTED)


def images(seed, count, make):
    rng = np.random.RandomState(seed)
    y = rng.normal(size=(count, LENGTH, 3)) + 10 * np.arange(LENGTH)[:, None]  # known by position
    return make(rng, y), {"tokens": y.astype(np.float32)}


def test_what_the_states_hold_is_found_and_nothing_else():
    mix = np.random.RandomState(9).normal(size=(3, 8))

    def two_ahead(rng, y):  # the state at j has consumed token j - 1, and holds token j + 1
        return 5 + np.roll(y, -1, axis=1) @ mix + 0.01 * rng.normal(size=(*y.shape[:2], 8))

    found = measured(images(0, 400, two_ahead), images(1, 400, two_ahead))["tokens"]
    assert found["r2"].pop("r0c2") > 0.999
    assert found["cosine"].pop("r0c2") > 0.99
    assert all(abs(value) < 0.02 for value in found["r2"].values()), found["r2"]
    assert all(abs(value) < 0.15 for value in found["cosine"].values())


def test_independent_states_and_the_position_explain_nothing():
    noise = lambda rng, y: rng.normal(size=(*y.shape[:2], 8)) + np.arange(LENGTH)[:, None]
    found = measured(images(0, 300, noise), images(1, 300, noise))["tokens"]["r2"]
    assert all(-0.02 < value < 0.01 for value in found.values()), found


@pytest.mark.parametrize("penalty", [1e-3, 0.3])
def test_the_regressions_are_those_of_sklearn(penalty):
    from sklearn.linear_model import Ridge

    mix = np.random.RandomState(8).normal(size=(3, 6))
    some = lambda rng, y: np.roll(y, 2, axis=1) @ mix + 2 * rng.normal(size=(*y.shape[:2], 6))
    (x, values), (test_x, test_values) = images(2, 30, some), images(3, 20, some)
    found = measured((x, values), (test_x, test_values), [penalty])["tokens"]
    y, test_y = values["tokens"].astype(float), test_values["tokens"].astype(float)
    for name in NAMES:
        here, there = np.array(pairs_by_hand(name)).T
        rows = lambda a, b, at: (a[:, at] - b[:, at].mean(axis=0)).reshape(-1, a.shape[-1])
        fitted, aim = rows(x, x, here), rows(y, y, there)
        alpha = penalty * np.linalg.eigvalsh(fitted.T @ fitted).mean()
        ridge = Ridge(alpha=alpha, fit_intercept=False).fit(fitted, aim)
        predicted, truth = ridge.predict(rows(test_x, x, here)), rows(test_y, y, there)
        r2 = 1 - np.sum((truth - predicted) ** 2) / np.sum(truth**2)
        cosine = [
            p @ t / np.linalg.norm(p) / np.linalg.norm(t)
            for p, t in zip(predicted, truth, strict=True)
        ]
        np.testing.assert_allclose(found["r2"][name], r2, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(found["cosine"][name], np.mean(cosine), rtol=1e-7, atol=1e-9)


def test_the_penalty_is_the_best_on_every_fifth_image():
    weak = lambda rng, y: (
        np.roll(y, -1, axis=1) @ np.ones((3, 6)) + 9 * rng.normal(size=(*y.shape[:2], 6))
    )
    x, values = images(4, 10, weak)
    chosen = np.arange(len(x)) % 5 == 4
    shares = [future.sums(x[c], {"tokens": values["tokens"][c]}, WANTED) for c in (~chosen, chosen)]
    whole = jax.tree.map(np.add, *shares)
    scores = {}
    for penalty in future.PENALTIES:
        _, matrices = future.fit(
            shares[0], jax.tree.map(np.zeros_like, shares[0]), WANTED, [penalty]
        )
        means = {
            "x": shares[0]["x"] / shares[0]["count"],
            "tokens": shares[0]["y"]["tokens"] / shares[0]["count"],
        }
        of = {"tokens": values["tokens"][chosen]}
        found = future.errors(x[chosen], of, WANTED, means, matrices)
        scores[penalty] = found["tokens"][:, 0]
    best = [min(scores, key=lambda p: scores[p][i]) for i in range(len(WANTED))]
    assert len(set(best)) > 1
    _, matrices = future.fit(*shares, WANTED)
    for i, penalty in enumerate(best):
        _, expected = future.fit(whole, jax.tree.map(np.zeros_like, whole), WANTED, [penalty])
        np.testing.assert_array_equal(matrices["tokens"][i], expected["tokens"][i])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two steps."""
    config, folder = mirai_e.get_config("demo"), tmp_path_factory.mktemp("runs") / "e"
    config.update(
        num_steps=2, batch_size=16, sample_every=0, checkpoint_every=2, judged_samples=0
    )  # fmt: skip
    config.model.update(num_layers=2, num_heads=2, width=32, vocab_size=16, unroll=1)
    config.sample.update(classes=2, per_class=1)
    config.teacher.image_size = 32
    config.foresight[0].update(projector_width=16)
    train.train(config, folder, devices=jax.devices()[:1], log=lambda line: None)
    return folder


def run(*arguments):
    evaluate._FLAGS.unparse_flags()
    evaluate.main(evaluate._FLAGS(["evaluate", *arguments]))


@pytest.mark.slow
def test_the_program_measures_each_run_once(workdir, capsys, monkeypatch):
    other = shutil.copytree(workdir, workdir.parent / "other")
    arguments = "--future=40", "--held_out=30", f"--teacher={other}"
    run(f"--workdir={workdir},{other}", *arguments)
    lines = [json.loads((folder / "future.jsonl").read_text()) for folder in (workdir, other)]
    assert lines[0] == lines[1]
    line = lines[0]
    assert line["step"] == 2 and line["teacher"] == "efficientnet_lite0"
    assert line["protocol"] == {"images": 40, "held_out": 30, "teacher": str(other)}
    assert line["ema"] != line["trained"]
    for weights in future_runs.WEIGHTS:
        assert list(line[weights]) == ["0", "1", "2"]
        for kinds in line[weights].values():
            assert set(kinds) == {"tokens", "features"}
            assert all(r2 <= 1 for r2 in kinds["tokens"]["r2"].values())
            assert all(abs(cosine) <= 1 for cosine in kinds["features"]["cosine"].values())
        embedding = line[weights]["0"]["tokens"]["r2"]
        assert embedding["r0c0"] > 0.9 > embedding["r0c1"]  # 16 tokens in 32 numbers: itself
    printed = capsys.readouterr().out
    assert "e, step 2, EMA" in printed and "other, step 2, EMA" in printed
    with Image.open(workdir.parent / "future.png") as picture:
        assert picture.width > 400 and picture.height > 400

    before = (workdir / "future.jsonl").read_bytes()
    monkeypatch.setattr(future, "by_block", None)  # nothing is left to do
    run(f"--workdir={workdir}", *arguments)
    assert (workdir / "future.jsonl").read_bytes() == before
    assert (workdir / "future.png").exists() and not (workdir / "assessment.jsonl").exists()


def test_states_are_those_after_each_block(workdir):
    """Block by block: what a change of a token changes in the states."""
    settings, saved, _ = restore.read_run("", str(workdir))
    config = settings.generator
    codes = np.random.RandomState(0).randint(16, size=(3, config.length))
    changed = codes.copy()
    changed[:, 9] = (changed[:, 9] + 1) % 16
    (states, _), *_ = future._chunks(config, saved["ema"], codes, {})
    (others, _), *_ = future._chunks(config, saved["ema"], changed, {})
    assert len(states) == 3 and states[0].shape == (3, config.length, 32)
    differs = [np.abs(a - b).max(axis=(0, 2)) > 0 for a, b in zip(states, others, strict=True)]
    assert np.flatnonzero(differs[0]).tolist() == [10]  # the embedding of the last token consumed
    for of_block in differs[1:]:
        assert np.flatnonzero(of_block).tolist() == list(range(10, config.length))
    table = saved["ema"]["tok_embeddings"]["embedding"]
    np.testing.assert_array_equal(states[0][:, 1:], table[codes[:, :-1]])
