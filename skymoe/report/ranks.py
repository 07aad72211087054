"""The section on a run of many ranks: who worked on what when, like Fig. 6 of the Skywork-MoE report, and how much of
the machine that used.

The drawing is plain SVG in the page, not plotly's: boxes need no script, print as they are, and take their colours from
the page's variables in the light and in the dark.
"""

from __future__ import annotations

from collections.abc import Sequence

from skymoe.base.html import Html, el, facts, join, table
from skymoe.report.data import Run
from skymoe.report.figure import chip
from skymoe.report.sections import Section, missing, swatch
from skymoe.report.series import tail_mean
from skymoe.report.speed import median, percent_of
from skymoe.report.timeline import Drawing, StageRow, Timeline, bubble, by_rank, by_stage, draw
from skymoe.report.verdict import NARROW, count
from skymoe.spec.timeline import Span

_NAMES = {"F": "forward", "B": "backward", "I": "backward, towards the input", "W": "backward, weights"}
_COLORS = {"F": "run5", "B": "run2", "I": "run3", "W": "run7"}
_ROW, _GAP, _LEFT, _TOP, _BOTTOM = 26, 6, 58, 4, 24
_WIDTH_ONE, _WIDTH_TWO, _CROWDED = 1080, 530, 40
_MAX_RANK_ROWS = 64


def ranks(runs: Sequence[Run], colors: dict[str, str]) -> Section:
    """Timeline, stages and ranks of every run that has them; nothing at all for runs of one process."""
    many = [run for run in runs if run.timeline or run.world_size > 1]
    if not many:
        return missing("ranks", "Ranks", "")
    parts = [_block(run, colors, named=len(many) > 1) for run in many if run.timeline]
    without = [run.name for run in many if not run.timeline]
    note = f"No timeline was logged by {', '.join(without)}." if without else ""
    if not parts:
        return missing("ranks", "Ranks", note)
    intro = el(
        "p",
        "Which pass each rank ran when, in one step. A rank without a pass is idle: the bubble of the pipeline, a wait "
        "for a slower rank, communication that nothing hides.",
    )
    return Section("ranks", "Ranks", join([intro, *parts]), (), note)


def _block(run: Run, colors: dict[str, str], named: bool) -> Html:
    timeline = run.timeline
    assert timeline is not None
    head = el("h3", swatch(run.name, colors[run.name])) if named else Html("")
    parts = [head, _summary(run, timeline), _figures(timeline), _stage_table(timeline)]
    shared = len(timeline.stages) > len(by_rank(timeline.stages)) or len(timeline.stages) > len(
        by_stage(timeline.stages)
    )
    return join([*parts, _rank_table(timeline) if shared else Html("")])


def _summary(run: Run, timeline: Timeline) -> Html:
    """Layout and figures in one card."""
    layout = timeline.layout
    axes = " × ".join(f"{axis} {layout[axis]}" for axis in ("pp", "dp", "tp") if axis in layout)
    kinds = ", ".join(layout[name] for name in ("expert", "dispatch", "schedule") if name in layout)
    share = {name: percent_of(tail_mean(run.train[name], 1.0)) for name in ("mfu_causal", "mfu_full", "hfu")}
    rows = [
        ("ranks", f"{timeline.world_size}: {axes}" if axes else str(timeline.world_size)),
        ("experts, dispatch, schedule", kinds or "–"),
        ("tokens/s per device", count(median(run.train["tokens_per_s_per_device"]))),
        ("MFU causal / full", f"{share['mfu_causal']} / {share['mfu_full']}"),
        ("HFU", share["hfu"]),
        ("bubble, measured", percent_of(timeline.bubble)),
    ]
    if timeline.planned_bubble is not None:
        rows.append(("bubble, planned", percent_of(timeline.planned_bubble)))
    return el("div", facts(rows), class_="card")


def _figures(timeline: Timeline) -> Html:
    """Measured and planned, side by side when there is room, on one scale of time when they are comparable."""
    drawings = [(f"Measured in step {timeline.step}", draw(timeline.spans), timeline.stages)]
    if timeline.planned_spans:
        drawings.append(("Planned", draw(timeline.planned_spans), timeline.planned_stages))
    ends = [drawing.end_s for _, drawing, _ in drawings]
    same = max(ends) < 3 * min(ends)
    crowded = max(len(d.spans) / len(d.ranks) for _, d, _ in drawings) > _CROWDED
    width = _WIDTH_ONE if crowded or len(drawings) == 1 else _WIDTH_TWO
    kinds = [kind for kind in _NAMES if any(span.kind == kind for _, d, _ in drawings for span in d.spans)]
    legend = [chip(_NAMES[kind], _COLORS[kind], "box") for kind in kinds]
    chunks = any(place for _, d, _ in drawings for place in d.chunk.values())
    words = "One box for each pass of a micro-batch." if crowded else "Numbers are micro-batches."
    words += " Paler boxes belong to a later stage of the same rank." if chunks else ""
    words += "" if same else " The two drawings have different scales of time."
    if timeline.num_passes > len(timeline.spans):
        words += f" Drawn are the first {len(timeline.spans)} of {timeline.num_passes} passes."
    drawn = []
    for title, drawing, rows in drawings:
        svg = _svg(title, drawing, max(ends) if same else drawing.end_s, width, rows, numbers=not crowded)
        drawn.append(el("div", el("h4", title), el("div", svg, class_="lanes", tabindex="0")))
    head = el("figcaption", el("h3", "Timeline"), el("p", words))
    columns = "pair" if width == _WIDTH_TWO else "stack"
    left = drawings[0][1].left_out
    rest = el("p", f"{left} more ranks are not drawn.", class_="small") if left else Html("")
    return el(
        "figure", head, el("ul", *legend, class_="legend"), el("div", *drawn, class_=columns), rest, class_="card"
    )


