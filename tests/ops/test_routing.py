from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skymoe.base.errors import SkymoeError
from skymoe.ops.routing import (
    Routing,
    count_assignments,
    drop_over_capacity,
    gate_logits,
    normalize_logits,
    route,
)
from skymoe.spec.model import GateNormSpec

RELEASED = GateNormSpec(eps=0.0, subtract_mean=False)


def random_logits(num_tokens: int, num_experts: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))


def test_gate_logits_are_fp32_under_autocast() -> None:
    x_TD, weight_ED = torch.randn(5, 24), torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        logits_TE = gate_logits(x_TD.bfloat16(), weight_ED)
    assert logits_TE.dtype is torch.float32
    torch.testing.assert_close(logits_TE, x_TD.bfloat16().float() @ weight_ED.t())


def test_gate_logits_keep_double_precision() -> None:
    x_TD, weight_ED = torch.randn(5, 24, dtype=torch.float64), torch.randn(3, 24, dtype=torch.float64)
    torch.testing.assert_close(gate_logits(x_TD, weight_ED), x_TD @ weight_ED.t(), rtol=1e-14, atol=1e-14)


def test_normalization_by_hand() -> None:
    """Eq. 6 on (1, 2, 6): mean 3, squares 4 + 1 + 9; sigma is sqrt(14/2) unbiased, sqrt(14/3) of the population."""
    z = torch.tensor([[1.0, 2.0, 6.0]])
    unbiased = normalize_logits(z, GateNormSpec(scale=2.0, ddof=1, eps=0.0))
    torch.testing.assert_close(unbiased, 2 * torch.tensor([[-2.0, -1.0, 3.0]]) / math.sqrt(7))
    population = normalize_logits(z, GateNormSpec(ddof=0, eps=0.5))
    torch.testing.assert_close(population, torch.tensor([[-2.0, -1.0, 3.0]]) / (math.sqrt(14 / 3) + 0.5))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(2, 17), seed=st.integers(0, 999), scale=st.sampled_from([0.5, 1.0, 2.0]))
