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
from hypothesis import given
from hypothesis import strategies as st
from strategies import Body, Call, Caller, Plan, Scope, Work, callers, plans
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_pool import (
    BacklogFull,
    Backoff,
    Hooks,
    JobCancelled,
    JobChanged,
    JobDropped,
    JobError,
    JobState,
    JobTimeout,
    Pool,
    PoolBroken,
    PoolClosed,
    Reply,
    Restart,
    Settled,
    WorkerCrashed,
    open_pool,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator

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


async def call_by_pool(
    callers: list[Caller], spare: int, kind: str, backlog: float, watched: bool
) -> list[Observed]:
    size = len(callers) + spare
    options: Any = {"max_backlog": backlog, "hooks": [Listening()] if watched else []}
    before = all_tasks()
    if kind == "task pool":
        async with open_pool(size, **options) as tasks:
            observed = await observe(
                lambda errand: tasks.process(handle, errand), callers, True
            )
            count = tasks.statistics()
    else:
        opened = (
            open_pool(size, handle, **options)
            if kind == "handler"
            else open_pool(size, worker=worker_with_state, **options)
        )
        async with opened as pool:
            observed = await observe(pool.process, callers, True)
            count = pool.statistics()
    assert all_tasks() == before
    assert count.restarts == count.running == count.queued == 0
    return observed


@given(
    st.lists(callers, min_size=1, max_size=3),
    st.integers(0, 2),
    st.sampled_from(["handler", "worker", "task pool"]),
    st.sampled_from([0, 3, math.inf]),
    st.booleans(),
)
def test_process_is_observably_the_direct_call(
    callers: list[Caller], spare: int, kind: str, backlog: float, watched: bool
) -> None:
    """With idle workers: same outcome, same moments, same side effects."""

    async def directly() -> list[Observed]:
        return await observe(handle, callers, False)

    async def by_pool() -> list[Observed]:
        return await call_by_pool(callers, spare, kind, backlog, watched)

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
    return wrong


@attrs.define(eq=False)
class Ticket:
    """One job of ours: its work, and what has become of it so far."""

    number: int
    work: Work
    timeout: float | None = None
    starts: int = 0
    runs: bool = False
    answers: list[Any] = attrs.field(factory=list)


@attrs.define(eq=False)
class Deed:
    """A task of ours that waits for the pool."""

    name: str
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    ended: bool = False


class World(Hooks):
    """A program's own books, kept beside those of the pool."""

    def __init__(self, plan: Plan, nursery: trio.Nursery) -> None:
        self.plan = plan
        self.nursery = nursery
        self.pool: Pool[Ticket, int]
        self.bound = plan.size
        self.running = 0
        self.tickets: list[Ticket] = []
        self.replies: list[tuple[Ticket, Reply[int]]] = []
        self.read: set[int] = set()
        self.deeds: list[Deed] = []
        self.queued: Counter[int] = Counter()
        self.started: Counter[int] = Counter()
        self.ended: dict[int, list[JobState]] = {}
        self.stopping = False
        self.streamed = False
        self.problems: list[str] = []

    # What handlers, hooks and steps all look at.

    def check(self, where: str) -> None:
        """Compare the pool's books with themselves, the bounds and ours."""
        if not hasattr(self, "pool"):
            return
        wrong = books(self.pool)
        count = self.pool.statistics()
        if count.queued > self.plan.options["max_backlog"]:
            wrong.append(f"too many queued: {count}")
        if count.running > self.bound:
            wrong.append(f"more than {self.bound} running: {count}")
        if self.running > self.bound:
            wrong.append(f"more than {self.bound} handlers run: {self.running}")
        if self.running > count.running:
            wrong.append(f"{self.running} handlers run: {count}")
        self.problems += [f"{where}: {text}" for text in wrong]

    def complain(self, text: str) -> None:
        self.problems.append(text)

    async def handler(self, ticket: Ticket) -> int:
        ticket.starts += 1
        ticket.runs = True
        self.running += 1
        self.check(f"start of {ticket.work}")
        if ticket.starts > 1:
            self.complain(f"started again: {ticket}")
        if ticket.answers:
            self.complain(f"started after its answer: {ticket}")
        try:
            return await self.work(ticket)
        finally:
            ticket.runs = False
            self.check(f"end of {ticket.work}")
            self.running -= 1

    async def work(self, ticket: Ticket) -> int:
        kind, seconds = ticket.work.kind, ticket.work.seconds
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
        if kind == "fail":
            raise Failure(ticket.number)
        if kind == "break":
            raise Broken(ticket.number)
        if kind == "crash":
            raise Fatal(ticket.number)
        if kind == "exit":
            raise SystemExit(ticket.number)
        return ticket.number

    # Hooks: each accepted job is queued once, started at most once, ends once.

    def on_job_queue(self, event: JobChanged) -> None:
        self.queued[event.job_id] += 1
        self.check("on_job_queue")

    def on_job_start(self, event: JobChanged) -> None:
        self.started[event.job_id] += 1
        self.check("on_job_start")

    def on_job_complete(self, event: JobChanged) -> None:
        self.note_end(event)

    def on_job_error(self, event: JobChanged) -> None:
        self.note_end(event)

    def on_job_cancel(self, event: JobChanged) -> None:
        self.note_end(event)

    def on_job_drop(self, event: JobChanged) -> None:
        self.note_end(event)

    def note_end(self, event: JobChanged) -> None:
        self.ended.setdefault(event.job_id, []).append(event.state)
        if not event.state.terminal:
            self.complain(f"ended in a state that is no end: {event}")
        self.check(f"end as {event.state}")

    # What answers may say.

    def make(self, work: Work, timeout: float | None = None) -> Ticket:
        ticket = Ticket(len(self.tickets), work, timeout)
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
                true = error.args == (ticket.number,) and kind.startswith("fail")
            case Broken():
                true = error.args == (ticket.number,) and kind == "break"
            case JobTimeout():
                limit = ticket.timeout or options["timeout"]
                true = started and error.timeout == limit < math.inf
            case WorkerCrashed():
                cause = error.__cause__
                true = started and kind.startswith(("crash", "exit"))
                true = true and cause is not None and cause.args == (ticket.number,)
            case JobDropped():
                true = not started and options["overflow"] == "drop_oldest"
            case BacklogFull():
                true = not started and options["overflow"] != "drop_oldest"
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
        if isinstance(error, (JobError, PoolClosed, PoolBroken, BacklogFull)) and (
            error.started != started
        ):
            self.complain(f"started is false in {error!r}: {ticket}")
        if isinstance(error, JobError) and error.attempts != ticket.starts:
            self.complain(f"attempts are false in {error!r}: {ticket}")

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

    async def process(self, ticket: Ticket, priority: int) -> None:
        try:
            value = await self.pool.process(
                ticket, timeout=ticket.timeout, priority=priority
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
                ticket, timeout=ticket.timeout, priority=priority
            )
        except (BacklogFull, PoolClosed, PoolBroken) as error:
            self.answer(ticket, None, error)
        except trio.Cancelled as error:
            self.answer(ticket, None, error)
            raise
        else:
            self.replies.append((ticket, reply))

    async def read_reply(self, ticket: Ticket, reply: Reply[int]) -> None:
        value = error = None
        try:
            value = await reply.wait()
        except Exception as caught:
            error = caught
        if ticket.runs or not reply.done:
            self.complain(f"read before its end: {ticket}")
        self.read.add(reply.id)
        self.judge(ticket, value, error)

    async def map(self, tickets: list[Ticket], items: Any, options: Any) -> None:
        try:
            values = await self.pool.map(items, **options)
        except ExceptionGroup as group:
            self.check_notes(group)
        except (BadSource, PoolClosed, PoolBroken):
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
            if not notes and not isinstance(error, BadSource):
                self.complain(f"a failure that names no item: {error!r}")

    async def settle(self, tickets: list[Ticket], items: Any, options: Any) -> None:
        try:
            settled = await self.pool.settle(items, **options)
        except (BadSource, PoolClosed, PoolBroken):
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
                    except (Failure, Broken, JobError):
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

    # Steps of the program.

    async def take_step(self, step: Any) -> None:
        name, *args = step
        match name:
            case "process" | "submit":
                work, timeout, limit, priority = args
                ticket = self.make(work, timeout)
                act = self.process if name == "process" else self.submit
                self.do(f"{name} {ticket.number}", limit, act, ticket, priority)
            case "submit_nowait":
                work, timeout, _, priority = args
                ticket = self.make(work, timeout)
                try:
                    reply = self.pool.submit_nowait(
                        ticket, timeout=timeout, priority=priority
                    )
                except (BacklogFull, PoolClosed, PoolBroken) as error:
                    self.answer(ticket, None, error)
                else:
                    self.replies.append((ticket, reply))
            case "map" | "settle" | "stream":
                works, source, timeout, limit, priority, *how = args
                tickets = [self.make(work, timeout) for work in works]
                items = make_source(source, tickets)
                options = {"timeout": timeout, "priority": priority}
                act = {"map": self.map, "settle": self.settle, "stream": self.stream}
                self.do(name, limit, act[name], tickets, items, options, *how)
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
            case _:
                await self.control(name, args)

    def cancel_reply(self, which: int) -> None:
        if not self.replies:
            return
        ticket, reply = self.replies[which % len(self.replies)]
        waiting = not reply.done and not ticket.starts
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
                    if not scope.cancelled_caught and accepted > (
                        count.accepted - count.queued - count.running
                    ):
                        self.complain(f"join left: {count}")
                case "shutdown":
                    await self.shut_down(*args)
        except (PoolClosed, PoolBroken):
            if not pool.closed:
                self.complain(f"{name} was refused by an open pool")

    async def resize(self, size: int, seconds: float) -> None:
        if not self.pool.closed:
            self.bound = max(self.bound, size)
        with trio.move_on_after(seconds) as scope:
            await self.pool.resize(size)
        if not scope.cancelled_caught:
            self.bound = size

    async def shut_down(self, grace: float, seconds: float) -> None:
        with trio.move_on_after(seconds) as scope:
            report = await self.pool.shutdown(grace)
        if not self.pool.closed:
            self.complain("shutdown left the pool open")
        if not scope.cancelled_caught and not report.unfinished:
            self.expect_stop("shutdown")

    def expect_stop(self, where: str) -> None:
        count = self.pool.statistics()
        if count.queued or (where == "shutdown" and count.running):
            self.complain(f"{where} left jobs: {count}")

    # The end.

    def check_end(self, before: set[Any]) -> None:
        """Nothing runs, nothing waits, nobody lacks an answer, nothing is left."""
        self.check("end")
        count = self.pool.statistics()
        if count.queued or count.running or count.delayed or count.workers:
            self.complain(f"left behind: {count}")
        if self.running:
            self.complain(f"{self.running} handlers still run")
        if all_tasks() - before - set(self.nursery.child_tasks):
            self.complain("a task of the pool is left")
        for ticket, reply in self.replies:
            if not reply.done or reply.outcome is None:
                self.complain(f"never answered: {ticket}")
        if self.plan.watched:
            self.check_events()

    def check_events(self) -> None:
        count = self.pool.statistics()
        for job_id, times in self.queued.items():
            if times != 1 or len(self.ended.get(job_id, ())) != 1:
                self.complain(f"job {job_id}: queued {times}, {self.ended.get(job_id)}")
            if self.started[job_id] > 1:
                self.complain(f"job {job_id} was started {self.started[job_id]} times")
        if sum(self.queued.values()) != count.accepted:
            self.complain(f"{len(self.queued)} jobs were queued: {count}")
        if set(self.ended) != set(self.queued):
            self.complain("a job ended that was never accepted")
        tally = Counter(state for states in self.ended.values() for state in states)
        for state, number in tally.items():
            if getattr(count, state.value) != number:
                self.complain(f"{number} were {state}: {count}")

    def check_unread(self, reported: ExceptionGroup[Any] | None) -> None:
        """Every failure of a submitted job was read, or left the block."""
        known = [] if reported is None else list(reported.exceptions)
        bad = (JobState.FAILED, JobState.TIMED_OUT, JobState.LOST)
        unread = [
            reply.outcome.error  # type: ignore[union-attr]
            for _, reply in self.replies
            if reply.state in bad and reply.id not in self.read
        ]
        unread = [error for error in unread if not isinstance(error, PoolBroken)]
        if any(not any(error is other for other in known) for error in unread):
            self.complain(f"a silent failure among {unread}, reported {known}")
        if len(known) != len(unread) and not self.streamed:
            self.complain(f"reported {known} where {unread} were unread")


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
            block = trio.CancelScope()
            try:
                with block:
                    async with open_pool(
                        plan.size,
                        world.handler,
                        crash_on=Broken,
                        restart=Restart(plan.restart_limit, 60.0, Backoff(jitter=0)),
                        hooks=[world] if plan.watched else [],
                        **plan.options,
                    ) as pool:
                        world.pool = pool
                        for step in plan.steps:
                            await world.take_step(step)
                            world.check(f"after {step}")
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
            await wait_all_tasks_blocked()
            for deed in world.deeds:
                if not deed.ended:
                    world.complain(f"nobody answered: {deed}")
            timers = trio.lowlevel.current_statistics().seconds_to_next_deadline
            if timers != guard.deadline - trio.current_time():
                world.complain("a timer is left")
            nursery.cancel_scope.cancel()
    return world.problems


@given(plans)
def test_books_bounds_and_answers_hold_whatever_happens(plan: Plan) -> None:
    """Each job ends once with a true answer, and the block leaves nothing."""

    async def main() -> list[str]:
        return await play_plan(plan)

    assert run(main) == []
