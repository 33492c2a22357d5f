"""The books of an inline pool, and how it runs a job in the task that asks for it."""

# What one job is, is borrowed from the pool: its record, and its reply.
# pyright: reportPrivateUsage=false
from __future__ import annotations

import itertools
from contextlib import AbstractAsyncContextManager
from threading import get_ident
from types import SimpleNamespace
from typing import Any, final

import trio

from .. import (
    Drain,
    JobCancelled,
    JobChanged,
    JobExpired,
    JobState,
    JobTimeout,
    PoolClosed,
    PoolState,
    PoolStatistics,
    Retry,
    WorkerCrashed,
    WorkerSnapshot,
    WorkerState,
    WouldDeadlock,
    WrongThread,
)
from .._checks import note
from .._config import PoolConfig
from .._current import CurrentJob, crew, describe, worker_around
from .._errors import WorkerGone
from .._events import UNHEARD, log
from .._job import Job, new_terms
from .._latency import Histogram
from .._policy import note_attempts
from .._telling import HookCalls
from .._worker import check_handler, compose, other_end_of

_HOOKS: dict[JobState, Any] = {
    JobState.DONE: "job_complete",
    JobState.FAILED: "job_error",
    JobState.TIMED_OUT: "job_error",
    JobState.LOST: "job_error",
    JobState.CANCELLED: "job_cancel",
    JobState.EXPIRED: "job_drop",
}


@final
class Slot:
    """Stands for a worker: what `current_job` finds, and `WorkerSnapshot` shows."""

    def __init__(self, runs: Runs, slot_id: int) -> None:
        self.dispatch = runs
        self.id = slot_id
        self.job: Job | None = None
        self.jobs = 0
        self.restarts = 0
        self.last_error: BaseException | None = None
        self.own_nurseries: frozenset[trio.Nursery] = frozenset()
        self.scope: trio.CancelScope | None = None

    def snapshot(self, now: float) -> WorkerSnapshot:
        """Picture it."""
        job = self.job
        begun = job is not None and job.begun
        return WorkerSnapshot(
            id=self.id,
            state=WorkerState.IDLE if job is None else WorkerState.BUSY,
            job_id=None if job is None else job.name(),
            job_age=now - job.started_at if job is not None and begun else None,
            jobs=self.jobs,
            restarts=self.restarts,
            last_error=self.last_error,
        )


