"""Many thousands of jobs in a pool that has every feature on at once."""

from __future__ import annotations

import logging
import math
import os
import random
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import MockClock

from trio_pool import (
    Autoscale,
    BacklogFull,
    Backoff,
    CircuitBreaker,
    CircuitOpen,
    CurrentJob,
    Drain,
    EventsLost,
    Hooks,
    JobCancelled,
    JobChanged,
    JobExpired,
    JobState,
    JobTimeout,
    Pool,
    PoolChanged,
    PoolResized,
    Rate,
    Reply,
    Restart,
    Retry,
    WorkerChanged,
    WorkerCrashed,
    current_job,
    open_pool,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

# All moments are multiples of this many seconds, so that the clock need not
# jump for each job alone.
TICK = 1 / 1024

# Rare meetings want many.
JOBS = 100_000 if os.environ.get("TRIO_POOL_STRESS") else 20_000
PRODUCERS = 40
MOST_WORKERS = 16
MOST_WAITING = 120

# The books are looked at after each so many steps of any task.
STEPS_UNSEEN = 211


# What jobs do, and how often.
KINDS = {
    "value": 900,
    "fail": 6,
    "flaky": 40,
    "break": 3,
    "crash": 1,
    "flaky crash": 3,
    "cancel itself": 10,
    "slow": 5,
}


class Failure(Exception):
    """What some jobs raise, at each attempt or only at the first."""


class Broken(Exception):
    """What some jobs raise that have spoilt their worker."""


class Fatal(BaseException):
    """What no handler should raise."""


@attrs.define(eq=False, slots=True)
class Errand:
    """What one job is to do, and what is known of it."""

    number: int
    kind: str
    seconds: float
    drained: bool = False
    attempts: int = 0
    completed: int = 0
    fate: str | None = None


class Counting(Hooks):
    """A plugin: counts whatever it is told, and goes round each attempt."""

    name = "counting"

    def __init__(self) -> None:
        self.hooks = [self]
        self.middleware = [self.go_round]
        self.told: Counter[str] = Counter()
        self.ended: Counter[JobState] = Counter()
        self.live: dict[int | str, int] = {}
        self.up: set[int] = set()
        self.attempts = 0
        self.entered = 0
        self.problems: list[str] = []

    async def __aenter__(self) -> Counting:
        self.entered += 1
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.entered -= 1

    async def go_round(self, job: CurrentJob, call_next: Any) -> Any:
        self.attempts += 1
        job.input.attempts += 1
        if job.input.attempts != job.attempt:
            self.problems.append(f"not attempt {job.attempt}: {job.input}")
        return await call_next(job)

    def on_pool_start(self, event: PoolChanged) -> None:
        self.told[event.kind] += 1

    def on_pool_stop(self, event: PoolChanged) -> None:
        self.told[event.kind] += 1

    def on_resize(self, event: PoolResized) -> None:
        self.told[event.kind] += 1

    def on_worker_start(self, event: WorkerChanged) -> None:
        self.told[event.kind] += 1
        if event.worker in self.up:
            self.problems.append(f"two workers in one slot: {event}")
        self.up.add(event.worker)

    def on_worker_stop(self, event: WorkerChanged) -> None:
        self.told[event.kind] += 1
        self.up.discard(event.worker)

    def on_worker_crash(self, event: WorkerChanged) -> None:
        self.told[event.kind] += 1
        self.up.discard(event.worker)

    def on_worker_restart(self, event: WorkerChanged) -> None:
        self.told[event.kind] += 1

    def on_job_queue(self, event: JobChanged) -> None:
        self.told[event.kind] += 1
        if event.job_id in self.live:
            self.problems.append(f"queued twice: {event}")
        self.live[event.job_id] = 0

    def on_job_start(self, event: JobChanged) -> None:
        self.told[event.kind] += 1
        if self.live.get(event.job_id) != event.attempts - 1:
            self.problems.append(f"started out of turn: {event}")
        self.live[event.job_id] = event.attempts

    def on_job_retry(self, event: JobChanged) -> None:
        self.told[event.kind] += 1
        if self.live.get(event.job_id) != event.attempts:
            self.problems.append(f"put off out of turn: {event}")

    def on_job_complete(self, event: JobChanged) -> None:
        self.end(event)

    def on_job_error(self, event: JobChanged) -> None:
        self.end(event)

    def on_job_cancel(self, event: JobChanged) -> None:
        self.end(event)

    def on_job_drop(self, event: JobChanged) -> None:
        self.end(event)

    def end(self, event: JobChanged) -> None:
        self.told[event.kind] += 1
        self.ended[event.state] += 1
        if self.live.pop(event.job_id, None) != event.attempts:
            self.problems.append(f"ended out of turn: {event}")


class Stress(trio.abc.Instrument):
    """The producers, the handler, and their own books."""

    def __init__(self, jobs: int, seed: int) -> None:
        self.chance = random.Random(seed)
        self.errands: list[Errand] = []
        self.left = jobs
        self.pool: Pool[Errand, int]
        self.counting = Counting()
        self.drain: Drain[int] = Drain()
        self.drained: Counter[int] = Counter()
        self.limiter = trio.CapacityLimiter(12)
        self.breaker = CircuitBreaker(80, window=1.0, open_for=0.25, probes=2)
        self.heard = 0
        """Events that came before the stream, in it, and that it lost."""
        self.running = 0
        self.most_running = 0
        self.members = 0
        self.of_key: Counter[str] = Counter()
        self.steps = 0
        self.looks = 0
        self.problems: list[str] = []

    def open(self) -> Any:
        return open_pool(
            2,
            worker=self.open_member,
            max_backlog=MOST_WAITING,
            timeout=0.5,
            retry=Retry(3, Backoff(4 * TICK, jitter=0), on=(Failure, WorkerCrashed)),
            restart=Restart(math.inf, 60.0, Backoff(0.0)),
            crash_on=Broken,
            plugins=[self.counting],
            middleware=[self.go_round],
            rate=Rate(3_000, burst=64),
            breaker=self.breaker,
            scale=Autoscale(2, MOST_WORKERS, 32 * TICK, 2, 0.0, 96 * TICK),
            limiter=self.limiter,
            choose=lambda workers: workers[0],
            aging=0.25,
            max_jobs=300,
            max_age=2.0,
            max_idle=0.25,
            unobserved="ignore",
        )

    @asynccontextmanager
    async def open_member(self) -> AsyncGenerator[Any, None]:
        await trio.lowlevel.checkpoint()
        self.members += 1
        try:
            yield self.handle
        finally:
            self.members -= 1

    # What is looked at.

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps += 1
        if self.steps % STEPS_UNSEEN == 0 and hasattr(self, "pool"):
            self.look()

    def look(self) -> None:
        self.looks += 1
        count = self.pool.statistics()
        ended = count.done + count.failed + count.timed_out + count.cancelled
        ended += count.expired + count.dropped + count.lost
        live = count.delayed + count.queued + count.running
        if count.accepted != live + ended or live != len(self.counting.live):
            self.problems.append(f"the books do not balance: {count}")
        if not self.running <= count.running == count.busy <= MOST_WORKERS:
            self.problems.append(f"{self.running} handlers run: {count}")
        if count.delayed + count.queued > MOST_WAITING + MOST_WORKERS:
            self.problems.append(f"too many wait: {count}")
        if self.limiter.borrowed_tokens < self.running:
            self.problems.append(f"{self.running} handlers run by {self.limiter}")

    # What runs in the workers.

    async def go_round(self, job: CurrentJob, call_next: Any) -> Any:
        key = job.key
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        if key is not None:
            self.of_key[key] += 1
            if self.of_key[key] > 1:
                self.problems.append(f"two of key {key} run: {job}")
        try:
            return await call_next()
        finally:
            self.running -= 1
            if key is not None:
                self.of_key[key] -= 1

    async def handle(self, errand: Errand) -> int:
        kind = errand.kind
        if errand.fate is not None:
            self.problems.append(f"runs after its end: {errand}")
        if kind == "cancel itself":
            current_job().cancel()
        if errand.seconds:
            await trio.sleep(errand.seconds)
        if kind == "fail" or (kind == "flaky" and errand.attempts == 1):
            raise Failure(errand.number)
        if kind == "break":
            raise Broken(errand.number)
        if kind == "crash" or (kind == "flaky crash" and errand.attempts == 1):
            raise Fatal(errand.number)
        errand.completed += 1
        return errand.number

    # What gives in the jobs.

    def ticks(self, most: int) -> float:
        return self.chance.randrange(most) * TICK

    def make(self) -> Errand:
        chance = self.chance
        (kind,) = chance.choices(tuple(KINDS), tuple(KINDS.values()))
        seconds = 1.0 if kind == "slow" else self.ticks(8)
        errand = Errand(len(self.errands), kind, seconds)
        self.errands.append(errand)
        self.left -= 1
        return errand

    def record(self, errand: Errand, value: Any, error: BaseException | None) -> None:
        """Write down the fate of a job: once, and a true one."""
        if errand.fate is not None:
            self.problems.append(f"a second fate {value!r} {error!r}: {errand}")
        match error:
            case None:
                errand.fate = "done"
                true = value == errand.number and errand.completed == 1
            case Failure() | Broken():
                errand.fate = "failed"
                true = error.args == (errand.number,)
            case CircuitOpen():
                errand.fate = "refused"
                true = error.started == bool(errand.attempts)
            case JobTimeout():
                errand.fate = "timed_out"
                true = error.attempts == errand.attempts > 0
            case JobExpired():
                errand.fate = "expired"
                true = not errand.attempts
            case WorkerCrashed() if not error.started:
                # Its lease had lost the worker before.
                errand.fate = "refused"
                true = not errand.attempts
            case WorkerCrashed():
                errand.fate = "lost"
                true = error.attempts == errand.attempts
            case JobCancelled():
                errand.fate = "cancelled"
                true = error.attempts == errand.attempts
            case trio.Cancelled():
                errand.fate = "cancelled"
                true = True
            case _:
                true = False
        if not true:
            self.problems.append(f"a false end {value!r} {error!r}: {errand}")

    async def produce(self, nursery: trio.Nursery) -> None:
        acts = [self.submit, self.process, self.settle, self.lease]
        while self.left > 0:
            (act,) = self.chance.choices(acts, [80, 30, 2, 1])
            await act(nursery)
            if self.chance.random() < 0.002:
                # Time for the pool to shrink, and to replace who is idle.
                await trio.sleep(0.5)

    async def submit(self, nursery: trio.Nursery) -> None:
        errand, chance = self.make(), self.chance
        options: dict[str, Any] = {"priority": chance.randrange(-1, 3)}
        if chance.random() < 0.2:
            options["key"] = f"key {chance.randrange(20)}"
        if chance.random() < 0.1:
            options["delay"] = self.ticks(64)
        if chance.random() < 0.1:
            options["ttl"] = self.ticks(64) + TICK
        if chance.random() < 0.2:
            options["id"] = f"errand {errand.number}"
        if chance.random() < 0.1:
            options["timeout"] = self.ticks(16) + TICK
        if chance.random() < 0.3:
            options["drain"] = self.drain
            errand.drained = True
        nowait = chance.random() < 0.1
        while True:
            try:
                if nowait:
                    reply = self.pool.submit_nowait(errand, **options)
                else:
                    reply = await self.pool.submit(errand, **options)
                break
            except BacklogFull:
                nowait = False
            except CircuitOpen as error:
                await trio.sleep(error.reopens_in)
            except JobExpired as error:
                # It has waited for room until its ttl was over.
                self.record(errand, None, error)
                return
        if chance.random() < 0.05:
            await trio.sleep(self.ticks(32))
            reply.cancel()
        nursery.start_soon(self.read, errand, reply)

    async def read(self, errand: Errand, reply: Reply[int]) -> None:
        value = error = None
        try:
            value = await reply.wait()
        except Exception as caught:
            error = caught
        self.record(errand, value, error)

    async def process(self, nursery: trio.Nursery) -> None:
        errand, chance = self.make(), self.chance
        options: dict[str, Any] = {}
        if chance.random() < 0.2:
            options["key"] = f"key {chance.randrange(20)}"
        limit = self.ticks(64) if chance.random() < 0.05 else math.inf
        with trio.move_on_after(limit):
            try:
                value = await self.pool.process(errand, **options)
            except BaseException as error:
                self.record(errand, None, error)
                if not isinstance(error, Exception):
                    raise
            else:
                self.record(errand, value, None)

    async def settle(self, nursery: trio.Nursery) -> None:
        errands = [self.make() for _ in range(self.chance.randrange(1, 20))]
        for settled in await self.pool.settle(errands):
            outcome = settled.outcome
            value = getattr(outcome, "value", None)
            self.record(settled.item, value, getattr(outcome, "error", None))

    async def lease(self, nursery: trio.Nursery) -> None:
        async with self.pool.lease(priority=1) as worker:
            for _ in range(self.chance.randrange(5)):
                errand = self.make()
                try:
                    value = await worker.process(errand)
                except Exception as error:
                    self.record(errand, None, error)
                else:
                    self.record(errand, value, None)

    # What goes on beside.

    async def listen(self) -> None:
        self.heard = self.counting.told.total()
        async with self.pool.events(buffer=64) as stream:
            async for event in stream:
                self.heard += event.count if isinstance(event, EventsLost) else 1
                if self.chance.random() < 0.01:
                    await trio.sleep(self.ticks(32))

    async def collect(self) -> None:
        async for number in self.drain:
            self.drained[number] += 1

    async def disturb(self) -> None:
        """Borrow tokens, pause, and ask for other sizes, as others might."""
        while True:
            await trio.sleep(0.25 + self.ticks(512))
            match self.chance.randrange(3):
                case 0:
                    async with self.limiter:
                        await trio.sleep(self.ticks(64))
                case 1:
                    self.pool.pause()
                    await trio.sleep(self.ticks(32))
                    self.pool.resume()
                case 2:
                    with trio.move_on_after(0.25):
                        await self.pool.resize(self.chance.randrange(2, MOST_WORKERS))

    async def run(self) -> None:
        trio.lowlevel.add_instrument(self)
        async with trio.open_nursery() as outer:
            outer.start_soon(self.collect)
            async with self.open() as self.pool:
                outer.start_soon(self.listen)
                async with trio.open_nursery() as beside:
                    beside.start_soon(self.disturb)
                    async with trio.open_nursery() as nursery:
                        for _ in range(PRODUCERS):
                            nursery.start_soon(self.produce, nursery)
                    beside.cancel_scope.cancel()
            self.drain.close()
        trio.lowlevel.remove_instrument(self)
        self.look()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep no record of logged crashes: thousands of tracebacks would pile up."""
    logger = logging.getLogger("trio_pool")
    logger.disabled = True
    yield
    logger.disabled = False


def test_with_every_feature_on_no_job_is_lost_or_done_twice() -> None:
    """Each job has one fate, and all the books agree about it.

    It takes about 30 s: only many jobs make what is rare meet.
    """
    stress = Stress(JOBS, seed=2024)
    trio.run(stress.run, clock=MockClock(autojump_threshold=0))
    count, counting = stress.pool.statistics(), stress.counting
    fates = Counter(errand.fate for errand in stress.errands)

    assert stress.problems == counting.problems == []
    # Nothing is lost.
    assert len(stress.errands) >= JOBS
    assert fates[None] == 0
    assert count.delayed == count.queued == count.running == count.workers == 0
    assert stress.members == counting.entered == len(counting.up) == 0
    assert counting.live == {}
    # Nothing is done twice, or done and not said to be.
    done = [errand.number for errand in stress.errands if errand.completed]
    assert max(errand.completed for errand in stress.errands) == 1
    assert len(done) == fates["done"] == count.done
    assert stress.drained == Counter(
        errand.number
        for errand in stress.errands
        if errand.drained and errand.fate == "done"
    )
    # What callers heard, what hooks were told and what is counted agree.
    assert fates["timed_out"] == count.timed_out
    # Who was refused, left or has expired was at the door or inside; and who lost
    # a worker and found the circuit open when he was to be tried again has failed.
    unlucky = ("failed", "refused", "cancelled", "expired", "lost")
    outside = len(stress.errands) - count.accepted
    assert sum(fates[fate] for fate in unlucky) == (
        count.failed + count.cancelled + count.expired + count.lost + outside
    )
    assert fates["expired"] >= count.expired
    assert fates["failed"] <= count.failed
    assert fates["lost"] >= count.lost
    assert {state: counting.ended[state] for state in JobState if state.terminal} == {
        state: getattr(count, state.value) for state in JobState if state.terminal
    }
    assert counting.told["job_queue"] == count.accepted
    assert counting.told["job_start"] == counting.attempts == count.run.count
    assert counting.told["job_retry"] == count.retries
    assert counting.told["worker_restart"] == count.restarts
    assert stress.heard == counting.told.total()
    # Nothing is left over.
    assert stress.limiter.borrowed_tokens == stress.breaker.statistics().probing == 0
    # Everything has really been met.
    assert min(count.failed, count.timed_out, count.cancelled, count.expired) > 0
    assert min(count.lost, count.retries, count.restarts, count.delayed + 1) > 0
    assert stress.breaker.statistics().opened > 0
    assert stress.most_running > 8
