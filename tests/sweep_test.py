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
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, environment, program, refusal
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ml_collections.config_flags import config_path

from launch import jobs, overrides, plan, slurm
from launch import sweep as sweep_program
from launch.dashboard import Dashboard
from launch.overrides import chain, over, product, zipped
from mirai_jax.config import compare, flags
from mirai_jax.utils import locks
from mirai_jax.utils.errors import ConfigError
from mirai_jax.utils.locks import FolderLock

SWEEPS = sorted(p for p in (ROOT / "launch" / "sweeps").glob("*.py") if p.stem != "__init__")
SMALL = [
    "num_steps=150", "batch_size=16", "log_every=1", "checkpoint_every=100", "sample_every=0",
    "judged_samples=0", "optimizer.warmup_steps=2", "model.num_layers=1", "model.num_heads=1",
    "model.width=16", "model.vocab_size=16", "model.unroll=1", "model.grid=(2, 2)",
    "tokenizer.patch=16", "sample.classes=1", "sample.per_class=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs are named from there


@pytest.fixture
def set_flags():
    """Sets flags of the program until the test ends."""
    known = sweep_program._FLAGS
    yield lambda *given: (known.unparse_flags(), known(["sweep", *given]))
    for name in list(known):
        known[name].unparse()


# Combinators, names and values --------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(), max_size=3)))
def test_product_zipped_and_chain(columns):
    entries = [over(field, values) for field, values in columns.items()]
    made = product(*entries)  # the last part changes fastest
    assert [tuple(entry.values()) for entry in made] == list(itertools.product(*columns.values()))
    assert all(list(entry) == list(columns) for entry in made)
    assert chain(*entries) == [entry for part in entries for entry in part]
    if len({len(part) for part in entries}) > 1:
        refusal(zipped, *entries)
    else:
        made = [tuple(entry.values()) for entry in zipped(*entries)]
        assert made == list(zip(*columns.values(), strict=True))


FIELDS = {
    "seed": st.integers(-(2**40), 2**40),
    "optimizer.learning_rate": st.floats(allow_nan=False, allow_infinity=False)
    | st.integers(-(2**53), 2**53),  # exact as a float; the launcher refuses larger ones
    "teacher.cached": st.booleans(),
    "name": st.text().filter(lambda text: "\0" not in text),
    "foresight[0].weights": st.lists(st.floats(allow_nan=False, allow_infinity=False)).map(tuple),
    "foresight[0].offsets": st.lists(st.tuples(st.integers(), st.integers())),
    "foresight[0].source": st.sampled_from(["ema", "(1, 2)", "True", "None", "3"]),
    "foresight": st.just(()),
}


@hypothesis_settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries({}, optional=FIELDS),
        min_size=1,
        unique_by=lambda entry: repr(sorted(entry.items(), key=lambda item: item[0])),
    )
)
def test_names_are_unique_and_safe(entries):
    made = [name for name, _ in overrides.names(entries)]
    assert len(set(made)) == len(entries)
    assert all(re.fullmatch(r"[A-Za-z0-9_=+][A-Za-z0-9._=+-]{0,120}", name) for name in made)
    assert not {"lock", "jobs", "table.md"} & set(made)


def test_names_are_what_differs():
    offsets = [(0, 1, 2), ((0, 0), (0, 1))]
    layouts = zipped(over("f[0].layout", ["1d", "2d"]), over("f[0].offsets", offsets))
    # The offsets follow from the layout, and the seed comes last.
    assert overrides.names(product(over("seed", [0, 1]), over("data.path", ["/x y"]), layouts)) == [
        (f"layout={layout}-seed={seed}", f"layout={layout}")
        for seed in (0, 1)
        for layout in ("1d", "2d")
    ]
    for several, expected in (
        (over("f[0].offsets", offsets), ["offsets=0_1_2", "offsets=0_0+0_1"]),
        ([{"a.width": 1}, {"b.width": 1}], ["a.width=1", "b.width=1"]),
        ([{"config": "c/a.py"}, {"config": "c/a.py:big"}], ["a", "a-big"]),
        ([{"config": "c/a.py", "seed": 7}], ["a"]),
    ):
        assert [name for name, _ in overrides.names(several)] == expected


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(FIELDS)).flatmap(lambda f: st.tuples(st.just(f), FIELDS[f])))
def test_values_reach_the_program_exactly(chosen):
    field, value = chosen
    text = overrides.flag_text(value)
    config = flags.parse_config(["--config=configs/mirai_e.py:demo", f"--config.{field}={text}"])
    parsed = config_path.get_value(field, config)
    assert parsed == overrides.plain(value)
    assert type(parsed) is type(overrides.plain(value)) or isinstance(parsed, float)


