"""What software did to the same hardware, generation by generation: factors on a GPU's laws.

The constants of the catalogue are those of tuned software of 2024 and later. Some published runs are older, or use
plain PyTorch kernels: FlashAttention 1 on H100, matrix products before libraries were tuned for it. One factor per law,
generation and GPU generation, each with its origin; nothing per case.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from skymoe.plan.hardware.gpu import Gpu
from skymoe.plan.validate.cases import Case


@dataclass(frozen=True, kw_only=True)
class Software:
    """Factors on the laws.

    Attributes:
        framework: pattern of the framework's name.
        gpu: pattern of the catalogue's name of the GPU.
        gemm: on matrix products, all precisions.
        attention: on fused attention.
        memory: on streams (norms, activations).
        owner_s: seconds of a step per rank that owns a part of the optimizer (weights return by one broadcast each).
        origin: where the factors are from.
    """

    framework: str
    gpu: str
    gemm: float = 1.0
    attention: float = 1.0
    memory: float = 1.0
    owner_s: float = 0.0
    origin: str


SOFTWARE: Final[Mapping[str, Software]] = {}


def on_software(case: Case, gpu: Gpu) -> Gpu:
    """`gpu` with the laws that the case's software reaches."""
    found = software_of(case, gpu)
    if found is None:
        return gpu
    laws = replace(
        gpu.laws, gemm=gpu.laws.gemm * found.gemm, gemm_narrow=gpu.laws.gemm_narrow * found.gemm,
        attention=gpu.laws.attention * found.attention, memory=gpu.laws.memory * found.memory,
    )  # fmt: skip
    return replace(gpu, laws=laws)


def software_of(case: Case, gpu: Gpu) -> Software | None:
    """The generation that the case's framework names, None for today's."""
    name = case.text("framework").lower()
    fits = (s for s in SOFTWARE.values() if re.match(s.framework, name) and re.match(s.gpu, gpu.name))
    return next(fits, None)
