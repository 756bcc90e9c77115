"""The study's report: its statistics, its text and figures, and what is collected for it."""

import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
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
        ([50, 40, 30, 20], 30, True, 300),  # exactly at one
        ([50, 40, 30, 20], 10, True, None),  # never
        ([50, 40, 30, 20], 60, True, 100),  # from the beginning
        ([50, 20, 40, 10], 30, True, 100 + 100 * 2 / 3),  # the first time counts
        ([50, 30, 30, 10], 30, True, 200),  # flat at the target
        ([0.1, 0.2, 0.4, 0.4], 0.3, False, 250),  # higher is better
        ([0.1, 0.2, 0.4, 0.4], 0.5, False, None),
        ([], 1, True, None),
    ],
)
def test_the_step_at_which_a_curve_is_as_good(values, target, lower, expected):
    curve = dict(zip(range(100, 500, 100), values, strict=False))
    backwards = dict(reversed(curve.items()))
    for given_curve in (curve, backwards):
        assert speedup.first_reach(given_curve, target, lower) == pytest.approx(expected)


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
    assert speedup.shard_activation([]) is None
    assert speedup.shard_activation([3.0]) == speedup.Spread(1, 3.0, None, 3.0, 3.0)
    assert speedup.shard_activation([1.0, 2.0, 3.0]) == speedup.Spread(3, 2.0, 1.0, 1.0, 3.0)
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
    message = {"about": {"command": "bench --compare", "scale": scale}, "variants": variants}
    (folder / "bench.json").write_text(json.dumps(message))


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
    # Both together cost what either does alone while it is on alone.
    both = [{"source": "ema", "weights": [2.0]}, {"source": "bidirectional", "weights": [2.0]}]
    config = config_of("mirai_e_i", 0, foresight=both)
    folder = add_curve(results, "variants", "mirai_e_i-seed=0", config, falling(0.0))
    path = folder / "metrics.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    entries = [{**e, "foresight_bidirectional_r0c0": -0.5} for e in entries]
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    together = lambda: comparison.speed_ups_in_time(read(results), "variants/mirai_e_i", "frechet")  # noqa: E731
    add_bench(results, llamagen=[1.0], mirai_e=[1.25], mirai_e_i=[1.75])
    assert together() == {}  # what a step costs with the second alone was not measured
    add_curve(results, "variants", "mirai_e_i-seed=1", {**config, "seed": 1}, falling(79.0))
    assert together() == {}  # nor does a seed that never is as good tell anything then
    shutil.rmtree(results / "runs" / "variants" / "mirai_e_i-seed=1")
    alone = [{"source": "bidirectional", "weights": [2.0]}]
    config = config_of("mirai_i", 0, foresight=alone)
    add_curve(results, "variants", "mirai_i-seed=0", config, falling(60.0))
    add_bench(results, llamagen=[1.0], mirai_e=[1.25], mirai_i=[1.5], mirai_e_i=[1.75])
    assert together() == {0: pytest.approx(3000 / (1000 * 1.5 + 750 * 1.75))}


@pytest.mark.parametrize(
    "bench, expected",
    [
        ({"scale": "demo"}, "is of scale 'demo'; it must be 'fashion_mnist'"),
        ({"llamagen": []}, "variants.llamagen: step_seconds must be numbers above 0"),
        ({"llamagen": [1.0, 0.0]}, "variants.llamagen: step_seconds must be numbers above 0"),
        ({"llamagen": ["1"]}, "variants.llamagen is '1'"),
        ({"llamagen": [1.0], "mirai_e": [1.0, 2.0]}, "must be of equally many rounds"),
    ],
)
def test_a_wrong_bench_is_told(results, bench, expected):
    add_bench(results, **bench)
    with pytest.raises(DataError, match=re.escape(expected)):
        read(results)


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


