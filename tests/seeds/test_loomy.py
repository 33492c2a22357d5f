"""The cases of loomy and of tunny before it, and then what their users wished for.

The first half is the pool of one function or one kind of worker, as both have
it; the second half is what neither has, and what other pools are asked for.
"""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import outcome
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_pool import (
    Autoscale,
    BacklogFull,
    Hooks,
    JobCancelled,
    JobChanged,
    JobDropped,
    JobState,
    JobTimeout,
    PoolClosed,
    PoolConfig,
    PoolError,
    PoolStatistics,
    Rate,
    Settled,
    WorkerChanged,
    WorkerCrashed,
    WouldDeadlock,
    open_pool,
)


async def obey(job: Any) -> Any:
    """Return the job; raise it, if it is an error; sleep, if it is a float."""
    if isinstance(job, BaseException):
        raise job
    if isinstance(job, float):
        await trio.sleep(job)
    return job


async def double(number: int) -> int:
    """Return twice the number; a negative one is too much for the worker."""
    if number < 0:
        raise SystemExit(f"negative number: {number}")
    return 2 * number


class Connection:
    """A worker with a state of its own that writes down what is done to it."""

    diary: list[str]
    made = 0
    ready_after = 0.0

    async def __aenter__(self) -> Connection:
        type(self).made += 1
        self.queries = 0
        return self

    async def __call__(self, query: float) -> int:
        self.queries += 1
        if query < 0:
            raise SystemExit
        try:
            await trio.sleep(query)
        except trio.Cancelled:
            self.diary.append("interrupted")
            raise
        return self.queries

    async def ready(self) -> None:
        await trio.sleep(self.ready_after)

    async def __aexit__(self, *exc_info: object) -> None:
        self.diary.append("terminated")


@pytest.fixture
def connection() -> type[Connection]:
    """A class of workers with a diary of its own."""
    return type("Connection", (Connection,), {"diary": []})


def balanced(count: PoolStatistics) -> bool:
    ended = count.done + count.failed + count.timed_out + count.cancelled
    ended += count.expired + count.dropped + count.lost
    return count.accepted == count.delayed + count.queued + count.running + ended


# A pool of one function, and a pool of callbacks.


async def test_func_job() -> None:
    """Ten jobs of one function, one after the other, each give their result."""
    async with open_pool(10, double) as pool:
        for number in range(10):
            assert await pool.process(number) == 2 * number


async def test_func_job_timed() -> None:
    """A job within its time gives its result as one without a limit does."""
    async with open_pool(10, double) as pool:
        for number in range(10):
            assert await pool.process(number, timeout=0.25) == 2 * number
        assert pool.statistics().timed_out == 0


async def test_func_job_under_a_cancel_scope() -> None:
    """A job in a scope that is not cancelled gives its result as any other."""
    async with open_pool(10, double) as pool:
        with trio.fail_after(1.5):
            assert await pool.process(5) == 10


async def test_callback_job() -> None:
    """Each job of a pool of callbacks is a call of its own, with its arguments."""
    counter = 0

    async def increment(by: int, factor: int) -> int:
        nonlocal counter
        counter += by * factor
        return counter

    async with open_pool(10) as pool:
        for _ in range(10):
            await pool.process(increment, 1, 2)
        assert await pool.process(increment, 0, 0) == 20


async def test_callback_of_a_wrong_type_is_refused_at_the_call() -> None:
    """What is no function is refused before it is a job; the seed failed in a worker.

    So is a coroutine, with the advice to give the function and its arguments.
    """
    wrong: Any = 5
    coroutine: Any = double(1)
    async with open_pool(1) as pool:
        with pytest.raises(TypeError, match="must be an async function, got 5"):
            await pool.process(wrong)
        with pytest.raises(TypeError, match="pass the function and its arguments"):
            await pool.process(coroutine)
        assert pool.statistics().accepted == 0
        assert await pool.process(double, 1) == 2


def test_function_of_a_wrong_type_is_refused_at_the_making() -> None:
    """A handler that is no async function is refused before a pool is there."""
    wrong: Any = len
    with pytest.raises(TypeError, match="handler must be"):
        open_pool(1, wrong)
    with pytest.raises(TypeError, match="worker must be"):
        open_pool(1, worker=wrong)


