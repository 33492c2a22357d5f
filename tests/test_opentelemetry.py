"""OpenTelemetry: spans that find their parents, and figures of pools."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import opentelemetry
import pytest
import trio
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_pool import (
    Backoff,
    JobCancelled,
    JobTimeout,
    PoolBroken,
    Restart,
    Retry,
    Task,
    WorkerCrashed,
    open_pool,
)
from trio_pool.offload import in_thread
from trio_pool.opentelemetry import PoolObserver, observe_pools, trace_jobs

SECRET = "the secret in the input"


class Broken(Exception):
    """What a handler raises."""


class Unspeakable(Exception):
    """An error that cannot be told."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


async def obey(job: Any) -> Any:
    """Raise an error, sleep for a number of seconds, await a function."""
    if isinstance(job, BaseException):
        raise job
    if callable(job):
        return await job()
    if isinstance(job, float):
        await trio.sleep(job)
    return job


class Traces:
    """A tracer provider that keeps the spans that have ended."""

    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(**options)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("tests")

    def named(self, name: str) -> list[Any]:
        return [
            span for span in self.exporter.get_finished_spans() if span.name == name
        ]

    @property
    def jobs(self) -> list[Any]:
        return self.named("process press")

    @asynccontextmanager
    async def open(self, size: int, *args: Any, **options: Any) -> AsyncGenerator[Any]:
        middleware = [trace_jobs(self.provider)]
        async with open_pool(
            size, *args, middleware=middleware, name="press", **options
        ) as pool:
            yield pool


@pytest.fixture
def traces() -> Traces:
    return Traces()


# Every way to give in a job to a pool of a handler, each of one job or two.


async def by_process(pool: Any) -> None:
    await pool.process(1)


async def by_process_of_a_busy_pool(pool: Any) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(pool.process, 1.0)


async def by_process_with_a_key(pool: Any) -> None:
    await pool.process(1, key="a", priority=3, timeout=5)


async def by_submit(pool: Any) -> Any:
    return await pool.submit(1.0)


async def by_submit_with_a_delay(pool: Any) -> Any:
    return await pool.submit(1, delay=2.0)


async def by_submit_nowait(pool: Any) -> Any:
    pool.submit_nowait(1.0)
    pool.submit_nowait(1.0)
    return pool.submit_nowait(1.0)


async def by_submit_to_a_paused_pool(pool: Any) -> Any:
    pool.pause()
    reply = await pool.submit(1)
    trio.lowlevel.spawn_system_task(resume_later, pool)
    return reply


async def resume_later(pool: Any) -> None:
    await trio.sleep(1)
    pool.resume()


async def by_submit_batch(pool: Any) -> Any:
    return (await pool.submit_batch([1.0, 1.0]))[1]


async def by_map(pool: Any) -> None:
    await pool.map([1, 2.0, 3])


async def by_map_of_an_async_input(pool: Any) -> None:
    async def items() -> AsyncGenerator[float]:
        for number in range(3):
            await trio.sleep(0.5)
            yield float(number)

    await pool.map(items())


async def by_settle(pool: Any) -> None:
    await pool.settle([1, ValueError(), 2.0])


async def by_settle_with_retries(pool: Any) -> None:
    retry = Retry(3, Backoff(initial=0.5, jitter=0.0))
    await pool.settle([ValueError(), 1], retry=retry)


async def by_stream(pool: Any) -> None:
    async with pool.stream([1, 2.0, 3], ordered=False) as results:
        async for _ in results:
            pass


async def by_lease(pool: Any) -> None:
    async with pool.lease() as worker:
        await worker.process(1)
        await worker.process(2.0)


async def by_a_retry(pool: Any) -> None:
    failures = [ValueError(), ValueError()]

    async def fail_twice() -> None:
        if failures:
            raise failures.pop()

    await pool.process(fail_twice, retry=Retry(3, Backoff(initial=1.0)))


WAYS = [
    by_process,
    by_process_of_a_busy_pool,
    by_process_with_a_key,
    by_submit,
    by_submit_with_a_delay,
    by_submit_nowait,
    by_submit_to_a_paused_pool,
    by_submit_batch,
    by_map,
    by_map_of_an_async_input,
    by_settle,
    by_settle_with_retries,
    by_stream,
    by_lease,
    by_a_retry,
]


