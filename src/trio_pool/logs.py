"""A plugin that tells the standard logging what happens in a pool."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any, Literal, TypeAlias, final

from trio.lowlevel import Task, current_task

from ._checks import refuse
from ._errors import PoolBroken, type_name
from ._events import (
    Event,
    EventKind,
    Hooks,
    JobChanged,
    PoolChanged,
    PoolResized,
    WorkerChanged,
)

LogKind: TypeAlias = EventKind | Literal["pool_broken"]
"""What can be logged: whatever there is a hook for, and that a pool is broken."""

LEVELS: Mapping[LogKind, int] = MappingProxyType(
    {
        "pool_start": logging.INFO,
        "pool_stop": logging.INFO,
        "pool_broken": logging.ERROR,
        "resize": logging.INFO,
        "worker_start": logging.DEBUG,
        "worker_stop": logging.DEBUG,
        "worker_crash": logging.WARNING,
        "worker_restart": logging.WARNING,
        "job_error": logging.DEBUG,
        "job_retry": logging.DEBUG,
        "job_cancel": logging.DEBUG,
        "job_drop": logging.DEBUG,
    }
)
"""At which level each kind is logged; the others are not."""

_TEXTS: Mapping[LogKind, str] = {
    "pool_start": "pool %(pool)r started",
    "pool_stop": "pool %(pool)r stopped",
    "pool_broken": "pool %(pool)r is broken: %(reason)s",
    "resize": "pool %(pool)r is resized from %(old_size)s to %(new_size)s workers",
    "worker_start": "worker %(worker)s of pool %(pool)r started",
    "worker_stop": "worker %(worker)s of pool %(pool)r stopped",
    "worker_crash": "worker %(worker)s of pool %(pool)r crashed: %(error_type)s",
    "worker_restart": "worker %(worker)s of pool %(pool)r is being set up again",
    "job_queue": "job %(job_id)s of pool %(pool)r was accepted",
    "job_start": "job %(job_id)s of pool %(pool)r starts on worker %(worker)s",
    "job_complete": "job %(job_id)s of pool %(pool)r is done",
    "job_error": "job %(job_id)s of pool %(pool)r ended as %(state)s: %(error_type)s",
    "job_cancel": "job %(job_id)s of pool %(pool)r is cancelled",
    "job_retry": "job %(job_id)s of pool %(pool)r is tried again: %(error_type)s",
    "job_drop": "job %(job_id)s of pool %(pool)r is %(state)s",
}


def _check_levels(levels: Any) -> None:
    if not isinstance(levels, Mapping):
        raise TypeError(refuse("levels", levels, "a mapping of kinds to levels"))
    for kind, level in levels.items():
        if kind not in _TEXTS:
            expected = "levels by kind: " + ", ".join(_TEXTS)
            raise ValueError(refuse("levels", kind, expected))
        is_level = isinstance(level, int) and not isinstance(level, bool)
        if level is not None and not is_level:
            expected = "a level of logging, such as logging.INFO, or None"
            raise TypeError(refuse(f"levels[{kind!r}]", level, expected))


@final
class PoolLog:
    """Logs what happens in a pool: ``open_pool(8, fetch, plugins=[PoolLog()])``.

    ======================================  =======  =====================
    pool started, stopped, resized          INFO     ``trio_pool.pools``
    pool broken                             ERROR    ``trio_pool.pools``
    worker started, stopped                 DEBUG    ``trio_pool.workers``
    worker crashed, set up again            WARNING  ``trio_pool.workers``
    job failed, tried again, cancelled,     DEBUG    ``trio_pool.jobs``
    dropped, expired
    job accepted, started, done             not      ``trio_pool.jobs``
    ======================================  =======  =====================

    What befalls jobs may befall thousands a second, hence DEBUG. ``levels``
    changes some: ``{"job_drop": logging.WARNING, "resize": None}``; None is "not".

    Facts are in ``extra``: ``kind``, ``pool``, and ``worker``, ``job_id``,
    ``state``, ``attempts``, ``delay`` (seconds), ``error_type``, ``reason``,
    ``old_size``, ``new_size`` where there are such. Inputs and keys are never
    logged; tracebacks, and so the texts of errors, if DEBUG is enabled. (The pool
    itself always logs what killed a worker, as an error of ``trio_pool``.)

    What is not enabled when a pool opens is never looked at in it, so it costs
    nothing. One object may be given to any number of pools.
    """

    def __init__(self, levels: Mapping[LogKind, int | None] | None = None) -> None:
        every: dict[LogKind, int | None] = {**LEVELS}
        if levels is not None:
            _check_levels(levels)
            every.update(levels)
        self._levels: dict[LogKind, int] = {
            kind: level for kind, level in every.items() if level is not None
        }
        # A task leaves the blocks of its pools in the opposite order.
        self._open: dict[Task, list[_Listener]] = {}

    async def __aenter__(self) -> None:
        self._open.setdefault(current_task(), []).append(_Listener(self._levels))

    @property
    def hooks(self) -> tuple[Hooks, ...]:
        """What the pool that is just being opened has to call."""
        return tuple(self._open.get(current_task(), ())[-1:])

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        task = current_task()
        listener = self._open[task].pop()
        if not self._open[task]:
            del self._open[task]
        level = self._levels.get("pool_broken")
        if level is not None:
            for broken in _find_broken(error):
                # That of another pool may pass by.
                if broken.pool == listener.pool:
                    facts = {"pool": broken.pool, "reason": broken.reason}
                    _log("pool_broken", level, facts, broken)
                    break


class _Listener(Hooks):
    """The hooks of one pool: those whose level is enabled, and its name."""

    pool: str | None = None

    def __init__(self, levels: Mapping[LogKind, int]) -> None:
        self._level = levels.get("pool_start")
        for kind, level in levels.items():
            is_told_otherwise = kind in ("pool_start", "pool_broken")
            if not is_told_otherwise and _logger_of(kind).isEnabledFor(level):
                setattr(self, f"on_{kind}", partial(_log_event, level))

    def on_pool_start(self, event: PoolChanged) -> None:
        """Learn the name of the pool."""
        self.pool = event.pool
        if self._level is not None:
            _log_event(self._level, event)


def _find_broken(error: BaseException | None) -> Iterator[PoolBroken]:
    """Find what pools have broken by in an error, be it a group."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _find_broken(part)
    elif isinstance(error, PoolBroken):
        yield error


