"""Several processes as one run: starting JAX's distributed runtime, and agreeing on values.

A run on several hosts is the same program started once on each. Every process executes the same steps,
and JAX moves arrays between them. The first process alone writes files and prints. Files that all
processes read (data, workdir) lie on storage that all hosts share.
"""

import contextlib
import os
import pathlib
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mirai_jax.utils import ending
from mirai_jax.utils.errors import ConfigError, Lost, TrainingError, first_line

MODES = ("auto", "on", "off")

# Seconds to wait for what another host wrote: NFS shows it after a while.
PATIENCE = 10.0

NOT_SHARED = "the workdir must be on storage that all processes share"


def environment(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize` from a launcher's variables; None for one process.

    Variables of SLURM (srun) and Open MPI (mpirun) are read as JAX reads them. GKE sets
    TPU_WORKER_HOSTNAMES on hosts of a TPU slice.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", 1))
    if "SLURM_STEP_NODELIST" in environ and int(tasks) > 1:
        return {}  # JAX finds the rest
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "OMPI_MCA_orte_hnp_uri" in environ:
            return {}
        found = {
            "num_processes": int(environ["OMPI_COMM_WORLD_SIZE"]),
            "process_id": int(environ["OMPI_COMM_WORLD_RANK"]),
        }  # Open MPI 5 has no variable for the first process's address
        if "OMPI_COMM_WORLD_LOCAL_RANK" in environ:  # each process takes one of a host's GPUs
            found["local_device_ids"] = [int(environ["OMPI_COMM_WORLD_LOCAL_RANK"])]
        if environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == environ["OMPI_COMM_WORLD_SIZE"]:
            found["coordinator_address"] = f"localhost:{20_000 + os.getppid() % 10_000}"
        return found
    if "," in environ.get("TPU_WORKER_HOSTNAMES", ""):
        return {}
    return None


def start(
    mode: str,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat: int = 100,
    timeout: int = 300,
) -> None:
    """Joins the other processes of the run. Call it before anything else of JAX.

    Args:
        mode: 'auto' joins if the environment or the next three arguments describe several processes;
            'on' always joins (needed on a Cloud TPU slice); 'off' never does.
        coordinator: 'HOST:PORT' of the first process.
        process_id: this process's number, from 0.
        heartbeat: seconds of silence after which a process counts as dead.
        timeout: seconds to wait for the others at the start.

    If others do not join in time, JAX's runtime ends the process (status 134).

    Raises:
        ConfigError: arguments that do not go together, or no answer at the coordinator's address.
    """
    given = {"coordinator_address": coordinator, "num_processes": num_processes}
    given = {k: v for k, v in (given | {"process_id": process_id}).items() if v is not None}
    together = "--coordinator, --num_processes and --process_id"
    if mode == "off" and given:
        raise ConfigError(f"--distributed is 'off'; it goes without {together}")
    found = environment(os.environ)
    if mode == "off" or (mode == "auto" and not given and found is None):
        return
    if coordinator is not None and not re.fullmatch(r".*:\d+", coordinator):
        raise ConfigError(f"--coordinator is {coordinator!r}; it must be HOST:PORT")
    arguments = {**(found or {}), **given}
    count, index = arguments.get("num_processes"), arguments.get("process_id")
    if given and found is None and len(given) < 3:
        raise ConfigError(f"{together} go together; one is missing")
    if count is not None and index is not None and not 0 <= index < count:
        raise ConfigError(f"--process_id is {index}; it must be 0 to --num_processes - 1")
    which = f" as process {index} of {count}" if count is not None else ""
    with _reporting(f"joining the other processes{which}, for {timeout} s at most"):
        if coordinator is not None and index:
            _wait_for(coordinator, timeout)
        try:
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=timeout,
                heartbeat_timeout_seconds=heartbeat,
                shutdown_timeout_seconds=60,
            )
        except Exception as error:  # whatever the runtime makes of an address or of silence
            raise ConfigError(f"the processes did not meet: {first_line(error)}") from error


@contextlib.contextmanager
def _reporting(line: str) -> Iterator[None]:
    """Says what it waits for, at once and every 30 seconds."""
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(30):
            print(f"still {line} (--distributed=off goes alone)", file=sys.stderr, flush=True)

    print(line, file=sys.stderr, flush=True)
    threading.Thread(target=report, daemon=True, name="waiting").start()
    try:
        yield
    finally:
        ended.set()


def _wait_for(address: str, timeout: float) -> None:
    """Waits until a process listens there: JAX's own wait ends with a page of its stack."""
    host, port = address.rsplit(":", 1)
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"--coordinator is {address!r}, where nobody answered for {timeout:.0f} s "
                    f"({error}); it must be the address of process 0"
                ) from error
        time.sleep(0.5)


def is_first() -> bool:
    """Whether this process writes files and prints."""
    return jax.process_index() == 0


def host_device() -> jax.Device | None:
    """The CPU of this process; None, JAX's default device, where JAX_PLATFORMS leaves it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def means_lost(error: Exception) -> bool:
    """Whether an error means that another process cannot be reached."""
    words = ("unavailable", "deadline", "gloo", "nccl", "heartbeat", "connection", "coordination")
    text = str(error).lower()
    return jax.process_count() > 1 and any(word in text for word in words)


def explain(error: Exception) -> Lost | TrainingError:
    """What an error of the devices means, in one line."""
    reason = first_line(error)[:200]
    if "RESOURCE_EXHAUSTED" in str(error):
        return TrainingError(f"out of memory ({reason})")
    if means_lost(error):
        return Lost(f"another process is gone or cannot be reached ({reason})")
    return TrainingError(f"a device failed ({reason})")


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Raises Lost where a collective operation fails: another process is gone."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise Lost(f"another process is gone ({first_line(error)[:200]})") from error


def worst(here: int) -> int:
    """The largest of the processes' numbers; all processes must call it."""
    if jax.process_count() == 1:
        return here
    with _together():
        return int(np.max(multihost_utils.process_allgather(np.asarray(here))))


def from_first(tree: Any) -> Any:
    """The first process's NumPy arrays, in every process; all processes must call it."""
    if jax.process_count() == 1:
        return tree
    # As bytes: the broadcast is a sum over processes, and -0.0 + 0.0 is 0.0.
    raw = jax.tree.map(lambda x: np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8), tree)
    with _together():
        sent = jax.device_get(multihost_utils.broadcast_one_to_all(raw))
    return jax.tree.map(
        lambda x, like: np.frombuffer(np.asarray(x, np.uint8).tobytes(), like.dtype).reshape(
            like.shape
        ),
        sent,
        tree,
    )


def whole(array: jax.Array) -> np.ndarray:
    """A global array, however sharded, on every host; all processes must call it."""
    if jax.process_count() == 1:
        return np.asarray(array)
    with _together():
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def shares(count: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Deals `count` items to the processes in rounds, `size` to each.

    Yields:
        Of a round the first item, and this process's items, of which those past the last repeat it.
    """
    for start in range(0, count, size * jax.process_count()):
        first = start + size * jax.process_index()
        yield start, np.minimum(np.arange(first, first + size), count - 1)


def of_all(rows: np.ndarray) -> np.ndarray:
    """The rows of all processes, equally many of each, in the order of the processes; all must call it."""
    if jax.process_count() == 1:
        return rows
    with _together():
        return np.concatenate(list(multihost_utils.process_allgather(rows)))


def barrier(name: str) -> None:
    """Waits for every process."""
    if jax.process_count() > 1:
        with _together():
            multihost_utils.sync_global_devices(name)


def sees(path: pathlib.Path) -> bool:
    """Whether this process sees a path now or within PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while True:
        # Lists the folder: opening a folder makes NFS ask its server, while the absence of a name may
        # stay cached for half a minute.
        with contextlib.suppress(OSError):
            if any(path.name == other.name for other in path.parent.iterdir()):
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.25)


def blind(path: pathlib.Path) -> int:
    """A process that does not see a path of process 0; 0 if all do. All processes must call it."""
    return worst(0 if is_first() or sees(path) else jax.process_index())


def check_shared(folder: pathlib.Path) -> None:
    """Checks that all processes see what the first writes; all processes must call it.

    Raises:
        ConfigError: the folder is not shared, or cannot be written.
    """
    if jax.process_count() == 1:
        return
    # A random name, so that no cache or copy of the folder has it.
    token = from_first(np.frombuffer(secrets.token_bytes(8), np.uint8))
    path = folder.absolute() / f"shared_{token.tobytes().hex()}.tmp"
    try:
        if is_first():
            path.touch()
        process = blind(path)
    except OSError as error:
        raise ConfigError(f"workdir {folder} cannot be written: {error.strerror}") from error
    finally:
        if is_first():
            with contextlib.suppress(OSError):
                path.unlink()
    if process:
        raise ConfigError(
            f"process {process} does not see what process 0 writes in {folder.absolute()}: {NOT_SHARED}"
        )


def leave(status: int) -> None:
    """`ending.leave`, after a second in which the other processes can report what they know."""
    if jax.process_count() > 1 and is_first():
        # JAX's runtime ends the others as soon as its coordinator, in this process, is gone. If all
        # end for the same reason, this leaves them time to report it.
        time.sleep(1)
    ending.leave(status)
