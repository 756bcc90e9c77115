"""The sweep launcher: overrides and names, checks before anything starts, runs and their reports.

Most runs here are a few lines of Python in place of the training program; the last ones are real.
"""

import csv
import dataclasses
import io
import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ml_collections.config_flags import config_path
from PIL import Image

from launch import curves, jobs, overrides, plan, slurm, tables
from launch import sweep as sweep_program
from launch.board import Board
from launch.overrides import chain, over, product, zipped
from mirai_jax.utils.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[1]
SWEEPS = sorted(p for p in (ROOT / "launch" / "sweeps").glob("*.py") if p.stem != "__init__")
SMALL = [
    "num_steps=150",
    "batch_size=16",
    "log_every=1",
    "checkpoint_every=100",
    "sample_every=0",
    "judged_samples=0",
    "optimizer.warmup_steps=2",
    "model.num_layers=1",
    "model.num_heads=1",
    "model.width=16",
    "model.vocab_size=16",
    "model.unroll=1",
    "model.grid=(2, 2)",
    "tokenizer.patch=16",
    "sample.classes=1",
    "sample.per_class=1",
]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs are named from there


# Combinators --------------------------------------------------------------------------------------

fields = st.sampled_from("abcdefgh")
parts = st.lists(
    st.tuples(fields, st.lists(st.integers(), max_size=3)), max_size=4, unique_by=lambda p: p[0]
)


@given(parts)
def test_product_is_every_combination_and_the_last_changes_fastest(chosen):
    made = product(*(over(field, values) for field, values in chosen))
    expected = itertools.product(*(values for _, values in chosen))
    assert [tuple(entry.values()) for entry in made] == list(expected)
    assert all(list(entry) == [field for field, _ in chosen] for entry in made)


@given(parts)
def test_zipped_and_chain(chosen):
    entries = [over(field, values) for field, values in chosen]
    assert chain(*entries) == [entry for part in entries for entry in part]
    if len({len(part) for part in entries}) > 1:
        with pytest.raises(ConfigError, match="zipped: parts of"):
            zipped(*entries)
        return
    columns = zip(*(values for _, values in chosen), strict=True)
    assert [tuple(entry.values()) for entry in zipped(*entries)] == list(columns)


@pytest.mark.parametrize("combine", [product, zipped])
def test_a_field_in_two_parts_is_told_by_name(combine):
    with pytest.raises(ConfigError, match="model.width is in more than one part"):
        combine(over("model.width", [1]), over("seed", [2]), over("model.width", [3]))


# Names --------------------------------------------------------------------------------------------

scalars = st.one_of(
    st.booleans(),
    st.integers(-(10**6), 10**6),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12).filter(lambda text: "\0" not in text),
)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3).map(tuple), max_leaves=6)
entries_of = st.lists(
    st.dictionaries(st.sampled_from(["seed", "a.x", "b.x", "foresight[0].y", "name"]), values),
    min_size=1,
    max_size=6,
    unique_by=lambda entry: repr(sorted(entry.items(), key=lambda item: item[0])),
)


@given(entries_of)
def test_names_are_unique_safe_and_stable(entries):
    made = [name for name, _ in overrides.names(entries)]
    assert len(set(made)) == len(entries)
    assert all(re.fullmatch(r"[A-Za-z0-9_=+][A-Za-z0-9._=+-]{0,120}", name) for name in made)
    assert not {"lock", "jobs", "table.md"} & set(made)
    assert made == [name for name, _ in overrides.names([dict(entry) for entry in entries])]


