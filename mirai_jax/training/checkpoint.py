"""Orbax checkpoints: the train state, the number of the next batch, and fingerprints of both.

    checkpoints/step_N/state/     the arrays, each host's own shards
    checkpoints/step_N/marks/     {'next_index', 'fingerprints'}: JSON
    checkpoints/damaged_step_N/   a checkpoint that could not be used, set aside

Nothing in them depends on the devices: saved on 8 or on 2 hosts, restored on 1 or 4. A checkpoint
appears under its name when it is whole; the fingerprints show whether it still is.
"""

import errno
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mirai_jax.training.checkpoint_folder import (
    for_orbax,
    is_native,
    last_whole,
    remove,
    remove_unfinished,
    steps_in,
    unless_away,
    upload,
)
from mirai_jax.training.fingerprints import by_path, fingerprints
from mirai_jax.utils import distributed, files
from mirai_jax.utils.errors import ConfigError, Lost, TrainingError, first_line
from mirai_jax.utils.files import AnyPath


def _fields(state: Any) -> dict[str, Any]:
    return {name: getattr(state, name) for name in state.__dataclass_fields__}


def _storable(state: Any) -> dict[str, Any]:
    """As a dictionary of arrays of numbers, which every Orbax version can store."""
    return _fields(state) | {"key": jax.random.key_data(state.key)}


class _Damaged(Exception):
    """A checkpoint that cannot be used; the message is why, in one line."""


class _OtherArrays(_Damaged):
    """A checkpoint of another state than this program's: damage, or another program."""


# The outcomes of reading a checkpoint, the worst last; processes agree on the worst of theirs.
_WHOLE, _DAMAGED, _OTHER, _NOT_NOW = range(4)


