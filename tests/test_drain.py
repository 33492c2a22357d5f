"""A drain: what is sent is collected or read once, in order, and never lost."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import assert_type, get_type_hints

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

import trio_pool.drain
from trio_pool import Drain


async def read_all(drain, into):
    """Be a reader until the drain is closed."""
    async for value in drain:
        into.append(value)


def drain_with(*values):
    drain = Drain()
    for value in values:
        drain.send(value)
    return drain


# Sending and collecting


def test_what_is_sent_is_collected_in_order():
    drain = drain_with("a", "b", "c")
    assert drain.collect() == ["a", "b", "c"]


def test_a_thousand_sends_are_a_thousand_results_in_order():
    drain = Drain[int]()
    for n in range(1_000):
        drain.send(n)
        assert drain.count == drain.total == n + 1
    assert drain.collect() == list(range(1_000))


def test_collecting_takes_what_is_there_and_leaves_nothing():
    drain = drain_with(1, 2)
    assert drain.collect() == [1, 2]
    assert drain.collect() == []
    drain.send(3)
    assert drain.collect() == [3]


def test_a_collected_list_is_the_callers_own():
    drain = drain_with(1, 2)
    first = drain.collect()
    first.append("mine")
    drain.send(3)
    second = drain.collect()
    assert first == [1, 2, "mine"]
    assert second == [3]


def test_count_is_what_is_here_and_total_is_all_that_was_sent():
    drain = Drain()
    assert (drain.count, drain.total) == (0, 0)
    drain.send("a")
    drain.send("b")
    assert (drain.count, drain.total) == (2, 2)
    drain.collect()
    drain.send("c")
    assert (drain.count, drain.total) == (1, 3)


def test_values_are_passed_through_as_they_are():
    error = ValueError("a value like any other")
    values = [None, False, (), StopIteration(), error, StopAsyncIteration]
    found = drain_with(*values).collect()
    assert all(one is other for one, other in zip(found, values, strict=True))


def test_a_drain_keeps_nothing_that_was_collected():
    class Value:
        pass

    drain = drain_with(Value())
    (value,) = drain.collect()
    gone = weakref.ref(value)
    del value
    gc.collect()
    assert gone() is None


def test_drains_are_told_apart_by_identity():
    assert Drain() != Drain()
    assert len({Drain(), Drain()}) == 2


# Closing


def test_a_closed_drain_refuses_values_and_gives_what_it_has():
    drain = drain_with(1)
    assert not drain.closed
    drain.close()
    assert drain.closed
    with pytest.raises(trio.ClosedResourceError, match="closed"):
        drain.send(2)
    assert (drain.count, drain.total) == (1, 1)
    assert drain.collect() == [1]
    assert drain.collect() == []


def test_closing_again_does_nothing():
    drain = drain_with(1)
    drain.close()
    drain.close()
    assert drain.closed
    assert drain.collect() == [1]


async def test_readers_of_a_closed_drain_read_what_is_left_and_stop():
    drain = drain_with(1, 2)
    drain.close()
    assert [value async for value in drain] == [1, 2]
    assert [value async for value in drain] == []


async def test_closing_stops_every_waiting_reader():
    drain = Drain()
    values = []
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(read_all, drain, values)
        await wait_all_tasks_blocked()
        drain.send(1)
        drain.close()
    assert values == [1]


async def test_a_reader_may_close_the_drain_it_reads():
    drain = drain_with(1, 2, 3)
    values = []
    async for value in drain:
        values.append(value)
        drain.close()
    assert values == [1, 2, 3]


# Reading


async def test_a_reader_waits_for_more(autojump_clock):
    drain = drain_with("at once")

    async def send_later():
        for value in ("later", "at last"):
            await trio.sleep(1.5)
            drain.send(value)
        drain.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_later)
        start = trio.current_time()
        values = [(value, trio.current_time()) async for value in drain]
    assert values == [
        ("at once", start),
        ("later", start + 1.5),
        ("at last", start + 3.0),
    ]


async def test_a_thousand_values_sent_at_once_reach_a_waiting_reader_in_order():
    drain = Drain()
    values = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_all, drain, values)
        await wait_all_tasks_blocked()
        for n in range(1_000):
            drain.send(n)
        drain.close()
    assert values == list(range(1_000))


async def test_each_value_goes_to_exactly_one_reader():
    drain = Drain()
    readers = [[], [], []]
    async with trio.open_nursery() as nursery:
        for values in readers:
            nursery.start_soon(read_all, drain, values)
        for n in range(30):
            drain.send(n)
            if n % 7 == 0:
                await wait_all_tasks_blocked()
        drain.close()
    assert sorted(itertools.chain(*readers)) == list(range(30))
    assert all(values == sorted(values) for values in readers)


async def test_who_waits_longest_is_served_first():
    drain = Drain()
    served = []

    async def read(name):
        served.append((name, await anext(drain)))

    async with trio.open_nursery() as nursery:
        for name in ("first", "second", "third"):
            nursery.start_soon(read, name)
            await wait_all_tasks_blocked()
        for value in (1, 2, 3):
            drain.send(value)
    assert sorted(served, key=lambda pair: pair[1]) == [
        ("first", 1),
        ("second", 2),
        ("third", 3),
    ]


async def test_a_newcomer_does_not_overtake_the_reader_that_waits():
    drain = Drain()
    values = []

    async def read_one():
        values.append(await anext(drain))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_one)
        await wait_all_tasks_blocked()
        drain.send("the waiting one's")
        drain.send("the newcomer's")
        assert await anext(drain) == "the newcomer's"
    assert values == ["the waiting one's"]


async def test_a_value_given_to_a_waiting_reader_is_not_collected_as_well():
    drain = Drain()
    values = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_all, drain, values)
        await wait_all_tasks_blocked()
        drain.send(1)
        drain.send(2)
        assert (drain.count, drain.total) == (1, 2)
        assert drain.collect() == [2]
        drain.close()
    assert values == [1]


async def test_collecting_leaves_a_reader_waiting_for_the_next():
    drain = Drain()
    values = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_all, drain, values)
        await wait_all_tasks_blocked()
        assert drain.collect() == []
        drain.send(1)
        await wait_all_tasks_blocked()
        drain.close()
    assert values == [1]


async def test_an_error_as_a_value_is_read_and_not_raised():
    drain = Drain()
    values = []
    error = ValueError("only a value")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_all, drain, values)
        await wait_all_tasks_blocked()
        drain.send(error)
        drain.close()
    assert values == [error]


async def test_every_read_is_a_checkpoint():
    drain = drain_with(1)
    with assert_checkpoints():
        await anext(drain)
    async with trio.open_nursery() as nursery:

        async def read_waiting():
            with assert_checkpoints():
                await anext(drain)

        nursery.start_soon(read_waiting)
        await wait_all_tasks_blocked()
        drain.send(2)
    drain.close()
    with assert_checkpoints(), pytest.raises(StopAsyncIteration):
        await anext(drain)


async def test_a_reader_with_much_to_read_lets_others_run():
    drain = drain_with(*range(50))
    turns = 0

    async def other():
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        for _ in range(50):
            await anext(drain)
        nursery.cancel_scope.cancel()
    assert turns >= 25


# Cancelling readers


async def test_a_read_cancelled_before_it_begins_takes_nothing():
    drain = drain_with(1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await anext(drain)
    assert scope.cancelled_caught
    assert drain.collect() == [1]


async def test_a_read_of_a_closed_drain_can_be_cancelled():
    drain = Drain()
    drain.close()
    with trio.CancelScope() as scope:
        scope.cancel()
        await anext(drain)
    assert scope.cancelled_caught


async def test_a_waiting_read_that_is_cancelled_leaves_no_trace(autojump_clock):
    drain = Drain()
    with trio.move_on_after(1.5) as scope:
        await anext(drain)
    assert scope.cancelled_caught
    assert "0 reading" in repr(drain)
    drain.send(1)
    assert drain.collect() == [1]


async def test_a_value_sent_in_the_tick_before_the_cancel_is_read():
    drain = Drain()
    values = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_all, drain, values)
        await wait_all_tasks_blocked()
        drain.send(1)
        nursery.cancel_scope.cancel()
    assert values == [1]
    assert drain.collect() == []


async def test_a_value_sent_in_the_tick_after_the_cancel_stays():
    drain = Drain()
    values = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_all, drain, values)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        drain.send(1)
    assert values == []
    assert drain.collect() == [1]


async def test_a_value_sent_after_the_cancel_goes_to_the_next_reader():
    drain = Drain()
    values = []
    scope = trio.CancelScope()

    async def read_in_scope():
        with scope:
            await anext(drain)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_in_scope)
        await wait_all_tasks_blocked()
        nursery.start_soon(read_all, drain, values)
        await wait_all_tasks_blocked()
        scope.cancel()
        drain.send(1)
        drain.close()
    assert scope.cancelled_caught
    assert values == [1]


async def test_a_read_cancelled_while_it_yields_returns_its_value():
    drain = drain_with(1, 2)
    values = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_all, drain, values)
        while drain.count == 2:
            # One turn: the reader has taken a value and has not returned it.
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert values + drain.collect() == [1, 2]
    assert values


async def test_closing_in_the_tick_of_a_cancel_stops_or_cancels_the_reader():
    for close_first in (True, False):
        drain = Drain()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_all, drain, [])
            await wait_all_tasks_blocked()
            if close_first:
                drain.close()
            nursery.cancel_scope.cancel()
            drain.close()
        assert "0 reading" in repr(drain)


@given(
    st.lists(
        st.sampled_from(["send", "read", "cancel", "collect", "turn", "rest"]),
        max_size=40,
    )
)
def test_whatever_happens_each_value_is_had_exactly_once(steps):
    async def main():
        drain = Drain()
        read, collected = [], []
        scopes = []
        sent = 0

        async def read_in(scope):
            with scope:
                await read_all(drain, read)

        async with trio.open_nursery() as nursery:
            for step in steps:
                if step == "send":
                    drain.send(sent)
                    sent += 1
                elif step == "read":
                    scopes.append(trio.CancelScope())
                    nursery.start_soon(read_in, scopes[-1])
                elif step == "cancel" and scopes:
                    scopes.pop(0).cancel()
                elif step == "collect":
                    taken = drain.collect()
                    assert taken == sorted(taken)
                    collected += taken
                elif step == "turn":
                    await trio.lowlevel.checkpoint()
                else:
                    await wait_all_tasks_blocked()
                assert drain.total == sent
                # A value on its way to a reader is in neither.
                assert len(read) + len(collected) + drain.count <= sent
            drain.close()
        collected += drain.collect()
        assert sorted(read + collected) == list(range(sent))

    trio.run(main)


# From outside of trio, and from other threads


def test_a_drain_outlives_the_run_that_filled_it():
    drain = Drain()

    async def main():
        drain.send(1)

    trio.run(main)
    drain.send(2)
    assert drain.collect() == [1, 2]


async def test_a_send_from_another_thread_costs_a_waiting_reader_nothing():
    drain = Drain()
    values = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_all, drain, values)
        await wait_all_tasks_blocked()
        with pytest.raises(RuntimeError):
            await trio.to_thread.run_sync(drain.send, "refused")
        assert drain.total == 0
        await trio.to_thread.run_sync(trio.from_thread.run_sync, drain.send, "passed")
        await wait_all_tasks_blocked()
        drain.close()
    assert values == ["passed"]


# Its face


async def test_its_repr_has_live_counts():
    drain = Drain()
    assert repr(drain) == ("<trio_pool.Drain: 0 to collect, 0 sent, 0 reading, open>")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_all, drain, [])
        await wait_all_tasks_blocked()
        assert "1 reading" in repr(drain)
        drain.send(1)
        drain.send(2)
        drain.close()
        assert repr(drain) == (
            "<trio_pool.Drain: 1 to collect, 2 sent, 0 reading, closed>"
        )


def test_counts_cannot_be_set():
    drain = Drain()
    for name in ("count", "total", "closed", "other"):
        with pytest.raises(AttributeError):
            setattr(drain, name, 1)


def test_it_is_one_class_under_two_names():
    assert trio_pool.drain.Drain is Drain
    assert Drain.__final__


async def test_its_types_are_those_of_its_values():
    drain: Drain[int] = Drain()
    drain.send(1)
    assert_type(drain.collect(), list[int])
    drain.send(2)
    assert_type(await anext(drain), int)
    assert_type(Drain[str]().collect(), list[str])
    assert get_type_hints(Drain.send)["return"] is type(None)
    assert get_type_hints(Drain.collect)["return"].__origin__ is list
    for function in (Drain.__anext__, Drain.close, Drain.count.fget):
        assert "return" in get_type_hints(function)
