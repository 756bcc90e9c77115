"""Errors that are the user's to mend: told in one line, without a traceback, by the programs."""


class ConfigError(ValueError):
    """A wrong field: one line with its name, its value and what is allowed."""


class DataError(ValueError):
    """A wrong input: one line with the field or file, what it holds and what is allowed."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
