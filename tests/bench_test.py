"""The benchmark: what it measures, how it tells it, and what it says where it cannot."""

import copy
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from mirai_jax import bench as program
from mirai_jax.benchmark import measure, memory_plan, report
from mirai_jax.benchmark import work as work_lib
from mirai_jax.config import schema
from mirai_jax.config.flags import parse_config
from mirai_jax.utils.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiling is most of the time
TINY = [
    "--config.batch_size=8",
    "--config.model.num_layers=2",
    "--config.model.num_heads=2",
    "--config.model.width=32",
    "--config.model.vocab_size=16",
    "--config.model.unroll=1",
    "--config.teacher.stage=1",
    "--config.teacher.image_size=32",
]


def settings_of(variant, *more):
    config = parse_config([f"--config={ROOT}/configs/{variant}.py:demo", *TINY, *more])
    return schema.read(memory_plan.without_files(config), 1)


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "mirai_jax.bench", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **QUICK},
        capture_output=True,
        text=True,
        timeout=300,
    )


# A peer: knows the baseline, fails at E, and dies of "sample".
PEER = """
import json, sys
print(sys.argv[1:], file=sys.stderr)
for line in sys.stdin:
    task = line.strip()
    if task == "sample":
        sys.exit(3)
    answer = {"seconds": 0.5} if task == "train llamagen" else {"error": "no E here"}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def peer_file(tmp_path):
    path = tmp_path / "peer.py"
    path.write_text(PEER)
    return path


def test_the_program(tmp_path):
    message, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    done = bench(
        "--config=configs/mirai_e.py:demo", "--repeats=2", f"--json={message}", f"--figure={picture}",
        f"--trace={tmp_path / 'trace'}", *TINY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(message.read_text())
    found = results["variants"]["mirai_e"]
    assert len(found["step_seconds"]) == 2 and min(found["step_seconds"]) > 0
    assert set(found["part_seconds"]) == set(report.PARTS)
    assert found["compile_seconds"] > 0
    assert 0.9 < found["xla_share"] < 2  # tiny: much is elementwise
    assert found["peak_bytes"] > found["plan"]["parameters"]
    assert results["sampler"]["seconds"] and results["input"]["images_per_second"] > 0
    assert results["roofs"]["memory_bytes"] > 1e8
    assert report.sampler_share(results) > 0
    for line in ("teacher alone", "MFU of", "memory, planned", "sampler, guidance"):
        assert line in done.stdout
    assert picture.stat().st_size > 10_000 and any((tmp_path / "trace").rglob("*.pb"))


@pytest.mark.slow
def test_three_variants_beside_a_peer(tmp_path, peer_file):
    message = tmp_path / "bench.json"
    shape = ["--config.model.size=B", "--config.model.num_layers=0", "--config.model.num_heads=0"]
    done = bench(
        "--config=configs/mirai_i.py:demo", "--compare", "--repeats=1", "--measure=step",
        f"--json={message}", f"--peer={sys.executable} {peer_file}", *TINY, *shape,
        "--config.model.width=0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(message.read_text())
    assert list(results["variants"]) == ["llamagen", "mirai_e", "mirai_i"]
    assert all(found["step_seconds"] for found in results["variants"].values())
    assert results["peer_seconds"] == {"step llamagen": [0.5]}
    assert "no E here" in results["peer_refused"]["step mirai_e"]
    assert "official PyTorch, step mirai_e: the peer at 'train mirai_e': no E here" in done.stdout


def test_what_is_compared(tmp_path, monkeypatch):
    """The three, and the config itself where it is another."""

    def compared(config):
        program._FLAGS(["bench", f"--config={config}", "--compare"])
        try:
            return list(program.read_settings(TINY))
        finally:
            program._FLAGS.unparse_flags()

    monkeypatch.chdir(ROOT)
    three = ["llamagen", "mirai_e", "mirai_i"]
    assert compared("configs/mirai_e.py:demo") == three
    assert compared("./configs/mirai_i.py") == three
    assert compared("configs/mirai_e_i.py:demo") == [*three, "mirai_e_i"]
    for name in three:
        (tmp_path / f"{name}.py").write_text((ROOT / "configs" / f"{name}.py").read_text())
    (tmp_path / "twin.py").write_text((ROOT / "configs" / "mirai_e.py").read_text())
    with pytest.raises(ConfigError, match="twin.py is named 'mirai_e' too"):
        compared(tmp_path / "twin.py")


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "--config is missing"),
        (["--config=configs/none.py"], "configs/none.py"),
        (["--config=configs/llamagen.py", "--config.model.depth=3"], "model.depth does not exist"),
        (["--config=configs/llamagen.py", "more"], "'more' is not understood"),
        (["--config=configs/llamagen.py", "--repeats=0"], "repeats"),
        (["--config=configs/llamagen.py", "--config.batch_size=0"], "batch_size is 0"),
        (
            ["--config=configs/llamagen.py", *TINY, "--measure=step", "--peer=none"],
            "must be the official recipe's",
        ),
        (["--config=configs/llamagen.py", "--json=nowhere/bench.json"], "no folder 'nowhere'"),
        (["--config=configs/llamagen.py", "--measure=parts"], "--measure=step"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = bench(*arguments)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_a_peer_is_asked_and_its_failures_are_told(peer_file, capfd):
    peer = measure.Peer(f"{sys.executable} {peer_file}", "--size=B")
    assert peer("train llamagen") == 0.5
    with pytest.raises(measure.PeerError, match="train mirai_e.*no E here"):
        peer("train mirai_e")
    with pytest.raises(measure.PeerError, match="ended .status 3."):
        peer("sample")
    peer.close()
    assert "--size=B" in capfd.readouterr().err
    with pytest.raises(measure.PeerError, match="cannot be started"):
        measure.Peer("no-such-program-at-all")


def test_a_peer_that_ends_at_its_start_is_told_and_takes_nothing_along():
    peer = measure.Peer(f"{sys.executable} -c 'import no_such_module'")
    peer._process.wait()
    for task in ("train llamagen", "sample"):
        with pytest.raises(measure.PeerError, match="the peer ended \\(status 1\\) at"):
            peer(task)
    peer.close()


def test_tasks_take_turns_and_their_first_run_is_not_timed():
    order, rounds = [], []

    def task(name):
        def run():
            order.append(name)
            return float(len(order))

        return run

    taken = measure.in_turn({"a": task("a"), "b": task("b")}, 2, rounds.append)
    assert order == ["a", "a", "b", "b"] * 2 and rounds == [1, 2]
    assert taken == {"a": [2.0, 6.0], "b": [4.0, 8.0]}
    assert measure.ratio(taken["b"], taken["a"]) == pytest.approx((2 + 8 / 6) / 2)


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="Linux alone")
def test_peak_memory_is_of_what_comes_after():
    before = np.ones(2**25)
    del before
    peak = measure.PeakMemory(jax.devices()[0])
    kept = np.ones(2**23)  # 64 MiB
    freed = np.ones(2**24)  # 128 MiB
    del freed
    peak.ready()  # what was only needed to get here does not count
    assert peak() == pytest.approx(kept.nbytes, rel=0.2)
    more = np.ones(2**24)
    assert peak() == pytest.approx(kept.nbytes + more.nbytes, rel=0.2)


@pytest.mark.slow
def test_the_parts_compute_what_the_step_does():
    """Not their numbers, which are random: that all of a variant's parts run on its shapes."""
    work = work_lib.Work(settings_of("mirai_e_i"), jax.devices()[:1])
    work.begin()
    before = jax.device_get(work._state.params["generator"]["output"]["kernel"])
    parts = work.parts()
    assert list(parts) == ["student", "teacher", "projectors", "optimizer"]
    assert all(part() > 0 for part in parts.values())
    assert work.step() > 0
    after = jax.device_get(work._state.params["generator"]["output"]["kernel"])
    assert np.isfinite(after).all() and not np.array_equal(before, after)