def test_several_seeds_are_compared_seed_by_seed(results):
    for seed, frechet in enumerate([3.0, 5.0, 7.0]):
        config = config_of("mirai_e", seed)
        add_one(results, f"past-only-seed={seed}", frechet, "controls", config)
    question = next(q for q in study.QUESTIONS if "controls/past-only" in q.settings)
    found = rows(diagnostics.question(read(results), question), "past positions: offsets mirrored")
    # 3, 5 and 7 less 0, 2 and -6, and less 40, 41 and 42.
    assert found[0][2:5] == [
        "5.00 ± 2.00", "**+6.33** worse (+3.00 to +13.00)", "**-36.00** better (-37.00 to -35.00)"
    ]  # fmt: skip


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
    # Each measure decides alone: at the other two, block 2 is as good as the reference.
    shutil.rmtree(results / "runs" / "diagnostics" / "layer-2")
    same = {"agreement": 1.0, "cross_entropy": 1.0}
    add_run(results, "diagnostics", "layer-2", config_of("mirai_e", 0), [entry(3000, 8.0, **same)])
    shutil.rmtree(results / "runs" / "diagnostics" / "layer-4")
    add_one(results, "layer-4", 9.0)
    ours = rows(diagnostics.order(read(results)), "two thirds of the depth is the best block")[0]
    assert ours[-3:] == ["**agrees**", "undecided", "undecided"]


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
    # A longer run of the same question is looked at where the shortest ends.
    shutil.rmtree(results / "runs" / "diagnostics" / "layer-4")
    add_curve(results, "diagnostics", "layer-4", config_of("mirai_e", 0), falling(20.0))
    text = diagnostics.question(read(results), question)
    assert rows(text, "block 4")[0][2] == "44.00" and "After 2,000 steps (" in text


def test_without_several_seeds_nothing_is_beyond_the_noise(tmp_path):
    add_curve(tmp_path, "variants", "llamagen-seed=0", config_of("llamagen", 0), falling(40.0))
    add_curve(tmp_path, "variants", "mirai_e-seed=0", config_of("mirai_e", 0), falling(10.0))
    text = report_text.readme(read(tmp_path), "", ())
    assert "There is no yardstick for noise yet" in text and "**-30" not in text
    assert (
        "| Mirai-E is better than LlamaGen | 5.22 < 6.36 | 3,000 | 1 | Mirai-E 10.00, LlamaGen 40.00 "
        "| undecided | undecided | undecided |" in text
    )


def test_what_differs_in_a_config(results):
    explored = study.EXPLORATIONS[0]
    text = diagnostics.exploration(read(results), explored)
    assert text.endswith("Not run: no run of the sweep `teachers`.\n")
    teacher = {"name": "dinov2", "image_size": 0, "path": "runs/teacher"}
    weaker = [{"source": "bidirectional", "weights": [0.5]}]
    changed = config_of("mirai_i", 0, teacher=teacher, foresight=weaker, ema_decay=0.9)
    add_one(results, "own", 3.0, "teachers", changed)
    differs = lambda: rows(diagnostics.exploration(read(results), explored), "own")[0][1:]  # noqa: E731
    assert differs()[:5] == [
        seed_0("teachers/own"), "Mirai-I (not run)", "", "3.00", "not run"
    ]  # fmt: skip
    whole = [{"source": "bidirectional", "weights": [1.0]}]
    add_one(results, "mirai_i-seed=0", 35.0, "variants", config_of("mirai_i", 0, foresight=whole))
    fields = "`ema_decay=0.9`, `foresight[0].weights=[0.5]`, `teacher.image_size=0`, `teacher.name=dinov2`, `teacher.path=runs/teacher`"
    assert differs()[1:6] == [
        f"Mirai-I with {fields}", "", "3.00", "**-32.00** better", "**-37.00** better"
    ]  # fmt: skip


def test_measures_may_be_missing(results):
    add_run(
        results, "variants", "mirai_i-seed=0", config_of("mirai_i", 0),
        [
            {"step": 2500, "protocol": PROTOCOL, "frechet": 3.0},  # its last step has none
            {"step": 3000, "protocol": PROTOCOL, "cross_entropy": 1.5, "frechet": None, "more": []},
        ],
    )  # fmt: skip
    values = rows(comparison.finals(read(results)), "Mirai-I")[0]
    assert values[1:] == [
        seed_0("variants/mirai_i-seed=0"),
        "not run",
        "not run",
        "1.5000",
        "not run",
        "not run",
    ]
    # A curve that is not whole is no curve that never gets there.
    assert comparison.speed_ups(read(results), "variants/mirai_i", "frechet") == {}


