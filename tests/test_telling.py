"""The fan-out of events: to hooks, and to event streams with a bounded buffer."""

from __future__ import annotations

import gc
import logging
import typing
import weakref
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from trio_pool._events import (
    Event,
    EventsLost,
    Hooks,
    JobChanged,
    JobState,
    PoolChanged,
    PoolResized,
    WorkerChanged,
)
from trio_pool._telling import HOOK_NAMES, EventStream, HookCalls


class Clock:
    """Time that only the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_event(number: int) -> PoolResized:
    """Make an event that can be told from others by its new size."""
    return PoolResized("resize", "press", 0.0, 0, number)


def open_stream(calls: HookCalls, buffer: int = 1024) -> EventStream:
    return calls.open_stream("press", Clock(), buffer)


def tell(calls: HookCalls, *numbers: int) -> None:
    for number in numbers:
        calls.call("on_resize", make_event(number))


def stop(calls: HookCalls) -> None:
    calls.call("on_pool_stop", PoolChanged("pool_stop", "press", 0.0))


async def read_all(stream: EventStream) -> list[Event]:
    return [event async for event in stream]


def numbers(events: list[Event]) -> list[Any]:
    """Show sizes as they are, a loss as its negative count, others by kind."""
    return [
        event.new
        if isinstance(event, PoolResized)
        else -event.count
        if isinstance(event, EventsLost)
        else event.kind
        for event in events
    ]


class Noting(Hooks):
    """Notes sizes, and hears of nothing else."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_resize(self, event: PoolResized) -> None:
        self.seen.append(event.new)


# Events


def test_the_kinds_of_events_are_the_hooks_by_name() -> None:
    kinds: list[str] = []
    for record in typing.get_args(Event):
        kinds.extend(typing.get_args(typing.get_type_hints(record)["kind"]))
    assert sorted(kinds) == sorted(
        [*(name.removeprefix("on_") for name in HOOK_NAMES), "lost"]
    )


@pytest.mark.parametrize("record", typing.get_args(Event))
def test_every_event_says_what_where_and_when_first(record: type) -> None:
    fields = [field.name for field in attrs.fields(record)]
    assert fields[:3] == ["kind", "pool", "time"]


def test_an_event_is_known_by_its_class() -> None:
    assert isinstance(EventsLost("press", 0.0, 2), Event)
    assert EventsLost("press", 0.0, 2).kind == "lost"
    assert not isinstance("resize", Event)


def test_a_job_without_a_key_or_a_next_attempt_says_none() -> None:
    event = JobChanged("job_start", "press", 0.0, "mine", JobState.RUNNING, 0, 1, None)
    assert (event.job_id, event.key, event.delay) == ("mine", None, None)


# Hooks


def test_only_overridden_hooks_listen() -> None:
    calls = HookCalls([Hooks(), Noting()])
    assert [name for name in HOOK_NAMES if calls.listening(name)] == ["on_resize"]
    assert not calls.any_job_hook


def test_a_hook_of_any_step_of_a_job_counts_as_a_job_hook() -> None:
    for name in HOOK_NAMES:
        hook = Hooks()
        setattr(hook, name, print)
        calls = HookCalls([hook])
        assert calls.listening(name)
        assert calls.any_job_hook == name.startswith("on_job_")


def test_a_hook_that_raises_is_logged_dropped_and_stops_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Failing(Hooks):
        def on_resize(self, event: PoolResized) -> None:
            raise SystemExit

    noting = Noting()
    calls = HookCalls([Failing(), noting])
    tell(calls, 1, 2)
    assert noting.seen == [1, 2]
    (logged,) = caplog.records
    assert (logged.name, logged.levelno) == ("trio_pool", logging.ERROR)
    assert "on_resize" in logged.getMessage()