def test_names_are_what_differs():
    offsets = [(0, 1, 2), ((0, 0), (0, 1))]
    layouts = zipped(over("f[0].layout", ["1d", "2d"]), over("f[0].offsets", offsets))
    entries = product(
        over("seed", [0, 1]), over("config", ["configs/a.py"]), layouts, over("data.path", ["/x y"])
    )
    # The offsets follow from the layout, and the seed comes last.
    assert overrides.names(entries) == [
        ("layout=1d-seed=0", "layout=1d"),
        ("layout=2d-seed=0", "layout=2d"),
        ("layout=1d-seed=1", "layout=1d"),
        ("layout=2d-seed=1", "layout=2d"),
    ]
    names = lambda entries: [name for name, _ in overrides.names(entries)]  # noqa: E731
    assert names(over("f[0].offsets", offsets)) == ["offsets=0_1_2", "offsets=0_0+0_1"]
    assert names([{"a.width": 1}, {"b.width": 1}]) == ["a.width=1", "b.width=1"]
    assert names([{"config": "c/a.py"}, {"config": "c/a.py:big"}]) == ["a", "a-big"]
    assert names([{"config": "c/a.py", "name": "K = 1"}, {"name": "K = 2"}]) == ["K-=-1", "K-=-2"]
    assert names([{"config": "c/a.py", "seed": 7}]) == ["a"]


def test_long_and_clashing_names_get_a_hash():
    long = over("data.path", ["x" * 300, "y" * 300])
    clash = over("data.path", ["/a", ":a"])
    for entries in (long, clash):
        made = overrides.names(product(entries, over("seed", [0, 1])))
        assert len({name for name, _ in made}) == 4
        assert len({setting for _, setting in made}) == 2
        assert all(re.search(r"-[0-9a-f]{8}$", name) for name, _ in made)


# Values through the program's flags ---------------------------------------------------------------

FIELDS = {
    "seed": st.integers(-(2**40), 2**40),
    "optimizer.learning_rate": st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
    "teacher.cached": st.booleans(),
    "data.path": st.text().filter(lambda text: "\0" not in text),
    "foresight[0].weights": st.lists(st.floats(allow_nan=False, allow_infinity=False)).map(tuple),
    "foresight[0].offsets": st.lists(st.tuples(st.integers(), st.integers())),
    "foresight[0].source": st.sampled_from(["ema", "(1, 2)", "True", "None", "3"]),
    "foresight": st.just(()),
}


@hypothesis_settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FIELDS)).flatmap(lambda f: st.tuples(st.just(f), FIELDS[f])))
def test_values_reach_the_program_exactly(chosen):
    field, value = chosen
    text = overrides.flag_text(field, value)
    config = plan.parse_config(["--config=configs/mirai_e.py:demo", f"--config.{field}={text}"])
    parsed = config_path.get_value(field, config)
    assert parsed == overrides.plain(value)
    assert type(parsed) is type(overrides.plain(value)) or isinstance(parsed, float)


