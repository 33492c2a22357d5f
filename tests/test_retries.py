"""What a pool does with jobs that are tried again, put off, or that expire."""

from __future__ import annotations

import gc
import logging
import math
import weakref
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar

import pytest
import tenacity
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_pool import (
    Autoscale,
    BacklogFull,
    Backoff,
    CircuitBreaker,
    CircuitOpen,
    Drain,
    Hooks,
    JobCancelled,
    JobDropped,
    JobError,
    JobExpired,
    JobState,
    JobTimeout,
    PoolBroken,
    PoolClosed,
    PoolError,
    Restart,
    Retry,
    Task,
    WorkerCrashed,
    open_pool,
)

ATTEMPTS = 3
WAIT = 0.25
SOON = Retry(ATTEMPTS, Backoff(WAIT, factor=1, jitter=0))
"""Three tries, a quarter of a second apart."""
NOT_SOON = Retry(ATTEMPTS, Backoff(50.0, factor=1, maximum=50.0, jitter=0))
"""For jobs that are to be found while they wait."""


class Failure(Exception):
    """What the jobs here fail with."""


class Crash(Exception):
    """What breaks the worker too."""


class Script:
    """A job that plays its prepared answers, one an attempt, and must use them up.

    An exception is raised, a number is slept for before the next answer is
    looked at, anything else is the result.
    """

    def __init__(self, *answers):
        self.answers = list(answers)
        self.starts = []

    async def __call__(self):
        self.starts.append(trio.current_time())
        while True:
            answer = self.answers.pop(0)
            if isinstance(answer, BaseException):
                raise answer
            if not isinstance(answer, (int, float)):
                return answer
            await trio.sleep(answer)


class Gate:
    """A job that waits to be let through."""

    def __init__(self):
        self.started = 0
        self.open = trio.Event()

    async def __call__(self):
        self.started += 1
        await self.open.wait()
        return "through"


class Told(Hooks):
    """Writes down what is told of every job, as (kind, attempts)."""

    def __init__(self):
        self.kinds = []
        self.events = []

    def on_job_queue(self, event):
        self.kinds.append(event.kind)
        self.events.append(event)

    on_job_start = on_job_complete = on_job_error = on_job_queue
    on_job_cancel = on_job_retry = on_job_drop = on_job_queue


async def run(job):
    """Be the handler of every pool here: the input of a job is what it does."""
    return await job()


async def value():
    return "value"


async def sleep_for_a_second():
    await trio.sleep(1)


def failing():
    """Make a job that fails in every attempt there may be."""
    return Script(*[Failure("again") for _ in range(ATTEMPTS)])


def count(pool):
    """Count the jobs of a pool, whose books must be balanced."""
    books = pool.statistics()
    assert books.accepted == sum(getattr(books, state.value) for state in JobState)
    return books


async def delay_jobs(pool, number, **options):
    """Give in jobs that fail once and then wait for their second try."""
    replies = [pool.submit_nowait(failing(), **options) for _ in range(number)]
    await wait_all_tasks_blocked()
    assert [reply.state for reply in replies] == [JobState.DELAYED] * number
    return replies


def note_of(attempts):
    return f"trio_pool: given up after {attempts} attempts"


# What a retry is ---------------------------------------------------------


@pytest.mark.parametrize("whose", ["pool", "job"])
@pytest.mark.parametrize("call", ["process", "submit", "submit_nowait"])
async def test_a_failed_job_is_tried_again_until_it_has_a_value(
    call, whose, autojump_clock
):
    script = Script(Failure(), Failure(), "third")
    options = {"retry": SOON}
    of_pool, of_job = (options, {}) if whose == "pool" else ({}, options)
    async with open_pool(1, run, **of_pool) as pool:
        result = getattr(pool, call)(script, **of_job)
        if call == "submit":
            result = (await result).wait()
        elif call == "submit_nowait":
            result = result.wait()
        assert await result == "third"
        assert script.starts == [0, WAIT, 2 * WAIT]
        books = count(pool)
        assert (books.accepted, books.done, books.failed) == (1, 1, 0)
        assert (books.retries, books.run.count) == (2, 3)


async def test_the_retry_of_a_job_takes_the_place_of_that_of_the_pool(autojump_clock):
    never = Retry(1)
    script = Script(Failure(), "not reached")
    async with open_pool(1, run, retry=SOON) as pool:
        with pytest.raises(Failure):
            await pool.process(script, retry=never)
        assert len(script.starts) == 1


async def test_given_up_the_last_error_is_raised_itself_with_a_note(autojump_clock):
    errors = [Failure(n) for n in range(ATTEMPTS)]
    async with open_pool(1, run, retry=SOON) as pool:
        with pytest.raises(Failure) as caught:
            await pool.process(Script(*errors))
        assert caught.value is errors[-1]
        assert caught.value.__notes__ == [note_of(3)]
        assert not any(hasattr(error, "__notes__") for error in errors[:-1])
        assert (count(pool).failed, count(pool).retries) == (1, 2)


@pytest.mark.parametrize("retry", [Retry(1), Retry(3, on=KeyError)])
async def test_an_error_of_the_only_attempt_has_no_note(retry, autojump_clock):
    async with open_pool(1, run, retry=retry) as pool:
        with pytest.raises(Failure) as caught:
            await pool.process(Script(Failure()))
        assert not hasattr(caught.value, "__notes__")


async def test_an_error_that_ends_the_retries_early_is_noted_with_the_attempts(
    autojump_clock,
):
    retry = Retry(9, lambda _: WAIT, on=KeyError)
    async with open_pool(1, run, retry=retry) as pool:
        with pytest.raises(Failure) as caught:
            await pool.process(Script(KeyError(), KeyError(), Failure()))
        assert caught.value.__notes__ == [note_of(3)]


async def test_the_backoff_is_asked_by_the_number_of_the_wait(autojump_clock):
    asked = []

    def backoff(number):
        asked.append(number)
        return 2.0**number

    script = Script(Failure(), Failure(), Failure(), "fourth")
    async with open_pool(1, run) as pool:
        assert await pool.process(script, retry=Retry(4, backoff)) == "fourth"
    assert asked == [0, 1, 2]
    assert script.starts == [0, 1, 3, 7]


async def test_a_wait_of_nothing_is_no_attempt_too_few(autojump_clock):
    script = Script(*[Failure()] * 20, "at last")
    async with open_pool(1, run) as pool:
        retry = Retry(math.inf, lambda _: 0)
        assert await pool.process(script, retry=retry) == "at last"
    assert script.starts == [0] * 21


async def test_a_stop_of_tenacity_hears_the_seconds_since_the_first_start(
    autojump_clock,
):
    starts = []

    async def handler(_):
        starts.append(trio.current_time())
        raise Failure

    retry = Retry(tenacity.stop_after_delay(1.5), lambda _: 0.5)
    await trio.sleep(5)
    async with open_pool(1, handler, retry=retry) as pool:
        with pytest.raises(Failure):
            await pool.process(None)
    assert starts == [5.0, 5.5, 6.0, 6.5]


async def test_retries_beyond_the_bound_leave_a_worker_to_a_job_that_cannot_pass_it(
    autojump_clock,
):
    failed = set()

    async def handler(job):
        if job != "quick" and job not in failed:
            failed.add(job)
            raise Failure
        return job

    retry = Retry(2, lambda _: 5.0)
    async with open_pool(2, handler, max_backlog=1, retry=retry) as pool:
        replies = [pool.submit_nowait(number) for number in range(2)]
        await trio.sleep(1)
        assert pool.statistics().delayed == 2
        # One more that fails would be as many as the workers, and that is allowed.
        assert await pool.process("quick") == "quick"
        assert trio.current_time() == 1
        assert [await reply.wait() for reply in replies] == [0, 1]
        assert trio.current_time() == 5


async def test_the_waiting_job_holds_no_worker(autojump_clock):
    async with open_pool(1, run, retry=SOON) as pool:
        reply = await pool.submit(Script(Failure(), "second"))
        await wait_all_tasks_blocked()
        books = count(pool)
        assert (books.delayed, books.queued, books.running) == (1, 0, 0)
        assert (books.busy, books.retries) == (0, 1)
        assert await pool.process(value) == "value"
        assert trio.current_time() == 0
        assert await reply.wait() == "second"


async def test_each_attempt_has_the_whole_timeout(autojump_clock):
    script = Script(1.0, Failure(), 1.0, Failure(), 1.0, "third")
    async with open_pool(1, run, timeout=1.5, retry=SOON) as pool:
        assert await pool.process(script) == "third"
        assert script.starts == [0, 1.25, 2.5]


