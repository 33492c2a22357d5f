"""Fault injection: handlers and workers that fail on purpose, and on record."""

import functools
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar, final, get_args

import attrs
import trio

from .. import current_job
from .._checks import check_count, check_seconds, check_share, is_async, refuse

P = ParamSpec("P")
T = TypeVar("T")

FaultMoment: TypeAlias = Literal["before", "during", "after"]
"""When a fault strikes: before the work, in the midst of it, or when it is done."""

FaultKind: TypeAlias = Literal[
    "fail",
    "crash",
    "hang",
    "cancel",
    "slow",
    "crash_on_start",
    "hang_on_start",
    "slow_start",
    "fail_cleanup",
    "hang_on_stop",
    "slow_stop",
]
"""What a fault does; named like the method of `Faults` that orders it."""

_ANY_ERROR = "an exception, or a class of them"

_DRAWN = ("fail", "crash", "hang", "cancel", "slow")


@final
class InjectedFault(Exception):
    """The error of a handler, a setup or a cleanup that was made to fail."""


@final
class InjectedCrash(BaseException):
    """What kills a worker that was made to crash."""


@final
@attrs.frozen(repr=False)
class Fault:
    """One fault that was ordered or drawn."""

    kind: FaultKind
    """What it does."""
    moment: FaultMoment = "before"
    """When it strikes, seen from the work of the handler, setup or cleanup."""
    after: float = 0.0
    """Seconds into the work, where ``moment`` is "during"."""
    seconds: float = math.inf
    """How long a slow one takes."""
    error: BaseException | type[BaseException] | None = None
    """What it raises; None for an `InjectedFault` or `InjectedCrash`."""
    drawn: bool = False
    """Whether chance has chosen it."""

    def __repr__(self) -> str:
        rest = [
            f"{field.name}={value!r}"
            for field in attrs.fields(Fault)[1:]
            if (value := getattr(self, field.name)) != field.default
        ]
        return f"Fault({', '.join([repr(self.kind), *rest])})"


@final
@attrs.frozen(kw_only=True)
class Injection:
    """One fault that has struck."""

    fault: Fault
    """What it was."""
    time: float
    """When, on `trio.current_time()`."""
    job_input: Any
    """What the handler was called with: its argument, or a tuple of them if they
    are not one, with a dict of those by keyword; None for a setup or cleanup."""

    @property
    def kind(self) -> FaultKind:
        """What the fault did."""
        return self.fault.kind


