"""Group assignments by expert, and undo it exactly.

Both directions are gathers, forward and backward: no scatter-add, so results are deterministic on every device, and the
backward of one is the forward of the other with the same two index vectors.

Shapes: T tokens, K experts per token, R assignments that are sent (T*K less pads and drops), E experts, D model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from skymoe.ops.routing import Routing


class Grouping(NamedTuple):
    """A permutation of the sent assignments into expert order.

    Attributes:
        slots_R: which assignment (t*K + k) stands at each place.
        place_TK: where each assignment stands; 0 for the unsent ones, whose combine weight is 0.
        offsets_E: int32, one past the last place of each expert.
        sent_TK: bool, False for the unsent; None when all are sent.
    """

    slots_R: Tensor
    place_TK: Tensor
    offsets_E: Tensor
    sent_TK: Tensor | None


def group_by_expert(routing: Routing) -> Grouping:
    """The stable permutation that puts expert 0's assignments first, then expert 1's, and so on."""
    ids_TK = routing.expert_ids_TK
    slots = ids_TK.flatten().argsort(stable=True)
    offsets_E = routing.sent_counts_E.cumsum(0).to(torch.int32)
    place = torch.empty_like(slots)
    place[slots] = torch.arange(slots.numel(), device=slots.device)
    if routing.is_full:
        return Grouping(slots, place.view_as(ids_TK), offsets_E, None)
    num_sent = int(offsets_E[-1])  # unsent ids are E, so they stand last
    sent_TK = ids_TK < offsets_E.numel()
    return Grouping(slots[:num_sent], place.view_as(ids_TK).masked_fill(~sent_TK, 0), offsets_E, sent_TK)


class _Gather(torch.autograd.Function):
    """x_TD -> rows of the sent assignments, (R, D)."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, grouping: Grouping) -> Tensor:
        ctx.grouping = grouping
        return x_TD.index_select(0, grouping.slots_R // grouping.place_TK.shape[1])

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> tuple[Tensor, None]:
        return _sum_over_choices(grad_RD, ctx.grouping), None


class _Scatter(torch.autograd.Function):
    """(R, D) rows -> sum over the K choices of each token, (T, D)."""

    @staticmethod
    def forward(ctx, y_RD: Tensor, grouping: Grouping) -> Tensor:
        ctx.grouping = grouping
        return _sum_over_choices(y_RD, grouping)

    @staticmethod
    def backward(ctx, grad_TD: Tensor) -> tuple[Tensor, None]:
        return grad_TD.index_select(0, ctx.grouping.slots_R // ctx.grouping.place_TK.shape[1]), None


def _sum_over_choices(y_RD: Tensor, grouping: Grouping) -> Tensor:
    num_tokens, top_k = grouping.place_TK.shape
    if y_RD.shape[0] == 0:
        return y_RD.new_zeros(num_tokens, y_RD.shape[1])
    out_TD = None
    for k in range(top_k):  # one choice at a time: a (T, K, D) intermediate costs more memory traffic than it saves
        rows_TD = y_RD.index_select(0, grouping.place_TK[:, k])
        if grouping.sent_TK is not None:
            rows_TD.masked_fill_(~grouping.sent_TK[:, k, None], 0)  # not a product: row 0 may be infinite
        out_TD = rows_TD if out_TD is None else out_TD.add_(rows_TD)
    assert out_TD is not None
    return out_TD


def gather_tokens(x_TD: Tensor, grouping: Grouping) -> Tensor:
    """Copy each token to the places of its assignments: (T, D) -> (R, D) in expert order."""
    return _Gather.apply(x_TD, grouping)


def scatter_tokens(y_RD: Tensor, weights_TK: Tensor, grouping: Grouping) -> Tensor:
    """Bring expert outputs back and sum each token's, weighted: (R, D) -> (T, D), out[t] = sum_k w[t,k] y[place[t,k]].

    The products are formed in fp32 when the weights are; the result has the dtype of `y_RD`.
    """
    weights_R = weights_TK.reshape(-1).index_select(0, grouping.slots_R)
    return _Scatter.apply((y_RD * weights_R[:, None]).to(y_RD.dtype), grouping)