def test_no_file_of_a_large_run_is_needed():
    config = parse_config([f"--config={ROOT}/configs/mirai_i.py:imagenet_b"])
    with pytest.raises(ConfigError):
        schema.read(config, 1)
    assert schema.read(memory_plan.without_files(config), 1).needs_images
    assert memory_plan.without_files({"data": "", "teacher": None}) == {"data": "", "teacher": None}
    config.teacher.name = "dinov2"  # of any size: its file says which
    with pytest.raises(ConfigError, match="teacher.path is ''"):
        schema.read(memory_plan.without_files(config), 1)


def test_the_input_alone():
    assert work_lib.input_rate(settings_of("llamagen"), batches=3) > 0


# What is told -------------------------------------------------------------------------------------

FOUND = {
    "compile_seconds": 4.0,
    "plan": {"parameters": 1, "total": 2**31},
    "flops": {"student": 600, "teacher": 0, "projectors": 0},
    "xla_share": 0.9,
    "peak_bytes": 2**31 + 2**29,
    "step_seconds": [2.0, 4.0, 2.0],
}
RESULTS = {
    "about": {
        "scale": "imagenet_b", "batch_size": 8, "guidance": 2.0, "teacher_dtype": "float32", "device": "chip", "devices": 4,
        "platform": "gpu", "cores": 16, "versions": {"jax": "0.10"},
        "generator": {"num_layers": 12, "width": 768, "grid": [16, 16], "vocab_size": 16384,
                      "dtype": "bfloat16", "remat": "dots"},
    },
    "roofs": {"peak_flops": 1000.0, "peak_by": "by its datasheet", "memory_bytes": 4000.0},
    "variants": {"llamagen": FOUND, "mirai_e": {**FOUND, "step_seconds": [3.0, 4.4, 2.4]}},
    "sampler": {"images": 2, "tokens": 256, "compile_seconds": 0.5, "bytes_a_token": 1000,
                "seconds": [128.0, 100.0, 200.0]},
    "peer_seconds": {"step llamagen": [4.0, 4.0, 4.0], "sample": [512.0, 200.0, 600.0]},
    "peer_refused": {"step mirai_e": "no clone"},
}  # fmt: skip


