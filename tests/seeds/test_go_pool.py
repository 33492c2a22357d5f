"""The cases of go-pool: limit, wait, close, repetition and the pool-wide retry.

Tasks and drains are those of go-async, whose cases stand in `test_go_async`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

from trio_pool import (
    Backoff,
    Drain,
    JobCancelled,
    JobState,
    PoolClosed,
    PoolStatistics,
    Retry,
    Task,
    open_pool,
)


class TransientError(Exception):
    """What goes away when it is tried again."""


class Flaky:
    """An async function that fails so many times, then returns what it is given."""

    def __init__(self, failures: float) -> None:
        self.failures = failures
        self.times: list[float] = []

    @property
    def calls(self) -> int:
        return len(self.times)

    async def __call__(self, value: Any = None) -> Any:
        self.times.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        if self.calls <= self.failures:
            raise TransientError(self.calls)
        return value


class Gauge:
    """An async function that takes its time and knows how many run at once."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.calls = self.now = self.peak = self.ended = 0

    async def __call__(self, value: Any = None) -> Any:
        self.calls += 1
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            await trio.sleep(self.seconds)
        finally:
            self.now -= 1
        self.ended += 1
        return value


def at_once(attempt: int) -> float:
    return 0.0


def living_tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


def balanced(count: PoolStatistics) -> bool:
    ended = count.done + count.failed + count.timed_out + count.cancelled
    ended += count.expired + count.dropped + count.lost
    return count.accepted == count.delayed + count.queued + count.running + ended


# The limit.


@pytest.mark.parametrize("limit", [1, 2, 7])
@pytest.mark.parametrize("way", ["go", "submit", "process", "map"])
async def test_the_limit_is_never_exceeded(
    autojump_clock: trio.testing.MockClock, limit: int, way: str
) -> None:
    """Of 20 tasks at most `limit` run, and so many do; the seed ran 20 at limit 2."""
    gauge = Gauge(0.5)
    async with open_pool(limit) as pool:
        if way == "go":
            await pool.go(*[Task(gauge)] * 20)
        elif way == "submit":
            for number in range(20):
                await pool.submit(gauge, number)
        elif way == "process":
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(pool.process, gauge, number)
        else:
            await pool.map(gauge, range(20))
    assert (gauge.calls, gauge.peak) == (20, limit)
    assert trio.current_time() == 0.5 * math.ceil(20 / limit)


async def test_the_limit_holds_while_tasks_are_tried_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Further attempts wait for a worker as first attempts do."""
    gauge = Gauge(0.25)

    async def twice() -> None:
        await gauge()
        if gauge.calls <= 10:
            raise TransientError

    async with open_pool(2, retry=Retry(20, at_once)) as pool:
        await pool.go(*[Task(twice)] * 10)
    assert gauge.peak == 2
    assert pool.statistics().done == 10


# Waiting, and who hears of errors.


async def test_three_tasks_at_limit_one_and_the_middle_one_fails() -> None:
    """All three run, in order, and the error of the middle one is heard."""
    ran: list[str] = []

    async def step(name: str, error: Exception | None) -> None:
        ran.append(name)
        if error is not None:
            raise error

    error = TransientError("middle")
    async with open_pool(1) as pool:
        replies = await pool.go(
            Task(step, "first", None),
            Task(step, "middle", error),
            Task(step, "last", None),
        )
        await pool.join()
        assert ran == ["first", "middle", "last"]
        assert [reply.state for reply in replies] == [
            JobState.DONE,
            JobState.FAILED,
            JobState.DONE,
        ]
        with pytest.raises(TransientError) as caught:
            await replies[1].wait()
        assert caught.value is error


async def test_wait_waits_for_all_tasks(autojump_clock: trio.testing.MockClock) -> None:
    """`join` returns when the longest of all tasks has ended, and not before."""
    gauge = Gauge(1.5)
    async with open_pool(2) as pool:
        await pool.go(*[Task(gauge)] * 3)
        await pool.join()
        assert (gauge.ended, trio.current_time()) == (3, 3.0)
        await pool.join()
        assert trio.current_time() == 3.0


async def test_an_error_nobody_read_is_raised_at_the_end_of_the_block() -> None:
    """Errors that no reply was asked for leave the block, the first one first."""
    first, second = TransientError("first"), TransientError("second")

    async def fail(error: Exception) -> None:
        raise error

    with pytest.raises(ExceptionGroup) as caught:
        async with open_pool(1) as pool:
            await pool.go(Task(fail, first), Task(fail, second))
            await pool.join()
    assert caught.value.exceptions == (first, second)


async def test_an_old_error_is_not_heard_again_by_a_later_clean_batch() -> None:
    """A batch hears only of itself; the seed returned the old error once more."""
    fn = Flaky(1)
    async with open_pool(1) as pool:
        (bad,) = await pool.go(Task(fn))
        await pool.join()
        with pytest.raises(TransientError):
            await bad.wait()
        (good,) = await pool.go(Task(fn, "clean"))
        await pool.join()
        assert await good.wait() == "clean"
        assert await pool.map(fn, [1, 2]) == [1, 2]
    # Nor is what was read above raised at the end of the block.
    assert (pool.statistics().failed, pool.statistics().done) == (1, 3)


# Retries, of the task and of the pool.


async def test_three_good_and_one_failing_twice(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Three good tasks and one that fails twice make six calls and no error."""
    good, flaky = Flaky(0), Flaky(2)
    async with open_pool(4) as pool:
        await pool.go(*[Task(good)] * 3, Task(flaky).with_retry(3))
    assert (good.calls, flaky.calls) == (3, 3)
    count = pool.statistics()
    assert (count.done, count.failed, count.retries) == (4, 0, 2)


