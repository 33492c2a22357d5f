"""Draws the course of a pool's figures as inline SVG, from 3 to 15 minutes of it."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Literal, final

import attrs

from . import _figures as figures
from ._html import Html, element, join
from ._picture import Mark, Series

POINTS = 180
"""How many values of a line are drawn at most."""

_GROWTH = 180.0
"""Seconds by which the time that is shown grows with the history."""

# Pixels: figures stand above the plot, times below it.
_TOP, _PLOT, _HEIGHT = 18, 104, 140


@final
@attrs.frozen
class Line:
    """One line of a chart."""

    label: str
    values: Sequence[float]
    look: Literal["first", "second", "third"]
    """The class of its colour."""
    peaks: bool = False
    """Whether the greatest of several values stands for them, not their mean."""
    area: bool = False
    """Whether what is below it is filled."""


@final
@attrs.frozen
class Window:
    """What part of the history is drawn, and how many values make a point.

    Only what is over is drawn, and a point is of the same seconds for as long
    as it is shown: a line keeps its shape as it moves on, and a chart of 15
    minutes stays the same for 5 seconds, and need not be sent.
    """

    minutes: float
    """How much it is."""
    points: int
    """How many points there is room for."""
    length: float
    """Seconds from the first of these points to the newest."""
    factor: int
    """Values to a point."""
    skip: int
    """Values at the end that do not make a whole point yet."""
    end: float
    """The time of the newest point, in seconds of `time.time`."""

    def thin(self, line: Line) -> list[float]:
        """Make values to the points that are drawn, the newest last."""
        end = len(line.values) - self.skip
        starts = range(max(end, 0) % self.factor, end, self.factor)[-self.points :]
        groups = [line.values[start : start + self.factor] for start in starts]
        if line.peaks:
            return [max(group) for group in groups]
        return [sum(group) / len(group) for group in groups]


def choose_window(series: Series, number: int) -> Window:
    """Decide what is drawn of so many values: all, in a multiple of 3 minutes."""
    step = series.step
    length = _GROWTH * max(1, math.ceil(number * step / _GROWTH))
    factor = max(1, math.ceil(length / step / POINTS))
    newest = math.floor(series.until / step)
    # Values for more than a second may be of a time that is not over yet.
    partial = int(step > 1 and factor == 1 and number > 2)
    skip = partial or (newest + 1) % factor
    # Of a history that is full, the oldest values may not make a whole point.
    points = math.ceil(length / step / factor) - (factor > 1)
    return Window(
        minutes=length / 60,
        points=points,
        length=(points - 1) * factor * step,
        factor=factor,
        skip=skip,
        end=(newest - skip) * step,
    )


def draw_chart(
    title: str,
    lines: Sequence[Line],
    series: Series | None,
    *,
    say: Callable[[float], str],
    least: float,
    marks: Iterable[Mark] = (),
) -> Html:
    """Draw a chart with its caption: what stands inside of a ``figure``.

    ``say`` puts a value into words, and ``least`` is what the axis goes up to
    at least.
    """
    number = max((len(line.values) for line in lines), default=0)
    if series is None or number < 2:
        empty = element("p", "Measured from now on.", class_="note")
        return join(element("figcaption", element("h3", title)), empty)
    window = choose_window(series, number)
    drawn = [(line, points) for line in lines if (points := window.thin(line))]
    top = round_up(max(least, *(max(points) for _, points in drawn)))
    return join(
        _caption(title, drawn, say),
        element(
            "svg",
            *_axes(top, window, say),
            _plot(drawn, window.points - 1, top),
            *(_mark(mark, window) for mark in marks),
            class_="chart",
            role="img",
            width="100%",
            height=_HEIGHT,
            aria_label=_in_words(title, drawn, window, say),
        ),
    )


def round_up(value: float) -> float:
    """Return the next figure that is easily halved by the eye, such as 15 or 400."""
    if not 1e-9 < value < 1e300:
        return max(value, 1e-9)
    power = 10.0 ** math.floor(math.log10(value))
    return next(
        step * power
        for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 15)
        if step * power >= value
    )


def _caption(
    title: str, drawn: list[tuple[Line, list[float]]], say: Callable[[float], str]
) -> Html:
    keys = (
        element(
            "span",
            element("i", class_=f"key {line.look}"),
            f"{line.label} ",
            element("b", say(points[-1])),
            f" (most {say(max(points))})",
        )
        for line, points in drawn
    )
    return element(
        "figcaption", element("h3", title), element("p", *keys, class_="keys")
    )


def _in_words(
    title: str,
    drawn: list[tuple[Line, list[float]]],
    window: Window,
    say: Callable[[float], str],
) -> str:
    told = "; ".join(
        f"{line.label} now {say(points[-1])}, most {say(max(points))}, "
        f"least {say(min(points))}"
        for line, points in drawn
    )
    return f"{title}, the last {window.minutes:g} minutes: {told}"


def _axes(top: float, window: Window, say: Callable[[float], str]) -> Iterable[Html]:
    for part in (0.0, 0.5, 1.0):
        y = _TOP + _PLOT * (1 - part)
        yield element("line", class_="grid", x1=0, x2="100%", y1=y, y2=y)
        if part:
            yield element("text", say(top * part), class_="scale", x=2, y=y - 4)
    for part, anchor in ((0, "start"), (1, "middle"), (2, "middle"), (3, "end")):
        minutes = window.minutes * (3 - part) / 3
        told = f"\u2212{minutes:g} min" if part < 3 else "now"
        x = f"{100 * part / 3:.2f}%"
        yield element(
            "text", told, class_="scale", x=x, y=_HEIGHT - 4, text_anchor=anchor
        )


def _plot(drawn: list[tuple[Line, list[float]]], last: int, top: float) -> Html:
    # Stretched to whatever room there is; its strokes are not, by the style.
    shapes = (_shapes(line, points, last, top) for line, points in drawn)
    return element(
        "svg",
        *chain.from_iterable(shapes),
        x=0,
        y=_TOP,
        width="100%",
        height=_PLOT,
        viewBox=f"0 0 {last} 100",
        preserveAspectRatio="none",
        overflow="visible",
    )


def _shapes(line: Line, points: list[float], last: int, top: float) -> Iterable[Html]:
    first = last + 1 - len(points)
    spots = " ".join(
        f"{first + at},{100 * (1 - value / top):.4g}" for at, value in enumerate(points)
    )
    if line.area:
        closed = f"{first},100 {spots} {last},100"
        yield element("polygon", class_=f"area {line.look}", points=closed)
    yield element("polyline", class_=f"line {line.look}", points=spots)


_SIGNS = {
    "resize": "M-5 6L0-3L5 6Z",
    "mark": "M0-4L5 1L0 6L-5 1Z",
    "breaker": "M-4-3H4V5H-4Z",
    "state": "M-4-3H-1V5H-4ZM1-3H4V5H1Z",
    "restart": "M-5-3L0 6L5-3Z",
}


def sign(kind: str) -> Html:
    """Draw what stands for a kind of mark, around the point 0, 0."""
    return element("path", d=_SIGNS.get(kind, _SIGNS["mark"]))


def _mark(mark: Mark, window: Window) -> Html:
    part = 1 - max(window.end - mark.time, 0.0) / window.length
    if part < 0:
        return Html()
    x = f"{100 * part:.1f}%"
    bottom = _TOP + _PLOT
    return element(
        "g",
        element("title", f"{figures.clock(mark.time)} {mark.text}"),
        element("line", x1=x, x2=x, y1=_TOP, y2=bottom),
        element("svg", sign(mark.kind), x=x, y=_TOP - 8, overflow="visible"),
        class_=f"mark on-{mark.kind}",
    )
