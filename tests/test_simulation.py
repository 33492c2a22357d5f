"""Simulated load: against queueing theory, against a recursion, and by hand."""

from __future__ import annotations

import gc
import logging
import math
import os
import random
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial
from heapq import heapreplace
from itertools import accumulate, islice
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from trio_pool import (
    Autoscale,
    Backoff,
    CircuitBreaker,
    Hooks,
    PoolBroken,
    PoolConfig,
    Rate,
    Restart,
    Retry,
)
from trio_pool.testing import (
    Bursts,
    Constant,
    Exponential,
    LogNormal,
    OnOff,
    Poisson,
    Recorded,
    Regular,
    SimulatedFailure,
    SimulationReport,
    Times,
    Trace,
    Uniform,
    simulate,
)

STRESS = bool(os.environ.get("TRIO_POOL_STRESS"))
FATES = (
    *("done", "failed", "timed_out", "cancelled", "expired", "dropped", "lost"),
    *("rejected", "refused"),
)
unbounded = {"max_backlog": math.inf}


def replay(*seconds: float) -> Recorded:
    return Recorded(seconds, order="replayed")


def conserves(report: SimulationReport) -> bool:
    return report.offered == sum(getattr(report, fate) for fate in FATES)


# ----------------------------------------------------------------------
# What the queue of a pool must do, whatever chance does.


def waits_of(arrivals: Iterable[float], services: Iterable[float], size: int):
    """Work out the waits of a first-in, first-out queue with several servers.

    The recursion of Kiefer and Wolfowitz (Trans. AMS 78, 1955): each job is
    served by whoever is free first.
    """
    free = [0.0] * size
    for arrival, service in zip(arrivals, services, strict=False):
        start = max(arrival, free[0])
        heapreplace(free, start + service)
        yield start - arrival


# Quarters are exact, and often the same.
quarters = st.integers(0, 12).map(lambda n: n / 4)


@given(st.lists(st.tuples(quarters, quarters), min_size=1), st.integers(1, 4))
def test_every_job_waits_as_long_as_the_recursion_says(
    pairs: list[tuple[float, float]], size: int
) -> None:
    times = list(accumulate(gap for gap, _ in pairs))
    services = [service for _, service in pairs]
    report = simulate(replay(*services), Trace(times), size)
    waits = sorted(waits_of(times, services, size))
    assert report.done == report.wait.count == len(pairs)
    assert report.wait.mean * len(pairs) == pytest.approx(sum(waits), abs=1e-9)
    assert report.wait.max == waits[-1]
    assert report.wait.p50 == waits[(len(waits) + 1) // 2 - 1]
    assert report.waited * len(pairs) == pytest.approx(sum(w > 0 for w in waits))
    assert report.run == Times.of(sorted(services))


@given(st.lists(st.tuples(quarters, quarters), min_size=1), st.integers(1, 4))
def test_littles_law_holds_exactly(pairs: list[tuple[float, float]], size: int) -> None:
    """Jobs waiting, on average: how many come a second times how long they wait.

    J. D. C. Little, "A Proof for the Queuing Formula L = lambda W" (1961);
    and so for the jobs that run, which are the workers that are busy.
    """
    times = accumulate(gap for gap, _ in pairs)
    report = simulate(replay(*(s for _, s in pairs)), Trace(times), size)
    waited = report.wait.mean * report.wait.count
    ran = report.run.mean * report.run.count
    busy = report.utilisation * report.workers
    assert report.queue_mean * report.seconds == pytest.approx(waited)
    assert busy * report.seconds == pytest.approx(ran)
    done = report.done if report.seconds else 0
    assert report.throughput * report.seconds == pytest.approx(done)


def test_littles_law_holds_for_a_long_run() -> None:
    report = simulate(Exponential(1.0), Poisson(3.4), 4, jobs=5_000, **unbounded)
    rate = report.offered / report.seconds
    assert report.queue_mean == pytest.approx(rate * report.wait.mean, rel=1e-9)
    in_pool = report.queue_mean + report.utilisation * report.workers
    assert in_pool == pytest.approx(rate * report.total.mean, rel=1e-9)


# ----------------------------------------------------------------------
# Queueing theory.


def erlang_b(servers: int, load: float) -> float:
    """The share of jobs that M/M/c/c, which has no room to wait, turns away.

    Erlang, "Solution of some Problems in the Theory of Probabilities of
    Significance in Automatic Telephone Exchanges" (1917), by the recursion
    B(0) = 1, B(n) = a B(n-1) / (n + a B(n-1)).
    """
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = load * blocked / (n + load * blocked)
    return blocked


def erlang_c(servers: int, load: float) -> float:
    """The share of jobs that wait in M/M/c: C = B / (1 - a/c (1 - B))."""
    blocked = erlang_b(servers, load)
    return blocked / (1 - load / servers * (1 - blocked))


@attrs.frozen
class Case:
    """A queue, and how uncertain what a run of it finds must be.

    The relative variance of a mean over n jobs is about ``spread / n``. For the
    wait in M/M/1 it is (2 + 5r - 4r^2 + r^3) / (r (1 - r)^2), where r is the
    load of the server (Daley, 1968; see Whitt, "Planning Queueing Simulations",
    1989). The others were measured by 60 runs of the recursion above.
    """

    servers: int
    load: float
    """Of each server, 0 to 1."""
    spread: float
    seeds: int
    """Runs of the long test, for 2 % to be three times their standard error."""


LONG = 500_000
CASES = [
    Case(1, 0.5, 29, 2),
    Case(1, 0.8, 124, 6),
    Case(2, 0.7, 93, 5),
    Case(3, 0.6, 81, 4),
    Case(4, 0.8, 280, 13),
]
each_case = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.servers} at {case.load}"
)
only_in_stress = pytest.mark.skipif(not STRESS, reason="takes minutes")


