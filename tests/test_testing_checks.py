"""Checks of pools: books, rest, waiting for rest, and recorded hooks."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_pool import (
    Backoff,
    Hooks,
    JobChanged,
    JobState,
    PoolBroken,
    PoolStatistics,
    Restart,
    Retry,
    WorkerCrashed,
    WorkerSnapshot,
    WouldDeadlock,
    open_pool,
)
from trio_pool.testing import (
    RecordingHooks,
    assert_books_balance,
    assert_idle,
    settle,
)


class Crash(BaseException):
    pass


async def obey(job: Any) -> Any:
    """Sleep, raise, or call what it is given."""
    if isinstance(job, BaseException):
        raise job
    if callable(job):
        return await job()
    await trio.sleep(job)
    return job


@pytest.fixture(autouse=True)
def quiet():
    """Crashes on purpose need no log."""
    logger = logging.getLogger("trio_pool")
    logger.disabled = True
    yield
    logger.disabled = False


class Cooked:
    """A pool whose books somebody has cooked."""

    name = "cooked"

    def __init__(
        self,
        pool: Any,
        snapshots: tuple[WorkerSnapshot, ...] | None = None,
        closed: bool = False,
        **changes: Any,
    ) -> None:
        self._statistics = attrs.evolve(pool.statistics(), **changes)
        self._workers = pool.workers() if snapshots is None else snapshots
        self.closed = closed
        self.size = self._statistics.size

    def statistics(self) -> PoolStatistics:
        return self._statistics

    def workers(self) -> tuple[WorkerSnapshot, ...]:
        return self._workers

    async def join(self) -> None:
        raise NotImplementedError

    resize = events = join  # type: ignore[assignment]


# ----------------------------------------------------------------------
# The books.


async def test_the_books_of_every_moment_of_a_pool_balance(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(2, obey) as pool:
        assert_books_balance(pool)
        replies = [pool.submit_nowait(1.0) for _ in range(3)]
        assert_books_balance(pool)
        await wait_all_tasks_blocked()
        assert_books_balance(pool)
        replies[0].cancel()
        assert_books_balance(pool)
        await pool.join()
        assert_books_balance(pool)
    assert_books_balance(pool)


async def test_the_books_of_a_leased_worker_and_of_a_map_balance() -> None:
    async def look(_: int) -> None:
        assert_books_balance(pool)

    async with open_pool(2, look) as pool:
        async with pool.lease() as worker:
            assert_books_balance(pool)
            await worker.process(0)
            assert_books_balance(pool)
            # Items that one worker pulls, one after the other.
            await pool.map(range(50))
        async with pool.stream(range(50)) as stream:
            async for _ in stream:
                assert_books_balance(pool)
    assert pool.statistics().done == 101


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accepted": 2}, "accepted is 2, but the states sum up to 1"),
        ({"done": 2}, "accepted is 1, but the states sum up to 2"),
        ({"queued": -1, "failed": 1}, "queued is -1"),
        ({"busy": 1}, "busy is 1, but running is 0"),
        ({"running": 1, "busy": 1, "done": 0}, "busy is 1, but 0 workers have a job"),
        ({"running": 2, "busy": 2, "accepted": 3}, "running is 2, but workers is 1"),
        ({"workers": 2}, "workers is 2, but 1 workers are set up"),
        ({"restarts": -1}, "restarts is -1"),
    ],
)
async def test_books_that_were_cooked_are_found(
    changes: dict[str, int], said: str
) -> None:
    async with open_pool(1, obey) as pool:
        await pool.process(0)
        assert_books_balance(Cooked(pool))
        with pytest.raises(AssertionError) as caught:
            assert_books_balance(Cooked(pool, **changes))
    assert said in str(caught.value)
    assert "'cooked'" in str(caught.value)
    assert "worker 0 is idle" in str(caught.value)


async def test_more_restarts_of_workers_than_were_counted_are_found() -> None:
    async with open_pool(1, obey) as pool:
        workers = tuple(attrs.evolve(w, restarts=2) for w in pool.workers())
        with pytest.raises(AssertionError, match="the workers had 2"):
            assert_books_balance(Cooked(pool, workers))
        with pytest.raises(AssertionError, match="two workers have the same id"):
            assert_books_balance(Cooked(pool, pool.workers() * 2, workers=2, size=2))


class Auditor(Hooks):
    """Looks into the books whenever anything happens."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.looks = 0
        self.errors: list[BaseException] = []
        for name in dir(Hooks):
            if name.startswith("on_"):
                setattr(self, name, self.look)

    def look(self, _: object) -> None:
        if self.pool is not None:
            self.looks += 1
            try:
                assert_books_balance(self.pool)
            except AssertionError as error:
                self.errors.append(error)


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"),
            st.sampled_from([0.0, 0.5, 1.5, ValueError("no"), Crash()]),
            st.sampled_from([0.0, 0.0, 0.5]),
        ),
        st.tuples(
            st.just("map"),
            st.lists(st.sampled_from([0.0, 0.5, ValueError("no")]), max_size=4),
        ),
        st.tuples(
            st.just("lease"), st.lists(st.sampled_from([0.0, 1.0, Crash()]), max_size=2)
        ),
        st.tuples(st.just("resize"), st.integers(0, 3)),
        st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.5, 1.0])),
        st.tuples(st.just("cancel"), st.integers(0, 3)),
        st.tuples(st.just("settle")),
        st.tuples(st.just("pause")),
        st.tuples(st.just("resume")),
    ),
    max_size=10,
)


