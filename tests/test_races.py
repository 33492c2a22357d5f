"""Our own pool, cancelled at every step, and with every two events in one tick.

Each row is a small body that is run once for every schedule, in virtual time,
and asks the same facts each time. How many schedules that were is in the
property ``schedules`` of each test, and printed under ``-s``.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections import Counter
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_pool import (
    Autoscale,
    Backoff,
    CircuitBreaker,
    Drain,
    Hooks,
    JobError,
    JobState,
    PoolClosed,
    PoolError,
    Rate,
    Restart,
    Retry,
    WorkerState,
    open_pool,
)
from trio_pool.testing import call_everywhere, cancel_everywhere

STRESS = bool(os.environ.get("TRIO_POOL_STRESS"))
LATER = Retry(2, Backoff(1.0, jitter=0))


@pytest.fixture(autouse=True)
def _quiet():
    """Crashes are logged with their tracebacks, which takes longer than a schedule."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Failure(Exception):
    """What jobs fail with."""


class Crash(Exception):
    """What breaks a worker."""


class Ledger(Hooks):
    """Counts how often each job was accepted and ended."""

    def __init__(self):
        self.accepted = Counter()
        self.ended = Counter()

    def on_job_queue(self, event):
        self.accepted[event.job_id] += 1

    def on_job_complete(self, event):
        assert event.state.terminal
        self.ended[event.job_id] += 1

    on_job_error = on_job_cancel = on_job_drop = on_job_complete


class Nap:
    """A job that sleeps, and counts what became of it."""

    def __init__(self, seconds=0.5, fails=0, error=Failure):
        self.seconds = seconds
        self.fails = fails
        self.error = error
        self.started = self.finished = self.under_way = 0

    async def __call__(self):
        self.started += 1
        self.under_way += 1
        assert self.under_way == 1
        try:
            await trio.sleep(self.seconds)
        finally:
            self.under_way -= 1
        if self.started <= self.fails:
            raise self.error
        self.finished += 1
        return self


class Instant(Nap):
    """A job that does not wait at all."""

    async def __call__(self):
        self.started += 1
        self.finished += 1
        return self


class Stubborn(Nap):
    """A job that has a value although it is cancelled."""

    async def __call__(self):
        self.started += 1
        with trio.CancelScope(shield=True):
            await trio.sleep(self.seconds)
        self.finished += 1
        return self


class Meeting:
    """A job that ends when as many of it as there are workers run at once."""

    def __init__(self, size):
        self.missing = size
        self.complete = trio.Event()

    async def __call__(self):
        self.missing -= 1
        if not self.missing:
            self.complete.set()
        await self.complete.wait()


async def run(job):
    """Be the handler of every pool here: the input of a job is what it does."""
    return await job()


open_workers = []


@asynccontextmanager
async def slow_worker():
    await trio.sleep(0.25)
    open_workers.append(run)
    try:
        yield run
    finally:
        with trio.CancelScope(shield=True):
            await trio.sleep(0.25)
        open_workers.remove(run)


async def pass_on(job, call_next):
    return await call_next(job)


def ask_the_books(pool):
    """Every accepted job is somewhere."""
    count = pool.statistics()
    assert count.accepted == sum(getattr(count, state.value) for state in JobState)
    assert count.busy == count.running
    return count


async def ask_the_facts(pool, at_once=None):
    """Books balanced, nothing left, no slot lost: a job runs on every worker."""
    await pool.join()
    # Restarts and planned ends may still be under way.
    await trio.sleep(30)
    await wait_all_tasks_blocked()
    count = ask_the_books(pool)
    assert (count.delayed, count.queued, count.running) == (0, 0, 0)
    assert count.workers == count.size == pool.size
    assert {worker.state for worker in pool.workers()} <= {WorkerState.IDLE}
    # The first one closes a breaker that lets but one call through.
    with trio.fail_after(30):
        await pool.process(Instant())
    count = ask_the_books(pool)
    at_once = at_once or pool.size
    meeting = Meeting(at_once)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for _ in range(at_once):
                nursery.start_soon(pool.process, meeting)
    after = ask_the_books(pool)
    assert after.done - count.done == at_once


