"""Several items in one call, and workers that are lost: the engine is a stand-in."""

from __future__ import annotations

import functools
import gc
import math
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import attrs
import outcome
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from trio_pool import (
    Hooks,
    JobCancelled,
    JobTimeout,
    Pool,
    PoolClosed,
    Rate,
    Restart,
    Retry,
    Settled,
    WorkerCrashed,
    open_pool,
)
from trio_pool._chunks import ChunkSize
from trio_pool._errors import WorkerGone
from trio_pool.offload._remote import Handler, unwrapped
from trio_pool.testing import (
    InlinePool,
    RecordingHooks,
    assert_books_balance,
    cancel_everywhere,
    settle,
)

MANY_CRASHES = Restart(limit=10_000, backoff=lambda _: 0.0)


class Item(NamedTuple):
    """What the other end does with it: seconds, then how it ends."""

    number: int
    act: str = "value"
    seconds: float = 0.25


class Mishap(Exception):
    """One that can be referred to weakly."""


def items_of(*acts: str, seconds: float = 0.25) -> list[Item]:
    return [Item(number, act, seconds) for number, act in enumerate(acts)]


def gone(started: bool, planned: bool = False) -> WorkerGone:
    error = WorkerGone(started, planned)
    error.__cause__ = LookupError("the other end")
    return error


@attrs.define(eq=False)
class OtherEnd:
    """That of a worker: runs items one after the other, and notes it."""

    log: list[Any]
    calls: list[list[int]]
    tried: Counter[int]
    spent: bool = False

    async def one(self, item: Item, _: object) -> Any:
        outcomes, _ = await self.many([item])
        return unwrapped(outcomes.pop())

    async def many(self, items: list[Item]) -> tuple[list[outcome.Outcome[int]], float]:
        assert not self.spent
        self.calls.append([item.number for item in items])
        late = [i.number for i in items if i.act == "late" and not self.tried[i.number]]
        if late:
            # The other end was gone before any of it could begin.
            self.tried.update(late)
            raise gone(started=False)
        results: list[outcome.Outcome[int]] = []
        for item in items:
            tries = self.tried[item.number]
            self.tried[item.number] += 1
            self.log.append(item.number)
            try:
                await trio.sleep(item.seconds)
            except trio.Cancelled:
                self.spent = True
                raise
            if item.act == "lost":
                raise gone(started=True)
            if item.act == "planned":
                raise gone(started=True, planned=True)
            if item.act == "exit":
                results.append(outcome.Error(gone(started=True)))
                never: Any = outcome.Error(gone(started=False))
                results += [never] * (len(items) - len(results))
                break
            if item.act == "mishap":
                results.append(outcome.Error(Mishap()))
            elif item.act == "error" or (item.act == "twice" and not tries):
                results.append(outcome.Error(KeyError(item.number)))
            else:
                results.append(outcome.Value(-item.number))
        return results, sum(item.seconds for item in items[: len(results)])


class Ends:
    """Makes other ends, and has what all of them have noted."""

    def __init__(self) -> None:
        self.log: list[int] = []
        self.calls: list[list[int]] = []
        self.tried: Counter[int] = Counter()
        self.opened = 0

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[Callable[[Item], Any]]:
        self.opened += 1
        await trio.lowlevel.checkpoint()
        yield Handler(OtherEnd(self.log, self.calls, self.tried))


@pytest.fixture
def ends() -> Ends:
    return Ends()


def fates(settled: list[Settled[Item, int]]) -> list[str]:
    """Name how each item has ended."""
    return [
        type(s.outcome.error).__name__ if isinstance(s.outcome, outcome.Error) else "ok"
        for s in settled
    ]


# ----------------------------------------------------------------------
# Chunks.


async def test_a_call_carries_as_many_items_as_were_asked_for(
    ends: Ends, autojump_clock: MockClock
) -> None:
    async with open_pool(1, worker=ends.worker) as pool:
        assert await pool.map(items_of(*["value"] * 7), chunk=3) == [
            *(0, -1, -2, -3, -4, -5, -6)
        ]
    assert ends.calls == [[0, 1, 2], [3, 4, 5], [6]]
    count = pool.statistics()
    assert count.accepted == count.done == count.run.count == 7
    assert count.run.mean == pytest.approx(0.25)


