"""Fault injection: what is ordered or drawn strikes, and is on record."""

from __future__ import annotations

import logging
import pickle
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from trio_pool import (
    Backoff,
    JobCancelled,
    JobTimeout,
    PoolBroken,
    Restart,
    Retry,
    WorkerCrashed,
    open_pool,
)
from trio_pool.testing import (
    Fault,
    Faults,
    InjectedCrash,
    InjectedFault,
    RecordingHooks,
    assert_books_balance,
    settle,
)


@pytest.fixture(autouse=True)
def quiet():
    """Crashes on purpose need no log."""
    logger = logging.getLogger("trio_pool")
    logger.disabled = True
    yield
    logger.disabled = False


class Work:
    """A handler that takes a second, and says how far it came."""

    def __init__(self) -> None:
        self.log: list[str] = []

    async def __call__(self, x: Any) -> Any:
        self.log.append(f"begin {x}")
        try:
            await trio.sleep(1)
        except trio.Cancelled:
            self.log.append(f"cancelled {x}")
            raise
        self.log.append(f"end {x}")
        return x


MOMENTS = pytest.mark.parametrize(
    ("how", "seconds", "log"),
    [
        ({}, 0.0, []),
        ({"moment": "before"}, 0.0, []),
        ({"after": 0.25}, 0.25, ["begin a", "cancelled a"]),
        ({"moment": "during"}, 0.0, ["begin a", "cancelled a"]),
        ({"moment": "after"}, 1.0, ["begin a", "end a"]),
        ({"after": 1.0}, 1.0, None),
    ],
)


@MOMENTS
async def test_a_fault_strikes_at_its_moment(
    how: dict[str, Any],
    seconds: float,
    log: list[str] | None,
    autojump_clock: MockClock,
) -> None:
    faults, work = Faults(), Work()
    faults.fail_next(ValueError("no"), **how)
    async with open_pool(1, faults.handler(work)) as pool:
        with pytest.raises(ValueError, match="no"):
            await pool.process("a")
        assert trio.current_time() == seconds
        if log is not None:
            assert work.log == log
        assert await pool.process("b") == "b"
    (injection,) = faults.injected
    assert (injection.kind, injection.time, injection.job_input) == (
        *("fail", seconds, "a"),
    )
    assert faults.counts == {"fail": 1}
    faults.assert_used_up()


async def test_faults_strike_the_next_calls_in_the_order_of_the_orders(
    autojump_clock: MockClock,
) -> None:
    faults = Faults()
    faults.fail_next(times=2)
    faults.crash_next()
    faults.hang_next()
    async with open_pool(1, faults.handler(Work()), timeout=9) as pool:
        outcomes = [await pool.submit(n) for n in range(5)]
        await pool.join()
        errors = [getattr(reply.outcome, "error", None) for reply in outcomes]
        assert [type(error) for error in errors] == [
            *(InjectedFault, InjectedFault, WorkerCrashed, JobTimeout, type(None)),
        ]
        assert isinstance(errors[2].__cause__, InjectedCrash)
        await settle(pool)
    assert [i.kind for i in faults.injected] == ["fail", "fail", "crash", "hang"]
    assert [i.job_input for i in faults.injected] == [0, 1, 2, 3]
    faults.assert_used_up()


@MOMENTS
async def test_a_job_that_cancels_itself(
    how: dict[str, Any],
    seconds: float,
    log: list[str] | None,
    autojump_clock: MockClock,
) -> None:
    faults = Faults()
    faults.cancel_next(**how)
    async with open_pool(1, faults.handler(Work())) as pool:
        with pytest.raises(JobCancelled):
            await pool.process("a")
        assert trio.current_time() == seconds
        assert await pool.process("b") == "b"


async def test_a_hanging_job_ends_when_its_caller_is_cancelled(
    autojump_clock: MockClock,
) -> None:
    faults, work = Faults(), Work()
    faults.hang_next(moment="after")
    async with open_pool(1, faults.handler(work)) as pool:
        with trio.move_on_after(5) as scope:
            await pool.process("a")
        assert scope.cancelled_caught
        assert work.log == ["begin a", "end a"]
        assert_books_balance(pool)


