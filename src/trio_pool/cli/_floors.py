"""The floors: what bare trio can do, with none of the promises of a pool."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any, TypeAlias

import outcome
import trio
import trio.testing
from trio.lowlevel import Abort, Task, current_task, reschedule, wait_task_rescheduled

Handler: TypeAlias = Callable[[Any], Awaitable[Any]]

# Seconds for which a worker runs before others get their turn, as the pool has it.
_SLICE = 0.0005


@asynccontextmanager
async def floor_process(size: int, handler: Handler) -> AsyncGenerator[Handler, None]:
    """Parked tasks that are woken by hand; nobody may be cancelled."""
    jobs: deque[tuple[Task, Any]] = deque()
    idle: deque[Task] = deque()

    async def work() -> None:
        while True:
            if jobs:
                caller, job_input = jobs.popleft()
                reschedule(caller, outcome.Value(await handler(job_input)))
            else:
                idle.append(current_task())
                await wait_task_rescheduled(lambda _: Abort.SUCCEEDED)

    async def process(job_input: Any) -> Any:
        jobs.append((current_task(), job_input))
        if idle:
            reschedule(idle.popleft())
        return await wait_task_rescheduled(lambda _: Abort.FAILED)

    async with trio.open_nursery() as nursery:
        for _ in range(size):
            nursery.start_soon(work)
        await trio.testing.wait_all_tasks_blocked()
        yield process
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def floor_map(size: int, handler: Handler) -> AsyncGenerator[Handler, None]:
    """Workers that share one iterator."""

    async def map_items(items: Iterable[Any]) -> list[Any]:
        shared = iter(enumerate(items))
        results: list[Any] = []

        async def work() -> None:
            rested = perf_counter()
            for index, item in shared:
                results.append(None)
                results[index] = await handler(item)
                if perf_counter() - rested > _SLICE:
                    await trio.lowlevel.checkpoint()
                    rested = perf_counter()

        async with trio.open_nursery() as nursery:
            for _ in range(size):
                nursery.start_soon(work)
        return results

    yield map_items
