"""The threads of a plain function, and whether all of them hang."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, final

import trio

from .._nursery import open_bare_nursery
from ._ends import Broken, Work

_PATIENCE = 10.0
"""Seconds, at least, for which threads that are left behind may hold all workers."""


@final
class Threads:
    """Knows since when each thread has been running."""

    def __init__(self, workers: int, timeout: float) -> None:
        self.timeout = timeout
        self.patience = max(timeout, _PATIENCE)
        self._workers = workers
        self._begun: dict[object, float] = {}

    def watch(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Return a function that does the same, and is watched."""

        def run(item: Any) -> Any:
            mark = object()
            self._begun[mark] = monotonic()
            try:
                return function(item)
            finally:
                del self._begun[mark]

        return run

    def all_hang(self) -> bool:
        """Say whether every worker waits, and long since, for one left behind."""
        before = monotonic() - self.timeout - self.patience
        # The copy is made in one step: threads come and go.
        begun = list(self._begun.values())
        return sum(since < before for since in begun) >= self._workers


@asynccontextmanager
async def watching(threads: Threads, work: Work) -> AsyncGenerator[None, None]:
    """End the work if all of its threads hang while the block runs."""
    async with open_bare_nursery() as nursery:
        nursery.start_soon(_watch, threads, work)
        yield
        nursery.cancel_scope.cancel()


async def _watch(threads: Threads, work: Work) -> None:
    # Threads tell nobody on the loop when they begin.
    while not threads.all_hang():  # noqa: ASYNC110
        await trio.sleep(min(threads.patience, 1e6) / 4)
    text = "all workers are held by threads that have not ended since their timeout"
    work.fail(Broken(f"{text}: a plain function cannot be stopped"))
