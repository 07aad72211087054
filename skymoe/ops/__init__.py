"""Floor 2: tensors in, tensors out. The router kit is importable on its own, for somebody else's model.

    from skymoe.ops import GateNormSpec, route, gate_totals, aux_loss, AdaptiveCoefficients

docs/router_kit.md puts it into a transformers Mixtral block.
"""

from skymoe.ops.balance import (
    AdaptiveCoefficients,
    AuxLoss,
    GateTotals,
    RouterMetrics,
    aux_loss,
    capacity,
    drop_rate,
    gate_totals,
    loss_value,
    real_drop_rate,
    router_metrics,
    update_expert_bias,
    z_loss,
)
from skymoe.ops.routing import Routing, gate_logits, normalize_logits, route
from skymoe.ops.similarity import expert_similarity
from skymoe.spec.model import GateNormSpec

__all__ = [
    "AdaptiveCoefficients",
    "AuxLoss",
    "GateNormSpec",
    "GateTotals",
    "Routing",
    "RouterMetrics",
    "aux_loss",
    "capacity",
    "drop_rate",
    "expert_similarity",
    "gate_logits",
    "gate_totals",
    "loss_value",
    "normalize_logits",
    "real_drop_rate",
    "route",
    "router_metrics",
    "update_expert_bias",
    "z_loss",
]
