"""The caller's handle: `open_pool`, `Pool` and `TaskPool`."""

from __future__ import annotations

import inspect
import math
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Collection,
    Hashable,
    Iterable,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import copy_context
from threading import get_ident
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    TypeVar,
    TypeVarTuple,
    Unpack,
    cast,
    final,
    overload,
)

import trio
from trio.lowlevel import (
    Abort,
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
    current_task,
    enable_ki_protection,
)

from ._checks import (
    check_count,
    check_key,
    check_priority,
    check_seconds,
    check_source,
    refuse,
)
from ._config import PoolConfig, PoolOptions, make_config
from ._current import CurrentJob
from ._errors import PoolBroken, PoolError
from ._events import (
    EventKind,
    In,
    JobState,
    Out,
    PoolState,
    PoolStatistics,
    Settled,
    ShutdownReport,
    WorkerSnapshot,
    log,
)
from ._job import Job, Reply, Terms, new_job, new_reply, raise_caught
from ._lease import Lease, LeasedTaskWorker, LeasedWorker
from ._many import map_items, open_stream, settle_items
from ._nursery import open_bare_nursery, whole_block
from ._plugins import open_plugins
from ._policy import Retry
from ._progress import AnyProgress, check_progress
from ._supervisor import Supervisor
from ._telling import EventStream
from ._trio import effective_deadline
from ._worker import Factory, NoSetup, check_handler
from .drain import Drain
from .streams import Stream
from .tasks import Task

if TYPE_CHECKING:
    from trio.lowlevel import Task as TrioTask

    from ._dispatch import Dispatch

_RUNNING = JobState.RUNNING
_DONE = JobState.DONE

# Defaults of options, known by identity: 0.0 and False are no priorities.
_PLAIN = 0
_FOREVER = math.inf
Args = TypeVarTuple("Args")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")


