"""The policies: how long to wait, whether to try again, how much to hire."""

from __future__ import annotations

import functools
import math
import random
import typing
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import attrs
import pytest
import tenacity
import trio
from hypothesis import given
from hypothesis import strategies as st

from trio_pool import (
    Autoscale,
    Backoff,
    JobError,
    JobTimeout,
    PoolError,
    Priority,
    Restart,
    Retry,
    WorkerCrashed,
)
from trio_pool._policy import Scaler, note_attempts

ERROR = OSError("the line is down")
CRASH = WorkerCrashed(1, True, 1, 0)


async def wait_async(attempt: int) -> float:
    return 1.5


class Unready:
    """What is neither a wait nor a stop, though its class can be called."""


# Priority.


def test_priorities_are_ints_and_higher_is_more_urgent() -> None:
    assert [int(priority) for priority in Priority] == [-1, 0, 1, 2]
    assert Priority.LOW < Priority.NORMAL < Priority.HIGH < Priority.CRITICAL
    assert isinstance(Priority.HIGH, int)
    assert Priority.NORMAL == 0


# Backoff.


def test_the_defaults_of_backoff() -> None:
    assert Backoff() == Backoff(initial=0.1, factor=2.0, maximum=30.0, jitter=0.5)


def test_a_backoff_grows_to_its_maximum() -> None:
    backoff = Backoff(initial=0.25, factor=2, maximum=1.5, jitter=0)
    assert [backoff(attempt) for attempt in range(5)] == [0.25, 0.5, 1.0, 1.5, 1.5]


def test_a_factor_of_1_waits_the_same_each_time() -> None:
    backoff = Backoff(initial=0.25, factor=1, jitter=0)
    assert [backoff(attempt) for attempt in (0, 1, 9)] == [0.25] * 3


@pytest.mark.parametrize(("draw", "wait"), [(0.0, 2.0), (0.5, 1.5), (1.0, 1.0)])
def test_jitter_takes_off_a_share_by_chance(draw: float, wait: float) -> None:
    backoff = Backoff(initial=2.0, jitter=0.5)
    assert backoff(0, lambda: draw) == wait


def test_jitter_draws_anew_each_time() -> None:
    assert len({Backoff(initial=1.0, jitter=0.5)(0) for _ in range(50)}) > 1


@given(
    attempt=st.integers(0, 6000),
    jitter=st.floats(0, 1),
    draw=st.floats(0, 1),
    factor=st.floats(1, 100),
)
def test_jitter_stays_within_its_bounds(
    attempt: int, jitter: float, draw: float, factor: float
) -> None:
    backoff = Backoff(initial=0.25, factor=factor, jitter=jitter)
    whole = attrs.evolve(backoff, jitter=0)(attempt)
    wait = backoff(attempt, lambda: draw)
    assert whole <= 30.0
    assert whole * (1 - jitter) <= wait <= whole


@pytest.mark.parametrize("factor", [2, 2.0, 1.5])
@pytest.mark.parametrize("attempt", [5000, 10**9])
def test_a_late_attempt_waits_the_maximum(attempt: int, factor: float) -> None:
    assert Backoff(factor=factor, jitter=0)(attempt) == 30.0
    assert Backoff(initial=1, factor=factor, jitter=0)(attempt) == 30.0
    assert Backoff(initial=0, factor=factor, jitter=0)(attempt) == 0.0
    assert Backoff(factor=1, initial=0.25, jitter=0)(attempt) == 0.25


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("initial", -1, ValueError),
        ("initial", math.nan, ValueError),
        ("initial", math.inf, ValueError),
        ("initial", 10**400, ValueError),
        ("initial", "1", TypeError),
        ("initial", None, TypeError),
        ("factor", 0.5, ValueError),
        ("factor", 0, ValueError),
        ("factor", math.nan, ValueError),
        ("factor", math.inf, ValueError),
        ("factor", "2", TypeError),
        ("maximum", -1, ValueError),
        ("maximum", math.nan, ValueError),
        ("maximum", "1", TypeError),
        ("jitter", -0.1, ValueError),
        ("jitter", 1.5, ValueError),
        ("jitter", math.nan, ValueError),
        ("jitter", True, TypeError),
        ("jitter", "0", TypeError),
    ],
)
def test_a_bad_value_of_backoff_is_named(
    option: str, value: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=f"^{option} ") as caught:
        Backoff(**{option: value})
    assert repr(value) in str(caught.value)


