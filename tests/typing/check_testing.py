"""What the test kit promises type checkers: read by mypy and pyright, never run."""

from typing import assert_type

from trio_pool import Pool, TaskPool
from trio_pool.testing import (
    Faults,
    InlinePool,
    InlineTaskPool,
    ScriptedWorker,
    assert_idle,
    settle,
    stress_pool,
)


async def length(text: str) -> int:
    return len(text)


async def application(pool: Pool[str, int]) -> list[int]:
    return await pool.map(["a", "bc"])


async def other_application(pool: TaskPool) -> int:
    return await pool.process(length, "a")


async def check_stand_ins() -> None:
    """An inline pool is taken where a pool is, with its types."""
    pool = InlinePool(length)
    assert_type(await application(pool), list[int])
    assert_type(await pool.process("a"), int)
    await application(InlinePool(ScriptedWorker([1, 2])))
    assert_type(await other_application(InlineTaskPool()), int)
    assert_idle(pool)
    await settle(pool)


async def check_wrapped() -> None:
    """What faults are put into keeps its type."""
    assert_type(await Faults().handler(length)("a"), int)


def check_stress() -> None:
    """The check is given what the handler is given and returns."""
    stress_pool(length, check=lambda text, result: result == len(text))
