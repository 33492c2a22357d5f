"""A nursery around somebody else's block, whose error leaves it bare."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


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
