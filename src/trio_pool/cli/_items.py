"""The items of a run: lines that are taken while there is room for their answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, final

from trio.lowlevel import checkpoint

from ._answers import Answers
from ._formats import (
    NOT_FROM_A_FUNCTION,
    BadKey,
    BadLine,
    Item,
    Parse,
    describe,
    failure_line,
)
from ._lines import Lines

# Lines that are no items, after which others get their turn.
_STRETCH = 100


@final
class Items:
    """An async iterator over items; a line that is none is answered at once."""

    def __init__(
        self,
        lines: Lines,
        answers: Answers,
        parse: Parse,
        key_of: Callable[[Any], Any] | None,
    ) -> None:
        self._lines = lines
        self._answers = answers
        self._parse = parse
        self._key_of = key_of

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item:
        """Return the next item, once there is room for its answer."""
        answers = self._answers
        passed_by = 0
        while True:
            index, line = await anext(self._lines)
            if not answers.has_room(index):
                await answers.wait_for_room(index)
            answers.expect(index, len(line))
            item = self._read(index, line)
            if item is not None:
                return item
            passed_by += 1
            if passed_by % _STRETCH == 0:
                await checkpoint()

    def _read(self, index: int, line: bytes) -> Item | None:
        try:
            found = self._parse(line)
            if found is not None:
                value, shown = found
                return Item(index, value, shown, self._find_key(value, shown))
            self._answers.give(index, b"")
        except BadLine as bad:
            record = failure_line(index, bad.shown, describe(bad), 0)
            self._answers.give(index, record, failed=True)
        return None

    def _find_key(self, value: Any, shown: bytes) -> Any:
        if self._key_of is None:
            return None
        try:
            key = self._key_of(value)
            hash(key)
        except NOT_FROM_A_FUNCTION:
            raise
        except BaseException as error:
            raise BadKey(describe(error), shown) from None
        return key
