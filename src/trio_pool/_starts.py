"""What a start costs in a guarded pool: a token of the limiter, one of the rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import trio
from trio.lowlevel import ParkingLot, enable_ki_protection

if TYPE_CHECKING:
    from ._dispatch import Dispatch
    from ._job import Job


@final
class Starts:
    """Takes what starts cost, gives it back, and has it waited for.

    What was taken is given back when no job starts after all. Where there is
    nothing to take, the timer or one task waits for all of the pool, so that
    waiting holds no worker.
    """

    __slots__ = (
        "_alarm",
        "_dispatch",
        "_limiter",
        "_rate",
        "_spares",
        "_taken",
        "_wanted",
        "waiters",
    )

    def __init__(self, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self._rate = dispatch.config.rate
        self._limiter = dispatch.config.limiter
        self._alarm: object = None
        self._wanted = trio.Event()
        self._taken: list[object] = []
        """Tokens of starts that are being decided; hooks may nest these."""
        self._spares: list[object] = []
        """Tokens that were waited for, and that no job has yet."""
        self.waiters = ParkingLot()
        """Leases that wait to start a job."""

    def take(self) -> bool:
        """Take what a start costs, or have it waited for."""
        if self._limiter is not None:
            if self._spares:
                self._taken.append(self._spares.pop())
            else:
                borrower = object()
                try:
                    self._limiter.acquire_on_behalf_of_nowait(borrower)
                except trio.WouldBlock:
                    self._wanted.set()
                    return False
                self._taken.append(borrower)
        if self._rate is not None:
            when = self._rate.take(self._dispatch.clock())
            if when != -math.inf:
                if self._taken:
                    self.release(self._taken.pop())
                if self._alarm is None:
                    self._alarm = self._dispatch.timer.at(when, self._ring)
                return False
        return True

    def give_back(self) -> None:
        """Give back what `take` has just taken."""
        if self._taken:
            self.release(self._taken.pop())
        if self._rate is not None:
            self._rate.give_back()

    def lend(self, job: Job) -> None:
        """Let a job hold the token that `take` has just taken."""
        if self._taken:
            job.own_terms().token = self._taken.pop()

    def release(self, token: object) -> None:
        """Give a token back to the limiter."""
        assert self._limiter is not None
        self._limiter.release_on_behalf_of(token)

    def release_spares(self) -> None:
        """Give back the tokens that nobody has taken, unless somebody may yet."""
        while self._spares and not self.waiters:
            self.release(self._spares.pop())

    def are_awaited(self) -> bool:
        """Say whether the next start has to be waited for, and is."""
        return self._alarm is not None or self._wanted.is_set()

    def _ring(self) -> None:
        self._alarm = None
        self._try()

    def _try(self) -> None:
        self._dispatch.rouse(1)
        self.waiters.unpark_all()

    @enable_ki_protection
    async def fetch_tokens(self) -> None:
        """Queue at the shared limiter in the place of the workers."""
        assert self._limiter is not None
        while True:
            await self._wanted.wait()
            borrower = object()
            await self._limiter.acquire_on_behalf_of(borrower)
            self._wanted = trio.Event()
            if self.waiters or (self._dispatch.idle and self._dispatch.has_ready()):
                self._spares.append(borrower)
                self._try()
            else:
                self.release(borrower)
