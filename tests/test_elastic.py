"""Workers that come and go: autoscaling, recycling, ready() and leases."""

from __future__ import annotations

import gc
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from contextvars import ContextVar
from typing import Any

import pytest
import trio
from trio.testing import MockClock, assert_checkpoints, wait_all_tasks_blocked

from trio_pool import (
    Autoscale,
    Backoff,
    CircuitBreaker,
    Hooks,
    JobCancelled,
    JobChanged,
    JobState,
    JobTimeout,
    Pool,
    PoolBroken,
    PoolClosed,
    PoolResized,
    PoolStatistics,
    Restart,
    Retry,
    WorkerChanged,
    WorkerCrashed,
    WorkerState,
    WouldDeadlock,
    current_job,
    open_pool,
)
from trio_pool.testing import explore_orders


class Broken(Exception):
    """What a handler raises when its worker is of no use any more."""


async def obey(job: Any) -> Any:
    """Sleep for a number of seconds, raise an error, await a function."""
    if isinstance(job, BaseException):
        raise job
    if callable(job):
        return await job()
    if isinstance(job, float):
        await trio.sleep(job)
    return job


class Workers:
    """Makes workers and writes down the life of each.

    `script` says what each setup does, in order: None is a good one, an error
    is raised, a float is slept. What comes after the script is good.
    """

    def __init__(self, *script: Any, cleanup: Any = None) -> None:
        self.script = list(script)
        self.cleanup = cleanup
        self.setups: list[float] = []
        self.cleanups: list[float] = []
        self.jobs: list[int] = []
        """How many jobs each life has started."""

    @asynccontextmanager
    async def __call__(self) -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        life = len(self.setups)
        self.setups.append(trio.current_time())
        self.jobs.append(0)
        if self.script:
            await obey(self.script.pop(0))

        async def handler(job: Any) -> Any:
            self.jobs[life] += 1
            return life if job == "life" else await obey(job)

        try:
            yield handler
        finally:
            self.cleanups.append(trio.current_time())
            if self.cleanup is not None:
                with trio.CancelScope(shield=True):
                    await obey(self.cleanup)


