from __future__ import annotations

import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skymoe.ops.balance import (
    AdaptiveCoefficients,
    AuxLoss,
    GateTotals,
    aux_loss,
    capacity,
    drop_rate,
    gate_totals,
    loss_value,
    real_drop_rate,
    router_metrics,
    update_expert_bias,
    z_loss,
)
from skymoe.ops.routing import Routing, route
from skymoe.spec.model import GateNormSpec


def random_logits(num_tokens: int, num_experts: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_probs(probs_TE: Tensor, counts_E: Tensor, top_k: int = 2) -> Routing:
    ids_TK = probs_TE.detach().topk(top_k).indices
    return Routing(torch.ones(ids_TK.shape), ids_TK, counts_E, probs_TE, probs_TE.log(), True)


def global_loss(kind: AuxLoss, probs_TE: Tensor, counts_E: Tensor, top_k: int) -> Tensor:
    """The formulas of the paper, over all tokens at once; f is a constant for the gradient, as in Switch."""
    num_tokens, n = probs_TE.shape
    mean_E = probs_TE.mean(0)
    if kind is AuxLoss.SKYWORK:
        return sum((1 / n - mean_E[j]) ** 2 for j in range(n))  # type: ignore[return-value]
    return n * sum(counts_E[j] / (num_tokens * top_k) * mean_E[j] for j in range(n))  # type: ignore[return-value]


def test_eq_4_by_hand() -> None:
    """Means (0.5, 0.3, 0.2) against 1/3: (1/6)^2 + (1/30)^2 + (2/15)^2."""
    probs = torch.tensor([[0.6, 0.2, 0.2], [0.4, 0.4, 0.2]], dtype=torch.float64, requires_grad=True)
    routing = with_probs(probs, torch.tensor([2, 2, 0]))
    expected = 1 / 36 + 1 / 900 + 4 / 225
    totals = gate_totals(routing)
    assert float(loss_value(AuxLoss.SKYWORK, totals, top_k=2)) == pytest.approx(expected, rel=1e-12)
    aux_loss(AuxLoss.SKYWORK, routing).backward()
    # dL/dg_ij = (2/T)(mean_j - 1/n)
    slope = [2 / 2 * (0.5 - 1 / 3), 2 / 2 * (0.3 - 1 / 3), 2 / 2 * (0.2 - 1 / 3)]
    torch.testing.assert_close(probs.grad, torch.tensor([slope, slope], dtype=torch.float64))


def test_switch_by_hand() -> None:
    """n sum f P with f = (0.5, 0.5, 0), P = (0.5, 0.3, 0.2): 3 * 0.4."""
    probs = torch.tensor([[0.6, 0.2, 0.2], [0.4, 0.4, 0.2]], dtype=torch.float64)
    routing = with_probs(probs, torch.tensor([2, 2, 0]))
    assert float(loss_value(AuxLoss.SWITCH, gate_totals(routing), top_k=2)) == pytest.approx(1.2, rel=1e-6)
    assert float(aux_loss(AuxLoss.SWITCH, routing)) == pytest.approx(1.2, rel=1e-6), "linear in P: exact in value too"


@pytest.mark.parametrize("kind", [AuxLoss.SKYWORK, AuxLoss.SWITCH])
def test_balance_is_the_floor(kind: AuxLoss) -> None:
    probs = torch.full((6, 3), 1 / 3, dtype=torch.float64)
    routing = with_probs(probs, torch.tensor([4, 4, 4]))
    floor = 0.0 if kind is AuxLoss.SKYWORK else 1.0
    assert float(loss_value(kind, gate_totals(routing), top_k=2)) == pytest.approx(floor, abs=1e-7)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(2, 9), seed=st.integers(0, 999))
