"""`map`, `settle` and `stream`: many jobs at once, in the three ways to read them."""

from __future__ import annotations

import itertools
import math
import pickle
import tracemalloc
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
)
from contextlib import asynccontextmanager
from contextvars import ContextVar
from time import perf_counter
from typing import Any

import attrs
import outcome
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_pool import (
    JobCancelled,
    JobChanged,
    JobTimeout,
    Pool,
    PoolBroken,
    PoolClosed,
    Restart,
    Retry,
    Settled,
    WorkerCrashed,
    current_job,
    open_pool,
)

# Three ways to ask for all outcomes, for tests of what they have in common.
Read = Callable[[Pool[Any, Any], Any], Awaitable[list[Any]]]


async def by_map(pool: Pool[Any, Any], items: Any) -> list[Any]:
    return await pool.map(items)


async def by_settle(pool: Pool[Any, Any], items: Any) -> list[Any]:
    return [settled.outcome.unwrap() for settled in await pool.settle(items)]


async def by_stream(pool: Pool[Any, Any], items: Any) -> list[Any]:
    async with pool.stream(items) as results:
        return [result async for result in results]


async def by_unordered_stream(pool: Pool[Any, Any], items: Any) -> list[Any]:
    async with pool.stream(items, ordered=False) as results:
        return [result async for result in results]


every_way = pytest.mark.parametrize(
    "read", [by_map, by_settle, by_stream, by_unordered_stream]
)


class Broken(Exception):
    """What a handler or an input raises."""


class Source:
    """An iterable of 0, 1, 2, ... that counts what was pulled, and may fail."""

    def __init__(
        self, end: float = math.inf, error: BaseException | None = None
    ) -> None:
        self.end = end
        self.error = error
        self.pulled = 0

    def pull(self, stop: type[Exception]) -> int:
        if self.pulled < self.end:
            self.pulled += 1
            return self.pulled - 1
        raise stop if self.error is None else self.error

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        return self.pull(StopIteration)


class AsyncSource(Source):
    """The same as an async iterable."""

    __iter__ = None  # type: ignore[assignment]

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        await trio.lowlevel.checkpoint()
        return self.pull(StopAsyncIteration)


every_source = pytest.mark.parametrize("source", [Source, AsyncSource])


async def double(x: int) -> int:
    return 2 * x


async def sleepy(x: float) -> float:
    await trio.sleep(x)
    return x


async def stuck(x: object) -> object:
    await trio.sleep_forever()
    return x


async def odd_fails(x: int) -> int:
    if x % 2:
        raise ValueError(x)
    return x


class Handled:
    """A handler that waits to be let go, and records what has become of each item."""

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.cancelled: list[Any] = []
        self.ended: list[Any] = []
        self.go = trio.Event()

    async def __call__(self, x: Any) -> Any:
        self.started.append(x)
        try:
            await self.go.wait()
        except trio.Cancelled:
            self.cancelled.append(x)
            # Cleaning up takes its time.
            with trio.CancelScope(shield=True):
                await trio.sleep(0.25)
            raise
        finally:
            self.ended.append(x)
        return x


def assert_idle(pool: Any) -> None:
    """The books are balanced, and nothing runs or waits."""
    count = pool.statistics()
    assert (count.queued, count.running, count.busy) == (0, 0, 0)
    ended = count.done + count.failed + count.timed_out
    assert count.accepted == ended + count.cancelled + count.dropped + count.lost


async def by_outcomes(pool: Pool[Any, Any], items: Any) -> list[Any]:
    async with pool.stream(items, outcomes=True) as results:
        return [settled.outcome.unwrap() async for settled in results]


# ---- order and results


async def test_map_returns_results_in_input_order(autojump_clock: MockClock) -> None:
    """The slowest item is first in, last ready, and first out."""
    async with open_pool(3, sleepy) as pool:
        assert await pool.map([1.5, 0.5, 1.0, 0.25]) == [1.5, 0.5, 1.0, 0.25]
    assert trio.current_time() == 1.5


async def test_settle_returns_every_outcome_in_input_order(
    autojump_clock: MockClock,
) -> None:
    async def handler(x: float) -> float:
        await trio.sleep(x)
        if x == 0.5:
            raise ValueError(x)
        return -x

    async with open_pool(2, handler) as pool:
        results = await pool.settle([1.0, 0.5, 0.25])
    assert [(s.index, s.item) for s in results] == [(0, 1.0), (1, 0.5), (2, 0.25)]
    assert results[0] == Settled(0, 1.0, outcome.Value(-1.0))
    assert isinstance(results[1].outcome, outcome.Error)
    with pytest.raises(ValueError, match=r"0\.5"):
        results[1].outcome.unwrap()
    assert results[2].outcome.unwrap() == -0.25


async def test_an_ordered_stream_gives_results_in_input_order(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(3, sleepy) as pool, pool.stream([1.5, 0.5, 1.0]) as results:
        assert [x async for x in results] == [1.5, 0.5, 1.0]


async def test_an_unordered_stream_gives_results_as_they_are_ready(
    autojump_clock: MockClock,
) -> None:
    async with (
        open_pool(3, sleepy) as pool,
        pool.stream([1.5, 0.5, 1.0], ordered=False) as results,
    ):
        times = [(x, trio.current_time()) async for x in results]
    assert times == [(0.5, 0.5), (1.0, 1.0), (1.5, 1.5)]


async def test_an_ordered_result_is_given_while_later_items_run(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(2, sleepy) as pool:
        async with pool.stream([0.5, 4.0]) as results:
            assert await anext(results) == 0.5
            assert trio.current_time() == 0.5
            assert await anext(results) == 4.0
            with pytest.raises(StopAsyncIteration):
                await anext(results)


@every_way
@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
@every_source
async def test_each_item_is_handled_once(
    read: Read, source: type[Source], count: int
) -> None:
    """However many items and workers there are, and whatever the input is."""
    seen = []

    async def handler(x: int) -> int:
        seen.append(x)
        return 2 * x

    async with open_pool(3, handler) as pool:
        results = await read(pool, source(count))
        assert sorted(results) == [2 * x for x in range(count)]
        if read is not by_unordered_stream:
            assert results == sorted(results)
        assert_idle(pool)
        assert pool.statistics().done == count
    assert sorted(seen) == list(range(count))


@every_way
@pytest.mark.parametrize(
    "make",
    [list, tuple, dict.fromkeys, iter, lambda items: (x for x in items)],
    ids=["list", "tuple", "dict", "iterator", "generator"],
)
async def test_any_iterable_is_an_input(read: Read, make: Callable[..., Any]) -> None:
    async with open_pool(1, double) as pool:
        assert await read(pool, make(range(3))) == [0, 2, 4]


@every_way
async def test_an_async_generator_is_an_input(
    read: Read, autojump_clock: MockClock
) -> None:
    async def items() -> AsyncIterator[int]:
        for x in range(4):
            await trio.sleep(0.25)
            yield x

    async with open_pool(2, double) as pool:
        assert await read(pool, items()) == [0, 2, 4, 6]


@every_way
async def test_what_is_not_iterable_is_refused_by_name(read: Read) -> None:
    async with open_pool(1, double) as pool:
        with pytest.raises(TypeError, match=r"items must be .*iterable.*got 5"):
            await read(pool, 5)
        assert pool.statistics().accepted == 0


@pytest.mark.parametrize(("ahead", "kind"), [(0, ValueError), (1.5, TypeError)])
async def test_a_bad_ahead_is_refused(ahead: Any, kind: type[Exception]) -> None:
    async with open_pool(1, double) as pool:
        with pytest.raises(kind, match="ahead must be"):
            pool.stream([], ahead=ahead)


@pytest.mark.parametrize("method", ["map", "settle", "stream"])
@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("timeout", 0, ValueError),
        ("timeout", "1", TypeError),
        ("priority", 0.5, TypeError),
    ],
)
async def test_bad_options_of_jobs_are_refused(
    method: str, option: str, value: Any, kind: type[Exception]
) -> None:
    async with open_pool(1, double) as pool:
        with pytest.raises(kind, match=f"{option} must be"):
            # Making the stream refuses already; the other two are awaited.
            await getattr(pool, method)([1], **{option: value})


