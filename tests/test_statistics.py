"""Statistics: waits, runs and rates, exact in virtual time, from any thread."""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_pool import (
    Autoscale,
    Backoff,
    JobState,
    JobTimeout,
    Latency,
    PoolStatistics,
    Retry,
    WorkerCrashed,
    WorkerState,
    current_job,
    open_pool,
)

NOTHING = Latency(count=0, mean=0.0, p50=0.0, p95=0.0, p99=0.0, max=0.0)


class Broken(Exception):
    """What a handler raises."""


async def obey(job: Any) -> Any:
    """Sleep for a number of seconds, raise an error, await a function."""
    if isinstance(job, BaseException):
        raise job
    if callable(job):
        return await job()
    if isinstance(job, float):
        await trio.sleep(job)
    return job


def ended(count: PoolStatistics) -> int:
    terminal = count.done + count.failed + count.timed_out + count.cancelled
    return terminal + count.expired + count.dropped + count.lost


def check_books(count: PoolStatistics) -> None:
    waiting = count.delayed + count.queued + count.running
    assert count.accepted == waiting + ended(count)


def same(count: int, seconds: float) -> Latency:
    """Return the latency of so many equal times."""
    return Latency(
        count=count,
        mean=seconds,
        p50=seconds,
        p95=seconds,
        p99=seconds,
        max=seconds,
    )


# Nothing yet.


async def test_a_fresh_pool_has_measured_nothing() -> None:
    async with open_pool(2, obey) as pool:
        count = pool.statistics()
        assert (count.wait, count.run) == (NOTHING, NOTHING)
        assert (count.oldest_wait, count.throughput) == (0.0, 0.0)
        assert (count.accepted, count.retries, count.restarts) == (0, 0, 0)


# How long jobs run.


async def test_runs_are_exact_in_virtual_time(autojump_clock: MockClock) -> None:
    async with open_pool(4, obey) as pool:
        for seconds in (0.25, 1.5, 0.5, 0.75):
            await pool.process(seconds)
        run = pool.statistics().run
        assert (run.count, run.mean, run.max) == (4, 0.75, 1.5)
        assert run.p50 == pytest.approx(0.5, rel=0.059)
        assert run.p95 == run.p99 == pytest.approx(1.5, rel=0.059)


async def test_equal_runs_have_exact_percentiles(autojump_clock: MockClock) -> None:
    async with open_pool(2, obey) as pool:
        await (await pool.submit(1.5)).wait()
        await pool.process(1.5, priority=1)
        await pool.process(1.5, key="k")
        async with pool.lease() as worker:
            await worker.process(1.5)
        assert pool.statistics().run == same(4, 1.5)


@pytest.mark.parametrize("way", ["map", "settle", "stream"])
@pytest.mark.parametrize("size", [1, 3])
async def test_items_are_counted_in_run_and_not_in_wait(
    autojump_clock: MockClock, way: str, size: int
) -> None:
    items = [0.75] * 7
    async with open_pool(size, obey) as pool:
        if way == "map":
            await pool.map(items)
        elif way == "settle":
            await pool.settle(items)
        else:
            async with pool.stream(items) as stream:
                assert [result async for result in stream] == items
        count = pool.statistics()
        assert count.run == same(7, 0.75)
        assert count.wait == NOTHING


async def test_items_of_different_lengths_are_each_measured(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, obey) as pool:
        await pool.map([0.25, 0.5, 0.25, 1.0])
        run = pool.statistics().run
        assert (run.count, run.mean, run.max) == (4, 0.5, 1.0)


async def test_items_that_take_no_time_add_none_to_those_that_sleep(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, obey) as pool:
        await pool.map([0, 1, 2, 1.0, 0, 2.0])
        run = pool.statistics().run
        assert (run.count, run.mean, run.max) == (6, 0.5, 2.0)