class Listener(Hooks):
    """Writes down what happens to the workers and to their number."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.sizes: list[tuple[float, int, int]] = []

    def on_worker_start(self, event: WorkerChanged) -> None:
        self.seen.append(("start", event.worker))

    def on_worker_stop(self, event: WorkerChanged) -> None:
        self.seen.append(("stop", event.worker))

    def on_worker_crash(self, event: WorkerChanged) -> None:
        self.seen.append(("crash", event.worker))

    def on_worker_restart(self, event: WorkerChanged) -> None:
        self.seen.append(("restart", event.worker))

    def on_resize(self, event: PoolResized) -> None:
        self.sizes.append((event.time, event.old, event.new))

    def those(self, kind: str) -> list[int]:
        return [worker for seen, worker in self.seen if seen == kind]


class Crowd:
    """Counts how many jobs run at once."""

    def __init__(self) -> None:
        self.running = 0
        self.peak = 0

    async def __call__(self, seconds: float) -> float:
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await trio.sleep(seconds)
        finally:
            self.running -= 1
        return seconds


def balanced(count: PoolStatistics) -> bool:
    ended = count.done + count.failed + count.timed_out + count.cancelled
    ended += count.expired + count.dropped + count.lost
    return count.accepted == count.delayed + count.queued + count.running + ended


async def check_whole(pool: Pool[Any, Any], size: int) -> None:
    """Check that no worker has got lost: as many jobs as ever run at once."""
    assert balanced(pool.statistics())
    crowd = Crowd()
    async with trio.open_nursery() as nursery:
        for _ in range(2 * size):
            nursery.start_soon(pool.process, lambda: crowd(0.25))
    assert crowd.peak == size
    count = pool.statistics()
    assert (count.busy, count.running, count.queued) == (0, 0, 0)
    assert balanced(count)


# ----------------------------------------------------------------------
# Autoscaling.


@pytest.mark.parametrize("size", [0, 1, 7])
async def test_it_starts_with_min_workers_whatever_the_size(size: int) -> None:
    async with open_pool(size, obey, scale=Autoscale(min=2, max=4)) as pool:
        assert pool.size == pool.statistics().size == 2
        assert pool.statistics().workers == len(pool.workers()) == 2


async def test_it_grows_a_step_at_each_look_and_never_beyond_max(
    autojump_clock: MockClock,
) -> None:
    crowd, listener = Crowd(), Listener()
    scale = Autoscale(min=1, max=4, interval=0.25, step=2)
    async with open_pool(1, crowd, scale=scale, hooks=[listener]) as pool:
        await pool.submit_batch([2.0] * 12)
        sizes = []
        for _ in range(4):
            await trio.sleep(0.125)
            sizes.append(pool.statistics().busy)
            await trio.sleep(0.125)
        assert sizes == [1, 3, 4, 4]
    assert crowd.peak == 4
    assert listener.sizes == [(0.25, 1, 3), (0.5, 3, 4)]
    assert sorted(listener.those("start")) == [0, 1, 2, 3]


async def test_it_grows_only_when_jobs_have_waited_for_up_after(
    autojump_clock: MockClock,
) -> None:
    listener = Listener()
    scale = Autoscale(min=1, max=3, interval=0.25, up_after=0.5)
    async with open_pool(1, obey, scale=scale, hooks=[listener]) as pool:
        await pool.submit_batch([3.125] * 5)
    # Seen to wait at 0.25, for long enough at 0.75; then all over again.
    assert listener.sizes[:2] == [(0.75, 1, 2), (1.5, 2, 3)]
    assert all(new <= 3 for _, _, new in listener.sizes)


async def test_it_does_not_grow_where_every_job_finds_a_worker(
    autojump_clock: MockClock,
) -> None:
    listener = Listener()
    scale = Autoscale(min=2, max=4, interval=0.25)
    async with open_pool(2, obey, scale=scale, hooks=[listener]) as pool:
        for _ in range(4):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.process, 0.875)
                nursery.start_soon(pool.process, 0.875)
    assert listener.sizes == []


@pytest.mark.parametrize("step", [1, 2, 5])
async def test_it_settles_to_min_and_stays_there(
    autojump_clock: MockClock, step: int
) -> None:
    listener = Listener()
    scale = Autoscale(min=2, max=5, interval=0.25, step=step, down_after=1.0)
    async with open_pool(1, obey, scale=scale, hooks=[listener]) as pool:
        await pool.map([0.625] * 30)
        assert pool.size == 5
        await trio.sleep(20)
        assert pool.size == pool.statistics().workers == len(pool.workers()) == 2
        settled = len(listener.sizes)
        await trio.sleep(20)
        assert len(listener.sizes) == settled
        assert pool.statistics().restarts == 0
    assert "crash" not in dict(listener.seen)


async def test_it_shrinks_at_the_look_at_which_workers_were_idle_for_down_after(
    autojump_clock: MockClock,
) -> None:
    listener = Listener()
    scale = Autoscale(min=1, max=3, interval=0.25, down_after=1.0)
    async with open_pool(1, obey, scale=scale, hooks=[listener]) as pool:
        await pool.resize(3)
        await trio.sleep(4)
    # Seen idle first at 0.25; then each step waits as long again, from the
    # next look on.
    assert listener.sizes == [(0.0, 1, 3), (1.25, 3, 2), (2.5, 2, 1)]


async def test_it_never_lets_a_busy_worker_go(autojump_clock: MockClock) -> None:
    workers, listener = Workers(), Listener()
    scale = Autoscale(min=0, max=4, interval=0.25, step=4, down_after=0.5)
    async with open_pool(1, worker=workers, scale=scale, hooks=[listener]) as pool:
        await pool.resize(4)
        replies = [await pool.submit(10.125) for _ in range(2)]
        await wait_all_tasks_blocked()
        busy = {reply.worker for reply in replies}
        await trio.sleep(5)
        assert pool.size == 2
        assert {worker.id for worker in pool.workers()} == busy
        assert [w.state for w in pool.workers()] == [WorkerState.BUSY] * 2
        assert [await reply.wait() for reply in replies] == [10.125] * 2
        await trio.sleep(2)
        assert pool.size == 0
    assert workers.jobs.count(1) == 2


async def test_it_lets_the_longest_idle_worker_go_first(
    autojump_clock: MockClock,
) -> None:
    listener = Listener()
    scale = Autoscale(min=1, max=4, interval=0.25, down_after=2.0)
    async with open_pool(1, obey, scale=scale, hooks=[listener]) as pool:
        await pool.resize(4)
        replies = {}
        for seconds in (0.75, 0.25, 1.0, 0.5):
            replies[seconds] = await pool.submit(seconds)
        await pool.join()
        idle = [replies[seconds].worker for seconds in (0.25, 0.5, 0.75, 1.0)]
        await trio.sleep(20)
        assert listener.those("stop") == idle[:3]
        assert [worker.id for worker in pool.workers()] == idle[3:]


async def test_a_steady_load_leads_to_a_steady_size(
    autojump_clock: MockClock,
) -> None:
    listener = Listener()
    scale = Autoscale(min=1, max=4, interval=0.25, down_after=0.5)

    async def customer() -> None:
        for _ in range(20):
            await pool.process(0.625)

    async with open_pool(1, obey, scale=scale, hooks=[listener]) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(customer)
            nursery.start_soon(customer)
        assert [(old, new) for _, old, new in listener.sizes][:1] == [(1, 2)]
        assert pool.size == 2


async def test_bursts_closer_together_than_down_after_cause_no_flapping(
    autojump_clock: MockClock,
) -> None:
    listener = Listener()
    scale = Autoscale(min=1, max=2, interval=0.25, down_after=1.0)
    async with open_pool(1, obey, scale=scale, hooks=[listener]) as pool:
        await pool.resize(2)
        await trio.sleep(0.125)
        # Both are busy at one look in three, so never spare for a second.
        for _ in range(12):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.process, 0.25)
                nursery.start_soon(pool.process, 0.25)
            await trio.sleep(0.5)
        assert listener.sizes == [(0.0, 1, 2)]
        await trio.sleep(1.5)
        assert [size[1:] for size in listener.sizes] == [(1, 2), (2, 1)]


async def test_it_does_not_grow_while_jobs_wait_because_of_a_pause(
    autojump_clock: MockClock,
) -> None:
    scale = Autoscale(min=1, max=3, interval=0.25)
    async with open_pool(1, obey, scale=scale) as pool:
        pool.pause()
        replies = await pool.submit_batch([1.0] * 4)
        await trio.sleep(2)
        assert pool.size == 1
        pool.resume()
        await trio.sleep(0.625)
        assert pool.size == 3
        assert [await reply.wait() for reply in replies] == [1.0] * 4


async def test_it_shrinks_where_jobs_age_too(autojump_clock: MockClock) -> None:
    """Where workers ask for each job, one that rests is not taken for a busy one."""
    scale = Autoscale(min=1, max=3, interval=0.25, down_after=0.5)
    async with open_pool(1, obey, scale=scale, aging=1.0) as pool:
        await pool.resize(3)
        assert await pool.map([1.0, 1.0, 1.0]) == [1.0, 1.0, 1.0]
        await trio.sleep(5)
        assert pool.size == pool.statistics().workers == 1


async def test_a_resize_lets_a_worker_stay_that_was_roused_for_a_job() -> None:
    """Whoever of the two comes first: the worker, or its supervisor."""
    for _ in range(20):
        async with open_pool(2, worker=Workers()) as pool:
            life = await pool.process("life")
            pool.pause()
            reply = pool.submit_nowait("life")
            pool.resume()
            await pool.resize(1)
            assert await reply.wait() == life


async def test_it_shrinks_in_a_pause_too(autojump_clock: MockClock) -> None:
    scale = Autoscale(min=1, max=3, interval=0.25, down_after=0.5)
    async with open_pool(1, obey, scale=scale) as pool:
        await pool.resize(3)
        pool.pause()
        await trio.sleep(5)
        assert pool.size == pool.statistics().workers == 1
        pool.resume()
        assert await pool.process(1) == 1


async def test_a_pool_without_workers_grows_for_a_job_at_the_first_look(
    autojump_clock: MockClock,
) -> None:
    listener = Listener()
    scale = Autoscale(min=0, max=3, interval=0.25, up_after=9.0, down_after=1.0)
    async with open_pool(5, obey, scale=scale, hooks=[listener]) as pool:
        assert pool.size == len(pool.workers()) == 0
        await trio.sleep(0.375)
        assert await pool.process("x") == "x"
        assert trio.current_time() == 0.5
        await trio.sleep(3)
        assert pool.size == len(pool.workers()) == 0
        assert await pool.process("y") == "y"
    assert [size[1:] for size in listener.sizes] == [(0, 1), (1, 0), (0, 1)]


@pytest.mark.parametrize("way", ["map", "settle", "key", "priority", "delay", "lease"])
async def test_a_pool_without_workers_grows_for_work_of_any_kind(
    autojump_clock: MockClock, way: str
) -> None:
    async with open_pool(0, obey, scale=Autoscale(min=0, interval=0.25)) as pool:
        with trio.fail_after(5):
            if way == "map":
                assert await pool.map([1, 2, 3]) == [1, 2, 3]
            elif way == "settle":
                assert len(await pool.settle([1, 2, 3])) == 3
            elif way == "key":
                assert await pool.process(1, key="k") == 1
            elif way == "priority":
                assert await pool.process(1, priority=3) == 1
            elif way == "delay":
                assert await (await pool.submit(1, delay=1.5)).wait() == 1
            else:
                async with pool.lease() as worker:
                    assert await worker.process(1) == 1


async def test_a_pool_without_workers_or_backlog_grows_for_a_waiting_caller(
    autojump_clock: MockClock,
) -> None:
    scale = Autoscale(min=0, max=1, interval=0.25)
    async with open_pool(0, obey, max_backlog=0, scale=scale) as pool:
        with trio.fail_after(5):
            assert await pool.process("x") == "x"
            assert await pool.process("y") == "y"


async def test_a_pool_without_workers_still_does_its_jobs_after_the_body(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(0, obey, scale=Autoscale(min=0, interval=0.25)) as pool:
        replies = await pool.submit_batch([0.5] * 3)
    assert [reply.outcome.unwrap() for reply in replies] == [0.5] * 3
    assert pool.statistics().done == 3


@pytest.mark.parametrize("size", [0, 1, 5, 100])
async def test_a_resize_outside_of_the_range_is_refused(size: int) -> None:
    async with open_pool(0, obey, scale=Autoscale(min=2, max=4)) as pool:
        with pytest.raises(ValueError, match=rf"size.*2 to 4.*{size}"):
            await pool.resize(size)
        assert pool.size == 2


async def test_a_resize_inside_of_the_range_holds_until_the_load_says_otherwise(
    autojump_clock: MockClock,
) -> None:
    scale = Autoscale(min=1, max=4, interval=0.25, down_after=2.0)
    async with open_pool(0, obey, scale=scale) as pool:
        await pool.resize(4)
        assert pool.size == pool.statistics().workers == 4
        await pool.resize(2)
        assert pool.size == pool.statistics().workers == 2
        await trio.sleep(1.5)
        assert pool.size == 2
        await trio.sleep(5)
        assert pool.size == 1


async def test_a_resize_after_autoscaling_has_let_idle_workers_go_counts_for_busy_ones(
    autojump_clock: MockClock,
) -> None:
    scale = Autoscale(min=1, max=3, interval=0.25, down_after=1.0)
    async with open_pool(0, obey, scale=scale) as pool:
        await pool.resize(3)
        await trio.sleep(1.375)
        assert pool.size == pool.statistics().workers == 2
        await pool.submit_batch([2.0, 2.0])
        await wait_all_tasks_blocked()
        await pool.resize(1)
        assert pool.size == pool.statistics().workers == 1
        assert trio.current_time() == 3.375


async def test_a_paused_pool_does_not_grow_though_its_workers_are_busy(
    autojump_clock: MockClock,
) -> None:
    scale = Autoscale(min=1, max=3, interval=0.25)
    async with open_pool(0, obey, scale=scale) as pool:
        await pool.submit(5.0)
        await wait_all_tasks_blocked()
        pool.pause()
        await pool.submit(5.0)
        await trio.sleep(2)
        assert pool.size == 1
        pool.resume()
        await trio.sleep(0.5)
        assert pool.size == 2


async def test_the_block_is_left_while_a_new_worker_is_set_up(
    autojump_clock: MockClock,
) -> None:
    workers, listener = Workers(None, 60.0), Listener()
    scale = Autoscale(min=1, max=2, interval=0.25)
    async with open_pool(1, worker=workers, scale=scale, hooks=[listener]) as pool:
        replies = await pool.submit_batch([0.625, 0.625])
    # The job that the new worker was for has been done by the old one.
    assert trio.current_time() == 1.25
    assert [reply.outcome.unwrap() for reply in replies] == [0.625] * 2
    assert workers.setups == [0.0, 0.25]
    assert listener.seen == [("start", 0), ("stop", 0)]


async def test_an_error_leaves_the_block_while_a_new_worker_is_set_up(
    autojump_clock: MockClock,
) -> None:
    workers = Workers(None, 60.0)
    scale = Autoscale(min=1, max=2, interval=0.25)
    error = Broken()
    with pytest.raises(Broken) as caught:
        async with open_pool(1, worker=workers, scale=scale, unobserved="ignore") as p:
            await p.submit_batch([5.0, 5.0])
            await trio.sleep(0.375)
            raise error
    assert caught.value is error
    assert trio.current_time() == 0.375


async def test_a_failing_setup_while_growing_is_a_crash_of_that_worker_only(
    autojump_clock: MockClock,
) -> None:
    workers, listener = Workers(None, Broken()), Listener()
    scale = Autoscale(min=1, max=2, interval=0.25)
    async with open_pool(1, worker=workers, scale=scale, hooks=[listener]) as pool:
        await pool.map([1.125] * 4)
        assert pool.statistics().restarts == 1
        assert pool.size == 2
        await check_whole(pool, 2)
    assert listener.those("crash") == [1]
    assert max(w for w in listener.those("start")) == 1


async def test_a_crashed_worker_is_replaced_within_the_wanted_number(
    autojump_clock: MockClock,
) -> None:
    crowd = Crowd()
    scale = Autoscale(min=1, max=2, interval=0.25, down_after=math.inf)
    async with open_pool(1, obey, scale=scale, crash_on=Broken) as pool:
        await pool.resize(2)
        await pool.settle([Broken(), Broken(), 0.25])
        await pool.map([lambda: crowd(0.5)] * 8)
        assert crowd.peak == 2
        assert pool.statistics().workers == 2


# ----------------------------------------------------------------------
# Recycling: max_jobs.


async def test_a_worker_is_replaced_after_max_jobs_jobs() -> None:
    workers, listener = Workers(), Listener()
    async with open_pool(1, worker=workers, max_jobs=3, hooks=[listener]) as pool:
        lives = [await pool.process("life") for _ in range(8)]
        assert lives == [0, 0, 0, 1, 1, 1, 2, 2]
        count = pool.statistics()
        assert (count.done, count.lost, count.restarts) == (8, 0, 0)
        (worker,) = pool.workers()
        assert (worker.id, worker.restarts, worker.last_error) == (0, 0, None)
    assert workers.jobs == [3, 3, 2]
    assert listener.seen == [("start", 0), ("stop", 0)] * 3


async def test_the_fresh_worker_is_there_at_once_without_a_job_to_do() -> None:
    workers = Workers()
    async with open_pool(1, worker=workers, max_jobs=1) as pool:
        await pool.process(1)
        await wait_all_tasks_blocked()
        assert workers.jobs == [1, 0]
        assert pool.workers()[0].state is WorkerState.IDLE
        assert pool.statistics().workers == 1


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("max_jobs", [1, 4])
@pytest.mark.parametrize("way", ["map", "settle", "stream", "submit", "process"])
async def test_no_life_starts_more_than_max_jobs_jobs(
    way: str, max_jobs: int, size: int
) -> None:
    workers, listener = Workers(), Listener()
    items = list(range(18))
    async with open_pool(
        size, worker=workers, max_jobs=max_jobs, hooks=[listener]
    ) as pool:
        if way == "map":
            assert await pool.map(items) == items
        elif way == "settle":
            assert [s.outcome.unwrap() for s in await pool.settle(items)] == items
        elif way == "stream":
            async with pool.stream(items) as results:
                assert [result async for result in results] == items
        elif way == "submit":
            replies = await pool.submit_batch(items)
            assert [await reply.wait() for reply in replies] == items
        else:
            async with trio.open_nursery() as nursery:
                for item in items:
                    nursery.start_soon(pool.process, item)
        assert pool.statistics().done == 18
        assert pool.statistics().restarts == 0
    assert sum(workers.jobs) == 18
    assert max(workers.jobs) <= max_jobs
    if size == 1:
        assert workers.jobs[:4] == [max_jobs] * 4
    assert set(listener.seen) == {
        (kind, worker) for kind in ("start", "stop") for worker in range(size)
    }


async def test_a_job_given_in_as_the_last_of_a_life_fails_is_for_the_next_life() -> (
    None
):
    workers = Workers()

    class Again(Hooks):
        def on_job_error(self, event: JobChanged) -> None:
            replies.append(pool.submit_nowait("life"))

    replies: list[Any] = []
    options: dict[str, Any] = {"hooks": [Again()], "max_jobs": 1}
    async with open_pool(1, worker=workers, **options) as pool:
        with pytest.raises(ValueError, match="no"):
            await pool.process(ValueError("no"))
        assert await replies[0].wait() == 1
    assert workers.jobs[:2] == [1, 1]


async def test_a_worker_whose_last_job_ends_in_a_paused_pool_gets_no_other() -> None:
    workers = Workers()
    async with open_pool(1, worker=workers, max_jobs=1) as pool:
        for number in range(3):
            reply = pool.submit_nowait(number)
            await trio.lowlevel.checkpoint()
            pool.pause()
            await reply.wait()
            await wait_all_tasks_blocked()
            pool.resume()
    assert workers.jobs == [1, 1, 1, 0]


async def test_every_attempt_counts_towards_max_jobs() -> None:
    workers = Workers()
    retry = Retry(attempts=3, backoff=Backoff(0.0))
    async with open_pool(1, worker=workers, max_jobs=2, retry=retry) as pool:
        with pytest.raises(Broken):
            await pool.process(Broken())
        assert await pool.process("life") == 1
    assert workers.jobs[:2] == [2, 2]


async def test_a_failed_job_counts_and_its_error_reaches_the_caller() -> None:
    workers, error = Workers(), ValueError("bad")
    async with open_pool(1, worker=workers, max_jobs=1) as pool:
        with pytest.raises(ValueError) as caught:
            await pool.process(error)
        assert caught.value is error
        assert await pool.process("life") == 1
        assert pool.statistics().restarts == 0


async def test_a_slow_change_of_workers_loses_no_waiting_job(
    autojump_clock: MockClock,
) -> None:
    workers, listener = Workers(*[0.25] * 30, cleanup=0.5), Listener()
    async with open_pool(
        2, worker=workers, max_jobs=2, hooks=[listener], max_backlog=3
    ) as pool:
        replies = await pool.submit_batch(range(13))
        assert [await reply.wait() for reply in replies] == list(range(13))
        count = pool.statistics()
        assert (count.accepted, count.done, count.restarts) == (13, 13, 0)
    assert sum(workers.jobs) == 13
    assert max(workers.jobs) == 2
    assert not listener.those("crash")
    assert not listener.those("restart")


async def test_a_crash_in_the_last_job_of_a_life_is_a_crash() -> None:
    workers, listener = Workers(), Listener()
    async with open_pool(
        1, worker=workers, max_jobs=1, crash_on=Broken, hooks=[listener]
    ) as pool:
        with pytest.raises(Broken):
            await pool.process(Broken())
        assert await pool.process("life") == 1
        assert pool.statistics().restarts == 1
    assert listener.seen[:3] == [("start", 0), ("crash", 0), ("restart", 0)]


async def test_a_setup_that_fails_at_a_recycling_is_a_crash() -> None:
    error = Broken("no")
    workers, listener = Workers(None, error), Listener()
    async with open_pool(1, worker=workers, max_jobs=1, hooks=[listener]) as pool:
        assert await pool.process("life") == 0
        assert await pool.process("life") == 2
        assert pool.statistics().restarts == 1
        (worker,) = pool.workers()
        assert (worker.restarts, worker.last_error) == (1, error)
    assert listener.seen[:5] == [
        ("start", 0),
        ("stop", 0),
        ("crash", 0),
        ("restart", 0),
        ("start", 0),
    ]


async def test_setups_that_fail_at_recyclings_spend_the_budget() -> None:
    error = Broken("no")
    workers = Workers(None, error)
    with pytest.raises(PoolBroken) as caught:
        async with open_pool(
            1, worker=workers, max_jobs=1, restart=Restart(limit=0)
        ) as pool:
            await pool.process(1)
            with pytest.raises(PoolBroken) as job_error:
                await pool.process(1)
            assert job_error.value.started is False
            await trio.sleep_forever()
    assert caught.value.__cause__ is error


async def test_a_cleanup_that_fails_at_a_recycling_is_a_crash() -> None:
    error = Broken("stuck")
    workers, listener = Workers(cleanup=error), Listener()
    async with open_pool(1, worker=workers, max_jobs=1, hooks=[listener]) as pool:
        assert await pool.process("life") == 0
        await wait_all_tasks_blocked()
        workers.cleanup = None
        assert await pool.process("life") == 1
        assert pool.statistics().restarts == 1
        assert pool.workers()[0].last_error is error
    assert listener.seen[:3] == [("start", 0), ("crash", 0), ("restart", 0)]


async def test_recycling_goes_well_with_resizing(autojump_clock: MockClock) -> None:
    workers, listener = Workers(cleanup=0.5), Listener()
    async with open_pool(3, worker=workers, max_jobs=1, hooks=[listener]) as pool:
        await pool.map([1, 2, 3])
        # All three are on their way out.
        await pool.resize(1)
        await pool.resize(2)
        assert pool.statistics().workers == len(pool.workers()) == 2
        assert await pool.map([0.25] * 6) == [0.25] * 6
        assert pool.statistics().restarts == 0
    assert not listener.those("crash")


async def test_the_block_is_left_while_a_worker_is_being_replaced(
    autojump_clock: MockClock,
) -> None:
    workers, listener = Workers(None, 60.0), Listener()
    async with open_pool(1, worker=workers, max_jobs=1, hooks=[listener]) as pool:
        await pool.process(1)
        await wait_all_tasks_blocked()
        assert len(workers.setups) == 2
    assert trio.current_time() == 0
    assert listener.seen == [("start", 0), ("stop", 0)]


async def test_a_job_of_a_pool_with_a_worker_being_replaced_is_waited_for(
    autojump_clock: MockClock,
) -> None:
    workers = Workers(None, 1.5)
    async with open_pool(1, worker=workers, max_jobs=1) as pool:
        await pool.process(1)
        reply = await pool.submit("life")
    assert reply.outcome.unwrap() == 1
    assert trio.current_time() == 1.5


async def test_a_job_is_cancelled_while_its_worker_is_being_replaced(
    autojump_clock: MockClock,
) -> None:
    workers = Workers(None, 1.5)
    async with open_pool(1, worker=workers, max_jobs=1) as pool:
        await pool.process(1)
        with trio.move_on_after(0.5) as scope:
            await pool.process("never")
        assert scope.cancelled_caught
        assert pool.statistics().cancelled == 1
        assert await pool.process("life") == 1
        assert balanced(pool.statistics())


# max_age.


async def test_an_idle_worker_is_replaced_at_its_max_age(
    autojump_clock: MockClock,
) -> None:
    workers, listener = Workers(), Listener()
    async with open_pool(1, worker=workers, max_age=1.5, hooks=[listener]) as pool:
        await trio.sleep(3.25)
        assert workers.setups == [0.0, 1.5, 3.0]
        assert workers.cleanups == [1.5, 3.0]
        assert pool.statistics().restarts == 0
    assert listener.seen == [("start", 0), ("stop", 0)] * 3


async def test_the_age_counts_from_the_end_of_the_setup(
    autojump_clock: MockClock,
) -> None:
    workers = Workers(1.0, 1.0)
    async with open_pool(1, worker=workers, max_age=1.5):
        await trio.sleep(1.625)
        assert workers.setups == [0.0, 2.5]


async def test_a_busy_worker_is_replaced_after_the_job_in_which_it_got_old(
    autojump_clock: MockClock,
) -> None:
    workers, listener = Workers(), Listener()
    async with open_pool(1, worker=workers, max_age=1.5, hooks=[listener]) as pool:
        await trio.sleep(0.5)
        first = await pool.submit(2.0)
        second = await pool.submit("life")
        assert await first.wait() == 2.0
        assert trio.current_time() == 2.5
        assert await second.wait() == 1
        assert workers.setups == [0.0, 2.5]
        await trio.sleep(1.625)
        assert workers.setups == [0.0, 2.5, 4.0]
    assert not listener.those("crash")


async def test_old_age_under_a_stream_of_jobs_loses_nothing(
    autojump_clock: MockClock,
) -> None:
    workers, listener = Workers(), Listener()
    items = [0.25] * 40
    async with open_pool(2, worker=workers, max_age=0.625, hooks=[listener]) as pool:
        assert await pool.map(items) == items
        replies = await pool.submit_batch(items)
        assert [await reply.wait() for reply in replies] == items
        count = pool.statistics()
        assert (count.accepted, count.done, count.restarts) == (80, 80, 0)
    assert max(workers.jobs) == 3
    assert sum(workers.jobs) == 80
    assert not listener.those("crash")


@pytest.mark.parametrize("way", ["map", "settle", "stream", "submit"])
async def test_a_worker_gets_old_within_a_batch(
    autojump_clock: MockClock, way: str
) -> None:
    workers = Workers()
    items = [0.25] * 8
    async with open_pool(1, worker=workers, max_age=0.625) as pool:
        if way == "map":
            await pool.map(items)
        elif way == "settle":
            await pool.settle(items)
        elif way == "stream":
            async with pool.stream(items) as stream:
                assert [result async for result in stream] == items
        else:
            await pool.submit_batch(items)
            await pool.join()
        assert workers.setups[:3] == [0.0, 0.75, 1.5]
    assert workers.jobs[:3] == [3, 3, 2]


async def test_a_paused_worker_is_replaced_too(autojump_clock: MockClock) -> None:
    workers = Workers()
    async with open_pool(1, worker=workers, max_age=1.5) as pool:
        pool.pause()
        reply = await pool.submit("life")
        await trio.sleep(2)
        assert workers.setups == [0.0, 1.5]
        assert not reply.done
        pool.resume()
        assert await reply.wait() == 1


# max_idle.


async def test_a_worker_without_a_job_is_replaced_after_max_idle(
    autojump_clock: MockClock,
) -> None:
    workers, listener = Workers(), Listener()
    async with open_pool(1, worker=workers, max_idle=1.5, hooks=[listener]) as pool:
        await trio.sleep(3.25)
        assert workers.setups == [0.0, 1.5, 3.0]
        assert pool.statistics().restarts == 0
    assert listener.seen == [("start", 0), ("stop", 0)] * 3


async def test_max_idle_counts_from_the_end_of_the_last_job(
    autojump_clock: MockClock,
) -> None:
    workers = Workers()
    async with open_pool(1, worker=workers, max_idle=1.5) as pool:
        await trio.sleep(0.25)
        await pool.process(0.5)
        await trio.sleep(2)
        assert workers.setups == [0.0, 2.25]


async def test_a_job_without_a_pause_in_it_resets_max_idle_too(
    autojump_clock: MockClock,
) -> None:
    workers = Workers()
    async with open_pool(1, worker=workers, max_idle=1.5) as pool:
        for _ in range(4):
            await trio.sleep(1.25)
            assert await pool.process("life") == 0
        assert workers.setups == [0.0]
        await trio.sleep(1.75)
        assert workers.setups == [0.0, 6.5]


async def test_a_busy_worker_is_never_idle_for_too_long(
    autojump_clock: MockClock,
) -> None:
    workers = Workers()
    async with open_pool(1, worker=workers, max_idle=0.25) as pool:
        assert await pool.process(5.0) == 5.0
        await pool.map([1.0] * 3)
        assert workers.setups == [0.0]
        await trio.sleep(0.375)
        assert workers.setups == [0.0, 8.25]


async def test_only_the_idle_one_of_two_workers_is_replaced(
    autojump_clock: MockClock,
) -> None:
    workers, listener = Workers(), Listener()
    async with open_pool(2, worker=workers, max_idle=1.0, hooks=[listener]) as pool:
        reply = await pool.submit(1.75)
        await wait_all_tasks_blocked()
        busy = reply.worker
        await trio.sleep(1.25)
        assert listener.those("stop") == [1 - (busy or 0)]
        assert await reply.wait() == 1.75


@pytest.mark.parametrize("is_guarded", [False, True])
async def test_a_job_given_in_as_the_idle_worker_leaves_is_done(
    is_guarded: bool, autojump_clock: MockClock
) -> None:
    workers = Workers(cleanup=0.25)
    breaker = CircuitBreaker(1) if is_guarded else None
    async with open_pool(1, worker=workers, max_idle=1.0, breaker=breaker) as pool:
        for _ in range(20):
            await trio.sleep(1.0)
            assert isinstance(await pool.process("life"), int)
        assert pool.statistics().done == 20
        assert pool.statistics().restarts == 0


# ----------------------------------------------------------------------
# ready().


class Gate:
    """A handler that says when it is ready."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.calls = 0
        self.jobs = 0
        self.error: BaseException | None = None
        self.opened = trio.Event()
        self.interrupted = 0
        if is_open:
            self.opened.set()

    async def ready(self) -> None:
        self.calls += 1
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        try:
            await self.opened.wait()
        except trio.Cancelled:
            self.interrupted += 1
            raise

    async def __call__(self, job: Any) -> Any:
        self.jobs += 1
        return await obey(job)


