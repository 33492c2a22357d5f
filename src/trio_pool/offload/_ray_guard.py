"""What ends all processes of a Ray of ours as soon as this one is dead."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from uuid import uuid4

if TYPE_CHECKING:
    from collections.abc import Generator

_MARK = "TRIO_POOL_RAY"

# Some helpers of Ray's look for their parent a minute after their start only. It
# is told by the end of its input that we are gone, however that came about.
_GUARD = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.read(0, 1)
mark = sys.argv[1].encode()
for name in os.listdir("/proc"):
    try:
        with open(f"/proc/{name}/environ", "rb") as file:
            if mark in file.read().split(b"\\0"):
                os.kill(int(name), signal.SIGKILL)
    except (OSError, ValueError):
        pass
"""


@contextmanager
def marked() -> Generator[subprocess.Popen[bytes] | None, None, None]:
    """Mark what is started in this block; give the guard that ends it with us."""
    value = uuid4().hex
    guard: subprocess.Popen[bytes] | None = None
    if sys.platform == "linux":
        # It lives as long as its input is open, which nobody else has.
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, f"{_MARK}={value}"],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
    os.environ[_MARK] = value
    try:
        yield guard
    finally:
        os.environ.pop(_MARK, None)


def dismiss(guard: subprocess.Popen[bytes] | None) -> None:
    """Have a guard end what is left of a Ray that has been shut down, and leave."""
    if guard is not None:
        with suppress(OSError, subprocess.TimeoutExpired):
            guard.communicate(timeout=5)
