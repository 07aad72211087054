"""The decoder: embedding, layers, norm, head. One device; the running batch is an argument.

    logits_BTV = model(tokens_BT)                                    the whole thing
    out = model.hidden(tokens_BT, batch, cache=.., recompute=..)     final hidden states and every layer's Routing

Training takes `hidden` and goes on with `ops.loss.linear_cross_entropy`, which never holds all logits; the balance
losses are formed outside, from the routings. Shapes: B batch, T tokens, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from skymoe.model.batch import BatchInfo, KVCache
from skymoe.model.block import Block
from skymoe.model.inputs import AttentionInputs, attention_inputs
from skymoe.model.linear import Embedding, Linear, RMSNorm
from skymoe.model.recompute import recompute_layer
from skymoe.ops.experts import ExpertsBackend
from skymoe.ops.routing import Routing
from skymoe.spec.model import ModelSpec


class HiddenOutput(NamedTuple):
    """What a forward pass returns before the head.

    Attributes:
        hidden_BTD: hidden states after the final norm.
        routings: one Routing per MoE layer, in layer order.
    """

    hidden_BTD: Tensor
    routings: tuple[Routing, ...]


class Transformer(nn.Module):
    """A decoder-only language model as its spec says. Uninitialised: model/init.py or model/load.py fills it."""

    def __init__(self, spec: ModelSpec, *, experts: ExpertsBackend = ExpertsBackend.GROUPED) -> None:
        super().__init__()
        self.spec = spec
        self.embed = Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Block(spec, layer, experts) for layer in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.head = None if spec.tie_embeddings else Linear(spec.hidden_size, spec.vocab_size)

    @property
    def head_weight(self) -> Tensor:
        """The output projection (V, D): the embedding table when tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) int64 token ids -> (B, T, V) logits."""
        return self.logits(self.hidden(tokens_BT).hidden_BTD)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Final hidden states -> logits, (..., D) -> (..., V)."""
        return nn.functional.linear(hidden_BTD, self.head_weight)

    def hidden(
        self,
        tokens_BT: Tensor,
        batch: BatchInfo | None = None,
        *,
        cache: KVCache | None = None,
        recompute: Collection[int] = (),
    ) -> HiddenOutput:
        """Run all layers.

        Args:
            tokens_BT: int64 token ids.
            batch: positions, document boundaries, pads, capacity.
            cache: keys and values so far; extended in place by these tokens, so there is no backward through it.
            recompute: layers to run again in the backward pass instead of keeping their activations.
        """
        batch = batch or BatchInfo()
        inputs = self.attention_inputs(tokens_BT, batch, cache)
        x_BTD = self.embed(tokens_BT)
        routings = []
        for layer, block in enumerate(self.layers):
            if layer in recompute and torch.is_grad_enabled():
                x_BTD, routing = recompute_layer(block, x_BTD, inputs, batch)
            else:
                x_BTD, routing = block(x_BTD, inputs, batch)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return HiddenOutput(self.norm(x_BTD), tuple(routings))

    def attention_inputs(self, tokens_BT: Tensor, batch: BatchInfo, cache: KVCache | None) -> AttentionInputs:
        """Positions and masks of a batch, shared by all layers; for callers that run the layers one at a time."""
        return attention_inputs(self.spec, tokens_BT.shape[1], batch, cache, tokens_BT.device)
