"""Workers in processes of their own, by trio-parallel."""

from __future__ import annotations

import math
import os
import sys
from contextlib import asynccontextmanager, nullcontext, suppress
from functools import partial
from signal import SIGKILL
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar, final, overload

import trio_parallel
from trio_parallel import BrokenWorkerError

from .._events import In, Out, log
from . import _child
from ._errors import EngineError
from ._remote import (
    PAYLOAD,
    AnyHandler,
    Handler,
    OpenWorker,
    Payloads,
    Remote,
    check_work,
    lose,
    open_setup,
    pack_work,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager

    from trio_parallel import WorkerContext

    from ._shim import Fate, Report

State = TypeVar("State")

# Seconds that an idle process gets to leave by itself, and then it is killed.
_LEAVING = 5.0

# Seconds after which a process is looked at before it gets a job. A look costs a
# seventh of a call; without it, one for a dead process starts another in vain.
_IDLE = 0.05


@overload
def in_process(
    fn: Callable[[In], Out],
    *,
    setup: Callable[[], object] | None = None,
    warn_above: int = PAYLOAD,
) -> OpenWorker[In, Out]: ...


@overload
def in_process(
    fn: Callable[[State, In], Out],
    *,
    setup: Callable[[], State],
    warn_above: int = PAYLOAD,
) -> OpenWorker[In, Out]: ...


def in_process(
    fn: Callable[..., Any],
    *,
    setup: Callable[[], Any] | None = None,
    warn_above: int = PAYLOAD,
) -> Any:
    """Run ``fn(item)`` in a process for each worker: ``open_pool(n, worker=...)``.

    ``setup`` is called once in each process, before its first job; a ``fn`` of
    two arguments gets what it returned as the first. An error of it is one of
    the worker's setup. Functions, items and results are sent by cloudpickle, so
    closures and lambdas will do. Of more than ``warn_above`` bytes is warned.

    A job that is cancelled, or out of time, is killed with its process and what
    that has started; the process is gone when the caller hears of it, and the
    worker gets a fresh one. One that dies under a job is `WorkerCrashed`. No
    job is run twice. The processes end with this one, however it ends.

    A program has to guard what it runs by ``if __name__ == "__main__":``, as
    processes import it. Ctrl-C is this process's alone, but for those that are
    just starting. What jobs have started ends with their process; one that does
    not leave by itself, such as for a thread of its own, gets 5 seconds.
    """
    takes_state = check_work(fn, setup)
    work = pack_work(fn, setup, takes_state)
    return partial(_open_worker, work, Payloads(warn_above))


@asynccontextmanager
async def _open_worker(
    work: bytes, payloads: Payloads
) -> AsyncGenerator[AnyHandler, None]:
    stack = trio_parallel.open_worker_context(
        idle_timeout=math.inf, grace_period=_LEAVING
    )
    engine: _Process | None = None
    try:
        async with _Forgiving(stack) as context:
            engine = _Process(context)
            await engine.start(work)
            yield Handler(Remote(engine, payloads))
    finally:
        if engine is not None:
            engine.end_children()


@final
class _Forgiving:
    """Closes a context that may have a process in it which had to be killed."""

    def __init__(self, inner: AbstractAsyncContextManager[WorkerContext]) -> None:
        self._inner = inner
        self._context: WorkerContext | None = None

    async def __aenter__(self) -> WorkerContext:
        self._context = await self._inner.__aenter__()
        return self._context

    async def __aexit__(self, *exc_info: Any) -> None:
        assert self._context is not None
        # Those that are dead already are no failure to leave.
        self._context.statistics()
        try:
            await self._inner.__aexit__(None, None, None)
        except BrokenWorkerError as error:
            log.warning("a process of in_process did not leave by itself: %s", error)


@final
class _Process:
    """The one process of a worker."""

    def __init__(self, context: WorkerContext) -> None:
        self.spent = False
        self._context = context
        # There is one process, and one call at a time.
        free: Any = nullcontext()
        self._run = partial(context.run_sync, kill_on_cancel=True, limiter=free)
        self._calls = 0
        self._used_at = -math.inf
        self._pid: int | None = None

    async def start(self, work: bytes) -> None:
        """Have the process set up."""
        try:
            self._pid = await self._run(_child.begin)
            trouble: Fate | None = await self._run(_child.set_up, work)
        except BrokenWorkerError as error:
            self.end_children()
            raise EngineError(_death(error, "was set up")) from error
        except BaseException:
            self.end_children()
            raise
        open_setup(trouble)

    async def call(self, items: list[bytes]) -> Report:
        """Run a call in the process; cancelled, kill it first."""
        self._calls += 1
        if perf_counter() - self._used_at > _IDLE and not self._is_alive():
            lose("the process had ended while it was idle", started=False)
        try:
            report: Report | None = await self._run(_child.run, self._calls, items)
        except BrokenWorkerError as error:
            self.end_children()
            lose(_death(error, "ran a job"), started=True, cause=error)
        except BaseException:
            self.spent = not self._is_alive()
            if self.spent:
                self.end_children()
            raise
        if report is None:
            # It had died, and there was another that knows nothing of this.
            lose("the process had ended while it was idle", started=False)
        self._used_at = perf_counter()
        return report

    def _is_alive(self) -> bool:
        return bool(self._context.statistics().idle_workers)

    def end_children(self) -> None:
        """Kill what jobs have started, whose group is that of their process."""
        # Once, as the number may be another's some time after.
        group, self._pid = self._pid, None
        if os.name == "posix" and group is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, SIGKILL)


def _death(error: BrokenWorkerError, when: str) -> str:
    process = error.args[-1]
    code = getattr(process, "exitcode", None)
    text = f"the process ended with exit code {code} while it {when}"
    main = sys.modules.get("__main__")
    if when == "was set up" and code == 1 and hasattr(main, "__file__"):
        text += (
            "; if what it printed says so, the program starts its pool without the "
            'guard that processes need: if __name__ == "__main__": trio.run(main)'
        )
    return text
