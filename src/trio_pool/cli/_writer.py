"""The task that writes answers, and commits to the journal what is written."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import final

import attrs
import trio

from .._nursery import open_bare_nursery
from ._answers import Answers
from ._ends import CommandEnd, Work
from ._files import Target
from ._journal import Journal, State
from ._lines import Position

_PACE = 0.005
"""Seconds between two writes, so that there are few of them under load."""
_COMMIT_EVERY = 0.25
"""Seconds of work that a run which was killed has to do again, about."""


@final
class Writer:
    """Writes what is there as soon as it is, all of it in one go.

    Files and journal may block, on a disk or on who reads a pipe, so it is a
    thread that touches them: one call at a time, each for all that has come.
    """

    def __init__(
        self,
        answers: Answers,
        output: Target,
        failures: Target,
        journal: Journal | None,
        position: Callable[[], Position],
    ) -> None:
        self._answers = answers
        self._output = output
        self._failures = failures
        self._journal = journal
        self._position = position
        self._commit_at = math.inf
        """When what is not in the journal is to be."""
        self._finishing = False
        self._finished = False
        self._thread = trio.CapacityLimiter(1)

    def finish(self, *, finished: bool) -> None:
        """Have it write what is there and end; say if that is all of the run."""
        # A journal has no word for a gap; there they are answered another time.
        if not finished and self._journal is None:
            self._answers.release_all()
        self._finished = finished
        self._finishing = True
        self._answers.wake()

    async def run(self, work: Work) -> None:
        """Write until told to finish, or until that fails, which ends the work."""
        with trio.CancelScope(shield=True):
            try:
                while not self._finishing:
                    with trio.move_on_at(self._commit_at):
                        await self._answers.wait_for_news()
                    await self._write()
                    await trio.sleep(_PACE)
                # What came while the last write was under way.
                await self._write()
            except CommandEnd as error:
                work.fail(error)

    async def _write(self) -> None:
        results, failures, tally = self._answers.take()
        state = None
        if self._journal is not None and self._is_due():
            state = State(tally, self._position(), finished=self._finished)
        await trio.to_thread.run_sync(
            self._write_here, results, failures, state, limiter=self._thread
        )

    def _is_due(self) -> bool:
        """Say whether to commit now; if not, see to it that it is done soon."""
        now = trio.current_time()
        due = self._finishing or now >= self._commit_at
        soon = min(self._commit_at, now + _COMMIT_EVERY)
        self._commit_at = math.inf if due else soon
        return due

    def _write_here(self, results: bytes, failures: bytes, state: State | None) -> None:
        self._output.write(results)
        self._failures.write(failures)
        if state is not None and self._journal is not None:
            self._output.sync()
            self._failures.sync()
            output, failed = self._output.mark, self._failures.mark
            self._journal.commit(attrs.evolve(state, output=output, failures=failed))


@asynccontextmanager
async def writing(
    writer: Writer, answers: Answers, work: Work
) -> AsyncGenerator[None, None]:
    """Have answers written while the block runs, and the last of them at its end.

    Cancelled, or left by an error, what was answered until then is written too.
    If it cannot be written, the work ends.
    """
    finished = False
    async with open_bare_nursery() as nursery:
        nursery.start_soon(writer.run, work)
        try:
            yield
            finished = answers.is_complete()
        finally:
            writer.finish(finished=finished)
