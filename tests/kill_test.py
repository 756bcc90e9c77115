"""The demo run, killed twenty times at random moments, ends as if nothing had happened."""

import json
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import environment

from mirai_jax.training.checkpoint import restore_weights, steps_in

ROOT = pathlib.Path(__file__).parent.parent
# The demo, saved so often that many a kill falls into a save; nothing that changes a number.
DEMO = [
    "--config=configs/mirai_e.py",
    "--config.checkpoint_every=10",
    "--config.sample_every=0",
    "--config.log_every=1",
    "--config.judged_samples=0",
]

pytestmark = pytest.mark.slow


def start(workdir, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "mirai_jax.main", *DEMO, f"--workdir={workdir}", *more],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # also under nohup
    )


def shown_steps(output):
    return [int(line.split("/")[0].split()[1]) for line in output.splitlines()
            if line.startswith("step ")]  # fmt: skip


def outcome(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    for entry in metrics:
        for name in ("images_per_second", "wait_share"):
            entry.pop(name, None)  # what was just compiled has none
    return metrics, restore_weights(workdir / "checkpoints")[0]


def assert_same(workdir, other):
    (metrics, weights), (expected, expected_weights) = outcome(workdir), outcome(other)
    assert metrics == expected
    jax.tree.map(np.testing.assert_array_equal, weights, expected_weights)
    last = f"step_{expected[-1]['step']:07d}.png"
    grids = [(folder / "samples" / last).read_bytes() for folder in (workdir, other)]
    assert grids[0] == grids[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    process = start(workdir)
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    return workdir


def wait_until(process, happened, seconds=300):
    deadline = time.monotonic() + seconds
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def test_twenty_kills_change_nothing(tmp_path, undisturbed):
    workdir, chance, kills, in_saves = tmp_path / "run", random.Random(0), 0, 0
    folder = workdir / "checkpoints"
    while kills < 20:
        before = max(steps_in(folder), default=0)
        # Any time of a process's life: its start too, and far enough for the run to get somewhere.
        process = start(workdir)
        if kills % 4 == 0:
            time.sleep(chance.uniform(0.5, 8))
        else:
            far = before + chance.randrange(20, 140)
            wait_until(process, lambda far=far: max(steps_in(folder), default=0) >= far)
            if kills % 2:  # in the middle of a save
                wait_until(process, lambda: any(folder.glob("*tmp*")), 30)
            else:
                time.sleep(chance.uniform(0, 1))
        in_saves += any(folder.glob("*tmp*"))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it did not end before
        kills += 1
    process = start(workdir)
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    assert in_saves >= 3
    print(f"{kills} kills, {in_saves} of them while a checkpoint was being written")
    assert_same(workdir, undisturbed)
    assert not list(folder.glob("*tmp*")) and not list(folder.glob("damaged*"))


def test_misfortunes_of_all_kinds_change_nothing(tmp_path, undisturbed):
    workdir, chance = tmp_path / "run", random.Random(2)
    folder = workdir / "checkpoints"
    kinds = 4 * ["kill", "stop", "hang up", "no screen", "twice", "full disk"]
    chance.shuffle(kinds)
    for kind in kinds:
        far = max(steps_in(folder), default=0) + chance.randrange(10, 50)
        process = start(workdir)
        wait_until(process, lambda far=far: max(steps_in(folder), default=0) >= far)
        if kind == "twice":
            second = start(workdir)
            assert "is at work: process" in second.communicate(timeout=120)[0]
            assert second.returncode == 1
        if kind == "no screen":
            process.stdout.close()
            far = max(steps_in(folder)) + 20
            wait_until(process, lambda far=far: max(steps_in(folder)) >= far)
        if kind == "full disk":  # files cannot grow: metrics, or a checkpoint
            room = chance.choice((100, 200_000))
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, room))
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 1 and "error: " in output, output
            continue
        number = {"stop": signal.SIGTERM, "hang up": signal.SIGHUP}.get(kind, signal.SIGKILL)
        process.send_signal(number)
        process.wait(timeout=120)  # it may be compiling
        assert process.returncode == (-number if number == signal.SIGKILL else 75), kind
    process = start(workdir)
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    assert_same(workdir, undisturbed)
    left = subprocess.run(["pgrep", "-f", str(workdir)], capture_output=True, text=True).stdout
    assert not left and not list(folder.glob("damaged*")) and not list(workdir.glob("lock*"))


def test_sigterm_repeats_no_step(tmp_path, undisturbed):
    workdir, chance, steps = tmp_path / "run", random.Random(1), []
    for _ in range(5):
        process = start(workdir)
        far = max(steps, default=0) + chance.randrange(20, 250)
        output = ""
        for line in process.stdout:
            output += line
            if line.startswith("step ") and int(line.split("/")[0].split()[1]) >= far:
                process.send_signal(signal.SIGTERM)
                break
        output += process.communicate(timeout=300)[0]
        assert process.returncode == 75, output
        steps += shown_steps(output)
    process = start(workdir)
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    steps += shown_steps(output)
    assert steps == list(range(1, steps[-1] + 1))
    assert_same(workdir, undisturbed)
