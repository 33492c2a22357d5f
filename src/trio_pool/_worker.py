"""The worker actor: open its context, take a job, run it, answer, repeat."""

# Three uses of trio's insides are inlined here, as a call would cost more than
# they do: what `_cancel_status`, `_schedule_points` and `_deadline` mean is
# pinned by the tests of `_trio`.
# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false

from __future__ import annotations

import inspect
import signal
import sys
from contextlib import AbstractAsyncContextManager
from contextvars import Context, ContextVar, copy_context
from functools import partial
from itertools import chain
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, final

import attrs
import trio
from trio.lowlevel import (
    Abort,
    cancel_shielded_checkpoint,
    checkpoint,
    current_task,
    disable_ki_protection,
    enable_ki_protection,
)

from ._checks import is_async
from ._chunks import call_in_chunks, caller_of
from ._current import CurrentJob, describe
from ._dispatch import SHUT
from ._errors import JobCancelled, JobTimeout, WorkerCrashed, WorkerGone
from ._events import JobState, WorkerState
from ._job import Job, raise_caught
from ._latency import FLUSH
from ._trio import WAKE, forget_nurseries, show_deadline

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType

    from outcome import Outcome
    from trio.lowlevel import Task

    from ._batch import Batch
    from ._dispatch import Dispatch
    from ._lease import Lease
    from ._supervisor import Supervisor
    from ._timer import Alarm

Handler: TypeAlias = "Callable[[Any], Awaitable[Any]]"
"""What a worker does with a job. It may have an ``async ready()``, which is awaited
before each job is taken; and, if it is one of ours, an end elsewhere.
"""
Factory: TypeAlias = "Callable[[], AbstractAsyncContextManager[Handler]] | NoSetup"

_DONE = JobState.DONE
_RUNNING = JobState.RUNNING
_IDLE = WorkerState.IDLE
_MISSING = object()
_NO_NURSERIES: frozenset[trio.Nursery] = frozenset()

# Items of a map that are measured together, while they take next to no time.
_SKIP = 16

# Seconds; jobs that take less are measured together, which is a good deal
# cheaper than to put each into a histogram.
_SHORT = 0.00002


NOT_PULLING = inf


async def call_function(call: tuple[Callable[..., Any], Any]) -> Any:
    """Call the async function that a job of a `TaskPool` is."""
    return await call[0](*call[1])


def in_context(context: Context) -> bool:
    """Say whether all variables are as in ``context``: the very same objects.

    No user's ``==`` is asked, and equal is not the same.
    """
    if len(copy_context()) != len(context):
        return False
    for var, value in context.items():  # noqa: SIM110 - all() is three times as slow
        if var.get(_MISSING) is not value:
            return False
    return True


def _holds(variables: tuple[tuple[ContextVar[Any], Any], ...]) -> bool:
    for var, kept in variables:  # noqa: SIM110 - as above
        if var.get(_MISSING) is not kept:
            return False
    return True


def _is_ours(error: BaseException) -> bool:
    """Say whether Ctrl-C has come in a worker's own frame."""
    if not isinstance(error, KeyboardInterrupt):
        return False
    assert error.__traceback__ is not None
    inner = error.__traceback__.tb_next
    # Trio hears signals in Python, and so the frame that does is on top of ours.
    hears = getattr(signal.getsignal(signal.SIGINT), "__code__", None)
    return inner is None or inner.tb_frame.f_code is hears


class OtherEnd(Protocol):
    """What a handler has as ``__trio_pool__`` whose jobs run elsewhere."""

    @property
    def spent(self) -> bool:
        """Whether it was stopped with a job, and its worker is to be replaced."""
        ...

    def one(
        self, job_input: Any, answer: Callable[[Any], object] | None, /
    ) -> Awaitable[Any]:
        """Run a job; return its result, or raise its error.

        A result that comes in a callback may be told by ``answer`` in there, in
        the step in which the worker is woken to return it.
        """
        ...

    async def many(self, inputs: list[Any], /) -> tuple[list[Outcome[Any]], float]:
        """Run several items; return their outcomes, and the seconds that took."""
        ...


def other_end_of(handler: object) -> OtherEnd | None:
    """Return what stands for the other end of a handler, if it has one."""
    # By a name that nobody else has for anything.
    return getattr(handler, "__trio_pool__", None)


@final
@attrs.frozen
class NoSetup:
    """Stands for the factory of workers that need neither setup nor cleanup."""

    handler: Handler


# Most workers of a very large pool never get mail, and a mailbox is more than
# the rest of an idle worker. Nudges have no content, and do without.


def _post_first(job: Job | None) -> None:
    """Open the mailbox of the worker of a job, and send it the job."""
    assert job is not None
    assert job.worker is not None
    job.worker.open_mailbox()
    job.worker.post(job)


