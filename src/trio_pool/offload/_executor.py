"""Workers whose jobs run on any executor of `concurrent.futures`."""

from __future__ import annotations

from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, final

import outcome
import trio

from .._checks import is_async, refuse
from .._errors import WorkerGone
from .._events import In, Out
from ._bridge import wait_future, wait_until_done
from ._errors import EngineError
from ._remote import (
    PAYLOAD,
    AnyHandler,
    Handler,
    OpenWorker,
    Payloads,
    Workers,
    await_one,
    check_flag,
    check_work,
    never_begun,
    opened,
    refused_argument,
    takes,
    unwrapped,
)
from ._shim import HOME, KEPT, Report, run_anywhere

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable


def on_executor(
    factory: Callable[[], Executor],
    fn: Callable[[In], Out],
    *,
    abandon_on_cancel: bool = False,
) -> OpenWorker[In, Out]:
    """Run ``fn(item)`` on an executor that all workers share, one job each.

    ``factory`` makes the executor; it is shut down with the last worker. What
    it pickles has to suit it: `concurrent.futures.ProcessPoolExecutor` takes no
    lambdas. Give it as many workers as the pool has.

    A job that has begun to run cannot be stopped. Cancelled, or out of time, it
    is waited for, and a result that it has all the same wins; with
    ``abandon_on_cancel`` its caller does not wait, and its worker takes no job
    before it has ended. An executor that breaks takes all its jobs with it:
    each may have run, so each is `WorkerCrashed`; the factory is asked for
    another one once, which counts as one crash.
    """
    check_factory(factory)
    check_work(fn, None)
    check_flag("abandon_on_cancel", abandon_on_cancel)
    return Workers(partial(_open_shared, factory, fn, abandon_on_cancel))


def check_factory(factory: object) -> None:
    """Refuse what cannot be called for an executor."""
    expected = "a function without arguments that makes an executor"
    if not callable(factory) or is_async(factory) or takes(factory, 0) is False:
        raise TypeError(refuse("factory", factory, expected))


@asynccontextmanager
async def _open_shared(
    factory: Callable[[], Executor], fn: Callable[[Any], Any], abandon: bool, size: int
) -> AsyncGenerator[OpenWorker[Any, Any], None]:
    shared = _Shared(factory)
    try:
        yield partial(_open_worker, shared, fn, abandon)
    finally:
        await shared.shut_down()


@asynccontextmanager
async def _open_worker(
    shared: _Shared, fn: Callable[[Any], Any], abandon: bool
) -> AsyncGenerator[AnyHandler, None]:
    await shared.wait_for_place()
    other_end = _OnExecutor(shared, fn, abandon)
    await other_end.try_out()
    yield Handler(other_end)


@final
class _Shared:
    """The executor of all workers of a pool, and its successors."""

    def __init__(self, factory: Callable[[], Executor]) -> None:
        self._factory = factory
        self._executor: Executor | None = None
        self._left_behind: list[Future[Any]] = []

    def executor(self) -> Executor:
        """Return the executor that works, made anew if the last one is broken."""
        if self._executor is None:
            executor: Any = self._factory()
            if not isinstance(executor, Executor):
                expected = "a function that returns a concurrent.futures.Executor"
                raise TypeError(
                    f"{refuse('factory', self._factory, expected)}; "
                    f"it returned {executor!r}"
                )
            self._executor = executor
        return self._executor

    def broke(self, executor: Executor) -> bool:
        """Give up an executor; say whether this is the first one to notice."""
        if self._executor is not executor:
            return False
        self._executor = None
        executor.shutdown(wait=False)
        return True

    def leave_behind(self, future: Future[Any]) -> None:
        """Note that a call goes on, and has a place in the executor."""
        self._left_behind.append(future)

    async def wait_for_place(self) -> None:
        """Wait for one of those that were left behind, if there are any."""
        await await_one(self._left_behind, _end_of)

    async def shut_down(self) -> None:
        """Let the executor go, and wait for it unless it has been left running."""
        executor, self._executor = self._executor, None
        if executor is not None:
            wait = all(future.done() for future in self._left_behind)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(partial(executor.shutdown, wait=wait))