def run_case(case: Case, jobs: int, seed: int) -> SimulationReport:
    rate = case.servers * case.load
    return simulate(
        Exponential(1.0), Poisson(rate), case.servers, jobs=jobs, seed=seed, **unbounded
    )


def mean_wait(case: Case) -> float:
    """W = C / (c mu - lambda), for a service time of 1."""
    waits = erlang_c(case.servers, case.servers * case.load)
    return waits / (case.servers * (1 - case.load))


@each_case
def test_waits_are_those_of_erlang_c(case: Case) -> None:
    """Within four standard errors. Takes a second or two, as chance is slow."""
    jobs = 25_000
    report = run_case(case, jobs, seed=1)
    error = math.sqrt(case.spread / jobs)
    share = erlang_c(case.servers, case.servers * case.load)
    assert report.wait.mean == pytest.approx(mean_wait(case), rel=4 * error)
    # Whether a job waits is much less uncertain than how long it does.
    assert report.waited == pytest.approx(share, rel=2 * error)
    # What the workers do depends on the jobs alone.
    assert report.utilisation == pytest.approx(case.load, rel=4 * math.sqrt(2 / jobs))


@only_in_stress
@each_case
def test_waits_are_those_of_erlang_c_within_two_per_cent(case: Case) -> None:
    """Of all seeds together; each alone within four of its standard errors."""
    reports = [run_case(case, LONG, seed) for seed in range(case.seeds)]
    mean = sum(report.wait.mean for report in reports) / len(reports)
    waited = sum(report.waited for report in reports) / len(reports)
    theory, share = mean_wait(case), erlang_c(case.servers, case.servers * case.load)
    print(f"{case.servers} servers, {case.load} of load, {len(reports)} x {LONG} jobs")
    print(f"  mean wait: {theory:.5f}, found {mean:.5f}, {mean / theory - 1:+.2%}")
    print(f"  waited: {share:.5f}, found {waited:.5f}, {waited / share - 1:+.2%}")
    assert mean == pytest.approx(theory, rel=0.02)
    assert waited == pytest.approx(share, rel=0.02)
    error = math.sqrt(case.spread / LONG)
    for report in reports:
        assert report.wait.mean == pytest.approx(theory, rel=4 * error)


