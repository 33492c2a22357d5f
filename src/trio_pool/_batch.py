"""A batch: a source that workers pull jobs from, so that no item ever queues."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncGenerator
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, final

import trio
from trio.lowlevel import (
    Abort,
    checkpoint,
    current_task,
    disable_ki_protection,
    enable_ki_protection,
    reschedule,
)

from ._events import JobState
from ._job import Job, Terms, new_job, new_terms
from ._trio import WAKE

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
    from contextvars import Context

    from trio.lowlevel import Task

    from ._dispatch import Dispatch
    from ._policy import Retry
    from ._worker import Worker


class Sink(Protocol):
    """Where a batch puts its results: a list, or a stream's window."""

    def expect(self, item: Any) -> None:
        """The next item of the input has been taken."""

    def answer(self, job: Job) -> None:
        """The job of ``job.index`` has ended."""

    def ended(self) -> None:
        """The source has run out and every item has ended."""


@disable_ki_protection
def _advance(iterator: Iterator[Any]) -> Any:
    """Take an item from the user's iterator, which Ctrl-C may interrupt."""
    return next(iterator)


@disable_ki_protection
async def _advance_async(iterator: AsyncIterator[Any]) -> Any:
    return await anext(iterator)


# Iterators that run nobody's code need no place for Ctrl-C to land.
_PLAIN = frozenset(map(type, map(iter, ([], (), range(0), {}, set(), "", b""))))