async def test_a_task_pool_calls_the_function_with_each_item(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(2) as pool:
        assert await pool.map(double, range(3)) == [0, 2, 4]
        settled = await pool.settle(odd_fails, [0, 1])
        assert settled[0] == Settled(0, 0, outcome.Value(0))
        assert (settled[1].item, settled[1].index) == (1, 1)
        async with pool.stream(sleepy, [0.5, 0.25], ordered=False) as results:
            assert [x async for x in results] == [0.25, 0.5]
        async with pool.stream(odd_fails, [1], outcomes=True) as outcomes:
            assert [s.item async for s in outcomes] == [1]
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map(odd_fails, [1])
        assert "item 0: 1" in caught.value.exceptions[0].__notes__[0]


@pytest.mark.parametrize("method", ["map", "settle", "stream"])
async def test_a_task_pool_refuses_what_cannot_be_called(method: str) -> None:
    async with open_pool(1) as pool:
        with pytest.raises(TypeError, match="async_fn must be an async function"):
            await getattr(pool, method)(5, [1])


async def test_several_maps_share_the_workers(autojump_clock: MockClock) -> None:
    results: dict[int, list[float]] = {}

    async def one(name: int) -> None:
        results[name] = await pool.map([name * 0.25] * 4)

    async with open_pool(3, sleepy) as pool, trio.open_nursery() as nursery:
        for name in range(5):
            nursery.start_soon(one, name)
    assert results == {name: [name * 0.25] * 4 for name in range(5)}


@settings(deadline=None)
@given(
    size=st.integers(1, 4),
    ahead=st.integers(1, 5),
    slow_source=st.booleans(),
    plan=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=12),
)
def test_every_way_tells_what_direct_calls_would_tell(
    size: int, ahead: int, slow_source: bool, plan: list[tuple[int, bool]]
) -> None:
    """Whatever the durations, failures, sizes and bounds are."""
    running = most = 0

    async def handler(item: tuple[int, tuple[int, bool]]) -> int:
        nonlocal running, most
        index, (quarters, fails) = item
        running += 1
        most = max(most, running)
        try:
            if quarters:
                await trio.sleep(quarters * 0.25)
        finally:
            running -= 1
        if fails:
            raise ValueError(index)
        return index

    async def slowly() -> AsyncIterator[Any]:
        for item in enumerate(plan):
            await trio.sleep(0.25)
            yield item

    def items() -> Any:
        return slowly() if slow_source else enumerate(plan)

    def read(settled: Settled[Any, int]) -> tuple[int, bool]:
        assert settled.item == (settled.index, plan[settled.index])
        fails = isinstance(settled.outcome, outcome.Error)
        if not fails:
            assert settled.outcome.unwrap() == settled.index
        return settled.index, fails

    async def main() -> None:
        expected = [(index, fails) for index, (_, fails) in enumerate(plan)]
        async with open_pool(size, handler, max_backlog=0) as pool:
            assert [read(s) for s in await pool.settle(items())] == expected
            for ordered in (True, False):
                async with pool.stream(
                    items(), ordered=ordered, ahead=ahead, outcomes=True
                ) as results:
                    told = [read(s) async for s in results]
                assert (told if ordered else sorted(told)) == expected
            # A generator that a failing map leaves behind is nobody's to close.
            if any(fails for _, fails in plan):
                with pytest.raises(ExceptionGroup) as caught:
                    await pool.map(enumerate(plan))
                for error in caught.value.exceptions:
                    assert expected[error.args[0]][1]
            else:
                assert await pool.map(items()) == list(range(len(plan)))
            assert_idle(pool)
        assert most <= size

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_the_records_of_settle_are_frozen_and_as_if_made_one_by_one() -> None:
    """So are their outcomes, each of which can be unwrapped once."""
    async with open_pool(2, double) as pool:
        results = await pool.settle(range(1500))
    made = [Settled(x, x, outcome.Value(2 * x)) for x in range(1500)]
    assert results == made
    assert repr(results[:3]) == repr(made[:3])
    for settled in results[:3]:
        assert type(settled) is Settled
        assert type(settled.outcome) is outcome.Value
        assert hash(settled) == hash(made[settled.index])
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            settled.index = 5  # type: ignore[misc]
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            settled.outcome.value = 5  # type: ignore[misc, union-attr]
        assert pickle.loads(pickle.dumps(settled)) == settled
        settled.outcome.unwrap()
        with pytest.raises(outcome.AlreadyUsedError):
            settled.outcome.unwrap()


async def test_failures_among_many_values_keep_their_places() -> None:
    async with open_pool(3, odd_fails) as pool:
        settled = await pool.settle(range(1201))
        async with pool.stream(range(1201), outcomes=True) as results:
            streamed = [s async for s in results]
    for found in (settled, streamed):
        assert [(s.index, s.item) for s in found] == [(x, x) for x in range(1201)]
        for s in found:
            if s.item % 2:
                assert isinstance(s.outcome, outcome.Error)
                assert s.outcome.error.args == (s.item,)
            else:
                assert s.outcome == outcome.Value(s.item)


@pytest.mark.parametrize(
    "read", [by_map, by_settle, by_stream, by_unordered_stream, by_outcomes]
)
@pytest.mark.parametrize("every", [1, 3, 50, 1000])
async def test_the_books_are_right_at_every_moment_of_a_batch(
    read: Read, every: int, autojump_clock: MockClock
) -> None:
    """Also where items of many that need no sleep look at them."""
    started = finished = most = 0
    ids = set()

    async def handler(x: int) -> int:
        nonlocal started, finished, most
        started += 1
        look(x)
        if x % every == 0:
            await trio.sleep(0.25 * (x % 3))
            look(x)
        finished += 1
        return x

    def look(x: int) -> None:
        count = pool.statistics()
        assert count.accepted == count.done + count.running
        # A worker may have its next item and not have begun with it.
        assert finished <= count.done <= finished
        assert started <= count.accepted <= started + 3
        assert sum(worker.jobs for worker in pool.workers()) in range(
            started, started + 4
        )
        job = current_job()
        assert job.input == x
        ids.add((x, job.id))

    def items() -> Iterator[int]:
        for x in range(300):
            count = pool.statistics()
            assert finished - 3 <= count.done <= finished
            assert sum(w.jobs for w in pool.workers()) <= started + 3
            yield x

    async with open_pool(3, handler) as pool:
        assert sorted(await read(pool, items())) == list(range(300))
        count = pool.statistics()
        assert count.done == count.accepted == count.run.count == 300
        assert sum(worker.jobs for worker in pool.workers()) == 300
        # The ids are the items' own, and an item keeps the one that it has.
        assert len(ids) == len({x for x, _ in ids}) == len({i for _, i in ids}) == 300
        assert sorted(await read(pool, range(300))) == list(range(300))
        assert pool.statistics().run.count == 600
        assert sum(worker.jobs for worker in pool.workers()) == 600


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("outcomes", [True, False])
async def test_a_stream_keeps_nothing_of_what_was_read(
    ordered: bool, outcomes: bool
) -> None:
    class Thing:
        pass

    alive: weakref.WeakSet[Thing] = weakref.WeakSet()

    async def handler(_: Thing) -> Thing:
        result = Thing()
        alive.add(result)
        return result

    def items() -> Iterator[Thing]:
        for _ in range(100):
            item = Thing()
            alive.add(item)
            yield item

    async with open_pool(2, handler) as pool:
        async with pool.stream(
            items(), ahead=4, ordered=ordered, outcomes=outcomes
        ) as results:
            async for _ in results:  # type: ignore[attr-defined]
                # An item and its result for each in the window, for the one
                # that was read, and a few that frames of workers hold.
                assert len(alive) <= 2 * (4 + 1 + 2)