def ask_the_end(pool, ledger):
    """After the block: every job has ended once, and no worker is left."""
    count = ask_the_books(pool)
    assert (count.delayed, count.queued, count.running, count.workers) == (0, 0, 0, 0)
    assert pool.closed
    assert {worker.state for worker in pool.workers()} <= {WorkerState.STOPPED}
    if ledger is not None:
        assert sum(ledger.accepted.values()) == count.accepted
        assert ledger.accepted == ledger.ended
        assert set(ledger.ended.values()) <= {1}


def tell(record_property, tried, least):
    """Say how many schedules were tried; too few is a failure of the test."""
    record_property("schedules", tried)
    print(f"{tried} schedules")
    assert tried >= least


# ----------------------------------------------------------------------------
# States of a pool: its options, those of a job, and what goes on beside the call.


async def nothing(pool):
    await trio.lowlevel.checkpoint()


def naps(count, **options):
    async def prepare(pool):
        for _ in range(count):
            await pool.submit(Nap(1.0), **options)
        await wait_all_tasks_blocked()

    return prepare


async def pause(pool):
    pool.pause()
    await trio.lowlevel.checkpoint()


async def resume_later(pool):
    await trio.sleep(1)
    pool.resume()


async def fail_once(pool):
    with trio.CancelScope(), pytest.raises(Failure):
        await pool.process(Nap(0, fails=1))
    await trio.sleep(0.5)


async def crash_twice(pool):
    for _ in range(2):
        with pytest.raises(Crash):
            await pool.process(Nap(0, fails=1, error=Crash))


async def shut_down_later(pool):
    await trio.sleep(0.25)
    await pool.shutdown()


async def cancel_later(pool):
    await trio.sleep(0.25)
    pool.cancel()


async def hold_the_limit(pool, limiter):
    async with limiter:
        await trio.sleep(1)


class State:
    """Makes a pool that is in one state when the call begins."""

    def __init__(self, size=2, prepare=nothing, beside=nothing, job=None, **options):
        self.size = size
        self.prepare = prepare
        self.beside = beside
        self.job = job or {}
        self.options = options

    @asynccontextmanager
    async def open(self, watched):
        options = dict(self.options)
        beside = self.beside
        if "rate" in options:
            options["rate"] = Rate(2)
        if "breaker" in options:
            options["breaker"] = CircuitBreaker(failures=1, open_for=0.5)
        if "limiter" in options:
            options["limiter"] = trio.CapacityLimiter(1)
            beside = functools.partial(hold_the_limit, limiter=options["limiter"])
        handler = () if "worker" in options else (run,)
        ledger = Ledger() if watched else None
        if watched:
            options["hooks"] = [ledger]
        options.setdefault("crash_on", Crash)
        options["restart"] = Restart(5, backoff=Backoff(0.5, jitter=0))
        pool = None
        try:
            async with open_pool(
                self.size, *handler, unobserved="ignore", **options
            ) as pool:
                async with trio.open_nursery() as nursery:
                    await self.prepare(pool)
                    nursery.start_soon(beside, pool)
                    if "limiter" in options:
                        await wait_all_tasks_blocked()
                    yield pool
                    ask_the_books(pool)
                if not pool.closed:
                    await ask_the_facts(pool, 1 if "limiter" in options else None)
        finally:
            if pool is not None:
                ask_the_end(pool, ledger)
            assert not open_workers
            if "limiter" in options:
                assert options["limiter"].borrowed_tokens == 0


STATES = {
    "free": State(),
    "busy": State(prepare=naps(2)),
    "line": State(1, prepare=naps(3)),
    "full": State(1, prepare=naps(2), max_backlog=1),
    "no backlog": State(1, prepare=naps(1), max_backlog=0),
    "dropping": State(1, prepare=naps(2), max_backlog=1, overflow="drop_oldest"),
    "paused": State(prepare=pause, beside=resume_later),
    "keyed": State(prepare=naps(1, key="k"), job={"key": "k"}),
    "keyed line": State(1, prepare=naps(1), job={"key": "k"}),
    "urgent": State(1, prepare=naps(2), job={"priority": 1}),
    "timed": State(timeout=0.25),
    "retrying": State(1, retry=Retry(2, Backoff(0.5, jitter=0))),
    "rated": State(prepare=naps(1), rate=None),
    "limited": State(limiter=None),
    "probing": State(1, prepare=fail_once, breaker=None),
    "restarting": State(1, prepare=crash_twice),
    "slow": State(1, worker=slow_worker, max_jobs=1),
    "elastic": State(1, scale=Autoscale(min=1, max=3, interval=1.0)),
    "layered": State(1, middleware=[pass_on]),
    "closing": State(1, prepare=naps(1), beside=shut_down_later),
    "stopping": State(1, prepare=naps(1), beside=cancel_later),
}


