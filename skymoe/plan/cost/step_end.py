"""The end of a step: gradients to their owners, the optimizer, weights back.

What hides the communication is little: gradients are complete only in the last micro-batch's backward, weights are
needed in the first one's forward, so with m micro-batches over P stages the cover is 2/3 and 1/3 of one slot,
pipeline_s / (m + P - 1); all of the rest is exposed. With V chunks per rank the last
backwards of a chunk take P micro-batches before the next chunk's begin, so what is complete of all chunks but the last
travels behind (V-1)/V of min(P, m) slots. The slowest pipeline rank counts.

The optimizer is a stream: per parameter that a rank owns it reads and writes its state and reads the gradient twice
(norm, update) and writes the weight; gradients of all a rank holds are cleared. A tied table of a pipeline adds an
all-reduce between the first and the last stage, which nothing hides; under zbv one rank has both, and one table. Left
out: gradient norms' small all-reduces.
"""

from __future__ import annotations

from skymoe.plan.cost.bill import Frame
from skymoe.plan.cost.collectives import Group, exposed
from skymoe.plan.cost.prices import StepEnd
from skymoe.plan.cost.sharding import Sharding
from skymoe.plan.memory.static import Parameters
from skymoe.plan.work import Work
from skymoe.spec.layout import ScheduleKind, stage_owner
from skymoe.spec.split import Split

_UPDATE_KERNELS = 8


def step_end(
    work: Work, stages: Split, *, pipeline_s: float, schedule: ScheduleKind | None = None, update_s: float | None = None
) -> StepEnd:
    """What a step costs beside its micro-batches, on the slowest pipeline rank.

    Args:
        work: the work.
        stages: halves per stage.
        pipeline_s: time of the micro-batches, part of which hides communication.
        schedule: which rank has which stage; None: stage s is on rank s mod pp.
        update_s: of the optimizer per parameter, where it was measured.
    """
    frame = Frame(work)
    sharding = Sharding(frame)
    schedule = schedule or ScheduleKind.ONE_F_ONE_B
    tied_s = _tied(frame, apart=stage_owner(schedule, work.division.pp, stages.num_ranks - 1) != 0)
    ends = [_end(sharding, own, pipeline_s, update_s, tied_s) for own in set(sharding.per_rank(stages, schedule))]
    return max(ends, key=lambda end: end.total_s)


def _end(
    sharding: Sharding, own: Parameters, pipeline_s: float, update_s: float | None, tied_s: float
) -> StepEnd:  # fmt: skip
    frame, work = sharding.frame, sharding.frame.work
    division = work.division
    reduce_s = gather_s = 0.0
    if not sharding.layer_by_layer:
        reduce_s, gather_s = sharding.reduce_s(own), sharding.gather_s(own)
    elif sharding.groups[0].across.ranks > 1:  # hybrid: shards are summed between groups once per step
        shards, across = sharding.groups[0].shard.ranks, sharding.groups[0].across
        reduce_s = across.all_reduce(division.gradient_bytes * own.dense / shards)
    cover = _slots(work) * pipeline_s / max(1, work.num_micro + division.pp - 1) if division.overlap else 0.0
    exposed_s = exposed(reduce_s, 2 / 3 * cover) + exposed(gather_s, cover / 3) + tied_s
    owned = sharding.owned(own)
    moved = owned * (2 * division.optimizer_bytes + 2 * division.gradient_bytes + division.weight_bytes)
    moved += (owned if division.zero_stage >= 2 else own.total) * division.gradient_bytes
    measured = None if update_s is None else owned * update_s
    return StepEnd(
        reduce_s=reduce_s,
        gather_s=gather_s,
        exposed_s=exposed_s,
        update_s=frame.kernels.memory(moved, _UPDATE_KERNELS) if measured is None else measured,
    )


def _slots(work: Work) -> float:
    """Micro-batches of one rank behind which gradients and weights travel."""
    share = 1.0 / max(1, work.chunks)
    return share + (1.0 - share) * min(work.division.pp, work.num_micro)


def _tied(frame: Frame, *, apart: bool) -> float:
    """The gradient of a table that is embedding and head, of stages that are `apart` on two ranks."""
    work, division = frame.work, frame.work.division
    if not work.shape.tied or not apart:
        return 0.0
    rows = Split.remainder_first(work.shape.vocab_size, division.tp).sizes[0]
    pair = Group(work.cluster, 2, division.stage_ranks * (division.pp - 1))
    return pair.all_reduce(rows * frame.hidden * division.gradient_bytes)
