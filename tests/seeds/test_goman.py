"""The cases of goman, a Go pool with everything built in, in the words of this pool."""

from __future__ import annotations

import math
import pickle
import random
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_pool import (
    BacklogFull,
    Backoff,
    CircuitBreaker,
    CircuitOpen,
    CurrentJob,
    Event,
    EventsLost,
    Hooks,
    JobCancelled,
    JobChanged,
    JobError,
    JobState,
    JobTimeout,
    Pool,
    PoolBroken,
    PoolChanged,
    PoolClosed,
    PoolConfig,
    PoolError,
    PoolStatistics,
    Priority,
    Restart,
    WorkerChanged,
    WorkerCrashed,
    WorkerSnapshot,
    WorkerState,
    current_job,
    open_pool,
)


async def obey(job: Any) -> Any:
    """Return the job; raise it, if it is an error; sleep, if it is a float."""
    if isinstance(job, BaseException):
        raise job
    if isinstance(job, float):
        await trio.sleep(job)
    return job


async def tell_worker(_: object) -> int:
    """Return the id of the worker that runs the job."""
    return current_job().worker


def balanced(count: PoolStatistics) -> bool:
    ended = count.done + count.failed + count.timed_out + count.cancelled
    ended += count.expired + count.dropped + count.lost
    return count.accepted == count.delayed + count.queued + count.running + ended


# The configuration: defaults, custom values, what is refused, copies, variables.


async def test_creation_with_the_defaults() -> None:
    """A pool of a default config has the documented size and bound."""
    async with open_pool(PoolConfig(), obey) as pool:
        assert pool.size == 8
        assert pool.statistics().workers == 8
        assert await pool.process(1) == 1
    config = PoolConfig()
    assert config.max_backlog == 1024
    assert config.timeout == config.grace == math.inf


async def test_creation_with_custom_values() -> None:
    """Every value that a config was made with is the one the pool works by."""
    config = PoolConfig(size=3, max_backlog=1, overflow="reject", name="custom")
    async with open_pool(config, obey) as pool:
        assert (pool.size, pool.name) == (3, "custom")
        for _ in range(4):
            pool.submit_nowait(math.inf)
        with pytest.raises(BacklogFull):
            pool.submit_nowait(1)
        pool.cancel()


async def test_creation_with_no_workers() -> None:
    """A pool of no workers, which the seed refuses, is legal: its jobs wait."""
    async with open_pool(0, obey) as pool:
        reply = await pool.submit(1)
        await wait_all_tasks_blocked()
        assert reply.state is JobState.QUEUED
        await pool.resize(1)
        assert await reply.wait() == 1


async def test_creation_with_no_queue() -> None:
    """A backlog of 0, which the seed refuses, hands over to idle workers only."""
    async with open_pool(1, obey, max_backlog=0) as pool:
        pool.submit_nowait(math.inf)
        with pytest.raises(BacklogFull):
            pool.submit_nowait(1)
        pool.cancel()


def test_creation_with_very_many() -> None:
    """More workers or waiting jobs than the seed has room for are just numbers."""
    config = PoolConfig(size=10_001, max_backlog=1_000_001)
    assert (config.size, config.max_backlog) == (10_001, 1_000_001)
    assert PoolConfig(max_backlog=math.inf).max_backlog == math.inf


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("size", -1, ValueError),
        ("size", math.inf, TypeError),
        ("size", 2.5, TypeError),
        ("size", True, TypeError),
        ("max_backlog", -1, ValueError),
        ("max_backlog", 2.5, TypeError),
        ("timeout", 0, ValueError),
        ("timeout", -1.5, ValueError),
        ("timeout", math.nan, ValueError),
        ("grace", -1.5, ValueError),
        ("grace", "30s", TypeError),
        ("overflow", "explode", ValueError),
        ("max_jobs", 0, ValueError),
        ("name", "", ValueError),
    ],
)
def test_creation_refuses_a_bad_value_by_the_name_of_its_option(
    option: str, value: Any, error: type[Exception]
) -> None:
    """Each bad value is refused at once, and the message names option and value."""
    with pytest.raises(error) as config_refusal:
        PoolConfig(**{option: value})
    assert str(config_refusal.value).startswith(f"{option} must be ")
    assert repr(value) in str(config_refusal.value)
    size, options = (value, {}) if option == "size" else (1, {option: value})
    with pytest.raises(error) as pool_refusal:
        open_pool(size, obey, **options)
    assert str(pool_refusal.value) == str(config_refusal.value)


def test_creation_refuses_an_unknown_option() -> None:
    """An option that does not exist is refused, and never just ignored."""
    options: Any = {"queue_size": 5}
    with pytest.raises(TypeError, match="no option 'queue_size'"):
        open_pool(1, obey, **options)


def test_config_copy() -> None:
    """A changed copy of a config leaves the original alone, and is checked too."""
    config = PoolConfig(size=2, timeout=1.5)
    copy = attrs.evolve(config, size=5)
    assert (config.size, copy.size) == (2, 5)
    assert (copy.timeout, copy.name) == (1.5, config.name)
    with pytest.raises(ValueError, match=r"^size "):
        attrs.evolve(config, size=-1)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        config.size = 3  # type: ignore[misc]  # that it is refused is the test