async def test_the_same_task_three_times_and_one_always_failing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A task given in three times and one that always fails make six calls."""
    good, bad = Flaky(0), Flaky(math.inf)
    task = Task(good)
    async with open_pool(2) as pool:
        *_, reply = await pool.go(task, task, task, Task(bad).with_retry(3))
        await pool.join()
        with pytest.raises(TransientError) as caught:
            await reply.wait()
    assert (good.calls, bad.calls) == (3, 3)
    assert caught.value.args == (3,)


async def test_pool_wide_retry(autojump_clock: trio.testing.MockClock) -> None:
    """A always fails, B fails once: five calls, and both fates are known."""
    a, b = Flaky(math.inf), Flaky(1)
    async with open_pool(2, retry=Retry(3)) as pool:
        reply_a, reply_b = await pool.go(Task(a), Task(b, "B"))
        with pytest.raises(TransientError):
            await reply_a.wait()
        assert await reply_b.wait() == "B"
    assert (a.calls, b.calls) == (3, 2)
    assert (reply_a.state, reply_a.attempts) == (JobState.FAILED, 3)
    assert (reply_b.state, reply_b.attempts) == (JobState.DONE, 2)


async def test_the_retry_of_a_task_replaces_that_of_the_pool(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Policies do not multiply; the seed made 3 x 3 = 9 calls."""
    fns = Flaky(math.inf), Flaky(math.inf), Flaky(math.inf)
    async with open_pool(3, retry=Retry(3), unobserved="ignore") as pool:
        await pool.go(
            Task(fns[0]).with_retry(3), Task(fns[1]).with_retry(1), Task(fns[2])
        )
    assert [fn.calls for fn in fns] == [3, 1, 3]