async def test_an_attempt_that_ran_out_of_time_is_tried_again(autojump_clock):
    script = Script(9.0, "second")
    # The second attempt goes on where the script was left: it has a value.
    async with open_pool(1, run, timeout=1.5, retry=SOON) as pool:
        assert await pool.process(script) == "second"
        assert script.starts == [0, 1.75]
        books = count(pool)
        assert (books.done, books.timed_out, books.retries) == (1, 0, 1)


async def test_a_job_that_runs_out_of_time_each_time_is_timed_out(autojump_clock):
    async with open_pool(1, run, timeout=0.5, retry=SOON) as pool:
        with pytest.raises(JobTimeout) as caught:
            await pool.process(Script(9, 9, 9))
        assert (caught.value.attempts, caught.value.started) == (3, True)
        assert caught.value.__notes__ == [note_of(3)]
        assert (count(pool).timed_out, count(pool).retries) == (1, 2)
        assert trio.current_time() == 2.0


async def test_the_context_of_the_caller_is_seen_by_every_attempt(autojump_clock):
    variable, seen = ContextVar("variable", default=0), []

    async def look():
        seen.append(variable.get())
        if len(seen) < 3:
            raise Failure

    async with open_pool(1, run, retry=SOON) as pool:
        variable.set(5)
        reply = await pool.submit(look)
        variable.set(6)
        await reply.wait()
    assert seen == [5, 5, 5]


async def test_the_error_of_an_attempt_is_not_the_error_of_the_job(autojump_clock):
    async with open_pool(1, run, retry=SOON) as pool:
        reply = await pool.submit(Script(Failure(), "second"))
        await wait_all_tasks_blocked()
        assert (reply.done, reply.outcome) == (False, None)
        assert await reply.wait() == "second"
        assert reply.outcome.unwrap() == "second"


async def test_the_failure_of_a_retried_submit_that_nobody_read_is_raised(
    autojump_clock,
):
    with pytest.raises(ExceptionGroup) as caught:
        async with open_pool(1, run, retry=SOON) as pool:
            await pool.submit(failing())
    (error,) = caught.value.exceptions
    assert isinstance(error, Failure)
    assert error.__notes__[0] == note_of(3)


async def test_an_attempt_that_failed_is_nobodys_to_read(autojump_clock):
    async with open_pool(1, run, retry=SOON) as pool:
        await pool.submit(Script(Failure(), "second"))
    assert count(pool).done == 1


# Where a job is ----------------------------------------------------------


async def test_reply_shows_every_state_on_the_way(autojump_clock):
    script, seen = Script(0.5, Failure(), 0.5, "second"), []
    async with open_pool(1, run, retry=SOON) as pool:
        gate = Gate()
        await pool.submit(gate)
        await wait_all_tasks_blocked()
        reply = await pool.submit(script)
        seen.append((reply.state, reply.attempts, reply.done))
        gate.open.set()
        for _ in range(4):
            await wait_all_tasks_blocked()
            seen.append((reply.state, reply.attempts, reply.done))
            if not reply.done:
                await trio.sleep(0.5 if reply.state is JobState.RUNNING else WAIT)
        assert await reply.wait() == "second"
    assert seen == [
        (JobState.QUEUED, 0, False),
        (JobState.RUNNING, 1, False),
        (JobState.DELAYED, 1, False),
        (JobState.RUNNING, 2, False),
        (JobState.DONE, 2, True),
    ]


async def test_a_due_job_is_queued_while_all_workers_are_busy(autojump_clock):
    gate = Gate()
    async with open_pool(1, run, retry=SOON) as pool:
        reply = await pool.submit(Script(Failure(), "second"))
        await wait_all_tasks_blocked()
        busy = await pool.submit(gate)
        await trio.sleep(1)
        assert reply.state is JobState.QUEUED
        assert (count(pool).delayed, count(pool).queued) == (0, 1)
        gate.open.set()
        assert await reply.wait() == "second"
        assert await busy.wait() == "through"


async def test_hooks_hear_of_every_attempt_and_of_one_end(autojump_clock):
    told = Told()
    async with open_pool(1, run, retry=SOON, hooks=[told]) as pool:
        errors = [Failure(1), Failure(2)]
        await pool.process(Script(*errors, "third"))
    assert told.kinds == [
        "job_queue",
        "job_start",
        "job_retry",
        "job_start",
        "job_retry",
        "job_start",
        "job_complete",
    ]
    retries = [event for event in told.events if event.kind == "job_retry"]
    assert [event.delay for event in retries] == [WAIT] * 2
    assert [event.error for event in retries] == errors
    assert [event.attempts for event in retries] == [1, 2]
    assert {event.state for event in retries} == {JobState.DELAYED}
    assert all(e.delay is None for e in told.events if e.kind != "job_retry")
    assert len({event.job_id for event in told.events}) == 1


async def test_a_hook_may_cancel_the_job_that_it_hears_is_tried_again(autojump_clock):
    class CancelIt(Hooks):
        def on_job_retry(self, event):
            assert reply.cancel()

    async with open_pool(1, run, retry=SOON, hooks=[CancelIt()]) as pool:
        script = failing()
        reply = pool.submit_nowait(script)
        with pytest.raises(JobCancelled):
            await reply.wait()
        assert len(script.starts) == 1
        assert (count(pool).cancelled, count(pool).delayed) == (1, 0)
        assert await pool.process(value) == "value"


async def test_the_oldest_wait_of_a_delayed_job_is_what_it_has_waited(autojump_clock):
    async with open_pool(1, run, retry=NOT_SOON) as pool:
        reply = await pool.submit(Script(10, Failure()))
        await trio.sleep(10.5)
        assert reply.state is JobState.DELAYED
        assert pool.statistics().oldest_wait == 0.5
        reply.cancel()


async def test_the_oldest_wait_of_a_delayed_item_is_what_it_has_waited(autojump_clock):
    async with open_pool(1, run) as pool, trio.open_nursery() as nursery:
        await trio.sleep(10)
        nursery.start_soon(lambda: pool.map([failing()], retry=NOT_SOON))
        await trio.sleep(0.5)
        assert pool.statistics().oldest_wait == 0.5
        nursery.cancel_scope.cancel()


# What is never tried again -----------------------------------------------


async def test_a_job_cancelled_through_its_reply_is_not_tried_again(autojump_clock):
    async def fail_when_cancelled():
        starts.append(True)
        try:
            await trio.sleep_forever()
        finally:
            raise Failure

    starts = []
    async with open_pool(1, run, retry=SOON) as pool:
        reply = await pool.submit(fail_when_cancelled)
        await wait_all_tasks_blocked()
        assert reply.cancel()
        with pytest.raises(Failure):
            await reply.wait()
        assert starts == [True]
        assert count(pool).retries == 0


async def test_a_job_whose_caller_was_cancelled_is_not_tried_again(autojump_clock):
    async def fail_when_cancelled():
        starts.append(True)
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            raise Failure from None

    starts = []
    async with open_pool(1, run, retry=SOON) as pool:
        with pytest.raises(Failure), trio.move_on_after(0.5):
            await pool.process(fail_when_cancelled)
        assert starts == [True]
        assert count(pool).retries == 0


async def test_a_job_that_fails_because_the_pool_stops_is_not_tried_again(
    autojump_clock,
):
    async def fail_when_cancelled():
        starts.append(True)
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            raise Failure from None

    starts = []
    async with open_pool(1, run, retry=SOON, unobserved="ignore") as pool:
        reply = await pool.submit(fail_when_cancelled)
        await wait_all_tasks_blocked()
        pool.cancel()
    assert reply.state is JobState.FAILED
    assert starts == [True]
    assert count(pool).retries == 0


async def test_a_deadline_of_the_caller_ends_the_wait_for_the_next_try(autojump_clock):
    script = failing()
    async with open_pool(1, run, retry=NOT_SOON) as pool:
        with trio.move_on_after(1.5) as scope:
            await pool.process(script)
        assert scope.cancelled_caught
        assert trio.current_time() == 1.5
        assert (count(pool).cancelled, count(pool).delayed) == (1, 0)
    assert len(script.starts) == 1
    assert trio.current_time() == 1.5


async def test_reply_cancel_ends_a_delayed_job_at_once(autojump_clock):
    async with open_pool(1, run) as pool:
        (reply,) = await delay_jobs(pool, 1, retry=NOT_SOON)
        assert reply.cancel()
        assert reply.state is JobState.CANCELLED
        assert not reply.cancel()
        with pytest.raises(JobCancelled) as caught:
            await reply.wait()
        assert (caught.value.started, caught.value.attempts) == (True, 1)
        assert caught.value.worker == 0
        assert (count(pool).cancelled, count(pool).delayed) == (1, 0)
    assert trio.current_time() == 0


