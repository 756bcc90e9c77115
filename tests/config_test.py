"""Configs: every file reads, every wrong field is told in one line; workdirs and their files."""

import contextlib
import copy
import importlib
import io
import json
import os
import pathlib
import struct
import time

import ml_collections
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from configs import base, teacher
from mirai_jax import foresight, optimizer
from mirai_jax.config import compare, fields, schema
from mirai_jax.training import metrics_writer, workdir
from mirai_jax.utils.errors import ConfigError, TrainingError
from mirai_jax.utils.files import closing

TERM = "foresight[0]."
FILES = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
    if path.stem not in ("__init__", "base", "teacher")  # teacher: tests/teach_test.py
)
examples = settings(deadline=None, derandomize=True)


def get(name="mirai_e", scale=""):
    """A config as plain dictionaries and tuples."""
    return fields.plain(importlib.import_module(f"configs.{name}").get_config(scale))


def read(config, **kwargs):
    return schema.read(config, **{"num_devices": 8, **kwargs})


def replaced(tree, path, value):
    """A copy with the value at `path` (keys and indices) replaced."""
    if not path:
        return value
    if isinstance(tree, tuple):
        return tuple(
            replaced(v, path[1:], value) if i == path[0] else v for i, v in enumerate(tree)
        )
    return {**tree, path[0]: replaced(tree.get(path[0]), path[1:], value)}


def with_fields(config, fields):
    """`fields`: {'model.width': 32, 'foresight[0].offsets': ...}."""
    for name, value in fields.items():
        keys = name.replace("[", ".").replace("]", "").split(".")
        config = replaced(config, [int(k) if k.isdigit() else k for k in keys], value)
    return config


def refusal(config, **kwargs):
    """The message of the ConfigError, checked to be one line."""
    with pytest.raises(ConfigError) as error:
        read(config, **kwargs)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


# The files ---------------------------------------------------------------------------------------


def test_the_variants_are_all_here():
    assert {"llamagen", "mirai_e", "mirai_i"} <= set(FILES)


@pytest.mark.parametrize("scale", base.SCALES)
@pytest.mark.parametrize("name", FILES)
def test_every_config_reads_at_every_scale(name, scale):
    config = importlib.import_module(f"configs.{name}").get_config(scale)
    if scale.startswith("imagenet") and any(t.source == "bidirectional" for t in config.foresight):
        # What no config can know is asked for by name.
        assert "teacher.path is ''" in refusal(config)
        config.teacher.path = "dinov2_vitb14_pretrain.pth"
        assert "data.images is ''" in refusal(config)
        config.data.images = "imagenet/train"
    result = read(config)
    assert (result.name, result.scale) == (name, scale)
    large = "xxl" in scale or "3b" in scale  # one device could not hold their state
    assert result.mesh == ((1, 8, 1) if large else (8, 1, 1))
    published = "dots" if scale.startswith("imagenet") and scale != "imagenet_b" else "none"
    assert result.generator.remat == ("full" if large else published)
    if scale.startswith("imagenet"):  # 8 of 12, 16 of 24, 24 of 36
        layers = result.generator.num_layers
        small = scale.removeprefix("imagenet_").split("_")[0] in ("b", "l")
        assert result.generator.unroll == (layers if small else 1)  # no loop, a loop
        for term in result.terms:
            assert 3 * term.student_layer == 3 * term.teacher_layer == 2 * layers
    # One device is enough for any of them, and config.json says the same.
    again = read(json.loads(compare.to_json(config)), num_devices=1)
    assert again.terms == result.terms and again.generator == result.generator


def test_the_published_mirai_e():
    (term,) = read(get("mirai_e", "imagenet_b")).terms
    assert term == foresight.Term()  # the defaults are those of the official code
    result = read(get("mirai_e", "imagenet_b"))
    assert (result.num_steps, result.batch_size, result.ema_decay) == (400_320, 256, 0.9999)
    assert result.optimizer == optimizer.OptimizerConfig(num_steps=400_320)


