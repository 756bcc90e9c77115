"""What goes wrong on the machines of users: screens, signals, names, second writers, broken images."""

import errno
import fcntl
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
from concurrent import futures

import jax
import numpy as np
import pytest
from helpers import ROOT, TINY, environment, error_line, refusal, saved_state, vq_file
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mirai_jax.config import unused
from mirai_jax.config.flags import parse_config
from mirai_jax.data import folders, images, manifest, pipeline, records
from mirai_jax.data.crops import CropSpec
from mirai_jax.evaluation import image_streams
from mirai_jax.extraction import job, shards
from mirai_jax.models import generator
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.teaching.settings import TeacherRunConfig
from mirai_jax.training import checkpoint
from mirai_jax.utils import distributed, files, locks, paths
from mirai_jax.utils.errors import DataError
from mirai_jax.weights import pretrained, usual_names

RUN = ["--config=configs/llamagen.py", *TINY, "--config.log_every=20", "--config.sample_every=0",
       "--config.judged_samples=0", "--config.batch_size=16"]  # fmt: skip


# Names ----------------------------------------------------------------------------------------------

NAMES = ["[0:9]", "lr[3e-4]", "a*?", "50%", "#1", "~", "two words", "line\nbreak", "b\\c", "-dash",
         "é" * 100, "e\u0301\u202eabc", "gs:", "a,b=c", "{x}", "'q'\""]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_no_name_changes_what_is_written(name, tmp_path):
    folder = tmp_path / name
    # A checkpoint.
    saved = checkpoint.Checkpoints(folder / "checkpoints")
    saved.save(saved_state(3.0), 7)
    saved.close()
    found, step = checkpoint.restore_weights(folder / "checkpoints")
    assert step == 7 and found["ema"]["w.x"][1, 2] == 3
    # A converted folder.
    config = GeneratorConfig(1, 2, 16, vocab_size=8, num_classes=2, grid=(2, 2))
    params = jax.device_get(generator.init_params(config, jax.random.key(0)))
    made = pretrained.Weights("generator", config, params, None, {"file": "a"})
    pretrained.save(folder / name, made)
    jax.tree.map(
        np.testing.assert_array_equal, pretrained.load_converted(folder / name).params, params
    )
    # Images, and shards of codes.
    (folder / "images" / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "images" / name / f"{name[:50]}.png")
    source = images.open_images(str(folder / "images"))
    assert source.class_names == (name,) and source.find(source.about(0)[1])
    packed = [records.pack_record(np.zeros((1, 4), np.uint16), i, f"{name}/{i}") for i in range(3)]
    (folder / "codes").mkdir()
    records.write_shard(folder / "codes" / "x.array_record", packed)
    read = records.CodeRecords(str(folder / "codes"), grid=(2, 2), vocab_size=9, num_classes=3)
    assert [read[i]["key"] for i in range(3)] == [f"{name}/{i}" for i in range(3)]


@given(st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1))
@settings(max_examples=100, deadline=None)
def test_a_plain_name_leads_to_the_same_place(name):
    with tempfile.TemporaryDirectory() as top:
        folder = pathlib.Path(top, f"x{name.encode()[:200].decode(errors='ignore')}")
        folder.mkdir()
        plain = paths.plain(folder)
        assert os.path.samefile(plain, folder) and paths._PLAIN.fullmatch(plain)


def test_what_an_index_does_not_hold_is_no_checkpoint(tmp_path, monkeypatch):
    saved = checkpoint.Checkpoints(tmp_path / "c", keep=1)
    saved.save(saved_state(1.0), 1)
    saved.wait()
    monkeypatch.setattr(files, "stored_arrays", lambda folder: {"key"})
    saved.save(saved_state(2.0), 2)
    message = refusal(saved.wait, error=Exception)
    assert "step_2" in message and checkpoint.steps_in(tmp_path / "c") == [1]
    saved.close()
    assert checkpoint.steps_in(tmp_path / "c") == [1]  # the last whole one stays