@pytest.mark.parametrize(
    ("load", "spread"),
    [pytest.param(0.5, 11, id="0.5"), pytest.param(0.8, 50, id="0.8")],
)
def test_waits_for_constant_services_are_those_of_pollaczek_and_khinchine(
    load: float, spread: float
) -> None:
    """M/D/1, half of M/M/1: W = load / (2 (1 - load)), for a service time of 1.

    Takes a second or two, as chance is slow.
    """
    jobs = LONG if STRESS else 20_000
    report = simulate(Constant(1.0), Poisson(load), 1, jobs=jobs, **unbounded)
    theory = load / (2 * (1 - load))
    print(f"M/D/1 {load}: {theory:.5f}, found {report.wait.mean:.5f}")
    assert report.wait.mean == pytest.approx(theory, rel=4 * math.sqrt(spread / jobs))
    assert report.waited == pytest.approx(load, rel=4 * math.sqrt(spread / jobs))


@pytest.mark.parametrize(
    ("servers", "load", "spread"), [(1, 0.5, 4), (4, 3.0, 8), (10, 8.0, 20)]
)
@pytest.mark.parametrize("service", [Exponential(1.0), Uniform(0.5, 1.5)])
def test_without_backlog_as_many_are_turned_away_as_erlang_b_says(
    servers: int, load: float, spread: float, service: Any
) -> None:
    """M/G/c/c: only the mean of the service time matters. Takes a second."""
    jobs = LONG if STRESS else 10_000
    report = simulate(
        service, Poisson(load), servers, jobs=jobs, max_backlog=0, overflow="reject"
    )
    theory, found = erlang_b(servers, load), report.rejected / report.offered
    print(f"M/G/{servers}/{servers} {load} {service}: {theory:.5f}, found {found:.5f}")
    assert found == pytest.approx(theory, rel=4 * math.sqrt(spread / jobs))
    assert report.wait.max == 0.0 == report.waited
    assert report.queue_max == 0


def test_a_bounded_backlog_is_that_of_an_m_m_1_k_queue() -> None:
    """The share turned away is (1 - r) r^K / (1 - r^(K+1)), with K in the system."""
    load, room = 0.8, 3
    report = simulate(
        *(Exponential(1.0), Poisson(load), 1),
        jobs=20_000,
        max_backlog=room,
        overflow="reject",
    )
    most = room + 1
    theory = (1 - load) * load**most / (1 - load ** (most + 1))
    found = report.rejected / report.offered
    assert found == pytest.approx(theory, rel=4 * math.sqrt(25 / report.offered))
    assert report.queue_max == room


# ----------------------------------------------------------------------
# Options of the pool, by hand.


def test_a_report_counts_by_hand() -> None:
    """Jobs at 0, 1 and 2 that take 3, 1 and 1 seconds, and one worker."""
    report = simulate(replay(3, 1, 1), Trace([0, 1, 2]), 1)
    assert report.seconds == 5.0
    assert report.wait == Times(count=3, mean=4 / 3, p50=2.0, p95=2.0, p99=2.0, max=2.0)
    assert report.total.max == 3.0
    assert report.waited == 2 / 3
    assert (report.utilisation, report.workers) == (1.0, 1.0)
    assert (report.queue_mean, report.queue_max) == (4 / 5, 2)
    assert report.throughput == 3 / 5
    assert (report.offered, report.accepted, report.done) == (3, 3, 3)


def test_a_report_reads_as_a_table() -> None:
    report = simulate(
        replay(3, 1, 1), Trace([0, 1, 2]), 1, max_backlog=1, overflow="reject"
    )
    assert str(report).splitlines() == [
        "4.0 virtual seconds",
        "offered                3",
        "done                   2   66.67%",
        "rejected               1   33.33%",
        "seconds             mean         p50         p95         p99         max",
        "wait                   1           0           2           2           2",
        "run                    2           1           3           3           3",
        "total                  3           3           3           3           3",
        "waited            50.00%",
        "utilisation      100.00% of 1 workers",
        "queue                0.5 at most 1",
        "throughput           0.5 done a second",
    ]


