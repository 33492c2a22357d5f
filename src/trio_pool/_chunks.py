"""Several items of a batch in one call, where a call costs more than an item."""

from __future__ import annotations

from functools import partial
from itertools import takewhile
from math import ceil, inf
from time import perf_counter
from typing import TYPE_CHECKING, Any, final

import outcome
from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint,
    disable_ki_protection,
    enable_ki_protection,
)

from ._errors import WorkerGone
from ._job import raise_caught

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from ._batch import Batch
    from ._job import Job, Terms
    from ._worker import Handler, OtherEnd, Worker

# A measured chunk is as large as it takes for the call to cost this share of what
# its items do, and no larger than what can well be lost or waited for.
_SHARE = 0.05
_LONGEST = 0.05
_MOST = 500

# Seconds for which items of a chunk are answered before others get their turn.
_SLICE = 0.0005


@final
class ChunkSize:
    """How many items a call carries: as many as were asked for, or as is measured.

    Measured, it begins at 1 and at most doubles from call to call.
    """

    __slots__ = ("is_measured", "size")

    def __init__(self, asked: int | None) -> None:
        self.is_measured = asked is None
        self.size = asked or 1

    def learn(self, items: int, call: float, run: float) -> None:
        """Learn what a call took, and how much of it running its items did: seconds."""
        if not self.is_measured:
            return
        each = max(run / items, 1e-7)
        overhead = max(0.0, call - run)
        wanted = min(ceil(overhead / (_SHARE * each)), int(_LONGEST / each), _MOST)
        # Half way at a time, as one call may have been held up by something else.
        if wanted < self.size:
            wanted = (wanted + self.size) // 2
        self.size = max(1, min(wanted, 2 * self.size))


def caller_of(worker: Worker, other_end: OtherEnd) -> Handler:
    """Return what runs the job of a worker at its other end."""
    one, answer = other_end.one, worker.answer_early

    # No coroutine of its own: for most jobs there is nothing to do after.
    def call(job_input: Any) -> Awaitable[Any]:
        job = worker.job
        assert job is not None
        if job.batch is None:
            return one(job_input, partial(answer, job))
        if job.terms.before or job.terms.put_back:
            return one(job_input, None)
        return call_in_chunks(worker, other_end, job, job.batch)

    return call


@enable_ki_protection
async def call_in_chunks(
    worker: Worker, other_end: OtherEnd, job: Job, batch: Batch
) -> Any:
    """Call for an item of a batch, with others that come after it.

    Returns, or raises, what has become of the job that the worker has by then:
    all other items of the call have been answered.
    """
    most = min(batch.chunk_size(), worker.jobs_left())
    jobs = [job, *batch.take_more(worker, int(most) - 1)]
    if job.timeout < inf:
        job.own_terms().items = len(jobs)
    begun = perf_counter()
    outcomes: list[outcome.Outcome[Any]]
    try:
        if batch.stopped:
            # Its input has failed.
            await checkpoint()
        outcomes, seconds = await _call(other_end, [each.input for each in jobs])
    except BaseException as error:
        outcomes = [outcome.Error(error)] * len(jobs)
        seconds = worker.dispatch.stamp() - job.started_at
    else:
        batch.learn(len(jobs), perf_counter() - begun, seconds)
    try:
        last = await _answer(worker, batch, jobs, outcomes, seconds)
    finally:
        # The traceback of an error leads here.
        del job, batch, jobs, outcomes
    if isinstance(last, outcome.Value):
        return last.value
    assert isinstance(last, outcome.Error)
    try:
        raise_caught(last.error, last.error.__traceback__)
    finally:
        del last


@disable_ki_protection
async def _call(
    other_end: OtherEnd, inputs: list[Any]
) -> tuple[list[outcome.Outcome[Any]], float]:
    return await other_end.many(inputs)


async def _answer(
    worker: Worker,
    batch: Batch,
    jobs: list[Job],
    outcomes: list[outcome.Outcome[Any]],
    seconds: float,
) -> outcome.Outcome[Any]:
    """Answer all jobs of a call but the last that has started; return its outcome.

    They are answered one by one, as if they had run one after the other: no more
    than one is ever in the books as running. Those that never started are given back.
    """
    job = jobs[0]
    # On record as started, whatever has become of it.
    started = max(1, len(list(takewhile(_has_started, outcomes))))
    batch.give_back(jobs[started:])
    if started == 1:
        return outcomes[0]
    dispatch, fate = worker.dispatch, job.terms
    each = seconds / len(jobs)
    # The record at hand is that of the last one by the end.
    jobs[0] = worker.job = batch.twin_of(job)
    rested = perf_counter()
    for number in range(started - 1):
        record, result = jobs[number], outcomes[number]
        if number:
            _begin(worker, record, fate, job.started_at)
            if perf_counter() - rested > _SLICE:
                await cancel_shielded_checkpoint()
                rested = perf_counter()
        dispatch.runs.pending.append(each)
        if isinstance(result, outcome.Value):
            record.value = result.value
            dispatch.finish(record)
        else:
            _fail(worker, record, result)
    last = jobs[started - 1]
    job.id, job.named, job.index = last.id, last.named, last.index
    job.input, job.terms = last.input, last.terms
    _begin(worker, job, fate, dispatch.stamp() - each)
    return outcomes[started - 1]


def _begin(worker: Worker, job: Job, fate: Terms, started_at: float) -> None:
    """Note that a job of a call has its turn, and shares the fate of the call."""
    if fate.overdue or fate.cancel_asked:
        terms = job.own_terms()
        terms.overdue, terms.cancel_asked = fate.overdue, fate.cancel_asked
    job.started_at = started_at
    worker.begin(job)


def _fail(worker: Worker, job: Job, result: Any) -> None:
    try:
        worker.settle_error(job, result.error)
    except BaseException:
        # Nobody we know has cancelled it: the worker is about to die of this.
        worker.dispatch.settle_leftover(job, result.error)


def _has_started(result: outcome.Outcome[Any]) -> bool:
    return not (
        isinstance(result, outcome.Error)
        and isinstance(result.error, WorkerGone)
        and not result.error.started
    )
