"""What all programs share: their start, errors of one line, and a quiet screen."""

import contextlib
import functools
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from logging import getLogger
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from mirai_jax.utils import distributed, ending, host_memory
from mirai_jax.utils.errors import ConfigError, DataError, Preempted, first_line
from mirai_jax.utils.remote import Unreachable


def run(main: Callable[[list[str]], None], **options: Any) -> None:
    """Starts a program with `app.run`, after `host_memory.keep_freed` and `ending.protect`."""
    ending.protect()
    host_memory.keep_freed()
    argv = [sys.argv[0], *map(_paths, sys.argv[1:])]
    ending.after(functools.partial(app.run, main, argv=argv, **options))


def _paths(argument: str) -> str:
    """An argument with ~ expanded (not that of a config, which a workdir keeps)."""
    name, equals, value = argument.partition("=") if argument[:1] == "-" else ("", "", argument)
    if name.startswith("--config."):
        return argument
    return name + equals + ",".join(map(os.path.expanduser, value.split(",")))


@contextlib.contextmanager
def program(
    *more: type[Exception], interrupted: str = "interrupted", argv: Sequence[str] = ()
) -> Iterator[None]:
    """Turns expected errors into one line, "error: ...", and the error's exit `status`.

    Expected are ConfigError, DataError, storage that does not answer, errors of the devices (such as too
    little memory) and `more`.
    `interrupted` is the message after Ctrl-C. `argv` is what the parser of flags left, of a program that
    takes flags alone.
    """
    if not flags.FLAGS["verbosity"].present:
        _quieten()
    try:
        if argv[1:]:
            raise ConfigError(f"argument {argv[1]!r} is not understood; all are --flags")
        yield
    except (ConfigError, DataError, Unreachable, *more) as error:
        _fail(first_line(error), getattr(error, "status", 1))
    except jax.errors.JaxRuntimeError as error:
        found = distributed.explain(error)
        _fail(first_line(found), found.status)
    except Preempted as stop:
        print(first_line(stop), file=sys.stderr)
        sys.exit(stop.status)  # all processes stop together and shut down in order
    except (RuntimeError, AssertionError) as error:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if not frames[-1].endswith("xla_bridge.py"):
            raise
        why, platforms = first_line(error)[:200], os.environ.get("JAX_PLATFORMS", "")
        _fail(f"JAX_PLATFORMS is {platforms!r}; JAX cannot use it ({why}); cpu is always there", 1)
    except KeyboardInterrupt:
        sys.exit(interrupted)


def _fail(message: str, status: int) -> NoReturn:
    if jax.distributed.is_initialized():
        print(f"error: process {jax.process_index()}: {message}", file=sys.stderr)
        distributed.leave(status)
    sys.exit(f"error: {message}")  # status 1


@functools.cache
def _quieten() -> None:
    """Silences Orbax beyond its exceptions, which end in one line here. Takes effect once.

    It reads and writes all arrays at once: where one fails, the others end with pages of tracebacks.
    """
    logging.set_verbosity(logging.WARNING)  # it logs every file that it writes
    unretrieved = "exception was never retrieved"  # asyncio's, of arrays after the first
    wanted = lambda record: (
        "/orbax/" not in record.pathname and unretrieved not in record.getMessage()
    )
    # The loggers too: a package that logs to Python's root gives it another handler.
    for where in (logging.get_absl_handler(), *map(getLogger, ("absl", "asyncio"))):
        where.addFilter(wanted)
    show, show_unraisable = sys.excepthook, sys.unraisablehook

    def too_late(error: BaseException | None) -> bool:  # TensorStore's threads, in either way
        return str(error) == "Event loop is closed"

    def excepthook(kind: type, error: BaseException, where: types.TracebackType | None) -> None:
        if not too_late(error):
            show(kind, error, where)

    def unraisablehook(unraisable: "sys.UnraisableHookArgs") -> None:
        code = getattr(unraisable.object, "cr_code", None)
        of_orbax = code is not None and "/orbax/" in code.co_filename
        if not of_orbax and not too_late(unraisable.exc_value):
            show_unraisable(unraisable)

    sys.excepthook, sys.unraisablehook = excepthook, unraisablehook


def flags_of(module: str) -> tuple[flags.FlagValues, types.SimpleNamespace]:
    """The flags of the program `module` (its `__name__`), and what defines them: `string(...)` and so on.

    They are the command line's if the program runs. An imported program has separate flags, so that
    programs may share names.
    """
    values = flags.FLAGS if module == "__main__" else flags.FlagValues()
    kinds = "string", "integer", "float", "bool", "enum", "list", "multi_enum", "multi_string"
    define = (functools.partial(getattr(flags, f"DEFINE_{k}"), flag_values=values) for k in kinds)
    return values, types.SimpleNamespace(**dict(zip(kinds, define, strict=True)))


def parse_known(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Parses the program's flags and returns the other arguments, its config's. Errors are one line."""
    try:
        return values(argv, known_only=True)
    except flags.Error as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def share(process_index: int | None, process_count: int | None) -> tuple[int, int]:
    """This process's share of the work: (index, count), from the flags or else from JAX.

    Raises:
        ConfigError: the flags do not name a share.
    """
    if (process_index is None) != (process_count is None):
        raise ConfigError("--process_index and --process_count go together; one is missing")
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if not 0 <= index < count:
        raise ConfigError(f"--process_index is {index}; it must be 0 to --process_count - 1")
    return index, count
