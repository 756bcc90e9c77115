"""PyTorch files to converted folders and back, runs to PyTorch files, and all that is refused."""

import collections
import dataclasses
import functools
import hashlib
import os
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs import mirai_e
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
    "teacher": vit.VitConfig(width=64, num_layers=2, num_heads=1, registers=1, pos_grid=(2, 2)),
}
OPTIONS = {"generator": {"grid": 4, "num_heads": 2}, "tokenizer": {}, "teacher": {}}
SUFFIXES = (".pt", ".pth", ".safetensors")


def shapes_of(kind):
    """{PyTorch name: shape} of a network of CONFIGS, or of projectors."""
    key, config, names = jax.random.key(0), CONFIGS.get(kind), torch_names.to_torch
    if kind == "generator":
        make = lambda: generator.init_params(config, key)
    elif kind == "projectors":
        term = foresight.Term(offsets=((0, 0), (0, 1), (1, 0)), projector_width=6)
        make = lambda: foresight.init_heads(term, 32, 32, key)
        names = lambda _, tree: torch_names.projectors_to_torch(tree)
    else:
        module, side = (
            (vq.VQModel(config), 2) if kind == "tokenizer" else (vit.VisionTransformer(config), 14)
        )
        make = lambda: module.init(key, np.zeros((1, side, side, 3), np.float32))["params"]
    tree = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), jax.eval_shape(make))
    return {name: array.shape for name, array in names(config, tree).items()}


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
    """The message of the ConfigError, which is always one line."""
    with pytest.raises(ConfigError) as error:
        function(*arguments, **options)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


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
    digest = hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest()
    assert made.source == {"file": os.path.basename(source), "entry": "", "sha256": digest}
    loaded = pretrained.load_converted(tmp_path / "folder")
    assert_equal(loaded.tree, made.tree)
    assert (loaded.kind, loaded.config, loaded.source) == (made.kind, made.config, made.source)
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


def test_of_several_state_dicts_the_better_is_taken(tmp_path):
    order = ("ema", "model", "module", "state_dict")
    tree = {"steps": 5, "optimizer": {"state": {}}, "opt": None}
    tree |= {name: {"a": np.full(2, k)} for k, name in reversed(list(enumerate(order)))}
    for k, name in enumerate(order):
        path = write(tmp_path / "a.pt", tree)
        found, entry, _ = state_dict.read_state(path)
        assert entry == name and found["a"][0] == k
        assert state_dict.read_state(path, "state_dict")[1] == "state_dict"
        tree[name] = None if k % 2 else {}  # a run without this one
    for other in (tree, {}, 3):
        path = write(tmp_path / "a.pt", other)
        assert refused(state_dict.read_state, path).startswith(path)


def test_the_requested_entry_is_taken(tmp_path, state):
    path = write(tmp_path / "a.pt", {"model": state, "ema_2": random_state("generator", 1)})
    made = conversion.from_torch(path, str(tmp_path / "b"), entry="ema_2", **OPTIONS["generator"])
    assert made.source["entry"] == "ema_2"
    assert_equal(state_dict.to_state(made), random_state("generator", 1))
    assert "'ema'" in refused(state_dict.read_state, path, "ema")
    # A bare state dict has no entries, though its names look like some.
    bare = write(tmp_path / "b.pt", {"model": np.zeros(3), "ema": np.zeros(3)})
    assert list(read(bare)) == ["model", "ema"]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_dropped(tmp_path, state, prefix):
    rotary = {"freqs_cis": np.zeros((17, 8, 2), np.float32)}  # a buffer of some versions
    wrapped = {prefix + name: array for name, array in (state | rotary).items()}
    path = write(tmp_path / "a.pt", {"model": wrapped})
    made = conversion.from_torch(path, str(tmp_path / "b"), **OPTIONS["generator"])
    assert_equal(state_dict.to_state(made), state)


@pytest.mark.parametrize(
    "arguments, grid, expected",
    [
        ({"image_size": "384", "downsample_size": 16, "gpt_model": "GPT-B"}, 0, 24),
        ({"image_size": 384, "downsample_size": 16}, 5, 5),
        ({"image_size": None, "downsample_size": 16}, 0, 16),
    ],
)
def test_the_grid_is_what_the_arguments_say(tmp_path, state, arguments, grid, expected):
    source = write(tmp_path / "a.pt", {"model": state, "args": arguments})
    made = conversion.from_torch(source, str(tmp_path / "b"), grid=grid, num_heads=2)
    assert made.config.grid == (expected, expected)
    assert pretrained.load_converted(tmp_path / "b").config.grid == (expected, expected)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("classes, class_dropout", [(5, 0.1), (6, 0.0)])
