"""Expert similarity: the mean pairwise cosine between the weights of a layer's experts.

A freshly upcycled layer has similarity 1 (every expert is the dense feed-forward); training moves the experts apart.
In Skywork-MoE the run whose experts stayed most alike was the worst model (Fig. 1, right), so training logs this figure
and `skymoe inspect` prints it.

Two ways to the same figure. With unit vectors u_e the sum over all pairs is |sum_e u_e|^2 - E, so the mean costs one
pass over the weights and no E x E products: `expert_similarity`. The pairwise matrix is the reference, and gives
minimum and maximum: `similarity_matrix`, or `add_gram` where a layer is too large to be held at once.

Cosines say nothing about neuron order: a permuted copy of an expert computes the same function and looks different.

Shapes: E experts, P numbers in one expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Similarity(NamedTuple):
    """Pairwise cosines of the experts of one layer, summed up."""

    mean: float
    min: float
    max: float


def expert_similarity(*weights_EX: Tensor) -> float:
    """Mean pairwise cosine, in O(E P) and the memory of one expert in fp32.

    Args:
        weights_EX: tensors with the experts as first axis, for instance `gate_up` (E, 2F, D) and `down` (E, D, F). An
            expert is the concatenation of its parts. An all-zero expert counts as orthogonal to the others.

    Returns:
        A number in [-1, 1]; 1.0 for a single expert.
    """
    num_experts = _num_experts(weights_EX)
    if num_experts == 1:
        return 1.0
    squares_E = torch.stack([squared_norms(part) for part in weights_EX]).sum(0)
    scale_E = torch.where(squares_E > 0, squares_E.rsqrt(), 0.0)
    squared_sum = sum(float(scaled_sum(part, scale_E).square_().sum(dtype=torch.float64)) for part in weights_EX)
    return mean_cosine(squared_sum, float((squares_E > 0).sum()), num_experts)


def similarity_matrix(*weights_EX: Tensor) -> Tensor:
    """Every pairwise cosine, (E, E) fp32: the O(E^2 P) reference of `expert_similarity`."""
    num_experts = _num_experts(weights_EX)
    gram_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=weights_EX[0].device)
    for part in weights_EX:
        add_gram(gram_EE, part)
    return cosines(gram_EE)


def add_gram(gram_EE: Tensor, weights_EX: Tensor) -> None:
    """Add the inner products of one slice of the experts' weights to `gram_EE` (float64), in place."""
    flat_EP = weights_EX.detach().flatten(1).float()
    gram_EE += (flat_EP @ flat_EP.T).double()


def cosines(gram_EE: Tensor) -> Tensor:
    """Inner products to cosines (fp32), in [-1, 1]. All-zero experts have cosine 0 with everything."""
    square_E = gram_EE.diagonal()
    scale_E = torch.where(square_E > 0, square_E.rsqrt(), 0.0)
    return (gram_EE * scale_E[:, None] * scale_E[None, :]).clamp(-1, 1).float()


def summarize(cosine_EE: Tensor) -> Similarity:
    """Mean, minimum and maximum over the pairs i < j; all 1.0 for a single expert."""
    num_experts = cosine_EE.shape[0]
    if num_experts == 1:
        return Similarity(1.0, 1.0, 1.0)
    row, column = torch.triu_indices(num_experts, num_experts, offset=1).unbind()
    pairs = cosine_EE.double()[row, column]
    return Similarity(_clip(float(pairs.mean())), float(pairs.min()), float(pairs.max()))


def squared_norms(part_EX: Tensor) -> Tensor:
    """|w_e|^2 of every expert, (E,) fp64."""
    squares_E = torch.zeros(part_EX.shape[0], dtype=torch.float64, device=part_EX.device)
    for expert, weight_X in enumerate(part_EX.detach()):
        squares_E[expert] = weight_X.float().square().sum(dtype=torch.float64)
    return squares_E


def scaled_sum(part_EX: Tensor, scale_E: Tensor) -> Tensor:
    """sum_e scale_e w_e in fp32, one expert converted at a time."""
    total_X = torch.zeros(part_EX.shape[1:], dtype=torch.float32, device=part_EX.device)
    for expert_X, scale in zip(part_EX.detach(), scale_E.tolist(), strict=True):
        total_X.add_(expert_X.float(), alpha=scale)
    return total_X


def mean_cosine(squared_sum: float, nonzero: float, num_experts: int) -> float:
    """The mean over pairs, from |sum_e u_e|^2; each of the `nonzero` experts has a cosine of 1 with itself."""
    return _clip((squared_sum - nonzero) / (num_experts * (num_experts - 1)))


def _num_experts(weights_EX: tuple[Tensor, ...]) -> int:
    counts = {part.shape[0] for part in weights_EX}
    assert len(counts) == 1, f"parts disagree on the number of experts: {sorted(counts)}"
    return counts.pop()


def _clip(cosine: float) -> float:
    return max(min(cosine, 1.0), -1.0)  # in this order a NaN stays a NaN
