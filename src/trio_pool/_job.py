"""The record of one job from acceptance to its terminal state, and its reply."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Generic, NoReturn, final

import outcome
import trio
from trio.lowlevel import Abort, current_task, reschedule, wait_task_rescheduled

from ._events import JobState, Out
from ._trio import WAKE

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from contextvars import Context
    from types import TracebackType

    from trio.lowlevel import Task

    from ._batch import Batch
    from ._dispatch import Dispatch
    from ._policy import Retry
    from ._timer import Alarm
    from ._worker import Worker
    from .drain import Drain


_WAITING = (None, JobState.DELAYED, JobState.QUEUED)


@final
class Terms:
    """What few jobs have: options beyond the plain ones, and what they hold."""

    __slots__ = (
        "alarm",
        "born",
        "delay",
        "drain",
        "expiry",
        "first_start",
        "key",
        "permit",
        "retry",
        "token",
        "ttl",
        "uid",
    )

    def __init__(
        self,
        key: Hashable = None,
        retry: Retry | None = None,
        delay: float = 0.0,
        ttl: float = math.inf,
        drain: Drain[Any] | None = None,
        uid: int | str | None = None,
    ) -> None:
        self.key = key
        self.retry = retry
        self.delay = delay
        """Seconds to wait before the first start."""
        self.ttl = ttl
        self.drain = drain
        self.uid = uid
        """The id that the user gave, or None."""
        self.born = 0.0
        """When it was given in, if delay or ttl count from there."""
        self.first_start = 0.0
        self.alarm: Alarm | None = None
        """Ends the delay, or the wait before the next attempt."""
        self.expiry: Alarm | None = None
        """Ends the job when its ttl is over."""
        self.permit: int | None = None
        """What the circuit breaker gave for it."""
        self.token: object | None = None
        """The borrower in whose name the shared limiter has lent a token."""


@final
class Job:
    """One piece of input with its options and its fate.

    Whoever mends the books mends this too, in the same step; nothing here
    decides. ``attempts`` is 0 until a worker has really started it; ``before``
    are those of them that are over.
    """

    # Defaults of the class, not of `__init__`: most jobs end without ever
    # having another value, and setting twenty fields costs as much as a job.
    state: JobState | None = None
    before = 0
    waiting = False
    cancel_asked = False
    overdue = False
    is_process = False
    leased = False
    queued_at = -1.0
    started_at = 0.0
    index = 0
    named = -1
    caller: Task | None = None
    raise_cancel: Callable[[], NoReturn] | None = None
    readers: dict[Task, None] | None = None
    worker: Worker | None = None
    terms: Terms | None = None
    value: Any = None
    traceback: TracebackType | None = None

    def __init__(
        self,
        dispatch: Dispatch,
        job_id: int,
        job_input: Any,
        context: Context,
        timeout: float,
    ) -> None:
        self.dispatch = dispatch
        self.id = job_id
        self.input = job_input
        self.context = context
        # What every job is asked for is quicker to find here, though.
        self.timeout = timeout
        self.priority = 0
        self.attempts = 0
        self.deadline = math.inf
        self.batch: Batch | None = None
        self.error: BaseException | None = None

    @property
    def item(self) -> Any:
        """The item of a batch that this job is about."""
        assert self.batch is not None
        return self.input if self.batch.fn is None else self.input[1][0]

    @property
    def begun(self) -> bool:
        """Whether the present attempt has really started."""
        return self.attempts > self.before

    def waiters(self) -> list[Task]:
        """List the tasks that wait for the end of this job."""
        tasks = list(self.readers or ())
        if self.caller is not None:
            tasks.append(self.caller)
        if self.batch is not None and self.batch.owner is not None:
            tasks.append(self.batch.owner)
        return tasks

    def is_stuck(self, task: Task) -> bool:
        """Say whether a task waits for it, and it waits for a worker."""
        is_awaited = self.caller is task or task in (self.readers or ())
        return is_awaited and self.state in _WAITING

    @property
    def key(self) -> Hashable:
        """Return the key, None if it has none."""
        return None if self.terms is None else self.terms.key

    def name(self) -> int | str:
        """Return the id, which an item of a batch gets when it is asked for."""
        if self.terms is not None and self.terms.uid is not None:
            return self.terms.uid
        if self.batch is not None and self.named != self.index:
            self.named = self.index
            self.id = self.dispatch.next_id()
        return self.id

    def abort(self, raise_cancel: Callable[[], NoReturn]) -> Abort:
        """Trio wants the caller of ``process`` back: withdraw, or cancel the run."""
        readers = self.readers
        self.readers = None
        if self.dispatch.withdraw(self):
            return Abort.SUCCEEDED
        self.readers = readers
        self.raise_cancel = raise_cancel
        self.dispatch.cancel_running(self)
        return Abort.FAILED

    def wake(self) -> None:
        """Wake everyone who waits for the end of this job."""
        if self.caller is not None:
            caller, self.caller = self.caller, None
            reschedule(caller, WAKE)
        elif self.readers:
            readers, self.readers = self.readers, None
            for reader in readers:
                reschedule(reader, WAKE)

    def raise_as_caller(self) -> NoReturn:
        """Raise what the direct call would have raised."""
        error = self.error
        raise_cancel, self.raise_cancel = self.raise_cancel, None
        if error is None:
            assert raise_cancel is not None
            raise_cancel()
        try:
            if raise_cancel is not None and not isinstance(error, Exception):
                # A group that still has the handler's Cancelled in it is for a
                # cancelled caller only; an interrupted one hears of Ctrl-C.
                try:
                    raise_cancel()
                except trio.Cancelled:
                    pass
            raise_caught(error, self.traceback)
        finally:
            del error


def _fix_layout() -> None:
    """Make the first job, which has every attribute that any will ever have.

    The interpreter is quick with the attributes of the first objects of a
    class; a later job with another one would take a microsecond longer.
    """
    nothing: Any = None
    first = Job(nothing, 0, nothing, nothing, 0.0)
    for name, default in tuple(vars(Job).items()):
        plain = not (callable(default) or isinstance(default, property))
        if plain and not name.startswith("__"):
            setattr(first, name, default)


_fix_layout()


def raise_caught(error: BaseException, traceback: TracebackType | None) -> NoReturn:
    """Raise an error as it was caught: no longer traceback, no other context.

    ``raise`` would put whatever the reader is handling just now over the
    ``__context__`` that the handler's own ``except`` block gave it.
    """
    context = error.__context__
    try:
        raise error.with_traceback(traceback)
    finally:
        if context is not None:
            error.__context__ = context
        del error, context


@final
class Reply(Generic[Out]):
    """The typed one-job channel that brings a job's result back.

    Any number of tasks may wait for it, any number of times. A reply can be
    kept and read after the pool's block.
    """

    __slots__ = ("_job",)

    # Only the pool makes replies; its records are no part of the public types.
    def __init__(self, job: Any) -> None:
        self._job: Job = job

    def __repr__(self) -> str:
        return f"<trio_pool.Reply of job {self.id!r}: {self.state.value}>"

    async def wait(self) -> Out:
        """Wait until the job has ended; return its result or raise its error.

        Each reader gets the error with the traceback it was caught with.
        Cancelling a wait only stops waiting: the job goes on.

        Raises:
          JobTimeout: it ran longer than its timeout.
          JobCancelled: it was cancelled.
          JobDropped: it made room for a newer job.
          JobExpired: it waited longer than its ttl.
          WouldDeadlock: the reader is a job that holds the last worker.
          WorkerCrashed: its worker died under it.
          PoolBroken: the pool gave up before the job ended.
        """
        job = self._job
        if self.done:
            await trio.lowlevel.checkpoint()
        else:
            task = current_task()
            readers = job.readers
            if readers is None:
                readers = job.readers = {}
            readers[task] = None
            try:
                job.dispatch.nesting.check(task, job, "Reply.wait()")
            except BaseException:
                del readers[task]
                raise

            def abort(_: object) -> Abort:
                del readers[task]
                return Abort.SUCCEEDED

            await wait_task_rescheduled(abort)
        job.dispatch.heard(job)
        if job.error is not None:
            raise_caught(job.error, job.traceback)
        return job.value  # type: ignore[no-any-return]

    def cancel(self) -> bool:
        """Ask for the job's end; say whether it had not ended or been asked yet.

        A waiting job leaves the backlog at once. The handler of a running one
        gets `trio.Cancelled`; if it returns a value all the same, that stands.
        Never waits.
        """
        job = self._job
        job.dispatch.check_thread()
        if self.done or job.cancel_asked:
            return False
        job.cancel_asked = True
        if not job.dispatch.withdraw(job):
            job.dispatch.cancel_running(job)
        return True

    @property
    def id(self) -> int | str:
        """The job's id: a number unique in its pool, or the one that was given."""
        return self._job.name()

    @property
    def state(self) -> JobState:
        """Where the job is."""
        state = self._job.state
        assert state is not None
        return state

    @property
    def done(self) -> bool:
        """Whether the job has ended, in whatever way."""
        return self.state.terminal

    @property
    def outcome(self) -> outcome.Value[Out] | outcome.Error | None:
        """The job's result or error, fresh at each look; None until it is done."""
        job = self._job
        if not self.done:
            return None
        job.dispatch.heard(job)
        return outcome_of(job)

    @property
    def worker(self) -> int | None:
        """The id of the worker that has or had the job."""
        worker = self._job.worker
        return None if worker is None else worker.id

    @property
    def attempts(self) -> int:
        """How often the job was started."""
        return self._job.attempts


def outcome_of(job: Job) -> outcome.Value[Any] | outcome.Error:
    """Make the outcome of an ended job; an error has its caught traceback."""
    if job.error is None:
        return outcome.Value(job.value)
    return outcome.Error(job.error.with_traceback(job.traceback))
