"""What is compared, how it is measured in turns, and the row that comes out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Literal

import attrs
from goals import Goal

Case = Callable[[], float]
Relation = Literal["first to it", "it to first", "none"]


@attrs.frozen
class Comparison:
    """Cases that do the same, or with one thing changed, measured in turns."""

    section: str
    name: str
    cases: Mapping[str, Case]
    """By name; each call is one round. The first is what the ratios are about."""
    goals: Mapping[str, Goal] = attrs.field(factory=dict)
    """What some of the cases should reach, by the name of the case."""
    relation: Relation = "first to it"
    """Ours to theirs; or, of a feature and of a size, changed to plain."""
    unit: str = "us"
    rounds: float = float("inf")
    """Rounds at most, for cases that take seconds."""


@attrs.frozen
class Row:
    """One line of a table: the figures of a case."""

    section: str
    comparison: str
    case: str
    unit: str
    values: tuple[float, ...]
    ratio: float | None
    """Of the minima; None for the case that the others are compared with."""
    goal: Goal | None

    @property
    def minimum(self) -> float:
        """The best of the rounds: what the code costs, and least of the noise."""
        return min(self.values)

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        return None if self.goal is None else self.goal.met(self.minimum, self.ratio)


def measure(comparison: Comparison, rounds: int) -> list[Row]:
    """Run the cases in turns and return their rows, the first case first."""
    values: dict[str, list[float]] = {name: [] for name in comparison.cases}
    for _ in range(int(min(rounds, comparison.rounds))):
        for name, case in comparison.cases.items():
            # Nobody pays for the garbage of the one before. The collector stays
            # on: what a contender allocates is part of what it costs.
            gc.collect()
            values[name].append(case())
    return list(_rows(comparison, values))


def _rows(comparison: Comparison, values: Mapping[str, list[float]]) -> Iterator[Row]:
    first = min(next(iter(values.values())))
    for number, (name, found) in enumerate(values.items()):
        ratio = None
        if number and comparison.relation == "first to it":
            ratio = first / min(found)
        elif number and comparison.relation == "it to first":
            ratio = min(found) / first
        yield Row(
            comparison.section,
            comparison.name,
            name,
            comparison.unit,
            tuple(found),
            ratio,
            comparison.goals.get(name),
        )