async def test_a_stream_reads_two_calls_a_worker_ahead(
    ends: Ends, autojump_clock: MockClock
) -> None:
    async with open_pool(1, worker=ends.worker) as pool:
        async with pool.stream(items_of(*["value"] * 100), chunk=4) as results:
            assert await anext(results) == 0
            await trio.sleep(50)
            assert len(ends.log) == 9
            assert await anext(results) == -1
        async with pool.stream(items_of(*["value"] * 100), chunk=4, ahead=2) as results:
            assert [await anext(results) for _ in range(3)] == [0, -1, -2]
    assert max(map(len, ends.calls)) == 4
    assert ends.calls[-1] == [3, 4] or len(ends.calls[-1]) <= 2


async def test_a_call_takes_from_an_async_source_what_is_there(
    ends: Ends, autojump_clock: MockClock
) -> None:
    async def source() -> AsyncIterator[Item]:
        for item in items_of(*["value"] * 20):
            yield item

    async with open_pool(2, worker=ends.worker) as pool:
        expected = [-number for number in range(20)]
        assert await pool.map(source(), chunk=4) == expected
    assert max(map(len, ends.calls)) > 1


async def test_items_of_a_call_end_each_in_its_own_way(
    ends: Ends, autojump_clock: MockClock
) -> None:
    items = items_of("value", "error", "value", "error")
    async with open_pool(1, worker=ends.worker) as pool:
        assert fates(await pool.settle(items, chunk=4)) == [
            *("ok", "KeyError", "ok", "KeyError")
        ]
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map(items, chunk=4)
        notes = [error.__notes__ for error in caught.value.exceptions]
        assert [text for (text,) in notes] == [
            f"trio_pool: item {number}: {items[number]!r}" for number in (1, 3)
        ]
    assert pool.statistics().failed == 4


async def test_what_is_told_of_the_items_of_a_call_is_as_if_they_ran_in_turn(
    ends: Ends, autojump_clock: MockClock
) -> None:
    class Watch(RecordingHooks):
        def on_job_start(self, event: Any) -> None:
            running.append(pool.statistics().running)

        def on_job_complete(self, event: Any) -> None:
            running.append(pool.statistics().running)

    watch = Watch()
    running: list[int] = []
    items = items_of("value", "error", "value")
    async with open_pool(1, worker=ends.worker, hooks=[watch]) as pool:
        await pool.settle(items, chunk=3)
    assert running == [1, 0, 1, 1, 0]
    jobs = [
        (event.kind, event.job_id)
        for event in watch.of("job_queue", "job_start", "job_complete", "job_error")
    ]
    kinds = ["job_queue", "job_start"]
    ids = [job_id for kind, job_id in jobs if kind == "job_queue"]
    assert jobs == [
        *((kind, ids[0]) for kind in [*kinds, "job_complete"]),
        *((kind, ids[1]) for kind in [*kinds, "job_error"]),
        *((kind, ids[2]) for kind in [*kinds, "job_complete"]),
    ]
    assert len(set(ids)) == 3


async def test_a_call_for_several_has_as_much_time_as_all_of_them(
    ends: Ends, autojump_clock: MockClock
) -> None:
    slow = items_of(*["value"] * 4, seconds=0.75)
    async with open_pool(1, worker=ends.worker) as pool:
        assert fates(await pool.settle(slow, chunk=4, timeout=1.0)) == ["ok"] * 4
        settled = await pool.settle(slow, chunk=4, timeout=0.5)
        assert fates(settled) == ["JobTimeout"] * 4
        with pytest.raises(JobTimeout) as caught:
            settled[2].outcome.unwrap()
        assert caught.value.timeout == 0.5
        assert caught.value.started
        # With a time for each, each has a call of its own.
        ends.calls.clear()
        await pool.settle(items_of(*["value"] * 4), timeout=1.0)
        assert ends.calls == [[0], [1], [2], [3]]
    assert pool.statistics().timed_out == 4


