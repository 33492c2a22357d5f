"""Timeouts: whose they are, from when they count, and what wins over them."""

from __future__ import annotations

import math

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_pool import (
    JobCancelled,
    JobState,
    JobTimeout,
    PoolError,
    current_job,
    open_pool,
)


async def sleep(seconds):
    """Be a handler that sleeps, and gives back how long."""
    await trio.sleep(seconds)
    return seconds


async def run(job):
    """Be a handler whose input is what it does."""
    return await job()


class Stopwatch:
    """Virtual seconds since it was made."""

    def __init__(self):
        self.start = trio.current_time()

    def read(self):
        return trio.current_time() - self.start


# Whose timeout ------------------------------------------------------------------


async def test_a_job_that_runs_longer_than_the_pools_timeout_is_cancelled(
    autojump_clock,
):
    async with open_pool(1, sleep, timeout=1.5) as pool:
        watch = Stopwatch()
        with pytest.raises(JobTimeout):
            await pool.process(10)
        assert watch.read() == 1.5
        assert await pool.process(1.25) == 1.25
        count = pool.statistics()
        assert (count.timed_out, count.done, count.restarts) == (1, 1, 0)


async def test_the_time_in_which_a_worker_gets_ready_is_no_part_of_a_jobs_timeout(
    autojump_clock,
):
    class Prepared:
        async def ready(self):
            await trio.sleep(5)

        async def __call__(self, seconds):
            await trio.sleep(seconds)
            return seconds

    async with open_pool(1, Prepared(), timeout=1.5) as pool:
        assert await pool.map([1.25, 1.25]) == [1.25, 1.25]
        assert await pool.process(1.25) == 1.25
        assert pool.statistics().run.max == 1.25


async def test_the_facts_of_a_timeout(autojump_clock):
    async with open_pool(1, sleep, timeout=1.5) as pool:
        reply = await pool.submit(10)
        with pytest.raises(JobTimeout) as caught:
            await reply.wait()
        error = caught.value
        assert isinstance(error, trio.TooSlowError)
        assert isinstance(error, PoolError)
        assert (error.job_id, error.started) == (reply.id, True)
        assert (error.attempts, error.worker) == (1, 0)
        assert error.timeout == 1.5
        assert "1.5" in str(error)
        assert error.__cause__ is None
        assert error.__context__ is None
        assert reply.state is JobState.TIMED_OUT


@pytest.mark.parametrize("timeout", [0.25, 5.0, math.inf])
@pytest.mark.parametrize("method", ["process", "submit", "submit_nowait"])
async def test_the_timeout_of_a_job_replaces_that_of_the_pool(
    method, timeout, autojump_clock
):
    async def call(seconds):
        if method == "process":
            return await pool.process(seconds, timeout=timeout)
        reply = getattr(pool, method)(seconds, timeout=timeout)
        if method == "submit":
            reply = await reply
        return await reply.wait()

    async with open_pool(1, sleep, timeout=1.5) as pool:
        if timeout < 5:
            with pytest.raises(JobTimeout) as caught:
                await call(1)
            assert caught.value.timeout == timeout
        else:
            assert await call(4) == 4
        # The next job has the pool's again.
        with pytest.raises(JobTimeout) as caught:
            await pool.process(4)
        assert caught.value.timeout == 1.5


async def test_a_task_pool_has_timeouts_too(autojump_clock):
    async with open_pool(1, timeout=1.5) as pool:
        with pytest.raises(JobTimeout):
            await pool.process(trio.sleep, 10)
        await pool.process(trio.sleep, 10, timeout=20)
        with pytest.raises(JobTimeout):
            await pool.process(trio.sleep, 10, timeout=0.25)


@pytest.mark.parametrize("timeout", [0, -1, math.nan, -math.inf])
async def test_a_timeout_that_no_job_could_keep_is_refused(timeout):
    with pytest.raises(ValueError, match="timeout"):
        open_pool(1, sleep, timeout=timeout)
    async with open_pool(1, sleep) as pool:
        for method in (pool.process, pool.submit, pool.map, pool.settle):
            with pytest.raises(ValueError, match="timeout"):
                await method([], timeout=timeout)
        with pytest.raises(ValueError, match="timeout"):
            pool.submit_nowait(1, timeout=timeout)
        assert pool.statistics().accepted == 0


