"""The nursery round a user's block: what goes wrong leaves it as it was raised."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from trio_pool._nursery import open_bare_nursery


class SomeError(Exception):
    pass


async def fail(error: BaseException) -> None:
    raise error


async def fail_when_cancelled(error: BaseException) -> None:
    try:
        await trio.sleep_forever()
    finally:
        raise error


async def test_the_error_of_the_block_leaves_it_as_the_very_object() -> None:
    cause = KeyError("before")
    error = SomeError("body")
    error.__context__ = cause
    with pytest.raises(SomeError) as caught:
        async with open_bare_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise error
    assert caught.value is error
    assert error.__context__ is cause


async def test_a_block_may_raise_a_group_of_its_own() -> None:
    error = ExceptionGroup("body", [SomeError("one")])
    with pytest.raises(ExceptionGroup) as caught:
        async with open_bare_nursery():
            raise error
    assert caught.value is error


async def test_what_the_nursery_took_out_of_a_group_does_not_leave_it() -> None:
    """Its own cancellation is nobody's business outside."""
    first, second = SomeError("one"), SomeError("two")
    with pytest.raises(ExceptionGroup) as caught:
        async with open_bare_nursery() as nursery:
            nursery.cancel_scope.cancel()
            async with trio.open_nursery() as inner:
                inner.start_soon(fail_when_cancelled, first)
                inner.start_soon(fail_when_cancelled, second)
                inner.start_soon(trio.sleep_forever)
    assert set(caught.value.exceptions) == {first, second}


async def test_the_error_of_a_task_leaves_bare_and_is_not_said_to_follow_another() -> (
    None
):
    error = SomeError("task")
    with pytest.raises(SomeError) as caught:
        async with open_bare_nursery() as nursery:
            nursery.start_soon(fail, error)
            await trio.sleep_forever()
    assert caught.value is error
    assert error.__context__ is None


async def test_the_error_of_a_task_after_the_block_leaves_bare_as_well() -> None:
    error = SomeError("task")
    with pytest.raises(SomeError) as caught:
        async with open_bare_nursery() as nursery:
            nursery.start_soon(fail, error)
    assert caught.value is error


async def test_the_errors_of_two_tasks_leave_as_a_group() -> None:
    first, second = SomeError("one"), SomeError("two")
    with pytest.raises(ExceptionGroup) as caught:
        async with open_bare_nursery() as nursery:
            nursery.start_soon(fail, first)
            nursery.start_soon(fail_when_cancelled, second)
            await trio.testing.wait_all_tasks_blocked()
    assert set(caught.value.exceptions) == {first, second}