@final
class Faults:
    """Has handlers and workers fail as ordered, or by chance, and keeps record.

    Wrap what the pool is given: ``open_pool(4, faults.handler(fetch))``,
    ``open_pool(4, worker=faults.worker(connection))``, or the function in
    ``pool.process(faults.handler(fn), 1)``. What is ordered strikes the next
    calls, one fault each, in the order of the orders::

        faults = Faults()
        faults.fail_next(ConnectionError("gone"), times=2)
        faults.hang_next(moment="after")

    With rates a fault may strike any other call: ``Faults(seed=7, fail=0.05,
    crash=0.01)``. Each call takes one draw, so the same seed gives the same
    faults to the same order of calls; attempts of a retry are calls too. A
    drawn ``slow`` takes ``slow_for`` seconds. Without a seed one is drawn; it
    is in ``repr(faults)``, `seed` and each drawn error.

    ``moment`` is "before" the handler is called, "during" it, or "after" it has
    done its work, whose result is lost. ``after=0.5`` means "during": half a
    second into it the handler is cancelled, and then the fault strikes. A call
    that ends sooner, or is cancelled by others, is spared, and what was
    ordered for it strikes the next one.
    """

    def __init__(
        self,
        seed: int | None = None,
        *,
        fail: float = 0.0,
        crash: float = 0.0,
        hang: float = 0.0,
        cancel: float = 0.0,
        slow: float = 0.0,
        slow_for: float = 1.0,
    ) -> None:
        rates = dict(zip(_DRAWN, (fail, crash, hang, cancel, slow), strict=True))
        for name, rate in rates.items():
            check_share(name, rate)
        if sum(rates.values()) > 1:
            raise ValueError(refuse("the sum of all rates", rates, "1 or less"))
        check_seconds("slow_for", slow_for, infinite=False)
        if seed is None:
            seed = random.randrange(2**32)
        elif not isinstance(seed, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(refuse("seed", seed, "an int or None"))
        self.seed = seed
        """What chance was seeded with."""
        self.injected: list[Injection] = []
        """The faults that have struck, oldest first."""
        self._rates = rates
        self._slow_for = slow_for
        self._chance = random.Random(seed)
        self._calls: list[Fault] = []
        self._starts: list[Fault] = []
        self._stops: list[Fault] = []
        self._slow: Fault | None = None
        self._slow_start: Fault | None = None
        self._slow_stop: Fault | None = None

    def __repr__(self) -> str:
        return (
            f"<trio_pool.testing.Faults: seed {self.seed}, "
            f"{len(self.injected)} injected, {len(self.pending)} pending>"
        )

    # What is ordered.

    def fail_next(
        self,
        error: Exception | type[Exception] | None = None,
        *,
        times: int = 1,
        moment: FaultMoment | None = None,
        after: float | None = None,
    ) -> None:
        """Have the next calls raise an `Exception`, by default `InjectedFault`."""
        if error is not None:
            _check_error(error, Exception, "an Exception, or such a class")
        self._order("fail", times, moment, after, error)

    def crash_next(
        self,
        error: BaseException | type[BaseException] | None = None,
        *,
        times: int = 1,
        moment: FaultMoment | None = None,
        after: float | None = None,
    ) -> None:
        """Have the next calls kill their worker, by default by `InjectedCrash`.

        The caller hears `WorkerCrashed`, with the error as its cause.
        """
        expected = "a BaseException that is no Exception, or such a class"
        if error is not None:
            _check_error(error, BaseException, expected)
            kind = error if isinstance(error, type) else type(error)
            if issubclass(kind, (Exception, trio.Cancelled)):
                raise TypeError(refuse("error", error, expected))
        self._order("crash", times, moment, after, error)

    def hang_next(
        self,
        *,
        times: int = 1,
        moment: FaultMoment | None = None,
        after: float | None = None,
    ) -> None:
        """Have the next calls never end, until they are cancelled."""
        self._order("hang", times, moment, after)

    def cancel_next(
        self,
        *,
        times: int = 1,
        moment: FaultMoment | None = None,
        after: float | None = None,
    ) -> None:
        """Have the next jobs cancel themselves, by `current_job`.

        Whoever waits for one hears `JobCancelled`. A call outside a job of a
        pool raises `RuntimeError`.
        """
        self._order("cancel", times, moment, after)

    def slow(
        self, seconds: float, *, moment: Literal["before", "after"] = "before"
    ) -> None:
        """Have every call from now on take longer by so much; ``slow(0)`` ends it."""
        check_seconds("seconds", seconds, infinite=False)
        if moment not in ("before", "after"):
            raise ValueError(refuse("moment", moment, "'before' or 'after'"))
        self._slow = _slow("slow", seconds, moment)

    def crash_on_start(
        self,
        error: BaseException | type[BaseException] | None = None,
        *,
        times: int = 1,
    ) -> None:
        """Have the next setups of workers fail, before anything is set up."""
        if error is not None:
            _check_error(error, BaseException, _ANY_ERROR)
        check_count("times", times, zero=False)
        self._starts += [Fault(kind="crash_on_start", error=error)] * times

    def hang_on_start(self, *, times: int = 1) -> None:
        """Have the next setups of workers never end, until they are cancelled."""
        check_count("times", times, zero=False)
        self._starts += [Fault(kind="hang_on_start")] * times

    def slow_start(self, seconds: float) -> None:
        """Have every setup from now on take longer by so much; 0 ends it."""
        check_seconds("seconds", seconds, infinite=False)
        self._slow_start = _slow("slow_start", seconds)

    def fail_cleanup(
        self,
        error: BaseException | type[BaseException] | None = None,
        *,
        times: int = 1,
    ) -> None:
        """Have the next cleanups of workers fail, after their work is done."""
        if error is not None:
            _check_error(error, BaseException, _ANY_ERROR)
        check_count("times", times, zero=False)
        fault = Fault(kind="fail_cleanup", moment="after", error=error)
        self._stops += [fault] * times

    def hang_on_stop(self, *, times: int = 1) -> None:
        """Have the next cleanups never begin, until they are cancelled.

        Then the real one is done, as cancelled as it is.
        """
        check_count("times", times, zero=False)
        self._stops += [Fault(kind="hang_on_stop")] * times

    def slow_stop(self, seconds: float) -> None:
        """Have every cleanup from now on take longer by so much; 0 ends it."""
        check_seconds("seconds", seconds, infinite=False)
        self._slow_stop = _slow("slow_stop", seconds)

    def strike_next(self, fault: Fault) -> None:
        """Have the next call meet a fault that was made before."""
        expected = "a Fault of one of the kinds " + ", ".join(map(repr, _DRAWN))
        if not isinstance(fault, Fault):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(refuse("fault", fault, expected))
        if fault.kind not in _DRAWN:
            raise ValueError(refuse("fault", fault, expected))
        self._calls.append(fault)

    def _order(
        self,
        kind: FaultKind,
        times: int,
        moment: FaultMoment | None,
        after: float | None,
        error: BaseException | type[BaseException] | None = None,
    ) -> None:
        check_count("times", times, zero=False)
        if moment is None:
            moment = "before" if after is None else "during"
        if moment not in get_args(FaultMoment):
            expected = "'before', 'during' or 'after'"
            raise ValueError(refuse("moment", moment, expected))
        if after is not None:
            check_seconds("after", after, infinite=False)
            if moment != "during":
                expected = f"left out, as moment is {moment!r}"
                raise ValueError(refuse("after", after, expected))
        fault = Fault(kind=kind, moment=moment, after=after or 0.0, error=error)
        self._calls += [fault] * times

    # What has become of it.

    @property
    def pending(self) -> tuple[Fault, ...]:
        """What was ordered and has not struck: of calls, of setups, of cleanups.

        What holds "from now on" is never pending.
        """
        return (*self._calls, *self._starts, *self._stops)

    @property
    def counts(self) -> Counter[FaultKind]:
        """How often each kind of fault has struck; 0 for the others."""
        return Counter(injection.kind for injection in self.injected)

    def assert_used_up(self) -> None:
        """Check that everything that was ordered has struck.

        Raises:
          AssertionError: it says what is pending, and what has struck.
        """
        if self.pending:
            pending = "".join(f"\n  {fault}" for fault in self.pending)
            struck = ", ".join(f"{n} {kind}" for kind, n in self.counts.items())
            raise AssertionError(
                f"{len(self.pending)} faults have not struck:{pending}\n"
                f"those that have: {struck or 'none'}"
            )

    # What is wrapped.

    def handler(self, fn: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
        """Wrap an async function, of any arguments, that faults are to strike.

        Otherwise it is as it was: it runs in the same task and context, is
        cancelled as before, and a ``ready`` that it has is there.

        Raises:
          TypeError: ``fn`` is not an async function.
        """
        if not is_async(fn):
            raise TypeError(refuse("fn", fn, "an async function"))

        @functools.wraps(fn)
        async def faulty(*args: P.args, **kwargs: P.kwargs) -> T:
            return await self._call(fn, args, kwargs)

        ready = getattr(fn, "ready", None)
        if ready is not None:
            faulty.ready = ready  # type: ignore[attr-defined]  # functions may have any
        return faulty

    def worker(
        self,
        factory: Callable[
            [], AbstractAsyncContextManager[Callable[[Any], Awaitable[T]]]
        ],
    ) -> Callable[[], AbstractAsyncContextManager[Callable[[Any], Awaitable[T]]]]:
        """Wrap what is given as ``worker=``: its setups, cleanups and handlers.

        Raises:
          TypeError: ``factory`` is not callable, or a handler.
        """
        given: Any = factory
        if not callable(given) or is_async(given):
            expected = "what worker= takes: () -> an async context manager"
            raise TypeError(refuse("factory", given, expected))

        # Not under `wraps`: `open_pool` looks at the signature of what it is given.
        def faulty() -> AbstractAsyncContextManager[Any]:
            manager: Any = factory()
            if not (hasattr(manager, "__aenter__") and hasattr(manager, "__aexit__")):
                # It is for the pool to refuse.
                return manager  # type: ignore[no-any-return]
            return _FaultyWorker(manager, self._start, self.handler, self._stop)

        return faulty

    # What happens in them.

    async def _call(
        self,
        fn: Callable[..., Awaitable[T]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> T:
        value: T
        fault = self._next_fault()
        job_input = args[0] if len(args) == 1 else args
        if kwargs:
            job_input = (*args, kwargs)
        try:
            slow = self._slow
            if slow is not None and slow.moment == "before":
                await self._strike(slow, job_input)
            if fault is not None and fault.moment == "before":
                due, fault = fault, None
                await self._strike(due, job_input)
            if fault is not None and fault.moment == "during":
                due = fault
                ended, value = await self._cut_short(due, fn, args, kwargs)
                if not ended:
                    fault = None
                    await self._strike(due, job_input)
            else:
                value = await fn(*args, **kwargs)
                if fault is not None and fault.moment == "after":
                    due, fault = fault, None
                    await self._strike(due, job_input)
            if slow is not None and slow.moment == "after":
                await self._strike(slow, job_input)
        finally:
            if fault is not None and not fault.drawn:
                # It was spared: the next call has it.
                self._calls.insert(0, fault)
        return value

    async def _cut_short(
        self,
        fault: Fault,
        fn: Callable[..., Awaitable[Any]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[bool, Any]:
        """Call a function for so long; say whether it has ended before."""
        deadline = trio.current_time() + fault.after
        value: Any = None
        try:
            with trio.CancelScope(deadline=deadline):
                value = await fn(*args, **kwargs)
        except Exception:
            # What goes wrong as it is cut short is not what the caller hears.
            if trio.current_time() < deadline:
                raise
        return trio.current_time() < deadline, value

    def _next_fault(self) -> Fault | None:
        drawn: Fault | None = None
        if any(self._rates.values()):
            chance = self._chance.random()
            for kind, rate in self._rates.items():
                chance -= rate
                if chance < 0:
                    drawn = self._draft(kind)
                    break
        return self._calls.pop(0) if self._calls else drawn

    def _draft(self, kind: Any) -> Fault:
        seconds = self._slow_for if kind == "slow" else math.inf
        return Fault(kind=kind, seconds=seconds, drawn=True)

    async def _strike(self, fault: Fault, job_input: Any = None) -> None:
        self.injected.append(
            Injection(fault=fault, time=trio.current_time(), job_input=job_input)
        )
        kind = fault.kind
        if kind == "cancel":
            # It hears of it here, also if somebody else has cancelled it before.
            current_job().cancel()
            await trio.sleep_forever()
        elif kind in ("slow", "slow_start", "slow_stop"):
            await trio.sleep(fault.seconds)
        elif kind in ("hang", "hang_on_start", "hang_on_stop"):
            await trio.sleep_forever()
        else:
            self._raise(fault)

    def _raise(self, fault: Fault) -> None:
        error = fault.error
        if error is None:
            made = InjectedCrash if fault.kind == "crash" else InjectedFault
            text = f"injected fault {len(self.injected)}: {fault.kind}"
            if fault.drawn:
                text += f", drawn with seed {self.seed}"
            raise made(text)
        if isinstance(error, type):
            raise error
        # The same object may be raised several times: its traceback begins here.
        raise error.with_traceback(None)

    async def _start(self) -> None:
        if self._slow_start is not None:
            await self._strike(self._slow_start)
        if self._starts:
            await self._strike(self._starts.pop(0))

    async def _stop(self, cleanup: Callable[[], Awaitable[bool | None]]) -> bool | None:
        fault = self._stops.pop(0) if self._stops else None
        try:
            if self._slow_stop is not None:
                await self._strike(self._slow_stop)
            if fault is not None and fault.moment == "before":
                await self._strike(fault)
        finally:
            swallows = await cleanup()
        if fault is not None and fault.moment == "after":
            await self._strike(fault)
        return swallows


@final
class _FaultyWorker:
    """A worker's context manager, with faults before and after it."""

    def __init__(
        self,
        manager: AbstractAsyncContextManager[Any],
        start: Callable[[], Awaitable[None]],
        wrap: Callable[[Any], Any],
        stop: Callable[[Callable[[], Awaitable[Any]]], Awaitable[bool | None]],
    ) -> None:
        self._manager = manager
        self._start = start
        self._wrap = wrap
        self._stop = stop

    async def __aenter__(self) -> Any:
        await self._start()
        handler = await self._manager.__aenter__()
        # What is no handler is for the pool to refuse.
        return self._wrap(handler) if is_async(handler) else handler

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._stop(
            functools.partial(self._manager.__aexit__, kind, error, traceback)
        )


def _slow(
    kind: FaultKind, seconds: float, moment: Literal["before", "after"] = "before"
) -> Fault | None:
    return Fault(kind=kind, moment=moment, seconds=seconds) if seconds else None


def _check_error(error: object, kind: type[BaseException], expected: str) -> None:
    if not isinstance(error, kind) and not (
        isinstance(error, type) and issubclass(error, kind)
    ):
        raise TypeError(refuse("error", error, expected))