@pytest.mark.parametrize("timeout", ["1", True, [1]])
async def test_a_timeout_that_is_no_number_is_refused(timeout):
    with pytest.raises(TypeError, match="timeout"):
        open_pool(1, sleep, timeout=timeout)
    async with open_pool(1, sleep) as pool:
        with pytest.raises(TypeError, match="timeout"):
            await pool.process(1, timeout=timeout)
        assert pool.statistics().accepted == 0


# What wins ------------------------------------------------------------------------


async def test_a_value_wins_over_the_timeout(autojump_clock):
    async def swallow():
        try:
            await trio.sleep(10)
        except trio.Cancelled:
            return "swallowed"

    async with open_pool(1, run, timeout=1.5) as pool:
        watch = Stopwatch()
        assert await pool.process(swallow) == "swallowed"
        assert watch.read() == 1.5
        assert pool.statistics().timed_out == 0
        assert pool.statistics().done == 1
        # The worker has forgotten about it.
        await pool.process(trio.lowlevel.checkpoint)


async def test_an_error_of_the_cleanup_wins_over_the_timeout(autojump_clock):
    error = ValueError("cleanup failed")

    async def fail():
        try:
            await trio.sleep(10)
        finally:
            raise error

    async with open_pool(1, run, timeout=1.5) as pool:
        with pytest.raises(ValueError) as caught:
            await pool.process(fail)
        assert caught.value is error
        assert pool.statistics().failed == 1
        assert pool.statistics().timed_out == 0


async def test_a_shielded_handler_is_waited_for_and_then_timed_out(autojump_clock):
    async def shielded():
        with trio.CancelScope(shield=True):
            await trio.sleep(5)
        await trio.lowlevel.checkpoint()

    async with open_pool(1, run, timeout=1.5) as pool:
        watch = Stopwatch()
        with pytest.raises(JobTimeout):
            await pool.process(shielded)
        assert watch.read() == 5


async def test_a_handler_that_shields_itself_to_its_value_is_not_timed_out(
    autojump_clock,
):
    async def shielded():
        with trio.CancelScope(shield=True):
            await trio.sleep(5)
        return "in the end"

    async with open_pool(1, run, timeout=1.5) as pool:
        assert await pool.process(shielded) == "in the end"
        await pool.process(trio.lowlevel.checkpoint)


@pytest.mark.parametrize("timeout", [math.inf, 1.5, 0.25])
async def test_too_slow_of_the_handler_is_the_handlers_own(timeout, autojump_clock):
    """Only the pool's own timeout makes a `JobTimeout`."""
    raised = []

    async def too_slow():
        try:
            with trio.fail_after(0.125):
                await trio.sleep(10)
        except trio.TooSlowError as error:
            raised.append(error)
            raise

    async with open_pool(1, run, timeout=timeout) as pool:
        with pytest.raises(trio.TooSlowError) as caught:
            await pool.process(too_slow)
        assert caught.value is raised[0]
        assert not isinstance(caught.value, JobTimeout)
        reply = await pool.submit(too_slow)
        with pytest.raises(trio.TooSlowError):
            await reply.wait()
        assert reply.state is JobState.FAILED
        assert pool.statistics().timed_out == 0


async def test_too_slow_of_the_handler_after_its_timeout_is_still_its_own(
    autojump_clock,
):
    error = trio.TooSlowError()

    async def too_slow():
        try:
            await trio.sleep(10)
        except trio.Cancelled:
            raise error from None

    async with open_pool(1, run, timeout=1.5) as pool:
        with pytest.raises(trio.TooSlowError) as caught:
            await pool.process(too_slow)
        assert caught.value is error