def test_the_program_reads_what_the_launcher_checked():
    values = {
        "foresight[0].offsets": ((0, 0), (0, 1)),
        "foresight[0].weights": [0.5, 2],
        "data.path": "a b,'\"$(x)\n;é\\",
        "tokenizer.path": "",
        "optimizer.learning_rate": 1e-05,
        "teacher.cached": True,
    }
    arguments = ["--config=configs/mirai_e.py:demo"]
    arguments += [f"--config.{f}={overrides.flag_text(f, v)}" for f, v in values.items()]
    program = (
        "import sys; from mirai_jax import main\nfrom mirai_jax.config import compare\n"
        "main.train.train = lambda config, workdir: print(compare.to_json(config))\n"
        "main.main(main.parse_flags(sys.argv))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    expected = json.loads(plan.compare.to_json(plan.parse_config(arguments)))
    assert json.loads(done.stdout) == expected
    assert expected["foresight"][0]["offsets"] == [[0, 0], [0, 1]]
    assert expected["data"]["path"] == values["data.path"]


@pytest.mark.parametrize("value", [None, np.float64(0.5), object(), "a\0b", print])
def test_values_that_no_flag_can_carry_are_refused(value):
    with pytest.raises(ConfigError, match="data.path is .*it must be a plain string, number"):
        overrides.flag_text("data.path", value)


# Sweep files and checks ---------------------------------------------------------------------------

IMAGENET = {
    "data.path": "codes",
    "data.images": "images",
    "teacher.path": "dinov2.pth",
    "tokenizer.path": "vq.pt",
}


def runs_of(sweep, scale="demo", common=None, out="nowhere"):
    entries = plan.read_sweep(str(sweep), scale)
    return plan.make_runs(entries, scale, common or {}, pathlib.Path(out))


ONE_SEED = ("diagnostics", "teachers")


@pytest.mark.parametrize("scale", ["demo", "fashion_mnist", "imagenet_b", "imagenet_xl_384"])
@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps_are_valid(sweep, scale):
    if sweep.stem == "teachers" and scale.startswith("imagenet"):
        with pytest.raises(ConfigError, match="teachers of one's own"):
            runs_of(sweep, scale)
        return
    small = not scale.startswith("imagenet")
    runs = runs_of(sweep, scale, {} if small else IMAGENET)
    assert len({run.name for run in runs}) == len(runs) > 2
    assert all(f":{scale}" in run.arguments[0] for run in runs)
    seeds = 3 if (small or sweep.stem == "variants") and sweep.stem not in ONE_SEED else 1
    assert len(runs) == seeds * len({run.setting for run in runs})
    assert f"--sweep=launch/sweeps/{sweep.name}" in sweep.read_text()


def test_the_layers_reach_over_the_depth_of_the_model():
    def layers(scale):
        runs = runs_of(ROOT / "launch/sweeps/layer.py", scale, IMAGENET)
        return list(dict.fromkeys(int(run.shown["student_layer"]) for run in runs))

    assert layers("demo") == [1, 2, 3, 4]
    assert layers("imagenet_b") == [2, 4, 6, 8, 10, 12]
    assert layers("imagenet_xl") == [6, 12, 18, 24, 30, 36]


def sweep_file(folder, body, name="some.py"):
    path = folder / name
    path.write_text(f"from launch.overrides import *\n{body}")
    return path


@pytest.mark.parametrize(
    "body, expected",
    [
        ("def get_sweep(scale):\n    return [{}] + 3", "line 3: TypeError: can only concatenate"),
        ("x = (", "line 2: SyntaxError"),
        ("", "has no function get_sweep"),
        ("get_sweep = lambda scale: []", "yields no runs"),
        ("get_sweep = lambda: []", "get_sweep|<lambda>"),
        ("get_sweep = lambda scale: product(over('a', [1]), over('a', [2]))", "product: a is in"),
        ("get_sweep = lambda scale: [{1: 2}]", "must yield dictionaries {field: value}"),
        ("import nowhere", "No module named 'nowhere'"),
    ],
)
def test_a_wrong_sweep_file_is_one_line(tmp_path, body, expected):
    path = sweep_file(tmp_path, body)
    with pytest.raises(ConfigError, match=expected) as caught:
        plan.read_sweep(str(path), "demo")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_runs_are_told_together(tmp_path):
    entries = [
        {"config": "configs/mirai_e.py", "seed": 1},
        {"config": "configs/mirai_e.py", "foresight[0].student_layer": 9},
        {"config": "configs/mirai_e.py", "foresight[0].weight": 3},
        {"config": "configs/llamagen.py", "foresight[0].level": "output"},
        {"config": "configs/llamagen.py", "seed": 0.5},
        {"config": "configs/llamagen.py", "teacher.cached": 1},
        {"config": "configs/llamagen.py", "model.depth": 3},
        {"config": "configs/none.py"},
        {"config": "configs/llamagen.py:huge"},
        {"config": "configs/llamagen.py:imagenet_b"},
        {"config": "configs/llamagen.py", "seed; rm": 3},
        {"seed": 2},
        {"config": "configs/mirai_e.py", "seed": 1, "foresight[0].level": "internal"},
        {"config": "configs/mirai_e.py", "seed": 1},
    ]
    with pytest.raises(plan.WrongRuns) as caught:
        plan.make_runs(entries, "demo", {}, tmp_path / "out")
    expected = [
        "student_layer=9: foresight[0].student_layer is 9; it must be a block of the model, 1 to 4",
        "weight=3: config.foresight[0].weight does not exist (given '3'); the fields of config.foresight[0]",
        "level=output: config.foresight[0].level does not exist (given 'output')",
        "seed=0.5: seed=0.5: invalid literal for int",
        "cached=1: teacher.cached is 1, which the program reads as True",
        "depth=3: config.model.depth does not exist (given '3'); the fields of config.model",
        "none: config is 'configs/none.py', which is no file",
        "llamagen-huge: scale 'huge' is unknown",
        "llamagen-imagenet_b: data.path is ''; it must be a folder of codes",
        "config.seed; rm does not exist (given '3')",
        "seed=2: there is no config",
        "is the same run as mirai_e-seed=1",
        "the sweep yields it twice",
    ]
    assert len(caught.value.lines) == len(expected)
    for line, part in zip(caught.value.lines, expected, strict=True):
        assert part in line and "\n" not in line, line
    assert not (tmp_path / "out").exists()


def test_common_overrides_and_a_changed_run(tmp_path):
    sweep = sweep_file(tmp_path, "CONFIG = 'configs/llamagen.py'\nget_sweep = seeds")
    with pytest.raises(plan.WrongRuns, match="--set=seed=3: the sweep itself sets seed"):
        runs_of(sweep, common={"seed": "3"})
    with pytest.raises(plan.WrongRuns, match="num_step does not exist"):
        runs_of(sweep, common={"num_step": "3"})
    run, *_ = runs_of(sweep, common={"num_steps": "60", "model.width": "48"}, out=tmp_path / "out")
    assert run.num_steps == 60 and "--config.model.width=48" in run.arguments
    run.workdir.mkdir(parents=True)
    config = plan.parse_config([a for a in run.arguments if not a.startswith("--workdir")])
    (run.workdir / "config.json").write_text(plan.compare.to_json(config))
    runs_of(sweep, common={"num_steps": "90", "model.width": "48"}, out=tmp_path / "out")
    with pytest.raises(plan.WrongRuns) as caught:
        runs_of(sweep, common={"model.width": "96"}, out=tmp_path / "out")
    assert len(caught.value.lines) == 1
    assert "seed=0" in caught.value.lines[0] and "model.width was 48, is 96" in str(caught.value)


# Processes ----------------------------------------------------------------------------------------

# In place of the training program: counts its starts, logs steps as told, ends as told.
PROGRAM = """
import json, pathlib, signal, sys, time
folder, steps, *ends = sys.argv[1:]
folder = pathlib.Path(folder); folder.mkdir(exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
starts = folder / "starts"
count = int(starts.read_text()) if starts.exists() else 0
starts.write_text(str(count + 1))
end = ends[min(count, len(ends) - 1)]
print("start", count + 1, flush=True)
with (folder / "metrics.jsonl").open("a") as file:
    for i in range(int(steps)):
        file.write(json.dumps({"step": i + 1, "loss": 2.0, "cross_entropy": 2.0 - 0.01 * i,
                               "images_per_second": 9.0}) + "\\n"); file.flush()
        time.sleep(60 if end == "sleep" else 0.01)
if end == "0": (folder / "summary.png").write_text("")
if end == "kill": signal.raise_signal(signal.SIGKILL)
print("error: of", folder.name, file=sys.stderr)
sys.exit(int(end))
"""


@dataclasses.dataclass(frozen=True)
class FakeRun(plan.Run):
    """A run of PROGRAM; `arguments` are the steps that it logs and how its starts end."""

    @property
    def command(self):
        return [sys.executable, "-c", PROGRAM, str(self.workdir), *self.arguments]


def fake(out, name, *ends, steps=3):
    return FakeRun(name, name, {"name": name}, (str(steps), *ends), out / name, 3)


def starts(run):
    path = run.workdir / "starts"
    return int(path.read_text()) if path.exists() else 0


def run_all(runs, parallel=2):
    stream = io.StringIO()
    return *jobs.run_all(runs, parallel, Board(runs, stream)), stream.getvalue()


def test_a_failing_run_does_not_stop_the_others(tmp_path):
    runs = [fake(tmp_path, n, e) for n, e in (("a", "0"), ("b", "1"), ("c", "0"), ("d", "2"))]
    failed, stopped, said = run_all(runs)
    assert not stopped and "a: finished" in said and "c: finished" in said
    assert failed == {"b": "exit status 1: error: of b", "d": "exit status 2: error: of d"}
    # Only what is missing is started again.
    runs = [fake(tmp_path, "a", "0"), fake(tmp_path, "b", "1", "0"), fake(tmp_path, "e", "0")]
    assert run_all(runs)[0] == {}
    assert [starts(run) for run in runs] == [1, 2, 1]
    assert "start 1" in runs[1].log.read_text() and "start 2" in runs[1].log.read_text()
    assert jobs.seconds(runs[1].log) > 0


def test_runs_are_started_again_where_that_helps(tmp_path):
    runs = [
        fake(tmp_path, "told", "75", "75", "0"),
        fake(tmp_path, "lost", "76", "134", "0"),
        fake(tmp_path, "killed", "kill", "0"),
        fake(tmp_path, "wrong", "1", "0"),
    ]
    failed, _, said = run_all(runs)
    assert failed == {"wrong": "exit status 1: error: of wrong"}
    assert [starts(run) for run in runs] == [3, 3, 2, 1]
    assert "killed: exit status 137 at step 3; started again" in said


def test_a_run_that_gets_no_further_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "RESTARTS", 2)
    run = fake(tmp_path, "stuck", "76", steps=0)
    assert run_all([run])[0] == {"stuck": "exit status 76: error: of stuck"}
    assert starts(run) == 3
    unfinished = fake(tmp_path, "short", "0", steps=2)
    assert run_all([unfinished])[0] == {"short": "ended before its last step: error: of short"}