async def test_every_attempt_that_ended_is_a_run(autojump_clock: MockClock) -> None:
    async def fail() -> None:
        await trio.sleep(0.5)
        raise Broken

    async def die() -> None:
        await trio.sleep(0.5)
        raise SystemExit

    async with open_pool(1, obey) as pool:
        with pytest.raises(Broken):
            await pool.process(fail)
        with pytest.raises(JobTimeout):
            await pool.process(9.0, timeout=0.5)
        with trio.move_on_after(0.5):
            await pool.process(9.0)
        with pytest.raises(WorkerCrashed):
            await pool.process(die)
        with pytest.raises(Broken):
            await pool.process(fail, retry=Retry(3, Backoff(0.25, jitter=0)))
        count = pool.statistics()
        assert count.run == same(7, 0.5)
        assert ended(count) == 5
        assert count.retries == 2


async def test_jobs_that_never_started_are_no_runs(autojump_clock: MockClock) -> None:
    async with open_pool(
        1, obey, max_backlog=1, overflow="drop_oldest", unobserved="ignore"
    ) as pool:
        running = await pool.submit(2.0)
        await wait_all_tasks_blocked()
        await pool.submit("dropped")
        await pool.submit("expired", ttl=0.5)
        await trio.sleep(1)
        (await pool.submit("cancelled")).cancel()
        await running.wait()
        count = pool.statistics()
        assert (count.dropped, count.expired, count.cancelled) == (1, 1, 1)
        assert count.run == same(1, 2.0)
        assert count.wait == same(1, 0.0)


@pytest.mark.parametrize(
    "way",
    ["process", "key", "submit", "lease", "failing", "retry", "limiter", "middleware"],
)
async def test_the_count_of_quick_runs_is_right_at_every_moment(way: str) -> None:
    # Without a pause and on the real clock: such jobs are measured together.
    async def quick(job: Any) -> Any:
        if isinstance(job, Exception):
            raise job
        return job

    async def middleware(job: Any, call_next: Any) -> Any:
        return await call_next(job)

    options: dict[str, Any] = {}
    if way == "limiter":
        options["limiter"] = trio.CapacityLimiter(1)
    if way == "middleware":
        options["middleware"] = [middleware]
    async with open_pool(2, quick, **options) as pool:
        attempts = 0
        for _ in range(40):
            attempts += 1
            if way == "key":
                await pool.process(1, key="k")
            elif way == "submit":
                await (await pool.submit(1)).wait()
            elif way == "lease":
                async with pool.lease() as worker:
                    await worker.process(1)
            elif way == "failing":
                with pytest.raises(Broken):
                    await pool.process(Broken())
            elif way == "retry":
                attempts += 1
                with pytest.raises(Broken):
                    await pool.process(Broken(), retry=Retry(2, Backoff(0.0)))
            else:
                await pool.process(1)
            count = pool.statistics()
            assert count.run.count == attempts
            assert ended(count) + count.retries == attempts
            assert 0 <= count.run.mean <= count.run.max


@pytest.mark.parametrize("size", [1, 3])
async def test_the_count_of_quick_items_is_right_after_each_map(size: int) -> None:
    async def quick(item: int) -> int:
        return item

    async with open_pool(size, quick) as pool:
        items = 0
        for length in (1, 2, 7, 8, 9, 100, 0, 333):
            assert len(await pool.map(range(length))) == length
            items += length
            count = pool.statistics()
            assert count.run.count == count.done == items
            assert count.wait == NOTHING


async def test_the_count_of_a_map_whose_items_fail_and_sleep_is_right() -> None:
    async def mixed(item: int) -> int:
        if item % 5 == 0:
            await trio.lowlevel.checkpoint()
        if item % 7 == 0:
            raise Broken
        return item

    async with open_pool(2, mixed) as pool:
        await pool.settle(range(100))
        count = pool.statistics()
        assert (count.done, count.failed) == (85, 15)
        assert count.run.count == 100
        with pytest.raises(ExceptionGroup):
            await pool.map(range(1, 100))
        count = pool.statistics()
        assert count.run.count == count.accepted == ended(count)


