"""Pins what `_trio` reads of trio's insides: that it is there, and means that.

If one of these fails with a new trio, `_trio.py` is the one file to mend.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import trio
from outcome import Outcome
from trio.lowlevel import current_task

from trio_pool._trio import (
    WAKE,
    effective_deadline,
    forget_nurseries,
    show_deadline,
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
