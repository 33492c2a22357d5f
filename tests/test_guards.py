"""The guards: how many may start in a time, and whether any may start now."""

from __future__ import annotations

import inspect
import math
import re
from fractions import Fraction
from typing import Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from trio_pool import CircuitBreaker, CircuitStatistics, Rate

NOW = -math.inf
"""What `Rate.take` says when a token was taken."""


# Rate.


def test_a_rate_has_readable_options() -> None:
    rate = Rate(10)
    assert (rate.jobs, rate.per, rate.burst) == (10, 1.0, 1)
    assert repr(Rate(3, per=60.0, burst=2)) == "Rate(jobs=3, per=60.0, burst=2)"


def test_guards_are_told_apart_by_identity() -> None:
    assert Rate(1) != Rate(1)
    assert CircuitBreaker() != CircuitBreaker()
    assert len({Rate(1), Rate(1), CircuitBreaker(), CircuitBreaker()}) == 4


@pytest.mark.parametrize("guard", [Rate(1), CircuitBreaker()])
def test_the_options_of_a_guard_are_frozen(guard: Any) -> None:
    for option in ("jobs", "failures", "something"):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(guard, option, 3)


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("jobs", 0, ValueError),
        ("jobs", -1.5, ValueError),
        ("jobs", math.inf, ValueError),
        ("jobs", math.nan, ValueError),
        ("jobs", 10**400, ValueError),
        ("jobs", "3", TypeError),
        ("jobs", True, TypeError),
        ("per", 0, ValueError),
        ("per", -1, ValueError),
        ("per", math.inf, ValueError),
        ("per", math.nan, ValueError),
        ("per", None, TypeError),
        ("burst", 0, ValueError),
        ("burst", 1.5, TypeError),
        ("burst", True, TypeError),
    ],
)
def test_a_bad_value_of_a_rate_is_named(
    option: str, value: object, kind: type[Exception]
) -> None:
    options: dict[str, Any] = {"jobs": 1, option: value}
    with pytest.raises(kind) as caught:
        Rate(**options)
    assert str(caught.value).startswith(f"{option} must be ")
    assert str(caught.value).endswith(f"got {value!r}")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Rate, ["jobs", "per", "burst"]),
        (CircuitBreaker, ["failures", "window", "open_for", "probes", "on"]),
    ],
)
def test_what_a_guard_remembers_is_no_option_and_is_not_shown(
    kind: Any, options: list[str]
) -> None:
    assert list(inspect.signature(kind).parameters) == options
    given = {} if kind is CircuitBreaker else {"jobs": 1}
    shown = re.findall(r"(\w+)=", repr(kind(**given)))
    assert shown == options


def test_a_rate_of_less_than_one_job_in_all_time_is_refused() -> None:
    with pytest.raises(ValueError, match=r"per must be .* finite, got 1e\+300"):
        Rate(1e-300, per=1e300)


def test_a_rate_spaces_its_tokens() -> None:
    rate = Rate(4)
    assert rate.take(10.0) == NOW
    assert rate.take(10.0) == 10.25
    assert rate.take(10.125) == 10.25
    assert rate.take(10.25) == NOW
    assert rate.take(10.25) == 10.5


def test_a_burst_goes_at_once_and_is_earned_again_slowly() -> None:
    rate = Rate(4, burst=3)
    assert [rate.take(0.0) for _ in range(4)] == [NOW, NOW, NOW, 0.25]
    assert rate.take(0.25) == NOW
    assert rate.take(0.25) == 0.5
    assert [rate.take(0.75) for _ in range(3)] == [NOW, NOW, 1.0]


def test_a_long_idle_time_earns_no_more_than_the_burst() -> None:
    rate = Rate(100, burst=5)
    for now in (0.0, 1e6, 1e9):
        assert [rate.take(now) == NOW for _ in range(7)] == [True] * 5 + [False] * 2


