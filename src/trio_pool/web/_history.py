"""Keeps the figures of the last 15 minutes, a value a second, in fixed memory."""

from __future__ import annotations

from array import array
from typing import final

import attrs

from ._picture import Series

SPAN = 900
"""How many seconds are kept."""


@final
@attrs.frozen(kw_only=True)
class Sample:
    """What is kept of one second."""

    busy: float = 0.0
    size: float = 0.0
    queued: float = 0.0
    accepted: float = 0.0
    ended: float = 0.0
    failed: float = 0.0
    wait_p95: float = 0.0
    run_p95: float = 0.0
    lag: float = 0.0


# Seconds by which a sample may come before the second that it is of.
_EARLY = 0.02
NAMES = tuple(field.name for field in attrs.fields(Sample))
# Of several seconds in one value it is the worst that matters, or the mean.
_WORST = {"queued", "wait_p95", "run_p95", "lag"}


@final
class History:
    """A ring with a slot for each second since ``start``."""

    def __init__(self, start: float, span: int = SPAN) -> None:
        self._start = start
        self._span = span
        self._columns = {name: array("d", bytes(8 * span)) for name in NAMES}
        self._newest = -1
        self._until = 0.0

    def add(self, now: float, wall: float, sample: Sample) -> None:
        """Keep what was measured until ``now``; seconds in between are 0.0.

        ``now`` is on the clock of ``start``, ``wall`` is the same in seconds of
        `time.time`.
        """
        slot = max(int(now - self._start + _EARLY), self._newest, 0)
        for missed in range(max(self._newest + 1, slot - self._span + 1), slot):
            self._write(missed, _NOTHING)
        self._write(slot, sample)
        self._newest = slot
        self._until = wall

    def _write(self, slot: int, sample: Sample) -> None:
        for name, column in self._columns.items():
            column[slot % self._span] = round(getattr(sample, name), 6)

    def _in_order(self, name: str) -> array[float]:
        column, count = self._columns[name], self._newest + 1
        if count <= self._span:
            return column[:count]
        oldest = count % self._span
        return column[oldest:] + column[:oldest]

    def last(self, name: str, seconds: int) -> list[float]:
        """Return the values of the last seconds, the newest last."""
        return self._in_order(name)[-seconds:].tolist()

    def series(self, step: int) -> Series:
        """Return all, with one value for each ``step`` seconds.

        Values are of the same seconds from one call to the next, so the newest
        may have fewer, and what is older than all the rest is left out.
        """
        oldest = max(0, self._newest + 1 - self._span)
        values = {name: self._in_order(name)[-oldest % step :] for name in NAMES}
        if step > 1:
            values = {name: _lump(name, values[name], step) for name in NAMES}
        columns = {name: tuple(column) for name, column in values.items()}
        return Series(step=float(step), until=self._until, **columns)


def _lump(name: str, values: array[float], step: int) -> array[float]:
    whole = len(values) // step * step
    # Every first of a step, every second, ...: so there are no small slices.
    parts = list(zip(*(values[at:whole:step] for at in range(step)), strict=True))
    if whole < len(values):
        parts.append(tuple(values[whole:]))
    if name in _WORST:
        return array("d", map(max, parts))
    return array("d", [round(sum(part) / len(part), 6) for part in parts])


_NOTHING = Sample()