LAUNCHER = """
import pathlib, sys
sys.path.insert(0, {root!r} + "/tests"); sys.path.insert(0, {root!r})
import sweep_test
from launch import jobs
from launch.board import Board
out = pathlib.Path({out!r})
runs = [sweep_test.fake(out, name, "sleep", "0") for name in "abc"]
with jobs.only_launcher(out):
    print(jobs.run_all(runs, 2, Board(runs)), flush=True)
"""


def launcher(out):
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER.format(root=str(ROOT), out=str(out))],
        stdout=subprocess.PIPE,
        text=True,
    )


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def idle(run):
    """Whether no process works on the run: its log can be locked."""
    with run.log.open("ab") as file:
        return jobs._lock(file)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_run_outlives_its_launcher(tmp_path, number):
    runs = [fake(tmp_path, name) for name in "abc"]
    process = launcher(tmp_path)
    until(lambda: all(run.step() == 1 for run in runs[:2]))
    assert not idle(runs[0])
    with jobs.only_launcher(tmp_path) as other:
        assert other.startswith(f"{process.pid} on ")
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    if number != signal.SIGKILL:
        assert "a: stopped at step 1" in said and said.strip().endswith("({}, True)")
    until(lambda: idle(runs[0]) and idle(runs[1]), 10)  # SIGTERM reached them all the same
    assert starts(runs[2]) == 0
    # The lock of a launcher that is gone binds nobody.
    assert (tmp_path / "lock").read_text() == f"{other}\n"
    with jobs.only_launcher(tmp_path) as other:
        assert other is None