# Restart.


def test_the_defaults_of_restart() -> None:
    assert Restart() == Restart(limit=5, within=60.0, backoff=Backoff())


def test_a_restart_takes_any_callable_and_an_endless_limit() -> None:
    def backoff(attempt: int) -> float:
        return 0.25 * attempt

    restart = Restart(limit=math.inf, backoff=backoff)
    assert restart.backoff(2) == 0.5


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("limit", -1, ValueError),
        ("limit", 1.5, TypeError),
        ("limit", math.nan, TypeError),
        ("within", 0, ValueError),
        ("within", -1, ValueError),
        ("within", math.nan, ValueError),
        ("within", "1", TypeError),
        ("backoff", 0.25, TypeError),
        ("backoff", None, TypeError),
        ("backoff", Backoff, TypeError),
        ("backoff", wait_async, TypeError),
        # It would be called with a number, and not with what it knows.
        ("backoff", tenacity.wait_fixed(1), TypeError),
    ],
)
def test_a_bad_value_of_restart_is_named(
    option: str, value: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=f"^{option} ") as caught:
        Restart(**{option: value})
    assert repr(value) in str(caught.value)


# Retry: how often.


def quick(**options: Any) -> Retry:
    """Make a policy whose waits are 0.25, 0.5, 1.0 ... seconds, exactly."""
    return Retry(**{"backoff": Backoff(initial=0.25, jitter=0), **options})


def waits(retry: Retry, error: Exception = ERROR, tries: int = 6) -> list[Any]:
    """List what is said after each try, each of which took no time."""
    elapsed = 0.0
    said = []
    for attempts in range(1, tries + 1):
        wait = retry.next_wait(error, attempts, elapsed)
        said.append(wait)
        if wait is None:
            break
        elapsed += wait
    return said


def test_the_defaults_of_retry() -> None:
    assert Retry() == Retry(attempts=3, backoff=Backoff(), on=(Exception,))
    assert Retry(5, Backoff(factor=1), OSError) == Retry(
        attempts=5, backoff=Backoff(factor=1), on=(OSError,)
    )


def test_a_retry_is_a_value() -> None:
    assert hash(Retry()) == hash(Retry())
    assert attrs.evolve(Retry(), attempts=7) == Retry(attempts=7)


@pytest.mark.parametrize("attempts", [1, 2, 3, 5])
def test_attempts_are_tries_in_all(attempts: int) -> None:
    said = waits(quick(attempts=attempts))
    assert len(said) == attempts
    assert said[-1] is None
    assert None not in said[:-1]


def test_the_waits_are_those_of_the_backoff_from_0_on() -> None:
    assert waits(quick(attempts=4)) == [0.25, 0.5, 1.0, None]


def test_endless_attempts_never_end_nor_overflow() -> None:
    assert quick(attempts=math.inf).next_wait(ERROR, 5000, 1e6) == 30.0


def test_growth_may_be_linear_by_any_callable() -> None:
    retry = Retry(attempts=5, backoff=lambda n: 0.5 * (n + 1))
    assert waits(retry) == [0.5, 1.0, 1.5, 2.0, None]


def test_a_backoff_may_be_a_type_of_numbers() -> None:
    assert waits(Retry(attempts=4, backoff=float)) == [0.0, 1.0, 2.0, None]


def test_a_wait_of_0_is_not_giving_up() -> None:
    assert Retry(backoff=lambda _: 0).next_wait(ERROR, 1, 0.0) == 0


