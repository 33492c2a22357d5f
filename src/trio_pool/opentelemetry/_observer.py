"""The instruments that read pools when OpenTelemetry collects metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import Lock
from time import monotonic
from typing import Any, final
from weakref import WeakKeyDictionary, WeakValueDictionary

from opentelemetry import metrics
from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation

from .._checks import refuse
from ._figures import FIGURES, AnyPool, Figure, Reading, read

# Seconds for which a reading serves those instruments that have not used it yet.
_FRESH = 0.25


@final
class PoolObserver:
    """Tells a meter of pools; made by `observe_pools`.

    Pools are held weakly; `add` and `remove` may come at any time.
    """

    # Only `observe_pools` makes observers, one for each provider.
    def __init__(self, meter: Meter) -> None:
        self._pools: WeakValueDictionary[str, AnyPool] = WeakValueDictionary()
        self._before: WeakKeyDictionary[AnyPool, Reading] = WeakKeyDictionary()
        self._lock = Lock()
        self._readings: list[tuple[str, Reading]] = []
        self._read_at = float("-inf")
        self._used: set[str] = set()
        for figure in FIGURES:
            make: Any = getattr(meter, f"create_observable_{figure.kind}")
            callback = self._callback(figure)
            make(figure.name, [callback], unit=figure.unit, description=figure.text)

    def __repr__(self) -> str:
        count = len(self._pools)
        return f"<trio_pool.opentelemetry.PoolObserver: {count} pools>"

    def add(self, pool: AnyPool) -> None:
        """Tell of this pool too, from the next collection on.

        It takes the place of a closed pool of the same name.

        Raises:
          TypeError: it is no pool.
          ValueError: another open pool has the name.
        """
        if not callable(getattr(pool, "statistics", None)):
            raise TypeError(refuse("pool", pool, "a pool, as open_pool gives it"))
        there = self._pools.get(pool.name)
        if there is not None and there is not pool and not there.closed:
            expected = "another than that of an open pool that is observed"
            raise ValueError(refuse("the pool's name", pool.name, expected))
        self._pools[pool.name] = pool

    def remove(self, pool: AnyPool) -> None:
        """Tell of this pool no more; does nothing if it is not there."""
        if self._pools.get(pool.name) is pool:
            del self._pools[pool.name]

    def _callback(
        self, figure: Figure
    ) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            found: list[Observation] = []
            for name, reading in self._read_for(figure.name):
                for value, label in figure.values(reading):
                    facts: dict[str, str | int] = {"trio_pool.name": name}
                    if label is not None:
                        facts[figure.label] = label
                    found.append(Observation(value, facts))
            return found

        return observe

    def _read_for(self, instrument: str) -> list[tuple[str, Reading]]:
        """Return the reading that its siblings had, unless it had that itself.

        Instruments are asked one by one, and nothing says which belong to one
        collection. So the figures of one agree, and each pool is read once.
        """
        with self._lock:
            if instrument in self._used or monotonic() - self._read_at > _FRESH:
                self._used.clear()
                self._readings = [
                    (name, self._read(pool))
                    for name, pool in sorted(self._pools.items())
                ]
                self._read_at = monotonic()
            self._used.add(instrument)
            return self._readings

    def _read(self, pool: AnyPool) -> Reading:
        reading = self._before[pool] = read(pool, self._before.get(pool))
        return reading


# A provider hears only the first of two instruments of one name, and says nothing
# of it: so there is one observer for each. What stands for the provider of the
# program is another object once that is set.
_observers: WeakKeyDictionary[object, PoolObserver] = WeakKeyDictionary()


def observe_pools(
    *pools: AnyPool, meter_provider: MeterProvider | None = None
) -> PoolObserver:
    """Have the figures of pools among the metrics that OpenTelemetry collects.

    Returns the observer of the provider, which is that of the program if none
    is given, and always the same one: ``add`` and ``remove`` change of which
    pools it tells. They are told apart by their names, in the attribute
    ``trio_pool.name``, so give them one. Each pool is read once a collection,
    on whatever thread that is, without any call of trio: a job pays nothing
    for it. Percentiles are those since the last reading; where two readers
    collect from one provider, each sees a share.

    Shutting a provider down collects and exports once more, which takes as long
    as the exporter does. In a trio program do that after `trio.run`, or by
    ``await trio.to_thread.run_sync(provider.shutdown)``.

    Raises:
      TypeError: one is no pool.
      ValueError: two open pools have one name.
    """
    ours = metrics.get_meter_provider()
    provider = ours if meter_provider is None else meter_provider
    key = PoolObserver if provider is ours else provider
    observer = _observers.get(key) or _observers.get(provider)
    if observer is None:
        observer = PoolObserver(provider.get_meter("trio_pool"))
    _observers[key] = observer
    for pool in pools:
        observer.add(pool)
    return observer
