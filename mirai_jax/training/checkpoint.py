"""Orbax checkpoints: the train state, the number of the next batch, and fingerprints of both.

    checkpoints/step_N/state/     the arrays, each host's own shards
    checkpoints/step_N/marks/     {'next_index', 'fingerprints'}: JSON
    checkpoints/damaged_step_N/   a checkpoint that could not be used, set aside

Nothing in them depends on the devices: saved on 8 or on 2 hosts, restored on 1 or 4. A checkpoint
appears under its name when it is whole; whether it still is, the fingerprints tell.
"""

import errno
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from mirai_jax.step import TrainState
from mirai_jax.utils import distributed
from mirai_jax.utils.errors import ConfigError, Lost, TrainingError, first_line

_STEP = re.compile(r"step_(\d+)")


def steps_in(folder: pathlib.Path) -> list[int]:
    """The steps of a folder's whole checkpoints, ascending; none where there is no folder."""
    if not folder.is_dir():
        return []
    found = (_STEP.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def last_whole(folder: pathlib.Path) -> str:
    """Which checkpoint a run can go on from, for messages."""
    steps = steps_in(folder)
    return f"step {steps[-1]}" if steps else "no step yet"


def _fingerprint(x: Any, xp: Any) -> Any:
    """uint32 that changes with any bit of `x`, and not with how `x` lies on devices.

    The bits of each element times an odd number of its position, summed modulo 2**32: a changed bit
    k changes the sum by 2**k times something odd. Integers: the order of the sum is of no matter.
    `xp` is jax.numpy or NumPy.
    """
    bits = x.view(f"uint{8 * x.dtype.itemsize}").astype("uint32")
    position = xp.zeros((1,) * x.ndim, "uint32")
    for axis, size in enumerate(x.shape):
        along = xp.arange(size, dtype="uint32").reshape(
            [-1 if i == axis else 1 for i in range(x.ndim)]
        )
        position = position * np.uint32(size) + along
    return xp.sum(bits * (2 * position + 1), dtype="uint32")


def _by_path(tree: Any) -> dict[str, Any]:
    """{path: leaf}, the same for tuples, dataclasses and the dictionaries that stand for them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


@jax.jit
def _on_devices(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _fingerprint(x, jnp) for name, x in arrays.items()}


def fingerprints(tree: Any) -> dict[str, int]:
    """{path: 32 bits} of the arrays of a tree.

    Arrays on devices are looked at there; all processes that hold shares must ask. Those on the host
    stay there.
    """
    arrays = _by_path(tree)
    if any(isinstance(x, jax.Array) for x in arrays.values()):
        found = jax.device_get(_on_devices(arrays))
    else:
        found = {name: _fingerprint(np.asarray(x), np) for name, x in arrays.items()}
    return {name: int(value) for name, value in found.items()}


def _fields(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in state.__dataclass_fields__}


def _storable(state: TrainState) -> dict[str, Any]:
    """As a dictionary of arrays of numbers, which every Orbax version can store."""
    return _fields(state) | {"key": jax.random.key_data(state.key)}


class _Damaged(Exception):
    """A checkpoint that cannot be used; says why in one line."""


class _OtherArrays(_Damaged):
    """Its metadata tell of another state than this program's: damage, or another program."""


# What reading a checkpoint came to, the worst last; processes agree on the worst of theirs.
_WHOLE, _DAMAGED, _OTHER, _NOT_NOW = range(4)


class Checkpoints:
    """The checkpoints of a run's workdir, written in the background.

    Args:
        folder: made if need be.
        every: steps between checkpoints.
        keep: the newest that are kept.
        keep_every: those at multiples of it are kept for ever (0: none).
    """

    def __init__(self, folder: pathlib.Path, *, every: int = 1, keep: int = 2, keep_every: int = 0):
        self._folder, self._every = folder, every
        kept = [policies.LatestN(keep)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                step_prefix="step",
                cleanup_tmp_directories=True,  # what a killed run had not finished
                enable_async_checkpointing=True,
            ),
        )
        # The run itself asks for preemption notices; JAX counts who asks how often.
        self._manager.reached_preemption = lambda step: False

    def due(self, step: int) -> bool:
        """Whether a checkpoint of this step is to be written."""
        return step % self._every == 0

    def save(self, state: TrainState, step: int) -> None:
        """Starts writing a checkpoint, unless this step has one.

        Raises:
            TrainingError: this one, or the one before it, cannot be written.
        """
        if self.latest_step() == step:
            return
        if not self._folder.is_dir():
            raise TrainingError(
                f"{self._folder} is gone: no checkpoint of step {step} can be written"
            )
        tree = _storable(state)
        marks = {"next_index": step, "fingerprints": fingerprints(tree)}
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(tree), marks=ocp.args.JsonSave(marks))
        self._writing(step, lambda: self._manager.save(step, args=args, force=True))

    def wait(self) -> None:
        """Blocks until everything that was started is on the disk.

        Raises:
            TrainingError: it cannot be written.
        """
        self._writing(self.latest_step(), self._manager.wait_until_finished)

    def _writing(self, step: int | None, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # whatever Orbax and TensorStore make of a full disk
            message = (
                f"a checkpoint could not be written at step {step} ({_reason(error)}); the last "
                f"whole one in {self._folder} is of {last_whole(self._folder)}"
            )
            # Orbax's processes wait for each other: for one that is gone in vain.
            lost = distributed.means_lost(error) or "barrier" in str(error).lower()
            raise (Lost if lost else TrainingError)(message) from error

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore_newest(
        self, like: TrainState, shardings: TrainState, log: Callable[[str], None]
    ) -> tuple[TrainState, int] | None:
        """The newest checkpoint that is whole, of those that process 0 sees.

        Newer ones that are damaged are told and set aside, so that their steps can be saved again.

        Args:
            like: the state's shapes (arrays or what `jax.eval_shape` gives).
            shardings: where they go.
            log: takes a line for each damaged one, and where processes see others.

        Returns:
            The state and its step; None if there is no checkpoint, or none that is whole.

        Raises:
            ConfigError: they are of another program, or a process does not see what process 0 sees.
            TrainingError: one may not be read, or does not fit in memory.
        """
        steps = self._agreed_steps(log)
        damaged, others, result = {}, 0, None
        for step in steps:
            state, why, worst = self._restore(step, like, shardings)
            if worst == _WHOLE:
                result = state, step
                break
            damaged[step], others = why, others + (worst == _OTHER)
        if steps and others == len(steps):
            raise ConfigError(
                f"{self._folder}: its checkpoints are of another program ({damaged[steps[0]]}); use "
                "the version that wrote them, or another --workdir"
            )
        for step, why in damaged.items():
            log(f"checkpoint of step {step:,} is damaged ({why}): set aside as {self._aside(step)}")
        self._keep_in_mind([step for step in steps if step not in damaged])
        return result

    def _agreed_steps(self, log: Callable[[str], None]) -> list[int]:
        """The steps of the checkpoints that process 0 sees, newest first; all must ask."""
        newest = distributed.worst(max(self._manager.all_steps(), default=0))
        if distributed.is_first() and newest not in (0, *self._manager.all_steps()):
            if distributed.sees(self._path(newest)):
                self._manager.reload()
            else:
                log(
                    f"another process sees a checkpoint of step {newest:,}, which process 0 does not: "
                    "it is left out"
                )
        steps = sorted(self._manager.all_steps(), reverse=True)
        count = int(distributed.from_first(np.asarray(len(steps))))
        # As long as those of process 0 whatever is seen here: what is sent has one shape.
        same = np.asarray((steps + [0] * count)[:count], np.int64)
        return [int(step) for step in distributed.from_first(same)]

    def _keep_in_mind(self, steps: list[int]) -> None:
        """Makes these the steps that Orbax believes to be there: it asks the folder only once.

        Where it believes another set than in another process, one would save and the other not.
        """
        if sorted(self._manager.all_steps()) == sorted(steps):
            return
        self._manager.reload()
        if not set(self._manager.all_steps()) <= set(steps):  # there is no public way to forget one
            self._manager._checkpoints.delete_if(lambda info: info.step not in steps)

    def _path(self, step: int) -> pathlib.Path:
        return (self._folder / f"step_{step}").absolute()

    def _restore(
        self, step: int, like: TrainState, shardings: TrainState
    ) -> tuple[TrainState | None, str, int]:
        """The state, or None and why not; and what it came to over all processes.

        No process is left waiting: each reads by itself, and then they agree, before anything that
        they do together.

        A checkpoint that a process does not see at all ends the run, and is not taken for damaged:
        process 0 sees it, so it is likely whole, and what is wrong is the storage. Going back to the
        one before would set a good one aside and do its steps again, for want of a mount.
        """
        abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(_storable, like),
            _fields(shardings),
        )
        path = self._path(step)
        process = distributed.blind(path)
        if process:
            raise ConfigError(
                f"process {process} does not see {path}, which process 0 sees: {distributed.NOT_SHARED}"
            )
        tree, why, here = None, "", _WHOLE
        try:
            tree, marks = _read(path, abstract)
        except Exception as error:  # whatever Orbax and TensorStore make of a damaged file
            here, why = _outcome(error)
        worst = distributed.worst(here)
        if worst == _WHOLE:
            try:
                _check_marks(marks, fingerprints(tree), step)
            except _Damaged as error:
                here, why = _outcome(error)
            worst = distributed.worst(here)
        why = why or "another process cannot read it"
        if worst == _NOT_NOW:
            raise TrainingError(
                f"the checkpoint {path} cannot be read now ({why}); it stays as it is"
            )
        if worst != _WHOLE:
            return None, why, worst
        state = type(like)(**tree)
        return state.replace(key=jax.random.wrap_key_data(state.key)), "", worst

    def _aside(self, step: int) -> str:
        """Renames a damaged checkpoint; returns its new name."""
        names = (
            f"damaged_step_{step}{suffix}" for suffix in ("", *(f".{i}" for i in range(2, 99)))
        )
        name = next(name for name in names if not (self._folder / name).exists())
        distributed.barrier(f"setting aside {step}")
        if distributed.is_first():
            (self._folder / f"step_{step}").rename(self._folder / name)
        distributed.barrier(f"set aside {step}")
        return name

    def close(self) -> None:
        self._manager.close()