def test_config_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables are really read, which the seed documents and does not do."""
    monkeypatch.setenv("POOL_SIZE", "20")
    monkeypatch.setenv("POOL_MAX_BACKLOG", "10000")
    monkeypatch.setenv("POOL_TIMEOUT", "30")
    monkeypatch.setenv("POOL_GRACE", "60.5")
    config = PoolConfig.from_env()
    assert (config.size, config.max_backlog) == (20, 10_000)
    assert (config.timeout, config.grace) == (30.0, 60.5)
    assert config.overflow == PoolConfig().overflow


async def test_config_of_a_container_is_all_a_deployment_needs() -> None:
    """A pool opens by the variables of a container, with a prefix of one's own."""
    container = {
        "WEB_POOL_SIZE": "3",
        "WEB_POOL_MAX_BACKLOG": "inf",
        "WEB_POOL_NAME": "web",
        "POOL_SIZE": "5",
        "SERVER_ADDR": ":8080",
    }
    config = PoolConfig.from_env("WEB_POOL_", container)
    async with open_pool(config, obey) as pool:
        assert (pool.name, pool.statistics().workers) == ("web", 3)
        assert not pool.closed
    assert pool.closed


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("POOL_SIZE", "many", "int"),
        ("POOL_SIZE", "-1", "size must be an int, 0 or more"),
        ("POOL_TIMEOUT", "30s", "float"),
        ("POOL_TIMEOUT", "0", "timeout must be a number of seconds > 0"),
        ("POOL_OVERFLOW", "explode", "overflow must be one of 'wait'"),
    ],
)
def test_config_of_a_bad_variable_is_refused_by_its_name(
    variable: str, value: str, expected: str
) -> None:
    """The message says which variable is wrong, its value and what was expected."""
    with pytest.raises(ValueError) as caught:
        PoolConfig.from_env(environ={variable: value})
    assert f"{variable}={value!r}" in str(caught.value)
    assert expected in str(caught.value)


# Submitting: one, several, nothing; with a timeout; for a reply.


@pytest.mark.parametrize("jobs", [1, 5])
async def test_submit(jobs: int) -> None:
    """Every submitted job is done, be it one or five."""
    seen: list[int] = []

    async def handler(number: int) -> None:
        seen.append(number)

    async with open_pool(2, handler) as pool:
        for number in range(jobs):
            await pool.submit(number)
        await pool.join()
        assert pool.statistics().done == jobs
    assert sorted(seen) == list(range(jobs))


async def test_submit_none_is_refused() -> None:
    """No function is no job: refused in the call itself, and nothing is counted."""
    nothing: Any = None
    async with open_pool(1) as pool:
        with pytest.raises(TypeError, match=r"async_fn must be .* got None"):
            await pool.submit(nothing)
        with pytest.raises(TypeError, match=r"async_fn must be .* got None"):
            pool.submit_nowait(nothing)
        assert pool.statistics().accepted == 0


async def test_submit_with_timeout(autojump_clock: MockClock) -> None:
    """A timed job gets its whole time, not a context that is cancelled already."""
    async with open_pool(1) as pool:

        async def job() -> float:
            await trio.sleep(1.25)
            return current_job().deadline

        reply = await pool.submit(job, timeout=1.5)
        assert await reply.wait() == 1.5
        assert trio.current_time() == 1.25


async def test_submit_for_a_result() -> None:
    """A reply is not done, and then it is done and has the result, for good."""
    async with open_pool(1, obey) as pool:
        reply = pool.submit_nowait("result")
        assert not reply.done
        assert reply.outcome is None
        assert await reply.wait() == "result"
        assert reply.done
        assert reply.state is JobState.DONE
        assert await reply.wait() == "result"


async def test_submit_for_an_error() -> None:
    """The reply of a failed job raises the very error of the handler, each time."""
    error = ValueError("broken")
    async with open_pool(1, obey) as pool:
        reply = await pool.submit(error)
        for _ in range(2):
            with pytest.raises(ValueError) as caught:
                await reply.wait()
            assert caught.value is error
        assert reply.state is JobState.FAILED


async def test_wait_with_a_limit_expires_and_the_job_goes_on(
    autojump_clock: MockClock,
) -> None:
    """Who stops waiting for a reply does not stop the job, and may ask again."""
    async with open_pool(1, obey) as pool:
        reply = await pool.submit(1.5)
        with pytest.raises(trio.TooSlowError):
            with trio.fail_after(0.25):
                await reply.wait()
        assert trio.current_time() == 0.25
        assert reply.state is JobState.RUNNING
        assert await reply.wait() == 1.5
        assert trio.current_time() == 1.5


async def test_cancel_says_true_and_then_false(autojump_clock: MockClock) -> None:
    """Cancelling a running job stops its handler, which in the seed ran on."""
    stopped: list[float] = []

    async def handler(_: object) -> None:
        try:
            await trio.sleep(1.5)
        except trio.Cancelled:
            stopped.append(trio.current_time())
            raise

    async with open_pool(1, handler) as pool:
        reply = await pool.submit(1)
        await trio.sleep(0.25)
        assert reply.cancel() is True
        assert reply.cancel() is False
        with pytest.raises(JobCancelled) as caught:
            await reply.wait()
        assert caught.value.started is True
        assert reply.cancel() is False
        assert trio.current_time() == 0.25
    assert stopped == [0.25]


async def test_cancel_of_a_waiting_job_means_that_it_never_runs() -> None:
    """A job that is cancelled in the backlog leaves it at once."""
    async with open_pool(1, obey) as pool:
        running = await pool.submit(math.inf)
        reply = await pool.submit(1)
        assert reply.cancel() is True
        assert pool.statistics().queued == 0
        with pytest.raises(JobCancelled) as caught:
            await reply.wait()
        assert caught.value.started is False
        running.cancel()


async def test_50_concurrent_submitters() -> None:
    """Fifty tasks that submit at the same time each get the result of their own."""
    results: dict[int, int] = {}

    async def double(number: int) -> int:
        await trio.lowlevel.checkpoint()
        return 2 * number

    async with open_pool(4, double, max_backlog=10) as pool:

        async def submitter(number: int) -> None:
            reply = await pool.submit(number)
            results[number] = await reply.wait()

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(submitter, number)
        assert pool.statistics().done == 50
    assert results == {number: 2 * number for number in range(50)}


# The bound of the backlog.


