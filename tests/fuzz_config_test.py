"""Any config, command line or workdir is read as it is meant, or refused in one line that names it."""

import dataclasses
import functools
import importlib
import json
import re

import jax
import ml_collections
import numpy as np
import pytest
from fuzzing import amounts, at, damaged_json, fuzz, missing, one_line, paths_of, replaced
from hypothesis import given
from hypothesis import strategies as st
from ml_collections.config_flags import config_path

from mirai_jax import step
from mirai_jax.benchmark import memory_plan
from mirai_jax.config import compare, fields, flags, schema
from mirai_jax.models import teacher, vit
from mirai_jax.training import restore, workdir
from mirai_jax.utils.errors import ConfigError


def get(name, scale=""):
    """A config as plain dictionaries and tuples, with names for the files that it needs."""
    config = importlib.import_module(f"configs.{name}").get_config(scale)
    if scale.startswith("imagenet"):
        config.teacher.path, config.data.images = "dinov2_vitb14_pretrain.pth", "imagenet/train"
    return fields.plain(config)


class Unshown:
    """A value whose repr has two lines."""

    def __repr__(self):
        return "un\nshown"


NUMBERS = [0, 1, -1, 2, 7, 100, 4096, 2**14, 2**16, 10**6, 2**20, 2**31 - 1, 2**31, -(2**31)]
NUMBERS += [2**63, 10**400, 10**5000, 0.0, 0.5, 1.0, -1.5, 1e-320, 1e6, 1e30, 1e39, 1e300]
NUMBERS += [float("nan"), float("inf"), -float("inf")]
TEXTS = ["", "x", "1", "True", "(1, 2)", "a\nb", "\x00", "\ud800", "é", "x" * 100_000, "ema", "1d"]
TEXTS += ["bidirectional", "checkpoint", "output", "mask", "mean", "predicted", "B", "images"]
TEXTS += ["mnist", "online", "patch", "vq16", "cosine", "bfloat16", "full", "skip", "shuffled"]
GROUPS = [[], [1], (), (1,), (1, 2), ((1, 2),), ((0, 0), (0, 1)), (((1,),),), ((),), ("a", "b")]
GROUPS += [(True, False), (1.5, 2), (float("nan"),), (1, 1), (2**17, 2**17), (10**5000, 1), {}]
GROUPS += [{1: 2}, {"a\nb": 1}, ml_collections.ConfigDict({"a": 1})]
OTHERS = [None, True, b"x\xff", 1j, {1, 2}, len, Unshown(), range(2), np.int64(3), np.float32(1.5)]
OTHERS += [np.float64(0.5), np.bool_(True), np.str_("ema"), np.array([1, 2])]
VALUES = NUMBERS + TEXTS + GROUPS + OTHERS
values = st.one_of(
    st.sampled_from(VALUES),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.sampled_from(["name", "source", "x"]), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)
changes = st.tuples(st.sampled_from(["replace", "miss", "add"]), st.integers(0, 10**6), values)


def name_of(path):
    """('foresight', 0, 'offsets') is foresight[0].offsets."""
    keys = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return keys.removeprefix(".")


FIELDS = {re.sub(r"\[\d+]", "", name_of(path)) for path in paths_of(get("mirai_e_i"))}


def check_config(config):
    """Reads it: settings that its config.json gives again, or None where it was refused."""
    try:
        made = schema.read(config, num_devices=1)
    except ConfigError as error:
        message = re.sub(r"\[\d+]", "", one_line(error))
        if not re.match("config field .* does not exist; the fields here are", message):
            assert re.match(r"(config field )?([\w.]+)", message)[2] in FIELDS, error
        return None
    assert schema.read(json.loads(compare.to_json(config)), num_devices=1) == made
    return made


def apply(config, made):
    for kind, number, value in made:
        paths = paths_of(config)
        path = paths[number % len(paths)]
        if kind == "add" and isinstance(at(config, path[:-1]), dict):
            path = (*path[:-1], "extra")
        config = missing(config, path) if kind == "miss" else replaced(config, path, value)
    return config


