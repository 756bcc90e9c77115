"""The study's report: its statistics, its numbers, and what is collected for it."""

import json
import math
import pathlib
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import collect, collected, overrides, plan, report, speedup, study
from mirai_jax.utils.errors import DataError

ROOT = pathlib.Path(__file__).parents[1]
STEPS = range(500, 3001, 500)
# Of 40, 41, 42 and of 0, 2, -6 (`results` below), with four degrees of freedom.
NOISE = math.sqrt((2 * 1 + 2 * 52 / 3) / 4)
PROTOCOL = {"weights": "ema", "samples": 2000, "guidance": 1.0, "seed": 0, "pixels": 112}

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


# A study of made-up numbers -----------------------------------------------------------------------


def entry(step, frechet, protocol=PROTOCOL):
    """A line of an assessment.jsonl whose other measures follow from the distance."""
    follow = {"agreement": 1 - frechet / 100, "cross_entropy": 1 + frechet / 100}
    return {"step": step, "protocol": protocol, "frechet": frechet, "precision": 0.5, **follow}


def config_of(variant, seed, **more):
    data = {"name": "fashion_mnist", "path": "/usr/share/datasets/fashion-mnist"}
    terms = [{"source": "ema", "weights": [2.0]}] if variant == "mirai_e" else []
    fields = {"name": variant, "seed": seed, "num_steps": 3000, "batch_size": 32}
    return {**fields, "data": data, "foresight": terms, **more}


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def add_run(results, sweep, name, config, entries, speed=100.0):
    """A run of ten minutes whose foresight, if any, is on after step 1,000."""
    folder = results / "runs" / sweep / name
    folder.mkdir(parents=True)
    losses = [f"foresight_{term['source']}_r0c0" for term in config["foresight"]]
    metrics = [
        {"step": step, "images_per_second": speed} | dict.fromkeys(losses, -0.5 * (step > 1000))
        for step in STEPS
    ]
    command = f"python -m mirai_jax.main --config=configs/{config['name']}.py"
    run = {"setting": name.removesuffix(f"-seed={config['seed']}"), "command": command}
    run |= {"steps": config["num_steps"], "seconds": 600.0, "machine": "a machine"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps(run))
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "assessment.jsonl", entries)


def add_curve(results, variant, seed, end, speed=100.0):
    """A curve that falls from 80 by the same amount from step to step."""
    fall = (80.0 - end) / (len(STEPS) - 1)
    entries = [entry(step, 80.0 - fall * i) for i, step in enumerate(STEPS)]
    config = config_of(variant, seed)
    add_run(results, "variants", f"{variant}-seed={seed}", config, entries, speed)


@pytest.fixture
def results(tmp_path):
    """Two variants, three seeds: Mirai-E needs half as much time to fall as low, and costs more."""
    folder = tmp_path / "results"
    for seed, low in enumerate((40.0, 41.0, 42.0)):
        add_curve(folder, "llamagen", seed, low)
        add_curve(folder, "mirai_e", seed, 2 * low - 80 - 10 * (seed == 2), speed=80.0)
    return folder


def readme(folder):
    return report.text(folder, collected.read(folder), ())


def rows(text, start, section=""):
    """The cells after the start of each row of tables that begins so, from a heading on."""
    lines = text[text.index(section) :].splitlines()
    found = [line for line in lines if line.startswith(f"| {start} |")]
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in found]


def test_final_values_and_differences_to_the_same_seed(results):
    llamagen, mirai_e = (rows(readme(results), name) for name in ("LlamaGen", "Mirai-E"))
    assert llamagen[0][0].startswith("[0](runs/variants/llamagen-seed=0), [1](")
    assert llamagen[0][1:4] == ["41.00 ± 1.00", "59.0 ± 1.0", "1.4100 ± 0.0100"]
    # 0, 2 and -6 less 40, 41 and 42.
    assert mirai_e[1][0].startswith("**-42.33** better (-48.00 to -39.00)")
    assert mirai_e[1][1].startswith("**+42.3** better (+39.0 to +48.0)")
    assert rows(readme(results), "Mirai-I")[0] == ["not run"] * len(llamagen[0])
    # A seed that only one of both has is in no difference.
    shutil.rmtree(results / "runs" / "variants" / "llamagen-seed=2")
    assert "-39.50** better (-40.00 to -39.00)" in rows(readme(results), "Mirai-E")[1][0]


def test_speed_ups(results):
    add_curve(results, "mirai_i", 0, 60.0)
    found = rows(readme(results), "Fréchet", "### Speed-up")
    assert found[0][:5] == ["LlamaGen", "1.00", "1.00", "1.00", "1.00 (1.00 to 1.00)"]
    # To the mean over seeds, 41: reached early, exactly, and never.
    assert found[0][5] == "1.00 (not reached to 1.02)"
    # Half the way down takes half of the 2,500 steps after the first 500; 38 of 86 takes less.
    ratios = [3000 / 1750, 3000 / 1750, 3000 / (500 + 2500 * 38 / 86)]
    assert found[1][1:4] == [f"{ratio:.2f}" for ratio in ratios]
    assert found[2][1:5] == ["not reached", "not run", "not run", "not reached"]