def test_urls_that_nothing_reads_are_refused_by_every_program(tmp_path):
    for module, *arguments in (
        ("main", f"--config={ROOT}/configs/llamagen.py", "--workdir=nope://b/x"),
        ("evaluate", "--samples=nope://b/s.npz,a.npz", "--reference=a.npz"),
        ("convert", "nope://b/a.pt", "nope://b/out"),
    ):
        assert "nope://" in error_line(f"mirai_jax.{module}", *arguments, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_lists_of_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "run1", "run2"):
        pathlib.Path(name).mkdir()
    assert paths.several("a,b") == ["a,b"]
    assert paths.several("run*,none") == ["run1", "run2", "none"]


# One writer -----------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_until_the_first_ends(tmp_path):
    code = f"""
        import pathlib, time
        from mirai_jax.utils import locks
        print(locks.FolderLock(pathlib.Path({str(tmp_path)!r})).acquire() or "taken", flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as other:
        assert other.stdout.readline() == "taken\n"
        assert f"process {other.pid} on " in locks.FolderLock(tmp_path).acquire()
        other.kill()
    mine = locks.FolderLock(tmp_path)
    assert mine.acquire() == "" and mine.acquire() == ""
    mine.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_is_given_back_where_the_work_fails(tmp_path):
    with pytest.raises(KeyError), locks.FolderLock(tmp_path / "new").held():
        raise KeyError
    second = locks.FolderLock(tmp_path / "new").held()
    with locks.FolderLock(tmp_path / "new").held():
        assert "is at work: process" in refusal(second.__enter__)


@pytest.fixture
def quick_beats(monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.2)
    monkeypatch.setattr(locks, "_LIVE", 2.0)


def elsewhere(folder):
    """Another host's owner stands in the lock, which belongs to this process."""
    path = folder / "lock.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "elsewhere"}))


def test_without_locks_a_heartbeat_shows_who_lives(tmp_path, monkeypatch, quick_beats):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first = locks.FolderLock(tmp_path)
    assert first.acquire() == ""
    lines = []
    assert "process " in locks.FolderLock(tmp_path, log=lines.append).acquire() and lines
    first._closed.set()  # it died: nothing touches the file any more
    time.sleep(0.5)
    second = locks.FolderLock(tmp_path)
    assert second.acquire() == ""
    second.close()
    assert not list(tmp_path.iterdir())


def test_two_starts_at_once_without_locks_are_one(tmp_path, monkeypatch, quick_beats):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    write, both = locks.json.dumps, threading.Barrier(2)
    monkeypatch.setattr(locks.json, "dumps", lambda about: (both.wait(), write(about))[1])
    # Two processes, as far as the lock can see.
    pids = iter((11, 22, 33, 44, 55, 66))
    numbers = threading.local()
    monkeypatch.setattr(locks.os, "getpid", lambda: numbers.__dict__.setdefault("n", next(pids)))
    pool = futures.ThreadPoolExecutor(2)
    found = list(pool.map(lambda _: locks.FolderLock(tmp_path).acquire(), range(2)))
    assert sorted(map(bool, found)) == [False, True]


def test_a_lock_that_a_dead_host_left_is_taken(tmp_path, quick_beats):
    with (tmp_path / "lock.json").open("a+") as left:
        assert locks.try_lock(left)
        about = {"pid": 1, "host": "elsewhere", "since": "yesterday"}
        left.write(json.dumps(about) + "\n")
        left.flush()
        mine = locks.FolderLock(tmp_path)
        assert mine.acquire() == ""
        assert f"process {os.getpid()}" in locks.FolderLock(tmp_path).acquire()
        mine.close()


def test_a_writer_whose_folder_was_taken_ends(tmp_path, monkeypatch, quick_beats):
    ended = []
    monkeypatch.setattr(locks, "leave", ended.append)
    slow = locks.FolderLock(tmp_path)
    assert slow.acquire() == ""
    (tmp_path / "lock.json").unlink()  # by hand: no reason to end
    time.sleep(0.5)
    assert not ended
    about = {"pid": 1, "host": "elsewhere", "since": "today"}
    (tmp_path / "lock.json").write_text(json.dumps(about))
    time.sleep(1)
    assert set(ended) == {1}
    slow.close()
    assert (tmp_path / "lock.json").exists()  # the other's


# Ends -----------------------------------------------------------------------------------------------


