"""Dispatch: tokens go to the experts that were chosen for them, and come back.

The contract, kept by the local version here and by every distributed one:

    received, receipt = dispatch(x_TD, routing)     rows grouped by expert, ready for the grouped matmul
    out_TD = combine(y_RD, receipt)                 each token's outputs, weighted and summed

The receipt is all that connects the two. There are no hooks and no state between them, so several micro-batches may be
in flight, and the backward of one pass cannot meet the indices of another. A receipt is redeemed once per dispatch.

Shapes: T tokens, R received rows, D model, E experts.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from skymoe.ops.permute import Grouping, gather_tokens, group_by_expert, scatter_tokens
from skymoe.ops.precision import matmul_dtype
from skymoe.ops.routing import Routing


class Receipt(NamedTuple):
    """What `combine` needs to undo a `dispatch`."""

    grouping: Grouping
    weights_TK: Tensor


class Received(NamedTuple):
    """Rows for the local experts.

    Attributes:
        x_RD: copies of tokens, grouped by expert.
        offsets_E: int32, one past the last row of each local expert.
    """

    x_RD: Tensor
    offsets_E: Tensor


class TokenDispatcher(Protocol):
    """Moves tokens to experts and back. Implementations keep no state between the two calls."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Received, Receipt]:
        """Send each token to its experts."""
        ...

    def combine(self, y_RD: Tensor, receipt: Receipt) -> Tensor:
        """Bring the experts' outputs back: (R, D) -> (T, D)."""
        ...


class LocalDispatcher:
    """All experts live here: a permutation and its inverse."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> tuple[Received, Receipt]:
        grouping = group_by_expert(routing, row_multiple(x_TD))
        return Received(gather_tokens(x_TD, grouping), grouping.offsets_E), Receipt(grouping, routing.weights_TK)

    def combine(self, y_RD: Tensor, receipt: Receipt) -> Tensor:
        return scatter_tokens(y_RD, receipt.weights_TK, receipt.grouping)


def row_multiple(x_TD: Tensor) -> int:
    """64 where the matmuls of a CPU are compiled by shape (bf16, fp16), else 1."""
    compiled = x_TD.device.type == "cpu" and matmul_dtype(x_TD) in (torch.bfloat16, torch.float16)
    return 64 if compiled else 1