async def test_ready_is_awaited_before_each_job_is_taken() -> None:
    gate = Gate()
    async with open_pool(1, gate) as pool:
        await wait_all_tasks_blocked()
        assert (gate.calls, gate.jobs) == (1, 0)
        for number in range(1, 5):
            assert await pool.process(number) == number
            await wait_all_tasks_blocked()
            assert (gate.calls, gate.jobs) == (number + 1, number)


async def test_ready_is_awaited_between_the_jobs_of_the_backlog() -> None:
    """In the second life of a worker as in the first."""
    gate = Gate()
    async with open_pool(1, gate) as pool:
        for life in range(2):
            replies = [pool.submit_nowait(number) for number in range(4)]
            assert [await reply.wait() for reply in replies] == list(range(4))
            await wait_all_tasks_blocked()
            assert (gate.calls, gate.jobs) == (5 * life + 5, 5 * life + 4)
            with pytest.raises(WorkerCrashed):
                await pool.process(SystemExit())


async def test_a_job_that_ready_let_in_is_not_interrupted_by_a_resize() -> None:
    gate, release = Gate(), trio.Event()
    async with open_pool(1, gate) as pool, trio.open_nursery() as nursery:
        reply = pool.submit_nowait(release.wait)
        await wait_all_tasks_blocked()
        nursery.start_soon(pool.resize, 0)
        await wait_all_tasks_blocked()
        assert not reply.done
        release.set()
        await reply.wait()
        assert (gate.jobs, reply.attempts) == (1, 1)


