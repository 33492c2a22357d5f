"""What runs in a generated program: calls, and the block round the pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import attrs
import trio
from trio.lowlevel import checkpoint

from .. import Hooks, JobChanged, JobId, JobState, Pool, Reply
from ._witness import Ticket


@attrs.define(eq=False)
class Call:
    """One call of a method of the pool, in a task of its own."""

    method: str
    tickets: list[Ticket]
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    reply: Reply[Any] | None = None
    over: bool = False

    @property
    def runs(self) -> bool:
        """Whether some job of it runs."""
        return any(ticket.runs for ticket in self.tickets)

    def cancel(self) -> None:
        """Cancel the call, or the job that it left behind."""
        if self.reply is not None:
            self.reply.cancel()
        else:
            self.scope.cancel()

    def __repr__(self) -> str:
        return f"{self.method}({', '.join(map(repr, self.tickets))})"


class Fates(Hooks):
    """Notes how often each job ended, and how."""

    def __init__(self) -> None:
        self.ends: dict[JobId, list[JobState]] = {}

    def on_job_complete(self, event: JobChanged) -> None:
        """Note it."""
        self.ends.setdefault(event.job_id, []).append(event.state)

    on_job_error = on_job_cancel = on_job_drop = on_job_complete


class BlockFailed(Exception):
    """What the block round a pool is left by, in some programs."""


Ending: TypeAlias = Literal["leave", "raise", "cancel"]


@attrs.define(eq=False)
class Block:
    """The block round a pool, in a task, left when it is told to."""

    ending: Ending
    opened: trio.Event = attrs.field(factory=trio.Event)
    closing: trio.Event = attrs.field(factory=trio.Event)
    left: trio.Event = attrs.field(factory=trio.Event)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    pool: Pool[Any, Any] | None = None
    error: Exception | None = None

    async def run(self, opening: Callable[[], Any]) -> None:
        """Be the block round the pool that this opens."""
        try:
            with self.scope:
                async with opening() as self.pool:
                    self.opened.set()
                    await self.closing.wait()
                    if self.ending == "raise":
                        raise BlockFailed
                    if self.ending == "cancel":
                        self.scope.cancel()
                        await checkpoint()
        except Exception as error:
            self.error = error
        self.left.set()
        self.opened.set()