async def test_a_failed_item_is_tried_again_alone(
    ends: Ends, autojump_clock: MockClock
) -> None:
    again = Retry(attempts=2, backoff=lambda _: 1.0)
    items = items_of("twice", "value", "error", "twice")
    async with open_pool(1, worker=ends.worker, retry=again) as pool:
        assert fates(await pool.settle(items, chunk=4)) == [
            "ok",
            "ok",
            "KeyError",
            "ok",
        ]
    assert ends.calls == [[0, 1, 2, 3], [0], [2], [3]]
    count = pool.statistics()
    assert (count.done, count.failed, count.retries) == (3, 1, 3)


async def test_an_item_that_had_a_call_before_has_one_of_its_own(
    ends: Ends, autojump_clock: MockClock
) -> None:
    """Whatever has failed with it, or could not begin, it does not happen to others."""
    again = Retry(attempts=2, backoff=lambda _: 0.0)
    items = items_of("twice", *["value"] * 9)
    options: Any = {"restart": MANY_CRASHES, "retry": again}
    async with open_pool(1, worker=ends.worker, **options) as pool:
        await pool.map(items, chunk=3)
        assert ends.calls[0] == [0, 1, 2]
        assert ends.calls.count([0]) == 1
        ends.calls.clear()
        await pool.map([Item(11, "late"), *map(Item, range(12, 20))], chunk=3)
        assert ends.calls[:2] == [[11, 12, 13], [11]]


async def passing(job: Any, call_next: Any) -> Any:
    return await call_next()


@pytest.mark.parametrize(
    "options",
    [
        {"rate": Rate(1000, burst=1000)},
        {"limiter": trio.CapacityLimiter(5)},
        {"middleware": [passing]},
    ],
    ids=["rate", "limiter", "middleware"],
)
async def test_where_each_start_is_asked_for_a_call_carries_one_item(
    ends: Ends, options: Any, autojump_clock: MockClock
) -> None:
    async with open_pool(1, worker=ends.worker, **options) as pool:
        await pool.map(items_of(*["value"] * 4), chunk=4)
    assert ends.calls == [[0], [1], [2], [3]]


async def test_a_call_carries_no_more_than_its_worker_may_run(
    ends: Ends, autojump_clock: MockClock
) -> None:
    async with open_pool(1, worker=ends.worker, max_jobs=3) as pool:
        await pool.map(items_of(*["value"] * 8), chunk=2)
    assert ends.calls == [[0, 1], [2], [3, 4], [5], [6, 7]]
    assert ends.opened == 3


async def test_a_source_that_fails_calls_its_call_off_before_it_begins(
    ends: Ends, autojump_clock: MockClock
) -> None:
    def source() -> Any:
        yield from items_of("value", "value")
        raise LookupError("no more")

    async with open_pool(1, worker=ends.worker) as pool:
        with pytest.raises(LookupError, match="no more"):
            await pool.map(source(), chunk=5)
        await settle(pool)
        assert_books_balance(pool)
    assert ends.calls == []


async def test_an_endless_source_of_slow_items_holds_nobody_up(
    ends: Ends, autojump_clock: MockClock
) -> None:
    def source() -> Any:
        for number in range(1000):
            end = trio.lowlevel.current_clock() and number
            for _ in range(50_000):
                pass
            yield Item(end)

    async with open_pool(1, worker=ends.worker) as pool:
        async with pool.stream(source(), chunk=1000) as results:
            await anext(results)
    # Some 2 ms of pulling, where all would have taken a second.
    assert len(ends.calls[0]) < 500


@pytest.mark.parametrize("chunk", [0, -1])
async def test_a_chunk_has_at_least_one_item(ends: Ends, chunk: int) -> None:
    async with open_pool(1, worker=ends.worker) as pool:
        for call in (pool.map, pool.settle, pool.stream):
            with pytest.raises(ValueError, match=f"chunk must be an int.*{chunk}"):
                made: Any = call([], chunk=chunk)
                await made
        with pytest.raises(TypeError, match=r"chunk must be an int.*1\.5"):
            await pool.map([], chunk=1.5)  # type: ignore[arg-type]


