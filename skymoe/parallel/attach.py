"""A loss that is formed in the middle of the model, added where it arises.

In a pipeline the loss at the end cannot see what happened on other ranks. A balance loss is therefore hung onto the
hidden state that leaves the layer: the value of the state is untouched, and when its gradient comes back the loss
receives the gradient 1, as if it had been added to the loss at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attach(x: Tensor, aux: Tensor) -> Tensor:
    """`x` itself; in the backward pass through it the scalar `aux` receives the gradient 1."""
    return _Attach.apply(x, aux)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, aux: Tensor) -> Tensor:
        assert aux.dim() == 0
        ctx.of_aux = (aux.dtype, aux.device)
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.of_aux
        return grad, torch.ones((), dtype=dtype, device=device)
