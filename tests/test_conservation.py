"""No worker is idle while a job waits that it may run, as a property of programs."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_pool import (
    BacklogFull,
    Rate,
    Restart,
    Retry,
    WorkerState,
    open_pool,
)

# Seconds of virtual time after which a program is taken to hang.
FOR_EVER = 10_000.0

# Seconds before a job that failed is tried again.
PAUSE = 0.5


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """Keep no record of logged crashes: thousands of tracebacks would pile up."""
    logger = logging.getLogger("trio_pool")
    logger.disabled = True
    yield
    logger.disabled = False


class Failure(Exception):
    """What a generated job raises."""


# What hypothesis draws. A plan is the options of a pool and a list of steps;
# a step is a tuple, its name first.

moments = st.sampled_from([0.25, 0.5, 1.0, 1.5])
# What a job does, for how long, and how often it may be tried.
works = st.tuples(
    st.sampled_from(["value", "value", "value", "flaky", "fail", "crash"]),
    st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]),
    st.sampled_from([1, 1, 2, 3]),
)
priorities = st.sampled_from([0, 0, 0, 1, -1, 2])
keys = st.sampled_from([None, None, "a", "b", "c"])
delays = st.sampled_from([0.0, 0.0, 0.0, 0.25, 1.0])
orders = st.integers(0, 20)

jobs = st.one_of(
    st.tuples(
        st.just("submit"),
        works,
        priorities,
        keys,
        delays,
        st.sampled_from([math.inf, math.inf, 0.75]),
    ),
    st.tuples(st.just("process"), works, priorities, keys, st.none() | moments),
)
crowds = st.tuples(
    st.sampled_from(["map", "settle"]),
    st.lists(works, max_size=6),
    priorities,
    st.none() | moments,
)
leases = st.tuples(st.just("lease"), st.lists(works, max_size=3), moments, priorities)
control = st.one_of(
    st.tuples(st.just("cancel reply"), orders),
    st.tuples(st.just("cancel caller"), orders),
    st.tuples(st.just("resize"), st.integers(0, 4)),
    st.tuples(st.just("pause")),
    st.tuples(st.just("resume")),
    st.tuples(st.just("resume")),
    st.tuples(st.just("borrow"), moments),
    st.tuples(st.just("tokens"), st.integers(1, 4)),
)
passing = st.tuples(st.just("sleep"), moments)
steps = st.sampled_from(
    [jobs] * 8 + [crowds] * 2 + [leases] * 2 + [control] * 5 + [passing] * 4
).flatmap(lambda kind: kind)
# Some steps are followed by no calm, so that the next comes in the same tick.
programs = st.lists(
    st.tuples(steps, st.sampled_from([True, True, False])), min_size=1, max_size=25
)
options = st.fixed_dictionaries(
    {
        "max_backlog": st.sampled_from([math.inf, math.inf, 2]),
        "aging": st.sampled_from([math.inf, math.inf, 0.5]),
        "max_jobs": st.sampled_from([math.inf, math.inf, 2]),
        "choose": st.sampled_from([None, None, random.choice]),
        "rate": st.sampled_from([None, None, (2, 1), (4, 3), (1, 2)]),
        "limiter": st.sampled_from([None, None, 1, 2]),
    }
)


@attrs.define(eq=False)
class Errand:
    """A job of ours: what it does, and what has become of it as far as we know."""

    kind: str
    seconds: float
    tries: int
    key: str | None = None
    due: float = -math.inf
    """From when it may run."""
    starts: int = 0
    running: bool = False
    over: bool = False
    crowd: Crowd | None = None
    reply: Any = None

    @property
    def ended(self) -> bool:
        """Whether it will not run again."""
        return (
            self.over
            or (self.reply is not None and self.reply.done)
            or (self.crowd is not None and self.crowd.over)
        )


@attrs.define(eq=False)
class Crowd:
    """The jobs of one batch."""

    stops: bool
    """A failure calls off the rest."""
    over: bool = False


@attrs.define(eq=False)
class Loan:
    """A lease of ours, from when it is asked for."""

    worker: Any = None
    errand: Errand | None = None
    """The job that its worker was given."""
    over: bool = False


class World:
    """What a program has done so far, and what the pool should make of it."""

    def __init__(self, options, nursery):
        self.nursery = nursery
        self.options = dict(options)
        self.limiter = self.bucket = None
        if options["limiter"] is not None:
            self.limiter = trio.CapacityLimiter(options["limiter"])
        self.options["limiter"] = self.limiter
        if options["rate"] is not None:
            per_second, burst = options["rate"]
            self.options["rate"] = Rate(per_second, burst=burst)
            self.bucket = Bucket(per_second, burst)
        if options["max_backlog"] != math.inf:
            # Jobs that wait for their next attempt may fill the backlog beyond
            # its bound, and then nothing new may start.
            self.options["overflow"] = "reject"
        self.may_retry = options["max_backlog"] == math.inf
        self.paused = False
        self.errands = []
        self.loans = []
        self.scopes = []
        self.checks = Counter()
        self.problems = []

    def errand(self, work, **facts):
        kind, seconds, tries = work
        if not self.may_retry:
            tries = 1
        errand = Errand(kind, seconds, tries, **facts)
        self.errands.append(errand)
        return errand

    def retry(self, errand):
        return Retry(errand.tries, backoff=lambda number: PAUSE)

    async def handler(self, errand):
        errand.starts += 1
        errand.running = True
        if self.bucket is not None:
            self.bucket.take(trio.current_time())
        if errand.ended:
            self.problems.append(f"started after its end: {errand}")
        try:
            if errand.seconds:
                await trio.sleep(errand.seconds)
            if errand.kind == "crash":
                raise SystemExit
            if errand.kind == "fail" or (errand.kind == "flaky" and errand.starts == 1):
                raise Failure
        except Failure:
            if errand.starts < errand.tries:
                errand.due = trio.current_time() + PAUSE
            else:
                self.end(errand, failed=True)
            raise
        except BaseException:
            self.end(errand, failed=True)
            raise
        else:
            self.end(errand, failed=False)
        finally:
            errand.running = False

    def end(self, errand, failed):
        errand.over = True
        if failed and errand.crowd is not None and errand.crowd.stops:
            errand.crowd.over = True

    # The promise.

    def check(self, where):
        """Look for a worker that is idle beside a job that it may run."""
        if self.paused or self.pool.closed:
            return
        states = Counter(worker.state for worker in self.pool.workers())
        kept = sum(
            loan.worker is not None and not (loan.errand and loan.errand.running)
            for loan in self.loans
            if not loan.over
        )
        idle = states[WorkerState.IDLE] - kept
        may_start = self.may_start()
        waiting = [errand for errand in self.errands if self.is_runnable(errand)]
        waiting += [
            loan for loan in self.loans if loan.worker is None and not loan.over
        ]
        self.checks[bool(idle), bool(waiting), may_start] += 1
        if idle and waiting and may_start:
            self.problems.append(f"{where}: {idle} idle beside {waiting}")
        for loan in self.loans:
            errand = loan.errand
            if may_start and errand and not errand.ended and not errand.running:
                self.problems.append(f"{where}: a leased worker waits: {errand}")

    def may_start(self):
        """Say whether the guards of the pool would let a job start."""
        if self.limiter is not None and self.limiter.available_tokens <= 0:
            return False
        return self.bucket is None or self.bucket.has_one(trio.current_time())

    def is_runnable(self, errand):
        if errand.ended or errand.running or errand.due > trio.current_time():
            return False
        if any(loan.errand is errand for loan in self.loans):
            return False
        if errand.key is None:
            return True
        line = [other for other in self.errands if other.key == errand.key]
        return all(other.ended for other in line[: line.index(errand)])

    # Deeds: what waits for the pool, each in a task of its own.

    def do(self, limit, act, *args):
        scope = trio.CancelScope()
        if limit is not None:
            scope.deadline = trio.current_time() + limit
        self.scopes.append(scope)
        self.nursery.start_soon(self.see_through, scope, act, args)

    async def see_through(self, scope, act, args):
        with scope:
            try:
                await act(*args)
            except (Exception, ExceptionGroup):
                # Of no interest here: how jobs end is told by other tests.
                pass

    async def process(self, work, priority, key):
        errand = self.errand(work, key=key)
        try:
            await self.pool.process(
                errand, priority=priority, key=key, retry=self.retry(errand)
            )
        finally:
            self.leave(errand)

    def leave(self, errand):
        errand.over = True
        if not errand.starts and self.bucket is not None:
            # It may have had a token already, and not started all the same.
            self.bucket.take(trio.current_time())

    async def batch(self, method, works, priority):
        crowd = Crowd(stops=method == "map")
        tries = max((work[2] for work in works), default=1)
        items = [
            self.errand((kind, seconds, tries), crowd=crowd)
            for kind, seconds, _ in works
        ]
        retry = Retry(tries if self.may_retry else 1, backoff=lambda number: PAUSE)
        try:
            await getattr(self.pool, method)(items, priority=priority, retry=retry)
        finally:
            crowd.over = True
            for errand in items:
                if not errand.starts:
                    self.leave(errand)

    async def lease(self, works, seconds, priority):
        loan = Loan()
        self.loans.append(loan)
        try:
            async with self.pool.lease(priority=priority) as loan.worker:
                for kind, spent, _ in works:
                    errand = loan.errand = self.errand((kind, spent, 1))
                    try:
                        await loan.worker.process(errand)
                    finally:
                        self.leave(errand)
                        loan.errand = None
                    if kind == "crash":
                        break
                await trio.sleep(seconds)
        finally:
            loan.over = True

    async def borrow(self, seconds):
        async with self.limiter:
            await trio.sleep(seconds)

    # Steps of the program.

    async def take_step(self, step):
        name, *args = step
        match name:
            case "submit":
                self.submit(*args)
            case "process":
                work, priority, key, limit = args
                self.do(limit, self.process, work, priority, key)
            case "map" | "settle":
                works, priority, limit = args
                self.do(limit, self.batch, name, works, priority)
            case "lease":
                self.do(None, self.lease, *args)
            case "cancel reply":
                self.cancel_reply(*args)
            case "cancel caller":
                if self.scopes:
                    self.scopes[args[0] % len(self.scopes)].cancel()
            case "resize":
                self.do(None, self.pool.resize, *args)
            case "pause":
                self.pool.pause()
                self.paused = True
            case "resume":
                self.pool.resume()
                self.paused = False
            case "borrow":
                if self.limiter is not None:
                    self.do(None, self.borrow, *args)
            case "tokens":
                if self.limiter is not None:
                    self.limiter.total_tokens = args[0]
            case "sleep":
                await trio.sleep(args[0])

    def submit(self, work, priority, key, delay, ttl):
        errand = self.errand(work, key=key, due=trio.current_time() + delay)
        try:
            errand.reply = self.pool.submit_nowait(
                errand,
                priority=priority,
                key=key,
                delay=delay,
                ttl=ttl,
                retry=self.retry(errand),
            )
        except BacklogFull:
            errand.over = True

    def cancel_reply(self, which):
        given = [errand for errand in self.errands if errand.reply is not None]
        if not given:
            return
        errand = given[which % len(given)]
        errand.reply.cancel()
        if errand.running:
            # It will not be tried again, whatever it does now.
            errand.tries = 0
        else:
            self.leave(errand)


class Bucket:
    """How many starts a rate has to give, at least."""

    def __init__(self, per_second, burst):
        self.per_second = per_second
        self.burst = self.level = burst
        self.since = 0.0

    def has_one(self, now):
        self.fill(now)
        return self.level >= 1

    def take(self, now):
        self.fill(now)
        self.level = max(0.0, self.level - 1)

    def fill(self, now):
        earned = (now - self.since) * self.per_second
        self.level = min(self.burst, self.level + earned)
        self.since = now


async def play(size, drawn, program):
    """Run a program; return what was wrong, and how often it was looked at."""
    with trio.fail_after(FOR_EVER):
        async with trio.open_nursery() as nursery:
            world = World(drawn, nursery)
            async with open_pool(
                size,
                world.handler,
                unobserved="ignore",
                restart=Restart(math.inf, 60.0, lambda number: 0.25),
                **world.options,
            ) as world.pool:
                for step, calm in program:
                    await world.take_step(step)
                    if calm:
                        await wait_all_tasks_blocked()
                        world.check(f"after {step}")
                # What is left goes on, and must not wait for nothing either.
                while world.pool.statistics().running and not world.problems:
                    await trio.sleep(0.25)
                    await wait_all_tasks_blocked()
                    world.check(f"at {trio.current_time()}")
    return world


@given(st.integers(0, 4), options, programs)
def test_no_worker_is_idle_while_a_job_waits_that_it_may_run(size, drawn, program):
    """Whatever the order, the guards and the disturbances."""

    async def main():
        return await play(size, drawn, program)

    world = trio.run(main, clock=MockClock(autojump_threshold=0))
    assert world.problems == []
    if world.limiter is not None:
        assert world.limiter.borrowed_tokens == 0
