"""The record of one job from acceptance to its terminal state, and its reply."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Generic, NoReturn, final

import outcome
import trio
from trio.lowlevel import Abort, current_task, enable_ki_protection, reschedule

from ._events import JobState, Out
from ._records import draft_of
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
    """What few jobs have: further options, what these hold, and a rare fate.

    Most jobs share the one of their pool, which nobody changes; see
    `Job.own_terms`.
    """

    # Defaults of the class, not of `__init__`: setting them all would cost a
    # job with a key a tenth of its time.
    rich = False
    """Whether there is anything here but a retry policy, a key and a rare fate."""
    delay = 0.0
    """Seconds to wait before the first start."""
    ttl = math.inf
    drain: Drain[Any] | None = None
    uid: int | str | None = None
    """The id that the user gave, or None."""
    born = 0.0
    """When it was given in, if delay or ttl count from there."""
    first_start = 0.0
    alarm: Alarm | None = None
    """Ends the delay, or the wait before the next attempt."""
    expiry: Alarm | None = None
    """Ends the job when its ttl is over."""
    token: object | None = None
    """The borrower in whose name the shared limiter has lent a token."""
    before = 0
    """Attempts that are over."""
    items = 1
    """With how many items of a batch it shares a call, and so its time."""
    put_back = False
    """Its worker was lost before it had started."""
    cancel_asked = False
    overdue = False
    leased = False
    raise_cancel: Callable[[], NoReturn] | None = None
    traceback: TracebackType | None = None

    retry: Retry | None = None
    key: Hashable = None


@final
class Job:
    """One piece of input with its options and its fate.

    Whoever mends the books mends this too, in the same step; nothing here
    decides. ``attempts`` is 0 until a worker has really started it.
    """

    # No more than most jobs need, as all of it has to come into the cache.
    __slots__ = (
        "attempts",
        "batch",
        "caller",
        "context",
        "deadline",
        "dispatch",
        "error",
        "id",
        "index",
        "input",
        "named",
        "permit",
        "priority",
        "queued_at",
        "readers",
        "started_at",
        "state",
        "terms",
        "timeout",
        "value",
        "waiting",
        "worker",
    )

    dispatch: Dispatch
    id: int
    input: Any
    context: Context
    timeout: float
    terms: Terms
    state: JobState | None
    priority: int
    attempts: int
    deadline: float
    batch: Batch | None
    error: BaseException | None
    worker: Worker | None
    caller: Task | None
    """The task that waits in ``process``."""
    readers: dict[Task, None] | None
    """The tasks that wait for the reply, or to be let in by ``submit``."""

    # From here on there is no value before it is first set: by who lets the
    # job wait, starts it, finishes it; by a batch; by who asks the breaker.
    waiting: bool
    queued_at: float
    started_at: float
    value: Any
    index: int
    named: int
    """The item of a batch that the id was given for."""
    permit: int | None

    def own_terms(self) -> Terms:
        """Return terms that are this job's alone."""
        if self.terms is self.dispatch.plain_terms:
            self.terms = new_terms(self.terms.retry)
        return self.terms

    def made_error(self) -> BaseException | None:
        """Return the error; of a job ended among many, make it at the first look.

        So many new objects at once would have the garbage collector look at
        everything there is, time and again.
        """
        if (
            self.error is None
            and self.state is JobState.CANCELLED
            and self.terms.raise_cancel is None
        ):
            self.error = self.dispatch.cancelled(self)
        return self.error

    def forget_error(self) -> None:
        """Let go of the error of an attempt, as another follows."""
        self.error = None
        if self.terms.traceback is not None:
            self.terms.traceback = None

    @property
    def item(self) -> Any:
        """The item of a batch that this job is about."""
        assert self.batch is not None
        return self.input if self.batch.fn is None else self.input[1][0]

    @property
    def begun(self) -> bool:
        """Whether the present attempt has really started."""
        return self.attempts > self.terms.before

    def waiters(self) -> list[Task]:
        """List the tasks that wait for the end of this job."""
        tasks = list(self.readers or ())
        if self.caller is not None:
            tasks.append(self.caller)
        if self.batch is not None:
            awaited = self.batch.owner, self.batch.sink.reader
            tasks += [task for task in awaited if task is not None]
        return tasks

    def is_stuck(self, task: Task) -> bool:
        """Say whether a task waits for it, and it waits for a worker."""
        is_awaited = self.caller is task or task in (self.readers or ())
        return is_awaited and self.state in _WAITING

    def name(self) -> int | str:
        """Return the id, which an item of a batch gets when it is asked for."""
        if self.terms.uid is not None:
            return self.terms.uid
        if self.batch is not None and self.named != self.index:
            self.named = self.index
            self.id = self.dispatch.next_id()
        return self.id

    def abort(self, raise_cancel: Callable[[], NoReturn]) -> Abort:
        """Trio wants the caller of ``process`` back: withdraw, or cancel the run."""
        if self.dispatch.withdraw(self):
            return Abort.SUCCEEDED
        self.own_terms().raise_cancel = raise_cancel
        self.dispatch.cancel_running(self)
        return Abort.FAILED

    def waited(self) -> float:
        """Say for how many seconds a running job stood in the backlog."""
        if self.queued_at < 0.0 or not self.begun:
            return 0.0
        return max(0.0, self.started_at - self.queued_at)

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
        error, terms = self.made_error(), self.terms
        raise_cancel, traceback = terms.raise_cancel, terms.traceback
        # The frames that the traceback tells of have the job.
        self.error = None
        if raise_cancel is not None:
            terms.raise_cancel = None
        if traceback is not None:
            terms.traceback = None
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
            raise_caught(error, traceback)
        finally:
            del error, traceback