@given(
    program=steps,
    retry=st.sampled_from([None, Retry(2, Backoff(0.5, jitter=0))]),
    max_jobs=st.sampled_from([1, 2, 100]),
    size=st.integers(0, 3),
)
def test_the_books_balance_in_every_hook_of_any_program(
    program: list[tuple[Any, ...]], retry: Retry | None, max_jobs: int, size: int
) -> None:
    auditor = Auditor()

    async def lease(pool: Any, works: list[Any]) -> None:
        try:
            async with pool.lease() as worker:
                for work in works:
                    await worker.process(work)
        except Exception:
            return

    async def take(step: tuple[Any, ...], pool: Any, nursery: trio.Nursery) -> None:
        match step:
            case ("submit", work, delay):
                replies.append(await pool.submit(work, delay=delay))
            case ("map", items):
                nursery.start_soon(pool.settle, items)
            case ("lease", works):
                nursery.start_soon(lease, pool, works)
            case ("resize", number):
                with trio.move_on_after(5):
                    await pool.resize(number)
            case ("sleep", seconds):
                await trio.sleep(seconds)
            case ("cancel", number):
                for reply in replies[number : number + 1]:
                    reply.cancel()
            case ("settle",):
                with trio.move_on_after(20):
                    await settle(pool)
            case _:
                getattr(pool, step[0])()

    replies: list[Any] = []

    async def main() -> None:
        options: Any = {"retry": retry, "max_jobs": max_jobs, "unobserved": "ignore"}
        restart = Restart(limit=1000)
        async with open_pool(
            size, obey, hooks=[auditor], restart=restart, **options
        ) as pool:
            auditor.pool = pool
            async with trio.open_nursery() as nursery:
                for step in program:
                    await take(step, pool, nursery)
                    assert_books_balance(pool)
                pool.resume()
                with trio.move_on_after(5):
                    await pool.resize(2)
                await settle(pool)
            await settle(pool)
        assert_idle(pool)

    async def bounded() -> None:
        with trio.fail_after(1000):
            await main()

    trio.run(bounded, clock=MockClock(autojump_threshold=0))
    if auditor.errors:
        raise auditor.errors[0]