def _logger_of(kind: LogKind) -> logging.Logger:
    if kind == "resize":
        return logging.getLogger("trio_pool.pools")
    return logging.getLogger(f"trio_pool.{kind.partition('_')[0]}s")


def _log_event(level: int, event: Event) -> None:
    assert event.kind != "lost"
    error = getattr(event, "error", None)
    _log(event.kind, level, {"pool": event.pool, **_facts_of(event)}, error)


def _facts_of(event: Event) -> dict[str, object]:
    """Return what is told of an event: neither the key nor the error."""
    match event:
        case PoolResized():
            return {"old_size": event.old, "new_size": event.new}
        case WorkerChanged():
            return {"worker": event.worker}
        case JobChanged():
            return {
                "job_id": event.job_id,
                "state": event.state.value,
                "attempts": event.attempts,
                "worker": event.worker,
                "delay": event.delay,
            }
        case _:
            return {}


def _log(
    kind: LogKind,
    level: int,
    facts: Mapping[str, object],
    error: BaseException | None,
) -> None:
    logger = _logger_of(kind)
    error_type = None if error is None else type_name(error)
    facts = {"kind": kind, **facts, "error_type": error_type}
    extra = {key: fact for key, fact in facts.items() if fact is not None}
    shown = error if logger.isEnabledFor(logging.DEBUG) else None
    logger.log(level, _TEXTS[kind], facts, exc_info=shown, extra=extra)
