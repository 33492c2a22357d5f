"""How long things took, counted in cells that grow with the time."""

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import final

import attrs

FLUSH = 2048
"""How many samples may be pending before `Histogram.flush` is due."""

_ZERO = -(1 << 20)
"""The cell of 0.0, below that of the smallest float."""


@final
@attrs.frozen(kw_only=True)
class Latency:
    """Times in seconds: how many there were, their mean and percentiles.

    ``count`` and ``max`` are exact, and ``mean`` but for rounding. A
    percentile is the nearest rank of a log-2 histogram with 8 cells an
    octave: it is within 1/17 (5.9 %) of the sample of that rank, above or
    below, and never outside of what was seen. Everything is 0.0 when
    ``count`` is 0.
    """

    count: int
    """How many were measured."""
    mean: float
    """Their sum divided by their number, in seconds."""
    p50: float
    """Seconds that half of them did not exceed: the median."""
    p95: float
    """Seconds that 95 of 100 did not exceed."""
    p99: float
    """Seconds that 99 of 100 did not exceed."""
    max: float
    """The longest, in seconds."""
    # In order, those that counted something; left out of what one looks at.
    _cells: tuple[tuple[int, int], ...] = attrs.field(
        default=(), alias="cells", repr=False, eq=False
    )

    def below(self, seconds: float) -> int:
        """Count those that took less than ``seconds``.

        Exact at the edges of the cells, ``(1 + k / 8) * 2.0 ** n``, so at every
        power of two; in between, a cell counts if all of it is below. From one
        reading to the next a count never falls at 2.0 ** -15 s (30 us) and above;
        quicker jobs are counted together, by a mean that moves.
        """
        return sum(count for cell, count in self._cells if _end(cell) <= seconds)

    def since(self, earlier: "Latency") -> "Latency":
        """Return what was counted after an earlier reading of the same times.

        ``count`` and ``mean`` are exact but for rounding, percentiles as good as
        all are, and ``max`` no less than the longest, by an eighth at most.
        """
        cells = _lump(self._cells)
        cells.subtract(_lump(earlier._cells))  # noqa: SLF001
        left = {cell: count for cell, count in cells.items() if count > 0}
        count = self.count - earlier.count
        if not left or count <= 0:
            return _NOTHING
        seconds = self.mean * self.count - earlier.mean * earlier.count
        # The lowest cell may stand for all that are below it.
        low = 0.0
        high = min(self.max, _end(max(left)))
        totals = _Totals(sum(left.values()), max(seconds, 0.0), low, high, left)
        return _latency_of(totals)


# Never changed, but not frozen: that would cost 0.5 us more each time.
@final
@attrs.define
class _Totals:
    """What has been counted; replaced and never changed: any thread may read."""

    count: int = 0
    seconds: float = 0.0
    low: float = math.inf
    high: float = 0.0
    cells: Mapping[int, int] = attrs.Factory(dict[int, int])

    def __add__(self, other: "_Totals") -> "_Totals":
        cells = dict(self.cells)
        for cell, count in other.cells.items():
            cells[cell] = cells.get(cell, 0) + count
        return _Totals(
            self.count + other.count,
            self.seconds + other.seconds,
            min(self.low, other.low),
            max(self.high, other.high),
            cells,
        )


def _cell(seconds: float) -> int:
    """Number the cell of a positive time: 8 cells to each power of two."""
    mantissa, exponent = math.frexp(seconds)
    return 8 * exponent + int(16 * mantissa)


def _edge(cell: int) -> float:
    """Return the least time that is above all of a cell's."""
    octave, eighth = divmod(cell, 8)
    return math.ldexp(eighth + 9, octave - 5)


def _middle(cell: int) -> float:
    """Return the time that stands for all of a cell's.

    The harmonic mean of the edges, 2ab / (a + b), is (b - a) / (b + a) of a
    time away from it at most, and b <= 9/8 a: 1/17.
    """
    if cell == _ZERO:
        return 0.0
    octave, eighth = divmod(cell, 8)
    low, high = eighth + 8, eighth + 9
    return math.ldexp(2 * low * high / (low + high), octave - 5)