@pytest.mark.parametrize("name", FILES)
def test_an_unknown_scale_names_all_scales(name):
    with pytest.raises(ValueError) as error:
        importlib.import_module(f"configs.{name}").get_config("imagenet_m")
    assert "'imagenet_m'" in str(error.value) and "\n" not in str(error.value)
    assert all(scale in str(error.value) for scale in base.SCALES)


@pytest.mark.parametrize("name", FILES)
def test_no_colon_is_the_demo_and_every_field_is_base_s(name):
    assert get(name) == get(name, "demo")

    def names(tree):
        return set(compare._flat({k: v for k, v in tree.items() if k != "foresight"}))

    assert names(get(name)) == names(fields.plain(base.get_config()))


def test_only_scales_that_need_it_are_other_runs():
    e, baseline = get("mirai_e"), get("llamagen")
    assert {**e, "foresight": (), "name": "llamagen"} == baseline


def test_shuffled_targets_need_another_image():
    shuffled = {TERM + "targets": "shuffled", "accumulate": 16}
    schema.read(with_fields(get(), shuffled), 1)
    with pytest.raises(ConfigError) as error:
        schema.read(with_fields(get(), {**shuffled, "accumulate": 32}), 1)
    assert str(error.value).startswith("foresight[0].targets is 'shuffled'; it must be own where")


def test_fields_that_came_later_have_their_old_meaning():
    config = get()
    older = {**config, "model": dict(config["model"]), "foresight": [dict(config["foresight"][0])]}
    del older["model"]["attention"], older["foresight"][0]["targets"]
    completed = fields.completed(older)
    assert schema.read(completed, 8) == schema.read(config, 8)
    assert compare.differences(completed, config) == {}
    for other in (None, [], {"model": 3, "foresight": [1, "x"]}, {"foresight": 5}):
        assert fields.completed(other) == other


# Wrong fields ------------------------------------------------------------------------------------