async def test_each_job_after_ready_sees_the_deadline_of_its_caller(
    autojump_clock: MockClock,
) -> None:
    seen: list[float] = []

    async def look() -> None:
        seen.append(trio.current_effective_deadline())

    async with open_pool(1, Gate()) as pool:
        with trio.move_on_at(1_000):
            for _ in range(3):
                await pool.process(look)
    assert seen == [1_000] * 3


async def test_ready_is_awaited_between_the_items_of_a_map() -> None:
    gate = Gate()
    async with open_pool(1, gate) as pool:
        assert await pool.map(range(6)) == list(range(6))
        assert gate.jobs == 6
        assert gate.calls >= 6


async def test_a_worker_that_is_not_ready_takes_no_job(
    autojump_clock: MockClock,
) -> None:
    gate = Gate(is_open=False)
    async with open_pool(1, gate) as pool:
        replies = [await pool.submit(number) for number in range(3)]
        await trio.sleep(1.5)
        count = pool.statistics()
        assert (count.queued, count.running, gate.jobs) == (3, 0, 0)
        gate.opened.set()
        assert [await reply.wait() for reply in replies] == [0, 1, 2]


async def test_the_jobs_go_to_the_workers_that_are_ready(
    autojump_clock: MockClock,
) -> None:
    gates: list[Gate] = []

    @asynccontextmanager
    async def gated() -> AsyncGenerator[Gate, None]:
        gates.append(Gate(is_open=not gates))
        yield gates[-1]

    async with open_pool(2, worker=gated) as pool:
        assert await pool.map([0.25] * 4) == [0.25] * 4
        assert sorted(gate.jobs for gate in gates) == [0, 4]
        for gate in gates:
            gate.opened.set()
        await check_whole(pool, 2)


async def test_a_worker_that_is_not_ready_holds_up_no_shutdown(
    autojump_clock: MockClock,
) -> None:
    gate = Gate(is_open=False)
    async with open_pool(1, gate) as pool:
        await wait_all_tasks_blocked()
        await pool.shutdown()
        assert gate.interrupted == 1
    assert trio.current_time() == 0


async def test_a_worker_that_is_not_ready_holds_up_no_end_of_the_block() -> None:
    gate = Gate(is_open=False)
    listener = Listener()
    async with open_pool(3, gate, hooks=[listener]):
        await wait_all_tasks_blocked()
    assert gate.interrupted == 3
    assert sorted(listener.those("stop")) == [0, 1, 2]
    assert not listener.those("crash")


async def test_a_worker_that_is_not_ready_holds_up_no_resize() -> None:
    gate, listener = Gate(is_open=False), Listener()
    async with open_pool(3, gate, hooks=[listener]) as pool:
        await wait_all_tasks_blocked()
        await pool.resize(1)
        assert pool.statistics().workers == 1
        assert gate.interrupted == 2
        await pool.resize(0)
        assert gate.interrupted == 3
        assert pool.workers() == ()
    assert not listener.those("crash")


async def test_a_worker_that_is_not_ready_is_stopped_by_cancel() -> None:
    gate = Gate(is_open=False)
    async with open_pool(1, gate) as pool:
        reply = await pool.submit(1)
        await wait_all_tasks_blocked()
        pool.cancel()
        with pytest.raises(JobCancelled) as caught:
            await reply.wait()
        assert caught.value.started is False
    assert gate.jobs == 0