async def test_runs_of_jobs_that_ended_are_there_before_those_who_wait_hear() -> None:
    counts: list[tuple[int, int]] = []

    async def customer() -> None:
        for _ in range(10):
            await pool.process(1)
            count = pool.statistics()
            counts.append((count.run.count, ended(count)))

    async with open_pool(2, obey) as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(customer)
    assert all(runs == ends for runs, ends in counts)
    assert counts[-1] == (50, 50)


async def test_the_times_of_workers_that_left_are_kept(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(3, obey, max_jobs=2) as pool:
        await pool.map([0.5] * 9)
        await pool.process(0.0)
        before = pool.statistics()
        await pool.resize(0)
        after = pool.statistics()
        assert after.run == before.run
        assert after.run.count == 10
        await pool.resize(1)
        assert pool.statistics().run == before.run


async def test_on_the_real_clock_one_worker_cannot_run_longer_than_the_pool() -> None:
    began = time.perf_counter()
    async with open_pool(1, obey) as pool:
        for number in range(500):
            await pool.process(number)
        await pool.map(range(500))
        run = pool.statistics().run
    assert run.count == 1_000
    assert 0 < run.mean * run.count < time.perf_counter() - began


@pytest.mark.parametrize("way", ["process", "map"])
async def test_on_the_real_clock_what_is_quick_takes_some_time(way: str) -> None:
    async with open_pool(1, obey) as pool:
        for number in range(100 if way == "process" else 0):
            await pool.process(number)
        if way == "map":
            await pool.map(range(100))
        run = pool.statistics().run
    assert run.count == 100
    assert run.p50 > 0


async def spin(seconds: float) -> None:
    """Keep the worker busy, and fail after less than no time."""
    until = time.perf_counter() + abs(seconds)
    while time.perf_counter() < until:
        pass
    if seconds < 0:
        raise Broken


@pytest.mark.parametrize(
    "items",
    [
        pytest.param([0.0001, 0.0003], id="few"),
        pytest.param([*[0.0] * 40, *[0.0002] * 20, 0.0004, *[0.0] * 20], id="many"),
        pytest.param([0.0003, -0.0001], id="a failure at the end"),
    ],
)
async def test_on_the_real_clock_items_take_their_time_and_no_more(
    items: list[float],
) -> None:
    """It takes some ms, as the handler keeps the worker busy for as long."""
    async with open_pool(1, spin) as pool:
        began = time.perf_counter()
        await pool.settle(items)
        elapsed = time.perf_counter() - began
        run = pool.statistics().run
    assert run.max >= max(items)
    assert sum(map(abs, items)) <= run.mean * run.count <= elapsed


async def test_quick_jobs_of_workers_that_left_are_kept() -> None:
    async with open_pool(2, obey, max_jobs=3, crash_on=Broken) as pool:
        await pool.map(range(10))
        await pool.settle([Broken()])
        for number in range(10):
            await pool.process(number)
        assert pool.statistics().run.count == 21
        await pool.resize(0)
        assert pool.statistics().run.count == 21


async def test_a_map_beyond_the_buffer_of_the_histogram_is_counted_whole() -> None:
    # More samples than are ever pending; each takes a step of the scheduler.
    async def brief(item: int) -> None:
        await trio.lowlevel.checkpoint()

    async with open_pool(8, brief) as pool:
        await pool.map(range(2500))
        assert pool.statistics().run.count == 2500


# How long jobs wait.


async def test_a_job_that_finds_an_idle_worker_has_waited_exactly_nothing(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, obey) as pool:
        await pool.process(0.5)
        await pool.process(0.5, priority=1)
        await pool.process(0.5, key="k")
        await pool.process(0.5, retry=Retry())
        await (await pool.submit(0.5)).wait()
        async with pool.lease() as worker:
            await worker.process(0.5)
        assert pool.statistics().wait == same(6, 0.0)


async def test_on_the_real_clock_it_is_exactly_nothing_too() -> None:
    async with open_pool(1, obey) as pool:
        for _ in range(5):
            await pool.process(1)
            await pool.process(1, key="k")
        assert pool.statistics().wait == same(10, 0.0)


async def test_waits_are_exact_in_virtual_time(autojump_clock: MockClock) -> None:
    async with open_pool(1, obey) as pool:
        await pool.submit_batch([0.5, 0.25, 1.0, 0.25])
        await pool.join()
        # The first found the worker idle; then 0.5, 0.75 and 1.75 seconds.
        wait = pool.statistics().wait
        assert (wait.count, wait.mean, wait.max) == (4, 0.75, 1.75)


async def test_equal_waits_have_exact_percentiles(autojump_clock: MockClock) -> None:
    async with open_pool(4, obey) as pool:
        pool.pause()
        await pool.submit_batch([1.0] * 4)
        await trio.sleep(1.5)
        pool.resume()
        await pool.join()
        assert pool.statistics().wait == same(4, 1.5)


async def test_a_wait_is_counted_when_it_is_over(autojump_clock: MockClock) -> None:
    async with open_pool(1, obey) as pool:
        await pool.submit(2.0)
        await pool.submit(2.0)
        await trio.sleep(1)
        assert pool.statistics().wait == same(1, 0.0)
        await trio.sleep(1.5)
        wait = pool.statistics().wait
        assert (wait.count, wait.max) == (2, 2.0)


async def test_a_retried_job_waits_from_the_time_it_is_queued_again(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, obey) as pool:
        retry = Retry(2, Backoff(0.5, jitter=0))
        reply = await pool.submit(Broken(), retry=retry)
        await wait_all_tasks_blocked()
        await pool.submit(2.0)
        with pytest.raises(Broken):
            await reply.wait()
        # The job waits for its time from 0 to 0.5, for the worker until 2.
        assert trio.current_time() == 2.0
        wait = pool.statistics().wait
        assert (wait.count, wait.mean, wait.max) == (3, 0.5, 1.5)


async def test_a_retry_that_finds_an_idle_worker_has_waited_nothing(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, obey, retry=Retry(3, Backoff(0.5, jitter=0))) as pool:
        with pytest.raises(Broken):
            await pool.process(Broken())
        assert pool.statistics().wait == same(3, 0.0)


async def test_the_time_of_a_callers_wait_for_room_is_not_the_jobs(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, obey, max_backlog=1) as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(pool.process, 1.0)
                await wait_all_tasks_blocked()
        # Handed over; waited for a second; let in after one, waited for another.
        wait = pool.statistics().wait
        assert (wait.count, wait.max) == (3, 1.0)
        assert wait.mean == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "options",
    [{}, {"priority": 1}, {"key": "k"}, {"id": "mine"}, {"ttl": 9.0}],
    ids=["plain", "priority", "key", "id", "ttl"],
)
async def test_a_job_withdrawn_before_its_start_has_no_wait(
    autojump_clock: MockClock, options: Any
) -> None:
    async with open_pool(1, obey) as pool:
        await trio.sleep(1)
        # Taken back in the step of the hand-over.
        pool.submit_nowait(1, **options).cancel()
        await wait_all_tasks_blocked()
        count = pool.statistics()
        check_books(count)
        assert (count.cancelled, count.wait, count.run) == (1, NOTHING, NOTHING)
        await pool.submit(1, **options)
        await pool.join()
        assert pool.statistics().wait == same(1, 0.0)


