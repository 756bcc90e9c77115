"""Starts on large data: what takes long is shown, and never taken for a hang."""

import contextlib
import itertools
import os
import threading
import time

import numpy as np
import pytest
from folder_test import config_of, draw, run
from sources_test import pack, write_folder

from configs import mirai_i
from mirai_jax.data import pipeline, tars
from mirai_jax.training import train

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def happened(monkeypatch):
    """What the guard of a run hears, after 'guard', its beginning."""
    happened = []

    class Guard:
        heartbeat = staticmethod(happened.append)
        close = staticmethod(lambda: None)

    monkeypatch.setattr(train, "HangGuard", lambda limit: happened.append("guard") or Guard)
    return happened


def begin(config, folder):
    """Begins a run, and stops it when all is read."""

    def stop(line):
        if line.startswith("devices:"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, folder, stop)


def done(happened, unit):
    """How many of a unit were done at each heartbeat."""
    return [int(line.partition("/")[0]) for line in happened if f" {unit} " in line]


@pytest.mark.parametrize("crops", ["centre", "random"])
def test_each_image_read_and_each_chunk_encoded_is_a_heartbeat(tmp_path, happened, crops):
    """In memory, and of a codebook that is fitted to images on disk."""
    for name in "ab":
        draw(tmp_path / "images", name, 15)
    config = config_of(tmp_path / "images", mirai_i, data__crops=crops, data__held_out_share=0.0)
    config.teacher.update(image_size=32, cached=crops == "centre")
    begin(config, tmp_path / "run")
    assert done(happened, "images read") == list(range(1, 31))
    for unit in ("images encoded", "images through the teacher") if crops == "centre" else ():
        assert done(happened, unit)[-1] == 60  # with their mirror images


def test_indices_are_made_before_the_guard_watches(tmp_path, happened, monkeypatch):
    monkeypatch.setenv("MIRAI_CACHE", str(tmp_path / "cache"))
    index = tars._index
    monkeypatch.setattr(tars, "_index", lambda path: happened.append("index") or index(path))
    spec = pack("wds", write_folder(tmp_path / "images", 23), tmp_path)
    fields = {"data__codes": "online", "data__held_out_share": 0.0, "data__min_images": 1}
    config = config_of(spec, mirai_i, data__name="images", model__num_classes=3, **fields)
    config.teacher.image_size = 32
    config.model.grid = (6, 10)
    begin(config, tmp_path / "run")
    assert happened[:3] == ["index", "index", "guard"]


def test_without_worker_processes_threads_decode_and_the_batches_stay_the_same(monkeypatch):
    records = [{"label": np.int32(i), "crops": 10, "key": str(i)} for i in range(40)]
    together, calls = threading.Barrier(2), None

    def load(key, crop):
        call = next(calls)
        if call < 2 <= os.cpu_count():
            together.wait(10)  # for another thread
        time.sleep(0.003 * (call * 7 % 5))  # so that batches are not ready in their order
        return np.full((1, 1, 1), 10 * int(key) + crop)

    def batches(threads):
        nonlocal calls
        calls = itertools.count()
        monkeypatch.setattr(os, "cpu_count", lambda: threads)
        made = iter(pipeline.make_dataset(records, load_crop=load, batch_size=4, seed=0))
        with contextlib.closing(made):
            return [next(made) for _ in range(25)]

    one, several = batches(1), batches(4)
    for x, y in zip(one, several, strict=True):
        np.testing.assert_array_equal(x["image"], y["image"])
        np.testing.assert_array_equal(x["label"], y["label"])
