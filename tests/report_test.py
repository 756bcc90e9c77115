"""The study's report: its statistics, its text and figures, and what is collected for it."""

import json
import math
import os
import pathlib
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import teacher
from launch import (
    collect,
    collected,
    encoders,
    overrides,
    plan,
    report,
    report_text,
    speedup,
    study,
)
from launch import report_comparison as comparison
from launch import report_diagnostics as diagnostics
from mirai_jax.utils.errors import DataError

ROOT = pathlib.Path(__file__).parents[1]
STEPS = range(500, 3001, 500)
PROTOCOL = {"weights": "ema", "samples": 2000, "guidance": 1.0, "seed": 0, "pixels": 112}

# Curves and seeds ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, target, lower, expected",
    [
        ([50, 40, 30, 20], 25, True, 350),  # between two steps
        ([50, 40, 30, 20], 10, True, None),  # never
        ([50, 20, 40, 10], 30, True, 100 + 100 * 2 / 3),  # the first time counts
        ([0.1, 0.2, 0.4, 0.4], 0.3, False, 250),  # higher is better
    ],
)
def test_the_step_at_which_a_curve_is_as_good(values, target, lower, expected):
    curve = dict(zip(range(100, 500, 100), values, strict=True))
    assert speedup.first_reach(curve, target, lower) == pytest.approx(expected)


numbers = st.floats(-1e6, 1e6)
curves = st.dictionaries(st.integers(1, 10**6), numbers, max_size=8)


@given(curves, numbers)
def test_a_curve_is_reached_where_it_is_as_good_and_not_before(curve, target):
    reached = speedup.first_reach(curve, target)
    good = [step for step, value in sorted(curve.items()) if value <= target]
    assert (reached is None) == (not good)
    if good:
        before = [step for step in sorted(curve) if step < good[0]]
        assert (before[-1] if before else good[0]) <= reached <= good[0]
    mirrored = {step: -value for step, value in curve.items()}
    assert reached == speedup.first_reach(mirrored, -target, lower_is_better=False)


def test_spread_pairs_and_medians():
    assert speedup.spread([]) is None
    assert speedup.spread([3.0]) == speedup.Spread(1, 3.0, None, 3.0, 3.0)
    assert speedup.spread([1.0, 2.0, 3.0]) == speedup.Spread(3, 2.0, 1.0, 1.0, 3.0)
    assert speedup.paired({2: 5.0, 0: 1.0, 1: 2.0}, {1: 1.0, 2: 1.0, 3: 9.0}) == {1: 1.0, 2: 4.0}
    assert speedup.pooled_deviation([[1.0], []]) is None
    assert speedup.pooled_deviation([[1.0, 3.0], [7.0], [10.0, 14.0]]) == math.sqrt(5)
    assert speedup.median([1.5, None, 1.2]) == 1.2
    assert speedup.median([None, None, 1.2]) is None
    assert speedup.median([None, 1.2]) is None
    assert speedup.ordered([2.0, None, 1.0]) == [None, 1.0, 2.0]
    assert speedup.chance_beyond(0) == 1 and 0.157 < speedup.chance_beyond(2) < 0.158


# A study of made-up numbers -----------------------------------------------------------------------


def entry(step, frechet, protocol=PROTOCOL, **more):
    """A line of an assessment.jsonl whose other measures follow from the distance."""
    return {
        "step": step,
        "protocol": protocol,
        "frechet": frechet,
        "agreement": 1 - frechet / 100,
        "cross_entropy": 1 + frechet / 100,
        "precision": 0.5,
        "recall": 0.25,
        "real_agreement": 0.875,
        **more,
    }


def config_of(variant, seed, **more):
    return {
        "name": variant,
        "seed": seed,
        "num_steps": STEPS[-1],
        "batch_size": 32,
        "data": {"name": "fashion_mnist", "path": "/usr/share/datasets/fashion-mnist"},
        "model": {"grid": [8, 8], "width": 128},
        "teacher": {"name": "efficientnet_lite0", "image_size": 64},
        "foresight": [{"source": "ema", "weights": [2.0]}] if variant == "mirai_e" else [],
        **more,
    }