async def test_reply_cancel_of_a_job_with_a_delay_says_that_it_never_started(
    autojump_clock,
):
    async with open_pool(1, run) as pool:
        reply = await pool.submit(value, delay=50)
        assert reply.cancel()
        with pytest.raises(JobCancelled) as caught:
            await reply.wait()
        assert (caught.value.started, caught.value.attempts) == (False, 0)
        assert caught.value.worker is None
    assert trio.current_time() == 0


# Crashes -----------------------------------------------------------------


async def crash_the_worker():
    raise SystemExit


@pytest.mark.parametrize("on", [Exception, (Exception, KeyError), Failure])
async def test_a_job_whose_worker_died_is_not_tried_again_unasked(on, autojump_clock):
    async with open_pool(1, run, retry=Retry(3, lambda _: WAIT, on)) as pool:
        with pytest.raises(WorkerCrashed) as caught:
            await pool.process(Script(SystemExit(), "not reached"))
        assert caught.value.attempts == 1
        assert (count(pool).lost, count(pool).retries) == (1, 0)
        assert await pool.process(value) == "value"


@pytest.mark.parametrize(
    "on",
    [WorkerCrashed, JobError, PoolError, lambda error: isinstance(error, JobError)],
    ids=["WorkerCrashed", "JobError", "PoolError", "predicate"],
)
async def test_a_job_whose_worker_died_is_tried_again_if_the_policy_names_it(
    on, autojump_clock
):
    script = Script(SystemExit(), SystemExit(), "third")
    async with open_pool(1, run, retry=Retry(3, lambda _: WAIT, on)) as pool:
        assert await pool.process(script) == "third"
        books = count(pool)
        assert (books.done, books.lost, books.retries, books.restarts) == (1, 0, 2, 2)


async def test_a_job_that_kills_its_worker_each_time_is_lost_with_its_attempts(
    autojump_clock,
):
    retry = Retry(3, lambda _: WAIT, WorkerCrashed)
    async with open_pool(1, run, retry=retry) as pool:
        with pytest.raises(WorkerCrashed) as caught:
            await pool.process(Script(*[SystemExit()] * 3))
        assert (caught.value.attempts, caught.value.started) == (3, True)
        assert caught.value.__notes__ == [note_of(3)]
        assert isinstance(caught.value.__cause__, SystemExit)
        assert (count(pool).lost, count(pool).retries) == (1, 2)
        assert await pool.process(value) == "value"


async def test_an_error_of_crash_on_replaces_the_worker_and_the_job_is_tried_again(
    autojump_clock,
):
    entered = []

    @asynccontextmanager
    async def worker():
        entered.append(trio.current_time())
        yield run

    script = Script(Crash(), "second")
    async with open_pool(1, worker=worker, crash_on=Crash, retry=SOON) as pool:
        assert await pool.process(script) == "second"
        assert count(pool).restarts == 1
        assert (count(pool).retries, count(pool).done) == (1, 1)
    assert len(entered) == 2
    assert script.starts == [0, WAIT]


async def test_a_retry_that_is_due_before_its_worker_is_back_waits_for_it(
    autojump_clock,
):
    script = Script(Crash(), Crash(), "third")
    restart = Restart(backoff=lambda _: 1.5)
    async with open_pool(1, run, crash_on=Crash, retry=SOON, restart=restart) as pool:
        reply = await pool.submit(script)
        await trio.sleep(1)
        assert reply.state is JobState.QUEUED
        assert await reply.wait() == "third"
    # The first restart is at once, the next after its own backoff.
    assert script.starts == [0, WAIT, WAIT + 1.5]


async def test_crashes_of_retried_jobs_spend_the_budget_and_break_the_pool(
    autojump_clock, caplog
):
    retry = Retry(math.inf, lambda _: WAIT)
    with pytest.raises(PoolBroken):
        async with open_pool(
            1, run, crash_on=Crash, retry=retry, restart=Restart(limit=2)
        ) as pool:
            reply = await pool.submit(Script(*[Crash() for _ in range(9)]))
            await trio.sleep_forever()
    assert count(pool).delayed == 0
    with pytest.raises(PoolBroken) as caught:
        await reply.wait()
    assert (caught.value.job_id, caught.value.attempts) == (reply.id, 3)
    assert caught.value.started


# Policies that misbehave -------------------------------------------------


def raise_something(_):
    raise ZeroDivisionError("of the policy")


BAD_POLICIES = [
    Retry(3, raise_something),
    Retry(3, lambda _: -1),
    Retry(3, lambda _: math.nan),
    Retry(3, lambda _: math.inf),
    Retry(3, lambda _: "soon"),
    Retry(3, lambda _: WAIT, raise_something),
]


async def test_a_policy_is_not_asked_about_a_job_that_was_cancelled(autojump_clock):
    async def fail_when_cancelled():
        try:
            await trio.sleep_forever()
        finally:
            raise Failure

    asked = []
    retry = Retry(3, lambda _: 1.0, on=lambda error: asked.append(error))
    async with open_pool(1, run, retry=retry) as pool:
        reply = await pool.submit(fail_when_cancelled)
        await wait_all_tasks_blocked()
        reply.cancel()
        with pytest.raises(Failure):
            await reply.wait()
        assert asked == []


@pytest.mark.parametrize("whom", ["job", "pool"])
async def test_nothing_of_an_attempt_is_in_the_error_of_a_job_cancelled_after_it(
    whom, autojump_clock
):
    async def attempt():
        raise Failure

    async with open_pool(1, run, retry=SOON, unobserved="ignore") as pool:
        reply = await pool.submit(attempt)
        await wait_all_tasks_blocked()
        assert reply.state is JobState.DELAYED
        (reply if whom == "job" else pool).cancel()
    with pytest.raises(JobCancelled) as caught:
        await reply.wait()
    assert "attempt" not in [entry.name for entry in caught.traceback]
    error = caught.value
    assert (error.started, error.attempts, error.worker) == (True, 1, 0)


async def test_an_item_is_tried_again_in_time_while_others_are_pulled(autojump_clock):
    async def handler(item):
        starts.append((item, trio.current_time()))
        await trio.sleep({"fails": 0.5, "long": 50.0}.get(item, 1.0))
        if item == "fails" and len(starts) < 5:
            raise Failure

    starts = []
    retry = Retry(2, lambda _: 2.0)
    async with open_pool(2, handler, retry=retry) as pool:
        await pool.map(["fails", "short", "long", *["short"] * 20])
    # At 2.5 it was due; at 3 it was the turn of another item, as they take turns.
    assert [when for item, when in starts if item == "fails"] == [0.0, 4.0]


async def test_an_autoscaled_pool_without_workers_goes_on_with_its_retries(
    autojump_clock,
):
    scale = Autoscale(min=0, max=1, interval=0.25)
    with trio.fail_after(100):
        async with open_pool(0, run, retry=SOON, scale=scale) as pool:
            reply = await pool.submit(Script(5, Failure(), "at last"))
            await trio.sleep(1)
            with trio.move_on_after(0.25):
                await pool.resize(0)
        assert await reply.wait() == "at last"


@pytest.mark.parametrize(
    "retry", BAD_POLICIES, ids=["raises", "-1", "nan", "inf", "str", "on raises"]
)
@pytest.mark.parametrize("call", ["process", "submit", "map"])
async def test_a_job_with_a_bad_policy_fails_by_its_own_error_and_it_is_logged(
    call, retry, autojump_clock, caplog
):
    error = Failure("of the job")
    script = Script(error, "not reached")
    async with open_pool(1, run, retry=retry) as pool:
        with pytest.raises((Failure, ExceptionGroup)) as caught:
            if call == "process":
                await pool.process(script)
            elif call == "submit":
                await (await pool.submit(script)).wait()
            else:
                await pool.map([script])
        if call == "map":
            assert caught.value.exceptions == (error,)
        else:
            assert caught.value is error
        records = [r for r in caplog.records if r.levelno >= logging.ERROR]
        assert len(records) == 1
        assert records[0].exc_info is not None
        books = count(pool)
        assert (books.failed, books.retries, books.restarts) == (1, 0, 0)
        assert await pool.process(value) == "value"
    assert len(script.starts) == 1


async def test_a_policy_that_turns_bad_ends_the_job_by_its_last_error(
    autojump_clock, caplog
):
    waits = iter([WAIT])
    async with open_pool(1, run) as pool:
        with pytest.raises(Failure, match="2"):
            await pool.process(
                Script(Failure(1), Failure(2)), retry=Retry(9, lambda _: next(waits))
            )
        assert (count(pool).failed, count(pool).retries) == (1, 1)
        assert caplog.records


