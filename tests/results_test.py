"""results/: its tables are what its runs give, the headline numbers recomputed, and how runs are collected."""

import importlib.util
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from launch import collect
from mirai_jax.utils.errors import DataError

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "results"


@pytest.fixture(scope="module")
def tables():
    for package in ("pandas", "scipy"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("tables", RESULTS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_rebuilds_tables_and_figures(tables, tmp_path):
    tables.write(tmp_path)
    assert (tmp_path / "tables.md").read_bytes() == (RESULTS / "tables.md").read_bytes()
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    # The strip of samples is drawn from checkpoints.
    assert drawn == sorted(p.name for p in RESULTS.glob("*.png") if p.name != "samples.png")
    for name in drawn:
        with Image.open(tmp_path / name) as made, Image.open(RESULTS / name) as kept:
            alike = made.text["Software"] == kept.text["Software"]  # Matplotlib's version
        if alike:
            assert (tmp_path / name).read_bytes() == (RESULTS / name).read_bytes(), name


# Recomputed with nothing of tables.py: JSON and NumPy.
T_975 = {2: 4.302652729911275, 4: 2.7764451051977987}  # by degrees of freedom


def last_values(sweep, arm, step):
    """{seed: cross-entropy of the EMA}; of positions.jsonl where there is one."""
    found = {}
    for folder in (RESULTS / "runs" / sweep).glob(f"{arm}-seed=*"):
        seed = int(folder.name.rpartition("=")[2])
        for name in ("assessment.jsonl", "positions.jsonl"):
            path = folder / name
            for line in path.read_text().splitlines() if path.exists() else ():
                entry = json.loads(line)
                if entry["step"] == step and name == "positions.jsonl":
                    found[seed] = np.mean(np.ravel(entry["ema"]))
                elif entry["step"] == step and "cross_entropy" in entry:
                    found[seed] = entry["cross_entropy"]
    return found


def shown(differences):
    d = np.array(differences)
    half = T_975[len(d) - 1] * d.std(ddof=1) / np.sqrt(len(d))
    text = f"**{d.mean():+.4f}** [{d.mean() - half:+.4f}, {d.mean() + half:+.4f}]"
    return (text if abs(d.mean()) > half else text.replace("*", "")).replace("-", "−")


@pytest.mark.parametrize(
    "one, two, row",
    [
        ("variants/mirai_e", "variants/llamagen", "Mirai-E"),
        ("variants/mirai_i", "variants/llamagen", "Mirai-I"),
        ("variants/mirai_e_i", "variants/llamagen", "Mirai-E and I"),
        ("controls/past-only", "variants/mirai_e", "E, offsets into the past − Mirai-E"),
        ("controls/same-position", "variants/llamagen", "E, the same position, weight 6"),
        ("study_direction/future", "study_direction/past", "Future − past: "),
    ],
)
def test_headline_numbers_recomputed(one, two, row):
    steps = {"variants": 3000, "controls": 2000, "study_direction": 11250}
    step = min(steps[name.split("/")[0]] for name in (one, two))
    mine, theirs = (last_values(*name.split("/"), step) for name in (one, two))
    seeds = sorted(mine.keys() & theirs.keys())
    text = (RESULTS / "tables.md").read_text()
    if row.startswith("Future") and len(seeds) < 5:
        assert f"**Not run yet**: {len(seeds)} of 5 pairs" in text
        return
    assert len(seeds) == (5 if row.startswith("Future") else 3)
    expected = shown([mine[seed] - theirs[seed] for seed in seeds])
    found = [line for line in text.splitlines() if line.startswith((f"| {row} |", row))]
    assert any(expected in line for line in found), (expected, found)


def test_the_primary_test_is_made_when_all_pairs_are_there(tables):
    past = np.array([1.10, 1.11, 1.12, 1.13, 1.14])
    gains = np.array([0.001, 0.002, 0.003, 0.002, 0.001])

    def made(seeds, gains):
        rows = [
            {"sweep": "study_direction", "arm": arm, "seed": seed, "ema": value, "guidance": 1.0}
            for arm, values in (("past", past), ("future", past - gains))
            for seed, value in enumerate(values[:seeds])
        ]
        return tables.primary(tables.pd.DataFrame(rows).assign(step=1, last=1))

    assert "4 of 5 pairs" in made(4, gains) and "p =" not in made(4, gains)
    assert shown(-gains) in made(5, gains) and made(5, gains).endswith("future lower.\n\n")
    assert made(5, -gains).endswith("past lower.\n\n")
    assert made(5, gains - gains.mean()).endswith("undecided.\n\n")


@pytest.mark.parametrize(
    "name, other", [("positions", {"held_out": 5000}), ("assessment", {"seed": 9, "guidance": 1.0})]
)
def test_numbers_of_another_protocol_are_refused(tables, tmp_path, name, other):
    kept = tmp_path / "study_direction"
    shutil.copytree(RESULTS / "runs" / "study_direction", kept)
    tables.read(tmp_path)
    path = kept / "past-seed=1" / f"{name}.jsonl"
    entry = json.loads(path.read_text().splitlines()[-1])
    entry["protocol"] |= other
    path.write_text(path.read_text() + json.dumps(entry) + "\n")
    with pytest.raises(ValueError, match="past-seed=1.*protocol"):
        tables.read(tmp_path)


def test_what_the_page_says_is_in_the_tables():
    """Every difference of the page, with its interval, stands in a table too."""
    text = (RESULTS / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    quoted = re.findall(r"[+−][\d.]+\W*\[[+−][\d.]+, [+−][\d.]+\]", text)
    tables = (RESULTS / "tables.md").read_text().replace("*", "")
    assert len(quoted) > 10
    assert [cell for cell in quoted if cell.replace("*", "") not in tables] == []


# Collecting ---------------------------------------------------------------------------------------


def add_workdir(out, name, config, step=3000, command=""):
    """As `launch.sweep` leaves a run that was stopped once."""
    folder = out / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    metrics = [{"step": 1000, "images_per_second": 100.0}, {"step": 2000}]
    metrics += [{"step": step, "images_per_second": 200.0}]
    for file, entries in ("metrics", metrics), ("positions", [{"step": 3000, "ema": [[1 / 3]]}]):
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (folder / f"{file}.jsonl").write_text(text)
    (folder / "summary.png").touch()
    (out / f"{name}.log").write_text(
        "launch: 2026-01-02 03:04:05 /opt/venv/bin/python -m mirai_jax.main "
        f"--config=configs/llamagen.py:fashion_mnist --workdir={folder} {command}\n"
    )


def config_of(seed, **more):
    return {"seed": seed, "num_steps": 3000, "batch_size": 10, "foresight": [], **more}


def test_collecting(tmp_path):
    sweep, out = tmp_path / "study" / "variants-fashion_mnist", tmp_path / "runs"
    offsets = "'--config.foresight[0].offsets=((0, 0), (0, 1))'"
    teacher = tmp_path / "study" / "other" / "llamagen"
    add_workdir(sweep, "e-seed=0", config_of(0, init_from=str(teacher)), command=offsets)
    add_workdir(sweep, "e-seed=1", config_of(1), step=2500)
    made = out / "variants" / "e-seed=0"
    lines = list(collect.collect([sweep], out, "a machine", "abc"))
    assert lines[0] == f"collected: {made} (no assessment.jsonl)"
    assert lines[1].endswith("unfinished, at step 2500 of 3000")
    assert [path.name for path in made.parent.iterdir()] == ["e-seed=0"]
    source = sweep / "e-seed=0" / "positions.jsonl"
    assert (made / "positions.jsonl").read_bytes() == source.read_bytes()
    config = json.loads((made / "config.json").read_text())
    assert config["init_from"] == "runs/sweeps/other/llamagen"
    assert json.loads((made / "run.json").read_text()) == {
        "setting": "e",
        "command": "python -m mirai_jax.main --config=configs/llamagen.py:fashion_mnist "
        f"--workdir=runs/sweeps/variants/e-seed=0 {offsets}",
        "steps": 3000,
        "seconds": 216.7,  # 100 + 66.7 + 50: the line without a speed has the median of the others
        "machine": "a machine",
        "commit": "abc",
    }


@pytest.mark.parametrize("where", ["config.json", "log"])
def test_other_paths_of_the_machine_are_refused(tmp_path, where):
    path, sweep = "/home/someone/x", tmp_path / "variants"
    config = config_of(0, **({"init_from": path} if where == "config.json" else {}))
    add_workdir(sweep, "l-seed=0", config, command=f"--config.init_from={path}" * (where == "log"))
    with pytest.raises(DataError, match=where):
        list(collect.collect([sweep], tmp_path / "results", "a machine"))
    assert not (tmp_path / "results").exists()
