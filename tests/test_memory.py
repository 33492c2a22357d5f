"""The pool keeps nothing of a job that has ended, and its size does not grow.

By default a hundred thousand jobs are run; with ``TRIO_POOL_STRESS=1`` ten million.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import sys
import tracemalloc
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from types import CodeType
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import trio_pool
from trio_pool import (
    Backoff,
    CurrentJob,
    Drain,
    Hooks,
    JobCancelled,
    JobChanged,
    JobDropped,
    JobExpired,
    JobTimeout,
    Pool,
    Restart,
    Retry,
    WorkerCrashed,
    open_pool,
)

STRESS = bool(os.environ.get("TRIO_POOL_STRESS"))
JOBS = 10_000_000 if STRESS else 100_000 if sys.gettrace() is None else 20_000
TRACED_JOBS = 400_000 if STRESS else 24_000 if sys.gettrace() is None else 8_000
CALLERS = 64

ROOT = os.path.dirname(trio_pool.__file__) + os.sep


class Thing:
    """What jobs are given and give back: anything that can be seen to die."""


class Failure(Exception):
    """What jobs raise, with a thing in it."""


class Broken(Exception):
    """What a job raises that has spoilt its worker."""


class Fatal(BaseException):
    """What no handler should raise."""


owner: ContextVar[Thing | None] = ContextVar("owner", default=None)


class Traces:
    """Everything that came near a job, known by weak references only."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, weakref.ref[Any]]] = []

    def follow(self, what: str, thing: Any) -> Any:
        self.seen.append((what, weakref.ref(thing)))
        return thing

    def thing(self, what: str = "input") -> Thing:
        thing = Thing()
        self.seen.append((what, weakref.ref(thing)))
        return thing

    @property
    def alive(self) -> list[str]:
        return [what for what, ref in self.seen if ref() is not None]


class Call:
    """The input of a job: what it is to do, and what it is to do that with."""

    def __init__(self, act: str, traces: Traces) -> None:
        self.act = act
        self.traces = traces
        self.attempts = 0
        self.thing = traces.thing("what is in the input")
        traces.follow("the input", self)


async def handle(call: Call) -> Thing:
    """Do what one is told; leave a thing in a local, and one in a variable."""
    local = call.traces.thing("a local of the handler")
    owner.set(call.traces.thing("a variable set by the handler"))
    call.attempts += 1
    first = call.attempts == 1
    match call.act:
        case "fail":
            raise call.traces.follow("the error", Failure(local))
        case "fail once" if first:
            raise call.traces.follow("the error", Failure(local))
        case "fail in a group":
            errors = [call.traces.follow("the error", Failure(local))]
            raise ExceptionGroup("", errors)
        case "break":
            raise call.traces.follow("the error", Broken(local))
        case "die":
            raise call.traces.follow("the error", Fatal(local))
        case "die together":
            await trio.sleep(1)
            raise Fatal
        case "sleep":
            await trio.sleep_forever()
        case "linger":
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(2)
        case "checkpoint":
            await trio.lowlevel.checkpoint()
    return call.traces.thing("the result")


@asynccontextmanager
async def member() -> AsyncGenerator[Callable[[Call], Awaitable[Thing]], None]:
    yield handle


class Listener(Hooks):
    """Hears of everything, and keeps nothing."""

    def on_job_start(self, event: JobChanged) -> None:
        pass

    def on_job_error(self, event: JobChanged) -> None:
        pass


async def pass_on(job: CurrentJob, call_next: Any) -> Any:
    return await call_next()


# Each is the whole life of one or a few jobs, as a caller sees it. When it has
# returned, the caller has dropped all that it had. A reply keeps its error, whose
# traceback has the frames of who reads it; so these do not hold it meanwhile.

Act = Callable[[Pool[Call, Thing], Traces], Awaitable[None]]


async def process(pool: Pool[Call, Thing], traces: Traces) -> None:
    await pool.process(Call("", traces))


async def process_that_sleeps(pool: Pool[Call, Thing], traces: Traces) -> None:
    await pool.process(Call("checkpoint", traces))


async def process_with_options(pool: Pool[Call, Thing], traces: Traces) -> None:
    key = traces.thing("a key")
    await pool.process(Call("", traces), key=key, priority=1, timeout=2.0)


async def failed(pool: Pool[Call, Thing], traces: Traces) -> None:
    with pytest.raises(Failure) as caught:
        await pool.process(Call("fail", traces))
    # What pytest has caught is in a frame of which the traceback tells.
    del caught