def _no_mail() -> None:
    """Fetch from a mailbox that has not been opened yet."""


@final
class Worker:
    """One slot of the pool and the actor that fills it.

    The actor is a task; after a crash another task takes its place here. The
    supervisor reads and mends this record in synchronous steps; ``job`` is
    set in the step of the hand-over and cleared in that of the answer.
    """

    __slots__ = (
        "_alarm",
        "_base",
        "_crash",
        "_fetch",
        "_last_words",
        "_life",
        "_other_end",
        "_points",
        "_ready",
        "_rested",
        "_scope",
        "_shown",
        "_status",
        "_watch",
        "alarms",
        "asleep",
        "counted",
        "crashes",
        "dispatch",
        "gated",
        "heed",
        "id",
        "idle_since",
        "is_getting_ready",
        "job",
        "jobs",
        "jobs_before",
        "last_error",
        "lease",
        "leaving",
        "own_nurseries",
        "post",
        "quick",
        "quick_time",
        "restarts",
        "retiring",
        "state",
        "supervisor",
        "task",
        "ticket",
    )

    def __init__(self, supervisor: Supervisor, worker_id: int) -> None:
        self.supervisor = supervisor
        self.dispatch: Dispatch = supervisor.dispatch
        self.id = worker_id
        self.state = WorkerState.STARTING
        self.retiring = False
        """It is not wanted any more."""
        self.leaving = False
        """It stops after its job: retired, or to be replaced by a fresh one."""
        self.lease: Lease | None = None
        self.gated = SHUT
        """What more than being free is wanting for it to get a job."""
        self.job: Job | None = None
        self.ticket: Job | None = None
        self.jobs = 0
        self.jobs_before = 0
        """Jobs that were started before it was set up last."""
        self.counted: float = NOT_PULLING
        """The last item of a batch that is in ``jobs``, where it pulls some."""
        self.quick = 0
        """Those of them that took next to no time."""
        self.quick_time = 0.0
        self.idle_since = 0.0
        self.restarts = 0
        self.last_error: BaseException | None = None
        self.crashes: deque[float] | None = None
        self.alarms: tuple[Alarm, ...] = ()
        """What is to happen to it: a restart, or recycling."""
        self._watch = inf
        self._alarm: Alarm | None = None
        self.heed = False
        """Something must be looked at after the job: cancelled, crashed, retired."""
        self.asleep = False
        """It has to be woken to run; an idle one may be about to get up by itself."""
        self.own_nurseries = _NO_NURSERIES
        """Those of its own context: what runs there is part of no job."""
        self.is_getting_ready = False
        self._ready: Callable[[], Awaitable[object]] | None = None
        self._crash: BaseException | None = None
        self._last_words: WorkerCrashed | None = None
        """What is raised in its own context as it crashes."""
        self._status: Any = None
        """Trio's, that it has while no handler has opened a scope."""
        self._shown = inf
        """The deadline that handlers see."""
        self._other_end: OtherEnd | None = None
        self._points = -1
        self._rested = 0.0
        """When it last let other tasks run, and trio's count of it."""
        self._scope: Any = None
        """The scope that all its jobs run in, until one is cancelled."""
        self._life: trio.CancelScope | None = None

    # What others do to it: synchronous.

    def nudge(self) -> None:
        """Have an idle worker look for something to do."""
        # A fresh copy, as what a job sets must not reach the worker's own.
        self.task.context = self._base.copy()
        # One that has been woken already looks at its record anyway.
        if self.asleep:
            self.asleep = False
            if self._fetch is not _no_mail:
                self.post(None)
            self.dispatch.reschedule(self.task, WAKE)

    def wake_for(self, job: Job) -> None:
        """Have an idle worker run the job on its record."""
        self.task.context = job.context
        if self.asleep:
            self.asleep = False
            self.post(job)
            self.dispatch.reschedule(self.task, WAKE)

    def _woken(self, _: object) -> Abort:
        self.asleep = False
        return Abort.SUCCEEDED

    def cancel_job(self, reason: str) -> None:
        """Cancel the handler that is running."""
        self.heed = True
        self.dispatch.change += 1
        if self._scope is not None:
            self._scope.cancel(reason=reason)

    def retire(self) -> None:
        """Leave after the current job; a setup under way is cancelled."""
        self.retiring = True
        self.recycle()
        if self.state is WorkerState.STARTING and self._life is not None:
            self._life.cancel(reason="trio_pool: the worker is not wanted any more")

    def set_gate(self) -> None:
        """Note whether it may just take the next job when it is free."""
        shut = self.leaving or self.lease is not None or self._ready is not None
        self.gated = SHUT if shut else self.dispatch.gated

    def recycle(self) -> None:
        """Leave after the current job; an idle worker has to be nudged."""
        self.leaving = self.heed = True
        self.gated = SHUT
        if self.is_getting_ready:
            self.cancel_job("trio_pool: the worker is not wanted any more")

    def _is_spent(self) -> bool:
        return self._other_end is not None and self._other_end.spent

    def _replace(self) -> None:
        """Leave after the current job, as what was set up for it is spent."""
        if self.lease is not None:
            self.lease.lose(RuntimeError("the worker was stopped under another job"))
        self.recycle()

    def stay(self) -> bool:
        """Take back `retire`, if it is not too late."""
        if self.state is WorkerState.BUSY:
            self.retiring = False
            self.leaving = self._is_spent()
            self.set_gate()
        return not self.retiring

    # The actor.

    @enable_ki_protection
    async def run(self) -> None:
        """Be one worker from its setup to its cleanup, and report the end."""
        supervisor, factory = self.supervisor, self.supervisor.factory
        self.task: Task = current_task()
        self._base: Context = self.task.context
        supervisor.crew[self.task] = self
        self.post: Callable[[Job | None], None] = _post_first
        self._fetch: Callable[[], Job | None] = _no_mail
        trouble: BaseException | None = None
        try:
            if isinstance(factory, NoSetup):
                await self._live(factory.handler, owns_context=False)
            else:
                await self._live_in_context(factory)
        except BaseException as error:
            trouble = error
        self._life = self._scope = self._status = None
        self._ready = self._last_words = self._other_end = None
        del supervisor.crew[self.task]
        if self.task.child_nurseries:
            forget_nurseries(self.task)
        try:
            supervisor.worker_gone(self, self._crash, trouble)
        finally:
            del trouble
            self._crash = None

    def open_mailbox(self) -> None:
        """Get ready for mail."""
        # Room for one: a message sent in the tick in which the worker is
        # cancelled must be accepted; the job stays on record in `job`.
        mailbox, receiver = trio.open_memory_channel["Job | None"](1)
        self.post = mailbox.send_nowait
        self._fetch = receiver.receive_nowait

    async def _live_in_context(self, factory: Callable[[], Any]) -> None:
        """Enter a context manager of its own, and be a worker in there."""
        with trio.CancelScope() as self._life:
            if self.retiring:
                self._life.cancel()
            async with _open(factory) as handler:
                await self._live(handler, owns_context=True)

    async def _live(self, handler: Handler, owns_context: bool) -> None:
        """Be ready, run jobs, and leave."""
        supervisor = self.supervisor
        try:
            self._ready = getattr(handler, "ready", None)
            self._other_end = other_end_of(handler)
            if self._other_end is not None:
                self.dispatch.takes_many = True
            self.set_gate()
            if owns_context:
                # What runs there is part of no job.
                self.own_nurseries = frozenset(self.task.child_nurseries)
            supervisor.worker_ready(self)
            await self._await_first()
            if self.job is not None or not self.leaving:
                await self.serve(handler)
        finally:
            # A worker that never got ready has nothing to leave.
            if self.state is not WorkerState.STARTING:
                supervisor.worker_leaves(self, sys.exc_info()[1])
            # The worker's own cleanup sees the worker's context.
            if owns_context or not in_context(self._base):
                self.task.context = self._base
                await cancel_shielded_checkpoint()

    async def _await_first(self) -> None:
        """Sleep until there is something to do, while there is nothing to set up.

        Most workers of a very large pool never get further, so what is only
        of use to a job is made later: the mailbox, the scope, half the frames.
        """
        dispatch, task = self.dispatch, self.task
        while not (
            self.leaving
            or self.job is not None
            or self._ready is not None
            or dispatch.has_ready()
        ):
            self._lie_down()
            await dispatch.sleep(self._woken)
            self._fetch()
            if self.job is None:
                dispatch.wake_up(self)
        if task.context is self._base and not self.leaving:
            # No job may see the worker's own context object, which it could change.
            task.context = self._base.copy()
            await cancel_shielded_checkpoint()

    def _lie_down(self) -> None:
        """Be idle from here on, and keep nothing of a caller alive."""
        dispatch = self.dispatch
        if self.gated == SHUT:
            dispatch.rest(self)
        else:
            self.state = _IDLE
            dispatch.idle[self] = None
        self.task.context = self._base
        self.ticket = None
        dispatch.nesting.forget_ended()
        self.asleep = True

    # Ctrl-C may land anywhere in here, as it may in the handler: whatever of it
    # touches the books is in a call that is protected. A frame in between would
    # do too, but costs a job more than all the checks of its context.
    @disable_ki_protection
    async def serve(self, handler: Handler) -> None:
        """Run jobs until told to retire; raises `WorkerCrashed` to be replaced."""
        call, answer = self._prepare(handler)
        # It may have been let go in the tick in which it was sent its first job.
        while not self.leaving or self.lease is not None or self.job is not None:
            with self._new_scope():
                job = await self._next_job()
                # With a condition of its own, the loop's jump back would be outside
                # of the block on 3.12 and later, where Ctrl-C mostly lands.
                while True:
                    if job is None:
                        break
                    # No local but `job` may keep anything of a caller alive.
                    pulls = job.batch is not None and self._may_pull(job, job.batch)
                    try:
                        if pulls:
                            job.value = await self._pull(job, handler)
                        else:
                            job.value = await call(job.input)
                    except BaseException as error:
                        self._answer_error(job, error)
                        job = None
                    else:
                        job = answer(job, pulls)
                    if job is None and not self.heed:
                        job = await self._next_job()
                if self._last_words is not None:
                    raise self._last_words from self._crash

    def _prepare(
        self, handler: Handler
    ) -> tuple[Handler, Callable[[Job, bool], Job | None]]:
        """Return what is to be called with an input, and what answers after that."""
        supervisor, other_end = self.supervisor, self._other_end
        call = call_function if supervisor.calls_functions else handler
        if supervisor.middleware:
            return compose(supervisor.middleware, call, self), self._answer
        # What has to be asked about each start is asked one by one.
        if other_end is None or supervisor.dispatch.guarded:
            return call, self._answer
        return caller_of(self, other_end), self._answer_if_not_done

    def _new_scope(self) -> trio.CancelScope:
        scope = self._scope = trio.CancelScope()
        self._shown = inf
        self.heed = self.leaving
        return scope

    def begin(self, job: Job) -> None:
        """Note that an item of a batch is accepted and run, by a call for several."""
        dispatch = self.dispatch
        dispatch.accepted += 1
        job.state = _RUNNING
        job.worker = self
        job.attempts = 1
        self.job = job
        self.jobs += 1
        if dispatch.watched:
            dispatch.tell_job("on_job_queue", job)
            dispatch.tell_job("on_job_start", job)

    def jobs_left(self) -> float:
        """Count the jobs that it may run yet, with the one that it has."""
        return self.dispatch.config.max_jobs - (self.jobs - self.jobs_before) + 1

    def _rest_anew(self) -> None:
        """Note that others have run: the time slice begins anew."""
        self._points = self.task._schedule_points
        self._rested = perf_counter()
        self.dispatch.flush_if_due()

    def _has_rested(self, moment: float) -> bool:
        """Say whether others have run since this was asked last; its slice is over.

        Asked only then, so that from the sleep of a job up to two slices may go by.
        """
        slept = self.task._schedule_points
        if slept == self._points:
            return False
        self._points = slept
        self._rested = moment
        self.dispatch.flush_if_due()
        return True

    @enable_ki_protection
    async def _next_job(self) -> Job | None:
        """Wait for a job, and start it; None if it is told to leave meanwhile."""
        dispatch = self.dispatch
        task = self.task
        stamp = dispatch.stamp
        self._status = task._cancel_status
        now = stamp()
        while True:
            job = self.job
            if job is None:
                if (
                    self._ready is not None
                    and not (self.lease and self.lease.holds(self))
                    and not dispatch.is_spent(self)
                ):
                    await self._get_ready(self._ready)
                    if self.heed:
                        return None
                    # What it has waited is no part of the job's time.
                    now = stamp()
                job = dispatch.next_job(self, now)
                if self.job is not job:
                    # A hook that heard of it has had it withdrawn.
                    dispatch.wake_up(self)
                    if self.job is not None:
                        # It was given another, in whose context it is after this.
                        await cancel_shielded_checkpoint()
                        self._rest_anew()
                        now = stamp()
                        if self.job is None:  # pyright: ignore[reportUnnecessaryComparison]
                            dispatch.wake_up(self)
                    continue
                if job is None:
                    if self.leaving and self.lease is None:
                        return None
                    self._lie_down()
                    # Sleeping here instead of in the channel's `receive` makes
                    # the way of a job a fifth shorter.
                    sleep = dispatch.sleep
                    await sleep(self._woken)
                    fetch = self._fetch
                    fetch()
                    if self.job is None:
                        dispatch.wake_up(self)
                    self._rest_anew()
                    now = stamp()
                    continue
                # An idle worker was woken in the job's context; a busy one is
                # still in that of the last job.
                moment = perf_counter()
                tired = moment - self._rested > dispatch.slice and not (
                    self._has_rested(moment)
                )
                if tired or (
                    (copy_context() or job.context) and not in_context(job.context)
                ):
                    # No local may keep the context alive while it sleeps.
                    task.context = job.context.copy() if job.batch else job.context
                    await cancel_shielded_checkpoint()
                    self._rest_anew()
                    now = stamp()
                    if self.job is not job:
                        # It was withdrawn meanwhile.
                        dispatch.wake_up(self)
                        continue
                if job.batch is None:
                    dispatch.waits.pending.append(now - job.queued_at)
            return self._start(job, now)

    def _start(self, job: Job, now: float) -> Job:
        """Note that a job starts now, to end within its time."""
        dispatch = self.dispatch
        deadline = job.deadline
        if job.timeout < inf:
            end = now + dispatch.epoch + job.timeout
            if end < self._watch:
                self._watch_until(end)
            if end < deadline:
                deadline = end
        job.attempts += 1
        job.started_at = now
        self.jobs += 1
        if deadline != self._shown:
            self._shown = deadline
            # `show_deadline`, without the call.
            self._scope._deadline = deadline
        if dispatch.tells_start:
            dispatch.tell_heard("on_job_start", job, now)
        return job

    @enable_ki_protection
    def _answer(self, job: Job, measured: bool) -> Job | None:
        """Answer a job, and start the next one, if nothing is to be waited for.

        This is `Dispatch.finish`, `Dispatch.next_job` and `_next_job` in a
        nutshell, for the jobs that there are most of; every call would show.
        """
        dispatch = self.dispatch
        task = self.task
        now = moment = perf_counter()
        if not dispatch.is_real:
            now = dispatch.clock()
        if not measured:
            spent = now - job.started_at
            if spent < _SHORT:
                self.quick += 1
                self.quick_time += spent
            else:
                dispatch.runs.pending.append(spent)
        if task._cancel_status is not self._status:
            self._misnested(job)
            return None
        if (
            dispatch.careful
            or job.terms is not dispatch.plain_terms
            or job.batch is not None
        ):
            dispatch.finish(job)
        else:
            job.state = _DONE
            self.job = None
            dispatch.done += 1
            if dispatch.tells_complete:
                dispatch.tell_heard("on_job_complete", job, now)
            caller = job.caller
            if caller is not None:
                job.caller = None
                reschedule = dispatch.reschedule
                reschedule(caller, WAKE)
            elif job.readers:
                job.wake()
            if dispatch.listeners:
                dispatch.hear_end()
        gate = self.gated
        if self.heed or (gate and (gate == SHUT or dispatch.idle)):
            return None
        if moment - self._rested > dispatch.slice and not self._has_rested(moment):
            return None
        line = dispatch.line
        top = line.top
        if not top and line.count:
            top = line.lower_top()
        if not top or dispatch.room.count:
            return None
        following = top[0]
        if (
            type(following) is not Job
            or not following.waiting
            or following.batch is not None
        ):
            return None
        if (copy_context() or following.context) and not in_context(following.context):
            return None
        if gate and not dispatch.may_pass(following):
            return None
        top.popleft()
        following.waiting = False
        line.count -= 1
        following.state = _RUNNING
        following.worker = self
        self.job = following
        dispatch.waits.pending.append(now - following.queued_at)
        return self._start(following, now)

    @enable_ki_protection
    def answer_early(self, job: Job, value: Any) -> None:
        """Answer a job, and be idle, though not asleep: `Dispatch.accept` knows both.

        Its other end calls this as it wakes this worker, so the caller is woken
        along with it, not a turn of the scheduler later. Whichever of the two runs
        first, the worker is free for the caller's next job. Where anything but that
        could be next, this does nothing, and the worker answers by itself.
        """
        dispatch, line = self.dispatch, self.dispatch.line
        if (
            self.job is not job
            # A job that is cancelled or out of time has terms of its own.
            or job.terms is not dispatch.plain_terms
            # By a guard, a lease, a limit to its life, a pause, its end.
            or self.gated
            # Others want a job, or the worker.
            or line.count
            or line.sources
            or dispatch.room.count
            # Others want to hear of the end.
            or dispatch.listeners
            or dispatch.tells_complete
            # It was left with a scope open, or is about to be cancelled.
            or self.task._cancel_status is not self._status
            or self._status.effectively_cancelled
        ):
            return
        dispatch.runs.pending.append(dispatch.stamp() - job.started_at)
        job.value = value
        dispatch.finish(job)
        self.state = _IDLE
        dispatch.idle[self] = None

    @enable_ki_protection
    def _answer_if_not_done(self, job: Job, measured: bool) -> Job | None:
        """Do what `_answer` does, unless `answer_early` has."""
        if job.state is not _DONE:
            return self._answer(job, measured)
        self._rest_anew()
        # Otherwise it has been handed the next one, and is in that one's context.
        if self.job is None:
            self.dispatch.wake_up(self)
        return None

    @enable_ki_protection
    def _answer_error(self, job: Job, error: BaseException) -> None:
        """Decide what an error means, and answer; measured before it is told."""
        dispatch = self.dispatch
        if job.state is _DONE:
            # Ctrl-C after `answer_early`, and so between two jobs.
            raise error
        dispatch.runs.pending.append(dispatch.stamp() - job.started_at)
        if self._is_spent():
            self._replace()
        self.settle_error(job, error)
        if self.task._cancel_status is not self._status:
            self._misnested(job, answered=True)

    def _may_pull(self, job: Job, batch: Batch) -> bool:
        """Say whether this item and those after it may be run without asking."""
        return (
            not job.terms.before
            and self._ready is None
            and batch.is_alone()
            and not (self._other_end or job.terms.put_back)
        )

    async def _get_ready(self, ready: Callable[[], Awaitable[object]]) -> None:
        """Wait until the handler says that it can take a job."""
        self.is_getting_ready = True
        if self._shown < inf:
            # That of the last job is no business of the handler's.
            self._shown = inf
            show_deadline(self._scope, inf)
        self.ticket = None
        self.task.context = self._base.copy()
        await cancel_shielded_checkpoint()
        try:
            if not self.heed:
                await _call_ready(ready)
        finally:
            self.is_getting_ready = False

    async def _pull(self, job: Job, handler: Handler) -> Any:
        """Run an item of a batch and those after it, while nothing else is to do.

        Returns the value of the item in ``job``, still to be answered. This is
        `Batch.take` and `Dispatch.finish` in a nutshell: an item costs less
        than one of those calls. So does protection from Ctrl-C, which may
        land anywhere here: the books move by the one store of ``batch.last``,
        and the item in hand is lost, as it is when Ctrl-C lands in a handler.
        """
        dispatch, batch = self.dispatch, job.batch
        assert batch is not None
        source = batch.source
        assert source is not None
        task, status, sink = self.task, self._status, batch.sink
        values, items = sink.values, sink.items
        listed = type(values) is list
        simple = batch.plain and listed and items is None
        # What `in_context` looks at, laid out. A task's context is the one that
        # it was resumed in, and its length that of the variables as they are.
        context = task.context
        width, held = len(batch.context), tuple(batch.context.items())
        stamp = dispatch.stamp
        real = stamp is perf_counter
        points = task._schedule_points
        rested = checked = perf_counter()
        since = job.started_at
        # Short items are measured together: alone, that would take longer. Those
        # taken between two sleeps are next to each other, and so can be counted.
        due: float = 0
        quick = 0
        quick_time = 0.0
        change = dispatch.change
        brief, share = batch.begin_turn(self), dispatch.slice
        # The last item that is in ``jobs``, and has been measured.
        self.jobs -= 1
        counted = self.counted = job.index - 1
        limit = batch.stop_at - 1
        first = special = True
        tired = failed = False
        value = None
        try:
            for index, item in chain(((job.index, job.input),), source):
                if special:
                    if first:
                        first = False
                    else:
                        if batch.stopped:
                            break
                        batch.last = index
                        if index + 1 >= batch.stop_at:
                            batch.hungry = False
                        if listed:
                            values.append(None)
                        if items is not None:
                            items.append(item)
                        if sink.reader is not None:
                            sink.look()
                        if tired:
                            tired = False
                            job.index = index
                            job.input = item
                            # As if the handler began with it.
                            failed = True
                            await checkpoint()
                            failed = False
                            brief, share = dispatch.slice, batch.begin_turn(self)
                            since = job.started_at = stamp()
                    special = not simple
                else:
                    batch.last = index
                    values.append(None)
                job.index = index
                job.input = item
                try:
                    value = await handler(item)
                except BaseException:
                    failed = True
                    raise
                slept = task._schedule_points
                if slept != points:
                    points = slept
                    context = task.context
                    now = stamp()
                    dispatch.runs.pending.append(now - since)
                    if len(dispatch.runs.pending) >= FLUSH:
                        # It may go on like this for ever, and nobody else looks.
                        dispatch.flush()
                    since = job.started_at = now
                    quick += index - counted - 1
                    self.jobs += index - counted
                    counted = self.counted = batch.last
                    due = 0
                    limit = batch.stop_at - 1
                    brief, share = share, dispatch.slice
                    batch.helpers = 2
                    rested = checked = perf_counter()
                    if counted >= limit:
                        break
                elif index >= due:
                    now = perf_counter()
                    spent = now - checked
                    fresh = index - counted
                    if spent < _SHORT:
                        due = index + _SKIP
                        if due > limit:
                            due = limit
                        quick += fresh
                        quick_time += spent
                    elif real:
                        dispatch.runs.pending.extend([spent / fresh] * fresh)
                    else:
                        quick += fresh
                    self.jobs += fresh
                    counted = self.counted = batch.last
                    checked = now
                    if real:
                        since = now
                    if counted >= limit:
                        # Looked at again, as a handler may read the stream.
                        limit = batch.stop_at - 1
                        if counted >= limit:
                            batch.helpers = 1
                            break
                    if now - rested > brief:
                        special = tired = True
                        if brief:
                            batch.spend_turn()
                if (
                    len(context) != width
                    or dispatch.change != change
                    or task._cancel_status is not status
                ):
                    break
                if held and not _holds(held):
                    break
                values[index] = value
            else:
                batch.run_dry()
        except BaseException as error:
            if failed or _is_ours(error):
                job.started_at = since
                failed = True
                raise
            batch.source_error = error
            batch.stop()
        finally:
            # Not those that others have taken while the last one slept.
            fresh = max(0, job.index - counted)
            self.jobs += fresh
            self.counted = NOT_PULLING
            self.quick += quick + max(0, fresh - failed)
            if real:
                self.quick_time += quick_time
            # From the frame of a handler, which its error has, a way leads here.
            del job, batch, sink, values, items
        return value

    def _watch_until(self, deadline: float) -> None:
        """Have the job that there is then looked at, at its deadline."""
        if self._alarm is not None:
            self.dispatch.timer.take_back(self._alarm)
        self._set_alarm(deadline)

    def _set_alarm(self, when: float) -> None:
        self._watch = when
        self._alarm = self.dispatch.timer.at(when, self._look_at_job)

    def _look_at_job(self) -> None:
        now = self.dispatch.clock()
        self._watch = inf
        self._alarm = None
        job = self.job
        if job is None or not job.begun or job.timeout == inf or job.terms.overdue:
            return
        time = job.timeout * job.terms.items
        deadline = job.started_at + self.dispatch.epoch + time
        if deadline > now:
            self._set_alarm(deadline)
        else:
            job.own_terms().overdue = True
            self.cancel_job(f"trio_pool: job {job.name()} ran out of time")

    def _die(self, job: Job, crash: BaseException) -> None:
        """Leave, as the worker is broken."""
        self._crash = crash
        # The context manager gets an error of its own: the job's error object
        # is being raised in the caller's task meanwhile.
        self._last_words = WorkerCrashed(job.name(), True, job.attempts, self.id)
        self.heed = True

    def _misnested(self, job: Job, answered: bool = False) -> None:
        error = RuntimeError(
            "the handler left a cancel scope or nursery open, so its worker is broken"
        )
        self._die(job, self._crash or error)
        if not answered:
            job.value = None
            self._lose(job, error)
            self.dispatch.fail(job, JobState.LOST)

    def _lose(self, job: Job, cause: BaseException) -> None:
        error = WorkerCrashed(job.name(), True, job.attempts, self.id)
        # The worker's own frames have the job, which keeps the error.
        error.__cause__ = cause.with_traceback(_below_call(cause.__traceback__))
        job.error = error

    def settle_error(self, job: Job, error: BaseException) -> None:
        """Decide what an error of a handler means, and answer."""
        job.name()
        traceback = _below_call(error.__traceback__)
        dispatch = self.dispatch
        rest: BaseException | None = error
        try:
            if isinstance(error, BaseExceptionGroup) and not isinstance(
                error, ExceptionGroup
            ):
                # Only a split that takes something out: it makes new objects.
                interrupts = error.subgroup(KeyboardInterrupt)
                if interrupts is not None:
                    rest = _first_leaf(interrupts)
                elif error.subgroup(trio.Cancelled) is not None:
                    _, rest = error.split(trio.Cancelled)
            elif isinstance(error, trio.Cancelled):
                rest = None
            if rest is None:
                self._settle_cancelled(job, error)
            elif isinstance(rest, Exception):
                # A cancelled caller gets its group whole, as from a direct call.
                terms = job.own_terms()
                terms.traceback = traceback
                job.error = rest if terms.raise_cancel is None else error
                if _is_of(rest, dispatch.config.crash_on):
                    self._die(job, rest)
                dispatch.fail(job, JobState.FAILED)
            elif isinstance(rest, WorkerGone):
                self._settle_gone(job, rest)
            else:
                self._lose(job, rest)
                self._die(job, rest)
                if isinstance(rest, KeyboardInterrupt):
                    dispatch.end(job, JobState.LOST)
                    self.supervisor.interrupt(rest)
                else:
                    dispatch.fail(job, JobState.LOST)
        finally:
            del error, rest, traceback

    def _settle_gone(self, job: Job, gone: WorkerGone) -> None:
        cause = gone.__cause__ or gone
        if not gone.planned:
            self._die(job, cause)
        # Nobody may take it for a worker that goes on, and so for an idle one.
        self._replace()
        if gone.started:
            self._lose(job, cause)
            self.dispatch.fail(job, JobState.LOST)
        else:
            self.dispatch.take_back_start(job, cause)

    def _settle_cancelled(self, job: Job, cancelled: BaseException) -> None:
        dispatch = self.dispatch
        terms = job.terms
        if terms.raise_cancel is None:
            if terms.overdue and not terms.cancel_asked:
                job.error = JobTimeout(
                    job.name(), True, job.attempts, self.id, job.timeout
                )
                dispatch.fail(job, JobState.TIMED_OUT)
                return
            if dispatch.stopping:
                dispatch.end_stopped(job)
                return
            batch = job.batch
            if not terms.cancel_asked and not (batch is not None and batch.stopped):
                # Nobody we know has cancelled it: something under the worker
                # is dying. The job's record is answered with the cause.
                raise cancelled
            job.error = JobCancelled(job.name(), True, job.attempts, self.id)
        dispatch.end(job, JobState.CANCELLED)


