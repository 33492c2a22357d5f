"""What a failure is: for the job, for its worker, for the pool."""

from __future__ import annotations

import gc
import logging
import math
import traceback
import tracemalloc
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import Context, ContextVar
from typing import Any

import pytest
import trio
import trio.testing
from outcome import Error
from trio.testing import wait_all_tasks_blocked

from trio_pool import (
    Backoff,
    Hooks,
    JobCancelled,
    JobChanged,
    JobState,
    Pool,
    PoolBroken,
    PoolClosed,
    PoolStatistics,
    Restart,
    Retry,
    WorkerChanged,
    WorkerCrashed,
    WorkerState,
    open_pool,
)


class Broken(Exception):
    """What a handler raises when its worker is of no use any more."""


class Odd(BaseException):
    """Neither an Exception nor one of Python's own."""


async def obey(job: Any) -> Any:
    """Return the job, or raise it, if it is an error; or do what it says."""
    if isinstance(job, BaseException):
        raise job
    if callable(job):
        return await job()
    return job


class Workers:
    """Makes workers and writes down what becomes of them.

    `script` says what each setup does, in order: None is a good one, an error
    is raised, a function is awaited. What comes after the script is good.
    """

    def __init__(self, *script: Any, cleanup: BaseException | None = None) -> None:
        self.script = list(script)
        self.cleanup = cleanup
        self.setups: list[float] = []
        self.cleanups = 0

    @asynccontextmanager
    async def __call__(self) -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        self.setups.append(trio.current_time())
        step = self.script.pop(0) if self.script else None
        if step is not None:
            await obey(step)
        jobs = 0

        async def handler(job: Any) -> Any:
            nonlocal jobs
            jobs += 1
            return jobs if job == "count" else await obey(job)

        try:
            yield handler
        finally:
            self.cleanups += 1
            if self.cleanup is not None:
                raise self.cleanup


class Listener(Hooks):
    """Writes down what happens to workers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, BaseException | None]] = []

    def on_worker_start(self, event: WorkerChanged) -> None:
        self.seen.append(("start", event.worker, event.error))

    def on_worker_stop(self, event: WorkerChanged) -> None:
        self.seen.append(("stop", event.worker, event.error))

    def on_worker_crash(self, event: WorkerChanged) -> None:
        self.seen.append(("crash", event.worker, event.error))

    def on_worker_restart(self, event: WorkerChanged) -> None:
        self.seen.append(("restart", event.worker, event.error))


def balanced(count: PoolStatistics) -> bool:
    ended = count.done + count.failed + count.timed_out + count.cancelled
    ended += count.expired + count.dropped + count.lost
    return count.accepted == count.delayed + count.queued + count.running + ended


# An ordinary error.


async def test_an_ordinary_error_reaches_the_caller_and_the_worker_stays() -> None:
    workers = Workers()
    error = ValueError("bad job")
    async with open_pool(1, worker=workers) as pool:
        assert await pool.process("count") == 1
        with pytest.raises(ValueError) as caught:
            await pool.process(error)
        assert caught.value is error
        assert await pool.process("count") == 3
        count = pool.statistics()
        assert (count.done, count.failed, count.restarts) == (2, 1, 0)
        assert pool.workers()[0].last_error is None
    assert len(workers.setups) == workers.cleanups == 1


async def test_ordinary_errors_spend_no_budget() -> None:
    async with open_pool(1, obey, restart=Restart(limit=0)) as pool:
        for _ in range(5):
            with pytest.raises(ValueError):
                await pool.process(ValueError())
        assert await pool.process(1) == 1


async def test_too_slow_error_of_a_handler_is_an_ordinary_error() -> None:
    error = trio.TooSlowError()
    async with open_pool(1, obey) as pool:
        with pytest.raises(trio.TooSlowError) as caught:
            await pool.process(error)
        assert caught.value is error
        assert pool.statistics().failed == 1


# One of `crash_on`.


class BrokenBelow(Broken):
    """Below one of the types that were named."""


@pytest.mark.parametrize("kind", [Broken, BrokenBelow])
async def test_crash_on_answers_the_job_and_replaces_the_worker(
    kind: type[Exception],
) -> None:
    workers, listener = Workers(), Listener()
    error = kind("worn out")
    async with open_pool(
        1, worker=workers, crash_on=(Broken,), hooks=[listener]
    ) as pool:
        assert await pool.process("count") == 1
        with pytest.raises(Broken) as caught:
            await pool.process(error)
        assert caught.value is error
        assert await pool.process("count") == 1
        count = pool.statistics()
        assert (count.done, count.failed, count.lost, count.restarts) == (2, 1, 0, 1)
        (worker,) = pool.workers()
        assert worker.restarts == 1
        assert worker.last_error is error
    assert len(workers.setups) == workers.cleanups == 2
    assert listener.seen == [
        ("start", 0, None),
        ("crash", 0, error),
        ("restart", 0, None),
        ("start", 0, None),
        ("stop", 0, None),
    ]


async def test_crash_on_spends_budget() -> None:
    error = Broken()
    with pytest.raises(PoolBroken) as caught:
        async with open_pool(
            1, obey, crash_on=(Broken,), restart=Restart(limit=0)
        ) as pool:
            with pytest.raises(Broken):
                await pool.process(error)
            await trio.sleep_forever()
    assert caught.value.__cause__ is error


async def test_crash_on_answers_before_the_cleanup_of_the_worker(
    autojump_clock: trio.testing.MockClock,
) -> None:
    @asynccontextmanager
    async def slow_to_close() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        try:
            yield obey
        finally:
            await trio.sleep(1.5)

    async with open_pool(1, worker=slow_to_close, crash_on=(Broken,)) as pool:
        start = trio.current_time()
        with pytest.raises(Broken):
            await pool.process(Broken())
        assert trio.current_time() == start


# Errors that are no Exception.


@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, Odd])
async def test_another_base_exception_is_a_crash(kind: type[BaseException]) -> None:
    workers, listener = Workers(), Listener()
    error = kind("out")
    async with open_pool(1, worker=workers, hooks=[listener]) as pool:
        assert await pool.process("count") == 1
        with pytest.raises(WorkerCrashed) as caught:
            await pool.process(error)
        assert caught.value.__cause__ is error
        assert caught.value.started is True
        assert caught.value.attempts == 1
        assert caught.value.worker == 0
        assert await pool.process("count") == 1
        count = pool.statistics()
        assert (count.done, count.failed, count.lost, count.restarts) == (2, 0, 1, 1)
    assert ("crash", 0, error) in listener.seen
    assert len(workers.setups) == workers.cleanups == 2


@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, Odd])
async def test_another_base_exception_spends_budget(kind: type[BaseException]) -> None:
    error = kind()
    with pytest.raises(PoolBroken) as caught:
        async with open_pool(1, obey, restart=Restart(limit=0)) as pool:
            with pytest.raises(WorkerCrashed):
                await pool.process(error)
            await trio.sleep_forever()
    assert caught.value.__cause__ is error


async def test_a_base_exception_in_a_group_is_a_crash() -> None:
    async def group() -> None:
        raise BaseExceptionGroup("two", [ValueError(), SystemExit(3)])

    async with open_pool(1, obey) as pool:
        with pytest.raises(WorkerCrashed):
            await pool.process(group)
        assert await pool.process(1) == 1


async def test_a_poison_job_is_never_run_again_by_itself() -> None:
    runs = 0

    async def poison() -> None:
        nonlocal runs
        runs += 1
        raise SystemExit

    async with open_pool(2, obey) as pool:
        reply = await pool.submit(poison)
        with pytest.raises(WorkerCrashed):
            await reply.wait()
        for number in range(10):
            assert await pool.process(number) == number
        assert (reply.attempts, reply.state) == (1, JobState.LOST)
    assert runs == 1


# Ctrl-C.


async def test_keyboard_interrupt_goes_straight_through() -> None:
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt) as caught:
        async with open_pool(2, obey) as pool:
            running = await pool.submit(trio.sleep_forever)
            reply = await pool.submit(error)
            await trio.sleep_forever()
    assert caught.value is error
    assert reply.state is JobState.LOST
    assert running.state is JobState.CANCELLED
    count = pool.statistics()
    assert (count.lost, count.cancelled) == (1, 1)
    assert balanced(count)


async def test_keyboard_interrupt_out_of_a_group_goes_straight_through_too() -> None:
    """As it comes out of a nursery of the handler, beside other errors."""
    error = KeyboardInterrupt()
    inner = BaseExceptionGroup("inner", [ValueError(), error])
    with pytest.raises(KeyboardInterrupt) as caught:
        async with open_pool(2, obey) as pool:
            reply = await pool.submit(BaseExceptionGroup("outer", [OSError(), inner]))
            await trio.sleep_forever()
    assert caught.value is error
    assert reply.state is JobState.LOST


async def test_keyboard_interrupt_leaves_the_block_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    start = trio.current_time()
    with pytest.raises(KeyboardInterrupt):
        async with open_pool(1, obey) as pool:
            pool.submit_nowait(KeyboardInterrupt())
            await trio.sleep(1.5)
    assert trio.current_time() == start


@pytest.mark.parametrize("grouped", [False, True])
async def test_keyboard_interrupt_waits_for_no_cleanup_to_stop_the_others(
    grouped: bool, autojump_clock: trio.testing.MockClock
) -> None:
    cancelled: list[float] = []
    error: BaseException = KeyboardInterrupt()
    if grouped:
        error = BaseExceptionGroup("", [ValueError(), error])

    @asynccontextmanager
    async def slow() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        try:
            yield obey
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(5)

    async def other() -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.append(trio.current_time() - began)

    began = trio.current_time()
    with pytest.raises(KeyboardInterrupt):
        async with open_pool(2, worker=slow) as pool:
            pool.submit_nowait(other)
            await wait_all_tasks_blocked()
            pool.submit_nowait(error)
            await trio.sleep_forever()
    assert cancelled == [0.0]


async def test_keyboard_interrupt_for_a_waiting_caller_is_one_too() -> None:
    with pytest.raises(KeyboardInterrupt):
        async with open_pool(1, obey) as pool:
            await pool.process(KeyboardInterrupt())
    assert pool.statistics().lost == 1


async def test_keyboard_interrupt_in_a_setup_is_raised() -> None:
    with pytest.raises(KeyboardInterrupt):
        async with open_pool(2, worker=Workers(None, KeyboardInterrupt())):
            pytest.fail("the block was entered")


async def test_keyboard_interrupt_in_a_setup_at_a_restart_is_raised() -> None:
    workers = Workers(None, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        async with open_pool(1, worker=workers, crash_on=(Broken,)) as pool:
            with pytest.raises(Broken):
                await pool.process(Broken())
            await trio.sleep_forever()


async def test_keyboard_interrupt_in_a_cleanup_is_raised() -> None:
    with pytest.raises(KeyboardInterrupt):
        async with open_pool(1, worker=Workers(cleanup=KeyboardInterrupt())) as pool:
            assert await pool.process(1) == 1


# The errors that mean something to Python's own machinery.


async def test_stop_async_iteration_reaches_the_caller_as_itself() -> None:
    error = StopAsyncIteration("over")
    async with open_pool(1, worker=Workers()) as pool:
        with pytest.raises(StopAsyncIteration) as caught:
            await pool.process(error)
        assert caught.value is error
        assert await pool.process("count") == 2
        assert pool.statistics().restarts == 0


async def test_stop_iteration_reaches_the_caller_as_from_a_direct_call() -> None:
    error = StopIteration("over")
    with pytest.raises(RuntimeError) as direct:
        await obey(error)
    async with open_pool(1, worker=Workers()) as pool:
        with pytest.raises(RuntimeError) as caught:
            await pool.process(error)
        assert caught.value.args == direct.value.args
        assert caught.value.__cause__ is error
        assert await pool.process("count") == 2
        assert pool.statistics().restarts == 0


class Stopping:
    """Awaited, it raises StopIteration itself, as only such an object can."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __await__(self) -> Any:
        return self

    def __iter__(self) -> Stopping:
        return self

    def __next__(self) -> None:
        raise self.error


