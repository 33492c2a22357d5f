"""Waits inside of jobs for their own pool, and those that nobody could end."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, final

import outcome
from trio.lowlevel import reschedule

from ._current import worker_around
from ._errors import WouldDeadlock
from ._events import JobState
from ._job import Job

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.lowlevel import Task

    from ._backlog import Source
    from ._dispatch import Dispatch
    from ._worker import Worker


@final
class Nesting:
    """Refuses a wait inside a job if every worker has a job that waits like this."""

    __slots__ = ("_dispatch", "_waits", "outside")

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self._waits: dict[Task, tuple[Job | Source, Worker, str]] = {}
        self.outside: Callable[[], object] = object
        """Gives a nursery known to be in no job of this pool, while it is there."""

    def check(self, task: Task, entry: Job | Source | None, wait: str) -> None:
        """Refuse a wait that nobody could end: with no ``entry``, any inside a job.

        Raises:
          WouldDeadlock: it is inside a job of this pool, and nobody could.
        """
        worker = self._worker_around(task)
        if worker is None:
            return
        name = self._dispatch.config.name
        if entry is None:
            raise WouldDeadlock(name, wait)
        self._waits[task] = (entry, worker, wait)
        own = worker.job
        waits_for_itself = isinstance(entry, Job) and (
            entry is own
            or (
                own is not None
                and entry.terms.key is not None
                and entry.terms.key == own.terms.key
            )
        )
        if waits_for_itself or self._is_stuck():
            del self._waits[task]
            raise WouldDeadlock(name, wait)

    def _worker_around(self, task: Task) -> Worker | None:
        """Return the worker whose job a task is a part of, and learn who is outside."""
        nursery = task.parent_nursery
        if nursery is self.outside():
            return None
        worker: Worker | None = worker_around(task, self._dispatch)
        if worker is None and nursery is not None:
            self.outside = weakref.ref(nursery)
        return worker

    def forget_ended(self) -> None:
        """Keep nothing of waits that are over."""
        if self._waits:
            self._prune()

    def _prune(self) -> None:
        for task, (entry, _, _) in tuple(self._waits.items()):
            if not entry.is_stuck(task):
                del self._waits[task]

    def _is_stuck(self) -> bool:
        """Say whether every worker has a job that waits for another worker."""
        self._prune()
        waits, workers = self._waits, self._dispatch.workers
        dispatch = self._dispatch
        if not waits or len(workers) < dispatch.wanted:
            return False
        scale = dispatch.config.scale
        if scale is not None and dispatch.wanted < scale.max and not dispatch.paused:
            # There may be more workers soon.
            return False
        blocked = {worker for _, worker, _ in waits.values()}
        # Who waits for a job that waits is blocked as well.
        reached = list(blocked)
        while reached:
            job = reached.pop().job
            for task in () if job is None else job.waiters():
                worker = worker_around(task, dispatch)
                if worker is not None and worker not in blocked:
                    blocked.add(worker)
                    reached.append(worker)
        return all(
            worker in blocked
            or worker.retiring
            or (worker.lease is not None and worker.lease.inside in blocked)
            for worker in workers.values()
        )

    def end_deadlock(self) -> None:
        """End the newest waits that nobody could end any more, as a worker left."""
        dispatch = self._dispatch
        while self._waits and self._is_stuck():
            task, (entry, _, wait) = self._waits.popitem()
            error = WouldDeadlock(dispatch.config.name, wait)
            if not isinstance(entry, Job):
                entry.stop(error)
            elif entry.state is None:
                entry.error = error
                dispatch.turn_away(entry)
            elif entry.caller:
                entry.error = error
                dispatch.end(entry, JobState.CANCELLED)
            elif entry.readers:
                # It waits for a reply; the job itself may still run one day.
                del entry.readers[task]
                reschedule(task, outcome.Error(error))
