"""Says in lines what a picture shows, for a terminal or for a log."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

from ..web import _figures as figures
from ..web._picture import Light, Picture, PoolPicture, Spread, WorkerRow

Look: TypeAlias = Light | Literal["", "head", "faint"]
Line: TypeAlias = tuple[tuple[str, Look], ...]
"""Pieces of text, and how each looks."""

_LABEL = 10
_COLUMNS = ("worker", "state", "job", "for", "jobs", "restarts", "died of", "doing")
_RIGHT = {"worker", "for", "jobs", "restarts"}
_WIDEST = 30
"""Letters of any column but the last."""
_FAILURES = 5
"""Types of errors that are named."""


def picture_lines(picture: Picture, rows: float = math.inf) -> list[Line]:
    """Say all of a picture, with at most so many workers of each pool."""
    lag = figures.seconds(picture.lag)
    worst = figures.seconds(picture.lag_minute)
    text = f"{_clock(picture.time)}  loop lag {lag}, in the last minute {worst}"
    lines: list[Line] = [((text, "faint"),)]
    for pool in picture.pools:
        lines += [(), *_pool_lines(pool), *_worker_lines(pool.workers, rows)]
    return lines


def fit(picture: Picture, height: int) -> list[Line]:
    """Say as much of a picture as so many lines hold."""
    whole = picture_lines(picture)
    if len(whole) <= height:
        return whole
    # Each pool that has workers needs two lines to name what is in their rows,
    # and how many are not shown.
    bare = len(picture_lines(picture, rows=0)) + 2 * len(picture.pools)
    rows = max(0, height - bare) // max(1, len(picture.pools))
    return picture_lines(picture, rows)[:height]


def plain(lines: Iterable[Line]) -> str:
    """Write lines without their looks."""
    texts = ("".join(text for text, _ in line).rstrip() for line in lines)
    return "".join(f"{text}\n" for text in texts)


def _pool_lines(pool: PoolPicture) -> list[Line]:
    head: Line = (
        (f"{pool.light:<{_LABEL}}", pool.light),
        (f"{pool.name}: ", "head"),
        (pool.sentence, pool.light),
    )
    facts = {
        "busy": _busy(pool),
        "queue": _queue(pool),
        "rate": f"{figures.rate(pool.accepted_rate)} in, "
        f"{figures.rate(pool.ended_rate)} out",
        "wait": _spread(pool.wait),
        "run": _spread(pool.run),
        "jobs": _jobs(pool),
        "failures": _failures(pool),
    }
    return [head, *(_fact(label, text) for label, text in facts.items() if text)]


def _fact(label: str, text: str) -> Line:
    return ((f"{label:<{_LABEL}}", "faint"), (text, ""))


def _busy(pool: PoolPicture) -> str:
    up = "" if pool.workers_up == pool.size else f", {pool.workers_up} up"
    second, minute = (
        figures.share(min(max(share, 0.0), 1.0))
        for share in (pool.busy_share_second, pool.busy_share_minute)
    )
    return f"{pool.busy} of {pool.size}{up}: {second}, in the last minute {minute}"


def _queue(pool: PoolPicture) -> str:
    parts = [figures.count(pool.queued)]
    if pool.delayed:
        parts.append(f"{figures.count(pool.delayed)} for later")
    if math.isfinite(pool.max_backlog):
        parts.append(f"at most {figures.count(pool.max_backlog)}")
    if pool.queued:
        parts.append(f"the oldest for {figures.seconds(pool.oldest_wait)}")
    return ", ".join(parts)


def _spread(times: Spread) -> str:
    if not times.count:
        return f"{figures.NONE} in the last minute"
    told = (
        f"{name} {figures.seconds(getattr(times, name)):<8}"
        for name in ("p50", "p95", "p99", "max")
    )
    return f"{' '.join(told)} of {figures.count(times.count)} in the last minute"


def _jobs(pool: PoolPicture) -> str:
    parts = [f"{figures.count(pool.done)} done", f"{figures.count(pool.failed)} failed"]
    others = ("timed_out", "cancelled", "expired", "dropped", "lost")
    parts += [
        f"{figures.count(number)} {name.replace('_', ' ')}"
        for name in (*others, "retries", "restarts")
        if (number := getattr(pool, name))
    ]
    if pool.breaker is not None:
        parts.append(f"breaker {pool.breaker.replace('_', ' ')}")
    return ", ".join(parts)


def _failures(pool: PoolPicture) -> str:
    named = [
        f"{each.type} {figures.count(each.count)}" for each in pool.failures[:_FAILURES]
    ]
    more = ["..."] if len(pool.failures) > _FAILURES else []
    return ", ".join(named + more)


def _worker_lines(workers: Sequence[WorkerRow], rows: float) -> list[Line]:
    shown = _choose(workers, rows)
    table = [_COLUMNS, *(_cells(worker) for worker in shown)] if shown else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines: list[Line] = []
    for number, cells in enumerate(table):
        look: Look = "" if number else "faint"
        if number and shown[number - 1].state not in ("busy", "idle"):
            look = "amber"
        padded = (
            cell.rjust(width) if name in _RIGHT else cell.ljust(width)
            for name, cell, width in zip(_COLUMNS, cells, widths, strict=True)
        )
        lines.append((("  ".join(padded), look),))
    hidden = len(workers) - len(shown)
    if hidden:
        lines.append(((f"{figures.plural(hidden, 'worker')} not shown", "faint"),))
    return lines


def _choose(workers: Sequence[WorkerRow], rows: float) -> list[WorkerRow]:
    """Choose those in trouble and those with the oldest jobs, in their order."""

    def urgency(worker: WorkerRow) -> tuple[bool, float]:
        age = -1.0 if worker.age is None else worker.age
        return worker.state in ("busy", "idle"), -age

    if len(workers) > rows:
        workers = sorted(workers, key=urgency)[: int(rows)]
    return sorted(workers, key=lambda worker: worker.id)


def _cells(worker: WorkerRow) -> tuple[str, ...]:
    cells = (
        str(worker.id),
        worker.state,
        "" if worker.job is None else str(worker.job),
        "" if worker.age is None else figures.seconds(worker.age),
        figures.count(worker.jobs),
        figures.count(worker.restarts) if worker.restarts else "",
        worker.last_error or "",
    )
    return (*(cell[:_WIDEST] for cell in cells), worker.doing or "")


def _clock(time: float) -> str:
    try:
        return f"{figures.clock(time)} UTC"
    except (ValueError, OverflowError, OSError):
        return figures.NONE
