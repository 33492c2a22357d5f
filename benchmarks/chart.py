"""Draw the chart of the README: ``python benchmarks/chart.py FIGURES.json CHART.svg``.

The figures are those of ``compare.py --json``. Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS = "trio_pool"
PANELS = (
    ("process, 64 callers, no-op", "process, 64 callers: us a job", "linear"),
    ("map, no-op", "map: us an item, log scale", "log"),
)

# Each of them can be read on white and on black.
TEXT = "#7d8590"
OTHERS = "#8b949e"
HIGHLIGHT = "#e07b00"

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trio_pool",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}


def bars(rows: Sequence[Mapping[str, Any]], act: str) -> tuple[list[str], list[float]]:
    """Return the cases of an act and their minima, the fastest first."""
    found = [(row["minimum"], row["case"]) for row in rows if row["act"] == act]
    if not found:
        raise ValueError(f"the chart needs the act {act!r}, which was not measured")
    found.sort()
    return [case for _, case in found], [minimum for minimum, _ in found]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the chart; the same figures give the same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    data = [(*bars(rows, act), label, scale) for act, label, scale in PANELS]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 2.7), layout="constrained")
        figure.patch.set_alpha(0)
        for axes, (names, values, label, scale) in zip(
            figure.subplots(1, 2), data, strict=True
        ):
            _panel(axes, names, values, label, scale)
        metadata = {"Date": None, "Creator": None}
        figure.savefig(path, format="svg", metadata=metadata)


def _panel(
    axes: Any, names: list[str], values: list[float], label: str, scale: str
) -> None:
    colors = [HIGHLIGHT if name == OURS else OTHERS for name in names]
    drawn = axes.barh(names, values, color=colors, height=0.66)
    axes.bar_label(drawn, [f"{value:.2g}" for value in values], padding=3)
    axes.set_xscale(scale)
    # Where a log axis begins is a choice, so that it is made here; and there is
    # room for the figure at the end of the longest bar.
    if scale == "log":
        axes.set_xlim(0.1, max(values) * 3)
    else:
        axes.set_xlim(0, max(values) * 1.15)
    axes.invert_yaxis()
    axes.set_title(label, fontsize=9, loc="left")
    axes.patch.set_alpha(0)
    axes.xaxis.set_visible(False)
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    for text in axes.get_yticklabels():
        if text.get_text() == OURS:
            text.set(color=HIGHLIGHT, fontweight="bold")


if __name__ == "__main__":
    figures, chart = map(Path, sys.argv[1:])
    draw(json.loads(figures.read_text())["rows"], chart)
