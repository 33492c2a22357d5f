"""Inline pools: the face of the pools, the same ends, no workers."""

from __future__ import annotations

import inspect
import logging
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
    Drain,
    JobCancelled,
    JobError,
    JobExpired,
    JobState,
    JobTimeout,
    Pool,
    PoolClosed,
    Restart,
    Retry,
    Task,
    TaskPool,
    WorkerCrashed,
    WouldDeadlock,
    current_job,
    open_pool,
)
from trio_pool.testing import (
    Faults,
    InjectedFault,
    InlinePool,
    InlineTaskPool,
    RecordingHooks,
    ScriptedWorker,
    assert_books_balance,
    assert_idle,
    settle,
)


@pytest.fixture(autouse=True)
def quiet():
    """Crashes on purpose need no log."""
    logger = logging.getLogger("trio_pool")
    logger.disabled = True
    yield
    logger.disabled = False


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


def public(kind: type) -> dict[str, Any]:
    return {name: getattr(kind, name) for name in dir(kind) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("real", "inline"), [(Pool, InlinePool), (TaskPool, InlineTaskPool)]
)
def test_the_face_is_that_of_the_pool(real: type, inline: type) -> None:
    assert public(inline).keys() == public(real).keys()
    for name, value in public(real).items():
        other = public(inline)[name]
        if isinstance(value, property):
            value, other = value.fget, other.fget
        assert inspect.signature(other) == inspect.signature(value), name
        assert inspect.iscoroutinefunction(other) == inspect.iscoroutinefunction(value)
        assert inspect.getdoc(other)


# ----------------------------------------------------------------------
# One by one.


async def test_a_job_runs_at_once_in_the_task_of_the_caller() -> None:
    async def look(x: int) -> tuple[int, trio.lowlevel.Task]:
        return x, trio.lowlevel.current_task()

    pool = InlinePool(look)
    assert await pool.process(1) == (1, trio.lowlevel.current_task())
    reply = await pool.submit(2)
    assert reply.done
    assert (await reply.wait())[0] == 2
    assert reply.state is JobState.DONE
    assert_books_balance(pool)
    assert_idle(pool)


async def test_errors_come_with_a_short_traceback() -> None:
    async def fail(x: int) -> None:
        raise ValueError(x)

    pool = InlinePool(fail)
    with pytest.raises(ValueError, match="1") as caught:
        await pool.process(1)
    assert caught.traceback[-1].name == "fail"
    assert len(caught.traceback) <= 5
    reply = await pool.submit(2)
    for _ in range(2):
        with pytest.raises(ValueError, match="2"):
            await reply.wait()
    assert pool.statistics().failed == 2


async def test_timeouts_and_retries_are_honoured(autojump_clock: MockClock) -> None:
    tries: list[int] = []

    async def flaky(x: int) -> int:
        tries.append(current_job().attempt)
        if len(tries) < 3:
            raise OSError(x)
        return x

    recorder = RecordingHooks()
    pool = InlinePool(flaky, hooks=[recorder])
    assert await pool.process(5, retry=Retry(3, Backoff(2, jitter=0))) == 5
    assert tries == [1, 2, 3]
    assert trio.current_time() == 6.0
    assert [e.delay for e in recorder.of("job_retry")] == [2.0, 4.0]
    assert pool.statistics().retries == 2
    slow = InlinePool(obey, timeout=3)
    with pytest.raises(JobTimeout) as caught:
        await slow.process(9)
    assert (caught.value.timeout, caught.value.worker) == (3, 0)
    assert trio.current_time() == 9.0
    assert await slow.process(9, timeout=20) == 9


async def test_a_cancelled_caller_cancels_the_job(autojump_clock: MockClock) -> None:
    pool = InlinePool(obey)
    for call in (pool.process, pool.submit):
        with trio.move_on_after(1) as scope:
            await call(9)
        assert scope.cancelled_caught
    assert pool.statistics().cancelled == 2
    assert_idle(pool)


async def test_a_job_can_cancel_itself() -> None:
    faults = Faults()
    faults.cancel_next()
    pool = InlinePool(faults.handler(obey))
    with pytest.raises(JobCancelled):
        await pool.process(0)
    assert await pool.process(0) == 0


