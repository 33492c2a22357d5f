"""This end of a worker whose jobs run elsewhere: what is sent, and what comes back."""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol, Self, final

import outcome

from .._checks import check_count, is_async, refuse
from .._errors import WorkerGone
from ._errors import EngineError, PayloadWarning, RemoteError
from ._shim import ERROR, EXIT, HERE, KEPT, UNSENT, VALUE, Fate, Report, pack

PAYLOAD = 10_000_000
"""Bytes from which on a job is warned of: pickling them takes 8 to 30 ms."""


class Engine(Protocol):
    """One worker's other end."""

    @property
    def spent(self) -> bool:
        """Whether it was stopped, together with a job that was cancelled."""
        ...

    async def call(self, items: list[bytes]) -> Report:
        """Have items run, one after the other.

        Cancelled, it is over with the call at the other end before this returns.

        Raises:
          WorkerGone: the other end is lost.
        """
        ...


OpenWorker = Callable[[], AbstractAsyncContextManager[Callable[[Any], Awaitable[Any]]]]


@final
class Workers:
    """Workers that share something, such as a cluster, as long as their pool is."""

    def __init__(
        self, open_shared: Callable[[int], AbstractAsyncContextManager[OpenWorker]]
    ) -> None:
        self._open_shared = open_shared

    def around_pool(self, size: int) -> AbstractAsyncContextManager[OpenWorker]:
        """Open what the workers of a pool of this size share, around its life."""
        return self._open_shared(size)

    @asynccontextmanager
    async def __call__(self) -> AsyncGenerator[Callable[[Any], Awaitable[Any]], None]:
        """Open one worker that shares it with nobody."""
        async with self._open_shared(1) as open_worker:
            async with open_worker() as handler:
                yield handler


@final
class Payloads:
    """Warns once of jobs that are too large to be sent."""

    def __init__(self, warn_above: int) -> None:
        check_count("warn_above", warn_above, zero=False)
        self._most = warn_above
        self._has_warned = False

    def look(self, size: int, what: str) -> None:
        """Warn if this many bytes are more than should be sent."""
        if size > self._most and not self._has_warned:
            self._has_warned = True
            text = (
                f"trio_pool: the {what} of a job takes {size:,} bytes, more than "
                f"warn_above={self._most:,}; pickling so much holds up trio's loop: "
                "pass paths or handles instead"
            )
            warnings.warn(PayloadWarning(text), stacklevel=3)


@final
class Remote:
    """The handler of a worker whose jobs run at the other end of an engine."""

    def __init__(self, engine: Engine, payloads: Payloads) -> None:
        self._engine = engine
        self._payloads = payloads

    @property
    def spent(self) -> bool:
        """Whether the worker has to be replaced, as planned."""
        return self._engine.spent

    @property
    def __trio_pool__(self) -> Self:
        return self

    async def __call__(self, job_input: Any) -> Any:
        """Run a job."""
        outcomes, _ = await self.many([job_input])
        return unwrap(outcomes)

    async def many(self, items: list[Any]) -> tuple[list[outcome.Outcome[Any]], float]:
        """Run several jobs in one call; return their outcomes, and the seconds."""
        packed: list[bytes] = []
        unsendable: dict[int, outcome.Error] = {}
        for number, item in enumerate(items):
            try:
                packed.append(pack(item))
            except Exception as error:
                name = f"{type(item).__module__}.{type(item).__qualname__}"
                reason = f"{type(error).__name__}: {error}"
                refused = RemoteError("argument", name, reason, False)
                unsendable[number] = outcome.Error(refused)
        self._payloads.look(sum(map(len, packed)), "argument")
        seconds: float = 0.0
        fates: list[Fate] = []
        if packed:
            seconds, fates = await self._engine.call(packed)
        results = opened(fates, len(packed), self._payloads)
        for number in sorted(unsendable):
            results.insert(number, unsendable[number])
        return results, seconds


def unwrap(outcomes: list[outcome.Outcome[Any]]) -> Any:
    """Return the value of the one outcome there is, or raise its error."""
    result = outcomes.pop()
    if isinstance(result, outcome.Value):
        return result.value
    assert isinstance(result, outcome.Error)
    try:
        raise result.error
    finally:
        del result


def opened(
    fates: list[Fate], expected: int, payloads: Payloads
) -> list[outcome.Outcome[Any]]:
    """Make outcomes of what has come back; of what never started too."""
    results = [_open(fate, payloads) for fate in fates]
    return never_begun(results, expected)