async def test_an_error_that_takes_no_notes_is_given_up_all_the_same(autojump_clock):
    class Bare(Exception):
        def add_note(self, note):
            raise TypeError("no notes here")

    async with open_pool(1, run, retry=SOON) as pool:
        with pytest.raises(Bare):
            await pool.process(Script(Bare(), Bare(), Bare()))


async def test_a_breaker_that_refuses_a_retry_ends_the_job_by_its_last_error(
    autojump_clock,
):
    error = Failure()
    breaker = CircuitBreaker(failures=1, open_for=60)
    async with open_pool(1, run, retry=SOON, breaker=breaker) as pool:
        with pytest.raises(Failure) as caught:
            await pool.process(Script(error, "not reached"))
        assert caught.value is error
        assert len(error.__notes__) == 1
        assert trio.current_time() == WAIT
        assert (count(pool).failed, count(pool).retries) == (1, 1)
        with pytest.raises(CircuitOpen):
            await pool.process(value)


async def test_a_breaker_that_refuses_an_error_without_notes_breaks_no_pool(
    autojump_clock,
):
    class Bare(Exception):
        def add_note(self, note):
            raise TypeError("no notes here")

    breaker = CircuitBreaker(failures=1, open_for=60)
    async with open_pool(1, run, retry=SOON, breaker=breaker) as pool:
        with pytest.raises(Bare):
            await pool.process(Script(Bare()))
        breaker.reset()
        assert await pool.process(value) == "value"


# Delay and ttl -----------------------------------------------------------


@pytest.mark.parametrize("call", ["submit", "submit_nowait"])
async def test_a_job_with_a_delay_starts_that_long_after_its_call(call, autojump_clock):
    script = Script("value")
    async with open_pool(1, run) as pool:
        await trio.sleep(1)
        reply = getattr(pool, call)(script, delay=1.5)
        if call == "submit":
            reply = await reply
        assert reply.state is JobState.DELAYED
        books = count(pool)
        assert (books.delayed, books.queued, books.busy) == (1, 0, 0)
        assert await reply.wait() == "value"
    assert script.starts == [2.5]


async def test_the_delay_goes_on_while_the_job_waits_for_room(autojump_clock):
    script = Script("value")
    async with open_pool(1, run, max_backlog=1) as pool:
        await pool.submit(sleep_for_a_second)
        await pool.submit(value)
        reply = await pool.submit(script, delay=1.5)
        assert trio.current_time() == 1
        await reply.wait()
    assert script.starts == [1.5]


async def test_jobs_with_a_delay_start_by_their_time_not_by_their_turn(autojump_clock):
    ended = []

    def job(name):
        async def note():
            ended.append((name, trio.current_time()))

        return note

    async with open_pool(1, run) as pool:
        for name, delay in (("late", 1.5), ("early", 0.25), ("now", 0), ("mid", 1)):
            await pool.submit(job(name), delay=delay)
    assert ended == [("now", 0), ("early", 0.25), ("mid", 1), ("late", 1.5)]


async def test_a_job_with_a_delay_is_tried_again_without_it(autojump_clock):
    script = Script(Failure(), "second")
    async with open_pool(1, run) as pool:
        await (await pool.submit(script, delay=1.5, retry=SOON)).wait()
    assert script.starts == [1.5, 1.75]


@pytest.mark.parametrize("call", ["submit", "submit_nowait"])
async def test_a_delay_in_a_pool_where_no_job_may_wait_is_refused(call, autojump_clock):
    async with open_pool(1, run, max_backlog=0) as pool:
        with pytest.raises(ValueError, match="delay"):
            result = getattr(pool, call)(value, delay=1)
            if call == "submit":
                await result
        assert count(pool).accepted == 0


async def test_a_job_that_waits_longer_than_its_ttl_expires(autojump_clock):
    told, script = Told(), Script("not reached")
    async with open_pool(1, run, hooks=[told]) as pool:
        await pool.submit(sleep_for_a_second)
        reply = await pool.submit(script, ttl=0.25)
        with pytest.raises(JobExpired) as caught:
            await reply.wait()
        assert trio.current_time() == 0.25
        assert (caught.value.started, caught.value.attempts) == (False, 0)
        assert caught.value.job_id == reply.id
        assert reply.state is JobState.EXPIRED
        assert count(pool).expired == 1
        assert told.kinds[-1] == "job_drop"
        assert told.events[-1].error is caught.value
    assert script.starts == []


async def test_a_job_that_has_started_never_expires(autojump_clock):
    async with open_pool(1, run) as pool:
        running = await pool.submit(Script(1, "ran"), ttl=0.25)
        retried = await pool.submit(
            Script(Failure(), Failure(), "tried"), ttl=1.5, retry=SOON
        )
        assert await running.wait() == "ran"
        assert await retried.wait() == "tried"
        assert trio.current_time() == 1.5
        assert count(pool).expired == 0


async def test_a_job_whose_delay_is_longer_than_its_ttl_expires_delayed(
    autojump_clock,
):
    async with open_pool(1, run, unobserved="raise") as pool:
        reply = await pool.submit(value, delay=1.5, ttl=0.25)
        with pytest.raises(JobExpired):
            await reply.wait()
        assert trio.current_time() == 0.25
        assert (count(pool).delayed, count(pool).expired) == (0, 1)
    assert trio.current_time() == 0.25


async def test_an_expired_job_leaves_its_room_to_the_next(autojump_clock):
    async with open_pool(1, run, max_backlog=1) as pool:
        await pool.submit(sleep_for_a_second)
        expires = await pool.submit(value, ttl=0.25)
        follows = await pool.submit(value)
        assert trio.current_time() == 0.25
        assert expires.state is JobState.EXPIRED
        assert await follows.wait() == "value"


@pytest.mark.parametrize("max_backlog", [0, 1, 2])
async def test_a_job_whose_ttl_ran_out_as_it_waited_for_room_never_starts(
    max_backlog, autojump_clock
):
    script = Script("too late")
    async with open_pool(1, run, max_backlog=max_backlog) as pool:
        await pool.submit(sleep_for_a_second)
        for _ in range(max_backlog):
            await pool.submit(value)
        # Whether the wait for room or the reply says so is left open.
        with pytest.raises(JobExpired) as caught:
            await (await pool.submit(script, ttl=0.25)).wait()
        assert not caught.value.started
        assert await pool.process(value) == "value"
    assert script.starts == []


async def test_a_paused_pool_lets_jobs_expire_and_retries_come_due(autojump_clock):
    script = Script(Failure(), "second")
    async with open_pool(1, run, retry=SOON) as pool:
        retried = await pool.submit(script)
        await wait_all_tasks_blocked()
        pool.pause()
        expires = await pool.submit(value, ttl=0.5)
        await trio.sleep(1.5)
        assert (retried.state, expires.state) == (JobState.QUEUED, JobState.EXPIRED)
        pool.resume()
        assert await retried.wait() == "second"
    assert script.starts == [0, 1.5]


@pytest.mark.parametrize(
    "how", ["done", "failed", "cancelled", "expired", "dropped", "timed out"]
)
async def test_an_ended_job_with_a_long_ttl_is_not_kept_alive(how, autojump_clock):
    """Its alarm would ring in an hour; nobody holds the job until then.

    Collecting all garbage takes longer than a test should.
    """

    class Input:
        async def __call__(self):
            if how == "failed":
                raise Failure
            if how == "timed out":
                await trio.sleep_forever()

    async with open_pool(1, run, max_backlog=1, overflow="drop_oldest") as pool:
        options = {"ttl": 0.25 if how == "expired" else 3600, "id": "it"}
        gate = Gate()
        if how in {"cancelled", "expired", "dropped"}:
            await pool.submit(gate)
            await wait_all_tasks_blocked()
        job_input = Input()
        gone = weakref.ref(job_input)
        reply = pool.submit_nowait(job_input, timeout=0.5, **options)
        del job_input
        if how == "cancelled":
            reply.cancel()
        elif how == "dropped":
            pool.submit_nowait(value)
        try:
            await reply.wait()
        except (Failure, JobError):
            assert how != "done"
        assert reply.done
        del reply
        gate.open.set()
        # Another job takes its place wherever a worker still has the last one.
        await pool.process(value)
        gc.collect()
        assert gone() is None


async def test_a_job_that_was_tried_again_is_not_kept_alive(autojump_clock):
    """Collecting all garbage takes longer than a test should."""

    class Input:
        failed = False

        async def __call__(self):
            if not self.failed:
                self.failed = True
                raise Failure

    async with open_pool(1, run, retry=SOON) as pool:
        job_input = Input()
        gone = weakref.ref(job_input)
        await pool.process(job_input)
        del job_input
        await pool.process(value)
        gc.collect()
        assert gone() is None


# Ids, drains, batches of submits, defined tasks --------------------------


