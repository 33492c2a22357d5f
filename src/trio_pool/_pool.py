"""The caller's handle: `open_pool`, `Pool` and `TaskPool`."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import copy_context
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
    wait_task_rescheduled,
)

from ._errors import PoolBroken, PoolError
from ._events import (
    In,
    JobState,
    Out,
    PoolStatistics,
    Settled,
    ShutdownReport,
    WorkerSnapshot,
    log,
)
from ._job import Job, Reply, raise_caught
from ._many import map_items, open_stream, settle_items
from ._nursery import open_bare_nursery
from ._policy import (
    PoolConfig,
    PoolOptions,
    check_count,
    check_priority,
    check_seconds,
    make_config,
    refuse,
)
from ._supervisor import Supervisor
from ._trio import effective_deadline
from ._worker import Factory, call_function, call_handler, check_handler
from .streams import Stream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

_DONE = JobState.DONE

# The default priority, known by identity: 0.0 and False have to be refused.
_PLAIN = 0
Args = TypeVarTuple("Args")
AnyPool = TypeVar("AnyPool", bound="_Handle")


class _Handle:
    """What both kinds of pool have: the life of the workers, and the books."""

    # Only `open_pool` makes handles; what is behind them is no public type.
    def __init__(self, supervisor: Any) -> None:
        self._supervisor: Supervisor = supervisor
        self._timeout: float = supervisor.config.timeout

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
        return self._supervisor.wanted

    @property
    def closed(self) -> bool:
        """Whether the pool takes no more jobs."""
        return self._supervisor.closed

    async def resize(self, size: int) -> None:
        """Change the wanted number of workers; return when it is reached.

        Shrinking never interrupts a job: a busy worker leaves after it.
        Cancelling the wait keeps the new target. If targets follow each
        other, all wait for the last one.

        Raises:
          PoolClosed: the pool closed before the number was reached.
          PoolBroken: the new workers could not be set up.
        """
        check_count("size", size)
        await self._supervisor.resize(size)

    @enable_ki_protection
    def pause(self) -> None:
        """Let workers take no more jobs; jobs are still accepted.

        What runs goes on. Closing the pool resumes it.
        """
        self._supervisor.check_thread()
        self._supervisor.pause()

    @enable_ki_protection
    def resume(self) -> None:
        """Let workers take jobs again, after `pause`."""
        self._supervisor.check_thread()
        self._supervisor.resume()

    async def join(self) -> None:
        """Wait until every accepted job has ended; the pool stays open.

        Jobs accepted while waiting are waited for too. A cancelled wait
        loses nothing: the jobs go on.

        Raises:
          PoolBroken: the pool gave up before the last job ended.
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
        self._supervisor.check_thread()
        return await self._supervisor.shut_down(grace)

    @enable_ki_protection
    def cancel(self) -> None:
        """Stop now: cancel every job, waiting or running; refuse new ones."""
        self._supervisor.check_thread()
        self._supervisor.cancel()

    def statistics(self) -> PoolStatistics:
        """Count everything; exact, cheap, and legal from any thread."""
        return self._supervisor.statistics()

    def workers(self) -> tuple[WorkerSnapshot, ...]:
        """Picture every worker; legal from any thread."""
        return self._supervisor.snapshots()

    def _batch_options(self, timeout: float | None, priority: int) -> tuple[float, int]:
        if timeout is None:
            timeout = self._timeout
        else:
            check_seconds("timeout", timeout, zero=False)
        check_priority(priority)
        return timeout, priority

    def _stream(
        self,
        items: Any,
        ordered: bool,
        ahead: int | None,
        outcomes: bool,
        timeout: float | None,
        priority: int,
        fn: Callable[..., Any] | None = None,
    ) -> Any:
        timeout, priority = self._batch_options(timeout, priority)
        if ahead is None:
            ahead = 2 * max(1, self.size)
        check_count("ahead", ahead)
        if not ahead:
            raise ValueError(refuse("ahead", ahead, "an int, 1 or more"))
        if not isinstance(items, (Iterable, AsyncIterable)):
            expected = "an iterable or an async iterable"
            raise TypeError(refuse("items", items, expected))
        return open_stream(
            self._supervisor, items, timeout, priority, ordered, ahead, outcomes, fn
        )


