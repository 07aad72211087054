"""The peak of every rank of a pipeline.

    peak = static + max over moments ( sum over its stages alive_s * kept_s ) + what runs + reserve

A micro-batch leaves in a stage what its layers keep, and only the input of those that are run again whole. "What runs"
is a layer that is made again, gathered (ZeRO-3) or exchanges its tokens, the head with logits and their gradient, the
gradient of the embedding: never two at once, and each meets only what the backward pass of its micro-batch has not let
go yet. The most is at the beginning of a backward pass, or where a part needs more than those behind it have freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from skymoe.plan.memory.alive import alive_counts
from skymoe.plan.memory.sizes import RankMemory, Size, Sizes
from skymoe.plan.work import Work
from skymoe.spec.layout import ScheduleKind, stages_of_rank
from skymoe.spec.split import Split


@dataclass(frozen=True)
class _Stage:
    """`parts` stay; `kept` is of one micro-batch; `transient` is the most on top of all that is kept."""

    parts: tuple[Size, ...]
    kept: float
    transient: float


def rank_memory(
    work: Work,
    sizes: Sizes,
    stages: Split,
    recompute: Sequence[int],
    *,
    schedule: ScheduleKind,
    alive: Sequence[int] | None = None,
) -> tuple[RankMemory, ...]:
    """The peak of every pipeline rank.

    Args:
        work: what runs.
        sizes: of its parts.
        stages: halves per stage.
        recompute: layers per stage that are run again whole, the first ones.
        schedule: of the pipeline.
        alive: micro-batches alive per stage, where the schedule's own counts are not meant.
    """
    pp = work.division.pp
    if schedule is ScheduleKind.ZERO_BUBBLE and work.shape.tied:  # both ends are on one rank, and so is the table
        sizes = replace(sizes, head=replace(sizes.head, weights=0.0, gradients=0.0, optimizer=0.0))
    parts = [_stage(sizes, stages, stage, recompute[stage]) for stage in range(stages.num_ranks)]
    if alive is None:
        moments = alive_counts(schedule, pp, stages.num_ranks, work.num_micro)
    else:
        owned = [stages_of_rank(schedule, pp, stages.num_ranks, rank) for rank in range(pp)]
        moments = tuple((tuple(alive[stage] for stage in own),) for own in owned)
    return tuple(
        _rank(sizes, [parts[stage] for stage in stages_of_rank(schedule, pp, len(parts), rank)], moments[rank])
        for rank in range(pp)
    )


def _stage(sizes: Sizes, stages: Split, stage: int, again: int) -> _Stage:
    """Walk the stage backwards, as the backward pass does: what runs meets what is not let go yet."""
    units = stages.part(stage)
    parts = [sizes.halves[unit] for unit in units]
    layers = [unit // 2 for unit in units]
    first_kept = layers[0] + again if layers else 0
    is_last = stage == stages.num_ranks - 1
    kept, transient = (sizes.head.activation, sizes.head.transient) if is_last else (0.0, 0.0)
    for layer in reversed(dict.fromkeys(layers)):
        halves = [half for half, its in zip(parts, layers, strict=True) if its == layer]
        if layer < first_kept:
            whole, checkpoint = sum(half.activation for half in halves), halves[0].checkpoint
            runs = max(0.0, whole - checkpoint) + max(half.transient for half in halves)
            transient, kept = max(transient, runs - kept), kept + checkpoint
            continue
        for half in reversed(halves):
            # A half that is alone in its stage keeps its input, also where a whole layer would keep only the first's.
            own = half.activation if len(halves) == 2 else max(half.activation, half.checkpoint)
            transient, kept = max(transient, half.transient - kept), kept + own
    ends = [sizes.head] if is_last else []
    if stage == 0:
        ends.append(sizes.embedding)
        transient, kept = max(transient, sizes.embedding.transient - kept), kept + sizes.embedding.activation
    return _Stage((*parts, *ends), kept + (0.0 if is_last else sizes.boundary), transient)


def _rank(sizes: Sizes, stages: Sequence[_Stage], moments: Sequence[tuple[int, ...]]) -> RankMemory:
    parts = [part for stage in stages for part in stage.parts]
    return RankMemory(
        weights=sum(part.weights for part in parts),
        gradients=sum(part.gradients for part in parts),
        optimizer=sum(part.optimizer for part in parts),
        activations=max(
            sum(count * stage.kept for count, stage in zip(counts, stages, strict=True)) for counts in moments
        ),
        transient=max(stage.transient for stage in stages),
        reserve=sizes.reserve,
    )
