"""The line `timeline` of metrics.jsonl as plain data, whoever wrote it; and where its passes lie in a drawing.

Shapes: none; times are seconds from the start of the step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from skymoe.base.errors import FormatError, printable
from skymoe.report.metrics import number
from skymoe.spec.timeline import Span, read_spans, summarize

MAX_ROWS = 32
_MAX_DRAWN = 1024
_MAX_STAGES = 4096


@dataclass(frozen=True)
class StageRow:
    """One stage on one rank. `layers` counts halves of layers as 0.5; None where the line does not say."""

    stage: int
    rank: int
    layers: float | None
    recompute: float | None
    busy_s: float
    idle_s: float


@dataclass(frozen=True)
class Timeline:
    """What a run's last timeline says.

    Attributes:
        step: the step that was measured.
        world_size: ranks of the run, of which a large one keeps only some.
        layout: name -> value, as words.
        stages, spans: measured.
        planned_stages, planned_spans: what a plan or the simulator said, empty without one.
        num_passes: how many there were on the ranks of `stages`, of which `spans` holds the first micro-batches'.
        bubble, planned_bubble: idle part of all ranks' time; None without a plan.
    """

    step: int
    world_size: int
    layout: dict[str, str]
    stages: tuple[StageRow, ...]
    spans: tuple[Span, ...]
    planned_stages: tuple[StageRow, ...]
    planned_spans: tuple[Span, ...]
    num_passes: int
    bubble: float
    planned_bubble: float | None


@dataclass(frozen=True)
class Drawing:
    """The passes of one step, ready to be placed.

    Attributes:
        ranks: rows, top to bottom.
        spans: of these ranks only.
        chunk: (rank, stage) -> how many of the rank's stages come before it in the model.
        end_s: right end of the time axis.
        left_out: ranks of the line that have no row.
    """

    ranks: tuple[int, ...]
    spans: tuple[Span, ...]
    chunk: dict[tuple[int, int], int]
    end_s: float
    left_out: int


def read_timeline(record: dict[str, Any], notes: list[str]) -> Timeline | None:
    """The timeline of a line; None with a note when it cannot be used."""
    try:
        return _read(record)
    except FormatError as error:
        notes.append(f"the timeline of step {printable(record.get('step'), 20)} could not be read: {error.what}")
        return None


def draw(spans: Sequence[Span]) -> Drawing:
    """Rows and boxes of `spans`: at most 32 ranks."""
    every = sorted({span.rank for span in spans})
    ranks = every[:MAX_ROWS]
    kept = tuple(span for span in spans if span.rank <= ranks[-1])
    stages: defaultdict[int, set[int]] = defaultdict(set)
    for span in kept:
        stages[span.rank].add(span.stage)
    chunk = {(rank, stage): place for rank, own in stages.items() for place, stage in enumerate(sorted(own))}
    return Drawing(tuple(ranks), kept, chunk, max(span.end_s for span in kept), len(every) - len(ranks))


def by_stage(rows: Sequence[StageRow]) -> list[tuple[StageRow, ...]]:
    """The rows of each stage, one for each of its ranks."""
    return _grouped((row.stage, row) for row in rows)


def by_rank(rows: Sequence[StageRow]) -> list[tuple[StageRow, ...]]:
    """The rows of each rank, one for each of its stages."""
    return _grouped((row.rank, row) for row in rows)


def _grouped(pairs: Iterable[tuple[int, StageRow]]) -> list[tuple[StageRow, ...]]:
    groups: defaultdict[int, list[StageRow]] = defaultdict(list)
    for key, row in pairs:
        groups[key].append(row)
    return [tuple(group) for _, group in sorted(groups.items())]


def _read(record: dict[str, Any]) -> Timeline:
    spans = tuple(read_spans(record.get("spans"))[:_MAX_DRAWN])
    planned = tuple(read_spans(record.get("planned_spans") or [])[:_MAX_DRAWN])
    stages = _rows(record.get("stages"), spans)
    if not spans or not stages:
        raise FormatError("it has no passes")
    planned_stages = _rows(record.get("planned_stages"), planned)
    layout = record.get("layout")
    measured = number(record.get("bubble"))
    return Timeline(
        step=_whole(record.get("step")),
        world_size=max(1, _whole(record.get("world_size"))),
        layout={str(k): _words(v) for k, v in list(layout.items())[:40]} if isinstance(layout, dict) else {},
        stages=stages,
        spans=spans,
        planned_stages=planned_stages,
        planned_spans=planned,
        num_passes=max(len(spans), _whole(record.get("num_passes"))),
        bubble=bubble(stages) if measured is None else measured,
        planned_bubble=bubble(planned_stages) if planned_stages else None,
    )


def _rows(data: object, spans: Sequence[Span]) -> tuple[StageRow, ...]:
    """The table of stages; from the passes themselves where there is none."""
    if not isinstance(data, list) or not data:
        return tuple(StageRow(t.stage, t.rank, None, None, t.busy_s, t.idle_s) for t in summarize(spans))
    rows = []
    for entry in data[:_MAX_STAGES]:
        values = [number(entry.get(name)) for name in ("stage", "rank", "busy_s", "idle_s")] if _is_dict(entry) else []
        if not values or any(value is None or value < 0 for value in values):
            raise FormatError("a stage has no stage, rank, busy_s and idle_s")
        stage, rank, busy, idle = (float(value) for value in values if value is not None)
        rows.append(
            StageRow(int(stage), int(rank), number(entry.get("layers")), number(entry.get("recompute")), busy, idle)
        )
    return tuple(rows)


def bubble(rows: Sequence[StageRow]) -> float:
    """Idle part of the time of `rows`."""
    whole = sum(row.busy_s + row.idle_s for row in rows)
    return sum(row.idle_s for row in rows) / whole if whole else 0.0


def _is_dict(entry: object) -> bool:
    return isinstance(entry, dict)


def _whole(value: object) -> int:
    result = number(value)
    return 0 if result is None else int(result)


def _words(value: object) -> str:
    items = value if isinstance(value, list) else [value]
    return ", ".join(f"{x:g}" if (x := number(item)) is not None else str(item)[:40] for item in items[:200])