async def test_stop_iteration_of_an_awaitable_is_its_result_as_in_a_direct_call() -> (
    None
):
    async def handler(error: Exception) -> Any:
        return await Stopping(error)

    async with open_pool(1, handler) as pool:
        assert await pool.process(StopIteration(5)) == 5


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
async def test_stop_iteration_of_the_body_leaves_as_itself(
    kind: type[Exception],
) -> None:
    error = kind()
    with pytest.raises(kind) as caught:
        async with open_pool(1, obey):
            raise error
    assert caught.value is error


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
async def test_stop_iteration_in_map_is_never_swallowed(kind: type[Exception]) -> None:
    async with open_pool(2, obey) as pool:
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map([1, kind(), 2])
        (error,) = caught.value.exceptions
        assert isinstance(error, (kind, RuntimeError))
        settled = await pool.settle([1, kind(), 2])
        assert len(settled) == 3
        with pytest.raises((kind, RuntimeError)):
            settled[1].outcome.unwrap()


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
async def test_stop_iteration_in_stream_does_not_end_it(kind: type[Exception]) -> None:
    async with open_pool(1, obey) as pool:
        async with pool.stream([1, kind(), 2]) as results:
            assert await anext(results) == 1
            with pytest.raises(RuntimeError):
                await anext(results)
            assert await anext(results) == 2


# Setup at open.


@pytest.mark.parametrize("kind", [ValueError, SystemExit, Odd])
async def test_a_setup_that_fails_at_open_is_raised_bare(
    kind: type[BaseException],
) -> None:
    error = kind("no connection")
    workers = Workers(None, error, None)
    with pytest.raises(kind) as caught:
        async with open_pool(3, worker=workers):
            pytest.fail("the block was entered")
    assert caught.value is error
    assert caught.value.__cause__ is None
    # Those that were set up are closed; a setup that fails cleans up after itself.
    assert workers.cleanups <= 2


async def test_the_first_setup_that_fails_is_the_one_that_is_raised(
    autojump_clock: trio.testing.MockClock,
) -> None:
    later = ValueError("later")

    async def fail_later() -> None:
        await trio.sleep(1.5)
        raise later

    async def fail() -> None:
        await trio.sleep(0.25)
        raise KeyError("first")

    with pytest.raises(KeyError, match="first"):
        async with open_pool(2, worker=Workers(fail_later, fail)):
            pytest.fail("the block was entered")
    assert trio.current_time() == 0.25


async def test_a_setup_that_fails_at_open_is_not_tried_again() -> None:
    workers = Workers(ValueError())
    with pytest.raises(ValueError):
        async with open_pool(1, worker=workers):
            pytest.fail("the block was entered")
    assert len(workers.setups) == 1