async def test_a_worker_that_is_not_ready_gets_old_all_the_same(
    autojump_clock: MockClock,
) -> None:
    gate, listener = Gate(is_open=False), Listener()
    async with open_pool(1, gate, max_age=1.5, hooks=[listener]) as pool:
        await trio.sleep(2)
        assert gate.interrupted == 1
        assert listener.seen == [("start", 0), ("stop", 0), ("start", 0)]
        assert pool.statistics().restarts == 0


async def test_the_last_job_of_a_life_is_not_followed_by_ready() -> None:
    gates: list[Gate] = []

    @asynccontextmanager
    async def gated() -> AsyncGenerator[Gate, None]:
        gates.append(Gate())
        yield gates[-1]

    async with open_pool(1, worker=gated, max_jobs=2) as pool:
        for _ in range(4):
            await pool.process(1)
        await wait_all_tasks_blocked()
    assert [gate.calls for gate in gates] == [2, 2, 1]


async def test_a_life_whose_jobs_are_over_ends_without_getting_ready() -> None:
    gates: list[Gate] = []

    @asynccontextmanager
    async def gated() -> AsyncGenerator[Gate, None]:
        gates.append(Gate())
        yield gates[-1]

    async def close() -> None:
        gates[0].opened = trio.Event()

    async with open_pool(1, worker=gated, max_jobs=1) as pool:
        await pool.process(close)
        await wait_all_tasks_blocked()
        # The first would not be ready any more, but it is not asked.
        assert len(gates) == 2
        assert (await (await pool.submit(1)).wait()) == 1


async def test_a_worker_shut_down_under_its_job_is_not_asked_to_be_ready() -> None:
    gate = Gate()
    release = trio.Event()
    async with open_pool(1, gate) as pool:
        await pool.submit(release.wait)
        await wait_all_tasks_blocked()
        gate.opened = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.resize, 0)
            await wait_all_tasks_blocked()
            release.set()
    assert gate.calls == 1


async def test_ready_that_raises_is_a_crash_and_no_job_is_lost() -> None:
    error = Broken("not ready")
    gate, listener = Gate(), Listener()
    async with open_pool(1, gate, hooks=[listener]) as pool:
        await wait_all_tasks_blocked()
        gate.error = error
        first, second = await pool.submit(1), await pool.submit(2)
        assert await first.wait() == 1
        assert await second.wait() == 2
        count = pool.statistics()
        assert (count.done, count.lost, count.restarts) == (2, 0, 1)
        assert pool.workers()[0].last_error is error
    assert listener.seen == [
        ("start", 0),
        ("crash", 0),
        ("restart", 0),
        ("start", 0),
        ("stop", 0),
    ]


async def test_a_job_waits_for_no_other_worker_where_ready_raises(
    autojump_clock: MockClock,
) -> None:
    gate, setups = Gate(), 0

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Gate, None]:
        nonlocal setups
        setups += 1
        await trio.sleep(0 if setups <= 2 else 5)
        yield gate

    async with open_pool(2, worker=worker) as pool:
        reply = await pool.submit(1, delay=1.5)
        await wait_all_tasks_blocked()
        # That of the one which is woken for the job.
        gate.error = Broken("not ready")
        assert await reply.wait() == 1
        assert trio.current_time() == 1.5
        assert pool.statistics().restarts == 1


async def test_ready_that_raises_spends_the_budget() -> None:
    error = Broken("not ready")
    gate = Gate()
    gate.error = error
    with pytest.raises(PoolBroken) as caught:
        async with open_pool(1, gate, restart=Restart(limit=0)):
            await trio.sleep_forever()
    assert caught.value.__cause__ is error


async def test_what_a_job_set_is_not_seen_by_ready() -> None:
    var: ContextVar[str] = ContextVar("var", default="unset")
    seen: list[str] = []

    async def handler(job: str) -> None:
        var.set(job)

    async def ready() -> None:
        seen.append(var.get())
        var.set("by ready")

    handler.ready = ready  # type: ignore[attr-defined]
    async with open_pool(1, handler) as pool:
        var.set("by the caller")
        await pool.process("by the job")
        await wait_all_tasks_blocked()
    assert seen == ["unset", "unset"]


async def test_a_job_withdrawn_while_nobody_is_ready_never_starts(
    autojump_clock: MockClock,
) -> None:
    gate = Gate(is_open=False)
    async with open_pool(1, gate) as pool:
        with trio.move_on_after(0.5) as scope:
            await pool.process(1)
        assert scope.cancelled_caught
        gate.opened.set()
        assert await pool.process(2) == 2
        assert gate.jobs == 1


# ----------------------------------------------------------------------
# Leases.


async def who() -> int:
    return current_job().worker


class Seats:
    """Makes workers that count their own jobs."""

    def __init__(self) -> None:
        self.lives = 0

    @asynccontextmanager
    async def __call__(self) -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        life, jobs = self.lives, 0
        self.lives += 1

        async def handler(job: Any) -> Any:
            nonlocal jobs
            jobs += 1
            return (life, jobs) if job == "seat" else await obey(job)

        yield handler


async def test_a_lease_is_one_worker_with_its_state_for_several_jobs() -> None:
    async with open_pool(3, worker=Seats()) as pool:
        async with pool.lease() as worker:
            seats = [await worker.process("seat") for _ in range(3)]
            assert await worker.process(who) == worker.id
        assert [jobs for _, jobs in seats] == [1, 2, 3]
        assert len({life for life, _ in seats}) == 1


async def test_no_job_of_others_comes_in_between() -> None:
    async with open_pool(2, worker=Seats()) as pool:
        async with pool.lease() as worker:
            life, _ = await worker.process("seat")
            others = await pool.map(["seat"] * 5)
            assert all(other != life for other, _ in others)
            replies = await pool.submit_batch(["seat"] * 5)
            for reply in replies:
                assert (await reply.wait())[0] != life
            assert await worker.process("seat") == (life, 2)


async def test_the_only_worker_under_a_lease_takes_no_job_until_it_is_over(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, worker=Seats()) as pool:
        async with pool.lease() as worker:
            reply = await pool.submit("seat")
            batch: list[Any] = []

            async def run_map() -> None:
                batch.extend(await pool.map(["seat", "seat"]))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(run_map)
                await trio.sleep(1)
                assert await worker.process("seat") == (0, 1)
                assert not reply.done
                assert batch == []
                nursery.cancel_scope.cancel()
        assert await reply.wait() == (0, 2)


async def test_calls_of_several_tasks_take_turns_in_order(
    autojump_clock: MockClock,
) -> None:
    crowd, order = Crowd(), []

    async def call(number: int) -> None:
        async def job() -> None:
            order.append(number)
            await crowd(0.25)

        await worker.process(job)

    async with open_pool(2, obey) as pool, pool.lease() as worker:
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(call, number)
                await wait_all_tasks_blocked()
        assert order == [0, 1, 2, 3]
        assert crowd.peak == 1
        assert trio.current_time() == 1.0


async def test_a_call_that_is_cancelled_while_it_waits_for_its_turn_never_starts(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, worker=Seats()) as pool, pool.lease() as worker:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.process, 1.0)
            await wait_all_tasks_blocked()
            with trio.move_on_after(0.5) as scope:
                await worker.process("seat")
            assert scope.cancelled_caught
        assert await worker.process("seat") == (0, 2)


async def test_the_timeout_of_a_leased_job(autojump_clock: MockClock) -> None:
    async with open_pool(1, worker=Seats(), timeout=2.0) as pool:
        async with pool.lease() as worker:
            with pytest.raises(JobTimeout) as caught:
                await worker.process(9.0, timeout=0.5)
            assert trio.current_time() == 0.5
            assert caught.value.timeout == 0.5
            assert (caught.value.started, caught.value.worker) == (True, 0)
            with pytest.raises(JobTimeout) as caught:
                await worker.process(9.0)
            assert caught.value.timeout == 2.0
            assert trio.current_time() == 2.5
            assert await worker.process("seat") == (0, 3)
            assert pool.statistics().timed_out == 2


async def test_a_leased_job_sees_the_deadline_of_its_caller(
    autojump_clock: MockClock,
) -> None:
    async def look() -> float:
        return trio.current_effective_deadline()

    async with open_pool(1, obey) as pool, pool.lease() as worker:
        with trio.move_on_at(1.5):
            assert await worker.process(look) == 1.5
            assert await worker.process(look, timeout=0.5) == 0.5
        assert await worker.process(look) == math.inf


@pytest.mark.parametrize("timeout", [0, -1.0, math.nan, "soon"])
async def test_a_bad_timeout_of_a_leased_job_is_refused(timeout: Any) -> None:
    async with open_pool(1, obey) as pool, pool.lease() as worker:
        with pytest.raises((ValueError, TypeError), match="timeout"):
            await worker.process(1, timeout=timeout)


async def test_errors_and_values_of_leased_jobs_are_those_of_the_handler() -> None:
    error = ValueError("bad")
    async with open_pool(1, obey) as pool, pool.lease() as worker:
        with pytest.raises(ValueError) as caught:
            await worker.process(error)
        assert caught.value is error
        marker = object()
        assert await worker.process(marker) is marker


async def test_leased_jobs_are_counted_like_others() -> None:
    async with open_pool(1, obey) as pool:
        async with pool.lease() as worker:
            await worker.process(1)
            with pytest.raises(ValueError):
                await worker.process(ValueError())
            count = pool.statistics()
            assert (count.accepted, count.done, count.failed) == (2, 1, 1)
            assert (count.running, count.queued) == (0, 0)
            assert count.run.count == 2
            assert balanced(count)
        assert pool.workers()[0].jobs == 2