@settings(deadline=None)
@given(
    size=st.integers(1, 4),
    ahead=st.integers(1, 20),
    ordered=st.booleans(),
    sleeps=st.lists(st.integers(0, 3), max_size=60),
    pauses=st.lists(st.integers(0, 2), min_size=1, max_size=5),
)
def test_a_stream_is_never_further_ahead_than_it_may(
    size: int, ahead: int, ordered: bool, sleeps: list[int], pauses: list[int]
) -> None:
    """And as far as it may, whenever nothing else is to do."""
    taken = read = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for index in range(len(sleeps)):
            taken += 1
            assert taken <= read + ahead
            yield index

    async def handler(index: int) -> int:
        if sleeps[index]:
            await trio.sleep((sleeps[index] - 1) * 0.25)
        return index

    async def main() -> None:
        nonlocal read
        got = []
        async with open_pool(size, handler) as pool:
            async with pool.stream(items(), ahead=ahead, ordered=ordered) as results:
                async for index in results:
                    got.append(index)
                    read += 1
                    pause = pauses[index % len(pauses)]
                    if pause:
                        # Longer than 20 items ahead take one worker, or not at all.
                        await trio.sleep((pause - 1) * 20)
                        await wait_all_tasks_blocked()
                    if pause == 2:
                        assert taken == min(read + ahead, len(sleeps))
            assert_idle(pool)
            assert pool.statistics().done == len(sleeps)
        assert (got if ordered else sorted(got)) == list(range(len(sleeps)))

    trio.run(main, clock=MockClock(autojump_threshold=0))


# ---- pulling the input


@every_way
async def test_an_item_that_was_asked_for_as_the_pool_was_cancelled_never_runs(
    read: Read,
) -> None:
    """The input itself cancels the pool, and gives another item then."""
    seen = []

    async def handler(x: int) -> int:
        seen.append(x)
        return x

    def items() -> Iterator[int]:
        for x in range(100):
            if x == 20:
                pool.cancel()
            yield x

    async with open_pool(1, handler) as pool:
        # Read in another task, as the block ends with the pool.
        with pytest.raises((PoolClosed, JobCancelled, ExceptionGroup)):
            await read(pool, items())
    assert max(seen) < 20


@pytest.mark.parametrize("read", [by_map, by_settle])
@every_source
async def test_items_are_pulled_as_workers_become_free(
    read: Read, source: type[Source], autojump_clock: MockClock
) -> None:
    """An endless input is no problem, and no item waits in the backlog."""
    handled = Handled()
    items = source()
    async with open_pool(3, handled) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(read, pool, items)
        await wait_all_tasks_blocked()
        assert sorted(handled.started) == [0, 1, 2]
        # An async source is asked for the next items while the workers are busy,
        # one for each.
        assert items.pulled <= (3 if source is Source else 6)
        assert pool.statistics().queued == 0
        nursery.cancel_scope.cancel()


@every_source
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("ahead", [1, 3, 7])
async def test_a_stream_pulls_no_further_than_ahead_of_its_reader(
    source: type[Source], ordered: bool, ahead: int
) -> None:
    items = source()
    async with open_pool(4, double) as pool:
        async with pool.stream(items, ahead=ahead, ordered=ordered) as results:
            for read in range(4):
                await wait_all_tasks_blocked()
                assert items.pulled == read + ahead
                await anext(results)


@every_source
@pytest.mark.parametrize("size", [1, 3])
async def test_a_stream_is_twice_the_size_ahead_by_default(
    source: type[Source], size: int
) -> None:
    items = source()
    async with open_pool(size, double) as pool, pool.stream(items):
        await wait_all_tasks_blocked()
        assert items.pulled == 2 * size


async def test_the_first_result_does_not_wait_for_a_slow_source() -> None:
    """The source gives one item and then nothing for ever."""

    async def items() -> AsyncIterator[int]:
        yield 1
        await trio.sleep_forever()

    source = items()
    async with open_pool(2, double) as pool:
        async with pool.stream(source) as results:
            assert await anext(results) == 2
    await source.aclose()  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [0, 1, 3])
async def test_an_async_input_is_asked_for_one_item_more_than_each_worker_has(
    size: int,
) -> None:
    taken = 0

    async def items() -> AsyncIterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    async with open_pool(size, stuck) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.map, items())
        await wait_all_tasks_blocked()
        assert taken == max(1, 2 * size)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("size", [1, 3])
async def test_what_was_measured_of_a_long_map_is_not_kept_item_by_item(
    size: int,
) -> None:
    """Or an endless stream would take more and more memory."""
    sizes = []

    async def handler(x: int) -> None:
        await trio.lowlevel.checkpoint()
        if x % 5_000 == 4_000:
            tracemalloc.start()
            pool.statistics()
            sizes.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

    async with open_pool(size, handler) as pool:
        await pool.map(range(15_000))
        assert pool.statistics().run.count == 15_000
    assert max(sizes) < 100_000


@every_way
@pytest.mark.parametrize("is_async", [False, True])
async def test_ctrl_c_may_land_in_the_input(read: Read, is_async: bool) -> None:
    """Or nobody could end a program whose input never comes to an end."""
    protected = []

    class Items:
        def __iter__(self) -> Iterator[int]:
            return self

        def __next__(self) -> int:
            protected.append(trio.lowlevel.currently_ki_protected())
            if len(protected) > 4:
                raise StopIteration
            return len(protected)

    class AsyncItems:
        def __aiter__(self) -> AsyncIterator[int]:
            return self

        async def __anext__(self) -> int:
            protected.append(trio.lowlevel.currently_ki_protected())
            if len(protected) > 4:
                raise StopAsyncIteration
            return len(protected)

    async with open_pool(2, double) as pool:
        await read(pool, AsyncItems() if is_async else Items())
    assert protected == [False] * 5


@pytest.mark.parametrize("timeout", [math.inf, 9.0])
async def test_a_worker_counts_each_item_as_it_starts(timeout: float) -> None:
    """Be it pulled, or asked for as one with a timeout is."""
    started = 0

    async def handler(x: int) -> None:
        nonlocal started
        started += 1
        assert pool.workers()[0].jobs == started
        if x % 2:
            await trio.lowlevel.checkpoint()
        assert pool.workers()[0].jobs == started

    async with open_pool(1, handler) as pool:
        await pool.map(range(5), timeout=timeout)
        assert pool.workers()[0].jobs == started == 5


async def test_the_error_of_an_item_is_not_told_of_the_next() -> None:
    told: list[tuple[str, BaseException | None]] = []

    async with open_pool(1, odd_fails) as pool:

        async def listen(*, task_status: trio.TaskStatus[None]) -> None:
            async with pool.events() as events:
                task_status.started()
                async for event in events:
                    assert isinstance(event, JobChanged)
                    told.append((event.kind, event.error))

        async with trio.open_nursery() as nursery:
            await nursery.start(listen)
            await pool.settle([1, 2])
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    errors = [kind for kind, error in told if error is not None]
    assert errors == ["job_error"]
    assert [kind for kind, _ in told][-1] == "job_complete"


@every_way
async def test_a_map_never_uses_the_backlog(read: Read) -> None:
    """A bound of 0 lets it pass, and it is not counted as waiting."""
    async with open_pool(2, double, max_backlog=0, overflow="reject") as pool:
        assert sorted(await read(pool, range(10))) == [2 * x for x in range(10)]


async def test_a_map_leaves_the_backlog_to_others() -> None:
    handled = Handled()
    async with open_pool(1, handled, max_backlog=1) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.map, range(5))
            await wait_all_tasks_blocked()
            reply = pool.submit_nowait("mine")
            assert pool.statistics().queued == 1
            handled.go.set()
        assert await reply.wait() == "mine"


@every_way
@every_source
async def test_an_error_of_the_input_is_raised_bare(
    read: Read, source: type[Source]
) -> None:
    error = OSError("the input broke")
    async with open_pool(2, double) as pool:
        with pytest.raises(OSError, match="the input broke") as caught:
            await read(pool, source(5, error))
        assert caught.value is error
        assert_idle(pool)
        assert await pool.process(4) == 8


@pytest.mark.parametrize("read", [by_map, by_settle])
@every_source
async def test_an_error_of_the_input_cancels_what_runs_first(
    read: Read, source: type[Source], autojump_clock: MockClock
) -> None:
    handled = Handled()
    async with open_pool(3, handled) as pool:
        with pytest.raises(OSError, match="broken"):
            await read(pool, source(2, OSError("broken")))
        # Of an async source the second item may still have been on its way.
        assert 0 in handled.started
        started = sorted(handled.started)
        assert sorted(handled.cancelled) == sorted(handled.ended) == started
        assert pool.statistics().cancelled == len(handled.started)


