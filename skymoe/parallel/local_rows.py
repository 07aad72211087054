"""Rows in the order of this rank's experts, once they are here: what remains of dispatch without any exchange.

Two cases. Where whole tokens came (modes R and G), those choices are kept that name a local expert, and the one-device
permutation does the rest (`model.dispatch.LocalDispatcher`). Where single assignments came (mode A), each row has one
expert, and rows are put in their order; weights stay with the token's owner.

Either way each expert's rows are rounded up as on one device (ops/permute.py).

Shapes: N tokens, K choices per token, M assignments that came, R rows for the experts, E experts, D model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from skymoe.model.dispatch import Received
from skymoe.ops.permute import Grouping, gather_tokens, group_by_expert
from skymoe.ops.routing import Routing, count_assignments


def assignments(ids_NK: Tensor, weights_NK: Tensor, num_experts: int, *, is_full: bool) -> Routing:
    """A routing of which only the choices are known; ids equal to `num_experts` are sent nowhere."""
    unknown_NE = weights_NK.new_empty(ids_NK.shape[0], 0)
    return Routing(weights_NK, ids_NK, count_assignments(ids_NK, num_experts), unknown_NE, unknown_NE, is_full)


def only_local(ids_NK: Tensor, weights_NK: Tensor, experts: range) -> Routing:
    """The choices that fall on `experts`, numbered from 0; all others are sent nowhere."""
    is_local = (ids_NK >= experts.start) & (ids_NK < experts.stop)
    return assignments((ids_NK - experts.start).where(is_local, len(experts)), weights_NK, len(experts), is_full=False)


class Order(NamedTuple):
    """Rows as they came <-> rows by expert, each direction a gather with the other for its gradient."""

    by_expert: Grouping
    as_came: Grouping


def order_by_expert(experts_M: Tensor, num_experts: int, row_multiple: int) -> Order:
    """The stable order of rows by their expert (all of them valid)."""
    ids_M1 = experts_M[:, None]
    by_expert = group_by_expert(
        assignments(ids_M1, ids_M1.new_zeros(ids_M1.shape, dtype=torch.float32), num_experts, is_full=True),
        row_multiple,
    )
    sent_R1 = None
    if by_expert.fillers is not None:
        sent_R1 = torch.ones_like(by_expert.slots_R, dtype=torch.bool).index_fill_(0, by_expert.fillers, False)[:, None]
    as_came = Grouping(by_expert.place_TK[:, 0], by_expert.slots_R[:, None], by_expert.offsets_E, sent_R1)
    return Order(by_expert, as_came)


def sort_rows(x_MD: Tensor, order: Order) -> Received:
    """Rows as they came -> rows for the experts."""
    return Received(gather_tokens(x_MD, order.by_expert), order.by_expert.offsets_E)


def unsort_rows(y_RD: Tensor, order: Order) -> Tensor:
    """The experts' outputs in the order in which their inputs came."""
    return gather_tokens(y_RD, order.as_came)
