"""Many jobs at once: all of them, each one's outcome, or a stream of results.

`Pool.map`, `Pool.settle` and `Pool.stream` end up here. The input of each is a
batch that workers pull from; this module is where the results go.
"""

# One read of trio's insides is inlined here, as a call would cost more than it
# does; the tests of `_trio` pin what it means.
# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextvars import copy_context
from time import perf_counter
from typing import TYPE_CHECKING, Any, final

import outcome
import trio
from trio.lowlevel import (
    Abort,
    cancel_shielded_checkpoint,
    checkpoint,
    current_task,
    enable_ki_protection,
    reschedule,
)

from ._batch import Batch
from ._checks import check_source, note
from ._errors import JobCancelled, PoolBroken
from ._events import UNHEARD, JobState, Settled
from ._job import DraftValue, outcome_of, raise_caught
from ._nursery import open_bare_nursery, whole_block
from ._progress import AnyProgress, show
from ._records import draft_of
from ._trio import WAKE
from .streams import Stream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio.lowlevel import Task

    from ._dispatch import Dispatch
    from ._job import Job
    from ._policy import Retry


_MISSING = object()

# Seconds for which a stream may be read before others get their turn.
_SLICE = 0.0005

# Items of `settle` whose records are made in one go: this takes below 0.5 ms.
_STRETCH = 512


def name_item(item: object, index: int) -> str:
    """Word the note that tells which item an error is about."""
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

    items = None
    reader: Task | None = None

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.failures: list[BaseException] = []

    @property
    def failed(self) -> int:
        return len(self.failures)

    def expect(self, item: Any) -> None:
        self.values.append(None)

    def answer(self, job: Job) -> bool:
        if job.state is JobState.DONE:
            self.values[job.index] = job.value
            return False
        error = job.error
        assert error is not None
        error = error.with_traceback(job.terms.traceback)
        note(error, name_item(job.item, job.index))
        self.failures.append(error)
        assert job.batch is not None
        job.batch.stop()
        return False

    def look(self) -> None:
        pass

    def ended(self) -> None:
        pass

    def widen(self, chunk: int) -> None:
        pass


@final
class _Settleds:
    """The outcomes of `settle`: values, and what is not one beside them."""

    reader: Task | None = None

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.values: list[Any] = []
        self._failures: dict[int, Settled[Any, Any]] = {}

    @property
    def failed(self) -> int:
        return len(self._failures)

    def expect(self, item: Any) -> None:
        self.values.append(None)
        self.items.append(item)

    def answer(self, job: Job) -> bool:
        if job.state is JobState.DONE:
            self.values[job.index] = job.value
        else:
            failure = Settled(job.index, job.item, outcome_of(job))
            self._failures[job.index] = failure
        return False

    def look(self) -> None:
        pass

    def ended(self) -> None:
        pass

    def widen(self, chunk: int) -> None:
        pass

    async def results(self) -> list[Any]:
        """Make the record of each item; other tasks get their turns meanwhile."""
        results: list[Any] = []
        for start in range(0, len(self.items), _STRETCH):
            if start:
                await cancel_shielded_checkpoint()
            end = start + _STRETCH
            results += settled_all(start, self.items[start:end], self.values[start:end])
        for index, failure in self._failures.items():
            results[index] = failure
        return results


async def map_items(
    dispatch: Dispatch,
    items: Any,
    timeout: float,
    priority: int,
    retry: Retry | None,
    chunk: int | None = None,
    fn: Callable[..., Any] | None = None,
    progress: AnyProgress = False,
) -> list[Any]:
    """Run a job for each item; see `Pool.map`."""
    sink = _Values()
    context = copy_context()
    batch = Batch(
        dispatch, sink, context, timeout, priority, fn=fn, retry=retry, chunk=chunk
    )
    failures: list[BaseException] = []
    cancelled: BaseException | None = None
    try:
        try:
            await _run(batch, items, progress)
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
            raise BaseExceptionGroup(
                f"map of pool {dispatch.config.name!r} failed", failures
            )
        return sink.values
    finally:
        # What is raised has this frame in its traceback, and leads to the batch.
        batch.source_error = None
        del failures, cancelled, sink, batch


