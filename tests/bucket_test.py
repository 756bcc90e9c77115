"""Runs whose workdir, shards, weights and samples are in buckets, which go away now and then.

The buckets are emulators on loopback. What needs neither network nor packages uses fsspec's memory://.
"""

import contextlib
import http.server
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import fsspec
import jax
import numpy as np
import pytest
from helpers import ROOT, TINY_VQ, environment, output, refusal, saved_state, tiny, vq_file
from PIL import Image

from configs import llamagen
from mirai_jax.data import images, records
from mirai_jax.training import train
from mirai_jax.training.checkpoint import Checkpoints, restore_weights, steps_in
from mirai_jax.training.metrics_writer import MetricsWriter, read_metrics
from mirai_jax.utils import cache, files, locks, paths, remote
from mirai_jax.utils.errors import ConfigError

STEPS = 40
SMALL = f"""--config.num_steps={STEPS} --config.batch_size=4 --config.log_every=1 --config.model.size=
    --config.checkpoint_every=4 --config.sample_every=20
    --config.model.num_layers=1 --config.model.num_heads=2 --config.model.width=16 --config.model.unroll=1
    --config.model.vocab_size={TINY_VQ.vocab_size} --config.model.num_classes=2 --config.model.grid=(8,8)
    --config.model.dtype=float32 --config.foresight[0].projector_width=16
    --config.foresight[0].start_epoch=0 --config.tokenizer.name=vq --config.tokenizer.image_size=16
    --config.data.num_workers=0 --config.sample.classes=2""".split()


# In memory --------------------------------------------------------------------------------------


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """An empty folder in memory, and an empty cache."""
    monkeypatch.setenv("MIRAI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_WAITS", (0.01,))
    return paths.at(f"memory://{tmp_path.name}")


def test_paths_of_a_bucket_are_like_those_of_a_disk(memory, tmp_path):
    for folder in (memory, tmp_path / "disk"):
        (folder / "a").mkdir(parents=True, exist_ok=True)
        files.write_text(folder / "a" / "é.txt", "one\n")
        with files.atomic_write(folder / "a" / "two.npy") as file:
            np.save(file, np.arange(3))
        with pytest.raises(KeyError), files.atomic_write(folder / "a" / "three"):
            raise KeyError
        assert [p.name for p in sorted((folder / "a").iterdir())] == ["two.npy", "é.txt"]
        assert [p.name for p in folder.glob("a/*.npy")] == ["two.npy"]
        assert (
            (folder / "a").is_dir() and not (folder / "a").is_file() and not (folder / "b").exists()
        )
        assert (folder / "a" / "é.txt").read_text(encoding="utf-8") == "one\n"
        assert np.load(paths.local(folder / "a" / "two.npy")).tolist() == [0, 1, 2]
        assert (folder / "a" / "two.npy").stat().st_size == paths.local(
            folder / "a" / "two.npy"
        ).stat().st_size
        (folder / "a" / "é.txt").rename(folder / "a" / "b.txt")
        assert [p.name for p in folder.glob("a/*.txt")] == ["b.txt"]
        assert str(folder / "a" / "b.txt") in paths.several(f"{folder}/a/*")
        with pytest.raises(FileNotFoundError):
            (folder / "none").read_text()
        (folder / "a" / "b.txt").unlink()
        files.remove_tree(folder / "a")
        assert not (folder / "a").exists()


def test_the_cache_keeps_within_its_size_and_follows_changes(memory, monkeypatch):
    monkeypatch.setenv("MIRAI_CACHE_GIB", str(2500 / 2**30))
    for name in "ab":
        (memory / name / "data").write_bytes(name.encode() * 1000)
        copy = paths.local(memory / name / "data")
        assert copy.read_bytes() == name.encode() * 1000
        assert paths.local(memory / name / "data") == copy
    with pytest.raises(ConfigError, match="MIRAI_CACHE_GIB"):  # both are in use
        (memory / "c" / "data").write_bytes(b"c" * 1000)
        paths.local(memory / "c" / "data")
    for held in cache._held.values():  # as if their process had ended
        held.close()
    cache._held.clear()
    assert paths.local(memory / "c" / "data").read_bytes() == b"c" * 1000
    assert len(list(copy.parents[2].glob("*/in_use"))) == 2  # one of the others made room
    (memory / "c" / "data").write_bytes(b"d" * 10)
    assert paths.local(memory / "c" / "data").read_bytes() == b"d" * 10
    assert {p.name for p in paths.local(memory / "c").iterdir()} == {"data"}


