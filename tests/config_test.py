"""Configs: every file reads, wrong fields are refused by name, old runs resume."""

import dataclasses
import functools
import importlib
import json
import pathlib

import helpers
import pytest
from fuzzing import at, missing, paths_of, replaced

from configs import base, teacher
from mirai_jax import foresight, optimizer
from mirai_jax.config import compare, fields, schema
from mirai_jax.teaching import settings as teacher_settings
from mirai_jax.utils.errors import ConfigError

TERM = "foresight[0]."
FILES = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
    if path.stem not in ("__init__", "base", "teacher", "tokenizer")
)


def get(name="mirai_e", scale=""):
    """A config as plain dictionaries and tuples."""
    return fields.plain(importlib.import_module(f"configs.{name}").get_config(scale))


def read(config, num_devices=8):
    return schema.read(config, num_devices)


def with_fields(config, values):
    """`values`: {'model.width': 32, 'foresight[0].offsets': ...}."""
    for name, value in values.items():
        keys = name.replace("[", ".").replace("]", "").split(".")
        config = replaced(config, tuple(int(k) if k.isdigit() else k for k in keys), value)
    return config


refusal = functools.partial(helpers.refusal, read, error=ConfigError)


# The files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", base.SCALES)
@pytest.mark.parametrize("name", FILES)
def test_every_config_reads_at_every_scale(name, scale):
    config = importlib.import_module(f"configs.{name}").get_config(scale)
    if scale.startswith("imagenet") and any(t.source == "bidirectional" for t in config.foresight):
        # The files that no config can know are required by name.
        assert "teacher.path is ''" in refusal(config)
        config.teacher.path = "dinov2_vitb14_pretrain.pth"
        if config.data.codes == "online":
            assert "tokenizer.path is ''" in refusal(config)
            config.tokenizer.path = "vq_ds16_c2i.pt"
        assert "data.images is ''" in refusal(config)
        config.data.images = "imagenet/train"
    if scale == "folder":
        assert "model.num_classes is 0" in refusal(config)  # main finds it in the folder
        config.model.num_classes = 10
        assert "model.grid is (0, 0)" in refusal(config)
        config.model.grid = (8, 8)
        assert "data.images is ''" in refusal(config)
        config.data.images = "pictures"
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
            assert 3 * term.teacher_layer == 2 * layers
            third = 1 if name == "llamagen_repa" else 2
            assert 3 * term.student_layer == third * layers
    # One device is enough for any of them, and config.json holds the same.
    text = compare.to_json(config)
    again = read(json.loads(text), num_devices=1)
    assert dataclasses.replace(again, mesh=result.mesh) == result
    assert compare.to_json(json.loads(text)) == text
    assert compare.differences(json.loads(text), config) == {}


def test_the_published_mirai_e():
    result = read(get("mirai_e", "imagenet_b"))
    assert result.terms == (foresight.Term(),)  # the defaults are those of the official code
    assert (result.num_steps, result.batch_size, result.ema_decay) == (400_320, 256, 0.9999)
    assert result.optimizer == optimizer.OptimizerConfig(num_steps=400_320)


IMAGENET_I = {"data.images": "train", "teacher.path": "dino.pth", "tokenizer.path": "vq.pt"}


@pytest.mark.parametrize("scale, grid", [("imagenet_b", (16, 16)), ("imagenet_l_384", (24, 24))])
def test_the_published_mirai_i(scale, grid):
    result = read(with_fields(get("mirai_i", scale), IMAGENET_I))
    (term,) = result.terms
    assert (term.source, term.offsets, term.weights) == ("bidirectional", ((0, 0),), (2.0,))
    assert (term.start_epoch, term.schedule) == (0.0, ())
    assert result.generator.grid == grid and result.step_sees_images
    # No size: one patch a token, 224 and 336 pixels.
    assert (result.teacher.name, result.teacher.image_size) == ("dinov2_vitb14", 0)
    assert result.data.codes == "stored"


def test_the_baseline_llamagen_repa():
    """As GEAR trains it."""
    mirai_i = read(with_fields(get("mirai_i", "imagenet_b"), IMAGENET_I))
    result = read(with_fields(get("llamagen_repa", "imagenet_b"), IMAGENET_I))
    (term,), (of_mirai_i,) = result.terms, mirai_i.terms
    changes = {"anchor": "predicted", "weights": (0.5,), "student_layer": 4}
    assert term == dataclasses.replace(of_mirai_i, **changes, projector_init="torch")
    changes = {"b2": 0.999, "weight_decay": 0.0, "decayed": "all"}
    assert result.optimizer == dataclasses.replace(mirai_i.optimizer, **changes)
    assert (result.data.codes, result.data.crops) == ("online", "random")
    assert result.generator == mirai_i.generator and result.teacher == mirai_i.teacher
    small = read(get("llamagen_repa"))
    assert small.data == read(get("mirai_i")).data and small.terms[0].student_layer == 1


