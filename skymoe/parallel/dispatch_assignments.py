"""Mode A: each assignment of a token to an expert is a row that travels to the expert's rank, and back (all-to-all).

Rows leave in the order of experts, so those for one rank lie together. Before them go the counts: how many rows for
each of the receiver's experts. Nothing else is needed there, since the router's weights stay with the token's owner,
who forms the weighted sum.

Under etp the ranks that share an expert's inner width are those of one tp group. The all-to-all goes between replicas
(rank t of one to rank t of another); what arrived is gathered over tp, and the partial outputs are reduce-scattered.

The number of rows is data, so the host waits for the counts of each pass: the one point where A stops a GPU's queue.

Shapes: T tokens of this rank, M assignments that came, R rows for the experts, E experts, X of them here, D model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from skymoe.model.dispatch import Received, row_multiple
from skymoe.ops.permute import Grouping, gather_tokens, group_by_expert, scatter_tokens
from skymoe.ops.routing import Routing
from skymoe.parallel.collectives import arrived, start_exchange_rows, start_gather_rows, start_scatter_rows
from skymoe.parallel.dispatcher import ShardedDispatcher
from skymoe.parallel.local_rows import Order, order_by_expert, sort_rows, unsort_rows
from skymoe.parallel.mesh import Group
from skymoe.parallel.steps import Steps
from skymoe.parallel.traffic import Kind, Traffic
from skymoe.parallel.transport import start_exchange, start_gather
from skymoe.spec.split import Split


class AssignmentReceipt(NamedTuple):
    """What `combine` needs.

    Attributes:
        grouping: this rank's assignments in the order of experts.
        weights_TK: of this rank's tokens.
        sent, came: rows to and from each rank of the all-to-all.
        shared: rows that came to each rank of the tp group.
        order: of the rows that came.
    """

    grouping: Grouping
    weights_TK: Tensor
    sent: tuple[int, ...]
    came: tuple[int, ...]
    shared: Split
    order: Order


class AllToAllDispatcher(ShardedDispatcher[AssignmentReceipt]):
    """Mode A. `group` has the experts divided by `experts`; `cut` are the ranks that share each expert (etp)."""

    def __init__(
        self,
        group: Group,
        cut: Group,
        experts: Split,
        rows: Split,
        *,
        overlap: bool,
        chunks: int,
        traffic: Traffic | None,
    ) -> None:
        self.group, self.cut, self.experts, self.rows, self.rank = group, cut, experts, rows, group.rank
        self.overlap, self.chunks, self.traffic = overlap, chunks, traffic
        self.num_local = experts.sizes[group.rank]

    def dispatch_steps(self, x_TD: Tensor, routing: Routing, rows: Split) -> Steps[tuple[Received, AssignmentReceipt]]:
        counts_E = routing.sent_counts_E
        receive = (self.num_local,) * self.group.size
        counts = start_exchange(
            counts_E, self.experts.sizes, receive, self.group, kind=Kind.METADATA, traffic=self.traffic
        )
        if not self.overlap:
            counts.wait()
        grouping = group_by_expert(routing)
        rows_MD = gather_tokens(x_TD, grouping)
        yield
        came_SX = counts.wait().view(self.group.size, self.num_local)  # S: sources
        all_came = start_gather(
            came_SX[None], Split((1,) * self.cut.size), self.cut, kind=Kind.METADATA, traffic=self.traffic
        )
        going_S = torch.stack([part.sum() for part in counts_E.split(self.experts.sizes)])
        sent, came = (tuple(row) for row in torch.stack((going_S, came_SX.sum(1))).tolist())
        coming = start_exchange_rows(rows_MD, sent, came, self.group, self.traffic)
        came_CSX = all_came.wait()  # C: ranks that share the experts
        shared = Split(tuple(came_CSX.sum((1, 2)).tolist()))
        order = self._order(came_CSX, row_multiple(x_TD))
        yield
        if self.cut.size > 1:
            coming = start_gather_rows(arrived(coming), shared, self.cut, self.traffic)
            yield
        received = sort_rows(arrived(coming), order)
        return received, AssignmentReceipt(grouping, routing.weights_TK, sent, came, shared, order)

    def combine_steps(self, y_RD: Tensor, receipt: AssignmentReceipt) -> Steps[Tensor]:
        y_MD = unsort_rows(y_RD, receipt.order)
        if self.cut.size > 1:
            whole = start_scatter_rows(y_MD, receipt.shared, self.cut, self.traffic)
            yield
            y_MD = arrived(whole)
        back = start_exchange_rows(y_MD, receipt.came, receipt.sent, self.group, self.traffic)
        yield
        return scatter_tokens(arrived(back), receipt.weights_TK, receipt.grouping)

    def _order(self, came_CSX: Tensor, multiple: int) -> Order:
        """Rows come by sharing rank, then by source, then by expert."""
        experts_X = torch.arange(self.num_local, device=came_CSX.device)
        experts_M = experts_X.expand(came_CSX.shape).reshape(-1).repeat_interleave(came_CSX.reshape(-1))
        return order_by_expert(experts_M, self.num_local, multiple)