async def _end_of(future: Future[Any]) -> None:
    with suppress(Exception):
        await wait_future(future, abandon_on_cancel=True, may_cancel=False)


@final
class _OnExecutor:
    """The other end of a worker: one call on the shared executor at a time."""

    spent = False

    def __init__(
        self, shared: _Shared, fn: Callable[[Any], Any], abandon: bool
    ) -> None:
        self._shared = shared
        self._fn = fn
        self._abandon = abandon
        self._payloads = Payloads(PAYLOAD)

    async def try_out(self) -> None:
        """See whether the executor works, and takes the function."""
        executor = self._shared.executor()
        try:
            await wait_future(executor.submit(run_anywhere, HOME, self._fn, []))
        except (RuntimeError, CancelledError) as error:
            # Broken, or shut down.
            self._shared.broke(executor)
            text = f"the executor broke as it was tried out: {error!r}"
            raise EngineError(text) from error
        except Exception as error:
            expected = "something that the executor can pickle"
            reason = f"{type(error).__name__}: {error}"
            text = f"{refuse('fn', self._fn, expected)}: {reason}"
            raise TypeError(text) from error

    async def one(self, job_input: Any, answer: Callable[[Any], object] | None) -> Any:
        """Run a job; return its result, or raise its error."""
        look = None if answer is None else partial(_answer_by, answer)
        try:
            _, fates = await self._call([job_input], look)
        except _Refused as refused:
            result: outcome.Outcome[Any] = outcome.Error(
                refused_argument(job_input, refused.__cause__)
            )
        else:
            result = opened(fates, 1, self._payloads)[0]
            del fates
        try:
            return unwrapped(result)
        finally:
            del result

    async def many(self, items: list[Any]) -> tuple[list[outcome.Outcome[Any]], float]:
        """Run several jobs in one call; return their outcomes, and the seconds."""
        try:
            seconds, fates = await self._call(items)
        except _Refused as refused:
            if len(items) == 1:
                error = refused_argument(items[0], refused.__cause__)
                return [outcome.Error(error)], 0.0
            # One of them cannot be sent, and none has been.
            results: list[outcome.Outcome[Any]] = []
            seconds = 0.0
            for item in items:
                try:
                    result, took = await self.many([item])
                except WorkerGone as gone:
                    # Those before it have their outcomes; those after it never began.
                    results.append(outcome.Error(gone))
                    break
                results += result
                seconds += took
            return never_begun(results, len(items)), seconds
        return opened(fates, len(items), self._payloads), seconds

    async def _call(
        self, items: list[Any], look: Callable[[Future[Report]], object] | None = None
    ) -> Report:
        try:
            executor = self._shared.executor()
        except Exception as error:
            # The factory has nothing for this worker, but the next may be lucky.
            raise WorkerGone(started=False) from error
        try:
            future = executor.submit(run_anywhere, HOME, self._fn, items)
        except RuntimeError as error:
            # Broken, or shut down by somebody else.
            is_first = self._shared.broke(executor)
            raise WorkerGone(started=False, planned=not is_first) from error
        try:
            await wait_until_done(future, self._abandon, True, look)
            return future.result()
        except BrokenExecutor as error:
            is_first = self._shared.broke(executor)
            raise WorkerGone(started=True, planned=not is_first) from error
        except CancelledError as error:
            # By somebody else, before it began.
            raise WorkerGone(started=False, planned=True) from error
        except (trio.Cancelled, KeyboardInterrupt):
            if not future.done():
                self.spent = True
                self._shared.leave_behind(future)
            raise
        except Exception as error:
            # Of the function's own nothing comes this way.
            raise _Refused from error


def _answer_by(answer: Callable[[Any], object], future: Future[Report]) -> None:
    """Answer a job by its value, if nothing has to be done to have that."""
    if future.cancelled() or future.exception() is not None:
        return
    try:
        _, [(how, what)] = future.result()
    except (TypeError, ValueError):
        # No executor should change what it was given, and no run end if one does.
        return
    if how == KEPT:
        answer(what)


@final
class _Refused(Exception):
    """The executor could not send a call."""
