"""What is put around somebody else's block: a nursery, and care for Ctrl-C."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, final

import trio
from trio.lowlevel import enable_ki_protection

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

P = ParamSpec("P")
T = TypeVar("T")


@final
class _Whole(AbstractAsyncContextManager[T]):
    """Leaves a context manager, with Ctrl-C before it or after it."""

    def __init__(self, manager: AbstractAsyncContextManager[T]) -> None:
        self._manager = manager

    async def __aenter__(self) -> T:
        return await self._manager.__aenter__()

    @enable_ki_protection
    async def __aexit__(self, *exc_info: Any) -> bool | None:
        return await self._manager.__aexit__(*exc_info)


def whole_block(
    generate: Callable[P, AsyncGenerator[T, None]],
) -> Callable[P, AbstractAsyncContextManager[T]]:
    """Make an async context manager of a generator, as `asynccontextmanager` does.

    Ctrl-C is heard in the block, or where the generator waits. Else it could land
    on the way to a generator, which then would never hear that its block has ended.
    """
    make = asynccontextmanager(enable_ki_protection(generate))

    @wraps(generate)
    def opened(*args: P.args, **kwargs: P.kwargs) -> AbstractAsyncContextManager[T]:
        return _Whole(make(*args, **kwargs))

    return opened


@asynccontextmanager
async def open_bare_nursery() -> AsyncGenerator[trio.Nursery, None]:
    """Open a nursery for tasks that never raise; a body error leaves bare.

    A plain nursery would put the error of the block into a group.
    """
    error: BaseException | None = None
    called_off = False
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as body_error:
                error = body_error
                called_off = nursery.cancel_scope.cancel_called
                raise
    except BaseExceptionGroup as group:
        # A nursery that was called off before has taken its Cancelled out of
        # the error; otherwise the error is the body's, the very object.
        if error is None or called_off:
            error = group.exceptions[0] if len(group.exceptions) == 1 else group
    else:
        error = None
    if error is not None:
        # Outside the except block, which would become the error's context.
        context = error.__context__
        try:
            raise error
        finally:
            error.__context__ = context
            del error, context
