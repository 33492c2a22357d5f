"""Hooks: what is called, when, and that it harms nothing."""

from __future__ import annotations

import functools
import logging
import math
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

from trio_pool import (
    Backoff,
    Hooks,
    JobCancelled,
    JobChanged,
    JobDropped,
    JobExpired,
    JobState,
    JobTimeout,
    PoolBroken,
    PoolChanged,
    PoolClosed,
    PoolResized,
    Restart,
    Retry,
    WorkerChanged,
    WorkerCrashed,
    open_pool,
)


class Broken(Exception):
    pass


async def obey(job: Any) -> Any:
    if isinstance(job, BaseException):
        raise job
    return await job() if callable(job) else job


class Recorder(Hooks):
    """Writes everything down."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def named(self, name: str) -> list[Any]:
        return [event for seen, event in self.events if seen == name]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def on_pool_start(self, event: PoolChanged) -> None:
        self.events.append(("pool_start", event))

    def on_pool_stop(self, event: PoolChanged) -> None:
        self.events.append(("pool_stop", event))

    def on_worker_start(self, event: WorkerChanged) -> None:
        self.events.append(("worker_start", event))

    def on_worker_stop(self, event: WorkerChanged) -> None:
        self.events.append(("worker_stop", event))

    def on_worker_crash(self, event: WorkerChanged) -> None:
        self.events.append(("worker_crash", event))

    def on_worker_restart(self, event: WorkerChanged) -> None:
        self.events.append(("worker_restart", event))

    def on_resize(self, event: PoolResized) -> None:
        self.events.append(("resize", event))

    def on_job_queue(self, event: JobChanged) -> None:
        self.events.append(("job_queue", event))

    def on_job_start(self, event: JobChanged) -> None:
        self.events.append(("job_start", event))

    def on_job_complete(self, event: JobChanged) -> None:
        self.events.append(("job_complete", event))

    def on_job_error(self, event: JobChanged) -> None:
        self.events.append(("job_error", event))

    def on_job_cancel(self, event: JobChanged) -> None:
        self.events.append(("job_cancel", event))

    def on_job_retry(self, event: JobChanged) -> None:
        self.events.append(("job_retry", event))

    def on_job_drop(self, event: JobChanged) -> None:
        self.events.append(("job_drop", event))


async def test_the_hooks_of_a_quiet_life_in_order(
    autojump_clock: trio.testing.MockClock,
) -> None:
    recorder = Recorder()

    async def work() -> str:
        await trio.sleep(1.5)
        return "done"

    async with open_pool(1, obey, hooks=[recorder], name="press") as pool:
        assert recorder.names == ["worker_start", "pool_start"]
        assert await pool.process(work) == "done"
    assert recorder.names == [
        "worker_start",
        "pool_start",
        "job_queue",
        "job_start",
        "job_complete",
        "worker_stop",
        "pool_stop",
    ]
    started, opened = (event for _, event in recorder.events[:2])
    assert started == WorkerChanged("worker_start", "press", 0.0, 0, None)
    assert opened == PoolChanged("pool_start", "press", 0.0)
    (queued,) = recorder.named("job_queue")
    (started,) = recorder.named("job_start")
    (completed,) = recorder.named("job_complete")
    assert queued.job_id == started.job_id == completed.job_id
    number = queued.job_id
    assert started == JobChanged(
        "job_start", "press", 0.0, number, JobState.RUNNING, 0, 1, None
    )
    assert completed == JobChanged(
        "job_complete", "press", 1.5, number, JobState.DONE, 0, 1, None
    )
    assert recorder.events[-1][1] == PoolChanged("pool_stop", "press", 1.5)


async def test_a_job_that_waits_is_queued_then_started() -> None:
    recorder = Recorder()
    go = trio.Event()
    async with open_pool(1, obey, hooks=[recorder]) as pool:
        await pool.submit(go.wait)
        await wait_all_tasks_blocked()
        second = await pool.submit(2)
        event = recorder.events[-1][1]
        assert recorder.names[-1] == "job_queue"
        assert (event.job_id, event.state) == (second.id, JobState.QUEUED)
        assert (event.worker, event.attempts) == (None, 0)
        go.set()
        await second.wait()
    mine = [
        name
        for name, event in recorder.events
        if name.startswith("job") and event.job_id == second.id
    ]
    assert mine == ["job_queue", "job_start", "job_complete"]


async def test_job_error_tells_of_failures_timeouts_and_losses(
    autojump_clock: trio.testing.MockClock,
) -> None:
    recorder = Recorder()
    failure = ValueError()
    async with open_pool(1, obey, hooks=[recorder]) as pool:
        with pytest.raises(ValueError):
            await pool.process(failure)
        with pytest.raises(JobTimeout) as timeout:
            await pool.process(trio.sleep_forever, timeout=0.25)
        with pytest.raises(WorkerCrashed) as crash:
            await pool.process(SystemExit())
    events = recorder.named("job_error")
    assert [event.error for event in events] == [failure, timeout.value, crash.value]
    assert [event.state for event in events] == [
        JobState.FAILED,
        JobState.TIMED_OUT,
        JobState.LOST,
    ]
    assert [event.attempts for event in events] == [1, 1, 1]
    assert recorder.named("job_complete") == []


async def test_job_cancel_tells_of_jobs_waiting_and_running() -> None:
    recorder = Recorder()
    async with open_pool(1, obey, hooks=[recorder]) as pool:
        running = await pool.submit(trio.sleep_forever)
        waiting = await pool.submit(1)
        await wait_all_tasks_blocked()
        waiting.cancel()
        assert recorder.named("job_cancel")[0].job_id == waiting.id
        running.cancel()
        await pool.join()
        with trio.CancelScope() as scope:
            scope.cancel()
            await pool.process(1)
    events = recorder.named("job_cancel")
    assert [event.attempts for event in events] == [0, 1, 0]
    assert {event.state for event in events} == {JobState.CANCELLED}


@pytest.mark.parametrize("by", ["pool", "reply"])
async def test_job_cancel_tells_the_error_of_each_job_that_is_ended(by: str) -> None:
    recorder = Recorder()
    async with open_pool(1, obey, hooks=[recorder], unobserved="ignore") as pool:
        replies = [pool.submit_nowait(trio.sleep_forever) for _ in range(4)]
        await wait_all_tasks_blocked()
        if by == "reply":
            for reply in replies:
                reply.cancel()
        pool.cancel()
    events = recorder.named("job_cancel")
    assert len(events) == 4
    assert {type(event.error) for event in events} == {JobCancelled}


async def test_job_cancel_tells_of_items_that_wait_for_another_try(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def handler(item: str) -> None:
        if item == "later":
            raise OSError
        await trio.sleep(1.0)
        raise Broken

    recorder = Recorder()
    retry = Retry(2, lambda _: 9.0, on=(OSError,))
    async with open_pool(2, handler, hooks=[recorder], retry=retry) as pool:
        with pytest.raises(ExceptionGroup):
            await pool.map(["later", "fails"])
    (event,) = recorder.named("job_cancel")
    assert isinstance(event.error, JobCancelled)


async def test_the_time_of_a_job_event_is_one_of_the_clock_of_trio() -> None:
    recorder = Recorder()
    async with open_pool(1, obey, hooks=[recorder]) as pool:
        before = trio.current_time()
        await pool.process(1)
        after = trio.current_time()
    times = [
        recorder.named(name)[0].time
        for name in ("job_queue", "job_start", "job_complete")
    ]
    # What is added to make one of the other has been rounded.
    assert before - 0.001 <= times[0] <= times[1] <= times[2] <= after + 0.001


async def test_job_drop_tells_of_a_job_that_made_room() -> None:
    recorder = Recorder()
    async with open_pool(
        0, obey, hooks=[recorder], max_backlog=1, overflow="drop_oldest"
    ) as pool:
        oldest = await pool.submit(1)
        await pool.submit(2)
        (event,) = recorder.named("job_drop")
        assert (event.job_id, event.state) == (oldest.id, JobState.DROPPED)
        assert isinstance(event.error, JobDropped)
        assert event.attempts == 0
        assert recorder.names.count("job_queue") == 2


async def test_job_drop_tells_of_a_job_that_waited_longer_than_its_ttl(
    autojump_clock: trio.testing.MockClock,
) -> None:
    recorder = Recorder()
    async with open_pool(0, obey, hooks=[recorder]) as pool:
        late = await pool.submit(1, ttl=1.5)
        with pytest.raises(JobExpired) as caught:
            await late.wait()
        (event,) = recorder.named("job_drop")
        assert (event.job_id, event.state) == (late.id, JobState.EXPIRED)
        assert (event.time, event.attempts, event.worker) == (1.5, 0, None)
        assert event.error is caught.value


async def test_job_retry_tells_of_the_failure_and_of_the_wait(
    autojump_clock: trio.testing.MockClock,
) -> None:
    recorder = Recorder()
    failures = [ValueError("first"), ValueError("second")]
    left = iter(failures)

    async def flaky() -> str:
        for failure in left:
            raise failure
        return "at last"

    retry = Retry(attempts=3, backoff=Backoff(initial=0.25, jitter=0))
    async with open_pool(1, obey, hooks=[recorder]) as pool:
        assert await pool.process(flaky, key="page", retry=retry) == "at last"
        assert await pool.process(1) == 1
    events = recorder.named("job_retry")
    assert [event.error for event in events] == failures
    assert [event.delay for event in events] == [0.25, 0.5]
    assert [event.time for event in events] == [0.0, 0.25]
    assert [event.attempts for event in events] == [1, 2]
    assert [event.state for event in events] == [JobState.DELAYED] * 2
    assert {event.key for event in events} == {"page"}
    assert recorder.names[2:-2] == [
        *("job_queue", "job_start", "job_retry", "job_start", "job_retry"),
        *("job_start", "job_complete"),
        *("job_queue", "job_start", "job_complete"),
    ]
    # No other record has a wait before it, and no other job this key.
    others = [event for name, event in recorder.events if name.startswith("job")]
    assert {event.delay for event in others if event not in events} == {None}
    assert [event.key for event in others] == ["page"] * 7 + [None] * 3


async def test_an_event_shows_the_id_that_was_given() -> None:
    recorder = Recorder()
    async with open_pool(1, obey, hooks=[recorder]) as pool:
        await (await pool.submit(1, id="cover")).wait()
    names = ["job_queue", "job_start", "job_complete"]
    assert [recorder.named(name)[0].job_id for name in names] == ["cover"] * 3


async def test_every_record_says_what_happened_by_the_name_of_its_hook(
    autojump_clock: trio.testing.MockClock,
) -> None:
    recorder = Recorder()
    await live_a_full_life(recorder)
    assert [event.kind for _, event in recorder.events] == recorder.names
    assert {f"on_{name}" for name in recorder.names} == set(HOOKS)


async def test_the_hooks_of_a_crash_in_order(
    autojump_clock: trio.testing.MockClock,
) -> None:
    recorder = Recorder()
    error = Broken()
    async with open_pool(
        1, obey, hooks=[recorder], crash_on=(Broken,), restart=Restart()
    ) as pool:
        with pytest.raises(Broken):
            await pool.process(error)
        await wait_all_tasks_blocked()
        assert recorder.names[2:] == [
            "job_queue",
            "job_start",
            "job_error",
            "worker_crash",
            "worker_restart",
            "worker_start",
        ]
        assert recorder.named("worker_crash")[0].error is error
        assert recorder.named("worker_restart")[0].error is None
    assert recorder.names[-2:] == ["worker_stop", "pool_stop"]


async def test_resize_tells_the_old_size_and_the_new() -> None:
    recorder = Recorder()
    async with open_pool(1, obey, hooks=[recorder], name="press") as pool:
        await pool.resize(3)
        await pool.resize(3)
        await pool.resize(2)
        events = recorder.named("resize")
        assert [(event.old, event.new) for event in events] == [(1, 3), (3, 2)]
        assert events[0].pool == "press"
        assert recorder.names.count("worker_start") == 3
        assert recorder.names.count("worker_stop") == 1
        first = recorder.names.index("resize")
        assert recorder.names[first + 1] == "worker_start"


async def test_every_item_of_map_has_its_hooks() -> None:
    recorder = Recorder()
    async with open_pool(2, obey, hooks=[recorder]) as pool:
        assert await pool.map([1, 2, 3]) == [1, 2, 3]
    for name in ("job_queue", "job_start", "job_complete"):
        assert len({event.job_id for event in recorder.named(name)}) == 3


async def test_a_pool_that_could_not_open_neither_starts_nor_stops() -> None:
    recorder = Recorder()

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        raise ValueError
        yield obey

    with pytest.raises(ValueError):
        async with open_pool(1, worker=worker, hooks=[recorder]):
            pytest.fail("the block was entered")
    assert recorder.names == ["worker_crash"]


async def test_a_shielded_setup_that_outlasts_a_failed_opening_starts_no_pool(
    autojump_clock: trio.testing.MockClock,
) -> None:
    recorder = Recorder()
    setups = iter([0.5, 1.5])

    @asynccontextmanager
    async def worker() -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        seconds = next(setups)
        with trio.CancelScope(shield=True):
            await trio.sleep(seconds)
        if seconds == 0.5:
            raise ValueError
        yield obey

    with pytest.raises(ValueError):
        async with open_pool(2, worker=worker, hooks=[recorder]):
            pytest.fail("the block was entered")
    assert trio.current_time() == 1.5
    assert recorder.names == ["worker_crash", "worker_start", "worker_stop"]


async def test_a_pool_that_breaks_stops() -> None:
    recorder = Recorder()
    with pytest.raises(PoolBroken):
        async with open_pool(
            1, obey, hooks=[recorder], restart=Restart(limit=0)
        ) as pool:
            pool.submit_nowait(SystemExit())
            await trio.sleep_forever()
    assert recorder.names[-2:] == ["worker_crash", "pool_stop"]
    assert recorder.names.count("pool_start") == recorder.names.count("pool_stop") == 1


async def test_job_hooks_run_before_the_caller_gets_the_result() -> None:
    log: list[str] = []

    class Log(Hooks):
        def on_job_complete(self, event: JobChanged) -> None:
            log.append("hook")

        def on_job_error(self, event: JobChanged) -> None:
            log.append("error hook")

    async with open_pool(1, obey, hooks=[Log()]) as pool:
        await pool.process(1)
        log.append("caller")
        reply = await pool.submit(2)
        await reply.wait()
        log.append("reader")
        with pytest.raises(ValueError):
            await pool.process(ValueError())
        log.append("caller")
        async with pool.stream([3]) as results:
            assert await anext(results) == 3
            log.append("stream")
    assert log == [
        *("hook", "caller"),
        *("hook", "reader"),
        *("error hook", "caller"),
        *("hook", "stream"),
    ]


async def test_the_reply_has_ended_when_its_hook_runs_and_its_reader_has_not() -> None:
    seen: list[JobState] = []

    class Look(Hooks):
        def on_job_complete(self, event: JobChanged) -> None:
            seen.append(reply.state)

    async with open_pool(1, obey, hooks=[Look()]) as pool:
        reply = pool.submit_nowait(1)
        await reply.wait()
    assert seen == [JobState.DONE]


async def test_hooks_are_called_in_their_order_and_an_object_may_come_twice() -> None:
    log: list[str] = []

    class Named(Hooks):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_job_start(self, event: JobChanged) -> None:
            log.append(self.name)

    one, other = Named("one"), Named("other")
    async with open_pool(1, obey, hooks=(one, other, one)) as pool:
        await pool.process(1)
    assert log == ["one", "other", "one"]


async def test_hooks_see_exact_statistics() -> None:
    seen: list[tuple[int, int, int]] = []

    class Count(Hooks):
        def on_job_start(self, event: JobChanged) -> None:
            count = pool.statistics()
            seen.append((count.accepted, count.running, count.done))

        def on_job_complete(self, event: JobChanged) -> None:
            count = pool.statistics()
            seen.append((count.accepted, count.running, count.done))

    async with open_pool(1, obey, hooks=[Count()]) as pool:
        await pool.process(1)
        assert await pool.map([1]) == [1]
    assert seen == [(1, 1, 0), (1, 0, 1), (2, 1, 1), (2, 0, 2)]


async def test_hooks_that_override_nothing_change_nothing() -> None:
    async with open_pool(2, obey, hooks=[Hooks(), Hooks()]) as pool:
        assert await pool.map(range(5)) == list(range(5))
        assert await pool.process(1) == 1


async def test_only_overridden_methods_are_ever_called() -> None:
    looked_up: list[str] = []

    class Nosy(Hooks):
        """Only one method is overridden; the others are watched."""

        def on_job_complete(self, event: JobChanged) -> None:
            looked_up.append("called")

    plain = {name: vars(Hooks)[name] for name in vars(Hooks) if name.startswith("on_")}
    assert len(plain) == 14
    code = {method.__code__ for method in plain.values()}
    hook = Nosy()

    def watch(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code in code:
            looked_up.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        async with open_pool(1, obey, hooks=[hook]) as pool:
            await pool.process(1)
            await pool.resize(2)
    finally:
        sys.setprofile(before)
    assert looked_up == ["called"]


async def test_a_hook_put_on_an_object_counts_as_overridden() -> None:
    seen: list[JobChanged] = []
    hook = Hooks()
    hook.on_job_complete = seen.append  # type: ignore[method-assign]
    async with open_pool(1, obey, hooks=[hook]) as pool:
        await pool.process(1)
    assert len(seen) == 1


HOOKS = sorted(name for name in vars(Hooks) if name.startswith("on_"))


async def live_a_full_life(hook: Hooks) -> None:
    """Make every hook of a job, a worker and a resize happen twice or more."""
    once = Retry(attempts=2, backoff=Backoff(initial=0.25, jitter=0))
    async with open_pool(
        1,
        obey,
        hooks=[hook],
        max_backlog=1,
        overflow="drop_oldest",
        unobserved="ignore",
    ) as pool:
        await pool.resize(2)
        await pool.resize(1)
        await pool.resize(2)
        await pool.resize(1)
        for _ in range(2):
            assert await pool.process(1) == 1
            with pytest.raises(ValueError):
                await pool.process(ValueError())
            with pytest.raises(WorkerCrashed):
                await pool.process(SystemExit())
            await trio.sleep(1)
            with pytest.raises(ValueError):
                await pool.process(ValueError(), retry=once)
            go = trio.Event()
            running = await pool.submit(go.wait)
            await wait_all_tasks_blocked()
            dropped = await pool.submit(1)
            waiting = await pool.submit(2)
            assert dropped.state is JobState.DROPPED
            assert waiting.cancel()
            go.set()
            await running.wait()
        count = pool.statistics()
        assert (count.done, count.failed, count.lost) == (4, 4, 2)
        assert (count.dropped, count.cancelled, count.restarts) == (2, 2, 2)
        assert count.retries == 2


@pytest.mark.parametrize("name", HOOKS)
async def test_a_hook_that_raises_is_logged_once_removed_and_harmless(
    name: str,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    error = ZeroDivisionError("in a hook")
    calls = 0

    def fail(event: object) -> None:
        nonlocal calls
        calls += 1
        raise error

    hook, recorder = Hooks(), Recorder()
    setattr(hook, name, fail)
    for hooks in (hook, recorder):
        calls = 0
        caplog.clear()
        await live_a_full_life(hooks)
        if hooks is hook:
            assert calls == 1
            logged = [r for r in caplog.records if name in r.getMessage()]
            assert len(logged) == 1
            assert logged[0].levelno == logging.ERROR
            assert logged[0].name == "trio_pool"
            assert logged[0].exc_info is not None
            assert logged[0].exc_info[1] is error
    # The life was full: the hook would have been called.
    assert name.removeprefix("on_") in recorder.names


async def test_a_hook_that_raises_stops_no_other_hook(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Failing(Recorder):
        def on_job_start(self, event: JobChanged) -> None:
            super().on_job_start(event)
            raise ValueError

    failing, recorder = Failing(), Recorder()
    async with open_pool(1, obey, hooks=[failing, recorder]) as pool:
        for _ in range(3):
            await pool.process(1)
    assert len(recorder.named("job_start")) == 3
    assert len(failing.named("job_start")) == 1
    # Only the method that raised is removed, the others of the object go on.
    assert len(failing.named("job_complete")) == 3


async def test_a_hook_may_cancel_the_pool() -> None:
    class Stop(Hooks):
        def on_job_complete(self, event: JobChanged) -> None:
            pool.cancel()

    async with open_pool(1, obey, hooks=[Stop()]) as pool:
        assert await pool.process(1) == 1
        assert pool.closed
    assert pool.statistics().done == 1


async def test_a_hook_that_hears_of_a_resize_may_stop_the_pool(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Stop(Hooks):
        def on_resize(self, event: PoolResized) -> None:
            pool.cancel()

    async with open_pool(1, obey, hooks=[Stop()]) as pool:
        with trio.fail_after(1.5), pytest.raises(PoolClosed):
            await pool.resize(2)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Whoever runs the tests in the background may have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("hook", "job", "call"),
    [
        ("on_job_queue", 1, "process"),
        ("on_job_queue", 1, "submit"),
        ("on_job_queue", 1, "submit_nowait"),
        ("on_job_cancel", 1, "cancel"),
        ("on_worker_restart", SystemExit(), "submit_nowait"),
    ],
)
def test_ctrl_c_while_a_hook_runs_is_not_lost_and_drops_no_hook(
    ctrl_c: None, caplog: pytest.LogCaptureFixture, hook: str, job: Any, call: str
) -> None:
    told: list[str] = []

    def interrupt(event: Any) -> None:
        told.append(event.kind)
        signal.raise_signal(signal.SIGINT)

    hooks = Hooks()
    setattr(hooks, hook, interrupt)

    async def main() -> None:
        async with open_pool(1, obey, hooks=[hooks], unobserved="ignore") as pool:
            if call == "cancel":
                pool.pause()
                pool.submit_nowait(job)
                pool.cancel()
            elif call == "submit_nowait":
                pool.submit_nowait(job)
            else:
                await getattr(pool, call)(job)
            await trio.sleep(1.5)

    with pytest.raises(KeyboardInterrupt):
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert told == [hook.removeprefix("on_")]
    assert not [record for record in caplog.records if "hook" in record.msg]


async def test_a_hook_may_submit_a_job() -> None:
    replies: list[Any] = []

    class Again(Hooks):
        def on_job_complete(self, event: JobChanged) -> None:
            if len(replies) < 3:
                replies.append(pool.submit_nowait(len(replies)))

    async with open_pool(1, obey, hooks=[Again()]) as pool:
        assert await pool.process("first") == "first"
        # Before the pool closes, which would refuse what comes later.
        await pool.join()
    assert [await reply.wait() for reply in replies] == [0, 1, 2]


async def test_the_hooks_of_a_task_pool() -> None:
    recorder = Recorder()
    async with open_pool(1, hooks=[recorder]) as pool:
        assert await pool.process(functools.partial(obey, 1)) == 1
    assert recorder.names[2:5] == ["job_queue", "job_start", "job_complete"]


async def test_ctrl_c_lands_in_no_hook_but_in_everything_else_of_the_user(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.abc.Clock
) -> None:
    """A hook is called while the books are mended."""
    protected: dict[str, set[bool]] = {}

    def note(name: str) -> None:
        seen = protected.setdefault(name, set())
        seen.add(trio.lowlevel.currently_ki_protected())

    def hear(_: Hooks, event: Any) -> None:
        note(f"on_{event.kind}")

    names = {name for name in dir(Hooks) if name.startswith("on_")}
    listener = type("Listener", (Hooks,), dict.fromkeys(names, hear))

    class Handler:
        async def ready(self) -> None:
            note("ready")

        async def __call__(self, job: Any) -> Any:
            note("handler")
            return await obey(job)

    class Member:
        async def __aenter__(self) -> Handler:
            note("setup")
            return Handler()

        async def __aexit__(self, *exc_info: object) -> None:
            note("cleanup")

    def factory() -> Member:
        note("factory")
        return Member()

    @asynccontextmanager
    async def plugin() -> AsyncGenerator[None, None]:
        note("plugin's start")
        yield
        note("plugin's stop")

    async def pass_on(job: Any, call_next: Any) -> Any:
        note("middleware")
        return await call_next()

    options: Any = {"hooks": [listener()], "middleware": [pass_on], "max_backlog": 2}
    async with open_pool(
        1, worker=factory, overflow="drop_oldest", unobserved="ignore", **options
    ) as pool:
        # The first is handed over, the second dropped, and the next are taken.
        for job in (1, 2, Broken(), SystemExit()):
            pool.submit_nowait(job)
        await pool.join()
        await pool.process(trio.lowlevel.checkpoint)
        with pytest.raises(Broken):
            await pool.process(Broken(), retry=Retry(2))
        for timeout in (1, math.inf):
            with trio.move_on_after(2), pytest.raises(JobTimeout):
                await pool.process(trio.sleep_forever, timeout=timeout)
        await pool.resize(0)
    async with open_pool(1, obey, plugins=[plugin()], **options) as pool:
        await pool.map(range(3))
    theirs = {"factory", "setup", "ready", "middleware", "handler", "cleanup"}
    theirs |= {"plugin's start", "plugin's stop"}
    assert protected == {name: {True} for name in names} | {
        name: {False} for name in theirs
    }


async def test_items_are_numbered_as_workers_take_them() -> None:
    failed: list[object] = []

    class Log(Hooks):
        def on_job_error(self, event: JobChanged) -> None:
            failed.append(event.job_id)

    async def divide(number: int) -> float:
        return 1 / number

    async with open_pool(2, divide, hooks=[Log()]) as pool:
        await pool.settle([1, 0, 1, 0])
    assert sorted(failed, key=str) == [2, 4]