# Sweep files and checks ---------------------------------------------------------------------------


def runs_of(sweep, scale="demo", common=None, out="nowhere"):
    entries = plan.read_sweep(str(sweep), scale)
    return plan.make_runs(entries, scale, common or {}, pathlib.Path(out))


def paths_for(sweep):
    """What `--set` gives the runs of a sweep on ImageNet."""
    paths = ("data.path", "data.images", "tokenizer.path", "teacher.path")
    return dict.fromkeys(paths[: 3 if sweep.stem == "encoders" else 4], "some")


@pytest.mark.parametrize("scale", ["demo", "fashion_mnist", "imagenet_b", "imagenet_xl_384"])
@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps_are_valid(sweep, scale):
    if sweep.stem in ("teachers", "neighbours") and scale.startswith("imagenet"):
        assert "ImageNet has DINOv2" in refusal(runs_of, sweep, scale)
        return
    if sweep.stem.startswith("study_") and scale != "fashion_mnist":
        return  # its sizes fit one scale
    small = not scale.startswith("imagenet")
    runs = runs_of(sweep, scale, {} if small else paths_for(sweep))
    assert len({run.name for run in runs}) == len(runs) > 2
    assert all(f":{scale}" in run.arguments[0] for run in runs)
    one_seed = "diagnostics", "neighbours", "teachers", "study_rates", "study_tokens"
    seeds = 3 if small and sweep.stem not in one_seed else 1
    seeds = 5 if sweep.stem == "study_direction" else seeds
    assert len(runs) == seeds * len({run.setting for run in runs})


@pytest.mark.parametrize("scale, name", [("demo", "llamagen-seed=0"), ("imagenet_b", "llamagen")])
def test_the_static_teacher_is_a_run_of_the_variants(scale, name):
    folder, common = f"runs/sweeps/variants-{scale}", {"data.path": "x", "data.images": "x"}
    common = {} if scale == "demo" else common | {"teacher.path": "x"}
    assert name in [run.name for run in runs_of(SWEEPS[0].with_name("variants.py"), scale, common)]
    entries = plan.read_sweep(str(SWEEPS[0].with_name("static.py")), scale)
    assert {e["foresight[0].checkpoint"] for e in entries} == {f"{folder}/{name}"}


TWO = "CONFIG = 'configs/llamagen.py'\nget_sweep = lambda scale: over('seed', [0, 1])"


def sweep_file(folder, body):
    path = folder / "some.py"
    path.write_text(f"from launch.overrides import *\n{body}")
    return path


def test_a_wrong_sweep_file_is_one_line(tmp_path):
    for body, line in (
        ("def get_sweep(scale):\n    return [{}] + 3", "line 3"),
        ("x = (", "line 2"),
        ("", ""),
        ("get_sweep = lambda scale: []", ""),
        ("get_sweep = lambda scale: product(over('a', [1]), over('a', [2]))", "line 2"),
        ("get_sweep = lambda scale: [{1: 2}]", ""),
    ):
        path = sweep_file(tmp_path, body)
        message = refusal(plan.read_sweep, str(path), "demo")
        assert str(path) in message and line in message


