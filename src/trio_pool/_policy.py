"""The frozen values that say when to wait, to try again, and how much to hire."""

import enum
import math
import random
import sys
from collections.abc import Callable
from typing import Any, final

import attrs

from ._checks import (
    are_errors,
    as_types,
    check_bound,
    check_count,
    check_seconds,
    check_share,
    is_async,
    note,
    refuse,
    valid,
)


def _check_factor(_: object, field: "attrs.Attribute[Any]", value: Any) -> None:
    check_seconds("factor", value, zero=False, infinite=False)
    if value < 1:
        raise ValueError(refuse(field.name, value, "a number >= 1"))


def _is_of_tenacity(value: object, *families: str) -> bool:
    """Return whether this is one of tenacity's objects, without importing it.

    Those that are joined by ``|``, ``&`` or ``+`` are of the same family.
    """
    modules = {kind.__module__ for kind in type(value).__mro__}
    return any(f"tenacity.{family}" in modules for family in families)


def _is_plain(value: object) -> bool:
    """Return whether this is a sync callable that knows nothing of tenacity."""
    return (
        callable(value)
        # A class is callable too, but nearly always its objects were meant.
        and not (isinstance(value, type) and not issubclass(value, (int, float)))
        and not is_async(value)
        and not _is_of_tenacity(value, "wait", "stop", "retry")
    )


