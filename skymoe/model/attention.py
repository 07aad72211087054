"""Grouped-query self-attention with rotary embedding, with or without a cache.

Shapes: B batch, T tokens, D model, H query heads, G key/value heads, C head width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from skymoe.model.batch import KVCache
from skymoe.model.linear import Linear, RMSNorm
from skymoe.ops.attention import causal_attention
from skymoe.ops.rotary import apply_rotary
from skymoe.spec.model import ModelSpec


class AttentionInputs(NamedTuple):
    """What the layers of one forward pass share.

    Attributes:
        cos, sin: rotary tables, (B or 1, 1, T, C/2).
        masks: attention mask by window (see `ops.attention.attention_mask`).
        cache: keys and values so far, or None.
    """

    cos: Tensor
    sin: Tensor
    masks: dict[int | None, Tensor | None]
    cache: KVCache | None


class Attention(nn.Module):
    """o(softmax(q k^T / sqrt(C)) v), with per-head norms on q and k where the spec says so."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.window = layer, spec.head_dim, spec.window(layer)
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q = Linear(spec.hidden_size, query_size, bias=spec.qkv_bias)
        self.k = Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias)
        self.v = Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias)
        self.o = Linear(query_size, spec.hidden_size, bias=spec.o_bias)
        self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None

    def forward(self, x_BTD: Tensor, inputs: AttentionInputs) -> Tensor:
        q_BHTC, k_BGTC, v_BGTC = (self._heads(project(x_BTD)) for project in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q_BHTC, k_BGTC = self.q_norm(q_BHTC), self.k_norm(k_BGTC)
        q_BHTC = apply_rotary(q_BHTC, inputs.cos, inputs.sin)
        k_BGTC = apply_rotary(k_BGTC, inputs.cos, inputs.sin)
        if inputs.cache is not None:
            k_BGTC, v_BGTC = inputs.cache.extend(self.layer, k_BGTC, v_BGTC)
            q_BHTC = q_BHTC.to(k_BGTC.dtype)
        out_BHTC = causal_attention(q_BHTC, k_BGTC, v_BGTC, inputs.masks[self.window])
        return self.o(out_BHTC.transpose(1, 2).flatten(2))

    def _heads(self, x_BTX: Tensor) -> Tensor:
        """(B, T, heads * C) -> (B, heads, T, C)."""
        return x_BTX.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