async def test_full_queue_is_refused() -> None:
    """A queue of 2 takes 2 jobs, where that of the seed took 257."""
    async with open_pool(1, obey, max_backlog=2, overflow="reject") as pool:
        for _ in range(3):
            await pool.submit(math.inf)
        with pytest.raises(BacklogFull) as caught:
            await pool.submit(1)
        assert (caught.value.pool, caught.value.max_backlog) == (pool.name, 2)
        count = pool.statistics()
        assert (count.accepted, count.running, count.queued) == (3, 1, 2)
        pool.cancel()


# Priorities.


async def test_priority_by_order() -> None:
    """Waiting jobs start by priority and then by age; the seed paid no heed."""
    order: list[str] = []

    async def job(name: str) -> None:
        order.append(name)

    async with open_pool(1) as pool:
        hold = trio.Event()
        await pool.submit(hold.wait)
        for priority in [
            Priority.LOW,
            Priority.LOW,
            Priority.NORMAL,
            Priority.CRITICAL,
            Priority.HIGH,
            Priority.LOW,
            Priority.CRITICAL,
            Priority.NORMAL,
        ]:
            name = f"{priority.name} {pool.statistics().queued}"
            await pool.submit(job, name, priority=priority)
        hold.set()
    assert order == [
        "CRITICAL 3",
        "CRITICAL 6",
        "HIGH 4",
        "NORMAL 2",
        "NORMAL 7",
        "LOW 0",
        "LOW 1",
        "LOW 5",
    ]


async def test_priorities_are_plain_numbers() -> None:
    """The four names are ints, and any other int takes its place among them."""
    assert [*Priority] == [-1, 0, 1, 2]
    order: list[int] = []

    async def handler(priority: int) -> None:
        order.append(priority)

    async with open_pool(1, handler) as pool:
        pool.pause()
        for priority in (0, 100, Priority.CRITICAL, -100, Priority.LOW):
            await pool.submit(priority, priority=priority)
        pool.resume()
    assert order == [100, 2, 0, -1, -100]


# Middleware.

request: ContextVar[str] = ContextVar("request", default="none")


async def test_middleware_before_and_after_in_order() -> None:
    """The first middleware is outermost, as is the interceptor of the seed."""
    order: list[str] = []

    def make(name: str) -> Any:
        async def middleware(job: CurrentJob, call_next: Any) -> Any:
            order.append(f"before {name}")
            try:
                return await call_next(job)
            finally:
                order.append(f"after {name}")

        return middleware

    async def handler(_: object) -> str:
        order.append("handler")
        return "result"

    chain = [make("interceptor"), make("first"), make("second")]
    async with open_pool(1, handler, middleware=chain) as pool:
        assert await pool.process(1) == "result"
    assert order == [
        "before interceptor",
        "before first",
        "before second",
        "handler",
        "after second",
        "after first",
        "after interceptor",
    ]


async def test_middleware_context_is_seen_by_the_handler_and_after() -> None:
    """What a middleware sets flows on; the seed threw the context away."""
    seen: list[str] = []

    async def before_and_after(job: CurrentJob, call_next: Any) -> Any:
        seen.append(request.get())
        request.set(f"request {job.id}")
        result = await call_next()
        seen.append(request.get())
        return result

    async def handler(_: object) -> str:
        return request.get()

    async with open_pool(1, handler, middleware=[before_and_after]) as pool:
        assert await pool.process(1) == "request 1"
        assert await pool.process(2) == "request 2"
    # Nothing of the first job is left for the second one, nor for the caller.
    assert seen == ["none", "request 1", "none", "request 2"]
    assert request.get() == "none"


async def test_middleware_that_measures_time(autojump_clock: MockClock) -> None:
    """The logging example works as it stands, where the page's own one crashes."""
    lines: list[str] = []

    async def logging(job: CurrentJob, call_next: Any) -> Any:
        lines.append(f"job started: priority={job.priority}")
        start = trio.current_time()
        try:
            return await call_next()
        finally:
            lines.append(f"job ended after {trio.current_time() - start} s")

    async with open_pool(1, obey, middleware=[logging]) as pool:
        await pool.process(1.5, priority=Priority.HIGH)
        with pytest.raises(ValueError):
            await pool.process(ValueError())
    assert lines == [
        "job started: priority=1",
        "job ended after 1.5 s",
        "job started: priority=0",
        "job ended after 0.0 s",
    ]


async def test_middleware_hears_the_error_and_may_answer_for_it() -> None:
    """After a failure a middleware may raise on, or give a result in its place."""

    async def rescue(job: CurrentJob, call_next: Any) -> Any:
        try:
            return await call_next()
        except KeyError:
            return "default"

    async with open_pool(1, obey, middleware=[rescue]) as pool:
        assert await pool.process(KeyError()) == "default"
        with pytest.raises(ValueError):
            await pool.process(ValueError())
        assert pool.statistics().failed == 1


async def test_middleware_added_and_removed() -> None:
    """A config evolved with or without a middleware makes a pool with or without."""
    calls = 0

    async def counting(job: CurrentJob, call_next: Any) -> Any:
        nonlocal calls
        calls += 1
        return await call_next()

    plain = PoolConfig(size=1)
    added = attrs.evolve(plain, middleware=[*plain.middleware, counting])
    removed = attrs.evolve(
        added, middleware=[m for m in added.middleware if m is not counting]
    )
    for config, expected in [(plain, 0), (added, 1), (removed, 1)]:
        async with open_pool(config, obey) as pool:
            assert await pool.process(1) == 1
        assert calls == expected


# Plugins.


class Monitor:
    """A plugin that writes down its life, and may fail at a step of it."""

    def __init__(
        self, name: str, diary: list[str], failure: Exception | None = None
    ) -> None:
        self.name = name
        self.diary = diary
        self.failure = failure

    async def __aenter__(self) -> Monitor:
        if self.failure is not None:
            raise self.failure
        self.diary.append(f"{self.name} started")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.diary.append(f"{self.name} stopped")


