"""What a simulation is given: how jobs arrive, and how long each takes."""

import math
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from itertools import count, pairwise, repeat
from statistics import NormalDist
from typing import Any, Literal, Protocol, Self, TypeAlias, final

import attrs

from .._checks import check_choice, check_count, check_seconds, refuse, valid

Order = Literal["drawn", "replayed"]

_seconds = valid(check_seconds, infinite=False)
_some_seconds = valid(check_seconds, zero=False, infinite=False)


def _check_rate(_: object, field: "attrs.Attribute[Any]", value: Any) -> None:
    expected = "a finite number of jobs a second > 0"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(refuse(field.name, value, expected))
    # The mean gap has to be a number of seconds too.
    if not 0 < value < math.inf or 1 / value == math.inf:
        raise ValueError(refuse(field.name, value, expected))


def _check_sigma(_: object, field: "attrs.Attribute[Any]", value: Any) -> None:
    expected = "a finite number >= 0"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(refuse(field.name, value, expected))
    if not 0 <= value < math.inf:
        raise ValueError(refuse(field.name, value, expected))


def _as_seconds(times: object) -> tuple[float, ...]:
    if isinstance(times, str) or not isinstance(times, Iterable):
        raise TypeError(refuse("times", times, "an iterable of numbers of seconds"))
    found = tuple(times)
    for index, seconds in enumerate(found):
        check_seconds(f"times[{index}]", seconds, infinite=False)
    return found


def _check_some(_: object, field: "attrs.Attribute[Any]", value: Any) -> None:
    if not value:
        raise ValueError(refuse(field.name, value, "at least one number of seconds"))


def _check_rising(_: object, field: "attrs.Attribute[Any]", value: Any) -> None:
    for index, (before, after) in enumerate(pairwise(value)):
        if after < before:
            expected = f"times[{index}] ({before!r}) or later"
            raise ValueError(refuse(f"times[{index + 1}]", after, expected))


# ----------------------------------------------------------------------
# How long a job takes.

Draw: TypeAlias = Callable[[random.Random], float]
"""Draws a number of seconds by the chance that it is given."""

HandlerModel: TypeAlias = Draw | Callable[[random.Random], Awaitable[object]]
"""What stands for the handler: draws how long a job takes, or is one itself."""


@final
@attrs.frozen
class Constant:
    """Every job takes the same time."""

    seconds: float = attrs.field(validator=_seconds)
    """How long, in seconds."""

    def __call__(self, chance: random.Random, /) -> float:
        """Return the time, in seconds."""
        return self.seconds


@final
@attrs.frozen
class Exponential:
    """Most jobs are short, some are long: the memoryless M of queueing theory."""

    mean: float = attrs.field(validator=_some_seconds)
    """Their mean, in seconds."""

    def __call__(self, chance: random.Random, /) -> float:
        """Draw a time, in seconds."""
        return chance.expovariate(1 / self.mean)


@final
@attrs.frozen
class Uniform:
    """Any time between two is as likely as any other."""

    low: float = attrs.field(validator=_seconds)
    """The shortest, in seconds."""
    high: float = attrs.field(validator=_seconds)
    """The longest, in seconds."""

    def __attrs_post_init__(self) -> None:
        if self.high < self.low:
            expected = f"a number of seconds >= low ({self.low!r})"
            raise ValueError(refuse("high", self.high, expected))

    def __call__(self, chance: random.Random, /) -> float:
        """Draw a time, in seconds."""
        return chance.uniform(self.low, self.high)


@final
@attrs.frozen
class LogNormal:
    """Half of the jobs are shorter than the median, a few very much longer.

    The logarithm of the time is normal around ``log(median)``. What calls over
    a network take is often near to this; see `from_percentiles`.
    """

    median: float = attrs.field(validator=_some_seconds)
    """Seconds that half of the jobs do not exceed."""
    sigma: float = attrs.field(validator=_check_sigma)
    """The standard deviation of the logarithm: 0 is `Constant`, 1 a long tail."""

    @classmethod
    def from_percentiles(cls, *, p50: float, p99: float) -> Self:
        """Fit to the median and the 99th percentile of what was measured."""
        check_seconds("p50", p50, zero=False, infinite=False)
        check_seconds("p99", p99, zero=False, infinite=False)
        if p99 < p50:
            expected = f"a number of seconds >= p50 ({p50!r})"
            raise ValueError(refuse("p99", p99, expected))
        return cls(p50, math.log(p99 / p50) / NormalDist().inv_cdf(0.99))

    @property
    def mean(self) -> float:
        """The mean, in seconds: ``median * exp(sigma ** 2 / 2)``."""
        return self.median * math.exp(self.sigma**2 / 2)

    def __call__(self, chance: random.Random, /) -> float:
        """Draw a time, in seconds."""
        return self.median * math.exp(chance.gauss(0.0, self.sigma))


