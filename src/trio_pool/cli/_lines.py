"""The lines of the input, read by a thread, with how far they have been read."""

from __future__ import annotations

import hashlib
import os
import select
from collections import deque
from collections.abc import Container
from typing import Self, final

import attrs
import trio

from ._ends import Broken, Refused

_BLOCK = 65_536


@final
@attrs.frozen
class Position:
    """How much of the input was read, and what it was."""

    size: int = 0
    digest: str = ""


@final
class Lines:
    """An async iterator over ``(index, line)``; lines come without their end.

    Cancelled, a read is left behind, as it may have to wait for ever.
    """

    def __init__(self, name: str, fd: int, *, digest: bool) -> None:
        self.position = Position()
        """All that was returned so far is before it."""
        self._name = name
        self._fd = fd
        self._hash = hashlib.blake2b(digest_size=16) if digest else None
        self._ready: deque[tuple[int, bytes]] = deque()
        self._parts: list[bytes] = []
        """Of a line whose end was not read yet."""
        self._count = 0
        """Lines that were split off."""
        self._over = False
        self._thread = trio.CapacityLimiter(1)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, bytes]:
        """Return the next line.

        Raises:
          Broken: the input cannot be read.
        """
        while not self._ready:
            if self._over:
                raise StopAsyncIteration
            self._ready += self._split(await self._read(_BLOCK))
        return self._ready.popleft()

    async def skip(
        self, position: Position, taken: int, pending: Container[int]
    ) -> None:
        """Go to where another run was: only what it had not answered comes again.

        Raises:
          Refused: this is not the input of that run.
        """
        while (rest := position.size - self.position.size) > 0:
            block = await self._read(min(_BLOCK, rest))
            if not block:
                raise Refused(
                    f"{self._name} is not what the journal is of: it has "
                    f"{self.position.size:,} bytes, and had {position.size:,} or more"
                )
            self._keep(block, taken, pending)
        # Of nothing a run that has just begun has no digest.
        if position.size and self.position != position:
            raise Refused(
                f"{self._name} is not what the journal is of: "
                f"its first {position.size:,} bytes have changed"
            )
        # The last line had no end when it was read.
        if taken > self._count:
            await self.require_end()
            self._keep(b"", taken, pending)

    async def require_end(self) -> None:
        """Check that nothing follows what was read.

        Raises:
          Refused: something does.
        """
        before = self.position.size
        if await self._read(1):
            raise Refused(
                f"{self._name} is not what the journal is of: "
                f"it goes on after the {before:,} bytes that it had"
            )

    def _keep(self, block: bytes, taken: int, pending: Container[int]) -> None:
        self._ready += [
            (index, line)
            for index, line in self._split(block)
            if index >= taken or index in pending
        ]

    def _split(self, block: bytes) -> list[tuple[int, bytes]]:
        if not block:
            self._over = True
        elif b"\n" not in block:
            self._parts.append(block)
            return []
        lines = b"".join([*self._parts, block]).split(b"\n")
        rest = lines.pop()
        self._parts = [rest] if rest else []
        if self._over and rest:
            lines.append(rest)
        start = self._count
        self._count += len(lines)
        return list(enumerate(lines, start))

    async def _read(self, most: int) -> bytes:
        try:
            block, self.position = await trio.to_thread.run_sync(
                self._read_here, most, abandon_on_cancel=True, limiter=self._thread
            )
        except OSError as error:
            raise Broken(f"cannot read {self._name}: {error.strerror}") from error
        return block

    def _read_here(self, most: int) -> tuple[bytes, Position]:
        block = read(self._fd, most)
        # A digest must be of exactly this block's end, while a later one is read.
        digest = ""
        if self._hash is not None:
            self._hash.update(block)
            digest = self._hash.hexdigest()
        return block, Position(self.position.size + len(block), digest)


def read(fd: int, most: int) -> bytes:
    """Read what is there, or wait for something; also where that is not the mode."""
    while True:
        try:
            return os.read(fd, most)
        except BlockingIOError:
            select.select([fd], [], [])