async def failed_in_a_group(pool: Pool[Call, Thing], traces: Traces) -> None:
    try:
        await pool.process(Call("fail in a group", traces))
    except* Failure:
        pass


async def retried(pool: Pool[Call, Thing], traces: Traces) -> None:
    await pool.process(Call("fail once", traces), retry=Retry(2, Backoff(0.5)))


async def retried_in_vain(pool: Pool[Call, Thing], traces: Traces) -> None:
    try:
        await pool.process(Call("fail", traces), retry=Retry(3, Backoff(0.5)))
    except Failure:
        pass


async def timed_out(pool: Pool[Call, Thing], traces: Traces) -> None:
    try:
        await pool.process(Call("sleep", traces), timeout=1.0)
    except JobTimeout as error:
        traces.follow("the timeout", error)


async def cancelled_running(pool: Pool[Call, Thing], traces: Traces) -> None:
    with trio.move_on_after(1) as scope:
        await pool.process(Call("sleep", traces))
    assert scope.cancelled_caught


async def cancelled_waiting(pool: Pool[Call, Thing], traces: Traces) -> None:
    pool.pause()
    with trio.move_on_after(1) as scope:
        await pool.process(Call("", traces))
    pool.resume()
    assert scope.cancelled_caught


async def crashed(pool: Pool[Call, Thing], traces: Traces) -> None:
    try:
        await pool.process(Call("die", traces))
    except WorkerCrashed as error:
        traces.follow("the crash", error)
    else:
        raise AssertionError


async def broken(pool: Pool[Call, Thing], traces: Traces) -> None:
    try:
        await pool.process(Call("break", traces))
    except Broken:
        pass


async def submitted(pool: Pool[Call, Thing], traces: Traces) -> None:
    reply = await pool.submit(Call("checkpoint", traces))
    traces.follow("the reply", reply.outcome or Thing())
    await reply.wait()
    assert reply.outcome is not None


async def submitted_and_failed(pool: Pool[Call, Thing], traces: Traces) -> None:
    replies = [await pool.submit(Call("fail", traces))] * 2
    while replies:
        try:
            await replies.pop().wait()
        except Failure:
            pass


async def submitted_and_forgotten(pool: Pool[Call, Thing], traces: Traces) -> None:
    await pool.submit(Call("", traces))
    await pool.join()


async def submitted_late(pool: Pool[Call, Thing], traces: Traces) -> None:
    reply = await pool.submit(Call("", traces), delay=1.0, ttl=2.0, id="late")
    await reply.wait()


async def submitted_and_cancelled(pool: Pool[Call, Thing], traces: Traces) -> None:
    waiting = await pool.submit(Call("sleep", traces), delay=1.0)
    running = await pool.submit(Call("sleep", traces))
    await wait_all_tasks_blocked()
    replies = [waiting, running]
    assert waiting.cancel()
    assert running.cancel()
    del waiting, running
    while replies:
        try:
            await replies.pop().wait()
        except JobCancelled:
            pass


async def expired(pool: Pool[Call, Thing], traces: Traces) -> None:
    pool.pause()
    replies = [await pool.submit(Call("", traces), ttl=1.0)]
    try:
        await replies.pop().wait()
    except JobExpired as error:
        traces.follow("the expiry", error)
    pool.resume()


async def dropped(pool: Pool[Call, Thing], traces: Traces) -> None:
    pool.pause()
    replies = [pool.submit_nowait(Call("", traces)) for _ in range(5)]
    try:
        await replies.pop(0).wait()
    except JobDropped as error:
        traces.follow("the drop", error)
    else:
        raise AssertionError
    pool.resume()
    for reply in replies:
        await reply.wait()


async def drained(pool: Pool[Call, Thing], traces: Traces) -> None:
    drain: Drain[Thing] = Drain()
    await pool.submit_batch([Call("", traces), Call("", traces)], drain=drain)
    await pool.join()
    assert len(drain.collect()) == 2


async def mapped(pool: Pool[Call, Thing], traces: Traces) -> None:
    await pool.map(Call(act, traces) for act in ("", "checkpoint", "", ""))


async def mapped_and_failed(pool: Pool[Call, Thing], traces: Traces) -> None:
    acts = ("", "checkpoint", "fail", "sleep", "")
    try:
        await pool.map([Call(act, traces) for act in acts])
    except* Failure:
        pass