@pytest.mark.parametrize("start", [0.0, 1.0])
async def test_a_job_withdrawn_between_its_taking_and_its_start_has_no_wait(
    autojump_clock: MockClock, start: float
) -> None:
    var: ContextVar[object] = ContextVar("var")
    caught = 0
    async with open_pool(1, obey) as pool:
        await trio.sleep(start)
        # The worker takes it, and yields to be in its context. Who runs next is
        # left to chance by trio, so it takes a few turns.
        for _ in range(20):
            release = trio.Event()
            var.set(object())
            await pool.submit(release.wait)
            await wait_all_tasks_blocked()
            var.set(object())
            reply = await pool.submit(1)
            release.set()
            for _ in range(4):
                await trio.lowlevel.checkpoint()
                if reply.state is JobState.RUNNING:
                    caught += reply.cancel()
                    break
            await pool.join()
            count = pool.statistics()
            check_books(count)
            assert count.wait.count == count.run.count
    assert caught


async def test_items_have_no_wait_though_they_are_tried_again(
    autojump_clock: MockClock,
) -> None:
    """The second attempt is in line behind another job."""
    attempts = 0

    async def fail_once() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise Broken

    async with open_pool(1, obey) as pool, trio.open_nursery() as nursery:
        retry = Retry(2, Backoff(1.0, jitter=0))
        nursery.start_soon(partial(pool.map, [fail_once], retry=retry))
        await wait_all_tasks_blocked()
        await pool.process(5.0)
        await pool.join()
        assert attempts == 2
        # That of the job, which was handed over.
        assert pool.statistics().wait == same(1, 0.0)


