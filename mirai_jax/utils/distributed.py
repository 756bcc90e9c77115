"""Several processes as one run: starting JAX's distributed runtime, and doing things alike.

A run on several hosts is the same program started once on each; every process executes the same
steps, and JAX carries arrays between them. What leaves the program (files, the screen) is the first
process's to write. Files that all read (data, workdir) lie on storage that all hosts see.
"""

import contextlib
import multiprocessing
import os
import pathlib
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mirai_jax.utils.errors import ConfigError, Lost, first_line

MODES = ("auto", "on", "off")

# Seconds that storage is given to show what another host wrote: NFS shows it after a while.
PATIENCE = 10.0

NOT_SHARED = "the workdir must be on storage that all processes share"


def environment(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """What a launcher says about the processes, as arguments of `jax.distributed.initialize`.

    SLURM (srun) and Open MPI (mpirun) are read as JAX reads them; TPU_WORKER_HOSTNAMES is set on
    hosts of a TPU slice by GKE. Returns None where there is one process.
    """
    if "SLURM_STEP_NODELIST" in environ and int(environ.get("SLURM_NTASKS", 1)) > 1:
        return {}  # JAX finds the rest
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "OMPI_MCA_orte_hnp_uri" in environ:
            return {}
        found = {
            "num_processes": int(environ["OMPI_COMM_WORLD_SIZE"]),
            "process_id": int(environ["OMPI_COMM_WORLD_RANK"]),
        }  # since Open MPI 5 it does not say where the first process runs
        if "OMPI_COMM_WORLD_LOCAL_RANK" in environ:  # of several GPUs each process takes one
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
    """Joins the other processes of the run; nothing of JAX may have been used before.

    Args:
        mode: 'auto' joins where the environment or the next three say that there are several
            processes; 'on' always (a Cloud TPU slice says so only when asked); 'off' never.
        coordinator: 'HOST:PORT' of the first process.
        num_processes: how many there are.
        process_id: which this is, from 0.
        heartbeat: seconds of silence after which a process counts as dead.
        timeout: seconds to wait for the others at the start.

    Where others do not come in time JAX's runtime ends the process by itself (status 134).

    Raises:
        ConfigError: arguments that do not go together, or nobody at the coordinator's address.
    """
    given = {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if mode == "off" and given:
        raise ConfigError("--distributed is 'off'; it goes without --coordinator, --num_processes "
                          "and --process_id")  # fmt: skip
    found = environment(os.environ)
    if mode == "off" or (mode == "auto" and not given and found is None):
        return
    if coordinator is not None and not (
        ":" in coordinator and coordinator.split(":")[-1].isdigit()
    ):
        raise ConfigError(f"--coordinator is {coordinator!r}; it must be HOST:PORT")
    arguments = {**(found or {}), **given}
    count, index = arguments.get("num_processes"), arguments.get("process_id")
    if given and found is None and len(given) < 3:
        raise ConfigError(
            "--coordinator, --num_processes and --process_id go together; "
            f"{' and '.join(sorted(given))} alone does not start a run of several processes"
        )
    if count is not None and index is not None and not 0 <= index < count:
        raise ConfigError(
            f"--process_id is {index}; it must be 0 to {count - 1}, below --num_processes"
        )
    which = f" as process {index} of {count}" if count is not None else ""
    print(f"joining the other processes{which}", file=sys.stderr, flush=True)
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
        raise ConfigError(f"the processes of the run did not meet: {first_line(error)}") from error


def _wait_for(address: str, timeout: float) -> None:
    """Until somebody listens there: JAX's own wait for it ends with a page of its stack."""
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
    """Whether this process writes files and speaks to the screen."""
    return jax.process_index() == 0


def means_lost(error: Exception) -> bool:
    """Whether an error tells that another process cannot be reached."""
    words = ("unavailable", "deadline", "gloo", "nccl", "heartbeat", "connection", "coordination")
    text = str(error).lower()
    return jax.process_count() > 1 and any(word in text for word in words)


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """What all processes do together fails where one of them is gone.

    Raises:
        Lost
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise Lost(f"another process is gone ({first_line(error)[:200]})") from error


def worst(here: int) -> int:
    """The largest of the numbers that the processes give; all must ask."""
    if jax.process_count() == 1:
        return here
    with _together():
        return int(np.max(multihost_utils.process_allgather(np.asarray(here))))


def from_first(tree: Any) -> Any:
    """The first process's arrays (NumPy), in every process; all must ask."""
    if jax.process_count() == 1:
        return tree
    # As bytes: what is sent is a sum over processes, and -0.0 + 0.0 is 0.0.
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
    """An array, however it lies on the devices of all processes, on every host; all must ask."""
    if jax.process_count() == 1:
        return np.asarray(array)
    with _together():
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        with _together():
            multihost_utils.sync_global_devices(name)


def sees(path: pathlib.Path) -> bool:
    """Whether this process sees it, now or before PATIENCE ends."""
    end = time.monotonic() + PATIENCE
    while True:
        # The folder is listed, not the path looked up: opening a folder makes NFS ask its server,
        # where that a name is not there may be cached for half a minute.
        with contextlib.suppress(OSError):
            if path.name in os.listdir(path.parent):
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.25)


def blind(path: pathlib.Path) -> int:
    """A process that does not see a path which process 0 sees; 0 if all do. All must ask."""
    return worst(0 if is_first() or sees(path) else jax.process_index())


def check_shared(folder: pathlib.Path) -> None:
    """Ends all processes alike where one does not see what the first writes; all must ask.

    Raises:
        ConfigError: the folder is not shared, or cannot be written.
    """
    if jax.process_count() == 1:
        return
    # A name that nobody has asked for: no cache and no copy of the folder can know it.
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
    """Ends this process at once, and those that it started: nobody is waited for."""
    for child in multiprocessing.active_children():  # data workers would live on
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_count() > 1 and is_first():
        # JAX's runtime ends the others as soon as its coordinator, which is here, is gone: where
        # all of them end for the same reason, they tell it first.
        time.sleep(1)
    os._exit(status)