async def test_plugins_are_started_and_stopped_around_the_workers() -> None:
    """Plugins start before the first worker and stop after the last one.

    Those of the seed were never started.
    """
    diary: list[str] = []

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        diary.append("worker set up")
        yield obey
        diary.append("worker gone")

    plugins = [Monitor("first", diary), Monitor("second", diary)]
    async with open_pool(1, worker=worker, plugins=plugins) as pool:
        await pool.process(1)
        diary.append("block")
    assert diary == [
        "first started",
        "second started",
        "worker set up",
        "block",
        "worker gone",
        "second stopped",
        "first stopped",
    ]


async def test_plugin_is_found_by_its_name() -> None:
    """A registered plugin is found, and for another name the message lists them."""
    monitor = Monitor("monitor", [])
    async with open_pool(1, obey, plugins=[monitor]) as pool:
        assert pool.plugin("monitor") is monitor
        with pytest.raises(KeyError, match=r"'metrics'.*there are: 'monitor'"):
            pool.plugin("metrics")


def test_plugin_of_a_duplicate_name_is_refused() -> None:
    """Two plugins of one name are refused before anything has started."""
    diary: list[str] = []
    plugins = [Monitor("monitor", diary), Monitor("monitor", diary)]
    with pytest.raises(ValueError, match=r"plugins .*'monitor'"):
        open_pool(1, obey, plugins=plugins)
    assert diary == []


async def test_plugin_that_fails_to_start_is_raised() -> None:
    """A failing start is raised bare; the block is not entered, and no one left in."""
    diary: list[str] = []
    error = OSError("port in use")
    plugins = [Monitor("first", diary), Monitor("second", diary, failure=error)]
    with pytest.raises(OSError) as caught:
        async with open_pool(1, obey, plugins=plugins):
            pytest.fail("the block was entered")
    assert caught.value is error
    assert diary == ["first started", "first stopped"]


async def test_plugin_may_bring_hooks_and_middleware() -> None:
    """What a plugin brings works as if it had been given to the pool itself."""

    class Counting(Hooks):
        ends = 0

        def on_job_complete(self, event: JobChanged) -> None:
            self.ends += 1

    class Doubling(Monitor):
        def __init__(self) -> None:
            super().__init__("doubling", [])
            self.counter = Counting()
            self.hooks = [self.counter]
            self.middleware = [self.double]

        async def double(self, job: CurrentJob, call_next: Any) -> Any:
            return 2 * await call_next()

    plugin = Doubling()
    async with open_pool(1, obey, plugins=[plugin]) as pool:
        assert await pool.process(4) == 8
    assert plugin.counter.ends == 1


# Events.


