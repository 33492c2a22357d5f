"""Which job a task is inside of: for handlers, middleware and the guard of waits."""

from collections.abc import Hashable
from math import inf
from typing import Any, final

import attrs
import trio
from trio.lowlevel import RunVar, Task, current_task

from ._records import draft_of

# The tasks of all workers of a trio run. Looking a task's parents up here
# costs nothing on the way of a job, unlike a context variable.
_crew: RunVar[dict[Task, Any]] = RunVar("trio_pool workers")


def crew() -> dict[Task, Any]:
    """Return the workers of this trio run by their tasks."""
    try:
        return _crew.get()
    except LookupError:
        workers: dict[Task, Any] = {}
        _crew.set(workers)
        return workers


def worker_around(task: Task, dispatch: object = None) -> Any:
    """Return the worker whose job ``task`` is a part of, or None.

    With ``dispatch``, only a worker of that pool counts.
    """
    workers = crew()
    at: Task | None = task
    nursery: trio.Nursery | None = None
    while at is not None:
        worker = workers.get(at)
        if (
            worker is not None
            and (dispatch is None or worker.dispatch is dispatch)
            and nursery not in worker.own_nurseries
        ):
            return worker
        nursery = at.parent_nursery
        at = None if nursery is None else nursery.parent_task
    return None


@final
@attrs.frozen(kw_only=True, eq=False)
class CurrentJob:
    """The job that is running, as its handler and its middleware see it."""

    pool: str
    """The pool's name."""
    id: int | str
    """The job's id."""
    input: Any
    """What the handler is called with; in a `TaskPool` ``(async_fn, args)``."""
    attempt: int
    """Which attempt this is, from 1."""
    key: Hashable
    """Its key, None if it has none."""
    priority: int
    """Its priority."""
    timeout: float
    """Seconds that this attempt may run."""
    deadline: float
    """When it will be cancelled, on `trio.current_time()`; ``math.inf`` if never."""
    waited: float
    """Seconds that it stood in the backlog before this attempt; 0.0 for the first
    attempt of an item of `map`, which never stands there."""
    worker: int
    """The id of the worker that runs it."""
    # Not the job's record: that keeps an error, whose traceback has the frames
    # of handlers and middleware, and these have this.
    _actor: Any = attrs.field(repr=False, alias="actor")
    _number: int = attrs.field(repr=False, alias="number")

    def cancel(self) -> bool:
        """Cancel this job; say whether it was running and not cancelled yet.

        The handler gets `trio.Cancelled` at its next checkpoint, and whoever
        waits for the job a `JobCancelled`. It is not tried again.
        """
        actor = self._actor
        actor.dispatch.check_thread()
        job = actor.job
        if (
            job is None
            or job.id != self._number
            or job.attempts != self.attempt
            # An item that nobody has asked for its name still has the last one's.
            or (job.batch is not None and job.named != job.index)
            or job.terms.cancel_asked
        ):
            return False
        job.own_terms().cancel_asked = True
        job.dispatch.cancel_running(job)
        return True


_Draft = draft_of(CurrentJob)


def describe(job: Any) -> CurrentJob:
    """Describe a running job to its handler."""
    dispatch, terms, batch = job.dispatch, job.terms, job.batch
    deadline, timeout = job.deadline, job.timeout
    if timeout < inf and job.begun:
        deadline = min(deadline, job.started_at + dispatch.epoch + timeout)
    current: Any = _Draft()
    current.pool = dispatch.name
    # `Job.name`, but for those that have it made when it is asked for.
    plain = batch is None and terms is dispatch.plain_terms
    current.id = job.id if plain else job.name()
    current.input = job.input
    current.attempt = job.attempts
    current.key = terms.key
    current.priority = job.priority
    current.timeout = timeout
    current.deadline = deadline
    current.waited = 0.0 if batch is not None and not terms.before else job.waited()
    current.worker = job.worker.id
    current._actor = job.worker  # noqa: SLF001
    current._number = job.id  # noqa: SLF001
    current.__class__ = CurrentJob
    return current  # type: ignore[no-any-return]


def current_job() -> CurrentJob:
    """Return the job that the calling task is running, or is a child of.

    To be called in a handler, in middleware, or in a task that they started.

    Raises:
      RuntimeError: the task is not inside a job.
    """
    if trio.lowlevel.in_trio_task():
        worker = worker_around(current_task())
        if worker is not None and worker.job is not None:
            return describe(worker.job)
    raise RuntimeError("current_job() must be called inside a job of a trio_pool")
