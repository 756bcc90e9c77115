"""Errors that programs report in one line without a traceback; `status` is the exit status."""


class ConfigError(ValueError):
    """A wrong field: one line with its name, its value and what is allowed."""

    status = 1


class DataError(ValueError):
    """A wrong input: one line with the field or file, what it holds and what is allowed."""

    status = 1


class Unreadable(DataError):
    """A record or an image that cannot be read or decoded: others can stand in for it."""


class Damaged(Unreadable):
    """An image whose storage is there, but whose bytes are not."""


class TrainingError(RuntimeError):
    """A run cannot continue: one line with the step and what to do."""

    status = 1


class Preempted(BaseException):  # no Exception, for `except Exception` must not catch a signal
    """A run was asked to stop and has saved its state: the same command resumes it."""

    status = 75  # "try again" among the statuses of sysexits.h


class Lost(RuntimeError):
    """Another process of the run died or hangs: restart all of them."""

    status = 76


# What to do where memory does not suffice.
LESS_MEMORY = "larger mesh.fsdp or accumulate, model.remat or a smaller batch_size need less"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
