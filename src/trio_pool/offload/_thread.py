"""Workers whose jobs run in threads of this process."""

from __future__ import annotations

from contextlib import asynccontextmanager
from contextvars import copy_context
from functools import partial
from time import perf_counter
from types import CoroutineType
from typing import TYPE_CHECKING, Any, final

import outcome
import trio

from .._checks import refuse
from .._events import In, Out
from ._remote import (
    AnyHandler,
    Handler,
    OpenWorker,
    Workers,
    await_one,
    check_flag,
    check_work,
    never_begun,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

_NOTHING = object()


def in_thread(
    fn: Callable[[In], Out], *, abandon_on_cancel: bool = False
) -> OpenWorker[In, Out]:
    """Run ``fn(item)`` in a thread for each worker: ``open_pool(n, worker=...)``.

    It sees the caller's context variables, and may call back by
    `trio.from_thread`. A thread cannot be stopped: cancelled, or out of time, a
    job is waited for, and a result that it has all the same wins. A long one
    should call `trio.from_thread.check_cancelled` now and then, which ends it.
    With ``abandon_on_cancel`` its caller does not wait: the thread goes on, its
    result is dropped, and its worker takes no job before it has ended. It must
    not call back for a job of its own pool then, which may wait for ever.
    """
    check_work(fn, None)
    check_flag("abandon_on_cancel", abandon_on_cancel)
    return Workers(partial(_open_shared, fn, abandon_on_cancel))


@asynccontextmanager
async def _open_shared(
    fn: Callable[[Any], Any], abandon_on_cancel: bool, size: int
) -> AsyncGenerator[OpenWorker[Any, Any], None]:
    left_behind: list[_Place] = []
    yield partial(_open_worker, fn, abandon_on_cancel, left_behind)


@asynccontextmanager
async def _open_worker(
    fn: Callable[[Any], Any],
    abandon_on_cancel: bool,
    left_behind: list[_Place],
) -> AsyncGenerator[AnyHandler, None]:
    await await_one(left_behind, _Place.wait_until_free)
    other_end = _InThread(fn, abandon_on_cancel)
    try:
        yield Handler(other_end)
    finally:
        if other_end.spent:
            left_behind.append(other_end.place)


@final
class _Place:
    """A worker's place for one thread, which is free whenever it has a job."""

    def __init__(self) -> None:
        self.taken = False
        self._free: trio.Event | None = None

    def free(self) -> None:
        self.taken = False
        if self._free is not None:
            self._free.set()

    async def wait_until_free(self) -> None:
        if self.taken:
            self._free = trio.Event()
            await self._free.wait()


@final
class _Call:
    """One call in a thread.

    Trio asks it as it would ask a limiter, whose every token is one more turn of
    the scheduler; and so it hears of the end in the step that wakes the worker.
    """

    __slots__ = ("_answer", "_fn", "_place", "_result")

    def __init__(
        self,
        place: _Place,
        fn: Callable[[Any], Any],
        answer: Callable[[Any], object] | None,
    ) -> None:
        self._place = place
        self._fn = fn
        self._answer = answer
        self._result: Any = _NOTHING

    def run(self, item: Any) -> Any:
        """Do it, in the thread."""
        result = self._fn(item)
        # Trio refuses these.
        if not isinstance(result, CoroutineType):
            self._result = result
        return result

    async def acquire_on_behalf_of(self, _: object) -> None:
        self._place.taken = True

    def release_on_behalf_of(self, _: object) -> None:
        self._place.free()
        # The traceback of an error has this, and is not to have the worker too.
        answer, self._answer = self._answer, None
        result, self._result = self._result, _NOTHING
        if result is not _NOTHING and answer is not None:
            answer(result)


@final
class _InThread:
    """The other end of a worker: a thread at a time."""

    def __init__(self, fn: Callable[[Any], Any], abandon_on_cancel: bool) -> None:
        self.place = _Place()
        self._fn = fn
        self._abandons = abandon_on_cancel
        name = getattr(fn, "__name__", None)
        self._run_sync: Any = partial(
            trio.to_thread.run_sync,
            # As trio has it, which makes it anew for every call.
            thread_name=f"{name} from {trio.lowlevel.current_task().name}",
            abandon_on_cancel=abandon_on_cancel,
        )

    def one(
        self, job_input: Any, answer: Callable[[Any], object] | None
    ) -> Awaitable[Any]:
        """Run a job; return its result, or raise its error."""
        # One that is left behind has nobody to answer.
        call = _Call(self.place, self._fn, None if self._abandons else answer)
        return self._run_sync(call.run, job_input, limiter=call)  # type: ignore[no-any-return]

    @property
    def spent(self) -> bool:
        """Whether a thread has been left behind."""
        return self.place.taken

    async def many(self, items: list[Any]) -> tuple[list[outcome.Outcome[Any]], float]:
        """Run several jobs one after the other; return their outcomes."""
        call = _Call(self.place, partial(_run_all, self._fn), None)
        results, seconds = await self._run_sync(call.run, items, limiter=call)
        return never_begun(results, len(items)), seconds


def _run_all(
    fn: Callable[[Any], Any], items: list[Any]
) -> tuple[list[outcome.Outcome[Any]], float]:
    results: list[outcome.Outcome[Any]] = []
    begun = perf_counter()
    for number, item in enumerate(items):
        # What one sets is not for the others to see.
        run = copy_context().run
        try:
            if number:
                trio.from_thread.check_cancelled()
            value = run(fn, item)
            if isinstance(value, CoroutineType):
                value.close()
                raise TypeError(refuse("fn", fn, "a sync function"))
            results.append(outcome.Value(value))
        except trio.Cancelled:
            # That of this very call.
            raise
        except BaseException as error:
            results.append(outcome.Error(error))
            if not isinstance(error, Exception):
                break
    return results, perf_counter() - begun