async def test_the_books_are_read_from_another_thread_while_jobs_run() -> None:
    errors: list[BaseException] = []
    looks = 0
    over = False

    def read() -> None:
        nonlocal looks
        while not over:
            try:
                assert_books_balance(pool)
            except AssertionError as error:
                errors.append(error)
                return
            looks += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        async with open_pool(3, obey) as pool:
            thread = threading.Thread(target=read)
            thread.start()
            try:
                while looks < 3 and not errors:
                    for _ in range(20):
                        pool.submit_nowait(0)
                    await pool.join()
            finally:
                over = True
                await trio.to_thread.run_sync(thread.join)
    finally:
        sys.setswitchinterval(interval)
    assert errors == []


# ----------------------------------------------------------------------
# At rest.


async def test_an_idle_pool_is_idle() -> None:
    async with open_pool(2, obey) as pool:
        assert_idle(pool)
        await pool.process(0)
        assert_idle(pool)
        pool.pause()
        assert_idle(pool)
    assert_idle(pool)
    async with open_pool(0) as empty:
        assert_idle(empty)


async def test_what_keeps_a_pool_busy_is_said(autojump_clock: MockClock) -> None:
    async with open_pool(1, obey, name="press") as pool:
        pool.submit_nowait(10)
        await trio.sleep(1)
        pool.submit_nowait(1)
        pool.submit_nowait(1, delay=5)
        await trio.sleep(0.5)
        with pytest.raises(AssertionError) as caught:
            assert_idle(pool)
        assert str(caught.value).splitlines() == [
            "pool 'press' is not idle:",
            "  worker 0 is busy with job 1, for 1.5 s",
            "  1 job is delayed",
            "  1 job is queued",
            "  the oldest has waited for 0.5 s",
        ]
        pool.cancel()


async def test_a_job_that_somebody_forgot_is_found(autojump_clock: MockClock) -> None:
    """The bug of the user: a job was submitted and not waited for."""

    async def refresh(pool: Any) -> None:
        for seconds in (1, 2):
            reply = await pool.submit(seconds)
        await reply.wait()
        await pool.submit(3)

    async with open_pool(2, obey) as pool:
        await refresh(pool)
        with pytest.raises(AssertionError, match=r"with job 3"):
            assert_idle(pool)


async def test_a_worker_that_is_not_there_is_found(autojump_clock: MockClock) -> None:
    async with open_pool(
        1, obey, restart=Restart(limit=9, backoff=Backoff(8, jitter=0))
    ) as pool:
        for _ in range(2):
            with pytest.raises(WorkerCrashed):
                await pool.process(Crash())
            await trio.sleep(1)
        with pytest.raises(AssertionError) as caught:
            assert_idle(pool)
        assert "worker 0 is restarting; it crashed by Crash()" in str(caught.value)
        assert "1 workers are wanted, 0 are there and 1 are on their way" in str(
            caught.value
        )


async def test_a_worker_too_many_is_found() -> None:
    async with open_pool(2, obey) as pool:
        with pytest.raises(AssertionError, match="1 workers are wanted, 2 are there"):
            assert_idle(Cooked(pool, size=1))


