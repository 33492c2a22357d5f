"""The guards that decide, without a loop, whether a job may start now."""

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, final

import attrs
import trio

from ._checks import check_seconds, refuse, valid

CircuitState = Literal["closed", "open", "half_open"]

log = logging.getLogger("trio_pool")


def _check_positive(_: object, field: "attrs.Attribute[Any]", value: Any) -> None:
    expected = "an int, 1 or more"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(refuse(field.name, value, expected))
    if value < 1:
        raise ValueError(refuse(field.name, value, expected))


def _check_finite(_: object, field: "attrs.Attribute[Any]", value: Any) -> None:
    expected = "a finite number > 0"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(refuse(field.name, value, expected))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise ValueError(refuse(field.name, value, expected))


def _check_on(_: object, field: "attrs.Attribute[Any]", value: Any) -> None:
    kinds: tuple[Any, ...] = value if isinstance(value, tuple) else ()
    if not (callable(value) or isinstance(value, tuple)) or not all(
        isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds
    ):
        expected = "Exception subclasses or a callable (error) -> bool"
        raise TypeError(refuse(field.name, value, expected))


def _as_types(
    value: type[Exception] | Sequence[type[Exception]] | Callable[[Exception], bool],
) -> tuple[type[Exception], ...] | Callable[[Exception], bool]:
    if isinstance(value, type):
        return (value,)
    return tuple(value) if isinstance(value, Sequence) else value


@attrs.define(eq=False)
class _Meter:
    """The tokens taken since the bucket was last full, and when that was."""

    interval: float = 0.0
    since: float = -math.inf
    taken: int = 0
    run: object = None


@final
@attrs.frozen(eq=False)
class Rate:
    """How many jobs may start in a time: ``jobs`` every ``per`` seconds.

    In any ``d`` seconds no more than ``burst + d * jobs / per`` jobs start,
    and each starts as soon as that allows. This is the generic cell rate
    algorithm (ITU-T I.371), the leaky bucket without a timer. One object may
    be given to several pools of one trio run: they share the rate. In another
    trio run it begins anew.
    """

    jobs: float = attrs.field(validator=_check_finite)
    """Jobs that may start in every ``per`` seconds, in the long run."""
    per: float = attrs.field(
        default=1.0, validator=valid(check_seconds, zero=False, infinite=False)
    )
    """Seconds that ``jobs`` is counted over."""
    burst: int = attrs.field(default=1, validator=_check_positive)
    """Jobs that may start at once after a quiet time."""
    _meter: _Meter = attrs.field(init=False, repr=False, factory=_Meter)

    def __attrs_post_init__(self) -> None:
        interval = self.per / self.jobs
        if math.isinf(interval):
            expected = "a number of seconds for which per / jobs is finite"
            raise ValueError(refuse("per", self.per, expected))
        self._meter.interval = interval

    def begin(self, run: object) -> None:
        """Forget what was taken in another trio run, whose clock was another.

        ``run`` is what tells one run from the next, such as its trio token.
        """
        meter = self._meter
        if run is not meter.run:
            meter.run = run
            meter.since, meter.taken = -math.inf, 0

    def take(self, now: float) -> float:
        """Take a token, or say at what time to ask again.

        Returns ``-math.inf`` if a token was taken. Otherwise the earliest time
        for one, always later than ``now``: whoever asks at that time gets it,
        unless another took it first.
        """
        meter = self._meter
        taken = meter.taken
        elapsed = now - meter.since
        if elapsed >= taken * meter.interval:
            meter.since, meter.taken = now, 1
            return -math.inf
        if taken >= self.burst:
            wait = (taken - self.burst + 1) * meter.interval
            if elapsed < wait:
                at = meter.since + wait
                # The sum may be rounded down; to ask a moment too early is to
                # be sent away again, for ever on a clock that stands still.
                while at - meter.since < wait:
                    at = math.nextafter(at, math.inf)
                return at
        # Tokens are counted, and not added up in seconds: a rate that is finer
        # than the clock is kept, and rounding errors do not grow.
        meter.taken = taken + 1
        return -math.inf

    def give_back(self) -> None:
        """Return the token that was taken last: it was not used after all."""
        meter = self._meter
        if meter.taken:
            meter.taken -= 1


