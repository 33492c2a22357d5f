"""The worker actor: open its context, take a job, run it, answer, repeat."""

# Two reads of trio's insides are inlined here, as a call would cost more than
# they do: what `_cancel_status` and `_schedule_points` mean is pinned by the
# tests of `_trio`.
# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false

from __future__ import annotations

import inspect
from collections import deque
from contextlib import AbstractAsyncContextManager
from contextvars import Context, copy_context
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

from ._errors import JobCancelled, JobTimeout, WorkerCrashed
from ._events import JobState, WorkerState
from ._trio import WAKE, forget_nurseries, show_deadline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from trio.lowlevel import Task

    from ._batch import Batch
    from ._job import Job
    from ._supervisor import Supervisor

Handler: TypeAlias = "Callable[[Any], Awaitable[Any]]"
Factory: TypeAlias = "Callable[[], AbstractAsyncContextManager[Handler]]"

_DONE = JobState.DONE
_IDLE = WorkerState.IDLE
_MISSING = object()

# Items of a map that go by unmeasured while as many took less than this.
_SKIP = 7
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
        "_base",
        "_crash",
        "_fetch",
        "_life",
        "_scope",
        "asleep",
        "crashes",
        "deadline",
        "due",
        "heed",
        "id",
        "job",
        "jobs",
        "last_error",
        "post",
        "restarts",
        "retiring",
        "state",
        "supervisor",
        "task",
        "ticket",
    )

    def __init__(self, supervisor: Supervisor, worker_id: int) -> None:
        self.supervisor = supervisor
        self.id = worker_id
        self.state = WorkerState.STARTING
        self.retiring = False
        self.job: Job | None = None
        self.ticket: Job | None = None
        self.jobs = 0
        self.restarts = 0
        self.last_error: BaseException | None = None
        self.crashes: deque[float] = deque()
        self.due: float | None = None
        self.deadline = inf
        self.heed = False
        """Something must be looked at after the job: cancelled, crashed, retired."""
        self.asleep = False
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
            self.supervisor.reschedule(self.task, WAKE)

    def _woken(self, _: object) -> Abort:
        self.asleep = False
        return Abort.SUCCEEDED

    def cancel_job(self, reason: str) -> None:
        """Cancel the handler that is running."""
        self.heed = True
        if self._scope is not None:
            self._scope.cancel(reason=reason)

    def retire(self) -> None:
        """Leave after the current job; a setup under way is cancelled."""
        self.retiring = self.heed = True
        if self.state is WorkerState.STARTING and self._life is not None:
            self._life.cancel(reason="trio_pool: the worker is not wanted any more")

    def stay(self) -> bool:
        """Take back `retire`, if it is not too late."""
        if self.state is WorkerState.BUSY:
            self.retiring = False
        return not self.retiring

    # The actor.

    @enable_ki_protection
    async def run(self) -> None:
        """Be one worker from its setup to its cleanup, and report the end."""
        supervisor = self.supervisor
        self.task: Task = current_task()
        self._base: Context = self.task.context
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
                            supervisor.worker_leaves(self)
                        # The worker's own cleanup sees the worker's context.
                        self.task.context = self._base
                        await cancel_shielded_checkpoint()
        except BaseException as error:
            trouble = error
        self._life = self._scope = None
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
        supervisor = self.supervisor
        task = self.task
        call = supervisor.call
        next_job = supervisor.next_job
        finish = supervisor.finish
        watched = supervisor.watched
        wake = supervisor.reschedule
        fetch = self._fetch
        clock = supervisor.clock
        # No job may see the worker's own context object, which it could change.
        task.context = self._base.copy()
        await cancel_shielded_checkpoint()
        # In this same step it gets ready for mail, or takes its first job.
        supervisor.worker_ready(self)
        while not self.retiring:
            scope = self._scope = trio.CancelScope()
            self.heed = self.retiring
            shown = inf
            with scope:
                status = task._cancel_status
                # The time slice: when this worker last let other tasks run.
                points = task._schedule_points
                rested = checked = 0.0
                tired = False
                skip = 0
                # Time passes in sleep: between two of them once is enough.
                now = clock()
                while True:
                    job = self.job
                    if job is None:
                        job = next_job(self)
                        if job is None:
                            if self.retiring:
                                return
                            if supervisor.paused:
                                supervisor.rest(self)
                            else:
                                self.state = _IDLE
                                supervisor.idle[self] = None
                            # An idle worker keeps nothing of a caller alive.
                            task.context = self._base
                            self.ticket = context = batch = caller = None
                            # Sleeping here instead of in the channel's
                            # `receive` makes the way of a job a fifth shorter.
                            self.asleep = True
                            await wait_task_rescheduled(self._woken)
                            fetch()
                            if self.job is None:
                                supervisor.wake_up(self)
                            points = task._schedule_points
                            rested = 0.0
                            tired = False
                            now = clock()
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
                            now = clock()
                            if self.job is not job:
                                # It was withdrawn meanwhile.
                                supervisor.wake_up(self)
                                continue
                    deadline = job.deadline
                    if job.timeout < inf:
                        # Jobs that never slept may have taken long since.
                        now = clock()
                        deadline = min(deadline, self.start_timer(now + job.timeout))
                    job.attempts = 1
                    job.started_at = now
                    self.jobs += 1
                    if deadline != shown:
                        show_deadline(scope, deadline)
                        shown = deadline
                    if watched:
                        supervisor.tell_job("on_job_start", job)
                    batch = job.batch
                    try:
                        if batch is None or not batch.is_alone():
                            job.value = await call(handler, job.input)
                        else:
                            await self._pull(job, batch, handler, status)
                    except BaseException as error:
                        self._settle_error(job, error)
                        if task._cancel_status is not status:
                            self._misnested(None)
                    else:
                        if task._cancel_status is status:
                            caller = job.caller
                            if watched or caller is None:
                                finish(job)
                            else:
                                # `Supervisor.finish` once more, for the jobs
                                # that there are most of: the call would show.
                                job.state = _DONE
                                self.job = job.caller = None
                                self.deadline = inf
                                supervisor.running -= 1
                                supervisor.done += 1
                                wake(caller, WAKE)
                                if supervisor.joining:
                                    supervisor.check_drained()
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
                        skip = 0
                        now = clock()
                    elif skip:
                        skip -= 1
                    else:
                        moment = perf_counter()
                        if rested:
                            tired = moment - rested > supervisor.slice
                            # While jobs are this short, the clock can be left
                            # alone for some; it costs a tenth of one.
                            skip = _SKIP if moment - checked < _SHORT else 0
                        else:
                            rested = moment
                        checked = moment

    @disable_ki_protection
    async def _pull(
        self, job: Job, batch: Batch, handler: Handler, status: object
    ) -> None:
        """Run an item of `map` and those after it, while nothing else is to do.

        Returns with a value in ``job`` that is still to be answered. This is
        `Batch.take` and `Supervisor.finish` in a nutshell: an item costs less
        than one of those calls. So does protection from Ctrl-C, which may
        land anywhere here: the books move by the one store of ``batch.taken``,
        and the item in hand is lost, as it is when Ctrl-C lands in a handler.
        """
        supervisor = self.supervisor
        task = self.task
        advance, iterator, values = batch.advance, batch.iterator, batch.values
        assert iterator is not None
        assert values is not None
        # What `in_context` looks at, laid out.
        width, held = len(batch.context), tuple(batch.context.items())
        plain = advance is next
        points = task._schedule_points
        rested = checked = perf_counter()
        skip = 0
        change = supervisor.change
        brief = supervisor.slice
        index, item = job.index, job.input
        while True:
            value = await handler(item)
            slept = task._schedule_points
            if slept != points:
                points = slept
                rested = checked = perf_counter()
                job.started_at = supervisor.clock()
            elif skip:
                skip -= 1
            else:
                now = perf_counter()
                if now - rested > brief:
                    break
                # While items are this short, the clock can be left alone for
                # some; it costs as much as one.
                skip = _SKIP if now - checked < _SHORT else 0
                checked = now
            touched = len(copy_context()) != width
            for var, kept in held:
                if var.get(_MISSING) is not kept:
                    touched = True
            if (
                touched
                or supervisor.change != change
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
        job.value = value

    def start_timer(self, deadline: float) -> float:
        """Have the watchdog cancel the job at ``deadline`` if it still runs."""
        self.deadline = deadline
        self.supervisor.watch(deadline)
        return deadline

    def _last_words(self, job: Job) -> WorkerCrashed:
        # The context manager gets an error of its own: the job's error object
        # is being raised in the caller's task meanwhile.
        return WorkerCrashed(job.id, True, job.attempts, self.id)

    def _misnested(self, job: Job | None) -> None:
        error = RuntimeError(
            "the handler left a cancel scope or nursery open, so its worker is broken"
        )
        self._crash = self._crash or error
        self.heed = True
        if job is not None:
            job.value = None
            self._lose(job, error)
            self.supervisor.end(job, JobState.LOST)

    def _lose(self, job: Job, cause: BaseException) -> None:
        error = WorkerCrashed(job.id, True, job.attempts, self.id)
        error.__cause__ = cause
        job.error = error

    def _settle_error(self, job: Job, error: BaseException) -> None:
        """Decide what an error of a handler means, and answer."""
        job.name()
        job.traceback = _below_call(error.__traceback__)
        supervisor = self.supervisor
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
                if _is_of(rest, supervisor.config.crash_on):
                    self._crash = rest
                    self.heed = True
                supervisor.end(job, JobState.FAILED)
            else:
                job.traceback = None
                self._lose(job, rest)
                self._crash = rest
                self.heed = True
                supervisor.end(job, JobState.LOST)
                if isinstance(rest, KeyboardInterrupt):
                    supervisor.interrupt(rest)
        finally:
            del error, rest

    def _settle_cancelled(self, job: Job, cancelled: BaseException) -> None:
        supervisor = self.supervisor
        job.traceback = None
        if job.raise_cancel is None:
            if job.overdue and not job.cancel_asked:
                job.error = JobTimeout(job.id, True, job.attempts, self.id, job.timeout)
                supervisor.end(job, JobState.TIMED_OUT)
                return
            if supervisor.stopping:
                supervisor.end_stopped(job)
                return
            batch = job.batch
            if not job.cancel_asked and not (batch is not None and batch.stopped):
                # Nobody we know has cancelled it: something under the worker
                # is dying. The job's record is answered with the cause.
                raise cancelled
            job.error = JobCancelled(job.id, True, job.attempts, self.id)
        supervisor.end(job, JobState.CANCELLED)


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
    if not _is_async(handler):
        name = getattr(handler, "__name__", "fn")
        raise TypeError(
            f"{option} must be an async function, got the sync {handler!r}; wrap it, "
            f"as in: async def handler(x): return await "
            f"trio.to_thread.run_sync({name}, x)"
        )


def _is_async(handler: Any) -> bool:
    # Through functools.wraps, functools.partial and callable objects.
    seen = handler
    while True:
        if inspect.iscoroutinefunction(seen):
            return True
        inner = getattr(seen, "__wrapped__", None) or getattr(seen, "func", None)
        if inner is None:
            break
        seen = inner
    if inspect.isroutine(seen) or inspect.isclass(seen):
        return False
    return inspect.iscoroutinefunction(type(seen).__call__)


_CALLS = (
    call_handler.__code__,
    call_function.__code__,
    Worker._pull.__code__,
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