def add_run(results, sweep, name, config, entries, seconds=600.0, speed=100.0):
    """Foresight is on after step 1,000."""
    folder = results / "runs" / sweep / name
    folder.mkdir(parents=True)
    losses = {f"foresight_{term['source']}_r0c0": -0.5 for term in config["foresight"]}
    metrics = [
        {"step": step, "loss": 1.0, "images_per_second": speed}
        | {loss: value * (step > 1000) for loss, value in losses.items()}
        for step in STEPS
    ]
    run = {
        "setting": name.removesuffix(f"-seed={config['seed']}"),
        "command": f"python -m mirai_jax.main --config=configs/{config['name']}.py",
        "steps": config["num_steps"],
        "seconds": seconds,
        "machine": "a machine",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps(run))
    for file, lines in (("metrics", metrics), ("assessment", entries)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))
    return folder


def falling(end, start=80.0):
    """A curve that falls by the same amount from step to step."""
    return {s: start + (end - start) * i / (len(STEPS) - 1) for i, s in enumerate(STEPS)}


def add_curve(results, sweep, name, config, curve, **more):
    entries = [entry(step, value) for step, value in curve.items()]
    return add_run(results, sweep, name, config, entries, **more)


@pytest.fixture
def results(tmp_path):
    """Two variants, three seeds: Mirai-E needs half as much time to fall as low, and costs more."""
    folder = tmp_path / "results"
    for seed in range(3):
        low = 40.0 + seed
        add_curve(
            folder, "variants", f"llamagen-seed={seed}", config_of("llamagen", seed), falling(low)
        )
        add_curve(
            folder, "variants", f"mirai_e-seed={seed}", config_of("mirai_e", seed),
            falling(2 * low - 80 - 10 * (seed == 2)), speed=80.0,
        )  # fmt: skip
    return folder


def read(folder):
    return collected.read(folder)