@pytest.mark.parametrize("way", WAYS)
async def test_a_span_is_the_child_of_the_one_in_which_its_job_was_given_in(
    way: Callable[[Any], Awaitable[Any]],
    traces: Traces,
    autojump_clock: MockClock,
) -> None:
    seen: list[int] = []

    async def handle(job: Any) -> Any:
        seen.append(trace.get_current_span().get_span_context().span_id)
        with traces.tracer.start_as_current_span("inside"):
            return await obey(job)

    async with traces.open(2, handle) as pool:
        # Workers have run for somebody else before.
        with traces.tracer.start_as_current_span("another"):
            await pool.map([1, 2, 3])
        await pool.map([1, 2, 3])
        traces.exporter.clear()
        seen.clear()
        with traces.tracer.start_as_current_span("submitter") as submitter:
            reply = await way(pool)
        # The span of the submitter may have ended long before.
        if reply is not None:
            await reply.wait()
        await pool.join()
    jobs = traces.jobs
    assert jobs
    assert {span.parent.span_id for span in jobs} == {
        submitter.get_span_context().span_id
    }
    assert {span.context.trace_id for span in jobs} == {
        submitter.get_span_context().trace_id
    }
    assert sorted(span.context.span_id for span in jobs) == sorted(seen)
    inside = {span.parent.span_id for span in traces.named("inside")}
    assert inside == set(seen)
    assert len(seen) == len(set(seen))


async def test_a_span_is_the_child_of_its_submitters_in_a_pool_of_calls(
    traces: Traces, autojump_clock: MockClock
) -> None:
    async with traces.open(2) as pool:
        parents: list[int] = []
        for way in range(5):
            with traces.tracer.start_as_current_span("submitter") as submitter:
                parents.append(submitter.get_span_context().span_id)
                if way == 0:
                    await pool.process(trio.sleep, 1)
                elif way == 1:
                    await pool.submit(trio.sleep, 1)
                elif way == 2:
                    await pool.go(Task(trio.sleep, 1), Task(obey, 1))
                elif way == 3:
                    await pool.map(obey, [1, 2])
                else:
                    async with pool.lease() as worker:
                        await worker.process(trio.sleep, 1)
    found = [span.parent.span_id for span in traces.jobs]
    assert {parent: found.count(parent) for parent in parents} == dict(
        zip(parents, (1, 1, 2, 2, 1), strict=True)
    )


async def test_jobs_of_jobs_make_a_tree(traces: Traces) -> None:
    async with traces.open(2, obey) as pool:

        async def outer() -> Any:
            return await pool.process(1)

        assert await pool.process(outer) == 1
    inner, outermost = traces.jobs
    assert inner.parent.span_id == outermost.context.span_id
    assert outermost.parent is None


async def test_a_job_off_the_thread_has_its_span_here(traces: Traces) -> None:
    ids: list[int] = []

    def work(_: int) -> None:
        ids.append(trace.get_current_span().get_span_context().span_id)

    async with traces.open(1, worker=in_thread(work)) as pool:
        await pool.map([1, 2])
    assert [span.context.span_id for span in traces.jobs] == ids


async def test_the_context_of_the_caller_is_as_before(traces: Traces) -> None:
    async with traces.open(1, obey) as pool:
        with traces.tracer.start_as_current_span("submitter") as submitter:
            await pool.settle([1, ValueError()])
            with pytest.raises(ValueError):
                await pool.process(ValueError())
            assert trace.get_current_span() is submitter
        # Nor does the worker keep anything of it.
        await pool.process(1)
    assert traces.jobs[-1].parent is None