async def test_a_call_that_ends_sooner_is_spared_and_the_next_is_not(
    autojump_clock: MockClock,
) -> None:
    faults = Faults()
    faults.fail_next(after=2)
    faults.fail_next(KeyError)
    async with open_pool(1, faults.handler(trio.sleep)) as pool:
        await pool.process(1.5)
        assert [fault.after for fault in faults.pending] == [2, 0]
        with pytest.raises(InjectedFault):
            await pool.process(3)
        assert trio.current_time() == 3.5
        with pytest.raises(KeyError):
            await pool.process(3)
    faults.assert_used_up()


async def test_a_call_that_is_cancelled_by_others_is_spared(
    autojump_clock: MockClock,
) -> None:
    faults = Faults()
    faults.fail_next(after=2)
    handler = faults.handler(trio.sleep)
    with trio.move_on_after(1):
        await handler(9)
    assert len(faults.pending) == 1
    with pytest.raises(InjectedFault):
        await handler(9)


async def test_what_goes_wrong_as_a_call_is_cut_short_is_not_told(
    autojump_clock: MockClock,
) -> None:
    async def clumsy() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise OSError("cleanup")

    faults = Faults()
    faults.fail_next(after=1)
    with pytest.raises(InjectedFault):
        await faults.handler(clumsy)()
    faults.fail_next(after=1)

    async def early() -> None:
        raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        await faults.handler(early)()


async def test_slow_calls_take_longer_until_they_do_not(
    autojump_clock: MockClock,
) -> None:
    faults, work = Faults(), Work()
    handler = faults.handler(work)
    faults.slow(2)
    await handler(1)
    assert trio.current_time() == 3.0
    faults.slow(4, moment="after")
    await handler(2)
    assert trio.current_time() == 8.0
    faults.slow(0)
    await handler(3)
    assert trio.current_time() == 9.0
    assert faults.counts["slow"] == 2
    assert [i.time for i in faults.injected] == [0.0, 4.0]
    faults.assert_used_up()


async def test_functions_of_a_task_pool_can_be_struck() -> None:
    async def add(a: int, b: int, *, c: int = 0) -> int:
        return a + b + c

    faults = Faults()
    faults.fail_next()
    async with open_pool(1) as pool:
        faulty = faults.handler(add)
        with pytest.raises(InjectedFault):
            await pool.process(faulty, 1, 2)
        assert await pool.process(faulty, 1, 2) == 3
        faults.fail_next()
        with pytest.raises(InjectedFault):
            await faulty(1, 2, c=3)
    assert [i.job_input for i in faults.injected] == [(1, 2), (1, 2, {"c": 3})]


async def test_a_wrapped_handler_is_as_it_was() -> None:
    variable: ContextVar[str] = ContextVar("variable")
    ready = 0

    class Handler:
        """The handler of the user."""

        async def __call__(self, _: object) -> str:
            return variable.get()

        async def ready(self) -> None:
            nonlocal ready
            ready += 1

    async with open_pool(1, Faults().handler(Handler())) as pool:
        variable.set("of the caller")
        assert await pool.process(1) == "of the caller"
    assert ready > 0

    async def named(x: int) -> int:
        """Say something."""
        return x

    faulty = Faults().handler(named)
    assert (faulty.__name__, faulty.__doc__) == ("named", "Say something.")
    assert not hasattr(faulty, "ready")


# ----------------------------------------------------------------------
# By chance.


async def struck(calls: int, **rates: Any) -> tuple[Faults, list[str]]:
    async def handler(_: int) -> None:
        await trio.lowlevel.checkpoint()

    faults = Faults(**rates)
    faulty, found, told = faults.handler(handler), [], list[str]()
    for number in range(calls):
        before = len(faults.injected)
        with trio.move_on_after(10):
            try:
                await faulty(number)
            except (InjectedFault, InjectedCrash) as error:
                told.append(str(error))
        found.append("".join(i.kind for i in faults.injected[before:]))
    assert all(f"drawn with seed {faults.seed}" in text for text in told)
    return faults, found


async def test_the_same_seed_strikes_the_same_calls(autojump_clock: MockClock) -> None:
    rates = {"fail": 0.25, "crash": 0.125, "hang": 0.125, "slow": 0.25, "slow_for": 1.0}
    one, found = await struck(200, seed=7, **rates)
    assert set(found) == {"", "fail", "crash", "hang", "slow"}
    assert sorted(one.counts) == ["crash", "fail", "hang", "slow"]
    for kind, rate in (("fail", 50), ("crash", 25), ("hang", 25), ("slow", 50)):
        assert rate / 2 < found.count(kind) < rate * 2
    _, again = await struck(200, seed=7, **rates)
    assert found == again
    _, other = await struck(200, seed=8, **rates)
    assert found != other