def rows(text, start):
    """The cells of the table's row that begins so, each time it is there."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def seed_0(run):
    return f"[0](runs/{run})"


SEEDS = ", ".join(f"[{seed}](runs/variants/{{0}}-seed={seed})" for seed in range(3))


def test_differences_are_to_the_same_seed(results):
    text = comparison.finals(read(results))
    _, differences = rows(text, "Mirai-E")
    assert rows(text, "LlamaGen") == [
        ["LlamaGen", SEEDS.format("llamagen"), "41.00 ± 1.00", "59.0 ± 1.0", "1.4100 ± 0.0100", "0.500 ± 0.000",
         "0.250 ± 0.000"]
    ]  # fmt: skip
    # 0, 2 and -6 less 40, 41 and 42.
    assert differences[1].startswith("**-42.33** better (-48.00 to -39.00)")
    assert differences[2].startswith("**+42.3** better (+39.0 to +48.0)")
    assert differences[4] == "0.000 (0.000 to 0.000)"
    assert rows(text, "Mirai-I")[0] == ["Mirai-I", *["not run"] * 6]
    # A seed that only one of both has is in no difference.
    shutil.rmtree(results / "runs" / "variants" / "llamagen-seed=2")
    assert "-39.50** better (-40.00 to -39.00)" in comparison.finals(read(results))


def test_speed_ups(results):
    found = comparison.speed_ups(read(results), "variants/mirai_e", "frechet")
    # Half the way down takes half of the 2,500 steps after the first 500.
    assert [found[0], found[1]] == pytest.approx([3000 / 1750] * 2) and found[2] > found[0]
    text = comparison.speed_up(read(results))
    fréchet = rows(text, "Fréchet")
    assert fréchet[0][1:6] == ["LlamaGen", "1.00", "1.00", "1.00", "1.00 (1.00 to 1.00)"]
    # To the mean over seeds, 41: reached early, exactly, and never.
    assert fréchet[0][6] == "1.00 (not reached to 1.02)"
    assert fréchet[1][2:5] == ["1.71", "1.71", f"{found[2]:.2f}"]
    assert fréchet[2][1:] == ["Mirai-I", *["not run"] * 5]
    add_curve(results, "variants", "mirai_i-seed=0", config_of("mirai_i", 0), falling(60.0))
    assert rows(comparison.speed_up(read(results)), "Fréchet")[2][2:6] == [
        "not reached", "not run", "not run", "not reached"
    ]  # fmt: skip


def add_bench(folder, scale="fashion_mnist", **seconds):
    variants = {name: {"step_seconds": value} for name, value in seconds.items()}
    bench = {"about": {"command": "bench --compare", "scale": scale}, "variants": variants}
    (folder / "bench.json").write_text(json.dumps(bench))


def test_times(results):
    def found():
        text = comparison.times(read(results))
        return [rows(text, name)[0][1:] for name in ("LlamaGen", "Mirai-E", "Mirai-I")]

    llamagen, mirai_e, _ = found()
    assert llamagen == [*["not run"] * 5, "320 (320 to 320)", "10.0 (10.0 to 10.0)"]
    assert mirai_e[5] == "400 (400 to 400)"
    # Rounds differ in speed: what counts is the ratio within each.
    add_bench(results, llamagen=[0.1, 0.2, 0.4], mirai_e=[0.125, 0.3, 0.5])
    llamagen, mirai_e, mirai_i = found()
    assert llamagen[:3] == ["200", *["1.00 (1.00 to 1.00)"] * 2]
    assert mirai_i[:3] == ["not run"] * 3
    assert mirai_e[:2] == ["300", "1.25 (1.25 to 1.50)"]
    assert "the rounds of `bench --compare`" in comparison.times(read(results))
    # As good at step 1,750: 1,000 steps without foresight, 750 with it.
    found = comparison.speed_ups_in_time(read(results), "variants/mirai_e", "frechet")
    assert [found[0], found[1]] == pytest.approx([3000 / (1000 + 750 * 1.25)] * 2)
    assert mirai_e[2].startswith(f"{found[0]:.2f} (")


def add_one(results, name, frechet, sweep="diagnostics", config=None):
    config = config or config_of("mirai_e", 0)
    add_run(results, sweep, name, config, [entry(3000, frechet)])


def test_a_diagnostic_beside_its_reference_and_the_noise(results):
    question = next(q for q in study.QUESTIONS if "diagnostics/layer-1" in q.settings)
    text = diagnostics.question(read(results), question)
    assert text.endswith("Not run: block 1; block 2; block 4.\n") and "|" not in text
    add_one(results, "layer-1", 8.0)
    add_one(results, "layer-2", 0.5)
    found = read(results)
    text = diagnostics.question(found, question)
    assert rows(text, "LlamaGen")[0][1:5] == [
        seed_0("variants/llamagen-seed=0"),
        "40.00",
        "**+40.00** worse",
        "",
    ]
    assert rows(text, "Mirai-E")[0][1:5] == [
        seed_0("variants/mirai_e-seed=0"),
        "0.00",
        "",
        "**-40.00** better",
    ]
    assert rows(text, "block 4")[0][1:] == ["not run"] * 10
    noise = found.noise(study.MEASURES[0])
    # Of 40, 41, 42 and of 0, 2, -6, with four degrees of freedom.
    assert noise == pytest.approx(math.sqrt((2 * 1 + 2 * 52 / 3) / 4))
    assert 0.5 < 2 * noise < 8
    assert rows(text, "block 1")[0][2:5] == ["8.00", "**+8.00** worse", "**-32.00** better"]
    assert rows(text, "block 2")[0][2:5] == ["0.50", "+0.50", "**-39.50** better"]


def test_the_order_of_the_paper(results):
    for name, frechet in {
        "layer-1": 9.0, "layer-2": 8.0, "layer-4": 1.0,  # two clearly worse, one undecided
        "output-2d": 20.0, "output-1d": 60.0,
    }.items():  # fmt: skip
        add_one(results, name, frechet)
    add_one(results, "internal-1d", 30.0, "controls")
    add_one(results, "own-labels", 10.0, "teachers")
    add_one(results, "small", 20.0, "teachers")
    text = diagnostics.order(read(results))
    ours = {
        claim: rows(text, claim)[0][1:] for claim in [c.text for c in study.CLAIMS if not c.note]
    }
    assert ours["Mirai-E is better than LlamaGen"] == [
        "5.22 < 6.36", "3,000", "3", "Mirai-E -1.33, LlamaGen 41.00", *["**agrees**"] * 3
    ]  # fmt: skip
    assert ours["Mirai-I is better than LlamaGen"][-3:] == ["not run"] * 3
    assert ours["output level: 2-D is worse than no foresight"][-1] == "**does not agree**"
    assert ours["output level: 1-D is worse than no foresight"][-1] == "**agrees**"
    assert ours["two thirds of the depth is the best block"][-1] == "undecided"
    line = next(line for line in text.splitlines() if "every encoder" in line)
    assert "own-labels 10.00, LlamaGen 40.00, small 20.00 |" in line
    assert line.endswith("| **agrees** | **agrees** | **agrees** |")


def test_a_shorter_run_is_compared_at_its_own_end(results):
    """Also in the figure, and with the noise of that step."""
    config = config_of("mirai_e", 0, num_steps=2000)
    for layer in (1, 2, 4):
        add_run(results, "diagnostics", f"layer-{layer}", config, [entry(2000, 30.0 + layer)])
    found = read(results)
    question = next(q for q in study.QUESTIONS if "diagnostics/layer-1" in q.settings)
    text = diagnostics.question(found, question)
    noise = found.until(2000).noise(study.MEASURES[0])
    assert f"After 2,000 steps (yardstick for noise: Fréchet {noise:.2f}; agreement " in text
    # Three fifths of the way from 80 to 40 and to 0.
    assert rows(text, "LlamaGen")[0][2] == "56.00" and rows(text, "Mirai-E")[0][2] == "32.00"
    assert rows(text, "block 1")[0][2:5] == ["31.00", "-1.00", "**-25.00** better"]
    assert noise == pytest.approx(0.6 * found.noise(study.MEASURES[0]))
    claim = rows(diagnostics.order(found), "two thirds of the depth is the best block")[0]
    assert claim[2:5] == [
        "2,000",
        "1",
        "Mirai-E 32.00, block 1 31.00, block 2 32.00, block 4 34.00",
    ]
    # What came later is not looked at.
    assert max(run.steps for run in found.until(2000).runs) == 2000
    assert all(a.step <= 2000 for run in found.until(2000).runs for a in run.assessments)


def test_protocols_are_not_mixed(results):
    run = results / "runs" / "variants" / "mirai_e-seed=0"
    path, good = run / "assessment.jsonl", (run / "assessment.jsonl").read_text()
    guided = {**PROTOCOL, "guidance": 2.0}
    path.write_text(good + json.dumps(entry(3000, 77.0, guided)) + "\n")
    found = read(results)
    assert found.finals("variants/mirai_e", "frechet")[0] == 0.0
    text = report_text.readme(found, "", ())
    assert "### With guidance 2.0 (1 is none), features at 112 pixels, 2,000 samples" in text
    assert f"| Mirai-E | {seed_0('variants/mirai_e-seed=0')} | 77.00 | 23.0 |" in text
    path.write_text(good + json.dumps(entry(3000, 77.0, {**PROTOCOL, "samples": 9})) + "\n")
    with pytest.raises(DataError, match=r"assessment.jsonl, line 7: protocol .*PROTOCOL in launch"):
        read(results)


# The whole report ---------------------------------------------------------------------------------


def whole(folder):
    """Adds what the fixture lacks, so that every section and figure is there."""
    for question in study.QUESTIONS:
        for i, setting in enumerate(question.settings):
            sweep, _, name = setting.partition("/")
            add_one(folder, name, 20.0 + i, sweep)
    add_one(folder, "own-labels", 10.0, "teachers")
    add_one(folder, "own-masked", 11.0, "teachers")
    probe = {str(layer): [0.25 + 0.125 * layer, 0.5, 0.625, 0.75] for layer in range(1, 5)}
    for seed in range(3):
        add_run(
            folder, "variants", f"mirai_i-seed={seed}", config_of("mirai_i", seed),
            [entry(3000, 30.0 + seed, probe=probe)],
        )  # fmt: skip
    (folder / "findings.md").write_text("Foresight helps *a little*.\n")


def test_the_report_is_the_same_to_the_byte(results, tmp_path, monkeypatch):
    whole(results)
    first = report.make(results)
    assert set(first) == {"README.md", *report.FIGURES} and all(first.values())
    text = first["README.md"].decode()
    assert "## Findings\n\nForesight helps *a little*.\n" in text
    assert "not run" in text and "FID" in text and "nan" not in text
    assert all(f"]({name})" in text for name in report.FIGURES)
    # Elsewhere, with files made and listed in another order, and a user's own style.
    other = tmp_path / "other"
    for path in sorted(results.rglob("*"), reverse=True):
        if path.is_file():
            copy = other / path.relative_to(results)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            with scandir(path) as entries:
                self._entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return iter(self._entries)

        def __exit__(self, *error):
            pass

    listdir = os.listdir
    monkeypatch.setattr(os, "scandir", Backwards)
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=True))
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 9, "figure.dpi": 30, "axes.facecolor": "red"}):
        assert report.make(other) == first


def test_the_committed_report_is_what_the_committed_runs_give():
    folder = ROOT / "results"
    if not folder.exists():
        pytest.skip("no results yet")
    # Pictures depend on Matplotlib's version: --check compares them too.
    drawn = [name for name in report.FIGURES if (folder / name).exists()]
    text = report.text(folder, read(folder), drawn)
    assert (folder / "README.md").read_text() == text


def test_every_run_of_the_sweeps_has_its_role():
    def settings(sweep):
        entries = plan.read_sweep(str(ROOT / "launch" / "sweeps" / f"{sweep}.py"), study.SCALE)
        return {f"{sweep}/{setting}" for _, setting in overrides.names(entries)}

    roles = [setting for question in study.QUESTIONS for setting in question.settings]
    assert sorted(roles) == sorted(settings("diagnostics") | settings("controls"))
    assert set(study.VARIANTS) == settings("variants")
    named = {s for claim in study.CLAIMS for pair in claim.pairs for s in pair}
    assert {s for s in named if not s.startswith("teachers/")} <= {*roles, *study.VARIANTS}
    explored = {explored.sweep for explored in study.EXPLORATIONS}
    for run in read(ROOT / "results").runs:  # a renamed setting leaves runs without a role
        setting = f"{run.sweep}/{run.setting}"
        assert run.sweep in explored or setting in {*roles, *study.VARIANTS}, setting


def test_a_malformed_line_is_one_line_with_its_place(results):
    path = results / "runs" / "variants" / "mirai_e-seed=1" / "assessment.jsonl"
    path.write_text(path.read_text() + '{"step": 500, "protocol": {}, "frechet": NaN}\n')
    with pytest.raises(DataError, match="assessment.jsonl, line 7.*frechet"):
        read(results)


# Collecting ---------------------------------------------------------------------------------------


def add_workdir(out, name, config, finished=True, step=3000, command=""):
    """As `launch.sweep` leaves a run."""
    folder = out / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    lines = [{"step": 1, "loss": 5.5, "images_per_second": 1.0}, {"step": step, "loss": 0.1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "assessment.jsonl").write_text(json.dumps(entry(3000, 1 / 3)) + "\n")
    if finished:
        (folder / "summary.png").write_bytes(b"")
    (out / f"{name}.log").write_text(
        "launch: 2026-01-02 03:04:05 /opt/venv/bin/python -m mirai_jax.main "
        f"--config=configs/llamagen.py:fashion_mnist --workdir={folder} {command}\n"
        "step 1\nlaunch: exit status 75 after 10.5 s\nlaunch: 2026-01-02 03:04:16 again\n"
        "launch: exit status 0 after 20.0 s\n"
    )


def collect_from(*sweeps, out):
    return list(collect.collect(sweeps, out / "runs", "a machine"))


def test_collecting_and_reporting(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep, out = tmp_path / "study" / "variants-fashion_mnist", tmp_path / "results"
    add_workdir(sweep, "llamagen-seed=0", config_of("llamagen", 0))
    pretrained = tmp_path / "study" / "other" / "llamagen"
    config = config_of("mirai_e", 0, init_from=str(pretrained), extra=[str(ROOT / "weights" / "a")])
    offsets = "'--config.foresight[0].offsets=((0, 0), (0, 1))'"
    add_workdir(
        sweep, "mirai_e-seed=0", config, command=f"{offsets} --config.init_from={pretrained}"
    )
    add_workdir(sweep, "mirai_e-seed=1", config_of("mirai_e", 1), step=2500)
    add_workdir(sweep, "mirai_e-seed=2", config_of("mirai_e", 2), finished=False)
    runs = out / "runs" / "variants"
    assert collect_from(sweep, out=out) == [
        f"collected: {runs}/llamagen-seed=0",
        f"collected: {runs}/mirai_e-seed=0",
        f"left out: {sweep}/mirai_e-seed=1: unfinished, at step 2500 of 3000",
        f"left out: {sweep}/mirai_e-seed=2: unfinished, at step 3000 of 3000",
    ]
    assert sorted(p.name for p in runs.iterdir()) == ["llamagen-seed=0", "mirai_e-seed=0"]
    for path in runs.rglob("*.json*"):
        assert str(tmp_path) not in path.read_text() and str(ROOT) not in path.read_text()
    for name in ("metrics.jsonl", "assessment.jsonl"):
        copy = runs / "llamagen-seed=0" / name
        assert copy.read_bytes() == (sweep / "llamagen-seed=0" / name).read_bytes()
    assert json.loads((runs / "mirai_e-seed=0" / "run.json").read_text()) == {
        "setting": "mirai_e",
        "command": "python -m mirai_jax.main --config=configs/llamagen.py:fashion_mnist "
        f"--workdir=runs/sweeps/variants/mirai_e-seed=0 {offsets} "
        "--config.init_from=runs/sweeps/other/llamagen",
        "steps": 3000,
        "seconds": 30.5,
        "machine": "a machine",
    }
    config = json.loads((runs / "mirai_e-seed=0" / "config.json").read_text())
    assert config["init_from"] == "runs/sweeps/other/llamagen"
    assert config["extra"] == ["weights/a"]
    assert config["data"]["path"] == "/usr/share/datasets/fashion-mnist"
    before = {path: path.read_bytes() for path in runs.rglob("*.*") if path.is_file()}
    collect_from(sweep, out=out)
    assert before == {path: path.read_bytes() for path in before}
    assert "| variants/mirai_e-seed=0 | `python -m" in report.make(out)["README.md"].decode()


@pytest.mark.parametrize("where", ["config.json", "assessment.jsonl", "log"])
def test_other_paths_of_the_machine_are_refused(tmp_path, where):
    sweep, path = tmp_path / "variants", "/home/someone/x"
    command = f"--config.teacher.path={path}" if where == "log" else ""
    more = {"path": ["a", {"b": f"x {path}"}]} if where == "config.json" else {}
    add_workdir(sweep, "llamagen-seed=0", config_of("llamagen", 0, **more), command=command)
    if where == "assessment.jsonl":
        line = entry(3000, 1.0, {**PROTOCOL, "reference": path})
        (sweep / "llamagen-seed=0" / where).write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=where):
        collect_from(sweep, out=tmp_path / "results")
    assert not (tmp_path / "results").exists()


def add_encoder(folder, steps=8, **fields):
    """A workdir of mirai_jax.teach, stopped once."""
    config = teacher.get_config("fashion_mnist")
    config.update({"objective": "masked", "num_steps": steps, **fields})
    config.network.width = 192
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    metrics = [{"step": 4, "loss": 1.0}, {"step": steps, "held_out_masked_accuracy": 0.25}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in metrics))
    events = [("started", 0), ("message", 1), ("preempted", 5), ("resumed", 8), ("finished", 9)]
    (folder / "events.jsonl").write_text(
        "".join(
            json.dumps({"time": f"2026-01-02T03:04:0{second}+0000", "event": event}) + "\n"
            for event, second in events
        )
    )
    (folder / "summary.png").touch()
    return folder


def test_encoders_are_collected(results, tmp_path):
    folder, out = add_encoder(tmp_path / "runs" / "teacher_masked"), results / "encoders"
    (message,) = encoders.collect([folder], out, "a machine")
    assert message == f"collected: {out}/teacher_masked"
    (found,) = encoders.read(out)
    assert found.command == (
        "python -m mirai_jax.teach --config=configs/teacher.py:fashion_mnist "
        "--workdir=runs/teacher_masked --config.network.width=192 --config.num_steps=8 "
        "--config.objective=masked"
    )
    assert "[teacher_masked](encoders/teacher_masked)" in report.make(results)["README.md"].decode()


# The program --------------------------------------------------------------------------------------


def program(capsys, *arguments):
    """Exit status (or the error's text) and what is printed, of the program in this process."""
    report._FLAGS.unparse_flags()
    report._FLAGS(["report", *arguments])
    status = 0
    try:
        report.main(["report"])
    except SystemExit as end:
        status = end.code
    finally:
        for argument in arguments:
            report._FLAGS[argument.partition("=")[0].removeprefix("--")].unparse()
    return status, capsys.readouterr().out


def test_the_program(results, capsys):
    folder = f"--results={results}"
    assert program(capsys, folder) == (
        0, f"written: {results}/README.md\nwritten: {results}/comparison.png\n"
    )  # fmt: skip
    assert program(capsys, folder, "--check")[0] == 0
    (results / "README.md").write_text("other")
    (results / "comparison.png").unlink()
    assert program(capsys, folder, "--check")[0].splitlines() == [
        f"{results}/README.md is not what the runs give",
        f"{results}/comparison.png is missing",
    ]
    assert (results / "README.md").read_text() == "other"