async def test_backoff_grows_and_is_capped(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Waits double up to the maximum; the seed knew no cap."""
    fn = Flaky(5)
    backoff = Backoff(initial=0.25, factor=2.0, maximum=1.0, jitter=0.0)
    async with open_pool(1, retry=Retry(6, backoff)) as pool:
        await pool.process(fn)
    waits = [after - before for before, after in itertools.pairwise(fn.times)]
    assert waits == [0.25, 0.5, 1.0, 1.0, 1.0]


async def test_jitter_is_chance(autojump_clock: trio.testing.MockClock) -> None:
    """No two of many waits are the same; the jitter of the seed was constant."""
    fns = [Flaky(1) for _ in range(20)]
    backoff = Backoff(initial=1.0, jitter=0.5)
    async with open_pool(20, retry=Retry(2, backoff)) as pool:
        await pool.go(*[Task(fn) for fn in fns])
    waits = [fn.times[1] - fn.times[0] for fn in fns]
    assert len(set(waits)) == 20
    assert all(0.5 <= wait <= 1.0 for wait in waits)


async def test_a_pool_wide_retry_without_a_wait(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A wait of 0 seconds is legal for a pool too; the seed panicked."""
    fn = Flaky(2)
    async with open_pool(1, retry=Retry(3, Backoff(initial=0.0))) as pool:
        assert await pool.process(fn, "value") == "value"
    assert (fn.calls, trio.current_time()) == (3, 0.0)


@pytest.mark.parametrize("attempts", [0, -1])
def test_a_pool_of_no_attempts_is_refused(attempts: int) -> None:
    """Zero attempts are refused; the seed ran nothing and reported success."""
    with pytest.raises(ValueError, match="attempts"):
        Retry(attempts)


async def test_one_attempt_is_one_call() -> None:
    """`attempts` counts all tries: one is no retry, and a failure is a failure."""
    fn = Flaky(1)
    async with open_pool(1, retry=Retry(1)) as pool:
        with pytest.raises(TransientError):
            await pool.process(fn)
    assert fn.calls == 1
    assert (pool.statistics().failed, pool.statistics().retries) == (1, 0)


async def test_a_cancelled_retry_is_neither_success_nor_another_call(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Cancellation ends the wait for the next attempt; the seed looked away."""
    fn = Flaky(math.inf)
    retry = Retry(3, Backoff(initial=10.0, jitter=0.0))
    async with open_pool(1, retry=retry) as pool:
        (reply,) = await pool.go(Task(fn))
        with trio.move_on_after(1.5) as scope:
            await pool.process(fn)
        assert scope.cancelled_caught
        assert reply.state is JobState.DELAYED
        assert reply.cancel()
        assert reply.state is JobState.CANCELLED
        with pytest.raises(JobCancelled) as caught:
            await reply.wait()
        assert (caught.value.started, caught.value.attempts) == (True, 1)
    assert fn.calls == 2
    assert trio.current_time() == 1.5
    assert pool.statistics().cancelled == 2


# Closing.


async def test_close_leaves_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """After the block no task is left; Close of the seed did nothing at all."""
    before = living_tasks()
    gauge = Gauge(0.5)
    async with open_pool(3) as pool:
        await pool.go(*[Task(gauge)] * 7)
        assert living_tasks() > before
    assert living_tasks() == before
    assert (gauge.ended, gauge.now) == (7, 0)
    assert pool.closed
    assert pool.workers() == ()
    count = pool.statistics()
    assert (count.workers, count.busy, count.queued, count.delayed) == (0, 0, 0, 0)


async def test_close_waits_for_delayed_tasks_and_retries(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """What was accepted is done before the block is left, however late it comes."""
    fn, later = Flaky(1), Flaky(0)
    async with open_pool(1, retry=Retry(2, Backoff(1.5, jitter=0.0))) as pool:
        await pool.go(Task(fn), Task(later).with_delay(2.5))
    assert (fn.calls, later.times) == (2, [2.5])
    assert pool.statistics().done == 2


async def test_close_cleans_up_what_workers_hold() -> None:
    """Each worker's own cleanup has run when the block has been left."""
    held = 0

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        nonlocal held
        held += 1
        try:
            yield Flaky(0)
        finally:
            held -= 1

    async with open_pool(3, worker=worker) as pool:
        assert held == 3
        assert await pool.map(range(5)) == list(range(5))
    assert held == 0


async def test_close_after_an_error_of_the_block_leaves_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """An error of the block cancels running, waiting and delayed tasks at once."""
    before = living_tasks()
    gauge = Gauge(60.0)
    error = RuntimeError("the block failed")
    with pytest.raises(RuntimeError) as caught:
        async with open_pool(2) as pool:
            replies = await pool.go(*[Task(gauge)] * 4, Task(gauge).with_delay(5.0))
            await wait_all_tasks_blocked()
            raise error
    assert caught.value is error
    assert (living_tasks(), gauge.now, trio.current_time()) == (before, 0, 0.0)
    assert gauge.calls == 2
    assert all(reply.state is JobState.CANCELLED for reply in replies)
    assert balanced(pool.statistics())


async def test_a_closed_pool_takes_no_tasks() -> None:
    """A task given in after the end is refused, and has not started."""
    fn = Flaky(0)
    async with open_pool(1) as pool:
        pass
    with pytest.raises(PoolClosed) as caught:
        await pool.go(Task(fn))
    assert not caught.value.started
    assert fn.calls == 0


# Cancellation.


async def test_a_cancelled_caller_takes_its_running_task_along(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A cancel scope reaches the running function; the seed never looked at it."""
    gauge = Gauge(10.0)
    async with open_pool(1) as pool:
        with trio.move_on_after(1.5) as scope:
            await pool.process(gauge)
        assert scope.cancelled_caught
        assert (gauge.calls, gauge.now, gauge.ended) == (1, 0, 0)
        assert trio.current_time() == 1.5
        # The worker is free for the next one.
        assert await pool.process(Flaky(0), "next") == "next"
    assert pool.statistics().cancelled == 1


async def test_a_cancelled_caller_takes_its_waiting_task_along(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A task whose caller was cancelled while it waited never starts."""
    gauge, never = Gauge(3.0), Gauge(1.0)
    async with open_pool(1) as pool:
        await pool.go(Task(gauge))
        with trio.move_on_after(1.5):
            await pool.process(never)
        assert (pool.statistics().queued, pool.statistics().cancelled) == (0, 1)
    assert never.calls == 0
    assert gauge.ended == 1


async def test_a_cancelled_block_takes_every_task_along(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A scope round the whole pool ends it, at its time, with all it holds."""
    before = living_tasks()
    gauge, flaky = Gauge(10.0), Flaky(math.inf)
    with trio.move_on_after(1.5) as scope:
        async with open_pool(2) as pool:
            await pool.go(
                Task(flaky).with_retry(3, Backoff(10.0, jitter=0.0)),
                *[Task(gauge)] * 5,
            )
            await pool.join()
    assert scope.cancelled_caught
    assert trio.current_time() == 1.5
    assert (gauge.calls, gauge.now, gauge.ended, flaky.calls) == (2, 0, 0, 1)
    assert living_tasks() == before
    count = pool.statistics()
    assert (count.cancelled, count.accepted) == (6, 6)


async def test_a_cancelled_go_leaves_no_part_of_its_batch_behind(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Cancelled while it waits for room, `go` calls off what it had given in."""
    gauge = Gauge(10.0)
    async with open_pool(1, max_backlog=1) as pool:
        with trio.move_on_after(1.5) as scope:
            await pool.go(*[Task(gauge)] * 4)
        assert scope.cancelled_caught
        await pool.join()
        assert trio.current_time() == 1.5
    assert (gauge.calls, gauge.now, gauge.ended) == (1, 0, 0)
    count = pool.statistics()
    assert (count.accepted, count.cancelled) == (2, 2)


# Repetition.


async def test_the_same_pool_batch_after_batch(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Give in, wait, and again: no batch leaves anything for the next one."""
    drain = Drain[int]()
    gauge = Gauge(0.5)
    task = Task(gauge).drain_to(drain)
    async with open_pool(2) as pool:
        tasks = living_tasks()
        for batch in range(1, 6):
            await pool.go(*[task.with_input(batch)] * 4)
            await pool.join()
            assert drain.collect() == [batch] * 4
            assert (trio.current_time(), pool.statistics().busy) == (batch, 0)
            assert living_tasks() == tasks
    assert (gauge.calls, gauge.peak) == (20, 2)


async def test_a_batch_joins_one_that_is_running(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """`go` may follow `go` without a wait between; one wait is for both."""
    gauge = Gauge(0.5)
    async with open_pool(4) as pool:
        await pool.go(*[Task(gauge)] * 2)
        await pool.go(*[Task(gauge)] * 2)
        await pool.join()
        assert (gauge.ended, gauge.peak, trio.current_time()) == (4, 4, 0.5)


async def test_a_pool_that_had_failures_goes_on() -> None:
    """Failed tasks cost the pool nothing: the next batch is served by all workers."""
    gauge = Gauge(0.0)
    async with open_pool(2, unobserved="ignore") as pool:
        await pool.go(*[Task(Flaky(math.inf))] * 10)
        await pool.join()
        assert await pool.map(gauge, range(10)) == list(range(10))
    count = pool.statistics()
    assert (count.failed, count.done, count.restarts) == (10, 10, 0)
    assert gauge.peak == 2
