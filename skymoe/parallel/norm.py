"""RMSNorm over a dimension cut over the tensor-parallel ranks (OLMoE's norm of queries and keys over all heads).

The one thing the ranks must share is the mean square of a token, and in the backward pass its adjoint: two sums of one
number per token. Everything else is the part of the vector that a rank has anyway. `ops.norm.rms_norm` is the whole.

Shapes: N tokens, X this rank's part of the normalized dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skymoe.ops.precision import matmul_dtype, wide_dtype
from skymoe.parallel.collectives import sum_forward
from skymoe.parallel.mesh import Group


class _ShardedRMSNorm(torch.autograd.Function):
    """y = w x r with r = (sum_D(x^2) / D + eps)^-1/2;  dx = r (w g) - x r^3 / D sum_D(w g x);  dw = sum_n r g x."""

    @staticmethod
    def forward(ctx, x_NX: Tensor, weight_X: Tensor, size: int, eps: float, dtype: torch.dtype, group: Group) -> Tensor:
        square_N = torch.linalg.vector_norm(x_NX, dim=-1, keepdim=True).square_()
        scale_N = sum_forward(square_N, group).div_(size).add_(eps).rsqrt_()
        ctx.save_for_backward(x_NX, weight_X, scale_N)
        ctx.size, ctx.group = size, group
        return (x_NX * scale_N).mul_(weight_X).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_NX: Tensor) -> tuple[Tensor | None, ...]:
        x_NX, weight_X, scale_N = ctx.saved_tensors
        grad_NX = grad_NX.to(x_NX.dtype)
        product_NX = grad_NX * x_NX
        with torch.autocast(x_NX.device.type, enabled=False):  # backward may be called within the autocast block
            pull_N = sum_forward((product_NX @ weight_X)[:, None], ctx.group) * scale_N.pow(3) / ctx.size
            grad_weight_X = scale_N[:, 0] @ product_NX
        grad_x_NX = torch.mul(grad_NX, weight_X, out=product_NX).mul_(scale_N)
        return grad_x_NX.addcmul_(x_NX, pull_N, value=-1), grad_weight_X, None, None, None, None


def sharded_rms_norm(x: Tensor, weight_X: Tensor, eps: float, *, size: int, group: Group) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dim, of which every rank of the group has a part.

    Args:
        x: (..., X) this rank's part of the same tokens.
        weight_X: this rank's part of the weight.
        eps: added to the mean square.
        size: of the whole dimension, over which the mean is formed.
        group: the ranks that share it; parts may differ in size, or be empty.

    Returns:
        This rank's part, in the dtype that `ops.norm.rms_norm` would return.
    """
    wide, dtype = wide_dtype(x.dtype), matmul_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        x_NX = x.to(wide).reshape(x.shape[:-1].numel(), x.shape[-1])
        return _ShardedRMSNorm.apply(x_NX, weight_X.to(wide), size, eps, dtype, group).view(x.shape)
