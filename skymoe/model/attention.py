"""Grouped-query self-attention with rotary embedding, with or without a cache.

Shapes: B batch, T tokens, D model, H query heads, G key/value heads, C head width.
"""

from __future__ import annotations

from torch import Tensor, nn

from skymoe.model.inputs import AttentionInputs
from skymoe.model.linear import Linear, RMSNorm
from skymoe.ops.attention import causal_attention
from skymoe.ops.rotary import apply_rotary
from skymoe.spec.model import ModelSpec, QkNorm


class Attention(nn.Module):
    """o(softmax(q k^T / sqrt(C)) v), with norms on q and k where the spec says so: per head, or over all heads."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.window = layer, spec.head_dim, spec.window(layer)
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q = Linear(spec.hidden_size, query_size, bias=spec.qkv_bias)
        self.k = Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias)
        self.v = Linear(spec.hidden_size, kv_size, bias=spec.qkv_bias)
        self.o = Linear(query_size, spec.hidden_size, bias=spec.o_bias)
        self.norm_full, normed = spec.qk_norm is QkNorm.FULL, spec.qk_norm is not None
        self.q_norm = RMSNorm(query_size if self.norm_full else spec.head_dim, spec.norm_eps) if normed else None
        self.k_norm = RMSNorm(kv_size if self.norm_full else spec.head_dim, spec.norm_eps) if normed else None

    def forward(self, x_BTD: Tensor, inputs: AttentionInputs) -> Tensor:
        q_BHTC = apply_rotary(self._normed_heads(self.q(x_BTD), self.q_norm), inputs.cos, inputs.sin)
        k_BGTC = apply_rotary(self._normed_heads(self.k(x_BTD), self.k_norm), inputs.cos, inputs.sin)
        v_BGTC = self._heads(self.v(x_BTD))
        if inputs.cache is not None:
            k_BGTC, v_BGTC = inputs.cache.extend(self.layer, k_BGTC, v_BGTC)
            q_BHTC = q_BHTC.to(k_BGTC.dtype)
        out_BHTC = causal_attention(q_BHTC, k_BGTC, v_BGTC, inputs.masks[self.window])
        return self.o(out_BHTC.transpose(1, 2).flatten(2))

    def _normed_heads(self, x_BTX: Tensor, norm: RMSNorm | None) -> Tensor:
        if norm is None:
            return self._heads(x_BTX)
        return self._heads(norm(x_BTX)) if self.norm_full else norm(self._heads(x_BTX))

    def _heads(self, x_BTX: Tensor) -> Tensor:
        """(B, T, heads * C) -> (B, heads, T, C)."""
        return x_BTX.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
