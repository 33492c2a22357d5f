"""The few places that read trio's insides, each with a test that pins it.

Trio documents `Task.context` and the sleep traps; what is private here saves
a cancel scope (6-11 us) or a public call of 2 us on every job, or repairs a
task that user code has left broken.
"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from types import coroutine
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, final

from outcome import Outcome
from trio import CancelScope
from trio.lowlevel import Abort, wait_task_rescheduled

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from trio.abc import Clock
    from trio.lowlevel import Task

Sleep: TypeAlias = Callable[[Callable[[Callable[[], NoReturn]], Abort]], Awaitable[Any]]


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


def sleeper() -> Sleep:
    """Return `trio.lowlevel.wait_task_rescheduled` for one run, a good deal shorter.

    Trio's makes a message for its scheduler and a coroutine for each sleep,
    0.5 us and 500 bytes that have to be in the cache. The scheduler reads the
    message in the step in which it is sent, so one is enough for a whole run.
    """
    message = _sleep_message()
    if message is None:
        return wait_task_rescheduled
    fields = vars(message)

    @coroutine
    def sleep(abort: Callable[[Callable[[], NoReturn]], Abort]) -> Any:
        fields["abort_func"] = abort
        woken: Any = yield message
        # Nothing of a sleeper is to be kept alive by this.
        fields["abort_func"] = None
        if woken is WAKE:
            return None
        try:
            return woken.unwrap()
        finally:
            # The traceback of what it raises has this frame.
            del woken

    return sleep


def _sleep_message() -> object:
    """Return what trio's scheduler is sent by a task that goes to sleep.

    None, if it is not what it used to be, or cannot be sent again.
    """

    def abort(_: object) -> Abort:
        return Abort.FAILED

    asleep = wait_task_rescheduled(abort)  # noqa: ASYNC105
    message: object = asleep.send(None)
    asleep.close()
    return (
        message if getattr(message, "__dict__", None) == {"abort_func": abort} else None
    )


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


def runner_of(task: Task) -> Any:
    """Return what runs ``task``, and all others of its run.

    Its ``reschedule`` is `trio.lowlevel.reschedule`, one call shorter.
    """
    return task._runner


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