def test_a_hook_that_raises_inside_of_itself_is_dropped_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Nested(Noting):
        def on_resize(self, event: PoolResized) -> None:
            super().on_resize(event)
            if event.new < 2:
                tell(calls, event.new + 1)
            raise ValueError

    nested, noting = Nested(), Noting()
    calls = HookCalls([nested, noting])
    tell(calls, 1, 3)
    assert nested.seen == [1, 2]
    assert noting.seen == [2, 1, 3]


# Who listens


def test_an_open_stream_hears_everything_and_a_closed_one_costs_nothing() -> None:
    calls = HookCalls([])
    assert not any(calls.listening(name) for name in HOOK_NAMES)
    one, other = open_stream(calls), open_stream(calls)
    one.close()
    assert all(calls.listening(name) for name in HOOK_NAMES)
    assert calls.any_job_hook
    other.close()
    assert not any(calls.listening(name) for name in HOOK_NAMES)
    assert not calls.any_job_hook


def test_closing_a_stream_leaves_the_hooks_of_jobs_alone() -> None:
    hook = Hooks()
    hook.on_job_retry = print  # type: ignore[method-assign,assignment]
    calls = HookCalls([hook])
    open_stream(calls).close()
    assert calls.any_job_hook
    assert calls.listening("on_job_retry")
    assert not calls.listening("on_job_start")


def test_closing_twice_is_closing_once() -> None:
    calls = HookCalls([])
    one, other = open_stream(calls), open_stream(calls)
    one.close()
    one.close()
    assert calls.any_job_hook
    other.close()


def test_a_closed_stream_is_forgotten() -> None:
    class Error(Exception):
        pass

    calls = HookCalls([])
    stream = open_stream(calls)
    error = Error()
    gone = weakref.ref(error)
    calls.call("on_worker_crash", WorkerChanged("worker_crash", "p", 0.0, 0, error))
    del error
    assert gone() is not None
    stream.close()
    gc.collect()
    assert gone() is None


async def test_streams_are_told_after_the_hooks() -> None:
    unread: list[str] = []

    class Look(Hooks):
        def on_resize(self, event: PoolResized) -> None:
            unread.append(repr(stream))

    calls = HookCalls([Look()])
    stream = open_stream(calls)
    tell(calls, 1)
    unread.append(repr(stream))
    assert ["1 unread" in text for text in unread] == [False, True]


