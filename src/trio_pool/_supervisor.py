"""The supervisor actor: the books, the wanted workers, restarts and timers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import suppress
from heapq import heappop, heappush
from threading import get_ident
from typing import TYPE_CHECKING, Any, cast, final

import attrs
import trio
from trio.lowlevel import ParkingLot, enable_ki_protection

from ._backlog import Line
from ._batch import Batch
from ._errors import (
    BacklogFull,
    JobCancelled,
    JobDropped,
    PoolBroken,
    PoolClosed,
    WorkerCrashed,
    WrongThread,
)
from ._events import (
    UNHEARD,
    HookCalls,
    JobChanged,
    JobState,
    PoolChanged,
    PoolResized,
    PoolStatistics,
    ShutdownReport,
    WorkerChanged,
    WorkerSnapshot,
    WorkerState,
    log,
)
from ._job import Job
from ._trio import WAKE, rescheduler
from ._worker import Factory, Handler, Worker

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from ._policy import PoolConfig

_BUSY = WorkerState.BUSY
_QUEUED = JobState.QUEUED
_RUNNING = JobState.RUNNING
_DONE = JobState.DONE

# No worker is set up again faster than this, whatever its backoff says.
_LEAST_BACKOFF = 0.01

# Seconds that cancelled jobs get to unwind before shutdown() reports them.
_UNWINDING = 1.0

# A worker that never sleeps yields after _SLICE seconds; all of them together
# hold the loop for about _TURN seconds.
_SLICE = 0.0005
_TURN = 0.0015
_LEAST_SLICE = 0.00002

_HOOKS = {
    JobState.DONE: "on_job_complete",
    JobState.FAILED: "on_job_error",
    JobState.TIMED_OUT: "on_job_error",
    JobState.LOST: "on_job_error",
    JobState.CANCELLED: "on_job_cancel",
    JobState.DROPPED: "on_job_drop",
}


@final
@attrs.frozen
class _Gone:
    """A worker's task has ended, by a crash if there is an error."""

    worker: Worker
    error: BaseException | None


