"""Checks of a pool under test: its books, its rest, and what it told its hooks."""

import time
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, Self

import trio

from .. import (
    Event,
    EventStream,
    Hooks,
    JobState,
    PoolClosed,
    PoolStatistics,
    WorkerSnapshot,
    WorkerState,
)
from .._checks import refuse

_HOOKS = tuple(name for name in vars(Hooks) if name.startswith("on_"))
KINDS = tuple(name.removeprefix("on_") for name in _HOOKS)
"""The kinds of events that there are hooks for."""

_STATES = tuple(state.value for state in JobState)
_COUNTS = (*_STATES, "size", "workers", "busy", "accepted", "retries", "restarts")
# What a worker is while it is set up, and so counted by `PoolStatistics.workers`.
_SET_UP = (WorkerState.IDLE, WorkerState.BUSY, WorkerState.STOPPING)

# A reader in another thread may meet the books in the middle of a step. It gives
# the pool's thread the time to go on, and looks again; seconds.
_LOOKS = (0.0, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032)

# Turns of trio's scheduler after which a worker that was told to leave has
# taken its step.
_TURNS = 3


class AnyPool(Protocol):
    """What the checks ask of a pool: `Pool`, `TaskPool` and the inline ones."""

    @property
    def name(self) -> str:
        """The pool's name."""
        ...

    @property
    def size(self) -> int:
        """The wanted number of workers."""
        ...

    @property
    def closed(self) -> bool:
        """Whether the pool takes no more jobs."""
        ...

    def statistics(self) -> PoolStatistics:
        """Count everything."""
        ...

    def workers(self) -> tuple[WorkerSnapshot, ...]:
        """Picture every worker."""
        ...

    async def join(self) -> None:
        """Wait until every accepted job has ended."""

    async def resize(self, size: int) -> None:
        """Change the wanted number of workers; return when it is reached."""

    def events(self, *, buffer: int = 1024) -> AbstractAsyncContextManager[EventStream]:
        """Open an async iterator over what happens from now on."""
        ...


def _check_pool(pool: object) -> None:
    if not (hasattr(pool, "statistics") and hasattr(pool, "workers")):
        raise TypeError(refuse("pool", pool, "a pool"))


def assert_books_balance(pool: AnyPool) -> None:
    """Check that a pool has counted every job once, and every worker.

    Of any pool, open or closed, from any thread, in hooks too: ``accepted`` is
    the sum of all states, nothing is negative, ``busy`` is ``running``, and
    not more than there are workers set up; and the statistics agree with the
    snapshots: as many workers have a job as jobs are running, as many are set
    up as are counted, and no fewer restarts were counted than they had.
    Leased workers without a job, and items that a `map` pulls, are no exception.

    In the pool's own thread all of this is exact. In another one a look may
    come in the middle of a step, where only the sum is right; so it fails only
    if the same numbers are wrong at several looks, 60 ms in all.

    Raises:
      AssertionError: something does not add up; it shows the numbers.
      TypeError: this is no pool.
    """
    _check_pool(pool)
    seen: set[tuple[int, ...]] = set()
    complaint = ""
    for pause in _LOOKS:
        if pause:
            # Not of 0.0 seconds, which would give way to other programs.
            time.sleep(pause)
        count, workers = pool.statistics(), pool.workers()
        seen.add(tuple(getattr(count, name) for name in _COUNTS))
        wrong_sum = _wrong_sum(count)
        wrong = [*wrong_sum, *_wrong_counts(count), *_wrong_workers(count, workers)]
        if not wrong_sum and (not wrong or len(seen) > 1):
            # Right at some look, or they move.
            return
        complaint = "; ".join(wrong) + f"\n  {_show_counts(count)}"
        complaint += "".join(f"\n  {_show_worker(worker)}" for worker in workers)
        if wrong_sum:
            break
    raise AssertionError(f"the books of pool {pool.name!r} do not balance: {complaint}")


def _wrong_sum(count: PoolStatistics) -> list[str]:
    total = sum(getattr(count, state) for state in _STATES)
    if count.accepted == total:
        return []
    return [f"accepted is {count.accepted}, but the states sum up to {total}"]


def _wrong_counts(count: PoolStatistics) -> list[str]:
    wrong = [
        f"{name} is {getattr(count, name)}"
        for name in _COUNTS
        if getattr(count, name) < 0
    ]
    if count.busy != count.running:
        wrong.append(f"busy is {count.busy}, but running is {count.running}")
    if count.running > count.workers:
        wrong.append(f"running is {count.running}, but workers is {count.workers}")
    return wrong


def _wrong_workers(
    count: PoolStatistics, workers: tuple[WorkerSnapshot, ...]
) -> list[str]:
    wrong: list[str] = []
    busy = sum(worker.job_id is not None for worker in workers)
    if busy != count.busy:
        wrong.append(f"busy is {count.busy}, but {busy} workers have a job")
    there = sum(worker.state in _SET_UP for worker in workers)
    if there != count.workers:
        wrong.append(f"workers is {count.workers}, but {there} workers are set up")
    # Those that were let go have taken their part of the restarts along.
    restarts = sum(worker.restarts for worker in workers)
    if restarts > count.restarts:
        wrong.append(f"restarts is {count.restarts}, but the workers had {restarts}")
    if len({worker.id for worker in workers}) < len(workers):
        wrong.append("two workers have the same id")
    return wrong


def _show_counts(count: PoolStatistics) -> str:
    return ", ".join(f"{name}={getattr(count, name)}" for name in _COUNTS)


