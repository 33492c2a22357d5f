"""The ways in which a command ends early, and the exit code of each."""

from __future__ import annotations

from typing import final

import trio

DONE = 0
FAILURES = 1
REFUSED = 2
BROKEN = 3
SIGNALLED = 128
"""This and the number of the signal."""
OUTPUT_CLOSED = 141
"""As of a program that SIGPIPE has ended."""


class CommandEnd(Exception):
    """A command cannot go on; the text is the line for whoever has started it."""

    code = BROKEN


@final
class Refused(CommandEnd):
    """It cannot be run as it was asked for; nothing has changed."""

    code = REFUSED


@final
class Broken(CommandEnd):
    """It was running, and something it needs has failed."""


@final
class OutputClosed(CommandEnd):
    """Nobody reads the output any more, as after ``| head``."""

    code = OUTPUT_CLOSED


@final
class Work:
    """What is cancelled when the command ends early, and why if it failed."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.error: CommandEnd | None = None

    def fail(self, error: CommandEnd) -> None:
        """End it; the first error that does so is kept."""
        # Raised in here it would meet the cancellation of what runs beside it.
        if self.error is None:
            self.error = error
        self.scope.cancel()
