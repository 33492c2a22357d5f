"""Judges how a pool is doing: a traffic light and one sentence."""

import math
from collections.abc import Sequence
from typing import final

import attrs

from .._config import Overflow
from .._events import PoolState, PoolStatistics, WorkerSnapshot, WorkerState
from ._figures import count, plural, seconds
from ._picture import Light

_LONG = 0.2
"""Seconds of waiting from which on a pool counts as saturated."""
_MANY = 5
"""Failures in the last minute below which nothing is said of them."""


@final
@attrs.frozen(kw_only=True)
class Facts:
    """What a pool is judged by."""

    state: PoolState
    statistics: PoolStatistics
    workers: Sequence[WorkerSnapshot]
    max_backlog: float = math.inf
    overflow: Overflow = "wait"
    breaker: str | None = None
    scales: bool = False
    """Whether workers come by themselves when there is work."""
    ended: int = 0
    """Jobs that ended in the last minute."""
    failed: int = 0
    """Those of them that failed, timed out or were lost."""
    cause: str = ""
    """The type of error by which a worker crashed last."""


@final
@attrs.frozen
class Verdict:
    """How a pool is doing."""

    light: Light
    sentence: str
    ready: bool
    """Whether the pool can do its work: it is open, and has workers or gets them.

    So it is while it refuses jobs: what is wrong then is further on, or will pass,
    and to take every copy of the program out of service would help nobody.
    """
    refuses: bool = False
    """Whether a job given in now would be refused."""


def judge(facts: Facts) -> Verdict:
    """Judge a pool by what matters most."""
    return _judge_state(facts) or _judge_workers(facts) or _judge_work(facts)


def _judge_state(facts: Facts) -> Verdict | None:
    count = facts.statistics
    waiting = count.queued + count.delayed
    match facts.state:
        case PoolState.BROKEN:
            cause = f", the last time by {facts.cause}" if facts.cause else ""
            text = f"broken: a worker crashed too often{cause}"
            return Verdict("red", text, ready=False)
        case PoolState.CLOSED:
            failed = count.failed + count.timed_out + count.lost
            text = f"closed: {plural(count.done, 'job')} done, {failed} failed"
            return Verdict("off", text, ready=False)
        case PoolState.CLOSING:
            text = f"draining: {_run(count.running)}, {_wait(waiting)}"
            return Verdict("amber", text, ready=False)
        case PoolState.PAUSED:
            running = f", {_run(count.running)} on" if count.running else ""
            return Verdict("amber", f"paused: {_wait(waiting)}{running}", ready=False)
        case _:
            return None


def _judge_workers(facts: Facts) -> Verdict | None:
    count = facts.statistics
    wanted, up = count.size, count.workers
    waiting = count.queued + count.delayed
    if not wanted:
        light: Light = "amber" if waiting else "green"
        text = f"no workers wanted: {_wait(waiting)}"
        return Verdict(light, text, ready=facts.scales)
    if up >= wanted:
        return None
    restarting = [
        worker.id
        for worker in facts.workers
        if worker.state is WorkerState.RESTARTING
        or (worker.state is WorkerState.STARTING and worker.last_error is not None)
    ]
    if up == 0:
        word = "down" if restarting else "starting"
        light = "red" if restarting else "amber"
        text = f"{word}: none of {plural(wanted, 'worker')} is up"
        # A pool without work may have had none, and is getting what it needs.
        ready = facts.scales and not restarting
        return Verdict(light, text + _restarts(restarting), ready)
    if restarting:
        text = f"degraded: {up} of {wanted} workers up{_restarts(restarting)}"
        return Verdict("amber", text, ready=True)
    return Verdict("green", f"growing: {up} of {wanted} workers up", ready=True)


def _restarts(workers: list[int]) -> str:
    if not workers:
        return ""
    if len(workers) == 1:
        return f", worker {workers[0]} is restarting"
    named = ", ".join(map(str, workers[:3])) + (", ..." if len(workers) > 3 else "")
    return f", workers {named} are restarting"


def _judge_work(facts: Facts) -> Verdict:
    counts = facts.statistics
    busy, size, waiting = counts.busy, counts.size, counts.queued + counts.delayed
    oldest = counts.oldest_wait
    if facts.breaker == "open":
        text = "refusing: the circuit breaker is open"
        return Verdict("red", text, ready=True, refuses=True)
    if facts.failed >= _MANY and 2 * facts.failed >= facts.ended:
        text = (
            f"failing: {count(facts.failed)} of {plural(facts.ended, 'job')} failed "
            "in the last minute"
        )
        return Verdict("red", text, ready=True)
    if 0 < facts.max_backlog <= waiting:
        refuses = facts.overflow == "reject"
        text = (
            f"{'refusing' if refuses else 'saturated'}: {busy} of {size} busy, "
            f"the backlog is full, oldest wait {seconds(oldest)}"
        )
        return Verdict("red", text, ready=True, refuses=refuses)
    if busy >= size and counts.queued and oldest >= _LONG:
        text = f"saturated: {busy} of {size} busy, oldest wait {seconds(oldest)}"
        return Verdict("amber", text, ready=True)
    if facts.breaker == "half_open":
        text = "recovering: the circuit breaker tries a few jobs"
        return Verdict("amber", text, ready=True)
    if counts.queued and busy < size and oldest >= _LONG:
        # Keys, a rate or a limiter hold them back.
        text = f"held back: {_wait(waiting)} though {busy} of {size} are busy"
        return Verdict("amber", text, ready=True)
    if busy or counts.queued:
        text = f"working: {busy} of {size} busy, {_wait(waiting)}"
        return Verdict("green", text, ready=True)
    later = f", {plural(counts.delayed, 'job')} for later" if counts.delayed else ""
    return Verdict("green", f"idle: {plural(size, 'worker')} free{later}", ready=True)


def _run(number: int) -> str:
    return f"{plural(number, 'job')} run{'s' if number == 1 else ''}"


def _wait(number: int) -> str:
    if not number:
        return "nothing waits"
    return f"{plural(number, 'job')} wait{'s' if number == 1 else ''}"
