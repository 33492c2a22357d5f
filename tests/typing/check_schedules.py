"""Read by mypy and pyright, not run: what the type checkers know of schedules."""

from __future__ import annotations

from typing import assert_type

import trio

from trio_pool.testing import (
    Moment,
    call_everywhere,
    cancel_at,
    cancel_everywhere,
    explore_orders,
    run_in_order,
)


async def length(text: str, times: int) -> float:
    return float(len(text) * times)


async def whole() -> None: ...


async def scoped(first: trio.CancelScope, second: trio.CancelScope) -> None: ...


async def met(moment: Moment) -> None:
    assert_type(moment.happened, bool)
    with moment.calls(print, "now"):
        await trio.sleep(1)


assert_type(run_in_order(length, "ab", 2, order=3), float)
run_in_order(length, 2, "ab", order=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
assert_type(explore_orders(length, "ab", 2, orders=9), int)
assert_type(cancel_everywhere(whole), int)
assert_type(cancel_everywhere(scoped, limit=100, drawn=True), int)
assert_type(call_everywhere(met, order=1), int)
cancel_at(scoped, (0, 3), (1, 4), order=2)
cancel_at(whole, 3)
