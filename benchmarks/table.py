"""Rows as aligned Markdown tables, one for each section."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from measuring import Row

HEADINGS = ("act", "case", "unit", "minimum", "median", "ratio", "goal", "met")
NUMBERS = {"minimum", "median", "ratio"}


def markdown(rows: Iterable[Row]) -> str:
    """Return a table for each section, under a heading of its name."""
    parts = []
    for section, group in groupby(rows, key=lambda row: row.section):
        parts += [f"### {section}", table([HEADINGS, *map(cells, group)])]
    return "\n\n".join(parts)


def cells(row: Row) -> tuple[str, ...]:
    """Return what stands in the columns of a row."""
    met = {None: "", True: "yes", False: "NO"}[row.met]
    return (
        row.comparison,
        row.case,
        row.unit,
        number(row.minimum),
        number(row.median),
        ratio_text(row.ratio),
        str(row.goal or ""),
        met,
    )


def number(value: float) -> str:
    """Show a figure with about three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def ratio_text(ratio: float | None) -> str:
    """Show a ratio, as times faster where it is below one."""
    if ratio is None:
        return ""
    return f"{ratio:.2f}x" if ratio > 0.95 else f"{1 / ratio:.1f}x faster"


def table(lines: Sequence[Sequence[str]]) -> str:
    """Align lines of cells, the first of which has the headings."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [heading in NUMBERS for heading in lines[0]]

    def line(texts: Iterable[str]) -> str:
        padded = (
            text.rjust(width) if at_right else text.ljust(width)
            for text, width, at_right in zip(texts, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    ruler = (
        "-" * (width - 1) + (":" if at_right else "-")
        for width, at_right in zip(widths, right, strict=True)
    )
    return "\n".join([line(lines[0]), line(ruler), *map(line, lines[1:])])
