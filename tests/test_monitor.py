"""What the dashboard knows of pools, and how it judges requests; without a loop."""

from __future__ import annotations

import gc
import json
import math
import socket
import traceback
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_pool import (
    CurrentJob,
    EventsLost,
    JobChanged,
    JobState,
    PoolConfig,
    PoolResized,
    PoolState,
    PoolStatistics,
    WorkerChanged,
    WorkerSnapshot,
    WorkerState,
)
from trio_pool._latency import Histogram, Latency

pytest.importorskip("starlette")
pytest.importorskip("hypercorn")
pytest.importorskip("prometheus_client")

from trio_pool.web._address import listen_at, parse_address, url_of
from trio_pool.web._app import to_json
from trio_pool.web._controls import read_size
from trio_pool.web._feed import Feed
from trio_pool.web._guard import Guard, check_hosts, host_name, make_guard
from trio_pool.web._history import History, Sample
from trio_pool.web._monitor import Monitor
from trio_pool.web._place import place_of_error
from trio_pool.web._render import render_fragments, render_page
from trio_pool.web._stream import event_of
from trio_pool.web._verdict import Facts, judge

NOTHING = Histogram().latency()
WALL = 1_700_000_000.0
TOKEN = "a token of no use".replace(" ", "-")


def latency(*seconds: float) -> Latency:
    times = Histogram()
    times.pending.extend(seconds)
    return times.latency()


def counts(**changes: Any) -> PoolStatistics:
    """Make statistics of an idle pool of 4 in which nothing has happened yet."""
    plain: dict[str, Any] = {
        field.name: 0 for field in attrs.fields(PoolStatistics)
    } | {"size": 4, "workers": 4, "oldest_wait": 0.0, "throughput": 0.0}
    plain |= {"wait": NOTHING, "run": NOTHING}
    return PoolStatistics(**plain | changes)


def worker(number: int = 0, **changes: Any) -> WorkerSnapshot:
    plain: dict[str, Any] = {
        "id": number,
        "state": WorkerState.IDLE,
        "job_id": None,
        "job_age": None,
        "jobs": 0,
        "restarts": 0,
        "last_error": None,
    }
    return WorkerSnapshot(**plain | changes)


class FakePool:
    """What a dashboard reads of a pool."""

    def __init__(self, name: str = "fake", **options: Any) -> None:
        self.config = PoolConfig(name=name, **options)
        self.name = name
        self.state = PoolState.OPEN
        self.counts = counts()
        self.crew: tuple[WorkerSnapshot, ...] = ()
        self.jobs: list[CurrentJob] = []

    @property
    def size(self) -> int:
        return self.counts.size

    def statistics(self) -> PoolStatistics:
        return self.counts

    def workers(self) -> tuple[WorkerSnapshot, ...]:
        return self.crew

    def running(self) -> tuple[CurrentJob, ...]:
        return tuple(self.jobs)


def running(job_input: object, *, job: int = 1, worker: int = 0) -> CurrentJob:
    plain: dict[str, Any] = {field.alias: None for field in attrs.fields(CurrentJob)}
    plain |= {"id": job, "input": job_input, "worker": worker, "attempt": 1}
    return CurrentJob(**plain)


def monitor_of(*pools: Any, **options: Any) -> Monitor:
    return Monitor(pools, 100.0, WALL, **options)


def failure(error: Exception | None, job: int = 1, pool: str = "fake") -> JobChanged:
    return JobChanged(
        "job_error", pool, 1.0, job, JobState.FAILED, 2, 3, error, key="a secret key"
    )


def caught(error: Exception) -> Exception:
    try:
        raise error
    except type(error) as found:
        return found


# The history.


def test_a_history_keeps_15_minutes_and_no_more() -> None:
    history = History(0.0)
    for second in range(2000):
        history.add(second + 0.5, WALL + second, Sample(size=float(second)))
    series = history.series(1)
    assert series.size == tuple(float(second) for second in range(1100, 2000))
    assert series.until == WALL + 1999
    assert len(series.lag) == 900


def test_seconds_in_which_nothing_was_measured_are_0() -> None:
    history = History(0.0)
    history.add(0.0, WALL, Sample(size=4.0))
    history.add(5.0, WALL + 5, Sample(size=4.0, lag=4.0))
    assert history.series(1).size == (4.0, 0.0, 0.0, 0.0, 0.0, 4.0)
    history.add(10_000.0, WALL + 10_000, Sample(size=3.0))
    assert history.series(1).size == (0.0,) * 899 + (3.0,)


