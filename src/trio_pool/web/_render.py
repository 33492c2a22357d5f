"""Renders a picture as the whole page, and as the fragments that keep it current.

The page holds an element for each fragment, with the fragment in it already, so
that there is one way of rendering: what follows only replaces what is inside of
elements. What is to keep its focus or its place stands outside of them.
"""

from collections.abc import Callable

from . import _figures as figures
from . import _panels as panels
from . import _tables as tables
from ._charts import Line, draw_chart
from ._frame import frame
from ._html import Html, join
from ._picture import Picture, PoolPicture, Series


def render_page(picture: Picture, controls: bool) -> str:
    """Render the whole document; ``controls`` says whether it can do more than look."""
    names = [pool.name for pool in picture.pools]
    return frame(_fragments(picture), names, controls)


def render_fragments(picture: Picture) -> dict[str, str]:
    """Render what changes: by the id of an element, what is inside of it."""
    return {key: str(html) for key, html in _fragments(picture).items()}


def _fragments(picture: Picture) -> dict[str, Html]:
    fragments = _of_process(picture)
    for at, pool in enumerate(picture.pools):
        parts = {**_figures_of(pool), **_charts_of(pool), **_rows_of(pool)}
        fragments |= {f"p{at}-{part}": html for part, html in parts.items()}
    return fragments


def _of_process(picture: Picture) -> dict[str, Html]:
    pool = panels.worst(picture.pools)
    return {
        "page-title": panels.page_title(pool),
        "page-icon": join(panels.icon(pool.light if pool else "off")),
        "announce": panels.announcement(picture),
        "clock": join(figures.clock(picture.time)),
        "lag": panels.lag_note(picture),
        "lag-chart": _lag_chart(picture),
    }


def _lag_chart(picture: Picture) -> Html:
    # One loop runs all pools, so that each has the same history of it.
    shown = next((pool for pool in picture.pools if pool.history is not None), None)
    series = shown.history if shown else None
    return draw_chart(
        "Loop lag",
        [Line("lag", series.lag, "second", peaks=True, area=True)] if series else [],
        series,
        say=figures.seconds,
        least=0.01,
        marks=(mark for mark in shown.marks if mark.kind == "mark") if shown else (),
    )


def _figures_of(pool: PoolPicture) -> dict[str, Html]:
    return {
        "overview": panels.overview(pool),
        "verdict": panels.verdict(pool),
        "busy": panels.busy_tile(pool),
        "queue": panels.queue_tile(pool),
        "times": panels.times_tile(pool),
        "flow": panels.flow_tile(pool),
        "ends": panels.ends_tile(pool),
    }


def _charts_of(pool: PoolPicture) -> dict[str, Html]:
    lines = _lines_of(pool.history) if pool.history else {}
    return {
        key: draw_chart(
            title,
            lines.get(key, []),
            pool.history,
            say=say,
            least=least,
            marks=pool.marks,
        )
        for key, (title, say, least) in _CHARTS.items()
    }


def _lines_of(series: Series) -> dict[str, list[Line]]:
    return {
        "busy-chart": [
            Line("busy", series.busy, "first", area=True),
            Line("wanted", series.size, "third"),
        ],
        "queue-chart": [Line("queued", series.queued, "first", peaks=True, area=True)],
        "times-chart": [
            Line("wait", series.wait_p95, "second", peaks=True),
            Line("run", series.run_p95, "first", peaks=True),
        ],
        "flow-chart": [
            Line("in", series.accepted, "third"),
            Line("out", series.ended, "first"),
            Line("failed", series.failed, "second"),
        ],
    }


# Titles, what puts values into words, and what the axis goes up to at least.
_CHARTS: dict[str, tuple[str, Callable[[float], str], float]] = {
    "busy-chart": ("Busy workers", figures.mean, 1.0),
    "queue-chart": ("Queued jobs", figures.mean, 1.0),
    "times-chart": ("Wait and run, p95", figures.seconds, 0.001),
    "flow-chart": ("Jobs in and out", figures.rate, 1.0),
}


def _rows_of(pool: PoolPicture) -> dict[str, Html]:
    return {
        "failures": tables.failure_rows(pool.failures, pool.events_lost),
        "crashes": tables.crash_rows(pool.crashes),
        "summary": join(tables.worker_summary(pool.workers)),
        "workers": tables.worker_rows(pool),
        "slowest": tables.slowest_rows(pool),
        "errors": tables.error_rows(pool.errors),
        "marks": tables.mark_rows(pool.marks),
    }
