"""A run's folder: its config, and the rules for continuing it.

config.json      the whole config
classes.json     the name of each label
lock.json        while a run is at work: its process, host and command
metrics.jsonl    one JSON object a logged step; also as TensorBoard event files
events.jsonl     starts, stops and whatever else happened to the run, with the time
tokenizer.npz    the tokenizer, where the run fitted one
parts.json       checksums of data and frozen networks, which a continued run must have too
checkpoints/     train states with the data iterator
samples/         a grid of samples every so often
wandb.json       the run's id at Weights & Biases, where it is there
profile/         a profile of some steps, where the config asks for one
summary.png      loss curves and the last grid, when the run is finished
"""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from mirai_jax.config.compare import check_same_run, to_json
from mirai_jax.config.schema import RunConfig
from mirai_jax.utils import distributed, files
from mirai_jax.utils.errors import ConfigError, first_line
from mirai_jax.utils.locks import FolderLock
from mirai_jax.weights import patch_codebook


def check_workdir(
    workdir: pathlib.Path, config: Mapping[str, Any], group: type = RunConfig
) -> dict[str, tuple[Any, Any]]:
    """Checks that the folder is new or holds the same run. Nothing is written.

    Returns:
        The fields that differ from the run so far and are allowed to.

    Raises:
        ConfigError: the folder cannot be used, or holds a run of another config.
    """
    path = workdir / "config.json"
    try:
        if workdir.exists() and not workdir.is_dir():
            raise ConfigError(f"workdir is {str(workdir)!r}; it must be a folder or not exist yet")
        if not path.exists():
            return {}
        old = json.loads(path.read_text())
        if not isinstance(old, dict):
            raise ConfigError(f"{path} is damaged (it holds no config); remove it to start over")
        return check_same_run(old, config, str(workdir), group)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"workdir {workdir} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; brackets, 1,000 deep
        raise ConfigError(
            f"{path} is damaged ({first_line(error)}); remove it to start over"
        ) from error


@contextlib.contextmanager
def claim(
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    identity: Mapping[str, str],
    codebook: Any,
    *,
    fresh: bool,
) -> Iterator[None]:
    """Creates or continues the folder, which belongs to this run in the block. All processes must call.

    Only when all that the config names was found, so that a mistake leaves nothing behind, and only
    when every process has seen what was there.

    Args:
        identity: checksums of data and frozen networks; see `check_same`.
        codebook: parameters of a tokenizer that the run fitted, or None.
        fresh: whether the run has no checkpoint yet.

    Raises:
        ConfigError: the folder cannot be written or is not shared, holds a run of other data, or
            another process is at work in it.
    """
    if not fresh:
        check_same(identity, workdir, write=False)
    distributed.barrier("begin")
    with FolderLock(workdir).held() if distributed.is_first() else contextlib.nullcontext():
        if distributed.is_first():
            try:
                files.write_text(workdir / "config.json", to_json(config))
            except OSError as error:
                raise ConfigError(
                    f"workdir {workdir} cannot be written: {error.strerror}"
                ) from error
            path = workdir / "tokenizer.npz"
            if codebook is not None and not path.exists():
                patch_codebook.save_params(path, codebook)
            if fresh:
                (workdir / "parts.json").unlink(missing_ok=True)  # of a start that saved nothing
            check_same(identity, workdir, write=True)
        distributed.barrier("workdir")
        distributed.check_shared(workdir)
        yield


def check_same(identity: Mapping[str, str], workdir: pathlib.Path, *, write: bool) -> None:
    """Refuses to continue a run on other data or with other frozen networks than it began with.

    Paths may change, since files move; parts.json says what they held: the `identity` of a run. A
    tokenizer that only draws samples may also be added later. `write` adds what is new.

    Raises:
        ConfigError: names what differs.
    """
    file = workdir / "parts.json"
    try:
        before = json.loads(file.read_text())
        if not all(isinstance(checksum, str) for checksum in before.values()):
            raise ValueError("checksums are text")
    except FileNotFoundError:
        before = {}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{file} is damaged; remove it to continue without its check") from error
    if changed := [name for name, now in identity.items() if before.get(name, now) != now]:
        checksums = (f"{n} was {before[n][:12]}, is {identity[n][:12]}" for n in changed)
        raise ConfigError(
            f"workdir {workdir} holds a run that began with another {' and '.join(changed)} (checksum "
            f"of {'; '.join(checksums)}); use the same files, or another --workdir (to continue on what "
            f"is there now, remove {' and '.join(map(repr, changed))} from {file})"
        )
    if write and before != {**before, **identity}:
        files.write_text(file, json.dumps({**before, **identity}, indent=2) + "\n")


def note_event(workdir: pathlib.Path, event: str, **fields: Any) -> None:
    """Adds a line to events.jsonl; each further process has its own file, events-N.jsonl."""
    name = f"events-{jax.process_index()}.jsonl" if jax.process_index() else "events.jsonl"
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **fields}
    files.append(workdir / name, json.dumps(line) + "\n")


def is_preempted(workdir: files.AnyPath) -> bool:
    """Whether a run was asked to stop, saved its step and was not started again since."""
    try:
        *_, line = (workdir / "events.jsonl").read_text().splitlines()
        return json.loads(line)["event"] == "preempted"
    except (OSError, ValueError, KeyError, TypeError):  # none, or a line that a kill cut off
        return False