def test_gpus_are_shared_out(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert jobs.gpus() == ["4", "5", "6"]
    share = lambda slot, n: jobs.gpu_share(jobs.gpus(), slot, n)  # noqa: E731
    assert share(0, 1) == {}
    assert [share(i, 2)["CUDA_VISIBLE_DEVICES"] for i in range(2)] == ["4,6", "5"]
    assert [share(i, 4)["CUDA_VISIBLE_DEVICES"] for i in range(4)] == ["4", "5", "6", "4"]
    assert share(0, 4)["XLA_CLIENT_MEM_FRACTION"] == "0.450"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert jobs.gpus() == []


def test_the_board_counts_and_estimates(tmp_path, monkeypatch):
    runs = [fake(tmp_path, name) for name in "abcd"]
    clock = iter([0.0, 60.0]).__next__
    monkeypatch.setattr("launch.board.time.monotonic", clock)
    board = Board(runs, io.StringIO())
    runs[1].workdir.mkdir()
    (runs[1].workdir / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    # a is done (3 steps), b is at 2 of 3, c failed: 4 steps of 5 are left after 60 s.
    assert board.lines([runs[1]], [runs[3]], {"c": "why"}) == [
        "1/4 done, 1 running, 1 failed, 1 waiting, 48s left",
        "  b  2/3",
    ]


# Jobs of a cluster --------------------------------------------------------------------------------


def wishes(cluster, **others):
    return slurm.Wishes(
        **{"cluster": cluster, "partition": "", "minutes": 90, "gpus": 0, "cpus": 0}
        | {"sbatch": {}, "at_once": 0}
        | others
    )


def test_jobs_in_this_process(tmp_path):
    runs = [fake(tmp_path, "a", "75", "0"), fake(tmp_path, "b", "3")]
    board = Board(runs, io.StringIO())
    cluster = slurm.Cluster(tmp_path, wishes("debug"))
    cluster.submit(runs, board.log)
    assert cluster.wait(runs, board) == {"b": "exit status 3: error: of b"}
    assert [starts(run) for run in runs] == [2, 1]
    cluster = slurm.Cluster(tmp_path, wishes("debug"))
    cluster.submit(runs, board.log)
    assert list(cluster._jobs) == ["b"]


def script(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_slurm_gets_what_was_asked_for_and_keeps_its_jobs(tmp_path, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    script(tools, "srun", "exit 1")
    script(tools, "sbatch", f'cat "$1" >> {tmp_path}/submitted; echo Submitted batch job 41')
    script(tools, "sacct", f"echo 'JobID|State|NodeList'; cat {tmp_path}/state")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    out = tmp_path / "out"
    runs = [fake(out, "a", "0"), fake(out, "b", "0"), fake(out, "c", "0")]
    run_all(runs[:1])
    asked = wishes(
        "slurm", partition="long", gpus=4, cpus=8, sbatch={"account": "me"}, at_once=2
    )  # fmt: skip
    said = []
    slurm.Cluster(out, asked).submit(runs, said.append)
    text = (tmp_path / "submitted").read_text()
    for line in (
        "--array=0-1%2", "--partition=long", "--time=90", "--gpus-per-node=4", "--cpus-per-task=8",
        "--account=me", "--requeue", "--signal=USR2@300", "--job-name=out",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in text, line
    assert json.loads((out / "jobs.json").read_text()) == {
        "b": {"cluster": "slurm", "job": "41_0"},
        "c": {"cluster": "slurm", "job": "41_1"},
    }
    # One waits in the queue, one was cancelled: only that one is submitted again.
    (tmp_path / "submitted").unlink()
    (tmp_path / "state").write_text("41_0|PENDING|\n41_1|CANCELLED by 0|\n")
    slurm.Cluster(out, wishes("slurm")).submit(runs, said.append)
    assert "b: job 41_0 of slurm is still there" in said
    assert "--array" not in (tmp_path / "submitted").read_text()
    assert json.loads((out / "jobs.json").read_text())["c"]["job"] == "41"


@pytest.mark.slow
def test_a_job_that_is_warned_saves_and_goes_back_into_the_queue(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent))  # where FakeRun is
    run = fake(tmp_path, "a", "sleep", "0")
    board = Board([run], io.StringIO())
    cluster = slurm.Cluster(tmp_path, wishes("local"))
    cluster.submit([run], board.log)
    until(lambda: run.step() == 1)
    controller = int(cluster._jobs["a"].job_id)
    children = pathlib.Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGUSR2)  # as SLURM does before a job's time is up
    assert cluster.wait([run], board) == {}
    assert starts(run) == 2 and run.finished()


def test_without_submitit_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match=r"mirai-jax\[slurm\]"):
        slurm.Cluster(tmp_path, wishes("debug"))
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="--cluster=slurm: .*srun"):
        slurm.Cluster(tmp_path, wishes("slurm"))


# Reports ------------------------------------------------------------------------------------------


def finished_sweep(out, steps=40):
    """A sweep of two settings and two seeds whose last run has only begun."""
    entries = product(
        over("config", ["configs/llamagen.py", "configs/mirai_e.py"]), over("seed", [0, 1])
    )
    runs = plan.make_runs(entries, "demo", {"num_steps": str(steps)}, out)
    for i, run in enumerate(runs[:3]):
        run.workdir.mkdir(parents=True)
        lines = [
            {
                "step": s,
                "loss": i + 1 / s,
                "cross_entropy": i + 2 / s,
                "images_per_second": 50.0 + i,
            }
            for s in range(1, steps + 1)
        ]
        lines[5]["cross_entropy"] = float("nan")  # an update that was skipped
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run.workdir / "metrics.jsonl").write_text(text)
        (run.workdir / "agreement.json").write_text(json.dumps({"samples": 0.9 + 0.01 * i}))
    return runs


