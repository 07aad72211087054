"""The only place where a weight meets an activation outside the experts: a change of number format is a change here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skymoe.ops.deferred import DeferredWeights, deferred_linear
from skymoe.ops.norm import rms_norm


class Linear(nn.Module):
    """y = x W^T (+ b), weight (out, in) as on disk. Uninitialised: model/init.py or model/load.py fills it.

    Attributes:
        deferred: where the weight's gradient is put off to, under a zero-bubble schedule; None for the ordinary way.
    """

    deferred: DeferredWeights | None = None

    def __init__(self, num_inputs: int, num_outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs))
        self.bias = nn.Parameter(torch.empty(num_outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.deferred is not None:
            return deferred_linear(x, self.weight, self.bias, self.deferred)
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Rows of a (V, D) table."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight)


class RMSNorm(nn.Module):
    """RMS normalization over the last dim with a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