@pytest.mark.parametrize("room", [0, 1])
def test_callers_who_may_wait_for_room_lose_no_job_and_are_counted_as_waiting(
    room: int,
) -> None:
    report = simulate(Constant(1.0), Bursts(5, 1.0), 2, jobs=5, max_backlog=room)
    assert report.accepted == report.done == 5
    assert report.wait.max == 2.0
    assert report.queue_max == 3


def test_the_oldest_make_room_where_that_is_asked_for() -> None:
    options: Any = {"overflow": "drop_oldest", "max_backlog": 1}
    report = simulate(Constant(1.0), Trace([0, 0.25, 0.5, 0.75]), 1, **options)
    assert (report.done, report.dropped) == (2, 2)
    assert report.wait.max == 0.25
    options["max_backlog"] = 0
    report = simulate(Constant(1.0), Trace([0, 0.25, 0.5, 0.75]), 1, **options)
    assert (report.done, report.dropped, report.queue_max) == (1, 3, 0)
    assert report.accepted == 4


def test_a_job_that_is_timed_out_frees_its_worker() -> None:
    report = simulate(replay(9, 1), Trace([0, 0]), 1, timeout=2.0)
    assert (report.timed_out, report.done) == (1, 1)
    assert report.run.max == 2.0
    assert report.seconds == 3.0


def test_of_what_comes_at_the_same_time_deadlines_are_first_and_arrivals_last() -> None:
    """So a job may have the place of one that ends in the instant it comes."""
    report = simulate(
        *(Constant(1.0), Regular(1.0), 1), jobs=9, max_backlog=0, overflow="reject"
    )
    assert (report.done, report.rejected) == (9, 0)
    report = simulate(Constant(1.0), Regular(0.5), 1, jobs=9, timeout=1.0)
    assert (report.done, report.timed_out) == (0, 9)


def test_a_failed_job_is_tried_again_and_each_try_takes_its_time() -> None:
    twice = Retry(attempts=2, backoff=lambda _: 0.5)
    report = simulate(Constant(1.0), [0], 1, failures=1.0, retry=twice)
    assert (report.failed, report.retries, report.done) == (1, 1, 0)
    assert report.run.count == 2
    assert report.seconds == 2.5
    assert report.utilisation == 2 / 2.5


def test_the_share_that_fails_is_the_one_asked_for() -> None:
    report = simulate(
        *(Constant(1.0), Regular(1.0), 1), jobs=2_000, failures=0.25, retry=Retry(2)
    )
    assert report.failed / 2_000 == pytest.approx(0.25**2, abs=0.02)
    assert report.retries / 2_000 == pytest.approx(0.25, abs=0.04)


def test_a_worker_that_crashes_is_missed_until_it_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow = Restart(limit=math.inf, backoff=Backoff(1.0, jitter=0.0))
    report = simulate(
        *(Constant(1.0), Trace([0, 0, 0]), 1),
        failures=1.0,
        crash_on=SimulatedFailure,
        restart=slow,
    )
    assert report.restarts == 2
    assert report.failed == 3
    # The first restart is at once, the second after a second.
    assert report.seconds == 4.0
    assert report.workers == 0.75
    assert report.utilisation == 1.0
    assert not caplog.records


def test_a_pool_that_breaks_raises_as_it_would() -> None:
    with pytest.raises(PoolBroken):
        simulate(
            *(Constant(1.0), Regular(1.0), 1),
            jobs=100,
            failures=1.0,
            crash_on=SimulatedFailure,
        )


def test_other_errors_in_the_log_of_the_pool_stay() -> None:
    class Broken(Hooks):
        def on_job_start(self, event: object) -> None:
            raise ValueError("broken hook")

    heard: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[method-assign]
    logger = logging.getLogger("trio_pool")
    logger.addHandler(handler)
    try:
        simulate(Constant(1.0), [0], 1, hooks=[Broken()])
    finally:
        logger.removeHandler(handler)
    assert len(heard) == 1
    assert not logger.filters


def test_a_breaker_refuses_while_it_is_open() -> None:
    breaker = CircuitBreaker(failures=1, open_for=10.0)
    report = simulate(Constant(1.0), [0] + [2] * 4, 1, failures=1.0, breaker=breaker)
    # It opens at 1 and refuses at 2, 4, 6 and 8.
    assert (report.failed, report.refused, report.accepted) == (1, 4, 1)


