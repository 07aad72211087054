"""Modes R and G: whole tokens are brought to the experts (or are there already), and partial outputs are summed.

Every rank forms the weighted sum over those of a token's choices that are its own experts. The sum over ranks is the
reduction that brings tokens home, so nothing about it depends on the data: shapes are static, and no rank waits to be
told a number of rows.

Shapes: T tokens of this rank, N tokens of all ranks that share them, K choices, R rows for the experts, D model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from skymoe.model.dispatch import Received, row_multiple
from skymoe.ops.permute import Grouping, gather_tokens, group_by_expert, scatter_tokens
from skymoe.ops.routing import Routing
from skymoe.parallel.collectives import (
    Coming,
    arrived,
    start_gather_rows,
    start_scatter_rows,
    start_sum_backward,
    start_sum_forward,
)
from skymoe.parallel.dispatcher import ShardedDispatcher
from skymoe.parallel.local_rows import only_local
from skymoe.parallel.mesh import Group
from skymoe.parallel.steps import Steps
from skymoe.parallel.traffic import Kind, Traffic
from skymoe.parallel.transport import start_gather
from skymoe.spec.split import Split


class TokenReceipt(NamedTuple):
    """What `combine` needs."""

    grouping: Grouping
    weights_NK: Tensor
    rows: Split


class GatheredDispatcher(ShardedDispatcher[TokenReceipt]):
    """Mode G: all-gather of tokens, ids and weights; reduce-scatter of partial outputs."""

    def __init__(
        self, group: Group, experts: range, rows: Split, *, overlap: bool, chunks: int, traffic: Traffic | None
    ) -> None:
        self.group, self.experts, self.rows, self.rank = group, experts, rows, group.rank
        self.overlap, self.chunks, self.traffic = overlap, chunks, traffic

    def dispatch_steps(self, x_TD: Tensor, routing: Routing, rows: Split) -> Steps[tuple[Received, TokenReceipt]]:
        ids_TK = routing.expert_ids_TK.to(torch.int32)
        ids = start_gather(ids_TK, rows, self.group, kind=Kind.METADATA, traffic=self.traffic)
        weights = start_gather_rows(routing.weights_TK, rows, self.group, self.traffic, Kind.METADATA)
        if not self.overlap:
            ids.wait()
            weights.settle()
        tokens = start_gather_rows(x_TD, rows, self.group, self.traffic)
        yield
        weights_NK = arrived(weights)
        grouping = group_by_expert(only_local(ids.wait().long(), weights_NK, self.experts), row_multiple(x_TD))
        x_RD = gather_tokens(arrived(tokens), grouping)
        return Received(x_RD, grouping.offsets_E), TokenReceipt(grouping, weights_NK, rows)

    def combine_steps(self, y_RD: Tensor, receipt: TokenReceipt) -> Steps[Tensor]:
        y_ND = scatter_tokens(y_RD, receipt.weights_NK, receipt.grouping)
        out = start_scatter_rows(y_ND, receipt.rows, self.group, self.traffic)
        yield
        return arrived(out)


class ReplicatedDispatcher(ShardedDispatcher[TokenReceipt]):
    """Mode R: every tp rank has the tokens of its replica. Under ep and etp those of other replicas are gathered.

    Router weights and tokens enter through `sum_backward`: every tp rank uses them for its own experts only, so that
    their gradients are sums over tp, and then the same on each of its ranks.
    """

    def __init__(
        self, tp: Group, dp: Group, experts: range, rows: Split, *, overlap: bool, chunks: int, traffic: Traffic | None
    ) -> None:
        self.tp, self.experts, self.rows, self.rank = tp, experts, rows, dp.rank
        self.overlap, self.chunks, self.traffic = overlap, chunks, traffic
        self.replicas = GatheredDispatcher(dp, experts, rows, overlap=overlap, chunks=1, traffic=traffic)

    def dispatch_steps(self, x_TD: Tensor, routing: Routing, rows: Split) -> Steps[tuple[Received, TokenReceipt]]:
        weights = start_sum_backward(routing.weights_TK, self.tp, self.traffic, Kind.METADATA)
        tokens = start_sum_backward(x_TD, self.tp, self.traffic)
        yield
        routing = routing._replace(weights_TK=arrived(weights))
        result = yield from self.replicas.dispatch_steps(arrived(tokens), routing, rows)
        return result

    def combine_steps(self, y_RD: Tensor, receipt: TokenReceipt) -> Steps[Tensor]:
        partial_TD = yield from self.replicas.combine_steps(y_RD, receipt)
        total: Coming = start_sum_forward(partial_TD, self.tp, self.traffic)
        yield
        total.advance()
        yield
        return arrived(total)
