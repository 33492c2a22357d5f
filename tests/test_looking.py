"""What a running pool shows: its state, its jobs, chosen events, times of a window."""

from __future__ import annotations

import math
import pickle
from threading import Thread
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from trio_pool import (
    Backoff,
    EventsLost,
    Hooks,
    JobChanged,
    PoolBroken,
    PoolConfig,
    PoolState,
    Restart,
    Retry,
    WrongThread,
    current_job,
    open_pool,
)
from trio_pool._dispatch import Dispatch
from trio_pool._latency import Histogram, Latency
from trio_pool.testing import InlinePool

# The life of a pool


async def test_a_pool_says_where_it_is_in_its_life(autojump_clock):
    async with open_pool(1, trio.sleep) as pool:
        assert pool.state is PoolState.OPEN
        pool.pause()
        assert pool.state is PoolState.PAUSED
        pool.resume()
        assert pool.state is PoolState.OPEN
        await pool.submit(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.shutdown)
            await trio.sleep(0.5)
            assert pool.state is PoolState.CLOSING
        assert pool.state is PoolState.CLOSED
    assert pool.state is PoolState.CLOSED


async def test_closing_a_paused_pool_is_closing(autojump_clock):
    async with open_pool(1, trio.sleep) as pool:
        await pool.submit(1)
        pool.pause()
        pool.cancel()
        assert pool.state is PoolState.CLOSING
    assert pool.state is PoolState.CLOSED


async def test_a_broken_pool_says_so_for_good(autojump_clock):
    async def die(_: object) -> None:
        raise SystemExit

    with pytest.raises(PoolBroken):
        async with open_pool(1, die, restart=Restart(limit=0)) as pool:
            reply = await pool.submit(None)
            with pytest.raises(Exception, match="job 1"):
                await reply.wait()
            await trio.sleep(1)
    assert pool.state is PoolState.BROKEN


async def test_the_state_can_be_read_from_any_thread():
    found: list[Any] = []
    async with open_pool(1, trio.sleep) as pool:
        thread = Thread(target=lambda: found.append((pool.state, pool.config.size)))
        thread.start()
        await trio.to_thread.run_sync(thread.join)
    assert found == [(PoolState.OPEN, 1)]


async def test_a_pool_shows_its_options_with_what_plugins_brought():
    class Plugin(Hooks):
        name = "it"

        def __init__(self) -> None:
            self.hooks = [self]

        async def __aenter__(self) -> None: ...

        async def __aexit__(self, *_: object) -> None: ...

    plugin = Plugin()
    async with open_pool(2, trio.sleep, max_backlog=7, plugins=[plugin]) as pool:
        assert pool.config.max_backlog == 7
        assert pool.config.hooks == (plugin,)


@pytest.mark.parametrize("left", [False, True])
async def test_an_inline_pool_says_where_it_is_too(left):
    async with InlinePool(trio.sleep) as pool:
        assert pool.state is PoolState.OPEN
        assert pool.config.size == 1
        pool.pause()
        assert pool.state is PoolState.PAUSED
        pool.resume()
        if not left:
            pool.cancel()
            assert pool.state is PoolState.CLOSED
    assert pool.state is PoolState.CLOSED


# What runs


async def test_the_jobs_that_run_are_described_with_their_inputs(autojump_clock):
    async with open_pool(2, trio.sleep) as pool:
        assert pool.running() == ()
        await pool.submit(5, id="five", key="k")
        await pool.submit(7)
        await pool.submit(9)
        await trio.sleep(1)
        found = {job.id: (job.input, job.attempt, job.key) for job in pool.running()}
        assert found == {"five": (5, 1, "k"), 2: (7, 1, None)}
        assert {job.worker for job in pool.running()} == {0, 1}
    assert pool.running() == ()


async def test_a_job_can_be_cancelled_by_its_description(autojump_clock):
    async with open_pool(1, trio.sleep, unobserved="ignore") as pool:
        reply = await pool.submit(math.inf)
        await trio.sleep(1)
        (job,) = pool.running()
        assert job.cancel()
        await pool.join()
        assert reply.state.value == "cancelled"
        assert not job.cancel()


async def test_items_of_a_map_are_described_while_they_run(autojump_clock):
    seen: list[Any] = []

    async def look(item: int) -> None:
        await trio.sleep(1)
        seen.append(sorted(job.input for job in pool.running()))

    async with open_pool(2, look) as pool:
        await pool.map([1, 2])
    assert seen[0] == [1, 2]


async def test_only_the_pools_thread_may_ask_what_runs():
    async with open_pool(1, trio.sleep) as pool:
        with pytest.raises(WrongThread):
            await trio.to_thread.run_sync(pool.running)


async def test_an_inline_pool_describes_the_job_that_runs():
    async def look(item: int) -> list[Any]:
        return [job.input for job in pool.running()]

    async with InlinePool(look) as pool:
        assert await pool.process(3) == [3]
        assert pool.running() == ()


async def test_a_job_knows_how_long_it_has_waited(autojump_clock):
    async def wait(seconds: float) -> float:
        await trio.sleep(seconds)
        return current_job().waited

    async with open_pool(1, wait) as pool:
        first, second = await pool.submit(2), await pool.submit(1)
        third = await pool.submit(1, delay=2.5)
        assert [await r.wait() for r in (first, second, third)] == [0.0, 2.0, 0.5]
        assert await pool.map([1, 1]) == [0.0, 0.0]


