"""Model FLOPs utilisation: the share of the machine's matmul rate that goes into the model's own arithmetic.

    MFU = model FLOPs per token * tokens per second / peak

Model FLOPs are those of one forward and backward pass over the weights and the attention, whatever the program
computes besides (recomputation and the statistics pass do not count). Two conventions for attention are reported
side by side: *causal* counts the lower triangle, *full* the whole square. The peak is measured by a short square
matmul in the compute format, on the threads of this run, because a data sheet knows neither the clock nor the
neighbours; a recipe may give it instead.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from skymoe.spec.flops import AttentionCount, flops_per_token
from skymoe.spec.model import ModelSpec

_GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
_REPEATS = 40  # 0.2 s on a CPU: the best of many is the machine, the best of few its neighbours


@dataclass(frozen=True)
class Machine:
    """What the run can be measured against.

    Attributes:
        peak_flops: FLOP/s of a matmul.
        peak_source: `measured gemm` or `recipe`.
        flops_causal, flops_full: model FLOPs per token, forward and backward, by convention for attention.
    """

    peak_flops: float
    peak_source: str
    flops_causal: float
    flops_full: float

    def utilisation(self, tokens_per_s: float) -> tuple[float, float]:
        """MFU, causal and full."""
        rate = tokens_per_s / self.peak_flops
        return self.flops_causal * rate, self.flops_full * rate


def describe_machine(
    spec: ModelSpec, sequence_length: int, *, peak_flops: float | None, dtype: torch.dtype, device: torch.device
) -> Machine:
    """The FLOP counts of the model and the peak of the machine, measured unless given."""
    source = "measured gemm" if peak_flops is None else "recipe"
    return Machine(
        peak_flops=measure_gemm(dtype, device) if peak_flops is None else peak_flops,
        peak_source=source,
        flops_causal=flops_per_token(spec, sequence_length, attention=AttentionCount.CAUSAL, backward=True).total,
        flops_full=flops_per_token(spec, sequence_length, attention=AttentionCount.FULL, backward=True).total,
    )


@torch.no_grad()
def measure_gemm(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best of a few square matmuls (after one to warm up)."""
    size = _GEMM_SIZE[device.type]
    a = torch.full((size, size), 0.5, dtype=dtype, device=device)
    seconds = [_time_matmul(a) for _ in range(_REPEATS + 1)][1:]
    return 2 * size**3 / min(seconds)


def _time_matmul(a: torch.Tensor) -> float:
    start = time.perf_counter()
    result = a @ a
    if a.device.type == "cuda":
        torch.cuda.synchronize(a.device)
    assert result.shape == a.shape
    return time.perf_counter() - start
