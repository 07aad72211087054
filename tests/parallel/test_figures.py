"""Expert similarity of experts on many ranks is that of the same experts on one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from parallel.ranks import run_ranks
from torch import Tensor

from skymoe.ops import similarity
from skymoe.parallel.figures import expert_similarity
from skymoe.parallel.mesh import build_mesh, single_mesh
from skymoe.spec.layout import ExpertAxis, Layout
from skymoe.spec.model import Architecture, ModelSpec, MoESpec
from skymoe.spec.split import Split
from skymoe.weights.slices import owned_slices

GATE_UP, DOWN = "layers.0.moe.experts.gate_up", "layers.0.moe.experts.down"


def spec(num_experts: int) -> ModelSpec:
    return ModelSpec(
        architecture=Architecture.SKYMOE, vocab_size=7, hidden_size=6, num_layers=1, ffn_size=10, num_heads=3,
        num_kv_heads=3, head_dim=2, moe=MoESpec(num_experts=num_experts, top_k=1, ffn_size=10),
    )  # fmt: skip


def weights(num_experts: int, zero: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(num_experts)
    whole = {
        GATE_UP: torch.randn(num_experts, 20, 6, generator=generator) + 0.5,
        DOWN: torch.randn(num_experts, 6, 10, generator=generator),
    }
    for tensor in whole.values():
        tensor[1] *= 0.0 if zero else 1.0
    return whole


def similarity_of(layout: Layout, num_experts: int, zero: bool) -> float:
    mesh = build_mesh(layout, torch.device("cpu"))
    own = owned_slices(spec(num_experts), layout, mesh.coordinate, 0)
    parts = []
    for name, whole in weights(num_experts, zero).items():
        part = torch.empty(own[name].shape)
        for piece in own[name].pieces:
            part[tuple(slice(*side) for side in piece.local)] = whole[tuple(slice(*side) for side in piece.whole)]
        parts.append(part)
    return expert_similarity(*parts, num_experts=num_experts, mesh=mesh)


@pytest.mark.parametrize("expert", list(ExpertAxis))
@pytest.mark.parametrize(("dp", "tp", "num_experts"), [(2, 2, 5), (1, 3, 4), (3, 1, 7)])
def test_it_is_that_of_the_whole_layer(expert: ExpertAxis, dp: int, tp: int, num_experts: int) -> None:
    layout = Layout(dp=dp, tp=tp, expert=expert, stages=Split((2,)))
    expected = similarity.expert_similarity(*weights(num_experts, False).values())
    found = run_ranks(dp * tp, similarity_of, layout, num_experts, False)
    assert found == [pytest.approx(expected, abs=1e-6)] * (dp * tp) and len(set(found)) == 1


def test_an_expert_of_zeros_and_a_single_expert() -> None:
    layout = Layout(tp=2, stages=Split((2,)))
    expected = similarity.expert_similarity(*weights(3, True).values())
    assert run_ranks(2, similarity_of, layout, 3, True) == [pytest.approx(expected, abs=1e-6)] * 2
    alone = single_mesh(replace(layout, tp=1), torch.device("cpu"))
    assert expert_similarity(torch.randn(1, 4), num_experts=1, mesh=alone) == 1.0