async def test_parallel_jobs() -> None:
    """Ten jobs that wait for each other are all served by ten workers, twice."""
    arrived = 0
    all_here = trio.Event()

    async def meet(_: object) -> None:
        nonlocal arrived
        arrived += 1
        if arrived % 10 == 0:
            all_here.set()
        await all_here.wait()

    async with open_pool(10, meet) as pool:
        for _ in range(2):
            all_here = trio.Event()
            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(pool.process, number)
        assert pool.statistics().done == 20


# Custom workers: a state of their own, ready, interrupted, terminated.


async def test_custom_worker(connection: type[Connection]) -> None:
    """Each of ten workers is made once and gone when the block is left."""
    async with open_pool(10, worker=connection) as pool:
        assert connection.made == 10
        for _ in range(10):
            await pool.process(0.0)
        assert connection.diary == []
    assert connection.diary == ["terminated"] * 10


async def test_custom_worker_keeps_its_state(connection: type[Connection]) -> None:
    """The state of a worker is there for its next job."""
    async with open_pool(1, worker=connection) as pool:
        assert [await pool.process(0.0) for _ in range(3)] == [1, 2, 3]


async def test_custom_worker_that_is_not_ready_takes_no_job(
    autojump_clock: MockClock, connection: type[Connection]
) -> None:
    """While one worker gets ready the other one serves all jobs."""
    ends: list[float] = []

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[float], Awaitable[int]], None]:
        async with connection() as handler:
            handler.ready_after = 1.75 if connection.made == 1 else 0.0
            yield handler

    async with open_pool(2, worker=worker) as pool:

        async def caller() -> None:
            await pool.process(0.5)
            ends.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(caller)
    assert ends == [0.5, 1.0, 1.5]


async def test_custom_worker_gets_ready_before_each_job(
    autojump_clock: MockClock, connection: type[Connection]
) -> None:
    """Before every single job, not only the first, the worker is asked."""
    connection.ready_after = 0.25
    async with open_pool(1, worker=connection) as pool:
        replies = await pool.submit_batch([0.5] * 3)
        ends = []
        for reply in replies:
            await reply.wait()
            ends.append(trio.current_time())
    assert ends == [0.75, 1.5, 2.25]


async def test_custom_worker_that_never_gets_ready_does_not_hold_the_end(
    connection: type[Connection],
) -> None:
    """Leaving the block interrupts a worker that waits to be ready."""
    connection.ready_after = math.inf
    async with open_pool(1, worker=connection) as pool:
        reply = await pool.submit(0.0)
        await wait_all_tasks_blocked()
        assert reply.state is JobState.QUEUED
        reply.cancel()
    assert connection.diary == ["terminated"]


async def test_custom_worker_is_interrupted_and_goes_on(
    autojump_clock: MockClock, connection: type[Connection]
) -> None:
    """A worker hears that its job is cancelled, and serves the next with its state."""
    async with open_pool(1, worker=connection) as pool:
        with trio.move_on_after(0.25):
            await pool.process(1.5)
        # The call does not return before the worker has really stopped.
        assert trio.current_time() == 0.25
        assert connection.diary == ["interrupted"]
        with pytest.raises(JobTimeout):
            await pool.process(1.5, timeout=0.25)
        assert connection.diary == ["interrupted"] * 2
        assert await pool.process(0.0) == 3
    assert connection.made == 1


async def test_custom_worker_that_panics_is_terminated_and_made_anew(
    connection: type[Connection],
) -> None:
    """A dead worker is cleaned up like any other, and its heir starts afresh."""
    async with open_pool(1, worker=connection) as pool:
        assert await pool.process(0.0) == 1
        with pytest.raises(WorkerCrashed):
            await pool.process(-1.0)
        assert await pool.process(0.0) == 1
        assert connection.diary == ["terminated"]
    assert connection.made == 2
    assert connection.diary == ["terminated"] * 2


@pytest.mark.parametrize("steps", range(8))
async def test_cancel_at_every_step_leaves_no_worker_stuck(steps: int) -> None:
    """Whenever a caller goes away, its worker is free again and the pool closes.

    In the seed such a race left a worker stuck, and Close hung.
    """

    async def handler(_: object) -> str:
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        return "done"

    async with open_pool(2, handler) as pool:
        async with trio.open_nursery() as nursery:
            # Two that run and two that wait.
            for _ in range(4):
                nursery.start_soon(pool.process, 1)
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        count = pool.statistics()
        assert (count.busy, count.running, count.queued) == (0, 0, 0)
        assert balanced(count)
        assert await pool.map(range(4)) == ["done"] * 4
    assert pool.statistics().workers == 0


# Waiting for a result, with a limit, under a cancel scope.


