"""Pins what `_trio` reads of trio's insides: that it is there, and means that.

If one of these fails with a new trio, `_trio.py` is the one file to mend.
"""

from __future__ import annotations

import gc
import math
import weakref
from contextvars import ContextVar
from types import coroutine
from typing import Any

import outcome
import pytest
import trio
from outcome import Outcome
from trio.lowlevel import Abort, current_task, reschedule

from trio_pool import _trio
from trio_pool._trio import (
    WAKE,
    effective_deadline,
    forget_nurseries,
    runner_of,
    show_deadline,
    sleeper,
)


async def deadlines() -> tuple[float, float]:
    """Return what trio says and what we say."""
    return trio.current_effective_deadline(), effective_deadline(current_task())


async def test_without_a_deadline_there_is_none() -> None:
    assert await deadlines() == (math.inf, math.inf)


async def test_the_nearest_deadline_counts_wherever_it_is() -> None:
    for outer, inner in ((5.0, 9.0), (9.0, 5.0), (math.inf, 7.0), (7.0, math.inf)):
        with trio.CancelScope(deadline=trio.current_time() + outer):
            with trio.CancelScope(deadline=trio.current_time() + inner):
                trios, ours = await deadlines()
                assert trios == ours < math.inf


async def test_a_shield_hides_the_deadlines_outside_it() -> None:
    now = trio.current_time()
    with trio.CancelScope(deadline=now + 5):
        with trio.CancelScope(deadline=now + 9, shield=True) as shield:
            assert await deadlines() == (now + 9, now + 9)
            with trio.CancelScope(deadline=now + 7):
                assert await deadlines() == (now + 7, now + 7)
            shield.shield = False
            assert await deadlines() == (now + 5, now + 5)
        with trio.CancelScope(shield=True):
            assert await deadlines() == (math.inf, math.inf)


async def test_a_deadline_that_is_moved_counts_as_moved() -> None:
    now = trio.current_time()
    with trio.CancelScope(deadline=now + 5) as scope:
        scope.deadline = now + 9
        assert await deadlines() == (now + 9, now + 9)
        scope.deadline = math.inf
        assert await deadlines() == (math.inf, math.inf)
        scope.deadline = now + 3
        assert await deadlines() == (now + 3, now + 3)
    assert await deadlines() == (math.inf, math.inf)


async def test_the_deadline_of_a_scope_outside_a_nursery_counts_in_its_tasks() -> None:
    seen: list[tuple[float, float]] = []

    async def look() -> None:
        seen.append(await deadlines())

    now = trio.current_time()
    with trio.CancelScope(deadline=now + 5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
    assert seen == [(now + 5, now + 5)]


async def test_a_deadline_of_another_task_does_not_count_here() -> None:
    async def with_deadline(task_status: trio.TaskStatus[None]) -> None:
        with trio.move_on_after(5):
            task_status.started()
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: with_deadline(task_status))
        assert await deadlines() == (math.inf, math.inf)
        nursery.cancel_scope.cancel()


async def test_a_cancelled_scope_counts_by_its_deadline_only() -> None:
    # This is where we differ from trio, and may: who goes to sleep finds out.
    now = trio.current_time()
    with trio.CancelScope(deadline=now + 5) as scope:
        scope.cancel()
        assert (await deadlines())[0] == -math.inf
        assert (await deadlines())[1] >= now + 5


