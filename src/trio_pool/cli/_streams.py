"""Standard input and output: for lines and answers alone, while a command runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from typing import final

import attrs

from ._ends import Refused


@final
@attrs.frozen
class Streams:
    """The descriptors of standard input and output, which no child inherits."""

    input: int
    output: int


@contextmanager
def hold_streams(
    *, takes_input: bool, takes_output: bool
) -> Generator[Streams, None, None]:
    """Take the streams that are asked for, until the block ends.

    Whoever else reads standard input meanwhile, such as a process that a function
    starts, finds it empty; and what they write to standard output goes to
    standard error.

    Raises:
      Refused: one of them is closed.
    """
    with ExitStack() as stack:
        # An open file would get the number of one that is closed.
        closed = [fd for fd in range(3) if _fill(fd, stack)]
        if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stderr(nowhere))
        for fd, name, takes in (
            (0, "input", takes_input),
            (1, "output", takes_output),
        ):
            if takes and fd in closed:
                raise Refused(f"standard {name} is closed")
        own_input, own_output = 0, 1
        if takes_input:
            null = os.open(os.devnull, os.O_RDONLY)
            stack.callback(os.close, null)
            own_input = _take(0, null, stack)
        if takes_output:
            own_output = _take(1, 2, stack)
        yield Streams(own_input, own_output)


def _fill(fd: int, stack: ExitStack) -> bool:
    """Have a descriptor be open; say whether it was not."""
    try:
        os.fstat(fd)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != fd:
            os.dup2(null, fd)
            os.close(null)
        stack.callback(os.close, fd)
        return True
    return False


def _take(fd: int, instead: int, stack: ExitStack) -> int:
    own = os.dup(fd)
    stack.callback(os.close, own)
    _flush()
    os.dup2(instead, fd)
    stack.callback(os.dup2, own, fd)
    # What is still on its way to standard error is to arrive there.
    stack.callback(_flush)
    return own


def _flush() -> None:
    if sys.__stdout__ is not None:
        with suppress(OSError, ValueError):
            sys.__stdout__.flush()


def say(text: str) -> None:
    """Tell whoever has started the command, if they hear it."""
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]
        return
    try:
        sys.stderr.write(f"trio-pool map: {text}\n")
        sys.stderr.flush()
    except OSError:
        # What is left in its buffer would fail once more when Python ends, and
        # make another exit code of it.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)