async def mapped_and_cancelled(pool: Pool[Call, Thing], traces: Traces) -> None:
    with trio.move_on_after(1) as scope:
        await pool.map([Call(act, traces) for act in ("", "sleep", "", "sleep")])
    assert scope.cancelled_caught


async def mapped_failed_and_cancelled(pool: Pool[Call, Thing], traces: Traces) -> None:
    with trio.move_on_after(1) as scope:
        try:
            await pool.map([Call(act, traces) for act in ("linger", "fail")])
        except* Failure:
            pass
    assert scope.cancelled_caught


def failing_input(traces: Traces) -> Iterator[Call]:
    yield Call("checkpoint", traces)
    raise traces.follow("the error of the input", Failure())


async def failing_feed(traces: Traces) -> AsyncGenerator[Call, None]:
    for call in failing_input(traces):
        yield call


async def mapped_from_a_failing_input(pool: Pool[Call, Thing], traces: Traces) -> None:
    await all_from_a_failing_input(pool.map, traces)


async def settled_from_a_failing_input(pool: Pool[Call, Thing], traces: Traces) -> None:
    await all_from_a_failing_input(pool.settle, traces)


async def all_from_a_failing_input(
    call: Callable[[Any], Awaitable[object]], traces: Traces
) -> None:
    for source in (failing_input, failing_feed):
        try:
            await call(source(traces))
        except Failure:
            pass
        else:
            raise AssertionError


async def streamed_from_a_failing_input(
    pool: Pool[Call, Thing], traces: Traces
) -> None:
    for source in (failing_input, failing_feed):
        try:
            async with pool.stream(source(traces)) as stream:
                async for thing in stream:
                    del thing
        except Failure:
            pass
        else:
            raise AssertionError


async def settled(pool: Pool[Call, Thing], traces: Traces) -> None:
    acts = ("", "checkpoint", "fail", "fail once", "die", "")
    results = await pool.settle(
        [Call(act, traces) for act in acts], retry=Retry(2, Backoff(0.5), on=Failure)
    )
    assert [type(result.outcome).__name__ for result in results] == (
        ["Value", "Value", "Error", "Value", "Error", "Value"]
    )


async def streamed(pool: Pool[Call, Thing], traces: Traces) -> None:
    calls = (Call(act, traces) for act in ("", "checkpoint", "", ""))
    async with pool.stream(calls) as stream:
        async for thing in stream:
            del thing


async def streamed_and_left(pool: Pool[Call, Thing], traces: Traces) -> None:
    calls = [Call(act, traces) for act in ("", "", "sleep", "checkpoint", "", "sleep")]
    async with pool.stream(calls, ordered=False, ahead=5) as stream:
        async for _ in stream:
            break


async def streamed_and_failed(pool: Pool[Call, Thing], traces: Traces) -> None:
    calls = [Call(act, traces) for act in ("", "fail", "checkpoint", "sleep")]
    read = 0
    try:
        async with pool.stream(calls) as stream:
            async for _ in stream:
                read += 1
    except Failure:
        pass
    assert read == 1


async def streamed_outcomes(pool: Pool[Call, Thing], traces: Traces) -> None:
    calls = [Call(act, traces) for act in ("", "fail", "die", "checkpoint")]
    async with pool.stream(calls, outcomes=True) as stream:
        async for result in stream:
            traces.follow("the outcome", result.outcome)


async def leased(pool: Pool[Call, Thing], traces: Traces) -> None:
    async with pool.lease() as worker:
        await worker.process(Call("", traces))
        try:
            await worker.process(Call("fail", traces))
        except Failure:
            pass
        with trio.move_on_after(1):
            await worker.process(Call("sleep", traces))


async def leased_and_crashed(pool: Pool[Call, Thing], traces: Traces) -> None:
    async with pool.lease() as worker:
        for _ in range(2):
            try:
                await worker.process(Call("die", traces))
            except WorkerCrashed:
                pass


ACTS: tuple[Act, ...] = (
    *(process, process_that_sleeps, process_with_options, failed, failed_in_a_group),
    *(retried, retried_in_vain, timed_out, cancelled_running, cancelled_waiting),
    *(crashed, broken, submitted, submitted_and_failed, submitted_and_forgotten),
    *(submitted_late, submitted_and_cancelled, expired, dropped, drained),
    *(mapped, mapped_and_failed, mapped_and_cancelled, settled, streamed),
    *(
        mapped_failed_and_cancelled,
        mapped_from_a_failing_input,
        settled_from_a_failing_input,
        streamed_from_a_failing_input,
        streamed_and_left,
        streamed_and_failed,
        streamed_outcomes,
        leased,
        leased_and_crashed,
    ),
)


