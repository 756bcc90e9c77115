"""Any config, command line or workdir is read as it is meant or refused in one line that names it.

Never a traceback. Every test counts its cases and the file says at the end how many there were;
`-m slow` runs the same properties many more times.
"""

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest
from fuzzing import (
    CASES,
    amounts,
    damaged_json,
    flipped,
    fuzz,
    one_line,
    told_count,  # noqa: F401 (a fixture)
)
from hypothesis import given
from hypothesis import strategies as st

from mirai_jax import step
from mirai_jax.benchmark import memory_plan
from mirai_jax.config import compare, fields, schema
from mirai_jax.models import teacher, vit
from mirai_jax.training import metrics_writer, restore, workdir
from mirai_jax.utils.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem[0] != "_")
FILES.remove("teacher")  # not of a run


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
        made = schema.read(config, num_devices=1)
    except ConfigError as error:
        message = re.sub(r"\[\d+]", "", one_line(error))
        if not re.match("config field .* does not exist; the fields here are", message):
            assert re.match(r"(config field )?([\w.]+)", message)[2] in FIELDS, error
        return None
    assert schema.read(json.loads(compare.to_json(config)), num_devices=1) == made
    return made


@pytest.mark.parametrize(
    "name, scale, stride",
    [("mirai_e_i", "demo", 6)]
    + [
        pytest.param(name, scale, 1, marks=pytest.mark.slow)
        for name in FILES
        for scale in ("demo", "imagenet_b", "imagenet_3b_384")
    ],
)
def test_every_field_replaced_by_every_value(name, scale, stride):
    """With a stride of n by every n-th value, another first one for each field."""
    config, before = get(name, scale), CASES["configs"]
    assert check_config(config)
    for i, path in enumerate(paths_of(config)):
        for value in VALUES[i % stride :: stride]:
            check_config(replaced(config, path, value))
        check_config(missing(config, path))
        for extra in ("extra", "a\nb", "x" * 1000):
            if isinstance(at(config, path), dict):
                assert check_config(replaced(config, (*path, extra), 1)) is None
    assert CASES["configs"] - before > 5_000 / stride


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

    @fuzz(100 * amount)
    @given(st.sampled_from([demo, imagenet]), st.lists(changes, min_size=1, max_size=4))
    def run(config, made):
        check_config(apply(config, made))

    run()
    assert CASES["configs"] - before >= 100 * amount


def test_a_config_that_holds_itself_is_refused():
    for path in (("sample",), ("model", "grid"), ("foresight", 0, "more")):
        config = get("mirai_e")
        config["foresight"][0]["more"] = 1
        at(config, path[:-1])[path[-1]] = config
        for given_config in (config, memory_plan.without_files(config)):  # to train, to plan
            with pytest.raises(ConfigError) as error:
                schema.read(given_config, 1)
            one_line(error.value, "the config holds itself")


# What is accepted can be computed


def check_step(made):
    """Builds the step of these settings without computing anything; all terms take part."""
    terms, module = made.terms, None
    if made.needs_images and made.teacher.name == "efficientnet_lite0":
        size, stage = made.teacher.image_size, made.teacher.stage
        module = teacher.EfficientNetTeacher(made.generator.grid, size, stage, made.teacher.dtype)
    elif made.needs_images:
        shape = vit.named(made.teacher.name)
        module = teacher.DinoTeacher(made.generator.grid, shape, made.teacher.image_size)
    recipe = step.Recipe(
        generator=made.generator,
        terms=tuple(dataclasses.replace(t, teacher_layer=t.teacher_layer or 1) for t in terms),
        optimizer=made.optimizer,
        ema_decay=made.ema_decay,
        steps_per_epoch=5004,  # of ImageNet
        teacher=module,
        pretrained_configs=tuple((name, made.generator) for name, _ in made.term_checkpoints),
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
    still = {name: state.ema for name, _ in recipe.pretrained_configs}
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


@pytest.mark.parametrize("name", ["mirai_e", pytest.param("mirai_e_i", marks=pytest.mark.slow)])
def test_the_largest_numbers_together_make_a_step(name):
    config = replaced(get(name), ("foresight", 0, "schedule"), ((80.0, 0.5),))
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

    @fuzz(4 * amount)
    @given(st.lists(st.sampled_from(accepted), min_size=1, max_size=3))
    def run(changes):
        made = config
        for path, value in changes:
            made = replaced(made, path, value) if path in paths_of(made) else made
        if made := check_config(made):
            check_step(made)

    run()
    assert CASES["steps"] - before > amount


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

    @fuzz(60 * amount)
    @given(
        st.sampled_from(["", ":demo", ":imagenet_b", ":", ":x"]),
        st.lists(override, min_size=1, max_size=3),
    )
    def run(scale, overrides):
        command_line([f"--config=configs/mirai_e.py{scale}", *(a for o in overrides for a in o)])

    run()
    assert CASES["command lines"] - before >= 60 * amount


@pytest.mark.parametrize(
    "stride", [3, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_a_wrong_text_for_any_field_is_told_with_its_name(command_line, stride):
    for name in PLACES[::stride]:
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


@amounts
def test_a_damaged_workdir_is_read_or_refused(tmp_path, amount):
    config = get("mirai_e")
    file = tmp_path / "config.json"

    @fuzz(150 * amount)
    @given(damaged_json(json.loads(compare.to_json(config))))
    def run(raw):
        CASES["config.json"] += 1
        file.write_bytes(raw)
        try:
            assert all(map(compare.may_change, workdir.check_workdir(tmp_path, config)))
        except ConfigError as error:
            one_line(error, str(tmp_path))
        try:
            made = restore.read_settings("init_from", str(tmp_path))
            assert isinstance(made, schema.Settings)
        except ConfigError as error:
            one_line(error, "init_from", str(tmp_path))

    run()
    assert CASES["config.json"] >= 150 * amount


def test_damaged_metrics_are_read_up_to_the_damage(tmp_path):
    lines = [{"step": number, "loss": 1.0} for number in (1, 2, 3)]
    whole = "".join(json.dumps(line) + "\n" for line in lines).encode()
    for position in range(len(whole)):
        for bit in range(8):
            CASES["metrics.jsonl"] += 1
            (tmp_path / "metrics.jsonl").write_bytes(flipped(whole, position, bit))
            entries = metrics_writer.read_metrics(tmp_path)
            assert all(type(entry["step"]) is int for entry in entries)
            intact = whole[:position].count(b"\n")
            assert entries[:intact] == lines[:intact]
    metrics_writer.MetricsWriter(tmp_path, 3).close()
