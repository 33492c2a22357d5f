"""A trio run in virtual time that stands still until it is asked to go on."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import NoReturn, TypeVar, TypeVarTuple, Unpack, final

import trio
from outcome import Error, Outcome, Value
from trio.testing import MockClock, wait_all_tasks_blocked

from ._scheduler import throw

T = TypeVar("T")
Args = TypeVarTuple("Args")

FOR_EVER = 20_000.0
"""Seconds of virtual time after which what has not ended is taken to hang."""

# Steps of trio's loop after which something goes round and round, if no time has
# passed meanwhile.
_ROUNDS = 5_000

# And after which a run that was cancelled is not going to end by itself.
_PATIENCE = 300

# Attempts to end a run that are made in the user's code alone.
_RESORT = 5


class Abandoned(BaseException):
    """Ends tasks that no cancellation ends."""


@final
class HostedRun:
    """Runs async functions one after the other in the same run, from sync code.

    Between two calls no task gets a turn and no time passes. It is trio's guest
    mode without a host loop: we call each of its ticks ourselves. The clock must
    jump as soon as all tasks wait, so that a tick never waits for anything.
    """

    def __init__(self, clock: MockClock) -> None:
        refuse_inside_trio("this")
        self._clock = clock
        self._ticks: deque[Callable[[], object]] = deque()
        self._end: Outcome[None] | None = None
        self._nursery: trio.Nursery | None = None
        self._own: trio.lowlevel.Task | None = None
        self._usual: set[trio.lowlevel.Task] = set()
        self.suspects: set[trio.lowlevel.Task] = set()
        """Tasks that are in the user's code."""
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
            self._usual = {*below(root_of(self._own))}
            self._nursery = nursery
            await trio.sleep_forever()

    def _ended(self, end: Outcome[None]) -> None:
        self._end = end

    def _go_on(self, enough: Callable[[], object]) -> None:
        """Let tasks run until this is so, or the run has ended."""
        rounds = 0
        since = None
        while not enough() and self._end is None:
            rounds += 1
            if rounds % _ROUNDS == 0:
                now = self._clock.current_time()
                if now == since:
                    raise AssertionError(
                        f"after {_ROUNDS:,} rounds of trio's loop something still "
                        "goes on and on at one moment of virtual time"
                    )
                since = now
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

    def now(self) -> float:
        """Return the time in the run."""
        return self._clock.current_time()

    def calm(self) -> None:
        """Go on until every task waits for another one, or for time to pass."""
        self.run(wait_all_tasks_blocked)

    def tasks(self) -> list[trio.lowlevel.Task]:
        """Return all tasks there are, but for trio's own and that of this run."""
        if self._own is None or self._end is not None:
            return []
        return [task for task in below(root_of(self._own)) if task not in self._usual]

    def close(self) -> None:
        """End the run: by cancelling it and, where that does not help, by force."""
        for attempt in range(10):
            if self._nursery is not None:
                self._nursery.cancel_scope.cancel(reason="the test is over")
            if attempt:
                # What the pool itself waits for does not know of errors that
                # come in between, so its tasks are the last resort.
                found = [(one, *below(one)) for one in self.suspects]
                last = attempt >= _RESORT
                abandon(self.tasks() if last else set(itertools.chain(*found)))
            patience = iter(range(_PATIENCE))
            self._go_on(functools.partial(_is_spent, patience))
            if self._end is not None:
                return

    def _raise_end(self) -> NoReturn:
        if isinstance(self._end, Error):
            error = self._end.error
            # Ctrl-C, say, which the nursery has put into a group.
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            raise error
        raise RuntimeError("the run has ended")


def refuse_inside_trio(what: str, remedy: str = "") -> None:
    """Refuse to start a trio run inside of another one, and say what to do."""
    if trio.lowlevel.in_trio_run():
        remedy = remedy or "call it from a plain function, not from an async one"
        raise RuntimeError(
            f"{what} needs a trio run of its own, and cannot have it within "
            f"another: {remedy}"
        )


def abandon(tasks: Iterable[trio.lowlevel.Task]) -> None:
    """Raise in all tasks that wait for no child: a shield does not stop this."""
    for task in tasks:
        if not any(nursery.child_tasks for nursery in task.child_nurseries):
            throw(task, Abandoned())


def root_of(task: trio.lowlevel.Task) -> trio.lowlevel.Task:
    """Return the task that all tasks of a run are below of."""
    while task.parent_nursery is not None:
        task = task.parent_nursery.parent_task
    return task


def below(task: trio.lowlevel.Task) -> Iterator[trio.lowlevel.Task]:
    """Find the tasks of the nurseries of a task, and those of theirs."""
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield child
            yield from below(child)


def _is_spent(patience: Iterator[int]) -> bool:
    return next(patience, None) is None


def _hangs(async_fn: Callable[..., object]) -> AssertionError:
    name = getattr(async_fn, "__qualname__", repr(async_fn))
    return AssertionError(
        f"{name} had not ended after {FOR_EVER:,.0f} seconds of virtual time"
    )
