"""How far the figures of a plan can be trusted: in words, and as the last validation found (docs/plan_accuracy.md)."""

from __future__ import annotations

from skymoe.plan.train.asked import Asked
from skymoe.plan.trust import found

PAGE = "docs/plan_accuracy.md"


def accuracy_of(asked: Asked) -> tuple[str, ...]:
    """For this kind of model and machine."""
    kind = "MoE" if asked.spec.moe else "dense"
    names = [f"step time, {kind}, fully known layout", f"step time, {kind}, with assumptions", "memory, mean error"]
    figures = "; ".join(found()[name].said for name in names if name in found())
    told = [
        f"predicted, not measured; {figures} ({PAGE})",
        "layouts of one table are compared more safely than a step time is believed: most errors are common to all",
    ]
    if asked.spec.moe:
        told.append(
            "that figure for mixtures has factors for the releases of their software, chosen on the same rows; "
            "before these it was 20 %, which is nearer to what another program may expect"
        )
    if asked.spec.moe and asked.config.imbalance == 1.0 and asked.config.capacity is None:
        told.append("unequal loads of experts cost time and memory that are not in these figures (--imbalance)")
    if asked.cluster.gpu.origin.startswith("as "):
        told.append(f"the constants of {asked.cluster.gpu.name} are taken over ({asked.cluster.gpu.origin})")
    return tuple(told)
