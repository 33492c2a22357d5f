"""How long others wait for their turn while the pool is at something big."""

from __future__ import annotations

import gc
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any, Literal

import trio
from driving import WORKERS, Opener, no_op
from trio.lowlevel import checkpoint

from trio_pool import open_pool

Way = Literal["pool.cancel()", "grace over", "error in the block"]

GRACE = 0.001


class Left(Exception):
    """What the block is left by."""


class Watch:
    """Another task of the same loop, which notes how long it was kept waiting."""

    longest = 0.0
    """Seconds between two of its turns."""

    async def run(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Take turn after turn, until cancelled."""
        task_status.started()
        last = perf_counter()
        while True:
            try:
                await checkpoint()
            finally:
                # The turn in which it is cancelled counts as well.
                now = perf_counter()
                self.longest = max(self.longest, now - last)
                last = now


@asynccontextmanager
async def watching() -> AsyncGenerator[Watch]:
    """Keep a watch around a block."""
    watch = Watch()
    async with trio.open_nursery() as nursery:
        await nursery.start(watch.run)
        yield watch
        nursery.cancel_scope.cancel()


async def _fill_and_end(way: Way, jobs: int, watched: bool) -> tuple[float, float]:
    grace = GRACE if way == "grace over" else math.inf
    options: dict[str, Any] = {"max_backlog": math.inf, "grace": grace}
    async with trio.open_nursery() as nursery:
        watch = Watch()
        try:
            async with open_pool(WORKERS, no_op, **options) as pool:
                pool.pause()
                replies = [pool.submit_nowait(x) for x in range(jobs)]
                # The collector's work for the filling is not the end's.
                gc.collect()
                if watched:
                    await nursery.start(watch.run)
                start = perf_counter()
                if way == "pool.cancel()":
                    pool.cancel()
                elif way == "error in the block":
                    raise Left
        except Left:
            pass
        seconds = perf_counter() - start
        # The watch gets its turn, and is off before the replies are looked at.
        await checkpoint()
        longest = watch.longest
        nursery.cancel_scope.cancel()
    assert all(reply.done for reply in replies)
    return seconds - (GRACE if way == "grace over" else 0.0), longest


async def time_to_end(way: Way, jobs: int) -> float:
    """Return microseconds for ending one of so many queued jobs in this way."""
    seconds, _ = await _fill_and_end(way, jobs, False)
    return seconds / jobs * 1e6


async def pause_of_end(way: Way, jobs: int) -> float:
    """Return the longest pause of the loop meanwhile, in milliseconds."""
    _, longest = await _fill_and_end(way, jobs, True)
    return longest * 1e3


async def pause_of_map(opener: Opener, items: int) -> float:
    """Return the longest pause of the loop while items are mapped, in ms."""
    async with opener(WORKERS, no_op) as map_items, watching() as watch:
        await map_items(range(items))
    return watch.longest * 1e3


async def pause_of_nothing(seconds: float) -> float:
    """Return the longest pause of a loop with one other busy task, in ms."""
    async with watching() as watch:
        end = perf_counter() + seconds
        while perf_counter() < end:
            await checkpoint()
    return watch.longest * 1e3
