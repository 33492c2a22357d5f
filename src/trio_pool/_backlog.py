"""What waits, in order: higher priority first, first come first served within."""

from __future__ import annotations

import itertools
import math
from bisect import insort
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, final

from ._job import Job

if TYPE_CHECKING:
    from collections.abc import Hashable

    from trio.lowlevel import Task

    from ._worker import Worker


class Source(Protocol):
    """What stands in line and gives jobs, or takes the worker for itself."""

    priority: int
    queued_at: float
    waiting: bool
    hungry: bool
    """Whether a worker may come."""

    @property
    def pulled(self) -> int:
        """Count the items that workers took without asking."""
        ...

    def take(self, worker: Worker) -> Job | None:
        """Give a job to a free worker."""

    def stop(self, pool_error: Exception) -> None:
        """Learn that no worker will come any more."""

    def is_stuck(self, task: Task) -> bool:
        """Say whether a task waits for it, and nobody works for it now."""
        ...


_Entry: TypeAlias = "Job | Source"

# Entries that have left may stay in the queues until this many have gathered.
_SLACK = 64

# Priorities beyond this age alike, as no float tells what they make up for.
_FAR = 10**9


def _age(entry: _Entry) -> tuple[float, int]:
    return entry.queued_at, entry.id if isinstance(entry, Job) else 0