async def test_the_facts_of_a_job_are_attributes(
    traces: Traces, autojump_clock: MockClock
) -> None:
    async with traces.open(1, obey) as pool:
        first = await pool.submit(1.5, id="first")
        second = await pool.submit(0.5, key=SECRET)
        await second.wait()
        assert first.done
    assert [dict(span.attributes) for span in traces.jobs] == [
        {
            "trio_pool.name": "press",
            "trio_pool.job.id": "first",
            "trio_pool.job.attempt": 1,
            "trio_pool.job.waited": pytest.approx(0.0, abs=1e-3),
            "trio_pool.job.outcome": "done",
            "trio_pool.worker.id": 0,
        },
        {
            "trio_pool.name": "press",
            "trio_pool.job.id": str(second.id),
            "trio_pool.job.attempt": 1,
            "trio_pool.job.waited": pytest.approx(1.5, abs=1e-3),
            "trio_pool.job.outcome": "done",
            "trio_pool.worker.id": 0,
        },
    ]
    for span in traces.jobs:
        assert span.kind is SpanKind.INTERNAL
        assert span.status.status_code is StatusCode.UNSET
        assert span.events == ()
        assert span.instrumentation_scope.name == "trio_pool"


async def test_inputs_and_keys_are_not_told(traces: Traces) -> None:
    async with traces.open(1, obey) as pool:
        await pool.process(SECRET, key=SECRET)
        await pool.map([SECRET])
    async with traces.open(1) as calls:
        await calls.process(obey, SECRET)
    assert SECRET not in "".join(span.to_json() for span in traces.jobs)


async def test_each_attempt_has_a_span_with_its_number_and_its_error(
    traces: Traces, autojump_clock: MockClock
) -> None:
    retry = Retry(3, Backoff(initial=0.5, jitter=0.0))
    async with traces.open(1, obey) as pool:
        await pool.settle([Broken("no")], retry=retry)
        with pytest.raises(Broken):
            await pool.process(Broken("no"), retry=retry)
    attempts = [span.attributes["trio_pool.job.attempt"] for span in traces.jobs]
    assert attempts == [1, 2, 3, 1, 2, 3]
    for span in traces.jobs:
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes["trio_pool.job.outcome"] == "failed"
        assert span.attributes["error.type"] == f"{__name__}.Broken"
        (event,) = span.events
        assert event.name == "exception"
        assert event.attributes["exception.message"] == "no"
        assert "in obey" in event.attributes["exception.stacktrace"]


@pytest.mark.parametrize("how", ["caller", "reply", "pool", "itself", "group"])
async def test_a_cancellation_is_no_error(
    how: str, traces: Traces, autojump_clock: MockClock
) -> None:
    async def in_nurseries() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)

    async with traces.open(1, obey, timeout=60) as pool:
        if how == "caller":
            with trio.move_on_after(1):
                await pool.process(trio.sleep_forever)
        elif how == "group":
            with trio.move_on_after(1):
                await pool.process(in_nurseries)
        else:
            reply = await pool.submit(trio.sleep_forever)
            await wait_all_tasks_blocked()
            if how == "reply":
                reply.cancel()
            else:
                pool.cancel()
            with pytest.raises(JobCancelled):
                await reply.wait()
    (span,) = traces.jobs
    assert span.attributes["trio_pool.job.outcome"] == "cancelled"
    assert span.status.status_code is StatusCode.UNSET
    assert span.events == ()
    assert "error.type" not in span.attributes


async def test_a_timeout_is_told_as_one_and_a_deadline_of_the_caller_is_not(
    traces: Traces, autojump_clock: MockClock
) -> None:
    async with traces.open(1, obey, timeout=2) as pool:
        with pytest.raises(JobTimeout):
            await pool.process(trio.sleep_forever)
        with trio.move_on_after(1):
            await pool.process(trio.sleep_forever)
        await pool.settle([trio.sleep_forever])
    outcomes = [span.attributes["trio_pool.job.outcome"] for span in traces.jobs]
    assert outcomes == ["timed_out", "cancelled", "timed_out"]
    late = traces.jobs[0]
    assert late.status.status_code is StatusCode.ERROR
    assert late.status.description == "ran longer than its timeout of 2 s"
    assert late.attributes["error.type"] == "timeout"