async def test_timeout(autojump_clock: MockClock) -> None:
    """A job over its time ends in JobTimeout; the seed's own error never came."""
    async with open_pool(1, obey) as pool:
        with pytest.raises(JobTimeout) as caught:
            await pool.process(1.5, timeout=0.25)
        assert trio.current_time() == 0.25
        assert (caught.value.started, caught.value.timeout) == (True, 0.25)
        assert isinstance(caught.value, trio.TooSlowError)


async def test_timeout_of_one_that_only_waits(autojump_clock: MockClock) -> None:
    """The time of waiting is limited by a scope; the job then never runs."""
    async with open_pool(1, obey) as pool:
        running = await pool.submit(1.5)
        with pytest.raises(trio.TooSlowError):
            with trio.fail_after(0.25):
                await pool.process(1)
        assert pool.statistics().queued == 0
        assert pool.statistics().cancelled == 1
        assert await running.wait() == 1.5


async def test_caller_that_is_cancelled_already() -> None:
    """A caller whose scope is cancelled hears that, and the job does not run."""
    calls = 0

    async def handler(_: object) -> None:
        nonlocal calls
        calls += 1

    async with open_pool(1, handler) as pool:
        with trio.CancelScope() as scope:
            scope.cancel()
            await pool.process(1)
        assert scope.cancelled_caught
        await pool.submit(1)
    assert calls == 1


async def test_request_that_is_gone_stops_its_work(autojump_clock: MockClock) -> None:
    """As in the server example, a client that goes away takes its job with it."""
    async with open_pool(1, obey) as pool:

        async def handle_request(seconds: float, patience: float) -> float | None:
            with trio.move_on_after(patience):
                return await pool.process(seconds)
            return None

        assert await handle_request(1.5, patience=0.25) is None
        assert pool.statistics().busy == 0
        assert await handle_request(1.5, patience=2.0) == 1.5
        assert trio.current_time() == 0.25 + 1.5


# Going on without waiting.


async def test_async_job() -> None:
    """A submitted job goes on by itself, and is waited for when it is needed."""
    async with open_pool(1, double) as pool:
        reply = pool.submit_nowait(21)
        assert not reply.done
        assert await reply.wait() == 42
        assert reply.done


async def test_async_jobs_are_bounded() -> None:
    """Who submits waits for room, and jobs are not tasks.

    The seed started a goroutine for each, without bound.
    """
    async with open_pool(2, obey, max_backlog=10) as pool:

        async def submit_forever() -> None:
            while True:
                await pool.submit(math.inf)

        living = trio.lowlevel.current_statistics().tasks_living
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(submit_forever)
                await wait_all_tasks_blocked()
                # The one more is the task that submits.
                assert trio.lowlevel.current_statistics().tasks_living == living + 1
                scope.cancel()
        count = pool.statistics()
        assert (count.accepted, count.running, count.queued) == (12, 2, 10)
        pool.cancel()


async def test_async_job_has_any_number_of_waiters() -> None:
    """Several tasks wait for one job, and all get its result."""
    results: list[int] = []
    async with open_pool(1, double) as pool:
        reply = await pool.submit(21)

        async def wait() -> None:
            results.append(await reply.wait())

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(wait)
    assert results == [42] * 5


# Batches.


async def test_batch() -> None:
    """A batch gives its results in the order of its items."""
    async with open_pool(10, double) as pool:
        settled = await pool.settle([1, 2, 3, 4, 5])
    assert [one.outcome.unwrap() for one in settled] == [2, 4, 6, 8, 10]


async def test_batch_with_errors(autojump_clock: MockClock) -> None:
    """Results and errors stand at the places of their items, whenever they ended."""
    error = ValueError("third")
    async with open_pool(3, obey) as pool:
        settled = await pool.settle([1.5, 0.25, error, 4])
    assert [one.index for one in settled] == [0, 1, 2, 3]
    assert [one.item for one in settled] == [1.5, 0.25, error, 4]
    assert isinstance(settled[2].outcome, outcome.Error)
    assert settled[2].outcome.error is error
    good = [one.outcome.unwrap() for one in settled if one.index != 2]
    assert good == [1.5, 0.25, 4]


async def test_batch_under_a_limit(autojump_clock: MockClock) -> None:
    """A batch out of time is called off: what runs stops, the rest never runs."""
    started = 0

    async def handler(seconds: float) -> None:
        nonlocal started
        started += 1
        await trio.sleep(seconds)

    async with open_pool(2, handler) as pool:
        with trio.move_on_after(0.75) as scope:
            await pool.settle([0.5] * 10)
        assert scope.cancelled_caught
        assert trio.current_time() == 0.75
        count = pool.statistics()
        assert (count.done, count.running, count.queued) == (2, 0, 0)
        assert started == 4
        assert balanced(count)


