"""What a run is measured against: the FLOPs of its tokens (`spec/utilisation.py`) and the peak of its devices.

The peak is measured by a short square matmul in the compute format, on the threads of this run, because a data sheet
knows neither the clock nor the neighbours; a recipe may give it instead. Every rank measures its own, all at the same
time, so that ranks that share a processor see their share of it; the peak of the world is the sum.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from skymoe.spec.layout import Half
from skymoe.spec.model import ModelSpec
from skymoe.spec.utilisation import TrainingFlops, Utilisation, training_flops, utilisation

_GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
_REPEATS = 40  # 0.2 s on a CPU: the best of many is the machine, the best of few its neighbours


@dataclass(frozen=True)
class Machine:
    """What the run can be measured against.

    Attributes:
        peak_flops: FLOP/s of a matmul, all devices together.
        peak_source: `measured gemm` or `recipe`.
        flops: per token, of the model and of the hardware.
        num_devices: how many there are, one a rank.
    """

    peak_flops: float
    peak_source: str
    flops: TrainingFlops
    num_devices: int = 1

    def of_world(self, peaks: Sequence[float]) -> Machine:
        """The machine of all ranks, given the peak of each."""
        return replace(self, peak_flops=sum(peaks), num_devices=len(peaks))

    def utilisation(self, tokens_per_s: float) -> Utilisation:
        """MFU and HFU of all devices at `tokens_per_s` together."""
        return utilisation(self.flops, tokens_per_s, self.peak_flops)


def describe_machine(
    spec: ModelSpec,
    sequence_length: int,
    *,
    peak_flops: float | None,
    dtype: torch.dtype,
    device: torch.device,
    recomputed: Iterable[int | Half] = (),
    statistics_pass: bool = False,
) -> Machine:
    """The FLOP counts of the model and the peak of this rank's device, measured unless given."""
    return Machine(
        peak_flops=measure_gemm(dtype, device) if peak_flops is None else peak_flops,
        peak_source="measured gemm" if peak_flops is None else "recipe",
        flops=training_flops(spec, sequence_length, recomputed, statistics_pass),
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
