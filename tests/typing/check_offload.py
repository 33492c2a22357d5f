"""Read by mypy and pyright, not run: what the type checkers know of other engines."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import assert_type

from trio_pool import Pool, open_pool
from trio_pool.offload import in_process, in_thread, on_executor, wait_future


def count(text: str) -> int:
    return len(text)


def load() -> dict[str, int]:
    return {}


def look_up(model: dict[str, int], text: str) -> int:
    return model[text]


async def check_threads() -> None:
    async with open_pool(2, worker=in_thread(count)) as pool:
        assert_type(pool, Pool[str, int])
        assert_type(await pool.process("a"), int)
        assert_type(await pool.map(["a"], chunk=3), list[int])
        await pool.process(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def check_processes() -> None:
    async with open_pool(2, worker=in_process(count)) as pool:
        assert_type(pool, Pool[str, int])
    async with open_pool(2, worker=in_process(look_up, setup=load)) as stateful:
        assert_type(stateful, Pool[str, int])
    in_process(look_up)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]


async def check_executors() -> None:
    async with open_pool(2, worker=on_executor(ThreadPoolExecutor, count)) as pool:
        assert_type(pool, Pool[str, int])


async def check_bridge(future: Future[int]) -> None:
    assert_type(await wait_future(future, abandon_on_cancel=True), int)