class Checkpoints:
    """The checkpoints of a run's workdir, written in the background.

    A state is a dataclass of arrays with a field `key`, a random key.

    Args:
        folder: created if it does not exist.
        keep: the newest that are kept.
        keep_every: those at multiples of it are kept for ever (0: none).
    """

    def __init__(self, folder: AnyPath, *, every: int = 1, keep: int = 2, keep_every: int = 0):
        self._folder, self._every = folder.absolute(), every
        self._keep, self._keep_every = keep, keep_every
        self._spool: tempfile.TemporaryDirectory | None = None
        if not is_native(folder):
            if jax.process_count() > 1:
                raise ConfigError(
                    f"workdir is {folder.parent}; of several processes it must be in gs:// or on a "
                    "shared file system"
                )
            self._spool = tempfile.TemporaryDirectory(prefix="mirai-checkpoints-")
        if distributed.is_first():
            folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(folder)
        self._steps = steps_in(folder)
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._check_written),
        )

    def due(self, step: int) -> bool:
        """Whether a checkpoint of this step is to be written."""
        return step % self._every == 0

    def latest_step(self) -> int | None:
        return max(self._steps, default=None)

    def save(self, state: Any, step: int) -> None:
        """Starts writing a checkpoint, unless this step has one.

        Raises:
            TrainingError: this one, or the one before it, cannot be written.
            Lost: another process is gone.
        """
        if self.latest_step() == step:
            return
        self.wait()
        if not files.is_remote(self._folder) and not self._folder.is_dir():
            raise TrainingError(f"{self._folder} is gone: step {step} cannot be written")
        tree = _storable(state)
        marks = {"next_index": step, "fingerprints": fingerprints(tree)}
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(tree), marks=ocp.args.JsonSave(marks))
        self._steps.append(step)
        self._writing(step, lambda: self._writer.save(self._target(step), args=args, force=True))

    def wait(self) -> None:
        """Blocks until what was started is on the disk.

        Raises:
            TrainingError: it cannot be written.
            Lost: another process is gone.
        """
        finish = lambda: unless_away(self._folder, self._writer.wait_until_finished)
        self._writing(self.latest_step(), finish)
        for path in pathlib.Path(self._spool.name).iterdir() if self._spool else ():
            shutil.rmtree(path)  # it is in the bucket
        self._remove_old()

    def _check_written(self) -> None:
        """Reads the index of the new checkpoint back, on process 0, before it gets its name."""
        if not distributed.is_first():
            return
        path = self._target(self._steps[-1])
        if isinstance(path, pathlib.Path):
            path = path.with_name(f"{path.name}.orbax-checkpoint-tmp")
        wanted = {name.replace("/", ".") for name in _read_marks(path)["fingerprints"]}
        if files.stored_arrays(path / "state") != wanted:
            raise OSError(f"{path} does not hold what was written to it")
        if self._spool:
            upload(path, self._path(self._steps[-1]))

    def _remove_old(self) -> None:
        """Removes what is not to be kept."""
        kept = {step for step in self._steps if self._keep_every and step % self._keep_every == 0}
        kept.update(sorted(self._steps)[-self._keep :])
        for step in set(self._steps) - kept:
            if distributed.is_first():
                remove(self._path(step))
        self._steps = sorted(kept)

    def _writing(self, step: int | None, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # whatever Orbax and TensorStore make of a full disk
            self._steps = [s for s in self._steps if s != step]  # it is no reason to remove others
            message = (
                f"a checkpoint could not be written at step {step} ({_reason(error)}); the last "
                f"whole one in {self._folder}: {last_whole(self._folder)}"
            )
            # Orbax's processes wait for each other: in vain for one that is gone.
            lost = distributed.means_lost(error) or "barrier" in str(error).lower()
            raise (Lost if lost else TrainingError)(message) from error

    def restore_newest(
        self, like: Any, shardings: Any, warn: Callable[[str], None]
    ) -> tuple[Any, int] | None:
        """The newest checkpoint that is whole, of those that process 0 sees.

        Newer ones that are damaged are reported and set aside, so that their steps can be saved again.

        Args:
            like: the state's shapes (arrays or what `jax.eval_shape` gives).
            warn: takes a line for each damaged one, and where processes see others.

        Returns:
            The state and its step; None if there is no checkpoint, or none that is whole.

        Raises:
            ConfigError: another program wrote them, or a process does not see what process 0 sees.
            TrainingError: one may not be read, or does not fit in memory.
        """
        steps = self._agreed_steps(warn)
        damaged, others, result = {}, 0, None
        for step in steps:
            state, why, worst = self._restore(step, like, shardings)
            if worst == _WHOLE:
                result = state, step
                break
            damaged[step], others = why, others + (worst == _OTHER)
        if steps and others == len(steps):
            raise ConfigError(
                f"{self._folder}: another program wrote its checkpoints ({damaged[steps[0]]}); use "
                "the version that wrote them, or another --workdir"
            )
        for step, why in damaged.items():
            warn(f"step {step:,} is damaged ({why}): set aside as {self._aside(step)}")
        self._steps = [step for step in steps if step not in damaged]
        return result

    def _agreed_steps(self, warn: Callable[[str], None]) -> list[int]:
        """The steps of the checkpoints that process 0 sees, newest first; all must call."""
        newest = distributed.worst(max(self._steps, default=0))
        if distributed.is_first() and newest not in (0, *self._steps):
            warn(
                f"another process sees a checkpoint of step {newest:,}, which process 0 does not: "
                "it is left out"
            )
        steps = sorted(self._steps, reverse=True)
        count = int(distributed.from_first(np.asarray(len(steps))))
        # As long as those of process 0 whatever is seen here: what is sent has one shape.
        same = np.asarray((steps + [0] * count)[:count], np.int64)
        return [int(step) for step in distributed.from_first(same)]

    def _path(self, step: int) -> AnyPath:
        return self._folder / f"step_{step}"

    def _target(self, step: int) -> Any:
        """Where Orbax writes it."""
        if self._spool:
            return pathlib.Path(self._spool.name, f"step_{step}")
        return for_orbax(self._path(step))

    def _restore(self, step: int, like: Any, shardings: Any) -> tuple[Any, str, int]:
        """The state, or None and why not; and the outcome over all processes.

        No process is left waiting: each reads without the others, and then they agree. If one process
        does not see a checkpoint that process 0 sees, the run ends: the checkpoint is likely whole and
        a mount is wrong. An older checkpoint would lose its steps.
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
            tree, marks = _read(for_orbax(path), abstract)
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
            raise TrainingError(f"{path} cannot be read now ({why}); it stays as it is")
        if worst != _WHOLE:
            return None, why, worst
        state = type(like)(**tree)
        return state.replace(key=jax.random.wrap_key_data(state.key)), "", worst

    def _aside(self, step: int) -> str:
        """Renames a damaged checkpoint; returns its new name."""
        names = [f"damaged_step_{step}", *(f"damaged_step_{step}.{i}" for i in range(2, 99))]
        name = next(name for name in names if not (self._folder / name).exists())
        distributed.barrier(f"setting aside {step}")
        if distributed.is_first():
            self._path(step).rename(self._folder / name)
        distributed.barrier(f"set aside {step}")
        return name

    def close(self) -> None:
        """Waits for what was started; raises as `wait`."""
        self.wait()
        self._writer.close()


def restore_weights(folder: AnyPath, step: int | None = None) -> tuple[Any, int]:
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
        listed = ", ".join(map(str, steps))
        raise ConfigError(f"{folder} holds no checkpoint of step {step}; its steps are {listed}")
    path = folder / f"step_{step}"
    try:
        stored = for_orbax(path)
        reader = ocp.PyTreeCheckpointHandler()
        tree = reader.metadata(stored / "state").tree
        # As NumPy arrays, which need no device at all.
        wanted = {name: jax.tree.map(lambda _: 0, tree[name]) for name in ("params", "ema")}
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore=True)
        restored = reader.restore(stored / "state", args=args)
        _check_marks(_read_marks(stored), fingerprints(restored), step)
    except Exception as error:
        outcome, why = _outcome(error)
        if outcome == _NOT_NOW:
            raise ConfigError(f"checkpoint {path} cannot be read ({why})") from error
        raise ConfigError(
            f"checkpoint {path} is damaged ({why}); its run resumes from the one before it"
        ) from error
    return restored, step


def _read(path: pathlib.Path, abstract: Any) -> tuple[Any, Any]:
    """The arrays of a checkpoint as `abstract` describes them, and its marks; waits for no process.

    Raises:
        _OtherArrays, and whatever Orbax and TensorStore make of a damaged file.
    """
    # The handlers themselves: a checkpointer ends with a barrier, which a process that failed skips.
    reader = ocp.PyTreeCheckpointHandler()
    stored = by_path(reader.metadata(path / "state").tree)
    expected = by_path(abstract)
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
        raise _Damaged(f"its marks name step {index}")
    changed = [name for name, value in found.items() if saved.get(name) != value]
    if changed:
        raise _Damaged(f"{len(changed)} arrays differ from what was saved, such as {changed[0]}")


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
    kinds = (MemoryError, jax.errors.JaxRuntimeError, ConfigError)
    not_now = (
        codes - {errno.ENOENT}
        or any(word in text for word in refused)
        or any(isinstance(link, kinds) for link in chain)
        or any(type(link).__module__.startswith(("gcsfs", "aiohttp", "fsspec")) for link in chain)
    )
    why = next((_reason(link) for link in chain if "os_error_code" in str(link)), _reason(error))
    return (_NOT_NOW, why) if not_now else (_DAMAGED, f"it cannot be read: {why}")


def _reason(error: Exception) -> str:
    """One short line: the system's own words ("No space left on device") where it has any."""
    found = re.search(r"([\w ]+) \[os_error_code", str(error))
    if found:
        return found[1].strip()
    line = first_line(error).split(". See full TensorStore")[0].split(" [tensorstore_spec")[0]
    return (line.rpartition(": ")[2] if "gs://" in line else line)[:200]