async def test_a_leased_job_sees_the_context_of_its_caller() -> None:
    var: ContextVar[str] = ContextVar("var", default="unset")

    async def look() -> str:
        seen = var.get()
        var.set("by the job")
        return seen

    async with open_pool(1, obey) as pool, pool.lease() as worker:
        var.set("by the caller")
        assert await worker.process(look) == "by the caller"
        assert await worker.process(look) == "by the caller"
        assert var.get() == "by the caller"


async def test_a_crash_under_a_leased_job_ends_what_the_lease_is_good_for() -> None:
    listener = Listener()
    async with open_pool(1, worker=Seats(), hooks=[listener]) as pool:
        async with pool.lease() as worker:
            await worker.process("seat")
            cause = SystemExit("out")
            with pytest.raises(WorkerCrashed) as caught:
                await worker.process(cause)
            assert caught.value.__cause__ is cause
            assert (caught.value.started, caught.value.worker) == (True, 0)
            await wait_all_tasks_blocked()
            assert worker.id is None
            for _ in range(2):
                with pytest.raises(WorkerCrashed) as caught:
                    await worker.process("seat")
                assert caught.value.started is False
                assert caught.value.attempts == 0
            # The fresh worker does not belong to the lease.
            assert await pool.process("seat") == (1, 1)
        assert await pool.process("seat") == (1, 2)
        count = pool.statistics()
        assert (count.lost, count.restarts) == (1, 1)
        assert balanced(count)
    assert listener.those("crash") == [0]


async def test_calls_that_wait_for_their_turn_hear_of_the_crash_too(
    autojump_clock: MockClock,
) -> None:
    heard: list[bool] = []

    async def die() -> None:
        await trio.sleep(0.5)
        raise SystemExit

    async def call(job: Any) -> None:
        with pytest.raises(WorkerCrashed) as caught:
            await worker.process(job)
        heard.append(caught.value.started)

    async with open_pool(1, worker=Seats()) as pool:
        async with pool.lease() as worker:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call, die)
                await wait_all_tasks_blocked()
                nursery.start_soon(call, "seat")
                await wait_all_tasks_blocked()
                nursery.start_soon(call, "seat")
        assert heard == [True, False, False]
        assert await pool.process("seat") == (1, 1)


async def test_an_error_of_crash_on_under_a_lease_ends_it() -> None:
    error = Broken()
    async with open_pool(1, worker=Seats(), crash_on=Broken) as pool:
        async with pool.lease() as worker:
            with pytest.raises(Broken) as caught:
                await worker.process(error)
            assert caught.value is error
            with pytest.raises(WorkerCrashed) as crashed:
                await worker.process("seat")
            assert crashed.value.started is False
        assert await pool.process("seat") == (1, 1)


async def test_a_worker_that_dies_between_two_leased_jobs() -> None:
    dying = trio.Event()
    error = Broken("the connection is gone")

    async def watch() -> None:
        await dying.wait()
        raise error

    @asynccontextmanager
    async def connected() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        async with trio.open_nursery() as nursery:
            if not dying.is_set():
                nursery.start_soon(watch)
            yield obey
            nursery.cancel_scope.cancel()

    async with open_pool(1, worker=connected) as pool:
        async with pool.lease() as worker:
            assert await worker.process(1) == 1
            dying.set()
            await wait_all_tasks_blocked()
            with pytest.raises(WorkerCrashed) as caught:
                await worker.process(2)
            assert caught.value.started is False
            assert worker.id is None
        assert await pool.process(3) == 3
        assert pool.statistics().restarts == 1
        assert balanced(pool.statistics())


async def test_after_its_block_a_lease_is_closed() -> None:
    async with open_pool(1, obey) as pool:
        async with pool.lease() as worker:
            assert worker.id == 0
        assert worker.id is None
        with pytest.raises(trio.ClosedResourceError):
            await worker.process(1)
        assert await pool.process(1) == 1


async def test_a_shutdown_ends_a_lease_that_has_no_job() -> None:
    async with open_pool(1, obey) as pool:
        async with pool.lease() as worker:
            await worker.process(1)
            report = await pool.shutdown()
            assert (report.cancelled, report.unfinished) == (0, 0)
            assert pool.statistics().workers == 0
            with pytest.raises(PoolClosed) as caught:
                await worker.process(2)
            assert caught.value.started is False


async def test_a_shutdown_lets_the_leased_job_that_runs_finish(
    autojump_clock: MockClock,
) -> None:
    results: list[Any] = []

    async def use() -> None:
        async with pool.lease() as worker:
            results.append(await worker.process(1.5))
            with pytest.raises(PoolClosed):
                await worker.process(1)

    async with open_pool(1, obey) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use)
            await wait_all_tasks_blocked()
            report = await pool.shutdown()
            assert trio.current_time() == 1.5
            assert report.done == 1
    assert results == [1.5]


async def test_a_shutdown_refuses_those_who_wait_for_a_lease() -> None:
    refused = 0

    async def wait() -> None:
        nonlocal refused
        with pytest.raises(PoolClosed):
            async with pool.lease():
                pass
        refused += 1

    release = trio.Event()
    async with open_pool(1, obey) as pool:
        async with trio.open_nursery() as nursery:
            await pool.submit(release.wait)
            nursery.start_soon(wait)
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            nursery.start_soon(pool.shutdown)
            await wait_all_tasks_blocked()
            assert refused == 2
            release.set()


async def test_cancelling_the_pool_cancels_the_leased_job() -> None:
    async with open_pool(1, obey) as pool:
        async with pool.lease() as worker:
            async with trio.open_nursery() as nursery:

                async def use() -> None:
                    with pytest.raises(JobCancelled) as caught:
                        await worker.process(trio.sleep_forever)
                    assert caught.value.started is True

                nursery.start_soon(use)
                await wait_all_tasks_blocked()
                pool.cancel()
            with pytest.raises(PoolClosed):
                await worker.process(1)


async def test_the_body_that_ends_within_a_lease_of_another_task() -> None:
    refused = False
    closing = trio.Event()

    async def hold(pool: Pool[Any, Any]) -> None:
        nonlocal refused
        async with pool.lease() as worker:
            await worker.process(1)
            await closing.wait()
            with pytest.raises(PoolClosed):
                await worker.process(1)
            refused = True

    async with trio.open_nursery() as nursery:
        async with open_pool(1, obey) as pool:
            nursery.start_soon(hold, pool)
            await wait_all_tasks_blocked()
        closing.set()
    assert refused


async def test_a_closed_pool_leases_nothing() -> None:
    async with open_pool(1, obey) as pool:
        await pool.shutdown()
        with pytest.raises(PoolClosed):
            async with pool.lease():
                pass


async def test_shrinking_waits_for_the_lease_and_never_interrupts_it(
    autojump_clock: MockClock,
) -> None:
    shrunk: list[float] = []

    async def shrink() -> None:
        await pool.resize(0)
        shrunk.append(trio.current_time())

    async with open_pool(2, worker=Seats()) as pool:
        async with trio.open_nursery() as nursery:
            async with pool.lease() as worker:
                life, _ = await worker.process("seat")
                nursery.start_soon(shrink)
                await trio.sleep(1)
                assert pool.statistics().workers == 1
                assert await worker.process("seat") == (life, 2)
                assert await worker.process(0.5) == 0.5
                assert shrunk == []
        assert shrunk == [1.5]
        assert pool.workers() == ()
        await pool.resize(2)
        await check_whole(pool, 2)


async def test_shrinking_prefers_the_workers_without_a_lease() -> None:
    async with open_pool(3, worker=Seats()) as pool, pool.lease() as worker:
        leased = worker.id
        await pool.resize(1)
        assert [snapshot.id for snapshot in pool.workers()] == [leased]
        assert (await worker.process("seat"))[1] == 1


async def test_growing_under_a_lease() -> None:
    async with open_pool(1, obey) as pool, pool.lease() as worker:
        await pool.resize(2)
        assert await pool.process(who) != await worker.process(who)


async def test_a_pause_does_not_stop_a_lease() -> None:
    async with open_pool(1, worker=Seats()) as pool:
        async with pool.lease() as worker:
            pool.pause()
            reply = await pool.submit("seat")
            assert await worker.process("seat") == (0, 1)
        await wait_all_tasks_blocked()
        assert not reply.done
        pool.resume()
        assert await reply.wait() == (0, 2)


async def test_a_lease_outlives_a_pause_with_no_job_of_others_in_between() -> None:
    async with open_pool(1, worker=Seats()) as pool:
        async with pool.lease() as worker:
            pool.pause()
            pool.resume()
            reply = await pool.submit("seat")
            assert await worker.process("seat") == (0, 1)
            await wait_all_tasks_blocked()
            assert not reply.done
        assert await reply.wait() == (0, 2)


async def test_a_lease_asked_for_in_a_pause_comes_after_it() -> None:
    got = trio.Event()

    async def take() -> None:
        async with pool.lease() as worker:
            assert await worker.process("seat") == (0, 1)
            got.set()

    async with open_pool(1, worker=Seats()) as pool:
        pool.pause()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take)
            await wait_all_tasks_blocked()
            assert not got.is_set()
            pool.resume()
        assert got.is_set()
        assert await pool.process("seat") == (0, 2)


async def test_a_lease_waits_in_line_behind_the_jobs_that_were_there() -> None:
    order: list[str] = []
    release = trio.Event()

    def note(name: str) -> Callable[[], Awaitable[None]]:
        async def job() -> None:
            order.append(name)

        return job

    async def take() -> None:
        async with pool.lease() as worker:
            order.append("lease")
            await worker.process(note("leased"))
            await wait_all_tasks_blocked()

    async with open_pool(1, obey) as pool:
        async with trio.open_nursery() as nursery:
            await pool.submit(release.wait)
            await pool.submit(note("before 1"))
            await pool.submit(note("before 2"))
            nursery.start_soon(take)
            await wait_all_tasks_blocked()
            await pool.submit(note("after"))
            release.set()
    assert order == ["before 1", "before 2", "lease", "leased", "after"]