WRONG = [  # (fields, what the message holds besides the name and the value of the last field)
    # Of another type.
    ({"num_steps": "100"}, "a whole number"),
    ({"num_steps": 100.0}, "a whole number"),
    ({"batch_size": True}, "a whole number"),
    ({"seed": None}, "a whole number"),
    ({"optimizer.learning_rate": "1e-4"}, "a number"),
    ({"optimizer.learning_rate": float("nan")}, "a number"),
    ({"optimizer.learning_rate": float("inf")}, "a number"),
    ({"optimizer.weight_decay": False}, "a number"),
    ({"sample.greedy": 1}, "True or False"),
    ({"data.path": None}, "a string"),
    ({"model.grid": 8}, "a tuple"),
    ({"model.grid": (8, 8, 8)}, "a pair of whole numbers"),
    ({"model.grid": (8.0, 8)}, "a pair of whole numbers"),
    ({"foresight": "ema"}, "a tuple"),
    ({"model": 3}, "a group of fields"),
    ({TERM + "offsets": (0, 1)}, "(rows, columns) pairs for layout '2d'"),
    ({TERM + "offsets": ((0, 0), (0, True))}, "a pair of whole numbers"),
    ({TERM + "layout": "1d", TERM + "offsets": ((0, 1),)}, "whole numbers for layout '1d'"),
    ({TERM + "weights": ("2",)}, "a number"),
    ({TERM + "schedule": ((1.0,),)}, "2 numbers each"),
    # Of no known name.
    ({"model.size": "M"}, "one of B, L, XL, XXL, 3B"),
    ({"model.dtype": "float16"}, "one of float32, bfloat16"),
    ({"model.attention": "flash"}, "one of auto, xla"),
    ({"optimizer.schedule": "linear"}, "one of constant, cosine"),
    ({"data.name": "cifar"}, "one of mnist, fashion_mnist, images"),
    ({"tokenizer.name": "vqgan"}, "one of patch, vq16"),
    ({TERM + "source": "dino"}, "one of ema, bidirectional, checkpoint"),
    ({TERM + "level": "middle"}, "one of internal, output"),
    ({TERM + "layout": "3d"}, "one of 2d, 1d"),
    ({TERM + "borders": "clip"}, "one of wrap, mask"),
    ({TERM + "targets": "none"}, "one of own, shuffled"),
    ({TERM + "anchor": "next"}, "one of consumed, predicted"),
    ({TERM + "reduction": "max"}, "one of sum, mean"),
    ({TERM + "source": "bidirectional", "teacher.name": "mae"}, "one of efficientnet_lite0"),
    # Out of range.
    ({"num_steps": 0}, "at least 1"),
    ({"ema_decay": 1.0}, "at least 0 and less than 1"),
    ({"seed": 2**31}, "at most"),
    ({"model.token_dropout": -0.1}, "at least 0 and less than 1"),
    ({"model.num_layers": 0}, "1 or more where model.size is ''"),
    ({"sample.temperature": 0.0}, "more than 0"),
    ({"sample.top_p": 1.5}, "at most 1"),
    ({"sample.classes": 11}, "at most 10"),
    ({"teacher.stage": 8}, "at most 7"),
    ({TERM + "start_epoch": -1.0}, "at least 0"),
    ({TERM + "weights": (-2.0,)}, "0 or more each"),
    ({TERM + "name": "an ema"}, "letters, digits and underscores"),
    # Not fitting other fields.
    ({"model.width": 100}, "a multiple of 4 * model.num_heads"),
    ({"model.grid": (8, 9)}, "(8, 8), the tokens of tokenizer.image_size=32"),
    ({"batch_size": 12}, "a multiple of 8"),
    ({"optimizer.schedule": "cosine", "optimizer.warmup_steps": 10**6}, "less than num_steps="),
    ({TERM + "student_layer": 99}, "a block of the model, 1 to"),
    ({TERM + "teacher_layer": 99}, "a block of the model, 1 to"),
    ({TERM + "offsets": ((0, 0), (0, 8))}, "(0, 8) leaves the 8x8 grid entirely"),
    ({TERM + "offsets": ((-8, 0),)}, "(-8, 0) leaves the 8x8 grid entirely"),
    ({TERM + "layout": "1d", TERM + "offsets": (0, 64)}, "64 leaves it"),
    ({TERM + "offsets": ()}, "one offset or more"),
    ({TERM + "weights": (1.0, 2.0)}, "one for each of the 3 offsets"),
    ({TERM + "schedule": ((80.0, 0.5), (40.0, 0.25))}, "in order"),
    ({"ema_decay": 0.0}, "above 0 for foresight[0].source 'ema'"),
    ({TERM + "source": "checkpoint", TERM + "checkpoint": ""}, "the workdir of a pretrained"),
    ({"model.class_dropout": 0.0, "sample.guidance": 2.0}, "1 where model.class_dropout is 0"),
]


@pytest.mark.parametrize("fields, allowed", WRONG, ids=lambda x: str(x)[:60])
def test_a_wrong_field_is_told_in_one_line(fields, allowed):
    message = refusal(with_fields(get(), fields))
    name, value = list(fields.items())[-1]
    if isinstance(value, (tuple, list)) and allowed in ("a number", "2 numbers each"):
        value = value[0]  # the entry that is wrong
    shown = {repr(value), repr(value[-1])} if isinstance(value, tuple) and value else {repr(value)}
    assert message.startswith(f"{name} is ") and any(s in message for s in shown)
    assert allowed in message


@pytest.mark.parametrize(
    "mesh", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (2, 2, 4)], ids=str
)
def test_a_mesh_that_does_not_fit_is_refused(mesh):
    config = with_fields(get(), {"mesh": dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))})
    message = refusal(config)
    assert f"mesh.data={mesh[0]}, mesh.fsdp={mesh[1]}, mesh.tensor={mesh[2]}" in message
    assert "must be" in message


def test_a_batch_must_divide_by_the_devices_that_split_it_alone():
    config = with_fields(get(), {"batch_size": 12, "mesh.data": 2, "mesh.tensor": 4})
    assert read(config).mesh == (2, 1, 4)
    config = with_fields(config, {"accumulate": 6})
    assert read(config).accumulate == 6
    message = refusal(with_fields(config, {"accumulate": 4}))
    assert "a multiple of 8" in message and "times accumulate=4" in message
    assert "there are 6 devices" in refusal(with_fields(get(), {"batch_size": 32}), num_devices=6)