@pytest.mark.parametrize("name", ["a job", 7, -1, 0])
async def test_the_id_of_a_job_is_shown_wherever_it_is_named(name, autojump_clock):
    told = Told()
    async with open_pool(1, run, hooks=[told], retry=SOON) as pool:
        reply = await pool.submit(Script(9, 9, 9), id=name, timeout=0.5)
        assert reply.id == name
        await wait_all_tasks_blocked()
        assert pool.workers()[0].job_id == name
        with pytest.raises(JobTimeout) as caught:
            await reply.wait()
        assert caught.value.job_id == name
    assert {event.job_id for event in told.events} == {name}


@pytest.mark.parametrize("state", ["running", "queued", "delayed", "retried", "room"])
async def test_an_id_is_taken_until_its_job_has_ended(state, autojump_clock):
    gate = Gate()
    async with open_pool(1, run, max_backlog=1) as pool:
        if state in {"queued", "room"}:
            await pool.submit(gate)
        if state == "room":
            await pool.submit(value)
        async with trio.open_nursery() as nursery:
            job = failing() if state == "retried" else gate
            options = {
                "delay": 5 if state == "delayed" else 0,
                "retry": NOT_SOON if state == "retried" else None,
            }

            @nursery.start_soon
            async def first():
                replies.append(await pool.submit(job, id="x", **options))

            replies = []
            await wait_all_tasks_blocked()
            accepted = count(pool).accepted
            with pytest.raises(ValueError, match="'x'"):
                pool.submit_nowait(value, id="x")
            with pytest.raises(ValueError, match="'x'"):
                await pool.submit(value, id="x")
            assert count(pool).accepted == accepted
            gate.open.set()
            if state == "retried":
                replies[0].cancel()
        with suppress(JobCancelled):
            await replies[0].wait()
        assert await (await pool.submit(value, id="x")).wait() == "value"


async def test_an_id_is_free_again_when_its_job_was_refused(autojump_clock):
    gate = Gate()
    async with open_pool(1, run, max_backlog=0) as pool:
        running = await pool.submit(gate)
        with pytest.raises(BacklogFull):
            pool.submit_nowait(value, id="x")
        with trio.move_on_after(0.25) as scope:
            await pool.submit(value, id="x")
        assert scope.cancelled_caught
        gate.open.set()
        await running.wait()
        await (await pool.submit(value, id="x")).wait()


async def test_the_result_is_in_the_drain_before_anyone_hears_of_it(autojump_clock):
    drain, seen = Drain(), []

    class Look(Hooks):
        def on_job_complete(self, event):
            seen.append(("hook", drain.count))

    async with open_pool(1, run, hooks=[Look()]) as pool:
        reply = await pool.submit(Script(Failure(), "v"), drain=drain, retry=SOON)
        await wait_all_tasks_blocked()
        assert drain.count == 0
        assert await reply.wait() == "v"
        seen.append(("reader", drain.count))
    assert seen == [("hook", 1), ("reader", 1)]
    assert drain.collect() == ["v"]


async def test_what_has_no_result_is_not_in_the_drain(autojump_clock):
    drain = Drain()
    async with open_pool(1, run) as pool:
        replies = [
            await pool.submit(job, drain=drain, **options)
            for job, options in [
                (failing(), {"retry": SOON}),
                (Script(9), {"timeout": 0.25}),
                (value, {"ttl": 0.125}),
                (value, {"delay": 5}),
            ]
        ]
        replies[-1].cancel()
        for reply in replies:
            with pytest.raises((Failure, JobError)):
                await reply.wait()
    assert (drain.count, drain.total) == (0, 0)


async def test_a_closed_drain_is_logged_and_the_job_is_done(autojump_clock, caplog):
    drain = Drain()
    drain.close()
    async with open_pool(1, run) as pool:
        reply = await pool.submit(value, drain=drain)
        assert await reply.wait() == "value"
        assert reply.state is JobState.DONE
        assert len(caplog.records) == 1
        assert await pool.process(value) == "value"


async def test_a_job_with_terms_and_no_drain_logs_nothing(autojump_clock, caplog):
    async with open_pool(1, run) as pool:
        reply = await pool.submit(value, ttl=9.0, id="id")
        assert await reply.wait() == "value"
    assert caplog.records == []


async def test_the_id_and_the_key_of_a_job_that_is_dropped_at_once_are_free(
    autojump_clock,
):
    async with open_pool(1, run, max_backlog=0, overflow="drop_oldest") as pool:
        busy = pool.submit_nowait(Script(1.0, "busy"))
        dropped = pool.submit_nowait(value, id="id", key="key")
        assert dropped.state is JobState.DROPPED
        await busy.wait()
        with trio.fail_after(20):
            reply = pool.submit_nowait(value, id="id", key="key")
            assert await reply.wait() == "value"


@pytest.mark.parametrize("call", ["submit", "submit_nowait"])
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"delay": -1}, ValueError),
        ({"delay": math.nan}, ValueError),
        ({"delay": math.inf}, ValueError),
        ({"delay": "1"}, TypeError),
        ({"delay": True}, TypeError),
        ({"ttl": 0}, ValueError),
        ({"ttl": -1}, ValueError),
        ({"ttl": math.nan}, ValueError),
        ({"ttl": None}, TypeError),
        ({"retry": 3}, TypeError),
        ({"drain": []}, TypeError),
        ({"id": ""}, ValueError),
        ({"id": 1.5}, TypeError),
        ({"id": True}, TypeError),
        ({"key": []}, TypeError),
    ],
    ids=repr,
)
async def test_a_bad_option_is_refused_and_nothing_has_happened(call, options, kind):
    async with open_pool(1, run) as pool:
        with pytest.raises(kind) as caught:
            result = getattr(pool, call)(value, **options)
            if call == "submit":
                await result
        if "key" not in options:
            assert next(iter(options)) in str(caught.value)
        assert count(pool).accepted == 0
        assert await pool.process(value) == "value"


async def test_submit_batch_gives_a_reply_for_each_item_in_order(autojump_clock):
    drain = Drain()
    jobs = [Script(1, "slow"), Script("quick"), Script(Failure(), "tried")]
    async with open_pool(3, run) as pool:
        replies = await pool.submit_batch(jobs, retry=SOON, drain=drain)
        assert [await r.wait() for r in replies] == ["slow", "quick", "tried"]
        assert await pool.submit_batch([]) == []
    assert drain.collect() == ["quick", "tried", "slow"]


async def test_submit_batch_waits_for_room_item_by_item(autojump_clock):
    async with open_pool(1, run, max_backlog=1) as pool:
        replies = await pool.submit_batch([sleep_for_a_second] * 4)
        # The first runs, the second waits; each end lets another in.
        assert trio.current_time() == 2
        assert (count(pool).queued, count(pool).running) == (1, 1)
        for reply in replies:
            await reply.wait()


async def test_submit_batch_of_a_task_pool_calls_the_function_with_each_item(
    autojump_clock,
):
    async def double(number):
        return 2 * number

    async with open_pool(2) as pool:
        replies = await pool.submit_batch(double, [1, 2, 3])
        assert [await reply.wait() for reply in replies] == [2, 4, 6]
        with pytest.raises(TypeError):
            await pool.submit_batch(double, 5)


async def test_go_gives_in_tasks_of_several_types_each_by_its_own_terms(
    autojump_clock,
):
    numbers, texts = Drain(), Drain()
    flaky = Script(Failure(), Failure(), "third")

    async def double(number):
        return 2 * number

    async def stuck():
        await trio.sleep_forever()

    async with open_pool(3) as pool:
        retried, delayed, timed = await pool.go(
            Task(flaky.__call__).with_retry(SOON).drain_to(texts).with_id("flaky"),
            Task(double, 4).with_delay(1.5).drain_to(numbers),
            Task(stuck).with_timeout(0.5),
        )
        assert retried.id == "flaky"
        assert delayed.state is JobState.DELAYED
        with pytest.raises(JobTimeout):
            await timed.wait()
        assert await retried.wait() == "third"
        assert trio.current_time() == 0.5
        assert await delayed.wait() == 8
        assert trio.current_time() == 1.5
        assert await pool.go() == ()
    assert (texts.collect(), numbers.collect()) == (["third"], [8])


async def test_go_may_be_given_the_same_task_any_number_of_times(autojump_clock):
    task = Task(value)
    async with open_pool(2) as pool:
        for reply in await pool.go(task, task, task) + await pool.go(task):
            assert await reply.wait() == "value"
        with pytest.raises(TypeError):
            await pool.go(task, value)
        assert count(pool).accepted == 4


# Batches -----------------------------------------------------------------


