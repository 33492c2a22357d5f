"""What people use instead under asyncio, each as a user of it would write it.

aiojobs is imported when its opener is entered, before the clock runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, cast

from driving import Handler
from twins import Map, Process


@asynccontextmanager
async def queue_process(size: int, handler: Handler) -> AsyncGenerator[Process]:
    """Workers on a queue, a future for each job."""
    queue = asyncio.Queue[tuple[Any, asyncio.Future[Any]]](1024)
    loop = asyncio.get_running_loop()

    async def worker() -> None:
        while True:
            x, future = await queue.get()
            try:
                result = await handler(x)
            except Exception as error:
                if not future.done():
                    future.set_exception(error)
            else:
                # A caller who was cancelled has cancelled its future.
                if not future.done():
                    future.set_result(result)

    async def process(x: Any) -> Any:
        future: asyncio.Future[Any] = loop.create_future()
        await queue.put((x, future))
        return await future

    workers = [asyncio.create_task(worker()) for _ in range(size)]
    try:
        yield process
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


@asynccontextmanager
async def semaphore_process(size: int, handler: Handler) -> AsyncGenerator[Process]:
    """No workers: each caller runs its job itself, under a semaphore."""
    semaphore = asyncio.Semaphore(size)

    async def process(x: Any) -> Any:
        async with semaphore:
            return await handler(x)

    yield process


@asynccontextmanager
async def aiojobs_process(size: int, handler: Handler) -> AsyncGenerator[Process]:
    """A job of an aiojobs scheduler for each, and its `wait`."""
    import aiojobs

    # A handler of this suite is any function that gives an awaitable; an async
    # function, which a user would have, gives the coroutine that is wanted here.
    call = cast("Callable[[Any], Coroutine[Any, Any, Any]]", handler)
    async with aiojobs.Scheduler(limit=size) as scheduler:

        async def process(x: Any) -> Any:
            job: aiojobs.Job[Any] = await scheduler.spawn(call(x))
            return await job.wait()

        yield process


@asynccontextmanager
async def group_map(size: int, handler: Handler) -> AsyncGenerator[Map]:
    """A task of a task group for each item, and a semaphore that they wait for."""
    semaphore = asyncio.Semaphore(size)

    async def map_items(items: Iterable[Any]) -> list[Any]:
        async def one(item: Any) -> Any:
            async with semaphore:
                return await handler(item)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
        return [task.result() for task in tasks]

    yield map_items