def test_wrong_runs_are_reported_together(tmp_path, monkeypatch, set_flags):
    llamagen, mirai_e = {"config": "configs/llamagen.py"}, {"config": "configs/mirai_e.py"}
    right = {**mirai_e, "seed": 1}
    wrong = {
        "foresight[0].student_layer": {**mirai_e, "foresight[0].student_layer": 9},
        "foresight[0].weight": {**mirai_e, "foresight[0].weight": 3},
        "seed": {**llamagen, "seed": 0.5},
        "configs/none.py": {"config": "configs/none.py"},
        "huge": {"config": "configs/llamagen.py:huge"},
        "data.path": {"config": "configs/llamagen.py:imagenet_b"},
        "seed; rm": {**llamagen, "seed; rm": 3},
        "config": {"seed": 2},
        "sample.guidance": {**llamagen, "sample.guidance": np.float64(0.5)},
        "same run as": {**mirai_e, "seed": 1, "foresight[0].level": "internal"},
    }
    monkeypatch.setattr(plan, "read_sweep", lambda *_: [right, *wrong.values()])
    set_flags("--sweep=any", f"--out={tmp_path}/out")
    with pytest.raises(SystemExit) as caught:
        sweep_program.main(["sweep"])
    lines = caught.value.code.splitlines()
    for line, part in zip(lines, [*wrong, "10 of 11 runs are wrong"], strict=True):
        assert line.startswith("error: ") and part in line, line
    assert not (tmp_path / "out").exists()


def test_wrong_flags(set_flags):
    set_flags("--gpus=8")
    assert "--gpus" in refusal(sweep_program._check_slurm_flags)  # it would be ignored
    for wrong in (["seed=3", "seed=4"], ["seed"], ["=3"], ["seed; rm=3"]):
        assert "--set" in refusal(sweep_program._pairs, "set", wrong)


def test_common_overrides_and_a_changed_run(tmp_path):
    sweep, out = sweep_file(tmp_path, TWO), tmp_path / "out"
    with pytest.raises(plan.WrongRuns, match="--set=seed=3"):
        runs_of(sweep, common={"seed": "3"})
    run, *_ = runs_of(sweep, common={"num_steps": "60", "model.width": "48"}, out=out)
    assert run.num_steps == 60 and "--config.model.width=48" in run.arguments
    run.workdir.mkdir(parents=True)
    config = flags.parse_config([a for a in run.arguments if not a.startswith("--workdir")])
    (run.workdir / "config.json").write_text(compare.to_json(config))
    runs_of(sweep, common={"num_steps": "90", "model.width": "48"}, out=out)
    with pytest.raises(plan.WrongRuns, match="seed=0.*model.width"):
        runs_of(sweep, common={"model.width": "96"}, out=out)


def test_a_dry_run_prints_commands(tmp_path, set_flags, capsys):
    sweep, out = sweep_file(tmp_path, TWO), tmp_path / "out"
    set_flags(f"--sweep={sweep}", f"--out={out}", "--dry_run", "--set=data.path=a b")
    sweep_program.main(["sweep"])
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert commands == [run.command for run in runs_of(sweep, common={"data.path": "a b"}, out=out)]
    assert commands[0][0] == sys.executable and "--config.data.path=a b" in commands[0]
    assert not out.exists()


# Processes ----------------------------------------------------------------------------------------

# In place of the training program: counts its starts, logs steps, ends as its arguments say.
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
        file.write(json.dumps({"step": i + 1}) + "\\n"); file.flush()
        time.sleep(60 if end == "sleep" else 0.01)