def test_a_file_keeps_what_weights_do_not_show(tmp_path, state, suffix, classes, class_dropout):
    """The grid, and whether the last row of the label table is a class or the null class."""
    config = dataclasses.replace(
        CONFIGS["generator"], grid=(3, 8), num_classes=classes, class_dropout=class_dropout
    )
    params = torch_names.from_torch(config, state)
    pretrained.save(tmp_path / "a", pretrained.Weights("generator", config, params))
    to_torch(str(tmp_path / "a"), str(tmp_path / f"b.{suffix}"))
    back = conversion.from_torch(str(tmp_path / f"b.{suffix}"), str(tmp_path / "c"))
    assert back.config == config and "grid" not in back.source
    assert_equal(read(tmp_path / f"b.{suffix}"), state)


def test_an_unknown_size_needs_its_number_of_heads(tmp_path, state):
    source = write(tmp_path / "a.pt", state)
    for wrong in (0, -2, 16):  # 16: heads of 2 have no rotary pairs for rows and columns
        message = refused(conversion.from_torch, source, str(tmp_path / "b"), num_heads=wrong)
        assert f"num_heads is {wrong}" in message
    assert files_in(tmp_path) == ["a.pt"]
    made = conversion.from_torch(source, str(tmp_path / "b"), num_heads=2)
    assert made.config.grid == (16, 16) and "assumed" in conversion.describe(made)
    assert pretrained.load_converted(tmp_path / "b").source["grid"] == "assumed"


def test_published_sizes_know_their_number_of_heads():
    layers, heads, width = generator.SIZES["B"]
    state = {f"layers.{i}.norm": np.zeros(()) for i in range(layers)}
    state["tok_embeddings.weight"] = np.broadcast_to(np.float32(0), (16384, width))
    state["cls_embedding.embedding_table.weight"] = np.broadcast_to(np.float32(0), (1001, width))
    # Refused for its other names alone, which are those of the published size.
    message = refused(state_dict.from_state, state, {"file": "x.pt"})
    assert "num_heads" not in message and f"layers.{layers - 1}.attention.wo.weight" in message


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_download_gone_wrong_is_named(tmp_path, state, suffix):
    source = tmp_path / f"weights{suffix}"
    whole = pathlib.Path(write(source, state)).read_bytes()
    files = {
        b"<!DOCTYPE html>\n<html>Quota exceeded</html>": "HTML page",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n": "Git LFS",
        b"": "",
        whole[:-100]: "",
    }
    for raw, expected in files.items():
        source.write_bytes(raw)
        message = refused(conversion.from_torch, str(source), str(tmp_path / "new"))
        assert message.startswith(f"{source}: ") and expected in message
    assert files_in(tmp_path) == [source.name]


def test_what_is_not_there_or_already_there(tmp_path, state):
    source, folder, taken = write(tmp_path / "a.pt", state), tmp_path / "folder", tmp_path / "taken"
    taken.mkdir()
    for a, b in ((str(tmp_path / "nowhere.pt"), folder), (source, taken), (source, source)):
        refused(conversion.from_torch, a, str(b), **OPTIONS["generator"])
    conversion.from_torch(source, str(folder), **OPTIONS["generator"])
    before = pathlib.Path(source).read_bytes()
    for wrong in ("a.pt", "b.bin", "b"):
        assert wrong in refused(to_torch, str(folder), str(tmp_path / wrong))
    assert pathlib.Path(source).read_bytes() == before
    assert "SOURCE is " in refused(to_torch, str(taken), str(tmp_path / "new" / "b.pt"))
    message = refused(pretrained.load, "tokenizer.path", str(taken), "tokenizer")
    assert message.startswith(f"tokenizer.path is {str(taken)!r}: ")
    assert files_in(tmp_path) == ["a.pt", "folder", "taken"] and not files_in(taken)