def test_a_later_line_adds_to_an_earlier_one(results):
    path = results / "runs" / "variants" / "mirai_e-seed=0" / "assessment.jsonl"
    line = {"step": 3000, "protocol": PROTOCOL, "frechet": 5.0, "probe": {"2": [0.5, 0.75]}}
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    found = read(results)
    assert found.finals("variants/mirai_e", "frechet")[0] == 5.0
    assert found.finals("variants/mirai_e", "agreement")[0] == 1.0
    text = report_text.readme(found, "", ())
    assert "| block | variant | after 1/2 of the tokens | after all tokens but one |" in text
    assert (
        "| 2 | Mirai-E | 50.0 | 75.0 |" in text and "| 2 | LlamaGen | not run | not run |" in text
    )
    fewer = {"step": 3000, "protocol": {**PROTOCOL, "guidance": 3.0, "held_out": 9}}
    with path.open("a") as file:
        file.write(json.dumps({**fewer, "probe": {"2": [0.0, 0.0]}}) + "\n")
    assert "| 2 | Mirai-E | 50.0 | 75.0 |" in report_text.readme(read(results), "", ())


def test_how_many_gradients_were_clipped(results):
    config = config_of("mirai_i", 0, optimizer={"clip_norm": 1.0})
    path = add_curve(results, "variants", "mirai_i-seed=0", config, falling(0.0)) / "metrics.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    norms = [9.0, 9.0, 9.0, 2.0, 1.0, 1.5]  # of the second half, the last three
    entries = [{**e, "grad_norm": norm} for e, norm in zip(entries, norms, strict=True)]
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    text = report_text.readme(read(results), "", ())
    assert rows(text, "variants/mirai_i-seed=0")[0][2:4] == ["3,000", "67%"]
    assert rows(text, "variants/mirai_e-seed=0")[0][2:4] == ["3,000", ""]


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


def test_check_names_each_file_that_differs(results):
    (results / "probe.png").write_text("old")
    made = report.make(results)
    assert report.wrong(results, made) == [
        f"{results}/README.md is missing",
        f"{results}/comparison.png is missing",
        f"{results}/probe.png has nothing to show and must go",
    ]
    report.write(results, made)
    assert report.wrong(results, made) == []
    assert sorted(p.name for p in results.iterdir()) == ["README.md", "comparison.png", "runs"]
    (results / "README.md").write_text("other")
    assert report.wrong(results, made) == [f"{results}/README.md is not what the runs give"]


def test_a_report_of_nothing(tmp_path):
    (tmp_path / "runs").mkdir()
    made = report.make(tmp_path)
    text = made.pop("README.md").decode()
    assert set(made.values()) == {None}
    assert text.count("Not run") == 5 and "`runs/` is empty" in text


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


# What cannot be read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, expected",
    [
        ("{", "is no JSON"),
        ("[1]", r"is \[1\]; it must be an object"),
        ("{}", "step is None; it must be a whole number"),
        ('{"step": 1.5}', "step is 1.5; it must be a whole number"),
        ('{"step": 500}', "protocol is None; it must be an object"),
        ('{"step": 500, "protocol": {}, "frechet": NaN}', "frechet is nan; it must be a number"),
        ('{"step": 500, "protocol": {}, "recall": "1"}', "recall is '1'; it must be a number"),
        ('{"step": 500, "protocol": {}, "frechet": 1e999}', "frechet is inf"),
        ('{"step": 500, "protocol": {}, "probe": [1]}', "probe is .*must be an object"),
        ('{"step": 500, "protocol": {}, "probe": {"a": [1]}}', "probe.* is no layer"),
        ('{"step": 500, "protocol": {}, "probe": {"1": [true]}}', "probe.* is True"),
        ('{"step": 500, "protocol": {}, "probe": {"1": []}}', "probe.* is empty"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_a_malformed_line_is_told_with_file_and_line(results, line, expected):
    path = results / "runs" / "variants" / "mirai_e-seed=1" / "assessment.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(
        DataError, match=rf"mirai_e-seed=1/assessment.jsonl, line 7.*{expected}"
    ) as e:
        read(results)
    assert "\n" not in str(e.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3),
    max_leaves=6,
)
lines = st.one_of(
    st.binary(max_size=60),
    json_values.map(lambda v: json.dumps(v).encode()),
    st.fixed_dictionaries(
        {"step": st.integers(0, 4000)},
        optional={
            "protocol": st.just(PROTOCOL) | json_values,
            "probe": st.dictionaries(st.sampled_from(["1", "x", "9999999"]), json_values)
            | json_values,
            **dict.fromkeys(collected.MEASURED, json_values),
            "images_per_second": json_values,
            "grad_norm": json_values,
            "foresight_ema_r0c0": json_values,
            "optimizer": st.fixed_dictionaries({"clip_norm": json_values}),
        },
    ).map(lambda v: json.dumps(v).encode()),
)