def script(body, *, stdout=subprocess.PIPE, ignored=False, **environ):
    """Runs `body` as a program's main; returns its status, output and the seconds it took to end.

    Its SIGHUP and SIGINT are `ignored` by whoever starts it, or not even under nohup.
    """
    code = f"""
        import os, signal, sys, threading, time
        from mirai_jax.utils import cli
        from mirai_jax.utils.errors import ConfigError
        def main(argv):
            with cli.program(interrupted="stopped by hand"):
                {body}
        ignored = {ignored}
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
        cli.run(main)
    """
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=stdout, stderr=subprocess.PIPE, env=environment(**environ), timeout=60,
    )  # fmt: skip
    return done.returncode, done, time.monotonic() - begun


def test_a_lost_screen_is_no_error(tmp_path):
    work = f"[print('é', i, flush=True) for i in range(9)]; open({str(tmp_path / 'done')!r}, 'w')"
    read, write = os.pipe()
    os.close(read)
    for screen in (write, os.open("/dev/full", os.O_WRONLY)):
        status, done, _ = script(work, stdout=screen)
        assert status == 0 and not done.stderr, done.stderr
        (tmp_path / "done").unlink()
    status, done, _ = script(work, PYTHONIOENCODING="ascii")
    assert status == 0 and b"\\xe9 8" in done.stdout


@pytest.mark.slow
def test_threads_that_wait_for_ever_end_with_the_program():
    body = "threading.Thread(target=time.sleep, args=[600]).start(); raise ConfigError('x')"
    status, done, seconds = script(body)
    assert status == 1 and seconds < 25, done.stderr


def test_signals_at_any_moment_end_with_their_status():
    for number, status, word in (
        (signal.SIGTERM, 75, b"the same command resumes"),
        (signal.SIGHUP, 75, b"the same command resumes"),
        (signal.SIGINT, 1, b"stopped by hand"),
    ):
        body = f"os.kill(os.getpid(), {int(number)}); time.sleep(30)"
        found, done, _ = script(body)
        assert found == status and word in done.stderr, done.stderr
    body = "[os.kill(os.getpid(), n) for n in (signal.SIGINT, signal.SIGHUP)]"
    assert script(body, ignored=True)[0] == 0


def test_a_signal_is_no_error_of_what_it_interrupts():
    body = f"""
                try:
                    os.kill(os.getpid(), {int(signal.SIGTERM)}); time.sleep(30)
                except Exception:
                    raise ConfigError("the file is damaged")
    """
    status, done, _ = script(body.strip())
    assert status == 75, done.stderr


def test_devices_that_cannot_be_had_are_one_line():
    for platform in ("cuda", "tpu"):
        line = error_line("mirai_jax.main", *RUN, "--config.num_steps=2", JAX_PLATFORMS=platform)
        assert "JAX_PLATFORMS" in line and platform in line


def test_an_interactive_slurm_shell_is_no_run_of_several_processes():
    shell = {"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}
    assert distributed.environment(shell) is None
    assert distributed.environment(shell | {"SLURM_STEP_NUM_TASKS": "4"}) == {}


# Images ---------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for i in range(12):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.effect_noise((16, 16), 50).save(folder / "ab"[i % 2] / f"{i:02}.png")
    return folder


def batches(folder, rows=None, num_workers=0):
    source, spec = images.open_images(str(folder)), CropSpec(8, 1.1)
    loader = pipeline.CropLoader(source, spec)
    return iter(pipeline.make_dataset(
        pipeline.OnlineImages(source, spec, 2), load_crop=loader, batch_size=4, seed=0, rows=rows,
        num_workers=num_workers,
    ))  # fmt: skip


def test_a_broken_image_is_replaced_by_the_next_and_reported(photos):
    broken = photos / "a" / "04.png"
    broken.write_bytes(broken.read_bytes()[:60])
    whole, parts = batches(photos), [batches(photos, rows=rows) for rows in ((0, 1), (2, 3))]
    seen = set()
    for _ in range(6):
        batch, halves = next(whole), [next(part) for part in parts]
        assert set(batch) == {"image", "label"}
        np.testing.assert_array_equal(batch["image"], np.concatenate([h["image"] for h in halves]))
        assert whole.replaced == parts[0].replaced + parts[1].replaced
        seen.update(name.split(" crop")[0] for name in whole.replaced)
    assert seen == {"a/04.png"}
    for file in photos.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError):
        next(batches(photos))