async def test_waits_and_runs_agree_in_number_where_every_job_runs() -> None:
    async with open_pool(2, obey, max_backlog=3) as pool:
        await pool.submit_batch(range(30))
        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(pool.process, number)
        await pool.join()
        count = pool.statistics()
        assert count.wait.count == count.run.count == count.done == 60


# oldest_wait.


async def test_oldest_wait_is_that_of_the_job_that_waits_longest(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, obey) as pool:
        await pool.submit(2.0)
        await trio.sleep(0.5)
        assert pool.statistics().oldest_wait == 0.0
        await pool.submit(1.0)
        await trio.sleep(0.25)
        await pool.submit(1.0, priority=5)
        await trio.sleep(0.5)
        assert pool.statistics().oldest_wait == 0.75
        await trio.sleep(1)
        # The urgent one runs since 2.0; the other waits since 0.5.
        assert pool.statistics().oldest_wait == 1.75
        await trio.sleep(1)
        assert pool.statistics().oldest_wait == 0.0


async def test_oldest_wait_forgets_a_job_that_was_withdrawn(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(0, obey) as pool:
        first = await pool.submit(1)
        await trio.sleep(1)
        second = await pool.submit(2)
        await trio.sleep(0.5)
        assert pool.statistics().oldest_wait == 1.5
        first.cancel()
        assert pool.statistics().oldest_wait == 0.5
        second.cancel()
        assert pool.statistics().oldest_wait == 0.0


async def test_oldest_wait_in_a_pause(autojump_clock: MockClock) -> None:
    async with open_pool(1, obey) as pool:
        pool.pause()
        await pool.submit(1)
        await trio.sleep(1.5)
        assert pool.statistics().oldest_wait == 1.5
        pool.resume()
        await pool.join()
        assert pool.statistics().oldest_wait == 0.0


# throughput.


async def test_throughput_is_ended_jobs_per_second_since_the_opening(
    autojump_clock: MockClock,
) -> None:
    await trio.sleep(3)
    async with open_pool(1, obey) as pool:
        assert pool.statistics().throughput == 0.0
        for _ in range(4):
            await pool.process(0.5)
        assert pool.statistics().throughput == 2.0
        await trio.sleep(2)
        assert pool.statistics().throughput == 1.0


async def test_every_kind_of_end_counts_in_throughput(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, obey) as pool:
        with pytest.raises(Broken):
            await pool.process(Broken())
        with pytest.raises(JobTimeout):
            await pool.process(9.0, timeout=1.0)
        with trio.move_on_after(1.0):
            await pool.process(9.0)
        await pool.map([1.0] * 2)
        assert ended(pool.statistics()) == 5
        assert pool.statistics().throughput == 1.25


async def test_throughput_stands_still_after_the_pool(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, obey) as pool:
        await pool.map([0.5] * 4)
    assert pool.statistics().throughput == 2.0
    await trio.sleep(10)
    assert pool.statistics().throughput == 2.0


# retries, restarts, and the rest.


async def test_retries_counts_attempts_after_the_first_as_they_are_scheduled(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, obey, retry=Retry(3, Backoff(1.0, 1.0, jitter=0))) as pool:
        reply = await pool.submit(Broken())
        seen = []
        await trio.sleep(0.5)
        for _ in range(3):
            count = pool.statistics()
            seen.append((count.retries, count.delayed, count.failed))
            check_books(count)
            await trio.sleep(1)
        assert seen == [(1, 1, 0), (2, 1, 0), (2, 0, 1)]
        with pytest.raises(Broken):
            await reply.wait()


async def test_retried_items_are_counted_once_as_jobs(
    autojump_clock: MockClock,
) -> None:
    tries: dict[int, int] = {}

    async def flaky(item: int) -> int:
        tries[item] = tries.get(item, 0) + 1
        await trio.sleep(0.5)
        if item % 2 and tries[item] < 3:
            raise Broken
        return item

    async with open_pool(2, flaky) as pool:
        retry = Retry(3, Backoff(0.25, jitter=0))
        assert await pool.map(range(6), retry=retry) == list(range(6))
        count = pool.statistics()
        assert (count.accepted, count.done, count.retries) == (6, 6, 6)
        assert count.run == same(12, 0.5)
        check_books(count)


async def test_size_workers_and_busy(autojump_clock: MockClock) -> None:
    @asynccontextmanager
    async def slow() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        await trio.sleep(1)
        yield obey

    async with open_pool(1, worker=slow) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.resize, 3)
            await trio.sleep(0.5)
            await pool.submit(2.0)
            await wait_all_tasks_blocked()
            count = pool.statistics()
            assert (count.size, count.workers, count.busy) == (3, 1, 1)
            await trio.sleep(1)
            count = pool.statistics()
            assert (count.size, count.workers, count.busy) == (3, 3, 1)


