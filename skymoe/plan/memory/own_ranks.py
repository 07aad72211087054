"""The peak of every pipeline rank of our runtime, followed through the backward pass of one micro-batch.

`rank_memory` adds the largest transient to all that is kept, which is safe and what the solver promises. Really, when
a layer runs backward, what the layers after it kept for this micro-batch is gone:

    peak = static + sum_s alive_s held_s + max over parts p of a stage ( running_p + again_p - held of parts after p )

with held_p what a part keeps (its input, if it is run again whole) and again_p the rest of it, where it is run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from skymoe.plan.memory.alive import alive_counts
from skymoe.plan.memory.own import WIDE
from skymoe.plan.memory.sizes import RankMemory, Size, Sizes
from skymoe.plan.work import Work
from skymoe.spec.layout import ScheduleKind
from skymoe.spec.split import Split


@dataclass(frozen=True)
class _Part:
    """A layer, or the half of it that a stage has, or an end."""

    sizes: tuple[Size, ...]
    held: float
    again: float
    running: float


def own_memory(
    work: Work, sizes: Sizes, stages: Split, recompute: Sequence[int], *, schedule: ScheduleKind
) -> tuple[RankMemory, ...]:
    """The peak of every pipeline rank; `sizes` from `own_sizes`, the rest as in `rank_memory`."""
    pp, num_stages = work.division.pp, stages.num_ranks
    parts = [_parts(sizes, stages, stage, recompute[stage]) for stage in range(num_stages)]
    counts = alive_counts(schedule, pp, num_stages, work.num_micro)
    sent = WIDE * work.tokens * work.shape.hidden_size
    sent /= work.division.tp if work.division.sequence_parallel else 1
    found = []
    for rank in range(pp):
        zero_bubble = schedule is ScheduleKind.ZERO_BUBBLE and pp > 1
        own = (rank, 2 * pp - 1 - rank) if zero_bubble else tuple(range(rank, num_stages, pp))
        held = [sum(p.held for p in parts[stage]) + (sent if stage < num_stages - 1 else 0.0) for stage in own]
        static = [size for stage in own for part in parts[stage] for size in part.sizes]
        found.append(
            RankMemory(
                weights=sum(size.weights for size in static),
                gradients=sum(size.gradients for size in static),
                optimizer=sum(size.optimizer for size in static),
                activations=max(sum(n * h for n, h in zip(alive, held, strict=True)) for alive in counts[rank]),
                transient=max(_extra(parts[stage]) for stage in own),
                reserve=sizes.reserve,
            )
        )
    return tuple(found)


def _parts(sizes: Sizes, stages: Split, stage: int, again: int) -> list[_Part]:
    units = stages.part(stage)
    layers = sorted({unit // 2 for unit in units})
    parts = [_end(sizes.embedding)] if stage == 0 else []
    for place, layer in enumerate(layers):
        halves = tuple(sizes.halves[unit] for unit in units if unit // 2 == layer)
        whole, running = sum(half.activation for half in halves), max(half.transient for half in halves)
        if place < again:
            checkpoint = halves[0].checkpoint
            parts.append(_Part(halves, checkpoint, whole - checkpoint, running))
        else:
            parts.append(_Part(halves, whole, 0.0, running))
    return [*parts, _end(sizes.head)] if stage == stages.num_ranks - 1 else parts


def _end(size: Size) -> _Part:
    return _Part((size,), size.activation, 0.0, size.transient)


def _extra(parts: Sequence[_Part]) -> float:
    worst, gone = 0.0, 0.0
    for part in reversed(parts):
        worst = max(worst, part.running + part.again - gone)
        gone += part.held
    return worst
