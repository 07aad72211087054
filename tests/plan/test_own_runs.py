"""Memory that the planner predicts against what ranks of our own runtime hold: gloo, fp32 and bf16, 1 to 4 ranks."""

from __future__ import annotations

import pytest
import torch
from parallel.ranks import run_ranks

from skymoe.parallel.mesh import build_mesh
from skymoe.plan.hardware.catalogue import find_gpu
from skymoe.plan.hardware.gpu import Cluster, Precision
from skymoe.plan.memory.model import rank_memory, sizes
from skymoe.plan.memory.sizes import RankMemory
from skymoe.plan.shape import shape_of
from skymoe.plan.work import Division, Work
from skymoe.profile.step import StepBytes, Trainer, step_bytes
from skymoe.spec.layout import Coordinate, DispatchMode, ExpertAxis, Layout, ScheduleKind
from skymoe.spec.model import Architecture, GateNormSpec, ModelSpec, MoESpec
from skymoe.spec.split import Split

WITHIN = 0.10
TOKENS, MICRO_BATCH = 64, 2
MOE = ModelSpec(
    architecture=Architecture.SKYMOE, vocab_size=512, hidden_size=64, num_layers=4, ffn_size=128, num_heads=4,
    num_kv_heads=4, head_dim=16, max_position=128,
    moe=MoESpec(num_experts=4, top_k=2, ffn_size=96, gate_norm=GateNormSpec()),
)  # fmt: skip
DENSE = ModelSpec(
    architecture=Architecture.LLAMA, vocab_size=512, hidden_size=64, num_layers=4, ffn_size=192, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position=128,
)  # fmt: skip
FP32, BF16 = Precision.FP32, Precision.BF16
CASES = [
    (MOE, Layout(stages=Split((8,))), FP32),
    (MOE, Layout(stages=Split((8,))), BF16),
    (MOE, Layout(pp=2, stages=Split((5, 3)), recompute=(2, 0)), FP32),
    (DENSE, Layout(pp=2, stages=Split((4, 4)), recompute=(2, 1)), FP32),
    (MOE, Layout(pp=2, tp=2, stages=Split((4, 4))), FP32),
    (MOE, Layout(tp=2, stages=Split((8,)), dispatch=DispatchMode.REPLICATED), FP32),
    (MOE, Layout(dp=2, stages=Split((8,)), expert=ExpertAxis.EP, dispatch=DispatchMode.ALL_TO_ALL), FP32),
    (DENSE, Layout(pp=4, stages=Split((2, 2, 2, 2))), FP32),
    (DENSE, Layout(pp=2, stages=Split((2, 2, 2, 2)), schedule=ScheduleKind.INTERLEAVED), FP32),
    (DENSE, Layout(pp=2, stages=Split((2, 2, 2, 2)), schedule=ScheduleKind.ZERO_BUBBLE), FP32),
]


def num_micro(layout: Layout) -> int:
    return max(2, 2 * layout.pp)


def measured(spec: ModelSpec, layout: Layout, precision: Precision) -> StepBytes:
    """On one rank."""
    return step_bytes(
        Trainer(
            spec, build_mesh(layout, torch.device("cpu")), sequence_length=TOKENS, micro_batch=MICRO_BATCH,
            num_micro=num_micro(layout), precision=torch.bfloat16 if precision is BF16 else torch.float32,
        )
    )  # fmt: skip


def predicted(spec: ModelSpec, layout: Layout, precision: Precision) -> tuple[RankMemory, ...]:
    work = Work(
        shape=shape_of(spec), division=Division.of(layout, weight_bytes=4.0),
        cluster=Cluster(gpu=find_gpu("cpu"), num_gpus=layout.world_size, gpus_per_node=8), sequence_length=TOKENS,
        micro_batch=MICRO_BATCH, num_micro=num_micro(layout), precision=precision,
    )  # fmt: skip
    return rank_memory(work, sizes(work), layout.stages, layout.recompute, schedule=layout.schedule)


@pytest.mark.parametrize(
    ("spec", "layout", "precision"), CASES, ids=lambda value: str(value) if isinstance(value, Precision) else ""
)
def test_memory_of_our_own_ranks(spec: ModelSpec, layout: Layout, precision: Precision) -> None:
    """The fullest rank of every pipeline rank: for good, in the passes, and in all. Rows of experts are at balance in
    the prediction; here a random router is near it."""
    ranks = run_ranks(layout.world_size, measured, spec, layout, precision)
    for pp, said in enumerate(predicted(spec, layout, precision)):
        same = [layout.rank(Coordinate(pp, dp, tp)) for dp in range(layout.dp) for tp in range(layout.tp)]
        found = max((ranks[rank] for rank in same), key=lambda one: one.total)
        static = found.weights + found.gradients + found.optimizer
        assert said.weights + said.gradients + said.optimizer == pytest.approx(static, rel=0.01)
        assert said.activations + said.transient == pytest.approx(found.passes, rel=WITHIN)
        assert said.total == pytest.approx(found.total, rel=WITHIN)


def test_whole_layers_run_again_keep_their_input() -> None:
    """The planner's count of recomputation is the runtime's: fewer bytes on the stage that runs layers again."""
    plain, again = (
        predicted(MOE, Layout(pp=2, stages=Split((4, 4)), recompute=counts), FP32) for counts in ((0, 0), (2, 0))
    )
    layer_input = 4 * TOKENS * MICRO_BATCH * MOE.hidden_size
    assert again[0].activations < plain[0].activations
    assert again[0].activations >= 2 * 2 * layer_input
    assert again[1] == plain[1]
