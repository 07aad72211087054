"""RMS normalization, computed in fp32 and returned in the input's dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dim, in fp32 (fp64 for fp64), cast back to `x.dtype`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x.to(wide), (x.shape[-1],), weight_D.to(wide), eps).to(x.dtype)
