"""Embedding and cross-entropy with the vocabulary cut over the tensor-parallel ranks.

The embedding gives every token a row on the one rank that has it and zeros elsewhere; what sums them is the caller's
choice (`sum_forward` where every rank needs all tokens, `scatter_rows` in sequence parallelism).

The cross-entropy is `ops.loss.linear_cross_entropy` over a part of the columns. Of a chunk of tokens each rank has the
logits of its own rows; what it tells the others is two numbers per token, the logarithm of its part of the softmax's
sum and the target's logit where that is its own. With them everybody forms the whole sum, the loss, and its own
columns of the gradient. They travel while the next chunk's logits are multiplied, so two chunks are alive at a time.

Nothing is sampled or approximated, and no rank ever holds the logits of another's rows. Parts may differ in size, or be
empty.

Shapes: N tokens, D model, V this rank's rows of the vocabulary, R ranks of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from skymoe.ops.loss import IGNORED
from skymoe.ops.precision import matmul_dtype, wide_dtype
from skymoe.parallel.mesh import Group
from skymoe.parallel.transport import Pending, start_all_reduce, start_gather
from skymoe.spec.split import Split

_CHUNK_LOGITS = 1 << 20  # elements of fp32 logits in one chunk on the rank with most rows; two chunks are alive


def vocabulary_embedding(tokens: Tensor, weight_VD: Tensor, rows: Split, group: Group) -> Tensor:
    """This rank's term of the embedding: rows of its own part of the table, zeros for the tokens of others.

    Args:
        tokens: (...) int64 ids, the same on all ranks of the group.
        weight_VD: this rank's rows of the table.
        rows: the division of the vocabulary over the group.
        group: the tensor-parallel ranks.

    Returns:
        (..., D), to be summed over the group. A rank without rows returns zeros that still take part in autograd.
    """
    _refuse_outside(tokens, rows.num_units)
    mine, index = _own(tokens, rows.part(group.rank))
    if not weight_VD.shape[0]:
        return weight_VD.sum() * weight_VD.new_zeros((*tokens.shape, weight_VD.shape[1]))
    return F.embedding(index, weight_VD).masked_fill(~mine[..., None], 0.0)


def vocabulary_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, rows: Split, group: Group, *, sum_gradient: bool = True
) -> Tensor:
    """Sum of -log softmax(hidden W^T)[target] over the scored targets.

    Args:
        hidden_ND: final hidden states, after the last norm; the same on all ranks of the group.
        weight_VD: this rank's rows of the output projection.
        targets_N: int64 token ids; -100 is not scored.
        rows: the division of the vocabulary over the group.
        group: the tensor-parallel ranks.
        sum_gradient: sum the gradient of `hidden_ND` over the group, so that it flows back complete, and the same on
            all ranks. False leaves each rank its own term, for hidden states that come from `gather_rows`, whose
            backward sums the terms on the way (half the bytes).

    Returns:
        The sum in nats, the same bits on all ranks. Divide it by the number of targets of the *global* batch.
    """
    _refuse_outside(targets_N.masked_fill(targets_N == IGNORED, 0), rows.num_units)
    want_gradient = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    dtype = matmul_dtype(hidden_ND)
    return _VocabularyCrossEntropy.apply(
        hidden_ND, weight_VD, targets_N, rows, group, dtype, want_gradient, sum_gradient
    )


class _VocabularyCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        rows: Split,
        group: Group,
        dtype: torch.dtype,
        want_gradient: bool,
        sum_gradient: bool,
    ) -> Tensor:
        weight = weight_VD.to(dtype)
        loss = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        grad_hidden = torch.empty_like(hidden_ND) if want_gradient else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide_dtype(weight_VD.dtype)) if want_gradient else None
        for chunk in _chunks(hidden_ND.to(dtype), weight, targets_N, rows, group):
            log_sum_N, target_N = chunk.heard()
            scored_N = targets_N[chunk.tokens] != IGNORED
            loss += ((log_sum_N - target_N) * scored_N).sum()
            if grad_hidden is not None and grad_weight is not None:
                grad_NV = chunk.gradient(log_sum_N, scored_N).to(dtype)
                grad_hidden[chunk.tokens] = grad_NV @ weight
                grad_weight += grad_NV.t() @ chunk.hidden_ND
        if grad_hidden is not None and grad_weight is not None:
            if sum_gradient:
                grad_hidden = start_all_reduce(grad_hidden, group).wait()
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        return loss.to(wide_dtype(dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None, None, None, None, None


class _Chunk(NamedTuple):
    """Some tokens: the logits here, and the two numbers per token that the ranks tell each other, (2 R, N)."""

    tokens: slice
    hidden_ND: Tensor
    logits_NV: Tensor
    mine_N: Tensor
    index_N: Tensor
    told: Pending

    def heard(self) -> tuple[Tensor, Tensor]:
        """Wait for the others; log of the sum over the whole vocabulary, and the target's logit."""
        told_R2N = self.told.wait().unflatten(0, (-1, 2))
        return told_R2N[:, 0].logsumexp(0), told_R2N[:, 1].sum(0)

    def gradient(self, log_sum_N: Tensor, scored_N: Tensor) -> Tensor:
        """softmax - one-hot in the columns here, zero where nothing is scored. Takes the place of the logits."""
        grad_NV = self.logits_NV.sub_(log_sum_N[:, None]).exp_()
        if grad_NV.shape[1]:
            grad_NV.scatter_add_(1, self.index_N[:, None], -self.mine_N[:, None].to(grad_NV.dtype))
        return grad_NV * scored_N[:, None]


def _chunks(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, rows: Split, group: Group) -> Iterator[_Chunk]:
    """All tokens, in chunks. The next one's logits are multiplied while what was told of this one travels."""
    size = max(1, _CHUNK_LOGITS // max(rows.sizes))  # by the largest part, so that all ranks cut alike
    pending = None
    for start in range(0, hidden_ND.shape[0], size):
        tokens = slice(start, start + size)
        mine_N, index_N = _own(targets_N[tokens], rows.part(group.rank))
        logits_NV = (hidden_ND[tokens] @ weight_VD.t()).to(wide_dtype(weight_VD.dtype))
        told = _tell(logits_NV, mine_N, index_N, group)
        if pending is not None:
            yield pending
        pending = _Chunk(tokens, hidden_ND[tokens], logits_NV, mine_N, index_N, told)
    if pending is not None:
        yield pending


def _tell(logits_NV: Tensor, mine_N: Tensor, index_N: Tensor, group: Group) -> Pending:
    """Start to exchange the log of the sum over the own columns (-inf where there are none) and the target's logit."""
    own_2N = logits_NV.new_zeros(2, len(logits_NV))
    own_2N[0] = logits_NV.logsumexp(1)
    if logits_NV.shape[1]:
        own_2N[1] = logits_NV.gather(1, index_N[:, None])[:, 0].masked_fill_(~mine_N, 0.0)
    return start_gather(own_2N, Split((2,) * group.size), group)


def _own(ids: Tensor, rows: range) -> tuple[Tensor, Tensor]:
    """Which ids are this rank's, and their places in its rows (0 for the others)."""
    mine = (ids >= rows.start) & (ids < rows.stop)
    return mine, (ids - rows.start).masked_fill(~mine, 0)


def _refuse_outside(ids: Tensor, vocab_size: int) -> None:
    """An id that no rank has would be an embedding of zeros, or a target with logit 0: silently wrong."""
    torch._assert_async(((ids >= 0) & (ids < vocab_size)).all(), f"a token id is outside the vocabulary: {vocab_size}")