def test_times(results):
    # Rounds differ in speed: what counts is the ratio within each.
    taken = {"llamagen": [0.1, 0.2, 0.4], "mirai_e": [0.125, 0.3, 0.5]}
    variants = {name: {"step_seconds": seconds} for name, seconds in taken.items()}
    about = {"command": "bench --compare", "scale": study.SCALE}
    (results / "bench.json").write_text(json.dumps({"about": about, "variants": variants}))
    text = readme(results)
    assert rows(text, "Mirai-I", "### Time")[0] == ["not run"] * 7
    found = rows(text, "Mirai-E", "### Time")[0]
    assert found[:2] == ["300", "1.25 (1.25 to 1.50)"]
    # As good at step 1,750: 1,000 steps without foresight, 750 with it.
    assert found[2].startswith(f"{3000 / (1000 + 750 * 1.25):.2f} (")
    assert found[5:] == ["400 (400 to 400)", "10.0 (10.0 to 10.0)"]


def test_diagnostics_beside_their_reference_the_noise_and_the_paper(results):
    # Runs of 2,000 steps are compared at their own end, with the noise of that step.
    for name, frechet, steps in (
        ("layer-1", 40.0, 2000),
        ("layer-2", 31.0, 2000),
        ("layer-4", 35.0, 2000),
        ("output-2d", 20.0, 3000),
        ("output-1d", 60.0, 3000),
    ):
        config = config_of("mirai_e", 0, num_steps=steps)
        add_run(results, "diagnostics", name, config, [entry(steps, frechet)])
    text = readme(results)
    assert f"After 2,000 steps (yardstick for noise: Fréchet {0.6 * NOISE:.2f}; agree" in text
    assert f"After 3,000 steps (yardstick for noise: Fréchet {NOISE:.2f}; agree" in text
    for name, expected in {
        "LlamaGen": ["56.00", "**+24.00** worse", ""],  # three fifths of the way from 80 to 40
        "Mirai-E": ["32.00", "", "**-24.00** better"],
        "block 1": ["40.00", "**+8.00** worse", "**-16.00** better"],
        "block 2": ["31.00", "-1.00", "**-25.00** better"],
    }.items():
        assert rows(text, name, "### Aligned block")[0][1:4] == expected
    found = rows(text, "Mirai-E is better than LlamaGen")[0]
    assert found[1:] == ["3,000", "3", "Mirai-E -1.33, LlamaGen 41.00", *["**agrees**"] * 3]
    for claim, verdict in {
        "Mirai-I is better than LlamaGen": "not run",
        "output level: 2-D is worse than no foresight": "**does not agree**",
        "output level: 1-D is worse than no foresight": "**agrees**",
        "two thirds of the depth is the best block": "undecided",
    }.items():
        assert rows(text, claim)[0][-1] == verdict


def test_protocols_are_not_mixed(results):
    path = results / "runs" / "variants" / "mirai_e-seed=0" / "assessment.jsonl"
    good = path.read_text()
    path.write_text(good + json.dumps(entry(3000, 77.0, {**PROTOCOL, "guidance": 2.0})) + "\n")
    assert rows(readme(results), "Mirai-E")[0][1] == "-1.33 ± 4.16"
    assert rows(readme(results), "Mirai-E", "### With guidance 2.0")[0][1:3] == ["77.00", "23.0"]
    path.write_text(good + json.dumps(entry(3000, 77.0, {**PROTOCOL, "samples": 9})) + "\n")
    with pytest.raises(DataError, match="assessment.jsonl, line 7: protocol"):
        readme(results)


def test_a_damaged_file_is_named(results):
    path = results / "runs" / "variants" / "mirai_e-seed=1" / "assessment.jsonl"
    good = path.read_text()
    for damage in ('{"step": 500, "protocol": {}, "frechet": NaN}', '{"step": 5'):
        path.write_text(f"{good}{damage}\n")
        with pytest.raises(DataError, match="assessment.jsonl, line 7"):
            readme(results)
    path.with_name("config.json").unlink()
    with pytest.raises(DataError, match="config.json is missing"):
        readme(results)


# The whole report ---------------------------------------------------------------------------------


def test_the_committed_report_is_what_the_committed_runs_give():
    folder = ROOT / "results"
    # Pictures depend on Matplotlib's version: --check compares them too.
    drawn = [name for name in report.FIGURES if (folder / name).exists()]
    text = report.text(folder, collected.read(folder), drawn)
    assert (folder / "README.md").read_text() == text