async def test_batch_of_nothing() -> None:
    """A batch without items has no results."""
    async with open_pool(2, double) as pool:
        assert await pool.settle([]) == []


# Panics.


async def test_panic_leaves_the_pool_healthy() -> None:
    """As on its page: the job with the panic fails, the next one works fine."""
    async with open_pool(1, double) as pool:
        with pytest.raises(WorkerCrashed) as caught:
            await pool.process(-5)
        assert caught.value.started is True
        assert await pool.process(10) == 20


async def test_panic_keeps_its_value_and_stack() -> None:
    """The caller gets the cause with message and traceback, which the seed lost."""
    async with open_pool(1, double) as pool:
        with pytest.raises(WorkerCrashed) as caught:
            await pool.process(-5)
    cause = caught.value.__cause__
    assert isinstance(cause, SystemExit)
    assert cause.code == "negative number: -5"
    assert traceback.extract_tb(cause.__traceback__)[-1].name == "double"


async def test_panic_in_a_submitted_job_and_in_a_batch() -> None:
    """A reply and a batch tell of a panic just as a direct call does."""
    async with open_pool(2, double) as pool:
        reply = await pool.submit(-1)
        with pytest.raises(WorkerCrashed):
            await reply.wait()
        settled = await pool.settle([1, -1, 2])
        with pytest.raises(WorkerCrashed):
            settled[1].outcome.unwrap()
        assert settled[0].outcome.unwrap() == 2
        assert settled[2].outcome.unwrap() == 4


async def test_panic_of_one_worker_does_not_disturb_another(
    autojump_clock: MockClock,
) -> None:
    """The job beside a panic goes on to its end."""
    async with open_pool(2, obey) as pool:
        reply = await pool.submit(0.5)
        with pytest.raises(WorkerCrashed):
            await pool.process(SystemExit())
        assert await reply.wait() == 0.5
        assert pool.statistics().lost == 1


# Hooks.