async def test_size_follows_autoscaling(autojump_clock: MockClock) -> None:
    async with open_pool(1, obey, scale=Autoscale(max=2, interval=0.25)) as pool:
        await pool.submit_batch([1.0, 1.0])
        await trio.sleep(0.375)
        count = pool.statistics()
        assert (count.size, count.workers, count.busy) == (2, 2, 2)


async def test_all_can_be_read_after_the_block(autojump_clock: MockClock) -> None:
    async with open_pool(2, obey) as pool:
        await pool.map([0.5] * 4)
        await pool.process(0.5)
    count = pool.statistics()
    assert (count.done, count.workers, count.busy) == (5, 0, 0)
    assert count.run == same(5, 0.5)
    assert count.wait == same(1, 0.0)
    assert count.oldest_wait == 0.0
    assert pool.closed
    assert isinstance(pool.workers(), tuple)
    assert repr(pool)


async def test_all_can_be_read_after_a_block_that_failed() -> None:
    with pytest.raises(Broken):
        async with open_pool(1, obey) as pool:
            await pool.submit(trio.sleep_forever)
            await pool.submit("waiting")
            await wait_all_tasks_blocked()
            raise Broken
    count = pool.statistics()
    check_books(count)
    assert (count.cancelled, count.running, count.queued) == (2, 0, 0)
    assert count.oldest_wait == 0.0
    assert count.run.count == 1


def test_all_can_be_read_after_the_run_of_trio() -> None:
    async def main() -> Any:
        async with open_pool(1, obey) as pool:
            await pool.process(1)
        return pool

    pool = trio.run(main)
    assert pool.statistics().done == 1
    assert pool.statistics().run.count == 1
    assert all(worker.state is WorkerState.STOPPED for worker in pool.workers())


# workers().