def restore_weights(folder: pathlib.Path, step: int | None = None) -> tuple[Any, int]:
    """{'params', 'ema'} of a checkpoint (default: the newest) as host arrays, and its step.

    They may have been saved on any number of devices; the optimizer's state is not read.

    Raises:
        ConfigError: there is no checkpoint, or it cannot be read.
    """
    steps = steps_in(folder)
    if not steps:
        raise ConfigError(f"{folder} holds no checkpoint yet")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ConfigError(
            f"{folder} holds no checkpoint of step {step}; its steps are "
            f"{', '.join(map(str, steps))}"
        )
    path = (folder / f"step_{step}").absolute()
    try:
        reader = ocp.PyTreeCheckpointHandler()
        tree = reader.metadata(path / "state").tree
        # As NumPy arrays, which need no device at all.
        wanted = {name: jax.tree.map(lambda _: 0, tree[name]) for name in ("params", "ema")}
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True)
        restored = reader.restore(path / "state", args=args)
        _check_marks(_read_marks(path), fingerprints(restored), step)
    except Exception as error:
        outcome, why = _outcome(error)
        if outcome == _NOT_NOW:
            raise ConfigError(f"checkpoint {path} cannot be read ({why})") from error
        raise ConfigError(
            f"checkpoint {path} is damaged ({why}); continuing its run uses the one before it"
        ) from error
    return restored, step


