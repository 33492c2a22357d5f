"""Runs of one body under any task order, and with something at any of its steps."""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar, TypeVarTuple, Unpack, cast, final

import attrs
import trio

from .._checks import check_count, is_async, note, refuse
from ._hosted import refuse_inside_trio
from ._scheduler import is_inside, seeded_scheduler
from ._trials import Plan, Trial, check_body, count_arguments, name_of

Args = TypeVarTuple("Args")
T = TypeVar("T")

Step: TypeAlias = int | tuple[int, int]
"""A step of the scheduler, for the first argument of a body; or which argument
(from 0) and the step."""


def run_in_order(
    async_fn: Callable[[Unpack[Args]], Awaitable[T]],
    *args: *Args,
    order: int,
    clock: trio.abc.Clock | None = None,
    seconds: float = 86_400.0,
    steps: int = 100_000,
) -> T:
    """Run ``async_fn(*args)`` by `trio.run`, with the task order number ``order``.

    Trio draws the order in which tasks run that are runnable at once, in which
    one cancellation reaches several of them, and in which deadlines pass that
    are the same. Here all of it, and what the module `random` draws, follows
    from ``order``: the same order gives the same run, as long as the function
    does not depend on real time, threads or the network. By default time is
    virtual, a `trio.testing.MockClock` that jumps when nothing else happens; a
    wait for a thread or a socket may take a second, or it counts as for ever.
    With a clock of yours nobody looks whether the run ends. Other threads must
    not start runs of trio meanwhile.

    Raises:
      AssertionError: it waits for ever, or takes more than ``seconds`` of
        virtual time, or more than ``steps`` steps of tasks.
      RuntimeError: this version of trio orders its tasks in another way.
    """
    refuse_inside_trio("run_in_order()")
    check_body("async_fn", async_fn)
    if clock is None:
        return _ordered(async_fn, args, order, seconds, steps)
    if not isinstance(clock, trio.abc.Clock):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(refuse("clock", clock, "a trio.abc.Clock or None"))
    check_count("order", order)
    with seeded_scheduler(order, clock):
        return trio.run(async_fn, *args, clock=clock)


def explore_orders(
    async_fn: Callable[[Unpack[Args]], Awaitable[object]],
    *args: *Args,
    orders: int = 100,
    first: int = 0,
    seconds: float = 86_400.0,
    steps: int = 100_000,
) -> int:
    """Run ``async_fn(*args)`` under ``orders`` task orders; return how many ran.

    Each is a `run_in_order` of its own, in virtual time. The first error ends
    it, with a note that names the order and how to run it again.

    Raises:
      AssertionError: it waits for ever, or takes more than ``seconds`` of
        virtual time, or more than ``steps`` steps of tasks, in some order.
    """
    refuse_inside_trio("explore_orders()")
    check_body("async_fn", async_fn)
    check_count("orders", orders, zero=False)
    check_count("first", first)
    for order in range(first, first + orders):
        try:
            _ordered(async_fn, args, order, seconds, steps)
        except BaseException as error:
            call = ", ".join([name_of(async_fn), *map(reprlib.repr, args)])
            note(error, f"in task order {order}; again: run_in_order({call}, {order=})")
            raise
    return orders


def cancel_everywhere(
    body: Callable[..., Awaitable[object]],
    *,
    order: int = 0,
    limit: int = 10_000,
    drawn: bool = False,
    seconds: float = 86_400.0,
    steps: int = 100_000,
) -> int:
    """Cancel a body at every step of trio's scheduler; return the schedules tried.

    The body is run again and again, each time in a trio run of its own with
    virtual time and this task ``order``. Its parameters say what is cancelled:
    without any, all of it; one or two are given a `trio.CancelScope` each,
    which it enters where it wishes. First nothing is cancelled; then each
    scope at every step of any task while it is entered, and once before; then
    both, at every pair of such steps. What the body asserts is the check. An
    error has a note: what was cancelled when and where, and how to do it again.

    Raises:
      AssertionError: a schedule waits for ever, or takes more than ``seconds``
        of virtual time, or more than ``steps`` steps.
      ValueError: there are more schedules than ``limit``. If ``drawn``, that
        many are tried instead, a sample that follows from ``order``. Or no
        schedule ever takes a step inside of a scope.
    """
    return _cancellations(body, order, seconds, steps).run_all(limit, drawn)


def cancel_at(
    body: Callable[..., Awaitable[object]],
    *at: Step,
    order: int = 0,
    seconds: float = 86_400.0,
    steps: int = 100_000,
) -> None:
    """Run one schedule of `cancel_everywhere` again, as the note of its error says.

    ``at`` says when to cancel: 17 is step 17 of the first scope, or of the
    body; ``(1, 17)`` that of the second one. Of two at the same step the first
    one given is the first.

    Raises:
      ValueError: the scope is not entered at this step.
    """
    _cancellations(body, order, seconds, steps).run_again(_plan(at))


