"""Our own `process`, `map` and their kin, behind the shape of every contender.

Names of the library are looked up when an opener is entered, so that an older
version, which lacks some, can still be measured in the rest.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from driving import Handler

from trio_pool import open_pool


@asynccontextmanager
async def our_process(size: int, handler: Handler) -> AsyncGenerator[Any]:
    """Our own `process`."""
    async with open_pool(size, handler) as pool:
        yield pool.process


@asynccontextmanager
async def our_map(size: int, handler: Handler) -> AsyncGenerator[Any]:
    """Our own `map`."""
    async with open_pool(size, handler) as pool:
        yield pool.map


@asynccontextmanager
async def our_settle(size: int, handler: Handler) -> AsyncGenerator[Any]:
    """Our own `settle`, which makes a record of each."""
    async with open_pool(size, handler) as pool:
        yield pool.settle


@asynccontextmanager
async def our_stream(size: int, handler: Handler) -> AsyncGenerator[Any]:
    """Our own `stream`, in order, read to the end."""
    async with open_pool(size, handler) as pool:

        async def stream(items: Iterable[Any]) -> list[Any]:
            async with pool.stream(items) as results:
                return [result async for result in results]

        yield stream


@asynccontextmanager
async def our_stream_far_ahead(size: int, handler: Handler) -> AsyncGenerator[Any]:
    """Our own `stream`, in order, whose workers may be far ahead of its reader."""
    async with open_pool(size, handler) as pool:

        async def stream(items: Iterable[Any]) -> list[Any]:
            async with pool.stream(items, ahead=1000) as results:
                return [result async for result in results]

        yield stream


@asynccontextmanager
async def our_stream_as_ready(size: int, handler: Handler) -> AsyncGenerator[Any]:
    """Our own `stream`, as results are ready, read to the end."""
    async with open_pool(size, handler) as pool:

        async def stream(items: Iterable[Any]) -> list[Any]:
            async with pool.stream(items, ordered=False) as results:
                return [result async for result in results]

        yield stream


@asynccontextmanager
async def our_replies(size: int, handler: Handler) -> AsyncGenerator[Any]:
    """Our own `submit_nowait` of all, then `wait` for the reply of each."""
    async with open_pool(size, handler, max_backlog=math.inf) as pool:

        async def submit_then_read(items: Iterable[Any]) -> list[Any]:
            replies = [pool.submit_nowait(item) for item in items]
            return [await reply.wait() for reply in replies]

        yield submit_then_read


@asynccontextmanager
async def our_outcomes(size: int, handler: Handler) -> AsyncGenerator[Any]:
    """Our own `submit_nowait` of all, `join`, then the outcome of each."""
    async with open_pool(size, handler, max_backlog=math.inf) as pool:

        async def submit_then_look(items: Iterable[Any]) -> list[Any]:
            replies = [pool.submit_nowait(item) for item in items]
            await pool.join()
            return [reply.outcome.unwrap() for reply in replies]  # type: ignore[union-attr]  # all are done

        yield submit_then_look


@asynccontextmanager
async def our_awaited_replies(size: int, handler: Handler) -> AsyncGenerator[Any]:
    """Our own `submit` of all, then `wait` for the reply of each."""
    async with open_pool(size, handler, max_backlog=math.inf) as pool:

        async def submit_then_read(items: Iterable[Any]) -> list[Any]:
            replies = [await pool.submit(item) for item in items]
            return [await reply.wait() for reply in replies]

        yield submit_then_read
