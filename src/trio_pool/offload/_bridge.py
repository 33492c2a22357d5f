"""The bridge: wait in trio for a future of `concurrent.futures`."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import trio
from trio.lowlevel import Abort, enable_ki_protection, reschedule

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


@enable_ki_protection
async def wait_future(
    future: Future[T], *, abandon_on_cancel: bool = False, may_cancel: bool = True
) -> T:
    """Wait until a future is done; return its result or raise its error.

    It holds no thread, so thousands may wait. Cancelled, it cancels the future
    if that has not begun to run; a running one is waited for, and its result
    wins, or is left behind if ``abandon_on_cancel``. Where ``may_cancel`` is
    false the future is not asked: for those whose ``cancel()`` blocks, or says
    yes while the work goes on. A future that is done keeps its result.

    There is no checkpoint before the wait, so work that was submitted in the
    step before is never left behind unknown. The future may outlive the run.
    """
    await wait_until_done(future, abandon_on_cancel, may_cancel)
    return future.result()


@enable_ki_protection
async def wait_until_done(
    future: Future[T],
    abandon_on_cancel: bool,
    may_cancel: bool,
    look: Callable[[Future[T]], object] | None = None,
) -> None:
    """Wait as `wait_future` does.

    ``look`` is called with the future in the step in which this task is woken.
    """
    task = trio.lowlevel.current_task()
    token = trio.lowlevel.current_trio_token()
    # Touched in trio's thread alone: a future that is cancelled calls back at
    # once, and so the wake-up of a task that has left already may be on its way.
    waiting = True

    # It has the future from who calls it: one that is done has its callbacks still,
    # and would keep itself alive.
    def wake(done: Future[T]) -> None:
        nonlocal waiting
        if waiting:
            waiting = False
            try:
                if look is not None:
                    look(done)
            finally:
                reschedule(task)

    def call_back(done: Future[T]) -> None:
        try:
            token.run_sync_soon(wake, done)
        except trio.RunFinishedError:
            # It has outlived the run, and nobody waits for it any more.
            pass

    def abort(_: Callable[[], Any]) -> Abort:
        nonlocal waiting
        if not future.done():
            cancelled = may_cancel and future.cancel()
            if cancelled or (abandon_on_cancel and not future.done()):
                waiting = False
                return Abort.SUCCEEDED
        return Abort.FAILED

    future.add_done_callback(call_back)
    await trio.lowlevel.wait_task_rescheduled(abort)
