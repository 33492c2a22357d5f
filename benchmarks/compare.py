"""Measure trio_pool beside its floors and alternatives, in one process.

Run ``python benchmarks/compare.py``. Every contender does the same jobs in
turn, for several rounds; minimum and median are in microseconds a job, and
the ratios are of the minima: these hold when the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from time import perf_counter
from typing import Any

import trio
import twins

from trio_pool import open_pool

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
    return found


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=6400, help="jobs a round")
    parser.add_argument("--rounds", type=int, default=9, help="rounds")
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, trio {trio.__version__}")
    print(f"{options.jobs} jobs a round, {options.rounds} rounds, 8 workers\n")
    print(f"{'act':40}{'contender':26}{'min us':>8}{'median':>8}{'ours/it':>9}")
    for name, act, handler, callers, contenders in acts():
        times: dict[str, list[float]] = {label: [] for label in contenders}
        for _ in range(options.rounds):
            for label, opener in contenders.items():
                times[label].append(
                    trio.run(time_once, opener, act, handler, options.jobs, callers)
                )
        ours = min(times["trio_pool"])
        for label, values in times.items():
            print(
                f"{name:40}{label:26}{min(values):8.2f}"
                f"{sorted(values)[len(values) // 2]:8.2f}{ours / min(values):8.2f}x"
            )
        print()


if __name__ == "__main__":
    main()