def open_any(kind: str, size: int = 2) -> Any:
    options: dict[str, Any] = {
        "max_backlog": 4,
        "overflow": "drop_oldest",
        "crash_on": Broken,
        "restart": Restart(math.inf),
    }
    if kind == "worker":
        return open_pool(size, worker=member, **options)
    if kind == "everything":
        options |= {"hooks": [Listener()], "middleware": [pass_on]}
        options |= {"limiter": trio.CapacityLimiter(4), "max_jobs": 100}
    return open_pool(size, handle, **options)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Have nothing die but by its last reference, nor be kept by a log."""
    logger = logging.getLogger("trio_pool")
    logger.disabled = True
    gc.disable()
    yield
    gc.enable()
    logger.disabled = False


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
@pytest.mark.parametrize("kind", ["handler", "worker", "everything"])
async def test_what_a_caller_has_dropped_is_dead(
    no_collector: None, autojump_clock: trio.abc.Clock, kind: str, act: Act
) -> None:
    """At once, without the garbage collector, while all workers are idle."""
    traces = Traces()

    async def call(pool: Pool[Call, Thing]) -> None:
        owner.set(traces.thing("a variable of the caller"))
        await act(pool, traces)

    async with open_any(kind) as pool:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, pool)
        # Who crashed is restarted.
        await trio.sleep(10)
        assert len(traces.seen) >= 3
        if pool.statistics().restarts:
            await crash_all(pool)
        assert traces.alive == []


async def crash_all(pool: Pool[Call, Thing]) -> None:
    """Have each worker crash anew: its last error is kept, for `Pool.workers`."""
    before = pool.statistics().restarts

    async def crash() -> None:
        with pytest.raises(WorkerCrashed):
            await pool.process(Call("die together", Traces()))

    async with trio.open_nursery() as nursery:
        for _ in range(pool.size):
            nursery.start_soon(crash)
    await trio.sleep(10)
    assert pool.statistics().restarts == before + pool.size


async def test_of_crashes_only_the_last_of_each_worker_is_kept(
    no_collector: None, autojump_clock: trio.abc.Clock
) -> None:
    """For `Pool.workers`; with its error goes what that leads to."""
    traces: list[Traces] = []
    async with open_any("handler", 3) as pool:
        for _ in range(30):
            traces.append(Traces())
            await crashed(pool, traces[-1])
            await trio.sleep(100)
        kept = [trace for trace in traces if trace.alive]
        assert 1 <= len(kept) <= pool.size
        assert traces[-1] in kept


# What only the garbage collector could free.


def is_ours(thing: object) -> bool:
    """Whether an object is of a type of the pool's, or runs code of the pool's."""
    if type(thing).__module__.partition(".")[0] == "trio_pool":
        return True
    for name in ("__code__", "f_code", "cr_code", "gi_code", "ag_code"):
        code = getattr(thing, name, None)
        if isinstance(code, CodeType) and code.co_filename.startswith(ROOT):
            return True
    return getattr(thing, "__self__", None) is not thing and is_bound_to_ours(thing)


def is_bound_to_ours(thing: object) -> bool:
    owner = getattr(thing, "__self__", None)
    return type(owner).__module__.partition(".")[0] == "trio_pool"


def collect_garbage() -> list[object]:
    """Return what the garbage collector finds, all of which is in cycles."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
    finally:
        gc.set_debug(0)
    found = gc.garbage[:]
    gc.garbage.clear()
    return found


@pytest.mark.parametrize("kind", ["handler", "worker", "everything"])
async def test_no_job_leaves_anything_for_the_garbage_collector(
    no_collector: None,
    autojump_clock: trio.abc.Clock,
    record_property: Callable[[str, object], None],
    kind: str,
) -> None:
    """Not one object, of all that jobs of every kind and fate had."""
    rounds = 20 if STRESS else 2

    async def call(pool: Pool[Call, Thing], act: Act) -> None:
        owner.set(Thing())
        await act(pool, Traces())

    async def call_all(pool: Pool[Call, Thing]) -> None:
        for act in ACTS:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call, pool, act)
            await trio.sleep(10)
        await crash_all(pool)

    async with open_any(kind) as pool:
        await call_all(pool)
        gc.collect()
        jobs = pool.statistics().accepted
        for _ in range(rounds):
            await call_all(pool)
        jobs = pool.statistics().accepted - jobs
        garbage = collect_garbage()
    ours = [thing for thing in garbage if is_ours(thing)]
    record_property("jobs", jobs)
    record_property("objects that the collector found", len(garbage))
    print(f"{jobs} jobs, {len(garbage)} objects for the collector, {len(ours)} of ours")
    assert jobs > 60 * rounds
    assert ours == []


