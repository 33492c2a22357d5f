"""What is put around jobs and pools: middleware, current_job, plugins, events."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import attrs
import pytest
import trio
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

from trio_pool import (
    Autoscale,
    Backoff,
    CurrentJob,
    Event,
    EventsLost,
    EventStream,
    Hooks,
    JobCancelled,
    JobChanged,
    JobState,
    JobTimeout,
    PoolChanged,
    PoolConfig,
    PoolResized,
    Retry,
    WorkerChanged,
    WorkerCrashed,
    current_job,
    open_pool,
)

Next = Callable[..., Awaitable[Any]]


class Broken(Exception):
    """What a handler or a plugin raises."""


async def obey(job: Any) -> Any:
    """Sleep for a number of seconds, raise an error, await a function."""
    if isinstance(job, BaseException):
        raise job
    if callable(job):
        return await job()
    if isinstance(job, float):
        await trio.sleep(job)
    return job


# ----------------------------------------------------------------------
# Middleware.


async def test_the_first_middleware_is_the_outermost() -> None:
    order: list[str] = []

    def layer(name: str) -> Any:
        async def middleware(job: CurrentJob, call_next: Next) -> Any:
            order.append(f"into {name}")
            result = await call_next(job)
            order.append(f"out of {name}")
            return f"{name}({result})"

        return middleware

    async def handler(job: str) -> str:
        order.append(job)
        return job

    layers = [layer("a"), layer("b"), layer("c")]
    async with open_pool(1, handler, middleware=layers) as pool:
        assert await pool.process("x") == "a(b(c(x)))"
    assert order == [
        *("into a", "into b", "into c"),
        "x",
        *("out of c", "out of b", "out of a"),
    ]


async def test_context_flows_into_the_handler_and_back_out() -> None:
    var: ContextVar[str] = ContextVar("var", default="unset")
    seen: list[str] = []

    async def middleware(job: CurrentJob, call_next: Next) -> Any:
        seen.append(var.get())
        var.set("by middleware")
        await call_next(job)
        seen.append(var.get())

    async def handler(job: object) -> None:
        seen.append(var.get())
        var.set("by handler")

    async with open_pool(1, handler, middleware=[middleware]) as pool:
        var.set("by caller")
        for _ in range(2):
            await pool.process(1)
            assert seen == ["by caller", "by middleware", "by handler"]
            seen.clear()
        assert var.get() == "by caller"
        await pool.map([1, 1])
        assert seen == ["by caller", "by middleware", "by handler"] * 2


async def test_call_next_goes_on_with_or_without_the_job() -> None:
    async def bare(job: CurrentJob, call_next: Next) -> Any:
        return await call_next()

    async def named(job: CurrentJob, call_next: Next) -> Any:
        return await call_next(job)

    async with open_pool(1, obey, middleware=[bare, named, bare]) as pool:
        assert await pool.process("x") == "x"


async def test_changed_input_reaches_the_rest_and_call_next_without_job_keeps_it() -> (
    None
):
    seen: list[Any] = []

    async def change(job: CurrentJob, call_next: Next) -> Any:
        return await call_next(attrs.evolve(job, input=job.input + 1))

    async def look(job: CurrentJob, call_next: Next) -> Any:
        seen.append(job.input)
        return await call_next()

    async def handler(job: int) -> int:
        seen.append(job)
        return job

    async with open_pool(1, handler, middleware=[change, look]) as pool:
        assert await pool.process(1) == 2
        assert seen == [2, 2]
        assert await pool.map([10, 20]) == [11, 21]


async def test_middleware_may_answer_by_itself() -> None:
    cache = {"known": "from the cache"}
    handled: list[str] = []

    async def middleware(job: CurrentJob, call_next: Next) -> Any:
        return cache.get(job.input) or await call_next(job)

    async def handler(job: str) -> str:
        handled.append(job)
        return job

    async with open_pool(1, handler, middleware=[middleware]) as pool:
        assert await pool.process("known") == "from the cache"
        assert await pool.map(["known", "new"]) == ["from the cache", "new"]
        assert pool.statistics().done == 3
    assert handled == ["new"]


async def test_middleware_may_call_twice() -> None:
    calls = 0

    async def middleware(job: CurrentJob, call_next: Next) -> Any:
        try:
            return await call_next(job)
        except Broken:
            return await call_next(job)

    async def handler(job: object) -> str:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise Broken
        return "second time"

    async with open_pool(1, handler, middleware=[middleware]) as pool:
        assert await pool.process(1) == "second time"
        count = pool.statistics()
        assert (count.done, count.failed, count.retries) == (1, 0, 0)
        assert pool.workers()[0].jobs == 1


async def test_middleware_that_raises_fails_the_job_by_its_error() -> None:
    error = Broken("not allowed")

    async def middleware(job: CurrentJob, call_next: Next) -> Any:
        if job.input == "bad":
            raise error
        return await call_next(job)

    async with open_pool(1, obey, middleware=[middleware]) as pool:
        with pytest.raises(Broken) as caught:
            await pool.process("bad")
        assert caught.value is error
        assert await pool.process("good") == "good"
        with pytest.raises(ExceptionGroup) as group:
            await pool.map(["good", "bad"])
        assert group.value.exceptions == (error,)


async def test_middleware_may_turn_one_error_into_another() -> None:
    async def middleware(job: CurrentJob, call_next: Next) -> Any:
        try:
            return await call_next(job)
        except ValueError as error:
            raise Broken from error

    cause = ValueError()
    async with open_pool(1, obey, middleware=[middleware]) as pool:
        with pytest.raises(Broken) as caught:
            await pool.process(cause)
        assert caught.value.__cause__ is cause


async def test_the_error_of_a_handler_passes_middleware_unchanged() -> None:
    async def middleware(job: CurrentJob, call_next: Next) -> Any:
        return await call_next(job)

    error = ValueError("bad")
    async with open_pool(1, obey, middleware=[middleware] * 3) as pool:
        with pytest.raises(ValueError) as caught:
            await pool.process(error)
        assert caught.value is error


async def test_crash_on_means_errors_of_middleware_too() -> None:
    async def middleware(job: CurrentJob, call_next: Next) -> Any:
        raise Broken

    async with open_pool(1, obey, middleware=[middleware], crash_on=Broken) as pool:
        with pytest.raises(Broken):
            await pool.process(1)
        await wait_all_tasks_blocked()
        assert pool.statistics().restarts == 1


async def test_an_exit_in_middleware_is_a_crash() -> None:
    async def middleware(job: CurrentJob, call_next: Next) -> Any:
        if job.input == "bad":
            raise SystemExit
        return await call_next(job)

    async with open_pool(1, obey, middleware=[middleware]) as pool:
        with pytest.raises(WorkerCrashed):
            await pool.process("bad")
        assert await pool.process("good") == "good"


async def test_middleware_is_within_the_timeout(autojump_clock: MockClock) -> None:
    async def middleware(job: CurrentJob, call_next: Next) -> Any:
        await trio.sleep(1.0)
        return await call_next(job)

    async with open_pool(1, obey, middleware=[middleware], timeout=1.5) as pool:
        assert await pool.process(0.25) == 0.25
        with pytest.raises(JobTimeout):
            await pool.process(0.75)
        assert trio.current_time() == 2.75


async def test_middleware_sees_the_cancellation_and_may_clean_up() -> None:
    seen: list[str] = []

    async def middleware(job: CurrentJob, call_next: Next) -> Any:
        try:
            return await call_next(job)
        finally:
            seen.append("cleaned up")

    async with open_pool(1, obey, middleware=[middleware]) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.process, trio.sleep_forever)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert seen == ["cleaned up"]
        assert await pool.process(1) == 1


async def test_middleware_in_a_pool_of_functions() -> None:
    seen: list[Any] = []

    async def add(a: int, b: int) -> int:
        return a + b

    async def double(a: int) -> int:
        return 2 * a

    async def middleware(job: CurrentJob, call_next: Next) -> Any:
        seen.append(job.input)
        fn, args = job.input
        if fn is double:
            job = attrs.evolve(job, input=(fn, (args[0] + 1,)))
        return await call_next(job)

    async with open_pool(2, middleware=[middleware]) as pool:
        assert await pool.process(add, 1, 2) == 3
        assert await pool.process(double, 1) == 4
        assert await pool.map(double, [1, 2]) == [4, 6]
    assert seen[:2] == [(add, (1, 2)), (double, (1,))]


@pytest.mark.parametrize("way", ["map", "settle", "stream", "submit_batch"])
async def test_middleware_goes_around_every_item_of_a_batch(way: str) -> None:
    seen: list[int] = []

    async def middleware(job: CurrentJob, call_next: Next) -> Any:
        seen.append(job.input)
        return -(await call_next(job))

    async with open_pool(2, obey, middleware=[middleware]) as pool:
        if way == "map":
            results = await pool.map(range(5))
        elif way == "settle":
            settled = await pool.settle(range(5))
            assert [s.item for s in settled] == list(range(5))
            results = [s.outcome.unwrap() for s in settled]
        elif way == "stream":
            async with pool.stream(range(5)) as stream:
                results = [result async for result in stream]
        else:
            replies = await pool.submit_batch(range(5))
            results = [await reply.wait() for reply in replies]
    assert results == [0, -1, -2, -3, -4]
    assert sorted(seen) == list(range(5))


@pytest.mark.parametrize("way", ["process", "map"])
async def test_each_attempt_goes_through_middleware_with_its_number(
    autojump_clock: MockClock, way: str
) -> None:
    attempts: list[int] = []

    async def middleware(job: CurrentJob, call_next: Next) -> Any:
        attempts.append(job.attempt)
        if job.attempt < 3:
            raise Broken
        return await call_next(job)

    retry = Retry(attempts=3, backoff=Backoff(0.25, jitter=0))
    async with open_pool(1, obey, middleware=[middleware], retry=retry) as pool:
        if way == "map":
            assert await pool.map(["x"]) == ["x"]
        else:
            assert await pool.process("x") == "x"
    assert attempts == [1, 2, 3]
    assert trio.current_time() == 0.75


async def test_middleware_goes_around_the_jobs_of_a_lease() -> None:
    async def middleware(job: CurrentJob, call_next: Next) -> Any:
        return [await call_next(job)]

    async with open_pool(1, obey, middleware=[middleware]) as pool:
        async with pool.lease() as worker:
            assert await worker.process(1) == [1]


async def test_middleware_sees_the_job_that_current_job_returns() -> None:
    seen: list[CurrentJob] = []

    async def middleware(job: CurrentJob, call_next: Next) -> Any:
        seen.extend((job, current_job()))
        return await call_next(job)

    async with open_pool(1, obey, middleware=[middleware], name="press") as pool:
        await (await pool.submit("x", id="mine", key="k", priority=2)).wait()
    given, looked_up = seen
    for field in ("pool", "id", "input", "attempt", "key", "priority", "worker"):
        assert getattr(given, field) == getattr(looked_up, field)
    assert (given.id, given.key, given.priority) == ("mine", "k", 2)


def sync_middleware(job: CurrentJob, call_next: Next) -> Any:
    return call_next(job)


@pytest.mark.parametrize(
    "middleware", [[sync_middleware], [3], 3, [obey, sync_middleware], [None]]
)
async def test_what_is_no_async_callable_is_refused_before_anything_runs(
    middleware: Any,
) -> None:
    with pytest.raises(TypeError, match="middleware"):
        async with open_pool(1, obey, middleware=middleware):
            pytest.fail("not refused")
    with pytest.raises(TypeError, match="middleware"):
        PoolConfig(middleware=middleware)


async def test_objects_with_an_async_call_are_middleware() -> None:
    class Counting:
        count = 0

        async def __call__(self, job: CurrentJob, call_next: Next) -> Any:
            self.count += 1
            return await call_next(job)

    counting = Counting()
    async with open_pool(1, obey, middleware=[counting]) as pool:
        await pool.map([1, 2, 3])
    assert counting.count == 3


# ----------------------------------------------------------------------
# current_job().


async def test_current_job_tells_all_about_the_job(autojump_clock: MockClock) -> None:
    async def look() -> CurrentJob:
        return current_job()

    async with open_pool(2, obey, name="press", timeout=9.0) as pool:
        await trio.sleep(0.25)
        reply = await pool.submit(look, id="mine", key=("k", 1), priority=3)
        job = await reply.wait()
        assert (job.pool, job.id, job.attempt) == ("press", "mine", 1)
        assert (job.key, job.priority, job.input) == (("k", 1), 3, look)
        assert (job.timeout, job.deadline) == (9.0, 9.25)
        assert job.worker == reply.worker
        reply = await pool.submit(look, timeout=1.5)
        job = await reply.wait()
        assert (job.id, job.key, job.priority) == (reply.id, None, 0)
        assert (job.timeout, job.deadline) == (1.5, 1.75)


async def test_the_record_of_a_running_job_is_a_value_that_shows_no_insides() -> None:
    async def look() -> CurrentJob:
        return current_job()

    async with open_pool(1, obey, name="press") as pool:
        job, other = await pool.process(look), await pool.process(look)
    assert repr(job) == (
        f"CurrentJob(pool='press', id=1, input={look!r}, attempt=1, key=None, "
        "priority=0, timeout=inf, deadline=inf, waited=0.0, worker=0)"
    )
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        job.priority = 3  # type: ignore[misc]
    # Each is known by itself, and so whatever its input is.
    assert len({job, other, attrs.evolve(job)}) == 3
    fields = [field for field in attrs.fields(CurrentJob) if field.init]
    assert all(field.kw_only for field in fields)


async def test_each_item_of_a_map_has_an_id_of_its_own() -> None:
    async def look(item: int) -> int | str:
        return current_job().id

    async with open_pool(1, look) as pool:
        ids = await pool.map(range(20))
        assert len(set(ids)) == 20
        assert len({*ids, *await pool.map(range(20))}) == 40


async def test_on_the_real_clock_the_deadline_is_a_time_of_that_clock_too() -> None:
    async def look() -> tuple[float, float]:
        return trio.current_time(), current_job().deadline

    async with open_pool(1, obey, timeout=1_000.0) as pool:
        early = trio.current_time()
        late, deadline = await pool.process(look)
        # What is added up may be rounded.
        assert early - 1e-6 <= deadline - 1_000.0 <= late + 1e-6


async def test_without_timeout_and_deadline_both_are_infinite(
    autojump_clock: MockClock,
) -> None:
    async def look() -> CurrentJob:
        return current_job()

    async with open_pool(1, obey) as pool:
        job = await pool.process(look)
        assert (job.timeout, job.deadline) == (math.inf, math.inf)


async def test_the_deadline_is_the_earlier_of_the_callers_and_the_timeout(
    autojump_clock: MockClock,
) -> None:
    async def look() -> float:
        return current_job().deadline

    async with open_pool(1, obey) as pool:
        with trio.move_on_after(1.5):
            assert await pool.process(look) == 1.5
            assert await pool.process(look, timeout=0.5) == 0.5
            assert await pool.process(look, timeout=5.0) == 1.5
            assert await pool.process(look, key="k") == 1.5
            # A submitted job does not belong to its caller.
            assert await (await pool.submit(look)).wait() == math.inf


async def test_each_attempt_has_its_own_number_and_deadline(
    autojump_clock: MockClock,
) -> None:
    seen: list[tuple[int, float]] = []

    async def look() -> None:
        job = current_job()
        seen.append((job.attempt, job.deadline))
        await trio.sleep(0.5)
        raise Broken

    retry = Retry(attempts=3, backoff=Backoff(0.25, 1.0, jitter=0))
    async with open_pool(1, obey, retry=retry, timeout=2.0) as pool:
        with pytest.raises(Broken):
            await pool.process(look)
    assert seen == [(1, 2.0), (2, 2.75), (3, 3.5)]


async def test_current_job_in_child_tasks_of_a_job() -> None:
    seen: list[Any] = []

    async def look(depth: int) -> None:
        seen.append(current_job().id)
        if depth:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(look, depth - 1)

    async def handler(job: object) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look, 2)
            nursery.start_soon(look, 0)

    async with open_pool(1, handler) as pool:
        await (await pool.submit(1, id="mine")).wait()
    assert seen == ["mine"] * 4


async def test_current_job_in_a_job_of_another_pool_is_the_inner_one() -> None:
    async def inner(job: object) -> str:
        return current_job().pool

    async def outer(job: object) -> tuple[str, str]:
        return current_job().pool, await other.process(job)

    async with (
        open_pool(1, inner, name="inner") as other,
        open_pool(1, outer, name="outer") as pool,
    ):
        assert await pool.process(1) == ("outer", "inner")


async def test_current_job_in_the_items_of_a_map() -> None:
    async def look(item: int) -> tuple[Any, int, int]:
        job = current_job()
        return job.input, job.attempt, job.worker

    async with open_pool(1, look) as pool:
        assert await pool.map(range(3)) == [(0, 1, 0), (1, 1, 0), (2, 1, 0)]


async def test_current_job_outside_of_a_job_is_a_runtime_error() -> None:
    with pytest.raises(RuntimeError, match="current_job"):
        current_job()
    async with open_pool(1, obey) as pool:
        await pool.process(1)
        with pytest.raises(RuntimeError, match="current_job"):
            current_job()


def test_current_job_outside_of_trio_is_a_runtime_error() -> None:
    with pytest.raises(RuntimeError, match="current_job"):
        current_job()


async def test_current_job_in_setup_and_cleanup_is_a_runtime_error() -> None:
    errors = 0

    def look() -> None:
        nonlocal errors
        try:
            current_job()
        except RuntimeError:
            errors += 1

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        look()
        yield obey
        look()

    async with open_pool(1, worker=worker) as pool:
        await pool.process(1)
    assert errors == 2


async def test_the_facts_about_a_job_stay_readable_after_it() -> None:
    async def look() -> CurrentJob:
        return current_job()

    async with open_pool(1, obey) as pool:
        job = await pool.process(look)
        assert job.attempt == 1
        assert job.cancel() is False
        assert await pool.process(2) == 2


async def cancel_itself() -> None:
    assert current_job().cancel() is True
    assert current_job().cancel() is False
    await trio.sleep_forever()


async def test_a_processed_job_that_cancels_itself() -> None:
    async with open_pool(1, obey) as pool:
        with pytest.raises(JobCancelled) as caught:
            await pool.process(cancel_itself)
        assert (caught.value.started, caught.value.attempts) == (True, 1)
        assert pool.statistics().cancelled == 1
        assert await pool.process(1) == 1


async def test_a_submitted_job_that_cancels_itself() -> None:
    async with open_pool(1, obey) as pool:
        reply = await pool.submit(cancel_itself, id="mine")
        with pytest.raises(JobCancelled) as caught:
            await reply.wait()
        assert caught.value.job_id == "mine"
        assert reply.state is JobState.CANCELLED
        assert await pool.process(1) == 1


async def test_an_item_of_settle_that_cancels_itself_alone() -> None:
    async with open_pool(2, obey) as pool:
        settled = await pool.settle([1, cancel_itself, 2, 0.0])
        values = [s.outcome for s in settled]
        assert [values[0].unwrap(), values[2].unwrap()] == [1, 2]
        with pytest.raises(JobCancelled):
            values[1].unwrap()
        count = pool.statistics()
        assert (count.done, count.cancelled) == (3, 1)


async def test_an_item_of_map_that_cancels_itself_fails_the_map() -> None:
    async with open_pool(1, obey) as pool:
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map([1, cancel_itself, 2])
        assert caught.group_contains(JobCancelled)
        assert await pool.map([1, 2]) == [1, 2]


async def test_a_job_cancelled_from_outside_of_it() -> None:
    jobs: list[CurrentJob] = []

    async def wait() -> None:
        jobs.append(current_job())
        await trio.sleep_forever()

    async with open_pool(1, obey) as pool:
        reply = await pool.submit(wait)
        await wait_all_tasks_blocked()
        assert jobs[0].cancel() is True
        with pytest.raises(JobCancelled):
            await reply.wait()


async def test_a_job_that_cancelled_itself_and_has_a_value_is_done() -> None:
    async def job() -> str:
        current_job().cancel()
        return "all the same"

    async with open_pool(1, obey) as pool:
        assert await pool.process(job) == "all the same"
        assert await pool.process(0.0) == 0.0
        count = pool.statistics()
        assert (count.done, count.cancelled) == (2, 0)


async def test_a_job_that_cancels_itself_is_not_tried_again() -> None:
    async with open_pool(1, obey, retry=Retry(attempts=5)) as pool:
        with pytest.raises(JobCancelled) as caught:
            await pool.process(cancel_itself)
        assert caught.value.attempts == 1
        assert pool.statistics().retries == 0


async def test_an_old_attempt_cannot_cancel_the_next(autojump_clock: MockClock) -> None:
    jobs: list[CurrentJob] = []

    async def job() -> bool:
        jobs.append(current_job())
        if len(jobs) == 1:
            raise Broken
        await trio.sleep(0.5)
        return jobs[0].cancel()

    async with open_pool(1, obey) as pool:
        assert await pool.process(job, retry=Retry(2)) is False


async def test_an_old_item_cannot_cancel_the_next() -> None:
    jobs: list[CurrentJob] = []

    async def handler(item: int) -> bool | None:
        jobs.append(current_job())
        await trio.lowlevel.checkpoint()
        return jobs[item - 1].cancel() if item else None

    async with open_pool(1, handler) as pool:
        assert await pool.map(range(3)) == [None, False, False]


async def test_cancelling_a_leased_job_from_within() -> None:
    async with open_pool(1, obey) as pool, pool.lease() as worker:
        with pytest.raises(JobCancelled):
            await worker.process(cancel_itself)
        assert await worker.process(1) == 1


# ----------------------------------------------------------------------
# Plugins.


class Plugin:
    """A plugin that writes down its life, and that of the workers around it."""

    def __init__(
        self,
        name: str,
        log: list[str],
        *,
        start: Exception | None = None,
        stop: Exception | None = None,
        gives: Any = None,
    ) -> None:
        self.name = name
        self._log = log
        self._start = start
        self._stop = stop
        self._gives = gives
        self.heard: BaseException | None = None

    async def __aenter__(self) -> Any:
        await trio.lowlevel.checkpoint()
        self._log.append(f"start {self.name}")
        if self._start is not None:
            raise self._start
        return self._gives

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._log.append(f"stop {self.name}")
        self.heard = error
        if self._stop is not None:
            raise self._stop


def make_worker(log: list[str]) -> Any:
    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        log.append("setup")
        yield obey
        log.append("cleanup")

    return worker


async def test_plugins_live_around_the_workers_in_order() -> None:
    log: list[str] = []
    plugins = [Plugin("a", log), Plugin("b", log)]
    async with open_pool(1, worker=make_worker(log), plugins=plugins) as pool:
        log.append("body")
        assert await pool.process(1) == 1
    assert log == [
        *("start a", "start b"),
        *("setup", "body", "cleanup"),
        *("stop b", "stop a"),
    ]
    assert [plugin.heard for plugin in plugins] == [None, None]


async def test_plugins_are_still_there_while_the_last_jobs_run(
    autojump_clock: MockClock,
) -> None:
    log: list[str] = []

    async def late() -> None:
        await trio.sleep(1.5)
        log.append("late job")

    async with open_pool(1, obey, plugins=[Plugin("a", log)]) as pool:
        await pool.submit(late)
    assert log == ["start a", "late job", "stop a"]


async def test_a_plugin_is_found_by_its_name() -> None:
    log: list[str] = []
    connection = object()

    class Unnamed(Plugin):
        def __init__(self) -> None:
            super().__init__("", log)

    plain, giving, unnamed = (
        Plugin("plain", log),
        Plugin("giving", log, gives=connection),
        Unnamed(),
    )
    async with open_pool(1, obey, plugins=[plain, giving, unnamed]) as pool:
        assert pool.plugin("plain") is plain
        assert pool.plugin("giving") is connection
        assert pool.plugin("Unnamed") is unnamed
        with pytest.raises(KeyError, match=r"missing.*plain.*giving.*Unnamed"):
            pool.plugin("missing")


async def test_a_pool_without_plugins_has_none() -> None:
    async with open_pool(1, obey) as pool:
        with pytest.raises(KeyError, match="none"):
            pool.plugin("any")


async def test_a_pool_of_functions_has_plugins_too() -> None:
    log: list[str] = []
    plugin = Plugin("a", log)
    async with open_pool(1, plugins=[plugin]) as pool:
        assert pool.plugin("a") is plugin
    assert log == ["start a", "stop a"]


async def test_a_plugin_made_by_asynccontextmanager() -> None:
    log: list[str] = []

    @asynccontextmanager
    async def connection() -> AsyncGenerator[str, None]:
        log.append("start")
        try:
            yield "given"
        finally:
            log.append("stop")

    async with open_pool(1, obey, plugins=[connection()]) as pool:
        assert pool.plugin("connection") == "given"
    assert log == ["start", "stop"]


async def test_hooks_and_middleware_of_plugins_come_after_those_of_the_pool() -> None:
    order: list[str] = []

    class Told(Hooks):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_job_complete(self, event: JobChanged) -> None:
            order.append(f"{self.name} complete")

    def layer(name: str) -> Any:
        async def middleware(job: CurrentJob, call_next: Next) -> Any:
            order.append(f"{name} middleware")
            return await call_next(job)

        return middleware

    class Bringing(Plugin):
        def __init__(self, name: str) -> None:
            super().__init__(name, [])
            self.hooks = [Told(name)]
            self.middleware = (layer(name),)

    async with open_pool(
        1,
        obey,
        hooks=[Told("pool")],
        middleware=[layer("pool")],
        plugins=[Bringing("a"), Bringing("b")],
    ) as pool:
        await pool.process(1)
    assert order == [
        *("pool middleware", "a middleware", "b middleware"),
        *("pool complete", "a complete", "b complete"),
    ]


async def test_what_a_plugin_brings_may_be_made_as_it_starts() -> None:
    class Late(Plugin):
        middleware: Any = ()

        async def __aenter__(self) -> Any:
            async def middleware(job: CurrentJob, call_next: Next) -> Any:
                return [await call_next(job)]

            self.middleware = [middleware]
            return await super().__aenter__()

    async with open_pool(1, obey, plugins=[Late("late", [])]) as pool:
        assert await pool.process(1) == [1]
        assert await pool.map([1, 2]) == [[1], [2]]


async def test_bad_middleware_of_a_plugin_is_refused_and_the_plugin_left() -> None:
    log: list[str] = []
    plugin = Plugin("a", log)
    plugin.middleware = [sync_middleware]  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="middleware"):
        async with open_pool(1, obey, plugins=[plugin]):
            pytest.fail("not refused")
    assert log == ["start a", "stop a"]


async def test_plugins_of_one_name_are_refused_before_anything_runs() -> None:
    log: list[str] = []
    with pytest.raises(ValueError, match=r"plugins.*'a'"):
        async with open_pool(1, obey, plugins=[Plugin("a", log), Plugin("a", log)]):
            pytest.fail("not refused")
    assert log == []


@pytest.mark.parametrize("plugin", [3, Plugin, "name", None, obey])
async def test_what_is_no_async_context_manager_is_refused(plugin: Any) -> None:
    with pytest.raises(TypeError, match="plugins"):
        async with open_pool(1, obey, plugins=[plugin]):
            pytest.fail("not refused")


async def test_a_plugin_that_fails_to_start_is_raised_bare_and_earlier_ones_left() -> (
    None
):
    log: list[str] = []
    error = Broken("no connection")
    plugins = [Plugin("a", log), Plugin("b", log, start=error), Plugin("c", log)]
    with pytest.raises(Broken) as caught:
        async with open_pool(1, worker=make_worker(log), plugins=plugins):
            pytest.fail("not opened")
    assert caught.value is error
    assert log == ["start a", "start b", "stop a"]


async def test_plugins_are_left_when_a_worker_fails_to_set_up() -> None:
    log: list[str] = []
    error = Broken("no worker")

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        raise error
        yield obey

    plugin = Plugin("a", log)
    with pytest.raises(Broken) as caught:
        async with open_pool(1, worker=worker, plugins=[plugin]):
            pytest.fail("not opened")
    assert caught.value is error
    assert plugin.heard is error
    assert log == ["start a", "stop a"]


async def test_a_plugin_that_fails_to_stop_leaves_the_block_by_its_error() -> None:
    log: list[str] = []
    error = Broken("stuck")
    plugins = [Plugin("a", log), Plugin("b", log, stop=error), Plugin("c", log)]
    with pytest.raises(Broken) as caught:
        async with open_pool(1, obey, plugins=plugins) as pool:
            await pool.process(1)
    assert caught.value is error
    assert log[3:] == ["stop c", "stop b", "stop a"]


async def test_a_plugin_that_fails_to_stop_hides_no_error_of_the_body(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log: list[str] = []
    error, stuck = ValueError("body"), Broken("stuck")
    plugins = [Plugin("a", log), Plugin("b", log, stop=stuck)]
    with caplog.at_level(logging.ERROR, "trio_pool"):
        with pytest.raises(ValueError) as caught:
            async with open_pool(1, obey, plugins=plugins):
                raise error
    assert caught.value is error
    assert log[2:] == ["stop b", "stop a"]
    assert [plugin.heard for plugin in plugins] == [error, error]
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [
        stuck
    ]


async def test_of_two_plugins_that_fail_to_stop_one_is_raised_and_one_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = Broken("first"), Broken("second")
    plugins = [Plugin("a", [], stop=second), Plugin("b", [], stop=first)]
    with caplog.at_level(logging.ERROR, "trio_pool"):
        with pytest.raises(Broken) as caught:
            async with open_pool(1, obey, plugins=plugins):
                pass
    assert caught.value is first
    assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [
        second
    ]


async def test_plugins_are_left_when_the_block_is_cancelled() -> None:
    log: list[str] = []
    with trio.CancelScope() as scope:
        async with open_pool(1, obey, plugins=[Plugin("a", log), Plugin("b", log)]):
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert log[2:] == ["stop b", "stop a"]


async def test_plugins_hear_of_jobs_that_nobody_read() -> None:
    plugin = Plugin("a", [])
    with pytest.raises(ExceptionGroup) as caught:
        async with open_pool(1, obey, plugins=[plugin]) as pool:
            await pool.submit(Broken())
    assert plugin.heard is caught.value


async def test_a_plugin_with_a_nursery_may_use_it_all_the_time() -> None:
    beats: list[int] = []

    @asynccontextmanager
    async def heart() -> AsyncGenerator[trio.Nursery, None]:
        async with trio.open_nursery() as nursery:
            yield nursery
            nursery.cancel_scope.cancel()

    async def beat() -> None:
        beats.append(1)
        await trio.sleep_forever()

    async with open_pool(1, obey, plugins=[heart()]) as pool:
        pool.plugin("heart").start_soon(beat)
        await pool.process(1)
        await wait_all_tasks_blocked()
    assert beats == [1]


# ----------------------------------------------------------------------
# events().


async def read_all(stream: EventStream) -> list[Event]:
    return [event async for event in stream]


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events]


async def read_now(stream: EventStream) -> list[Event]:
    """Read what is there and do not wait for more."""
    events: list[Event] = []

    async def follow() -> None:
        async for event in stream:
            events.append(event)  # noqa: PERF401 - the last read is cancelled

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return events


async def test_every_kind_of_event_of_a_life_in_order(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(
        1,
        obey,
        name="press",
        scale=Autoscale(min=1, max=3, interval=60.0),
        crash_on=Broken,
        max_backlog=1,
        overflow="drop_oldest",
    ) as pool:
        async with pool.events() as stream:
            assert await pool.process(0.25) == 0.25
            again = Retry(2, Backoff(0.25, jitter=0))
            with pytest.raises(ValueError):
                await pool.process(ValueError(), retry=again)
            reply = await pool.submit(trio.sleep_forever)
            await wait_all_tasks_blocked()
            dropped = await pool.submit("dropped", key="k")
            expired = await pool.submit("expired", ttl=0.5)
            await trio.sleep(0.75)
            reply.cancel()
            await pool.join()
            with pytest.raises(Broken):
                await pool.process(Broken())
            await wait_all_tasks_blocked()
            await pool.resize(2)
            assert dropped.state is JobState.DROPPED
            assert expired.state is JobState.EXPIRED
            await pool.shutdown()
            seen = await read_all(stream)
    assert kinds(seen) == [
        *("job_queue", "job_start", "job_complete"),
        *("job_queue", "job_start", "job_retry", "job_start", "job_error"),
        *("job_queue", "job_start"),
        *("job_queue", "job_drop", "job_queue", "job_drop"),
        "job_cancel",
        *("job_queue", "job_start", "job_error"),
        *("worker_crash", "worker_restart", "worker_start"),
        *("resize", "worker_start"),
        *("worker_stop", "worker_stop", "pool_stop"),
    ]
    assert {event.pool for event in seen} == {"press"}
    times = [event.time for event in seen]
    assert times == sorted(times)


async def test_events_are_typed_records(autojump_clock: MockClock) -> None:
    async with open_pool(1, obey, name="press", crash_on=Broken) as pool:
        async with pool.events() as stream:
            await trio.sleep(0.5)
            await (await pool.submit(1.5, id="mine", key="k")).wait()
            await pool.resize(2)
            error = Broken()
            with pytest.raises(Broken):
                await pool.process(error)
            events = await read_now(stream)
    queued, started, completed = events[:3]
    assert queued == JobChanged(
        *("job_queue", "press", 0.5, "mine", JobState.RUNNING, 0, 0, None, "k")
    )
    assert started == JobChanged(
        *("job_start", "press", 0.5, "mine", JobState.RUNNING, 0, 1, None, "k")
    )
    assert completed == JobChanged(
        *("job_complete", "press", 2.0, "mine", JobState.DONE, 0, 1, None, "k")
    )
    assert events[3] == PoolResized("resize", "press", 2.0, 1, 2)
    assert events[4] == WorkerChanged("worker_start", "press", 2.0, 1, None)
    crash = next(event for event in events if event.kind == "worker_crash")
    assert isinstance(crash, WorkerChanged)
    assert crash.error is error


async def test_a_retry_is_told_with_its_error_and_delay(
    autojump_clock: MockClock,
) -> None:
    error = Broken()
    retry = Retry(2, Backoff(0.75, jitter=0))
    async with open_pool(1, obey, retry=retry) as pool, pool.events() as stream:
        with pytest.raises(Broken):
            await pool.process(error)
        events = await read_now(stream)
    assert [(e.kind, e.time) for e in events] == [
        ("job_queue", 0.0),
        ("job_start", 0.0),
        ("job_retry", 0.0),
        ("job_start", 0.75),
        ("job_error", 0.75),
    ]
    retried = events[2]
    assert isinstance(retried, JobChanged)
    assert (retried.delay, retried.error, retried.attempts) == (0.75, error, 1)
    assert retried.state is JobState.DELAYED
    assert [e.delay for e in events if isinstance(e, JobChanged)] == [
        *(None, None, 0.75, None, None)
    ]


async def test_the_items_of_a_map_are_told_too() -> None:
    async with open_pool(1, obey) as pool, pool.events() as stream:
        await pool.map([1, 2])
        events = await read_now(stream)
    assert sorted(kinds(events)) == sorted(
        ["job_queue", "job_start", "job_complete"] * 2
    )


async def test_a_stream_opened_within_a_map_hears_the_rest_of_it() -> None:
    reached, go_on = trio.Event(), trio.Event()

    first: list[Any] = []

    async def handler(item: int) -> int:
        if item == 0:
            first.append(current_job().id)
        if item == 2:
            reached.set()
            await go_on.wait()
        return item

    async with open_pool(1, handler) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.map, range(5))
            await reached.wait()
            async with pool.events() as stream:
                go_on.set()
                await wait_all_tasks_blocked()
                events = await read_now(stream)
    assert kinds(events).count("job_complete") == 3
    assert kinds(events).count("job_start") == 2
    ids = [event.job_id for event in events if event.kind == "job_complete"]
    # Each has one of its own, be it asked for or not.
    assert len({*ids, *first}) == 4


async def test_a_stream_opened_in_the_middle_of_a_job_hears_its_end() -> None:
    release = trio.Event()
    async with open_pool(2, obey) as pool:
        done = await pool.submit(release.wait)
        cancelled = await pool.submit(trio.sleep_forever)
        await wait_all_tasks_blocked()
        async with pool.events() as stream:
            release.set()
            await done.wait()
            cancelled.cancel()
            await wait_all_tasks_blocked()
            events = await read_now(stream)
    assert [(e.kind, e.job_id) for e in events if isinstance(e, JobChanged)] == [
        ("job_complete", done.id),
        ("job_cancel", cancelled.id),
    ]


async def test_a_stream_opened_while_a_process_runs_hears_its_end() -> None:
    release = trio.Event()
    async with open_pool(1, obey) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.process, release.wait)
            await wait_all_tasks_blocked()
            async with pool.events() as stream:
                release.set()
                await wait_all_tasks_blocked()
                assert kinds(await read_now(stream)) == ["job_complete"]


async def test_a_stream_hears_nothing_from_before_it_was_opened() -> None:
    async with open_pool(1, obey) as pool:
        await pool.process(1)
        async with pool.events() as stream:
            assert await read_now(stream) == []


@pytest.mark.parametrize("buffer", [1, 2, 7])
async def test_a_slow_reader_is_told_how_many_it_lost(
    autojump_clock: MockClock, buffer: int
) -> None:
    async with open_pool(1, obey, name="press") as pool:
        async with pool.events(buffer=buffer) as stream:
            for _ in range(4):
                await trio.sleep(0.5)
                await pool.process("x")
            events = await read_now(stream)
            lost = 12 - buffer
            # The event that pushed the first one out came at this time.
            time = 0.5 * (buffer // 3 + 1)
            assert events[0] == EventsLost("press", time, lost)
            assert stream.lost == lost
            whole = ["job_queue", "job_start", "job_complete"] * 4
            assert kinds(events[1:]) == whole[-buffer:]
            await pool.process("y")
            events = await read_now(stream)
            expected = ["job_queue", "job_start", "job_complete"]
            if buffer >= 3:
                assert kinds(events) == expected
                assert stream.lost == lost
            else:
                assert events[0].kind == "lost"
                assert kinds(events[1:]) == expected[-buffer:]
                assert stream.lost == lost + 3 - buffer


@pytest.mark.parametrize("buffer", [0, -1, 1.5, math.inf, True, "many"])
async def test_a_bad_buffer_is_refused(buffer: Any) -> None:
    async with open_pool(1, obey) as pool:
        with pytest.raises((ValueError, TypeError), match="buffer"):
            async with pool.events(buffer=buffer):
                pytest.fail("not refused")


async def test_several_streams_hear_the_same_independently() -> None:
    async with open_pool(1, obey) as pool:
        async with pool.events() as whole, pool.events(buffer=1) as short:
            await pool.process(1)
            async with pool.events() as late:
                await pool.process(2)
                first = await read_now(whole)
                assert len(first) == 6
                assert await read_now(late) == first[3:]
                lost, last = await read_now(short)
                assert isinstance(lost, EventsLost)
                assert lost.count == 5
                assert last == first[-1]
            await pool.process(3)
            assert len(await read_now(whole)) == 3
            assert await read_all(late) == []


async def test_streams_and_hooks_hear_the_same_records() -> None:
    class Told(Hooks):
        def __init__(self) -> None:
            self.seen: list[JobChanged] = []

        def on_job_complete(self, event: JobChanged) -> None:
            self.seen.append(event)

    told = Told()
    async with open_pool(1, obey, hooks=[told]) as pool, pool.events() as stream:
        await pool.process(1)
        events = await read_now(stream)
        assert events[-1] is told.seen[0]


async def test_a_stream_ends_after_the_stop_of_the_pool() -> None:
    read: list[Event] = []

    async def follow(stream: EventStream) -> None:
        read.extend(await read_all(stream))

    async with open_pool(1, obey, name="press") as pool:
        async with pool.events() as stream:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(follow, stream)
                await wait_all_tasks_blocked()
                await pool.process(1)
                await pool.shutdown()
    assert kinds(read)[-2:] == ["worker_stop", "pool_stop"]
    last = read[-1]
    assert isinstance(last, PoolChanged)
    assert last.pool == "press"


async def test_what_was_not_read_can_be_read_after_the_stop() -> None:
    async with open_pool(1, obey) as pool, pool.events() as stream:
        await pool.process(1)
        await pool.shutdown()
        assert kinds(await read_all(stream)) == [
            *("job_queue", "job_start", "job_complete"),
            *("worker_stop", "pool_stop"),
        ]
        assert await read_all(stream) == []


async def test_a_stream_of_a_pool_that_has_stopped_is_at_its_end() -> None:
    async with open_pool(1, obey) as pool:
        await pool.shutdown()
        async with pool.events() as stream:
            assert await read_all(stream) == []
    async with pool.events() as stream:
        assert await read_all(stream) == []


async def test_a_stream_ends_when_its_block_is_left() -> None:
    async with open_pool(1, obey) as pool:
        async with trio.open_nursery() as nursery:
            read: list[Event] = []

            async def follow(stream: EventStream) -> None:
                read.extend(await read_all(stream))

            async with pool.events() as stream:
                nursery.start_soon(follow, stream)
                await wait_all_tasks_blocked()
            await wait_all_tasks_blocked()
            await pool.process(1)
        assert read == []


async def test_a_stream_ends_when_the_pool_is_cancelled() -> None:
    async with open_pool(1, obey) as pool, pool.events() as stream:
        reply = await pool.submit(trio.sleep_forever)
        await wait_all_tasks_blocked()
        pool.cancel()
        events = await read_all(stream)
        assert reply.state is JobState.CANCELLED
    assert kinds(events)[-1] == "pool_stop"
    assert kinds(events).count("job_cancel") == 1


async def test_a_cancelled_read_loses_no_event() -> None:
    async with open_pool(1, obey) as pool, pool.events() as stream:
        with trio.move_on_after(0):
            await anext(stream)
        assert await read_now(stream) == []
        await pool.process(1)
        assert len(await read_now(stream)) == 3


async def test_reading_events_is_a_checkpoint() -> None:
    async with open_pool(1, obey) as pool, pool.events() as stream:
        await pool.process(1)
        with assert_checkpoints():
            await anext(stream)


async def test_a_stream_in_a_pool_of_functions() -> None:
    async with open_pool(1) as pool, pool.events() as stream:
        await pool.process(obey, 1)
        assert kinds(await read_now(stream)) == [
            *("job_queue", "job_start", "job_complete")
        ]


async def test_jobs_are_told_once_and_in_order_under_load() -> None:
    async with open_pool(3, obey) as pool, pool.events() as stream:
        replies = await pool.submit_batch([0.0] * 20)
        await pool.join()
        events = [e for e in await read_now(stream) if isinstance(e, JobChanged)]
        for reply in replies:
            mine = [event.kind for event in events if event.job_id == reply.id]
            assert mine == ["job_queue", "job_start", "job_complete"]


async def test_opening_a_stream_of_events_is_a_checkpoint() -> None:
    async with open_pool(1, obey) as pool:
        manager = pool.events()
        with assert_checkpoints():
            stream = await manager.__aenter__()
        await manager.__aexit__(None, None, None)
        assert [event async for event in stream] == []
