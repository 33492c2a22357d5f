"""The floors: what bare trio can do, with none of the promises of a pool.

Each opener is an async context manager that gives a ``process``-like
or ``map``-like async function, written as bare trio allows and no safer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

import outcome
import trio
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

Handler = Callable[[Any], Awaitable[Any]]
Process = Callable[[Any], Awaitable[Any]]
Map = Callable[[Iterable[Any]], Awaitable[list[Any]]]


def _never(_: object) -> Abort:
    return Abort.FAILED


@asynccontextmanager
async def floor_process(size: int, handler: Handler) -> AsyncGenerator[Process]:
    """The floor: a deque of parked tasks woken by `reschedule`."""
    jobs: deque[tuple[Task, Any]] = deque()
    idle: deque[Task] = deque()

    async def worker() -> None:
        while True:
            if not jobs:
                idle.append(current_task())
                await wait_task_rescheduled(lambda _: Abort.SUCCEEDED)
                continue
            caller, x = jobs.popleft()
            reschedule(caller, outcome.Value(await handler(x)))

    async def process(x: Any) -> Any:
        jobs.append((current_task(), x))
        if idle:
            reschedule(idle.popleft())
        return await wait_task_rescheduled(_never)

    async with trio.open_nursery() as nursery:
        for _ in range(size):
            nursery.start_soon(worker)
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        yield process
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def floor_map(size: int, handler: Handler) -> AsyncGenerator[Map]:
    """The floor: workers sharing one iterator, yielding every 0.5 ms."""

    async def map_items(items: Iterable[Any]) -> list[Any]:
        shared = iter(enumerate(items))
        results: list[Any] = []

        async def worker() -> None:
            rested = perf_counter()
            for index, item in shared:
                results.append(None)
                results[index] = await handler(item)
                if perf_counter() - rested > 0.0005:
                    await trio.lowlevel.checkpoint()
                    rested = perf_counter()

        async with trio.open_nursery() as nursery:
            for _ in range(size):
                nursery.start_soon(worker)
        return results

    yield map_items
