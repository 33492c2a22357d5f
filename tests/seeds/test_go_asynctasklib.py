"""The cases of go-asynctasklib: one job's life, the pool round it, the limiter.

Those of its second version, retry strategies and autoscaling, stand at the end.
"""

from __future__ import annotations

import gc
import itertools
import math
import random
import weakref
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

from trio_pool import (
    Autoscale,
    BacklogFull,
    Backoff,
    Hooks,
    JobCancelled,
    JobChanged,
    JobDropped,
    JobExpired,
    JobState,
    JobTimeout,
    PoolClosed,
    PoolResized,
    PoolStatistics,
    Retry,
    Task,
    WorkerChanged,
    WorkerCrashed,
    current_job,
    open_pool,
)


class TransientError(Exception):
    """What goes away when it is tried again."""


class Flaky:
    """An async function that fails so many times, then returns what it is given."""

    def __init__(self, failures: float) -> None:
        self.failures = failures
        self.calls = 0

    async def __call__(self, value: Any = None) -> Any:
        self.calls += 1
        await trio.lowlevel.checkpoint()
        if self.calls <= self.failures:
            raise TransientError(self.calls)
        return value


class Gauge:
    """An async function that takes its time and knows how many run at once."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.starts: list[float] = []
        self.now = self.peak = self.ended = 0

    @property
    def calls(self) -> int:
        return len(self.starts)

    async def __call__(self, value: Any = None) -> Any:
        self.starts.append(trio.current_time())
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            await trio.sleep(self.seconds)
        finally:
            self.now -= 1
        self.ended += 1
        return value


async def obey(job: Any) -> Any:
    """Return the job, or raise it, if it is an error; sleep, if it is a float."""
    if isinstance(job, BaseException):
        raise job
    if isinstance(job, float):
        await trio.sleep(job)
    else:
        await trio.lowlevel.checkpoint()
    return job


def at_once(attempt: int) -> float:
    return 0.0


def living_tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


def balanced(count: PoolStatistics) -> bool:
    ended = count.done + count.failed + count.timed_out + count.cancelled
    ended += count.expired + count.dropped + count.lost
    return count.accepted == count.delayed + count.queued + count.running + ended


# One job's life.


async def test_a_new_task_has_the_default_options_and_state() -> None:
    """Nothing is set that was not given, and a job begins as one that waits."""
    task = Task(obey, "input")
    assert (task.fn, task.args, task.options) == (obey, ("input",), {})
    async with open_pool(1) as pool:
        pool.pause()
        (reply,) = await pool.go(task)
        assert (reply.state, reply.done, reply.outcome) == (
            JobState.QUEUED,
            False,
            None,
        )
        assert (reply.attempts, reply.worker) == (0, None)
        assert isinstance(reply.id, int)
        pool.resume()

        async def look() -> tuple[Any, ...]:
            job = current_job()
            return job.attempt, job.key, job.priority, job.timeout, job.deadline

        assert await pool.process(look) == (1, None, 0, math.inf, math.inf)


async def test_a_definition_brings_all_its_options(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Id, delay, longest run and retries of a definition reach the job."""

    async def look() -> tuple[Any, ...]:
        job = current_job()
        if job.attempt == 1:
            raise TransientError
        return job.id, job.attempt, job.timeout, trio.current_time()

    task = Task(look).with_id("fetch").with_delay(1.5).with_timeout(30.0)
    async with open_pool(1) as pool:
        (reply,) = await pool.go(task.with_retry(2, at_once))
        assert await reply.wait() == ("fetch", 2, 30.0, 1.5)
        assert reply.id == "fetch"
        # The same by the options of submit.
        reply = await pool.submit(
            look, id="fetch", delay=1.5, timeout=30.0, retry=Retry(2, at_once)
        )
        assert await reply.wait() == ("fetch", 2, 30.0, 3.0)


async def test_success() -> None:
    """A job that returns is done, its result can be read, and there is no error."""
    async with open_pool(1) as pool:
        reply = await pool.submit(obey, "value")
        assert await reply.wait() == "value"
        assert (reply.state, reply.done, reply.attempts) == (JobState.DONE, True, 1)
        assert reply.outcome is not None
        assert reply.outcome.unwrap() == "value"


async def test_error() -> None:
    """A job that raises has failed, and its own error can be read."""
    error = TransientError("its own")
    async with open_pool(1) as pool:
        reply = await pool.submit(obey, error)
        with pytest.raises(TransientError) as caught:
            await reply.wait()
        assert caught.value is error
        assert (reply.state, reply.done) == (JobState.FAILED, True)


