"""Puts into words what users' code made: inputs of jobs, and errors."""

from collections.abc import Callable
from typing import Any, final

from .._events import log
from ._place import place_of_error

_LONGEST_INPUT = 200
_LONGEST_ID = 64
_LONGEST_MESSAGE = 300


@final
class Words:
    """Describes inputs and errors, as far as they may be shown.

    Without a ``describe`` neither inputs nor messages, which may quote them,
    are. A ``describe`` that raises, or returns no str, is not called again.
    """

    def __init__(self, describe: Callable[[Any], str] | None) -> None:
        self._describe: Callable[[Any], object] | None = describe
        self.all_shown = describe is not None
        """Whether inputs and messages may be shown."""

    def of_input(self, job_input: object) -> str | None:
        """Describe a job's input; None if it may not be shown."""
        if self._describe is None:
            return None
        try:
            text = self._describe(job_input)
            if not isinstance(text, str):
                raise TypeError(f"describe must return a str, got {text!r}")
        except Exception:
            log.exception("describe= of a dashboard raised and is not called again")
            self._describe = None
            return None
        return _cut(text, _LONGEST_INPUT)

    def of_error(self, error: BaseException | None) -> str | None:
        """Return an error's message; None if it may not be shown."""
        if not self.all_shown or error is None:
            return None
        try:
            text = str(error)
        except Exception:
            text = "(its message could not be made)"
        return _cut(text, _LONGEST_MESSAGE)


def type_of(error: BaseException | None) -> str:
    """Name the type of an error, with its module unless that is well known."""
    if error is None:
        return "unknown"
    kind = type(error)
    known = kind.__module__ in ("builtins", "__main__", "trio_pool")
    name = kind.__qualname__ if known else f"{kind.__module__}.{kind.__qualname__}"
    return _cut(name, _LONGEST_INPUT)


def id_of(job: int | str) -> int | str:
    """Cut a job's id to what can be shown: users choose them."""
    if not isinstance(job, int):
        return _cut(job, _LONGEST_INPUT)
    bits = job.bit_length()
    # More digits than a few thousand Python does not even write.
    return job if bits <= _LONGEST_ID else f"(a number of {bits} bits)"


def place_of(error: BaseException | None) -> str:
    """Return where an error was raised; empty if unknown."""
    return "" if error is None else place_of_error(error)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\u2026"