class Listener(Hooks):
    """Writes down all that the five events of the seed tell of."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_pool_start(self, event: PoolChanged) -> None:
        self.seen.append(event.kind)

    def on_pool_stop(self, event: PoolChanged) -> None:
        self.seen.append(event.kind)

    def on_job_queue(self, event: JobChanged) -> None:
        self.seen.append(event.kind)

    def on_job_complete(self, event: JobChanged) -> None:
        self.seen.append(event.kind)

    def on_worker_crash(self, event: WorkerChanged) -> None:
        self.seen.append(event.kind)


async def test_event_order() -> None:
    """All five events are told, each when it happens, in the order they happen.

    Two of those of the seed were never told, and the others came in any order.
    """
    listener = Listener()
    async with open_pool(1, obey, hooks=[listener]) as pool:
        await pool.process(1)
        with pytest.raises(WorkerCrashed):
            await pool.process(SystemExit())
        # The job is answered before its worker is gone and can be told of.
        await wait_all_tasks_blocked()
        await pool.process(2)
        assert "pool_stop" not in listener.seen
    assert listener.seen == [
        "pool_start",
        "job_queue",
        "job_complete",
        "job_queue",
        "worker_crash",
        "job_queue",
        "job_complete",
        "pool_stop",
    ]


async def test_event_stream_order() -> None:
    """A stream tells the same as typed records, in order, until the pool stops."""
    seen: list[Event] = []

    async def read(pool: Pool[Any, Any], task_status: Any) -> None:
        async with pool.events() as events:
            task_status.started()
            seen.extend([event async for event in events])

    async with trio.open_nursery() as nursery:
        async with open_pool(1, obey) as pool:
            await nursery.start(read, pool)
            await pool.process(1)
            with pytest.raises(ValueError):
                await pool.process(ValueError())
    assert [event.kind for event in seen] == [
        "job_queue",
        "job_start",
        "job_complete",
        "job_queue",
        "job_start",
        "job_error",
        "worker_stop",
        "pool_stop",
    ]
    assert [e.job_id for e in seen if isinstance(e, JobChanged)] == [1, 1, 1, 2, 2, 2]


async def test_event_stream_is_bounded() -> None:
    """A slow reader loses the oldest events and is told how many.

    In the seed they piled up without bound.
    """
    async with open_pool(1, obey) as pool:
        async with pool.events(buffer=2) as events:
            await pool.map(range(10))
            lost = await anext(events)
            assert isinstance(lost, EventsLost)
            rest = [await anext(events), await anext(events)]
            assert lost.count == 28
            assert [event.kind for event in rest] == ["job_start", "job_complete"]


# Statistics.


async def test_statistics_move_at_once() -> None:
    """Each step is counted when it is taken, not a second later.

    The seed's statistics were a second old, and said 0 where 10 jobs waited.
    """
    async with open_pool(2, obey) as pool:
        hold = [pool.submit_nowait(math.inf) for _ in range(2)]
        count = pool.statistics()
        assert (count.accepted, count.running, count.busy) == (2, 2, 2)
        for number in range(10):
            pool.submit_nowait(number)
        count = pool.statistics()
        assert (count.accepted, count.queued, count.done) == (12, 10, 0)
        assert (count.size, count.workers) == (2, 2)
        for reply in hold:
            reply.cancel()
        await pool.join()
        count = pool.statistics()
        assert (count.queued, count.done, count.cancelled) == (0, 10, 2)
        assert balanced(count)


async def test_statistics_of_throughput_and_average(autojump_clock: MockClock) -> None:
    """Throughput is jobs per second, and the average is that of the run times."""
    async with open_pool(1, obey) as pool:
        for _ in range(4):
            await pool.process(0.5)
        count = pool.statistics()
        assert count.throughput == 2.0
        assert (count.run.count, count.run.mean, count.run.max) == (4, 0.5, 0.5)


async def test_percentiles_of_known_data(autojump_clock: MockClock) -> None:
    """Of runs of 1, 2, ..., 100 seconds the percentiles are those seconds.

    They are read from a histogram, which is within 1/17 of the true ones.
    """
    async with open_pool(100, obey) as pool:
        await pool.settle(float(second) for second in range(1, 101))
        run = pool.statistics().run
    assert (run.count, run.max) == (100, 100.0)
    assert run.mean == pytest.approx(50.5)
    assert run.p50 == pytest.approx(50, rel=1 / 17)
    assert run.p95 == pytest.approx(95, rel=1 / 17)
    assert run.p99 == pytest.approx(99, rel=1 / 17)


async def test_percentiles_of_waiting_are_apart_from_those_of_running(
    autojump_clock: MockClock,
) -> None:
    """A job that waits for another counts its wait and its run each for itself."""
    async with open_pool(1, obey) as pool:
        await pool.submit(0.5)
        await pool.submit(0.5)
        await trio.sleep(0.25)
        assert pool.statistics().oldest_wait == 0.25
        await pool.join()
        count = pool.statistics()
    assert (count.wait.count, count.wait.max) == (2, 0.5)
    assert (count.run.count, count.run.max) == (2, 0.5)
    assert count.oldest_wait == 0.0


# Crashes, timeouts and the circuit breaker.


async def test_survives_5_crashes_and_then_10_of_10_are_done(
    autojump_clock: MockClock,
) -> None:
    """After five crashes the pool is as good as new."""
    async with open_pool(2, obey) as pool:
        for number in range(5):
            with pytest.raises(WorkerCrashed) as caught:
                await pool.process(SystemExit(number))
            assert isinstance(caught.value.__cause__, SystemExit)
            assert caught.value.__cause__.code == number
        assert await pool.map(range(10)) == list(range(10))
        count = pool.statistics()
        assert (count.lost, count.done) == (5, 10)
        assert balanced(count)


async def test_job_over_its_limit_counts_as_timed_out(
    autojump_clock: MockClock,
) -> None:
    """A job over its time is stopped, and counted as nothing but timed out."""
    async with open_pool(1, obey, timeout=0.5) as pool:
        with pytest.raises(JobTimeout) as caught:
            await pool.process(1.5)
        assert trio.current_time() == 0.5
        assert caught.value.timeout == 0.5
        assert caught.value.started is True
        count = pool.statistics()
        assert (count.timed_out, count.failed, count.done) == (1, 0, 0)
        assert await pool.process(0.25) == 0.25


def make_breaker(**options: Any) -> CircuitBreaker:
    return CircuitBreaker(failures=3, open_for=1.5, **options)


async def fail(pool: Pool[Any, Any], times: int) -> None:
    for _ in range(times):
        with pytest.raises(ValueError):
            await pool.process(ValueError())


async def test_breaker_opens_after_3_failures() -> None:
    """Failures of jobs open it; in the seed only a full queue was counted."""
    breaker = make_breaker()
    async with open_pool(1, obey, breaker=breaker) as pool:
        await fail(pool, 2)
        assert breaker.state == "closed"
        await fail(pool, 1)
        assert breaker.state == "open"
        with pytest.raises(CircuitOpen) as caught:
            await pool.process(1)
        assert caught.value.started is False
        assert caught.value.reopens_in == pytest.approx(1.5, abs=0.25)
        # The refused job has cost nothing: it was not even accepted.
        assert pool.statistics().accepted == 3


async def test_breaker_counts_timeouts_and_crashes_too(
    autojump_clock: MockClock,
) -> None:
    """A job that timed out, or killed its worker, is a failure like any other."""
    breaker = make_breaker()
    async with open_pool(1, obey, breaker=breaker, timeout=0.25) as pool:
        await fail(pool, 1)
        with pytest.raises(JobTimeout):
            await pool.process(0.5)
        with pytest.raises(WorkerCrashed):
            await pool.process(SystemExit())
        assert breaker.state == "open"


async def test_breaker_is_half_open_after_its_time(autojump_clock: MockClock) -> None:
    """It refuses until its time is over, to the moment, and then tries one call."""
    breaker = make_breaker()
    async with open_pool(2, obey, breaker=breaker) as pool:
        await fail(pool, 3)
        await trio.sleep(1.25)
        with pytest.raises(CircuitOpen) as caught:
            await pool.process(1)
        assert caught.value.reopens_in == 0.25
        await trio.sleep(0.25)
        assert breaker.state == "half_open"
        probe = await pool.submit(0.25)
        with pytest.raises(CircuitOpen):
            await pool.process(1)
        assert await probe.wait() == 0.25


async def test_breaker_closes_after_n_successes(autojump_clock: MockClock) -> None:
    """Half-open it closes when as many calls as it tries have succeeded."""
    breaker = make_breaker(probes=3)
    async with open_pool(1, obey, breaker=breaker) as pool:
        await fail(pool, 3)
        await trio.sleep(1.5)
        for _ in range(3):
            assert breaker.state == "half_open"
            assert await pool.process(1) == 1
        assert breaker.state == "closed"
        # The old failures are forgotten.
        await fail(pool, 2)
        assert breaker.state == "closed"


async def test_breaker_reopens_on_a_failure(autojump_clock: MockClock) -> None:
    """One failure while it is half-open opens it again, for its whole time."""
    breaker = make_breaker(probes=3)
    async with open_pool(1, obey, breaker=breaker) as pool:
        await fail(pool, 3)
        await trio.sleep(1.5)
        assert await pool.process(1) == 1
        await fail(pool, 1)
        assert breaker.state == "open"
        await trio.sleep(1.25)
        with pytest.raises(CircuitOpen):
            await pool.process(1)
        assert breaker.statistics().opened == 2


async def test_breaker_reset() -> None:
    """Reset closes it at once and forgets the failures."""
    breaker = make_breaker()
    async with open_pool(1, obey, breaker=breaker) as pool:
        await fail(pool, 3)
        breaker.reset()
        assert breaker.state == "closed"
        assert await pool.process(1) == 1
        await fail(pool, 2)
        assert breaker.state == "closed"


async def test_breaker_has_statistics_of_its_own(autojump_clock: MockClock) -> None:
    """It counts failures, refusals, openings and the calls that it tries."""
    breaker = make_breaker()
    async with open_pool(1, obey, breaker=breaker) as pool:
        await fail(pool, 2)
        count = breaker.statistics()
        assert (count.state, count.failures, count.opened) == ("closed", 2, 0)
        await fail(pool, 1)
        for _ in range(4):
            with pytest.raises(CircuitOpen):
                await pool.process(1)
        count = breaker.statistics()
        assert (count.state, count.refused, count.opened) == ("open", 4, 1)
        await trio.sleep(1.5)
        await pool.submit(0.25)
        count = breaker.statistics()
        assert (count.state, count.probing) == ("half_open", 1)


async def test_breaker_under_100_callers_of_10_calls(
    autojump_clock: MockClock,
) -> None:
    """Of a thousand calls only those run that had started as it opened.

    When its time is over, exactly as many get through as it tries.
    """
    breaker = make_breaker(probes=2)
    runs = 0
    healthy = False
    heard: Counter[type] = Counter()

    async def service(_: object) -> str:
        nonlocal runs
        runs += 1
        await trio.sleep(0.25)
        if healthy:
            return "fine"
        raise ValueError

    async with open_pool(8, service, breaker=breaker) as pool:

        async def caller(calls: int) -> None:
            for _ in range(calls):
                try:
                    heard[type(await pool.process(1))] += 1
                except (ValueError, CircuitOpen) as error:
                    heard[type(error)] += 1

        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(caller, 10)
        # Eight at first, and two in the places of the first two that failed.
        assert runs == 10
        assert heard == {ValueError: 10, CircuitOpen: 990}
        assert breaker.statistics().refused == 990

        await trio.sleep(1.5)
        healthy = True
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(caller, 1)
        assert runs == 10 + 2
        assert heard == {ValueError: 10, CircuitOpen: 990 + 98, str: 2}
        assert breaker.state == "closed"
        assert balanced(pool.statistics())


# Which worker gets a job. None of the seed's load balancers was wired.


class RoundRobin:
    """Chooses the idle worker whose id comes next."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.last = size - 1

    def __call__(self, idle: Sequence[WorkerSnapshot]) -> WorkerSnapshot:
        chosen = min(idle, key=lambda worker: (worker.id - self.last - 1) % self.size)
        self.last = chosen.id
        return chosen


