"""Anything in a config or a shard is read as it is meant or refused in one line that names it.

Never a traceback, never a run on other data than what was written. Every test counts its cases and
says at the end how many there were; `-m slow` runs the same properties many more times.
"""

import collections
import copy
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import ml_collections
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from configs import llamagen
from mirai_jax import config as config_lib
from mirai_jax import (
    data,
    fields,
    frozen,
    image_sets,
    images,
    manifest,
    records,
    step,
    train,
    weights,
    workdir,
)
from mirai_jax.crops import CropSpec
from mirai_jax.errors import ConfigError, DataError
from mirai_jax.models import dinov2, teacher

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem[0] != "_")
CASES = collections.Counter()  # of all tests of this file that ran


def fuzz(examples):
    """Hypothesis with the same examples every time."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


amounts = pytest.mark.parametrize(
    "amount", [1, pytest.param(12, marks=pytest.mark.slow)], ids=["some", "many"]
)


@pytest.fixture(scope="module", autouse=True)
def told_count(request):
    """Says how many cases really ran."""
    CASES.clear()
    yield
    each = ", ".join(f"{count:,} {what}" for what, count in CASES.items())
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nfuzzing: {sum(CASES.values()):,} cases ({each})")


def one_line(error, *parts):
    """The message, checked to be a line of bearable length that names what it should."""
    message = str(error)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 9_000, message[:300]
    assert all(part in message for part in parts), (parts, message)
    return message


# Configs ------------------------------------------------------------------------------------------


def get(name, scale=""):
    """A config as plain dictionaries and tuples; what no config can know is filled in."""
    config = importlib.import_module(f"configs.{name}").get_config(scale)
    if scale.startswith("imagenet"):
        config.teacher.path, config.data.images = "dinov2_vitb14_pretrain.pth", "imagenet/train"
    return fields.plain(config)


def children(tree):
    return dict(enumerate(tree)) if isinstance(tree, tuple) else tree


def paths_of(tree, path=()):
    """The paths of all groups, tuples and leaves."""
    inner = children(tree) if isinstance(tree, (dict, tuple)) else {}
    return [path] * bool(path) + [p for k in inner for p in paths_of(inner[k], (*path, k))]


def at(tree, path):
    return functools.reduce(lambda tree, key: children(tree)[key], path, tree)


def changed(tree, path, do):
    """A copy, in which `do` has changed a copy of the dictionary that holds the end of `path`."""
    inner = dict(children(tree))
    if len(path) == 1:
        do(inner, path[0])
    else:
        inner[path[0]] = changed(inner[path[0]], path[1:], do)
    return tuple(inner.values()) if isinstance(tree, tuple) else inner


def replaced(tree, path, value):
    return changed(tree, path, lambda inner, key: inner.update({key: value}))


def missing(tree, path):
    return changed(tree, path, lambda inner, key: inner.pop(key))


def name_of(path):
    """As it is overridden and told: ('foresight', 0, 'offsets') is foresight[0].offsets."""
    keys = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return keys.removeprefix(".")


class Unshown:
    """A value whose repr has two lines."""

    def __repr__(self):
        return "un\nshown"


NUMBERS = [0, 1, -1, 2, 3, 7, 100, 1024, 4096, 2**14, 2**16, 10**6, 2**20, 2**31 - 1]
NUMBERS += [2**31, -(2**31), 2**40, 2**62, 2**63, 10**30, 10**400, 10**5000]
NUMBERS += [0.0, -0.0, 0.5, 1.0, -1.5, 3.0, 1e-320, 1e-30, 1e6, 1e30, 1e39, 1e300]
NUMBERS += [float("nan"), float("inf"), -float("inf")]
TEXTS = ["", " ", "x", "1", "1e-4", "True", "(1, 2)", "a\nb", "\x00", "\ud800", "é", "x" * 100_000]
TEXTS += ["ema", "bidirectional", "checkpoint", "output", "1d", "mask", "mean", "predicted", "B"]
TEXTS += ["images", "mnist", "online", "patch", "vq16", "cosine", "bfloat16", "full", "skip"]
GROUPS = [[], [1], [[1, 2]], (), (1,), (1, 2), (1, 2, 3), ((1, 2),), ((0, 0), (0, 1)), (((1,),),)]
GROUPS += [((),), (None,), ("a", "b"), (True, False), (1.5, 2), (float("nan"),), (1, 1)]
GROUPS += [(2**17, 2**17), (2**40, 1), (10**5000, 1), {}, {"a": 1}, {1: 2}, {"a\nb": 1}]
GROUPS += [ml_collections.ConfigDict(), ml_collections.ConfigDict({"a": 1})]
OTHERS = [None, True, False, b"", b"x\xff", 1j, {1, 2}, len, object(), Unshown(), range(2)]
OTHERS += [np.int64(3), np.float32(1.5), np.float64(0.5), np.float64("nan"), np.bool_(True)]
OTHERS += [np.str_("ema"), np.array([1, 2]), np.zeros(()), bytearray(b"a")]
VALUES = NUMBERS + TEXTS + GROUPS + OTHERS

values = st.one_of(
    st.sampled_from(VALUES),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.sampled_from(["name", "source", "x"]), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)


FIELDS = {re.sub(r"\[\d+]", "", name_of(path)) for path in paths_of(get("mirai_e_i"))}


def check_config(config):
    """Reads it: Settings that its config.json gives again, or None where it was refused."""
    CASES["configs"] += 1
    try:
        made = config_lib.read(config, num_devices=1)
    except ConfigError as error:
        message = re.sub(r"\[\d+]", "", one_line(error))
        if not re.match("config field .* does not exist; the fields here are", message):
            assert re.match(r"(config field )?([\w.]+)", message)[2] in FIELDS, error
        return None
    assert config_lib.read(json.loads(workdir.to_json(config)), num_devices=1) == made
    return made


@pytest.mark.parametrize(
    "name, scale",
    [("mirai_e_i", "demo")]
    + [
        pytest.param(name, scale, marks=pytest.mark.slow)
        for name in FILES
        for scale in ("demo", "imagenet_b", "imagenet_3b_384")
    ],
)
def test_every_field_replaced_by_every_value(name, scale):
    config, before = get(name, scale), CASES["configs"]
    assert check_config(config)
    for path in paths_of(config):
        for value in VALUES:
            check_config(replaced(config, path, value))
        check_config(missing(config, path))
        for extra in ("extra", "a\nb", "x" * 1000):
            if isinstance(at(config, path), dict):
                assert check_config(replaced(config, (*path, extra), 1)) is None
    assert CASES["configs"] - before > 5_000


changes = st.tuples(st.sampled_from(["replace", "miss", "add"]), st.integers(0, 10**6), values)


def apply(config, made):
    """The config with some changes."""
    for kind, number, value in made:
        paths = paths_of(config)
        path = paths[number % len(paths)]
        if kind == "add" and isinstance(at(config, path[:-1]), dict):
            path = (*path[:-1], "extra")
        config = missing(config, path) if kind == "miss" else replaced(config, path, value)
    return config


@amounts
@pytest.mark.parametrize("name", FILES)
def test_several_fields_changed_at_once(name, amount):
    demo, imagenet = get(name), get(name, "imagenet_b")
    before = CASES["configs"]

    @fuzz(200 * amount)
    @given(st.sampled_from([demo, imagenet]), st.lists(changes, min_size=1, max_size=4))
    def run(config, made):
        check_config(apply(config, made))

    run()
    assert CASES["configs"] - before >= 200 * amount


def test_a_config_that_holds_itself_is_refused():
    for path in (("sample",), ("model", "grid"), ("foresight", 0, "more")):
        config = get("mirai_e")
        config["foresight"][0]["more"] = 1
        at(config, path[:-1])[path[-1]] = config
        with pytest.raises(ConfigError) as error:
            config_lib.read(config, 1)
        one_line(error.value, "the config holds itself")


# What is accepted can be computed


def check_step(made):
    """Builds the step of these settings without computing anything; all terms take part."""
    terms, module = made.terms, None
    if made.needs_images and made.teacher.name == "efficientnet_lite0":
        size, stage = made.teacher.image_size, made.teacher.stage
        module = teacher.EfficientNetTeacher(made.generator.grid, size, stage, made.teacher.dtype)
    elif made.needs_images:
        shape = dinov2.named(made.teacher.name)
        module = teacher.DinoTeacher(made.generator.grid, shape, made.teacher.image_size)
    recipe = step.Recipe(
        generator=made.generator,
        terms=tuple(dataclasses.replace(t, teacher_layer=t.teacher_layer or 1) for t in terms),
        optimizer=made.optimizer,
        ema_decay=made.ema_decay,
        steps_per_epoch=5004,  # of ImageNet
        teacher=module,
        static=tuple((name, made.generator) for name, _ in made.term_checkpoints),
        accumulate=made.accumulate,
        skip_nonfinite=made.nonfinite == "skip",
    )
    trace_step(recipe, made.batch_size, made.tokenizer.image_size)


@functools.cache
def trace_step(recipe, batch_size, side):
    CASES["steps"] += 1
    codes = jax.ShapeDtypeStruct((batch_size, recipe.generator.length), np.int32)
    batch = {"label": jax.ShapeDtypeStruct((batch_size,), np.int32), "codes": codes}
    state = jax.eval_shape(lambda: step.init_state(recipe, jax.random.key(0)))
    still = {name: state.ema for name, _ in recipe.static}
    if recipe.teacher is not None:
        batch["image"] = jax.ShapeDtypeStruct((batch_size, side, side, 3), np.uint8)
        params = jax.eval_shape(recipe.teacher.init, jax.random.key(0), batch["image"])["params"]
        still["bidirectional"] = params
    active = (True,) * len(recipe.terms)
    after, metrics = jax.eval_shape(
        lambda *arrays: step.train_step(recipe, *arrays, active), state, still, batch
    )
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
    assert metrics["loss"].shape == ()


def largest(config, path):
    """The config with the largest number at `path` that is accepted there."""
    for value in sorted((x for x in NUMBERS if x == x), key=abs, reverse=True):
        if check_config(made := replaced(config, path, value)):
            return made
    return config  # no other: what stands there must fit another field


def test_the_largest_numbers_together_make_a_step():
    config = replaced(get("mirai_e_i"), ("foresight", 0, "schedule"), ((80.0, 0.5),))
    for path in paths_of(config):
        if type(at(config, path)) in (int, float):
            config = largest(config, path)
    made = check_config(config)
    assert made.num_steps == made.optimizer.warmup_steps == 2**31 - 1
    assert made.generator.num_layers == 2**14 and made.batch_size == 2**20
    check_step(made)


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["demo", "imagenet_b"])
@pytest.mark.parametrize("name", ["mirai_e", "mirai_i"])
def test_each_largest_number_makes_a_step(name, scale):
    config = get(name, scale)
    for path in paths_of(config):
        if type(at(config, path)) in (int, float):
            check_step(check_config(largest(config, path)))


def test_a_sequence_longer_than_the_longest_is_refused():
    config = replaced(get("mirai_e"), ("tokenizer", "image_size"), 516)
    assert check_config(replaced(config, ("model", "grid"), (129, 129))) is None


@pytest.mark.slow
def test_the_longest_sequence_makes_a_step():
    config = replaced(get("mirai_e"), ("tokenizer", "image_size"), 512)
    check_step(check_config(replaced(config, ("model", "grid"), (128, 128))))


@amounts
def test_whatever_is_accepted_makes_a_step(amount):
    config, before = get("mirai_e"), CASES["steps"]
    unchanged = check_config(config)
    accepted = [
        (path, value)
        for path in paths_of(config)
        for value in VALUES
        if type(value) is type(at(config, path))
        and check_config(replaced(config, path, value)) not in (None, unchanged)
    ]

    @fuzz(20 * amount)
    @given(st.lists(st.sampled_from(accepted), min_size=1, max_size=3))
    def run(changes):
        made = config
        for path, value in changes:
            made = replaced(made, path, value) if path in paths_of(made) else made
        if made := check_config(made):
            check_step(made)

    run()
    assert CASES["steps"] - before > 5 * amount


# The command line ---------------------------------------------------------------------------------

# Flags are global: each case is a process of its own, forked from one that has imported all. It
# runs the whole program, but for the training itself.
SERVER = """
import json, os, sys, traceback
from absl import app
from mirai_jax import config, main

