"""Becomes a command that gets SIGTERM when its parent dies: `python die_with_parent.py PARENT COMMAND...`.

A file apart, which the command replaces: its settings stay in force, and a parent with threads need not
run code between fork and exec.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # Linux: the signal that this process gets when its parent dies
_RETRY = 75  # the exit status after which the launcher starts the command again


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before this process could watch it
        sys.exit(_RETRY)
    # SLURM may send its warning to all processes of a job; the parent handles it.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
