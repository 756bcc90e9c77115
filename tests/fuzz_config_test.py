"""Any config, command line or workdir is read as it is meant, or refused in one line that names it."""

import dataclasses
import functools
import importlib
import json
import re

import fuzzing
import jax
import ml_collections
import numpy as np
import pytest
from fuzzing import amounts, at, fuzz, missing, one_line, paths_of, replaced
from hypothesis import given
from hypothesis import strategies as st
from ml_collections.config_flags import config_path

from mirai_jax import step
from mirai_jax.benchmark import memory_plan
from mirai_jax.config import compare, fields, flags, schema
from mirai_jax.models import teacher
from mirai_jax.models.vit_sizes import PUBLISHED
from mirai_jax.training import restore, workdir
from mirai_jax.utils.errors import ConfigError


def get(name, scale=""):
    """A config as plain dictionaries and tuples, with names for the files that it needs."""
    config = importlib.import_module(f"configs.{name}").get_config(scale)
    if scale.startswith("imagenet"):
        config.teacher.path, config.data.images = "dinov2_vitb14_pretrain.pth", "imagenet/train"
    return fields.plain(config)


NUMBERS = [0, 1, -1, 2, 7, 100, 4096, 2**14, 2**16, 10**6, 2**20, 2**31 - 1, 2**31, -(2**31)]
NUMBERS += [2**63, 10**400, 10**5000, 0.0, 0.5, 1.0, -1.5, 1e-320, 1e6, 1e30, 1e39, 1e300]
NUMBERS += [float("nan"), float("inf"), -float("inf")]
TEXTS = ["", "x", "1", "True", "(1, 2)", "a\nb", "\x00", "\ud800", "é", "x" * 100_000, "ema", "1d"]
TEXTS += ["bidirectional", "checkpoint", "output", "mask", "mean", "predicted", "B", "images"]
TEXTS += ["mnist", "online", "patch", "vq16", "cosine", "bfloat16", "full", "skip", "shuffled"]
GROUPS = [[], [1], (), (1,), (1, 2), ((1, 2),), ((0, 0), (0, 1)), (((1,),),), ((),), ("a", "b")]
GROUPS += [(True, False), (1.5, 2), (float("nan"),), (1, 1), (2**17, 2**17), (10**5000, 1), {}]
GROUPS += [{1: 2}, {"a\nb": 1}, ml_collections.ConfigDict({"a": 1})]
OTHERS = [None, True, b"x\xff", 1j, {1, 2}, len, range(2), np.int64(3), np.float32(1.5)]
OTHERS += [np.float64(0.5), np.bool_(True), np.str_("ema"), np.array([1, 2])]
OTHERS += [type("Unshown", (), {"__repr__": lambda self: "two\nlines"})()]
VALUES = NUMBERS + TEXTS + GROUPS + OTHERS
values = st.one_of(st.sampled_from(VALUES), fuzzing.json_values.map(fields.plain))
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
    names, scales = ("mirai_e_i", "mirai_e"), ("", "imagenet_b")
    configs = [get(name, scale) for name in names for scale in scales]

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
        shape = PUBLISHED[made.teacher.name]
        fields = {name: getattr(made.teacher, name) for name in ("image_size", "block", "zscore")}
        module = teacher.VitTeacher(made.generator.grid, shape, **fields)
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
    trace_step(recipe, made.batch_size, made.tokenizer.sides)


@functools.cache
def trace_step(recipe, batch_size, sides):
    codes = jax.ShapeDtypeStruct((batch_size, recipe.generator.length), np.int32)
    batch = {"label": jax.ShapeDtypeStruct((batch_size,), np.int32), "codes": codes}
    state = jax.eval_shape(lambda: step.init_state(recipe, jax.random.key(0)))
    frozen = {name: state.ema for name, _ in recipe.pretrained_configs}
    if recipe.teacher is not None:
        batch["image"] = jax.ShapeDtypeStruct((batch_size, *sides, 3), np.uint8)
        params = jax.eval_shape(recipe.teacher.init, jax.random.key(0), batch["image"])["params"]
        frozen["bidirectional"] = params
    train = lambda *arrays: step.train_step(recipe, *arrays, (True,) * len(recipe.terms))
    after, metrics = jax.eval_shape(train, state, frozen, batch)
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
    assert metrics["loss"].shape == ()


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
        ("--config=", "--config"),
        ("--config=configs/no_such.py", "no_such.py"),
        ("--config=configs/mirai_e.py:imagenet_huge", "imagenet_huge imagenet_xxl demo"),
        ("--config=configs/mirai_e.py extra", "'extra'"),
        ("--config=configs/mirai_e.py --wrokdir=x", "wrokdir"),
        ("--config=configs/mirai_e.py --config.model.depth 3", "model.depth"),
        ("--config=configs/mirai_e.py --config.foresight[0].weight=3", "foresight[0].weight"),
        ("--config=configs/llamagen.py --config.foresight[1].source=ema", "foresight[1]"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, parts):
    message = parse(*arguments.split())
    assert all(part in message for part in parts.split()), message


def test_an_override_is_read_in_every_form():
    overrides = ["--config.accumulate", "2", "--config.sample.greedy"]
    made = parse("--config=configs/mirai_e.py", *overrides)
    assert made.accumulate == 2 and made.sample.greedy


@pytest.mark.parametrize(
    "body, message",
    [
        ("del config.name; return config", "name"),
        ("del config.model.width; return config", "model.width"),
        ("config.extra = len; return config", "'extra'"),
        ("config.sample = config; return config", "holds itself"),
        ("return None", "None"),
        ("return get_config(scale)", "recursion"),
        ("raise RuntimeError('two\\nlines')", "lines"),
        ("return config)", "unmatched"),
    ],
)
def test_a_config_file_that_is_wrong_is_refused(tmp_path, body, message):
    head = "from configs import mirai_e\ndef get_config(scale=''):\n"
    file = tmp_path / "own.py"
    file.write_text(head + f"    config = mirai_e.get_config(scale)\n    {body}\n")
    assert message in parse(f"--config={file}")


# A workdir ----------------------------------------------------------------------------------------


@amounts
def test_a_damaged_config_json_is_read_or_refused(tmp_path, amount):
    config, file = get("mirai_e"), tmp_path / "config.json"
    resumable = set(fields.resumable(schema.RunConfig))

    @fuzz(150 * amount)
    @given(fuzzing.damaged_json(json.loads(compare.to_json(config))))
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
