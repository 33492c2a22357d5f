"""Read by mypy and pyright, not run: what the type checkers know of a pool."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import assert_type

import outcome

from trio_pool import (
    JobState,
    Pool,
    PoolConfig,
    PoolStatistics,
    Reply,
    Restart,
    Settled,
    ShutdownReport,
    Stream,
    TaskPool,
    WorkerSnapshot,
    open_pool,
)


async def encode(text: str) -> bytes:
    return text.encode()


def encode_sync(text: str) -> bytes:
    return text.encode()


async def join(text: str, number: int) -> bytes:
    return text.encode() * number


@asynccontextmanager
async def encoder() -> AsyncGenerator[Callable[[str], Awaitable[bytes]], None]:
    yield encode


class Encoder:
    async def __aenter__(self) -> Callable[[str], Awaitable[bytes]]:
        return encode

    async def __aexit__(self, *exc_info: object) -> None:
        return None


async def texts() -> AsyncIterator[str]:
    yield "a"


async def open_with_handler() -> None:
    async with open_pool(8, encode) as pool:
        assert_type(pool, Pool[str, bytes])
    async with open_pool(PoolConfig(size=8), encode) as pool:
        assert_type(pool, Pool[str, bytes])
    async with open_pool(8, encode, timeout=1.5, restart=Restart(limit=3)) as pool:
        assert_type(pool, Pool[str, bytes])
    async with open_pool(8, encode, crash_on=OSError, hooks=[], name="a") as pool:
        assert_type(pool, Pool[str, bytes])


async def open_with_worker() -> None:
    async with open_pool(8, worker=encoder) as pool:
        assert_type(pool, Pool[str, bytes])
    async with open_pool(8, worker=Encoder) as pool:
        assert_type(pool, Pool[str, bytes])
    async with open_pool(PoolConfig(), worker=encoder, grace=1.5) as pool:
        assert_type(pool, Pool[str, bytes])


async def give_in_jobs(pool: Pool[str, bytes]) -> None:
    assert_type(await pool.process("a"), bytes)
    assert_type(await pool.process("a", timeout=1.5, priority=2), bytes)
    reply = await pool.submit("a")
    assert_type(reply, Reply[bytes])
    assert_type(pool.submit_nowait("a"), Reply[bytes])
    assert_type(await reply.wait(), bytes)
    assert_type(reply.outcome, outcome.Value[bytes] | outcome.Error | None)
    assert_type(reply.state, JobState)
    assert_type(reply.done, bool)
    assert_type(reply.cancel(), bool)
    assert_type(reply.id, int)
    assert_type(reply.worker, int | None)
    assert_type(reply.attempts, int)


async def give_in_many(pool: Pool[str, bytes]) -> None:
    assert_type(await pool.map(["a"]), list[bytes])
    assert_type(await pool.map(texts()), list[bytes])
    settled = await pool.settle(["a"])
    assert_type(settled, list[Settled[str, bytes]])
    assert_type(settled[0].item, str)
    assert_type(settled[0].index, int)
    assert_type(settled[0].outcome, outcome.Value[bytes] | outcome.Error)
    assert_type(settled[0].outcome.unwrap(), bytes)


async def stream_results(pool: Pool[str, bytes]) -> None:
    async with pool.stream(["a"]) as results:
        assert_type(results, Stream[bytes])
        async for result in results:
            assert_type(result, bytes)
    async with pool.stream(texts(), ordered=False, ahead=3, outcomes=False) as plain:
        assert_type(plain, Stream[bytes])
    async with pool.stream(["a"], outcomes=True) as outcomes:
        assert_type(outcomes, Stream[Settled[str, bytes]])
        async for settled in outcomes:
            assert_type(settled, Settled[str, bytes])


async def look_at_a_pool(pool: Pool[str, bytes]) -> None:
    assert_type(pool.size, int)
    assert_type(pool.closed, bool)
    assert_type(pool.name, str)
    assert_type(pool.statistics(), PoolStatistics)
    assert_type(pool.workers(), tuple[WorkerSnapshot, ...])
    assert_type(await pool.shutdown(grace=1.5), ShutdownReport)


async def give_in_calls() -> None:
    async with open_pool(8) as pool:
        assert_type(pool, TaskPool)
        assert_type(await pool.process(encode, "a"), bytes)
        assert_type(await pool.process(join, "a", 2, timeout=1.5), bytes)
        assert_type(await pool.submit(join, "a", 2), Reply[bytes])
        assert_type(pool.submit_nowait(join, "a", 2), Reply[bytes])
        assert_type(await pool.map(encode, ["a"]), list[bytes])
        assert_type(await pool.map(encode, texts()), list[bytes])
        assert_type(await pool.settle(encode, ["a"]), list[Settled[str, bytes]])
        async with pool.stream(encode, ["a"]) as results:
            assert_type(results, Stream[bytes])
        async with pool.stream(encode, ["a"], outcomes=True) as outcomes:
            assert_type(outcomes, Stream[Settled[str, bytes]])
    async with open_pool(PoolConfig(), max_backlog=5) as pool:
        assert_type(pool, TaskPool)


async def refuse_wrong_jobs(pool: Pool[str, bytes], tasks: TaskPool) -> None:
    await pool.process(5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await pool.submit(5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    pool.submit_nowait(5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await pool.map([5])  # type: ignore[list-item] # pyright: ignore[reportArgumentType]
    await pool.settle([5])  # type: ignore[list-item] # pyright: ignore[reportArgumentType]
    await pool.process("a", timeout="1")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await pool.process()  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    await tasks.process(encode, 5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await tasks.process(join, "a")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


def refuse_wrong_options() -> None:
    open_pool(8, encode_sync)  # type: ignore[arg-type] # pyright: ignore[reportCallIssue, reportArgumentType]
    open_pool(8, encode, timeot=5)  # type: ignore[call-overload] # pyright: ignore[reportCallIssue]
    open_pool(8, encode, overflow="drop")  # type: ignore[call-overload] # pyright: ignore[reportCallIssue, reportArgumentType]
