"""Many jobs at once: all of them, each one's outcome, or a stream of results.

`Pool.map`, `Pool.settle` and `Pool.stream` end up here. The input of each is a
batch that workers pull from; this module is where the results go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, Callable, Iterable
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, NoReturn, final

import trio
from trio.lowlevel import (
    Abort,
    checkpoint,
    current_task,
    enable_ki_protection,
    reschedule,
)

from ._batch import Batch
from ._checks import note, refuse
from ._errors import JobCancelled, PoolBroken
from ._events import UNHEARD, JobState, Settled
from ._job import outcome_of, raise_caught
from ._nursery import open_bare_nursery
from ._trio import WAKE
from .streams import Stream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio.lowlevel import Task

    from ._dispatch import Dispatch
    from ._job import Job
    from ._policy import Retry


def _name(item: object, index: int) -> str:
    try:
        text = repr(item)
    except Exception:
        text = f"<{type(item).__name__} whose repr failed>"
    return (
        f"trio_pool: item {index}: {text if len(text) <= 200 else text[:200] + '...'}"
    )


@final
class _Values:
    """The results of `map`, and the failures that end it."""

    batch: Batch

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.failures: list[BaseException] = []

    def expect(self, item: Any) -> None:
        self.values.append(None)

    def answer(self, job: Job) -> None:
        if job.state is JobState.DONE:
            self.values[job.index] = job.value
            return
        error = job.error
        assert error is not None
        error = error.with_traceback(job.terms.traceback)
        note(error, _name(job.item, job.index))
        self.failures.append(error)
        del error
        self.batch.stop()

    def ended(self) -> None:
        pass


@final
class _Settleds:
    """The outcomes of `settle`."""

    def __init__(self) -> None:
        self.results: list[Any] = []

    def expect(self, item: Any) -> None:
        self.results.append(item)

    def answer(self, job: Job) -> None:
        self.results[job.index] = Settled(job.index, job.item, outcome_of(job))

    def ended(self) -> None:
        pass


async def map_items(
    dispatch: Dispatch,
    items: Any,
    timeout: float,
    priority: int,
    retry: Retry | None,
    fn: Callable[..., Any] | None = None,
) -> list[Any]:
    """Run a job for each item; see `Pool.map`."""
    sink = _Values()
    batch = sink.batch = Batch(
        dispatch,
        sink,
        copy_context(),
        timeout,
        priority,
        fn=fn,
        values=sink.values,
        retry=retry,
    )
    cancelled: BaseException | None = None
    try:
        await _run(batch, items)
    except trio.Cancelled as error:
        if not sink.failures:
            raise
        cancelled = error
    # Where something has failed, it is no news that others were called off.
    failures = [
        error for error in sink.failures if not isinstance(error, JobCancelled)
    ] or sink.failures
    if batch.source_error is not None:
        failures = [*failures, batch.source_error]
        if len(failures) == 1:
            raise_caught(batch.source_error, batch.source_error.__traceback__)
    # The end of the pool hides no failure that came before it.
    if (
        batch.pool_error is not None
        and (batch.cut or isinstance(batch.pool_error, PoolBroken))
        and all(isinstance(e, (PoolBroken, JobCancelled)) for e in failures)
    ):
        raise batch.pool_error
    if failures:
        if cancelled is not None:
            failures = [*failures, cancelled]
        try:
            raise BaseExceptionGroup(
                f"map of pool {dispatch.config.name!r} failed", failures
            )
        finally:
            del failures, cancelled, sink, batch
    return sink.values


async def settle_items(
    dispatch: Dispatch,
    items: Any,
    timeout: float,
    priority: int,
    retry: Retry | None,
    fn: Callable[..., Any] | None = None,
) -> list[Any]:
    """Run a job for each item and keep all outcomes; see `Pool.settle`."""
    sink = _Settleds()
    batch = Batch(dispatch, sink, copy_context(), timeout, priority, fn=fn, retry=retry)
    await _run(batch, items)
    _raise_cut(batch)
    return sink.results


def _raise_cut(batch: Batch) -> None:
    """Raise why not all of the input was taken, if so."""
    if batch.source_error is not None:
        raise_caught(batch.source_error, batch.source_error.__traceback__)
    if batch.cut and batch.pool_error is not None:
        raise batch.pool_error


@enable_ki_protection
async def _run(batch: Batch, items: Any) -> None:
    """Feed a batch and wait for its end, whatever happens meanwhile."""
    dispatch = batch.dispatch
    _open(batch, items)
    try:
        dispatch.nesting.check(current_task(), batch, "a wait for all of a batch")
        if not isinstance(items, Iterable):
            await batch.feed(items)
        await batch.wait()
    except BaseException:
        await _abandon(batch)
        raise
    finally:
        dispatch.forget(batch)


async def _abandon(batch: Batch) -> None:
    batch.stop()
    with trio.CancelScope(shield=True):
        await batch.wait()


def _open(batch: Batch, items: object) -> None:
    dispatch = batch.dispatch
    dispatch.check_thread()
    if dispatch.closed:
        raise dispatch.refusal()
    if isinstance(items, Iterable):
        iterator = iter(items)
        dispatch.sources[batch] = None
        batch.open(iterator)
    elif isinstance(items, AsyncIterable):
        dispatch.sources[batch] = None
    else:
        expected = "an iterable or an async iterable"
        raise TypeError(refuse("items", items, expected))


@final
class _Window:
    """The results of a stream that its reader has not read yet."""

    def __init__(self, ordered: bool, ahead: float, outcomes: bool) -> None:
        self._ordered = ordered
        self._ahead = ahead
        self._outcomes = outcomes
        self._read = 0
        self._ready: dict[int, Job] = {}
        self._order: deque[int] = deque()
        self._reader: Task | None = None
        self.batch: Batch

    def expect(self, item: Any) -> None:
        """Take note of the next item."""

    def answer(self, job: Job) -> None:
        """Keep a result for the reader."""
        self._ready[job.index] = job
        if not self._ordered:
            self._order.append(job.index)
        if not self._ordered or job.index == self._read:
            self.ended()

    def ended(self) -> None:
        """Have the reader look again."""
        if self._reader is not None:
            reader, self._reader = self._reader, None
            reschedule(reader, WAKE)

    @enable_ki_protection
    async def read(self) -> Any:
        """Return the next result, or raise the error in its place."""
        if self._has_next():
            await checkpoint()
        while not self._has_next():
            if self._over():
                self._finish()
            task = current_task()
            if self._reader is not None:
                raise trio.BusyResourceError("another task is reading this stream")
            self.batch.dispatch.nesting.check(task, self.batch, "reading a stream")
            self._reader = task
            await self.batch.dispatch.sleep(self._abort)
        index = self._read if self._ordered else self._order.popleft()
        job = self._ready.pop(index)
        self._read += 1
        self.batch.move_on(self._read + self._ahead)
        if self._outcomes:
            return Settled(job.index, job.item, outcome_of(job))
        if job.error is not None:
            note(job.error, _name(job.item, job.index))
            if isinstance(job.error, StopAsyncIteration):
                raise RuntimeError(
                    f"job {job.id} raised StopAsyncIteration"
                ) from job.error
            raise_caught(job.error, job.terms.traceback)
        return job.value

    def _has_next(self) -> bool:
        return self._read in self._ready if self._ordered else bool(self._order)

    def _over(self) -> bool:
        return self.batch.exhausted and not self.batch.live

    def _abort(self, _: object) -> Abort:
        self._reader = None
        return Abort.SUCCEEDED

    def _finish(self) -> NoReturn:
        batch = self.batch
        _raise_cut(batch)
        raise StopAsyncIteration

    def leave(self) -> None:
        """Hand the failures that were not read to the pool, and forget the rest."""
        for job in self._ready.values():
            if job.state in UNHEARD:
                self.batch.dispatch.keep_unheard(job)
        self._ready.clear()
        self._order.clear()


@asynccontextmanager
async def open_stream(
    dispatch: Dispatch,
    items: Any,
    timeout: float,
    priority: int,
    retry: Retry | None,
    ordered: bool,
    ahead: int,
    outcomes: bool,
    fn: Callable[..., Any] | None = None,
) -> AsyncGenerator[Stream[Any], None]:
    """Run a job for each item, not far ahead of the reader; see `Pool.stream`."""
    window = _Window(ordered, ahead, outcomes)
    stream = Stream[Any](window.read)
    batch = window.batch = Batch(
        dispatch,
        window,
        copy_context(),
        timeout,
        priority,
        stop_at=ahead,
        keeps=True,
        fn=fn,
        retry=retry,
    )
    await checkpoint()
    _open(batch, items)
    try:
        if isinstance(items, Iterable):
            yield stream
        else:
            async with open_bare_nursery() as nursery:
                nursery.start_soon(batch.feed, items)
                try:
                    yield stream
                finally:
                    batch.stop()
    finally:
        await _abandon(batch)
        dispatch.forget(batch)
        window.leave()