@pytest.mark.parametrize("whose", ["pool", "call"])
@pytest.mark.parametrize("size", [1, 2, 5])
async def test_map_tries_items_again_and_keeps_their_places(
    size, whose, autojump_clock
):
    scripts = [
        Script(*[Failure() for _ in range(n % 3)], f"item {n}") for n in range(7)
    ]
    options = {"retry": SOON}
    of_pool, of_call = (options, {}) if whose == "pool" else ({}, options)
    async with open_pool(size, run, **of_pool) as pool:
        results = await pool.map(scripts, **of_call)
        assert results == [f"item {n}" for n in range(7)]
        books = count(pool)
        assert (books.done, books.accepted, books.retries) == (7, 7, 6)
    assert trio.current_time() == 2 * WAIT


async def test_map_goes_on_with_other_items_while_one_waits(autojump_clock):
    scripts = [Script(Failure(), "first"), Script(0.125, "second"), Script("third")]
    async with open_pool(1, run) as pool:
        assert await pool.map(scripts, retry=SOON) == ["first", "second", "third"]
    assert [script.starts for script in scripts] == [[0, WAIT], [0], [0.125]]


async def test_map_fails_when_an_item_is_given_up_and_calls_off_delayed_ones(
    autojump_clock,
):
    last = Failure("last")
    later = Script(1, Failure(), "not reached")
    async with open_pool(2, run) as pool:
        with pytest.raises(ExceptionGroup) as caught:
            retry = Retry(2, lambda _: 1.5)
            await pool.map([Script(Failure(), last), later], retry=retry)
        assert trio.current_time() == 1.5
        assert caught.value.exceptions == (last,)
        assert last.__notes__[0] == note_of(2)
        assert later.starts == [0]
        books = count(pool)
        assert (books.delayed, books.running, books.retries) == (0, 0, 2)


async def test_a_failure_cancels_the_items_that_wait_for_another_try(autojump_clock):
    waiting = failing()
    retry = Retry(3, lambda _: 50, on=Failure)
    async with open_pool(2, run) as pool:
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map([waiting, Script(1, KeyError())], retry=retry)
        assert [type(e) for e in caught.value.exceptions] == [KeyError]
        assert trio.current_time() == 1
        books = count(pool)
        assert (books.failed, books.cancelled, books.delayed) == (1, 1, 0)
        assert await pool.map([value]) == ["value"]


async def test_settle_has_the_last_outcome_of_every_item(autojump_clock):
    last = Failure("last")
    scripts = [Script(Failure(), Failure(), last), Script(Failure(), "second")]
    async with open_pool(1, run) as pool:
        first, second = await pool.settle(scripts, retry=SOON)
        assert (first.index, first.item) == (0, scripts[0])
        assert first.outcome.error is last
        assert note_of(3) in last.__notes__
        assert second.outcome.unwrap() == "second"


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("size", [1, 3])
async def test_stream_gives_retried_items_in_the_order_asked_for(
    size, ordered, autojump_clock
):
    scripts = [
        Script(Failure(), "twice"),
        Script("once"),
        Script(Failure(), Failure(), "thrice"),
        Script("once more"),
    ]
    async with open_pool(size, run) as pool:
        options = {"retry": SOON, "ordered": ordered, "ahead": 4}
        async with pool.stream(scripts, **options) as results:
            got = [(result, trio.current_time()) async for result in results]
    expected = [("twice", WAIT), ("once", 0), ("thrice", 2 * WAIT), ("once more", 0)]
    if ordered:
        assert [result for result, _ in got] == [result for result, _ in expected]
    else:
        assert sorted(got) == sorted(expected)
        assert [time for _, time in got] == sorted(time for _, time in got)


async def test_a_retried_item_stays_within_what_a_stream_may_be_ahead(autojump_clock):
    scripts = [Script(Failure(), "twice"), *[Script("v") for _ in range(5)]]
    async with open_pool(3, run) as pool:
        async with pool.stream(scripts, retry=SOON, ahead=2) as results:
            await wait_all_tasks_blocked()
            assert [len(script.starts) for script in scripts] == [1, 1, 0, 0, 0, 0]
            assert [result async for result in results] == ["twice", *["v"] * 5]


@pytest.mark.parametrize("ordered", [True, False])
async def test_the_error_that_a_retried_item_ended_by_outlives_the_end_of_its_stream(
    ordered, autojump_clock
):
    last = Failure("last")
    jobs = [Script(Failure(), Failure(), last)]
    with pytest.raises(ExceptionGroup) as caught:
        async with open_pool(2, run) as pool:
            async with pool.stream([*jobs, Gate()], retry=SOON, ordered=ordered):
                await trio.sleep(5)
                assert count(pool).failed == count(pool).running == 1
    assert caught.value.exceptions == (last,)


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_stream_left_early_forgets_its_delayed_items(ordered, autojump_clock):
    async with open_pool(2, run) as pool:
        jobs = [failing(), value, failing()]
        async with pool.stream(jobs, retry=NOT_SOON, ordered=ordered):
            await wait_all_tasks_blocked()
            assert count(pool).delayed == 2
        books = count(pool)
        assert (books.delayed, books.cancelled, books.done) == (0, 2, 1)
        assert await pool.process(value) == "value"
    assert trio.current_time() == 0


@pytest.mark.parametrize("method", ["map", "settle"])
async def test_batches_of_an_async_source_try_items_again(method, autojump_clock):
    async def source():
        for n in range(4):
            await trio.sleep(0.125)
            yield Script(*[Failure()] * (n % 2), "v")

    async with open_pool(2, run) as pool:
        results = await getattr(pool, method)(source(), retry=SOON)
        if method == "settle":
            results = [settled.outcome.unwrap() for settled in results]
        assert results == ["v"] * 4
        assert count(pool).retries == 2


async def test_a_batch_goes_on_while_all_its_items_wait_for_another_try(
    autojump_clock,
):
    """With no room at all, items that wait stop others from being taken."""
    scripts = [Script(Failure(), "v") for _ in range(9)]
    async with open_pool(2, run, max_backlog=0) as pool:
        assert await pool.map(scripts, retry=SOON) == ["v"] * 9
        assert count(pool).retries == 9


# The bound ---------------------------------------------------------------


class Bound(trio.abc.Instrument):
    """Looks after each step of anyone whether the pool keeps its bounds."""

    def __init__(self, pool, max_backlog, size):
        self.pool, self.max_backlog, self.size = pool, max_backlog, size
        self.most = 0
        self.broken = []

    def after_task_step(self, task):
        books = self.pool.statistics()
        waiting = books.delayed + books.queued
        self.most = max(self.most, waiting)
        balanced = books.accepted == sum(getattr(books, s.value) for s in JobState)
        if (
            not balanced
            or books.running > self.size
            or waiting > self.max_backlog + self.size
        ):
            self.broken.append(books)


@asynccontextmanager
async def watching(pool, max_backlog, size):
    bound = Bound(pool, max_backlog, size)
    trio.lowlevel.add_instrument(bound)
    try:
        yield bound
    finally:
        trio.lowlevel.remove_instrument(bound)
    assert not bound.broken


@pytest.mark.parametrize("max_backlog", [0, 1, 3])
@pytest.mark.parametrize("size", [1, 2])
async def test_retries_pass_the_bound_by_size_at_most_and_everyone_gets_in(
    size, max_backlog, autojump_clock
):
    async with open_pool(size, run, max_backlog=max_backlog, retry=SOON) as pool:
        async with watching(pool, max_backlog, size) as bound:
            results = []

            async def call(call_method):
                results.append(await call_method(Script(Failure(), Failure(), "v")))

            async def submit(job):
                return await (await pool.submit(job)).wait()

            with trio.fail_after(100):
                async with trio.open_nursery() as nursery:
                    for _ in range(10):
                        nursery.start_soon(call, pool.process)
                        nursery.start_soon(call, submit)
                    jobs = [Script(Failure(), "v") for _ in range(5)]
                    nursery.start_soon(pool.map, jobs)
            assert results == ["v"] * 20
        assert bound.most >= max(1, max_backlog)
        assert count(pool).done == 25


@pytest.mark.parametrize("max_backlog", [0, 1])
async def test_while_the_bound_is_passed_no_new_job_is_started(
    max_backlog, autojump_clock
):
    size = 2
    async with open_pool(size, run, max_backlog=max_backlog, retry=NOT_SOON) as pool:
        replies = await delay_jobs(pool, size + max_backlog)
        assert count(pool).delayed == size + max_backlog
        # Both workers are idle, and still there is no room.
        with pytest.raises(BacklogFull):
            pool.submit_nowait(value)
        with trio.move_on_after(0.25) as scope:
            await pool.process(value)
        assert scope.cancelled_caught
        for reply in replies:
            reply.cancel()
        assert await pool.process(value) == "value"


