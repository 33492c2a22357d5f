"""Pools that run each job at once in the caller's own task, for unit tests."""

# Arguments are checked by the very functions that the pools use.
# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
from __future__ import annotations

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
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
)
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    Self,
    TypeVar,
    TypeVarTuple,
    Unpack,
    final,
    overload,
)

import trio
from trio.lowlevel import checkpoint

from .. import (
    CurrentJob,
    Drain,
    EventKind,
    EventStream,
    JobState,
    LeasedTaskWorker,
    LeasedWorker,
    Pool,
    PoolChanged,
    PoolConfig,
    PoolOptions,
    PoolResized,
    PoolState,
    PoolStatistics,
    Reply,
    Retry,
    Settled,
    ShutdownReport,
    Stream,
    Task,
    TaskPool,
    WorkerCrashed,
    WorkerSnapshot,
)
from .._checks import check_count, check_priority, check_seconds, check_source, note
from .._config import make_config
from .._events import In, Out, log
from .._job import Job, new_reply, outcome_of, raise_caught
from .._many import name_item
from .._plugins import open_plugins
from .._pool import (
    _call,
    _check_factory,
    _check_function,
    _check_items,
    _check_task,
    _submit_all,
)
from .._progress import AnyProgress, show
from .._worker import call_function, check_handler
from ._inline_runs import Runs

Args = TypeVarTuple("Args")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")

_END = object()

if TYPE_CHECKING:
    # To a type checker they are what they stand in for: code under test says that
    # it takes a `Pool`. The classes themselves are final, and share no code.
    _AsPool = Pool
    _AsTaskPool = TaskPool
else:
    _AsPool = Generic
    _AsTaskPool = object