async def test_a_second_start_while_running_is_refused(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """While a job lives its id cannot be started again; after its end it can."""
    gauge = Gauge(1.5)
    task = Task(gauge).with_id("only once")
    async with open_pool(2) as pool:
        await pool.go(task)
        await wait_all_tasks_blocked()
        with pytest.raises(ValueError, match="id"):
            await pool.go(task)
        await pool.join()
        assert gauge.calls == 1
        await pool.go(task)
    assert gauge.calls == 2
    assert pool.statistics().accepted == 2


async def test_cancelled_during_its_delay_it_never_runs(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A job cancelled before its time is over at once and is never called."""
    gauge = Gauge(0.0)
    async with open_pool(1) as pool:
        reply = await pool.submit(gauge, delay=1.5)
        assert reply.state is JobState.DELAYED
        await trio.sleep(0.5)
        assert reply.cancel()
        assert reply.state is JobState.CANCELLED
        with pytest.raises(JobCancelled) as caught:
            await reply.wait()
        assert (caught.value.started, caught.value.attempts) == (False, 0)
    assert trio.current_time() == 0.5
    assert gauge.calls == 0


async def test_delay_is_honoured(autojump_clock: trio.testing.MockClock) -> None:
    """A delayed job starts when its delay is over, to the moment."""
    gauge = Gauge(0.25)
    async with open_pool(1) as pool:
        reply = await pool.submit(gauge, delay=1.5)
        await reply.wait()
    assert gauge.starts == [1.5]
    assert trio.current_time() == 1.75


async def test_delay_blocks_neither_the_submitter_nor_a_worker(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Others run meanwhile; the seed held the submitter and a slot all the while."""
    gauge = Gauge(0.25)
    async with open_pool(1) as pool:
        late = await pool.submit(gauge, delay=5.0)
        assert trio.current_time() == 0.0
        assert await pool.process(obey, "meanwhile") == "meanwhile"
        assert trio.current_time() == 0.0
        assert (pool.statistics().delayed, pool.statistics().busy) == (1, 0)
        await late.wait()
    assert gauge.starts == [5.0]


async def test_work_over_its_limit_times_out_and_stops(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """An overdue job is reported at its limit and stops running there."""
    gauge = Gauge(60.0)
    async with open_pool(1) as pool:
        reply = await pool.submit(gauge, timeout=1.5)
        with pytest.raises(JobTimeout) as caught:
            await reply.wait()
        assert isinstance(caught.value, trio.TooSlowError)
        assert (caught.value.timeout, caught.value.started) == (1.5, True)
        assert reply.state is JobState.TIMED_OUT
        assert (gauge.now, gauge.ended) == (0, 0)
        assert trio.current_time() == 1.5
        assert await pool.process(obey, "next") == "next"
    assert pool.statistics().timed_out == 1


@pytest.mark.parametrize("error", [ZeroDivisionError(), SystemExit(3)])
async def test_a_crash_is_a_failure(error: BaseException) -> None:
    """Whatever a job dies of is that job's failure, and the pool goes on."""
    async with open_pool(1) as pool:
        reply = await pool.submit(obey, error)
        if isinstance(error, Exception):
            with pytest.raises(ZeroDivisionError) as failed:
                await reply.wait()
            assert failed.value is error
            assert reply.state is JobState.FAILED
        else:
            with pytest.raises(WorkerCrashed) as crashed:
                await reply.wait()
            assert crashed.value.__cause__ is error
            assert crashed.value.started
            assert reply.state is JobState.LOST
        assert await pool.process(obey, "next") == "next"


# Retries.


async def test_twice_failing_then_good_is_three_calls(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """With three attempts a job may fail twice, and it is done in the end."""
    fn = Flaky(2)
    async with open_pool(1) as pool:
        reply = await pool.submit(fn, "value", retry=Retry(3))
        assert await reply.wait() == "value"
        assert (fn.calls, reply.attempts, reply.state) == (3, 3, JobState.DONE)


async def test_an_error_is_not_kept_after_a_later_success(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The errors of earlier attempts are gone; the seed still showed the last."""
    async with open_pool(1) as pool:
        reply = await pool.submit(Flaky(2), "value", retry=Retry(3))
        await pool.join()
        assert reply.outcome is not None
        assert reply.outcome.unwrap() == "value"
    # Nor is there a failure that nobody read, which would be raised here.
    assert (pool.statistics().failed, pool.statistics().retries) == (0, 2)


async def test_always_failing_spends_its_attempts(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """After the last attempt its error is raised, and says that it was the last."""
    fn = Flaky(math.inf)
    async with open_pool(1) as pool:
        reply = await pool.submit(fn, retry=Retry(3))
        with pytest.raises(TransientError) as caught:
            await reply.wait()
    assert fn.calls == 3
    assert caught.value.args == (3,)
    assert caught.value.__notes__ == ["trio_pool: given up after 3 attempts"]
    assert (reply.state, reply.attempts) == (JobState.FAILED, 3)


async def test_attempt_numbers_are_seen_by_the_function(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Each attempt finds its own number, from 1, and the id of all of them."""
    seen: list[tuple[int | str, int]] = []

    async def fn() -> None:
        job = current_job()
        seen.append((job.id, job.attempt))
        if job.attempt < 3:
            raise TransientError

    async with open_pool(1) as pool:
        await pool.submit(fn, id="mine", retry=Retry(3))
    assert seen == [("mine", 1), ("mine", 2), ("mine", 3)]


async def test_retries_wait_longer_each_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The wait between attempts grows; the seed promised that and did not do it."""
    times: list[float] = []

    async def fn() -> None:
        times.append(trio.current_time())
        raise TransientError

    backoff = Backoff(initial=0.25, jitter=0.0)
    async with open_pool(1, unobserved="ignore") as pool:
        await pool.submit(fn, retry=Retry(4, backoff))
    assert times == [0.0, 0.25, 0.75, 1.75]


async def test_a_cancelled_retry_is_cancelled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Cancelled between two attempts a job is cancelled; the seed said success."""
    fn = Flaky(math.inf)
    async with open_pool(1) as pool:
        reply = await pool.submit(fn, retry=Retry(3, Backoff(10.0, jitter=0.0)))
        await trio.sleep(1.5)
        assert reply.state is JobState.DELAYED
        assert reply.cancel()
        with pytest.raises(JobCancelled):
            await reply.wait()
        assert reply.state is JobState.CANCELLED
    assert (fn.calls, trio.current_time()) == (1, 1.5)


# Awaiting, cancelling, and the job itself.


async def test_cancel_a_running_job_that_looks_at_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A running job hears of its cancellation, cleans up and is cancelled."""
    heard: list[str] = []

    async def fn() -> None:
        try:
            await trio.sleep(60.0)
        except trio.Cancelled:
            heard.append("cancelled")
            raise

    async with open_pool(1) as pool:
        reply = await pool.submit(fn)
        await trio.sleep(1.5)
        assert reply.cancel()
        with pytest.raises(JobCancelled) as caught:
            await reply.wait()
        assert caught.value.started
        assert (heard, reply.state) == (["cancelled"], JobState.CANCELLED)
    assert trio.current_time() == 1.5


async def test_a_cancelled_job_that_finishes_all_the_same_is_done(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A job that answers its cancellation by a result has that result."""

    async def fn() -> str:
        with trio.move_on_after(math.inf):
            try:
                await trio.sleep(60.0)
            except trio.Cancelled:
                return "what there was"
        return "all"

    async with open_pool(1) as pool:
        reply = await pool.submit(fn)
        await wait_all_tasks_blocked()
        assert reply.cancel()
        assert await reply.wait() == "what there was"
        assert reply.state is JobState.DONE


async def test_a_job_knows_its_id_and_can_cancel_itself(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """`current_job` tells a function who it is, and lets it end its own job."""
    seen: list[Any] = []

    async def fn() -> None:
        job = current_job()
        seen.append((job.id, job.attempt))
        seen.append((job.cancel(), job.cancel()))
        await trio.sleep(60.0)

    async with open_pool(1, retry=Retry(3)) as pool:
        reply = await pool.submit(fn, id="mine")
        with pytest.raises(JobCancelled):
            await reply.wait()
        assert reply.state is JobState.CANCELLED
    # Only the first call asked for it, and it was not tried again.
    assert seen == [("mine", 1), (True, False)]
    assert trio.current_time() == 0.0


async def test_100_readers_10_waiters_10_cancels_one_run(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """However many look, wait and cancel at once, the job runs and ends once."""
    gauge = Gauge(60.0)
    states: list[JobState] = []
    waits: list[str] = []
    cancels: list[bool] = []

    async with open_pool(1) as pool:
        reply = await pool.submit(gauge)
        await wait_all_tasks_blocked()

        async def read() -> None:
            await trio.lowlevel.checkpoint()
            states.append(reply.state)

        async def wait() -> None:
            with pytest.raises(JobCancelled):
                await reply.wait()
            waits.append("cancelled")

        async def cancel() -> None:
            await trio.lowlevel.checkpoint()
            cancels.append(reply.cancel())

        async with trio.open_nursery() as nursery:
            for fn in [read] * 100 + [wait] * 10 + [cancel] * 10:
                nursery.start_soon(fn)

    assert len(states) == 100
    assert set(states) <= {JobState.RUNNING, JobState.CANCELLED}
    assert waits == ["cancelled"] * 10
    # One of them was the one that did it.
    assert sorted(cancels) == [False] * 9 + [True]
    assert (gauge.calls, gauge.ended, gauge.now) == (1, 0, 0)
    count = pool.statistics()
    assert (count.accepted, count.cancelled) == (1, 1)


async def test_many_waiters_all_get_the_result(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Ten waiters, and an eleventh who comes late, read the same result."""
    results: list[object] = []
    value = object()
    gauge = Gauge(1.5)
    async with open_pool(1) as pool:
        reply = await pool.submit(gauge, value)

        async def wait() -> None:
            results.append(await reply.wait())

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(wait)
        await wait()
    assert results == [value] * 11
    assert gauge.calls == 1


# States.


async def test_the_table_of_states(autojump_clock: trio.testing.MockClock) -> None:
    """Every state can be reached, and only that of an ended job is terminal."""
    seen: dict[JobState, tuple[bool, bool, bool]] = {}

    def look(reply: Any) -> None:
        state, done = reply.state, reply.done
        seen[state] = (state.terminal, done, reply.outcome is not None)

    async with open_pool(
        1, max_backlog=2, overflow="drop_oldest", unobserved="ignore"
    ) as pool:
        running = await pool.submit(obey, 1.5)
        queued = await pool.submit(obey, "never")
        delayed = await pool.submit(obey, "never", delay=5.0)
        await wait_all_tasks_blocked()
        for reply in (running, queued, delayed):
            look(reply)
        # The third to wait pushes out the one that has waited longest.
        expired = await pool.submit(obey, "never", ttl=1.0)
        look(queued)
        delayed.cancel()
        look(delayed)
        await trio.sleep(1.25)
        look(expired)
        await running.wait()
        look(running)
        for job in (ValueError(), SystemExit(), 60.0):
            ended = await pool.submit(obey, job, timeout=0.5)
            await pool.join()
            look(ended)
        for reply, error in (
            (queued, JobDropped),
            (delayed, JobCancelled),
            (expired, JobExpired),
        ):
            with pytest.raises(error) as caught:
                await reply.wait()
            assert not caught.value.started
    waiting, ended_ = (False, False, False), (True, True, True)
    live = {JobState.DELAYED, JobState.QUEUED, JobState.RUNNING}
    assert seen == {s: waiting if s in live else ended_ for s in JobState}


async def test_no_job_stays_running(autojump_clock: trio.testing.MockClock) -> None:
    """Whatever its end is, it leaves the running ones; the seed lost track of some."""
    ends: list[tuple[Any, dict[str, Any]]] = [
        ("fine", {}),
        (ValueError(), {}),
        (StopIteration(), {}),
        (ExceptionGroup("several", [ValueError()]), {}),
        (SystemExit(), {}),
        (GeneratorExit(), {}),
        (60.0, {"timeout": 0.5}),
        (ValueError(), {"retry": Retry(2, at_once)}),
    ]
    async with open_pool(2, unobserved="ignore") as pool:
        replies = [await pool.submit(obey, job, **options) for job, options in ends]
        await pool.join()
        assert all(reply.state.terminal for reply in replies)
        count = pool.statistics()
        assert (count.running, count.queued, count.delayed) == (0, 0, 0)
        assert balanced(count)


# Hooks.


JOB_HOOKS = ["queue", "start", "complete", "error", "cancel", "retry", "drop"]


class Recorder(Hooks):
    """Writes down what it hears of jobs, then raises what it is told to raise."""

    def __init__(self, *raising: str) -> None:
        self.raising = raising
        self.heard: list[tuple[str, int | str, float]] = []
        self.errors: list[BaseException | None] = []

    def hear(self, name: str, event: JobChanged) -> None:
        assert event.kind == f"job_{name}"
        self.heard.append((name, event.job_id, event.time))
        if name in ("error", "retry"):
            self.errors.append(event.error)
        if name in self.raising:
            raise RuntimeError(f"on_job_{name} is broken")

    def names_of(self, job_id: str) -> list[str]:
        return [name for name, job, _ in self.heard if job == job_id]

    def on_job_queue(self, event: JobChanged) -> None:
        self.hear("queue", event)

    def on_job_start(self, event: JobChanged) -> None:
        self.hear("start", event)

    def on_job_complete(self, event: JobChanged) -> None:
        self.hear("complete", event)

    def on_job_error(self, event: JobChanged) -> None:
        self.hear("error", event)

    def on_job_cancel(self, event: JobChanged) -> None:
        self.hear("cancel", event)

    def on_job_retry(self, event: JobChanged) -> None:
        self.hear("retry", event)

    def on_job_drop(self, event: JobChanged) -> None:
        self.hear("drop", event)


async def run_all_fates(*recorders: Recorder) -> dict[str, JobState]:
    """Run jobs that call every one of the seven hooks; return their fates."""
    async with open_pool(1, hooks=recorders) as pool:
        good = await pool.submit(obey, 0.5, id="good")
        # So that it has started before there are others.
        await wait_all_tasks_blocked()
        bad = await pool.submit(obey, ValueError(), id="bad")
        flaky = await pool.submit(
            Flaky(1), id="flaky", retry=Retry(2, Backoff(1.0, jitter=0.0))
        )
        called_off = await pool.submit(obey, "never", id="called off")
        late = await pool.submit(obey, "never", id="late", ttl=0.25)
        called_off.cancel()
        assert await good.wait() == 0.5
        with pytest.raises(ValueError):
            await bad.wait()
        await flaky.wait()
        return {str(r.id): r.state for r in (good, bad, flaky, called_off, late)}


FATES = {
    "good": JobState.DONE,
    "bad": JobState.FAILED,
    "flaky": JobState.DONE,
    "called off": JobState.CANCELLED,
    "late": JobState.EXPIRED,
}


async def test_each_hook_is_called_with_id_and_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Every hook hears which job it is about and when it happened."""
    recorder = Recorder()
    assert await run_all_fates(recorder) == FATES
    assert recorder.heard == [
        ("queue", "good", 0.0),
        ("start", "good", 0.0),
        ("queue", "bad", 0.0),
        ("queue", "flaky", 0.0),
        ("queue", "called off", 0.0),
        ("queue", "late", 0.0),
        ("cancel", "called off", 0.0),
        ("drop", "late", 0.25),
        ("complete", "good", 0.5),
        ("start", "bad", 0.5),
        ("error", "bad", 0.5),
        ("start", "flaky", 0.5),
        ("retry", "flaky", 0.5),
        ("start", "flaky", 1.5),
        ("complete", "flaky", 1.5),
    ]
    assert [type(error) for error in recorder.errors] == [ValueError, TransientError]
    assert {name for name, _, _ in recorder.heard} == set(JOB_HOOKS)


async def test_hooks_come_in_order(autojump_clock: trio.testing.MockClock) -> None:
    """Queued, started, finished; the seed told of the end before the start."""
    recorder = Recorder()
    await run_all_fates(recorder)
    assert recorder.names_of("good") == ["queue", "start", "complete"]
    assert recorder.names_of("bad") == ["queue", "start", "error"]
    assert recorder.names_of("flaky") == [
        "queue",
        "start",
        "retry",
        "start",
        "complete",
    ]
    assert recorder.names_of("called off") == ["queue", "cancel"]
    assert recorder.names_of("late") == ["queue", "drop"]


@pytest.mark.parametrize("broken", [*JOB_HOOKS, "all"])
async def test_a_raising_hook_is_harmless(
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    """A hook that raises is logged and left out; all jobs fare as without it."""
    raising = JOB_HOOKS if broken == "all" else [broken]
    alone, recorder, sound = Recorder(), Recorder(*raising), Recorder()
    await run_all_fates(alone)
    assert await run_all_fates(recorder, sound) == FATES
    for job_id in FATES:
        assert sound.names_of(job_id) == alone.names_of(job_id)
    for name in raising:
        assert [hook for hook, _, _ in recorder.heard].count(name) == 1
    assert len(caplog.records) == len(raising)
    assert all("is broken" in str(r.exc_info) for r in caplog.records)


# The pool.


@pytest.mark.parametrize("size", [5, 0, -5])
async def test_pool_sizes(size: int) -> None:
    """Five workers are five, no workers let jobs wait, fewer than none are refused."""
    if size < 0:
        with pytest.raises(ValueError, match="size"):
            open_pool(size)
        return
    async with open_pool(size) as pool:
        count = pool.statistics()
        assert (pool.size, count.size, count.workers, count.busy) == (
            size,
            size,
            size,
            0,
        )
        reply = await pool.submit(obey, "value")
        await wait_all_tasks_blocked()
        assert reply.state is (JobState.DONE if size else JobState.QUEUED)
        await pool.resize(5)
        assert await reply.wait() == "value"


async def test_the_third_submit_on_a_full_pool_of_two_waits(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """With no backlog a third submit waits until one of two workers is free."""
    gauge = Gauge(1.5)
    async with open_pool(2, max_backlog=0) as pool:
        await pool.submit(gauge)
        await pool.submit(gauge)
        assert trio.current_time() == 0.0
        with pytest.raises(BacklogFull):
            pool.submit_nowait(gauge)
        await pool.submit(gauge)
        assert trio.current_time() == 1.5
    assert gauge.starts == [0.0, 0.0, 1.5]
    assert gauge.peak == 2


async def test_a_cancelled_submit_has_given_in_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A submit that waits heeds its cancel scope; the seed ignored its context."""
    gauge, never = Gauge(5.0), Gauge(0.0)
    async with open_pool(1, max_backlog=0) as pool:
        await pool.submit(gauge)
        with trio.move_on_after(1.5) as scope:
            await pool.submit(never)
        assert scope.cancelled_caught
        assert trio.current_time() == 1.5
        with trio.CancelScope() as cancelled:
            cancelled.cancel()
            await pool.submit(never)
        assert pool.statistics().accepted == 1
    assert never.calls == 0


async def test_submit_after_stop_is_refused(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A stopping pool says so, takes nothing, and finishes what it has."""
    gauge, never = Gauge(1.5), Gauge(0.0)
    async with open_pool(1) as pool:
        assert not pool.closed
        reply = await pool.submit(gauge)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.shutdown)
            await wait_all_tasks_blocked()
            assert pool.closed
            for refused in (
                pool.submit,
                pool.process,
                lambda fn: pool.submit_batch(fn, [1]),
                lambda fn: pool.map(fn, [1]),
            ):
                with pytest.raises(PoolClosed) as caught:
                    await refused(never)
                assert not caught.value.started
        await reply.wait()
    assert pool.closed
    assert (gauge.ended, never.calls, trio.current_time()) == (1, 0, 1.5)


async def test_a_group_of_ten_good_ones() -> None:
    """`map` of ten returns ten results, in the order of the input."""
    async with open_pool(3) as pool:
        assert await pool.map(obey, range(10)) == list(range(10))


async def test_a_group_with_one_error(autojump_clock: trio.testing.MockClock) -> None:
    """The first error ends the group: siblings are cancelled, the rest never start."""
    error = TransientError("one of ten")
    gauge = Gauge(60.0)

    async def fn(item: int) -> None:
        if item == 2:
            await trio.sleep(1.5)
            raise error
        await gauge(item)

    async with open_pool(3) as pool:
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map(fn, range(10))
        assert caught.value.exceptions == (error,)
        assert error.__notes__ == ["trio_pool: item 2: 2"]
        assert trio.current_time() == 1.5
        assert (gauge.calls, gauge.ended, gauge.now) == (2, 0, 0)
        assert await pool.process(obey, "next") == "next"
    assert (pool.statistics().failed, pool.statistics().cancelled) == (1, 2)


async def test_a_group_under_a_limit_of_50_milliseconds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A group whose time is over is cancelled as a whole, and nothing runs on."""
    gauge = Gauge(60.0)
    async with open_pool(2) as pool:
        with trio.move_on_after(0.05) as scope:
            await pool.map(gauge, range(10))
        assert scope.cancelled_caught
        assert trio.current_time() == 0.05
        assert (gauge.calls, gauge.now, pool.statistics().busy) == (2, 0, 0)


async def test_a_batch_of_ten() -> None:
    """`submit_batch` gives ten replies, in the order of its input."""
    async with open_pool(3) as pool:
        replies = await pool.submit_batch(obey, range(10))
        assert [await reply.wait() for reply in replies] == list(range(10))
        assert len({reply.id for reply in replies}) == 10


async def test_a_batch_with_errors_keeps_every_fate() -> None:
    """Jobs of `submit_batch` and `settle` share no fate: each has its own outcome."""
    error = TransientError()
    items = ["first", error, "last"]
    async with open_pool(2) as pool:
        replies = await pool.submit_batch(obey, items)
        await pool.join()
        fates = [JobState.DONE, JobState.FAILED, JobState.DONE]
        assert [reply.state for reply in replies] == fates
        with pytest.raises(TransientError):
            await replies[1].wait()
        first, second, last = await pool.settle(obey, items)
        assert (first.outcome.unwrap(), last.outcome.unwrap()) == ("first", "last")
        assert (second.index, second.item) == (1, error)
        with pytest.raises(TransientError):
            second.outcome.unwrap()


async def test_wait(autojump_clock: trio.testing.MockClock) -> None:
    """`join` returns when every job has ended, those given in meanwhile too."""
    gauge = Gauge(1.0)

    async def give_in_another() -> None:
        await gauge()
        await pool.submit(gauge)

    async with open_pool(1) as pool:
        await pool.submit(give_in_another)
        await pool.join()
        assert (gauge.ended, trio.current_time()) == (2, 2.0)
        assert not pool.closed


async def test_wait_under_a_limit(autojump_clock: trio.testing.MockClock) -> None:
    """A wait that is given up costs nothing; the seed leaked a goroutine each time."""
    gauge = Gauge(100.0)
    async with open_pool(1) as pool:
        reply = await pool.submit(gauge)
        await wait_all_tasks_blocked()
        tasks = living_tasks()
        for number in range(1, 51):
            with trio.move_on_after(0.5) as scope:
                await (pool.join() if number % 2 else reply.wait())
            assert scope.cancelled_caught
            assert trio.current_time() == 0.5 * number
        assert living_tasks() == tasks
        assert reply.state is JobState.RUNNING
        await pool.join()
        assert (gauge.ended, trio.current_time()) == (1, 100.0)


async def test_stop_under_a_limit(autojump_clock: trio.testing.MockClock) -> None:
    """A `shutdown` given up leaves the pool closed and its accepted jobs running."""
    before = living_tasks()
    gauge = Gauge(5.0)
    async with open_pool(1) as pool:
        await pool.submit(gauge)
        with trio.move_on_after(1.5) as scope:
            await pool.shutdown()
        assert scope.cancelled_caught
        assert pool.closed
        assert (gauge.now, trio.current_time()) == (1, 1.5)
        report = await pool.shutdown()
        assert (report.done, report.cancelled, report.unfinished) == (1, 0, 0)
    assert gauge.ended == 1
    assert living_tasks() == before


async def test_stop_with_a_grace(autojump_clock: trio.testing.MockClock) -> None:
    """What has not ended when the grace is over is cancelled, and counted."""
    gauge = Gauge(1.0)
    async with open_pool(1) as pool:
        replies = [await pool.submit(gauge) for _ in range(4)]
        report = await pool.shutdown(grace=2.5)
        assert (report.done, report.failed, report.cancelled) == (2, 0, 2)
        assert report.unfinished == 0
        assert trio.current_time() == 2.5
    fates = [JobState.DONE] * 2 + [JobState.CANCELLED] * 2
    assert [reply.state for reply in replies] == fates


async def test_statistics_while_two_run_and_after(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Busy and free workers, running and done jobs are counted at each moment."""
    gauge = Gauge(1.5)
    async with open_pool(5) as pool:
        await pool.submit_batch(gauge, range(2))
        await wait_all_tasks_blocked()
        count = pool.statistics()
        assert (count.size, count.workers, count.busy) == (5, 5, 2)
        assert (count.workers - count.busy, count.running, count.done) == (3, 2, 0)
        await pool.join()
        count = pool.statistics()
        assert (count.workers, count.busy, count.running, count.done) == (5, 0, 0, 2)
    assert pool.statistics().done == 2


async def test_one_done_one_failed_one_cancelled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Each fate is counted once, and in its own place."""
    async with open_pool(3, unobserved="ignore") as pool:
        await pool.submit(obey, "fine")
        await pool.submit(obey, ValueError())
        (await pool.submit(obey, 60.0)).cancel()
        await pool.join()
        count = pool.statistics()
    assert (count.done, count.failed, count.cancelled) == (1, 1, 1)
    assert count.accepted == 3
    assert balanced(count)


async def test_statistics_keep_no_list_of_jobs() -> None:
    """Ended jobs are counted and forgotten; the seed kept every one of them."""

    class Item:
        """An input that can be referred to weakly."""

    async with open_pool(2) as pool:
        refs: list[weakref.ref[Item]] = []
        for number in range(200):
            item = Item()
            refs.append(weakref.ref(item))
            if number % 2:
                await pool.process(obey, item)
            else:
                await (await pool.submit(obey, item)).wait()
            del item
        # The next jobs take the place of the last ones that the workers had.
        await pool.map(obey, range(4))
        gc.collect()
        assert [ref for ref in refs if ref() is not None] == []
        assert pool.statistics().done == 204


async def test_100_submitters() -> None:
    """A hundred submitters at once each get their own result."""
    results: dict[int, int] = {}
    async with open_pool(5, max_backlog=10) as pool:

        async def submitter(number: int) -> None:
            results[number] = await (await pool.submit(obey, number)).wait()

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(submitter, number)
    assert results == {number: number for number in range(100)}
    count = pool.statistics()
    assert (count.accepted, count.done) == (100, 100)


async def test_50_jobs_of_10_ms_on_5_workers(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Five at a time and never more: fifty jobs take ten times one job's time."""
    gauge = Gauge(0.01)
    async with open_pool(5) as pool:
        await pool.submit_batch(gauge, range(50))
    assert (gauge.calls, gauge.ended, gauge.peak) == (50, 50, 5)
    assert trio.current_time() == pytest.approx(0.1)


# The limiter, shared with a pool.


async def test_limits_of_the_limiter(autojump_clock: trio.testing.MockClock) -> None:
    """A running job holds one token; how many are held and free can be read."""
    limiter = trio.CapacityLimiter(3)
    gauge = Gauge(1.5)
    async with open_pool(5, limiter=limiter) as pool:
        assert (limiter.total_tokens, limiter.available_tokens) == (3, 3)
        await pool.submit_batch(gauge, range(2))
        await wait_all_tasks_blocked()
        assert (limiter.borrowed_tokens, limiter.available_tokens) == (2, 1)
        await pool.join()
        assert (limiter.borrowed_tokens, limiter.available_tokens) == (0, 3)


async def test_acquire(autojump_clock: trio.testing.MockClock) -> None:
    """Code beside the pool waits for a token until a job gives one back."""
    limiter = trio.CapacityLimiter(2)
    gauge = Gauge(1.5)
    async with open_pool(2, limiter=limiter) as pool:
        await pool.submit_batch(gauge, range(2))
        await wait_all_tasks_blocked()
        async with limiter:
            assert trio.current_time() == 1.5
            assert limiter.borrowed_tokens == 1
        assert limiter.borrowed_tokens == 0


async def test_jobs_wait_for_a_token_that_other_code_holds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A job waits, queued beside idle workers, until the token is given back."""
    limiter = trio.CapacityLimiter(1)
    gauge = Gauge(0.5)
    async with open_pool(2, limiter=limiter) as pool:
        async with limiter:
            reply = await pool.submit(gauge)
            await trio.sleep(1.5)
            assert reply.state is JobState.QUEUED
            assert pool.statistics().busy == 0
        await reply.wait()
    assert gauge.starts == [1.5]
    assert limiter.borrowed_tokens == 0


async def test_try_acquire(autojump_clock: trio.testing.MockClock) -> None:
    """Trying never waits: it takes a free token, or says that there is none."""
    limiter = trio.CapacityLimiter(2)
    async with open_pool(2, limiter=limiter) as pool:
        await pool.submit(obey, 1.5)
        await wait_all_tasks_blocked()
        limiter.acquire_nowait()
        with pytest.raises(trio.WouldBlock):
            limiter.acquire_on_behalf_of_nowait("another")
        assert trio.current_time() == 0.0
        limiter.release()
        await pool.join()
        assert limiter.borrowed_tokens == 0


async def test_acquire_under_a_cancelled_scope_holds_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Neither code nor a caller of the pool takes a token when it is cancelled."""
    limiter = trio.CapacityLimiter(1)
    gauge = Gauge(0.0)
    async with open_pool(2, limiter=limiter) as pool:
        with trio.CancelScope() as scope:
            scope.cancel()
            await limiter.acquire()
        assert scope.cancelled_caught
        assert limiter.borrowed_tokens == 0
        limiter.acquire_on_behalf_of_nowait("other code")
        with trio.move_on_after(1.5) as scope:
            await pool.process(gauge)
        assert scope.cancelled_caught
        limiter.release_on_behalf_of("other code")
        await wait_all_tasks_blocked()
        assert limiter.borrowed_tokens == 0
    assert gauge.calls == 0
    assert limiter.borrowed_tokens == 0


@pytest.mark.parametrize(("seconds", "held"), [(0.5, False), (2.0, True)])
async def test_acquire_with_a_deadline(
    autojump_clock: trio.testing.MockClock, seconds: float, held: bool
) -> None:
    """A token freed before the deadline is taken; after it nothing is held."""
    limiter = trio.CapacityLimiter(1)
    async with open_pool(1, limiter=limiter) as pool:
        await pool.submit(obey, 1.5)
        await wait_all_tasks_blocked()
        with trio.move_on_after(seconds) as scope:
            await limiter.acquire()
        assert scope.cancelled_caught is not held
        assert trio.current_time() == min(seconds, 1.5)
        if held:
            assert limiter.borrowed_tokens == 1
            limiter.release()
        await pool.join()
        assert limiter.borrowed_tokens == 0


async def test_release_without_a_hold_is_refused() -> None:
    """Giving back what one has not got is an error at once; the seed hung."""
    limiter = trio.CapacityLimiter(1)
    async with open_pool(1, limiter=limiter) as pool:
        with pytest.raises(RuntimeError):
            limiter.release()
        assert await pool.process(obey, "value") == "value"
    assert limiter.available_tokens == 1


async def test_the_limiter_is_never_exceeded_with_50_tasks_of_20(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Two pools and other code under one limiter hold all it has and never more.

    It takes longer than 50 ms, as it is about 1,000 turns.
    """
    limiter = trio.CapacityLimiter(5)
    gauge = Gauge(0.25)
    borrowers = 50
    looks: list[tuple[int, int]] = []

    async def borrow(number: int) -> None:
        nonlocal borrowers
        for turn in range(20):
            if (number + turn) % 3 == 0:
                async with limiter:
                    await gauge()
            else:
                await (first, second)[turn % 2].process(gauge)
        borrowers -= 1

    async def look() -> None:
        # Between the turns, which begin and end every quarter of a second.
        await trio.sleep(0.125)
        while borrowers:
            looks.append((gauge.now, min(5, borrowers)))
            await trio.sleep(0.25)

    async with (
        open_pool(10, limiter=limiter) as first,
        open_pool(10, limiter=limiter) as second,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(look)
        for number in range(50):
            nursery.start_soon(borrow, number)
    assert (gauge.ended, gauge.peak, limiter.borrowed_tokens) == (1000, 5, 0)
    # No free token was ever left lying while somebody wanted it.
    assert [look for look in looks if look[0] != look[1]] == []


@pytest.mark.parametrize(
    "job", [ValueError(), SystemExit(), 60.0, "value"], ids=lambda job: str(type(job))
)
async def test_every_end_of_a_job_gives_its_token_back(
    autojump_clock: trio.testing.MockClock, job: Any
) -> None:
    """Failed, crashed, timed out or done: the token is free when the job has ended."""
    limiter = trio.CapacityLimiter(1)
    async with open_pool(2, limiter=limiter, timeout=0.5, unobserved="ignore") as pool:
        for _ in range(3):
            await pool.submit(obey, job)
            await pool.join()
            assert limiter.borrowed_tokens == 0


# Retry strategies of the second version.


def waits(backoff: Callable[[int], float], number: int) -> list[float]:
    return [backoff(attempt) for attempt in range(number)]


def test_constant_growth() -> None:
    """A factor of 1 waits the same time each time."""
    assert waits(Backoff(0.5, factor=1.0, jitter=0.0), 4) == [0.5] * 4


async def test_linear_growth(autojump_clock: trio.testing.MockClock) -> None:
    """Any function of the number of the wait is a strategy, such as a linear one."""
    times: list[float] = []

    async def fn() -> None:
        times.append(trio.current_time())
        raise TransientError

    def linear(attempt: int) -> float:
        return 0.5 * (attempt + 1)

    async with open_pool(1, unobserved="ignore") as pool:
        await pool.submit(fn, retry=Retry(4, linear))
    steps = [after - before for before, after in itertools.pairwise(times)]
    assert steps == [0.5, 1.0, 1.5]


def test_exponential_growth_and_cap() -> None:
    """Waits are multiplied each time, until they reach the maximum."""
    backoff = Backoff(initial=0.25, factor=2.0, maximum=1.5, jitter=0.0)
    assert waits(backoff, 6) == [0.25, 0.5, 1.0, 1.5, 1.5, 1.5]


@pytest.mark.parametrize("factor", [2, 2.0, 1.5, 10**6])
def test_attempt_5000_does_not_overflow(factor: float) -> None:
    """However far the power is beyond a float, the wait is the maximum."""
    backoff = Backoff(initial=0.1, factor=factor, maximum=30.0, jitter=0.0)
    assert backoff(5000) == 30.0


@pytest.mark.parametrize("jitter", [0.0, 0.25, 1.0])
def test_jitter_stays_within_its_bounds(jitter: float) -> None:
    """Chance takes off its share at most, and adds nothing; nor is it constant."""
    backoff = Backoff(initial=2.0, factor=1.0, jitter=jitter)
    draw = random.Random(0).random
    drawn = [backoff(0, draw) for _ in range(1000)]
    assert 2.0 * (1 - jitter) <= min(drawn)
    assert max(drawn) <= 2.0
    assert len(set(drawn)) == (1000 if jitter else 1)


async def test_only_named_errors_are_tried_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A strategy says by type or by predicate which errors are worth a retry."""
    for on in (TransientError, lambda error: isinstance(error, TransientError)):
        script = iter([TransientError(), ValueError("final"), None])

        async def fn(script: Any = script) -> None:
            error = next(script)
            if error is not None:
                raise error

        async with open_pool(1, retry=Retry(5, on=on)) as pool:
            with pytest.raises(ValueError, match="final"):
                await pool.process(fn)
            assert pool.statistics().retries == 1


async def test_the_builder() -> None:
    """A definition is built step by step, and none of its steps changes another's."""
    plain = Task(obey, "input")
    built = (
        plain.with_id("built")
        .with_timeout(1.5)
        .with_priority(2)
        .with_retry(attempts=5, on=TransientError)
    )
    assert built.options == {
        "id": "built",
        "timeout": 1.5,
        "priority": 2,
        "retry": Retry(5, on=TransientError),
    }
    assert plain.options == {}
    async with open_pool(1) as pool:
        (reply,) = await pool.go(built)
        assert (await reply.wait(), reply.id) == ("input", "built")


request: ContextVar[str] = ContextVar("request", default="none")


@pytest.mark.parametrize("way", ["process", "submit"])
async def test_a_job_knows_its_callers_context(
    autojump_clock: trio.testing.MockClock, way: str
) -> None:
    """The function sees its caller's variables, and its deadline if it is awaited."""

    async def look() -> tuple[str, float]:
        return request.get(), current_job().deadline

    seen: dict[str, tuple[str, float]] = {}
    async with open_pool(2) as pool:

        async def call(name: str) -> None:
            request.set(name)
            with trio.move_on_at(1.5):
                if way == "process":
                    seen[name] = await pool.process(look)
                else:
                    seen[name] = await (await pool.submit(look)).wait()

        async with trio.open_nursery() as nursery:
            for name in ("one", "two", "three"):
                nursery.start_soon(call, name)
    deadline = 1.5 if way == "process" else math.inf
    assert seen == {name: (name, deadline) for name in ("one", "two", "three")}


@pytest.mark.parametrize("whose", ["caller", "pool"])
async def test_a_job_ends_with_its_callers_context_and_with_its_pools(
    autojump_clock: trio.testing.MockClock, whose: str
) -> None:
    """Whichever of the two is cancelled, the running job is cancelled too."""
    gauge = Gauge(60.0)
    async with open_pool(1) as pool:
        if whose == "caller":
            with trio.move_on_after(1.5) as scope:
                await pool.process(gauge)
            assert scope.cancelled_caught
        else:
            reply = await pool.submit(gauge)
            await trio.sleep(1.5)
            pool.cancel()
            with pytest.raises(JobCancelled):
                await reply.wait()
    assert (gauge.calls, gauge.now, gauge.ended) == (1, 0, 0)
    assert trio.current_time() == 1.5


# Autoscaling of the second version.


class Sizes(Hooks):
    """Writes down every change of the size, and every worker that leaves."""

    def __init__(self) -> None:
        self.sizes: list[tuple[float, int]] = []
        self.left: list[int] = []

    def on_resize(self, event: PoolResized) -> None:
        self.sizes.append((event.time, event.new))

    def on_worker_stop(self, event: WorkerChanged) -> None:
        self.left.append(event.worker)


async def test_autoscale_starts_at_min_reaches_max_and_settles_to_min(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The size follows the work: up to max and never beyond, and back to min."""
    sizes, gauge = Sizes(), Gauge(2.0)
    scale = Autoscale(min=2, max=5, interval=0.25, down_after=1.0)
    async with open_pool(2, scale=scale, hooks=[sizes]) as pool:
        assert (pool.size, pool.statistics().workers) == (2, 2)
        await pool.submit_batch(gauge, range(40))
        await pool.join()
        assert (pool.size, gauge.peak) == (5, 5)
        await trio.sleep(10.0)
        assert (pool.size, pool.statistics().workers) == (2, 2)
        # It goes on serving, and grows again.
        await pool.map(gauge, range(40))
        assert gauge.peak == 5
    assert [size for _, size in sizes.sizes] == [3, 4, 5, 4, 3, 2, 3, 4, 5]
    assert gauge.ended == 80


async def test_autoscale_never_stops_a_busy_worker(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Shrinking lets idle workers go; those with a long job finish it."""
    sizes = Sizes()
    scale = Autoscale(min=1, max=4, interval=0.25, down_after=1.0)
    async with open_pool(1, scale=scale, hooks=[sizes]) as pool:
        long = await pool.submit_batch(obey, [50.0, 50.0])
        await pool.submit_batch(obey, [3.0] * 2)
        await pool.submit(obey, 3.0)
        await trio.sleep(40.0)
        assert (pool.size, pool.statistics().busy) == (2, 2)
        working = {reply.worker for reply in long}
        assert {worker.id for worker in pool.workers()} == working
        assert len(sizes.left) == 2
        assert not working & set(sizes.left)
        await pool.join()
        assert [reply.state for reply in long] == [JobState.DONE] * 2
    count = pool.statistics()
    assert (count.done, count.cancelled, count.restarts) == (5, 0, 0)


async def test_autoscale_lets_the_longest_idle_worker_go_first(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Of idle workers, who has been idle for longest leaves first."""
    sizes = Sizes()
    scale = Autoscale(min=1, max=3, interval=0.25, down_after=2.0)
    async with open_pool(1, scale=scale, hooks=[sizes]) as pool:
        # The oldest workers are idle first, and all are before the first one goes.
        replies = await pool.submit_batch(obey, [2.0, 2.5, 3.0])
        await pool.join()
        assert (pool.size, sizes.left) == (3, [])
        ended = [reply.worker for reply in replies]
        await trio.sleep(10.0)
        assert pool.size == 1
        assert sizes.left == ended[:2]
        assert [worker.id for worker in pool.workers()] == ended[2:]


async def test_autoscale_does_not_flap(autojump_clock: trio.testing.MockClock) -> None:
    """Bursts closer together than the cooldown do not make the size go to and fro."""
    sizes, gauge = Sizes(), Gauge(0.5)
    scale = Autoscale(min=1, max=3, interval=0.25, up_after=0.25, down_after=2.0)
    async with open_pool(1, scale=scale, hooks=[sizes]) as pool:
        for _ in range(10):
            await pool.map(gauge, range(9))
            await trio.sleep(1.0)
        grown = list(sizes.sizes)
        assert [size for _, size in grown] == [2, 3]
        await trio.sleep(10.0)
    shrunk = sizes.sizes[len(grown) :]
    assert [size for _, size in shrunk] == [2, 1]
    # Each change in one direction was followed by its cooldown.
    assert grown[1][0] - grown[0][0] >= 0.25
    assert shrunk[1][0] - shrunk[0][0] >= 2.0


async def test_autoscale_drops_no_accepted_job_and_has_no_hidden_rate(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """2,000 jobs at once are all done, in no time; the seed let 750 a second through.

    It takes longer than 50 ms, as it is about so many jobs.
    """
    gauge = Gauge(0.0)
    scale = Autoscale(min=1, max=4, interval=0.25)
    async with open_pool(1, scale=scale, max_backlog=math.inf) as pool:
        replies = [pool.submit_nowait(gauge, number) for number in range(2000)]
        await pool.join()
        assert trio.current_time() == 0.0
        assert [await reply.wait() for reply in replies] == list(range(2000))
    count = pool.statistics()
    assert (count.accepted, count.done) == (2000, 2000)


async def submit_ten(
    submit: Callable[..., Awaitable[Any]], replies: list[Any], refused: list[Exception]
) -> None:
    for number in range(10):
        await trio.sleep(0.05 * (1 + number % 3))
        try:
            replies.append(await submit(obey, 0.25))
        except PoolClosed as error:
            refused.append(error)


@pytest.mark.parametrize("grace", [0.0, 0.5, math.inf])
@pytest.mark.parametrize("scaled", [False, True])
async def test_200_submits_racing_shutdown(
    autojump_clock: trio.testing.MockClock, grace: float, scaled: bool
) -> None:
    """20 x 10 submits end as done, cancelled or refused: no other error, none lost."""
    replies: list[Any] = []
    refused: list[Exception] = []
    scale = Autoscale(min=1, max=4, interval=0.1) if scaled else None
    async with trio.open_nursery() as nursery:
        async with open_pool(4, scale=scale, max_backlog=8) as pool:
            for _ in range(20):
                nursery.start_soon(submit_ten, pool.submit, replies, refused)
            await trio.sleep(0.5)
            report = await pool.shutdown(grace)
            assert report.unfinished == 0
    assert len(replies) + len(refused) == 200
    assert refused
    count = pool.statistics()
    fates = {reply.state for reply in replies}
    assert fates <= {JobState.DONE, JobState.CANCELLED}
    if grace == math.inf:
        assert fates == {JobState.DONE}
    assert count.accepted == len(replies) == count.done + count.cancelled
    assert balanced(count)
