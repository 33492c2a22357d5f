"""What people use instead under trio, each as a user of it would write it.

Optional libraries are imported when an opener is entered, before the clock runs.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import trio
from driving import Handler
from twins import Map, Process

BUFFER = 1024


@asynccontextmanager
async def channel_process(size: int, handler: Handler) -> AsyncGenerator[Process]:
    """Workers over a memory channel, a reply channel for each job."""
    send, receive = trio.open_memory_channel[tuple[Any, trio.MemorySendChannel[Any]]](
        BUFFER
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
async def bare_handler(size: int, handler: Handler) -> AsyncGenerator[Process]:
    """No workers: the handler itself, for `spawn_each`."""
    yield handler


async def spawn_each(handler: Any, jobs: int, _: int) -> None:
    """Start a task for each job, all in one nursery; nobody takes the results."""
    async with trio.open_nursery() as nursery:
        for x in range(jobs):
            nursery.start_soon(handler, x)


@asynccontextmanager
async def spawn_process(size: int, handler: Handler) -> AsyncGenerator[Process]:
    """A task for each job, whose caller waits for an event; no bound at all."""
    async with trio.open_nursery() as nursery:

        async def one(x: Any, box: list[Any], done: trio.Event) -> None:
            box.append(await handler(x))
            done.set()

        async def process(x: Any) -> Any:
            box: list[Any] = []
            done = trio.Event()
            nursery.start_soon(one, x, box, done)
            await done.wait()
            return box[0]

        yield process


@asynccontextmanager
async def limiter_process(size: int, handler: Handler) -> AsyncGenerator[Process]:
    """No workers: each caller runs its job itself, under a limiter."""
    limiter = trio.CapacityLimiter(size)

    async def process(x: Any) -> Any:
        async with limiter:
            return await handler(x)

    yield process


@asynccontextmanager
async def thread_process(size: int, handler: Handler) -> AsyncGenerator[Process]:
    """Threads of the standard library: ``submit(...).result()``, without a loop."""
    call = _in_a_thread(handler)
    with ThreadPoolExecutor(size) as executor:

        async def process(x: Any) -> Any:
            return executor.submit(call, x).result()

        yield process


@asynccontextmanager
async def channel_map(size: int, handler: Handler) -> AsyncGenerator[Map]:
    """Workers over a memory channel, who put results in their places."""

    async def map_items(items: Iterable[Any]) -> list[Any]:
        values = list(items)
        results: list[Any] = [None] * len(values)
        send, receive = trio.open_memory_channel[tuple[int, Any]](BUFFER)

        async def worker() -> None:
            async for index, item in receive:
                results[index] = await handler(item)

        async with trio.open_nursery() as nursery:
            for _ in range(size):
                nursery.start_soon(worker)
            async with send:
                for pair in enumerate(values):
                    await send.send(pair)
        return results

    yield map_items


@asynccontextmanager
async def limiter_map(size: int, handler: Handler) -> AsyncGenerator[Map]:
    """A task for each item, all at once, and a limiter that they wait for."""
    limiter = trio.CapacityLimiter(size)

    async def map_items(items: Iterable[Any]) -> list[Any]:
        results: dict[int, Any] = {}

        async def one(index: int, item: Any) -> None:
            async with limiter:
                results[index] = await handler(item)

        async with trio.open_nursery() as nursery:
            for index, item in enumerate(items):
                nursery.start_soon(one, index, item)
        return [results[index] for index in range(len(results))]

    yield map_items


@asynccontextmanager
async def aiometer_map(size: int, handler: Handler) -> AsyncGenerator[Map]:
    """`aiometer.run_on_each`, whose calls keep their results themselves."""
    import aiometer

    async def map_items(items: Iterable[Any]) -> list[Any]:
        values = list(items)
        results: list[Any] = [None] * len(values)

        async def one(index: int) -> None:
            results[index] = await handler(values[index])

        await aiometer.run_on_each(one, range(len(values)), max_at_once=size)
        return results

    yield map_items


@asynccontextmanager
async def aiometer_amap(size: int, handler: Handler) -> AsyncGenerator[Map]:
    """`aiometer.amap`, which gives results as they are ready."""
    import aiometer

    async def map_items(items: Iterable[Any]) -> list[Any]:
        async with aiometer.amap(handler, list(items), max_at_once=size) as results:
            return [result async for result in results]

    yield map_items


@asynccontextmanager
async def anyio_map(size: int, handler: Handler) -> AsyncGenerator[Map]:
    """A task of an anyio task group for each item, and anyio's limiter."""
    import anyio

    limiter = anyio.CapacityLimiter(size)

    async def map_items(items: Iterable[Any]) -> list[Any]:
        results: dict[int, Any] = {}

        async def one(index: int, item: Any) -> None:
            async with limiter:
                results[index] = await handler(item)

        async with anyio.create_task_group() as group:
            for index, item in enumerate(items):
                group.start_soon(one, index, item)
        return [results[index] for index in range(len(results))]

    yield map_items


@asynccontextmanager
async def thread_map(size: int, handler: Handler) -> AsyncGenerator[Map]:
    """Threads of the standard library: ``executor.map``, without a loop."""
    call = _in_a_thread(handler)
    with ThreadPoolExecutor(size) as executor:

        async def map_items(items: Iterable[Any]) -> list[Any]:
            return list(executor.map(call, items))

        yield map_items


def _in_a_thread(handler: Handler) -> Any:
    """Make a plain function of a handler that never waits."""

    def call(x: Any) -> Any:
        coroutine: Any = handler(x)
        try:
            coroutine.send(None)
        except StopIteration as end:
            return end.value
        raise RuntimeError("in a thread, a handler of this kind cannot wait")

    return call
