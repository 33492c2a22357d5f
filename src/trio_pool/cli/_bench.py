"""The command ``trio-pool bench``: what a job costs here, beside bare trio."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias

import trio

from .. import open_pool
from ._ends import DONE, CommandEnd
from ._files import Target
from ._floors import Handler, floor_map, floor_process
from ._measured import WORKERS, Measured, to_json, to_table
from ._signals import heed_signals

if TYPE_CHECKING:
    from argparse import _SubParsersAction  # pyright: ignore[reportPrivateUsage]

Opener: TypeAlias = Callable[[int, Handler], AbstractAsyncContextManager[Handler]]
Drive: TypeAlias = Callable[[Handler, int], Awaitable[None]]

_CALLERS = 64

_DESCRIPTION = """\
Measure what a job that does nothing costs in a pool of 8 workers, beside what bare
trio needs for the same: parked tasks that are woken by hand, and workers that share
an iterator. Both are measured in turns, in this process. The ratio of the minima
holds on other machines too, the microseconds do not."""


def add_to(commands: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add_parser(
        "bench",
        help="measure what a pool costs on this machine",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--rounds", type=_whole, default=7, metavar="N", help="default: 7")
    add(
        "--jobs",
        type=_whole,
        default=6_400,
        metavar="N",
        help="jobs, or items, of one round; default: 6400",
    )
    add(
        "--json", action="store_true", help="write JSON, with the figures of each round"
    )


def _whole(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if not 1 <= number <= 1_000_000:
        expected = "a whole number, from 1 to 1,000,000"
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
    return number


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    try:
        return trio.run(_bench, options)
    except CommandEnd as end:
        if str(end):
            sys.stderr.write(f"trio-pool bench: {end}\n")
        return end.code


async def _bench(options: argparse.Namespace) -> int:
    work = trio.CancelScope()
    with heed_signals(work) as heard:
        with work:
            found = await measure(options.rounds, options.jobs)
            report = to_json if options.json else to_table
            text = report(found, options.rounds, options.jobs)
            Target("standard output", 1).write(text.encode())
        return DONE if heard.code is None else heard.code


async def measure(rounds: int, jobs: int) -> list[Measured]:
    """Measure all acts, in turns."""
    return [
        await _measure(act, floor, ours, drive, rounds, jobs)
        for act, floor, ours, drive in (
            ("process, 1 caller", floor_process, _pool_process, _call),
            (
                f"process, {_CALLERS} callers",
                floor_process,
                _pool_process,
                _call_by_many,
            ),
            ("map, an item", floor_map, _pool_map, _map),
        )
    ]


async def _measure(
    act: str, floor: Opener, ours: Opener, drive: Drive, rounds: int, jobs: int
) -> Measured:
    values: tuple[list[float], list[float]] = ([], [])
    number = _jobs_of(drive, jobs)
    for _ in range(rounds):
        for opener, found in zip((floor, ours), values, strict=True):
            # Bare trio is no safer than it must be: a cancelled twin would hang.
            with trio.CancelScope(shield=True):
                found.append(await _time(opener, drive, number) / number * 1e6)
            await trio.lowlevel.checkpoint()
    return Measured(act, tuple(values[0]), tuple(values[1]))


def _jobs_of(drive: Drive, jobs: int) -> int:
    # Each caller has as many as the others.
    return -(-jobs // _CALLERS) * _CALLERS if drive is _call_by_many else jobs


async def _time(opener: Opener, drive: Drive, jobs: int) -> float:
    """Return the seconds of so many jobs, without those of opening and closing."""
    async with opener(WORKERS, _do_nothing) as target:
        await drive(target, min(jobs, 512))
        # Nobody pays for the garbage of the one before.
        gc.collect()
        start = perf_counter()
        await drive(target, jobs)
        return perf_counter() - start


async def _do_nothing(job_input: Any) -> Any:
    return job_input


@asynccontextmanager
async def _pool_process(size: int, handler: Handler) -> AsyncGenerator[Handler, None]:
    async with open_pool(size, handler) as pool:
        yield pool.process


@asynccontextmanager
async def _pool_map(size: int, handler: Handler) -> AsyncGenerator[Handler, None]:
    async with open_pool(size, handler) as pool:
        yield pool.map


async def _call(process: Handler, jobs: int) -> None:
    for number in range(jobs):
        await process(number)


async def _call_by_many(process: Handler, jobs: int) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(_CALLERS):
            nursery.start_soon(_call, process, jobs // _CALLERS)


async def _map(map_items: Handler, jobs: int) -> None:
    await map_items(range(jobs))