async def test_of_those_who_wait_for_a_lease_the_highest_priority_is_first() -> None:
    order: list[Any] = []
    release = trio.Event()

    async def take(priority: int) -> None:
        async with pool.lease(priority=priority) as worker:
            order.append(priority)
            await worker.process(1)

    async def job() -> None:
        order.append("job of 1")

    async with open_pool(1, obey) as pool:
        async with trio.open_nursery() as nursery:
            await pool.submit(release.wait)
            await wait_all_tasks_blocked()
            for priority in (0, 2, -1):
                nursery.start_soon(take, priority)
                await wait_all_tasks_blocked()
            await pool.submit(job, priority=1)
            release.set()
    assert order == [2, "job of 1", 0, -1]


@pytest.mark.parametrize("priority", [True, 1.5, "high", None])
async def test_a_bad_priority_of_a_lease_is_refused(priority: Any) -> None:
    async with open_pool(1, obey) as pool:
        with pytest.raises(TypeError, match="priority"):
            async with pool.lease(priority=priority):
                pass
        await check_free(pool)


async def check_free(pool: Pool[Any, Any]) -> None:
    """Check that every worker is idle and takes jobs."""
    await wait_all_tasks_blocked()
    for worker in pool.workers():
        assert worker.state is WorkerState.IDLE
    arrived, release = 0, trio.Event()

    async def meet() -> None:
        nonlocal arrived
        arrived += 1
        if arrived == pool.size:
            release.set()
        await release.wait()

    async with trio.open_nursery() as nursery:
        for _ in range(pool.size):
            nursery.start_soon(pool.process, meet)
    assert balanced(pool.statistics())


async def test_a_cancelled_wait_for_a_lease_leaves_nothing_behind() -> None:
    release = trio.Event()
    async with open_pool(1, obey) as pool:
        reply = await pool.submit(release.wait)
        with trio.move_on_after(0) as scope:
            async with pool.lease():
                pass
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                async with pool.lease():
                    pytest.fail("the wait was cancelled")

            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        release.set()
        await reply.wait()
        await check_free(pool)
        assert pool.statistics().accepted == 2


async def test_a_wait_for_a_lease_cancelled_as_the_worker_comes_loses_no_worker() -> (
    None
):
    release = trio.Event()
    async with open_pool(1, obey) as pool:
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                async with pool.lease() as worker:
                    await worker.process(1)

            await pool.submit(release.wait)
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            # Both within one tick.
            release.set()
            nursery.cancel_scope.cancel()
        await check_free(pool)


async def test_a_wait_for_a_lease_that_is_cancelled_as_the_pool_stops_ends_once() -> (
    None
):
    async with open_pool(1, obey) as pool, trio.open_nursery() as nursery:

        async def wait() -> None:
            async with pool.lease():
                pytest.fail("the wait was cancelled")

        await pool.submit(trio.sleep_forever)
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        # Both within one tick.
        nursery.cancel_scope.cancel()
        pool.cancel()


@pytest.mark.parametrize("ticks", range(8))
async def test_a_lease_cancelled_at_any_step_loses_no_worker(ticks: int) -> None:
    async with open_pool(1, obey) as pool:

        async def use() -> None:
            async with pool.lease() as worker:
                await worker.process(trio.lowlevel.checkpoint)
                await trio.lowlevel.checkpoint()
                await worker.process(trio.lowlevel.checkpoint)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(use)
            for _ in range(ticks):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        await check_free(pool)


