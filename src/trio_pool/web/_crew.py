"""Runs the tasks of a dashboard beside a block, and has their errors leave bare."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, final

import trio

from .._nursery import open_bare_nursery


@final
class Crew:
    """Tasks that are cancelled when the block ends, and end the block if they fail."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self.failure: BaseException | None = None

    def start_soon(self, run: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Start a task."""
        self._nursery.start_soon(self._run, run, *args)

    async def start(self, run: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Start a task with a ``task_status``; wait until it has started."""
        status = Started()
        self.start_soon(run, *args, status)
        await status.event.wait()

    async def _run(self, run: Callable[..., Awaitable[object]], *args: Any) -> None:
        try:
            await run(*args)
        except BaseException as error:
            failure = _bare(error)
            if isinstance(failure, trio.Cancelled):
                raise
            self.failure = self.failure or failure
            self.cancel()

    def cancel(self) -> None:
        """Cancel all tasks, and the block."""
        self._nursery.cancel_scope.cancel()


@final
class Started:
    """Hears from a task that it has started, and nothing of its end."""

    def __init__(self) -> None:
        self.event = trio.Event()

    def started(self, value: object = None) -> None:
        """Note that the task has started."""
        self.event.set()


@asynccontextmanager
async def open_crew() -> AsyncGenerator[Crew, None]:
    """Open a crew around a block.

    The error of the block, or that of a task, leaves bare; if there are both they
    leave as a group.
    """
    crew: Crew | None = None
    error: BaseException | None = None
    try:
        async with open_bare_nursery() as nursery:
            crew = Crew(nursery)
            yield crew
    except BaseException as body_error:
        error = body_error
    failure = None if crew is None else crew.failure
    try:
        _leave(error, failure)
    finally:
        del error, failure


def _leave(error: BaseException | None, failure: BaseException | None) -> None:
    if failure is not None and isinstance(error, trio.Cancelled):
        error = None
    if failure is not None and error is not None:
        message = "the dashboard failed, and its block too"
        raise BaseExceptionGroup(message, [error, failure])
    found = error or failure
    if found is not None:
        context = found.__context__
        try:
            raise found
        finally:
            found.__context__ = context
            del found, error, failure, context


def _bare(error: BaseException) -> BaseException:
    """Take an error out of the groups that nurseries have put it into.

    That others were cancelled because of it is no news.
    """
    while isinstance(error, BaseExceptionGroup):
        cancelled, rest = error.split(trio.Cancelled)
        group = rest or cancelled
        if group is None or (rest is not None and len(rest.exceptions) > 1):
            return rest or error
        error = group.exceptions[0]
    return error
