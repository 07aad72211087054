"""The mixture of experts with its experts divided over ranks: the one-device `MoE`, with another dispatcher around it.

The router is replicated. In mode R every rank routes all tokens, alike; in G and A each routes its rows. A real
capacity is that of the whole replica in either case: in G and A the ranks first tell each other how many assignments
each has for every expert and choice (n E K small integers), which gives every assignment its exact place in the order
of GShard. So what is dropped does not depend on tensor parallelism.

Shapes: N tokens of the micro-batch here (this rank's rows in G and A), K experts per token, E experts, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from skymoe.model.batch import BatchInfo
from skymoe.model.linear import Linear
from skymoe.model.moe import Experts, Router
from skymoe.ops.routing import Routing, count_assignments
from skymoe.parallel.collectives import gather_counts
from skymoe.parallel.dispatch import build_dispatcher, routed_experts
from skymoe.parallel.mesh import Group, Mesh
from skymoe.parallel.options import PartOptions
from skymoe.parallel.sharded import sharded_swiglu
from skymoe.parallel.tokens import Tokens
from skymoe.spec.layout import ExpertAxis
from skymoe.spec.model import ModelSpec


class ShardedMoE(nn.Module):
    """This rank's experts of a layer, its copy of the router, its part of the shared expert."""

    def __init__(self, spec: ModelSpec, mesh: Mesh, tokens: Tokens, options: PartOptions) -> None:
        super().__init__()
        moe, dim = spec.moe, spec.hidden_size
        assert moe is not None
        layout, coordinate = mesh.layout, mesh.coordinate
        self.tokens = tokens
        self.router = Router(dim, moe)
        if tokens.split is not None and mesh.tp.size > 1:
            self.router.ahead = assignments_ahead(mesh.tp, moe.num_experts)
        own = layout.experts(moe.num_experts).sizes[layout.expert_rank(coordinate)]
        is_cut = layout.expert is ExpertAxis.ETP
        width = layout.ffn(moe.ffn_size).sizes[coordinate.tp] if is_cut else moe.ffn_size
        # Of the spec, the experts read their number and width only.
        self.experts = Experts(
            dim, replace(moe, num_experts=own, ffn_size=width, top_k=1, gate_norm=None), options.experts
        )
        self.dispatcher = build_dispatcher(
            mesh,
            moe.num_experts,
            tokens.num_all,
            overlap=options.overlap,
            chunks=options.chunks,
            traffic=options.traffic,
        )
        self.shared = sharded_swiglu(dim, moe.shared_ffn_size, mesh) if moe.shared_ffn_size else None
        self.shared_gate = Linear(dim, 1) if moe.shared_ffn_size else None

    def forward(self, x_ND: Tensor, batch: BatchInfo) -> tuple[Tensor, Routing]:
        valid_N = None if batch.valid_BT is None else self.tokens.own(batch.valid_BT.flatten())
        routing = self.router(x_ND, valid_N, batch.capacity)
        y_ND = routed_experts(self.dispatcher, self.experts, x_ND, routing)
        if self.shared is not None and self.shared_gate is not None:
            shared_ND = self.tokens.leave(self.shared(self.tokens.enter(x_ND)))
            y_ND = y_ND + self.shared_gate(x_ND).sigmoid() * shared_ND
        return y_ND, routing


def assignments_ahead(group: Group, num_experts: int) -> Callable[[Tensor], Tensor]:
    """How many assignments of other ranks come before this rank's, by choice and expert: see `ops.routing.route`.

    First choices of all ranks come before second choices of any; within a choice lower ranks come first, since they
    have the earlier tokens.
    """

    def ahead(ids_NK: Tensor) -> Tensor:
        own_KE = torch.stack([count_assignments(ids_N, num_experts) for ids_N in ids_NK.unbind(1)])
        all_RKE = gather_counts(own_KE.flatten(), group).view(-1, *own_KE.shape)
        others_KE = all_RKE.sum(0) - own_KE
        earlier_choices_KE = others_KE.cumsum(0) - others_KE
        return earlier_choices_KE + all_RKE[: group.rank].sum(0)

    return ahead
