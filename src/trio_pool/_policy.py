"""The frozen values that users set: the pool's options, restarts and backoff."""

import itertools
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, TypedDict, final, get_args

import attrs

from ._events import Hooks

Overflow = Literal["wait", "reject", "drop_oldest"]
Unobserved = Literal["raise", "log", "ignore"]

_names = itertools.count(1)


def refuse(option: str, value: object, expected: str) -> str:
    """Word the error for a bad value: the option, the value, what was expected."""
    return f"{option} must be {expected}, got {value!r}"


def check_count(option: str, value: object) -> None:
    """Accept a whole number, 0 or more."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(refuse(option, value, "an int, 0 or more"))
    if value < 0:
        raise ValueError(refuse(option, value, "an int, 0 or more"))


def check_bound(option: str, value: object) -> None:
    """Accept a whole number, 0 or more, or ``math.inf``."""
    if value != math.inf:
        if isinstance(value, float):
            raise TypeError(refuse(option, value, "an int, 0 or more, or math.inf"))
        check_count(option, value)


def check_seconds(
    option: str, value: object, *, zero: bool = True, infinite: bool = True
) -> None:
    """Accept a number of seconds; ``math.inf`` stands for "for ever"."""
    expected = f"a number of seconds {'>= 0' if zero else '> 0'}"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(refuse(option, value, expected))
    if math.isnan(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(refuse(option, value, expected))
    if math.isinf(value) and not infinite:
        raise ValueError(refuse(option, value, f"{expected}, and finite"))


def check_priority(value: object) -> None:
    """Accept any int."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(refuse("priority", value, "an int, higher first"))