class Listener(Hooks):
    """Writes down what the five hooks of the seed tell of."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def on_worker_start(self, event: WorkerChanged) -> None:
        self.seen.append(("worker start", event.worker))

    def on_worker_stop(self, event: WorkerChanged) -> None:
        self.seen.append(("worker stop", event.worker))

    def on_job_start(self, event: JobChanged) -> None:
        self.seen.append(("start", event.job_id))

    def on_job_complete(self, event: JobChanged) -> None:
        self.seen.append(("complete", event.job_id))

    def on_job_error(self, event: JobChanged) -> None:
        self.seen.append(("error", event.error))


async def test_hooks_of_jobs_and_workers() -> None:
    """All five are called, in order."""
    listener, error = Listener(), ValueError()
    async with open_pool(1, obey, hooks=[listener]) as pool:
        await pool.process(1)
        with pytest.raises(ValueError):
            await pool.process(error)
    assert listener.seen == [
        ("worker start", 0),
        ("start", 1),
        ("complete", 1),
        ("start", 2),
        ("error", error),
        ("worker stop", 0),
    ]


async def test_hooks_hear_of_the_first_workers() -> None:
    """Hooks are there before the workers; those of the seed came too late."""
    listener = Listener()
    async with open_pool(5, obey, hooks=[listener]):
        assert sorted(listener.seen) == [("worker start", n) for n in range(5)]


async def test_hooks_are_called_before_the_caller_gets_the_result() -> None:
    """When a caller has its result, the hook of it has been called."""
    listener = Listener()
    async with open_pool(1, obey, hooks=[listener]) as pool:
        for number in range(1, 4):
            await pool.process(number)
            assert listener.seen[-1] == ("complete", number)


async def test_hooks_tell_the_time_that_a_job_took(autojump_clock: MockClock) -> None:
    """The times of start and end tell how long a job ran."""
    times: list[float] = []

    class Stopwatch(Hooks):
        def on_job_start(self, event: JobChanged) -> None:
            times.append(event.time)

        def on_job_complete(self, event: JobChanged) -> None:
            times.append(event.time)

    async with open_pool(1, obey, hooks=[Stopwatch()]) as pool:
        await trio.sleep(0.25)
        await pool.process(1.5)
    assert times == [0.25, 1.75]


async def test_hook_that_panics_is_harmless(caplog: pytest.LogCaptureFixture) -> None:
    """A hook that raises is logged once and not called again; the jobs go on."""
    calls = 0

    class Broken(Hooks):
        def on_job_start(self, event: JobChanged) -> None:
            nonlocal calls
            calls += 1
            raise LookupError

    listener = Listener()
    async with open_pool(1, double, hooks=[Broken(), listener]) as pool:
        assert [await pool.process(number) for number in range(3)] == [0, 2, 4]
    assert calls == len(caplog.records) == 1
    assert listener.seen.count(("complete", 3)) == 1


# The size.


async def test_pool_size_adjustment() -> None:
    """As in the oldest case of all: 10, 1, 10, none, 10; and then it works."""
    async with open_pool(10, double) as pool:
        assert pool.size == pool.statistics().workers == 10
        for size in (1, 10, 0, 10):
            await pool.resize(size)
            assert pool.size == size
            assert len(pool.workers()) == pool.statistics().workers == size
        assert await pool.process(5) == 10
    assert pool.statistics().workers == 0


async def test_pool_of_size_0_lets_jobs_wait() -> None:
    """A pool without workers accepts jobs, and serves them when it grows."""
    async with open_pool(2, double) as pool:
        await pool.resize(0)
        replies = await pool.submit_batch(range(3))
        await wait_all_tasks_blocked()
        assert pool.statistics().queued == 3
        await pool.resize(1)
        assert [await reply.wait() for reply in replies] == [0, 2, 4]


async def test_pool_that_shrinks_interrupts_no_job(autojump_clock: MockClock) -> None:
    """Shrinking waits for the jobs of the workers that have to go."""
    async with open_pool(3, obey) as pool:
        replies = [await pool.submit(seconds) for seconds in (0.5, 1.0, 1.5)]
        await pool.resize(0)
        assert trio.current_time() == 1.5
        assert [await reply.wait() for reply in replies] == [0.5, 1.0, 1.5]


@pytest.mark.parametrize("size", [-1, -10])
async def test_negative_size_is_refused(size: int) -> None:
    """A negative size is refused and changes nothing; the seed crashed."""
    with pytest.raises(ValueError, match="size must be"):
        open_pool(size, double)
    async with open_pool(2, double) as pool:
        with pytest.raises(ValueError, match="size must be"):
            await pool.resize(size)
        assert pool.size == pool.statistics().workers == 2


async def test_pool_is_paused_and_resumed() -> None:
    """A paused pool keeps its workers, and they take no job."""
    async with open_pool(2, double) as pool:
        pool.pause()
        reply = await pool.submit(1)
        await wait_all_tasks_blocked()
        assert reply.state is JobState.QUEUED
        assert pool.statistics().workers == 2
        pool.resume()
        assert await reply.wait() == 2


# The length of the queue.


async def test_queue_length_counts_waiting_jobs_only() -> None:
    """Running jobs are counted apart; the seed counted them as waiting."""
    async with open_pool(2, obey) as pool:

        def lengths() -> tuple[int, int]:
            count = pool.statistics()
            return count.running, count.queued

        assert lengths() == (0, 0)
        expected = [(1, 0), (2, 0), (2, 1), (2, 2)]
        for now in expected:
            await pool.submit(math.inf)
            assert lengths() == now
        pool.cancel()
        await wait_all_tasks_blocked()
        assert lengths() == (0, 0)


# Shutdown and close.


async def test_graceful_shutdown_of_1000_jobs(autojump_clock: MockClock) -> None:
    """As on its page: a thousand callers, and shutdown within its time limit.

    It takes longer than others, as each caller is a task.
    """
    results: list[int] = []

    async def slowly_double(number: int) -> int:
        await trio.sleep(0.25)
        return 2 * number

    async with open_pool(100, slowly_double) as pool:

        async def caller(number: int) -> None:
            results.append(await pool.process(number))

        async with trio.open_nursery() as nursery:
            for number in range(1000):
                nursery.start_soon(caller, number)
            await wait_all_tasks_blocked()
            with trio.fail_after(30):
                report = await pool.shutdown()
    assert trio.current_time() == 2.5
    assert report.done == 1000
    assert sorted(results) == list(range(0, 2000, 2))


async def test_shutdown_under_a_limit_that_is_too_short(
    autojump_clock: MockClock,
) -> None:
    """Who stops waiting for a shutdown does not stop it: the jobs are finished."""
    async with open_pool(1, obey) as pool:
        reply = await pool.submit(1.5)
        with trio.move_on_after(0.25) as scope:
            await pool.shutdown()
        assert scope.cancelled_caught
        assert pool.closed
        assert await reply.wait() == 1.5


async def test_shutdown_takes_no_jobs_while_it_drains(
    autojump_clock: MockClock,
) -> None:
    """From the call on every new job is refused; the seed still accepted some."""
    async with open_pool(1, obey) as pool:
        await pool.submit(0.5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.shutdown)
            await trio.sleep(0.25)
            with pytest.raises(PoolClosed):
                await pool.process(1)
            with pytest.raises(PoolClosed):
                await pool.submit(1)
            with pytest.raises(PoolClosed):
                pool.submit_nowait(1)
            with pytest.raises(PoolClosed):
                await pool.settle([1])
        assert pool.statistics().accepted == pool.statistics().done == 1


async def test_close_twice_is_fine() -> None:
    """Every way to close may follow every other; in the seed the second panics."""
    async with open_pool(1, obey) as pool:
        first = await pool.shutdown()
        assert await pool.shutdown() == first
        pool.cancel()
        pool.cancel()
    assert await pool.shutdown() == first
    assert pool.closed


async def test_jobs_after_close() -> None:
    """A closed pool refuses a job and says that it never started."""
    async with open_pool(1, double) as pool:
        assert await pool.process(1) == 2
    with pytest.raises(PoolClosed) as caught:
        await pool.process(1)
    assert caught.value.started is False
    assert pool.statistics().accepted == 1


async def test_timed_jobs_after_close() -> None:
    """A timed job is refused by the same error, and not by its timeout."""
    async with open_pool(1, double) as pool:
        pass
    with pytest.raises(PoolClosed):
        await pool.process(1, timeout=0.25)
    with trio.move_on_after(0.25):
        with pytest.raises(PoolClosed):
            await pool.process(1)


async def test_no_task_outlives_the_block() -> None:
    """When the block is left, nothing of the pool is left."""
    living = trio.lowlevel.current_statistics().tasks_living
    async with open_pool(10, double) as pool:
        await pool.map(range(100))
    assert trio.lowlevel.current_statistics().tasks_living == living


# The errors.


async def test_every_error_is_reached(autojump_clock: MockClock) -> None:
    """Closed pool, dead worker, timeout: each comes; in the seed two never did."""
    async with open_pool(2, obey) as pool:
        with pytest.raises(WorkerCrashed) as crash:
            await pool.process(SystemExit())
        with pytest.raises(JobTimeout) as timeout:
            await pool.process(1.5, timeout=0.25)
        reply = await pool.submit(1.5)
        await wait_all_tasks_blocked()
        reply.cancel()
        with pytest.raises(JobCancelled) as cancelled:
            await reply.wait()
    with pytest.raises(PoolClosed) as closed:
        await pool.process(1)
    for caught in (crash, timeout, cancelled):
        assert isinstance(caught.value, PoolError)
        assert (caught.value.started, caught.value.attempts) == (True, 1)
        assert caught.value.worker in {0, 1}
    assert isinstance(closed.value, PoolError)
    assert closed.value.started is False


async def test_worker_that_leaves_under_its_job_says_so(
    autojump_clock: MockClock,
) -> None:
    """A job whose worker has to go before its end hears that it had started."""
    async with open_pool(1, obey) as pool:
        running, waiting = await pool.submit(5.0), await pool.submit(5.0)
        await pool.shutdown(grace=0.25)
        for reply, started in [(running, True), (waiting, False)]:
            with pytest.raises(JobCancelled) as caught:
                await reply.wait()
            assert caught.value.started is started


# Beyond the seeds: submitting without waiting, and exact bounds.


@pytest.mark.parametrize("bound", [0, 1, 3])
async def test_submit_without_waiting_keeps_the_bound(bound: int) -> None:
    """It takes one job for each idle worker and ``bound`` more, and not one beyond."""
    async with open_pool(2, obey, max_backlog=bound) as pool:
        for _ in range(2 + bound):
            pool.submit_nowait(math.inf)
        with pytest.raises(trio.WouldBlock) as caught:
            pool.submit_nowait(math.inf)
        assert isinstance(caught.value, BacklogFull)
        assert caught.value.max_backlog == bound
        assert pool.statistics().queued == bound
        pool.cancel()


async def test_submit_without_waiting_and_without_a_bound() -> None:
    """A bound of infinity takes whatever comes."""
    async with open_pool(1, double, max_backlog=math.inf) as pool:
        replies = [pool.submit_nowait(number) for number in range(2_000)]
        assert pool.statistics().queued == 1_999
        await pool.join()
        assert [await replies[n].wait() for n in (0, 1_999)] == [0, 3_998]


async def test_submit_waits_for_room(autojump_clock: MockClock) -> None:
    """Where there is no room, who submits waits until there is some."""
    async with open_pool(1, obey, max_backlog=1) as pool:
        await pool.submit(0.5)
        await pool.submit(0.5)
        assert trio.current_time() == 0.0
        await pool.submit(0.5)
        assert trio.current_time() == 0.5


async def test_dropped_and_cancelled_are_counted_exactly() -> None:
    """Each job that is dropped, cancelled or refused is counted as that, once."""
    async with open_pool(1, obey, max_backlog=2, overflow="drop_oldest") as pool:
        running = pool.submit_nowait(math.inf)
        replies = [pool.submit_nowait(number) for number in range(5)]
        assert pool.statistics().dropped == 3
        for reply in replies[:3]:
            with pytest.raises(JobDropped) as caught:
                await reply.wait()
            assert caught.value.started is False
        assert replies[3].cancel()
        running.cancel()
        assert await replies[4].wait() == 4
        count = pool.statistics()
        assert (count.accepted, count.done) == (6, 1)
        assert (count.dropped, count.cancelled) == (3, 2)
        assert balanced(count)


# Streams.


async def test_stream_in_order_while_work_goes_on(autojump_clock: MockClock) -> None:
    """Results come in input order, each as soon as it and those before are ready."""
    async with open_pool(3, obey) as pool:
        async with pool.stream([0.5, 0.25, 1.0, 0.25]) as results:
            arrivals = [(result, trio.current_time()) async for result in results]
    assert arrivals == [(0.5, 0.5), (0.25, 0.5), (1.0, 1.0), (0.25, 1.0)]


async def test_stream_as_they_are_ready(autojump_clock: MockClock) -> None:
    """Without an order each result comes at once."""
    async with open_pool(3, obey) as pool:
        async with pool.stream([1.0, 0.25, 0.5], ordered=False) as results:
            assert [result async for result in results] == [0.25, 0.5, 1.0]


async def test_stream_pulls_its_input_lazily() -> None:
    """An endless input is taken only so far ahead of what was read."""
    pulled = 0

    def endless() -> Iterator[int]:
        nonlocal pulled
        while True:
            pulled += 1
            yield pulled

    async with open_pool(2, double) as pool:
        async with pool.stream(endless(), ahead=3) as results:
            for number in range(1, 6):
                assert await anext(results) == 2 * number
                await wait_all_tasks_blocked()
                assert pulled <= number + 3


async def test_stream_is_safe_to_break() -> None:
    """Leaving a stream early stops its jobs, ends its input, and frees the workers."""
    stopped = 0

    async def handler(number: int) -> int:
        nonlocal stopped
        if number:
            try:
                await trio.sleep_forever()
            finally:
                stopped += 1
        return number

    async def numbers() -> AsyncIterator[int]:
        for number in range(1_000):
            yield number

    async with open_pool(3, handler) as pool:
        async with pool.stream(numbers()) as results:
            async for result in results:
                assert result == 0
                await wait_all_tasks_blocked()
                break
        assert stopped == 3
        count = pool.statistics()
        assert (count.busy, count.running, count.queued) == (0, 0, 0)
        assert await pool.process(0) == 0


# The input that failed is known.


async def test_the_failing_input_is_known() -> None:
    """A settled item stands beside its outcome, and an error of map names its item."""
    items = ["good", KeyError("bad"), "fine"]
    async with open_pool(1, obey) as pool:
        settled = await pool.settle(items)
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map(items)
        async with pool.stream(items, outcomes=True) as results:
            streamed = [one async for one in results]
    failed = [one.item for one in settled if isinstance(one.outcome, outcome.Error)]
    assert failed == [items[1]]
    assert caught.value.exceptions == (items[1],)
    assert any("item 1: KeyError('bad')" in n for n in items[1].__notes__)
    assert all(isinstance(one, Settled) for one in streamed)
    assert [one.item for one in streamed] == items


# A pause that keeps accepting.


async def test_pause_keeps_accepting_up_to_the_bound() -> None:
    """A paused pool takes jobs as long as there is room, and runs what runs."""
    async with open_pool(1, obey, max_backlog=2) as pool:
        running = await pool.submit(0.0)
        pool.pause()
        replies = [pool.submit_nowait(1), pool.submit_nowait(2)]
        with pytest.raises(BacklogFull):
            pool.submit_nowait(3)
        assert await running.wait() == 0.0
        await wait_all_tasks_blocked()
        assert pool.statistics().queued == 2
        pool.resume()
        assert [await reply.wait() for reply in replies] == [1, 2]


# Workers that leave as planned.


async def test_idle_workers_leave(autojump_clock: MockClock) -> None:
    """A pool that has nothing to do shrinks to its least number of workers."""
    scale = Autoscale(min=1, max=4, interval=0.25, down_after=1.5)
    async with open_pool(1, obey, scale=scale) as pool:
        await pool.map([2.5] * 8)
        assert pool.statistics().workers == 4
        await trio.sleep(10)
        assert pool.statistics().workers == pool.size == 1


@pytest.mark.parametrize(
    ("option", "value"), [("max_jobs", 2), ("max_age", 1.0), ("max_idle", 0.5)]
)
async def test_worker_is_recycled(
    autojump_clock: MockClock,
    connection: type[Connection],
    option: str,
    value: float,
) -> None:
    """After its jobs, its age or its idleness a fresh worker takes over.

    That is no crash: no hook tells of one, and no restart is counted.
    """
    listener = Listener()
    config = PoolConfig(size=1, hooks=[listener], **{option: value})
    async with open_pool(config, worker=connection) as pool:
        queries = []
        for _ in range(4):
            queries.append(await pool.process(0.5))
            await wait_all_tasks_blocked()
        if option == "max_idle":
            await trio.sleep(0.75)
            queries = [*queries, await pool.process(0.5)]
            assert queries == [1, 2, 3, 4, 1]
        else:
            assert queries == [1, 2, 1, 2]
        assert pool.statistics().restarts == 0
        assert pool.workers()[0].last_error is None
    kinds = Counter(kind for kind, _ in listener.seen)
    assert kinds["worker start"] == kinds["worker stop"] == connection.made >= 2


# A job that gives its own pool a job.


async def test_nested_submit_that_nobody_could_serve_is_an_error() -> None:
    """A job that waits for its own worker hears so, and does not hang."""
    async with open_pool(1) as pool:

        async def outer() -> int:
            return await pool.process(double, 1)

        with pytest.raises(WouldDeadlock) as caught:
            await pool.process(outer)
        assert caught.value.started is False
        assert await pool.process(double, 1) == 2


async def test_nested_submit_that_can_be_served_is_served() -> None:
    """While another worker is there, a job may wait for a job."""
    async with open_pool(3) as pool:

        async def outer(number: int) -> int:
            return await pool.process(double, number) + 1

        assert await pool.map(outer, [1, 2]) == [3, 5]


async def test_nested_submit_without_waiting_is_always_fine() -> None:
    """A job may give its own pool any number of jobs that it does not wait for."""
    seen: list[int] = []

    async def note(number: int) -> None:
        seen.append(number)

    async with open_pool(1) as pool:

        async def outer() -> None:
            for number in range(3):
                await pool.submit(note, number)

        await pool.process(outer)
    assert seen == [0, 1, 2]


# Several pools under one limit.


async def test_pools_share_a_limiter(autojump_clock: MockClock) -> None:
    """Two pools of three workers each run no more than two jobs together."""
    limiter = trio.CapacityLimiter(2)
    running = peak = 0

    async def handler(_: object) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await trio.sleep(0.25)
        running -= 1

    async with open_pool(3, handler, limiter=limiter) as one:
        async with open_pool(3, handler, limiter=limiter) as other:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.map, range(6))
                nursery.start_soon(other.map, range(6))
            assert trio.current_time() == 12 / 2 * 0.25
            assert (one.statistics().done, other.statistics().done) == (6, 6)
    assert peak == 2
    assert limiter.borrowed_tokens == 0


async def test_pools_share_a_rate(autojump_clock: MockClock) -> None:
    """Two pools together start no more jobs a second than their rate allows."""
    starts: list[float] = []

    async def handler(_: object) -> None:
        starts.append(trio.current_time())

    rate = Rate(4, per=1.0)
    async with open_pool(3, handler, rate=rate) as one:
        async with open_pool(3, handler, rate=rate) as other:
            for number in range(4):
                await one.submit(number)
                await other.submit(number)
    assert starts == [0.25 * number for number in range(8)]
