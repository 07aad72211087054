"""What the machine does, whatever the model: matrix products, memory, the optimizer."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from skymoe.parallel.adamw import AdamWSettings, GroupSettings
from skymoe.parallel.mesh import single_mesh
from skymoe.parallel.zero import ZeroOptimizer
from skymoe.profile.timing import Task
from skymoe.spec.layout import Layout
from skymoe.spec.model import ModelSpec
from skymoe.spec.split import Split
from skymoe.weights.slices import Piece, Slice

Size = tuple[int, int, int]
_ROWS, _WIDTHS = (64, 128, 256, 1024, 4096), (256, 512, 1024, 2048, 4096, 8192)
_FLOPS = {"cpu": 2e9, "cuda": 4e12}  # the largest product of the spread: tens of milliseconds
_STREAM, _UPDATED = 1 << 24, (1 << 10, 1 << 10)


def model_sizes(spec: ModelSpec, num_tokens: int) -> list[Size]:
    """(M, K, N) of the products of the model's forward pass on one rank; experts at balance."""
    dim, queries, keys = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    found = {(num_tokens, dim, queries), (num_tokens, dim, keys), (num_tokens, queries, dim)}
    if spec.moe is None or any(not spec.is_moe_layer(layer) for layer in range(spec.num_layers)):
        found |= {(num_tokens, dim, spec.ffn_size), (num_tokens, spec.ffn_size, dim)}
    if spec.moe is not None:
        rows = max(1, num_tokens * spec.moe.top_k // spec.moe.num_experts)
        found |= {(rows, dim, 2 * spec.moe.ffn_size), (rows, spec.moe.ffn_size, dim)}
    return sorted(found)


def spread_sizes(count: int, device: str) -> list[Size]:
    """`count` sizes between small and large ones, the same on every run."""
    whole = sorted(
        ((m, k, n) for m in _ROWS for k in _WIDTHS for n in _WIDTHS if 2.0 * m * k * n <= _FLOPS[device]),
        key=lambda size: (size[0] * size[1] * size[2], size),
    )
    if count >= len(whole) or count < 2:
        return whole[:count]
    return [whole[round(place * (len(whole) - 1) / (count - 1))] for place in range(count)]


def gemm_task(size: Size, dtype: torch.dtype, device: torch.device) -> Task:
    """x W^T, as a Linear multiplies; small ones several times in a row."""
    m, k, n = size
    x_MK, weight_NK = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
    repeats = max(1, min(20, int(2e7 / (m * k * n))))
    return Task(_without_result(lambda: nn.functional.linear(x_MK, weight_NK)), repeats)


def gemm_cost(size: Size, element_bytes: int) -> tuple[float, float]:
    """FLOPs, and bytes read and written once."""
    m, k, n = size
    return 2.0 * m * k * n, float(element_bytes * (m * k + k * n + m * n))


def stream_task(device: torch.device) -> tuple[Task, float]:
    """One vector added to another, both larger than caches; and the bytes that it moves."""
    a, b = (torch.ones(_STREAM, device=device) for _ in range(2))
    return Task(_without_result(lambda: a.add_(b))), 3.0 * a.nbytes


def update_task(device: torch.device) -> tuple[Task, int]:
    """A step of the runtime's optimizer: norm, clipping, AdamW; and the parameters that it updates."""
    weight = nn.Parameter(torch.randn(_UPDATED, device=device))
    box = tuple((0, size) for size in _UPDATED)
    slice_ = Slice("weight", _UPDATED, _UPDATED, (Piece(box, box),))
    mesh = single_mesh(Layout(stages=Split((2,))), device)
    stages = {0: {"weight": (weight, slice_)}}
    zero = ZeroOptimizer(stages, mesh, AdamWSettings(), lambda name, parameter: GroupSettings(0.1), tied=())

    def step() -> None:
        zero.reduce(0)
        zero.update(1e-4, float(zero.gradient_norm()))

    return Task(_without_result(step)), weight.numel()


def title(device: torch.device) -> str:
    """As its maker calls it, as far as the system says."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names: Iterable[str] = ()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        pass
    return next(iter(names), platform.processor() or platform.machine())[:100]


def memory_bytes(device: torch.device, ranks: int) -> float:
    """What a rank can have: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks)


def _without_result(run: Callable[[], object]) -> Callable[[], Tensor | None]:
    @torch.no_grad()
    def passes() -> None:
        run()

    return passes


def gemm_points(
    sizes: Sequence[Size], seconds: Sequence[float], element_bytes: int
) -> list[tuple[float, float, float]]:
    """For the fit."""
    return [(*gemm_cost(size, element_bytes), t) for size, t in zip(sizes, seconds, strict=True)]