async def settle_items(
    dispatch: Dispatch,
    items: Any,
    timeout: float,
    priority: int,
    retry: Retry | None,
    chunk: int | None = None,
    fn: Callable[..., Any] | None = None,
    progress: AnyProgress = False,
) -> list[Any]:
    """Run a job for each item and keep all outcomes; see `Pool.settle`."""
    sink = _Settleds()
    context = copy_context()
    batch = Batch(
        dispatch, sink, context, timeout, priority, fn=fn, retry=retry, chunk=chunk
    )
    try:
        await _run(batch, items, progress)
        _raise_cut(batch)
        return await sink.results()
    finally:
        batch.source_error = None


def _raise_cut(batch: Batch) -> None:
    """Raise why not all of the input was taken, if so."""
    if batch.source_error is not None:
        raise_caught(batch.source_error, batch.source_error.__traceback__)
    if batch.cut and batch.pool_error is not None:
        raise batch.pool_error


@enable_ki_protection
async def _run(batch: Batch, items: Any, progress: AnyProgress) -> None:
    """Feed a batch and wait for its end, whatever happens meanwhile."""
    dispatch = batch.dispatch
    _open(batch, items)
    try:
        async with show(progress, items, batch.counts):
            try:
                task = current_task()
                dispatch.nesting.check(task, batch, "a wait for all of a batch")
                if not isinstance(items, Iterable):
                    await batch.feed(items)
                await batch.wait()
            except BaseException:
                await _abandon(batch)
                raise
    finally:
        _close(batch)


def _close(batch: Batch) -> None:
    """Part with a batch that has ended."""
    batch.dispatch.forget(batch)
    # Nothing comes any more. What came is not to wait for the garbage collector:
    # the traceback of an error may lead to a job, and from there back to here.
    del batch.sink


async def _abandon(batch: Batch) -> None:
    batch.stop()
    with trio.CancelScope(shield=True):
        await batch.wait()


def _open(batch: Batch, items: object) -> None:
    dispatch = batch.dispatch
    dispatch.check_thread()
    if dispatch.closed:
        raise dispatch.refusal()
    check_source("items", items)
    iterator = iter(items) if isinstance(items, Iterable) else None
    dispatch.sources[batch] = None
    if iterator is not None:
        batch.open(iterator)


_Draft = draft_of(Settled)


def settled_all(start: int, items: list[Any], values: list[Any]) -> list[Any]:
    """Make the record of each item that has ended by a value."""
    draft, frozen = _Draft, Settled
    draft_value, frozen_value = DraftValue, outcome.Value
    results: list[Any] = []
    for index, item in enumerate(items):
        # `new_value`, without the call.
        value = draft_value()
        value._unwrapped = False
        value.value = values[index]
        value.__class__ = frozen_value
        settled = draft()
        settled.index = start + index
        settled.item = item
        settled.outcome = value
        settled.__class__ = frozen
        results.append(settled)
    return results


@final
class _Numbered(dict[int, Any]):
    """Items by their index; the reader takes them in another order."""

    def __init__(self) -> None:
        self._next = 0

    def append(self, item: Any) -> None:
        self[self._next] = item
        self._next += 1


