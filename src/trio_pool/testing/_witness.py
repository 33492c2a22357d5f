"""What a pool under test did with each job, held against what it promises."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeAlias, final

import attrs
import trio

from .. import (
    BacklogFull,
    CircuitOpen,
    JobCancelled,
    JobDropped,
    JobExpired,
    JobTimeout,
    PoolBroken,
    PoolClosed,
    WorkerCrashed,
    WouldDeadlock,
    current_job,
)
from ._faults import Fault, Faults, InjectedCrash, InjectedFault
from ._groups import leaves
from ._hosted import Abandoned

AnyHandler: TypeAlias = Callable[[Any], Awaitable[Any]]
AnyFactory: TypeAlias = Callable[[], AbstractAsyncContextManager[AnyHandler]]

# What the pool itself says of a job; everything else comes from the handler.
_OURS = (
    *(PoolClosed, BacklogFull, CircuitOpen, WouldDeadlock, JobDropped, JobExpired),
    *(JobCancelled, JobTimeout, PoolBroken, WorkerCrashed),
)

# Seconds that may be lost as times are added up in floats.
_ROUNDING = 1e-6


@attrs.define(eq=False)
class Attempt:
    """One start of the handler with a job."""

    began: float
    ended: bool = False
    cancelled: bool = False
    """Whether it had been cancelled when it ended."""
    result: Any = None
    error: BaseException | None = None


@final
@attrs.define(eq=False)
class Ticket:
    """What the pool is given in the place of a job's input, with its history."""

    input: Any
    fault: Fault | None = None
    """What goes wrong with its first attempt."""
    key: Hashable = None
    timeout: float = math.inf
    """Seconds that an attempt may take."""
    delay: float = 0.0
    ttl: float = math.inf
    leased: bool = False
    """Whether it is given to a worker that was taken for several jobs."""
    place: int = 0
    """Its place among all that were given in; 0 while it has not been."""
    given: float = 0.0
    """When that was."""
    attempts: list[Attempt] = attrs.field(factory=list)

    def __repr__(self) -> str:
        return repr(self.input)

    @property
    def last(self) -> Attempt | None:
        """The latest attempt."""
        return self.attempts[-1] if self.attempts else None

    @property
    def hangs(self) -> bool:
        """Whether its last attempt was made to do nothing but wait."""
        return (
            len(self.attempts) == 1
            and self.fault is not None
            and (self.fault.kind == "hang" and self.fault.moment == "before")
        )

    @property
    def runs(self) -> bool:
        """Whether an attempt goes on."""
        return bool(self.attempts) and not self.attempts[-1].ended


@attrs.define(eq=False)
class Watched:
    """A handler in the place of the user's, which it calls."""

    witness: Witness
    inner: AnyHandler
    most: float
    """Jobs that it may be given, but for those of one who has leased its worker."""
    starts: int = attrs.field(default=0, init=False)

    async def __call__(self, job_input: Any) -> Any:
        """Run a job, and note what comes of it."""
        return await self.witness.play(self, job_input)


@final
@attrs.define(eq=False)
class WatchedReady(Watched):
    """The same for one that is asked whether it is ready before each job."""

    ready: Callable[[], Awaitable[object]]


