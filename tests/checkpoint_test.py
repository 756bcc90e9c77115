"""Checkpoints: found again bit for bit under any mesh, damage noticed whatever byte it is in."""

import functools
import itertools
import resource
import shutil

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mirai_jax import foresight, sharding, step
from mirai_jax.models.generator import GeneratorConfig
from mirai_jax.training import checkpoint
from mirai_jax.training.checkpoint import Checkpoints, fingerprints, restore_weights, steps_in
from mirai_jax.utils import distributed
from mirai_jax.utils.errors import ConfigError, TrainingError
from mirai_jax.utils.files import closing

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    # TensorStore leaves coroutines behind where it meets a damaged file.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CONFIG = GeneratorConfig(2, num_heads=8, width=32, vocab_size=24, num_classes=5, grid=(3, 4))
RECIPE = step.Recipe(
    CONFIG, (foresight.Term(student_layer=1, teacher_layer=1, projector_width=16),)
)
ONE = (1, 1, 1)
MESHES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(shape) == 8]


def make():
    return step.init_state(RECIPE, jax.random.key(0))


@functools.cache
def placement(shape):
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    return sharding.shardings(jax.eval_shape(make), mesh)


@functools.cache
def numbers():
    """A state whose every array differs from every other: its own numbers, as host arrays."""
    shapes, rng = jax.eval_shape(checkpoint._storable, make()), np.random.default_rng(0)

    def one(shape):
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return rng.normal(size=shape.shape).astype(shape.dtype)
        return rng.integers(0, 1000, shape.shape).astype(shape.dtype)

    return jax.tree.map(one, shapes)


def state(shape, change=0):
    """It on a mesh."""
    values = sharding.place(numbers(), checkpoint._fields(placement(shape)))
    key = jax.random.wrap_key_data(values["key"])
    return step.TrainState(**{**values, "key": key, "step": values["step"] + change})


def assert_same(one, other):
    one, other = jax.device_get((checkpoint._storable(one), checkpoint._storable(other)))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def restore(folder, shape, said=None, **options):
    checkpoints = Checkpoints(folder, **options)
    log = (lambda line: None) if said is None else said.append
    try:
        return checkpoints.restore_newest(jax.eval_shape(make), placement(shape), log)
    finally:
        checkpoints.close()


def save(folder, *steps, shape=ONE, **options):
    checkpoints = Checkpoints(folder, **options)
    for i in steps:
        checkpoints.save(state(shape, change=i), i)
    checkpoints.close()


def test_an_error_of_closing_replaces_no_other(tmp_path, monkeypatch):
    """A checkpoint that failed in the background is raised again when Orbax closes."""

    def full():
        raise OSError("disk full")

    for first, seen in ((TrainingError("first"), "first"), (None, "disk full")):
        checkpoints = Checkpoints(tmp_path)
        close = checkpoints._writer.close
        monkeypatch.setattr(checkpoints._writer, "close", full)
        with pytest.raises((TrainingError, OSError), match=seen), closing(checkpoints):
            if first:
                raise first
        close()


# Fingerprints ------------------------------------------------------------------------------------


@hypothesis.given(
    shape=st.lists(st.integers(1, 5), max_size=3),
    dtype=st.sampled_from(["float32", "bfloat16", "int32", "uint32", "uint8"]),
    where=st.integers(0, 10**6),
    bit=st.integers(0, 31),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_changed_bit_changes_the_fingerprint(shape, dtype, where, bit):
    array = np.asarray(jnp.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape), dtype))
    raw = bytearray(array.tobytes())
    raw[where % len(raw)] ^= 1 << bit % 8
    changed = np.frombuffer(bytes(raw), array.dtype).reshape(shape)
    assert fingerprints({"a": array}) != fingerprints({"a": changed})
    assert fingerprints({"a": jnp.asarray(array)}) == fingerprints({"a": array})


@pytest.mark.parametrize(
    "meshes",
    [
        pytest.param([(2, 2, 2), (1, 1, 8)], id="some"),
        pytest.param(MESHES, id="all", marks=pytest.mark.slow),
    ],
)
def test_swapped_elements_change_the_fingerprint_and_meshes_do_not(meshes):
    array = np.asarray(numbers()["params"]["generator"]["output"]["kernel"])
    swapped = array.copy()
    swapped[0, 1], swapped[1, 0] = array[1, 0], array[0, 1]
    assert fingerprints([array]) != fingerprints([swapped])
    alone = fingerprints(checkpoint._storable(state(ONE)))
    for shape in meshes:
        assert fingerprints(checkpoint._storable(state(shape))) == alone


