"""Items through a pool: what it makes of each is the answer to its line."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeAlias

from outcome import Error, Value

from .. import (
    JobCancelled,
    Pool,
    PoolBroken,
    PoolClosed,
    PoolConfig,
    Reply,
    WorkerCrashed,
    open_pool,
)
from .._checks import is_async
from .._nursery import open_bare_nursery
from ..offload import in_thread
from ._answers import Answers
from ._formats import BadResult, Item, describe, failure_line, result_line
from ._items import Items
from ._threads import Threads

ItemPool: TypeAlias = Pool[Item, Any]


def open_item_pool(
    function: Callable[[Any], Any], config: PoolConfig, threads: Threads
) -> AbstractAsyncContextManager[ItemPool]:
    """Open a pool that calls a function with items: on the loop, or in threads.

    A thread cannot be stopped. One that runs when its job is cancelled, or out of
    time, is left behind: nobody waits for what it may never do.
    """
    if is_async(function):
        return open_pool(config, _awaiting(function))
    worker = in_thread(threads.watch(_calling(function)), abandon_on_cancel=True)
    return open_pool(config, worker=worker)


def _awaiting(function: Callable[[Any], Any]) -> Callable[[Item], Awaitable[Any]]:
    async def run(item: Item) -> Any:
        return await function(item.attempt())

    return run


def _calling(function: Callable[[Any], Any]) -> Callable[[Item], Any]:
    def run(item: Item) -> Any:
        return function(item.attempt())

    return run


async def answer_all(pool: ItemPool, items: Items, answers: Answers) -> None:
    """Answer all items; as few wait as keep the workers busy.

    Raises:
      PoolBroken: the pool broke; some items have no answer.
    """
    async with pool.stream(
        items, ordered=False, outcomes=True, ahead=answers.window
    ) as stream:
        async for settled in stream:
            _answer(pool, answers, settled.item, settled.outcome)


async def answer_by_key(pool: ItemPool, items: Items, answers: Answers) -> None:
    """Answer all items, those of a key one at a time and in their order.

    As many wait as the backlog of the pool has room for.

    Raises:
      PoolBroken: the pool broke; some items have no answer.
    """
    async with open_bare_nursery() as nursery:
        async for item in items:
            reply = await pool.submit(item, key=item.key)
            nursery.start_soon(_hear, pool, answers, item, reply)


async def _hear(
    pool: ItemPool, answers: Answers, item: Item, reply: Reply[Any]
) -> None:
    result: Value[Any] | Error
    try:
        result = Value(await reply.wait())
    except Exception as error:
        result = Error(error)
    _answer(pool, answers, item, result)


def _answer(
    pool: ItemPool, answers: Answers, item: Item, result: Value[Any] | Error
) -> None:
    if isinstance(result, Value):
        try:
            answers.give(item.index, result_line(item, result.value))
            return
        except BadResult as bad:
            error: BaseException = bad
    else:
        error = result.error
        if _is_end_of_run(pool, error):
            return
    record = failure_line(item.index, item.shown, describe(error), item.attempts)
    answers.give(item.index, record, failed=True)


def _is_end_of_run(pool: ItemPool, error: BaseException) -> bool:
    """Say whether an error is no answer: with a journal that comes another time."""
    if isinstance(error, WorkerCrashed):
        return isinstance(error.__cause__, KeyboardInterrupt)
    stopped = isinstance(error, (JobCancelled, PoolBroken, PoolClosed))
    return stopped and pool.closed
