"""Measure trio_pool beside its floors and alternatives, in one process.

Run ``python benchmarks/compare.py``. Every contender does the same jobs in
turn, for several rounds; minimum and median are in microseconds a job, and
the ratios are of the minima: these hold when the machine's speed drifts.
The ratio is ours to the contender's. The last tables have each feature
switched on alone, and its ratio to all of them off.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from time import perf_counter
from typing import Any

import trio
import twins

from trio_pool import (
    CircuitBreaker,
    Hooks,
    JobChanged,
    Rate,
    Retry,
    WorkerSnapshot,
    open_pool,
)

Opener = Callable[[int, Any], AbstractAsyncContextManager[Any]]


async def no_op(x: Any) -> Any:
    """Do nothing, without a checkpoint."""
    return x


async def one_checkpoint(x: Any) -> Any:
    """Do nothing, with one checkpoint."""
    await trio.lowlevel.checkpoint()
    return x


@asynccontextmanager
async def our_process(size: int, handler: Any) -> AsyncGenerator[Any]:
    """Our own `process`."""
    async with open_pool(size, handler) as pool:
        yield pool.process


@asynccontextmanager
async def our_timed_process(size: int, handler: Any) -> AsyncGenerator[Any]:
    """Our own `process` with a pool timeout."""
    async with open_pool(size, handler, timeout=60) as pool:
        yield pool.process


@asynccontextmanager
async def our_map(size: int, handler: Any) -> AsyncGenerator[Any]:
    """Our own `map`."""
    async with open_pool(size, handler) as pool:
        yield pool.map


class TwoHooks(Hooks):
    """Hears of two of the things that happen to a job."""

    def on_job_start(self, event: JobChanged) -> None:
        """Do nothing."""

    def on_job_complete(self, event: JobChanged) -> None:
        """Do nothing."""


async def one_layer(job: Any, call_next: Any) -> Any:
    """Only call on, as a middleware."""
    return await call_next(job)


def first(idle: Sequence[WorkerSnapshot]) -> WorkerSnapshot:
    """Choose the first of the idle workers."""
    return idle[0]


def with_options(make: Callable[[], dict[str, Any]]) -> Opener:
    """Make an opener of our own `process` with options of the pool."""

    @asynccontextmanager
    async def opener(size: int, handler: Any) -> AsyncGenerator[Any]:
        async with open_pool(size, handler, **make()) as pool:
            yield pool.process

    return opener


@asynccontextmanager
async def process_by_priority(size: int, handler: Any) -> AsyncGenerator[Any]:
    """Our own `process`, each job of one of three priorities."""
    async with open_pool(size, handler) as pool:

        async def process(x: int) -> Any:
            return await pool.process(x, priority=x % 3)

        yield process


@asynccontextmanager
async def process_by_key(size: int, handler: Any) -> AsyncGenerator[Any]:
    """Our own `process`, each job of one of 1,000 keys."""
    async with open_pool(size, handler) as pool:

        async def process(x: int) -> Any:
            return await pool.process(x, key=x % 1000)

        yield process


@asynccontextmanager
async def process_without_options(size: int, handler: Any) -> AsyncGenerator[Any]:
    """Our own `process`, called through a function as the two above."""
    async with open_pool(size, handler) as pool:

        async def process(x: int) -> Any:
            return await pool.process(x)

        yield process


@asynccontextmanager
async def process_with_events(size: int, handler: Any) -> AsyncGenerator[Any]:
    """Our own `process` with an event stream that nobody reads."""
    async with open_pool(size, handler) as pool, pool.events():
        yield pool.process


FEATURES: dict[str, Opener] = {
    "trio_pool": our_process,
    "timeout": our_timed_process,
    "retry": with_options(lambda: {"retry": Retry(3)}),
    "two job hooks": with_options(lambda: {"hooks": [TwoHooks()]}),
    "events": process_with_events,
    "middleware, one layer": with_options(lambda: {"middleware": [one_layer]}),
    "rate": with_options(lambda: {"rate": Rate(1e9, burst=10**9)}),
    "breaker": with_options(lambda: {"breaker": CircuitBreaker()}),
    "limiter": with_options(lambda: {"limiter": trio.CapacityLimiter(64)}),
    "aging": with_options(lambda: {"aging": 60}),
    "max_jobs": with_options(lambda: {"max_jobs": 10**9}),
    "max_age": with_options(lambda: {"max_age": 3600}),
    "max_idle": with_options(lambda: {"max_idle": 3600}),
    "choose": with_options(lambda: {"choose": first}),
}

JOB_OPTIONS: dict[str, Opener] = {
    "trio_pool": process_without_options,
    "priority": process_by_priority,
    "key": process_by_key,
}


async def call_in_turn(process: Any, jobs: int, callers: int) -> None:
    """Make all jobs by so many callers at once."""

    async def caller(share: int) -> None:
        for x in range(share):
            await process(x)

    if callers == 1:
        await caller(jobs)
        return
    async with trio.open_nursery() as nursery:
        for _ in range(callers):
            nursery.start_soon(caller, jobs // callers)


async def call_map(map_items: Any, jobs: int, _: int) -> None:
    """Make all jobs by one call."""
    await map_items(range(jobs))


async def time_once(
    opener: Opener,
    act: Callable[[Any, int, int], Awaitable[None]],
    handler: Any,
    jobs: int,
    callers: int,
) -> float:
    """Return microseconds a job."""
    async with opener(8, handler) as target:
        await act(target, jobs // 10, callers)
        start = perf_counter()
        await act(target, jobs, callers)
        return (perf_counter() - start) / jobs * 1e6


Act = tuple[str, Any, Any, int, dict[str, Opener]]

HANDLERS = (("no-op", no_op), ("one checkpoint", one_checkpoint))


def acts() -> list[Act]:
    """List what is measured, and the contenders of each."""
    process: dict[str, Opener] = {
        "trio_pool": our_process,
        "floor": twins.floor_process,
        "channel + reply channel": twins.channel_process,
        "trio_pool, timeout on": our_timed_process,
    }
    mapping: dict[str, Opener] = {
        "trio_pool": our_map,
        "floor": twins.floor_map,
        "channel + reply channel": twins.channel_map,
    }
    found: list[Act] = []
    for callers in (1, 64):
        for label, handler in HANDLERS:
            name = f"process, {callers} caller{'s' * (callers > 1)}, {label}"
            found.append((name, call_in_turn, handler, callers, process))
    for label, handler in HANDLERS:
        found.append((f"map, {label}", call_map, handler, 1, mapping))
    for callers in (1, 64):
        name = f"process, {callers} caller{'s' * (callers > 1)}, with"
        found.append((f"{name} option", call_in_turn, no_op, callers, FEATURES))
        found.append((f"{name} job option", call_in_turn, no_op, callers, JOB_OPTIONS))
    return found


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=6400, help="jobs a round")
    parser.add_argument("--rounds", type=int, default=9, help="rounds")
    parser.add_argument("--only", default="", help="acts whose name has this")
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, trio {trio.__version__}")
    print(f"{options.jobs} jobs a round, {options.rounds} rounds, 8 workers\n")
    print(f"{'act':40}{'contender':26}{'min us':>8}{'median':>8}{'ratio':>9}")
    for name, act, handler, callers, contenders in acts():
        if options.only not in name:
            continue
        # Beside the floors ours is the measure, beside itself it is the unit.
        inverse = "option" in name
        times: dict[str, list[float]] = {label: [] for label in contenders}
        for _ in range(options.rounds):
            for label, opener in contenders.items():
                times[label].append(
                    trio.run(time_once, opener, act, handler, options.jobs, callers)
                )
        ours = min(times["trio_pool"])
        for label, values in times.items():
            ratio = min(values) / ours if inverse else ours / min(values)
            print(
                f"{name:40}{label:26}{min(values):8.2f}"
                f"{sorted(values)[len(values) // 2]:8.2f}{ratio:8.2f}x"
            )
        print()


if __name__ == "__main__":
    main()