def test_terms_have_names_of_their_own():
    (term,) = get()["foresight"]
    ema, other = {**term, "name": "mine"}, {**term, "source": "bidirectional"}
    message = refusal(with_fields(get(), {"foresight": (ema, other, ema)}))
    assert message == "foresight[2].name is 'mine'; it must be used by one term only"
    for taken in ("bidirectional", "tokenizer", "data", "image_set"):
        message = refusal(with_fields(get(), {"foresight": ({**term, "name": taken},)}))
        assert message.startswith(f"foresight[0].name is {taken!r}; it must be another name: ")
    output = {**term, "level": "output"}
    result = read(with_fields(get(), {"foresight": (term, term, other, output)}))
    assert [t.name for t in result.terms] == ["ema", "ema2", "bidirectional", "output"]


def test_an_output_term_needs_no_average_and_taps_the_top():
    fields = {TERM + "level": "output", "ema_decay": 0.0}
    (term,) = read(with_fields(get(), fields)).terms
    assert term.student_layer == get()["model"]["num_layers"]


IMAGENET_I = {"data.images": "train", "teacher.path": "dino.pth", "tokenizer.path": "vq.pt"}


def test_the_published_mirai_i():
    for scale, grid in (("imagenet_b", (16, 16)), ("imagenet_l_384", (24, 24))):
        result = read(with_fields(get("mirai_i", scale), IMAGENET_I))
        (term,) = result.terms
        assert (term.source, term.offsets, term.weights) == ("bidirectional", ((0, 0),), (2.0,))
        assert (term.start_epoch, term.schedule) == (0.0, ())
        assert result.generator.grid == grid and result.step_sees_images
        # No size: one patch a token, 224 and 336 pixels.
        assert (result.teacher.name, result.teacher.image_size) == ("dinov2_vitb14", 0)
        assert result.data.codes == "stored"