async def test_what_is_ordered_moves_no_draw(autojump_clock: MockClock) -> None:
    _, found = await struck(50, seed=3, fail=0.5)
    faults = Faults(3, fail=0.5)
    faults.hang_next()
    faulty = faults.handler(trio.sleep)
    with trio.move_on_after(1):
        await faulty(0)
    again = []
    for _ in range(49):
        before = len(faults.injected)
        try:
            await faulty(0)
        except InjectedFault:
            assert faults.injected[-1].fault.drawn
        again.append("".join(i.kind for i in faults.injected[before:]))
    assert again == found[1:]


async def test_a_seed_that_was_drawn_is_reported_and_replays() -> None:
    rates = {"fail": 0.5}
    faults, found = await struck(50, **rates)
    assert f"seed {faults.seed}" in repr(faults)
    _, again = await struck(50, seed=faults.seed, **rates)
    assert found == again


# ----------------------------------------------------------------------
# Workers.


class Connections:
    """Workers that connect and disconnect."""

    def __init__(self) -> None:
        self.opened = 0
        self.closed = 0

    @asynccontextmanager
    async def worker(self) -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        self.opened += 1
        try:
            yield trio.sleep
        finally:
            self.closed += 1


async def test_setups_fail_hang_and_take_long(autojump_clock: MockClock) -> None:
    faults, connections = Faults(), Connections()
    worker = faults.worker(connections.worker)
    faults.crash_on_start()
    with pytest.raises(InjectedFault):
        async with open_pool(1, worker=worker):
            raise AssertionError
    assert connections.opened == 0
    faults.hang_on_start()
    with trio.move_on_after(5) as scope:
        async with open_pool(1, worker=worker):
            raise AssertionError
    assert scope.cancelled_caught
    faults.slow_start(3)
    async with open_pool(1, worker=worker):
        assert trio.current_time() == 8.0
    faults.slow_start(0)
    async with open_pool(1, worker=worker):
        assert trio.current_time() == 8.0
    assert connections.opened == connections.closed == 2
    assert [i.kind for i in faults.injected] == [
        *("crash_on_start", "hang_on_start", "slow_start"),
    ]


async def test_the_restart_budget_is_spent_by_setups_that_fail(
    autojump_clock: MockClock,
) -> None:
    faults, recorder = Faults(), RecordingHooks()
    restart = Restart(limit=2)
    with pytest.raises(PoolBroken):
        async with open_pool(
            1,
            worker=faults.worker(Connections().worker),
            restart=restart,
            hooks=[recorder],
        ) as pool:
            faults.crash_next()
            faults.crash_on_start(OSError("no route"), times=2)
            with pytest.raises(WorkerCrashed):
                await pool.process(0)
            await trio.sleep_forever()
    faults.assert_used_up()
    assert len(recorder.of("worker_crash")) == 3


async def test_cleanups_fail_hang_and_take_long(autojump_clock: MockClock) -> None:
    faults, connections = Faults(), Connections()
    recorder = RecordingHooks()
    worker = faults.worker(connections.worker)
    async with open_pool(1, worker=worker, hooks=[recorder]):
        faults.fail_cleanup()
    (crash,) = recorder.of("worker_crash")
    assert isinstance(crash.error, InjectedFault)
    assert connections.closed == 1
    async with open_pool(1, worker=worker, grace=4):
        faults.hang_on_stop()
    assert trio.current_time() == 4.0
    assert connections.closed == 2
    faults.slow_stop(2)
    async with open_pool(1, worker=worker):
        pass
    assert trio.current_time() == 6.0
    assert connections.closed == 3
    assert [i.kind for i in faults.injected] == [
        *("fail_cleanup", "hang_on_stop", "slow_stop"),
    ]


async def test_a_wrapped_worker_gives_a_wrapped_handler() -> None:
    faults = Faults()
    faults.fail_next()
    async with open_pool(1, worker=faults.worker(Connections().worker)) as pool:
        with pytest.raises(InjectedFault):
            await pool.process(0)


async def test_a_worker_that_is_none_is_refused_as_without_faults() -> None:
    def none() -> Any:
        return 1

    @asynccontextmanager
    async def no_handler() -> AsyncGenerator[Any, None]:
        yield 1

    for worker in (none, no_handler):
        with pytest.raises(TypeError) as plain:
            async with open_pool(1, worker=worker):
                pass
        with pytest.raises(TypeError) as wrapped:
            async with open_pool(1, worker=Faults().worker(worker)):
                pass
        assert str(plain.value)[:60] == str(wrapped.value)[:60]