@final
class Line:
    """An ordered line of jobs, and of sources that jobs are pulled from.

    A job that leaves from the middle is only marked, and skipped later, so
    that leaving costs the same in a long line. A job that must not run yet is
    held: it keeps its place until it is passed, and then is first. A source
    stays in line, behind those of its priority, for as long as it has jobs to
    give. With ``aging`` a job counts as one priority higher for each so many
    seconds it has waited; as all age alike, that order never changes.
    """

    __slots__ = (
        "_aging",
        "_gone",
        "_levels",
        "_priorities",
        "count",
        "delayed",
        "held",
        "passed",
        "passed_count",
        "plain",
        "sources",
        "top",
    )

    def __init__(self, aging: float = math.inf) -> None:
        self.count = 0
        """Jobs that wait, not counting those still inside sources."""
        self.sources = 0
        """Sources in line; one may have nothing more to give."""
        self.delayed: OrderedDict[Job, None] = OrderedDict()
        """Jobs that wait for their time, in no queue."""
        self.held: dict[Job, None] = {}
        """Jobs that must not run yet, at their place in line."""
        self.passed: dict[int, OrderedDict[Job, None]] = {}
        """Those of them that others have passed, by priority: in no queue."""
        self.passed_count = 0
        self.plain: deque[_Entry] = deque()
        self.top = self.plain
        self._aging = aging
        self._levels = {0: self.plain}
        self._priorities = [0]
        self._gone = 0

    def _level(self, priority: int) -> deque[_Entry]:
        level = self._levels.get(priority)
        if level is None:
            level = self._levels[priority] = deque()
            insort(self._priorities, priority)
            self.top = self._levels[self._priorities[-1]]
        return level

    def push(self, job: Job, held: bool = False) -> None:
        """Let a job queue up."""
        self.count += 1
        job.waiting = not held
        if held:
            self.held[job] = None
        if job.priority:
            self._level(job.priority).append(job)
        else:
            self.plain.append(job)

    def push_front(self, job: Job) -> None:
        """Put back a job that was taken and not started."""
        job.waiting = True
        self._level(job.priority).appendleft(job)
        self.count += 1

    def push_source(self, source: Source) -> None:
        """Let a source queue up, unless it is in line already."""
        if not source.waiting:
            source.waiting = True
            self.sources += 1
            self._level(source.priority).append(source)

    def put_off(self, job: Job) -> None:
        """Let a job wait for its time."""
        job.waiting = False
        self.delayed[job] = None
        self.count += 1

    def release(self, job: Job) -> None:
        """Let a held job run when it is its turn; no matter if it is not here yet."""
        if job in self.held:
            del self.held[job]
            job.waiting = True
        elif self._forget_passed(job):
            job.waiting = True
            level = self._level(job.priority)
            # Others that were passed may be back already.
            place = 0
            while place < len(level) and _age(level[place]) < _age(job):
                place += 1
            level.insert(place, job)

    def _forget_passed(self, job: Job) -> bool:
        passed = self.passed.get(job.priority)
        if passed is None or job not in passed:
            return False
        del passed[job]
        self.passed_count -= 1
        if not passed:
            del self.passed[job.priority]
        return True

    @property
    def ready(self) -> int:
        """Count the jobs in line that nothing but a worker is wanting for."""
        return self.count - len(self.delayed) - len(self.held) - self.passed_count

    def pop(self, now: float = 0.0) -> _Entry | None:
        """Take the first job that may run, or name the first hungry source."""
        if not self.count and not self.sources:
            if self._gone or len(self._priorities) > 1:
                self._sweep()
            return None
        if self._aging != math.inf:
            return self._pop_aged(now)
        priorities = self._priorities
        at = len(priorities) - 1
        while at >= 0:
            level = self._levels[priorities[at]]
            while level:
                entry = self._pop_from(level, now)
                if entry is not None:
                    return entry
            if priorities[at]:
                self._close_level(at)
            at -= 1
        return None

    def _pop_from(self, level: deque[_Entry], now: float) -> _Entry | None:
        entry = level.popleft()
        if entry.__class__ is not Job:
            source: Any = entry
            if source.hungry:
                source.queued_at = now
                level.append(source)
                return entry
            source.waiting = False
            self.sources -= 1
        elif entry.waiting:
            entry.waiting = False
            self.count -= 1
            return entry
        elif entry in self.held:
            del self.held[entry]
            self.passed.setdefault(entry.priority, OrderedDict())[entry] = None
            self.passed_count += 1
        else:
            self._gone -= 1
        return None

    def _close_level(self, at: int) -> None:
        del self._levels[self._priorities.pop(at)]
        self.top = self._levels[self._priorities[-1]]

    def _pop_aged(self, now: float) -> _Entry | None:
        # A job of priority p is treated as one of priority 0 that came
        # p * aging seconds earlier; among the first of each level that
        # decides for all.
        while True:
            best: deque[_Entry] | None = None
            best_since = math.inf
            for at in range(len(self._priorities) - 1, -1, -1):
                priority = self._priorities[at]
                level = self._levels[priority]
                if level:
                    since = level[0].queued_at - self._lead(priority)
                    if since < best_since:
                        best, best_since = level, since
                elif priority:
                    self._close_level(at)
            if best is None:
                return None
            entry = self._pop_from(best, now)
            if entry is not None:
                return entry

    def _lead(self, priority: int) -> float:
        """Return how many seconds of waiting a priority makes up for."""
        return max(-_FAR, min(priority, _FAR)) * self._aging

    def shift(self) -> Job | None:
        """Take the first job in line, be it held or not; no source may be here."""
        firsts: list[Any] = [next(iter(jobs)) for jobs in self.passed.values()]
        trimmed = map(self._trimmed, self._levels.values())
        firsts.extend(level[0] for level in trimmed if level)
        if not firsts:
            return None
        job: Job = min(firsts, key=self._rank)
        if not self._forget_passed(job):
            self._levels[job.priority].popleft()
            job.waiting = False
            self.held.pop(job, None)
        self.count -= 1
        return job

    def _rank(self, job: Job) -> tuple[float, ...]:
        aged = 0.0
        if self._aging != math.inf:
            aged = job.queued_at - self._lead(job.priority)
        return (aged, -job.priority, *_age(job))

    def _trimmed(self, level: deque[_Entry]) -> deque[_Entry]:
        """Take those that have left off the front, lest they are passed again."""
        while level and not (level[0].waiting or level[0] in self.held):
            level.popleft()
            self._gone -= 1
        return level

    def oldest(self) -> Job | None:
        """Name the job that has waited longest, whatever its priority."""
        found: list[Job] = []
        for level in self._levels.values():
            for entry in self._trimmed(level):
                if isinstance(entry, Job) and (entry.waiting or entry in self.held):
                    found.append(entry)
                    break
        for jobs in (*self.passed.values(), self.delayed):
            found.extend(itertools.islice(jobs, 1))
        return min(found, key=_age, default=None)

    def oldest_since(self) -> float | None:
        """Say since when the job that has waited longest waits, and change nothing."""
        found: list[float] = []
        for level in tuple(self._levels.values()):
            for entry in level:
                if isinstance(entry, Job) and (entry.waiting or entry in self.held):
                    found.append(entry.queued_at)
                    break
        for jobs in (*tuple(self.passed.values()), self.delayed):
            found.extend(job.queued_at for job in itertools.islice(jobs, 1))
        return min(found, default=None)

    def discard(self, job: Job) -> bool:
        """Let a job leave from wherever it is; say whether it was in line."""
        if job.waiting:
            job.waiting = False
        elif job in self.held:
            del self.held[job]
        elif self._forget_passed(job):
            self.count -= 1
            return True
        elif job in self.delayed:
            del self.delayed[job]
            self.count -= 1
            return True
        else:
            return False
        self.count -= 1
        self._gone += 1
        if not self.count or self._gone > self.count + _SLACK:
            self._sweep()
        return True

    def _sweep(self) -> None:
        held = self.held
        for priority, level in self._levels.items():
            self._levels[priority] = deque(
                entry for entry in level if entry.waiting or entry in held
            )
        self._levels = {p: level for p, level in self._levels.items() if level or not p}
        self._priorities = sorted(self._levels)
        self.top = self._levels[self._priorities[-1]]
        self.plain = self._levels[0]
        self._gone = 0

    def has_work(self) -> bool:
        """Say whether anything waits here, be it now or later."""
        return self.count > 0 or (
            self.sources > 0
            and any(
                not isinstance(entry, Job) and entry.hungry
                for level in self._levels.values()
                for entry in level
            )
        )

    def jobs(self) -> list[Job]:
        """List the jobs in line, in order; those in no queue come last."""
        return [
            entry
            for priority in reversed(self._priorities)
            for entry in self._levels[priority]
            if isinstance(entry, Job) and (entry.waiting or entry in self.held)
        ] + [*itertools.chain(*self.passed.values()), *self.delayed]

    def clear(self) -> None:
        """Let everything in line leave."""
        for level in self._levels.values():
            for entry in level:
                entry.waiting = False
        self.delayed.clear()
        self.held.clear()
        self.passed.clear()
        self.passed_count = 0
        self.plain = deque()
        self.top = self.plain
        self._levels = {0: self.plain}
        self._priorities = [0]
        self.count = self.sources = self._gone = 0