def test_every_run_of_the_sweeps_has_its_role():
    def settings(sweep):
        entries = plan.read_sweep(str(ROOT / "launch" / "sweeps" / f"{sweep}.py"), study.SCALE)
        return {f"{sweep}/{setting}" for _, setting in overrides.names(entries)}

    roles = [setting for question in study.QUESTIONS for setting in question.settings]
    assert sorted(roles) == sorted(settings("diagnostics") | settings("controls"))
    assert set(study.VARIANTS) == settings("variants")
    explored = {explored.sweep for explored in study.EXPLORATIONS}
    # A renamed setting leaves runs without a role.
    for run in collected.read(ROOT / "results").runs:
        setting = f"{run.sweep}/{run.setting}"
        assert run.sweep in explored or setting in {*roles, *study.VARIANTS}, setting


# Collecting ---------------------------------------------------------------------------------------


def add_workdir(out, name, config, finished=True, step=3000, command=""):
    """As `launch.sweep` leaves a run."""
    folder = out / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_lines(folder / "metrics.jsonl", [{"step": 1, "loss": 5.5}, {"step": step, "loss": 0.1}])
    write_lines(folder / "assessment.jsonl", [entry(3000, 1 / 3)])
    if finished:
        (folder / "summary.png").touch()
    (out / f"{name}.log").write_text(
        "launch: 2026-01-02 03:04:05 /opt/venv/bin/python -m mirai_jax.main "
        f"--config=configs/llamagen.py:fashion_mnist --workdir={folder} {command}\n"
        "step 1\nlaunch: exit status 75 after 10.5 s\nlaunch: 2026-01-02 03:04:16 again\n"
        "launch: exit status 0 after 20.0 s\n"
    )


def collect_from(sweep, out):
    return list(collect.collect([sweep], out / "runs", "a machine"))


def test_collecting(tmp_path):
    sweep, out = tmp_path / "study" / "variants-fashion_mnist", tmp_path / "results"
    pretrained = tmp_path / "study" / "other" / "llamagen"
    offsets = "'--config.foresight[0].offsets=((0, 0), (0, 1))'"
    command = f"{offsets} --config.init_from={pretrained}"
    config = config_of("mirai_e", 0, init_from=str(pretrained))
    add_workdir(sweep, "mirai_e-seed=0", config, command=command)
    add_workdir(sweep, "mirai_e-seed=1", config_of("mirai_e", 1), step=2500)
    add_workdir(sweep, "mirai_e-seed=2", config_of("mirai_e", 2), finished=False)
    runs = out / "runs" / "variants"
    made, *left_out = collect_from(sweep, out)
    assert made == f"collected: {runs}/mirai_e-seed=0"
    assert [line.split(": ")[1][-6:] for line in left_out] == ["seed=1", "seed=2"]
    assert [path.name for path in runs.iterdir()] == ["mirai_e-seed=0"]
    for name in ("metrics.jsonl", "assessment.jsonl"):
        copy, source = (folder / "mirai_e-seed=0" / name for folder in (runs, sweep))
        assert copy.read_bytes() == source.read_bytes()
    run = collected.read(out).seeds("variants/mirai_e")[0]
    assert (run.steps, run.seconds, run.machine) == (3000, 30.5, "a machine")
    # Commands and configs are those of runs below runs/sweeps.
    assert run.command == (
        "python -m mirai_jax.main --config=configs/llamagen.py:fashion_mnist "
        f"--workdir=runs/sweeps/variants/mirai_e-seed=0 {offsets} "
        "--config.init_from=runs/sweeps/other/llamagen"
    )
    moved = {**config, "init_from": "runs/sweeps/other/llamagen"}
    assert json.loads((runs / "mirai_e-seed=0" / "config.json").read_text()) == moved


@pytest.mark.parametrize("where", ["config.json", "log"])
def test_other_paths_of_the_machine_are_refused(tmp_path, where):
    path, sweep = "/home/someone/x", tmp_path / "variants"
    config = config_of("llamagen", 0, **({"init_from": path} if where == "config.json" else {}))
    command = f"--config.init_from={path}" if where == "log" else ""
    add_workdir(sweep, "llamagen-seed=0", config, command=command)
    with pytest.raises(DataError, match=where):
        collect_from(sweep, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_the_program(results, monkeypatch):
    """Writes the report with its figures; --check fails where a file is another, and mends none."""
    known = report._FLAGS
    known(["report"])
    monkeypatch.setattr(known["results"], "value", str(results))
    (results / "findings.md").write_text("Foresight helps *a little*.\n")
    report.main(["report"])
    assert "## Findings\n\nForesight helps *a little*.\n" in (results / "README.md").read_text()
    monkeypatch.setattr(known["check"], "value", True)
    report.main(["report"])
    (results / "README.md").write_text("other")
    (results / "comparison.png").unlink()
    with pytest.raises(SystemExit) as stopped:
        report.main(["report"])
    wrong = [line.split(" is ")[0] for line in stopped.value.code.splitlines()]
    assert wrong == [f"{results}/README.md", f"{results}/comparison.png"]
    assert (results / "README.md").read_text() == "other"