def test_the_backoff_is_not_asked_when_the_answer_is_no() -> None:
    asked: list[int] = []

    def backoff(number: int) -> float:
        asked.append(number)
        return 0.25

    retry = Retry(attempts=2, backoff=backoff, on=OSError)
    assert retry.next_wait(ValueError(), 1, 0.0) is None
    assert retry.next_wait(ERROR, 2, 0.0) is None
    assert asked == []
    assert retry.next_wait(ERROR, 1, 0.0) == 0.25
    assert asked == [0]


@pytest.mark.parametrize(
    ("wait", "kind"),
    [
        (-0.25, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (-math.inf, ValueError),
        (10**400, ValueError),
        (None, TypeError),
        ("1", TypeError),
        (True, TypeError),
        (timedelta(seconds=1), TypeError),
    ],
)
def test_a_backoff_that_returns_no_seconds_is_named(
    wait: Any, kind: type[Exception]
) -> None:
    retry = Retry(backoff=lambda _: wait)
    with pytest.raises(kind, match=r"^backoff\(1\) must be a number of sec") as caught:
        retry.next_wait(ERROR, 2, 0.0)
    assert repr(wait) in str(caught.value)


def test_what_a_backoff_raises_is_raised() -> None:
    def backoff(number: int) -> float:
        raise LookupError(number)

    with pytest.raises(LookupError):
        Retry(backoff=backoff).next_wait(ERROR, 1, 0.0)


# Retry: on what.


@pytest.mark.parametrize(
    ("on", "error", "again"),
    [
        (Exception, ValueError(), True),
        (OSError, OSError(), True),
        (OSError, ConnectionError(), True),
        (OSError, ValueError(), False),
        ([OSError, ValueError], ValueError(), True),
        ((OSError, ValueError), KeyError(), False),
        ((), OSError(), False),
        (trio.TooSlowError, JobTimeout(1, True, 1, 0, 0.25), True),
        (JobError, JobTimeout(1, True, 1, 0, 0.25), True),
    ],
)
def test_types_say_which_errors_are_worth_another_try(
    on: Any, error: Exception, again: bool
) -> None:
    assert (quick(on=on).next_wait(error, 1, 0.0) is not None) is again


def test_types_are_kept_as_a_tuple() -> None:
    assert Retry(on=OSError).on == (OSError,)
    assert Retry(on=[OSError, KeyError]).on == (OSError, KeyError)


def group(*errors: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("several", errors)


@pytest.mark.parametrize(
    ("on", "error", "again"),
    [
        (OSError, group(OSError(), ConnectionError()), True),
        (OSError, group(OSError(), ValueError()), False),
        (OSError, group(ValueError()), False),
        ((OSError, ValueError), group(OSError(), group(ValueError())), True),
        ((OSError, ValueError), group(OSError(), group(KeyError())), False),
        (ExceptionGroup, group(KeyError()), True),
        # The inner one is of the type itself, whatever it holds.
        ((OSError, ExceptionGroup), group(OSError(), group(KeyError())), True),
    ],
)
def test_types_match_a_group_if_all_in_it_are_of_them(
    on: Any, error: Exception, again: bool
) -> None:
    assert (quick(on=on).next_wait(error, 1, 0.0) is not None) is again


def test_a_predicate_decides_by_itself() -> None:
    def is_busy(error: Exception) -> bool:
        return "busy" in str(error)

    retry = quick(on=is_busy)
    assert retry.next_wait(OSError("busy"), 1, 0.0) == 0.25
    assert retry.next_wait(OSError("gone"), 1, 0.0) is None
    assert retry.next_wait(group(OSError("busy")), 1, 0.0) is None


def test_a_predicate_may_return_anything_that_is_true_or_false() -> None:
    retry = quick(on=lambda error: error.args)
    assert retry.next_wait(OSError("busy"), 1, 0.0) == 0.25
    assert retry.next_wait(OSError(), 1, 0.0) is None


def test_what_a_predicate_raises_is_raised() -> None:
    def ask(error: Exception) -> bool:
        raise LookupError

    with pytest.raises(LookupError):
        quick(on=ask).next_wait(ERROR, 1, 0.0)


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(),
        GeneratorExit(),
        BaseExceptionGroup("several", [KeyboardInterrupt(), OSError()]),
    ],
)
@pytest.mark.parametrize("on", [Exception, lambda _: True])
def test_what_is_no_exception_is_never_tried_again(on: Any, error: Any) -> None:
    assert quick(on=on).next_wait(error, 1, 0.0) is None