def test_a_token_given_back_is_taken_by_the_next() -> None:
    rate = Rate(1)
    assert rate.take(5.0) == NOW
    rate.give_back()
    assert rate.take(5.0) == NOW
    assert rate.take(5.0) == 6.0
    assert rate.take(6.0) == NOW
    rate.give_back()
    assert rate.take(6.0) == NOW
    assert rate.take(6.0) == 7.0


def test_giving_back_more_than_was_taken_gives_no_credit() -> None:
    rate = Rate(1, burst=2)
    rate.give_back()
    assert rate.take(0.0) == NOW
    rate.give_back()
    rate.give_back()
    assert [rate.take(0.0) for _ in range(3)] == [NOW, NOW, 1.0]


def test_a_rate_finer_than_the_clock_is_kept_on_a_clock_that_stands_still() -> None:
    rate = Rate(1e30, burst=3)
    now = 1e6
    for _ in range(5):
        assert [rate.take(now) for _ in range(3)] == [NOW] * 3
        again = rate.take(now)
        assert again == rate.take(now) > now
        now = again


def test_a_rate_begins_anew_in_another_run_only() -> None:
    rate, run = Rate(1), object()
    rate.begin(run)
    assert rate.take(1e6) == NOW
    rate.begin(run)
    assert rate.take(1e6) == 1e6 + 1
    rate.begin(object())
    assert rate.take(0.0) == NOW
    assert rate.take(0.0) == 1.0


def test_a_shared_rate_serves_two_runs_one_after_the_other() -> None:
    rate = Rate(1)

    async def main() -> list[float]:
        rate.begin(trio.lowlevel.current_trio_token())
        return [rate.take(trio.current_time()) for _ in range(2)]

    for _ in range(2):
        first, second = trio.run(main, clock=trio.testing.MockClock())
        assert (first, second) == (NOW, 1.0)


@given(
    jobs=st.floats(1e-6, 1e12),
    per=st.floats(1e-6, 1e6),
    burst=st.integers(1, 20),
    start=st.floats(-1e6, 1e9),
    pauses=st.lists(st.floats(0, 3), max_size=30),
)
def test_the_time_a_rate_names_is_the_earliest_whatever_is_rounded(
    jobs: float, per: float, burst: int, start: float, pauses: list[float]
) -> None:
    rate = Rate(jobs, per, burst)
    now, taken = start, list[float]()
    unit = Fraction(0)
    for pause in pauses:
        now += pause * per / jobs
        while rate.take(now) == NOW:
            taken.append(now)
        again = rate.take(now)
        assert again > now
        # Times are added to the start, which may be far greater than what it makes.
        unit = Fraction(math.ulp(max(abs(start), abs(again))))
        assert (
            Fraction(again) <= Fraction(now) + Fraction(per) / Fraction(jobs) + 3 * unit
        )
        now = again
        assert rate.take(now) == NOW
        taken.append(now)
    for first, begin in enumerate(taken):
        for last in range(first, len(taken)):
            seconds = Fraction(taken[last]) - Fraction(begin)
            allowed = burst + seconds * Fraction(jobs) / Fraction(per)
            rounding = 4 * unit * Fraction(jobs) / Fraction(per)
            assert last - first + 1 <= allowed + rounding


