"""Does to a pool what an operator asks for: pause, resume, resize."""

import json
from typing import Any, Final, Literal, final

import attrs
import trio

from .._checks import refuse
from .._errors import PoolBroken, PoolClosed, PoolError
from .._events import PoolState
from ._watch import AnyPool

Action = Literal["pause", "resume", "resize"]

ACTIONS: Final[tuple[Action, ...]] = ("pause", "resume", "resize")
"""What an operator may ask for."""

_MOST_WORKERS = 10_000
_PATIENCE = 1.0
"""Seconds for which an answer waits for the wanted size."""
_ENDING = (PoolState.CLOSING, PoolState.CLOSED, PoolState.BROKEN)


@final
@attrs.frozen
class Answer:
    """The status and the facts that an operator gets back."""

    status: int
    facts: dict[str, Any]


def _error(status: int, text: str) -> Answer:
    return Answer(status, {"error": text})


async def control(pool: AnyPool, action: Action, body: bytes) -> Answer:
    """Do something to a pool, and say what has come of it."""
    if pool.state in _ENDING:
        return _error(409, f"pool {pool.name!r} is {pool.state.value}")
    try:
        if action == "resize":
            return await _resize(pool, read_size(body))
        if action == "pause":
            pool.pause()
        else:
            pool.resume()
    except ValueError as error:
        return _error(400, str(error))
    except (PoolClosed, PoolBroken, PoolError) as error:
        return _error(409, str(error))
    return Answer(200, {"pool": pool.name, "state": pool.state.value})


def read_size(body: bytes) -> int:
    """Read ``{"size": n}``.

    Raises:
      ValueError: it is something else; the message quotes the size.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict) or "size" not in asked:
        raise ValueError('the body must be JSON, such as {"size": 4}')
    size = asked["size"]
    if not isinstance(size, int) or isinstance(size, bool):
        raise ValueError(_refuse_size(size))
    if not 0 <= size <= _MOST_WORKERS:
        raise ValueError(_refuse_size(size))
    return size


def _refuse_size(size: object) -> str:
    # An int that is too long cannot even be quoted.
    quoted: object = size
    if isinstance(size, int) and size.bit_length() > 64:
        quoted = "a number of more than 19 digits"
    elif len(repr(size)) > 100:
        quoted = type(size).__name__
    return refuse("size", quoted, f"an int from 0 to {_MOST_WORKERS}")


async def _resize(pool: AnyPool, size: int) -> Answer:
    # A cancelled wait keeps the target, so the pool goes on towards it.
    with trio.move_on_after(_PATIENCE) as patience:
        await pool.resize(size)
    status = 202 if patience.cancelled_caught else 200
    up = pool.statistics().workers
    return Answer(status, {"pool": pool.name, "size": pool.size, "workers_up": up})