# ----------------------------------------------------------------------------
# Calls: every method that waits.


def process(kind, *args, **options):
    """Promise 1: the value of the handler is that of the call, if it has one."""

    async def call(pool, how):
        job = kind(*args, **options)
        value = None
        try:
            value = await pool.process(job, **how)
        finally:
            assert (value is job) == (job.finished == 1)
            assert job.under_way == 0

    return call


async def nested(pool, how):
    inner, value = Nap(0.25), None

    async def job():
        return await pool.process(inner)

    try:
        value = await pool.process(job)
    finally:
        assert (value is inner) == (inner.finished == 1)
        assert inner.under_way == 0


async def submit(pool, how):
    job = Nap()
    reply = await pool.submit(job, **how)
    try:
        assert await reply.wait() is job
    finally:
        if reply.done:
            assert reply.attempts == job.started


async def submit_delayed(pool, how):
    reply = await pool.submit(Nap(), delay=0.5, ttl=2.0, **how)
    await reply.wait()


async def submit_named(pool, how):
    reply = await pool.submit(Nap(), id="x", **how)
    await reply.wait()


async def submit_batch(pool, how):
    jobs = [Nap() for _ in range(3)]
    replies = None
    try:
        replies = await pool.submit_batch(jobs)
    finally:
        if replies is None:
            await_end = trio.CancelScope(shield=True)
            with await_end:
                await wait_all_tasks_blocked()
            assert not any(job.under_way for job in jobs)
    for reply in replies:
        await reply.wait()


async def slowly(items):
    for item in items:
        await trio.sleep(0.25)
        yield item


async def map_items(pool, how):
    jobs = [Nap(), Instant(), Nap(0.25)]
    try:
        assert await pool.map(jobs) == jobs
    finally:
        assert not any(job.under_way for job in jobs)


async def map_failing(pool, how):
    jobs = [Nap(), Nap(0.25, fails=9), Nap()]
    try:
        await pool.map(jobs)
    finally:
        assert not any(job.under_way for job in jobs)


async def settle(pool, how):
    jobs = [Nap(), Nap(0.25, fails=9), Instant()]
    try:
        settled = await pool.settle(slowly(jobs))
        assert [each.item for each in settled] == jobs
    finally:
        assert not any(job.under_way for job in jobs)


def stream(ordered, leave):
    async def call(pool, how):
        jobs = [Nap(0.5), Nap(0.25), Instant(), Nap(0.25)]
        try:
            async with pool.stream(
                jobs, ordered=ordered, ahead=2, outcomes=True
            ) as results:
                async for settled in results:
                    assert settled.item in jobs
                    if leave:
                        break
        finally:
            assert not any(job.under_way for job in jobs)

    return call


async def lease(pool, how):
    async with pool.lease() as worker:
        for job in (Nap(0.25), Instant()):
            value = None
            try:
                value = await worker.process(job)
            finally:
                assert (value is job) == (job.finished == 1)


async def lease_crashing(pool, how):
    async with pool.lease() as worker:
        await worker.process(Nap(0.25, fails=1, error=Crash))


async def join(pool, how):
    await pool.submit(Nap())
    await pool.join()


async def resize_up(pool, how):
    size = pool.size
    try:
        await pool.resize(size + 1)
    finally:
        assert pool.size in {size, size + 1}


async def resize_down(pool, how):
    size = pool.size
    try:
        await pool.resize(max(1, size - 1))
    finally:
        assert pool.size <= size


async def shutdown(pool, how):
    await pool.shutdown(grace=0.5)


async def shutdown_and_process(pool, how):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(quietly, process(Nap), pool, how)
        nursery.start_soon(pool.shutdown)


async def events(pool, how):
    async with pool.events(buffer=3) as stream:
        await pool.submit(Nap())
        async for event in stream:
            if event.kind in {"job_complete", "job_error", "job_cancel"}:
                break


async def drain(pool, how):
    results = Drain()
    await pool.submit(Nap(), drain=results)
    # Nothing comes of a job that is cancelled with the pool.
    with trio.move_on_after(3):
        async for _ in results:
            break