_Check = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _valid(check: Callable[..., None], **how: bool) -> _Check:
    def validate(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
        check(field.name, value, **how)

    return validate


def _check_choice(kind: object) -> _Check:
    choices = get_args(kind)

    def validate(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
        if value not in choices:
            expected = "one of " + ", ".join(map(repr, choices))
            raise ValueError(refuse(field.name, value, expected))

    return validate


def _check_factor(_: object, field: "attrs.Attribute[Any]", value: Any) -> None:
    check_seconds("factor", value, zero=False, infinite=False)
    if value < 1:
        raise ValueError(refuse(field.name, value, "a number >= 1"))


def _check_jitter(_: object, field: "attrs.Attribute[Any]", value: Any) -> None:
    check_seconds("jitter", value)
    if value > 1:
        raise ValueError(refuse(field.name, value, "a number from 0 to 1"))


def _check_backoff(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if not callable(value):
        expected = "a Backoff or a callable (attempt) -> seconds"
        raise TypeError(refuse(field.name, value, expected))


def _check_restart(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, Restart):
        raise TypeError(refuse(field.name, value, "a Restart"))


def _check_name(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(refuse(field.name, value, "a str"))
    if not value:
        raise ValueError(refuse(field.name, value, "a str that is not empty"))


def _check_hooks(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    expected = "a sequence of Hooks objects"
    if not isinstance(value, tuple) or not all(isinstance(h, Hooks) for h in value):
        raise TypeError(refuse(field.name, value, expected))


def _check_types(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, tuple) or not all(
        isinstance(t, type) and issubclass(t, Exception) for t in value
    ):
        expected = "a tuple of Exception subclasses"
        raise TypeError(refuse(field.name, value, expected))


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _as_types(value: Any) -> Any:
    return (value,) if isinstance(value, type) else _as_tuple(value)


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
        default=0.1, validator=_valid(check_seconds, infinite=False)
    )
    """Seconds of the first wait."""
    factor: float = attrs.field(default=2.0, validator=_check_factor)
    """What each wait is multiplied by to give the next; 1 or more."""
    maximum: float = attrs.field(default=30.0, validator=_valid(check_seconds))
    """Seconds that no wait exceeds."""
    jitter: float = attrs.field(default=0.5, validator=_check_jitter)
    """The share of a wait, 0 to 1, that chance may take off."""

    def __call__(
        self, attempt: int, draw: Callable[[], float] = random.random
    ) -> float:
        """Return wait number ``attempt`` (from 0), in seconds.

        ``draw`` returns chance, uniform from 0 to 1.
        """
        try:
            wait = min(self.maximum, self.initial * self.factor**attempt)
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

    limit: float = attrs.field(default=5, validator=_valid(check_bound))
    """Crashes that are forgiven within the window; ``math.inf`` allowed."""
    within: float = attrs.field(
        default=60.0, validator=_valid(check_seconds, zero=False)
    )
    """Length of the window, in seconds."""
    backoff: Callable[[int], float] = attrs.field(
        factory=Backoff, validator=_check_backoff
    )
    """A `Backoff`, or any callable from the number of the wait to seconds."""


def _env_count(text: str) -> float:
    return math.inf if text.strip().lower() == "inf" else int(text)


@final
@attrs.frozen(kw_only=True)
class PoolConfig:
    """Every option of a pool as one frozen, validated value.

    Give it to `open_pool` in the place of the size. `attrs.evolve` makes a
    changed copy, `from_env` reads the plain options from the environment.
    """

    size: int = attrs.field(
        default=8, validator=_valid(check_count), metadata={"env": int}
    )
    """Workers wanted; 0 is legal: jobs wait."""
    max_backlog: float = attrs.field(
        default=1024, validator=_valid(check_bound), metadata={"env": _env_count}
    )
    """Jobs that wait at most; 0 hands over to idle workers only. Jobs that a
    dying worker had not started yet go back and may pass it by ``size``."""
    overflow: Overflow = attrs.field(
        default="wait", validator=_check_choice(Overflow), metadata={"env": str}
    )
    """What a full backlog does to a new job, or to the oldest waiting one."""
    timeout: float = attrs.field(
        default=math.inf,
        validator=_valid(check_seconds, zero=False),
        metadata={"env": float},
    )
    """Seconds that a job may run, counted from its start."""
    restart: Restart = attrs.field(factory=Restart, validator=_check_restart)
    """Restart budget and backoff of a worker slot."""
    crash_on: tuple[type[Exception], ...] = attrs.field(
        default=(), converter=_as_types, validator=_check_types
    )
    """Exception types from a handler that mean "this worker is broken"."""
    grace: float = attrs.field(
        default=math.inf, validator=_valid(check_seconds), metadata={"env": float}
    )
    """Seconds that closing waits for accepted jobs before cancelling them."""
    hooks: tuple[Hooks, ...] = attrs.field(
        default=(), converter=_as_tuple, validator=_check_hooks
    )
    """What to call as things happen; see `Hooks`."""
    unobserved: Unobserved = attrs.field(
        default="raise", validator=_check_choice(Unobserved), metadata={"env": str}
    )
    """What becomes of failures of submitted jobs that nobody read."""
    name: str = attrs.field(
        factory=lambda: f"pool-{next(_names)}",
        validator=_check_name,
        metadata={"env": str},
    )
    """The pool's name in logs and errors."""

    @classmethod
    def from_env(
        cls, prefix: str = "POOL_", environ: Mapping[str, str] | None = None
    ) -> Self:
        """Read the plain options from environment variables.

        ``POOL_SIZE``, ``POOL_MAX_BACKLOG``, ``POOL_OVERFLOW``, ``POOL_TIMEOUT``,
        ``POOL_GRACE``, ``POOL_UNOBSERVED`` and ``POOL_NAME`` are looked up;
        those that are not set keep their defaults.

        Raises:
          ValueError: a variable has a bad value; the message names it.
        """
        variables = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for field in attrs.fields(cls):
            variable = prefix + field.name.upper()
            parse = field.metadata.get("env")
            if parse is None or variable not in variables:
                continue
            try:
                values[field.name] = parse(variables[variable])
                cls(**{field.name: values[field.name]})
            except ValueError as error:
                raise ValueError(
                    f"{variable}={variables[variable]!r}: {error}"
                ) from None
        return cls(**values)


class PoolOptions(TypedDict, total=False):
    """The keyword options of `open_pool`; `PoolConfig` describes each."""

    max_backlog: float
    overflow: Overflow
    timeout: float
    restart: Restart
    crash_on: type[Exception] | Sequence[type[Exception]]
    grace: float
    hooks: Sequence[Hooks]
    unobserved: Unobserved
    name: str


def make_config(size: int | PoolConfig, options: Mapping[str, Any]) -> PoolConfig:
    """Merge a size or a config with keyword options into one valid config."""
    known = PoolOptions.__annotations__
    for option in options:
        if option not in known:
            raise TypeError(
                f"open_pool has no option {option!r}; it has "
                + ", ".join(sorted(known))
            )
    if isinstance(size, PoolConfig):
        return attrs.evolve(size, **options)
    return PoolConfig(size=size, **options)
