"""What waits, in order: higher priority first, first come first served within."""

from __future__ import annotations

from bisect import insort
from collections import deque
from typing import TYPE_CHECKING, TypeAlias, final

from ._batch import Batch

if TYPE_CHECKING:
    from ._job import Job

_Entry: TypeAlias = "Job | Batch"

# Entries that have left may stay in the queues until this many have gathered.
_SLACK = 64


@final
class Line:
    """An ordered line of jobs, and of batches that jobs are pulled from.

    A job that leaves from the middle is only marked, and skipped later, so
    that leaving costs the same in a long line. A batch stays in line, behind
    those of its priority, for as long as it has jobs to give.
    """

    __slots__ = (
        "_gone",
        "_levels",
        "_priorities",
        "batches",
        "count",
        "plain",
        "top",
    )

    def __init__(self) -> None:
        self.count = 0
        """Jobs in line, not counting those still inside batches."""
        self.batches = 0
        """Batches in line; one may have nothing more to give."""
        self.plain: deque[_Entry] = deque()
        self.top = self.plain
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

    def push(self, job: Job) -> None:
        """Let a job queue up."""
        job.waiting = True
        self.count += 1
        if job.priority:
            self._level(job.priority).append(job)
        else:
            self.plain.append(job)

    def push_front(self, job: Job) -> None:
        """Put back a job that was taken and not started."""
        job.waiting = True
        self._level(job.priority).appendleft(job)
        self.count += 1

    def push_batch(self, batch: Batch) -> None:
        """Let a batch queue up, unless it is in line already."""
        if not batch.waiting:
            batch.waiting = True
            self.batches += 1
            self._level(batch.priority).append(batch)

    def pop(self) -> _Entry | None:
        """Take the first job, or name the first batch that has one to give."""
        if not self.count and not self.batches:
            return None
        priorities = self._priorities
        at = len(priorities) - 1
        while at >= 0:
            level = self._levels[priorities[at]]
            while level:
                entry = level.popleft()
                if isinstance(entry, Batch):
                    if entry.hungry:
                        level.append(entry)
                        return entry
                    entry.waiting = False
                    self.batches -= 1
                elif entry.waiting:
                    entry.waiting = False
                    self.count -= 1
                    return entry
                else:
                    self._gone -= 1
            if priorities[at]:
                del self._levels[priorities.pop(at)]
                self.top = self._levels[priorities[-1]]
            at -= 1
        return None

    def oldest(self) -> Job | None:
        """Name the job that was accepted first, whatever its priority."""
        found: Job | None = None
        for level in self._levels.values():
            # Those that have left would be passed again at each call.
            while level and not level[0].waiting:
                level.popleft()
                self._gone -= 1
            for entry in level:
                if not isinstance(entry, Batch) and entry.waiting:
                    if found is None or entry.id < found.id:
                        found = entry
                    break
        return found

    def discard(self, job: Job) -> bool:
        """Let a job leave from wherever it is; say whether it was in line."""
        if not job.waiting:
            return False
        job.waiting = False
        self.count -= 1
        self._gone += 1
        if self._gone > self.count + _SLACK:
            self._sweep()
        return True

    def _sweep(self) -> None:
        for priority, level in self._levels.items():
            self._levels[priority] = deque(entry for entry in level if entry.waiting)
        self.top = self._levels[self._priorities[-1]]
        self.plain = self._levels[0]
        self._gone = 0

    def has_work(self) -> bool:
        """Say whether `pop` would find something."""
        return self.count > 0 or (
            self.batches > 0
            and any(
                isinstance(entry, Batch) and entry.hungry
                for level in self._levels.values()
                for entry in level
            )
        )

    def jobs(self) -> list[Job]:
        """List the jobs in line, in order."""
        return [
            entry
            for priority in reversed(self._priorities)
            for entry in self._levels[priority]
            if not isinstance(entry, Batch) and entry.waiting
        ]

    def clear(self) -> None:
        """Let everything in line leave."""
        for level in self._levels.values():
            for entry in level:
                entry.waiting = False
        self.plain = deque()
        self.top = self.plain
        self._levels = {0: self.plain}
        self._priorities = [0]
        self.count = self.batches = self._gone = 0