def _end(cell: int) -> float:
    """Return the least time that is above all of a cell's, that of 0.0 too."""
    return math.ulp(0.0) if cell == _ZERO else _edge(cell)


def _lump(cells: Iterable[tuple[int, int]]) -> Counter[int]:
    """Count again with all quick times in one cell, whatever their mean was."""
    lumped: Counter[int] = Counter()
    for cell, count in cells:
        lumped[max(cell, _QUICK)] += count
    return lumped


def _latency_of(totals: _Totals) -> Latency:
    if not totals.count:
        return _NOTHING
    cells = sorted(totals.cells)
    ranks = list(accumulate(totals.cells[cell] for cell in cells))

    def clamp(seconds: float) -> float:
        return min(max(seconds, totals.low), totals.high)

    def percentile(percent: int) -> float:
        rank = -(-percent * totals.count // 100)
        return clamp(_middle(cells[bisect_left(ranks, rank)]))

    return Latency(
        count=totals.count,
        mean=clamp(totals.seconds / totals.count),
        p50=percentile(50),
        p95=percentile(95),
        p99=percentile(99),
        max=totals.high,
        cells=tuple((cell, totals.cells[cell]) for cell in cells),
    )


_NOTHING = Latency(count=0, mean=0.0, p50=0.0, p95=0.0, p99=0.0, max=0.0)

_QUICK = _cell(2.0**-15) - 1
"""The cell below the least time that is measured by itself: see `Latency.below`."""


def _tally(samples: Sequence[float]) -> _Totals:
    """Count one sample or more."""
    # Sorting and then finding where each cell ends takes a third of the time
    # of looking at every sample, and gives the least and the greatest as well.
    ranked = sorted(samples)
    cells: dict[int, int] = {}
    start = bisect_right(ranked, 0.0)
    if start:
        # A clock that went back has measured nothing.
        ranked[:start] = [0.0] * start
        cells[_ZERO] = start
    while start < len(ranked):
        cell = _cell(ranked[start])
        # An edge among the smallest floats is rounded and may part a cell.
        end = bisect_left(ranked, _edge(cell), start + 1)
        cells[cell] = cells.get(cell, 0) + end - start
        start = end
    return _Totals(len(ranked), sum(ranked), ranked[0], ranked[-1], cells)


@final
class Histogram:
    """Counts times; written by one thread, read by any.

    To count one, append it to ``pending``, and call `flush` when that has
    `FLUSH` entries: nothing cheaper can be done in a job's way. Times are
    finite; one below 0 counts as 0.0.
    """

    __slots__ = ("_state", "pending")

    def __init__(self) -> None:
        self.pending: list[float] = []
        """Times in seconds, not yet counted; always the same list."""
        # With the totals goes whether they have the pending times already. A
        # pair is never published twice, so who reads the same one before and
        # after copying the list knows that the copy belongs to it.
        self._state = (_Totals(), False)

    def flush(self) -> None:
        """Count what is pending, and clear it."""
        if self.pending:
            totals = self._state[0] + _tally(self.pending)
            self._state = (totals, True)
            try:
                self.pending.clear()
            finally:
                self._state = (totals, False)

    def add(self, seconds: float, count: int) -> None:
        """Count ``count`` equal times, of ``seconds`` each, at once."""
        if count > 0:
            seconds = max(seconds, 0.0)
            cells = {_cell(seconds) if seconds else _ZERO: count}
            more = _Totals(count, seconds * count, seconds, seconds, cells)
            self._state = (self._state[0] + more, False)

    def merge(self, other: "Histogram") -> None:
        """Count all that another has counted, as if it had come here."""
        self._state = (self._state[0] + other.totals(), False)

    def latency(self) -> Latency:
        """Return the percentiles of all so far; legal from any thread."""
        return _latency_of(self.totals())

    def totals(self) -> _Totals:
        """Return all so far, pending or not; legal from any thread."""
        while True:
            state = self._state
            pending = self.pending.copy()
            if self._state is state:
                totals, have_pending = state
                if have_pending or not pending:
                    return totals
                return totals + _tally(pending)
