"""The floors and the alternatives that trio_pool is measured beside.

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
async def channel_process(size: int, handler: Handler) -> AsyncGenerator[Process]:
    """What users write: workers over a memory channel, a reply channel each."""
    send, receive = trio.open_memory_channel[tuple[Any, trio.MemorySendChannel[Any]]](
        1024
    )

    async def worker() -> None:
        async for x, reply in receive:
            with reply:
                await reply.send(await handler(x))

    async def process(x: Any) -> Any:
        reply_send, reply_receive = trio.open_memory_channel[Any](1)
        with reply_receive:
            await send.send((x, reply_send))
            return await reply_receive.receive()

    async with trio.open_nursery() as nursery:
        for _ in range(size):
            nursery.start_soon(worker)
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


@asynccontextmanager
async def channel_map(size: int, handler: Handler) -> AsyncGenerator[Map]:
    """What users write: workers over a memory channel, a reply channel each."""
    async with channel_process(size, handler) as process:

        async def map_items(items: Iterable[Any]) -> list[Any]:
            values = list(items)
            results: list[Any] = [None] * len(values)
            limit = trio.CapacityLimiter(2 * size)

            async def one(index: int, item: Any) -> None:
                try:
                    results[index] = await process(item)
                finally:
                    limit.release_on_behalf_of(index)

            async with trio.open_nursery() as nursery:
                for index, item in enumerate(values):
                    await limit.acquire_on_behalf_of(index)
                    nursery.start_soon(one, index, item)
            return results

        yield map_items
