"""Figures of the model that take more than one rank to form.

Shapes: E experts of this rank, X the rest of a weight's dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skymoe.ops.similarity import mean_cosine, scaled_sum, squared_norms
from skymoe.parallel.collectives import sum_forward
from skymoe.parallel.mesh import Mesh, alone
from skymoe.spec.layout import ExpertAxis


def expert_similarity(*weights_EX: Tensor, num_experts: int, mesh: Mesh) -> float:
    """Mean pairwise cosine of a layer's experts, wherever they are: `ops.similarity.expert_similarity`.

    The sum of unit vectors is formed here and then over the ranks of the expert axis. Under etp a rank has a part of
    every vector, so that norms and the square of the sum are summed over tp as well. It takes the memory of one
    expert (its part) in fp32.

    Args:
        weights_EX: this rank's tensors with its experts as first axis, for instance `gate_up` and `down`.
        num_experts: of the layer, on all ranks.
        mesh: every rank that shares the layer calls this together.

    Returns:
        A number in [-1, 1], the same on all ranks that share the layer; 1.0 for a single expert.
    """
    if num_experts == 1:
        return 1.0
    cut = mesh.tp if mesh.layout.expert is ExpertAxis.ETP else alone(mesh.rank)
    squares_E = sum_forward(torch.stack([squared_norms(part) for part in weights_EX]).sum(0), cut)
    scale_E = torch.where(squares_E > 0, squares_E.rsqrt(), 0.0)
    squared_sum = squares_E.new_zeros(())
    for part_EX in weights_EX:
        total_X = sum_forward(scaled_sum(part_EX, scale_E), mesh.expert)
        squared_sum += total_X.square_().sum(dtype=torch.float64)
    nonzero = sum_forward((squares_E > 0).sum(dtype=torch.float64), mesh.expert)
    return mean_cosine(float(sum_forward(squared_sum, cut)), float(nonzero), num_experts)