async def test_a_deadline_that_is_shown_is_seen_and_wakes_nobody(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.CancelScope() as scope:
        show_deadline(scope, 1.5)
        assert trio.current_effective_deadline() == scope.deadline == 1.5
        await trio.sleep(9)
        show_deadline(scope, math.inf)
        assert trio.current_effective_deadline() == math.inf
    assert trio.current_time() == 9
    assert not scope.cancel_called
    assert trio.lowlevel.current_statistics().seconds_to_next_deadline == math.inf


async def test_a_scope_that_was_left_with_a_deadline_shown_leaves_trio_in_order(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.CancelScope() as scope:
        show_deadline(scope, 1.5)
        await trio.lowlevel.checkpoint()
    with trio.move_on_after(0.25) as other:
        await trio.sleep_forever()
    assert other.cancelled_caught
    assert trio.current_time() == 0.25


async def test_a_task_is_woken_by_the_same_outcome_again_and_again() -> None:
    woken = 0

    async def sleep() -> None:
        nonlocal woken
        for _ in range(3):
            result: Any = await trio.lowlevel.wait_task_rescheduled(
                lambda _: trio.lowlevel.Abort.SUCCEEDED
            )
            assert result is None
            woken += 1

    tasks: list[trio.lowlevel.Task] = []

    async def start() -> None:
        tasks.append(current_task())
        await sleep()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(start)
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked()
            trio.lowlevel.reschedule(tasks[0], WAKE)
    assert woken == 3


def test_the_outcome_that_wakes_is_for_trio_alone() -> None:
    assert isinstance(WAKE, Outcome)
    with pytest.raises(NotImplementedError):
        WAKE.send(iter(()))  # type: ignore[arg-type]


async def test_nurseries_left_open_are_forgotten_and_their_tasks_cancelled() -> None:
    cancelled = False
    ended = trio.Event()

    async def child() -> None:
        nonlocal cancelled
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            cancelled = True
            raise
        finally:
            ended.set()

    async def careless() -> None:
        nursery = await trio.open_nursery().__aenter__()
        nursery.start_soon(child)
        await trio.testing.wait_all_tasks_blocked()
        forget_nurseries(current_task())
        assert current_task().child_nurseries == []
        # In the scope that was left open, which the task's end closes.
        with trio.CancelScope(shield=True):
            await ended.wait()

    errors: list[BaseException] = []
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(careless)
    except BaseExceptionGroup as group:
        errors.extend(group.exceptions)
    assert cancelled
    assert [error for error in errors if isinstance(error, AssertionError)] == []


# Sleeping without a new message ------------------------------------------------


class Sleeper:
    """A task that sleeps, how it was woken, and what it was asked to abort."""

    def __init__(self) -> None:
        self.sleep = sleeper()
        self.task: Any = None
        self.result: Any = None
        self.aborts = 0
        self.answer = Abort.SUCCEEDED

    def abort(self, raise_cancel: Any) -> Abort:
        self.aborts += 1
        self.raise_cancel = raise_cancel
        return self.answer

    async def run(self) -> None:
        self.task = current_task()
        try:
            self.result = await self.sleep(self.abort)
        except BaseException as error:
            self.result = error
            if isinstance(error, trio.Cancelled):
                raise


def test_sleeping_is_shorter_than_trio_s_own_way() -> None:
    """If this fails, trio sends another message, and sleep is trio's own again."""
    assert sleeper() is not trio.lowlevel.wait_task_rescheduled


@pytest.mark.parametrize(
    "wake", [WAKE, outcome.Value("up"), outcome.Error(ValueError("up"))]
)
async def test_a_sleeper_gets_what_it_is_woken_with(wake: Any) -> None:
    sleeping = Sleeper()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeping.run)
        await trio.testing.wait_all_tasks_blocked()
        reschedule(sleeping.task, wake)
    if isinstance(wake, outcome.Error):
        assert sleeping.result is wake.error
    else:
        assert sleeping.result == (None if wake is WAKE else "up")
    assert sleeping.aborts == 0


async def test_each_of_many_sleepers_is_aborted_by_its_own_function() -> None:
    sleepers = [Sleeper() for _ in range(3)]
    shared = sleeper()
    scopes: list[trio.CancelScope] = []

    async def run(sleeping: Sleeper) -> None:
        sleeping.sleep = shared
        with trio.CancelScope() as scope:
            scopes.append(scope)
            await sleeping.run()

    async with trio.open_nursery() as nursery:
        for sleeping in sleepers:
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(run, sleeping)
        await trio.testing.wait_all_tasks_blocked()
        scopes[1].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert [sleeping.aborts for sleeping in sleepers] == [0, 1, 0]
        assert isinstance(sleepers[1].result, trio.Cancelled)
        nursery.cancel_scope.cancel()
    assert [sleeping.aborts for sleeping in sleepers] == [1, 1, 1]


async def test_a_sleeper_that_cannot_be_aborted_is_woken_later() -> None:
    sleeping = Sleeper()
    sleeping.answer = Abort.FAILED
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeping.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        assert sleeping.aborts == 1
        assert sleeping.result is None
        reschedule(sleeping.task, outcome.Value("late"))
    assert sleeping.result == "late"


async def test_who_goes_to_sleep_cancelled_is_aborted_at_once() -> None:
    sleeping = Sleeper()
    with trio.CancelScope() as scope:
        scope.cancel()
        await sleeping.run()
    assert sleeping.aborts == 1


async def test_nothing_of_a_sleeper_that_was_woken_is_kept() -> None:
    sleep = sleeper()
    gone: list[Any] = []

    async def run() -> None:
        sleeping = Sleeper()
        gone.append(weakref.ref(sleeping))
        sleeping.sleep = sleep
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleeping.run)
            await trio.testing.wait_all_tasks_blocked()
            reschedule(sleeping.task, WAKE)

    await run()
    gc.collect()
    assert gone[0]() is None


def test_another_message_of_trio_is_left_to_trio(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @coroutine
    def wait_task_rescheduled(abort: Any) -> Any:
        yield ("sleep", abort)

    monkeypatch.setattr(_trio, "wait_task_rescheduled", wait_task_rescheduled)
    assert sleeper() is wait_task_rescheduled


async def test_the_runner_is_that_of_every_task_of_a_run_and_of_no_other() -> None:
    runner = runner_of(current_task())

    async def look() -> Any:
        return runner_of(current_task())

    found: list[Any] = []

    async def child() -> None:
        found.append(await look())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(child)
    assert found == [runner]
    assert await trio.to_thread.run_sync(trio.run, look) is not runner


async def test_the_length_of_a_task_s_context_follows_what_is_set() -> None:
    variable: ContextVar[int] = ContextVar("variable")
    context = current_task().context
    before = len(context)
    token = variable.set(1)
    assert len(context) == before + 1
    variable.reset(token)
    assert len(context) == before


async def test_the_status_of_a_task_says_if_a_checkpoint_would_be_cancelled() -> None:
    async def ask() -> None:
        expected = False
        told = current_task()._cancel_status.effectively_cancelled  # noqa: SLF001
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            expected = True
            raise
        finally:
            answers.append((told, expected))

    answers: list[tuple[bool, bool]] = []
    await ask()
    with trio.CancelScope() as outer:
        outer.cancel()
        with trio.CancelScope(shield=True) as shield:
            await ask()
            with trio.CancelScope() as inner:
                inner.cancel()
                await ask()
            await ask()
            shield.shield = False
            await ask()
    await ask()
    assert answers == [(x, x) for x in (False, False, True, False, True, False)]


async def test_trio_counts_the_deadlines_that_are_armed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    def count() -> int:
        found: int = runner_of(current_task()).deadlines._active  # noqa: SLF001
        return found

    before = count()
    with trio.CancelScope(deadline=1.5), trio.CancelScope(deadline=2.5):
        assert count() == before + 2
        await trio.lowlevel.checkpoint()
    assert count() == before
