"""Measure what it costs a job that its pool is watched, and what a look costs.

Run ``python benchmarks/observed.py``. Pools that tell Prometheus, OpenTelemetry or
logging take turns with one that tells nobody; ratios are to that one.
"""

from __future__ import annotations

import argparse
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from functools import partial
from time import perf_counter
from typing import Any

import trio
from compare import heading
from driving import Contender, Handler, Opener, no_op
from measuring import Comparison, Row, measure
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from prometheus_client import CollectorRegistry, generate_latest
from table import markdown

from trio_pool import open_pool
from trio_pool.logs import PoolLog
from trio_pool.opentelemetry import observe_pools, trace_jobs
from trio_pool.prometheus import PoolCollector

SCRAPES = 10
"""A second; of Prometheus itself it is one in 15 to 60 seconds."""

Watch = Callable[[Any], AbstractContextManager[None]]


@contextmanager
def collected(pool: Any, scraped: bool = False) -> Iterator[None]:
    """Have a pool in a registry, which a thread of its own may scrape."""
    registry, enough = CollectorRegistry(), threading.Event()
    registry.register(PoolCollector(pool))

    def scrape() -> None:
        while not enough.wait(1 / SCRAPES):
            generate_latest(registry)

    thread = threading.Thread(target=scrape)
    if scraped:
        thread.start()
    try:
        yield
    finally:
        enough.set()
        if scraped:
            thread.join()


@contextmanager
def observed(pool: Any) -> Iterator[None]:
    """Have a pool among the metrics of OpenTelemetry."""
    reader = InMemoryMetricReader()
    observe_pools(pool, meter_provider=MeterProvider([reader]))
    yield
    reader.collect()


@contextmanager
def logging_at(level: int) -> Iterator[None]:
    """Have all that is logged from this level on taken by nobody."""
    logger, handler = logging.getLogger("trio_pool"), logging.NullHandler()
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    yield
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


def nothing(_: Any) -> AbstractContextManager[None]:
    """Watch nothing."""
    return nullcontext()


def watched(
    many: bool, watch: Watch = nothing, level: int = logging.WARNING, **options: Any
) -> Opener:
    """Make an opener of `process`, or `map`, of a pool that is watched."""

    @asynccontextmanager
    async def opener(size: int, handler: Handler) -> AsyncGenerator[Any]:
        with logging_at(level):
            async with open_pool(size, handler, **options) as pool:
                with watch(pool):
                    yield pool.map if many else pool.process

    return opener


def traced(provider: Any = None) -> dict[str, Any]:
    """Return the options of a pool whose jobs have spans."""
    return {"middleware": [trace_jobs(provider)]}


def recording() -> TracerProvider:
    """Make a provider whose spans are made and exported nowhere."""
    provider = TracerProvider()
    provider.add_span_processor(SpanProcessor())
    return provider


EVERY: Any = {f"job_{kind}": 10 for kind in ("queue", "start", "complete")}


def openers(many: bool) -> dict[str, Opener]:
    """Return each way to be watched, the first of which is none."""
    make = partial(watched, many)
    return {
        "nobody": make(),
        "PoolCollector": make(collected),
        f"PoolCollector, {SCRAPES} scrapes/s": make(partial(collected, scraped=True)),
        "observe_pools": make(observed),
        "PoolLog at INFO": make(level=logging.INFO, plugins=[PoolLog()]),
        "PoolLog at DEBUG": make(level=logging.DEBUG, plugins=[PoolLog()]),
        "PoolLog, 3 lines a job": make(level=logging.DEBUG, plugins=[PoolLog(EVERY)]),
        "trace_jobs, no SDK": make(**traced()),
        "trace_jobs, not sampled": make(**traced(TracerProvider(sampler=ALWAYS_OFF))),
        "trace_jobs, recorded": make(**traced(recording())),
    }


def comparisons(jobs: int) -> Iterator[Comparison]:
    """Give the acts: what a job costs, and what a look at the pools does."""
    for callers in (1, 64):
        yield Comparison(
            "a job",
            f"process, {callers} caller{'s' * (callers > 1)}",
            {
                name: partial(Contender(opener).time_process, "no-op", jobs, callers)
                for name, opener in openers(many=False).items()
            },
            relation="it to first",
        )
    yield Comparison(
        "a job",
        "map, an item",
        {
            name: partial(Contender(opener).time_map, "no-op", jobs)
            for name, opener in openers(many=True).items()
        },
        relation="it to first",
    )
    looks = {
        "PoolCollector.collect": collect,
        "a scrape": scrape,
        "OpenTelemetry": read,
    }
    for name, look in looks.items():
        cases = {
            f"{count} pools": partial(time_look, look, count) for count in (1, 10, 100)
        }
        yield Comparison("a look", name, cases, relation="it to first")


Look = Callable[[Sequence[Any]], Callable[[], object]]


def collect(pools: Sequence[Any]) -> Callable[[], object]:
    """Return what reads pools as Prometheus has them read."""
    collector = PoolCollector(*pools)
    return lambda: list(collector.collect())


def scrape(pools: Sequence[Any]) -> Callable[[], object]:
    """Return what reads pools and writes them out as text."""
    registry = CollectorRegistry()
    registry.register(PoolCollector(*pools))
    return partial(generate_latest, registry)


def read(pools: Sequence[Any]) -> Callable[[], object]:
    """Return what reads pools as OpenTelemetry has them read."""
    reader = InMemoryMetricReader()
    observe_pools(*pools, meter_provider=MeterProvider([reader]))
    return reader.get_metrics_data


def time_look(look: Look, count: int) -> float:
    """Return microseconds of a look at so many pools that have run some jobs."""
    return trio.run(_time_look, look, count)


async def _time_look(look: Look, count: int) -> float:
    async with AsyncExitStack() as stack:
        pools = []
        for number in range(count):
            opened = open_pool(8, no_op, name=f"pool {number}")
            pools.append(await stack.enter_async_context(opened))
            for job in range(50):
                await pools[-1].process(job)
        take = look(pools)
        take()
        start = perf_counter()
        take()
        return (perf_counter() - start) * 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=6400, help="jobs a round")
    parser.add_argument("--rounds", type=int, default=9, help="rounds")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for comparison in comparisons(options.jobs):
        rows += measure(comparison, options.rounds)
    print(heading(options.jobs, options.rounds))
    print(markdown(rows))


if __name__ == "__main__":
    main()
