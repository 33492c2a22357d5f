"""Virtual time: a clock that jumps, and on which a simulation's events come."""

import math
from collections.abc import Awaitable, Callable
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Any, final

import trio
from trio.lowlevel import Abort, current_task

from .._trio import WAKE, runner_of, sleeper

_SLACK = 64


@final
class VirtualClock(trio.abc.Clock):
    """Jumps to the next event when no task can run.

    Events of the simulation are kept here and not as deadlines of trio: that
    is several times as fast as a cancel scope for each job, and events of the
    same time come in an order that is known: deadlines, then jobs that are
    through, as they were started, then arrivals.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.arrival = math.inf
        """When the next job arrives."""
        self.give_in: Callable[[], bool] = bool
        """Gives it in; says whether that may have made a task ready to run."""
        self.get_stuck: Callable[[], bool] = bool
        """Called when nothing will ever happen any more; says whether it does now."""
        self._events: list[list[Any]] = []
        self._order = count()
        self._taken_back = 0
        """Events that have no task any more."""

    def start_clock(self) -> None:
        """Begin at 0."""

    def current_time(self) -> float:
        return self.now

    def begin(self) -> None:
        """Learn how tasks of this run fall asleep and are woken."""
        self._sleep = sleeper()
        self._reschedule = runner_of(current_task()).reschedule

    # Trio asks this when no task can run, before it waits: the time to jump.
    def deadline_to_sleep_time(self, deadline: float) -> float:
        events = self._events
        while True:
            when = events[0][0] if events else math.inf
            if deadline <= when and deadline <= self.arrival:
                break
            if self.arrival < when:
                # In no task at all, as each turn of trio's loop costs as much as
                # all the rest that is done for a job.
                self.now = self.arrival
                if self.give_in():
                    return 0.0
                continue
            task = heappop(events)[2]
            if task is not None:
                self.now = when
                self._reschedule(task, WAKE)
                return 0.0
            self._taken_back -= 1
        if deadline < math.inf:
            self.now = max(self.now, deadline)
        elif not self.get_stuck():
            return math.inf
        return 0.0

    def sleep_until(self, when: float) -> Awaitable[object]:
        """Sleep until a time of this clock; always gives way to other tasks."""
        event: list[Any] = [when, next(self._order), current_task()]
        heappush(self._events, event)

        def abort(_: object) -> Abort:
            event[2] = None
            self._taken_back += 1
            self._forget_taken_back()
            return Abort.SUCCEEDED

        return self._sleep(abort)

    def _forget_taken_back(self) -> None:
        """Drop events of cancelled tasks, once they are most of what is kept.

        They may lie so far ahead that they would never be met.
        """
        events = self._events
        if self._taken_back > _SLACK + len(events) // 2:
            events[:] = [event for event in events if event[2] is not None]
            heapify(events)
            self._taken_back = 0

    async def sleep_till_woken(self) -> None:
        """Sleep until `wake` is called."""
        self._sleeper = current_task()
        await self._sleep(lambda _: Abort.SUCCEEDED)

    def wake(self) -> None:
        """Wake who sleeps in `sleep_till_woken`."""
        self._reschedule(self._sleeper, WAKE)