@pytest.mark.parametrize("on", [Exception, lambda _: True])
async def test_a_cancellation_is_never_tried_again(on: Any) -> None:
    said: list[float | None] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.lowlevel.checkpoint()
        except BaseException as error:
            said.append(quick(on=on).next_wait(typing.cast("Any", error), 1, 0.0))
            raise
    assert said == [None]


@pytest.mark.parametrize(
    ("on", "again"),
    [
        (Exception, False),
        (OSError, False),
        ((Exception, OSError), False),
        (WorkerCrashed, True),
        (JobError, True),
        (PoolError, True),
        ((Exception, WorkerCrashed), True),
        (lambda _: True, True),
        (lambda _: False, False),
    ],
)
def test_a_job_that_lost_its_worker_is_tried_again_only_by_name(
    on: Any, again: bool
) -> None:
    said = quick(on=on).next_wait(CRASH, 1, 0.0, crashed=True)
    assert (said is not None) is again


def test_a_crash_counts_as_a_try() -> None:
    retry = quick(attempts=2, on=WorkerCrashed)
    assert retry.next_wait(CRASH, 1, 0.0, crashed=True) == 0.25
    assert retry.next_wait(CRASH, 2, 0.25, crashed=True) is None


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("attempts", 0, ValueError),
        ("attempts", -1, ValueError),
        ("attempts", 1.5, TypeError),
        ("attempts", 2.0, TypeError),
        ("attempts", math.nan, TypeError),
        ("attempts", -math.inf, TypeError),
        ("attempts", True, TypeError),
        ("attempts", "3", TypeError),
        ("attempts", None, TypeError),
        ("attempts", lambda _: True, TypeError),
        ("attempts", tenacity.wait_fixed(1), TypeError),
        ("attempts", tenacity.stop_after_attempt, TypeError),
        ("backoff", 0.25, TypeError),
        ("backoff", None, TypeError),
        ("backoff", Backoff, TypeError),
        ("backoff", Unready(), TypeError),
        ("backoff", wait_async, TypeError),
        ("backoff", functools.partial(wait_async), TypeError),
        ("backoff", tenacity.stop_after_attempt(3), TypeError),
        ("backoff", tenacity.wait_fixed, TypeError),
        ("on", None, TypeError),
        ("on", 3, TypeError),
        ("on", "OSError", TypeError),
        ("on", BaseException, TypeError),
        ("on", KeyboardInterrupt, TypeError),
        ("on", trio.Cancelled, TypeError),
        ("on", int, TypeError),
        ("on", (OSError, SystemExit), TypeError),
        ("on", (OSError, "ValueError"), TypeError),
        ("on", (OSError(),), TypeError),
        ("on", OSError(), TypeError),
        ("on", wait_async, TypeError),
        ("on", tenacity.retry_if_exception_type(OSError), TypeError),
    ],
)
def test_a_bad_value_of_retry_is_named(
    option: str, value: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=f"^{option} must be ") as caught:
        Retry(**{option: value})
    assert repr(value) in str(caught.value)


# Retry: with tenacity's objects.