def new_terms(retry: Retry | None) -> Terms:
    """Make terms; with an ``__init__`` this takes longer, as in `new_job`."""
    terms = Terms()
    terms.retry = retry
    return terms


def new_job(
    dispatch: Dispatch, job_id: int, job_input: Any, context: Context, timeout: float
) -> Job:
    """Make a job; with an ``__init__`` this takes a third longer."""
    job = Job()
    job.dispatch = dispatch
    job.id = job_id
    job.input = job_input
    job.context = context
    job.timeout = timeout
    job.terms = dispatch.plain_terms
    job.priority = job.attempts = 0
    job.deadline = math.inf
    job.state = job.batch = job.error = None
    job.worker = job.caller = job.readers = None
    return job


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

    if TYPE_CHECKING:
        # The pool's records are no part of the public types.
        _job: Any

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

            await job.dispatch.sleep(abort)
        job.dispatch.heard(job)
        error = job.made_error()
        if error is not None:
            traceback = job.terms.traceback
            # The job keeps its error, whose traceback will have this frame.
            del self, job
            try:
                raise_caught(error, traceback)
            finally:
                del error, traceback
        return job.value  # type: ignore[no-any-return]

    @enable_ki_protection
    def cancel(self) -> bool:
        """Ask for the job's end; say whether it had not ended or been asked yet.

        A waiting job leaves the backlog at once. The handler of a running one
        gets `trio.Cancelled`; if it returns a value all the same, that stands.
        Never waits.
        """
        job = self._job
        job.dispatch.check_thread()
        if self.done or job.terms.cancel_asked:
            return False
        job.own_terms().cancel_asked = True
        if not job.dispatch.withdraw(job):
            job.dispatch.cancel_running(job)
        return True

    @property
    def id(self) -> int | str:
        """The job's id: a number unique in its pool, or the one that was given."""
        return self._job.name()  # type: ignore[no-any-return]

    @property
    def state(self) -> JobState:
        """Where the job is."""
        return self._job.state  # type: ignore[no-any-return]

    @property
    def done(self) -> bool:
        """Whether the job has ended, in whatever way."""
        state: JobState = self._job.state
        return state is JobState.DONE or state.terminal

    @property
    def outcome(self) -> outcome.Value[Out] | outcome.Error | None:
        """The job's result or error, fresh at each look; None until it is done."""
        job = self._job
        if job.state is JobState.DONE:
            return new_value(job.value)
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
        return self._job.attempts  # type: ignore[no-any-return]


def new_reply(job: Job) -> Reply[Any]:
    """Make the reply of a job; only the pool does."""
    reply: Reply[Any] = Reply()
    reply._job = job  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    return reply


DraftValue = draft_of(outcome.Value)


def new_value(value: Any) -> outcome.Value[Any]:
    """Make the outcome of a value."""
    made = DraftValue()
    made._unwrapped = False  # noqa: SLF001
    made.value = value
    made.__class__ = outcome.Value
    return made  # type: ignore[no-any-return]


def outcome_of(job: Job) -> outcome.Value[Any] | outcome.Error:
    """Make the outcome of an ended job; an error has its caught traceback."""
    error = job.made_error()
    if error is None:
        return new_value(job.value)
    return outcome.Error(error.with_traceback(job.terms.traceback))
