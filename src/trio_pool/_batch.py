"""A batch: a source that workers pull jobs from, so that no item ever queues."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncGenerator
from functools import partial
from itertools import repeat
from operator import length_hint
from time import perf_counter
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, final

import trio
from trio.lowlevel import (
    Abort,
    checkpoint,
    current_task,
    disable_ki_protection,
    reschedule,
)

from ._chunks import ChunkSize
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
    """Where a batch puts its results: a list, or a stream's window.

    What `answer` would do with the value of an item a worker that pulls does
    itself, as a call would take longer: it puts the value at its index into
    ``values``.
    """

    values: Any
    """Results by index: a list that has a place for each item, or a mapping."""
    items: Any
    """Where items are kept, in the order of their indices; None if they are not."""
    reader: Task | None
    """Who waits for the next result, and wants to look at each that is ready."""

    @property
    def failed(self) -> int:
        """Items that ended by an error, cancelled ones too."""
        ...

    def expect(self, item: Any) -> None:
        """The next item of the input has been taken."""

    def answer(self, job: Job) -> bool:
        """The job of ``job.index`` has ended; say whether its record is kept."""
        ...

    def look(self) -> None:
        """Let the reader go on, if the next result is ready."""

    def ended(self) -> None:
        """The source has run out and every item has ended."""

    def widen(self, chunk: int) -> None:
        """Calls carry so many items from now on."""


@disable_ki_protection
def _advance(iterator: Iterator[Any]) -> Any:
    """Take an item from the user's iterator, which Ctrl-C may interrupt."""
    return next(iterator)


@disable_ki_protection
async def _advance_async(iterator: AsyncIterator[Any]) -> Any:
    return await anext(iterator)


TURN = 0.0006
"""Seconds for which the workers of a batch may go on in one turn of trio's
scheduler, all together. Another task may have to wait for two of them: it is
the first of its turn, and then the last."""

# Seconds for which items are pulled for one call, lest nothing else runs meanwhile.
_PULLING = 0.002

# Iterators that run nobody's code need no place for Ctrl-C to land.
_PLAIN = frozenset(map(type, map(iter, ([], (), range(0), {}, set(), "", b""))))


