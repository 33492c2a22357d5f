"""Ctrl-C and SIGTERM: the first one cancels what runs, the second ends it at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from typing import final

import trio

from ._ends import SIGNALLED

_HEEDED = (signal.SIGINT, signal.SIGTERM)


@final
class Heard:
    """The first signal that came, if one did."""

    def __init__(self, work: trio.CancelScope) -> None:
        self.code: int | None = None
        """The exit code for it."""
        self._work = work
        self._token = trio.lowlevel.current_trio_token()

    def hear(self, number: int, _: object) -> None:
        """Handle a signal, even while a function of the user's blocks the loop."""
        code = SIGNALLED + number
        if self.code is not None:
            os._exit(code)
        self.code = code
        self._token.run_sync_soon(self._work.cancel)


@contextmanager
def heed_signals(work: trio.CancelScope) -> Generator[Heard, None, None]:
    """Have the first signal cancel the work, as long as the block runs."""
    heard = Heard(work)
    # Who has started this with a signal ignored, as `nohup` does, means it.
    heeded = [n for n in _HEEDED if signal.getsignal(n) is not signal.SIG_IGN]
    before = [(number, signal.signal(number, heard.hear)) for number in heeded]
    try:
        yield heard
    finally:
        for number, handler in before:
            signal.signal(number, handler)