async def test_a_value_that_beats_the_cancellation_is_a_result(
    traces: Traces, autojump_clock: MockClock
) -> None:
    async def stubborn() -> str:
        with trio.CancelScope(shield=True):
            await trio.sleep(3)
        return "done"

    async with traces.open(1, obey) as pool:
        with trio.move_on_after(1):
            assert await pool.process(stubborn) == "done"
    assert traces.jobs[0].attributes["trio_pool.job.outcome"] == "done"


async def test_the_job_fails_by_the_same_error_as_without(traces: Traces) -> None:
    async with traces.open(1, obey, crash_on=Unspeakable) as pool:
        for error in (ValueError("no"), Unspeakable(), StopAsyncIteration()):
            with pytest.raises(type(error)) as caught:
                await pool.process(error)
            assert caught.value is error
        with pytest.raises(WorkerCrashed) as crashed:
            await pool.process(SystemExit(3))
        assert isinstance(crashed.value.__cause__, SystemExit)
    kinds = [span.attributes["error.type"] for span in traces.jobs]
    assert kinds == [
        "ValueError",
        f"{__name__}.Unspeakable",
        "StopAsyncIteration",
        "SystemExit",
    ]


async def test_an_error_beside_a_cancellation_is_an_error(
    traces: Traces, autojump_clock: MockClock
) -> None:
    async def fail_as_it_is_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise Broken

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_as_it_is_cancelled)
            nursery.start_soon(trio.sleep_forever)

    async with traces.open(1, obey) as pool:
        with pytest.RaisesGroup(Broken), trio.move_on_after(1):
            await pool.process(both)
    (span,) = traces.jobs
    assert span.attributes["trio_pool.job.outcome"] == "failed"
    assert span.status.status_code is StatusCode.ERROR


async def test_a_span_that_is_not_sampled_harms_nothing() -> None:
    traces = Traces(sampler=ALWAYS_OFF)
    async with traces.open(1, obey) as pool:
        outcomes = await pool.settle([1, ValueError()])
        assert outcomes[0].outcome.unwrap() == 1
    assert traces.jobs == []


async def test_without_an_sdk_nothing_happens() -> None:
    async with open_pool(1, obey, middleware=[trace_jobs()]) as pool:
        assert await pool.map([1, 2]) == [1, 2]