class _Inline:
    """What both kinds of inline pool have: a life, and the books."""

    def __init__(
        self, size: int, handler: Any, worker: Any, options: PoolOptions
    ) -> None:
        self._config = make_config(size, options)
        self._runs = Runs(self._config, handler, worker)
        # By the name under which what is shared with a `Pool` looks for it.
        self._dispatch: Any = self._runs
        self._timeout = self._config.timeout
        self._plugins: dict[str, Any] = {}
        self._stack = AsyncExitStack()

    # Checked, and made, as those of a pool are.
    _job: Any = Pool._job
    _set_options: Any = Pool._set_options
    _set_further_options: Any = Pool._set_further_options
    _batch_options: Any = Pool._batch_options

    def __repr__(self) -> str:
        count = self.statistics()
        return (
            f"<trio_pool.testing.{type(self).__name__} {self.name!r}: "
            f"{'closed' if self.closed else 'open'}, {count.accepted} jobs accepted>"
        )

    async def __aenter__(self) -> Self:
        if self._config.plugins:
            opened = await self._stack.enter_async_context(open_plugins(self._config))
            config, self._plugins = opened
            self._runs.configure(config)
        try:
            around = getattr(self._runs.factory, "around_pool", None)
            if around is not None:
                shared = around(self._config.size)
                self._runs.factory = await self._stack.enter_async_context(shared)
            await self._runs.set_up()
        except BaseException as error:
            await self._stack.__aexit__(type(error), error, error.__traceback__)
            raise
        self._tell_pool("pool_start")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        runs = self._runs
        try:
            if error is None:
                await self.shutdown()
        finally:
            self.cancel()
            try:
                await runs.clean_up()
            finally:
                self._tell_pool("pool_stop")
                await self._stack.__aexit__(kind, error, traceback)
        unheard = runs.unheard_errors()
        if unheard and error is None and self._config.unobserved == "raise":
            raise ExceptionGroup(
                f"{len(unheard)} jobs of pool {self.name!r} failed and nobody read it",
                unheard,
            )
        for other in unheard:
            log.error("nobody read the reply of a failed job", exc_info=other)

    def _tell_pool(self, kind: Any) -> None:
        hooks = self._runs.hooks
        if hooks.listening(f"on_{kind}"):
            event = PoolChanged(kind, self.name, trio.current_time())
            hooks.call(f"on_{kind}", event)

    async def _process(self, job: Job) -> Any:
        self._runs.accept(job)
        await self._runs.run(job)
        if job.state is JobState.DONE:
            return job.value
        error = job.made_error()
        assert error is not None
        try:
            raise_caught(error, job.terms.traceback)
        finally:
            del error

    async def _submit(self, job: Job) -> Reply[Any]:
        runs = self._runs
        runs.accept(job)
        if runs.can_run():
            await runs.run(job)
            runs.keep_unheard(job)
        else:
            await checkpoint()
            runs.put_off(job)
        return new_reply(job)

    def _submit_nowait(self, job: Job) -> Reply[Any]:
        self._runs.accept(job)
        self._runs.put_off(job)
        return new_reply(job)

    def _item_job(
        self, job_input: Any, timeout: float, priority: int, retry: Retry | None
    ) -> Job:
        return self._job(  # type: ignore[no-any-return]
            job_input, timeout, priority, None, 0.0, math.inf, retry, None, None
        )

    async def _map(
        self,
        items: Any,
        options: tuple[Any, ...],
        progress: AnyProgress,
        fn: Any = None,
    ) -> list[Any]:
        results: list[Any] = []
        source = _Source(self, items, options, fn)
        try:
            async with show(progress, items, source.counts):
                while (job := await source.run_next()) is not None:
                    if job.state is not JobState.DONE:
                        error: Any = source.settled.outcome
                        note(error.error, name_item(source.settled.item, len(results)))
                        message = f"map of pool {self.name!r} failed"
                        raise ExceptionGroup(message, [error.error])
                    results.append(job.value)
        finally:
            await source.aclose()
        return results

    async def _settle(
        self,
        items: Any,
        options: tuple[Any, ...],
        progress: AnyProgress,
        fn: Any = None,
    ) -> list[Any]:
        results: list[Any] = []
        source = _Source(self, items, options, fn)
        try:
            async with show(progress, items, source.counts):
                while await source.run_next() is not None:
                    results.append(source.settled)
        finally:
            await source.aclose()
        return results

    def _open_stream(
        self,
        items: Any,
        ahead: int | None,
        outcomes: bool,
        options: tuple[Any, ...],
        progress: AnyProgress,
        fn: Any = None,
    ) -> Any:
        if ahead is not None:
            check_count("ahead", ahead, zero=False)
        check_source("items", items)
        return self._read_stream(items, outcomes, options, progress, fn)

    @asynccontextmanager
    async def _read_stream(
        self,
        items: Any,
        outcomes: bool,
        options: tuple[Any, ...],
        progress: AnyProgress,
        fn: Any,
    ) -> AsyncGenerator[Stream[Any], None]:
        source = _Source(self, items, options, fn)

        async def read() -> Any:
            job = await source.run_next()
            if job is None:
                raise StopAsyncIteration
            settled = source.settled
            if outcomes:
                return settled
            if job.state is JobState.DONE:
                return job.value
            error = job.made_error()
            assert error is not None
            try:
                note(error, name_item(settled.item, settled.index))
                if isinstance(error, StopAsyncIteration):
                    text = f"job {job.id} raised StopAsyncIteration"
                    raise RuntimeError(text) from error
                raise_caught(error, job.terms.traceback)
            finally:
                del error

        try:
            async with show(progress, items, source.counts):
                yield Stream(read)
        finally:
            await source.aclose()

    @asynccontextmanager
    async def _lease(self, priority: int) -> AsyncGenerator[Any, None]:
        check_priority(priority)
        if self.closed:
            raise self._runs.refusal()
        await checkpoint()
        lease = _InlineLease(self)
        try:
            yield lease
        finally:
            lease.worker = None
            lease.over = True

    @property
    def name(self) -> str:
        """The pool's name."""
        return self._config.name

    @property
    def size(self) -> int:
        """The wanted number of workers; `resize` changes it."""
        return self._runs.wanted

    @property
    def closed(self) -> bool:
        """Whether the pool takes no more jobs."""
        return self._runs.closed

    @property
    def state(self) -> PoolState:
        """Where it is in its life."""
        return self._runs.state()

    @property
    def config(self) -> PoolConfig:
        """The options that it was made with, with what its plugins brought."""
        return self._runs.config

    def running(self) -> tuple[CurrentJob, ...]:
        """Describe the jobs that run just now, one inside of the other."""
        self._runs.check_thread()
        return self._runs.jobs_running()

    async def resize(self, size: int) -> None:
        """Change the number of jobs that may run inside of each other."""
        check_count("size", size)
        runs = self._runs
        runs.check_thread()
        if runs.closed:
            raise runs.refusal()
        old = runs.wanted
        await checkpoint()
        runs.want(size)
        if old != size and runs.hooks.listening("on_resize"):
            event = PoolResized("resize", self.name, trio.current_time(), old, size)
            runs.hooks.call("on_resize", event)

    def pause(self) -> None:
        """Have jobs wait until another task calls `resume`."""
        self._runs.check_thread()
        if self.closed:
            raise self._runs.refusal()
        self._runs.paused = True

    def resume(self) -> None:
        """Let jobs run again, after `pause`."""
        self._runs.check_thread()
        self._runs.paused = False
        self._runs.changed()

    async def join(self) -> None:
        """Run what `submit_nowait` has left to do."""
        await checkpoint()
        await self._runs.finish_all("join()")

    async def shutdown(self, grace: float | None = None) -> ShutdownReport:
        """Refuse new jobs, run those that wait within ``grace`` seconds."""
        runs = self._runs
        if grace is None:
            grace = self._config.grace
        check_seconds("grace", grace)
        runs.check_thread()
        before = self.statistics()
        runs.close()
        with trio.move_on_after(grace):
            await checkpoint()
            await runs.finish_all("shutdown()")
        runs.stop()
        runs.slots.clear()
        now = self.statistics()
        return ShutdownReport(
            done=now.done - before.done,
            failed=_failures(now) - _failures(before),
            cancelled=now.cancelled + now.expired - before.cancelled - before.expired,
            unfinished=now.running + now.queued + now.delayed,
        )

    def cancel(self) -> None:
        """Stop now: cancel every job, waiting or running; refuse new ones."""
        self._runs.check_thread()
        self._runs.stop()
        if not self._runs.running:
            self._runs.slots.clear()

    def statistics(self) -> PoolStatistics:
        """Count everything; the times too are on `trio.current_time()`."""
        return self._runs.statistics()

    def workers(self) -> tuple[WorkerSnapshot, ...]:
        """Picture the workers that there would be."""
        return self._runs.snapshots()

    @asynccontextmanager
    async def events(
        self, *, buffer: int = 1024, kinds: Collection[EventKind] | None = None
    ) -> AsyncGenerator[EventStream, None]:
        """Open an async iterator over what happens from now on."""
        runs = self._runs
        runs.check_thread()
        stream = runs.hooks.open_stream(self.name, trio.current_time, buffer, kinds)
        if runs.closed:
            stream.close()
        try:
            await checkpoint()
            yield stream
        finally:
            stream.close()

    def plugin(self, name: str) -> Any:
        """Return the plugin of this name; there are some in ``async with`` only."""
        try:
            return self._plugins[name]
        except KeyError:
            there = ", ".join(map(repr, self._plugins)) or "none"
            text = f"no plugin is called {name!r}; there are: {there}"
            raise KeyError(text) from None


