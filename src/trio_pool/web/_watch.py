"""Takes readings of one pool, second by second, and pictures it."""

from collections import deque
from typing import Any, TypeAlias, final

import attrs

from .._current import CurrentJob
from .._events import PoolState, PoolStatistics, WorkerSnapshot
from .._latency import Latency
from .._pool import Pool, TaskPool
from ._history import History, Sample
from ._incidents import Incidents
from ._picture import PoolPicture, Series, Spread, WorkerRow
from ._verdict import Facts, Verdict, judge
from ._words import Words, id_of, type_of

AnyPool: TypeAlias = Pool[Any, Any] | TaskPool

_MINUTE = 60
_RATES_OVER = 10
_SLOWEST = 10


@final
@attrs.frozen
class _Reading:
    """What a pool told of itself at one moment."""

    time: float
    counts: PoolStatistics
    worked: float
    """Seconds that jobs have run so far, those that still run included."""


@final
@attrs.frozen
class _Described:
    """A job that runs, and its input in words."""

    id: int | str
    attempt: int
    input: object
    text: str | None

    def is_of(self, job: CurrentJob) -> bool:
        """Tell whether it is this job: ids may be given again."""
        same = (self.id, self.attempt) == (job.id, job.attempt)
        return same and self.input is job.input


@final
class Watch:
    """Follows one pool."""

    def __init__(self, pool: AnyPool, words: Words, now: float, wall: float) -> None:
        self.pool = pool
        self.history = History(now)
        self.incidents = Incidents(words)
        self._words = words
        self._readings = deque([self._read(now)], maxlen=_MINUTE + 1)
        self._state = pool.state
        self._breaker = self._breaker_state()
        self._described: dict[int, _Described] = {}
        self.history.add(now, wall, Sample(size=float(pool.size)))

    def _read(self, now: float) -> _Reading:
        counts, workers = self.pool.statistics(), self.pool.workers()
        # Not the workers themselves: they hold errors, and what these lead to.
        ages = sum(worker.job_age or 0.0 for worker in workers)
        return _Reading(now, counts, counts.run.count * counts.run.mean + ages)

    def _breaker_state(self) -> str | None:
        breaker = self.pool.config.breaker
        return None if breaker is None else breaker.state

    def sample(self, now: float, wall: float, lag: float) -> None:
        """Take the reading of a second; ``lag`` is the loop's longest in it."""
        before, after = self._readings[-1], self._read(now)
        self._readings.append(after)
        self.history.add(now, wall, _compare(before, after, lag))
        self._mark_changes(wall)
        self._forget_jobs()

    def _mark_changes(self, wall: float) -> None:
        state, breaker = self.pool.state, self._breaker_state()
        if state is not self._state:
            self.incidents.mark("state", f"pool is {state.value}", wall)
        if breaker != self._breaker:
            text = f"circuit breaker is {breaker or 'gone'}".replace("_", "-")
            self.incidents.mark("breaker", text, wall)
        self._state, self._breaker = state, breaker

    def verdict(self) -> Verdict:
        """Judge the pool as it is now."""
        return self._judge(self.pool.statistics(), self.pool.workers())

    def _judge(
        self, counts: PoolStatistics, workers: tuple[WorkerSnapshot, ...]
    ) -> Verdict:
        oldest, config = self._readings[0].counts, self.pool.config
        crashes = self.incidents.crashes()
        return judge(
            Facts(
                state=self.pool.state,
                statistics=counts,
                workers=workers,
                max_backlog=config.max_backlog,
                overflow=config.overflow,
                breaker=self._breaker_state(),
                scales=config.scale is not None,
                ended=_ended(counts) - _ended(oldest),
                failed=_failed(counts) - _failed(oldest),
                cause=crashes[0].type if crashes else "",
            )
        )

    def picture(self, wall: float, history: Series | None) -> PoolPicture:
        """Picture the pool as it is now."""
        counts, snapshots = self.pool.statistics(), self.pool.workers()
        verdict = self._judge(counts, snapshots)
        rows = self._rows(snapshots)
        oldest, newest = self._readings[0], self._readings[-1]
        earlier = self._readings[max(0, len(self._readings) - 1 - _RATES_OVER)]
        return PoolPicture(
            name=self.pool.name,
            state=self.pool.state.value,
            ready=verdict.ready,
            refuses=verdict.refuses,
            light=verdict.light,
            sentence=verdict.sentence,
            size=counts.size,
            workers_up=counts.workers,
            busy=counts.busy,
            busy_share_second=self._busy_share(1),
            busy_share_minute=self._busy_share(_MINUTE),
            queued=counts.queued,
            delayed=counts.delayed,
            running=counts.running,
            max_backlog=self.pool.config.max_backlog,
            oldest_wait=counts.oldest_wait,
            wait=_spread(counts.wait, oldest.counts.wait),
            run=_spread(counts.run, oldest.counts.run),
            accepted_rate=_rate(
                newest.counts.accepted - earlier.counts.accepted, earlier, newest
            ),
            ended_rate=_rate(
                _ended(newest.counts) - _ended(earlier.counts), earlier, newest
            ),
            accepted=counts.accepted,
            done=counts.done,
            failed=counts.failed,
            timed_out=counts.timed_out,
            cancelled=counts.cancelled,
            expired=counts.expired,
            dropped=counts.dropped,
            lost=counts.lost,
            retries=counts.retries,
            restarts=counts.restarts,
            breaker=self._breaker_state(),
            failures=self.incidents.failures(),
            events_lost=self.incidents.lost,
            errors=self.incidents.errors(),
            crashes=self.incidents.crashes(),
            workers=rows,
            slowest=_slowest(rows),
            marks=self.incidents.marks(wall),
            history=history,
        )

    def _busy_share(self, seconds: int) -> float:
        busy = sum(self.history.last("busy", seconds))
        size = sum(self.history.last("size", seconds))
        return min(1.0, busy / size) if size else 0.0

    def _rows(self, snapshots: tuple[WorkerSnapshot, ...]) -> tuple[WorkerRow, ...]:
        doing = self._describe_jobs()
        return tuple(
            WorkerRow(
                id=worker.id,
                state=worker.state.value,
                job=None if worker.job_id is None else id_of(worker.job_id),
                age=worker.job_age,
                doing=doing.get(worker.id),
                jobs=worker.jobs,
                restarts=worker.restarts,
                last_error=(
                    None if worker.last_error is None else type_of(worker.last_error)
                ),
            )
            for worker in sorted(snapshots, key=lambda worker: worker.id)
        )

    def _describe_jobs(self) -> dict[int, str | None]:
        """Describe what runs, each job once for as long as it runs."""
        if not self._words.all_shown:
            return {}
        known, self._described = self._described, {}
        for job in self._running():
            found = known.get(job.worker)
            if found is None or not found.is_of(job):
                text = self._words.of_input(job.input)
                found = _Described(job.id, job.attempt, job.input, text)
            self._described[job.worker] = found
        return {worker: found.text for worker, found in self._described.items()}

    def _forget_jobs(self) -> None:
        """Let go of the inputs of jobs that run no more."""
        if self._described:
            known, self._described = self._described, {}
            for job in self._running():
                found = known.get(job.worker)
                if found is not None and found.is_of(job):
                    self._described[job.worker] = found

    def _running(self) -> tuple[CurrentJob, ...]:
        return () if self.pool.state is PoolState.CLOSED else self.pool.running()