# ----------------------------------------------------------------------
# The record, and what is refused.


async def test_faults_that_have_not_struck_are_found() -> None:
    faults = Faults()
    faults.fail_next(times=2)
    faults.crash_on_start()
    with pytest.raises(InjectedFault):
        await faults.handler(trio.sleep)(0)
    assert faults.pending == (Fault(kind="fail"), Fault(kind="crash_on_start"))
    with pytest.raises(AssertionError) as caught:
        faults.assert_used_up()
    assert str(caught.value).splitlines() == [
        "2 faults have not struck:",
        "  Fault('fail')",
        "  Fault('crash_on_start')",
        "those that have: 1 fail",
    ]
    assert repr(faults).endswith("1 injected, 2 pending>")


@pytest.mark.parametrize("error", [InjectedFault("why"), InjectedCrash("why")])
def test_injected_errors_can_be_pickled(error: BaseException) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert again.args == error.args


async def test_the_same_error_raised_twice_keeps_its_traceback_short() -> None:
    def length(error: BaseException) -> int:
        trace, count = error.__traceback__, 0
        while trace is not None:
            trace, count = trace.tb_next, count + 1
        return count

    faults, lengths = Faults(), []
    faults.fail_next(ValueError("again"), times=3)
    for _ in range(3):
        with pytest.raises(ValueError, match="again") as caught:
            await faults.handler(trio.sleep)(0)
        lengths.append(length(caught.value))
    assert lengths[0] == lengths[1] == lengths[2]


@pytest.mark.parametrize(
    ("order", "error", "said"),
    [
        (lambda f: f.fail_next(times=0), ValueError, "times must be"),
        (lambda f: f.fail_next(1), TypeError, "error must be an Exception"),
        (lambda f: f.fail_next(SystemExit), TypeError, "error must be an Exception"),
        (lambda f: f.crash_next(ValueError), TypeError, "that is no Exception"),
        (lambda f: f.hang_next(moment="later"), ValueError, "moment must be"),
        (lambda f: f.hang_next(after=-1), ValueError, "after must be"),
        (lambda f: f.hang_next(moment="after", after=1), ValueError, "left out"),
        (lambda f: f.slow(float("inf")), ValueError, "finite"),
        (lambda f: f.slow(1, moment="during"), ValueError, "'before' or 'after'"),
        (lambda f: f.crash_on_start("no"), TypeError, "error must be"),
        (lambda f: f.handler(len), TypeError, "fn must be an async function"),
        (lambda f: f.worker(1), TypeError, "what worker= takes"),
        (lambda f: f.worker(Work()), TypeError, "what worker= takes"),
        (lambda f: f.strike_next(3), TypeError, "fault must be a Fault"),
        (lambda _: Faults(fail=2), ValueError, "fail must be a number from 0 to 1"),
        (lambda _: Faults(fail="no"), TypeError, "fail must be"),  # type: ignore[arg-type]
        (lambda _: Faults(fail=0.75, hang=0.5), ValueError, "sum of all rates"),
        (lambda _: Faults("7"), TypeError, "seed must be"),  # type: ignore[arg-type]
    ],
)
def test_bad_orders_are_refused_and_change_nothing(
    order: Callable[[Faults], object], error: type[Exception], said: str
) -> None:
    faults = Faults()
    with pytest.raises(error, match=said):
        order(faults)
    assert faults.pending == ()


async def test_code_that_swallows_a_failure_is_found_by_its_faults(
    autojump_clock: MockClock,
) -> None:
    """The bug of the user: the second try after an error has no try left."""

    async def fetch_twice(pool: Any, url: str) -> str:
        try:
            return await pool.process(url)  # type: ignore[no-any-return]
        except InjectedFault:
            return await pool.process(url)  # type: ignore[no-any-return]

    faults = Faults()
    faults.fail_next(times=2)
    async with open_pool(1, faults.handler(Work())) as pool:
        with pytest.raises(InjectedFault):
            await fetch_twice(pool, "/")
        faults.fail_next(times=2)
        right = Retry(3, Backoff(1, jitter=0))
        assert await pool.process("/", retry=right) == "/"
    assert faults.counts == {"fail": 4}
