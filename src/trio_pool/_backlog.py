"""What waits, in order: higher priority first, first come first served within."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from heapq import heapify, heappop, heappush, heapreplace, merge
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, final

from ._job import Job

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

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
_Rank: TypeAlias = "tuple[float, ...]"

# Entries that have left may stay in the queues until this many have gathered.
_SLACK = 64

# Priorities beyond this age alike, as no float tells what they make up for.
_FAR = 10**9


def _age(entry: _Entry) -> tuple[float, int]:
    return entry.queued_at, entry.id if isinstance(entry, Job) else 0


@final
class _Firsts:
    """Finds the queue whose first entry ranks lowest, each known by its priority.

    Entries leave the front of a queue without a word, and those behind rank
    higher: what is remembered is put right when it comes to the top.
    """

    __slots__ = ("_heap", "_known", "_rank")

    def __init__(self, rank: Callable[[int], _Rank | None]) -> None:
        self._rank = rank
        """Ranks what is first in a queue now; None if nothing is."""
        self._heap: list[tuple[_Rank, int]] = []
        self._known: dict[int, _Rank] = {}

    def meet(self, priority: int) -> None:
        """Note that an entry has come to the end of a queue."""
        if priority not in self._known:
            self.note(priority)

    def note(self, priority: int) -> None:
        """Note that an entry has come to the front of a queue."""
        rank = self._rank(priority)
        known = self._known.get(priority)
        if rank is not None and (known is None or rank < known):
            self._known[priority] = rank
            heappush(self._heap, (rank, priority))

    def forget(self) -> None:
        """Forget the queues of the past, as all are empty."""
        self._heap.clear()
        self._known.clear()

    def best(self) -> int | None:
        """Name the queue, if any has an entry."""
        # Plain jobs come in without a word.
        self.meet(0)
        heap, known = self._heap, self._known
        while heap:
            noted, priority = heap[0]
            if known.get(priority) is not noted:
                heappop(heap)
                continue
            rank = self._rank(priority)
            if rank == noted:
                return priority
            if rank is None:
                heappop(heap)
                del known[priority]
            else:
                known[priority] = rank
                heapreplace(heap, (rank, priority))
        return None


@final
class Line:
    """An ordered line of jobs, and of sources that jobs are pulled from.

    A job that leaves from the middle is only marked, and skipped later, so
    that leaving costs the same in a long line. A job that must not run yet is
    held: it keeps its place until it is passed, and then is first. A source
    stays in line, behind those of its priority, for as long as it has jobs to
    give. With ``aging`` a job counts as one priority higher for each so many
    seconds it has waited; as all age alike, that order never changes. A line
    that has stopped gives nothing, and only lets jobs leave.
    """

    __slots__ = (
        "_aged",
        "_aging",
        "_back",
        "_by_age",
        "_by_turn",
        "_firsts",
        "_gone",
        "_levels",
        "_priorities",
        "_spare",
        "count",
        "delayed",
        "held",
        "passed",
        "passed_count",
        "plain",
        "sources",
        "stopped",
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
        self.passed: OrderedDict[int, OrderedDict[Job, None]] = OrderedDict()
        """Those of them that others have passed, by priority: in no queue."""
        self.passed_count = 0
        self.plain: deque[_Entry] = deque()
        self.top = self.plain
        self.stopped = False
        """Whether nothing is given out any more."""
        self._aging = aging
        self._levels = {0: self.plain}
        self._priorities = [0]
        self._back: dict[int, list[tuple[float, int, Job]]] = {}
        """Heaps of jobs that were passed and may run now, by priority."""
        self._gone = 0
        self._spare: deque[_Entry] | None = None
        self._firsts: list[_Firsts] = []
        """Those of the following that there are."""
        self._aged: _Firsts | None = None
        self._by_age: _Firsts | None = None
        self._by_turn: _Firsts | None = None
        if aging != math.inf:
            self._aged = self._find_firsts(self._aged_rank)

    def _find_firsts(self, rank: Callable[[int], _Rank | None]) -> _Firsts:
        firsts = _Firsts(rank)
        for priority in (*self._levels, *self.passed):
            firsts.note(priority)
        self._firsts.append(firsts)
        return firsts

    def _level(self, priority: int) -> deque[_Entry]:
        level = self._levels.get(priority)
        if level is None:
            level = deque() if self._spare is None else self._spare
            self._spare = None
            self._levels[priority] = level
            insort(self._priorities, priority)
            self._set_top()
        return level

    def _set_top(self) -> None:
        highest = self._priorities[-1]
        # Who looks at the top only must not overlook those that are back.
        hidden = self.stopped or highest in self._back
        self.top = deque() if hidden else self._levels[highest]

    def push(self, job: Job, held: bool = False) -> None:
        """Let a job queue up."""
        self.count += 1
        job.waiting = not held
        if held:
            self.held[job] = None
        level = self._levels.get(job.priority)
        if level is None:
            level = self._level(job.priority)
        level.append(job)
        for firsts in self._firsts:
            firsts.meet(job.priority)

    def push_front(self, job: Job) -> None:
        """Put back a job that was taken and not started."""
        job.waiting = True
        self._level(job.priority).appendleft(job)
        self.count += 1
        for firsts in self._firsts:
            firsts.note(job.priority)

    def push_source(self, source: Source) -> None:
        """Let a source queue up, unless it is in line already."""
        if not source.waiting:
            source.waiting = True
            self.sources += 1
            self._level(source.priority).append(source)
            for firsts in self._firsts:
                firsts.meet(source.priority)

    def put_off(self, job: Job) -> None:
        """Let a job wait for its time."""
        job.waiting = False
        self.delayed[job] = None
        self.count += 1

    def release(self, job: Job) -> None:
        """Let a held job run when it is its turn; no matter if it is not here yet."""
        if self.stopped:
            return
        if job in self.held:
            del self.held[job]
            job.waiting = True
        elif self._forget_passed(job):
            job.waiting = True
            self._level(job.priority)
            heappush(self._back.setdefault(job.priority, []), (*_age(job), job))
            self._set_top()
            for firsts in self._firsts:
                firsts.note(job.priority)

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
        if self.stopped:
            return 0
        return self.count - len(self.delayed) - len(self.held) - self.passed_count

    def pop(self, now: float = 0.0) -> _Entry | None:
        """Take the first job that may run, or name the first hungry source."""
        if self.stopped:
            return None
        if not self.count and not self.sources:
            if self._gone or len(self._priorities) > 1:
                self._sweep()
            for firsts in self._firsts:
                firsts.forget()
            return None
        if self._aged is not None:
            return self._pop_aged(self._aged, now)
        priorities = self._priorities
        at = len(priorities) - 1
        while at >= 0:
            priority = priorities[at]
            level = self._levels[priority]
            while level or priority in self._back:
                entry = self._pop_from(priority, level, now)
                if entry is not None:
                    return entry
            if priority:
                self._close_level(at)
            at -= 1
        return None

    def _pop_from(
        self, priority: int, level: deque[_Entry], now: float
    ) -> _Entry | None:
        if priority in self._back:
            job = self._first_back(priority, level)
            if job is not None:
                self._leave_back(priority)
                job.waiting = False
                self.count -= 1
                return job
            if not level:
                return None
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

    def _leave_back(self, priority: int) -> None:
        heappop(self._back[priority])
        if not self._back[priority]:
            del self._back[priority]
            self._set_top()

    def _first_back(self, priority: int, level: deque[_Entry]) -> Job | None:
        """Name the first of those that are back, if it is before those in the queue."""
        back = self._back.get(priority, ())
        while back:
            since, number, job = back[0]
            if job.waiting:
                is_first = not level or (since, number) < _age(level[0])
                return job if is_first else None
            self._leave_back(priority)
            self._gone -= 1
        return None

    def _close_level(self, at: int) -> None:
        # It may well be a level's again soon, and is dear to make.
        self._spare = self._levels.pop(self._priorities.pop(at))
        self._set_top()

    def lower_top(self) -> deque[_Entry]:
        """Close the highest levels that have run out; name the top by then."""
        while not (self.top or self.stopped):
            highest = self._priorities[-1]
            if highest <= 0 or highest in self._back:
                break
            self._close_level(-1)
        return self.top

    def _close_if_empty(self, priority: int) -> None:
        if priority and not (self._levels.get(priority) or priority in self._back):
            at = bisect_left(self._priorities, priority)
            if priority in self._levels:
                self._close_level(at)

    def _pop_aged(self, aged: _Firsts, now: float) -> _Entry | None:
        while True:
            priority = aged.best() if len(self._levels) > 1 else 0
            if priority is None or not (self._levels[priority] or self._back):
                return None
            entry = self._pop_from(priority, self._levels[priority], now)
            self._close_if_empty(priority)
            if entry is not None:
                return entry

    def _aged_rank(self, priority: int) -> _Rank | None:
        """Rank the first of a level by when a plain job would have had to come."""
        # A job of priority p is treated as one of priority 0 that came
        # p * aging seconds earlier; among the first of each level that
        # decides for all.
        level = self._levels.get(priority)
        if level is None:
            return None
        first: _Entry | None = None
        if priority in self._back:
            first = self._first_back(priority, level)
        if first is None and level:
            first = level[0]
        if first is None:
            self._close_if_empty(priority)
            return None
        return first.queued_at - self._lead(priority), -priority

    def _lead(self, priority: int) -> float:
        """Return how many seconds of waiting a priority makes up for."""
        return max(-_FAR, min(priority, _FAR)) * self._aging

    def may_precede(self, job: Job, source: Source) -> bool:
        """Say whether a job could be before a source in line, by its priority."""
        if self._aged is None:
            return job.priority >= source.priority
        age = job.queued_at - self._lead(job.priority)
        return age <= source.queued_at - self._lead(source.priority)

    def shift(self) -> Job | None:
        """Take the first job in line, be it held or not; no source may be here."""
        priority: int | None = 0
        if len(self._levels) > 1 or self.passed:
            if self._by_turn is None:
                self._by_turn = self._find_firsts(self._turn_rank)
            priority = self._by_turn.best()
        job = None if priority is None else self._first_job(priority)
        if priority is None or job is None:
            return None
        if not self._forget_passed(job):
            level = self._levels[priority]
            if level and level[0] is job:
                level.popleft()
            else:
                self._leave_back(priority)
            job.waiting = False
            self.held.pop(job, None)
            self._close_if_empty(priority)
        self.count -= 1
        if not self.count and self._gone:
            # Nobody may come by for long.
            self._sweep()
        return job

    def _turn_rank(self, priority: int) -> _Rank | None:
        job = self._first_job(priority)
        if job is None:
            self._close_if_empty(priority)
            return None
        aged = 0.0
        if self._aging != math.inf:
            aged = job.queued_at - self._lead(priority)
        return (aged, -priority, *_age(job))

    def _age_rank(self, priority: int) -> _Rank | None:
        job = self._first_job(priority)
        if job is None:
            self._close_if_empty(priority)
            return None
        return _age(job)

    def _first_job(self, priority: int) -> Job | None:
        """Name the first job of a priority, be it held, passed or back again."""
        level = self._levels.get(priority)
        job = self._first_queued(level) if level else None
        if not self._back and not self.passed:
            return job
        found = [] if job is None else [job]
        job = self._first_back(priority, deque())
        if job is not None:
            found.append(job)
        if priority in self.passed:
            found.append(next(iter(self.passed[priority])))
        return min(found, key=_age, default=None)

    def _first_queued(self, level: deque[_Entry]) -> Job | None:
        """Find the first job in a queue; those before it that have left are let go."""
        sources: list[_Entry] = []
        while self._trimmed(level) and not isinstance(level[0], Job):
            sources.append(level.popleft())
        found: Any = level[0] if level else None
        level.extendleft(reversed(sources))
        return found  # type: ignore[no-any-return]

    def _trimmed(self, level: deque[_Entry]) -> deque[_Entry]:
        """Take those that have left off the front, lest they are passed again."""
        while level and not (level[0].waiting or level[0] in self.held):
            level.popleft()
            self._gone -= 1
        return level

    def oldest(self) -> Job | None:
        """Name the job that has waited longest, whatever its priority."""
        priority: int | None = 0
        if len(self._levels) > 1 or self.passed:
            if self._by_age is None:
                self._by_age = self._find_firsts(self._age_rank)
            priority = self._by_age.best()
        job = None if priority is None else self._first_job(priority)
        for delayed in self.delayed:
            return delayed if job is None else min(delayed, job, key=_age)
        return job

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
        for back in tuple(self._back.values()):
            found.extend(since for since, _, job in tuple(back) if job.waiting)
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
        if self.stopped:
            # `leftover` goes through all of it anyway.
            return
        held = self.held
        for priority, back in tuple(self._back.items()):
            back[:] = [entry for entry in back if entry[2].waiting]
            heapify(back)
            if not back:
                del self._back[priority]
        for priority, level in self._levels.items():
            self._levels[priority] = deque(
                entry for entry in level if entry.waiting or entry in held
            )
        self._levels = {
            priority: level
            for priority, level in self._levels.items()
            if level or not priority or priority in self._back
        }
        self._priorities = sorted(self._levels)
        self._set_top()
        self.plain = self._levels[0]
        self._gone = 0
        if not self.count and not self.sources:
            for firsts in self._firsts:
                firsts.forget()

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
            for entry in merge(
                (job for *_, job in sorted(self._back.get(priority, []))),
                self._levels[priority],
                key=_age,
            )
            if isinstance(entry, Job) and (entry.waiting or entry in self.held)
        ] + [*itertools.chain(*self.passed.values()), *self.delayed]

    def stop(self) -> None:
        """Give nothing out any more; the jobs wait on, to be discarded."""
        self.stopped = True
        self.sources = 0
        # Those who look at these themselves find nothing.
        self.plain = self.top = deque()

    def leftover(self) -> Job | None:
        """Name the first job that is left in a stopped line, in the order of `jobs`."""
        while self._priorities:
            priority = self._priorities[-1]
            level = self._levels[priority]
            while level or priority in self._back:
                job = self._first_back(priority, level)
                if job is not None:
                    return job
                if not level:
                    break
                entry: Any = level[0]
                if entry.__class__ is not Job:
                    entry.waiting = False
                elif entry.waiting or entry in self.held:
                    return entry
                level.popleft()
            self._priorities.pop()
        passed = itertools.chain.from_iterable(self.passed.values())
        return next(itertools.chain(passed, self.delayed), None)


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
        if arrivals is job:
            del self._arrivals[key]
            return None
        assert not isinstance(arrivals, Job)
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