@disable_ki_protection
async def _call_ready(ready: Callable[[], Awaitable[object]]) -> None:
    await ready()


def compose(
    middleware: Sequence[Callable[..., Awaitable[Any]]],
    handler: Handler,
    worker: Worker,
) -> Handler:
    """Wrap a handler in middleware, the first of which is outermost.

    What it is called with is the job that the worker has. ``call_next`` goes on
    with the job that it is given, or with the one that its middleware got if it
    is called without.
    """

    # None of these is a coroutine of its own: there is nothing to do after.
    def innermost(job: CurrentJob, changed: CurrentJob | None = None) -> Awaitable[Any]:
        return handler((changed or job).input)

    step: Callable[..., Awaitable[Any]] = innermost
    first, *others = middleware
    for layer in reversed(others):
        step = _wrap(layer, step)

    def outermost(_: object) -> Awaitable[Any]:
        job = describe(worker.job)
        return first(job, partial(step, job))

    return outermost


def _wrap(
    layer: Callable[..., Awaitable[Any]], inner: Callable[..., Awaitable[Any]]
) -> Callable[..., Awaitable[Any]]:
    def step(job: CurrentJob, changed: CurrentJob | None = None) -> Awaitable[Any]:
        job = changed or job
        return layer(job, partial(inner, job))

    return step


