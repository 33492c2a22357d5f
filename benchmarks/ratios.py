"""Print the ratios to the floor of one version of trio_pool, for `guard.py`.

Run in a process of its own, with that version first on PYTHONPATH. The version
may be older than this file: an act that it cannot run is named, not measured.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import features
import ours
import twins
from driving import Contender, Opener
from measuring import Case

import trio_pool

# Short rounds: what is compared is a ratio, and many processes give one each.
JOBS = 3200


def acts(jobs: int) -> dict[str, tuple[Case, Case]]:
    """Return ours and the floor of each act."""
    found: dict[str, tuple[Case, Case]] = {}
    for callers in (1, 64):
        for handler in ("no-op", "one checkpoint"):
            name = f"process, {callers} caller{'s' * (callers > 1)}, {handler}"
            found[name] = _process(ours.our_process, handler, jobs, callers)
    for handler in ("no-op", "one checkpoint"):
        found[f"map, {handler}"] = _many(ours.our_map, handler, jobs)
    found["settle"] = _many(ours.our_settle, "no-op", jobs)
    found["stream, in order"] = _many(ours.our_stream, "no-op", jobs)
    found["submit_nowait, then read"] = _many(ours.our_replies, "no-op", jobs)
    options = features.POOL_OPTIONS | features.JOB_OPTIONS
    for feature in ("timeout", "retry", "two job hooks", "priority", "key"):
        name = f"process, 64 callers, {feature}"
        found[name] = _process(options[feature], "no-op", jobs, 64)
    return found


def _process(
    opener: Opener, handler: str, jobs: int, callers: int
) -> tuple[Case, Case]:
    one, floor = Contender(opener), Contender(twins.floor_process)
    args = handler, jobs, callers
    return partial(one.time_process, *args), partial(floor.time_process, *args)


def _many(opener: Opener, handler: str, jobs: int) -> tuple[Case, Case]:
    one, floor = Contender(opener), Contender(twins.floor_map)
    return partial(one.time_map, handler, jobs), partial(floor.time_map, handler, jobs)


def ratio(our: Case, floor: Case, rounds: int) -> float:
    """Return the ratio of the minima of some rounds, taken in turns."""
    times: tuple[list[float], list[float]] = [], []
    for _ in range(rounds):
        for found, case in zip(times, (our, floor), strict=True):
            gc.collect()
            found.append(case())
    return min(times[0]) / min(times[1])


def reason(error: BaseException) -> str:
    """Say what went wrong, for all callers by the first of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"


def measure_ratios(jobs: int, rounds: int, only: Collection[str]) -> dict[str, Any]:
    """Measure the acts named, or all; say why some could not be run."""
    ratios: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, (our, floor) in acts(jobs).items():
        if only and name not in only:
            continue
        try:
            ratios[name] = ratio(our, floor, rounds)
        except Exception as error:
            failed[name] = reason(error)
    source = str(Path(trio_pool.__file__).parents[1])
    return {"source": source, "ratios": ratios, "failed": failed}


def main() -> None:
    """Print the ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="acts; all of them if none is given")
    parser.add_argument("--jobs", type=int, default=JOBS)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps(measure_ratios(options.jobs, options.rounds, options.only)))


if __name__ == "__main__":
    main()
