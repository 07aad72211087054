"""RMS normalization: formed in fp32, returned in the dtype of the matmul that follows.

Torch runs this norm on a CPU as six separate passes forward and more backward, and autocast then casts its fp32
result once for each of the projections that read it. One autograd function with few passes over memory, and one cast,
halves the cost of the norms in a CPU training step (docs/performance.md). `reference_rms_norm` is the specification.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skymoe.ops.precision import matmul_dtype, wide_dtype


class _RMSNorm(torch.autograd.Function):
    """y = w x r with r = (mean(x^2) + eps)^-1/2;  dx = r (w g) - x r^3 / D sum(w g x);  dw = sum_n r g x."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        square_N = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True).square_()
        scale_N = square_N.div_(x_ND.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_ND, weight_D, scale_N)
        return (x_ND * scale_N).mul_(weight_D).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_ND, weight_D, scale_N = ctx.saved_tensors
        grad_ND = grad_ND.to(x_ND.dtype)
        product_ND = grad_ND * x_ND
        with torch.autocast(x_ND.device.type, enabled=False):  # backward may be called within the autocast block
            pull_N = (product_ND @ weight_D)[:, None] * scale_N.pow(3) / x_ND.shape[-1]
            grad_weight_D = scale_N[:, 0] @ product_ND
        grad_x_ND = torch.mul(grad_ND, weight_D, out=product_ND).mul_(scale_N)
        return grad_x_ND.addcmul_(x_ND, pull_N, value=-1), grad_weight_D, None, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dim.

    Computed in fp32 (fp64 for fp64) and returned in autocast's dtype where autocast is on, else in `x.dtype`.
    """
    wide, dtype = wide_dtype(x.dtype), matmul_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        x_ND = x.to(wide).reshape(-1, x.shape[-1])
        return _RMSNorm.apply(x_ND, weight_D.to(wide), eps, dtype).view(x.shape)


def reference_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The same, spelled out."""
    wide = x.to(wide_dtype(x.dtype))
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight_D).to(x.dtype)