async def test_above_the_bound_as_many_start_as_could_wait_for_another_try(
    autojump_clock,
):
    async def handler(job):
        await trio.sleep(1.0)
        if job == "fails":
            raise OSError
        ends.append(trio.current_time())

    ends = []
    retry = Retry(2, lambda number: 9.0)
    async with open_pool(
        2, handler, max_backlog=1, retry=retry, unobserved="ignore"
    ) as pool:
        for _ in range(2):
            pool.submit_nowait("fails")
        await trio.sleep(2.0)
        # Two wait, and so with one more that runs there may be three.
        assert pool.statistics().delayed == 2
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(pool.process, "job")
        assert ends == [3.0, 4.0, 5.0]


async def test_a_job_behind_a_batch_that_may_not_start_does_not_wait_with_it(
    autojump_clock,
):
    """While more wait than the bound says, no item is started."""

    async def handler(job):
        await trio.sleep(1.0)
        if job == "fails":
            raise OSError

    retry = Retry(2, lambda number: 9.0)
    async with (
        open_pool(1, handler, max_backlog=1, retry=retry, unobserved="ignore") as pool,
        trio.open_nursery() as nursery,
    ):
        pool.submit_nowait("fails")
        for _ in range(2):
            nursery.start_soon(pool.map, ["item"])
        await wait_all_tasks_blocked()
        await pool.process("job")
        assert trio.current_time() == 2.0
        nursery.cancel_scope.deadline = 20.0
    # They all had their turn then.
    assert not nursery.cancel_scope.cancelled_caught


@pytest.mark.parametrize(
    ("how", "max_backlog"),
    [
        ("cancelled", 0),
        ("cancelled", 1),
        ("one by one", 0),
        ("one by one", 1),
        ("tried again", 0),
        ("tried again", 1),
        # Where no job may wait, none that has not started can be delayed.
        ("expired", 1),
    ],
)
async def test_callers_that_wait_for_room_behind_delayed_jobs_all_get_in(
    how, max_backlog, autojump_clock
):
    """As many of them as there are idle workers run at once."""
    size = 3
    async with open_pool(size, run, max_backlog=max_backlog) as pool:
        retry = SOON if how == "tried again" else NOT_SOON
        if how == "expired":
            replies = [pool.submit_nowait(value, delay=50, ttl=1)]
        else:
            replies = await delay_jobs(pool, size + max_backlog, retry=retry)
        gates = [Gate() for _ in range(size)]
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for gate in gates:
                    # With a policy of their own they might have to wait later.
                    nursery.start_soon(lambda g=gate: pool.process(g, retry=NOT_SOON))
                await wait_all_tasks_blocked()
                for reply in replies:
                    if how in {"cancelled", "one by one"}:
                        reply.cancel()
                    if how == "one by one":
                        await wait_all_tasks_blocked()
                await trio.sleep(5)
                assert [gate.started for gate in gates] == [1] * size
                for gate in gates:
                    gate.open.set()
        for reply in replies:
            with pytest.raises((Failure, JobError)):
                await reply.wait()


@pytest.mark.parametrize("max_backlog", [0, 1])
async def test_a_batch_that_waited_behind_delayed_jobs_uses_every_worker(
    max_backlog, autojump_clock
):
    size = 3
    async with open_pool(size, run, max_backlog=max_backlog, retry=NOT_SOON) as pool:
        replies = await delay_jobs(pool, size + max_backlog)
        gates = [Gate() for _ in range(size)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.map, gates)
            await wait_all_tasks_blocked()
            assert sum(gate.started for gate in gates) == 0
            for reply in replies:
                reply.cancel()
            await wait_all_tasks_blocked()
            assert [gate.started for gate in gates] == [1] * size
            for gate in gates:
                gate.open.set()


class TestDropOldest:
    async def test_a_delayed_job_is_the_oldest_too(self, autojump_clock):
        options = {"max_backlog": 1, "overflow": "drop_oldest"}
        async with open_pool(1, run, **options) as pool:
            delayed = await pool.submit(value, delay=50)
            running = await pool.submit(sleep_for_a_second)
            assert running.state is not JobState.DROPPED
            await wait_all_tasks_blocked()
            queued = await pool.submit(value)
            assert (delayed.state, queued.state) == (JobState.DROPPED, JobState.QUEUED)
            with pytest.raises(JobDropped) as caught:
                await delayed.wait()
            assert (caught.value.started, caught.value.attempts) == (False, 0)
            assert await queued.wait() == "value"
            await running.wait()
            assert (count(pool).dropped, count(pool).delayed) == (1, 0)
        assert trio.current_time() == 1

    async def test_a_job_dropped_before_its_next_try_says_that_it_had_started(
        self, autojump_clock
    ):
        options = {"max_backlog": 1, "overflow": "drop_oldest", "retry": NOT_SOON}
        async with open_pool(1, run, **options) as pool:
            (delayed,) = await delay_jobs(pool, 1)
            await pool.submit(sleep_for_a_second)
            await wait_all_tasks_blocked()
            await pool.submit(value)
            with pytest.raises(JobDropped) as caught:
                await delayed.wait()
            assert (caught.value.started, caught.value.attempts) == (True, 1)
            assert caught.value.worker == 0

    async def test_with_no_room_the_delayed_job_goes_and_the_new_one_runs(
        self, autojump_clock
    ):
        options = {"max_backlog": 0, "overflow": "drop_oldest", "retry": NOT_SOON}
        async with open_pool(1, run, **options) as pool:
            (delayed,) = await delay_jobs(pool, 1)
            # The worker is idle: once the other has gone, nothing is in the way.
            with trio.fail_after(5):
                assert await pool.process(value) == "value"
            with pytest.raises(JobDropped):
                await delayed.wait()

    async def test_with_retries_above_the_bound_the_new_jobs_run(self, autojump_clock):
        options = {"max_backlog": 1, "overflow": "drop_oldest", "retry": NOT_SOON}
        async with open_pool(2, run, **options) as pool:
            replies = await delay_jobs(pool, 3)
            async with watching(pool, 1, 2):
                with trio.fail_after(5):
                    for _ in range(2):
                        assert await pool.process(value) == "value"
            assert JobState.DROPPED in [reply.state for reply in replies]
            for reply in replies:
                reply.cancel()
                with pytest.raises((JobDropped, JobCancelled)):
                    await reply.wait()

    async def test_a_job_that_takes_the_place_of_a_delayed_one_starts_at_once(
        self, autojump_clock
    ):
        """The backlog was full of jobs that no worker was there for yet."""
        options = {"max_backlog": 1, "overflow": "drop_oldest"}
        async with open_pool(1, run, **options) as pool:
            delayed = await pool.submit(value, delay=50)
            for job_options in ({}, {"key": "k"}, {"retry": SOON}):
                with trio.fail_after(5):
                    assert await pool.process(value, **job_options) == "value"
            # It was in nobody's way: the worker was idle each time.
            assert delayed.state is JobState.DELAYED
            delayed.cancel()


# The end of the pool while jobs are delayed ------------------------------


async def test_leaving_the_block_waits_for_delays_and_retries(autojump_clock):
    script = Script(Failure(), Failure(), "third")
    async with open_pool(1, run, retry=SOON) as pool:
        retried = await pool.submit(script)
        delayed = await pool.submit(value, delay=1.5)
    assert trio.current_time() == 1.5
    assert retried.outcome.unwrap() == "third"
    assert delayed.outcome.unwrap() == "value"


async def test_join_waits_for_delayed_jobs(autojump_clock):
    async with open_pool(1, run) as pool:
        await pool.submit(Script(Failure(), "second"), retry=SOON)
        await pool.join()
        assert trio.current_time() == WAIT
        await pool.submit(value, delay=1.5)
        await pool.join()
        assert trio.current_time() == WAIT + 1.5
        assert not pool.closed


async def test_closing_within_grace_retries_go_on(autojump_clock):
    async with open_pool(1, run, retry=SOON) as pool:
        before = await pool.submit(Script(Failure(), "second"))
        during = await pool.submit(Script(0.125, Failure(), Failure(), "third"))
        await wait_all_tasks_blocked()
        assert before.state is JobState.DELAYED
        report = await pool.shutdown(grace=5)
        assert trio.current_time() == 0.625
        assert (report.done, report.cancelled, report.unfinished) == (2, 0, 0)
        assert await before.wait() == "second"
        assert await during.wait() == "third"