async def test_an_error_of_the_input_comes_after_the_results_of_a_stream() -> None:
    async with open_pool(1, double) as pool:
        async with pool.stream(Source(2, OSError("broken"))) as results:
            assert await anext(results) == 0
            assert await anext(results) == 2
            for _ in range(2):
                with pytest.raises(OSError, match="broken"):
                    await anext(results)


@every_way
async def test_an_error_of_making_the_iterator_is_raised_bare(read: Read) -> None:
    class Broken:
        def __iter__(self) -> Iterator[int]:
            raise OSError("no iterator")

    async with open_pool(1, double) as pool:
        with pytest.raises(OSError, match="no iterator"):
            await read(pool, Broken())
        assert await pool.process(1) == 2


# ---- failures of jobs


async def test_the_first_failure_of_a_map_cancels_the_rest(
    autojump_clock: MockClock,
) -> None:
    """What runs is cancelled and waited for; what was not pulled never is."""
    ended = []

    async def handler(x: int) -> None:
        try:
            await trio.sleep(1 if x == 1 else 5)
            raise ValueError(x)
        finally:
            ended.append(x)

    items = Source()
    async with open_pool(3, handler) as pool:
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map(items)
        (error,) = caught.value.exceptions
        assert error.args == (1,)
        assert trio.current_time() == 1
        assert sorted(ended) == [0, 1, 2]
        assert items.pulled == 3
        count = pool.statistics()
        assert (count.failed, count.cancelled) == (1, 2)
        assert_idle(pool)


async def test_failures_of_a_map_carry_notes_that_name_their_items() -> None:
    """Also those that come while the rest is being cancelled."""

    async def handler(name: str) -> None:
        try:
            await (
                trio.sleep_forever()
            ) if name == "late" else await wait_all_tasks_blocked()
        except trio.Cancelled:
            raise OSError(name) from None
        raise ValueError(name)

    async with open_pool(2, handler) as pool:
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map(["early", "late"])
    first, second = caught.value.exceptions
    assert (type(first), type(second)) == (ValueError, OSError)
    assert "item 0: 'early'" in first.__notes__[0]
    assert "item 1: 'late'" in second.__notes__[0]


async def test_the_group_of_a_map_holds_the_errors_as_they_were_raised() -> None:
    error = ValueError("mine")

    async def handler(_: int) -> None:
        raise error

    async with open_pool(1, handler) as pool:
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map([1])
    assert caught.value.exceptions[0] is error
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    assert trace is not None
    assert trace.tb_frame.f_code.co_name == "handler"


async def test_an_item_whose_repr_fails_is_named_all_the_same() -> None:
    class Shy:
        def __repr__(self) -> str:
            raise RuntimeError("no name")

    async def handler(_: Shy) -> None:
        raise ValueError("x")

    async with open_pool(1, handler) as pool:
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map([Shy()])
    assert "item 0: <Shy whose repr failed>" in caught.value.exceptions[0].__notes__[0]


async def test_a_failed_map_is_not_reported_a_second_time() -> None:
    """The failure was heard: the pool's block ends well."""
    async with open_pool(1, odd_fails) as pool:
        with pytest.raises(ExceptionGroup):
            await pool.map([1])


async def test_the_timeout_of_a_map_is_each_items(autojump_clock: MockClock) -> None:
    async with open_pool(2, sleepy) as pool:
        assert await pool.map([1.0] * 4, timeout=1.5) == [1.0] * 4
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map([1.0, 2.0], timeout=1.5)
        (error,) = caught.value.exceptions
        assert isinstance(error, JobTimeout)
        assert error.timeout == 1.5
        assert "item 1: 2.0" in error.__notes__[0]
        slow = (await pool.settle([2.0, 1.0], timeout=1.5))[0]
        with pytest.raises(JobTimeout):
            slow.outcome.unwrap()
        assert pool.statistics().timed_out == 2


@pytest.mark.parametrize("retry", [None, Retry(2, on=ValueError)])
async def test_an_item_knows_nothing_of_the_fate_of_the_one_before(
    retry: Retry | None, autojump_clock: MockClock
) -> None:
    async def handler(x: float) -> float:
        if not x:
            assert current_job().cancel()
        return await sleepy(x)

    async with open_pool(1, handler) as pool:
        settled = await pool.settle([9.0, 8.0, 0.0, 7.0, 0.5], timeout=1, retry=retry)
    errors = [type(getattr(one.outcome, "error", None)) for one in settled]
    late, none = JobTimeout, type(None)
    assert errors == [late, late, JobCancelled, late, none]
    assert trio.current_time() == 3.5


async def test_a_failure_in_a_stream_is_raised_in_its_place() -> None:
    async with open_pool(2, odd_fails) as pool, pool.stream(range(4)) as results:
        assert await anext(results) == 0
        with pytest.raises(ValueError, match="1") as caught:
            await anext(results)
        assert "item 1: 1" in caught.value.__notes__[0]
        assert await anext(results) == 2
        with pytest.raises(ValueError, match="3"):
            await anext(results)
        with pytest.raises(StopAsyncIteration):
            await anext(results)


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_stream_of_outcomes_raises_nothing(ordered: bool) -> None:
    async with (
        open_pool(2, odd_fails) as pool,
        pool.stream(range(6), outcomes=True, ordered=ordered) as results,
    ):
        settled = sorted([s async for s in results], key=lambda s: s.index)
    assert [s.index for s in settled] == [s.item for s in settled] == list(range(6))
    for s in settled:
        assert isinstance(s.outcome, outcome.Error) == bool(s.item % 2)
        if not s.item % 2:
            assert s.outcome == outcome.Value(s.item)


async def test_stop_async_iteration_from_a_job_does_not_end_the_loop() -> None:
    async def handler(x: int) -> int:
        if x == 1:
            raise StopAsyncIteration(x)
        return x

    async with open_pool(1, handler) as pool:
        async with pool.stream(range(3)) as results:
            assert await anext(results) == 0
            with pytest.raises(RuntimeError, match="StopAsyncIteration") as caught:
                await anext(results)
            assert isinstance(caught.value.__cause__, StopAsyncIteration)
            assert [x async for x in results] == [2]
        async with pool.stream(range(3), outcomes=True) as outcomes:
            settled = [s async for s in outcomes]
        assert [s.index for s in settled] == [0, 1, 2]
        with pytest.raises(ExceptionGroup) as group:
            await pool.map(range(3))
        assert isinstance(group.value.exceptions[0], StopAsyncIteration)


async def test_stop_iteration_from_a_job_does_not_end_the_input() -> None:
    """Python wraps it where it leaves the coroutine; nothing is lost."""

    async def handler(x: int) -> int:
        if x == 1:
            raise StopIteration(x)
        return x

    async with open_pool(1, handler) as pool:
        settled = await pool.settle(range(3))
    assert [isinstance(s.outcome, outcome.Error) for s in settled] == [
        False,
        True,
        False,
    ]


async def test_a_worker_that_dies_fails_its_item_and_no_other(
    autojump_clock: MockClock,
) -> None:
    async def handler(x: int) -> int:
        await trio.sleep(0.25)
        if x == 1:
            raise SystemExit(3)
        return x

    async with open_pool(2, handler) as pool:
        settled = await pool.settle(range(5))
        assert pool.statistics().lost == 1
    dead = settled.pop(1)
    assert [s.outcome.unwrap() for s in settled] == [0, 2, 3, 4]
    with pytest.raises(WorkerCrashed) as caught:
        dead.outcome.unwrap()
    assert caught.value.started
    assert isinstance(caught.value.__cause__, SystemExit)


@every_way
async def test_a_broken_pool_breaks_a_map(
    read: Read, autojump_clock: MockClock
) -> None:
    """It is not left waiting for workers that never come."""

    class Fatal(Exception):
        pass

    async def handler(x: Any) -> Any:
        if x == "die":
            raise Fatal
        await trio.sleep(0.25)
        return x

    async def call(pool: Pool[Any, Any]) -> None:
        with pytest.raises(PoolBroken) as caught:
            await read(pool, itertools.count())
        assert isinstance(caught.value.__cause__, Fatal)

    once = Restart(limit=0)
    with pytest.raises(ExceptionGroup) as group:
        async with trio.open_nursery() as nursery:
            async with open_pool(2, handler, crash_on=Fatal, restart=once) as pool:
                nursery.start_soon(call, pool)
                await wait_all_tasks_blocked()
                with pytest.raises(Fatal):
                    await pool.process("die")
                await trio.sleep_forever()
    assert [type(error) for error in group.value.exceptions] == [PoolBroken]


