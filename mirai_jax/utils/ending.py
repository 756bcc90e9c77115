"""How a program ends: with its status, within seconds, whatever the screen, signals or threads do.

SIGTERM, SIGHUP   Preempted, where the program is: status 75, "start the same command again"
Ctrl-C            KeyboardInterrupt; then the process ends without Python's teardown, which
                  crashes while XLA compiles in another thread
ignored signals   (SIGHUP under nohup, SIGINT in a script's background) stay ignored
a lost screen     (a closed terminal or pipe, a full disk) is no error
waiting threads   end with the process, GRACE seconds after the program
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO

from mirai_jax.utils.errors import Preempted

GRACE = 8.0  # seconds from the end of a program to the end of its process


class Screen:
    """A stream of text for which it is no error that nobody can read it."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # "é" where the encoding has none

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, function: Callable, *arguments: Any) -> None:
        try:
            function(*arguments)
        except BlockingIOError:
            pass  # its reader is slow: this text is lost, the next may not be
        except (OSError, ValueError):  # ValueError: it is closed
            with contextlib.suppress(OSError, ValueError):
                self._stream.flush()  # of what its buffer holds
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())  # also for libraries


def protect() -> None:
    """Prepares this process to end well; call it first, on the main thread."""
    for number in (0, 1, 2):  # else the next file to be opened would be the screen
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:
            setattr(sys, name, Screen(stream))
    signal.signal(signal.SIGTERM, _stop)
    for number, handle in ((signal.SIGINT, _interrupt), (signal.SIGHUP, _stop)):
        # Ignored, as under nohup and in a script's background jobs, it stays so.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)


def _stop(number: int, frame: object) -> None:
    end_within(GRACE, Preempted.status)
    raise Preempted("asked to stop; the same command resumes")


def _interrupt(number: int, frame: object) -> None:
    end_within(GRACE, 1)
    raise KeyboardInterrupt


def end_within(seconds: float, status: int) -> None:
    """Ends the process if it still runs after `seconds`."""
    timer = threading.Timer(seconds, leave, [status])
    timer.daemon = True
    timer.start()


def leave(status: int) -> None:
    """Ends this process and its child processes at once, without waiting for anything."""
    for child in multiprocessing.active_children():  # data workers would live on
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def after(run: Callable[[], Any]) -> None:
    """Calls `run` and ends the process with its status."""
    status = 1
    try:
        run()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.__context__, KeyboardInterrupt):
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            leave(status)
        raise
    except KeyboardInterrupt:
        leave(1)
    except Preempted as stop:  # before the program was ready for it
        status = stop.status
        print(stop, file=sys.stderr)
        sys.exit(status)
    finally:
        end_within(GRACE, status)