class _Source:
    """The items of a batch, each of which is run when it is taken."""

    settled: Settled[Any, Any]
    """The last item, and what became of it."""

    def __init__(
        self, pool: _Inline, items: Any, options: tuple[Any, ...], fn: Any
    ) -> None:
        if pool.closed:
            raise pool._runs.refusal()
        self._pool = pool
        self._options = options
        self._fn = fn
        self._index = self._failed = 0
        check_source("items", items)
        self._plain = isinstance(items, Iterable)
        self._iterator: Any = iter(items) if self._plain else aiter(items)

    async def run_next(self) -> Job | None:
        """Run the next item; None if there is none."""
        await checkpoint()
        if self._plain:
            item = next(self._iterator, _END)
        else:
            item = await anext(self._iterator, _END)
        if item is _END:
            return None
        pool = self._pool
        job_input = item if self._fn is None else (self._fn, (item,))
        job = pool._item_job(job_input, *self._options)
        pool._runs.accept(job)
        await pool._runs.run(job)
        self.settled = Settled(self._index, item, outcome_of(job))
        self._index += 1
        self._failed += job.state is not JobState.DONE
        return job

    def counts(self) -> tuple[int, int]:
        """Count the items that have ended: by a value, and otherwise."""
        return self._index - self._failed, self._failed

    async def aclose(self) -> None:
        """Have an async generator clean up, wherever it is."""
        if isinstance(self._iterator, AsyncGenerator):
            await self._iterator.aclose()


