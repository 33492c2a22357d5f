"""The few places that read trio's insides, each with a test that pins it.

Trio documents `Task.context` and the sleep traps; what is private here saves
a cancel scope (6-11 us) or a public call of 2 us on every job, or repairs a
task that user code has left broken.
"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn, final

from outcome import Outcome
from trio import CancelScope

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from trio.abc import Clock
    from trio.lowlevel import Task


@final
class _Wake(Outcome[None]):
    """Wakes a task with nothing to say, any number of times.

    An `outcome.Value` is good for one unwrap, and making and unwrapping one
    costs 0.9 us, a tenth of a job.
    """

    __slots__ = ()

    def unwrap(self) -> None:
        return None

    def send(self, gen: Generator[object, None, object]) -> NoReturn:
        raise NotImplementedError("only trio's scheduler unwraps this")

    async def asend(self, agen: AsyncGenerator[object, None]) -> NoReturn:
        raise NotImplementedError("only trio's scheduler unwraps this")


WAKE = _Wake()


def effective_deadline(task: Task) -> float:
    """Return what `trio.current_effective_deadline` says in ``task``, cheaper.

    A cancelled scope counts by its deadline: the caller finds out about its
    cancellation when it goes to sleep.
    """
    deadline = math.inf
    status = task._cancel_status
    while status is not None:
        scope = status._scope
        if scope._deadline < deadline:
            deadline = scope._deadline
        if scope._shield:
            break
        status = status._parent  # type: ignore[assignment]
    return deadline


def show_deadline(scope: CancelScope, deadline: float) -> None:
    """Let code in ``scope`` see a deadline, without arming trio's timer.

    Whoever shows the deadline sees to the cancelling: the caller's own scope
    for its deadline, the watchdog for the job's timeout.
    """
    scope._deadline = deadline


def rescheduler(task: Task) -> Callable[[Task, Outcome[Any]], None]:
    """Return `trio.lowlevel.reschedule` of the run of ``task``, one call shorter."""
    return task._runner.reschedule


def forget_nurseries(task: Task) -> None:
    """Let ``task`` end well although user code left nurseries open in it.

    Otherwise trio ends it with an error that cancels its siblings.
    """
    for nursery in task.child_nurseries:
        nursery.cancel_scope.cancel(reason="left open by a handler of trio_pool")
    task._child_nurseries.clear()


def is_system_clock(clock: Clock) -> bool:
    """Say whether a clock goes as `time.perf_counter` does, but for its zero."""
    kind = type(clock)
    return kind.__qualname__ == "SystemClock" and kind.__module__.startswith("trio.")