def never_begun(
    results: list[outcome.Outcome[Any]], expected: int
) -> list[outcome.Outcome[Any]]:
    """Add what stands for the items of a call that nobody has begun with."""
    never = WorkerGone(started=False)
    return results + [outcome.Error(never)] * (expected - len(results))


def _open(fate: Fate, payloads: Payloads) -> outcome.Outcome[Any]:
    how, what = fate
    if how == KEPT:
        return outcome.Value(what)
    if how == HERE:
        return outcome.Error(_as_error(what))
    if how == UNSENT:
        part, name, reason, text, kind = what
        started = part != "argument"
        error = RemoteError(part, name if started else "", reason, started, text)
        return outcome.Error(_gone(error) if kind == EXIT else error)
    assert how in (VALUE, ERROR, EXIT)
    payloads.look(len(what), "result")
    try:
        thing = pickle.loads(what)
    except Exception as error:
        part = "result" if how == VALUE else "error"
        reason = f"{type(error).__name__}: {error}"
        return outcome.Error(RemoteError(part, "", reason, True))
    return outcome.Value(thing) if how == VALUE else outcome.Error(_as_error(thing))


def _as_error(error: BaseException) -> BaseException:
    if isinstance(error, Exception):
        return error
    if isinstance(error, KeyboardInterrupt):
        # It is no Ctrl-C of this program's.
        cause = EngineError("a job raised KeyboardInterrupt")
        cause.__cause__ = error
        return _gone(cause)
    # A job that wants to end its process takes the worker with it.
    return _gone(error)


def _gone(cause: BaseException, started: bool = True) -> WorkerGone:
    gone = WorkerGone(started)
    gone.__cause__ = cause
    return gone


def lost(text: str, *, started: bool, cause: BaseException | None = None) -> WorkerGone:
    """Make what is to be raised as the other end is lost."""
    error = EngineError(text)
    error.__cause__ = cause
    return _gone(error, started)


def pack_work(fn: Any, setup: Any, takes_state: bool) -> bytes:
    """Pickle what a host needs; refuse what cannot be."""
    try:
        return pack((fn, setup, takes_state))
    except Exception as error:
        expected = "something that can be pickled"
        reason = f"{type(error).__name__}: {error}"
        raise TypeError(f"{refuse('fn', fn, expected)}: {reason}") from error


def open_setup(trouble: Fate | None) -> None:
    """Raise what has gone wrong in a setup, if anything has."""
    if trouble is None:
        return
    result = _open(trouble, Payloads(PAYLOAD))
    assert isinstance(result, outcome.Error)
    error = result.error
    if isinstance(error, WorkerGone):
        raise EngineError(f"setup ended its process: {error.__cause__!r}") from error
    raise error


def check_sync(option: str, fn: object) -> None:
    """Refuse what cannot be called for an item in a thread or a process."""
    if not callable(fn):
        raise TypeError(refuse(option, fn, "a sync function"))
    if is_async(fn) or inspect.isasyncgenfunction(fn):
        hint = "an async function is a handler of the pool itself: open_pool(size, fn)"
        raise TypeError(f"{refuse(option, fn, 'a sync function')}; {hint}")


def check_flag(option: str, value: object) -> None:
    """Refuse what is neither true nor false."""
    if not isinstance(value, bool):
        raise TypeError(refuse(option, value, "a bool"))


def check_work(fn: Callable[..., Any], setup: Callable[[], Any] | None) -> bool:
    """Check a function and its setup; say whether it takes what that returns."""
    check_sync("fn", fn)
    if setup is not None:
        check_sync("setup", setup)
        if takes(setup, 0) is False:
            expected = "a sync function without arguments"
            raise TypeError(refuse("setup", setup, expected))
    if takes(fn, 1) is not False:
        return False
    if setup is not None and takes(fn, 2):
        return True
    expected = "a sync function of the job's input"
    if setup is not None:
        expected += ", or of what setup returned and that"
    raise TypeError(refuse("fn", fn, expected))


def takes(fn: Callable[..., Any], count: int) -> bool | None:
    """Say whether a function can be called with so many arguments, if that is known."""
    try:
        signature = inspect.signature(fn)
    except (ValueError, TypeError):
        # Of some that are written in C nothing is known.
        return None
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True