def test_a_value_of_several_seconds_is_their_mean_or_their_worst() -> None:
    history = History(0.0)
    for second in range(7):
        sample = Sample(busy=float(second), queued=float(second), lag=float(-second))
        history.add(float(second), WALL, sample)
    series = history.series(5)
    assert series.step == 5.0
    assert series.busy == (2.0, 5.5)
    assert series.queued == (4.0, 6.0)
    assert series.lag == (0.0, -5.0)


def test_old_values_stay_what_they_are_as_time_goes_on() -> None:
    history = History(0.0, span=50)
    before: tuple[float, ...] = ()
    for second in range(200):
        history.add(float(second), WALL, Sample(busy=float(second * second % 17)))
        after = history.series(5).busy
        if second % 5 == 0 and len(before) == 10:
            assert after[:-1] == before[1:]
        elif second > 50:
            assert after[:-1] == before[:-1] or after[:-1] == before[1:-1]
        before = after


@given(st.lists(st.floats(0, 1000), max_size=5), st.integers(1, 60))
def test_all_columns_are_as_long_as_each_other(gaps: list[float], step: int) -> None:
    history = History(0.0)
    now = 0.0
    for gap in gaps:
        now += gap
        history.add(now, WALL + now, Sample(busy=1.0))
    series = history.series(step)
    lengths = {
        len(column)
        for column in attrs.astuple(series, recurse=False)
        if isinstance(column, tuple)
    }
    assert len(lengths) == 1
    assert lengths.pop() <= 900 // step + 1
    assert len(history.last("busy", 60)) <= 60


def test_a_sample_may_come_a_little_early() -> None:
    history = History(0.0)
    for second in range(5):
        history.add(second * 0.999_999_9, WALL, Sample(busy=1.0))
    assert history.series(1).busy == (1.0,) * 5


def test_a_clock_that_goes_back_breaks_nothing() -> None:
    history = History(100.0)
    history.add(105.0, WALL, Sample(busy=1.0))
    history.add(50.0, WALL, Sample(busy=2.0))
    assert history.series(1).busy[-1] == 2.0


# The verdict.


def verdict(state: PoolState = PoolState.OPEN, **changes: Any) -> tuple[str, str, bool]:
    facts: dict[str, Any] = {
        name: changes.pop(name)
        for name in ("workers", "breaker", "ended", "failed", "cause", "max_backlog")
        if name in changes
    }
    facts.setdefault("workers", ())
    if "up" in changes:
        changes["workers"] = changes.pop("up")
    if "job_failures" in changes:
        changes["failed"] = changes.pop("job_failures")
    judged = judge(Facts(state=state, statistics=counts(**changes), **facts))
    return judged.light, judged.sentence, judged.ready


RESTARTING = worker(2, state=WorkerState.RESTARTING)

VERDICTS = [
    (verdict(), "green", "idle: 4 workers free", True),
    (verdict(delayed=1), "green", "idle: 4 workers free, 1 job for later", True),
    (verdict(busy=1), "green", "working: 1 of 4 busy, nothing waits", True),
    (
        verdict(busy=4, queued=1, oldest_wait=2.3),
        "amber",
        "saturated: 4 of 4 busy, oldest wait 2.3 s",
        True,
    ),
    (
        verdict(busy=4, queued=9, oldest_wait=2.3, max_backlog=9),
        "red",
        "saturated: 4 of 4 busy, the backlog is full, oldest wait 2.3 s",
        True,
    ),
    (
        verdict(busy=4, queued=9, oldest_wait=0.01),
        "green",
        "working: 4 of 4 busy, 9 jobs wait",
        True,
    ),
    (
        verdict(busy=1, queued=9, oldest_wait=3.0),
        "amber",
        "held back: 9 jobs wait though 1 of 4 are busy",
        True,
    ),
    (verdict(PoolState.PAUSED, queued=12), "amber", "paused: 12 jobs wait", False),
    (
        verdict(PoolState.PAUSED, running=1),
        "amber",
        "paused: nothing waits, 1 job runs on",
        False,
    ),
    (
        verdict(PoolState.CLOSING, running=3, queued=1),
        "amber",
        "draining: 3 jobs run, 1 job waits",
        False,
    ),
    (
        verdict(PoolState.CLOSED, done=7, job_failures=2),
        "off",
        "closed: 7 jobs done, 2 failed",
        False,
    ),
    (
        verdict(PoolState.BROKEN, cause="OSError"),
        "red",
        "broken: a worker crashed too often, the last time by OSError",
        False,
    ),
    (verdict(PoolState.BROKEN), "red", "broken: a worker crashed too often", False),
    (
        verdict(up=3, workers=(RESTARTING,)),
        "amber",
        "degraded: 3 of 4 workers up, worker 2 is restarting",
        True,
    ),
    (
        verdict(up=0, workers=(RESTARTING,) * 5),
        "red",
        "down: none of 4 workers is up, workers 2, 2, 2, ... are restarting",
        False,
    ),
    (verdict(up=0), "amber", "starting: none of 4 workers is up", False),
    (verdict(up=3), "green", "growing: 3 of 4 workers up", True),
    (verdict(size=0, queued=1), "amber", "no workers wanted: 1 job waits", False),
    (
        verdict(breaker="open"),
        "red",
        "refusing: the circuit breaker is open",
        True,
    ),
    (
        verdict(breaker="half_open"),
        "amber",
        "recovering: the circuit breaker tries a few jobs",
        True,
    ),
    (
        verdict(ended=40, failed=30),
        "red",
        "failing: 30 of 40 jobs failed in the last minute",
        True,
    ),
    (verdict(ended=4, failed=4), "green", "idle: 4 workers free", True),
]


