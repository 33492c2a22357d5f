"""The stream of results that `Pool.stream` opens."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Generic, Self, TypeVar, final

T = TypeVar("T")


@final
class Stream(Generic[T]):
    """An async iterator over results as they come; see `Pool.stream`.

    One task reads it. Cancelling a read loses no result. A read always checks
    for cancellation; other tasks get their turn at the first read, whenever a
    result has to be waited for, and at least every 0.5 ms.
    """

    def __init__(self, read: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._read = read

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Coroutine[Any, Any, T]:
        """Return the next result; raise the error of a failed job at its place.

        Raises:
          PoolClosed: the pool stopped before the input ran out.
          PoolBroken: the pool broke.
        """
        return self._read()