def test_switch_is_one_plus_n_times_eq_4_when_choices_follow_probabilities(n: int, seed: int) -> None:
    """With f = P: n sum P^2 = 1 + n sum (P - 1/n)^2; the gradient with f constant is then n/2 of Eq. 4's."""
    probs = random_logits(11, n, seed).softmax(-1).requires_grad_()
    totals = GateTotals(probs.detach().sum(0), probs.detach().sum(0), torch.tensor(11), torch.zeros(n))
    skywork = loss_value(AuxLoss.SKYWORK, totals, top_k=1)
    torch.testing.assert_close(loss_value(AuxLoss.SWITCH, totals, top_k=1), 1 + n * skywork)
    routing = with_probs(probs, torch.zeros(n, dtype=torch.int64), top_k=1)
    (grad_skywork,) = torch.autograd.grad(aux_loss(AuxLoss.SKYWORK, routing, totals), probs)
    (grad_switch,) = torch.autograd.grad(aux_loss(AuxLoss.SWITCH, routing, totals), probs)
    # Up to the same constant for every expert, which the softmax does not let through.
    torch.testing.assert_close(grad_switch - n / 2 * grad_skywork, torch.full_like(probs, 1 / 11))


@pytest.mark.parametrize("kind", [AuxLoss.SKYWORK, AuxLoss.SWITCH])
@pytest.mark.parametrize("sizes", [(23,), (9, 14), (1, 7, 11, 4), (2, 3, 5, 6, 7)])
@pytest.mark.parametrize("norm", [None, GateNormSpec()])
@pytest.mark.parametrize("pads", [False, True])
def test_micro_batch_gradients_add_up_to_the_global_one(
    kind: AuxLoss, sizes: tuple[int, ...], norm: GateNormSpec | None, pads: bool
) -> None:
    top_k, n = 2, 5
    valid = torch.ones(23, dtype=torch.bool)
    if pads:
        valid[[0, 3, 4, 9, 10, 22]] = False
    whole = random_logits(23, n).requires_grad_()
    routing = route(whole[valid], top_k=top_k, gate_norm=norm)
    value = global_loss(kind, routing.probs_TE, routing.counts_E, top_k)
    (expected,) = torch.autograd.grad(value, whole)

    parts = [z.detach().requires_grad_() for z in whole.split(sizes)]
    masks = [v if pads else None for v in valid.split(sizes)]
    routings = [route(z, top_k=top_k, gate_norm=norm, valid_T=v) for z, v in zip(parts, masks, strict=True)]
    totals = gate_totals(routings[0], masks[0])
    for micro, mask in zip(routings[1:], masks[1:], strict=True):
        totals = totals.plus(gate_totals(micro, mask))
    for micro, mask in zip(routings, masks, strict=True):
        aux_loss(kind, micro, totals, mask).backward()
    grads = [z.grad for z in parts if z.grad is not None]
    torch.testing.assert_close(torch.cat(grads), expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(loss_value(kind, totals, top_k=top_k), value.detach(), rtol=1e-6, atol=1e-9)
    if kind is AuxLoss.SWITCH:  # linear in the probabilities, so that the parts' values add up as well
        pairs = zip(routings, masks, strict=True)
        surrogate = sum(aux_loss(kind, micro, totals, mask).detach() for micro, mask in pairs)
        torch.testing.assert_close(surrogate, value.detach(), rtol=1e-6, atol=1e-9)
    if len(sizes) == 1:
        alone = route(whole, top_k=top_k, gate_norm=norm, valid_T=masks[0])
        (own,) = torch.autograd.grad(aux_loss(kind, alone, valid_T=masks[0]), whole)
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-8)


def test_none_is_zero() -> None:
    routing = route(random_logits(4, 3).requires_grad_(), top_k=1)
    assert float(aux_loss(AuxLoss.NONE, routing)) == float(loss_value(AuxLoss.NONE, gate_totals(routing), top_k=1)) == 0


def test_totals_carry_no_gradient_and_do_not_see_pads() -> None:
    z = random_logits(5, 3).requires_grad_()
    valid = torch.tensor([True, False, True, True, False])
    totals = gate_totals(route(z, top_k=2, valid_T=valid), valid)
    assert not any(t.requires_grad for t in totals)
    clean = gate_totals(route(z[valid], top_k=2))
    for ours, expected in zip(totals, clean, strict=True):
        torch.testing.assert_close(ours, expected)
    assert totals.num_tokens.dtype is torch.int64 and int(totals.num_tokens) == 3


@pytest.mark.parametrize("kind", [AuxLoss.SKYWORK, AuxLoss.SWITCH])
def test_a_micro_batch_of_pads_only_is_harmless(kind: AuxLoss) -> None:
    z = random_logits(4, 3).requires_grad_()
    valid = torch.zeros(4, dtype=torch.bool)
    routing = route(z, top_k=2, valid_T=valid)
    (aux_loss(kind, routing, valid_T=valid) + z_loss(routing, valid_T=valid)).backward()
    assert z.grad is not None and (z.grad == 0).all()
    assert drop_rate(routing.counts_E, num_tokens=0, top_k=2, capacity_factor=1.25) == 0