class Metrics:
    """A meter provider that is read by hand."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider(metric_readers=[self.reader])

    def read(self) -> dict[str, dict[tuple[Any, ...], Any]]:
        """Return the values by the metric's name, the pool's and the rest."""
        data = self.reader.get_metrics_data()
        return {
            metric.name: {
                tuple(point.attributes.values()): point.value
                for point in metric.data.data_points
            }
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


def check_books(found: dict[str, dict[tuple[Any, ...], Any]]) -> None:
    for (pool,), accepted in found["trio_pool.job.accepted"].items():
        now = sum(v for k, v in found["trio_pool.job.count"].items() if k[0] == pool)
        ended = sum(v for k, v in found["trio_pool.job.ended"].items() if k[0] == pool)
        assert accepted == now + ended


async def test_the_figures_of_a_pool_are_metrics(autojump_clock: MockClock) -> None:
    metrics = Metrics()
    async with open_pool(2, obey, name="press", max_backlog=8) as pool:
        observe_pools(pool, meter_provider=metrics.provider)
        await pool.settle([1.0, ValueError(), 2.0])
        await pool.settle([ValueError()], retry=Retry(2, Backoff(initial=0.25)))
        for seconds in (5.0, 5.0, 5.0):
            pool.submit_nowait(seconds)
        pool.submit_nowait(1, delay=60)
        await trio.sleep(1.5)
        found = metrics.read()
        assert found["trio_pool.job.accepted"] == {("press",): 8}
        ended = found["trio_pool.job.ended"]
        assert {k[1]: v for k, v in ended.items() if v} == {"done": 2, "failed": 2}
        assert len(ended) == 7
        assert found["trio_pool.job.count"] == {
            ("press", "running"): 2,
            ("press", "queued"): 1,
            ("press", "delayed"): 1,
        }
        assert found["trio_pool.job.retries"] == {("press",): 1}
        assert found["trio_pool.job.oldest_wait"] == {("press",): 1.5}
        assert found["trio_pool.job.run.time"] == {("press",): pytest.approx(3.0)}
        assert found["trio_pool.backlog.limit"] == {("press",): 8}
        assert found["trio_pool.worker.count"] == {
            ("press", "busy"): 2,
            ("press", "idle"): 0,
        }
        assert found["trio_pool.worker.wanted"] == {("press",): 2}
        assert found["trio_pool.worker.restarts"] == {("press",): 0}
        states = found["trio_pool.status"]
        assert {k[1] for k, v in states.items() if v} == {"open"}
        assert len(states) == 5
        check_books(found)
        pool.cancel()


async def test_percentiles_are_those_since_the_last_reading(
    autojump_clock: MockClock,
) -> None:
    metrics = Metrics()
    async with open_pool(1, obey, name="press") as pool:
        observe_pools(pool, meter_provider=metrics.provider)
        await pool.settle([60.0])
        run = metrics.read()["trio_pool.job.run.percentile"]
        assert run["press", 50] == pytest.approx(60, rel=0.06)
        await pool.settle([1.0, 1.0, 1.0])
        run = metrics.read()["trio_pool.job.run.percentile"]
        assert {k[1] for k in run} == {50, 95, 99}
        assert all(value == pytest.approx(1, rel=0.13) for value in run.values())
        assert "trio_pool.job.run.percentile" not in metrics.read()


async def test_each_pool_is_read_once_a_collection() -> None:
    metrics = Metrics()
    reads: list[str] = []
    async with open_pool(1, obey, name="press") as real:

        class Counted:
            name, closed, state, config = "press", False, real.state, real.config

            def statistics(self) -> Any:
                reads.append("press")
                return real.statistics()

        counted: Any = Counted()
        observe_pools(counted, meter_provider=metrics.provider)
        for count in range(1, 4):
            check_books(metrics.read())
            assert len(reads) == count


async def test_an_infinite_backlog_is_not_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics = Metrics()
    async with open_pool(1, obey, max_backlog=float("inf")) as pool:
        observe_pools(pool, meter_provider=metrics.provider)
        assert "trio_pool.backlog.limit" not in metrics.read()
    assert caplog.records == []


async def test_a_provider_has_one_observer_whoever_asks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics, others = Metrics(), Metrics()
    async with open_pool(1, obey, name="a") as a, open_pool(1, obey, name="b") as b:
        observer = observe_pools(a, meter_provider=metrics.provider)
        assert observe_pools(b, meter_provider=metrics.provider) is observer
        assert isinstance(observer, PoolObserver)
        assert set(metrics.read()["trio_pool.job.accepted"]) == {("a",), ("b",)}
        assert observe_pools(a, meter_provider=others.provider) is not observer
        observer.remove(a)
        observer.remove(a)
        assert set(metrics.read()["trio_pool.job.accepted"]) == {("b",)}
        assert set(others.read()["trio_pool.job.accepted"]) == {("a",)}
    assert caplog.records == []


async def test_of_two_open_pools_of_a_name_the_second_is_refused() -> None:
    metrics = Metrics()
    async with open_pool(1, obey, name="press") as first:
        observer = observe_pools(first, meter_provider=metrics.provider)
        observer.add(first)
        async with open_pool(1, obey, name="press") as second:
            with pytest.raises(ValueError, match="the pool's name must be another"):
                observer.add(second)
            observer.remove(second)
        await first.process(1)
        assert metrics.read()["trio_pool.job.accepted"] == {("press",): 1}
    async with open_pool(1, obey, name="press") as third:
        observer.add(third)
        assert metrics.read()["trio_pool.job.accepted"] == {("press",): 0}


@pytest.mark.parametrize("bad", [None, "press", object()])
def test_what_is_no_pool_is_refused(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"pool must be a pool.*, got "):
        observe_pools(bad, meter_provider=Metrics().provider)


async def test_pools_and_providers_are_held_weakly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metrics = Metrics()
    # The record of a crash keeps the error, and that its frames.
    monkeypatch.setattr(logging.getLogger("trio_pool"), "disabled", True)

    async def live() -> None:
        with pytest.raises(PoolBroken):
            async with open_pool(
                1, obey, crash_on=Broken, restart=Restart(limit=0), name="press"
            ) as pool:
                observe_pools(pool, meter_provider=metrics.provider)
                await pool.settle([Broken()])
                await trio.sleep_forever()
        states = metrics.read()["trio_pool.status"]
        assert {k[1] for k, v in states.items() if v} == {"broken"}

    await live()
    gc.collect()
    assert metrics.read() == {}
    observer = observe_pools(meter_provider=metrics.provider)
    assert repr(observer) == "<trio_pool.opentelemetry.PoolObserver: 0 pools>"


async def test_collections_of_other_threads_are_consistent_and_stop_no_loop() -> None:
    metrics, enough, failures = Metrics(), threading.Event(), list[object]()

    def collect() -> None:
        try:
            while not enough.is_set():
                check_books(metrics.read())
        except BaseException as error:
            failures.append(error)
            raise

    async with open_pool(2, obey, name="press") as pool:
        observe_pools(pool, meter_provider=metrics.provider)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, collect)
            try:
                for _ in range(30):
                    await pool.settle([1, ValueError(), 0.0001] * 20)
            finally:
                enough.set()
        # On trio's own thread: it makes no call of trio, so it ends.
        metrics.provider.shutdown()
    assert failures == []


async def test_the_provider_of_the_program_may_be_set_later() -> None:
    program = """