async def test_the_deadline_of_the_caller_is_no_timeout(autojump_clock):
    async with open_pool(1, sleep, timeout=1.5) as pool:
        with trio.move_on_after(0.25) as scope:
            await pool.process(10)
        assert scope.cancelled_caught
        with pytest.raises(trio.TooSlowError) as caught:
            with trio.fail_after(0.25):
                await pool.process(10)
        assert not isinstance(caught.value, JobTimeout)
        with trio.move_on_after(5) as scope:
            with pytest.raises(JobTimeout):
                await pool.process(10)
        assert not scope.cancelled_caught
        count = pool.statistics()
        assert (count.cancelled, count.timed_out) == (2, 1)


async def test_a_job_cancelled_before_its_timeout_is_cancelled(autojump_clock):
    async with open_pool(1, sleep, timeout=1.5) as pool:
        reply = await pool.submit(10)
        await trio.sleep(1)
        reply.cancel()
        await trio.sleep(1)
        assert reply.state is JobState.CANCELLED
        assert pool.statistics().timed_out == 0


async def test_the_handler_sees_the_earlier_of_timeout_and_callers_deadline(
    autojump_clock,
):
    async def left():
        return trio.current_effective_deadline() - trio.current_time()

    async with open_pool(1, run) as pool:
        assert await pool.process(left) == math.inf
        assert await pool.process(left, timeout=1.5) == 1.5
        with trio.move_on_after(0.5):
            assert await pool.process(left, timeout=1.5) == 0.5
            assert await pool.process(left, timeout=0.25) == 0.25
            assert await pool.process(left) == 0.5
        assert await pool.process(left) == math.inf
        # A submitted job does not belong to its caller, nor to its deadline.
        with trio.move_on_after(0.5):
            reply = await pool.submit(left, timeout=1.5)
            assert await reply.wait() == 1.5


# From when it counts ----------------------------------------------------------------


async def test_the_time_counts_from_the_start_and_not_from_the_queueing(
    autojump_clock,
):
    async with open_pool(1, sleep, timeout=1.5) as pool:
        watch = Stopwatch()
        replies = [await pool.submit(1.25) for _ in range(5)]
        assert [await reply.wait() for reply in replies] == [1.25] * 5
        assert watch.read() == 6.25
        await pool.submit(1.25)
        reply = await pool.submit(10)
        with pytest.raises(JobTimeout):
            await reply.wait()
        assert watch.read() == 6.25 + 1.25 + 1.5


async def test_the_time_in_a_paused_pool_does_not_count(autojump_clock):
    async with open_pool(1, sleep, timeout=1.5) as pool:
        pool.pause()
        reply = await pool.submit(1.25)
        await trio.sleep(10)
        pool.resume()
        assert await reply.wait() == 1.25


async def test_the_time_that_a_caller_waits_for_room_does_not_count(autojump_clock):
    async with open_pool(1, sleep, timeout=1.5, max_backlog=0) as pool:
        await pool.submit(1.25)
        assert await pool.process(1.25) == 1.25
        with pytest.raises(JobTimeout):
            await pool.process(2)


async def test_each_job_of_a_worker_has_its_whole_time(autojump_clock):
    """A deadline of an earlier job never reaches a later one."""
    async with open_pool(1, sleep) as pool:
        for _ in range(3):
            assert await pool.process(0.25, timeout=1.5) == 0.25
            assert await pool.process(5) == 5
        with pytest.raises(JobTimeout):
            await pool.process(5, timeout=1.5)
        assert await pool.process(5) == 5
        assert await pool.process(1.25, timeout=1.5) == 1.25


async def test_a_job_that_never_sleeps_is_not_timed_out_by_the_one_before(
    autojump_clock,
):
    async def job():
        # Some time passes, so that a wrong start would show.
        await trio.sleep(1)
        return "in time"

    async with open_pool(1, run, timeout=1.5) as pool:
        replies = [await pool.submit(job) for _ in range(6)]
        assert [await reply.wait() for reply in replies] == ["in time"] * 6


# One watchdog -------------------------------------------------------------------------


async def test_different_timeouts_strike_each_at_its_own_time(autojump_clock):
    times = [3.0, 0.5, 2.0, 0.25, 4.0, 1.0, 0.5, 1.5]
    ends = {}

    async def call(number):
        with pytest.raises(JobTimeout) as caught:
            await pool.process(10, timeout=times[number])
        assert caught.value.timeout == times[number]
        ends[number] = watch.read()

    async with open_pool(len(times), sleep) as pool:
        watch = Stopwatch()
        async with trio.open_nursery() as nursery:
            for number in range(len(times)):
                nursery.start_soon(call, number)
    assert ends == dict(enumerate(times))


