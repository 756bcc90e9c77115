"""The manifest of a folder of shards, and the progress line of a long work."""

import copy
import dataclasses
import io
import json

import helpers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirai_jax.data import manifest
from mirai_jax.data.crops import CropSpec
from mirai_jax.data.manifest import Manifest, Shard
from mirai_jax.utils import files, progress
from mirai_jax.utils.errors import DataError

WHOLE = Manifest(
    images={"kind": "folder", "path": "images", "count": 17},
    crops=CropSpec(image_size=24, crop_range=1.25, exif="apply"),
    tokenizer={"checksum": "ab" * 32, "file": "vq.pt", "multipliers": [1, 2]},
    grid=(6, 5),
    vocab_size=64,
    class_names=("cats", "dogs\n", "Eulen ü"),
    images_per_shard=9,
    batch_size=4,
    precision="float32",
    complete=True,
    num_records=16,
    num_failed=1,
    shards=(Shard("codes-0.array_record", 9, "01" * 32), Shard("codes-1.array_record", 7, "")),
)
RESULT = ("complete", "num_records", "num_failed", "shards")
BEGUN = dataclasses.replace(WHOLE, complete=False, num_records=0, num_failed=0, shards=())


# The file -----------------------------------------------------------------------------------------

text = st.text(max_size=9)
numbers = st.integers(0, 2**40)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
manifests = st.builds(
    Manifest,
    images=st.dictionaries(text, json_values, max_size=3),
    crops=st.builds(
        CropSpec,
        image_size=st.integers(1, 4096),
        crop_range=st.floats(1, 10) | st.integers(1, 10),
        ten=st.booleans(),
        exif=st.sampled_from(["ignore", "apply"]),
    ),
    tokenizer=st.dictionaries(text, json_values, max_size=3),
    grid=st.tuples(numbers, numbers),
    vocab_size=numbers,
    class_names=st.lists(text, max_size=3).map(tuple),
    images_per_shard=numbers,
    batch_size=numbers,
    precision=text,
    complete=st.booleans(),
    num_records=numbers,
    num_failed=numbers,
    shards=st.lists(st.builds(Shard, text, numbers, text), max_size=3).map(tuple),
)


