"""What is drawn: plain data, so that drawings know no command and no job."""

from __future__ import annotations

from dataclasses import dataclass

from skymoe.plan.memory.sizes import RankMemory
from skymoe.plan.timeline import Timeline


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
        ranks: peak by cause; bytes.
        labels: below the bars; empty for their numbers.
    """

    title: str
    ranks: tuple[RankMemory, ...]
    labels: tuple[str, ...] = ()


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