class Flaky:
    """Images of which record 4 cannot be read, and record 7 not at the first try."""

    label = 1

    def __init__(self):
        self.tries = 0

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 4:
            raise ValueError("damaged record")
        self.tries += index == 7
        if index == 7 and self.tries < 3:
            raise OSError(errno.EIO, "the network is gone for a moment")
        return {"image": np.full((16, 16, 3), index, np.uint8), "label": self.label}


def test_a_record_that_cannot_be_read_is_replaced_but_no_wrong_label_is(monkeypatch):
    module = types.ModuleType("flaky_photos")
    module.photos = Flaky()
    monkeypatch.setitem(sys.modules, "flaky_photos", module)
    monkeypatch.setattr(files, "_WAITS", (0.01, 0.01))
    stream, seen, replaced = batches("grain:flaky_photos:photos"), set(), set()
    for _ in range(6):
        seen |= set(next(stream)["image"][:, 0, 0, 0].tolist())
        replaced |= set(stream.replaced)
    assert seen == set(range(12)) - {4} and module.photos.tries >= 3
    assert replaced and all("record 4" in name for name in replaced)
    module.photos.label = 2
    with pytest.raises(DataError, match="label 2"):
        next(batches("grain:flaky_photos:photos"))


def test_a_record_of_codes_that_cannot_be_read_is_replaced_but_no_wrong_code_is(
    tmp_path, monkeypatch
):
    """Record 5 is damaged, and the storage of record 2 does not answer at first."""
    codes, path = np.arange(16, dtype=np.uint16).reshape(8, 1, 2), tmp_path / "a.array_record"
    records.write_shard(path, [records.pack_record(c, 0, f"image {c[0, 0]}") for c in codes])
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"image 10") + 6] ^= 1
    path.write_bytes(raw)
    shape = dict(grid=(1, 2), num_classes=1)
    source, tries = records.CodeRecords(str(tmp_path), vocab_size=16, **shape), []

    class Shard:
        def __getitem__(self, position):
            tries.extend([position] * (position == 2))
            if tries == [2]:
                raise RuntimeError("reading: no answer")
            return shard[position]

    (shard,) = source._shards
    source._shards = [Shard()]
    monkeypatch.setattr(files, "_WAITS", (0.01, 0.01))
    stream = iter(pipeline.make_dataset(source, batch_size=4, seed=0))
    seen, replaced = set(), []
    for _ in range(4):
        seen |= set(next(stream)["codes"][:, 0].tolist())
        replaced += stream.replaced
    assert seen == set(range(0, 16, 2)) - {10} and tries[:2] == [2, 2]
    assert len(replaced) == 2 and all("record 5 of a.array_record" in name for name in replaced)
    source = records.CodeRecords(str(tmp_path), vocab_size=8, **shape)
    stream = iter(pipeline.make_dataset(source, batch_size=4, seed=0))
    with pytest.raises(DataError, match="vocab_size is 8"):
        [next(stream) for _ in range(2)]


def test_an_evaluation_leaves_broken_images_out_and_names_them(photos):
    broken = photos / "b" / "05.png"
    broken.write_bytes(broken.read_bytes()[:-300])
    stream = image_streams.open_stream(str(photos))
    assert sum(map(len, stream.chunks(5))) == 11
    assert list(stream.failed) == ["b/05.png"]


def test_an_extraction_knows_its_images_by_name(photos, tmp_path):
    tokenizer = str(vq_file(tmp_path))
    begin = lambda: job.prepare(str(photos), tokenizer, str(tmp_path / "codes"), CropSpec(16, 1.1),
                                images_per_shard=6)  # fmt: skip
    shards.write_shards(begin(), [0], shards.Progress(6, "images", stream=None))
    (photos / "a" / "00.png").rename(photos / "b" / "00.png")
    assert "images.keys" in refusal(begin)
    (photos / "b" / "00.png").rename(photos / "a" / "00.png")
    file = tmp_path / "codes" / "manifest.json"
    old = json.loads(file.read_text())
    del old["images"]["keys"]  # of an earlier version
    file.write_text(json.dumps(old))
    assert begin().manifest == manifest.read(file.parent)
    inside = lambda: job.prepare(str(photos), tokenizer, str(photos / "codes"), CropSpec(16, 1.1))
    assert "--out" in refusal(inside)