async def test_submit_nowait_only_notes_the_job(autojump_clock: MockClock) -> None:
    pool = InlinePool(obey)
    first, second = pool.submit_nowait(1), pool.submit_nowait(2)
    assert first.state is JobState.QUEUED
    assert pool.statistics().queued == 2
    assert_books_balance(pool)
    assert await second.wait() == 2
    assert trio.current_time() == 3.0
    assert first.done
    third = pool.submit_nowait(4)
    assert third.cancel()
    assert third.state is JobState.CANCELLED
    late = pool.submit_nowait(1, ttl=0.5)
    await pool.process(1)
    assert late.done
    pool.submit_nowait(9, delay=5, ttl=2)
    await pool.join()
    assert pool.statistics().expired == 1
    with pytest.raises(JobExpired):
        await (await pool.submit(1, delay=3, ttl=1)).wait()
    await settle(pool)


async def test_a_reply_of_a_job_that_another_task_runs_waits_for_it(
    autojump_clock: MockClock,
) -> None:
    pool = InlinePool(obey)
    reply = pool.submit_nowait(3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pool.join)
        await wait_all_tasks_blocked()
        assert await reply.wait() == 3
        assert trio.current_time() == 3.0


async def test_tasks_take_turns(autojump_clock: MockClock) -> None:
    pool = InlinePool(obey, size=4)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(pool.process, 1)
        await trio.sleep(0.5)
        assert pool.statistics().running == 1
        assert pool.statistics().queued == 2
        assert_books_balance(pool)
    assert trio.current_time() == 3.0


async def test_a_job_may_use_its_own_pool_as_deep_as_it_is_large() -> None:
    async def dig(depth: int) -> int:
        assert_books_balance(pool)
        return await pool.process(depth - 1) + 1 if depth else 0

    pool = InlinePool(dig, size=3)
    assert await pool.process(2) == 2
    with pytest.raises(WouldDeadlock):
        await pool.process(3)
    await pool.resize(4)
    assert await pool.process(3) == 3
    assert_idle(pool)


async def test_a_paused_pool_waits_until_it_is_resumed(
    autojump_clock: MockClock,
) -> None:
    async def resume() -> None:
        await trio.sleep(2)
        pool.resume()

    pool = InlinePool(obey)
    pool.pause()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(resume)
        assert await pool.process(1) == 1
    assert trio.current_time() == 3.0


async def test_the_block_runs_what_is_left_and_raises_what_nobody_read() -> None:
    with pytest.raises(
        ExceptionGroup, match=r"1 jobs of pool .* nobody read"
    ) as caught:
        async with InlinePool(obey) as pool:
            reply = pool.submit_nowait(0)
            await pool.submit(ValueError("unread"))
            read = await pool.submit(ValueError("read"))
            assert "read" in str(read.outcome)
    assert [str(error) for error in caught.value.exceptions] == ["unread"]
    assert "whose reply nobody read" in caught.value.exceptions[0].__notes__[0]
    assert reply.done
    assert pool.closed
    assert_idle(pool)
    with pytest.raises(PoolClosed):
        await pool.process(1)
    async with InlinePool(obey, unobserved="ignore") as pool:
        await pool.submit(ValueError("unread"))


async def test_a_worker_is_set_up_by_the_block_and_again_after_a_crash() -> None:
    log: list[str] = []

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        log.append("open")
        try:
            yield obey
        finally:
            log.append("close")

    async with InlinePool(worker=worker) as pool:
        assert await pool.process(0) == 0
        assert log == ["open"]
        with pytest.raises(WorkerCrashed) as caught:
            await pool.process(Crash())
        assert isinstance(caught.value.__cause__, Crash)
        assert log == ["open", "close", "open"]
        assert await pool.process(0) == 0
        async with pool.lease() as leased:
            assert await leased.process(0) == 0
            assert leased.id == 0
            with pytest.raises(WorkerCrashed):
                await leased.process(Crash())
            with pytest.raises(WorkerCrashed) as caught:
                await leased.process(0)
            assert not caught.value.started
        with pytest.raises(trio.ClosedResourceError):
            await leased.process(0)
        assert pool.statistics().restarts == 2
        assert_idle(pool)
    assert log == ["open", "close"] * 3
    with pytest.raises(RuntimeError, match="async with"):
        await InlinePool(worker=worker).process(1)


