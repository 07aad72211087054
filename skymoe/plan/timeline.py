"""Timeline: what the ranks of a pipeline do when, in one step. Simulated or measured, it is the same data (the spans of
`spec/timeline.py`), so that the two can be laid beside each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from skymoe.spec.layout import Coordinate, Layout
from skymoe.spec.timeline import PassKind, Span, StageTimes, bubble_fraction, summarize


class Task(NamedTuple):
    """A pass that is not placed in time yet."""

    stage: int
    kind: PassKind
    micro: int


@dataclass(frozen=True)
class Timeline:
    """One step, or the part of it that one rank has seen.

    Attributes:
        spans: in the order in which they started.
        span_s: from the start of the step to its end.
    """

    spans: tuple[Span, ...]
    span_s: float

    @classmethod
    def of(cls, spans: Iterable[Span], span_s: float) -> Timeline:
        """With the spans put in order."""
        return cls(tuple(sorted(spans, key=lambda span: (span.start_s, span.stage, span.end_s))), span_s)

    @property
    def times(self) -> dict[int, StageTimes]:
        """Busy and idle seconds of each stage."""
        return {times.stage: times for times in summarize(self.spans, self.span_s)}

    @property
    def bubble(self) -> float:
        """Idle part of all ranks' time."""
        return bubble_fraction(list(self.times.values()))

    @property
    def longest_rank_s(self) -> float:
        """From the first pass to the last one of the rank for which that is longest.

        What a step costs when ranks begin the next one without waiting for each other (post-validation of the
        optimizer's step; Qi et al. 2024, section 4). Their zero bubble is meant so.
        """
        first: dict[int, float] = {}
        last: dict[int, float] = {}
        for span in self.spans:
            first[span.rank] = min(first.get(span.rank, span.start_s), span.start_s)
            last[span.rank] = max(last.get(span.rank, span.end_s), span.end_s)
        return max((last[rank] - start for rank, start in first.items()), default=0.0)

    @property
    def bubble_of_longest_rank(self) -> float:
        """Idle part of all ranks' time when a step costs `longest_rank_s` (the bubble rate of Qi et al. 2024, 5.3)."""
        busy = sum(times.busy_s for times in self.times.values())
        whole = len({span.rank for span in self.spans}) * self.longest_rank_s
        return 1.0 - busy / whole if whole else 0.0

    def period_s(self, stage: int, kind: PassKind = "F") -> float:
        """Seconds between micro-batches in the middle of the step, as `stage` starts them."""
        starts = [span.start_s for span in self.spans if span.stage == stage and span.kind == kind]
        third = len(starts) // 3
        middle = starts[third : len(starts) - third]
        return (middle[-1] - middle[0]) / (len(middle) - 1) if len(middle) > 1 else 0.0

    def on(self, layout: Layout) -> Timeline:
        """The same on the ranks of a world: a simulated rank is the first one (dp 0, tp 0) of its stage."""
        return Timeline(
            tuple(span._replace(rank=layout.rank(Coordinate(span.rank, 0, 0))) for span in self.spans), self.span_s
        )
