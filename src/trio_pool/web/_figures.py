"""Says figures the way they are read: short, with their unit, and never as NaN."""

import math
from datetime import UTC, datetime

NONE = "\u2013"
"""What stands where there is no figure."""


def seconds(value: float | None) -> str:
    """Say how long something took or takes; in seconds."""
    if value is None or math.isnan(value):
        return NONE
    if math.isinf(value):
        return "no end"
    if value < 60:
        return _short(value)
    minutes, rest = divmod(int(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"


def _short(value: float) -> str:
    if value < 0.5e-6:
        return "0 s"
    if value < 0.9995e-3:
        return f"{value * 1e6:.0f} \u00b5s"
    if value < 0.9995:
        return f"{_digits(value * 1e3)} ms"
    return f"{_digits(value)} s"


def _digits(value: float) -> str:
    return f"{value:.1f}" if 0 < value < 9.95 else f"{value:.0f}"


def count(value: float) -> str:
    """Say how many there are."""
    if math.isinf(value):
        return "no bound"
    if value < 10_000_000:
        return f"{value:,.0f}"
    sizes = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
    size, letter = next(pair for pair in sizes if value >= pair[0])
    return f"{value / size:,.2f} {letter}"


def mean(value: float) -> str:
    """Say how many there are, or were on average."""
    return f"{value:.1f}" if value % 1 and value < 99.5 else count(value)


def rate(value: float) -> str:
    """Say how many there are in a second."""
    if 0 < value < 0.05:
        return f"{value:.2g}/s"
    return f"{count(value) if value >= 99.5 else _digits(value)}/s"


def share(value: float) -> str:
    """Say a share of 0 to 1 in percent; only nothing is 0 %, only all is 100 %."""
    percent = round(100 * value)
    if percent == 0 and value > 0:
        percent = 1
    if percent == 100 and value < 1:
        percent = 99
    return f"{percent} %"


def clock(time: float) -> str:
    """Say the time of the day in UTC; ``time`` is in seconds of `time.time`."""
    return _moment(time).strftime("%H:%M:%S")


def stamp(time: float) -> str:
    """Say date and time for programs; ``time`` is in seconds of `time.time`."""
    return _moment(time).strftime("%Y-%m-%dT%H:%M:%SZ")


def _moment(time: float) -> datetime:
    return datetime.fromtimestamp(time, UTC)


def plural(number: int, noun: str) -> str:
    """Say a number of things, such as "1 job" and "2 jobs"."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"