@final
class Supervisor:
    """Owns the books, decides in synchronous steps, acts in its own task.

    What a job meets are the plain methods, called in the caller's or the
    worker's own step. The task hears over its memory channel of ended
    workers and new sizes, and keeps the timers.
    """

    def __init__(
        self,
        config: PoolConfig,
        factory: Factory,
        call: Callable[[Handler, Any], Awaitable[Any]],
    ) -> None:
        self.config = config
        self.factory = factory
        self.call = call
        self.clock: Callable[[], float] = trio.current_time
        self.wanted = config.size
        self.max_backlog = config.max_backlog
        self.slice = _SLICE
        self.next_id: Callable[[], int] = itertools.count(1).__next__
        self.hooks = HookCalls(config.hooks)
        self.watched = self.hooks.any_job_hook
        self.thread = -1
        # The books.
        self.accepted = 0
        self.running = 0
        self.done = 0
        self.pulled = 0
        """Items of ended batches that `Worker._pull` took and finished."""
        self.change = 0
        """Counts what such a worker must stop and look at."""
        self.ended = dict.fromkeys((s for s in JobState if s.terminal), 0)
        self.restarts = 0
        self.line = Line()
        """The backlog: accepted jobs, and batches."""
        self.room = Line()
        """Jobs whose callers wait for room; not accepted yet."""
        self.unheard: dict[Job, None] = {}
        # The workers, by id; those that are gone for good leave.
        self.workers: dict[int, Worker] = {}
        self.idle: dict[Worker, None] = {}
        self.resting: dict[Worker, None] = {}
        """Idle workers of a paused pool."""
        self.batches: dict[Batch, None] = {}
        # The life of the pool.
        self.closed = True
        self.stopping = False
        self.paused = False
        self.opened = trio.Event()
        self.finished = trio.Event()
        self.failure: BaseException | None = None
        self.open_error: BaseException | None = None
        self._is_open = False
        self._started = 0
        self._slots = 0
        self._free: list[int] = []
        self._life = trio.CancelScope(shield=True)
        self._body: trio.CancelScope | None = None
        self._timer: trio.CancelScope | None = None
        self._armed = math.inf
        self._tell, self._hear = trio.open_memory_channel["_Gone | None"](math.inf)
        self._drained = ParkingLot()
        self.joining = 0
        """Tasks parked there: asking the lot itself costs more, on every job."""
        self._staffed = ParkingLot()
        self._closing: _Closing | None = None

    # ------------------------------------------------------------------
    # Jobs: what callers and workers do in their own step.

    def check_thread(self) -> None:
        """Refuse a call from another thread."""
        if get_ident() != self.thread:
            raise WrongThread(self.config.name)

    def refusal(self) -> Exception:
        """Make the error of a pool that takes no more jobs."""
        if isinstance(self.failure, PoolBroken):
            return self._broken(None)
        return PoolClosed(self.config.name)

    def accept(self, job: Job, wait: bool) -> bool:
        """Hand a new job over, queue it, or let its caller queue for room.

        Says whether there is something to wait for: not if the job was
        dropped at once, nor if the caller has been cancelled already and would
        have had to wait or to push out another's job; then nothing has
        happened. Raises when the job is refused.
        """
        if get_ident() != self.thread:
            raise WrongThread(self.config.name)
        if self.closed:
            raise self.refusal()
        if self.idle:
            worker, _ = self.idle.popitem()
            self.accepted += 1
            self.running += 1
            job.state = _RUNNING
            job.worker = worker
            worker.job = job
            worker.state = _BUSY
            worker.task.context = job.context
            if worker.asleep:
                # As `Worker.nudge` does, in the step of every job that finds one idle.
                worker.asleep = False
                worker.post(job)
                self.reschedule(worker.task, WAKE)
        else:
            line = self.line
            if line.count >= self.max_backlog:
                return self._overflow(job, wait)
            self.accepted += 1
            self.change += 1
            job.state = _QUEUED
            if job.priority:
                line.push(job)
            else:
                # `Line.push` in the step where most jobs are that come here.
                job.waiting = True
                line.count += 1
                line.plain.append(job)
        if self.watched:
            self.tell_job("on_job_queue", job)
            return job.error is None
        return True

    def _overflow(self, job: Job, wait: bool) -> bool:
        drop = self.config.overflow == "drop_oldest"
        if wait and trio.current_effective_deadline() == -math.inf:
            return False
        if not drop and (not wait or self.config.overflow == "reject"):
            raise BacklogFull(self.config.name, self.max_backlog)
        if not drop:
            self.change += 1
            self.room.push(job)
            return True
        while self.line.count >= self.max_backlog:
            oldest = self.line.oldest()
            if oldest is None:
                self._drop_at_once(job)
                return False
            oldest.error = JobDropped(oldest.id, False, 0, None)
            self.end(oldest, JobState.DROPPED)
            if self.closed:
                # By a hook that heard of the drop.
                raise self.refusal()
        self._queue(job)
        return True

    def _queue(self, job: Job) -> None:
        self.accepted += 1
        job.state = _QUEUED
        self.change += 1
        self.line.push(job)
        if self.watched:
            self.tell_job("on_job_queue", job)

    def _drop_at_once(self, job: Job) -> None:
        # With no room at all the newest is the oldest waiting job too; but
        # not for a moment may it be seen waiting.
        self.accepted += 1
        job.error = JobDropped(job.id, False, 0, None)
        job.state = JobState.DROPPED
        self.ended[JobState.DROPPED] += 1
        if self.watched:
            self.tell_job("on_job_queue", job)
            self.tell_job("on_job_drop", job)

    def _admit(self) -> None:
        """Let in the first callers that wait for room, while there is some."""
        while self.room.count and self.line.count < self.max_backlog:
            job = cast("Job", self.room.pop())
            self._let_in(job)
            self._queue(job)

    def _let_in(self, job: Job) -> None:
        # The caller of submit has only waited for this; it wakes with a reply.
        if job.readers is not None:
            job.wake()

    def next_job(self, worker: Worker) -> Job | None:
        """Take a job for a free worker, and set it on the worker's record."""
        if self.paused or worker.retiring:
            return None
        line = self.line
        while True:
            top = line.top
            if top and top[0].__class__ is Job and top[0].waiting:
                # `Line.pop` in the case that is nearly always.
                entry: Job | Batch | None = top.popleft()
                entry.waiting = False  # type: ignore[union-attr]
                line.count -= 1
            else:
                entry = line.pop()
            new = True
            if entry is None:
                if not self.room.count:
                    return None
                job = cast("Job", self.room.pop())
                self._let_in(job)
                self.accepted += 1
            elif isinstance(entry, Batch):
                taken = entry.take(worker)
                if taken is None:
                    continue
                job = taken
                self.accepted += 1
            else:
                job = entry
                new = False
            self.running += 1
            job.state = _RUNNING
            job.worker = worker
            worker.job = job
            # The books are right again before anything else may look at them.
            if new:
                if self.idle and job.batch is not None:
                    # Waking the others two by two reaches all soon, and only
                    # as many as there are items for.
                    self._rouse(2)
                if self.watched:
                    self.tell_job("on_job_queue", job)
            elif self.room.count:
                self._admit()
            return job

    def rest(self, worker: Worker) -> None:
        """Note that a worker goes to sleep at its mailbox."""
        worker.state = WorkerState.IDLE
        (self.resting if self.paused else self.idle)[worker] = None

    def wake_up(self, worker: Worker) -> None:
        """Note that a worker is up, with no job yet."""
        self.idle.pop(worker, None)
        self.resting.pop(worker, None)
        worker.state = WorkerState.BUSY

    def _rouse(self, count: float) -> None:
        """Have idle workers look for jobs."""
        while self.idle and count > 0:
            worker, _ = self.idle.popitem()
            worker.state = WorkerState.BUSY
            worker.nudge()
            count -= 1

    def finish(self, job: Job) -> None:
        """End a running job by its value: `end`, as short as it can be."""
        self.running -= 1
        self.done += 1
        job.state = _DONE
        worker = job.worker
        worker.job = None  # type: ignore[union-attr]
        worker.deadline = math.inf  # type: ignore[union-attr]
        if self.watched:
            self.tell_job("on_job_complete", job)
        caller = job.caller
        if caller is not None:
            job.caller = None
            self.reschedule(caller, WAKE)
        elif job.batch is not None:
            job.batch.answer(job)
        elif job.readers:
            job.wake()
        if self.joining:
            self.check_drained()

    def end(self, job: Job, state: JobState) -> None:
        """End an accepted job, wherever it is, and tell who waits for it."""
        if job.state in self.ended:
            # A hook that heard of another end has ended this one meanwhile.
            return
        if job.state is _RUNNING:
            self.running -= 1
            worker = job.worker
            if worker is not None and worker.job is job:
                worker.job = None
                worker.deadline = math.inf
                if not job.attempts and worker.state is WorkerState.BUSY:
                    self._let_rest(worker)
        else:
            self.line.discard(job)
        job.state = state
        self.ended[state] += 1
        if self.watched:
            self.tell_job(_HOOKS[state], job)
        if job.batch is not None:
            job.batch.answer(job)
        else:
            # A process has a caller that hears the error; a submit may not.
            if state in UNHEARD and job.caller is None and not job.readers:
                self.unheard[job] = None
            job.wake()
        if self.room.count and not self.stopping:
            self._admit()
        if self.joining:
            self.check_drained()

    def _let_rest(self, worker: Worker) -> None:
        """Let a worker whose job was withdrawn be handed another at once."""
        waiting = self.line.count or self.line.batches or self.room.count
        if not waiting and not worker.retiring:
            self.rest(worker)

    def withdraw(self, job: Job) -> bool:
        """Cancel a job that has not started; false if it is too late for that."""
        if job.state is None:
            # Its caller waits for room: the job was never accepted.
            self.room.discard(job)
            return True
        if job.state is _RUNNING and job.attempts:
            return False
        job.caller = None
        if job.raise_cancel is None:
            job.error = JobCancelled(job.id, False, 0, None)
        job.worker = None if job.state is _QUEUED else job.worker
        self.end(job, JobState.CANCELLED)
        return True

    def cancel_running(self, job: Job) -> None:
        """Cancel the handler of a started job; its end is answered later."""
        worker = job.worker
        if worker is not None and worker.job is job:
            worker.cancel_job(f"trio_pool: job {job.id} was cancelled")

    def end_stopped(self, job: Job) -> None:
        """End a job because the whole pool stops."""
        worker = None if job.worker is None or not job.attempts else job.worker.id
        if isinstance(self.failure, PoolBroken):
            job.error = self._broken(job)
            self.end(job, JobState.LOST)
            self.unheard.pop(job, None)
        else:
            job.error = JobCancelled(job.id, job.attempts > 0, job.attempts, worker)
            self.end(job, JobState.CANCELLED)

    def _broken(self, job: Job | None) -> PoolBroken:
        failure = self.failure
        assert isinstance(failure, PoolBroken)
        if job is None:
            error = PoolBroken(failure.pool, failure.reason)
        else:
            worker = None if job.worker is None else job.worker.id
            error = PoolBroken(
                failure.pool,
                failure.reason,
                job.id,
                job.attempts > 0,
                job.attempts,
                worker,
            )
        error.__cause__ = failure.__cause__
        return error

    def heard(self, job: Job) -> None:
        """Note that somebody has read a reply."""
        if job in self.unheard:
            del self.unheard[job]

    def offer(self, batch: Batch) -> None:
        """Let workers pull from a batch that has something to give."""
        if self.stopping:
            return
        self.change += 1
        self.line.push_batch(batch)
        self._rouse(1)

    def forget(self, batch: Batch) -> None:
        """Close the books of a batch that has ended."""
        del self.batches[batch]
        self.pulled += batch.pulled

    def cancel_batch(self, batch: Batch) -> None:
        """Cancel every running item of a batch."""
        self.change += 1
        for worker in self.workers.values():
            job = worker.job
            if job is None or job.batch is not batch:
                continue
            if job.attempts:
                worker.cancel_job("trio_pool: the rest of a batch was called off")
            else:
                job.error = JobCancelled(job.id, False, 0, None)
                self.end(job, JobState.CANCELLED)
        if self.joining:
            self.check_drained()

    def tell_job(self, hook: str, job: Job) -> None:
        """Call a job hook, if anyone listens."""
        if self.hooks.listening(hook):
            assert job.state is not None
            self.hooks.call(
                hook,
                JobChanged(
                    self.config.name,
                    self.clock(),
                    job.id,
                    job.state,
                    None if job.worker is None else job.worker.id,
                    job.attempts,
                    job.error,
                ),
            )

    # ------------------------------------------------------------------
    # Workers: what they report in their own last or first step.

    def worker_ready(self, worker: Worker) -> None:
        """A worker is set up."""
        worker.state = WorkerState.BUSY
        self._started += 1
        self._tell_worker("on_worker_start", worker, None)
        if not self._is_open and self._started == len(self.workers):
            self._enter()
        self._staff()

    def worker_leaves(self, worker: Worker) -> None:
        """A worker takes no more jobs and begins its cleanup, however long."""
        self.wake_up(worker)
        worker.state = WorkerState.STOPPING
        job = worker.job
        if job is not None and not job.attempts and not self.stopping:
            self._settle_leftover(job, None)
        if self.line.has_work():
            # It may have been woken for what waits there.
            self._rouse(1)

    def worker_gone(
        self, worker: Worker, crash: BaseException | None, trouble: BaseException | None
    ) -> None:
        """A worker's task ends: settle what it still holds, then report it."""
        was_ready = worker.state is not WorkerState.STARTING
        self._started -= was_ready
        self.idle.pop(worker, None)
        self.resting.pop(worker, None)
        blamed = _blame(trouble, self.stopping)
        if crash is None:
            crash = blamed
        elif blamed is not None and not _is_echo(blamed):
            log.error(
                "worker %d of pool %r failed to clean up after its crash",
                worker.id,
                self.config.name,
                exc_info=blamed,
            )
        worker.state = WorkerState.STOPPED
        job = worker.job
        if job is not None:
            self._settle_leftover(job, crash)
        worker.ticket = None
        if crash is None:
            if was_ready:
                self._tell_worker("on_worker_stop", worker, None)
        else:
            worker.last_error = crash
            log.error(
                "worker %d of pool %r crashed",
                worker.id,
                self.config.name,
                exc_info=crash,
            )
            self._tell_worker("on_worker_crash", worker, crash)
        interrupt = _interrupt_in(crash)
        if interrupt is not None:
            self.interrupt(interrupt)
        self._tell.send_nowait(_Gone(worker, crash))

    def _settle_leftover(self, job: Job, crash: BaseException | None) -> None:
        if self.stopping:
            self.end_stopped(job)
        elif job.attempts:
            worker = None if job.worker is None else job.worker.id
            error = WorkerCrashed(job.id, True, job.attempts, worker)
            error.__cause__ = crash
            job.error = error
            self.end(job, JobState.LOST)
        elif job.batch is not None:
            # The item of a batch has no place to go back to.
            job.error = WorkerCrashed(job.id, False, 0, None)
            job.error.__cause__ = crash
            self.end(job, JobState.LOST)
        else:
            self.running -= 1
            job.worker.job = None  # type: ignore[union-attr]
            job.worker = None
            job.state = _QUEUED
            self.change += 1
            self.line.push_front(job)
            self._rouse(1)

    def _tell_worker(
        self, hook: str, worker: Worker, error: BaseException | None
    ) -> None:
        if self.hooks.listening(hook):
            event = WorkerChanged(self.config.name, self.clock(), worker.id, error)
            self.hooks.call(hook, event)

    def interrupt(self, error: BaseException) -> None:
        """Ctrl-C landed in a worker: stop everything and raise it in the block."""
        if not isinstance(self.failure, KeyboardInterrupt):
            self.failure = error
        self.cancel()
        if self._body is not None:
            self._body.cancel(reason="trio_pool: a worker was interrupted")

    # ------------------------------------------------------------------
    # The control path.

    def prepare(self) -> None:
        """Belong to this trio run and thread from now on, and take jobs."""
        self.clock = trio.lowlevel.current_clock().current_time
        self.thread = get_ident()
        self.reschedule = rescheduler(trio.lowlevel.current_task())
        self.closed = False

    @enable_ki_protection
    async def run(self, body: trio.CancelScope) -> None:
        """Keep the wanted workers and the timers until the pool stops."""
        self._body = body
        try:
            with self._life:
                async with trio.open_nursery() as nursery:
                    # A block that was cancelled at its door has ended us already.
                    for _ in range(0 if self.stopping else self.wanted):
                        self._hire(nursery)
                    if not self.workers:
                        self._enter()
                    while self.workers or not self._retired():
                        await self._next_message(nursery)
        except BaseException as error:
            # Only a fault of the supervisor, or of a backoff it calls.
            self._give_up("its supervisor failed", _bare(error))
        finally:
            self.cancel()
            self.workers_stopped()
            self.finished.set()

    def workers_stopped(self) -> None:
        """Close the books on workers that went down with the nursery."""
        if self._is_open:
            self._is_open = False
            self._tell_pool("on_pool_stop")
        self.idle.clear()
        self.resting.clear()
        for worker in self.workers.values():
            worker.state = WorkerState.STOPPED

    def _tell_pool(self, hook: str) -> None:
        if self.hooks.listening(hook):
            self.hooks.call(hook, PoolChanged(self.config.name, self.clock()))

    def _enter(self) -> None:
        self._is_open = True
        self._tell_pool("on_pool_start")
        self.opened.set()

    def _retired(self) -> bool:
        return self._closing is not None and self._closing.drained

    async def _next_message(self, nursery: trio.Nursery) -> None:
        messages: list[_Gone | None] = []
        self._armed = self._next_due()
        with trio.CancelScope(deadline=self._armed) as self._timer:
            messages.append(await self._hear.receive())
        self._timer = None
        # All at once, as looking through the workers costs as many steps.
        with suppress(trio.WouldBlock):
            while messages:
                messages.append(self._hear.receive_nowait())
        for message in messages:
            if message is not None:
                self._replace(message)
        if messages and self._is_open and not self.stopping:
            self._adjust(nursery)
        self._on_time(nursery)

    def _next_due(self) -> float:
        dues = [w.due for w in self.workers.values() if w.due is not None]
        deadlines = [w.deadline for w in self.workers.values()]
        return min(min(dues, default=math.inf), min(deadlines, default=math.inf))

    def watch(self, deadline: float) -> None:
        """Make sure that the watchdog wakes at ``deadline`` or before."""
        if deadline < self._armed:
            self._armed = deadline
            if self._timer is not None:
                self._timer.deadline = deadline

    def _on_time(self, nursery: trio.Nursery) -> None:
        now = self.clock()
        for worker in tuple(self.workers.values()):
            if worker.deadline <= now and worker.job is not None:
                worker.deadline = math.inf
                worker.job.overdue = True
                worker.cancel_job(f"trio_pool: job {worker.job.id} ran out of time")
            if worker.due is not None and worker.due <= now:
                worker.due = None
                worker.restarts += 1
                self.restarts += 1
                self._tell_worker("on_worker_restart", worker, None)
                self._start(worker, nursery)

    def _hire(self, nursery: trio.Nursery) -> None:
        # The lowest free number, so that ids stay below the largest size.
        worker_id = heappop(self._free) if self._free else self._slots
        self._slots = max(self._slots, worker_id + 1)
        worker = self.workers[worker_id] = Worker(self, worker_id)
        self._start(worker, nursery)

    def _start(self, worker: Worker, nursery: trio.Nursery) -> None:
        worker.state = WorkerState.STARTING
        nursery.start_soon(worker.run, name=f"{self.config.name} worker {worker.id}")

    def _replace(self, gone: _Gone) -> None:
        """Decide what follows the end of a worker."""
        worker = gone.worker
        if not self._is_open:
            # Opening fails by the first setup that fails.
            if self.open_error is None:
                self.open_error = gone.error or RuntimeError(
                    f"worker {worker.id} of pool {self.config.name!r} ended while "
                    "the others were being set up"
                )
                self.cancel()
                self.opened.set()
            del self.workers[worker.id]
            return
        if gone.error is not None and not self.stopping:
            self._spend(worker, gone.error)
        if worker.retiring or gone.error is None or self.stopping:
            self._fire(worker)
            self._staff()

    def _fire(self, worker: Worker) -> None:
        worker.due = None
        del self.workers[worker.id]
        heappush(self._free, worker.id)

    def _spend(self, worker: Worker, error: BaseException) -> None:
        """Count a crash; set the time of the restart, or break the pool."""
        restart = self.config.restart
        now = self.clock()
        crashes = worker.crashes
        crashes.append(now)
        while crashes[0] <= now - restart.within:
            crashes.popleft()
        if len(crashes) > restart.limit:
            self._give_up(
                f"worker {worker.id} crashed {len(crashes)} times within "
                f"{restart.within} s",
                error,
            )
            return
        worker.state = WorkerState.RESTARTING
        delay = 0.0
        if len(crashes) > 1:
            delay = max(_LEAST_BACKOFF, restart.backoff(len(crashes) - 2))
        worker.due = now + delay

    def _give_up(self, reason: str, cause: BaseException) -> None:
        if self.failure is None:
            failure = PoolBroken(self.config.name, reason)
            failure.__cause__ = cause
            self.failure = failure
        self.cancel()
        if self._body is not None:
            self._body.cancel(reason="trio_pool: the pool is broken")

    def _adjust(self, nursery: trio.Nursery) -> None:
        """Hire or retire until as many stay as are wanted."""
        target = 0 if self._retired() else self.wanted
        staying = [w for w in self.workers.values() if not w.retiring]
        # Those that were to leave after their job can as well stay; and nobody
        # comes before another has gone, as both would run jobs meanwhile.
        for worker in self.workers.values():
            if worker.retiring and len(staying) < target and worker.stay():
                staying.append(worker)
        for _ in range(target - len(self.workers)):
            self._hire(nursery)
        surplus = len(staying) - target
        if surplus > 0:
            for worker in sorted(staying, key=self._dispensable)[:surplus]:
                self._retire(worker)
        active = max(1, self.wanted)
        self.slice = max(_LEAST_SLICE, min(_SLICE, _TURN / active))
        self._staff()

    def _dispensable(self, worker: Worker) -> tuple[int, int]:
        # Those that serve nobody go first; of equals, the youngest slot.
        order = {
            WorkerState.RESTARTING: 0,
            WorkerState.STARTING: 1,
            WorkerState.IDLE: 2,
        }
        return order.get(worker.state, 3), -worker.id

    def _retire(self, worker: Worker) -> None:
        if worker.state is WorkerState.RESTARTING:
            self._fire(worker)
            return
        self.change += 1
        worker.retire()
        if worker in self.idle or worker in self.resting:
            self.idle.pop(worker, None)
            self.resting.pop(worker, None)
            worker.state = WorkerState.BUSY
            worker.nudge()

    # ------------------------------------------------------------------
    # What the handle asks for.

    async def resize(self, size: int) -> None:
        """Want another number of workers, and wait until it is so."""
        self.check_thread()
        if self.closed:
            raise self.refusal()
        await trio.lowlevel.checkpoint_if_cancelled()
        old, self.wanted = self.wanted, size
        if old != size and self.hooks.listening("on_resize"):
            event = PoolResized(self.config.name, self.clock(), old, size)
            self.hooks.call("on_resize", event)
        self._tell.send_nowait(None)
        while not self._is_staffed():
            await self._staffed.park()
            if self.closed:
                raise self.refusal()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def _is_staffed(self) -> bool:
        return len(self.workers) == self._started == self.wanted

    def _staff(self) -> None:
        if self._staffed and self._is_staffed():
            self._staffed.unpark_all()

    def pause(self) -> None:
        """Let workers take no more jobs."""
        if self.closed:
            raise self.refusal()
        if not self.paused:
            self.paused = True
            self.change += 1
            self.resting, self.idle = self.idle, self.resting

    def resume(self) -> None:
        """Let workers take jobs again."""
        if self.paused:
            self.paused = False
            self.resting, self.idle = self.idle, self.resting
            waiting = self.line.count + self.room.count
            self._rouse(math.inf if self.line.batches else waiting)

    def _is_drained(self) -> bool:
        return not self.running and not self.line.has_work()

    async def _park_until_drained(self) -> None:
        self.joining += 1
        try:
            await self._drained.park()
        finally:
            self.joining -= 1

    def check_drained(self) -> None:
        """Tell those who wait for the last accepted job, if it has ended."""
        if self.joining and self._is_drained():
            self._drained.unpark_all()

    async def join(self) -> None:
        """Wait until every accepted job has ended."""
        self.check_thread()
        if self._is_drained():
            await trio.lowlevel.checkpoint()
        while not self._is_drained():
            await self._park_until_drained()
        if isinstance(self.failure, PoolBroken):
            raise self._broken(None)

    def close(self) -> _Closing:
        """Take no more jobs; the first call decides from when fates are counted."""
        if self._closing is None:
            self._closing = _Closing(self)
            self.closed = True
            if not self.stopping:
                self._refuse_waiting()
                self.resume()
                if not self.wanted:
                    self._end_waiting()
            self._staffed.unpark_all()
        return self._closing

    def _refuse_waiting(self) -> None:
        """Tell those who wait for room that they will not get in."""
        for job in self.room.jobs():
            self.room.discard(job)
            job.error = self.refusal()
            job.wake()

    def _end_waiting(self) -> None:
        """End all that waits, as none of it will run any more."""
        for job in self.line.jobs():
            self.end_stopped(job)
        for batch in tuple(self.batches):
            batch.stop(self.refusal())
        self.line.clear()

    def let_go(self) -> None:
        """Have the workers leave, as every job has ended."""
        assert self._closing is not None
        self._closing.drained = True
        # Those left are waiting for their readers or their source.
        for batch in tuple(self.batches):
            batch.stop(self.refusal())
        self._tell.send_nowait(None)

    @enable_ki_protection
    def cancel(self) -> None:
        """Stop now: end what waits, cancel what runs, take no more."""
        self.close()
        if self.stopping:
            return
        self.stopping = True
        self.change += 1
        self._refuse_waiting()
        self._end_waiting()
        self._life.cancel(reason=f"trio_pool: pool {self.config.name!r} stops")
        self._drained.unpark_all()
        self._staffed.unpark_all()

    async def shut_down(self, grace: float) -> ShutdownReport:
        """Close, wait for accepted jobs within ``grace``, cancel the rest."""
        closing = self.close()
        deadline = trio.current_time() + grace
        with trio.move_on_at(deadline):
            while not self.stopping and not self._is_drained():
                await self._park_until_drained()
            if not self.stopping:
                self.let_go()
            await self.finished.wait()
        if not self.finished.is_set():
            self.cancel()
            with trio.move_on_after(_UNWINDING):
                await self.finished.wait()
        return closing.report()

    # ------------------------------------------------------------------
    # What can be read at any time, from any thread.

    def statistics(self) -> PoolStatistics:
        """Count everything."""
        ended = self.ended
        pulled = self.pulled + sum(batch.pulled for batch in tuple(self.batches))
        return PoolStatistics(
            size=self.wanted,
            workers=self._started,
            busy=self.running,
            accepted=self.accepted + pulled,
            delayed=0,
            queued=self.line.count,
            running=self.running,
            done=self.done + pulled,
            failed=ended[JobState.FAILED],
            timed_out=ended[JobState.TIMED_OUT],
            cancelled=ended[JobState.CANCELLED],
            expired=ended[JobState.EXPIRED],
            dropped=ended[JobState.DROPPED],
            lost=ended[JobState.LOST],
            restarts=self.restarts,
        )

    def snapshots(self) -> tuple[WorkerSnapshot, ...]:
        """Picture every worker."""
        return tuple(
            _picture(worker, self.clock) for worker in tuple(self.workers.values())
        )

    def unheard_errors(self) -> list[Exception]:
        """Take the errors of submitted jobs that nobody has read."""
        errors: list[Exception] = []
        for job in self.unheard:
            assert isinstance(job.error, Exception)
            error = job.error.with_traceback(job.traceback)
            error.add_note(
                f"trio_pool: job {job.id} of pool {self.config.name!r}, "
                "whose reply nobody read"
            )
            errors.append(error)
        self.unheard.clear()
        return errors