def _read(path: pathlib.Path, abstract: Any) -> tuple[Any, Any]:
    """The arrays of a checkpoint as `abstract` says, and its marks; waits for no other process.

    Raises:
        _OtherArrays, and whatever Orbax and TensorStore make of a damaged file.
    """
    # The handlers themselves: their manager ends with a barrier, which a process that failed skips.
    reader = ocp.PyTreeCheckpointHandler()
    stored = _by_path(reader.metadata(path / "state").tree)
    expected = _by_path(abstract)
    differing = sorted(stored.keys() ^ expected.keys()) or [
        name for name, x in expected.items() if tuple(stored[name].shape) != x.shape
    ]
    if differing:
        raise _OtherArrays(f"it holds other arrays: {', '.join(differing[:3])}")
    how = ocp.checkpoint_utils.construct_restore_args(abstract)
    args = ocp.args.PyTreeRestore(abstract, restore_args=how)
    return reader.restore(path / "state", args=args), _read_marks(path)


def _read_marks(path: pathlib.Path) -> Any:
    return ocp.JsonCheckpointHandler().restore(path / "marks")


def _check_marks(marks: Any, found: dict[str, int], step: int) -> None:
    """Compares with what was saved; `found` may be of a part of the state.

    Raises:
        _Damaged: another step, or other bits.
    """
    try:
        saved, index = marks["fingerprints"], marks["next_index"]
    except (TypeError, KeyError) as error:
        raise _Damaged("its marks cannot be read") from error
    if index != step:
        raise _Damaged(f"it says that it is of step {index}")
    changed = [name for name, value in found.items() if saved.get(name) != value]
    if changed:
        raise _Damaged(f"{len(changed)} arrays are not those that were saved, such as {changed[0]}")


def _outcome(error: BaseException) -> tuple[int, str]:
    """What an error in reading means, and why in one line.

    Damage is what the files themselves are to blame for; what the file system, the memory or the
    devices refuse may be granted the next time.
    """
    if isinstance(error, _Damaged):
        return (_OTHER if isinstance(error, _OtherArrays) else _DAMAGED), str(error)
    chain, link = [], error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = " ".join(f"{type(link).__name__}: {link}" for link in chain)
    codes = {int(code) for code in re.findall(r"os_error_code='(\d+)'", text)}
    codes |= {link.errno for link in chain if isinstance(link, OSError) and link.errno}
    refused = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
    not_now = (
        codes - {errno.ENOENT}
        or any(word in text for word in refused)
        or any(isinstance(link, (MemoryError, jax.errors.JaxRuntimeError)) for link in chain)
    )
    why = next((_reason(link) for link in chain if "os_error_code" in str(link)), _reason(error))
    return (_NOT_NOW, why) if not_now else (_DAMAGED, f"it cannot be read: {why}")


def _reason(error: Exception) -> str:
    """One short line: the system's own words ("No space left on device") where it has any."""
    found = re.search(r"([\w ]+) \[os_error_code", str(error))
    if found:
        return found[1].strip()
    return first_line(error).split(". See full TensorStore")[0][:200]