async def test_balancer_round_robin() -> None:
    """Each worker gets its turn, one after the other."""
    async with open_pool(3, tell_worker, choose=RoundRobin(3)) as pool:
        used = [await pool.process(None) for _ in range(7)]
    assert used == [0, 1, 2, 0, 1, 2, 0]


async def test_balancer_least_jobs() -> None:
    """The worker with the fewest jobs so far gets the next one."""

    def least(idle: Sequence[WorkerSnapshot]) -> WorkerSnapshot:
        return min(idle, key=lambda worker: worker.jobs)

    async with open_pool(4, tell_worker, choose=least) as pool:
        used = Counter([await pool.process(None) for _ in range(12)])
    assert used == {0: 3, 1: 3, 2: 3, 3: 3}


async def test_balancer_random() -> None:
    """`random.choice` is a balancer as it is, and reaches every worker."""
    choose = random.Random(5).choice
    async with open_pool(3, tell_worker, choose=choose) as pool:
        used = Counter([await pool.process(None) for _ in range(60)])
    assert set(used) == {0, 1, 2}
    assert max(used.values()) < 40


async def test_balancer_weighted() -> None:
    """A worker of three times the weight gets three times the jobs."""
    weights = {0: 3, 1: 1}

    def weighted(idle: Sequence[WorkerSnapshot]) -> WorkerSnapshot:
        return min(idle, key=lambda worker: (worker.jobs + 1) / weights[worker.id])

    async with open_pool(2, tell_worker, choose=weighted) as pool:
        used = Counter([await pool.process(None) for _ in range(20)])
    assert used == {0: 15, 1: 5}


async def test_balancer_is_offered_idle_workers_only() -> None:
    """Whatever a balancer prefers, it cannot queue a job behind a busy worker."""
    offered: list[list[int]] = []

    def first(idle: Sequence[WorkerSnapshot]) -> WorkerSnapshot:
        assert {worker.state for worker in idle} == {WorkerState.IDLE}
        offered.append(sorted(worker.id for worker in idle))
        return min(idle, key=lambda worker: worker.id)

    async with open_pool(3, obey, choose=first) as pool:
        replies = [await pool.submit(math.inf) for _ in range(3)]
        # Where one is left there is nothing to choose.
        assert offered == [[0, 1, 2], [1, 2]]
        assert [reply.worker for reply in replies] == [0, 1, 2]
        pool.cancel()


