"""The cases of go-async: tasks, drains, and running a task without a pool.

Its pool is that of go-pool, whose cases stand in `test_go_pool`.
"""

from __future__ import annotations

import itertools
from typing import Any, assert_type

import attrs
import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

from trio_pool import Backoff, Drain, Reply, Retry, Task, open_pool


@attrs.frozen
class User:
    name: str


class TransientError(Exception):
    """What goes away when it is tried again."""


class Flaky:
    """An async function that fails so many times, then returns what it is given."""

    def __init__(self, failures: float) -> None:
        self.failures = failures
        self.calls = 0
        self.inputs: list[Any] = []

    async def __call__(self, value: Any = None) -> Any:
        self.calls += 1
        self.inputs.append(value)
        await trio.lowlevel.checkpoint()
        if self.calls <= self.failures:
            raise TransientError(self.calls)
        return value


def at_once(attempt: int) -> float:
    return 0.0


# Running a task without a pool.


async def test_a_worker_runs_once() -> None:
    """A task that is run without a pool calls its function exactly once."""
    fn = Flaky(0)
    assert await Task(fn, "input").run() == "input"
    assert fn.calls == 1


async def test_a_worker_that_fails_is_not_tried_again_unasked() -> None:
    """Without a retry policy the first error is the end, and is the error itself."""
    fn = Flaky(1)
    with pytest.raises(TransientError):
        await Task(fn).run()
    assert fn.calls == 1