def _show_worker(worker: WorkerSnapshot) -> str:
    text = f"worker {worker.id} is {worker.state.value}"
    if worker.job_id is not None:
        text += f" with job {worker.job_id!r}"
        if worker.job_age is None:
            text += ", not started yet"
        else:
            text += f", for {worker.job_age:.6g} s"
    if worker.last_error is not None:
        text += f"; it crashed by {worker.last_error!r}"
    return text


def assert_idle(pool: AnyPool) -> None:
    """Check that a pool has nothing to do, and is ready for more.

    Of an open pool: no job is delayed, queued or running, as many workers as
    are wanted are there and idle, and no other. Of a closed one: every job
    has ended and every worker has gone. The books balance. A leased worker
    without a job is idle; callers that wait for room, and batches between two
    items of a slow source, are no jobs yet. To wait for this use `settle`.

    Raises:
      AssertionError: it says which job is on which worker, for how long, what
        waits, and which worker is not there.
      TypeError: this is no pool.
    """
    assert_books_balance(pool)
    restless = _restlessness(pool)
    if restless:
        raise AssertionError(
            f"pool {pool.name!r} is not idle:"
            + "".join(f"\n  {what}" for what in restless)
        )


def _restlessness(pool: AnyPool) -> list[str]:
    """Say what keeps a pool from being at rest."""
    count, workers, closed = pool.statistics(), pool.workers(), pool.closed
    restless = [
        _show_worker(worker)
        for worker in workers
        if worker.state is not (WorkerState.STOPPED if closed else WorkerState.IDLE)
    ]
    for state in ("delayed", "queued"):
        number = getattr(count, state)
        if number:
            jobs = "job is" if number == 1 else "jobs are"
            restless.append(f"{number} {jobs} {state}")
    if count.delayed or count.queued:
        restless.append(f"the oldest has waited for {count.oldest_wait:.6g} s")
    if count.running > sum(worker.job_id is not None for worker in workers):
        restless.append(f"{count.running} jobs are running")
    there = sum(worker.state in _SET_UP for worker in workers)
    if not closed and (there != count.size or len(workers) != count.size):
        restless.append(
            f"{count.size} workers are wanted, {there} are there"
            f" and {len(workers) - there} are on their way"
        )
    return restless


async def settle(pool: AnyPool) -> None:
    """Wait until a pool is at rest, then check that it is idle.

    At rest means: every accepted job has ended, crashed workers are replaced,
    a new size is reached, planned recyclings are done. Jobs accepted meanwhile
    are waited for too. A pool that is closed, or closes meanwhile, is at rest
    when all its workers have gone, so this waits for that. In a paused pool
    jobs do not end: if some wait, this waits until somebody resumes it.

    It waits for what the pool tells, not by the clock, so it is the same in
    real and virtual time, and returns in the moment in which the last of it
    is done. Nothing bounds it: use `trio.fail_after`. A cancelled wait changes
    nothing.

    Raises:
      PoolBroken: the pool is broken, or breaks meanwhile.
      WouldDeadlock: called inside a job of this pool.
      AssertionError: as `assert_idle` does; the books do not balance.
      TypeError: this is no pool.
    """
    _check_pool(pool)
    while not await _has_settled(pool):
        pass
    assert_idle(pool)


async def _has_settled(pool: AnyPool) -> bool:
    await pool.join()
    if pool.closed:
        async with pool.events() as events:
            async for _ in events:
                pass
        return True
    try:
        # Nothing changes by this, but it returns when the number is reached.
        await pool.resize(pool.size)
    except PoolClosed:
        return False
    # Who was told to leave looks idle until its next step.
    for _ in range(_TURNS):
        await trio.lowlevel.checkpoint()
    if not _restlessness(pool):
        return True
    async with pool.events() as events:
        # What `join` and `resize` do not wait for is a worker that cleans up,
        # and that it has gone is told.
        stopping = [w.state is WorkerState.STOPPING for w in pool.workers()]
        if any(stopping):
            async for event in events:
                if event.kind in {"worker_stop", "worker_crash"}:
                    break
    return False


class RecordingHooks(Hooks):
    """Hooks that record all they are told, in order: ``hooks=[recorder]``.

    A subclass may override hooks as one of `Hooks` does: each is recorded,
    then the override is called. One whose override raises is dropped by the
    pool, as any hook is, and recorded no more. It may serve several pools.
    """

    events: list[Event]
    """What was told, oldest first."""

    def __new__(cls, *_: object, **__: object) -> Self:
        """Set up the recording, whatever a subclass's ``__init__`` does."""
        recorder = super().__new__(cls)
        recorder.events = []
        for name in _HOOKS:
            # The pool calls what is overridden, be it in the object.
            setattr(recorder, name, _Tee(recorder, name))
        return recorder

    @property
    def kinds(self) -> list[str]:
        """The kinds of the events, in order: ``["worker_start", ...]``."""
        return [event.kind for event in self.events]

    def of(self, *kinds: str) -> list[Any]:
        """Return the events of these kinds, in order.

        Raises:
          ValueError: no hook has such a name.
        """
        for kind in kinds:
            if kind not in KINDS:
                expected = "one of " + ", ".join(map(repr, KINDS))
                raise ValueError(refuse("kind", kind, expected))
        return [event for event in self.events if event.kind in kinds]

    def clear(self) -> None:
        """Forget what was recorded."""
        self.events.clear()


class _Tee:
    """Records an event, then calls the method of the class."""

    def __init__(self, recorder: RecordingHooks, name: str) -> None:
        self._recorder = recorder
        self._name = name

    def __call__(self, event: Event) -> None:
        self._recorder.events.append(event)
        getattr(type(self._recorder), self._name)(self._recorder, event)