@final
@attrs.frozen
class Recorded:
    """Jobs take what others took: times that were measured before."""

    times: Sequence[float] = attrs.field(converter=_as_seconds, validator=_check_some)
    """The times, in seconds."""
    order: Order = attrs.field(
        default="drawn", kw_only=True, validator=check_choice(Order)
    )
    """Drawn at random, each as likely as any other; or replayed one after
    another, and again from the first. Tries after the first are drawn."""

    def __call__(self, chance: random.Random, /) -> float:
        """Draw a time, in seconds."""
        return chance.choice(self.times)


# ----------------------------------------------------------------------
# How jobs arrive.


class Arrivals(Protocol):
    """When jobs arrive; any object with this method will do."""

    def arrivals(self, chance: random.Random, /) -> Iterator[float]:
        """Draw when each job arrives, in seconds from the start, in order."""
        ...


ArrivalModel: TypeAlias = Arrivals | Iterable[float] | Draw
"""What says when jobs arrive: `Arrivals`, gaps in seconds, or a draw of them."""


@final
@attrs.frozen
class Poisson:
    """Callers who do not know of each other: gaps are exponential."""

    rate: float = attrs.field(validator=_check_rate)
    """Jobs a second, in the long run."""

    def arrivals(self, chance: random.Random, /) -> Iterator[float]:
        """Draw when each job arrives, in seconds from the start."""
        draw, rate, now = chance.expovariate, self.rate, 0.0
        while True:
            now += draw(rate)
            yield now


@final
@attrs.frozen
class Regular:
    """Jobs come one by one, as a clock ticks, the first after one gap."""

    rate: float = attrs.field(validator=_check_rate)
    """Jobs a second."""

    def arrivals(self, chance: random.Random, /) -> Iterator[float]:
        """Return when each job arrives, in seconds from the start."""
        return (number / self.rate for number in count(1))


@final
@attrs.frozen
class Bursts:
    """Several jobs come in the same instant, then none for a while."""

    size: int = attrs.field(validator=valid(check_count, zero=False))
    """Jobs that come at once."""
    pause: float = attrs.field(validator=_some_seconds)
    """Seconds before each burst."""

    def arrivals(self, chance: random.Random, /) -> Iterator[float]:
        """Return when each job arrives, in seconds from the start."""
        for number in count(1):
            yield from repeat(number * self.pause, self.size)


@final
@attrs.frozen
class OnOff:
    """Callers who do not know of each other, but keep the same hours.

    While it is on, this is `Poisson`; while it is off, nobody comes. It begins
    on. Both last for exponential times, of the means ``on`` and ``off``: the
    interrupted Poisson process of Kuczura (Bell System Technical Journal 52,
    1973). In the long run ``rate * on / (on + off)`` jobs come a second.
    """

    rate: float = attrs.field(validator=_check_rate)
    """Jobs a second while it is on."""
    on: float = attrs.field(validator=_some_seconds)
    """The mean time that it is on, in seconds."""
    off: float = attrs.field(validator=_some_seconds)
    """The mean time that it is off, in seconds."""

    def arrivals(self, chance: random.Random, /) -> Iterator[float]:
        """Draw when each job arrives, in seconds from the start."""
        draw, now = chance.expovariate, 0.0
        while True:
            until = now + draw(1 / self.on)
            # What is left of a gap as it turns off is forgotten: it has no memory.
            while (now := now + draw(self.rate)) <= until:
                yield now
            now = until + draw(1 / self.off)


@final
@attrs.frozen
class Trace:
    """Jobs come when others came: the times of a log."""

    times: Sequence[float] = attrs.field(converter=_as_seconds, validator=_check_rising)
    """When each comes, in seconds from the start, the earliest first."""

    def arrivals(self, chance: random.Random, /) -> Iterator[float]:
        """Return when each job arrives, in seconds from the start."""
        return iter(self.times)
