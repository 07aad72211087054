"""How a source counts FLOPs, and what its figures mean in tokens per second.

"MFU" is not one figure. Sources count attention over all pairs (full) or over those that a causal mask leaves (causal),
and some count what recomputation runs again (HFU); for a model of 8B at 8k tokens the first choice alone is 12.5 %.
A measured FLOP/s figure is therefore turned into tokens per second by its source's own count, and only tokens per
second are compared. Which count a group uses was checked against its own tokens per second where it prints both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from skymoe.plan.cost.model import flops
from skymoe.plan.shape import ModelShape
from skymoe.plan.validate.cases import Case


class Convention(StrEnum):
    """What is counted, per token of a step."""

    FULL = "full attention, forward and backward"
    CAUSAL = "causal attention, forward and backward"
    FULL_AGAIN = "full attention; layers that are run again count a fourth time"


@dataclass(frozen=True)
class Source:
    """A group's convention.

    Attributes:
        convention: how it counts.
        checked: how we know.
    """

    convention: Convention
    checked: str


SOURCES: Final[Mapping[str, Source]] = {
    "narayanan2021": Source(Convention.FULL_AGAIN, "equation 3 of the paper (96 B s l h^2 ..)"),
    "korthikanti2022": Source(Convention.FULL, "appendix A; MFU and HFU are printed apart"),
    "megatron_h100_2024": Source(Convention.FULL, "Megatron-LM's own formula at that time"),
    "zero_bubble": Source(Convention.FULL, "samples/s are printed: not needed"),
    "vocab_parallelism": Source(Convention.FULL, "the paper cites Narayanan 2021 without recomputation"),
    "llama3": Source(Convention.FULL, "Megatron-LM's formula agrees with the printed batch times to 2 %"),
    "megascale": Source(Convention.FULL, "agrees with its step times to 1 %"),
    "moe_parallel_folding": Source(Convention.FULL, "Megatron-Core's formula at that time"),
    "megatron_core_moe": Source(Convention.FULL, "Megatron-Core's formula at that time"),
    "megatron_core_moe_paper": Source(Convention.CAUSAL, "Megatron-Core's formula since 2025"),
    "moe_modelzoo": Source(Convention.CAUSAL, "agrees with its tokens/s"),
    "megatron_bridge": Source(Convention.CAUSAL, "agrees with its tokens/s within 4 %; GPT-OSS by sliding window"),
    "megatron_bridge_recompute": Source(Convention.CAUSAL, "as megatron_bridge"),
    "dgxc": Source(Convention.FULL, "step times are printed: not needed; Nemotron-4 counts 13-17 % more"),
    "nemo2407": Source(Convention.FULL, "agrees with its tokens/s"),
    "internevo": Source(Convention.FULL_AGAIN, "tokens/s are printed: not needed; HFU with checkpointing"),
    "mosaic_mpt": Source(Convention.FULL, "6N + 12 L d s, agrees with its tokens/s"),
    "skywork": Source(Convention.FULL, "38 % and 690 tokens/s do not agree in any convention; tokens/s are taken"),
    "torchtitan": Source(Convention.FULL, "tokens/s are printed: not needed"),
}


def convention_of(case: Case) -> tuple[Convention, bool]:
    """The convention of the case's source, and whether it is known (else it is read from words, else assumed full)."""
    source = SOURCES.get(case.group)
    if source is not None:
        return source.convention, True
    words = case.text("flops_convention").lower()
    if re.search(r"causal-halved|causal \(halved|half.*causal", words):
        return Convention.CAUSAL, True
    if "hfu" in words or "includes the recompute" in words:
        return Convention.FULL_AGAIN, True
    if re.search(r"full|6n|non-causal|standard", words):
        return Convention.FULL, True
    return Convention.FULL, False


def counted_flops(shape: ModelShape, sequence_length: int, convention: Convention, *, again: float = 0.0) -> float:
    """FLOPs per token of a step, as the source counts them.

    Args:
        shape: the model.
        sequence_length: of a sequence.
        convention: of the source.
        again: share of the layers that are run again whole.
    """
    forward = flops(shape, sequence_length, causal=convention is Convention.CAUSAL)
    total = 3.0 * forward.total
    if convention is Convention.FULL_AGAIN:
        total += again * sum(forward.halves)
    return total