def _open(factory: Callable[[], Any]) -> AbstractAsyncContextManager[Handler]:
    manager = _make(factory)
    if not (hasattr(manager, "__aenter__") and hasattr(manager, "__aexit__")):
        raise TypeError(
            "worker must be a callable that returns an async context manager, "
            "such as a function under @asynccontextmanager; it returned "
            f"{manager!r}"
        )
    return _Checked(manager)


@disable_ki_protection
def _make(factory: Callable[[], Any]) -> Any:
    return factory()


@final
class _Checked:
    """A worker's context manager, entered under Ctrl-C, its handler checked."""

    def __init__(self, manager: AbstractAsyncContextManager[Handler]) -> None:
        self._manager = manager

    @disable_ki_protection
    async def __aenter__(self) -> Handler:
        handler = await self._manager.__aenter__()
        try:
            check_handler("the value of worker", handler)
        except TypeError as error:
            await self._manager.__aexit__(type(error), error, error.__traceback__)
            raise
        return handler

    @disable_ki_protection
    async def __aexit__(self, *exc_info: Any) -> bool | None:
        return await self._manager.__aexit__(*exc_info)


def check_handler(option: str, handler: object) -> None:
    """Refuse what cannot be an ``async (job input) -> result``."""
    if not callable(handler):
        raise TypeError(f"{option} must be an async function, got {handler!r}")
    if inspect.isclass(handler):
        raise TypeError(
            f"{option} must be an async function, got the class {handler!r}; "
            "a class that is an async context manager goes into worker="
        )
    if not is_async(handler):
        name = getattr(handler, "__name__", "fn")
        raise TypeError(
            f"{option} must be an async function, got the sync {handler!r}; wrap it, "
            f"as in: async def handler(x): return await "
            f"trio.to_thread.run_sync({name}, x), or use threads as workers: "
            f"worker=trio_pool.offload.in_thread({name}). What gives a worker goes "
            "into worker= too."
        )


_CALLS = (
    Worker.serve.__code__,
    call_function.__code__,
    call_in_chunks.__code__,
    raise_caught.__code__,
    Worker._pull.__code__,
)


def _below_call(traceback: TracebackType | None) -> TracebackType | None:
    """Cut the worker's own frames off the traceback of a handler's error."""
    at = traceback
    while at is not None and at.tb_frame.f_code in _CALLS:
        at = at.tb_next
    return at or traceback


def _is_of(error: Exception, types: tuple[type[Exception], ...]) -> bool:
    if not types:
        return False
    if isinstance(error, types):
        return True
    return isinstance(error, ExceptionGroup) and error.subgroup(types) is not None


def _first_leaf(group: BaseExceptionGroup[Any]) -> BaseException:
    leaf: BaseException = group
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return leaf
