"""Weight gradients of a stage under a zero-bubble schedule (the matmuls themselves: `ops/deferred.py`)."""

from __future__ import annotations

from torch import nn

from skymoe.model.linear import Linear
from skymoe.model.moe import Experts
from skymoe.ops.deferred import DeferredWeights

__all__ = ["DeferredWeights", "defer_weights"]


def defer_weights(part: nn.Module, deferred: DeferredWeights) -> DeferredWeights:
    """Let every projection and every expert of `part` put its weight gradient off into `deferred`; returns it.

    Norms, routers, the embedding and the head's loss keep their way: their gradients are small beside the matmuls, or
    formed within the loss, and are complete when the input's gradient is.
    """
    for module in part.modules():
        if isinstance(module, (Linear, Experts)):
            module.deferred = deferred
    return deferred
