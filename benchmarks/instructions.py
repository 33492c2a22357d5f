"""Count the instructions that a job takes: what a noisy machine cannot change.

Run ``python benchmarks/instructions.py [TEXT]`` for the acts of `compare.py`
whose name has TEXT; needs ``perf`` of Linux. Each case runs in a process of its
own, with few jobs and with many: the difference is theirs.
"""

from __future__ import annotations

import os
import subprocess
import sys

from acts import comparisons
from table import table

JOBS = (6_400, 64_000)
EVENT = "instructions:u"
# Acts in which the number of jobs is a parameter.
SECTIONS = ("process", "map", "features")


def run_once(act: str, case: str, jobs: int) -> None:
    """Run one case, in the process that is counted."""
    found = next(one for one in comparisons(jobs) if one.name == act)
    found.cases[case]()


def count(act: str, case: str, jobs: int) -> float:
    """Return the instructions of a process that runs one case; the least of two."""
    command = ["perf", "stat", "-x,", "-e", EVENT]
    command += [sys.executable, __file__, "--run", act, case, str(jobs)]
    return min(_count(command) for _ in range(2))


def _count(command: list[str]) -> float:
    # The order of sets and of dicts with text differs from process to process.
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment
    )
    lines = [line.split(",") for line in done.stderr.splitlines()]
    found = [float(line[0]) for line in lines if line[2:3] == [EVENT]]
    if done.returncode or not found:
        raise SystemExit(f"perf stat has counted nothing: {done.stderr}")
    return found[0]


def per_job(act: str, case: str) -> float:
    """Return the instructions of one job."""
    few, many = (count(act, case, jobs) for jobs in JOBS)
    return (many - few) / (JOBS[1] - JOBS[0])


def main(text: str) -> None:
    """Count, and print a table."""
    lines = [("act", "case", "instructions", "ratio")]
    for comparison in comparisons(JOBS[0]):
        if comparison.section not in SECTIONS or text not in comparison.name:
            continue
        first: float | None = None
        for case in comparison.cases:
            instructions = per_job(comparison.name, case)
            first = first or instructions
            ratio = f"{instructions / first:.2f}x"
            lines.append((comparison.name, case, f"{instructions:,.0f}", ratio))
            print(*lines[-1], sep="  ", file=sys.stderr)
    print(table(lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run_once(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main(" ".join(sys.argv[1:]))
