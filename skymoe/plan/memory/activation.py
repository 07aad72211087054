"""What a micro-batch leaves for the backward pass, per half of a layer, on the fullest rank.

Two families, one account (bytes per token of width h, elements of 2 bytes; t tensor-parallel ranks):

    attention       input 2h, normed 2h [+ mask h]              | q, k, v, o of the rank's heads, 4 bytes of statistics
                                                                  per head, scores 5 a s with dropout, 2 a s without,
                                                                  nothing when fused (flash)
    feed-forward    input 2h, normed 2h [+ mask h]              | per column: what the last matrix takes 2, what the
                                                                  activation takes 2 (without a gate) or 4
    experts         input 2h, normed 2h, router 4 E             | k routed rows of input 2h and columns as above

Left of the bar is divided by t with sequence parallelism and whole without; right of it is the rank's share. With
dropout and without a gate this is Korthikanti et al. 2022, equations 1 to 4: s b h (10 + 24/t + 5 a s/(h t)), and
s b h (34 + 5 a s/h)/t. A routed row is kept once, sorted by expert; its output is not, as the gate's probability is
applied before the last matrix (Megatron-LM). Rows follow tokens: k n etp/t on average, times the imbalance of the
fullest rank or the capacity factor. Expert tensor parallelism gathers rows, so their inputs are not divided.

Left out: fp8 copies of inputs, buffers that allocators round up (see `reserve`), and the rotary tables.
"""

from __future__ import annotations

from dataclasses import dataclass

from skymoe.plan.hardware.gpu import Precision
from skymoe.plan.memory.static import columns, heads
from skymoe.plan.shape import AttentionShape, FfnShape
from skymoe.plan.work import Recompute, Work
from skymoe.spec.layout import DispatchMode

STATISTICS_BYTES = 4  # log-sum-exp of fused attention, and the router's logits: fp32


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes of one half.

    Attributes:
        kept: to the backward pass, at the work's level of recomputation (whole layers aside).
        again: made again in the backward pass at that level, then alive.
        buffers: alive only while the half runs.
    """

    kept: float
    again: float = 0.0
    buffers: float = 0.0


def element_bytes(work: Work) -> float:
    """Of an activation: 4 where everything is fp32, else 2 (fp8 products read and write bf16)."""
    return 4.0 if work.precision is Precision.FP32 else 2.0


def layer_input(work: Work) -> float:
    """Bytes of the residual stream on a rank: what is kept of a layer that is run again."""
    return _rows(work) * work.shape.hidden_size * element_bytes(work)


def attention_bytes(work: Work, shape: AttentionShape) -> Kept:
    """The attention half: norm, projections, core, residual."""
    size, tokens = element_bytes(work), work.tokens
    q, kv = heads(shape, work.division.tp)
    outside = layer_input(work) + _mask(work)
    normed = layer_input(work)
    inside = tokens * size * (q * (shape.head_dim + shape.value_dim) + _key_value_width(shape, q, kv))
    inside += tokens * STATISTICS_BYTES * q if work.flash else 0.0
    compressed = tokens * size * _compressed_width(shape)
    scores = 0.0 if work.flash else tokens * q * _seen(work, shape) * (2 * size + 1 if work.shape.dropout else size)
    kept = outside + inside + compressed
    if work.recompute is Recompute.MOE_ACT:
        return Kept(kept=kept + scores, again=normed)
    if work.recompute is Recompute.SELECTIVE:
        return Kept(kept=kept + normed, again=scores)
    return Kept(kept=kept + normed + scores)


def ffn_bytes(work: Work, shape: FfnShape) -> Kept:
    """The feed-forward half: norm, dense feed-forward or router and experts, residual."""
    size, tokens = element_bytes(work), work.tokens
    outside, normed = layer_input(work) + _mask(work), layer_input(work)
    dense = columns(shape.shared_inner if shape.is_moe else shape.inner, work.division.tp)
    rows = routed_rows(work, shape) if shape.is_moe else 0.0
    middle = columns(shape.inner, work.division.etp) if shape.is_moe else 0
    activated = size * (tokens * dense + rows * middle)
    before = activated * (shape.matrices - 1)
    kept = outside + before + rows * work.shape.hidden_size * size
    kept += _rows(work) * STATISTICS_BYTES * shape.num_experts
    buffers = _dispatch_buffers(work, shape)
    if work.recompute is Recompute.MOE_ACT:
        return Kept(kept=kept, again=normed + activated, buffers=buffers)
    return Kept(kept=kept + normed + activated, buffers=buffers)


def routed_rows(work: Work, shape: FfnShape) -> float:
    """Rows that the experts of the fullest rank take in a micro-batch."""
    division = work.division
    mean = work.tokens * shape.top_k * division.etp / division.tp
    return mean * (work.imbalance if work.capacity is None else work.capacity)


def _rows(work: Work) -> float:
    """Tokens of the residual stream on a rank."""
    return work.tokens / work.division.tp if work.division.sequence_parallel else work.tokens


def _mask(work: Work) -> float:
    return _rows(work) * work.shape.hidden_size if work.shape.dropout else 0.0


def _seen(work: Work, shape: AttentionShape) -> int:
    """Columns of a row of scores that are stored."""
    return work.sequence_length if shape.window is None else min(shape.window, work.sequence_length)


def _key_value_width(shape: AttentionShape, q: int, kv: int) -> int:
    """Of keys and values; latent attention expands them for every query head."""
    return (q if shape.kv_rank else kv) * (shape.head_dim + shape.value_dim)


def _compressed_width(shape: AttentionShape) -> int:
    """Latent attention keeps what its inner norms take and give."""
    return 2 * shape.q_rank + 2 * shape.kv_rank + shape.rope_dim if shape.kv_rank else 0


def _dispatch_buffers(work: Work, shape: FfnShape) -> float:
    """Copies that travel, beside the rows that are kept: what is sent, and what comes back (see the cost model)."""
    if not shape.is_moe or work.division.ep * work.division.etp == 1:
        return 0.0
    width = work.shape.hidden_size * element_bytes(work)
    if work.division.dispatch is DispatchMode.ALL_TO_ALL:
        return 2 * routed_rows(work, shape) / work.division.etp * width
    return 2 * work.tokens * width  # all tokens of the group gathered, and the sums of partial outputs