def call_everywhere(
    body: Callable[..., Awaitable[object]],
    *,
    order: int = 0,
    limit: int = 10_000,
    drawn: bool = False,
    seconds: float = 86_400.0,
    steps: int = 100_000,
) -> int:
    """Let events happen at every step of trio's scheduler; return the schedules tried.

    As `cancel_everywhere`, but the body takes one or two `Moment`, and says by
    ``with moment.calls(fn):`` what happens then, and while it may. First none
    comes; then each at every step of any task meanwhile; then both, at every
    pair of such steps, also at the same one, each of them first.

    Raises:
      AssertionError, ValueError: as `cancel_everywhere`.
    """
    return _calls(body, order, seconds, steps).run_all(limit, drawn)


def call_at(
    body: Callable[..., Awaitable[object]],
    *at: Step,
    order: int = 0,
    seconds: float = 86_400.0,
    steps: int = 100_000,
) -> None:
    """Run one schedule of `call_everywhere` again, as the note of its error says.

    ``at`` says when the moments come, as in `cancel_at`.

    Raises:
      ValueError: the moment cannot come at this step.
    """
    _calls(body, order, seconds, steps).run_again(_plan(at))


@attrs.define(eq=False)
class _Filling:
    """What a body wants of a moment, and whether that has come."""

    fn: functools.partial[object] | None = None
    happened: bool = False


@final
class Moment:
    """A moment that `call_everywhere` chooses and the body fills."""

    # Only a schedule makes moments; what is behind them is no public type.
    def __init__(self, filling: Any) -> None:
        self._filling: _Filling = filling

    def __repr__(self) -> str:
        return f"<trio_pool.testing.Moment: {'over' if self.happened else 'to come'}>"

    @property
    def happened(self) -> bool:
        """Whether it has come."""
        return self._filling.happened

    @contextmanager
    def calls(
        self, fn: Callable[[Unpack[Args]], object], *args: *Args
    ) -> Generator[None, None, None]:
        """Have ``fn(*args)`` called at this moment, if it comes inside the block.

        The function is synchronous, and called on trio's thread between two
        steps of tasks. An error that it raises fails the schedule.

        Raises:
          TypeError: it is no function, or an async one.
        """
        given: object = fn
        if not callable(given) or is_async(given):
            raise TypeError(refuse("fn", given, "a synchronous function"))
        self._filling.fn = functools.partial(fn, *args)
        try:
            yield
        finally:
            self._filling.fn = None


@final
class _Call:
    """Calls what the body wants."""

    def __init__(self) -> None:
        self.filling = _Filling()
        self.argument = Moment(self.filling)

    def may_come(self, step: int) -> bool:
        return self.is_open() and not self.filling.happened

    def is_open(self) -> bool:
        return self.filling.fn is not None

    def come(self) -> None:
        self.filling.happened = True
        fn = self.filling.fn
        assert fn is not None
        result = fn()
        if inspect.iscoroutine(result):
            result.close()
            expected = "a synchronous function, and not one that gives a coroutine"
            raise TypeError(refuse("fn", fn.func, expected))


@final
class _Cancellation:
    """Cancels a scope of the body."""

    def __init__(self) -> None:
        self.argument = trio.CancelScope()

    def may_come(self, step: int) -> bool:
        # Before it is entered, one step is as good as another.
        scope = self.argument
        return (not step or self.is_open()) and not scope.cancel_called

    def is_open(self) -> bool:
        return is_inside(self.argument)

    def come(self) -> None:
        self.argument.cancel()


def _ordered(
    async_fn: Callable[[Unpack[Args]], Awaitable[T]],
    args: tuple[*Args],
    order: int,
    seconds: float,
    steps: int,
) -> T:
    """Run a function in one order, and look whether it ends."""
    trial = Trial(
        body=functools.partial(async_fn, *args),
        count=0,
        name=name_of(async_fn),
        make=_Cancellation,
        replay="run_in_order",
        order=order,
        seconds=seconds,
        steps=steps,
    )
    return cast("T", trial.run(()).result)


def _cancellations(
    body: Callable[..., Awaitable[object]], order: int, seconds: float, steps: int
) -> Trial:
    async def cancel_all(scope: trio.CancelScope) -> None:
        with scope:
            await body()

    refuse_inside_trio("a test by schedules")
    count = count_arguments(body, 0)
    return Trial(
        body=body if count else cancel_all,
        count=count or 1,
        name=name_of(body),
        needs="enter its trio.CancelScope, and await in it" if count else "",
        make=_Cancellation,
        replay="cancel_at",
        order=order,
        seconds=seconds,
        steps=steps,
    )


def _calls(
    body: Callable[..., Awaitable[object]], order: int, seconds: float, steps: int
) -> Trial:
    refuse_inside_trio("a test by schedules")
    return Trial(
        body=body,
        count=count_arguments(body, 1),
        name=name_of(body),
        needs="enter `with moment.calls(fn):`, and await in it",
        make=_Call,
        replay="call_at",
        order=order,
        seconds=seconds,
        steps=steps,
    )


def _plan(at: tuple[Step, ...]) -> Plan:
    for step in at:
        if isinstance(step, tuple) and len(step) != 2:  # pyright: ignore[reportUnnecessaryComparison]
            raise TypeError(refuse("at", step, "a step, or (n, step)"))
    return tuple(step if isinstance(step, tuple) else (0, step) for step in at)
