"""Run a command that dies with the process that started it: `python -I -S tether.py PARENT_PID COMMAND ARGUMENT…`.

On Linux the kernel then sends it SIGKILL when its parent ends, in whatever way: also by kill -9. The order holds on in
the command, which takes the place of this program. Elsewhere the command just runs.
"""

from __future__ import annotations

import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main() -> None:
    """Become the command."""
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        return  # it ended before the kernel had the order
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