@final
class _Window:
    """The results of a stream that its reader has not read yet."""

    batch: Batch

    def __init__(
        self, ordered: bool, ahead: int | None, calls: int, outcomes: bool
    ) -> None:
        self._ordered = ordered
        self._wanted = ahead
        self._calls = calls
        """How many calls are to be ahead, if nothing else is wanted."""
        self._ahead = 0
        # By index, in the order in which they were ready.
        self.values: dict[int, Any] = {} if ordered else OrderedDict()
        self.items: _Numbered | None = _Numbered() if outcomes else None
        self.reader: Task | None = None
        self.failed = 0
        self._failures: dict[int, Job] = {}
        """What stands for itself in ``values`` is a job that has failed."""
        self._tells = outcomes
        """Whether there is more to a result than its value."""
        self._read = 0
        self._rested = -math.inf

    def expect(self, item: Any) -> None:
        """Take note of the next item."""
        if self.items is not None:
            self.items.append(item)

    def answer(self, job: Job) -> bool:
        """Keep a result for the reader."""
        index = job.index
        done = job.state is JobState.DONE
        if not done:
            self._failures[index] = job
            self._tells = True
            self.failed += 1
        self.values[index] = job.value if done else None
        if self.reader is not None:
            self.look()
        return not done

    def look(self) -> None:
        """Have the reader go on if there is something for it."""
        if self._has_next():
            self.ended()

    def widen(self, chunk: int) -> None:
        """Let as many items be taken ahead as several calls carry."""
        self._ahead = self._wanted or self._calls * chunk
        self.batch.stop_at = self._read + self._ahead
        self.batch.look()

    def ended(self) -> None:
        """Have the reader look again."""
        if self.reader is not None:
            reader, self.reader = self.reader, None
            reschedule(reader, WAKE)

    @enable_ki_protection
    async def read(self) -> Any:
        """Return the next result, or raise the error in its place."""
        # A read that need not wait is no checkpoint: that would take longer
        # than all else. But it is cancelled as one would be.
        if (
            perf_counter() - self._rested > _SLICE
            or current_task()._cancel_status.effectively_cancelled
        ):
            await self._rest()
        values = self.values
        index = self._read
        if self._ordered:
            value = values.pop(index, _MISSING)
            while value is _MISSING:
                await self._wait()
                value = values.pop(index, _MISSING)
        else:
            while not values:
                await self._wait()
            index, value = values.popitem(last=False)  # type: ignore[call-arg]
        self._read += 1
        batch = self.batch
        batch.stop_at = self._read + self._ahead
        if not batch.hungry or batch.feeder is not None:
            batch.move_on()
        if self._tells:
            return self._tell(index, value)
        return value

    async def _rest(self) -> None:
        if self._has_next():
            await checkpoint()
        self._rested = perf_counter()

    async def _wait(self) -> None:
        batch = self.batch
        if batch.is_over():
            _raise_cut(batch)
            raise StopAsyncIteration
        if self.reader is not None:
            raise trio.BusyResourceError("another task is reading this stream")
        task = current_task()
        batch.dispatch.nesting.check(task, batch, "reading a stream")
        self.reader = task
        await batch.dispatch.sleep(self._abort)
        self._rested = perf_counter()

    def _tell(self, index: int, value: Any) -> Any:
        job = self._failures.pop(index, None)
        if self.items is not None:
            item = self.items.pop(index)
            if job is None:
                return settled_all(index, [item], [value])[0]
            return Settled(index, item, outcome_of(job))
        if job is not None:
            error = job.error
            assert error is not None
            try:
                note(error, name_item(job.item, index))
                if isinstance(error, StopAsyncIteration):
                    text = f"job {job.id} raised StopAsyncIteration"
                    raise RuntimeError(text) from error
                raise_caught(error, job.terms.traceback)
            finally:
                del error, job
        return value

    def _has_next(self) -> bool:
        return self._read in self.values if self._ordered else bool(self.values)

    def _abort(self, _: object) -> Abort:
        self.reader = None
        return Abort.SUCCEEDED

    def leave(self) -> None:
        """Hand the failures that were not read to the pool, and forget the rest."""
        for job in self._failures.values():
            if job.state in UNHEARD:
                self.batch.dispatch.keep_unheard(job)
        self._failures.clear()
        self.values.clear()


@whole_block
async def open_stream(
    dispatch: Dispatch,
    items: Any,
    timeout: float,
    priority: int,
    retry: Retry | None,
    chunk: int | None,
    ordered: bool,
    ahead: int | None,
    outcomes: bool,
    fn: Callable[..., Any] | None = None,
    progress: AnyProgress = False,
) -> AsyncGenerator[Stream[Any], None]:
    """Run a job for each item, not far ahead of the reader; see `Pool.stream`."""
    window = _Window(ordered, ahead, 2 * max(1, dispatch.wanted), outcomes)
    stream = Stream[Any](window.read)
    batch = window.batch = Batch(
        dispatch,
        window,
        copy_context(),
        timeout,
        priority,
        fn=fn,
        retry=retry,
        chunk=chunk,
    )
    window.widen(batch.chunk.size)
    await checkpoint()
    _open(batch, items)
    try:
        async with show(progress, items, batch.counts):
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
    finally:
        _close(batch)
        batch.source_error = None
        window.leave()