@final
class Runs:
    """Runs jobs one after the other, and counts them.

    For a `Job`, its `Reply` and `current_job` it stands where the dispatcher
    of a pool stands, and has those few of its members that these ask for.
    """

    def __init__(self, config: PoolConfig, handler: Any, factory: Any) -> None:
        self.config = config
        self.name = config.name
        self.hooks = HookCalls(config.hooks)
        self.plain_terms = new_terms(config.retry)
        self.ids = itertools.count(1)
        self.epoch = 0.0
        self.nesting = SimpleNamespace(check=self._check_reader)
        self.wanted = config.size
        self.closed = self.stopping = False
        self.opened_at: float | None = None
        self.accepted = self.retries = self.restarts = self.running = 0
        self.delayed = 0
        self.ended = dict.fromkeys((s for s in JobState if s.terminal), 0)
        self.queue: dict[Job, None] = {}
        """Jobs of `submit_nowait` that have not been run yet."""
        self.unheard: dict[Job, None] = {}
        self.born: dict[Job, float] = {}
        self.waits, self.times = Histogram(), Histogram()
        self.slots = {n: Slot(self, n) for n in range(self.wanted)}
        self.factory = factory
        self.manager: AbstractAsyncContextManager[Any] | None = None
        self._handler = handler
        self._middleware = config.middleware
        self._thread: int | None = None
        self._lock: trio.StrictFIFOLock | None = None
        self._change: trio.Event | None = None
        self.paused = False

    # What `Job`, `Reply` and `CurrentJob` ask for.

    def check_thread(self) -> None:
        """Refuse a call from another thread than the first."""
        if self._thread is None:
            self._thread = get_ident()
        if get_ident() != self._thread:
            raise WrongThread(self.name)

    def next_id(self) -> int:
        """Return a number that no other job has."""
        return next(self.ids)

    def heard(self, job: Job) -> None:
        """Note that somebody has read a reply."""
        self.unheard.pop(job, None)

    def _check_reader(self, task: Any, job: Job, wait: str) -> None:
        if worker_around(task, self) is not None and not self._free():
            raise WouldDeadlock(self.name, wait)

    async def sleep(self, _: object) -> None:
        """Have a reply that the calling task reads come to its end."""
        task = trio.lowlevel.current_task()
        while True:
            await self.run_queue()
            if not any(task in (job.readers or ()) for job in self.born):
                return
            # Another task runs it.
            async with self._turn():
                pass

    def withdraw(self, job: Job) -> bool:
        """Cancel a job that is not running; false if it is."""
        if job not in self.queue:
            return False
        job.error = self.cancelled(job)
        self.end(job, JobState.CANCELLED)
        return True

    def cancel_running(self, job: Job) -> None:
        """Cancel the handler of a started job."""
        slot: Any = job.worker
        if slot is not None and slot.job is job and slot.scope is not None:
            slot.scope.cancel()

    def cancelled(self, job: Job) -> JobCancelled:
        """Make the error of a cancelled job."""
        worker = job.worker.id if job.worker is not None and job.attempts else None
        return JobCancelled(job.name(), job.attempts > 0, job.attempts, worker)

    def configure(self, config: PoolConfig) -> None:
        """Heed the hooks and the middleware that plugins have brought."""
        self.hooks = HookCalls(config.hooks)
        self._middleware = config.middleware

    async def finish_all(self, wait: str) -> None:
        """Run what is queued, and wait for what other tasks run."""
        if self._is_inside():
            raise WouldDeadlock(self.name, wait)
        while self.born:
            await self.run_queue()
            async with self._turn():
                await trio.lowlevel.checkpoint()

    # How a job comes in and goes.

    def refusal(self) -> PoolClosed:
        """Make the error of a closed pool."""
        return PoolClosed(self.name)

    def accept(self, job: Job) -> None:
        """Count a new job, which waits to be run."""
        self.check_thread()
        if self.closed:
            raise self.refusal()
        if self.factory is not None and self.manager is None:
            raise RuntimeError(
                f"worker= of inline pool {self.name!r} is set up by async with"
            )
        uid = job.terms.uid
        if uid is not None and any(uid == other.terms.uid for other in self.born):
            text = f"id must be an id that no live job has, got {uid!r}"
            raise ValueError(text)
        now = self._begin()
        self.accepted += 1
        job.state = JobState.QUEUED
        job.queued_at = now
        self.born[job] = now
        self.tell("job_queue", job)

    def _begin(self) -> float:
        now = trio.current_time()
        if self.opened_at is None:
            self.opened_at = now
        return now

    def end(self, job: Job, state: JobState) -> None:
        """End an accepted job, and count its end."""
        self.queue.pop(job, None)
        self.born.pop(job, None)
        job.state = state
        self.ended[state] += 1
        self.tell(_HOOKS[state], job)
        drain: Drain[Any] | None = job.terms.drain
        if drain is not None and state is JobState.DONE:
            try:
                drain.send(job.value)
            except Exception:
                log.exception("a drain refused the result of job %r", job.name())
        job.readers = None

    def keep_unheard(self, job: Job) -> None:
        """Keep a failure that is in a reply for the end of the block."""
        if job.state in UNHEARD and self.config.unobserved != "ignore":
            self.unheard[job] = None

    def put_off(self, job: Job) -> None:
        """Let an accepted job wait for who waits for the pool next."""
        self.queue[job] = None

    def can_run(self) -> bool:
        """Say whether the calling task may run a job now."""
        return not self._is_inside() or bool(self._free())

    def _is_inside(self) -> bool:
        return worker_around(trio.lowlevel.current_task(), self) is not None

    async def run_queue(self) -> None:
        """Run what was submitted without waiting, oldest first."""
        while self.queue and self.can_run():
            job = next(iter(self.queue))
            await self._run_in_turn(job)
            self.keep_unheard(job)

    async def run(self, job: Job) -> None:
        """Run what waits, and then a job until its end; raises cancellations only."""
        try:
            await self.run_queue()
            await self._run_in_turn(job)
        except BaseException as error:
            if job in self.born:
                lost = isinstance(error, KeyboardInterrupt)
                self.end(job, JobState.LOST if lost else JobState.CANCELLED)
            raise

    def _turn(self) -> trio.StrictFIFOLock:
        if self._lock is None:
            self._lock = trio.StrictFIFOLock()
        return self._lock

    async def _run_in_turn(self, job: Job) -> None:
        if self._is_inside():
            await self._run(job, True)
        else:
            async with self._turn():
                await self._run(job, False)

    async def _run(self, job: Job, nested: bool) -> None:
        if job.state is not JobState.QUEUED:
            # It was withdrawn meanwhile, or another task runs it.
            return
        slot = await self._take_slot(job, nested)
        if slot is None:
            return
        self.queue.pop(job, None)
        try:
            if await self._wait_delay(job):
                self.waits.add(max(0.0, trio.current_time() - job.queued_at), 1)
                while await self._attempt(job, slot):
                    pass
        except BaseException as error:
            if job in self.born:
                lost = isinstance(error, KeyboardInterrupt)
                self.end(job, JobState.LOST if lost else JobState.CANCELLED)
            raise

    def _free(self) -> list[Slot]:
        slots = [self.slots[n] for n in sorted(self.slots)]
        return [slot for slot in slots if slot.job is None]

    async def _take_slot(self, job: Job, nested: bool) -> Slot | None:
        while not self.stopping and (self.paused or not self._free()):
            if nested and not self.paused:
                raise WouldDeadlock(self.name, "process()")
            self._change = trio.Event()
            await self._change.wait()
        if job in self.born and self.stopping:
            job.error = self.cancelled(job)
            self.end(job, JobState.CANCELLED)
        return self._free()[0] if job.state is JobState.QUEUED else None

    def changed(self) -> None:
        """Let those go on who waited for `resume` or another size."""
        if self._change is not None:
            self._change.set()

    async def _wait_delay(self, job: Job) -> bool:
        """Wait until a job may start; false if it has waited for too long."""
        terms = job.terms
        expires = self.born[job] + terms.ttl
        self.delayed += 1
        job.state = JobState.DELAYED
        try:
            await trio.sleep_until(min(self.born[job] + terms.delay, expires))
        finally:
            self.delayed -= 1
        if job in self.born and self.stopping:
            job.error = self.cancelled(job)
            self.end(job, JobState.CANCELLED)
        elif trio.current_time() >= expires:
            job.error = JobExpired(job.name(), False, 0, None)
            self.end(job, JobState.EXPIRED)
        return job in self.born

    async def _attempt(self, job: Job, slot: Slot) -> bool:
        """Run a job once; say whether it is to be tried again."""
        other_end = other_end_of(self._handler)
        if other_end is not None and other_end.spent:
            await self.clean_up()
            await self.set_up()
        task = trio.lowlevel.current_task()
        outer = crew().get(task)
        slot.job, slot.own_nurseries = job, frozenset(task.child_nurseries)
        slot.jobs += 1
        job.worker = slot  # type: ignore[assignment]
        job.state = JobState.RUNNING
        job.attempts += 1
        job.deadline = trio.current_effective_deadline()
        begun = job.started_at = trio.current_time()
        if job.attempts == 1 and job.terms.retry is not None:
            job.own_terms().first_start = begun
        self.running += 1
        crew()[task] = slot
        self.tell("job_start", job)
        state, crash = JobState.DONE, None
        try:
            state, crash = await self._call(job, slot)
        except trio.Cancelled:
            job.error = None
            raise
        finally:
            slot.job = slot.scope = None
            if outer is None:
                del crew()[task]
            else:
                crew()[task] = outer
            self.running -= 1
            self.times.add(trio.current_time() - begun, 1)
        # No await before the books are right again.
        if state is JobState.QUEUED:
            job.attempts -= 1
            job.state = state
            await self._replace(slot, job, crash)
            return True
        wait = self._next_wait(job, state) if state in UNHEARD else None
        if wait is None:
            self.end(job, state)
            await self._replace(slot, job, crash)
            return False
        self.retries += 1
        job.own_terms().before = job.attempts
        job.state = JobState.DELAYED
        self.delayed += 1
        self.tell("job_retry", job, wait)
        try:
            await self._replace(slot, job, crash)
            await trio.sleep(wait)
        finally:
            self.delayed -= 1
        job.queued_at = trio.current_time()
        job.forget_error()
        return True

    async def _call(
        self, job: Job, slot: Slot
    ) -> tuple[JobState, BaseException | None]:
        """Call the handler; return how it ended, and what it broke by."""
        deadline = trio.current_time() + job.timeout
        try:
            with trio.CancelScope(deadline=deadline) as slot.scope:
                handler = self._handler
                if self._middleware:
                    handler = compose(self._middleware, handler, slot)  # type: ignore[arg-type]
                job.value = await handler(job.input)
                return JobState.DONE, None
        except Exception as error:
            terms = job.own_terms()
            terms.traceback = _below(error)
            job.error = error
            broken = isinstance(error, self.config.crash_on)
            return JobState.FAILED, error if broken else None
        except (trio.Cancelled, KeyboardInterrupt):
            raise
        except BaseException as error:
            if isinstance(error, BaseExceptionGroup) and error.subgroup(trio.Cancelled):
                raise
            cause = error
            if isinstance(error, WorkerGone):
                cause = error.__cause__ or error
                if not error.started and not job.terms.leased:
                    return JobState.QUEUED, cause
            crashed = WorkerCrashed(job.name(), True, job.attempts, slot.id)
            crashed.__cause__ = cause
            job.error = crashed
            return JobState.LOST, cause
        # Only a cancellation by this very scope comes here.
        if self.stopping or job.terms.cancel_asked:
            job.error = self.cancelled(job)
            return JobState.CANCELLED, None
        job.error = JobTimeout(job.name(), True, job.attempts, slot.id, job.timeout)
        return JobState.TIMED_OUT, None

    def _next_wait(self, job: Job, state: JobState) -> float | None:
        retry: Retry | None = job.terms.retry
        error = job.error
        if (
            retry is None
            or not isinstance(error, Exception)
            or self.stopping
            or job.terms.cancel_asked
        ):
            return None
        elapsed = trio.current_time() - job.terms.first_start
        try:
            wait = retry.next_wait(
                error, job.attempts, elapsed, crashed=state is JobState.LOST
            )
        except Exception:
            log.exception("the retry policy of job %r raised", job.name())
            return None
        if wait is None and job.attempts > 1:
            note_attempts(error, job.attempts)
        return wait

    # The one worker's context.

    async def set_up(self) -> None:
        """Enter the worker's context, if there is one to enter."""
        if self.factory is not None and self.manager is None:
            manager = self.factory()
            handler = await manager.__aenter__()
            check_handler("the value of worker", handler)
            self.manager, self._handler = manager, handler

    async def clean_up(self, error: BaseException | None = None) -> None:
        """Leave the worker's context, if it was entered."""
        manager, self.manager = self.manager, None
        if manager is not None:
            trace = None if error is None else error.__traceback__
            kind = None if error is None else type(error)
            await manager.__aexit__(kind, error, trace)

    async def _replace(self, slot: Slot, job: Job, crash: BaseException | None) -> None:
        if crash is None:
            return
        slot.last_error = crash
        slot.restarts += 1
        self.restarts += 1
        if self.manager is not None:
            last_words = WorkerCrashed(job.name(), True, job.attempts, slot.id)
            last_words.__cause__ = crash
            try:
                await self.clean_up(last_words)
            except Exception as error:
                if error is not last_words:
                    log.exception("the worker of pool %r failed to clean up", self.name)
            await self.set_up()

    # What is told.

    def tell(self, kind: Any, job: Job, delay: float | None = None) -> None:
        """Call a job hook, if anyone listens."""
        hook = f"on_{kind}"
        if self.hooks.listening(hook):
            worker = None if job.worker is None else job.worker.id
            assert job.state is not None
            event = JobChanged(
                kind,
                self.name,
                trio.current_time(),
                job.name(),
                job.state,
                worker,
                job.attempts,
                job.error,
                job.terms.key,
                delay,
            )
            self.hooks.call(hook, event)

    def statistics(self) -> PoolStatistics:
        """Count everything."""
        now, age = None, 0.0
        if self.opened_at is not None and trio.lowlevel.in_trio_run():
            now = trio.current_time()
            age = now - self.opened_at
        ended = {state.value: number for state, number in self.ended.items()}
        waiting = [
            job.queued_at for job in self.born if job.state is not JobState.RUNNING
        ]
        counts: dict[str, Any] = dict(
            ended,
            size=self.wanted,
            workers=len(self.slots),
            busy=self.running,
            accepted=self.accepted,
            delayed=self.delayed,
            queued=self.accepted
            - self.running
            - self.delayed
            - sum(self.ended.values()),
            running=self.running,
            retries=self.retries,
            restarts=self.restarts,
        )
        return PoolStatistics(
            oldest_wait=now - min(waiting) if waiting and now is not None else 0.0,
            wait=self.waits.latency(),
            run=self.times.latency(),
            throughput=sum(ended.values()) / age if age > 0 else 0.0,
            **counts,
        )

    def jobs_running(self) -> tuple[CurrentJob, ...]:
        """Describe the jobs that run, one inside of the other."""
        jobs = [slot.job for slot in self.slots.values() if slot.job is not None]
        return tuple(map(describe, jobs))

    def state(self) -> PoolState:
        """Say where in its life the pool is."""
        if self.closed:
            return PoolState.CLOSED if self.stopping else PoolState.CLOSING
        return PoolState.PAUSED if self.paused else PoolState.OPEN

    def snapshots(self) -> tuple[WorkerSnapshot, ...]:
        """Picture what stands for the workers."""
        now = trio.current_time() if trio.lowlevel.in_trio_run() else 0.0
        return tuple(slot.snapshot(now) for slot in self.slots.values())

    def want(self, size: int) -> None:
        """Have another number of slots; those that have a job stay until its end."""
        self.wanted = size
        for number in range(size):
            self.slots.setdefault(number, Slot(self, number))
        for number in [n for n in self.slots if n >= size]:
            if self.slots[number].job is None:
                del self.slots[number]
        self.changed()

    def close(self) -> None:
        """Take no more jobs."""
        self.closed = True
        self.paused = False
        self.changed()

    def stop(self) -> None:
        """End what waits, and cancel what runs."""
        self.close()
        self.stopping = True
        for job in tuple(self.queue):
            job.error = self.cancelled(job)
            self.end(job, JobState.CANCELLED)
        for slot in self.slots.values():
            if slot.scope is not None:
                slot.scope.cancel()
        self.changed()

    def unheard_errors(self) -> list[Exception]:
        """Take the errors of submitted jobs that nobody has read."""
        errors: list[Exception] = []
        for job in self.unheard:
            assert isinstance(job.error, Exception)
            error = job.error.with_traceback(job.terms.traceback)
            text = f"job {job.name()} of pool {self.name!r}, whose reply nobody read"
            note(error, f"trio_pool: {text}")
            errors.append(error)
        self.unheard.clear()
        return errors


def _below(error: BaseException) -> Any:
    """Cut the pool's own frame off a traceback, if it is not all of it."""
    trace = error.__traceback__
    return trace if trace is None or trace.tb_next is None else trace.tb_next