@amounts
def test_a_config_with_any_changes_is_read_or_refused(amount):
    configs = [
        get(name, scale) for name in ("mirai_e_i", "mirai_e") for scale in ("", "imagenet_b")
    ]

    @fuzz(600 * amount)
    @given(st.sampled_from(configs), st.lists(changes, min_size=1, max_size=4))
    def run(config, made):
        check_config(apply(config, made))

    run()


def test_a_config_that_holds_itself_is_refused():
    for path in (("sample",), ("model", "grid"), ("foresight", 0, "more")):
        config = get("mirai_e")
        config["foresight"][0]["more"] = 1
        at(config, path[:-1])[path[-1]] = config
        for given_config in (config, memory_plan.without_files(config)):  # to train, to plan
            with pytest.raises(ConfigError, match="the config holds itself"):
                schema.read(given_config, 1)


# The step can be built of whatever is accepted ----------------------------------------------------


def check_step(made):
    """Traces the step of these settings, with all terms active."""
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
    codes = jax.ShapeDtypeStruct((batch_size, recipe.generator.length), np.int32)
    batch = {"label": jax.ShapeDtypeStruct((batch_size,), np.int32), "codes": codes}
    state = jax.eval_shape(lambda: step.init_state(recipe, jax.random.key(0)))
    frozen = {name: state.ema for name, _ in recipe.pretrained_configs}
    if recipe.teacher is not None:
        batch["image"] = jax.ShapeDtypeStruct((batch_size, side, side, 3), np.uint8)
        params = jax.eval_shape(recipe.teacher.init, jax.random.key(0), batch["image"])["params"]
        frozen["bidirectional"] = params
    active = (True,) * len(recipe.terms)
    after, metrics = jax.eval_shape(
        lambda *arrays: step.train_step(recipe, *arrays, active), state, frozen, batch
    )
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
    assert metrics["loss"].shape == ()


def largest(config, path):
    """The config with the largest number at `path` that is accepted there."""
    for value in sorted((x for x in NUMBERS if x == x), key=abs, reverse=True):
        if check_config(made := replaced(config, path, value)):
            return made
    return config  # no other: what stands there must fit another field


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mirai_e", "mirai_e_i"])
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
def test_the_longest_sequence_makes_a_step_and_a_longer_one_is_refused():
    longest = replaced(get("mirai_e"), ("tokenizer", "image_size"), 512)
    check_step(check_config(replaced(longest, ("model", "grid"), (128, 128))))
    longer = replaced(get("mirai_e"), ("tokenizer", "image_size"), 516)
    assert check_config(replaced(longer, ("model", "grid"), (129, 129))) is None


@amounts
def test_accepted_changes_make_a_step(amount):
    config = get("mirai_e")
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
    def run(chosen):
        made = config
        for path, value in chosen:
            made = replaced(made, path, value) if path in paths_of(made) else made
        if made := check_config(made):
            check_step(made)

    run()


# The command line ---------------------------------------------------------------------------------

PLACES = [name_of(path) for path in paths_of(get("mirai_e"))]
WRITTEN = [str(value) for value in NUMBERS if not value or abs(value) < 1e100]
WRITTEN += [text for text in TEXTS if "\x00" not in text and "\ud800" not in text]
WRITTEN += ["nan", "-inf", "None", "false", "()", "(1,", "[1]", '{"a": 1}', "'x'", '"', "\\", "%s"]
WRITTEN += ["((0, 0), (0, 1))", "(None,)", "1_000", "0x10", "1,2", "lambda: 0", "...", "\udcff"]
WRITTEN += ["--", "=", "9" * 5000, "(" * 300, "(" * 3000 + ")" * 3000, "~nobody/x", "~"]
TWISTS = ["{}", "{}.x", "{}[0]", "{}s", "{}.", "[{}", "{}[-1]", "{}[x]", ".{}", "{}]", "{}[1:2]"]
place = st.builds(str.format, st.sampled_from(TWISTS), st.sampled_from(PLACES))
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


def parse(*arguments):
    """The settings of a command line, or the message that refuses it."""
    try:
        return schema.read(flags.parse_config(list(arguments)), 1)
    except ConfigError as error:
        return one_line(error)


