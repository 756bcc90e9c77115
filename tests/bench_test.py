"""The benchmark: what it measures, how it reports it, and how it fails."""

import copy
import json
import pathlib
import shlex
import sys
import types

import jax
import numpy as np
import pytest
from helpers import ROOT, TINY, exit_message, output, refusal

from mirai_jax import bench
from mirai_jax.benchmark import measure, memory_plan, reference, report, work
from mirai_jax.benchmark import run as run_lib
from mirai_jax.config import schema
from mirai_jax.config.flags import parse_config

LLAMAGEN = "configs/llamagen.py"
FIELDS = ("batch_size=8", "teacher.stage=1", "teacher.image_size=32")
SMALL = [*TINY, *(f"--config.{field}" for field in FIELDS)]


@pytest.fixture
def quick_run(monkeypatch):
    """`run`, on one device and without measuring rooflines."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    monkeypatch.setattr(run_lib, "rooflines", lambda *_: RESULTS["roofs"])
    yield lambda *args, **options: run_lib.run(*args, log=lambda line: None, **options)
    jax.config.update("jax_enable_compilation_cache", True)  # a run turns it off


# A reference program: knows the baseline, fails at E, and ends at "sample".
REFERENCE = """
import json, sys
print(sys.argv[1:], file=sys.stderr)
for line in sys.stdin:
    task = line.strip()
    if task == "sample":
        sys.exit(3)
    answer = {"seconds": 0.5} if task == "train llamagen" else {"error": "no E here"}
    print(json.dumps(answer), flush=True)
