"""The worker actor: open its context, take a job, run it, answer, repeat."""

# Two reads of trio's insides are inlined here, as a call would cost more than
# they do: what `_cancel_status` and `_schedule_points` mean is pinned by the
# tests of `_trio`.
# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false

from __future__ import annotations

import inspect
import sys
from collections import deque
from contextlib import AbstractAsyncContextManager
from contextvars import Context, copy_context
from functools import partial
from math import inf
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias, final

import trio
from trio.lowlevel import (
    Abort,
    cancel_shielded_checkpoint,
    current_task,
    disable_ki_protection,
    enable_ki_protection,
    wait_task_rescheduled,
)

from ._checks import is_async
from ._current import CurrentJob, crew, describe
from ._errors import JobCancelled, JobTimeout, WorkerCrashed
from ._events import JobState, WorkerState
from ._latency import FLUSH
from ._trio import WAKE, forget_nurseries, show_deadline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from types import TracebackType

    from trio.lowlevel import Task

    from ._batch import Batch
    from ._dispatch import Dispatch
    from ._job import Job
    from ._lease import Lease
    from ._supervisor import Supervisor
    from ._timer import Alarm

Handler: TypeAlias = "Callable[[Any], Awaitable[Any]]"
Factory: TypeAlias = "Callable[[], AbstractAsyncContextManager[Handler]]"

_DONE = JobState.DONE
_IDLE = WorkerState.IDLE
_MISSING = object()

# Items of a map that go by unmeasured while as many took less than this.
_SKIP = 7

# Seconds; jobs that take less are measured together, which is a good deal
# cheaper than to put each into a histogram.
_SHORT = 0.00002


@disable_ki_protection
async def call_handler(handler: Handler, job_input: Any) -> Any:
    """Call a handler so that Ctrl-C may interrupt it, unlike its worker."""
    return await handler(job_input)


