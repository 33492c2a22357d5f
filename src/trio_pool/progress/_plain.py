"""The bars that need no other library: one line on a terminal, lines in a log."""

import logging
import shutil
import sys
from typing import TextIO, final

import trio

from ._pace import Pace, takes_more

_log = logging.getLogger("trio_pool.progress")


@final
class PlainBar:
    """A bar of one line, which needs no other library."""

    def __init__(self, label: str = "", *, file: TextIO | None = None) -> None:
        self._label = f"{label}: " if label else ""
        self._file = file or sys.stderr
        self._total: int | None = None
        self._width = 0

    def start(self, total: int | None) -> None:
        """Begin a line."""
        self._total = total
        self._pace = Pace()

    def draw(self, done: int, failed: int) -> None:
        """Write the line anew over itself."""
        if not takes_more(self._file):
            return
        columns = shutil.get_terminal_size().columns - 1
        text = self._label + self._pace.sentence(done, failed, self._total)
        room = columns - len(text) - 3
        if self._total and room >= 10:
            full = min(room, room * (done + failed) // self._total)
            text = f"{text} [{'#' * full}{' ' * (room - full)}]"
        text = text[:columns]
        self._file.write("\r" + text.ljust(self._width))
        self._file.flush()
        self._width = len(text)

    def close(self) -> None:
        """Leave the line as it is, and begin the next one."""
        if takes_more(self._file):
            self._file.write("\n")
            self._file.flush()


@final
class LogLines:
    """A line in the log ``trio_pool.progress`` every few seconds, and a last one."""

    def __init__(self, label: str = "", *, every: float = 5.0) -> None:
        self._label = label or "progress"
        self._every = every
        self._total: int | None = None
        self._last = (0, 0)

    def start(self, total: int | None) -> None:
        """Begin; the first line comes when something can be said."""
        self._total = total
        self._pace = Pace()
        self._due = trio.current_time() + self._every

    def draw(self, done: int, failed: int) -> None:
        """Log a line if the last one was long ago."""
        self._last = (done, failed)
        if trio.current_time() >= self._due:
            self._due = trio.current_time() + self._every
            self._tell()

    def close(self) -> None:
        """Log how it ended."""
        self._tell()

    def _tell(self) -> None:
        done, failed = self._last
        sentence = self._pace.sentence(done, failed, self._total)
        facts = {"done": done, "failed": failed, "total": self._total}
        _log.info("%s: %s", self._label, sentence, extra=facts)