async def test_a_job_that_is_tried_again_has_waited_anew(autojump_clock):
    waits: list[float] = []

    async def fail_once(_: object) -> None:
        waits.append(current_job().waited)
        await trio.sleep(1)
        if len(waits) == 1:
            raise ValueError

    retry = Retry(2, backoff=Backoff(initial=3, jitter=0))
    async with open_pool(1, fail_once, retry=retry) as pool:
        await pool.process(None)
    assert waits == [0.0, 0.0]


# Events of some kinds


async def fail_odd(item: int) -> int:
    if item % 2:
        raise ValueError(item)
    return item


async def test_a_stream_of_some_kinds_hears_no_others():
    async with open_pool(1, fail_odd) as pool:
        async with pool.events(kinds={"job_error", "resize"}) as events:
            await pool.settle(range(4))
            await pool.resize(2)
            await pool.shutdown()
            assert [event.kind async for event in events] == [
                *("job_error", "job_error", "resize"),
            ]


async def test_such_a_stream_ends_with_the_pool_though_it_does_not_hear_of_it():
    async with open_pool(1, fail_odd) as pool, pool.events(kinds=["resize"]) as events:
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pool.shutdown)
                assert [event async for event in events] == []


async def test_a_slow_reader_of_some_kinds_loses_only_those():
    async with open_pool(1, fail_odd) as pool:
        async with pool.events(buffer=1, kinds=["job_error"]) as events:
            await pool.settle(range(6))
            first = await anext(events)
            assert isinstance(first, EventsLost)
            assert first.count == 2


@pytest.mark.parametrize(
    ("kinds", "error"),
    [
        ("job_error", TypeError),
        (3, TypeError),
        (["job_eror"], ValueError),
        ([], ValueError),
        ([3], ValueError),
    ],
)
async def test_kinds_that_are_none_are_refused(kinds, error):
    async with open_pool(1, fail_odd) as pool:
        with pytest.raises(
            error, match=r"kinds must be a collection of kinds.*job_err"
        ):
            async with pool.events(kinds=kinds):
                pass


class OnlyFailures(Hooks):
    def on_job_error(self, event: JobChanged) -> None: ...


class Starts(Hooks):
    def on_job_start(self, event: JobChanged) -> None: ...


@pytest.mark.parametrize(
    ("hooks", "asks"), [([], False), ([OnlyFailures()], False), ([Starts()], True)]
)
def test_items_of_a_map_are_pulled_without_asking_where_only_failures_are_heard_of(
    hooks, asks
):
    dispatch = Dispatch(PoolConfig(hooks=hooks))
    assert dispatch.tells_each is asks
    assert dispatch.watched is bool(hooks)


async def test_every_failure_of_a_map_is_heard_of_by_who_hears_of_nothing_else():
    async with open_pool(3, fail_odd) as pool, pool.events(kinds=["job_error"]) as told:
        await pool.settle(range(1000))
        await pool.shutdown()
        assert len([event async for event in told]) == 500
    count = pool.statistics()
    assert (count.accepted, count.done, count.failed) == (1000, 500, 500)


# Times


def latency_of(times: list[float]) -> Latency:
    histogram = Histogram()
    for time in times:
        histogram.add(time, 1)
    return histogram.latency()


seconds = st.floats(2.0**-14, 1e4)


@given(st.lists(seconds, max_size=30), st.integers(-14, 12))
def test_the_count_below_a_power_of_two_is_exact(times, power):
    edge = 2.0**power
    assert latency_of(times).below(edge) == sum(time < edge for time in times)


@given(st.lists(seconds, max_size=30), st.lists(seconds, max_size=30))
def test_a_window_counts_what_came_since(before, after):
    earlier, later = latency_of(before), latency_of(before + after)
    window, alone = later.since(earlier), latency_of(after)
    assert window.count == len(after)
    assert window.mean == pytest.approx(alone.mean, abs=1e-6)
    for name in ("p50", "p95", "p99"):
        here, there = getattr(window, name), getattr(alone, name)
        assert here == pytest.approx(there, rel=0.13), name
    if after:
        assert alone.max <= window.max * (1 + 1e-9) <= 1.13 * alone.max


def test_a_window_of_nothing_is_empty():
    latency = latency_of([1.0, 2.0])
    assert latency.since(latency) == latency_of([])
    assert latency_of([]).since(latency_of([])) == latency_of([])
    assert latency_of([1.0]).since(latency) == latency_of([])


def test_quick_times_whose_mean_moves_take_nothing_from_a_window():
    earlier, later = Histogram(), Histogram()
    earlier.add(1e-6, 100)
    later.add(9e-6, 150)
    later.add(1.0, 1)
    window = later.latency().since(earlier.latency())
    assert window.count == 51
    assert later.latency().below(2.0**-15) == 150


def test_times_keep_their_cells_when_they_are_pickled():
    latency = latency_of([0.0, 0.5, 3.0])
    copy = pickle.loads(pickle.dumps(latency))
    assert copy == latency
    assert copy.below(1.0) == latency.below(1.0) == 2
    assert latency.below(0.0) == 0
    assert "cells" not in repr(latency)
