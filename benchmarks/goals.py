"""What a figure should be, and whether it is."""

from __future__ import annotations

from typing import Literal

import attrs


@attrs.frozen
class Goal:
    """A bound for the ratio of a case, or for its minimum."""

    limit: float
    kind: Literal["at most", "faster", "value"] = "at most"
    unit: str = ""

    def met(self, minimum: float, ratio: float | None) -> bool:
        """Say whether a case with this minimum and this ratio reaches the goal."""
        if self.kind == "value":
            return minimum <= self.limit
        assert ratio is not None, "a bound of the ratio, and there is none"
        # As it is shown, so that no table says "1.60x, not below 1.60x".
        if self.kind == "faster":
            return round(1 / ratio, 1) >= self.limit
        return round(ratio, 2) <= self.limit

    def __str__(self) -> str:
        if self.kind == "faster":
            return f"{self.limit:g}x faster"
        if self.kind == "value":
            return f"<= {self.limit:g} {self.unit}"
        return f"<= {self.limit:.2f}x"


def at_most(limit: float) -> Goal:
    """Make a goal: no more than so many times the other."""
    return Goal(limit)


def faster(times: float) -> Goal:
    """Make a goal: at least so many times as fast as the other."""
    return Goal(times, "faster")


def below(limit: float, unit: str) -> Goal:
    """Make a goal: no more than this, whatever others do."""
    return Goal(limit, "value", unit)