def test_a_cycle_of_ours_would_be_seen() -> None:
    """The test above can fail: a pool's own records are a cycle at its end."""
    gc.collect()

    async def main() -> None:
        async with open_pool(1, handle) as pool:
            await pool.process(Call("", Traces()))

    trio.run(main)
    assert [thing for thing in collect_garbage() if is_ours(thing)]


# The same over very many jobs.


async def answer(number: int) -> tuple[int]:
    if not number % 8:
        await trio.lowlevel.checkpoint()
    return (number,)


async def process_many(pool: Pool[int, tuple[int]], jobs: int) -> int:
    """Have many callers, each of whom waits for each of his jobs."""
    done = 0

    async def call(share: int) -> None:
        nonlocal done
        for number in range(share):
            result = await pool.process(number)
            done += result == (number,)

    async with trio.open_nursery() as nursery:
        for _ in range(CALLERS):
            nursery.start_soon(call, jobs // CALLERS)
    return done


async def map_many(pool: Pool[int, tuple[int]], jobs: int) -> int:
    done = 0
    for start in range(0, jobs, 1000):
        numbers = range(start, start + 1000)
        done += len(await pool.map(numbers))
    return done


async def stream_many(pool: Pool[int, tuple[int]], jobs: int) -> int:
    done = 0
    async with pool.stream(range(jobs)) as stream:
        async for (number,) in stream:
            done += number == done
    return done


async def submit_many(pool: Pool[int, tuple[int]], jobs: int) -> int:
    done = 0
    for start in range(0, jobs, 500):
        numbers = range(start, start + 500)
        replies = [await pool.submit(number) for number in numbers]
        for number, reply in zip(numbers, replies, strict=True):
            result = await reply.wait()
            done += result == (number,)
    return done


WAYS = (process_many, map_many, stream_many, submit_many)


async def run_many(way: Any, jobs: int, measure: Callable[[], int]) -> list[int]:
    """Return what is measured before and after each tenth of the jobs but the first."""
    figures: list[int] = []
    total = 0
    # What is there already is not to be looked at each time.
    gc.collect()
    gc.freeze()
    try:
        async with open_pool(8, answer) as pool:
            for part in range(11):
                # The first part is there to fill all caches.
                done = await way(pool, jobs // 10)
                assert done >= jobs // 10 - CALLERS
                total += done
                if part:
                    gc.collect()
                    figures.append(measure())
            assert pool.statistics().done == total
    finally:
        gc.unfreeze()
    return figures


def traced_bytes() -> int:
    return tracemalloc.get_traced_memory()[0]


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_memory_in_use_does_not_grow_with_the_jobs(
    record_property: Callable[[str, object], None], way: Any
) -> None:
    """No record is kept, by the books of Python's allocators.

    The pool notes the times of up to a few thousand jobs before it counts them,
    which come and go; a record for each job would soon be more. It takes up to a
    second, and minutes under ``TRIO_POOL_STRESS=1``.
    """
    jobs = TRACED_JOBS // len(WAYS)
    tracemalloc.start()
    try:
        figures = trio.run(run_many, way, jobs, traced_bytes)
    finally:
        tracemalloc.stop()
    record_property("jobs", jobs)
    record_property("bytes in use after each tenth", figures)
    print(f"{way.__name__}: {jobs} jobs, bytes in use after each tenth: {figures}")
    assert len(figures) == 10
    assert max(figures) - figures[0] < 200_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_process_does_not_grow_with_the_jobs(
    record_property: Callable[[str, object], None], way: Any
) -> None:
    """Not by one byte for a job, as the system counts; 2 MB are left to chance.

    It takes about half a second, and minutes under ``TRIO_POOL_STRESS=1``.
    """
    jobs = JOBS // len(WAYS)
    figures = trio.run(run_many, way, jobs, resident_bytes)
    record_property("jobs", jobs)
    record_property("resident bytes after each tenth", figures)
    print(f"{way.__name__}: {jobs} jobs, resident bytes after each tenth: {figures}")
    assert len(figures) == 10
    assert max(figures) - figures[0] < 2 << 20
