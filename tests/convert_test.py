"""PyTorch files to converted folders and back, runs to PyTorch files, and all that is refused."""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs import llamagen, mirai_e
from mirai_jax import foresight
from mirai_jax.config import schema
from mirai_jax.data import records
from mirai_jax.models import generator, vit, vq
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.training import restore, train
from mirai_jax.training.checkpoint import restore_weights
from mirai_jax.utils.errors import ConfigError
from mirai_jax.weights import (
    conversion,
    pretrained,
    safetensors,
    state_dict,
    torch_names,
    torch_reader,
    torch_writer,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = {
    "generator": GeneratorConfig(
        num_layers=2, num_heads=2, width=32, vocab_size=24, num_classes=5, grid=(4, 4)
    ),
    "tokenizer": vq.VQConfig(multipliers=(1, 2), width=32, z_channels=16, vocab_size=50),
    "teacher": vit.DinoConfig(width=64, num_layers=2, num_heads=1, registers=1, pos_grid=(2, 2)),
}
OPTIONS = {"generator": {"grid": 4, "num_heads": 2}, "tokenizer": {}, "teacher": {}}
SUFFIXES = (".pt", ".pth", ".safetensors")
DOWNLOADS = {
    "html": (b"<!DOCTYPE html>\n<html>Quota exceeded</html>", "HTML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
    "empty": (b"", "it is empty"),
    "text": (b"weights\nof a network\n", "not a"),
}


def abstract(module, *shape):
    images = jax.ShapeDtypeStruct(shape, np.float32)
    tree = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    return jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), tree)


def shapes_of(kind):
    """{PyTorch name: shape} of a network of CONFIGS."""
    if kind == "generator":
        tree = jax.eval_shape(
            lambda key: generator.init_params(CONFIGS[kind], key), jax.random.key(0)
        )
        tree = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), tree)
        state = torch_names.generator_to_torch(CONFIGS[kind], tree)
    elif kind == "projectors":
        term = foresight.Term(offsets=((0, 0), (0, 1), (1, 0)), projector_width=6)
        tree = jax.eval_shape(
            lambda key: foresight.init_heads(term, 32, 32, key), jax.random.key(0)
        )
        tree = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), tree)
        state = torch_names.projectors_to_torch(tree)
    elif kind == "tokenizer":
        tree = abstract(vq.VQModel(CONFIGS[kind]), 1, 2, 2, 3)
        state = torch_names.vq_to_torch(CONFIGS[kind], tree)
    else:
        tree = abstract(vit.DinoV2(CONFIGS[kind]), 1, 14, 14, 3)
        state = torch_names.dinov2_to_torch(CONFIGS[kind], tree)
    return {name: array.shape for name, array in state.items()}


SHAPES = {kind: shapes_of(kind) for kind in ("generator", "projectors", "tokenizer", "teacher")}


def random_state(kind, seed=0, mixed=False):
    """A state dict of random numbers; `mixed` has every dtype that one may hold."""
    rng = np.random.RandomState(seed)
    dtypes = [ml_dtypes.bfloat16, np.float16, np.float32, np.float64]

    def dtype(name):  # the same in every layer, as in every file
        return dtypes[sum(name.split(".", 2)[-1].encode()) % 4] if mixed else np.float32

    state = {name: rng.normal(size=s).astype(dtype(name)) for name, s in SHAPES[kind].items()}
    if kind == "tokenizer":
        state["quantize.codebook_used"] = np.zeros(65536, np.float32)
    return state


@pytest.fixture(scope="module")
def state():
    return random_state("generator")


def write(path, tree):
    if path.suffix == ".safetensors":
        safetensors.write(path, tree)
    else:
        torch_writer.write(path, tree)
    return str(path)


to_torch = functools.partial(conversion.to_torch, read_run=restore.read_run)


def read(path):
    return state_dict.read_state(path)[0]