def train(given, workdir):
    config.read(given, 1)
    print("accepted")

main.train.train = train
for line in sys.stdin:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        status = 0
        os.dup2(write, 1), os.dup2(write, 2)
        sys.argv = ["main", *json.loads(line)]
        try:
            app.run(main.main, flags_parser=main.parse_flags)
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):
                print(status, file=sys.stderr)
                status = 1
        except BaseException:
            traceback.print_exc()
            status = 99
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    os.close(write)
    with open(read, "rb") as said:
        text = said.read().decode(errors="replace")
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text]), flush=True)
"""


@pytest.fixture(scope="module")
def command_line():
    """Runs `python -m mirai_jax.main ARGUMENTS`: what it refuses them with, or None."""
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    ) as process:

        def ask(arguments):
            CASES["command lines"] += 1
            process.stdin.write(json.dumps(arguments) + "\n")
            process.stdin.flush()
            status, text = json.loads(process.stdout.readline())
            lines = text.strip().splitlines()
            if status == 0:
                assert lines[-1] == "accepted", (arguments, text)
                return None
            errors = [line for line in lines if line.startswith("error: ")]
            assert status == 1 and errors == lines[-1:], (arguments, status, text)
            assert "Traceback" not in text, (arguments, text)
            return errors[0]

        yield ask
        process.stdin.close()


PLACES = [name_of(path) for path in paths_of(get("mirai_e"))]
WRITTEN = [str(value) for value in NUMBERS if not value or abs(value) < 1e100]
WRITTEN += [text for text in TEXTS if "\x00" not in text and "\ud800" not in text]
WRITTEN += ["nan", "-inf", "None", "false", "()", "(1,", "[1]", "{}", '{"a": 1}', "'x'", '"', "\\"]
WRITTEN += ["((0, 0), (0, 1))", "((1, 2),)", "(None,)", "1_000", "0x10", "1,2", "lambda: 0", "..."]
WRITTEN += ["\udcff", "--", "=", "9" * 5000, "(" * 300, "(" * 3000 + ")" * 3000, "~nobody/x", "%s"]
TWISTS = ["{}.x", "{}[0]", "{}s", "{}.", "[{}", "{}[-1]", "{}[x]", ".{}", "{}]", "{}[1:2]", "{}[9]"]
place = st.one_of(
    st.sampled_from(PLACES),
    st.builds(
        lambda twist, name: twist.format(name), st.sampled_from(TWISTS), st.sampled_from(PLACES)
    ),
)
written = st.one_of(
    st.sampled_from(WRITTEN),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=9),
)
override = st.one_of(
    st.builds(lambda name, text: [f"--config.{name}={text}"], place, written),
    st.builds(lambda name, text: [f"--config.{name}", text], place, written),
    st.builds(lambda name: [f"--noconfig.{name}"], place),
    written.map(lambda text: [f"--config.{text}"]),
)


@amounts
def test_overrides_of_any_text_are_accepted_or_refused_in_one_line(command_line, amount):
    before = CASES["command lines"]

    @fuzz(200 * amount)
    @given(
        st.sampled_from(["", ":demo", ":imagenet_b", ":", ":x"]),
        st.lists(override, min_size=1, max_size=3),
    )
    def run(scale, overrides):
        command_line([f"--config=configs/mirai_e.py{scale}", *(a for o in overrides for a in o)])

    run()
    assert CASES["command lines"] - before >= 200 * amount


def test_a_wrong_text_for_any_field_is_told_with_its_name(command_line):
    for name in PLACES:
        refused = command_line(["--config=configs/mirai_e.py", f"--config.{name}=~"])
        assert refused is None or re.sub(r"(\[\d+])+$", "", name) in refused, (name, refused)


@pytest.mark.parametrize(
    "body, told",
    [
        ("return config", None),
        ("del config.name; return config", "name is missing"),
        ("del config.scale; return config", "scale is missing"),
        ("del config.model.width; return config", "model.width is missing"),
        ("config.name = 'a\\x00b'; return config", "name is"),
        ("config.extra = len; return config", "'extra'"),
        ("config.sample = config; return config", "holds itself"),
        ("config.foresight = (config,); return config", "holds itself"),
        ("config.foresight = [1]; return config", "foresight[0] is 1"),
        ("config.model = 1; return config", "model"),
        ("return {}", "dict"),
        ("return None", "--config is missing"),
        ("return 1 / 0", "division"),
        ("return get_config(scale)", "recursion"),
        ("raise RuntimeError('two\\nlines')", "lines"),
        ("import no_such_module", "no_such_module"),
        ("return config)", "unmatched"),
    ],
)
def test_a_config_file_that_is_wrong_is_refused(command_line, tmp_path, body, told):
    head = "from configs import mirai_e\ndef get_config(scale=''):\n"
    file = tmp_path / "own.py"
    file.write_text(head + f"    config = mirai_e.get_config(scale)\n    {body}\n")
    refused = command_line([f"--config={file}"])
    assert refused is None if told is None else told in refused, refused


# What a workdir holds -----------------------------------------------------------------------------

WORKDIR_FILES = [b"", b"{", b"[]", b"3", b'"x"', b"null", b"NaN", b"{}", b"\xff", b"\x00" * 99]
WORKDIR_FILES += [b"[" * 100_000, b'{"a": ' * 50_000, b"1" * 5000, b'{"foresight": [{"a": 1}, 2]}']
WORKDIR_FILES += [
    b'{"seed": ' + b"[" * depth + b"]" * depth + b"}" for depth in (99, 240, 480, 900)
]
WORKDIR_FILES += [
    b'{"a\\nb": 1, "\\ud800": {"": {"": 1}}}',
    b'{"model": {"a.b": 1, "a": {"b": 1}}}',
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damaged_json(draw, whole):
    """The bytes of a JSON file: cut off, flipped, of other values, or something else."""
    raw = json.dumps(whole).encode()
    kind = draw(st.sampled_from(["other", "cut", "flip", "replace", "replace"]))
    if kind == "other":
        return draw(st.one_of(st.sampled_from(WORKDIR_FILES), st.binary(max_size=30)))
    if kind == "cut":
        return raw[: draw(st.integers(0, len(raw) - 1))]
    if kind == "flip":
        return flipped(raw, draw(st.integers(0, len(raw) - 1)), draw(st.integers(0, 7)))
    tree = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        node, holder, key = tree, None, None
        while isinstance(node, (dict, list)) and node and (holder is None or draw(st.booleans())):
            keys = sorted(node) if isinstance(node, dict) else range(len(node))
            holder, key = node, draw(st.sampled_from(list(keys)))
            node = holder[key]
        if holder is not None:
            if isinstance(holder, dict) and draw(st.integers(0, 4)) == 0:
                del holder[key]
            else:
                holder[key] = draw(json_values)
    return json.dumps(tree).encode()


def flipped(raw, position, bit):
    return raw[:position] + bytes([raw[position] ^ 1 << bit]) + raw[position + 1 :]


@amounts
def test_a_damaged_workdir_is_read_or_refused(tmp_path, amount):
    config = get("mirai_e")
    file = tmp_path / "config.json"

    @fuzz(300 * amount)
    @given(damaged_json(json.loads(workdir.to_json(config))))
    def run(raw):
        CASES["config.json"] += 1
        file.write_bytes(raw)
        try:
            assert set(workdir.check_workdir(tmp_path, config)) <= set(workdir.RESUMABLE)
        except ConfigError as error:
            one_line(error, str(tmp_path))
        try:
            made = frozen.read_settings("init_from", str(tmp_path))
            assert isinstance(made, config_lib.Settings)
        except ConfigError as error:
            one_line(error, "init_from", str(tmp_path))

    run()
    assert CASES["config.json"] >= 300 * amount


def test_damaged_metrics_are_read_up_to_the_damage(tmp_path):
    lines = [{"step": number, "loss": 1.0} for number in (1, 2, 3)]
    whole = "".join(json.dumps(line) + "\n" for line in lines).encode()
    for position in range(len(whole)):
        for bit in range(8):
            CASES["metrics.jsonl"] += 1
            (tmp_path / "metrics.jsonl").write_bytes(flipped(whole, position, bit))
            entries = workdir.read_metrics(tmp_path)
            assert all(type(entry["step"]) is int for entry in entries)
            intact = whole[:position].count(b"\n")
            assert entries[:intact] == lines[:intact]
    workdir.MetricsWriter(tmp_path, 3).close()


# Shards of codes ----------------------------------------------------------------------------------

GRID, VOCAB, CLASSES = (2, 3), 16, 5
BLOCK = 2**16  # bytes between the places at which an ArrayRecord file may be entered


def open_records(folder):
    return records.CodeRecords(str(folder), grid=GRID, vocab_size=VOCAB, num_classes=CLASSES)


def some_records(count, seed=0, crops=2):
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, VOCAB, (crops, 6)).astype(np.uint16), k % CLASSES, f"image {seed} {k}")
        for k in range(count)
    ]


def write(folder, written, number=0):
    """Writes a shard; returns its file."""
    file = folder / f"codes-{number}.array_record"
    records.write_shard(file, [records.pack_record(*record) for record in written])
    return file


def as_read(record):
    """A record in a form that can be compared."""
    return record["codes"].tolist(), int(record["label"]), record["key"]


def as_written(record):
    codes, label, key = record
    return codes.tolist(), label, key


def read_all(folder, *named):
    """All records, or None where one was refused with a line that names one of `named`."""
    try:
        source = open_records(folder)
        return [as_read(source[k]) for k in range(len(source))]
    except DataError as error:
        message = one_line(error)
        assert any(name in message for name in named), message
        return None


def check_shard(file, raw, *allowed):
    """A shard of these bytes is refused, or gives exactly the records of one of `allowed`."""
    CASES["shards"] += 1
    file.write_bytes(raw)
    got = read_all(file.parent, file.name)
    assert got is None or got in [[as_written(record) for record in some] for some in allowed]
    return got is not None


@pytest.mark.parametrize(
    "stride", [257, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_every_byte_of_a_shard_flipped_in_turn(tmp_path, stride):
    written = some_records(5)
    file = write(tmp_path, written)
    raw = file.read_bytes()
    assert len(raw) == 2 * BLOCK  # mostly empty: the records, and from the second half on the index
    used = sorted({k for k, byte in enumerate(raw) if byte} | set(range(0, len(raw), stride)))
    survived = {k for k in used if check_shard(file, flipped(raw, k, k % 8), written)}
    assert len(used) > 1_000
    # No flip of a record was survived: ArrayRecord's own checksums are what is relied on. The first
    # 64 bytes are its signature, which is not read; after the records come their index and filling.
    end = raw.index(b"image 0 4") + len(b"image 0 4")
    assert not any(64 <= k < end for k in survived)


@pytest.mark.parametrize(
    "stride", [997, pytest.param(31, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_a_shard_cut_anywhere_is_refused(tmp_path, stride):
    written = some_records(5)
    file = write(tmp_path, written)
    raw = file.read_bytes()
    near = [place + k for place in (40, 64, 900, BLOCK, 2 * BLOCK) for k in range(-20, 20)]
    for end in sorted({*range(0, len(raw), stride), *near}):
        assert check_shard(file, raw[:end], written) == (end >= len(raw)), end


@st.composite
def spliced(draw, shards):
    """Bytes of one shard with parts cut out, put in, overwritten, or taken from another."""
    raw = bytearray(draw(st.sampled_from(shards)))
    for _ in range(draw(st.integers(1, 4))):
        low = draw(st.sampled_from([0, 0, BLOCK, max(0, len(raw) - 300)]))
        place = low + draw(st.integers(0, 1200))
        size = draw(st.sampled_from([1, 8, 40, 100, BLOCK]))
        other = draw(st.sampled_from(shards))
        block = BLOCK * draw(st.integers(0, 2))
        kind = draw(st.integers(0, 6))
        if kind == 0:
            del raw[place : place + size]
        elif kind == 1:
            raw[place:place] = draw(st.binary(min_size=1, max_size=9)) * size
        elif kind == 2:
            raw[place : place + size] = bytes([draw(st.integers(0, 255))]) * size
        elif kind == 3:
            raw[block : block + BLOCK] = other[block : block + BLOCK]
        elif kind == 4:
            raw += other
        elif kind == 5:
            raw = raw[block:] + raw[:block]
        else:
            raw[place : place + 8] = draw(st.binary(min_size=8, max_size=8))
    return bytes(raw)


@amounts
def test_parts_of_shards_put_together_are_refused_or_a_whole_shard(tmp_path, amount):
    written = [some_records(5), some_records(5, 1), some_records(900, 2), some_records(3, 3)]
    shards = [write(tmp_path, some).read_bytes() for some in written]
    file = tmp_path / "codes-0.array_record"

    @fuzz(250 * amount)
    @given(spliced(shards))
    def run(raw):
        check_shard(file, raw, *written)

    run()


def test_other_files_with_the_suffix_are_refused(tmp_path):
    file = tmp_path / "codes-0.array_record"
    rng = np.random.default_rng(0)
    for raw in (
        b"",
        b"no shard\n" * 30_000,
        bytes(2 * BLOCK),
        b"\xff" * 2 * BLOCK,
        *(rng.bytes(size) for size in (1, BLOCK - 1, BLOCK, BLOCK + 100, 3 * BLOCK)),
    ):
        assert not check_shard(file, raw)
    file.unlink()
    file.mkdir()
    assert read_all(tmp_path, file.name) is None
    file.rmdir()
    file.symlink_to(tmp_path / "nowhere")
    assert read_all(tmp_path, file.name) is None


def test_a_shard_that_changes_while_it_is_read_is_refused(tmp_path):
    written, other = some_records(5), some_records(5, 1, crops=3)
    whole = write(tmp_path, written).read_bytes()
    another = write(tmp_path, other).read_bytes()
    file = tmp_path / "codes-0.array_record"
    for raw in (b"", whole[:300], another):
        file.write_bytes(whole)
        source = open_records(tmp_path)
        file.write_bytes(raw)
        for k in range(5):
            CASES["shards"] += 1
            try:
                assert as_read(source[k]) == as_written(written[k])
            except DataError as error:
                one_line(error, f"record {k} of {file.name}")


# Records whose bytes are whole, and whose content is not


def meaning(raw):
    """What a record says, by a reading of its own; None where it says nothing that may be used."""
    try:
        tree = msgpack.unpackb(raw)
        shape, codes, label, key = (tree[name] for name in ("shape", "codes", "label", "key"))
        crops, length = shape
        sides = np.frombuffer(codes, "<u2").reshape(crops, length)
    except Exception:
        return None
    numbers = type(label) is type(crops) is type(length) is int
    good = numbers and len(tree) == 4 and crops > 0 and length == 6 and type(shape) is list
    good = good and type(codes) is bytes and type(key) is str
    if not good or sides.max() >= VOCAB or not 0 <= label < CLASSES:
        return None
    return sides.tolist(), label, key


good_record = st.builds(
    lambda seed, label, key: records.pack_record(some_records(1, seed)[0][0], label, key),
    st.integers(0, 9),
    st.integers(0, CLASSES - 1),
    st.text(max_size=5),
)


@st.composite
def any_record(draw):
    """Packed bytes: mostly wrong in one way or another."""
    raw = draw(good_record)
    tree = msgpack.unpackb(raw)
    kind = draw(st.integers(0, 8))
    if kind == 0:
        return draw(st.binary(max_size=60))
    if kind == 1:
        return raw[: draw(st.integers(0, len(raw)))]
    if kind == 2:
        return flipped(raw, draw(st.integers(0, len(raw) - 1)), draw(st.integers(0, 7)))
    if kind == 3:
        tree["label"] = draw(st.sampled_from([-1, CLASSES, 2**31, 2**64 - 1, -(2**63), True, 1.0]))
    elif kind == 4:
        highest = draw(st.sampled_from([VOCAB - 1, VOCAB, 2**15, 2**16 - 1]))
        tree["codes"] = tree["codes"][:-2] + int(highest).to_bytes(2, "little")
    elif kind == 5:
        crops, length = draw(st.integers(0, 3)), draw(st.sampled_from([6, 6, 6, 0, 5, 7]))
        tree |= {"shape": [crops, length], "codes": bytes(2 * crops * length)}
    elif kind == 6:
        other = st.none() | st.booleans() | st.floats() | st.integers(-(2**63), 2**64 - 1)
        other |= (
            st.text(max_size=5) | st.binary(max_size=30) | st.lists(st.integers(0, 9), max_size=3)
        )
        tree[draw(st.sampled_from(sorted(tree)))] = draw(other)
    elif kind == 7:
        del tree[draw(st.sampled_from(sorted(tree)))]
    else:
        tree[draw(st.sampled_from(["more", "", "Label"]))] = 0
    return msgpack.packb(tree)


@pytest.mark.parametrize(
    "change",
    [
        *({"label": label} for label in (-1, CLASSES, 2**31, 2**64 - 1, True, 1.0, None, "1", [1])),
        *(
            {"shape": shape}
            for shape in ([2, 5], [3, 6], [12], [2, 6, 1], [2.0, 6], None, "26", [6, 2])
        ),
        *({"shape": [crops, 6], "codes": bytes(12 * crops)} for crops in (0, 1, 3)),
        *({"shape": [2, length], "codes": bytes(4 * length)} for length in (1, 5, 7, 12)),
        *({"codes": codes} for codes in (b"", bytes(23), "0" * 24, [0] * 12, None)),
        *({"codes": bytes(22) + code.to_bytes(2, "little")} for code in (VOCAB, 2**8, 2**16 - 1)),
        *({"key": key} for key in (None, 1, b"key", ["key"])),
        {"more": 0},
    ],
    ids=lambda change: "-".join(f"{key} {value!r:.20}" for key, value in change.items()),
)
def test_each_way_a_record_can_be_wrong_is_refused(tmp_path, change):
    good = records.pack_record(*some_records(1)[0])
    wrong = msgpack.packb({**msgpack.unpackb(good), **change})
    CASES["records"] += 1
    records.write_shard(tmp_path / "codes-0.array_record", [good, wrong])
    assert meaning(wrong) is None or change.get("shape", [2])[0] != 2
    with pytest.raises(DataError) as error:
        open_records(tmp_path)[1]
    one_line(error.value, "record 1 of codes-0.array_record")


@amounts
def test_records_of_any_content_are_read_as_they_are_or_refused(tmp_path, amount):
    file = tmp_path / "codes-0.array_record"

    @fuzz(200 * amount)
    @given(st.lists(st.one_of(good_record, any_record()), min_size=1, max_size=6))
    def run(packed):
        CASES["records"] += len(packed)
        records.write_shard(file, packed)
        told = [meaning(raw) for raw in packed]
        try:
            source = open_records(tmp_path)
        except DataError as error:
            one_line(error, f"record 0 of {file.name}")
            assert told[0] is None
            return
        assert told[0] is not None
        # All must have as many crops as the first, for their draw.
        told = [t if t and len(t[0]) == len(told[0][0]) else None for t in told]
        for k, wanted in enumerate(told):
            try:
                assert as_read(source[k]) == wanted
            except DataError as error:
                assert wanted is None, (wanted, error)
                one_line(error, f"record {k} of {file.name}")
        check_stream(source, told, file.name)

    run()


def check_stream(source, told, name):
    """An epoch of batches holds what was written; a batch with a bad record is an error."""
    rows = [record[:2] for record in told if record]
    drawn = 0
    batches = iter(data.make_dataset(source, batch_size=1, seed=0, num_threads=0))
    try:
        for _ in range(len(source)):
            batch = next(batches)
            codes, label = batch["codes"][0].tolist(), int(batch["label"][0])
            assert any(label == own and codes in crops for crops, own in rows)
            drawn += 1
        assert None not in told
    except DataError as error:
        assert None in told
        one_line(error, name)
    assert drawn <= len(rows)


# A folder with a manifest


def write_folder(folder):
    """Two shards and their manifest; returns all their records and the manifest."""
    written = [some_records(5), some_records(3, 1)]
    shards = []
    for number, some in enumerate(written):
        file = write(folder, some, number)
        checksum = hashlib.sha256(file.read_bytes()).hexdigest()
        shards.append(manifest.Shard(file.name, len(some), checksum))
    made = manifest.Manifest(
        images={"kind": "folder", "name": "images", "count": 8},
        crops=CropSpec(image_size=24),
        tokenizer={"checksum": "ab" * 32, "file": "vq.pt"},
        grid=GRID,
        vocab_size=VOCAB,
        class_names=tuple("abcde"),
        images_per_shard=5,
        batch_size=4,
        precision="float32",
        complete=True,
        num_records=8,
        shards=tuple(shards),
    )
    manifest.write(folder, made)
    return [as_written(record) for some in written for record in some], made


@amounts
def test_a_damaged_manifest_is_refused_or_changes_nothing(tmp_path, amount):
    whole, made = write_folder(tmp_path)
    assert read_all(tmp_path) == whole

    @fuzz(200 * amount)
    @given(damaged_json(made.to_dict()))
    def run(raw):
        CASES["manifests"] += 1
        (tmp_path / "manifest.json").write_bytes(raw)
        assert read_all(tmp_path, "manifest", "data.path") in (None, whole)

    run()


def test_shards_that_are_not_those_of_the_manifest_are_refused(tmp_path):
    whole, _ = write_folder(tmp_path)
    first, second = (tmp_path / f"codes-{k}.array_record" for k in range(2))
    raw = [file.read_bytes() for file in (first, second)]

    def with_shards(*contents):
        CASES["manifests"] += 1
        for number, content in enumerate(contents):
            (tmp_path / f"codes-{number}.array_record").write_bytes(content)
        return read_all(tmp_path, "codes-0", "codes-1", "codes-2")

    assert with_shards(*raw) == whole
    assert with_shards(raw[1], raw[0]) is None  # swapped: each holds another number of records
    assert with_shards(raw[0], raw[0]) is None
    assert with_shards(raw[0], b"") is None
    assert with_shards(*raw, raw[0]) is None
    (tmp_path / "codes-2.array_record").unlink()
    second.unlink()
    assert with_shards(raw[0]) is None


# Paths --------------------------------------------------------------------------------------------

PATHS = ["", " ", "-", "~", "~nobody/x", "a*", "[", "a[!", "**", "file", "file/x", "folder", "é"]
PATHS += ["x" * 300, "x/" * 1500, "\udcff", "grain:", "grain:x", "grain:no_such.module:x"]


@amounts
def test_paths_of_any_text_are_refused_in_one_line(tmp_path, monkeypatch, amount):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    readers = {
        "data.path": open_records,
        "fashion_mnist": lambda path: image_sets.load_images("fashion_mnist", path or "no"),
        "images": lambda path: len(images.open_images(path)),
        "tokenizer.path": lambda path: frozen.load_vq_file("tokenizer.path", path),
        "teacher.path": lambda path: weights.load("teacher.path", path, "teacher"),
        "init_from": lambda path: frozen.read_settings("init_from", path),
    }
    text = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=9)

    @fuzz(100 * amount)
    @given(st.one_of(st.sampled_from(PATHS), text), st.sampled_from(sorted(readers)))
    def run(path, field):
        assume("/" not in path[:1] and ".." not in path and not path.startswith("tfds"))
        CASES["paths"] += 1
        with pytest.raises((ConfigError, DataError)) as error:
            readers[field](path)
        assert field in one_line(error.value) or path in one_line(error.value)

    run()


# Training -----------------------------------------------------------------------------------------


def tiny(folder):
    """ImageNet's recipe for codes of 16 tokens, small enough for a test."""
    config = llamagen.get_config("imagenet_b")
    config.update(num_steps=9, batch_size=8, log_every=1)
    config.model.update(
        size="", num_layers=1, num_heads=2, width=32, vocab_size=VOCAB, num_classes=CLASSES,
        grid=(4, 4),
    )  # fmt: skip
    config.tokenizer.image_size = 64
    config.sample.classes = CLASSES
    config.data.update(path=str(folder), num_workers=0)
    return config