class _Handle:
    """What both kinds of pool have: the life of the workers, and the books."""

    # Only `open_pool` makes handles; what is behind them is no public type.
    def __init__(self, supervisor: Any) -> None:
        self._supervisor: Supervisor = supervisor
        self._dispatch: Dispatch = supervisor.dispatch
        self._timeout: float = supervisor.config.timeout
        self._choosy: bool = supervisor.dispatch.choosy

    def __repr__(self) -> str:
        count = self.statistics()
        return (
            f"<trio_pool.{type(self).__name__} {self.name!r}: "
            f"{'closed' if self.closed else 'open'}, {count.busy} of {count.size} "
            f"workers busy, {count.queued} jobs queued>"
        )

    @property
    def name(self) -> str:
        """The pool's name."""
        return self._supervisor.config.name

    @property
    def size(self) -> int:
        """The wanted number of workers; `resize` changes it."""
        return self._dispatch.wanted

    @property
    def closed(self) -> bool:
        """Whether the pool takes no more jobs."""
        return self._dispatch.closed

    @property
    def state(self) -> PoolState:
        """Where it is in its life; legal from any thread.

        ``CLOSING`` from when it takes no more jobs until its last worker has
        gone, ``BROKEN`` for good once a restart budget is spent.
        """
        return self._supervisor.state()

    @property
    def config(self) -> PoolConfig:
        """The options that it was opened with, with what its plugins brought."""
        return self._supervisor.config

    async def resize(self, size: int) -> None:
        """Change the wanted number of workers; return when it is reached.

        Shrinking never interrupts a job: a busy worker leaves after it.
        Cancelling the wait keeps the new target. If targets follow each
        other, all wait for the last one.

        Raises:
          PoolClosed: the pool closed before the number was reached.
          PoolBroken: the new workers could not be set up.
          WouldDeadlock: called inside a job of this pool, to fewer workers.
          ValueError: the size is not between those of the option ``scale``.
        """
        check_count("size", size)
        scale = self._supervisor.config.scale
        if scale is not None and not scale.min <= size <= scale.max:
            expected = f"an int from {scale.min} to {scale.max}, as scale says"
            raise ValueError(refuse("size", size, expected))
        await self._supervisor.resize(size)

    @enable_ki_protection
    def pause(self) -> None:
        """Let workers take no more jobs; jobs are still accepted.

        What runs goes on. Closing the pool resumes it.
        """
        self._dispatch.check_thread()
        self._dispatch.pause()

    @enable_ki_protection
    def resume(self) -> None:
        """Let workers take jobs again, after `pause`."""
        self._dispatch.check_thread()
        self._dispatch.resume()

    async def join(self) -> None:
        """Wait until every accepted job has ended; the pool stays open.

        Jobs accepted while waiting are waited for too. A cancelled wait
        loses nothing: the jobs go on.

        Raises:
          PoolBroken: the pool gave up before the last job ended.
          WouldDeadlock: called inside a job of this pool.
        """
        await self._supervisor.join()

    async def shutdown(self, grace: float | None = None) -> ShutdownReport:
        """Refuse new jobs, finish the accepted ones, let the workers go.

        What has not ended within ``grace`` seconds (by default the option of
        the pool) is cancelled and gets one more second to unwind; jobs that
        shield themselves for longer are reported as unfinished, and the block
        waits for them. Of a pool of size 0 the waiting jobs are cancelled at
        once, as nothing can run them. Calling it again waits for the same
        end; the shorter grace counts. A cancelled wait leaves the pool closed
        and the accepted jobs going on.
        """
        if grace is None:
            grace = self._supervisor.config.grace
        check_seconds("grace", grace)
        self._dispatch.check_thread()
        return await self._supervisor.shut_down(grace)

    def cancel(self) -> None:
        """Stop now: cancel every job, waiting or running; refuse new ones.

        No waiting job starts any more. Of very many, only the first thousand
        have ended when this returns; other tasks get their turns while the
        rest end.
        """
        self._dispatch.check_thread()
        self._supervisor.cancel()

    def statistics(self) -> PoolStatistics:
        """Count everything: cheap, and legal from any thread.

        Exact in the pool's own thread. To another thread the states of all jobs
        sum up to ``accepted`` too, but single counts may be a step old.
        """
        return self._supervisor.statistics()

    def workers(self) -> tuple[WorkerSnapshot, ...]:
        """Picture every worker; legal from any thread."""
        return self._supervisor.snapshots()

    def running(self) -> tuple[CurrentJob, ...]:
        """Describe the jobs that workers run just now, their inputs too.

        Of a call for several items of `map` it is the first. Jobs are as their
        handlers see them by `current_job`, so each can be cancelled.
        """
        self._dispatch.check_thread()
        return self._supervisor.jobs_running()

    @whole_block
    async def events(
        self, *, buffer: int = 1024, kinds: Collection[EventKind] | None = None
    ) -> AsyncGenerator[EventStream, None]:
        """Open an async iterator over what happens from now on, as typed records.

        At most ``buffer`` events wait for the reader; of a slow one the oldest
        are lost, and an `EventsLost` in their place says how many. The stream
        ends when the pool has stopped and all has been read. The records are
        those that hooks get; each has its ``kind``. With ``kinds`` only those
        are given, and a job that causes none of them costs no more than without
        a stream.
        """
        dispatch = self._dispatch
        dispatch.check_thread()
        name, clock = self._supervisor.config.name, dispatch.clock
        stream = dispatch.hooks.open_stream(name, clock, buffer, kinds)
        dispatch.look_for_listeners()
        if self._supervisor.finished.is_set():
            stream.close()
        try:
            await checkpoint()
            yield stream
        finally:
            stream.close()
            dispatch.look_for_listeners()

    def plugin(self, name: str) -> Any:
        """Return the plugin of this name: what entering it gave, or itself.

        Raises:
          KeyError: there is none; the message names those that are there.
        """
        plugins = self._supervisor.plugins
        try:
            return plugins[name]
        except KeyError:
            there = ", ".join(map(repr, plugins)) or "none"
            raise KeyError(
                f"no plugin is called {name!r}; there are: {there}"
            ) from None

    @asynccontextmanager
    async def _lease(self, priority: int) -> AsyncGenerator[Lease, None]:
        check_priority(priority)
        lease = Lease(self._dispatch, priority)
        await lease.open()
        try:
            yield lease
        finally:
            lease.close()

    def _batch_options(
        self,
        timeout: float | None,
        priority: int,
        retry: Retry | None,
        chunk: int | None = None,
        progress: AnyProgress = False,
    ) -> tuple[float, int, Retry | None]:
        if timeout is None:
            timeout = self._timeout
        else:
            check_seconds("timeout", timeout, zero=False)
        check_priority(priority)
        _check_retry(retry)
        if chunk is not None:
            check_count("chunk", chunk, zero=False)
        if progress is not False:
            check_progress(progress)
        return timeout, priority, retry

    def _stream(
        self,
        items: Any,
        ordered: bool,
        ahead: int | None,
        outcomes: bool,
        timeout: float | None,
        priority: int,
        retry: Retry | None,
        chunk: int | None = None,
        fn: Callable[..., Any] | None = None,
        progress: AnyProgress = False,
    ) -> Any:
        timeout, priority, retry = self._batch_options(
            timeout, priority, retry, chunk, progress
        )
        if ahead is not None:
            check_count("ahead", ahead, zero=False)
        check_source("items", items)
        return open_stream(
            self._dispatch,
            items,
            timeout,
            priority,
            retry,
            chunk,
            ordered,
            ahead,
            outcomes,
            fn,
            progress,
        )


