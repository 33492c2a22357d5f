"""Follows all pools of a dashboard and pictures them; the clocks are passed in."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, final

from .._events import Event
from ._picture import Picture
from ._watch import AnyPool, Watch
from ._words import Words

_PAGE_STEP = 5
"""Seconds for which a chart on the page has one value."""
_LONGEST_MARK = 200


@final
class Monitor:
    """What is known of some pools, and of the loop that they run in.

    ``now`` is seconds on any steady clock, ``wall`` the same moment on
    `time.time`.
    """

    def __init__(
        self,
        pools: Sequence[AnyPool],
        now: float,
        wall: float,
        *,
        controls: bool = False,
        describe: Callable[[Any], str] | None = None,
    ) -> None:
        words = Words(describe)
        self.watches = {pool.name: Watch(pool, words, now, wall) for pool in pools}
        self._controls = controls
        self._lags: deque[float] = deque([0.0], maxlen=60)

    def sample(self, now: float, wall: float, lag: float) -> None:
        """Take the readings of a second; ``lag`` is the loop's longest in it."""
        self._lags.append(lag)
        for watch in self.watches.values():
            watch.sample(now, wall, lag)

    def hear(self, event: Event, wall: float) -> None:
        """Take note of an event of one of the pools."""
        self.watches[event.pool].incidents.hear(event, wall)

    def mark(self, text: str, wall: float) -> None:
        """Remember a moment, for all pools."""
        for watch in self.watches.values():
            watch.incidents.mark("mark", text[:_LONGEST_MARK], wall)

    def picture(self, wall: float, *, step: int | None = _PAGE_STEP) -> Picture:
        """Picture all, with a value of history for each ``step`` seconds.

        None leaves the history out.
        """
        return Picture(
            time=wall,
            lag=self._lags[-1],
            lag_minute=max(self._lags),
            controls=self._controls,
            pools=tuple(
                watch.picture(
                    wall, None if step is None else watch.history.series(step)
                )
                for watch in self.watches.values()
            ),
        )

    def reasons_not_ready(self) -> list[str]:
        """Say for each pool that cannot do its work why not."""
        return [
            f"{name}: {verdict.sentence}"
            for name, watch in self.watches.items()
            if not (verdict := watch.verdict()).ready
        ]