def test_no_colon_is_the_demo_and_only_variants_that_need_it_differ():
    assert all(get(name) == get(name, "demo") for name in FILES)
    assert {**get("mirai_e"), "foresight": (), "name": "llamagen"} == get("llamagen")


# Configs of runs from before a field existed ------------------------------------------------------


def test_defaults_are_those_of_the_config_files(monkeypatch):
    monkeypatch.setitem(base.SCALES, "none", lambda config: None)
    named = {"name": "base", "scale": "none"}
    assert fields.complete(schema.RunConfig, named) == fields.plain(base.get_config("none"))
    term = base.term(base.get_config("imagenet_b"))
    assert fields.complete(schema.TermFields, {}) == fields.plain(term)
    demo = fields.plain(teacher.get_config())
    named = {"name": "teacher", "scale": "demo", "optimizer": demo["optimizer"]}
    assert fields.complete(teacher_settings.TeacherRunConfig, named) == demo


@pytest.mark.parametrize(
    "config, group, reader",
    [
        (get("mirai_e", "imagenet_b"), schema.RunConfig, schema.read),
        (
            fields.plain(teacher.get_config()),
            teacher_settings.TeacherRunConfig,
            teacher_settings.read,
        ),
    ],
    ids=["run", "teacher"],
)
def test_a_config_that_lacks_a_field_has_its_default_and_resumes(config, group, reader):
    lacking = {"name": config["name"], "scale": config["scale"]}
    lacking |= {"foresight": ({},)} if "foresight" in config else {}
    default, count = fields.complete(group, lacking), 0
    for path in paths_of(config):
        # At the top, in a section or in a term, a section as a whole: wherever a default is used.
        field = isinstance(at(config, path[:-1]), dict)  # not an entry of a tuple
        if (
            field
            and path not in {(key,) for key in lacking}
            and at(config, path) == at(default, path)
        ):
            old = json.loads(compare.to_json(missing(config, path)))
            assert reader(old, 1) == reader(config, 1)
            assert compare.check_same_run(old, config, "runs/x", group) == {}
            count += 1
    assert count > 12


def test_a_field_that_an_old_run_lacks_had_its_default_there():
    config = get("mirai_e", "imagenet_b")
    places = ("seed",), ("model", "token_dropout"), ("foresight", 0, "weights")
    for path, value in zip(places, (1, 0.5, (1.0,)), strict=True):
        runs = missing(config, path), replaced(config, path, value), "runs/x"
        assert f"{path[-1]} was" in helpers.refusal(compare.check_same_run, *runs)
    old, new = missing(config, ("log_every",)), with_fields(config, {"log_every": 7})
    assert compare.check_same_run(old, new, "runs/x") == {"log_every": (100, 7)}


@pytest.mark.parametrize("field", ["name", "scale"])
def test_a_missing_field_without_default_is_named(field):
    assert f"{field} is missing" in refusal(missing(get(), (field,)))


@pytest.mark.parametrize("field", ["num_step", "model.widht", TERM + "wieghts", "samples"])
def test_a_field_that_does_not_exist_is_named(field):
    # A config file can set anything: `base.term(config, wieghts=(1.0,))` must not be ignored.
    assert field in refusal(with_fields(get(), {field: 1}))


# Wrong fields ------------------------------------------------------------------------------------