def test_released_form_is_the_paper_form_up_to_the_deviation(n: int, seed: int, scale: float) -> None:
    """Unbiased instead of population deviation is lambda * sqrt((n-1)/n); the mean does not reach the softmax."""
    z = random_logits(7, n, seed).double()
    released = normalize_logits(z, GateNormSpec(scale=scale, ddof=1, eps=0.0, subtract_mean=False))
    paper = normalize_logits(z, GateNormSpec(scale=scale * math.sqrt((n - 1) / n), ddof=0, eps=0.0))
    torch.testing.assert_close(released.softmax(-1), paper.softmax(-1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("subtract_mean", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("level", [0.0, 3.0])
def test_constant_logits_mean_indifference_and_a_finite_gradient(
    level: float, ddof: int, subtract_mean: bool, eps: float
) -> None:
    """A zero-initialised router, or a pad whose hidden state is zero, must not poison the layer's gradient."""
    z = torch.full((3, 4), level, requires_grad=True)
    routing = route(z, top_k=2, gate_norm=GateNormSpec(ddof=ddof, eps=eps, subtract_mean=subtract_mean))
    torch.testing.assert_close(routing.probs_TE, torch.full((3, 4), 0.25))
    (routing.weights_TK * torch.tensor([1.0, 3.0])).sum().backward()
    assert z.grad is not None and z.grad.isfinite().all()


def test_only_the_direction_of_the_router_counts_under_normalization() -> None:
    z = random_logits(9, 5)
    weak, strong = (route(z * factor, top_k=2, gate_norm=RELEASED) for factor in (1e-3, 1e3))
    torch.testing.assert_close(weak.probs_TE, strong.probs_TE)


def reference_route(z: Tensor, top_k: int, norm: GateNormSpec | None, norm_topk: bool) -> tuple[list, list]:
    """Token by token, in Python."""
    all_weights, all_ids = [], []
    for row in z.double().tolist():
        if norm:
            mean = sum(row) / len(row)
            sigma = math.sqrt(sum((v - mean) ** 2 for v in row) / (len(row) - norm.ddof))
            row = [norm.scale * (v - mean) / (sigma + norm.eps) for v in row]
        g = [math.exp(v - max(row)) for v in row]
        g = [v / sum(g) for v in g]
        ids = sorted(range(len(g)), key=lambda j: -g[j])[:top_k]
        total = sum(g[j] for j in ids) if norm_topk else 1.0
        all_ids.append(ids)
        all_weights.append([g[j] / total for j in ids])
    return all_weights, all_ids


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_routing_is_the_plain_reference(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 17))
    top_k = data.draw(st.integers(1, n))
    norm = data.draw(st.sampled_from([None, GateNormSpec(), GateNormSpec(scale=2.0, ddof=0), RELEASED]))
    norm_topk = data.draw(st.booleans())
    z = random_logits(data.draw(st.integers(1, 11)), n, data.draw(st.integers(0, 999)))
    routing = route(z, top_k=top_k, gate_norm=norm, norm_topk=norm_topk)
    weights, ids = reference_route(z, top_k, norm, norm_topk)
    assert routing.expert_ids_TK.tolist() == ids
    torch.testing.assert_close(routing.weights_TK, torch.tensor(weights), rtol=1e-4, atol=1e-6)
    flat = [j for row in ids for j in row]
    assert routing.counts_E.tolist() == [flat.count(j) for j in range(n)]
    assert routing.is_full and routing.sent_counts_E.equal(routing.counts_E)
    assert routing.logits_TE is z


def test_renormalized_weights_are_the_softmax_over_the_chosen_logits() -> None:
    """Mixtral's order (top-k, then softmax) and the paper's (softmax, top-k, renormalize) are one function."""
    z = random_logits(8, 6)
    torch.testing.assert_close(route(z, top_k=3).weights_TK, z.topk(3).values.softmax(-1))


def test_the_gradient_of_the_weights() -> None:
    z = random_logits(4, 5).double().requires_grad_()
    for norm in (None, GateNormSpec()):
        for norm_topk in (True, False):
            assert torch.autograd.gradcheck(
                lambda z, norm=norm, norm_topk=norm_topk: (
                    route(z, top_k=2, gate_norm=norm, norm_topk=norm_topk).weights_TK
                ),
                z,
            )


def test_bf16_logits_are_routed_in_fp32() -> None:
    """In somebody else's model the gate may speak bf16."""
    z = random_logits(6, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        routing = route(z, top_k=2, gate_norm=GateNormSpec())
    exact = route(z.float(), top_k=2, gate_norm=GateNormSpec())
    assert routing.weights_TK.dtype is routing.probs_TE.dtype is torch.float32
    torch.testing.assert_close(routing.probs_TE, exact.probs_TE)


@pytest.mark.parametrize("norm", [None, GateNormSpec()])
def test_expert_bias_moves_the_choice_and_not_the_weights(norm: GateNormSpec | None) -> None:
    z = random_logits(20, 5)
    plain = route(z, top_k=2, gate_norm=norm, norm_topk=False)
    bias_E = torch.tensor([100.0, 0, 0, 0, 0])
    biased = route(z, top_k=2, gate_norm=norm, norm_topk=False, expert_bias_E=bias_E)
    assert (biased.expert_ids_TK[:, 0] == 0).all() and biased.counts_E[0] == 20 > plain.counts_E[0]
    torch.testing.assert_close(biased.probs_TE, plain.probs_TE)
    assert biased.weights_TK.equal(plain.probs_TE.gather(1, biased.expert_ids_TK))
    best_other = plain.probs_TE[:, 1:].argmax(-1) + 1
    assert biased.expert_ids_TK[:, 1].equal(best_other)


@pytest.mark.parametrize("norm", [None, GateNormSpec()])
def test_expert_bias_is_added_to_normalized_logits_or_else_to_probabilities(norm: GateNormSpec | None) -> None:
    """0.1 is little beside a unit deviation and much beside probabilities around 1/16."""
    z, bias_E = random_logits(200, 16), 0.1 * random_logits(1, 16, seed=1)[0]
    scores_TE = normalize_logits(z, norm) if norm else z.softmax(-1)
    expected = (scores_TE + bias_E).topk(2).indices
    assert route(z, top_k=2, gate_norm=norm, expert_bias_E=bias_E).expert_ids_TK.equal(expected)
    wrong = ((z.softmax(-1) if norm else z) + bias_E).topk(2).indices
    assert not wrong.equal(expected)


def test_pads_go_nowhere_and_count_nowhere() -> None:
    z = random_logits(7, 4)
    valid = torch.tensor([True, False, True, True, False, True, False])
    routing, alone = route(z, top_k=3, valid_T=valid), route(z[valid], top_k=3)
    assert (routing.expert_ids_TK[~valid] == 4).all() and (routing.weights_TK[~valid] == 0).all()
    assert routing.expert_ids_TK[valid].equal(alone.expert_ids_TK)
    assert routing.weights_TK[valid].equal(alone.weights_TK)
    assert routing.counts_E.equal(alone.counts_E) and routing.sent_counts_E.equal(alone.counts_E)


def test_nothing_but_pads() -> None:
    z = random_logits(3, 4).requires_grad_()
    routing = route(z, top_k=2, valid_T=torch.zeros(3, dtype=torch.bool))
    assert routing.counts_E.sum() == 0 and (routing.weights_TK == 0).all()
    routing.weights_TK.sum().backward()
    assert z.grad is not None and (z.grad == 0).all()


def test_ties_are_broken_the_same_way_every_time() -> None:
    z = torch.zeros(50, 6)
    assert route(z, top_k=2).expert_ids_TK.equal(route(z.clone(), top_k=2).expert_ids_TK)


def reference_drop(ids: list[list[int]], num_experts: int, capacity: int) -> list[list[int]]:
    """GShard: every first choice queues before every second choice, by position."""
    taken = [0] * num_experts
    kept = [row.copy() for row in ids]
    for k in range(len(ids[0])):
        for row in kept:
            if row[k] < num_experts:
                taken[row[k]] += 1
                if taken[row[k]] > capacity:
                    row[k] = num_experts
    return kept


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_capacity_drops_in_the_order_of_gshard(data: st.DataObject) -> None:
    n, top_k, num_tokens = data.draw(st.integers(2, 7)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 15))
    capacity = data.draw(st.integers(0, 8))
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)))
    z = random_logits(num_tokens, n, data.draw(st.integers(0, 999)), scale=3.0)
    wanted = route(z, top_k=top_k, valid_T=valid)
    dropped = route(z, top_k=top_k, valid_T=valid, capacity=capacity)
    assert dropped.expert_ids_TK.tolist() == reference_drop(wanted.expert_ids_TK.tolist(), n, capacity)
    assert dropped.counts_E.equal(wanted.counts_E), "counts are of what was wanted"
    assert dropped.sent_counts_E.equal(wanted.counts_E.clamp(max=capacity))


