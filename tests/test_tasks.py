"""`Task`: the frozen definition of one async call, and running it without a pool."""

from __future__ import annotations

import functools
import itertools
import math
import random
import typing
from collections.abc import Awaitable, Callable
from typing import Any, assert_type

import attrs
import pytest
import tenacity
import trio
import trio.testing

from trio_pool import Drain, JobTimeout, Retry, Task


async def double(number: int) -> int:
    await trio.lowlevel.checkpoint()
    return 2 * number


def wait_quarter(attempt: int) -> float:
    return 0.25


class Script:
    """An async function that plays prepared answers and notes its calls."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[float, tuple[Any, ...]]] = []

    async def __call__(self, *args: Any) -> Any:
        self.calls.append((trio.current_time(), args))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, BaseException):
            raise answer
        if callable(answer):
            return await answer()
        await trio.lowlevel.checkpoint()
        return answer


# The definition

OPTIONS: dict[str, tuple[str, Any]] = {
    "with_input": ("args", 3),
    "with_retry": ("retry", Retry(2)),
    "with_timeout": ("timeout", 1.5),
    "with_priority": ("priority", 7),
    "with_key": ("key", ("row", 1)),
    "with_delay": ("delay", 0.25),
    "with_ttl": ("ttl", 2.5),
    "with_id": ("id", "mine"),
    "drain_to": ("drain", Drain[int]()),
}


def test_a_task_has_what_it_was_given_and_nothing_else() -> None:
    task = Task(double, 3)
    assert (task.fn, task.args, task.options) == (double, (3,), {})


@pytest.mark.parametrize("method", OPTIONS)
def test_each_option_makes_another_task(method: str) -> None:
    name, value = OPTIONS[method]
    task = Task(double, 1)
    other = getattr(task, method)(value)
    assert other is not task
    assert task == Task(double, 1)
    if name == "args":
        assert (other.args, other.options) == ((3,), {})
    else:
        assert (other.args, other.options) == ((1,), {name: value})
        assert getattr(other, name) == value


def test_the_order_of_the_options_does_not_matter() -> None:
    def make(methods: list[str]) -> Task[int]:
        task = Task(double, 1)
        for method in methods:
            task = getattr(task, method)(OPTIONS[method][1])
        return task

    plain = make(list(OPTIONS))
    assert set(plain.options) == {name for name, _ in OPTIONS.values()} - {"args"}
    for first, second in itertools.permutations(OPTIONS, 2):
        assert make([first, second]) == make([second, first])
    draw = random.Random(0)
    for _ in range(20):
        methods = draw.sample(list(OPTIONS), k=len(OPTIONS))
        assert make(methods) == plain
        assert make(methods).options == plain.options


def test_a_later_value_replaces_an_earlier_one() -> None:
    task = Task(double, 1).with_timeout(1.0).with_input(2).with_timeout(2.0)
    assert task.with_input(3, 4).args == (3, 4)
    assert task.with_input().args == ()
    assert task.options == {"timeout": 2.0}


@pytest.mark.parametrize("method", sorted(set(OPTIONS) - {"with_input"}))
def test_none_takes_an_option_off(method: str) -> None:
    task = getattr(Task(double, 1), method)(OPTIONS[method][1])
    assert getattr(task, method)(None) == Task(double, 1)


def test_values_that_are_zero_are_set() -> None:
    task = Task(double).with_priority(0).with_delay(0).with_key("").with_timeout(0.5)
    assert task.options == {"priority": 0, "delay": 0, "key": "", "timeout": 0.5}


def test_the_options_are_a_copy() -> None:
    task = Task(double).with_priority(1)
    task.options["priority"] = 2
    assert task.options == {"priority": 1}


def test_retry_is_a_policy_or_the_arguments_of_one() -> None:
    task = Task(double)
    assert task.with_retry().retry == Retry()
    assert task.with_retry(5).retry == Retry(5)
    assert task.with_retry(attempts=4, on=OSError).retry == Retry(4, on=OSError)
    assert task.with_retry(2, wait_quarter).retry == Retry(2, wait_quarter)
    policy = Retry(6)
    assert task.with_retry(policy).retry is policy


def test_a_task_is_frozen() -> None:
    task = Task(double, 1)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        task.timeout = 1.0  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del task.args


def test_equal_tasks_are_one_in_a_set() -> None:
    tasks = {Task(double, 1).with_id("a"), Task(double, 1).with_id("a"), Task(double)}
    assert len(tasks) == 2


def test_the_looks_of_a_task_name_its_function() -> None:
    assert "double" in repr(Task(double, 1))


async def test_the_type_of_the_result_survives_every_option() -> None:
    task = assert_type(Task(double, 3), Task[int])
    assert_type(Task(double), Task[int])
    task = assert_type(task.with_retry(3).with_retry(Retry()), Task[int])
    task = assert_type(task.with_input(4).with_timeout(1.5), Task[int])
    task = assert_type(task.with_priority(1).with_key("k"), Task[int])
    task = assert_type(task.with_delay(0).with_ttl(9.0).with_id("id"), Task[int])
    task = assert_type(task.drain_to(Drain[int]()), Task[int])
    assert assert_type(await task.run(), int) == 8


def test_the_type_hints_of_a_task_resolve() -> None:
    assert {"fn", "args", "drain", "retry"} <= typing.get_type_hints(Task).keys()
    for name in ("__init__", "run", *OPTIONS):
        assert "return" in typing.get_type_hints(getattr(Task, name))


# What is refused


def sync(number: int) -> int:
    return number


@pytest.mark.parametrize(
    "fn", [sync, print, 3, None, dict, lambda: double(1), functools.partial(sync, 1)]
)
def test_what_is_no_async_function_is_refused(fn: Any) -> None:
    with pytest.raises(TypeError, match="fn must be an async function, got") as caught:
        Task(fn)
    assert repr(fn) in str(caught.value)


def test_a_coroutine_that_was_called_already_is_refused() -> None:
    called = double(1)
    with pytest.raises(TypeError, match="fn must be an async function"):
        Task(called)  # type: ignore[call-overload]
    called.close()


@pytest.mark.parametrize(
    ("method", "name", "value", "kind"),
    [
        ("with_timeout", "timeout", 0, ValueError),
        ("with_timeout", "timeout", -1.5, ValueError),
        ("with_timeout", "timeout", math.nan, ValueError),
        ("with_timeout", "timeout", "1", TypeError),
        ("with_timeout", "timeout", True, TypeError),
        ("with_delay", "delay", -0.25, ValueError),
        ("with_delay", "delay", math.inf, ValueError),
        ("with_delay", "delay", "1", TypeError),
        ("with_ttl", "ttl", 0, ValueError),
        ("with_ttl", "ttl", -1, ValueError),
        ("with_ttl", "ttl", [], TypeError),
        ("with_priority", "priority", 1.0, TypeError),
        ("with_priority", "priority", True, TypeError),
        ("with_priority", "priority", "high", TypeError),
        ("with_key", "key", [], TypeError),
        ("with_id", "id", "", ValueError),
        ("with_id", "id", 3, TypeError),
        ("with_retry", "attempts", 0, ValueError),
        ("with_retry", "attempts", "3", TypeError),
        ("drain_to", "drain", [], TypeError),
    ],
)
def test_a_bad_value_is_refused_by_name(
    method: str, name: str, value: object, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=rf"^{name} must be ") as caught:
        getattr(Task(double, 1), method)(value)
    assert repr(value) in str(caught.value)


def test_arguments_that_retry_does_not_have_are_refused() -> None:
    with pytest.raises(TypeError):
        Task(double).with_retry(tries=3)
    with pytest.raises(TypeError):
        Task(double).with_retry(Retry(), attempts=3)


# Running it


async def test_it_runs_once_and_returns_the_result() -> None:
    script = Script("result")
    assert await Task(script, 1, "two").run() == "result"
    assert [args for _, args in script.calls] == [(1, "two")]


async def test_it_can_be_run_again() -> None:
    task = Task(double, 21)
    assert [await task.run() for _ in range(3)] == [42, 42, 42]
    assert await task.with_input(1).run() == 2
    assert await task.run() == 42


async def test_runs_at_the_same_time_do_not_mix(
    autojump_clock: trio.testing.MockClock,
) -> None:
    script = Script(OSError(), OSError(), 1)
    task = Task(script).with_retry(3, wait_quarter)
    results: list[int] = []

    async def run() -> None:
        results.append(await task.run())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        nursery.start_soon(run)
    assert results == [1, 1]
    # Each has failed once: neither knows of the attempts of the other.
    assert len(script.calls) == 4


async def test_an_error_is_the_functions_own_without_a_note() -> None:
    error = ValueError("no")
    with pytest.raises(ValueError, match="no") as caught:
        await Task(Script(error)).run()
    assert caught.value is error
    assert not hasattr(error, "__notes__")


@pytest.mark.parametrize("wrapped", [functools.partial(double, 2), Script(4)])
async def test_partials_and_async_objects_are_functions_too(
    wrapped: Callable[[], Awaitable[int]],
) -> None:
    assert await Task(wrapped).run() == 4


# Trying again


async def test_it_is_tried_again_until_it_succeeds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    script = Script(OSError("first"), ValueError("second"), "ok", "too many")
    waits: list[int] = []

    def wait(attempt: int) -> float:
        waits.append(attempt)
        return 0.25 * 2.0**attempt

    began = trio.current_time()
    assert await Task(script, "x").with_retry(3, wait).run() == "ok"
    assert [at - began for at, _ in script.calls] == [0.0, 0.25, 0.75]
    assert {args for _, args in script.calls} == {("x",)}
    assert waits == [0, 1]


async def test_the_last_error_is_raised_with_a_note_when_all_attempts_fail(
    autojump_clock: trio.testing.MockClock,
) -> None:
    errors = [ValueError("1"), ValueError("2"), ValueError("3"), ValueError("4")]
    script = Script(*errors)
    with pytest.raises(ValueError, match="3") as caught:
        await Task(script).with_retry(3, wait_quarter).run()
    assert caught.value is errors[2]
    assert caught.value.__context__ is None
    assert len(script.calls) == 3
    (note,) = caught.value.__notes__
    assert "3 attempts" in note
    assert not any(hasattr(error, "__notes__") for error in errors[:2])


async def test_only_what_the_policy_names_is_tried_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    script = Script(OSError(), ValueError("not this"), "never")
    task = Task(script).with_retry(attempts=5, backoff=wait_quarter, on=OSError)
    with pytest.raises(ValueError, match="not this"):
        await task.run()
    assert len(script.calls) == 2


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_exits_are_not_tried_again(kind: type[BaseException]) -> None:
    script = Script(kind())
    with pytest.raises(kind):
        await Task(script).with_retry(3, wait_quarter).run()
    assert len(script.calls) == 1


# Cancelling


async def test_a_cancelled_run_is_not_tried_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    script = Script(trio.sleep_forever)
    drain = Drain[Any]()
    with trio.move_on_after(1.5) as scope:
        await Task(script).with_retry(3).with_timeout(9).drain_to(drain).run()
    assert scope.cancelled_caught
    assert len(script.calls) == 1
    assert drain.count == 0


async def test_a_group_with_a_cancellation_is_not_tried_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    calls = 0

    async def fail_when_cancelled() -> None:
        nonlocal calls
        calls += 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError

    with pytest.RaisesGroup(ValueError), trio.move_on_after(1.5):
        await Task(fail_when_cancelled).with_retry(3, wait_quarter).run()
    assert calls == 1


@pytest.mark.parametrize("when", ["delayed", "waiting for the next attempt"])
async def test_a_waiting_run_can_be_cancelled(
    when: str, autojump_clock: trio.testing.MockClock
) -> None:
    script = Script(ValueError())
    task = Task(script).with_retry(3, lambda attempt: 1.5)
    if when == "delayed":
        task = task.with_delay(1.5)
    with trio.move_on_after(0.25) as scope:
        await task.run()
    assert scope.cancelled_caught
    assert len(script.calls) == (0 if when == "delayed" else 1)


# Time


async def test_the_delay_comes_before_the_first_attempt_only(
    autojump_clock: trio.testing.MockClock,
) -> None:
    script = Script(OSError(), 1)
    began = trio.current_time()
    task = Task(script).with_delay(1.5).with_retry(2, wait_quarter)
    assert await task.run() == 1
    assert [at - began for at, _ in script.calls] == [1.5, 1.75]


async def test_a_retry_hears_the_seconds_since_the_first_attempt_began(
    autojump_clock: trio.testing.MockClock,
) -> None:
    await trio.sleep(5)
    script = Script(OSError())
    task = Task(script).with_retry(tenacity.stop_after_delay(1.5), lambda _: 0.5)
    with pytest.raises(OSError):
        await task.with_delay(2).run()
    assert [at for at, _ in script.calls] == [7.0, 7.5, 8.0, 8.5]


async def test_an_attempt_over_its_timeout_is_a_job_timeout(
    autojump_clock: trio.testing.MockClock,
) -> None:
    began = trio.current_time()
    with pytest.raises(JobTimeout) as caught:
        await Task(trio.sleep, 9).with_timeout(1.5).with_id("mine").run()
    assert trio.current_time() - began == 1.5
    error = caught.value
    assert isinstance(error, trio.TooSlowError)
    assert (error.job_id, error.started, error.attempts) == ("mine", True, 1)
    assert (error.worker, error.timeout) == (None, 1.5)


async def test_a_run_without_an_id_has_the_id_0(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with pytest.raises(JobTimeout) as caught:
        await Task(trio.sleep, 9).with_timeout(1.5).run()
    assert caught.value.job_id == 0


async def test_each_attempt_has_its_whole_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def sleep() -> None:
        await trio.sleep(9)

    async def rest() -> str:
        await trio.sleep(1.25)
        return "done"

    script = Script(sleep, sleep, rest)
    began = trio.current_time()
    task = Task(script).with_timeout(1.5).with_retry(3, wait_quarter)
    assert await task.run() == "done"
    assert [at - began for at, _ in script.calls] == [0.0, 1.75, 3.5]

    with pytest.raises(JobTimeout) as caught:
        await Task(sleep).with_timeout(1.5).with_retry(2, wait_quarter).run()
    assert caught.value.attempts == 2


async def test_a_result_wins_over_the_timeout(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def shielded() -> str:
        with trio.CancelScope(shield=True):
            await trio.sleep(2.5)
        return "late"

    async def catching() -> str:
        try:
            await trio.sleep(2.5)
        except trio.Cancelled:
            return "caught"
        return "never"

    assert await Task(shielded).with_timeout(1.5).run() == "late"
    assert await Task(catching).with_timeout(1.5).run() == "caught"


@pytest.mark.parametrize("timeout", [None, 1.5])
async def test_too_slow_of_the_function_is_its_own(
    timeout: float | None, autojump_clock: trio.testing.MockClock
) -> None:
    error = trio.TooSlowError()
    with pytest.raises(trio.TooSlowError) as caught:
        await Task(Script(error)).with_timeout(timeout).run()
    assert caught.value is error


async def test_the_deadline_of_the_caller_is_no_timeout(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with trio.move_on_after(1.5) as scope:
        await Task(trio.sleep, 9).with_timeout(1.5).run()
    assert scope.cancelled_caught


# Draining


async def test_the_result_goes_to_the_drain_and_to_the_caller(
    autojump_clock: trio.testing.MockClock,
) -> None:
    drain = Drain[int]()
    task = Task(double).drain_to(drain)
    assert [await task.with_input(n).run() for n in (1, 2)] == [2, 4]
    script = Script(OSError(), 6)
    assert await Task(script).drain_to(drain).with_retry(2, wait_quarter).run() == 6
    assert drain.collect() == [2, 4, 6]


async def test_a_failure_sends_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    drain = Drain[Any]()
    task = Task(Script(ValueError())).with_retry(2, wait_quarter).drain_to(drain)
    with pytest.raises(ValueError):
        await task.run()
    assert drain.count == 0


async def test_a_closed_drain_is_heard_of() -> None:
    drain = Drain[int]()
    drain.close()
    script = Script(1)
    with pytest.raises(trio.ClosedResourceError):
        await Task(script).drain_to(drain).with_retry(3, wait_quarter).run()
    # The function has not failed, so it is not tried again.
    assert len(script.calls) == 1


async def test_what_only_a_pool_heeds_changes_nothing() -> None:
    task = Task(double, 1).with_priority(-5).with_key("k").with_ttl(0.25)
    assert await task.run() == 2
