"""Which part of a timeline is drawn, and where: all of it when passes stay wide enough to read, else its two ends.

A long step repeats itself in the middle. What is worth seeing is the warm-up with some periods of the steady state, and
some periods with the cool-down; the middle is cut out and said to be. All panels of a drawing have the same scale. The
number of marks and of rows is bounded whatever the timeline is, so a drawing cannot grow without end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final, NamedTuple

from skymoe.plan.draw.panel import Panel
from skymoe.plan.timeline import Timeline
from skymoe.spec.timeline import Span

MAX_RANKS: Final = 32
MAX_MARKS: Final = 5000
_PERIODS: Final = 3
_WHOLE: Final = 0.8  # with so much in the two ends, cutting is not worth it


class Segment(NamedTuple):
    """From `start_s` to `end_s`, drawn from `x` on."""

    start_s: float
    end_s: float
    x: float


@dataclass(frozen=True)
class Window:
    """What is drawn of one panel.

    Attributes:
        segments: one, or two with the middle left out.
        scale: widths per second.
        ranks: the rows.
    """

    segments: tuple[Segment, ...]
    scale: float
    ranks: tuple[int, ...]

    @property
    def width(self) -> float:
        """Of all segments and the gaps between them."""
        last = self.segments[-1]
        return last.x + (last.end_s - last.start_s) * self.scale

    def pieces(self, span: Span) -> list[tuple[float, float]]:
        """(x, width) of the visible parts of a span."""
        cut = [(max(span.start_s, s.start_s), min(span.end_s, s.end_s), s) for s in self.segments]
        return [(s.x + (a - s.start_s) * self.scale, (b - a) * self.scale) for a, b, s in cut if b > a]


def windows(panels: Sequence[Panel], width: float, *, pass_width: float, gap: float) -> list[Window]:
    """For each panel what is drawn, all with one scale.

    Args:
        panels: at least one, with spans.
        width: that all segments of a panel may take.
        pass_width: a usual forward pass should have at least this, else the middle is left out.
        gap: between two segments.
    """
    longest = max(_end(panel.timeline) for panel in panels)
    usual = min(_usual_forward(panel.timeline) for panel in panels)
    whole = width / longest if longest > 0 else 1.0
    wide = usual * whole >= pass_width
    parts = [_parts(panel.timeline, cut=not wide) for panel in panels]
    lengths = [(sum(end - start for start, end in own), len(own) - 1) for own in parts]
    scale = min((width - gap * cuts) / length for length, cuts in lengths) if longest > 0 else 1.0
    return [
        Window(_placed(own, scale, gap), scale, _rows(panel.ranks))
        for panel, own in zip(panels, parts, strict=True)
    ]  # fmt: skip


def left_out(panel: Panel, window: Window) -> tuple[float, float] | None:
    """From when to when the middle is not drawn."""
    if len(window.segments) < 2:
        return None
    return window.segments[0].end_s, window.segments[1].start_s


def _rows(ranks: Sequence[int]) -> tuple[int, ...]:
    if len(ranks) <= MAX_RANKS:
        return tuple(ranks)
    return (*ranks[: MAX_RANKS // 2], *ranks[-MAX_RANKS // 2 :])


def _parts(timeline: Timeline, *, cut: bool) -> list[tuple[float, float]]:
    end = _end(timeline)
    if not cut and len(timeline.spans) <= MAX_MARKS:
        return [(0.0, end)]
    first, last = timeline.spans[0].stage, max(span.stage for span in timeline.spans)
    period = timeline.period_s(first)
    back = [span.end_s for span in timeline.spans if span.stage == first and span.kind in ("B", "I")]
    forward = [span.start_s for span in timeline.spans if span.stage == last and span.kind == "F"]
    head = min(back, default=end / 2) + _PERIODS * period
    tail = end - max(forward, default=end / 2) + _PERIODS * period
    if head + tail >= _WHOLE * end and len(timeline.spans) <= MAX_MARKS:
        return [(0.0, end)]
    head, tail = min(head, 0.45 * end), min(tail, 0.45 * end)
    marks = sum(span.start_s < head or span.end_s > end - tail for span in timeline.spans)
    if marks > MAX_MARKS:
        head, tail = head * MAX_MARKS / marks, tail * MAX_MARKS / marks
    return [(0.0, head), (end - tail, end)]


def _placed(parts: Sequence[tuple[float, float]], scale: float, gap: float) -> tuple[Segment, ...]:
    segments, x = [], 0.0
    for start, end in parts:
        segments.append(Segment(start, end, x))
        x += (end - start) * scale + gap
    return tuple(segments)


def _usual_forward(timeline: Timeline) -> float:
    return median([span.end_s - span.start_s for span in timeline.spans if span.kind == "F"] or [0.0])


def _end(timeline: Timeline) -> float:
    return max([timeline.span_s, *(span.end_s for span in timeline.spans)])