# Elastic -----------------------------------------------------------------------------------------


SHAPES = [*MESHES, ONE, (1, 2, 2), (4, 1, 1)]  # 8, 1 and 4 devices


@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param([((2, 2, 2), ONE), (ONE, (4, 1, 1)), ((1, 2, 2), (1, 1, 8))], id="some"),
        pytest.param(
            list(zip(SHAPES, SHAPES[3:] + SHAPES[:3], strict=True)),
            id="all",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_saved_under_one_mesh_and_restored_under_another(tmp_path, pairs):
    for i, (one, other) in enumerate(pairs):
        folder = tmp_path / str(i)
        save(folder, 6, shape=one)
        restored, at = restore(folder, other)
        assert at == 6
        assert_same(restored, state(ONE, change=6))
        placed = [x.sharding for x in jax.tree.leaves(restored.params)]
        assert placed == jax.tree.leaves(placement(other).params)


def test_weights_alone_are_read_without_the_devices_that_wrote_them(tmp_path):
    save(tmp_path, 4, shape=(2, 2, 2))
    weights, at = restore_weights(tmp_path)
    assert at == 4 and set(weights) == {"params", "ema"}
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(weights))
    jax.tree.map(np.testing.assert_array_equal, weights["params"], numbers()["params"])
    for missing in ((tmp_path, 5), (tmp_path / "nothing",)):
        with pytest.raises(ConfigError, match="no checkpoint"):
            restore_weights(*missing)


# What is kept ------------------------------------------------------------------------------------


def test_the_newest_and_every_nth_are_kept(tmp_path):
    save(tmp_path, *range(2, 15, 2), keep=2, keep_every=6)
    assert steps_in(tmp_path) == [6, 12, 14]
    save(tmp_path / "last", 1, 2, 3, keep=1)
    assert steps_in(tmp_path / "last") == [3]