@settings(deadline=None, max_examples=50)
@given(made=manifests)
def test_any_manifest_survives_the_file(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("folder")
    manifest.write(folder, made)
    assert manifest.read(folder) == made
    assert made.differences(manifest.read(folder)) == []


def test_a_folder_without_one(tmp_path, monkeypatch):
    assert manifest.read(tmp_path) is None
    assert manifest.read(tmp_path / "nowhere") is None
    (tmp_path / "file").write_text("")
    assert manifest.read(tmp_path / "file") is None
    monkeypatch.setenv("HOME", str(tmp_path))
    manifest.write(tmp_path, WHOLE)
    assert manifest.read("~") == WHOLE


def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    manifest.write(tmp_path, BEGUN)
    before = (tmp_path / "manifest.json").read_bytes()

    def disk_full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", disk_full)
        with pytest.raises(OSError, match="No space"):
            manifest.write(tmp_path, WHOLE)
    assert list(tmp_path.iterdir()) == [tmp_path / "manifest.json"]
    assert (tmp_path / "manifest.json").read_bytes() == before
    manifest.write(tmp_path, WHOLE)
    assert manifest.read(tmp_path) == WHOLE


def refusal(folder):
    message = helpers.refusal(manifest.read, folder, error=DataError)
    assert message.startswith(f"{folder / 'manifest.json'}")
    assert len(message) < 600 + len(str(folder))
    return message


FIELDS = [field.name for field in dataclasses.fields(Manifest)]


def test_another_file_or_folder_of_that_name_is_refused(tmp_path):
    for raw in ("", "{", "[]", "{}", "3", "[" * 100_000, "\xff", "1" * 5000):
        (tmp_path / "manifest.json").write_bytes(raw.encode("latin-1"))
        refusal(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").mkdir()
    refusal(tmp_path)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_is_missing_or_of_another_kind_is_refused(tmp_path, name):
    whole = WHOLE.to_dict()
    kind = type(whole[name])
    others = [w for w in (None, "ab", ["a", 3], {"a": 1}, 1.5, True, 7) if type(w) is not kind]
    for tree in [whole | {"more": 1}, *(whole | {name: wrong} for wrong in others)]:
        (tmp_path / "manifest.json").write_text(json.dumps(tree))
        refusal(tmp_path)
    del whole[name]
    (tmp_path / "manifest.json").write_text(json.dumps(whole))
    assert name in refusal(tmp_path)


def test_parts_that_are_wrong_are_refused(tmp_path):
    for change in (
        {"grid": [6, "5"]},
        {"class_names": ["a", 3]},
        {"shards": [{"name": "a", "records": "1", "sha256": ""}]},
        {"crops": {"image_size": 0, "crop_range": 1.1, "ten": True, "exif": "ignore"}},
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(WHOLE.to_dict() | change))
        refusal(tmp_path)


@settings(deadline=None)
@given(st.data())
def test_damage_is_read_as_it_was_written_or_refused(data):
    """One value of the file replaced by anything: refused, or read as it stands."""
    tree = copy.deepcopy(WHOLE.to_dict())
    node, path = tree, []
    while isinstance(node, dict | list) and node and (not path or data.draw(st.booleans())):
        keys = sorted(node) if isinstance(node, dict) else range(len(node))
        path.append((node, data.draw(st.sampled_from(list(keys)))))
        node = node[path[-1][1]]
    holder, key = path[-1]
    holder[key] = data.draw(json_values)
    try:
        made = manifest.from_dict(json.loads(json.dumps(tree)))
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert json.dumps(made.to_dict()) == json.dumps(tree)


# What is asked of it ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_what_fixes_the_bytes_is_compared_and_what_came_of_it_is_not(name):
    others = {
        "images": {"kind": "folder", "path": "images", "count": 18},
        "crops": dataclasses.replace(WHOLE.crops, ten=False),
        "tokenizer": WHOLE.tokenizer | {"checksum": "cd" * 32},
        "grid": (5, 6),
        "class_names": WHOLE.class_names[::-1],
        "precision": "bfloat16",
        "complete": False,
        "shards": (),
    }
    old = getattr(WHOLE, name)
    change = others.get(name, old + 1 if type(old) is int else 0)
    found = WHOLE.differences(dataclasses.replace(WHOLE, **{name: change}))
    if name in RESULT:
        assert found == []
    else:
        entry = {"images": ".count", "crops": ".ten", "tokenizer": ".checksum"}.get(name, "")
        (line,) = found
        assert line.startswith(f"{name}{entry} was ")
    assert WHOLE.differences(WHOLE) == BEGUN.differences(WHOLE) == []


def test_names_of_what_keys_and_checksums_identify_may_differ():
    moved = WHOLE.images | {"name": "elsewhere"}
    other = dataclasses.replace(WHOLE, images=moved, tokenizer=WHOLE.tokenizer | {"file": "b.pt"})
    assert WHOLE.differences(other) == []
    numbered = dataclasses.replace(WHOLE, images={"kind": "tfds", "name": "a"})
    other = dataclasses.replace(WHOLE, images={"kind": "tfds", "name": "b"})
    assert numbered.differences(other) == ["images.name was 'a', is 'b'"]
    # Tuples and lists are the same: JSON gives lists.
    other = dataclasses.replace(WHOLE, tokenizer=WHOLE.tokenizer | {"multipliers": (1, 2)})
    assert WHOLE.differences(other) == []


def test_an_extraction_that_has_not_ended_and_other_files_than_its_shards_are_refused():
    WHOLE.check_complete("codes")
    assert "data.path 'codes'" in helpers.refusal(BEGUN.check_complete, "codes", error=DataError)
    one, two = whole = {shard.name: shard.records for shard in WHOLE.shards}
    WHOLE.check_files("codes", whole)
    for found, names in (
        ({}, [one]),
        (whole | {"a": 1}, ["a"]),
        ({two: 7, "b": 1}, [one, "b"]),
        (whole | {two: 6}, [two]),
    ):
        message = helpers.refusal(WHOLE.check_files, "codes", found, error=DataError)
        assert all(name in message for name in names)


# Progress -----------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns: clock[0] seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_line_has_number_speed_and_time_left(clock, capsys):
    shown = progress.Progress(12_500, "images", done=100, stream=None)
    assert shown.line() == "100/12,500 images  0.0 images/s"
    clock[0] += 10
    shown.advance(1400)  # what was done before is not part of the speed
    assert shown.line() == "1,500/12,500 images  140.0 images/s  1m19s left"
    clock[0] += 90
    shown.advance(11_000)
    assert shown.line() == "12,500/12,500 images  124.0 images/s"
    shown.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "terminal, seconds, separator, lines",
    [
        (False, 1, "\n", ["30/65", "60/65", "65/65", ""]),  # now and then
        (True, 1 / 64, "\r\033[K", ["", "32/65", "64/65", "65/65"]),  # one line that renews itself
    ],
)
def test_a_file_and_a_terminal_get_lines(clock, monkeypatch, terminal, seconds, separator, lines):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    shown = progress.Progress(65, "images", stream=stream)
    for _ in range(65):
        clock[0] += seconds
        shown.advance(1)
    shown.close()
    assert [line.partition(" ")[0] for line in stream.getvalue().split(separator)] == lines
    assert stream.getvalue().endswith("\n")