@final
class Batch:
    """One `map`, `settle` or `stream`: where items come from and results go.

    Each worker has one record for the batch and fills it anew for each item,
    unless the sink keeps it. A batch is ``hungry`` while a worker may pull
    from it.
    """

    __slots__ = (
        "_again",
        "_feeding",
        "_items",
        "_queue",
        "_raise_cancel",
        "_spent",
        "_turn",
        "chunk",
        "context",
        "cut",
        "dispatch",
        "ended_early",
        "exhausted",
        "feeder",
        "fn",
        "handed",
        "helpers",
        "hungry",
        "last",
        "live",
        "owner",
        "plain",
        "pool_error",
        "priority",
        "put_offs",
        "queued_at",
        "retry",
        "sink",
        "source",
        "source_error",
        "stop_at",
        "stopped",
        "timeout",
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
        fn: Callable[..., Any] | None = None,
        retry: Retry | None = None,
        chunk: int | None = None,
    ) -> None:
        if not dispatch.takes_many:
            chunk = 1
        elif chunk is None and (timeout < math.inf or retry or dispatch.config.retry):
            # By default no item has to answer for what another takes, and as many
            # wait to be tried again as there are workers.
            chunk = 1
        self.chunk = ChunkSize(chunk)
        self.dispatch = dispatch
        self.context = context
        self.timeout = timeout
        self.priority = priority
        self.fn = fn
        """What a `TaskPool` calls with each item."""
        self.retry = retry
        """Replaces the retry policy of the pool."""
        self.put_offs: set[Job] = set()
        """Items that failed and wait for, or are in, another attempt."""
        self.queued_at = 0.0
        self.waiting = False
        self.hungry = False
        self.last = -1
        """The index of the item that was taken last."""
        self.handed = 0
        """Those of them that went through `take`; the rest were pulled."""
        self.stop_at = stop_at
        """The index that must not be taken before the reader has moved on."""
        self.live = 0
        """Items that a worker has."""
        self.helpers = 2
        """How many idle workers each that takes an item calls to its side: fewer
        if it will probably take all there is itself."""
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
        self.sink = sink
        self.source: Iterator[tuple[int, Any]] | None = None
        """Where items come from, with their indices; None if they are fed."""
        self.plain = False
        """Nobody's code runs as an item is taken."""
        self._items: Iterator[Any] | None = None
        """What is pulled from, if that can be asked how much is left."""
        self._turn: set[Worker] = set()
        self._spent = False
        self._queue: deque[Any] = deque()
        self._again: deque[tuple[int, Any]] = deque()
        """Items that were taken, by a worker that was lost before it began."""
        self.feeder: Task | None = None
        self._feeding: trio.CancelScope | None = None
        self.owner: Task | None = None
        self._raise_cancel: Callable[[], NoReturn] | None = None

    # What workers and the supervisor do: synchronous, in their own step.

    def open(self, iterator: Iterator[Any]) -> None:
        """Let workers pull from a plain iterator."""
        self.plain = type(iterator) in _PLAIN
        if self.plain:
            self._items = iterator
        else:
            # In a context of its own: what it sets is no job's business.
            run = self.context.copy().run
            asked = partial(run, _advance)  # type: ignore[call-arg]
            iterator = map(asked, repeat(iterator))
        self._draw_from(iterator)

    def _draw_from(self, iterator: Iterator[Any]) -> None:
        self.source = enumerate(iterator, self.taken)
        self.look()

    @property
    def taken(self) -> int:
        """Count the items taken so far; it is the index of the next one."""
        return self.last + 1

    @property
    def pulled(self) -> int:
        """Items that a worker has taken and finished without asking anyone."""
        return self.last + 1 - self.handed

    def counts(self) -> tuple[int, int]:
        """Count the items that have ended: by a value, and by an error."""
        failed = self.sink.failed
        unended = self.live + len(self._again) + self.ended_early
        return self.taken - unended - failed, failed

    def run_dry(self) -> None:
        """The source has said that it is at its end; do not ask it again."""
        self.source = iter(())

    def begin_turn(self, worker: Worker) -> float:
        """Return for how long a worker that has just rested may go on.

        The first to run in a turn of trio's scheduler has all the time there
        is for the batch; if it needs it, those that follow have none. Each
        runs once in a turn, so who comes again begins the next.
        """
        if worker in self._turn:
            self._turn.clear()
            self._spent = False
        self._turn.add(worker)
        return 0.0 if self._spent else TURN

    def spend_turn(self) -> None:
        """Have the workers that follow in this turn give way at once."""
        self._spent = True

    def is_alone(self) -> bool:
        """Say whether a worker may just go on with this batch's next item."""
        dispatch = self.dispatch
        return (
            self.source is not None
            and self.fn is None
            and self.timeout == math.inf
            and dispatch.solo
            and not dispatch.tells_each
            and not dispatch.room.count
            and not dispatch.line.count
            and dispatch.line.sources == 1
            and not self.stopped
        )

    def take(self, worker: Worker) -> Job | None:
        """Pull the next item into the worker's record; None if there is none."""
        if self._again:
            return self._take_again(worker)
        if self.source is None:
            index, item = self.taken, self._queue.popleft()
            if self.feeder is not None:
                self._wake_feeder()
        else:
            try:
                index, item = next(self.source)
            except StopIteration:
                self._run_out()
                return None
            except BaseException as error:
                self.source_error = error
                self.stop()
                return None
            if self.stopped:
                return None
        self.sink.expect(item)
        job = worker.ticket
        if job is None or job.batch is not self:
            job = worker.ticket = self._ticket()
        else:
            job.attempts = 0
            if job.terms is not job.dispatch.plain_terms:
                job.terms = self._terms()
        job.input = item if self.fn is None else (self.fn, (item,))
        job.index = index
        job.name()
        self.last = index
        self.handed += 1
        self.live += 1
        if index + 1 >= self.stop_at or not (self.source or self._queue):
            self.hungry = False
        return job

    def _take_again(self, worker: Worker) -> Job:
        job = worker.ticket = self._ticket()
        job.index, job.input = self._again.popleft()
        job.name()
        self.live += 1
        if not self._has_more():
            self.hungry = False
        return job

    def _has_more(self) -> bool:
        return bool(self._again) or (
            self.last + 1 < self.stop_at
            and (self.source is not None or bool(self._queue))
        )

    def give_back(self, jobs: list[Job]) -> None:
        """Let other workers take items that never started, in the order of the input.

        They have been in no books, and are in none again.
        """
        self.live -= len(jobs)
        if not self.stopped:
            self._again.extendleft((job.index, job.input) for job in reversed(jobs))
            self.look()

    def chunk_size(self) -> int:
        """Say how many items the next call may carry, with the one at hand."""
        chunk = self.chunk
        if chunk.size > 1 and chunk.is_measured and self._items is not None:
            # All are to have some of the last ones.
            rest = length_hint(self._items) // max(1, 2 * self.dispatch.wanted)
            return min(chunk.size, rest + 1)
        return chunk.size

    def learn(self, items: int, call: float, run: float) -> None:
        """Learn what a call for so many items took, in seconds."""
        size = self.chunk.size
        self.chunk.learn(items, call, run)
        if self.chunk.size != size:
            self.sink.widen(self.chunk.size)

    def take_more(self, worker: Worker, most: int) -> list[Job]:
        """Pull further items for a call; they are in no books until it has ended."""
        jobs: list[Job] = []
        until = perf_counter() + _PULLING
        kept = worker.ticket
        while len(jobs) < most and self._has_more():
            worker.ticket = None
            job = self.take(worker)
            if job is None:
                break
            jobs.append(job)
            if perf_counter() > until:
                break
        worker.ticket = kept
        return jobs

    def twin_of(self, job: Job) -> Job:
        """Make a record that stands for the same item, with the same fate."""
        twin = self._ticket()
        twin.state, twin.worker, twin.attempts = job.state, job.worker, job.attempts
        twin.input, twin.index, twin.id = job.input, job.index, job.id
        twin.named, twin.terms = job.named, job.terms
        twin.started_at = job.started_at
        return twin

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
        self.keep(job)

    def keep(self, job: Job) -> None:
        """Let no other item have the record of this one."""
        worker = job.worker
        # One whose worker was lost has none.
        if worker is not None and worker.ticket is job:
            worker.ticket = None

    def answer(self, job: Job) -> None:
        """Pass on what became of an item."""
        self.live -= 1
        self.put_offs.discard(job)
        called_off = self.stopped and self.pool_error is None
        kept = False
        if called_off and job.state is JobState.CANCELLED:
            self.ended_early += 1
        else:
            kept = self.sink.answer(job)
        if kept:
            self.keep(job)
        else:
            job.input = job.value = None
            job.forget_error()
        if not self.live and not self._again:
            if self.exhausted:
                self._end()
            elif self._items is not None and not length_hint(self._items):
                # There may be no worker now to find out: crashed, or paused.
                self._run_out()

    def look(self) -> None:
        """Get in line if there is something to pull."""
        if not self.hungry and self._has_more():
            self.hungry = True
            self.dispatch.offer(self)

    def _run_out(self) -> None:
        self.exhausted = True
        self._queue.clear()
        self.source = self._items = None
        if self.stopped:
            self._again.clear()
        if not self._again:
            self.hungry = False
        if self.is_over():
            self._end()
        if self.dispatch.listeners:
            self.dispatch.hear_end()

    def _end(self) -> None:
        self.sink.ended()
        if self.owner is not None:
            owner, self.owner = self.owner, None
            reschedule(owner, WAKE)

    def stop(self, pool_error: Exception | None = None) -> None:
        """Call off the rest: pull no more, cancel what runs."""
        if self.pool_error is None:
            self.pool_error = pool_error
        if not self.stopped:
            self.stopped = True
            self.cut = not self.exhausted or bool(self._again)
            if self._feeding is not None:
                self._feeding.cancel(reason="a batch of trio_pool was called off")
            self._run_out()
            self.dispatch.cancel_batch(self)

    def is_stuck(self, task: Task) -> bool:
        """Say whether no worker has an item of it, and one would be needed."""
        return not self.live and not self.is_over()

    def is_over(self) -> bool:
        """Say whether the source has run out and every item has ended."""
        return self.exhausted and not self.live and not self._again

    def move_on(self) -> None:
        """Let items be taken up to a ``stop_at`` that has been moved."""
        if self.feeder is not None:
            self._wake_feeder()
        self.look()

    # What the task of the call does.

    def _wake_feeder(self) -> None:
        feeder, self.feeder = self.feeder, None
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
        width = max(1, self.dispatch.wanted) * self.chunk.size
        while not self.exhausted and (
            len(self._queue) >= width or self.taken + len(self._queue) >= self.stop_at
        ):
            self.feeder = current_task()
            await self.dispatch.sleep(self._feeder_left)

    def _feeder_left(self, _: object) -> Abort:
        self.feeder = None
        return Abort.SUCCEEDED

    def _run_out_of_feed(self) -> None:
        if self._queue:
            # What was fed goes on as a plain source that will run out.
            self._draw_from(_drain(self._queue))
        else:
            self._run_out()

    async def wait(self) -> None:
        """Wait until the source has run out and every item has ended.

        Cancelled, it calls off the rest and returns by the cancellation when
        all handlers have ended; unless they all finished all the same.
        """
        if self.is_over():
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