@final
class _Closing:
    """The count of fates since a pool was closed."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._before = supervisor.statistics()
        self.drained = False

    def report(self) -> ShutdownReport:
        before, now = self._before, self._supervisor.statistics()
        return ShutdownReport(
            done=now.done - before.done,
            failed=_failures(now) - _failures(before),
            cancelled=_cancellations(now) - _cancellations(before),
            unfinished=now.running + now.queued,
        )


def _failures(count: PoolStatistics) -> int:
    return count.failed + count.timed_out + count.lost


def _cancellations(count: PoolStatistics) -> int:
    return count.cancelled + count.dropped + count.expired


def _picture(worker: Worker, clock: Callable[[], float]) -> WorkerSnapshot:
    job = worker.job
    state = worker.state
    if state is WorkerState.BUSY and job is None:
        state = WorkerState.IDLE
    return WorkerSnapshot(
        id=worker.id,
        state=WorkerState.BUSY if job is not None else state,
        job_id=None if job is None else job.name(),
        job_age=None if job is None or not job.attempts else clock() - job.started_at,
        jobs=worker.jobs,
        restarts=worker.restarts,
        last_error=worker.last_error,
    )


def _blame(trouble: BaseException | None, stopping: bool) -> BaseException | None:
    """Name the error that a worker's end is to be blamed on, if it is one."""
    if trouble is None:
        return None
    if isinstance(trouble, BaseExceptionGroup):
        _, rest = trouble.split(trio.Cancelled)
        return rest if rest is not None or stopping else trouble
    if isinstance(trouble, trio.Cancelled) and stopping:
        return None
    return trouble


def _is_echo(error: BaseException) -> bool:
    """Say whether an error is only the crash as the worker's cleanup saw it."""
    if isinstance(error, BaseExceptionGroup):
        return all(_is_echo(leaf) for leaf in error.exceptions)
    return isinstance(error, (WorkerCrashed, trio.Cancelled))


def _interrupt_in(error: BaseException | None) -> BaseException | None:
    if isinstance(error, KeyboardInterrupt):
        return error
    if isinstance(error, BaseExceptionGroup):
        found = error.subgroup(KeyboardInterrupt)
        if found is not None:
            return _bare(found)
    return None


def _bare(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