async def test_the_books_balance_as_a_broken_worker_is_replaced(
    autojump_clock: MockClock,
) -> None:
    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        yield obey
        raise AssertionError  # It is left by the crash, before this.

    recorder = RecordingHooks()
    faults = Faults()
    faults.slow_stop(3)
    async with trio.open_nursery() as nursery:
        pool = InlinePool(
            worker=faults.worker(worker), hooks=[recorder], crash_on=OSError
        )
        with pytest.raises(AssertionError):
            async with pool:
                nursery.start_soon(pool.settle, [OSError("broken")])
                await trio.sleep(1)
                assert_books_balance(pool)
                assert pool.statistics().failed == 1
                with pytest.raises(AssertionError, match="restarts=1"):
                    assert_books_balance(Cooked(pool))
                await trio.sleep(5)
                assert_idle(pool)
    assert len(recorder.of("job_error")) == 1


class Cooked:
    """A pool whose books somebody has cooked."""

    def __init__(self, pool: Any) -> None:
        self.name, self.workers = pool.name, pool.workers
        self.statistics = lambda: attrs.evolve(pool.statistics(), accepted=9)


async def test_a_retry_of_the_pool_sees_the_seconds_since_the_first_start(
    autojump_clock: MockClock,
) -> None:
    waits: list[int] = []

    def backoff(number: int) -> float:
        waits.append(number)
        return 2.0

    pool = InlinePool(obey, retry=Retry(3, backoff))
    with pytest.raises(ValueError, match="no") as caught:
        await pool.process(ValueError("no"))
    assert waits == [0, 1]
    assert trio.current_time() == 4.0
    assert caught.value.__notes__ == ["trio_pool: given up after 3 attempts"]


async def test_a_crash_is_tried_again_only_where_the_policy_names_it() -> None:
    pool = InlinePool(obey)
    named = Retry(2, Backoff(0), on=WorkerCrashed)
    for retry, attempts in ((Retry(2, Backoff(0)), 1), (named, 2)):
        with pytest.raises(WorkerCrashed) as caught:
            await pool.process(Crash(), retry=retry)
        assert caught.value.attempts == attempts


async def test_many_at_once() -> None:
    async def items() -> AsyncGenerator[int, None]:
        yield 0
        yield 0

    pool = InlinePool(obey)
    assert await pool.map([0, 0.0]) == [0, 0.0]
    assert await pool.map(items()) == [0, 0]
    with pytest.raises(ExceptionGroup) as caught:
        await pool.map([0, ValueError("no"), 0])
    (error,) = caught.value.exceptions
    assert "item 1" in error.__notes__[0]
    settled = await pool.settle([0, ValueError("no"), 0])
    assert [type(s.outcome).__name__ for s in settled] == ["Value", "Error", "Value"]
    async with pool.stream([0, KeyError("no"), 0]) as stream:
        assert await anext(stream) == 0
        with pytest.raises(KeyError):
            await anext(stream)
        assert [x async for x in stream] == [0]
    replies = await pool.submit_batch([0, 0])
    assert [await reply.wait() for reply in replies] == [0, 0]


async def test_a_task_pool_makes_calls(autojump_clock: MockClock) -> None:
    async def add(a: int, b: int = 10) -> int:
        return a + b

    drain = Drain[int]()
    async with InlineTaskPool() as pool:
        assert await pool.process(add, 1, 2) == 3
        assert await (await pool.submit(add, 1, id="mine")).wait() == 11
        assert await pool.submit_nowait(add, 2).wait() == 12
        assert await pool.map(add, [1, 2]) == [11, 12]
        assert len(await pool.settle(add, [1])) == 1
        one, _ = await pool.go(Task(add, 1), Task(add, 2).drain_to(drain).with_key("k"))
        assert await one.wait() == 11
        assert drain.collect() == [12]
        async with pool.stream(add, [5]) as stream:
            assert [x async for x in stream] == [15]
        async with pool.lease() as worker:
            assert await worker.process(add, 1, 1) == 2
        assert len(await pool.submit_batch(add, [1])) == 1
        with pytest.raises(InjectedFault):
            faults = Faults()
            faults.fail_next()
            await pool.process(faults.handler(add), 1)


