"""The promises of the pool as properties of generated programs."""

from __future__ import annotations

import logging
import math
from collections import Counter
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import (
    Body,
    Call,
    Caller,
    Plan,
    Scope,
    Terms,
    Tries,
    Work,
    callers,
    plans,
    unseen,
)
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_pool import (
    Autoscale,
    BacklogFull,
    Backoff,
    CircuitBreaker,
    CircuitOpen,
    CurrentJob,
    Drain,
    Event,
    EventsLost,
    Hooks,
    JobCancelled,
    JobChanged,
    JobDropped,
    JobError,
    JobExpired,
    JobId,
    JobState,
    JobTimeout,
    LeasedWorker,
    Pool,
    PoolBroken,
    PoolChanged,
    PoolClosed,
    PoolResized,
    Rate,
    Reply,
    Restart,
    Retry,
    Settled,
    WorkerChanged,
    WorkerCrashed,
    WorkerSnapshot,
    WouldDeadlock,
    current_job,
    open_pool,
)

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        Awaitable,
        Callable,
        Iterator,
        Sequence,
    )

# Seconds of virtual time after which a program is taken to hang.
FOR_EVER = 10_000.0


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """Keep no record of logged crashes: thousands of tracebacks would pile up."""
    logger = logging.getLogger("trio_pool")
    logger.disabled = True
    yield
    logger.disabled = False


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    return trio.run(main, clock=MockClock(autojump_threshold=0))


def tasks_below(top: trio.lowlevel.Task) -> set[trio.lowlevel.Task]:
    found = set()
    for nursery in top.child_nurseries:
        for task in nursery.child_tasks:
            found |= {task} | tasks_below(task)
    return found


def all_tasks() -> set[trio.lowlevel.Task]:
    root = trio.lowlevel.current_root_task()
    assert root is not None
    return tasks_below(root)


# ----------------------------------------------------------------------
# Promise 1: as if called directly.

variable: ContextVar[int] = ContextVar("variable")


class Returned(Exception):
    """Carries a value out of the bodies around a return."""

    def __init__(self, value: int) -> None:
        super().__init__(value)


class Failure(Exception):
    """What a generated handler raises."""


class Unmatched(Exception):
    """What no generated handler raises."""


@attrs.define(eq=False)
class Log:
    """What happened and when, by the task that did it.

    The order of two tasks within one moment is trio's to choose.
    """

    lines: dict[str, list[tuple[float, str]]] = attrs.field(factory=dict)

    def add(self, path: str, what: str) -> None:
        self.lines.setdefault(path, []).append((trio.current_time(), what))


@attrs.define(eq=False)
class Errand:
    """The input of a job: what to do, and where to note it."""

    body: Body
    log: Log
    path: str
    error: BaseException | None = None
    """What left the handler."""


async def handle(errand: Errand) -> tuple[str, int]:
    """Do as the errand says: the handler of every pool of promise 1."""
    log, path = errand.log, errand.path
    log.add(path, "started")
    value = 0
    try:
        await play(errand.body, log, path)
    except Returned as jump:
        value = jump.args[0]
    except BaseException as error:
        errand.error = error
        raise
    log.add(path, "ended")
    return "value", value


async def play(body: Body, log: Log, path: str) -> None:
    for op in body:
        await PLAY[op[0]](log, path, *op[1:])


async def play_sleep(log: Log, path: str, seconds: float) -> None:
    await trio.sleep(seconds)
    log.add(path, "slept")


async def play_shielded_sleep(log: Log, path: str, seconds: float) -> None:
    with trio.CancelScope(shield=True):
        await trio.sleep(seconds)
    log.add(path, "slept under a shield")


async def play_swallow(log: Log, path: str, seconds: float) -> None:
    try:
        await trio.sleep(seconds)
    except trio.Cancelled:
        log.add(path, "swallowed")


async def play_fail_when_cancelled(
    log: Log, path: str, seconds: float, number: int
) -> None:
    try:
        await trio.sleep(seconds)
    except trio.Cancelled as cancelled:
        raise Failure("cancelled", number) from cancelled


async def play_checkpoint(log: Log, path: str) -> None:
    await trio.lowlevel.checkpoint()
    log.add(path, "checkpoint")


async def play_raise(log: Log, path: str, number: int) -> None:
    raise Failure(number)


async def play_raise_group(log: Log, path: str, one: int, other: int) -> None:
    inner = ExceptionGroup("inner", [KeyError(other)])
    raise ExceptionGroup("outer", [Failure(one), inner])


async def play_set_variable(log: Log, path: str, number: int) -> None:
    variable.set(number)


async def play_read_variable(log: Log, path: str) -> None:
    log.add(path, f"variable {variable.get()}")


async def play_read_deadline(log: Log, path: str) -> None:
    log.add(path, f"deadline {trio.current_effective_deadline()}")


async def play_return(log: Log, path: str, number: int) -> None:
    raise Returned(number)


async def play_finally(log: Log, path: str, body: Body, seconds: float) -> None:
    try:
        await play(body, log, path)
    finally:
        with trio.CancelScope(shield=True):
            await trio.sleep(seconds)
        log.add(path, "cleaned up")


async def play_cleanup_fails(log: Log, path: str, body: Body, number: int) -> None:
    try:
        await play(body, log, path)
    finally:
        raise Failure("cleanup", number)


async def play_catch(log: Log, path: str, body: Body) -> None:
    try:
        await play(body, log, path)
    except Exception as error:
        log.add(path, f"caught {type(error).__name__}")


async def play_move_on(log: Log, path: str, seconds: float, body: Body) -> None:
    with trio.move_on_after(seconds) as scope:
        await play(body, log, path)
    log.add(path, f"moved on {scope.cancelled_caught}")


async def play_fail_after(log: Log, path: str, seconds: float, body: Body) -> None:
    with trio.fail_after(seconds):
        await play(body, log, path)


async def play_shield(log: Log, path: str, body: Body) -> None:
    with trio.CancelScope(shield=True):
        await play(body, log, path)


async def play_nursery(
    log: Log, path: str, body: Body, children: tuple[tuple[float, Body], ...]
) -> None:
    async with trio.open_nursery() as nursery:
        for number, (stagger, child) in enumerate(children):
            nursery.start_soon(play_child, log, f"{path}.{number}", stagger, child)
        await play(body, log, path)
    log.add(path, "nursery closed")


async def play_child(log: Log, path: str, stagger: float, body: Body) -> None:
    await trio.sleep(stagger)
    await play(body, log, path)


PLAY: dict[str, Callable[..., Awaitable[None]]] = {
    "sleep": play_sleep,
    "shielded sleep": play_shielded_sleep,
    "swallow": play_swallow,
    "fail when cancelled": play_fail_when_cancelled,
    "checkpoint": play_checkpoint,
    "raise": play_raise,
    "raise group": play_raise_group,
    "set variable": play_set_variable,
    "read variable": play_read_variable,
    "read deadline": play_read_deadline,
    "return": play_return,
    "finally": play_finally,
    "cleanup fails": play_cleanup_fails,
    "catch": play_catch,
    "move on": play_move_on,
    "fail after": play_fail_after,
    "shield": play_shield,
    "nursery": play_nursery,
}