@pytest.mark.parametrize(("found", "light", "sentence", "ready"), VERDICTS)
def test_the_sentence_says_what_matters_most(
    found: tuple[str, str, bool], light: str, sentence: str, ready: bool
) -> None:
    assert found == (light, sentence, ready)


# The monitor.


def test_rates_are_those_of_the_last_seconds() -> None:
    pool = FakePool()
    monitor = monitor_of(pool)
    for second in range(1, 31):
        pool.counts = counts(accepted=second * 20, done=second * 10, queued=second * 10)
        monitor.sample(100.0 + second, WALL + second, 0.0)
    [shown] = monitor.picture(WALL + 30).pools
    assert (shown.accepted_rate, shown.ended_rate) == (20.0, 10.0)
    for second in range(31, 41):
        monitor.sample(100.0 + second, WALL + second, 0.0)
    [shown] = monitor.picture(WALL + 40).pools
    assert (shown.accepted_rate, shown.ended_rate) == (0.0, 0.0)
    assert shown.accepted == 600


def test_the_busy_share_counts_what_ended_and_what_still_runs() -> None:
    pool = FakePool()
    monitor = monitor_of(pool)
    # One worker has a long job, another many short ones: half of four.
    for second in range(1, 11):
        pool.crew = (worker(0, job_age=float(second)),)
        pool.counts = counts(run=latency(*[0.1] * (10 * second)))
        monitor.sample(100.0 + second, WALL, 0.0)
        [shown] = monitor.picture(WALL).pools
        assert shown.busy_share_second == pytest.approx(0.5)
    # The first second, before anything was measured, counts as idle.
    assert shown.busy_share_minute == pytest.approx(0.5 * 10 / 11)


def test_the_busy_share_never_leaves_its_bounds() -> None:
    pool = FakePool()
    monitor = monitor_of(pool)
    pool.counts = counts(run=latency(*[100.0] * 50))
    monitor.sample(101.0, WALL, 0.0)
    assert monitor.picture(WALL).pools[0].busy_share_second == 1.0
    pool.counts = counts(size=0)
    monitor.sample(102.0, WALL, 0.0)
    assert monitor.picture(WALL).pools[0].busy_share_second == 0.0


def test_times_are_those_of_the_last_minute() -> None:
    pool = FakePool()
    monitor = monitor_of(pool)
    pool.counts = counts(wait=latency(8.0), run=latency(4.0))
    for second in range(1, 61):
        monitor.sample(100.0 + second, WALL, 0.0)
    [shown] = monitor.picture(WALL).pools
    assert (shown.wait.count, shown.run.count) == (1, 1)
    assert shown.wait.p95 == pytest.approx(8.0, rel=1 / 8)
    assert shown.run.max == pytest.approx(4.0, rel=1 / 8)
    monitor.sample(161.0, WALL, 0.0)
    [shown] = monitor.picture(WALL).pools
    assert (shown.wait.count, shown.wait.p95, shown.run.max) == (0, 0.0, 0.0)


