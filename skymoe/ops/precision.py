"""Which dtype an operation computes in, under autocast and without."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What a matmul of `x` computes in: autocast's dtype where autocast is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64: what sums, norms and gates are formed in."""
    return torch.promote_types(dtype, torch.float32)