class Tokens(RuleBasedStateMachine):
    """A rate beside a bucket of tokens that is filled drop by drop, exactly."""

    @initialize(
        jobs=st.sampled_from([0.5, 1, 2, 4, 16.0]),
        per=st.sampled_from([0.25, 1.0, 2]),
        burst=st.integers(1, 4),
        start=st.sampled_from([0.0, 0.125, 4096.0]),
    )
    def open(self, jobs: float, per: float, burst: int, start: float) -> None:
        self.rate = Rate(jobs, per, burst)
        self.speed = Fraction(jobs) / Fraction(per)
        self.burst = burst
        self.run = object()
        self.restart(start)

    def restart(self, start: float) -> None:
        self.rate.begin(self.run)
        self.now = start
        self.level = Fraction(self.burst)
        self.used: list[float] = []
        self.just_took = False

    @rule(eighths=st.integers(0, 40))
    def pass_time(self, eighths: int) -> None:
        self.advance(self.now + eighths / 8)

    def advance(self, now: float) -> None:
        gained = Fraction(now - self.now) * self.speed
        self.level = min(Fraction(self.burst), self.level + gained)
        self.now = now
        self.just_took = False

    @rule()
    def take(self) -> None:
        again = self.rate.take(self.now)
        self.just_took = self.level >= 1
        if self.just_took:
            assert again == NOW
            self.level -= 1
            self.used.append(self.now)
        else:
            assert again == self.now + (1 - self.level) / self.speed

    @rule()
    def wait_for_one(self) -> None:
        again = self.rate.take(self.now)
        if again == NOW:
            self.rate.give_back()
        else:
            self.advance(again)
        assert self.level >= 1
        self.take()

    @precondition(lambda self: self.just_took)
    @rule()
    def give_back(self) -> None:
        self.rate.give_back()
        self.level += 1
        self.used.pop()
        self.just_took = False

    @rule(same=st.booleans())
    def begin(self, same: bool) -> None:
        if same:
            self.rate.begin(self.run)
        else:
            self.run = object()
            self.restart(0.0)

    @invariant()
    def no_interval_has_too_many(self) -> None:
        used = self.used
        for first, begin in enumerate(used):
            for last in range(first, len(used)):
                seconds = Fraction(used[last] - begin)
                assert last - first + 1 <= self.burst + seconds * self.speed


TestTokens = Tokens.TestCase


# CircuitBreaker.


def opened(at: float = 0.0, **options: Any) -> CircuitBreaker:
    """Return a breaker that one failure has opened, for 8 seconds."""
    options = {"failures": 1, "open_for": 8.0, **options}
    breaker = CircuitBreaker(**options)
    fail(breaker, at)
    return breaker


def admit(breaker: CircuitBreaker, now: float) -> int:
    permit = breaker.admit(now)
    assert permit is not None
    return permit


def fail(breaker: CircuitBreaker, now: float, times: int = 1) -> None:
    for _ in range(times):
        breaker.settle(admit(breaker, now), OSError(), now)


def succeed(breaker: CircuitBreaker, now: float) -> None:
    breaker.settle(admit(breaker, now), None, now)


