"""Cross-entropy straight from hidden states, never holding the logits of more than one chunk of tokens.

The logits of a batch are its largest tensor (T x V). Here each chunk's logits live while its loss *and* its gradient
are formed, so the backward pass has nothing left to do but scale. Three matmuls per chunk, none repeated.

Shapes: N tokens, D model, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from skymoe.ops.precision import matmul_dtype, wide_dtype

IGNORED = -100  # a target that is not scored
_CHUNK_LOGITS = 1 << 21  # elements of fp32 logits held at a time: 8 MiB, within a last-level cache


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, dtype: torch.dtype, want_gradient: bool
    ) -> Tensor:
        weight = weight_VD.to(dtype)
        loss = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if want_gradient else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide_dtype(weight_VD.dtype)) if want_gradient else None
        chunk = max(1, _CHUNK_LOGITS // weight.shape[0])
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden, targets = hidden_ND[rows].to(dtype), targets_N[rows]
            log_probs = F.log_softmax((hidden @ weight.t()).to(wide_dtype(dtype)), dim=-1)
            scored = targets != IGNORED
            index = targets.masked_fill(~scored, 0)[:, None]
            loss -= (log_probs.gather(1, index)[:, 0] * scored).sum()
            if grad_hidden is not None and grad_weight is not None:
                grad = log_probs.exp_()
                grad.scatter_add_(1, index, grad.new_full((1, 1), -1.0).expand_as(index))
                grad = (grad * scored[:, None]).to(dtype)
                grad_hidden[rows] = grad @ weight
                grad_weight += grad.t() @ hidden
        if grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        return loss.to(wide_dtype(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None, None


def linear_cross_entropy(hidden: Tensor, head_weight_VD: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(hidden W^T)[target] over the scored targets.

    Args:
        hidden: (..., D) final hidden states, after the last norm.
        head_weight_VD: output projection.
        targets: (...) int64 token ids; -100 is not scored.

    Returns:
        The sum in nats (divide by the number of targets of the *global* batch), and that number here, int64.
    """
    targets_N = targets.reshape(-1)
    hidden_ND = hidden.reshape(-1, hidden.shape[-1])
    want_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head_weight_VD.requires_grad)
    loss = _LinearCrossEntropy.apply(hidden_ND, head_weight_VD, targets_N, matmul_dtype(hidden_ND), want_gradient)
    return loss, (targets_N != IGNORED).sum()


def reference_cross_entropy(hidden: Tensor, head_weight_VD: Tensor, targets: Tensor) -> Tensor:
    """The same sum with all logits at once: the specification."""
    logits = hidden.reshape(-1, hidden.shape[-1]) @ head_weight_VD.t()
    return F.cross_entropy(logits, targets.reshape(-1), ignore_index=IGNORED, reduction="sum")
