"""Answers that come as their worker is woken, a step before that is up itself."""

from __future__ import annotations

import gc
import math
import pickle
import sys
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import outcome
import pytest
import trio
from offloaded import Distant, until

from trio_pool import (
    BacklogFull,
    Hooks,
    JobCancelled,
    Pool,
    PoolClosed,
    Rate,
    Reply,
    Restart,
    Retry,
    WorkerCrashed,
    WorkerState,
    open_pool,
)
from trio_pool._dispatch import Dispatch
from trio_pool._latency import FLUSH
from trio_pool.offload import _shim, in_thread, on_executor
from trio_pool.offload._remote import Handler
from trio_pool.testing import (
    assert_books_balance,
    cancel_everywhere,
    explore_orders,
    settle,
)

variable: ContextVar[str] = ContextVar("variable", default="nobody's")


async def pass_on(job: object, call_next: Callable[[object], Any]) -> Any:
    """Be a middleware without any use."""
    return await call_next(job)


class HearsEnds(Hooks):
    """Wants to hear of every job."""

    def on_job_complete(self, event: object) -> None:
        """Have no further use for it."""


async def echo(job: Any) -> Any:
    """Do as much as a handler has to."""
    await trio.lowlevel.checkpoint()
    return job


async def ask(pool: Any, job: Any, heard: list[Any]) -> None:
    """Note what becomes of a job."""
    try:
        heard.append(await pool.process(job))
    except (BacklogFull, JobCancelled, PoolClosed, WorkerCrashed) as error:
        heard.append(error)


async def test_the_worker_is_idle_as_its_job_is_answered() -> None:
    seen: list[Any] = []

    def look(_: object) -> None:
        count = pool.statistics()
        states = {worker.state for worker in pool.workers()}
        seen.append((reply.done, count.busy, count.done, states))

    async with open_pool(2, worker=Distant(echo, look).worker) as pool:
        reply = pool.submit_nowait(5)
        assert await reply.wait() == 5
        await settle(pool)
        assert seen == [(True, 0, 1, {WorkerState.IDLE})]
        assert pool.statistics().run.count == 1
        assert [worker.jobs for worker in pool.workers()] in ([1, 0], [0, 1])


@pytest.mark.parametrize(
    "options",
    [
        {"hooks": [HearsEnds()]},
        {"middleware": [pass_on]},
        {"max_jobs": 2},
        {"rate": Rate(1000.0)},
        {"retry": Retry(attempts=3)},
    ],
    ids=lambda options: next(iter(options)),
)
async def test_what_else_a_pool_has_to_do_with_an_end_is_done(options: Any) -> None:
    """A policy of retries has nothing to do with one that is good."""
    seen: list[bool] = []
    worker = Distant(echo, lambda _: seen.append(reply.done)).worker
    async with open_pool(1, worker=worker, **options) as pool:
        for number in range(3):
            reply = pool.submit_nowait(number)
            assert await reply.wait() == number
        await settle(pool)
    assert seen == ["retry" in options] * 3
    assert_books_balance(pool)


@pytest.mark.parametrize(
    "why", ["key", "priority", "waiting", "paused", "joined", "leased", "cancelled"]
)
async def test_who_could_be_next_but_the_caller_keeps_the_worker_up(why: str) -> None:
    seen: list[bool] = []
    gate = trio.Event()

    async def wait(job: Any) -> Any:
        if job == "first":
            with trio.CancelScope(shield=True):
                await gate.wait()
        return job

    def look(job: Any) -> None:
        if job == "first":
            seen.append(reply.done)

    async with open_pool(1, worker=Distant(wait, look).worker) as pool:
        async with trio.open_nursery() as nursery:
            keyed: Any = {"key": "a"} if why == "key" else {}
            reply = await pool.submit("first", **keyed)
            await trio.testing.wait_all_tasks_blocked()
            match why:
                case "waiting" | "priority":
                    others = {"priority": 1} if why == "priority" else {}
                    second = pool.submit_nowait("second", **others)
                case "paused":
                    pool.pause()
                case "joined":
                    nursery.start_soon(pool.join)
                case "leased":
                    nursery.start_soon(_lease_once, pool)
                case "cancelled":
                    reply.cancel()
                case _:
                    pass
            await trio.testing.wait_all_tasks_blocked()
            gate.set()
            assert await reply.wait() == "first"
            if why in ("waiting", "priority"):
                assert await second.wait() == "second"
            pool.resume()
        assert seen == [False]
        assert await pool.process("third") == "third"
    assert_books_balance(pool)