@final
class Pool(_Handle, Generic[In, Out]):
    """The handle of a pool whose workers share one kind of handler.

    Made by `open_pool`. Not thread-safe: from other threads use
    `trio.from_thread`.
    """

    @enable_ki_protection
    async def process(
        self, job_input: In, /, *, timeout: float | None = None, priority: int = 0
    ) -> Out:
        """Run a job and return its result, as if the handler were called directly.

        Same value, same exception object, same cancellation, same deadlines,
        same context variables; it only waits for a free worker first.
        ``timeout`` (seconds, from the job's start) replaces that of the pool;
        of waiting jobs the one with the highest ``priority`` is first.

        Cancelled while it waits, the job leaves the backlog and never starts.
        Cancelled while it runs, the handler gets `trio.Cancelled`, and this
        returns when the handler has ended: by its value, if it has one all
        the same.

        Raises:
          JobTimeout: the job ran longer than its timeout.
          WorkerCrashed: the worker died under it.
          BacklogFull, JobDropped: as the option ``overflow`` says.
          PoolClosed, PoolBroken: the pool takes no jobs any more.
        """
        supervisor = self._supervisor
        job = Job(
            supervisor, supervisor.next_id(), job_input, copy_context(), self._timeout
        )
        if timeout is not None or priority is not _PLAIN:
            self._set_options(job, timeout, priority)
        if supervisor.accept(job, True):
            job.caller = task = current_task()
            # Only where somebody in this run has a deadline at all.
            if task._runner.deadlines._active:  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
                job.deadline = effective_deadline(task)
            await wait_task_rescheduled(job.abort)
            if job.state is _DONE:
                return job.value  # type: ignore[no-any-return]
        else:
            await checkpoint()
        return job.raise_as_caller()

    @enable_ki_protection
    async def submit(
        self, job_input: In, /, *, timeout: float | None = None, priority: int = 0
    ) -> Reply[Out]:
        """Give in a job and go on; waits only for room in the backlog.

        The job does not belong to the caller: its cancellation and deadlines
        do not reach it. Cancelled while it waits for room, nothing has
        happened. Raises what `process` raises before a job has started.
        """
        supervisor = self._supervisor
        job = self._job(job_input, timeout, priority)
        supervisor.check_thread()
        await checkpoint_if_cancelled()
        supervisor.accept(job, True)
        if job.state is not None:
            await cancel_shielded_checkpoint()
            return Reply(job)
        job.readers = {current_task(): None}

        def abort(_: object) -> Abort:
            job.readers = None
            supervisor.withdraw(job)
            return Abort.SUCCEEDED

        await wait_task_rescheduled(abort)
        if job.state is None:
            assert job.error is not None
            raise_caught(job.error, None)
        return Reply(job)

    @enable_ki_protection
    def submit_nowait(
        self, job_input: In, /, *, timeout: float | None = None, priority: int = 0
    ) -> Reply[Out]:
        """Give in a job and go on, without ever waiting.

        Raises:
          BacklogFull: there is no room now; it is a `trio.WouldBlock`.
        """
        job = self._job(job_input, timeout, priority)
        self._supervisor.accept(job, False)
        return Reply(job)

    def _job(self, job_input: Any, timeout: float | None, priority: int) -> Job:
        supervisor = self._supervisor
        job = Job(
            supervisor, supervisor.next_id(), job_input, copy_context(), self._timeout
        )
        self._set_options(job, timeout, priority)
        return job

    def _set_options(self, job: Job, timeout: float | None, priority: int) -> None:
        job.timeout, job.priority = self._batch_options(timeout, priority)

    async def map(
        self,
        items: Iterable[In] | AsyncIterable[In],
        /,
        *,
        timeout: float | None = None,
        priority: int = 0,
    ) -> list[Out]:
        """Run a job for each item; return the results in input order.

        Workers pull the items themselves, one when they are free, so that
        the input may be longer than memory or the backlog, and never waits
        for room. The first failure cancels the rest. Cancelled, it calls off
        the rest and returns when every handler has ended.

        Raises:
          ExceptionGroup: of every failure, each with a note that names its
            item. An error of ``items`` itself leaves bare.
          PoolClosed, PoolBroken: the pool stopped before the end.
        """
        timeout, priority = self._batch_options(timeout, priority)
        return await map_items(self._supervisor, items, timeout, priority)

    async def settle(
        self,
        items: Iterable[In] | AsyncIterable[In],
        /,
        *,
        timeout: float | None = None,
        priority: int = 0,
    ) -> list[Settled[In, Out]]:
        """Run a job for each item; return every outcome in input order.

        As `map`, but a failure is an outcome, and cancels nothing. Only an
        error of ``items``, and the end of the pool, are raised.
        """
        timeout, priority = self._batch_options(timeout, priority)
        return await settle_items(self._supervisor, items, timeout, priority)

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
    ) -> Any:
        """Open an async iterator over the results, while the work goes on.

        An async context manager: ``async with pool.stream(urls) as pages:``,
        then ``async for page in pages:``. Results come in input order, or as
        they are ready if not ``ordered``; at most ``ahead`` items (by default
        twice the size) are taken beyond what was read. With ``outcomes`` each
        is a `Settled`; otherwise the error of a failed job is raised in its
        place, and reading may go on. Leaving early, by ``break`` or an error,
        cancels the rest; failures left unread are the pool's to report.
        """
        return self._stream(items, ordered, ahead, outcomes, timeout, priority)


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
    ) -> Out:
        """Run ``async_fn(*args)`` in a worker and return its result."""
        call = _call(async_fn, args)
        return await self._pool.process(call, timeout=timeout, priority=priority)  # type: ignore[no-any-return]

    async def submit(
        self,
        async_fn: Callable[[Unpack[Args]], Awaitable[Out]],
        /,
        *args: *Args,
        timeout: float | None = None,
        priority: int = 0,
    ) -> Reply[Out]:
        """Give in a call and go on; waits only for room in the backlog."""
        call = _call(async_fn, args)
        return await self._pool.submit(call, timeout=timeout, priority=priority)

    def submit_nowait(
        self,
        async_fn: Callable[[Unpack[Args]], Awaitable[Out]],
        /,
        *args: *Args,
        timeout: float | None = None,
        priority: int = 0,
    ) -> Reply[Out]:
        """Give in a call and go on, without ever waiting."""
        call = _call(async_fn, args)
        return self._pool.submit_nowait(call, timeout=timeout, priority=priority)

    async def map(
        self,
        async_fn: Callable[[In], Awaitable[Out]],
        items: Iterable[In] | AsyncIterable[In],
        /,
        *,
        timeout: float | None = None,
        priority: int = 0,
    ) -> list[Out]:
        """Run ``async_fn(item)`` for each item; return the results in order."""
        timeout, priority = self._batch_options(timeout, priority)
        fn = _check_function(async_fn)
        return await map_items(self._supervisor, items, timeout, priority, fn)

    async def settle(
        self,
        async_fn: Callable[[In], Awaitable[Out]],
        items: Iterable[In] | AsyncIterable[In],
        /,
        *,
        timeout: float | None = None,
        priority: int = 0,
    ) -> list[Settled[In, Out]]:
        """Run ``async_fn(item)`` for each item; return every outcome in order."""
        timeout, priority = self._batch_options(timeout, priority)
        fn = _check_function(async_fn)
        return await settle_items(self._supervisor, items, timeout, priority, fn)

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
    ) -> Any:
        """Open an async iterator over the results of ``async_fn(item)``."""
        fn = _check_function(async_fn)
        return self._stream(items, ordered, ahead, outcomes, timeout, priority, fn)


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
        supervisor = Supervisor(config, _constant(handler), call_handler)
    elif worker is not None:
        _check_factory(worker)
        supervisor = Supervisor(config, worker, call_handler)
    else:
        supervisor = Supervisor(config, _constant(_no_handler), call_function)
        return _run_pool(TaskPool(supervisor), supervisor)
    return _run_pool(Pool[Any, Any](supervisor), supervisor)