# ---- leaving early, and failures that nobody read


@every_source
async def test_leaving_a_stream_early_leaves_nothing_running(
    source: type[Source], autojump_clock: MockClock
) -> None:
    handled = Handled()
    async with open_pool(3, handled) as pool:
        async with pool.stream(source(), ahead=5):
            await wait_all_tasks_blocked()
            assert sorted(handled.started) == [0, 1, 2]
        assert sorted(handled.cancelled) == sorted(handled.ended) == [0, 1, 2]
        assert trio.current_time() == 0.25
        assert_idle(pool)
        handled.go.set()
        assert await pool.process("next") == "next"


@every_source
async def test_a_break_ends_a_stream(
    source: type[Source], autojump_clock: MockClock
) -> None:
    items = source()
    async with open_pool(2, double) as pool:
        async with pool.stream(items, ahead=4) as results:
            async for x in results:
                if x == 6:
                    break
        assert items.pulled <= 4 + 4
        assert_idle(pool)


@every_source
async def test_an_error_leaves_the_block_of_a_stream_bare(
    source: type[Source], autojump_clock: MockClock
) -> None:
    handled = Handled()
    error = KeyError("mine")
    async with open_pool(2, handled) as pool:
        with pytest.raises(KeyError) as caught:
            async with pool.stream(source()):
                await wait_all_tasks_blocked()
                raise error
        assert caught.value is error
        assert sorted(handled.ended) == [0, 1]
        assert_idle(pool)


@pytest.mark.parametrize("ordered", [True, False])
async def test_failures_left_unread_in_a_stream_leave_the_pools_block(
    ordered: bool,
) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with open_pool(2, odd_fails) as pool:
            async with pool.stream(range(4), ordered=ordered) as results:
                assert await anext(results) == 0
                await wait_all_tasks_blocked()
    assert sorted(error.args for error in caught.value.exceptions) == [(1,), (3,)]


async def test_failures_left_unread_may_be_ignored() -> None:
    async with open_pool(2, odd_fails, unobserved="ignore") as pool:
        async with pool.stream(range(4)):
            await wait_all_tasks_blocked()


async def test_failures_that_were_read_are_not_reported_again() -> None:
    async with open_pool(2, odd_fails) as pool:
        async with pool.stream(range(4), outcomes=True) as results:
            async for _ in results:
                pass
        async with pool.stream([1, 2]) as plain:
            with pytest.raises(ValueError, match="1"):
                await anext(plain)


@pytest.mark.parametrize("ordered", [True, False])
async def test_reading_what_is_ready_lets_others_run(ordered: bool) -> None:
    """Not at each read, but whenever half a millisecond has passed."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with open_pool(1, double) as pool, trio.open_nursery() as nursery:
        async with pool.stream(range(20), ahead=20, ordered=ordered) as results:
            await wait_all_tasks_blocked()
            nursery.start_soon(other)
            await anext(results)
            before = turns
            for _ in range(6):
                end = perf_counter() + 0.0006
                while perf_counter() < end:
                    pass
                await anext(results)
            # Whose turn is first is left to chance, each time.
            assert turns - before >= 5
        nursery.cancel_scope.cancel()


async def test_two_readers_of_a_stream_are_refused() -> None:
    async with open_pool(1, stuck) as pool, pool.stream([1]) as results:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(anext, results)
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await anext(results)
            nursery.cancel_scope.cancel()


# ---- cancellation


@pytest.mark.parametrize("read", [by_map, by_settle, by_stream])
async def test_a_cancelled_call_waits_for_its_handlers(
    read: Read, autojump_clock: MockClock
) -> None:
    """They get `Cancelled`, clean up for 0.25 s, and then the call returns."""
    handled = Handled()
    async with open_pool(2, handled) as pool:
        with trio.move_on_after(1.5) as scope:
            await read(pool, itertools.count())
        assert scope.cancelled_caught
        assert trio.current_time() == 1.75
        assert sorted(handled.cancelled) == sorted(handled.ended) == [0, 1]
        assert_idle(pool)
        assert pool.statistics().cancelled == 2


@pytest.mark.parametrize("read", [by_map, by_settle, by_stream])
async def test_a_call_can_be_cancelled_while_the_input_is_waited_for(
    read: Read, autojump_clock: MockClock
) -> None:
    class Silent:
        def __aiter__(self) -> Silent:
            return self

        async def __anext__(self) -> int:
            return await trio.sleep_forever()  # type: ignore[return-value]

    async with open_pool(2, double) as pool:
        with trio.move_on_after(1.5) as scope:
            await read(pool, Silent())
        assert scope.cancelled_caught
        assert trio.current_time() == 1.5
        assert await pool.process(1) == 2


@pytest.mark.parametrize("read", [by_map, by_settle, by_stream])
@every_source
async def test_a_call_can_be_cancelled_before_a_worker_is_free(
    read: Read, source: type[Source], autojump_clock: MockClock
) -> None:
    """Then nothing of it has run, and nothing of it will."""
    handled = Handled()
    async with open_pool(1, handled) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.process, "other")
        await wait_all_tasks_blocked()
        with trio.move_on_after(1.5) as scope:
            await read(pool, source(3))
        assert scope.cancelled_caught
        handled.go.set()
        await pool.join()
        assert handled.started == ["other"]
        assert_idle(pool)


@pytest.mark.parametrize("read", [by_map, by_settle, by_stream])
async def test_a_call_in_a_cancelled_scope_runs_nothing(
    read: Read, autojump_clock: MockClock
) -> None:
    handled = Handled()
    handled.go.set()
    async with open_pool(2, handled) as pool:
        with trio.CancelScope() as scope:
            scope.cancel()
            await read(pool, Source(3))
        assert scope.cancelled_caught
        await pool.join()
        assert handled.started == []


@pytest.mark.parametrize("read", [by_map, by_settle])
async def test_a_cancelled_call_whose_handlers_finish_all_the_same_returns(
    read: Read, autojump_clock: MockClock
) -> None:
    """As a direct call would: nothing was cut short, so the results win."""

    async def handler(x: int) -> int:
        with trio.CancelScope(shield=True):
            await trio.sleep(2)
        return x

    async with open_pool(3, handler) as pool:
        with trio.move_on_after(1) as scope:
            assert await read(pool, [1, 2]) == [1, 2]
        assert not scope.cancelled_caught
        assert trio.current_time() == 2


async def test_a_cancelled_read_loses_no_result(autojump_clock: MockClock) -> None:
    async with open_pool(1, sleepy) as pool, pool.stream([1.0, 1.5]) as results:
        seen = []
        while len(seen) < 2:
            with trio.move_on_after(0.25):
                seen.append(await anext(results))
        assert seen == [1.0, 1.5]


async def test_a_cancelled_map_with_a_failure_hides_neither(
    autojump_clock: MockClock,
) -> None:
    """A handler that fails while it is being cancelled is heard of."""

    async def handler(x: int) -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            if x == 0:
                raise ValueError(x) from None
            raise

    async with open_pool(2, handler) as pool:
        with pytest.raises(ExceptionGroup) as caught, trio.move_on_after(1) as scope:
            await pool.map(range(2))
        assert scope.cancel_called
        assert [error.args for error in caught.value.exceptions] == [(0,)]


async def test_the_deadline_of_the_caller_is_not_the_items(
    autojump_clock: MockClock,
) -> None:
    """A map may take longer than one item's timeout, and its scope still counts."""
    async with open_pool(1, sleepy, timeout=1.5) as pool:
        with trio.move_on_after(3.25) as scope:
            await pool.map([1.0] * 10)
        assert scope.cancelled_caught
        assert pool.statistics().done == 3
        assert trio.current_time() == 3.25


# ---- fairness


@every_way
async def test_a_process_call_gets_its_turn_beside_an_endless_map(read: Read) -> None:
    async with open_pool(1, double) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(consume_for_ever, read, pool)
        for x in range(5):
            assert await pool.process(x) == 2 * x
        nursery.cancel_scope.cancel()


