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
    from collections.abc import Callable
    from contextvars import Context
    from types import TracebackType

    from trio.lowlevel import Task

    from ._batch import Batch
    from ._supervisor import Supervisor
    from ._worker import Worker


@final
class Job:
    """One piece of input with its options and its fate.

    Whoever mends the books mends this too, in the same step; nothing here
    decides. ``attempts`` is 0 until a worker has really started it.
    """

    # Defaults of the class, not of `__init__`: most jobs end without ever
    # having another value, and setting twenty fields costs as much as a job.
    state: JobState | None = None
    attempts = 0
    priority = 0
    waiting = False
    cancel_asked = False
    overdue = False
    started_at = 0.0
    index = 0
    named = -1
    caller: Task | None = None
    raise_cancel: Callable[[], NoReturn] | None = None
    readers: dict[Task, None] | None = None
    worker: Worker | None = None
    value: Any = None
    traceback: TracebackType | None = None

    def __init__(
        self,
        supervisor: Supervisor,
        job_id: int,
        job_input: Any,
        context: Context,
        timeout: float,
    ) -> None:
        self.supervisor = supervisor
        self.id = job_id
        self.input = job_input
        self.context = context
        # What every job is asked for is quicker to find here, though.
        self.timeout = timeout
        self.deadline = math.inf
        self.batch: Batch | None = None
        self.error: BaseException | None = None

    @property
    def item(self) -> Any:
        """The item of a batch that this job is about."""
        assert self.batch is not None
        return self.input if self.batch.fn is None else self.input[1][0]

    def name(self) -> int:
        """Return the id, which an item of a batch gets when it is asked for."""
        if self.batch is not None and self.named != self.index:
            self.named = self.index
            self.id = self.supervisor.next_id()
        return self.id

    def abort(self, raise_cancel: Callable[[], NoReturn]) -> Abort:
        """Trio wants the caller of ``process`` back: withdraw, or cancel the run."""
        if self.supervisor.withdraw(self):
            return Abort.SUCCEEDED
        self.raise_cancel = raise_cancel
        self.supervisor.cancel_running(self)
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
        return f"<trio_pool.Reply of job {self.id}: {self.state.value}>"

    async def wait(self) -> Out:
        """Wait until the job has ended; return its result or raise its error.

        Each reader gets the error with the traceback it was caught with.
        Cancelling a wait only stops waiting: the job goes on.

        Raises:
          JobTimeout: it ran longer than its timeout.
          JobCancelled: it was cancelled.
          JobDropped: it made room for a newer job.
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

            def abort(_: object) -> Abort:
                del readers[task]
                return Abort.SUCCEEDED

            await wait_task_rescheduled(abort)
        job.supervisor.heard(job)
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
        job.supervisor.check_thread()
        if self.done or job.cancel_asked:
            return False
        job.cancel_asked = True
        if not job.supervisor.withdraw(job):
            job.supervisor.cancel_running(job)
        return True

    @property
    def id(self) -> int:
        """The job's id, unique in its pool."""
        return self._job.id

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
        job.supervisor.heard(job)
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