def test_lag_is_the_longest_of_the_last_second_and_minute() -> None:
    monitor = monitor_of(FakePool())
    for second, lag in enumerate([0.5, 2.0, 0.25]):
        monitor.sample(101.0 + second, WALL, lag)
    picture = monitor.picture(WALL)
    assert (picture.lag, picture.lag_minute) == (0.25, 2.0)
    for second in range(60):
        monitor.sample(104.0 + second, WALL, 0.0)
    assert monitor.picture(WALL).lag_minute == 0.0
    history = monitor.picture(WALL, step=1).pools[0].history
    assert history is not None
    assert 2.0 in history.lag


def test_failures_are_counted_by_type_and_the_last_are_kept() -> None:
    monitor = monitor_of(FakePool())
    for number in range(30):
        error = caught(KeyError("x") if number % 3 else OSError("y"))
        monitor.hear(failure(error, number), WALL + number)
    [shown] = monitor.picture(WALL + 30).pools
    assert [(f.type, f.count, f.last) for f in shown.failures] == [
        ("KeyError", 20, WALL + 29),
        ("OSError", 10, WALL + 27),
    ]
    assert [error.job for error in shown.errors] == list(range(29, 9, -1))
    assert shown.errors[0].place.startswith(f"{__file__}:")
    assert shown.errors[0].place.endswith(" caught")


def test_more_types_of_errors_than_20_are_summed_up() -> None:
    monitor = monitor_of(FakePool())
    for number in range(300):
        kind = type(f"Error{number}", (Exception,), {"__module__": "theirs"})
        for _ in range(2 if number < 25 else 1):
            monitor.hear(failure(kind()), WALL)
    [shown] = monitor.picture(WALL).pools
    assert len(shown.failures) == 21
    assert shown.failures[0].type == "theirs.Error0"
    assert (shown.failures[-1].type, shown.failures[-1].count) == ("others", 285)


def test_what_was_too_much_to_look_at_is_said() -> None:
    monitor = monitor_of(FakePool())
    monitor.hear(EventsLost("fake", 1.0, 7), WALL)
    monitor.hear(EventsLost("fake", 2.0, 2), WALL)
    [shown] = monitor.picture(WALL).pools
    # Whether these were failures nobody knows.
    assert shown.events_lost == 9
    assert shown.failures == ()


def test_jobs_that_were_dropped_or_expired_are_not_counted_as_errors() -> None:
    monitor = monitor_of(FakePool())
    for state in (JobState.DROPPED, JobState.EXPIRED, JobState.DROPPED):
        error = caught(TimeoutError())
        event = JobChanged("job_drop", "fake", 1.0, 1, state, None, 0, error, key=None)
        monitor.hear(event, WALL)
    monitor.hear(failure(caught(TimeoutError())), WALL)
    [shown] = monitor.picture(WALL).pools
    assert {f.type: f.count for f in shown.failures} == {
        "dropped": 2,
        "expired": 1,
        "TimeoutError": 1,
    }
    assert [error.type for error in shown.errors] == [
        "TimeoutError",
        "dropped",
        "expired",
        "dropped",
    ]


@pytest.mark.parametrize(
    ("job", "shown_as"),
    [
        (10**5000, "(a number of 16610 bits)"),
        (-(10**5000), "(a number of 16610 bits)"),
        ("x" * 5000, "x" * 199 + "\u2026"),
        (2**64 - 1, 2**64 - 1),
        ("A-7", "A-7"),
    ],
    ids=["long", "long and negative", "long text", "64 bits", "text"],
)
def test_ids_of_any_length_can_be_shown(job: Any, shown_as: Any) -> None:
    pool = FakePool()
    pool.crew = (worker(0, state=WorkerState.BUSY, job_id=job, job_age=0.5),)
    monitor = monitor_of(pool)
    monitor.hear(failure(caught(OSError()), job), WALL)
    picture = monitor.picture(WALL)
    [shown] = picture.pools
    found = [shown.workers[0].job, shown.slowest[0].job, shown.errors[0].job]
    assert found == [shown_as] * 3
    assert str(shown_as) in render_page(picture, True)
    to_json(picture)


def test_another_job_of_the_same_id_is_described_anew() -> None:
    pool = FakePool()
    pool.crew = (worker(0, job_id=1, job_age=0.5),)
    monitor = monitor_of(pool, describe=str)
    for name in ("first", "second"):
        pool.jobs = [running(name, job=1)]
        [shown] = monitor.picture(WALL).pools
        assert shown.workers[0].doing == name