def row(lines, title):
    return next(line for line in lines if line.strip().startswith(title)).split()


def test_the_table():
    lines = report.lines(RESULTS)
    assert row(lines, "train step")[-4:] == ["2.00", "s", "3.00", "s"]
    # Ratios are taken within a round: 1.5, 1.1, 1.2.
    assert row(lines, "over llamagen's")[-2:] == ["1.00", "1.20"]
    assert row(lines, "images/s")[-2:] == ["4.0", "2.7"]
    assert row(lines, "tokens/s")[-2:] == ["1,024.0", "682.7"]
    assert row(lines, "MFU of")[-2:] == ["30.0%", "20.0%"]
    assert row(lines, "XLA counts")[-2:] == ["90.0%", "90.0%"]
    assert "2.50 GiB (125%)" in next(x for x in lines if x.startswith("memory, at most"))
    assert row(lines, "official PyTorch, step")[-4:] == ["4.00", "s", "not", "run"]
    assert row(lines, "times its speed")[-3:] == ["2.00", "not", "run"]
    assert "official PyTorch, step mirai_e: no clone" in lines
    sampler = next(line for line in lines if line.startswith("sampler"))
    assert "4.0 tokens/s" in sampler and "50% of the memory roof" in sampler
    assert any("official PyTorch: 1.0 tokens/s; 3.00 times its speed" in line for line in lines)


def test_what_was_not_measured_is_not_made_up(tmp_path):
    results = copy.deepcopy(RESULTS)
    for found in results["variants"].values():
        del found["step_seconds"], found["peak_bytes"]
    for part in ("roofs", "sampler", "peer_seconds", "peer_refused"):
        del results[part]
    lines = report.lines(results)
    for title in ("train step", "images/s", "memory, at most"):
        assert row(lines, title)[-2:] == ["not", "run"]
    assert "sampler: not run" in lines and not any("MFU" in line for line in lines)
    report.figure(results, tmp_path / "empty.png")
    report.figure(RESULTS, tmp_path / "full.png")
    assert (tmp_path / "full.png").stat().st_size > (tmp_path / "empty.png").stat().st_size
