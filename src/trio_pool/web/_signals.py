"""Waits for the signal to end, and lets pools finish their work."""

import signal
from collections.abc import Iterable
from typing import Any

import trio

from .._checks import check_seconds, refuse
from .._events import ShutdownReport
from .._pool import Pool, TaskPool
from ._crew import open_crew

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def drain_on_signal(
    *pools: Pool[Any, Any] | TaskPool,
    grace: float | None = None,
    signals: Iterable[signal.Signals] = _SIGNALS,
) -> tuple[ShutdownReport, ...]:
    """Wait for a signal, then shut the pools down; return their reports.

    All at the same time, each within ``grace`` seconds, by default those of the
    pool. A second signal cancels them at once. To be called in the main thread,
    inside the blocks of the pools; a dashboard between them and this answers
    meanwhile. Cancelling it gives the signals back to whom they belonged to.

    Raises:
      TypeError, ValueError: a bad argument, before it waits.
    """
    if not pools:
        raise ValueError(refuse("pools", pools, "one pool or more"))
    for pool in pools:
        if not callable(getattr(pool, "shutdown", None)):
            raise TypeError(refuse("pools", pool, "a pool"))
    if grace is not None:
        check_seconds("grace", grace)
    reports: dict[int, ShutdownReport] = {}

    async def shut_down(at: int) -> None:
        reports[at] = await pools[at].shutdown(grace)
        if len(reports) == len(pools):
            drained.set()

    async def cancel_at_second() -> None:
        async for _ in received:
            for pool in pools:
                pool.cancel()

    drained = trio.Event()
    with trio.open_signal_receiver(*signals) as received:
        async for _ in received:
            break
        async with open_crew() as crew:
            for at in range(len(pools)):
                crew.start_soon(shut_down, at)
            crew.start_soon(cancel_at_second)
            await drained.wait()
            crew.cancel()
    return tuple(reports[at] for at in range(len(pools)))