WRONG = [  # the last field of each is the one that the message names
    # The type.
    *({"num_steps": value} for value in ("100", 100.0, True, None)),
    *({"optimizer.learning_rate": v} for v in ("1e-4", float("nan"), float("inf"), False, 10**400)),
    {"sample.greedy": 1}, {"data.path": None}, {"data.path": "a\nb"}, {"model": 3},
    *({"model.grid": value} for value in (8, (8, 8, 8), (8.0, 8))),
    *({"foresight": value} for value in ("ema", 1)),
    *({"foresight[0]": value} for value in (1, "ema", None, ("source", "ema"))),
    *({TERM + "offsets": v} for v in ((0, 1), ((0, 0), (0, True)), ((0,),))),
    {TERM + "layout": "1d", TERM + "offsets": ((0, 1),)}, {TERM + "weights": ("2",)},
    {TERM + "schedule": ((1.0,),)},
    # The choices.
    *({field: "x"} for field in ("model.size", "model.dtype", "model.attention", "data.name",
      "data.crops", "optimizer.decayed", "optimizer.schedule", "tokenizer.name", "teacher.name", "nonfinite", "data.codes")),
    *({TERM + field: "x"} for field in ("source", "level", "layout", "borders", "targets", "anchor",
      "reduction", "window_along", "schedule_unit", "projector", "projector_init")),
    # The bounds.
    {"num_steps": 0}, {"ema_decay": 1.0}, {"seed": 2**31}, {"model.token_dropout": -0.1},
    {"model.num_layers": 0}, {"sample.temperature": 0.0}, {"sample.top_p": 1.5},
    {"sample.classes": 101}, {"teacher.stage": 8}, {TERM + "start_epoch": -1.0},
    {TERM + "weights": (-2.0,)}, {TERM + "weights": ()}, {TERM + "name": "an ema"},
    # Other fields.
    {"model.size": "B", "model.num_layers": 4}, {"model.width": 100}, {"model.grid": (8, 9)},
    {"profile_steps": (5,)}, {"profile_steps": (5, 4)},
    {"batch_size": 12}, {"keep_every": 7}, {TERM + "student_layer": 99}, {TERM + "teacher_layer": 99},
    {"optimizer.schedule": "cosine", "num_steps": 50, "optimizer.warmup_steps": 50},
    # An offset twice: both heads would have one name. No pair: their mean would be NaN.
    *({TERM + "offsets": v} for v in (((0, 0), (0, 8)), ((-8, 0),), (), ((0, 1), (0, 1)), ((7, 7),))),
    {TERM + "source": "bidirectional", TERM + "offsets": ((-7, -7),)},
    {TERM + "layout": "1d", TERM + "offsets": (0, 64)}, {TERM + "weights": (1.0, 2.0)},
    {TERM + "schedule": ((80.0, 0.5), (40.0, 0.25))}, {"ema_decay": 0.0},
    {TERM + "schedule_unit": "shares", TERM + "schedule": ((0.5, 0.5), (1.5, 0.2))},
    {TERM + "window": 0}, {TERM + "window": 2},  # generators see no further than their position
    {TERM + "source": "bidirectional", TERM + "level": "output", TERM + "window": 2},
    {TERM + "source": "checkpoint", TERM + "checkpoint": ""},
    {"model.class_dropout": 0.0, "sample.guidance": 2.0},
    {"tokenizer.image_size": 516, "model.grid": (129, 129)},  # more tokens than 2**14
    *({"tokenizer.image_size": size} for size in ((), (0, 32), (32, 32, 32), (32.0, 32), "32", True, (32, 64))),
    {"model.num_classes": 0}, {"data.held_out_share": 1.0}, {"data.min_images": 0},
    {"mesh.tensor": 8, "accumulate": 32, TERM + "targets": "shuffled"},  # a single image
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: str(wrong)[:60])
def test_a_wrong_field_is_refused_with_its_name(wrong):
    config = get()
    read(config)
    assert refusal(with_fields(config, wrong)).startswith(f"{list(wrong)[-1]} is ")


@pytest.mark.parametrize(
    "wrong, field",
    [
        ({"data.images": ""}, "data.images"),
        ({"teacher.path": ""}, "teacher.path"),
        ({"teacher.image_size": 225}, "teacher.image_size"),
        ({"teacher.name": "efficientnet_lite0"}, "teacher.image_size"),
        ({"teacher.cached": True}, "teacher.cached"),
        ({"data.codes": "online", "tokenizer.path": ""}, "tokenizer.path"),
        ({"tokenizer.name": "patch", "tokenizer.patch": 16}, "tokenizer.name"),
        ({"tokenizer.name": "vq8"}, "model.grid"),
        ({"data.crop_range": 0.9}, "data.crop_range"),
        ({"data.crops": "random"}, "data.crops"),
        ({"data.balanced": True}, "data.balanced"),
        ({"data.name": "folder", "data.crops": "random"}, "data.crops"),
    ],
    ids=str,
)
def test_what_data_tokenizer_and_teacher_ask_of_each_other(wrong, field):
    config = with_fields(get("mirai_i", "imagenet_b"), IMAGENET_I)
    read(config)
    assert refusal(with_fields(config, wrong)).startswith(f"{field} is ")


@pytest.mark.parametrize("mesh", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (2, 2, 4)])
def test_a_mesh_that_does_not_fit_is_refused(mesh):
    config = with_fields(get(), {"mesh": dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))})
    assert f"mesh.data={mesh[0]}, mesh.fsdp={mesh[1]}, mesh.tensor={mesh[2]}" in refusal(config)


def test_a_batch_must_divide_by_the_devices_that_split_it_alone():
    config = with_fields(get(), {"batch_size": 12, "mesh.data": 2, "mesh.tensor": 4})
    assert read(config).mesh == (2, 1, 4)
    config = with_fields(config, {"accumulate": 6})
    assert read(config).accumulate == 6
    assert "accumulate=4" in refusal(with_fields(config, {"accumulate": 4}))
    assert "6 devices" in refusal(with_fields(get(), {"batch_size": 32}), num_devices=6)


