"""Hands the newest picture to all streams: a slow reader misses those between."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import final

import trio

from .._events import log


@final
class Feed:
    """The newest fragments of the page, and who reads them.

    Nothing is rendered while nobody reads, and nothing is kept for a reader but
    what it was sent last.
    """

    def __init__(self, render: Callable[[], Mapping[str, str]], limit: int) -> None:
        self._render = render
        self.limit = limit
        """How many may read."""
        self._complaints: set[type[Exception]] = set()
        self._fragments: Mapping[str, str] | None = None
        self._changed = trio.Event()
        self._ticks = 0
        self.readers: set[Reader] = set()
        self.stopping = trio.Event()
        """Set when the streams are to end."""

    def tick(self) -> None:
        """Have a new picture; to be called once a second."""
        self._fragments = self._try() if self.readers else None
        self._ticks += 1
        self._changed.set()
        self._changed = trio.Event()

    def _try(self) -> Mapping[str, str]:
        """Render; what fails is logged, once for each type, and nothing is new."""
        try:
            return self._render()
        except Exception as error:
            if type(error) not in self._complaints:
                self._complaints.add(type(error))
                log.exception("a dashboard could not render a picture")
            return self._fragments or {}

    def stop(self) -> None:
        """End all streams."""
        self.stopping.set()
        self._changed.set()

    @property
    def full(self) -> bool:
        """Whether there are as many readers as may be."""
        return len(self.readers) >= self.limit

    def newest(self) -> tuple[int, Mapping[str, str]]:
        """Return the newest fragments, of the last second or now, and their number."""
        if self._fragments is None:
            self._fragments = self._try()
        return self._ticks, self._fragments

    async def wait(self, number: int) -> None:
        """Wait for the picture after one, or until streams are to end."""
        if self._ticks == number and not self.stopping.is_set():
            await self._changed.wait()
        else:
            await trio.lowlevel.checkpoint()

    @contextmanager
    def reading(self) -> "Generator[Reader, None, None]":
        """Be one of the readers."""
        reader = Reader(self)
        self.readers.add(reader)
        try:
            yield reader
        finally:
            self.readers.discard(reader)


@final
class Reader:
    """What one stream was sent last."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._sent: dict[str, str] = {}
        self._number = 0
        self.task = trio.lowlevel.current_task()
        """The task that sends."""

    def changes(self) -> dict[str, str]:
        """Return the fragments that are not as they were sent last; note them."""
        self._number, newest = self._feed.newest()
        changes = {
            name: html for name, html in newest.items() if self._sent.get(name) != html
        }
        self._sent.update(changes)
        return changes

    async def wait(self) -> None:
        """Wait until there may be changes, or streams are to end."""
        await self._feed.wait(self._number)