async def test_other_handlers_take_one_item_at_a_time(
    autojump_clock: MockClock,
) -> None:
    async def double(number: int) -> int:
        return 2 * number

    async with open_pool(2, double) as pool:
        assert await pool.map(range(5), chunk=3) == [0, 2, 4, 6, 8]
        async with pool.stream(range(5), chunk=3) as results:
            assert [result async for result in results] == [0, 2, 4, 6, 8]
    async with InlinePool(double) as inline:
        assert await inline.map(range(5), chunk=3) == [0, 2, 4, 6, 8]
        with pytest.raises(ValueError, match="chunk"):
            await inline.map(range(5), chunk=0)


# How many.


def test_a_measured_chunk_makes_a_call_cost_a_twentieth_of_its_items() -> None:
    size = ChunkSize(None)
    # A call costs 0.4 ms, an item takes 0.1 ms.
    for _ in range(20):
        size.learn(size.size, 0.0004 + size.size * 0.0001, size.size * 0.0001)
    assert size.size == 80


def test_a_measured_chunk_at_most_doubles_and_keeps_below_a_bound() -> None:
    size, sizes = ChunkSize(None), []
    for _ in range(12):
        size.learn(size.size, 0.001, 0.0)
        sizes.append(size.size)
    assert sizes == [2, 4, 8, 16, 32, 64, 128, 256, 500, 500, 500, 500]


def test_a_measured_chunk_takes_no_longer_than_can_be_waited_for() -> None:
    size = ChunkSize(None)
    for _ in range(20):
        size.learn(size.size, 10.0, size.size * 0.01)
    assert size.size == 5
    for _ in range(20):
        size.learn(size.size, 10.0, size.size * 1.0)
    assert size.size == 1


def test_one_slow_call_does_not_undo_what_was_measured() -> None:
    size = ChunkSize(None)
    for _ in range(20):
        size.learn(size.size, 0.001, 0.0)
    size.learn(500, 5.0, 5.0)
    assert size.size == 250
    asked = ChunkSize(7)
    asked.learn(7, 1.0, 0.0)
    assert asked.size == 7


def test_a_clock_that_went_back_halves_what_was_measured() -> None:
    size = ChunkSize(None)
    for _ in range(3):
        size.learn(size.size, 0.001, 0.0)
    size.learn(8, 0.5, 1.0)
    assert size.size == 4


async def test_items_that_take_longer_than_a_call_costs_have_one_each(
    ends: Ends, autojump_clock: MockClock
) -> None:
    """The call costs real time, of which these items take none, and the end says."""
    async with open_pool(1, worker=ends.worker) as pool:
        await pool.map(items_of(*["value"] * 30, seconds=0.024))
    assert max(map(len, ends.calls)) == 1


async def test_the_last_items_are_shared_out(
    ends: Ends, autojump_clock: MockClock
) -> None:
    items = items_of(*["value"] * 400, seconds=0.0)
    async with open_pool(2, worker=ends.worker) as pool:
        await pool.map(items)
    sizes = [len(call) for call in ends.calls]
    assert max(sizes) > 10
    assert max(sizes[-3:]) <= 3
    assert sorted(ends.log) == list(range(400))


# ----------------------------------------------------------------------
# Workers that are lost.


@pytest.mark.parametrize("chunk", [1, 2, 3])
async def test_a_job_that_never_started_waits_for_the_next_worker(
    ends: Ends, chunk: int, autojump_clock: MockClock
) -> None:
    items = items_of("value", "late", "value", "value", "late", "value")
    async with open_pool(1, worker=ends.worker, restart=MANY_CRASHES) as pool:
        assert await pool.map(items, chunk=chunk) == [0, -1, -2, -3, -4, -5]
        assert await pool.process(Item(7, "late")) == -7
        reply = await pool.submit(Item(8, "late"))
        assert await reply.wait() == -8
        assert reply.attempts == 1
    # In the order of the input, and each once.
    assert [number for number in ends.log if number < 6][-1] == 5
    count = pool.statistics()
    assert (count.accepted, count.done, count.lost) == (8, 8, 0)
    assert count.restarts == 4
    assert ends.opened == 5


