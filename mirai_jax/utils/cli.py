"""What the programs share: how they start, errors of one line, and a quiet screen."""

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from mirai_jax.utils import distributed, host_memory
from mirai_jax.utils.errors import ConfigError, DataError, Lost, Preempted, first_line


def run(main: Callable[[list[str]], None], **options: Any) -> None:
    """Starts a program: `app.run`, before which a process on a CPU is told to keep its memory."""
    host_memory.keep_freed()
    app.run(main, **options)


@contextlib.contextmanager
def program(*more: type[Exception], interrupted: str = "interrupted") -> Iterator[None]:
    """Ends with "error: ..." in one line, and the error's `status`, where a traceback says no more.

    So do errors of the devices, whose memory may not suffice.

    Args:
        more: kinds of errors that are told so, besides ConfigError and DataError.
        interrupted: what to say after Ctrl-C.
    """
    if not flags.FLAGS["verbosity"].present:
        _quieten()
    try:
        yield
    except (ConfigError, DataError, *more) as error:
        _fail(first_line(error), getattr(error, "status", 1))
    except jax.errors.JaxRuntimeError as error:
        lost = distributed.means_lost(error)
        memory = "RESOURCE_EXHAUSTED" in str(error)
        what = (
            "another process is gone" if lost else "out of memory" if memory else "a device failed"
        )
        _fail(f"{what} ({first_line(error)[:200]})", Lost.status if lost else 1)
    except Preempted as stop:
        print(first_line(stop), file=sys.stderr)
        sys.exit(stop.status)  # all processes are here: they part in good order
    except KeyboardInterrupt:
        sys.exit(interrupted)


def _fail(message: str, status: int) -> NoReturn:
    if jax.distributed.is_initialized():
        print(f"error: process {jax.process_index()}: {message}", file=sys.stderr)
        distributed.leave(status)
    sys.exit(f"error: {message}")  # status 1


@functools.cache
def _quieten() -> None:
    """Once: leaves out what Orbax says of files beyond its exceptions, which end in one line here.

    It reads and writes all arrays at once: where one fails, the others end with pages of tracebacks.
    """
    logging.set_verbosity(logging.WARNING)  # it tells every file it writes
    unheard = "exception was never retrieved"  # asyncio's, of arrays after the first
    logging.get_absl_handler().addFilter(
        lambda record: "/orbax/" not in record.pathname and unheard not in record.getMessage()
    )
    tell, tell_unraisable = sys.excepthook, sys.unraisablehook

    def too_late(error: BaseException | None) -> bool:  # TensorStore's threads, in either way
        return str(error) == "Event loop is closed"

    def excepthook(kind: type, error: BaseException, where: types.TracebackType | None) -> None:
        if not too_late(error):
            tell(kind, error, where)

    def unraisablehook(unraisable: "sys.UnraisableHookArgs") -> None:
        code = getattr(unraisable.object, "cr_code", None)
        of_orbax = code is not None and "/orbax/" in code.co_filename
        if not of_orbax and not too_late(unraisable.exc_value):
            tell_unraisable(unraisable)

    sys.excepthook, sys.unraisablehook = excepthook, unraisablehook


def flag_values(module: str) -> flags.FlagValues:
    """Where a program defines its flags: on the command line, if it is the one that runs.

    Where it is only imported they are its own, so that programs may share names.

    Args:
        module: its `__name__`.
    """
    return flags.FLAGS if module == "__main__" else flags.FlagValues()


def parse_known(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """The arguments that are no flags of the program: those of its config. An error is one line."""
    try:
        return values(argv, known_only=True)
    except flags.Error as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def share(process_index: int | None, process_count: int | None) -> tuple[int, int]:
    """Which share of a work this process does: (index, count), as the flags say or as JAX knows.

    Raises:
        ConfigError: there is no such share.
    """
    if (process_index is None) != (process_count is None):
        raise ConfigError("--process_index and --process_count go together; one is missing")
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if not 0 <= index < count:
        raise ConfigError(
            f"--process_index is {index}; it must be 0 to {count - 1}, below --process_count"
        )
    return index, count