@pytest.mark.parametrize(
    "fields, where, allowed",
    [
        ({"data.images": ""}, "data.images is ''", "a folder"),
        ({"teacher.path": ""}, "teacher.path is ''", "the published .pth"),
        ({"teacher.image_size": 225}, "teacher.image_size is 225", "a multiple of 14"),
        ({"teacher.name": "efficientnet_lite0"}, "teacher.image_size is 0", "32 or more"),
        ({"teacher.cached": True}, "teacher.cached is True", "False with data.name 'images'"),
        ({"teacher.layer": -1}, "teacher.layer is -1", "at least 0"),
        ({"data.codes": "online", "tokenizer.path": ""}, "tokenizer.path is ''", "the weights of"),
        ({"data.codes": "offline"}, "data.codes is 'offline'", "one of stored, online"),
        ({"tokenizer.name": "patch", "tokenizer.patch": 16}, "tokenizer.name is 'patch'", "vq16"),
        ({"tokenizer.name": "vq8"}, "model.grid is (16, 16)", "(32, 32)"),
        ({"data.crop_range": 0.9}, "data.crop_range is 0.9", "at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_data_tokenizer_and_teacher_ask_of_each_other(fields, where, allowed):
    config = with_fields(get("mirai_i", "imagenet_b"), IMAGENET_I)
    read(config)
    message = refusal(with_fields(config, fields))
    assert where in message and allowed in message


def test_images_are_asked_for_only_where_the_step_sees_them():
    assert not read(get("mirai_e", "imagenet_b")).step_sees_images
    online = {"data.codes": "online", "tokenizer.path": "vq.pt"}
    assert "data.images is ''" in refusal(with_fields(get("mirai_e", "imagenet_b"), online))
    result = read(with_fields(get("mirai_e", "imagenet_b"), {**online, "data.images": "train"}))
    assert result.step_sees_images and not result.needs_images
    assert read(get("mirai_i")).step_sees_images
    assert not read(with_fields(get("mirai_i"), {"teacher.cached": True})).step_sees_images


@pytest.mark.parametrize(
    "field", ["seed", "model.grid", "optimizer.b1", "sample.greedy", "mesh.data", TERM + "anchor"]
)
def test_a_missing_field_is_named(field):
    config = copy.deepcopy(get())
    *parents, last = field.split(".")
    node = config
    for key in parents:
        node = node["foresight"][0] if key.startswith("foresight") else node[key]
    del node[last]
    message = refusal(config)
    assert field in message and "missing" in message


@pytest.mark.parametrize("field", ["num_step", "model.widht", TERM + "wieghts", "samples"])
def test_a_field_that_does_not_exist_is_named(field):
    # A config file can set anything: `base.term(config, wieghts=(1.0,))` must not be ignored.
    message = refusal(with_fields(get(), {field: 1}))
    assert field in message


def test_a_term_that_is_no_group_of_fields_is_refused():
    for value in (1, "ema", None, ("source", "ema")):
        assert "foresight[0]" in refusal(with_fields(get(), {"foresight": (value,)}))


@pytest.mark.parametrize(
    "source, offset, height, width",
    [("bidirectional", (-7, -7), 8, 8), ("ema", (7, 7), 8, 8), ("ema", (-7, -7), 8, 8)],
)
def test_an_offset_that_leaves_no_pair_is_refused(source, offset, height, width):
    # The mean over no pairs is NaN; with the class position's own pair it is a head about nothing.
    fields = {TERM + "source": source, TERM + "offsets": (offset,)}
    term = foresight.Term(source=source, offsets=(offset,))
    assert foresight.alignment(term, offset, (height, width))[1].sum() == 0
    assert TERM + "offsets" in refusal(with_fields(get(), fields))


def test_an_offset_twice_is_refused():
    # Both heads would have one name, and one of the two would be missing from the metrics.
    message = refusal(with_fields(get(), {TERM + "offsets": ((0, 1), (1, 0), (0, 1))}))
    assert TERM + "offsets" in message


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_warmup_as_long_as_the_run_is_refused_or_works(schedule):
    fields = {"optimizer.schedule": schedule, "num_steps": 50, "optimizer.warmup_steps": 50}
    try:
        result = read(with_fields(get(), fields))
    except ConfigError as error:
        assert "optimizer.warmup_steps" in str(error)
        return
    assert optimizer.learning_rate(result.optimizer)(0) == 0


# Anything ----------------------------------------------------------------------------------------


def paths_of(tree, path=()):
    """The paths of all groups, tuples and leaves."""
    children = {}
    if isinstance(tree, dict):
        children = tree
    elif isinstance(tree, tuple):
        children = dict(enumerate(tree))
    return [path] * bool(path) + [
        p for key, child in children.items() for p in paths_of(child, (*path, key))
    ]


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.integers(),
    st.sampled_from([10**30, -(10**30), 10**400]),
    st.floats(),
    st.sampled_from(
        ["", "ema", "bidirectional", "checkpoint", "output", "1d", "mask", "images", "online"]
    ),
    st.sampled_from(["cosine", "vq16", "predicted", "B", "''", "bfloat16", "mean"]),
    st.text(max_size=5),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["name", "source", "data", "x"]), inner, max_size=3),
    ),
    max_leaves=6,
)
PATHS = paths_of(get())


def check_anything(changes):
    config = get()
    for path, value in changes:
        try:
            config = replaced(config, path, value)
        except (AttributeError, TypeError):
            continue  # an earlier change took the place away
    try:
        result = read(config)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1, error
        return
    assert isinstance(result, schema.Settings)
    optimizer.make_optimizer(result.optimizer)
    assert read(json.loads(compare.to_json(config))) == result
    for term in result.terms:
        assert len(term.head_weights) == len(term.metric_names) == len(term.offsets)


@settings(examples, max_examples=500)
@given(st.sampled_from(PATHS), values)
def test_one_field_of_any_value_is_read_or_refused(path, value):
    check_anything([(path, value)])


@settings(examples, max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(PATHS), values), min_size=2, max_size=4))
def test_fields_of_any_values_are_read_or_refused(changes):
    check_anything(changes)


def test_numbers_that_no_float_holds_are_refused():
    for path in ("optimizer.eps", TERM + "start_epoch", "model.num_layers", "sample.guidance"):
        check_anything([(tuple(path.replace("[0]", ".0").split(".")), 10**400)])
        fields = {path: 10**400}
        try:
            read(with_fields(get(), fields))
        except ConfigError as error:
            assert path in str(error)
    fields = {"mesh.data": -1, "mesh.fsdp": 2**32, "mesh.tensor": 2**32}
    assert "mesh.fsdp" in refusal(with_fields(get(), fields))


