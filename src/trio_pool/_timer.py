"""The one timer of a pool: a heap of alarms, rung by whoever sleeps for it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any, TypeAlias, final

if TYPE_CHECKING:
    import trio

# When, a number that keeps equals in order, and what to call; None if it was
# taken back. A list, so that taking back costs no search.
Alarm: TypeAlias = "list[Any]"

_SLACK = 64


@final
class Timer:
    """Alarms by time; as many as there are jobs, and still one sleeper.

    Alarms that were taken back stay in the heap until they are most of it.
    """

    __slots__ = ("_heap", "_order", "_taken_back", "armed", "sleeper")

    def __init__(self) -> None:
        self._heap: list[Alarm] = []
        self._order = itertools.count()
        self._taken_back = 0
        self.armed = math.inf
        """When the sleeper wakes."""
        self.sleeper: trio.CancelScope | None = None
        """What the sleeper sleeps in; its deadline follows the first alarm."""

    def at(self, when: float, call: Callable[[], object]) -> Alarm:
        """Have ``call`` called at ``when``; the time may have passed already."""
        alarm: Alarm = [when, next(self._order), call]
        heappush(self._heap, alarm)
        if when < self.armed:
            self.armed = when
            if self.sleeper is not None:
                self.sleeper.deadline = when
        return alarm

    def take_back(self, alarm: Alarm) -> None:
        """Forget an alarm; nothing happens if it has rung."""
        if alarm[2] is None:
            return
        alarm[2] = None
        self._taken_back += 1
        if self._taken_back > _SLACK + len(self._heap) // 2:
            kept = [alarm for alarm in self._heap if alarm[2] is not None]
            # Not all of them need be here: some may be about to ring.
            self._taken_back -= len(self._heap) - len(kept)
            self._heap = kept
            heapify(self._heap)

    def arm(self) -> float:
        """Return when the sleeper has to wake, and take it as said."""
        heap = self._heap
        while heap and heap[0][2] is None:
            heappop(heap)
            self._taken_back -= 1
        self.armed = heap[0][0] if heap else math.inf
        return self.armed

    def ring(self, now: float) -> None:
        """Call what is due; alarms that are set meanwhile wait for the next time."""
        heap = self._heap
        due: list[Alarm] = []
        while heap and heap[0][0] <= now:
            due.append(heappop(heap))
        for alarm in due:
            call, alarm[2] = alarm[2], None
            if call is None:
                self._taken_back -= 1
            else:
                call()