def shape(error: BaseException | None) -> Any:
    """Describe an error with its causes and, as a bag, the members of a group."""
    if error is None:
        return None
    if only_cancelled(error):
        # Who cancelled is the pool's to name, and how many tasks below heard
        # of it makes no difference to any scope.
        return "Cancelled"
    facts: tuple[Any, ...] = (
        type(error).__name__,
        shape(error.__cause__),
        shape(error.__context__),
        error.__suppress_context__,
        getattr(error, "__notes__", None),
    )
    if isinstance(error, BaseExceptionGroup):
        return (*facts, error.message, sorted(map(repr, map(shape, error.exceptions))))
    return (*facts, error.args)


def only_cancelled(error: BaseException | None) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.split(trio.Cancelled)[1] is None
    return isinstance(error, trio.Cancelled)


def open_scope(scope: Scope, nursery: trio.Nursery) -> trio.CancelScope:
    opened = trio.CancelScope(shield=scope.shield)
    if scope.after is not None:
        opened.deadline = trio.current_time() + scope.after
    if scope.cancelled_at is not None:
        nursery.start_soon(cancel_later, opened, scope.cancelled_at)
    return opened


async def cancel_later(scope: trio.CancelScope, seconds: float) -> None:
    await trio.sleep(seconds)
    scope.cancel(reason="a sibling")


async def call_in_scopes(
    process: Callable[[Errand], Awaitable[tuple[str, int]]],
    call: Call,
    errand: Errand,
    nursery: trio.Nursery,
    outcomes: list[Any],
    depth: int = 0,
) -> None:
    """Call once, within the call's scopes; note what each of them caught."""
    if depth < len(call.scopes):
        with open_scope(call.scopes[depth], nursery) as scope:
            await call_in_scopes(process, call, errand, nursery, outcomes, depth + 1)
        outcomes.append(("caught", scope.cancelled_caught, trio.current_time()))
        return
    # A caller that is cancelled before it calls never starts its handler,
    # which a direct call would do up to its first checkpoint.
    await trio.lowlevel.checkpoint_if_cancelled()
    try:
        value = await process(errand)
    except BaseException as error:
        same = error is errand.error or only_cancelled(error)
        outcomes.append(("raised", shape(error), same, trio.current_time()))
        raise
    outcomes.append(("returned", value, trio.current_time()))


async def be_caller(
    process: Callable[[Errand], Awaitable[tuple[str, int]]],
    caller: Caller,
    outcomes: list[Any],
    log: Log,
    keeps_variable: bool,
) -> None:
    async with trio.open_nursery() as nursery:
        try:
            with open_scope(caller.scope, nursery) as scope:
                for number, call in enumerate(caller.calls):
                    variable.set(call.variable)
                    errand = Errand(call.body, log, f"call {number}")
                    try:
                        await call_in_scopes(process, call, errand, nursery, outcomes)
                    except Exception as error:
                        outcomes.append(("left", shape(error), trio.current_time()))
                    if keeps_variable:
                        assert variable.get() == call.variable
            outcomes.append(("caught", scope.cancelled_caught, trio.current_time()))
        except Exception as error:
            outcomes.append(("ended", shape(error), trio.current_time()))
        nursery.cancel_scope.cancel()


@attrs.define
class Observed:
    """All that can be told about one caller from outside."""

    outcomes: list[Any]
    log: dict[str, list[tuple[float, str]]]


async def observe(
    process: Callable[[Errand], Awaitable[tuple[str, int]]],
    callers: list[Caller],
    keeps_variable: bool,
) -> list[Observed]:
    outcomes: list[list[Any]] = [[] for _ in callers]
    logs = [Log() for _ in callers]
    with trio.fail_after(FOR_EVER):
        async with trio.open_nursery() as nursery:
            for caller, outcome, log in zip(callers, outcomes, logs, strict=True):
                nursery.start_soon(
                    be_caller, process, caller, outcome, log, keeps_variable
                )
    return [
        Observed(outcome, log.lines)
        for outcome, log in zip(outcomes, logs, strict=True)
    ]


class Listening(Hooks):
    """Makes the pool take the ways on which it tells of jobs."""

    def __init__(self) -> None:
        self.events = 0

    def on_job_start(self, event: JobChanged) -> None:
        self.events += 1


@asynccontextmanager
async def worker_with_state() -> AsyncGenerator[Any, None]:
    await trio.lowlevel.checkpoint()
    yield handle


async def call_on(job: CurrentJob, call_next: Any) -> Any:
    return await call_next(job)


def is_another_error(error: Exception) -> bool:
    return False


def make_unseen(features: dict[str, Any], size: int) -> dict[str, Any]:
    """Make the options of a pool whose features never come to bear."""
    options: dict[str, Any] = {}
    for name, value in features.items():
        match name:
            case "retry" if value == "once":
                options[name] = Retry(1)
            case "retry":
                on: Any = is_another_error if value == "no error" else Unmatched
                options[name] = Retry(3, on=on)
            case "middleware":
                options[name] = [call_on] * value
            case "rate":
                options[name] = Rate(1e9, burst=1_000_000)
            case "limiter":
                options[name] = trio.CapacityLimiter(1_000)
            case "breaker" if value == "many":
                options[name] = CircuitBreaker(1_000_000)
            case "breaker":
                options[name] = CircuitBreaker(1, on=is_another_error)
            case "scale":
                options[name] = Autoscale(size, size, 100.0)
            case "aging":
                options[name] = 100.0
            case "max_jobs":
                options[name] = 1_000_000
            case "choose":
                options[name] = CHOICES["first"]
    return options


async def call_by_pool(
    callers: list[Caller],
    spare: int,
    kind: str,
    backlog: float,
    watched: bool,
    features: dict[str, Any],
) -> list[Observed]:
    size = len(callers) + spare
    options: Any = {"max_backlog": backlog, "hooks": [Listening()] if watched else []}
    options.update(make_unseen(features, size))
    keyed = "key" in features

    async def process(errand: Errand) -> tuple[str, int]:
        # A key that no other job has.
        key = object() if keyed else None
        if kind == "task pool":
            return await pool.process(handle, errand, key=key)
        return await pool.process(errand, key=key)

    before = all_tasks()
    pool: Any
    if kind == "task pool":
        opened: Any = open_pool(size, **options)
    elif kind == "handler":
        opened = open_pool(size, handle, **options)
    else:
        opened = open_pool(size, worker=worker_with_state, **options)
    async with opened as pool:
        observed = await observe(process, callers, True)
        count = pool.statistics()
    assert all_tasks() == before
    assert count.restarts == count.running == count.queued == count.retries == 0
    if "limiter" in features:
        assert options["limiter"].borrowed_tokens == 0
    return observed


@given(
    st.lists(callers, min_size=1, max_size=3),
    st.integers(0, 2),
    st.sampled_from(["handler", "worker", "task pool"]),
    st.sampled_from([0, 3, math.inf]),
    st.booleans(),
    st.just({}) | unseen,
)
def test_process_is_observably_the_direct_call(
    callers: list[Caller],
    spare: int,
    kind: str,
    backlog: float,
    watched: bool,
    features: dict[str, Any],
) -> None:
    """With idle workers: same outcome, same moments, same side effects."""

    async def directly() -> list[Observed]:
        return await observe(handle, callers, False)

    async def by_pool() -> list[Observed]:
        return await call_by_pool(callers, spare, kind, backlog, watched, features)

    assert run(by_pool) == run(directly)