async def test_plugins_hooks_middleware_and_events_are_heeded() -> None:
    @asynccontextmanager
    async def database() -> AsyncGenerator[str, None]:
        yield "connection"

    async def double(_: Any, call_next: Any) -> Any:
        return 2 * await call_next()

    async def one(_: Any) -> int:
        assert current_job().key == "k"
        return 1

    recorder = RecordingHooks()
    options: Any = {"plugins": [database()], "middleware": [double]}
    async with InlinePool(one, hooks=[recorder], **options) as pool:
        assert pool.plugin("database") == "connection"
        async with pool.events() as events:
            assert await pool.process(1, key="k") == 2
            assert (await anext(events)).kind == "job_queue"
    assert recorder.kinds == [
        *("pool_start", "job_queue", "job_start", "job_complete", "pool_stop"),
    ]
    with pytest.raises(KeyError, match="no plugin is called 'x'"):
        InlinePool(one).plugin("x")


async def test_shutdown_and_cancel(autojump_clock: MockClock) -> None:
    pool = InlinePool(obey)
    for seconds in (1, 1, 9):
        pool.submit_nowait(seconds)
    report = await pool.shutdown(grace=5)
    assert (report.done, report.cancelled, report.unfinished) == (2, 1, 0)
    assert trio.current_time() == 5.0
    pool = InlinePool(obey)
    reply = pool.submit_nowait(1)
    pool.cancel()
    with pytest.raises(JobCancelled):
        await reply.wait()
    pool = InlinePool(obey)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.testing.wait_all_tasks_blocked)

        async def cancel() -> None:
            await trio.sleep(1)
            pool.cancel()

        nursery.start_soon(cancel)
        with pytest.raises(JobCancelled):
            await pool.process(5)
    assert_books_balance(pool)


@pytest.mark.parametrize(
    "call",
    [
        lambda pool: pool.process(0, timeout=0),
        lambda pool: pool.process(0, priority=1.5),
        lambda pool: pool.process(0, key=[]),
        lambda pool: pool.process(0, retry=3),
        lambda pool: pool.submit(0, delay=-1),
        lambda pool: pool.submit(0, ttl=0),
        lambda pool: pool.submit(0, drain=1),
        lambda pool: pool.submit(0, id=""),
        lambda pool: pool.submit_batch(1),
        lambda pool: pool.map(1),
        lambda pool: pool.map([], timeout=-1),
        lambda pool: pool.settle([], priority="high"),
        lambda pool: pool.resize(-1),
        lambda pool: pool.shutdown(grace=-1),
        lambda pool: enter(pool.stream(1)),
        lambda pool: enter(pool.stream([], ahead=0)),
        lambda pool: enter(pool.lease(priority="high")),
        lambda pool: enter(pool.events(buffer=0)),
    ],
)
async def test_what_a_pool_refuses_an_inline_one_refuses_by_the_same_words(
    call: Callable[[Any], Awaitable[Any]],
) -> None:
    async with open_pool(1, obey) as pool:
        with pytest.raises((TypeError, ValueError)) as real:
            await call(pool)
    inline = InlinePool(obey)
    with pytest.raises((TypeError, ValueError)) as caught:
        await call(inline)
    assert type(caught.value) is type(real.value)
    assert str(caught.value) == str(real.value)
    assert inline.statistics().accepted == 0


async def enter(manager: Any) -> None:
    async with manager:
        pass


def test_what_cannot_be_a_pool_is_refused() -> None:
    for make in (
        lambda: InlinePool(),  # type: ignore[call-overload]
        lambda: InlinePool(obey, worker=obey),  # type: ignore[call-overload]
        lambda: InlinePool(len),  # type: ignore[call-overload]
        lambda: InlinePool(worker=obey),  # type: ignore[arg-type]
        lambda: InlinePool(obey, timeot=1),  # type: ignore[call-overload]
    ):
        with pytest.raises(TypeError):
            make()


# ----------------------------------------------------------------------
# The same as a pool of one worker.


works = st.sampled_from(
    ["value", "value", "slow", "fail", "flaky", "crash", "hang", "cancel"]
)
calls = st.tuples(
    st.sampled_from(["process", "submit", "map", "settle", "stream", "lease"]),
    st.lists(works, min_size=1, max_size=3),
    st.sampled_from([None, 1.0, 4.0]),
    st.sampled_from([None, 2, 3]),
)


