"""What a process of `in_process` runs: its host, in a group that dies with us."""

from __future__ import annotations

import os
from multiprocessing import parent_process
from typing import TYPE_CHECKING

from ._lifeline import die_with
from ._shim import Host

if TYPE_CHECKING:
    from ._shim import Fate, Report

_hosts: list[Host] = []


def begin() -> int:
    """Be a process that runs jobs; return its id."""
    if os.name == "posix":
        # So that what jobs have started can be ended with them.
        os.setpgid(0, 0)
        parent = parent_process()
        if parent is not None:
            die_with(parent.sentinel)
    return os.getpid()


def set_up(work: bytes) -> Fate | None:
    """Have a host here; return what went wrong, if anything has."""
    host = Host(work)
    _, _, trouble = host.set_up()
    if trouble is None:
        _hosts.append(host)
    return trouble


def run(call: int, items: list[bytes]) -> Report | None:
    """Run the items of a call; None if this process is another than was meant."""
    return _hosts[0].run("", call, items) if _hosts else None
