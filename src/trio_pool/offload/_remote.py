"""This end of a worker whose jobs run elsewhere: what is sent, and what comes back."""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
)
from types import ModuleType
from typing import Any, NoReturn, Protocol, TypeAlias, TypeVar, final

import outcome

from .._checks import check_count, is_async, refuse
from .._errors import WorkerGone
from .._events import In, Out
from .._worker import OtherEnd
from ._errors import EngineError, PayloadWarning, RemoteError
from ._shim import ERROR, EXIT, HERE, KEPT, UNSENT, VALUE, Fate, Report, pack

T = TypeVar("T")

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


AnyHandler: TypeAlias = Callable[[Any], Awaitable[Any]]
OpenWorker: TypeAlias = Callable[
    [], AbstractAsyncContextManager[Callable[[In], Awaitable[Out]]]
]
"""What `open_pool` takes as ``worker=``."""


@final
class Workers:
    """Workers that share something, such as a cluster, as long as their pool is."""

    def __init__(
        self,
        open_shared: Callable[[int], AbstractAsyncContextManager[OpenWorker[Any, Any]]],
    ) -> None:
        self._open_shared = open_shared

    def around_pool(
        self, size: int
    ) -> AbstractAsyncContextManager[OpenWorker[Any, Any]]:
        """Open what the workers of a pool of this size share, around its life."""
        return self._open_shared(size)

    @asynccontextmanager
    async def __call__(self) -> AsyncGenerator[AnyHandler, None]:
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
class Handler:
    """The handler of a worker whose jobs run at an other end."""

    def __init__(self, other_end: OtherEnd) -> None:
        # By which the pool knows it.
        self.__trio_pool__ = other_end

    async def __call__(self, job_input: Any) -> Any:
        """Run a job."""
        return await self.__trio_pool__.one(job_input, None)


def unwrapped(result: outcome.Outcome[Any]) -> Any:
    """Return the value, or raise the error; this frame does not keep it."""
    if isinstance(result, outcome.Value):
        return result.value
    assert isinstance(result, outcome.Error)
    try:
        raise result.error
    finally:
        del result


@final
class Remote:
    """The other end of a worker in an engine, to which all is sent as bytes."""

    def __init__(self, engine: Engine, payloads: Payloads) -> None:
        self._engine = engine
        self._payloads = payloads

    @property
    def spent(self) -> bool:
        """Whether the worker has to be replaced, as planned."""
        return self._engine.spent

    async def one(self, job_input: Any, answer: Callable[[Any], object] | None) -> Any:
        """Run a job; return its result, or raise its error."""
        # In fewer steps than several are, as a call costs what its frames do.
        packed = _packed(job_input)
        if isinstance(packed, outcome.Error):
            try:
                return unwrapped(packed)
            finally:
                del packed
        payloads = self._payloads
        payloads.look(len(packed), "argument")
        _, fates = await self._engine.call([packed])
        return unwrapped(opened(fates, 1, payloads)[0])

    async def many(self, items: list[Any]) -> tuple[list[outcome.Outcome[Any]], float]:
        """Run several jobs in one call; return their outcomes, and the seconds."""
        packed: list[bytes] = []
        unsendable: dict[int, outcome.Error] = {}
        for number, item in enumerate(items):
            sendable = _packed(item)
            if isinstance(sendable, bytes):
                packed.append(sendable)
            else:
                unsendable[number] = sendable
        self._payloads.look(sum(map(len, packed)), "argument")
        seconds: float = 0.0
        fates: list[Fate] = []
        if packed:
            seconds, fates = await self._engine.call(packed)
        results = opened(fates, len(packed), self._payloads)
        for number in sorted(unsendable):
            results.insert(number, unsendable[number])
        return results, seconds


def _packed(item: Any) -> bytes | outcome.Error:
    try:
        return pack(item)
    except Exception as error:
        return outcome.Error(refused_argument(item, error))


def refused_argument(item: object, error: BaseException | None) -> RemoteError:
    """Make the error of a job whose input cannot be sent."""
    name = f"{type(item).__module__}.{type(item).__qualname__}"
    return RemoteError("argument", name, f"{type(error).__name__}: {error}", False)


async def await_one(
    left_behind: list[T], end_of: Callable[[T], Awaitable[object]]
) -> T | None:
    """Wait for one of the calls that were left running, if there are any.

    Each still has the place of a worker, and another call would be one too many.
    """
    if not left_behind:
        return None
    one = left_behind.pop()
    try:
        await end_of(one)
    except BaseException:
        left_behind.append(one)
        raise
    return one


@contextmanager
def by_value(cloudpickle: Any, *modules: ModuleType) -> Generator[None, None, None]:
    """Have what is defined in modules pickled as it is, in this block.

    It is for where they cannot be imported, or take too long.
    """
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


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
    if len(results) < expected:
        never = WorkerGone(started=False)
        results += [outcome.Error(never)] * (expected - len(results))
    return results


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


def lose(text: str, *, started: bool, cause: BaseException | None = None) -> NoReturn:
    """Raise that the other end is lost; no frame keeps what is raised."""
    error = EngineError(text)
    error.__cause__ = cause
    raise _gone(error, started)


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
