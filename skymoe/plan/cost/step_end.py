"""The end of a step: gradients to their owners, the optimizer, weights back."""

from __future__ import annotations

import math
from dataclasses import dataclass

from skymoe.plan.cost.bill import Frame
from skymoe.plan.cost.collectives import exposed
from skymoe.plan.cost.prices import StepEnd
from skymoe.plan.shape import ModelShape
from skymoe.plan.work import Division, Work
from skymoe.spec.split import Split


@dataclass(frozen=True)
class Parameters:
    """Of one rank: what all its replicas hold (dense), and what only expert replicas hold."""

    dense: float
    experts: float


def step_end(work: Work, stages: Split, *, pipeline_s: float) -> StepEnd:
    """What a step costs beside its micro-batches, on the slowest pipeline rank.

    Args:
        work: the work.
        stages: halves per stage; stage s is on pipeline rank s mod pp.
        pipeline_s: time of the micro-batches, part of which hides communication.
    """
    frame = Frame(work)
    ends = [_end(frame, own, pipeline_s) for own in rank_parameters(work.shape, work.division, stages)]
    return max(ends, key=lambda end: end.total_s)


def rank_parameters(shape: ModelShape, division: Division, stages: Split) -> tuple[Parameters, ...]:
    """Parameters of each pipeline rank."""
    hidden, tp = shape.hidden_size, division.tp
    dense, experts = [0.0] * division.pp, [0.0] * division.pp
    for stage, part in enumerate(stages):
        rank = stage % division.pp
        for unit in part:
            layer = shape.layers[unit // 2]
            if unit % 2 == 0:
                dense[rank] += layer.attention.parameters(hidden) / tp
                continue
            dense[rank] += layer.ffn.other_parameters(hidden) / tp
            if layer.ffn.is_moe:
                local = math.ceil(layer.ffn.num_experts / division.ep) / layer.ffn.num_experts
                experts[rank] += layer.ffn.expert_parameters(hidden) * local / division.etp
    table = math.ceil(shape.vocab_size / tp) * hidden
    dense[0] += table + shape.positions * hidden
    if not (shape.tied and division.pp == 1):
        dense[(stages.num_ranks - 1) % division.pp] += table
    return tuple(Parameters(*pair) for pair in zip(dense, experts, strict=True))


def _end(frame: Frame, own: Parameters, pipeline_s: float) -> StepEnd:
    division, laws = frame.work.division, frame.work.cluster.gpu.laws
    reduce_s = gather_s = 0.0
    for group, count in ((frame.data, own.dense), (frame.expert_data, own.experts)):
        reduce_s += group.reduce_scatter(division.gradient_bytes * count)
        gather_s += group.all_gather(division.weight_bytes * count)
    cover = pipeline_s / max(1, frame.work.num_micro + division.pp - 1) if division.overlap else 0.0
    exposed_s = exposed(reduce_s, 2 / 3 * cover) + exposed(gather_s, cover / 3)
    shard = sum(count / group.ranks for group, count in ((frame.data, own.dense), (frame.expert_data, own.experts)))
    moved = shard * (2 * division.optimizer_bytes + 2 * division.gradient_bytes + division.weight_bytes)
    moved += (own.dense + own.experts) * division.gradient_bytes
    return StepEnd(
        reduce_s=reduce_s,
        gather_s=gather_s,
        exposed_s=exposed_s,
        update_s=frame.kernels.memory(moved, 4),
        fixed_s=laws.step_overhead_s,
    )