@final
@attrs.frozen(kw_only=True)
class CircuitStatistics:
    """What a `CircuitBreaker` counts at one moment."""

    state: CircuitState
    """Whether calls are let through, refused, or tried out."""
    failures: int
    """Failures within the window that count towards opening."""
    refused: int
    """Calls refused since the breaker was made."""
    opened: int
    """Times it opened since it was made."""
    probing: int
    """Calls let through half-open that have not ended."""


@attrs.define(eq=False)
class _Circuit:
    """What a breaker remembers.

    The generation is the number of changes of state. A permit is the
    generation that it was given in, so every change makes the permits that
    are out stale: what becomes of their calls says nothing about the present.
    """

    state: CircuitState = "closed"
    generation: int = 1
    failed: deque[float] = attrs.field(factory=lambda: deque[float]())
    until: float = -math.inf
    probing: int = 0
    succeeded: int = 0
    refused: int = 0
    opened: int = 0
    run: object = None

    def change(self, state: CircuitState) -> None:
        self.state = state
        self.generation += 1
        self.failed.clear()
        self.probing = self.succeeded = 0

    def open(self, until: float) -> None:
        self.change("open")
        self.until = until
        self.opened += 1

    def now(self) -> float:
        """Return the time of the run that the breaker is in, else the far past.

        The far past is when nothing is over yet.
        """
        try:
            token = trio.lowlevel.current_trio_token()
        except RuntimeError:
            return -math.inf
        if self.run is not None and self.run is not token:
            return -math.inf
        return trio.current_time()

    def state_at(self, now: float) -> CircuitState:
        if self.state == "open" and now >= self.until:
            return "half_open"
        return self.state


