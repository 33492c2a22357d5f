"""Errors that nurseries have put into groups: taken apart, or kept out of the log."""

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from .._events import log


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Take a group of errors apart."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


@contextmanager
def unlogged(*expected: type[BaseException]) -> Generator[None]:
    """Keep the pool from logging crashes that were asked for, by thousands."""

    def is_news(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return error is None or not any(isinstance(e, expected) for e in leaves(error))

    log.addFilter(is_news)
    try:
        yield
    finally:
        log.removeFilter(is_news)