def _compare(before: _Reading, after: _Reading, lag: float) -> Sample:
    elapsed = after.time - before.time
    counts, earlier = after.counts, before.counts
    busy = (after.worked - before.worked) / elapsed if elapsed > 0 else 0.0
    return Sample(
        busy=min(max(busy, 0.0), float(max(counts.size, earlier.size, counts.busy))),
        size=float(counts.size),
        queued=float(counts.queued + counts.delayed),
        accepted=_rate(counts.accepted - earlier.accepted, before, after),
        ended=_rate(_ended(counts) - _ended(earlier), before, after),
        failed=_rate(_failed(counts) - _failed(earlier), before, after),
        wait_p95=counts.wait.since(earlier.wait).p95,
        run_p95=counts.run.since(earlier.run).p95,
        lag=lag,
    )


def _rate(number: int, before: _Reading, after: _Reading) -> float:
    elapsed = after.time - before.time
    return number / elapsed if elapsed > 0 else 0.0


def _ended(counts: PoolStatistics) -> int:
    return counts.accepted - counts.delayed - counts.queued - counts.running


def _failed(counts: PoolStatistics) -> int:
    return counts.failed + counts.timed_out + counts.lost


def _spread(now: Latency, before: Latency) -> Spread:
    times = now.since(before)
    return Spread(
        count=times.count, p50=times.p50, p95=times.p95, p99=times.p99, max=times.max
    )


def _slowest(rows: tuple[WorkerRow, ...]) -> tuple[WorkerRow, ...]:
    running = [row for row in rows if row.age is not None]
    running.sort(key=lambda row: row.age or 0.0, reverse=True)
    return tuple(running[:_SLOWEST])
