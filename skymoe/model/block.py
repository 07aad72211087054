"""One layer: norm, attention, norm, feed-forward (dense or MoE), each with its residual."""

from __future__ import annotations

from torch import Tensor, nn

from skymoe.model.attention import Attention
from skymoe.model.batch import BatchInfo
from skymoe.model.inputs import AttentionInputs
from skymoe.model.linear import RMSNorm
from skymoe.model.mlp import SwiGLU
from skymoe.model.moe import MoE
from skymoe.ops.experts import ExpertsBackend
from skymoe.ops.routing import Routing
from skymoe.spec.model import ModelSpec


class Block(nn.Module):
    """A transformer layer. The feed-forward is `mlp` or `moe`, the other is None."""

    def __init__(self, spec: ModelSpec, layer: int, backend: ExpertsBackend) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.attention = Attention(spec, layer)
        self.ffn_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.moe = MoE(spec.hidden_size, spec.moe, backend) if spec.moe and spec.is_moe_layer(layer) else None
        self.mlp = SwiGLU(spec.hidden_size, spec.ffn_size, bias=spec.mlp_bias) if self.moe is None else None

    def forward(self, x_BTD: Tensor, inputs: AttentionInputs, batch: BatchInfo) -> tuple[Tensor, Routing | None]:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), inputs)
        if self.moe is not None:
            y_BTD, routing = self.moe(self.ffn_norm(x_BTD), batch)
            return x_BTD + y_BTD, routing
        assert self.mlp is not None
        return x_BTD + self.mlp(self.ffn_norm(x_BTD)), None