@final
class Pool(_Handle, Generic[In, Out]):
    """The handle of a pool whose workers share one kind of handler.

    Made by `open_pool`. Not thread-safe: from other threads use
    `trio.from_thread`.
    """

    @enable_ki_protection
    async def process(
        self,
        job_input: In,
        /,
        *,
        timeout: float | None = None,
        priority: int = 0,
        key: Hashable = None,
        retry: Retry | None = None,
    ) -> Out:
        """Run a job and return its result, as if the handler were called directly.

        Same value, same exception object, same cancellation, same deadlines,
        same context variables; it only waits for a free worker first.
        ``timeout`` (seconds, from the job's start) and ``retry`` replace those
        of the pool; of waiting jobs the one with the highest ``priority`` is
        first; jobs with the same ``key`` run one at a time, in the order in
        which they were given in, whatever their priorities.

        Cancelled while it waits, the job leaves the backlog and never starts.
        Cancelled while it runs, the handler gets `trio.Cancelled`, and this
        returns when the handler has ended: by its value, if it has one all
        the same.

        Raises:
          JobTimeout: the job ran longer than its timeout.
          WorkerCrashed: the worker died under it.
          BacklogFull, JobDropped: as the option ``overflow`` says.
          CircuitOpen: as the option ``breaker`` says.
          WouldDeadlock: called by the jobs that hold all workers of this pool.
          PoolClosed, PoolBroken: the pool takes no jobs any more.
        """
        dispatch = self._dispatch
        try:
            task = current_task()
        except RuntimeError:
            task = None
        if task is None or task._runner is not dispatch.runner:  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            task = dispatch.check_task()
        job = new_job(
            dispatch, next(dispatch.ids), job_input, copy_context(), self._timeout
        )
        if (
            timeout is not None
            or priority is not _PLAIN
            or key is not None
            or retry is not None
        ):
            self._set_options(job, timeout, priority, key, retry)
        if self._choosy or job.terms is not dispatch.plain_terms:
            waits = dispatch.admit(job, True)
        else:
            waits = dispatch.accept(job, True)
        if waits:
            job.caller = task
            if job.state is not _RUNNING:
                outside = dispatch.nesting.outside
                if task._parent_nursery is not outside():  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
                    self._check_wait(job, task)
            # Somebody in this run has a deadline; in most programs somebody sleeps.
            if task._runner.deadlines._active:  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
                status: Any = task._cancel_status  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
                # `effective_deadline`, but for those who have none: a call costs
                # as much as this.
                while status is not None:
                    scope = status._scope  # noqa: SLF001
                    if scope._deadline != _FOREVER or scope._shield:  # noqa: SLF001
                        job.deadline = effective_deadline(task)
                        break
                    status = status._parent  # noqa: SLF001
            sleep = dispatch.sleep
            await sleep(job.abort)
            if job.state is _DONE:
                return job.value  # type: ignore[no-any-return]
        else:
            await checkpoint()
        return job.raise_as_caller()

    def _give_in(self, job: Job, wait: bool) -> bool:
        dispatch = self._dispatch
        if get_ident() != dispatch.thread:
            dispatch.check_thread()
        if self._choosy or job.terms is not dispatch.plain_terms:
            return dispatch.admit(job, wait)
        return dispatch.accept(job, wait)

    def _check_wait(self, job: Job, task: TrioTask, wait: str = "process()") -> None:
        try:
            self._dispatch.nesting.check(task, job, wait)
        except BaseException:
            job.readers = None
            self._dispatch.withdraw(job)
            raise

    @enable_ki_protection
    async def submit(
        self,
        job_input: In,
        /,
        *,
        timeout: float | None = None,
        priority: int = 0,
        key: Hashable = None,
        delay: float = 0.0,
        ttl: float = math.inf,
        retry: Retry | None = None,
        drain: Drain[Out] | None = None,
        id: int | str | None = None,  # noqa: A002
    ) -> Reply[Out]:
        """Give in a job and go on; waits only for room in the backlog.

        The job does not belong to the caller: its cancellation and deadlines
        do not reach it. Cancelled while it waits for room, nothing has
        happened. Beyond the options of `process`: the job starts ``delay``
        seconds from now at the earliest, and holds no worker until then; it
        expires if it has not started ``ttl`` seconds from now; its result is
        also sent to ``drain``; it is called ``id`` instead of by a number.

        Raises what `process` raises before a job has started, and:
          JobExpired: its ttl was over before there was room for it.
          ValueError: a job with this id has not ended yet.
        """
        dispatch = self._dispatch
        job = self._job(job_input, timeout, priority, key, delay, ttl, retry, drain, id)
        dispatch.check_thread()
        await checkpoint_if_cancelled()
        self._give_in(job, True)
        if job.state is not None:
            await cancel_shielded_checkpoint()
            return new_reply(job)
        task = current_task()
        job.readers = {task: None}
        self._check_wait(job, task, "submit()")

        def abort(_: object) -> Abort:
            job.readers = None
            dispatch.withdraw(job)
            return Abort.SUCCEEDED

        await dispatch.sleep(abort)
        if job.state is None:
            assert job.error is not None
            raise_caught(job.error, None)
        return new_reply(job)

    @enable_ki_protection
    def submit_nowait(
        self,
        job_input: In,
        /,
        *,
        timeout: float | None = None,
        priority: int = 0,
        key: Hashable = None,
        delay: float = 0.0,
        ttl: float = math.inf,
        retry: Retry | None = None,
        drain: Drain[Out] | None = None,
        id: int | str | None = None,  # noqa: A002
    ) -> Reply[Out]:
        """Give in a job and go on, without ever waiting; options as `submit`.

        Raises:
          BacklogFull: there is no room now; it is a `trio.WouldBlock`.
        """
        job = self._job(job_input, timeout, priority, key, delay, ttl, retry, drain, id)
        self._give_in(job, False)
        return new_reply(job)

    async def submit_batch(
        self,
        items: Iterable[In],
        /,
        *,
        timeout: float | None = None,
        priority: int = 0,
        retry: Retry | None = None,
        drain: Drain[Out] | None = None,
    ) -> list[Reply[Out]]:
        """Give in a job for each item, as `submit` does; return their replies.

        Waits for room for each in turn. All or none: if one is refused, or the
        wait is cancelled, those that were accepted are cancelled.
        """
        _check_items(items)
        return await _submit_all(
            self.submit(
                item, timeout=timeout, priority=priority, retry=retry, drain=drain
            )
            for item in items
        )

    def _job(
        self,
        job_input: Any,
        timeout: float | None,
        priority: int,
        key: Hashable,
        delay: float,
        ttl: float,
        retry: Retry | None,
        drain: Drain[Any] | None,
        uid: int | str | None,
    ) -> Job:
        dispatch = self._dispatch
        job = new_job(
            dispatch, next(dispatch.ids), job_input, copy_context(), self._timeout
        )
        if (
            timeout is not None
            or priority is not _PLAIN
            or key is not None
            or retry is not None
        ):
            self._set_options(job, timeout, priority, key, retry)
        if (
            delay
            or ttl is not _FOREVER
            or drain is not None
            or uid is not None
            or type(delay) is not float
        ):
            self._set_further_options(job, delay, ttl, drain, uid)
        return job

    def _set_further_options(
        self,
        job: Job,
        delay: float,
        ttl: float,
        drain: Drain[Any] | None,
        uid: int | str | None,
    ) -> None:
        check_seconds("delay", delay, infinite=False)
        if delay or ttl != math.inf or drain is not None or uid is not None:
            check_seconds("ttl", ttl, zero=False)
            _check_drain(drain)
            _check_id(uid)
            terms = job.own_terms()
            terms.rich = True
            terms.delay = delay
            terms.ttl = ttl
            terms.drain = drain
            terms.uid = uid

    def _set_options(
        self,
        job: Job,
        timeout: float | None,
        priority: int,
        key: Hashable,
        retry: Retry | None,
    ) -> None:
        if timeout is not None:
            check_seconds("timeout", timeout, zero=False)
            job.timeout = timeout
        if priority is not _PLAIN:
            check_priority(priority)
            job.priority = priority
        if key is not None or retry is not None:
            if key is not None:
                check_key("key", key)
            if retry is not None:
                _check_retry(retry)
            # `new_terms`, without the call.
            terms = Terms()
            terms.retry = job.terms.retry if retry is None else retry
            terms.key = key
            job.terms = terms

    @whole_block
    async def lease(
        self, *, priority: int = 0
    ) -> AsyncGenerator[LeasedWorker[In, Out], None]:
        """Keep one worker for several jobs in a row, an async context manager.

        ``async with pool.lease() as worker:``, then ``await
        worker.process(x)``: all in the same worker, with what it has set up,
        and no job of others in between. It waits for a free worker, with
        the ``priority`` of a job. Leaving the block gives the worker back.

        Raises:
          WouldDeadlock: called by the jobs that hold all workers of this pool.
          PoolClosed, PoolBroken: the pool takes no jobs any more.
        """
        async with self._lease(priority) as lease:
            yield LeasedWorker[Any, Any](lease, self._timeout)

    async def map(
        self,
        items: Iterable[In] | AsyncIterable[In],
        /,
        *,
        timeout: float | None = None,
        priority: int = 0,
        retry: Retry | None = None,
        chunk: int | None = None,
        progress: AnyProgress = False,
    ) -> list[Out]:
        """Run a job for each item; return the results in input order.

        Workers pull the items themselves, one when they are free, so that
        the input may be longer than memory or the backlog, and never waits
        for room. The first failure cancels the rest. Cancelled, it calls off
        the rest and returns when every handler has ended.

        Of workers off the thread, of `trio_pool.offload`, a call takes up to
        ``chunk`` items at once: by default as many as keep what a call costs
        small beside its items, as measured; one where a ``timeout`` or a
        ``retry`` is set, and wherever each start has to be asked for: by
        middleware, a rate, a breaker or a limiter. The items of a call share
        its time, and are lost or cancelled together; hooks hear of all but
        the first, and `current_job` knows them, only when it has ended.

        With ``progress``, True or a label, how many have ended is drawn on a
        terminal, or logged now and then if standard error is none. A bar of
        `trio_pool.progress`, or any `Progress`, may stand there instead.

        Raises:
          ExceptionGroup: of every failure, each with a note that names its
            item. An error of ``items`` itself leaves bare.
          PoolClosed, PoolBroken: the pool stopped before the end.
        """
        options = self._batch_options(timeout, priority, retry, chunk, progress)
        return await map_items(
            self._dispatch, items, *options, chunk, progress=progress
        )

    async def settle(
        self,
        items: Iterable[In] | AsyncIterable[In],
        /,
        *,
        timeout: float | None = None,
        priority: int = 0,
        retry: Retry | None = None,
        chunk: int | None = None,
        progress: AnyProgress = False,
    ) -> list[Settled[In, Out]]:
        """Run a job for each item; return every outcome in input order.

        As `map`, but a failure is an outcome, and cancels nothing. Only an
        error of ``items``, and the end of the pool, are raised. Items that are
        to share no fate with others get calls of their own by ``chunk=1``.
        """
        options = self._batch_options(timeout, priority, retry, chunk, progress)
        return await settle_items(
            self._dispatch, items, *options, chunk, progress=progress
        )

    @overload
    def stream(
        self,
        items: Iterable[In] | AsyncIterable[In],
        /,
        *,
        ordered: bool = True,
        ahead: int | None = None,
        outcomes: Literal[False] = False,
        timeout: float | None = None,
        priority: int = 0,
        retry: Retry | None = None,
        chunk: int | None = None,
        progress: AnyProgress = False,
    ) -> AbstractAsyncContextManager[Stream[Out]]: ...

    @overload
    def stream(
        self,
        items: Iterable[In] | AsyncIterable[In],
        /,
        *,
        ordered: bool = True,
        ahead: int | None = None,
        outcomes: Literal[True],
        timeout: float | None = None,
        priority: int = 0,
        retry: Retry | None = None,
        chunk: int | None = None,
        progress: AnyProgress = False,
    ) -> AbstractAsyncContextManager[Stream[Settled[In, Out]]]: ...

    def stream(
        self,
        items: Iterable[In] | AsyncIterable[In],
        /,
        *,
        ordered: bool = True,
        ahead: int | None = None,
        outcomes: bool = False,
        timeout: float | None = None,
        priority: int = 0,
        retry: Retry | None = None,
        chunk: int | None = None,
        progress: AnyProgress = False,
    ) -> Any:
        """Open an async iterator over the results, while the work goes on.

        An async context manager: ``async with pool.stream(urls) as pages:``,
        then ``async for page in pages:``. Results come in input order, or as
        they are ready if not ``ordered``; at most ``ahead`` items (by default
        twice the size) are taken beyond what was read. With ``outcomes`` each
        is a `Settled`; otherwise the error of a failed job is raised in its
        place, and reading may go on. Leaving early, by ``break`` or an error,
        cancels the rest; failures left unread are the pool's to report.
        ``chunk`` is that of `map`.
        Every read checks for cancellation, but one whose result is ready gives
        other tasks a turn only if that is the first read or 0.5 ms have passed.
        """
        return self._stream(
            items,
            ordered,
            ahead,
            outcomes,
            timeout,
            priority,
            retry,
            chunk,
            progress=progress,
        )