async def two_calls(pool, how):
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(quietly, process(Nap), pool, how)


async def quietly(call, pool, how):
    """Do a call; what it may well raise is no failure here."""
    try:
        await call(pool, how)
    except (PoolError, Failure, Crash):
        pass
    except BaseExceptionGroup as error:
        rest = error.split((PoolError, Failure, Crash))[1]
        if rest is not None:
            raise rest from None


CALLS = {
    "process": process(Nap),
    "process an instant": process(Instant),
    "process what fails": process(Nap, fails=1),
    "process what crashes": process(Nap, fails=1, error=Crash),
    "process what will not be cancelled": process(Stubborn),
    "process in a job": nested,
    "two calls": two_calls,
    "submit": submit,
    "submit delayed": submit_delayed,
    "submit named": submit_named,
    "submit_batch": submit_batch,
    "map": map_items,
    "map failing": map_failing,
    "settle": settle,
    "stream": stream(True, False),
    "stream unordered": stream(False, False),
    "stream left early": stream(True, True),
    "lease": lease,
    "lease crashing": lease_crashing,
    "join": join,
    "resize up": resize_up,
    "resize down": resize_down,
    "shutdown": shutdown,
    "shutdown beside a call": shutdown_and_process,
    "events": events,
    "drain": drain,
}

each_state = pytest.mark.parametrize("state", STATES)


# ----------------------------------------------------------------------------
# Rows.


def cancel_a_call(state, call, watched, order):
    """Cancel a call in a pool in some state, at every step; count the schedules."""

    async def body(scope):
        async with STATES[state].open(watched) as pool:
            with scope:
                await quietly(CALLS[call], pool, STATES[state].job)

    return try_row(cancel_everywhere, body, f"{call}, {state}, {watched=}", order)


def cancel_two_calls(state, call, watched, order, limit):
    """Cancel two tasks that make the same call, at pairs of steps."""

    async def call_in(scope, pool):
        with scope:
            await quietly(CALLS[call], pool, STATES[state].job)

    async def body(one, other):
        async with STATES[state].open(watched) as pool:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call_in, one, pool)
                nursery.start_soon(call_in, other, pool)

    row = f"two of {call}, {state}, {watched=}"
    return try_row(cancel_everywhere, body, row, order, limit=limit, drawn=True)


def try_row(everywhere, body, row, order, **options):
    try:
        return everywhere(body, order=order, **options)
    except BaseException as error:
        error.add_note(f"row: {row}, {order=}")
        raise


@pytest.mark.parametrize("state", STATES)
def test_a_call_is_cancelled_at_every_step(state, record_property):
    tried = 0
    place = [*STATES].index(state)
    for number, call in enumerate(CALLS):
        if (state, call) in LEFT_OUT:
            continue
        if STRESS:
            for order, watched in itertools.product(range(2), (False, True)):
                tried += cancel_a_call(state, call, watched, order)
        elif (number + place) % 5 == 0:
            tried += cancel_a_call(state, call, place % 2 == 1, number)
    tell(record_property, tried, 500 if STRESS else 30)


@pytest.mark.parametrize("state", STATES)
def test_a_whole_block_is_cancelled_at_every_step(state, record_property):
    tried = 0

    def cancel_a_block(call, watched, order):
        async def body():
            async with STATES[state].open(watched) as pool:
                await quietly(CALLS[call], pool, STATES[state].job)

        row = f"block of {call}, {state}, {watched=}"
        return try_row(cancel_everywhere, body, row, order)

    for number, call in enumerate(["process", "stream", "lease"]):
        if STRESS:
            for order, watched in itertools.product(range(2), (False, True)):
                tried += cancel_a_block(call, watched, order)
        elif (number + [*STATES].index(state)) % 3 == 0:
            tried += cancel_a_block(call, number % 2 == 1, number)
    tell(record_property, tried, 200 if STRESS else 15)


# No job may wait there; and a job that waits for its own pool keeps the limit.
LEFT_OUT = {("no backlog", "submit delayed"), ("limited", "process in a job")}

TWICE = ["process", "submit", "map", "stream unordered", "lease", "shutdown"]


