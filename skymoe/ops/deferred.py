"""Weight gradients, put off: the backward pass hands the input's gradient on at once, the weight's is formed later.

The input's gradient is what the rest of a pipeline waits for; the weight's nobody waits for, so it can fill a time in
which the rank would be idle (zero-bubble schedules). Each matmul of a weight is an autograd function whose backward
returns the input's gradient and leaves a closure in a `DeferredWeights`. Whoever runs the schedule takes the closures
of a micro-batch and runs them when it likes. They add to `.grad` of the weight, whatever that is: a view of a flat
buffer, of a wider type than the weight, or nothing yet.

Exact under activation checkpointing: inputs are saved through autograd, and closures arise only in the backward pass.
torch's own way (two partial traversals of the graph) runs custom functions twice and cannot go through a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from skymoe.ops.precision import matmul_dtype


class DeferredWeights:
    """The weight gradients of one stage that are still to be formed."""

    def __init__(self) -> None:
        self._closures: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._closures)

    def push(self, closure: Callable[[], None]) -> None:
        """Keep `closure`, which forms one weight's gradient and adds it to `.grad`."""
        self._closures.append(closure)

    def take(self) -> Callable[[], None]:
        """All that was pushed since the last `take`, as one function to be called once."""
        closures, self._closures = self._closures, []

        @torch.no_grad()
        def run() -> None:
            while closures:
                closures.pop(0)()

        return run


def add_gradient(weight: Tensor, gradient: Tensor) -> None:
    """Add to `weight.grad`, in its own dtype; make it when there is none."""
    if weight.grad is None:
        weight.grad = gradient.to(weight.dtype)
    else:
        weight.grad.add_(gradient)


def deferred_linear(x: Tensor, weight: Tensor, bias: Tensor | None, deferred: DeferredWeights) -> Tensor:
    """`F.linear`, with the gradients of `weight` and `bias` put off. Under autocast it computes as `F.linear` does."""
    return _Linear.apply(x, weight, bias, deferred)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, deferred: DeferredWeights) -> Tensor:
        ctx.save_for_backward(x.to(matmul_dtype(x)))
        # Not saved through autograd: under a checkpoint a detached copy would come back, whose `.grad` nobody reads.
        ctx.weight, ctx.bias, ctx.deferred, ctx.dtype = weight, bias, deferred, x.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,), weight, bias = ctx.saved_tensors, ctx.weight, ctx.bias
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(grad.dtype)).to(ctx.dtype)

        def weight_gradient() -> None:
            grad_NO = grad.reshape(-1, grad.shape[-1])
            if weight.requires_grad:
                add_gradient(weight, grad_NO.T @ x.reshape(-1, x.shape[-1]))
            if bias is not None and bias.requires_grad:
                add_gradient(bias, grad_NO.sum(0))

        ctx.deferred.push(weight_gradient)
        return grad_x, None, None, None


def deferred_experts(
    x_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor, deferred: DeferredWeights, *, grouped: bool
) -> Tensor:
    """One projection of all experts, (R, I) -> (R, O), with the gradient of the stacked weight put off.

    Args:
        x_RI: rows grouped by expert, in the dtype of the matmul.
        weight_EOI: stacked weights; cast to the dtype of `x_RI`.
        offsets_E: int32, one past the last row of each expert; the last is R.
        deferred: where the gradient goes.
        grouped: one `grouped_mm` instead of a loop over experts.
    """
    return _Experts.apply(x_RI, weight_EOI, offsets_E, deferred, grouped)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor, deferred: DeferredWeights, grouped: bool
    ) -> Tensor:
        ctx.save_for_backward(x_RI, offsets_E)
        ctx.weight, ctx.deferred, ctx.grouped = weight_EOI, deferred, grouped
        return _multiply(x_RI, weight_EOI.to(x_RI.dtype).mT, offsets_E, grouped)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_RO: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (x_RI, offsets_E), weight_EOI = ctx.saved_tensors, ctx.weight
        grad_RO, grouped = grad_RO.contiguous(), ctx.grouped
        grad_x_RI = None
        if ctx.needs_input_grad[0]:
            grad_x_RI = _multiply(grad_RO, weight_EOI.to(grad_RO.dtype), offsets_E, grouped)

        def weight_gradient() -> None:
            if grouped:
                add_gradient(weight_EOI, F.grouped_mm(grad_RO.T, x_RI, offs=offsets_E))
                return
            sizes = _sizes(offsets_E)
            pairs = zip(grad_RO.split(sizes), x_RI.split(sizes), strict=True)
            add_gradient(weight_EOI, torch.stack([grad.T @ x for grad, x in pairs]))

        if weight_EOI.requires_grad:
            ctx.deferred.push(weight_gradient)
        return grad_x_RI, None, None, None, None


def _multiply(x_RA: Tensor, weight_EAB: Tensor, offsets_E: Tensor, grouped: bool) -> Tensor:
    if grouped:
        return F.grouped_mm(x_RA, weight_EAB, offs=offsets_E)
    return torch.cat([x @ weight for x, weight in zip(x_RA.split(_sizes(offsets_E)), weight_EAB, strict=True)])


def _sizes(offsets_E: Tensor) -> list[int]:
    return torch.diff(offsets_E, prepend=offsets_E.new_zeros(1)).tolist()