def test_a_damaged_folder_is_named(tmp_path, state):
    folder = tmp_path / "folder"
    conversion.from_torch(write(tmp_path / "a.pt", state), str(folder), **OPTIONS["generator"])
    whole = (folder / "model.json").read_text()
    for text in ("", "[]", whole.replace("generator", "optimizer"), whole):
        (folder / "model.json").write_text(text)
        for file in (folder / "params").rglob("*") if text == whole else ():
            if file.is_file():
                file.write_bytes(file.read_bytes()[:9])
        message = refused(to_torch, str(folder), str(tmp_path / "b.pt"))
        assert message.startswith(f"{folder} is not a whole converted folder (")
    assert files_in(tmp_path) == ["a.pt", "folder"]


def test_a_folder_that_cannot_be_ended_is_not_begun(tmp_path, state):
    made = state_dict.from_state(state, {"file": object()}, num_heads=2)  # no JSON
    with pytest.raises(TypeError):
        pretrained.save(tmp_path / "folder", made)
    assert files_in(tmp_path) == []


def test_a_network_that_is_none_of_the_three(tmp_path):
    text_to_image = random_state("generator")
    del text_to_image["cls_embedding.embedding_table.weight"]
    for state in ({"conv1.weight": np.zeros(3)}, text_to_image):
        source = write(tmp_path / "a.pt", state)
        assert "a.pt: " in refused(conversion.from_torch, source, str(tmp_path / "b"))
    assert files_in(tmp_path) == ["a.pt"]


ALL_NAMES = [name for kind in ("generator", "tokenizer", "teacher") for name in SHAPES[kind]]
TABLE = "cls_embedding.embedding_table.weight"


@settings(deadline=None, max_examples=50)
@example("generator", {TABLE: ()}, 2)
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


def test_weights_of_another_kind_are_refused(tmp_path, state):
    paths = {kind: write(tmp_path / f"{kind}.pt", random_state(kind)) for kind in CONFIGS}
    conversion.from_torch(paths["teacher"], str(tmp_path / "folder"))
    for kind, path in [*paths.items(), ("teacher", str(tmp_path / "folder"))]:
        for wanted in CONFIGS:
            if kind == wanted:
                assert pretrained.load("a.b", path, wanted, num_heads=1).kind == kind
            else:
                message = refused(pretrained.load, "a.b", path, wanted, num_heads=1)
                assert message.startswith(f"a.b is {path!r}, a {kind}")


@pytest.mark.parametrize("dtype, bad", [(np.float32, np.nan), (ml_dtypes.bfloat16, -np.inf)])
def test_numbers_that_are_not_finite_are_refused(tmp_path, state, dtype, bad):
    array = state["layers.1.attention.wo.weight"].astype(dtype)
    array[3, 4] = bad
    changed = {name: value.astype(dtype) for name, value in state.items()}
    source = write(tmp_path / "a.pt", changed | {"layers.1.attention.wo.weight": array})
    message = refused(pretrained.load, "x", source, "generator", num_heads=2)
    assert message.endswith("whose layers/attention/wo/kernel has numbers that are not finite")


def test_the_checksum_is_of_the_numbers(tmp_path, state):
    paths = [write(tmp_path / f"a{suffix}", state) for suffix in SUFFIXES]
    conversion.from_torch(paths[0], str(tmp_path / "folder"), **OPTIONS["generator"])

    def checksum(path):
        return pretrained.checksum(pretrained.load("x", str(path), "generator", num_heads=2).params)

    (same,) = {checksum(path) for path in [*paths, tmp_path / "folder"]}
    changed = state | {"output.weight": state["output.weight"].copy()}
    changed["output.weight"][7, 3] = np.nextafter(changed["output.weight"][7, 3], np.float32(9))
    assert checksum(write(tmp_path / "b.pt", changed)) != same
    # The same numbers in the same order, under another name or in another shape.
    tree = {"a": {"b": np.arange(6, dtype=np.float32)}}
    other = {"a": {"c": tree["a"]["b"]}}, {"a": {"b": tree["a"]["b"].reshape(2, 3)}}
    assert len({pretrained.checksum(t) for t in (tree, *other)}) == 3


# Runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two steps on random codes, and the run in every other form."""
    folder = tmp_path_factory.mktemp("runs")
    codes = np.random.RandomState(0).randint(0, 16, (40, 10, 16)).astype(np.uint16)
    packed = (records.pack_record(one, k % 4, f"{k}") for k, one in enumerate(codes))
    records.write_shard(folder / "codes-0.array_record", packed)
    config = mirai_e.get_config("imagenet_b")
    config.update(num_steps=2, batch_size=8, log_every=1, checkpoint_every=2)
    config.model.update(
        size="", num_layers=2, num_heads=2, width=32, vocab_size=16, num_classes=4, grid=(4, 4)
    )
    config.tokenizer.image_size = 64
    config.sample.classes = 4
    config.data.update(path=str(folder), num_workers=0)
    config.foresight[0].update(projector_width=16, start_epoch=0.0)
    train.train(config, folder / "run", devices=jax.devices()[:1], log=lambda line: None)
    to_torch(str(folder / "run"), str(folder / "run.pt"))
    conversion.from_torch(str(folder / "run.pt"), str(folder / "converted"))
    return (
        folder,
        schema.read(config, num_devices=1),
        restore_weights(folder / "run/checkpoints")[0],
    )


def test_a_run_goes_to_pytorch_and_back(run, tmp_path):
    folder, _, state = run
    trained, average = state["params"]["generator"], state["ema"]
    assert not np.array_equal(trained["norm"]["scale"], average["norm"]["scale"])

    def there_and_back(name, **options):
        target = str(tmp_path / name)
        to_torch(str(folder / "run"), target, **options)
        conversion.from_torch(target, f"{target}_folder", **OPTIONS["generator"])
        return pretrained.load_converted(f"{target}_folder")

    assert_equal(there_and_back("ema.pt").tree, {"params": average})
    assert_equal(there_and_back("model.pth", state="model").params, trained)
    both = there_and_back("both.safetensors", state="model", projectors="ema")
    assert_equal(both.params, trained)
    assert_equal(both.projectors, state["params"]["foresight"]["ema"])
    names = list(torch_reader.read(tmp_path / "ema.pt")["model"])
    assert not any(name.startswith("projectors.") for name in names)


def test_projectors_of_another_term_are_refused(run, tmp_path):
    for options in ({"state": "model", "projectors": "other"}, {"projectors": "ema"}):
        message = refused(to_torch, str(run[0] / "run"), str(tmp_path / "a.pt"), **options)
        assert message.startswith(f"--projectors is {options['projectors']!r}")
    assert files_in(tmp_path) == []


def test_converted_weights_teach_as_the_run_they_are_of(run):
    folder, student, state = run
    for name in ("run", "converted", "run.pt"):
        made, saved = restore.load_generator("f", str(folder / name), student, None)
        assert (made.num_layers, made.num_heads, made.grid) == (2, 2, (4, 4))
        assert_equal(saved["ema"], state["ema"])


def test_a_teacher_of_other_tokens_is_refused(run, tmp_path):
    folder, student, _ = run
    made = pretrained.load_converted(folder / "converted")
    for change in ({"grid": (2, 8)}, {"num_classes": 3}, {"vocab_size": 15}):
        (name,) = change
        other = dataclasses.replace(made, config=dataclasses.replace(made.config, **change))
        pretrained.save(tmp_path / name, other)
        message = refused(restore.load_generator, "f", str(tmp_path / name), student, None)
        assert f"model.{name} is " in message


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
    count = sum(array.size for array in (state | random_state("projectors")).values())
    first, second, third = done.stdout.splitlines()
    assert first == f"generator (model): {count:,} parameters, with those of 3 projectors"
    assert second.startswith("GeneratorConfig(num_layers=2, num_heads=2, width=32")
    assert third.startswith("written: new/folder (")
    done = program(tmp_path, "new/folder", "files/b.safetensors")
    assert done.returncode == 0 and "written: files/b.safetensors" in done.stdout
    assert_equal(read(tmp_path / "files" / "b.safetensors"), state | random_state("projectors"))


def test_the_program_ends_in_one_line_where_it_cannot(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"<!DOCTYPE html>")
    done = program(tmp_path, "a.pt", "new/folder")
    assert (done.returncode, done.stdout) == (1, "") and files_in(tmp_path) == ["a.pt"]
    assert done.stderr.startswith("error: a.pt: ") and done.stderr.count("\n") == 1


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
