"""Group assignments by expert, and undo it exactly.

Both directions are gathers, forward and backward: no scatter-add, so results are deterministic on every device, and the
backward of one is the forward of the other with the same two index vectors.

Every expert's rows can be rounded up to a multiple (`row_multiple`), the rest filled with zero rows. A CPU wants
that: its matmul library compiles a kernel for each number of rows it meets, loads differ from step to step, and so a
fifth of a small training step went into compiling (docs/performance.md). Zero rows change nothing: they are read by
no token, and the gradient that comes back to them is zero.

Shapes: T tokens, K experts per token, R rows (T*K assignments less pads and drops, plus fillers), E experts, D model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from skymoe.ops.routing import Routing


class Grouping(NamedTuple):
    """A permutation of the sent assignments into expert order.

    Attributes:
        slots_R: which assignment (t*K + k) stands in each row; 0 in fillers.
        place_TK: the row of each assignment; 0 for the unsent ones, whose combine weight is 0.
        offsets_E: int32, one past the last row of each expert, fillers included.
        sent_TK: bool, False for the unsent; None when all are sent.
        fillers: the rows that belong to no assignment; None when there are none.
    """

    slots_R: Tensor
    place_TK: Tensor
    offsets_E: Tensor
    sent_TK: Tensor | None
    fillers: Tensor | None = None


def group_by_expert(routing: Routing, row_multiple: int = 1) -> Grouping:
    """The stable permutation that puts expert 0's assignments first, then expert 1's, and so on.

    Args:
        routing: where the tokens go.
        row_multiple: round every expert's rows up to a multiple of this; 1 adds none, and waits for no
            device unless there are pads or drops.
    """
    ids_TK = routing.expert_ids_TK
    order = ids_TK.flatten().argsort(stable=True)  # unsent ids are E, so they stand last
    counts_E = routing.sent_counts_E
    sent_TK = None if routing.is_full else ids_TK < counts_E.numel()
    num_sent = order.numel() if routing.is_full else int(counts_E.sum())
    rows, slots_R, fillers = torch.arange(order.numel(), device=order.device), order[:num_sent], None
    offsets_E = counts_E.cumsum(0)
    if row_multiple > 1:
        padded_E = counts_E.add(row_multiple - 1).div(row_multiple, rounding_mode="floor") * row_multiple
        offsets_E, ends_E = padded_E.cumsum(0), offsets_E
        shift_E = (offsets_E - padded_E) - (ends_E - counts_E)
        rows[:num_sent] += shift_E[ids_TK.flatten()[slots_R]]
        is_filler = torch.ones(int(offsets_E[-1]), dtype=torch.bool, device=order.device)
        is_filler[rows[:num_sent]] = False
        fillers = is_filler.nonzero()[:, 0]
        slots_R = torch.zeros_like(is_filler, dtype=order.dtype).index_copy_(0, rows[:num_sent], slots_R)
    place = torch.empty_like(order)
    place[order] = rows
    place_TK = place.view_as(ids_TK)
    if sent_TK is not None:
        place_TK = place_TK.masked_fill(~sent_TK, 0)
    return Grouping(slots_R, place_TK, offsets_E.to(torch.int32), sent_TK, fillers)


def _rows_of_tokens(x_TD: Tensor, grouping: Grouping) -> Tensor:
    """Each row is a copy of its token; fillers are zero."""
    rows_RD = x_TD.index_select(0, grouping.slots_R // grouping.place_TK.shape[1])
    return rows_RD if grouping.fillers is None else rows_RD.index_fill_(0, grouping.fillers, 0)


class _Gather(torch.autograd.Function):
    """x_TD -> rows of the sent assignments, (R, D)."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, grouping: Grouping) -> Tensor:
        ctx.grouping = grouping
        return _rows_of_tokens(x_TD, grouping)

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
        return _rows_of_tokens(grad_TD, ctx.grouping), None


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
