"""A lease: one worker, kept for several jobs in a row."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Generic, TypeVarTuple, Unpack, final

import trio
from trio.lowlevel import (
    Abort,
    checkpoint_if_cancelled,
    current_task,
    enable_ki_protection,
    reschedule,
)

from ._checks import check_seconds
from ._current import worker_around
from ._dispatch import SHUT
from ._errors import WorkerCrashed, WouldDeadlock
from ._events import In, JobState, Out, WorkerState
from ._job import Job, new_job
from ._trio import WAKE, effective_deadline

if TYPE_CHECKING:
    from trio.lowlevel import Task

    from ._dispatch import Dispatch
    from ._worker import Worker


Args = TypeVarTuple("Args")


@final
class Lease:
    """Stands in line as a job does, and then has its worker step aside.

    The worker takes no job from the line until the lease gives it back; it
    is lost if it crashes meanwhile.
    """

    def __init__(self, dispatch: Dispatch, priority: int) -> None:
        self.dispatch = dispatch
        self.priority = priority
        self.queued_at = 0.0
        self.waiting = False
        self.hungry = True
        self.pulled = 0
        self.worker: Worker | None = None
        self.inside: Worker | None = None
        """The worker of the same pool whose job has taken the lease."""
        self._crash: BaseException | None = None
        self._error: Exception | None = None
        self._holder: Task | None = None
        self._turn = trio.StrictFIFOLock()

    def take(self, worker: Worker) -> Job | None:
        """Have a free worker step aside."""
        self.worker = worker
        worker.lease = self
        worker.gated = SHUT
        self._leave_line()
        self._wake()
        return None

    def _leave_line(self) -> None:
        self.hungry = False
        # It may have been the last that `join` and `shutdown` wait for.
        if self.dispatch.listeners:
            self.dispatch.hear_end()

    def stop(self, pool_error: Exception) -> None:
        """Give up: the pool takes no more jobs."""
        self._leave_line()
        self._error = pool_error
        self._wake()
        if self.worker is not None and self.worker.job is None:
            self._give_back()

    def is_stuck(self, task: Task) -> bool:
        """Say whether a task waits for a worker, and none has come yet."""
        return self._holder is task

    def _wake(self) -> None:
        holder, self._holder = self._holder, None
        if holder is not None:
            reschedule(holder, WAKE)

    def holds(self, worker: Worker) -> bool:
        """Say whether a worker has to stay; if not, it is free by this."""
        if self._error is None and self.worker is worker:
            return True
        self.worker = worker.lease = None
        worker.set_gate()
        return False

    def lose(self, crash: BaseException | None) -> None:
        """Learn that the worker is gone."""
        worker = self.worker
        assert worker is not None
        self.worker = worker.lease = None
        if self._error is None:
            self._crash = crash

    @enable_ki_protection
    async def open(self) -> None:
        """Wait for a worker."""
        dispatch = self.dispatch
        dispatch.check_thread()
        await checkpoint_if_cancelled()
        if dispatch.closed:
            raise dispatch.refusal()
        dispatch.leases[self] = None
        dispatch.offer(self)
        task = self._holder = current_task()
        self.inside = worker_around(task, dispatch)
        try:
            dispatch.nesting.check(task, self, "lease()")
            await dispatch.sleep(self._abort)
            if self._error is not None:
                raise self._error
        except BaseException:
            self.close()
            raise

    def _abort(self, _: object) -> Abort:
        self._holder = None
        self._leave_line()
        return Abort.SUCCEEDED

    @enable_ki_protection
    def close(self) -> None:
        """Give the worker back, after the job that it may have."""
        if self.hungry:
            self._leave_line()
        self.dispatch.leases.pop(self, None)
        if self._error is None:
            self._error = trio.ClosedResourceError("the lease of this worker is over")
        if self.worker is not None and self.worker.job is None:
            self._give_back()

    def _give_back(self) -> None:
        worker = self.worker
        assert worker is not None
        self.worker = worker.lease = None
        worker.set_gate()
        worker.state = WorkerState.BUSY
        worker.nudge()

    @enable_ki_protection
    async def process(self, job_input: Any, timeout: float) -> Any:
        """Run a job in the worker."""
        dispatch = self.dispatch
        dispatch.check_thread()
        around = worker_around(current_task(), dispatch)
        if around is not None and around is self.worker:
            raise WouldDeadlock(dispatch.config.name, "process() of a lease")
        async with self._turn:
            worker = self._usable_worker()
            while dispatch.guarded and not dispatch.starts.take():
                await dispatch.starts.waiters.park()
                worker = self._usable_worker()
            job = new_job(
                dispatch, dispatch.next_id(), job_input, copy_context(), timeout
            )
            terms = job.own_terms()
            terms.leased = True
            # Another attempt would have to queue for another worker.
            terms.retry = None
            dispatch.start_leased(job, worker)
            task = job.caller = current_task()
            job.deadline = effective_deadline(task)
            await dispatch.sleep(job.abort)
            if job.state is JobState.DONE:
                return job.value
            return job.raise_as_caller()

    def _usable_worker(self) -> Worker:
        if self._crash is not None:
            # In no local: the error's traceback has this frame.
            job_id = self.dispatch.next_id()
            raise WorkerCrashed(job_id, False, 0, None) from self._crash
        if self._error is not None:
            raise self._error
        assert self.worker is not None
        return self.worker


@final
class LeasedWorker(Generic[In, Out]):
    """One worker of a `Pool`, kept for several jobs in a row; see `Pool.lease`."""

    def __init__(self, lease: Any, timeout: float) -> None:
        self._lease: Lease = lease
        self._timeout = timeout

    @property
    def id(self) -> int | None:
        """The worker's id; None when the lease is over, or the worker is lost."""
        worker = self._lease.worker
        return None if worker is None else worker.id

    async def process(self, job_input: In, /, *, timeout: float | None = None) -> Out:
        """Run a job in this worker and return its result, as `Pool.process` does.

        Calls of several tasks take turns.

        Raises:
          WorkerCrashed: the worker died, under this job or before it; what it
            had set up is lost, so the lease does not go on with another one.
          WouldDeadlock: called by the job that runs in this very worker.
          ClosedResourceError: the lease is over.
          PoolClosed, PoolBroken: the pool takes no jobs any more.
        """
        seconds = _seconds(timeout, self._timeout)
        return await self._lease.process(job_input, seconds)  # type: ignore[no-any-return]


@final
class LeasedTaskWorker:
    """One worker of a `TaskPool`, kept for several calls; see `TaskPool.lease`."""

    def __init__(self, lease: Any, timeout: float) -> None:
        self._lease: Lease = lease
        self._timeout = timeout

    @property
    def id(self) -> int | None:
        """The worker's id; None when the lease is over, or the worker is lost."""
        worker = self._lease.worker
        return None if worker is None else worker.id

    async def process(
        self,
        async_fn: Callable[[Unpack[Args]], Awaitable[Out]],
        /,
        *args: *Args,
        timeout: float | None = None,
    ) -> Out:
        """Run ``async_fn(*args)`` in this worker, as `LeasedWorker.process` does."""
        seconds = _seconds(timeout, self._timeout)
        return await self._lease.process((async_fn, args), seconds)  # type: ignore[no-any-return]


def _seconds(timeout: float | None, default: float) -> float:
    if timeout is None:
        return default
    check_seconds("timeout", timeout, zero=False)
    return timeout
