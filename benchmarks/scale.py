"""What a job costs when very many others, workers, keys or priorities are there."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

import trio
from driving import WORKERS, Opener, call_in_turn, no_op

from trio_pool import open_pool

Options = Callable[[int], dict[str, Any]]

# A prime: its multiples visit all remainders in an order that looks like none.
STRIDE = 7919


def no_options(_: int) -> dict[str, Any]:
    """Give no options."""
    return {}


def spread_over_keys(number: int) -> Options:
    """Give each job one of so many keys, the same in each turn."""
    return lambda x: {"key": x % number}


def spread_over_priorities(number: int) -> Options:
    """Give each job one of so many priorities, none of which is the default."""
    return lambda x: {"priority": 1 + x * STRIDE % number}


async def job_at_depth(
    depth: int, jobs: int, options: Options = no_options, repeats: int = 3
) -> float:
    """Return microseconds for a job, from acceptance to end, while others wait.

    Each job gives in another one as it runs, so that the depth stays as it is.
    The best of several stretches counts, since filling up is what takes long.
    """
    left = 0
    over = trio.Event()
    turn = depth

    async def give_in_another(x: int) -> None:
        nonlocal left, turn
        left -= 1
        if left <= 0:
            # Workers that have their next job in hand still come by.
            if left == 0:
                pool.pause()
                over.set()
            return
        # The key of a job goes on to the next one, so that all keys stay alive;
        # priorities take turns, or only the highest would ever be seen.
        turn += 1
        submit(x, **options(x if by_key else turn))

    by_key = "key" in options(0)
    times: list[float] = []
    async with open_pool(WORKERS, give_in_another, max_backlog=math.inf) as pool:
        submit = pool.submit_nowait
        pool.pause()
        for x in range(depth + WORKERS):
            submit(x, **options(x))
        # What was filled in is old by the time that it counts, as it would be
        # in a backlog of hours; the collector stays on.
        gc.collect()
        for _ in range(repeats):
            left, over = jobs, trio.Event()
            start = perf_counter()
            pool.resume()
            await over.wait()
            times.append((perf_counter() - start) / jobs * 1e6)
        pool.cancel()
    return min(times)


async def job_among_workers(
    opener: Opener, workers: int, jobs: int, callers: int = 64
) -> float:
    """Return microseconds for a job where so many workers are."""
    async with opener(workers, no_op) as process:
        await call_in_turn(process, jobs // 10, callers)
        # What was made to open it is old, and the collector leaves it alone.
        gc.collect()
        start = perf_counter()
        await call_in_turn(process, jobs, callers)
        return (perf_counter() - start) / jobs * 1e6


async def open_and_close(workers: int) -> float:
    """Return microseconds for opening and closing one worker of so many."""
    start = perf_counter()
    async with open_pool(workers, no_op):
        pass
    return (perf_counter() - start) / workers * 1e6


async def start_and_cancel_tasks(tasks: int) -> float:
    """Return microseconds for starting and cancelling one sleeping task."""
    start = perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(tasks):
            nursery.start_soon(trio.sleep_forever)
        # A pool is open when its workers are ready, so these get to sleep too.
        for _ in range(2):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    return (perf_counter() - start) / tasks * 1e6