async def test_fails_twice_then_succeeds_with_three_attempts(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Three attempts are three calls: two that fail and the one that succeeds."""
    fn = Flaky(2)
    assert await Task(fn, 7).with_retry(attempts=3).run() == 7
    assert fn.calls == 3


async def test_always_fails_with_three_attempts(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Three attempts are three calls, and the error of the last one is raised."""
    fn = Flaky(float("inf"))
    with pytest.raises(TransientError) as caught:
        await Task(fn).with_retry(attempts=3).run()
    assert fn.calls == 3
    assert caught.value.args == (3,)
    assert caught.value.__notes__ == ["trio_pool: given up after 3 attempts"]


async def test_a_retry_without_a_wait(autojump_clock: trio.testing.MockClock) -> None:
    """A wait of 0 seconds is legal; the seed divided by it and panicked."""
    for backoff in (at_once, Backoff(initial=0.0)):
        fn = Flaky(2)
        await Task(fn).with_retry(3, backoff).run()
        assert fn.calls == 3
        assert trio.current_time() == 0.0


@pytest.mark.parametrize("attempts", [0, -1])
def test_no_attempts_are_refused(attempts: int) -> None:
    """Zero attempts are an error in the option; the seed called it a success."""
    with pytest.raises(ValueError, match="attempts"):
        Task(Flaky(0)).with_retry(attempts=attempts)


async def test_a_cancelled_task_is_not_tried_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Cancellation ends the wait for the next attempt; the seed slept it through."""
    fn = Flaky(float("inf"))
    task = Task(fn).with_retry(3, Backoff(initial=10.0, jitter=0.0))
    with trio.move_on_after(1.5) as scope:
        await task.run()
    assert scope.cancelled_caught
    assert trio.current_time() == 1.5
    assert fn.calls == 1


# Input and output.


async def test_input_reaches_the_task() -> None:
    """What `with_input` gives is what the function is called with."""
    fn = Flaky(0)
    assert await Task(fn).with_input("input").run() == "input"
    async with open_pool(1) as pool:
        (reply,) = await pool.go(Task(fn).with_input("other"))
        assert await reply.wait() == "other"
    assert fn.inputs == ["input", "other"]


async def test_output_reaches_the_drain() -> None:
    """The result is sent to the task's drain, with and without a pool."""
    output = Drain[User]()

    async def make(name: str) -> User:
        return User(name)

    task = Task(make, "Alice").drain_to(output)
    await task.run()
    async with open_pool(1) as pool:
        await pool.go(task.with_input("Bob"))
    assert output.collect() == [User("Alice"), User("Bob")]


async def test_only_the_good_attempt_reaches_the_drain(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A task that is tried again sends one result: failures are not sent."""
    output = Drain[str]()
    task = Task(Flaky(2), "value").with_retry(3).drain_to(output)
    await task.run()
    async with open_pool(1) as pool:
        await pool.go(Task(Flaky(2), "other").with_retry(3).drain_to(output))
    assert output.collect() == ["value", "other"]


async def test_input_retry_and_drain_in_any_order(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Every order of the fluent calls gives the same task; the seed lost some."""
    output = Drain[str]()
    policy = Retry(3, at_once)
    steps: dict[str, Any] = {
        "with_input": "input",
        "with_retry": policy,
        "drain_to": output,
    }
    for order in itertools.permutations(steps):
        fn = Flaky(2)
        task: Task[str] = Task(fn)
        for method in order:
            task = getattr(task, method)(steps[method])
        assert (task.args, task.retry, task.drain) == (("input",), policy, output)
        await task.run()
        assert fn.inputs == ["input"] * 3
        assert output.collect() == ["input"]


async def test_each_fluent_call_makes_another_task() -> None:
    """A task never changes; the second version of the seed lost inputs and drains."""
    fn = Flaky(0)
    plain = Task(fn, "plain")
    output = Drain[str]()
    drained = plain.drain_to(output)
    other = drained.with_input("other")
    assert [await task.run() for task in (plain, drained, other)] == [
        "plain",
        "plain",
        "other",
    ]
    assert output.collect() == ["plain", "other"]
    assert plain == Task(fn, "plain")


async def test_a_task_is_reusable() -> None:
    """The same task runs any number of times, here and in several pools."""
    fn = Flaky(0)
    task = Task(fn, 1)
    assert [await task.run() for _ in range(2)] == [1, 1]
    for _ in range(2):
        async with open_pool(2) as pool:
            replies = await pool.go(task, task)
            assert [await reply.wait() for reply in replies] == [1, 1]
    assert fn.calls == 6


async def test_tasks_of_many_types_in_one_pool() -> None:
    """Replies of one `go` keep the types of their tasks, and come in its order."""

    async def text(value: str) -> str:
        return value.upper()

    async def number(value: int) -> float:
        return value / 2

    async with open_pool(2) as pool:
        replies = await pool.go(Task(text, "hello"), Task(number, 85))
        assert_type(replies, tuple[Reply[str], Reply[float]])
        words, halves = replies
        assert await words.wait() == "HELLO"
        assert await halves.wait() == 42.5


# The drain.


def test_three_sends_three_results() -> None:
    """Three values sent are three values collected, in their order."""
    drain = Drain[int]()
    for value in range(3):
        drain.send(value)
    assert drain.count == 3
    assert drain.collect() == [0, 1, 2]
    assert drain.count == 0


def test_a_thousand_sends_a_thousand_results() -> None:
    """A thousand values sent are a thousand values collected, none lost."""
    drain = Drain[int]()
    for value in range(1000):
        drain.send(value)
    assert drain.count == drain.total == 1000
    assert drain.collect() == list(range(1000))


@pytest.mark.parametrize("number", [63, 64, 65, 66, 128, 129])
def test_the_sixty_fifth_value(number: int) -> None:
    """No number of values is special; the seed broke at its 65th."""
    drain = Drain[int]()
    for value in range(number):
        drain.send(value)
    assert drain.count == number
    assert drain.collect() == list(range(number))


async def test_the_sixty_fifth_value_sent_by_tasks() -> None:
    """Sixty-five tasks of one pool fill one drain with nobody reading it."""
    drain = Drain[int]()
    task = Task(Flaky(0)).drain_to(drain)
    async with open_pool(4) as pool:
        await pool.go(*[task.with_input(number) for number in range(65)])
        await pool.join()
        assert drain.count == 65
    assert sorted(drain.collect()) == list(range(65))


def test_what_is_collected_is_the_callers_own() -> None:
    """A collected list is nobody else's; the seed handed out its own slice."""
    drain = Drain[str]()
    drain.send("first")
    collected = drain.collect()
    collected.append("the caller's")
    drain.send("second")
    assert collected == ["first", "the caller's"]
    assert drain.count == 1
    assert drain.collect() == ["second"]


async def test_a_drain_is_read_while_it_is_filled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A reader gets each result as it comes, and ends when the drain is closed."""
    drain = Drain[int]()
    read: list[tuple[float, int]] = []

    async def reader() -> None:
        nonlocal read
        read = [(trio.current_time(), value) async for value in drain]

    async def slow(value: int) -> int:
        await trio.sleep(0.5)
        return value

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        async with open_pool(1) as pool:
            await pool.go(*[Task(slow, n).drain_to(drain) for n in range(3)])
        drain.close()
    assert read == [(0.5, 0), (1.0, 1), (1.5, 2)]


# Tasks and drains in a pool.


async def test_one_task_one_drain() -> None:
    """One task in a pool sends its one result to its drain."""
    drain = Drain[str]()
    async with open_pool(1) as pool:
        await pool.go(Task(Flaky(0), "only").drain_to(drain))
    assert drain.collect() == ["only"]


async def test_two_tasks_one_drain_in_order_at_limit_one(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """At limit 1 the drain has the results in the order of the tasks."""
    drain = Drain[str]()

    async def after(seconds: float, value: str) -> str:
        await trio.sleep(seconds)
        return value

    # The first takes longer, so that only the limit keeps it first.
    first = Task(after, 1.5, "first").drain_to(drain)
    second = Task(after, 0.25, "second").drain_to(drain)
    async with open_pool(1) as pool:
        await pool.go(first, second)
    assert drain.collect() == ["first", "second"]


async def test_two_types_two_drains() -> None:
    """Two tasks of different types each fill their own drain."""
    words, numbers = Drain[str](), Drain[float]()

    async def word() -> str:
        return "Hello"

    async def number() -> float:
        return 42.5

    async with open_pool(2) as pool:
        await pool.go(Task(word).drain_to(words), Task(number).drain_to(numbers))
    assert words.collect() == ["Hello"]
    assert numbers.collect() == [42.5]


async def test_one_without_a_drain() -> None:
    """A task without a drain runs beside one that has it, and sends nothing."""
    drain = Drain[str]()
    silent = Flaky(0)
    async with open_pool(2) as pool:
        _, reply = await pool.go(
            Task(Flaky(0), "heard").drain_to(drain), Task(silent, "silent")
        )
        assert await reply.wait() == "silent"
    assert silent.calls == 1
    assert drain.collect() == ["heard"]


async def test_the_drain_has_the_result_before_the_reply_is_heard() -> None:
    """Whoever waited for the reply finds the result in the drain."""
    drain = Drain[str]()
    async with open_pool(1) as pool:
        (reply,) = await pool.go(Task(Flaky(0), "value").drain_to(drain))
        await reply.wait()
        assert drain.collect() == ["value"]


async def test_go_is_repeatable() -> None:
    """One pool takes one batch after the other, and ends all of them."""
    drain = Drain[int]()
    task = Task(Flaky(0)).drain_to(drain)
    async with open_pool(2) as pool:
        for batch in range(3):
            replies = await pool.go(task.with_input(batch), task.with_input(batch))
            await pool.join()
            assert [reply.done for reply in replies] == [True, True]
            assert drain.collect() == [batch, batch]
    assert pool.statistics().done == 6


async def test_go_takes_one_none_or_many_tasks() -> None:
    """`go` answers each task with one reply, in order, whatever their number."""
    async with open_pool(2) as pool:
        assert await pool.go() == ()
        for number in (1, 2, 5):
            replies = await pool.go(*[Task(Flaky(0), n) for n in range(number)])
            assert [await reply.wait() for reply in replies] == list(range(number))


async def test_a_task_of_go_waits_for_its_retry_without_a_worker(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A task that waits to be tried again leaves its place to the next one."""
    drain = Drain[str]()
    flaky = Task(Flaky(1), "flaky").with_retry(2, Backoff(1.5, jitter=0.0))
    async with open_pool(1) as pool:
        replies = await pool.go(
            flaky.drain_to(drain), Task(Flaky(0), "steady").drain_to(drain)
        )
        await wait_all_tasks_blocked()
        assert drain.collect() == ["steady"]
        assert pool.statistics().delayed == 1
        assert await replies[0].wait() == "flaky"
        assert trio.current_time() == 1.5
    assert drain.collect() == ["flaky"]