class _InlineLease:
    """Stands for one worker that is kept for several jobs."""

    def __init__(self, pool: _Inline) -> None:
        self._pool = pool
        self.worker: Any = pool._runs.slots.get(0)
        self.over = False

    async def process(self, job_input: Any, timeout: float) -> Any:
        """Run a job, unless one before it has broken the worker."""
        if self.over:
            raise trio.ClosedResourceError("the lease of this worker is over")
        pool = self._pool
        if self.worker is None:
            raise WorkerCrashed(pool._runs.next_id(), False, 0, None)
        restarts = pool._runs.restarts
        job = pool._item_job(job_input, timeout, 0, None)
        job.own_terms().retry = None
        try:
            return await pool._process(job)
        finally:
            if pool._runs.restarts > restarts:
                self.worker = None


def _failures(count: PoolStatistics) -> int:
    return count.failed + count.timed_out + count.lost


@final
class InlinePool(_Inline, _AsPool[In, Out]):  # type: ignore[misc]  # as above  # pyright: ignore[reportGeneralTypeIssues]
    """A `Pool` without workers: each job runs at once in the caller's own task.

    For unit tests of code that is given a pool, which it is to type checkers
    (not to `isinstance`): the same methods, arguments, errors, replies and
    counts, but one job after the other, tracebacks that are short, and nothing
    in the background. ``async with InlinePool(fetch) as pool:`` ends as the
    block of a pool does; with a handler it serves without ``async with`` too. A
    job that asks for its own pool runs inside of the first, ``size`` deep. Of
    the options it heeds ``timeout``, ``retry``, ``crash_on``, ``middleware``,
    ``hooks``, ``plugins``, ``unobserved``, ``grace`` and ``name``; it has one
    worker's context, and no restart budget.

    What differs: `submit` returns when its job has ended, after its ``delay``
    and tries, and its caller's cancellation is the job's. `submit_nowait`
    only notes the job; it runs when a task next waits for this pool or for
    the reply. ``key`` and ``priority`` are told to the job and to hooks, but
    jobs run in the order in which they came. A stream runs an item as it is
    read; an item that is tried again holds up those after it. What a job sets
    in context variables can be seen after it.
    """

    @overload
    def __init__(
        self,
        handler: Callable[[In], Awaitable[Out]],
        /,
        *,
        size: int = 1,
        **options: Unpack[PoolOptions],
    ) -> None: ...

    @overload
    def __init__(
        self,
        /,
        *,
        worker: Callable[
            [], AbstractAsyncContextManager[Callable[[In], Awaitable[Out]]]
        ],
        size: int = 1,
        **options: Unpack[PoolOptions],
    ) -> None: ...

    def __init__(
        self,
        handler: Any = None,
        /,
        *,
        worker: Any = None,
        size: int = 1,
        **options: Unpack[PoolOptions],
    ) -> None:
        if (handler is None) == (worker is None):
            raise TypeError("give either a handler or worker=, and not both")
        if worker is None:
            check_handler("handler", handler)
        else:
            _check_factory(worker)
        super().__init__(size, handler, worker, options)

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
        """Run a job here and now, and return its result; see `Pool.process`."""
        return await self._process(  # type: ignore[no-any-return]
            self._job(
                job_input, timeout, priority, key, 0.0, math.inf, retry, None, None
            )
        )

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
        """Run a job here and now, and return its reply; see `Pool.submit`."""
        return await self._submit(
            self._job(job_input, timeout, priority, key, delay, ttl, retry, drain, id)
        )

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
        """Note a job, that runs when a task next waits for this pool."""
        return self._submit_nowait(
            self._job(job_input, timeout, priority, key, delay, ttl, retry, drain, id)
        )

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
        """Run a job for each item; return their replies."""
        _check_items(items)
        return await _submit_all(
            self.submit(
                item, timeout=timeout, priority=priority, retry=retry, drain=drain
            )
            for item in items
        )

    @asynccontextmanager
    async def lease(
        self, *, priority: int = 0
    ) -> AsyncGenerator[LeasedWorker[In, Out], None]:
        """Keep one worker for several jobs in a row; see `Pool.lease`."""
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
        """Run a job for each item; return the results; see `Pool.map`."""
        options = self._batch_options(timeout, priority, retry, chunk, progress)
        return await self._map(items, options, progress)

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
        """Run a job for each item; return every outcome in order."""
        options = self._batch_options(timeout, priority, retry, chunk, progress)
        return await self._settle(items, options, progress)

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
        """Open an async iterator over results, each made as it is read."""
        options = self._batch_options(timeout, priority, retry, chunk, progress)
        return self._open_stream(items, ahead, outcomes, options, progress)