async def consume_for_ever(read: Read, pool: Pool[Any, Any]) -> None:
    if read in (by_map, by_settle):
        await read(pool, itertools.count())
        return
    ordered = read is by_stream
    async with pool.stream(itertools.count(), ordered=ordered) as results:
        async for _ in results:
            pass


async def test_a_queued_job_goes_in_between_the_items_of_a_map(
    autojump_clock: MockClock,
) -> None:
    """Of the same priority, the map and the jobs take turns."""
    order: list[Any] = []

    async def handler(x: Any) -> None:
        order.append(x)
        await trio.sleep(0.25)

    async with open_pool(1, handler) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.map, range(6))
        await wait_all_tasks_blocked()
        await pool.process("job")
        assert order.index("job") <= 2


async def test_two_maps_of_one_priority_take_turns(autojump_clock: MockClock) -> None:
    order: list[str] = []

    async def handler(x: str) -> None:
        order.append(x)
        await trio.sleep(0.25)

    async with open_pool(1, handler) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.map, ["a"] * 9)
        await wait_all_tasks_blocked()
        await pool.map(["b"] * 3)
        assert order[:8].count("b") == 3


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("read", [by_map, by_settle])
async def test_a_long_map_of_jobs_that_never_wait_lets_others_run(
    read: Read, size: int
) -> None:
    """The input ends when another task has had its turns, and not before."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with open_pool(size, double) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await trio.lowlevel.checkpoint()
        last = turns + 5
        results = await read(
            pool, itertools.takewhile(lambda _: turns < last, itertools.count())
        )
        assert results
        assert turns >= last
        nursery.cancel_scope.cancel()


async def test_a_map_can_be_cancelled_between_jobs_that_never_wait() -> None:
    async with open_pool(2, double) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.map, itertools.count())
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


# ---- beside resize, pause, priorities, shutdown


@every_way
@every_source
async def test_a_map_waits_for_workers(read: Read, source: type[Source]) -> None:
    """With size 0 nothing runs; each new worker pulls from the input."""
    items = source(3)
    results: list[Any] = []

    async def call() -> None:
        results.extend(await read(pool, items))

    async with open_pool(0, double) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await wait_all_tasks_blocked()
        assert pool.statistics().accepted == 0
        await pool.resize(2)
        await wait_all_tasks_blocked()
        assert sorted(results) == [0, 2, 4]


async def test_a_map_uses_as_many_workers_as_there_are() -> None:
    handled = Handled()
    async with open_pool(1, handled) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.map, range(10))
        await wait_all_tasks_blocked()
        assert len(handled.started) == 1
        await pool.resize(4)
        await wait_all_tasks_blocked()
        assert len(handled.started) == 4
        handled.go.set()


async def test_shrinking_under_a_map_interrupts_no_item(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(4, sleepy) as pool, trio.open_nursery() as nursery:
        results: list[float] = []

        async def call() -> None:
            results.extend(await pool.map([1.0] * 8))

        nursery.start_soon(call)
        await wait_all_tasks_blocked()
        await pool.resize(1)
        assert trio.current_time() == 1
    assert results == [1.0] * 8
    assert trio.current_time() == 5


@every_way
@every_source
async def test_a_pause_holds_a_map_between_items(
    read: Read, source: type[Source], autojump_clock: MockClock
) -> None:
    started: list[Any] = []

    async def handler(x: int) -> int:
        started.append(x)
        await trio.sleep(0.5)
        return x

    results: list[Any] = []

    async def call() -> None:
        results.extend(await read(pool, source(5)))

    async with open_pool(2, handler) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await wait_all_tasks_blocked()
            pool.pause()
            await trio.sleep(5)
            assert sorted(started) == [0, 1]
            assert pool.statistics().running == 0
            pool.resume()
    assert sorted(results) == [0, 1, 2, 3, 4]
    assert trio.current_time() == 6


async def test_a_map_started_in_a_pause_begins_at_resume() -> None:
    async with open_pool(2, double) as pool:
        pool.pause()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.map, range(3))
            await wait_all_tasks_blocked()
            assert pool.statistics().accepted == 0
            pool.resume()
        assert pool.statistics().done == 3


async def test_a_map_of_higher_priority_goes_before_waiting_jobs(
    autojump_clock: MockClock,
) -> None:
    assert await order_beside_jobs(priority=1) == ["map", "map", "map", "job", "job"]


async def test_a_map_of_lower_priority_goes_behind_waiting_jobs(
    autojump_clock: MockClock,
) -> None:
    assert await order_beside_jobs(priority=-1) == ["job", "job", "map", "map", "map"]


async def order_beside_jobs(priority: int) -> list[str]:
    order: list[str] = []

    async def handler(x: str) -> None:
        order.append(x)
        await trio.sleep(0.25)

    async with open_pool(1, handler) as pool, trio.open_nursery() as nursery:
        pool.pause()
        for _ in range(2):
            pool.submit_nowait("job")

        async def call() -> None:
            await pool.map(["map"] * 3, priority=priority)

        nursery.start_soon(call)
        await wait_all_tasks_blocked()
        pool.resume()
    return order


async def test_a_job_of_higher_priority_overtakes_a_running_map(
    autojump_clock: MockClock,
) -> None:
    order: list[Any] = []

    async def handler(x: Any) -> None:
        order.append(x)
        await trio.sleep(0.25)

    async with open_pool(1, handler) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.map, range(5))
        await wait_all_tasks_blocked()
        await pool.process("urgent", priority=1)
        assert order == [0, "urgent"] or order == [0, "urgent", 1]


@pytest.mark.parametrize("read", [by_map, by_settle])
@every_source
async def test_leaving_the_pools_block_finishes_a_map_of_another_task(
    read: Read, source: type[Source], autojump_clock: MockClock
) -> None:
    results: list[Any] = []

    async def handler(x: int) -> int:
        await trio.sleep(0.5)
        return x

    async def call(pool: Pool[int, int]) -> None:
        results.extend(await read(pool, source(2)))

    async with trio.open_nursery() as nursery:
        async with open_pool(2, handler) as pool:
            nursery.start_soon(call, pool)
            await wait_all_tasks_blocked()
    assert results == [0, 1]


@pytest.mark.parametrize("how", ["cancel", "shutdown"])
@pytest.mark.parametrize("count", [2, math.inf], ids=["all pulled", "endless"])
@pytest.mark.parametrize("read", [by_map, by_settle, by_stream, by_unordered_stream])
@every_source
async def test_a_stopped_pool_never_passes_cancelled_items_off_as_results(
    read: Read,
    source: type[Source],
    count: float,
    how: str,
    autojump_clock: MockClock,
) -> None:
    """`PoolClosed`, or the `JobCancelled` of each: never a short or hollow list."""
    heard: list[BaseException] = []
    handled = Handled()

    async def call(pool: Pool[int, int]) -> None:
        with pytest.raises((PoolClosed, JobCancelled, ExceptionGroup)) as caught:
            await read(pool, source(count))
        heard.append(caught.value)

    async with trio.open_nursery() as nursery:
        async with open_pool(3, handled) as pool:
            nursery.start_soon(call, pool)
            await wait_all_tasks_blocked()
            if how == "cancel":
                pool.cancel()
            else:
                await pool.shutdown(grace=0.5)
    assert len(heard) == 1
    assert sorted(handled.ended) == list(range(int(min(count, 3))))
    assert_idle(pool)


async def test_items_that_were_all_taken_have_outcomes_though_the_pool_stops(
    autojump_clock: MockClock,
) -> None:
    """The third worker has found that there are no more."""
    outcomes: list[Any] = []

    async def call(pool: Pool[int, int]) -> None:
        outcomes.extend(settled.outcome for settled in await pool.settle([0, 1]))

    async with trio.open_nursery() as nursery:
        async with open_pool(3, Handled()) as pool:
            nursery.start_soon(call, pool)
            await wait_all_tasks_blocked()
            pool.cancel()
    assert [type(outcome.error) for outcome in outcomes] == [JobCancelled] * 2


async def test_a_stream_that_was_left_gives_no_more() -> None:
    async with open_pool(1, double) as pool:
        async with pool.stream(itertools.count()) as results:
            assert await anext(results) == 0
        with pytest.raises(StopAsyncIteration):
            await anext(results)


async def test_the_end_of_the_pool_does_not_hide_a_failure_of_a_map(
    autojump_clock: MockClock,
) -> None:
    """It comes while the cancelled rest of the map still cleans up."""

    async def handler(x: int) -> None:
        if x == 0:
            await trio.sleep(0.25)
            raise ValueError(x)
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)

    async def call(pool: Pool[int, None]) -> None:
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map(itertools.count())
        assert caught.value.subgroup(ValueError) is not None

    async with trio.open_nursery() as nursery:
        async with open_pool(2, handler) as pool:
            nursery.start_soon(call, pool)
            await trio.sleep(0.5)
            pool.cancel()


@every_way
async def test_ctrl_c_in_a_handler_leaves_the_block_as_itself(read: Read) -> None:
    """Whatever the call that the block was waiting in has to say about it."""

    async def handler(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        async with open_pool(2, handler) as pool:
            await read(pool, range(3))


@every_way
async def test_a_closed_pool_refuses_a_map(read: Read) -> None:
    async with open_pool(1, double) as pool:
        await pool.shutdown()
        with pytest.raises(PoolClosed):
            await read(pool, [1])
    with pytest.raises(PoolClosed):
        await read(pool, [1])


async def test_a_slow_reader_of_another_task_does_not_hold_the_pool() -> None:
    """The block is left, and the reader hears why there is no more to read."""
    left = trio.Event()

    async def reader(pool: Pool[int, int]) -> None:
        async with pool.stream(itertools.count(), ahead=2) as results:
            assert await anext(results) == 0
            await left.wait()
            # What was ready is not lost.
            assert [await anext(results), await anext(results)] == [2, 4]
            with pytest.raises(PoolClosed):
                await anext(results)

    async with trio.open_nursery() as nursery:
        async with open_pool(1, double) as pool:
            nursery.start_soon(reader, pool)
            await wait_all_tasks_blocked()
        left.set()


async def test_join_waits_for_the_items_of_a_map(autojump_clock: MockClock) -> None:
    async with open_pool(1, sleepy) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.map, [0.5, 0.5, 0.5])
        await wait_all_tasks_blocked()
        await pool.join()
        assert trio.current_time() == 1.5


async def test_join_does_not_wait_for_the_reader_of_a_stream(
    autojump_clock: MockClock,
) -> None:
    """A generator is at its end when a worker has asked it once more."""
    async with (
        open_pool(1, sleepy) as pool,
        pool.stream((x for x in [0.5, 1.0]), ahead=9) as results,
    ):
        await wait_all_tasks_blocked()
        with trio.fail_after(5):
            await pool.join()
        assert trio.current_time() == 1.5
        assert [x async for x in results] == [0.5, 1.0]


# ---- context variables

var: ContextVar[str] = ContextVar("var", default="unset")


@every_way
async def test_every_item_sees_the_callers_context_and_nobody_sees_its_own(
    read: Read, autojump_clock: MockClock
) -> None:
    async def handler(x: int) -> str:
        seen = var.get()
        var.set(f"item {x}")
        if x % 2:
            await trio.sleep(0.25)
            assert var.get() == f"item {x}"
        return seen

    async with open_pool(2, handler) as pool:
        assert set(await read(pool, range(9))) == {"unset"}
        var.set("mine")
        assert set(await read(pool, range(9))) == {"mine"}
        assert var.get() == "mine"
        # The next job sees nothing of them either.
        var.set("later")
        assert await pool.process(0) == "later"


async def test_maps_of_different_contexts_do_not_mix() -> None:
    async def handler(_: int) -> str:
        await trio.lowlevel.checkpoint()
        return var.get()

    async def call(value: str) -> None:
        var.set(value)
        assert set(await pool.map(range(20))) == {value}

    async with open_pool(2, handler) as pool, trio.open_nursery() as nursery:
        for value in ("a", "b", "c"):
            nursery.start_soon(call, value)


@pytest.mark.parametrize("items", [[1.0], (0.5, 0.5), range(1, 2)])
@pytest.mark.parametrize("method", ["map", "settle", "stream"])
async def test_a_batch_ends_with_its_last_item_though_the_pool_is_paused(
    autojump_clock: MockClock, method: str, items: Any
) -> None:
    """No worker looks for another item then, and none is needed to know."""

    async def work(seconds: float) -> float:
        await trio.sleep(seconds)
        return seconds

    async def consume() -> None:
        if method == "stream":
            async with pool.stream(items) as results:
                assert [result async for result in results] == list(items)
        elif method == "map":
            assert await pool.map(items) == list(items)
        else:
            assert len(await pool.settle(items)) == len(items)
        ended.append(trio.current_time() - start)

    ended: list[float] = []
    async with open_pool(1, work) as pool:
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(consume)
            await trio.sleep(0.75)
            pool.pause()
            await trio.sleep(8)
            pool.resume()
    assert ended == [1.0]


async def test_a_batch_whose_last_item_crashes_does_not_wait_for_the_next_worker(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(seconds: float) -> None:
        await trio.sleep(seconds)
        raise SystemExit

    patient = Restart(5, backoff=lambda _: 8.0)
    async with open_pool(1, work, restart=patient) as pool:
        # The first restart comes at once.
        await pool.settle([1.0])
        start = trio.current_time()
        (settled,) = await pool.settle([1.0])
        assert trio.current_time() - start == 1.0
    assert isinstance(settled.outcome, outcome.Error)
    assert isinstance(settled.outcome.error, WorkerCrashed)


@pytest.mark.parametrize("way", ["map", "settle", "stream"])
async def test_an_iterator_that_has_ended_is_not_asked_again_by_its_worker(
    way: str,
) -> None:
    """Some have more to give when they are asked once more, or fail."""
    asked = 0

    class Source:
        def __iter__(self) -> Source:
            return self

        def __next__(self) -> int:
            nonlocal asked
            asked += 1
            if asked > 5:
                raise StopIteration
            return asked

    async def double(number: int) -> int:
        await trio.lowlevel.checkpoint()
        return 2 * number

    async with open_pool(1, double) as pool:
        if way == "stream":
            async with pool.stream(Source()) as results:
                assert [result async for result in results] == [2, 4, 6, 8, 10]
        else:
            found = await getattr(pool, way)(Source())
            assert len(found) == 5
    assert asked == 6


@pytest.mark.parametrize("retry", [None, Retry(2)])
async def test_the_items_of_a_map_have_its_priority(retry: Retry | None) -> None:
    async def look(item: int) -> int:
        return current_job().priority

    async with open_pool(2, look) as pool:
        assert await pool.map([1, 2, 3], priority=7, retry=retry) == [7] * 3
        assert await pool.map([1, 2, 3], retry=retry) == [0] * 3


async def test_the_name_of_a_long_item_is_cut() -> None:
    async def fail(item: str) -> None:
        raise ValueError(item)

    async with open_pool(1, fail) as pool:
        for length, name in ((198, f"'{'x' * 198}'"), (199, f"'{'x' * 199}...")):
            with pytest.raises(ExceptionGroup) as caught:
                await pool.map(["x" * length])
            (error,) = caught.value.exceptions
            assert error.__notes__ == [f"trio_pool: item 0: {name}"]


@pytest.mark.parametrize("way", ["map", "settle", "stream"])
async def test_an_async_generator_that_is_called_off_is_closed_before_the_call_returns(
    way: str, autojump_clock: MockClock
) -> None:
    log: list[str] = []

    async def numbers() -> AsyncIterator[int]:
        try:
            for number in itertools.count():
                yield number
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.5)
            log.append("closed")

    async def work(number: int) -> int:
        await trio.sleep(1)
        return number

    async with open_pool(2, work) as pool:
        with trio.move_on_after(2.5):
            if way == "stream":
                async with pool.stream(numbers()) as results:
                    async for _ in results:
                        pass
            else:
                await getattr(pool, way)(numbers())
        log.append("returned")
        assert await pool.process(1) == 1
    assert log == ["closed", "returned"]


async def test_an_error_in_the_block_of_a_stream_outlives_its_cancellation() -> None:
    async with open_pool(1, double) as pool:
        with pytest.raises(ValueError, match="mine"), trio.CancelScope() as scope:
            async with pool.stream([1, 2, 3]):
                scope.cancel()
                raise ValueError("mine")


async def test_others_take_turns_while_the_outcomes_of_a_settle_are_made() -> None:
    turns = turns_before = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async def handler(number: int) -> int:
        nonlocal turns_before
        turns_before = turns
        return number

    async with open_pool(1, handler) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        await pool.settle(range(5_000))
        assert turns - turns_before >= 9
        nursery.cancel_scope.cancel()


async def test_an_input_that_a_handler_changes_is_an_error_of_the_input() -> None:
    """It is raised by the iterator itself, with no frame of Python."""
    items = {1, 2, 3}

    async def handler(number: int) -> int:
        items.add(number + 100)
        return number

    async with open_pool(1, handler) as pool:
        with pytest.raises(RuntimeError, match="changed size"):
            await pool.map(items)


async def test_the_last_item_ahead_goes_to_whoever_is_free(
    autojump_clock: MockClock,
) -> None:
    started: list[int] = []

    async def handler(number: int) -> int:
        started.append(number)
        if number < 0:
            await trio.sleep(1)
        elif number >= 2:
            await trio.sleep(10)
        return number

    async with open_pool(2, handler) as pool:
        reply = pool.submit_nowait(-1)
        await wait_all_tasks_blocked()
        async with pool.stream(range(100), ahead=4):
            await reply.wait()
            await wait_all_tasks_blocked()
            assert started == [-1, 0, 1, 2, 3]


async def test_no_two_items_have_the_same_id(autojump_clock: MockClock) -> None:
    async def handler(_: int) -> int | str:
        await trio.sleep(1)
        return current_job().id

    async with open_pool(3, handler) as pool:
        ids = await pool.map(range(9)) + await pool.map(range(9))
    assert len(set(ids)) == 18


async def test_an_item_that_fails_has_an_id_of_its_own() -> None:
    ids: list[int | str] = []

    async def handler(number: int) -> None:
        if number:
            raise StopAsyncIteration
        ids.append(current_job().id)

    async with open_pool(1, handler) as pool, pool.stream([0, 1]) as results:
        await anext(results)
        with pytest.raises(RuntimeError, match=r"job \d+ raised") as caught:
            await anext(results)
    assert f"job {ids[0]} " not in str(caught.value)


async def test_a_job_behind_a_batch_whose_input_is_at_its_end_starts_at_once(
    autojump_clock,
):
    items = (seconds for seconds in [1.0])
    async with open_pool(1, trio.sleep) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.map, items)
        await wait_all_tasks_blocked()
        with trio.fail_after(5):
            await pool.process(1.0)
        assert trio.current_time() == 2.0


async def test_the_reader_of_a_stream_hears_of_a_shutdown_before_workers_clean_up(
    autojump_clock: MockClock,
) -> None:
    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[int], Awaitable[int]], None]:
        yield double
        with trio.CancelScope(shield=True):
            await trio.sleep(5)

    async with open_pool(1, worker=worker) as pool, trio.open_nursery() as nursery:
        async with pool.stream(range(10), ahead=1) as stream:
            assert await anext(stream) == 0
            await wait_all_tasks_blocked()
            nursery.start_soon(pool.shutdown)
            with pytest.raises(PoolClosed):
                while True:
                    await anext(stream)
            assert trio.current_time() == 0


@pytest.mark.parametrize("way", ["map", "settle", "stream"])
async def test_no_item_starts_after_one_has_cancelled_the_pool(way: str) -> None:
    started: list[int] = []

    async def handler(item: int) -> None:
        started.append(item)
        if item == 2:
            pool.cancel()

    async with open_pool(1, handler) as pool:
        with pytest.raises(PoolClosed):
            if way == "stream":
                async with pool.stream(range(9), ahead=9) as stream:
                    async for _ in stream:
                        pass
            else:
                await getattr(pool, way)(range(9))
    assert started == [0, 1, 2]


async def test_a_result_is_given_while_its_worker_runs_the_next_item(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(1, sleepy) as pool:
        async with pool.stream([0.0, 0.5, 4.0]) as results:
            assert await anext(results) == 0.0
            assert trio.current_time() == 0.0
            assert await anext(results) == 0.5
            assert trio.current_time() == 0.5
            assert await anext(results) == 4.0


async def test_a_stream_is_not_further_ahead_after_an_item_that_slept() -> None:
    async def handler(x: int) -> None:
        if not x:
            await trio.lowlevel.checkpoint()

    async with open_pool(1, handler) as pool:
        source = Source()
        async with pool.stream(source, ahead=6):
            await wait_all_tasks_blocked()
            assert source.pulled == 6


@pytest.mark.parametrize("read", [by_map, by_settle])
async def test_an_input_that_ends_its_pool_is_not_asked_again(read: Read) -> None:
    asked = []

    def items() -> Iterator[int]:
        for x in range(100):
            asked.append(x)
            if x == 3:
                pool.cancel()
            yield x

    async with open_pool(1, double) as pool:
        with pytest.raises((PoolClosed, ExceptionGroup)):
            await read(pool, items())
    assert asked == [0, 1, 2, 3]


async def test_an_error_that_the_input_raises_once_ends_the_other_items() -> None:
    def items() -> Iterator[float]:
        yield from (math.inf, 0.0, 0.0)
        raise ValueError("of the input")

    async with open_pool(2, sleepy) as pool:
        with pytest.raises(ValueError, match="of the input"):
            await pool.map(items())


# A worker that has pulled items for long gives way, as if the next had begun.


async def spin(x: float) -> float:
    """Go on for longer than the workers of a batch may, and never sleep."""
    end = perf_counter() + 0.001
    while perf_counter() < end:
        pass
    return x


async def test_a_worker_that_gives_way_between_two_items_can_be_cancelled() -> None:
    """By the failure of an item elsewhere. It takes some ms, as slices are real."""
    turns = 0

    async def fail_or_spin(fails: bool) -> None:
        if not fails:
            await spin(0)
            return
        while turns < 5:
            await trio.lowlevel.checkpoint()
        raise Broken

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with open_pool(2, fail_or_spin) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map([True, *[False] * 100])
        assert [type(error) for error in caught.value.exceptions] == [Broken]
        assert_idle(pool)
        nursery.cancel_scope.cancel()


async def test_an_input_that_fails_after_a_worker_gave_way_fails_by_itself() -> None:
    turns = 0

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    def items() -> Iterator[int]:
        while turns < 4:
            yield turns
        raise Broken

    async with open_pool(1, spin) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(take_turns)
        with pytest.raises(Broken):
            await pool.map(items())
        nursery.cancel_scope.cancel()


async def test_an_item_before_which_a_worker_gave_way_is_named_if_cancelled() -> None:
    """It takes some ms, as slices are real."""
    results = []

    async def stop() -> None:
        for _ in range(4):
            await trio.lowlevel.checkpoint()
        pool.cancel()

    async with open_pool(1, spin) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop)
            with pytest.raises(JobCancelled) as caught:
                async with pool.stream(range(1_000, 2_000), ahead=500) as stream:
                    while True:
                        results.append(await anext(stream))
    at = len(results)
    assert results == list(range(1_000, 1_000 + at))
    assert caught.value.__notes__ == [f"trio_pool: item {at}: {1_000 + at}"]


@pytest.mark.parametrize("options", [{}, {"ttl": 99.0}], ids=["plain", "terms"])
async def test_a_job_has_its_turn_while_a_batch_is_pulled(options, autojump_clock):
    async with open_pool(1, trio.sleep) as pool, trio.open_nursery() as nursery:
        nursery.start_soon(pool.map, [1.0] * 20)
        await trio.sleep(2.5)
        reply = pool.submit_nowait(1.0, **options)
        await reply.wait()
        assert trio.current_time() <= 5.0


async def test_a_caller_outside_of_the_block_hears_that_its_batch_was_called_off(
    autojump_clock,
):
    """Be there items left or not: the pool has stopped, and nobody asks for more."""

    async def call(items):
        with pytest.raises((ExceptionGroup, PoolClosed)):
            await pool.map(items)
        ended.append(items)

    ended = []
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            async with open_pool(1, trio.sleep) as pool:
                nursery.start_soon(call, [5.0] * 3)
                nursery.start_soon(call, [6.0] * 3)
                await trio.sleep(1.0)
                pool.cancel()
    assert len(ended) == 2
