"""A run's folder: its config.json and its metrics, whole whatever happens to the disk."""

import contextlib
import io
import json
import os
import struct
import time

import numpy as np
import PIL.Image
import pytest
from fuzzing import flipped
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from configs import mirai_e
from mirai_jax.config import fields
from mirai_jax.training import metrics_writer, workdir
from mirai_jax.utils.errors import ConfigError, TrainingError
from mirai_jax.utils.files import closing


def get(**changed):
    """The demo of Mirai-E as plain dictionaries and tuples."""
    return fields.plain(mirai_e.get_config()) | changed


def test_a_workdir_of_the_same_run_is_opened_again(tmp_path):
    folder, config = tmp_path / "a" / "b", get()
    assert workdir.check_workdir(folder, config) == {} and not folder.exists()
    with workdir.claim(folder, config, {}, None, fresh=True):
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "lock.json"]
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert workdir.check_workdir(folder, config) == {}
    longer = get(log_every=3)
    assert workdir.check_workdir(folder, longer).keys() == {"log_every"}
    with pytest.raises(ConfigError, match="seed was 0, is 5"):
        workdir.check_workdir(folder, get(seed=5))


@pytest.mark.parametrize("text", ["", "{", '{"seed": 0', "[]", "3", "null", "{}", "\x00"])
def test_a_damaged_config_json_is_told_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        workdir.check_workdir(tmp_path, get())
    assert len(str(error.value).splitlines()) == 1 and str(tmp_path) in str(error.value)


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below"):
        with pytest.raises(ConfigError) as error:
            workdir.check_workdir(folder, get())
            workdir.claim(folder, get(), {}, None, fresh=True).__enter__()
        assert str(folder) in str(error.value)


def test_metrics_survive_a_cut_off_last_line(tmp_path):
    assert metrics_writer.read_metrics(tmp_path) == []
    lines = [{"step": step, "loss": 1.5 / step} for step in (1, 20, 40)]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    path = tmp_path / "metrics.jsonl"
    for cut in range(len(whole) + 1):
        path.write_text(whole[:cut])
        complete = whole[:cut].count("\n")
        entries = metrics_writer.read_metrics(tmp_path)
        assert entries in (lines[:complete], lines[: complete + 1])
        assert entries == lines[: len(entries)]


def test_metrics_go_on_from_the_step_that_was_restored(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": float(step)} for step in (1, 20, 40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 60, "lo')
    writer = metrics_writer.MetricsWriter(tmp_path, 20)
    writer.step(40, {"loss": -1.0})
    assert metrics_writer.read_metrics(tmp_path) == [*lines[:2], {"step": 40, "loss": -1.0}]
    writer.close()
    assert any(file.name.startswith("events.out.tfevents") for file in tmp_path.iterdir())


def board_events(folder):
    """The events of a folder's only TensorBoard file, whose checksums are checked."""
    (path,) = folder.glob("events.out.tfevents.*")
    data, events = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        content = data[12 : 12 + size]
        for part, start in ((data[:8], 8), (content, 12 + size)):
            assert struct.unpack("<I", data[start : start + 4]) == (masked_crc32c(part),)
        events.append(Event.FromString(content))
        data = data[16 + size :]
    return events


@pytest.mark.parametrize("begin", [0, 20])
def test_tensorboard_can_read_all_that_was_written(tmp_path, begin):
    values = {"loss": 1.5, "cross_entropy": float("inf"), "foresight/near": -2.0}
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    with closing(metrics_writer.MetricsWriter(tmp_path, begin)) as writer:
        writer.step(40, values)
        writer.board(60, {"agreement/samples": 0.25})
        writer.image(60, "samples", picture)
        version, *events = board_events(tmp_path)  # nothing waits for the end
    assert [version, *events] == board_events(tmp_path)
    assert version.file_version == "brain.Event:2"
    if begin:  # what older files hold from there on is forgotten
        start = events.pop(0)
        assert (start.step, start.session_log.status) == (begin + 1, SessionLog.START)
    found = [(event.step, value) for event in events for value in event.summary.value]
    step, shown = found.pop()
    assert (step, shown.tag) == (60, "samples")
    image = PIL.Image.open(io.BytesIO(shown.image.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(image), picture)
    scalars = [(step, value.tag, value.simple_value) for step, value in found]
    assert scalars == [
        *((40, name, value) for name, value in values.items()),
        (60, "agreement/samples", 0.25),
    ]
    assert all(abs(event.wall_time - time.time()) < 60 for event in (version, *events))


def fill_up(folder, pattern):
    """Whatever is written to the open files of these names meets a full disk."""
    if not (os.path.exists("/dev/full") and os.path.exists("/proc/self/fd")):
        pytest.skip("no /dev/full here")
    paths, full = {str(path) for path in folder.glob(pattern)}, os.open("/dev/full", os.O_WRONLY)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{name}") in paths:
                os.dup2(full, int(name))
    os.close(full)


@pytest.mark.parametrize("pattern", ["metrics.jsonl", "events.out.tfevents.*", "*"])
def test_a_full_disk_is_told_at_once_and_not_again_by_closing(tmp_path, pattern):
    with pytest.raises(TrainingError), closing(metrics_writer.MetricsWriter(tmp_path, 0)) as writer:
        writer.step(1, {"loss": 1.0})
        fill_up(tmp_path, pattern)
        with pytest.raises(OSError, match="No space left"):
            writer.step(2, {"loss": 1.0})
        raise TrainingError("the run ends")
    writer.close()
    assert metrics_writer.read_metrics(tmp_path)[0] == {"step": 1, "loss": 1.0}


def test_closing_tells_of_a_full_disk_unless_there_is_an_error_already(tmp_path):
    with pytest.raises(TrainingError), closing(metrics_writer.MetricsWriter(tmp_path, 0)):
        fill_up(tmp_path, "*")  # a device that cannot be synchronised
        raise TrainingError("a checkpoint could not be written")
    with pytest.raises(OSError), closing(metrics_writer.MetricsWriter(tmp_path, 0)):
        fill_up(tmp_path, "*")


@pytest.mark.parametrize("room", range(2000, 2200, 19))
def test_a_disk_that_gets_full_keeps_every_whole_line(tmp_path, room):
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.suppress(OSError), closing(metrics_writer.MetricsWriter(tmp_path, 0)) as writer:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1]))
            for step in range(1, 1000):
                writer.step(step, {"loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
    (board,) = tmp_path.glob("events.out.tfevents.*")
    assert max(board.stat().st_size, (tmp_path / "metrics.jsonl").stat().st_size) == room
    whole = [{"step": k, "loss": 1.0} for k in range(1, step + 1)]
    assert metrics_writer.read_metrics(tmp_path) in (whole, whole[:-1])


def test_damaged_metrics_are_read_up_to_the_damage(tmp_path):
    lines = [{"step": number, "loss": 1.0} for number in (1, 2, 3)]
    whole = "".join(json.dumps(line) + "\n" for line in lines).encode()
    for position in range(len(whole)):
        for bit in range(8):
            (tmp_path / "metrics.jsonl").write_bytes(flipped(whole, position, bit))
            entries = metrics_writer.read_metrics(tmp_path)
            assert all(type(entry["step"]) is int for entry in entries)
            intact = whole[:position].count(b"\n")
            assert entries[:intact] == lines[:intact]
    metrics_writer.MetricsWriter(tmp_path, 3).close()