class Player:
    """Plays a program on a pool, and notes all that can be seen."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        # Apart, as a stream runs ahead of its reader, and an inline one does not.
        self.runs: list[tuple[int, int]] = []
        self.tries: dict[int, int] = {}
        self.numbers = iter(range(10_000))

    async def handler(self, job: tuple[int, str]) -> Any:
        number, work = job
        self.tries[number] = self.tries.get(number, 0) + 1
        self.runs.append((number, current_job().attempt))
        match work:
            case "slow":
                await trio.sleep(2)
            case "fail":
                raise ValueError(number)
            case "flaky" if self.tries[number] < 2:
                raise KeyError(number)
            case "crash":
                raise Crash(number)
            case "hang":
                with trio.fail_after(50):
                    await trio.sleep_forever()
            case "cancel":
                current_job().cancel()
                await trio.sleep_forever()
            case _:
                await trio.lowlevel.checkpoint()
        return number

    def note(self, outcome: Any) -> None:
        if isinstance(outcome, BaseExceptionGroup):
            for error in outcome.exceptions:
                self.note(error)
        elif isinstance(outcome, BaseException):
            facts = outcome.args if isinstance(outcome, JobError) else str(outcome)
            notes = [n for n in getattr(outcome, "__notes__", ()) if "pool-" not in n]
            cause = repr(outcome.__cause__)
            self.seen.append((type(outcome), facts, notes, cause))
        else:
            self.seen.append(outcome)

    async def play(self, pool: Any, program: list[Any]) -> None:
        for name, kinds, timeout, attempts in program:
            jobs = [(next(self.numbers), kind) for kind in kinds]
            retry = None
            # In a pool, others run while an item waits to be tried again.
            if attempts is not None and name in {"process", "submit"}:
                on: Any = (Exception, WorkerCrashed)
                retry = Retry(attempts, Backoff(0.5, jitter=0), on=on)
            options: dict[str, Any] = {"timeout": timeout, "retry": retry}
            try:
                match name:
                    case "process":
                        self.note(await pool.process(jobs[0], **options))
                    case "submit":
                        for job in jobs:
                            reply = await pool.submit(job, **options)
                            self.note((reply.id, await reply.wait(), reply.attempts))
                    case "lease":
                        async with pool.lease() as worker:
                            for job in jobs:
                                self.note(await worker.process(job, timeout=timeout))
                    case "map":
                        self.note(await pool.map(jobs, **options))
                    case "settle":
                        for settled in await pool.settle(jobs, **options):
                            outcome = settled.outcome
                            self.note(getattr(outcome, "error", None) or outcome)
                    case _:
                        async with pool.stream(jobs, outcomes=True, **options) as read:
                            async for settled in read:
                                outcome = settled.outcome
                                self.note(getattr(outcome, "error", None) or outcome)
            except Exception as error:
                self.note(error)
            await pool.join()
            assert_books_balance(pool)
            await settle(pool)
        count = pool.statistics()
        for state in JobState:
            self.seen.append((state, getattr(count, state.value)))
        self.seen.append((count.accepted, count.retries, count.restarts))
        self.seen.append((count.size, count.workers, count.run.count))


@given(program=st.lists(calls, max_size=6))
def test_programs_end_as_on_a_pool_of_one_worker(program: list[Any]) -> None:
    real, inline = Player(), Player()

    async def on_pool() -> None:
        restart = Restart(limit=1000, backoff=lambda _: 0)
        async with open_pool(1, real.handler, restart=restart) as pool:
            await real.play(pool, program)

    async def on_inline() -> None:
        async with InlinePool(inline.handler) as pool:
            await inline.play(pool, program)

    for main in (on_pool, on_inline):
        trio.run(main, clock=MockClock(autojump_threshold=0))
    assert inline.seen == real.seen
    assert inline.runs == real.runs


async def test_code_that_leaves_a_job_behind_is_found() -> None:
    """The bug of the user: a batch is submitted, and only half of it is read."""

    async def refresh(pool: Any, urls: list[str]) -> list[Any]:
        replies = await pool.submit_batch(urls)
        return [await reply.wait() for reply in replies[:-1]]

    with pytest.raises(ExceptionGroup, match="nobody read it"):
        with ScriptedWorker([1, 2, OSError("gone")]) as script:
            async with InlinePool(script) as pool:
                assert await refresh(pool, ["a", "b", "c"]) == [1, 2]