@pytest.mark.parametrize("chunk", [2, 6])
async def test_what_never_started_keeps_its_place(
    ends: Ends, chunk: int, autojump_clock: MockClock
) -> None:
    items = [Item(0, "late"), *items_of(*["value"] * 6)[1:]]
    async with open_pool(1, worker=ends.worker) as pool:
        assert await pool.map(items, chunk=chunk) == [0, -1, -2, -3, -4, -5]
    assert ends.log == [0, 1, 2, 3, 4, 5]


async def test_a_job_that_had_started_is_lost_with_its_worker(
    ends: Ends, autojump_clock: MockClock
) -> None:
    async with open_pool(1, worker=ends.worker) as pool:
        with pytest.raises(WorkerCrashed) as caught:
            await pool.process(Item(1, "lost"))
        assert caught.value.started
        assert isinstance(caught.value.__cause__, LookupError)
        settled = await pool.settle(items_of("value", "lost", "value"), chunk=3)
        assert fates(settled) == ["WorkerCrashed"] * 3
        assert await pool.process(Item(2)) == -2
    assert pool.statistics().restarts == 2


async def test_a_loss_that_is_no_crash_spends_no_budget(
    ends: Ends, autojump_clock: MockClock
) -> None:
    none = Restart(limit=0)
    async with open_pool(1, worker=ends.worker, restart=none) as pool:
        for number in range(3):
            with pytest.raises(WorkerCrashed) as caught:
                await pool.process(Item(number, "planned"))
            assert caught.value.started
        assert await pool.process(Item(9)) == -9
    assert pool.statistics().restarts == 0
    assert ends.opened == 4


async def test_what_comes_after_the_end_of_a_process_never_started(
    ends: Ends, autojump_clock: MockClock
) -> None:
    items = items_of("value", "exit", "value", "error")
    async with open_pool(1, worker=ends.worker) as pool:
        assert fates(await pool.settle(items, chunk=4)) == [
            *("ok", "WorkerCrashed", "ok", "KeyError")
        ]
    assert ends.log == [0, 1, 2, 3]
    assert pool.statistics().restarts == 1


async def test_what_never_started_is_not_tried_again_once_it_is_called_off(
    ends: Ends, autojump_clock: MockClock
) -> None:
    items = items_of("error", "exit", "value")
    async with open_pool(1, worker=ends.worker) as pool:
        with pytest.raises(ExceptionGroup) as caught:
            await pool.map(items, chunk=3)
        kinds = [type(error) for error in caught.value.exceptions]
        assert kinds == [KeyError, WorkerCrashed]
        await settle(pool)
        assert_books_balance(pool)
    assert ends.log == [0, 1]
    assert pool.statistics().accepted == 2 or pool.statistics().accepted == 3


async def test_a_spent_worker_is_replaced_as_planned(
    ends: Ends, autojump_clock: MockClock
) -> None:
    none = Restart(limit=0)
    async with open_pool(1, worker=ends.worker, restart=none) as pool:
        for _ in range(3):
            with pytest.raises(JobTimeout):
                await pool.process(Item(0, seconds=9.0), timeout=1.0)
            assert await pool.process(Item(1)) == -1
        reply = await pool.submit(Item(2, seconds=9.0))
        await trio.sleep(1.0)
        reply.cancel()
        with pytest.raises(JobCancelled):
            await reply.wait()
        assert await pool.process(Item(1)) == -1
    count = pool.statistics()
    assert (count.restarts, ends.opened) == (0, 5)


async def test_a_lease_is_lost_with_what_its_worker_had_set_up(
    ends: Ends, autojump_clock: MockClock
) -> None:
    async with open_pool(1, worker=ends.worker) as pool:
        async with pool.lease() as worker:
            assert await worker.process(Item(1)) == -1
            with pytest.raises(JobTimeout):
                await worker.process(Item(0, seconds=9.0), timeout=1.0)
            with pytest.raises(WorkerCrashed) as caught:
                await worker.process(Item(1))
            assert not caught.value.started
        async with pool.lease() as worker:
            with pytest.raises(WorkerCrashed) as caught:
                await worker.process(Item(2, "late"))
            assert not caught.value.started
        assert await pool.process(Item(1)) == -1


