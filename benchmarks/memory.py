"""What a waiting job and an idle worker hold, as tracemalloc counts it."""

from __future__ import annotations

import gc
import math
import tracemalloc
from typing import Any

import trio
from driving import WORKERS, no_op

from trio_pool import open_pool


def _traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def queued_job(jobs: int, keep_replies: bool) -> float:
    """Return bytes for one of so many queued jobs, its input not counted."""
    async with open_pool(WORKERS, no_op, max_backlog=math.inf) as pool:
        pool.pause()
        replies: list[Any] = [None] * jobs
        tracemalloc.start()
        try:
            before = _traced()
            for number in range(jobs):
                reply = pool.submit_nowait(None)
                if keep_replies:
                    replies[number] = reply
            found = (_traced() - before) / jobs
        finally:
            tracemalloc.stop()
        pool.cancel()
    return found


async def idle_worker(workers: int) -> float:
    """Return bytes for one of so many idle workers."""
    tracemalloc.start()
    try:
        before = _traced()
        async with open_pool(workers, no_op):
            return (_traced() - before) / workers
    finally:
        tracemalloc.stop()


async def sleeping_task(tasks: int) -> float:
    """Return bytes for one of so many tasks that sleep in a nursery."""
    tracemalloc.start()
    try:
        before = _traced()
        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(trio.sleep_forever)
            for _ in range(2):
                await trio.lowlevel.checkpoint()
            found = (_traced() - before) / tasks
            nursery.cancel_scope.cancel()
        return found
    finally:
        tracemalloc.stop()