@final
@attrs.frozen(eq=False)
class CircuitBreaker:
    """Refuses calls for a while after too many failed, then tries a few.

    Closed, it lets all calls through until ``failures`` of them failed within
    ``window`` seconds; successes do not reset the count. Open, it refuses all
    for ``open_for`` seconds. Half-open, it lets exactly ``probes`` calls
    through: it closes when all of them have succeeded, and opens again at the
    first that fails. A cancelled call is neither; it gives its place back.
    Calls from before a change of state change nothing when they end.

    One object may be given to several pools of one trio run: they share its
    state. In another trio run it begins closed. The pattern is that of
    Nygard, "Release It!".
    """

    failures: int = attrs.field(default=5, validator=_check_positive)
    """Failures within ``window`` that open it."""
    window: float = attrs.field(
        default=60.0, validator=valid(check_seconds, zero=False)
    )
    """Seconds that a failure counts; one exactly that old does not.
    ``math.inf`` allowed."""
    open_for: float = attrs.field(
        default=30.0, validator=valid(check_seconds, zero=False)
    )
    """Seconds that it refuses before it tries; ``math.inf``: until `reset`."""
    probes: int = attrs.field(default=1, validator=_check_positive)
    """Calls let through half-open, all of which must succeed."""
    on: tuple[type[Exception], ...] | Callable[[Exception], bool] = attrs.field(
        default=(Exception,), converter=_as_types, validator=_check_on
    )
    """What counts as a failure: exception types, or a predicate. Other errors
    count as successes: the service did answer. A predicate that raises is
    logged, and the error counts as a failure."""
    _circuit: _Circuit = attrs.field(init=False, repr=False, factory=_Circuit)

    @property
    def state(self) -> CircuitState:
        """Closed, open or half-open; open is half-open once its time is over.

        Outside the trio run it is used in, the state that was known last.
        """
        circuit = self._circuit
        return circuit.state_at(circuit.now())

    def reset(self) -> None:
        """Close it and forget all failures; calls under way are not counted.

        Only what is counted since the breaker was made goes on.
        """
        self._circuit.change("closed")

    def statistics(self) -> CircuitStatistics:
        """Return the state and the counts of this moment."""
        circuit = self._circuit
        now = circuit.now()
        return CircuitStatistics(
            state=circuit.state_at(now),
            failures=sum(now - time < self.window for time in circuit.failed),
            refused=circuit.refused,
            opened=circuit.opened,
            probing=circuit.probing,
        )

    def begin(self, run: object) -> None:
        """Forget what happened in another trio run, whose clock was another.

        ``run`` is what tells one run from the next, such as its trio token.
        """
        circuit = self._circuit
        if run is not circuit.run:
            circuit.run = run
            circuit.change("closed")

    def quick_permit(self) -> int | None:
        """Return a permit if that takes no more than a look: it is closed.

        What is let through closed and succeeds need not be handed in.
        """
        circuit = self._circuit
        return circuit.generation if circuit.state == "closed" else None

    def admit(self, now: float) -> int | None:
        """Return a permit for a call, or None if it is refused.

        Every permit is handed in once, to `settle` or to `give_back`.
        """
        circuit = self._circuit
        if circuit.state == "closed":
            return circuit.generation
        if circuit.state == "open" and now >= circuit.until:
            circuit.change("half_open")
        if (
            circuit.state == "half_open"
            # A success keeps its place: were it given away, more than `probes`
            # calls would be let through.
            and circuit.probing + circuit.succeeded < self.probes
        ):
            circuit.probing += 1
            return circuit.generation
        circuit.refused += 1
        return None

    def allows(self, permit: int, now: float) -> bool:
        """Return whether a call that waited under ``permit`` may start now.

        While it waited the breaker may have opened. A permit that is not
        allowed holds no place; the call counts as refused.
        """
        del now  # Time alone lets nobody in who has not asked for a place.
        circuit = self._circuit
        if circuit.state == "closed" or permit == circuit.generation:
            return True
        circuit.refused += 1
        return False

    def renew(self, permit: int) -> int:
        """Return the permit for a call that `allows` has just let start.

        A call that waited from before the breaker opened until after it closed
        starts in the present, and its end counts there.
        """
        circuit = self._circuit
        return circuit.generation if circuit.state == "closed" else permit

    def settle(self, permit: int, error: BaseException | None, now: float) -> None:
        """Hear that a call ended, by a value (None) or by an error."""
        circuit = self._circuit
        if permit != circuit.generation:
            return
        if error is None:
            failed = False
        elif isinstance(error, trio.Cancelled):
            self.give_back(permit)
            return
        else:
            failed = self._is_failure(error)
            # The predicate is the user's code, and may have called `reset`.
            if permit != circuit.generation:
                return
        if circuit.state == "closed":
            if failed:
                self._count(now)
        elif failed:
            circuit.open(now + self.open_for)
        else:
            circuit.probing -= 1
            circuit.succeeded += 1
            if circuit.succeeded >= self.probes:
                circuit.change("closed")

    def give_back(self, permit: int) -> None:
        """Hear that a call was cancelled, dropped or never started."""
        circuit = self._circuit
        if permit == circuit.generation and circuit.probing:
            circuit.probing -= 1

    def reopens_in(self, now: float) -> float:
        """Return the seconds until a call has a chance, 0 if it has one now.

        While all places for probes are taken nobody knows. Then it is
        ``open_for``: were a probe to fail now, that is how long it would take.
        """
        circuit = self._circuit
        if circuit.state == "open":
            seconds = max(0.0, circuit.until - now)
            # The difference may be rounded down; who sleeps that long must not
            # be a moment too early, for ever on a clock that stands still.
            while now + seconds < circuit.until:
                seconds = math.nextafter(seconds, math.inf)
            return seconds
        if circuit.probing + circuit.succeeded >= self.probes:
            return self.open_for
        return 0.0

    def _count(self, now: float) -> None:
        failed = self._circuit.failed
        while failed and now - failed[0] >= self.window:
            failed.popleft()
        failed.append(now)
        # Opening empties it, so it never holds more than `failures` times.
        if len(failed) >= self.failures:
            self._circuit.open(now + self.open_for)

    def _is_failure(self, error: BaseException) -> bool:
        on = self.on
        if isinstance(on, tuple):
            return isinstance(error, on)
        if not isinstance(error, Exception):
            return False
        try:
            return bool(on(error))
        except Exception:
            log.exception("on=%r of a CircuitBreaker raised; a failure is counted", on)
            return True
