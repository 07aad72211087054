"""Communication of weights and gradients between replicas: once per step (ZeRO-1, 2), or layer by layer (ZeRO-3, FSDP).

A part of the model has dense parameters, which dp x cp ranks repeat, and experts, which fewer ranks repeat
(`memory/static.py` counts both). Each kind has its group. With `zero_ranks` Z smaller than the group, gradients are
reduce-scattered within Z and the shards all-reduced between the groups of Z; weights are gathered within Z only.

FSDP without a pipeline gathers a layer's weights before its forward and before its backward, and reduce-scatters its
gradients after it, in every micro-batch; the layer beside it is computed meanwhile, so what counts is

    exposed(gather, forward of a layer) + exposed(gather + reduce, backward of a layer)

With a pipeline, weights stay gathered during the step and gradients are reduced after the last micro-batch (torchtitan
does so), as under ZeRO-1. Left out: the first layer's gather, which nothing hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from skymoe.plan.cost.bill import Frame
from skymoe.plan.cost.collectives import Group, exposed
from skymoe.plan.cost.prices import Price
from skymoe.plan.memory.static import (
    Parameters,
    embedding_parameters,
    head_parameters,
    layer_parameters,
)
from skymoe.plan.shape import LayerShape
from skymoe.spec.layout import ScheduleKind, stage_owner
from skymoe.spec.split import Split


@dataclass(frozen=True)
class Replicas:
    """Ranks that repeat the same parameters.

    Attributes:
        shard: those among which they are divided, neighbours.
        across: the same shard in the other groups.
    """

    shard: Group
    across: Group

    @classmethod
    def of(cls, group: Group, zero_ranks: int | None, *, divided: bool) -> Replicas:
        """`group` in parts of `zero_ranks`; not `divided` (ZeRO-0): parts of one."""
        size = min(group.ranks, zero_ranks or group.ranks) if divided else 1
        across = Group(group.cluster, max(1, group.ranks // size), group.stride * size)
        return cls(Group(group.cluster, size, group.stride), across)

    def reduce_s(self, size: float) -> float:
        """Gradients of `size` bytes to their owners."""
        return self.shard.reduce_scatter(size) + self.across.all_reduce(size / self.shard.ranks)

    def gather_s(self, size: float) -> float:
        """Weights of `size` bytes from their owners."""
        return self.shard.all_gather(size)


@dataclass(frozen=True)
class Sharding:
    """Of one work."""

    frame: Frame

    @cached_property
    def layer_by_layer(self) -> bool:
        """FSDP without a pipeline."""
        division = self.frame.work.division
        return division.zero_stage >= 3 and division.pp == 1

    @cached_property
    def groups(self) -> tuple[Replicas, Replicas]:
        """Of dense parameters, of experts."""
        division = self.frame.work.division
        dense, experts = (
            Replicas.of(group, division.zero_ranks, divided=division.zero_stage >= 1)
            for group in (self.frame.data, self.frame.expert_data)
        )
        return dense, experts

    def reduce_s(self, parameters: Parameters) -> float:
        """Their gradients to the owners."""
        size = self.frame.work.division.gradient_bytes
        dense, experts = self.groups
        return dense.reduce_s(size * parameters.dense) + experts.reduce_s(size * parameters.experts)

    def gather_s(self, parameters: Parameters) -> float:
        """They themselves from the owners."""
        size = self.frame.work.division.weight_bytes
        dense, experts = self.groups
        return dense.gather_s(size * parameters.dense) + experts.gather_s(size * parameters.experts)

    def owned(self, parameters: Parameters) -> float:
        """How many of them one rank updates."""
        dense, experts = self.groups
        return parameters.dense / dense.shard.ranks + parameters.experts / experts.shard.ranks

    def halves(self, layer: LayerShape) -> tuple[Parameters, Parameters]:
        """Attention and feed-forward on the fullest rank."""
        return layer_parameters(layer, self.frame.hidden, self.frame.work.division)

    def ends(self) -> tuple[Parameters, Parameters]:
        """Embedding and head on the fullest rank."""
        shape, division = self.frame.work.shape, self.frame.work.division
        return embedding_parameters(shape, division.tp), head_parameters(shape, division)

    def per_rank(self, stages: Split, schedule: ScheduleKind) -> tuple[Parameters, ...]:
        """Of each pipeline rank: halves of its stages, the ends on the first and the last stage."""
        pp, layers = self.frame.work.division.pp, self.frame.work.shape.layers
        known = {layer: self.halves(layer) for layer in set(layers)}
        listed = [half for layer in layers for half in known[layer]]
        dense, experts = [0.0] * pp, [0.0] * pp
        for stage, part in enumerate(stages):
            rank = stage_owner(schedule, pp, stage)
            own = listed[part.start : part.stop]
            dense[rank] += sum(half.dense for half in own)
            experts[rank] += sum(half.experts for half in own)
        embedding, head = self.ends()
        dense[0] += embedding.dense
        last = stage_owner(schedule, pp, stages.num_ranks - 1)
        if last or not self.frame.work.shape.tied:  # under zbv the first rank has both ends, of a tied table one
            dense[last] += head.dense
        return tuple(Parameters(dense=d, experts=e) for d, e in zip(dense, experts, strict=True))


def with_gathers(sharding: Sharding, parts: Sequence[Price], owned: Sequence[Parameters]) -> tuple[Price, ...]:
    """Prices of the parts of one layer with FSDP's communication, each in proportion to its weights."""
    if not sharding.layer_by_layer or sharding.groups[0].shard.ranks == 1:
        return tuple(parts)
    division = sharding.frame.work.division
    gathers = [sharding.gather_s(own) for own in owned]
    reduces = [sharding.reduce_s(own) for own in owned]
    overlap = 1.0 if division.overlap else 0.0
    forward = exposed(sum(gathers), overlap * sum(part.forward_s for part in parts))
    backward = exposed(sum(gathers) + sum(reduces), overlap * sum(part.backward_s for part in parts))
    total = sum(own.total for own in owned) or 1.0
    return tuple(
        replace(
            part,
            forward_s=part.forward_s + forward * own.total / total,
            backward_s=part.backward_s + backward * own.total / total,
            parts={**part.parts, "weights": (forward + backward) * own.total / total},
        )
        for part, own in zip(parts, owned, strict=True)
    )