@pytest.mark.parametrize("kind", [AuxLoss.SKYWORK, AuxLoss.SWITCH])
def test_a_hopeless_pad_reaches_no_loss(kind: AuxLoss) -> None:
    z = random_logits(5, 3)
    z[1] = float("nan")
    valid = torch.tensor([True, False, True, True, True])
    routing = route(z, top_k=2, valid_T=valid)
    totals = gate_totals(routing, valid)
    assert all(t.isfinite().all() for t in totals)
    assert aux_loss(kind, routing, totals, valid).isfinite() and z_loss(routing, valid_T=valid).isfinite()


def test_z_loss_is_the_mean_squared_logsumexp_of_raw_logits() -> None:
    z = random_logits(6, 4).requires_grad_()
    valid = torch.tensor([True, True, False, True, False, True])
    expected = torch.stack([torch.log(z[i].exp().sum()) ** 2 for i in range(6)])
    routing = route(z, top_k=2, gate_norm=GateNormSpec())
    torch.testing.assert_close(z_loss(routing), expected.mean())
    torch.testing.assert_close(z_loss(routing, valid_T=valid), expected[valid].mean())
    torch.testing.assert_close(z_loss(routing, num_tokens=10, valid_T=valid), expected[valid].sum() / 10)
    assert torch.autograd.gradcheck(lambda z: z_loss(route(z, top_k=2), valid_T=valid), z)


@settings(deadline=None, max_examples=200)
@given(
    num_tokens=st.integers(1, 300),
    n=st.integers(1, 16),
    top_k=st.integers(1, 8),
    factor=st.sampled_from(["0.5", "1", "1.05", "1.1", "1.2", "1.25", "1.5", "2"]),
)
def test_capacity_is_the_exact_ceiling(num_tokens: int, n: int, top_k: int, factor: str) -> None:
    """1.1 * 50 / 5 is 11 assignments, although 1.1 is not a binary fraction."""
    expected = math.ceil(Fraction(factor) * top_k * num_tokens / n)
    assert capacity(num_tokens, num_experts=n, top_k=top_k, capacity_factor=float(factor)) == expected


@settings(deadline=None, max_examples=60)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=8), top_k=st.integers(1, 3), data=st.data())
def test_drop_rate_is_brute_force(counts: list[int], top_k: int, data: st.DataObject) -> None:
    num_tokens = max(1, math.ceil(sum(counts) / top_k))
    factor = data.draw(st.sampled_from([1.0, 1.25, 1.5]))
    limit = math.ceil(factor * top_k * num_tokens / len(counts))
    dropped = sum(1 for c in counts for place in range(c) if place >= limit)
    found = drop_rate(torch.tensor(counts), num_tokens=num_tokens, top_k=top_k, capacity_factor=factor)
    assert found == pytest.approx(dropped / (top_k * num_tokens), abs=1e-15)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), factor=st.sampled_from([0.5, 1.0, 1.25]), pads=st.booleans())
def test_virtual_and_real_capacity_agree(seed: int, factor: float, pads: bool) -> None:
    """What is measured without dropping is what is dropped when it is done."""
    z, top_k, n = 3 * random_logits(31, 5, seed), 2, 5
    valid = torch.rand(31, generator=torch.Generator().manual_seed(seed)) < (0.7 if pads else 2)
    valid[0] = True
    num_tokens = int(valid.sum())
    limit = capacity(num_tokens, num_experts=n, top_k=top_k, capacity_factor=factor)
    virtual = route(z, top_k=top_k, valid_T=valid)
    real = route(z, top_k=top_k, valid_T=valid, capacity=limit)
    rates = [drop_rate(r.counts_E, num_tokens=num_tokens, top_k=top_k, capacity_factor=factor) for r in (virtual, real)]
    really = 1 - int(real.sent_counts_E.sum()) / (top_k * num_tokens)
    assert rates[0] == rates[1] == pytest.approx(really, abs=1e-12)
    assert real_drop_rate(gate_totals(real, valid), top_k=top_k) == pytest.approx(really, abs=1e-12)
    assert real_drop_rate(gate_totals(virtual, valid), top_k=top_k) == 0