def test_a_rate_makes_jobs_wait_for_their_start() -> None:
    report = simulate(Constant(0.0), Bursts(4, 1.0), 4, jobs=4, rate=Rate(2, burst=1))
    assert report.wait.max == 1.5
    assert report.seconds == 2.5


def test_a_limiter_is_kept_to() -> None:
    limiter = trio.CapacityLimiter(1)
    report = simulate(Constant(1.0), Bursts(3, 1.0), 3, jobs=3, limiter=limiter)
    assert report.seconds == 4.0
    assert report.wait.max == 2.0


def test_utilisation_is_of_the_workers_that_were_there() -> None:
    scale = Autoscale(min=1, max=4, interval=1.0, down_after=2.0)
    report = simulate(
        Constant(1.0), OnOff(3.0, 30.0, 30.0), 1, seconds=600.0, scale=scale
    )
    busy = report.run.mean * report.run.count
    assert 1.0 < report.workers < 4.0
    assert report.utilisation == pytest.approx(busy / (report.workers * report.seconds))
    assert report.seconds >= 600.0


def test_workers_that_are_replaced_as_planned_are_no_restarts() -> None:
    report = simulate(Constant(1.0), Regular(1.0), 1, jobs=10, max_jobs=2)
    assert (report.done, report.restarts) == (10, 0)
    assert report.workers == 1.0


def test_what_is_around_the_handler_counts_as_running() -> None:
    async def slow(job: Any, call_next: Any) -> Any:
        await trio.sleep(0.5)
        return await call_next(job)

    report = simulate(Constant(1.0), [0, 0], 1, middleware=[slow])
    assert report.run.mean == 1.5
    assert report.wait.max == 1.5


def test_jobs_may_have_options_of_their_own() -> None:
    report = simulate(Constant(1.0), Bursts(3, 1.0), 1, jobs=3, each={"ttl": 1.5})
    assert (report.done, report.expired) == (2, 1)
    draw = iter([{}, {"priority": 0}, {"priority": 1}])
    report = simulate(
        *(replay(1, 5, 1), Trace([0, 0, 0]), 1), each=lambda _: next(draw)
    )
    assert report.wait.max == 2.0


@pytest.mark.parametrize("room", [0, 1, 3])
def test_a_job_may_expire_while_its_caller_waits_for_room(room: int) -> None:
    report = simulate(
        *(Constant(1.0), Bursts(5, 1.0), 1),
        jobs=5,
        max_backlog=room,
        each={"ttl": 1.5},
    )
    assert (report.done, report.expired) == (2, 3)
    assert report.queue_max == 4


def test_jobs_of_the_warmup_run_and_are_not_counted() -> None:
    report = simulate(Constant(2.0), Trace([0, 1, 3, 5]), 1, warmup=2.0)
    assert (report.offered, report.done, report.wait.count) == (2, 2, 2)
    assert report.seconds == 6.0
    # Of the second job, which came before, three quarters ran after it.
    assert report.utilisation == 1.0
    assert report.wait.max == 1.0
    assert report.throughput == 2 / 6


def test_seconds_end_the_arrivals_and_jobs_are_finished() -> None:
    report = simulate(Constant(2.5), Regular(1.0), 10, seconds=4.0)
    assert report.offered == report.done == 4
    assert report.seconds == 6.5
    assert simulate(Constant(0.5), [1], 1, seconds=9.0).seconds == 9.0


def test_grace_ends_a_run_that_would_take_too_long() -> None:
    report = simulate(Constant(1.0), Bursts(9, 1.0), 1, jobs=9, grace=2.5)
    assert (report.done, report.cancelled) == (2, 7)
    assert conserves(report)


def test_nothing_at_all_is_a_report_too() -> None:
    report = simulate(Constant(1.0), [], 1)
    assert report.offered == report.seconds == report.utilisation == 0
    assert report.wait.count == 0
    assert "0.0 virtual seconds" in str(report)