@pytest.mark.parametrize("call", TWICE)
def test_two_calls_are_cancelled_at_every_pair_of_steps(call, record_property):
    tried = 0
    for number, state in enumerate(STATES):
        if STRESS:
            tried += cancel_two_calls(state, call, number % 2 == 1, number, 200)
        elif (number + TWICE.index(call)) % 5 == 1 or state == "keyed line":
            tried += cancel_two_calls(state, call, number % 2 == 1, number, 30)
    tell(record_property, tried, 1000 if STRESS else 60)


# ----------------------------------------------------------------------------
# Events: a pool with two jobs that run and two that wait, and what can happen.


class Work:
    """A job that ends when it is told to, and as it is told to."""

    def __init__(self):
        self.gate = trio.Event()
        self.error = None
        self.started = self.finished = self.under_way = 0

    def end(self, error=None):
        if not self.gate.is_set():
            self.error = error
            self.gate.set()

    async def __call__(self):
        self.started += 1
        self.under_way += 1
        assert self.under_way == 1
        try:
            await self.gate.wait()
        finally:
            self.under_way -= 1
        if self.error is not None:
            raise self.error
        self.finished += 1
        return self


class Call:
    """A call of `process` in a task and a scope of its own."""

    def __init__(self, scene, **how):
        self.scope = trio.CancelScope()
        self.work = scene.new_work()
        self.value = self.error = None
        scene.calls.append(self)
        scene.nursery.start_soon(self.run, scene.pool, how)

    async def run(self, pool, how):
        with self.scope:
            try:
                self.value = await pool.process(self.work, **how)
            except Exception as error:
                self.error = error

    def ask(self):
        """The value is that of the handler; an error says whether it had started."""
        work = self.work
        assert (self.value is work) == (work.finished == 1)
        if self.value is None and self.error is None:
            assert self.scope.cancelled_caught
        ask_the_error(self.error, work)


class Submitting:
    """A call of `submit`, in a task and a scope of its own, that waits for room."""

    def __init__(self, scene):
        self.scope = trio.CancelScope()
        self.work = scene.new_work()
        self.reply = self.error = None
        self.waits = True
        scene.nursery.start_soon(self.run, scene.pool)

    async def run(self, pool):
        with self.scope:
            try:
                self.reply = await pool.submit(self.work)
            except PoolError as error:
                self.error = error
        self.waits = False

    def ask(self):
        """It has been accepted, or told why not, or cancelled before it was."""
        if self.reply is None:
            assert self.work.started == 0
            assert self.error is not None or self.scope.cancelled_caught
            ask_the_error(self.error, self.work)
        else:
            ask_the_reply(self.reply, self.work)


class Given:
    """A job that was submitted."""

    def __init__(self, scene, **how):
        self.work = scene.new_work()
        self.reply = None
        scene.given.append(self)
        with suppress(PoolError):
            self.reply = scene.pool.submit_nowait(self.work, **how)

    def cancel(self):
        if self.reply is not None:
            self.reply.cancel()

    def ask(self):
        """It has ended, once, and as its handler says."""
        if self.reply is None:
            assert self.work.started == 0
            return
        ask_the_reply(self.reply, self.work)


def ask_the_reply(reply, work):
    """The job has ended, once, and as its handler says."""
    assert reply.done
    assert reply.state.terminal
    assert reply.attempts == work.started
    assert (reply.state is JobState.DONE) == (work.finished == 1)
    if reply.state is JobState.DONE:
        assert reply.outcome.unwrap() is work
    else:
        ask_the_error(reply.outcome.error, work)


def ask_the_error(error, work):
    """What the pool says of a job is true."""
    assert work.under_way == 0
    if isinstance(error, PoolError):
        assert error.started == (work.started > 0)
        if isinstance(error, JobError):
            assert error.attempts == work.started
    elif error is not None:
        assert isinstance(error, (Failure, Crash))
        assert work.started
        assert not work.finished