def test_first_choices_before_second_choices() -> None:
    ids = torch.tensor([[0, 1], [1, 0], [2, 0], [0, 2]])
    assert drop_over_capacity(ids, 3, 2).tolist() == [[0, 1], [1, 3], [2, 3], [0, 2]]


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), capacity=st.integers(1, 6), top_k=st.integers(1, 3))
def test_weights_that_remain_are_renormalized(seed: int, capacity: int, top_k: int) -> None:
    z = random_logits(12, 4, seed)
    routing = route(z, top_k=top_k, capacity=capacity)
    sent = routing.expert_ids_TK < 4
    expected = torch.where(sent, routing.probs_TE.gather(1, routing.expert_ids_TK.clamp(max=3)), 0)
    expected = torch.where(sent.any(-1, keepdim=True), expected / expected.sum(-1, keepdim=True), 0)
    torch.testing.assert_close(routing.weights_TK, expected, rtol=0, atol=0)
    plain = route(z, top_k=top_k, capacity=capacity, norm_topk=False)
    torch.testing.assert_close(plain.weights_TK.sum(-1) <= 1, torch.ones(12, dtype=torch.bool))
    assert plain.weights_TK[sent].equal(plain.probs_TE.gather(1, plain.expert_ids_TK.clamp(max=3))[sent])


def test_a_token_that_loses_everything_has_no_gradient() -> None:
    z = torch.tensor([[5.0, 0.0, -1.0]] * 4, requires_grad=True)
    routing = route(z, top_k=1, capacity=1)
    assert routing.weights_TK.flatten().tolist() == [1, 0, 0, 0]
    (routing.weights_TK * torch.tensor([[1.0], [2.0], [3e6], [4.0]])).sum().backward()
    assert z.grad is not None and z.grad.isfinite().all()


def test_count_assignments_ignores_the_unsent() -> None:
    assert count_assignments(torch.tensor([[0, 3], [1, 0], [3, 3]]), 3).tolist() == [2, 1, 0]


def test_a_hopeless_pad_touches_nobody() -> None:
    """Pads may hold anything, not-a-number included: neither weights nor counts nor gradients of the others change."""
    z = random_logits(6, 4)
    valid = torch.tensor([True, True, False, True, False, True])
    clean = route(z, top_k=2, gate_norm=GateNormSpec(), valid_T=valid)
    poisoned_z = z.clone()
    poisoned_z[2], poisoned_z[4] = float("nan"), float("inf")
    poisoned: Routing = route(poisoned_z, top_k=2, gate_norm=GateNormSpec(), valid_T=valid)
    assert poisoned.weights_TK.equal(clean.weights_TK) and poisoned.expert_ids_TK.equal(clean.expert_ids_TK)
    assert poisoned.counts_E.equal(clean.counts_E)


@pytest.mark.parametrize("top_k", [0, 5])
def test_more_choices_than_experts_are_refused(top_k: int) -> None:
    with pytest.raises(SkymoeError, match=f"top_k is {top_k}, but the logits are of 4 experts"):
        route(torch.randn(3, 4), top_k=top_k)
