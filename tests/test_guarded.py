"""Pools under guard: rate, breaker, shared limiter, and waits that would deadlock."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar

import outcome
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_pool import (
    CircuitBreaker,
    CircuitOpen,
    Hooks,
    JobCancelled,
    JobState,
    JobTimeout,
    PoolClosed,
    Rate,
    Retry,
    WorkerCrashed,
    WouldDeadlock,
    open_pool,
)

variable: ContextVar[object] = ContextVar("variable")


class Starts:
    """A handler that notes when each job started, and takes some seconds."""

    def __init__(self, seconds=0.0):
        self.seconds = seconds
        self.times = []
        self.inputs = []

    async def __call__(self, job_input):
        self.times.append(trio.current_time())
        self.inputs.append(job_input)
        await trio.sleep(self.seconds)
        return job_input


async def outcome_of(async_fn, *args, **options):
    """Note what a call gives, whatever that is."""
    try:
        return outcome.Value(await async_fn(*args, **options))
    except Exception as error:
        return outcome.Error(error)


async def crowd(async_fn, inputs, **options):
    """Call with each input, all at the same time; return their outcomes."""
    outcomes = {}

    async def one(index, job_input):
        outcomes[index] = await outcome_of(async_fn, job_input, **options)

    async with trio.open_nursery() as nursery:
        for index, job_input in enumerate(inputs):
            nursery.start_soon(one, index, job_input)
    return [outcomes[index] for index in range(len(outcomes))]


# Rate ---------------------------------------------------------------------


async def test_jobs_start_as_fast_as_the_rate_says_and_no_faster(autojump_clock):
    handler = Starts()
    async with open_pool(4, handler, rate=Rate(2)) as pool:
        for number in range(5):
            pool.submit_nowait(number)
    assert handler.times == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert handler.inputs == list(range(5))


async def test_a_burst_starts_at_once_and_fills_up_again_in_quiet_times(autojump_clock):
    handler = Starts()
    async with open_pool(8, handler, rate=Rate(1, per=0.5, burst=3)) as pool:
        for number in range(5):
            pool.submit_nowait(number)
        await pool.join()
        await trio.sleep(9.0)
        for number in range(4):
            pool.submit_nowait(number)
    assert handler.times == [0.0, 0.0, 0.0, 0.5, 1.0, 10.0, 10.0, 10.0, 10.5]


async def test_jobs_that_wait_for_the_rate_are_queued_beside_idle_workers(
    autojump_clock,
):
    async with open_pool(4, Starts(), rate=Rate(1)) as pool:
        replies = [pool.submit_nowait(number) for number in range(3)]
        await wait_all_tasks_blocked()
        count = pool.statistics()
        assert (count.busy, count.queued, count.delayed, count.done) == (0, 2, 0, 1)
        assert replies[1].state is JobState.QUEUED
        assert replies[1].attempts == 0


async def test_two_pools_share_one_rate(autojump_clock):
    handler = Starts()
    rate = Rate(2, burst=2)
    async with (
        open_pool(3, handler, rate=rate) as one,
        open_pool(3, handler, rate=rate) as other,
    ):
        for number in range(4):
            one.submit_nowait(number)
            other.submit_nowait(number)
        await one.join()
        await other.join()
    assert handler.times == [0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


async def test_the_items_of_a_batch_start_by_the_rate(autojump_clock):
    handler = Starts()
    async with open_pool(4, handler, rate=Rate(2)) as pool:
        assert await pool.map(range(4)) == [0, 1, 2, 3]
        assert handler.times == [0.0, 0.5, 1.0, 1.5]
        settled = await pool.settle(range(2))
        assert [one.outcome.unwrap() for one in settled] == [0, 1]
        async with pool.stream(range(2)) as stream:
            assert [result async for result in stream] == [0, 1]
    # The end of an input takes no token.
    assert handler.times[4:] == [2.0, 2.5, 3.0, 3.5]


async def test_the_rate_keeps_the_order_of_priorities(autojump_clock):
    handler = Starts()
    async with open_pool(3, handler, rate=Rate(1)) as pool:
        pool.submit_nowait("first")
        for number, priority in enumerate((-1, 0, 2, 1, 0)):
            pool.submit_nowait(number, priority=priority)
        await trio.sleep(1.5)
        pool.submit_nowait("late", priority=2)
    assert handler.inputs == ["first", 2, "late", 3, 1, 4, 0]


async def test_the_next_retry_waits_for_the_rate_too(autojump_clock):
    handler = Starts()

    async def fails(job_input):
        await handler(job_input)
        raise OSError

    retry = Retry(3, backoff=lambda number: 0.25)
    async with open_pool(2, fails, rate=Rate(1), retry=retry) as pool:
        with pytest.raises(OSError):
            await pool.process(1)
    assert handler.times == [0.0, 1.0, 2.0]


async def test_a_paused_pool_starts_nothing_and_earns_no_more_than_the_burst(
    autojump_clock,
):
    handler = Starts()
    async with open_pool(4, handler, rate=Rate(1, burst=2)) as pool:
        for number in range(6):
            pool.submit_nowait(number)
        await trio.sleep(1.5)
        assert handler.times == [0.0, 0.0, 1.0]
        pool.pause()
        await trio.sleep(10.0)
        pool.resume()
    assert handler.times == [0.0, 0.0, 1.0, 11.5, 11.5, 12.5]


async def test_a_pause_that_is_over_before_the_next_token_changes_nothing(
    autojump_clock,
):
    handler = Starts()
    async with open_pool(4, handler, rate=Rate(1)) as pool:
        for number in range(3):
            pool.submit_nowait(number)
        await trio.sleep(0.25)
        pool.pause()
        await trio.sleep(0.25)
        pool.resume()
    assert handler.times == [0.0, 1.0, 2.0]


async def test_the_rate_holds_on_the_real_clock_too():
    async with open_pool(2, Starts(), rate=Rate(1, per=3600)) as pool:
        await pool.process("first")
        reply = pool.submit_nowait("second")
        await wait_all_tasks_blocked()
        assert reply.state is JobState.QUEUED
        reply.cancel()


async def test_a_new_job_does_not_take_the_start_of_one_that_waits(autojump_clock):
    handler = Starts()
    async with open_pool(2, handler, rate=Rate(1)) as pool:
        pool.pause()
        pool.submit_nowait("first")
        pool.resume()
        # One worker is on its way to the first, and the other is idle.
        pool.submit_nowait("second")
    assert handler.inputs == ["first", "second"]
    assert handler.times == [0.0, 1.0]


async def test_shutdown_lets_the_rate_have_its_way_within_grace(autojump_clock):
    handler = Starts()
    async with open_pool(4, handler, rate=Rate(1)) as pool:
        replies = [pool.submit_nowait(number) for number in range(6)]
        report = await pool.shutdown(2.5)
    assert handler.times == [0.0, 1.0, 2.0]
    # The first had not started when it closed.
    assert (report.done, report.cancelled, report.unfinished) == (3, 3, 0)
    assert [reply.state for reply in replies[3:]] == [JobState.CANCELLED] * 3


async def test_a_cancelled_job_that_waited_took_no_token(autojump_clock):
    handler = Starts()
    async with open_pool(4, handler, rate=Rate(1)) as pool:
        pool.submit_nowait("first")
        waiting = [pool.submit_nowait(number) for number in range(3)]
        await trio.sleep(0.5)
        for reply in waiting:
            reply.cancel()
        await trio.sleep(4.0)
        await pool.process("late")
    assert handler.times == [0.0, 4.5]


async def test_the_jobs_of_a_lease_take_tokens_too(autojump_clock):
    handler = Starts()
    async with open_pool(2, handler, rate=Rate(1)) as pool, pool.lease() as worker:
        for number in range(3):
            await worker.process(number)
    assert handler.times == [0.0, 1.0, 2.0]


async def test_a_lease_and_the_backlog_share_the_rate_of_the_pool(autojump_clock):
    handler = Starts()
    async with (
        open_pool(2, handler, rate=Rate(1)) as pool,
        pool.lease() as worker,
        trio.open_nursery() as nursery,
    ):
        for _ in range(3):
            nursery.start_soon(worker.process, "leased")
            nursery.start_soon(pool.process, "plain")
    assert handler.times == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


# Breaker ------------------------------------------------------------------


async def obey(job_input):
    """Be a handler that does what its input says."""
    if job_input == "fail":
        raise OSError("failed")
    if job_input == "crash":
        raise SystemExit
    if job_input == "hang":
        await trio.sleep_forever()
    if isinstance(job_input, float):
        await trio.sleep(job_input)
    return job_input


async def break_circuit(pool, breaker):
    """Have jobs fail until the breaker is open."""
    while breaker.state != "open":
        assert isinstance(await outcome_of(pool.process, "fail"), outcome.Error)


async def test_an_open_breaker_refuses_at_once_and_accepts_nothing(autojump_clock):
    breaker = CircuitBreaker(2, open_for=3.0)
    async with open_pool(2, obey, breaker=breaker, name="guarded") as pool:
        await break_circuit(pool, breaker)
        accepted = pool.statistics().accepted
        assert accepted == 2
        await trio.sleep(1.0)
        for method in (pool.process, pool.submit):
            with pytest.raises(CircuitOpen) as caught:
                await method(1)
            assert caught.value.pool == "guarded"
            assert caught.value.reopens_in == 2.0
            assert not caught.value.started
        with pytest.raises(CircuitOpen):
            pool.submit_nowait(1, delay=60.0)
        assert pool.statistics().accepted == accepted
        assert trio.current_time() == 1.0


@pytest.mark.parametrize("size", [1, 3, 50])
@pytest.mark.parametrize("probes", [1, 2])
async def test_of_50_callers_exactly_the_probes_get_through_half_open(
    size, probes, autojump_clock
):
    breaker = CircuitBreaker(1, open_for=1.5, probes=probes)
    async with open_pool(size, obey, breaker=breaker) as pool:
        await break_circuit(pool, breaker)
        await trio.sleep(1.5)
        assert breaker.state == "half_open"
        outcomes = await crowd(pool.process, [0.25] * 50)
        assert outcomes.count(outcome.Value(0.25)) == probes
        refused = [o.error for o in outcomes if isinstance(o, outcome.Error)]
        assert {type(error) for error in refused} == {CircuitOpen}
        assert pool.statistics().accepted == 1 + probes
        assert breaker.state == "closed"
        assert await crowd(pool.process, [0.25] * 5) == [outcome.Value(0.25)] * 5


async def test_a_probe_that_fails_opens_it_again(autojump_clock):
    breaker = CircuitBreaker(1, open_for=1.5)
    async with open_pool(2, obey, breaker=breaker) as pool:
        await break_circuit(pool, breaker)
        await trio.sleep(1.5)
        with pytest.raises(OSError, match="failed"):
            await pool.process("fail")
        with pytest.raises(CircuitOpen) as caught:
            await pool.process(1)
        assert caught.value.reopens_in == 1.5


@pytest.mark.parametrize("where", ["running", "queued", "paused", "room"])
async def test_a_cancelled_probe_gives_its_place_back(where, autojump_clock):
    breaker = CircuitBreaker(1, open_for=1.5)
    async with open_pool(1, obey, breaker=breaker, max_backlog=1) as pool:
        long = pool.submit_nowait("hang")
        broken = pool.submit_nowait("fail")
        if where in ("running", "paused"):
            long.cancel()
            await outcome_of(broken.wait)
        else:
            # The breaker is shared: another pool breaks it.
            broken.cancel()
            async with open_pool(1, obey, breaker=breaker) as other:
                await break_circuit(other, breaker)
        if where == "paused":
            pool.pause()
        await trio.sleep(1.5)
        if where == "room":
            breaker_taken = pool.submit_nowait("waiting")
            breaker_taken.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.process, "hang")
            await wait_all_tasks_blocked()
            assert breaker.statistics().probing == 1
            with pytest.raises(CircuitOpen):
                await pool.process(1)
            nursery.cancel_scope.cancel()
        assert breaker.statistics().probing == 0
        assert breaker.state == "half_open"
        if where == "paused":
            pool.resume()
        long.cancel()
        assert await pool.process(1) == 1
        assert breaker.state == "closed"


async def test_jobs_that_were_queued_when_it_opened_end_as_they_come_to_start(
    autojump_clock,
):
    starts = []

    async def handler(job_input):
        starts.append(job_input)
        return await obey(job_input)

    breaker = CircuitBreaker(1, open_for=60.0)
    async with open_pool(1, handler, breaker=breaker, name="guarded") as pool:
        replies = [pool.submit_nowait("fail")]
        replies += [pool.submit_nowait(number) for number in range(20)]
        assert pool.statistics().queued == 20
        for reply in replies[1:]:
            with pytest.raises(CircuitOpen) as caught:
                await reply.wait()
            assert not caught.value.started
            assert reply.state is JobState.FAILED
            assert reply.attempts == 0
        count = pool.statistics()
        assert (count.failed, count.queued, count.running) == (21, 0, 0)
        with pytest.raises(OSError, match="failed"):
            await replies[0].wait()
    assert starts == ["fail"]


async def test_a_queued_process_hears_that_it_was_refused(autojump_clock):
    breaker = CircuitBreaker(1)
    async with open_pool(1, obey, breaker=breaker) as pool:
        outcomes = await crowd(pool.process, ["fail"] * 10)
    kinds = [type(one.error) for one in outcomes]
    assert kinds.count(OSError) == 1
    assert kinds.count(CircuitOpen) == 9


async def outwait_open_circuit(pool, other, breaker, job):
    """Have a job wait while the circuit opens and closes again; return its reply."""
    pool.submit_nowait(5.0)
    waiting = pool.submit_nowait(job)
    await trio.sleep(0.5)
    await break_circuit(other, breaker)
    await trio.sleep(1.0)
    assert await other.process(1) == 1
    assert breaker.state == "closed"
    return waiting


async def test_queued_jobs_start_if_it_has_closed_again_meanwhile(autojump_clock):
    breaker = CircuitBreaker(1, open_for=1.0)
    async with (
        open_pool(1, obey, breaker=breaker) as pool,
        open_pool(1, obey, breaker=breaker) as other,
    ):
        waiting = await outwait_open_circuit(pool, other, breaker, "waiting")
        assert await waiting.wait() == "waiting"


@pytest.mark.parametrize("limited", [False, True])
async def test_a_job_that_outwaits_an_open_circuit_counts_when_it_fails(
    limited, autojump_clock
):
    breaker = CircuitBreaker(1, open_for=1.0)
    options = {"limiter": trio.CapacityLimiter(1)} if limited else {}
    async with (
        open_pool(1, obey, breaker=breaker, unobserved="ignore", **options) as pool,
        open_pool(1, obey, breaker=breaker) as other,
    ):
        waiting = await outwait_open_circuit(pool, other, breaker, "fail")
        with pytest.raises(OSError, match="failed"):
            await waiting.wait()
        assert breaker.state == "open"


async def test_a_job_that_waits_for_its_retry_fails_if_it_is_open_by_then(
    autojump_clock,
):
    breaker = CircuitBreaker(2, open_for=60.0)
    retry = Retry(5, backoff=lambda number: 1.0)
    async with open_pool(2, obey, breaker=breaker, retry=retry) as pool:
        with pytest.raises(OSError, match="failed") as caught:
            await pool.process("fail")
        # The first attempt and the second: the third was refused.
        assert trio.current_time() == 2.0
        assert any("not tried again" in note for note in caught.value.__notes__)
        count = pool.statistics()
        assert (count.failed, count.retries) == (1, 2)
        assert breaker.state == "open"


async def test_each_attempt_counts_for_the_breaker_and_success_does_not_open_it(
    autojump_clock,
):
    breaker = CircuitBreaker(3, open_for=60.0)
    tries = 0

    async def third_time_lucky(job_input):
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError
        return job_input

    retry = Retry(3, backoff=lambda number: 0.25)
    async with open_pool(1, third_time_lucky, breaker=breaker, retry=retry) as pool:
        assert await pool.process(1) == 1
        assert breaker.statistics().failures == 2
        assert breaker.state == "closed"


async def test_a_retry_that_is_the_probe_closes_it(autojump_clock):
    breaker = CircuitBreaker(1, open_for=1.0)
    tries = 0

    async def second_time_lucky(job_input):
        nonlocal tries
        tries += 1
        if tries < 2:
            raise OSError
        return job_input

    retry = Retry(2, backoff=lambda number: 1.0)
    async with open_pool(1, second_time_lucky, breaker=breaker, retry=retry) as pool:
        # No error is left of the attempt before.
        assert await pool.submit_nowait(1).wait() == 1
        assert breaker.state == "closed"
        assert breaker.statistics().probing == 0


async def test_jobs_that_a_hook_gives_in_for_one_that_is_refused_all_run(
    autojump_clock,
):
    class GivesIn(Hooks):
        def on_job_error(self, event):
            if isinstance(event.error, CircuitOpen):
                breaker.reset()
                replies.extend(pool.submit_nowait(number) for number in range(2))

    breaker = CircuitBreaker(1)
    async with open_pool(
        1, obey, breaker=breaker, hooks=[GivesIn()], unobserved="ignore"
    ) as pool:
        replies = []
        pool.submit_nowait("fail")
        refused = pool.submit_nowait("refused")
        await outcome_of(refused.wait)
        with trio.fail_after(5):
            assert [await reply.wait() for reply in replies] == [0, 1]


@pytest.mark.parametrize("job", ["hang", "crash"])
async def test_timeouts_and_crashes_are_failures_to_the_breaker(job, autojump_clock):
    breaker = CircuitBreaker(1)
    async with open_pool(1, obey, breaker=breaker, timeout=1.5) as pool:
        with pytest.raises((JobTimeout, WorkerCrashed)):
            await pool.process(job)
        assert breaker.state == "open"


async def test_cancelled_jobs_are_no_failures_to_the_breaker(autojump_clock):
    breaker = CircuitBreaker(1)
    async with open_pool(2, obey, breaker=breaker) as pool:
        with trio.move_on_after(0.5):
            await pool.process("hang")
        reply = pool.submit_nowait("hang")
        await wait_all_tasks_blocked()
        reply.cancel()
        with pytest.raises(JobCancelled):
            await reply.wait()
        assert breaker.state == "closed"
        assert breaker.statistics().failures == 0


async def test_map_under_an_open_breaker_fails_and_settle_tells_of_each_item(
    autojump_clock,
):
    breaker = CircuitBreaker(1, open_for=60.0)
    async with open_pool(3, obey, breaker=breaker) as pool:
        await break_circuit(pool, breaker)
        with trio.fail_after(5.0):
            with pytest.raises(ExceptionGroup) as caught:
                await pool.map(range(10))
            only_open, rest = caught.value.split(CircuitOpen)
            assert only_open is not None
            assert rest is None
            settled = await pool.settle(range(10))
        assert [one.item for one in settled] == list(range(10))
        assert {type(one.outcome.error) for one in settled} == {CircuitOpen}
        assert breaker.statistics().probing == 0


async def test_settle_goes_on_with_what_is_let_through(autojump_clock):
    breaker = CircuitBreaker(1, open_for=1.0)
    async with open_pool(1, obey, breaker=breaker) as pool:
        items = [0.25, "fail", 1, 2, 3]
        settled = await pool.settle(items)
        kinds = [type(getattr(one.outcome, "error", None)) for one in settled]
        nothing = type(None)
        assert kinds == [nothing, OSError, CircuitOpen, CircuitOpen, CircuitOpen]
        await trio.sleep(1.0)
        # The probe succeeds, and closes it for those that follow.
        settled = await pool.settle([1, 2, 3])
        assert [one.outcome.unwrap() for one in settled] == [1, 2, 3]


async def test_half_open_lets_exactly_the_probes_of_a_batch_through(autojump_clock):
    breaker = CircuitBreaker(1, open_for=1.5, probes=2)
    async with open_pool(10, obey, breaker=breaker) as pool:
        await break_circuit(pool, breaker)
        await trio.sleep(1.5)
        settled = await pool.settle([0.25] * 50)
        done = [one for one in settled if isinstance(one.outcome, outcome.Value)]
        assert len(done) == 2
        assert breaker.state == "closed"


async def test_pools_that_share_a_breaker_open_and_close_together(autojump_clock):
    breaker = CircuitBreaker(2, open_for=1.5)
    async with (
        open_pool(1, obey, breaker=breaker, name="one") as one,
        open_pool(1, obey, breaker=breaker, name="other") as other,
    ):
        await outcome_of(one.process, "fail")
        await outcome_of(other.process, "fail")
        for pool in (one, other):
            with pytest.raises(CircuitOpen) as caught:
                await pool.process(1)
            assert caught.value.pool == pool.name
        await trio.sleep(1.5)
        probes = await crowd(one.process, [0.25] * 3)
        assert probes.count(outcome.Value(0.25)) == 1
        assert await other.process(1) == 1


async def test_a_leased_worker_is_refused_by_an_open_breaker_too(autojump_clock):
    breaker = CircuitBreaker(1, open_for=1.5)
    async with open_pool(1, obey, breaker=breaker) as pool, pool.lease() as worker:
        with pytest.raises(OSError, match="failed"):
            await worker.process("fail")
        with pytest.raises(CircuitOpen):
            await worker.process(1)
        await trio.sleep(1.5)
        assert await worker.process(1) == 1


async def test_a_closed_pool_with_a_breaker_refuses_the_next_of_a_key(autojump_clock):
    async with (
        open_pool(1, obey, breaker=CircuitBreaker()) as pool,
        trio.open_nursery() as nursery,
    ):
        pool.submit_nowait(1.0, key="key")
        nursery.start_soon(pool.shutdown)
        await wait_all_tasks_blocked()
        with pytest.raises(PoolClosed):
            pool.submit_nowait(2.0, key="key")


async def test_a_refused_job_of_a_lease_takes_no_token_of_the_rate(autojump_clock):
    breaker = CircuitBreaker(1, open_for=2.0)
    async with (
        open_pool(1, obey, breaker=breaker, rate=Rate(1)) as pool,
        pool.lease() as worker,
    ):
        with pytest.raises(OSError, match="failed"):
            await worker.process("fail")
        await trio.sleep(1.5)
        with pytest.raises(CircuitOpen):
            await worker.process("refused")
        await trio.sleep(0.5)
        await worker.process("probe")
        assert trio.current_time() == 2.0


async def test_a_refused_job_takes_no_token_of_the_rate(autojump_clock):
    """What never starts costs no start: the next that may start does so at once."""
    breaker = CircuitBreaker(1, open_for=2.0)
    handler = Starts()

    async def fails_first(job_input):
        await handler(job_input)
        if len(handler.times) == 1:
            raise OSError

    async with open_pool(
        1, fails_first, breaker=breaker, rate=Rate(1, burst=2), unobserved="ignore"
    ) as pool:
        for number in range(3):
            pool.submit_nowait(number)
        await trio.sleep(2.0)
        await pool.process("probe")
        await pool.process("next")
    # The bucket of two is full again at 2.0, unless the refused took from it.
    assert handler.times == [0.0, 2.0, 2.0]


def test_in_another_trio_run_a_rate_and_a_breaker_begin_anew():
    rate, breaker = Rate(1, per=100.0), CircuitBreaker(1)

    async def main():
        async with open_pool(1, obey, rate=rate, breaker=breaker) as pool:
            with pytest.raises(OSError, match="failed"):
                await pool.process("fail")
            assert trio.current_time() == 0.0

    for _ in range(2):
        trio.run(main, clock=MockClock(autojump_threshold=0))


# Limiter ------------------------------------------------------------------


async def test_no_more_jobs_run_than_the_limiter_has_tokens(autojump_clock):
    limiter = trio.CapacityLimiter(2)
    handler = Starts(1.0)
    async with open_pool(5, handler, limiter=limiter) as pool:
        for number in range(6):
            pool.submit_nowait(number)
        await wait_all_tasks_blocked()
        count = pool.statistics()
        assert (count.running, count.queued) == (2, 4)
        assert limiter.borrowed_tokens == 2
    assert sorted(handler.times) == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
    assert handler.inputs[-2:] == [4, 5] or handler.inputs[-2:] == [5, 4]
    assert limiter.borrowed_tokens == 0


async def test_an_idle_pool_holds_no_token(autojump_clock):
    limiter = trio.CapacityLimiter(1)
    async with open_pool(3, Starts(1.0), limiter=limiter) as pool:
        await wait_all_tasks_blocked()
        assert limiter.borrowed_tokens == 0
        await crowd(pool.process, range(5))
        await wait_all_tasks_blocked()
        assert limiter.borrowed_tokens == 0
        assert limiter.statistics().tasks_waiting == 0


async def test_a_limiter_is_shared_with_other_code(autojump_clock):
    limiter = trio.CapacityLimiter(1)
    handler = Starts(1.0)
    async with open_pool(2, handler, limiter=limiter) as pool:
        async with limiter:
            reply = pool.submit_nowait(1)
            await trio.sleep(2.5)
            assert reply.state is JobState.QUEUED
            assert handler.times == []
        await wait_all_tasks_blocked()
        assert handler.times == [2.5]
        async with limiter:
            assert trio.current_time() == 3.5
            assert reply.done


async def test_other_code_gets_its_turn_at_a_busy_limiter(autojump_clock):
    limiter = trio.CapacityLimiter(1)
    async with open_pool(3, Starts(1.0), limiter=limiter, grace=0) as pool:
        for number in range(50):
            pool.submit_nowait(number)
        await wait_all_tasks_blocked()
        with trio.fail_after(5.0):
            async with limiter:
                assert pool.statistics().running == 0


def mortal_workers(handler, cleanup):
    """Make a factory of workers, and the scopes that each of them lives in."""
    scopes = []

    @asynccontextmanager
    async def worker():
        with trio.CancelScope() as scope:
            scopes.append(scope)
            try:
                yield handler
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(cleanup)

    return worker, scopes


async def test_a_probe_that_is_put_back_keeps_its_place_and_no_token(autojump_clock):
    """Its worker is lost after it was handed over and before it has begun."""
    breaker = CircuitBreaker(1, open_for=1.5)
    limiter = trio.CapacityLimiter(1)
    worker, scopes = mortal_workers(obey, cleanup=5.0)
    async with open_pool(1, worker=worker, breaker=breaker, limiter=limiter) as pool:
        await break_circuit(pool, breaker)
        await trio.sleep(1.5)
        scopes[0].cancel()
        reply = pool.submit_nowait("probe")
        assert limiter.borrowed_tokens == 1
        await trio.sleep(2.0)
        assert reply.state is JobState.QUEUED
        assert breaker.statistics().probing == 1
        assert limiter.borrowed_tokens == 0
        assert await reply.wait() == "probe"
        assert breaker.state == "closed"


async def test_an_id_that_was_refused_by_an_open_circuit_is_free(autojump_clock):
    breaker = CircuitBreaker(failures=1, open_for=2.0)
    async with open_pool(1, obey, breaker=breaker) as pool:
        with pytest.raises(OSError):
            await pool.process("fail")
        with pytest.raises(CircuitOpen):
            pool.submit_nowait("job", id="mine")
        await trio.sleep(2)
        assert await pool.submit_nowait("job", id="mine").wait() == "job"


async def test_a_token_that_was_waited_for_in_vain_goes_back_at_once(autojump_clock):
    limiter = trio.CapacityLimiter(1)
    async with open_pool(1, obey, limiter=limiter) as pool:
        for turns in [0, 1, 2, 3] * 10:
            limiter.acquire_on_behalf_of_nowait("other code")
            reply = pool.submit_nowait("job")
            await wait_all_tasks_blocked()
            limiter.release_on_behalf_of("other code")
            # The token is on its way to the worker, farther with each turn.
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            reply.cancel()
            await wait_all_tasks_blocked()
            assert limiter.borrowed_tokens == 0


async def test_a_token_is_not_kept_for_a_worker_that_is_gone(autojump_clock):
    limiter = trio.CapacityLimiter(2)
    async with open_pool(2, Starts(5.0), limiter=limiter) as pool:
        limiter.acquire_on_behalf_of_nowait("other code")
        pool.submit_nowait("running")
        pool.submit_nowait("queued")
        await trio.sleep(1)
        await pool.resize(1)
        limiter.release_on_behalf_of("other code")
        await wait_all_tasks_blocked()
        # The one worker has its job, and none is there for the other.
        assert limiter.borrowed_tokens == 1
        await pool.join()
        assert limiter.borrowed_tokens == 0


async def test_two_pools_share_a_limiter_and_neither_starves(autojump_clock):
    limiter = trio.CapacityLimiter(2)
    running = most = 0

    async def handler(name):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.sleep(1.0)
        running -= 1

    async with (
        open_pool(4, handler, limiter=limiter) as one,
        open_pool(4, handler, limiter=limiter) as other,
    ):
        for number in range(10):
            one.submit_nowait(number)
            other.submit_nowait(number)
        await trio.sleep(5.5)
        # Ten have had the time; they cannot all have been of one pool.
        assert one.statistics().done > 0
        assert other.statistics().done > 0
        await one.join()
        await other.join()
        assert trio.current_time() == 10.0
    assert most == 2
    assert limiter.borrowed_tokens == 0


async def test_the_number_of_tokens_may_change_while_jobs_wait(autojump_clock):
    limiter = trio.CapacityLimiter(1)
    async with open_pool(6, Starts(1.0), limiter=limiter) as pool:
        for number in range(8):
            pool.submit_nowait(number)
        await wait_all_tasks_blocked()
        assert pool.statistics().running == 1
        limiter.total_tokens = 4
        await wait_all_tasks_blocked()
        assert pool.statistics().running == 4
        limiter.total_tokens = 2
        await trio.sleep(1.0)
        await wait_all_tasks_blocked()
        assert pool.statistics().running == 2
        limiter.total_tokens = math.inf
        await wait_all_tasks_blocked()
        assert pool.statistics().running == 4
    assert limiter.borrowed_tokens == 0


async def test_a_job_that_waits_for_its_retry_holds_no_token(autojump_clock):
    limiter = trio.CapacityLimiter(1)
    retry = Retry(2, backoff=lambda number: 5.0)
    async with open_pool(2, obey, limiter=limiter, retry=retry) as pool:
        bad = pool.submit_nowait("fail")
        await wait_all_tasks_blocked()
        assert limiter.borrowed_tokens == 0
        assert await pool.process(1) == 1
        with pytest.raises(OSError, match="failed"):
            await bad.wait()


@pytest.mark.parametrize("how", ["process", "submit", "map", "settle", "stream"])
@pytest.mark.parametrize("end", ["value", "fail", "crash", "timeout", "cancel"])
async def test_no_token_is_leaked_however_jobs_end(how, end, autojump_clock):
    limiter = trio.CapacityLimiter(2)
    job = {"value": 1, "timeout": "hang", "cancel": "hang"}.get(end, end)

    async def act():
        if how == "submit":
            replies = [pool.submit_nowait(job, timeout=timeout) for _ in range(4)]
            try:
                for reply in replies:
                    await outcome_of(reply.wait)
            finally:
                for reply in replies:
                    reply.cancel()
        elif how == "stream":
            async with pool.stream([job] * 4, outcomes=True, timeout=timeout) as stream:
                async for _ in stream:
                    pass
        elif how == "process":
            await crowd(pool.process, [job] * 4, timeout=timeout)
        else:
            await outcome_of(getattr(pool, how), [job] * 4, timeout=timeout)

    timeout = 1.0 if end == "timeout" else None
    async with open_pool(3, obey, limiter=limiter, unobserved="ignore") as pool:
        with trio.move_on_after(2.5 if end == "cancel" else math.inf):
            await act()
        await wait_all_tasks_blocked()
        assert limiter.borrowed_tokens == 0
        assert limiter.statistics().tasks_waiting == 0
        with trio.fail_after(5.0):
            assert await pool.map(range(5)) == list(range(5))
    assert limiter.borrowed_tokens == 0


@pytest.mark.parametrize("grace", [0, 1.5])
async def test_shutdown_gives_all_tokens_back(grace, autojump_clock):
    limiter = trio.CapacityLimiter(2)
    async with open_pool(3, obey, limiter=limiter) as pool:
        for _ in range(5):
            pool.submit_nowait("hang")
        await wait_all_tasks_blocked()
        await pool.shutdown(grace)
        assert limiter.borrowed_tokens == 0
        assert limiter.statistics().tasks_waiting == 0


async def test_a_pool_that_ends_while_it_waits_for_a_token_leaves_the_queue(
    autojump_clock,
):
    limiter = trio.CapacityLimiter(1)
    async with limiter:
        async with open_pool(2, obey, limiter=limiter) as pool:
            pool.submit_nowait(1)
            await wait_all_tasks_blocked()
            pool.cancel()
        assert limiter.statistics().tasks_waiting == 0
    assert limiter.borrowed_tokens == 0


@pytest.mark.parametrize("error", [KeyError, SystemExit])
async def test_an_input_that_fails_leaks_no_token(error, autojump_clock):
    """Its error calls off an item that has a token and has not yet begun."""
    limiter = trio.CapacityLimiter(40)

    def items():
        yield 1
        raise error

    async with open_pool(2, obey, limiter=limiter) as pool:
        # Which of the workers is first is trio's to choose.
        for _ in range(20):
            # Every item has to wait until its worker has changed its context.
            variable.set(object())
            with pytest.raises(error):
                await pool.map(items())
            assert limiter.borrowed_tokens == 0


async def test_a_hook_that_cancels_another_job_leaks_no_token(autojump_clock):
    limiter = trio.CapacityLimiter(40)

    class Canceller(Hooks):
        def on_job_queue(self, event):
            if event.job_id != victim_id:
                victim.cancel()

    victim_id = "victim"
    async with open_pool(2, obey, limiter=limiter, hooks=[Canceller()]) as pool:
        for _ in range(20):
            variable.set(object())
            victim = pool.submit_nowait("hang", id=victim_id)
            assert await pool.map([1]) == [1]
            await wait_all_tasks_blocked()
            assert limiter.borrowed_tokens == 0


async def test_a_token_that_came_for_a_job_that_has_left_goes_back(autojump_clock):
    limiter = trio.CapacityLimiter(1)
    async with open_pool(2, obey, limiter=limiter) as pool:
        async with limiter:
            reply = pool.submit_nowait(1)
            await wait_all_tasks_blocked()
            reply.cancel()
        await wait_all_tasks_blocked()
        assert limiter.borrowed_tokens == 0
        assert await pool.process(1) == 1


async def test_a_leased_worker_that_gives_up_waiting_for_a_token_holds_none(
    autojump_clock,
):
    limiter = trio.CapacityLimiter(1)
    async with open_pool(2, obey, limiter=limiter) as pool, pool.lease() as worker:
        async with limiter:
            with trio.move_on_after(0.5):
                await worker.process(1)
        await wait_all_tasks_blocked()
        assert limiter.borrowed_tokens == 0
        assert await worker.process(2) == 2
        assert limiter.borrowed_tokens == 0


async def test_limiter_and_rate_together_waste_no_token_of_either(autojump_clock):
    limiter = trio.CapacityLimiter(1)
    handler = Starts(1.5)
    async with open_pool(3, handler, limiter=limiter, rate=Rate(1, burst=2)) as pool:
        for number in range(4):
            pool.submit_nowait(number)
        await trio.sleep(0.25)
        assert limiter.borrowed_tokens == 1
    assert handler.times == [0.0, 1.5, 3.0, 4.5]


async def test_who_waits_for_the_rate_holds_no_token_of_the_limiter(autojump_clock):
    limiter = trio.CapacityLimiter(1)
    async with open_pool(3, Starts(), limiter=limiter, rate=Rate(1)) as pool:
        for number in range(3):
            pool.submit_nowait(number)
        await trio.sleep(0.5)
        assert pool.statistics().queued == 2
        assert limiter.borrowed_tokens == 0


async def keep_a_worker(pool):
    async with pool.lease(priority=1):
        await trio.sleep_forever()


async def test_a_lease_leaves_the_rate_to_the_jobs_behind_it(autojump_clock):
    """A lease is no start: what it had no use for is not lost on them."""
    handler = Starts()
    async with open_pool(3, handler, rate=Rate(1)) as pool:
        await pool.process("first")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep_a_worker, pool)
            await wait_all_tasks_blocked()
            for number in range(2):
                pool.submit_nowait(number)
            with trio.fail_after(60.0):
                await pool.join()
            nursery.cancel_scope.cancel()
    assert handler.times == [0.0, 1.0, 2.0]


async def test_a_lease_leaves_the_limiter_to_the_jobs_behind_it(autojump_clock):
    limiter = trio.CapacityLimiter(1)
    async with open_pool(3, obey, limiter=limiter) as pool:
        async with trio.open_nursery() as nursery:
            async with limiter:
                nursery.start_soon(keep_a_worker, pool)
                await wait_all_tasks_blocked()
                for number in range(2):
                    pool.submit_nowait(number)
                await wait_all_tasks_blocked()
            with trio.fail_after(60.0):
                await pool.join()
            nursery.cancel_scope.cancel()
    assert limiter.borrowed_tokens == 0


# Waits inside of jobs -----------------------------------------------------


async def nested_process(pool):
    await pool.process("leaf")


async def nested_reply(pool):
    await pool.submit_nowait("leaf").wait()


async def nested_map(pool):
    await pool.map(["leaf"])


async def nested_settle(pool):
    await pool.settle(["leaf"])


async def nested_stream(pool):
    async with pool.stream(["leaf"]) as stream:
        async for _ in stream:
            pass


async def nested_lease(pool):
    async with pool.lease() as worker:
        await worker.process("leaf")


async def nested_async_map(pool):
    async def leaves():
        yield "leaf"

    await pool.map(leaves())


async def nested_room(pool):
    # There is room for one.
    await pool.submit("leaf")
    await pool.submit("leaf")


async def nested_delayed_reply(pool):
    reply = pool.submit_nowait("leaf", delay=1.5)
    await reply.wait()


async def nested_keyed_process(pool):
    await pool.process("leaf", key="k")


async def nested_in_a_child(pool):
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.process, "leaf")
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


async def nested_in_a_grandchild(pool):
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nested_in_a_child, pool)
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


WAITS = [
    nested_process,
    nested_reply,
    nested_map,
    nested_settle,
    nested_stream,
    nested_lease,
    nested_async_map,
    nested_keyed_process,
    nested_delayed_reply,
    nested_in_a_child,
    nested_in_a_grandchild,
]


class Nest:
    """A handler whose jobs may be functions that wait for their own pool."""

    async def __call__(self, job):
        if callable(job):
            await job(self.pool)
        elif isinstance(job, float):
            await trio.sleep(job)
        return job


@pytest.mark.parametrize("wait", [*WAITS, nested_room])
async def test_a_wait_for_the_only_worker_is_refused(wait, autojump_clock):
    handler = Nest()
    async with open_pool(1, handler, name="small", max_backlog=1) as pool:
        handler.pool = pool
        with trio.fail_after(60.0), pytest.raises(WouldDeadlock, match="small"):
            await pool.process(wait)
        # The pool is as good as before.
        assert await pool.process("next") == "next"


@pytest.mark.parametrize("wait", WAITS)
async def test_a_wait_that_finds_a_free_worker_is_fine(wait, autojump_clock):
    handler = Nest()
    async with open_pool(2, handler) as pool:
        handler.pool = pool
        with trio.fail_after(60.0):
            assert await pool.process(wait) is wait


@pytest.mark.parametrize("wait", WAITS)
async def test_a_wait_for_a_worker_that_will_be_free_is_fine(wait, autojump_clock):
    handler = Nest()
    async with open_pool(2, handler) as pool:
        handler.pool = pool
        pool.submit_nowait(3.0)
        with trio.fail_after(60.0):
            assert await pool.process(wait) is wait
        assert trio.current_time() == 3.0


@pytest.mark.parametrize("wait", WAITS)
async def test_of_two_waits_for_two_workers_exactly_the_newest_is_refused(
    wait, autojump_clock
):
    handler = Nest()
    refused = []

    async def attempt(pool):
        await meeting.wait()
        try:
            await wait(pool)
        except WouldDeadlock as error:
            refused.append(error)

    meeting = trio.Event()
    async with open_pool(2, handler) as pool:
        handler.pool = pool
        with trio.fail_after(60.0):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.process, attempt)
                nursery.start_soon(pool.process, attempt)
                await wait_all_tasks_blocked()
                meeting.set()
    assert len(refused) == 1


@pytest.mark.parametrize("call", ["join", "shutdown", "shrink", "shrink to 0"])
@pytest.mark.parametrize("size", [1, 3])
async def test_a_job_that_waits_for_its_own_end_is_refused_always(
    call, size, autojump_clock
):
    async def wait(pool):
        if call == "shrink":
            await pool.resize(size - 1)
        elif call == "shrink to 0":
            await pool.resize(0)
        else:
            await getattr(pool, call)()

    handler = Nest()
    async with open_pool(size, handler) as pool:
        handler.pool = pool
        with trio.fail_after(60.0), pytest.raises(WouldDeadlock):
            await pool.process(wait)
        assert pool.size == size
        assert not pool.closed
        assert await pool.process("next") == "next"


async def test_a_job_may_let_its_pool_grow_and_then_wait(autojump_clock):
    async def grow(pool):
        await pool.resize(2)
        await pool.process("leaf")

    handler = Nest()
    async with open_pool(1, handler) as pool:
        handler.pool = pool
        with trio.fail_after(60.0):
            await pool.process(grow)


async def test_what_would_have_deadlocked_is_cancelled_and_never_ran(autojump_clock):
    started = []

    async def handler(job):
        started.append(job)
        if job == "outer":
            await pool.process("inner")

    async with open_pool(1, handler) as pool:
        with pytest.raises(WouldDeadlock) as caught:
            await pool.process("outer")
        assert not caught.value.started
        count = pool.statistics()
        assert (count.accepted, count.failed, count.cancelled) == (2, 1, 1)
        assert (count.queued, count.running) == (0, 0)
    assert started == ["outer"]


@pytest.mark.parametrize("call", ["process", "reply"])
async def test_a_job_must_not_wait_for_another_of_its_key(call, autojump_clock):
    async def wait(pool):
        if call == "process":
            await pool.process("leaf", key="k")
        else:
            await pool.submit_nowait("leaf", key="k").wait()

    handler = Nest()
    async with open_pool(4, handler) as pool:
        handler.pool = pool
        with trio.fail_after(60.0):
            with pytest.raises(WouldDeadlock):
                await pool.process(wait, key="k")
            await pool.process(wait, key="other")


async def test_a_pool_of_pools_is_fine(autojump_clock):
    async def inner(job):
        await trio.sleep(0.25)
        return job

    async def outer(job):
        await inner_pool.process(job)
        return await inner_pool.map([job])

    async with open_pool(1, inner) as inner_pool, open_pool(1, outer) as outer_pool:
        with trio.fail_after(60.0):
            assert await outer_pool.map([1, 2]) == [[1], [2]]


async def test_a_pool_that_a_job_opens_for_itself_is_fine(autojump_clock):
    async def leaf(job):
        return job

    async def handler(job):
        async with open_pool(1, leaf) as own:
            result = await own.map([job, job])
            await own.join()
            await own.shutdown()
            return result

    async with open_pool(1, handler) as pool:
        with trio.fail_after(60.0):
            assert await pool.process(1) == [1, 1]


async def test_a_wait_through_another_pool_is_seen(autojump_clock):
    """A job of a pool that was opened inside a job is a part of that job."""

    async def back(job):
        return await pool.process("leaf")

    async def handler(job):
        if job == "leaf":
            return job
        async with open_pool(1, back) as own:
            return await own.process(job)

    async with open_pool(1, handler) as pool:
        with trio.fail_after(60.0), pytest.raises(WouldDeadlock):
            await pool.process("outer")


async def test_a_task_outside_of_the_job_may_wait_for_it(autojump_clock):
    """What a handler starts in a nursery of somebody else is no part of its job."""
    results = []

    async def outside():
        results.append(await pool.process("leaf"))

    async def handler(job):
        if job == "outer":
            nursery.start_soon(outside)
            await trio.sleep(1.0)
        return job

    async with open_pool(1, handler) as pool, trio.open_nursery() as nursery:
        with trio.fail_after(60.0):
            await pool.process("outer")
    assert results == ["leaf"]


# Waits that are over do not count as waits any more: each of these jobs has
# waited for a while, and is doing something else when the other one waits.


async def gave_up_reply(pool):
    with trio.move_on_after(1.0):
        await pool.submit_nowait("leaf").wait()
    await trio.sleep(4.0)


async def gave_up_lease(pool):
    with trio.move_on_after(1.0):
        async with pool.lease():
            pass
    await trio.sleep(4.0)


async def gave_up_process(pool):
    with trio.move_on_after(1.0):
        await pool.process("leaf")
    await trio.sleep(4.0)


async def gave_up_map(pool):
    with trio.move_on_after(1.0):
        await pool.map(["leaf"])
    await trio.sleep(4.0)


async def gave_up_stream(pool):
    with trio.move_on_after(1.0):
        await nested_stream(pool)
    await trio.sleep(4.0)


@pytest.mark.parametrize(
    "give_up",
    [gave_up_reply, gave_up_lease, gave_up_process, gave_up_map, gave_up_stream],
)
async def test_a_wait_that_was_given_up_does_not_count(give_up, autojump_clock):
    async def later(pool):
        await trio.sleep(2.0)
        await pool.process("leaf")

    handler = Nest()
    async with open_pool(2, handler) as pool:
        handler.pool = pool
        with trio.fail_after(60.0):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.process, later)
                nursery.start_soon(pool.process, give_up)
        assert trio.current_time() == 5.0


async def test_a_wait_that_was_given_up_does_not_count_after_its_job(autojump_clock):
    async def given_up(pool):
        with trio.move_on_after(1.0):
            async with pool.lease():
                pass

    handler = Nest()
    async with open_pool(2, handler) as pool:
        handler.pool = pool
        with trio.fail_after(60.0):
            # Both workers in turn, as nobody knows which of them waited.
            for _ in range(2):
                pool.submit_nowait(2.0)
                await pool.process(given_up)
                await pool.join()
            for _ in range(2):
                pool.submit_nowait(2.0)
                await pool.process(nested_process)


async def test_a_wait_for_room_that_was_given_up_does_not_count(autojump_clock):
    async def later(pool):
        await trio.sleep(2.0)
        await pool.process("leaf")

    handler = Nest()
    async with open_pool(2, handler, max_backlog=1) as pool:
        handler.pool = pool
        waiting = pool.submit_nowait(later)
        pool.submit_nowait(gave_up_process)
        filling = pool.submit_nowait("filling")
        await trio.sleep(1.5)
        filling.cancel()
        with trio.fail_after(60.0):
            await waiting.wait()


async def test_a_job_that_has_got_room_for_another_goes_on(autojump_clock):
    """Its wait for room is over when the other job is queued."""

    async def submits(pool):
        await pool.submit("leaf")
        await trio.sleep(4.0)

    async def later(pool):
        await trio.sleep(2.0)
        await pool.process("leaf")

    handler = Nest()
    async with open_pool(2, handler, max_backlog=1) as pool:
        handler.pool = pool
        waiting = pool.submit_nowait(later)
        pool.submit_nowait(submits)
        filling = pool.submit_nowait("filling")
        await trio.sleep(1.5)
        filling.cancel()
        with trio.fail_after(60.0):
            await waiting.wait()


async def test_a_wait_whose_last_other_worker_leaves_is_refused_or_ends(
    autojump_clock,
):
    """Shrinking may take away the worker that would have ended the wait."""
    handler = Nest()
    async with open_pool(2, handler) as pool:
        handler.pool = pool
        pool.submit_nowait(2.0)
        with trio.fail_after(60.0):
            async with trio.open_nursery() as nursery:

                async def wait():
                    # If the worker that leaves is that of the job that waits,
                    # the other one can end the wait.
                    with suppress(WouldDeadlock):
                        await pool.process(nested_process)

                nursery.start_soon(wait)
                await trio.sleep(1.0)
                await pool.resize(1)
        assert await pool.process("next") == "next"


async def test_a_job_that_has_leased_the_last_free_worker_must_not_wait_for_another(
    autojump_clock,
):
    async def lease_and_wait(pool):
        async with pool.lease():
            await pool.process("leaf")

    handler = Nest()
    async with open_pool(2, handler) as pool:
        handler.pool = pool
        with trio.fail_after(60.0), pytest.raises(WouldDeadlock):
            await pool.process(lease_and_wait)
        assert await pool.process("next") == "next"


@pytest.mark.parametrize("size", [1, 2, 4])
async def test_a_chain_of_waits_as_long_as_the_pool_is_refused(size, autojump_clock):
    """Each job waits for the next, and the last finds no worker."""

    async def factorial(n):
        return n * await pool.process(n - 1) if n else 1

    async with open_pool(size, factorial) as pool:
        with trio.fail_after(60.0):
            assert await pool.process(size - 1) == math.factorial(size - 1)
            with pytest.raises(WouldDeadlock):
                await pool.process(size)


@pytest.mark.parametrize("stop", ["shutdown", "cancel"])
async def test_a_leased_job_that_waits_for_its_start_hears_at_once_of_a_closing_pool(
    stop, autojump_clock
):
    heard = []

    async def call(worker):
        with pytest.raises(PoolClosed):
            await worker.process(2)
        heard.append(trio.current_time())

    async with open_pool(1, obey, rate=Rate(1, per=60.0)) as pool:
        async with pool.lease() as worker, trio.open_nursery() as nursery:
            await worker.process(1)
            nursery.start_soon(call, worker)
            await trio.sleep(1)
            if stop == "cancel":
                pool.cancel()
            else:
                await pool.shutdown()
    assert heard == [1]


@pytest.mark.parametrize("ticks", range(4))
async def test_a_pool_that_stops_as_a_token_comes_for_a_dying_worker_keeps_none(
    ticks, autojump_clock
):
    nurseries = []

    @asynccontextmanager
    async def worker():
        async with trio.open_nursery() as nursery:
            nurseries.append(nursery)
            yield obey

    limiter = trio.CapacityLimiter(1)
    limiter.acquire_on_behalf_of_nowait("other code")
    async with open_pool(1, worker=worker, limiter=limiter) as pool:
        async with pool.lease() as leased, trio.open_nursery() as nursery:
            nursery.start_soon(outcome_of, leased.process, 1)
            await wait_all_tasks_blocked()
            limiter.release_on_behalf_of("other code")
            for _ in range(ticks):
                await trio.lowlevel.checkpoint()
            nurseries[0].cancel_scope.cancel()
            pool.cancel()
    assert limiter.borrowed_tokens == 0