def test_tables(tmp_path):
    runs = finished_sweep(tmp_path)
    (tmp_path / "llamagen-seed=0.log").write_text(
        "launch: 2030-01-01 00:00:00 python\nx\nlaunch: exit status 75 after 10.5 s\n"
        "launch: 2030-01-01 00:00:11 python\nlaunch: exit status 0 after 2.0 s\n"
    )
    paths = tables.write_tables(tmp_path, "some-demo", [tables.read(run) for run in runs])
    table, rows, timing = (path.read_text() for path in paths)
    rows = list(csv.DictReader(io.StringIO(rows)))
    assert [row["run"] for row in rows] == [run.name for run in runs]
    tail = np.mean([2 / s for s in (37, 38, 39, 40)])
    assert float(rows[1]["cross_entropy"]) == pytest.approx(1 + tail)
    assert rows[2]["agreement"] == "0.92" and rows[3]["cross_entropy"] == ""
    assert "| llamagen | 0 | 40 |" in table and "| mirai_e | 1 | 0 of 40 | - | - | - |" in table
    mean = f"{0.5 + tail:.4f} ({tail:.4f} to {1 + tail:.4f})"
    assert f"| llamagen | 2 | {0.5 + tail / 2:.4f}" in table and mean in table
    assert "50.0" not in table  # nothing that depends on the machine
    assert timing.splitlines()[:2] == ["run,images_per_second,seconds", "llamagen-seed=0,50.0,12.5"]


