"""Keeps what went wrong in a pool lately, and the marks, in bounded memory."""

from collections import Counter, deque
from typing import Final, final

from .._events import (
    Event,
    EventKind,
    EventsLost,
    JobChanged,
    PoolResized,
    WorkerChanged,
)
from ._picture import Failure, FailureCount, Mark, MarkKind, RestartCause
from ._words import Words, id_of, place_of, type_of

_LAST = 20
_TYPES = 20
_TYPES_KEPT = 100
_MARKS = 50
_MARKS_FOR = 900.0
_OTHERS = "others"

KINDS: Final[tuple[EventKind, ...]] = (
    "job_error",
    "job_drop",
    "worker_crash",
    "worker_restart",
    "resize",
)
"""The kinds of events that are looked at."""


@final
class Incidents:
    """The failures, crashes and marks of one pool.

    Nothing here leads to an error object, and so to its frames.
    """

    def __init__(self, words: Words) -> None:
        self._words = words
        self._counts: Counter[str] = Counter()
        self._seen: dict[str, float] = {}
        self.lost = 0
        """Events of any kind that were not looked at."""
        self._errors: deque[Failure] = deque(maxlen=_LAST)
        self._crashes: deque[RestartCause] = deque(maxlen=_LAST)
        self._marks: deque[Mark] = deque(maxlen=_MARKS)

    def hear(self, event: Event, wall: float) -> None:
        """Take note of an event; ``wall`` is now, in seconds of `time.time`."""
        match event:
            case JobChanged(kind="job_error" | "job_drop"):
                self._note_failure(event, wall)
            case WorkerChanged(kind="worker_crash"):
                self._note_crash(event, wall)
            case WorkerChanged(kind="worker_restart"):
                self.mark("restart", f"worker {event.worker} is set up again", wall)
            case PoolResized():
                self.mark("resize", f"size {event.old} \u2192 {event.new}", wall)
            case EventsLost():
                self.lost += event.count
            case _:
                pass

    def mark(self, kind: MarkKind, text: str, wall: float) -> None:
        """Remember a moment."""
        self._marks.append(Mark(time=wall, kind=kind, text=text))

    def _note_failure(self, event: JobChanged, wall: float) -> None:
        error = event.error
        dropped = event.kind == "job_drop"
        name = event.state.value if dropped else type_of(error)
        self._count(name, wall)
        self._errors.append(
            Failure(
                time=wall,
                job=id_of(event.job_id),
                worker=event.worker,
                attempts=event.attempts,
                type=name,
                place=place_of(error),
                text=self._words.of_error(error),
            )
        )

    def _note_crash(self, event: WorkerChanged, wall: float) -> None:
        error = event.error
        self._crashes.append(
            RestartCause(
                time=wall,
                worker=event.worker,
                type=type_of(error),
                place=place_of(error),
                text=self._words.of_error(error),
            )
        )

    def _count(self, name: str, wall: float) -> None:
        if name not in self._counts and len(self._counts) >= _TYPES_KEPT:
            name = _OTHERS
        self._counts[name] += 1
        self._seen[name] = wall

    def failures(self) -> tuple[FailureCount, ...]:
        """Return how often jobs failed by type, the most frequent first."""
        named = [item for item in self._counts.most_common() if item[0] != _OTHERS]
        shown, rest = named[:_TYPES], named[_TYPES:]
        rest += [(_OTHERS, self._counts[_OTHERS])] if _OTHERS in self._counts else []
        counts = [
            FailureCount(type=name, count=count, last=self._seen[name])
            for name, count in shown
        ]
        if rest:
            total = sum(count for _, count in rest)
            last = max(self._seen[name] for name, _ in rest)
            counts.append(FailureCount(type=_OTHERS, count=total, last=last))
        return tuple(counts)

    def errors(self) -> tuple[Failure, ...]:
        """Return the last failures, the newest first."""
        return tuple(reversed(self._errors))

    def crashes(self) -> tuple[RestartCause, ...]:
        """Return the last crashes of workers, the newest first."""
        return tuple(reversed(self._crashes))

    def marks(self, wall: float) -> tuple[Mark, ...]:
        """Return the marks of the last 15 minutes, the newest first."""
        since = wall - _MARKS_FOR
        # A copy at once: marks may be set by another thread.
        marks = tuple(self._marks)
        return tuple(mark for mark in reversed(marks) if mark.time >= since)