async def test_a_later_job_with_an_earlier_deadline_is_in_time(autojump_clock):
    ends = []

    async def call(timeout):
        with pytest.raises(JobTimeout):
            await pool.process(10, timeout=timeout)
        ends.append((timeout, watch.read()))

    async with open_pool(3, sleep) as pool:
        watch = Stopwatch()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, 5)
            await trio.sleep(1)
            nursery.start_soon(call, 1.5)
            await trio.sleep(1)
            nursery.start_soon(call, 0.25)
    assert ends == [(0.25, 2.25), (1.5, 2.5), (5, 5)]


async def test_a_timeout_costs_no_task_and_no_timer_of_its_own(autojump_clock):
    async def occupancy(timeout):
        async with open_pool(8, sleep, timeout=timeout) as pool:
            for _ in range(8):
                await pool.submit(0.25)
            await wait_all_tasks_blocked()
            return trio.lowlevel.current_statistics().tasks_living

    assert await occupancy(1.5) == await occupancy(math.inf)


async def test_jobs_that_run_out_of_time_together_end_together(autojump_clock):
    async with open_pool(4, sleep, timeout=1.5) as pool:
        watch = Stopwatch()
        replies = [await pool.submit(10) for _ in range(8)]
        for reply in replies[:4]:
            with pytest.raises(JobTimeout):
                await reply.wait()
        assert watch.read() == 1.5
        for reply in replies[4:]:
            with pytest.raises(JobTimeout):
                await reply.wait()
        assert watch.read() == 3
        assert pool.statistics().timed_out == 8


async def test_no_slot_is_lost_by_timeouts(autojump_clock):
    async with open_pool(2, sleep, timeout=0.25) as pool:
        for _ in range(10):
            with pytest.raises(JobTimeout):
                await pool.process(1)
        watch = Stopwatch()
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(pool.process, 0.125)
        assert watch.read() == 0.125
        assert pool.statistics().restarts == 0


async def test_timeouts_go_on_while_the_pool_closes(autojump_clock):
    async with open_pool(1, sleep, timeout=1.5) as pool:
        replies = [await pool.submit(seconds) for seconds in (10, 1)]
        watch = Stopwatch()
        report = await pool.shutdown()
        assert watch.read() == 2.5
        assert (report.failed, report.done) == (1, 1)
        with pytest.raises(JobTimeout):
            await replies[0].wait()


async def test_a_timeout_that_nobody_read_leaves_the_block(autojump_clock):
    with pytest.raises(ExceptionGroup) as caught:
        async with open_pool(1, sleep, timeout=1.5) as pool:
            await pool.submit(10)
    assert [type(error) for error in caught.value.exceptions] == [JobTimeout]


# Batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["pool", "call"])
async def test_a_timeout_in_map_ends_the_map(whose, autojump_clock):
    timeout = 1.5 if whose == "pool" else math.inf
    options = {} if whose == "pool" else {"timeout": 1.5}
    async with open_pool(2, sleep, timeout=timeout) as pool:
        watch = Stopwatch()
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map([1, 10, 0.25, 0.25, 0.25, 1, 1], **options)
        assert watch.read() == 1.5
        (error,) = caught.value.exceptions
        assert isinstance(error, JobTimeout)
        assert (error.started, error.attempts, error.timeout) == (True, 1, 1.5)
        assert any("10" in note for note in error.__notes__)
        # The rest was called off, not timed out.
        assert pool.statistics().timed_out == 1


async def test_each_item_of_a_map_has_its_whole_time(autojump_clock):
    async with open_pool(1, sleep, timeout=1.5) as pool:
        watch = Stopwatch()
        assert await pool.map([1, 1.25, 1, 1.25]) == [1, 1.25, 1, 1.25]
        assert watch.read() == 4.5
        assert pool.statistics().timed_out == 0


