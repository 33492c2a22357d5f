"""Which figures OpenTelemetry is told of a pool: their names, kinds and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, Literal, TypeAlias

import attrs

from .._events import JobState, PoolState, PoolStatistics
from .._latency import Latency
from .._pool import Pool, TaskPool

AnyPool: TypeAlias = Pool[Any, Any] | TaskPool
Kind: TypeAlias = Literal["counter", "up_down_counter", "gauge"]
Value: TypeAlias = tuple[float, str | int | None]
"""A value, and that of the attribute that tells it from its siblings."""

_LIVE = tuple(state.value for state in JobState if not state.terminal)
_ENDS = tuple(state.value for state in JobState if state.terminal)


@attrs.frozen(kw_only=True)
class Reading:
    """What one pool said at one moment, and since the reading before."""

    statistics: PoolStatistics
    waited: float
    """Seconds, of all jobs together."""
    ran: float
    """Seconds, of all attempts together."""
    waits: Latency
    """Those since the reading before."""
    runs: Latency
    """Those since the reading before."""
    state: PoolState
    max_backlog: float


def read(pool: AnyPool, before: Reading | None) -> Reading:
    """Read a pool once; legal from any thread."""
    count = pool.statistics()
    wait, run = count.wait, count.run
    # By rounding alone a product may fall where only times of 0.0 were added,
    # and a sum that falls by anything counts as begun anew.
    return Reading(
        statistics=count,
        waited=max(wait.mean * wait.count, before.waited if before else 0.0),
        ran=max(run.mean * run.count, before.ran if before else 0.0),
        waits=wait.since(before.statistics.wait) if before else wait,
        runs=run.since(before.statistics.run) if before else run,
        state=pool.state,
        max_backlog=pool.config.max_backlog,
    )


@attrs.frozen
class Figure:
    """What one instrument tells."""

    kind: Kind
    name: str
    unit: str
    text: str
    values: Callable[[Reading], Iterable[Value]]
    label: str = ""
    """The attribute that tells the values of one pool apart; none if empty."""


def _just(path: str) -> Callable[[Reading], Iterable[Value]]:
    value = attrgetter(path)
    return lambda reading: ((value(reading), None),)


def _by_state(states: Iterable[str]) -> Callable[[Reading], Iterable[Value]]:
    return lambda reading: (
        (getattr(reading.statistics, state), state) for state in states
    )


def _workers(reading: Reading) -> Iterable[Value]:
    count = reading.statistics
    return (count.busy, "busy"), (max(0, count.workers - count.busy), "idle")


def _states(reading: Reading) -> Iterable[Value]:
    return ((int(state is reading.state), state.value) for state in PoolState)


def _limit(reading: Reading) -> Iterable[Value]:
    # An infinite value is warned of and left out at each collection.
    limit = reading.max_backlog
    return ((limit, None),) if limit < math.inf else ()


def _percentiles(times: Latency) -> Iterable[Value]:
    if not times.count:
        return ()
    return (times.p50, 50), (times.p95, 95), (times.p99, 99)


# Names, kinds and units as the semantic conventions have them for their kin, such
# as `db.client.connection.count`, `dotnet.thread_pool.queue.length`, `hw.status`.
JOBS = (
    Figure(
        "counter",
        "trio_pool.job.accepted",
        "{job}",
        "Jobs accepted.",
        _just("statistics.accepted"),
    ),
    Figure(
        "counter",
        "trio_pool.job.ended",
        "{job}",
        "Jobs that ended, by how.",
        _by_state(_ENDS),
        "trio_pool.job.state",
    ),
    Figure(
        "up_down_counter",
        "trio_pool.job.count",
        "{job}",
        "Jobs that wait, or that a worker has.",
        _by_state(_LIVE),
        "trio_pool.job.state",
    ),
    Figure(
        "counter",
        "trio_pool.job.retries",
        "{attempt}",
        "Attempts after the first that were scheduled.",
        _just("statistics.retries"),
    ),
)
TIMES = (
    Figure(
        "gauge",
        "trio_pool.job.oldest_wait",
        "s",
        "How long the job that waits longest has waited.",
        _just("statistics.oldest_wait"),
    ),
    Figure(
        "counter",
        "trio_pool.job.wait.count",
        "{job}",
        "Jobs whose wait is in trio_pool.job.wait.time.",
        _just("statistics.wait.count"),
    ),
    Figure(
        "counter",
        "trio_pool.job.wait.time",
        "s",
        "How long the jobs that were started had waited, all together.",
        _just("waited"),
    ),
    Figure(
        "gauge",
        "trio_pool.job.wait.percentile",
        "s",
        "How long the jobs had waited that were started since the last reading.",
        lambda reading: _percentiles(reading.waits),
        "trio_pool.percentile",
    ),
    Figure(
        "counter",
        "trio_pool.job.run.count",
        "{attempt}",
        "Attempts whose time is in trio_pool.job.run.time.",
        _just("statistics.run.count"),
    ),
    Figure(
        "counter",
        "trio_pool.job.run.time",
        "s",
        "How long the attempts ran, all together.",
        _just("ran"),
    ),
    Figure(
        "gauge",
        "trio_pool.job.run.percentile",
        "s",
        "How long the attempts ran that ended since the last reading.",
        lambda reading: _percentiles(reading.runs),
        "trio_pool.percentile",
    ),
)
POOLS = (
    Figure(
        "up_down_counter",
        "trio_pool.status",
        "1",
        "Which state the pool is in: 1, the others 0.",
        _states,
        "trio_pool.state",
    ),
    Figure(
        "up_down_counter",
        "trio_pool.backlog.limit",
        "{job}",
        "Jobs that may wait at most, where there is a bound.",
        _limit,
    ),
    Figure(
        "up_down_counter",
        "trio_pool.worker.count",
        "{worker}",
        "Workers that are set up.",
        _workers,
        "trio_pool.worker.state",
    ),
    Figure(
        "up_down_counter",
        "trio_pool.worker.wanted",
        "{worker}",
        "Workers wanted.",
        _just("statistics.size"),
    ),
    Figure(
        "counter",
        "trio_pool.worker.restarts",
        "{restart}",
        "Crashed workers that were set up again.",
        _just("statistics.restarts"),
    ),
)
FIGURES = (*JOBS, *TIMES, *POOLS)