@final
class TaskPool(_Handle):
    """The handle of a pool without a handler: its jobs are async calls.

    Made by `open_pool` without handler and worker. Every method does what
    the method of `Pool` does, for ``async_fn(*args)``.
    """

    def __init__(self, supervisor: Any) -> None:
        super().__init__(supervisor)
        self._pool = Pool[Any, Any](supervisor)

    async def process(
        self,
        async_fn: Callable[[Unpack[Args]], Awaitable[Out]],
        /,
        *args: *Args,
        timeout: float | None = None,
        priority: int = 0,
        key: Hashable = None,
        retry: Retry | None = None,
    ) -> Out:
        """Run ``async_fn(*args)`` in a worker and return its result."""
        return await self._pool.process(  # type: ignore[no-any-return]
            _call(async_fn, args),
            timeout=timeout,
            priority=priority,
            key=key,
            retry=retry,
        )

    async def submit(
        self,
        async_fn: Callable[[Unpack[Args]], Awaitable[Out]],
        /,
        *args: *Args,
        timeout: float | None = None,
        priority: int = 0,
        key: Hashable = None,
        delay: float = 0.0,
        ttl: float = math.inf,
        retry: Retry | None = None,
        drain: Drain[Out] | None = None,
        id: int | str | None = None,  # noqa: A002
    ) -> Reply[Out]:
        """Give in a call and go on; waits only for room in the backlog."""
        return await self._pool.submit(
            _call(async_fn, args),
            timeout=timeout,
            priority=priority,
            key=key,
            delay=delay,
            ttl=ttl,
            retry=retry,
            drain=drain,
            id=id,
        )

    def submit_nowait(
        self,
        async_fn: Callable[[Unpack[Args]], Awaitable[Out]],
        /,
        *args: *Args,
        timeout: float | None = None,
        priority: int = 0,
        key: Hashable = None,
        delay: float = 0.0,
        ttl: float = math.inf,
        retry: Retry | None = None,
        drain: Drain[Out] | None = None,
        id: int | str | None = None,  # noqa: A002
    ) -> Reply[Out]:
        """Give in a call and go on, without ever waiting."""
        return self._pool.submit_nowait(
            _call(async_fn, args),
            timeout=timeout,
            priority=priority,
            key=key,
            delay=delay,
            ttl=ttl,
            retry=retry,
            drain=drain,
            id=id,
        )

    async def submit_batch(
        self,
        async_fn: Callable[[In], Awaitable[Out]],
        items: Iterable[In],
        /,
        *,
        timeout: float | None = None,
        priority: int = 0,
        retry: Retry | None = None,
        drain: Drain[Out] | None = None,
    ) -> list[Reply[Out]]:
        """Give in ``async_fn(item)`` for each item; return their replies."""
        fn = _check_function(async_fn)
        _check_items(items)
        return await _submit_all(
            self._pool.submit(
                (fn, (item,)),
                timeout=timeout,
                priority=priority,
                retry=retry,
                drain=drain,
            )
            for item in items
        )

    @overload
    async def go(self, task: Task[T1], /) -> tuple[Reply[T1]]: ...

    @overload
    async def go(
        self, task: Task[T1], task2: Task[T2], /
    ) -> tuple[Reply[T1], Reply[T2]]: ...

    @overload
    async def go(
        self, task: Task[T1], task2: Task[T2], task3: Task[T3], /
    ) -> tuple[Reply[T1], Reply[T2], Reply[T3]]: ...

    @overload
    async def go(self, *tasks: Task[T1]) -> tuple[Reply[T1], ...]: ...

    async def go(self, *tasks: Task[Any]) -> tuple[Reply[Any], ...]:
        """Give in several defined calls, of any types; return their replies.

        Waits for room for each in turn. All or none, as in `submit_batch`.
        The same `Task` may be given any number of times.
        """
        for task in tasks:
            _check_task(task)
        return tuple(
            await _submit_all(
                self.submit(task.fn, *task.args, **task.options) for task in tasks
            )
        )

    @whole_block
    async def lease(
        self, *, priority: int = 0
    ) -> AsyncGenerator[LeasedTaskWorker, None]:
        """Keep one worker for several calls in a row; see `Pool.lease`."""
        async with self._lease(priority) as lease:
            yield LeasedTaskWorker(lease, self._timeout)

    async def map(
        self,
        async_fn: Callable[[In], Awaitable[Out]],
        items: Iterable[In] | AsyncIterable[In],
        /,
        *,
        timeout: float | None = None,
        priority: int = 0,
        retry: Retry | None = None,
        progress: AnyProgress = False,
    ) -> list[Out]:
        """Run ``async_fn(item)`` for each item; return the results in order."""
        options = self._batch_options(timeout, priority, retry, progress=progress)
        fn = _check_function(async_fn)
        return await map_items(
            self._dispatch, items, *options, fn=fn, progress=progress
        )

    async def settle(
        self,
        async_fn: Callable[[In], Awaitable[Out]],
        items: Iterable[In] | AsyncIterable[In],
        /,
        *,
        timeout: float | None = None,
        priority: int = 0,
        retry: Retry | None = None,
        progress: AnyProgress = False,
    ) -> list[Settled[In, Out]]:
        """Run ``async_fn(item)`` for each item; return every outcome in order."""
        options = self._batch_options(timeout, priority, retry, progress=progress)
        fn = _check_function(async_fn)
        return await settle_items(
            self._dispatch, items, *options, fn=fn, progress=progress
        )

    @overload
    def stream(
        self,
        async_fn: Callable[[In], Awaitable[Out]],
        items: Iterable[In] | AsyncIterable[In],
        /,
        *,
        ordered: bool = True,
        ahead: int | None = None,
        outcomes: Literal[False] = False,
        timeout: float | None = None,
        priority: int = 0,
        retry: Retry | None = None,
        progress: AnyProgress = False,
    ) -> AbstractAsyncContextManager[Stream[Out]]: ...

    @overload
    def stream(
        self,
        async_fn: Callable[[In], Awaitable[Out]],
        items: Iterable[In] | AsyncIterable[In],
        /,
        *,
        ordered: bool = True,
        ahead: int | None = None,
        outcomes: Literal[True],
        timeout: float | None = None,
        priority: int = 0,
        retry: Retry | None = None,
        progress: AnyProgress = False,
    ) -> AbstractAsyncContextManager[Stream[Settled[In, Out]]]: ...

    def stream(
        self,
        async_fn: Callable[[In], Awaitable[Out]],
        items: Iterable[In] | AsyncIterable[In],
        /,
        *,
        ordered: bool = True,
        ahead: int | None = None,
        outcomes: bool = False,
        timeout: float | None = None,
        priority: int = 0,
        retry: Retry | None = None,
        progress: AnyProgress = False,
    ) -> Any:
        """Open an async iterator over the results of ``async_fn(item)``."""
        fn = _check_function(async_fn)
        return self._stream(
            items,
            ordered,
            ahead,
            outcomes,
            timeout,
            priority,
            retry,
            fn=fn,
            progress=progress,
        )