# ----------------------------------------------------------------------
# Promises 2, 3, 4, 5 and 8: books, facts, leftovers, unread failures, bounds.


class Broken(Exception):
    """What a generated handler raises that has lost its connection."""


class Fatal(BaseException):
    """What no handler should raise."""


class BadSource(Exception):
    """What a generated input raises in its middle."""


class Ending(Exception):
    """What the block of a generated program raises at its end."""


# What the pool itself may say to whoever comes to it.
REFUSALS = (BacklogFull, CircuitOpen, PoolClosed, PoolBroken, WouldDeadlock)

# More than one problem of a kind says nothing more.
ENOUGH = 10


def books(pool: Pool[Any, Any]) -> list[str]:
    """Say what is wrong with the counts of a pool."""
    count = pool.statistics()
    wrong = []
    ended = count.done + count.failed + count.timed_out + count.cancelled
    ended += count.expired + count.dropped + count.lost
    if count.accepted != count.delayed + count.queued + count.running + ended:
        wrong.append(f"the books do not balance: {count}")
    if count.busy != count.running:
        wrong.append(f"busy is not running: {count}")
    if min(attrs.astuple(count, recurse=False)[:15]) < 0:
        wrong.append(f"less than none: {count}")
    return wrong


def raise_of(_: Exception) -> bool:
    raise KeyError("a predicate that fails")


RETRIED_ON: dict[str, Any] = {
    "any": Exception,
    "failure": Failure,
    "crash": (WorkerCrashed, Failure),
    "predicate": lambda error: isinstance(error, (Failure, WorkerCrashed, JobTimeout)),
    "raises": raise_of,
    "none": (),
}


def make_retry(tries: Tries | None) -> Retry | None:
    if tries is None:
        return None
    backoff = Backoff(tries.initial, tries.factor, jitter=0)
    return Retry(tries.attempts, backoff, RETRIED_ON[tries.on])


def choose_badly(workers: Sequence[WorkerSnapshot]) -> Any:
    raise KeyError("a choice that fails")


CHOICES: dict[str, Any] = {
    "first": lambda workers: workers[0],
    "last": lambda workers: workers[-1],
    "bad": lambda workers: None,
    "raises": choose_badly,
}


@attrs.define(eq=False)
class Ticket:
    """One job of ours: its work, and what has become of it so far."""

    number: int
    work: Work
    timeout: float | None = None
    terms: Terms = attrs.field(factory=Terms)
    inside: Ticket | None = None
    """The job that had it done, if one did."""
    leased: bool = False
    order: int = -1
    """How many were given in before it."""
    called_at: float = 0.0
    starts: int = 0
    runs: bool = False
    ended_at: float = 0.0
    asked_to_end: bool = False
    answers: list[Any] = attrs.field(factory=list)
    reply: Reply[int] | None = None

    def is_live(self) -> bool:
        """Whether the pool may still have it."""
        return not self.answers and (self.reply is None or not self.reply.done)


@attrs.define(eq=False)
class Deed:
    """A task of ours that waits for the pool."""

    name: str
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    ended: bool = False


@attrs.define(eq=False)
class Listened:
    """What an event stream has given, beside what hooks were told."""

    begin: int
    """How many events the hooks had been told before."""
    heard: list[Event] = attrs.field(factory=list)
    ended: bool = False