def _check_wait(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if not _is_plain(value):
        expected = "a Backoff or a sync callable (number of the wait) -> seconds"
        raise TypeError(refuse(field.name, value, expected))


def _check_backoff(owner: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if not _is_of_tenacity(value, "wait"):
        _check_wait(owner, field, value)


def _check_attempts(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if _is_of_tenacity(value, "stop"):
        return
    if not isinstance(value, (int, float)):
        expected = "an int, 1 or more, math.inf, or one of tenacity's stop objects"
        raise TypeError(refuse(field.name, value, expected))
    check_bound(field.name, value, zero=False)


def _check_on(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if not are_errors(value) and not _is_plain(value):
        expected = "Exception subclasses or a sync callable (error) -> bool"
        raise TypeError(refuse(field.name, value, expected))


def _check_max(owner: "Autoscale", field: "attrs.Attribute[Any]", value: Any) -> None:
    check_count(field.name, value, zero=False)
    if owner.min > value:
        expected = f"an int that is not above max, which is {value}"
        raise ValueError(refuse("min", owner.min, expected))


@final
class Priority(enum.IntEnum):
    """Names for common priorities; any int is one, and higher goes first."""

    LOW = -1
    NORMAL = 0
    HIGH = 1
    CRITICAL = 2


@final
@attrs.frozen
class Backoff:
    """How long to wait before trying again: exponential, capped, with jitter.

    Wait n (from 0) is ``min(maximum, initial * factor ** n)`` seconds, times a
    uniform draw from ``1 - jitter`` to 1 (the "equal jitter" of Brooker,
    "Exponential Backoff And Jitter", generalised). ``factor=1`` waits the
    same time each time.
    """

    initial: float = attrs.field(
        default=0.1, validator=valid(check_seconds, infinite=False)
    )
    """Seconds of the first wait."""
    factor: float = attrs.field(default=2.0, validator=_check_factor)
    """What each wait is multiplied by to give the next; 1 or more."""
    maximum: float = attrs.field(default=30.0, validator=valid(check_seconds))
    """Seconds that no wait exceeds."""
    jitter: float = attrs.field(default=0.5, validator=valid(check_share))
    """The share of a wait, 0 to 1, that chance may take off."""

    def __call__(
        self, attempt: int, draw: Callable[[], float] = random.random
    ) -> float:
        """Return wait number ``attempt`` (from 0), in seconds.

        ``draw`` returns chance, uniform from 0 to 1.
        """
        try:
            # A power of floats overflows at once; one of ints would be worked
            # out to its last digit first.
            wait = min(self.maximum, self.initial * float(self.factor) ** attempt)
        except OverflowError:
            wait = self.maximum if self.initial else 0.0
        return wait * (1 - self.jitter * draw())


@final
@attrs.frozen
class Restart:
    """How often and how fast a crashed worker is replaced.

    The budget is counted per worker slot: more than ``limit`` crashes within
    ``within`` seconds break the pool. The first restart of a quiet slot is
    at once, the next waits ``backoff(0)`` seconds, then ``backoff(1)``, ...,
    never less than 10 ms.
    """

    limit: float = attrs.field(default=5, validator=valid(check_bound))
    """Crashes that are forgiven within the window; ``math.inf`` allowed."""
    within: float = attrs.field(
        default=60.0, validator=valid(check_seconds, zero=False)
    )
    """Length of the window, in seconds."""
    backoff: Callable[[int], float] = attrs.field(
        factory=Backoff, validator=_check_wait
    )
    """A `Backoff`, or any callable from the number of the wait to seconds."""


@final
@attrs.frozen
class Retry:
    """How often, after what wait and after which errors a job is tried again.

    A job whose worker died under it may have done half its work, so it is
    tried again only if ``on`` says so by name: by `WorkerCrashed`, `JobError`
    or `PoolError`, or by a predicate. ``Exception`` does not mean it.
    Cancellation, Ctrl-C and exits are never followed by another try.

    tenacity's ``stop_*`` and ``wait_*`` objects serve as ``attempts`` and
    ``backoff``. They see the number of tries made, the seconds since the first
    one started, the coming wait and the last error.
    """

    attempts: float | Callable[[Any], bool] = attrs.field(
        default=3, validator=_check_attempts
    )
    """Tries in all, the first one counted: an int, 1 or more, or ``math.inf``;
    or one of tenacity's stop objects."""
    backoff: Callable[[Any], float] = attrs.field(
        factory=Backoff, validator=_check_backoff
    )
    """A `Backoff`, or any callable from the number of the wait, from 0, to
    seconds; or one of tenacity's wait objects."""
    on: tuple[type[Exception], ...] | Callable[[Exception], bool] = attrs.field(
        default=(Exception,), converter=as_types, validator=_check_on
    )
    """Exception types, or a predicate ``(error) -> bool``. Types match a group
    if it is of one of them itself, or if all the errors in it are."""

    def next_wait(
        self, error: Exception, attempts: int, elapsed: float, crashed: bool = False
    ) -> float | None:
        """Return the seconds to wait before the next try; None is to give up.

        ``attempts`` tries were made, the last of which ended with ``error``,
        ``elapsed`` seconds after the first one started. ``crashed`` says that
        it cost the worker its life.

        Raises:
          TypeError: ``backoff`` returned something that is no number.
          ValueError: ``backoff`` returned no finite number of seconds >= 0.
          Exception: what the predicate, or ``backoff``, raised.
        """
        stop: Any = self.attempts
        counted = isinstance(stop, (int, float))
        if (counted and attempts >= stop) or not self._matches(error, crashed):
            return None
        if _is_of_tenacity(self.backoff, "wait"):
            wait = self.backoff(_make_state(error, attempts, elapsed))
        else:
            wait = self.backoff(attempts - 1)
        check_seconds(f"backoff({attempts - 1})", wait, infinite=False)
        if not counted and stop(_make_state(error, attempts, elapsed, wait)):
            return None
        return wait

    def _matches(self, error: BaseException, crashed: bool) -> bool:
        if not isinstance(error, Exception):
            return False
        if not isinstance(self.on, tuple):
            return bool(self.on(error))
        if crashed:
            return any(isinstance(error, t) for t in self.on if t is not Exception)
        return _is_all_of(error, self.on)


def _is_all_of(error: Exception, types: tuple[type[Exception], ...]) -> bool:
    if isinstance(error, types):
        return True
    return isinstance(error, ExceptionGroup) and all(
        _is_all_of(inner, types) for inner in error.exceptions
    )


def _make_state(
    error: Exception, attempts: int, elapsed: float, wait: float = 0.0
) -> Any:
    """Make what tenacity's objects are called with."""
    # It is there: the caller made the objects that ask for this.
    tenacity = sys.modules["tenacity"]
    state = tenacity.RetryCallState(None, None, (), {})
    state.attempt_number = attempts
    state.outcome = tenacity.Future(attempts)
    state.outcome.set_exception(error)
    state.start_time = 0.0
    state.outcome_timestamp = elapsed
    state.upcoming_sleep = wait
    return state


def note_attempts(error: BaseException, attempts: int) -> None:
    """Note on an error, once, how many tries it took to give up."""
    text = f"trio_pool: given up after {attempts} attempt{'s' * (attempts != 1)}"
    if text not in (getattr(error, "__notes__", None) or ()):
        note(error, text)


@final
@attrs.frozen
class Autoscale:
    """How many workers to have, by what the pool sees as it looks at itself.

    It looks every ``interval`` seconds. If at every look for ``up_after``
    seconds jobs waited while no worker was idle, it grows by ``step`` workers.
    If at every look for ``down_after`` seconds some worker was idle, it shrinks
    by ``step``, but by no more than were idle at every one of these looks. It
    never goes above ``max`` nor below ``min``. After any change the
    observation starts anew, so both times are cooldowns too. A pool of no
    workers grows at the first look that finds a waiting job.
    """

    min: int = attrs.field(default=1, validator=valid(check_count))
    """Workers to have at least, and to start with; 0 is legal."""
    max: int = attrs.field(default=8, validator=_check_max)
    """Workers to have at most; 1 or more, and not below ``min``."""
    interval: float = attrs.field(
        default=1.0, validator=valid(check_seconds, zero=False, infinite=False)
    )
    """Seconds from one look to the next."""
    step: int = attrs.field(default=1, validator=valid(check_count, zero=False))
    """Workers that one change adds or takes away at most."""
    up_after: float = attrs.field(default=0.0, validator=valid(check_seconds))
    """Seconds that jobs must have waited for a worker; 0 grows at the first
    look that finds one, ``math.inf`` never grows."""
    down_after: float = attrs.field(default=10.0, validator=valid(check_seconds))
    """Seconds that workers must have been idle; ``math.inf`` never shrinks."""


@final
class Scaler:
    """Decides for one pool what its `Autoscale` asks for, look by look."""

    def __init__(self, policy: Autoscale) -> None:
        self._policy = policy
        self._wanted: int | None = None
        # Since when every look found jobs short of a worker, or a worker to
        # spare, and how many were to spare at each; infinite if the last did not.
        self._short_since = math.inf
        self._spare_since = math.inf
        self._spare = math.inf

    def decide(self, now: float, size: int, waiting: int, idle: int) -> int:
        """Return the number of workers wanted from now on.

        ``size`` workers were wanted until now, ``waiting`` jobs could run if
        there were a worker for them, ``idle`` workers have nothing to do.
        """
        if size != self._wanted:
            # Somebody else changed it.
            self._restart_observation()
        wanted = self._decide(now, size, waiting, idle)
        if wanted != size:
            self._restart_observation()
        self._wanted = wanted
        return wanted

    def _decide(self, now: float, size: int, waiting: int, idle: int) -> int:
        policy = self._policy
        if not policy.min <= size <= policy.max:
            return min(max(size, policy.min), policy.max)
        # Where a worker is idle it is not for want of workers that jobs wait:
        # growing on that, and shrinking on the idle ones, would never settle.
        if waiting > 0 and idle <= 0:
            self._short_since = min(self._short_since, now)
        else:
            self._short_since = math.inf
        if idle > 0:
            self._spare_since = min(self._spare_since, now)
            self._spare = min(self._spare, idle)
        else:
            self._spare_since = self._spare = math.inf
        if now - self._short_since >= policy.up_after or (waiting > 0 and not size):
            return min(size + policy.step, policy.max)
        if now - self._spare_since >= policy.down_after:
            return max(size - int(min(policy.step, self._spare)), policy.min)
        return size

    def _restart_observation(self) -> None:
        self._short_since = math.inf
        self._spare_since = math.inf
        self._spare = math.inf