def test_a_config_stands_for_the_size() -> None:
    config = PoolConfig(size=3, max_backlog=1)
    report = simulate(Constant(1.0), Bursts(9, 1.0), config, jobs=9, overflow="reject")
    assert (report.done, report.rejected, report.workers) == (4, 5, 3.0)


# ----------------------------------------------------------------------
# Chance.

busy: dict[str, Any] = {
    "failures": 0.2,
    "retry": Retry(3),
    "timeout": 2.0,
    "max_backlog": 5,
    "crash_on": SimulatedFailure,
    "restart": Restart(limit=math.inf),
    "scale": Autoscale(1, 5, interval=0.5, down_after=1.0),
}


@pytest.mark.parametrize("overflow", ["wait", "reject", "drop_oldest"])
@pytest.mark.parametrize("arrivals", [Poisson(3.0), Bursts(7, 2.5), Regular(2.0)])
def test_the_same_seed_gives_the_same_report(overflow: Any, arrivals: Any) -> None:
    """Whatever trio, and the global chance, would do in between."""

    def run(seed: object) -> SimulationReport:
        random.seed()
        return simulate(
            *(LogNormal(0.5, 1.0), arrivals, 1),
            jobs=300,
            seed=seed,  # type: ignore[arg-type]
            overflow=overflow,
            **busy,
        )

    first = run(1)
    assert run(1) == first
    assert run("another") != first
    assert conserves(first)
    assert first.accepted == first.offered - first.rejected


def test_another_size_meets_the_same_jobs() -> None:
    few, many = (
        simulate(Exponential(1.0), Poisson(2.0), size, jobs=500, **unbounded)
        for size in (3, 30)
    )
    # All of its samples, but not necessarily in this order.
    assert few.run.max == pytest.approx(many.run.max)
    assert few.run.mean == pytest.approx(many.run.mean)
    assert few.wait.mean > many.wait.mean


def test_chance_elsewhere_is_left_alone() -> None:
    random.seed(5)
    expected = random.random()
    random.seed(5)
    simulate(Exponential(1.0), Poisson(2.0), 1, jobs=10)
    assert random.random() == expected


def test_the_order_of_tasks_elsewhere_is_left_to_chance_as_before() -> None:
    """Trio draws it, and for a simulation that is seeded."""
    chance = vars(sys.modules["trio._core._run"])["_r"]
    before = chance.getstate()
    simulate(Exponential(1.0), Bursts(9, 1.0), 4, jobs=90)
    assert chance.getstate() == before
    with pytest.raises(ZeroDivisionError):
        simulate(lambda _: 1 / 0, [1], 1)
    assert chance.getstate() == before


def draws(model: Callable[[random.Random], float], count: int) -> list[float]:
    chance = random.Random(1)
    return [model(chance) for _ in range(count)]