class Member:
    """The handler of one worker, or of all of them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._attempts: set[tuple[int, int]] = set()
        self._was_leased = False

    async def __call__(self, ticket: Ticket) -> int:
        world = self._world
        self._attempts.add((ticket.number, ticket.starts))
        self._was_leased |= ticket.leased
        most = world.plan.extras.get("max_jobs", math.inf)
        if (
            "setup" in world.plan.extras
            and not world.layers
            and not self._was_leased
            and len(self._attempts) > most
        ):
            world.complain(f"a worker had more than {most} jobs")
        return await world.handler(ticket)


class SlowMember(Member):
    """One that is not at once ready for the next job."""

    async def ready(self) -> None:
        await trio.sleep(self._world.plan.extras["ready"])


class World(Hooks):
    """A program's own books, kept beside those of the pool."""

    def __init__(self, plan: Plan, nursery: trio.Nursery) -> None:
        self.plan = plan
        self.nursery = nursery
        self.asides: list[trio.CancelScope] = []
        self.pool: Pool[Ticket, int]
        extras = plan.extras
        self.scale: Autoscale | None = None
        if "scale" in extras:
            least, more, interval, step, up_after, down_after = extras["scale"]
            most = max(1, least + more)
            self.scale = Autoscale(least, most, interval, step, up_after, down_after)
        self.limiter: trio.CapacityLimiter | None = None
        if "limiter" in extras:
            self.limiter = trio.CapacityLimiter(extras["limiter"])
        self.breaker: CircuitBreaker | None = None
        if "breaker" in extras:
            self.breaker = CircuitBreaker(*extras["breaker"])
        self.rate: Rate | None = None
        if "rate" in extras:
            jobs, burst = extras["rate"]
            self.rate = Rate(jobs, 1.0, burst)
        self.layers = extras.get("middleware", ())
        self.drains: dict[str, Drain[int]] = {"open": Drain(), "closed": Drain()}
        self.drains["closed"].close()
        self.drained: list[int] = []
        self.bound = self.most = plan.size if self.scale is None else self.scale.min
        self.plain = not extras and "Tries" not in repr(plan.steps)
        self.running = 0
        self.members = 0
        self.attempts: list[float] = []
        """When each of them started."""
        self.batched = 0
        """How many of them were of items of a batch."""
        self.given = 0
        self.last_of_key: dict[str, int] = {}
        self.key_runs: dict[str, Ticket] = {}
        self.tickets: list[Ticket] = []
        self.items: set[int] = set()
        self.replies: list[tuple[Ticket, Reply[int]]] = []
        self.read: set[int] = set()
        self.leases: dict[Any, list[Ticket]] = {}
        self.deeds: list[Deed] = []
        self.streams: list[Listened] = []
        self.told: list[Event] = []
        self.live: dict[JobId, int] = {}
        """Jobs that have not ended, with their attempts, as the hooks tell it."""
        self.up: set[int] = set()
        """Workers that are set up, as the hooks tell it."""
        self.tally: Counter[str] = Counter()
        self.streamed = False
        self.problems: list[str] = []

    def options(self) -> dict[str, Any]:
        """All the options of the pool but its size."""
        extras = self.plan.extras
        options = {
            **self.plan.options,
            "crash_on": Broken,
            "restart": Restart(self.plan.restart_limit, 60.0, Backoff(jitter=0)),
            "hooks": [self] if self.plan.watched else [],
            "retry": make_retry(extras.get("retry")),
            "scale": self.scale,
            "limiter": self.limiter,
            "breaker": self.breaker,
            "rate": self.rate,
            "choose": CHOICES.get(extras.get("choose", "")),
        }
        for name in ("max_jobs", "max_age", "max_idle", "aging"):
            if name in extras:
                options[name] = extras[name]
        if self.layers:
            inner = [getattr(self, f"layer_that_{name}") for name in self.layers]
            options["middleware"] = [self.layer_that_counts, *inner]
        return options

    def open(self) -> Any:
        size, options = self.plan.size, self.options()
        if "setup" in self.plan.extras:
            return open_pool(size, worker=self.open_member, **options)
        return open_pool(size, self.member(), **options)

    def member(self) -> Member:
        return (SlowMember if "ready" in self.plan.extras else Member)(self)

    @asynccontextmanager
    async def open_member(self) -> AsyncGenerator[Member, None]:
        seconds = self.plan.extras["setup"]
        await trio.sleep(seconds)
        self.members += 1
        try:
            yield self.member()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(seconds)
            self.members -= 1

    # What handlers, hooks and steps all look at.

    def check(self, where: str) -> None:
        """Compare the pool's books with themselves, the bounds and ours."""
        if not hasattr(self, "pool"):
            return
        wrong = books(self.pool)
        count = self.pool.statistics()
        if self.scale is not None:
            if not self.scale.min <= self.pool.size <= self.scale.max:
                wrong.append(f"a size of {self.pool.size}")
            self.bound = max(self.bound, self.pool.size)
        self.most = max(self.most, self.bound)
        # Only what goes back may pass the bound of what waits.
        waiting = count.queued + count.delayed - (0 if self.plain else self.most)
        if waiting > self.plan.options["max_backlog"]:
            wrong.append(f"too many wait: {count}")
        if count.running > self.bound:
            wrong.append(f"more than {self.bound} running: {count}")
        if self.running > self.bound:
            wrong.append(f"more than {self.bound} handlers run: {self.running}")
        if self.running > count.running:
            wrong.append(f"{self.running} handlers run: {count}")
        if self.limiter is not None and self.limiter.borrowed_tokens < self.running:
            wrong.append(f"{self.running} handlers run by {self.limiter}")
        for text in wrong:
            self.complain(f"{where}: {text}")

    def complain(self, text: str) -> None:
        if len(self.problems) < ENOUGH:
            self.problems.append(text)

    # What runs inside of workers.

    def begin(self, ticket: Ticket) -> None:
        """Note that an attempt starts, in its outermost code."""
        now = trio.current_time()
        job = current_job()
        ticket.starts += 1
        ticket.runs = True
        self.attempts.append(now)
        self.batched += ticket.number in self.items
        self.running += 1
        self.check(f"start of {ticket.work}")
        if ticket.answers:
            self.complain(f"started after its answer: {ticket}")
        if ticket.inside is not None and ticket.inside.work.kind == "nested key":
            key = ticket.inside.terms.key
            if key is not None and key == ticket.terms.key:
                self.complain(f"runs beside one of its key: {ticket}")
        self.check_attempt(ticket, job)
        self.check_moment(ticket, now)
        self.check_turn(ticket)
        for worker, tickets in self.leases.items():
            if worker.id == job.worker and ticket not in tickets:
                self.complain(f"runs in a worker that was leased: {ticket}")

    def finish(self, ticket: Ticket) -> None:
        """Note that an attempt is over."""
        ticket.ended_at = trio.current_time()
        ticket.runs = False
        if ticket.terms.key is not None:
            self.key_runs.pop(ticket.terms.key, None)
        self.check(f"end of {ticket.work}")
        self.running -= 1

    def check_attempt(self, ticket: Ticket, job: CurrentJob) -> None:
        terms = ticket.terms
        if job.input is not ticket or job.attempt != ticket.starts:
            self.complain(f"another job than {ticket}: {job}")
        if job.key != terms.key or (terms.uid is not None and job.id != terms.uid):
            self.complain(f"other terms than those of {ticket}: {job}")
        tries = self.tries(ticket)
        if ticket.starts > (1 if tries is None else tries.attempts):
            self.complain(f"started too often: {ticket}")

    def check_moment(self, ticket: Ticket, now: float) -> None:
        terms = ticket.terms
        if ticket.starts > 1:
            tries = self.tries(ticket)
            assert tries is not None
            wait = tries.initial * tries.factor ** (ticket.starts - 2)
            if now < ticket.ended_at + min(wait, 30.0):
                self.complain(f"tried again too soon: {ticket}")
        elif now < ticket.called_at + terms.delay:
            self.complain(f"started too soon: {ticket}")
        elif now > ticket.called_at + terms.ttl:
            self.complain(f"started at {now}, after its ttl: {ticket}")

    def check_turn(self, ticket: Ticket) -> None:
        key = ticket.terms.key
        if key is None:
            return
        if key in self.key_runs:
            self.complain(f"runs beside {self.key_runs[key]}: {ticket}")
        if ticket.order < self.last_of_key.get(key, -1):
            self.complain(f"was overtaken by one of its key: {ticket}")
        self.last_of_key[key] = max(ticket.order, self.last_of_key.get(key, -1))
        self.key_runs[key] = ticket

    def tries(self, ticket: Ticket) -> Tries | None:
        """The retry policy of a job."""
        return ticket.terms.retry or self.plan.extras.get("retry")

    async def layer_that_counts(self, job: CurrentJob, call_next: Any) -> Any:
        self.begin(job.input)
        try:
            return await call_next(job)
        finally:
            self.finish(job.input)

    async def layer_that_passes(self, job: CurrentJob, call_next: Any) -> Any:
        return await call_next()

    async def layer_that_changes(self, job: CurrentJob, call_next: Any) -> Any:
        return await call_next(attrs.evolve(job, input=job.input))

    async def layer_that_answers(self, job: CurrentJob, call_next: Any) -> Any:
        if job.input.number % 5 == 4:
            return job.input.number
        return await call_next(job)

    async def layer_that_twice(self, job: CurrentJob, call_next: Any) -> Any:
        try:
            return await call_next(job)
        except Failure:
            return await call_next(job)

    async def handler(self, ticket: Ticket) -> int:
        if self.layers:
            return await self.work(ticket)
        self.begin(ticket)
        try:
            return await self.work(ticket)
        finally:
            self.finish(ticket)

    async def work(self, ticket: Ticket) -> int:
        kind, seconds = ticket.work.kind, ticket.work.seconds
        if kind == "cancel itself":
            ticket.asked_to_end = True
            current_job().cancel()
            if current_job().cancel():
                self.complain(f"cancelled twice by itself: {ticket}")
        try:
            with trio.CancelScope(shield=kind == "stubborn"):
                # No seconds: not even a checkpoint.
                if seconds:
                    await trio.sleep(seconds)
        except trio.Cancelled:
            if kind == "swallow":
                return ticket.number
            if kind == "fail when cancelled":
                raise Failure(ticket.number) from None
            if kind == "crash when cancelled":
                raise Fatal(ticket.number) from None
            raise
        if kind.startswith("nested"):
            await self.work_inside(ticket)
        first = ticket.starts == 1
        if kind == "fail" or (kind == "flaky" and first):
            raise Failure(ticket.number)
        if kind == "break":
            raise Broken(ticket.number)
        if kind == "crash" or (kind == "flaky crash" and first):
            raise Fatal(ticket.number)
        if kind == "exit":
            raise SystemExit(ticket.number)
        return ticket.number

    async def work_inside(self, ticket: Ticket) -> None:
        """Have the pool do more, within a job of it."""
        if self.plan.extras.get("limiter", math.inf) <= self.most:
            # A job that holds the last token of a limiter must not wait for
            # another one: that is nothing that the pool could know of.
            return
        kind = ticket.work.kind
        terms = Terms(key=ticket.terms.key) if kind == "nested key" else Terms()
        tickets = [self.make(work, None, terms) for work in ticket.work.inner]
        for inner in tickets:
            inner.inside = ticket
        match kind:
            case "nested process" | "nested key":
                for inner in tickets:
                    await self.process(inner, 0)
            case "nested submit":
                for inner in tickets:
                    self.submit_nowait(inner, 0)
                for inner in tickets:
                    if inner.reply is not None:
                        await self.read_reply(inner, inner.reply)
            case "nested map":
                self.items.update(inner.number for inner in tickets)
                await self.map(tickets, tickets, {})
            case "nested lease":
                await self.lease(tickets, 0)

    # Hooks: each accepted job is queued once, starts as often as it is tried,
    # and ends once; each worker that has started stops or crashes once.

    def note(self, event: Event) -> None:
        self.told.append(event)
        self.tally[event.kind] += 1

    def on_pool_start(self, event: PoolChanged) -> None:
        self.note(event)

    def on_pool_stop(self, event: PoolChanged) -> None:
        self.note(event)

    def on_resize(self, event: PoolResized) -> None:
        self.note(event)
        if event.old == event.new:
            self.complain(f"no resize: {event}")

    def on_worker_start(self, event: WorkerChanged) -> None:
        self.note(event)
        if event.worker in self.up:
            self.complain(f"started twice: {event}")
        self.up.add(event.worker)

    def on_worker_stop(self, event: WorkerChanged) -> None:
        self.note(event)
        if event.worker not in self.up:
            self.complain(f"stopped and did not run: {event}")
        self.up.discard(event.worker)

    def on_worker_crash(self, event: WorkerChanged) -> None:
        self.note(event)
        self.up.discard(event.worker)

    def on_worker_restart(self, event: WorkerChanged) -> None:
        self.note(event)

    def on_job_queue(self, event: JobChanged) -> None:
        self.note(event)
        if event.job_id in self.live:
            self.complain(f"queued twice: {event}")
        self.live[event.job_id] = 0
        self.check("on_job_queue")

    def on_job_start(self, event: JobChanged) -> None:
        self.note(event)
        if self.live.get(event.job_id) != event.attempts - 1:
            self.complain(f"started out of turn: {event}")
        self.live[event.job_id] = event.attempts
        self.check("on_job_start")

    def on_job_retry(self, event: JobChanged) -> None:
        self.note(event)
        if (
            self.live.get(event.job_id) != event.attempts
            or event.state is not JobState.DELAYED
            or event.error is None
            or event.delay is None
        ):
            self.complain(f"a strange retry: {event}")
        self.check("on_job_retry")

    def on_job_complete(self, event: JobChanged) -> None:
        self.note_end(event)

    def on_job_error(self, event: JobChanged) -> None:
        self.note_end(event)

    def on_job_cancel(self, event: JobChanged) -> None:
        self.note_end(event)

    def on_job_drop(self, event: JobChanged) -> None:
        self.note_end(event)

    def note_end(self, event: JobChanged) -> None:
        self.note(event)
        if self.live.pop(event.job_id, None) != event.attempts:
            self.complain(f"ended out of turn: {event}")
        self.tally[event.state.value] += 1
        if not event.state.terminal:
            self.complain(f"ended in a state that is no end: {event}")
        self.check(f"end as {event.state}")

    # What answers may say.

    def make(
        self, work: Work, timeout: float | None = None, terms: Terms | None = None
    ) -> Ticket:
        ticket = Ticket(len(self.tickets), work, timeout, terms or Terms())
        self.tickets.append(ticket)
        return ticket

    def answer(self, ticket: Ticket, value: Any, error: BaseException | None) -> None:
        """Note the answer to a job; it is to be the only one and a true one."""
        ticket.answers.append(value if error is None else error)
        if len(ticket.answers) > 1:
            self.complain(f"answered again: {ticket}")
        if ticket.runs:
            self.complain(f"answered while it runs: {ticket}")
        self.judge(ticket, value, error)

    def judge(self, ticket: Ticket, value: Any, error: BaseException | None) -> None:
        kind = ticket.work.kind
        options = self.plan.options
        started = bool(ticket.starts)
        match error:
            case None:
                true = value == ticket.number and started
            case Failure():
                true = error.args == (ticket.number,) and kind.startswith(
                    ("fail", "flaky")
                )
            case Broken():
                true = error.args == (ticket.number,) and kind == "break"
            case BaseExceptionGroup():
                # Cancelled, a map within it says what failed all the same.
                true = started and kind == "nested map"
            case JobTimeout():
                limit = ticket.timeout or options["timeout"]
                true = started and error.timeout == limit < math.inf
            case WorkerCrashed() if ticket.leased and not started:
                true = error.__cause__ is not None
            case WorkerCrashed():
                cause = error.__cause__
                true = started and kind.startswith(("crash", "exit", "flaky crash"))
                true = true and cause is not None and cause.args == (ticket.number,)
            case JobDropped():
                true = options["overflow"] == "drop_oldest"
                true = true and (not started or self.tries(ticket) is not None)
            case JobExpired():
                true = not started and ticket.terms.ttl < math.inf
            case BacklogFull():
                true = not started and options["overflow"] != "drop_oldest"
            case CircuitOpen():
                true = self.breaker is not None
            case WouldDeadlock():
                true = ticket.inside is not None
            case PoolClosed() | PoolBroken():
                true = self.pool.closed
            case JobCancelled():
                true = True
            case trio.Cancelled():
                true = True
            case _:
                true = False
        if not true:
            self.complain(f"a false answer {error!r} {value!r}: {ticket}")
        if isinstance(error, (JobError, *REFUSALS)) and error.started != started:
            self.complain(f"started is false in {error!r}: {ticket}")
        if isinstance(error, JobError) and error.attempts != ticket.starts:
            self.complain(f"attempts are false in {error!r}: {ticket}")

    def judge_tries(self, ticket: Ticket, error: BaseException) -> None:
        """It was tried as often as the policy says, and the error tells of it."""
        tries = self.tries(ticket)
        due = 1
        if tries is not None and tries.on not in ("raises", "none"):
            due = tries.attempts
        if ticket.starts != due:
            self.complain(f"tried {ticket.starts} times, not {due}: {ticket}")
        told = [note for note in getattr(error, "__notes__", ()) if "given up" in note]
        true = [f"trio_pool: given up after {due} attempts"] if due > 1 else []
        if told != true:
            self.complain(f"the notes {told} where {true} are due: {ticket}")

    # Deeds: what waits for the pool, each in a task of its own.

    def do(
        self,
        name: str,
        limit: float | None,
        act: Callable[..., Awaitable[None]],
        *args: Any,
    ) -> None:
        deed = Deed(name)
        if limit is not None:
            deed.scope.deadline = trio.current_time() + limit
        self.deeds.append(deed)
        self.nursery.start_soon(self.see_through, deed, act, args)

    def do_aside(self, act: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Do something that need not be over when the pool is."""
        scope = trio.CancelScope()

        async def act_aside() -> None:
            with scope:
                await act(*args)

        self.asides.append(scope)
        self.nursery.start_soon(act_aside)

    async def see_through(
        self, deed: Deed, act: Callable[..., Awaitable[None]], args: Any
    ) -> None:
        try:
            with deed.scope:
                await act(*args)
        except ExceptionGroup as group:
            # The failures of a map that was cancelled; the scope took the rest.
            self.check_notes(group)
        deed.ended = True
        self.check(f"end of {deed.name}")

    def give(self, ticket: Ticket) -> dict[str, Any]:
        """Note that a job is given in just now; return its options."""
        terms = ticket.terms
        ticket.order = self.given
        self.given += 1
        ticket.called_at = trio.current_time()
        options: dict[str, Any] = {"timeout": ticket.timeout}
        if terms.key is not None:
            options["key"] = terms.key
        if terms.retry is not None:
            options["retry"] = make_retry(terms.retry)
        if terms.delay:
            options["delay"] = terms.delay
        if terms.ttl < math.inf:
            options["ttl"] = terms.ttl
        if terms.drain is not None:
            options["drain"] = self.drains[terms.drain]
        if terms.uid is not None:
            options["id"] = terms.uid
        return options

    async def process(self, ticket: Ticket, priority: int) -> None:
        try:
            value = await self.pool.process(
                ticket, priority=priority, **self.give(ticket)
            )
        except BaseException as error:
            self.answer(ticket, None, error)
            if not isinstance(error, Exception):
                raise
        else:
            self.answer(ticket, value, None)

    async def submit(self, ticket: Ticket, priority: int) -> None:
        try:
            reply = await self.pool.submit(
                ticket, priority=priority, **self.give(ticket)
            )
        except (*REFUSALS, JobExpired) as error:
            self.answer(ticket, None, error)
        except ValueError as error:
            self.refused(ticket, error)
        except trio.Cancelled as error:
            self.answer(ticket, None, error)
            raise
        else:
            self.accepted(ticket, reply)

    def submit_nowait(self, ticket: Ticket, priority: int) -> None:
        try:
            reply = self.pool.submit_nowait(
                ticket, priority=priority, **self.give(ticket)
            )
        except REFUSALS as error:
            self.answer(ticket, None, error)
        except ValueError as error:
            self.refused(ticket, error)
        else:
            self.accepted(ticket, reply)

    def namesakes(self, ticket: Ticket) -> list[Ticket]:
        uid = ticket.terms.uid
        return [
            other
            for other in self.tickets
            if other is not ticket
            and uid is not None
            and other.terms.uid == uid
            and other.order >= 0
            and other.is_live()
        ]

    def refused(self, ticket: Ticket, error: ValueError) -> None:
        """A job was refused for its options."""
        ticket.answers.append(error)
        cannot_wait = ticket.terms.delay and not self.plan.options["max_backlog"]
        if not cannot_wait and not self.namesakes(ticket):
            self.complain(f"refused by {error!r}: {ticket}")
        if ticket.starts:
            self.complain(f"refused and run: {ticket}")

    def accepted(self, ticket: Ticket, reply: Reply[int]) -> None:
        ticket.reply = reply
        self.replies.append((ticket, reply))
        uid = ticket.terms.uid
        if uid is not None and reply.id != uid:
            self.complain(f"called {reply.id}: {ticket}")
        if not reply.done and any(other.reply for other in self.namesakes(ticket)):
            self.complain(f"its id was taken: {ticket}")

    async def read_reply(self, ticket: Ticket, reply: Reply[int]) -> None:
        value = error = None
        closed = self.pool.closed
        try:
            value = await reply.wait()
        except WouldDeadlock:
            return
        except Exception as caught:
            error = caught
        if ticket.runs or not reply.done:
            self.complain(f"read before its end: {ticket}")
        self.read.add(ticket.number)
        self.judge(ticket, value, error)
        disturbed = ticket.asked_to_end or self.breaker or closed or self.pool.closed
        if isinstance(error, Failure) and not disturbed:
            self.judge_tries(ticket, error)
        if error is None and ticket.terms.drain == "open":
            self.drained += self.drains["open"].collect()
            if ticket.number not in self.drained:
                self.complain(f"answered before its drain was: {ticket}")

    async def map(self, tickets: list[Ticket], items: Any, options: Any) -> None:
        try:
            values = await self.pool.map(items, **options)
        except ExceptionGroup as group:
            self.check_notes(group)
        except (BadSource, PoolClosed, PoolBroken, WouldDeadlock):
            pass
        else:
            if values != [ticket.number for ticket in tickets]:
                self.complain(f"map made {values} of {tickets}")
        finally:
            self.batch_ended(tickets)

    def check_notes(self, group: ExceptionGroup[Any]) -> None:
        for error in group.exceptions:
            notes = getattr(error, "__notes__", ())
            # The error of the input itself is of no item.
            if not isinstance(error, BadSource) and not any(
                note.startswith("trio_pool: item") for note in notes
            ):
                self.complain(f"a failure that names no item: {error!r}")

    async def settle(self, tickets: list[Ticket], items: Any, options: Any) -> None:
        try:
            settled = await self.pool.settle(items, **options)
        except (BadSource, PoolClosed, PoolBroken, WouldDeadlock):
            pass
        else:
            if len(settled) != len(tickets):
                self.complain(f"settle made {settled} of {tickets}")
            for index, one in enumerate(settled):
                if not isinstance(one, Settled) or one.item is not tickets[index]:
                    self.complain(f"settle gave {one} at {index}")
                else:
                    self.take_settled(one, index)
        finally:
            self.batch_ended(tickets)

    def take_settled(self, one: Settled[Ticket, int], index: int | None) -> None:
        if index is not None and one.index != index:
            self.complain(f"not in order: {one} at {index}")
        value = getattr(one.outcome, "value", None)
        self.answer(one.item, value, getattr(one.outcome, "error", None))

    async def stream(
        self,
        tickets: list[Ticket],
        items: Any,
        options: Any,
        reads: int,
        ordered: bool,
        outcomes: bool,
        ahead: int | None,
    ) -> None:
        self.streamed = True
        try:
            async with self.pool.stream(
                items, ordered=ordered, ahead=ahead, outcomes=outcomes, **options
            ) as stream:
                for index in range(reads):
                    try:
                        one = await anext(stream)
                    except (Failure, Broken, JobError, CircuitOpen):
                        continue
                    except StopAsyncIteration:
                        if index != len(tickets):
                            self.complain(f"a stream ended at {index} of {tickets}")
                        break
                    if isinstance(one, Settled):
                        self.take_settled(one, index if ordered else None)
                    elif ordered and one != tickets[index].number:
                        self.complain(f"stream gave {one} at {index}")
        except (BadSource, PoolClosed, PoolBroken):
            pass
        finally:
            self.batch_ended(tickets)

    def batch_ended(self, tickets: list[Ticket]) -> None:
        if any(ticket.runs for ticket in tickets):
            self.complain(f"a batch has ended before its jobs: {tickets}")

    async def lease(self, tickets: list[Ticket], priority: int) -> None:
        for ticket in tickets:
            ticket.leased = True
        try:
            async with self.pool.lease(priority=priority) as worker:
                self.leases[worker] = tickets
                try:
                    for ticket in tickets:
                        await self.process_leased(worker, ticket)
                finally:
                    del self.leases[worker]
        except (PoolClosed, PoolBroken, WouldDeadlock) as error:
            if any(ticket.answers for ticket in tickets):
                self.complain(f"a lease ended by {error!r}: {tickets}")

    async def process_leased(self, worker: LeasedWorker[Any, Any], one: Ticket) -> None:
        one.called_at = trio.current_time()
        try:
            value = await worker.process(one, timeout=one.timeout)
        except BaseException as error:
            self.answer(one, None, error)
            if not isinstance(error, Exception):
                raise
        else:
            self.answer(one, value, None)

    async def listen(self, buffer: int, seconds: float | None) -> None:
        listened = Listened(len(self.told))
        self.streams.append(listened)
        async with self.pool.events(buffer=buffer) as stream:
            async for event in stream:
                listened.heard.append(event)
                if seconds is not None:
                    await trio.sleep(seconds)
        listened.ended = True

    async def borrow(self, seconds: float) -> None:
        if self.limiter is not None:
            async with self.limiter:
                await trio.sleep(seconds)

    # Steps of the program.

    async def take_step(self, step: Any) -> None:
        name, *args = step
        match name:
            case "process" | "submit":
                work, timeout, limit, priority, terms = args
                ticket = self.make(work, timeout, terms)
                act = self.process if name == "process" else self.submit
                self.do(f"{name} {ticket.number}", limit, act, ticket, priority)
            case "submit_nowait":
                work, timeout, _, priority, terms = args
                self.submit_nowait(self.make(work, timeout, terms), priority)
            case "map" | "settle" | "stream":
                works, source, timeout, limit, priority, tries, *how = args
                terms = Terms(retry=tries)
                tickets = [self.make(work, timeout, terms) for work in works]
                self.items.update(ticket.number for ticket in tickets)
                items = make_source(source, tickets)
                options = {"timeout": timeout, "priority": priority}
                options["retry"] = make_retry(tries)
                act = {"map": self.map, "settle": self.settle, "stream": self.stream}
                self.do(name, limit, act[name], tickets, items, options, *how)
            case "lease":
                works, timeout, limit, priority = args
                tickets = [self.make(work, timeout) for work in works]
                self.do(name, limit, self.lease, tickets, priority)
            case "sleep":
                await trio.sleep(args[0])
            case "checkpoint":
                await trio.lowlevel.checkpoint()
            case "calm":
                await wait_all_tasks_blocked()
            case "cancel reply":
                self.cancel_reply(args[0])
            case "read reply":
                if self.replies:
                    ticket, reply = self.replies[args[0] % len(self.replies)]
                    self.do("read reply", args[1], self.read_reply, ticket, reply)
            case "cancel caller":
                if self.deeds:
                    self.deeds[args[0] % len(self.deeds)].scope.cancel()
            case "events":
                buffer, seconds = args
                if seconds is None:
                    self.do(name, None, self.listen, buffer, None)
                else:
                    self.do_aside(self.listen, *args)
            case "borrow":
                self.do_aside(self.borrow, *args)
            case "reset":
                if self.breaker is not None:
                    self.breaker.reset()
            case _:
                await self.control(name, args)

    def cancel_reply(self, which: int) -> None:
        if not self.replies:
            return
        ticket, reply = self.replies[which % len(self.replies)]
        waiting = not reply.done and not ticket.runs
        ticket.asked_to_end = True
        first = reply.cancel()
        if reply.cancel():
            self.complain(f"cancelled twice: {ticket}")
        if first and waiting and reply.state is not JobState.CANCELLED:
            self.complain(f"waits although it was cancelled: {ticket}")

    async def control(self, name: str, args: list[Any]) -> None:
        pool = self.pool
        try:
            match name:
                case "pause":
                    pool.pause()
                case "resume":
                    pool.resume()
                case "cancel":
                    pool.cancel()
                    self.expect_stop("cancel")
                case "resize":
                    await self.resize(*args)
                case "join":
                    accepted = pool.statistics().accepted
                    with trio.move_on_after(args[0]) as scope:
                        await pool.join()
                    count = pool.statistics()
                    live = count.delayed + count.queued + count.running
                    if not scope.cancelled_caught and accepted > count.accepted - live:
                        self.complain(f"join left: {count}")
                case "shutdown":
                    await self.shut_down(*args)
        except (PoolClosed, PoolBroken):
            if not pool.closed:
                self.complain(f"{name} was refused by an open pool")

    async def resize(self, size: int, seconds: float) -> None:
        scale = self.scale
        if scale is not None and not scale.min <= size <= scale.max:
            with pytest.raises(ValueError, match="size"):
                await self.pool.resize(size)
            return
        if not self.pool.closed:
            self.bound = max(self.bound, size)
        with trio.move_on_after(seconds) as scope:
            await self.pool.resize(size)
        if not scope.cancelled_caught and scale is None:
            self.bound = size

    async def shut_down(self, grace: float, seconds: float) -> None:
        count = self.pool.statistics()
        live = 0 if self.pool.closed else count.delayed + count.queued + count.running
        with trio.move_on_after(seconds) as scope:
            report = await self.pool.shutdown(grace)
        if not self.pool.closed:
            self.complain("shutdown left the pool open")
        if scope.cancelled_caught:
            return
        # Batches may have gone on with what they had not taken before.
        if sum(attrs.astuple(report)) < live:
            self.complain(f"{report} of {live} jobs")
        if not report.unfinished:
            self.expect_stop("shutdown")

    def expect_stop(self, where: str) -> None:
        count = self.pool.statistics()
        waiting = count.queued + count.delayed
        if waiting or (where == "shutdown" and count.running):
            self.complain(f"{where} left jobs: {count}")

    # The end.

    def check_end(self, before: set[Any]) -> None:
        """Nothing runs, nothing waits, nobody lacks an answer, nothing is left."""
        self.check("end")
        count = self.pool.statistics()
        if count.queued or count.running or count.delayed or count.workers:
            self.complain(f"left behind: {count}")
        if self.running or self.members or self.key_runs:
            self.complain(f"{self.running} handlers of {self.members} workers run")
        if all_tasks() - before - set(self.nursery.child_tasks):
            self.complain("a task of the pool is left")
        for ticket, reply in self.replies:
            if not reply.done or reply.outcome is None:
                self.complain(f"never answered: {ticket}")
        if self.breaker is not None and self.breaker.statistics().probing:
            self.complain(f"a probe is left: {self.breaker.statistics()}")
        self.check_attempts()
        self.check_drains()
        if self.plan.watched:
            self.check_events()

    def check_attempts(self) -> None:
        count = self.pool.statistics()
        if count.run.count != len(self.attempts):
            self.complain(f"{len(self.attempts)} attempts were run: {count}")
        if count.wait.count != len(self.attempts) - self.batched:
            self.complain(
                f"{len(self.attempts) - self.batched} were waited for: {count}"
            )
        if self.rate is None:
            return
        for number, begin in enumerate(self.attempts):
            for more, end in enumerate(self.attempts[number:], 1):
                if more > self.rate.burst + (end - begin) * self.rate.jobs + 1e-6:
                    self.complain(f"{more} starts from {begin} to {end}")

    def check_drains(self) -> None:
        self.drained += self.drains["open"].collect()
        due = [
            ticket.number
            for ticket, reply in self.replies
            if ticket.terms.drain == "open" and reply.state is JobState.DONE
        ]
        if sorted(self.drained) != sorted(due):
            self.complain(f"the drain has {self.drained}, not {due}")
        if self.drains["closed"].total:
            self.complain("a closed drain took something")

    def check_events(self) -> None:
        count = self.pool.statistics()
        tally = self.tally
        if self.live:
            self.complain(f"queued and not ended: {self.live}")
        if self.up:
            self.complain(f"started and not stopped: {self.up}")
        if tally["job_queue"] != count.accepted:
            self.complain(f"{tally['job_queue']} jobs were queued: {count}")
        if tally["job_start"] != len(self.attempts):
            self.complain(f"{tally['job_start']} starts of {len(self.attempts)}")
        if (tally["job_retry"], tally["worker_restart"]) != (
            count.retries,
            count.restarts,
        ):
            self.complain(f"other retries or restarts: {tally} {count}")
        for state in JobState:
            if state.terminal and tally[state.value] != getattr(count, state.value):
                self.complain(f"{tally[state.value]} were {state}: {count}")
        if [event.kind for event in self.told][-1:] != ["pool_stop"]:
            self.complain(f"the last that was told: {self.told[-1:]}")
        for listened in self.streams:
            self.check_stream(listened)

    def check_stream(self, listened: Listened) -> None:
        """Compare a stream with the hooks: nothing is missing that it does not say."""
        at = listened.begin
        for event in listened.heard:
            if isinstance(event, EventsLost):
                at += event.count
            elif at < len(self.told) and event is self.told[at]:
                at += 1
            else:
                self.complain(f"a stream gave {event} as number {at}")
                return
        if listened.ended and at != len(self.told):
            self.complain(f"a stream ended at {at} of {len(self.told)} events")

    def check_unread(self, reported: ExceptionGroup[Any] | None) -> None:
        """Every failure of a submitted job was read, or left the block."""
        known = [] if reported is None else list(reported.exceptions)
        bad = (JobState.FAILED, JobState.TIMED_OUT, JobState.LOST)
        unread = [
            reply.outcome.error  # type: ignore[union-attr]
            for ticket, reply in self.replies
            if reply.state in bad and ticket.number not in self.read
        ]
        unread = [error for error in unread if not isinstance(error, PoolBroken)]
        if any(not any(error is other for other in known) for error in unread):
            self.complain(f"a silent failure among {unread}, reported {known}")
        if len(known) != len(unread) and not self.streamed:
            self.complain(f"reported {known} where {unread} were unread")


class EveryStep(trio.abc.Instrument):
    """Looks at the books whenever trio has run a task for a moment."""

    def __init__(self, world: World) -> None:
        self._world = world

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        # An error here would be logged, and this not called again.
        self._world.check("a step")


class AsyncItems:
    """An input that sleeps before each item."""

    def __init__(self, items: list[Ticket]) -> None:
        self._items = iter(items)

    def __aiter__(self) -> AsyncItems:
        return self

    async def __anext__(self) -> Ticket:
        await trio.sleep(0.25)
        for item in self._items:
            return item
        raise StopAsyncIteration


def make_source(kind: str, tickets: list[Ticket]) -> Any:
    if kind == "list":
        return tickets
    if kind == "async":
        return AsyncItems(tickets)
    return generate(tickets, bad=kind == "bad")


def generate(tickets: list[Ticket], bad: bool) -> Iterator[Ticket]:
    yield from tickets
    if bad:
        raise BadSource


async def play_plan(plan: Plan) -> list[str]:
    """Run a whole program, looking at everything after each step."""
    ending = Ending()
    reported: ExceptionGroup[Any] | None = None
    left: BaseException | None = None
    with trio.fail_after(FOR_EVER) as guard:
        async with trio.open_nursery() as nursery:
            world = World(plan, nursery)
            before = all_tasks()
            watching = EveryStep(world)
            trio.lowlevel.add_instrument(watching)
            block = trio.CancelScope()
            try:
                with block:
                    async with world.open() as pool:
                        world.pool = pool
                        for step in (*plan.steps, *plan.late_steps):
                            await world.take_step(step)
                            world.check(f"after {step}")
                        if plan.lasts:
                            await trio.sleep(plan.lasts)
                        if plan.ending == "raise":
                            raise ending
                        if plan.ending == "cancel scope":
                            block.cancel()
            except (PoolBroken, Ending, ExceptionGroup) as error:
                left = error
            world.check_end(before)
            if isinstance(left, ExceptionGroup):
                broken = left.subgroup(PoolBroken) is not None
                reported = None if broken else left
                # Two failures of their own, the block's and the pool's, may
                # share a group; a cancelled block has none.
                if broken and left.subgroup(Ending) is None:
                    world.complain(f"not bare: {left!r}")
            if plan.options["unobserved"] == "raise" and (
                reported is not None or (left is None and not block.cancelled_caught)
            ):
                world.check_unread(reported)
            elif reported is not None:
                world.complain(f"must not be raised: {reported!r}")
            if isinstance(left, PoolBroken) and left.__cause__ is None:
                world.complain("the pool broke of nothing")
            if isinstance(left, Ending) and left is not ending:
                world.complain("another error left the block")
            for scope in world.asides:
                scope.cancel()
            await wait_all_tasks_blocked()
            if world.limiter is not None and world.limiter.borrowed_tokens:
                world.complain(f"tokens are left lent: {world.limiter}")
            for deed in world.deeds:
                if not deed.ended:
                    world.complain(f"nobody answered: {deed}")
            timers = trio.lowlevel.current_statistics().seconds_to_next_deadline
            if timers != guard.deadline - trio.current_time():
                world.complain("a timer is left")
            trio.lowlevel.remove_instrument(watching)
            nursery.cancel_scope.cancel()
    return world.problems


def plan_of(*steps: Any, backlog: float = math.inf, **extras: Any) -> Plan:
    """Make a program for a pool of one worker, that is left when it has rested."""
    options = {
        "max_backlog": backlog,
        "overflow": "wait",
        "unobserved": "ignore",
        "grace": math.inf,
        "timeout": math.inf,
    }
    return Plan(1, options, math.inf, True, "leave", steps, (), 3.0, extras)


@given(plans)
# What chance rarely finds: the circuit opens while a job waits for its second
# attempt; a ttl ends at the door; a job leaves its worker before it starts.
@example(
    plan_of(
        (
            "submit_nowait",
            Work("flaky", 0.0),
            None,
            None,
            0,
            Terms(retry=Tries(2, 0.25, 1.0, "any")),
        ),
        ("calm",),
        ("submit_nowait", Work("fail", 1.0), None, None, 0, Terms()),
        breaker=(2, math.inf, 100.0, 1),
    )
)
@example(
    plan_of(
        ("submit", Work("value", 1.5), None, None, 0, Terms()),
        ("calm",),
        ("submit", Work("value", 0.0), None, None, 0, Terms(ttl=0.25)),
        backlog=0,
    )
)
@example(
    plan_of(
        ("submit_nowait", Work("value", 0.0), None, None, 0, Terms(key="a")),
        ("cancel reply", 0),
    )
)
def test_books_bounds_and_answers_hold_whatever_happens(plan: Plan) -> None:
    """Each job ends once with a true answer, and the block leaves nothing."""

    async def main() -> list[str]:
        return await play_plan(plan)

    assert run(main) == []