def assert_equal(one, other):
    """The same tree, every array of the same dtype, shape and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(function, *arguments, **options):
    """What the ConfigError says, which is always one line."""
    with pytest.raises(ConfigError) as error:
        function(*arguments, **options)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# There and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
@pytest.mark.parametrize("kind", ["generator", "generator with projectors", "tokenizer", "teacher"])
def test_what_comes_back_is_what_was_there_bit_for_bit(tmp_path, kind, mixed):
    name, _, projectors = kind.partition(" with ")
    state = random_state(name, mixed=mixed)
    if projectors:
        state |= random_state("projectors", mixed=mixed)
    assert not mixed or len({array.dtype for array in state.values()}) == 4
    source = write(tmp_path / ("a.safetensors" if mixed else "a.pt"), state)
    made = conversion.from_torch(source, str(tmp_path / "folder"), **OPTIONS[name])
    assert (made.kind, made.config) == (name, CONFIGS[name])
    assert_equal(pretrained.load_converted(tmp_path / "folder").tree, made.tree)
    assert pretrained.load_converted(tmp_path / "folder").config == made.config
    for suffix in SUFFIXES:
        target = tmp_path / f"back{suffix}"
        to_torch(str(tmp_path / "folder"), str(target))
        assert_equal(read(target), state)
        if suffix != ".safetensors":  # as the official scripts read it
            tree = torch_reader.read(target)
            entries = {"teacher": list(state), "generator": ["model", "args"]}
            assert list(tree) == entries.get(name, ["model"])
            inner = tree if name == "teacher" else tree["model"]
            assert type(inner) is collections.OrderedDict
    backs = [f"back{suffix}" for suffix in SUFFIXES]
    assert files_in(tmp_path) == sorted([pathlib.Path(source).name, "folder", *backs])


def test_a_folder_tells_where_it_came_from(tmp_path, state):
    source = write(tmp_path / "c2i.pt", {"model": state, "steps": 300})
    conversion.from_torch(source, str(tmp_path / "new" / "folder"), **OPTIONS["generator"])
    about = json.loads((tmp_path / "new" / "folder" / "model.json").read_text())
    assert about["kind"] == "generator" and about["config"]["grid"] == [4, 4]
    digest = hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest()
    assert about["source"] == {"file": "c2i.pt", "entry": "model", "sha256": digest}


def test_a_tokenizer_without_its_buffer_gets_one(tmp_path):
    state = random_state("tokenizer")
    del state["quantize.codebook_used"]
    conversion.from_torch(write(tmp_path / "a.pt", state), str(tmp_path / "folder"))
    to_torch(str(tmp_path / "folder"), str(tmp_path / "b.pt"))
    back = read(tmp_path / "b.pt")
    assert back.pop("quantize.codebook_used").shape == (65536,)
    assert_equal(back, state)


# What training scripts put around a state dict ----------------------------------------------------


def test_of_several_state_dicts_the_better_is_taken(tmp_path):
    tree = {"steps": 5, "optimizer": {"state": {}}, "opt": None, "args": {}}
    order = ("ema", "model", "module", "state_dict")
    for seed, name in enumerate(reversed(order)):  # in the file, the best comes last
        tree[name] = random_state("generator", seed)
    for seed, name in zip((3, 2, 1, 0), order, strict=True):
        path = write(tmp_path / "a.pt", tree)
        found, entry, _ = state_dict.read_state(path)
        assert entry == name
        assert_equal(found, random_state("generator", seed))
        for other in order[order.index(name) :]:
            assert state_dict.read_state(path, other)[1] == other
        tree[name] = None if seed % 2 else {}  # a run without this one
    told = refused(state_dict.read_state, write(tmp_path / "a.pt", tree))
    assert "holds no state dict" in told and "entries are steps, optimizer, opt, args" in told


def test_the_entry_that_is_asked_for_is_taken(tmp_path, state):
    path = write(tmp_path / "a.pt", {"model": state, "ema_2": random_state("generator", 1)})
    made = conversion.from_torch(path, str(tmp_path / "b"), entry="ema_2", **OPTIONS["generator"])
    assert made.source["entry"] == "ema_2"
    assert_equal(state_dict.to_state(made), random_state("generator", 1))
    told = refused(state_dict.read_state, path, "ema")
    assert "no state dict under 'ema'" in told and "model, ema_2" in told
    # A state dict on its own has no entries, though its names look like some.
    bare = write(tmp_path / "b.pt", {"model": np.zeros(3), "ema": np.zeros(3)})
    assert list(read(bare)) == ["model", "ema"]
    assert "no state dict under 'ema'" in refused(state_dict.read_state, bare, "ema")


@pytest.mark.parametrize("tree", [{}, [], 3, None, {"model": [1, 2]}, {"model": {"a": 1}}])
def test_a_file_without_a_state_dict(tmp_path, tree):
    assert "holds no state dict" in refused(state_dict.read_state, write(tmp_path / "a.pt", tree))


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_prefixes_of_wrappers_are_dropped(tmp_path, state, prefix):
    rotary = {"freqs_cis": np.zeros((17, 8, 2), np.float32)}  # a buffer of some versions
    wrapped = {prefix + name: array for name, array in (state | rotary).items()}
    path = write(tmp_path / "a.pt", {"model": wrapped})
    made = conversion.from_torch(path, str(tmp_path / "b"), **OPTIONS["generator"])
    assert_equal(state_dict.to_state(made), state)
    # Where one name has no prefix it is part of the names.
    path = write(tmp_path / "a.pt", {"model": wrapped | {"norm.weight": state["norm.weight"]}})
    told = refused(conversion.from_torch, path, str(tmp_path / "c"), **OPTIONS["generator"])
    assert f"its names begin {prefix}" in told


# What only the generator needs --------------------------------------------------------------------


def save_with_namespace(path, state, arguments):
    """As official training does: {'model': ..., 'args': argparse.Namespace}."""
    write(path, {"model": state, "args": arguments})
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    key = pickle.dumps("args", 2)[2:-1]
    before, _, after = entries["archive/data.pkl"].rpartition(key)
    assert after.endswith(b"uu.")  # ends the arguments, the file's dictionary and the pickle
    made = b"cargparse\nNamespace\n)\x81"
    entries["archive/data.pkl"] = before + key + made + after[:-2] + b"b" + after[-2:]
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in entries.items():
            archive.writestr(name, raw)
    return str(path)


@pytest.mark.parametrize(
    "arguments, grid, expected",
    [
        ({"image_size": 384, "downsample_size": 16, "gpt_model": "GPT-B"}, 0, 24),
        ({"image_size": "128", "downsample_size": 8}, 0, 16),
        ({"image_size": 384, "downsample_size": 16}, 5, 5),
        ({"image_size": 384}, 0, 16),
        ({"image_size": 384, "downsample_size": 0}, 0, 16),
        ({"image_size": None, "downsample_size": 16}, 0, 16),
        ({"image_size": float("inf"), "downsample_size": 16}, 0, 16),
        ({"image_size": float("nan"), "downsample_size": 16}, 0, 16),
        ({"image_size": [256, 256], "downsample_size": 16}, 0, 16),
    ],
)
def test_the_grid_is_what_the_arguments_say(tmp_path, state, arguments, grid, expected):
    source = save_with_namespace(tmp_path / "a.pt", state, arguments)
    assert torch_reader.read(source)["args"].keys() == arguments.keys()
    made = conversion.from_torch(source, str(tmp_path / "b"), grid=grid, num_heads=2)
    assert made.config.grid == (expected, expected)
    assert pretrained.load_converted(tmp_path / "b").config.grid == (expected, expected)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("classes, class_dropout", [(5, 0.1), (6, 0.0)])
def test_a_file_keeps_what_weights_do_not_tell(tmp_path, state, suffix, classes, class_dropout):
    """The grid, and whether the last row of the label table is a class or the null class."""
    config = dataclasses.replace(
        CONFIGS["generator"], grid=(3, 8), num_classes=classes, class_dropout=class_dropout
    )
    params = torch_names.generator_from_torch(config, state)
    pretrained.save(tmp_path / "a", pretrained.Weights("generator", config, params))
    to_torch(str(tmp_path / "a"), str(tmp_path / f"b.{suffix}"))
    back = conversion.from_torch(str(tmp_path / f"b.{suffix}"), str(tmp_path / "c"))
    assert back.config == config and "grid" not in back.source
    assert_equal(read(tmp_path / f"b.{suffix}"), state)


def test_an_assumed_grid_is_told(tmp_path, state):
    made = conversion.from_torch(write(tmp_path / "a.pt", state), str(tmp_path / "b"), num_heads=2)
    assert made.config.grid == (16, 16) and "16 x 16 is assumed" in conversion.describe(made)
    assert pretrained.load_converted(tmp_path / "b").source["grid"] == "assumed"
    made = conversion.from_torch(str(tmp_path / "a.pt"), str(tmp_path / "c"), num_heads=2, grid=16)
    assert "assumed" not in conversion.describe(made)


def test_a_grid_of_nothing_is_refused(tmp_path, state):
    source = write(tmp_path / "a.pt", state)
    assert "--grid is -1" in refused(conversion.from_torch, source, str(tmp_path / "b"), grid=-1)
    assert files_in(tmp_path) == ["a.pt"]


def test_an_unknown_size_needs_its_number_of_heads(tmp_path, state):
    source = write(tmp_path / "a.pt", state)
    told = refused(conversion.from_torch, source, str(tmp_path / "b"))
    assert "a generator of 2 layers and width 32" in told and "num_heads" in told
    for wrong in (3, 5, 64, -2, 16):  # 16: heads of 2 have no rotary pairs for rows and columns
        told = refused(conversion.from_torch, source, str(tmp_path / "b"), num_heads=wrong)
        assert f"num_heads is {wrong}" in told
    assert files_in(tmp_path) == ["a.pt"]
    assert conversion.from_torch(source, str(tmp_path / "b"), num_heads=8).config.num_heads == 8


def test_published_sizes_know_their_number_of_heads():
    layers, heads, width = generator.SIZES["B"]
    state = {f"layers.{i}.norm": np.zeros(()) for i in range(layers)}
    state["tok_embeddings.weight"] = np.broadcast_to(np.float32(0), (16384, width))
    state["cls_embedding.embedding_table.weight"] = np.broadcast_to(np.float32(0), (1001, width))
    # Refused for its other names alone, which are those of the published size.
    told = refused(state_dict.from_state, state, {"file": "x.pt"})
    assert "num_heads" not in told and f"layers.{layers - 1}.attention.wo.weight" in told


# What is refused, and leaves nothing --------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("what", DOWNLOADS)
def test_a_download_gone_wrong_is_told(tmp_path, what, suffix):
    raw, expected = DOWNLOADS[what]
    source = tmp_path / f"weights{suffix}"
    source.write_bytes(raw)
    told = refused(conversion.from_torch, str(source), str(tmp_path / "new"))
    assert told.startswith(str(source)) and expected in told
    assert files_in(tmp_path) == [source.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_file_is_told(tmp_path, state, suffix):
    source = tmp_path / f"weights{suffix}"
    write(source, state)
    source.write_bytes(source.read_bytes()[:-100])
    told = refused(
        conversion.from_torch, str(source), str(tmp_path / "new"), **OPTIONS["generator"]
    )
    assert told.startswith(str(source)) and ("truncated" in told or "damaged" in told)
    assert files_in(tmp_path) == [source.name]


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_nothing_inside_a_file_is_run(tmp_path):
    source = tmp_path / "a.pt"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": Evil(tmp_path / "ran")}, 2))
    told = refused(conversion.from_torch, str(source), str(tmp_path / "new"))
    assert "it names" in told
    assert files_in(tmp_path) == ["a.pt"]


def test_what_is_not_there_or_already_there(tmp_path, state):
    source = write(tmp_path / "a.pt", state)
    nowhere = str(tmp_path / "nowhere.pt")
    assert "nowhere.pt cannot be read" in refused(
        conversion.from_torch, nowhere, str(tmp_path / "b")
    )
    taken = tmp_path / "taken"
    taken.mkdir()
    for target in (taken, source):
        assert "exists; it must be a new folder" in refused(
            conversion.from_torch, source, str(target), **OPTIONS["generator"]
        )
    conversion.from_torch(source, str(tmp_path / "folder"), **OPTIONS["generator"])
    folder, before = str(tmp_path / "folder"), pathlib.Path(source).read_bytes()
    assert "exists; it must be a new file" in refused(to_torch, folder, source)
    assert pathlib.Path(source).read_bytes() == before
    for wrong in ("b.bin", "b", "b.PT", "b.pt.gz", ".pt"):
        told = refused(to_torch, folder, str(tmp_path / wrong))
        assert told.endswith(f"{wrong}: it must end in .pt, .pth or .safetensors")
    told = refused(to_torch, str(taken), str(tmp_path / "new" / "b.pt"))
    assert f"SOURCE is {str(taken)!r}, not the workdir of a run" in told
    told = refused(pretrained.load, "tokenizer.path", str(taken), "tokenizer")
    assert told.startswith(f"tokenizer.path is {str(taken)!r}: ") and "convert" in told
    assert files_in(tmp_path) == ["a.pt", "folder", "taken"] and not files_in(taken)


def test_a_damaged_folder_is_told(tmp_path, state):
    folder = tmp_path / "folder"
    source = write(tmp_path / "a.pt", state)
    conversion.from_torch(source, str(folder), **OPTIONS["generator"])
    about = folder / "model.json"
    whole = about.read_text()
    changed = [json.loads(whole) for _ in range(3)]
    changed[0]["kind"] = "optimizer"
    changed[1]["config"]["depth"] = 2
    del changed[2]["source"]
    for text in ("", "{", "[]", "3", *map(json.dumps, changed)):
        about.write_text(text)
        told = refused(to_torch, str(folder), str(tmp_path / "b.pt"))
        assert told.startswith(f"{folder} is not a whole converted folder (")
    about.write_text(whole)
    to_torch(str(folder), str(tmp_path / "whole.pt"))
    for file in (folder / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:9])
    told = refused(to_torch, str(folder), str(tmp_path / "b.pt"))
    assert told.startswith(f"{folder} is not a whole converted folder (")
    assert files_in(tmp_path) == ["a.pt", "folder", "whole.pt"]


def test_a_folder_that_cannot_be_ended_is_not_begun(tmp_path, state):
    made = state_dict.from_state(state, {"file": object()}, num_heads=2)  # no JSON
    with pytest.raises(TypeError):
        pretrained.save(tmp_path / "folder", made)
    assert files_in(tmp_path) == []


def test_a_network_that_is_none_of_the_three(tmp_path):
    source = write(tmp_path / "a.pt", {"conv1.weight": np.zeros(3), "fc.bias": np.zeros(2)})
    told = refused(conversion.from_torch, source, str(tmp_path / "b"))
    assert told.startswith("a.pt is none of") and told.endswith("conv1.weight, fc.bias")
    # Text to image: without a table of classes.
    state = random_state("generator")
    del state["cls_embedding.embedding_table.weight"]
    told = refused(conversion.from_torch, write(tmp_path / "c.pt", state), str(tmp_path / "b"))
    assert "not a class-conditional LlamaGen generator" in told
    assert files_in(tmp_path) == ["a.pt", "c.pt"]


ALL_NAMES = [name for kind in ("generator", "tokenizer", "teacher") for name in SHAPES[kind]]


TABLE = "cls_embedding.embedding_table.weight"


@settings(deadline=None, max_examples=50)
@example("generator", {TABLE: ()}, 2)
@example("generator", {TABLE: (6,)}, 2)
@example("tokenizer", {"encoder.conv_blocks.0.res.0.conv1.weight": None}, 0)
@example("tokenizer", {"encoder.conv_out.weight": ()}, 0)
@example("tokenizer", {"quantize.embedding.weight": (50, 0)}, 0)
@given(
    st.sampled_from(["generator", "generator", "tokenizer", "teacher"]),
    st.dictionaries(
        st.sampled_from(ALL_NAMES) | st.text(max_size=5),
        st.none() | st.lists(st.integers(0, 65), max_size=5).map(tuple),
        max_size=4,
    ),
    st.integers(-3, 40),
)
def test_any_state_dict_is_a_network_or_refused_in_one_line(kind, changes, num_heads):
    shapes = SHAPES[kind] | changes
    state = {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items() if s is not None}
    try:
        made = state_dict.from_state(state, {"file": "a.pt"}, num_heads=num_heads)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert made.kind in CONFIGS


# What takes weights -------------------------------------------------------------------------------


def test_weights_of_another_kind_are_refused(tmp_path, state):
    paths = {kind: write(tmp_path / f"{kind}.pt", random_state(kind)) for kind in CONFIGS}
    conversion.from_torch(paths["teacher"], str(tmp_path / "folder"))
    for kind, path in [*paths.items(), ("teacher", str(tmp_path / "folder"))]:
        for wanted in CONFIGS:
            load = lambda wanted=wanted, path=path: pretrained.load(
                "a.b", path, wanted, num_heads=1
            )
            if kind == wanted:
                assert load().kind == kind
            else:
                assert refused(load) == f"a.b is {path!r}, a {kind}; it must be a {wanted}"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_numbers_that_are_not_finite_are_refused(tmp_path, state, bad, dtype):
    array = state["layers.1.attention.wo.weight"].astype(dtype)
    array[3, 4] = bad
    changed = {name: value.astype(dtype) for name, value in state.items()}
    source = write(tmp_path / "a.pt", changed | {"layers.1.attention.wo.weight": array})
    told = refused(pretrained.load, "x", source, "generator", num_heads=2)
    assert told.endswith("whose layers/attention/wo/kernel has numbers that are not finite")


def test_the_checksum_is_of_the_numbers(tmp_path, state):
    paths = [write(tmp_path / f"a{suffix}", state) for suffix in SUFFIXES]
    conversion.from_torch(paths[0], str(tmp_path / "folder"), **OPTIONS["generator"])

    def checksum(path):
        return pretrained.checksum(pretrained.load("x", str(path), "generator", num_heads=2).params)

    (same,) = {checksum(path) for path in [*paths, tmp_path / "folder"]}
    assert len(same) == 64
    others = []
    for name, place in (("output.weight", (7, 3)), ("layers.1.ffn_norm.weight", (0,))):
        changed = state | {name: state[name].copy()}
        changed[name][place] = np.nextafter(changed[name][place], np.float32(9))
        others.append(checksum(write(tmp_path / "b.pt", changed)))
    swapped = state | {"norm.weight": state["norm.weight"][::-1].copy()}
    others.append(checksum(write(tmp_path / "c.safetensors", swapped)))
    assert len({same, *others}) == 4
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in state.items()}
    wide = {name: array.astype(np.float32) for name, array in halves.items()}
    one, other = write(tmp_path / "d.pt", halves), write(tmp_path / "e.pt", wide)
    assert checksum(one) == checksum(other) != same
    # The same numbers in the same order, under another name or in another shape.
    tree = {"a": {"b": np.arange(6, dtype=np.float32)}}
    other = {"a": {"c": tree["a"]["b"]}}, {"a": {"b": tree["a"]["b"].reshape(2, 3)}}
    assert len({pretrained.checksum(t) for t in (tree, *other)}) == 3


# Runs ---------------------------------------------------------------------------------------------


def train_on(folder, module, name, **term):
    """Trains for two steps on random codes of a 4x4 grid."""
    run = module.get_config("imagenet_b")
    run.update(num_steps=2, batch_size=8, log_every=1, checkpoint_every=2)
    run.model.update(
        size="", num_layers=2, num_heads=2, width=32, vocab_size=16, num_classes=4, grid=(4, 4)
    )
    run.tokenizer.image_size = 64
    run.sample.classes = 4
    run.data.update(path=str(folder), num_workers=0)
    if run.foresight:
        run.foresight[0].update(projector_width=16, start_epoch=0.0, **term)
    lines = []
    train.train(run, folder / name, devices=jax.devices()[:1], log=lines.append)
    return run, lines


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run without foresight; converted; a run that it teaches."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.RandomState(0)
    codes = rng.randint(0, 16, (40, 10, 16)).astype(np.uint16)
    packed = (records.pack_record(one, k % 4, f"{k}") for k, one in enumerate(codes))
    records.write_shard(folder / "codes-0.array_record", packed)
    train_on(folder, llamagen, "plain")
    to_torch(str(folder / "plain"), str(folder / "plain.pt"))
    conversion.from_torch(
        str(folder / "plain.pt"), str(folder / "plain_folder"), **OPTIONS["generator"]
    )
    teacher = {"source": "checkpoint", "checkpoint": str(folder / "plain_folder")}
    run, lines = train_on(folder, mirai_e, "taught", **teacher)
    (folder / "lines.txt").write_text("\n".join(lines))
    return folder, schema.read(run, num_devices=1)


def saved(folder):
    return restore_weights(folder / "checkpoints")[0]


def test_a_run_goes_to_pytorch_and_back(runs, tmp_path):
    folder, _ = runs
    state = saved(folder / "taught")
    trained, average = state["params"]["generator"], state["ema"]
    assert not np.array_equal(trained["norm"]["scale"], average["norm"]["scale"])

    def there_and_back(name, **options):
        target = str(tmp_path / name)
        to_torch(str(folder / "taught"), target, **options)
        made = conversion.from_torch(target, f"{target}_folder", **OPTIONS["generator"])
        assert (made.config.num_layers, made.config.vocab_size) == (2, 16)
        return pretrained.load_converted(f"{target}_folder")

    assert_equal(there_and_back("ema.pt").tree, {"params": average})
    assert_equal(there_and_back("model.pth", state="model").params, trained)
    both = there_and_back("both.safetensors", state="model", projectors="checkpoint")
    assert_equal(both.params, trained)
    assert_equal(both.projectors, state["params"]["foresight"]["checkpoint"])
    names = list(torch_reader.read(tmp_path / "ema.pt")["model"])
    assert not any(name.startswith("projectors.") for name in names)


def test_projectors_of_another_term_are_refused(runs, tmp_path):
    folder, _ = runs
    target = str(tmp_path / "a.pt")
    taught, plain = str(folder / "taught"), str(folder / "plain")
    told = refused(to_torch, taught, target, state="model", projectors="ema")
    assert told.startswith("--projectors is 'ema'") and told.endswith(": checkpoint")
    told = refused(to_torch, plain, target, state="model", projectors="ema")
    assert told.endswith("this run has none")
    told = refused(to_torch, taught, target, projectors="checkpoint")
    assert "--projectors is 'checkpoint'" in told and "--state=model" in told
    assert files_in(tmp_path) == []


def test_a_run_without_a_checkpoint_is_told(runs, tmp_path):
    folder, _ = runs
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.json").write_bytes((folder / "plain" / "config.json").read_bytes())
    told = refused(to_torch, str(begun), str(tmp_path / "a.pt"))
    assert told == f"SOURCE is {str(begun)!r}, a run without a checkpoint yet"
    assert files_in(tmp_path) == ["begun"]


def test_converted_weights_teach_as_the_run_they_are_of(runs):
    folder, student = runs
    average = saved(folder / "plain")["ema"]
    for name in ("plain", "plain_folder"):
        made, params = restore.load_generator("f", str(folder / name), student, None)
        assert (made.num_layers, made.num_heads, made.grid) == (2, 2, (4, 4))
        assert_equal(params, average)
    told = (folder / "lines.txt").read_text()
    assert f"teacher: generator of {folder / 'plain_folder'}, 2 layers of 32" in told
    made, params = restore.load_generator("f", str(folder / "plain.pt"), student, None)
    assert made.num_heads == 2
    assert_equal(params, average)
    # A file of others does not tell the heads of an unknown size.
    file = write(folder / "bare.pt", read(folder / "plain.pt"))
    told = refused(restore.load_generator, "f", file, student, None)
    assert told.startswith(f"f is {file!r}") and "num_heads" in told


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grid": (2, 8)}, "model.grid is (2, 8); it must be (4, 4)"),
        ({"num_classes": 3}, "model.num_classes is 3; it must be 4"),
        ({"vocab_size": 15}, "model.vocab_size is 15; it must be 16"),
    ],
)
def test_a_teacher_of_other_tokens_is_refused(runs, tmp_path, change, message):
    folder, student = runs
    about = json.loads((folder / "plain_folder" / "model.json").read_text())
    made = pretrained.load_converted(folder / "plain_folder")
    other = GeneratorConfig(**(about["config"] | {"grid": (4, 4)} | change))
    pretrained.save(tmp_path / "a", pretrained.Weights("generator", other, made.params, None, {}))
    assert message in refused(restore.load_generator, "f", str(tmp_path / "a"), student, None)


# The program --------------------------------------------------------------------------------------


def program(folder, *arguments):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "mirai_jax.convert", *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_program_both_ways(tmp_path, state):
    write(tmp_path / "a.pt", {"model": state | random_state("projectors")})
    done = program(tmp_path, "a.pt", "new/folder", "--num_heads=2", "--grid=4")
    assert done.returncode == 0, done.stderr
    count = sum(array.size for array in state.values())
    more = sum(array.size for array in random_state("projectors").values())
    first, second, third = done.stdout.splitlines()
    assert first == f"generator (model): {count:,} parameters, {more:,} more in 3 projectors"
    assert second.startswith("GeneratorConfig(num_layers=2, num_heads=2, width=32")
    assert third.startswith("written: new/folder (")
    done = program(tmp_path, "new/folder", "files/b.safetensors")
    assert done.returncode == 0 and "written: files/b.safetensors" in done.stdout
    assert_equal(read(tmp_path / "files" / "b.safetensors"), state | random_state("projectors"))


def test_the_program_ends_in_one_line_where_it_cannot(tmp_path):
    (tmp_path / "a.pt").write_bytes(DOWNLOADS["html"][0])
    for arguments, expected in (
        (("a.pt", "new/folder"), "error: a.pt: it is an HTML page: the download went wrong"),
        (("a.pt",), "error: give SOURCE and TARGET; --help says more"),
    ):
        done = program(tmp_path, *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.splitlines() == [expected]
    assert files_in(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("kind", ["generator", "tokenizer", "teacher"])
def test_torch_reads_what_is_written(tmp_path, kind):
    torch = pytest.importorskip("torch")
    state = random_state(kind, mixed=True)
    source = write(tmp_path / "a.safetensors", state)
    conversion.from_torch(source, str(tmp_path / "folder"), **OPTIONS[kind])
    to_torch(str(tmp_path / "folder"), str(tmp_path / "b.pt"))
    tree = torch.load(tmp_path / "b.pt", weights_only=True)
    loaded = tree if kind == "teacher" else tree["model"]
    assert set(loaded) == set(state)
    for name, tensor in loaded.items():
        assert str(tensor.dtype) == f"torch.{state[name].dtype}"
        np.testing.assert_array_equal(tensor.double().numpy(), state[name].astype(np.float64))
