"""The handle: opening, resizing, pausing, joining, closing, and bad input."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
)
from typing import Any

import attrs
import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from trio_pool import (
    Backoff,
    Drain,
    JobCancelled,
    JobExpired,
    JobState,
    Pool,
    PoolClosed,
    PoolConfig,
    PoolStatistics,
    Retry,
    ShutdownReport,
    TaskPool,
    WorkerCrashed,
    WorkerSnapshot,
    WorkerState,
    WouldDeadlock,
    WrongThread,
    open_pool,
)
from trio_pool.testing import explore_orders


async def double(number: int) -> int:
    return 2 * number


async def obey(job: Any) -> Any:
    """Return the job, raise it if it is an error, or do what it says."""
    if isinstance(job, BaseException):
        raise job
    return await job() if callable(job) else job


def counts(count: PoolStatistics) -> dict[str, int]:
    """Return the counts of jobs that are not 0."""
    jobs = {state.value: getattr(count, state.value) for state in JobState}
    assert sum(jobs.values()) == count.accepted
    found = {"accepted": count.accepted, **jobs, "retries": count.retries}
    return {name: number for name, number in found.items() if number}


# The three forms.


async def test_a_pool_of_a_handler() -> None:
    async with open_pool(2, double) as pool:
        assert isinstance(pool, Pool)
        assert await pool.process(4) == 8


async def test_a_pool_of_workers_each_set_up_once() -> None:
    log: list[str] = []

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[int], Awaitable[int]], None]:
        log.append("setup")
        yield double
        log.append("cleanup")

    async with open_pool(2, worker=worker) as pool:
        assert isinstance(pool, Pool)
        assert log == ["setup"] * 2
        assert await pool.map([1, 2, 3]) == [2, 4, 6]
    assert log == ["setup"] * 2 + ["cleanup"] * 2


class Doubler:
    """A worker as a class."""

    async def __aenter__(self) -> Callable[[int], Awaitable[int]]:
        return self.handle

    async def __aexit__(self, *exc_info: object) -> None:
        return None

    async def handle(self, number: int) -> int:
        return 2 * number


async def test_a_pool_of_a_class_and_of_a_partial() -> None:
    async with open_pool(1, worker=Doubler) as pool:
        assert await pool.process(4) == 8
    async with open_pool(1, worker=functools.partial(Doubler)) as pool:
        assert await pool.process(4) == 8


async def test_a_task_pool_takes_functions_with_their_arguments() -> None:
    async def add(one: int, other: int) -> int:
        return one + other

    async with open_pool(2) as pool:
        assert isinstance(pool, TaskPool)
        assert await pool.process(add, 1, 2) == 3
        reply = await pool.submit(double, 4)
        assert await reply.wait() == 8
        assert await pool.submit_nowait(add, 2, 3).wait() == 5
        assert await pool.map(double, [1, 2]) == [2, 4]
        settled = await pool.settle(double, [3])
        assert settled[0].item == 3
        assert settled[0].outcome.unwrap() == 6
        async with pool.stream(double, [4, 5]) as results:
            assert [result async for result in results] == [8, 10]


async def test_a_config_stands_for_the_size_and_options_override_it() -> None:
    config = PoolConfig(size=3, name="press", max_backlog=7)
    async with open_pool(config, double) as pool:
        assert (pool.size, pool.name) == (3, "press")
    async with open_pool(config, double, name="other") as pool:
        assert (pool.size, pool.name) == (3, "other")
    assert config.name == "press"


class Callee:
    """A handler as an object."""

    async def __call__(self, number: int) -> int:
        return 2 * number


@pytest.mark.parametrize(
    "handler", [Doubler().handle, Callee(), functools.partial(double)]
)
async def test_handlers_of_all_kinds_are_taken(
    handler: Callable[[int], Awaitable[int]],
) -> None:
    async with open_pool(1, handler) as pool:
        assert await pool.process(4) == 8


async def test_open_pools_have_names_of_their_own() -> None:
    async with open_pool(1, double) as one, open_pool(1, double) as other:
        assert one.name != other.name


async def test_the_block_is_entered_when_every_worker_can_take_a_job() -> None:
    # Several times, as tasks that are ready run in any order.
    for _ in range(20):
        async with open_pool(3, double, max_backlog=0) as pool:
            replies = [pool.submit_nowait(number) for number in range(3)]
            assert [await reply.wait() for reply in replies] == [0, 2, 4]


async def test_repr_shows_live_counts() -> None:
    async with open_pool(1, obey, name="press") as pool:
        await pool.submit(trio.sleep_forever)
        await pool.submit(1)
        assert repr(pool) == (
            "<trio_pool.Pool 'press': open, 1 of 1 workers busy, 1 jobs queued>"
        )
        pool.cancel()
    assert repr(pool).startswith("<trio_pool.Pool 'press': closed, ")


# Resizing.


async def test_resize_up_returns_when_the_workers_are_set_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[int], Awaitable[int]], None]:
        await trio.sleep(1.5)
        yield double

    async with open_pool(1, worker=worker) as pool:
        await pool.resize(3)
        assert trio.current_time() == 3.0
        assert pool.size == pool.statistics().size == pool.statistics().workers == 3


async def test_resize_down_lets_idle_workers_go_first() -> None:
    async with open_pool(3, obey) as pool:
        go = trio.Event()
        reply = await pool.submit(go.wait)
        await wait_all_tasks_blocked()
        await pool.resize(1)
        (worker,) = pool.workers()
        assert worker.state is WorkerState.BUSY
        assert worker.id == reply.worker
        go.set()
        await reply.wait()


async def test_resize_down_lets_a_worker_go_that_is_set_up_before_an_idle_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    setups, go, crashing = 0, trio.Event(), -1

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Any, None]:
        nonlocal setups
        setups += 1
        await trio.sleep(0 if setups <= 2 else 60)
        yield leave

    async def leave(number: int) -> None:
        await go.wait()
        if number == crashing:
            raise SystemExit

    async with open_pool(2, worker=worker, unobserved="ignore") as pool:
        replies = await pool.submit_batch(range(2))
        await wait_all_tasks_blocked()
        crashing = [reply.worker for reply in replies].index(0)
        go.set()
        await wait_all_tasks_blocked()
        states = [worker.state for worker in pool.workers()]
        assert states == [WorkerState.STARTING, WorkerState.IDLE]
        await pool.resize(1)
        assert [worker.id for worker in pool.workers()] == [1]


async def test_resize_down_keeps_the_oldest_slots() -> None:
    async with open_pool(4, obey) as pool:
        await wait_all_tasks_blocked()
        await pool.resize(2)
        assert [worker.id for worker in pool.workers()] == [0, 1]


async def test_resize_down_waits_for_one_item_of_a_map_and_not_for_all(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, trio.sleep) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.map, [1.0] * 8)
        await trio.sleep(2.5)
        await pool.resize(0)
        assert trio.current_time() == 3
        await pool.resize(1)


async def test_resize_down_never_interrupts_a_job(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def work() -> str:
        await trio.sleep(1.5)
        return "finished"

    async with open_pool(2, obey) as pool:
        replies = [await pool.submit(work) for _ in range(2)]
        await wait_all_tasks_blocked()
        await pool.resize(0)
        assert trio.current_time() == 1.5
        assert [await reply.wait() for reply in replies] == ["finished"] * 2
        assert pool.workers() == ()


async def test_a_job_sent_as_its_worker_is_let_go_is_done(
    autojump_clock: trio.testing.MockClock,
) -> None:
    # Which of the two is first is not ours to say.
    for _ in range(20):
        async with open_pool(2, double) as pool:
            replies = [pool.submit_nowait(number) for number in range(2)]
            await pool.resize(0)
            assert [reply.state for reply in replies] == [JobState.DONE] * 2


async def test_workers_that_were_to_leave_and_stay_are_as_many_as_are_wanted() -> None:
    async with open_pool(6, obey) as pool:
        go = trio.Event()
        replies = [pool.submit_nowait(go.wait) for _ in range(6)]
        await wait_all_tasks_blocked()
        before = {worker.id for worker in pool.workers()}
        async with trio.open_nursery() as nursery:
            for size in (1, 4, 2, 3):
                nursery.start_soon(pool.resize, size)
                await wait_all_tasks_blocked()
            go.set()
        for reply in replies:
            await reply.wait()
        await wait_all_tasks_blocked()
        assert pool.statistics().workers == len(pool.workers()) == 3
        assert {worker.id for worker in pool.workers()} < before
        await pool.resize(5)
        assert pool.statistics().workers == len(pool.workers()) == 5


async def test_a_pool_of_size_0_lets_jobs_wait_until_it_grows() -> None:
    async with open_pool(0, double) as pool:
        reply = await pool.submit(4)
        await wait_all_tasks_blocked()
        assert reply.state is JobState.QUEUED
        await pool.resize(1)
        assert await reply.wait() == 8
        await pool.resize(0)
        assert (pool.size, pool.workers()) == (0, ())
        await pool.resize(2)
        assert await pool.process(5) == 10


async def test_a_busy_worker_that_has_to_go_takes_no_more_jobs() -> None:
    async with open_pool(1, obey) as pool:
        go = trio.Event()
        running = await pool.submit(go.wait)
        waiting = await pool.submit(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.resize, 0)
            await wait_all_tasks_blocked()
            go.set()
        await running.wait()
        assert waiting.state is JobState.QUEUED
        await pool.resize(1)
        assert await waiting.wait() == 1


async def test_a_job_may_resize_its_pool_but_to_fewer_workers() -> None:
    async def resize(size: int) -> int:
        await pool.resize(size)
        return pool.size

    async with open_pool(2, resize) as pool:
        for size in (2, 3):
            assert await pool.process(size) == size
        with pytest.raises(WouldDeadlock):
            await pool.process(2)
        assert pool.size == 3


async def test_a_cancelled_resize_keeps_the_target() -> None:
    async with open_pool(2, obey) as pool:
        go = trio.Event()
        replies = [await pool.submit(go.wait) for _ in range(2)]
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.resize, 1)
                await wait_all_tasks_blocked()
                scope.cancel()
        assert pool.size == 1
        go.set()
        for reply in replies:
            await reply.wait()
        await wait_all_tasks_blocked()
        assert pool.statistics().workers == 1


async def test_the_last_of_several_resizes_counts() -> None:
    async with open_pool(1, double) as pool:
        async with trio.open_nursery() as nursery:
            for size in (5, 3):
                nursery.start_soon(pool.resize, size)
            await wait_all_tasks_blocked()
            await pool.resize(2)
        assert pool.size == pool.statistics().workers == 2
        assert await pool.process(1) == 2


def test_a_resize_that_is_followed_by_others_returns_once_the_last_is_reached() -> None:
    """Also where the next size is asked for in the turn in which one is reached."""

    async def body(turns: int) -> None:
        async with open_pool(1, double) as pool:

            async def resize(size: int) -> None:
                await pool.resize(size)
                returned.append(size)
                assert pool.size == pool.statistics().workers

            returned: list[int] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(resize, 3)
                nursery.start_soon(resize, 2)
                for _ in range(turns):
                    await trio.lowlevel.checkpoint()
                nursery.start_soon(resize, 3)
            assert sorted(returned) == [2, 3, 3]

    for turns in range(8):
        explore_orders(body, turns, orders=20)


async def test_a_resize_that_changes_its_mind_under_a_job_keeps_serving() -> None:
    async with open_pool(1, obey) as pool:
        go = trio.Event()
        reply = await pool.submit(go.wait)
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.resize, 0)
            await wait_all_tasks_blocked()
            nursery.start_soon(pool.resize, 1)
            await wait_all_tasks_blocked()
            go.set()
        await reply.wait()
        assert pool.statistics().workers == 1
        assert await pool.process(1) == 1


async def test_resize_is_refused_when_the_pool_closes() -> None:
    async with open_pool(1, obey) as pool:
        await pool.submit(trio.sleep_forever)
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:

            async def resize() -> None:
                with pytest.raises(PoolClosed):
                    await pool.resize(0)

            nursery.start_soon(resize)
            await wait_all_tasks_blocked()
            pool.cancel()
        with pytest.raises(PoolClosed):
            await pool.resize(1)


# Pausing.


async def test_a_paused_pool_accepts_jobs_and_starts_none() -> None:
    async with open_pool(2, obey) as pool:
        go = trio.Event()
        running = await pool.submit(go.wait)
        await wait_all_tasks_blocked()
        pool.pause()
        pool.pause()
        replies = [await pool.submit(number) for number in range(4)]
        go.set()
        await running.wait()
        await wait_all_tasks_blocked()
        assert counts(pool.statistics()) == {"accepted": 5, "done": 1, "queued": 4}
        pool.resume()
        pool.resume()
        assert [await reply.wait() for reply in replies] == [0, 1, 2, 3]


async def test_a_paused_pool_pulls_no_items_of_map() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(3):
            taken.append(number)
            yield number

    results: list[int] = []
    async with open_pool(2, double) as pool:
        pool.pause()
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                results.extend(await pool.map(items()))

            nursery.start_soon(run)
            await wait_all_tasks_blocked()
            assert taken == []
            pool.resume()
    assert results == [0, 2, 4]


async def test_a_paused_pool_can_be_resized() -> None:
    async with open_pool(2, double) as pool:
        pool.pause()
        reply = await pool.submit(4)
        await pool.resize(3)
        await pool.resize(1)
        await wait_all_tasks_blocked()
        assert reply.state is JobState.QUEUED
        pool.resume()
        assert await reply.wait() == 8


async def test_leaving_the_block_resumes_a_paused_pool() -> None:
    async with open_pool(1, double) as pool:
        pool.pause()
        reply = await pool.submit(4)
    assert await reply.wait() == 8


async def test_shutdown_resumes_a_paused_pool() -> None:
    async with open_pool(1, double) as pool:
        pool.pause()
        await pool.submit(4)
        report = await pool.shutdown()
        assert report == ShutdownReport(done=1, failed=0, cancelled=0, unfinished=0)


# Joining.


async def test_join_waits_for_every_accepted_job_and_leaves_the_pool_open(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, trio.sleep) as pool:
        for _ in range(2):
            await pool.submit(0.75)
        await pool.join()
        assert trio.current_time() == 1.5
        await pool.process(0.25)
        assert not pool.closed


async def test_join_waits_for_jobs_accepted_meanwhile(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, trio.sleep) as pool:
        await pool.submit(0.75)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.join)
            await wait_all_tasks_blocked()
            await pool.submit(0.75)
        assert trio.current_time() == 1.5


async def test_join_raises_nothing_for_jobs_that_failed() -> None:
    async with open_pool(1, obey) as pool:
        reply = await pool.submit(ValueError())
        await pool.join()
        with pytest.raises(ValueError):
            await reply.wait()


async def test_a_cancelled_join_loses_nothing() -> None:
    async with open_pool(1, obey) as pool:
        go = trio.Event()
        reply = await pool.submit(go.wait)
        with trio.CancelScope() as scope:
            scope.cancel()
            await pool.join()
        assert scope.cancelled_caught
        go.set()
        await reply.wait()


async def test_join_of_a_pool_without_jobs_is_a_checkpoint() -> None:
    async with open_pool(1, double) as pool:
        with assert_checkpoints():
            await pool.join()


# Shutting down.


async def test_shutdown_says_the_fate_of_every_job(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(3, obey, unobserved="ignore") as pool:
        assert await pool.process("before") == "before"

        async def fail_later() -> None:
            await trio.sleep(0.25)
            raise ValueError

        await pool.submit(functools.partial(trio.sleep, 0.25))
        await pool.submit(fail_later)
        for _ in range(4):
            await pool.submit(trio.sleep_forever)
        report = await pool.shutdown(grace=1.5)
        assert trio.current_time() == 1.5
        assert report == ShutdownReport(done=1, failed=1, cancelled=4, unfinished=0)
    assert pool.closed


async def test_shutdown_waits_for_all_jobs_by_default(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, trio.sleep) as pool:
        for _ in range(2):
            await pool.submit(1000.0)
        report = await pool.shutdown()
        assert report == ShutdownReport(done=2, failed=0, cancelled=0, unfinished=0)
        assert trio.current_time() == 2000


async def test_shutdown_again_tells_the_same(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, trio.sleep) as pool:
        await pool.submit(0.25)
        await pool.submit(math.inf)
        first = await pool.shutdown(grace=1.5)
        assert await pool.shutdown() == first
        assert await pool.shutdown(grace=0) == first
        assert first.done == first.cancelled == 1
    assert await pool.shutdown() == first


async def test_of_two_shutdowns_the_shorter_grace_counts(
    autojump_clock: trio.testing.MockClock,
) -> None:
    reports: list[ShutdownReport] = []

    async def shut_down(pool: Pool[float, None], grace: float) -> None:
        reports.append(await pool.shutdown(grace=grace))

    async with open_pool(1, trio.sleep) as pool:
        await pool.submit(math.inf)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shut_down, pool, 9.0)
            nursery.start_soon(shut_down, pool, 0.25)
        assert trio.current_time() == 0.25
    assert reports[0] == reports[1]
    assert reports[0].cancelled == 1


async def test_shutdown_reports_every_kind_of_end_since_then_and_none_before(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def exit_later() -> None:
        await trio.sleep(0.25)
        raise SystemExit

    async def submit_some() -> None:
        await pool.submit(trio.sleep_forever, timeout=0.25)
        await pool.submit(exit_later)
        for _ in range(2):
            await pool.submit(functools.partial(trio.sleep, 1))
        await pool.submit("dropped")
        await pool.submit("expires", ttl=0.125)
        await pool.submit(ValueError())

    options: dict[str, Any] = {"unobserved": "ignore", "overflow": "drop_oldest"}
    async with open_pool(4, obey, max_backlog=2, **options) as pool:
        await submit_some()
        await pool.join()
        await submit_some()
        assert pool.statistics().dropped == 2
        report = await pool.shutdown(grace=3)
    # The second "dropped" was dropped before the shutdown.
    assert report == ShutdownReport(done=2, failed=3, cancelled=1, unfinished=0)
    ends = {"done": 4} | dict.fromkeys(
        ("failed", "timed_out", "lost", "expired", "dropped"), 2
    )
    assert counts(pool.statistics()) == {"accepted": 14, **ends}


async def test_shutdown_reports_what_does_not_end_in_another_second(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def stubborn() -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(10)

    async with open_pool(1, obey) as pool:
        await pool.submit(stubborn)
        await pool.submit("waiting")
        report = await pool.shutdown(grace=0.5)
        assert trio.current_time() == 1.5
        assert report == ShutdownReport(done=0, failed=0, cancelled=1, unfinished=1)
    assert trio.current_time() == 10
    count = pool.statistics()
    assert (count.running, count.queued) == (0, 0)


async def test_shutdown_refuses_new_jobs_at_once() -> None:
    async with open_pool(1, obey, max_backlog=1) as pool:
        go = trio.Event()
        await pool.submit(go.wait)
        await pool.submit(1)
        async with trio.open_nursery() as nursery:

            async def wait_for_room() -> None:
                with pytest.raises(PoolClosed) as caught:
                    await pool.submit(2)
                assert caught.value.started is False

            nursery.start_soon(wait_for_room)
            await wait_all_tasks_blocked()
            nursery.start_soon(pool.shutdown)
            await wait_all_tasks_blocked()
            assert pool.closed
            for call in (pool.process, pool.submit, pool.submit_nowait):
                with pytest.raises(PoolClosed):
                    answer = call(3)
                    assert not isinstance(answer, PoolClosed)
                    await answer  # type: ignore[misc]
            go.set()
        assert pool.statistics().done == 2


async def test_shutdown_of_a_pool_of_size_0_cancels_what_waits() -> None:
    async with open_pool(0, double) as pool:
        reply = await pool.submit(1)
        report = await pool.shutdown()
        assert report == ShutdownReport(done=0, failed=0, cancelled=1, unfinished=0)
        with pytest.raises(JobCancelled) as caught:
            await reply.wait()
        assert caught.value.started is False


async def test_leaving_a_pool_of_size_0_cancels_what_waits() -> None:
    async with open_pool(0, double) as pool:
        reply = await pool.submit(1)
    assert reply.state is JobState.CANCELLED


async def test_a_cancelled_shutdown_leaves_the_jobs_going_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, trio.sleep) as pool:
        reply = await pool.submit(1.5)
        with trio.move_on_after(0.25) as scope:
            await pool.shutdown()
        assert scope.cancelled_caught
        assert pool.closed
        await reply.wait()
        assert trio.current_time() == 1.5


async def test_the_grace_of_the_pool_bounds_leaving_the_block(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, trio.sleep, grace=0.25) as pool:
        reply = await pool.submit(math.inf)
    assert trio.current_time() == 0.25
    assert reply.state is JobState.CANCELLED


async def test_leaving_the_block_waits_for_accepted_jobs(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, trio.sleep) as pool:
        replies = [await pool.submit(0.75) for _ in range(2)]
    assert trio.current_time() == 1.5
    assert [reply.state for reply in replies] == [JobState.DONE] * 2


# Cancelling.


async def test_cancel_stops_everything_and_may_be_repeated() -> None:
    async with open_pool(1, obey) as pool:
        replies = [await pool.submit(trio.sleep_forever) for _ in range(3)]
        await wait_all_tasks_blocked()
        pool.cancel()
        pool.cancel()
        assert pool.closed
        for reply in replies:
            with pytest.raises(JobCancelled):
                await reply.wait()
        with pytest.raises(PoolClosed):
            await pool.process(1)
        await pool.join()
        report = await pool.shutdown()
        assert (report.cancelled, report.unfinished) == (3, 0)
    assert counts(pool.statistics()) == {"accepted": 3, "cancelled": 3}


async def test_cancel_while_shutting_down_ends_it() -> None:
    async with open_pool(1, obey) as pool:
        await pool.submit(trio.sleep_forever)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.shutdown)
            await wait_all_tasks_blocked()
            pool.cancel()
    assert pool.statistics().cancelled == 1


# Counting.


async def test_statistics_are_exact_at_every_step() -> None:
    async with open_pool(2, obey, max_backlog=2, unobserved="ignore") as pool:
        assert counts(pool.statistics()) == {}
        go = trio.Event()
        replies = [await pool.submit(go.wait) for _ in range(2)]
        assert counts(pool.statistics()) == {"accepted": 2, "running": 2}
        assert pool.statistics().busy == 2
        replies.append(await pool.submit(ValueError()))
        replies.append(await pool.submit(SystemExit()))
        assert counts(pool.statistics()) == {"accepted": 4, "running": 2, "queued": 2}
        with pytest.raises(trio.WouldBlock):
            pool.submit_nowait(1)
        assert counts(pool.statistics()) == {"accepted": 4, "running": 2, "queued": 2}
        go.set()
        await pool.join()
        done = {"accepted": 4, "done": 2, "failed": 1, "lost": 1}
        assert counts(pool.statistics()) == done
        await wait_all_tasks_blocked()
        late = await pool.submit(trio.sleep_forever, timeout=math.inf)
        assert late.cancel()
        await pool.join()
        assert counts(pool.statistics()) == {**done, "accepted": 5, "cancelled": 1}
        assert await pool.map([1, 2, 3]) == [1, 2, 3]
        assert pool.statistics().accepted == 8
        assert pool.statistics().done == 5
        count = pool.statistics()
    assert (count.size, count.workers, count.busy, count.restarts) == (2, 2, 0, 1)
    assert counts(pool.statistics()) == counts(count)


async def test_statistics_count_the_jobs_that_wait_for_their_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    retry = Retry(attempts=2, backoff=Backoff(initial=1.5, jitter=0))
    async with open_pool(1, obey, max_backlog=2, unobserved="ignore") as pool:
        await pool.submit(1, delay=0.25)
        await pool.submit(ValueError(), retry=retry)
        await wait_all_tasks_blocked()
        waiting = {"accepted": 2, "delayed": 2, "retries": 1}
        assert counts(pool.statistics()) == waiting
        # They count as those in the queue do; only an idle worker takes more.
        pool.pause()
        with pytest.raises(trio.WouldBlock):
            pool.submit_nowait(1)
        pool.resume()
        await trio.sleep(0.25)
        await wait_all_tasks_blocked()
        after = {"accepted": 2, "delayed": 1, "done": 1, "retries": 1}
        assert counts(pool.statistics()) == after
        await pool.join()
        assert trio.current_time() == 1.5
        ended = {"accepted": 2, "done": 1, "failed": 1, "retries": 1}
        assert counts(pool.statistics()) == ended


async def test_statistics_count_a_job_that_expired(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, trio.sleep) as pool:
        await pool.submit(1.5)
        late = await pool.submit(0.25, ttl=0.5)
        in_time = await pool.submit(0.25, ttl=2.0)
        with pytest.raises(JobExpired):
            await late.wait()
        assert trio.current_time() == 0.5
        assert await in_time.wait() is None
        assert trio.current_time() == 1.75
    assert counts(pool.statistics()) == {"accepted": 3, "done": 2, "expired": 1}


async def test_statistics_tell_how_long_jobs_wait_and_run(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, trio.sleep) as pool:
        count = pool.statistics()
        assert (count.oldest_wait, count.throughput) == (0.0, 0.0)
        assert (count.wait.count, count.run.count) == (0, 0)
        await pool.process(0.5)
        await pool.submit(1.5)
        await pool.submit(0.0)
        await trio.sleep(1.0)
        count = pool.statistics()
        assert count.oldest_wait == 1.0
        assert (count.wait.count, count.wait.max) == (2, 0.0)
        assert (count.run.count, count.run.max) == (1, 0.5)
        await pool.join()
        count = pool.statistics()
        assert count.oldest_wait == 0.0
        assert (count.wait.count, count.wait.max, count.wait.mean) == (3, 1.5, 0.5)
        assert (count.run.count, count.run.max) == (3, 1.5)
        assert count.throughput == 3 / 2.0


@pytest.mark.parametrize("method", ["process", "submit", "settle"])
async def test_a_job_that_will_be_tried_again_waits_since_then_or_since_it_came(
    method: str, autojump_clock: trio.testing.MockClock
) -> None:
    retry = Retry(attempts=2, backoff=Backoff(initial=1.5, jitter=0))

    async def fail(_: object) -> None:
        await trio.sleep(0.25)
        raise ValueError

    async def call() -> None:
        work = [1] if method == "settle" else 1
        try:
            await getattr(pool, method)(work, retry=retry)
        except ValueError:
            pass

    # The time at which the clock began is no time that a job has waited.
    await trio.sleep(100)
    async with open_pool(1, fail, unobserved="ignore") as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await trio.sleep(1.0)
            count = pool.statistics()
            assert (count.delayed, count.retries) == (1, 1)
            assert 0.75 <= count.oldest_wait <= 1.0
        await pool.join()
        assert pool.statistics().oldest_wait == 0.0
        assert pool.statistics().wait.max <= 1.75


async def test_a_job_that_is_put_back_waits_from_when_it_was_given_in_or_later(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Its worker is lost after it was handed over and before it has begun."""
    scopes: list[trio.CancelScope] = []

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        if scopes:
            await trio.sleep(1.5)
        with trio.CancelScope() as scope:
            scopes.append(scope)
            yield obey

    await trio.sleep(100)
    async with open_pool(1, worker=worker) as pool:
        await wait_all_tasks_blocked()
        scopes[0].cancel()
        reply = pool.submit_nowait(1)
        await trio.sleep(0.5)
        assert reply.state is JobState.QUEUED
        assert reply.worker is None
        assert pool.statistics().oldest_wait == 0.5
        assert await reply.wait() == 1
        count = pool.statistics()
        assert (count.wait.count, count.wait.max) == (1, 1.5)


