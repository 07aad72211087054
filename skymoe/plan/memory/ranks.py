"""The peak of every rank of a pipeline.

    peak = static + max over moments ( sum over its stages alive_s * kept_s ) + what runs + reserve

A micro-batch leaves in a stage what its layers keep, and only the input of those that are run again whole; "what runs"
is the largest of: a layer that is made again, gathered (ZeRO-3) or exchanges its tokens; the head with logits and
their gradient. They never run at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skymoe.plan.memory.alive import alive_counts
from skymoe.plan.memory.sizes import RankMemory, Size, Sizes
from skymoe.plan.work import Work
from skymoe.spec.layout import ScheduleKind
from skymoe.spec.split import Split


@dataclass(frozen=True)
class _Stage:
    """`parts` stay; `kept` is of one micro-batch; `transient` is the largest that runs."""

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
    parts = [_stage(sizes, stages, stage, recompute[stage]) for stage in range(stages.num_ranks)]
    if alive is None:
        moments = alive_counts(schedule, pp, stages.num_ranks, work.num_micro)
    else:
        owned = [_stages_of(schedule, pp, stages.num_ranks, rank) for rank in range(pp)]
        moments = tuple((tuple(alive[stage] for stage in own),) for own in owned)
    return tuple(
        _rank(sizes, [parts[stage] for stage in _stages_of(schedule, pp, len(parts), rank)], moments[rank])
        for rank in range(pp)
    )


def _stages_of(schedule: ScheduleKind, pp: int, num_stages: int, rank: int) -> tuple[int, ...]:
    if schedule is ScheduleKind.ZERO_BUBBLE and pp > 1:
        return (rank, 2 * pp - 1 - rank)
    return tuple(range(rank, num_stages, pp))


def _stage(sizes: Sizes, stages: Split, stage: int, again: int) -> _Stage:
    units = stages.part(stage)
    parts = [sizes.halves[unit] for unit in units]
    layers = [unit // 2 for unit in units]
    first_kept = layers[0] + again if layers else 0
    kept, transient = 0.0, 0.0
    for layer in dict.fromkeys(layers):
        halves = [half for half, its in zip(parts, layers, strict=True) if its == layer]
        whole, runs = sum(half.activation for half in halves), max(half.transient for half in halves)
        checkpoint = halves[0].checkpoint
        kept += checkpoint if layer < first_kept else whole
        transient = max(transient, runs + (max(0.0, whole - checkpoint) if layer < first_kept else 0.0))
    ends = [sizes.embedding] if stage == 0 else []
    if stage == stages.num_ranks - 1:
        ends.append(sizes.head)
    kept += sum(end.activation for end in ends)
    return _Stage((*parts, *ends), kept, max([transient, *(end.transient for end in ends)]))


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
