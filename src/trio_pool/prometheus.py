"""A Prometheus collector: the figures of any number of pools, read when scraped.

It needs ``pip install trio-pool[prometheus]``. A job pays nothing for it: all
that is told has been counted by the pool anyway.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, final
from weakref import WeakKeyDictionary, WeakValueDictionary

import attrs

try:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector
except ModuleNotFoundError as _error:
    raise ImportError(
        f"trio_pool.prometheus needs {_error.name}, which is not installed: "
        "pip install trio-pool[prometheus]"
    ) from _error

from ._checks import refuse
from ._events import JobState, PoolState, PoolStatistics
from ._latency import Latency
from ._pool import Pool, TaskPool

_AnyPool: TypeAlias = Pool[Any, Any] | TaskPool

_EDGES = tuple(2.0**exponent for exponent in range(-12, 10))
"""Seconds up to which the buckets of both histograms reach, the last for all
above: 0.24 ms to 8.5 minutes. At powers of two a `Latency` is exact."""

_ENDS = tuple(state.value for state in JobState if state.terminal)
_CIRCUIT = ("closed", "half_open", "open")


@attrs.frozen(kw_only=True)
class _Reading:
    """What one pool said in one scrape: all its figures are of one moment."""

    name: str
    statistics: PoolStatistics
    waited: float
    """Seconds, of all jobs together."""
    ran: float
    state: str
    max_backlog: float
    circuit: str | None


def _read(name: str, pool: _AnyPool, sums: tuple[float, float]) -> _Reading:
    """Read a pool of which ``sums`` were told before."""
    config, count = pool.config, pool.statistics()
    return _Reading(
        name=name,
        statistics=count,
        waited=_sum(count.wait, sums[0]),
        ran=_sum(count.run, sums[1]),
        state=pool.state.value,
        max_backlog=config.max_backlog,
        # All that another thread can read of a breaker while it is in use.
        circuit=None if config.breaker is None else config.breaker.state,
    )


def _sum(times: Latency, before: float) -> float:
    # Where only times of 0.0 were added, rounding alone may let the product fall,
    # and what falls by anything counts as begun anew.
    return max(before, times.mean * times.count)


_Samples: TypeAlias = "Iterable[tuple[str, float]]"


@attrs.frozen
class _Figure:
    """One family of samples: its name, its help, what it says of a reading."""

    name: str
    text: str
    read: Callable[[_Reading], Any]
    label: str | None = None
    """What tells the samples of one pool apart; there is one without."""

    def samples(self, reading: _Reading) -> _Samples:
        """Give each value, with that of the label."""
        found = self.read(reading)
        return found if self.label else (("", found),)


def _one_of(states: Iterable[str], state: str) -> _Samples:
    return ((each, float(each == state)) for each in states)


def _ended(reading: _Reading) -> _Samples:
    return ((state, getattr(reading.statistics, state)) for state in _ENDS)


def _waiting(reading: _Reading) -> _Samples:
    count = reading.statistics
    return ("queued", count.queued), ("delayed", count.delayed)


def _workers(reading: _Reading) -> _Samples:
    count = reading.statistics
    # To another thread one of them may be a step older than the other.
    return ("busy", count.busy), ("idle", max(0, count.workers - count.busy))


def _states(reading: _Reading) -> _Samples:
    return _one_of((state.value for state in PoolState), reading.state)


def _circuit(reading: _Reading) -> _Samples:
    return () if reading.circuit is None else _one_of(_CIRCUIT, reading.circuit)


_COUNTERS = (
    _Figure("jobs_accepted", "Jobs accepted.", lambda r: r.statistics.accepted),
    _Figure("jobs_ended", "Jobs that ended, by how.", _ended, "state"),
    _Figure(
        "retries",
        "Attempts after the first that were scheduled.",
        lambda r: r.statistics.retries,
    ),
    _Figure(
        "restarts",
        "Crashed workers that were set up again.",
        lambda r: r.statistics.restarts,
    ),
)
_GAUGES = (
    _Figure("state", "Which state the pool is in: 1, the others 0.", _states, "state"),
    _Figure("jobs_running", "Jobs that a worker has.", lambda r: r.statistics.running),
    _Figure(
        "jobs_waiting",
        "Jobs that wait for a worker, or for their time.",
        _waiting,
        "state",
    ),
    _Figure("backlog_limit", "Jobs that may wait at most.", lambda r: r.max_backlog),
    _Figure(
        "oldest_wait_seconds",
        "How long the job that waits longest has waited.",
        lambda r: r.statistics.oldest_wait,
    ),
    _Figure("workers", "Workers that are set up.", _workers, "state"),
    _Figure("workers_wanted", "Workers wanted.", lambda r: r.statistics.size),
    _Figure(
        "breaker_state",
        "Which state the circuit breaker is in: 1, the others 0.",
        _circuit,
        "state",
    ),
)
_HISTOGRAMS = (
    _Figure(
        "wait_seconds",
        "How long the jobs that were started had waited.",
        lambda r: (r.statistics.wait, r.waited),
    ),
    _Figure(
        "run_seconds",
        "How long the attempts ran.",
        lambda r: (r.statistics.run, r.ran),
    ),
)


@final
class PoolCollector(Collector):
    """Tells Prometheus of pools, by their names: ``REGISTRY.register(...)``.

    One collector for all pools of a registry; `add` and `remove` may come at
    any time. Pools are held weakly. Whatever thread scrapes, each pool is read
    once a scrape, so its figures agree with each other, and no trio call is
    made. The names of all metrics begin with ``namespace``; the label ``pool``
    is the name of the pool, so give it one. Names of states, jobs and times are
    those of `PoolStatistics`; a state that outside its trio run nobody knows,
    as that of an open `CircuitBreaker`, is the one that was known last.

    Raises:
      TypeError, ValueError: ``namespace`` cannot begin a name; or as `add`.
    """

    def __init__(self, *pools: _AnyPool, namespace: str = "trio_pool") -> None:
        if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", namespace):
            expected = "letters, digits and underscores, no digit first"
            raise ValueError(refuse("namespace", namespace, expected))
        self._namespace = namespace
        self._pools: WeakValueDictionary[str, _AnyPool] = WeakValueDictionary()
        self._sums: WeakKeyDictionary[_AnyPool, tuple[float, float]]
        self._sums = WeakKeyDictionary()
        for pool in pools:
            self.add(pool)

    def __repr__(self) -> str:
        return f"<trio_pool.prometheus.PoolCollector: {len(self._pools)} pools>"

    def add(self, pool: _AnyPool) -> None:
        """Tell of this pool too, from the next scrape on.

        It takes the place of a closed pool of the same name.

        Raises:
          TypeError: it is no pool.
          ValueError: another open pool has the name; or the name is no text.
        """
        if not callable(getattr(pool, "statistics", None)):
            raise TypeError(refuse("pool", pool, "a pool, as open_pool gives it"))
        name = pool.name
        if not _is_text(name):
            expected = "text that can be written in UTF-8"
            raise ValueError(refuse("the pool's name", name, expected))
        there = self._pools.get(name)
        if there is not None and there is not pool and not there.closed:
            expected = "another than that of an open pool in this collector"
            raise ValueError(refuse("the pool's name", name, expected))
        self._pools[name] = pool

    def remove(self, pool: _AnyPool) -> None:
        """Tell of this pool no more; does nothing if it is not there."""
        if self._pools.get(pool.name) is pool:
            del self._pools[pool.name]

    def collect(self) -> Iterator[Metric]:
        """Read every pool once, and give what Prometheus is to be told."""
        return self._families([self._read(*named) for named in self._named_pools()])

    def describe(self) -> Iterator[Metric]:
        """Give all metrics without samples, as a registry asks when registering."""
        return self._families([])

    def _named_pools(self) -> list[tuple[str, _AnyPool]]:
        return sorted(self._pools.items())

    def _read(self, name: str, pool: _AnyPool) -> _Reading:
        reading = _read(name, pool, self._sums.get(pool, (0.0, 0.0)))
        self._sums[pool] = reading.waited, reading.ran
        return reading

    def _families(self, readings: Sequence[_Reading]) -> Iterator[Metric]:
        for figure in _COUNTERS:
            yield _fill(self._family(CounterMetricFamily, figure), figure, readings)
        for figure in _GAUGES:
            yield _fill(self._family(GaugeMetricFamily, figure), figure, readings)
        for figure in _HISTOGRAMS:
            histogram = self._family(HistogramMetricFamily, figure)
            for reading in readings:
                times, total = figure.read(reading)
                histogram.add_metric([reading.name], _buckets(times), total)
            yield histogram

    def _family(self, kind: type[Any], figure: _Figure) -> Any:
        labels = ["pool"] if figure.label is None else ["pool", figure.label]
        return kind(f"{self._namespace}_{figure.name}", figure.text, labels=labels)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fill(family: Any, figure: _Figure, readings: Sequence[_Reading]) -> Metric:
    for reading in readings:
        for label, value in figure.samples(reading):
            labels = [reading.name, label] if figure.label else [reading.name]
            family.add_metric(labels, value)
    return family  # type: ignore[no-any-return]


def _buckets(times: Latency) -> list[tuple[str, float]]:
    """Count the times up to each edge; those exactly there belong to the next."""
    found = [(str(edge), float(times.below(edge))) for edge in _EDGES]
    return [*found, ("+Inf", float(times.count))]