@enable_ki_protection
async def _submit_all(submits: Iterable[Awaitable[Reply[Out]]]) -> list[Reply[Out]]:
    replies: list[Reply[Out]] = []
    try:
        for submit in submits:
            reply = await submit
            replies.append(reply)
    except BaseException:
        for reply in replies:
            reply.cancel()
        raise
    if not replies:
        await checkpoint()
    return replies


def _check_retry(retry: object) -> None:
    if retry is not None and not isinstance(retry, Retry):
        raise TypeError(refuse("retry", retry, "a Retry"))


def _check_items(items: object) -> None:
    if not isinstance(items, Iterable):
        raise TypeError(refuse("items", items, "an iterable"))


def _check_task(task: object) -> None:
    if not isinstance(task, Task):
        raise TypeError(refuse("tasks", task, "Task objects"))


def _check_drain(drain: object) -> None:
    if drain is not None and not isinstance(drain, Drain):
        raise TypeError(refuse("drain", drain, "a Drain"))


def _check_id(uid: object) -> None:
    expected = "a str that is not empty, or an int"
    if uid is None:
        return
    if not isinstance(uid, (int, str)) or isinstance(uid, bool):
        raise TypeError(refuse("id", uid, expected))
    if uid == "":
        raise ValueError(refuse("id", uid, expected))


