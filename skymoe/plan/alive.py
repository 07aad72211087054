"""What the ranks of a pipeline keep, over time: micro-batches alive per stage, and bytes.

A micro-batch is alive in a stage from the start of its forward pass to the end of its backward pass: of the weights'
part, where a schedule has that apart. Between the two parts a stage may keep less (Qi et al. 2024, table 1: the inputs
of the matrix products, without what only the way back needs); `weight_bytes` says how much.

A closed form (min(P - s, m) under 1F1B) is what a solver asks for; this counts what a timeline really does, whatever
its order. What it leaves out: a pass takes and gives back its memory at its ends, not layer by layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from skymoe.plan.timeline import Timeline
from skymoe.spec.timeline import Span


class Level(NamedTuple):
    """From `at_s` on a rank holds `size`: bytes, or whatever `stage_bytes` is in."""

    at_s: float
    size: float


def peak_alive(timeline: Timeline) -> tuple[int, ...]:
    """The largest number of micro-batches alive in each stage."""
    peaks = {stage: number for stages in alive(timeline).values() for stage, number in stages.items()}
    return tuple(peaks[stage] for stage in sorted(peaks))


def alive(timeline: Timeline) -> dict[int, dict[int, int]]:
    """Per rank, the largest number of micro-batches alive in each of its stages.

    Those of two stages of one rank need not come at the same time: `memory_over_time` adds them up as they do.
    """
    peaks: dict[int, dict[int, int]] = {}
    for (rank, stage), changes in sorted(_changes(timeline, None, None, None).items()):
        peaks.setdefault(rank, {})[stage] = round(max(level.size for level in _levels(changes, 0.0)))
    return peaks


def memory_over_time(
    timeline: Timeline,
    stage_bytes: Sequence[float],
    static: Sequence[float] | None = None,
    *,
    weight_bytes: Sequence[float] | None = None,
    running_bytes: Sequence[float] | None = None,
) -> dict[int, tuple[Level, ...]]:
    """What each rank holds, from change to change.

    Args:
        timeline: simulated or measured.
        stage_bytes: of each stage, for one micro-batch that is alive.
        static: of each rank, in order: what it holds all the time.
        weight_bytes: of each stage, for one micro-batch between the two parts of its backward pass; None means that
            all of `stage_bytes` stays.
        running_bytes: of each stage, while one of its passes runs (logits, a layer that is run again).
    """
    changes: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
    for (rank, _), own in _changes(timeline, stage_bytes, weight_bytes, running_bytes).items():
        changes[rank] += own
    ranks = sorted(changes)
    base = static or [0.0] * len(ranks)
    return {rank: _levels(changes[rank], size) for rank, size in zip(ranks, base, strict=True)}


def peak_memory(
    timeline: Timeline,
    stage_bytes: Sequence[float],
    static: Sequence[float] | None = None,
    *,
    weight_bytes: Sequence[float] | None = None,
    running_bytes: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """The most that each rank holds, in order of ranks. Arguments as for `memory_over_time`."""
    levels = memory_over_time(
        timeline, stage_bytes, static, weight_bytes=weight_bytes, running_bytes=running_bytes
    )  # fmt: skip
    return tuple(max(level.size for level in own) for own in levels.values())


def _changes(
    timeline: Timeline,
    stage_bytes: Sequence[float] | None,
    weight_bytes: Sequence[float] | None,
    running_bytes: Sequence[float] | None,
) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """(time, change) by rank and stage; in units of micro-batches where no bytes are given."""
    changes: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for span in timeline.spans:
        size = 1.0 if stage_bytes is None else stage_bytes[span.stage]
        kept = size if weight_bytes is None else weight_bytes[span.stage]
        own = changes[span.rank, span.stage]
        own.append(_change(span, size, kept))
        if running_bytes is not None and running_bytes[span.stage]:
            own += [(span.start_s, running_bytes[span.stage]), (span.end_s, -running_bytes[span.stage])]
    return changes


def _change(span: Span, size: float, kept: float) -> tuple[float, float]:
    if span.kind == "F":
        return span.start_s, size
    freed = {"B": size, "I": size - kept, "W": kept}[span.kind]
    return span.end_s, -freed


def _levels(changes: list[tuple[float, float]], base: float) -> tuple[Level, ...]:
    """What ends at a moment is given back before what begins in it is taken."""
    levels, size = [Level(0.0, base)], base
    for at, change in sorted(changes):
        size += change
        if levels[-1].at_s == at and change > 0:
            levels[-1] = Level(at, size)
        else:
            levels.append(Level(at, size))
    return tuple(levels)