"""
REFERENCE = shlex.join([sys.executable, "-c", REFERENCE])


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_run_measures_all(quick_run):
    results = quick_run(f"{LLAMAGEN}:demo", SMALL, repeats=2)
    assert json.loads(json.dumps(results))
    found = results["variants"]["llamagen"]
    assert len(found["step_seconds"]) == 2 and min(found["step_seconds"]) > 0
    assert list(found["part_seconds"]) == ["student", "optimizer"]
    assert found["compile_seconds"] > 0
    assert found["peak_bytes"] is None or found["peak_bytes"] > 0
    assert min(found["predicted_seconds"]) > 0
    assert results["sampler"]["seconds"] and results["input"]["images_per_second"] > 0
    assert report.sampler_share(results) > 0
    lines = report.lines(results)
    assert row(lines, "  teacher alone") == ["-"] and "not run" not in "".join(lines)


@pytest.mark.slow
def test_the_program(tmp_path):
    numbers, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    printed = output(
        "mirai_jax.bench", "--config=configs/mirai_e.py:demo", "--repeats=2", f"--json={numbers}",
        f"--figure={picture}", *SMALL,
    )  # fmt: skip
    results = json.loads(numbers.read_text())
    found = results["variants"]["mirai_e"]
    assert tuple(found["part_seconds"]) == report.PARTS
    assert found["peak_bytes"] > found["plan"]["parameters"]
    assert results["roofs"]["memory_bytes"] > 1e8
    for line in ("predicted", "teacher alone", "MFU of", "memory, planned", "sampler, guidance"):
        assert line in printed
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_three_variants_beside_a_reference_program(tmp_path, monkeypatch, quick_run):
    program = reference.ReferenceProgram(REFERENCE)
    monkeypatch.setattr(reference, "start", lambda *_: program)
    results = quick_run(
        "configs/mirai_i.py:demo", SMALL, compare=True, measures=["step"], repeats=1,
        reference_command="any", trace=str(tmp_path),
    )  # fmt: skip
    assert list(results["variants"]) == list(run_lib.COMPARED)
    assert all(found["step_seconds"] for found in results["variants"].values())
    assert results["peer_seconds"] == {"step llamagen": [0.5]}
    assert "no E here" in results["peer_refused"]["step mirai_e"]
    assert any(tmp_path.rglob("*.pb"))


def test_compared_variants(tmp_path, monkeypatch):
    """The three, and the config itself where it is another one."""

    def compared(config):
        return list(run_lib.read_settings(str(config), True, SMALL))

    monkeypatch.chdir(ROOT)
    three = list(run_lib.COMPARED)
    assert compared("configs/mirai_e.py:demo") == compared("./configs/mirai_i.py") == three
    assert compared("configs/mirai_e_i.py:demo") == [*three, "mirai_e_i"]
    for name, twin in (*zip(three, three, strict=True), ("mirai_e", "twin")):
        text = (ROOT / "configs" / f"{name}.py").read_text()
        (tmp_path / f"{twin}.py").write_text(text)
    assert "twin.py: name is 'mirai_e'" in refusal(compared, tmp_path / "twin.py")


def test_a_field_that_varies(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = run_lib.read_settings(
        "configs/mirai_e.py:demo", True, SMALL, "foresight[0].projector=mlp,transformer"
    )
    assert list(found) == ["llamagen", "mlp", "transformer"]
    assert not found["llamagen"].terms
    assert [found[name].terms[0].projector for name in list(found)[1:]] == ["mlp", "transformer"]


def test_wrong_options(monkeypatch):
    monkeypatch.chdir(ROOT)
    for options, overrides, field in (
        ({"config": "configs/none.py"}, [], "configs/none.py"),
        ({}, ["--config.model.depth=3"], "model.depth"),
        ({}, ["more"], "'more'"),
        ({}, ["--config.batch_size=0"], "batch_size"),
        ({"measures": ["parts"]}, [], "--measure=step"),
        ({"measures": ["step", "parts"]}, ["--config.accumulate=2"], "accumulate"),
    ):
        options = {"config": LLAMAGEN, "overrides": [*SMALL, *overrides], **options}
        assert field in refusal(run_lib.run, **options)
    arguments = bench._FLAGS(["bench", f"--config={LLAMAGEN}", "--json=nowhere/bench.json"])
    assert "'nowhere/bench.json'" in exit_message(bench.main, arguments)  # before measuring


def test_a_reference_program_answers_or_fails(capfd):
    def start(*fields):
        config = parse_config([f"--config={ROOT}/configs/mirai_e.py:imagenet_b", *fields])
        settings = schema.read(memory_plan.without_files(config), 1)
        return reference.start(REFERENCE, settings, 1)

    program = start("--config.batch_size=4")
    assert program("train llamagen") == 0.5
    with pytest.raises(reference.ReferenceFailed, match="train mirai_e.*no E here"):
        program("train mirai_e")
    for _ in range(2):  # it has ended
        with pytest.raises(reference.ReferenceFailed, match="status 3.*sample"):
            program("sample")
    program.close()
    assert "'--size=B', '--tap=8', '--grid=16'" in capfd.readouterr().err
    # It runs the official recipe alone.
    assert "accumulate" in refusal(start, "--config.accumulate=2")
    assert "generator" in refusal(start, "--config.model.size=", *TINY)
    with pytest.raises(reference.ReferenceFailed, match="--peer"):
        reference.ReferenceProgram("no-such-program-at-all")


def test_tasks_are_interleaved_and_their_first_run_is_not_timed():
    order, rounds = [], []

    def task(name):
        return lambda: float(order.append(name) or len(order))

    tasks = {"a": task("a"), "b": task("b")}
    taken = measure.interleaved(tasks, 2, lambda: rounds.append(len(order)))
    assert order == ["a", "a", "b", "b"] * 2 and rounds == [4, 8]
    assert taken == {"a": [2.0, 6.0], "b": [4.0, 8.0]}
    assert measure.paired_ratio(taken["b"], taken["a"]) == pytest.approx((2 + 8 / 6) / 2)


def test_a_step_on_devices_that_one_cpu_simulates_is_not_predicted():
    devices = jax.devices()[:2]
    step = types.SimpleNamespace(_devices=devices, _device=devices[0])
    assert work.StepWork.predicted(step, 1e11, 1e10) is None


def test_a_cpus_memory_is_measured_on_as_many_bytes_whatever_its_cores(monkeypatch):
    monkeypatch.setattr(measure, "_READ", 2**24)
    monkeypatch.setattr(measure, "_best_rate", lambda work, *_, **__: work)
    for cores in (1, 2, 64):
        monkeypatch.setattr(measure, "cpu_count", lambda cores=cores: cores)
        assert measure.memory_rate(jax.devices()[0]) == 2**24


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="Linux alone")
def test_peak_memory_leaves_out_the_preparation():
    before = np.ones(2**25)
    del before
    peak = measure.PeakMemory(jax.devices()[0])
    kept = np.ones(2**23)  # 64 MiB
    freed = np.ones(2**24)  # 128 MiB
    del freed
    peak.ready()
    assert peak() == pytest.approx(kept.nbytes, rel=0.2)
    more = np.ones(2**24)
    assert peak() == pytest.approx(kept.nbytes + more.nbytes, rel=0.2)


# The report ---------------------------------------------------------------------------------------

RESULTS = json.loads((ROOT / "docs" / "bench_cpu.json").read_text())  # the README's


def row(lines, title):
    return next(line for line in lines if line.startswith(title)).removeprefix(title).split()


def test_the_table():
    results = {**RESULTS, "peer_refused": {"step mirai_i": "no such thing"}}
    lines = report.lines(results)
    for title, cells in {
        "train step": ["3.06", "s", "4.18", "s", "4.09", "s"],
        "  over llamagen's": ["1.00", "1.35", "1.36"],  # within rounds
        "tokens/s": ["335.1", "245.1", "250.3"],
        "MFU of 0.302 TFLOP/s": ["68.1%", "70.3%", "69.5%"],
        "  over planned": ["104%", "104%", "103%"],
        "official PyTorch, step": ["3.01", "s", "4.09", "s", "not", "run"],
        "  times its speed": ["0.98", "0.96", "not", "run"],
    }.items():
        assert row(lines, title) == cells
    assert row(lines, "  teacher alone")[:3] == ["-", "507.0", "ms"]
    assert "official PyTorch, step mirai_i: no such thing" in lines
    printed = "\n".join(lines)
    assert "44.6 tokens/s" in printed and "61% of the memory roofline" in printed
    assert "official PyTorch: 35.1 tokens/s; 1.27 times its speed" in printed


def test_what_was_not_measured_is_not_made_up(tmp_path):
    results = copy.deepcopy(RESULTS)
    for found in results["variants"].values():
        del found["step_seconds"], found["peak_bytes"]
    for part in ("roofs", "sampler", "peer_seconds", "peer_refused"):
        del results[part]
    lines = report.lines(results)
    for title in ("train step", "images/s", "memory, at most in use"):
        assert row(lines, title) == 3 * ["not", "run"]
    assert "sampler: not run" in lines and not any("MFU" in line for line in lines)
    report.figure(results, tmp_path / "empty.png")
    report.figure(RESULTS, tmp_path / "full.png")
    assert (tmp_path / "full.png").stat().st_size > (tmp_path / "empty.png").stat().st_size