def test_at_capacity_factor_one_the_drop_rate_is_the_distance_from_uniform() -> None:
    counts = torch.tensor([10, 2, 6, 6])
    distance = (counts / 24 - 0.25).abs().sum() / 2
    assert drop_rate(counts, num_tokens=12, top_k=2, capacity_factor=1.0) == pytest.approx(float(distance))


def test_eq_7_to_9_by_hand() -> None:
    alpha = AdaptiveCoefficients([0.01, 0.01, 0.002])
    alpha.update([0.02, 0.5, 0.05])  # 0.2 * 0.02 = 0.004; saturated; exactly at saturation 0.05
    assert alpha.alpha_L == pytest.approx([0.99 * 0.01 + 0.01 * 0.004, 0.01, 0.99 * 0.002 + 0.01 * 0.01], rel=1e-12)
    alpha.update([0.0, 0.0, 0.0])
    assert alpha.alpha_L[1] == pytest.approx(0.99 * 0.01)


def test_alpha_follows_the_drop_rate_with_its_half_life() -> None:
    alpha = AdaptiveCoefficients([0.01])
    for _ in range(69):
        alpha.update([0.0])
    assert alpha.alpha_L[0] == pytest.approx(0.005, rel=0.01)
    for _ in range(3000):
        alpha.update([0.03])
    assert alpha.alpha_L[0] == pytest.approx(0.2 * 0.03)


def test_fixed_coefficients_stay() -> None:
    alpha = AdaptiveCoefficients([0.01, 0.003], adaptive=False)
    alpha.update([1.0, 0.0])
    assert alpha.alpha_L == [0.01, 0.003]


def test_alpha_survives_a_checkpoint_bit_for_bit() -> None:
    alpha, initial = AdaptiveCoefficients([0.01, 0.01]), [0.01, 0.01]
    before = alpha.alpha_L
    alpha.update([0.013, 0.041])
    assert before == initial, "what was logged before the update does not change afterwards"
    saved = json.loads(json.dumps(alpha.state()))
    again = AdaptiveCoefficients(initial)
    again.restore(saved)
    assert again.alpha_L == alpha.alpha_L and initial == [0.01, 0.01]
    with pytest.raises(ValueError, match="2 coefficients saved, 3"):
        AdaptiveCoefficients([0.01] * 3).restore(saved)
    with pytest.raises(ValueError):
        alpha.update([0.1])


def test_expert_bias_rises_for_the_idle() -> None:
    bias = torch.zeros(4)
    update_expert_bias(bias, torch.tensor([10, 2, 6, 6]), rate=1e-3)
    torch.testing.assert_close(bias, torch.tensor([-1e-3, 1e-3, 0.0, 0.0]))


def test_metrics_by_hand() -> None:
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.25, 0.5, 0.25], [0.9, 0.1, 0.0]], dtype=torch.float64)
    routing = with_probs(probs, torch.tensor([4, 2, 0]))
    valid = torch.tensor([True, True, False])
    metrics = router_metrics(routing, valid)
    assert metrics.max1_max2 == pytest.approx((2 + 2) / 2) and metrics.max2_max3 == pytest.approx((3 + 1) / 2)
    entropies = [-sum(p * math.log(p) for p in row) for row in probs[:2].tolist()]
    assert metrics.gate_entropy == pytest.approx(sum(entropies) / 2)
    assert metrics.load_cov == pytest.approx(math.sqrt(8 / 3) / 2) and metrics.dead_experts == 1


def test_metrics_of_few_experts_and_of_no_tokens() -> None:
    two = router_metrics(route(random_logits(5, 2), top_k=1))
    assert two.max1_max2 >= 1 and two.max2_max3 == 0
    one = router_metrics(route(random_logits(5, 1), top_k=1))
    assert one.max1_max2 == 0 and one.gate_entropy == pytest.approx(0)
    valid = torch.zeros(5, dtype=torch.bool)
    none = router_metrics(route(random_logits(5, 3), top_k=2, valid_T=valid), valid)
    assert all(math.isfinite(value) for value in none), "metrics.jsonl has no NaN"