def test_no_input_is_kept_when_its_job_has_ended() -> None:
    class Heavy:
        pass

    pool = FakePool()
    pool.crew = (worker(0, job_id=1, job_age=0.5),)
    heavy = Heavy()
    gone = weakref.ref(heavy)
    pool.jobs = [running(heavy)]
    monitor = monitor_of(pool, describe=lambda _: "heavy")
    monitor.picture(WALL)
    monitor.sample(101.0, WALL, 0.0)
    assert monitor.picture(WALL).pools[0].workers[0].doing == "heavy"
    pool.jobs = []
    del heavy
    # Nobody looks; the next second is enough.
    monitor.sample(102.0, WALL, 0.0)
    gc.collect()
    assert gone() is None


def test_readings_keep_no_error_of_a_worker() -> None:
    class HeavyError(Exception):
        pass

    pool = FakePool()
    error = HeavyError()
    gone = weakref.ref(error)
    pool.crew = (worker(0, last_error=error),)
    monitor = monitor_of(pool)
    monitor.sample(101.0, WALL, 0.0)
    pool.crew = ()
    del error
    gc.collect()
    assert gone() is None


def test_whether_jobs_are_refused_is_not_whether_a_pool_is_ready() -> None:
    def refused(**facts: Any) -> tuple[bool, bool]:
        found = judge(Facts(state=PoolState.OPEN, workers=(), **facts))
        return found.ready, found.refuses

    full = counts(busy=4, queued=9)
    assert refused(statistics=counts(), breaker="open") == (True, True)
    assert refused(statistics=full, max_backlog=9, overflow="reject") == (True, True)
    assert refused(statistics=full, max_backlog=9, overflow="wait") == (True, False)
    assert refused(statistics=full, max_backlog=10, overflow="reject") == (True, False)
    pool = FakePool(max_backlog=9, overflow="reject")
    pool.counts = full
    [shown] = monitor_of(pool).picture(WALL).pools
    assert (shown.ready, shown.refuses) == (True, True)
    assert shown.sentence.startswith("refusing: 4 of 4 busy, the backlog is full")


def test_a_pool_that_scales_is_ready_while_its_first_worker_comes() -> None:
    def ready(*crew: WorkerSnapshot, scales: bool, **changes: Any) -> bool:
        facts = {"state": PoolState.OPEN, "workers": crew, "scales": scales}
        return judge(Facts(statistics=counts(**changes), **facts)).ready  # type: ignore[arg-type]

    starting = worker(0, state=WorkerState.STARTING)
    for size in (0, 1):
        assert ready(starting, scales=True, size=size, workers=0)
        assert not ready(starting, scales=False, size=size, workers=0)
    assert not ready(RESTARTING, scales=True, size=1, workers=0)


def test_crashes_and_marks_are_kept_the_newest_first() -> None:
    monitor = monitor_of(FakePool())
    error = caught(OSError("gone"))
    monitor.hear(WorkerChanged("worker_crash", "fake", 1.0, 3, error), WALL + 1)
    monitor.hear(WorkerChanged("worker_restart", "fake", 1.0, 3, None), WALL + 2)
    monitor.hear(PoolResized("resize", "fake", 1.0, 4, 8), WALL + 3)
    monitor.mark("deploy 1.2", WALL + 4)
    [shown] = monitor.picture(WALL + 5).pools
    assert [(mark.kind, mark.text) for mark in shown.marks] == [
        ("mark", "deploy 1.2"),
        ("resize", "size 4 \u2192 8"),
        ("restart", "worker 3 is set up again"),
    ]
    [crash] = shown.crashes
    assert (crash.worker, crash.type, crash.text) == (3, "OSError", None)
    assert monitor.picture(WALL + 904).pools[0].marks == shown.marks[:1]


def test_changes_of_state_and_breaker_are_marked() -> None:
    pool = FakePool()
    monitor = monitor_of(pool)
    pool.state = PoolState.PAUSED
    monitor.sample(101.0, WALL, 0.0)
    monitor.sample(102.0, WALL, 0.0)
    pool.state = PoolState.OPEN
    monitor.sample(103.0, WALL, 0.0)
    [shown] = monitor.picture(WALL).pools
    assert [mark.text for mark in shown.marks] == ["pool is open", "pool is paused"]


def test_marks_are_bounded() -> None:
    monitor = monitor_of(FakePool())
    for _ in range(1000):
        monitor.mark("x" * 1000, WALL)
    [shown] = monitor.picture(WALL).pools
    assert len(shown.marks) == 50
    assert len(shown.marks[0].text) == 200