# Workdirs ----------------------------------------------------------------------------------------


def test_config_json_holds_the_whole_config():
    for name in FILES:
        config = importlib.import_module(f"configs.{name}").get_config()
        text = compare.to_json(config)
        assert text.endswith("\n")
        assert read(json.loads(text)) == read(config)
        assert compare.differences(json.loads(text), config) == {}
        assert compare.to_json(json.loads(text)) == text


def test_another_run_is_refused_with_every_field_that_differs():
    fields = {
        "seed": 1, "model.width": 64, TERM + "weights": (1.0,), TERM + "offsets": ((0, 0),),
        "optimizer.b2": 0.99, "data.name": "fashion_mnist", "mesh.fsdp": 2,
    }  # fmt: skip
    old, new = get(), with_fields(get(), fields)
    with pytest.raises(ConfigError) as error:
        compare.check_same_run(json.loads(compare.to_json(old)), new, "runs/x")
    message = str(error.value)
    assert len(message.splitlines()) == 1 and "runs/x" in message
    for field in fields.keys() - {"mesh.fsdp"}:
        assert field in message
    assert "seed was 0, is 1" in message and "--workdir" in message
    assert "mesh" not in message  # may differ
    for one, other in ((get("llamagen"), get("mirai_e")), (get("mirai_e"), get("llamagen"))):
        with pytest.raises(ConfigError, match="foresight"):
            compare.check_same_run(one, other, "runs/x")


def test_fields_that_change_nothing_computed_may_differ():
    fields = {
        "log_every": 7, "sample_every": 0, "checkpoint_every": 9, "keep_checkpoints": 5,
        "judged_samples": 3, "data.num_workers": 2, "data.path": "moved", "model.unroll": 1,
        "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "sample.guidance": 1.0,
        "sample.top_k": 9, "sample.per_class": 1, TERM + "checkpoint": "moved",
    }  # fmt: skip
    old, new = get(), with_fields(get(), fields)
    changed = compare.check_same_run(json.loads(compare.to_json(old)), new, "x")
    assert changed.keys() == fields.keys()
    assert all(changed[field][1] == value for field, value in fields.items())
    assert compare.check_same_run(old, old, "x") == {}
    # Every name in the table is one of a field.
    known = compare._flat(get()) | compare._flat(fields.plain(teacher.get_config()))
    assert set(compare.RESUMABLE) <= {field.replace("[0]", "[]") for field in known}


def test_only_a_constant_schedule_lets_a_run_go_on_longer():
    for schedule, allowed in (("constant", True), ("cosine", False)):
        old = with_fields(get(), {"optimizer.schedule": schedule})
        new = with_fields(old, {"num_steps": 10_000})
        if allowed:
            steps = (old["num_steps"], 10_000)
            assert compare.check_same_run(old, new, "x") == {"num_steps": steps}
        else:
            with pytest.raises(ConfigError, match=r"num_steps was .*, is 10000"):
                compare.check_same_run(old, new, "x")


def test_a_workdir_of_the_same_run_is_opened_again(tmp_path):
    folder, config = tmp_path / "a" / "b", get()
    assert workdir.check_workdir(folder, config) == {} and not folder.exists()
    workdir.open_workdir(folder, config)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert workdir.check_workdir(folder, config) == {}
    longer = with_fields(config, {"log_every": 3})
    assert workdir.check_workdir(folder, longer).keys() == {"log_every"}
    with pytest.raises(ConfigError, match="seed was 0, is 5"):
        workdir.check_workdir(folder, with_fields(config, {"seed": 5}))


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
            workdir.open_workdir(folder, get())
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
        raise TrainingError("the run cannot go on")
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


def test_config_dicts_inside_tuples_become_plain():
    config = ml_collections.ConfigDict({"a": (ml_collections.ConfigDict({"b": [1, 2]}),)})
    result = fields.plain(config)
    assert result == {"a": ({"b": (1, 2)},)} and type(result["a"][0]) is dict
