"""A place that jobs of any number of pools can send their results to."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any, Generic, Self, TypeVar, final

import outcome
import trio
from trio.lowlevel import Abort, Task, enable_ki_protection

T = TypeVar("T")


@final
class Drain(Generic[T]):
    """Collects values, in the order they are sent, from any number of senders.

    There is no bound. Take what is there with `collect`, or read it with
    ``async for``, which waits for more until the drain is closed. Several
    tasks may read: each value goes to exactly one of them, and who has waited
    longest is served first. Cancelling a reader loses no value: it is returned
    to the reader or stays here. A drain belongs to one thread.
    """

    __slots__ = ("__weakref__", "_closed", "_readers", "_total", "_values")

    def __init__(self) -> None:
        self._values: deque[T] = deque()
        # Readers wait only where there is no value and the drain is open.
        self._readers: OrderedDict[Task, None] = OrderedDict()
        self._total = 0
        self._closed = False

    def __repr__(self) -> str:
        return (
            f"<trio_pool.Drain: {self.count} to collect, {self._total} sent, "
            f"{len(self._readers)} reading, {'closed' if self._closed else 'open'}>"
        )

    @property
    def count(self) -> int:
        """How many values are here now, to be collected or read."""
        return len(self._values)

    @property
    def total(self) -> int:
        """How many values were ever sent."""
        return self._total

    @property
    def closed(self) -> bool:
        """Whether no more values can be sent."""
        return self._closed

    @enable_ki_protection
    def send(self, value: T) -> None:
        """Put a value in, or give it to the reader that has waited longest.

        Never waits.

        Raises:
          trio.ClosedResourceError: the drain is closed.
        """
        if self._closed:
            raise trio.ClosedResourceError("this drain is closed")
        if self._readers:
            # Woken before it is struck off: another thread's call fails here,
            # and must not cost the reader its place.
            reader = next(iter(self._readers))
            trio.lowlevel.reschedule(reader, outcome.Value(value))
            del self._readers[reader]
        else:
            self._values.append(value)
        self._total += 1

    @enable_ki_protection
    def collect(self) -> list[T]:
        """Take all that is here, oldest first; nothing is left."""
        values = list(self._values)
        self._values.clear()
        return values

    @enable_ki_protection
    def close(self) -> None:
        """Take no more values; what is here can still be collected and read.

        Readers that wait stop. Closing again does nothing.
        """
        self._closed = True
        while self._readers:
            reader = next(iter(self._readers))
            trio.lowlevel.reschedule(reader, outcome.Error(StopAsyncIteration()))
            del self._readers[reader]

    def __aiter__(self) -> Self:
        return self

    @enable_ki_protection
    async def __anext__(self) -> T:
        """Take the oldest value; wait for one if none is here.

        A cancelled read takes nothing.

        Raises:
          StopAsyncIteration: the drain is closed and empty.
        """
        if self._values:
            await trio.lowlevel.checkpoint_if_cancelled()
            # Taken before the yield, so that an earlier reader gets the
            # earlier value; shielded, because it is in nobody else's hands.
            value = self._values.popleft()
            await trio.lowlevel.cancel_shielded_checkpoint()
            return value
        if self._closed:
            await trio.lowlevel.checkpoint()
            raise StopAsyncIteration
        task = trio.lowlevel.current_task()
        self._readers[task] = None

        def abort(_: Any) -> Abort:
            del self._readers[task]
            return Abort.SUCCEEDED

        # A value that was given before the reader is cancelled is returned.
        return await trio.lowlevel.wait_task_rescheduled(abort)  # type: ignore[no-any-return]