async def test_a_hook_that_raises_keeps_nothing_from_the_streams(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hook = Hooks()
    hook.on_resize = lambda event: 1 / 0  # type: ignore[method-assign,assignment]
    calls = HookCalls([hook])
    stream = open_stream(calls)
    tell(calls, 1, 2)
    stop(calls)
    assert numbers(await read_all(stream)) == [1, 2, "pool_stop"]
    assert len(caplog.records) == 1


async def test_a_hook_may_open_and_close_streams() -> None:
    opened: list[EventStream] = []

    class Open(Hooks):
        def on_resize(self, event: PoolResized) -> None:
            if opened:
                opened[0].close()
            opened.append(open_stream(calls))

    calls = HookCalls([Open()])
    tell(calls, 1, 2)
    stop(calls)
    assert numbers(await read_all(opened[0])) == []
    assert numbers(await read_all(opened[1])) == [2, "pool_stop"]


# Reading


async def test_events_come_in_order_to_every_reader() -> None:
    calls = HookCalls([])
    one, other = open_stream(calls), open_stream(calls)
    got: dict[str, list[Event]] = {}

    async def read(name: str, stream: EventStream) -> None:
        got[name] = await read_all(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, "one", one)
        tell(calls, 1, 2)
        await wait_all_tasks_blocked()
        tell(calls, 3)
        nursery.start_soon(read, "other", other)
        await wait_all_tasks_blocked()
        tell(calls, 4)
        stop(calls)
    assert numbers(got["one"]) == [1, 2, 3, 4, "pool_stop"]
    assert got["other"] == got["one"]
    assert one.lost == other.lost == 0


async def test_a_stream_hears_nothing_of_before_it_was_opened() -> None:
    calls = HookCalls([])
    tell(calls, 1)
    stream = open_stream(calls)
    tell(calls, 2)
    assert numbers([await anext(stream)]) == [2]


async def test_the_events_are_the_very_objects() -> None:
    calls = HookCalls([])
    stream = open_stream(calls)
    event = make_event(1)
    calls.call("on_resize", event)
    assert await anext(stream) is event


async def test_every_read_is_a_checkpoint() -> None:
    calls = HookCalls([])
    stream = open_stream(calls, buffer=1)
    tell(calls, 1, 2)
    with assert_checkpoints():
        assert isinstance(await anext(stream), EventsLost)
    with assert_checkpoints():
        await anext(stream)
    stream.close()
    with assert_checkpoints(), pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_busy_reader_is_not_disturbed_by_a_second() -> None:
    calls = HookCalls([])
    stream = open_stream(calls)
    got: list[Event] = []

    async def read() -> None:
        got.append(await anext(stream))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await anext(stream)
        tell(calls, 1)
        with pytest.raises(trio.BusyResourceError):
            await anext(stream)
    assert numbers(got) == [1]
    # The next one may be somebody else.
    tell(calls, 2)
    assert numbers([await anext(stream)]) == [2]


# Losing


async def test_a_slow_reader_loses_the_oldest_and_is_told_in_their_place() -> None:
    calls = HookCalls([])
    stream = open_stream(calls, buffer=3)
    tell(calls, 1, 2, 3)
    assert stream.lost == 0
    assert numbers([await anext(stream)]) == [1]
    tell(calls, 4, 5, 6)
    assert stream.lost == 2
    assert numbers([await anext(stream) for _ in range(2)]) == [-2, 4]
    tell(calls, 7, 8)
    stop(calls)
    assert numbers(await read_all(stream)) == [-2, 7, 8, "pool_stop"]
    assert stream.lost == 4


async def test_a_loss_says_where_and_when_it_began() -> None:
    calls, clock = HookCalls([]), Clock()
    stream = calls.open_stream("press", clock, 1)
    for clock.now in (0.25, 1.5, 2.0):
        tell(calls, 1)
    assert await anext(stream) == EventsLost("press", 1.5, 2)
    assert numbers([await anext(stream)]) == [1]
    for clock.now in (3.0, 4.5):
        tell(calls, 1)
    assert await anext(stream) == EventsLost("press", 4.5, 1)


async def test_the_end_is_never_lost() -> None:
    calls = HookCalls([])
    stream = open_stream(calls, buffer=1)
    tell(calls, 1, 2)
    stop(calls)
    assert numbers(await read_all(stream)) == [-2, "pool_stop"]


async def test_one_slow_reader_costs_the_others_nothing() -> None:
    calls = HookCalls([])
    slow, quick = open_stream(calls, buffer=1), open_stream(calls)
    tell(calls, 1, 2, 3)
    stop(calls)
    assert numbers(await read_all(slow)) == [-3, "pool_stop"]
    assert numbers(await read_all(quick)) == [1, 2, 3, "pool_stop"]


async def test_a_burst_wakes_a_waiting_reader_once_and_counts_what_passed_it() -> None:
    calls = HookCalls([])
    stream = open_stream(calls, buffer=2)
    got: list[Event] = []

    async def read() -> None:
        got.extend(await read_all(stream))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        tell(calls, 1, 2, 3)
        await wait_all_tasks_blocked()
        stop(calls)
    assert numbers(got) == [-1, 2, 3, "pool_stop"]


@given(
    buffer=st.integers(1, 4),
    steps=st.lists(st.sampled_from(["tell", "read", "cancelled read"]), max_size=40),
)
def test_what_was_received_and_what_was_lost_is_what_was_told(
    buffer: int, steps: list[str]
) -> None:
    async def main() -> None:
        calls = HookCalls([])
        stream = open_stream(calls, buffer)
        told = 0
        got: list[Any] = []
        for step in steps:
            if step == "tell":
                tell(calls, told)
                told += 1
            else:
                with trio.CancelScope() as scope:
                    # Reading with nothing there would wait for ever.
                    if step == "cancelled read" or ": 0 unread" in repr(stream):
                        scope.cancel()
                    got.extend(numbers([await anext(stream)]))
        stop(calls)
        got.extend(numbers(await read_all(stream)))
        assert got.pop() == "pool_stop"
        # A loss of n is n numbers that are skipped at this very place.
        expected = 0
        for number in got:
            if isinstance(number, int) and number < 0:
                expected -= number
            else:
                assert number == expected
                expected += 1
        # The stop itself may have pushed the last ones out.
        lost = -sum(number for number in got if number < 0)
        received = sum(1 for number in got if number >= 0)
        assert received + lost == expected == told
        assert stream.lost == lost

    trio.run(main)


# Cancelling


async def test_a_cancelled_wait_loses_nothing() -> None:
    calls = HookCalls([])
    stream = open_stream(calls)
    with trio.move_on_after(0):
        await anext(stream)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(anext, stream)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    tell(calls, 1)
    assert numbers([await anext(stream)]) == [1]


async def test_a_cancelled_read_loses_neither_event_nor_loss() -> None:
    calls = HookCalls([])
    stream = open_stream(calls, buffer=1)
    tell(calls, 1, 2)
    for _ in range(3):
        with trio.CancelScope() as scope:
            scope.cancel()
            await anext(stream)
        assert scope.cancelled_caught
    stop(calls)
    assert numbers(await read_all(stream)) == [-2, "pool_stop"]


@pytest.mark.parametrize("told_first", [True, False])
async def test_an_event_that_meets_a_cancellation_is_read_now_or_later(
    told_first: bool,
) -> None:
    calls = HookCalls([])
    stream = open_stream(calls)
    got: list[Event] = []

    async def read() -> None:
        got.append(await anext(stream))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        if told_first:
            tell(calls, 1)
        nursery.cancel_scope.cancel()
        if not told_first:
            tell(calls, 1)
    assert numbers(got) == ([1] if told_first else [])
    stop(calls)
    got.extend(await read_all(stream))
    assert numbers(got) == [1, "pool_stop"]


# Ending


async def test_a_stream_ends_when_the_pool_has_stopped_and_all_is_read() -> None:
    calls = HookCalls([])
    stream = open_stream(calls)
    tell(calls, 1)
    stop(calls)
    tell(calls, 2)
    assert numbers(await read_all(stream)) == [1, "pool_stop"]
    assert await read_all(stream) == []


async def test_closing_wakes_the_reader() -> None:
    calls = HookCalls([])
    stream = open_stream(calls)
    ended = False

    async def read() -> None:
        nonlocal ended
        assert await read_all(stream) == []
        ended = True

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        stream.close()
    assert ended


async def test_a_closed_stream_ends_at_once() -> None:
    calls = HookCalls([])
    stream = open_stream(calls, buffer=1)
    tell(calls, 1, 2)
    stream.close()
    tell(calls, 3)
    assert await read_all(stream) == []
    # What it was too slow for, it stays too slow for.
    assert stream.lost == 1


# Arguments and looks


@pytest.mark.parametrize("buffer", [0, -1])
def test_a_buffer_without_room_is_refused(buffer: int) -> None:
    calls = HookCalls([])
    with pytest.raises(ValueError, match=f"buffer must be an int, .*, got {buffer}"):
        open_stream(calls, buffer)
    assert not calls.any_job_hook


@pytest.mark.parametrize("buffer", [1.0, True, "3", None])
def test_a_buffer_that_is_no_number_is_refused(buffer: Any) -> None:
    with pytest.raises(TypeError, match="buffer must be an int"):
        open_stream(HookCalls([]), buffer)


def test_the_looks_of_a_stream_say_what_it_holds() -> None:
    calls = HookCalls([])
    stream = open_stream(calls, buffer=2)
    tell(calls, 1, 2, 3)
    assert repr(stream) == "<trio_pool.EventStream: 2 unread, 1 lost>"