def test_nothing_of_inputs_and_messages_is_shown_unless_asked_for() -> None:
    pool = FakePool()
    pool.crew = (worker(0, state=WorkerState.BUSY, job_id=1, job_age=0.5),)
    pool.jobs = [running("a secret input")]
    monitor = monitor_of(pool)
    monitor.hear(failure(caught(ValueError("a secret message"))), WALL)
    error = caught(ValueError("a secret reason"))
    monitor.hear(WorkerChanged("worker_crash", "fake", 1.0, 3, error), WALL)
    shown = to_json(monitor.picture(WALL)) + render_page(monitor.picture(WALL), True)
    assert "secret" not in shown
    assert "ValueError" in shown


def test_inputs_are_described_once_for_each_job() -> None:
    pool = FakePool()
    pool.crew = (worker(0, state=WorkerState.BUSY, job_id=1, job_age=0.5),)
    pool.jobs = [running("x" * 1000)]
    asked: list[str] = []

    def describe(job_input: str) -> str:
        asked.append(job_input)
        return job_input

    monitor = monitor_of(pool, describe=describe)
    monitor.hear(failure(caught(ValueError("y" * 1000))), WALL)
    for _ in range(3):
        [shown] = monitor.picture(WALL).pools
    assert len(asked) == 1
    assert shown.workers[0].doing == "x" * 199 + "\u2026"
    assert shown.slowest == shown.workers
    assert shown.errors[0].text == "y" * 299 + "\u2026"
    pool.jobs = [running("another", job=2)]
    assert monitor.picture(WALL).pools[0].workers[0].doing == "another"


@pytest.mark.parametrize("describe", [lambda _: 1 / 0, lambda _: 7])
def test_a_describe_that_fails_is_logged_once_and_not_called_again(
    describe: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pool = FakePool()
    pool.crew = (worker(0, job_id=1, job_age=0.5), worker(1, job_id=2, job_age=0.5))
    pool.jobs = [running("a"), running("b", job=2, worker=1)]
    monitor = monitor_of(pool, describe=describe)
    for _ in range(3):
        [shown] = monitor.picture(WALL).pools
        assert [row.doing for row in shown.workers] == [None, None]
    assert len(caplog.records) == 1
    assert "describe= of a dashboard" in caplog.text


def test_an_error_that_cannot_be_put_into_words_is_shown_all_the_same() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    monitor = monitor_of(FakePool(), describe=str)
    monitor.hear(failure(MuteError()), WALL)
    monitor.hear(failure(None), WALL)
    [shown] = monitor.picture(WALL).pools
    assert [error.text for error in shown.errors] == [
        None,
        "(its message could not be made)",
    ]
    assert [error.place for error in shown.errors] == ["", ""]


def test_what_is_kept_leads_to_no_error_object() -> None:
    class HeavyError(Exception):
        pass

    monitor = monitor_of(FakePool(), describe=str)
    monitor.hear(failure(caught(HeavyError("x"))), WALL)
    [shown] = monitor.picture(WALL).pools
    for found in attrs.asdict(shown)["errors"]:
        assert all(isinstance(v, (str, int, float)) for v in found.values())


def test_the_place_is_in_the_programs_own_code() -> None:
    try:
        json.loads("{")
    except ValueError as error:
        place = place_of_error(error)
        innermost = traceback.extract_tb(error.__traceback__)[-1]
    assert innermost.filename != __file__
    assert place.startswith(f"{__file__}:")
    assert place.endswith(" test_the_place_is_in_the_programs_own_code")


def test_a_picture_is_json_that_everybody_reads() -> None:
    pool = FakePool(max_backlog=math.inf)
    monitor = monitor_of(pool)

    def refuse_constants(name: str) -> None:
        raise AssertionError(name)

    monitor.sample(101.0, WALL, 0.25)
    text = to_json(monitor.picture(WALL, step=1))
    read = json.loads(text, parse_constant=refuse_constants)
    assert read["pools"][0]["max_backlog"] is None
    assert read["pools"][0]["history"]["lag"] == [0.0, 0.25]
    without = json.loads(to_json(monitor.picture(WALL, step=None)))
    assert without["pools"][0]["history"] is None


def test_why_pools_are_not_ready_is_said_for_each() -> None:
    pools = [FakePool("one"), FakePool("two"), FakePool("three")]
    monitor = monitor_of(*pools)
    assert monitor.reasons_not_ready() == []
    pools[1].state = PoolState.PAUSED
    pools[2].state = PoolState.BROKEN
    assert monitor.reasons_not_ready() == [
        "two: paused: nothing waits",
        "three: broken: a worker crashed too often",
    ]


def test_whatever_the_state_of_a_pool_the_page_can_be_rendered() -> None:
    for state in PoolState:
        pool = FakePool("<b>&amp;\ud800", max_backlog=math.inf)
        pool.state = state
        monitor = monitor_of(pool)
        monitor.sample(101.0, WALL, 0.0)
        fragments = render_fragments(monitor.picture(WALL))
        assert "<b>&amp;" not in "".join(fragments.values())
        event_of(fragments).decode("ascii")


# Feed and streams.


def test_nothing_is_rendered_while_nobody_reads() -> None:
    rendered: list[int] = []

    def render() -> dict[str, str]:
        rendered.append(1)
        return {"a": "b"}

    feed = Feed(render, 1)
    for _ in range(3):
        feed.tick()
    assert rendered == []
    feed.newest()
    feed.newest()
    assert rendered == [1]


def test_what_cannot_be_rendered_is_logged_once_and_the_last_picture_stays(
    caplog: pytest.LogCaptureFixture,
) -> None:
    errors: list[Exception] = []

    def render() -> dict[str, str]:
        if errors:
            raise errors[-1]
        return {"a": "b"}

    feed = Feed(render, 1)
    with trio_free_reader(feed):
        feed.tick()
        for error in (ValueError("x"), ValueError("x"), OSError("y")):
            errors.append(error)
            feed.tick()
            assert feed.newest()[1] == {"a": "b"}
        assert len(caplog.records) == 2
        errors.clear()
        feed.tick()
        assert feed.newest() == (5, {"a": "b"})


@contextmanager
def trio_free_reader(feed: Feed) -> Generator[None, None, None]:
    reader: Any = object()
    feed.readers.add(reader)
    yield
    feed.readers.discard(reader)


def test_an_event_is_one_line_whatever_is_in_it() -> None:
    event = event_of({"a": "one\ntwo\r\n\u2028data: x\n\n"})
    assert event.endswith(b"\n\n")
    assert event.strip().count(b"\n") == 0
    assert b"\r" not in event
    assert json.loads(event.removeprefix(b"data: "))["a"].startswith("one\ntwo")


# The guard.


GUARD = make_guard(
    "192.0.2.7", check_hosts(["Pool.Example.org.", "2001:db8::1"]), TOKEN
)


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:8765", "127.0.0.1:1", "[::1]", "[::1]:8765"),
        *("192.0.2.7:8765", "pool.example.org", "pool.example.org.:443"),
        *("[2001:DB8:0::1]:80", "[0:0:0:0:0:0:0:1]:80"),
    ],
)
def test_known_hosts_are_answered(host: str) -> None:
    assert GUARD.check_host({"host": host}) is None