@disable_ki_protection
async def call_function(_: object, call: tuple[Callable[..., Any], Any]) -> Any:
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
        "_life",
        "_onion",
        "_scope",
        "_watch",
        "alarms",
        "asleep",
        "crashes",
        "deadline",
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
        self.gated = self.dispatch.gated
        """More than being free is wanting for it to get a job."""
        self.job: Job | None = None
        self.ticket: Job | None = None
        self.jobs = 0
        self.jobs_before = 0
        """Jobs that were started before it was set up last."""
        self.quick = 0
        """Those of them that took next to no time."""
        self.quick_time = 0.0
        self.idle_since = 0.0
        self.restarts = 0
        self.last_error: BaseException | None = None
        self.crashes: deque[float] = deque()
        self.alarms: list[Alarm] = []
        """What is to happen to it: a restart, or recycling."""
        self.deadline = inf
        self._watch = inf
        self._alarm: Alarm | None = None
        self.heed = False
        """Something must be looked at after the job: cancelled, crashed, retired."""
        self.asleep = False
        self.own_nurseries: frozenset[trio.Nursery] = frozenset()
        """Those of its own context: what runs there is part of no job."""
        self.is_getting_ready = False
        self._onion: Callable[[CurrentJob], Awaitable[Any]] | None = None
        self._crash: BaseException | None = None
        self._scope: trio.CancelScope | None = None
        self._life: trio.CancelScope | None = None

    # What others do to it: synchronous.

    def nudge(self) -> None:
        """Have an idle worker look for something to do."""
        # A fresh copy, as what a job sets must not reach the worker's own.
        self.task.context = self._base.copy()
        # One that has been woken already looks at its record anyway.
        if self.asleep:
            self.asleep = False
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
        self.gated = self.dispatch.gated or self.leaving or self.lease is not None

    def recycle(self) -> None:
        """Leave after the current job; an idle worker has to be nudged."""
        self.leaving = self.gated = self.heed = True
        if self.is_getting_ready:
            self.cancel_job("trio_pool: the worker is not wanted any more")

    def stay(self) -> bool:
        """Take back `retire`, if it is not too late."""
        if self.state is WorkerState.BUSY:
            self.retiring = self.leaving = False
            self.set_gate()
        return not self.retiring

    # The actor.

    @enable_ki_protection
    async def run(self) -> None:
        """Be one worker from its setup to its cleanup, and report the end."""
        supervisor = self.supervisor
        self.task: Task = current_task()
        self._base: Context = self.task.context
        crew()[self.task] = self
        # Room for one: a message sent in the tick in which the worker is
        # cancelled must be accepted; the job stays on record in `job`.
        mailbox, receiver = trio.open_memory_channel["Job | None"](1)
        self.post = mailbox.send_nowait
        self._fetch = receiver.receive_nowait
        self._crash = None
        trouble: BaseException | None = None
        try:
            with trio.CancelScope() as self._life:
                if self.retiring:
                    self._life.cancel()
                async with self._opened() as handler:
                    try:
                        await self.serve(handler)
                    finally:
                        # A worker that never got ready has nothing to leave.
                        if self.state is not WorkerState.STARTING:
                            supervisor.worker_leaves(self, sys.exc_info()[1])
                        # The worker's own cleanup sees the worker's context.
                        self.task.context = self._base
                        await cancel_shielded_checkpoint()
        except BaseException as error:
            trouble = error
        self._life = self._scope = self._onion = None
        del crew()[self.task]
        if self.task.child_nurseries:
            forget_nurseries(self.task)
        try:
            supervisor.worker_gone(self, self._crash, trouble)
        finally:
            del trouble
            self._crash = None

    def _opened(self) -> AbstractAsyncContextManager[Handler]:
        manager = _make(self.supervisor.factory)
        if not (hasattr(manager, "__aenter__") and hasattr(manager, "__aexit__")):
            raise TypeError(
                "worker must be a callable that returns an async context manager, "
                "such as a function under @asynccontextmanager; it returned "
                f"{manager!r}"
            )
        return _Checked(manager)

    async def serve(self, handler: Handler) -> None:
        """Run jobs until told to retire; raises `WorkerCrashed` to be replaced."""
        dispatch = self.dispatch
        task = self.task
        call = self.supervisor.call
        if self.supervisor.middleware:
            self._onion = compose(self.supervisor.middleware, call, handler)
            call = self._call_onion
        ready = getattr(handler, "ready", None)
        next_job = dispatch.next_job
        finish = dispatch.finish
        wake = dispatch.reschedule
        fetch = self._fetch
        clock = dispatch.clock
        stamp = dispatch.stamp
        waits = dispatch.waits.pending
        runs = dispatch.runs.pending
        plain = stamp is perf_counter
        # No job may see the worker's own context object, which it could change.
        task.context = self._base.copy()
        await cancel_shielded_checkpoint()
        # In this same step it gets ready for mail, or takes its first job.
        self.own_nurseries = frozenset(task.child_nurseries)
        self.supervisor.worker_ready(self)
        while not self.leaving or self.lease is not None:
            scope = self._scope = trio.CancelScope()
            self.heed = self.leaving
            shown = inf
            with scope:
                status = task._cancel_status
                # The time slice: when this worker last let other tasks run.
                points = task._schedule_points
                rested = 0.0
                tired = False
                # Time passes in sleep and in jobs: once after each is enough.
                now = stamp()
                while True:
                    job = self.job
                    if job is None:
                        if (
                            ready is not None
                            and not (self.lease and self.lease.holds(self))
                            and not dispatch.is_spent(self)
                        ):
                            await self._get_ready(ready)
                            if self.heed:
                                break
                        job = next_job(self, now)
                        if self.job is not job:
                            # A hook that heard of it has had it withdrawn.
                            dispatch.wake_up(self)
                            continue
                        if job is None:
                            if self.leaving and self.lease is None:
                                return
                            if self.gated:
                                dispatch.rest(self)
                            else:
                                self.state = _IDLE
                                dispatch.idle[self] = None
                            # An idle worker keeps nothing of a caller alive.
                            task.context = self._base
                            self.ticket = context = batch = caller = None
                            # Sleeping here instead of in the channel's
                            # `receive` makes the way of a job a fifth shorter.
                            self.asleep = True
                            await wait_task_rescheduled(self._woken)
                            fetch()
                            if self.job is None:
                                dispatch.wake_up(self)
                            points = task._schedule_points
                            rested = 0.0
                            tired = False
                            if len(runs) >= FLUSH or len(waits) >= FLUSH:
                                dispatch.flush()
                            now = stamp()
                            continue
                        # An idle worker was woken in the job's context; a busy
                        # one is still in that of the last job.
                        if tired or (
                            (copy_context() or job.context)
                            and not in_context(job.context)
                        ):
                            context = job.context
                            task.context = context.copy() if job.batch else context
                            await cancel_shielded_checkpoint()
                            points = task._schedule_points
                            rested = 0.0
                            tired = False
                            if len(runs) >= FLUSH or len(waits) >= FLUSH:
                                dispatch.flush()
                            now = stamp()
                            if self.job is not job:
                                # It was withdrawn meanwhile.
                                dispatch.wake_up(self)
                                continue
                        if job.batch is None:
                            waits.append(now - job.queued_at)
                    deadline = job.deadline
                    if job.timeout < inf:
                        deadline = min(
                            deadline, self.start_timer(clock() + job.timeout)
                        )
                    job.attempts += 1
                    job.started_at = now
                    self.jobs += 1
                    if deadline != shown:
                        show_deadline(scope, deadline)
                        shown = deadline
                    if dispatch.watched:
                        dispatch.tell_job("on_job_start", job)
                    batch = job.batch
                    try:
                        if (
                            batch is None
                            or job.before
                            or ready is not None
                            or not batch.is_alone()
                        ):
                            job.value = await call(handler, job.input)
                            moment = perf_counter()
                            now = moment if plain else stamp()
                            spent = now - job.started_at
                            if spent < _SHORT:
                                self.quick += 1
                                self.quick_time += spent
                            else:
                                runs.append(spent)
                        else:
                            await self._pull(job, batch, handler, status)
                            moment = perf_counter()
                            now = moment if plain else stamp()
                    except BaseException as error:
                        # Measured first: what is told of the end may ask for it.
                        moment = perf_counter()
                        now = moment if plain else stamp()
                        runs.append(now - job.started_at)
                        self._settle_error(job, error)
                        if task._cancel_status is not status:
                            self._misnested(None)
                    else:
                        if task._cancel_status is status:
                            caller = job.caller
                            if caller is None or dispatch.watched:
                                finish(job)
                            else:
                                # `Dispatch.finish` once more, for the jobs
                                # that there are most of: the call would show.
                                job.state = _DONE
                                self.job = job.caller = None
                                self.deadline = inf
                                dispatch.running -= 1
                                dispatch.done += 1
                                wake(caller, WAKE)
                                if dispatch.listeners:
                                    dispatch.hear_end()
                        else:
                            self._misnested(job)
                    if self.heed:
                        if self._crash is not None:
                            raise self._last_words(job) from self._crash
                        break
                    slept = task._schedule_points
                    if slept != points:
                        points = slept
                        rested = 0.0
                        if len(runs) >= FLUSH or len(waits) >= FLUSH:
                            dispatch.flush()
                    elif rested:
                        tired = moment - rested > dispatch.slice
                    else:
                        rested = moment

    async def _get_ready(self, ready: Callable[[], Awaitable[object]]) -> None:
        """Wait until the handler says that it can take a job."""
        self.is_getting_ready = True
        self.task.context = self._base.copy()
        await cancel_shielded_checkpoint()
        try:
            if not self.heed:
                await _call_ready(ready)
        finally:
            self.is_getting_ready = False

    @disable_ki_protection
    async def _call_onion(self, _: Handler, __: object) -> Any:
        """Call the middleware around the handler."""
        assert self._onion is not None
        assert self.job is not None
        return await self._onion(describe(self.job))

    @disable_ki_protection
    async def _pull(
        self, job: Job, batch: Batch, handler: Handler, status: object
    ) -> None:
        """Run an item of `map` and those after it, while nothing else is to do.

        Returns with a value in ``job`` that is still to be answered. This is
        `Batch.take` and `Dispatch.finish` in a nutshell: an item costs less
        than one of those calls. So does protection from Ctrl-C, which may
        land anywhere here: the books move by the one store of ``batch.taken``,
        and the item in hand is lost, as it is when Ctrl-C lands in a handler.
        """
        dispatch = self.dispatch
        task = self.task
        advance, iterator, values = batch.advance, batch.iterator, batch.values
        assert iterator is not None
        assert values is not None
        # What `in_context` looks at, laid out.
        width, held = len(batch.context), tuple(batch.context.items())
        plain = advance is next
        stamp = dispatch.stamp
        real = stamp is perf_counter
        points = task._schedule_points
        rested = checked = perf_counter()
        since = job.started_at
        # Short items are measured together: alone, that would take longer.
        skip = span = quick = 0
        quick_time = 0.0
        change = dispatch.change
        brief = dispatch.slice
        index, item = job.index, job.input
        try:
            while True:
                value = await handler(item)
                slept = task._schedule_points
                if slept != points:
                    points = slept
                    now = stamp()
                    dispatch.runs.pending.append(now - since)
                    since = job.started_at = now
                    quick += span - skip
                    skip = span = 0
                    rested = checked = perf_counter()
                elif skip:
                    skip -= 1
                else:
                    now = perf_counter()
                    spent = now - checked
                    items = span + 1
                    span = 0
                    if spent < _SHORT:
                        skip = span = _SKIP
                        quick += items
                        quick_time += spent
                    elif real:
                        dispatch.runs.pending.extend([spent / items] * items)
                    else:
                        quick += items
                    checked = now
                    if real:
                        since = now
                    if now - rested > brief:
                        break
                touched = len(copy_context()) != width
                for var, kept in held:
                    if var.get(_MISSING) is not kept:
                        touched = True
                if (
                    touched
                    or dispatch.change != change
                    or task._cancel_status is not status
                ):
                    break
                try:
                    item = advance(iterator)
                except StopIteration:
                    batch.run_dry()
                    break
                except BaseException as error:
                    batch.source_error = error
                    batch.stop()
                    break
                if not plain and batch.stopped:
                    break
                values[index] = value
                values.append(None)
                index = batch.taken
                batch.taken = index + 1
                job.index = index
                job.input = item
                self.jobs += 1
        except BaseException:
            job.started_at = since
            raise
        finally:
            self.quick += quick + span - skip
            if real:
                self.quick_time += quick_time
        job.value = value

    def start_timer(self, deadline: float) -> float:
        """Have the job cancelled at ``deadline`` if it still runs."""
        self.deadline = deadline
        if deadline < self._watch:
            # One alarm a worker is enough: ringing, it looks at the job there is.
            if self._alarm is not None:
                self.dispatch.timer.take_back(self._alarm)
            self._set_alarm(deadline)
        return deadline

    def _set_alarm(self, when: float) -> None:
        self._watch = when
        self._alarm = self.dispatch.timer.at(when, self._look_at_job)

    def _look_at_job(self) -> None:
        now = self.dispatch.clock()
        self._watch = inf
        self._alarm = None
        if self.job is None or self.deadline == inf:
            return
        if self.deadline > now:
            self._set_alarm(self.deadline)
        else:
            self.deadline = inf
            self.job.overdue = True
            self.cancel_job(f"trio_pool: job {self.job.name()} ran out of time")

    def _last_words(self, job: Job) -> WorkerCrashed:
        # The context manager gets an error of its own: the job's error object
        # is being raised in the caller's task meanwhile.
        return WorkerCrashed(job.name(), True, job.attempts, self.id)

    def _misnested(self, job: Job | None) -> None:
        error = RuntimeError(
            "the handler left a cancel scope or nursery open, so its worker is broken"
        )
        self._crash = self._crash or error
        self.heed = True
        if job is not None:
            job.value = None
            self._lose(job, error)
            self.dispatch.fail(job, JobState.LOST)

    def _lose(self, job: Job, cause: BaseException) -> None:
        error = WorkerCrashed(job.name(), True, job.attempts, self.id)
        error.__cause__ = cause
        job.error = error

    def _settle_error(self, job: Job, error: BaseException) -> None:
        """Decide what an error of a handler means, and answer."""
        job.name()
        job.traceback = _below_call(error.__traceback__)
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
                job.error = rest if job.raise_cancel is None else error
                if _is_of(rest, dispatch.config.crash_on):
                    self._crash = rest
                    self.heed = True
                dispatch.fail(job, JobState.FAILED)
            else:
                job.traceback = None
                self._lose(job, rest)
                self._crash = rest
                self.heed = True
                if isinstance(rest, KeyboardInterrupt):
                    dispatch.end(job, JobState.LOST)
                    self.supervisor.interrupt(rest)
                else:
                    dispatch.fail(job, JobState.LOST)
        finally:
            del error, rest

    def _settle_cancelled(self, job: Job, cancelled: BaseException) -> None:
        dispatch = self.dispatch
        job.traceback = None
        if job.raise_cancel is None:
            if job.overdue and not job.cancel_asked:
                job.error = JobTimeout(
                    job.name(), True, job.attempts, self.id, job.timeout
                )
                dispatch.fail(job, JobState.TIMED_OUT)
                return
            if dispatch.stopping:
                dispatch.end_stopped(job)
                return
            batch = job.batch
            if not job.cancel_asked and not (batch is not None and batch.stopped):
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
    call: Callable[[Handler, Any], Awaitable[Any]],
    handler: Handler,
) -> Callable[..., Awaitable[Any]]:
    """Wrap a handler in middleware, the first of which is outermost.

    ``call_next`` goes on with the job that it is given, or with the one that
    its middleware got if it is called without.
    """

    async def innermost(job: CurrentJob, changed: CurrentJob | None = None) -> Any:
        return await call(handler, (changed or job).input)

    step: Callable[..., Awaitable[Any]] = innermost
    for layer in reversed(middleware):
        step = _wrap(layer, step)
    return step


def _wrap(
    layer: Callable[..., Awaitable[Any]], inner: Callable[..., Awaitable[Any]]
) -> Callable[..., Awaitable[Any]]:
    async def step(job: CurrentJob, changed: CurrentJob | None = None) -> Any:
        job = changed or job
        return await layer(job, partial(inner, job))

    return step


@disable_ki_protection
def _make(factory: Factory) -> Any:
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
            if not await self._manager.__aexit__(
                type(error), error, error.__traceback__
            ):
                raise
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
            f"trio.to_thread.run_sync({name}, x)"
        )


_CALLS = (
    call_handler.__code__,
    call_function.__code__,
    Worker._pull.__code__,
    Worker._call_onion.__code__,
)


def _below_call(traceback: TracebackType | None) -> TracebackType | None:
    """Cut the worker's own frames off the traceback of a handler's error."""
    at = traceback
    while at is not None:
        code = at.tb_frame.f_code
        if code in _CALLS:
            return at.tb_next
        at = at.tb_next
    return traceback


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
