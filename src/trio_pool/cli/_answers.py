"""Which lines are answered, and what of that is still to be written."""

from __future__ import annotations

from typing import final

import attrs
import trio

_WINDOW = 1024
"""Lines, and more if there are many workers: so far ahead of the oldest one that
has no answer others may be, if all are to be written in order."""
_ROOM = 8_000_000
"""Bytes of answers that may wait to be written, and of lines that may wait for
their answers, if these are more than there are workers."""


@final
@attrs.frozen
class Tally:
    """How far a run has come."""

    taken: int = 0
    """Lines before this index are answered,"""
    pending: tuple[int, ...] = ()
    """but for these."""
    done: int = 0
    failed: int = 0


@final
class Answers:
    """Takes the answer to each line, in any order, and has them written in theirs.

    What it holds is bounded, whatever the length of the input and however long
    one line takes, as long as lines are taken only while there is room.
    """

    def __init__(self, tally: Tally, *, ordered: bool, workers: int) -> None:
        self.done = tally.done
        self.failed = tally.failed
        self.window = max(_WINDOW, 16 * workers)
        self._ordered = ordered
        self._taken = tally.taken
        self._next = tally.taken
        """The line to be written next, if all are to be in order."""
        self._pending = set(tally.pending)
        self._held: dict[int, tuple[bytes, bool]] = {}
        self._results: list[bytes] = []
        self._failures: list[bytes] = []
        self._bytes = 0
        self._workers = workers
        self._sizes: dict[int, int] = {}
        """Bytes of each line that has no answer yet."""
        self._waiting = 0
        """Bytes of all of them."""
        self._room: trio.Event | None = None
        self._news = trio.Event()

    def expect(self, index: int, size: int = 0) -> None:
        """The next line has been taken, which has so many bytes."""
        self._sizes[index] = size
        self._waiting += size
        if index >= self._taken:
            self._taken = index + 1
            if not self._ordered:
                self._pending.add(index)

    def give(self, index: int, record: bytes, *, failed: bool = False) -> None:
        """Answer a line; by nothing, if there is nothing to be said about it."""
        self._waiting -= self._sizes.pop(index)
        self._look()
        if self._ordered:
            self._held[index] = (record, failed)
            self._bytes += len(record)
            self._release()
        else:
            self._pending.discard(index)
            self._bytes += len(record)
            self._write(record, failed)

    def _release(self) -> None:
        while self._next in self._held:
            self._write(*self._held.pop(self._next))
            self._next += 1
            self._look()

    def release_all(self) -> None:
        """Have all written that waits for lines before it, which are given up."""
        for index in sorted(self._held):
            self._write(*self._held.pop(index))

    def _write(self, record: bytes, failed: bool) -> None:
        if record:
            self.failed += failed
            self.done += not failed
            (self._failures if failed else self._results).append(record)
        self._news.set()

    def take(self) -> tuple[bytes, bytes, Tally]:
        """Hand over what is to be written, and how far the run is with that."""
        results, failures = b"".join(self._results), b"".join(self._failures)
        self._results.clear()
        self._failures.clear()
        self._bytes -= len(results) + len(failures)
        self._news = trio.Event()
        self._look()
        return results, failures, self.tally()

    def tally(self) -> Tally:
        """Say how far the run is, with all that has ever been taken to be written."""
        pending = tuple(sorted(self._pending))
        # In order, what is held is as if it had never been taken.
        taken = self._next if self._ordered else self._taken
        return Tally(taken, pending, self.done, self.failed)

    def has_room(self, index: int) -> bool:
        """Say whether a line may be taken now."""
        return (
            self._bytes < _ROOM
            and (self._waiting < _ROOM or len(self._sizes) < self._workers)
            and (not self._ordered or index < self._next + self.window)
        )

    def is_complete(self) -> bool:
        """Say whether all that was taken is answered."""
        if self._ordered:
            return self._next == self._taken
        return not self._pending

    def _look(self) -> None:
        if self._room is not None:
            self._room.set()

    def counts(self) -> tuple[int, int]:
        """Return how many lines are done and failed, as a progress bar asks."""
        return self.done, self.failed

    async def wait_for_room(self, index: int) -> None:
        """Wait until a line may be taken."""
        while not self.has_room(index):
            self._room = trio.Event()
            await self._room.wait()
        self._room = None

    def wake(self) -> None:
        """Have who waits for news look."""
        self._news.set()

    async def wait_for_news(self) -> None:
        """Wait until something has come that is to be written."""
        await self._news.wait()
