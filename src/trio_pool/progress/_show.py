"""The one task that draws how far many jobs are, ten times a second."""

import sys
from collections.abc import AsyncGenerator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, final

import trio

from .._events import log
from .._nursery import open_bare_nursery, whole_block
from .._progress import AnyProgress, Counts, Progress, check_progress
from ._pace import is_terminal
from ._plain import LogLines, PlainBar

_INTERVAL = 0.1
"""Seconds between two draws."""


@whole_block
async def show_progress(
    progress: AnyProgress, counts: Counts, total: int | None
) -> AsyncGenerator[None, None]:
    """Draw while the block runs, and once more at its end, however that comes.

    ``counts()`` gives the jobs that are done and those that have failed so far.
    Whatever counts them only adds up ints; one task reads them.

    Raises:
      TypeError: ``progress`` is none.
    """
    check_progress(progress)
    if progress is False:
        yield
        return
    display = _Display(_bar_of(progress), counts, total)
    try:
        async with open_bare_nursery() as nursery:
            nursery.start_soon(display.keep_drawn, name="trio_pool progress")
            try:
                yield
            finally:
                display.scope.cancel()
    finally:
        display.end()


def _bar_of(progress: AnyProgress) -> Progress:
    """Choose what suits the terminal, if nothing is wanted in particular."""
    if not isinstance(progress, (bool, str)):
        return progress
    label = progress if isinstance(progress, str) else ""
    if not is_terminal(sys.stderr):
        return LogLines(label)
    if find_spec("tqdm") is None:
        return PlainBar(label)
    bars = import_module("._tqdm", __package__)
    return bars.TqdmBar(label)  # type: ignore[no-any-return]


@final
class _Display:
    """One bar and what it shows."""

    def __init__(self, bar: Progress, counts: Counts, total: int | None) -> None:
        self.scope = trio.CancelScope()
        self._bar: Progress | None = bar
        self._counts = counts
        self._total = total
        self._has_begun = False

    async def keep_drawn(self) -> None:
        """Draw until the scope is cancelled."""
        with self.scope:
            while True:
                self._draw()
                await trio.sleep(_INTERVAL)

    def end(self) -> None:
        """Draw how it ended, unless it ended before it began."""
        if self._has_begun or any(self._counts()):
            self._draw()
            self._call("close")

    def _draw(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._call("start", self._total)
        self._call("draw", *self._counts())

    def _call(self, method: str, *args: Any) -> None:
        if self._bar is not None:
            try:
                getattr(self._bar, method)(*args)
            except Exception:
                self._bar = None
                log.exception("%s of a progress raised; it is not called again", method)