def test_what_a_killed_run_left_unfinished_goes(tmp_path):
    save(tmp_path, 2)
    (tmp_path / "step_4.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert steps_in(tmp_path) == [2]
    assert restore(tmp_path, ONE)[1] == 2
    assert not list(tmp_path.glob("*tmp*"))


# Damage ------------------------------------------------------------------------------------------


def files_of(folder):
    """Of a checkpoint, those that hold anything of the state or about it."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def damage(path, how):
    raw = path.read_bytes()
    half = len(raw) // 2
    changed = {
        "truncated": raw[:half],
        "flipped": raw[:half] + bytes([raw[half] ^ 16]) + raw[half + 1 :],
        "empty": b"",
    }
    path.unlink()
    if how != "removed":
        path.write_bytes(changed[how])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    save(folder, 2, 4, keep=3)
    return folder


SLOW_HOW = [pytest.param(how, marks=pytest.mark.slow) for how in ("empty", "removed")]


@pytest.mark.parametrize("how", ["truncated", "flipped", *SLOW_HOW])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, two, how):
    """Every file of it in turn; where a file does not matter, all of the state is still right."""
    used = []
    for i, path in enumerate(files_of(two / "step_4")):
        folder = tmp_path / str(i)
        shutil.copytree(two, folder)
        damage(folder / path.relative_to(two), how)
        said = []
        restored, at = restore(folder, ONE, said)
        assert_same(restored, state(ONE, change=at))
        if at == 2:
            (line,) = said
            assert line.startswith("step 4 is damaged") and len(line.splitlines()) == 1
            assert (folder / "damaged_step_4").is_dir() and steps_in(folder) == [2]
        used.append(at)
    assert set(used) <= {2, 4} and used.count(2) >= 2


def test_any_flipped_byte_of_the_numbers_is_noticed(tmp_path, two):
    files = files_of(two / "step_4" / "state")
    largest = max(files, key=lambda path: path.stat().st_size)
    raw, rng = largest.read_bytes(), np.random.default_rng(1)
    for i, place in enumerate(rng.integers(0, len(raw), 12)):
        folder = shutil.copytree(two, tmp_path / str(i))
        changed = bytearray(raw)
        changed[place] ^= 1 << rng.integers(8)
        (folder / largest.relative_to(two)).write_bytes(bytes(changed))
        assert restore(folder, ONE)[1] == 2


def test_all_damaged_begins_anew_and_keeps_them_aside(tmp_path, two):
    folder = shutil.copytree(two, tmp_path / "run")
    for at in (2, 4):
        damage(folder / f"step_{at}" / "marks" / "metadata", "truncated")
    said = []
    assert restore(folder, ONE, said) is None
    assert len(said) == 2 and steps_in(folder) == []
    assert {p.name for p in folder.glob("damaged*")} == {"damaged_step_2", "damaged_step_4"}
    save(folder, 4)  # its step can be saved again, and damaged again
    damage(folder / "step_4" / "marks" / "metadata", "empty")
    assert restore(folder, ONE, said) is None
    assert (folder / "damaged_step_4.2").is_dir()


def test_checkpoints_of_another_program_are_not_taken_for_damaged(tmp_path, two):
    other = step.Recipe(GeneratorConfig(3, 4, 16, 24, 5, (3, 4)))
    shapes = jax.eval_shape(lambda: step.init_state(other, jax.random.key(0)))
    where = sharding.shardings(shapes, sharding.make_mesh(ONE, jax.devices()[:1]))
    checkpoints = Checkpoints(two)
    with pytest.raises(ConfigError, match="another program wrote") as error:
        checkpoints.restore_newest(shapes, where, lambda line: None)
    checkpoints.close()
    assert len(str(error.value).splitlines()) == 1
    assert steps_in(two) == [2, 4]  # nothing was set aside


# Several views of one folder (two real processes: distributed_test.py) ---------------------------


@pytest.fixture
def second(monkeypatch):
    """This is process 1; a list for the steps that process 0 sees, newest first."""
    steps = []
    answers = {(): lambda: len(steps), (2,): lambda: steps, (1,): lambda: steps}
    monkeypatch.setattr(
        distributed, "from_first", lambda x: np.asarray(answers[x.shape](), x.dtype)
    )
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    return steps


def test_what_process_0_does_not_see_is_no_checkpoint(tmp_path, two, second):
    folder = shutil.copytree(two, tmp_path / "run")
    second[:] = [2]
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest_step() == 4
    restored, at = checkpoints.restore_newest(
        jax.eval_shape(make), placement(ONE), lambda line: None
    )
    assert at == 2
    assert_same(restored, state(ONE, change=2))
    assert checkpoints.latest_step() == 2 and (folder / "step_4").is_dir()
    checkpoints.save(state(ONE, change=40), 4)  # as process 0 does
    checkpoints.close()
    second[:] = [4, 2]
    assert_same(restore(folder, ONE)[0], state(ONE, change=40))


def test_a_checkpoint_unseen_by_one_process_is_not_damage(tmp_path, two, second, monkeypatch):
    folder = shutil.copytree(two, tmp_path / "run")
    second[:] = [6, 4]
    monkeypatch.setattr(distributed, "blind", lambda path: int(path.name == "step_6"))
    with pytest.raises(ConfigError) as error:
        restore(folder, ONE)
    assert f"process 1 does not see {folder}/step_6" in str(error.value)
    assert steps_in(folder) == [2, 4] and not list(folder.glob("damaged*"))


def test_what_only_another_process_sees_is_reported_and_left_out(tmp_path, two, monkeypatch):
    folder = shutil.copytree(two, tmp_path / "run")
    shutil.rmtree(folder / "step_4")
    newest = distributed.worst
    monkeypatch.setattr(distributed, "worst", lambda here: max(newest(here), 4 * (here == 2)))
    lines = []
    assert restore(folder, ONE, lines)[1] == 2
    assert len(lines) == 1 and "step 4" in lines[0]


# Disks -------------------------------------------------------------------------------------------


def test_a_folder_that_vanished_is_one_line(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder)
    checkpoints.save(state(ONE), 2)
    checkpoints.wait()
    shutil.rmtree(folder)
    with pytest.raises(TrainingError, match="is gone") as error:
        checkpoints.save(state(ONE), 4)
    assert len(str(error.value).splitlines()) == 1
    checkpoints.close()


def test_a_disk_that_takes_no_more_leaves_the_last_checkpoint_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(ONE, change=2), 2)
    checkpoints.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # files, not the disk; as good
    try:
        with pytest.raises(TrainingError, match=r"step 4 \(File too large\)") as error:
            checkpoints.save(state(ONE, change=4), 4)
            checkpoints.wait()
        assert str(error.value).endswith("step 2") and len(str(error.value).splitlines()) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    restored, at = restore(tmp_path, ONE)
    assert at == 2
    assert_same(restored, state(ONE, change=2))
