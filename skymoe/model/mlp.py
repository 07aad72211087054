"""The dense feed-forward: SwiGLU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from skymoe.model.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, ffn_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate = Linear(hidden_size, ffn_size, bias=bias)
        self.up = Linear(hidden_size, ffn_size, bias=bias)
        self.down = Linear(ffn_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