def _check_function(async_fn: Any) -> Callable[..., Any]:
    if not callable(async_fn):
        hint = ""
        if inspect.isawaitable(async_fn):
            hint = "; pass the function and its arguments, as to start_soon"
            if inspect.iscoroutine(async_fn):
                async_fn.close()
        raise TypeError(refuse("async_fn", async_fn, "an async function") + hint)
    return cast("Callable[..., Any]", async_fn)


def _call(async_fn: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    return _check_function(async_fn), args


@overload
def open_pool(
    size: int | PoolConfig,
    handler: Callable[[In], Awaitable[Out]],
    /,
    **options: Unpack[PoolOptions],
) -> AbstractAsyncContextManager[Pool[In, Out]]: ...


@overload
def open_pool(
    size: int | PoolConfig,
    /,
    *,
    worker: Callable[[], AbstractAsyncContextManager[Callable[[In], Awaitable[Out]]]],
    **options: Unpack[PoolOptions],
) -> AbstractAsyncContextManager[Pool[In, Out]]: ...


@overload
def open_pool(
    size: int | PoolConfig, /, **options: Unpack[PoolOptions]
) -> AbstractAsyncContextManager[TaskPool]: ...


def open_pool(
    size: int | PoolConfig,
    handler: Any = None,
    /,
    *,
    worker: Any = None,
    **options: Unpack[PoolOptions],
) -> Any:
    """Open a pool of ``size`` workers around a block.

    With a ``handler``, an async function of one argument, every worker runs
    it. With ``worker=``, a function that returns an async context manager,
    each worker enters one of its own, again after a crash, and runs the
    async function that it gives. With neither, the jobs are async calls.
    The options are those of `PoolConfig`, which may stand for ``size``.

    The block is entered when every worker is set up; the first setup that
    fails is raised. It is left normally when every accepted job has ended, or
    been cancelled after ``grace`` seconds; an error or a cancellation of the
    block cancels them all, and leaves it bare. No task is left after it.

    Raises:
      TypeError, ValueError: a bad argument, before anything has run.
      PoolBroken: out of the block, when the restart budget of a worker is spent.
      ExceptionGroup: out of the block, of failures that nobody read.
    """
    config = make_config(size, options)
    if handler is not None:
        if worker is not None:
            raise TypeError("give either a handler or worker=, not both")
        check_handler("handler", handler)
        return _run_pool(config, NoSetup(handler), Pool)
    if worker is not None:
        _check_factory(worker)
        return _run_pool(config, worker, Pool)
    return _run_pool(config, NoSetup(_no_handler), TaskPool)


async def _no_handler(_: object) -> None:
    """Stand in for the handler in a `TaskPool`, whose jobs bring their own."""


def _check_factory(worker: Any) -> None:
    expected = (
        "a function without arguments that returns an async context manager "
        "(such as one under @asynccontextmanager), or such a class"
    )
    if hasattr(worker, "__aenter__") and not inspect.isclass(worker):
        raise TypeError(
            refuse("worker", worker, expected) + "; pass it without calling it"
        )
    if (
        not callable(worker)
        or inspect.iscoroutinefunction(worker)
        or inspect.isasyncgenfunction(worker)
        or inspect.isgeneratorfunction(worker)
        or (inspect.isclass(worker) and not hasattr(worker, "__aenter__"))
    ):
        raise TypeError(refuse("worker", worker, expected))
    try:
        inspect.signature(worker).bind()
    except TypeError as error:
        raise TypeError(refuse("worker", worker, expected) + f": {error}") from None
    except ValueError:
        # Some callables written in C have no signature to look at.
        pass


@whole_block
async def _run_pool(
    config: PoolConfig, factory: Factory, kind: type[Pool[Any, Any] | TaskPool]
) -> AsyncGenerator[Any, None]:
    around = getattr(factory, "around_pool", None)
    if around is not None:
        # What all workers share, as long as the pool is.
        size = config.size if config.scale is None else config.scale.max
        async with around(size) as factory:
            async with _run_pool(config, factory, kind) as pool:
                yield pool
        return
    if not config.plugins:
        async with _run_workers(config, factory, kind, {}) as pool:
            yield pool
        return
    async with open_plugins(config) as (config, plugins):
        async with _run_workers(config, factory, kind, plugins) as pool:
            yield pool


@asynccontextmanager
async def _run_workers(
    config: PoolConfig,
    factory: Factory,
    kind: type[Pool[Any, Any] | TaskPool],
    plugins: dict[str, Any],
) -> AsyncGenerator[Any, None]:
    supervisor = Supervisor(config, factory, kind is TaskPool)
    supervisor.plugins = plugins
    pool = kind(supervisor)
    supervisor.dispatch.prepare()
    error: BaseException | None = None
    try:
        async with open_bare_nursery() as nursery:
            nursery.start_soon(
                supervisor.run, nursery.cancel_scope, name=f"{pool.name} supervisor"
            )
            try:
                await supervisor.opened.wait()
                if supervisor.open_error is not None:
                    raise supervisor.open_error
                yield pool
                await supervisor.shut_down(config.grace)
            except BaseException:
                supervisor.cancel()
                raise
    except BaseException as body_error:
        error = body_error
    unheard = supervisor.dispatch.unheard_errors()
    try:
        _leave(supervisor, error, unheard)
    finally:
        del error, unheard


def _leave(
    supervisor: Supervisor, error: BaseException | None, unheard: list[Exception]
) -> None:
    """Raise what the block is to be left with, if anything."""
    config, failure = supervisor.config, supervisor.dispatch.failure
    report = config.unobserved
    if error is None and failure is None and unheard and report == "raise":
        raise ExceptionGroup(
            f"{len(unheard)} jobs of pool {config.name!r} failed and nobody read it",
            unheard,
        )
    if report != "ignore":
        for other in unheard:
            # The job in which Ctrl-C landed is heard of by the Ctrl-C itself.
            if failure is None or other.__cause__ is not failure:
                log.error("nobody read the reply of a failed job", exc_info=other)
    if failure is not None:
        # The pool's own failure, even where the block fell with it: that it
        # was cancelled, or heard an error of the pool, is no news.
        news = error
        if isinstance(error, BaseExceptionGroup):
            news = error.split((trio.Cancelled, PoolError))[1]
        elif isinstance(error, (trio.Cancelled, PoolError)):
            news = None
        if news is not None and isinstance(failure, PoolBroken):
            message = f"pool {config.name!r} is broken, and its block failed"
            raise BaseExceptionGroup(message, [news, failure])
        context = failure.__context__
        try:
            raise failure
        finally:
            if news is None:
                # Nor is it news in what it came about.
                failure.__context__ = context
    if error is not None:
        raise_caught(error, error.__traceback__)
