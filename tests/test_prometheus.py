"""The Prometheus collector: valid, consistent, harmless, for any number of pools."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import (
    text_string_to_metric_families as text_families,
)
from prometheus_client.registry import REGISTRY
from trio.testing import MockClock

from trio_pool import (
    Backoff,
    CircuitBreaker,
    CircuitOpen,
    JobState,
    PoolBroken,
    PoolState,
    Restart,
    Retry,
    open_pool,
)
from trio_pool.prometheus import PoolCollector
from trio_pool.testing import InlinePool

ENDS = [state.value for state in JobState if state.terminal]


class Broken(Exception):
    """What breaks a worker."""


async def obey(job: Any) -> Any:
    """Raise an error, sleep for a number of seconds, or return what is given."""
    if isinstance(job, BaseException):
        raise job
    if isinstance(job, float):
        await trio.sleep(job)
    return job


class Scrape:
    """All samples of one scrape, read back from the OpenMetrics text."""

    def __init__(self, *collectors: PoolCollector) -> None:
        registry = CollectorRegistry()
        for collector in collectors:
            registry.register(collector)
        self.text = openmetrics(registry).decode()
        self.families = list(text_string_to_metric_families(self.text))
        self.samples = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in self.families
            for sample in family.samples
        }

    def value(self, metric: str, **labels: str) -> float:
        return self.samples[(f"trio_pool_{metric}", *sorted(labels.items()))]

    def by_state(self, metric: str, pool: str) -> dict[str, float]:
        return {
            dict(labels)["state"]: value
            for (name, *labels), value in self.samples.items()
            if name == f"trio_pool_{metric}" and ("pool", pool) in labels
        }

    def state(self, metric: str, pool: str) -> str:
        (found,) = (s for s, value in self.by_state(metric, pool).items() if value)
        return found

    def buckets(self, metric: str, pool: str) -> list[tuple[float, float]]:
        return [
            (float(dict(labels)["le"]), value)
            for (name, *labels), value in self.samples.items()
            if name == f"trio_pool_{metric}_bucket" and ("pool", pool) in labels
        ]

    def check_books(self, pool: str) -> None:
        waiting = self.by_state("jobs_waiting", pool)
        ended = self.by_state("jobs_ended_total", pool)
        assert sorted(ended) == sorted(ENDS)
        now = sum(waiting.values()) + self.value("jobs_running", pool=pool)
        accepted = self.value("jobs_accepted_total", pool=pool)
        assert accepted == now + sum(ended.values())

    def check_histogram(self, metric: str, pool: str) -> None:
        edges, counts = zip(*self.buckets(metric, pool), strict=True)
        assert list(edges) == sorted(edges)
        assert list(counts) == sorted(counts)
        assert (edges[-1], counts[-1]) == (
            math.inf,
            self.value(f"{metric}_count", pool=pool),
        )


async def test_a_life_of_a_pool_is_told_in_counters_and_gauges(
    autojump_clock: MockClock,
) -> None:
    async with open_pool(2, obey, name="press", max_backlog=8) as pool:
        collector = PoolCollector(pool)
        await pool.settle([1, 2, ValueError()])
        retry = Retry(2, Backoff(initial=0.25, jitter=0.0))
        await pool.settle([ValueError()], retry=retry)
        await pool.settle([3.0], timeout=1.0)
        for _ in range(3):
            pool.submit_nowait(5.0)
        pool.submit_nowait(5, delay=5)
        await trio.sleep(1.5)
        now = Scrape(collector)
        assert now.value("jobs_accepted_total", pool="press") == 9
        assert now.by_state("jobs_ended_total", "press") == {
            **dict.fromkeys(ENDS, 0),
            "done": 2,
            "failed": 2,
            "timed_out": 1,
        }
        assert now.by_state("jobs_waiting", "press") == {"queued": 1, "delayed": 1}
        assert now.value("jobs_running", pool="press") == 2
        assert now.value("retries_total", pool="press") == 1
        assert now.value("restarts_total", pool="press") == 0
        assert now.by_state("workers", "press") == {"busy": 2, "idle": 0}
        assert now.value("workers_wanted", pool="press") == 2
        assert now.value("backlog_limit", pool="press") == 8
        assert now.value("oldest_wait_seconds", pool="press") == 1.5
        assert now.by_state("breaker_state", "press") == {}
        now.check_books("press")
        pool.cancel()
    Scrape(collector).check_books("press")


async def test_the_state_of_a_pool_is_one_of_all(autojump_clock: MockClock) -> None:
    states = {state.value for state in PoolState}
    async with open_pool(1, obey, name="press") as pool:
        collector = PoolCollector(pool)
        assert Scrape(collector).state("state", "press") == "open"
        pool.pause()
        assert Scrape(collector).state("state", "press") == "paused"
        pool.resume()
        pool.submit_nowait(1.0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.shutdown)
            await trio.sleep(0.5)
            assert Scrape(collector).state("state", "press") == "closing"
    assert Scrape(collector).state("state", "press") == "closed"
    assert set(Scrape(collector).by_state("state", "press")) == states
    with pytest.raises(PoolBroken):
        async with open_pool(
            1, obey, name="broken", crash_on=Broken, restart=Restart(limit=0)
        ) as another:
            collector.add(another)
            await another.settle([Broken()])
            await trio.sleep_forever()
    assert Scrape(collector).state("state", "broken") == "broken"
    Scrape(collector).check_books("broken")


async def test_the_state_of_a_breaker_is_told_where_there_is_one(
    autojump_clock: MockClock,
) -> None:
    breaker = CircuitBreaker(failures=1, open_for=5.0)
    async with open_pool(1, obey, name="press", breaker=breaker) as pool:
        collector = PoolCollector(pool)
        assert Scrape(collector).state("breaker_state", "press") == "closed"
        await pool.settle([ValueError()])
        with pytest.raises(CircuitOpen):
            await pool.process(1)
        assert Scrape(collector).state("breaker_state", "press") == "open"
        in_thread = await trio.to_thread.run_sync(Scrape, collector)
        assert in_thread.state("breaker_state", "press") == "open"
        await trio.sleep(5)
        assert Scrape(collector).state("breaker_state", "press") == "half_open"


async def test_times_are_counted_at_every_power_of_two(
    autojump_clock: MockClock,
) -> None:
    runs = [0.0003, 0.3, 0.3, 0.7, 3.0, 600.0]
    async with open_pool(1, obey, name="press") as pool:
        collector = PoolCollector(pool)
        for seconds in runs:
            await pool.process(seconds)
        now = Scrape(collector)
    buckets = dict(now.buckets("run_seconds", "press"))
    assert min(buckets) == 2.0**-12
    assert sorted(buckets)[-2:] == [512.0, math.inf]
    for edge, count in buckets.items():
        assert count == sum(seconds < edge for seconds in runs)
    assert now.value("run_seconds_sum", pool="press") == pytest.approx(sum(runs))
    assert now.value("run_seconds_count", pool="press") == len(runs)
    now.check_histogram("run_seconds", "press")


async def test_sums_and_buckets_never_fall_from_one_scrape_to_the_next() -> None:
    before: dict[Any, float] = {}
    async with open_pool(3, obey, name="press") as pool:
        collector = PoolCollector(pool)
        for turn in range(60):
            await pool.settle([0.0001 * turn, turn])
            for _ in range(turn % 7):
                await pool.process(1)
            now = Scrape(collector)
            for metric in ("wait_seconds", "run_seconds"):
                now.check_histogram(metric, "press")
            rising = {
                key: value
                for key, value in now.samples.items()
                if key[0].endswith(("_total", "_sum", "_count", "_bucket"))
            }
            assert rising.keys() >= before.keys()
            assert all(value >= before.get(key, 0) for key, value in rising.items())
            before = rising


def sample_of(collector: PoolCollector, name: str) -> float:
    (found,) = (
        sample.value
        for metric in collector.collect()
        for sample in metric.samples
        if sample.name == name
    )
    return found


class Exact:
    """A pool of which every figure is set by hand."""

    name = "press"
    closed = False

    def __init__(self, real: Any) -> None:
        self._real = real
        self.times = real.statistics().wait
        self.state, self.config = real.state, real.config

    def statistics(self) -> Any:
        return attrs.evolve(self._real.statistics(), wait=self.times, run=self.times)


async def test_a_sum_does_not_fall_where_only_times_of_zero_were_added() -> None:
    async with open_pool(1, obey) as pool:
        exact: Any = Exact(pool)
        total, found = 0.1 + 0.2 + 0.3, list[float]()
        products = [total / count * count for count in range(3, 200)]
        assert products != sorted(products), "rounding is to make some of them fall"
        collector = PoolCollector(exact)
        for count in range(3, 200):
            exact.times = attrs.evolve(exact.times, count=count, mean=total / count)
            found.append(sample_of(collector, "trio_pool_wait_seconds_sum"))
    assert found == sorted(found)


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@given(st.lists(NAMES, min_size=1, max_size=2, unique=True))
def test_any_names_make_valid_openmetrics_and_text(names: list[str]) -> None:
    async def main() -> None:
        collector = PoolCollector()
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(live, collector, name)
            await trio.testing.wait_all_tasks_blocked()
            now = Scrape(collector)
            assert {dict(labels)["pool"] for (_, *labels) in now.samples} == set(names)
            registry = CollectorRegistry()
            registry.register(collector)
            text = generate_latest(registry).decode()
            found = list(text_families(text))
            assert len(found) == len(now.families)
            assert sum(len(f.samples) for f in found) == len(now.samples)
            nursery.cancel_scope.cancel()

    async def live(collector: PoolCollector, name: str) -> None:
        breaker = CircuitBreaker()
        async with open_pool(1, obey, name=name, breaker=breaker) as pool:
            collector.add(pool)
            await pool.map([1, 2])
            await trio.sleep_forever()

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_one_collector_serves_the_default_registry_and_others() -> None:
    async with open_pool(1, obey, name="a") as a, open_pool(1, name="b") as b:
        collector = PoolCollector(a, b, namespace="factory")
        REGISTRY.register(collector)
        try:
            with pytest.raises(ValueError, match="factory_jobs_accepted"):
                REGISTRY.register(PoolCollector(a, namespace="factory"))
            text = generate_latest(REGISTRY).decode()
            metric = "factory_jobs_accepted_total"
            assert text.count(f"# TYPE {metric} counter") == 1
            assert f'{metric}{{pool="a"}} 0.0' in text
            assert f'{metric}{{pool="b"}} 0.0' in text
            only = REGISTRY.restricted_registry([metric])  # type: ignore[no-untyped-call]
            assert generate_latest(only).decode().count("\n") == 4
        finally:
            REGISTRY.unregister(collector)
        assert Scrape(PoolCollector(a), PoolCollector(b, namespace="other")).families


def test_what_is_described_is_what_is_collected_without_samples() -> None:
    async def main() -> None:
        async with open_pool(1, obey, breaker=CircuitBreaker()) as pool:
            collector = PoolCollector(pool)
            described = [(m.name, m.type, m.samples) for m in collector.describe()]
            collected = [(m.name, m.type, []) for m in collector.collect()]
            assert described == collected
            assert all(metric.samples for metric in collector.collect())

    trio.run(main)
    assert [m.samples for m in PoolCollector().collect()] == [[]] * 14


async def test_names_and_help_texts_follow_the_conventions() -> None:
    async with open_pool(1, obey) as pool:
        families = list(PoolCollector(pool).collect())
    for family in families:
        assert family.name.startswith("trio_pool_")
        assert family.documentation.endswith(".")
        # Seconds, the unit of times, end the name; "total" is the format's.
        assert "total" not in family.name
    timed = {f.name for f in families if "wait" in f.name or "run_" in f.name}
    assert {n for n in timed if n.endswith("_seconds")} == timed - {
        "trio_pool_jobs_waiting"
    }


async def test_a_second_open_pool_of_a_name_is_refused_and_a_closed_one_replaced() -> (
    None
):
    async with open_pool(1, obey, name="press") as first:
        collector = PoolCollector(first)
        collector.add(first)
        async with open_pool(1, obey, name="press") as second:
            expected = "pool's name must be another .* open pool .* got 'press'"
            with pytest.raises(ValueError, match=expected):
                collector.add(second)
            with pytest.raises(ValueError, match=expected):
                PoolCollector(first, second)
            await first.map([1, 2, 3])
            assert Scrape(collector).value("jobs_accepted_total", pool="press") == 3
            collector.remove(second)
            assert Scrape(collector).value("jobs_accepted_total", pool="press") == 3
    async with open_pool(1, obey, name="press") as third:
        collector.add(third)
        assert Scrape(collector).value("jobs_accepted_total", pool="press") == 0
        collector.remove(first)
        assert len(Scrape(collector).samples) > 0
        collector.remove(third)
        collector.remove(third)
        assert Scrape(collector).samples == {}


async def test_pools_are_held_weakly() -> None:
    collector = PoolCollector()

    async def live() -> None:
        async with open_pool(1, obey, name="press") as pool:
            collector.add(pool)
            assert Scrape(collector).samples
        assert Scrape(collector).state("state", "press") == "closed"

    await live()
    gc.collect()
    assert Scrape(collector).samples == {}
    assert "0 pools" in repr(collector)


async def test_a_pool_for_unit_tests_can_be_added_too() -> None:
    pool: Any = InlinePool(obey)
    collector = PoolCollector(pool)
    assert await pool.process(1) == 1
    assert Scrape(collector).value("jobs_accepted_total", pool=pool.name) == 1


@pytest.mark.parametrize("bad", [None, "press", open_pool, object()])
def test_what_is_no_pool_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"pool must be a pool.*, got "):
        PoolCollector(bad)


@pytest.mark.parametrize("bad", ["", "a-b", "1a", "a b", "a\n", "ä", 'a"'])
def test_a_namespace_that_cannot_begin_a_name_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="namespace must be letters, digits"):
        PoolCollector(namespace=bad)


async def test_a_name_that_cannot_be_written_is_refused_before_it_breaks_a_scrape() -> (
    None
):
    async with open_pool(1, obey, name="\ud800") as pool:
        collector = PoolCollector()
        with pytest.raises(ValueError, match="UTF-8"):
            collector.add(pool)
        assert Scrape(collector).samples == {}


async def test_scrapes_of_other_threads_are_consistent_while_pools_come_and_go() -> (
    None
):
    collector, enough, failures = PoolCollector(), threading.Event(), list[object]()

    def scrape() -> None:
        try:
            while not enough.is_set():
                now = Scrape(collector)
                pools = {dict(k[1:]).get("pool", "") for k in now.samples}
                for pool in pools:
                    now.check_books(pool)
                    now.check_histogram("wait_seconds", pool)
                    now.check_histogram("run_seconds", pool)
        except BaseException as error:
            failures.append(error)
            raise

    async def live(name: str) -> None:
        async with open_pool(2, obey, name=name, max_backlog=4) as pool:
            collector.add(pool)
            await pool.settle([1, ValueError(), 0.0001] * 20)
            for number in range(20):
                await pool.submit(number, delay=0.0001)

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(trio.to_thread.run_sync, scrape)
        try:
            for turn in range(8):
                async with trio.open_nursery() as pools:
                    for number in range(3):
                        pools.start_soon(live, f"{number} {turn % 2}")
        finally:
            enough.set()
    assert failures == []


def test_a_scrape_outside_of_any_trio_run_works() -> None:
    async def main() -> Iterator[Any]:
        async with open_pool(1, obey, name="press", breaker=CircuitBreaker()) as pool:
            await pool.map([1, 2])
        return pool  # type: ignore[return-value]

    pool: Any = trio.run(main)
    now = Scrape(PoolCollector(pool))
    assert now.state("state", "press") == "closed"
    assert now.by_state("jobs_ended_total", "press")["done"] == 2


def run_program(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.run(
        command, capture_output=True, timeout=60, check=False, text=True
    )


def test_the_library_is_only_needed_by_this_module_and_its_lack_is_explained() -> None:
    done = run_program(
        "import sys\n"
        "sys.modules['prometheus_client'] = None\n"
        "import trio_pool\n"
        "try:\n"
        "    import trio_pool.prometheus\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert done.stderr == ""
    assert done.stdout.startswith("trio_pool.prometheus needs prometheus_client")
    assert done.stdout.endswith(": pip install trio-pool[prometheus]\n")
