"""What stays between steps: against the count of parameters, and against what our own ZeRO would allocate."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.parallel.memory import ZeroBytes, zero_bytes
from skymoe.parallel.shards import ALIGNMENT
from skymoe.plan.hardware.catalogue import cluster_of
from skymoe.plan.memory.model import rank_memory, sizes
from skymoe.plan.memory.sizes import RankMemory
from skymoe.plan.memory.static import (
    attention_parameters,
    embedding_parameters,
    ffn_parameters,
    head_parameters,
)
from skymoe.plan.shape import shape_of
from skymoe.plan.work import Division, Work
from skymoe.spec.flops import count_parameters
from skymoe.spec.layout import Coordinate, ExpertAxis, Layout, ScheduleKind
from skymoe.spec.model import Architecture, ModelSpec, MoESpec
from skymoe.spec.presets import PRESETS, preset
from skymoe.spec.split import Split
from skymoe.weights.slices import Slice, owned_slices

SPEC = ModelSpec(
    architecture=Architecture.MIXTRAL, vocab_size=1003, hidden_size=192, num_layers=5, ffn_size=640, num_heads=6,
    num_kv_heads=3, head_dim=32, moe=MoESpec(num_experts=7, top_k=2, ffn_size=448), moe_layers=(1, 2, 4),
)  # fmt: skip


def parameters_of_all_ranks(spec: ModelSpec, division: Division) -> int:
    """Every part of every rank once, repeated ones once."""
    shape, tp = shape_of(spec), division.tp
    total = sum(embedding_parameters(shape, tp, rank).total for rank in range(tp))
    if not shape.tied:
        total += sum(head_parameters(shape, division, rank).total for rank in range(tp))
    for layer in shape.layers:
        total += sum(attention_parameters(layer.attention, spec.hidden_size, tp, rank).total for rank in range(tp))
        dense = [ffn_parameters(layer.ffn, spec.hidden_size, division, tp_rank=rank).dense for rank in range(tp)]
        router = spec.hidden_size * layer.ffn.num_experts
        total += sum(dense) - (tp - 1) * router
        total += sum(
            ffn_parameters(layer.ffn, spec.hidden_size, division, ep_rank=ep, etp_rank=etp).experts
            for ep in range(division.ep)
            for etp in range(division.etp)
        )
    return int(total)


def expected_parameters(spec: ModelSpec) -> int:
    """All matrices: norms, biases and the shared experts' gates are left out."""
    count = count_parameters(spec)
    vectors = count.norms + (spec.hidden_size * len(spec.moe_layer_ids) if count.shared else 0)
    plain = replace(spec, qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=None)
    return count_parameters(plain).total - vectors


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    spec = preset(name)
    ep = 4 if spec.moe else 1
    assert parameters_of_all_ranks(spec, Division(pp=1, dp=2, tp=2, ep=ep)) == expected_parameters(spec)
    assert shape_of(spec).parameters == expected_parameters(spec)


@given(tp=st.integers(1, 3), dp=st.integers(1, 4), ep=st.integers(1, 7), etp=st.integers(1, 3))
@settings(deadline=None)
def test_all_ranks_together_are_the_model(tp: int, dp: int, ep: int, etp: int) -> None:
    division = Division(pp=1, dp=dp, tp=tp, ep=ep, etp=etp)
    assert parameters_of_all_ranks(SPEC, division) == expected_parameters(SPEC)


def owned(spec: ModelSpec, layout: Layout, place: Coordinate) -> dict[int, dict[str, Slice]]:
    return {stage: owned_slices(spec, layout, place, stage) for stage in layout.stages_of(place.pp)}


def told(spec: ModelSpec, layout: Layout, place: Coordinate) -> tuple[ZeroBytes, int]:
    """What our runtime says, and the most elements that are padding or norms."""
    stages, tied = owned(spec, layout, place), {"embed.weight"} if spec.tie_embeddings else set()
    said = zero_bytes(stages, layout, place, tied=tied, weight_bytes=2, gradient_bytes=4, shard_bytes=4096)
    slices = [item for parts in stages.values() for item in parts.values() if not item.is_buffer]
    norms = sum(item.num_elements for item in slices if len(item.shape) == 1)
    return said, norms + ALIGNMENT * (len(slices) + 3 * layout.dp * len(stages))


def planned(spec: ModelSpec, layout: Layout) -> tuple[RankMemory, ...]:
    work = Work(
        shape=shape_of(spec), division=Division.of(layout), cluster=cluster_of("a100-80g", layout.world_size),
        sequence_length=64, micro_batch=1, num_micro=2 * layout.pp,
    )  # fmt: skip
    return rank_memory(work, sizes(work), layout.stages, layout.recompute, schedule=layout.schedule)


LAYOUTS = {
    "one": Layout(stages=Split((10,))),
    "edp, uneven heads and experts": Layout(pp=2, dp=2, tp=2, stages=Split((7, 3))),
    "edp, half layers": Layout(pp=3, dp=3, tp=3, stages=Split((3, 3, 4))),
    "ep": Layout(pp=2, dp=2, tp=3, expert=ExpertAxis.EP, stages=Split((5, 5))),
    "etp": Layout(pp=1, dp=4, tp=2, expert=ExpertAxis.ETP, stages=Split((10,))),
    "interleaved": Layout(pp=2, dp=2, stages=Split((3, 2, 3, 2)), schedule=ScheduleKind.INTERLEAVED),
    "zbv": Layout(pp=2, dp=2, stages=Split((3, 2, 3, 2)), schedule=ScheduleKind.ZERO_BUBBLE),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_as_our_runtime_allocates(layout: Layout, tied: bool) -> None:
    """Bytes of the fullest rank of every stage: equal but for norms and padding."""
    spec = replace(SPEC, tie_embeddings=tied)
    for pp, rank in enumerate(planned(spec, layout)):
        said, spare = told(spec, layout, Coordinate(pp, 0, 0))
        assert 0 <= said.weights - rank.weights <= 2 * spare
        assert 0 <= said.gradients - rank.gradients <= 4 * spare
        assert abs(said.optimizer + said.master - rank.optimizer) <= 12 * spare


def test_skywork_as_our_runtime_allocates() -> None:
    """The 1536-rank layout: within 0.1 % on every stage."""
    layout = Layout(pp=12, dp=32, tp=4, stages=Split((9,) * 8 + (8,) * 4))
    spec = preset("skywork-moe")
    for pp in (0, 5, 11):
        place = Coordinate(pp, 0, 0)
        said = zero_bytes(owned(spec, layout, place), layout, place, tied=(), weight_bytes=2, gradient_bytes=4)
        rank = planned(spec, layout)[pp]
        assert rank.weights + rank.gradients + rank.optimizer == pytest.approx(said.total, rel=1e-3)