async def test_the_end_of_the_grace_cancels_delayed_jobs(autojump_clock):
    async with open_pool(1, run) as pool:
        (retried,) = await delay_jobs(pool, 1, retry=NOT_SOON)
        delayed = await pool.submit(value, delay=50)
        report = await pool.shutdown(grace=1.5)
        assert trio.current_time() == 1.5
        assert (report.done, report.cancelled, report.unfinished) == (0, 2, 0)
        for reply, started in ((retried, True), (delayed, False)):
            with pytest.raises(JobCancelled) as caught:
                await reply.wait()
            assert caught.value.started is started
    assert count(pool).delayed == 0
    assert trio.current_time() == 1.5


async def test_cancel_ends_delayed_jobs_and_their_callers_hear_of_it(autojump_clock):
    async with open_pool(1, run, retry=NOT_SOON) as pool:
        async with trio.open_nursery() as nursery:
            heard = []

            @nursery.start_soon
            async def call():
                with pytest.raises(JobCancelled) as caught:
                    await pool.process(failing())
                heard.append(caught.value.attempts)

            await wait_all_tasks_blocked()
            assert count(pool).delayed == 1
            delayed = await pool.submit(value, delay=50, ttl=3600, id="x")
            pool.cancel()
            assert (count(pool).delayed, count(pool).cancelled) == (0, 2)
            assert delayed.state is JobState.CANCELLED
        assert heard == [1]
        with pytest.raises(PoolClosed):
            pool.submit_nowait(value, id="x")
    assert trio.current_time() == 0


async def test_an_error_of_the_block_ends_delayed_jobs(autojump_clock):
    with pytest.raises(Failure, match="of the block"):
        async with open_pool(1, run, retry=NOT_SOON) as pool:
            (reply,) = await delay_jobs(pool, 1)
            raise Failure("of the block")
    assert reply.state is JobState.CANCELLED
    assert (count(pool).delayed, trio.current_time()) == (0, 0)


async def test_a_broken_pool_tells_those_who_wait_for_delayed_jobs(
    autojump_clock, caplog
):
    with pytest.raises(PoolBroken):
        async with open_pool(1, run, restart=Restart(limit=0)) as pool:
            (retried,) = await delay_jobs(pool, 1, retry=NOT_SOON)
            delayed = await pool.submit(value, delay=50)
            crash = await pool.submit(crash_the_worker)
            await trio.sleep_forever()
    for reply, attempts in ((retried, 1), (delayed, 0)):
        assert reply.state is JobState.LOST
        with pytest.raises(PoolBroken) as caught:
            await reply.wait()
        assert caught.value.job_id == reply.id
        assert (caught.value.attempts, caught.value.started) == (attempts, attempts > 0)
    with pytest.raises(WorkerCrashed):
        await crash.wait()
    assert (count(pool).delayed, count(pool).lost) == (0, 3)
    assert trio.current_time() == 0


async def test_a_map_whose_items_wait_for_another_try_hears_of_a_broken_pool(
    autojump_clock, caplog
):
    heard = []
    with pytest.raises(PoolBroken):
        async with open_pool(1, run, restart=Restart(limit=0)) as pool:
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def call():
                    with pytest.raises(PoolBroken) as caught:
                        await pool.map([failing(), failing()], retry=NOT_SOON)
                    heard.append(caught.value)

                await wait_all_tasks_blocked()
                assert count(pool).delayed == 2
                with pytest.raises(WorkerCrashed):
                    await pool.process(crash_the_worker)
    assert len(heard) == 1
    assert count(pool).delayed == 0


async def test_a_map_whose_items_wait_for_another_try_hears_that_the_pool_stops(
    autojump_clock,
):
    async def call():
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map([failing(), failing()], retry=NOT_SOON)
        heard.extend(caught.value.exceptions)

    heard = []
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            async with open_pool(1, run) as pool:
                nursery.start_soon(call)
                await wait_all_tasks_blocked()
                pool.cancel()
    assert heard
    assert {type(error) for error in heard} == {JobCancelled}


async def test_a_pool_of_no_workers_is_closed_without_its_delayed_jobs(autojump_clock):
    async with open_pool(0, run) as pool:
        delayed = await pool.submit(value, delay=1.5)
        with trio.fail_after(5):
            await pool.shutdown()
        with pytest.raises(JobCancelled):
            await delayed.wait()
    assert trio.current_time() == 0


@pytest.mark.parametrize("method", ["submit", "map"])
async def test_a_retry_of_the_last_job_of_a_pool_shrunk_to_nothing_ends_too(
    method, autojump_clock
):
    """No worker is left for another try, and the pool is to be closed."""
    pools = []
    with trio.fail_after(100):
        async with open_pool(1, run, retry=SOON, unobserved="ignore") as pool:
            pools.append(pool)
            async with trio.open_nursery() as nursery:
                job = Script(1, Failure(), "not reached")
                if method == "submit":
                    await pool.submit(job)
                else:

                    @nursery.start_soon
                    async def call():
                        # Whether there were more items was never asked.
                        with suppress(PoolClosed):
                            await pool.settle([job])

                await wait_all_tasks_blocked()
                with trio.move_on_after(0.25):
                    await pool.resize(0)
                await pool.shutdown()
    books = count(pools[0])
    assert books.delayed + books.queued + books.running == 0


async def test_a_pool_shrunk_to_nothing_tries_again_when_it_has_grown(autojump_clock):
    script = Script(Failure(), "second")
    async with open_pool(1, run, retry=SOON) as pool:
        reply = await pool.submit(script)
        await wait_all_tasks_blocked()
        await pool.resize(0)
        await trio.sleep(1)
        assert reply.state is JobState.QUEUED
        await pool.resize(1)
        assert await reply.wait() == "second"
    assert script.starts == [0, 1]


# Any program -------------------------------------------------------------


jobs = st.lists(st.sampled_from(["fail", 0.25, 1.0]), max_size=3)
steps = st.tuples(
    st.sampled_from(["process", "submit", "keyed", "delay", "ttl", "map"]),
    jobs,
    st.sampled_from([None, 0.125, 0.5, 1.5]),
)
pools = st.fixed_dictionaries(
    {
        "max_backlog": st.sampled_from([0, 1, 2, math.inf]),
        "overflow": st.sampled_from(["wait", "reject", "drop_oldest"]),
    }
)


@given(st.integers(1, 3), pools, st.lists(steps, max_size=12))
def test_whatever_is_given_in_ends_once_within_the_bound(size, options, program):
    async def main():
        async with open_pool(
            size, run, retry=SOON, unobserved="ignore", **options
        ) as pool:
            async with watching(pool, options["max_backlog"], size):
                with trio.fail_after(1_000):
                    async with trio.open_nursery() as nursery:
                        for step in program:
                            nursery.start_soon(play, pool, *step)
                            await trio.sleep(0.125)
                    await pool.join()
            books = count(pool)
            assert books.delayed + books.queued + books.running == 0
            # No slot is lost: as many as there are workers run at once.
            gates = [Gate() for _ in range(size)]
            async with trio.open_nursery() as nursery:
                for gate in gates:
                    nursery.start_soon(pool.process, gate)
                await wait_all_tasks_blocked()
                assert [gate.started for gate in gates] == [1] * size
                for gate in gates:
                    gate.open.set()

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def play(pool, kind, answers, patience):
    """Do one step of a program; cancelled if it takes longer than its patience."""
    job = Script(*[Failure() if a == "fail" else a for a in answers], "v", "v", "v")
    options = {
        "submit": {},
        "keyed": {"key": "k"},
        "delay": {"delay": 0.5},
        "ttl": {"ttl": 0.5},
    }
    try:
        with trio.move_on_after(math.inf if patience is None else patience):
            if kind == "process":
                await pool.process(job)
            elif kind == "map":
                await pool.map([job, value])
            else:
                await submit(pool, job, **options[kind])
    except* (Failure, JobError, BacklogFull, ValueError):
        pass


async def submit(pool, job, **options):
    reply = await pool.submit(job, **options)
    try:
        await reply.wait()
    finally:
        reply.cancel()


async def test_a_map_that_the_bound_held_up_goes_on_as_there_are_more_workers(
    autojump_clock: MockClock,
) -> None:
    """A retry that waits takes the only place there is, until there are two."""
    failures = iter([ValueError()])

    async def fail_once(job: int) -> int:
        for failure in failures:
            raise failure
        return job

    retry = Retry(2, Backoff(30.0, jitter=0))
    async with open_pool(1, fail_once, retry=retry, max_backlog=0) as pool:
        async with trio.open_nursery() as nursery:
            reply = await pool.submit(0)
            await wait_all_tasks_blocked()
            assert reply.state is JobState.DELAYED
            nursery.start_soon(pool.map, range(3))
            await wait_all_tasks_blocked()
            assert pool.statistics().done == 0
            await pool.resize(2)
        assert trio.current_time() == 0
        assert await reply.wait() == 0
        assert trio.current_time() == 30