@pytest.mark.parametrize("act", ["late", "lost"])
async def test_a_worker_that_is_lost_as_its_pool_closes_leaves_no_job(
    ends: Ends, act: str, autojump_clock: MockClock
) -> None:
    async with open_pool(1, worker=ends.worker, unobserved="ignore") as pool:
        reply = await pool.submit(Item(1, act))
        await pool.shutdown()
    assert reply.done
    if act == "late":
        assert await reply.wait() == -1
    assert_books_balance(pool)


async def test_inline_a_lost_worker_is_one_worker_less(
    ends: Ends, autojump_clock: MockClock
) -> None:
    async with InlinePool(worker=ends.worker) as pool:
        with pytest.raises(WorkerCrashed) as caught:
            await pool.process(Item(1, "lost"))
        assert caught.value.started
        assert isinstance(caught.value.__cause__, LookupError)
        assert await pool.process(Item(2, "late")) == -2
        with pytest.raises(JobTimeout):
            await pool.process(Item(3, seconds=9.0), timeout=1.0)
        assert await pool.process(Item(4)) == -4
    assert ends.opened == 4


# ----------------------------------------------------------------------
# Around the pool.


class Shared:
    """Something that all workers of a pool share."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def __call__(self) -> Any:
        raise AssertionError("only what it gives is a worker")

    @asynccontextmanager
    async def around_pool(self, size: int) -> AsyncIterator[Any]:
        self.log.append(("open", size))
        ends = Ends()
        try:
            yield ends.worker
        finally:
            self.log.append(("close", ends.opened))


async def test_what_workers_share_is_open_as_long_as_the_pool_is(
    autojump_clock: MockClock,
) -> None:
    log: list[Any] = []
    async with open_pool(2, worker=Shared(log)) as pool:
        assert log == [("open", 2)]
        assert await pool.map(items_of("value", "value"), chunk=1) == [0, -1]
    assert log == [("open", 2), ("close", 2)]
    async with InlinePool(worker=Shared(log), size=2) as inline:
        assert await inline.process(Item(3)) == -3
    assert log[2:] == [("open", 2), ("close", 1)]


# ----------------------------------------------------------------------
# At any moment, and in any order.

ACTS = ["value", "value", "value", "error", "late", "lost", "exit", "planned"]


def run_virtually(main: Callable[[], Any]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


@given(
    size=st.integers(1, 3),
    chunk=st.none() | st.integers(1, 5),
    acts=st.lists(st.sampled_from(ACTS), max_size=12),
    after=st.none() | st.integers(0, 12),
    retries=st.booleans(),
    timeout=st.sampled_from([math.inf, 0.5]),
    streamed=st.booleans(),
    fed=st.booleans(),
    max_backlog=st.sampled_from([0, 1, 1024]),
)
def test_every_item_ends_once_whatever_becomes_of_its_call(
    size: int,
    chunk: int | None,
    acts: list[str],
    after: int | None,
    retries: bool,
    timeout: float,
    streamed: bool,
    fed: bool,
    max_backlog: int,
) -> None:
    items = items_of(*acts)
    ends = Ends()
    retry = Retry(attempts=2, backoff=lambda _: 0.25) if retries else None

    async def feed() -> AsyncIterator[Item]:
        for item in items_of(*acts):
            await trio.sleep(0.125)
            yield item

    async def watch(pool: Pool[Item, int]) -> None:
        while True:
            count = pool.statistics()
            assert count.running <= size
            # What is tried again, or has lost its worker, may pass the bound.
            calls = size * (chunk or 1) if retries else size
            assert count.queued + count.delayed <= max_backlog + calls
            assert_books_balance(pool)
            await trio.sleep(0.0625)

    async def work(pool: Pool[Item, int]) -> list[Settled[Item, int]]:
        how: Any = {"chunk": chunk, "timeout": timeout}
        items: Any = feed() if fed else items_of(*acts)
        if streamed:
            async with pool.stream(items, outcomes=True, **how) as results:
                return [result async for result in results]
        return await pool.settle(items, **how)

    async def main() -> None:
        options: Any = {"restart": MANY_CRASHES, "retry": retry}
        # Of a stream that is left early.
        options["unobserved"] = "ignore"
        options["max_backlog"] = max_backlog
        async with (
            open_pool(size, worker=ends.worker, **options) as pool,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(watch, pool)
            settled: list[Settled[Item, int]] = []
            scope = trio.CancelScope()
            if after is not None:
                scope.deadline = trio.current_time() + after / 8
            with scope:
                settled = await work(pool)
            await settle(pool)
            assert_books_balance(pool)
            nursery.cancel_scope.cancel()
            count = pool.statistics()
            assert count.running == count.queued == count.delayed == 0
            if scope.cancelled_caught:
                return
            assert [s.index for s in settled] == list(range(len(items)))
            assert count.accepted == len(items)
            for item, fate in zip(items, fates(settled), strict=True):
                if fate == "ok":
                    assert item.act in {"value", "late", "exit", "lost", "planned"}
                elif fate == "KeyError":
                    assert item.act == "error"
            if not retries:
                # Nothing is run twice.
                assert set(Counter(ends.log).values()) <= {1}
            if chunk == 1 and timeout == math.inf:
                for item, fate in zip(items, fates(settled), strict=True):
                    expected = {"error": "KeyError", "value": "ok", "late": "ok"}
                    assert fate == expected.get(item.act, "WorkerCrashed")

    run_virtually(main)


@pytest.mark.parametrize(
    "acts", [["value", "error", "value"], ["late", "exit", "lost"]]
)
@pytest.mark.parametrize("call", ["map", "settle", "stream"])
def test_a_call_for_several_is_cancelled_at_each_of_its_waits(
    acts: list[str], call: str
) -> None:
    async def body(scope: trio.CancelScope) -> None:
        ends = Ends()
        items = items_of(*acts, "value")
        options: Any = {"restart": MANY_CRASHES, "unobserved": "ignore"}
        async with open_pool(2, worker=ends.worker, **options) as pool:
            try:
                with scope:
                    if call == "stream":
                        how: Any = {"chunk": 3, "outcomes": True, "ahead": 9}
                        async with pool.stream(items, **how) as results:
                            async for _ in results:
                                pass
                    else:
                        await getattr(pool, call)(items, chunk=3)
            except* (KeyError, WorkerCrashed):
                pass
            await settle(pool)
            assert_books_balance(pool)
            assert await pool.process(Item(9)) == -9
            assert set(Counter(ends.log).values()) == {1}

    assert cancel_everywhere(body) > 5


async def test_a_pool_that_stops_ends_the_items_of_a_call(
    ends: Ends, autojump_clock: MockClock
) -> None:
    async with open_pool(1, worker=ends.worker) as pool:
        async with trio.open_nursery() as nursery:
            reading = functools.partial(pool.settle, items_of(*["value"] * 6), chunk=4)

            async def read() -> None:
                with pytest.raises(PoolClosed):
                    await reading()

            nursery.start_soon(read)
            await trio.sleep(0.5)
            pool.cancel()
    count = pool.statistics()
    assert count.cancelled == count.accepted == 4
    assert_books_balance(pool)


@pytest.mark.parametrize("way", ["cancel", "shutdown"])
async def test_what_waits_for_its_next_worker_ends_with_the_pool(
    ends: Ends, way: str, autojump_clock: MockClock
) -> None:
    outcomes: list[Any] = []
    async with open_pool(1, worker=ends.worker) as pool, trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(PoolClosed):
                items = items_of("late", "late", "value")
                async with pool.stream(items, chunk=3, outcomes=True) as results:
                    outcomes.extend([result async for result in results])

        await pool.process(Item(9))
        pool.pause()
        nursery.start_soon(read)
        await trio.sleep(0.1)
        pool.resume()
        await trio.sleep(0.0)
        pool.pause()
        await trio.sleep(1.0)
        if way == "cancel":
            pool.cancel()
        else:
            await pool.shutdown(grace=0)
    assert_books_balance(pool)
    assert pool.statistics().queued == 0


@pytest.mark.parametrize("kind", ["on_job_queue", "on_job_start", "on_job_complete"])
@pytest.mark.parametrize("number", [1, 2, 3])
async def test_a_hook_may_stop_the_pool_among_the_items_of_a_call(
    ends: Ends, kind: str, number: int, autojump_clock: MockClock
) -> None:
    told = 0

    def stop(_: object) -> None:
        nonlocal told
        told += 1
        if told == number:
            pool.cancel()

    hooks = type("Stop", (Hooks,), {kind: lambda self, event: stop(event)})()
    items = items_of("value", "exit", "value", "value")
    async with open_pool(1, worker=ends.worker, hooks=[hooks]) as pool:
        try:
            await pool.settle(items, chunk=4)
        except PoolClosed:
            assert told >= number
    assert_books_balance(pool)
    count = pool.statistics()
    assert count.queued == count.running == 0


async def test_items_of_a_call_that_is_over_took_their_share_of_its_time(
    ends: Ends, autojump_clock: MockClock
) -> None:
    async with open_pool(1, worker=ends.worker) as pool:
        await trio.sleep(1.0)
        slow = items_of(*["value"] * 4, seconds=9.0)
        await pool.settle(slow, chunk=4, timeout=0.5)
        run = pool.statistics().run
    assert (run.count, run.mean) == (4, pytest.approx(0.5))


async def test_a_call_for_two_has_as_much_time_as_both(
    ends: Ends, autojump_clock: MockClock
) -> None:
    slow = items_of(*["value"] * 2, seconds=0.75)
    async with open_pool(1, worker=ends.worker) as pool:
        assert fates(await pool.settle(slow, chunk=2, timeout=1.0)) == ["ok"] * 2


async def test_others_have_their_turn_while_the_items_of_a_call_are_answered(
    ends: Ends, autojump_clock: MockClock
) -> None:
    class Slow(Hooks):
        def on_job_complete(self, event: Any) -> None:
            time.sleep(0.001)
            turns.append(others)

    others = 0
    turns: list[int] = []

    async def count() -> None:
        nonlocal others
        while True:
            others += 1
            await trio.lowlevel.checkpoint()

    async with (
        open_pool(1, worker=ends.worker, hooks=[Slow()]) as pool,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(count)
        with trio.CancelScope(shield=True):
            await pool.map(items_of(*["value"] * 10, seconds=0.0), chunk=10)
        nursery.cancel_scope.cancel()
    assert len(set(turns)) > 5


async def test_items_of_a_call_end_with_what_their_worker_lives_in(
    ends: Ends, autojump_clock: MockClock
) -> None:
    """No cancellation of theirs, nor of the pool's."""
    scopes: list[trio.CancelScope] = []

    @asynccontextmanager
    async def worker() -> AsyncIterator[Callable[[Item], Any]]:
        with trio.CancelScope() as scope:
            scopes.append(scope)
            async with ends.worker() as handler:
                yield handler

    async with (
        open_pool(1, worker=worker, restart=MANY_CRASHES) as pool,
        trio.open_nursery() as nursery,
    ):

        async def cancel() -> None:
            await trio.sleep(0.6)
            scopes[0].cancel()

        nursery.start_soon(cancel)
        settled = await pool.settle(items_of(*["value"] * 6), chunk=4)
    assert fates(settled) == [*["WorkerCrashed"] * 4, "ok", "ok"]
    assert_books_balance(pool)


async def test_the_errors_of_a_call_are_freed_with_their_last_reference(
    ends: Ends, autojump_clock: MockClock
) -> None:
    gc.collect()
    gc.disable()
    try:
        async with open_pool(1, worker=ends.worker) as pool:
            items = items_of("value", "mishap", "value", "mishap")
            settled = await pool.settle(items, chunk=5)
            errors = [
                weakref.ref(s.outcome.error)
                for s in settled
                if isinstance(s.outcome, outcome.Error)
            ]
            assert len(errors) == 2
            del settled
            # The worker still has the last one.
            assert await pool.map(items_of("value")) == [0]
            await settle(pool)
            assert [error() for error in errors] == [None] * 2
    finally:
        gc.enable()


async def test_a_chunk_makes_no_difference_where_no_call_carries_several(
    autojump_clock: MockClock,
) -> None:
    pulled = 0

    async def source() -> AsyncIterator[int]:
        nonlocal pulled
        while True:
            pulled += 1
            yield pulled

    async with open_pool(2, trio.sleep) as pool:
        with trio.move_on_after(10):
            await pool.map(source(), chunk=1000)
    assert pulled < 20