def test_classes_in_an_order_that_surprises_are_named(tmp_path):
    assert "label 2 is class '10'" in folders.surprise(("0", "1", "10", "11", "2"))
    assert not folders.surprise(("0", "1", "2")) and not folders.surprise(("cat", "10"))
    for name in ("cat", "@eaDir", "__MACOSX", ".thumbnails"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    assert images.open_images(str(tmp_path)).class_names == ("cat",)


# Settings and weights -------------------------------------------------------------------------------


def test_a_field_without_effect_is_named():
    arguments = ["--config.teacher.path=x.pth", "--config.seed=3", "--config.data.crop_range=1.2",
                 "--config.foresight[0].checkpoint=run"]  # fmt: skip
    config = parse_config(["--config=configs/mirai_i.py", *arguments])
    notes = unused.notes(config, arguments)
    assert [note.split()[0] for note in notes] == [
        "--config.teacher.path", "--config.data.crop_range", "--config.foresight[0].checkpoint"
    ]  # fmt: skip
    arguments = ["--config.masked_share=0.2", "--config.data.held_out=600"]
    encoder = parse_config(["--config=configs/teacher.py", *arguments])
    notes = unused.notes(encoder, arguments, TeacherRunConfig, unused.ENCODER)
    assert [note.split()[0] for note in notes] == ["--config.masked_share"]
    for rules, whole in ((unused.RUN, config), (unused.ENCODER, encoder)):
        for name in rules:  # every rule names a field or a section
            functools.reduce(getattr, name.split("."), whole)


def test_names_that_wrappers_and_libraries_left_are_the_usual_ones():
    rng = np.random.default_rng(0)
    q, k, v, o = (rng.normal(size=(4, 4)).astype(np.float32) for _ in range(4))
    official = {"cls_token": q[:1, None], "pos_embed": q[None], "norm.weight": q[0],
                "blocks.3.attn.qkv.weight": np.concatenate([q, k, v]), "blocks.3.ls1.gamma": q[1],
                "blocks.3.attn.proj.weight": o, "mask_token": np.zeros((1, 4), np.float32)}  # fmt: skip
    training = {f"backbone.{n.replace('blocks.', 'blocks.1.')}": a for n, a in official.items()}
    training |= {"dino_head.mlp.0.weight": q}
    layer = ["embeddings.cls_token", "embeddings.position_embeddings", "layernorm.weight"]
    theirs = dict(zip(layer, [official["cls_token"], official["pos_embed"], q[0]], strict=True))
    inside = "encoder.layer.3.attention."
    theirs |= {
        f"{inside}attention.{n}.weight": a
        for n, a in zip(("query", "key", "value"), (q, k, v), strict=True)
    }
    theirs |= {f"{inside}output.dense.weight": o, "encoder.layer.3.layer_scale1.lambda1": q[1]}
    wrapped = {
        f"module.{n.replace('blocks.3.', 'blocks.3._orig_mod.')}": a for n, a in official.items()
    }
    for state in (official, training, theirs, wrapped):
        found = usual_names.usual(state)
        assert found.keys() == official.keys()
        for name, array in official.items():
            np.testing.assert_array_equal(found[name], array)
    cached = {"layers.0.attention.kv_cache.k_cache": q, "freqs_cis": q, "norm.weight": q}
    assert list(usual_names.usual(cached)) == ["norm.weight"]


# Whole runs -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_whose_pipe_ends_goes_on(tmp_path):
    command = f"{sys.executable} -m mirai_jax.main {' '.join(RUN)} --config.num_steps=60 "
    command += f"--workdir={tmp_path} 2>&1 | head -3"
    subprocess.run(
        command, shell=True, cwd=ROOT, env=environment(), check=True, capture_output=True
    )
    assert checkpoint.steps_in(tmp_path / "checkpoints") == [60]


@pytest.mark.slow
def test_the_same_command_twice_trains_once(tmp_path):
    arguments = [sys.executable, "-m", "mirai_jax.main", *RUN, "--config.num_steps=200",
                 "--config.checkpoint_every=20", f"--workdir={tmp_path}"]  # fmt: skip
    both = [subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=subprocess.PIPE,
                             stdout=subprocess.DEVNULL, text=True) for _ in range(2)]  # fmt: skip
    messages = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], messages
    assert any("is at work: process " in message for message in messages)
    assert checkpoint.steps_in(tmp_path / "checkpoints")[-1] == 200