class Scene:
    """A pool of two workers, and what can happen to it."""

    def __init__(self, pool, nursery):
        self.pool = pool
        self.nursery = nursery
        self.works, self.calls, self.given = [], [], []
        self.paused = False

    def new_work(self):
        work = Work()
        self.works.append(work)
        return work

    async def prepare(self, **how):
        """Let a call and a job run, and a call and a job wait."""
        self.running = Given(self, **how.get("running", {}))
        self.call = Call(self, **how.get("call", {}))
        await wait_all_tasks_blocked()
        self.waiting_call = Call(self, **how.get("waiting_call", {}))
        await wait_all_tasks_blocked()
        self.waiting = Given(self, **how.get("waiting", {}))
        self.entering = Submitting(self)
        await wait_all_tasks_blocked()

    def soon(self, call, *args, **options):
        """Do what waits in a task of its own."""
        self.nursery.start_soon(self.quietly, call, args, options)

    async def quietly(self, call, args, options):
        try:
            await call(*args, **options)
        except PoolError:
            pass

    def submit(self):
        Given(self).work.end()

    def pause(self):
        with suppress(PoolClosed):
            self.pool.pause()
            self.paused = True

    def resume(self):
        self.pool.resume()
        self.paused = False

    def fill(self):
        for _ in range(2):
            Given(self).work.end()

    def process(self):
        Call(self).work.end()

    async def lease(self):
        async with self.pool.lease() as worker:
            await worker.process(Instant())

    async def map(self):
        try:
            await self.pool.map([Nap(0.25), Instant(), Nap(0.25)])
        except* PoolError:
            pass

    def end(self):
        """Let everything end that has not."""
        self.pool.resume()
        for work in self.works:
            work.end()

    async def ask_who_waits(self, keyed):
        """Nobody waits in vain: for a worker while one is idle, or for room."""
        await wait_all_tasks_blocked()
        count = ask_the_books(self.pool)
        if self.pool.closed:
            assert not self.entering.waits
            return
        if self.entering.waits:
            assert count.queued + count.delayed == BACKLOG
        idle = [w for w in self.pool.workers() if w.state is WorkerState.IDLE]
        if not (self.paused or keyed):
            assert not idle or not count.queued

    def ask(self):
        for each in (*self.calls, *self.given, self.entering):
            each.ask()


EVENTS = {
    "answer": lambda scene: scene.running.work.end(),
    "answer the call": lambda scene: scene.call.work.end(),
    "fail": lambda scene: scene.running.work.end(Failure),
    "crash": lambda scene: scene.running.work.end(Crash),
    "crash the call": lambda scene: scene.call.work.end(Crash),
    "cancel": lambda scene: scene.running.reply.cancel(),
    "cancel the call": lambda scene: scene.call.scope.cancel(),
    "cancel the waiting": lambda scene: scene.waiting.reply.cancel(),
    "cancel the newest": lambda scene: scene.given[-1].cancel(),
    "cancel who waits for room": lambda scene: scene.entering.scope.cancel(),
    "cancel the waiting call": lambda scene: scene.waiting_call.scope.cancel(),
    "submit": Scene.submit,
    "fill": Scene.fill,
    "process": Scene.process,
    "resize up": lambda scene: scene.soon(scene.pool.resize, 3),
    "resize down": lambda scene: scene.soon(scene.pool.resize, 1),
    "pause": Scene.pause,
    "resume": Scene.resume,
    "lease": lambda scene: scene.soon(scene.lease),
    "map": lambda scene: scene.soon(scene.map),
    "join": lambda scene: scene.soon(scene.pool.join),
    "shutdown": lambda scene: scene.soon(scene.pool.shutdown),
    "shutdown at once": lambda scene: scene.soon(scene.pool.shutdown, 0),
    "stop": lambda scene: scene.pool.cancel(),
}
CLOSING = {"shutdown", "shutdown at once", "stop"}

# What jobs are given in with. A second later it may bring something by itself,
# in the same tick as an event.
TERMS = {
    "timeout": {"running": {"timeout": 1.0}, "call": {"timeout": 1.0}},
    "delay": {"waiting": {"delay": 1.0}},
    "ttl": {"waiting": {"ttl": 1.0}},
    "key": {"running": {"key": "k"}, "waiting": {"key": "k"}},
    "keys": {"waiting_call": {"key": "k"}, "waiting": {"key": "k"}},
    "retry": {"running": {"retry": LATER}, "call": {"retry": LATER}},
}


BACKLOG = 2


@asynccontextmanager
async def open_scene(watched, how, size=2, **options):
    """Set the scene, and ask the facts: when it is quiet, and when it is over."""
    ledger = Ledger() if watched else None
    async with open_pool(
        size,
        run,
        max_backlog=BACKLOG,
        hooks=[ledger] if watched else (),
        crash_on=Crash,
        restart=Restart(9, backoff=Backoff(0.5, jitter=0)),
        unobserved="ignore",
        **options,
    ) as pool:
        async with trio.open_nursery() as nursery:
            scene = Scene(pool, nursery)
            await scene.prepare(**how)
            yield scene
            await scene.ask_who_waits(any("key" in each for each in how.values()))
            scene.end()
        if not pool.closed:
            await ask_the_facts(pool)
    ask_the_end(pool, ledger)
    scene.ask()


