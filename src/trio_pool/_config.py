"""The options of a pool: what each means, its default, and what it accepts."""

import itertools
import math
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, Self, TypeAlias, TypedDict, final

import attrs
import trio

from ._checks import (
    are_errors,
    as_tuple,
    as_types,
    check_bound,
    check_choice,
    check_count,
    check_kind,
    check_seconds,
    is_async,
    refuse,
    valid,
)
from ._events import Hooks, WorkerSnapshot
from ._guards import CircuitBreaker, Rate
from ._policy import Autoscale, Restart, Retry

Overflow = Literal["wait", "reject", "drop_oldest"]
Unobserved = Literal["raise", "log", "ignore"]
Middleware: TypeAlias = Callable[[Any, Any], Awaitable[Any]]
Plugin: TypeAlias = AbstractAsyncContextManager[Any]
Choose: TypeAlias = Callable[[Sequence[WorkerSnapshot]], WorkerSnapshot]

_names = itertools.count(1)


def _check_restart(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, Restart):
        raise TypeError(refuse(field.name, value, "a Restart"))


def _check_name(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(refuse(field.name, value, "a str"))
    if not value:
        raise ValueError(refuse(field.name, value, "a str that is not empty"))


def _check_types(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if not are_errors(value):
        expected = "a tuple of Exception subclasses"
        raise TypeError(refuse(field.name, value, expected))


def _check_hooks(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    expected = "a sequence of Hooks objects"
    if not isinstance(value, tuple) or not all(isinstance(h, Hooks) for h in value):
        raise TypeError(refuse(field.name, value, expected))


def _check_middleware(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    expected = "a sequence of async callables (job, call_next) -> result"
    if not isinstance(value, tuple) or not all(map(is_async, value)):
        raise TypeError(refuse(field.name, value, expected))


def _check_plugins(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if not isinstance(value, tuple) or not all(
        hasattr(type(plugin), "__aenter__") and hasattr(type(plugin), "__aexit__")
        for plugin in value
    ):
        expected = "a sequence of async context managers, made and not yet entered"
        raise TypeError(refuse(field.name, value, expected))
    names = [plugin_name(plugin) for plugin in value]
    for name in names:
        if names.count(name) > 1:
            expected = f"plugins of different names, not several {name!r}"
            raise ValueError(refuse(field.name, value, expected))


def _check_choose(_: object, field: "attrs.Attribute[Any]", value: object) -> None:
    if value is not None and (not callable(value) or is_async(value)):
        expected = "a sync callable (idle workers) -> one of them, or None"
        raise TypeError(refuse(field.name, value, expected))


def plugin_name(plugin: object) -> str:
    """Return what a plugin is called.

    That is its ``name``, if it has one; or the name of the function decorated
    by ``@asynccontextmanager`` that made it; or that of its class.
    """
    name = getattr(plugin, "name", None)
    if not (isinstance(name, str) and name) and hasattr(plugin, "gen"):
        name = getattr(getattr(plugin, "func", None), "__name__", None)
    return name if isinstance(name, str) and name else type(plugin).__name__


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
        default=8, validator=valid(check_count), metadata={"env": int}
    )
    """Workers wanted; 0 is legal: jobs wait. With ``scale`` this is not looked
    at: the pool starts with ``scale.min`` workers."""
    max_backlog: float = attrs.field(
        default=1024, validator=valid(check_bound), metadata={"env": _env_count}
    )
    """Jobs that wait at most, queued and delayed together; 0 hands over to idle
    workers only. Jobs that go back, because they are tried again or because a
    dying worker had not started them, may pass it by ``size`` at most."""
    overflow: Overflow = attrs.field(
        default="wait", validator=check_choice(Overflow), metadata={"env": str}
    )
    """What a full backlog does to a new job, or to the oldest waiting one."""
    timeout: float = attrs.field(
        default=math.inf,
        validator=valid(check_seconds, zero=False),
        metadata={"env": float},
    )
    """Seconds that a job may run, counted from its start."""
    retry: Retry | None = attrs.field(
        default=None, validator=check_kind(Retry, "a Retry")
    )
    """When a failed job is tried again; None never does. Meanwhile the job
    waits and holds no worker. A job's own ``retry`` takes its place."""
    restart: Restart = attrs.field(factory=Restart, validator=_check_restart)
    """Restart budget and backoff of a worker slot."""
    crash_on: tuple[type[Exception], ...] = attrs.field(
        default=(), converter=as_types, validator=_check_types
    )
    """Exception types from a handler that mean "this worker is broken"."""
    grace: float = attrs.field(
        default=math.inf, validator=valid(check_seconds), metadata={"env": float}
    )
    """Seconds that closing waits for accepted jobs before cancelling them."""
    middleware: tuple[Middleware, ...] = attrs.field(
        default=(), converter=as_tuple, validator=_check_middleware
    )
    """Async callables ``(job, call_next) -> result`` around each run of a
    handler; the first is the outermost."""
    hooks: tuple[Hooks, ...] = attrs.field(
        default=(), converter=as_tuple, validator=_check_hooks
    )
    """What to call as things happen; see `Hooks`."""
    plugins: tuple[Plugin, ...] = attrs.field(
        default=(), converter=as_tuple, validator=_check_plugins
    )
    """Async context managers around the pool's life, each of another name. The
    ``hooks`` and ``middleware`` that they have are added to the pool's. One made
    by ``@asynccontextmanager`` can be entered once, so by one pool."""
    rate: Rate | None = attrs.field(default=None, validator=check_kind(Rate, "a Rate"))
    """How many jobs may start in a time; pools that share one share the rate."""
    breaker: CircuitBreaker | None = attrs.field(
        default=None, validator=check_kind(CircuitBreaker, "a CircuitBreaker")
    )
    """What refuses jobs at once, by `CircuitOpen`, after too many have failed."""
    scale: Autoscale | None = attrs.field(
        default=None, validator=check_kind(Autoscale, "an Autoscale")
    )
    """How the number of workers follows the work; None keeps to ``size``."""
    max_jobs: float = attrs.field(
        default=math.inf,
        validator=valid(check_bound, zero=False),
        metadata={"env": _env_count},
    )
    """Jobs that a worker starts before it is replaced, which is no crash."""
    max_age: float = attrs.field(
        default=math.inf,
        validator=valid(check_seconds, zero=False),
        metadata={"env": float},
    )
    """Seconds after its setup at which a worker is replaced, between two jobs."""
    max_idle: float = attrs.field(
        default=math.inf,
        validator=valid(check_seconds, zero=False),
        metadata={"env": float},
    )
    """Seconds without a job after which a worker is replaced."""
    limiter: trio.CapacityLimiter | None = attrs.field(
        default=None,
        validator=check_kind(trio.CapacityLimiter, "a trio.CapacityLimiter"),
    )
    """A token of it is held while a job runs; other pools and code may share
    it."""
    choose: Choose | None = attrs.field(default=None, validator=_check_choose)
    """Which of the idle workers gets a job: called with the snapshot of each,
    returns one of them, as `random.choice` does. None leaves it to the pool."""
    aging: float = attrs.field(
        default=math.inf,
        validator=valid(check_seconds, zero=False),
        metadata={"env": float},
    )
    """Seconds of waiting that count as one priority more, so that no job waits
    for ever behind more urgent ones; ``math.inf``: waiting counts nothing."""
    unobserved: Unobserved = attrs.field(
        default="raise", validator=check_choice(Unobserved), metadata={"env": str}
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

        Plain are the numbers and strings: ``POOL_SIZE``, ``POOL_MAX_BACKLOG``,
        ``POOL_OVERFLOW``, ``POOL_TIMEOUT``, ``POOL_GRACE``, ``POOL_MAX_JOBS``,
        ``POOL_MAX_AGE``, ``POOL_MAX_IDLE``, ``POOL_AGING``,
        ``POOL_UNOBSERVED`` and ``POOL_NAME``. Those that are not set keep
        their defaults; ``inf`` is ``math.inf``.

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
    retry: Retry | None
    restart: Restart
    crash_on: type[Exception] | Sequence[type[Exception]]
    grace: float
    middleware: Sequence[Middleware]
    hooks: Sequence[Hooks]
    plugins: Sequence[Plugin]
    rate: Rate | None
    breaker: CircuitBreaker | None
    scale: Autoscale | None
    max_jobs: float
    max_age: float
    max_idle: float
    limiter: trio.CapacityLimiter | None
    choose: Choose | None
    aging: float
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
