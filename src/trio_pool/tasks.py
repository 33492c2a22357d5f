"""The frozen, reusable definition of one async call: `Task`."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, Generic, TypeVarTuple, final, overload

import attrs
import trio

from ._checks import (
    check_key,
    check_kind,
    check_priority,
    check_seconds,
    is_async,
    refuse,
    valid,
)
from ._errors import JobTimeout
from ._events import Out
from ._policy import Retry, note_attempts
from .drain import Drain

Args = TypeVarTuple("Args")

_optional = attrs.validators.optional


def _check_fn(_: object, field: attrs.Attribute[Any], value: Any) -> None:
    if not callable(value) or not is_async(value):
        raise TypeError(refuse(field.name, value, "an async function"))


def _check_priority(_: object, field: attrs.Attribute[Any], value: object) -> None:
    check_priority(value)


def _check_id(_: object, field: attrs.Attribute[Any], value: object) -> None:
    expected = "a str that is not empty"
    if not isinstance(value, str):
        raise TypeError(refuse(field.name, value, expected))
    if not value:
        raise ValueError(refuse(field.name, value, expected))


@final
@attrs.frozen(init=False)
class Task(Generic[Out]):
    """One async call, ready to be run any number of times; it never changes.

    Each ``with_`` method returns another `Task` with that option set, in any
    order; None takes the option off. What is not set is up to the pool::

        fetch_task = Task(fetch, url).with_retry(attempts=3).with_timeout(1.5)
        page = await fetch_task.run()
        async with open_pool(8) as pool:
            pool.go(fetch_task, fetch_task.with_input(other_url))

    Raises:
      TypeError: ``fn`` is not an async function.
    """

    fn: Callable[..., Awaitable[Out]] = attrs.field(validator=_check_fn)
    """The async function to call."""
    args: tuple[Any, ...] = ()
    """What it is called with."""
    timeout: float | None = attrs.field(
        default=None, validator=_optional(valid(check_seconds, zero=False))
    )
    """Seconds that one attempt may run."""
    priority: int | None = attrs.field(
        default=None, validator=_optional(_check_priority)
    )
    """Higher goes first; only a pool heeds it."""
    key: Hashable = attrs.field(default=None, validator=valid(check_key))
    """Jobs with the same key run one after the other; only a pool heeds it."""
    delay: float | None = attrs.field(
        default=None, validator=_optional(valid(check_seconds, infinite=False))
    )
    """Seconds to wait before the first attempt."""
    ttl: float | None = attrs.field(
        default=None, validator=_optional(valid(check_seconds, zero=False))
    )
    """Seconds that it may wait for its start; only a pool heeds it."""
    retry: Retry | None = attrs.field(
        default=None, validator=check_kind(Retry, "a Retry")
    )
    """Which failures are tried again, how often and when."""
    drain: Drain[Out] | None = attrs.field(
        default=None, validator=check_kind(Drain, "a Drain")
    )
    """Where its result is sent."""
    id: str | None = attrs.field(default=None, validator=_optional(_check_id))
    """The job's id."""

    @overload
    def __init__(
        self,
        fn: Callable[[*Args], Awaitable[Out]],
        /,
        *args: *Args,
    ) -> None: ...
    @overload
    def __init__(self, fn: Callable[..., Awaitable[Out]], /) -> None: ...
    def __init__(self, fn: Callable[..., Awaitable[Out]], /, *args: object) -> None:
        task: Any = self
        task.__attrs_init__(fn, args)

    def _with(self, **changes: Any) -> Task[Out]:
        values = {field.name: getattr(self, field.name) for field in attrs.fields(Task)}
        task: Any = object.__new__(Task)
        task.__attrs_init__(**(values | changes))
        return task  # type: ignore[no-any-return]  # made of the same fn

    def with_input(self, *args: Any) -> Task[Out]:
        """Replace what the function is called with."""
        return self._with(args=args)

    @overload
    def with_retry(self, retry: Retry | None, /) -> Task[Out]: ...
    @overload
    def with_retry(self, *args: Any, **kwargs: Any) -> Task[Out]: ...
    def with_retry(self, *args: Any, **kwargs: Any) -> Task[Out]:
        """Set the retry policy: a `Retry`, or the arguments of one.

        ``attempts`` counts all of them: the function of
        ``Task(fetch).with_retry(attempts=3)`` is called three times at most.
        """
        if len(args) == 1 and not kwargs and isinstance(args[0], Retry | None):
            return self._with(retry=args[0])
        return self._with(retry=Retry(*args, **kwargs))

    def with_timeout(self, seconds: float | None) -> Task[Out]:
        """Set the seconds that one attempt may run."""
        return self._with(timeout=seconds)

    def with_priority(self, priority: int | None) -> Task[Out]:
        """Set the priority: higher goes first. Only a pool heeds it."""
        return self._with(priority=priority)

    def with_key(self, key: Hashable) -> Task[Out]:
        """Set the key: one job of a key at a time. Only a pool heeds it."""
        return self._with(key=key)

    def with_delay(self, seconds: float | None) -> Task[Out]:
        """Set the seconds to wait before the first attempt."""
        return self._with(delay=seconds)

    def with_ttl(self, seconds: float | None) -> Task[Out]:
        """Set the seconds that it may wait for its start. Only a pool heeds it."""
        return self._with(ttl=seconds)

    def with_id(self, id: str | None) -> Task[Out]:  # noqa: A002  # the option's name
        """Set the job's id."""
        return self._with(id=id)

    def drain_to(self, drain: Drain[Out] | None) -> Task[Out]:
        """Set the drain that every result is sent to."""
        return self._with(drain=drain)

    @property
    def options(self) -> dict[str, Any]:
        """The options that are set, as keyword arguments of `TaskPool.submit`."""
        return {
            field.name: value
            for field in attrs.fields(Task)
            if field.name not in {"fn", "args"}
            and (value := getattr(self, field.name)) is not None
        }

    async def run(self) -> Out:
        """Run it here, without a pool, and return its result.

        Waits ``delay``, runs each attempt under ``timeout``, tries again as
        ``retry`` says, and sends the result to ``drain``. The function keeps
        its own errors and is cancelled with the caller; a cancellation is
        never tried again. If it finishes although its timeout has struck, its
        result wins. ``priority``, ``key`` and ``ttl`` mean nothing here.

        Raises:
          JobTimeout: the last attempt ran longer than ``timeout``.
        """
        if self.delay is not None:
            await trio.sleep(self.delay)
        began = trio.current_time()
        attempts = 1
        while True:
            try:
                result = await self._attempt(attempts)
                break
            except Exception as error:
                if self.retry is None:
                    raise
                elapsed = trio.current_time() - began
                wait = self.retry.next_wait(error, attempts, elapsed, crashed=False)
                if wait is None:
                    note_attempts(error, attempts)
                    raise
            # Outside the except block: what fails next is no part of this error.
            await trio.sleep(wait)
            attempts += 1
        if self.drain is not None:
            self.drain.send(result)
        return result

    async def _attempt(self, attempts: int) -> Out:
        timeout = math.inf if self.timeout is None else self.timeout
        with trio.CancelScope(deadline=trio.current_time() + timeout):
            return await self.fn(*self.args)
        # Only a cancellation by this very scope comes here.
        raise JobTimeout(self.id or 0, True, attempts, None, timeout)
