"""All experts of a layer on the tokens sent to them: SwiGLU with the weights stacked over experts.

`loop` is the reference: one expert after another, any dtype and any width. `grouped` is one `grouped_mm` per
projection, which wants rows of a multiple of 16 bytes and no fp64; where it cannot go, `grouped` falls back to the
loop, so odd widths work.

Shapes: R rows in expert order, E experts, D model, F inner width. `gate_up_EGD` has G = 2F rows, the gate's first.
"""

from __future__ import annotations

from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from skymoe.ops.deferred import DeferredWeights, deferred_experts
from skymoe.ops.precision import matmul_dtype


class ExpertsBackend(StrEnum):
    """How the experts are multiplied."""

    LOOP = "loop"
    GROUPED = "grouped"


def expert_swiglu(
    x_RD: Tensor,
    gate_up_EGD: Tensor,
    down_EDF: Tensor,
    offsets_E: Tensor,
    backend: ExpertsBackend,
    deferred: DeferredWeights | None = None,
) -> Tensor:
    """down(silu(gate(x)) * up(x)) with the expert of each row.

    Args:
        x_RD: rows grouped by expert.
        gate_up_EGD: (E, 2F, D) stacked gate and up weights.
        down_EDF: (E, D, F) stacked down weights.
        offsets_E: int32, one past the last row of each expert; the last is R.
        backend: loop or grouped.
        deferred: where the weights' gradients are put off to; None for the ordinary way.

    Returns:
        (R, D) in the dtype of the matmuls.
    """
    dtype = matmul_dtype(x_RD)
    grouped = backend is ExpertsBackend.GROUPED and can_group(dtype, gate_up_EGD.shape[2], down_EDF.shape[2])
    grouped = grouped and len(x_RD) > 0  # a rank may receive no row at all; grouped_mm refuses that
    if deferred is not None:
        h_RG = deferred_experts(x_RD.to(dtype), gate_up_EGD, offsets_E, deferred, grouped=grouped)
        return deferred_experts(swiglu(h_RG), down_EDF, offsets_E, deferred, grouped=grouped)
    x_RD, gate_up_EGD, down_EDF = x_RD.to(dtype), gate_up_EGD.to(dtype), down_EDF.to(dtype)
    if grouped:
        h_RG = F.grouped_mm(x_RD, gate_up_EGD.transpose(1, 2), offs=offsets_E)
        return _DenseGradient.apply(F.grouped_mm(swiglu(h_RG), down_EDF.transpose(1, 2), offs=offsets_E))
    sizes = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1)).tolist()
    rows = zip(x_RD.split(sizes), gate_up_EGD, down_EDF, strict=True)
    with torch.autocast(x_RD.device.type, enabled=False):
        return torch.cat([F.linear(swiglu(F.linear(x, gate_up)), down) for x, gate_up, down in rows])


def can_group(dtype: torch.dtype, *widths: int) -> bool:
    """Whether `grouped_mm` takes rows of these widths: multiples of 16 bytes, and no fp64."""
    return dtype is not torch.float64 and all(width * dtype.itemsize % 16 == 0 for width in widths)


class _DenseGradient(torch.autograd.Function):
    """The identity. Its gradient is laid out row by row: grouped_mm refuses the expanded one that `sum` sends back."""

    @staticmethod
    def forward(ctx, y_RD: Tensor) -> Tensor:
        return y_RD.view_as(y_RD)

    @staticmethod
    def backward(ctx, grad_RD: Tensor) -> Tensor:
        return grad_RD.contiguous()


class _SwiGLU(torch.autograd.Function):
    """silu(g) * u that keeps only its input: the product and its parts are formed again in the backward."""

    @staticmethod
    def forward(ctx, h_RG: Tensor) -> Tensor:
        ctx.save_for_backward(h_RG)
        gate_RF, up_RF = h_RG.chunk(2, dim=-1)
        return F.silu(gate_RF).mul_(up_RF)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_RF: Tensor) -> Tensor:
        (h_RG,) = ctx.saved_tensors
        gate_RF, up_RF = h_RG.chunk(2, dim=-1)
        grad_h_RG = torch.empty_like(h_RG)
        grad_gate_RF, grad_up_RF = grad_h_RG.chunk(2, dim=-1)
        torch.mul(grad_RF, F.silu(gate_RF), out=grad_up_RF)
        torch.ops.aten.silu_backward(grad_RF * up_RF, gate_RF, grad_input=grad_gate_RF)
        return grad_h_RG


def swiglu(h_RG: Tensor) -> Tensor:
    """silu(first half) * second half along the last dim: (..., 2F) -> (..., F)."""
    return _SwiGLU.apply(h_RG)
