"""Load balance: the auxiliary losses, and their coefficient per layer driven by the drop rate.

    Eq. 4   L_aux = sum_j (1/n - mean_i g_ij)^2                 form `skywork`
            L_aux = n sum_j f_j P_j                             form `switch`; 1 at balance
    Eq. 5   L = L_ce + sum_l alpha_l L_aux_l
    Eq. 7-9 alpha_hat = min(xi d, alpha_max);  alpha <- beta alpha + (1 - beta) alpha_hat     per layer, per step

d is the drop rate: the share of token-expert assignments above the capacity C = ceil(CF k T / n). Nothing need be
dropped for it to be measured (*virtual* capacity).

**Global-batch statistics.** The means run over all tokens of the optimizer step, not of a micro-batch: a micro-batch
loss pushes every few sequences to be uniform and costs specialization (arXiv 2501.11873). Both losses are functions of
a few sums (`GateTotals`), additive over micro-batches and ranks. Given the totals of the whole step, `aux_loss` returns
for one micro-batch a scalar whose gradients add up to the exact gradient of the global loss:
dL/dg_ij = (2/T)(mean_j - 1/n) for Eq. 4 and (n/T) f_j for `switch`, with the factor treated as a constant.

Shapes: T tokens, E experts (n), K experts per token, L MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from skymoe.ops.routing import Routing


class AuxLoss(StrEnum):
    """The form of the balance loss."""

    SKYWORK = "skywork"
    SWITCH = "switch"
    NONE = "none"


class GateTotals(NamedTuple):
    """Sums over tokens, from which every balance quantity of one layer follows; add them over micro-batches and ranks.

    Attributes:
        prob_sum_E: sum of g over the valid tokens.
        counts_E: int64 assignments wanted per expert.
        num_tokens: scalar int64 tensor, valid tokens.
        dropped_E: int64 assignments that a real capacity dropped, per expert; zero where nothing is dropped.
    """

    prob_sum_E: Tensor
    counts_E: Tensor
    num_tokens: Tensor
    dropped_E: Tensor

    def plus(self, other: GateTotals) -> GateTotals:
        """The totals of both batches together."""
        return GateTotals(*(a + b for a, b in zip(self, other, strict=True)))


def gate_totals(routing: Routing, valid_T: Tensor | None = None) -> GateTotals:
    """The sums of one micro-batch, without gradient; pads (`valid_T` False) do not count."""
    probs_TE = routing.probs_TE.detach()
    dropped_E = routing.counts_E - routing.sent_counts_E
    if valid_T is None:
        num_tokens = torch.tensor(probs_TE.shape[0], device=probs_TE.device)
        return GateTotals(probs_TE.sum(0), routing.counts_E, num_tokens, dropped_E)
    return GateTotals(valid_T.to(probs_TE.dtype) @ probs_TE, routing.counts_E, valid_T.sum(), dropped_E)


def loss_value(kind: AuxLoss, totals: GateTotals, *, top_k: int) -> Tensor:
    """The value of the balance loss over all tokens in `totals` (no gradient): Eq. 4, or Switch's n sum f P."""
    num_experts, num_tokens = totals.prob_sum_E.numel(), totals.num_tokens.clamp_min(1)
    mean_prob_E = totals.prob_sum_E / num_tokens
    match kind:
        case AuxLoss.SKYWORK:
            return (1 / num_experts - mean_prob_E).square().sum()
        case AuxLoss.SWITCH:
            return num_experts * (totals.counts_E / (num_tokens * top_k) * mean_prob_E).sum()
        case AuxLoss.NONE:
            return mean_prob_E.new_zeros(())


def aux_loss(
    kind: AuxLoss, routing: Routing, totals: GateTotals | None = None, valid_T: Tensor | None = None
) -> Tensor:
    """The balance loss of one micro-batch, to be multiplied by alpha and back-propagated.

    Args:
        kind: `skywork` (Eq. 4) or `switch`.
        routing: of this micro-batch, with gradient in `probs_TE`.
        totals: sums over the whole global batch; None means that this micro-batch is the whole of it.
        valid_T: bool, False for pads.

    Returns:
        A scalar. Summed over the micro-batches of a step its gradient is that of the loss over the global batch. Its
        value is a surrogate: use `loss_value` for the figure to log.
    """
    totals = gate_totals(routing, valid_T) if totals is None else totals
    num_experts, top_k = routing.probs_TE.shape[-1], routing.weights_TK.shape[-1]
    num_tokens = totals.num_tokens.clamp_min(1)  # a batch of pads only has no loss
    match kind:
        case AuxLoss.SKYWORK:
            slope_E = 2 * (totals.prob_sum_E / num_tokens - 1 / num_experts)
        case AuxLoss.SWITCH:
            slope_E = num_experts * totals.counts_E / (num_tokens * top_k)
        case AuxLoss.NONE:
            return routing.probs_TE.new_zeros(())
    probs_TE = routing.probs_TE if valid_T is None else routing.probs_TE * valid_T[:, None]
    return (probs_TE.sum(0) * slope_E).sum() / num_tokens


def z_loss(routing: Routing, num_tokens: Tensor | int | None = None, valid_T: Tensor | None = None) -> Tensor:
    """ST-MoE router z-loss: mean over tokens of logsumexp(z)^2 of the raw logits.

    Args:
        routing: of this micro-batch.
        num_tokens: tokens of the global batch, the divisor; None means this micro-batch's.
        valid_T: bool, False for pads.

    With gate normalization the raw logits' scale does not reach the output, so this loss only shrinks a direction
    that has no effect: leave its coefficient at 0 there.
    """
    squared_T = routing.logits_TE.logsumexp(-1).square()
    if valid_T is not None:
        squared_T = squared_T * valid_T
        num_tokens = valid_T.sum().clamp_min(1) if num_tokens is None else num_tokens
    return squared_T.sum() / (squared_T.numel() if num_tokens is None else num_tokens)


