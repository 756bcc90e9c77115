"""Becomes a command that is told to stop when its parent dies: `python child.py PARENT COMMAND...`.

A file of its own, which the command replaces: what it sets stays set, and nothing need be run
between fork and exec of a parent that has threads.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of Linux: the signal that this process gets when its parent dies
_AGAIN = 75  # the exit status that says "start me again"


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before it could be watched
        sys.exit(_AGAIN)
    # SLURM's warning, where it goes to all processes of a job: the parent sees to it.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
