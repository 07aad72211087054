from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skymoe.ops.similarity import add_gram, cosines, expert_similarity, similarity_matrix, summarize


@settings(max_examples=30, deadline=None)
@given(num_experts=st.integers(2, 7), rows=st.integers(1, 9), seed=st.integers(0, 10_000))
def test_the_one_pass_mean_equals_the_mean_over_pairs(num_experts: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(num_experts, 2 * rows, 5, generator=generator) + torch.randn(2 * rows, 5, generator=generator)
    down = torch.randn(num_experts, 5, rows, generator=generator)
    flat = torch.cat([gate_up.flatten(1), down.flatten(1)], 1).double()
    pairs = [float(torch.cosine_similarity(flat[i], flat[j], dim=0)) for i in range(num_experts) for j in range(i)]
    assert expert_similarity(gate_up, down) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    found = summarize(similarity_matrix(gate_up, down))
    assert found == pytest.approx((sum(pairs) / len(pairs), min(pairs), max(pairs)), abs=1e-6)


def test_copies_have_similarity_one_and_never_more() -> None:
    weights = torch.randn(1, 33, 7).expand(8, -1, -1)
    assert expert_similarity(weights) == pytest.approx(1.0, abs=1e-6)
    assert expert_similarity(weights) <= 1.0
    assert summarize(similarity_matrix(weights)).max <= 1.0


def test_bfloat16_is_summed_in_fp32() -> None:
    weights = torch.randn(4, 64, 129).bfloat16()
    assert expert_similarity(weights) == pytest.approx(expert_similarity(weights.float()), abs=1e-6)


def test_known_angles_zero_experts_and_a_single_expert() -> None:
    two = torch.tensor([[1.0, 0.0], [1.0, math.sqrt(3.0)]])
    assert expert_similarity(two) == pytest.approx(0.5)
    assert expert_similarity(torch.tensor([[2.0, 0.0], [-3.0, 0.0]])) == pytest.approx(-1.0)
    assert expert_similarity(torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])) == pytest.approx(1 / 3)
    assert expert_similarity(torch.zeros(3, 4)) == 0.0
    assert expert_similarity(torch.randn(1, 6)) == 1.0
    assert summarize(similarity_matrix(torch.randn(1, 6))) == (1.0, 1.0, 1.0)


def test_the_gram_matrix_may_be_gathered_in_slices() -> None:
    weights = torch.randn(5, 21, 6)
    gram = torch.zeros(5, 5, dtype=torch.float64)
    for start in range(0, 21, 4):
        add_gram(gram, weights[:, start : start + 4])
    torch.testing.assert_close(cosines(gram), similarity_matrix(weights))


def test_no_gradient_and_no_change_to_the_weights() -> None:
    weights = torch.randn(3, 4, 5, requires_grad=True)
    before = weights.detach().clone()
    expert_similarity(weights)
    similarity_matrix(weights)
    assert torch.equal(weights.detach(), before)


def test_parts_must_agree_on_the_number_of_experts() -> None:
    with pytest.raises(AssertionError, match="disagree"):
        expert_similarity(torch.randn(3, 2), torch.randn(4, 2))