async def test_job_age_counts_from_the_start_of_the_job(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(2, obey) as pool:
        assert [worker.job_age for worker in pool.workers()] == [None, None]
        await trio.sleep(0.5)
        reply = await pool.submit(2.0)
        await trio.sleep(0.75)
        ages = {worker.id: worker.job_age for worker in pool.workers()}
        assert reply.worker is not None
        assert ages[reply.worker] == 0.75
        assert ages[1 - reply.worker] is None
        await reply.wait()
        assert [worker.job_age for worker in pool.workers()] == [None, None]


async def test_job_age_is_that_of_the_attempt(autojump_clock: MockClock) -> None:
    async def fail() -> None:
        await trio.sleep(1)
        raise Broken

    retry = Retry(2, Backoff(0.5, jitter=0))
    async with open_pool(1, obey, unobserved="ignore") as pool:
        await pool.submit(fail, retry=retry)
        ages = []
        await trio.sleep(0.5)
        for _ in range(3):
            ages.append(pool.workers()[0].job_age)
            await trio.sleep(0.75)
        assert ages == [0.5, None, 0.5]


async def test_job_age_in_a_map_is_that_of_the_item(
    autojump_clock: MockClock,
) -> None:
    ages: list[float | None] = []

    async def look(item: int) -> None:
        await trio.sleep(0.5)
        ages.append(pool.workers()[0].job_age)

    async with open_pool(1, look) as pool:
        await pool.map(range(3))
    assert ages == [0.5, 0.5, 0.5]


async def test_the_snapshot_of_a_worker_at_work() -> None:
    release = trio.Event()
    async with open_pool(1, obey) as pool:
        for number in range(3):
            await pool.process(number)
        reply = await pool.submit(release.wait, id="mine")
        await wait_all_tasks_blocked()
        (worker,) = pool.workers()
        assert (worker.id, worker.state, worker.job_id) == (0, WorkerState.BUSY, "mine")
        assert (worker.jobs, worker.restarts, worker.last_error) == (4, 0, None)
        assert worker.job_age is not None
        assert worker.job_age >= 0
        release.set()
        await reply.wait()
        await wait_all_tasks_blocked()
        (worker,) = pool.workers()
        assert (worker.state, worker.job_id) == (WorkerState.IDLE, None)


async def test_a_handler_sees_itself_in_the_books() -> None:
    async def look() -> None:
        count = pool.statistics()
        assert (count.running, count.busy) == (1, 1)
        (worker,) = pool.workers()
        assert worker.job_id == current_job().id
        check_books(count)

    async with open_pool(1, obey) as pool:
        await pool.process(look)
        await pool.map([look, look])


# From other threads. They take longer than other tests: the pool has to be at
# work while a thread reads, so both get a hundred turns or more.


@pytest.mark.parametrize("way", ["process", "submit", "map", "terms"])
async def test_a_thread_may_read_while_the_pool_works(way: str) -> None:
    done = False
    read = 0

    def look() -> None:
        nonlocal read
        last = -1
        while not done and read < 20_000:
            count = pool.statistics()
            ends = ended(count)
            # Numbers that only grow do so for a reader in a thread as well.
            assert ends >= last
            last = ends
            for latency in (count.wait, count.run):
                assert latency.count >= 0
                assert 0 <= latency.p50 <= latency.p95 <= latency.p99 <= latency.max
            assert count.oldest_wait >= 0
            assert math.isfinite(count.throughput)
            for worker in pool.workers():
                assert worker.job_age is None or worker.job_age >= 0
            read += 1

    async def work() -> None:
        nonlocal done
        for _ in range(12):
            if way == "map":
                await pool.map(range(20))
            elif way == "submit":
                for reply in await pool.submit_batch(range(20)):
                    await reply.wait()
            elif way == "terms":
                retry = Retry(2, Backoff(0.0))
                jobs = [Broken() if number % 4 == 0 else number for number in range(8)]
                await pool.settle(jobs, retry=retry)
                await pool.process(1, key="k", priority=2)
            else:
                for number in range(20):
                    await pool.process(number)
            # Let the thread have the interpreter.
            await trio.to_thread.run_sync(int)
        done = True

    async with open_pool(3, obey, max_jobs=50 if way == "terms" else math.inf) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, look)
            nursery.start_soon(work)
        check_books(pool.statistics())
    assert read > 0


