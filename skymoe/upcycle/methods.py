"""How each method makes one matrix of one expert: one function per method, as an operation of the plan. No torch.

| method | source |
|---|---|
| copy | Komatsuzaki et al. 2022, Sparse Upcycling |
| drop, noise | Nakamura et al. 2025, Drop-Upcycling |
| virtual_group | He et al. 2024, Upcycling LLMs into MoE (Megatron's order of the experts) |
| specialists | Sukhbaatar et al. 2024, Branch-Train-MiX; Skywork-MoE, Appendix C.2 |
| partition | Zhu et al. 2024, LLaMA-MoE |
| duplicate | Dwivedi et al. 2026, Expert Upcycling, and others |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from skymoe.convert.plan import Copy, Operation, Source, Zeros
from skymoe.upcycle.blueprint import Blueprint
from skymoe.upcycle.config import DropIndices, Method, Order, Shared, UpcycleConfig
from skymoe.upcycle.operations import AddNoise, Redraw, Shards
from skymoe.weights.names import Place


class Matrix(StrEnum):
    """One of the three matrices of a SwiGLU feed-forward."""

    GATE = "gate"
    UP = "up"
    DOWN = "down"

    @property
    def axis(self) -> int:
        """Along which the neurons lie: rows of gate and up, columns of down."""
        return 1 if self is Matrix.DOWN else 0


@dataclass(frozen=True)
class Made:
    """What makes a tensor: result number `slot` of `operation`."""

    operation: Operation
    slot: int = 0


@dataclass(frozen=True)
class Expert:
    """One matrix of one expert that is to be made.

    Attributes:
        layer, number: of the expert.
        matrix: which one.
    """

    layer: int
    number: int
    matrix: Matrix

    @property
    def key(self) -> str:
        """Names the expert, for what its three matrices share."""
        return f"layers.{self.layer}.experts.{self.number}"


Sources = Mapping[Place, Source]
Dense = Mapping[str, Source]  # by module name


def make_expert(
    expert: Expert, place: Place, blueprint: Blueprint, config: UpcycleConfig, dense: Sequence[Dense], sources: Sources
) -> Made:
    """What makes `expert`, which lies at `place` of the output.

    Args:
        expert, place: what is wanted.
        blueprint, config: how.
        dense: the tensors that are no experts, of each parent, by module name.
        sources: those of the first parent by place, for `duplicate`.
    """
    if blueprint.shared is Shared.ZERO_ROUTED and expert.matrix is Matrix.DOWN:
        return Made(Zeros())
    match blueprint.method:
        case Method.DUPLICATE:
            return duplicate(place, sources, blueprint)
        case Method.SPECIALISTS:
            return copy(expert, dense[blueprint.assign[expert.number]])
        case Method.COPY:
            return copy(expert, dense[0])
        case Method.DROP:
            return drop(expert, dense[0], config)
        case Method.NOISE:
            return noise(expert, dense[0], config)
        case Method.VIRTUAL_GROUP:
            return virtual_group(expert, dense[0], blueprint)
        case Method.PARTITION:
            return partition(expert, dense[0], blueprint, config)


def copy(expert: Expert, dense: Dense) -> Made:
    """The dense matrix."""
    return Made(Copy(dense_source(expert, dense)))


def drop(expert: Expert, dense: Dense, config: UpcycleConfig) -> Made:
    """The dense matrix with a share of the neurons drawn anew from N(mean, deviation) of what they replace."""
    indices, values = _neuron_keys(expert, config)
    return Made(Redraw(dense_source(expert, dense), expert.matrix.axis, config.ratio, indices, values))


def noise(expert: Expert, dense: Dense, config: UpcycleConfig) -> Made:
    """The dense matrix with noise on a share of the neurons."""
    indices, values = _neuron_keys(expert, config)
    source = dense_source(expert, dense)
    return Made(AddNoise(source, expert.matrix.axis, config.noise_share, indices, values, config.noise_std))


def virtual_group(expert: Expert, dense: Dense, blueprint: Blueprint) -> Made:
    """Shard g of the G shards, where g goes round with the number of the expert: expert e G + g, as in Megatron."""
    scale = blueprint.down_scale if expert.matrix is Matrix.DOWN else blueprint.gate_up_scale
    count = blueprint.shared_shards + blueprint.shards
    slot = blueprint.shared_shards + expert.number % blueprint.shards
    return Made(Shards(dense_source(expert, dense), expert.matrix.axis, count, scale), slot)


def partition(expert: Expert, dense: Dense, blueprint: Blueprint, config: UpcycleConfig) -> Made:
    """Part i of n of the neurons, the same neurons in all three matrices."""
    shuffle = f"{config.seed}/layers.{expert.layer}/neurons" if config.partition_order is Order.RANDOM else ""
    scale = blueprint.down_scale if expert.matrix is Matrix.DOWN else 1.0
    return Made(
        Shards(dense_source(expert, dense), expert.matrix.axis, blueprint.shards, scale, shuffle), expert.number
    )


def duplicate(place: Place, sources: Sources, blueprint: Blueprint) -> Made:
    """Expert i is expert i modulo n of the parent: the first ones come round once more where n does not divide."""
    assert place.expert is not None
    return Made(Copy(sources[replace(place, expert=place.expert % blueprint.parent_experts)]))


def shared_expert(layer: int, matrix: Matrix, dense: Dense, blueprint: Blueprint) -> Made:
    """The shared expert: the whole dense feed-forward, or its first shards; down is doubled, as its gate is 1/2."""
    source = dense[f"layers.{layer}.mlp.{matrix}.weight"]
    scale = 2.0 if matrix is Matrix.DOWN else 1.0
    if blueprint.shared is Shared.ZERO_ROUTED:
        return Made(Copy(source, scale))
    width = blueprint.shared_shards * blueprint.moe.ffn_size
    parts = (range(source.shape[0]), range(width)) if matrix is Matrix.DOWN else (range(width),)
    return Made(Copy(replace(source, parts=parts), scale))


def dense_source(expert: Expert, dense: Dense) -> Source:
    """The dense matrix that becomes this one of the expert."""
    return dense[f"layers.{expert.layer}.mlp.{expert.matrix}.weight"]


def _neuron_keys(expert: Expert, config: UpcycleConfig) -> tuple[str, str]:
    """Keys of the choice of neurons and of the new values."""
    own = f"{config.seed}/{expert.key}.{expert.matrix}"
    of_expert = f"{config.seed}/{expert.key}"
    return f"{of_expert if config.drop_indices is DropIndices.SHARED else own}/neurons", f"{own}/values"