async def test_balancer_that_fails_is_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A balancer that raises is logged once, and the job runs all the same."""

    def broken(idle: Sequence[WorkerSnapshot]) -> WorkerSnapshot:
        raise LookupError

    async with open_pool(2, obey, choose=broken) as pool:
        assert [await pool.process(number) for number in range(3)] == [0, 1, 2]
    assert len(caplog.records) == 1


async def test_balancer_by_consistent_hash(autojump_clock: MockClock) -> None:
    """Jobs of one key run one at a time and in order; other keys do not wait."""
    seen: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    running: Counter[str] = Counter()

    async def handler(job: tuple[str, int]) -> None:
        key, number = job
        running[key] += 1
        assert running[key] == 1
        await trio.sleep(0.25)
        running[key] -= 1
        seen[key].append(number)

    async with open_pool(3, handler) as pool:
        for number in range(4):
            for key in seen:
                await pool.submit((key, number), key=key)
        await pool.join()
        # Four rounds, as each of the three keys had a worker all the time.
        assert trio.current_time() == 1.0
    assert seen == {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3], "c": [0, 1, 2, 3]}


async def test_balancer_adaptive(autojump_clock: MockClock) -> None:
    """A worker four times as fast gets four times the jobs, without a setting."""
    speeds = iter([0.25, 1.0])
    jobs: Counter[float] = Counter()

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[Any], Awaitable[None]], None]:
        speed = next(speeds)

        async def handler(_: object) -> None:
            jobs[speed] += 1
            await trio.sleep(speed)

        yield handler

    async with open_pool(2, worker=worker) as pool:
        for number in range(10):
            await pool.submit(number)
        await pool.join()
        assert trio.current_time() == 2.0
    assert jobs == {0.25: 8, 1.0: 2}


# Work stealing: there is one backlog, so nothing has to be stolen.


async def test_instant_job_does_not_wait_for_a_slow_one(
    autojump_clock: MockClock,
) -> None:
    """An instant job is done at once while another worker has one of 500 ms.

    In the seed it waited those 500 ms beside an idle worker.
    """
    async with open_pool(2, obey) as pool:
        slow = await pool.submit(0.5)
        for number in range(100):
            assert await pool.process(number) == number
        assert trio.current_time() == 0.0
        assert await slow.wait() == 0.5


def plan(size: int, jobs: list[tuple[int, int]]) -> list[int]:
    """Return when each job starts, where no worker idles while a job waits."""
    free = [0] * size
    starts: list[int] = []
    now = 0
    for pause, length in jobs:
        now += pause
        start = max(now, min(free))
        free[free.index(min(free))] = start + length
        starts.append(start)
    return starts


@given(
    size=st.integers(1, 4),
    jobs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=20),
)
def test_no_worker_idles_while_a_job_waits(
    size: int, jobs: list[tuple[int, int]]
) -> None:
    """Whatever comes when, each job starts when the first worker is free for it.

    Takes longer than others, as each of many examples is a trio run.
    """
    starts: dict[int, float] = {}
    quarter = 0.25

    async def handler(number: int) -> None:
        starts[number] = trio.current_time() / quarter
        await trio.sleep(jobs[number][1] * quarter)

    async def watch(pool: Pool[int, None]) -> None:
        # Between the quarters of a second, when nothing else happens.
        await trio.sleep(quarter / 2)
        while True:
            count = pool.statistics()
            assert not count.queued or count.busy == size
            await trio.sleep(quarter)

    async def main() -> None:
        async with open_pool(size, handler, max_backlog=math.inf) as pool:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, pool)
                for number, (pause, _) in enumerate(jobs):
                    await trio.sleep(pause * quarter)
                    pool.submit_nowait(number)
                await pool.join()
                nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert [starts[number] for number in range(len(jobs))] == plan(size, jobs)


# Restarts of workers.


async def test_worker_restarts_with_backoff(autojump_clock: MockClock) -> None:
    """A crashed worker is set up again, after longer and longer waits."""
    setups: list[float] = []

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        setups.append(trio.current_time())
        yield obey

    restart = Restart(backoff=Backoff(initial=1.5, jitter=0))
    async with open_pool(1, worker=worker, restart=restart) as pool:
        for _ in range(4):
            with pytest.raises(WorkerCrashed):
                await pool.process(SystemExit())
        assert await pool.process(1) == 1
    # At once, and then after 1.5, 3 and 6 seconds.
    assert setups == [0.0, 0.0, 1.5, 4.5, 10.5]


async def test_worker_states(autojump_clock: MockClock) -> None:
    """A worker is seen idle, busy, restarting, and idle again."""
    restart = Restart(backoff=Backoff(initial=1.5, jitter=0))
    async with open_pool(1, obey, restart=restart) as pool:

        def state() -> WorkerState:
            return pool.workers()[0].state

        assert state() is WorkerState.IDLE
        reply = await pool.submit(0.25)
        assert state() is WorkerState.BUSY
        assert pool.workers()[0].job_id == reply.id
        await reply.wait()
        error = SystemExit()
        for _ in range(2):
            with pytest.raises(WorkerCrashed):
                await pool.process(error)
        assert trio.current_time() == 0.25
        await trio.sleep(1.25)
        assert state() is WorkerState.RESTARTING
        assert pool.workers()[0].last_error is error
        await trio.sleep(0.5)
        assert state() is WorkerState.IDLE
        assert pool.workers()[0].restarts == 2
        assert pool.statistics().restarts == 2


async def test_worker_that_always_crashes_breaks_the_pool(
    autojump_clock: MockClock,
) -> None:
    """When the budget of restarts is spent, the pool says so and does not spin."""
    crashes = 0
    with pytest.raises(PoolBroken) as broken:
        async with open_pool(1, obey, restart=Restart(limit=2)) as pool:
            while True:
                with pytest.raises(WorkerCrashed):
                    await pool.process(SystemExit())
                crashes += 1
    assert crashes == 3
    assert isinstance(broken.value.__cause__, SystemExit)


# Shutdown.


async def test_graceful_shutdown_ends_all_600_accepted(
    autojump_clock: MockClock,
) -> None:
    """Every accepted job is done, and the report says so.

    The seed ran 256 of 600 and reported success.
    """
    async with open_pool(40, obey, max_backlog=600) as pool:
        replies = [pool.submit_nowait(0.25) for _ in range(600)]
        report = await pool.shutdown(grace=30)
        assert trio.current_time() == 600 / 40 * 0.25
    assert all(reply.state is JobState.DONE for reply in replies)
    assert (report.done, report.failed) == (600, 0)
    assert (report.cancelled, report.unfinished) == (0, 0)


async def test_shutdown_twice_is_fine(autojump_clock: MockClock) -> None:
    """A second shutdown, at the same time or later, hears the same end."""
    reports: list[object] = []
    async with open_pool(1, obey) as pool:

        async def shut_down() -> None:
            reports.append(await pool.shutdown())

        await pool.submit(0.25)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shut_down)
            nursery.start_soon(shut_down)
        await shut_down()
    assert trio.current_time() == 0.25
    assert reports == [reports[0]] * 3


async def test_shutdown_of_a_grace_shorter_than_the_jobs_says_so(
    autojump_clock: MockClock,
) -> None:
    """What is not done within the grace is cancelled, and reported as that."""
    async with open_pool(2, obey) as pool:
        quick = pool.submit_nowait(0.25)
        slow = [pool.submit_nowait(5.0) for _ in range(4)]
        report = await pool.shutdown(grace=1.5)
        assert trio.current_time() == 1.5
        assert (report.done, report.cancelled, report.unfinished) == (1, 4, 0)
        assert await quick.wait() == 0.25
        started = []
        for reply in slow:
            with pytest.raises(JobCancelled) as caught:
                await reply.wait()
            started.append(caught.value.started)
        assert started == [True, True, False, False]


async def test_shutdown_in_phases(autojump_clock: MockClock) -> None:
    """It refuses new jobs at once, ends the accepted ones, then lets workers go."""
    order: list[str] = []

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        yield obey
        order.append("worker gone")

    async with open_pool(1, worker=worker) as pool:
        replies = [await pool.submit(0.25), await pool.submit(0.25)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.shutdown)
            await wait_all_tasks_blocked()
            assert pool.closed
            with pytest.raises(PoolClosed):
                await pool.process(1)
            order.append("refused")
            for reply in replies:
                await reply.wait()
                order.append("done")
        assert pool.statistics().workers == 0
    assert order == ["refused", "done", "done", "worker gone"]


# Preallocation.


async def test_workers_are_made_ahead_and_used_again() -> None:
    """Each worker is set up before the block and serves all of its jobs."""
    setups = 0

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        nonlocal setups
        setups += 1
        yield obey

    async with open_pool(4, worker=worker) as pool:
        assert setups == pool.statistics().workers == 4
        await pool.map(range(100))
        living = trio.lowlevel.current_statistics().tasks_living
        for number in range(100):
            pool.submit_nowait(number)
        # Jobs are not tasks: a hundred more make not one more of them.
        assert trio.lowlevel.current_statistics().tasks_living == living
    assert setups == 4


# The errors.


async def test_error_of_a_job_keeps_its_identity() -> None:
    """The caller hears the very error of the handler; the seed made another."""
    cause = KeyError("cause")
    error = ValueError("effect")
    error.__cause__ = cause
    async with open_pool(1, obey) as pool:
        with pytest.raises(ValueError) as caught:
            await pool.process(error)
    assert caught.value is error
    assert caught.value.__cause__ is cause


async def test_errors_of_the_pool_are_one_family_with_facts(
    autojump_clock: MockClock,
) -> None:
    """All are caught as PoolError, and say which job, which worker, and why."""
    caught: list[Any] = []
    breaker = CircuitBreaker(failures=2)
    async with open_pool(1, obey, max_backlog=0, breaker=breaker, name="p") as pool:
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: pool.process(1.5, timeout=0.25),
            lambda: pool.process(SystemExit(3)),
            lambda: pool.process(1),
        ]
        for call in calls:
            with pytest.raises(PoolError) as info:
                await call()
            caught.append(info.value)
        breaker.reset()
        # With no backlog a job needs an idle worker, and this one is new.
        await wait_all_tasks_blocked()
        pool.submit_nowait(0.25)
        with pytest.raises(PoolError) as info:
            pool.submit_nowait(1)
        caught.append(info.value)
        await pool.shutdown()
        with pytest.raises(PoolError) as info:
            await pool.process(1)
        caught.append(info.value)
    timeout, crash, circuit, full, closed = caught
    assert isinstance(timeout, JobTimeout)
    assert isinstance(timeout, JobError)
    assert isinstance(timeout, trio.TooSlowError)
    assert (timeout.job_id, timeout.started, timeout.attempts) == (1, True, 1)
    assert (timeout.worker, timeout.timeout) == (0, 0.25)
    assert isinstance(crash, WorkerCrashed)
    assert (crash.job_id, crash.started, crash.worker) == (2, True, 0)
    assert isinstance(crash.__cause__, SystemExit)
    assert isinstance(circuit, CircuitOpen)
    assert (circuit.pool, circuit.started) == ("p", False)
    assert isinstance(full, BacklogFull)
    assert (full.pool, full.max_backlog, full.started) == ("p", 0, False)
    assert isinstance(closed, PoolClosed)
    assert (closed.pool, closed.started) == ("p", False)
    for error in caught:
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert (copy.args, str(copy)) == (error.args, str(error))
