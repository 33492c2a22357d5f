"""A trio run in virtual time that stands still until it is asked to go on."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import NoReturn, TypeVar, TypeVarTuple, Unpack, final

import trio
from outcome import Error, Outcome, Value
from trio.testing import MockClock, wait_all_tasks_blocked

T = TypeVar("T")
Args = TypeVarTuple("Args")

FOR_EVER = 1_000_000.0
"""Seconds of virtual time after which what has not ended is taken to hang."""

# Steps of trio's loop in one request, after which something goes round and
# round without any time passing.
_ROUNDS = 1_000_000

# And after which a run that was cancelled is not going to end by itself.
_PATIENCE = 20_000


class _Abandoned(BaseException):
    """Ends tasks that no cancellation ends."""


@final
class HostedRun:
    """Runs async functions one after the other in the same run, from sync code.

    Between two calls no task gets a turn and no time passes. It is trio's guest
    mode without a host loop: we call each of its ticks ourselves. The clock must
    jump as soon as all tasks wait, so that a tick never waits for anything.
    """

    def __init__(self, clock: MockClock) -> None:
        if trio.lowlevel.in_trio_run():
            raise RuntimeError(
                "this needs a trio run of its own, and cannot have it within "
                "another: call it from a plain function, not from an async one"
            )
        self._ticks: deque[Callable[[], object]] = deque()
        self._end: Outcome[None] | None = None
        self._nursery: trio.Nursery | None = None
        self._own: trio.lowlevel.Task | None = None
        trio.lowlevel.start_guest_run(
            self._main,
            run_sync_soon_threadsafe=self._ticks.append,
            done_callback=self._ended,
            clock=clock,
        )
        self._go_on(lambda: self._nursery is not None)

    async def _main(self) -> None:
        async with trio.open_nursery() as nursery:
            self._own = trio.lowlevel.current_task()
            self._nursery = nursery
            await trio.sleep_forever()

    def _ended(self, end: Outcome[None]) -> None:
        self._end = end

    def _go_on(self, enough: Callable[[], object]) -> None:
        """Let tasks run until this is so, or the run has ended."""
        rounds = 0
        while not enough() and self._end is None:
            if rounds == _ROUNDS:
                raise AssertionError(
                    f"after {rounds:,} rounds of trio's loop something still goes on "
                    "and on at one moment of virtual time"
                )
            rounds += 1
            self._ticks.popleft()()

    def start(
        self, async_fn: Callable[[Unpack[Args]], Awaitable[object]], *args: *Args
    ) -> None:
        """Start a task, which has its first turn when the run goes on."""
        if self._nursery is None:
            raise RuntimeError("the run has ended")
        self._nursery.start_soon(async_fn, *args)

    def run(self, async_fn: Callable[[Unpack[Args]], Awaitable[T]], *args: *Args) -> T:
        """Call an async function in a task of its own; go on until it returns.

        Raises:
          AssertionError: it hangs.
        """
        ends: list[Outcome[T]] = []

        async def call() -> None:
            try:
                with trio.move_on_after(FOR_EVER):
                    ends.append(Value(await async_fn(*args)))
            except Exception as error:
                ends.append(Error(error))
            if not ends:
                ends.append(Error(_hangs(async_fn)))

        self.start(call)
        self._go_on(lambda: ends)
        if not ends:
            self._raise_end()
        return ends[0].unwrap()

    def calm(self) -> None:
        """Go on until every task waits for another one, or for time to pass."""
        self.run(wait_all_tasks_blocked)

    def tasks(self) -> list[trio.lowlevel.Task]:
        """Return all tasks there are, but for trio's own and that of this run."""
        found: list[trio.lowlevel.Task] = []
        todo = [self._own] if self._own is not None and self._end is None else []
        while todo:
            for nursery in todo.pop().child_nurseries:
                found += nursery.child_tasks
                todo += nursery.child_tasks
        return found

    def close(self) -> None:
        """End the run: by cancelling it and, where that does not help, by force."""
        for attempt in range(10):
            if self._nursery is not None:
                self._nursery.cancel_scope.cancel(reason="the test is over")
            if attempt:
                self._abandon()
            patience = iter(range(_PATIENCE))
            self._go_on(functools.partial(_is_spent, patience))
            if self._end is not None:
                return

    def _abandon(self) -> None:
        """Raise in all tasks that wait for no child: a shield does not stop this."""
        for task in self.tasks():
            if not any(nursery.child_tasks for nursery in task.child_nurseries):
                # One that has its turn already may not be given another.
                with suppress(AssertionError):
                    trio.lowlevel.reschedule(task, Error(_Abandoned()))

    def _raise_end(self) -> NoReturn:
        if isinstance(self._end, Error):
            error = self._end.error
            # Ctrl-C, say, which the nursery has put into a group.
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            raise error
        raise RuntimeError("the run has ended")


def _is_spent(patience: Iterator[int]) -> bool:
    return next(patience, None) is None


def _hangs(async_fn: Callable[..., object]) -> AssertionError:
    name = getattr(async_fn, "__qualname__", repr(async_fn))
    return AssertionError(
        f"{name} had not ended after {FOR_EVER:,.0f} seconds of virtual time"
    )
