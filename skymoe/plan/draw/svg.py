"""A step of a pipeline as SVG: ranks as rows, passes as blocks, idle time as what is left, as in Fig. 6 of the
Skywork-MoE report.

Several panels (uniform | planned, planned | measured) stand one above the other with the same scale of time, so that
lengths can be compared by eye. Forward passes, backward passes, the part of them in which layers are run again, and
gradients of weights have their colours; later stages of the same rank are paler. Numbers of micro-batches stand where
they fit. A long step is cut in the middle (plan/draw/window.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

from skymoe.base.html import Html, join
from skymoe.plan.draw.frame import box, drawing, legend, number, path, runs, text, text_width
from skymoe.plan.draw.panel import Panel
from skymoe.plan.draw.window import MAX_RANKS, Window, left_out, windows
from skymoe.plan.draw.words import figures, name, percent, ticks, time
from skymoe.spec.timeline import Span

_WIDTH: Final = 1120.0
_RIGHT: Final = 62.0  # the column of idle shares
_GAP: Final = 26.0
_MAX_NUMBERS: Final = 2500
_KINDS: Final = (("F", "forward"), ("B", "backward"), ("again", "run again"), ("W", "gradients of weights"))


def timeline_svg(panels: Sequence[Panel], *, title: str = "Pipeline schedule", standalone: bool = True) -> Html:
    """Draw one step per panel.

    Args:
        panels: at least one; panels without passes are left out.
        title: above all of them.
        standalone: as a file of its own; False for a page that has the style sheet.
    """
    shown = [panel for panel in panels if panel.timeline.spans]
    left = 16 + max((text_width(label, 11) for panel in shown for label in _labels(panel)), default=60.0) + 8
    width = _WIDTH - left - _RIGHT
    views = windows(shown, width, pass_width=9.0, gap=_GAP) if shown else []
    children, y = [text(name(title), 16, 28, "title")], 56.0
    children.append(legend([*_kinds(shown), ("idle", "idle")], 16, y - 4))
    for panel, window in zip(shown, views, strict=True):
        drawn, y = _panel(panel, window, left, y + 26)
        children.append(drawn)
    if not shown:
        children.append(text("No passes to draw.", 16, y + 26, "soft"))
        y += 40
    words = f"{name(title)}. " + " ".join(map(_describe, shown))
    return drawing(
        children, width=_WIDTH, height=y + 6, title=title, description=words, standalone=standalone
    )  # fmt: skip


def _kinds(panels: Sequence[Panel]) -> list[tuple[str, str]]:
    """The entries of the legend that occur."""
    kinds = {"B" if span.kind == "I" else span.kind for panel in panels for span in panel.timeline.spans}
    if any(any(panel.again_s) for panel in panels):
        kinds.add("again")  # type: ignore[arg-type]
    return [(kind, words) for kind, words in _KINDS if kind in kinds]


def _panel(panel: Panel, window: Window, left: float, top: float) -> tuple[Html, float]:
    """One panel from `top` on, and where it ends."""
    row = 24.0 if len(window.ranks) <= 8 else 19.0 if len(window.ranks) <= 16 else 14.0
    parts = [runs(16, top, ("head", name(panel.title)), ("soft", name(panel.note, 160) or figures(panel)))]
    parts.append(text("idle", _WIDTH - 16, top, "soft small end"))
    y = top + 10
    labels = dict(zip(panel.ranks, _labels(panel), strict=True))
    by_rank: defaultdict[int, list[Span]] = defaultdict(list)
    for span in panel.timeline.spans:
        by_rank[span.rank].append(span)
    numbers = _MAX_NUMBERS // len(window.ranks)
    for index, rank in enumerate(window.ranks):
        if len(panel.ranks) > MAX_RANKS and index == MAX_RANKS // 2:
            skipped = len(panel.ranks) - MAX_RANKS
            parts.append(text(f"{skipped} ranks are not drawn", left + 4, y + 12, "soft small"))
            y += 18
        parts.append(text(labels[rank], left - 8, y + row / 2 + 4, "small end"))
        parts += [
            box("idle", left + s.x, y + 1, (s.end_s - s.start_s) * window.scale, row - 2) for s in window.segments
        ]
        parts.append(_row(panel, by_rank[rank], window, left, y + 1, row - 2, numbers))
        idle = _idle(panel, by_rank[rank])
        parts.append(text(percent(idle), _WIDTH - 16, y + row / 2 + 4, "small end"))
        y += row
    parts.append(_axis(panel, window, left, top + 10, y))
    y += 20
    gone = left_out(panel, window)
    if gone:
        middle = f"{time(gone[0], panel.unit)} to {time(gone[1], panel.unit)}"
        words = f"{middle} is left out: the steady state goes on alike"
        parts.append(text(words, left, y + 12, "soft small"))
        y += 16
    return join(parts), y + 8


def _row(
    panel: Panel, spans: Sequence[Span], window: Window, left: float, y: float, height: float, max_numbers: int
) -> Html:
    """The passes of one rank: one path for each colour, numbers above."""
    stages = sorted({span.stage for span in spans})
    data: defaultdict[str, list[str]] = defaultdict(list)
    numbers: list[Html] = []
    for span in spans:
        tone = span.kind if span.stage == stages[0] else f"{span.kind} later"
        again = panel.again_s[span.stage] if panel.again_s and span.kind in ("B", "I") else 0.0
        if again > 0:
            whole = span.end_s - span.start_s
            middle = span.start_s + min(again, whole)
            first, rest = span._replace(end_s=middle), span._replace(start_s=middle)
            _blocks(data[tone.replace(span.kind, "again", 1)], first, window, left, y, height)
            _blocks(data[tone], rest, window, left, y, height)
        else:
            _blocks(data[tone], span, window, left, y, height)
        for x, wide in window.pieces(span):
            if height >= 11 and wide >= 4 + 6.0 * len(str(span.micro)) and len(numbers) < max_numbers:
                numbers.append(text(str(span.micro), left + x + wide / 2, y + height / 2, f"num {tone}"))
    return join([*(path(tone, "".join(blocks)) for tone, blocks in data.items()), *numbers])


def _blocks(data: list[str], span: Span, window: Window, left: float, y: float, height: float) -> None:
    """Append the rectangle of a span, with a hair of ground to its right where it is wide enough."""
    for x, wide in window.pieces(span):
        shown = wide - 0.8 if wide > 3 else wide
        data.append(f"M{number(left + x)} {number(y)}h{shown:.2f}v{number(height)}h-{shown:.2f}z")


def _axis(panel: Panel, window: Window, left: float, top: float, y: float) -> Html:
    parts = []
    for segment in window.segments:
        length = (segment.end_s - segment.start_s) * window.scale
        parts.append(path("axis", f"M{number(left + segment.x)} {number(y + 3)}h{number(length)}"))
        for mark in ticks(segment.start_s, segment.end_s, max(3, round(length / 110))):
            x = left + segment.x + (mark - segment.start_s) * window.scale
            parts.append(path("axis", f"M{number(x)} {number(y + 3)}v4"))
            parts.append(text(time(mark, panel.unit), x, y + 18, "soft small mid"))
    for one, other in zip(window.segments, window.segments[1:], strict=False):
        x = left + (one.x + (one.end_s - one.start_s) * window.scale + other.x) / 2
        count = max(4, round((y - top) / 9))
        teeth = "".join(f"l{5 if i % 2 else -5} {number((y - top) / count)}" for i in range(count))
        parts.append(path("cut", f"M{number(x + 2.5)} {number(top)}{teeth}"))
    return join(parts)


def _labels(panel: Panel) -> tuple[str, ...]:
    if len(panel.labels) == len(panel.ranks):
        return tuple(name(label, 24) for label in panel.labels)
    return tuple(f"rank {rank}" for rank in panel.ranks)


def _idle(panel: Panel, spans: Sequence[Span]) -> float:
    """Of the whole step, whatever is drawn."""
    whole = panel.timeline.span_s
    return max(0.0, 1 - sum(span.end_s - span.start_s for span in spans) / whole) if whole else 0.0


def _describe(panel: Panel) -> str:
    by_rank: defaultdict[int, list[Span]] = defaultdict(list)
    for span in panel.timeline.spans:
        by_rank[span.rank].append(span)
    shares = ", ".join(f"rank {rank} {percent(_idle(panel, by_rank[rank]))}" for rank in panel.ranks[:16])
    return f"{name(panel.title)}: {len(panel.ranks)} ranks, {figures(panel)}. Idle: {shares}."
