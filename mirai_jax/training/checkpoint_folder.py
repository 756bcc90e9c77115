"""A folder of checkpoints, here or in a bucket: which of them are whole, and how they come and go.

A file system renames a checkpoint when it is whole. A bucket renames nothing: there, a checkpoint is
whole when it holds commit_success.txt. Orbax reads and writes file systems and gs://. What lies
elsewhere is written to a folder here and then uploaded, and is read from the cache.
"""

import contextlib
import functools
import json
import pathlib
import re
import shutil
import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any

from etils import epath

from mirai_jax.utils import files, paths
from mirai_jax.utils.files import AnyPath

_STEP = re.compile(r"step_(\d+)")
_UNFINISHED = re.compile(r"step_\d+\.orbax-checkpoint-tmp.*")
_COMMITTED = "commit_success.txt"  # Orbax's name


def steps_in(folder: AnyPath) -> list[int]:
    """The steps of a folder's whole checkpoints, ascending; none where there is no folder."""
    if not folder.is_dir():
        return []
    found = (_STEP.fullmatch(path.name) for path in folder.iterdir())
    steps = sorted(int(match[1]) for match in found if match)
    return [step for step in steps if _is_whole(folder / f"step_{step}")]


def last_whole(folder: AnyPath) -> str:
    """The checkpoint from which a run can resume, for messages."""
    try:
        steps = steps_in(folder)
    except OSError:  # of a bucket that is away
        return "unknown"
    return f"step {steps[-1]}" if steps else "no step yet"


def _is_whole(path: AnyPath) -> bool:
    if not files.is_remote(path) or (path / _COMMITTED).exists():
        return True
    # A copy of what a file system had: there, Orbax notes the time instead.
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        metadata = json.loads((path / "_CHECKPOINT_METADATA").read_text())
        return bool(metadata["commit_timestamp_nsecs"])
    return False


def is_native(folder: AnyPath) -> bool:
    """Whether Orbax can write there."""
    return not files.is_remote(folder) or str(folder).startswith("gs://")


def for_orbax(path: AnyPath) -> Any:
    """The same checkpoint where Orbax can read it."""
    if not files.is_remote(path):
        return pathlib.Path(paths.plain(path.parent), path.name)
    return epath.Path(str(path)) if is_native(path) else paths.local(path)


def upload(written: pathlib.Path, target: AnyPath) -> None:
    """Brings a checkpoint to a bucket."""
    (written / _COMMITTED).touch()
    files.upload(written, target, last=_COMMITTED)


def unless_away(folder: AnyPath, wait: Callable[[], None]) -> None:
    """`wait()`, but not for a lost bucket: TensorStore's patience with one has no end.

    Raises:
        OSError: the bucket was given up meanwhile, by the heartbeat of the lock for one.
    """
    if not files.is_remote(folder):
        return wait()
    finished = futures.Future()

    def finish() -> None:
        try:
            finished.set_result(wait())
        except Exception as error:
            finished.set_exception(error)

    threading.Thread(target=finish, daemon=True, name="checkpoint").start()
    while not futures.wait([finished], 1).done:
        if folder.is_away:
            raise OSError(f"{folder} cannot be reached")
    return finished.result()


def remove(path: AnyPath) -> None:
    """Removes a checkpoint, as far as that is possible; a kill on the way leaves no half of one."""
    with contextlib.suppress(OSError):
        if files.is_remote(path):
            (path / _COMMITTED).unlink(missing_ok=True)
        else:
            path = path.rename(path.with_name(f"{path.name}.orbax-checkpoint-tmp"))
        files.remove_tree(path)


def remove_unfinished(folder: AnyPath) -> None:
    """Removes what a run left that was killed while it saved."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            # Again where a failed save of this process still writes.
            remove = (
                path.rmtree if files.is_remote(path) else functools.partial(shutil.rmtree, path)
            )
            files.patiently(remove)
        elif _STEP.fullmatch(path.name) and not _is_whole(path):
            path.rmtree()
