"""The books of a pool, and every decision about a job, each in one step."""

from __future__ import annotations

import itertools
import math
from threading import get_ident
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast, final

import trio
from trio.lowlevel import ParkingLot, enable_ki_protection

from ._backlog import Keys, Line
from ._batch import Batch
from ._books import picture
from ._checks import note, refuse
from ._errors import (
    BacklogFull,
    CircuitOpen,
    JobCancelled,
    JobDropped,
    JobExpired,
    PoolBroken,
    PoolClosed,
    WorkerCrashed,
    WrongThread,
)
from ._events import UNHEARD, JobChanged, JobState, WorkerState, log
from ._job import Job, Terms, new_terms
from ._latency import FLUSH, Histogram
from ._nesting import Nesting
from ._policy import note_attempts
from ._records import draft_of
from ._starts import Starts
from ._telling import HOOK_NAMES, HookCalls
from ._timer import Timer
from ._trio import WAKE, Sleep, is_system_clock, runner_of, sleeper

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from trio.lowlevel import Task

    from ._backlog import Source
    from ._config import PoolConfig
    from ._policy import Retry
    from ._worker import Worker

_TAKEN = -math.inf

# So many jobs are refused in one step.
_AT_A_TIME = 200

OPEN, GUARDED, SHUT = range(3)
"""What a free worker needs to get the next job: nothing, the leave of the rate
and the breaker, or that of `Dispatch.next_job`."""

_BUSY = WorkerState.BUSY
_QUEUED = JobState.QUEUED
_RUNNING = JobState.RUNNING
_DELAYED = JobState.DELAYED
_DONE = JobState.DONE

_KINDS = {name: name.removeprefix("on_") for name in HOOK_NAMES}
_Draft = draft_of(JobChanged)

_HOOKS = {
    JobState.DONE: "on_job_complete",
    JobState.FAILED: "on_job_error",
    JobState.TIMED_OUT: "on_job_error",
    JobState.LOST: "on_job_error",
    JobState.CANCELLED: "on_job_cancel",
    JobState.DROPPED: "on_job_drop",
    JobState.EXPIRED: "on_job_drop",
}

# As many as wait are ended in the very step in which the pool stops; the others
# in turns of about _TURN seconds each, lest nothing else runs meanwhile.
_AT_ONCE = 1000
_TURN = 0.001


def _leftovers(line: Line, most: int | None = None) -> Iterator[Job]:
    """Name those left in a stopped line, each of which must leave before the next."""
    return itertools.islice(iter(line.leftover, None), most)