@final
class Keys:
    """Which job of each key comes next: one at a time, in order of arrival."""

    __slots__ = ("_arrivals",)

    def __init__(self) -> None:
        self._arrivals: dict[Hashable, Job | OrderedDict[Job, None]] = {}
        """The only job of a key, or all of them in order."""

    def enter(self, key: Hashable, job: Job) -> bool:
        """Note the arrival of a job; say whether it is the first of its key."""
        arrivals = self._arrivals.setdefault(key, job)
        if arrivals is job:
            return True
        if isinstance(arrivals, Job):
            arrivals = self._arrivals[key] = OrderedDict({arrivals: None})
        arrivals[job] = None
        return False

    def leave(self, key: Hashable, job: Job) -> Job | None:
        """Note that a job is over; name the one that comes first by this."""
        arrivals = self._arrivals[key]
        if isinstance(arrivals, Job):
            del self._arrivals[key]
            return None
        was_first = next(iter(arrivals)) is job
        del arrivals[job]
        first = next(iter(arrivals))
        if len(arrivals) == 1:
            self._arrivals[key] = first
        return first if was_first else None

    def is_first(self, key: Hashable, job: Job) -> bool:
        """Say whether a job is the one of its key that may run."""
        arrivals = self._arrivals[key]
        return arrivals is job or (
            not isinstance(arrivals, Job) and next(iter(arrivals)) is job
        )