class Patience(tenacity.stop.stop_base):
    """A stop of the user's own; it keeps what it was asked with."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        outcome = retry_state.outcome
        assert outcome is not None
        self.seen.append(
            (
                retry_state.attempt_number,
                retry_state.seconds_since_start,
                retry_state.upcoming_sleep,
                outcome.attempt_number,
                outcome.exception(),
            )
        )
        return False


def test_a_stop_of_tenacity_counts_attempts() -> None:
    retry = quick(attempts=tenacity.stop_after_attempt(3))
    assert waits(retry) == [0.25, 0.5, None]


def test_a_stop_of_tenacity_sees_the_seconds_since_the_first_start() -> None:
    retry = quick(attempts=tenacity.stop_after_delay(1.5))
    assert retry.next_wait(ERROR, 9, 1.25) == 30.0
    assert retry.next_wait(ERROR, 9, 1.5) is None


def test_a_stop_of_tenacity_sees_the_coming_wait() -> None:
    retry = quick(attempts=tenacity.stop_before_delay(1.5))
    assert retry.next_wait(ERROR, 1, 1.0) == 0.25
    assert retry.next_wait(ERROR, 2, 1.0) is None


@pytest.mark.parametrize(
    ("stop", "tries"),
    [
        (tenacity.stop_after_attempt(2) | tenacity.stop_after_delay(60), 2),
        (tenacity.stop_after_attempt(2) & tenacity.stop_after_delay(1.5), 4),
        (tenacity.stop_any(tenacity.stop_after_attempt(3)), 3),
        (tenacity.stop_all(tenacity.stop_after_attempt(3)), 3),
    ],
)
def test_stops_of_tenacity_may_be_joined(stop: Any, tries: int) -> None:
    assert len(waits(quick(attempts=stop))) == tries


def test_the_stop_that_never_stops_goes_on() -> None:
    assert None not in waits(quick(attempts=tenacity.stop_never), tries=50)


def test_a_stop_of_the_users_own_is_asked_with_all_that_is_known() -> None:
    stop = Patience()
    retry = quick(attempts=stop)
    assert retry.next_wait(ERROR, 2, 1.25) == 0.5
    assert stop.seen == [(2, 1.25, 0.5, 2, ERROR)]


def test_a_stop_of_tenacity_does_not_replace_the_types() -> None:
    retry = quick(attempts=tenacity.stop_never, on=KeyError)
    assert retry.next_wait(ERROR, 1, 0.0) is None


@pytest.mark.parametrize(
    ("wait", "said"),
    [
        (tenacity.wait_fixed(1.5), [1.5, 1.5, 1.5]),
        (tenacity.wait_fixed(timedelta(seconds=1.5)), [1.5, 1.5, 1.5]),
        (tenacity.wait_none(), [0, 0, 0]),
        (tenacity.wait_incrementing(0.5, 0.25), [0.5, 0.75, 1.0]),
        (tenacity.wait_exponential(multiplier=0.25, max=0.5), [0.25, 0.5, 0.5]),
        (tenacity.wait_fixed(1) + tenacity.wait_fixed(0.5), [1.5, 1.5, 1.5]),
        (
            tenacity.wait_chain(tenacity.wait_fixed(0.25), tenacity.wait_fixed(1.5)),
            [0.25, 1.5, 1.5],
        ),
        (tenacity.wait_exception(lambda error: len(error.args) / 4), [0.25] * 3),
    ],
)
def test_a_wait_of_tenacity_gives_the_seconds(wait: Any, said: list[float]) -> None:
    assert waits(Retry(attempts=4, backoff=wait)) == [*said, None]


def test_a_random_wait_of_tenacity_stays_within_its_bounds() -> None:
    retry = Retry(attempts=math.inf, backoff=tenacity.wait_random(0.25, 0.5))
    assert all(0.25 <= wait <= 0.5 for wait in waits(retry, tries=50))


def test_a_wait_and_a_stop_of_tenacity_go_together() -> None:
    retry = Retry(tenacity.stop_after_delay(3), tenacity.wait_fixed(1.5))
    assert waits(retry) == [1.5, 1.5, None]


def test_a_bad_wait_of_tenacity_is_named() -> None:
    retry = Retry(backoff=tenacity.wait_fixed(-1))
    with pytest.raises(ValueError, match=r"^backoff\(0\) must be "):
        retry.next_wait(ERROR, 1, 0.0)


# note_attempts.


def notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))


def test_giving_up_is_noted_on_the_error() -> None:
    error = OSError()
    note_attempts(error, 3)
    assert notes(error) == ["trio_pool: given up after 3 attempts"]


def test_one_attempt_is_one_attempt() -> None:
    error = OSError()
    note_attempts(error, 1)
    assert notes(error) == ["trio_pool: given up after 1 attempt"]


def test_the_same_error_has_the_same_note_once() -> None:
    error = OSError()
    error.add_note("the caller's own")
    for attempts in (3, 3, 2, 3):
        note_attempts(error, attempts)
    assert notes(error) == [
        "the caller's own",
        "trio_pool: given up after 3 attempts",
        "trio_pool: given up after 2 attempts",
    ]


def test_an_error_that_takes_no_notes_stays_as_it_is() -> None:
    class Odd(Exception):
        __notes__ = None  # type: ignore[assignment]

    class Stubborn(Exception):
        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    for error in (Odd(), Stubborn()):
        note_attempts(error, 3)
    assert not hasattr(Stubborn(), "__notes__")


# Autoscale.


def test_the_defaults_of_autoscale() -> None:
    assert Autoscale() == Autoscale(
        min=1, max=8, interval=1.0, step=1, up_after=0.0, down_after=10.0
    )


@pytest.mark.parametrize(
    "options",
    [
        {"min": 0, "max": 1},
        {"min": 3, "max": 3},
        {"up_after": math.inf, "down_after": math.inf},
        {"down_after": 0},
        {"step": 100},
    ],
)
def test_odd_but_sane_autoscales_are_legal(options: Any) -> None:
    scale = Autoscale(**options)
    assert attrs.evolve(Autoscale(max=1000), **options) == attrs.evolve(
        scale, max=options.get("max", 1000)
    )


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("min", -1, ValueError),
        ("min", 1.0, TypeError),
        ("min", math.inf, TypeError),
        ("min", "1", TypeError),
        ("max", 0, ValueError),
        ("max", -1, ValueError),
        ("max", math.inf, TypeError),
        ("max", None, TypeError),
        ("interval", 0, ValueError),
        ("interval", -1, ValueError),
        ("interval", math.inf, ValueError),
        ("interval", math.nan, ValueError),
        ("interval", "1", TypeError),
        ("step", 0, ValueError),
        ("step", 0.5, TypeError),
        ("step", True, TypeError),
        ("up_after", -0.25, ValueError),
        ("up_after", math.nan, ValueError),
        ("up_after", None, TypeError),
        ("down_after", -0.25, ValueError),
        ("down_after", math.nan, ValueError),
        ("down_after", "10", TypeError),
    ],
)
def test_a_bad_value_of_autoscale_is_named(
    option: str, value: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=f"^{option} must be ") as caught:
        Autoscale(**{option: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("options", [{"min": 9}, {"min": 4, "max": 3}])
def test_a_min_above_max_is_named(options: dict[str, int]) -> None:
    highest = options.get("max", 8)
    with pytest.raises(ValueError, match=f"^min .* max, which is {highest}") as caught:
        Autoscale(**options)
    assert repr(options["min"]) in str(caught.value)


# Scaler.

Look = tuple[int, int]
"""The jobs that wait and the workers that are idle, at one look."""


def follow(scaler: Scaler, size: int, looks: Iterable[Look], start: float = 0) -> Any:
    """List the size after each look; looks are a second apart."""
    sizes = []
    for number, (waiting, idle) in enumerate(looks):
        size = scaler.decide(start + number, size, waiting, idle)
        sizes.append(size)
    return sizes


SHORT: Look = (3, 0)
SPARE: Look = (0, 9)
CALM: Look = (0, 0)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_size_outside_the_bounds_is_brought_back(size: int) -> None:
    scaler = Scaler(Autoscale(min=2, max=5, down_after=math.inf))
    expected = min(max(size, 2), 5)
    assert follow(scaler, size, [CALM, CALM]) == [expected, expected]


@pytest.mark.parametrize("look", [SHORT, SPARE, CALM])
def test_it_starts_at_min(look: Look) -> None:
    assert Scaler(Autoscale(min=2)).decide(0.0, 0, *look) == 2


def test_it_reaches_max_and_never_goes_beyond() -> None:
    scaler = Scaler(Autoscale(min=1, max=4))
    assert follow(scaler, 1, [SHORT] * 6) == [2, 3, 4, 4, 4, 4]


def test_a_step_is_cut_at_max_and_at_min() -> None:
    scaler = Scaler(Autoscale(min=1, max=6, step=3, down_after=0))
    assert follow(scaler, 1, [SHORT] * 3) == [4, 6, 6]
    assert follow(scaler, 6, [SPARE] * 3, start=3) == [3, 1, 1]


def test_it_settles_at_min() -> None:
    scaler = Scaler(Autoscale(min=2, max=8, down_after=2))
    sizes = follow(scaler, 4, [SPARE] * 9)
    assert sizes == [4, 4, 3, 3, 3, 2, 2, 2, 2]


def test_it_grows_when_jobs_have_waited_at_every_look() -> None:
    policy = Autoscale(up_after=2)
    assert follow(Scaler(policy), 1, [SHORT, SHORT, SHORT]) == [1, 1, 2]
    # One look at which none waited, and it begins anew.
    looks = [SHORT, SHORT, CALM, SHORT, SHORT, SHORT]
    assert follow(Scaler(policy), 1, looks) == [1, 1, 1, 1, 1, 2]


def test_it_shrinks_when_some_worker_was_idle_at_every_look() -> None:
    policy = Autoscale(down_after=2)
    assert follow(Scaler(policy), 3, [SPARE, SPARE, SPARE]) == [3, 3, 2]
    looks = [SPARE, SPARE, CALM, SPARE, SPARE, SPARE]
    assert follow(Scaler(policy), 3, looks) == [3, 3, 3, 3, 3, 2]


def test_it_shrinks_by_no_more_than_were_idle_all_the_time() -> None:
    scaler = Scaler(Autoscale(min=1, max=8, step=5, down_after=2))
    assert follow(scaler, 8, [(0, 6), (0, 2), (0, 7)]) == [8, 8, 6]


def test_what_was_idle_before_a_change_does_not_hold_back_the_next() -> None:
    scaler = Scaler(Autoscale(min=0, max=8, step=5, down_after=1))
    looks = [(0, 1), (0, 1), (0, 4), (0, 4)]
    assert follow(scaler, 8, looks) == [8, 7, 7, 3]


def test_a_look_that_is_late_counts_for_the_time_between() -> None:
    scaler = Scaler(Autoscale(down_after=10))
    assert scaler.decide(0.0, 3, *SPARE) == 3
    assert scaler.decide(10.0, 3, *SPARE) == 2


def test_after_a_change_the_observation_starts_anew() -> None:
    scaler = Scaler(Autoscale(max=9, up_after=2))
    assert follow(scaler, 1, [SHORT] * 9) == [1, 1, 2, 2, 2, 3, 3, 3, 4]


def test_after_a_change_by_somebody_else_too() -> None:
    scaler = Scaler(Autoscale(min=1, down_after=2))
    assert follow(scaler, 4, [SPARE, SPARE]) == [4, 4]
    assert follow(scaler, 5, [SPARE, SPARE, SPARE], start=2) == [5, 5, 4]


def test_a_load_that_comes_and_goes_does_not_make_it_flap() -> None:
    scaler = Scaler(Autoscale(min=1, max=8, up_after=0, down_after=10))
    sizes = follow(scaler, 1, [SHORT, SPARE, CALM, SPARE] * 25)
    # It never shrinks in between, so it grows to its max and stays.
    assert sizes == sorted(sizes)
    assert sizes[-1] == 8


def test_a_load_for_half_the_workers_settles_between_the_bounds() -> None:
    scaler = Scaler(Autoscale(min=1, max=8, down_after=3))
    size, sizes = 1, []
    for now in range(60):
        jobs = 4
        size = scaler.decide(now, size, max(0, jobs - size), max(0, size - jobs))
        sizes.append(size)
    assert sizes[:3] == [2, 3, 4]
    assert set(sizes[3:]) == {4}


def test_jobs_that_wait_beside_idle_workers_are_no_reason_to_grow() -> None:
    scaler = Scaler(Autoscale(min=1, max=8, down_after=math.inf))
    assert follow(scaler, 2, [(9, 1)] * 5) == [2] * 5


def test_where_there_is_no_worker_one_comes_at_the_first_look() -> None:
    scaler = Scaler(Autoscale(min=0, max=2, up_after=math.inf, down_after=1))
    assert follow(scaler, 0, [CALM, SHORT, SHORT]) == [0, 1, 1]
    assert follow(scaler, 1, [SPARE, SPARE], start=3) == [1, 0]
    assert scaler.decide(5.0, 0, 1, 0) == 1


def test_infinite_times_never_change_the_size() -> None:
    scaler = Scaler(Autoscale(up_after=math.inf, down_after=math.inf))
    assert follow(scaler, 3, [SHORT, SPARE] * 20 + [SHORT] * 20) == [3] * 60


def lasted(history: list[tuple[float, Look]], holds: Callable[[Look], bool]) -> float:
    """Return the seconds for which a reason held at every look; -1 for none."""
    since = None
    for time, look in reversed(history):
        if not holds(look):
            break
        since = time
    return -1.0 if since is None else history[-1][0] - since


looks = st.tuples(st.integers(0, 2), st.integers(0, 4))
policies = st.builds(
    lambda low, more, step, up, down: Autoscale(
        min=low, max=max(1, low + more), step=step, up_after=up, down_after=down
    ),
    st.integers(0, 3),
    st.integers(0, 6),
    st.integers(1, 4),
    st.sampled_from([0, 1, 2, 5]),
    st.sampled_from([0, 1, 2, 5]),
)


@given(
    policy=policies,
    size=st.integers(0, 12),
    steps=st.lists(
        st.tuples(looks, st.sampled_from([0.5, 1, 3]), st.none() | st.integers(0, 12)),
        max_size=40,
    ),
)
def test_every_change_has_its_reason(
    policy: Autoscale, size: int, steps: list[tuple[Look, float, int | None]]
) -> None:
    scaler = Scaler(policy)
    now = 0.0
    history: list[tuple[float, Look]] = []
    for (waiting, idle), pause, resized in steps:
        now += pause
        if resized is not None and resized != size:
            size = resized
            history.clear()
        history.append((now, (waiting, idle)))
        wanted = scaler.decide(now, size, waiting, idle)
        assert policy.min <= wanted <= policy.max
        if policy.min <= size <= policy.max:
            short = lasted(history, lambda look: look[0] > 0 and look[1] == 0)
            spare = lasted(history, lambda look: look[1] > 0)
            enough = [look[1] for time, look in history if time >= now - spare]
            if short >= policy.up_after or (waiting and not size):
                assert wanted == min(size + policy.step, policy.max)
            elif spare >= policy.down_after:
                assert wanted == max(size - min(policy.step, *enough), policy.min)
            else:
                assert wanted == size
        if wanted != size:
            history.clear()
        size = wanted


# All of them.


@pytest.mark.parametrize("value", [Backoff(), Restart(), Retry(), Autoscale()])
def test_policies_are_frozen(value: Any) -> None:
    field = attrs.fields(type(value))[0].name
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(value, field, 1)


@pytest.mark.parametrize("kind", [Backoff, Restart, Retry, Autoscale])
def test_the_type_hints_of_policies_resolve(kind: type) -> None:
    assert typing.get_type_hints(kind)
    assert typing.get_type_hints(kind.__init__)


def test_chance_is_that_of_the_random_module() -> None:
    random.seed(7)
    first = Backoff()(3)
    random.seed(7)
    assert Backoff()(3) == first
