"""The timer of a pool: alarms in order, taken back, set while it rings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import trio
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from trio_pool._timer import Timer


def note(seen: list[Any], what: Any) -> Callable[[], object]:
    return lambda: seen.append(what)


def test_alarms_ring_in_the_order_of_their_times() -> None:
    timer = Timer()
    seen: list[float] = []
    for when in (1.5, 0.25, 1.0, 0.5, 2.0):
        timer.at(when, note(seen, when))
    timer.ring(1.5)
    assert seen == [0.25, 0.5, 1.0, 1.5]
    timer.ring(1.5)
    assert len(seen) == 4
    timer.ring(math.inf)
    assert seen[4:] == [2.0]


def test_alarms_of_one_time_ring_in_the_order_in_which_they_were_set() -> None:
    timer = Timer()
    seen: list[int] = []
    for number in range(20):
        timer.at(1.5, note(seen, number))
    timer.ring(1.5)
    assert seen == list(range(20))


def test_an_alarm_rings_once_and_not_too_early() -> None:
    timer = Timer()
    seen: list[str] = []
    timer.at(1.5, note(seen, "rung"))
    timer.ring(1.25)
    assert seen == []
    for _ in range(3):
        timer.ring(1.5)
    assert seen == ["rung"]


def test_what_is_called_gets_nothing_and_returns_anything() -> None:
    timer = Timer()
    timer.at(0.25, lambda: 5)
    timer.ring(0.25)


def test_an_alarm_that_was_taken_back_does_not_ring() -> None:
    timer = Timer()
    seen: list[str] = []
    first = timer.at(0.25, note(seen, "first"))
    timer.at(0.5, note(seen, "second"))
    last = timer.at(1.5, note(seen, "last"))
    timer.take_back(first)
    timer.take_back(last)
    timer.take_back(last)
    assert timer.arm() == 0.5
    timer.ring(math.inf)
    assert seen == ["second"]
    assert timer.arm() == math.inf


def test_taking_back_what_has_rung_changes_nothing() -> None:
    timer = Timer()
    seen: list[str] = []
    rung = timer.at(0.25, note(seen, "rung"))
    timer.ring(0.25)
    timer.at(0.5, note(seen, "next"))
    timer.take_back(rung)
    assert timer.arm() == 0.5
    timer.ring(0.5)
    assert seen == ["rung", "next"]


def test_an_alarm_can_take_back_another_that_is_due_too() -> None:
    timer = Timer()
    seen: list[str] = []
    timer.at(0.25, lambda: timer.take_back(victim))
    victim = timer.at(0.25, note(seen, "victim"))
    timer.at(0.5, note(seen, "other"))
    timer.ring(1.5)
    assert seen == ["other"]
    assert timer.arm() == math.inf


def test_an_alarm_that_takes_itself_back_has_rung_all_the_same() -> None:
    timer = Timer()
    seen: list[str] = []

    def ring() -> None:
        timer.take_back(alarm)
        seen.append("rung")

    alarm = timer.at(0.25, ring)
    timer.at(0.5, note(seen, "next"))
    timer.ring(0.5)
    assert seen == ["rung", "next"]


def test_alarms_that_are_set_as_it_rings_wait_for_the_next_time() -> None:
    """Or one that sets itself again for a time that has passed would never end."""
    timer = Timer()
    rings: list[float] = []

    def again() -> None:
        rings.append(1.0)
        timer.at(0.5, again)

    timer.at(0.25, again)
    for times in range(1, 5):
        timer.ring(1.0)
        assert len(rings) == times
        assert timer.arm() == 0.5


def test_it_is_armed_for_the_first_alarm_that_was_not_taken_back() -> None:
    timer = Timer()
    assert timer.armed == timer.arm() == math.inf
    late = timer.at(1.5, int)
    assert timer.armed == timer.arm() == 1.5
    early = timer.at(0.5, int)
    assert timer.armed == timer.arm() == 0.5
    timer.at(1.0, int)
    assert timer.armed == 0.5
    timer.take_back(early)
    # Waking in vain is cheaper than telling the sleeper each time.
    assert timer.armed == 0.5
    assert timer.arm() == timer.armed == 1.0
    timer.ring(1.0)
    assert timer.arm() == 1.5
    timer.take_back(late)
    assert timer.arm() == timer.armed == math.inf


def test_an_earlier_alarm_wakes_the_sleeper_earlier_and_a_later_one_does_not() -> None:
    timer = Timer()
    timer.at(1.5, int)
    timer.sleeper = trio.CancelScope(deadline=timer.arm())
    timer.at(2.0, int)
    timer.at(1.5, int)
    assert timer.sleeper.deadline == 1.5
    timer.at(0.25, int)
    assert timer.sleeper.deadline == timer.armed == 0.25
    timer.at(0.5, int)
    assert timer.sleeper.deadline == 0.25


def test_without_a_sleeper_an_alarm_is_set_all_the_same() -> None:
    timer = Timer()
    timer.sleeper = trio.CancelScope()
    timer.sleeper = None
    timer.at(0.25, int)
    assert timer.armed == 0.25


def heap(timer: Timer) -> list[Any]:
    """Return the entries that it keeps, for the one promise about their number."""
    return timer._heap  # noqa: SLF001


def test_the_heap_stays_small_where_most_alarms_are_taken_back() -> None:
    """As those of timeouts are: nearly every job ends before its time."""
    timer = Timer()
    seen: list[str] = []
    timer.at(5.0, note(seen, "kept"))
    most = 0
    for number in range(5_000):
        timer.take_back(timer.at(1_000.0 + number, note(seen, "never")))
        most = max(most, len(heap(timer)))
    assert most < 200
    timer.ring(math.inf)
    assert seen == ["kept"]


def test_alarms_that_were_taken_back_stay_until_they_are_most_of_it() -> None:
    """To look for them at each would cost the more the more alarms there are."""
    timer = Timer()
    alarms = [timer.at(1.5, int) for _ in range(2_000)]
    for alarm in alarms[:1_000]:
        timer.take_back(alarm)
        timer.take_back(alarm)
    assert len(heap(timer)) == 2_000
    for alarm in alarms[1_000:1_200]:
        timer.take_back(alarm)
    kept = len(heap(timer))
    assert kept < 1_000
    # And from then on those that are still here count.
    timer.take_back(alarms[1_200])
    assert len(heap(timer)) == kept


def leave_by_the_front(timer: Timer) -> None:
    timer.take_back(timer.at(0.25, int))
    timer.arm()


def leave_as_it_rings(timer: Timer) -> None:
    timer.at(0.25, lambda: timer.take_back(victim))
    victim = timer.at(0.25, int)
    timer.ring(0.25)


def ring_and_be_taken_back(timer: Timer) -> None:
    alarm = timer.at(0.25, int)
    timer.ring(0.25)
    timer.take_back(alarm)


@pytest.mark.parametrize(
    "leave", [leave_by_the_front, leave_as_it_rings, ring_and_be_taken_back]
)
def test_alarms_that_have_left_are_not_counted_as_here(
    leave: Callable[[Timer], None],
) -> None:
    timer = Timer()
    alarms = [timer.at(1.5, int) for _ in range(300)]
    for _ in range(500):
        leave(timer)
    timer.take_back(alarms[0])
    assert len(heap(timer)) == 300
    for alarm in alarms:
        timer.take_back(alarm)
    assert len(heap(timer)) < 200


def test_many_alarms_that_are_taken_back_together_leave_the_others_in_order() -> None:
    timer = Timer()
    seen: list[int] = []
    alarms = [timer.at(number % 100, note(seen, number)) for number in range(1_000)]
    for number, alarm in enumerate(alarms):
        if number % 10:
            timer.take_back(alarm)
    assert len(heap(timer)) < 200
    assert timer.arm() == 0
    timer.ring(50)
    left = range(0, 1_000, 10)
    order = sorted(left, key=lambda number: (number % 100, number))
    assert seen == [number for number in order if number % 100 <= 50]
    timer.ring(100)
    assert seen == order


def test_a_sweep_while_it_rings_loses_no_alarm() -> None:
    """An alarm that ends a hundred others takes back enough for a sweep."""
    timer = Timer()
    seen: list[str] = []
    others = [timer.at(0.5, note(seen, "never")) for _ in range(200)]

    def end_them() -> None:
        for alarm in others:
            timer.take_back(alarm)
        timer.at(1.0, note(seen, "set meanwhile"))

    timer.at(0.25, end_them)
    timer.at(0.25, note(seen, "due too"))
    timer.at(1.5, note(seen, "later"))
    timer.ring(0.25)
    assert seen == ["due too"]
    assert timer.arm() == 1.0
    timer.ring(1.5)
    assert seen == ["due too", "set meanwhile", "later"]


def test_of_those_that_are_due_too_a_sweep_loses_none_either() -> None:
    timer = Timer()
    seen: list[str] = []
    others: list[Any] = []

    def end_them() -> None:
        for alarm in others:
            timer.take_back(alarm)

    timer.at(0.25, end_them)
    others += [timer.at(0.5, note(seen, "never")) for _ in range(200)]
    timer.at(0.75, note(seen, "due too"))
    timer.at(1.5, note(seen, "later"))
    timer.ring(1.0)
    assert seen == ["due too"]
    assert timer.arm() == 1.5
    # What it counts of them is right again: it still sweeps, and not too often.
    for _ in range(1_000):
        timer.take_back(timer.at(2.0, note(seen, "never")))
        assert len(heap(timer)) < 200
    timer.ring(2.0)
    assert seen == ["due too", "later"]


class TimerBesideAList(RuleBasedStateMachine):
    """Beside a list of alarms, which is sorted at each look."""

    @initialize()
    def open(self) -> None:
        self.timer = Timer()
        self.now = 0.0
        self.numbers = itertools.count()
        self.alarms: list[tuple[float, int, Any]] = []
        self.over: list[Any] = []
        self.seen: list[int] = []

    @rule(quarters=st.integers(-4, 20), times=st.sampled_from([1, 1, 1, 100]))
    def set_some(self, quarters: int, times: int) -> None:
        for _ in range(times):
            self.set_one(self.now + quarters / 4)

    def set_one(self, when: float) -> None:
        number = next(self.numbers)
        alarm = self.timer.at(when, note(self.seen, number))
        self.alarms.append((when, number, alarm))

    @precondition(lambda self: self.alarms)
    @rule(at=st.integers(0, 200), times=st.sampled_from([1, 1, 90]))
    def take_some_back(self, at: int, times: int) -> None:
        for _ in range(min(times, len(self.alarms))):
            _, _, alarm = self.alarms.pop(at % len(self.alarms))
            self.timer.take_back(alarm)
            self.over.append(alarm)

    @precondition(lambda self: self.over)
    @rule(at=st.integers(0, 200))
    def take_back_what_is_over(self, at: int) -> None:
        self.timer.take_back(self.over[at % len(self.over)])

    @rule(quarters=st.integers(0, 8), answer=st.booleans())
    def ring(self, quarters: int, answer: bool) -> None:
        self.now += quarters / 4
        if answer:
            # As a job that fails and is tried again does.
            due = self.now
            self.alarms.append((due, next(self.numbers), None))
            number = self.alarms[-1][1]
            alarm = self.timer.at(due, lambda: (note(self.seen, number)(), again()))
            self.alarms[-1] = (due, number, alarm)

            def again() -> None:
                self.set_one(due)

        rung = sorted(entry[:2] for entry in self.alarms if entry[0] <= self.now)
        before = [entry for entry in self.alarms if entry[0] <= self.now]
        self.seen.clear()
        self.timer.ring(self.now)
        assert self.seen == [number for _, number in rung]
        for entry in before:
            self.alarms.remove(entry)
            self.over.append(entry[2])

    @invariant()
    def the_sleeper_never_wakes_too_late(self) -> None:
        first = min((when for when, _, _ in self.alarms), default=math.inf)
        assert self.timer.armed <= first
        assert self.timer.arm() == self.timer.armed == first

    @invariant()
    def what_is_kept_is_in_proportion_to_what_is_set(self) -> None:
        assert len(heap(self.timer)) <= 2 * len(self.alarms) + 200


TestTimer = TimerBesideAList.TestCase