async def test_what_is_no_pool_is_refused() -> None:
    for check in (assert_books_balance, assert_idle):
        with pytest.raises(TypeError, match="pool must be a pool, got 3"):
            check(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pool must be a pool, got 3"):
        await settle(3)  # type: ignore[arg-type]


async def test_a_closed_pool_with_a_worker_left_is_not_idle() -> None:
    async with open_pool(1, obey) as pool:
        with pytest.raises(AssertionError, match="worker 0 is idle"):
            assert_idle(Cooked(pool, closed=True))


# ----------------------------------------------------------------------
# Waiting for rest.


async def test_settle_waits_for_jobs_and_those_that_they_submit(
    autojump_clock: MockClock,
) -> None:
    async def parent() -> None:
        await trio.sleep(1)
        await pool.submit(2, delay=4)

    async with open_pool(1, obey) as pool:
        pool.submit_nowait(parent)
        await settle(pool)
        assert trio.current_time() == 7.0
        assert pool.statistics().done == 2


async def test_settle_waits_for_a_crashed_worker(autojump_clock: MockClock) -> None:
    restart = Restart(limit=9, backoff=Backoff(8, jitter=0))
    async with open_pool(1, obey, restart=restart) as pool:
        for _ in range(2):
            with pytest.raises(WorkerCrashed):
                await pool.process(Crash())
            await trio.sleep(1)
        await settle(pool)
        assert trio.current_time() == 9.0
        assert pool.statistics().restarts == 2


def slow_worker(setup: float = 0, cleanup: float = 0) -> Callable[[], Any]:
    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        with trio.CancelScope(shield=True):
            await trio.sleep(setup)
        try:
            yield obey
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(cleanup)

    return worker


async def test_settle_waits_for_planned_recyclings(autojump_clock: MockClock) -> None:
    worker = slow_worker(setup=1, cleanup=2)
    async with open_pool(2, worker=worker, max_jobs=1) as pool:
        began = trio.current_time()
        await pool.process(0)
        await settle(pool)
        assert trio.current_time() - began == 3.0


async def test_settle_waits_for_a_worker_that_is_about_to_be_recycled(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, worker=slow_worker(cleanup=2), max_age=5) as pool:
        await trio.sleep(5)
        await settle(pool)
        assert trio.current_time() == 7.0


@pytest.mark.parametrize(("size", "seconds"), [(4, 1.0), (1, 2.0)])
async def test_settle_waits_for_a_new_size(
    size: int, seconds: float, autojump_clock: MockClock
) -> None:
    async with open_pool(2, worker=slow_worker(setup=1, cleanup=2)) as pool:
        began = trio.current_time()
        with trio.move_on_after(0):
            await pool.resize(size)
        await settle(pool)
        if size == 1:
            assert pool.size == 2, "a cancelled call does nothing"
        else:
            assert trio.current_time() == began
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.resize, size)
            await wait_all_tasks_blocked()
            await settle(pool)
            assert trio.current_time() - began == seconds
            assert len(pool.workers()) == size


async def test_settle_waits_for_a_setup_that_is_called_off(
    autojump_clock: MockClock,
) -> None:
    """Nothing is told of the end of a worker that has never been ready."""
    async with open_pool(0, worker=slow_worker(setup=4)) as pool:
        with trio.move_on_after(1):
            await pool.resize(1)
        with trio.move_on_after(1):
            await pool.resize(0)
        await settle(pool)
        assert trio.current_time() == 4.0
        assert pool.workers() == ()


