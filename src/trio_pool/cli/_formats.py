"""What a line means, and what is written about it: bytes in, JSON lines out."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias, final

import trio

from .. import WorkerCrashed

# Python's own JSON knows NaN and Infinity, which are none.
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode

NOT_FROM_A_FUNCTION = (KeyboardInterrupt, trio.Cancelled)
"""What ends the run, while all else that is raised for a line, even an exit, is a
failure of that line."""

Parse: TypeAlias = Callable[[bytes], tuple[Any, bytes] | None]
"""Of a line, the item and the JSON that it is shown as; None if it is no item."""


class BadLine(Exception):
    """A line has no answer, through no fault of the function's; the text says why."""

    def __init__(self, text: str, shown: bytes) -> None:
        super().__init__(text)
        self.shown = shown
        """The JSON that the line is shown as."""


@final
class BadKey(BadLine):
    """The key of an item cannot be told."""


@final
class BadResult(BadLine):
    """There is no JSON for a result."""


@final
class Item:
    """A line on its way through the pool."""

    __slots__ = ("attempts", "index", "key", "shown", "value")

    def __init__(self, index: int, value: Any, shown: bytes, key: Any = None) -> None:
        self.index = index
        self.value = value
        self.shown = shown
        """The JSON of it, made before the function could change the value."""
        self.key = key
        self.attempts = 0

    def attempt(self) -> Any:
        """Begin an attempt; return the value, as no other attempt has changed it."""
        self.attempts += 1
        if self.attempts > 1 and isinstance(self.value, (dict, list)):
            return _decoder.decode(self.shown.decode())
        return self.value


def parse_text(line: bytes) -> tuple[Any, bytes] | None:
    """Read a line of text, which may end as lines of Windows do."""
    text = _decode(line.removesuffix(b"\r"))
    return text, to_json(text)


def parse_json(line: bytes) -> tuple[Any, bytes] | None:
    """Read a line of JSON; one of nothing but blanks is no item."""
    # Programs of Windows put a mark before the first one.
    line = line.strip().removeprefix(codecs.BOM_UTF8).strip()
    if not line:
        return None
    text = _decode(line)
    try:
        value = _decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"the line is not JSON: {error}", to_json(text)) from None
    # Exactly as it came: numbers keep their digits. Within JSON a carriage
    # return is a blank, but some readers would take it for the end of the line.
    return value, line.replace(b"\r", b" ")


def _decode(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        shown = to_json(line.decode(errors="backslashreplace"))
        raise BadLine(f"the line is not UTF-8: {error}", shown) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_decoder = json.JSONDecoder(parse_constant=_refuse_constant)


def to_json(value: Any) -> bytes:
    """Encode as JSON in UTF-8.

    Raises:
      TypeError, ValueError, RecursionError: there is no JSON for it.
    """
    # Half of a surrogate pair has no UTF-8; its escape is that of JSON, too.
    return _encode(value).encode("utf-8", "backslashreplace")


def result_line(item: Item, result: Any) -> bytes:
    """Word the answer to an item.

    Raises:
      BadResult: there is no JSON for the result.
    """
    try:
        encoded = to_json(result)
    except NOT_FROM_A_FUNCTION:
        raise
    except BaseException as error:
        raise BadResult(describe(error), item.shown) from None
    return b'{"index": %d, "input": %b, "result": %b}\n' % (
        item.index,
        item.shown,
        encoded,
    )


def failure_line(index: int, shown: bytes, error: str, attempts: int) -> bytes:
    """Word why a line has no answer."""
    return (
        b'{"index": %d, "input": %b, "error": %b, "started": %b, "attempts": %d}\n'
        % (
            index,
            shown,
            to_json(error),
            b"true" if attempts else b"false",
            attempts,
        )
    )


def describe(error: BaseException) -> str:
    """Word an error: ``Type: message``, and what killed a worker."""
    kind = type(error).__name__
    try:
        text = f"{kind}: {error}"
    except NOT_FROM_A_FUNCTION:
        raise
    except BaseException:
        text = f"{kind}: <its str failed>"
    if isinstance(error, WorkerCrashed) and error.__cause__ is not None:
        return f"{text}: {describe(error.__cause__)}"
    return text