async def test_cancelling_a_leased_call_cancels_its_handler_and_keeps_the_lease(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(2, worker=Seats()) as pool:
        async with pool.lease() as worker:
            life, _ = await worker.process("seat")
            with trio.move_on_after(0.5) as scope:
                await worker.process(9.0)
            assert scope.cancelled_caught
            assert trio.current_time() == 0.5
            assert await worker.process("seat") == (life, 3)
            assert pool.statistics().cancelled == 1
        await check_free(pool)


async def test_a_leased_call_returns_only_when_its_handler_has_ended(
    autojump_clock: MockClock,
) -> None:
    async def slow_to_end() -> str:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await trio.sleep(1.5)
            raise

    async with open_pool(1, obey) as pool, pool.lease() as worker:
        with trio.move_on_after(0.5):
            await worker.process(slow_to_end)
        assert trio.current_time() == 2.0


@pytest.mark.parametrize("while_running", [True, False])
async def test_an_error_in_the_block_of_a_lease_gives_the_worker_back(
    while_running: bool,
) -> None:
    async with open_pool(2, obey) as pool:
        with pytest.raises((Broken, ExceptionGroup)):
            async with pool.lease() as worker, trio.open_nursery() as nursery:
                if while_running:
                    nursery.start_soon(worker.process, trio.sleep_forever)
                    await wait_all_tasks_blocked()
                raise Broken
        await check_free(pool)


async def test_a_lease_left_while_another_task_runs_a_job_in_it(
    autojump_clock: MockClock,
) -> None:
    results: list[Any] = []

    async def use(worker: Any) -> None:
        results.append(await worker.process(1.5))

    async with open_pool(1, obey) as pool:
        async with trio.open_nursery() as nursery:
            async with pool.lease() as worker:
                nursery.start_soon(use, worker)
                await wait_all_tasks_blocked()
            # The job is accepted, so it ends; then the worker is free.
            assert await pool.process("next") == "next"
            assert trio.current_time() == 1.5
        assert results == [1.5]
        await check_free(pool)


@pytest.mark.parametrize("chance", range(10))
async def test_a_leased_job_goes_to_its_worker_or_to_none(chance: int) -> None:
    """Given in the tick in which the worker dies; trio shuffles who is first."""
    dying = trio.Event()
    number = iter(range(1_000))

    @asynccontextmanager
    async def numbered() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        own = next(number)

        async def tell(job: Any) -> int:
            return own

        async def watch() -> None:
            await dying.wait()
            raise Broken

        async with trio.open_nursery() as nursery:
            if not own:
                nursery.start_soon(watch)
            yield tell
            nursery.cancel_scope.cancel()

    async with open_pool(1, worker=numbered) as pool:
        async with pool.lease() as worker:
            assert await worker.process("job") == 0
            dying.set()
            with suppress(WorkerCrashed):
                assert await worker.process("job") == 0
        assert await pool.process("job") == 1
        assert balanced(pool.statistics())


async def lease_a_dying_worker() -> None:
    """Be given the lease of a worker in the tick in which it dies, or its heir's."""
    dying, heard = trio.Event(), list[bool]()

    @asynccontextmanager
    async def mortal() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        async def watch() -> None:
            await dying.wait()
            raise Broken

        async with trio.open_nursery() as nursery:
            if not dying.is_set():
                nursery.start_soon(watch)
            yield obey
            nursery.cancel_scope.cancel()

    async def use() -> None:
        async with pool.lease() as worker:
            try:
                assert await worker.process("job") == "job"
            except WorkerCrashed as error:
                heard.append(error.started)

    async with open_pool(1, worker=mortal) as pool:
        async with trio.open_nursery() as nursery:
            reply = pool.submit_nowait(dying.wait)
            await wait_all_tasks_blocked()
            nursery.start_soon(use)
            await wait_all_tasks_blocked()
            dying.set()
        if reply.state is JobState.LOST:
            with pytest.raises(WorkerCrashed):
                await reply.wait()
        assert heard in ([], [False])
        assert await pool.process("next") == "next"
        assert balanced(pool.statistics())


def test_a_lease_whose_worker_dies_as_it_comes_has_lost_it() -> None:
    """It is not refused by a pool that is open."""
    explore_orders(lease_a_dying_worker, orders=20)


async def test_a_lease_that_is_over_is_not_kept() -> None:
    def leases() -> int:
        gc.collect()
        return sum(type(one).__name__ == "Lease" for one in gc.get_objects())

    async with open_pool(2, obey) as pool:
        before = leases()
        for _ in range(10):
            async with pool.lease() as worker:
                await worker.process(1)
        del worker
        assert leases() <= before + 1


async def test_many_leases_one_after_the_other_leave_nothing_behind() -> None:
    async with open_pool(2, obey) as pool:
        for _ in range(20):
            async with pool.lease() as one, pool.lease() as two:
                assert {one.id, two.id} == {0, 1}
                assert await one.process(1) == await two.process(1) == 1
        await check_free(pool)
        await pool.join()


async def test_more_leases_than_workers_take_turns(autojump_clock: MockClock) -> None:
    crowd = Crowd()

    async def use() -> None:
        async with pool.lease() as worker:
            await worker.process(lambda: crowd(0.25))
            await worker.process(lambda: crowd(0.25))

    async with open_pool(2, obey) as pool:
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(use)
        assert trio.current_time() == 1.5
        assert crowd.peak == 2
        await check_free(pool)


async def test_a_join_does_not_wait_for_a_lease_without_a_job() -> None:
    async with open_pool(1, obey) as pool, pool.lease() as worker:
        await worker.process(1)
        await pool.join()


async def test_a_lease_inside_of_the_only_worker_would_deadlock() -> None:
    async def nested() -> None:
        async with pool.lease():
            pytest.fail("nobody could come")

    async with open_pool(1, obey) as pool:
        with pytest.raises(WouldDeadlock):
            await pool.process(nested)
        await check_free(pool)
        assert pool.statistics().restarts == 0


async def test_a_lease_inside_of_a_job_gets_the_other_worker() -> None:
    async def nested() -> int:
        async with pool.lease() as worker:
            return await worker.process(lambda: obey(7))

    async with open_pool(2, obey) as pool:
        assert await pool.process(nested) == 7
        await check_free(pool)


async def test_a_leased_job_that_calls_its_own_lease_would_deadlock(
    autojump_clock: MockClock,
) -> None:
    async def nested() -> None:
        with trio.fail_after(5):
            await worker.process(1)

    async with open_pool(2, obey) as pool, pool.lease() as worker:
        with pytest.raises(WouldDeadlock):
            await worker.process(nested)
        assert await worker.process(2) == 2


async def test_a_leased_job_may_use_the_rest_of_the_pool() -> None:
    async def nested() -> int:
        return await pool.process(7)

    async with open_pool(2, obey) as pool, pool.lease() as worker:
        assert await worker.process(nested) == 7


async def test_a_lease_of_a_pool_of_functions() -> None:
    async def add(a: int, b: int) -> int:
        return a + b

    async with open_pool(2) as pool, pool.lease() as worker:
        assert await worker.process(add, 1, 2) == 3
        first = await worker.process(who)
        assert first == worker.id == await worker.process(who)


@pytest.mark.parametrize("options", [{"max_jobs": 1}, {"max_age": 0.25}])
async def test_a_lease_keeps_its_worker_beyond_its_time(
    autojump_clock: MockClock, options: Any
) -> None:
    listener = Listener()
    async with open_pool(1, worker=Seats(), hooks=[listener], **options) as pool:
        async with pool.lease() as worker:
            for jobs in range(1, 4):
                assert await worker.process("seat") == (0, jobs)
                await trio.sleep(0.5)
            assert listener.seen == [("start", 0)]
        await wait_all_tasks_blocked()
        assert listener.seen == [("start", 0), ("stop", 0), ("start", 0)]
        assert await pool.process("seat") == (1, 1)
        assert pool.statistics().restarts == 0


async def test_a_leased_worker_without_a_job_is_not_idle_for_too_long(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, worker=Seats(), max_idle=0.5) as pool:
        async with pool.lease() as worker:
            assert await worker.process("seat") == (0, 1)
            await trio.sleep(2)
            assert await worker.process("seat") == (0, 2)


async def test_autoscaling_lets_a_leased_worker_alone(
    autojump_clock: MockClock,
) -> None:
    scale = Autoscale(min=0, max=3, interval=0.25, down_after=0.5)
    async with open_pool(0, worker=Seats(), scale=scale) as pool:
        await pool.resize(3)
        async with pool.lease() as worker:
            life, _ = await worker.process("seat")
            await trio.sleep(5)
            assert pool.size == 1
            assert await worker.process("seat") == (life, 2)
        await trio.sleep(5)
        assert pool.size == 0


async def test_asking_for_a_lease_is_a_checkpoint() -> None:
    async with open_pool(1, obey) as pool:
        async with AsyncExitStack() as stack:
            with assert_checkpoints():
                worker = await stack.enter_async_context(pool.lease())
            with assert_checkpoints():
                await worker.process(1)


async def test_the_job_of_a_lease_tells_hooks_like_any_other() -> None:
    class Told(Hooks):
        def __init__(self) -> None:
            self.kinds: list[str] = []

        def on_job_queue(self, event: JobChanged) -> None:
            self.kinds.append(event.kind)

        def on_job_start(self, event: JobChanged) -> None:
            self.kinds.append(event.kind)

        def on_job_complete(self, event: JobChanged) -> None:
            self.kinds.append(event.kind)

    told = Told()
    async with open_pool(1, obey, hooks=[told]) as pool, pool.lease() as worker:
        await worker.process(1)
    assert told.kinds == ["job_queue", "job_start", "job_complete"]


async def test_a_worker_that_is_busy_by_the_time_it_should_go_stays_and_is_counted(
    autojump_clock: MockClock,
) -> None:
    class Refill(Hooks):
        """Gives every worker a job as soon as there are to be fewer."""

        def on_resize(self, event: PoolResized) -> None:
            sizes.append(event.new)
            if event.new < event.old and len(sizes) < 3:
                for _ in range(2):
                    pool.submit_nowait(5.0)
            elif len(sizes) == 3:
                corrected.set()

    sizes: list[int] = []
    corrected = trio.Event()
    scale = Autoscale(min=1, max=2, interval=1.0, down_after=1.0)
    async with open_pool(1, obey, scale=scale, hooks=[Refill()]) as pool:
        for _ in range(2):
            pool.submit_nowait(2.0)
        with trio.fail_after(20):
            await corrected.wait()
        assert sizes == [2, 1, 2]
        assert pool.size == len(pool.workers()) == pool.statistics().busy == 2


async def test_a_lease_has_no_worker_once_that_is_lost_though_it_still_cleans_up(
    autojump_clock: MockClock,
) -> None:
    workers = Workers(cleanup=5.0)
    async with open_pool(1, worker=workers) as pool, pool.lease() as worker:
        assert worker.id == 0
        with pytest.raises(WorkerCrashed):
            await worker.process(SystemExit())
        await trio.sleep(1)
        assert len(workers.setups) == 1
        assert worker.id is None


async def test_a_cancelled_call_of_lease_is_cancelled_though_the_pool_is_closed() -> (
    None
):
    async with open_pool(1, obey) as pool:
        await pool.shutdown()
        with trio.CancelScope() as scope:
            scope.cancel()
            async with pool.lease():
                pytest.fail("it was cancelled before")
        assert scope.cancelled_caught


async def lease_one_of_two(pool: Pool[Any, Any], release: trio.Event) -> None:
    """Lease a worker; see that what waits for release runs on the other one only."""
    async with pool.lease() as worker:
        replies = [pool.submit_nowait(release.wait) for _ in range(2)]
        await wait_all_tasks_blocked()
        assert pool.statistics().running == 1
        assert await worker.process(3) == 3
        release.set()
        for reply in replies:
            await reply.wait()


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("chance", range(12))
async def test_a_leased_worker_whose_first_job_was_withdrawn_gets_no_other_job(
    chance: int, before: int
) -> None:
    """Which of the two workers wakes first, and so is leased, is up to trio."""
    release = trio.Event()
    async with open_pool(2, obey) as pool:
        for _ in range(before):
            pool.submit_nowait(trio.lowlevel.checkpoint)
        await wait_all_tasks_blocked()
        withdrawn = [pool.submit_nowait(number) for number in range(2)]
        for reply in withdrawn:
            assert reply.cancel()
        await lease_one_of_two(pool, release)


async def test_the_age_of_a_fresh_worker_counts_from_its_own_setup(
    autojump_clock: MockClock,
) -> None:
    """The alarm of the worker that it replaces does not ring for it."""
    workers = Workers()
    began = trio.current_time()
    async with open_pool(1, worker=workers, max_jobs=1, max_age=10) as pool:
        await trio.sleep(6)
        await pool.process(1)
        await trio.sleep(9)
        assert [when - began for when in workers.setups] == [0, 6]
        await trio.sleep(2)
        assert [when - began for when in workers.setups] == [0, 6, 16]


async def test_the_age_of_a_worker_is_forgotten_with_it_though_it_was_idle_meanwhile(
    autojump_clock: MockClock,
) -> None:
    workers = Workers()
    async with open_pool(1, worker=workers, max_age=10, max_idle=3) as pool:
        await trio.sleep(1)
        await pool.process(1.0)
        # Looked at in vain when 3 s are over, it is replaced at 5 s.
        await trio.sleep(3.5)
        assert workers.setups == [0, 5]
        await pool.process(6.0)
        await trio.sleep(1)
        assert workers.setups == [0, 5]


def alarms() -> int:
    """Count what alarms are, among others; it takes some 20 ms."""
    return sum(type(found) is list for found in gc.get_objects())


async def test_looks_at_a_worker_that_is_never_idle_leave_nothing_behind(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, obey, max_idle=1) as pool:
        await pool.submit(300.0)
        await trio.sleep(100.5)
        before = alarms()
        await trio.sleep(100)
        assert alarms() < before + 50


async def test_the_lives_of_a_worker_leave_nothing_behind(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, obey, max_jobs=1, max_age=math.pi) as pool:
        counts: list[int] = []
        for _ in range(2):
            for number in range(100):
                await pool.process(number)
            counts.append(alarms())
        assert counts[1] < counts[0] + 50


async def test_setups_that_fail_leave_nothing_behind(
    autojump_clock: MockClock,
) -> None:
    counts: list[int] = []

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        counts.append(alarms() if len(counts) in {20, 70} else 0)
        if 0 < len(counts) - 1 < 75:
            raise Broken
        yield obey

    restart = Restart(limit=math.inf, backoff=lambda _: 1.5)
    async with open_pool(1, worker=worker, restart=restart) as pool:
        with pytest.raises(WorkerCrashed):
            await pool.process(SystemExit())
        assert await pool.process(1) == 1
    assert counts[70] < counts[20] + 25


async def test_a_fresh_worker_goes_on_with_the_record_of_its_slot() -> None:
    async with open_pool(1, worker=Workers(), max_jobs=2) as pool:
        with pytest.raises(WorkerCrashed):
            await pool.process(SystemExit())
        for number in range(3):
            await pool.process(number)
            await wait_all_tasks_blocked()
        (worker,) = pool.workers()
        assert (worker.jobs, worker.restarts) == (4, 1)
        assert isinstance(worker.last_error, SystemExit)


@pytest.mark.parametrize("ticks", range(3))
@pytest.mark.parametrize("chance", range(6))
async def test_a_leased_worker_that_changed_to_a_job_that_was_withdrawn_gets_no_other(
    ticks: int, chance: int
) -> None:
    """It gives way once, to run in the variables of the job's caller."""
    var: ContextVar[bool] = ContextVar("var")
    release = trio.Event()
    async with open_pool(2, obey) as pool:
        var.set(True)
        pool.pause()
        withdrawn = [pool.submit_nowait(release.wait) for _ in range(2)]
        await wait_all_tasks_blocked()
        pool.resume()
        for _ in range(ticks):
            await trio.lowlevel.checkpoint()
        for reply in withdrawn:
            reply.cancel()
        await lease_one_of_two(pool, release)