def test_a_runs_time_is_told_if_all_of_it_was_seen(tmp_path):
    """A launcher that was killed did not see its run end."""
    log = tmp_path / "run.log"
    start, end = (
        "launch: 2030-01-01 00:00:00 python -m x\nsaid\n",
        "launch: exit status 0 after 3.5 s\n",
    )
    assert jobs.seconds(log) is None
    for lines, expected in (
        ("", None), (start, None), (start + end, 3.5), (start + end + start, None),
        (start + start + end, None), (start + end + start + end, 7.0), (end, None),
    ):  # fmt: skip
        log.write_text(lines)
        assert jobs.seconds(log) == expected, lines


@pytest.mark.parametrize("begun", [True, False])
def test_the_figure_is_drawn_of_whatever_there_is(tmp_path, begun):
    runs = finished_sweep(tmp_path)[0 if begun else 3 :]
    curves.draw(tmp_path / "curves.png", "some", [tables.read(run) for run in runs])
    picture = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    coloured = np.ptp(picture.astype(int), axis=-1) > 60
    assert (coloured.sum() > 500) == begun


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.integers(0, 9))
def test_smoothing_is_the_mean_of_the_neighbours(numbers, width):
    half = width // 2
    means = [np.mean(numbers[max(0, i - half) : i + half + 1]) for i in range(len(numbers))]
    np.testing.assert_allclose(curves.smooth(np.array(numbers), width), means, atol=1e-9)


# The program --------------------------------------------------------------------------------------


def environment():
    """With quick compilation, which is most of the time."""
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **quick}


def command(sweep, out, *arguments):
    small = [f"--set={pair}" for pair in SMALL]
    return [
        sys.executable, "-m", "launch.sweep", f"--sweep={sweep}", f"--out={out}", *small, *arguments
    ]  # fmt: skip


def launch(*arguments):
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=600
    )


TWO = "CONFIG = 'configs/llamagen.py'\nget_sweep = lambda scale: over('seed', [0, 1])"


def test_a_dry_run_prints_commands_and_writes_nothing(tmp_path):
    sweep = sweep_file(tmp_path, TWO)
    done = launch(sweep, tmp_path / "out", "--dry_run", "--set=data.path=a b")
    assert done.returncode == 0, done.stderr
    common = {**dict(pair.split("=") for pair in SMALL), "data.path": "a b"}
    runs = runs_of(sweep, common=common, out=tmp_path / "out")
    assert [shlex.split(line) for line in done.stdout.splitlines()] == [r.command for r in runs]
    assert [p.name for p in tmp_path.iterdir()] == ["some.py"]