@pytest.mark.parametrize("name", ["assessment.jsonl", "metrics.jsonl", "run.json", "config.json"])
@hypothesis_settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_in_a_file_is_read_or_told_in_one_line(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("any")
    run = add_run(folder, "variants", "llamagen-seed=0", config_of("llamagen", 0), [])
    (run / name).write_bytes(b"\n".join(data.draw(st.lists(lines, max_size=3))))
    try:
        text = report_text.readme(read(folder), "", ())
    except DataError as error:
        assert str(run) in str(error) and len(str(error).splitlines()) == 1
    else:
        assert "## Every run" in text


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


def test_collecting_again_leaves_nothing_of_before(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep, out = tmp_path / "variants", tmp_path / "results"
    add_workdir(sweep, "llamagen-seed=0", config_of("llamagen", 0))
    collect_from(sweep, out=out)
    file = sweep / "llamagen-seed=0" / "assessment.jsonl"
    file.write_text(json.dumps(entry(2500, 0.5)) + "\n")
    (message,) = collect_from(sweep, out=out)
    assert message.endswith(" (assessed up to step 2500 of 3000)")
    file.unlink()
    (message,) = collect_from(sweep, out=out)
    assert message.endswith(" (not assessed)")
    assert not (out / "runs" / "variants" / "llamagen-seed=0" / "assessment.jsonl").exists()
    # Under a new name it is there twice, which is told.
    for suffix in ("", ".log"):
        (sweep / f"llamagen-seed=0{suffix}").rename(sweep / f"baseline-seed=0{suffix}")
    _, message = collect_from(sweep, out=out)
    assert message == f"stays from before: {out}/runs/variants/llamagen-seed=0"


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


@pytest.mark.parametrize(
    "where, value",
    [
        ("config.json", "/home/someone/x.pth"),
        ("config.json", "tfds:/home/someone/x"),
        ("config.json", ["a", {"b": "x /srv/y"}]),
        ("assessment.jsonl", {"reference": "/srv/y"}),
        ("log", "--config.teacher.path=/home/someone/x.pth"),
    ],
)
def test_other_paths_of_the_machine_are_refused(tmp_path, where, value):
    sweep, out = tmp_path / "variants", tmp_path / "results"
    command = value if where == "log" else ""
    more = {"path": value} if where == "config.json" else {}
    add_workdir(sweep, "llamagen-seed=0", config_of("llamagen", 0, **more), command=command)
    if where == "assessment.jsonl":
        line = entry(3000, 1.0, {**PROTOCOL, **value})
        (sweep / "llamagen-seed=0" / where).write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match="which is a path of this machine alone") as error:
        collect_from(sweep, out=out)
    assert where in str(error.value) and "\n" not in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize(
    "text", ["", "a/b", "runs/x", "16x16", "gs://bucket/x", "1 / 2", "configs/a.py:demo", "/"]
)
def test_what_is_no_path_of_the_machine_stays(tmp_path, text):
    assert collect.Machine(tmp_path, "any").portable({text: [text, 1, None]}) == {
        text: [text, 1, None]
    }


def test_what_cannot_be_collected(tmp_path):
    with pytest.raises(DataError, match="nowhere holds no runs; it must be the folder of a sweep"):
        collect_from(tmp_path / "nowhere", out=tmp_path)
    add_workdir(tmp_path / "a", "x", config_of("llamagen", 0))
    (tmp_path / "a" / "x.log").write_text("nothing\n")
    with pytest.raises(DataError, match="x.log: it does not tell the command of the run"):
        collect_from(tmp_path / "a", out=tmp_path / "out")
    (tmp_path / "a" / "x" / "assessment.jsonl").write_text("{}\n\n")
    with pytest.raises(DataError, match="x/assessment.jsonl, line 1: step is None"):
        collect_from(tmp_path / "a", out=tmp_path / "out")


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


def test_encoders_are_collected_and_shown(results, tmp_path):
    folder, out = add_encoder(tmp_path / "runs" / "teacher_masked"), results / "encoders"
    assert list(encoders.collect([folder], out, "a machine")) == [
        f"collected: {out}/teacher_masked"
    ]
    command = (
        "python -m mirai_jax.teach --config=configs/teacher.py:fashion_mnist "
        "--workdir=runs/teacher_masked --config.network.width=192 --config.num_steps=8 "
        "--config.objective=masked"
    )
    assert encoders.read(out) == [
        encoders.Encoder(
            "teacher_masked", "masked", 8, {"hidden codes right": 0.25}, command, 6.0, "a machine"
        )
    ]
    for probe, run in ((0.5, "variants/mirai_e-seed=3"), (0.75, "teachers/own-masked")):
        sweep, _, name = run.partition("/")
        seed = 3 if "=" in name else 0
        lines = [entry(3000, 20.0, teacher_probe=probe)]
        add_run(results, sweep, name, config_of("mirai_e", seed), lines)
    text = report.make(results)["README.md"].decode()
    assert rows(text, "[teacher_masked](encoders/teacher_masked)") == [
        ["[teacher_masked](encoders/teacher_masked)", "masked", "8", "25.0"]
    ]
    assert f"| encoders/teacher_masked | `{command}` | 8 |  | 6s | a machine |" in text
    assert rows(text, "own-masked")[-1][3] == "75.0" and rows(text, "LlamaGen")[-1][3] != "75.0"


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda folder: (folder / "summary.png").unlink(), "is no finished run of mirai_jax.teach"),
        (lambda folder: (folder / "metrics.jsonl").write_text(""), "is no finished run"),
        (lambda folder: (folder / "config.json").write_text("{}"), "is no finished run"),
        (lambda folder: (folder / "events.jsonl").write_text("{}"), "runs/one: "),
        (
            lambda folder: (folder / "config.json").write_text('{"num_steps": 8, "scale": "big"}'),
            "runs/one: no command makes its config",
        ),
    ],
)
def test_what_is_no_encoder_is_told_and_nothing_written(tmp_path, change, expected):
    folder, good = add_encoder(tmp_path / "runs" / "one"), add_encoder(tmp_path / "runs" / "good")
    change(folder)
    with pytest.raises(DataError, match=expected) as error:
        list(encoders.collect([good, folder], tmp_path / "out", "a machine"))
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "out").exists()


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


def test_wrong_flags(tmp_path, capsys):
    assert program(capsys, "--collect=x")[0] == (
        "error: --collect or --encoders and --machine go together; one is missing"
    )
    assert program(capsys, "--collect=x", "--machine=y", "--check")[0] == (
        "error: --check writes nothing; it cannot go with --collect or --encoders"
    )
    assert program(capsys, f"--results={tmp_path}")[0].startswith(f"error: {tmp_path}/runs is no")


def test_a_wrong_file_ends_the_program_in_one_line(results):
    path = results / "runs" / "variants" / "mirai_e-seed=0" / "run.json"
    path.write_text("{")
    done = subprocess.run(
        [sys.executable, "-m", "launch.report", f"--results={results}"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith(f"error: {path} is no JSON")
    assert len(done.stderr.splitlines()) == 1