if end == "0": (folder / "summary.png").write_text("")
if end == "kill": signal.raise_signal(signal.SIGKILL)
print("error: of", folder.name, file=sys.stderr)
sys.exit(int(end))
"""


@dataclasses.dataclass(frozen=True)
class FakeRun(plan.SweepRun):
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
    return *jobs.run_all(runs, parallel, Dashboard(runs, stream)), stream.getvalue()


def test_a_failing_run_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "RESTARTS", 3)
    runs = [
        fake(tmp_path, "done", "0"),
        fake(tmp_path, "stopped", "75", "75", "0"),
        fake(tmp_path, "lost", "76", "134", "kill", "0"),
        fake(tmp_path, "wrong", "1", "0"),
        fake(tmp_path, "stuck", "76", steps=0),
        fake(tmp_path, "short", "0", "2", steps=2),
    ]
    failed, stopped, printed = run_all(runs)
    assert not stopped and "done: finished" in printed
    assert "lost: exit status 137 at step 3; restarting" in printed
    assert failed == {
        "wrong": "exit status 1: error: of wrong",
        "stuck": "exit status 76: error: of stuck",
        "short": "ended before its last step: error: of short",
    }
    assert [starts(run) for run in runs] == [1, 3, 4, 1, 4, 1]
    # Only what is missing is started again.
    assert list(run_all([*runs[:4], fake(tmp_path, "new", "0")])[0]) == []
    assert [starts(run) for run in runs[:4]] == [1, 3, 4, 2]
    assert "start 1" in runs[3].log.read_text() and "start 2" in runs[3].log.read_text()


LAUNCHER = f"""
import pathlib, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import sweep_test
from launch import dashboard, jobs
from mirai_jax.utils import locks
out = pathlib.Path(sys.argv[1])
runs = [sweep_test.fake(out, name, "sleep", "0") for name in "abc"]
with locks.FolderLock(out).held():
    print(jobs.run_all(runs, 2, dashboard.Dashboard(runs)), flush=True)
"""


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def idle(run):
    """Whether no process works on the run: its log can be locked."""
    with run.log.open("ab") as file:
        return locks.try_lock(file)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_run_outlives_its_launcher(tmp_path, number):
    runs = [fake(tmp_path, name) for name in "abc"]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, tmp_path], stdout=subprocess.PIPE, text=True
    )
    until(lambda: all(run.step() == 1 for run in runs[:2]))
    assert not idle(runs[0])
    with pytest.raises(ConfigError, match=f"{process.pid} on "), FolderLock(tmp_path).held():
        pass
    process.send_signal(number)
    printed = process.communicate(timeout=60)[0]
    if number != signal.SIGKILL:
        assert "a: stopped at step 1" in printed and printed.strip().endswith("({}, True)")
    until(lambda: idle(runs[0]) and idle(runs[1]), 10)  # SIGTERM reached them all the same
    assert starts(runs[2]) == 0
    with FolderLock(tmp_path).held():  # the file that a killed launcher left locks nothing
        pass


def test_gpus_are_shared_out(monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert jobs.gpus() == ["4", "5", "6"]
    assert jobs.gpu_share(["4", "5", "6"], 0, 1) == {}
    for parallel, shares in ((2, ["4,6", "5"]), (4, ["4", "5", "6", "4"])):
        given = [jobs.gpu_share(["4", "5", "6"], slot, parallel) for slot in range(parallel)]
        assert [share["CUDA_VISIBLE_DEVICES"] for share in given] == shares
    assert given[0]["XLA_CLIENT_MEM_FRACTION"] == "0.450"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert jobs.gpus() == []


def test_the_dashboard_counts_and_estimates(tmp_path, monkeypatch):
    runs = [fake(tmp_path, name) for name in "abcd"]
    clock = iter([0.0, 60.0]).__next__
    monkeypatch.setattr("launch.dashboard.time.monotonic", clock)
    dashboard = Dashboard(runs, io.StringIO())
    for run, text in (runs[0], '{"step": 3}\n'), (runs[1], '{"step": 1}\n{"step": 2}\n{"st'):
        run.workdir.mkdir()
        (run.workdir / "metrics.jsonl").write_text(text)
    # a is done, b is at 2 of 3, c failed: 5 steps took 60 s, and 1 + 3 are left.
    assert dashboard.lines([runs[1]], [runs[3]], {"c": "why"}) == [
        "1/4 done, 1 running, 1 failed, 1 waiting, 48s left",
        "  b  2/3",
    ]


# SLURM jobs ---------------------------------------------------------------------------------------

JOB = f"""
import pathlib, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import sweep_test
from launch import slurm
slurm.TrainJob(sweep_test.fake(pathlib.Path(sys.argv[1]), "a", "sleep"))()
"""


@pytest.mark.parametrize("to_all", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_job_to_be_preempted_saves_and_waits_for_its_end(tmp_path, to_all):
    """SLURM signals the job alone where it tracks processes by cgroups, elsewhere the program too."""
    run = fake(tmp_path, "a")
    job = subprocess.Popen([sys.executable, "-c", JOB, tmp_path])
    try:
        until(lambda: run.step() == 1, 120)
        children = pathlib.Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        for process in [job.pid, *(children if to_all else [])]:
            os.kill(int(process), signal.SIGTERM)
        until(lambda: b"exit status 75" in run.log.read_bytes(), 20)
        time.sleep(1)
        assert job.poll() is None and starts(run) == 1
    finally:
        job.kill()
        job.wait()


@pytest.mark.slow
def test_jobs_run_and_a_warned_one_saves_and_returns_to_the_queue(tmp_path, monkeypatch):
    """With submitit's jobs of this machine."""
    monkeypatch.setattr(slurm, "_CLUSTER", "local")
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent))  # where FakeRun is
    runs = [fake(tmp_path, "a", "sleep", "0"), fake(tmp_path, "b", "75", "3")]
    dashboard, parameters = Dashboard(runs, io.StringIO()), {"timeout_min": 90}
    submitted = slurm.submit(runs, tmp_path, parameters, dashboard.log)
    until(lambda: runs[0].step() == 1)
    controller = int(submitted["a"].job_id)
    children = pathlib.Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGUSR2)  # as SLURM does before a job's time is up
    failed = slurm.wait(runs, submitted, dashboard)
    assert failed == {"b": "exit status 3: error: of b"}
    assert [starts(run) for run in runs] == [2, 2] and runs[0].finished()
    submitted = slurm.submit(runs, tmp_path, parameters, dashboard.log)
    assert list(submitted) == list(slurm.wait(runs, submitted, dashboard)) == ["b"]