async def test_who_waits_for_room_keeps_the_worker_up() -> None:
    gate = trio.Event()
    seen: list[bool] = []

    async def wait(job: str) -> str:
        await gate.wait()
        return job

    worker = Distant(wait, lambda _: seen.append(first.done)).worker
    async with open_pool(1, worker=worker, max_backlog=0) as pool:
        first = pool.submit_nowait("first")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.process, "second")
            await trio.testing.wait_all_tasks_blocked()
            gate.set()
        assert seen == [False, True]


async def test_a_worker_that_is_to_be_cancelled_is_not_free_for_anybody() -> None:
    scopes: list[trio.CancelScope] = []
    seen: list[bool] = []
    gate = trio.Event()

    async def wait(job: str) -> str:
        with trio.CancelScope(shield=True):
            await gate.wait()
        return job

    @asynccontextmanager
    async def worker() -> AsyncIterator[Handler]:
        with trio.CancelScope() as scope:
            scopes.append(scope)
            yield Handler(Distant(wait, lambda _: seen.append(reply.done)))

    async with open_pool(1, worker=worker, restart=Restart(limit=9)) as pool:
        reply = pool.submit_nowait("first")
        await trio.testing.wait_all_tasks_blocked()
        scopes[0].cancel()
        gate.set()
        assert await reply.wait() == "first"
        assert seen == [False]
        assert await pool.process("second") == "second"
    assert_books_balance(pool)


async def test_a_scope_that_a_call_from_a_thread_leaves_open_is_its_own_jobs() -> None:
    async def leave_open() -> None:
        trio.CancelScope().__enter__()

    def work(job: str) -> str:
        if job == "bad":
            trio.from_thread.run(leave_open)
        return job

    async with open_pool(1, worker=in_thread(work)) as pool:
        with pytest.raises(WorkerCrashed):
            await pool.process("bad")
        assert await pool.process("good") == "good"
    assert_books_balance(pool)


async def test_an_answer_counts_once_and_for_its_own_job() -> None:
    late: list[Callable[[Any], object]] = []

    class Repeats(Distant):
        async def one(self, job: Any, answer: Any) -> Any:
            def twice(value: Any) -> None:
                for tell in (answer, answer, *late):
                    tell(value)
                late.append(answer)

            return await super().one(job, twice)

    @asynccontextmanager
    async def worker() -> AsyncIterator[Handler]:
        yield Handler(Repeats(echo))

    async with open_pool(1, worker=worker) as pool:
        for number in range(5):
            assert await pool.process(number) == number
    assert pool.statistics().done == 5
    assert_books_balance(pool)


async def test_ctrl_c_after_an_answer_costs_nobody_a_result() -> None:
    class Interrupted(Distant):
        async def one(self, job: Any, answer: Any) -> Any:
            await super().one(job, answer)
            raise KeyboardInterrupt

    @asynccontextmanager
    async def worker() -> AsyncIterator[Handler]:
        yield Handler(Interrupted(echo))

    with pytest.raises(KeyboardInterrupt):
        async with open_pool(1, worker=worker) as pool:
            reply = pool.submit_nowait("first")
            await trio.sleep_forever()
    assert await reply.wait() == "first"
    count = pool.statistics()
    assert (count.done, count.lost) == (1, 0)
    assert_books_balance(pool)