def test_what_a_killed_copy_left_makes_room_for_the_next(memory, monkeypatch):
    monkeypatch.setenv("MIRAI_CACHE_GIB", str(3000 / 2**30))
    for name in "abcd":
        (memory / "images" / name).write_bytes(name.encode() * 500)
    get = remote.Remote.get

    class Killed(BaseException):
        pass

    def killed(path, local, size):
        get(path, local, size)
        if path.name == "c":
            raise Killed

    @contextlib.contextmanager
    def nobody_removes(**options):
        yield tempfile.mkdtemp(**options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(remote.Remote, "get", killed)
        patch.setattr(cache.tempfile, "TemporaryDirectory", nobody_removes)
        paths.local(memory / "images")
    left = next(cache.root().glob("*/unfinished-*"))
    # A copy of another version, which another process makes.
    other = left.with_name("unfinished-0123-live")
    other.mkdir()
    assert (paths.local(memory / "images") / "d").read_bytes() == b"d" * 500
    assert other.exists() and not left.exists()


def test_a_lock_of_a_bucket_has_one_owner(memory, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "_LIVE", 0.6)
    with locks.FolderLock(memory).held():
        assert f"process {os.getpid()} on" in refusal(locks.FolderLock(memory).held().__enter__)
    assert not (memory / "lock.json").exists()
    files.write_text(
        memory / "lock.json", json.dumps({"pid": 1, "host": "h", "since": "s"})
    )  # dead
    with locks.FolderLock(memory).held():
        pass


def test_metrics_in_a_bucket_are_continued(memory):
    with files.closing(MetricsWriter(memory, 0)) as writer:
        for step in (1, 2, 3):
            writer.step(step, {"loss": 1.0})
        assert read_metrics(memory) == []
        writer.upload()
        assert len(read_metrics(memory)) == 3
        writer.step(4, {"loss": 1.0})
    assert len(read_metrics(memory)) == 4
    MetricsWriter(memory, 2).close()
    assert [entry["step"] for entry in read_metrics(memory)] == [1, 2]


def test_checkpoints_in_a_bucket(memory):
    folder = memory / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(saved_state(step), step)
    checkpoints.close()
    assert steps_in(folder) == [2, 3]
    (folder / "step_3" / "commit_success.txt").unlink()  # killed while it saved
    array = next(name for name in (folder / "step_2").find() if "/d/" in name)
    raw = bytearray((folder / "step_2" / array).read_bytes())
    again = Checkpoints(folder)
    assert again.latest_step() == 2 and not (folder / "step_3").exists()
    assert (restore_weights(folder)[0]["ema"]["w.x"] == 2).all()
    metadata = folder / "step_2" / "_CHECKPOINT_METADATA"
    (folder / "step_2" / "commit_success.txt").unlink()
    assert steps_in(folder) == []
    metadata.write_bytes(b'{"commit_timestamp_nsecs": 1}')  # copied from a disk
    assert steps_in(folder) == [2]
    raw[len(raw) // 2] ^= 255
    (folder / "step_2" / array).write_bytes(bytes(raw))
    like, one, warned = saved_state(0.0), jax.sharding.SingleDeviceSharding(jax.devices()[0]), []
    place = jax.tree.map(lambda _: one, like)
    assert again.restore_newest(like, place, warned.append) is None
    assert "damaged" in warned[0] and (folder / "damaged_step_2").is_dir() and not steps_in(folder)
    again.close()


def test_a_lost_bucket_and_a_missing_extra_are_errors_of_one_line(memory, monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "PATIENCE", 0.05)
    (memory / "x").touch()

    def away(*arguments, **options):
        raise RuntimeError("nobody answers")

    with monkeypatch.context() as patch:
        patch.setattr(remote._system("memory"), "cat_file", away)
        with pytest.raises(remote.Unreachable, match="nobody answers"):
            (memory / "x").read_bytes()
        assert memory.is_away
    with pytest.raises(remote.Unreachable):
        (memory / "x").read_bytes()
    time.sleep(0.06)
    assert (memory / "x").read_bytes() == b"" and not memory.is_away
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    remote._system.cache_clear()
    assert ".[gcs]" in refusal(train.train, tiny(llamagen), "gs://bucket/run")
    assert not list(tmp_path.iterdir())


# Emulators ----------------------------------------------------------------------------------------


class Bucket:
    """An emulator in a process: `url` of a bucket, and the `environ` of programs that use it."""

    def __init__(self, url, command, environ):
        self.url, self.environ = url, environ
        self.process = subprocess.Popen(
            command,
            cwd=pathlib.Path(__file__).parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait(self, address):
        for _ in range(200):
            try:
                return socket.create_connection(address, 1).close()
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the emulator does not start")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_gs():
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    port = free_port()
    here = f"http://127.0.0.1:{port}"
    environ = {"STORAGE_EMULATOR_HOST": here, "TENSORSTORE_GCS_HTTP_URL": here}
    bucket = Bucket("gs://bucket", [sys.executable, "bucket_emulator.py", str(port)], environ)
    bucket.wait(("127.0.0.1", port))
    return bucket


def start_s3():
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    port = free_port()
    here = f"http://127.0.0.1:{port}"
    environ = {"AWS_ENDPOINT_URL": here, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    environ |= {"AWS_DEFAULT_REGION": "us-east-1"}
    bucket = Bucket("s3://bucket", [sys.executable, "-m", "moto.server", "-p", str(port)], environ)
    bucket.wait(("127.0.0.1", port))
    urllib.request.urlopen(urllib.request.Request(f"{here}/bucket", method="PUT")).close()
    return bucket


@contextlib.contextmanager
def served(kind, tmp_path, monkeypatch):
    made = {"gs": start_gs, "s3": start_s3}[kind]()
    made.environ |= {"MIRAI_CACHE": str(tmp_path / "cache"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    for name, value in made.environ.items():
        monkeypatch.setenv(name, value)
    remote._system.cache_clear()
    # fsspec keeps its own, with the address of the emulator before.
    fsspec.get_filesystem_class(kind).clear_instance_cache()
    yield made
    made.process.kill()


@pytest.fixture(params=["gs", "s3"])
def bucket(request, tmp_path, monkeypatch):
    with served(request.param, tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def gs(tmp_path, monkeypatch):
    with served("gs", tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """What the programs make without any bucket: images, vq.pt, codes, run, samples."""
    folder, rng = tmp_path_factory.mktemp("local"), np.random.default_rng(0)
    for i in range(8):
        path = folder / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(path)
    vq_file(folder)
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    output("mirai_jax.extract", *extraction(folder, folder), **quick)
    output("mirai_jax.main", *training(folder), **quick)
    output("mirai_jax.sample", *sampling(folder), **quick)
    return folder


def extraction(images, root):
    return [f"--images={images}/images", f"--tokenizer={root}/vq.pt", f"--out={root}/codes",
            "--image_size=16", "--images_per_shard=4"]  # fmt: skip


def training(root):
    return ["--config=configs/mirai_e.py:imagenet_b", f"--workdir={root}/run", *SMALL,
            f"--config.data.path={root}/codes", f"--config.tokenizer.path={root}/vq.pt"]  # fmt: skip


def sampling(root):
    return [f"--workdir={root}/run", "--num_images=8", f"--out={root}/samples", "--batch_size=8"]


def start(bucket, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "mirai_jax.main", *training(bucket.url), *more],
        cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def follow(process, until):
    """Reads what a run prints up to a line that begins with `until`, or to its end."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(until):
            break
    return lines


def prepare(bucket, local):
    root = paths.at(bucket.url)
    (root / "vq.pt").put(str(local / "vq.pt"))
    output("mirai_jax.extract", *extraction(local, root))
    return root


def assert_same_run(run, other):
    def logged(folder):
        entries = read_metrics(folder)
        return [{k: v for k, v in e.items() if k not in ("images_per_second", "wait_share")}
                for e in entries]  # fmt: skip

    assert logged(run) == logged(other) and len(logged(run)) == STEPS
    weights = [restore_weights(folder / "checkpoints")[0] for folder in (run, other)]
    jax.tree.map(np.testing.assert_array_equal, *weights)
    name = f"step_{STEPS:07d}.png"
    assert (run / "samples" / name).read_bytes() == (other / "samples" / name).read_bytes()


@pytest.mark.slow
def test_a_run_killed_three_times_is_that_of_a_disk(bucket, local, tmp_path):
    root, chance = prepare(bucket, local), random.Random(0)
    for step in (6, 14, 26):
        process = start(bucket)
        follow(process, f"step {step:2}/")
        time.sleep(chance.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    process = start(bucket)
    printed, _ = process.communicate()
    assert process.returncode == 0 and "resumed at step" in printed, printed[-2000:]
    assert_same_run(root / "run", local / "run")
    assert not (root / "run" / "lock.json").exists()
    output("mirai_jax.sample", *sampling(root))
    mine, other = (np.load(paths.local(r / "samples" / "samples.npz")) for r in (root, local))
    np.testing.assert_array_equal(mine["arr_0"], other["arr_0"])
    output(
        "mirai_jax.evaluate",
        f"--samples={root}/samples",
        f"--reference={local}/samples",
        "--batch_size=4",
    )
    assert "frechet" in (root / "samples" / "results.json").read_text()
    output("mirai_jax.convert", f"{root}/run", f"{root}/made.safetensors")
    output("mirai_jax.convert", f"{root}/vq.pt", f"{root}/vq")
    output("mirai_jax.convert", f"{root}/vq", f"{root}/again.pt")
    assert (root / "again.pt").is_file()


@pytest.mark.slow
def test_a_bucket_that_is_away_for_20_seconds_changes_nothing(bucket, local):
    root = prepare(bucket, local)
    process = start(bucket)
    follow(process, "step 10/")
    bucket.process.send_signal(signal.SIGSTOP)
    time.sleep(20)
    bucket.process.send_signal(signal.SIGCONT)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-2000:]
    assert_same_run(root / "run", local / "run")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["silent", "refused"])
def test_a_bucket_that_is_gone_ends_a_run_in_one_line(bucket, local, how):
    root = prepare(bucket, local)
    process = start(bucket)
    follow(process, "step 10/")
    bucket.process.send_signal(signal.SIGSTOP if how == "silent" else signal.SIGKILL)
    begun = time.monotonic()
    printed, _ = process.communicate(timeout=400)
    lines = [line for line in printed.splitlines() if not line.startswith("step ")]
    print(time.monotonic() - begun, *lines, sep="\n")
    assert (
        process.returncode == 1 and lines[-1].startswith("error: ") and "Traceback" not in printed
    )
    if how == "refused":
        return
    bucket.process.send_signal(signal.SIGCONT)
    assert max(steps_in(root / "run" / "checkpoints")) >= 4
    restore_weights(root / "run" / "checkpoints")
    process = start(bucket)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed[-2000:]
    assert_same_run(root / "run", local / "run")


# Damaged checkpoints; several processes ------------------------------------------------------------


def damage(path, how):
    """An object with a flipped bit, half of it, or none."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.unlink()
    if how != "gone":
        path.write_bytes(bytes(raw if how == "flipped" else raw[: len(raw) // 2]))


@pytest.mark.slow
def test_a_damaged_checkpoint_of_a_bucket_is_set_aside_for_the_one_before(bucket):
    like, one = saved_state(0.0), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = jax.tree.map(lambda _: one, like)
    whole = paths.at(bucket.url) / "whole" / "checkpoints"
    with contextlib.closing(Checkpoints(whole)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(saved_state(step), step)
    array = next(name for name in (whole / "step_2").find() if name.startswith("state/d/"))
    for i, (name, how) in enumerate(
        [
            (array, "flipped"),
            (array, "short"),
            (array, "gone"),
            ("state/manifest.ocdbt", "flipped"),
            ("state/_METADATA", "short"),
            ("marks/metadata", "gone"),
        ]
    ):
        folder, warned = paths.at(bucket.url) / f"run{i}" / "checkpoints", []
        remote._system(bucket.url[:2]).copy(str(whole), str(folder), recursive=True)
        damage(folder / "step_2" / name, how)
        with contextlib.closing(Checkpoints(folder)) as again:
            state, step = again.restore_newest(like, place, warned.append)
        print(name, how, step, *warned)
        assert step == 1 and (state.ema["w.x"] == 1).all(), (name, how)
        assert (folder / "damaged_step_2").is_dir()


@pytest.mark.slow
def test_two_processes_with_one_workdir_in_gs(gs, local):
    root = prepare(gs, local)

    def pair(*more):
        together = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
        together += ["--heartbeat=10", *more]
        return [start(gs, *together, f"--process_id={i}") for i in range(2)]

    pair_killed = pair()
    follow(pair_killed[0], "step 26/")
    for process in pair_killed:
        process.kill()
    assert [process.wait() for process in pair_killed] == [-signal.SIGKILL] * 2
    folder = root / "run" / "checkpoints"
    newest = folder / f"step_{steps_in(folder)[-1]}"
    (array,) = [name for name in newest.find() if name.startswith("state/d/")][:1]
    damage(newest / array, "flipped")
    both = pair()
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert "damaged" in printed[0] and "resumed at step" in printed[0], printed[0]
    mine, others = read_metrics(root / "run"), read_metrics(local / "run")
    assert [entry["step"] for entry in mine] == list(range(1, STEPS + 1))
    for a, b in zip(mine, others, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5
    mine, others = (restore_weights(r / "run" / "checkpoints")[0] for r in (root, local))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), mine, others)
    # A run that begins with its weights.
    more = [f"--config.init_from={root}/run", "--config.num_steps=2", f"--workdir={root}/next"]
    printed, _ = start(gs, *more).communicate()
    assert f"began with the weights of {root}/run" in printed and "finished" in printed, printed


@pytest.mark.slow
def test_images_of_a_folder_in_a_bucket(bucket, local):
    root = paths.at(bucket.url)
    files.upload(local / "images", root / "images", last="a/0.png")
    there, here = (images.open_images(f"{r}/images") for r in (root, local))
    assert [there.example(i) for i in range(8)] == [here.example(i) for i in range(8)]
    assert there.class_names == here.class_names == ("a", "b")
    (root / "vq.pt").put(str(local / "vq.pt"))
    output("mirai_jax.extract", *extraction(root, root))
    shape = {"grid": (8, 8), "vocab_size": TINY_VQ.vocab_size, "num_classes": 2}
    made, other = (records.CodeRecords(f"{r}/codes", **shape) for r in (root, local))
    for mine, wanted in zip(made, other, strict=True):
        assert mine.keys() == wanted.keys() and mine["key"] == wanted["key"]
        np.testing.assert_array_equal(mine["codes"], wanted["codes"])


@pytest.mark.slow
def test_a_large_file_may_take_long_if_it_does_not_stand_still(tmp_path, monkeypatch):
    pytest.importorskip("gcsfs")
    about = b'{"name": "x", "bucket": "b", "size": "8", "generation": "1", "storageClass": "S"}'

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            is_data = "alt=media" in self.path
            self.send_header("Content-Length", "8" if is_data else str(len(about)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            for part in [b"x"] * 8 if is_data else [about]:
                self.wfile.write(part)
                time.sleep(0.5)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(remote, "_SILENCE", 2.0)
    remote._system.cache_clear()
    monkeypatch.setattr(fsspec.config, "conf", {})
    fsspec.get_filesystem_class("gs").clear_instance_cache()
    remote.Remote("gs://b/x").get(str(tmp_path / "x"), 8)  # in 4 seconds
    assert (tmp_path / "x").read_bytes() == b"x" * 8
    remote._system.cache_clear()
