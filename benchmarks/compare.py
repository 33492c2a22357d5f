"""Measure trio_pool beside its floors and its peers, in one process.

Run ``python benchmarks/compare.py``. All cases of an act take turns for several
rounds. Ratios are of the minima, and hold when the machine's speed drifts: ours
to theirs, or, of a feature or a size, changed to plain. See README.md beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio
from acts import comparisons
from contenders import missing
from measuring import Row, measure
from table import markdown, number, ratio_text


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=6400, help="jobs a round")
    parser.add_argument("--rounds", type=int, default=7, help="rounds")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="acts whose section or name has this"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument(
        "--chart", type=Path, metavar="FILE", help="draw an SVG; needs matplotlib"
    )
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for comparison in comparisons(options.jobs):
        if options.only in f"{comparison.section}: {comparison.name}":
            # Progress goes where it does not end up in the table.
            print(comparison.name, file=sys.stderr)
            rows += measure(comparison, options.rounds)
    if not rows:
        parser.error(f"no section or act has {options.only!r} in its name")
    print(heading(options.jobs, options.rounds))
    print(markdown(rows))
    print(f"\n{verdict(rows)}")
    measured = figures(rows)
    if options.json is not None:
        options.json.write_text(json.dumps(measured, indent=1) + "\n")
    if options.chart is not None:
        from chart import draw

        draw(measured["rows"], options.chart)


def heading(jobs: int, rounds: int) -> str:
    """Say what was measured with what."""
    versions = f"{platform.python_implementation()} {platform.python_version()}"
    text = (
        f"{versions}, trio {trio.__version__}; {jobs} jobs a round, "
        f"{rounds} rounds at most, 8 workers.\n"
    )
    if absent := missing():
        text += f"\nNot installed, so not measured: {', '.join(absent)}.\n"
    return text


def verdict(rows: Sequence[Row]) -> str:
    """Say how many goals are met, and which are not."""
    aims = [row for row in rows if row.goal is not None]
    lines = [f"{sum(bool(row.met) for row in aims)} of {len(aims)} goals are met."]
    lines += [
        f"- not met: {row.comparison}, {row.case}: "
        f"{ratio_text(row.ratio) or number(row.minimum)}, goal {row.goal}"
        for row in aims
        if not row.met
    ]
    return "\n".join(lines)


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Return everything that was measured, for `json`."""
    return {
        "python": platform.python_version(),
        "trio": trio.__version__,
        "rows": [
            {
                "section": row.section,
                "act": row.comparison,
                "case": row.case,
                "unit": row.unit,
                "minimum": row.minimum,
                "median": row.median,
                "values": row.values,
                "ratio": row.ratio,
                "goal": str(row.goal) if row.goal else None,
                "met": row.met,
            }
            for row in rows
        ],
    }


if __name__ == "__main__":
    main()