def capacity(num_tokens: int, *, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """C = ceil(CF k T / n), assignments per expert; 1.1 * 50 / 5 is 11 although 1.1 is no binary fraction."""
    return math.ceil(capacity_factor * top_k * num_tokens / num_experts * (1 - 1e-12))


def drop_rate(counts_E: Tensor, *, num_tokens: int, top_k: int, capacity_factor: float) -> float:
    """Share of assignments above capacity, dropped or not: d = sum_j max(0, c_j - C) / (k T). 0 of no tokens."""
    if num_tokens == 0:
        return 0.0
    limit = capacity(num_tokens, num_experts=counts_E.numel(), top_k=top_k, capacity_factor=capacity_factor)
    return float((counts_E - limit).clamp_min(0).sum()) / (top_k * num_tokens)


def real_drop_rate(totals: GateTotals, *, top_k: int) -> float:
    """Share of assignments that were dropped: d where capacity is real and holds per micro-batch. 0 of no tokens."""
    return float(totals.dropped_E.sum()) / max(1, top_k * int(totals.num_tokens))


@dataclass
class AdaptiveCoefficients:
    """alpha per MoE layer, Eq. 7-9. Training state: saved in every checkpoint, updated once per optimizer step.

    Attributes:
        alpha_L: the coefficients in force.
        xi: slope from drop rate to coefficient (1/5).
        alpha_max: ceiling (0.01), also the initial value: early in training d is high and alpha sits at its ceiling.
        beta: memory of the moving average (0.99: half-life 69 steps).
        adaptive: False keeps alpha as it is.
    """

    alpha_L: list[float]
    xi: float = 0.2
    alpha_max: float = 0.01
    beta: float = 0.99
    adaptive: bool = True

    def update(self, drop_rate_L: Sequence[float]) -> None:
        """One step of Eq. 7-9 from each layer's drop rate. Raises ValueError for another number of layers."""
        if not self.adaptive:
            return
        self.alpha_L = [
            self.beta * alpha + (1 - self.beta) * min(self.xi * d, self.alpha_max)
            for alpha, d in zip(self.alpha_L, drop_rate_L, strict=True)
        ]

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint must hold. JSON keeps doubles exactly."""
        return {"alpha_L": list(self.alpha_L)}

    def restore(self, state: dict[str, list[float]]) -> None:
        """The inverse of `state`. Raises ValueError for another number of layers."""
        if len(state["alpha_L"]) != len(self.alpha_L):
            raise ValueError(f"{len(state['alpha_L'])} coefficients saved, {len(self.alpha_L)} MoE layers here")
        self.alpha_L = [float(alpha) for alpha in state["alpha_L"]]


@torch.no_grad()
def update_expert_bias(expert_bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """DeepSeek's loss-free balancing, in place: b_j += u sign(mean(c) - c_j)."""
    load_E = counts_E.to(expert_bias_E.dtype)
    expert_bias_E += rate * (load_E.mean() - load_E).sign()


class RouterMetrics(NamedTuple):
    """What one layer's gate looks like over a batch.

    Attributes:
        max1_max2, max2_max3: mean over tokens of the ratio of the largest to the second, and the second to the third
            gate probability (Fig. 2-3); 1 means that the gate cannot tell them apart. 0 when there is no third expert.
        load_cov: coefficient of variation of the experts' loads.
        dead_experts: experts that received nothing.
        gate_entropy: mean entropy of g in nats; log(n) is indifference.
    """

    max1_max2: float
    max2_max3: float
    load_cov: float
    dead_experts: int
    gate_entropy: float


class LoadMetrics(NamedTuple):
    """How evenly the experts of one layer are used: see `RouterMetrics`."""

    load_cov: float
    dead_experts: int


def load_metrics(counts_E: Tensor) -> LoadMetrics:
    """The figures of the assignments per expert, over as many tokens as they were counted."""
    load_E = counts_E.double()
    spread = float(load_E.std(correction=0) / load_E.mean().clamp_min(1e-20))
    return LoadMetrics(spread, int((load_E == 0).sum()))


@torch.no_grad()
def router_metrics(routing: Routing, valid_T: Tensor | None = None) -> RouterMetrics:
    """The figures of one layer over the valid tokens of one batch; of no tokens, zeros."""
    probs_TE = routing.probs_TE if valid_T is None else routing.probs_TE[valid_T]
    if probs_TE.shape[0] == 0:
        return RouterMetrics(0.0, 0.0, 0.0, routing.counts_E.numel(), 0.0)
    top = probs_TE.topk(min(3, probs_TE.shape[-1]), dim=-1).values.clamp_min(1e-20)
    ratios = (top[:, :-1] / top[:, 1:]).mean(0).tolist() + [0.0, 0.0]
    entropy = -(probs_TE * probs_TE.clamp_min(1e-20).log()).sum(-1).mean()
    load = load_metrics(routing.counts_E)
    return RouterMetrics(
        max1_max2=ratios[0],
        max2_max3=ratios[1],
        load_cov=load.load_cov,
        dead_experts=load.dead_experts,
        gate_entropy=float(entropy),
    )