@pytest.mark.parametrize(
    "host",
    [
        *("", "evil.example", "localhost.evil.example", "evil.example:8765"),
        *("pool.example.org.evil.example", "192.0.2.8", "[::1", "[::1]]", "@", ":"),
        *("localhost@evil.example", "evil.example/localhost", "0.0.0.0"),
        *("localhost, evil.example", "127.0.0.1.evil.example", "localhost\x00"),
    ],
)
def test_other_hosts_are_not(host: str) -> None:
    refusal = GUARD.check_host({"host": host})
    assert refusal is not None
    assert refusal.status == 403
    assert "hosts=" in refusal.reason


def test_no_host_at_all_is_refused() -> None:
    assert GUARD.check_host({}) is not None


@given(st.text(max_size=40))
def test_no_host_header_breaks_the_guard(host: str) -> None:
    refusal = GUARD.check_host({"host": host})
    assert (refusal is None) == (host_name(host) in GUARD.hosts)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
        {"origin": "http://localhost:8765"},
        {"origin": "https://localhost:8765", "sec-fetch-site": "same-origin"},
        {"host": "localhost", "origin": "https://localhost:443"},
        {"origin": "https://pool.example.org", "sec-fetch-site": "same-origin"},
    ],
)
def test_what_comes_from_this_page_or_from_no_page_is_let_in(
    headers: dict[str, str],
) -> None:
    assert GUARD.check_origin({"host": "localhost:8765", **headers}) is None


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "something new"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://evil.example"},
        {"origin": "http://localhost:3000"},
        {"origin": "file://localhost:8765"},
        {"origin": "http://127.0.0.1:8765"},
        {"origin": "http://localhost:8765", "sec-fetch-site": "cross-site"},
    ],
)
def test_what_a_page_elsewhere_asks_for_is_refused(headers: dict[str, str]) -> None:
    refusal = GUARD.check_origin({"host": "localhost:8765", **headers})
    assert refusal is not None
    assert refusal.status == 403


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (f"Bearer {TOKEN}", None),
        (f"bearer  {TOKEN} ", None),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        (f"Basic {TOKEN}", 401),
        (TOKEN, 401),
        (f"Bearer {TOKEN}x", 401),
        ("Bearer \u00fc\u00fc\u00fc", 401),
    ],
)
def test_only_the_token_opens(given: str, status: int | None) -> None:
    refusal = GUARD.check_token({"authorization": given})
    assert (None if refusal is None else refusal.status) == status