import trio
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from trio_pool import open_pool
from trio_pool.opentelemetry import observe_pools, trace_jobs

async def main():
    middleware = [trace_jobs()]
    async with open_pool(1, trio.sleep, name="a", middleware=middleware) as a:
        observer = observe_pools(a)
        reader, spans = InMemoryMetricReader(), InMemorySpanExporter()
        provider = MeterProvider(metric_readers=[reader])
        metrics.set_meter_provider(provider)
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(spans))
        trace.set_tracer_provider(tracers)
        await a.process(0)
        print([span.name for span in spans.get_finished_spans()])
        async with open_pool(1, name="b") as b:
            assert observe_pools(b) is observer
            assert observe_pools(meter_provider=provider) is observer
            (resource,) = reader.get_metrics_data().resource_metrics
            found = {m.name: m for m in resource.scope_metrics[0].metrics}
            points = found["trio_pool.job.accepted"].data.data_points
            print(sorted(p.attributes["trio_pool.name"] for p in points))

trio.run(main)
"""
    done = run_program(program)
    assert (done.stderr, done.stdout) == ("", "['process a']\n['a', 'b']\n")


def run_program(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.run(
        command, capture_output=True, timeout=60, check=False, text=True
    )


def test_the_name_of_the_module_hides_no_other() -> None:
    assert trace_jobs.__module__ == PoolObserver.__module__ == "trio_pool.opentelemetry"
    assert opentelemetry.__name__ == "opentelemetry"
    done = run_program(
        "import trio_pool.opentelemetry as ours\n"
        "from trio_pool import opentelemetry as again\n"
        "import sys, opentelemetry\n"
        "assert 'opentelemetry.trace' not in sys.modules, 'imported when asked for'\n"
        "ours.trace_jobs, ours.observe_pools, ours.PoolObserver\n"
        "from opentelemetry import trace\n"
        "assert again is ours is not opentelemetry\n"
        "assert not hasattr(ours, 'trace') and hasattr(opentelemetry, 'trace')\n"
    )
    assert (done.stderr, done.returncode) == ("", 0)


def test_the_library_is_only_needed_here_and_its_lack_is_explained() -> None:
    done = run_program(
        "import sys\n"
        "sys.modules['opentelemetry'] = None\n"
        "import trio_pool\n"
        "for name in ('trace_jobs', 'observe_pools'):\n"
        "    try:\n"
        "        exec(f'from trio_pool.opentelemetry import {name}')\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    assert done.stderr == ""
    for name, line in zip(
        ("trace_jobs", "observe_pools"), done.stdout.splitlines(), strict=True
    ):
        assert line == (
            f"trio_pool.opentelemetry.{name} needs opentelemetry, which is not "
            "installed: pip install trio-pool[opentelemetry]"
        )