async def test_a_thread_may_read_of_a_pool_whose_queue_changes_all_the_time() -> None:
    # As above, for `oldest_wait`, which looks into the queue itself.
    done = False
    read = 0

    def look() -> None:
        nonlocal read
        while not done and read < 20_000:
            assert pool.statistics().oldest_wait >= 0
            read += 1

    async with open_pool(1, obey, unobserved="ignore") as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, look)
            for _ in range(8):
                replies = []
                for number in range(15):
                    replies.append(
                        await pool.submit(number, priority=number % 3, ttl=9.0)
                    )
                    replies.append(await pool.submit(number, delay=0.0001))
                for reply in replies[::3]:
                    reply.cancel()
                await pool.join()
                await trio.to_thread.run_sync(int)
            done = True
    assert read > 0


@pytest.mark.parametrize("size", [500, 50])
async def test_what_was_measured_of_many_jobs_is_not_kept_job_by_job(
    size, autojump_clock
):
    """Also where only runs are measured. (It takes more than are kept in any case.)"""
    sizes = []
    async with open_pool(size, trio.sleep) as pool:
        for _ in range(11):
            for _ in range(500):
                pool.submit_nowait(1)
            await pool.join()
            tracemalloc.start()
            pool.statistics()
            sizes.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert pool.statistics().run.count == 5_500
    assert max(sizes) < 2 * max(sizes[:4]), sizes


async def test_the_items_of_the_last_map_are_not_counted_again() -> None:
    seen: list[int] = []

    async def look() -> None:
        (worker,) = pool.workers()
        seen.append(worker.jobs)

    async with open_pool(1, obey) as pool:
        await pool.map(range(3))
        # With a timeout each is given to the worker like any other job.
        await pool.map([look] * 4, timeout=math.inf)
        await pool.map([look] * 4, timeout=5)
    assert seen == list(range(4, 12))


async def test_the_run_times_of_workers_that_are_gone_still_count() -> None:
    """By the real clock, as what takes next to no time is measured together."""
    async with open_pool(1, obey) as pool:
        for number in range(100):
            await pool.process(number)
        before = pool.statistics().run
        await pool.resize(0)
        after = pool.statistics().run
    assert (after.count, after.mean) == (before.count, pytest.approx(before.mean))


async def test_what_was_measured_under_a_backlog_is_not_kept_job_by_job() -> None:
    """Also where no worker ever rests. It takes some tenths of a second."""
    sizes: list[int] = []

    async def handler(number: int) -> None:
        await trio.lowlevel.checkpoint()
        if number % 4_000 == 3_999:
            tracemalloc.start()
            pool.statistics()
            sizes.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    async with open_pool(1, handler, max_backlog=math.inf) as pool:
        for number in range(8_000):
            pool.submit_nowait(number)
        await pool.join()
    assert len(sizes) == 2
    assert max(sizes) < 100_000, sizes


class Ticking(trio.abc.Clock):
    """A clock that goes on by a second whenever it is looked at."""

    now = 0.0

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        self.now += 1
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return max(0.0, deadline - self.now)


def test_what_was_measured_one_by_one_is_not_kept_job_by_job() -> None:
    """Also where each finds an idle worker. It takes about a tenth of a second."""
    sizes: list[int] = []

    async def handler(number: int) -> None:
        if number % 3_000 == 2_999:
            tracemalloc.start()
            pool.statistics()
            sizes.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    async def main() -> None:
        nonlocal pool
        async with open_pool(1, handler) as pool:
            for number in range(6_000):
                await pool.process(number)

    pool: Any = None
    trio.run(main, clock=Ticking())
    assert len(sizes) == 2
    assert max(sizes) < 75_000, sizes


async def test_jobs_that_take_next_to_no_time_take_some() -> None:
    async with open_pool(1, obey) as pool:
        for number in range(20):
            await pool.process(number)
        run = pool.statistics().run
        assert run.count == 20
        assert run.mean > 0.0
