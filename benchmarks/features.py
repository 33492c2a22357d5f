"""Our own `process` with one feature switched on: what does it cost a job?

Names of the library are looked up when an opener is entered, so that an older
version, which lacks some, can still be measured in the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio
from driving import Handler, Opener
from ours import our_process

import trio_pool
from trio_pool import Hooks, open_pool

KEYS = 1000
RETRY = trio_pool.Retry(3)


class TwoHooks(Hooks):
    """Hears of two of the things that happen to a job."""

    def on_job_start(self, event: trio_pool.JobChanged) -> None:
        """Do nothing."""

    def on_job_complete(self, event: trio_pool.JobChanged) -> None:
        """Do nothing."""


async def one_layer(job: Any, call_next: Any) -> Any:
    """Only call on, as a middleware."""
    return await call_next(job)


def first(idle: Sequence[trio_pool.WorkerSnapshot]) -> trio_pool.WorkerSnapshot:
    """Choose the first of the idle workers."""
    return idle[0]


def with_options(make: Callable[[], dict[str, Any]]) -> Opener:
    """Make an opener of our own `process` with options of the pool."""

    @asynccontextmanager
    async def opener(size: int, handler: Handler) -> AsyncGenerator[Any]:
        async with open_pool(size, handler, **make()) as pool:
            yield pool.process

    return opener


@asynccontextmanager
async def process_with_events(size: int, handler: Handler) -> AsyncGenerator[Any]:
    """Our own `process` with an event stream that nobody reads."""
    async with open_pool(size, handler) as pool, pool.events():
        yield pool.process


def with_job_options(make: Callable[[int], dict[str, Any]]) -> Opener:
    """Make an opener of our own `process` with options of each job, by its number."""

    @asynccontextmanager
    async def opener(size: int, handler: Handler) -> AsyncGenerator[Any]:
        numbers = itertools.count()
        async with open_pool(size, handler) as pool:

            async def process(x: int) -> Any:
                return await pool.process(x, **make(next(numbers)))

            yield process

    return opener


POOL_OPTIONS: dict[str, Opener] = {
    "off": our_process,
    "timeout": with_options(lambda: {"timeout": 60}),
    "retry": with_options(lambda: {"retry": trio_pool.Retry(3)}),
    "two job hooks": with_options(lambda: {"hooks": [TwoHooks()]}),
    "middleware, one layer": with_options(lambda: {"middleware": [one_layer]}),
    "rate": with_options(lambda: {"rate": trio_pool.Rate(1e9, burst=10**9)}),
    "breaker": with_options(lambda: {"breaker": trio_pool.CircuitBreaker()}),
    "events": process_with_events,
    "limiter": with_options(lambda: {"limiter": trio.CapacityLimiter(64)}),
    "aging": with_options(lambda: {"aging": 60}),
    "max_jobs": with_options(lambda: {"max_jobs": 10**9}),
    "max_age": with_options(lambda: {"max_age": 3600}),
    "max_idle": with_options(lambda: {"max_idle": 3600}),
    "choose": with_options(lambda: {"choose": first}),
}
"""Options of the pool, by name; the first is none of them."""

JOB_OPTIONS: dict[str, Opener] = {
    # Given by keyword too, to make the same call.
    "off": with_job_options(lambda number: {"priority": 0 * number}),
    "priority": with_job_options(lambda number: {"priority": number % 3}),
    "key": with_job_options(lambda number: {"key": number % KEYS}),
    "retry of the job": with_job_options(lambda number: {"retry": RETRY}),
    "timeout of the job": with_job_options(lambda number: {"timeout": 60}),
    "key of 10": with_job_options(lambda number: {"key": number % 10}),
}
"""Options of each job, by name; the first is none of them."""
