"""Make the same calls of any contender, under trio or asyncio, and time them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from threading import Thread
from time import perf_counter
from typing import Any

import attrs
import trio

Handler = Callable[[Any], Awaitable[Any]]
Opener = Callable[[int, Handler], AbstractAsyncContextManager[Any]]
Drive = Callable[[Any, int, int], Awaitable[None]]

WORKERS = 8


async def no_op(x: Any) -> Any:
    """Do nothing, without a checkpoint."""
    return x


async def one_checkpoint(x: Any) -> Any:
    """Do nothing, with one checkpoint."""
    await trio.lowlevel.checkpoint()
    return x


async def one_checkpoint_of_asyncio(x: Any) -> Any:
    """Do nothing, with one turn of the loop."""
    await asyncio.sleep(0)
    return x


async def _caller(process: Any, share: int) -> None:
    for x in range(share):
        await process(x)


async def call_in_turn(process: Any, jobs: int, callers: int) -> None:
    """Make all jobs by so many callers at once."""
    if callers == 1:
        await _caller(process, jobs)
        return
    async with trio.open_nursery() as nursery:
        for _ in range(callers):
            nursery.start_soon(_caller, process, jobs // callers)


async def call_in_turn_under_asyncio(process: Any, jobs: int, callers: int) -> None:
    """Make all jobs by so many callers at once."""
    if callers == 1:
        await _caller(process, jobs)
        return
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(_caller(process, jobs // callers))


async def call_from_threads(process: Any, jobs: int, callers: int) -> None:
    """Make all jobs by so many threads at once; this ``process`` never awaits."""

    def caller() -> None:
        coroutine = _caller(process, jobs // callers)
        try:
            coroutine.send(None)
        except StopIteration:
            pass

    threads = [Thread(target=caller) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def call_once(map_items: Any, jobs: int, _: int) -> None:
    """Make all jobs by one call."""
    await map_items(range(jobs))


def _run_asyncio(fn: Callable[..., Any], *args: Any) -> Any:
    return asyncio.run(fn(*args))


@attrs.frozen
class Contender:
    """An opener of a ``process`` or a ``map``, and where it feels at home."""

    opener: Opener
    loop: str = "trio"
    drive: Drive | None = None
    """How its jobs are made, if not as everybody else's."""
    needs: str = ""
    """The library that must be there."""

    def handler(self, name: str) -> Handler:
        """Return the handler of this name that suits the loop."""
        if name == "no-op":
            return no_op
        return one_checkpoint if self.loop == "trio" else one_checkpoint_of_asyncio

    def run(self, fn: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """Run an async function to its end in a loop of its own."""
        return (trio.run if self.loop == "trio" else _run_asyncio)(fn, *args)

    def time_process(self, handler: str, jobs: int, callers: int) -> float:
        """Return microseconds for a job of so many callers at once."""
        usual = call_in_turn if self.loop == "trio" else call_in_turn_under_asyncio
        drive = self.drive or usual
        # Each caller makes as many as the others.
        jobs = max(callers, jobs - jobs % callers)
        args = self.opener, drive, self.handler(handler), jobs, callers
        return float(self.run(time_once, *args))

    def time_map(self, handler: str, jobs: int) -> float:
        """Return microseconds for an item of one call."""
        drive = self.drive or call_once
        args = self.opener, drive, self.handler(handler), jobs, 1
        return float(self.run(time_once, *args))


async def time_once(
    opener: Opener, drive: Drive, handler: Handler, jobs: int, callers: int
) -> float:
    """Return microseconds a job, after a warm-up of a tenth of the jobs.

    Opening and closing are outside the time.
    """
    async with opener(WORKERS, handler) as target:
        await drive(target, max(callers, jobs // 10), callers)
        start = perf_counter()
        await drive(target, jobs, callers)
        return (perf_counter() - start) / jobs * 1e6