def test_wrong_runs_start_nothing(tmp_path):
    body = "CONFIG = 'configs/mirai_e.py'\n"
    body += "get_sweep = lambda scale: over('foresight[0].student_layer', [1, 7, 8])"
    done = launch(sweep_file(tmp_path, body), tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == [
        "student_layer=7",
        "student_layer=8",
        "2 of 3 runs are wrong; nothing was started",
    ]
    assert not (tmp_path / "out").exists()


def test_flags_that_would_be_ignored_are_refused():
    given = sweep_program._FLAGS
    for flag in ("--time=60", "--gpus=8", "--cluster=local", "--nowait", "--sbatch=account=me"):
        given.unparse_flags()
        given(["sweep", flag])
        name = flag.partition("=")[0].replace("--no", "--")
        with pytest.raises(ConfigError, match=f"{name} is for jobs; it needs --slurm"):
            sweep_program._check_cluster_flags()
        given[name[2:]].unparse()


def test_pairs_of_a_flag():
    assert sweep_program._pairs("set", ["a=", "b=c=d"]) == {"a": "", "b": "c=d"}
    with pytest.raises(ConfigError, match="--set gives seed twice: '3' and '4'"):
        sweep_program._pairs("set", ["seed=3", "seed=4"])
    for text in ("seed", "=3", ""):
        with pytest.raises(ConfigError, match=f"--set is '{text}'; it must be NAME=VALUE"):
            sweep_program._pairs("set", [text])


def interrupted(sweep, out, *arguments):
    """Runs a sweep that gets SIGTERM in its midst."""
    process = subprocess.Popen(
        command(sweep, out, *arguments), env=environment(), stdout=subprocess.PIPE, text=True
    )
    until(lambda: any(plan.last_step(p) > 2 for p in out.glob("*/metrics.jsonl")), 120)
    process.terminate()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75 and "the same command goes on" in said
    assert not (out / "table.md").exists()


def test_an_interrupted_sweep_goes_on(tmp_path):
    body = "CONFIG = 'configs/llamagen.py'\nget_sweep = lambda scale: over('seed', [1])"
    sweep, out = sweep_file(tmp_path, body), tmp_path / "out"
    interrupted(sweep, out)
    assert "told to stop: step" in (out / "llamagen.log").read_text()
    done = launch(sweep, out)
    assert done.returncode == 0, done.stderr + done.stdout
    log = (out / "llamagen.log").read_text()
    assert "resumed at step" in log and log.count("launch: exit status") == 2
    assert len((out / "llamagen" / "metrics.jsonl").read_text().splitlines()) == 150
    assert "| 150 |" in (out / "table.md").read_text()
    assert (out / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_six_runs_interrupted_end_with_the_same_table(tmp_path):
    body = "VARIANTS = ['llamagen', 'mirai_e', 'mirai_i']\ndef get_sweep(scale):\n"
    body += "    configs = over('config', [f'configs/{v}.py' for v in VARIANTS])\n"
    body += "    return product(configs, over('seed', [0, 1]))"
    sweep, whole, broken = sweep_file(tmp_path, body), tmp_path / "whole", tmp_path / "broken"
    interrupted(sweep, broken, "--parallel=2")
    for out in (whole, broken):
        done = launch(sweep, out, "--parallel=2")
        assert done.returncode == 0, done.stderr + done.stdout
    for name in ("table.md", "table.csv"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


@pytest.mark.slow
def test_a_real_run_as_a_job(tmp_path):
    body = "CONFIG = 'configs/llamagen.py'\nget_sweep = lambda scale: [{'seed': 5}]"
    sweep = sweep_file(tmp_path, body)
    job = ["--slurm", "--cluster=local", "--gpus=0"]
    done = launch(sweep, tmp_path / "out", *job)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "llamagen: finished" in done.stdout
    assert (tmp_path / "out" / "curves.png").exists()
    # Nothing is left to submit.
    done = launch(sweep, tmp_path / "out", *job)
    assert done.returncode == 0 and "1 of 1 runs are finished" in done.stdout
    log = (tmp_path / "out" / "llamagen.log").read_text()
    assert log.count("launch: exit status") == 1