def write_codes(folder, bad=None, **change):
    """64 records in two shards; record `bad` of all has other codes or another label."""
    rng = np.random.default_rng(0)
    made = [
        [rng.integers(0, VOCAB, (2, 16)).astype(np.uint16), k % CLASSES, f"{k}"] for k in range(64)
    ]
    if bad is not None:
        made[bad][0] = np.full_like(made[bad][0], change.get("code", 0))
        made[bad][1] = change.get("label", 0)
    folder.mkdir()
    for number, some in enumerate((made[:40], made[40:])):
        write(folder, some, number)


def batches_of(folder):
    """The numbers of the records in each batch of the first epoch."""
    source = records.CodeRecords(str(folder), grid=(4, 4), vocab_size=VOCAB, num_classes=CLASSES)
    config = tiny(folder)
    batches = data.make_dataset(source, batch_size=config.batch_size, seed=config.seed)
    return [[int(key.split()[0]) for key in batches.record_keys(k)] for k in range(8)]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "change, told",
    [
        ({"code": VOCAB}, "has code 16: model.vocab_size allows 0 to 15"),
        ({"label": CLASSES}, "has label 5: model.num_classes allows 0 to 4"),
    ],
    ids=["code", "label"],
)
def test_a_bad_record_stops_the_run_before_it_is_trained_on(tmp_path, change, told):
    CASES["runs"] += 1
    good, bad = tmp_path / "good", tmp_path / "bad"
    write_codes(good)
    batch = 7  # the last of the epoch
    number = max(batches_of(good)[batch])  # not 0: opening the shards reads that one
    write_codes(bad, number, **change)
    with pytest.raises(DataError) as error:
        train.train(tiny(bad), tmp_path / "run", devices=jax.devices()[:1], say=lambda line: None)
    shard, place = divmod(number, 40)
    one_line(error.value, f"record {place} of codes-{shard}.array_record", told)
    steps = [entry["step"] for entry in workdir.read_metrics(tmp_path / "run")]
    assert steps and max(steps) <= batch
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_a_bad_record_in_a_worker_process_ends_the_program_with_one_line(tmp_path):
    CASES["runs"] += 1
    write_codes(tmp_path / "good")
    number = max(batches_of(tmp_path / "good")[0])
    write_codes(tmp_path / "bad", number, code=VOCAB)
    file = tmp_path / "own.py"
    file.write_text(
        "import json, ml_collections\n"
        "def get_config(scale=''):\n"
        f"    return ml_collections.ConfigDict(json.load(open({str(tmp_path / 'own.json')!r})))\n"
    )
    (tmp_path / "own.json").write_text(workdir.to_json(tiny(tmp_path / "bad")))
    result = subprocess.run(
        [
            *(sys.executable, "-m", "mirai_jax.main", f"--config={file}"),
            *(f"--workdir={tmp_path / 'run'}", "--config.data.num_workers=1"),
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1, result.stderr
    lines = result.stderr.strip().splitlines()
    shard, place = divmod(number, 40)
    assert lines[-1].startswith("error: ") and "Traceback" not in result.stderr, result.stderr
    assert f"record {place} of codes-{shard}.array_record: has code 16" in lines[-1]
    assert workdir.read_metrics(tmp_path / "run") == []
