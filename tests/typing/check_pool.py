"""Read by mypy and pyright, not run: what the type checkers know of a pool."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal, assert_never, assert_type

import outcome

from trio_pool import (
    Autoscale,
    Backoff,
    CircuitBreaker,
    CurrentJob,
    Drain,
    Event,
    EventsLost,
    EventStream,
    Hooks,
    JobChanged,
    JobState,
    Latency,
    LeasedTaskWorker,
    LeasedWorker,
    Pool,
    PoolChanged,
    PoolConfig,
    PoolResized,
    PoolStatistics,
    Priority,
    Rate,
    Reply,
    Restart,
    Retry,
    Settled,
    ShutdownReport,
    Stream,
    Task,
    TaskPool,
    WorkerChanged,
    WorkerSnapshot,
    current_job,
    open_pool,
)


async def encode(text: str) -> bytes:
    return text.encode()


def encode_sync(text: str) -> bytes:
    return text.encode()


async def join(text: str, number: int) -> bytes:
    return text.encode() * number


async def count(text: str) -> int:
    return len(text)


async def halve(number: int) -> float:
    return number / 2


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
    assert_type(reply.id, int | str)
    assert_type(reply.worker, int | None)
    assert_type(reply.attempts, int)


async def give_in_jobs_with_options(pool: Pool[str, bytes]) -> None:
    retry = Retry(attempts=3, backoff=Backoff(initial=0.25), on=OSError)
    drain = Drain[bytes]()
    assert_type(await pool.process("a", key=("page", 1), retry=retry), bytes)
    reply = await pool.submit(
        "a",
        timeout=1.5,
        priority=Priority.HIGH,
        key="page",
        delay=0.25,
        ttl=1.5,
        retry=retry,
        drain=drain,
        id="cover",
    )
    assert_type(reply, Reply[bytes])
    assert_type(pool.submit_nowait("a", drain=drain, id=5), Reply[bytes])
    replies = await pool.submit_batch(["a"], retry=retry, drain=drain)
    assert_type(replies, list[Reply[bytes]])
    assert_type(await pool.submit_batch("ab"), list[Reply[bytes]])
    assert_type(await pool.map(["a"], retry=retry), list[bytes])
    # A drain of something wider takes the results too.
    anything = Drain[object]()
    anything.send(await pool.process("a"))


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
    async with pool.stream(["a"], outcomes=True, retry=Retry()) as outcomes:
        assert_type(outcomes, Stream[Settled[str, bytes]])
        async for settled in outcomes:
            assert_type(settled, Settled[str, bytes])


async def keep_a_worker(pool: Pool[str, bytes], tasks: TaskPool) -> None:
    async with pool.lease() as worker:
        assert_type(worker, LeasedWorker[str, bytes])
        assert_type(await worker.process("a"), bytes)
        assert_type(await worker.process("a", timeout=1.5), bytes)
        assert_type(worker.id, int | None)
    async with tasks.lease(priority=2) as hired:
        assert_type(hired, LeasedTaskWorker)
        assert_type(await hired.process(join, "a", 2), bytes)
        assert_type(await hired.process(count, "a", timeout=1.5), int)
        assert_type(hired.id, int | None)


async def read_a_drain(drain: Drain[bytes]) -> None:
    drain.send(b"a")
    assert_type(drain.collect(), list[bytes])
    async for value in drain:
        assert_type(value, bytes)
    assert_type(drain.count, int)
    assert_type(drain.total, int)
    assert_type(drain.closed, bool)


async def define_calls() -> None:
    drain = Drain[bytes]()
    task = Task(join, "a", 2)
    assert_type(task, Task[bytes])
    assert_type(task.with_retry(attempts=3, on=OSError), Task[bytes])
    assert_type(task.with_retry(Retry()).with_timeout(1.5), Task[bytes])
    assert_type(task.with_delay(0.25).with_ttl(1.5).with_key("page"), Task[bytes])
    assert_type(task.with_priority(2).with_id("cover"), Task[bytes])
    assert_type(task.drain_to(drain), Task[bytes])
    assert_type(task.with_input("b", 3), Task[bytes])
    assert_type(Task(encode).with_input("b"), Task[bytes])
    assert_type(await task.run(), bytes)
    assert_type(task.retry, Retry | None)
    assert_type(task.drain, Drain[bytes] | None)


async def give_in_defined_calls(pool: TaskPool) -> None:
    to_bytes, to_int, to_float = Task(encode, "a"), Task(count, "a"), Task(halve, 5)
    assert_type(await pool.go(to_bytes), tuple[Reply[bytes]])
    two = await pool.go(to_bytes, to_int)
    assert_type(two, tuple[Reply[bytes], Reply[int]])
    one, other, last = await pool.go(to_bytes, to_int, to_float)
    assert_type(one, Reply[bytes])
    assert_type(other, Reply[int])
    assert_type(last, Reply[float])
    assert_type(await last.wait(), float)
    many = await pool.go(*[to_int, to_int])
    assert_type(many, tuple[Reply[int], ...])
    alike = await pool.go(to_int, to_int, to_int, to_int)
    assert_type(alike, tuple[Reply[int], ...])


async def watch(pool: Pool[str, bytes]) -> None:
    async with pool.events(buffer=16) as events:
        assert_type(events, EventStream)
        async for event in events:
            assert_type(event, Event)
            tell_by_kind(event)
            tell_by_class(event)
    assert_type(pool.statistics().wait, Latency)
    assert_type(pool.statistics().run.p95, float)
    assert_type(pool.statistics().throughput, float)
    assert_type(pool.plugin("log"), Any)


def tell_by_kind(event: Event) -> None:
    if event.kind == "resize":
        assert_type(event, PoolResized)
    elif event.kind == "lost":
        assert_type(event.count, int)
    elif event.kind == "job_retry":
        assert_type(event, JobChanged)
        assert_type(event.delay, float | None)
        assert_type(event.job_id, int | str)


def tell_by_class(event: Event) -> None:
    match event:
        case PoolChanged():
            assert_type(event.kind, Literal["pool_start", "pool_stop"])
        case PoolResized():
            assert_type(event.old, int)
        case WorkerChanged():
            assert_type(event.worker, int)
        case JobChanged():
            assert_type(event.attempts, int)
        case EventsLost():
            assert_type(event.count, int)
        case _:
            assert_never(event)


async def look_at_the_job() -> None:
    job = current_job()
    assert_type(job, CurrentJob)
    assert_type(job.id, int | str)
    assert_type(job.attempt, int)
    assert_type(job.deadline, float)
    assert_type(job.cancel(), bool)


async def wrap(job: CurrentJob, call_next: Callable[..., Awaitable[object]]) -> object:
    return await call_next(job)


@asynccontextmanager
async def plugin() -> AsyncGenerator[Hooks, None]:
    yield Hooks()


def is_worth_it(error: Exception) -> bool:
    return isinstance(error, OSError)


async def open_with_policies() -> None:
    async with open_pool(
        8,
        encode,
        retry=Retry(attempts=3, on=is_worth_it),
        rate=Rate(50, per=1.0, burst=5),
        breaker=CircuitBreaker(failures=5, open_for=1.5),
        scale=Autoscale(min=1, max=8),
        middleware=[wrap],
        plugins=[plugin()],
        aging=1.5,
        max_jobs=100,
        max_age=60.0,
        max_idle=5.0,
    ) as pool:
        assert_type(pool, Pool[str, bytes])


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
        replies = await pool.submit_batch(encode, ["a"], drain=Drain[bytes]())
        assert_type(replies, list[Reply[bytes]])
        drained = await pool.submit(join, "a", 2, drain=Drain[bytes](), ttl=1.5)
        assert_type(drained, Reply[bytes])
        assert_type(await pool.process(join, "a", 2, retry=Retry(), key=1), bytes)
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
    await pool.submit("a", drain=Drain[int]())  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await pool.submit_batch([5])  # type: ignore[list-item] # pyright: ignore[reportArgumentType]
    await pool.process("a", retry=3)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await pool.process("a", delay=1.5)  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    await tasks.go(encode)  # type: ignore[call-overload] # pyright: ignore[reportCallIssue, reportArgumentType]
    await tasks.submit_batch(encode, [5])  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await tasks.process(join, "a")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


async def refuse_wrong_leases_and_drains(pool: Pool[str, bytes]) -> None:
    async with pool.lease() as worker:
        await worker.process(5)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    Drain[bytes]().send("a")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    Task(encode, "a").drain_to(Drain[int]())  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    Task(join, "a")  # type: ignore[arg-type] # pyright: ignore[reportCallIssue, reportArgumentType]
    Task(encode_sync, "a")  # type: ignore[arg-type] # pyright: ignore[reportCallIssue, reportArgumentType]


def refuse_wrong_options() -> None:
    open_pool(8, encode_sync)  # type: ignore[arg-type] # pyright: ignore[reportCallIssue, reportArgumentType]
    open_pool(8, encode, timeot=5)  # type: ignore[call-overload] # pyright: ignore[reportCallIssue]
    open_pool(8, encode, overflow="drop")  # type: ignore[call-overload] # pyright: ignore[reportCallIssue, reportArgumentType]