@asynccontextmanager
async def mortal_worker() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
    """Give a worker whose handler returns the scope that it lives in."""

    async def handler(job: Any) -> trio.CancelScope:
        return scope

    with trio.CancelScope() as scope:
        try:
            yield handler
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(5.0)


async def test_a_job_that_is_put_back_starts_at_once_in_another_worker(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The worker that it was handed to is no idle one while it cleans up."""
    async with open_pool(2, worker=mortal_worker) as pool:
        scope = await pool.process("first")
        await wait_all_tasks_blocked()
        # The worker that has rested last is the first to have another job.
        scope.cancel()
        reply = pool.submit_nowait("second")
        lost = reply.worker
        await trio.sleep(1.0)
        assert reply.done
        assert await reply.wait() is not scope
        states = {one.id: one.state for one in pool.workers()}
        assert states.pop(lost) is WorkerState.STOPPING
        assert list(states.values()) == [WorkerState.IDLE]


async def test_a_caller_that_waits_for_room_gets_another_worker_if_its_own_is_lost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(2, worker=mortal_worker, max_backlog=0) as pool:
        scope = await pool.process("first")
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            pool.pause()
            nursery.start_soon(pool.process, "second")
            await wait_all_tasks_blocked()
            # The one that the resume wakes for it.
            scope.cancel()
            pool.resume()
        assert trio.current_time() == 0.0


async def test_a_worker_that_is_lost_in_a_pause_gets_no_job_after_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(2, worker=mortal_worker) as pool:
        scope = await pool.process("first")
        await wait_all_tasks_blocked()
        pool.pause()
        scope.cancel()
        await wait_all_tasks_blocked()
        pool.resume()
        assert await pool.process("second") is not scope
        assert trio.current_time() == 0.0


@pytest.mark.parametrize("max_backlog", [0, 2, 9])
async def test_a_resume_starts_as_many_jobs_as_there_are_workers(
    max_backlog: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with (
        open_pool(4, trio.sleep, max_backlog=max_backlog) as pool,
        trio.open_nursery() as nursery,
    ):
        pool.pause()
        for _ in range(4):
            nursery.start_soon(pool.process, 1.0)
        await wait_all_tasks_blocked()
        pool.resume()
        await wait_all_tasks_blocked()
        assert pool.statistics().running == 4


async def test_a_job_that_has_not_begun_ends_with_the_pool_though_its_worker_is_lost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.fail_after(20):
        async with open_pool(1, worker=mortal_worker) as pool:
            scope = await pool.process("first")
            await wait_all_tasks_blocked()
            scope.cancel()
            reply = pool.submit_nowait("second")
            pool.cancel()
        with pytest.raises(JobCancelled) as caught:
            await reply.wait()
        assert not caught.value.started


async def test_a_job_of_a_lease_says_whether_it_had_started_as_its_worker_died(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Whichever of the two comes first: the job, or the end of the worker."""
    errors: list[Any] = []
    for _ in range(10):
        async with (
            open_pool(1, worker=mortal_worker) as pool,
            pool.lease() as worker,
            trio.open_nursery() as nursery,
        ):
            scope = await worker.process("first")

            @nursery.start_soon
            async def die(scope: trio.CancelScope = scope) -> None:
                scope.cancel()

            try:
                assert await worker.process("second") is scope
            except WorkerCrashed as error:
                errors.append((error.started, error.attempts, error.worker))
    assert set(errors) <= {(False, 0, None)}


@pytest.mark.parametrize("max_backlog", [0, 1, 9])
async def test_a_job_with_terms_finds_an_idle_worker_beside_one_that_is_on_its_way(
    max_backlog: int, autojump_clock: trio.testing.MockClock
) -> None:
    async with (
        open_pool(2, trio.sleep, max_backlog=max_backlog) as pool,
        trio.open_nursery() as nursery,
    ):
        pool.pause()
        nursery.start_soon(pool.process, 5.0)
        await wait_all_tasks_blocked()
        pool.resume()
        reply = await pool.submit(1.0, ttl=9.0)
        await reply.wait()
        assert trio.current_time() == 1.0


async def test_a_job_that_others_made_room_for_finds_an_idle_worker_too(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(2, trio.sleep, max_backlog=3, overflow="drop_oldest") as pool:
        dropped = pool.submit_nowait(0, delay=60)
        first = pool.submit_nowait(0, delay=60, key="key")
        second = pool.submit_nowait(5.0, key="key")
        first.cancel()
        pool.submit_nowait(0, delay=9)
        # One worker is on its way to the second of the key.
        third = pool.submit_nowait(1.0, ttl=9.0)
        assert dropped.state is JobState.DROPPED
        await third.wait()
        assert trio.current_time() == 1.0
        await second.wait()
        assert trio.current_time() == 5.0


async def test_a_caller_without_room_finds_an_idle_worker_beside_one_that_is_leased(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Whichever of the two tasks is the first to run."""

    async def lease() -> None:
        async with pool.lease():
            await trio.sleep(5.0)

    async def call() -> None:
        reply = await pool.submit(1.0, ttl=9.0)
        await reply.wait()
        assert trio.current_time() == began + 1.0

    for _ in range(10):
        began = trio.current_time()
        async with (
            open_pool(2, trio.sleep, max_backlog=0) as pool,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(lease)
            nursery.start_soon(call)


async def test_a_job_with_terms_that_never_started_has_not_waited(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, obey) as pool:
        await trio.sleep(2.0)
        for options in ({}, {"ttl": 9.0}):
            reply = pool.submit_nowait(1, **options)
            assert pool.statistics().wait.count == 1
            reply.cancel()
            assert pool.statistics().wait.count == 0


@pytest.mark.parametrize("choose", [min, max])
async def test_a_resize_lets_the_idle_worker_go_and_not_the_chosen_one(
    choose: Callable[..., WorkerSnapshot], autojump_clock: trio.testing.MockClock
) -> None:
    def chosen(idle: Sequence[WorkerSnapshot]) -> WorkerSnapshot:
        return choose(idle, key=lambda worker: worker.id)

    async with open_pool(2, trio.sleep, choose=chosen) as pool:
        pool.submit_nowait(5.0)
        await wait_all_tasks_blocked()
        await pool.resize(1)
        assert trio.current_time() == 0.0


async def test_a_caller_without_room_is_served_beside_idle_workers(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(3, double, max_backlog=0) as pool:
        async with trio.open_nursery() as nursery:
            pool.pause()
            nursery.start_soon(pool.process, 1)
            await wait_all_tasks_blocked()
            pool.resume()
        assert pool.statistics().done == 1
        assert pool.statistics().restarts == 0


async def test_a_submit_that_waits_for_room_returns_as_a_job_leaves_the_backlog(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, trio.sleep, max_backlog=1) as pool:
        for _ in range(2):
            pool.submit_nowait(1.0)
        reply = await pool.submit(1.0)
        assert trio.current_time() == 1.0
        assert reply.state is JobState.QUEUED


async def test_a_submit_that_waited_for_room_returns_as_its_job_starts(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, trio.sleep, max_backlog=0) as pool:
        pool.submit_nowait(1.0)
        await pool.submit(5.0)
        assert trio.current_time() == 1.0


async def test_the_wait_for_room_is_no_wait_of_the_job(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, trio.sleep, max_backlog=0) as pool:
        pool.submit_nowait(2.0)
        await pool.process(1.0)
        assert trio.current_time() == 3.0
        count = pool.statistics()
        assert (count.wait.count, count.wait.max) == (2, 0.0)


async def test_the_throughput_stands_still_after_the_block(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, trio.sleep) as pool:
        await pool.process(0.5)
    assert pool.statistics().throughput == 2.0
    await trio.sleep(1.5)
    assert pool.statistics().throughput == 2.0


async def test_statistics_count_timeouts_and_drops(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(
        1, trio.sleep, max_backlog=1, overflow="drop_oldest", unobserved="ignore"
    ) as pool:
        for timeout in (0.25, 0.5, 0.75):
            await pool.submit(math.inf, timeout=timeout)
        await pool.join()
        assert trio.current_time() == 1.0
    assert counts(pool.statistics()) == {"accepted": 3, "timed_out": 2, "dropped": 1}


async def test_statistics_are_frozen() -> None:
    async with open_pool(1, double) as pool:
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            pool.statistics().done = 5  # type: ignore[misc]


async def test_workers_shows_each_worker(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(2, trio.sleep) as pool:
        await pool.process(0.25)
        reply = await pool.submit(math.inf)
        await trio.sleep(1.5)
        busy, idle = sorted(pool.workers(), key=lambda worker: worker.state.value)
        assert (busy.state, idle.state) == (WorkerState.BUSY, WorkerState.IDLE)
        assert (busy.job_id, busy.job_age) == (reply.id, 1.5)
        assert (idle.job_id, idle.job_age) == (None, None)
        assert {busy.id, idle.id} == {0, 1}
        assert busy.id == reply.worker
        assert busy.jobs + idle.jobs == 2
        assert (busy.restarts, busy.last_error) == (0, None)
        reply.cancel()


async def test_everything_stays_readable_after_the_block() -> None:
    async with open_pool(2, double, name="press") as pool:
        reply = await pool.submit(4)
    assert pool.closed
    assert (pool.size, pool.name) == (2, "press")
    assert counts(pool.statistics()) == {"accepted": 1, "done": 1}
    assert pool.statistics().workers == 0
    assert isinstance(pool.workers(), tuple)
    assert (await reply.wait(), reply.done, reply.state) == (8, True, JobState.DONE)


async def test_after_the_block_jobs_are_refused() -> None:
    async with open_pool(1, double, name="press") as pool:
        pass
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: pool.process(1),
        lambda: pool.submit(1),
        lambda: pool.submit_batch([1]),
        lambda: pool.map([1]),
        lambda: pool.settle([1]),
        lambda: pool.resize(2),
        # What a job waits for does not begin in a closed pool.
        lambda: pool.submit(1, delay=1.5),
        lambda: pool.process(1, key="page"),
        lambda: pool.process(1, retry=Retry()),
    ]
    for call in calls:
        with pytest.raises(PoolClosed, match="press") as caught:
            await call()
        assert caught.value.pool == "press"
    with pytest.raises(PoolClosed):
        pool.submit_nowait(1)
    with pytest.raises(PoolClosed):
        async with pool.stream([1]):
            pytest.fail("the stream was opened")
    with pytest.raises(PoolClosed):
        async with pool.lease():
            pytest.fail("a worker was lent")
    async with pool.events() as events:
        assert [event async for event in events] == []
    with pytest.raises(PoolClosed):
        pool.pause()
    pool.resume()
    pool.cancel()
    await pool.join()
    assert (await pool.shutdown()).unfinished == 0
    assert counts(pool.statistics()) == {}


# Other threads.


@contextmanager
def refused() -> Iterator[None]:
    with pytest.raises(WrongThread, match=r"'press'.*trio\.from_thread") as caught:
        yield
    assert caught.value.pool == "press"


def in_a_thread(fn: Callable[[], None]) -> None:
    """Call outside trio, in a thread that knows nothing of it."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            fn()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


async def enter(manager: AbstractAsyncContextManager[object]) -> None:
    async with manager:
        pytest.fail("the block was entered")


async def test_another_thread_is_refused_and_told_how() -> None:
    async with (
        open_pool(2, double, name="press") as pool,
        pool.lease() as worker,
    ):
        pending = await pool.submit(1)
        plain: list[Callable[[], object]] = [
            lambda: pool.submit_nowait(1),
            pool.pause,
            pool.resume,
            pool.cancel,
            pending.cancel,
            # Without any loop at all.
            lambda: pool.process(1).send(None),
        ]
        for call in plain:
            with refused():
                in_a_thread(call)  # type: ignore[arg-type]
        awaiting: list[Callable[[], Awaitable[object]]] = [
            lambda: pool.process(1),
            lambda: pool.submit(1),
            lambda: pool.submit(1, delay=1.5),
            lambda: pool.submit_batch([1]),
            lambda: pool.map([1]),
            lambda: pool.settle([1]),
            lambda: pool.resize(2),
            lambda: enter(pool.stream([1])),
            lambda: enter(pool.lease()),
            lambda: worker.process(1),
            lambda: enter(pool.events()),
            pool.join,
            pool.shutdown,
        ]
        for awaited in awaiting:
            with refused():
                await trio.to_thread.run_sync(trio.run, awaited)
        assert await pending.wait() == 2
        assert not pool.closed
        assert counts(pool.statistics()) == {"accepted": 1, "done": 1}


async def test_statistics_may_be_read_in_any_thread(
    mock_clock: trio.testing.MockClock,
) -> None:
    """The clock is stopped, as how long a job waits depends on the time."""
    async with open_pool(1, obey) as pool:
        await pool.process(1)
        await pool.submit(trio.sleep_forever)
        waiting = await pool.submit(2)
        mock_clock.jump(0.5)
        count = await trio.to_thread.run_sync(pool.statistics)
        assert count == pool.statistics()
        assert (count.oldest_wait, count.throughput) == (0.5, 2.0)
        assert await trio.to_thread.run_sync(pool.workers) == pool.workers()
        assert waiting.cancel()
        pool.cancel()


async def test_a_thread_reaches_the_pool_by_from_thread() -> None:
    async with open_pool(1, double) as pool:

        def in_thread() -> int:
            trio.from_thread.run_sync(pool.submit_nowait, 3)
            return trio.from_thread.run(pool.process, 4)

        assert await trio.to_thread.run_sync(in_thread) == 8


def test_outside_its_run_a_pool_refuses_calls() -> None:
    async def main() -> Pool[int, int]:
        async with open_pool(1, double, name="press") as pool:
            return pool

    pool = trio.run(main)
    assert pool.statistics().done == 0
    with pytest.raises((WrongThread, PoolClosed)):
        pool.submit_nowait(1)


# Bad input: the option, the value and what was expected; and nothing ran.


def refuse_all() -> Any:
    pytest.fail("something ran")


@asynccontextmanager
async def unwanted() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
    pytest.fail("a worker was set up")
    yield double


def test_open_pool_without_size_is_refused() -> None:
    with pytest.raises(TypeError):
        open_pool()  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("option", "value", "kind", "expected"),
    [
        ("size", -1, ValueError, "0 or more"),
        ("size", 2.0, TypeError, "int"),
        ("size", "2", TypeError, "int"),
        ("size", True, TypeError, "int"),
        ("size", None, TypeError, "int"),
        ("size", math.inf, TypeError, "int"),
        ("max_backlog", -1, ValueError, "0 or more"),
        ("max_backlog", 1.5, TypeError, "int"),
        ("max_backlog", math.nan, TypeError, "int"),
        ("max_backlog", "many", TypeError, "int"),
        ("max_backlog", False, TypeError, "int"),
        ("overflow", "drop", ValueError, "'drop_oldest'"),
        ("overflow", None, ValueError, "'wait'"),
        ("timeout", 0, ValueError, "seconds > 0"),
        ("timeout", -0.25, ValueError, "seconds > 0"),
        ("timeout", math.nan, ValueError, "seconds > 0"),
        ("timeout", "1", TypeError, "seconds > 0"),
        ("timeout", True, TypeError, "seconds > 0"),
        ("timeout", None, TypeError, "seconds > 0"),
        ("grace", -1, ValueError, "seconds >= 0"),
        ("grace", math.nan, ValueError, "seconds >= 0"),
        ("grace", "1", TypeError, "seconds >= 0"),
        ("restart", 5, TypeError, "Restart"),
        ("crash_on", (BaseException,), TypeError, "Exception"),
        ("crash_on", (KeyboardInterrupt,), TypeError, "Exception"),
        ("crash_on", "OSError", TypeError, "Exception"),
        ("crash_on", (ValueError(),), TypeError, "Exception"),
        ("hooks", 5, TypeError, "Hooks"),
        ("hooks", (double,), TypeError, "Hooks"),
        ("unobserved", "warn", ValueError, "'ignore'"),
        ("name", 5, TypeError, "str"),
        ("name", "", ValueError, "empty"),
    ],
)
def test_a_bad_option_is_named_with_its_value_and_what_was_expected(
    option: str, value: Any, kind: type[Exception], expected: str
) -> None:
    options = {} if option == "size" else {option: value}
    size = value if option == "size" else 1
    with pytest.raises(kind) as caught:
        open_pool(size, worker=unwanted, **options)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert text.startswith(option)
    assert repr(value) in text
    assert expected in text


def test_an_unknown_option_is_named_with_those_there_are() -> None:
    with pytest.raises(TypeError, match=r"'timeot'.*timeout"):
        open_pool(1, double, timeot=5)  # type: ignore[call-overload]


def sync_handler(_: object) -> object:
    return refuse_all()


class SyncCallee:
    def __call__(self, _: object) -> object:
        return refuse_all()


@pytest.mark.parametrize(
    "handler", [sync_handler, SyncCallee(), functools.partial(sync_handler), print]
)
def test_a_sync_handler_is_refused_and_the_fix_is_shown(handler: Any) -> None:
    with pytest.raises(TypeError, match=r"trio\.to_thread\.run_sync") as caught:
        open_pool(1, handler)
    assert str(caught.value).startswith("handler must be an async function")
    assert repr(handler) in str(caught.value)


@pytest.mark.parametrize("handler", [5, "double", ()])
def test_a_handler_that_cannot_be_called_is_refused(handler: Any) -> None:
    with pytest.raises(TypeError, match="handler must be an async function") as caught:
        open_pool(1, handler)
    assert repr(handler) in str(caught.value)


def test_a_handler_that_is_a_class_is_told_where_it_belongs() -> None:
    with pytest.raises(TypeError, match="worker=") as caught:
        open_pool(1, Doubler)  # type: ignore[call-overload]
    assert "Doubler" in str(caught.value)


async def test_a_handler_that_was_called_already_is_refused() -> None:
    call = double(5)
    with pytest.raises(TypeError, match="handler must be an async function"):
        open_pool(1, call)  # type: ignore[call-overload]
    call.close()


def test_handler_and_worker_together_are_refused() -> None:
    with pytest.raises(TypeError, match=r"handler.*worker"):
        open_pool(1, double, worker=unwanted)  # type: ignore[call-overload]


async def async_function() -> Any:
    return refuse_all()


async def async_generator() -> AsyncGenerator[Any, None]:
    yield refuse_all()


def generator() -> Iterator[Any]:
    yield refuse_all()


@asynccontextmanager
async def wants_an_argument(_: object) -> AsyncGenerator[Any, None]:
    yield refuse_all()


@pytest.mark.parametrize(
    "worker",
    [
        5,
        "worker",
        async_function,
        async_generator,
        generator,
        object,
        wants_an_argument,
    ],
)
def test_a_worker_that_makes_no_context_manager_is_refused(worker: Any) -> None:
    with pytest.raises(
        TypeError, match=r"worker must be .*async context man"
    ) as caught:
        open_pool(1, worker=worker)
    assert repr(worker) in str(caught.value)


def test_a_worker_that_was_called_already_is_refused_and_the_fix_is_shown() -> None:
    with pytest.raises(TypeError, match=r"worker must be .*without calling it"):
        open_pool(1, worker=Doubler())  # type: ignore[call-overload]


async def test_a_worker_that_returns_no_context_manager_is_refused_at_open() -> None:
    with pytest.raises(TypeError, match=r"worker must be .*it returned 5"):
        async with open_pool(1, worker=lambda: 5):  # type: ignore[call-overload]
            pytest.fail("the block was entered")


async def test_a_worker_without_a_signature_to_look_at_is_called_to_find_out() -> None:
    with pytest.raises(TypeError, match="max expected at least 1 argument"):
        async with open_pool(1, worker=max):  # type: ignore[call-overload]
            pytest.fail("the block was entered")


async def test_a_worker_that_gives_a_sync_handler_is_refused_at_open() -> None:
    @asynccontextmanager
    async def worker() -> AsyncGenerator[Any, None]:
        with pytest.raises(TypeError) as told:
            yield sync_handler
        raise told.value

    with pytest.raises(TypeError, match=r"worker.*sync_handler.*to_thread"):
        async with open_pool(1, worker=worker):
            pytest.fail("the block was entered")


@pytest.mark.parametrize("swallows", [False, True])
async def test_a_worker_that_gives_a_sync_handler_is_cleaned_up(swallows: bool) -> None:
    """And the handler refused, whatever the cleanup says to that."""
    heard: list[Any] = []

    class Member:
        async def __aenter__(self) -> Any:
            return sync_handler

        async def __aexit__(self, kind: Any, error: Any, traceback: Any) -> bool:
            heard.append(error)
            return swallows

    with pytest.raises(TypeError, match=r"worker.*sync_handler") as caught:
        async with open_pool(1, worker=Member):
            pytest.fail("the block was entered")
    assert heard == [caught.value]


@pytest.mark.parametrize("half", ["__aenter__", "__aexit__"])
async def test_half_a_context_manager_is_refused(half: str) -> None:
    async def method(*_: object) -> None:
        pytest.fail("it was entered or left")

    manager = type("Half", (), {half: method})()
    with pytest.raises(TypeError, match=r"worker must be .*it returned"):
        async with open_pool(1, worker=lambda: manager):
            pytest.fail("the block was entered")


async def test_bad_options_of_a_job_are_refused_and_nothing_ran() -> None:
    async with open_pool(1, double) as pool:
        bad: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({"timeout": 0}, ValueError, r"timeout .*> 0, got 0"),
            ({"timeout": -1.5}, ValueError, r"timeout .*> 0, got -1.5"),
            ({"timeout": math.nan}, ValueError, r"timeout .*> 0, got nan"),
            ({"timeout": "1"}, TypeError, r"timeout .*> 0, got '1'"),
            ({"priority": 1.5}, TypeError, r"priority .*int.*got 1.5"),
            ({"priority": "1"}, TypeError, r"priority .*int.*got '1'"),
            ({"priority": True}, TypeError, r"priority .*int.*got True"),
            ({"retry": 3}, TypeError, r"retry .*Retry, got 3"),
            ({"retry": Retry}, TypeError, r"retry .*Retry, got <class"),
            ({"retry": False}, TypeError, r"retry .*Retry, got False"),
        ]
        for options, kind, text in bad:
            for call in (pool.process, pool.submit):
                with pytest.raises(kind, match=text):
                    await call(1, **options)
            with pytest.raises(kind, match=text):
                pool.submit_nowait(1, **options)
            for batch in (pool.map, pool.settle, pool.submit_batch):
                with pytest.raises(kind, match=text):
                    await batch([1], **options)
            with pytest.raises(kind, match=text):
                pool.stream([1], **options)
        for call in (pool.process, pool.submit):
            with pytest.raises(TypeError, match="key must be a hashable"):
                await call(1, key=[])
        detached: list[tuple[dict[str, Any], type[Exception], str]] = [
            ({"delay": -1.5}, ValueError, r"delay .*>= 0, got -1.5"),
            ({"delay": math.inf}, ValueError, r"delay .*>= 0.*got inf"),
            ({"delay": math.nan}, ValueError, r"delay .*>= 0.*got nan"),
            ({"delay": "1"}, TypeError, r"delay .*>= 0.*got '1'"),
            ({"delay": False}, TypeError, r"delay .*>= 0.*got False"),
            ({"delay": None}, TypeError, r"delay .*>= 0.*got None"),
            ({"ttl": 0}, ValueError, r"ttl .*> 0, got 0"),
            ({"ttl": -1.5}, ValueError, r"ttl .*> 0, got -1.5"),
            ({"ttl": "1"}, TypeError, r"ttl .*> 0, got '1'"),
            ({"ttl": None}, TypeError, r"ttl .*> 0, got None"),
            ({"drain": []}, TypeError, r"drain .*Drain, got \[\]"),
            ({"drain": Drain}, TypeError, r"drain .*Drain, got <class"),
            ({"id": ""}, ValueError, r"id .*not empty.*got ''"),
            ({"id": 1.5}, TypeError, r"id .*got 1.5"),
            ({"id": True}, TypeError, r"id .*got True"),
        ]
        for options, kind, text in detached:
            with pytest.raises(kind, match=text):
                await pool.submit(1, **options)
            with pytest.raises(kind, match=text):
                pool.submit_nowait(1, **options)
        with pytest.raises(TypeError, match=r"drain .*Drain, got 5"):
            await pool.submit_batch([1], drain=5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"priority .*int.*got 1.5"):
            async with pool.lease(priority=1.5):  # type: ignore[arg-type]
                pytest.fail("a worker was lent")
        for buffer, kind in ((0, ValueError), (-1, ValueError), (1.5, TypeError)):
            with pytest.raises(kind, match=f"buffer .*got {buffer}"):
                async with pool.events(buffer=buffer):  # type: ignore[arg-type]
                    pytest.fail("a stream of events was opened")
        with pytest.raises(TypeError, match="prioritty"):
            await pool.process(1, prioritty=1)  # type: ignore[call-arg]
        assert counts(pool.statistics()) == {}


async def test_bad_items_are_refused_and_nothing_ran() -> None:
    async with open_pool(1, double) as pool:
        for batch in (pool.map, pool.settle, pool.submit_batch):
            with pytest.raises(TypeError, match=r"items .*iterable.*got 5"):
                await batch(5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"items .*iterable.*got 5"):
            pool.stream(5)  # type: ignore[call-overload]
        for ahead, kind in ((0, ValueError), (-1, ValueError), (1.5, TypeError)):
            with pytest.raises(kind, match=f"ahead .*got {ahead}"):
                pool.stream([1], ahead=ahead)  # type: ignore[arg-type]
        assert counts(pool.statistics()) == {}


@pytest.mark.parametrize(
    ("size", "kind"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
async def test_a_bad_size_in_resize_changes_nothing(
    size: Any, kind: type[Exception]
) -> None:
    async with open_pool(2, double) as pool:
        with pytest.raises(kind, match=f"size .*0 or more.*got {size!r}"):
            await pool.resize(size)
        assert pool.size == pool.statistics().workers == 2


@pytest.mark.parametrize(
    ("grace", "kind"), [(-1, ValueError), (math.nan, ValueError), ("1", TypeError)]
)
async def test_a_bad_grace_in_shutdown_closes_nothing(
    grace: Any, kind: type[Exception]
) -> None:
    async with open_pool(1, double) as pool:
        with pytest.raises(kind, match=f"grace .*>= 0, got {grace!r}"):
            await pool.shutdown(grace=grace)
        assert not pool.closed
        assert await pool.process(1) == 2


async def test_a_task_pool_refuses_what_is_no_async_function() -> None:
    async with open_pool(1) as pool:
        for job in (5, "double"):
            with pytest.raises(TypeError, match="async_fn must be an async function"):
                await pool.process(job)  # type: ignore[arg-type]
            for batch in (pool.map, pool.settle, pool.submit_batch):
                with pytest.raises(TypeError, match="async_fn must be an async func"):
                    await batch(job, [1])
        with pytest.raises(TypeError, match=r"tasks .*Task objects, got <function"):
            await pool.go(double)  # type: ignore[arg-type]
        # A coroutine is closed, so that nothing is left that was never awaited.
        with pytest.raises(TypeError, match="pass the function and its arguments"):
            await pool.process(double(1))  # type: ignore[arg-type]
        assert counts(pool.statistics()) == {}


async def test_jobs_that_never_sleep_let_others_take_turns() -> None:
    """It takes about 20 ms, as each job has to be longer than a time slice."""
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async def spin(_: int) -> int:
        until = time.perf_counter() + 0.002
        while time.perf_counter() < until:
            pass
        return turns

    async with open_pool(1, spin) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        replies = [pool.submit_nowait(number) for number in range(10)]
        seen = [await reply.wait() for reply in replies]
        nursery.cancel_scope.cancel()
    assert len(set(seen)) >= 5


async def test_a_pool_that_grows_again_uses_the_lowest_free_ids() -> None:
    async with open_pool(3, trio.sleep) as pool:
        await pool.resize(1)
        await pool.resize(3)
        assert [worker.id for worker in pool.workers()] == [0, 1, 2]


async def test_shrinking_twice_in_a_row_lets_no_worker_go_too_many(
    autojump_clock: trio.testing.MockClock,
) -> None:
    setups: list[float] = []

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[float], Awaitable[None]], None]:
        setups.append(trio.current_time())
        yield trio.sleep
        with trio.CancelScope(shield=True):
            await trio.sleep(1)

    async with open_pool(3, worker=worker) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.resize, 2)
        await wait_all_tasks_blocked()
        await pool.resize(1)
        assert len(pool.workers()) == 1
    assert len(setups) == 3


async def test_a_closed_drain_costs_a_job_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    drain: Drain[int] = Drain()
    drain.close()
    async with open_pool(1, double) as pool:
        reply = await pool.submit(2, drain=drain)
        assert await reply.wait() == 4
        assert await pool.process(3) == 6
    assert "a drain refused the result of job 1" in caplog.text
    assert pool.statistics().restarts == 0


async def test_a_batch_of_calls_names_items_that_are_none() -> None:
    async with open_pool(1) as pool:
        with pytest.raises(TypeError, match="items must be an iterable, got 3"):
            await pool.submit_batch(double, 3)  # type: ignore[arg-type]
        assert pool.statistics().accepted == 0
