"""What is drawn: plain data, so that drawings know no command and no job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from skymoe.plan.timeline import Timeline

PARTS: Final = ("weights", "gradients", "optimizer", "activations", "keys and values", "transient", "reserve")
"""What memory is for, in the order of legends."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One timeline of a drawing that may have several with the same scale of time.

    Attributes:
        title: what it is: "uniform", "planned", "measured".
        timeline: simulated or measured.
        labels: of the rows, by rank in order ("stage 1 · 6 layers"); empty for the ranks' numbers.
        again_s: per stage, the part of a backward pass in which layers are run again; empty for none.
        unit: of times: "s", or "" for abstract units.
        note: a sentence under the title; empty for step, bubble and period.
    """

    title: str
    timeline: Timeline
    labels: tuple[str, ...] = ()
    again_s: tuple[float, ...] = ()
    unit: str = "s"
    note: str = ""

    @property
    def ranks(self) -> tuple[int, ...]:
        """In order."""
        return tuple(sorted({span.rank for span in self.timeline.spans}))


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Memory of ranks, one bar each.

    Attributes:
        title: "uniform", "planned".
        ranks: of each the bytes by cause, from the bottom up; the names are those of `PARTS`.
        labels: below the bars; empty for their numbers.
        capacities: of each rank, where they are not all the same.
    """

    title: str
    ranks: tuple[Mapping[str, float], ...]
    labels: tuple[str, ...] = ()
    capacities: tuple[float, ...] = ()

    @property
    def totals(self) -> tuple[float, ...]:
        """Of each rank."""
        return tuple(sum(rank.values()) for rank in self.ranks)

    def is_over(self, index: int, capacity: float | None) -> bool:
        """Whether a rank needs more than it has."""
        has = self.capacities[index] if self.capacities else capacity
        return has is not None and self.totals[index] > has * (1 + 1e-9)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A candidate in the chart of speed against memory.

    Attributes:
        x, y: where.
        name: what it is, in some words.
        chosen: the answer.
        frontier: no other point is better in both.
    """

    x: float
    y: float
    name: str
    chosen: bool = False
    frontier: bool = False


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a chart: (x, y) in order of x."""

    name: str
    points: tuple[tuple[float, float], ...]