@final
class Batch:
    """One `map`, `settle` or `stream`: where items come from and results go.

    Unless the sink ``keeps`` the job records, each worker has one record for
    the batch and fills it anew for each item. A batch is ``hungry`` while a
    worker may pull from it.
    """

    __slots__ = (
        "_feeder",
        "_feeding",
        "_queue",
        "_raise_cancel",
        "_sink",
        "advance",
        "context",
        "cut",
        "dispatch",
        "ended_early",
        "exhausted",
        "fn",
        "handed",
        "hungry",
        "iterator",
        "keeps",
        "live",
        "owner",
        "pool_error",
        "priority",
        "put_offs",
        "queued_at",
        "retry",
        "source_error",
        "stop_at",
        "stopped",
        "taken",
        "timeout",
        "values",
        "waiting",
    )

    def __init__(
        self,
        dispatch: Dispatch,
        sink: Sink,
        context: Context,
        timeout: float,
        priority: int,
        stop_at: float = math.inf,
        keeps: bool = False,
        fn: Callable[..., Any] | None = None,
        values: list[Any] | None = None,
        retry: Retry | None = None,
    ) -> None:
        self.dispatch = dispatch
        self.context = context
        self.timeout = timeout
        self.priority = priority
        self.keeps = keeps
        self.fn = fn
        """What a `TaskPool` calls with each item."""
        self.retry = retry
        """Replaces the retry policy of the pool."""
        self.put_offs: set[Job] = set()
        """Items that failed and wait for, or are in, another attempt."""
        self.queued_at = 0.0
        self.waiting = False
        self.hungry = False
        self.taken = 0
        """Items taken so far: the index of the next one."""
        self.handed = 0
        """Those of them that went through `take`; the rest were pulled."""
        self.stop_at = stop_at
        """The index that must not be taken before the reader has moved on."""
        self.live = 0
        """Items that a worker has."""
        self.exhausted = False
        """No more items come from the source."""
        self.stopped = False
        """The rest was called off."""
        self.cut = False
        """It was called off before the source ran out."""
        self.ended_early = 0
        """Items that ended cancelled because the rest was called off."""
        self.source_error: BaseException | None = None
        self.pool_error: Exception | None = None
        self._sink = sink
        self.iterator: Iterator[Any] | None = None
        self.advance: Callable[[Any], Any] = _advance
        self.values: list[Any] | None = values
        """Where values go straight, if nothing but values is wanted."""
        self._queue: deque[Any] = deque()
        self._feeder: Task | None = None
        self._feeding: trio.CancelScope | None = None
        self.owner: Task | None = None
        self._raise_cancel: Callable[[], NoReturn] | None = None

    # What workers and the supervisor do: synchronous, in their own step.

    def open(self, iterator: Iterator[Any]) -> None:
        """Let workers pull from a plain iterator."""
        self.iterator = iterator
        if type(iterator) in _PLAIN:
            self.advance = next
        else:
            # In a context of its own: what it sets is no job's business.
            run = self.context.copy().run
            self.advance = partial(run, _advance)  # type: ignore[call-arg]
        self.look()

    @property
    def pulled(self) -> int:
        """Items that a worker has taken and finished without asking anyone."""
        return self.taken - self.handed

    def run_dry(self) -> None:
        """The source has said that it is at its end; do not ask it again."""
        self.iterator = iter(())
        self.advance = next

    def is_alone(self) -> bool:
        """Say whether a worker may just go on with this batch's next item."""
        dispatch = self.dispatch
        return (
            self.values is not None
            and self.iterator is not None
            and self.fn is None
            and self.timeout == math.inf
            and dispatch.solo
            and not dispatch.watched
            and not dispatch.room.count
            and not dispatch.line.count
            and dispatch.line.sources == 1
            and not self.stopped
        )

    def take(self, worker: Worker) -> Job | None:
        """Pull the next item into the worker's record; None if there is none."""
        if self.iterator is None:
            item = self._queue.popleft()
            if self._feeder is not None:
                self._wake_feeder()
        else:
            try:
                item = self.advance(self.iterator)
            except StopIteration:
                self._run_out()
                return None
            except BaseException as error:
                self.source_error = error
                self.stop()
                return None
            if self.stopped:
                return None
        self._sink.expect(item)
        job = worker.ticket
        if job is None or job.batch is not self or self.keeps:
            job = worker.ticket = self._ticket()
        else:
            job.attempts = 0
            if job.terms is not job.dispatch.plain_terms:
                job.terms = self._terms()
            job.error = None
        job.input = item if self.fn is None else (self.fn, (item,))
        job.index = self.taken
        job.name()
        self.taken += 1
        self.handed += 1
        self.live += 1
        if self.taken >= self.stop_at or not (self.iterator or self._queue):
            self.hungry = False
        return job

    def _ticket(self) -> Job:
        job = new_job(self.dispatch, 0, None, self.context, self.timeout)
        job.priority = self.priority
        job.batch = self
        job.named = -1
        job.permit = None
        job.terms = self._terms()
        return job

    def _terms(self) -> Terms:
        if self.retry is None:
            return self.dispatch.plain_terms
        return new_terms(self.retry)

    def put_off(self, job: Job) -> None:
        """Keep the record of an item that will be tried again for that item."""
        self.put_offs.add(job)
        if job.worker is not None and job.worker.ticket is job:
            job.worker.ticket = None

    def answer(self, job: Job) -> None:
        """Pass on what became of an item."""
        self.live -= 1
        self.put_offs.discard(job)
        called_off = self.stopped and self.pool_error is None
        if called_off and job.state is JobState.CANCELLED:
            self.ended_early += 1
        else:
            self._sink.answer(job)
        if not self.keeps:
            job.input = job.value = None
            job.forget_error()
        if not self.live and self.exhausted:
            self._end()

    def look(self) -> None:
        """Get in line if there is something to pull."""
        if (
            not self.hungry
            and not self.exhausted
            and self.taken < self.stop_at
            and (self.iterator is not None or self._queue)
        ):
            self.hungry = True
            self.dispatch.offer(self)

    def _run_out(self) -> None:
        self.exhausted = True
        self.hungry = False
        self._queue.clear()
        self.iterator = None
        if self._feeder is not None:
            self._wake_feeder()
        if not self.live:
            self._end()
        if self.dispatch.listeners:
            self.dispatch.hear_end()

    def _end(self) -> None:
        self._sink.ended()
        if self.owner is not None:
            owner, self.owner = self.owner, None
            reschedule(owner, WAKE)

    def stop(self, pool_error: Exception | None = None) -> None:
        """Call off the rest: pull no more, cancel what runs."""
        if pool_error is not None and self.pool_error is None:
            self.pool_error = pool_error
        if not self.stopped:
            self.stopped = True
            self.cut = not self.exhausted
            if self._feeding is not None:
                self._feeding.cancel(reason="a batch of trio_pool was called off")
            self._run_out()
            self.dispatch.cancel_batch(self)

    def is_stuck(self, task: Task) -> bool:
        """Say whether no worker has an item of it, and one would be needed."""
        return not self.live and not self.exhausted

    def move_on(self, stop_at: float) -> None:
        """Let items below the index ``stop_at`` be taken."""
        self.stop_at = stop_at
        if self._feeder is not None:
            self._wake_feeder()
        self.look()

    # What the task of the call does.

    def _wake_feeder(self) -> None:
        feeder, self._feeder = self._feeder, None
        if feeder is not None:
            reschedule(feeder, WAKE)

    async def feed(self, items: AsyncIterable[Any]) -> None:
        """Pull items from an async iterable in this task, a few ahead."""
        if self.exhausted:
            return
        iterator = aiter(items)
        with trio.CancelScope() as self._feeding:
            try:
                while not self.exhausted:
                    item = await _advance_async(iterator)
                    self._queue.append(item)
                    self.look()
                    await self._wait_for_need()
            except StopAsyncIteration:
                self._run_out_of_feed()
            except Exception as error:
                self.source_error = error
                self.stop()
            finally:
                # Left to the garbage collector, its cleanup would be cut off.
                if isinstance(iterator, AsyncGenerator):
                    await iterator.aclose()

    async def _wait_for_need(self) -> None:
        width = max(1, self.dispatch.wanted)
        while not self.exhausted and (
            len(self._queue) >= width or self.taken + len(self._queue) >= self.stop_at
        ):
            self._feeder = current_task()
            await self.dispatch.sleep(self._feeder_left)

    def _feeder_left(self, _: object) -> Abort:
        self._feeder = None
        return Abort.SUCCEEDED

    def _run_out_of_feed(self) -> None:
        if self._queue:
            # What was fed goes on as a plain source that will run out.
            self.iterator = _drain(self._queue)
            self.look()
        else:
            self._run_out()

    @enable_ki_protection
    async def wait(self) -> None:
        """Wait until the source has run out and every item has ended.

        Cancelled, it calls off the rest and returns by the cancellation when
        all handlers have ended; unless they all finished all the same.
        """
        if self.exhausted and not self.live:
            await checkpoint()
            return
        self.owner = current_task()
        await self.dispatch.sleep(self._abort)
        raise_cancel, self._raise_cancel = self._raise_cancel, None
        if raise_cancel is not None and (self.cut or self.ended_early):
            raise_cancel()

    def _abort(self, raise_cancel: Callable[[], NoReturn]) -> Abort:
        owner, self.owner = self.owner, None
        self.stop()
        if not self.live:
            return Abort.SUCCEEDED
        self.owner = owner
        self._raise_cancel = raise_cancel
        return Abort.FAILED


def _drain(queue: deque[Any]) -> Iterator[Any]:
    while queue:
        yield queue.popleft()
