"""What can be read of a pool at any time, from any thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from ._events import JobState, PoolStatistics, ShutdownReport, WorkerSnapshot
from ._events import WorkerState as State
from ._latency import Histogram, Latency

if TYPE_CHECKING:
    from collections.abc import Callable

# A reader in another thread may meet a queue as it changes, and looks again.
_LOOKS = 100


def count(dispatch: Any, workers: int, restarts: int) -> PoolStatistics:
    """Count everything."""
    # Each is read once, and the sum of all is right by this even if its thread
    # moves on meanwhile; jobs run that neither wait nor have ended.
    ended = dict(dispatch.ended)
    waiting = dispatch.line.count
    done = dispatch.done
    accepted = dispatch.accepted
    running = accepted - done - sum(ended.values()) - waiting
    pulled = dispatch.pulled + sum(batch.pulled for batch in tuple(dispatch.sources))
    delayed = len(dispatch.line.delayed)
    done += pulled
    until = dispatch.stopped_at
    age = (dispatch.stamp() if until is None else until) - dispatch.opened_at
    return PoolStatistics(
        size=dispatch.wanted,
        workers=workers,
        busy=running,
        accepted=accepted + pulled,
        delayed=delayed,
        queued=waiting - delayed,
        running=running,
        done=done,
        failed=ended[JobState.FAILED],
        timed_out=ended[JobState.TIMED_OUT],
        cancelled=ended[JobState.CANCELLED],
        expired=ended[JobState.EXPIRED],
        dropped=ended[JobState.DROPPED],
        lost=ended[JobState.LOST],
        retries=dispatch.retries,
        restarts=restarts,
        oldest_wait=_oldest_wait(dispatch),
        wait=_waits(dispatch),
        run=_runs(dispatch),
        throughput=(done + sum(ended.values())) / age if age > 0 else 0.0,
    )


def _waits(dispatch: Any) -> Latency:
    handed = Histogram()
    handed.add(0.0, dispatch.handed)
    handed.merge(dispatch.waits)
    return handed.latency()


def _runs(dispatch: Any) -> Latency:
    workers = (dispatch, *tuple(dispatch.workers.values()))
    quick = sum(worker.quick for worker in workers)
    runs = Histogram()
    if quick:
        runs.add(sum(worker.quick_time for worker in workers) / quick, quick)
    runs.merge(dispatch.runs)
    return runs.latency()


def _oldest_wait(dispatch: Any) -> float:
    for _ in range(_LOOKS):
        try:
            since = dispatch.line.oldest_since()
        except RuntimeError:
            continue
        return 0.0 if since is None else max(0.0, dispatch.stamp() - since)
    return 0.0


def picture(worker: Any, stamp: Callable[[], float]) -> WorkerSnapshot:
    """Picture a worker."""
    job = worker.job
    state = worker.state
    if job is not None:
        state = State.BUSY
    elif state is State.BUSY:
        state = State.IDLE
    # In this order, as the job may go on in its own thread meanwhile.
    since = None if job is None or not job.begun else job.started_at
    age = None if since is None else max(0.0, stamp() - since)
    return WorkerSnapshot(
        id=worker.id,
        state=state,
        job_id=None if job is None else job.name(),
        job_age=age,
        jobs=_jobs(worker),
        restarts=worker.restarts,
        last_error=worker.last_error,
    )


def _jobs(worker: Any) -> int:
    """Count the jobs that a worker has started, with those it pulls just now."""
    job = worker.job
    started: int = worker.jobs
    if job is not None and job.batch is not None:
        started += max(0, job.index - worker.counted)
    return started


@final
class Closing:
    """The count of fates since a pool was closed."""

    def __init__(self, statistics: Callable[[], PoolStatistics]) -> None:
        self._statistics = statistics
        self._before = statistics()
        self.drained = False

    def report(self) -> ShutdownReport:
        """Report the fate of every job that was unfinished then."""
        before, now = self._before, self._statistics()
        return ShutdownReport(
            done=now.done - before.done,
            failed=_failures(now) - _failures(before),
            cancelled=_cancellations(now) - _cancellations(before),
            unfinished=now.running + now.queued + now.delayed,
        )


def _failures(statistics: PoolStatistics) -> int:
    return statistics.failed + statistics.timed_out + statistics.lost


def _cancellations(statistics: PoolStatistics) -> int:
    return statistics.cancelled + statistics.dropped + statistics.expired