async def pass_some_steps(at=0.0):
    """Be somebody else whose steps come in between."""
    for _ in range(3):
        await trio.lowlevel.checkpoint()
    await trio.sleep_until(at)
    for _ in range(3):
        await trio.lowlevel.checkpoint()


def meet(one, other, watched, order, limit, **options):
    """Let two events happen at pairs of steps; count the schedules."""

    async def body(first, second):
        async with open_scene(watched, {}, **options) as scene:
            with (
                first.calls(EVENTS[one], scene),
                second.calls(EVENTS[other], scene),
            ):
                await pass_some_steps()
            happened = (first.happened and one, second.happened and other)
        ended = scene.pool.statistics()
        assert ended.accepted >= 4
        assert scene.pool.closed or not CLOSING & set(happened)

    row = f"{one} / {other}, {watched=}, {options}"
    return try_row(call_everywhere, body, row, order, limit=limit, drawn=True)


def meet_in_time(terms, event, watched, order):
    """Let an event happen about when time passes; count the schedules."""

    async def body(moment):
        async with open_scene(watched, TERMS[terms]) as scene:
            with moment.calls(EVENTS[event], scene):
                await pass_some_steps(at=1.0)

    row = f"{terms} / {event}, {watched=}"
    return try_row(call_everywhere, body, row, order)


NAMED = [
    ("answer", "cancel"),
    ("answer the call", "cancel the call"),
    ("crash", "cancel"),
    ("crash the call", "cancel the call"),
    ("resize down", "crash"),
    ("resize up", "crash"),
    ("shutdown", "submit"),
    ("shutdown at once", "process"),
    ("pause", "stop"),
    ("pause", "shutdown"),
    ("lease", "resize down"),
]


@pytest.mark.parametrize(("one", "other"), NAMED)
def test_two_events_meet_at_every_pair_of_steps(one, other, record_property):
    tried = 0
    for order in range(4 if STRESS else 1):
        watched = (order + NAMED.index((one, other))) % 2 == 1
        tried += meet(one, other, watched, order, 5000 if STRESS else 60)
    tell(record_property, tried, 250 if STRESS else 50)


@pytest.mark.parametrize("one", EVENTS)
def test_every_two_events_meet(one, record_property):
    tried = 0
    events = [*EVENTS]
    for number, other in enumerate(events[events.index(one) + 1 :]):
        tried += meet(one, other, number % 2 == 1, number, 150 if STRESS else 4)
    tell(record_property, tried, 3 * (len(events) - events.index(one) - 1))


HANDED = ["cancel the newest", "stop", "resize down", "shutdown at once", "pause"]


@pytest.mark.parametrize("event", HANDED)
def test_an_event_meets_a_job_that_an_idle_worker_is_handed(event, record_property):
    tried = 0
    for order in range(4 if STRESS else 1):
        limit = 5000 if STRESS else 60
        watched = (order + HANDED.index(event)) % 2 == 1
        tried += meet("submit", event, watched, order, limit, size=6)
    tell(record_property, tried, 250 if STRESS else 50)


@pytest.mark.parametrize("event", ["cancel the waiting", "cancel the waiting call"])
def test_a_job_is_dropped_and_cancelled_at_every_pair_of_steps(event, record_property):
    tried = 0
    for order in range(4 if STRESS else 1):
        limit = 5000 if STRESS else 60
        options = {"overflow": "drop_oldest"}
        tried += meet("fill", event, order % 2 == 1, order, limit, **options)
    tell(record_property, tried, 250 if STRESS else 50)


@pytest.mark.parametrize("terms", TERMS)
def test_an_event_meets_what_time_brings(terms, record_property):
    tried = 0
    for number, event in enumerate(EVENTS):
        if STRESS:
            for order, watched in itertools.product(range(2), (False, True)):
                tried += meet_in_time(terms, event, watched, order)
        elif (number + [*TERMS].index(terms)) % 2 == 0:
            tried += meet_in_time(terms, event, number % 4 > 1, number)
    tell(record_property, tried, 700 if STRESS else 50)
