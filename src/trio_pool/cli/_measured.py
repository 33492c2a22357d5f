"""What was measured, written as a table or as JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any, final

import attrs

WORKERS = 8


@final
@attrs.frozen
class Measured:
    """One act, by bare trio and by a pool: microseconds a job, round by round."""

    act: str
    floor: tuple[float, ...]
    pool: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """How many times bare trio the pool costs, of the minima."""
        return min(self.pool) / min(self.floor)


def _machine() -> dict[str, Any]:
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "trio": _version_of("trio"),
        "trio_pool": _version_of("trio-pool"),
        "cores": _cores(),
    }


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        # It runs from a checkout.
        return "unknown"


def _cores() -> int:
    # Those that this process may use, where that can be asked.
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def to_table(found: list[Measured], rounds: int, jobs: int) -> str:
    """Write what was found for people."""
    facts = _machine()
    versions = ", ".join(f"{name} {facts[name]}" for name in ("trio", "trio_pool"))
    what = f"microseconds a job that does nothing, {WORKERS} workers"
    how = f"minimum (median) of {rounds} rounds of {jobs:,}"
    lines = [
        f"{facts['python']}, {versions}, cores: {facts['cores']}",
        f"{what}, {how}",
        "",
        _row("", "bare trio", "trio_pool", "ratio"),
    ]
    lines += [
        _row(each.act, _figures(each.floor), _figures(each.pool), f"{each.ratio:.2f}")
        for each in found
    ]
    return "\n".join(lines) + "\n"


def _row(act: str, floor: str, pool: str, ratio: str) -> str:
    return f"{act:<20}{floor:>18}{pool:>18}{ratio:>8}"


def _figures(values: tuple[float, ...]) -> str:
    return f"{min(values):.3g} ({median(values):.3g})"


def to_json(found: list[Measured], rounds: int, jobs: int) -> str:
    """Write what was found for programs; all times are in microseconds a job."""
    acts = [{**attrs.asdict(each), "ratio": each.ratio} for each in found]
    facts = _machine() | {"workers": WORKERS, "rounds": rounds, "jobs": jobs}
    return json.dumps({**facts, "acts": acts}, indent=2) + "\n"