def test_a_breaker_has_readable_options() -> None:
    breaker = CircuitBreaker()
    assert (breaker.failures, breaker.window, breaker.open_for) == (5, 60.0, 30.0)
    assert (breaker.probes, breaker.on) == (1, (Exception,))
    assert breaker.state == "closed"
    assert CircuitBreaker(on=OSError).on == (OSError,)
    either: Any = [OSError, KeyError]
    assert CircuitBreaker(on=either).on == (OSError, KeyError)


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("failures", 0, ValueError),
        ("failures", 2.0, TypeError),
        ("failures", True, TypeError),
        ("window", 0, ValueError),
        ("window", -1.0, ValueError),
        ("window", math.nan, ValueError),
        ("window", "60", TypeError),
        ("open_for", 0, ValueError),
        ("open_for", -1.0, ValueError),
        ("open_for", None, TypeError),
        ("probes", 0, ValueError),
        ("probes", math.inf, TypeError),
        ("on", 3, TypeError),
        ("on", (3,), TypeError),
        ("on", (OSError, BaseException), TypeError),
    ],
)
def test_a_bad_value_of_a_breaker_is_named(
    option: str, value: object, kind: type[Exception]
) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(kind) as caught:
        CircuitBreaker(**options)
    assert str(caught.value).startswith(f"{option} must be ")
    assert str(caught.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("kind", [int, KeyboardInterrupt, BaseException])
def test_a_type_that_is_no_exception_is_refused(kind: Any) -> None:
    with pytest.raises(TypeError, match="on must be"):
        CircuitBreaker(on=kind)


def test_a_breaker_opens_at_the_last_failure_allowed() -> None:
    breaker = CircuitBreaker(failures=3, open_for=8.0)
    fail(breaker, 1.0, times=2)
    assert breaker.state == "closed"
    assert breaker.reopens_in(1.0) == 0.0
    fail(breaker, 1.5)
    assert breaker.state == "open"
    assert breaker.admit(1.5) is None
    assert breaker.admit(9.25) is None
    assert breaker.reopens_in(1.5) == 8.0
    assert breaker.reopens_in(9.25) == 0.25
    assert breaker.reopens_in(9.5) == 0.0
    assert breaker.admit(9.5) is not None


def test_successes_do_not_reset_the_count() -> None:
    breaker = CircuitBreaker(failures=2)
    fail(breaker, 0.0)
    for _ in range(100):
        succeed(breaker, 1.0)
    fail(breaker, 2.0)
    assert breaker.state == "open"


def test_a_failure_exactly_as_old_as_the_window_does_not_count() -> None:
    breaker = CircuitBreaker(failures=2, window=4.0)
    for now in (0.0, 4.0, 8.0, 12.5):
        fail(breaker, now)
        assert breaker.state == "closed"
    fail(breaker, 16.25)
    assert breaker.state == "open"


def test_each_failure_grows_old_for_itself() -> None:
    breaker = CircuitBreaker(failures=3, window=1.0)
    for now in (0.25, 1.0, 1.5, 2.25):
        fail(breaker, now)
        assert breaker.state == "closed"
    # By now that of 1.5 and that of 2.25 are the only ones, and here is the third.
    fail(breaker, 2.375)
    assert breaker.state == "open"


def test_in_an_infinite_window_no_failure_grows_old() -> None:
    breaker = CircuitBreaker(failures=2, window=math.inf)
    fail(breaker, 0.0)
    fail(breaker, 1e12)
    assert breaker.state == "open"


def test_a_breaker_may_stay_open_until_it_is_reset() -> None:
    breaker = opened(open_for=math.inf)
    assert breaker.reopens_in(1e12) == math.inf
    assert breaker.admit(1e12) is None
    breaker.reset()
    assert breaker.state == "closed"
    assert breaker.reopens_in(1e12) == 0.0
    assert breaker.admit(1e12) is not None


def test_what_counts_as_a_failure_is_the_users_choice() -> None:
    def is_odd(error: Exception) -> bool:
        return isinstance(error, ValueError) and error.args[0] % 2 == 1

    cases: list[tuple[Any, BaseException, bool]] = [
        ((Exception,), ValueError(1), True),
        ((Exception,), SystemExit(), False),
        (OSError, FileNotFoundError(), True),
        (OSError, ValueError(1), False),
        ((OSError, ValueError), ValueError(1), True),
        ((), ValueError(1), False),
        (is_odd, ValueError(1), True),
        (is_odd, ValueError(2), False),
        (is_odd, KeyboardInterrupt(), False),
    ]
    for on, error, counts in cases:
        breaker = CircuitBreaker(failures=1, on=on)
        breaker.settle(admit(breaker, 0.0), error, 0.0)
        assert breaker.state == ("open" if counts else "closed"), (on, error)


def test_another_error_of_a_probe_closes_the_circuit() -> None:
    breaker = opened(on=OSError)
    breaker.settle(admit(breaker, 8.0), KeyError(), 8.0)
    assert breaker.state == "closed"


def test_a_predicate_that_raises_is_logged_and_its_error_is_a_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(error: Exception) -> bool:
        raise KeyError(error)

    breaker = CircuitBreaker(failures=1, on=broken)
    fail(breaker, 0.0)
    assert breaker.state == "open"
    (record,) = caplog.records
    assert record.name == "trio_pool"
    assert "broken" in record.getMessage()


def test_a_predicate_may_reset_the_breaker() -> None:
    def forgive(error: Exception) -> bool:
        breaker.reset()
        return True

    breaker = CircuitBreaker(failures=1, on=forgive)
    fail(breaker, 0.0)
    assert breaker.state == "closed"
    assert breaker.statistics().failures == 0


def test_half_open_lets_exactly_the_probes_through_and_then_closes() -> None:
    breaker = opened(probes=3)
    permits = [breaker.admit(8.0) for _ in range(10)]
    assert [permit is not None for permit in permits] == [True] * 3 + [False] * 7
    for permit in permits[:3]:
        assert breaker.state == "half_open"
        assert breaker.admit(9.0) is None
        assert permit is not None
        breaker.settle(permit, None, 9.0)
    assert breaker.state == "closed"
    assert breaker.statistics().failures == 0


def test_probes_need_not_be_out_at_the_same_time() -> None:
    breaker = opened(probes=2)
    succeed(breaker, 8.0)
    assert breaker.state == "half_open"
    succeed(breaker, 9.0)
    assert breaker.state == "closed"


def test_the_first_probe_that_fails_opens_again_from_then() -> None:
    breaker = opened(probes=2)
    one, other = admit(breaker, 8.0), admit(breaker, 8.0)
    breaker.settle(one, OSError(), 10.0)
    assert breaker.state == "open"
    assert breaker.reopens_in(10.0) == 8.0
    # The other one is of the past, whatever becomes of it.
    breaker.settle(other, OSError(), 12.0)
    assert breaker.reopens_in(12.0) == 6.0
    assert breaker.statistics().opened == 2
    assert breaker.admit(17.5) is None
    assert breaker.admit(18.0) is not None


def test_successes_of_an_earlier_trial_do_not_count() -> None:
    breaker = opened(probes=2)
    succeed(breaker, 8.0)
    fail(breaker, 8.0)
    succeed(breaker, 16.0)
    assert breaker.state == "half_open"
    succeed(breaker, 16.0)
    assert breaker.state == "closed"


def test_a_stale_success_is_no_success_of_a_later_probe() -> None:
    breaker = opened(probes=2)
    one, other = admit(breaker, 8.0), admit(breaker, 8.0)
    breaker.settle(one, OSError(), 8.0)
    third, fourth = admit(breaker, 16.0), admit(breaker, 16.0)
    breaker.settle(other, None, 16.0)
    breaker.settle(third, None, 16.0)
    assert breaker.state == "half_open"
    breaker.settle(fourth, None, 16.0)
    assert breaker.state == "closed"


@pytest.mark.parametrize("give_back", ["give_back", "cancelled"])
async def test_a_probe_that_was_cancelled_gives_its_place_back(give_back: str) -> None:
    breaker = opened()
    permit = admit(breaker, 8.0)
    assert breaker.admit(8.0) is None
    if give_back == "give_back":
        breaker.give_back(permit)
    else:
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.lowlevel.checkpoint()
            except trio.Cancelled as error:
                breaker.settle(permit, error, 8.0)
                raise
    assert breaker.statistics().probing == 0
    permit = admit(breaker, 8.0)
    assert breaker.admit(8.0) is None
    breaker.settle(permit, None, 8.0)
    assert breaker.state == "closed"


def test_calls_from_before_it_opened_change_nothing_when_they_end_late() -> None:
    breaker = CircuitBreaker(failures=1, open_for=8.0)
    failing, good, cancelled, last = (admit(breaker, 0.0) for _ in range(4))
    fail(breaker, 0.0)
    breaker.settle(failing, OSError(), 4.0)
    breaker.settle(good, None, 4.0)
    breaker.give_back(cancelled)
    assert breaker.reopens_in(4.0) == 4.0
    probe = admit(breaker, 8.0)
    for permit in (failing, good):
        breaker.settle(permit, OSError(), 8.0)
        breaker.settle(permit, None, 8.0)
        breaker.give_back(permit)
    assert breaker.statistics().probing == 1
    assert breaker.admit(8.0) is None
    breaker.settle(probe, None, 8.0)
    breaker.settle(last, OSError(), 8.0)
    assert breaker.state == "closed"
    assert breaker.statistics().failures == 0


def test_probes_that_are_out_at_a_reset_change_nothing() -> None:
    breaker = opened(probes=2)
    one, other = admit(breaker, 8.0), admit(breaker, 8.0)
    breaker.reset()
    assert breaker.state == "closed"
    breaker.settle(one, OSError(), 8.0)
    breaker.give_back(other)
    assert breaker.state == "closed"
    assert breaker.statistics().probing == 0
    fail(breaker, 8.0)
    assert breaker.state == "open"
    assert breaker.reopens_in(8.0) == 8.0


def test_a_job_that_waited_may_start_only_under_a_permit_of_the_present() -> None:
    breaker = CircuitBreaker(failures=1, open_for=8.0)
    waiting = admit(breaker, 0.0)
    assert breaker.allows(waiting, 0.0)
    fail(breaker, 0.0)
    assert not breaker.allows(waiting, 0.0)
    # The time is over, but it holds none of the places for probes.
    assert not breaker.allows(waiting, 8.0)
    probe = admit(breaker, 8.0)
    assert not breaker.allows(waiting, 8.0)
    assert breaker.allows(probe, 8.0)
    breaker.settle(probe, None, 8.0)
    assert breaker.allows(waiting, 8.0)
    assert breaker.statistics().refused == 3


def test_a_job_that_waited_until_it_closed_counts_from_its_start() -> None:
    breaker = opened()
    waiting = 1
    probe = admit(breaker, 8.0)
    assert breaker.renew(probe) == probe
    breaker.settle(probe, None, 8.0)
    assert breaker.allows(waiting, 9.0)
    breaker.settle(breaker.renew(waiting), OSError(), 9.0)
    assert breaker.state == "open"


def test_a_retry_is_admitted_like_a_new_call() -> None:
    breaker = CircuitBreaker(failures=2, open_for=8.0)
    permit = admit(breaker, 0.0)
    breaker.settle(permit, OSError(), 0.0)
    again = breaker.admit(0.25)
    assert again is not None
    breaker.settle(again, OSError(), 0.5)
    assert breaker.admit(1.0) is None
    probe = breaker.admit(8.5)
    assert probe is not None
    assert breaker.admit(8.5) is None
    breaker.settle(probe, None, 8.5)
    assert breaker.state == "closed"


def test_a_probe_that_succeeded_keeps_its_place_while_others_are_out() -> None:
    breaker = CircuitBreaker(failures=1, open_for=1.5, probes=2)
    fail(breaker, 0.0)
    succeed(breaker, 1.5)
    assert breaker.reopens_in(1.5) == 0.0
    admit(breaker, 1.5)
    assert breaker.reopens_in(1.5) == 1.5
    assert breaker.admit(1.5) is None


def test_nobody_is_told_to_come_at_once_while_all_places_are_taken() -> None:
    breaker = opened()
    permit = admit(breaker, 8.0)
    assert breaker.reopens_in(8.0) == 8.0
    breaker.give_back(permit)
    assert breaker.reopens_in(8.0) == 0.0


@given(start=st.floats(0, 1e9), open_for=st.floats(1e-9, 1e9), part=st.floats(0, 1))
def test_who_sleeps_as_long_as_it_says_is_admitted(
    start: float, open_for: float, part: float
) -> None:
    breaker = opened(start, open_for=open_for)
    now = start + part * open_for
    assert breaker.admit(now + breaker.reopens_in(now)) is not None


def test_a_rounded_wait_is_rounded_up() -> None:
    # Half a second short of an odd number that large, the difference and the
    # sum would both be rounded to the even number below.
    breaker = opened(0.0, open_for=2.0**52 + 1)
    now = 0.5
    assert breaker.admit(now + breaker.reopens_in(now)) is not None


def test_statistics_say_what_happened() -> None:
    breaker = CircuitBreaker(failures=2, open_for=8.0, probes=2)
    assert breaker.statistics() == CircuitStatistics(
        state="closed", failures=0, refused=0, opened=0, probing=0
    )
    fail(breaker, 0.0)
    assert breaker.statistics().failures == 1
    fail(breaker, 0.0)
    assert breaker.admit(1.0) is None
    admit(breaker, 8.0)
    half_open = CircuitStatistics(
        state="half_open", failures=0, refused=1, opened=1, probing=1
    )
    assert breaker.statistics() == half_open
    breaker.reset()
    assert breaker.statistics() == attrs.evolve(half_open, state="closed", probing=0)


async def test_statistics_count_the_failures_within_the_window(
    autojump_clock: trio.testing.MockClock,
) -> None:
    breaker = CircuitBreaker(failures=5, window=2.0)
    breaker.begin(trio.lowlevel.current_trio_token())
    for _ in range(3):
        await trio.sleep(0.75)
        fail(breaker, trio.current_time())
    assert breaker.statistics().failures == 3
    await trio.sleep(0.5)
    # That of 0.75 is exactly as old as the window.
    assert breaker.statistics().failures == 2
    await trio.sleep(1.5)
    assert breaker.statistics().failures == 0


async def test_what_is_read_in_a_run_is_of_its_present_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    breaker = CircuitBreaker(failures=2, window=4.0, open_for=8.0)
    breaker.begin(trio.lowlevel.current_trio_token())
    fail(breaker, trio.current_time())
    assert breaker.statistics().failures == 1
    await trio.sleep(4.0)
    assert breaker.statistics().failures == 0
    fail(breaker, trio.current_time(), times=2)
    await trio.sleep(7.75)
    assert breaker.state == "open"
    await trio.sleep(0.25)
    assert breaker.state == "half_open"
    assert breaker.statistics().state == "half_open"
    assert breaker.admit(trio.current_time()) is not None


def test_a_breaker_begins_closed_in_another_run_only() -> None:
    breaker = CircuitBreaker(failures=1, open_for=8.0)
    permits: list[int] = []

    async def main(seconds: float, known: str) -> None:
        # Until a pool opens in this run it shows what was known last, and does
        # not take the time of this run for that of another.
        await trio.sleep(seconds)
        assert breaker.state == known
        for _ in range(2):
            breaker.begin(trio.lowlevel.current_trio_token())
        assert breaker.state == "closed"
        for permit in permits:
            breaker.settle(permit, OSError(), trio.current_time())
        assert breaker.state == "closed"
        permits.append(admit(breaker, trio.current_time()))
        fail(breaker, trio.current_time())
        breaker.begin(trio.lowlevel.current_trio_token())
        assert breaker.state == "open"

    for seconds, known in ((1.0, "closed"), (16.0, "open"), (64.0, "open")):
        clock = trio.testing.MockClock(autojump_threshold=0)
        trio.run(main, seconds, known, clock=clock)
        assert breaker.state == "open"


@pytest.mark.parametrize("probes", [1, 3])
async def test_a_herd_in_half_open_is_no_more_than_the_probes(
    probes: int, autojump_clock: trio.testing.MockClock
) -> None:
    breaker = opened(trio.current_time(), probes=probes)
    await trio.sleep(8.0)
    out = most = through = refused = 0

    async def caller() -> None:
        nonlocal out, most, through, refused
        for _ in range(10):
            permit = breaker.admit(trio.current_time())
            if permit is None:
                refused += 1
                await trio.lowlevel.checkpoint()
                continue
            through += 1
            out += 1
            most = max(most, out)
            await trio.sleep(0.25)
            out -= 1
            breaker.settle(permit, OSError(), trio.current_time())

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(caller)
    assert (through, most, refused) == (probes, probes, 1_000 - probes)
    assert breaker.state == "open"


@attrs.define(eq=False)
class Asked:
    """A call in the model: its permit, and the time of the breaker it belongs to."""

    permit: int
    phase: object


class Circuit(RuleBasedStateMachine):
    """A breaker beside a model that keeps everything and prunes nothing."""

    @initialize(
        failures=st.integers(1, 3),
        window=st.sampled_from([1.0, 2.5, math.inf]),
        open_for=st.sampled_from([0.5, 2.0, math.inf]),
        probes=st.integers(1, 3),
    )
    def open(self, failures: int, window: float, open_for: float, probes: int) -> None:
        self.breaker = CircuitBreaker(failures, window, open_for, probes, on=OSError)
        self.run = object()
        self.breaker.begin(self.run)
        self.now = 0.0
        self.calls: list[Asked] = []
        self.refused = self.opened = 0
        self.enter("closed")

    def enter(self, state: str) -> None:
        # A new object for each phase: an old call is told by identity.
        self.state, self.phase = state, object()
        self.since = self.now
        self.failed: list[float] = []
        self.out: list[Asked] = []
        self.succeeded = 0
        self.opened += state == "open"

    @property
    def is_over(self) -> bool:
        return self.now - self.since >= self.breaker.open_for

    @property
    def has_place(self) -> bool:
        return len(self.out) + self.succeeded < self.breaker.probes

    @rule(eighths=st.integers(0, 20))
    def pass_time(self, eighths: int) -> None:
        self.now += eighths / 8

    @rule()
    def admit(self) -> None:
        permit = self.breaker.admit(self.now)
        if self.state == "open" and self.is_over:
            self.enter("half_open")
        if self.state == "open" or (self.state == "half_open" and not self.has_place):
            assert permit is None
            self.refused += 1
            return
        assert permit is not None
        call = Asked(permit, self.phase)
        self.calls.append(call)
        if self.state == "half_open":
            self.out.append(call)

    def some_call(self, data: st.DataObject) -> Asked:
        return data.draw(st.sampled_from(self.calls))

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        call = self.some_call(data)
        allowed = self.breaker.allows(call.permit, self.now)
        assert allowed == (self.state == "closed" or call in self.out)
        if allowed:
            call.permit, call.phase = self.breaker.renew(call.permit), self.phase
        else:
            self.refused += 1
            self.calls.remove(call)

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), error=st.sampled_from([None, OSError(), KeyError()]))
    def settle(self, data: st.DataObject, error: Exception | None) -> None:
        call = self.some_call(data)
        self.calls.remove(call)
        self.breaker.settle(call.permit, error, self.now)
        if call.phase is not self.phase:
            return
        if isinstance(error, OSError):
            self.failed.append(self.now)
            if self.state == "half_open" or self.recent >= self.breaker.failures:
                self.enter("open")
        elif self.state == "half_open":
            self.out.remove(call)
            self.succeeded += 1
            if self.succeeded == self.breaker.probes:
                self.enter("closed")

    @property
    def recent(self) -> int:
        return sum(self.now - time < self.breaker.window for time in self.failed)

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        call = self.some_call(data)
        self.calls.remove(call)
        self.breaker.give_back(call.permit)
        if call in self.out:
            self.out.remove(call)

    @rule()
    def reset(self) -> None:
        self.breaker.reset()
        self.enter("closed")

    @rule(same=st.booleans())
    def begin(self, same: bool) -> None:
        if not same:
            self.run = object()
            self.now = 0.0
            self.enter("closed")
        self.breaker.begin(self.run)

    @invariant()
    def the_breaker_says_what_the_model_says(self) -> None:
        breaker, statistics = self.breaker, self.breaker.statistics()
        assert breaker.state == statistics.state == self.state
        assert statistics.probing == len(self.out) <= breaker.probes
        assert (statistics.refused, statistics.opened) == (self.refused, self.opened)
        assert statistics.failures <= len(self.failed)
        assert statistics.failures < breaker.failures

    @invariant()
    def it_says_when_a_call_has_a_chance(self) -> None:
        wait = self.breaker.reopens_in(self.now)
        if self.state == "open":
            left = self.since + self.breaker.open_for - self.now
            assert wait == max(0.0, left)
        elif self.state == "half_open" and not self.has_place:
            assert wait == self.breaker.open_for
        else:
            assert wait == 0.0


TestCircuit = Circuit.TestCase