def test_service_times_are_distributed_as_they_say() -> None:
    count = 20_000
    assert set(draws(Constant(2), 9)) == {2}
    mean = sum(draws(Exponential(2.0), count)) / count
    assert mean == pytest.approx(2.0, rel=4 / math.sqrt(count))
    uniform = draws(Uniform(1.0, 2.0), count)
    assert 1.0 <= min(uniform) < 1.01 < 1.99 < max(uniform) <= 2.0
    long = LogNormal.from_percentiles(p50=0.1, p99=1.0)
    ranked = sorted(draws(long, count))
    assert ranked[count // 2] == pytest.approx(0.1, rel=0.05)
    assert ranked[count * 99 // 100] == pytest.approx(1.0, rel=0.1)
    assert sum(ranked) / count == pytest.approx(long.mean, rel=0.05)
    assert set(draws(Recorded([1, 2, 3]), 99)) == {1, 2, 3}


def test_replayed_times_come_in_their_order_and_again() -> None:
    report = simulate(replay(1, 2), Trace([0, 10, 20]), 1)
    assert report.seconds == 21.0
    assert report.run.mean == 4 / 3


def test_arrivals_come_as_they_say() -> None:
    def times(model: Any, count: int) -> list[float]:
        return list(islice(model.arrivals(random.Random(1)), count))

    count = 20_000
    assert times(Regular(4.0), 3) == [0.25, 0.5, 0.75]
    assert times(Bursts(2, 1.5), 5) == [1.5, 1.5, 3.0, 3.0, 4.5]
    assert times(Trace([1, 2.5]), 5) == [1, 2.5]
    assert times(Poisson(4.0), count)[-1] == pytest.approx(count / 4, rel=0.03)
    on_off = times(OnOff(8.0, 1.0, 3.0), count)
    assert on_off[-1] == pytest.approx(count / 2, rel=0.08)
    assert on_off == sorted(on_off)


def test_gaps_may_be_given_or_drawn() -> None:
    assert simulate(Constant(0), [1, 2, 0.5], 1).seconds == 3.5
    assert simulate(Constant(0), lambda _: 0.5, 1, jobs=4).seconds == 2.0


def test_a_callable_draws_the_times() -> None:
    report = simulate(lambda chance: chance.choice([1, 2]), Regular(0.1), 1, jobs=99)
    assert report.run.p50 in {1, 2}
    assert 1 < report.run.mean < 2


def test_an_async_model_is_the_handler() -> None:
    async def handler(chance: random.Random) -> None:
        await trio.sleep(chance.choice([1, 2]))
        if chance.random() < 0.5:
            raise ConnectionError

    def run() -> SimulationReport:
        return simulate(handler, Poisson(1.0), 4, jobs=200)

    report = run()
    assert report.done + report.failed == 200
    assert 60 < report.failed < 140
    assert 1 < report.run.mean < 2
    assert run() == report


def test_a_long_run_keeps_nothing_but_times() -> None:
    """Not even of jobs that would have taken longer than the run."""

    class Census(Hooks):
        def __init__(self) -> None:
            self.jobs = 0
            self.counts: list[int] = []

        def on_job_start(self, event: object) -> None:
            self.jobs += 1
            if not self.jobs % 1_000:
                gc.collect()
                self.counts.append(len(gc.get_objects()))

    census = Census()
    report = simulate(
        *(lambda chance: chance.choice([0.5, 1e9]), Poisson(2.0), 4),
        jobs=4_000,
        timeout=1.0,
        max_backlog=5,
        overflow="drop_oldest",
        hooks=[census],
    )
    assert report.timed_out > 1_000
    assert max(census.counts) < min(census.counts) + 300


# ----------------------------------------------------------------------
# What is refused, and where it runs.

fine: Any = Constant(1.0), Regular(1.0), 1


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Constant(-1), "seconds must be a number of seconds >= 0, got -1"),
        (lambda: Exponential(0), "mean must be a number of seconds > 0, got 0"),
        (lambda: Uniform(2, 1), r"high must be .* >= low \(2\), got 1"),
        (lambda: LogNormal(1, -1), "sigma must be a finite number >= 0, got -1"),
        (lambda: LogNormal.from_percentiles(p50=2, p99=1), "p99 must be .* got 1"),
        (lambda: Recorded([]), "times must be at least one number of seconds"),
        (lambda: Recorded([1, -1]), r"times\[1\] must be a number of seconds >= 0"),
        (lambda: Recorded([1], order="x"), "order must be one of 'drawn', 'repl"),  # type: ignore[arg-type]
        (lambda: Poisson(0), "rate must be a finite number of jobs a second > 0"),
        (lambda: Regular(math.inf), "rate must be a finite number of jobs"),
        (lambda: Bursts(0, 1), "size must be an int, 1 or more, got 0"),
        (lambda: OnOff(1, 0, 1), "on must be a number of seconds > 0, got 0"),
        (lambda: Trace([1, 0.5]), r"times\[1\] must be times\[0\] \(1\) or later"),
        (lambda: simulate(*fine), "give jobs= or seconds="),
        (lambda: simulate(*fine, jobs=0), "jobs must be an int, 1 or more, got 0"),
        (lambda: simulate(*fine, seconds=0), "seconds must be a number of seconds"),
        (lambda: simulate(*fine, seconds=1, warmup=1), "warmup must be .* less than"),
        (lambda: simulate(*fine, jobs=1, warmup=9), "warmup must be .* which is 2 s"),
        (lambda: simulate(*fine, jobs=1, failures=2), "failures must be a num"),
        (lambda: simulate(*fine[:2], 0, jobs=1), "size must be 1 or more"),
        (lambda: simulate(*fine, jobs=1, timeout=-1), "timeout must be a number"),
        (lambda: simulate(fine[0], [1, -1], 1), "a gap of arrivals must be"),
        (lambda: simulate(lambda _: math.nan, [1], 1), "handler_model draws must be"),
    ],
)
def test_bad_values_are_refused(make: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Constant("1"), "seconds must be a number of seconds >= 0, got '1'"),  # type: ignore[arg-type]
        (lambda: LogNormal(1, "x"), "sigma must be a finite number"),  # type: ignore[arg-type]
        (lambda: Poisson(True), "rate must be a finite number"),
        (lambda: Recorded(1), "times must be an iterable"),  # type: ignore[arg-type]
        (lambda: simulate(1.0, *fine[1:], jobs=1), "handler_model must be a dist"),  # type: ignore[arg-type]
        (lambda: simulate(Constant, *fine[1:], jobs=1), "handler_model must be a d"),  # type: ignore[arg-type]
        (lambda: simulate(fine[0], 3, 1, jobs=1), "arrivals must be arrivals such"),  # type: ignore[call-overload]
        (lambda: simulate(fine[0], Poisson, 1, jobs=1), "arrivals must be"),  # type: ignore[arg-type]
        (lambda: simulate(*fine, jobs=1.5), "jobs must be an int"),  # type: ignore[arg-type]
        (lambda: simulate(*fine, jobs=1, failures="x"), "failures must be a num"),  # type: ignore[arg-type]
        (lambda: simulate(*fine, jobs=1, seed=1.5), "seed must be an int or a str"),  # type: ignore[arg-type]
        (lambda: simulate(*fine, jobs=1, each={"x": 1}), "each must be options of"),  # type: ignore[typeddict-unknown-key]
        (lambda: simulate(*fine, jobs=1, each=3), "each must be a mapping of"),  # type: ignore[arg-type]
        (lambda: simulate(*fine, jobs=1, each=lambda _: 3), "each draws must be a m"),  # type: ignore[arg-type,return-value]
        (lambda: simulate(*fine, jobs=1, each=lambda _: {"x": 1}), "each draws must"),  # type: ignore[typeddict-unknown-key]
        (lambda: simulate(*fine, jobs=1, sise=3), "open_pool has no option 'sise'"),  # type: ignore[call-arg]
        (lambda: simulate(lambda _: "x", [1], 1), "handler_model draws must be"),  # type: ignore[arg-type,return-value]
    ],
)
def test_bad_types_are_refused(make: Callable[[], object], complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        make()


def test_what_a_model_raises_leaves_as_it_is() -> None:
    for model in (lambda _: 1 / 0, lambda chance: 1 / (chance.random() < 0.9)):
        with pytest.raises(ZeroDivisionError):
            simulate(model, Regular(1.0), 1, jobs=200)


def test_an_interrupt_leaves_bare() -> None:
    async def handler(_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        await trio.sleep(1)

    def draw(_: object) -> float:
        signal.raise_signal(signal.SIGINT)
        return 1.0

    for model in (handler, draw):
        with pytest.raises(KeyboardInterrupt) as info:
            simulate(model, Regular(1.0), 2, jobs=9)
        assert not isinstance(info.value.__context__, BaseExceptionGroup)


def test_a_run_in_which_nothing_can_happen_any_more_is_ended() -> None:
    async def handler(_: object) -> None:
        await trio.sleep_forever()

    with pytest.raises(RuntimeError, match="second 3: 2 jobs wait, 1 run, and nothing"):
        simulate(handler, [1, 1, 1], 1)


async def test_within_trio_it_runs_in_a_thread() -> None:
    with pytest.raises(RuntimeError, match=r"trio\.to_thread\.run_sync"):
        simulate(*fine, jobs=1)
    report = await trio.to_thread.run_sync(partial(simulate, *fine, jobs=3))
    assert report == await trio.to_thread.run_sync(partial(simulate, *fine, jobs=3))
    assert report.done == 3