async def _no_handler(_: object) -> None:
    """Stand in for the handler in a `TaskPool`, whose jobs bring their own."""


@final
class _Constant:
    """A context manager for workers that need neither setup nor cleanup."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler

    async def __aenter__(self) -> Any:
        return self._handler

    async def __aexit__(self, *exc_info: object) -> None:
        return None


def _constant(handler: Any) -> Factory:
    manager = cast("AbstractAsyncContextManager[Any]", _Constant(handler))
    return lambda: manager


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


@asynccontextmanager
async def _run_pool(
    pool: AnyPool, supervisor: Supervisor
) -> AsyncGenerator[AnyPool, None]:
    supervisor.prepare()
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
                await supervisor.shut_down(supervisor.config.grace)
            except BaseException:
                supervisor.cancel()
                raise
    except BaseException as body_error:
        error = body_error
    unheard = supervisor.unheard_errors()
    try:
        _leave(supervisor, error, unheard)
    finally:
        del error, unheard


def _leave(
    supervisor: Supervisor, error: BaseException | None, unheard: list[Exception]
) -> None:
    """Raise what the block is to be left with, if anything."""
    config, failure = supervisor.config, supervisor.failure
    report = config.unobserved
    if error is None and failure is None and unheard and report == "raise":
        raise ExceptionGroup(
            f"{len(unheard)} jobs of pool {config.name!r} failed and nobody read it",
            unheard,
        )
    if report != "ignore":
        for other in unheard:
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
        raise failure
    if error is not None:
        raise_caught(error, error.__traceback__)
