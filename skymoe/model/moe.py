"""The mixture of experts: route, dispatch, experts, combine.

Shapes: B batch, T tokens, D model, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from skymoe.model.batch import BatchInfo
from skymoe.model.dispatch import LocalDispatcher, TokenDispatcher
from skymoe.model.linear import Linear
from skymoe.model.mlp import SwiGLU
from skymoe.ops.deferred import DeferredWeights
from skymoe.ops.experts import ExpertsBackend, expert_swiglu
from skymoe.ops.routing import Routing, gate_logits, route
from skymoe.spec.model import MoESpec


class Router(nn.Module):
    """The gate of one layer: (T, D) -> Routing. fp32 inside, no bias; under autocast the norm hands it bf16."""

    expert_bias: Tensor | None

    def __init__(self, hidden_size: int, moe: MoESpec) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.num_experts, hidden_size))
        self.register_buffer("expert_bias", torch.zeros(moe.num_experts) if moe.expert_bias else None)
        self.ahead: Callable[[Tensor], Tensor] | None = None  # see `route`: set where other ranks share the capacity

    def forward(self, x_TD: Tensor, valid_T: Tensor | None, capacity: int | None) -> Routing:
        return route(
            gate_logits(x_TD, self.weight),
            top_k=self.moe.top_k,
            gate_norm=self.moe.gate_norm,
            norm_topk=self.moe.norm_topk,
            expert_bias_E=self.expert_bias,
            valid_T=valid_T,
            capacity=capacity,
            ahead=self.ahead,
        )


class Experts(nn.Module):
    """The stacked weights of a layer's experts: gate_up (E, 2F, D) with the gate's rows first, down (E, D, F).

    Attributes:
        deferred: where their gradients are put off to, under a zero-bubble schedule; None for the ordinary way.
    """

    deferred: DeferredWeights | None = None

    def __init__(self, hidden_size: int, moe: MoESpec, backend: ExpertsBackend) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(moe.num_experts, 2 * moe.ffn_size, hidden_size))
        self.down = nn.Parameter(torch.empty(moe.num_experts, hidden_size, moe.ffn_size))
        self.backend = backend

    def forward(self, x_RD: Tensor, offsets_E: Tensor) -> Tensor:
        return expert_swiglu(x_RD, self.gate_up, self.down, offsets_E, self.backend, self.deferred)


class MoE(nn.Module):
    """A feed-forward of many experts, few of them active per token."""

    dispatcher: TokenDispatcher

    def __init__(self, hidden_size: int, moe: MoESpec, backend: ExpertsBackend) -> None:
        super().__init__()
        self.router = Router(hidden_size, moe)
        self.experts = Experts(hidden_size, moe, backend)
        self.dispatcher = LocalDispatcher()
        shared = moe.shared_ffn_size
        self.shared = SwiGLU(hidden_size, shared) if shared else None
        self.shared_gate = Linear(hidden_size, 1) if shared else None

    def forward(self, x_BTD: Tensor, batch: BatchInfo) -> tuple[Tensor, Routing]:
        x_TD = x_BTD.flatten(0, -2)
        valid_T = None if batch.valid_BT is None else batch.valid_BT.flatten()
        routing = self.router(x_TD, valid_T, batch.capacity)
        received, receipt = self.dispatcher.dispatch(x_TD, routing)
        y_TD = self.dispatcher.combine(self.experts(received.x_RD, received.offsets_E), receipt)
        if self.shared is not None and self.shared_gate is not None:
            y_TD = y_TD + self.shared_gate(x_TD).sigmoid() * self.shared(x_TD)
        return y_TD.view_as(x_BTD), routing
