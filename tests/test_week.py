"""A week on one pool, in virtual time: storms, outages, hangs, and calm after each.

By default a minute of that week lasts 5 s, and a day two hours of such minutes;
with ``TRIO_POOL_STRESS=1`` it is a real week of more than six million jobs.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import random
import sys
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import trio
from trio.testing import MockClock

from trio_pool import (
    Backoff,
    CircuitBreaker,
    CircuitOpen,
    Hooks,
    JobCancelled,
    JobChanged,
    JobDropped,
    JobExpired,
    JobState,
    JobTimeout,
    Pool,
    Reply,
    Restart,
    Retry,
    WorkerChanged,
    WorkerCrashed,
    open_pool,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

STRESS = bool(os.environ.get("TRIO_POOL_STRESS"))

MINUTE = 60.0 if STRESS else 5.0
ROUND = 120
"""Minutes in which every trouble comes once, and the last of which is a lull."""
ROUNDS = 7 * 12 if STRESS else 3

# All moments are multiples of this, so that the clock need not jump for each
# job alone.
TICK = 1 / 8
JOBS_A_SECOND = 10

SIZE = 8
MOST_WAITING = 40
TIMEOUT = 1.0
OPEN_FOR = MINUTE / 8
HANG = MINUTE / 2
"""Seconds until whoever connects or disconnects gives up by himself."""
PAUSE_BEFORE_RESTART = MINUTE / 8
RECOVERY = 2 * HANG + PAUSE_BEFORE_RESTART + OPEN_FOR + 2 * TIMEOUT
"""Seconds after any trouble until all workers are back: a hung setup and a hung
cleanup, the longest backoff, the breaker, and the probe that closes it."""
CATCH_UP = 5.0
"""Seconds until a full backlog is worked off, besides what comes in."""

# What is wrong, from which minute of the round to which.
TROUBLES = {
    "crash storm": (4, 5),
    "outage": (10, 20),
    "poison": (26, 30),
    "hung setups": (36, 40),
    "hung cleanups": (46, 50),
    "slow": (56, 60),
    "paused": (66, 67),
    "resized": (72, 76),
    "impatient callers": (82, 86),
    "everything": (92, 100),
    "lull": (118, 120),
}

# What jobs do in good times, and how often.
KINDS = {
    "plain": 900,
    "fail": 10,
    "flaky": 40,
    "break": 3,
    "poison": 1,
    "flaky crash": 3,
    "endless": 3,
    "withdrawn": 20,
}


class Failure(Exception):
    """What some jobs raise, at each attempt or only at the first."""


class Broken(Exception):
    """What some jobs raise that have spoilt their worker."""


class OutOfReach(ConnectionError):
    """What everything raises while the database is away."""


class Fatal(BaseException):
    """What no handler should raise."""


@attrs.define(eq=False, slots=True)
class Errand:
    """What one job is to do, and what is known of it."""

    kind: str
    seconds: float
    born: float
    weather: str | None
    leased: bool = False
    attempts: int = 0
    completed: int = 0
    fate: str | None = None


class Books(Hooks):
    """What a listener knows: who is live, and how everyone has ended."""

    def __init__(self, blame: Callable[[str], None]) -> None:
        self.blame = blame
        self.live: dict[int | str, int] = {}
        self.ended: Counter[JobState] = Counter()
        self.up: set[int] = set()
        self.told: Counter[str] = Counter()

    def on_worker_start(self, event: WorkerChanged) -> None:
        self.told[event.kind] += 1
        if event.worker in self.up:
            self.blame(f"two workers in one slot: {event}")
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
        if event.job_id in self.live:
            self.blame(f"accepted twice: {event}")
        self.live[event.job_id] = 0

    def on_job_start(self, event: JobChanged) -> None:
        if self.live.get(event.job_id) != event.attempts - 1:
            self.blame(f"started out of turn: {event}")
        self.live[event.job_id] = event.attempts

    def end(self, event: JobChanged) -> None:
        self.ended[event.state] += 1
        if self.live.pop(event.job_id, None) != event.attempts:
            self.blame(f"ended out of turn: {event}")

    on_job_complete = on_job_error = on_job_cancel = on_job_drop = end


class Week:
    """The callers, the database, the weather, and what is known of all."""

    def __init__(self, rounds: int, seed: int) -> None:
        self.chance = random.Random(seed)
        self.rounds = rounds
        self.problems: list[str] = []
        self.books = Books(self.blame)
        self.breaker = CircuitBreaker(
            10, window=MINUTE, open_for=OPEN_FOR, probes=2, on=OutOfReach
        )
        self.pool: Pool[Errand, str]
        self.start = 0.0
        self.weather: str | None = None
        self.fair_since = 0.0
        self.replies: list[tuple[Errand, Reply[str]]] = []
        self.given = 0
        self.fates: Counter[str] = Counter()
        self.given_in: Counter[str | None] = Counter()
        """Jobs by what was wrong when they were given in."""
        self.lost_in: Counter[str | None] = Counter()
        self.fair_jobs = 0
        """Plain jobs of good times, all of which were done at once."""
        self.slowest = 0.0
        self.connects = 0
        self.connected = 0
        self.disconnects = 0
        self.failed_setups = 0
        self.hung = 0
        self.looks = 0
        self.tasks: list[int] = []
        self.objects: list[int] = []
        self.memory: list[int] = []
        self.recovered: dict[str, float] = {}
        """Seconds until all workers were up again, at worst."""

    def blame(self, problem: str) -> None:
        # A thousand are no better than a few.
        if len(self.problems) < 20:
            now = (trio.current_time() - self.start) / MINUTE
            self.problems.append(f"minute {now:.2f}, {self.weather}: {problem}")

    def ticks(self, most: int) -> float:
        return self.chance.randrange(most) * TICK

    def is_fair(self) -> bool:
        """Whether all must be well by now."""
        return self.weather is None and trio.current_time() >= (
            self.fair_since + RECOVERY + CATCH_UP
        )

    # The database, and the workers that are connected to it.

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[Any, None]:
        weather = self.weather
        await trio.sleep(TICK)
        if weather == "everything":
            weather = self.chance.choice(list(TROUBLES))
        # Some still get through, and only find out when they ask for something.
        luck = self.chance.randrange(3) if weather == "outage" else 3
        if weather == "hung setups" or luck == 0:
            self.hung += 1
            await trio.sleep(HANG)
        if luck < 2:
            self.failed_setups += 1
            raise OutOfReach
        self.connects += 1
        self.connected += 1
        try:
            yield self.handle
        finally:
            self.disconnects += 1
            if self.weather in {"hung cleanups", "everything"}:
                self.hung += 1
                with trio.CancelScope(shield=True):
                    await trio.sleep(HANG)
            self.connected -= 1

    async def handle(self, errand: Errand) -> str:
        errand.attempts += 1
        if errand.fate is not None:
            self.blame(f"runs after its end: {errand}")
        kind, weather = errand.kind, self.weather
        if weather == "everything":
            weather = self.chance.choice(list(TROUBLES))
        if weather == "crash storm" or kind == "poison":
            raise Fatal
        if weather == "poison" and self.chance.random() < 0.1:
            raise Fatal
        if weather == "outage":
            await trio.sleep(TICK)
            raise OutOfReach
        seconds = errand.seconds
        if weather == "slow":
            seconds = TIMEOUT + self.chance.choice((-TICK, 0.0, TICK))
        await trio.sleep(math.inf if kind == "endless" else seconds)
        first = errand.attempts == 1
        if kind == "fail" or (kind == "flaky" and first):
            raise Failure
        if kind == "break":
            raise Broken
        if kind == "flaky crash" and first:
            raise Fatal
        errand.completed += 1
        return kind

    # The callers.

    def make(self) -> Errand:
        (kind,) = self.chance.choices(tuple(KINDS), tuple(KINDS.values()))
        now = trio.current_time()
        weather = None if self.is_fair() else self.weather or "after"
        self.given += 1
        self.given_in[self.weather] += 1
        return Errand(kind, TICK + self.ticks(2), now, weather)

    def record(self, errand: Errand, value: Any, error: BaseException | None) -> None:
        """Write down the fate of a job: once, and a true one."""
        started, now = bool(errand.attempts), trio.current_time()
        if errand.fate is not None:
            self.blame(f"a second fate {value!r} {error!r}: {errand}")
        match error:
            case None:
                errand.fate = "done"
                true = value == errand.kind and errand.completed == 1
            case JobDropped() | JobExpired():
                errand.fate = type(error).__name__
                true = error.started is started and error.attempts == errand.attempts
            case JobTimeout() | WorkerCrashed():
                errand.fate = type(error).__name__
                true = error.started and error.attempts == errand.attempts > 0
            case JobCancelled():
                errand.fate = "JobCancelled"
                true = error.started is started and error.attempts == errand.attempts
            case CircuitOpen():
                errand.fate = "CircuitOpen"
                true = error.started is started
            case Failure() | Broken() | OutOfReach():
                errand.fate = type(error).__name__
                true = started
            case trio.Cancelled():
                errand.fate = "Cancelled"
                true = not errand.completed
            case _:
                true = False
        if not true:
            self.blame(f"a false end {value!r} {error!r}: {errand}")
        self.fates[errand.fate or "?"] += 1
        if errand.weather is None and self.is_fair():
            self.record_fair(errand, now)

    def record_fair(self, errand: Errand, now: float) -> None:
        """See that in good times each job ends as it deserves, and soon."""
        deserved = {
            "plain": ("done",),
            "flaky": ("done",),
            "flaky crash": ("done",),
            "fail": ("Failure",),
            "break": ("Broken",),
            "poison": ("WorkerCrashed",),
            "endless": ("JobTimeout",),
            "withdrawn": ("done", "Cancelled", "JobCancelled"),
        }[errand.kind]
        if errand.leased and errand.kind.startswith("flaky"):
            # What is leased is not given back meanwhile, so nothing is retried.
            deserved = ("Failure", "WorkerCrashed")
        if errand.fate not in deserved:
            self.blame(f"in good times: {errand}")
        if errand.kind == "plain":
            self.fair_jobs += 1
            self.slowest = max(self.slowest, now - errand.born)

    async def give_in(self, nursery: trio.Nursery) -> None:
        """Give in ten jobs a second, until the week is over."""
        tick = given = 0
        while tick * TICK < self.rounds * ROUND * MINUTE:
            wanted = int(tick * TICK * JOBS_A_SECOND)
            if self.weather == "lull":
                # Nobody calls, so that one can see what is left.
                given = wanted
            while given < wanted:
                given += 1
                if self.chance.random() < 0.5:
                    self.submit()
                else:
                    nursery.start_soon(self.process)
            if self.weather != "lull" and tick % int(MINUTE / TICK) == 7:
                nursery.start_soon(self.settle)
                nursery.start_soon(self.stream)
                nursery.start_soon(self.lease)
            tick += 1
            await trio.sleep_until(self.start + tick * TICK)
            if not tick % 8:
                self.reap()

    def submit(self) -> None:
        errand, chance = self.make(), self.chance
        options: dict[str, Any] = {}
        if (draw := chance.random()) < 0.2:
            options["key"] = chance.randrange(40)
        elif draw < 0.4:
            options["priority"] = chance.randrange(-1, 3)
        elif draw < 0.45:
            options["delay"] = self.ticks(16)
        elif draw < 0.5:
            options["ttl"] = 1 + self.ticks(16)
        try:
            reply = self.pool.submit_nowait(errand, **options)
        except CircuitOpen as error:
            self.record(errand, None, error)
            return
        if errand.kind == "withdrawn" and chance.random() < 0.5:
            reply.cancel()
        self.replies.append((errand, reply))

    def reap(self) -> None:
        """Read the replies that have come."""
        waiting = []
        for errand, reply in self.replies:
            if not reply.done:
                waiting.append((errand, reply))
                continue
            outcome = reply.outcome
            value = getattr(outcome, "value", None)
            self.record(errand, value, getattr(outcome, "error", None))
            if reply.attempts != errand.attempts:
                self.blame(f"{reply.attempts} attempts: {errand}")
        self.replies = waiting

    async def process(self) -> None:
        errand = self.make()
        impatient = self.weather in {"impatient callers", "everything"}
        patience = math.inf
        if impatient or errand.kind == "withdrawn":
            patience = self.ticks(4)
        with trio.move_on_after(patience):
            try:
                value = await self.pool.process(errand)
            except BaseException as error:
                self.record(errand, None, error)
                if not isinstance(error, Exception):
                    raise
            else:
                self.record(errand, value, None)

    async def settle(self) -> None:
        errands = [self.make() for _ in range(8)]
        for settled in await self.pool.settle(errands):
            outcome = settled.outcome
            value = getattr(outcome, "value", None)
            self.record(settled.item, value, getattr(outcome, "error", None))

    async def stream(self) -> None:
        errands = [self.make() for _ in range(8)]
        async with self.pool.stream(errands, ordered=False, outcomes=True) as stream:
            async for settled in stream:
                outcome = settled.outcome
                value = getattr(outcome, "value", None)
                self.record(settled.item, value, getattr(outcome, "error", None))

    async def lease(self) -> None:
        async with self.pool.lease() as worker:
            for _ in range(2):
                errand = self.make()
                errand.leased = True
                try:
                    value = await worker.process(errand)
                except WorkerCrashed as error:
                    if not error.started and not errand.attempts:
                        # The worker went with the job before.
                        errand.fate = "refused"
                        self.fates["refused"] += 1
                        return
                    self.record(errand, None, error)
                except Exception as error:
                    self.record(errand, None, error)
                else:
                    self.record(errand, value, None)

    # The weather, and what is looked at.

    async def change_weather(self) -> None:
        for number in range(self.rounds):
            for name, (first, last) in TROUBLES.items():
                begin = self.start + (number * ROUND + first) * MINUTE
                end = self.start + (number * ROUND + last) * MINUTE
                await trio.sleep_until(begin)
                self.see_all_is_well()
                self.weather = name
                if name == "lull":
                    await trio.sleep_until(end - MINUTE / 2)
                    await self.await_all(end - TICK)
                    self.measure()
                elif name == "paused":
                    self.pool.pause()
                elif name in {"resized", "everything"}:
                    await self.disturb(end, pauses=name == "everything")
                await trio.sleep_until(end)
                self.pool.resume()
                self.weather = None
                self.fair_since = trio.current_time()
                if name != "lull":
                    await self.recover(name)

    async def disturb(self, until: float, pauses: bool) -> None:
        """Ask for other sizes, and do not always wait for them."""
        while trio.current_time() < until - MINUTE:
            if pauses:
                self.pool.pause()
                await trio.sleep(self.ticks(8))
                self.pool.resume()
            with trio.move_on_after(TICK + self.ticks(16)):
                await self.pool.resize(self.chance.randrange(2 * SIZE))
            await trio.sleep(self.ticks(16))
        with trio.move_on_at(until):
            await self.pool.resize(SIZE)

    async def await_all(self, until: float) -> None:
        """Wait for a worker that is just replaced, as its age has come."""
        while self.connected < SIZE and trio.current_time() < until:  # noqa: ASYNC110
            await trio.sleep(TICK)

    async def recover(self, name: str) -> None:
        """Wait until every worker is back, which must not take long."""
        begin = trio.current_time()
        while self.pool.statistics().workers < SIZE or self.breaker.state != "closed":
            await trio.sleep(TICK)
            if trio.current_time() > begin + RECOVERY:
                self.blame(f"not well after {name}: {self.pool.statistics()}")
                break
        spent = trio.current_time() - begin
        self.recovered[name] = max(self.recovered.get(name, 0.0), spent)

    def see_all_is_well(self) -> None:
        """Before each trouble: no worker is lost, and nobody waits for long."""
        count = self.pool.statistics()
        if not count.size == SIZE == len(self.pool.workers()):
            self.blame(f"workers are lost: {count}")
        # Some are to wait for two seconds, and one may have a slow one before it.
        if count.oldest_wait > 6 * TIMEOUT or count.queued > SIZE:
            self.blame(f"jobs wait: {count}")

    def measure(self) -> None:
        """See in a lull that nothing is left, and how much there is of anything."""
        self.reap()
        count = self.pool.statistics()
        if self.replies or self.books.live or count.busy:
            self.blame(f"not all has ended in a lull: {count}")
        if not count.workers == SIZE == self.connected == len(self.books.up):
            self.blame(f"{self.connected} connections in a lull: {count}")
        if self.breaker.statistics().probing:
            self.blame(f"a probe was never given back: {self.breaker.statistics()}")
        gc.collect()
        self.tasks.append(trio.lowlevel.current_statistics().tasks_living)
        self.objects.append(len(gc.get_objects()))
        if sys.platform == "linux":
            with open("/proc/self/statm", encoding="ascii") as file:
                pages = int(file.read().split()[1])
            self.memory.append(pages * os.sysconf("SC_PAGE_SIZE"))

    async def look(self) -> None:
        """Look at the books every minute."""
        while True:
            await trio.sleep(MINUTE)
            self.look_once()

    def look_once(self) -> None:
        self.looks += 1
        count = self.pool.statistics()
        ended = count.done + count.failed + count.timed_out + count.cancelled
        ended += count.expired + count.dropped + count.lost
        live = count.delayed + count.queued + count.running
        if count.accepted != live + ended:
            self.blame(f"the books do not balance: {count}")
        if live != len(self.books.live) or ended != self.books.ended.total():
            self.blame(f"{len(self.books.live)} are live to who listens: {count}")
        if not count.running == count.busy <= 2 * SIZE:
            self.blame(f"too many run: {count}")
        if count.delayed + count.queued > MOST_WAITING + 2 * SIZE:
            self.blame(f"too many wait: {count}")
        if count.restarts != self.books.told["worker_restart"]:
            self.blame(f"{self.books.told} is what listeners heard: {count}")
        # Those that are being set up or cleaned up are not counted as workers.
        if not count.workers <= self.connected <= 2 * SIZE:
            self.blame(f"{self.connected} connections: {count}")

    async def run(self) -> None:
        async with open_pool(
            SIZE,
            worker=self.connection,
            max_backlog=MOST_WAITING,
            overflow="drop_oldest",
            timeout=TIMEOUT,
            retry=Retry(3, Backoff(TICK, jitter=0), on=(Failure, WorkerCrashed)),
            restart=Restart(
                math.inf, 60.0, Backoff(TICK, maximum=PAUSE_BEFORE_RESTART)
            ),
            crash_on=(Broken, OutOfReach),
            breaker=self.breaker,
            max_jobs=500,
            max_age=20 * MINUTE,
            aging=1.0,
            hooks=[self.books],
        ) as self.pool:
            self.start = self.fair_since = trio.current_time()
            async with trio.open_nursery() as beside:
                beside.start_soon(self.look)
                beside.start_soon(self.change_weather)
                async with trio.open_nursery() as nursery:
                    await self.give_in(nursery)
                await self.pool.join()
                self.reap()
                self.look_once()
                beside.cancel_scope.cancel()
        self.look_once()


def test_after_a_week_of_troubles_the_pool_is_as_on_the_first_day(
    record_property: Callable[[str, object], None],
) -> None:
    """Each job has one true fate, and after each trouble all is well again soon.

    It takes about 5 s, and half an hour under ``TRIO_POOL_STRESS=1``.
    """
    week = Week(ROUNDS, seed=2025)
    logged: Counter[str] = Counter()

    def count_logged(record: logging.LogRecord) -> bool:
        logged[record.msg] += 1
        return False

    logger = logging.getLogger("trio_pool")
    logger.addFilter(count_logged)
    try:
        trio.run(week.run, clock=MockClock(autojump_threshold=0))
    finally:
        logger.removeFilter(count_logged)

    count, told = week.pool.statistics(), week.books.told
    figures: dict[str, object] = {
        "virtual days": ROUNDS * ROUND * MINUTE / 86_400,
        "jobs": week.given,
        "fates": dict(week.fates),
        "jobs given in while": dict(week.given_in),
        "plain jobs in good times, all done": week.fair_jobs,
        "the slowest of them, seconds": week.slowest,
        "seconds to recover after": week.recovered,
        "connections": week.connects,
        "setups and cleanups that hung": week.hung,
        "setups that failed": week.failed_setups,
        "crashes": told["worker_crash"],
        "restarts": count.restarts,
        "times the breaker opened": week.breaker.statistics().opened,
        "looks at the books": week.looks,
        "tasks in each lull": week.tasks,
        "objects in each lull": week.objects,
        "bytes of memory in each lull": week.memory,
        "logged": dict(logged),
    }
    for name, figure in figures.items():
        record_property(name, figure)
        print(f"{name}: {figure}")

    assert week.problems == []
    # Every job has one fate.
    assert week.given >= JOBS_A_SECOND * ROUNDS * ROUND * MINUTE * 0.99
    assert week.fates.total() == week.given
    assert count.delayed == count.queued == count.running == 0
    assert {state: week.books.ended[state] for state in JobState if state.terminal} == {
        state: getattr(count, state.value) for state in JobState if state.terminal
    }
    # Who has not been accepted found the circuit open, or his leased worker gone,
    # or left while there was no room.
    outside = (
        week.fates["CircuitOpen"] + week.fates["refused"] + week.fates["Cancelled"]
    )
    assert week.given - count.accepted <= outside
    # Nothing is left after the block.
    assert week.connected == count.workers == len(week.books.up) == 0
    assert week.connects == week.disconnects
    # Nothing has grown since the first lull: all rounds are alike.
    assert len(week.tasks) == ROUNDS
    assert len(set(week.tasks)) == 1
    assert max(week.objects) - min(week.objects) < 1000
    if week.memory:
        assert max(week.memory) - week.memory[0] < 8 << 20
    # Every trouble has really been one, and was over soon.
    assert set(week.recovered) == set(TROUBLES) - {"lull"}
    assert max(week.recovered.values()) <= RECOVERY
    assert week.fair_jobs > week.given / 5
    assert week.slowest <= 6 * TIMEOUT
    assert count.restarts > 10 * ROUNDS
    assert week.breaker.statistics().opened >= ROUNDS
    assert min(week.failed_setups, week.hung, week.fates["CircuitOpen"]) > ROUNDS
    assert min(week.fates["JobTimeout"], week.fates["WorkerCrashed"]) > ROUNDS
    assert min(count.dropped, count.expired, count.lost, count.retries) > ROUNDS
