"""What has a process end with its parent: a pipe that the parent holds open."""

from __future__ import annotations

import os
import sys
import threading
from signal import SIGKILL

if sys.platform == "linux":
    import fcntl

# Of fcntl(2); the module has no such name in Python 3.11.
_F_SETSIG = 10


def die_with(lifeline: int) -> None:
    """Have this process end as the other end of a pipe is closed, whatever runs here.

    On Linux the kernel kills the whole group then, and a job that never lets go of
    the interpreter cannot keep it off. Elsewhere a thread ends the process.
    """
    if sys.platform == "linux":
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, _F_SETSIG, SIGKILL)
        flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)
    else:
        threading.Thread(target=_end_with, args=[lifeline], daemon=True).start()


def _end_with(lifeline: int) -> None:
    os.read(lifeline, 1)
    os._exit(1)
