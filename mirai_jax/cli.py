"""What the programs share: errors of one line, and a quiet screen."""

import contextlib
import sys
from collections.abc import Iterator

from absl import flags, logging

from mirai_jax.errors import ConfigError, DataError, first_line


@contextlib.contextmanager
def program(*more: type[Exception], interrupted: str = "interrupted") -> Iterator[None]:
    """Ends with "error: ..." in one line and exit status 1 where the user can mend what is wrong.

    Args:
        more: kinds of errors that are the user's to mend, besides ConfigError and DataError.
        interrupted: what to say after Ctrl-C.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every file it writes
    try:
        yield
    except (ConfigError, DataError, *more) as error:
        sys.exit(f"error: {first_line(error)}")
    except KeyboardInterrupt:
        sys.exit(interrupted)
