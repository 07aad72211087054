"""The one-device modules in the sizes of one rank. Their outputs are partial sums: see parallel/tokens.py."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from skymoe.model.attention import Attention
from skymoe.model.linear import RMSNorm
from skymoe.model.mlp import SwiGLU
from skymoe.parallel.mesh import Group, Mesh
from skymoe.parallel.norm import sharded_rms_norm
from skymoe.spec.model import ModelSpec, QkNorm


class ShardedRMSNorm(RMSNorm):
    """RMSNorm over a dimension of which this rank has a part (OLMoE's, over all heads)."""

    def __init__(self, size: int, whole_size: int, eps: float, group: Group) -> None:
        super().__init__(size, eps)
        self.whole_size, self.group = whole_size, group

    def forward(self, x: Tensor) -> Tensor:
        return sharded_rms_norm(x, self.weight, self.eps, size=self.whole_size, group=self.group)


def sharded_swiglu(hidden_size: int, ffn_size: int, mesh: Mesh, *, bias: bool = False) -> SwiGLU:
    """A dense feed-forward with this rank's columns."""
    mlp = SwiGLU(hidden_size, mesh.layout.ffn(ffn_size).sizes[mesh.coordinate.tp], bias=bias)
    if mesh.coordinate.tp:
        mlp.down.bias = None  # the sum over the group has it once
    return mlp


def sharded_attention(spec: ModelSpec, mesh: Mesh, layer: int) -> Attention:
    """Attention with this rank's heads."""
    groups = mesh.layout.heads(spec).sizes[mesh.coordinate.tp]
    heads = groups * (spec.num_heads // spec.num_kv_heads)
    o_bias = spec.o_bias and mesh.coordinate.tp == 0
    attention = Attention(replace(spec, num_heads=heads, num_kv_heads=groups, o_bias=o_bias), layer)
    if spec.qk_norm is QkNorm.FULL and mesh.tp.size > 1:

        def norm(own: int, all_heads: int) -> RMSNorm:
            return ShardedRMSNorm(own * spec.head_dim, all_heads * spec.head_dim, spec.norm_eps, mesh.tp)

        attention.q_norm, attention.k_norm = norm(heads, spec.num_heads), norm(groups, spec.num_kv_heads)
    return attention