def _svg(title: str, drawing: Drawing, end_s: float, width: int, rows: Sequence[StageRow], *, numbers: bool) -> Html:
    height = _TOP + len(drawing.ranks) * (_ROW + _GAP) + _BOTTOM
    scale = (width - _LEFT - 8) / (end_s or 1.0)
    lines = {rank: _TOP + index * (_ROW + _GAP) for index, rank in enumerate(drawing.ranks)}
    parts = [_lane(rank, y, width) for rank, y in lines.items()]
    parts += [
        _box(span, drawing.chunk[span.rank, span.stage], lines[span.rank], scale, number=numbers)
        for span in drawing.spans
    ]
    parts += _axis(end_s, scale, height)
    return el(
        "svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=_describe(title, drawing, rows),
        style=f"min-width:{min(width, _WIDTH_TWO)}px",
    )  # fmt: skip


def _lane(rank: int, y: int, width: int) -> Html:
    lane = el("rect", class_="lane", x=str(_LEFT), y=str(y), width=str(width - _LEFT - 8), height=str(_ROW))
    return el("g", lane, el("text", f"rank {rank}", x=str(_LEFT - 8), y=str(y + 18), text_anchor="end"))


def _box(span: Span, chunk: int, y: int, scale: float, *, number: bool) -> Html:
    x, width = _LEFT + span.start_s * scale, max(0.6, (span.end_s - span.start_s) * scale - 0.8)
    words = f"{_NAMES[span.kind]} of micro-batch {span.micro}, stage {span.stage}: {_time(span.end_s - span.start_s)}"
    shape = el(
        "rect", el("title", words), class_=f"pass {span.kind}{' later' if chunk else ''}", x=f"{x:.1f}", y=str(y),
        width=f"{width:.1f}", height=str(_ROW),
    )  # fmt: skip
    if not number or width < 2.5 + 6.3 * len(str(span.micro)):  # the label would touch the edges
        return shape
    label = f"num{' later' if chunk else ''}"
    return join([shape, el("text", str(span.micro), class_=label, x=f"{x + width / 2:.1f}", y=str(y + 18))])


def _axis(end_s: float, scale: float, height: int) -> list[Html]:
    step = _tick(end_s / 5)
    marks = [index * step for index in range(int(end_s / step + 1e-9) + 1)] if step else []
    return [
        el("text", _time(mark), class_="tick", x=f"{_LEFT + mark * scale:.1f}", y=str(height - 6)) for mark in marks
    ]


def _tick(rough: float) -> float:
    """The first of 1, 2, 5, 10, ... times a power of ten that is not below `rough`."""
    if rough <= 0:
        return 0.0
    power = float(f"1e{f'{rough:e}'.split('e')[1]}")
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)


def _describe(title: str, drawing: Drawing, rows: Sequence[StageRow]) -> str:
    shares = [f"rank {group[0].rank} {percent_of(1 - bubble(group))}" for group in by_rank(rows)[:16]]
    return f"{title}: {len(drawing.ranks)} ranks over {_time(drawing.end_s)}. Busy: {', '.join(shares)}"


def _stage_table(timeline: Timeline) -> Html:
    """Busy and idle time per stage, means over its ranks."""
    plan = {group[0].stage: group for group in by_stage(timeline.planned_stages)}
    head = ["stage", "ranks", "layers", "recomputed", "busy", "idle", *(["planned busy"] if plan else []), "busy share"]
    rows = []
    for group in by_stage(timeline.stages):
        first, planned = group[0], plan.get(group[0].stage)
        expected = [_time(_mean([row.busy_s for row in planned])) if planned else "–"] if plan else []
        rows.append(
            (
                str(first.stage), _numbers([row.rank for row in group]), count(first.layers), count(first.recompute),
                _time(_mean([row.busy_s for row in group])), _time(_mean([row.idle_s for row in group])), *expected,
                _bar(1 - bubble(group)),
            )
        )  # fmt: skip
    words = "Layers count a cut layer as a half on each side. A gap is idle time of the stage whose pass ends it."
    return join([table(head, rows, label="Stages of the pipeline"), el("p", words, class_="small")])


def _rank_table(timeline: Timeline) -> Html:
    groups = by_rank(timeline.stages)
    rows = [
        (
            str(group[0].rank), _numbers([row.stage for row in group]), _time(sum(row.busy_s for row in group)),
            _time(sum(row.idle_s for row in group)), _bar(1 - bubble(group)),
        )
        for group in groups[:_MAX_RANK_ROWS]
    ]  # fmt: skip
    left = timeline.world_size - len(rows)
    rest = [el("p", f"{left} ranks are not shown.", class_="small")] if left > 0 else []
    inside = table(["rank", "stages", "busy", "idle", "busy share"], rows, label="Ranks")
    return el("details", el("summary", "Rank by rank"), join([inside, *rest]))


def _bar(share: float) -> Html:
    filled = el("i", style=f"width:{100 * min(1.0, max(0.0, share)):.1f}%")
    return el("span", el("span", filled, class_="track", aria_hidden="true"), percent_of(share), class_="bar")


def _numbers(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, sorted(values)[:8]))
    return f"{shown}, … ({len(values)})" if len(values) > 8 else shown


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _time(seconds: float) -> str:
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size * 0.9995:
            return f"{seconds / size:.3g}{NARROW}{unit}" if seconds < 999.5 * size else f"{seconds:.0f}{NARROW}s"
    return f"{seconds * 1e6:.0f}{NARROW}µs" if seconds else "0"
