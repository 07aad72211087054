"""Causal grouped-query attention with an optional window and document boundaries.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys (S >= T: the cache comes first), C head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_mask(
    num_queries: int,
    num_keys: int,
    *,
    window: int | None = None,
    document_ids_BT: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor | None:
    """Which key each query sees: bool, broadcastable to (B, 1, T, S); None when causality over T = S says it all.

    Args:
        num_queries, num_keys: T and S; the queries are the last T positions.
        window: a query sees the last `window` positions, itself included.
        document_ids_BT: equal ids may see each other; needs T = S.
        device: where to build the mask.
    """
    if num_queries == num_keys and document_ids_BT is None and (window is None or window >= num_keys):
        return None
    assert document_ids_BT is None or num_queries == num_keys, "the documents of cached keys are not known"
    key = torch.arange(num_keys, device=device)
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    mask = key <= query
    if window is not None:
        mask = mask & (key > query - window)
    if document_ids_BT is not None:
        return mask & (document_ids_BT[:, None, :, None] == document_ids_BT[:, None, None, :])
    return mask[None, None]


# On a CPU the fused kernel's backward costs more than the scores it saves, up to here (docs/performance.md).
# In fp32 it does not. The choice looks at nothing else, so that training, evaluation and statistics agree to the bit.
_SHORT = 512
_NARROW = (torch.bfloat16, torch.float16)


def causal_attention(q_BHTC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(C)) v. `mask` None means causal with T = S."""
    if q_BHTC.device.type == "cpu" and q_BHTC.dtype in _NARROW and k_BGSC.shape[2] <= _SHORT:
        return _matmul_attention(q_BHTC, k_BGSC, v_BGSC, mask)
    grouped = q_BHTC.shape[1] != k_BGSC.shape[1]
    return F.scaled_dot_product_attention(
        q_BHTC, k_BGSC, v_BGSC, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


def _matmul_attention(q_BHTC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, mask: Tensor | None) -> Tensor:
    """The same by batched matmuls, scores kept for the backward: for short sequences on a CPU."""
    (batch, heads, queries, width), (groups, keys) = q_BHTC.shape, k_BGSC.shape[1:3]
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q_BHTC.device).tril()
    # The query heads of a group stand below one another, so that a group's keys are multiplied once.
    q = q_BHTC.reshape(batch * groups, heads // groups * queries, width)
    k, v = k_BGSC.reshape(batch * groups, keys, width), v_BGSC.reshape(batch * groups, keys, width)
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, queries, keys)
    probs = (scores * width**-0.5 + bias).softmax(-1)
    return torch.bmm(probs.view(batch * groups, -1, keys), v).view(batch, heads, queries, width)


def reference_attention(q_BHTC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, mask: Tensor | None) -> Tensor:
    """The same, spelled out: the specification that `causal_attention` is tested against."""
    repeats = q_BHTC.shape[1] // k_BGSC.shape[1]
    k_BHSC, v_BHSC = k_BGSC.repeat_interleave(repeats, 1), v_BGSC.repeat_interleave(repeats, 1)
    scores = q_BHTC @ k_BHSC.transpose(-1, -2) / q_BHTC.shape[-1] ** 0.5
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v_BHSC
