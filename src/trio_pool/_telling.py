"""The fan-out of what happens in a pool: to hooks first, then to event streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any, Self, TypeAlias, final

import trio

from ._checks import check_count, refuse
from ._events import Event, EventsLost, Hooks, log

HOOK_NAMES = tuple(name for name in vars(Hooks) if name.startswith("on_"))

Listener: TypeAlias = Callable[[Any], None]


@final
class HookCalls:
    """The overridden methods of some hooks, by name, and the open event streams.

    A hook that raises is dropped. ``any_job_hook`` says whether anyone hears
    of jobs; it changes where a stream is opened or closed.
    """

    def __init__(self, hooks: Iterable[Hooks]) -> None:
        found: dict[str, tuple[Listener, ...]] = {}
        for name in HOOK_NAMES:
            plain = getattr(Hooks, name)
            found[name] = tuple(
                getattr(hook, name)
                for hook in hooks
                if getattr(type(hook), name) is not plain or name in vars(hook)
            )
        self._found = found
        self._buffers: tuple[_Buffer, ...] = ()
        self._set_buffers(())

    def listening(self, name: str) -> bool:
        """Say whether anyone listens, so that the event need not be made."""
        return bool(self._found[name] or self._readers[name])

    def call(self, name: str, event: Event) -> None:
        """Tell every listener; drop and log the one that raises."""
        for listener in self._found[name]:
            try:
                listener(event)
            except BaseException:
                # Not even an exit: the caller of the job waits to be woken.
                left = [other for other in self._found[name] if other != listener]
                self._found[name] = tuple(left)
                log.exception("the hook %s raised and is not called again", name)
        for buffer in self._readers[name]:
            buffer.tell(event)

    def open_stream(
        self,
        pool: str,
        clock: Callable[[], float],
        buffer: int,
        kinds: Collection[str] | None = None,
    ) -> EventStream:
        """Make a stream that hears events from now on, until it is closed.

        Raises:
          ValueError, TypeError: ``buffer`` is not an int, 1 or more; ``kinds`` are
            not kinds of events.
        """
        check_count("buffer", buffer)
        if buffer < 1:
            raise ValueError(refuse("buffer", buffer, "an int, 1 or more"))
        opened = _Buffer(pool, clock, buffer, check_kinds(kinds), self._forget)
        self._set_buffers((*self._buffers, opened))
        return EventStream(opened)

    def _forget(self, closed: _Buffer) -> None:
        self._set_buffers(tuple(b for b in self._buffers if b is not closed))

    def _set_buffers(self, buffers: tuple[_Buffer, ...]) -> None:
        self._buffers = buffers
        self._readers = {
            name: tuple(buffer for buffer in buffers if buffer.hears(_kind_of(name)))
            for name in HOOK_NAMES
        }
        self.any_job_hook = any(
            self.listening(name) for name in HOOK_NAMES if name.startswith("on_job_")
        )


def _kind_of(hook: str) -> str:
    return hook.removeprefix("on_")


KINDS = tuple(map(_kind_of, HOOK_NAMES))


def check_kinds(kinds: Any) -> frozenset[str]:
    """Return which kinds of events are to be heard: all, if nothing is said.

    Raises:
      ValueError, TypeError: they are none; the message names those that are.
    """
    if kinds is None:
        return frozenset(KINDS)
    expected = "a collection of kinds of events, of " + ", ".join(KINDS)
    if isinstance(kinds, str) or not isinstance(kinds, Collection):
        raise TypeError(refuse("kinds", kinds, expected))
    if not set(kinds) <= set(KINDS) or not kinds:
        raise ValueError(refuse("kinds", kinds, expected))
    return frozenset(kinds)


@final
class _Buffer:
    """The events that one reader has still to read; the oldest are lost first."""

    def __init__(
        self,
        pool: str,
        clock: Callable[[], float],
        size: int,
        kinds: frozenset[str],
        forget: Callable[[_Buffer], None],
    ) -> None:
        self.events: deque[Event] = deque()
        self.lost = 0
        self._pool = pool
        self._clock = clock
        self._size = size
        self._kinds = kinds
        self._forget = forget
        self._gap = 0
        self._gap_time = 0.0
        self._ended = False
        self._reading = False
        self._reader = trio.lowlevel.ParkingLot()

    def hears(self, kind: str) -> bool:
        """Say whether events of a kind are to be told: the last ends the stream."""
        return kind in self._kinds or kind == "pool_stop"

    def tell(self, event: Event) -> None:
        """Keep an event for the reader, in the place of the oldest if need be."""
        if self._ended:
            return
        self._ended = event.kind == "pool_stop"
        if event.kind in self._kinds:
            self._keep(event)
        if self._reader:
            self._reader.unpark_all()

    def _keep(self, event: Event) -> None:
        events = self.events
        if len(events) == self._size:
            events.popleft()
            if not self._gap:
                self._gap_time = self._clock()
            self._gap += 1
            self.lost += 1
        events.append(event)

    async def read(self) -> Event:
        """Wait for the next event and take it."""
        if self._reading:
            raise trio.BusyResourceError("another task is reading this event stream")
        self._reading = True
        try:
            await trio.lowlevel.checkpoint()
            if not self.events and not self._ended:
                await self._reader.park()
        finally:
            self._reading = False
        # No await from here on: a cancelled read has not taken anything.
        if self._gap:
            count, self._gap = self._gap, 0
            return EventsLost(self._pool, self._gap_time, count)
        if self.events:
            return self.events.popleft()
        raise StopAsyncIteration

    def close(self) -> None:
        """Hear no more, forget what was not read, and wake the reader."""
        self._ended = True
        self._gap = 0
        self.events.clear()
        self._forget(self)
        self._reader.unpark_all()


@final
class EventStream:
    """An async iterator over what happens in a pool; see `Pool.events`.

    One task reads it. If it is slow, the oldest unread events are lost, and an
    `EventsLost` in their place says how many. It ends when the pool has stopped
    and everything is read, or when its block is left.
    """

    __slots__ = ("_buffer",)

    # Only the pool makes streams; what is behind them is no public type.
    def __init__(self, buffer: Any) -> None:
        self._buffer: _Buffer = buffer

    def __repr__(self) -> str:
        waiting = len(self._buffer.events)
        return f"<trio_pool.EventStream: {waiting} unread, {self.lost} lost>"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """Return the next event, or the `EventsLost` in the place of lost ones.

        Cancelling a read loses no event.

        Raises:
          trio.BusyResourceError: another task is reading already.
        """
        return await self._buffer.read()

    @property
    def lost(self) -> int:
        """How many events were lost so far, because the reader was slow."""
        return self._buffer.lost

    def close(self) -> None:
        """Stop listening; a reader that waits gets the end. Idempotent.

        What was not read yet is gone.
        """
        self._buffer.close()
