"""The stream of results that `Pool.stream` opens."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, Self, TypeVar, final

T = TypeVar("T")


@final
class Stream(Generic[T]):
    """An async iterator over results as they come; see `Pool.stream`.

    One task reads it. Cancelling a read loses no result.
    """

    def __init__(self, read: Callable[[], Awaitable[T]]) -> None:
        self._read = read

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        """Return the next result; raise the error of a failed job at its place.

        Raises:
          PoolClosed: the pool stopped before the input ran out.
          PoolBroken: the pool broke.
        """
        return await self._read()