async def test_settle_of_a_closing_pool_waits_until_its_workers_have_gone(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(2, worker=slow_worker(cleanup=2)) as pool:
        pool.submit_nowait(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.shutdown)
            await wait_all_tasks_blocked()
            assert pool.closed
            await settle(pool)
            assert trio.current_time() == 3.0
    await settle(pool)


async def test_settle_outlives_the_closing_of_its_pool(
    autojump_clock: MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        async with open_pool(1, worker=slow_worker(setup=0, cleanup=2)) as pool:
            with trio.move_on_after(0.5):
                await pool.process(obey_forever)
            nursery.start_soon(settle, pool)
            await wait_all_tasks_blocked()
        assert trio.current_time() == 2.5


async def obey_forever() -> None:
    await trio.sleep_forever()


async def test_settle_raises_that_the_pool_breaks_meanwhile(
    autojump_clock: MockClock,
) -> None:
    async def break_it() -> None:
        await trio.sleep(1)
        raise Crash

    with pytest.raises(PoolBroken):
        async with open_pool(1, obey, restart=Restart(limit=0)) as pool:
            pool.submit_nowait(break_it)
            with pytest.raises(PoolBroken):
                await settle(pool)
            await trio.sleep_forever()
    with pytest.raises(PoolBroken):
        await settle(pool)
    assert_idle(pool)


async def test_settle_inside_a_job_is_refused() -> None:
    async with open_pool(1, obey) as pool:
        with pytest.raises(WouldDeadlock):
            await pool.process(lambda: settle(pool))


async def test_settle_of_a_paused_pool_waits_only_if_a_job_does(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, obey) as pool:
        pool.pause()
        await settle(pool)
        pool.submit_nowait(1)
        with trio.move_on_after(5) as waited:
            await settle(pool)
        assert waited.cancelled_caught
        pool.resume()
        await settle(pool)
        assert trio.current_time() == 6.0


async def test_a_cancelled_settle_changes_nothing(autojump_clock: MockClock) -> None:
    worker = slow_worker(cleanup=2)
    for seconds in (0, 0.5, 1, 1.5, 2.5, 3):
        async with open_pool(2, worker=worker, max_jobs=1) as pool:
            reply = pool.submit_nowait(1)
            with trio.move_on_after(seconds):
                await settle(pool)
            assert pool.size == 2
            assert_books_balance(pool)
            assert await reply.wait() == 1
            await settle(pool)


async def test_settle_works_in_real_time_as_well() -> None:
    async with open_pool(2, obey, max_jobs=2) as pool:
        for _ in range(7):
            pool.submit_nowait(0)
        await settle(pool)
        assert_idle(pool)


async def test_settle_is_a_checkpoint() -> None:
    async with open_pool(2, obey) as pool:
        with trio.testing.assert_checkpoints():
            await settle(pool)


# ----------------------------------------------------------------------
# Recorded hooks.


async def test_everything_is_recorded_in_order() -> None:
    recorder = RecordingHooks()
    async with open_pool(1, obey, hooks=(recorder,)) as pool:
        assert recorder.kinds == ["worker_start", "pool_start"]
        recorder.clear()
        await pool.process(0)
        await pool.settle([ValueError("no")])
        assert recorder.kinds == [
            *("job_queue", "job_start", "job_complete"),
            *("job_queue", "job_start", "job_error"),
        ]
        failed, complete = recorder.of("job_error", "job_complete")[::-1]
        assert failed.state is JobState.FAILED
        assert complete.state is JobState.DONE
        await pool.resize(2)
    (resized,) = recorder.of("resize")
    assert (resized.old, resized.new) == (1, 2)
    assert recorder.kinds[-1] == "pool_stop"
    assert recorder.of("job_retry") == []


async def test_each_hook_is_recorded_once() -> None:
    recorder = RecordingHooks()
    for name in dir(Hooks):
        if name.startswith("on_"):
            kind: Any = name.removeprefix("on_")
            event = JobChanged(kind, "", 0.0, 1, JobState.DONE, None, 0, None)
            getattr(recorder, name)(event)
            assert recorder.of(kind) == [event]
    assert len(recorder.events) == 14


async def test_a_subclass_records_and_does_what_it_overrides() -> None:
    class Counting(RecordingHooks):
        def __init__(self, kind: str) -> None:
            self.kind = kind
            self.done = 0

        def on_job_complete(self, event: JobChanged) -> None:
            super().on_job_complete(event)
            assert event.kind == self.kind
            self.done += 1

    recorder = Counting("job_complete")
    async with open_pool(1, obey, hooks=[recorder]) as pool:
        await pool.process(0)
    assert recorder.done == 1
    assert len(recorder.of("job_complete")) == 1
    assert len(recorder.of("job_start")) == 1


async def test_two_recorders_have_records_of_their_own() -> None:
    one, other = RecordingHooks(), RecordingHooks()
    async with open_pool(1, obey, hooks=[one, other]):
        pass
    assert one.events == other.events
    one.clear()
    assert other.events


def test_a_kind_that_no_hook_has_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"kind must be one of 'pool_start'.*'job_end'"
    ):
        RecordingHooks().of("job_start", "job_end")


async def test_a_job_that_is_answered_twice_is_seen_in_the_record() -> None:
    """The bug of the user: a retry where none was meant."""
    recorder = RecordingHooks()
    retry = Retry(2, Backoff(0, jitter=0))
    async with open_pool(1, obey, hooks=[recorder], retry=retry) as pool:
        await pool.settle([ValueError("not idempotent")])
    assert [event.attempts for event in recorder.of("job_start")] == [1, 2]
    assert len(recorder.of("job_retry")) == 1