async def test_a_timeout_of_the_call_replaces_the_pools_in_a_map(autojump_clock):
    async with open_pool(2, sleep, timeout=0.25) as pool:
        assert await pool.map([1, 2, 1], timeout=math.inf) == [1, 2, 1]
        assert await pool.map([1, 2, 1], timeout=5) == [1, 2, 1]


async def test_timeouts_in_settle_are_outcomes(autojump_clock):
    async with open_pool(2, sleep, timeout=1.5) as pool:
        results = await pool.settle([1, 10, 0.25, 20, 1.25])
        assert [settled.item for settled in results] == [1, 10, 0.25, 20, 1.25]
        for index in (0, 2, 4):
            assert results[index].outcome.unwrap() == results[index].item
        for index in (1, 3):
            error = results[index].outcome.error
            assert isinstance(error, JobTimeout)
            assert error.timeout == 1.5
        count = pool.statistics()
        assert (count.timed_out, count.done) == (2, 3)
        # The errors of a settle are with its caller, not with different jobs.
        errors = {id(results[index].outcome.error) for index in (1, 3)}
        assert len(errors) == 2


async def test_timeouts_in_a_stream_are_raised_in_their_place(autojump_clock):
    async with open_pool(2, sleep) as pool:
        async with pool.stream([1, 10, 0.25], timeout=1.5) as results:
            assert await anext(results) == 1
            with pytest.raises(JobTimeout):
                await anext(results)
            assert await anext(results) == 0.25
            with pytest.raises(StopAsyncIteration):
                await anext(results)


async def test_a_slow_reader_costs_the_items_of_a_stream_no_time(autojump_clock):
    async with open_pool(1, sleep) as pool:
        async with pool.stream([1, 1, 1], timeout=1.5, ahead=1) as results:
            values = []
            async for value in results:
                values.append(value)
                await trio.sleep(5)
    assert values == [1, 1, 1]


async def test_a_map_whose_caller_runs_out_of_time_is_cancelled(autojump_clock):
    async with open_pool(2, sleep, timeout=1.5) as pool:
        with trio.move_on_after(0.25) as scope:
            await pool.map([10] * 4)
        assert scope.cancelled_caught
        assert pool.statistics().timed_out == 0
        assert await pool.process(1) == 1


async def test_on_the_real_clock_too_each_job_has_its_own_time():
    """The alarm of the first job rings under the second one, in real time."""
    early = trio.current_time()
    seen = []

    async def look(seconds):
        seen.append(trio.current_effective_deadline())
        await trio.sleep(seconds)

    async with open_pool(1, look) as pool:
        # Time enough for a machine that has stalled.
        await pool.process(0, timeout=0.2)
        with trio.fail_after(1_000):
            await pool.process(0.25, timeout=500)
        with pytest.raises(JobTimeout):
            await pool.process(1_000, timeout=0.001)
    late = trio.current_time()
    for deadline, timeout in zip(seen, (0.2, 500, 0.001), strict=True):
        # What is added up may be rounded.
        assert early - 1e-6 <= deadline - timeout <= late + 1e-6


@pytest.mark.parametrize("chance", range(6))
async def test_an_alarm_of_the_last_job_does_not_disturb_one_just_handed_over(
    chance, autojump_clock
):
    """At the very time; whether the worker or the alarm is first is up to trio."""
    async with open_pool(1, sleep) as pool:
        for _ in range(chance + 3):
            assert await pool.process(0, timeout=1) == 0
            await trio.sleep(1)
            assert await pool.process(0.5, timeout=1) == 0.5
            await trio.sleep(2)
        assert pool.statistics().timed_out == 0


async def test_the_deadline_is_shown_anew_after_a_job_that_was_cancelled(
    autojump_clock,
):
    seen = []

    async def look():
        seen.append(trio.current_effective_deadline())

    async def give_up():
        await look()
        current_job().cancel()
        await trio.sleep(1)

    async with open_pool(1, run) as pool:
        with trio.move_on_at(1_000):
            with pytest.raises(JobCancelled):
                await pool.process(give_up)
            await pool.process(look)
    assert seen == [1_000, 1_000]
