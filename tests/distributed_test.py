"""Two real processes on loopback train as one does; either may die, and both resume together."""

import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import environment

from mirai_jax.training.checkpoint import restore_weights, steps_in
from mirai_jax.utils import distributed
from mirai_jax.utils.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
DEMO = [
    "--config=configs/mirai_e.py",
    "--config.num_steps=30",
    "--config.batch_size=16",
    "--config.log_every=1",
    "--config.checkpoint_every=10",
    "--config.sample_every=0",
    "--config.judged_samples=0",
    "--config.optimizer.warmup_steps=2",
    "--config.model.num_layers=2",
    "--config.model.num_heads=2",
    "--config.model.width=32",
    "--config.model.vocab_size=16",
    "--config.model.unroll=1",
    "--config.foresight[0].start_epoch=0.03",
    "--config.foresight[0].projector_width=16",
]
HEARTBEAT = 10  # seconds


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


MAIN = ["-m", "mirai_jax.main"]


def start(workdir, *more, program=MAIN):
    """One process; its output goes to a file beside the workdir."""
    log = open(f"{workdir}.{time.monotonic_ns()}.log", "w+")  # noqa: SIM115 (read until the end)
    process = subprocess.Popen(
        [sys.executable, *program, *DEMO, f"--workdir={workdir}", *more],
        cwd=ROOT,
        env=environment(),
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    process.log = log
    return process


def start_pair(workdir, *more, others=None, program=MAIN):
    """Two of them; the second may have another workdir, or be another program."""
    together = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    together.append(f"--heartbeat={HEARTBEAT}")
    first = start(workdir, *together, "--process_id=0", *more)
    others = workdir if others is None else others
    return [first, start(others, *together, "--process_id=1", *more, program=program)]


# The second process, with other eyes for the checkpoints, as an NFS client may have.
SEES_OTHERS = """
import pathlib, sys
from absl import app
from mirai_jax import main
from mirai_jax.training import loop
class Others(loop.Checkpoints):
    def __init__(self, folder, **options):
        super().__init__({folder}, **options)
        {more}
loop.Checkpoints = Others
app.run(main.main, flags_parser=main.parse_flags)
"""


def sees_others(folder="folder", more="pass"):
    """A program; `folder` and `more` are Python."""
    return ["-c", SEES_OTHERS.format(folder=folder, more=more)]


def said(process):
    process.log.seek(0)
    return process.log.read()


def end(*processes, timeout=240):
    """Waits for them; their exit statuses."""
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


def entries(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_losses(workdir, other):
    """Within 1e-5, at every step; gradient norms are as many times larger."""
    assert [e["step"] for e in entries(workdir)] == list(range(1, 31))
    for a, b in zip(entries(workdir), entries(other), strict=True):
        # Speeds are another's, and those of a step that was compiled are not logged.
        same = a.keys() - {"images_per_second", "wait_share"}
        assert same == b.keys() - {"images_per_second", "wait_share"}
        for name in same - {"grad_norm"}:
            assert abs(a[name] - b[name]) <= 1e-5, (a["step"], name)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def weights(workdir):
    return restore_weights(workdir / "checkpoints")[0]


def wait_for_step(process, workdir, step):
    """Until it has logged the step."""
    while not (workdir / "metrics.jsonl").exists() or len(entries_so_far(workdir)) < step:
        assert process.poll() is None, said(process)
        time.sleep(0.05)


def entries_so_far(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines()


def kill_second(workdir):
    """Begins a pair, kills its second process after step 15 and checks how the first ends."""
    pair = start_pair(workdir)
    wait_for_step(pair[0], workdir, 15)
    pair[1].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    first, second = end(*pair)
    assert second == -signal.SIGKILL
    # By our own hand when a collective fails, by JAX's when the heartbeat is missed.
    assert first in (76, -signal.SIGABRT), said(pair[0])
    assert time.monotonic() - begun < 3 * HEARTBEAT


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_train_as_one_and_survive_the_death_of_either(tmp_path, killed):
    alone = start(tmp_path / "alone")
    assert end(alone) == [0], said(alone)
    if killed:
        kill_second(tmp_path / "pair")
    pair = start_pair(tmp_path / "pair")
    assert end(*pair) == [0, 0], said(pair[0]) + said(pair[1])
    assert ("resumed at step" in said(pair[0])) == killed
    assert_same_losses(tmp_path / "pair", tmp_path / "alone")  # before the death and after it
    # One log, one set of samples, one set of checkpoints: the first process speaks for both.
    assert "step 30/30" in said(pair[0]) and "step" not in said(pair[1]).replace("steps", "")
    starts = len(list((tmp_path / "pair").glob("events.out.tfevents*")))
    assert starts == 1 + killed
    samples = [(tmp_path / name / "samples" / "step_0000030.png") for name in ("pair", "alone")]
    assert samples[0].read_bytes() == samples[1].read_bytes()


@pytest.mark.slow
def test_after_a_death_they_end_with_the_weights_of_an_undisturbed_pair(tmp_path):
    for name in ("whole", "killed"):
        if name == "killed":
            kill_second(tmp_path / name)
        pair = start_pair(tmp_path / name)
        assert end(*pair) == [0, 0], said(pair[0]) + said(pair[1])
    assert len(list((tmp_path / "whole").glob("events.out.tfevents*"))) == 1
    jax.tree.map(
        np.testing.assert_array_equal, weights(tmp_path / "killed"), weights(tmp_path / "whole")
    )


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    """Numbers of 70 samples and 500 held-out images, which divide unevenly; to the digit."""
    measured = [
        "--config.num_steps=4", "--config.validate_every=2", "--config.evaluate_every=4",
        "--config.evaluate_samples=70", "--config.optimizer.learning_rate=0.0",
    ]  # fmt: skip
    alone = start(tmp_path / "alone", *measured)
    assert end(alone, timeout=900) == [0], said(alone)
    pair = start_pair(tmp_path / "pair", *measured)
    assert end(*pair, timeout=900) == [0, 0], said(pair[0]) + said(pair[1])

    def values(workdir):
        of_line = lambda e: {
            k: v for k, v in e.items() if k.startswith(("validation_", "frechet", "eff"))
        }
        return [
            {k: v for k, v in of_line(entry).items() if not k.endswith("seconds")}
            for entry in entries(workdir)
        ]

    assert values(tmp_path / "pair") == values(tmp_path / "alone")
    assert {"validation_cross_entropy", "frechet_efficientnet_lite0"} <= values(tmp_path / "pair")[
        3
    ].keys()


@pytest.mark.slow
def test_a_notice_to_one_stops_both_and_one_alone_goes_on(tmp_path):
    alone = start(tmp_path / "alone")
    assert end(alone) == [0], said(alone)
    pair = start_pair(tmp_path / "pair")
    wait_for_step(pair[0], tmp_path / "pair", 12)
    pair[1].send_signal(signal.SIGHUP)
    assert end(*pair) == [75, 75], said(pair[0]) + said(pair[1])
    at = len(entries_so_far(tmp_path / "pair"))
    rest = start(tmp_path / "pair")
    assert end(rest) == [0], said(rest)
    assert f"resumed at step {at} of 30" in said(rest)
    assert_same_losses(tmp_path / "pair", tmp_path / "alone")


@pytest.mark.slow
def test_a_process_that_stands_still_is_reported(tmp_path):
    pair = start_pair(tmp_path / "pair", "--config.num_steps=100000", "--config.hang_limit=20")
    wait_for_step(pair[0], tmp_path / "pair", 15)
    pair[1].send_signal(signal.SIGSTOP)  # it neither dies nor gets further
    begun = time.monotonic()
    status = pair[0].wait(120)
    assert status in (76, -signal.SIGABRT) and time.monotonic() - begun < 60
    pair[1].kill()
    assert "another process" in said(pair[0]) or "another task died" in said(pair[0])


@pytest.mark.slow
def test_damage_that_one_process_sees_is_damage_for_both(tmp_path):
    split = ["--config.mesh.data=1", "--config.mesh.fsdp=2"]  # each reads what the other does not
    pair = start_pair(tmp_path / "pair", "--config.num_steps=20", *split)
    assert end(*pair) == [0, 0], said(pair[0]) + said(pair[1])
    folder = tmp_path / "pair" / "checkpoints" / "step_20" / "state" / "ocdbt.process_1" / "d"
    largest = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    pair = start_pair(tmp_path / "pair", *split)
    assert end(*pair) == [0, 0], said(pair[0]) + said(pair[1])
    assert "step 20 is damaged" in said(pair[0])
    assert "resumed at step 10 of 30" in said(pair[0])
    assert [e["step"] for e in entries(tmp_path / "pair")] == list(range(1, 31))


@pytest.mark.slow
def test_workdirs_that_are_not_shared_end_both_before_the_first_step(tmp_path):
    pair = start_pair(tmp_path / "one", others=tmp_path / "other")
    assert end(*pair) == [1, 1], said(pair[0]) + said(pair[1])
    for process, name in zip(pair, ("one", "other"), strict=True):
        (line,) = [line for line in said(process).splitlines() if "error" in line]
        assert line.endswith(
            f"process 1 does not see what process 0 writes in {tmp_path / name}: the workdir must "
            "be on storage that all processes share"
        )
        assert not (tmp_path / name / "metrics.jsonl").exists()
    assert not list((tmp_path / "one").glob("*.tmp"))


@pytest.mark.slow
def test_both_resume_at_the_step_that_process_0_sees_or_not_at_all(tmp_path):
    run, stale = tmp_path / "pair", tmp_path / "stale"
    alone = start(run, "--config.num_steps=20")
    assert end(alone) == [0], said(alone)
    folder = run / "checkpoints"
    shutil.copytree(folder, stale)
    shutil.rmtree(stale / "step_20")
    pair = start_pair(run, program=sees_others(f"pathlib.Path({str(stale)!r})"))
    assert end(*pair) == [1, 1], said(pair[0]) + said(pair[1])
    for process, seen in zip(pair, (folder, stale), strict=True):
        assert f"process 1 does not see {seen}/step_20, which process 0 sees" in said(process)
        assert "Traceback" not in said(process)
    assert steps_in(folder) == [10, 20] and len(entries(run)) == 20
    # It believes in a step that process 0 does not see, and is to save that one.
    pair = start_pair(run, program=sees_others(more="self._steps.append(30)"))
    assert end(*pair) == [0, 0], said(pair[0]) + said(pair[1])
    assert "another process sees a checkpoint of step 30" in said(pair[0])
    assert "resumed at step 20 of 30" in said(pair[0])
    assert [e["step"] for e in entries(run)] == list(range(1, 31)) and steps_in(folder) == [20, 30]
    # All is done for process 0, nothing for a process that sees nothing: both end.
    pair = start_pair(run, others=tmp_path / "nothing")
    assert end(*pair) == [0, 0], said(pair[0]) + said(pair[1])
    assert "this run is finished" in said(pair[0])


@pytest.mark.slow
def test_a_notice_before_the_first_step_of_a_resumed_run_is_not_lost(tmp_path):
    pair = start_pair(tmp_path / "pair", "--config.num_steps=20")
    assert end(*pair) == [0, 0], said(pair[0]) + said(pair[1])
    pair = start_pair(tmp_path / "pair", "--config.num_steps=100000")
    while "data:" not in said(pair[0]):  # it reads, and has not begun
        assert pair[0].poll() is None, said(pair[0])
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGTERM)
    assert end(*pair) == [75, 75], said(pair[0]) + said(pair[1])
    assert "asked to stop: step 2" in said(pair[0])  # 21, or a few more


def test_nobody_at_the_coordinators_address_is_one_line():
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match="where nobody answered for 0 s") as error:
        distributed.start("auto", address, 2, 1, timeout=0)
    assert address in str(error.value) and len(str(error.value).splitlines()) == 1


def test_what_launchers_say():
    read = distributed.environment
    assert read({}) is None
    assert read({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}) is None  # the batch script itself
    assert read({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-4]"}) == {}
    assert read({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}) is None
    ranks = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    assert read({**ranks, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"}) == {}
    assert read(ranks) == {"num_processes": 2, "process_id": 1}
    found = read({**ranks, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"})
    assert found["coordinator_address"].startswith("localhost:")
    assert found["local_device_ids"] == [1]
    assert read({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}) is None
    assert read({"TPU_WORKER_HOSTNAMES": "a,b"}) == {}
    assert read({"TPU_WORKER_HOSTNAMES": "localhost"}) is None


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("auto", "127.0.0.1:1"), "--coordinator, --num_processes and --process_id go together"),
        (("auto", None, 2, 0), "go together"),
        (("on", "127.0.0.1", 2, 0), "--coordinator is '127.0.0.1'; it must be HOST:PORT"),
        (("auto", "127.0.0.1:1", 2, 2), "--process_id is 2; it must be 0 to "),
        (("off", "127.0.0.1:1", 2, 1), "--distributed is 'off'"),
    ],
)
def test_wrong_flags_are_one_line(arguments, expected):
    with pytest.raises(ConfigError) as error:
        distributed.start(*arguments)
    assert expected in str(error.value) and len(str(error.value).splitlines()) == 1


def test_alone_everything_is_agreed():
    assert distributed.is_first() and distributed.worst(2) == 2
    tree = {"a": np.arange(3)}
    assert distributed.from_first(tree) is tree
    distributed.barrier("here")
    np.testing.assert_array_equal(distributed.whole(jax.numpy.arange(3)), np.arange(3))


def test_alone_the_workdir_is_shared(tmp_path):
    distributed.check_shared(tmp_path / "nothing")  # not even looked at
    assert distributed.blind(tmp_path / "nothing") == 0


def test_a_process_is_blind_when_it_has_looked_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    monkeypatch.setattr(distributed, "PATIENCE", 0.3)
    path = tmp_path / "folder" / "file"
    begun = time.monotonic()
    assert distributed.blind(path) == 3 and time.monotonic() - begun > 0.3
    path.parent.mkdir()
    looks = []
    monkeypatch.setattr(distributed.time, "sleep", lambda s: looks.append(s) or path.touch())
    assert distributed.blind(path) == 0 and len(looks) == 1
