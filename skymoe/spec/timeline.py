"""When each pass of a pipeline ran, or was planned to run: plain data that a clock writes and a report draws.

A `Span` is one pass of one micro-batch through one stage on one rank: forward (F), backward (B), or where a schedule
splits the backward pass, its way towards the input (I) and the gradient of the weights (W). Times are seconds from the
start of the step, which all ranks share.

What a rank does not spend in a pass is *idle*: pipeline bubbles, waiting for a slower rank, and communication that is
not hidden. Over a window from the start of the step to its end

    bubble fraction = idle / (ranks * window)

as in Fig. 6 of the Skywork-MoE report. A rank with several stages (interleaved, zbv) is idle only while none of them
runs; each gap is counted to the stage whose pass ends the waiting, the one at the end to the stage that ran last, so
that idle times of stages add up to those of ranks. No torch here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from skymoe.base.errors import FormatError
from skymoe.spec.layout import Coordinate, Layout

PassKind = Literal["F", "B", "I", "W"]
MAX_SPANS = 1024
MAX_RANKS = 64


class Span(NamedTuple):
    """One pass.

    Attributes:
        stage: of the pipeline, in the order of the model.
        rank: in the world.
        kind: F, B, I or W.
        micro: number of the micro-batch within the step.
        start_s, end_s: seconds since the start of the step, which all ranks share.
    """

    stage: int
    rank: int
    kind: PassKind
    micro: int
    start_s: float
    end_s: float


class StageTimes(NamedTuple):
    """What one rank did for one of its stages.

    Attributes:
        stage, rank: which.
        busy_s: seconds in its passes.
        idle_s: seconds without a pass of any stage of this rank, as far as they count to this stage.
        span_s: the window, the same for all ranks.
    """

    stage: int
    rank: int
    busy_s: float
    idle_s: float
    span_s: float


def summarize(spans: Sequence[Span], span_s: float = 0.0) -> list[StageTimes]:
    """Busy and idle time of every stage on every rank, by stage, then rank. Empty for no spans.

    Args:
        spans: of all ranks.
        span_s: the end of the step, where that is later than the last pass.
    """
    if not spans:
        return []
    start = min(0.0, *(span.start_s for span in spans))
    end = max(span_s, *(span.end_s for span in spans))
    busy: defaultdict[tuple[int, int], float] = defaultdict(float)
    idle: defaultdict[tuple[int, int], float] = defaultdict(float)
    for rank, own in _by_rank(spans).items():
        reached = start
        for span in own:
            idle[span.stage, rank] += max(0.0, span.start_s - reached)
            busy[span.stage, rank] += max(0.0, span.end_s - max(reached, span.start_s))
            reached = max(reached, span.end_s)
        last = max(own, key=lambda span: span.end_s)
        idle[last.stage, rank] += end - reached
    return [StageTimes(*key, busy[key], idle[key], end - start) for key in sorted(busy)]


def bubble_fraction(times: Sequence[StageTimes]) -> float:
    """Idle time of all ranks over ranks times the window; 0 for nothing."""
    window = sum({entry.rank: entry.span_s for entry in times}.values())
    return sum(entry.idle_s for entry in times) / window if window else 0.0


def timeline_record(
    layout: Layout, spans: Sequence[Span], *, step: int, span_s: float = 0.0, planned: Sequence[Span] = ()
) -> dict[str, Any]:
    """The line `timeline` of metrics.jsonl.

    Up to 64 ranks are kept, beyond that those of the first replica (dp 0, tp 0), and of more than 1024 passes those of
    the first micro-batches; times of stages are over all the passes of the ranks that are kept.

    Args:
        layout: of the run.
        spans: measured, of all ranks.
        step: the step that was measured.
        span_s: its end, where that is later than the last pass.
        planned: what a plan or a simulator says, on the same ranks or on the first of each stage.
    """
    kept, kept_plan = ([span for span in these if _is_kept(layout, span.rank)] for these in (spans, planned))
    return {
        "kind": "timeline",
        "step": step,
        "world_size": layout.world_size,
        "layout": layout_fields(layout),
        "bubble": bubble_fraction(summarize(spans, span_s)),
        "stages": [_stage_fields(layout, times) for times in summarize(kept, max(span_s, _end(spans)))],
        "num_passes": len(kept),
        "spans": _encode(kept),
        "planned_stages": [_stage_fields(layout, times) for times in summarize(kept_plan)],
        "planned_spans": _encode(kept_plan),
    }


def layout_fields(layout: Layout) -> dict[str, Any]:
    """A layout in plain words, for a record or a table."""
    return {
        "pp": layout.pp, "dp": layout.dp, "tp": layout.tp, "expert": str(layout.expert),
        "dispatch": str(layout.dispatch), "schedule": str(layout.schedule),
        "split": [size / 2 for size in layout.stages.sizes], "recompute": list(layout.recompute),
    }  # fmt: skip


def read_spans(rows: object) -> list[Span]:
    """The spans of a record that anybody may have written. Raises FormatError for what is none."""
    if not isinstance(rows, list):
        raise FormatError("a timeline's spans are a list")
    return [_read(row) for row in rows]


def _encode(spans: Iterable[Span]) -> list[list[Any]]:
    """Rows of [stage, rank, kind, micro, start_s, end_s] in order of time, to the microsecond."""
    rows = sorted(spans, key=lambda span: (span.micro, span.start_s))[:MAX_SPANS]
    rows.sort(key=lambda span: (span.start_s, span.rank))
    return [[s.stage, s.rank, s.kind, s.micro, round(s.start_s, 6), round(s.end_s, 6)] for s in rows]


def _read(row: object) -> Span:
    if not isinstance(row, list) or len(row) != len(Span._fields):
        raise FormatError("a span is [stage, rank, kind, micro, start_s, end_s]")
    stage, rank, kind, micro, start, end = row
    whole = all(type(value) is int and 0 <= value < 1e9 for value in (stage, rank, micro))
    timed = all(type(value) in (int, float) and 0 <= value < 1e9 for value in (start, end)) and start <= end
    if not whole or not timed or kind not in get_args(PassKind):
        raise FormatError(f"this is no span: {str(row)[:80]}")
    return Span(stage, rank, kind, micro, float(start), float(end))


def _by_rank(spans: Sequence[Span]) -> Mapping[int, list[Span]]:
    ranks: defaultdict[int, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: (span.start_s, span.end_s)):
        ranks[span.rank].append(span)
    return ranks


def _end(spans: Sequence[Span]) -> float:
    return max((span.end_s for span in spans), default=0.0)


def _is_kept(layout: Layout, rank: int) -> bool:
    place: Coordinate = layout.coordinate(rank)
    return layout.world_size <= MAX_RANKS or (place.dp == 0 and place.tp == 0)


def _stage_fields(layout: Layout, times: StageTimes) -> dict[str, Any]:
    return {
        "stage": times.stage,
        "rank": times.rank,
        "layers": layout.stages.sizes[times.stage] / 2,
        "recompute": layout.recompute[times.stage],
        "busy_s": round(times.busy_s, 6),
        "idle_s": round(times.idle_s, 6),
    }
