"""What a case says about recomputation and precision, from the words of its table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from skymoe.plan.hardware.gpu import Precision
from skymoe.plan.validate.cases import Case
from skymoe.plan.work import Recompute


@dataclass(frozen=True)
class Again:
    """What is run again.

    Attributes:
        base: of every layer.
        share: of the layers, whole; None when the fewest that fit into memory are assumed.
        stated: whether the source says.
    """

    base: Recompute = Recompute.NONE
    share: float | None = 0.0
    stated: bool = True


def case_again(case: Case) -> Again:
    """The words of the table: "none", "full", "selective (attention core)", "mlp", "selective per-op", .."""
    words = case.text("recompute").lower().strip()
    if not words or re.search(r"not stated|see |varied|unknown|per row|\?", words):
        return Again(share=None, stated=False)
    if words in ("none", "no", "off", "false"):
        return Again()
    if re.match(r"full|uniform|all|block", words):
        return Again(share=1.0)
    if re.search(r"torchtitan", case.text("framework"), re.IGNORECASE):
        return Again(share=0.5)  # saves every second matrix product
    if re.search(r"moe_act|layernorm|act\b|norm", words) and "core" not in words:
        return Again(base=Recompute.MOE_ACT)
    if re.search(r"mlp|\bmoe\b|shared_experts", words):
        return Again(base=Recompute.MOE_ACT, stated=False)  # more than that level, less than whole layers
    return Again(base=Recompute.SELECTIVE)


_PRECISIONS: Final = (
    (r"nvfp4|fp4", Precision.NVFP4),
    (r"fp8|float8", Precision.FP8),
    (r"fp32|tf32", Precision.FP32),
    (r"bf16|fp16|float16|half", Precision.BF16),
)


def case_precision(case: Case) -> Precision:
    """Of the layers' matrix products; bf16 where the table says nothing."""
    words = case.text("precision").lower()
    return next((kind for pattern, kind in _PRECISIONS if re.search(pattern, words)), Precision.BF16)