async def test_siblings_are_closed_when_a_setup_fails_at_open(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def fail_later() -> None:
        await trio.sleep(0.25)
        raise ValueError

    workers = Workers(fail_later)
    with pytest.raises(ValueError):
        async with open_pool(3, worker=workers):
            pytest.fail("the block was entered")
    assert len(workers.setups) == 3
    assert workers.cleanups == 2


async def test_workers_set_up_at_the_same_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def slow() -> None:
        await trio.sleep(1.5)

    async with open_pool(3, worker=Workers(slow, slow, slow)) as pool:
        assert trio.current_time() == 1.5
        assert pool.statistics().workers == 3


async def test_opening_can_be_cancelled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.move_on_after(0.25) as scope:
        async with open_pool(2, worker=Workers(None, trio.sleep_forever)):
            pytest.fail("the block was entered")
    assert scope.cancelled_caught
    assert trio.current_time() == 0.25


# Setup at a restart.


async def test_a_setup_that_fails_at_a_restart_is_tried_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    workers = Workers(None, ValueError(), ValueError())
    waits = iter([0.25, 1.5])
    restart = Restart(backoff=lambda _: next(waits))
    async with open_pool(1, worker=workers, restart=restart) as pool:
        with pytest.raises(WorkerCrashed):
            await pool.process(SystemExit())
        # The job waits for the worker, as long as it takes.
        assert await pool.process("count") == 1
        assert workers.setups == [0, 0, 0.25, 1.75]
        assert pool.statistics().restarts == 3


async def test_siblings_serve_while_a_worker_is_restarted(
    autojump_clock: trio.testing.MockClock,
) -> None:
    workers = Workers(None, None, ValueError())
    restart = Restart(backoff=lambda _: 1.5)
    async with open_pool(2, worker=workers, restart=restart) as pool:
        with pytest.raises(WorkerCrashed):
            await pool.process(SystemExit())
        await wait_all_tasks_blocked()
        states = sorted(worker.state.value for worker in pool.workers())
        assert states == ["idle", "restarting"]
        assert pool.statistics().workers == 1
        assert await pool.map(range(10)) == list(range(10))
        assert trio.current_time() == 0
        await trio.sleep(1.5)
        await wait_all_tasks_blocked()
        assert pool.statistics().workers == 2
        assert {worker.state for worker in pool.workers()} == {WorkerState.IDLE}


async def test_setups_that_fail_at_restarts_break_the_pool(
    autojump_clock: trio.testing.MockClock,
) -> None:
    last = ValueError("third")
    workers = Workers(None, ValueError("first"), ValueError("second"), last)
    with pytest.raises(PoolBroken) as caught:
        async with open_pool(1, worker=workers, restart=Restart(limit=3)) as pool:
            with pytest.raises(WorkerCrashed):
                await pool.process(SystemExit())
            await pool.process("count")
    assert caught.value.__cause__ is last
    assert len(workers.setups) == 4


async def test_a_setup_that_hangs_at_a_restart_does_not_block_shutdown(
    autojump_clock: trio.testing.MockClock,
) -> None:
    workers = Workers(None, None, trio.sleep_forever)
    async with open_pool(2, worker=workers) as pool:
        with pytest.raises(WorkerCrashed):
            await pool.process(SystemExit())
        await wait_all_tasks_blocked()
        assert {w.state for w in pool.workers()} == {
            WorkerState.STARTING,
            WorkerState.IDLE,
        }
        report = await pool.shutdown()
        assert report.unfinished == 0
    assert trio.current_time() == 0


async def test_a_setup_that_hangs_at_a_restart_does_not_block_leaving(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, worker=Workers(None, trio.sleep_forever)) as pool:
        with pytest.raises(WorkerCrashed):
            await pool.process(SystemExit())
        await wait_all_tasks_blocked()
    assert trio.current_time() == 0


async def test_a_setup_that_hangs_at_a_restart_does_not_block_cancel(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, worker=Workers(None, trio.sleep_forever)) as pool:
        with pytest.raises(WorkerCrashed):
            await pool.process(SystemExit())
        await wait_all_tasks_blocked()
        reply = await pool.submit("never")
        pool.cancel()
        with pytest.raises(JobCancelled) as caught:
            await reply.wait()
        assert caught.value.started is False
    assert trio.current_time() == 0


async def test_a_setup_that_hangs_does_not_block_shrinking(
    autojump_clock: trio.testing.MockClock,
) -> None:
    workers = Workers(None, trio.sleep_forever)
    async with open_pool(1, worker=workers) as pool:
        with trio.move_on_after(0.25) as scope:
            await pool.resize(2)
        assert scope.cancelled_caught
        assert (pool.size, pool.statistics().workers) == (2, 1)
        await pool.resize(1)
        assert (pool.size, pool.statistics().workers) == (1, 1)
        assert await pool.process("count") == 1
    assert trio.current_time() == 0.25


async def test_a_worker_that_waits_for_its_restart_does_not_block_the_end(
    autojump_clock: trio.testing.MockClock,
) -> None:
    restart = Restart(backoff=lambda _: math.inf)
    async with open_pool(2, obey, restart=restart, crash_on=(Broken,)) as pool:
        for _ in range(4):
            with pytest.raises(Broken):
                await pool.process(Broken())
            await wait_all_tasks_blocked()
            if pool.statistics().workers < 2:
                break
        states = {worker.state for worker in pool.workers()}
        assert WorkerState.RESTARTING in states
        await pool.resize(0)
        assert pool.workers() == ()
    assert trio.current_time() == 0


async def test_a_worker_that_waits_for_its_restart_stops_with_the_pool(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(
        1, obey, restart=Restart(backoff=lambda _: 60.0), unobserved="ignore"
    ) as pool:
        for _ in range(2):
            with pytest.raises(WorkerCrashed):
                await pool.process(SystemExit())
        await wait_all_tasks_blocked()
        assert [w.state for w in pool.workers()] == [WorkerState.RESTARTING]
        pool.cancel()
    assert [w.state for w in pool.workers()] == [WorkerState.STOPPED]


async def test_a_setup_that_fails_after_resize_is_tried_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    workers = Workers(None, ValueError())
    async with open_pool(1, worker=workers) as pool:
        await pool.resize(2)
        assert len(workers.setups) == 3
        assert pool.statistics().workers == 2


# Restarts.


async def test_the_first_restart_is_at_once_and_then_the_backoff_counts(
    autojump_clock: trio.testing.MockClock,
) -> None:
    asked: list[int] = []

    def backoff(attempt: int) -> float:
        asked.append(attempt)
        return [0.25, 1.5, 4.0][attempt]

    workers = Workers()
    async with open_pool(1, worker=workers, restart=Restart(backoff=backoff)) as pool:
        for _ in range(4):
            with pytest.raises(WorkerCrashed):
                await pool.process(SystemExit())
        assert await pool.process("count") == 1
    assert workers.setups == [0, 0, 0.25, 1.75, 5.75]
    assert asked == [0, 1, 2]


async def test_no_backoff_makes_restarts_hot(
    autojump_clock: trio.testing.MockClock,
) -> None:
    workers = Workers()
    restart = Restart(limit=math.inf, backoff=lambda _: 0.0)
    async with open_pool(1, worker=workers, restart=restart) as pool:
        for _ in range(20):
            with pytest.raises(WorkerCrashed):
                await pool.process(SystemExit())
        assert await pool.process("count") == 1
    first, second, *later = workers.setups
    assert second == first
    gaps = [b - a for a, b in zip([second, *later], later, strict=False)]
    assert len(gaps) == 19
    assert all(gap > 0.0099 for gap in gaps)


async def test_crashes_up_to_the_limit_are_forgiven(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with pytest.raises(PoolBroken) as caught:
        async with open_pool(1, obey, restart=Restart(limit=3)) as pool:
            for _ in range(3):
                with pytest.raises(WorkerCrashed):
                    await pool.process(SystemExit())
            assert await pool.process(1) == 1
            with pytest.raises(WorkerCrashed):
                await pool.process(SystemExit("the last"))
            await trio.sleep_forever()
    assert isinstance(caught.value.__cause__, SystemExit)
    assert caught.value.__cause__.code == "the last"


async def test_old_crashes_are_forgotten(
    autojump_clock: trio.testing.MockClock,
) -> None:
    workers = Workers()
    restart = Restart(limit=1, within=2.0, backoff=lambda _: 9.0)
    async with open_pool(1, worker=workers, restart=restart) as pool:
        for _ in range(5):
            with pytest.raises(WorkerCrashed):
                await pool.process(SystemExit())
            await trio.sleep(2.0)
        # Each of them was the first of a quiet slot, restarted at once.
        assert workers.setups == [0, 0, 2, 4, 6, 8]


async def test_crashes_just_inside_the_window_count(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with pytest.raises(PoolBroken):
        async with open_pool(1, obey, restart=Restart(limit=1, within=2.0)) as pool:
            for _ in range(2):
                with pytest.raises(WorkerCrashed):
                    await pool.process(SystemExit())
                await trio.sleep(1.75)


async def test_the_budget_is_one_of_each_slot(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def crash() -> None:
        await trio.sleep(0.25)
        raise SystemExit

    async with open_pool(3, obey, restart=Restart(limit=1)) as pool:
        replies = [await pool.submit(crash) for _ in range(3)]
        for reply in replies:
            with pytest.raises(WorkerCrashed):
                await reply.wait()
        assert {reply.worker for reply in replies} == {0, 1, 2}
        assert await pool.map(range(6)) == list(range(6))
        assert pool.statistics().restarts == 3


async def test_jobs_in_the_backlog_outlive_a_crash() -> None:
    async with open_pool(1, obey) as pool:
        replies = [await pool.submit(job) for job in (SystemExit(), 1, 2, 3)]
        with pytest.raises(WorkerCrashed):
            await replies[0].wait()
        assert [await reply.wait() for reply in replies[1:]] == [1, 2, 3]


async def test_a_crash_leaves_the_jobs_of_siblings_alone() -> None:
    go = trio.Event()

    async def wait_for_go() -> str:
        await go.wait()
        return "undisturbed"

    async with open_pool(2, obey) as pool:
        sibling = await pool.submit(wait_for_go)
        with pytest.raises(WorkerCrashed):
            await pool.process(SystemExit())
        await wait_all_tasks_blocked()
        go.set()
        assert await sibling.wait() == "undisturbed"


async def test_a_crash_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    error = SystemExit("out")
    async with open_pool(1, obey, name="press") as pool:
        with pytest.raises(WorkerCrashed):
            await pool.process(error)
        await wait_all_tasks_blocked()
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert record.name == "trio_pool"
    assert "press" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error


# A pool that is broken.


async def test_every_waiter_hears_that_the_pool_is_broken() -> None:
    heard: dict[str, PoolBroken] = {}
    go = trio.Event()
    crash = SystemExit("last straw")

    async def crash_on_go() -> None:
        await go.wait()
        raise crash

    async def listen(name: str, call: Callable[[], Awaitable[object]]) -> None:
        with trio.CancelScope(shield=True):
            try:
                await call()
            except PoolBroken as error:
                heard[name] = error

    async with trio.open_nursery() as nursery:
        with pytest.raises(PoolBroken) as caught:
            async with open_pool(
                2, obey, max_backlog=2, restart=Restart(limit=0)
            ) as pool:
                poison = await pool.submit(crash_on_go)
                running = await pool.submit(trio.sleep_forever)
                await wait_all_tasks_blocked()
                waiting = await pool.submit("waiting")
                calls: dict[str, Callable[[], Awaitable[object]]] = {
                    "process": lambda: pool.process(1),
                    "room": lambda: pool.submit(1),
                    "room to process": lambda: pool.process(1),
                    "running": running.wait,
                    "waiting": waiting.wait,
                    "join": pool.join,
                    "resize": lambda: pool.resize(1),
                }
                for name, call in calls.items():
                    nursery.start_soon(listen, name, call)
                    await wait_all_tasks_blocked()
                go.set()
                await trio.sleep_forever()
    assert caught.value.__cause__ is crash
    assert heard.keys() == calls.keys()
    assert all(broken.__cause__ is crash for broken in heard.values())
    assert heard["running"].started is True
    assert (heard["running"].job_id, heard["running"].attempts) == (running.id, 1)
    assert heard["waiting"].started is heard["process"].started is False
    assert heard["room"].started is heard["room to process"].started is False
    with pytest.raises(WorkerCrashed):
        await poison.wait()
    count = pool.statistics()
    assert (count.queued, count.running, count.lost) == (0, 0, 4)
    assert balanced(count)


async def test_a_body_that_is_blocked_is_cancelled_when_the_pool_breaks() -> None:
    cancelled = False
    with pytest.raises(PoolBroken) as caught:
        async with open_pool(1, obey, restart=Restart(limit=0), name="press") as pool:
            pool.submit_nowait(SystemExit())
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                cancelled = True
                raise
    assert cancelled
    assert caught.value.pool == "press"
    assert caught.value.job_id is None
    assert "press" in str(caught.value)
    assert pool.closed


async def test_an_error_of_the_block_comes_with_that_of_the_broken_pool() -> None:
    """And nothing else: that the block was cancelled is no news."""

    async def fail() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError

    with pytest.raises(ExceptionGroup, match="its block failed") as caught:
        async with open_pool(1, obey, restart=Restart(limit=0)) as pool:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail)
                nursery.start_soon(pool.join)
                await wait_all_tasks_blocked()
                pool.submit_nowait(SystemExit())
                await trio.sleep_forever()
    news, failure = caught.value.exceptions
    assert isinstance(failure, PoolBroken)
    assert isinstance(news, ExceptionGroup)
    assert [type(error) for error in news.exceptions] == [ValueError]


async def test_a_broken_pool_refuses_jobs_as_broken() -> None:
    with pytest.raises(PoolBroken):
        async with open_pool(1, obey, restart=Restart(limit=0)) as pool:
            with pytest.raises(WorkerCrashed):
                await pool.process(SystemExit())
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()
                for call in (pool.process, pool.submit):
                    with pytest.raises(PoolBroken) as caught:
                        await call(1)
                    assert caught.value.started is False
                with pytest.raises(PoolBroken):
                    pool.submit_nowait(1)
                with pytest.raises(PoolBroken):
                    await pool.join()
                with pytest.raises(PoolBroken):
                    await pool.map([1, 2])
    with pytest.raises(PoolBroken):
        pool.submit_nowait(1)


async def test_map_hears_that_the_pool_is_broken() -> None:
    with pytest.raises(PoolBroken):
        async with open_pool(2, obey, restart=Restart(limit=0)) as pool:
            pool.submit_nowait(SystemExit())
            with pytest.raises(PoolBroken):
                await pool.map([trio.sleep_forever] * 5)
            await trio.sleep_forever()


async def test_a_pool_that_breaks_while_it_is_left_says_so() -> None:
    with pytest.raises(PoolBroken):
        async with open_pool(1, obey, restart=Restart(limit=0)) as pool:
            pool.submit_nowait(SystemExit())
            waiting = pool.submit_nowait("waiting")
    with pytest.raises(PoolBroken) as caught:
        await waiting.wait()
    assert caught.value.started is False


async def test_a_backoff_that_raises_breaks_the_pool() -> None:
    error = ZeroDivisionError()

    def backoff(_: int) -> float:
        raise error

    with pytest.raises(PoolBroken) as caught:
        async with open_pool(1, obey, restart=Restart(backoff=backoff)) as pool:
            for _ in range(2):
                with pytest.raises(WorkerCrashed):
                    await pool.process(SystemExit())
            await trio.sleep_forever()
    assert caught.value.__cause__ is error


# Cleanup.


async def test_a_cleanup_that_fails_is_logged_told_and_changes_no_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    error = OSError("cannot close")
    listener = Listener()
    async with open_pool(
        2, worker=Workers(cleanup=error), hooks=[listener], name="press"
    ) as pool:
        assert await pool.process(1) == 1
        await pool.resize(1)
        assert [seen for seen in listener.seen if seen[0] == "crash"] == [
            ("crash", 1, error)
        ]
        assert await pool.process("count") >= 1
    assert [seen[0] for seen in listener.seen].count("crash") == 2
    logged = [r.exc_info[1] for r in caplog.records if r.exc_info is not None]
    assert logged == [error, error]
    assert pool.statistics().done == 2


async def test_a_cleanup_that_fails_spends_budget() -> None:
    error = OSError("cannot close")
    with pytest.raises(PoolBroken) as caught:
        async with open_pool(
            2, worker=Workers(cleanup=error), restart=Restart(limit=0)
        ) as pool:
            await pool.resize(1)
            await trio.sleep_forever()
    assert caught.value.__cause__ is error


async def test_a_cleanup_that_fails_after_a_crash_is_logged_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    crash, error = Broken("worn out"), OSError("cannot close")
    workers = Workers(cleanup=error)
    async with open_pool(1, worker=workers, crash_on=(Broken,)) as pool:
        with pytest.raises(Broken):
            await pool.process(crash)
        await wait_all_tasks_blocked()
        workers.cleanup = None
        assert await pool.process("count") == 1
        assert pool.statistics().restarts == 1
    logged = [r.exc_info[1] for r in caplog.records if r.exc_info is not None]
    assert any(entry is crash for entry in logged)
    assert any(entry is error for entry in logged)


async def test_a_cleanup_may_swallow_the_crash_and_the_worker_is_replaced() -> None:
    @asynccontextmanager
    async def forgiving() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        try:
            yield obey
        except Exception:
            pass

    async with open_pool(1, worker=forgiving, crash_on=(Broken,)) as pool:
        with pytest.raises(Broken):
            await pool.process(Broken())
        assert await pool.process(1) == 1
        assert pool.statistics().restarts == 1


# Cancelling workers under their jobs.


async def test_cancel_ends_running_jobs_as_started_and_waiting_ones_as_not() -> None:
    workers = Workers()
    async with open_pool(1, worker=workers) as pool:
        running = await pool.submit(trio.sleep_forever)
        waiting = await pool.submit("waiting")
        await wait_all_tasks_blocked()
        pool.cancel()
        with pytest.raises(JobCancelled) as caught:
            await running.wait()
        assert (caught.value.started, caught.value.attempts) == (True, 1)
        assert caught.value.worker == 0
        with pytest.raises(JobCancelled) as caught:
            await waiting.wait()
        assert (caught.value.started, caught.value.attempts) == (False, 0)
        assert caught.value.worker is None
    assert workers.cleanups == 1
    count = pool.statistics()
    assert (count.cancelled, count.lost, count.restarts) == (2, 0, 0)


async def test_shutdown_cancels_running_jobs_as_started(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, obey) as pool:
        reply = await pool.submit(trio.sleep_forever)
        report = await pool.shutdown(grace=0.25)
        assert trio.current_time() == 0.25
        assert (report.cancelled, report.unfinished) == (1, 0)
        with pytest.raises(JobCancelled) as caught:
            await reply.wait()
        assert caught.value.started is True


async def test_a_worker_that_is_cancelled_as_asked_is_no_crash(
    caplog: pytest.LogCaptureFixture,
) -> None:
    listener = Listener()
    async with open_pool(1, obey, hooks=[listener]) as pool:
        await pool.submit(trio.sleep_forever)
        await wait_all_tasks_blocked()
        pool.cancel()
    assert listener.seen == [("start", 0, None), ("stop", 0, None)]
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []


async def test_a_handler_that_cleans_up_when_the_pool_stops_is_waited_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def unwind() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1.5)

    async with open_pool(1, obey) as pool:
        await pool.submit(unwind)
        await wait_all_tasks_blocked()
        pool.cancel()
    assert trio.current_time() == 1.5
    assert pool.statistics().cancelled == 1


# Handlers that leave something open.


async def leave_a_scope_open() -> None:
    trio.CancelScope().__enter__()


async def leave_a_nursery_open() -> None:
    await trio.open_nursery().__aenter__()


async def leave_a_busy_nursery_open() -> None:
    nursery = await trio.open_nursery().__aenter__()
    nursery.start_soon(trio.sleep_forever)


async def leave_a_scope_open_and_fail() -> None:
    trio.CancelScope().__enter__()
    raise ValueError("as well")


@pytest.mark.parametrize(
    "misnest", [leave_a_scope_open, leave_a_nursery_open, leave_a_busy_nursery_open]
)
async def test_a_handler_that_leaves_something_open_crashes_its_worker(
    misnest: Callable[[], Awaitable[None]],
) -> None:
    workers = Workers()
    async with open_pool(1, worker=workers) as pool:
        with pytest.raises(WorkerCrashed) as caught:
            await pool.process(misnest)
        assert caught.value.started is True
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert await pool.process("count") == 1
        assert isinstance(pool.workers()[0].last_error, RuntimeError)
        count = pool.statistics()
        assert (count.lost, count.restarts) == (1, 1)
        assert len(workers.setups) == 2


async def test_a_handler_that_leaves_a_scope_open_and_fails_crashes_its_worker() -> (
    None
):
    async with open_pool(1, worker=Workers()) as pool:
        with pytest.raises(ValueError, match="as well"):
            await pool.process(leave_a_scope_open_and_fail)
        assert await pool.process("count") == 1
        assert isinstance(pool.workers()[0].last_error, RuntimeError)
        assert pool.statistics().restarts == 1


async def test_the_first_that_has_broken_a_worker_is_what_it_crashed_by() -> None:
    async with open_pool(1, worker=Workers(), crash_on=ValueError) as pool:
        with pytest.raises(ValueError, match="as well") as caught:
            await pool.process(leave_a_scope_open_and_fail)
        assert await pool.process("count") == 1
        assert pool.workers()[0].last_error is caught.value
        assert pool.statistics().restarts == 1


@pytest.mark.parametrize("among", [[Broken()], [OSError(), Broken()]])
async def test_a_group_with_an_error_of_crash_on_breaks_the_worker(
    among: list[Exception],
) -> None:
    async with open_pool(1, worker=Workers(), crash_on=Broken) as pool:
        with pytest.raises(ExceptionGroup):
            await pool.process(ExceptionGroup("", [OSError(), ValueError()]))
        assert await pool.process("count") == 2
        with pytest.raises(ExceptionGroup):
            await pool.process(ExceptionGroup("", among))
        assert await pool.process("count") == 1
        assert pool.statistics().restarts == 1


async def test_the_traceback_of_an_error_begins_below_the_workers_own_frames() -> None:
    async with open_pool(1, obey) as pool:
        with pytest.raises(Broken) as caught:
            await pool.process(Broken())
        with pytest.raises(ExceptionGroup) as group:
            await pool.map([Broken()])
    item = group.value.exceptions[0]
    names = [frame.name for frame in traceback.extract_tb(item.__traceback__)]
    assert names == ["obey"]
    names = [frame.name for frame in traceback.extract_tb(caught.tb)]
    assert names[-1] == "obey"
    assert "serve" not in names


@pytest.mark.parametrize(
    "misnest", [leave_a_scope_open, leave_a_nursery_open, leave_a_busy_nursery_open]
)
async def test_a_misnested_handler_in_map_crashes_its_worker(
    misnest: Callable[[], Awaitable[None]],
) -> None:
    async with open_pool(1, worker=Workers()) as pool:
        settled = await pool.settle([1, misnest, 2])
        assert settled[0].outcome.unwrap() == 1
        with pytest.raises(WorkerCrashed):
            settled[1].outcome.unwrap()
        assert settled[2].outcome.unwrap() == 2
        assert pool.statistics().restarts == 1


async def test_a_misnested_handler_leaves_its_siblings_alone() -> None:
    go = trio.Event()

    async def wait_for_go() -> str:
        await go.wait()
        return "undisturbed"

    async with open_pool(2, obey) as pool:
        sibling = await pool.submit(wait_for_go)
        with pytest.raises(WorkerCrashed):
            await pool.process(leave_a_busy_nursery_open)
        await wait_all_tasks_blocked()
        go.set()
        assert await sibling.wait() == "undisturbed"


# Workers with tasks of their own.


class Background:
    """A worker with a nursery of its own, in which something may go wrong."""

    def __init__(self) -> None:
        self.setups = 0
        self.fail = trio.Event()
        self.error: BaseException = OSError("the connection was lost")

    async def watch(self, fail: trio.Event) -> None:
        await fail.wait()
        raise self.error

    @asynccontextmanager
    async def __call__(self) -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        self.setups += 1
        self.fail = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.watch, self.fail)
            yield obey
            nursery.cancel_scope.cancel()


async def test_a_worker_whose_background_task_dies_under_a_job_has_crashed() -> None:
    workers = Background()
    async with open_pool(1, worker=workers) as pool:
        reply = await pool.submit(trio.sleep_forever)
        await wait_all_tasks_blocked()
        workers.fail.set()
        with pytest.raises(WorkerCrashed) as caught:
            await reply.wait()
        assert caught.value.started is True
        cause = caught.value.__cause__
        assert isinstance(cause, ExceptionGroup)
        assert cause.exceptions == (workers.error,)
        assert await pool.process(1) == 1
        count = pool.statistics()
        assert (count.lost, count.restarts, workers.setups) == (1, 1, 2)


async def test_a_caller_hears_that_the_worker_died_and_is_not_cancelled() -> None:
    workers = Background()

    async def die() -> None:
        workers.fail.set()
        await trio.sleep_forever()

    async with open_pool(1, worker=workers) as pool:
        with pytest.raises(WorkerCrashed) as caught:
            await pool.process(die)
        assert caught.value.started is True
        assert caught.value.worker == 0
        assert await pool.process(1) == 1


async def test_ctrl_c_in_the_background_task_of_a_worker_leaves_the_block() -> None:
    workers = Background()
    workers.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt) as caught:
        async with open_pool(1, worker=workers):
            await wait_all_tasks_blocked()
            workers.fail.set()
            await trio.sleep_forever()
    assert caught.value is workers.error
    assert workers.setups == 1


async def test_a_worker_with_tasks_of_its_own_that_is_cancelled_as_asked_is_no_crash(
    caplog: pytest.LogCaptureFixture,
) -> None:
    listener = Listener()
    async with open_pool(1, worker=Background(), hooks=[listener]) as pool:
        await wait_all_tasks_blocked()
        pool.cancel()
    assert [seen[0] for seen in listener.seen] == ["start", "stop"]
    assert caplog.records == []


async def test_a_cleanup_that_fails_as_the_pool_stops_is_logged_and_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    listener = Listener()
    workers = Workers(cleanup=Broken())
    async with open_pool(1, worker=workers, hooks=[listener]) as pool:
        await wait_all_tasks_blocked()
        pool.cancel()
    assert [seen[0] for seen in listener.seen] == ["start", "crash"]
    assert len(caplog.records) == 1


async def test_a_job_whose_worker_died_under_it_is_tried_again_by_its_policy() -> None:
    workers = Background()
    attempts = 0

    async def die_once() -> str:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            workers.fail.set()
            await trio.sleep_forever()
        return "alive"

    retry = Retry(2, lambda _: 0.0, on=(WorkerCrashed,))
    async with open_pool(1, worker=workers, retry=retry) as pool:
        assert await pool.process(die_once) == "alive"


async def test_what_a_broken_pool_loses_is_not_told_of_job_by_job(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(PoolBroken):
        async with open_pool(1, obey, restart=Restart(limit=0)) as pool:
            pool.submit_nowait(SystemExit())
            for _ in range(3):
                pool.submit_nowait(1)
            await trio.sleep_forever()
    messages = [record.getMessage() for record in caplog.records]
    # The one is that whose worker died.
    assert messages.count("nobody read the reply of a failed job") == 1


async def test_an_idle_worker_whose_background_task_dies_is_replaced() -> None:
    workers, listener = Background(), Listener()
    async with open_pool(1, worker=workers, hooks=[listener]) as pool:
        await wait_all_tasks_blocked()
        workers.fail.set()
        await wait_all_tasks_blocked()
        assert workers.setups == 2
        assert await pool.process(1) == 1
        assert pool.statistics().lost == 0
    assert [seen[0] for seen in listener.seen] == [
        "start",
        "crash",
        "restart",
        "start",
        "stop",
    ]


async def test_a_job_handed_to_a_worker_that_dies_in_the_same_tick_is_not_lost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    workers = Background()
    restart = Restart(limit=math.inf, backoff=lambda _: 0.25)
    async with open_pool(1, worker=workers, restart=restart) as pool:
        for number in range(20):
            await wait_all_tasks_blocked()
            workers.fail.set()
            # The handler never sleeps: either it has run, or it has not begun.
            assert await pool.process(number) == number
        assert pool.statistics().done == 20
        assert pool.statistics().lost == 0


class SlowToLeave:
    """Makes workers that live in a nursery, and whose cleanup takes five seconds."""

    def __init__(self) -> None:
        self.nurseries: list[trio.Nursery] = []

    @asynccontextmanager
    async def __call__(self) -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        try:
            async with trio.open_nursery() as nursery:
                self.nurseries.append(nursery)
                yield obey
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(5)


async def test_a_job_waits_for_no_cleanup_of_the_worker_that_dies_before_it_began(
    autojump_clock: trio.testing.MockClock,
) -> None:
    worker = SlowToLeave()
    async with open_pool(1, worker=worker) as pool:
        await wait_all_tasks_blocked()
        worker.nurseries[0].cancel_scope.cancel()
        # The worker is still taken for an idle one.
        reply = pool.submit_nowait(1)
        assert pool.statistics().running == 1
        await wait_all_tasks_blocked()
        assert pool.statistics().queued == 1
        assert [worker.state for worker in pool.workers()] == [WorkerState.STOPPING]
        assert await reply.wait() == 1
        assert trio.current_time() == 5


async def test_no_job_goes_to_an_idle_worker_that_has_died(
    autojump_clock: trio.testing.MockClock,
) -> None:
    worker = SlowToLeave()
    async with open_pool(2, worker=worker) as pool:
        await wait_all_tasks_blocked()
        worker.nurseries[0].cancel_scope.cancel()
        await wait_all_tasks_blocked()
        replies = await pool.submit_batch([1, 2])
        assert [await reply.wait() for reply in replies] == [1, 2]
        assert trio.current_time() == 0


async def test_a_job_for_a_worker_that_dies_is_withdrawn_when_its_caller_is_cancelled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    started = 0

    async def job() -> None:
        nonlocal started
        started += 1

    restart = Restart(backoff=lambda _: 1.5)
    async with open_pool(1, obey, restart=restart) as pool:
        for _ in range(2):
            with pytest.raises(WorkerCrashed):
                await pool.process(SystemExit())
        with trio.move_on_after(0.25) as scope:
            await pool.process(job)
        assert scope.cancelled_caught
        assert trio.current_time() == 0.25
        assert pool.statistics().queued == 0
    assert started == 0


# The body of the block.


async def test_a_body_error_leaves_bare_and_cancels_everything() -> None:
    error = ValueError("body")
    with pytest.raises(ValueError) as caught:
        async with open_pool(1, obey) as pool:
            running = await pool.submit(trio.sleep_forever)
            waiting = await pool.submit("waiting")
            await wait_all_tasks_blocked()
            raise error
    assert caught.value is error
    assert error.__cause__ is None
    assert error.__context__ is None
    assert running.state is waiting.state is JobState.CANCELLED


async def test_a_group_raised_by_the_body_leaves_as_it_is() -> None:
    error = ExceptionGroup("of the body", [ValueError()])
    with pytest.raises(ExceptionGroup) as caught:
        async with open_pool(1, obey):
            raise error
    assert caught.value is error


async def test_a_body_error_keeps_its_context() -> None:
    first = KeyError("first")
    with pytest.raises(ValueError) as caught:
        async with open_pool(1, obey):
            try:
                raise first
            except KeyError:
                raise ValueError("second")  # noqa: B904 - the context is the point
    assert caught.value.__context__ is first


async def test_a_cancellation_leaves_the_block_and_cancels_everything() -> None:
    with trio.CancelScope() as scope:
        async with open_pool(1, obey) as pool:
            running = await pool.submit(trio.sleep_forever)
            await wait_all_tasks_blocked()
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert running.state is JobState.CANCELLED


async def test_the_finally_of_a_cancelled_body_may_still_use_the_pool() -> None:
    results: list[Any] = []
    with trio.CancelScope() as outer:
        async with open_pool(2, obey) as pool:
            try:
                outer.cancel()
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    results.append(await pool.process(1))
                    reply = await pool.submit(2)
                    results.append(await reply.wait())
                    results.extend(await pool.map([3, 4]))
    assert outer.cancelled_caught
    assert results == [1, 2, 3, 4]


async def test_the_finally_of_a_body_that_fails_may_still_use_the_pool() -> None:
    with pytest.raises(ValueError, match="body"):
        async with open_pool(1, obey) as pool:
            try:
                raise ValueError("body")
            finally:
                result = await pool.process(1)
    assert result == 1


async def test_jobs_under_way_go_on_until_a_cancelled_body_has_ended(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def work() -> str:
        await trio.sleep(1.5)
        return "finished"

    with trio.move_on_after(0.25):
        async with open_pool(1, obey) as pool:
            reply = await pool.submit(work)
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    assert await reply.wait() == "finished"
    assert trio.current_time() == 1.5


async def test_nothing_outlives_the_block() -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    async with open_pool(4, obey) as pool:
        await pool.process(1)
    assert trio.lowlevel.current_statistics().tasks_living == before
    assert {worker.state for worker in pool.workers()} <= {WorkerState.STOPPED}
    with pytest.raises(PoolClosed):
        await pool.process(1)


# Context variables.

color: ContextVar[str] = ContextVar("color", default="none")


async def test_setup_and_cleanup_share_a_context_and_jobs_have_their_callers() -> None:
    seen: list[str] = []

    async def handler(value: str) -> str:
        before = color.get()
        color.set(value)
        return before

    @asynccontextmanager
    async def painter() -> AsyncGenerator[Callable[[str], Awaitable[str]], None]:
        token = color.set("workers")
        try:
            yield handler
        finally:
            seen.append(color.get())
            # Only in the very context in which the variable was set.
            color.reset(token)
            seen.append(color.get())

    color.set("callers")
    async with open_pool(1, worker=painter) as pool:
        assert await pool.process("jobs") == "callers"
        assert await pool.process("jobs") == "callers"
        assert color.get() == "callers"
    assert seen == ["workers", "callers"]


class Painter:
    """A worker as a class, which sets a variable as it opens."""

    resets = 0

    async def __aenter__(self) -> Callable[[Any], Awaitable[Any]]:
        self.token = color.set("workers")
        return obey

    async def __aexit__(self, *exc_info: object) -> None:
        color.reset(self.token)
        Painter.resets += 1


async def test_the_context_of_setup_is_that_of_cleanup_however_the_worker_ends() -> (
    None
):
    Painter.resets = 0

    async def get() -> str:
        return color.get()

    async with open_pool(2, worker=Painter, crash_on=(Broken,)) as pool:
        color.set("callers")
        with pytest.raises(Broken):
            await pool.process(Broken())
        with pytest.raises(WorkerCrashed):
            await pool.process(SystemExit())
        assert await pool.process(get) == "callers"
        await pool.resize(1)
        pool.submit_nowait(trio.sleep_forever)
        await wait_all_tasks_blocked()
        pool.cancel()
    assert Painter.resets == 4


def test_a_job_that_waited_has_the_variables_of_its_caller_and_no_others() -> None:
    """Though either its worker or its caller has none at all."""

    async def get() -> str:
        return color.get()

    async def main() -> None:
        async with open_pool(1, obey) as pool:
            await pool.process(get)
            for expected in ("callers", "none"):
                pool.pause()
                context = Context()
                if expected == "callers":
                    context.run(color.set, expected)
                reply = context.run(pool.submit_nowait, get)
                await wait_all_tasks_blocked()
                pool.resume()
                assert await reply.wait() == expected
            # The next are taken by a worker that is busy.
            contexts = [Context(), Context()]
            contexts[0].run(color.set, "callers")
            replies = [c.run(pool.submit_nowait, get) for c in contexts * 2]
            seen = [await reply.wait() for reply in replies]
            assert seen == ["callers", "none"] * 2

    Context().run(trio.run, main)


@pytest.mark.parametrize("gets_ready", [False, True])
@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("way", ["handed", "roused", "in line", "map", "hired"])
async def test_what_a_job_sets_is_unknown_to_its_worker(
    way: str, before: int, gets_ready: bool
) -> None:
    """Where the variables of the caller are the worker's, too."""
    seen: list[str] = []

    class Brush:
        if gets_ready:

            async def ready(self) -> None:
                seen.append(color.get())

        async def __call__(self, value: str) -> None:
            color.set(value)

    @asynccontextmanager
    async def painter() -> AsyncGenerator[Brush, None]:
        yield Brush()
        seen.append(color.get())

    async with open_pool(1, worker=painter) as pool:
        for _ in range(before):
            await pool.process("jobs")
            await wait_all_tasks_blocked()
        if way == "roused":
            pool.pause()
        if way == "hired":
            await pool.resize(0)
        match way:
            case "handed":
                await pool.process("jobs")
            case "map":
                await pool.map(["jobs"] * 3)
            case _:
                for _ in range(3):
                    pool.submit_nowait("jobs")
                pool.resume()
        if way == "hired":
            await pool.resize(1)
    assert set(seen) == {"none"}


@pytest.mark.parametrize("worker", [None, Painter])
async def test_hooks_of_a_workers_end_see_no_variable_of_a_job(worker: Any) -> None:
    seen: list[str] = []

    class Listener(Hooks):
        def on_worker_crash(self, event: WorkerChanged) -> None:
            seen.append(color.get())

        on_worker_stop = on_worker_crash

    handler = obey if worker is None else None
    async with open_pool(1, handler, worker=worker, hooks=[Listener()]) as pool:
        color.set("callers")
        with pytest.raises(WorkerCrashed):
            await pool.process(SystemExit())
        await pool.process(1)
        pool.submit_nowait(trio.sleep_forever)
        await wait_all_tasks_blocked()
        pool.cancel()
    # The cleanup of a painter has taken back what its setup has set.
    assert seen == ["none"] * 2


async def test_a_worker_that_is_let_go_before_its_first_step_is_not_waited_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Whether its first step comes before that is up to trio: it is tried often."""
    setups = 0

    @asynccontextmanager
    async def slow() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        nonlocal setups
        setups += 1
        if setups > 1:
            await trio.sleep(1_000)
        yield obey

    async with open_pool(1, worker=slow) as pool:
        for _ in range(20):
            with trio.fail_after(5):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pool.resize, 2)
                    await trio.lowlevel.checkpoint()
                    nursery.start_soon(pool.resize, 1)
    assert trio.current_time() < 1


async def test_a_crashing_workers_own_context_hears_that_its_job_had_started() -> None:
    heard: list[WorkerCrashed] = []

    @asynccontextmanager
    async def listening() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        try:
            yield obey
        except WorkerCrashed as error:
            heard.append(error)
            raise

    async with open_pool(1, worker=listening) as pool:
        with pytest.raises(WorkerCrashed) as caught:
            await pool.process(SystemExit())
    (error,) = heard
    assert error.started is True
    assert (error.job_id, error.attempts, error.worker) == (caught.value.job_id, 1, 0)


async def test_a_pool_that_is_over_is_not_kept_by_its_run() -> None:
    def open_one() -> tuple[Any, weakref.ref[Any]]:
        workers = Workers()
        return open_pool(2, worker=workers, max_jobs=2), weakref.ref(workers)

    opened, workers = open_one()
    async with opened as pool:
        for _ in range(5):
            await pool.process("count")
        await pool.resize(1)
    del opened, pool
    gc.collect()
    assert workers() is None


# Very many that wait, when the pool stops ---------------------------------------


class Ends(Hooks):
    """Counts how often each job is said to have been cancelled."""

    def __init__(self) -> None:
        self.of: Counter[int | str] = Counter()

    def on_job_cancel(self, event: JobChanged) -> None:
        self.of[event.job_id] += 1


def check_books(pool: Pool[Any, Any]) -> PoolStatistics:
    count = pool.statistics()
    waiting = count.delayed + count.queued + count.running
    ended = count.done + count.failed + count.timed_out + count.cancelled
    ended += count.expired + count.dropped + count.lost
    assert count.accepted == waiting + ended
    return count


async def test_a_thousand_jobs_end_in_the_step_of_the_cancel() -> None:
    async with open_pool(1, obey, max_backlog=math.inf) as pool:
        pool.pause()
        replies = [pool.submit_nowait(n) for n in range(1_000)]
        pool.cancel()
        assert {reply.state for reply in replies} == {JobState.CANCELLED}


@pytest.mark.parametrize("hears", [False, True])
async def test_of_very_many_jobs_each_ends_once_while_others_take_turns(
    hears: bool,
) -> None:
    ends, started = Ends(), []

    async def handler(job: Any) -> None:
        started.append(job)

    hooks = [ends] if hears else []
    async with open_pool(4, handler, max_backlog=math.inf, hooks=hooks) as pool:
        pool.pause()
        replies = [
            pool.submit_nowait(n, priority=n % 3, key=n % 50 if n % 2 else None)
            for n in range(6_000)
        ]
        replies += [pool.submit_nowait(n, delay=1.0 + n) for n in range(1_000)]
        pool.cancel()
        pool.cancel()
        assert check_books(pool).cancelled == 1_000
        with pytest.raises(PoolClosed):
            pool.submit_nowait("late")
        pool.resume()
        turns = 0
        with trio.CancelScope(shield=True):
            while check_books(pool).queued:
                turns += 1
                await trio.lowlevel.cancel_shielded_checkpoint()
        assert turns > 1
    assert check_books(pool).cancelled == 7_000
    assert started == []
    assert all(reply.state is JobState.CANCELLED for reply in replies)
    assert set(ends.of.values()) == ({1} if hears else set())
    assert len(ends.of) == (7_000 if hears else 0)


async def test_a_job_ended_among_many_has_its_error_as_any_other() -> None:
    async with open_pool(2, obey, max_backlog=math.inf) as pool:
        pool.pause()
        replies = [pool.submit_nowait(n) for n in range(3_000)]
        pool.cancel()
        assert not replies[-1].done
        with trio.CancelScope(shield=True), pytest.raises(JobCancelled) as caught:
            await replies[-1].wait()
    error = caught.value
    assert (error.job_id, error.started) == (replies[-1].id, False)
    assert (error.attempts, error.worker) == (0, None)
    for _ in range(2):
        outcome = replies[-1].outcome
        assert isinstance(outcome, Error)
        assert outcome.error is error


async def test_those_that_are_left_over_can_be_cancelled_meanwhile() -> None:
    heard = []

    async def call(pool: Pool[Any, Any]) -> None:
        try:
            await pool.process("called", priority=-1)
        finally:
            heard.append(check_books(pool).cancelled)

    ends = Ends()
    async with open_pool(1, obey, max_backlog=math.inf, hooks=[ends]) as pool:
        pool.pause()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, pool)
            await wait_all_tasks_blocked()
            replies = [pool.submit_nowait(n) for n in range(5_000)]
            pool.cancel()
            assert replies[-1].cancel()
            assert not replies[-1].cancel()
            assert replies[-1].state is JobState.CANCELLED
            nursery.cancel_scope.cancel()
        assert len(heard) == 1
        assert 1_000 < heard[0] < 5_001
    assert check_books(pool).cancelled == 5_001
    assert set(ends.of.values()) == {1}


async def test_a_shutdown_returns_when_all_that_waited_have_heard(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(1, obey, max_backlog=math.inf) as pool:
        pool.pause()
        replies = [pool.submit_nowait(trio.sleep_forever) for n in range(5_000)]
        report = await pool.shutdown(grace=1.0)
        assert all(reply.done for reply in replies)
    assert (report.cancelled, report.unfinished) == (5_000, 0)


async def test_a_shutdown_counts_all_that_waited_however_long_their_ends_take(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Each takes 10 ms by the clock; a shielded handler outlasts all of them."""

    class Slow(Hooks):
        def on_job_cancel(self, event: JobChanged) -> None:
            autojump_clock.jump(0.01)

    async def stay() -> None:
        with trio.CancelScope(shield=True):
            await go.wait()

    go = trio.Event()
    async with open_pool(1, obey, hooks=[Slow()], max_backlog=math.inf) as pool:
        pool.submit_nowait(stay)
        for number in range(3_000):
            pool.submit_nowait(number)
        await wait_all_tasks_blocked()
        report = await pool.shutdown(grace=0)
        assert (report.cancelled, report.unfinished) == (3_000, 1)
        go.set()


async def test_a_pool_of_size_0_ends_what_waits_while_others_take_turns(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_pool(0, obey, max_backlog=math.inf) as pool:
        replies = [
            pool.submit_nowait(n, delay=n % 2, ttl=2.0, id=n) for n in range(5_000)
        ]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.shutdown)
            while not pool.closed:
                await trio.lowlevel.checkpoint()
            assert check_books(pool).cancelled < 5_000
            # Their time comes, and nobody is there to run them.
            autojump_clock.jump(1.5)
        assert all(reply.state is JobState.CANCELLED for reply in replies)
    assert check_books(pool).cancelled == 5_000


@pytest.mark.parametrize("stop", ["cancel", "shutdown"])
async def test_all_callers_that_wait_for_room_are_refused(stop: str) -> None:
    refused = Counter[type[Exception]]()

    async def call(pool: Pool[Any, Any], name: str) -> None:
        with trio.CancelScope(shield=True):
            try:
                await getattr(pool, name)(1)
            except Exception as error:
                refused[type(error)] += 1

    async with open_pool(1, obey, max_backlog=1) as pool:
        pool.pause()
        waiting = pool.submit_nowait("waiting")
        async with trio.open_nursery() as nursery:
            for n in range(3_000):
                nursery.start_soon(call, pool, ("process", "submit")[n % 2])
            await wait_all_tasks_blocked()
            if stop == "cancel":
                pool.cancel()
            else:
                await pool.shutdown()
        assert refused == {PoolClosed: 3_000}
        assert check_books(pool).accepted == 1
    assert waiting.state is (JobState.CANCELLED if stop == "cancel" else JobState.DONE)


async def test_all_hear_of_it_though_the_host_is_cancelled_at_once() -> None:
    with trio.CancelScope() as scope:
        async with open_pool(1, obey, max_backlog=math.inf) as pool:
            pool.pause()
            replies = [pool.submit_nowait(n) for n in range(5_000)]
            pool.cancel()
            scope.cancel()
            await trio.sleep_forever()
    assert all(reply.state is JobState.CANCELLED for reply in replies)
    assert check_books(pool).cancelled == 5_000


async def test_a_shielded_handler_keeps_nobody_from_hearing_that_it_will_not_run() -> (
    None
):
    heard = trio.Event()

    async def handler(job: Any) -> None:
        with trio.CancelScope(shield=True):
            await heard.wait()

    async with open_pool(1, handler, max_backlog=math.inf) as pool:
        replies = [pool.submit_nowait(n) for n in range(3_000)]
        await wait_all_tasks_blocked()
        pool.cancel()
        with trio.CancelScope(shield=True), pytest.raises(JobCancelled):
            await replies[-1].wait()
        heard.set()
    assert check_books(pool).queued == 0


async def test_very_many_jobs_of_a_broken_pool_hear_that_it_is_broken(
    autojump_clock: trio.testing.MockClock,
) -> None:
    options: Any = {"max_backlog": math.inf, "crash_on": (Broken,)}
    with pytest.raises(PoolBroken):
        async with open_pool(1, obey, restart=Restart(limit=0), **options) as pool:
            pool.pause()
            replies = [pool.submit_nowait(Broken())]
            replies += [pool.submit_nowait(n) for n in range(3_000)]
            pool.resume()
            await trio.sleep_forever()
    assert [reply.state for reply in replies[1:]] == [JobState.LOST] * 3_000
    assert check_books(pool).lost == 3_000


async def test_very_many_jobs_hear_that_a_backoff_has_broken_the_pool() -> None:
    def backoff(_: int) -> float:
        raise ZeroDivisionError

    with pytest.raises(PoolBroken):
        async with open_pool(
            1, obey, restart=Restart(backoff=backoff), max_backlog=math.inf
        ) as pool:
            for _ in range(2):
                pool.submit_nowait(SystemExit())
            replies = [pool.submit_nowait(number) for number in range(3_000)]
            with trio.fail_after(5):
                await trio.sleep_forever()
    assert Counter(reply.state for reply in replies)[JobState.LOST] >= 2_000
    assert balanced(pool.statistics())


async def test_the_items_of_a_batch_that_wait_for_another_try_end_with_the_pool() -> (
    None
):
    async def fail(job: Any) -> None:
        raise ValueError

    caught: list[Any] = []

    async def settle(pool: Pool[Any, Any]) -> None:
        caught.extend(await pool.settle(range(3_000)))

    options: Any = {"max_backlog": math.inf, "retry": Retry(2, Backoff(100.0, 1.0))}
    async with open_pool(1, fail, **options) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(settle, pool)
            while check_books(pool).delayed < 3_000:
                await trio.lowlevel.checkpoint()
            pool.cancel()
    assert check_books(pool).cancelled == 3_000
    assert len(caught) == 3_000
    assert {type(one.outcome.error) for one in caught} == {JobCancelled}


class Reader(Hooks):
    """Reads the variable as workers start and stop."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_worker_start(self, event: WorkerChanged) -> None:
        self.seen.append(color.get())

    def on_worker_stop(self, event: WorkerChanged) -> None:
        self.seen.append(color.get())


@pytest.mark.parametrize("waits", [False, True], ids=["idle", "with a job waiting"])
async def test_what_a_job_set_is_not_seen_as_its_worker_stops(waits: bool) -> None:
    async def paint() -> str:
        before = color.get()
        color.set("jobs")
        return before

    hooks = Reader()
    color.set("openers")
    async with open_pool(0 if waits else 1, obey, hooks=(hooks,)) as pool:
        # The caller's context is as the worker's own: none has to be changed for it.
        replies = [pool.submit_nowait(paint) for _ in range(2)]
        await pool.resize(1)
        assert [await reply.wait() for reply in replies] == ["openers"] * 2
        # It leaves right after this one.
        last = pool.submit_nowait(paint)
        await pool.resize(0)
        assert last.state is JobState.DONE
    assert hooks.seen == ["openers"] * 2


async def test_a_hook_that_hears_of_a_start_can_give_that_worker_its_first_job() -> (
    None
):
    async def paint() -> str:
        before = color.get()
        color.set("jobs")
        return before

    class Starter(Hooks):
        def on_worker_start(self, event: WorkerChanged) -> None:
            if opened:
                replies.extend(pool.submit_nowait(paint) for _ in range(2))

    replies: list[Any] = []
    opened = False
    color.set("openers")
    async with open_pool(0, obey, hooks=(Starter(),)) as pool:
        opened = True
        await pool.resize(1)
        assert [await reply.wait() for reply in replies] == ["openers"] * 2
        assert color.get() == "openers"


# Very many workers.


async def test_an_idle_worker_takes_no_more_than_four_kilobytes() -> None:
    number = 500
    tracemalloc.start()
    try:
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        async with open_pool(number, obey):
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / number < 4096


async def test_a_worker_that_has_gone_leaves_nothing_for_the_collector() -> None:
    gc.disable()
    try:
        async with open_pool(20, obey) as pool:
            await pool.process(1)
            gc.collect()
            await pool.resize(1)
            await wait_all_tasks_blocked()
            # Not even a reference to itself.
            assert gc.collect() < 19
    finally:
        gc.enable()


async def test_a_shutdown_refuses_all_callers_while_a_job_runs(
    autojump_clock: trio.testing.MockClock,
) -> None:
    refused: list[float] = []

    async def call(pool: Pool[Any, Any]) -> None:
        with pytest.raises(PoolClosed):
            await pool.process(1)
        refused.append(trio.current_time())

    async def rest() -> None:
        await trio.sleep(10)

    async with open_pool(1, obey, max_backlog=0) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.process, rest)
            await wait_all_tasks_blocked()
            for _ in range(2_500):
                nursery.start_soon(call, pool)
            await wait_all_tasks_blocked()
            closed_at = trio.current_time()
            await pool.shutdown()
        assert refused == [closed_at] * 2_500
        assert trio.current_time() == closed_at + 10


@pytest.mark.parametrize("chance", range(8))
async def test_a_block_cancelled_at_its_door_sets_up_all_workers_or_none(
    chance: int,
) -> None:
    """Whether the pool or the cancellation comes first is up to trio."""
    workers = Workers()
    with trio.CancelScope() as scope:
        scope.cancel()
        async with open_pool(3, worker=workers):
            pytest.fail("it was cancelled before")
    assert len(workers.setups) in {0, 3}


async def test_a_misnested_job_is_lost_before_its_worker_cleans_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    @asynccontextmanager
    async def slow() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        try:
            yield obey
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(5)

    async with open_pool(1, worker=slow) as pool:
        began = trio.current_time()
        with pytest.raises(WorkerCrashed):
            await pool.process(leave_a_scope_open)
        assert trio.current_time() == began


async def test_nothing_of_a_pool_is_kept_after_its_block() -> None:
    hooks = Hooks()
    kept = weakref.ref(hooks)
    async with open_pool(1, obey, hooks=[hooks]) as pool:
        await pool.process(1)
    del hooks, pool
    await trio.lowlevel.checkpoint()
    gc.collect()
    assert kept() is None


async def test_ctrl_c_in_a_worker_stops_the_pool_though_the_block_is_shielded(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ends: list[float] = []

    async def handler(number: int) -> None:
        if number:
            raise KeyboardInterrupt
        try:
            await trio.sleep_forever()
        finally:
            ends.append(trio.current_time())

    with pytest.raises(KeyboardInterrupt):
        async with open_pool(2, handler) as pool:
            pool.submit_nowait(0)
            await wait_all_tasks_blocked()
            pool.submit_nowait(1)
            with trio.CancelScope(shield=True):
                await trio.sleep(5)
    assert ends == [0]