@final
class InlineTaskPool(_Inline, _AsTaskPool):  # type: ignore[misc]  # as above  # pyright: ignore[reportGeneralTypeIssues]
    """A `TaskPool` without workers: each call is made in the caller's own task.

    To `TaskPool` it is what `InlinePool` is to `Pool`.
    """

    def __init__(self, *, size: int = 1, **options: Unpack[PoolOptions]) -> None:
        super().__init__(size, call_function, None, options)

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
        """Make a call here and now, and return its result."""
        return await self._process(  # type: ignore[no-any-return]
            self._job(
                _call(async_fn, args),
                timeout,
                priority,
                key,
                0.0,
                math.inf,
                retry,
                None,
                None,
            )
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
        """Make a call here and now, and return its reply."""
        call = _call(async_fn, args)
        return await self._submit(
            self._job(call, timeout, priority, key, delay, ttl, retry, drain, id)
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
        """Note a call, that is made when a task next waits for this pool."""
        call = _call(async_fn, args)
        return self._submit_nowait(
            self._job(call, timeout, priority, key, delay, ttl, retry, drain, id)
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
        """Make a call for each item; return their replies."""
        fn = _check_function(async_fn)
        _check_items(items)
        return await _submit_all(
            self.submit(
                fn, item, timeout=timeout, priority=priority, retry=retry, drain=drain
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
        """Make several defined calls, one after the other; return their replies."""
        for task in tasks:
            _check_task(task)
        return tuple(
            await _submit_all(
                self.submit(task.fn, *task.args, **task.options) for task in tasks
            )
        )

    @asynccontextmanager
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
        """Call ``async_fn(item)`` for each item; return the results in order."""
        options = self._batch_options(timeout, priority, retry, progress=progress)
        return await self._map(items, options, progress, _check_function(async_fn))

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
        """Call ``async_fn(item)`` for each item; return every outcome in order."""
        options = self._batch_options(timeout, priority, retry, progress=progress)
        return await self._settle(items, options, progress, _check_function(async_fn))

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
        options = self._batch_options(timeout, priority, retry, progress=progress)
        return self._open_stream(items, ahead, outcomes, options, progress, fn)
