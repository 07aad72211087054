"""The gate: logits in, chosen experts and combine weights out. fp32 (fp64 for fp64), whatever autocast says.

    z  = W x                                            fp32, no bias
    z~ = lambda (z - mu) / (sigma + eps)                Eq. 6: gating logit normalization (optional)
    g  = softmax(z~)                                    Eq. 1
    top-k of g, renormalized over the k chosen          Eq. 2

The normalization gives every token's logits the same spread, so that the gate keeps telling experts apart (Max1/Max2
stays well above 1) instead of collapsing towards 1/n each. The released inference code divides by the unbiased
deviation, subtracts no mean and adds no epsilon; the softmax is shift-invariant, so only `ddof` and `eps` matter. See
`GateNormSpec`.

A `Routing` is returned, never stored: under activation checkpointing the chosen ids are saved (model/recompute.py), so
a token cannot take another way on the second forward, and counts are not counted twice.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from skymoe.base.errors import SkymoeError
from skymoe.spec.model import GateNormSpec


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
        weights_TK: fp32 combine weights; 0 where nothing is sent.
        expert_ids_TK: int64; E (one past the last expert) where nothing is sent: pads and assignments over capacity.
        counts_E: int64 assignments wanted per expert by the valid tokens, before any drop by capacity.
        probs_TE: g, the full softmax (of the normalized logits when gate normalization is on).
        logits_TE: z, the raw fp32 logits; 0 for pads.
        is_full: every one of the T*K assignments is sent (no pads, no capacity), known without a look at the data.
    """

    weights_TK: Tensor
    expert_ids_TK: Tensor
    counts_E: Tensor
    probs_TE: Tensor
    logits_TE: Tensor
    is_full: bool

    @property
    def sent_counts_E(self) -> Tensor:
        """int64 assignments that each expert really receives."""
        return self.counts_E if self.is_full else count_assignments(self.expert_ids_TK, self.counts_E.numel())


def gate_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Form z = W x in fp32 (fp64 for fp64), (T, D) x (E, D) -> (T, E), outside any autocast."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.to(wide), weight_ED.to(wide))


def normalize_logits(logits_TE: Tensor, norm: GateNormSpec) -> Tensor:
    """Eq. 6: z~ = lambda (z - mu) / (sigma + eps) over the experts of each token.

    Constant logits stay constant, hence an indifferent gate, also where eps is 0: the hidden state of a pad may be 0.
    """
    centred_TE = logits_TE - logits_TE.mean(-1, keepdim=True) if norm.subtract_mean else logits_TE
    deviation_T1 = logits_TE.std(-1, correction=norm.ddof, keepdim=True) + norm.eps
    return norm.scale * centred_TE / deviation_T1.masked_fill(deviation_T1 == 0, 1)


def count_assignments(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Assignments per expert, (E,) int64; ids equal to E are not counted."""
    ids = expert_ids_TK.flatten()
    return ids.new_zeros(num_experts + 1).scatter_add_(0, ids, torch.ones_like(ids))[:-1]


def route(
    logits_TE: Tensor,
    *,
    top_k: int,
    gate_norm: GateNormSpec | None = None,
    norm_topk: bool = True,
    expert_bias_E: Tensor | None = None,
    valid_T: Tensor | None = None,
    capacity: int | None = None,
    ahead: Callable[[Tensor], Tensor] | None = None,
) -> Routing:
    """Choose `top_k` experts for each token.

    Args:
        logits_TE: raw gate logits; narrower ones than fp32 are widened first.
        top_k: experts per token.
        gate_norm: gating logit normalization (Eq. 6), or None.
        norm_topk: renormalize the chosen probabilities to sum to 1 (Eq. 2).
        expert_bias_E: DeepSeek's loss-free bias. It takes part in the choice only, not in the weights; added to z~ when
            gate normalization is on (unit deviation), else to the probabilities.
        valid_T: bool, False for pads: they are sent nowhere and counted nowhere.
        capacity: largest number of assignments per expert (`balance.capacity`); those above it are dropped, in the
            order of GShard (all first choices before all second choices, then by position), and the weights that remain
            are renormalized if `norm_topk`. None drops nothing.
        ahead: where the tokens are a part of those that share the capacity: given the chosen ids (T, K), answers how
            many assignments of other parts come before this part's, (K, E) int64 by choice and expert.

    Returns:
        The routing. `weights_TK` and `probs_TE` carry gradients; the choice itself has none.
    """
    num_experts = logits_TE.shape[-1]
    if not 1 <= top_k <= num_experts:
        raise SkymoeError(f"top_k is {top_k}, but the logits are of {num_experts} experts")
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    if valid_T is not None:
        logits_TE = logits_TE.masked_fill(~valid_T[:, None], 0)  # a pad may hold anything, not-a-number included
    normalized_TE = normalize_logits(logits_TE, gate_norm) if gate_norm else logits_TE
    probs_TE = normalized_TE.softmax(-1)
    scores_TE = normalized_TE
    if expert_bias_E is not None:
        scores_TE = (normalized_TE if gate_norm else probs_TE) + expert_bias_E
    ids_TK = scores_TE.detach().topk(top_k, dim=-1).indices
    if valid_T is not None:
        ids_TK = ids_TK.masked_fill(~valid_T[:, None], num_experts)
    counts_E = count_assignments(ids_TK, num_experts)
    if capacity is not None:
        ids_TK = drop_over_capacity(ids_TK, num_experts, capacity, None if ahead is None else ahead(ids_TK))
    is_full = valid_T is None and capacity is None
    weights_TK = probs_TE.gather(-1, ids_TK if is_full else ids_TK.clamp(max=num_experts - 1))
    if not is_full:
        weights_TK = weights_TK * (ids_TK < num_experts)
    if norm_topk:
        total_T1 = weights_TK.sum(-1, keepdim=True)
        weights_TK = weights_TK / total_T1.masked_fill(total_T1 == 0, 1)  # 0 where all of a token's choices are unsent
    return Routing(weights_TK, ids_TK, counts_E, probs_TE, logits_TE, is_full)


def drop_over_capacity(
    expert_ids_TK: Tensor, num_experts: int, capacity: int, ahead_KE: Tensor | None = None
) -> Tensor:
    """Send nowhere (id E) what comes after the first `capacity` assignments of an expert, first choices first.

    `ahead_KE` counts the assignments of other parts of the tokens that come before this part's (see `route`).
    """
    num_tokens, top_k = expert_ids_TK.shape
    ids_KT = expert_ids_TK.t().reshape(-1)
    order = ids_KT.argsort(stable=True)
    counts_E = count_assignments(ids_KT, num_experts)
    starts = torch.cat((counts_E.new_zeros(1), counts_E.cumsum(0)))  # one more: the pads' group begins after the last
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    place -= starts[ids_KT]
    if ahead_KE is not None:
        ahead_KX = torch.cat((ahead_KE, ahead_KE.new_zeros(top_k, 1)), 1)  # one more for the unsent
        place += ahead_KX.gather(1, ids_KT.view(top_k, num_tokens)).flatten()
    keep = place < capacity
    return ids_KT.where(keep, num_experts).view(top_k, num_tokens).t().contiguous()