async def test_times_are_counted_where_a_worker_never_gets_any_sleep() -> None:
    async with open_pool(1, worker=Distant(echo, is_last=True).worker) as pool:
        for number in range(2 * FLUSH):
            assert await pool.process(number) == number
        assert len(pool._dispatch.runs.pending) <= FLUSH  # noqa: SLF001
        assert pool.statistics().run.count == 2 * FLUSH


async def test_a_worker_that_others_call_too_mixes_nothing_up() -> None:
    def work(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    results: dict[str, float] = {}

    async def note(name: str, call: Callable[[float], Any], seconds: float) -> None:
        results[name] = await call(seconds)

    for shared in (in_thread(work), on_executor(lambda: ThreadPoolExecutor(2), work)):
        async with shared() as handler, open_pool(2, handler) as pool:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(note, "long", pool.process, 0.03)
                nursery.start_soon(note, "longer", pool.process, 0.04)
                nursery.start_soon(note, "short", handler, 0.01)
        assert results == {"long": 0.03, "longer": 0.04, "short": 0.01}


async def _lease_once(pool: Pool[Any, Any]) -> None:
    async with pool.lease() as worker:
        assert await worker.process("leased") == "leased"


async def _call_in_a_row(workers: int, callers: int) -> None:
    async def call(name: int) -> None:
        for number in range(4):
            assert await pool.process((name, number)) == (name, number)

    options: Any = {"max_backlog": 0, "overflow": "reject"}
    worker = Distant(echo).worker
    async with open_pool(workers, worker=worker, **options) as pool:
        async with trio.open_nursery() as nursery:
            for name in range(callers):
                nursery.start_soon(call, name)
        await settle(pool)
        assert pool.statistics().done == 4 * callers


@pytest.mark.parametrize(("workers", "callers"), [(1, 1), (2, 2), (3, 2)])
def test_a_pool_without_backlog_has_a_worker_for_who_was_just_answered(
    workers: int, callers: int
) -> None:
    """Whichever is first: the worker's step, or the caller's."""
    explore_orders(_call_in_a_row, workers, callers, orders=60)


async def test_whichever_is_first_a_turn_or_more_is_saved() -> None:
    turns = 0

    class Count(trio.abc.Instrument):
        def before_io_wait(self, timeout: float) -> None:
            nonlocal turns
            turns += 1

    async def work(job: Any) -> Any:
        return job

    spent: list[float] = []
    for hooks in ([HearsEnds()], []):
        async with open_pool(1, worker=Distant(work).worker, hooks=hooks) as pool:
            await pool.process(0)
            instrument = Count()
            trio.lowlevel.add_instrument(instrument)
            turns = 0
            for number in range(100):
                await pool.process(number)
            trio.lowlevel.remove_instrument(instrument)
            spent.append(turns / 100)
    usual, ahead = spent
    assert ahead <= usual - 1


Between = Callable[[Any, trio.Nursery, list[Any]], object]


def _submit_and_cancel(pool: Any, _: trio.Nursery, heard: list[Any]) -> None:
    assert pool.submit_nowait("gone").cancel()


def _submit_three(pool: Any, nursery: trio.Nursery, heard: list[Any]) -> None:
    for number in range(3):
        nursery.start_soon(pool.submit_nowait(number).wait)


def _submit_cancel_submit(pool: Any, nursery: trio.Nursery, heard: list[Any]) -> None:
    pool.submit_nowait("gone").cancel()
    nursery.start_soon(pool.submit_nowait("back").wait)


def _pause_for_a_turn(pool: Any, nursery: trio.Nursery, heard: list[Any]) -> None:
    async def resume() -> None:
        await trio.lowlevel.checkpoint()
        pool.resume()

    pool.pause()
    nursery.start_soon(resume)


def _pause_and_resume(pool: Any, _: trio.Nursery, heard: list[Any]) -> None:
    reply = pool.submit_nowait("held")
    pool.pause()
    pool.resume()
    reply.cancel()


def _map(pool: Any, nursery: trio.Nursery, heard: list[Any]) -> None:
    nursery.start_soon(pool.map, range(3))


def _lease(pool: Any, nursery: trio.Nursery, heard: list[Any]) -> None:
    nursery.start_soon(_lease_once, pool)


def _resize(pool: Any, nursery: trio.Nursery, heard: list[Any]) -> None:
    async def resize() -> None:
        await pool.resize(0)
        await pool.resize(1)

    pool.submit_nowait("before")
    nursery.start_soon(resize)


def _cancel(pool: Any, _: trio.Nursery, heard: list[Any]) -> None:
    pool.submit_nowait("lost")
    pool.cancel()


def _shut_down(pool: Any, nursery: trio.Nursery, heard: list[Any]) -> None:
    pool.submit_nowait("accepted")
    nursery.start_soon(pool.shutdown, 1.0)


async def _meddle(between: Between) -> None:
    heard: list[Any] = []
    ran: list[Any] = []
    meddled = False

    def meddle(_: object) -> None:
        nonlocal meddled
        if not meddled:
            meddled = True
            between(pool, nursery, heard)

    async def work(job: Any) -> Any:
        ran.append(job)
        await trio.lowlevel.checkpoint()
        return job

    worker = Distant(work, meddle).worker
    async with trio.open_nursery() as nursery:
        async with open_pool(1, worker=worker, unobserved="ignore") as pool:
            for name in ("a", "b"):
                await ask(pool, name, heard)
            await settle(pool)
            assert_books_balance(pool)
    assert meddled
    assert heard[0] == "a"
    if between is _cancel or (between is _shut_down and heard[1] != "b"):
        assert isinstance(heard[1], PoolClosed)
    else:
        assert heard[1] == "b"
    assert set(Counter(ran).values()) == {1}
    assert "gone" not in ran
    assert_books_balance(pool)


@pytest.mark.parametrize(
    "between",
    [
        _submit_and_cancel,
        _submit_three,
        _submit_cancel_submit,
        _pause_for_a_turn,
        _pause_and_resume,
        _map,
        _lease,
        _resize,
        _cancel,
        _shut_down,
    ],
)
def test_anything_may_happen_between_the_answer_and_the_workers_step(
    between: Between,
) -> None:
    explore_orders(_meddle, between, orders=30)


@pytest.mark.parametrize("size", [1, 2])
def test_a_caller_of_a_distant_job_is_cancelled_at_each_of_its_waits(size: int) -> None:
    async def body(scope: trio.CancelScope) -> None:
        ran: list[int] = []

        async def work(job: int) -> int:
            ran.append(job)
            await trio.lowlevel.checkpoint()
            return job

        options: Any = {"max_backlog": 0, "overflow": "reject"}
        async with open_pool(size, worker=Distant(work).worker, **options) as pool:
            with scope:
                for number in range(3):
                    assert await pool.process(number) == number
            await settle(pool)
            assert_books_balance(pool)
            assert pool.statistics().restarts == 0
            assert await pool.process(9) == 9
        assert set(Counter(ran).values()) == {1}

    assert cancel_everywhere(body) > 5


async def _see_contexts() -> None:
    seen: list[tuple[str, str]] = []

    async def work(job: str) -> str:
        seen.append((job, variable.get()))
        variable.set(f"{job}'s job's")
        await trio.lowlevel.checkpoint()
        return job

    async def call(name: str) -> None:
        variable.set(name)
        for _ in range(4):
            await pool.process(name)
            assert variable.get() == name

    async with open_pool(2, worker=Distant(work).worker) as pool:
        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(call, name)
        await pool.process("nobody's")
    assert len(seen) == 13
    assert all(job == value for job, value in seen)


def test_a_job_sees_its_callers_variables_and_nobody_elses() -> None:
    explore_orders(_see_contexts, orders=40)


async def _see_deadlines() -> None:
    async def work(_: object) -> float:
        await trio.lowlevel.checkpoint()
        return trio.current_effective_deadline()

    async with open_pool(1, worker=Distant(work).worker) as pool:
        for seconds in (math.inf, 10.0, math.inf, 7.0):
            with trio.CancelScope(deadline=seconds):
                assert await pool.process(None) == seconds
        assert await pool.process(None, timeout=5.0) == trio.current_time() + 5.0
        assert await pool.process(None) == math.inf


def test_a_job_sees_its_callers_deadline_and_not_the_one_before() -> None:
    explore_orders(_see_deadlines, orders=10)


class Large:
    """A result that can be referred to weakly."""


@pytest.mark.parametrize("engine", ["thread", "executor"])
async def test_a_result_lives_no_longer_than_its_reader_wants(engine: str) -> None:
    def make(_: object) -> Large:
        return Large()

    worker: Any = in_thread(make)
    if engine == "executor":
        worker = on_executor(lambda: ThreadPoolExecutor(1), make)
    async with open_pool(1, worker=worker) as pool:
        result = weakref.ref(await pool.process(1))
        # Without help; the thread that had it has still to let go.
        gc.disable()
        try:
            await until(lambda: result() is None)
        finally:
            gc.enable()


@pytest.mark.skipif(
    sys.version_info >= (3, 12), reason="frames keep those that have awaited them"
)
async def test_a_kept_error_keeps_no_pool_alive() -> None:
    def fail(_: object) -> None:
        raise KeyError

    def pools() -> int:
        gc.collect()
        return sum(isinstance(thing, Dispatch) for thing in gc.get_objects())

    async def run() -> None:
        async with open_pool(1, worker=in_thread(fail)) as pool:
            reply = pool.submit_nowait(1)
            await pool.join()
            assert isinstance(reply.outcome, outcome.Error)
            kept.append(reply.outcome.error)

    kept: list[BaseException] = []
    before = pools()
    await run()
    assert kept
    assert pools() <= before


async def test_a_thread_left_behind_answers_nobody_elses_job() -> None:
    """Its worker has gone on with another thread by then, under the same number."""
    gates = [trio.Event(), trio.Event()]

    def work(number: int) -> int:
        trio.from_thread.run(gates[number].wait, trio_token=token)
        return number

    token = trio.lowlevel.current_trio_token()
    worker = in_thread(work, abandon_on_cancel=True)
    async with open_pool(1, worker=worker) as pool:
        with trio.move_on_after(0.01):
            await pool.process(0)
        reply: Reply[int] = await pool.submit(1)
        gates[0].set()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not reply.done
        gates[1].set()
        assert await reply.wait() == 1
    assert_books_balance(pool)


class Leave:
    """It ends the program, as it is unpickled."""

    def __reduce__(self) -> Any:
        return _leave, ()


def _leave() -> None:
    raise SystemExit


class Sends(Executor):
    """Gives every call back at once, with what its result is sent as."""

    def submit(self, fn: Any, /, *args: Any, **_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        _, _, items = args
        value = _shim.VALUE, pickle.dumps(Leave() if items == ["leave"] else 1)
        future.set_result((0.0, [value for _ in items]))
        return future


async def test_a_result_that_ends_the_program_takes_its_job_alone() -> None:
    async with open_pool(1, worker=on_executor(Sends, str)) as pool:
        assert await pool.process("stay") == 1
        with pytest.raises(WorkerCrashed) as caught:
            await pool.process("leave")
        assert isinstance(caught.value.__cause__, SystemExit)
        assert await pool.process("stay") == 1
    assert_books_balance(pool)


class Careless(Executor):
    """Gives back something else than what it was given to do."""

    def submit(self, fn: Any, /, *args: Any, **_: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(args[2])
        return future


async def test_an_executor_that_gives_back_something_else_fails_its_job_alone() -> None:
    async with open_pool(1, worker=on_executor(Careless, str)) as pool:
        with pytest.raises((TypeError, ValueError)):
            await pool.process("job")
    assert_books_balance(pool)
