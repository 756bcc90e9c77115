"""A run at Weights & Biases: what it is sent, and what its files hold offline after a kill and a resume."""

import json
import struct
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from helpers import QUICK, ROOT, TINY, environment

from mirai_jax.training.metrics_writer import MetricsWriter
from mirai_jax.training.tracking import TrackedWriter

CONFIG = ["--config=configs/llamagen.py:demo", "--config.judged_samples=0", *TINY]
CONFIG += ["--config.num_steps=400", "--config.checkpoint_every=100", "--config.log_every=1"]
CONFIG += ["--config.batch_size=16", "--config.sample_every=100", "--config.wandb.project=mirai"]


def records(path):
    """The records of a .wandb file: LevelDB's log format after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def start(workdir, **environ):
    pytest.importorskip("wandb")
    return subprocess.Popen(
        [sys.executable, "-m", "mirai_jax.main", f"--workdir={workdir}", *CONFIG],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(**QUICK, WANDB_RUN_GROUP="variants-demo", **environ),
    )  # fmt: skip


@pytest.mark.parametrize("offline", [True, False])
def test_steps_only_go_forward(tmp_path, monkeypatch, offline):
    (tmp_path / "config.json").write_text('{"seed": 0}')
    sent, ids = [], set()

    def init(*, mode, **options):
        assert options["config"] == {"seed": 0}
        ids.add(options["id"])
        log = lambda values, step: sent.append((step, *values))
        run = {"offline": offline, "dir": "there", "log": log, "finish": lambda: None}
        return types.SimpleNamespace(**run, starting_step=sent[-1][0] + 1 if sent else 0)

    names = {"Settings": dict, "login": lambda **options: True, "init": init, "Image": np.asarray}
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(**names))

    def write(first, last, begin=TrackedWriter, more=("project", print)):
        writer = begin(tmp_path, first - 1, *more)
        for step in range(first, last + 1):
            writer.step(step, {"loss": 1.0})
        return writer

    write(1, 2, MetricsWriter, ()).close()  # without a project
    killed = write(3, 6)
    killed.image(6, "samples", np.zeros((2, 2, 3), np.uint8))
    assert sent == [*((step, "loss") for step in range(1, 7)), (6, "samples")]
    write(4, 8).close()  # W&B may not have written the row of step 6, which nothing came after
    again = [] if not offline else [(6, "loss")]
    assert sent[7:] == [*again, (7, "loss"), (8, "loss")]
    write(8, 9).close()
    assert sent[-2:] == [(8, "loss"), (9, "loss")] and len(ids) == 1


@pytest.mark.slow
def test_killed_and_resumed_it_is_one_curve(tmp_path):
    workdir = tmp_path / "run"
    process, seen = start(workdir, WANDB_MODE="offline"), []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("step 250/"):
            time.sleep(3)  # W&B writes every second
            process.kill()
            break
    assert seen[-1].startswith("step 250/"), "".join(seen)
    process.communicate()
    time.sleep(1.1)  # W&B's folders are named after the second
    output, _ = start(workdir, WANDB_MODE="offline").communicate(timeout=600)
    assert "resumed at step 200" in output and "finished: 400 steps" in output, output
    steps, runs, pictures = [], set(), set()
    for path in sorted((workdir / "wandb").glob("offline-run-*/*.wandb")):
        for record in records(path):
            if record.HasField("run"):
                runs.add((record.run.run_id, record.run.run_group, record.run.project))
                config = {
                    item.key: json.loads(item.value_json) for item in record.run.config.update
                }
            if record.HasField("history"):
                row = {
                    item.key or item.nested_key[0]: item.value_json for item in record.history.item
                }
                steps.append(int(row["_step"]))
                if "samples" in row:
                    pictures.add(steps[-1])
    known = json.loads((workdir / "wandb.json").read_text())
    assert runs == {(known["id"], "variants-demo", "mirai")} and known["step"] == 400
    assert config["model"]["width"] == 32
    assert all(one < two for one, two in zip(steps, steps[1:], strict=False))
    # A kill loses what W&B had not written yet, and steps are never sent twice.
    assert len(steps) > 340 and steps[0] == 1 and steps[-1] == 400
    assert pictures == {100, 200, 300, 400}
    assert len(list((workdir / "wandb").glob("*/files/media/images/samples_*.png"))) >= 4


@pytest.mark.slow
def test_without_a_network_it_is_offline_within_a_minute(tmp_path):
    more = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    begun = time.monotonic()
    process = start(tmp_path / "run", WANDB_MODE="online", **more)
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("step "):
            break
    process.kill()
    text = "".join(seen)
    assert "W&B cannot be reached" in text and "wandb sync" in text, text
    assert time.monotonic() - begun < 120