@final
class Dispatch:
    """What a job meets: plain methods, called in the caller's or worker's step.

    A job without further terms in a pool without guards takes the short way:
    `accept`, `next_job`, `finish`. Every other one takes `admit`; it may be
    held, put off or gated where it waits, and leaves by `_conclude`.
    """

    # Slots take two thirds of the time of a dict of this size, and what all jobs
    # meet comes first, to be in few lines of the cache.
    __slots__ = (  # noqa: RUF023
        "closed",
        "idle",
        "line",
        "max_backlog",
        "accepted",
        "change",
        "is_real",
        "tells_queue",
        "plain_terms",
        "ids",
        "sleep",
        "runner",
        "reschedule",
        "done",
        "room",
        "careful",
        "listeners",
        "runs",
        "waits",
        "slice",
        "tells_start",
        "nesting",
        "epoch",
        "clock",
        "breaker",
        "rate",
        "_source_was_next",
        "_choose",
        "_keys",
        "_starved",
        "_usual_gate",
        "choosy",
        "config",
        "drained",
        "ended",
        "failure",
        "gated",
        "guarded",
        "handed",
        "hooks",
        "leases",
        "live",
        "name",
        "opened_at",
        "paused",
        "pulled",
        "quick",
        "quick_time",
        "resting",
        "retries",
        "solo",
        "sources",
        "stamp",
        "starts",
        "stopped_at",
        "stopping",
        "takes_many",
        "tells_complete",
        "tells_each",
        "thread",
        "timer",
        "unheard",
        "wanted",
        "watched",
        "workers",
    )

    def __init__(self, config: PoolConfig) -> None:
        self.config = config
        self.name = config.name
        self.max_backlog = config.max_backlog
        self.wanted = config.size
        self.slice = 0.0
        """Seconds after which a worker that never sleeps yields."""
        self.ids = itertools.count(1)
        self.thread = -1
        self.clock: Callable[[], float] = trio.current_time
        self.stamp: Callable[[], float] = perf_counter
        """The clock by which waits and runs are measured: the cheapest there is."""
        self.is_real = True
        self.epoch = 0.0
        """What makes a time of ``stamp`` one of ``clock``."""
        self.sleep: Sleep = trio.lowlevel.wait_task_rescheduled
        """How a task falls asleep until it is rescheduled."""
        self.plain_terms = new_terms(config.retry)
        """The terms of all jobs that have none of their own."""
        # The books.
        self.accepted = 0
        self.done = 0
        self.pulled = 0
        """Items of ended batches that `Worker._pull` took and finished."""
        self.change = 0
        """Counts what such a worker must stop and look at."""
        self.ended = dict.fromkeys((s for s in JobState if s.terminal), 0)
        self.retries = 0
        self.handed = 0
        """Jobs that found an idle worker and have started, or are about to."""
        self.waits = Histogram()
        self.runs = Histogram()
        self.quick = 0
        """Jobs of workers that are gone for good that took next to no time."""
        self.quick_time = 0.0
        self.line = Line(config.aging)
        """The backlog: accepted jobs, and sources."""
        self.room = Line(config.aging)
        """Jobs whose callers wait for room; not accepted yet."""
        self.unheard: dict[Job, None] = {}
        self.live: dict[int | str, Job] = {}
        """Jobs that have not ended, by the ids that users gave them."""
        # The workers, by id; those that are gone for good leave.
        self.workers: dict[int, Worker] = {}
        self.idle: dict[Worker, None] = {}
        """Idle workers, the one that has been idle for longest first."""
        self.resting: dict[Worker, None] = {}
        """Idle workers of a paused pool."""
        self.sources: dict[Source, None] = {}
        """Batches that have not ended."""
        self.leases: dict[Source, None] = {}
        """Leases that are waited for or held."""
        # The life of the pool.
        self.closed = True
        self.stopping = False
        self.paused = False
        self.failure: BaseException | None = None
        self.drained = ParkingLot()
        self.listeners = 0
        """Who wants to hear of ends: asking them costs more, on every job."""
        # What most pools are without.
        self.timer = Timer()
        self.hooks = HookCalls(config.hooks)
        self.look_for_listeners()
        self.nesting = Nesting(self)
        self.breaker = config.breaker
        self.careful = config.breaker is not None
        """Whether somebody has to be told how each job went."""
        self.rate = config.rate
        self.starts = Starts(self)
        self.guarded = bool(config.rate or config.breaker or config.limiter)
        self.choosy = bool(self.guarded or config.choose)
        """Whether more than an idle worker, or than any, is wanting for a start."""
        self.solo = not (
            self.guarded or config.middleware or config.max_jobs < math.inf
        )
        """Whether a worker may pull items of a batch without asking."""
        self._usual_gate = OPEN
        if (
            config.limiter
            or config.aging < math.inf
            or config.max_jobs < math.inf
            or config.max_idle < math.inf
        ):
            self._usual_gate = SHUT
        elif self.guarded:
            self._usual_gate = GUARDED
        self.gated = self._usual_gate
        """What more than a free worker is wanting for a job to start; each
        worker has a copy of it."""
        self.takes_many = False
        """Whether a worker has been seen that takes several items in a call."""
        self._choose = config.choose
        self._keys = Keys()
        self._starved: list[Source | None] = []
        self._source_was_next = False

    def prepare(self) -> None:
        """Belong to this trio run and thread from now on, and take jobs."""
        clock = trio.lowlevel.current_clock()
        self.clock = clock.current_time
        self.is_real = is_system_clock(clock)
        self.stamp = perf_counter if self.is_real else clock.current_time
        self.opened_at = self.stamp()
        self.stopped_at: float | None = None
        self.epoch = clock.current_time() - self.stamp()
        self.thread = get_ident()
        self.sleep = sleeper()
        self.runner = runner_of(trio.lowlevel.current_task())
        self.reschedule = self.runner.reschedule
        for guard in (self.config.rate, self.breaker):
            if guard is not None:
                guard.begin(trio.lowlevel.current_trio_token())
        self.closed = False

    def check_task(self) -> Task:
        """Return the calling task; refuse one of another thread or run.

        Raises:
          WrongThread: this is no task of the pool's run.
          PoolClosed: the pool's run is over.
        """
        self.check_thread()
        task = trio.lowlevel.current_task()
        if task._runner is not self.runner:  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            raise self.refusal()
        return task

    def check_thread(self) -> None:
        """Refuse a call from another thread."""
        if get_ident() != self.thread:
            raise WrongThread(self.config.name)

    def refusal(self) -> Exception:
        """Make the error of a pool that takes no more jobs."""
        if isinstance(self.failure, PoolBroken):
            return self.broken(None)
        return PoolClosed(self.config.name)

    # ------------------------------------------------------------------
    # How a job comes in.

    def accept(self, job: Job, wait: bool) -> bool:
        """Hand a new job over, queue it, or let its caller queue for room.

        Says whether there is something to wait for: not if the job was
        dropped at once, nor if the caller has been cancelled already and would
        have had to wait or to push out another's job; then nothing has
        happened. Raises when the job is refused.
        """
        if self.closed:
            raise self.refusal()
        line = self.line
        if self.idle:
            if line.count > self.max_backlog:
                # By retries, and so it may not be its turn.
                return self._place(job, wait)
            worker, _ = self.idle.popitem()
            self.accepted += 1
            self.handed += 1
            job.state = _RUNNING
            job.queued_at = -1.0
            job.worker = worker
            worker.job = job
            worker.state = _BUSY
            worker.task.context = job.context
            if worker.asleep:
                # As `Worker.nudge` does, in the step of every job that finds one idle.
                worker.asleep = False
                # Not called as methods are, which is slow with an attribute.
                post, reschedule = worker.post, self.reschedule
                post(job)
                reschedule(worker.task, WAKE)
        else:
            if line.count >= self.max_backlog:
                return self._overflow(job, wait) and job.error is None
            self.accepted += 1
            self.change += 1
            job.state = _QUEUED
            # `stamp`, without a call where nearly all pools are.
            job.queued_at = perf_counter() if self.is_real else self.clock()
            if job.priority:
                line.push(job)
            else:
                # `Line.push` in the step where most jobs are that come here.
                job.waiting = True
                line.count += 1
                line.plain.append(job)
        if self.tells_queue:
            self.tell_job("on_job_queue", job)
            return job.error is None
        return True

    def admit(self, job: Job, wait: bool) -> bool:
        """Do what `accept` does, for a job with terms or in a choosy pool."""
        terms = job.terms
        if terms.rich:
            self._check_terms(terms)
        is_first = terms.key is None or self._keys.enter(terms.key, job)
        try:
            if is_first and not terms.rich and self._passes_at_once(job):
                # From here on a job like any other.
                waits = self.accept(job, wait)
            else:
                waits = self._admit_slowly(job, wait)
        except BaseException:
            self._conclude(job)
            raise
        if not waits and job.state is None:
            self._conclude(job)
        return waits

    def _passes_at_once(self, job: Job) -> bool:
        """Let the guards pass a new job, if that takes no more than a look."""
        if not self.choosy:
            return True
        if not self.idle:
            # It has to wait, and asks them for its start when its turn comes.
            if self.breaker is None:
                return True
            job.permit = self.breaker.quick_permit()
            return job.permit is not None
        return (
            self._usual_gate is GUARDED
            and self._choose is None
            and not self._has_entries()
            and self.may_pass(job)
        )

    def _admit_slowly(self, job: Job, wait: bool) -> bool:
        # Whatever is raised from here on, what it holds is asked for.
        job.permit = None
        if self.closed:
            raise self.refusal()
        if self.breaker is not None:
            job.permit = self.breaker.admit(self.clock())
            if job.permit is None:
                raise self._circuit_open()
        if job.terms.rich:
            self._begin_terms(job)
        return self._place(job, wait)

    def _check_terms(self, terms: Terms) -> None:
        if self.closed:
            raise self.refusal()
        if terms.uid is not None and terms.uid in self.live:
            raise ValueError(refuse("id", terms.uid, "an id that no live job has"))
        if terms.delay and not self.max_backlog:
            raise ValueError(
                refuse("delay", terms.delay, "0, as max_backlog=0 lets no job wait")
            )

    def _begin_terms(self, job: Job) -> None:
        terms = job.terms
        if terms.uid is not None:
            self.live[terms.uid] = job
        if terms.delay or terms.ttl < math.inf:
            terms.born = self.clock()
        if terms.ttl < math.inf:
            when = terms.born + terms.ttl
            terms.expiry = self.timer.at(when, lambda: self._expire(job))

    def _place(self, job: Job, wait: bool) -> bool:
        if self._try_hand_over(job):
            return job.error is None
        if self.line.count >= self.max_backlog:
            return self._overflow(job, wait) and job.error is None
        self._queue(job)
        if job.error is None:
            self._rouse_for(job)
        return job.error is None

    def _try_hand_over(self, job: Job) -> bool:
        """Let an idle worker run a new job, if it is its turn."""
        if (
            not self.idle
            or self.has_ready()
            or not self._may_run(job)
            or not self._is_in_bound()
            or (self.guarded and not self.starts.take())
        ):
            return False
        self.accepted += 1
        self.hand_over(job, self._pick())
        if self.watched:
            self.tell_job("on_job_queue", job)
        return True

    def _rouse_for(self, job: Job) -> None:
        """Have an idle worker look for a job that has just come to wait."""
        if self.idle and self._may_run(job):
            if not self._is_in_bound():
                self._starve(None)
            elif not self.starts.are_awaited():
                self.rouse(1)

    def hand_over(self, job: Job, worker: Worker) -> None:
        """Let an idle worker run a job that is accepted by this."""
        job.state = _RUNNING
        job.worker = worker
        worker.job = job
        worker.state = _BUSY
        self.handed += 1
        job.queued_at = -1.0
        self.starts.lend(job)
        worker.wake_for(job)

    def start_leased(self, job: Job, worker: Worker) -> None:
        """Accept a job for the worker of a lease, which has taken its start."""
        if self.breaker is not None:
            job.permit = self.breaker.admit(self.clock())
            if job.permit is None:
                self.starts.give_back()
                raise self._circuit_open()
        self.accepted += 1
        self.hand_over(job, worker)
        if self.watched:
            self.tell_job("on_job_queue", job)

    def _pick(self) -> Worker:
        """Take the idle worker that shall have the next job."""
        if self._choose is not None and len(self.idle) > 1:
            workers = {worker.id: worker for worker in self.idle}
            try:
                offered = tuple(picture(w, self.stamp) for w in workers.values())
                worker = workers[self._choose(offered).id]
            except Exception:
                self._choose = None
                log.exception("choose raised and is not called again")
            else:
                del self.idle[worker]
                return worker
        return self.idle.popitem()[0]

    def _overflow(self, job: Job, wait: bool) -> bool:
        drop = self.config.overflow == "drop_oldest"
        if wait and trio.current_effective_deadline() == -math.inf:
            return False
        if not drop and (not wait or self.config.overflow == "reject"):
            raise BacklogFull(self.config.name, self.max_backlog)
        if not drop:
            self.change += 1
            job.queued_at = self.stamp()
            self.room.push(job, held=not self._may_run(job))
            self._rouse_for(job)
            return True
        while self.line.count >= self.max_backlog:
            if self._try_hand_over(job):
                return True
            oldest = self.line.oldest()
            if oldest is None:
                self._drop_at_once(job)
                return False
            oldest.error = self._fate(JobDropped, oldest)
            self.end(oldest, JobState.DROPPED)
            if self.closed:
                # By a hook that heard of the drop.
                raise self.refusal()
        self._queue(job)
        if job.error is None:
            # No hook that heard of it has ended it.
            self._rouse_for(job)
        return True

    def _fate(self, kind: type[JobDropped | JobExpired], job: Job) -> Exception:
        worker = None if job.worker is None else job.worker.id
        return kind(job.name(), job.attempts > 0, job.attempts, worker)

    def _may_run(self, job: Job) -> bool:
        """Say whether a new job is neither delayed nor behind one of its key."""
        terms = job.terms
        return terms is self.plain_terms or (
            not terms.delay
            and (terms.key is None or self._keys.is_first(terms.key, job))
        )

    def _queue(self, job: Job) -> None:
        self.accepted += 1
        self.change += 1
        job.queued_at = self.stamp()
        terms = job.terms
        if terms.delay:
            job.state = _DELAYED
            # A place among few must not be kept for so long.
            self._give_back_permit(job)
            self.line.put_off(job)
            terms.alarm = self.timer.at(
                terms.born + terms.delay, lambda: self._make_ready(job)
            )
        else:
            job.state = _QUEUED
            self.line.push(job, held=not self._may_run(job))
        if self.watched:
            self.tell_job("on_job_queue", job)

    def _drop_at_once(self, job: Job) -> None:
        # With no room at all the newest is the oldest waiting job too; but
        # not for a moment may it be seen waiting.
        self.accepted += 1
        job.error = self._fate(JobDropped, job)
        job.state = JobState.DROPPED
        self.ended[JobState.DROPPED] += 1
        if self.watched:
            self.tell_job("on_job_queue", job)
            self.tell_job("on_job_drop", job)
        self._conclude(job)

    def _admit_callers(self) -> None:
        """Let in the first callers that wait for room, while there is some."""
        if self.room.stopped:
            return
        while self.room.count and self.line.count < self.max_backlog:
            job = cast("Job", self.room.shift())
            self._let_in(job)
            self._queue(job)
        if self.idle and self.line.ready:
            self.rouse(1)

    def _let_in(self, job: Job) -> None:
        # The caller of submit has only waited for this; it wakes with a reply.
        if job.readers is not None:
            job.wake()

    # ------------------------------------------------------------------
    # How a worker gets it.

    def next_job(self, worker: Worker, now: float) -> Job | None:
        """Take a job for a free worker, and set it on the worker's record."""
        line = self.line
        top = line.top
        gate = worker.gated
        if gate and (gate == SHUT or self._has_entries()):
            return self._next_gated(worker, now)
        if top and type(top[0]) is Job and top[0].waiting:
            # `Line.pop` in the case that is nearly always.
            job: Job = top.popleft()  # type: ignore[assignment]
            job.waiting = False
            line.count -= 1
            job.state = _RUNNING
            job.worker = worker
            worker.job = job
            # The books are right again before anything else may look at them.
            if self.room.count:
                self._admit_callers()
            return job
        if not (top or line.count or line.sources or self.room.count) and (
            top is line.plain
        ):
            # Nothing waits, and nothing is left of what did.
            return None
        return self._take(worker, now)

    def _has_entries(self) -> bool:
        """Say whether anything waits, be it ready or not."""
        line = self.line
        return bool(line.count or line.sources or self.room.count)

    def _take(self, worker: Worker, now: float) -> Job | None:
        line = self.line
        while True:
            entry = line.pop(now)
            new = True
            if entry is None:
                if not self.room.count:
                    return None
                if not self._is_in_bound():
                    self._starve(None)
                    return None
                caller = self._pop_caller(None, now)
                if caller is None:
                    return None
                job = caller
                self.accepted += 1
            elif isinstance(entry, Job):
                job = entry
                new = False
            elif isinstance(entry, Batch) and not self._is_in_bound():
                entry.hungry = False
                self._starve(entry)
                continue
            else:
                taken = None
                if self.room.count and self._is_callers_turn():
                    taken = self._pop_caller(entry, now)
                if taken is None:
                    taken = entry.take(worker)
                if taken is None:
                    if worker.lease is not None:
                        # It was a lease, and this worker is its.
                        return None
                    continue
                job = taken
                self.accepted += 1
            job.state = _RUNNING
            job.worker = worker
            worker.job = job
            if new:
                if self.idle and self.room.ready:
                    self.rouse(1)
                if self.idle and job.batch is not None:
                    # Waking the others two by two reaches all soon, and only
                    # as many as there are items for.
                    self.rouse(job.batch.helpers)
                if self.watched:
                    self.tell_job("on_job_queue", job)
            elif self.room.count:
                self._admit_callers()
            return job

    def _pop_caller(self, source: Source | None, now: float) -> Job | None:
        """Take the first job whose caller waits for room, unless a source is first."""
        job = cast("Job | None", self.room.pop())
        if job is None:
            return None
        if source is not None and not self.line.may_precede(job, source):
            self.room.push_front(job)
            return None
        self._let_in(job)
        job.queued_at = now
        return job

    def _is_callers_turn(self) -> bool:
        """Say whether one who waits for room is next, and no source in line.

        Those that are let in take turns with sources there. Where nobody is let
        in, as no job may wait or what waits may not run, they do so from here.
        """
        self._source_was_next = not self._source_was_next
        if self._source_was_next or self.line.ready:
            return False
        return self._is_in_bound()

    def _next_gated(self, worker: Worker, now: float) -> Job | None:
        """Do what `next_job` does where a free worker is not all it takes."""
        if worker.lease is not None and worker.lease.holds(worker):
            return None
        if self.is_spent(worker):
            # In a paused pool too: once it is idle, it is handed a job unasked.
            worker.recycle()
        if not self._is_free(worker):
            return None
        if not self.guarded:
            return self._take(worker, now)
        refused = 0
        while self.has_ready():
            if not self._is_free(worker):
                return None
            if refused == _AT_A_TIME:
                # A circuit has opened before very many: others take turns.
                self.timer.at(self.clock(), lambda: self.rouse(1))
                return None
            if not self.starts.take():
                self._lease_out(worker)
                return None
            job = self._take(worker, now)
            if job is None:
                self.starts.give_back()
                if worker.lease is not None:
                    # What it came for is another's now.
                    self.rouse(1)
                return None
            if worker.job is not job:
                # A hook that heard of it has had it withdrawn: look again.
                self.starts.give_back()
                return job
            if self._may_go_on(job):
                job.forget_error()
                self.starts.lend(job)
                if self.idle:
                    # Whoever could start too must look for itself.
                    self.rouse(1)
                return job
            self.starts.give_back()
            # The worker is on its feet: nobody may take it for an idle one.
            worker.job = None
            self._refuse_start(job)
            refused += 1
        return None

    def may_pass(self, job: Job) -> bool:
        """Let the guards pass a job that waits, if that takes no more than a look."""
        rate, breaker = self.rate, self.breaker
        if rate is not None:
            stamp = self.stamp
            if rate.take(stamp() + self.epoch) != _TAKEN:
                return False
        if breaker is not None:
            permit = breaker.quick_permit()
            if permit is None:
                if rate is not None:
                    rate.give_back()
                return False
            job.permit = permit
            if job.error is not None:
                # Of an attempt before, which it kept until it was sure to start.
                job.forget_error()
        return True

    def _refuse_start(self, job: Job) -> None:
        """End a job that the breaker does not let start."""
        if job.attempts:
            # The error that its last attempt had says more than this.
            assert job.error is not None
            note(job.error, f"trio_pool: not tried again: {self._circuit_open()}")
        else:
            job.error = self._circuit_open()
        self.end(job, JobState.FAILED)

    def _lease_out(self, worker: Worker) -> None:
        """Let a lease have a worker that must not start a job now."""
        hungry = [lease for lease in self.leases if lease.hungry]
        if hungry:
            max(hungry, key=lambda lease: lease.priority).take(worker)

    def is_spent(self, worker: Worker) -> bool:
        """Say whether a worker has run as many jobs as it may."""
        return worker.jobs - worker.jobs_before >= self.config.max_jobs

    def _is_free(self, worker: Worker) -> bool:
        # Asked again after each end, as a hook that hears of it may change this.
        return not (self.paused or worker.leaving)

    def _may_go_on(self, job: Job) -> bool:
        """Ask the breaker about a job that is about to start."""
        if self.breaker is None:
            return True
        if job.batch is not None and not job.attempts:
            # Items of a batch are admitted as they are taken.
            job.permit = self.breaker.admit(self.clock())
            return job.permit is not None
        assert job.permit is not None
        if self.breaker.allows(job.permit, self.clock()):
            job.permit = self.breaker.renew(job.permit)
            return True
        # Refused, it holds no place that it could give back.
        job.permit = None
        return False

    def _circuit_open(self) -> CircuitOpen:
        assert self.breaker is not None
        return CircuitOpen(self.config.name, self.breaker.reopens_in(self.clock()))

    # Idle workers.

    def rest(self, worker: Worker) -> None:
        """Note that a worker goes to sleep at its mailbox."""
        worker.state = WorkerState.IDLE
        worker.idle_since = self.clock()
        if worker.lease is None:
            (self.resting if self.paused else self.idle)[worker] = None
        if self.guarded:
            self.starts.release_spares()

    def wake_up(self, worker: Worker) -> None:
        """Note that a worker is up, with no job yet."""
        self.idle.pop(worker, None)
        self.resting.pop(worker, None)
        worker.state = WorkerState.BUSY

    def rouse(self, count: float) -> None:
        """Have idle workers look for jobs."""
        while self.idle and count > 0:
            worker = self._pick()
            worker.state = WorkerState.BUSY
            worker.nudge()
            count -= 1

    def has_ready(self) -> bool:
        """Say whether something waits for a worker, or for its start."""
        return bool(self.line.ready or self.line.sources or self.room.ready)

    def _let_rest(self, worker: Worker) -> None:
        """Let a worker whose job was withdrawn be handed another at once."""
        if not self.has_ready() and not worker.leaving and worker.lease is None:
            self.rest(worker)

    # The bound of the backlog. Retries may pass it by as many as run, so while
    # it is passed nothing new may start that could wait for a retry in its turn.

    def _is_in_bound(self) -> bool:
        waiting = self.line.count
        return (
            waiting <= self.max_backlog
            or waiting + self.running < self.max_backlog + self.wanted
        )

    def _starve(self, source: Source | None) -> None:
        """Have a source, or callers, that may not start wait for the next end."""
        if source is not None or not self._starved:
            self._starved.append(source)
            self.listeners += 1

    def hear_end(self) -> None:
        """Look whether those who wait for ends have waited enough."""
        if self._starved and self._is_in_bound():
            starved, self._starved = self._starved, []
            self.listeners -= len(starved)
            for source in starved:
                if isinstance(source, Batch):
                    source.look()
            if self.room.count:
                self.rouse(1)
        if not self.line.count and self.drained and self.is_drained():
            self.drained.unpark_all()

    def flush_if_due(self) -> None:
        """Count the times measured lately, if their lists are long."""
        if len(self.runs.pending) >= FLUSH or len(self.waits.pending) >= FLUSH:
            self.flush()

    @enable_ki_protection
    def flush(self) -> None:
        """Count the times measured lately."""
        self.waits.flush()
        self.runs.flush()

    @property
    def running(self) -> int:
        """Count the jobs that workers have: all that neither wait nor have ended."""
        return self.accepted - self.done - sum(self.ended.values()) - self.line.count

    def is_drained(self) -> bool:
        """Say whether every accepted job has ended."""
        return not self.line.has_work() and not self.running

    async def park_until_drained(self) -> None:
        """Wait until it is worth looking whether every job has ended."""
        self.listeners += 1
        try:
            await self.drained.park()
        finally:
            self.listeners -= 1

    # ------------------------------------------------------------------
    # How it ends, or is tried again.

    def finish(self, job: Job) -> None:
        """End a running job by its value: `end`, as short as it can be."""
        self.done += 1
        job.state = _DONE
        worker = job.worker
        worker.job = None  # type: ignore[union-attr]
        if self.breaker is not None:
            self._settle_permit(job, None)
        terms = job.terms
        if terms is not self.plain_terms:
            if terms.token is not None:
                self._give_back_token(job)
            if terms.rich:
                self._let_go(job, terms)
            if terms.key is not None:
                self._leave_key(job, terms.key)
        if self.tells_complete:
            stamp = self.stamp
            self.tell_heard("on_job_complete", job, stamp())
        caller = job.caller
        if caller is not None:
            job.caller = None
            self.reschedule(caller, WAKE)
        elif job.batch is not None:
            job.batch.answer(job)
        elif job.readers:
            job.wake()
        if self.listeners:
            self.hear_end()

    def fail(self, job: Job, state: JobState) -> None:
        """End an attempt by ``job.error``: try the job again, or end it."""
        retry = job.terms.retry
        if retry is None or not self._try_again(job, state, retry):
            self.end(job, state)

    def end(self, job: Job, state: JobState) -> None:
        """End an accepted job, wherever it is, and tell who waits for it."""
        if job.state in self.ended:
            # A hook that heard of another end has ended this one meanwhile.
            return
        if job.state is _RUNNING:
            self._take_from_worker(job, state)
        else:
            self.line.discard(job)
        job.state = state
        self.ended[state] += 1
        self._conclude(job)
        if self.watched:
            self.tell_job(_HOOKS[state], job)
        if job.batch is not None:
            job.batch.answer(job)
        else:
            # A process has a caller that hears the error; a submit may not.
            if state in UNHEARD and job.caller is None and not job.readers:
                self.keep_unheard(job)
            job.wake()
        if self.room.count and not self.stopping:
            self._admit_callers()
        if self.listeners:
            self.hear_end()

    def _take_from_worker(self, job: Job, state: JobState) -> None:
        begun = job.begun
        worker = job.worker
        if not begun and job.batch is None and job.queued_at < 0.0:
            self.handed -= 1
        if worker is not None and worker.job is job:
            worker.job = None
            if not begun and worker.state is WorkerState.BUSY:
                self._let_rest(worker)
        self._give_back_token(job)
        if begun and state in UNHEARD:
            self._settle_permit(job, job.error)

    def _give_back_token(self, job: Job) -> None:
        """Give the shared limiter back what an attempt was lent."""
        if job.terms.token is not None:
            self.starts.release(job.terms.token)
            job.terms.token = None

    def _settle_permit(self, job: Job, error: BaseException | None) -> None:
        """Tell the breaker how an attempt went."""
        if self.breaker is None or job.permit is None:
            return
        permit, job.permit = job.permit, None
        if error is not None or self.breaker.quick_permit() is None:
            self.breaker.settle(permit, error, self.clock())

    def _give_back_permit(self, job: Job) -> None:
        """Give the breaker back a place that nothing has come of."""
        if self.breaker is not None and job.permit is not None:
            self.breaker.give_back(job.permit)
            job.permit = None

    def _conclude(self, job: Job) -> None:
        """Let go of all that a job has had a hold of."""
        self._give_back_permit(job)
        terms = job.terms
        if terms.rich:
            self._let_go(job, terms)
        if terms.key is not None:
            self._leave_key(job, terms.key)

    def _leave_key(self, job: Job, key: Hashable) -> None:
        following = self._keys.leave(key, job)
        if following is not None:
            self._release(following)

    def _let_go(self, job: Job, terms: Terms) -> None:
        for alarm in (terms.alarm, terms.expiry):
            if alarm is not None:
                self.timer.take_back(alarm)
        if terms.uid is not None and self.live.get(terms.uid) is job:
            del self.live[terms.uid]
        if terms.drain is not None and job.state is _DONE:
            try:
                terms.drain.send(job.value)
            except Exception:
                log.exception("a drain refused the result of job %r", job.name())

    def _release(self, job: Job) -> None:
        """Let the next job of a key run."""
        if job.state is None:
            if not job.terms.delay:
                self.room.release(job)
        elif job.state is _QUEUED:
            self.line.release(job)
        self.rouse(1)

    def _may_try_again(self, job: Job) -> bool:
        """Say whether a job that failed is still wanted, and can run again."""
        return not (
            self.stopping
            or self._is_desolate()
            or job.terms.cancel_asked
            or job.terms.raise_cancel is not None
            or (job.batch is not None and job.batch.stopped)
        )

    def _is_desolate(self) -> bool:
        """Say whether no worker will ever come for what waits."""
        return self.closed and not self.wanted and self.config.scale is None

    def _try_again(self, job: Job, state: JobState, retry: Retry) -> bool:
        """Put a job that failed off until its next attempt, if it gets one."""
        error = job.error
        if not isinstance(error, Exception) or not self._may_try_again(job):
            return False
        terms = job.own_terms()
        terms.rich = True
        if job.attempts == 1:
            terms.first_start = job.started_at
        try:
            delay = retry.next_wait(
                error,
                job.attempts,
                self.stamp() - terms.first_start,
                crashed=state is JobState.LOST,
            )
        except Exception:
            log.exception("the retry policy of job %r raised", job.name())
            delay = None
        # Asked again, as the policy is the user's code.
        if delay is None or not self._may_try_again(job):
            if job.attempts > 1:
                note_attempts(error, job.attempts)
            return False
        self._take_from_worker(job, state)
        self.retries += 1
        terms.before = job.attempts
        job.queued_at = self.stamp()
        terms.overdue = False
        job.state = _DELAYED
        if job.batch is not None:
            job.batch.put_off(job)
        self.line.put_off(job)
        terms.alarm = self.timer.at(self.clock() + delay, lambda: self._make_ready(job))
        if self.watched:
            self.tell_job("on_job_retry", job, delay)
        return True

    def _make_ready(self, job: Job) -> None:
        """Queue a job whose time has come."""
        terms = job.terms
        if self.line.stopped:
            # It is about to be answered as all others.
            return
        if self.breaker is not None:
            job.permit = self.breaker.admit(self.clock())
            if job.permit is None:
                self._refuse_start(job)
                return
        self.line.discard(job)
        if self.breaker is None:
            job.forget_error()
        job.state = _QUEUED
        job.queued_at = self.stamp()
        terms.delay = 0.0
        self.line.push(job, held=not self._may_run(job))
        self.change += 1
        self.rouse(1)

    def _expire(self, job: Job) -> None:
        """End a job that has waited for longer than its ttl."""
        if job.state not in (None, _QUEUED, _DELAYED) or job.attempts:
            return
        job.error = self._fate(JobExpired, job)
        if job.state is None:
            self.turn_away(job)
        else:
            self.end(job, JobState.EXPIRED)

    def turn_away(self, job: Job) -> None:
        """Have a caller that waits for room hear ``job.error``."""
        self.room.discard(job)
        self._conclude(job)
        job.wake()

    def withdraw(self, job: Job) -> bool:
        """Cancel a job that is not running; false if it is."""
        if job.state is None:
            # Its caller waits for room: the job was never accepted.
            job.caller = None
            self.turn_away(job)
            return True
        if job.state is _RUNNING and job.begun:
            return False
        job.caller = None
        if job.terms.raise_cancel is None:
            job.forget_error()
            job.error = self.cancelled(job)
        self.end(job, JobState.CANCELLED)
        return True

    def cancelled(self, job: Job) -> JobCancelled:
        """Make the error of a cancelled job."""
        worker = None if job.worker is None or not job.attempts else job.worker.id
        return JobCancelled(job.name(), job.attempts > 0, job.attempts, worker)

    def cancel_running(self, job: Job) -> None:
        """Cancel the handler of a started job; its end is answered later."""
        worker = job.worker
        if worker is not None and worker.job is job:
            worker.cancel_job(f"trio_pool: job {job.name()} was cancelled")

    def end_stopped(self, job: Job) -> None:
        """End a job because the whole pool stops."""
        job.forget_error()
        if isinstance(self.failure, PoolBroken):
            job.error = self.broken(job)
            self.end(job, JobState.LOST)
            self.unheard.pop(job, None)
        else:
            if self.watched or job.batch is not None:
                # For the others it is made as they look.
                job.error = self.cancelled(job)
            self.end(job, JobState.CANCELLED)

    def broken(self, job: Job | None) -> PoolBroken:
        """Make the error of a broken pool, for one job or for anyone."""
        failure = self.failure
        assert isinstance(failure, PoolBroken)
        if job is None:
            error = PoolBroken(failure.pool, failure.reason)
        else:
            worker = None if job.worker is None else job.worker.id
            error = PoolBroken(
                failure.pool,
                failure.reason,
                job.name(),
                job.attempts > 0,
                job.attempts,
                worker,
            )
        error.__cause__ = failure.__cause__
        return error

    def settle_leftover(self, job: Job, crash: BaseException | None) -> None:
        """Decide what becomes of a job whose worker leaves it."""
        if self.stopping or (not job.begun and self._is_desolate()):
            self.end_stopped(job)
        elif job.begun or job.batch is not None or job.terms.leased:
            # The item of a batch has no place to go back to.
            worker = None if job.worker is None or not job.begun else job.worker.id
            error = WorkerCrashed(job.name(), job.attempts > 0, job.attempts, worker)
            error.__cause__ = crash
            job.error = error
            if job.begun:
                self.fail(job, JobState.LOST)
            else:
                self.end(job, JobState.LOST)
        else:
            self._put_back(job)

    def take_back_start(self, job: Job, cause: BaseException) -> None:
        """Have a job wait again whose worker was lost before it really started."""
        job.attempts -= 1
        terms = job.own_terms()
        if self.stopping or self._is_desolate():
            self.end_stopped(job)
        elif self._may_try_again(job) and not terms.leased:
            terms.overdue = False
            terms.put_back = True
            if job.batch is not None:
                # It is admitted anew as it starts.
                self._give_back_permit(job)
                job.batch.put_off(job)
            self._put_back(job)
        elif terms.leased and not terms.cancel_asked and terms.raise_cancel is None:
            job.error = WorkerCrashed(job.name(), job.attempts > 0, job.attempts, None)
            job.error.__cause__ = cause
            self.end(job, JobState.LOST)
        else:
            if terms.raise_cancel is None:
                job.error = self.cancelled(job)
            self.end(job, JobState.CANCELLED)

    def _put_back(self, job: Job) -> None:
        # It stays admitted; a token that its start had taken is given back.
        self._take_from_worker(job, _QUEUED)
        job.worker = None
        job.state = _QUEUED
        if job.batch is not None or job.queued_at < 0.0:
            job.queued_at = self.stamp()
        self.change += 1
        # Another worker is roused for it as this one leaves.
        self.line.push_front(job)

    def refuse_waiting(self) -> None:
        """Let nobody in who waits for room; `end_more` tells those beyond the first."""
        self.room.stop()
        for job in _leftovers(self.room, _AT_ONCE):
            self._refuse(job)

    def end_waiting(self) -> None:
        """Let nothing that waits start; `end_more` ends all but the first of it."""
        self.line.stop()
        for job in _leftovers(self.line, _AT_ONCE):
            self.end_stopped(job)
        self.stop_sources()

    def end_more(self) -> bool:
        """Tell some more of those left over; say whether there are still others."""
        until = perf_counter() + _TURN
        if self.room.stopped:
            for job in _leftovers(self.room):
                if perf_counter() > until:
                    return True
                self._refuse(job)
        if self.line.stopped:
            for job in _leftovers(self.line):
                if perf_counter() > until:
                    return True
                self.end_stopped(job)
        return False

    def has_leftovers(self) -> bool:
        """Say whether some that waited have still to hear that they will not run."""
        return bool(
            (self.room.stopped and self.room.count)
            or (self.line.stopped and self.line.count)
        )

    def _refuse(self, job: Job) -> None:
        job.error = self.refusal()
        self.turn_away(job)

    def stop_sources(self) -> None:
        """Call off batches whose readers or input are all that is left."""
        for source in tuple(self.sources):
            source.stop(self.refusal())

    # ------------------------------------------------------------------
    # Sources.

    def offer(self, source: Source) -> None:
        """Let workers come to a source that has something to give."""
        if self.stopping:
            return
        self.change += 1
        source.queued_at = self.stamp()
        self.line.push_source(source)
        self.rouse(1)

    def forget(self, source: Source) -> None:
        """Close the books of a source that has ended."""
        del self.sources[source]
        self.pulled += source.pulled

    def cancel_batch(self, batch: Batch) -> None:
        """Cancel every item of a batch that runs or waits to be tried again."""
        for worker in self.workers.values():
            job = worker.job
            if job is None or job.batch is not batch:
                continue
            if job.begun:
                worker.cancel_job("trio_pool: the rest of a batch was called off")
            else:
                job.error = self.cancelled(job)
                self.end(job, JobState.CANCELLED)
        # Those in a line that has stopped are ended with it, some at a time.
        for job in () if self.line.stopped else tuple(batch.put_offs):
            if job.state is not _RUNNING:
                job.forget_error()
                job.error = self.cancelled(job)
                self.end(job, JobState.CANCELLED)

    # ------------------------------------------------------------------
    # Pausing, and what is told.

    def pause(self) -> None:
        """Let workers take no more jobs."""
        if self.closed:
            raise self.refusal()
        if not self.paused:
            self.paused = True
            self._set_gate(SHUT)
            self.change += 1
            self.resting, self.idle = self.idle, self.resting

    def resume(self) -> None:
        """Let workers take jobs again."""
        if self.paused:
            self.paused = False
            self._set_gate(self._usual_gate)
            self.resting, self.idle = self.idle, self.resting
            waiting = self.line.count + self.room.count
            self.rouse(math.inf if self.line.sources else waiting)

    def _set_gate(self, gated: int) -> None:
        self.gated = gated
        for worker in self.workers.values():
            worker.set_gate()

    def tell_job(self, hook: str, job: Job, delay: float | None = None) -> None:
        """Call a job hook, if anyone listens."""
        if self.hooks.listening(hook):
            self.tell_heard(hook, job, self.stamp(), delay)

    def tell_heard(
        self, hook: str, job: Job, now: float, delay: float | None = None
    ) -> None:
        """Call a job hook that somebody listens to."""
        terms, worker = job.terms, job.worker
        event: Any = _Draft()
        event.kind = _KINDS[hook]
        event.pool = self.name
        event.time = now + self.epoch
        # `Job.name`, but for those that have it made when it is asked for.
        event.job_id = (
            job.id if terms is self.plain_terms and job.batch is None else job.name()
        )
        event.state = job.state
        event.worker = None if worker is None else worker.id
        event.attempts = job.attempts
        event.error = job.error
        event.key = terms.key
        event.delay = delay
        event.__class__ = JobChanged
        self.hooks.call(hook, event)

    def next_id(self) -> int:
        """Return a number that no other job of this pool has."""
        return next(self.ids)

    def look_for_listeners(self) -> None:
        """Note who listens: an event stream was opened or closed."""
        hooks = self.hooks
        self.watched = hooks.any_job_hook
        self.tells_queue = hooks.listening("on_job_queue")
        self.tells_start = hooks.listening("on_job_start")
        self.tells_complete = hooks.listening("on_job_complete")
        self.tells_each = self.tells_queue or self.tells_start or self.tells_complete
        self.change += 1

    def keep_unheard(self, job: Job) -> None:
        """Keep a failure that nobody has heard of for the end of the block."""
        if self.config.unobserved != "ignore":
            self.unheard[job] = None

    def heard(self, job: Job) -> None:
        """Note that somebody has read a reply."""
        if job in self.unheard:
            del self.unheard[job]

    def unheard_errors(self) -> list[Exception]:
        """Take the errors of submitted jobs that nobody has read."""
        errors: list[Exception] = []
        for job in self.unheard:
            assert isinstance(job.error, Exception)
            error = job.error.with_traceback(job.terms.traceback)
            note(
                error,
                f"trio_pool: job {job.name()} of pool {self.config.name!r}, "
                "whose reply nobody read",
            )
            errors.append(error)
        self.unheard.clear()
        return errors
