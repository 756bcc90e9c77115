"""The program as people start it: flags, one-line errors, SIGKILL and the same command again."""

import json
import pathlib
import signal
import subprocess
import sys

import pytest
from helpers import environment

ROOT = pathlib.Path(__file__).parent.parent
SMALL = [
    "--config.num_steps=200",
    "--config.batch_size=16",
    "--config.log_every=1",
    "--config.checkpoint_every=20",
    "--config.sample_every=0",
    "--config.judged_samples=0",
    "--config.optimizer.warmup_steps=2",
    "--config.model.num_layers=2",
    "--config.model.num_heads=2",
    "--config.model.width=32",
    "--config.model.vocab_size=16",
    "--config.model.unroll=1",
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mirai_jax.main", *arguments]


def main(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


WRONG = [  # each starts the program; config_test.py and fuzz_config_test.py have more, without it
    ([], ["--config is missing"]),
    (["--config=configs/llamagen.py", "--config.batchsize=3"], ["batchsize", "batch_size"]),
    (
        ["--config=configs/llamagen.py", "--config.batch_size=9", "--config.mesh.data=2"],
        ["mesh.data=2", "number of devices"],
    ),
    (["--config=configs/llamagen.py:imagenet_b"], ["data.path", "mirai_jax.extract"]),
    pytest.param(
        ["--config=configs/llamagen.py", "--config.batch_size=8192"],
        ["8192", "4500"],
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("arguments, expected", WRONG)
def test_wrong_input_is_one_line_and_status_1(tmp_path, arguments, expected):
    result = main(*arguments, f"--workdir={tmp_path}")
    assert result.returncode == 1, result.stderr
    lines = result.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert not any("compiling" in line for line in result.stdout.splitlines())
    for part in expected:
        assert part in lines[-1], lines[-1]


@pytest.mark.slow  # distributed_test.py kills one of two processes, kill_test.py the demo
def test_killed_and_started_again_ends_like_an_undisturbed_run(tmp_path):
    arguments = ["--config=configs/mirai_e.py", *SMALL]
    assert main(*arguments, f"--workdir={tmp_path / 'whole'}").returncode == 0
    killed = [*arguments, f"--workdir={tmp_path / 'killed'}"]
    process = subprocess.Popen(
        command(*killed), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    for _ in process.stdout:  # at any line after the first whole checkpoint
        if list((tmp_path / "killed" / "checkpoints").glob("step_*[0-9]")):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    second = main(*killed)
    assert second.returncode == 0, second.stderr
    assert "resumed at step" in second.stdout

    def entries(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        parsed = [json.loads(line) for line in lines]
        for entry in parsed:
            for field in ("images_per_second", "wait_share"):
                entry.pop(field, None)  # what was just compiled has none
        return parsed

    assert entries("killed") == entries("whole")
    third = main(*killed)
    assert third.returncode == 0 and "this run is finished" in third.stdout
    refused = main(*killed, "--config.seed=5")
    assert refused.returncode == 1 and "seed was 0, is 5" in refused.stderr
