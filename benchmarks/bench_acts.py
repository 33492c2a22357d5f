"""The acts of the tables as single benchmarks: `pytest benchmarks/bench_acts.py`.

`compare.py` is what gives ratios; these are for following one act closely.
"""

from __future__ import annotations

from typing import Any

import acts
import pytest

JOBS = 3200

CASES = [
    pytest.param(case, id=f"{comparison.name}-{name}")
    for comparison in acts.comparisons(JOBS)
    if comparison.section in {"process", "map", "features"}
    for name, case in comparison.cases.items()
]


@pytest.mark.parametrize("case", CASES)
def test_act(benchmark: Any, case: Any) -> None:
    """Make 3,200 jobs; a round includes opening and closing the pool."""
    benchmark.pedantic(case, rounds=5, warmup_rounds=1)