def test_slurm_gets_the_parameters_and_keeps_its_jobs(tmp_path, monkeypatch, set_flags):
    tools, out = tmp_path / "bin", tmp_path / "out"
    tools.mkdir()
    for name, line in {
        "srun": "exit 1",
        "sbatch": f'cat "$1" >> {tmp_path}/submitted; echo Submitted batch job 41',
        "sacct": f"echo 'JobID|State|NodeList'; cat {tmp_path}/state",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    runs = [fake(out, name, "0") for name in "abc"]
    run_all(runs[:1])
    set_flags(
        "--slurm", "--partition=long", "--time=90", "--gpus=4", "--sbatch=account=me",
        "--parallel=2",
    )  # fmt: skip
    printed = []
    slurm.submit(runs, out, sweep_program._job_parameters(), printed.append)
    text = (tmp_path / "submitted").read_text()
    for line in (
        "--array=0-1%2", "--partition=long", "--time=90", "--gpus-per-node=4", "--cpus-per-task=32",
        "--account=me", "--requeue", "--signal=USR2@300", "--job-name=out",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in text, line
    known = json.loads((out / "jobs.json").read_text())
    assert {name: job["job"] for name, job in known.items()} == {"b": "41_0", "c": "41_1"}
    # One waits in the queue, one was cancelled: only that one is submitted again.
    (tmp_path / "submitted").unlink()
    (tmp_path / "state").write_text("41_0|PENDING|\n41_1|CANCELLED by 0|\n")
    slurm.submit(runs, out, sweep_program._job_parameters(), printed.append)
    assert "b: job 41_0 is still there" in printed
    assert "--array" not in (tmp_path / "submitted").read_text()
    assert json.loads((out / "jobs.json").read_text())["c"]["job"] == "41"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "srun" in refusal(slurm.submit, runs[1:2], tmp_path, {}, print)
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert ".[slurm]" in refusal(slurm.submit, runs, tmp_path, {}, print)


# Reports ------------------------------------------------------------------------------------------


def test_a_runs_time_is_known_if_all_of_it_was_seen(tmp_path):
    log, start = tmp_path / "run.log", "launch: 2030-01-01 00:00:00 python -m x\nsaid\n"
    end = "launch: exit status 0 after 3.5 s\n"
    for lines in ("", start, start + end + start, start + start + end, end):
        log.write_text(lines)
        assert jobs.seconds(log) is None, lines
    log.write_text(start + end + start + end)
    assert jobs.seconds(log) == 7.0


def test_reports_of_the_runs_so_far(tmp_path, set_flags, capsys):
    """Of two settings and two seeds, whose last run has not begun."""
    body = "NAMES = ['configs/llamagen.py', 'configs/mirai_e.py']\n"
    body += "get_sweep = lambda scale: product(over('config', NAMES), over('seed', [0, 1]))"
    sweep, out = sweep_file(tmp_path, body), tmp_path / "out"
    runs = runs_of(sweep, common={"num_steps": "40"}, out=out)
    for i, run in enumerate(runs[:3]):
        run.workdir.mkdir(parents=True)
        entries = [
            {"step": s, "loss": i + 1 / s, "cross_entropy": i + 2 / s, "images_per_second": 50.0}
            for s in range(1, 41)
        ]
        entries[5]["cross_entropy"] = float("nan")  # a skipped update
        entries[19]["fid"], entries[39]["fid"] = 9.0, 5.0 + i
        text = "".join(json.dumps(entry) + "\n" for entry in entries)
        (run.workdir / "metrics.jsonl").write_text(text)
        (run.workdir / "agreement.json").write_text(json.dumps({"samples": 0.9 + 0.01 * i}))
    lines = [
        {
            "step": step,
            "protocol": {"samples": 100, "guidance": 1.5},
            "frechet": float(step),
            "sfid": 1,
        }
        for step in (20, 40)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (runs[0].workdir / "assessment.jsonl").write_text(text)
    (out / "llamagen-seed=0.log").write_text(
        "launch: 2030-01-01 00:00:00 python\nlaunch: exit status 0 after 12.5 s\n"
    )
    set_flags(f"--sweep={sweep}", f"--out={out}", "--report", "--set=num_steps=40")
    sweep_program.main(["sweep"])
    assert capsys.readouterr().out.count("written: ") == 4
    table = (out / "table.md").read_text()
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert [row["run"] for row in rows] == [run.name for run in runs]
    tail = np.mean([2 / s for s in (37, 38, 39, 40)])
    assert float(rows[1]["cross_entropy"]) == pytest.approx(1 + tail)
    assert rows[2]["agreement"] == "0.92" and rows[3]["cross_entropy"] == ""
    assert (
        "| llamagen | 0 | 40 |" in table
        and "| mirai_e | 1 | 0 of 40 | - | - | - | - | - |" in table
    )
    assert [row["fid"] for row in rows] == ["5.0", "6.0", "7.0", ""]  # of the last step
    assert [row["frechet_100_samples_guidance_1.5"] for row in rows] == ["40.0", "", "", ""]
    assert "5.5000 (5.0000 to 6.0000)" in table
    mean = f"{0.5 + tail:.4f} ({tail:.4f} to {1 + tail:.4f})"
    assert f"| llamagen | 2 | {0.5 + tail / 2:.4f}" in table and mean in table
    assert "50.0" not in table  # nothing that depends on the machine
    assert (out / "timing.csv").read_text().splitlines()[1] == "llamagen-seed=0,50.0,12.5"
    assert (out / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_six_runs_interrupted_end_with_the_same_table(tmp_path):
    def command(out):
        small = [f"--set={pair}" for pair in SMALL]
        return ["launch.sweep", f"--sweep={sweep}", f"--out={out}", "--parallel=2", *small]

    body = "NAMES = [f'configs/{name}.py' for name in ('llamagen', 'mirai_e', 'mirai_i')]\n"
    body += "get_sweep = lambda scale: product(over('config', NAMES), over('seed', [0, 1]))"
    sweep, whole, broken = sweep_file(tmp_path, body), tmp_path / "whole", tmp_path / "broken"
    process = subprocess.Popen(
        [sys.executable, "-m", *command(broken)],
        env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    until(lambda: any(plan.last_step(p) > 2 for p in broken.glob("*/metrics.jsonl")), 120)
    process.terminate()
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 75 and "the same command resumes" in printed
    assert not (broken / "table.md").exists()
    for out in (whole, broken):
        done = program(*command(out))
        assert done.returncode == 0, done.stderr + done.stdout
    assert any("resumed at step" in log.read_text() for log in broken.glob("*.log"))
    for name in ("table.md", "table.csv"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
