"""The acts of the table as single benchmarks: `pytest benchmarks/bench_acts.py`.

`compare.py` is what gives ratios; these are for following one act closely.
"""

from __future__ import annotations

from typing import Any

import compare
import pytest
import trio

JOBS = 3200

CASES = [
    pytest.param(act, handler, callers, opener, id=f"{name}-{label}")
    for name, act, handler, callers, contenders in compare.acts()
    for label, opener in contenders.items()
]


@pytest.mark.parametrize(("act", "handler", "callers", "opener"), CASES)
def test_act(benchmark: Any, act: Any, handler: Any, callers: int, opener: Any) -> None:
    """Make 3,200 jobs; a round includes opening and closing the pool."""
    benchmark.pedantic(
        lambda: trio.run(compare.time_once, opener, act, handler, JOBS, callers),
        rounds=5,
        warmup_rounds=1,
    )