@amounts
def test_overrides_of_any_text_are_read_or_refused(amount):
    @fuzz(60 * amount)
    @given(
        st.sampled_from(["", ":demo", ":imagenet_b", ":", ":x"]),
        st.lists(override, min_size=1, max_size=3),
    )
    def run(scale, overrides):
        parse(f"--config=configs/mirai_e.py{scale}", *(a for o in overrides for a in o))

    run()


@amounts
def test_a_wrong_text_for_any_field_is_refused_with_its_name(amount):
    for name in PLACES[:: 3 if amount == 1 else 1]:
        message = parse("--config=configs/mirai_e.py", f"--config.{name}=~")
        kind = config_path.get_type(name, ml_collections.ConfigDict(get("mirai_e")))
        assert kind is str or re.sub(r"(\[\d+])+$", "", name) in message, (name, message)


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--config="], ["--config is missing"]),
        (["--config=configs/no_such.py"], ["no_such.py"]),
        (["--config=configs/mirai_e.py:imagenet_huge"], ["imagenet_huge", "imagenet_xxl", "demo"]),
        (["--config=configs/mirai_e.py", "extra"], ["'extra'"]),
        (["--config=configs/mirai_e.py", "--wrokdir=x"], ["wrokdir"]),
        (
            ["--config=configs/mirai_e.py", "--config.model.depth", "3"],
            ["model.depth", "num_layers"],
        ),
        (
            ["--config=configs/mirai_e.py", "--config.foresight[0].weight=3"],
            ["config.foresight[0].weight", "'3'", "weights"],
        ),
        (["--config=configs/llamagen.py", "--config.foresight[1].source=ema"], ["foresight[1]"]),
    ],
    ids=str,
)
def test_a_wrong_command_line_is_refused(arguments, parts):
    message = parse(*arguments)
    assert all(part in message for part in parts), message


def test_an_override_is_read_in_every_form():
    made = parse(
        "--config=configs/mirai_e.py", "--config.accumulate", "2", "--config.sample.greedy"
    )
    assert made.accumulate == 2 and made.sample.greedy


@pytest.mark.parametrize(
    "body, message",
    [
        ("return config", None),
        ("del config.name; return config", "name is missing"),
        ("del config.model.width; return config", "model.width is 0"),
        ("config.extra = len; return config", "'extra'"),
        ("config.sample = config; return config", "holds itself"),
        ("config.foresight = [1]; return config", "foresight[0] is 1"),
        ("config.model = 1; return config", "model"),
        ("return {}", "dict"),
        ("return None", "None"),
        ("return 1 / 0", "division"),
        ("return get_config(scale)", "recursion"),
        ("raise RuntimeError('two\\nlines')", "lines"),
        ("import no_such_module", "no_such_module"),
        ("return config)", "unmatched"),
    ],
)
def test_a_config_file_that_is_wrong_is_refused(tmp_path, body, message):
    head = "from configs import mirai_e\ndef get_config(scale=''):\n"
    file = tmp_path / "own.py"
    file.write_text(head + f"    config = mirai_e.get_config(scale)\n    {body}\n")
    made = parse(f"--config={file}")
    assert isinstance(made, schema.Settings) if message is None else message in made, made


# A workdir ----------------------------------------------------------------------------------------


@amounts
def test_a_damaged_config_json_is_read_or_refused(tmp_path, amount):
    config, file = get("mirai_e"), tmp_path / "config.json"
    resumable = set(fields.resumable(schema.RunConfig))

    @fuzz(150 * amount)
    @given(damaged_json(json.loads(compare.to_json(config))))
    def run(raw):
        file.write_bytes(raw)
        try:
            changed = workdir.check_workdir(tmp_path, config)
            assert {re.sub(r"\[\d+]", "[]", field) for field in changed} <= resumable
        except ConfigError as error:
            one_line(error, str(tmp_path))
        try:
            assert isinstance(restore.read_settings("init_from", str(tmp_path)), schema.Settings)
        except ConfigError as error:
            one_line(error, "init_from", str(tmp_path))

    run()