def test_without_a_token_nobody_is_let_in() -> None:
    refusal = make_guard("127.0.0.1", frozenset(), None).check_token(
        {"authorization": "Bearer None"}
    )
    assert refusal is not None
    assert refusal.status == 403


@pytest.mark.parametrize(
    "token", ["short", "x" * 15, "\u00fc" * 16, "with a space in it"]
)
def test_a_token_that_is_easy_or_cannot_be_sent_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="token must be a str of 16 or more") as found:
        make_guard(None, frozenset(), token)
    assert token not in str(found.value)


def test_the_token_is_in_no_representation() -> None:
    assert TOKEN not in repr(Guard(frozenset(), token=TOKEN))


@pytest.mark.parametrize("hosts", [["http://a"], ["a:80"], ["a/b"], [""], ["a b@c"]])
def test_hosts_are_names_alone(hosts: list[str]) -> None:
    with pytest.raises(ValueError, match="hosts must be host names"):
        check_hosts(hosts)


@pytest.mark.parametrize("hosts", ["localhost", 5, [5]])
def test_hosts_are_several(hosts: Any) -> None:
    with pytest.raises(TypeError, match="hosts must be"):
        check_hosts(hosts)


# Addresses.


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:8765", "127.0.0.1", 8765),
        ("[::1]:0", "::1", 0),
        ("localhost:65535", "localhost", 65535),
    ],
)
def test_addresses_are_host_and_port(text: str, host: str, port: int) -> None:
    address = parse_address("bind", text)
    assert (address.host, address.port) == (host, port)


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "8765", ":8765", "a:", "a:b", "a:-1", "a:65536", "::1:8765"),
        *("http://a:80", "a:80/", "unix:/tmp/x", "[::1:80", "a:\u0661", "[]:80"),
    ],
)
def test_other_addresses_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"bind must be host:port, .* got "):
        parse_address("bind", text)


@pytest.mark.parametrize("text", [None, 8765, b"a:1"])
def test_an_address_is_text(text: object) -> None:
    with pytest.raises(TypeError, match="liveness must be host:port"):
        parse_address("liveness", text)


def test_why_nobody_can_listen_is_said_with_the_address() -> None:
    with listen_at(parse_address("bind", "127.0.0.1:0")) as first:
        where = url_of(first).removeprefix("http://")
        with pytest.raises(OSError, match=f"bind='{where}': cannot listen") as found:
            listen_at(parse_address("bind", where))
    assert found.value.errno is not None
    # What closed last is not in the way.
    listen_at(parse_address("bind", where)).close()
    with pytest.raises(OSError, match="cannot listen there"):
        listen_at(parse_address("bind", "192.0.2.1:0"))
    with pytest.raises(ValueError, match="bind must be host:port"):
        listen_at(parse_address("bind", "a" * 70 + ".example:0"))


def test_a_url_of_ipv6_is_bracketed() -> None:
    if not socket.has_ipv6:
        pytest.skip("needs IPv6")
    try:
        listener = listen_at(parse_address("bind", "[::1]:0"))
    except OSError:
        pytest.skip("needs ::1")
    with listener:
        assert url_of(listener).startswith("http://[::1]:")


# Controls.


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"4", b"[]", b"{", b'{"size"}', b'{"sice": 4}', b"\xff", b"[" * 1000),
        *(b'{"size": "4"}', b'{"size": 4.0}', b'{"size": true}', b'{"size": null}'),
        *(b'{"size": -1}', b'{"size": 10001}', b'{"size": NaN}', b'{"size": [[]]}'),
        b'{"size": ' + b"9" * 900 + b"}",
        b'{"size": "' + b"9" * 900 + b'"}',
    ],
)
def test_what_is_no_size_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="size") as found:
        read_size(body)
    assert len(str(found.value)) < 200


def test_a_size_is_read() -> None:
    assert read_size(b' {"size": 0, "more": 1}') == 0
    assert read_size(b'{"size": 10000}') == 10_000