def test_names_of_terms_are_unique():
    (term,) = get()["foresight"]
    ema, other = {**term, "name": "mine"}, {**term, "source": "bidirectional"}
    message = refusal(with_fields(get(), {"foresight": (ema, other, ema)}))
    assert message.startswith("foresight[2].name is 'mine'; it must be ")
    for taken in ("bidirectional", "tokenizer", "data", "image_set"):
        message = refusal(with_fields(get(), {"foresight": ({**term, "name": taken},)}))
        assert message.startswith(f"foresight[0].name is {taken!r}; it must be ")
    output = {**term, "level": "output"}
    result = read(with_fields(get(), {"foresight": (term, term, other, output)}))
    assert [t.name for t in result.terms] == ["ema", "ema2", "bidirectional", "output"]


def test_an_output_term_needs_no_average_and_taps_the_top():
    (term,) = read(with_fields(get(), {TERM + "level": "output", "ema_decay": 0.0})).terms
    assert term.student_layer == get()["model"]["num_layers"]


def test_images_are_required_only_where_the_step_sees_them():
    assert not read(get("mirai_e", "imagenet_b")).step_sees_images
    online = {"data.codes": "online", "tokenizer.path": "vq.pt"}
    assert "data.images is ''" in refusal(with_fields(get("mirai_e", "imagenet_b"), online))
    result = read(with_fields(get("mirai_e", "imagenet_b"), {**online, "data.images": "train"}))
    assert result.step_sees_images and not result.needs_images
    assert read(get("mirai_i")).step_sees_images
    assert not read(with_fields(get("mirai_i"), {"teacher.cached": True})).step_sees_images


# Resuming -----------------------------------------------------------------------------------------


def test_another_run_is_refused_with_every_field_that_differs():
    changed = {
        "seed": 1, "model.width": 64, TERM + "weights": (1.0,), TERM + "offsets": ((0, 0),),
        "optimizer.b2": 0.99, "data.name": "fashion_mnist", "mesh.fsdp": 2,
    }  # fmt: skip
    old, new = get(), with_fields(get(), changed)
    old = json.loads(compare.to_json(old))
    message = helpers.refusal(compare.check_same_run, old, new, "runs/x", error=ConfigError)
    assert "runs/x" in message
    assert all(field in message for field in changed.keys() - {"mesh.fsdp"})
    assert "seed was 0, is 1" in message
    assert "mesh" not in message  # may differ
    for one, other in ((get("llamagen"), get("mirai_e")), (get("mirai_e"), get("llamagen"))):
        with pytest.raises(ConfigError, match="foresight"):
            compare.check_same_run(one, other, "runs/x")


RESUMABLE = {
    "log_every": 7, "sample_every": 0, "checkpoint_every": 9, "keep_checkpoints": 5, "keep_every": 9,
    "validation_path": "x", "validate_every": 2, "evaluate_every": 2, "evaluate_samples": 9,
    "evaluate_guidance": 3.0, "evaluate_reference": "x", "evaluate_inception": "x",
    "judged_samples": 3, "accumulate": 2, "nonfinite": "skip", "hang_limit": 9, "num_steps": 10_000,
    "profile_steps": [1, 2], "wandb.project": "mirai",
    "data.num_workers": 2, "data.path": "moved", "data.images": "moved", "tokenizer.path": "moved",
    "teacher.path": "moved", "teacher.dtype": "bfloat16", "model.unroll": 1, "model.remat": "full", "model.attention": "xla",
    "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "sample.guidance": 1.0, "sample.interval": 1,
    "sample.temperature": 0.5, "sample.top_k": 9, "sample.top_p": 0.5, "sample.greedy": True,
    "sample.schedule": "linear", "sample.power": 2.0, "sample.cache_dtype": "int8",
    "sample.classes": 2, "sample.per_class": 1, TERM + "checkpoint": "moved",
}  # fmt: skip


def test_fields_that_change_nothing_computed_may_differ():
    old, new = get(), with_fields(get(), RESUMABLE)
    changed = compare.check_same_run(json.loads(compare.to_json(old)), new, "x")
    assert {field: value for field, (_, value) in changed.items()} == RESUMABLE
    names = {field.replace("[0]", "[]") for field in RESUMABLE}
    assert set(fields.resumable(schema.RunConfig)) == names


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer.schedule": "cosine"},
        {TERM + "schedule": ((0.5, 0.5),), TERM + "schedule_unit": "shares"},
    ],
    ids=["learning rate", "weight"],
)
def test_only_what_does_not_depend_on_its_length_lets_a_run_be_prolonged(fields):
    old = with_fields(get(), fields)
    with pytest.raises(ConfigError, match=r"num_steps was .*, is 10000"):
        compare.check_same_run(old, with_fields(old, {"num_steps": 10_000}), "x")