@final
class Witness:
    """Stands between the pool and the user's handler, and takes notes.

    ``trouble`` is the first thing that it saw and that must not be.
    """

    def __init__(
        self, counts: Counter[str], raises: tuple[type[BaseException], ...]
    ) -> None:
        self.trouble: BaseException | None = None
        self.counts = counts
        self.failing_setups = 0
        self.open_contexts = 0
        self.may_run: Callable[[], float] = lambda: math.inf
        self._raises = raises
        self.has_middleware = False
        """Between handlers and answers, both of which it may do without."""
        self.max_jobs = math.inf
        """Jobs of one life of a worker."""
        self.asks_ready = False
        """Whether workers are not free to take jobs whenever they are idle."""
        self.tasks: set[trio.lowlevel.Task] = set()
        """Those that are in handlers."""
        self._on_worker: dict[int, Ticket] = {}
        self._on_key: dict[Hashable, Ticket] = {}
        self._latest: dict[Hashable, Ticket] = {}
        self._places = itertools.count(1)

    def claim(self, fact: object, otherwise: str) -> None:
        """Take it for trouble if this is not so."""
        if not fact:
            self.report(AssertionError(otherwise))

    def report(self, trouble: BaseException) -> None:
        """Note trouble; the first is what the rest may follow from."""
        if self.trouble is None:
            self.trouble = trouble

    def give_in(self, ticket: Ticket) -> None:
        """Note that a job is given in, in this step."""
        ticket.place, ticket.given = next(self._places), trio.current_time()

    # Between the pool and the user's code.

    def watch(self, handler: AnyHandler, most: float = math.inf) -> Watched:
        """Return what the pool is given in the place of a handler."""
        ready = getattr(handler, "ready", None)
        if ready is None:
            return Watched(self, handler, most)
        self.asks_ready = True
        return WatchedReady(self, handler, most, ready)

    @asynccontextmanager
    async def live(self, factory: AnyFactory) -> AsyncGenerator[AnyHandler, None]:
        """Be one life of a worker: enter the user's context, watch its handler."""
        if self.failing_setups:
            self.failing_setups -= 1
            self.counts["failed setups"] += 1
            raise InjectedFault("setup")
        told: BaseException | None = None
        try:
            async with factory() as handler:
                self.counts["setups"] += 1
                self.open_contexts += 1
                try:
                    yield self.watch(handler, self.max_jobs)
                except BaseException as error:
                    told = error
                    raise
                finally:
                    self.open_contexts -= 1
        except BaseException as error:
            # What its cleanup was told is no error of its own.
            if error is not told:
                self._judge_user(error)
            raise

    async def play(self, watched: Watched, job_input: Any) -> Any:
        """Run one attempt of a job."""
        if isinstance(job_input, Ticket):
            ticket = job_input
        else:
            # From a rule of the user's, which may have leased the worker.
            ticket = Ticket(job_input, leased=True)
        handler = watched.inner
        watched.starts += 1
        self.claim(
            watched.starts <= watched.most or ticket.leased,
            f"job {ticket!r} is number {watched.starts} of its worker, which was to "
            f"be replaced after {watched.most}",
        )
        worker = current_job().worker
        attempt = self._begin(ticket, worker)
        task = trio.lowlevel.current_task()
        self.tasks.add(task)
        try:
            if ticket.fault is not None and len(ticket.attempts) == 1:
                faults = Faults(seed=0)
                faults.strike_next(ticket.fault)
                handler = faults.handler(handler)
            attempt.result = await handler(ticket.input)
        except BaseException as error:
            attempt.error = error
            self._judge_user(error)
            raise
        finally:
            self.tasks.discard(task)
            attempt.ended = True
            self._judge_time(ticket, attempt)
            self._on_worker.pop(worker, None)
            if ticket.key is not None:
                self._on_key.pop(ticket.key, None)
        return attempt.result

    def _begin(self, ticket: Ticket, worker: int) -> Attempt:
        self.claim(not ticket.runs, f"job {ticket!r} runs twice at one time")
        self.claim(
            worker not in self._on_worker,
            f"worker {worker} runs jobs {self._on_worker.get(worker)!r} and "
            f"{ticket!r} at one time",
        )
        self._on_worker[worker] = ticket
        running, most = len(self._on_worker), self.may_run()
        self.claim(running <= most, f"{running} jobs run at one time, not {most}")
        if ticket.key is not None:
            self.claim(
                ticket.key not in self._on_key,
                f"jobs {self._on_key.get(ticket.key)!r} and {ticket!r} run at one "
                f"time, both with the key {ticket.key!r}",
            )
            self._on_key[ticket.key] = ticket
        now = trio.current_time()
        if ticket.place and not ticket.attempts and not self.has_middleware:
            self._judge_start(ticket, now)
        attempt = Attempt(now)
        ticket.attempts.append(attempt)
        self.counts["attempts"] += 1
        return attempt

    def _judge_start(self, ticket: Ticket, now: float) -> None:
        """See that a job starts neither too early nor too late, nor out of turn."""
        waited = now - ticket.given
        self.claim(
            waited > ticket.delay - _ROUNDING,
            f"job {ticket!r} started after {waited} seconds, despite its delay of "
            f"{ticket.delay} seconds",
        )
        self.claim(
            waited < ticket.ttl + _ROUNDING,
            f"job {ticket!r} started after {waited} seconds, despite its ttl of "
            f"{ticket.ttl} seconds",
        )
        if ticket.key is not None:
            latest = self._latest.get(ticket.key)
            self.claim(
                latest is None or latest.place < ticket.place,
                f"job {ticket!r} was given in before {latest!r}, but started after "
                f"it, both with the key {ticket.key!r}",
            )
            self._latest[ticket.key] = ticket

    def _judge_time(self, ticket: Ticket, attempt: Attempt) -> None:
        """See that no attempt takes longer than it may, unless it will not end."""
        attempt.cancelled = trio.current_effective_deadline() == -math.inf
        late = trio.current_time() - attempt.began - ticket.timeout
        self.claim(
            late < _ROUNDING or (attempt.cancelled and not ticket.hangs),
            f"job {ticket!r} ran {late} seconds longer than its timeout of "
            f"{ticket.timeout} seconds",
        )

    def _judge_user(self, error: BaseException) -> None:
        """Tell what the user's code may raise from what it may not."""
        known = (
            *(trio.Cancelled, InjectedFault, InjectedCrash, WorkerCrashed, Abandoned),
            *self._raises,
        )
        for leaf in leaves(error):
            if not isinstance(leaf, known):
                self.report(leaf)

    # Answers.

    def judge_result(self, ticket: Ticket, result: object) -> None:
        """Hold the result of a job against what its handler returned."""
        self.counts["results"] += 1
        last = self._last(ticket, f"has the result {result!r}")
        if last is not None and not self.has_middleware:
            self.claim(
                last.error is None and last.result is result,
                f"job {ticket!r} has the result {result!r}, but its handler "
                f"{_tell(last)}",
            )

    def judge_error(self, ticket: Ticket, error: BaseException) -> None:
        """Hold the error of a job against what its handler did."""
        self.counts[type(error).__name__] += 1
        if isinstance(error, _OURS):
            self._judge_ours(ticket, error)
            return
        last = self._last(ticket, f"has the error {error!r}")
        if last is not None and not self.has_middleware:
            self.claim(
                last.error is error,
                f"job {ticket!r} has the error {error!r}, but its handler "
                f"{_tell(last)}",
            )

    def _last(self, ticket: Ticket, has: str) -> Attempt | None:
        last = ticket.last
        self.claim(last is not None, f"job {ticket!r} {has}, but was never started")
        self.claim(not ticket.runs, f"job {ticket!r} {has}, but is still running")
        return last

    def _judge_ours(self, ticket: Ticket, error: Any) -> None:
        starts = len(ticket.attempts)
        self.claim(not ticket.runs, f"{error!r} came while job {ticket!r} still ran")
        if not error.started:
            self.claim(not starts, f"job {ticket!r} was started, despite {error!r}")
        elif not self.has_middleware:
            self.claim(starts, f"job {ticket!r} was never started, despite {error!r}")
        if isinstance(error, JobTimeout) and not self.has_middleware and ticket.last:
            over = ticket.last.began + error.timeout
            early = over - trio.current_time()
            self.claim(early < _ROUNDING, f"{error!r} came {early} seconds too early")
        if isinstance(error, JobExpired) and ticket.place:
            early = ticket.given + ticket.ttl - trio.current_time()
            self.claim(early < _ROUNDING, f"{error!r} came {early} seconds too early")


def _tell(attempt: Attempt) -> str:
    if attempt.error is not None:
        return f"raised {attempt.error!r}"
    return f"returned {attempt.result!r}"
